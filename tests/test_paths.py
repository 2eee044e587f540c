"""Path patching against two passes written by hand, and what must hold of any path."""

import itertools
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import mechinterp as mi
from mechinterp import sites
from mechinterp.errors import HookError, NeedsError, SiteError
from mechinterp.sites import Site, resolve

ANSWERS = [(5, 9), (6, 7), (8, 3)]


def pairs(model: mi.Model, at: int = 2) -> mi.Examples:
    generator = torch.Generator().manual_seed(4)
    clean = torch.randint(2, model.dims.vocab, (3, 6), generator=generator)
    corrupted = clean.clone()
    corrupted[:, at] = torch.randint(2, model.dims.vocab, (3,), generator=generator)
    return mi.Examples.pairs(clean.tolist(), corrupted.tolist(), ANSWERS)


def diff(logits: torch.Tensor) -> torch.Tensor:
    rows, (right, wrong) = torch.arange(3), torch.tensor(ANSWERS).T
    return logits[rows, -1, right] - logits[rows, -1, wrong]


def by_hand(
    model: mi.Model, base: Any, source: Any, sender: Site, receivers: tuple[Site, ...], frozen: bool
) -> torch.Tensor:
    """The metric after two passes: one to see what arrives, one with that put there."""
    kinds = ("z", "mlp_out") if frozen else ("z",)
    held = model.trace(base, kinds)
    writes: list[mi.Intervention] = [mi.Replace(site, held[site]) for site in held]
    writes.append(mi.Replace(sender, model.trace(source, sender)[sender]))
    first = model.trace(base, [*receivers, "logits"], interventions=writes)
    if not receivers:
        return diff(first["logits"])
    arrived = [mi.Replace(site, first[site]) for site in receivers]
    return diff(model.trace(base, "logits", interventions=arrived)["logits"])


def patched(model: mi.Model, examples: mi.Examples, analyzer: mi.PathPatching, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "clean and corrupted differ")
        return mi.run(model, examples, analyzer, **options).data


@pytest.mark.parametrize(
    ("receivers", "senders", "mlps", "positions", "direction"),
    [
        ("logits", "z", "recomputed", None, "noise"),
        (sites.q(2, heads=(1, 3), positions="end"), "z", "frozen", "end", "noise"),
        (sites.q(2, heads=(1, 3), positions="end"), "z", "recomputed", None, "denoise"),
        ((sites.k(2, heads=1), sites.v(1)), "z", "frozen", None, "denoise"),
        ((sites.q(1), sites.mlp_in(2)), "attn_out", "recomputed", 2, "noise"),
        (sites.resid_mid(1, positions=(2, 5)), "mlp_out", "frozen", (2, "end"), "noise"),
        (sites.attn_in(), "embed", "recomputed", None, "noise"),
    ],
    ids=str,
)
def test_two_passes_by_hand(
    model: mi.Model, receivers: Any, senders: Any, mlps: Any, positions: Any, direction: Any
) -> None:
    examples = pairs(model)
    base, source = list(examples.texts), list(examples.corrupted or ())
    if direction == "denoise":
        base, source = source, base
    to = () if receivers == "logits" else resolve(receivers, 3)
    heads = {"heads": (1, 2)} if senders == "z" else {}
    found = patched(
        model, examples, mi.PathPatching(receivers, senders, mlps, positions=positions, direction=direction, **heads)
    )["patched"]
    unpatched = diff(model.trace(base, "logits")["logits"])
    last = max((site.order for site in to), default=(3, 0))
    several = positions if isinstance(positions, tuple) else (positions,)
    cells = [Site("embed")] if senders == "embed" else [Site(senders, layer) for layer in range(3)]
    moved = 0
    for sender, position in itertools.product(cells, several):
        cell = replace(sender, positions=position, heads=2 if senders == "z" else None)
        got = found.isel(site=0) if senders == "embed" else found.sel(layer=sender.layer)
        got = got.sel(position=str(position)) if isinstance(positions, tuple) else got
        got = got.sel(head=2) if senders == "z" else got
        expected = unpatched
        if sender.order < last:
            expected = by_hand(model, base, source, cell, to, mlps == "frozen")
            moved += float((expected - unpatched).abs().max()) > 1e-3
        np.testing.assert_allclose(got, expected.detach(), atol=1e-5)
    assert moved > 0


