"""Whether TransformerLens and nnsight give what the native engine gives, on your own model: sites, and analyzers."""

import html
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from mechinterp.analyzers.ablation import Ablation
from mechinterp.analyzers.accuracy import Accuracy
from mechinterp.analyzers.attribution import AttributionPatching
from mechinterp.analyzers.categories import AttentionByCategory
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
from mechinterp.core.interventions import Apply
from mechinterp.core.linear_probe import LinearProbe
from mechinterp.core.metrics import logit_diff
from mechinterp.core.result import Result
from mechinterp.core.tokens import TokenBatch
from mechinterp.core.trace import Read
from mechinterp.engine.backends import NAMES
from mechinterp.engine.backward import backward
from mechinterp.engine.forward import forward
from mechinterp.engine.runner import run
from mechinterp.engine.verify import prompts
from mechinterp.errors import HookError, MechinterpError, ModelError
from mechinterp.model.autoencoder import SparseAutoencoder
from mechinterp.model.backend import NATIVE, Use
from mechinterp.model.model import Model
from mechinterp.model.slices import PATTERN_KINDS
from mechinterp.sites import KINDS, Site

OTHERS = tuple(name for name in NAMES if name != NATIVE)
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
"""Largest difference relative to the largest value, by dtype. Half precision: of sites, whose analyzers only add up."""
_ERRORS = {"completeness_error": "attribution", "additivity_error": "attribution"}
"""Values that are 0 but for rounding and quadrature, and what they are the errors of a sum of."""
_COUNTED = ("p", "q", "density")
"""Last words of the names of floats that are counts of draws or of tokens."""
_LAST = Read(Site("logits", positions="end"))


@dataclass(frozen=True)
class Agreement:
    """One line of the table: one thing that was done on the native engine and on a backend.

    Attributes:
        what: ``read``, ``write``, ``gradient`` or ``analyzer``.
        name: of the site's kind, or of the analyzer.
        absolute: largest difference; NaN where the backend refuses, by name.
        relative: the same, over the largest value of the native engine.
        detail: where the largest was, or why it was refused.
    """

    backend: str
    what: str
    name: str
    absolute: float
    relative: float
    tolerance: float
    detail: str = ""

    @property
    def verdict(self) -> str:
        """``agrees``, ``differs``, or ``lacks`` where the backend says that it cannot."""
        if math.isnan(self.relative):
            return "lacks"
        return "agrees" if self.relative <= self.tolerance else "differs"

    def __str__(self) -> str:
        found = ["–" if math.isnan(value) else f"{value:.2g}" for value in (self.absolute, self.relative)]
        numbers = f"{found[0]:>10}  {found[1]:>10}  {self.tolerance:10.2g}"
        text = f"{self.verdict:8}{self.backend:18}{self.what:10}{self.name:40}{numbers}"
        return f"{text}  {self.detail}".rstrip()


HEAD = f"{'':8}{'backend':18}{'what':10}{'site or analyzer':40}{'absolute':>10}  {'relative':>10}  {'tolerance':>10}"


@dataclass(frozen=True)
class Equivalence:
    """What `equivalence` found. Prints as a table."""

    model: str
    rows: tuple[Agreement, ...]

    @property
    def passed(self) -> bool:
        """Nothing differs; what a backend lacks and refuses is no failure."""
        return all(row.verdict != "differs" for row in self.rows)

    @property
    def summary(self) -> str:
        """One line: how many agree, which are refused, and which differ."""
        said = {verdict: [r for r in self.rows if r.verdict == verdict] for verdict in ("agrees", "lacks", "differs")}
        text = f"{len(said['agrees'])} agree, {len(said['lacks'])} are refused by name, {len(said['differs'])} differ"
        return text + "".join(f"; {r.backend} {r.what} {r.name}" for r in said["differs"])

    def table(self) -> pd.DataFrame:
        """One row a comparison: backend, what, name, absolute, relative, tolerance, verdict, detail."""
        names = ("backend", "what", "name", "absolute", "relative", "tolerance", "verdict", "detail")
        return pd.DataFrame({name: [getattr(row, name) for row in self.rows] for name in names})

    def __str__(self) -> str:
        return "\n".join([self.model, HEAD, *map(str, self.rows), self.summary])

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(self.model)}</p>{self.table().to_html(index=False)}"


