"""Laws of writing, on every family."""

import pytest
import torch

import mechinterp as mi
from mechinterp import sites
from mechinterp.core.interventions import Intervention
from mechinterp.errors import ExamplesError, HookError, SiteError
from mechinterp.sites import Site
from tests.test_forward import padded


def logits(model: mi.Model, text: object, *writes: Intervention) -> torch.Tensor:
    return model.trace(text, "logits", interventions=writes)["logits"]


def test_writing_what_is_there_changes_nothing(model: mi.Model, ids: list[list[int]]) -> None:
    trace = model.trace(ids, model.sites)
    for site in model.sites:
        patched = logits(model, ids, mi.Replace(site, trace[site]))
        if site.kind in ("scores", "pattern"):  # the explicit softmax rounds differently from SDPA
            torch.testing.assert_close(patched, trace["logits"], atol=1e-4, rtol=1e-4)
        else:
            assert torch.equal(patched, trace["logits"]), site


def test_every_site_matters_and_a_read_sees_what_was_written(model: mi.Model, ids: list[list[int]]) -> None:
    base = model.trace(ids, model.sites)
    for site in model.sites:

        def edit(x: torch.Tensor, site: Site = site) -> torch.Tensor:  # norms undo a mere scaling
            rolled = x.roll(1, -1)
            return x * 2 if site.kind == "scores" else rolled.tril() if site.kind == "pattern" else rolled

        changed = model.trace(ids, [site, "logits"], interventions=[mi.Apply(site, edit)])
        assert (changed["logits"] - base["logits"]).abs().max() > 1e-3, site
        torch.testing.assert_close(changed[site], edit(base[site]), atol=1e-5, rtol=1e-4)


def test_a_write_changes_only_its_own_position_head_and_later(model: mi.Model, ids: list[list[int]]) -> None:
    reads = [sites.resid_post(1), sites.z(1), sites.resid_post(2)]
    base = model.trace(ids, reads)
    one = model.trace(ids, reads, interventions=[mi.Zero(sites.z(1, heads=2, positions=4))])
    assert torch.equal(one["z.1"][:, :4], base["z.1"][:, :4])
    assert torch.equal(one["z.1"][:, 5:], base["z.1"][:, 5:])
    assert torch.equal(one["z.1"][:, 4, [0, 1, 3]], base["z.1"][:, 4, [0, 1, 3]])
    assert not one["z.1"][:, 4, 2].any()
    assert torch.equal(one["resid_post.2"][:, :4], base["resid_post.2"][:, :4])
    assert (one["resid_post.2"][:, 5:] != base["resid_post.2"][:, 5:]).any()


def test_patching_the_whole_first_residual_gives_the_other_run(model: mi.Model, ids: list[list[int]]) -> None:
    other = [row[::-1] for row in ids]
    source = model.trace(ids, ["resid_pre.0", "logits"])
    assert torch.equal(logits(model, other, mi.Replace(sites.resid_pre(0), source["resid_pre.0"])), source["logits"])


def test_equal_edits_at_different_sites_agree(model: mi.Model, ids: list[list[int]]) -> None:
    torch.testing.assert_close(
        logits(model, ids, mi.Zero(sites.head_out(1, heads=(0, 3)))),
        logits(model, ids, mi.Zero(sites.z(1, heads=(0, 3)))),
    )
    torch.testing.assert_close(logits(model, ids, mi.Zero(sites.attn_out(1))), logits(model, ids, mi.Zero(sites.z(1))))
    torch.testing.assert_close(
        logits(model, ids, mi.Zero(sites.pattern(1))), logits(model, ids, mi.Zero(sites.v(1))), atol=1e-4, rtol=1e-4
    )
    shift = torch.randn(model.dims.d_model, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        logits(model, ids, mi.Add(sites.resid_mid(1), shift)), logits(model, ids, mi.Add(sites.attn_out(1), shift))
    )
    torch.testing.assert_close(
        logits(model, ids, mi.Add(sites.resid_post(1), shift)),
        logits(model, ids, mi.Add(sites.mlp_out(1), shift)),
        atol=1e-4,
        rtol=1e-4,
    )


