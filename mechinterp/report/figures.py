"""A view of a result as a figure: interactive with plotly, or for files with matplotlib (no browser, no pyplot)."""

import functools
import html
import math
import textwrap
from typing import Any

import matplotlib
import numpy as np
import plotly.graph_objects as go
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from mechinterp.core.result import Result, View
from mechinterp.report.panels import TEXT_COLUMNS, Bars, Heat, Lines, Numbers, every, panel

# Okabe & Ito (2008): eight colours that people with any kind of colour vision tell apart.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
DIVERGING, SEQUENTIAL = "RdBu_r", "Blues"
MISSING = "#e4e4e4"
PALE = 0.4
FONT = "system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', Arial, sans-serif"


def plotly_figure(result: Result, view: View) -> go.Figure:
    """One view of a result as a plotly figure. Text from tokens is escaped.

    Raises:
        OutputError: the view does not fit the result.
    """
    shown = panel(result, view)
    figure = go.Figure()
    if isinstance(shown, Heat):
        size = _plotly_heat(figure, shown)
    elif isinstance(shown, Lines):
        size = _plotly_lines(figure, shown)
    else:
        size = _plotly_bars(figure, shown)
    width, height = size
    title = "<br>".join(html.escape(t, quote=False) for t in textwrap.wrap(shown.title, max(24, width // 9)))
    figure.update_layout(
        template="plotly_white",
        width=width,
        height=height + 18 * title.count("<br>"),
        margin={"l": 60, "r": 20, "t": 74 + 18 * title.count("<br>"), "b": 50},
        font={"family": FONT, "size": 12, "color": "#222"},
        title={
            "text": f"<b>{title}</b>",
            "x": 0,
            "xref": "container",
            "xanchor": "left",
            "font": {"size": 15},
            "pad": {"l": 10},
            "subtitle": {"text": _plain(shown.note), "font": {"size": 12, "color": "#666"}},
        },
        hoverlabel={"font": {"family": FONT}},
    )
    return figure


def matplotlib_figure(result: Result, view: View) -> Figure:
    """The same view as a matplotlib figure of its own, drawn by Agg; ``savefig`` writes PNG, SVG or PDF.

    Raises:
        OutputError: the view does not fit the result.
    """
    shown = panel(result, view)
    width, height = _inches(shown)
    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axes: Axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if isinstance(shown, Heat):
        _matplotlib_heat(figure, axes, shown)
    elif isinstance(shown, Lines):
        _matplotlib_lines(axes, shown)
    else:
        _matplotlib_bars(axes, shown)
    title = textwrap.fill(shown.title, max(24, int(width * 10)))
    note = textwrap.fill(shown.note, max(24, int(width * 13)))
    axes.set_title(
        title, loc="left", fontsize=10.5, fontweight="bold", pad=8 + 12 * (note.count("\n") + 1) * bool(note)
    )
    if note:
        axes.annotate(
            note, (0, 1), (0, 5), xycoords="axes fraction", textcoords="offset points", fontsize=8, color="#666666"
        )
    axes.tick_params(labelsize=8, length=2.5, color="#888888")
    texts: list[Any] = figure.findobj(Text)
    for text in texts:
        text.set_parse_math(False)  # a token such as "$" is no formula
        text.set_text(drawable(text.get_text()))
    return figure


def drawable(text: str) -> str:
    """`text` with a box for every character that matplotlib's default font lacks."""
    return text if text.isascii() else "".join(c if ord(c) in _glyphs() or c == "\n" else "□" for c in text)


@functools.cache
def _glyphs() -> frozenset[int]:
    return frozenset(get_font(findfont(FontProperties())).get_charmap())


def _plain(text: str) -> str:
    """Plotly reads a little HTML in labels; quotes it leaves alone."""
    return html.escape(text, quote=False)


def _plotly_heat(figure: go.Figure, heat: Heat) -> tuple[int, int]:
    x, y = [_plain(n) for n in heat.x], [_plain(n) for n in heat.y]
    written = heat.cell_text
    hover = f"{_plain(heat.y_name)} %{{y}}<br>{_plain(heat.x_name)} %{{x}}<br>{_plain(heat.label)} %{{z:.4g}}"
    extra: list[Any] = []
    if heat.text is not None:
        escape = np.vectorize(lambda t: _plain(f"“{t}”" if t.isprintable() else repr(t)), otypes=[object])
        extra.append(escape(heat.text))
        hover += "<br>%{customdata[0]}"
    if heat.q is not None:
        hover += f"<br>q %{{customdata[{len(extra)}]:.2g}}"
        extra.append(heat.q.astype(object))
    figure.add_heatmap(
        z=heat.values,
        x=x,
        y=y,
        zmin=heat.low,
        zmax=heat.high,
        colorscale=DIVERGING if heat.diverging else SEQUENTIAL,
        xgap=0.5 if len(x) <= TEXT_COLUMNS else 0,
        ygap=0.5 if len(y) <= 2 * TEXT_COLUMNS else 0,
        text=np.vectorize(_plain, otypes=[object])(written),
        texttemplate="%{text}" if any(written.ravel()) else None,
        textfont={"size": 8.5 if heat.text is not None else 11},
        customdata=np.stack(extra, -1) if extra else None,
        hovertemplate=hover + "<extra></extra>",
        hoverongaps=False,
        colorbar={"title": {"text": f" <br>{_plain(heat.label)}", "side": "right"}, "thickness": 12, "outlinewidth": 0},
    )
    for axis, names, title, most in (("xaxis", x, heat.x_name, 48), ("yaxis", y, heat.y_name, 40)):
        ticks = every(len(names), most)
        figure.layout[axis].update(
            type="category", title=_plain(title), showgrid=False, ticks="", zeroline=False,
            tickmode="array", tickvals=ticks, ticktext=[names[i] for i in ticks], tickfont={"size": 10},
        )  # fmt: skip
    figure.update_yaxes(autorange=True if heat.upward else "reversed", automargin=True)
    figure.update_xaxes(automargin=True)
    figure.update_layout(plot_bgcolor=MISSING)
    wide = heat.text is not None and len(x) <= TEXT_COLUMNS
    return _between(len(x) * (34 if wide else 30) + 150, 440, 1180), _between(len(y) * 17 + 130, 300, 900)


def _plotly_lines(figure: go.Figure, lines: Lines) -> tuple[int, int]:
    for line, color in zip(lines.series, _colors(len(lines.series)), strict=True):
        x = [_plain(str(v)) for v in line.x] if lines.x else line.x
        if line.low is not None and line.high is not None and not lines.x:
            figure.add_scatter(
                x=[*x, *list(x)[::-1]], y=[*line.high, *line.low[::-1]], fill="toself", fillcolor=_rgba(color, 0.2),
                line={"width": 0}, hoverinfo="skip", showlegend=False, mode="lines",
            )  # fmt: skip
        hover = f"{_plain(lines.x_name)} %{{x}}<br>{_plain(lines.label)} %{{y:.4g}}<extra>{_plain(line.name)}</extra>"
        figure.add_scatter(
            x=x, y=line.values, name=_plain(line.name), mode="markers" if lines.x else "lines+markers",
            hovertemplate=hover, line={"color": color, "width": 2},
            marker={"size": 9 if lines.x else 5, "color": color},
            error_y=_whiskers(line.values, line.low, line.high, color),
        )  # fmt: skip
    figure.update_xaxes(
        title=_plain(lines.x_name), type="category" if lines.x else None, showgrid=False, ticks="outside"
    )
    if lines.x:
        figure.update_xaxes(categoryorder="array", categoryarray=[_plain(n) for n in lines.x])
    figure.update_yaxes(title=_plain(lines.label), zerolinecolor="#bbb", rangemode="tozero")
    figure.update_layout(showlegend=len(lines.series) > 1)
    return 640, 400


def _plotly_bars(figure: go.Figure, bars: Bars) -> tuple[int, int]:
    colors = [_rgba(PALETTE[0], 1.0 if solid else PALE) for solid in bars.solid]
    figure.add_bar(
        x=bars.values, y=[_plain(n) for n in bars.names], orientation="h", marker={"color": colors},
        error_x=_whiskers(bars.values, bars.low, bars.high, "#333333"),
        hovertemplate=f"%{{y}}<br>{_plain(bars.label)} %{{x:.4g}}<extra></extra>",
    )  # fmt: skip
    figure.update_yaxes(type="category", autorange="reversed", automargin=True, showgrid=False)
    figure.update_xaxes(title=_plain(bars.label), zerolinecolor="#888")
    return 560, 130 + 24 * len(bars.names)


def _whiskers(values: Numbers, low: Numbers | None, high: Numbers | None, color: str) -> dict[str, Any] | None:
    if low is None or high is None:
        return None
    ends = {"array": high - values, "arrayminus": values - low}
    return {"type": "data", "symmetric": False, **ends, "thickness": 1, "width": 2, "color": color}


def _matplotlib_heat(figure: Figure, axes: Axes, heat: Heat) -> None:
    colors = matplotlib.colormaps[DIVERGING if heat.diverging else SEQUENTIAL].copy()
    many = heat.values.size > 10_000
    mesh = axes.pcolormesh(
        np.ma.masked_invalid(heat.values), cmap=colors, vmin=heat.low, vmax=heat.high,
        edgecolors="none" if many else "white", linewidth=0 if many else 0.4, rasterized=many,
    )  # fmt: skip
    axes.set_facecolor(MISSING)
    for spine in axes.spines.values():
        spine.set_visible(False)
    written = heat.cell_text
    for row, column in np.argwhere(written != ""):
        red, green, blue, _ = colors((heat.values[row, column] - heat.low) / (heat.high - heat.low))
        axes.text(
            column + 0.5, row + 0.5, str(written[row, column]), ha="center", va="center",
            fontsize=5.5 if heat.text is not None else 7,
            color="white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.55 else "#222222",
        )  # fmt: skip
    x, y = every(len(heat.x), 48), every(len(heat.y), 40)
    slanted = max(len(heat.x[i]) for i in x) > 3
    axes.set_xticks(
        [i + 0.5 for i in x], [heat.x[i] for i in x], rotation=45 if slanted else 0, ha="right" if slanted else "center"
    )
    axes.set_yticks([i + 0.5 for i in y], [heat.y[i] for i in y])
    if not heat.upward:
        axes.invert_yaxis()
    axes.set_xlabel(heat.x_name, fontsize=9)
    axes.set_ylabel(heat.y_name, fontsize=9)
    bar = figure.colorbar(mesh, ax=axes, fraction=0.05, pad=0.02, aspect=30)
    bar.set_label(heat.label, fontsize=9)
    bar.ax.tick_params(labelsize=8, length=2)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]  # a Spine, which matplotlib's stub calls a method


def _matplotlib_lines(axes: Axes, lines: Lines) -> None:
    places = {name: i for i, name in enumerate(lines.x)}
    for i, (line, color) in enumerate(zip(lines.series, _colors(len(lines.series)), strict=True)):
        x = np.array([places[v] for v in line.x]) if lines.x else line.x
        if lines.x:  # categories have nothing between them: points, side by side
            x = x + 0.1 * (i - (len(lines.series) - 1) / 2)
        if line.low is not None and line.high is not None:
            if not lines.x:
                axes.fill_between(x, line.low, line.high, color=color, alpha=0.2, linewidth=0)
            # a band is invisible where a line is steep
            axes.vlines(x, line.low, line.high, color=color, linewidth=1.4 if lines.x else 0.8)
        size, width = (5.0, 0.0) if lines.x else (2.8, 1.6)
        axes.plot(x, line.values, color=color, marker="o", markersize=size, linewidth=width, label=drawable(line.name))
    if lines.x:
        axes.set_xticks(range(len(lines.x)), list(lines.x))
        axes.set_xlim(-0.5, len(lines.x) - 0.5)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xmargin(0.02)
    if all((s.values >= 0).all() for s in lines.series):
        axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_xlabel(lines.x_name, fontsize=9)
    axes.set_ylabel(lines.label, fontsize=9)
    if len(lines.series) > 1:
        axes.legend(fontsize=8, frameon=False)


def _matplotlib_bars(axes: Axes, bars: Bars) -> None:
    places = np.arange(len(bars.names))
    colors = [(*to_rgb(PALETTE[0]), 1.0 if solid else PALE) for solid in bars.solid]
    axes.barh(places, bars.values, color=colors, height=0.72)
    if bars.low is not None and bars.high is not None:
        axes.hlines(places, bars.low, bars.high, color="#ffffff", linewidth=2.6)  # seen on the bar too
        axes.hlines(places, bars.low, bars.high, color="#333333", linewidth=1)
    axes.axvline(0, color="#888888", linewidth=0.8)
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_yticks(places, list(bars.names))
    axes.invert_yaxis()
    axes.set_xlabel(bars.label, fontsize=9)


def _inches(shown: Heat | Lines | Bars) -> tuple[float, float]:
    if isinstance(shown, Heat):
        wide = shown.text is not None and len(shown.x) <= TEXT_COLUMNS
        width = len(shown.x) * (0.4 if wide else 0.3) + 1.6
        return min(max(width, 4.6), 17.0), min(max(len(shown.y) * 0.18 + 1.2, 2.6), 11.0)
    return (6.4, 3.8) if isinstance(shown, Lines) else (5.6, 1.2 + 0.25 * len(shown.names))


def _between(value: int, low: int, high: int) -> int:
    return max(low, min(high, value))


def _colors(n: int) -> list[str]:
    """One colour a line; more lines than the palette has are spread over viridis."""
    if n <= len(PALETTE):
        return list(PALETTE[:n])
    scale = matplotlib.colormaps["viridis"]
    return [to_hex(scale(i / math.nextafter(n - 1, n))) for i in range(n)]


def _rgba(color: str, alpha: float) -> str:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"
