"""The contract: what is declared is given, nothing else, and nobody moves anybody's numbers."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mechinterp as mi
from mechinterp import sites
from mechinterp.core.trace import Read, Reduce
from mechinterp.errors import NeedsError, SiteError
from tests.test_forward import padded, per_query, total


@dataclass(frozen=True)
class LastTokenNorm(mi.Analyzer):
    """The example of DESIGN."""

    layers: tuple[int, ...] | None = None

    def needs(self, model: mi.Model) -> mi.Needs:
        return mi.Needs(reads=sites.resid_post(self.layers, positions="end"))

    def observe(self, batch: mi.Batch) -> mi.Part:
        return mi.Part(batch.clean.stack("resid_post").norm(dim=-1), "layer example")

    def combine(self, parts: Iterator[mi.Part], context: mi.Context) -> mi.Result:
        return mi.Result.of(parts, unit="L2 norm")


@dataclass(frozen=True)
class AllNorms(mi.Analyzer):
    def needs(self, model: mi.Model) -> mi.Needs:
        return mi.Needs(reads=sites.resid_post())

    def observe(self, batch: mi.Batch) -> mi.Part:
        return mi.Part(batch.clean.stack("resid_post").norm(dim=-1), "layer example position")


@dataclass(frozen=True)
class Greedy(mi.Analyzer):
    """Reads as much as it can, to disturb others."""

    def needs(self, model: mi.Model) -> mi.Needs:
        reads = ["z", "pattern", "logits", "mlp_in", Read("pattern.1", reduce=Reduce(per_query, "example head query"))]
        return mi.Needs(reads=reads, grads={"g": mi.Grad(sites.pattern(), mi.logit_diff())})

    def observe(self, batch: mi.Batch) -> mi.Part:
        return mi.Part(batch.clean["logits"].sum((1, 2)), "example")


def pairs(model: mi.Model, n: int = 7) -> mi.Examples:
    return mi.tasks.ioi(n, seed=3)


def test_the_readme_analyzer(model: mi.Model) -> None:
    texts = padded(model)
    result = mi.run(model, texts, LastTokenNorm((0, 2)))
    assert list(result.data["layer"].values) == [0, 2]
    for row, text in enumerate(texts):
        expected = model.trace(text, "resid_post.2")["resid_post.2"][0, -1].norm()
        assert float(result.data["value"].sel(layer=2, example=row)) == pytest.approx(float(expected), rel=1e-5)
    table = result.table()
    assert list(table.columns) == ["layer", "example", "value"]
    assert len(table) == 6


def test_adding_an_analyzer_changes_no_number(model: mi.Model) -> None:
    """To the bit, on the same batches."""
    mine: list[mi.Analyzer] = [
        mi.LogitLens(), mi.DirectLogitAttribution(), mi.HeadRoles(sequences=4, length=8), LastTokenNorm(), AllNorms(),
    ]  # fmt: skip
    together = mi.run(model, pairs(model), [*mine, Greedy(), mi.ActivationPatching("z", heads="each", positions="end")])
    for analyzer, shared in zip(mine, together, strict=False):
        alone = mi.run(model, pairs(model), analyzer)
        assert alone.data.identical(shared.data), analyzer.name


def test_three_analyzers_cost_the_passes_of_one(model: mi.Model) -> None:
    calls: list[int] = []
    handles = [layer.register_forward_hook(lambda *_: calls.append(1)) for layer in model.hf.model.layers]
    try:
        mi.run(model, pairs(model), mi.LogitLens())
        one = len(calls)
        calls.clear()
        results = mi.run(model, pairs(model), [mi.LogitLens(), mi.DirectLogitAttribution(), mi.HeadRoles(sequences=0)])
        assert len(calls) == one == model.dims.n_layers
    finally:
        [h.remove() for h in handles]
    assert results[0].meta["passes"] == {"rounds": 1, "forward": 1}


def test_the_plan_foretells_the_passes(model: mi.Model) -> None:
    analyzers = [
        mi.LogitLens(),
        mi.HeadRoles(sequences=2, length=6),
        mi.ActivationPatching("resid_pre", positions=("S2", "end")),
    ]
    plan = mi.plan(model, pairs(model), analyzers, batch_size=4)
    results = mi.run(model, pairs(model), analyzers, batch_size=4)
    made = results[0].meta["passes"]
    assert sum(p.batches for p in plan.passes if p.what == "forward") == made["forward"]
    assert sum(p.rows for p in plan.passes if p.what == "sweep") == made["sweep_rows"]
    assert sum(p.token_layers for p in plan.passes if p.what == "sweep") == made["sweep_token_layers"]
    text = str(plan)
    assert "LogitLens, HeadRoles" in text
    assert "sweep of resid_pre: packed" in text
    full = mi.run(model, pairs(model), analyzers, batch_size=4, engine="full")[0].meta["passes"]
    plan = mi.plan(model, pairs(model), analyzers, batch_size=4, engine="full")
    assert sum(p.batches for p in plan.passes if p.what == "forward") == full["forward"]
    assert sum(p.rows for p in plan.passes if p.what == "sweep") == full["sweep_rows"]
    assert sum(p.token_layers for p in plan.passes if p.what == "sweep") == full["sweep_token_layers"]
    assert "LogitLens, HeadRoles, ActivationPatching" in str(plan)
    assert "one whole pass for each row, because engine='full' was asked for" in str(plan)


def test_a_plan_stops_as_early_as_the_pass(model: mi.Model) -> None:
    plan = mi.plan(model, padded(model), LastTokenNorm((0,)))
    assert [p.layers for p in plan.passes] == [1]
    assert plan.passes[0].token_layers == 21


def test_examples_come_back_in_order_and_ragged_positions_are_nan(model: mi.Model) -> None:
    texts = [*padded(model), *(t[:3] for t in padded(model))]
    result = mi.run(model, texts, AllNorms(), batch_size=2).data["value"]
    assert result.sizes["position"] == 9
    for row, text in enumerate(texts):
        values = result.sel(example=row, layer=1).values
        assert np.isnan(values[len(text) :]).all()
        expected = model.trace(text, "resid_post.1")["resid_post.1"][0].norm(dim=-1)
        np.testing.assert_allclose(values[: len(text)], expected.numpy(), rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_batch_size_and_padding_side_do_not_matter(model: mi.Model, side: str, size: int) -> None:
    analyzers: list[mi.Analyzer] = [
        mi.LogitLens(positions=None), mi.DirectLogitAttribution(), mi.HeadRoles(sequences=2, length=6), AllNorms(),
        mi.ActivationPatching("resid_mid", positions=("S2", "end")),
        mi.ActivationPatching("pattern", heads="each", positions="end"),
    ]  # fmt: skip
    base = mi.run(model, pairs(model), analyzers)
    other = mi.run(model, pairs(model), analyzers, batch_size=size, padding_side=side)
    for a, b in zip(base, other, strict=True):
        for name in a.data.data_vars:
            if a.data[name].dtype.kind == "f" and name not in ("p", "q"):
                some = {"measure": ["prob", "logit_diff"]} if "measure" in a.data[name].dims else {}  # ranks may tie
                np.testing.assert_allclose(
                    b.data[name].sel(some), a.data[name].sel(some), atol=2e-4, rtol=1e-3, err_msg=str(name)
                )


def test_an_undeclared_read_is_refused(model: mi.Model) -> None:
    @dataclass(frozen=True)
    class Nosy(LastTokenNorm):
        def observe(self, batch: mi.Batch) -> mi.Part:
            return mi.Part(batch.clean["resid_mid.1"].sum((1, 2)), "example")

    with pytest.raises(NeedsError, match=r"resid_mid.1 was not read for Nosy \(clean\).*declare it in needs"):
        mi.run(model, padded(model), [Nosy(), AllNorms()])

    @dataclass(frozen=True)
    class Late(LastTokenNorm):
        def observe(self, batch: mi.Batch) -> mi.Part:
            return mi.Part(batch.clean[sites.resid_post(1, positions=0)], "example d_model")

    with pytest.raises(NeedsError, match="was not read"):
        mi.run(model, padded(model), [Late(), AllNorms()])


def test_changing_a_shared_tensor_is_refused(model: mi.Model) -> None:
    @dataclass(frozen=True)
    class Careless(AllNorms):
        def observe(self, batch: mi.Batch) -> mi.Part:
            batch.clean["resid_post.1"].mul_(2)
            return super().observe(batch)

    with pytest.raises(NeedsError, match=r"Careless changed resid_post.1 in place"):
        mi.run(model, padded(model), [AllNorms(), Careless()])


def test_a_site_that_the_model_lacks_is_refused_before_anything_runs(llama: mi.Model) -> None:
    calls: list[int] = []
    handle = llama.hf.model.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        with pytest.raises(
            SiteError, match=r"LastTokenNorm: resid_post.7@end does not exist: the model has layers 0 to 2"
        ):
            mi.run(llama, padded(llama), [AllNorms(), LastTokenNorm((7,))])
    finally:
        handle.remove()
    assert not calls


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (lambda x: x, "must return a Part"),
        (lambda x: mi.Part(x, "layer"), "name every axis"),
        (lambda x: mi.Part(x[:, :1], "layer example"), "keep every example"),
        (lambda x: mi.Part(x[:2], "layer example"), "pass coords"),
        (lambda x: mi.Part(x.sum(1), "layer"), "without example"),
    ],
)
def test_parts_that_cannot_be_are_explained(llama: mi.Model, part: Any, message: str) -> None:
    @dataclass(frozen=True)
    class Wrong(LastTokenNorm):
        def observe(self, batch: mi.Batch) -> Any:
            return part(batch.clean.stack("resid_post").norm(dim=-1))

    with pytest.raises((NeedsError, TypeError), match=message):
        mi.run(llama, padded(llama), Wrong())


@dataclass(frozen=True)
class LargestNorm(mi.Analyzer):
    """Two rounds: find the layer with the largest norm, then look at its heads."""

    def needs(self, model: mi.Model) -> mi.Needs:
        return mi.Needs(reads=sites.attn_out(positions="end"))

    def observe(self, batch: mi.Batch) -> mi.Part:
        return mi.Part(batch.clean.stack("attn_out").norm(dim=-1), "layer example")

    def combine(self, parts: Iterator[mi.Part], context: mi.Context) -> "mi.Analyzer":
        norms = mi.Result.of(parts).data["value"].mean("example")
        return AblateHeads(int(norms.argmax("layer")))


@dataclass(frozen=True)
class AblateHeads(mi.Analyzer):
    layer: int

    def needs(self, model: mi.Model) -> mi.Needs:
        sweep = mi.Sweep(mi.logit_diff(), sites.z(self.layer), heads="each", write=mi.Zero, base="clean")
        return mi.Needs(sweeps={"heads": sweep})

    def observe(self, batch: mi.Batch) -> mi.Part:
        swept = batch.sweeps["heads"]
        assert swept.values is not None and swept.base is not None
        return mi.Part(swept.values[:, 0] - swept.base[:, None], "example head")


def test_two_rounds(model: mi.Model) -> None:
    result, lens, again = mi.run(model, pairs(model), [LargestNorm(), mi.LogitLens(), LargestNorm()])
    assert result.meta["passes"]["rounds"] == 2
    assert result.meta["passes"]["sweep_rows"] == 4 * 7, "equal sweeps of two analyzers are one"
    assert result.meta["analyzer"] == "LargestNorm"
    assert result.data.identical(again.data)
    norms = mi.run(model, pairs(model), LargestNormOnly()).data["value"].mean("example")
    layer = int(norms.argmax("layer"))
    examples = pairs(model)
    base = lens.data["logit_diff"].sel(layer=2).values
    for head in range(4):
        zero = mi.Zero(sites.z(layer, heads=head))
        for row in range(3):
            out = model.trace(
                mi.Examples.of([examples.texts[row]]), sites.logits(positions="end"), interventions=[zero]
            )
            right, wrong = (model.tokenizer(a[0])["input_ids"][0] for a in examples.answers[row])
            logits = out[sites.logits(positions="end")][0]
            change = float(logits[right] - logits[wrong]) - base[row]
            assert float(result.data["value"].sel(example=row, head=head)) == pytest.approx(change, abs=1e-4)


@dataclass(frozen=True)
class LargestNormOnly(LargestNorm):
    def combine(self, parts: Iterator[mi.Part], context: mi.Context) -> mi.Result:
        return mi.Result.of(parts)


def test_an_analyzer_that_never_ends_is_stopped(llama: mi.Model) -> None:
    @dataclass(frozen=True)
    class Forever(LastTokenNorm):
        def combine(self, parts: Iterator[mi.Part], context: mi.Context) -> Any:
            return Forever()

    with pytest.raises(NeedsError, match="more than 8 rounds"):
        mi.run(llama, padded(llama), Forever())


def test_weights_alone_need_no_examples(model: mi.Model) -> None:
    @dataclass(frozen=True)
    class Weights(mi.Analyzer):
        def combine(self, parts: Iterator[mi.Part], context: mi.Context) -> mi.Result:
            norms = [float(context.model.W_O(i).norm()) for i in range(3)]
            return mi.Result.of([mi.Part(torch.tensor(norms), "example", rows=(0, 1, 2))])

    result = mi.run(model, None, Weights())
    assert result.meta["passes"] == {"rounds": 1}
    with pytest.raises(NeedsError, match="need examples to run on"):
        mi.run(model, None, LastTokenNorm())


def test_own_examples_are_run_once_for_all_who_ask(model: mi.Model) -> None:
    heads = mi.HeadRoles(sequences=3, length=6)
    one = mi.run(model, pairs(model), [heads, mi.HeadRoles(sequences=3, length=6, floor=0.5)])
    assert one[0].meta["passes"]["forward"] == 2
    assert mi.run(model, None, []) == []


def test_merge_keeps_one_part(model: mi.Model) -> None:
    seen: list[int] = []

    @dataclass(frozen=True)
    class Sum(mi.Analyzer):
        def needs(self, model: mi.Model) -> mi.Needs:
            return mi.Needs(reads=sites.resid_post(1, positions="end"))

        def observe(self, batch: mi.Batch) -> mi.Part:
            return mi.Part(batch.clean["resid_post.1"].sum(0), "d_model")

        def merge(self, a: mi.Part, b: mi.Part) -> mi.Part:
            return mi.Part(a.values["value"][0] + b.values["value"][0], "d_model")

        def combine(self, parts: Iterator[mi.Part], context: mi.Context) -> mi.Result:
            some = list(parts)
            seen.append(len(some))
            return mi.Result.of([mi.Part(some[0].values["value"][0][None], "example d_model", rows=(0,))])

    texts = padded(model)
    merged = mi.run(model, texts, Sum(), batch_size=1).data["value"].values[0]
    assert seen == [1]
    expected = sum(model.trace(t, "resid_post.1")["resid_post.1"][0, -1] for t in texts)
    np.testing.assert_allclose(merged, expected.numpy(), atol=1e-5)


def test_out_of_memory_halves_the_batch(model: mi.Model) -> None:
    sizes: list[int] = []

    @dataclass(frozen=True)
    class Hungry(AllNorms):
        def observe(self, batch: mi.Batch) -> mi.Part:
            sizes.append(len(batch.examples))
            if len(batch.examples) > 2:
                raise torch.OutOfMemoryError("tried to allocate memory")
            return super().observe(batch)

    texts = [t for t in padded(model) for _ in range(3)]
    result = mi.run(model, texts, Hungry(), batch_size=8)
    assert sizes[:3] == [8, 4, 2]
    assert max(sizes[3:]) == 2
    np.testing.assert_allclose(
        result.data["value"], mi.run(model, texts, AllNorms()).data["value"], rtol=1e-4, atol=1e-5
    )

    @dataclass(frozen=True)
    class Starving(AllNorms):
        def observe(self, batch: mi.Batch) -> mi.Part:
            raise torch.OutOfMemoryError("tried to allocate memory")

    with pytest.raises(torch.OutOfMemoryError):
        mi.run(model, texts, Starving())


def test_provenance(model: mi.Model) -> None:
    meta = mi.run(model, padded(model), LastTokenNorm((1,)), seed=5).meta
    assert meta["analyzer"] == "LastTokenNorm"
    assert meta["options"] == {"layers": "(1,)"}
    assert (meta["seed"], meta["kernel"], meta["dtype"]) == (5, "sdpa", "float32")
    assert meta["model_hash"] == model.fingerprint
    other = mi.testing.tiny(model.arch.family, seed=9)
    assert other.fingerprint != model.fingerprint


@pytest.mark.parametrize("bad", [{"engine": "sparse"}, {"padding_side": "middle"}, {"batch_size": 0}])
def test_options_that_cannot_be(llama: mi.Model, bad: dict[str, Any]) -> None:
    with pytest.raises(NeedsError, match=f"The {next(iter(bad))} of run must be"):
        mi.run(llama, padded(llama), AllNorms(), **bad)
    with pytest.raises(Exception, match="Analyzer"):  # in these tests, the type checker is faster
        mi.run(llama, padded(llama), [mi.LogitLens])


def test_reduced_reads_reach_observe(model: mi.Model) -> None:
    read = Read(mi.Site("pattern", 1), reduce=Reduce(total, "example head"))

    @dataclass(frozen=True)
    class Reduced(mi.Analyzer):
        def needs(self, model: mi.Model) -> mi.Needs:
            return mi.Needs(reads=[read, mi.sites.pattern(2)])

        def observe(self, batch: mi.Batch) -> mi.Part:
            mass: Tensor = batch.clean[sites.pattern(1)]
            return mi.Part(
                {
                    "mass": (mass, "example head"),
                    "max": (batch.clean[sites.pattern(2)].amax(-1), "example head position"),
                }
            )

    result = mi.run(model, padded(model), Reduced()).data
    assert result["max"].dims == ("example", "head", "position")
    assert np.isnan(result["max"].sel(example=1).values[:, 5:]).all()
    assert result["mass"].shape == (3, 4)


def test_logits_at_all_positions_move_nobody_s_numbers() -> None:
    """Wide enough that another shape of the product rounds differently."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=3000, hidden_size=576, intermediate_size=64, num_hidden_layers=1, num_attention_heads=9
    )
    torch.manual_seed(0)
    model = mi.Model.wrap(transformers.LlamaForCausalLM(config))
    examples = mi.Examples.of([[i, i + 1, i + 2, i + 3] for i in range(8)], answers=[(5, 9)] * 8)

    @dataclass(frozen=True)
    class End(mi.Analyzer):
        def needs(self, model: mi.Model) -> mi.Needs:
            sweep = mi.Sweep(mi.logit_diff(), sites.mlp_out(), write=mi.Zero, base="clean")
            return mi.Needs(reads=sites.logits(positions="end"), sweeps={"s": sweep})

        def observe(self, batch: mi.Batch) -> mi.Part:
            end = batch.clean[sites.logits(positions="end")]
            return mi.Part({"end": (end, "example vocab"), "base": (batch.sweeps["s"].base, "example")})

    @dataclass(frozen=True)
    class Everywhere(mi.Analyzer):
        def needs(self, model: mi.Model) -> mi.Needs:
            return mi.Needs(reads=sites.logits())

        def observe(self, batch: mi.Batch) -> mi.Part:
            return mi.Part(batch.clean[sites.logits()].sum((1, 2)), "example")

    assert mi.run(model, examples, End()).data.identical(mi.run(model, examples, [End(), Everywhere()])[0].data)