def test_a_written_pattern_mixes_the_values(model: mi.Model, ids: list[list[int]]) -> None:
    """Against a loop: attention only to oneself makes z the value itself."""
    eye = torch.eye(9).expand(3, model.dims.n_heads, 9, 9)
    trace = model.trace(
        ids, ["z.1", sites.v(1, per_query_head=True), "pattern.1"], interventions=[mi.Replace(sites.pattern(1), eye)]
    )
    torch.testing.assert_close(trace["z.1"], trace[sites.v(1, per_query_head=True)])
    assert torch.equal(trace["pattern.1"], eye)
    one = mi.Replace(sites.pattern(1, heads=2, positions="end"), torch.eye(9)[0])
    trace = model.trace(ids, ["z.1", "v.1"], interventions=[one])
    torch.testing.assert_close(trace["z.1"][:, -1, 2], trace["v.1"][:, 0, 1])


def test_in_ragged_batches_a_position_is_each_example_s_own(model: mi.Model) -> None:
    texts = padded(model)
    write = mi.Scale(sites.resid_pre(1, positions=("end", 0)), 3.0)
    together = model.trace(texts, sites.resid_post(2, positions="end"), interventions=[write]).stack("resid_post")[0]
    for row, text in enumerate(texts):
        alone = model.trace(text, sites.resid_post(2, positions="end"), interventions=[write]).stack("resid_post")[0]
        torch.testing.assert_close(together[row], alone[0], atol=1e-5, rtol=1e-5)


def test_spans_of_different_length_are_written_whole(model: mi.Model, ids: list[list[int]]) -> None:
    examples = mi.Examples.of(ids, spans={"subject": [(1, 4), (2, 3), (0, 2)]})
    site = sites.embed(positions="subject")
    trace = model.trace(examples, [sites.embed(), site], interventions=[mi.Zero(site)])
    for row, (start, stop) in enumerate([(1, 4), (2, 3), (0, 2)]):
        zero = (trace[sites.embed()][row] == 0).all(-1)
        assert zero.nonzero().flatten().tolist() == list(range(start, stop))
        chosen = trace[site][row]
        assert torch.isnan(chosen[stop - start :]).all()
        assert not chosen[: stop - start].any()


@pytest.mark.parametrize("write", ["add", "mean", "noise", "project", "steer", "apply"])
def test_each_intervention_does_its_arithmetic(model: mi.Model, ids: list[list[int]], write: str) -> None:
    site = sites.resid_post(1, positions=(2, 5))
    base = model.trace(ids, site)[site]
    rng = torch.Generator().manual_seed(3)
    vector, other = torch.randn(32, generator=rng), torch.randn(32, generator=rng)
    reference = torch.randn(4, 7, 32, generator=rng)
    reference[0, 6] = float("nan")
    edits = {
        "add": (mi.Add(site, vector), base + vector),
        "mean": (
            mi.Mean(site, reference),
            reference.flatten(0, 1)[[i for i in range(28) if i != 6]].mean(0).expand_as(base),
        ),
        "noise": (mi.Noise(site, 0.5, seed=1), None),
        "project": (mi.Project(site, torch.stack([vector, other])), None),
        "steer": (mi.Steer(site, vector, 2.0), base + 2 * vector / vector.norm()),
        "apply": (mi.Apply(site, lambda x: x.abs()), base.abs()),
    }
    edit, expected = edits[write]
    got = model.trace(ids, site, interventions=[edit])[site]
    if expected is not None:
        torch.testing.assert_close(got, expected)
    if write == "noise":
        draw = got - base
        torch.testing.assert_close(draw, draw[:1].expand_as(draw), atol=1e-5, rtol=0)  # one draw for all examples
        assert 0.3 < draw[0].std() < 0.7
        again = model.trace(ids[:1], site, interventions=[edit])[site]
        torch.testing.assert_close(again[0], got[0], atol=1e-5, rtol=0)
    if write == "project":
        assert (got @ vector).abs().max() < 1e-4
        assert (got @ other).abs().max() < 1e-4
        torch.testing.assert_close(mi.Project(site, torch.stack([vector, other]))(got), got, atol=1e-4, rtol=0)


