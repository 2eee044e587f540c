"""Panels: the arrays of one figure, worked out once, so that every back-end draws the same numbers."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pandas as pd

from mechinterp.core.display import visible
from mechinterp.core.result import Result, View
from mechinterp.errors import OutputError

Numbers: TypeAlias = npt.NDArray[np.float64]

LARGEST = 15
"""Bars in a figure of the largest entries."""
TEXT_COLUMNS = 40
"""With more columns than this, cells are too narrow for text."""
TOKEN_WIDTH = 7
"""Characters of a token that fit into a cell."""
LABEL_WIDTH = 14
"""Characters of a token that labels a column."""
AXIS_WIDTH = 100
"""Characters that fit below the axis of a figure of lines."""
MOST_PANELS = 8
"""Heatmaps that can be told apart side by side."""
ALPHA = 0.05


@dataclass(frozen=True)
class Heat:
    """``values`` over ``y x``; row 0 is `y[0]`, drawn at the bottom when `upward`."""

    title: str
    note: str
    label: str
    """What the colours mean."""
    values: Numbers
    x: tuple[str, ...]
    y: tuple[str, ...]
    x_name: str
    y_name: str
    low: float
    high: float
    diverging: bool
    upward: bool
    text: npt.NDArray[Any] | None = None
    """Strings ``y x``, whole."""
    q: Numbers | None = None
    """``y x``; None where the result has none."""
    marked: npt.NDArray[np.bool_] | None = None
    """Cells that the view marks, by default those with q < .05, ``y x``."""
    x_text: tuple[str, ...] | None = None
    """What stands below each column in place of its name; several columns may have the same."""
    y_text: tuple[str, ...] | None = None
    """What stands beside each row, likewise."""
    colors: int | None = None
    """Which of the colour scales, for a panel with a range of its own; None for the usual one."""

    @property
    def cell_text(self) -> npt.NDArray[Any]:
        """What is written into each cell, ``y x``: the text where it fits, and a dot where it is marked."""
        out = (
            np.full(self.values.shape, "", object)
            if self.marked is None
            else np.where(self.marked, "•", "").astype(object)
        )
        if self.text is not None and len(self.x) <= TEXT_COLUMNS:
            out = np.vectorize(lambda t: visible(t, TOKEN_WIDTH), otypes=[object])(self.text) + out
        return out


@dataclass(frozen=True)
class Heats:
    """Heatmaps side by side, over the same rows and columns; the title of each is its entry."""

    title: str
    note: str
    panels: tuple[Heat, ...]
    shared: bool
    """Whether all have the same range and colours."""


@dataclass(frozen=True)
class Series:
    """One line: `values` over `x`, with the ends of its interval where there is one."""

    name: str
    x: npt.NDArray[Any]
    values: Numbers
    low: Numbers | None = None
    high: Numbers | None = None


@dataclass(frozen=True)
class Lines:
    """Lines over a shared axis, numeric or of names."""

    title: str
    note: str
    label: str
    x_name: str
    x: tuple[str, ...]
    """Names of the places on the axis; empty when it is numeric."""
    series: tuple[Series, ...] = ()
    log: bool = False
    joined: bool = False
    """Whether names are places in a row, with something between them: sites along the depth of a model."""

    @property
    def ticks(self) -> list[int]:
        """Which names there is room for below the axis: all, or of places in a row every so many."""
        widest = max(map(len, self.x), default=0) + 1
        return every(len(self.x), AXIS_WIDTH // widest) if self.joined else list(range(len(self.x)))


@dataclass(frozen=True)
class Bars:
    """The entries farthest from `center`, farthest first."""

    title: str
    note: str
    label: str
    names: tuple[str, ...]
    values: Numbers
    solid: npt.NDArray[np.bool_]
    """False where q ≥ .05, or where the view marks others: drawn paler."""
    low: Numbers | None = None
    high: Numbers | None = None
    center: float = 0.0
    """Where bars begin."""


Panel: TypeAlias = Heat | Heats | Lines | Bars


def panel(result: Result, view: View) -> Panel:
    """The arrays of one view.

    Raises:
        OutputError: the view names a column that its table lacks, or nothing is left to draw.
    """
    frame = rows(result, view)
    if frame.empty:
        raise OutputError(f"the figure {view.title!r} has nothing to show: every {view.value} is missing; use .table()")
    if view.kind == "heatmap":
        return _heat(result, frame, view) if view.by is None else _heats(result, frame, view)
    return _lines(frame, view) if view.kind == "lines" else _bars(frame, view)


def rows(result: Result, view: View) -> pd.DataFrame:
    """The rows of the result's tidy table that a view shows; none when all its values are missing.

    Raises:
        OutputError: the view names a column that its table lacks, or an entry that a column lacks.
    """
    if view.value not in result.data.data_vars:
        have = ", ".join(str(n) for n in result.data.data_vars)
        raise OutputError(
            f"the figure {view.title!r} shows {view.value!r}, and the result has {have}; correct its View"
        )
    frame: Any = _selected(result, view).table(view.value)
    wanted = [view.value, view.x, view.y, view.by, view.text, *view.select]
    if missing := [c for c in wanted if c is not None and c not in frame.columns]:
        raise OutputError(
            f"the figure {view.title!r} needs the column {missing[0]!r}, and its table has"
            f" {', '.join(map(str, frame.columns))}; correct its View"
        )
    if view.kind == "heatmap" and view.y is None:
        raise OutputError(f"the heatmap {view.title!r} has no y; name the column of its rows in the View")
    for axis, text in (("x", view.x_text), ("y", view.y_text)):
        if text is not None:
            _check_labels(result, view, axis, text)
    for column, value in view.select.items():
        wanted = value if isinstance(value, tuple | list) else [value]
        entries = list(result.data[column].values.ravel()) if column in result.data else list(frame[column])
        if gone := [w for w in wanted if w not in entries]:
            known = ", ".join(map(str, list(dict.fromkeys(entries))[:12]))
            raise OutputError(
                f"the figure {view.title!r} selects {column} {gone[0]!r}, which is none of {known}; correct it"
            )
        frame = frame[frame[column].isin(wanted)]
    shown = np.isfinite(frame[view.value].to_numpy(float)).any()
    return frame.reset_index(drop=True) if shown else frame.iloc[:0]


def _selected(result: Result, view: View) -> Result:
    """Only the entries that are selected, for a table of all may be large; nothing is left out if one is unknown."""
    data: Any = result.data
    for column, value in view.select.items():
        wanted = value if isinstance(value, tuple | list) else [value]
        if column in data.dims and (chosen := np.isin(data[column].values, list(wanted))).any():
            data = data.isel({column: chosen})
    return Result(data, result.meta, result.views)


def every(n: int, most: int) -> list[int]:
    """Indices of at most `most` of `n` ticks, evenly spaced, from the first."""
    steps = [s * 10**e for e in range(7) for s in (1, 2, 5)]
    return list(range(0, n, next((s for s in steps if n <= s * most), n)))


@dataclass(frozen=True)
class _Cells:
    """Rows of a table gathered into cells of a grid; what shares a cell is averaged."""

    frame: pd.DataFrame
    at: tuple[npt.NDArray[np.intp], ...]
    shape: tuple[int, ...]
    single: bool = field(init=False)
    """Whether no cell holds two rows: only then do intervals, q and text belong to a cell."""

    def __post_init__(self) -> None:
        counts = np.zeros(self.shape, int)
        np.add.at(counts, self.at, 1)
        object.__setattr__(self, "single", bool((counts <= 1).all()))

    def mean(self, column: str) -> Numbers:
        values = self.frame[column].to_numpy(float)
        ok = np.isfinite(values)
        where = tuple(a[ok] for a in self.at)
        sums, counts = np.zeros(self.shape), np.zeros(self.shape)
        np.add.at(sums, where, values[ok])
        np.add.at(counts, where, 1)
        return np.divide(sums, counts, out=np.full(self.shape, np.nan), where=counts > 0)

    def own(self, column: str) -> Numbers | None:
        """A column that cannot be averaged, or None."""
        return self.mean(column) if self.single and column in self.frame.columns else None

    def interval(self, view: View) -> tuple[Numbers, Numbers] | tuple[None, None]:
        """That of a view's value: ``ci_low`` and ``ci_high``, or under its own name where those are another's."""
        own = f"{view.value}_" if f"{view.value}_ci_low" in self.frame.columns else ""
        if not own and not view.interval:
            return None, None
        low, high = self.own(f"{own}ci_low"), self.own(f"{own}ci_high")
        return (None, None) if low is None or high is None else (low, high)


def _cells(frame: pd.DataFrame, *columns: str) -> tuple[_Cells, list[npt.NDArray[Any]]]:
    """The grid over some columns, and the entries along each: numbers sorted, names as they come."""
    at: list[npt.NDArray[np.intp]] = []
    entries: list[npt.NDArray[Any]] = []
    for column in columns:
        values = frame[column]
        codes, unique = pd.factorize(values, sort=pd.api.types.is_numeric_dtype(values))
        at.append(np.asarray(codes, dtype=np.intp))
        entries.append(np.asarray(unique))
    return _Cells(frame, tuple(at), tuple(len(e) for e in entries)), entries


def _heat(result: Result, frame: pd.DataFrame, view: View) -> Heat:
    assert view.y is not None
    cells, (y, x) = _cells(frame, view.y, view.x)
    return _of_cells(cells, y, x, view, *_texts(result, view, y, x))


def _texts(result: Result, view: View, y: npt.NDArray[Any], x: npt.NDArray[Any]) -> tuple[Any, Any]:
    """The labels of rows and columns."""
    return labels(result, view, view.y or "", view.y_text, y), labels(result, view, view.x, view.x_text, x)


def _heats(result: Result, frame: pd.DataFrame, view: View) -> Heats:
    """One panel for each entry of `by`, all over the same rows and columns."""
    assert view.y is not None and view.by is not None
    whole, (y, x, each) = _cells(frame, view.y, view.x, view.by)
    if len(each) > MOST_PANELS:
        raise OutputError(
            f"the heatmap {view.title!r} has a panel for each of {len(each)} entries of {view.by!r}, and at most"
            f" {MOST_PANELS} can be told apart; select some, or write another View"
        )
    texts = _texts(result, view, y, x)
    panels: list[Heat] = []
    for i, name in enumerate(_names(each)):
        mine = whole.at[2] == i
        rows_of_one: Any = frame[mine]
        cells = _Cells(rows_of_one, tuple(at[mine] for at in whole.at[:2]), whole.shape[:2])
        one = _of_cells(cells, y, x, view, *texts)
        title = f"{view.by} {name}" if np.issubdtype(each.dtype, np.number) else name
        panels.append(replace(one, title=title, colors=i if view.scale == "own" else None))
    notes = [one.note for one in panels if one.note]
    note = next(
        (note for note in notes if note.startswith("•")), notes[0] if notes else ""
    )  # the same in all with dots
    shared, own = view.scale == "shared", ""
    if shared:
        low, high = _limits(np.stack([one.values for one in panels]), view.center)
        panels = [replace(one, low=low, high=high) for one in panels]
    elif len(panels) > 1:
        own = "each panel has a scale of its own"
    title = view.title or f"{view.value} by {view.y} and {view.x}"
    return Heats(title, "; ".join(n for n in (note, own) if n), tuple(panels), shared)


def _of_cells(
    cells: _Cells,
    y: npt.NDArray[Any],
    x: npt.NDArray[Any],
    view: View,
    beside: tuple[str, ...] | None,
    below: tuple[str, ...] | None,
) -> Heat:
    assert view.y is not None
    values = cells.mean(view.value)
    low, high = _limits(values, view.center)
    q, chosen = cells.own("q"), cells.own(view.mark) if view.mark else None
    marked, note = None, ""
    if chosen is not None:
        marked = np.nan_to_num(chosen) > 0
        mark = view.mark.replace("_", " ") if view.mark else ""
        note = f"• {mark}" if marked.any() else f"no cell is {mark}"
    elif q is not None:
        marked = np.nan_to_num(q, nan=1.0) < ALPHA
        note = _dots(q, marked)
    text = None
    if view.text is not None and cells.single:
        text = np.full(cells.shape, "", dtype=object)
        text[cells.at] = cells.frame[view.text].astype(str).to_numpy(object)
    return Heat(
        title=view.title or f"{view.value} by {view.y} and {view.x}",
        note=note,
        label=view.unit or view.value,
        values=values,
        x=_names(x),
        y=_names(y),
        x_name=view.x.replace("_", " "),
        y_name=view.y.replace("_", " "),
        low=low,
        high=high,
        diverging=view.center is not None,
        upward=bool(np.issubdtype(y.dtype, np.number)) and beside is None,
        text=text,
        q=q,
        marked=marked,
        x_text=below,
        y_text=beside,
    )


def _check_labels(result: Result, view: View, axis: str, name: str) -> None:
    what, column = ("columns", view.x) if axis == "x" else ("rows", view.y)
    if view.kind != "heatmap":
        raise OutputError(
            f"the figure {view.title!r} has {axis}_text={name!r}, which labels heatmaps only; leave it out"
        )
    if name not in result.data.data_vars:
        have = ", ".join(str(n) for n in result.data.data_vars)
        raise OutputError(
            f"the figure {view.title!r} labels its {what} with {name!r}, and the result has {have}; correct its View"
        )
    dims = tuple(map(str, result.data[name].dims))
    if set(dims) not in ({column}, {column, "example"}):
        raise OutputError(
            f"the figure {view.title!r} labels its {what} with {name!r} over ({', '.join(dims)}); it must be"
            f" over (example, {column}) or ({column})"
        )


def labels(result: Result, view: View, column: str, name: str | None, x: npt.NDArray[Any]) -> tuple[str, ...] | None:
    """A label for each entry of a column: the text `name` that all examples have there, or its own name and "…"."""
    if name is None:
        return None
    texts: Any = result.data[name]
    if "example" in texts.dims:
        chosen = view.select.get("example")
        if chosen is not None:
            wanted = chosen if isinstance(chosen, tuple | list) else [chosen]
            texts = texts.isel(example=np.isin(texts["example"].values, wanted))
        texts = texts.transpose(column, "example")
    found = dict(zip(texts[column].values.tolist(), texts.values, strict=True))
    out: list[str] = []
    for entry, own in zip(x.tolist(), _names(x), strict=True):
        here = set(np.atleast_1d(found[entry]).tolist()) - {""}  # "" is the padding of shorter examples
        out.append(visible(str(here.pop()), LABEL_WIDTH) if len(here) == 1 else f"{own} …" if here else own)
    return tuple(out)


def _dots(q: Numbers, marked: npt.NDArray[np.bool_]) -> str:
    if not marked.any():
        return "no cell is significant (q < .05)" if np.isfinite(q).any() else "too few examples to test"
    return "• q < .05; no dot: not significant"


def _limits(values: Numbers, center: float | None) -> tuple[float, float]:
    finite = values[np.isfinite(values)]
    if not finite.size:  # one panel among others
        return (-1.0 + (center or 0.0), 1.0 + (center or 0.0)) if center is not None else (0.0, 1.0)
    if center is not None:
        reach = float(np.abs(finite - center).max()) or 1.0
        return center - reach, center + reach
    low, high = float(finite.min()), float(finite.max())
    low = 0.0 if low > 0 else low  # amounts start at nothing
    return low, high if high > low else low + 1.0


def _lines(frame: pd.DataFrame, view: View) -> Lines:
    numeric = pd.api.types.is_numeric_dtype(frame[view.x])
    names: tuple[str, ...] = () if numeric else _names(list(frame[view.x].unique()))
    groups = [("", frame)] if view.by is None else [(str(k), g) for k, g in frame.groupby(view.by, sort=False)]
    series: list[Series] = []
    for name, group in groups:
        cells, (x,) = _cells(group, view.x)
        values, (low, high) = cells.mean(view.value), cells.interval(view)
        ok = np.isfinite(values)
        ends = (None, None) if low is None or high is None else (low[ok], high[ok])
        series.append(Series(name, x[ok] if numeric else np.array(_names(x), dtype=object)[ok], values[ok], *ends))
    band = any(s.low is not None for s in series)
    joined = view.x == "site" and _in_depth(names)
    return Lines(
        title=view.title or f"{view.value} by {view.x}",
        note=("whiskers: 95% interval" if names and not joined else "band and whiskers: 95% interval") if band else "",
        label=view.unit or view.value,
        x_name=view.x.replace("_", " "),
        x=names,
        series=tuple(series),
        log=view.log and not names,
        joined=joined,
    )


def _in_depth(names: Sequence[str]) -> bool:
    """Whether sites follow each other through the model: those of one kind, or of the residual stream."""
    kinds = {"resid" if name.startswith("resid_") else name.split(".")[0] for name in names}
    return len(kinds) == 1 and len(names) > 1


def _bars(frame: pd.DataFrame, view: View) -> Bars:
    cells, (x,) = _cells(frame, view.x)
    values, (low, high), q = cells.mean(view.value), cells.interval(view), cells.own("q")
    center = view.center or 0.0
    order = np.argsort(-np.nan_to_num(np.abs(values - center)), kind="stable")
    order = order[np.isfinite(values[order])][:LARGEST]
    of = f"largest {len(order)} of {len(x)}" if len(order) < len(x) else ""
    if q is not None and not np.isfinite(q).any():  # too few examples for any test
        q = None
    solid = np.ones(len(x), bool) if q is None else np.nan_to_num(q, nan=1.0) < ALPHA
    pale = "" if q is None else "pale: q ≥ .05"
    if view.mark and (marked := cells.own(view.mark)) is not None:
        solid, mark = np.nan_to_num(marked) > 0, view.mark.replace("_", " ")
        pale = f"dark: {mark}" if solid.any() else f"dark: {mark} (none)"
    notes = [
        of,
        f"bars begin at {center:g}" if center else "",
        "" if low is None else "whiskers: 95% interval",
        pale,
    ]
    return Bars(
        title=view.title or f"{view.value} by {view.x}",
        note="; ".join(n for n in notes if n),
        label=view.unit or view.value,
        names=tuple(_names(x)[i] for i in order),
        values=values[order],
        solid=solid[order],
        low=None if low is None else low[order],
        high=None if high is None else high[order],
        center=center,
    )


def _names(entries: Sequence[Any] | npt.NDArray[Any]) -> tuple[str, ...]:
    """Labels of an axis, each of its own (the number 1 and the name "1" would else share a place)."""
    out: dict[str, None] = {}  # in order, and found at once among many
    for entry in entries:
        name = visible(str(entry), 24)
        while name in out:
            name += "′"
        out[name] = None
    return tuple(out)
