"""How well each of many features tells one label from the rest: AUROC and correlation, all features at once."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

Array = npt.NDArray[np.floating]

CELLS_AT_ONCE = 2048
"""Features ranked together, so that memory does not grow with their number."""


@dataclass(frozen=True)
class Separation:
    """Of each label against the rest, ``label feature``.

    Attributes:
        auroc: the chance that a unit of the label has the larger value, ties counting half.
        p: two-sided, of the rank-sum test: the normal approximation of what shuffling labels over texts would give.
        correlation: point-biserial, which is Pearson's r with 1 for the label and 0 for the rest.
        correlation_p: two-sided, Student's t.
    """

    auroc: Array
    p: Array
    correlation: Array
    correlation_p: Array


def auroc(scores: npt.NDArray[np.floating], truth: npt.NDArray[np.bool_]) -> float:
    """The chance that a unit of the label has the larger score, ties counting half; NaN where all or none has it.

    Args:
        scores, truth: ``unit``.
    """
    n, m = int(truth.sum()), int((~truth).sum())
    return float((stats.rankdata(scores)[truth].sum() - n * (n + 1) / 2) / (n * m)) if n and m else float("nan")


def separate(
    values: npt.NDArray[np.floating], text: npt.NDArray[np.integer], chosen: npt.NDArray[np.bool_]
) -> Separation:
    """AUROC and point-biserial correlation of every feature with each label.

    With R the midranks of all N units, AUROC = (R₁ - n₁(n₁+1)/2) / n₁n₀, where R₁ sums those of the label's n₁ units
    (Hanley & McNeil 1982). Labels belong to texts, and units of one text are not independent: p is of the sum over
    the label's texts of Σ(R - (N+1)/2), whose variance under shuffled labels is exact, m₁m₀/(m(m-1)) times the sum of
    these sums' squares over the m texts. With one unit a text this is Wilcoxon's test, corrected for ties. The t of
    the correlation has as many degrees of freedom as if all units of a text were one: (Σn)²/Σn² - 2 for texts of n
    units. It takes values for Gaussian, and may be far too small where few are very large.

    Args:
        values: ``unit feature``, finite.
        text: of each unit, numbered from 0 without gaps, and in order.
        chosen: whether a text has the label, ``label text``.
    Returns:
        NaN in all but ``auroc`` where a feature is the same everywhere.
    """
    n, m = len(values), chosen.shape[1]
    starts = np.flatnonzero(np.diff(text, prepend=-1))
    sizes = np.diff(starts, append=n)
    inside = chosen.astype(float)
    texts, units = inside.sum(1)[:, None], (inside @ sizes)[:, None]
    spread = texts * (m - texts) / (m * (m - 1))
    freedom = n**2 / float((sizes.astype(float) ** 2).sum()) - 2
    out = [np.empty((len(chosen), values.shape[1])) for _ in range(4)]
    with np.errstate(invalid="ignore", divide="ignore"):
        for first in range(0, values.shape[1], CELLS_AT_ONCE):
            some = slice(first, first + CELLS_AT_ONCE)
            ranks = np.add.reduceat(stats.rankdata(values[:, some], axis=0) - (n + 1) / 2, starts, axis=0)
            excess = inside @ ranks
            out[0][:, some] = 0.5 + excess / (units * (n - units))
            z = excess / np.sqrt(spread * (ranks**2).sum(0))
            out[1][:, some] = 2 * stats.norm.sf(np.abs(z))
            centred = values[:, some].astype(float)
            flat = np.ptp(centred, axis=0) == 0
            centred -= centred.mean(0)
            r = inside @ np.add.reduceat(centred, starts, axis=0)
            r = np.where(flat, np.nan, r / np.sqrt((centred**2).sum(0) * units * (n - units) / n)).clip(-1, 1)
            out[2][:, some] = r
            out[3][:, some] = 2 * stats.t.sf(np.abs(r) * np.sqrt(freedom / (1 - r**2)), freedom)
    return Separation(*out)


def auroc_interval(auroc: Array, positive: Array | float, negative: Array | float) -> tuple[Array, Array]:
    """95% interval of an AUROC, from its size and those of the two groups (method 5 of Newcombe 2006).

    It inverts the test of each θ with Hanley & McNeil's variance, with (m+n)/2 - 1 in place of both group sizes less
    one, and so is no point where the AUROC is 0 or 1.

    Args:
        positive, negative: independent units in each group; they may be fractions.
    """
    theta, m, n = np.broadcast_arrays(*(np.asarray(a, dtype=float) for a in (auroc, positive, negative)))
    return _lower(theta, m, n), 1 - _lower(1 - theta, n, m)


def _lower(theta: Array, m: Array, n: Array) -> Array:
    """The smallest θ that is not rejected, by bisection."""
    z2, inner = stats.norm.ppf(0.975) ** 2, np.maximum((m + n) / 2 - 1, 0)
    low, high = np.zeros(theta.shape), theta.copy()
    for _ in range(50):
        middle = (low + high) / 2
        variance = middle * (1 - middle) * (1 + inner * ((1 - middle) / (2 - middle) + middle / (1 + middle))) / (m * n)
        rejected = (theta - middle) ** 2 > z2 * variance
        low, high = np.where(rejected, middle, low), np.where(rejected, high, middle)
    return np.where(np.isnan(theta), np.nan, (low + high) / 2)
