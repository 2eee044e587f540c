"""How far what two engines give is apart: sites token by token, results variable by variable."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from mechinterp.core.result import Result
from mechinterp.core.tokens import TokenBatch
from mechinterp.model.slices import PATTERN_KINDS
from mechinterp.sites import Site

_ERRORS = {"completeness_error": "attribution", "additivity_error": "attribution"}
"""Values that are 0 but for rounding and quadrature, and what they are the errors of a sum of."""
_COUNTED = ("p", "q", "density", "rank")
"""Last words of the names of numbers that are counts of draws, of tokens, or of numbers that are larger."""
_MIXED = ("measure", "statistic")
"""Axes whose entries are different quantities."""


class Gap(NamedTuple):
    """A difference: the largest, the largest relative to what it is held against, and where that was."""

    absolute: float
    relative: float
    where: str


def gap(found: Tensor, expected: Float[Tensor, "row value"], where: list[str], against: Float[Tensor, " row"]) -> Gap:
    """The largest difference, relative to a size for each row; a NaN on one side alone is as large as can be.

    Args:
        where: what each row is.
        against: what each row is held against.
    """
    if found.shape != expected.shape:
        shapes = f"{tuple(found.shape)} instead of {tuple(expected.shape)}"
        return Gap(math.inf, math.inf, f"{where[0] if where else ''}: shape {shapes}")
    if not expected.numel():
        return Gap(0.0, 0.0, "")
    gaps = _differences(found, expected)
    ratios = (gaps / against.double().cpu()).masked_fill(gaps == 0, 0.0)
    worst = int(ratios.argmax())
    return Gap(float(gaps.max()), float(ratios[worst]), where[worst])


def _differences(found: Tensor, expected: Tensor) -> Float[Tensor, " row"]:
    """The largest of each row."""
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    same = (found == expected) | (found.isnan() & expected.isnan())  # equal infinities, too
    return (found - expected).abs().masked_fill(same, 0.0).nan_to_num(nan=math.inf, posinf=math.inf).amax(1)


def sizes(values: Float[Tensor, "row value"]) -> Float[Tensor, " row"]:
    """The largest finite value of each row."""
    return values.detach().double().cpu().abs().nan_to_num(nan=0.0, posinf=0.0).amax(1)


def rows(value: Tensor, site: Site, batch: TokenBatch) -> Float[Tensor, "token value"]:
    """What a site holds for each real token (scores and patterns: for its query); padding is nobody's."""
    mask = batch.mask.to(value.device)
    if site.kind in PATTERN_KINDS:
        value = value.transpose(1, 2).masked_fill(~mask[:, None, None, :], 0.0)
    return value[mask].flatten(1)


def numbers(found: Result, expected: Result) -> Iterator[Gap]:
    """Of every variable that is a measurement; and names, axes, shapes and coordinates, which must be the same.

    Each is held against its largest value, of each ``measure`` and ``statistic`` apart; an end of an interval against
    the larger of both; what is left of a sum against the sum of sizes.
    """
    ours, theirs = expected.data, found.data
    for name in {*map(str, ours.variables)} ^ {*map(str, theirs.variables)}:
        yield Gap(math.inf, math.inf, f"{name} is missing" if name in ours.variables else f"{name} is new")
    for name in map(str, ours.variables):
        if name not in theirs.variables:
            continue
        a, b = theirs[name], ours[name]
        if (a.dims, a.shape) != (b.dims, b.shape):
            yield Gap(math.inf, math.inf, f"{name} has axes {dict(a.sizes)} instead of {dict(b.sizes)}")
        elif b.dtype.kind != "f":
            if name in ours.coords and _others(a.values, b.values).any():
                yield Gap(math.inf, math.inf, f"the coordinate {name} differs")
        else:
            for what, at in _pieces(b):
                if name in ours.coords or not _counted(name, what):
                    one, other = (torch.tensor(np.asarray(each[at].values).reshape(1, -1)) for each in (a, b))
                    against = torch.tensor([_scale(name, expected, at)], dtype=torch.float64)
                    yield gap(one, other, [f"{name} {what}".rstrip()], against)


def counts(found: Result, expected: Result, tolerance: float) -> Iterator[Gap]:
    """Of every variable that is a count or a choice, the share of entries that are others.

    They jump where two numbers are nearly equal. Of ranks, p, q and shares of tokens it is the largest jump, as a
    share of the largest value, where that is more; of means of ranks that alone.

    Args:
        tolerance: entries are others if they differ by more than this, relative to the largest; a rank, to itself,
            as the first ranks are what is looked at.
    """
    for name in map(str, expected.data.data_vars):
        if name not in found.data.variables or found.data[name].sizes != expected.data[name].sizes:
            continue  # which `numbers` says
        a, b = found.data[name], expected.data[name]
        if b.dtype.kind != "f" and not _counted(name):
            share = float(_others(a.values, b.values).mean()) if b.size else 0.0
            yield Gap(share, share, name)
            continue
        for what, at in _pieces(b):
            if not _counted(name, what):
                continue
            one, other = (torch.tensor(np.asarray(each[at].values, dtype=float).reshape(-1, 1)) for each in (a, b))
            jumps, largest = _differences(one, other), _largest(b[at].values)
            whole = bool((other.isnan() | (other == other.round())).all())
            others = jumps > tolerance * (other.abs()[:, 0].nan_to_num(0.0) + 1 if whole else largest)
            jump = float(jumps.max()) if others.any() else 0.0
            relative = jump / largest if largest else math.inf if jump else 0.0
            share = float(others.double().mean()) if b.size and _counted(name) else 0.0
            yield Gap(jump, max(share, relative), f"{name} {what}".rstrip())


def _pieces(values: xr.DataArray) -> Iterator[tuple[str, dict[str, int]]]:
    """Names and indices of what is of one quantity: all of a variable, or each of the measures along its axis."""
    axis = next((axis for axis in _MIXED if axis in values.dims), None)
    if axis is None:
        yield "", {}
        return
    names = values[axis].values if axis in values.coords else range(values.sizes[axis])
    for i, name in enumerate(names):
        yield str(name), {axis: i}


def _counted(name: str, measure: str = "") -> bool:
    return name.split("_")[-1] in _COUNTED or measure in _COUNTED


def _others(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Where two arrays of names or whole numbers are not the same; NaN is the same as NaN."""
    different = np.asarray(a != b)
    return different & ~((a != a) & (b != b)) if b.dtype.kind == "O" else different


def _scale(name: str, expected: Result, at: dict[str, int]) -> float:
    data = expected.data
    if (of := _ERRORS.get(name)) is not None:
        sums = np.nansum(np.abs(data[of].transpose("example", ...).values).reshape(data.sizes["example"], -1), 1)
        return float(sums.max(initial=0.0))
    ends = [name, name.replace("ci_low", "ci_high"), name.replace("ci_high", "ci_low")]
    return max(_largest(data[end][at].values) for end in ends if end in data)


def _largest(values: npt.ArrayLike) -> float:
    sizes = np.abs(np.asarray(values, dtype=float))
    return float(sizes[np.isfinite(sizes)].max(initial=0.0))
