"""The figure of a `Flow`."""

import html
import textwrap
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from mechinterp.analyzers.tracing import EARLIER, ROLES, START
from mechinterp.report.figures import DIVERGING, FONT, PALETTE

if TYPE_CHECKING:
    from mechinterp.studies.flow import Flow

SHORT = {
    START: "first<br>token",
    EARLIER: "earlier<br>tokens",
    ROLES[0]: "first<br>subject token",
    ROLES[1]: "middle<br>subject tokens",
    ROLES[2]: "last<br>subject token",
    ROLES[3]: "first<br>subsequent token",
    ROLES[4]: "further<br>tokens",
    ROLES[5]: "last<br>token",
}

COLOR = {role: PALETTE[i % len(PALETTE)] for i, role in enumerate(SHORT)}
ALONG = 0.55
"""Where on an arrow its number stands."""
CLEAR = 0.25
"""Of a column's dots, in columns."""


def flow_figure(flow: "Flow") -> go.Figure:
    """Dots for states, arrows for attention; layers upward."""
    arrows, columns = flow.strongest, _columns(flow)
    figure = go.Figure()
    _dots(figure, flow, columns)
    for row in arrows.to_dict("records"):
        _arrow(figure, row, columns, COLOR[row["sender"]], 0.8 if flow.significant else 0.4, flow.meta)
    layers = flow.meta["n_layers"]
    figure.update_xaxes(
        tickvals=list(columns.values()), ticktext=[SHORT[role] for role in columns], range=[-0.6, len(columns) - 0.4],
        showgrid=False, zeroline=False, tickangle=0,
    )  # fmt: skip
    figure.update_yaxes(title="layer", range=[-0.7, layers - 0.3], showgrid=True, gridcolor="#f0f0f0", zeroline=False)
    width = max(620, 170 + 125 * len(columns))
    lines = [html.escape(line, quote=False) for line in textwrap.wrap(flow.caption, width // 7)]
    top = 60 + 16 * len(lines)
    figure.update_layout(
        template="plotly_white", width=width, height=min(860, 240 + 17 * layers) + top,
        margin={"l": 60, "r": 20, "t": top, "b": 60}, font={"family": FONT, "size": 12, "color": "#222"},
        showlegend=False,
        title={
            "text": "<b>Information flow to the answer</b>", "x": 0, "xref": "container", "xanchor": "left",
            "font": {"size": 15}, "pad": {"l": 10},
            "subtitle": {"text": "<br>".join(lines), "font": {"size": 12, "color": "#666"}},
        },
    )  # fmt: skip
    return figure


def flow_picture(flow: "Flow") -> Figure:
    """The same, drawn by matplotlib, which needs no browser; ``savefig`` writes PNG, SVG or PDF."""
    columns, layers = _columns(flow), flow.meta["n_layers"]
    width = 2.4 + 1.25 * len(columns)
    lines = textwrap.wrap(flow.caption, int(width * 13))
    figure = Figure(figsize=(width, 2.6 + 0.15 * layers + 0.16 * len(lines)), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    axes: Axes = figure.subplots()
    nodes: Any = flow.nodes
    size = float(nodes["effect"].abs().max()) or 1.0
    dots = axes.scatter(
        [columns[role] for role in nodes["role"]], nodes["layer"], s=6 + 90 * nodes["effect"].abs() / size,
        c=nodes["effect"], cmap=DIVERGING, norm=Normalize(-size, size), edgecolors="#999999", linewidths=0.5, zorder=2,
    )  # fmt: skip
    for row in flow.strongest.to_dict("records"):
        (x0, first), (x1, last) = _ends(row, columns, flow.meta)
        color = COLOR[row["sender"]]
        look = {
            "arrowstyle": "-|>,head_length=0.5,head_width=0.25", "lw": 1.0 + 3 * min(1.0, row["drop"]), "color": color,
            "alpha": 0.8 if flow.significant else 0.4, "shrinkA": 4, "shrinkB": 6,
        }  # fmt: skip
        axes.annotate("", (x1, last), (x0, first), arrowprops=look, zorder=3)
        at = x0 + ALONG * (x1 - x0), first + ALONG * (last - first)
        if x1 - x0 > 1 and abs(at[0] - round(at[0])) < CLEAR:  # not on the dots of a column between
            at = at[0] + CLEAR, at[1] + CLEAR * (last - first) / (x1 - x0)
        axes.text(
            *at, f"−{row['drop']:.0%}", fontsize=8, fontweight="bold", color=color, ha="center", va="center", zorder=4,
            bbox={"facecolor": "white", "alpha": 0.85, "linewidth": 0, "pad": 1},
        )  # fmt: skip
    axes.set_xticks(list(columns.values()), [SHORT[role].replace("<br>", "\n") for role in columns], fontsize=8)
    axes.set(xlim=(-0.6, len(columns) - 0.4), ylim=(-0.7, layers - 0.3), ylabel="layer")
    axes.grid(axis="y", color="#f0f0f0")
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, length=2.5, color="#888888")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    bar = figure.colorbar(dots, ax=axes, fraction=0.03, pad=0.02)
    bar.set_label("restored", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    title = "Information flow to the answer"
    axes.set_title(title, loc="left", fontsize=10.5, fontweight="bold", pad=10 + 11 * len(lines))
    axes.annotate(
        "\n".join(lines), (0, 1), (0, 6), xycoords="axes fraction", textcoords="offset points", fontsize=8,
        color="#666666",
    )  # fmt: skip
    return figure


def _columns(flow: "Flow") -> dict[str, int]:
    """Role → place, of those that are drawn."""
    there = {*flow.nodes["role"], *flow.strongest["sender"]}
    return {role: i for i, role in enumerate(role for role in SHORT if role in there)}


def _ends(row: dict[str, Any], columns: dict[str, int], meta: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    """From the sender at the first layer of the window to the receiver at its last: column and layer of both."""
    window, middle = meta["window"], row["layer"]
    first, last = max(0, middle - window // 2), min(meta["n_layers"], middle + window - window // 2) - 1
    return (columns[row["sender"]], first), (columns[row["receiver"]], last)


def _dots(figure: go.Figure, flow: "Flow", columns: dict[str, int]) -> None:
    nodes: Any = flow.nodes
    size = float(nodes["effect"].abs().max()) or 1.0
    figure.add_scatter(
        x=[columns[role] for role in nodes["role"]], y=nodes["layer"], mode="markers",
        marker={
            "size": 3 + 15 * (nodes["effect"].abs() / size) ** 0.5, "color": nodes["effect"], "colorscale": DIVERGING,
            "cmin": -size, "cmax": size, "line": {"width": 0.5, "color": "#999"}, "opacity": 1.0,
            "colorbar": {"title": {"text": "restored", "side": "right"}, "thickness": 12, "outlinewidth": 0},
        },
        customdata=nodes[["role", "q"]], hovertemplate=(
            "%{customdata[0]}, layer %{y}<br>restored %{marker.color:.3f}<br>q %{customdata[1]:.2g}<extra></extra>"
        ),
    )  # fmt: skip


def _arrow(
    figure: go.Figure, row: dict[str, Any], columns: dict[str, int], color: str, opacity: float, meta: Any
) -> None:
    (x0, first), (x1, last) = _ends(row, columns, meta)
    figure.add_annotation(
        x=x1, y=last, ax=x0, ay=first, xref="x", yref="y", axref="x", ayref="y", text="", showarrow=True,
        arrowhead=2, arrowsize=0.8, arrowwidth=1.2 + 4 * min(1.0, row["drop"]), arrowcolor=color, opacity=opacity,
        standoff=7, startstandoff=5,
    )  # fmt: skip
    interval = "" if row["ci_low"] != row["ci_low"] else f" [{row['ci_low']:.1%}, {row['ci_high']:.1%}]"
    figure.add_annotation(
        x=x0 + ALONG * (x1 - x0), y=first + ALONG * (last - first), xref="x", yref="y", showarrow=False,
        text=f"<b>−{row['drop']:.0%}</b>", font={"size": 11, "color": color}, bgcolor="rgba(255,255,255,0.85)",
        hovertext=(
            f"{row['sender']} → {row['receiver']}<br>layers {first} to {last}<br>"
            f"drop {row['drop']:.1%}{interval}<br>q {row['q']:.2g}"
        ),
    )  # fmt: skip
