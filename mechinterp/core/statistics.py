"""Uncertainty over examples: bootstrap intervals, permutation p-values, effect sizes, false discovery rate.

Every function works along the first axis (examples) of an array of any shape, leaves NaN out of
cells that have one, and is seeded.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

Array = npt.NDArray[np.floating]

MIN_EXAMPLES = 6
"""Below this many examples no sign-flip test can reach p < .05, so p is NaN."""

CELLS_AT_ONCE = 4096
"""Cells resampled together, so that memory does not grow with their number."""

DRAWS = 2000
"""Every cell's p rests on at least so many random draws, where not all can be listed."""

HITS = 20
"""A cell is decided when so many draws were as extreme as what was observed (Besag & Clifford 1991)."""

DRAWS_PER_TEST = 200
"""Undecided cells are drawn for this × tests / cells times: were all of them true, q could be a tenth of .05."""

MOST_DRAWS = 1_000_000
"""The most draws for one array: above 50,000 tests a cell that is alone can no longer reach q < .05."""

EXACT = 20_000
"""All splits into two groups are listed when there are no more than so many."""

VALUES_AT_ONCE = 1 << 22
"""Numbers in one block of draws × cells."""


@dataclass(frozen=True)
class Summary:
    """Mean over examples with its uncertainty, each of the shape of one example.

    Attributes:
        mean: over the examples that have the cell.
        ci_low, ci_high: 95% percentile bootstrap interval (Efron 1979).
        p: two-sided sign-flip permutation p-value against a mean of zero.
        q: p after Benjamini-Hochberg over all cells of the array.
    """

    mean: Array
    ci_low: Array
    ci_high: Array
    p: Array
    q: Array


def summarize(values: npt.ArrayLike, seed: int = 0, resamples: int = 2000) -> Summary:
    """Mean, interval, p and q of per-example values, ``example *cells``.

    All sign patterns are tried for up to 12 examples. Above, there are as many random ones as the smallest
    p needs to survive the correction over all cells (docs/decisions/011-permutations.md).
    """
    array = np.asarray(values, dtype=float)
    shape = array.shape[1:]
    flat = array.reshape(len(array), -1)
    columns = [np.full(flat.shape[1], np.nan) for _ in range(4)]
    counts = np.isfinite(flat).sum(0)
    tests = int((counts >= MIN_EXAMPLES).sum())
    for cells, some in _alike(flat):
        for column, result in zip(columns, _summary(some, seed, resamples, tests), strict=True):
            column[cells] = result
    mean, low, high, p = columns
    p = np.where(counts >= MIN_EXAMPLES, p, np.nan)
    return Summary(*(c.reshape(shape) for c in (mean, low, high, p, fdr(p))))


def ratio(
    top: npt.ArrayLike, bottom: npt.ArrayLike, seed: int = 0, resamples: int = 2000
) -> tuple[Array, Array, Array]:
    """Σ top / Σ bottom over examples, ``example *cells`` each, with its 95% percentile bootstrap interval.

    NaN where Σ bottom is 0; the interval is NaN where there is one example.
    """
    one, two = np.asarray(top, dtype=float), np.asarray(bottom, dtype=float)
    n = len(one)

    def divided(a: Any, b: Any) -> Array:
        return np.divide(a, b, out=np.full(np.shape(b), np.nan), where=b != 0)

    value = divided(np.asarray(one.sum(0)), np.asarray(two.sum(0)))
    if n < 2:
        return value, np.full_like(value, np.nan), np.full_like(value, np.nan)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), resamples).astype(float)  # as in _resampled
    drawn = divided(np.tensordot(counts, one, 1), np.tensordot(counts, two, 1))
    there = np.isfinite(value)
    low, high = np.nanquantile(np.where(there, drawn, 0.0), [0.025, 0.975], axis=0)
    return value, np.where(there, low, np.nan), np.where(there, high, np.nan)


@dataclass(frozen=True)
class Comparison:
    """Two groups of examples, cell by cell, each of the shape of one example.

    Attributes:
        difference: mean of the first group less that of the second.
        ci_low, ci_high: 95% percentile bootstrap interval of it, resampled within each group.
        d: Cohen's d, the difference over the pooled standard deviation (Cohen 1988).
        d_ci_low, d_ci_high: 95% interval of it by the normal approximation (Hedges & Olkin 1985).
        p: two-sided p of the studentised permutation test (Chung & Romano 2013).
        q: p after Benjamini-Hochberg over all cells of the array.
        least_p: the smallest p that the cell could have had: that of the number of splits, or of draws.
    """

    difference: Array
    ci_low: Array
    ci_high: Array
    d: Array
    d_ci_low: Array
    d_ci_high: Array
    p: Array
    q: Array
    least_p: Array

    @property
    def reachable(self) -> bool:
        """Whether a cell whose p is as small as it could be has q < .05, were it the only one."""
        least = self.least_p[np.isfinite(self.least_p)]
        return bool(least.size and least.min() * least.size < 0.05)


