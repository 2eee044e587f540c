"""Comparing attention: several inputs in one model, and several models on one input."""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import xarray as xr
from scipy import stats

from mechinterp.analyzers.patterns import MEASURES, AttentionPatterns, AttentionProfile, fits
from mechinterp.core.display import visible
from mechinterp.core.examples import encode
from mechinterp.core.result import Result, View
from mechinterp.core.statistics import fdr, summarize
from mechinterp.engine.runner import Progress, provenance, run
from mechinterp.errors import ExamplesError, ModelError
from mechinterp.model.model import Model, as_examples

Floats: TypeAlias = npt.NDArray[np.floating]

MOST_INPUTS = 12
MOST_SHUFFLES = 20_000
AT_ONCE = 200
"""Shuffles whose distributions are held together."""
MOST_PANELS = 6
UNITS = {"entropy": "bits", "first": "share of attention", "distance": "tokens"}
TITLES = {"entropy": "Entropy of attention", "first": "Attention on what comes first", "distance": "Mean distance"}
GRID = np.arange(0, 101, 5)
"""Per cent."""


def compare_attention(
    model: Model,
    examples: Any,
    *,
    batch_size: int | None = None,
    seed: int = 0,
    progress: Progress | bool = False,
) -> Result:
    """How the attention of each head differs between inputs.

    An input is a text; or, where examples have labels of which at least one repeats, all examples of a
    label. What is compared is what `AttentionProfile` measures: ``entropy``, ``first`` and ``distance``,
    and by the Jensen-Shannon divergence (Lin 1991; in bits, 0 to 1) the profiles themselves, which
    are distributions over distances and so can be compared between texts of any words and lengths. (A
    text that is shorter has no far distances, which is a difference, too.) Between two texts with
    as many tokens, ``js_tokens`` compares the patterns, query by query, unless they are too large to be kept.

    With labels, examples are the unit: intervals are bootstrapped over them, and p is that of a
    permutation test, which shuffles labels among the examples of a pair of inputs, of the divergence and
    of each difference of means; up to 40 shuffles for each head, at most 20,000, so that the smallest
    p that they can give survives the correction in models of up to 500 heads. q is Benjamini-Hochberg
    over all heads, pairs and measures. p is NaN where there are under 40 ways to deal out the labels.

    Result: ``difference`` (``measure pair layer head``): ``js`` and, of ``entropy``, ``first`` and ``distance``,
    the second input's mean minus the first's, with ``p`` and ``q``; ``js_tokens`` among the measures where
    some pair has it. And ``mean`` (``measure input layer head``) with ``ci_low, ci_high``. ``text`` (``input``)
    is the whole text, or the label.

    Args:
        batch_size, seed, progress: as for `mechinterp.run`.
    Raises:
        ExamplesError: fewer than two inputs, or more than twelve; a text of one token; one that is too long.
    """
    given = as_examples(examples)
    names, groups = _inputs(given, model)
    options: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "progress": progress}
    lengths = model.tokenize(given).lengths
    aligned = _aligned(lengths, groups) if fits(model, lengths) else []
    analyzers = [AttentionProfile(), *([AttentionPatterns()] if aligned else [])]
    found = run(model, given, analyzers, **options)
    profile = found[0].data.transpose("example", "layer", "head", "bin")
    pairs = list(combinations(range(len(names)), 2))
    measures = ["js", *(["js_tokens"] if aligned else []), *MEASURES]
    shape = (len(measures), *profile["entropy"].shape[1:])
    tested = [_contrast(profile, groups[a], groups[b], seed) for a, b in pairs]
    arrays = {name: np.full((shape[0], len(pairs), *shape[1:]), np.nan) for name in ("difference", "p")}
    for i, pair in enumerate(tested):
        for name, (value, p) in pair.items():
            arrays["difference"][measures.index(name), i], arrays["p"][measures.index(name), i] = value, p
    if aligned:
        patterns = found[1].data["pattern"].transpose("example", "layer", "head", "query", "key").values
        for a, b in aligned:
            by_token = _by_token(patterns[groups[a][0]], patterns[groups[b][0]])
            arrays["difference"][1, pairs.index((a, b))] = by_token
    summaries = {name: [summarize(profile[name].values[group], seed) for group in groups] for name in MEASURES}
    means = {name: np.full((shape[0], len(names), *shape[1:]), np.nan) for name in ("mean", "ci_low", "ci_high")}
    for name, some in summaries.items():
        for what, array in means.items():
            array[measures.index(name)] = np.stack([getattr(one, what) for one in some])
    dims, here = ("measure", "pair", "layer", "head"), ("measure", "input", "layer", "head")
    coords: dict[str, Any] = {name: profile[name].values for name in ("layer", "head")}
    coords |= {"measure": measures, "input": names, "pair": _pair_names(names, pairs)}
    data = xr.Dataset({name: (dims, value) for name, value in {**arrays, "q": fdr(arrays["p"])}.items()}, coords)
    data = data.assign({name: (here, value) for name, value in means.items()})
    texts = [str(given.texts[group[0]]) if len(group) == 1 else name for name, group in zip(names, groups, strict=True)]
    data["text"] = ("input", np.array(texts, dtype=str))
    shuffles = max(_shuffles((groups[a], groups[b]), shape[1] * shape[2]) for a, b in pairs)
    meta = {**found[0].meta, "analyzer": "AttentionComparison", "options": {}}
    return Result(data, meta | {"shuffles": shuffles}, _views_of_inputs(data))


