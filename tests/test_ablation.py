"""Ablations against loops written by hand, means against numpy's, and what must hold of sets."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import mechinterp as mi
from mechinterp.analyzers import ablation
from mechinterp.errors import ExamplesError, NeedsError, SiteError
from mechinterp.sites import Site

TEXTS = [[5, 6, 10, 7, 8, 2], [3, 9, 11], [8, 8, 12, 6]]
CORRUPTED = [[5, 6, 20, 7, 8, 2], [3, 19, 11], [8, 8, 22, 6]]
ANSWERS = [(5, 9), (6, 7), (8, 3)]


def ragged() -> mi.Examples:
    return mi.Examples.pairs(TEXTS, CORRUPTED, ANSWERS)


def diff(model: mi.Model, *writes: mi.Intervention) -> list[float]:
    """The logit difference of each text, in a pass of its own."""
    found: list[float] = []
    for text, (right, wrong) in zip(TEXTS, ANSWERS, strict=True):
        logits = model.trace(text, "logits", interventions=writes)["logits"][0, -1]
        found.append(float(logits[right] - logits[wrong]))
    return found


def means(model: mi.Model, site: Site) -> torch.Tensor:
    """By numpy, over all tokens but each text's first."""
    tokens = [model.trace(text, site.whole)[site.whole][0, 1:].numpy() for text in TEXTS]
    return torch.tensor(np.concatenate(tokens).astype(np.float64).mean(0))


def of(mean: torch.Tensor, site: Site) -> torch.Tensor:
    """A mean's part at the heads or neurons of a site."""
    mean = mean if site.heads is None else mean[site.heads if isinstance(site.heads, int) else list(site.heads)]
    return mean if site.neurons is None else mean[..., site.neurons]


