"""Activation patching: which site, at which position, carries the difference between two prompts."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import xarray as xr

from mechinterp.core.analyzer import Analyzer, Batch, Chosen, Context, Model, Needs, Sweep
from mechinterp.core.metrics import Metric, logit_diff
from mechinterp.core.result import Part, Result, View
from mechinterp.core.statistics import summarize
from mechinterp.errors import NeedsError
from mechinterp.sites import KINDS, Position, Site, Sites

Strings = npt.NDArray[Any]  # beartype knows no dtype of strings of any length

Array = npt.NDArray[np.floating]


@dataclass(frozen=True)
class ActivationPatching(Analyzer):
    """Write one run's activations into the other, one cell at a time (Meng et al. 2022; Heimersheim & Nanda 2024).

    Denoising runs the corrupted prompt and writes clean values: what is enough to restore the
    behaviour. Noising runs the clean prompt and writes corrupted values: what is needed for it.
    Either way ``effect`` is (patched - corrupted) / (clean - corrupted), with the mean difference
    over the examples that have the cell as denominator: 1 is the clean run, 0 the corrupted one. So a cell
    that does nothing has effect 0 when denoising and 1 when noising, which is where figures are white.
    Intervals and p are over examples (of patched - base, sign flips, NaN below six examples), the
    denominator held fixed; q is over all cells.

    Result: ``effect``, ``ci_low``, ``ci_high``, ``p``, ``q`` over the grid's axes (``kind`` when there are
    several, ``layer``, ``position``, ``head`` or ``kv_head`` or ``neuron``), and ``patched`` (with
    ``example``), ``clean``, ``corrupted`` as metrics; ``token``, ``example position``, the clean prompt's
    tokens, where positions are token indices; ``cell``, the name of each cell, where a heatmap cannot show
    all axes.

    Attributes:
        site: the kind of site, such as ``"resid_pre"``, or several, which then are an axis ``kind`` and
            share one sweep.
        metric: what is measured.
        positions: ``"each"`` token index; named positions as a tuple, which is what to use for
            prompts of different shapes; one position; or None for all at once.
        heads: ``"each"``; some, as a tuple, where a tuple among them is a set of heads written together;
            or None for all at once.
        neurons: the same for neurons of mlp_gate, mlp_up and mlp_act.
        layers: None for all.
        direction: ``"denoise"`` or ``"noise"``.
        guard: least |clean - corrupted| for an effect to mean anything; below it a cell is NaN, with a warning.
    """

    site: str | tuple[str, ...]
    metric: Metric = field(default_factory=logit_diff)
    positions: str | int | tuple[Position, ...] | None = "each"
    heads: Chosen = None
    neurons: Chosen = None
    layers: tuple[int, ...] | None = None
    direction: Literal["denoise", "noise"] = "denoise"
    guard: float = 1e-3

    def __post_init__(self) -> None:
        if not self._kinds or any(kind not in KINDS for kind in self._kinds):
            raise NeedsError(
                f"The site of ActivationPatching must be a kind, such as 'resid_pre', or a tuple of kinds, with"
                f" layers=, positions= and heads= beside it. Got {self.site!r}"
            )
        flat = [kind for kind in self._kinds if not KINDS[kind].layered]
        if flat and (len(self._kinds) > 1 or self.layers is not None):
            raise NeedsError(f"{flat[0]} has no layers; patch it alone, and without layers=. Got {self.site!r}")
        if len(set(self._kinds)) < len(self._kinds):
            raise NeedsError(f"The sites of ActivationPatching must be different ones. Got {self.site!r}")
        if self.direction not in ("denoise", "noise"):
            raise NeedsError(
                f"The direction of ActivationPatching must be 'denoise' or 'noise'. Got {self.direction!r}"
            )
        if self.heads is not None and self.neurons is not None:
            raise NeedsError("ActivationPatching takes heads or neurons, and not both; no site has both axes")
        for name, chosen in (("heads", self.heads), ("neurons", self.neurons)):
            if chosen is not None:
                _check_parts(name, chosen, self._kinds)

    @property
    def _kinds(self) -> tuple[str, ...]:
        return (self.site,) if isinstance(self.site, str) else self.site

    def needs(self, model: Model) -> Needs:
        denoise = self.direction == "denoise"
        grid = Sweep(
            self.metric,
            tuple(Sites(kind, self.layers) if KINDS[kind].layered else Site(kind) for kind in self._kinds),
            self.positions,
            self.heads,
            self.neurons,
            source="clean" if denoise else "corrupted",
            base="corrupted" if denoise else "clean",
        )
        return Needs(sweeps={"grid": grid})

    def observe(self, batch: Batch) -> Part:
        grid = batch.sweeps["grid"]
        assert grid.values is not None and grid.base is not None and grid.source is not None
        clean, corrupted = (grid.source, grid.base) if self.direction == "denoise" else (grid.base, grid.source)
        patched, axes = grid.values, grid.axes
        # The grid's own coordinates say that its positions are token indices already, not columns.
        coords = {name: list(entries) for name, entries in grid.coords.items()}
        if len(self._kinds) > 1:  # its one axis of sites is kinds of so many layers
            patched, axes = patched.unflatten(1, (len(self._kinds), -1)), ("kind", "layer", *axes[1:])
            layers = self.layers or tuple(range(batch.model.dims.n_layers))
            coords = {"kind": list(self._kinds), "layer": list(layers), **{a: coords[a] for a in axes[2:]}}
        values = {
            "patched": (patched, " ".join(("example", *axes))),
            "clean": (clean, "example"),
            "corrupted": (corrupted, "example"),
        }
        if self.positions == "each":
            plain = batch.examples.right_padded()
            ids = plain.ids.masked_fill(~plain.mask, -1)[:, : len(coords["position"])]
            values["token_id"] = (ids, "example position")
        return Part(values, coords=coords)

    def combine(self, parts: Iterator[Part], context: Context) -> Result:
        data = Result.of(parts, unit="(patched - corrupted) / (clean - corrupted)").data
        patched = data["patched"].transpose("example", ...)
        clean, corrupted = data["clean"].values, data["corrupted"].values
        base = corrupted if self.direction == "denoise" else clean
        new = share(patched.values, corrupted, clean, base, self.metric, self.guard, context.seed)
        dims = tuple(str(d) for d in patched.dims[1:])
        data = data.assign({name: (dims, value) for name, value in new.items()})
        if "token_id" in data:
            data["token"] = (data["token_id"].dims, _strings(data["token_id"].values, context.model))
        views, named = _views(data, dims, self)
        if named:
            data["cell"] = (dims, _names(data, dims, self._kinds))
        order = ["effect", "ci_low", "ci_high", "p", "q", "cell", "patched", "clean", "corrupted", "token"]
        return Result(data[[name for name in order if name in data]], {}, views)


def _check_parts(name: str, chosen: Chosen, kinds: tuple[str, ...]) -> None:
    """Raise unless these heads or neurons can be an axis of all the kinds."""
    what = f"The {name} of ActivationPatching must be 'each', or a tuple of numbers and of tuples of numbers (sets)"
    if isinstance(chosen, str):
        if chosen != "each":
            raise NeedsError(f"{what}. Got {chosen!r}")
    elif not isinstance(chosen, tuple) or not chosen:
        raise NeedsError(f"{what}. Got {chosen!r}")
    else:
        sets = [one if isinstance(one, tuple) else (one,) for one in chosen]
        if not all(one and all(isinstance(i, int) and i >= 0 for i in one) for one in sets):
            raise NeedsError(f"{what}, counted from 0 and none of them empty. Got {chosen!r}")
        if len({tuple(sorted(one)) for one in sets}) < len(sets) or any(len(set(one)) < len(one) for one in sets):
            raise NeedsError(f"{what}, each of them once. Got {chosen!r}")
    axes = {kind: KINDS[kind].head_axis if name == "heads" else "d_mlp" in KINDS[kind].axes for kind in kinds}
    if lacking := [kind for kind, axis in axes.items() if not axis]:
        has = ", ".join(k for k, s in KINDS.items() if (s.head_axis if name == "heads" else "d_mlp" in s.axes))
        raise NeedsError(
            f"ActivationPatching({lacking[0]!r}) has no {name} to choose from; sites with {name} are {has}"
        )
    if len(set(axes.values())) > 1:
        raise NeedsError(f"the sites {', '.join(kinds)} have different axes of {name}; patch them one by one")


def _strings(ids: npt.NDArray[np.int64], model: Model) -> Strings:
    """Tokens as text; "" for padding, which is -1."""
    unique, where = np.unique(ids.clip(min=0), return_inverse=True)
    names = np.array(model.to_str_tokens(unique.tolist()), dtype=str)
    return np.where(ids < 0, "", names[where.reshape(ids.shape)])


FEW = 6
"""Entries of an axis that can be panels side by side."""
WIDE = 64
"""Heads or neurons that can be the columns of one heatmap."""


def _views(data: xr.Dataset, dims: tuple[str, ...], analyzer: ActivationPatching) -> tuple[tuple[View, ...], bool]:
    """Figures in which every cell is a cell of the grid, none a mean of several; and whether they need cells' names."""
    kinds = ", ".join((analyzer.site,) if isinstance(analyzer.site, str) else analyzer.site)
    title = f"Activation patching of {kinds}{at_one(analyzer.positions)} ({analyzer.direction})"
    rest = 0.0 if analyzer.direction == "denoise" else 1.0  # the effect of a cell that does nothing
    same: dict[str, Any] = {"unit": "effect", "center": rest, "scale": "shared"}
    largest = View("bars", "effect", "cell", title=f"{title}: largest cells", unit="effect", center=rest)
    axes = [d for d in dims if d != "kind"]
    if len(axes) == 1:
        by = "kind" if "kind" in dims else None
        return (View("lines", "effect", axes[0], by=by, title=title, unit="effect"),), False
    y, *others = axes
    if len(others) == 1:
        x, by = others[0], "kind" if "kind" in dims else None
        fits = x == "position" or data.sizes[x] <= WIDE
    else:  # one of them is panels, the one with fewer entries
        x, by = sorted(others, key=lambda d: -data.sizes[d])
        fits = "kind" not in dims and data.sizes[by] <= FEW and (x == "position" or data.sizes[x] <= WIDE)
    text = "token" if x == "position" and "token" in data else None
    heat = View("heatmap", "effect", x, y, by=by, x_text=text, title=title, **same)
    if len(others) == 1 and fits:
        return (heat,), False
    return ((heat, largest) if fits else (largest,)), True


def at_one(positions: str | int | tuple[Position, ...] | None) -> str:
    """`` at end``, for a title: the one position that is written, where positions are no axis and not all."""
    return "" if positions in (None, "each", "all") or isinstance(positions, tuple) else f" at {positions}"


def _names(data: xr.Dataset, dims: tuple[str, ...], kinds: tuple[str, ...]) -> Strings:
    """The site of every cell in its short form, ``z.10.h3,7@end``."""
    named = {"kind": "{}", "layer": ".{}", "neuron": ".n{}", "position": "@{}"}
    order = ["kind", "layer", "head", "kv_head", "neuron", "position"]
    out = np.full((1,) * len(dims), "" if "kind" in dims else kinds[0], dtype=object)
    for name in (d for d in order if d in dims):
        each = [named.get(name, ".h{}").format(str(e).replace("+", ",")) for e in data[name].values.tolist()]
        out = out + np.array(each, dtype=object).reshape([-1 if d == name else 1 for d in dims])
    return out.astype(str)


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