def compare_models(models: Sequence[Model], text: str, names: Sequence[str] | None = None, *, seed: int = 0) -> Result:
    """How the attention of several models differs on one text, whatever their tokenizers and heads.

    Tokens are joined into *units*, the finest pieces of text between characters at which tokens of all
    models end; tokens without characters, such as a BOS, join the unit beside them. A pattern over units
    is the sum over a unit's keys and the mean over its queries, so each row still adds up to 1, and all
    models are measured over the same pieces. Heads of two models do not correspond; what is compared
    is each model's layers by depth (0 the first layer, 100 the last), the distributions of its heads, and
    the mean pattern of each layer with that of each layer of the other model.

    Result: ``entropy, first, distance`` (``model layer head``; over units, mean over those past the
    first; NaN where a model has no such layer or head); ``entropy_by_depth`` and so on (``model depth``;
    mean over heads, interpolated); ``entropy_sorted`` (``model percentile``), percentiles of all heads;
    ``entropy_apart`` (``pair``), the Wasserstein distance of two models' heads; ``js`` (``pair layer
    other_layer``), the Jensen-Shannon divergence in bits of the mean patterns of two layers, mean over
    units past the first. ``meta["units"]`` are the pieces of text.

    Args:
        names: of the models, as they shall be shown; by default what they were loaded from.
    Raises:
        ModelError: fewer than two models, two that are the same, or one whose tokenizer does not say which
            characters a token covers.
        ExamplesError: the text is empty, of one unit, or too long.
    """
    named = _model_names(models, names)
    bounds = [_ends(model, text, name) for name, model in named.items()]
    shared = sorted(set.intersection(*(set(ends.tolist()) for ends in bounds)) - {0})
    if len(shared) < 2:
        raise ExamplesError(
            f"the text {visible(text, 40)!r} is one piece for these tokenizers together; give a longer text"
        )
    units = [text[a:b] for a, b in zip([0, *shared[:-1]], shared, strict=True)]
    patterns = [
        _over_units(run(model, text, AttentionPatterns(), seed=seed).data["pattern"], ends, shared)
        for model, ends in zip(named.values(), bounds, strict=True)
    ]
    pairs = list(combinations(range(len(named)), 2))
    layers, heads = (max(one.shape[i] for one in patterns) for i in (0, 1))
    data = xr.Dataset(
        coords={
            "model": list(named), "layer": np.arange(layers), "head": np.arange(heads), "depth": GRID,
            "percentile": GRID,
            "pair": [f"{list(named)[a]} | {list(named)[b]}" for a, b in pairs], "other_layer": np.arange(layers),
        }
    )  # fmt: skip
    measured = [_measures(one) for one in patterns]
    for name in MEASURES:
        whole = np.full((len(named), layers, heads), np.nan)
        for i, one in enumerate(measured):
            whole[i, : one[name].shape[0], : one[name].shape[1]] = one[name]
        data[name] = (("model", "layer", "head"), whole)
        depths = [
            np.interp(GRID, np.linspace(0, 100, len(o[name])) if len(o[name]) > 1 else [50], o[name].mean(1))
            for o in measured
        ]
        data[f"{name}_by_depth"] = (("model", "depth"), np.stack(depths))
        data[f"{name}_sorted"] = (("model", "percentile"), np.stack([np.percentile(o[name], GRID) for o in measured]))
        apart = [stats.wasserstein_distance(measured[a][name].ravel(), measured[b][name].ravel()) for a, b in pairs]
        data[f"{name}_apart"] = ("pair", np.array(apart))
    between = np.full((len(pairs), layers, layers), np.nan)
    for i, (a, b) in enumerate(pairs):
        one, other = patterns[a].mean(1)[:, None], patterns[b].mean(1)[None]
        between[i, : one.shape[0], : other.shape[1]] = _divergence(one, other)[..., 1:].mean(-1)
    data["js"] = (("pair", "layer", "other_layer"), between)
    meta = {**provenance(next(iter(named.values()))), "analyzer": "AttentionOfModels", "options": {}, "seed": seed}
    meta |= {"model": ", ".join(named), "units": units, "passes": {"forward": len(named)}, "engine": "packed"}
    return Result(data, meta, _views_of_models(data))


