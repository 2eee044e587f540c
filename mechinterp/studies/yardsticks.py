"""How far what two engines give is apart: sites token by token, results variable by variable."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
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


class Gap(NamedTuple):
    """A difference: the largest, the largest relative to what it is held against, and where that was."""

    absolute: float
    relative: float
    where: str


def gap(
    found: Float[Tensor, "row value"],
    expected: Float[Tensor, "row value"],
    where: list[str],
    against: Tensor | None = None,
) -> Gap:
    """The largest difference, relative to a size for each row; a NaN on one side alone is as large as can be.

    Args:
        where: what each row is.
        against: sizes, one a row; the largest expected value of each by default.
    """
    if not expected.numel():
        return Gap(0.0, 0.0, "")
    gaps = _differences(found, expected)
    ratios = gaps / (sizes(expected) if against is None else against.double().cpu())
    ratios = ratios.masked_fill(gaps == 0, 0.0)
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
    """Of every variable that is a measurement; and names, shapes and coordinates, which must be the same.

    Each is held against its largest value; an end of an interval against the larger of both; what is left of a sum
    against the sum of sizes.
    """
    ours, theirs = expected.data, found.data
    for name in {*map(str, ours.variables)} ^ {*map(str, theirs.variables)}:
        yield Gap(math.inf, math.inf, f"{name} is missing" if name in ours else f"{name} is new")
    for name in map(str, ours.variables):
        if name not in theirs.variables:
            continue
        a, b = np.asarray(theirs[name].values), np.asarray(ours[name].values)
        if a.shape != b.shape:
            yield Gap(math.inf, math.inf, f"{name} has another shape")
        elif b.dtype.kind != "f" and name in ours.coords:
            if _others(a, b).any():
                yield Gap(math.inf, math.inf, f"the coordinate {name} differs")
        elif b.dtype.kind == "f" and not _counted(name):
            against = torch.tensor([_scale(name, expected)])
            yield gap(torch.tensor(a.reshape(1, -1)), torch.tensor(b.reshape(1, -1)), [name], against)


def counts(found: Result, expected: Result, tolerance: float) -> Iterator[Gap]:
    """Of every variable that is a count or a choice, the share of entries that are others.

    They jump where two numbers are nearly equal. Of ranks, p, q and shares of tokens it is the largest jump, as a
    share of the largest value, where that is more.

    Args:
        tolerance: relative; entries are others if they differ by more than this.
    """
    for name in map(str, expected.data.data_vars):
        if name not in found.data.variables or found.data[name].shape != expected.data[name].shape:
            continue
        a, b = np.asarray(found.data[name].values), np.asarray(expected.data[name].values)
        if _counted(name):
            one, other = torch.tensor(a.reshape(-1, 1)), torch.tensor(b.reshape(-1, 1))
            jumps, largest = _differences(one, other), _largest(b)
            others = jumps > tolerance * largest
            jump = float(jumps.max()) if others.any() else 0.0
            relative = jump / largest if largest else math.inf if jump else 0.0
            yield Gap(jump, max(float(others.double().mean()) if b.size else 0.0, relative), name)
        elif b.dtype.kind != "f":
            share = float(_others(a, b).mean()) if b.size else 0.0
            yield Gap(share, share, name)


def _counted(name: str) -> bool:
    return name.split("_")[-1] in _COUNTED


def _others(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Where two arrays of names or whole numbers are not the same; NaN is the same as NaN."""
    different = np.asarray(a != b)
    return different & ~((a != a) & (b != b)) if b.dtype.kind == "O" else different


def _scale(name: str, expected: Result) -> float:
    data = expected.data
    if (of := _ERRORS.get(name)) is not None:
        sums = np.nansum(np.abs(data[of].transpose("example", ...).values).reshape(data.sizes["example"], -1), 1)
        return float(sums.max(initial=0.0))
    ends = [name, name.replace("ci_low", "ci_high"), name.replace("ci_high", "ci_low")]
    return max(_largest(np.asarray(data[end].values)) for end in ends if end in data)


def _largest(values: npt.NDArray[Any]) -> float:
    sizes = np.abs(values.astype(float))
    return float(sizes[np.isfinite(sizes)].max(initial=0.0))
