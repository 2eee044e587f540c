"""Uncertainty over examples: bootstrap intervals, sign-flip p-values, false discovery rate.

Every function works along the first axis (examples) of an array of any shape, leaves NaN out of
cells that have one, and is seeded.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

Array = npt.NDArray[np.floating]

MIN_EXAMPLES = 6
"""Below this many examples no sign-flip test can reach p < .05, so p is NaN."""


CELLS_AT_ONCE = 4096
"""Cells resampled together, so that memory does not grow with their number."""


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
    """Mean, interval, p and q of per-example values, ``example *cells``."""
    array = np.asarray(values, dtype=float)
    shape = array.shape[1:]
    flat = array.reshape(len(array), -1)
    columns = [np.full(flat.shape[1], np.nan) for _ in range(4)]
    counts = np.isfinite(flat).sum(0)
    patterns, group = np.unique(np.isfinite(flat), axis=1, return_inverse=True)
    for i in range(patterns.shape[1]):  # cells with the same examples missing are done together
        alike = np.flatnonzero(group.ravel() == i)
        for start in range(0, len(alike), CELLS_AT_ONCE):
            cells = alike[start : start + CELLS_AT_ONCE]
            some = flat[patterns[:, i]][:, cells]
            for column, result in zip(columns, _summary(some, seed, resamples), strict=True):
                column[cells] = result
    mean, low, high, p = columns
    p = np.where(counts >= MIN_EXAMPLES, p, np.nan)
    return Summary(*(c.reshape(shape) for c in (mean, low, high, p, fdr(p))))


def fdr(p: npt.ArrayLike) -> Array:
    """Benjamini-Hochberg q-values over all finite entries of an array of any shape (1995)."""
    array = np.asarray(p, dtype=float)
    q = np.full(array.shape, np.nan)
    finite = np.isfinite(array)
    if finite.any():
        q[finite] = stats.false_discovery_control(array[finite])
    return q


def _summary(values: Array, seed: int, resamples: int) -> tuple[Array, Array, Array, Array]:
    """Of complete values, ``example cell``: mean, low, high, p."""
    n, cells = values.shape
    nothing = np.full(cells, np.nan)
    if n == 0:
        return nothing, nothing, nothing, nothing
    mean = values.mean(0)
    if n == 1:
        return mean, nothing, nothing, nothing
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(n, np.full(n, 1 / n), resamples)  # how often each example is drawn
    drawn = counts @ values / n
    low, high = np.quantile(np.ascontiguousarray(drawn.T), [0.025, 0.975], axis=1)
    if n <= 12:  # all sign patterns; the observed one is among them
        signs = 1 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    else:
        signs = np.vstack([np.ones(n), rng.choice([-1.0, 1.0], (resamples, n))])
    flipped = np.abs(signs @ values / n)
    p = (flipped >= np.abs(mean) * (1 - 1e-9)).mean(0)
    return mean, low, high, np.where((values == 0).all(0), 1.0, p)
