"""Representations in two models or checkpoints, and what becomes of a concept between them or between groups."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from mechinterp.analyzers.similarity import (
    UnitFeatures,
    check_measures,
    compared,
    likeness_view,
    places,
    unlabelled,
)
from mechinterp.analyzers.units import Units
from mechinterp.core.analyzer import Wanted
from mechinterp.core.examples import Examples
from mechinterp.core.result import Result, View
from mechinterp.core.similarity import GROUPS, MEASURES, ROUNDING, Array, Likeness, Measure, jackknife, likeness
from mechinterp.core.statistics import fdr
from mechinterp.core.tokens import is_label
from mechinterp.engine.runner import Progress, run
from mechinterp.errors import AlignmentError, ExamplesError, NeedsError
from mechinterp.model.model import Model, as_examples


def compare_representations(
    model_a: Model,
    model_b: Model,
    examples: Any,
    *,
    sites: Wanted = "resid_post",
    other_sites: Wanted | None = None,
    units: Units | None = None,
    measures: Sequence[Measure] | None = None,
    most: int = 1000,
    standardize: bool = False,
    draws: int = 200,
    batch_size: int | None = None,
    seed: int = 0,
    progress: Progress | bool = False,
) -> Result:
    """How alike each layer of one model is to each of another, on the same texts: two models, or two checkpoints.

    The measures, intervals and null are those of `Similarity`. CKA and RSA compare models of any widths. Cosine takes
    equal widths, and means something only where the axes are the same: in checkpoints of one training, or a model with
    and without an adapter. Tokenizers may differ where a unit is a text, a span or a word of a category, whose mean or
    last token each model has in its own tokens.

    Args:
        sites: of the first model.
        other_sites: of the second; by default the same.
        units: what one vector stands for; by default each text at its last token.
        measures: by default all that the widths allow.
        most, standardize, draws, seed: as for `Similarity`; batch_size, progress: as for `run`.
    Returns:
        As of `Similarity`, with ``layer`` of the first model and ``other_layer`` of the second.
    Raises:
        NeedsError: sites that do not fit, an unknown measure, or cosine of unequal widths.
        AlignmentError: units that do not correspond: tokens, or positions that are numbers, where the models'
            tokens differ.
        ExamplesError: fewer than four units.
    """
    given, chosen = as_examples(examples), units or Units()
    check_measures("compare_representations", MEASURES if measures is None else measures)
    _check_same(model_a, model_b, given, chosen)
    asked = [
        UnitFeatures(some, chosen, most, seed, standardize)
        for some in (sites, sites if other_sites is None else other_sites)
    ]
    models = (model_a, model_b)
    found = [
        run(model, given, one, batch_size=batch_size, seed=seed, progress=progress)
        for model, one in zip(models, asked, strict=True)
    ]
    (x, owner), (y, other) = (_features(one) for one in found)
    if not np.array_equal(owner, other):
        raise AlignmentError(
            f"the texts have {len(owner)} units in one model and {len(other)} in the other; choose units that both have"
        )
    names: Sequence[Measure] = MEASURES if x.shape[2] == y.shape[2] else ("cka", "rsa")
    alike: dict[Measure, Likeness] = {
        name: likeness(x, y, name, owner, draws=draws, seed=seed) for name in measures or names
    }
    axes = [places(one.reads(model)) for one, model in zip(asked, models, strict=True)]
    axis = "layer" if {name for name, _ in axes} == {"layer"} else "site"
    labels = [
        entries if name == axis else [str(site) for site in one.reads(model)]
        for (name, entries), one, model in zip(axes, asked, models, strict=True)
    ]
    data = compared(alike, axis, labels[0], labels[1])
    meta = {**found[0].meta, "analyzer": "RepresentationComparison", "options": {}}
    meta |= {"model": f"{model_a.name}, {model_b.name}", "passes": {"forward": _passes(found)}}
    meta["constant"] = [*found[0].meta["constant"], *(f"{site} (second)" for site in found[1].meta["constant"])]
    return Result(data, meta, (likeness_view(axis, f"{model_a.name} (rows) and {model_b.name}"),))


def concept_drift(
    model: Model,
    examples: Any,
    other: Model | Examples,
    *,
    sites: Wanted = "resid_post",
    units: Units | None = None,
    draws: int = 1000,
    batch_size: int | None = None,
    seed: int = 0,
    progress: Progress | bool = False,
) -> Result:
    """How far a concept's direction turns between two checkpoints, or between two groups of texts, at every layer.

    The concept is what two labels differ in: its direction is the mean of the features of texts with the second label
    less that of those with the first (difference of means). Drift is 1 - cosine of the two directions: 0 for one
    direction, 1 for orthogonal ones, 2 for opposite ones.

    Directions from finitely many texts differ by chance alone, so drift is never 0: ``null_mean`` is what it is between
    sides that are dealt out at random: texts of equal labels to the two groups, or each text's features to the two
    checkpoints, once the middle of each side's two means is taken out. p is the share of deals with as much drift.

    Args:
        examples: texts with two labels; those without (None) are left out, and counted in ``meta["unlabelled"]``.
        other: a second model of the same width and axes (a checkpoint, not a stranger), which reads the same texts; or
            a second group of texts with the same labels, for the same model.
        units: as for `compare_representations`; sites, batch_size, seed, progress: likewise.
        draws: deals under the null; p is at least 1 / (draws + 1).
    Returns:
        ``drift``, ``ci_low, ci_high`` (jackknife over texts), ``p``, ``q``, ``null_mean``, ``null_high`` (95th
        percentile), by ``layer`` (or ``site``).
    Raises:
        ExamplesError: other than two labels, other labels in the second group, or a label with fewer than two texts.
        NeedsError: models of unequal width or number of sites. AlignmentError: as for `compare_representations`.
    """
    given, chosen = as_examples(examples), units or Units()
    second, paired = (given, True) if isinstance(other, Model) else (other, False)
    models = (model, other if isinstance(other, Model) else model)
    names = _two_labels(given, second)
    if paired:
        _check_same(*models, given, chosen)
    asked = UnitFeatures(sites, chosen, _ALL, seed)
    found = [
        run(one, some, asked, batch_size=batch_size, seed=seed, progress=progress)
        for one, some in zip(models, (given, second), strict=True)
    ]
    (x, texts), (y, others) = (_by_text(one) for one in found)
    if x.shape[0] != y.shape[0] or x.shape[2] != y.shape[2]:
        raise NeedsError(
            f"the models have {x.shape[0]} sites of {x.shape[2]} and {y.shape[0]} of {y.shape[2]} dimensions; a drift"
            " takes the same in both"
        )
    if paired and not np.array_equal(texts, others):
        raise AlignmentError(f"{len(texts)} texts have units in one model and {len(others)} in the other")
    (x, texts), (y, others) = _labelled(given, x, texts), _labelled(second, y, others)
    labels = [_numbers(given, texts, names), _numbers(second, others, names)]
    label, side = np.concatenate(labels), np.repeat([0, 1], [len(texts), len(others)])
    pooled = torch.cat([_balanced(some, mine) for some, mine in zip((x, y), labels, strict=True)], 1)
    whole = _cosines(pooled, label, (side == 0)[None])[0]
    null = _cosines(pooled, label, _dealt(label, side, paired, draws, np.random.default_rng(seed)))
    p = (1 + (null <= whole + ROUNDING).sum(0)) / (draws + 1)
    p = np.where(np.isfinite(whole), p, np.nan)
    stays = _stays(label, side, paired, np.random.default_rng(seed))
    low, high = jackknife(whole, _cosines(pooled, label, (side == 0) & stays, stays))
    axis, entries = places(asked.reads(model))
    columns = {
        "drift": 1 - whole, "ci_low": 1 - high, "ci_high": 1 - low, "p": p, "q": fdr(p),
        "null_mean": 1 - null.mean(0), "null_high": 1 - np.quantile(null, 0.05, axis=0),
    }  # fmt: skip
    data = xr.Dataset({name: (axis, values) for name, values in columns.items()}, {axis: entries})
    meta = {**found[0].meta, "analyzer": "ConceptDrift", "options": {}, "passes": {"forward": _passes(found)}}
    meta |= {"model": ", ".join(dict.fromkeys(one.name for one in models)), "concept": f"{names[1]} - {names[0]}"}
    meta["unlabelled"] = unlabelled(given.labels) + (0 if paired else unlabelled(second.labels))
    view = View("lines", "drift", axis, title=f"Drift of {names[1]} - {names[0]}", unit="1 - cosine")
    return Result(data, meta, (view,))


_ALL = 1 << 40


def _features(result: Result) -> tuple[Tensor, npt.NDArray[np.int64]]:
    """``site unit dim``, and the text of each unit."""
    return torch.from_numpy(result.data["features"].values), result.data["owner"].values


def _by_text(result: Result) -> tuple[Tensor, npt.NDArray[np.int64]]:
    """Means over the units of each text, ``site text dim``, and which texts these are."""
    x, owner = _features(result)
    texts, number, counts = np.unique(owner, return_inverse=True, return_counts=True)
    total = torch.zeros(x.shape[0], len(texts), x.shape[2], dtype=torch.float64)
    total.index_add_(1, torch.from_numpy(number), x.double())
    return total / torch.from_numpy(counts)[:, None], texts


def _passes(found: Sequence[Result]) -> int:
    return sum(one.meta["passes"].get("forward", 0) for one in found)


def _check_same(model_a: Model, model_b: Model, examples: Examples, units: Units) -> None:
    """Refuse units that are tokens, where the models' tokens differ."""
    if units.each != "token" and not isinstance(units.positions, int):
        return
    one, other = (model.tokenize(examples).ids for model in (model_a, model_b))
    for i, (a, b) in enumerate(zip(one, other, strict=True)):
        if a != b:
            raise AlignmentError(
                f"text {i} has other tokens in {model_a.name} ({len(a)}) than in {model_b.name} ({len(b)}), so tokens"
                " do not correspond; choose units that are texts, spans or words"
            )


