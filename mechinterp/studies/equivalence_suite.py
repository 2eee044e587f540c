"""What `equivalence` compares beside sites: analyzers of each kind, on examples of their own."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mechinterp.analyzers.ablation import Ablation
from mechinterp.analyzers.accuracy import Accuracy
from mechinterp.analyzers.attribution import AttributionPatching
from mechinterp.analyzers.categories import AttentionByCategory
from mechinterp.analyzers.classifier_weights import ClassifierWeights
from mechinterp.analyzers.clusters import HeadClusters
from mechinterp.analyzers.concept_bottleneck import ConceptBottleneck
from mechinterp.analyzers.concept_directions import ConceptAssociation, ConceptDirections
from mechinterp.analyzers.concept_neurons import ConceptNeurons
from mechinterp.analyzers.cross_lingual import CrossLingual
from mechinterp.analyzers.dimensions import DimensionCorrelation
from mechinterp.analyzers.direct import DirectLogitAttribution
from mechinterp.analyzers.edges import EdgeAttribution
from mechinterp.analyzers.feature_effects import FeatureEffects
from mechinterp.analyzers.features import Features
from mechinterp.analyzers.gradients import GradientAnalysis, NeuronImportance
from mechinterp.analyzers.heads import HeadRoles
from mechinterp.analyzers.hotspots import Hotspots
from mechinterp.analyzers.lens import LogitLens
from mechinterp.analyzers.max_activating import MaxActivating
from mechinterp.analyzers.patching import ActivationPatching
from mechinterp.analyzers.paths import PathPatching
from mechinterp.analyzers.patterns import AttentionPatterns, AttentionProfile
from mechinterp.analyzers.probe import Probe, ProbeTransfer
from mechinterp.analyzers.representation_map import RepresentationMap
from mechinterp.analyzers.similarity import GroupSimilarity, Similarity
from mechinterp.analyzers.spurious import SpuriousPatterns
from mechinterp.analyzers.stats import ActivationStats
from mechinterp.analyzers.steering import Steering
from mechinterp.analyzers.token_attribution import TokenAttribution
from mechinterp.analyzers.tracing import CausalTracing
from mechinterp.analyzers.trajectory import HighScoreTokens, Trajectory
from mechinterp.core.analyzer import Analyzer
from mechinterp.core.examples import Examples
from mechinterp.core.linear_probe import LinearProbe
from mechinterp.core.metrics import logit_diff
from mechinterp.core.trace import Read
from mechinterp.engine.forward import forward
from mechinterp.engine.runner import run
from mechinterp.engine.verify import prompts
from mechinterp.model.autoencoder import SparseAutoencoder
from mechinterp.model.model import Model
from mechinterp.sites import Site

LAST = Read(Site("logits", positions="end"))


def suite(model: Model) -> list[tuple[str, Analyzer, Examples]]:
    """Analyzers of each kind, with the examples that they are compared on.

    What trains nothing and needs no files: an SAE and a probe have random weights. What is written is large, as last
    digits cannot be compared. In deep models the sweeps take three layers, as every cell is a pass. Left out are
    those that this model cannot have, `SyntacticHeads`, which is of a file, and `HeadWeights`, which takes minutes and
    reads weights alone, which the backends share.
    """
    n, width = model.dims.n_layers, model.dims.d_model
    some, middle, site = tuple(sorted({0, n // 2, n - 1})), (n // 2,), Site("resid_post", n // 2)
    ids = [list(row[:8]) for row in sorted(prompts(model), key=len)]
    # Each begins with another token: texts that begin alike have equal numbers, whose order is chance.
    texts = [[(7 + i) % model.dims.vocab, *row[1:]] for i, row in enumerate([*ids, *(row[::-1] for row in ids)])]
    clean = [ids[0], ids[-1]]
    corrupted = [[*row[:1], (row[1] + 1) % model.dims.vocab, *row[2:]] for row in clean]
    answers = _told_apart(model, clean, corrupted)
    labelled = Examples.of(texts, labels=["a"] * 8 + ["b"] * 8, answers=[answers[0]] * 16)
    labelled = labelled.with_category("second", [[(1, 2)]] * 16)
    spans = {"subject": [(1, 2)] * 2, "rest": [(1, len(row)) for row in clean]}
    pairs = Examples.pairs(clean, corrupted, answers=answers, spans=spans)

    draw = torch.Generator().manual_seed(0)
    directions = torch.randn(2, width, generator=draw) / width**0.5
    last = _last(model, labelled, site)
    _, _, varied = torch.linalg.svd(last - last.mean(0))
    far = float(last.norm(dim=-1).mean())
    probe = LinearProbe(site, ("a", "b"), directions, torch.zeros(2))
    encoder = torch.randn(width, 32, generator=draw) / width**0.5
    sae = SparseAutoencoder(site, encoder, torch.zeros(32), encoder.T.contiguous(), torch.zeros(width))

    forwards: list[Analyzer] = [
        LogitLens(),
        DirectLogitAttribution(),
        Accuracy(),
        ActivationStats(),
        AttentionPatterns(),
        AttentionProfile(),
        AttentionByCategory(queries="all"),
        HeadRoles(sequences=2, length=8),
        HeadClusters(shown=4),
        Hotspots(pairs=3),
        MaxActivating("resid_post", top=3),
        Similarity(draws=5),
        GroupSimilarity(draws=19),
        RepresentationMap(clusters=2),
        CrossLingual((*range(8), *range(8)), draws=19),
        DimensionCorrelation({"number": tuple(map(float, range(16)))}),
        ConceptDirections(folds=3),
        ConceptAssociation(probe),
        Probe((site,), folds=3),
        ProbeTransfer(run(model, labelled, Probe((site,), folds=3))),
        Features(sae, top=3, context=2, metric=logit_diff()),
    ]
    gradients: list[Analyzer] = [
        GradientAnalysis(),
        TokenAttribution("grad-x-input"),
        TokenAttribution("head-x-representation"),
    ]
    swept: list[Analyzer] = [
        ConceptBottleneck({"a": varied[0], "b": varied[1]}, site, folds=3, draws=3),
        FeatureEffects(sae, top=3),
    ]
    if sum(site.kind == "mlp_act" for site in model.sites) == n:  # fused experts have no neurons
        swept += [
            NeuronImportance(sizes=(4,)),
            ConceptNeurons(layers=some, sizes=(4,), draws=2, top=3, shown=2),
        ]
    if model.dims.n_labels is not None:
        forwards += [Trajectory(), HighScoreTokens(top=3), ClassifierWeights(top=3)]
        swept.append(SpuriousPatterns(least=2))
    else:
        swept.append(Steering(probe, strengths=(far,), draws=2))  # whose cost is of the next token
    paired: list[Analyzer] = [
        TokenAttribution("integrated-gradients", positions="rest"),
        TokenAttribution("partition-shap", evaluations=32),
        AttributionPatching("z", heads="each"),
        AttributionPatching("q", heads="each", positions="end", method="atp*"),
        EdgeAttribution("eap"),
        EdgeAttribution("eap-ig-inputs", steps=2),
        ActivationPatching("resid_pre", positions=(1, "end"), layers=some),
        ActivationPatching("mlp_out", positions="end", layers=some, direction="noise"),
        ActivationPatching("z", heads="each", positions="end", layers=middle),
        PathPatching("logits", "attn_out", positions="end", layers=some),
        CausalTracing(copies=1, window=2, layers=middle, skip_wrong=False),
        Ablation("mlp_out", heads=None, layers=some),
    ]
    return [
        (_named(analyzer), analyzer, examples)
        for analyzers, examples in (([*forwards, *gradients, *swept], labelled), (paired, pairs))
        for analyzer in analyzers
    ]


def _last(model: Model, examples: Examples, site: Site) -> Tensor:
    """What is at a site at each text's last token, ``example d_model``."""
    batch = model.tokenize(examples).batch(range(len(examples)), model.device)
    read = Read(site.at("end"))
    return forward(model, batch, [read]).values[read].float().cpu()


def _told_apart(model: Model, clean: Sequence[list[int]], corrupted: Sequence[list[int]]) -> list[tuple[int, int]]:
    """For each pair the two outputs whose logit difference it changes most.

    What is normalised by the change is then no quotient of two roundings.
    """
    batch = model.tokenize(Examples.of([*clean, *corrupted])).batch(range(2 * len(clean)), model.device)
    one, other = forward(model, batch, [LAST]).values[LAST].double().chunk(2)
    return [(int(change.argmax()), int(change.argmin())) for change in one - other]


def _named(analyzer: Analyzer) -> str:
    """Its class, and what it was asked for."""
    given = [getattr(analyzer, name) for name in ("method", "site", "senders") if hasattr(analyzer, name)]
    return f"{type(analyzer).__name__}({', '.join(getattr(one, 'kind', str(one)) for one in given)})"
