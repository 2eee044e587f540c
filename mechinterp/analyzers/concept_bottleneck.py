"""A decision re-expressed through named concepts: what their scores predict of it, and what changing them does."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from torch import Tensor

from mechinterp.analyzers import units
from mechinterp.analyzers.probe_data import groups_of
from mechinterp.core.analyzer import Analyzer, Batch, Context, Model, Needs, Sweep
from mechinterp.core.interventions import Add
from mechinterp.core.metrics import Metric, logit_diff
from mechinterp.core.result import Part, Result, View
from mechinterp.core.statistics import ratio, summarize
from mechinterp.errors import ExamplesError, NeedsError
from mechinterp.sites import Position, Site

Array = npt.NDArray[np.floating]
Numbers = npt.NDArray[np.integer]

ALPHAS = tuple(10.0**e for e in range(-6, 5))
"""Strengths of the ridge penalty, of which each fit takes the one that predicts left-out examples best."""
RESAMPLES = 2000
INPUTS = ("concepts", "random", "full", "majority")


class _Directions(dict[str, Tensor]):
    """Vectors by name, shown in one line."""

    def __repr__(self) -> str:
        return f"{{{', '.join(f'{name!r}: {tuple(v.shape)}' for name, v in self.items())}}}"


@dataclass(frozen=True)
class ConceptBottleneck(Analyzer):
    """How far a model's decision is a linear function of a few concepts, and whether the model goes by them.

    The score of a concept is the projection of the activation on its unit vector, s_c = x · v_c. The decision m (a
    metric, such as the logit difference) is fitted as b + Σ_c w_c s_c by ridge regression, and every number below is
    of predictions for examples that were left out of the fit (cross-validation). It stands between three others:
    ``random`` directions, as many (a bottleneck that does no better says nothing of its concepts); ``full``, the
    whole activation, fitted in the same way (with fewer examples than dimensions it may well predict worse than a few
    directions do: it is what this fit finds in all of them, and no bound); and ``majority``, the mean. This is a
    concept bottleneck (Koh et al. 2020) fitted beside a model that does not have one, so it may predict the decision
    from what merely goes along with it. Hence the test: the score of one concept is set to its mean, x + (mean s_c -
    s_c) v_c, and the change of the decision compared with what the bottleneck predicts of it, Σ_i w_i (v_i · v_c)
    (mean s_c - s_c), since other concepts' scores move, too, where their vectors are not orthogonal. A ``slope`` (of
    real on predicted changes) and a ``correlation`` near 1 say that the model goes by the concept as the bottleneck
    does; near 0, that it only correlates.

    Result: ``r2`` and ``accuracy`` (the share of examples where prediction and decision have the same sign), with
    ``…_ci_low, …_ci_high``, and ``p`` of the concepts' R² among random ones' (``input``; of ``random`` the mean and the
    range of 95% of the draws); ``weight``, of one standard deviation (``spread``) of the score, ``effect`` and
    ``predicted``, means over examples of the real and the predicted change, ``slope`` and ``correlation`` of the two
    over examples, with intervals, ``effect_p, effect_q`` (``concept``); ``slope_all, correlation_all`` of all concepts
    together; ``score, change, predicted_change`` (``example concept``), ``decision, prediction`` (``example``).
    Intervals are bootstrapped over groups (95%), of which each example is one unless `groups` are given; those of R²
    and accuracy take the fits as given.

    Attributes:
        concepts: name → a vector ``dim`` at the site, of any length; fit them on other texts than these.
        site: of one layer, with one vector for each token, such as ``"resid_post.12"``.
        positions: one token, or a span by its name, of which `pool` says what is taken. A change is made at all of it.
        metric: the decision.
        folds: of the cross-validation.
        draws: sets of random directions.
        groups: one for each example; those of one group are in one fold. By default each example is its own, and equal
            ones are one group.
    Raises:
        NeedsError: no concepts, a vector that is zero or of another width, or a site of several layers or heads.
        ExamplesError: fewer than two examples a fold, or equal decisions.
    """

    concepts: Mapping[str, Tensor] = field(hash=False, compare=False)
    site: str | Site
    positions: Position = "end"
    pool: units.Pool = "mean"
    metric: Metric = field(default_factory=logit_diff)
    folds: int = 5
    draws: int = 99
    groups: tuple[Any, ...] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        if not self.concepts or self.folds < 2 or self.draws < 1:
            raise NeedsError("ConceptBottleneck takes a concept or more, two folds or more, and a draw or more")
        if self.positions == "all":
            raise NeedsError("ConceptBottleneck takes one token, or a span by its name, at which it can be changed")
        for name, vector in self.concepts.items():
            if vector.ndim != 1 or not bool(torch.isfinite(vector).all()) or not bool(vector.any()):
                raise NeedsError(
                    f"the concept {name!r} must be a finite vector that is not 0. Got one of shape"
                    f" {tuple(vector.shape)}"
                )
        if len(sizes := {len(vector) for vector in self.concepts.values()}) > 1:
            raise NeedsError(f"concepts must be vectors of one site; these have widths {sorted(sizes)}")
        object.__setattr__(self, "concepts", _Directions(self.concepts))

    def needs(self, model: Model) -> Needs:
        return Needs(self._at(model))

    def _at(self, model: Model) -> Site:
        """The one site, at its positions."""
        found = units.Units(self.positions, self.pool).reads(self.site, model.dims.n_layers)
        if len(found) != 1 or found[0].spec.head_axis is not None:
            raise NeedsError(f"ConceptBottleneck takes a site of one layer and no heads. Got {self.site!r}")
        return found[0]

    def observe(self, batch: Batch) -> Part:
        return units.part(units.Units(self.positions, self.pool), [self._at(batch.model)], batch)

    def combine(self, parts: Iterator[Part], context: Context) -> Analyzer:
        x = units.features(parts)[0][0].double().numpy()
        vectors = np.stack([v.detach().double().cpu().numpy() for v in self.concepts.values()])
        if vectors.shape[1] != x.shape[1]:
            raise NeedsError(f"the concepts have width {vectors.shape[1]}, and {self.site} has {x.shape[1]}")
        group = np.unique(groups_of(context.tokens, self.groups), return_inverse=True)[1]
        if (n := int(group.max()) + 1) < 2 * self.folds:
            kind = "examples" if n == len(x) else "groups of examples"
            raise ExamplesError(f"{self.folds} folds take {2 * self.folds} {kind} or more, and there are {n}")
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return _Changing(self, self._at(context.model), x, unit, self.positions in context.tokens.spans, group)


@dataclass(frozen=True, eq=False)
class _Changing(Analyzer):
    """The decision as it is, and with one concept at a time at its mean.

    Attributes:
        x: activations, ``example dim``.
        directions: of length 1, ``concept dim``.
        span: whether it is several tokens that are changed.
        group: of each example, numbered from 0.
    """

    asked: ConceptBottleneck
    at: Site
    x: Array
    directions: Array
    span: bool
    group: Numbers

    @property
    def scores(self) -> Array:
        return self.x @ self.directions.T

    def needs(self, model: Model) -> Needs:
        shift = self.scores.mean(0) - self.scores
        moved = torch.tensor(shift.T[:, :, None] * self.directions[:, None], dtype=torch.float32)
        rows = tuple((Add(self.at, one[:, None] if self.span else one),) for one in moved)  # example (pos) dim
        return Needs(sweeps={"changed": Sweep(self.asked.metric, rows=rows, base="clean")})

    def observe(self, batch: Batch) -> Part:
        swept = batch.sweeps["changed"]
        assert swept.values is not None and swept.base is not None
        return Part({"changed": (swept.values, "example concept"), "decision": (swept.base, "example")})

    def combine(self, parts: Iterator[Part], context: Context) -> Result:
        asked, scores, seed = self.asked, self.scores, context.seed
        data = Result.of(parts).data
        decision = data["decision"].values.astype(float)
        if not np.isfinite(decision).all() or np.ptp(decision) == 0:
            raise ExamplesError(f"the {asked.metric.label} is the same in all examples, or not a number; give others")
        change = data["changed"].transpose("example", "concept").values.astype(float) - decision[:, None]
        prediction, weights = _left_out(scores, decision, asked.folds, seed, self.group)
        overlap = self.directions @ self.directions.T
        predicted = (scores.mean(0) - scores) * (weights @ overlap)
        names = list(asked.concepts)
        at = ("example", "concept")
        found: dict[str, Any] = {
            **{name: ("input", value) for name, value in self._inputs(decision, prediction, seed).items()},
            **{name: ("concept", value) for name, value in _weights(scores, decision, self.group, seed).items()},
            **{name: ("concept", value) for name, value in _effects(change, predicted, self.group, seed).items()},
            **{name: value[0] for name, value in _agreement(change, predicted, self.group, seed, "_all").items()},
            "score": (at, scores),
            "change": (at, change),
            "predicted_change": (at, predicted),
            "decision": ("example", decision),
            "prediction": ("example", prediction),
        }
        coords = {"input": list(INPUTS), "concept": names, "example": np.arange(len(decision))}
        unit = asked.metric.label
        views = (
            View("bars", "r2", "input", title="Share of the decision's variance that is predicted", unit="R²"),
            View("bars", "weight", "concept", title="Weights of concepts", unit=f"{unit} for one spread of the score"),
            View("bars", "effect", "concept", title="A concept at its mean", unit=f"change of {unit}"),
        )
        meta = {"site": str(self.at), "examples": len(decision)}
        return Result(xr.Dataset(found, coords, {"unit": unit}), meta, views)

    def _inputs(self, decision: Array, prediction: Array, seed: int) -> dict[str, Array]:
        """How well each kind of input predicts, in the order of `INPUTS`."""
        folds = self.asked.folds
        of_all, _ = _left_out(self.x, decision, folds, seed, self.group)
        own, full = (_quality(decision, each, self.group, seed) for each in (prediction, of_all))
        some = np.random.default_rng(seed).standard_normal((self.asked.draws, *self.directions.shape))
        some /= np.linalg.norm(some, axis=-1, keepdims=True)
        guesses, _ = _left_out(self.x @ some.swapaxes(-1, -2), decision, folds, seed, self.group)
        lost = ((decision - guesses) ** 2).mean(-1) / decision.var()
        drawn = np.stack([1 - lost, ((guesses > 0) == (decision > 0)).mean(-1)], 1)
        low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
        majority = np.where((decision > 0).mean() > 0.5, 1.0, -1.0) * np.ones(len(decision))
        most = _quality(decision, majority, self.group, seed)
        out: dict[str, Array] = {}
        for i, name in enumerate(("r2", "accuracy")):
            mean = drawn[:, i].mean()
            out[name] = np.array([own[name], mean, full[name], 0.0 if name == "r2" else most[name]])
            for end, quantile in (("ci_low", low[i]), ("ci_high", high[i])):
                of_most = np.nan if name == "r2" else most[f"{name}_{end}"]
                out[f"{name}_{end}"] = np.array([own[f"{name}_{end}"], quantile, full[f"{name}_{end}"], of_most])
        p = (1 + (drawn[:, 0] >= own["r2"]).sum()) / (1 + len(drawn))
        return {**out, "p": np.array([p, np.nan, np.nan, np.nan])}


def _quality(decision: Array, prediction: Array, group: Numbers, seed: int) -> dict[str, float]:
    """R² and the share of equal signs, with intervals."""
    lost, total = (decision - prediction) ** 2, (decision - decision.mean()) ** 2
    same = ((prediction > 0) == (decision > 0)).astype(float)
    out: dict[str, float] = {}
    for name, top, bottom in (("r2", lost, total), ("accuracy", same, np.ones_like(same))):
        value, low, high = (float(v) for v in ratio(np.bincount(group, top), np.bincount(group, bottom), seed))
        value, low, high = (1 - value, 1 - high, 1 - low) if name == "r2" else (value, low, high)
        out |= {name: value, f"{name}_ci_low": low, f"{name}_ci_high": high}
    return out


def _resampled(group: Numbers, seed: int) -> Array:
    """How often each example is drawn when groups are, ``resample example``."""
    n = int(group.max()) + 1
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), RESAMPLES).astype(float)[:, group]


def _left_out(x: Array, y: Array, folds: int, seed: int, group: Numbers) -> tuple[Array, Array]:
    """Predictions from the fit without an example's fold, ``*draw example``, and that fit's weights, ``... dim``.

    Args:
        x: ``*draw example dim``.
        group: of each example, numbered from 0; folds are of whole groups.
    """
    prediction, weights = np.empty(x.shape[:-1]), np.empty(x.shape)
    for held in np.array_split(np.random.default_rng(seed).permutation(int(group.max()) + 1), folds):
        test, train = (np.flatnonzero(np.isin(group, held, invert=flip)) for flip in (False, True))
        fit = _ridge(x[..., train, :], y[train])
        weights[..., test, :] = fit.weights[..., None, :]
        prediction[..., test] = fit.offset[..., None] + np.einsum("...nd,...d->...n", x[..., test, :], fit.weights)
    return prediction, weights


@dataclass(frozen=True)
class _Fit:
    """offset + x · weights; the penalty is of standardized x."""

    weights: Array
    offset: Array
    penalty: Array


def _ridge(x: Array, y: Array) -> _Fit:
    """Ridge regression of y on ``*draw example dim``, with the penalty of least leave-one-out error (Allen 1974)."""
    n = len(y)
    mean, spread = x.mean(-2), _spread(x)
    u, s, v = np.linalg.svd((x - mean[..., None, :]) / spread[..., None, :], full_matrices=False)
    along = np.einsum("...nk,n->...k", u, y - y.mean())
    penalties = np.array(ALPHAS)
    kept = s[..., None, :] ** 2 / (s[..., None, :] ** 2 + penalties[:, None])  # of each component: ... penalty k
    left = y - y.mean() - np.einsum("...nk,...pk->...pn", u, kept * along[..., None, :])
    leverage = 1 / n + np.einsum("...nk,...pk->...pn", u**2, kept)
    best = ((left / np.maximum(1 - leverage, 1e-12)) ** 2).mean(-1).argmin(-1)
    penalty = np.asarray(penalties[best])
    of_z = np.einsum("...kd,...k->...d", v, along * s / (s**2 + penalty[..., None]))
    weights = of_z / spread
    return _Fit(weights, np.asarray(y.mean() - (mean * weights).sum(-1)), penalty)


def _weights(scores: Array, y: Array, group: Numbers, seed: int) -> dict[str, Array]:
    """Weights of the fit on all examples, for one standard deviation of each score, with bootstrap intervals."""
    fit, spread = _ridge(scores, y), _spread(scores)
    z, k = (scores - scores.mean(0)) / spread, scores.shape[1]
    counts = _resampled(group, seed)
    n = counts.sum(1)[:, None]
    means, mean = counts @ z / n, counts @ y / n[:, 0]
    covariance = np.tensordot(counts, z[:, :, None] * z[:, None], 1) - n[..., None] * means[:, :, None] * means[:, None]
    with_y = counts @ (z * y[:, None]) - n * means * mean[:, None]
    drawn = np.linalg.solve(covariance + fit.penalty * np.eye(k), with_y[:, :, None])[:, :, 0]
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    return {"weight": fit.weights * spread, "weight_ci_low": low, "weight_ci_high": high, "spread": scores.std(0)}


def _effects(change: Array, predicted: Array, group: Numbers, seed: int) -> dict[str, Any]:
    """Real and predicted changes, ``example concept`` each."""
    sums = np.stack([np.bincount(group, column) for column in change.T], 1)
    real = summarize(sums / np.bincount(group)[:, None], seed)
    return {
        "effect": real.mean,
        "effect_ci_low": real.ci_low,
        "effect_ci_high": real.ci_high,
        "effect_p": real.p,
        "effect_q": real.q,
        "predicted": np.asarray(predicted.mean(0)),
        **_agreement(change, predicted, group, seed),
    }


def _agreement(change: Array, predicted: Array, group: Numbers, seed: int, together: str = "") -> dict[str, Array]:
    """Slope of real on predicted changes, and their correlation, for each concept.

    Args:
        together: an ending of the names; then it is of all concepts together.
    """
    moments = np.stack([np.ones_like(change), predicted, change, predicted**2, predicted * change, change**2])
    if together:
        moments = moments.sum(-1, keepdims=True)
    counts = _resampled(group, seed)

    def fitted(sums: Array) -> tuple[Array, Array]:
        size, a, b, aa, ab, bb = sums
        of_a, of_b, both = size * aa - a**2, size * bb - b**2, size * ab - a * b
        flat = (of_a <= 1e-10 * size * aa) | (of_b <= 1e-10 * size * bb)  # one of the two is the same everywhere
        safe = np.where(flat, np.nan, of_a)
        return both / safe, both / np.sqrt(safe * np.where(flat, np.nan, of_b))

    drawn = fitted(np.stack([counts @ each for each in moments]))
    out: dict[str, Array] = {}
    for name, value, draws in zip(("slope", "correlation"), fitted(moments.sum(1)), drawn, strict=True):
        there = np.isfinite(value)
        low, high = np.nanquantile(np.where(there, draws, 0.0), [0.025, 0.975], axis=0)
        ends = (np.where(there, end, np.nan) for end in (low, high))
        out |= dict(zip((f"{name}{together}{end}" for end in ("", "_ci_low", "_ci_high")), (value, *ends), strict=True))
    return out


def _spread(x: Array) -> Array:
    """Standard deviations over examples, ``*draw dim``; 1 where everything is the same."""
    spread = x.std(-2)
    return np.where(spread > 0, spread, 1.0)
