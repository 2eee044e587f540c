"""A classifier's log-odds through each text, with a menu to go from text to text."""

import html
from typing import Any

import numpy as np
import plotly.graph_objects as go

from mechinterp.core.display import visible
from mechinterp.core.result import Result
from mechinterp.report.attention import PALETTE, finish, menu

WIDTH, HEIGHT = 1000, 420


def trajectory_picker(trajectory: Result, names: list[str] | None = None) -> go.Figure:
    """Log-odds at each token of one text at a time, with what each line changes below; a menu chooses the text.

    Args:
        trajectory: of the analyzer `Trajectory`.
        names: of the texts in the menu; their numbers and predictions by default.
    """
    data: Any = trajectory.data
    odds, tokens = (data[name].transpose("example", "position").values for name in ("log_odds", "token"))
    ends, changes, lines = (
        data[name].transpose("example", "line").values for name in ("line_end", "line_change", "line_text")
    )
    label = str(trajectory.meta.get("label", "the label"))
    called = names or [
        f"{i}: {p} ({v:+.2f})"
        for i, (p, v) in enumerate(zip(data["prediction"].values, data["final_log_odds"].values, strict=True))
    ]
    figure = go.Figure()
    for i, row in enumerate(odds):
        n, real = int(np.isfinite(row).sum()), np.isfinite(changes[i])
        told = [html.escape(visible(str(token)), quote=False) for token in tokens[i, :n]]
        figure.add_scatter(
            x=np.arange(n), y=row[:n], mode="lines", line={"color": PALETTE[0], "width": 1.5}, text=told,
            name="log-odds", visible=i == 0, hovertemplate="%{x}: %{text}<br>%{y:+.3f} nats<extra></extra>",
        )  # fmt: skip
        hover = [html.escape(visible(str(line)), quote=False)[:160] for line in lines[i][real]]
        figure.add_bar(
            x=ends[i][real], y=changes[i][real], marker={"color": PALETTE[1]}, opacity=0.6, text=hover,
            textposition="none", name="change by line", visible=i == 0, width=max(0.8, n / 150),
            hovertemplate="%{text}<br>%{y:+.3f} nats<extra></extra>",
        )  # fmt: skip
    menu(figure, called, 2)
    figure.add_hline(y=0, line={"color": "#999", "width": 1})
    figure.update_xaxes(title_text="token")
    figure.update_yaxes(title_text=f"log-odds of {html.escape(label, quote=False)} (nats)")
    notes = ("what the classifier would say were the text to end there", "bars stand at the end of each line")
    legend = {"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom"}
    return finish(figure, "Trajectory of each text", notes, WIDTH, HEIGHT, legend=legend, showlegend=True)