def markdown(found: Mapping[str, Equivalence]) -> str:
    """What was found on several models, for a page: the largest difference, relative (and absolute).

    For each backend a table of sites, the worst of reading, writing and differentiating; then one of analyzers, the
    worst of all backends. What differs is in bold; a dash is what the model has not.

    Args:
        found: by the name that stands above a column.
    """
    rows = [(model, row) for model, each in found.items() for row in each.rows]
    out: list[str] = []
    for backend in dict.fromkeys(row.backend for _, row in rows):
        mine = [(model, row) for model, row in rows if row.backend == backend and row.what != "analyzer"]
        out += [f"On `{backend}`:", "", *_grid("site", list(found), mine, "what"), ""]
    if analyzers := [(model, row) for model, row in rows if row.what == "analyzer"]:
        out += ["Analyzers, on both:", "", *_grid("analyzer", list(found), analyzers, "backend"), ""]
    return "\n".join(out).rstrip()


def _grid(head: str, models: Sequence[str], rows: Sequence[tuple[str, Agreement]], refused: str) -> list[str]:
    """Name by model; `refused` is the field that says what of a cell a backend refuses."""
    lines = [f"| {head} | {' | '.join(models)} |", "|---|" + "---|" * len(models)]
    names = dict.fromkeys(row.name for _, row in rows)
    for name in sorted(names, key=list(KINDS).index) if head == "site" else names:
        cells = [_cell([row for of, row in rows if (of, row.name) == (model, name)], refused) for model in models]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return lines


def _cell(rows: Sequence[Agreement], refused: str) -> str:
    done = [row for row in rows if row.verdict != "lacks"]
    lacking = ", ".join(str(getattr(row, refused)) for row in rows if row.verdict == "lacks")
    said = [f"refused: {lacking}"] if lacking else []
    if done:
        worst = max(done, key=lambda row: row.relative)
        text = f"{worst.relative:.1e} ({worst.absolute:.1e})"
        said.insert(0, f"**{text}**" if worst.verdict == "differs" else text)
    return "; ".join(said) or "–"


def equivalence(
    model: Model,
    backends: Sequence[str] = OTHERS,
    *,
    analyzers: bool = True,
    told: Callable[[Agreement], None] | None = None,
) -> Equivalence:
    """Do on each backend what the native engine does, and compare: every site read, written and differentiated, and
    analyzers of each kind (forward, backward, sweep).

    Prompts have different lengths and are padded, on both sides. Nothing depends on what the model was trained for.

    Args:
        analyzers: compare analyzers, too, whose sweeps take one whole pass for each row.
        told: called with every line as it is done.
    Raises:
        ModelError: a backend that there is not, or that cannot run this model.
    """
    if odd := [name for name in backends if name not in OTHERS]:
        raise ModelError(f"The backends of equivalence must be among {', '.join(OTHERS)}. Got {odd[0]!r}")
    native, rows = model.with_backend(NATIVE), list[Agreement]()
    others = {name: model.with_backend(name) for name in backends}
    for step in (_reads, _writes, _gradients, *([_analyzers] if analyzers else [])):
        for row in step(native, others):
            rows.append(row)
            if told is not None:
                told(row)
    return Equivalence(repr(native), tuple(rows))


