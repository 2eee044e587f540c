"""Every analyzer of the table keeps the contract on every family; and `check_analyzer` sees who does not."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import xarray as xr

import mechinterp as mi
from mechinterp import sites
from mechinterp.analyzers import TABLE, find
from mechinterp.model.architecture import FAMILIES
from mechinterp.testing import check_analyzer, tiny

ANALYZERS: list[tuple[mi.Analyzer, tuple[str, ...]]] = [
    (mi.LogitLens(), ("rank",)),
    (mi.LogitLens(positions=None), ("rank", "top_id", "top_token")),
    (mi.DirectLogitAttribution(), ()),
    (mi.HeadRoles(sequences=4, length=8), ()),
    (mi.HeadWeights(directions=2, top=3), ()),
    (mi.HeadClusters(shown=6), ()),
    (mi.Hotspots(pairs=3), ()),
    (mi.SyntacticHeads(str(Path(__file__).parent / "sentences.conllu")), ()),
    (mi.ActivationPatching("resid_pre", positions=("S2", "end")), ()),
    (mi.ActivationPatching("z", heads="each", positions="end", direction="noise"), ()),
    (mi.ActivationPatching(("attn_out", "mlp_out")), ()),
    (mi.ActivationPatching("z", heads=((0, 2), 3), layers=(1,)), ()),
    (mi.AttributionPatching("z", heads="each"), ()),
    (mi.AttributionPatching("z", heads="each", direction="noise"), ()),
    (mi.EdgeAttribution("eap", intervals=True), ()),
    (mi.EdgeAttribution("eap-ig-inputs", steps=2, ungrouped=True), ()),
    (mi.AttributionPatching("k", heads="each", positions=("S2", "end"), method="atp*"), ()),
    (mi.AttributionPatching(("attn_out", "mlp_out"), method="atp*", positions=None), ()),
    (mi.PathPatching((sites.q(2), sites.k(2, heads=1)), heads=(1,), mlps="frozen"), ()),
    (mi.PathPatching("logits", "attn_out", positions=("S2", "end")), ()),
    (mi.Ablation("mlp_out", "mean", positions="end", cumulative=(1, 2)), ("rank",)),
    (mi.Ablation("z", "resample", heads=((1, 2),), layers=(0, 2)), ()),
    (mi.Accuracy(), ("rank",)),
    (mi.ActivationStats(), ()),
    (mi.CausalTracing("S1", ("states", "mlp"), copies=1, window=2, layers=(0, 2), skip_wrong=False), ()),
]


@pytest.mark.parametrize("number", range(len(ANALYZERS)), ids=lambda i: f"{i}-{ANALYZERS[i][0].name}")
def test_the_whole_table(number: int) -> None:
    """Each on one family, in turn, so that every family meets a good part of the table."""
    analyzer, ties = ANALYZERS[number]
    families = sorted(FAMILIES)
    check_analyzer(analyzer, models=[tiny(families[number % len(families)])], ties=ties)


def test_the_whole_table_is_checked() -> None:
    elsewhere = {mi.AttentionByCategory, mi.AttentionPatterns, mi.AttentionProfile}  # test_categories, test_patterns
    elsewhere |= {mi.TokenAttribution, mi.GradientAnalysis, mi.NeuronImportance}  # in theirs
    elsewhere |= {mi.Probe, mi.ProbeTransfer, mi.ConceptDirections, mi.ConceptAssociation, mi.Steering}
    elsewhere |= {mi.MaxActivating, mi.ConceptNeurons}
    elsewhere |= {mi.ClassifierWeights, mi.Trajectory, mi.HighScoreTokens, mi.SpuriousPatterns, mi.DimensionCorrelation}
    elsewhere |= {mi.Features, mi.FeatureEffects, mi.ConceptBottleneck}  # test_features, test_bottleneck
    elsewhere |= {mi.Similarity, mi.GroupSimilarity, mi.CrossLingual, mi.RepresentationMap}
    assert {type(analyzer) for analyzer, _ in ANALYZERS} | elsewhere == {find(name) for name in TABLE}


@dataclass(frozen=True)
class Norms(mi.Analyzer):
    """A good one, to be spoiled below."""

    def needs(self, model: mi.Model) -> mi.Needs:
        return mi.Needs(reads=sites.resid_post(positions="end"))

    def observe(self, batch: mi.Batch) -> mi.Part:
        return mi.Part(batch.clean.stack("resid_post").norm(dim=-1), "layer example")


class Impure(Norms):
    def needs(self, model: mi.Model) -> mi.Needs:
        return mi.Needs(reads=sites.resid_post(positions="end"), on={"own": mi.Own(own(), "embed")})


def own(count: list[int] = []) -> mi.Examples:  # noqa: B006 -- on purpose
    count.append(3)
    return mi.Examples.of([count[-5:]])


class Secret(Norms):
    def observe(self, batch: mi.Batch) -> mi.Part:
        batch.model.hf(batch.examples.ids)
        return super().observe(batch)


class Wasteful(Norms):
    def needs(self, model: mi.Model) -> mi.Needs:
        return mi.Needs(reads=[sites.resid_post(positions="end"), sites.mlp_out(0)])


class LastColumn(Norms):
    def needs(self, model: mi.Model) -> mi.Needs:
        return mi.Needs(reads=sites.resid_post())

    def observe(self, batch: mi.Batch) -> mi.Part:
        return mi.Part(batch.clean.stack("resid_post")[:, :, -1].norm(dim=-1), "layer example")


class BatchMean(Norms):
    def observe(self, batch: mi.Batch) -> mi.Part:
        norms = batch.clean.stack("resid_post").norm(dim=-1)
        return mi.Part(norms - norms.mean(1, keepdim=True), "layer example")


class Restless(Norms):
    def observe(self, batch: mi.Batch) -> mi.Part:
        return mi.Part(torch.rand(3, len(batch.examples)), "layer example")


class Heavy(Norms):
    def observe(self, batch: mi.Batch) -> mi.Part:
        with torch.no_grad():
            batch.model.W_E.mul_(1.0)
        return super().observe(batch)


class Leaky(Norms):
    def combine(self, parts: Iterator[mi.Part], context: mi.Context) -> mi.Result:
        context.model.hf.register_forward_hook(lambda *_: None)
        return mi.Result.of(parts)


class Borrowed(Norms):
    """Draws the interval of one value around another."""

    def combine(self, parts: Iterator[mi.Part], context: mi.Context) -> mi.Result:
        norm = mi.Result.of(parts).data["value"].mean("example")
        data = xr.Dataset({"norm": norm, "ci_low": norm - 0.1, "ci_high": norm + 0.1, "half": norm / 2})
        return mi.Result(data, {}, (mi.View("lines", "norm", "layer"), mi.View("lines", "half", "layer")))


@pytest.mark.parametrize(
    ("spoiled", "law"),
    [
        (Impure, "must be pure"),
        (Secret, "passes and declared"),
        (Wasteful, "declares mlp_out of the clean run and does without it"),
        (LastColumn, "depends on the batch"),
        (BatchMean, "depends on the batch"),
        (Restless, "a second run gave other numbers"),
        (Heavy, "changed weights"),
        (Leaky, "left hooks"),
        (Borrowed, r"half is outside ci_low and ci_high at 3 of 3 rows, .* write View\(..., interval=False\)"),
    ],
)
def test_what_is_caught(spoiled: type[Norms], law: str) -> None:
    check_analyzer(Norms(), models=[mi.testing.tiny("llama")])
    with pytest.raises(AssertionError, match=law):
        check_analyzer(spoiled(), models=[mi.testing.tiny("llama")])


def test_it_makes_an_analyzer_for_each_family() -> None:
    seen: list[str] = []

    def make(model: mi.Model) -> mi.Analyzer:
        seen.append(model.arch.family)
        return Norms()

    check_analyzer(make, mi.tasks.ioi(3))
    assert seen == ["llama", "mistral", "qwen2", "qwen3", "qwen3_moe"]
