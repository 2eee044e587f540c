"""Attention patterns as figures to look into: plotly, offline, every token only ever text.

All take the result of `mechinterp.AttentionPatterns`. What a browser cannot show is thinned, and the
figure's subtitle says how.
"""

import html
import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import plotly.graph_objects as go
from plotly import subplots

from mechinterp.core.display import visible
from mechinterp.core.result import Result
from mechinterp.errors import OutputError
from mechinterp.report.figures import FONT, MISSING, PALETTE, SEQUENTIAL

Floats: TypeAlias = npt.NDArray[np.floating]
Head: TypeAlias = tuple[int, int]
"""Layer and head."""

MOST_HEADS = 24
"""Heads side by side, or to choose from."""
GRID_TOKENS, HEAD_TOKENS, THUMBNAIL = 48, 160, 24
"""Rows and columns of one pattern in a grid, alone, and in the overview; longer texts are pooled."""
OVERVIEW_CELLS = 250_000
LINE_TOKENS = 60
"""Tokens between which lines are drawn."""
TOKEN = 16
"""Characters of a token that labels a row."""


def attention_figures(result: Result, example: int = 0, heads: Sequence[Head] | None = None) -> dict[str, go.Figure]:
    """All figures of one text, by heading: overview, grid, one head, lines, and neurons where there is a pair.

    Args:
        heads: (layer, head) to show; by default those that attend most to one token (see `strongest`).
    Raises:
        OutputError: the result has no such example or head, or is of another analyzer.
    """
    figures = {
        "All heads": overview(result, example),
        "Heads side by side": head_grid(result, heads, example),
        "One head, token by token": one_head(result, heads, example),
        "What one token attends to": query_lines(result, (heads or strongest(result, example))[0], example=example),
    }
    if "product" in result.data:
        figures["Neurons of one query and key"] = neurons(result, heads, example)
    return figures


def strongest(result: Result, example: int = 0, most: int = MOST_HEADS) -> list[Head]:
    """The heads that attend most to one earlier token but the first, strongest first (``focus`` of the result).

    Raises:
        OutputError: the result has no such example, or is of another analyzer.
    """
    focus = _of(result, example).focus
    order = np.argsort(-np.nan_to_num(focus.values.ravel()), kind="stable")[:most]
    rows, columns = np.unravel_index(order, focus.shape)
    return [(int(focus["layer"][i]), int(focus["head"][j])) for i, j in zip(rows, columns, strict=True)]