def test_several_writes_act_in_order(model: mi.Model, ids: list[list[int]]) -> None:
    site = sites.mlp_out(1)
    base = model.trace(ids, site)[site]
    both = [mi.Add(site, torch.ones(32)), mi.Scale(site, 2.0)]
    torch.testing.assert_close(model.trace(ids, site, interventions=both)[site], (base + 1) * 2)
    torch.testing.assert_close(model.trace(ids, site, interventions=both[::-1])[site], base * 2 + 1)


def test_intervene_acts_on_every_call_inside_and_none_outside(model: mi.Model, ids: list[list[int]]) -> None:
    tensor = torch.tensor(ids)
    with torch.no_grad():
        bare = model.hf(tensor).logits
        with model.intervene(mi.Zero(sites.z(1, heads=3)), mi.Scale("pattern.0", 0.5)):
            inside = model.hf(tensor, use_cache=False).logits  # as trace does: a cache may round otherwise
            traced = model.trace(ids, ["logits", "pattern.0"])
            with model.intervene(mi.Zero("mlp_out.0")):
                deeper = model.hf(tensor).logits
        assert torch.equal(model.hf(tensor).logits, bare)
    assert torch.equal(traced["logits"], inside)
    torch.testing.assert_close(traced["pattern.0"].sum(-1), torch.full((3, 4, 9), 0.5))
    assert not torch.equal(inside, bare)
    both = [mi.Zero(sites.z(1, heads=3)), mi.Scale("pattern.0", 0.5), mi.Zero("mlp_out.0")]
    torch.testing.assert_close(deeper, logits(model, ids, *both))


def test_a_write_that_is_never_reached_is_an_error(model: mi.Model, ids: list[list[int]]) -> None:
    with pytest.raises(HookError, match=r"Zero at z.2 was never reached"):
        model.trace(ids, "resid_post.0", interventions=[mi.Zero(sites.z(2))])
    with pytest.raises(ExamplesError, match="position 40 is outside"):
        model.trace(ids, "resid_post.0", interventions=[mi.Zero(sites.z(0, positions=40))])
    with pytest.raises(HookError, match="never reached"), model.intervene(mi.Zero(sites.z(0, positions=40))):
        model.hf(torch.tensor(ids))
    with model.intervene(mi.Zero(sites.z(2))):
        pass  # the model did not run, so nothing was missed


def test_a_write_of_another_shape_is_an_error(model: mi.Model, ids: list[list[int]]) -> None:
    with pytest.raises(HookError, match=r"returned shape .* same shape"):
        logits(model, ids, mi.Apply(sites.z(0, heads=1), lambda x: x[:, :2]))


@pytest.mark.parametrize("kind", ["k", "k_normed", "k_rot", "v"])
def test_keys_and_values_are_written_for_one_query_head_of_a_group(
    model: mi.Model, ids: list[list[int]], kind: str
) -> None:
    if kind == "k_normed" and not model.arch.qk_norm:
        return
    whole, group = Site(kind, 1), Site(kind, 1, per_query_head=True)
    base = model.trace(ids, [group, "z.1", "logits"])
    same = model.trace(ids, "logits", interventions=[mi.Replace(group, base[group])])["logits"]
    torch.testing.assert_close(same, base["logits"], atol=1e-5, rtol=1e-5)
    noise = torch.randn(base[group].shape[1:], generator=torch.Generator().manual_seed(3))
    one = Site(kind, 1, heads=2, per_query_head=True)  # query heads 2 and 3 share key/value head 1
    write = mi.Add(one, noise[:, 2])
    changed = model.trace(ids, ["z.1", one, group], interventions=[write])
    torch.testing.assert_close(changed[one], base[group][:, :, 2] + noise[:, 2])
    moved = (changed["z.1"] - base["z.1"]).abs().amax((0, 1, 3))
    assert moved[2] > 1e-2
    assert moved[[0, 1, 3]].max() < 1e-5
    # Written for both query heads of a group, it is the write at their key/value head.
    both = [mi.Add(Site(kind, 1, heads=(2, 3), per_query_head=True), noise[:, [2, 2]])]
    twice = model.trace(ids, "logits", interventions=both)["logits"]
    shared = model.trace(ids, "logits", interventions=[mi.Add(Site(kind, 1, heads=1), noise[:, 2])])["logits"]
    torch.testing.assert_close(twice, shared, atol=1e-4, rtol=1e-4)
    with model.intervene(write):  # a read of somebody else's sees it
        torch.testing.assert_close(model.trace(ids, group)[group], changed[group])
    assert whole.of_kv_head == whole