def _two_labels(first: Examples, second: Examples) -> tuple[str, str]:
    """The two labels of both, as they come.

    Raises:
        ExamplesError: there are others, or too few texts of one.
    """
    sides = [[str(label) for label in some.labels or () if is_label(label)] for some in (first, second)]
    names = list(dict.fromkeys(sides[0]))
    if len(names) != 2 or set(names) != set(sides[1]):
        there = [", ".join(dict.fromkeys(side)) or "none" for side in sides]
        raise ExamplesError(
            "a concept is what two labels differ in, the same two in both groups of texts. Got"
            f" {' and '.join(dict.fromkeys(there))}; give Examples.of labels="
        )
    if few := [name for side in sides for name in names if side.count(name) < 2]:
        raise ExamplesError(f"the label {few[0]!r} has one text only; give two or more of each label")
    return names[0], names[1]


def _labelled(
    examples: Examples, x: Float[Tensor, "site text dim"], texts: npt.NDArray[np.int64]
) -> tuple[Tensor, npt.NDArray[np.int64]]:
    """Features of the texts that have a label, and which these are."""
    assert examples.labels is not None
    mine = np.flatnonzero([is_label(examples.labels[text]) for text in texts])
    return x[:, torch.from_numpy(mine)], texts[mine]


def _numbers(examples: Examples, texts: npt.NDArray[np.int64], names: tuple[str, str]) -> npt.NDArray[np.bool_]:
    """Whether each of the texts has the second label."""
    assert examples.labels is not None
    return np.array([str(examples.labels[text]) == names[1] for text in texts])