def compare_groups(first: npt.ArrayLike, second: npt.ArrayLike, seed: int = 0, resamples: int = 2000) -> Comparison:
    """The difference of two groups of examples, ``example *cells`` each, with interval, effect size, p and q.

    The p-value is of Welch's t over splits of all examples into groups of these sizes: exact where both
    groups have the same distribution, and right for large groups where their variances differ (Chung &
    Romano 2013), which the difference of means is not. All splits are tried where there are at most 20,000,
    else as many random ones as the smallest p needs to survive the correction. A cell with fewer than two
    examples in a group is NaN, but for the difference.

    Raises:
        ValueError: the cells of the two groups have different shapes.
    """
    one, two = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if one.shape[1:] != two.shape[1:]:
        raise ValueError(f"the groups have cells of shapes {one.shape[1:]} and {two.shape[1:]}; give the same cells")
    flat = np.concatenate([one.reshape(len(one), -1), two.reshape(len(two), -1)])
    inside = np.arange(len(flat)) < len(one)
    finite = np.isfinite(flat)
    tests = int(((finite[inside].sum(0) >= 2) & (finite[~inside].sum(0) >= 2)).sum())
    columns = [np.full(flat.shape[1], np.nan) for _ in range(8)]
    for cells, some in _alike(flat):
        n = int(finite[inside][:, cells[0]].sum())
        for column, result in zip(columns, _comparison(some, n, seed, resamples, tests), strict=True):
            column[cells] = result
    *rest, p, least = (c.reshape(one.shape[1:]) for c in columns)
    return Comparison(*rest, p=p, q=fdr(p), least_p=least)