def test_what_it_is_normalised_by(model: mi.Model) -> None:
    examples = mi.tasks.ioi(7, seed=3)
    for direction in ("noise", "denoise"):
        data = patched(model, examples, mi.PathPatching(sites.mlp_in(1), "attn_out", direction=direction))
        base, source = (
            data[run] for run in (("clean", "corrupted") if direction == "noise" else ("corrupted", "clean"))
        )
        by_hand = (data["patched"] - base).mean("example") / (source - base).mean("example")
        np.testing.assert_allclose(data["effect"], by_hand, atol=1e-4)
        assert np.isfinite(data["p"].sel(layer=[0, 1])).all()


def test_later_senders_have_no_path(model: mi.Model) -> None:
    data = patched(model, mi.tasks.ioi(7, seed=3), mi.PathPatching((sites.q(0), sites.k(1)), layers=(2, 0, 1)))
    assert data["layer"].values.tolist() == [2, 0, 1]
    assert data["effect"].dims == ("layer", "head")
    after = data.sel(layer=[2, 1])
    assert (after[["effect", "ci_low", "ci_high"]].to_array() == 0).all()
    assert np.isnan(after[["p", "q"]].to_array()).all()
    np.testing.assert_array_equal(after["patched"], after["clean"].broadcast_like(after["patched"]))
    before = data.sel(layer=0)
    assert (before["effect"] != 0).all()
    assert np.isfinite(before["q"]).all()


def test_a_sender_that_does_not_differ_does_nothing(model: mi.Model) -> None:
    """Pairs that differ in their third token: nobody says anything new before it."""
    examples = pairs(model)
    for receivers in ("logits", (sites.q(2), sites.v(2), sites.mlp_in(1))):
        data = patched(model, examples, mi.PathPatching(receivers, positions=(0, 1, 2), heads=(1,)))
        still = data["patched"].sel(position=["0", "1"] if data["position"].dtype.kind == "U" else [0, 1])
        np.testing.assert_allclose(still, data["clean"].broadcast_like(still), atol=1e-5)
    same = mi.Examples.pairs(examples.texts, examples.texts, ANSWERS)
    with pytest.warns(UserWarning, match="no effect can be normalised"):
        data = mi.run(model, same, mi.PathPatching(sites.q(2), heads=(1,))).data
    np.testing.assert_allclose(data["patched"], data["clean"].broadcast_like(data["patched"]), atol=1e-5)
    assert np.isnan(data["effect"].sel(layer=0)).all()


def test_everything_arrives_at_the_first_residual(model: mi.Model) -> None:
    examples = mi.tasks.ioi(6, seed=2)
    for direction in ("noise", "denoise"):
        data = patched(model, examples, mi.PathPatching(sites.resid_pre(0), "embed", direction=direction))
        np.testing.assert_allclose(data["effect"], 1.0, atol=1e-3)
        source = data["corrupted" if direction == "noise" else "clean"]
        np.testing.assert_allclose(data["patched"].isel(site=0), source, atol=1e-4)


def test_the_direct_path_to_the_logits_is_linear_up_to_the_last_norm(model: mi.Model) -> None:
    """With MLPs frozen it is the change of head_out, added to the final residual, then the norm and W_U."""
    examples = pairs(model)
    data = patched(model, examples, mi.PathPatching(mlps="frozen"))
    clean = model.trace(list(examples.texts), ["head_out", "resid_post.2"])
    corrupted = model.trace(list(examples.corrupted or ()), "head_out")
    for layer in range(3):
        change = corrupted[f"head_out.{layer}"] - clean[f"head_out.{layer}"]
        for head in range(4):
            with torch.no_grad():
                logits = model.hf.lm_head(model.hf.model.norm(clean["resid_post.2"] + change[:, :, head]))
            np.testing.assert_allclose(data["patched"].sel(layer=layer, head=head), diff(logits), atol=1e-5)