def _balanced(x: Float[Tensor, "site text dim"], label: npt.NDArray[np.bool_]) -> Float[Tensor, "site text dim"]:
    """Features less the middle of the labels' means: sides that lie apart are not two directions."""
    x, second = x.double(), torch.from_numpy(label)
    return x - (x[:, second].mean(1, keepdim=True) + x[:, ~second].mean(1, keepdim=True)) / 2


def _cosines(
    x: Float[Tensor, "site text dim"],
    label: npt.NDArray[np.bool_],
    first: npt.NDArray[np.bool_],
    stays: npt.NDArray[np.bool_] | None = None,
) -> Array:
    """Cosine of the concept's directions in the first and the second texts, ``draw site``; `first` is ``draw text``."""
    second = ~first if stays is None else stays & ~first
    weights = [
        torch.from_numpy(some * label / (some & label).sum(1, keepdims=True))
        - torch.from_numpy(some * ~label / (some & ~label).sum(1, keepdims=True))
        for some in (first, second)
    ]
    return np.stack([torch.cosine_similarity(*(w @ site for w in weights), dim=1, eps=0.0).numpy() for site in x], 1)


def _dealt(
    label: npt.NDArray[np.bool_], side: npt.NDArray[np.int64], paired: bool, draws: int, rng: np.random.Generator
) -> npt.NDArray[np.bool_]:
    """Which texts are of the first side in each deal, ``draw text``."""
    first = np.repeat((side == 0)[None], draws, 0)
    if paired:  # each text's two vectors change sides, or do not
        swap = np.tile(rng.random((draws, len(side) // 2)) < 0.5, 2)
        return first ^ swap
    for name in (False, True):
        mine = np.flatnonzero(label == name)
        first[:, mine] = rng.permuted(first[:, mine], axis=1)
    return first


def _stays(
    label: npt.NDArray[np.bool_], side: npt.NDArray[np.int64], paired: bool, rng: np.random.Generator
) -> npt.NDArray[np.bool_]:
    """Which texts stay when each group is left out, ``group text``; texts of a label are spread over the groups."""
    n = len(side) // 2 if paired else len(side)
    groups, group = min(GROUPS, n), np.empty(n, dtype=int)
    group[np.lexsort((rng.random(n), label[:n], side[:n]))] = np.arange(n) % groups
    return (np.tile(group, 2) if paired else group) != np.arange(groups)[:, None]