def test_a_group_whose_keys_have_come_apart_has_no_one_key(model: mi.Model, ids: list[list[int]]) -> None:
    """A write there would be lost: what each query head uses was made before it."""
    split = mi.Zero(sites.k(1, heads=2, per_query_head=True))
    with pytest.raises(SiteError, match=r"k_rot.1 cannot be written in a pass that writes k.1 per query head"):
        logits(model, ids, mi.Zero(sites.k_rot(1)), split)
    with pytest.raises(SiteError, match=r"k_rot.1 cannot"), model.intervene(split):  # nor where somebody else writes
        logits(model, ids, mi.Zero(sites.k_rot(1)))
    if model.arch.qk_norm:
        with pytest.raises(SiteError, match=r"k_normed.1 cannot"):
            logits(model, ids, mi.Zero(sites.k_normed(1)), split)
    twice = logits(model, ids, mi.Scale(sites.k(1), 2.0), mi.Scale(sites.k(1, per_query_head=True), 2.0))
    torch.testing.assert_close(twice, logits(model, ids, mi.Scale(sites.k(1), 4.0)), atol=1e-5, rtol=1e-4)
    logits(model, ids, mi.Zero(sites.k_rot(0)), split)  # another layer
    both = [mi.Zero(sites.k_rot(1, per_query_head=True)), split]
    torch.testing.assert_close(logits(model, ids, *both), logits(model, ids, mi.Zero(sites.k_rot(1))))


def test_a_router_write_chooses_the_experts(ids: list[list[int]]) -> None:
    model = mi.testing.tiny("qwen3_moe")
    base = model.trace(ids, ["router.0", "mlp_in.0", "mlp_out.0", "logits"])
    same = model.trace(ids, "logits", interventions=[mi.Replace(sites.router(0), base["router.0"])])["logits"]
    assert torch.equal(same, base["logits"])
    only = torch.full((6,), float("-inf"))
    only[[1, 4]] = torch.tensor([0.0, 0.0])
    got = model.trace(ids, ["router.0", "mlp_out.0"], interventions=[mi.Replace(sites.router(0), only)])
    assert torch.equal(got["router.0"], only.expand(3, 9, 6))
    experts = model.hf.model.layers[0].mlp.experts
    x = base["mlp_in.0"].flatten(0, 1)
    choice, half = torch.tensor([[1, 4]]).expand(27, 2), torch.full((27, 2), 0.5)
    torch.testing.assert_close(got["mlp_out.0"].flatten(0, 1), experts(x, choice, half))


def test_writes_at_all_positions_start_at_the_first_real_token(model: mi.Model) -> None:
    """A value with a position axis means the same tokens whatever the padding."""
    from mechinterp.core.trace import Read
    from mechinterp.engine.forward import forward

    tokens = model.tokenize(padded(model))
    ramp = mi.Add(sites.resid_pre(0), torch.arange(9.0)[:, None] * torch.ones(32) / 10)
    read = Read(Site("resid_post", 2, positions="end"))
    right = forward(model, tokens.batch(range(3)), [read], writes=[ramp]).values[read]
    left = forward(model, tokens.batch(range(3), padding_side="left"), [read], writes=[ramp]).values[read]
    torch.testing.assert_close(left, right, atol=1e-5, rtol=1e-5)