def overview(result: Result, example: int = 0) -> go.Figure:
    """A thumbnail of every head's pattern, heads from left to right and layers upward.

    Hover names the head and its strongest pair of tokens.
    """
    one = _of(result, example)
    layers, heads = one.pattern["layer"].values, one.pattern["head"].values
    size = max(3, min(THUMBNAIL, one.n, math.isqrt(OVERVIEW_CELLS // (len(layers) * len(heads))) - 1))
    rows: list[Floats] = []
    side = math.ceil(one.n / math.ceil(one.n / size))
    for layer in layers[::-1]:
        tiles = [_pooled(one.of((int(layer), int(head))), size) for head in heads]
        gap = np.full((side, 1), np.nan)
        row = np.concatenate([piece for tile in tiles for piece in (tile, gap)][:-1], 1)
        rows += [row, np.full((1, row.shape[1]), np.nan)]
    cells = np.concatenate(rows[:-1]).astype(np.float32)
    step = side + 1
    figure = go.Figure()
    figure.add_heatmap(z=cells, zmin=0, zmax=1, hoverinfo="skip", **_colors())
    places = [(i, j) for i in range(len(layers)) for j in range(len(heads))]
    figure.add_scatter(
        x=[j * step + (side - 1) / 2 for _, j in places],
        y=[i * step + (side - 1) / 2 for i, _ in places],
        mode="markers", marker={"size": 30, "opacity": 0, "symbol": "square"}, showlegend=False,
        hovertext=[one.told((int(layers[::-1][i]), int(heads[j]))) for i, j in places],
        hovertemplate="%{hovertext}<extra></extra>",
    )  # fmt: skip
    centre = (side - 1) / 2
    plain: dict[str, Any] = {"showgrid": False, "zeroline": False, "ticks": "", "tickmode": "array"}
    xs, ys = ([centre + i * step for i in range(len(some))] for some in (heads, layers))
    end = [len(heads) * step - 1.5, len(layers) * step - 1.5]
    figure.update_xaxes(title="head", tickvals=xs, ticktext=[str(h) for h in heads], range=[-0.5, end[0]], **plain)
    figure.update_yaxes(
        title="layer", tickvals=ys, ticktext=[str(i) for i in layers[::-1]], range=[end[1], -0.5], **plain
    )
    each = 38 if len(heads) > 4 else 60
    return finish(
        figure,
        f"Attention of {len(layers) * len(heads):,} heads",
        [f"{one.n} tokens; in each square queries go down and keys to the right", one.thinned(size)],
        _between(len(heads) * each + 190, 460, 1180),
        len(layers) * each + 170,
        plot_bgcolor=MISSING,
    )


def head_grid(result: Result, heads: Sequence[Head] | None = None, example: int = 0) -> go.Figure:
    """Chosen heads side by side, token by token; zooming into one zooms into all."""
    one = _of(result, example)
    chosen, note = one.chosen(heads)
    columns = min(6, len(chosen))
    lines = math.ceil(len(chosen) / columns)
    width, each = min(1180, 150 + 250 * columns), 0
    each = (width - 150) // columns
    make: Any = subplots.make_subplots  # whose stub lacks "all"
    figure: Any = make(
        lines, columns, shared_xaxes="all", shared_yaxes="all",
        subplot_titles=[f"layer {layer}, head {head}" for layer, head in chosen],
        horizontal_spacing=14 / width, vertical_spacing=26 / (lines * each + 26 * (lines - 1)) if lines > 1 else 0,
    )  # fmt: skip
    names = one.names(GRID_TOKENS)
    for i, head in enumerate(chosen):
        values = _pooled(one.of(head), GRID_TOKENS).astype(np.float32)
        where = {"row": i // columns + 1, "col": i % columns + 1}
        figure.add_heatmap(z=values, x=names, y=names, coloraxis="coloraxis", hovertemplate=_HOVER, **where)
    figure.update_xaxes(type="category", showticklabels=False, ticks="", showgrid=False)
    figure.update_yaxes(type="category", showticklabels=False, ticks="", showgrid=False, autorange="reversed")
    figure.update_annotations(font={"size": 11})
    figure.update_layout(coloraxis={"cmin": 0, "cmax": 1, **_colors()})
    told = "queries go down, keys to the right; hover for tokens, drag to zoom into all"
    notes = [told, note, one.thinned(GRID_TOKENS)]
    finish(figure, "Heads side by side", notes, width, lines * (each + 26) + 146, plot_bgcolor=MISSING)
    figure.layout.margin.t += 16  # the panels' own titles
    return figure


def one_head(result: Result, heads: Sequence[Head] | None = None, example: int = 0) -> go.Figure:
    """One head's attention from every token to every token; a menu chooses among heads."""
    one = _of(result, example)
    chosen, note = one.chosen(heads)
    names, ticks = one.names(HEAD_TOKENS), one.ticks(HEAD_TOKENS)
    figure = go.Figure()
    for i, head in enumerate(chosen):
        values = _pooled(one.of(head), HEAD_TOKENS).astype(np.float32)
        figure.add_heatmap(
            z=values, x=names, y=names, zmin=0, zmax=1, visible=i == 0, hovertemplate=_HOVER, **_colors(),
            xgap=0.5 if len(names) <= 40 else 0, ygap=0.5 if len(names) <= 40 else 0,
        )  # fmt: skip
    step = max(1, math.ceil(len(names) / 80))
    shown: dict[str, Any] = {
        "type": "category", "tickmode": "array", "tickvals": list(names[::step]),
        "ticktext": ticks[::step], "tickfont": {"size": 10}, "showgrid": False, "ticks": "",
        "automargin": True,
    }  # fmt: skip
    figure.update_xaxes(title="key", tickangle=-45 if len(names) <= 40 else -90, **shown)
    figure.update_yaxes(title="query", autorange="reversed", **shown)
    menu(figure, [f"layer {a}, head {b}" for a, b in chosen], 1)
    side = _between(len(names) * 22, 300, 900)
    label = 6 * max(map(len, (visible(t, TOKEN) for t in one.tokens)))
    return finish(
        figure, "One head, token by token", [note, one.thinned(HEAD_TOKENS)], side + label + 170, side + label + 150,
        plot_bgcolor=MISSING,
    )  # fmt: skip


def query_lines(result: Result, head: Head, query: int | None = None, example: int = 0) -> go.Figure:
    """What one token attends to in one head: a band to each key, as wide as its share; they add up to one.

    A menu chooses the query where the text has at most `LINE_TOKENS` tokens; of a longer one only
    `query` is drawn, with its strongest keys.

    Args:
        query: position of the token at first; the last by default.
    """
    one = _of(result, example)
    ((layer, number),), _ = one.chosen([head])
    position = one.n - 1 if query is None else query
    if not 0 <= position < one.n:
        raise OutputError(f"the query must be a position of 0 to {one.n - 1}. Got {query}; name another")
    weights = np.nan_to_num(one.of((layer, number)))
    told = ""
    rows, queries = list(range(one.n)), list(range(one.n))
    if one.n > LINE_TOKENS:
        best = np.argsort(-weights[position], kind="stable")[:LINE_TOKENS]
        rows, queries = sorted({*best.tolist(), position}), [position]
        told = f"its {LINE_TOKENS} strongest keys of {one.n}, {weights[position][rows].sum():.0%} of its attention"
    labels = [html.escape(visible(one.tokens[i], TOKEN), quote=False) for i in rows]
    figure = go.Figure()
    texts: dict[str, Any] = {"y": list(range(len(rows))), "text": labels, "mode": "text", "hoverinfo": "skip"}
    for x, side in ((-0.03, "middle left"), (1.03, "middle right")):
        figure.add_scatter(x=[x] * len(rows), textposition=side, textfont={"size": 12}, showlegend=False, **texts)
    names = [f"{visible(one.tokens[i], TOKEN)} ({i})" for i in rows]
    for q in queries:
        _bands(figure, rows.index(q), weights[q][rows], names, q == position)
    bare: dict[str, Any] = {"visible": False, "fixedrange": True}
    figure.update_xaxes(range=[-0.45, 1.45], **bare)
    figure.update_yaxes(range=[len(rows) - 0.4, -0.6], **bare)
    if len(queries) > 1:
        menu(figure, [f"from {n}" for n in names], 2, fixed=2, first=position)
    else:
        told = f"from {visible(one.tokens[position], TOKEN)} ({position}): {told}"
    return finish(
        figure,
        f"What one token attends to in layer {layer}, head {number}",
        ["from a query on the left to keys on the right; a band is as wide as its share of attention", told],
        640,
        _between(len(rows) * 19 + 130, 320, 1400),
    )


def neurons(result: Result, heads: Sequence[Head] | None = None, example: int = 0) -> go.Figure:
    """One query times one key, dimension by dimension after rotary; the products add up to the score before scaling.

    Raises:
        OutputError: the patterns were taken without a pair.
    """
    one = _of(result, example)
    if "product" not in result.data:
        raise OutputError("these patterns have no pair of a query and a key; run AttentionPatterns(pair=(query, key))")
    chosen, note = one.chosen(heads)
    figure: Any = go.Figure()
    names: list[str] = []
    for i, (layer, head) in enumerate(chosen):
        here = result.data.sel(layer=layer, head=head).isel(example=example)
        product, score = here["product"].values.astype(float), float(here["score"])
        numbers = np.stack([here["query_value"].values, here["key_value"].values], -1)
        figure.add_bar(
            x=here["dim"].values, y=product, customdata=numbers, visible=i == 0,
            marker={"color": [PALETTE[0] if v >= 0 else PALETTE[1] for v in product]},
            hovertemplate="dimension %{x}<br>query %{customdata[0]:.3f} × key %{customdata[1]:.3f}<br>= %{y:.3f}"
            "<extra></extra>",
        )  # fmt: skip
        scaled = "outside its window" if math.isnan(score) else f"scaled {score:.2f}"
        names.append(f"layer {layer}, head {head}: sum {product.sum():.2f}, {scaled}")
    figure.update_xaxes(title="dimension of the head, after rotary", showgrid=False)
    figure.update_yaxes(title="query × key", zerolinecolor="#888")
    figure.update_layout(bargap=0.15)
    menu(figure, names, 1)
    query, key = (str(p) for p in (result.meta.get("pair") or ("the query", "the key")))
    told = f"query at {query}, key at {key}; blue raises the score, orange lowers it"
    return finish(figure, "Neurons of one query and key", [told, note], 860, 440)


_HOVER = "query %{y}<br>key %{x}<br>share %{z:.4f}<extra></extra>"


@dataclass(frozen=True)
class _Text:
    """One text's patterns, without padding."""

    pattern: Any
    """``layer head query key``."""
    focus: Any
    tokens: list[str]

    @property
    def n(self) -> int:
        return len(self.tokens)

    def of(self, head: Head) -> Floats:
        """One head's pattern, ``query key``."""
        return self.pattern.sel(layer=head[0], head=head[1]).values

    def chosen(self, heads: Sequence[Head] | None) -> tuple[list[Head], str]:
        """The heads to show, and which they are where not all that were asked for are among them.

        Raises:
            OutputError: the result lacks one.
        """
        every = [(int(a), int(b)) for a in self.pattern["layer"] for b in self.pattern["head"]]
        if heads is None and len(every) <= MOST_HEADS:
            return every, ""
        if heads is None:
            flat = np.argsort(-np.nan_to_num(self.focus.values.ravel()), kind="stable")[:MOST_HEADS]
            told = f"the {MOST_HEADS} of {len(every)} heads that attend most to one earlier token but the first"
            return [every[i] for i in flat], told
        if not heads:
            raise OutputError("the heads must name at least one layer and head. Got none")
        if gone := [head for head in heads if tuple(head) not in every]:
            raise OutputError(
                f"these patterns have no layer {gone[0][0]}, head {gone[0][1]}; they have layers"
                f" {_some(self.pattern['layer'].values)} with heads {_some(self.pattern['head'].values)}"
            )
        some = [(int(a), int(b)) for a, b in heads]
        told = f"the first {MOST_HEADS} of {len(some)} heads" if len(some) > MOST_HEADS else ""
        return some[:MOST_HEADS], told

    def names(self, most: int) -> list[str]:
        """A name of its own for each row and column, escaped: ``␣to (13)``, or of a pooled one its first and last."""
        out: list[str] = []
        for start, stop in self._runs(most):
            first, last = (visible(self.tokens[i], TOKEN) for i in (start, stop - 1))
            out.append(f"{first} ({start})" if stop == start + 1 else f"{first} … {last} ({start}-{stop - 1})")
        return [html.escape(name, quote=False) for name in out]

    def ticks(self, most: int) -> list[str]:
        """What stands beside a row, escaped."""
        runs = self._runs(most)
        return [html.escape(visible(self.tokens[a], TOKEN), quote=False) + (" …" if b > a + 1 else "") for a, b in runs]

    def thinned(self, most: int) -> str:
        """What was done to a text that is too long; nothing otherwise."""
        block = math.ceil(self.n / most)
        return f"each cell is the largest of {block} × {block} tokens" if block > 1 else ""

    def told(self, head: Head) -> str:
        """Hover of a thumbnail, escaped."""
        pattern = np.nan_to_num(self.of(head))
        lines = [f"layer {head[0]}, head {head[1]}"]
        if self.n > 1:
            lines.append(f"on the first token {pattern[1:, 0].mean():.2f}")
        if self.n > 2:
            earlier = np.tril(pattern, -1)
            earlier[:, 0] = 0
            query, key = np.unravel_index(int(earlier.argmax()), earlier.shape)
            a, b = (visible(self.tokens[i], TOKEN) for i in (int(query), int(key)))
            lines.append(f"most: {a} ({query}) to {b} ({key}) {earlier[query, key]:.2f}")
        return "<br>".join(html.escape(line, quote=False) for line in lines)

    def _runs(self, most: int) -> list[tuple[int, int]]:
        block = math.ceil(self.n / most)
        return [(i, min(i + block, self.n)) for i in range(0, self.n, block)]


def _of(result: Result, example: int) -> _Text:
    data: Any = result.data
    if not {"pattern", "focus", "key_token"} <= set(map(str, data.data_vars)):
        raise OutputError("this result has no attention patterns; give that of AttentionPatterns")
    if not 0 <= example < data.sizes["example"]:
        raise OutputError(
            f"these patterns are of {data.sizes['example']} examples, and there is none of number {example}"
        )
    one = data.isel(example=example)
    n = int(np.isfinite(one["pattern"].isel(layer=0, head=0, key=0).values).sum())
    pattern = one["pattern"].transpose("layer", "head", "query", "key").isel(query=slice(n), key=slice(n))
    focus = one["focus"].transpose("layer", "head")
    return _Text(pattern, focus, [str(t) for t in one["key_token"].values[:n]])


def _pooled(pattern: Floats, most: int) -> Floats:
    """At most `most` rows and columns: the largest of each block of tokens."""
    n = len(pattern)
    block = math.ceil(n / most)
    size = math.ceil(n / block)
    padded = np.zeros((size * block, size * block), np.float32)
    padded[:n, :n] = pattern
    return padded.reshape(size, block, size, block).max((1, 3))


def _bands(figure: go.Figure, row: int, weights: Floats, names: Sequence[str], shown: bool) -> None:
    """The bands of one query in one trace, and in another the points that say their numbers."""
    u = np.linspace(0, 1, 24)
    ease = 3 * u**2 - 2 * u**3
    tall, wide = 0.8, 15.5  # of a row; rows that are as many pixels as the figure's width
    top = row - tall * weights.sum() / 2
    x: list[float | None] = []
    y: list[float | None] = []
    for key, weight in enumerate(weights):
        if weight < 0.005:
            top += tall * weight
            continue
        start, stop = top + tall * weight / 2, float(key)
        middle, slope = start + (stop - start) * ease, (stop - start) * 6 * (u - u**2) / wide
        half = tall * weight / 2 / np.sqrt(1 + slope**2)  # across the band, as it is seen
        aside = half * slope / wide
        x += [*(u + aside), *(u - aside)[::-1], None]
        y += [*(middle - half), *(middle + half)[::-1], None]
        top += tall * weight
    color = "rgba(0,114,178,0.45)"
    figure.add_scatter(
        x=x, y=y, fill="toself", fillcolor=color, line={"width": 0.5, "color": color}, mode="lines",
        hoverinfo="skip", showlegend=False, visible=shown,
    )  # fmt: skip
    seen = [i for i, weight in enumerate(weights) if weight >= 0.005]
    told = [f"to {html.escape(names[i], quote=False)}<br>share {weights[i]:.4f}" for i in seen]
    figure.add_scatter(
        x=[0, *[1] * len(seen)], y=[row, *seen], mode="markers", showlegend=False, visible=shown,
        marker={"size": [9, *[7] * len(seen)], "color": [PALETTE[1], *[PALETTE[0]] * len(seen)]},
        hovertext=[f"from {html.escape(names[row], quote=False)}", *told], hovertemplate="%{hovertext}<extra></extra>",
    )  # fmt: skip


def menu(figure: go.Figure, names: Sequence[str], each: int, fixed: int = 0, first: int = 0) -> None:
    """A menu that shows one group of traces at a time; the first `fixed` traces always."""
    buttons: list[dict[str, Any]] = []
    for i, name in enumerate(names):
        on = [True] * fixed + [j == i for j in range(len(names)) for _ in range(each)]
        buttons.append({"label": html.escape(name, quote=False), "method": "restyle", "args": [{"visible": on}]})
    figure.update_layout(
        updatemenus=[
            {
                "buttons": buttons, "active": first, "x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom",
                "pad": {"b": 4}, "bgcolor": "white", "bordercolor": "#bbb", "font": {"size": 11},
            }
        ]
    )  # fmt: skip


def finish(figure: go.Figure, title: str, notes: Sequence[str], width: int, height: int, **more: Any) -> go.Figure:
    """Title, subtitle and style, as all figures have them."""
    told = "; ".join(note for note in notes if note)
    lines = [html.escape(line, quote=False) for line in textwrap.wrap(told, max(40, width // 7))]
    layout: Any = figure.layout
    menu = 34 * bool(layout.updatemenus)
    figure.update_layout(
        template="plotly_white", width=width, height=height + 16 * len(lines) + menu,
        margin={"l": 60, "r": 20, "t": 62 + 16 * len(lines) + menu, "b": 50},
        font={"family": FONT, "size": 12, "color": "#222"}, hoverlabel={"font": {"family": FONT}},
        title={
            "text": f"<b>{html.escape(title, quote=False)}</b>", "x": 0, "xref": "container", "xanchor": "left",
            "font": {"size": 15}, "pad": {"l": 10}, "y": 1, "yref": "container", "yanchor": "top",
            "subtitle": {"text": "<br>".join(lines), "font": {"size": 12, "color": "#666"}},
        },
        **more,
    )  # fmt: skip
    layout.title.pad.t = 14
    return figure


def _colors() -> dict[str, Any]:
    bar = {"title": {"text": "share", "side": "right"}, "thickness": 12, "outlinewidth": 0, "len": 1.0}
    bar |= {"lenmode": "pixels", "len": 220, "y": 1, "yanchor": "top"}
    return {"colorscale": SEQUENTIAL, "colorbar": bar}


def _some(numbers: Any) -> str:
    given = [str(n) for n in numbers]
    return ", ".join(given) if len(given) <= 8 else f"{given[0]} to {given[-1]}"


def _between(value: int, low: int, high: int) -> int:
    return max(low, min(high, value))
