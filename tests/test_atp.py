"""Attribution patching: a derivative, exact where the metric is linear; AtP* against loops in plain torch."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import mechinterp as mi
from mechinterp.analyzers.attribution import one_key_each
from mechinterp.core.trace import Read
from mechinterp.engine.backward import backward
from mechinterp.engine.forward import forward, score
from mechinterp.errors import ExamplesError, NeedsError, SiteError
from mechinterp.sites import Site
from mechinterp.testing import check_analyzer, tiny


@pytest.fixture
def pairs(model: mi.Model, ids: list[list[int]]) -> mi.Examples:
    return some_pairs(model, ids)


def some_pairs(model: mi.Model, ids: list[list[int]]) -> mi.Examples:
    """Seven pairs of random tokens, six to nine of them, with answers and a span."""
    rows = [[(i * 7 + k) % model.dims.vocab for i in row] for k in range(3) for row in ids][:7]
    clean = [row[: 9 - k % 4] for k, row in enumerate(rows)]
    corrupted = [[row[0], *[(i + 5) % model.dims.vocab for i in row[1:]]] for row in clean]
    return mi.Examples.pairs(clean, corrupted, answers=[(3 + k, 11) for k in range(7)], spans={"middle": [(2, 4)] * 7})


def doubles(family: str, **config: Any) -> mi.Model:
    model = tiny(family, dtype=torch.float64, **config)
    if model.dims.sparse:
        model.hf.set_experts_implementation("eager")  # the fast one knows no doubles
    return model


def estimate(result: mi.Result) -> np.ndarray:
    return result.data["estimate"].transpose("example", ...).values


# To first order

KINDS = ("resid_pre", "attn_in", "q", "k", "v", "z", "attn_out", "resid_mid", "mlp_in", "mlp_act", "mlp_out")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_it_is_the_derivative_on_the_way_to_the_patch(
    model: mi.Model, ids: list[list[int]], side: str, direction: Any
) -> None:
    """Finite differences of base + ε (source - base) at one cell, for every kind of site."""
    model = doubles(model.arch.family)
    pairs, metric, layer, step = some_pairs(model, ids), mi.logit_diff(), 1, 3e-3
    if model.dims.sparse:
        step = 3e-4  # a longer one may choose other experts, which no derivative knows of
    base, source = ("corrupted", "clean") if direction == "denoise" else ("clean", "corrupted")
    batch = model.tokenize(pairs).batch(range(7))
    kinds = [Site("embed"), *(Site(kind, layer) for kind in KINDS), Site("final_norm")]
    analyzers = [
        mi.AttributionPatching(
            site.kind,
            positions=(2, "end"),
            heads=(1,) if site.spec.head_axis else None,
            neurons=(3,) if site.kind == "mlp_act" else None,
            layers=None if site.layer is None else (layer,),
            direction=direction,
        )
        for site in kinds
    ]
    results = mi.run(model, pairs, analyzers, padding_side=side, batch_size=4)
    runs: dict[str, Any] = {
        run: forward(model, batch.run(run), [Read(site) for site in kinds]).values for run in (base, source)
    }
    for site, result in zip(kinds, results, strict=True):
        old, new = (runs[run][Read(site)] for run in (base, source))
        for column, position in enumerate((2, "end")):
            where = batch.where(position)
            assert where is not None
            one = torch.zeros(old.shape[:2], dtype=torch.bool)
            one[torch.arange(7), where.columns] = True
            cell = one.reshape(*one.shape, *[1] * (old.ndim - 2)).expand(old.shape).clone()
            if site.spec.head_axis:
                cell &= (torch.arange(old.shape[2]) == 1)[:, None]
            if site.kind == "mlp_act":
                cell &= torch.arange(old.shape[2]) == 3
            both = []
            for sign in (step, -step):
                write = mi.Replace(site, old + sign * torch.where(cell, new - old, 0.0))
                both.append(score(metric, batch, forward(model, batch.run(base), (), [metric], [write])))
            numeric = (both[0] - both[1]) / (2 * step)
            found = torch.as_tensor(estimate(result)).reshape(7, 2)[:, column]
            torch.testing.assert_close(
                found, numeric, atol=2e-3, rtol=2e-3, msg=lambda m, at=f"{site} {position}": f"{at}: {m}"
            )


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("positions", ["each", None, "end", (1, "end", -2)])
def test_where_the_metric_is_linear_it_is_exact(
    model: mi.Model, pairs: mi.Examples, direction: Any, positions: Any
) -> None:
    """Logits are linear in the final norm's output."""
    analyzer = mi.AttributionPatching("final_norm", positions=positions, direction=direction)
    found, exact = mi.run(model, pairs, [analyzer, analyzer.exact])
    assert found.data["effect"].dims == exact.data["effect"].dims
    for axis in exact.data["effect"].dims:
        assert list(found.data[axis].values) == list(exact.data[axis].values)
    for name in ("clean", "corrupted", "effect", "ci_low", "ci_high", "p"):
        np.testing.assert_allclose(found.data[name], exact.data[name], rtol=1e-3, atol=1e-4, err_msg=name)
    base = exact.data["corrupted" if direction == "denoise" else "clean"]
    np.testing.assert_allclose(estimate(found), exact.data["patched"] - base, atol=1e-4)
    if positions == "each":
        assert found.data["token"].equals(exact.data["token"])


