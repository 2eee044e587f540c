"""Causal tracing against a loop written by hand, and its identities."""

from typing import Any

import numpy as np
import pytest
import torch

import mechinterp as mi
from mechinterp import sites
from mechinterp.analyzers.tracing import EARLIER, ROLES, START, roles_of
from mechinterp.errors import ExamplesError, NeedsError
from mechinterp.sites import Site

TEXTS = ([5, 6, 7, 8, 9, 10], [11, 12, 13, 14], [15, 16, 17, 18, 19])
SPANS = [(1, 3), (0, 2), (2, 3)]
ANSWERS = [4, (5, 6), ([7, 8], 9)]
RIGHT = ([4], [5], [7, 8])
SITES = {"states": "resid_post", "attention": "attn_out", "mlp": "mlp_out"}


def facts(texts: Any = TEXTS, spans: Any = SPANS, answers: Any = None) -> mi.Examples:
    given = [(4, 1), (5, 6), ([7, 8], 9)] if answers is None else answers
    return mi.Examples.of([list(t) for t in texts], answers=given, spans={"subject": spans})


def known(model: mi.Model) -> list[int]:
    """What the model itself says of each text."""
    return [int(model.trace(list(text), "logits")["logits"][0, -1].argmax()) for text in TEXTS]


def deviation(model: mi.Model) -> float:
    ids = [i for text, (start, stop) in zip(TEXTS, SPANS, strict=True) for i in text[start:stop]]
    return float(np.std(model.W_E[ids].detach().double().numpy(), ddof=1))


def prob(model: mi.Model, row: int, interventions: list[mi.Intervention]) -> float:
    out = model.trace(list(TEXTS[row]), "logits", interventions=interventions)["logits"][0, -1].softmax(-1)
    return float(out[RIGHT[row]].sum())


def noised(model: mi.Model, row: int, copy: int, std: float) -> mi.Intervention:
    """The documented draw, made without `Noise`: token by token from the seed."""
    generator = torch.Generator().manual_seed(copy)
    start, stop = SPANS[row]
    draw = torch.stack([torch.randn(model.dims.d_model, generator=generator) for _ in range(stop - start)])
    return mi.Apply(sites.embed(positions=tuple(range(start, stop))), lambda value: value + std * draw)


