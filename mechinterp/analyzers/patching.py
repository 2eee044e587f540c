"""Activation patching: which site, at which position, carries the difference between two prompts."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from mechinterp.core.analyzer import Analyzer, Batch, Context, Model, Needs, Sweep
from mechinterp.core.metrics import Metric, logit_diff
from mechinterp.core.result import Part, Result, View
from mechinterp.core.statistics import summarize
from mechinterp.errors import NeedsError
from mechinterp.sites import KINDS, Position, Sites

Array = npt.NDArray[np.floating]


@dataclass(frozen=True)
class ActivationPatching(Analyzer):
    """Write one run's activations into the other, one cell at a time (Meng et al. 2022; Heimersheim & Nanda 2024).

    Denoising runs the corrupted prompt and writes clean values: what is enough to restore the
    behaviour. Noising runs the clean prompt and writes corrupted values: what is needed for it.
    Either way ``effect`` is (patched - corrupted) / (clean - corrupted), with the mean difference
    over the examples that have the cell as denominator: 1 is the clean run, 0 the corrupted one.
    Intervals and p are over examples (of patched - base, sign flips, NaN below six examples), the
    denominator held fixed; q is over all cells.

    Result: ``effect``, ``ci_low``, ``ci_high``, ``p``, ``q`` over the grid's axes (``layer``,
    ``position``, ``head``), and ``patched`` (with ``example``), ``clean``, ``corrupted`` as metrics.

    Attributes:
        site: the kind of site, such as ``"resid_pre"``.
        metric: what is measured.
        positions: ``"each"`` token index; named positions as a tuple, which is what to use for
            prompts of different shapes; one position; or None for all at once.
        heads: ``"each"``, some, or None for all at once.
        layers: None for all.
        direction: ``"denoise"`` or ``"noise"``.
        guard: least |clean - corrupted| for an effect to mean anything; below it a cell is NaN, with a warning.
    """

    site: str
    metric: Metric = field(default_factory=logit_diff)
    positions: str | int | tuple[Position, ...] | None = "each"
    heads: str | tuple[int, ...] | None = None
    layers: tuple[int, ...] | None = None
    direction: Literal["denoise", "noise"] = "denoise"
    guard: float = 1e-3

    def __post_init__(self) -> None:
        if self.site not in KINDS:
            raise NeedsError(
                f"The site of ActivationPatching must be a kind, such as 'resid_pre', with layers=, positions= and"
                f" heads= beside it. Got {self.site!r}"
            )
        if self.direction not in ("denoise", "noise"):
            raise NeedsError(
                f"The direction of ActivationPatching must be 'denoise' or 'noise'. Got {self.direction!r}"
            )

    def needs(self, model: Model) -> Needs:
        denoise = self.direction == "denoise"
        grid = Sweep(
            self.metric,
            Sites(self.site, self.layers),
            self.positions,
            self.heads,
            source="clean" if denoise else "corrupted",
            base="corrupted" if denoise else "clean",
        )
        return Needs(sweeps={"grid": grid})

    def observe(self, batch: Batch) -> Part:
        grid = batch.sweeps["grid"]
        assert grid.values is not None and grid.base is not None and grid.source is not None
        clean, corrupted = (grid.source, grid.base) if self.direction == "denoise" else (grid.base, grid.source)
        # The grid's own coordinates say that its positions are token indices already, not columns.
        axes = " ".join(("example", *grid.axes))
        return Part(
            {"patched": (grid.values, axes), "clean": (clean, "example"), "corrupted": (corrupted, "example")},
            coords={name: list(entries) for name, entries in grid.coords.items()},
        )

    def combine(self, parts: Iterator[Part], context: Context) -> Result:
        data = Result.of(parts, unit="(patched - corrupted) / (clean - corrupted)").data
        patched = data["patched"].transpose("example", ...)
        clean, corrupted = data["clean"].values, data["corrupted"].values
        base = corrupted if self.direction == "denoise" else clean
        new = share(patched.values, corrupted, clean, base, self.metric, self.guard, context.seed)
        dims = patched.dims[1:]
        data = data.assign({name: (dims, value) for name, value in new.items()})
        order = ["effect", "ci_low", "ci_high", "p", "q", "patched", "clean", "corrupted"]
        return Result(data[order], {}, _views([str(d) for d in dims], self))


def share(
    patched: Array, zero: Array, one: Array, base: Array, metric: Metric, guard: float, seed: int
) -> dict[str, Array]:
    """Where each cell lies between two runs, (patched - zero) / (one - zero), over examples.

    The denominator is the mean over the examples that have the cell, and is held fixed.

    Args:
        patched: the metric of every edited run, ``example *cells``; NaN where an example lacks the cell.
        zero, one: the metric of the runs whose share is 0 and 1, ``example``.
        base: that of the run that was edited; p and q are of patched - base.
        guard: least |one - zero| for a share to mean anything; below it a cell is NaN, with a warning.
    Returns:
        ``effect``, ``ci_low``, ``ci_high``, ``p`` and ``q``, each of the shape of one example.
    """
    shape = (-1,) + (1,) * (patched.ndim - 1)
    present = np.isfinite(patched)
    differences = np.where(present, (one - zero).reshape(shape), np.nan)
    with np.errstate(invalid="ignore", divide="ignore"):
        total = np.nansum(differences, 0) / present.sum(0)
    if (small := np.abs(total) < guard).any():
        warnings.warn(
            f"clean and corrupted differ by only {float(np.nanmin(np.abs(total))):.2g} in {metric}: no effect"
            " can be normalised; use prompts that the model tells apart",
            stacklevel=3,
        )
        total = np.where(small, np.nan, total)
    effect = summarize((patched - zero.reshape(shape)) / total, seed)
    change = summarize((patched - base.reshape(shape)) / total, seed)
    return {"effect": effect.mean, "ci_low": effect.ci_low, "ci_high": effect.ci_high, "p": change.p, "q": change.q}


def _views(dims: list[str], analyzer: ActivationPatching) -> tuple[View, ...]:
    title = f"Activation patching of {analyzer.site} ({analyzer.direction})"
    if len(dims) > 1:
        return (View("heatmap", "effect", dims[1], dims[0], title=title, unit="effect", center=0.0),)
    return (View("lines", "effect", dims[0], title=title, unit="effect"),)