@pytest.mark.parametrize("metric", [mi.logit_diff(), mi.answer_prob(), mi.kl(), mi.loss(), mi.answer_logit(2)])
def test_any_metric_of_both_runs(model: mi.Model, pairs: mi.Examples, metric: mi.Metric) -> None:
    analyzer = mi.AttributionPatching("final_norm", metric=metric, positions=None, guard=0.0)
    found, exact = mi.run(model, pairs, [analyzer, analyzer.exact], batch_size=3, padding_side="left")
    assert found.meta["passes"]["backward"] == 3  # one a batch
    for name in ("clean", "corrupted"):
        np.testing.assert_allclose(found.data[name], exact.data[name], atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"method": "atp*"}], ids=["atp", "atp*"])
def test_cells_add_up(model: mi.Model, pairs: mi.Examples, options: dict[str, Any]) -> None:
    """Queries are moved one by one, whatever the method; named positions are cells of the grid."""
    each, whole, span, named, heads = mi.run(
        model,
        pairs,
        [
            mi.AttributionPatching("q", heads="each", **options),
            mi.AttributionPatching("q", positions=None, **options),
            mi.AttributionPatching("q", positions="middle", **options),
            mi.AttributionPatching("q", positions=(3, "end", 7), **options),
            mi.AttributionPatching("q", heads=((0, 3), 2), **options),
        ],
        batch_size=3,
        padding_side="left",
    )
    grid = estimate(each).sum(-1)  # example layer position
    np.testing.assert_allclose(np.nansum(grid, -1), estimate(whole), atol=1e-4)
    np.testing.assert_allclose(grid[..., 2:4].sum(-1), estimate(span), atol=1e-4)
    np.testing.assert_allclose(grid[..., [3, 7]], estimate(named)[..., [0, 2]], atol=1e-4)
    assert np.isnan(estimate(named)[[2, 3, 6], :, 2]).all()  # they have no eighth token
    ends = [len(text) - 1 for text in pairs.texts]
    np.testing.assert_allclose(grid[np.arange(7), :, ends], estimate(named)[..., 1], atol=1e-4)
    assert list(heads.data["head"].values) == ["0+3", "2"]
    np.testing.assert_allclose(estimate(each)[..., [0, 3]].sum(-1), estimate(heads)[..., 0], atol=1e-4)


def test_two_forwards_and_one_backward(model: mi.Model, pairs: mi.Examples) -> None:
    """The backward has the forward of the run that it differentiates; several attributions share it."""
    several = [mi.AttributionPatching("z", heads="each"), mi.AttributionPatching(("attn_out", "mlp_out"))]
    assert mi.run(model, pairs, several)[0].meta["passes"] == {"rounds": 1, "forward": 1, "backward": 1}
    fixed = mi.AttributionPatching("q", method="atp*")
    assert mi.run(model, pairs, fixed).meta["passes"] == {"rounds": 1, "forward": 1, "backward": 1}
    dropped = mi.AttributionPatching("z", method="atp*")
    assert mi.run(model, pairs, dropped).meta["passes"] == {"rounds": 1, "forward": 1, "backward": 3}
    last = mi.AttributionPatching("z", method="atp*", layers=(2,))
    assert mi.run(model, pairs, last).meta["passes"] == {"rounds": 1, "forward": 1, "backward": 1}


# AtP*: queries and keys


