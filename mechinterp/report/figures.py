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
from matplotlib.collections import QuadMesh
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from mechinterp.core.result import Result, View
from mechinterp.report.panels import AXIS_WIDTH, TEXT_COLUMNS, Bars, Heat, Heats, Lines, Numbers, Panel, every, panel

# Okabe & Ito (2008): eight colours that people with any kind of colour vision tell apart.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
DIVERGING, SEQUENTIAL = "RdBu_r", "Blues"
OWN_DIVERGING, OWN_SEQUENTIAL = ("PuOr", "PRGn", "RdBu_r", "BrBG_r"), ("Purples", "Greens", "Reds", "Oranges")
"""Of panels side by side with scales of their own; what is large is of one colour in both."""
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
    elif isinstance(shown, Heats):
        size = _plotly_heats(figure, shown)
    elif isinstance(shown, Lines):
        size = _plotly_lines(figure, shown)
    else:
        size = _plotly_bars(figure, shown)
    width, height = size
    title = "<br>".join(html.escape(t, quote=False) for t in _wrapped(shown.title, max(24, width // 9)))
    figure.update_layout(
        template="plotly_white",
        width=width,
        height=height + 18 * title.count("<br>"),
        margin={"l": 60, "r": 20, "t": 74 + 22 * isinstance(shown, Heats) + 18 * title.count("<br>"), "b": 50},
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
    all_axes: list[Axes] = list(figure.subplots(1, _count(shown), sharey=True, squeeze=False)[0])
    axes = all_axes[0]
    for one in all_axes:
        for side in ("top", "right"):
            one.spines[side].set_visible(False)
    if isinstance(shown, Heat):
        _matplotlib_heat(figure, axes, shown)
    elif isinstance(shown, Heats):
        _matplotlib_heats(figure, all_axes, shown)
    elif isinstance(shown, Lines):
        _matplotlib_lines(axes, shown)
    else:
        _matplotlib_bars(axes, shown)
    if isinstance(shown, Bars):
        width -= 0.07 * max(map(len, shown.names))  # the title starts right of the names
    title = "\n".join(_wrapped(shown.title, max(24, int(width * 10))))
    note = textwrap.fill(shown.note, max(24, int(width * 13)))
    lines = (note.count("\n") + 1) * bool(note)
    if isinstance(shown, Heats):  # above all panels: a title of the first would widen it
        left, inches = 0.08 / width, (title.count("\n") + 1) * 10.5 * 1.25 / 72 + 0.05
        figure.suptitle(title + "\n" * lines, x=left, ha="left", fontsize=10.5, fontweight="bold")
        figure.text(left, 1 - inches / height, note, fontsize=8, color="#666666", va="top").set_in_layout(False)
    else:
        axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold", pad=8 + 12 * lines)
        if note:
            axes.annotate(
                note, (0, 1), (0, 5), xycoords="axes fraction", textcoords="offset points", fontsize=8, color="#666666"
            )
    for one in all_axes:
        one.tick_params(labelsize=8, length=2.5, color="#888888")
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
    _plotly_mesh(figure, heat)
    figure.update_layout(plot_bgcolor=MISSING)
    return _between(_pixels(heat) + 150, 440, 1180), _between(len(heat.y) * 17 + 130, 300, 900) + _below(heat)


def _plotly_heats(figure: go.Figure, heats: Heats) -> tuple[int, int]:
    """Side by side; a colour bar right of each panel, or of the last."""
    first, n = heats.panels[0], len(heats.panels)
    gap, last = (26, 90) if heats.shared else (88, 90)  # room for a colour bar
    each = _between(_pixels(first), 180, max(180, (1100 - last - (n - 1) * gap) // n))
    inside = n * each + (n - 1) * gap + last
    for i, heat in enumerate(heats.panels):
        start, stop = (i * (each + gap)) / inside, (i * (each + gap) + each) / inside
        bar = None if heats.shared and i < n - 1 else stop + 8 / inside
        _plotly_mesh(figure, heat, i, (start, stop), bar)
        figure.add_annotation(
            x=(start + stop) / 2, y=1, xref="paper", yref="paper", text=_plain(heat.title), showarrow=False,
            xanchor="center", yanchor="bottom", yshift=3, font={"size": 13},
        )  # fmt: skip
    figure.update_layout(plot_bgcolor=MISSING)
    return inside + 80, _between(len(first.y) * 17 + 152, 320, 920) + _below(first)


def _plotly_mesh(
    figure: go.Figure,
    heat: Heat,
    number: int = 0,
    across: tuple[float, float] | None = None,
    bar: float | None = 1.02,
) -> None:
    """The cells and axes of one heatmap.

    Args:
        number: of the panel.
        across: from where to where it reaches, as fractions of the width.
        bar: where its colour bar is; None for none.
    """
    x, y = [_plain(n) for n in heat.x], [_plain(n) for n in heat.y]
    written = heat.cell_text
    hover = f"{_plain(heat.y_name)} %{{y}}"
    extra: list[Any] = []
    if heat.y_text is not None:
        beside = np.array([_plain(t) for t in heat.y_text], dtype=object)[:, None]
        extra.append(np.broadcast_to(beside, heat.values.shape))
        hover += " (%{customdata[0]})"
    hover += f"<br>{_plain(heat.x_name)} %{{x}}"
    if heat.x_text is not None:
        hover += f" (%{{customdata[{len(extra)}]}})"
        extra.append(np.broadcast_to(np.array([_plain(t) for t in heat.x_text], dtype=object), heat.values.shape))
    hover += f"<br>{_plain(heat.label)} %{{z:.4g}}"
    if heat.text is not None:
        escape = np.vectorize(lambda t: _plain(f"“{t}”" if t.isprintable() else repr(t)), otypes=[object])
        hover += f"<br>%{{customdata[{len(extra)}]}}"
        extra.append(escape(heat.text))
    if heat.q is not None:
        hover += f"<br>q %{{customdata[{len(extra)}]:.2g}}"
        extra.append(heat.q.astype(object))
    ends = ("" if number == 0 else str(number + 1)) if across else ""
    figure.add_heatmap(
        z=heat.values,
        x=x,
        y=y,
        xaxis=f"x{ends}",
        yaxis=f"y{ends}",
        zmin=heat.low,
        zmax=heat.high,
        colorscale=_scale(heat),
        showscale=bar is not None,
        xgap=0.5 if len(x) <= TEXT_COLUMNS else 0,
        ygap=0.5 if len(y) <= 2 * TEXT_COLUMNS else 0,
        text=np.vectorize(_plain, otypes=[object])(written),
        texttemplate="%{text}" if any(written.ravel()) else None,
        textfont={"size": 8.5 if heat.text is not None else 11},
        customdata=np.stack(extra, -1) if extra else None,
        hovertemplate=hover + "<extra></extra>",
        hoverongaps=False,
        colorbar={
            "title": {"text": f" <br>{_plain(heat.label)}", "side": "right"},
            "dtick": _step(heat.values),
            "thickness": 12,
            "outlinewidth": 0,
            **({"x": bar, "xanchor": "left", "xpad": 0} if across else {}),
        },
    )
    below = x if heat.x_text is None else [_plain(t) for t in heat.x_text]
    beside = y if heat.y_text is None else [_plain(t) for t in heat.y_text]
    # Ticks are at categories by name: a number would be looked for among the names first.
    for axis, at, names, title in (("xaxis", x, below, heat.x_name), ("yaxis", y, beside, heat.y_name)):
        ticks = every(len(names), 48)
        figure.update_layout(
            {axis + ends: {
                "type": "category", "title": _plain(title), "showgrid": False, "ticks": "", "zeroline": False,
                "automargin": True, "tickmode": "array", "tickvals": [at[i] for i in ticks],
                "ticktext": [names[i] for i in ticks], "tickfont": {"size": 10},
            }}
        )  # fmt: skip
    figure.layout["yaxis" + ends].update(autorange=True if heat.upward else "reversed", anchor=f"x{ends}")
    figure.layout["xaxis" + ends].update(anchor=f"y{ends}", tickangle=None if heat.x_text is None else -45)
    if across:
        figure.layout["xaxis" + ends].update(domain=list(across))
        if number:
            figure.layout["yaxis" + ends].update(matches="y", showticklabels=False, title=None)


def _scale(heat: Heat) -> str:
    own = OWN_DIVERGING if heat.diverging else OWN_SEQUENTIAL
    usual = DIVERGING if heat.diverging else SEQUENTIAL
    return usual if heat.colors is None else own[heat.colors % len(own)]


def _pixels(heat: Heat) -> int:
    """The width that the columns want."""
    if heat.text is not None and len(heat.x) <= TEXT_COLUMNS:
        return len(heat.x) * 34
    return len(heat.x) * (30 if heat.x_text is None else 22)


def _below(heat: Heat) -> int:
    """Height of slanted labels."""
    return 0 if heat.x_text is None else 5 * max(map(len, heat.x_text))


def _plotly_lines(figure: go.Figure, lines: Lines) -> tuple[int, int]:
    for line, color in zip(lines.series, _colors(len(lines.series)), strict=True):
        x = [_plain(str(v)) for v in line.x] if lines.x else line.x
        points = bool(lines.x) and not lines.joined
        if line.low is not None and line.high is not None and not points:
            figure.add_scatter(
                x=[*x, *list(x)[::-1]], y=[*line.high, *line.low[::-1]], fill="toself", fillcolor=_rgba(color, 0.2),
                line={"width": 0}, hoverinfo="skip", showlegend=False, mode="lines",
            )  # fmt: skip
        hover = f"{_plain(lines.x_name)} %{{x}}<br>{_plain(lines.label)} %{{y:.4g}}<extra>{_plain(line.name)}</extra>"
        figure.add_scatter(
            x=x, y=line.values, name=_plain(line.name), mode="markers" if points else "lines+markers",
            hovertemplate=hover, line={"color": color, "width": 2},
            marker={"size": 9 if points else 5, "color": color},
            error_y=_whiskers(line.values, line.low, line.high, color),
        )  # fmt: skip
    figure.update_xaxes(
        title=_plain(lines.x_name), type="category" if lines.x else None, showgrid=False, ticks="outside"
    )
    if lines.log:
        figure.update_xaxes(type="log", dtick=1)
    if lines.x:
        names = [_plain(name) for name in lines.x]
        figure.update_xaxes(categoryorder="array", categoryarray=names, automargin=True)
        if lines.joined:
            shown = [names[i] for i in lines.ticks]
            angle = -40 if _crowded(lines) else 0
            figure.update_xaxes(tickmode="array", tickvals=shown, ticktext=shown, tickangle=angle)
    figure.update_yaxes(title=_plain(lines.label), zerolinecolor="#bbb", rangemode="tozero")
    figure.update_layout(showlegend=len(lines.series) > 1)
    return 640, 400


def _crowded(lines: Lines) -> bool:
    """Whether the names below the axis, side by side, are wider than it is."""
    return sum(len(lines.x[i]) + 1 for i in lines.ticks) > AXIS_WIDTH


def _plotly_bars(figure: go.Figure, bars: Bars) -> tuple[int, int]:
    colors = [_rgba(PALETTE[0], 1.0 if solid else PALE) for solid in bars.solid]
    figure.add_bar(
        x=bars.values - bars.center, base=bars.center, y=[_plain(n) for n in bars.names], orientation="h",
        marker={"color": colors},
        error_x=_whiskers(bars.values, bars.low, bars.high, "#333333"),
        customdata=bars.values, hovertemplate=f"%{{y}}<br>{_plain(bars.label)} %{{customdata:.4g}}<extra></extra>",
    )  # fmt: skip
    figure.update_yaxes(type="category", autorange="reversed", automargin=True, showgrid=False)
    step = _step(bars.values, bars.low)
    figure.update_xaxes(title=_plain(bars.label), zerolinecolor="#888", dtick=step)
    return 560, 130 + 24 * len(bars.names)


def _whiskers(values: Numbers, low: Numbers | None, high: Numbers | None, color: str) -> dict[str, Any] | None:
    if low is None or high is None:
        return None
    ends = {"array": high - values, "arrayminus": values - low}
    return {"type": "data", "symmetric": False, **ends, "thickness": 1, "width": 2, "color": color}


def _matplotlib_heat(figure: Figure, axes: Axes, heat: Heat) -> None:
    _bar(figure, axes, _matplotlib_mesh(axes, heat), heat)


def _matplotlib_heats(figure: Figure, all_axes: list[Axes], heats: Heats) -> None:
    """Side by side; a colour bar right of each panel, or one of all."""
    for i, (axes, heat) in enumerate(zip(all_axes, heats.panels, strict=True)):
        mesh = _matplotlib_mesh(axes, heat)
        axes.set_title(heat.title, fontsize=9.5, pad=5)
        if i:
            axes.set_ylabel("")
            axes.tick_params(axis="y", left=False, labelleft=False)
        if not heats.shared:
            _bar(figure, axes, mesh, heat)
        elif i == len(all_axes) - 1:
            _bar(figure, all_axes, mesh, heat)
    if not heats.panels[0].upward:
        all_axes[0].set_ylim(len(heats.panels[0].y), 0)  # shared, and turned once for all


def _bar(figure: Figure, axes: Axes | list[Axes], mesh: QuadMesh, heat: Heat) -> None:
    share = 0.05 if isinstance(axes, Axes) else 0.02
    bar = figure.colorbar(mesh, ax=axes, fraction=share, pad=0.02, aspect=max(15.0, 7 * figure.get_figheight()))
    if _whole(heat.values):
        bar.locator = MaxNLocator(integer=True)
    bar.set_label(heat.label, fontsize=9)
    bar.ax.tick_params(labelsize=8, length=2)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]  # a Spine, which matplotlib's stub calls a method


def _matplotlib_mesh(axes: Axes, heat: Heat) -> QuadMesh:
    """The cells and axes of one heatmap."""
    colors = matplotlib.colormaps[_scale(heat)].copy()
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
    below = heat.x if heat.x_text is None else heat.x_text
    x, y = every(len(below), 48), every(len(heat.y), 48)
    slanted = heat.x_text is not None or max(len(below[i]) for i in x) > 3
    axes.set_xticks(
        [i + 0.5 for i in x], [drawable(below[i]) for i in x], rotation=45 if slanted else 0,
        ha="right" if slanted else "center", rotation_mode="anchor" if slanted else "default",
    )  # fmt: skip
    beside = heat.y if heat.y_text is None else heat.y_text
    axes.set_yticks([i + 0.5 for i in y], [drawable(beside[i]) for i in y])
    if not heat.upward:
        axes.set_ylim(len(heat.y), 0)
    axes.set_xlabel(heat.x_name, fontsize=9)
    axes.set_ylabel(heat.y_name, fontsize=9)
    return mesh


def _matplotlib_lines(axes: Axes, lines: Lines) -> None:
    places = {name: i for i, name in enumerate(lines.x)}
    points = bool(lines.x) and not lines.joined
    for i, (line, color) in enumerate(zip(lines.series, _colors(len(lines.series)), strict=True)):
        x = np.array([places[v] for v in line.x]) if lines.x else line.x
        if points:  # categories have nothing between them: points, side by side
            x = x + 0.1 * (i - (len(lines.series) - 1) / 2)
        if line.low is not None and line.high is not None:
            if not points:
                axes.fill_between(x, line.low, line.high, color=color, alpha=0.2, linewidth=0)
            # a band is invisible where a line is steep
            axes.vlines(x, line.low, line.high, color=color, linewidth=1.4 if points else 0.8)
        size, width = (5.0, 0.0) if points else (2.8, 1.6)
        axes.plot(x, line.values, color=color, marker="o", markersize=size, linewidth=width, label=drawable(line.name))
    if lines.x:
        slanted: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
        turned = slanted if _crowded(lines) else {}
        axes.set_xticks(lines.ticks, [drawable(lines.x[i]) for i in lines.ticks], **turned)
        axes.set_xlim(-0.5, len(lines.x) - 0.5)
    elif lines.log:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")  # powers would be written as mathematics
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
    axes.barh(places, bars.values - bars.center, left=bars.center, color=colors, height=0.72)
    if bars.low is not None and bars.high is not None:
        axes.hlines(places, bars.low, bars.high, color="#ffffff", linewidth=2.6)  # seen on the bar too
        axes.hlines(places, bars.low, bars.high, color="#333333", linewidth=1)
    axes.axvline(bars.center, color="#888888", linewidth=0.8)
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    if _whole(bars.values, bars.low):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_yticks(places, [drawable(name) for name in bars.names])  # ticks are set anew when drawn
    axes.invert_yaxis()
    axes.set_xlabel(bars.label, fontsize=9)


def _inches(shown: Panel) -> tuple[float, float]:
    if isinstance(shown, Heat):
        return min(max(_columns(shown) + 1.6, 4.6), 17.0), _rows(shown)
    if isinstance(shown, Heats):
        one, n = shown.panels[0], _count(shown)
        each = min(max(_columns(one), 2.2), 6.5) + (0.2 if shown.shared else 0.9)
        return min(n * each + (1.6 if shown.shared else 0.9), 24.0), _rows(one) + 0.3
    return (6.4, 3.8) if isinstance(shown, Lines) else (5.6, 1.2 + 0.25 * len(shown.names))


def _columns(heat: Heat) -> float:
    """The width that the columns want."""
    if heat.text is not None and len(heat.x) <= TEXT_COLUMNS:
        return len(heat.x) * 0.4
    return len(heat.x) * (0.3 if heat.x_text is None else 0.22)


def _rows(heat: Heat) -> float:
    below = max(map(len, heat.x if heat.x_text is None else heat.x_text), default=0)
    labels = 0.0 if heat.x_text is None and below <= 3 else 0.045 * below
    bar = 0.075 * len(heat.label)  # its colour bar is as high as the cells
    return min(max(max(len(heat.y) * 0.18, bar) + 1.2 + labels, 2.6), 11.0)


def _count(shown: Panel) -> int:
    return len(shown.panels) if isinstance(shown, Heats) else 1


def _between(value: int, low: int, high: int) -> int:
    return max(low, min(high, value))


def _wrapped(title: str, width: int) -> list[str]:
    """Lines of a title; what is subtracted or leads to something stays on one line with it."""
    glued = title.replace(" - ", "\xa0-\xa0").replace(" → ", "\xa0→\xa0")
    return [line.replace("\xa0", " ") for line in textwrap.wrap(glued, width)]


def _whole(values: Numbers, low: Numbers | None = None) -> bool:
    """Whether these are counts or numbers of something, whose axis has no halves."""
    known = values[np.isfinite(values)]
    return low is None and bool(len(known)) and bool((known == np.round(known)).all())


def _step(values: Numbers, low: Numbers | None = None) -> int | None:
    """Between the ticks of few whole numbers: one; None where plotly chooses well by itself."""
    return 1 if _whole(values, low) and np.nanmax(np.abs(values)) <= 10 else None


def _colors(n: int) -> list[str]:
    """One colour a line; more lines than the palette has are spread over viridis."""
    if n <= len(PALETTE):
        return list(PALETTE[:n])
    scale = matplotlib.colormaps["viridis"]
    return [to_hex(scale(i / math.nextafter(n - 1, n))) for i in range(n)]


def _rgba(color: str, alpha: float) -> str:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"