def largest_p(first: npt.ArrayLike, second: npt.ArrayLike, seed: int = 0, draws: int = 10_000) -> Array:
    """Whether two groups differ anywhere in a family of cells: one p for each entry of the last axis.

    The largest |t| over a family's cells, against the same over splits of the examples (Westfall & Young 1993), so
    that among many cells with a difference the others' families stay at their level, which a false discovery
    rate over all cells does not promise. All splits are tried where there are at most 20,000.

    Args:
        first, second: the groups, ``example *cells family``; NaN where an example has no value.
        draws: random splits, where not all are tried.
    Returns:
        ``family``; NaN where no cell has two examples in both groups.
    """
    one, two = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    whole = np.concatenate([one, two]).reshape(len(one) + len(two), -1, one.shape[-1])
    splits = _splits(len(one), len(whole))
    rng = np.random.default_rng(seed)
    out = np.full(whole.shape[2], np.nan)
    for family in range(whole.shape[2]):
        values = whole[:, :, family]
        finite = np.isfinite(values)
        enough = (finite[: len(one)].sum(0) >= 2) & (finite[len(one) :].sum(0) >= 2)
        if not enough.any():
            continue
        values, finite = values[:, enough], finite[:, enough]
        observed = _largest(np.arange(len(whole))[None] < len(one), values, finite)
        size = max(1, VALUES_AT_ONCE // values.size)
        hits, done = 0, 0
        while done < (draws if splits is None else len(splits)):
            k = min(size, draws - done)
            some = _random_splits(rng, k, len(one), len(whole)) if splits is None else splits[done : done + size]
            hits += int(_as_extreme(_largest(some, values, finite), observed).sum())
            done += len(some)
        out[family] = hits / done if splits is not None else (hits + 1) / (done + 1)
    return out


def split_p(statistic: Callable[[Array], Array], n: int, total: int, seed: int = 0, draws: int = 9999) -> float:
    """Two-sided p of a statistic of two groups of units, the first `n` of `total` and the others.

    The share of splits into groups of these sizes at which it is as far from 0: of all where there are at most 20,000,
    else of random ones and that which was observed. NaN where a group has fewer than two units.

    Args:
        statistic: splits, ``split unit`` of 1 for the first group and 0, → ``split``.
    """
    if min(n, total - n) < 2:
        return float("nan")
    observed = np.abs(statistic((np.arange(total) < n).astype(float)[None]))
    if (splits := _splits(n, total)) is not None:
        return float(_as_extreme(np.abs(statistic(splits)), observed).mean())
    drawn = np.abs(statistic(_random_splits(np.random.default_rng(seed), draws, n, total)))
    return float((1 + _as_extreme(drawn, observed).sum()) / (1 + draws))


def rank_p(value: npt.ArrayLike, draws: npt.ArrayLike) -> Array:
    """Where something stands among random ones of its kind: two-sided p of ``*cells`` among ``draw *cells``.

    The share of all of them, itself included, that are as far from the mean of all as it is. Exact where it is one
    more draw, whatever they are distributed like, and never below 1 / (draws + 1). NaN where a number is missing.
    """
    every = np.concatenate([np.asarray(value, dtype=float)[None], np.asarray(draws, dtype=float)])
    far = np.abs(every - every.mean(0))
    return np.where(np.isfinite(far[0]), _as_extreme(far, far[0]).mean(0), np.nan)


def fdr(p: npt.ArrayLike) -> Array:
    """Benjamini-Hochberg q-values over all finite entries of an array of any shape (1995)."""
    array = np.asarray(p, dtype=float)
    q = np.full(array.shape, np.nan)
    finite = np.isfinite(array)
    if finite.any():
        q[finite] = stats.false_discovery_control(array[finite])
    return q


def _alike(flat: Array) -> Iterator[tuple[npt.NDArray[np.intp], Array]]:
    """Cells with the same examples missing, some at a time: their numbers, and their complete values."""
    patterns, group = np.unique(np.isfinite(flat), axis=1, return_inverse=True)
    for i in range(patterns.shape[1]):
        alike = np.flatnonzero(group.ravel() == i)
        for start in range(0, len(alike), CELLS_AT_ONCE):
            cells = alike[start : start + CELLS_AT_ONCE]
            yield cells, flat[patterns[:, i]][:, cells]


def _summary(values: Array, seed: int, resamples: int, tests: int) -> tuple[Array, Array, Array, Array]:
    """Of complete values, ``example cell``: mean, low, high, p."""
    n, cells = values.shape
    nothing = np.full(cells, np.nan)
    if n == 0:
        return nothing, nothing, nothing, nothing
    mean = values.mean(0)
    if n == 1:
        return mean, nothing, nothing, nothing
    rng = np.random.default_rng(seed)
    low, high = np.quantile(_resampled(values, rng, resamples), [0.025, 0.975], axis=1)

    def size(signs: Array, some: Array) -> Array:
        return np.abs(signs @ some / n)

    if n <= 12:  # all sign patterns; the observed one is among them
        signs = 1 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        p = _as_extreme(size(signs, values), np.abs(mean)).mean(0)
    else:
        p = _drawn_p(values, np.abs(mean), size, lambda k: rng.choice([-1.0, 1.0], (k, n)), tests)
    return mean, low, high, np.where((values == 0).all(0), 1.0, p)


def _comparison(values: Array, n: int, seed: int, resamples: int, tests: int) -> tuple[Array, ...]:
    """Of complete values, ``example cell``, the first `n` of the first group: the fields of `Comparison` but q."""
    cells, other = values.shape[1], len(values) - n
    nothing = np.full(cells, np.nan)
    if n == 0 or other == 0:
        return (nothing,) * 8
    one, two = values[:n], values[n:]
    difference = one.mean(0) - two.mean(0)
    if n < 2 or other < 2:
        return difference, *(nothing,) * 7
    rng = np.random.default_rng(seed)
    drawn = _resampled(one, rng, resamples) - _resampled(two, rng, resamples)
    low, high = np.quantile(drawn, [0.025, 0.975], axis=1)
    total = n + other
    pooled = np.sqrt(((n - 1) * one.var(0, ddof=1) + (other - 1) * two.var(0, ddof=1)) / (total - 2))
    with np.errstate(invalid="ignore", divide="ignore"):
        d = np.where(pooled > 0, difference / pooled, np.where(difference == 0, 0.0, np.nan))
    spread = 1.959963984540054 * np.sqrt(total / (n * other) + d**2 / (2 * total))
    scale = values.std(0)
    unit = (values - values.mean(0)) / np.where(scale > 0, scale, 1.0)
    observed = _welch(np.where(np.arange(total) < n, 1.0, 0.0)[None], unit)[0]
    if (splits := _splits(n, total)) is not None:
        p = _as_extreme(_welch(splits, unit), observed).mean(0)
        least = (1 + (n == other)) / len(splits)
    else:
        p = _drawn_p(unit, observed, _welch, lambda k: _random_splits(rng, k, n, total), tests)
        least = 1 / (min(MOST_DRAWS, max(DRAWS, DRAWS_PER_TEST * tests)) + 1)
    return difference, low, high, d, d - spread, d + spread, p, np.full(cells, least)


def _splits(n: int, total: int) -> Array | None:
    """All choices of `n` of `total` examples, ``split example``, where they can be listed."""
    if math.comb(total, n) > EXACT:
        return None
    chosen = np.zeros((math.comb(total, n), total))
    for row, members in enumerate(itertools.combinations(range(total), n)):
        chosen[row, list(members)] = 1.0
    return chosen


def _random_splits(rng: np.random.Generator, k: int, n: int, total: int) -> Array:
    """``split example``: 1 for those of the first group."""
    return (rng.random((k, total)).argsort(1) < n).astype(float)


def _largest(chosen: npt.NDArray[Any], values: Array, finite: npt.NDArray[np.bool_]) -> Array:
    """The largest squared Welch t over cells that may lack examples, by split."""
    scale = np.nanstd(values, 0)
    unit = np.where(finite, (values - np.nanmean(values, 0)) / np.where(scale > 0, scale, 1.0), 0.0)
    inside = chosen.astype(float)
    return _welch_of(inside @ unit, inside @ unit**2, inside @ finite, unit, finite.sum(0)).max(1)


def _resampled(values: Array, rng: np.random.Generator, resamples: int) -> Array:
    """Means of bootstrap samples of complete values (Efron 1979), ``cell resample``."""
    n = len(values)
    counts = rng.multinomial(n, np.full(n, 1 / n), resamples)  # how often each example is drawn
    return np.asarray(values.T @ (counts.T / n))


def _welch(chosen: Array, values: Array) -> Array:
    """Squared Welch t of splits, ``split example`` of 0 and 1, all of one size; values have mean 0 and variance 1."""
    return _welch_of(chosen @ values, chosen @ values**2, chosen[0].sum(), values, len(values))


def _welch_of(sums: Array, squares: Array, n: Any, values: Array, total: Any) -> Array:
    """Squared Welch t, ``split cell``, from the first group's sums, sums of squares and size; 0 where one is below 2.

    Values have mean 0, and 0 where they are missing; `total` examples are not.
    """
    other = total - n
    left = (values**2).sum(0) - squares
    with np.errstate(invalid="ignore", divide="ignore"):
        variance = (squares - sums**2 / n) / (n - 1) / n + (left - sums**2 / other) / (other - 1) / other
        change = (sums / n + sums / other) ** 2
        flat = variance < 1e-12  # groups without any spread: they differ, or they do not
        t = np.where(flat, np.where(change > 1e-12, np.inf, 0.0), change / variance)
    return np.where((np.asarray(n) >= 2) & (np.asarray(other) >= 2), t, 0.0)


def _as_extreme(drawn: Array, observed: Array) -> npt.NDArray[np.bool_]:
    """Whether each draw is at least as large as what was observed; equal sums in another order count."""
    return drawn >= observed * (1 - 1e-9)


def _drawn_p(
    values: Array,
    observed: Array,
    statistic: Callable[[Array, Array], Array],
    draw: Callable[[int], Array],
    tests: int,
) -> Array:
    """Sequential Monte Carlo p of every cell (Besag & Clifford 1991).

    Every cell is drawn for `DRAWS` times; those with fewer than `HITS` draws as extreme as theirs go on, until
    they have as many, or the draws are enough for the correction over all `tests`. The cost goes where p is small.

    Args:
        values: ``example cell``.
        observed: the statistic of what was observed, ``cell``; large is extreme.
        statistic: (draws ``draw example``, values) → ``draw cell``.
        draw: this many random draws under the null.
    """
    p = np.full(values.shape[1], np.nan)
    cells, done = np.arange(values.shape[1]), 0
    hits = np.zeros(values.shape[1], dtype=int)
    while len(cells):
        enough = min(MOST_DRAWS, max(DRAWS, DRAWS_PER_TEST * tests / len(cells)))
        if done >= enough:
            break
        want = DRAWS - done if done < DRAWS else math.ceil(enough) - done
        k = max(1, min(want, VALUES_AT_ONCE // max(len(cells), len(values))))
        extreme = _as_extreme(statistic(draw(k), values[:, cells]), observed[cells])
        before, now = hits[cells], hits[cells] + extreme.sum(0)
        hits[cells] = now
        done += k
        if done < DRAWS:
            continue
        decided = now >= HITS
        if done == DRAWS:
            p[cells[decided]] = (now[decided] + 1) / (DRAWS + 1)
        elif decided.any():
            which = np.flatnonzero(decided)
            nth = (extreme[:, which].cumsum(0) < (HITS - before[which])).sum(0)  # draws before the last hit that counts
            p[cells[which]] = HITS / (done - k + nth + 1)
        cells = cells[~decided]
    p[cells] = (hits[cells] + 1) / (done + 1)
    return p
