"""Features of units in two dimensions, layer by layer, with each unit's text on hover."""

import html
from typing import Any

import numpy as np
import plotly.graph_objects as go

from mechinterp.core.display import count, visible
from mechinterp.core.result import Result
from mechinterp.errors import OutputError
from mechinterp.report.attention import finish, menu
from mechinterp.report.figures import _colors

WIDTH, HEIGHT = 860, 560
MOST_LABELS = 16
"""Labels that colours still tell apart; more are left to the hover text, and colours are clusters."""
LETTERS = 120
"""Characters of a text that are shown on hover."""


def representation_map(result: Result) -> go.Figure:
    """The map of a `RepresentationMap`: a menu of layers, a colour for each label, or for each cluster without labels.

    Raises:
        OutputError: the result is another one.
    """
    if not {"coordinate", "cluster", "text"} <= set(result.data.data_vars):
        raise OutputError(f"{result.meta.get('analyzer', 'this result')} is no map; use RepresentationMap")
    data: Any = result.data
    axis = str(data["coordinate"].dims[0])
    given = data["label"].values.tolist() if "label" in data else []
    labels = np.array([label or "no label" for label in given], dtype=str)
    by_label = 0 < len(set(labels)) <= MOST_LABELS
    most = int(data["cluster"].max())
    names = list(dict.fromkeys(labels)) if by_label else [f"cluster {i}" for i in range(1, most + 1)]
    colors = dict(zip(names, _colors(len(names)), strict=True))
    texts = [_plain(visible(text, LETTERS)) for text in data["text"].values]
    places = list(data[axis].values)
    first = len(places) // 2
    figure = go.Figure()
    for i in range(len(places)):
        at, cluster = data["coordinate"].values[i], data["cluster"].values[i]
        groups = labels if by_label else np.array([f"cluster {k}" for k in cluster])
        for name in names:
            mine = np.flatnonzero(groups == name)
            beside = "" if not len(labels) else "<br>label %{customdata[1]}"
            figure.add_scatter(
                x=at[mine, 0], y=at[mine, 1], mode="markers", name=_plain(visible(name, 40)), visible=i == first,
                marker={"size": 7, "opacity": 0.75, "color": colors[name]}, text=[texts[k] for k in mine],
                customdata=[[int(cluster[k]), "" if not len(labels) else _plain(labels[k])] for k in mine],
                hovertemplate=f"%{{text}}{beside}<br>cluster %{{customdata[0]}}<extra></extra>",
            )  # fmt: skip
    method = str(result.meta.get("method", "pca"))
    shares = data["explained"].values[:, :2].sum(1)
    told = [f" ({share:.0%} of variance)" if method == "pca" and np.isfinite(share) else "" for share in shares]
    called = [f"{'layer ' if axis == 'layer' else ''}{place}{more}" for place, more in zip(places, told, strict=True)]
    menu(figure, called, len(names), first=first)
    if method == "pca":
        figure.update_xaxes(title_text="first principal component")
        figure.update_yaxes(title_text="second principal component")
    figure.update_xaxes(zeroline=False)
    figure.update_yaxes(zeroline=False)
    seen = result.meta.get("units_seen", 0)
    notes = [
        count(len(texts), "unit")
        + (f" of {seen:,}" if (seen := result.meta.get("units_seen", 0)) > len(texts) else ""),
        f"coloured by {'label' if by_label else 'cluster'}",
        "distances between groups mean nothing" if method == "umap" else "",
    ]
    return finish(figure, f"Map of representations by {method.upper()}", notes, WIDTH, HEIGHT, showlegend=True)


def _plain(text: str) -> str:
    return html.escape(str(text), quote=False)
