"""Part: what an analyzer takes from one batch. Result: labelled arrays with units and provenance."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
import xarray as xr

from mechinterp.core.display import ROWS, html_table, visible
from mechinterp.errors import NeedsError, OutputError

if TYPE_CHECKING:
    from pathlib import Path

    import plotly.graph_objects as go


@dataclass(frozen=True)
class Part:
    """What `observe` returns for one batch: named tensors with named axes.

    ``Part(tensor, "layer example")`` holds one, named ``value``; ``Part({"prob": (tensor, "layer
    example"), ...})`` several. The engine adds the coordinates of ``layer`` from the declared reads,
    moves tensors to the CPU, and marks padding as NaN along ``position`` (and ``query``, ``key``),
    unless the part gives that axis coordinates of its own.
    """

    values: Mapping[str, tuple[Any, str]]
    coords: Mapping[str, Sequence[Any]]
    rows: tuple[int, ...]
    """Numbers of these examples in the whole set; filled in by the engine."""

    def __init__(
        self,
        values: Any,
        axes: str | None = None,
        coords: Mapping[str, Sequence[Any]] | None = None,
        rows: tuple[int, ...] = (),
    ) -> None:
        named = values if isinstance(values, Mapping) else {"value": (values, axes)}
        for name, (value, names) in named.items():
            if not isinstance(names, str) or len(names.split()) != value.ndim:
                raise NeedsError(f"part {name!r} has shape {tuple(value.shape)} but axes {names!r}; name every axis")
        object.__setattr__(self, "values", dict(named))
        object.__setattr__(self, "coords", dict(coords or {}))
        object.__setattr__(self, "rows", rows)


@dataclass(frozen=True)
class View:
    """A figure of a result, described rather than drawn; `report` renders it.

    ``heatmap`` shows `value` over `y` × `x`, one panel for each entry of `by`; ``lines`` shows it over
    `x`, one line for each entry of `by`; ``bars`` shows the entries of `x` whose `value` is farthest from
    `center` (or from 0). What is left over is averaged.
    """

    kind: Literal["heatmap", "lines", "bars"]
    value: str
    x: str
    y: str | None = None
    by: str | None = None
    text: str | None = None
    """A variable written into the cells, such as the top token."""
    title: str = ""
    unit: str = ""
    mark: str | None = None
    """A boolean variable whose cells are marked; by default those with q < .05, where there is a q."""
    center: float | None = None
    """The value at the middle of a diverging colour scale, None for a sequential one; and where bars begin."""
    select: Mapping[str, Any] = field(default_factory=dict)
    """Only the rows of the table with these entries."""
    x_text: str | None = None
    """Heatmaps only: a variable of strings, ``example x`` or ``x``, such as tokens. Where it is the same in all
    examples it labels the column; elsewhere the column's own name does, followed by "…"."""
    y_text: str | None = None
    """The same for the rows, which then go from top to bottom."""
    scale: Literal["own", "shared"] = "own"
    """Panels of a heatmap: each with colours and a range of its own, as causal traces are drawn (Meng et al. 2022),
    so that a faint panel can be read; or all with one, so that colours can be compared across panels."""
    log: bool = False
    """Lines only: a numeric `x`, above 0, on a logarithmic axis."""
    interval: bool = True
    """Whether ``ci_low`` and ``ci_high`` are of `value`; they are drawn, as ``VALUE_ci_low`` always is."""


@dataclass(frozen=True, eq=False)
class Result:
    """Labelled arrays (`data`), how they came about (`meta`), and the figures they make (`views`)."""

    data: xr.Dataset
    meta: Mapping[str, Any] = field(default_factory=dict)
    views: tuple[View, ...] = ()

    @classmethod
    def of(
        cls,
        parts: Iterable[Part],
        unit: str = "",
        views: tuple[View, ...] = (),
        **meta: Any,
    ) -> "Result":
        """Parts joined along ``example``, back in the examples' order.

        Arrays that differ in size along another axis (positions of shorter texts) are padded: NaN in
        floats, -1 in integers, "" in strings.

        Raises:
            NeedsError: there are no parts, or one has no ``example`` axis (combine such parts yourself).
        """
        all_parts = list(parts)
        if not all_parts:
            raise NeedsError("there are no parts to combine; observe() must return a Part for every batch")
        order = np.argsort([row for part in all_parts for row in part.rows])
        variables: dict[str, Any] = {}
        coords: dict[str, Any] = {}
        for name, (_, axes) in all_parts[0].values.items():
            dims = axes.split()
            if "example" not in dims:
                raise NeedsError(f"part {name!r} has axes {axes!r} without example; join such parts in combine()")
            arrays = [_array(part.values[name][0]) for part in all_parts]
            size = [max(a.shape[i] for a in arrays) for i in range(len(dims))]
            at = dims.index("example")
            padded = [_pad(a, size[:at] + [a.shape[at]] + size[at + 1 :]) for a in arrays]
            variables[name] = (dims, np.take(np.concatenate(padded, at), order, at))
        for part in all_parts:
            for axis, labels in part.coords.items():
                if axis not in coords or len(labels) > len(coords[axis]):
                    coords[axis] = list(labels)
        data = xr.Dataset(variables, {axis: (axis, labels) for axis, labels in coords.items()}, {"unit": unit})
        data = data.assign_coords({d: np.arange(n) for d, n in data.sizes.items() if d not in data.coords})
        return cls(data, dict(meta), views)

    def table(self, name: str | None = None) -> pd.DataFrame:
        """Tidy table of the variables that share the axes of `name` (default: the first variable).

        One row per number; rows whose floats are all NaN are padding, and left out.

        Raises:
            NeedsError: no variable has that name.
        """
        names = [str(n) for n in self.data.data_vars]
        if name is not None and name not in names:
            raise NeedsError(f"this result has no {name!r}; it has {', '.join(names)}")
        dims = self.data[name or names[0]].dims
        group = [n for n in names if self.data[n].dims == dims]
        if not dims:
            return pd.DataFrame({n: [self.data[n].item()] for n in group})
        frame: Any = self.data[group].to_dataframe(dim_order=list(dims)).reset_index()
        floats = [n for n in group if self.data[n].dtype.kind == "f"]  # integers and strings have no NaN to pad with
        some = frame.dropna(subset=floats, how="all") if floats else frame
        frame = some if len(some) else frame  # a result that is all NaN says so, rather than nothing
        columns = [c for c in frame.columns if c not in group]
        return frame[[*columns, *group]].reset_index(drop=True)

    def tables(self, most: int | None = None) -> dict[str, pd.DataFrame]:
        """Every table, by the name of its first variable; those of more than `most` rows are left out."""
        firsts: dict[tuple[Any, ...], str] = {}
        for name, variable in self.data.data_vars.items():
            firsts.setdefault(tuple(variable.dims), str(name))
        some = [name for name in firsts.values() if most is None or self.data[name].size <= most]
        return {name: self.table(name) for name in some}

    def figure(self, view: int = 0) -> "go.Figure":
        """One of the result's figures, as a plotly figure.

        Raises:
            OutputError: the result describes no such figure.
        """
        from mechinterp.report.figures import plotly_figure

        if not self.views:
            raise OutputError("this result has no figures; pass views= to Result.of, or use .table()")
        if not 0 <= view < len(self.views):
            raise OutputError(f"this result has {len(self.views)} figures, not number {view}; use .table()")
        return plotly_figure(self, self.views[view])

    def save(self, path: "str | Path") -> "Path":
        """Write numbers as safetensors and the rest as JSON into the folder `path`, whole or not at all."""
        from mechinterp.report.files import save_result

        return save_result(self, path)

    @classmethod
    def load(cls, path: "str | Path") -> "Result":
        """Read back what `save` wrote."""
        from mechinterp.report.files import load_result

        return load_result(path)

    def with_meta(self, **meta: Any) -> "Result":
        """The same result with more provenance."""
        return replace(self, meta={**self.meta, **meta})

    def __repr__(self) -> str:
        return "\n".join([self._title(), *(f"  {n}: {_sizes(v)}" for n, v in self.data.data_vars.items())])

    def _title(self) -> str:
        unit = f" in {self.data.attrs['unit']}" if self.data.attrs.get("unit") else ""
        return f"Result of {self.meta.get('analyzer', 'an analyzer')}{unit}"

    def _repr_html_(self) -> str:
        if not self.data.data_vars:
            return html_table((), (), f"{self._title()}: no variables")
        frame = self.table()
        shown = [
            [visible(cell, 60) if isinstance(cell, str) else cell for cell in row]
            for row in frame.head(ROWS).itertuples(index=False, name=None)
        ]
        dims = self.data[str(next(iter(self.data.data_vars)))].dims
        other = [f"{n} ({_sizes(v)})" for n, v in self.data.data_vars.items() if v.dims != dims]
        caption = f"{self._title()}, {_sizes(self.data[list(frame.columns)[-1]])}"
        caption += f"; not in this table: {', '.join(other)}" if other else ""
        return html_table([str(c) for c in frame.columns], shown, caption, max(0, len(frame) - ROWS))


def _sizes(variable: Any) -> str:
    return " × ".join(f"{dim} {size}" for dim, size in variable.sizes.items()) or "one number"


def _array(value: Any) -> npt.NDArray[Any]:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    return np.asarray(value)


def _pad(array: npt.NDArray[Any], size: list[int]) -> npt.NDArray[Any]:
    if list(array.shape) == size:
        return array
    fill = {"f": np.nan, "i": -1, "b": False}.get(array.dtype.kind, "")
    return np.pad(array, [(0, n - m) for m, n in zip(array.shape, size, strict=True)], constant_values=fill)