def _inputs(examples: Any, model: Model) -> tuple[list[str], list[list[int]]]:
    """What is compared: the name of each input, and its examples."""
    labels = examples.labels
    if labels is not None and len(set(labels)) < len(labels):
        names = [str(label) for label in dict.fromkeys(labels)]
        groups = [[i for i, one in enumerate(labels) if str(one) == name] for name in names]
    else:
        groups = [[i] for i in range(len(examples))]
        shown = [visible(text, 18, spaces=False) if isinstance(text, str) else "text" for text in examples.texts]
        names = (
            [f"{i} {text}" for i, text in enumerate(shown, 1)] if labels is None else [str(label) for label in labels]
        )
    if len(names) < 2:
        raise ExamplesError("there is one input, and it takes two to compare; give another text or label")
    if len(names) > MOST_INPUTS:
        raise ExamplesError(
            f"{len(names)} inputs are more than can be compared one by one ({MOST_INPUTS}); give the examples labels,"
            " which then are the inputs"
        )
    lengths = model.tokenize(examples).lengths
    if 1 in lengths:
        raise ExamplesError(
            f"example {lengths.index(1)} is one token, which attends to itself alone; give a longer one"
        )
    return names, groups


def _pair_names(names: Sequence[str], pairs: Sequence[tuple[int, int]]) -> list[str]:
    """``ioi → agreement`` of labels; of texts, which begin with their number, ``1 → 2``."""
    short = [name.split(" ", 1)[0] if name.startswith(f"{i} ") else visible(name, 16, spaces=False)
             for i, name in enumerate(names, 1)]  # fmt: skip
    short = [one if short.count(one) == 1 else f"{i} {one}" for i, one in enumerate(short, 1)]
    return [f"{short[a]} → {short[b]}" for a, b in pairs]


