"""Counterfactuals that a script lists; attention knock-out; heads and neurons in sets; what is held."""

import numpy as np
import pytest
import torch

import mechinterp as mi
from mechinterp.errors import ExamplesError, HookError, NeedsError, SiteError
from mechinterp.sites import Site


def diff(model: mi.Model, examples: mi.Examples, *writes: mi.Intervention) -> np.ndarray:
    """The logit difference of every clean prompt, each run by itself under interventions."""
    out: list[float] = []
    for text, sides in zip(examples.texts, examples.answers or (), strict=True):
        with model.intervene(*writes):
            logits = model.trace(text, mi.sites.logits(positions="end"))[mi.sites.logits(positions="end")][0]
        right, wrong = (model.tokenize(mi.Examples.of([text], answers=[side])).answers for side in sides)
        assert right is not None and wrong is not None
        out.append(float(logits[right[0][0][0]] - logits[wrong[0][0][0]]))
    return np.array(out)


@pytest.mark.parametrize("engine", ["packed", "full"])
def test_rows_are_what_interventions_make(model: mi.Model, engine: str) -> None:
    examples = mi.tasks.ioi(4, seed=1)
    head, late = mi.Zero(mi.sites.z(1, heads=3)), mi.Scale(mi.sites.mlp_out(2, positions="end"), 0.5)
    result = mi.sweep(model, examples, {"head": head, "both": [head, late]}, engine=engine)
    assert result.data["row"].values.tolist() == ["head", "both"]
    expected = np.stack([diff(model, examples, head), diff(model, examples, head, late)], 1)
    np.testing.assert_allclose(result.data["value"].transpose("example", "row"), expected, atol=2e-5)
    np.testing.assert_allclose(result.data["base"], diff(model, examples), atol=2e-5)
    change = expected - diff(model, examples)[:, None]
    np.testing.assert_allclose(result.data["change"], change.mean(0), atol=2e-5)


def test_a_site_in_a_row_gets_the_other_runs_value(model: mi.Model) -> None:
    examples = mi.tasks.ioi(4, seed=1)
    result = mi.sweep(model, examples, [mi.sites.resid_pre(0), "z.1.h2"])
    patching = mi.run(model, examples, mi.ActivationPatching("z", positions=None, heads="each", direction="noise"))
    data = result.data["value"].transpose("row", "example").values
    np.testing.assert_allclose(data[0], patching.data["corrupted"], atol=2e-5)
    patched = patching.data["patched"].sel(layer=1, head=2)
    np.testing.assert_allclose(data[1], patched, atol=2e-5)


def test_a_row_says_what_it_writes(llama: mi.Model) -> None:
    writes = [mi.Zero(mi.sites.z()), mi.sites.z(1, heads=2), [mi.Scale(Site("mlp_act", 0, neurons=(1, 2)), 2.0)]]
    result = mi.sweep(llama, mi.tasks.ioi(2), writes)
    assert result.data["row"].values.tolist() == ["Zero z at all layers", "patch z.1.h2", "Scale mlp_act.0.n1,2"]
    assert list(result.table().columns) == ["row", "change", "ci_low", "ci_high", "p", "q"]


def test_rows_that_cannot_be(llama: mi.Model) -> None:
    examples = mi.tasks.ioi(2)
    with pytest.raises(NeedsError, match="no rows to sweep; give at least one write"):
        mi.sweep(llama, examples, [])
    with pytest.raises(NeedsError, match=r"are a list, .* Got 'z\.0'; put it in a list"):
        mi.sweep(llama, examples, "z.0")
    for engine in ("packed", "full"):
        with pytest.raises(ExamplesError, match=r"z\.0@0,99: position 99 is outside every example; .*give one from -"):
            mi.sweep(llama, examples, [mi.Zero(mi.sites.z(0, positions=(0, 99)))], engine=engine)
    with pytest.raises(NeedsError, match="must write something"):
        mi.sweep(llama, examples, [()])
    with pytest.raises(SiteError, match="neurons 0 to"):
        mi.sweep(llama, examples, ["mlp_act.0.n99999"])
    with pytest.raises(ExamplesError, match="no corrupted prompts"):
        mi.sweep(llama, mi.Examples.of(["a b"], answers=[(3, 4)]), [mi.sites.z(0)])
    with pytest.raises(NeedsError, match="positions of their own"):
        mi.Sweep(mi.logit_diff(), edits=((mi.Edit((0,)),),), held=(mi.Sites("z"),))
    with pytest.raises(NeedsError, match="hold named ones, or all"):
        mi.Sweep(mi.logit_diff(), rows=((Site("z", 0),),), held=(mi.Sites("z", positions="each"),))
    with pytest.raises(NeedsError, match="heads or of neurons"):
        mi.Sweep(mi.logit_diff(), mi.Sites("mlp_act"), heads="each", neurons="each")