def test_own_traces_gradients_and_tokens_are_shared_too(llama: mi.Model) -> None:
    own = mi.Own(mi.Examples.of([[5, 6, 7]]), sites.z(1))
    grad = mi.Grad(sites.z(1), mi.answer_logit())

    @dataclass(frozen=True)
    class Spoils(mi.Analyzer):
        what: str

        def needs(self, model: mi.Model) -> mi.Needs:
            return mi.Needs(reads="embed", on={"o": own}, grads={"g": grad})

        def observe(self, batch: mi.Batch) -> mi.Part:
            tensors = {"own": batch.own["o"]["z.1"], "grad": batch.grads["g"]["z.1"], "ids": batch.examples.ids}
            tensors[self.what].zero_()
            return mi.Part(torch.tensor(batch.examples.rows), "example")

    for what in ("own", "grad", "ids"):
        with pytest.raises(NeedsError, match=r"Spoils changed .* in place"):
            mi.run(llama, mi.Examples.of([[5, 6]], answers=[3]), Spoils(what))


def test_values_of_an_intervention_follow_the_examples_not_the_batches(model: mi.Model) -> None:
    """A self-patch is the identity in whatever order the rows are run."""
    texts = mi.Examples.of([[5, 6, 7, 8, 9], [11, 12], [3, 4, 5]], answers=[(5, 9), (6, 7), (8, 3)])
    site = sites.resid_post(0, positions="end")
    value = model.trace(texts, site)[site]
    base = mi.run(model, texts, mi.LogitLens()).data
    for size in (1, 2, 8):
        with model.intervene(mi.Replace(site, value)):
            again = mi.run(model, texts, mi.LogitLens(), batch_size=size).data
        np.testing.assert_allclose(again["logit_diff"], base["logit_diff"], atol=1e-4)