def _aligned(lengths: Sequence[int], groups: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Pairs of single texts with as many tokens."""
    if any(len(group) > 1 for group in groups):
        return []
    return [(a, b) for a, b in combinations(range(len(groups)), 2) if lengths[groups[a][0]] == lengths[groups[b][0]]]


def _contrast(profile: Any, first: Sequence[int], second: Sequence[int], seed: int) -> dict[str, tuple[Floats, Floats]]:
    """Of two groups of examples: the divergence of profiles and differences of means, with p by shuffled labels."""
    rows = [*first, *second]
    n, k = len(rows), len(second)
    weights = np.where(np.arange(n) < n - k, -1 / (n - k), 1 / k)[None]
    bins, measures = profile["profile"].values[rows], {name: profile[name].values[rows] for name in MEASURES}
    observed = _statistics(weights, bins, measures)
    shuffles = _shuffles((first, second), observed["js"][0].size)
    rng = np.random.default_rng(seed)
    as_large = {name: np.ones(value[0].shape) for name, value in observed.items()}  # what was seen is one of them
    for start in range(0, shuffles, AT_ONCE):
        dealt = rng.permuted(np.repeat(weights, min(AT_ONCE, shuffles - start), 0), axis=1)
        for name, value in _statistics(dealt, bins, measures).items():
            as_large[name] += (np.abs(value) >= np.abs(observed[name]) * (1 - 1e-9)).sum(0)
    return {
        name: (value[0], as_large[name] / (shuffles + 1) if shuffles else np.full(value[0].shape, np.nan))
        for name, value in observed.items()
    }


def _shuffles(groups: Sequence[Sequence[int]], cells: int) -> int:
    """How often labels are shuffled: never where too few ways exist for any p to be small."""
    n, k = len(groups[0]) + len(groups[1]), len(groups[1])
    return min(MOST_SHUFFLES, 40 * cells) if math.comb(n, k) >= 40 else 0


def _statistics(weights: Floats, bins: Floats, measures: Mapping[str, Floats]) -> dict[str, Floats]:
    """For each row of weights (negative: the first group), ``shuffle layer head``."""
    first, second = (
        np.einsum("sn,nlhb->slhb", part, bins) for part in (-np.minimum(weights, 0), np.maximum(weights, 0))
    )
    out = {"js": _divergence(first, second)}
    return out | {name: np.einsum("sn,nlh->slh", weights, value) for name, value in measures.items()}


def _divergence(one: Floats, other: Floats) -> Floats:
    """Jensen-Shannon divergence of distributions over the last axis, in bits."""
    middle = (one + other) / 2

    def part(some: Floats) -> Floats:
        return np.where(some > 0, some * np.log2(np.where(some > 0, some, 1) / np.where(middle > 0, middle, 1)), 0).sum(
            -1
        )

    return np.maximum((part(one) + part(other)) / 2, 0.0)


def _by_token(one: Floats, other: Floats) -> Floats:
    """Mean divergence over queries past the first of two texts' patterns, ``layer head``."""
    n = int(np.isfinite(one[0, 0, :, 0]).sum())
    return np.stack([_divergence(a[:, 1:n, :n], b[:, 1:n, :n]).mean(-1) for a, b in zip(one, other, strict=True)])


def _model_names(models: Sequence[Model], names: Sequence[str] | None) -> dict[str, Model]:
    if len(models) < 2:
        raise ModelError(f"it takes two models to compare. Got {len(models)}; give another")
    told = [model.name for model in models] if names is None else list(names)
    seen: dict[str, str] = {}
    for name, model in zip(told, models, strict=True):
        if (mark := model.fingerprint) in seen:
            raise ModelError(f"{name} and {seen[mark]} are the same model; give two that differ")
        seen[mark] = name
    told = [name if told.count(name) == 1 else f"{name} ({i + 1})" for i, name in enumerate(told)]
    return dict(zip(told, models, strict=True))


def _ends(model: Model, text: str, name: str) -> npt.NDArray[np.int_]:
    """The character at which each token ends, those before it included; 0 for a BOS."""
    _, offsets = encode(text, model.tokenizer, "the text", model.dims.context)
    if offsets is None:
        raise ModelError(f"the tokenizer of {name} does not say which characters a token covers; load a fast one")
    ends = np.maximum.accumulate([stop for _, stop in offsets])
    ends[ends == ends[-1]] = len(text)  # what is left, such as a trailing space, is the last token's
    return ends


def _over_units(pattern: Any, ends: npt.NDArray[np.int_], shared: Sequence[int]) -> Floats:
    """``layer head unit unit``: summed over a unit's keys, mean over its queries."""
    unit = np.searchsorted(shared, ends)
    member = (unit == np.arange(len(shared))[:, None]).astype(float)
    values = pattern.isel(example=0).transpose("layer", "head", "query", "key").values
    mean = member / member.sum(1, keepdims=True)
    return np.stack([mean @ layer.astype(float) @ member.T for layer in values])


def _measures(pattern: Floats) -> dict[str, Floats]:
    """`MEASURES` of patterns over units, ``layer head``, mean over units past the first."""
    n = pattern.shape[-1]
    rows = pattern[..., 1:, :]
    back = np.arange(n)[1:, None] - np.arange(n)
    entropy = -np.where(rows > 0, rows * np.log2(np.where(rows > 0, rows, 1)), 0).sum(-1).mean(-1)
    return {"entropy": entropy, "first": rows[..., 0].mean(-1), "distance": (rows * back).sum(-1).mean(-1)}


def _views_of_inputs(data: Any) -> tuple[View, ...]:
    pairs = [str(pair) for pair in data["pair"].values]
    few = len(pairs) <= MOST_PANELS
    panels: dict[str, Any] = {"by": "pair", "scale": "shared"} if few and len(pairs) > 1 else {}
    over = f", {pairs[0]}" if len(pairs) == 1 else "" if few else ", mean over pairs"

    def grid(measure: str, title: str, unit: str, center: float | None = None) -> View:
        select = {"measure": measure}
        return View(
            "heatmap",
            "difference",
            "head",
            "layer",
            title=title + over,
            unit=unit,
            center=center,
            select=select,
            **panels,
        )

    views = [grid("js", "Divergence of attention profiles", "bits")]
    if "js_tokens" in data["measure"]:
        views.append(grid("js_tokens", "Divergence of patterns, token by token", "bits"))
    for name in MEASURES:
        title, unit = TITLES[name], UNITS[name]
        views.append(
            View("lines", "mean", "layer", by="input", title=f"{title} by layer", unit=unit, select={"measure": name})
        )
        if few:
            views.append(grid(name, f"{title}: second minus first", unit, 0.0))
    return tuple(views)


def _views_of_models(data: Any) -> tuple[View, ...]:
    units = {**UNITS, "distance": "units of text"}
    views: list[View] = []
    for name in MEASURES:
        views += [
            View("lines", f"{name}_by_depth", "depth", by="model", unit=units[name],
                 title=f"{TITLES[name]} by depth in per cent"),
            View("lines", f"{name}_sorted", "percentile", by="model", unit=units[name],
                 title=f"{TITLES[name]}: percentiles of heads"),
        ]  # fmt: skip
    for pair in data["pair"].values[:MOST_PANELS]:
        first, second = str(pair).split(" | ", 1)
        views.append(
            View("heatmap", "js", "other_layer", "layer", select={"pair": str(pair)}, unit="bits",
                 title=f"Divergence of layers: {first} (up) and {second} (across)")
        )  # fmt: skip
    return tuple(views)