def _examples(model: Model) -> Examples:
    """Prompts of three lengths; answers are each prompt's most and least likely, which no vocabulary lacks.

    Two fixed tokens may be ones that no training has seen, whose logits are the same.
    """
    ids = sorted(prompts(model), key=len)
    few = [ids[0], ids[len(ids) // 2], ids[-1]]
    logits = forward(model, model.tokenize(Examples.of(few)).batch(range(3), model.device), [_LAST]).values[_LAST]
    return Examples.of(few, answers=[(int(row.argmax()), int(row.argmin())) for row in logits])


def _kinds(model: Model) -> dict[str, list[Site]]:
    """Every kind of site, at all layers that have it."""
    out: dict[str, list[Site]] = {}
    for site in model.sites:
        out.setdefault(site.kind, []).append(site)
    return out


def _able(other: Model, sites: Sequence[Site], use: Use) -> str | None:
    """Why a backend cannot do this at some of the sites; None where it can."""
    assert other.backend is not None
    return next((reason for site in sites if (reason := other.backend.lacks(site, use)) is not None), None)


def _row(model: Model, backend: str, what: str, name: str, gaps: Sequence[tuple[float, float, str]]) -> Agreement:
    absolute, relative, where = max(gaps, key=lambda gap: gap[1])
    return Agreement(backend, what, name, absolute, relative, TOLERANCES[model.dtype], where)


def _lacks(model: Model, backend: str, what: str, name: str, reason: str) -> Agreement:
    return Agreement(backend, what, name, float("nan"), float("nan"), TOLERANCES[model.dtype], reason)


def _gap(found: Tensor, expected: Tensor, where: str, against: float | None = None) -> tuple[float, float, str]:
    """(absolute, relative, where) of the largest difference; a NaN on one side alone is as large as can be.

    Args:
        against: what it is relative to; the largest expected value by default.
    """
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    same = (found == expected) | (found.isnan() & expected.isnan())  # equal infinities, too
    gap = (found - expected).abs().masked_fill(same, 0.0).nan_to_num(nan=math.inf, posinf=math.inf)
    if against is None:
        against = float(expected.masked_fill(~expected.isfinite(), 0.0).abs().max()) if expected.numel() else 0.0
    absolute = float(gap.max()) if gap.numel() else 0.0
    return absolute, absolute / max(against, 1e-12), where


def _real(value: Tensor, site: Site, batch: TokenBatch) -> Tensor:
    """What is at real tokens, as one row of numbers; padding is nobody's."""
    mask = batch.mask.to(value.device)
    if site.kind in PATTERN_KINDS:
        return value[(mask[:, None, :, None] & mask[:, None, None, :]).expand_as(value)]
    return value[mask]


def _reads(native: Model, others: dict[str, Model]) -> Iterator[Agreement]:
    tokens = native.tokenize(_examples(native))
    batches = {side: tokens.batch(range(3), native.device, side) for side in ("right", "left")}
    for kind, sites in _kinds(native).items():
        reads = [Read(site) for site in sites]
        expected = {side: forward(native, batch, reads).values for side, batch in batches.items()}
        for name, other in others.items():
            if reason := _able(other, sites, "read"):
                yield _lacks(native, name, "read", kind, reason)
                continue
            gaps: list[tuple[float, float, str]] = []
            for side, batch in batches.items():
                found = forward(other, batch, reads).values
                for read in reads:
                    a, b = (_real(values[read], read.site, batch) for values in (found, expected[side]))
                    gaps.append(_gap(a, b, f"{read.site}, padded on the {side}"))
            yield _row(native, name, "read", kind, gaps)


def _edit(site: Site) -> Apply:
    """An edit that no norm undoes, and that takes a router to other experts."""
    if site.kind in PATTERN_KINDS:
        return Apply(site, lambda value: value * 0.7)
    if site.kind == "router":
        return Apply(site, torch.neg)
    return Apply(site, lambda value: 0.7 * value + 0.2 * value.roll(1, -1))


def _writes(native: Model, others: dict[str, Model]) -> Iterator[Agreement]:
    """At the first, a middle and the last layer, each in a pass of its own: what the last token's logits come to."""
    batch = native.tokenize(_examples(native)).batch(range(3), native.device)
    for kind, sites in _kinds(native).items():
        some = list(dict.fromkeys([sites[0], sites[len(sites) // 2], sites[-1]]))
        expected = [forward(native, batch, [_LAST], writes=[_edit(site)]).values[_LAST] for site in some]
        for name, other in others.items():
            if reason := _able(other, some, "write"):
                yield _lacks(native, name, "write", kind, reason)
                continue
            found = [forward(other, batch, [_LAST], writes=[_edit(site)]).values[_LAST] for site in some]
            gaps = [_gap(a, b, str(site)) for a, b, site in zip(found, expected, some, strict=True)]
            yield _row(native, name, "write", kind, gaps)


def _gradients(native: Model, others: dict[str, Model]) -> Iterator[Agreement]:
    """Of the logit difference."""
    batch = native.tokenize(_examples(native)).batch(range(3), native.device)
    for kind, sites in _kinds(native).items():
        if kind in ("head_out", "logits"):  # whose gradients are another's, and the metric's own
            continue
        expected = backward(native, batch, sites, logit_diff())[0]
        for name, other in others.items():
            if reason := _able(other, sites, "gradient"):
                yield _lacks(native, name, "gradient", kind, reason)
                continue
            found = backward(other, batch, sites, logit_diff())[0]
            gaps = [
                _gap(_real(found[read], read.site, batch), _real(grad, read.site, batch), str(read.site))
                for read, grad in expected.items()
            ]
            yield _row(native, name, "gradient", kind, gaps)


def _suite(model: Model) -> list[tuple[str, Analyzer, Examples]]:
    """Analyzers of each kind, with the examples that they are compared on.

    What trains nothing and needs no files: an SAE and a probe have random weights. What is written is large, as last
    digits cannot be compared. In deep models the sweeps take three layers, as every cell is a pass. Left out are
    those that read weights alone, which backends share, and those of a file.
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
        Trajectory(),
        HighScoreTokens(top=3),
    ]
    gradients: list[Analyzer] = [
        GradientAnalysis(),
        TokenAttribution("grad-x-input"),
        TokenAttribution("head-x-representation"),
    ]
    swept: list[Analyzer] = [
        NeuronImportance(sizes=(4,)),
        ConceptNeurons(layers=some, sizes=(4,), draws=2, top=3, shown=2),
        ConceptBottleneck({"a": varied[0], "b": varied[1]}, site, folds=3, draws=3),
        Steering(probe, strengths=(far,), draws=2),
        FeatureEffects(sae, top=3),
        SpuriousPatterns(least=2),
    ]
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
        (_name(analyzer), analyzer, examples)
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
    one, other = forward(model, batch, [_LAST]).values[_LAST].double().chunk(2)
    return [(int(change.argmax()), int(change.argmin())) for change in one - other]


def _name(analyzer: Analyzer) -> str:
    given = [getattr(analyzer, name) for name in ("method", "site", "senders") if hasattr(analyzer, name)]
    return f"{type(analyzer).__name__}({', '.join(getattr(one, 'kind', str(one)) for one in given)})"


def _analyzers(native: Model, others: dict[str, Model]) -> Iterator[Agreement]:
    for name, analyzer, examples in _suite(native):
        try:
            expected = _quietly(native, analyzer, examples)
        except MechinterpError:  # of a classifier, or of what has no neurons: not this model's
            continue
        for backend, other in others.items():
            try:
                found = _quietly(other, analyzer, examples)
            except HookError as error:  # no refusal, which comes before a pass
                yield _row(native, backend, "analyzer", name, [(math.inf, math.inf, str(error))])
                continue
            except MechinterpError as error:
                yield _lacks(native, backend, "analyzer", name, str(error))
                continue
            yield _row(native, backend, "analyzer", name, list(_results(found, expected)))


def _quietly(model: Model, analyzer: Analyzer, examples: Examples) -> Result:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return run(model, examples, analyzer, batch_size=3)


def _results(found: Result, expected: Result) -> Iterator[tuple[float, float, str]]:
    """Of every variable of a result, the largest difference against `_scale`.

    What is counted jumps where two numbers are nearly equal: of ranks, numbers of texts, p, q and shares of tokens it
    is the mean over the variable's entries, and of names the share that are others.
    """
    for name, value in expected.data.variables.items():
        name = str(name)
        if name not in found.data.variables:
            yield math.inf, math.inf, f"{name} is missing"
            continue
        a, b = np.asarray(found.data[name].values), np.asarray(value.values)
        if a.shape != b.shape:
            yield math.inf, math.inf, f"{name} has another shape"
        elif b.dtype.kind not in "fiu":
            share = float((a != b).mean()) if a.size else 0.0
            yield share, share, name
        else:
            counted = b.dtype.kind != "f" or name.split("_")[-1] in _COUNTED
            a, b = (torch.from_numpy(each.astype(float)) for each in (a, b))
            absolute, relative, _ = _gap(a, b, name, _scale(name, expected))
            if counted and math.isfinite(absolute) and relative:
                mean = float((a - b).abs().nanmean())
                absolute, relative = mean, relative * mean / absolute
            yield absolute, relative, name


def _scale(name: str, expected: Result) -> float:
    """The variable's largest value; of an end of an interval, of both; of what is left of a sum, the sum of sizes."""
    data = expected.data
    if (of := _ERRORS.get(name)) is not None:
        return float(np.nansum(np.abs(data[of].transpose("example", ...).values), 1).max())
    ends = [name.replace("ci_low", "ci_high"), name.replace("ci_high", "ci_low")]
    sizes = np.concatenate([np.abs(data[end].values.astype(float)).ravel() for end in dict.fromkeys([name, *ends])])
    return float(sizes[np.isfinite(sizes)].max(initial=0.0))