def test_nested_and_unordered_writes_at_sites_that_no_module_makes(model: mi.Model, ids: list[list[int]]) -> None:
    """resid_mid and head_out are written through other modules: the order of the pass must still rule."""
    one = torch.ones(32)
    for writes in ([mi.Replace(sites.resid_mid(1), one), mi.Add(sites.resid_pre(1), one)],):
        for order in (writes, writes[::-1]):
            mid = model.trace(ids, "resid_mid.1", interventions=order)["resid_mid.1"]
            torch.testing.assert_close(mid, torch.ones_like(mid), atol=1e-5, rtol=0)
        with model.intervene(writes[0]):
            mid = model.trace(ids, "resid_mid.1", interventions=[writes[1]])["resid_mid.1"]
        torch.testing.assert_close(mid, torch.ones_like(mid), atol=1e-5, rtol=0)
    heads = [mi.Zero(sites.head_out(1)), mi.Add(sites.z(1), torch.ones(model.dims.d_head))]
    for order in (heads, heads[::-1]):
        assert model.trace(ids, "attn_out.1", interventions=order)["attn_out.1"].abs().max() < 1e-5
    with model.intervene(mi.Zero(sites.head_out(1))):
        again = model.trace(ids, ["attn_out.1", "head_out.1"], interventions=[mi.Zero(sites.head_out(1))])
    assert again["attn_out.1"].abs().max() < 1e-5
    assert not again["head_out.1"].any()


def test_a_mean_over_patterns_keeps_its_heads(model: mi.Model, ids: list[list[int]]) -> None:
    own = model.trace(ids[:1], "pattern.0")["pattern.0"]
    got = model.trace(ids[:1], "pattern.0", interventions=[mi.Mean(sites.pattern(0), own)])["pattern.0"]
    torch.testing.assert_close(got, own)
    z = model.trace(ids, "z.1")["z.1"]
    got = model.trace(ids, "z.1", interventions=[mi.Mean("z.1", z)])["z.1"]
    torch.testing.assert_close(got, z.mean((0, 1)).expand_as(z))


def test_the_same_block_is_not_entered_twice(model: mi.Model, ids: list[list[int]]) -> None:
    block, kernel = model.intervene(mi.Zero("pattern.0")), model.kernel
    with pytest.raises(HookError, match="in force already"), block, block:
        pass
    assert model.kernel == kernel
    for _ in range(2):
        with block:
            assert not model.trace(ids, "pattern.0")["pattern.0"].any()
    assert model.kernel == kernel


def test_what_would_be_lost_between_two_blocks_is_refused(model: mi.Model, ids: list[list[int]]) -> None:
    inner = mi.Scale(sites.attn_out(1), 3.0)
    with model.intervene(mi.Zero(sites.resid_mid(1))), pytest.raises(SiteError, match=r"inside a block .* resid_mid.1"):
        model.trace(ids, "resid_mid.1", interventions=inner)
    mid = model.trace(ids, "resid_mid.1", interventions=[mi.Zero(sites.resid_mid(1)), inner])["resid_mid.1"]
    assert mid.abs().max() < 1e-4
    for kind in ("k", "v"):
        split = mi.Zero(Site(kind, 1, heads=2, per_query_head=True))
        with pytest.raises(SiteError, match=r"cannot be read .* per query head, after which a group has several"):
            model.trace(ids, Site(kind, 1), interventions=split)


def test_values_that_are_no_tensors(model: mi.Model, ids: list[list[int]]) -> None:
    base = model.trace(ids, "z.1")
    added = model.trace(ids, "z.1", interventions=mi.Add(sites.z(1), 0.5))["z.1"]
    torch.testing.assert_close(added, base["z.1"] + 0.5)
    with pytest.raises(HookError, match=r"value of Replace must be a tensor, such as trace\[site\]. Got Trace"):
        mi.Replace(sites.z(1), base)
    with pytest.raises(HookError, match="returned NoneType; return a tensor of shape"):
        logits(model, ids, mi.Apply(sites.z(1), lambda value: None))
    with pytest.raises(
        HookError, match=r"Project does not fit resid_post.1, a slice of shape \(.*; give it tensors whose"
    ):
        logits(model, ids, mi.Project(sites.resid_post(1), torch.ones(7)))


def test_a_direction_of_no_length_is_refused() -> None:
    for direction in (torch.zeros(32), torch.full((32,), float("nan"))):
        with pytest.raises(HookError, match=r"the direction of Steer at resid_post.1 has norm (0|nan); give another"):
            mi.Steer(sites.resid_post(1), direction, 2.0)
