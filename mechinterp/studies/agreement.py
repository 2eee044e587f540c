"""Whether explanations agree: token attributions of two models, or of several methods, on the same words."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import xarray as xr
from scipy import stats

from mechinterp.core.result import Result, View
from mechinterp.core.statistics import summarize
from mechinterp.errors import ExamplesError, NeedsError

Floats: TypeAlias = npt.NDArray[np.floating]
Attributions: TypeAlias = Result | Sequence[Sequence[float]] | Sequence[Floats] | Floats
"""Of each example, a number for each of its words: a `Result` with ``word_attribution``, or the numbers themselves."""

TIE = 1e-9
"""Numbers that differ by less than this share of their size are equal: rounding makes no difference, and no order."""


def compare_attributions(first: Attributions, second: Attributions, *, seed: int = 0) -> Result:
    """How two explanations of the same examples differ, and how far they agree, word by word.

    Of a `Result` with ``word_attribution`` the words are compared, so that models with different tokenizers can be;
    other numbers are taken as they are, and NaN in them is padding. Two models' raw attributions have
    scales of their own: sizes compare only metrics in the same unit.

    Result: over ``measure``, the means over examples in ``first`` and ``second``, their ``difference`` (first -
    second) with ``ci_low, ci_high`` (95% bootstrap over examples), ``p`` and ``q`` (sign flips), and its size ``d``
    with ``d_ci_low, d_ci_high``: the mean of the per-example differences over their standard deviation (Cohen's d of
    paired samples, normal approximation; 0 where none differs, NaN where all differ alike). The measures are
    ``mean_attribution``; ``mean_size``, the mean of |attribution|; and of the shares of |attribution| ``gini``, their
    sparsity from 0, all equal, to 1 - 1/n, all in one word (Hurley & Rickard 2009), and ``entropy`` in nats.
    Over ``agreement``: ``value``, the mean over examples, with ``value_ci_low, value_ci_high``; ``chance``, what it
    would be on average were one side's words in random order; and ``examples``, how many have it. They are
    ``cosine``, ``spearman``, and ``top_5`` and ``top_10``, the share of the largest |attribution| that are the same.
    Each measure of each example is in ``first_each``, ``second_each`` and ``agreement_each``.

    NaN, and left out of means: shares and cosine where all attributions are 0, Spearman where all are equal, Gini of
    one word, and the top k where the text has no more than k words. Of words that tie for the k-th place each
    counts in part; words with 0 are never among the top.

    Raises:
        ExamplesError: the two are of different examples or words, an example has none, or a number is infinite.
    """
    rows = _aligned({"first": first, "second": second})
    one, two = rows.values()
    each = [np.array([[measure(row) for measure in MEASURES.values()] for row in side]) for side in (one, two)]
    gap = each[0] - each[1]
    scale = np.nanmax(np.abs(each), axis=(0, 1), initial=0.0)
    gap = np.where(np.abs(gap) <= TIE * scale, 0.0, gap)
    said = summarize(gap, seed)
    d, d_low, d_high = _paired_d(gap)
    kinds = {"cosine": _cosine, "spearman": _spearman, "top_5": _top(5), "top_10": _top(10)}
    found = np.array([[kind(a, b) for kind in kinds.values()] for a, b in zip(one, two, strict=True)])
    agreed = summarize(found[..., 0], seed)
    with_it = np.isfinite(found[..., 0])
    measured = {
        "first": _mean(each[0]), "second": _mean(each[1]), "difference": said.mean, "ci_low": said.ci_low,
        "ci_high": said.ci_high, "d": d, "d_ci_low": d_low, "d_ci_high": d_high, "p": said.p, "q": said.q,
    }  # fmt: skip
    agreement = {
        "value": agreed.mean, "value_ci_low": agreed.ci_low, "value_ci_high": agreed.ci_high,
        "chance": _mean(found[..., 1]), "examples": with_it.sum(0),
    }  # fmt: skip
    data = xr.Dataset(
        {
            **{name: ("measure", values) for name, values in measured.items()},
            **{name: ("agreement", values) for name, values in agreement.items()},
            "first_each": (("example", "measure"), each[0]),
            "second_each": (("example", "measure"), each[1]),
            "agreement_each": (("example", "agreement"), found[..., 0]),
        },
        {"measure": list(MEASURES), "agreement": list(kinds), "example": np.arange(len(one))},
    )
    views = (
        View("bars", "value", "agreement", title="Agreement of two explanations"),
        View("bars", "d", "measure", title="Difference of two explanations", unit="Cohen's d of paired examples"),
    )
    return Result(data, {"analyzer": "compare_attributions", "seed": seed}, views)


def attribution_agreement(
    attributions: Mapping[str, Attributions],
    *,
    planted: Sequence[Collection[int]] | None = None,
    top: int = 3,
    seed: int = 0,
) -> Result:
    """How far several explanations of the same examples agree: every method, or model, with every other.

        mi.studies.attribution_agreement({"IG": ig, "SHAP": shap}, planted=[{2, 5}, {0}]).table()

    Result: ``cosine``, ``spearman`` and ``top_overlap`` (of the `top` words of largest |attribution|) over ``method``
    and ``other``, means over examples, each with ``…_ci_low, …_ci_high`` (95% bootstrap over examples), ``…_chance``,
    its mean were one side's words in random order, and ``…_examples``, how many have it. With `planted`,
    ``planted_overlap`` (``method``) likewise: the share of an example's planted words, or of `top` where there are
    more, that are among its `top` words. Cosine and Spearman see signs: a method without signs, such as saliency,
    compares only with the sizes of others. What has no value is NaN, as `compare_attributions` says.

    Args:
        attributions: name → results with ``word_attribution``, or numbers, of the same words.
        planted: of each example, the numbers of the words that are known to matter, from 0.
    Raises:
        NeedsError: fewer than two attributions, or `top` below 1. ExamplesError: they are of different examples or
            words, or `planted` names a word that is not there.
    """
    if len(attributions) < 2:
        raise NeedsError(f"give two attributions or more, each by a name. Got {list(attributions)}")
    if top < 1:
        raise NeedsError(f"the top of attribution_agreement must be at least 1. Got {top}")
    rows = _aligned(attributions)
    names, n = list(rows), len(next(iter(rows.values())))
    kinds = {"cosine": _cosine, "spearman": _spearman, "top_overlap": _top(top)}
    found = np.empty((n, len(kinds), len(names), len(names), 2))
    for k, kind in enumerate(kinds.values()):
        for i, one in enumerate(names):
            for j, two in enumerate(names[: i + 1]):
                pairs = np.array([kind(a, b) for a, b in zip(rows[one], rows[two], strict=True)])
                found[:, k, i, j] = found[:, k, j, i] = pairs
    data: dict[str, Any] = {}
    for k, kind in enumerate(kinds):
        data |= _described(kind, ("method", "other"), found[:, k], seed)
    if planted is not None:
        masks = _planted(planted, next(iter(rows.values())))
        hits = np.array([[_found(rows[name][i], masks[i], top) for name in names] for i in range(n)])
        data |= _described("planted_overlap", ("method",), hits, seed)
    views = tuple(
        View("heatmap", kind, "other", "method", title=title, center=0.0 if kind != "top_overlap" else None)
        for kind, title in (
            ("cosine", "Cosine of attributions"),
            ("spearman", "Rank correlation of attributions"),
            ("top_overlap", f"Overlap of the top {top} words"),
        )
    )
    if planted is not None:
        views += (View("bars", "planted_overlap", "method", title=f"Planted words among the top {top}"),)
    whole = xr.Dataset(data, {"method": names, "other": names})
    return Result(whole, {"analyzer": "attribution_agreement", "top": top, "seed": seed}, views)


def _described(name: str, axes: tuple[str, ...], values: Floats, seed: int) -> dict[str, Any]:
    """Of ``example *axes (value, chance)``: the mean with its interval, chance, and how many examples there are."""
    said = summarize(values[..., 0], seed)
    return {
        name: (axes, said.mean),
        f"{name}_ci_low": (axes, said.ci_low),
        f"{name}_ci_high": (axes, said.ci_high),
        f"{name}_chance": (axes, _mean(values[..., 1])),
        f"{name}_examples": (axes, np.isfinite(values[..., 0]).sum(0)),
    }


def _aligned(attributions: Mapping[str, Attributions]) -> dict[str, list[Floats]]:
    """The numbers of each, without padding, of the same examples and words."""
    rows: dict[str, list[Floats]] = {}
    words: dict[str, list[list[str]]] = {}
    for name, one in attributions.items():
        if isinstance(one, Result):
            if "word_attribution" not in one.data:
                raise ExamplesError(f"the result {name!r} has no word_attribution; give one of token attribution")
            values = one.data["word_attribution"].transpose("example", "word_number").values
            texts = one.data["word"].transpose("example", "word_number").values
            words[name] = [[str(w) for w in t[np.isfinite(v)]] for t, v in zip(texts, values, strict=True)]
            one = values
        rows[name] = [np.asarray(row, dtype=float) for row in one]
    first, reference = next(iter(rows.items()))
    if not reference:
        raise ExamplesError(f"the attributions {first!r} have no examples; give one or more")
    for name, other in rows.items():
        if len(other) != len(reference):
            raise ExamplesError(
                f"the attributions {first!r} have {len(reference)} examples and {name!r} {len(other)}; give the same"
            )
        for i, row in enumerate(other):
            if np.isinf(row).any() or row.ndim != 1:
                raise ExamplesError(
                    f"the attributions {name!r} of example {i} are not a list of finite numbers; correct them"
                )
            other[i] = row = row[~np.isnan(row)]
            if not len(row):
                raise ExamplesError(f"the attributions {name!r} of example {i} have no words; leave the example out")
            if len(row) != len(reference[i]):
                raise ExamplesError(
                    f"the attributions {first!r} of example {i} have {len(reference[i])} words and {name!r} {len(row)};"
                    " give the same words, of the same text"
                )
    _check_words(words)
    return rows


def _check_words(words: Mapping[str, list[list[str]]]) -> None:
    if not words:
        return
    first, reference = next(iter(words.items()))
    for name, other in words.items():
        for i, (a, b) in enumerate(zip(reference, other, strict=True)):
            if differ := next(((x, y) for x, y in zip(a, b, strict=True) if x != y), None):
                raise ExamplesError(
                    f"in example {i} the attributions {first!r} have the word {differ[0]!r} where {name!r} have"
                    f" {differ[1]!r}; give attributions of the same texts"
                )


def _planted(planted: Sequence[Collection[int]], rows: Sequence[Floats]) -> list[Floats]:
    """1 for each planted word of each example, else 0."""
    if len(planted) != len(rows):
        raise ExamplesError(f"planted has {len(planted)} entries for {len(rows)} examples; give one for each")
    out: list[Floats] = []
    for i, (numbers, row) in enumerate(zip(planted, rows, strict=True)):
        if odd := [k for k in numbers if not 0 <= k < len(row)]:
            raise ExamplesError(f"example {i} has {len(row)} words, counted from 0, and no word {odd[0]}; correct it")
        out.append(np.isin(np.arange(len(row)), list(numbers)).astype(float))
    return out


def _mean(values: Floats) -> Floats:
    """Over examples that have a value; NaN where none has."""
    there = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(there, values, 0.0).sum(0) / there.sum(0)


def _paired_d(gap: Floats) -> tuple[Floats, Floats, Floats]:
    """Mean over standard deviation of differences, ``example measure``, with the ends of its interval."""
    n = np.isfinite(gap).sum(0)
    mean = _mean(gap)
    with np.errstate(invalid="ignore", divide="ignore"):
        spread = np.sqrt(np.nansum((gap - mean) ** 2, 0) / (n - 1))
        d = np.where(spread > TIE * np.abs(mean), mean / spread, np.where(mean == 0, 0.0, np.nan))
        d = np.where(n < 2, np.nan, d)
        reach = stats.norm.ppf(0.975) * np.sqrt(1 / n + d**2 / (2 * n))
    return d, d - reach, d + reach


# Measures of one example's attributions. They are NaN where they are not defined.


def _gini(row: Floats) -> float:
    size, n = np.sort(np.abs(row)), len(row)
    if n < 2 or not size.any():
        return float("nan")
    return float(((2 * np.arange(1, n + 1) - n - 1) * size).sum() / (n * size.sum()))


def _entropy(row: Floats) -> float:
    size = np.abs(row)
    return float(stats.entropy(size)) if size.any() else float("nan")


def _average(row: Floats) -> float:
    return float(row.mean())


def _size(row: Floats) -> float:
    return float(np.abs(row).mean())


MEASURES = {"mean_attribution": _average, "mean_size": _size, "gini": _gini, "entropy": _entropy}


# Agreement of two, each with its mean over all orders of one side's words.


def _cosine(a: Floats, b: Floats) -> tuple[float, float]:
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    if size == 0:
        return float("nan"), float("nan")
    return float(a @ b) / size, len(a) * float(a.mean() * b.mean()) / size


def _spearman(a: Floats, b: Floats) -> tuple[float, float]:
    if len(a) < 2 or not np.ptp(a) or not np.ptp(b):
        return float("nan"), float("nan")
    return float(np.corrcoef(stats.rankdata(a), stats.rankdata(b))[0, 1]), 0.0


def _top(k: int) -> Any:
    def overlap(a: Floats, b: Floats) -> tuple[float, float]:
        one, two = _among_top(a, k), _among_top(b, k)
        if len(a) <= k or not one.any() or not two.any():
            return float("nan"), float("nan")
        larger = max(one.sum(), two.sum())
        return float(np.minimum(one, two).sum() / larger), float(np.minimum.outer(one, two).mean(1).sum() / larger)

    return overlap


def _found(row: Floats, planted: Floats, k: int) -> tuple[float, float]:
    """The share of planted words among the top k."""
    chosen = _among_top(row, k)
    if len(row) <= k or not chosen.any() or not planted.any():
        return float("nan"), float("nan")
    most = min(k, planted.sum())
    return float(chosen @ planted / most), float(chosen.sum() * planted.mean() / most)


def _among_top(row: Floats, k: int) -> Floats:
    """1 for the words of the k largest |attribution|, which is above 0; words that tie for a place share it."""
    size = np.abs(row)
    if len(row) <= k:
        return (size > 0).astype(float)
    least = np.sort(size)[-k]
    above = size > least * (1 + TIE)
    tied = (np.abs(size - least) <= least * TIE) & (size > 0)
    out = above.astype(float)
    out[tied] = (k - above.sum()) / max(1, tied.sum())
    return out