def by_hand(model: mi.Model, row: int, kind: str, layer: int, at: int, window: int, copies: int, sever: Any) -> float:
    text, n, name = list(TEXTS[row]), model.dims.n_layers, SITES[kind]
    clean = model.trace(text, name)
    restored = [layer] if kind == "states" else [i for i in range(n) if layer - window // 2 <= i < layer + window / 2]
    writes: list[mi.Intervention] = [
        mi.Replace(Site(name, i, positions=at), clean[f"{name}.{i}"][:, at]) for i in restored
    ]
    scores: list[float] = []
    for copy in range(copies):
        noise = noised(model, row, copy, 3 * deviation(model))
        frozen: list[mi.Intervention] = []
        if sever is not None:
            part = SITES[sever]
            held = model.trace(text, part, interventions=[noise])
            free = [] if part != name else restored
            frozen = [
                mi.Replace(Site(part, i, positions=at), held[f"{part}.{i}"][:, at]) for i in range(n) if i not in free
            ]
        scores.append(prob(model, row, [noise, *frozen, *writes]))
    return float(np.mean(scores))


@pytest.mark.parametrize("sever", [None, "mlp", "attention"])
def test_every_cell_equals_a_loop_by_hand(model: mi.Model, sever: Any) -> None:
    kinds = tuple(SITES) if sever is None else ("states", sever)
    copies = 2 if sever is None else 1
    asked = mi.CausalTracing(kinds=kinds, window=2, copies=copies, sever=sever, skip_wrong=False)
    data = mi.run(model, facts(), asked).data
    cells = (("states", 1, 2), ("states", 0, 3), ("attention", 1, 3), ("mlp", 2, 2), ("mlp", 0, 1))
    for row, text in enumerate(TEXTS):
        noises = [noised(model, row, copy, 3 * deviation(model)) for copy in range(copies)]
        assert float(data["clean"][row]) == pytest.approx(prob(model, row, []), abs=1e-5)
        low = float(np.mean([prob(model, row, [noise]) for noise in noises]))
        assert float(data["noised"][row]) == pytest.approx(low, abs=1e-5)
        for kind, layer, at in (cell for cell in cells if cell[0] in kinds):
            expected = by_hand(model, row, kind, layer, at, 2, copies, sever)
            got = float(data["restored"].sel(kind=kind, layer=layer, position=at, example=row))
            assert got == pytest.approx(expected, abs=2e-5), (row, kind, layer, at)
        assert np.isnan(data["restored"].sel(example=row).values[..., len(text) :]).all()


def test_effects_are_means_over_examples_of_means_over_roles(llama: mi.Model) -> None:
    data = mi.run(llama, facts(), mi.CausalTracing(copies=1, skip_wrong=False)).data
    change = (data["restored"] - data["noised"]).sel(kind="mlp", layer=1).transpose("example", "position").values
    tokens = {  # by hand, from SPANS
        "first subject token": [(0, [1]), (1, [0])],
        "middle subject tokens": [],
        "last subject token": [(0, [2]), (1, [1]), (2, [2])],
        "first subsequent token": [(0, [3]), (1, [2]), (2, [3])],
        "further tokens": [(0, [4])],
        "last token": [(0, [5]), (1, [3]), (2, [4])],
    }
    for role, where in tokens.items():
        got = float(data["effect"].sel(kind="mlp", layer=1, role=role))
        if where:
            assert got == pytest.approx(np.mean([change[row, at].mean() for row, at in where]), abs=1e-6)
        else:
            assert np.isnan(got)
    total = data["clean"] - data["noised"]
    assert float(data["total_effect"]) == pytest.approx(float(total.mean()))
    assert data["token_role"].values[2].tolist()[:2] == ["", ""]


def test_sigma_and_the_noise(llama: mi.Model) -> None:
    result = mi.run(llama, facts(), mi.CausalTracing(noise=2.0, copies=1, kinds=("states",), skip_wrong=False))
    assert result.meta["sigma"] == pytest.approx(deviation(llama), rel=1e-5)
    assert result.meta["noise_std"] == pytest.approx(2 * deviation(llama), rel=1e-5)


def test_without_noise_nothing_changes(model: mi.Model) -> None:
    data = mi.run(model, facts(), mi.CausalTracing(noise=0.0, copies=1, window=2, skip_wrong=False)).data
    assert np.nanmax(np.abs(data["effect"].values)) < 1e-6
    assert abs(float(data["total_effect"])) < 1e-6


def test_what_must_restore_everything_or_nothing(model: mi.Model) -> None:
    data = mi.run(model, facts(), mi.CausalTracing(copies=2, kinds=("states", "mlp"), skip_wrong=False)).data
    whole = data["effect"].sel(kind="states", layer=model.dims.n_layers - 1, role="last token")
    np.testing.assert_allclose(float(whole), float(data["total_effect"]), atol=1e-5)
    assert (data["total_effect"] != 0).all()
    before = data["restored"].sel(example=0, position=0) - data["noised"].sel(example=0)
    assert float(np.abs(before).max()) < 1e-6  # noise does not reach it
    ends = facts(spans=[(5, 6), (3, 4), (4, 5)])  # nothing else is noised, so each state alone is the clean run
    data = mi.run(model, ends, mi.CausalTracing(copies=2, kinds=("states",), skip_wrong=False)).data
    effect = data["effect"].sel(role="last subject token").values
    np.testing.assert_allclose(effect, np.full_like(effect, float(data["total_effect"])), atol=1e-5)


def test_what_is_restored_is_not_held(llama: mi.Model) -> None:
    """A window over all layers restores all that severing the same part would hold; the other part is still severed."""
    options: dict[str, Any] = {"copies": 1, "kinds": ("attention",), "window": 6, "skip_wrong": False}
    plain = mi.run(llama, facts(), mi.CausalTracing(**options)).data
    same = mi.run(llama, facts(), mi.CausalTracing(**options, sever="attention")).data
    np.testing.assert_allclose(same["restored"], plain["restored"], atol=1e-5)
    severed = mi.run(llama, facts(), mi.CausalTracing(**options, sever="mlp")).data
    assert np.nanmax(np.abs(severed["restored"] - plain["restored"])) > 1e-4


def test_wrong_prompts_are_skipped_and_counted(llama: mi.Model) -> None:
    right = known(llama)
    answers = [right[0], (right[1] + 1) % 50, ([2, right[2]])]
    options: dict[str, Any] = {"copies": 1, "window": 2}
    result = mi.run(llama, facts(answers=answers), mi.CausalTracing(**options), batch_size=2)
    every = mi.run(llama, facts(answers=answers), mi.CausalTracing(**options, skip_wrong=False))
    assert result.meta["skipped"] == 1
    assert every.meta["skipped"] == 0
    assert result.data["correct"].values.tolist() == [True, False, True]
    kept = [0, 2]
    np.testing.assert_allclose(result.data["restored"][:, kept], every.data["restored"][:, kept], atol=1e-6)
    for name in ("restored", "clean", "noised"):
        assert np.isnan(result.data[name].transpose("example", ...).values[1]).all()
    cell = {"kind": "states", "layer": 2, "role": "last token"}
    last = [float(every.data["restored"][0, row, 2, at] - every.data["noised"][row]) for row, at in ((0, 5), (2, 4))]
    assert float(result.data["effect"].sel(cell)) == pytest.approx(np.mean(last), abs=1e-6)
    with pytest.raises(ExamplesError, match=r"in none of the 3 prompts.*skip_wrong=False"):
        mi.run(llama, facts(answers=[(r + 1) % 50 for r in right]), mi.CausalTracing())


def test_named_positions_take_the_place_of_roles(llama: mi.Model) -> None:
    pairs = mi.tasks.capitals(8, seed=1)
    options: dict[str, Any] = {"copies": 1, "skip_wrong": False, "layers": (0, 2)}
    named = mi.run(llama, pairs, mi.CausalTracing("country", positions=("subject", "end"), **options)).data
    each = mi.run(llama, pairs, mi.CausalTracing("country", **options)).data
    assert named["effect"].dims == ("kind", "layer", "position")
    assert "token" not in named
    for name, role in (("subject", "last subject token"), ("end", "last token")):
        a, b = named["effect"].sel(position=name), each["effect"].sel(role=role)
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_one_token_of_the_subject_is_a_subject_too(llama: mi.Model) -> None:
    """A position names one token, and noise falls on that alone."""
    text, answers = [list(TEXTS[0])], [4]
    options: dict[str, Any] = {"copies": 2, "skip_wrong": False}
    by_span = mi.Examples.of(text, answers=answers, spans={"it": [(2, 3)]})
    by_name = mi.Examples.of(text, answers=answers, positions={"it": [(1, 3)]})
    a, b = (mi.run(llama, e, mi.CausalTracing("it", **options)).data for e in (by_span, by_name))
    np.testing.assert_allclose(a["restored"], b["restored"], atol=1e-6)


def test_both_engines_agree(llama: mi.Model) -> None:
    asked = mi.CausalTracing(copies=1, window=2, sever="mlp", skip_wrong=False)
    packed, full = (mi.run(llama, facts(), asked, engine=engine).data for engine in ("packed", "full"))
    np.testing.assert_allclose(packed["restored"], full["restored"], atol=2e-5)


def test_every_token_has_one_role() -> None:
    examples = mi.Examples.of([[1] * 8, [1] * 4, [1] * 3], spans={"it": [(1, 5), (2, 4), (0, 1)]})
    first, middle, last, subsequent, further, end = ROLES
    roles = roles_of(examples.tokenize(None), "it", 8).tolist()
    assert roles[0] == [START, first, middle, middle, last, subsequent, further, end]
    assert roles[1] == [START, EARLIER, first, last, "", "", "", ""]
    assert roles[2] == [last, subsequent, end, "", "", "", "", ""]


def test_figures(llama: mi.Model) -> None:
    several = mi.run(llama, facts(), mi.CausalTracing(copies=1, skip_wrong=False))
    assert [(view.x, view.by) for view in several.views] == [("role", "kind")]
    one = mi.run(llama, facts(TEXTS[:1], SPANS[:1], [4]), mi.CausalTracing(copies=1, skip_wrong=False))
    assert [(view.x, view.by, view.x_text) for view in one.views] == [("position", "kind", "token")]
    assert one.data["token"].values[0].tolist() == llama.to_str_tokens(TEXTS[0])
    for result in (several, one):
        assert [trace.type for trace in result.figure().data] == ["heatmap"] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": ()}, "kinds of CausalTracing must be some of states, attention, mlp"),
        ({"kinds": ("state",)}, "kinds of CausalTracing"),
        ({"kinds": ("mlp", "mlp")}, "kinds of CausalTracing"),
        ({"sever": "attn"}, "sever of CausalTracing must be None, 'mlp' or 'attention'. Got 'attn'"),
        ({"window": 0}, "window of CausalTracing must be at least 1"),
        ({"copies": 0}, "copies of CausalTracing must be at least 1"),
        ({"noise": -1.0}, "noise of CausalTracing must be at least 0"),
        ({"positions": "end"}, "must be 'each' or a tuple"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(NeedsError, match=message):
        mi.CausalTracing(**options)


def test_examples_that_cannot_be_traced(llama: mi.Model) -> None:
    with pytest.raises(ExamplesError, match=r"no position 'subject'; .* define 'subject' in positions= or spans="):
        mi.run(llama, mi.Examples.of([[5, 6]], answers=[4]), mi.CausalTracing())
    with pytest.raises(ExamplesError, match="no answers"):
        mi.run(llama, mi.Examples.of([[5, 6]], spans={"subject": [(0, 1)]}), mi.CausalTracing())
    with pytest.raises(ExamplesError, match=r"name no subject 'it' \(they name none\); give spans="):
        roles_of(mi.Examples.of([[5, 6]]).tokenize(None), "it", 2)


def test_capitals_are_recalled_at_the_subject_and_read_out_at_the_end(smollm2: mi.Model) -> None:
    """The pattern of figure 2 of the paper: the last subject token early, the last token late, little in between."""
    asked = mi.CausalTracing("country", ("states", "attention"), copies=1, layers=(3, 15, 23))
    result = mi.run(smollm2, mi.tasks.capitals(8, seed=1, model=smollm2), asked)
    assert result.meta["skipped"] < 4
    total = float(result.data["total_effect"])
    states, attention = (result.data["effect"].sel(kind=kind) / total for kind in ("states", "attention"))
    assert total > 0.4
    assert float(states.sel(layer=3, role="last subject token")) > 0.6
    assert abs(float(states.sel(layer=3, role="last token"))) < 0.05
    assert float(states.sel(layer=23, role="last token")) > 0.6
    assert abs(float(states.sel(layer=23, role="last subject token"))) < 0.05
    assert float(attention.sel(layer=23, role="last token")) > 0.4  # where the end reads the subject
    assert abs(float(attention.sel(layer=3, role="last token"))) < 0.05