def test_q_k_and_v_together_are_their_common_input(model: mi.Model) -> None:
    examples = mi.tasks.ioi(3, seed=2)
    three = patched(model, examples, mi.PathPatching((sites.q(2), sites.k(2), sites.v(2))))
    one = patched(model, examples, mi.PathPatching(sites.attn_in(2)))
    np.testing.assert_allclose(three["patched"], one["patched"], atol=1e-5)


def test_keys_and_values_belong_to_a_group_of_query_heads(model: mi.Model) -> None:
    """Key/value head 1 is what query heads 2 and 3 see, each in its own copy."""
    examples = pairs(model)
    for make in (sites.k, sites.v):
        group = patched(model, examples, mi.PathPatching(make(2, heads=1), "attn_out"))
        copies = patched(model, examples, mi.PathPatching(make(2, heads=(2, 3), per_query_head=True), "attn_out"))
        np.testing.assert_allclose(group["patched"], copies["patched"], atol=1e-5)
        one = patched(model, examples, mi.PathPatching(make(2, heads=2, per_query_head=True), "attn_out"))
        assert float(abs(one["patched"] - group["patched"]).max()) > 1e-4
        with pytest.raises(SiteError, match="key/value heads 0 to 1"):
            mi.run(model, examples, mi.PathPatching(make(2, heads=2)))


