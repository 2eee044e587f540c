"""Counterfactuals against loops written by hand, and their identities."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

import mechinterp as mi
from mechinterp import sites
from mechinterp.core.analyzer import Swept
from mechinterp.errors import ExamplesError, NeedsError
from mechinterp.sites import Site, resolve

SEEN: dict[str, Swept] = {}


@dataclass(frozen=True)
class Show(mi.Analyzer):
    """Hands a sweep out as it is (all examples in one batch)."""

    sweep: mi.Sweep
    rerun: bool = False

    def needs(self, model: mi.Model) -> mi.Needs:
        return mi.Needs(reads=sites.embed(positions="end")) if self.rerun else mi.Needs(sweeps={"s": self.sweep})

    def observe(self, batch: mi.Batch) -> mi.Part:
        SEEN["s"] = batch.rerun(self.sweep) if self.rerun else batch.sweeps["s"]
        return mi.Part(torch.tensor(batch.examples.rows), "example")


def swept(model: mi.Model, examples: mi.Examples, sweep: mi.Sweep, rerun: bool = False) -> Swept:
    """What both engines give, which must be the same."""
    found: dict[str, Swept] = {}
    for engine in ("full", "packed"):
        order = mi.run(model, examples, Show(sweep, rerun), engine=engine).data["value"].values
        assert list(order) == sorted(order)
        found[engine] = SEEN["s"]
    full, packed = found["full"], found["packed"]
    assert (full.axes, full.coords) == (packed.axes, packed.coords)
    for a, b in ((full.values, packed.values), (full.base, packed.base), (full.source, packed.source)):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(b, a, atol=2e-5, rtol=1e-4, equal_nan=True)
    return packed


def equal_length_pairs(model: mi.Model) -> mi.Examples:
    generator = torch.Generator().manual_seed(4)
    clean = torch.randint(2, model.dims.vocab, (3, 6), generator=generator)
    corrupted = clean.clone()
    corrupted[:, 2] = torch.randint(2, model.dims.vocab, (3,), generator=generator)
    return mi.Examples.pairs(clean.tolist(), corrupted.tolist(), answers=[(5, 9), (6, 7), (8, 3)])


def diff(logits: torch.Tensor) -> torch.Tensor:
    right, wrong = torch.tensor([5, 6, 8]), torch.tensor([9, 7, 3])
    rows = torch.arange(3)
    return logits[rows, -1, right] - logits[rows, -1, wrong]


@pytest.mark.parametrize(
    "kind", ["resid_pre", "resid_mid", "z", "v", "mlp_out", "mlp_act", "pattern", "q_rot", "head_out"]
)
def test_patching_equals_a_loop_of_hooks(model: mi.Model, kind: str) -> None:
    examples = equal_length_pairs(model)
    clean, corrupted = list(examples.texts), list(examples.corrupted or ())
    layers = tuple(s.layer for s in model.sites if s.kind == kind and s.layer is not None)
    got = swept(model, examples, mi.Sweep(mi.logit_diff(), mi.Sites(kind, layers), positions="each"))
    source = model.trace(clean, mi.Sites(kind, layers))
    for row, layer in enumerate(layers):
        for position in (0, 2, 5):
            site = Site(kind, layer, positions=position)
            value = source[f"{kind}.{layer}"]
            part = value[:, :, position] if kind == "pattern" else value[:, position]
            out = model.trace(corrupted, "logits", interventions=[mi.Replace(site, part)])["logits"]
            torch.testing.assert_close(got.values[:, row, position], diff(out), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(got.base, diff(model.trace(corrupted, "logits")["logits"]))
    torch.testing.assert_close(got.source, diff(model.trace(clean, "logits")["logits"]))
    assert got.axes == ("layer", "position")


def test_identities_of_patching(model: mi.Model) -> None:
    examples = equal_length_pairs(model)
    whole = swept(model, examples, mi.Sweep(mi.logit_diff(), sites.resid_pre(0)))
    torch.testing.assert_close(whole.values[:, 0], whole.source)
    itself = swept(model, examples, mi.Sweep(mi.logit_diff(), sites.resid_pre(), positions="each", source="corrupted"))
    torch.testing.assert_close(itself.values, itself.base[:, None, None].expand_as(itself.values))
    before = swept(model, examples, mi.Sweep(mi.logit_diff(), sites.resid_pre(), positions=(0, 1)))
    torch.testing.assert_close(before.values, before.base[:, None, None].expand_as(before.values))


def test_heads_windows_and_given(model: mi.Model) -> None:
    examples = equal_length_pairs(model)
    noise = mi.Noise(sites.embed(positions=2), std=0.5, seed=3)
    sweep = mi.Sweep(mi.answer_prob(), sites.z(), heads="each", positions="end", base="clean", given=(noise,))
    got = swept(model, examples, sweep)
    assert got.axes == ("layer", "head")
    source = model.trace(list(examples.texts), "z")
    for layer, head in ((0, 1), (2, 3)):
        patch = mi.Replace(sites.z(layer, heads=head, positions="end"), source[f"z.{layer}"][:, -1, head])
        out = model.trace(list(examples.texts), "logits", interventions=[noise, patch])["logits"]
        probs = out[:, -1].softmax(-1)[torch.arange(3), torch.tensor([5, 6, 8])]
        torch.testing.assert_close(got.values[:, layer, head], probs, atol=1e-5, rtol=1e-4)
    window = swept(model, examples, mi.Sweep(mi.logit_diff(), sites.mlp_out(), positions=2, window=2))
    source = model.trace(list(examples.texts), "mlp_out")
    writes = [mi.Replace(sites.mlp_out(i, positions=2), source[f"mlp_out.{i}"][:, 2]) for i in (0, 1)]
    out = model.trace(list(examples.corrupted or ()), "logits", interventions=writes)["logits"]
    torch.testing.assert_close(window.values[:, 1], diff(out), atol=1e-5, rtol=1e-4)


def test_a_rerun_equals_a_declared_sweep(model: mi.Model) -> None:
    examples = equal_length_pairs(model)
    sweep = mi.Sweep(mi.kl(), sites.attn_out(), positions="each")
    declared, again = swept(model, examples, sweep), swept(model, examples, sweep, rerun=True)
    torch.testing.assert_close(declared.values, again.values)
    assert declared.base is not None and (declared.base > 0).all()
    assert declared.source is not None and declared.source.abs().max() < 1e-5


def test_reads_of_every_row(model: mi.Model) -> None:
    examples = equal_length_pairs(model)
    site = sites.resid_post(2, positions="end")
    got = swept(model, examples, mi.Sweep(sites=sites.z(1), heads="each", write=mi.Zero, base="clean", reads=(site,)))
    assert got.values is None
    for head in range(4):
        expected = model.trace(list(examples.texts), site, interventions=[mi.Zero(sites.z(1, heads=head))])[site]
        torch.testing.assert_close(got.reads[site][:, 0, head], expected)


def test_ragged_pairs_have_no_cells_beyond_their_end(model: mi.Model) -> None:
    examples = mi.Examples.pairs([[5, 6, 7, 8, 9], [5, 6, 7]], [[5, 9, 7, 8, 9], [5, 9, 7]], answers=[(5, 9), (6, 7)])
    result = mi.run(model, examples, mi.ActivationPatching("resid_pre"), batch_size=1)
    missing = np.isnan(result.data["patched"].transpose("example", "layer", "position").values)
    assert missing[1, :, 3:].all()
    assert not missing[0].any()
    assert not missing[1, :, :3].any()


def test_edited_inputs_equal_running_the_edited_texts(model: mi.Model) -> None:
    texts = [[5, 6, 7, 8, 9], [11, 12, 13]]
    edits = ((mi.Edit((1,), (20,)), mi.Edit((0, 2))), (mi.Edit((2,)),))
    examples = mi.Examples.of(texts, answers=[(5, 9), (6, 7)])
    got = swept(model, examples, mi.Sweep(mi.logit_diff(), edits=edits, base="clean")).values
    order = mi.run(model, examples, Show(mi.Sweep(mi.logit_diff(), edits=edits, base="clean"))).data
    assert len(order["value"]) == 2
    rows = {1: 0, 0: 1}  # shortest first
    for example, edit, text in ((0, 0, [5, 20, 7, 8, 9]), (0, 1, [6, 8, 9]), (1, 0, [11, 12])):
        logits = model.trace(text, "logits")["logits"][0, -1]
        right, wrong = ((5, 9), (6, 7))[example]
        assert float(got[rows[example], edit]) == pytest.approx(float(logits[right] - logits[wrong]), abs=1e-5)
    assert torch.isnan(got[rows[1], 1])
    with pytest.raises(ExamplesError, match="outside example 1"):
        swept(model, examples, mi.Sweep(mi.logit_diff(), edits=(edits[0], (mi.Edit((3,)),)), base="clean"))
    with pytest.raises(ExamplesError, match="deletes all"):
        swept(model, examples, mi.Sweep(mi.logit_diff(), edits=(edits[0], (mi.Edit((0, 1, 2)),)), base="clean"))


def test_named_positions_move_with_deleted_tokens(llama: mi.Model) -> None:
    examples = mi.Examples.of([[5, 6, 7, 8]], answers=[(5, 9)], positions={"it": [(2, 3)]})
    got = swept(llama, examples, mi.Sweep(mi.logit_diff("it"), edits=((mi.Edit((0,)),),), base="clean")).values
    logits = llama.trace([6, 7, 8], "logits")["logits"][0, 1]
    assert float(got[0, 0]) == pytest.approx(float(logits[5] - logits[9]), abs=1e-5)
    with pytest.raises(ExamplesError, match="no position 'it'"):
        swept(llama, examples, mi.Sweep(mi.logit_diff("it"), edits=((mi.Edit((2,)),),), base="clean"))


@pytest.mark.parametrize("positions", ["each", ("S2", "end"), None])
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_activation_patching_normalises(model: mi.Model, positions: Any, direction: Any) -> None:
    examples = mi.tasks.ioi(6, seed=2)
    result = mi.run(model, examples, mi.ActivationPatching("resid_post", positions=positions, direction=direction))
    data = result.data
    total = (data["clean"] - data["corrupted"]).where(data["patched"].notnull()).mean("example")
    by_hand = (data["patched"] - data["corrupted"]).mean("example") / total
    np.testing.assert_allclose(data["effect"], by_hand.transpose(*data["effect"].dims), atol=1e-4)
    assert list(result.table().columns[-5:]) == ["effect", "ci_low", "ci_high", "p", "q"]
    if positions is None:
        np.testing.assert_allclose(data["effect"], 1.0 if direction == "denoise" else 0.0, atol=1e-3)


def test_pairs_that_the_model_does_not_tell_apart_give_nan_and_say_so(llama: mi.Model) -> None:
    texts = [[5, 6, 7]] * 2
    examples = mi.Examples.pairs(texts, texts, answers=[(5, 9)] * 2)
    with pytest.warns(UserWarning, match="no effect can be normalised"):
        result = mi.run(llama, examples, mi.ActivationPatching("resid_pre"))
    assert np.isnan(result.data["effect"]).all()


def test_sweeps_that_cannot_be(llama: mi.Model) -> None:
    with pytest.raises(NeedsError, match="sites, rows or edits"):
        mi.Sweep(mi.logit_diff())
    with pytest.raises(NeedsError, match="metric or reads"):
        mi.Sweep(sites=sites.z(1))
    with pytest.raises(NeedsError, match="window of 3"):
        swept(llama, equal_length_pairs(llama), mi.Sweep(mi.logit_diff(), sites.embed(), window=3))
    with pytest.raises(NeedsError, match="sites with equal heads"):
        swept(llama, equal_length_pairs(llama), mi.Sweep(mi.logit_diff(), sites.mlp_out(), heads="each"))
    with pytest.raises(ExamplesError, match="no corrupted prompts"):
        swept(llama, mi.Examples.of([[5, 6]], answers=[(5, 9)]), mi.Sweep(mi.logit_diff(), sites.z()))


def test_metrics_by_hand(model: mi.Model) -> None:
    texts = [[5, 6, 7, 8, 9], [11, 12, 13]]
    examples = mi.Examples.of(texts, answers=[([5, 4], 9), (6, [7, 2, 3])])

    @dataclass(frozen=True)
    class Scores(mi.Analyzer):
        def needs(self, model: mi.Model) -> mi.Needs:
            metrics = {"diff": mi.logit_diff(), "logit": mi.answer_logit(), "prob": mi.answer_prob(), "loss": mi.loss()}
            metrics["odds"] = mi.log_odds()
            grid = {
                n: mi.Sweep(m, sites.mlp_out(0), write=lambda s: mi.Scale(s, 1.0), base="clean")
                for n, m in metrics.items()
            }
            return mi.Needs(sweeps=grid)

        def observe(self, batch: mi.Batch) -> mi.Part:
            return mi.Part({n: (s.base, "example") for n, s in batch.sweeps.items()})

        def combine(self, parts: Iterator[mi.Part], context: mi.Context) -> mi.Result:
            return mi.Result.of(parts)

    data = mi.run(model, examples, Scores()).data
    for row, (text, right, wrong) in enumerate(zip(texts, ([5, 4], [6]), ([9], [7, 2, 3]), strict=True)):
        logits = model.trace(text, "logits")["logits"][0]
        end = logits[-1]
        assert float(data["diff"][row]) == pytest.approx(float(end[right].mean() - end[wrong].mean()), abs=1e-5)
        assert float(data["logit"][row]) == pytest.approx(float(end[right].mean()), abs=1e-5)
        assert float(data["prob"][row]) == pytest.approx(float(end.softmax(-1)[right].sum()), abs=1e-5)
        odds = end.softmax(-1)[right].sum().log() - end.softmax(-1)[wrong].sum().log()
        assert float(data["odds"][row]) == pytest.approx(float(odds), abs=1e-5)
        loss = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(text[1:]))
        assert float(data["loss"][row]) == pytest.approx(float(loss), abs=1e-5)


def test_a_metric_by_name_is_refused() -> None:
    for asks in (mi.Sweep(mi.logit_diff(), sites.z()), mi.Grad(sites.z(), mi.logit_diff())):
        object.__setattr__(asks, "metric", "logit_diff")  # as where types are not checked
        with pytest.raises(NeedsError, match=r"a metric must be one such as mi\.logit_diff\(\).* Got 'logit_diff'"):
            asks.__post_init__()


def test_grid_rows_match_its_axes(llama: mi.Model) -> None:
    from mechinterp.engine.sweep import Grid

    sweep = mi.Sweep(mi.logit_diff(), sites.v([0, 2]), positions=(1, "end"), heads=(0, 1))
    grid = Grid.of(sweep, llama)
    assert [name for name, _ in grid.axes] == ["layer", "position", "kv_head"]
    assert len(list(grid)) == grid.rows == 8
    assert next(iter(grid)) == ((Site("v", 0, 0, 1), None),)
    assert resolve("v", 3)[2] in {s.whole for row in grid for s, _ in row}


def test_a_cell_that_nobody_in_the_batch_has(model: mi.Model) -> None:
    examples = mi.Examples.pairs([[5, 6, 7], [5, 6, 7, 8, 9]], [[9, 6, 7], [4, 6, 7, 8, 9]], [(1, 2), (3, 4)])
    patching = mi.ActivationPatching("resid_pre", positions=(1, 4))
    full, packed = (
        mi.run(model, examples, patching, engine=e, batch_size=1).data["patched"] for e in ("full", "packed")
    )
    assert np.isnan(full.sel(example=0, position="4" if full["position"].dtype.kind == "U" else 4)).all()
    np.testing.assert_allclose(full, packed, atol=2e-5)