def test_what_a_knockout_hides(model: mi.Model) -> None:
    """A query's pattern without some keys is the old one without them, made to sum to one."""
    text = mi.tasks.ioi(3, seed=2)
    pattern = mi.sites.pattern(1)
    whole = model.trace(text, pattern)[pattern]
    with model.intervene(mi.Knockout(mi.sites.scores(1, positions="end"), "S1")):
        cut = model.trace(text, pattern)[pattern]
    tokens = model.tokenize(text)
    for row in range(3):
        end, hidden = len(tokens.ids[row]) - 1, tokens.positions["S1"][row]
        expected = whole[row, :, end].clone()
        expected[:, hidden] = 0
        expected = expected / expected.sum(-1, keepdim=True)
        torch.testing.assert_close(cut[row, :, end], expected, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(cut[row, :, :end], whole[row, :, :end], atol=1e-6, rtol=1e-5)


def test_knockouts_of_spans_heads_and_everything(llama: mi.Model) -> None:
    examples = mi.Examples.of([[5, 6, 7, 8], [9, 10, 11]], spans={"first": [(0, 2), (1, 2)]})
    pattern = mi.sites.pattern(0)
    with llama.intervene(mi.Knockout(mi.sites.scores(0, heads=1, positions=-1), "first")):
        cut = llama.trace(examples, pattern)[pattern]
    whole = llama.trace(examples, pattern)[pattern]
    assert (cut[0, 1, 3, :2] == 0).all() and (cut[1, 1, 2, 1] == 0) and cut[1, 1, 2, 0] > 0
    torch.testing.assert_close(cut[:, 0], whole[:, 0])
    with llama.intervene(mi.Knockout(mi.sites.scores(0, positions=-1), (0, 1, 2, 3))):
        assert (llama.trace(examples, pattern)[pattern][0, :, 3] == 0).all()
    with pytest.raises(HookError, match="its site must be scores"):
        mi.Knockout(mi.sites.z(0), "end")
    with pytest.raises(HookError, match="must know the batch"):
        mi.Knockout(mi.sites.scores(0), 0)(torch.zeros(1, 2, 3, 3))


def test_neurons_are_read_and_written_alone(model: mi.Model) -> None:
    text = [[5, 6, 7, 8]]
    layer = next(s.layer for s in model.sites if s.kind == "mlp_act")
    whole = model.trace(text, mi.sites.mlp_act(layer))[mi.sites.mlp_act(layer)]
    some, one = mi.sites.mlp_act(layer, neurons=(3, 5)), mi.sites.mlp_act(layer, neurons=4, positions=2)
    trace = model.trace(text, [some, one])
    assert torch.equal(trace[some], whole[..., [3, 5]]) and torch.equal(trace[one], whole[:, 2, 4])
    assert Site.parse(str(some)) == some and Site.parse(str(one)) == one
    with model.intervene(mi.Zero(some)):
        after = model.trace(text, mi.sites.mlp_act(layer))[mi.sites.mlp_act(layer)]
    assert (after[..., [3, 5]] == 0).all()
    kept = [i for i in range(whole.shape[-1]) if i not in (3, 5)]
    assert torch.equal(after[..., kept], whole[..., kept])
    with pytest.raises(SiteError, match="has no neurons"):
        Site("z", 0, neurons=1)


def test_what_is_held_is_the_base_runs(model: mi.Model) -> None:
    """With every part after it held, a patched stream is the base's plus the change, to the very end."""
    examples, n = mi.tasks.ioi(3, seed=4), model.dims.n_layers
    held = (mi.sites.attn_out(), mi.sites.mlp_out())
    last = mi.sites.resid_post(n - 1, positions="end")
    sweep = mi.Sweep(
        sites=mi.sites.resid_pre(1), positions="end", source="corrupted", base="clean", held=held, reads=(last,)
    )

    class Held(mi.Analyzer):
        def needs(self, model: mi.Model) -> mi.Needs:
            here = mi.sites.resid_pre(1, positions="end")
            return mi.Needs([here, last, mi.Read(here, of="corrupted")], sweeps={"held": sweep})

        def observe(self, batch: mi.Batch) -> mi.Part:
            here = mi.sites.resid_pre(1, positions="end")
            change = batch.corrupted[here] - batch.clean[here]
            gap = batch.sweeps["held"].reads[last][:, 0] - (batch.clean[last] + change)
            return mi.Part(gap.abs().amax(1), "example")

    for engine in ("packed", "full"):
        assert float(mi.run(model, examples, Held(), engine=engine).data["value"].max()) < 1e-4


def test_what_the_engines_must_agree_on(model: mi.Model) -> None:
    """Layers in one intervention, orders at one place, held at a site's own position, a row read where it writes."""
    examples, last = mi.tasks.ioi(3, seed=5), model.dims.n_layers - 1
    end = mi.sites.resid_post(last, positions="end")
    sweeps = [
        mi.Sweep(mi.logit_diff(), rows=((mi.Scale(mi.sites.mlp_out([0, 1]), 3.0),),), base="clean"),
        mi.Sweep(mi.logit_diff(), rows=((mi.sites.z(1), mi.Scale(mi.sites.z(1), 3.0)),)),
        mi.Sweep(mi.logit_diff(), mi.sites.resid_pre(1, positions="S2"), held=(mi.sites.mlp_out(positions="each"),)),
        mi.Sweep(sites=end, write=mi.Zero, reads=(end,)),
        mi.Sweep(sites=mi.sites.resid_post(0), positions="end", write=mi.Zero, reads=(mi.sites.resid_post(0),)),
    ]

    class Several(mi.Analyzer):
        def needs(self, model: mi.Model) -> mi.Needs:
            return mi.Needs(sweeps={str(i): sweep for i, sweep in enumerate(sweeps)})

        def observe(self, batch: mi.Batch) -> mi.Part:
            found = [s.values if s.values is not None else next(iter(s.reads.values())) for s in batch.sweeps.values()]
            real = torch.stack([value.flatten(1).nan_to_num().norm(dim=1) for value in found], 1)
            return mi.Part(real, "example sweep")

    packed, full = (
        mi.run(model, examples, Several(), engine=e, batch_size=1).data["value"] for e in ("packed", "full")
    )
    np.testing.assert_allclose(packed, full, atol=2e-4, rtol=1e-5)


def test_rows_read_of_ragged_examples_in_pieces(llama: mi.Model) -> None:
    texts = [list(range(5, 5 + n)) for n in (5, 7, 9, 6)]
    pairs = mi.Examples.pairs(texts, [[t + 40 for t in text] for text in texts], [(1, 2)] * 4)
    paths = mi.PathPatching((mi.sites.k(1), mi.sites.mlp_in(2)))
    small, large = (mi.run(llama, pairs, paths, budget=budget).data["patched"] for budget in (150_000, 1 << 30))
    np.testing.assert_allclose(small, large, atol=2e-5)


def test_edits_that_some_lack_and_counts_for_metrics(llama: mi.Model) -> None:
    examples = mi.Examples.of([[5, 6, 7], [5, 6, 7, 8], [9, 8, 7]], answers=[(1, 2)] * 3)
    edits = ((mi.Edit((0,)),), (), (mi.Edit((1,)), mi.Edit((2,), (4,))))

    class Edited(mi.Analyzer):
        def needs(self, model: mi.Model) -> mi.Needs:
            return mi.Needs(sweeps={"edits": mi.Sweep(mi.logit_diff(), edits=edits, base="clean")})

        def observe(self, batch: mi.Batch) -> mi.Part:
            values = batch.sweeps["edits"].values
            return mi.Part(
                torch.nn.functional.pad(values, (0, 2 - values.shape[1]), value=float("nan")), "example edit"
            )

    found = [mi.run(llama, examples, Edited(), engine=e, batch_size=1).data["value"] for e in ("packed", "full")]
    np.testing.assert_allclose(found[0], found[1], atol=2e-5)
    assert np.isfinite(found[0].values).sum(1).tolist() == [1, 0, 2]
    right = mi.sweep(llama, examples, [mi.Zero(mi.sites.z(0))] * 2, lambda logits: logits.argmax(-1) == 5)
    assert right.data["value"].dtype.kind == "f" and right.data["row"].values.tolist()[1] == "Zero z.0 (2)"
    with pytest.raises(NeedsError, match="Got an empty choice"):
        mi.run(llama, mi.tasks.ioi(2), mi.ActivationPatching("z", layers=()))
    with pytest.raises(HookError, match="must name the keys"):
        mi.Knockout(mi.sites.scores(0), "all")