def test_one_key_each_is_a_loop_even_where_attention_is_saturated() -> None:
    generator = torch.Generator().manual_seed(0)
    old, new, gradient = (torch.randn(2, 3, 6, 6, generator=generator, dtype=torch.float64) for _ in range(3))
    old, new = old * 20, new * 20
    old[0, 0, :, 2], new[0, 1, :, 2] = 60.0, 90.0  # one key has it all, or gets it all
    hidden = torch.ones(6, 6).triu(1).bool()
    old, new = old.masked_fill(hidden, -torch.inf), new.masked_fill(hidden, -torch.inf)
    old[1, 2, 3], new[1, 2, 3] = -torch.inf, -torch.inf  # padding sees nothing
    found = one_key_each(old, new, gradient)
    for key in range(6):
        moved = torch.where(torch.arange(6) == key, new, old)
        change = (moved.softmax(-1) - old.softmax(-1)).nan_to_num(0.0)
        torch.testing.assert_close(found[..., key], (change * gradient).sum(-1), atol=1e-5, rtol=1e-5)


def pattern_by_hand(model: mi.Model, layer: int, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """``head query key`` of one unpadded example, query by query; q and k are ``pos head d_head``."""
    n, heads, width = q.shape
    out = torch.zeros(heads, n, n)
    window = model.dims.windows[layer] or n
    for head in range(heads):
        keys = k[:, head // (heads // k.shape[1])]
        for query in range(n):
            first = max(0, query + 1 - window)
            out[head, query, first : query + 1] = (keys[first : query + 1] @ q[query, head] / width**0.5).softmax(0)
    return out


@pytest.mark.parametrize("options", [{}, {"batch_size": 4, "padding_side": "left"}])
@pytest.mark.parametrize("kind", ["q", "k"])
def test_queries_and_keys_by_hand(model: mi.Model, pairs: mi.Examples, kind: str, options: dict[str, Any]) -> None:
    positions: tuple[Any, ...] = ("each", None, "middle", (1, "end"))
    analyzers = [mi.AttributionPatching(kind, heads="each", method="atp*", positions=where) for where in positions]
    each, whole, span, named = (estimate(result) for result in mi.run(model, pairs, analyzers, **options))
    tokens, names = model.tokenize(pairs), ("q_rot", "k_rot")
    for row in range(0, 7, 2):
        batch = tokens.batch([row])
        length = int(batch.lengths[0])
        for layer in range(model.dims.n_layers):
            reads = [Read(Site(name, layer)) for name in names]
            base = [forward(model, batch.run("corrupted"), reads).values[read][0] for read in reads]
            source = [forward(model, batch, reads).values[read][0] for read in reads]
            at = Site("pattern", layer)
            gradient = backward(model, batch.run("corrupted"), [at], mi.logit_diff())[0][Read(at)][0]
            before = pattern_by_hand(model, layer, *base)

            def by_hand(
                head: int,
                places: list[int],
                base: list[torch.Tensor] = base,
                source: list[torch.Tensor] = source,
                layer: int = layer,
                before: torch.Tensor = before,
                gradient: torch.Tensor = gradient,
            ) -> float:
                new = [value.clone() for value in base]
                which = names.index(f"{kind}_rot")
                new[which][places, head] = source[which][places, head]
                return float(((pattern_by_hand(model, layer, *new) - before) * gradient).sum())

            for head in range(base[names.index(f"{kind}_rot")].shape[1]):
                for position in range(length):
                    assert each[row, layer, position, head] == pytest.approx(by_hand(head, [position]), abs=2e-4)
                assert whole[row, layer, head] == pytest.approx(by_hand(head, list(range(length))), abs=2e-4)
                assert span[row, layer, head] == pytest.approx(by_hand(head, [2, 3]), abs=2e-4)
                assert named[row, layer, 0, head] == pytest.approx(by_hand(head, [1]), abs=2e-4)
                assert named[row, layer, 1, head] == pytest.approx(by_hand(head, [length - 1]), abs=2e-4)
            assert np.isnan(each[row, layer, length:]).all()


def test_a_query_may_be_patched_anywhere_before_attention(model: mi.Model, pairs: mi.Examples) -> None:
    normed = ["k_normed"] if model.arch.qk_norm else []
    kinds = ["k", *normed, "k_rot"]
    found = mi.run(model, pairs, [mi.AttributionPatching(kind, heads="each", method="atp*") for kind in kinds])
    for other in found[1:]:
        assert other.data["effect"].equals(found[0].data["effect"])


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("kind", ["q", "k"])
def test_saturated_attention_is_seen_by_atp_star_alone(kind: str, direction: Any) -> None:
    """Attention is nearly one-hot, so its gradient vanishes; what follows it is nearly linear."""
    model = tiny("llama", layers=2)
    with torch.no_grad():
        attention = model.hf.model.layers[1].self_attn
        attention.q_proj.weight.mul_(32.0)
        attention.o_proj.weight.mul_(0.01)
    rows = (torch.randint(2, 90, (12, 9), generator=torch.Generator().manual_seed(1))).tolist()
    pairs = mi.Examples.pairs(rows, [[row[0], *[i + 5 for i in row[1:]]] for row in rows], answers=[(3, 11)] * 12)
    pattern = model.trace(rows, mi.sites.pattern(1))["pattern.1"]
    assert float(pattern[:, :, 4:].amax(-1).median()) > 0.99
    options: dict[str, Any] = {"heads": "each", "layers": (1,), "positions": "end", "direction": direction}
    if kind == "k":
        options["positions"] = (2, 4, 6)
    atp, star = (mi.AttributionPatching(kind, **options, method=method) for method in ("atp", "atp*"))
    exact = mi.run(model, pairs, atp.exact).data
    truth = exact["patched"] - exact["corrupted" if direction == "denoise" else "clean"]
    errors = [estimate(result) - truth.values for result in mi.run(model, pairs, [atp, star])]
    scale = np.linalg.norm(truth)
    assert np.linalg.norm(errors[1]) < 0.05 * scale
    assert np.linalg.norm(errors[0]) > 0.5 * scale


# AtP*: GradDrop


@pytest.mark.parametrize("options", [{}, {"batch_size": 4, "padding_side": "left"}])
def test_graddrop_by_hand(model: mi.Model, pairs: mi.Examples, options: dict[str, Any]) -> None:
    """Against hooks on plain Hugging Face modules, which detach one layer's output after the other."""
    heads, at_end, mlps = mi.run(
        model,
        pairs,
        [
            mi.AttributionPatching("z", heads="each", method="atp*"),
            mi.AttributionPatching("z", heads=((1, 2),), method="atp*", positions=None),
            mi.AttributionPatching("mlp_out", method="atp*", direction="noise"),
        ],
        **options,
    )
    count = model.dims.n_layers
    for row in range(0, 7, 3):
        clean, corrupted = list(pairs.texts[row]), list((pairs.corrupted or ())[row])
        answers = (3 + row, 11)
        length = len(clean)
        for kind, result in (("z", heads), ("mlp_out", mlps)):
            base, source = (corrupted, clean) if kind == "z" else (clean, corrupted)
            other, _ = plain(model, kind, source, answers, None)
            products = []
            for dropped in range(count):
                value, gradient = plain(model, kind, base, answers, dropped)
                product = [(o - v) * g for o, v, g in zip(other, value, gradient, strict=True)]
                if kind == "z":
                    product = [p.unflatten(-1, (model.dims.n_heads, -1)) for p in product]
                products.append(torch.stack([p.sum(-1) for p in product]))  # layer position [head]
            own = torch.eye(count).bool().reshape(count, count, *[1] * (products[0].ndim - 1))
            each = torch.stack(products)  # dropped layer position [head]
            expected = each.abs().masked_fill(own, 0.0).sum(0) / (count - 1)
            np.testing.assert_allclose(estimate(result)[row, :, :length], expected, atol=2e-4, rtol=1e-3)
            if kind == "z":  # a cell is one node: its parts are added up before their size is taken
                cell = each[..., [1, 2]].sum((2, 3)).abs().masked_fill(torch.eye(count).bool(), 0.0).sum(0)
                np.testing.assert_allclose(estimate(at_end)[row, :, 0], cell / (count - 1), atol=2e-4, rtol=1e-3)


def plain(
    model: mi.Model, kind: str, text: Any, answers: tuple[int, int], dropped: int | None
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Values and gradients of the logit difference at a site of every layer, with a layer's outputs detached."""
    kept: list[torch.Tensor] = []

    def keep(value: torch.Tensor) -> None:
        value.retain_grad()
        kept.append(value)

    def cut(_: Any, __: Any, output: Any) -> Any:
        return (output[0].detach(), *output[1:]) if isinstance(output, tuple) else output.detach()

    handles = []
    for number, layer in enumerate(model.hf.model.layers):
        if kind == "z":
            handles.append(layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args: keep(args[0])))
        else:
            handles.append(layer.mlp.register_forward_hook(lambda _, __, output: keep(output)))
        if number == dropped:
            handles += [module.register_forward_hook(cut) for module in (layer.self_attn, layer.mlp)]
    logits = model.hf(torch.tensor([text])).logits[0, -1]
    (logits[answers[0]] - logits[answers[1]]).backward()
    for handle in handles:
        handle.remove()
    model.hf.zero_grad()
    zero = torch.zeros_like
    return [v.detach()[0] for v in kept], [(zero(v) if v.grad is None else v.grad)[0] for v in kept]


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_graddrop_gives_sizes(llama: mi.Model, direction: Any) -> None:
    clean = [[i, i + 7, i + 1, i + 2] for i in range(10, 17)]
    corrupted = [[i, i + 8, i + 1, i + 2] for i in range(10, 17)]
    for answers in [(3, 4), (4, 3)]:  # the clean run has more of it, or less
        pairs = mi.Examples.pairs(clean, corrupted, answers=[answers] * 7)
        analyzer = mi.AttributionPatching("z", heads="each", method="atp*", positions="end", direction=direction)
        data = mi.run(llama, pairs, analyzer).data
        mean = abs(float((data["clean"] - data["corrupted"]).mean()))
        np.testing.assert_allclose(data["effect"], data["estimate"].mean("example") / mean, rtol=1e-5)
        assert (data["effect"] > 0).all()
        assert ((data["ci_low"] <= data["effect"]) & (data["effect"] <= data["ci_high"])).all()
        assert not {"p", "q"} & set(data)  # no size is below zero
        assert data.attrs["unit"] == "estimate / |clean - corrupted|"


# The contract and the figures


@pytest.mark.parametrize(
    "analyzer",
    [
        mi.AttributionPatching(("resid_pre", "mlp_out"), positions=None, layers=(2, 0)),
        mi.AttributionPatching("mlp_act", neurons=((1, 5), 2), layers=(1,), positions=("S2", "end")),
        mi.AttributionPatching("q", heads="each", method="atp*", metric=mi.answer_prob(), guard=0.0),
        mi.AttributionPatching("z", heads=((0, 2), 3), positions=("S2", "end"), method="atp*"),
    ],
    ids=str,
)
def test_the_contract(analyzer: mi.AttributionPatching) -> None:
    check_analyzer(analyzer, models=[tiny("llama"), tiny("qwen3_moe")])


@pytest.mark.parametrize(
    "options",
    [
        {"site": "resid_pre"},
        {"site": "z", "heads": "each", "positions": "end"},
        {"site": "k", "heads": "each", "method": "atp*"},
        {"site": ("attn_out", "mlp_out"), "method": "atp*"},
        {"site": "embed"},
        {"site": "resid_pre", "positions": None},
    ],
)
def test_figures_are_those_of_activation_patching(options: dict[str, Any]) -> None:
    analyzer = mi.AttributionPatching(**options)
    found, exact = mi.run(tiny("llama"), mi.tasks.ioi(7, seed=1), [analyzer, analyzer.exact])
    for view, theirs in zip(found.views, exact.views, strict=True):
        how = "denoise, AtP*" if analyzer.method == "atp*" else "denoise"
        assert view.title == theirs.title.replace("Activation", "Attribution").replace("denoise", how)
        assert (view.kind, view.x, view.y, view.by, view.x_text) == (
            theirs.kind,
            theirs.x,
            theirs.y,
            theirs.by,
            theirs.x_text,
        )
    for number in range(len(found.views)):
        found.figure(number)


# Bad input


def refused(**options: Any) -> Callable[[], Any]:
    return lambda: mi.AttributionPatching(**options)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (refused(site="resid_prae"), "The site of AttributionPatching must be a kind"),
        (refused(site="z", heads="all"), "The heads of AttributionPatching must be 'each'"),
        (refused(site="z", neurons="each"), "AttributionPatching('z') has no neurons"),
        (refused(site="scores"), "scores has no attribution patching: its values of two runs are both infinite"),
        (refused(site="head_out"), "attribute to z, which gives the same numbers"),
        (refused(site="logits"), "use final_norm"),
        (refused(site="resid_pre", method="atp*"), "must lie inside a layer"),
        (refused(site=("q", "z"), method="atp*"), "gives q and k a sign and other sites none"),
        (refused(site="z", metric=mi.kl(), direction="noise"), "has no gradient there; use direction='denoise'"),
    ],
)
def test_options_that_make_no_sense(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(NeedsError) as raised:
        make()
    assert said in str(raised.value)


def test_what_the_model_or_the_examples_lack(llama: mi.Model) -> None:
    pair = mi.Examples.pairs([[5, 6, 7]], [[5, 8, 7]], answers=[(3, 4)])
    with pytest.raises(SiteError, match=r"AttributionPatching: .*heads 0 to 3"):
        mi.run(llama, pair, mi.AttributionPatching("z", heads=((0, 4),)))
    with pytest.raises(SiteError, match=r"AttributionPatching: .*q_normed"):
        mi.run(llama, pair, mi.AttributionPatching("q_normed", method="atp*"))
    with pytest.raises(ExamplesError, match="position 3 is outside every example"):
        mi.run(llama, pair, mi.AttributionPatching("z", positions=(0, 3)))
    with pytest.raises(NeedsError, match="this model has one layer"):
        mi.run(tiny("llama", layers=1), pair, mi.AttributionPatching("z", method="atp*"))


def test_a_method_that_is_none() -> None:
    odd = mi.AttributionPatching("z")
    object.__setattr__(odd, "method", "odd")  # as it would be without run-time type checks
    with pytest.raises(NeedsError, match=r"The method of AttributionPatching must be 'atp' or 'atp\*'. Got 'odd'"):
        odd.__post_init__()


@pytest.mark.parametrize("write", [mi.Scale(mi.sites.z(1), 0.5), mi.Scale(mi.sites.mlp_in(2), -2.0)])
@pytest.mark.parametrize("kind", ["q", "mlp_out"])
def test_what_is_in_force_is_accounted_for(kind: str, write: mi.Intervention) -> None:
    """The estimate is the derivative of the patch that is performed under the same intervention."""
    model, step = doubles("llama"), 1e-2  # norms are in fp32, so that a smaller one is rounded away
    two = mi.tasks.ioi(2, seed=3)
    asked = mi.AttributionPatching(kind, positions=None, layers=(1,), direction="noise")
    site = mi.Site(kind, 1)
    alone = estimate(mi.run(model, two, asked))
    for i in range(2):
        batch = model.tokenize(two).batch([i])
        ids = {run: batch.run(run).ids for run in ("clean", "corrupted")}
        right, wrong = batch.answers[0]
        with model.intervene(write), torch.no_grad():
            found = estimate(mi.run(model, two, asked))
            clean, other = (model.trace(ids[run], site)[site] for run in ("clean", "corrupted"))
            values: list[float] = []
            for share in (-step, step):
                with model.intervene(mi.Replace(site, clean + share * (other - clean))):
                    logits = model.hf(ids["clean"]).logits[0, -1]
                values.append(float(logits[right[0]] - logits[wrong[0]]))
        assert float(found[i].item()) == pytest.approx((values[1] - values[0]) / (2 * step), rel=5e-3, abs=1e-4)
        assert abs(found[i].item() - alone[i].item()) > 0.05 * abs(found[i].item())


@pytest.mark.parametrize(
    ("options", "write"),
    [
        ({"site": "z", "heads": "each"}, mi.Scale(mi.sites.logits(), 2.0)),
        ({"site": "q", "heads": "each", "method": "atp*"}, mi.Zero(mi.sites.pattern(1, heads=0))),
        ({"site": "k", "heads": "each", "method": "atp*"}, mi.Scale(mi.sites.scores(2), 0.5)),
    ],
)
def test_what_is_made_anew_may_not_be_written(llama: mi.Model, options: Any, write: mi.Intervention) -> None:
    asked = mi.AttributionPatching(**options)
    with llama.intervene(write), pytest.raises(NeedsError, match=rf"{type(write).__name__} writes at .*leave"):
        mi.run(llama, mi.tasks.ioi(2), asked)
    handle = llama.hf.lm_head.register_forward_hook(lambda m, a, out: out * 2)
    with pytest.raises(NeedsError, match="hook is on lm_head"):
        mi.run(llama, mi.tasks.ioi(2), asked)
    handle.remove()
    mi.run(llama, mi.tasks.ioi(2), asked)