@pytest.mark.parametrize(
    ("kind", "options", "cells"),
    [
        ("z", {}, [{"layer": 0, "head": 1}, {"layer": 2, "head": 3}]),
        ("k", {"positions": "end"}, [{"layer": 1, "kv_head": 1}]),
        ("mlp_out", {"positions": 1}, [{"layer": 1}]),
        ("z", {"heads": (2, (0, 3)), "layers": (1,)}, [{"layer": 1, "head": "2"}, {"layer": 1, "head": "0+3"}]),
        ("mlp_act", {"neurons": (4, 7), "layers": (1,)}, [{"layer": 1, "neuron": 7}]),
        ("z", {"heads": None, "positions": (1, "end")}, [{"layer": 0, "position": "1"}]),
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["zero", "mean"])
def test_ablations_by_hand(model: mi.Model, kind: str, options: Any, cells: Any, method: Any) -> None:
    data = mi.run(model, ragged(), mi.Ablation(kind, method, **options)).data
    np.testing.assert_allclose(data["clean"], diff(model), atol=1e-5)
    for cell in cells:
        head = cell.get("head", cell.get("kv_head"))
        heads = tuple(map(int, head.split("+"))) if isinstance(head, str) else head
        where = options.get("positions")
        site = Site(kind, cell["layer"], heads, 1 if isinstance(where, tuple) else where, neurons=cell.get("neuron"))
        write: mi.Intervention = mi.Zero(site)
        if method == "mean":
            write = mi.Replace(site, of(means(model, site), site))
        by_hand = np.array(diff(model, write))
        np.testing.assert_allclose(data["ablated"].sel(cell), by_hand, atol=1e-5)
        np.testing.assert_allclose(data["effect"].sel(cell), (by_hand - diff(model)).mean(), atol=1e-5)
        assert abs(by_hand - diff(model)).max() > 1e-3


def test_resampling_by_hand(model: mi.Model) -> None:
    data = mi.run(model, ragged(), mi.Ablation(method="resample", heads=(0, 2))).data
    for layer, head in ((0, 2), (1, 0)):
        site, found = Site("z", layer, head), []
        for text, corrupted, (right, wrong) in zip(TEXTS, CORRUPTED, ANSWERS, strict=True):
            value = model.trace(corrupted, site)[site]
            with model.intervene(mi.Replace(site, value)):
                logits = model.hf(torch.tensor([text])).logits[0, -1].detach()
            found.append(float(logits[right] - logits[wrong]))
        np.testing.assert_allclose(data["ablated"].sel(layer=layer, head=head), found, atol=1e-5)


def test_resampling_the_same_prompts_ablates_nothing(model: mi.Model) -> None:
    examples = replace(ragged(), corrupted=ragged().texts)
    data = mi.run(model, examples, mi.Ablation(method="resample", cumulative=(1, 12))).data
    for name in ("effect", "cumulative"):
        np.testing.assert_allclose(data[name], 0.0, atol=1e-5)


@pytest.mark.parametrize(("side", "size"), [("left", 3), ("right", 2), ("left", 1)])
def test_padding_and_batches_change_no_mean(model: mi.Model, side: str, size: int) -> None:
    """And they are merged as batches go by."""
    analyzer = mi.Ablation(method="mean", layers=(1,))
    expected = mi.run(model, ragged(), analyzer).data
    other = mi.run(model, ragged(), analyzer, padding_side=side, batch_size=size).data
    np.testing.assert_allclose(other["ablated"], expected["ablated"], atol=1e-5)


def test_a_constant_is_its_own_mean(llama: mi.Model) -> None:
    """Values in the first layer are those of the token alone, so texts of one token have one."""
    texts = mi.Examples.of([[7, 7, 7], [7, 7, 7, 7, 7]], answers=ANSWERS[:2])
    data = mi.run(llama, texts, mi.Ablation("v", "mean", layers=(0,))).data
    np.testing.assert_allclose(data["effect"], 0.0, atol=1e-5)


@pytest.mark.parametrize("method", ["zero", "mean", "resample"])
def test_sets_by_hand(either: mi.Model, method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest first, and random orders: every set is ablated by an intervention for each component."""
    monkeypatch.setattr(ablation, "RANDOM", 2)
    analyzer = mi.Ablation("z", method, cumulative=(1, 3, 12), positions="end", seed=5)
    data = mi.run(either, ragged(), analyzer).data
    strength = abs(data["effect"].values).ravel()
    ranked = np.argsort(-strength)
    assert data["rank"].values.ravel()[ranked].tolist() == list(range(12))
    random = np.random.default_rng(5)
    orders = {"ranked": [ranked], "random": [random.permutation(12), random.permutation(12)]}

    def change(chosen: list[Site]) -> float:
        if method == "resample":
            after = mi.sweep(either, ragged(), {"set": chosen}).data["value"].values[:, 0]
        else:
            put = [mi.Zero(s) if method == "zero" else mi.Replace(s, of(means(either, s), s)) for s in chosen]
            after = np.array(diff(either, *put))
        return float((after - data["clean"].values).mean())

    for order, several in orders.items():
        for size in (1, 3, 12):
            sets = [[Site("z", int(i) // 4, int(i) % 4, "end") for i in numbers[:size]] for numbers in several]
            expected = float(np.mean([change(chosen) for chosen in sets]))
            assert float(data["cumulative"].sel(order=order, size=size)) == pytest.approx(expected, abs=1e-5)
    whole = data["cumulative"].sel(size=12)
    assert float(whole.sel(order="ranked")) == pytest.approx(float(whole.sel(order="random")), abs=1e-5)
    first = float(data["cumulative"].sel(order="ranked", size=1))
    assert abs(first) == pytest.approx(strength.max(), abs=1e-5)


def test_all_of_a_layer_at_once_is_each_of_its_parts_together(model: mi.Model) -> None:
    """Heads are one axis of z, neurons of mlp_act; sets of sets; and what a layer gives needs no axis at all."""
    heads = mi.run(model, ragged(), mi.Ablation("z", layers=(1,), heads=((0, 1), 2, 3), cumulative=(3,))).data
    layer = mi.run(model, ragged(), mi.Ablation("z", layers=(1,), heads=None, cumulative=(1,))).data
    out = mi.run(model, ragged(), mi.Ablation("attn_out", layers=(1,))).data
    np.testing.assert_allclose(heads["cumulative"].values.ravel(), layer["effect"].values.repeat(2), atol=1e-5)
    np.testing.assert_allclose(layer["cumulative"].values.ravel(), layer["effect"].values.repeat(2), atol=1e-5)
    np.testing.assert_allclose(out["effect"], layer["effect"], atol=1e-5)
    neurons = mi.run(model, ragged(), mi.Ablation("mlp_act", layers=(1,), neurons="each", cumulative=(48,))).data
    mlp = mi.run(model, ragged(), mi.Ablation("mlp_out", layers=(1,))).data
    np.testing.assert_allclose(neurons["cumulative"].values.ravel(), mlp["effect"].values.repeat(2), atol=1e-5)


def test_tables_and_figures(llama: mi.Model) -> None:
    result = mi.run(llama, mi.tasks.ioi(6), mi.Ablation(cumulative=(1, 2, 4)))
    assert list(result.table().columns) == ["layer", "head", "effect", "ci_low", "ci_high", "p", "q", "rank"]
    assert result.table("cumulative").columns.tolist()[:5] == [
        *("order", "size", "cumulative", "cumulative_ci_low", "cumulative_ci_high")
    ]
    assert len(result.table("cumulative")) == 6
    assert np.isfinite(result.data["cumulative_q"]).all()
    curves = result.figure(1)
    assert {"ranked", "random"} <= {trace.name for trace in curves.data}
    assert any(trace.fill for trace in curves.data)  # the intervals


def test_ablations_that_cannot_be(llama: mi.Model) -> None:
    plain = mi.Examples.of(TEXTS, answers=ANSWERS)
    with pytest.raises(ExamplesError, match=r"no corrupted prompts; build them with Examples\.pairs"):
        mi.run(llama, plain, mi.Ablation(method="resample"))
    with pytest.raises(ExamplesError, match="one token long, and first tokens are left out of means"):
        mi.run(llama, mi.Examples.of([[5], [6]], answers=ANSWERS[:2]), mi.Ablation(method="mean"))
    odd = mi.Ablation()
    object.__setattr__(odd, "method", "odd")  # as it would be without run-time type checks
    with pytest.raises(NeedsError, match=r"must be 'zero', 'mean' or 'resample'\. Got 'odd'"):
        odd.__post_init__()
    for site in ("embed", "logits", "heads"):
        with pytest.raises(NeedsError, match=f"must be a kind that layers have.* Got '{site}'"):
            mi.Ablation(site)
    with pytest.raises(NeedsError, match="pattern has no vector for each token"):
        mi.Ablation("pattern", "mean")
    with pytest.raises(NeedsError, match=r"sizes of Ablation must be 1 or more. Got \(0, 2\)"):
        mi.Ablation(cumulative=(0, 2))
    with pytest.raises(NeedsError, match="13 components cannot be ablated together: there are 12"):
        mi.run(llama, plain, mi.Ablation(cumulative=(13,)))
    for positions in ("each", (1, "end")):
        with pytest.raises(NeedsError, match="together at all positions, or at one"):
            mi.Ablation(cumulative=(2,), positions=positions)
    with pytest.raises(NeedsError, match="sites with equal heads"):
        mi.run(llama, plain, mi.Ablation("mlp_out", heads=(1,)))
    with pytest.raises(SiteError, match="the model has layers 0 to 2"):
        mi.run(llama, plain, mi.Ablation(method="mean", layers=(3,)))


def test_the_name_mover_of_smollm2_is_needed(smollm2: mi.Model) -> None:
    data = (
        mi.run(smollm2, mi.tasks.ioi(8), mi.Ablation(method="mean", layers=(23,), positions="end"))
        .data["effect"]
        .values[0]
    )
    assert data.argmin() == 3
    assert data[3] < -1.0