def test_layers_in_any_order_keep_their_labels(model: mi.Model) -> None:
    data = mi.run(model, padded(model), LastTokenNorm((2, 0))).data["value"]
    other = mi.run(model, padded(model), LastTokenNorm((0, 2))).data["value"]
    assert data.identical(other)

    @dataclass(frozen=True)
    class ByName(LastTokenNorm):
        def observe(self, batch: mi.Batch) -> mi.Part:
            resid = batch.clean[sites.resid_post(self.layers, positions="end")]
            return mi.Part(resid.norm(dim=-1), "layer example")

    assert mi.run(model, padded(model), ByName((2, 0))).data["value"].identical(other)


def test_a_position_that_a_row_lacks_is_missing_on_either_side(llama: mi.Model) -> None:
    tokens = llama.tokenize([[5, 6, 7], [5, 6, 7, 8, 9]])
    for side in ("left", "right"):
        where = tokens.batch([0, 1], padding_side=side).where((-4, -1), strict=False)
        assert where is not None
        assert where.valid is not None
        assert where.valid.tolist() == [[False, True], [True, True]]


def test_chosen_positions_as_many_as_the_text_is_long(model: mi.Model) -> None:
    """Four chosen positions in a batch of width four are no text of four tokens."""

    @dataclass(frozen=True)
    class Chosen(mi.Analyzer):
        def needs(self, model: mi.Model) -> mi.Needs:
            return mi.Needs(reads=sites.resid_post(0, positions=(0, 1, -2, -1)))

        def observe(self, batch: mi.Batch) -> mi.Part:
            return mi.Part(batch.clean[sites.resid_post(0)].norm(dim=-1), "example position")

    texts = [[5, 6, 7], [8, 9, 10, 11]]
    one = mi.run(model, texts, Chosen(), batch_size=1).data["value"]
    two = mi.run(model, texts, Chosen(), batch_size=2).data["value"]
    np.testing.assert_allclose(one, two, rtol=1e-5)
