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


def flow_figure(flow: "Flow") -> go.Figure:
    """Dots for states, arrows for attention; layers upward."""
    arrows = flow.strongest
    there = {*flow.nodes["role"], *arrows["sender"]}
    columns = {role: i for i, role in enumerate(role for role in SHORT if role in there)}
    color = {role: PALETTE[i % len(PALETTE)] for i, role in enumerate(SHORT)}
    figure = go.Figure()
    _dots(figure, flow, columns)
    for row in arrows.to_dict("records"):
        _arrow(figure, row, columns, color[row["sender"]], flow.meta)
    layers = flow.meta["n_layers"]
    figure.update_xaxes(
        tickvals=list(columns.values()), ticktext=[SHORT[role] for role in columns], range=[-0.6, len(columns) - 0.4],
        showgrid=False, zeroline=False, tickangle=0,
    )  # fmt: skip
    figure.update_yaxes(title="layer", range=[-1, layers], showgrid=True, gridcolor="#f0f0f0", zeroline=False)
    width = 150 + 125 * len(columns)
    figure.update_layout(
        template="plotly_white", width=width, height=min(900, 260 + 17 * layers),
        margin={"l": 60, "r": 20, "t": 92, "b": 60}, font={"family": FONT, "size": 12, "color": "#222"},
        showlegend=False,
        title={
            "text": "<b>Information flow to the answer</b>", "x": 0, "xref": "container", "xanchor": "left",
            "font": {"size": 15}, "pad": {"l": 10},
            "subtitle": {"text": _wrapped(flow.caption, width // 7), "font": {"size": 12, "color": "#666"}},
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


def _arrow(figure: go.Figure, row: dict[str, Any], columns: dict[str, int], color: str, meta: Any) -> None:
    """From the sender at the first layer of the window to the receiver at its last."""
    window, middle = meta["window"], row["layer"]
    first, last = max(0, middle - window // 2), min(meta["n_layers"], middle + window - window // 2) - 1
    x0, x1 = columns[row["sender"]], columns[row["receiver"]]
    figure.add_annotation(
        x=x1, y=last, ax=x0, ay=first, xref="x", yref="y", axref="x", ayref="y", text="", showarrow=True,
        arrowhead=2, arrowsize=0.8, arrowwidth=1.2 + 4 * min(1.0, row["drop"]), arrowcolor=color, opacity=0.8,
        standoff=7, startstandoff=5,
    )  # fmt: skip
    along = 0.62
    figure.add_scatter(
        x=[x0 + along * (x1 - x0)], y=[first + along * (last - first)], mode="text",
        text=[f"<b>−{row['drop']:.0%}</b>"], textposition="top center", textfont={"size": 11, "color": color},
        hovertemplate=(
            f"{row['sender']} → {row['receiver']}<br>layers {first} to {last}<br>drop {row['drop']:.1%}"
            f" [{row['ci_low']:.1%}, {row['ci_high']:.1%}]<br>q {row['q']:.2g}<extra></extra>"
        ),
    )  # fmt: skip


def _wrapped(text: str, width: int) -> str:
    return "<br>".join(html.escape(line, quote=False) for line in textwrap.wrap(text, width))
