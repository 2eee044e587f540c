"""The figure of a `Flow`."""

import html
import textwrap
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go

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

ALONG = 0.55
"""Where on an arrow its number stands."""


def flow_figure(flow: "Flow") -> go.Figure:
    """Dots for states, arrows for attention; layers upward."""
    arrows = flow.strongest
    there = {*flow.nodes["role"], *arrows["sender"]}
    columns = {role: i for i, role in enumerate(role for role in SHORT if role in there)}
    color = {role: PALETTE[i % len(PALETTE)] for i, role in enumerate(SHORT)}
    figure = go.Figure()
    _dots(figure, flow, columns)
    for row in arrows.to_dict("records"):
        _arrow(figure, row, columns, color[row["sender"]], 0.8 if flow.significant else 0.4, flow.meta)
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
    """From the sender at the first layer of the window to the receiver at its last."""
    window, middle = meta["window"], row["layer"]
    first, last = max(0, middle - window // 2), min(meta["n_layers"], middle + window - window // 2) - 1
    x0, x1 = columns[row["sender"]], columns[row["receiver"]]
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