@pytest.mark.parametrize("mlps", ["recomputed", "frozen"])
def test_small_paths_add_up(mlps: Any) -> None:
    """For inputs so near to each other that the model is linear, the first steps of all paths make up the effect.

    No nearer: transformers' norms round to float32.
    """
    model = mi.testing.tiny("qwen3", dtype=torch.float64)
    with torch.no_grad():
        near = torch.randn(3, model.dims.d_model, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        model.hf.model.embed_tokens.weight[20:23] = model.hf.model.embed_tokens.weight[10:13] + 1e-3 * near
    clean = [[5, 6, 10, 7, 8], [3, 9, 11, 4, 2], [8, 8, 12, 6, 7]]
    examples = mi.Examples.pairs(clean, [[t + 10 if t in (10, 11, 12) else t for t in row] for row in clean], ANSWERS)
    senders = {"layers": (0,), "guard": 0.0, "mlps": mlps}
    mlp = [sites.mlp_in(layer) for layer in range(3)] if mlps == "frozen" else []
    parts = [patched(model, examples, mi.PathPatching(to, **senders)) for to in ("logits", sites.attn_in(1), *mlp)]
    parts.append(patched(model, examples, mi.PathPatching(sites.attn_in(2), **senders)))
    total = mi.run(
        model,
        examples,
        mi.ActivationPatching("z", positions=None, heads="each", direction="noise", layers=(0,), guard=0.0),
    ).data
    total = total["patched"] - total["clean"]
    steps = sum(part["patched"] - part["clean"] for part in parts)
    np.testing.assert_allclose(steps, total, rtol=0, atol=5e-3 * float(abs(total).max()))
    assert float(abs(total - (parts[0]["patched"] - parts[0]["clean"])).max()) > 0.1 * float(abs(total).max())


def test_ragged_pairs_and_batches(model: mi.Model) -> None:
    """Receivers at all positions of texts of several lengths: in one batch, padded on either side, or each alone."""
    clean = [[5, 6, 7, 8, 9, 10], [11, 12, 13], [4, 3, 2, 9]]
    corrupted = [[5, 6, 20, 8, 9, 10], [11, 21, 13], [4, 22, 2, 9]]
    examples = mi.Examples.pairs(clean, corrupted, ANSWERS)
    to = {"receivers": (sites.k(2), sites.v(2)), "heads": (3,), "layers": (1,)}
    alone = [
        patched(model, mi.Examples.pairs([a], [b], [c]), mi.PathPatching(**to))["patched"]
        for a, b, c in zip(clean, corrupted, ANSWERS, strict=True)
    ]
    for side, size in (("left", 3), ("right", 3), ("left", 2)):
        some = patched(model, examples, mi.PathPatching(**to), padding_side=side, batch_size=size)["patched"]
        np.testing.assert_allclose(some.values, np.concatenate(alone), atol=1e-5)
    third = patched(model, examples, mi.PathPatching(**to, positions=(2, 3)))["patched"].squeeze()
    assert np.isnan(third.values).tolist() == [[False, False], [False, True], [False, False]]


def test_what_one_batch_saw_goes_back_into_its_examples(llama: mi.Model) -> None:
    texts = [[5, 6, 7], [8, 9, 10], [3, 4, 2]]
    value = llama.trace(texts, "z.1")["z.1"]
    write = mi.Replace(sites.z(1), torch.cat([value, value], 1)[[2, 0]], of=(2, 0))  # twice as wide: past it is padding
    batch = llama.tokenize(texts).batch((0, 2))
    np.testing.assert_array_equal(write.for_batch(batch)(torch.zeros(2, 3, 4, 8)), value[[0, 2]])
    with pytest.raises(HookError, match="no row for example 1"):
        write.for_batch(llama.tokenize(texts).batch((0, 1)))
    with pytest.raises(HookError, match="no axis of the 3 examples"):
        mi.Replace(sites.z(1), value[:2], of=(0, 1, 2))
    with pytest.raises(RuntimeError, match="must match"):  # heads are no padding
        mi.Replace(sites.z(1, heads=(0, 1), positions="end"), value[:, -1], of=(0, 1, 2))(torch.zeros(3, 2, 8))


def test_senders_and_receivers_that_cannot_be(llama: mi.Model) -> None:
    examples = pairs(llama)
    for receivers in (sites.z(2), sites.attn_out(1), "pattern", ("logits", sites.q(1)), sites.mlp_out(2)):
        with pytest.raises(NeedsError, match=r"PathPatching: .* cannot receive"):
            mi.run(llama, examples, mi.PathPatching(receivers))
    with pytest.raises(NeedsError, match=r"no sender z of all layers comes before the receivers q\.0"):
        mi.run(llama, examples, mi.PathPatching(sites.q(0)))
    with pytest.raises(NeedsError, match=r"no sender mlp_out of the layers \(1, 2\) comes before"):
        mi.run(llama, examples, mi.PathPatching(sites.q(1), "mlp_out", layers=(1, 2)))
    with pytest.raises(SiteError, match=r"z.7 does not exist: the model has layers 0 to 2"):
        mi.run(llama, examples, mi.PathPatching(sites.q(1), layers=(0, 7)))
    with pytest.raises(NeedsError, match="attn_out has no heads"):
        mi.PathPatching(senders="attn_out", heads=(1,))
    with pytest.raises(NeedsError, match="positions of PathPatching must be named"):
        mi.PathPatching(positions="each")
    for name in ("senders", "mlps", "direction"):
        odd = mi.PathPatching()
        object.__setattr__(odd, name, "odd")  # as it would be without run-time type checks
        with pytest.raises(NeedsError, match=f"The {name} of PathPatching must be .* or .*Got 'odd'"):
            odd.__post_init__()


def test_who_writes_to_the_logits_of_smollm2(smollm2: mi.Model) -> None:
    """Two heads for the right name, and one against it (Wang et al.'s negative name movers), at the last token.

    What the first of them says it has from the repeated name itself, through its value there.
    """
    pairs = mi.tasks.ioi(6)
    to_logits = mi.PathPatching(positions="end", layers=(23, 24, 29), heads=(1, 3, 4))
    direct, values = mi.run(smollm2, pairs, [to_logits, mi.PathPatching(sites.v(23, heads=1), "embed", positions="S2")])
    effect = direct.data["effect"]
    assert float(effect.sel(layer=23, head=3)) > 0.5
    assert float(effect.sel(layer=29, head=1)) > 0.2
    assert float(effect.sel(layer=24, head=4)) < -0.15
    assert abs(float(effect.sel(layer=29, head=3))) < 0.05
    assert float(values.data["effect"].values[0]) > 0.25
