"""A `Circuit` as others read it: a figure of layers in columns, a networkx graph, Graphviz text, JSON."""

import html
import json
import math
import re
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import plotly.graph_objects as go
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch

from mechinterp.core.graph import Graph, Ints
from mechinterp.errors import NeedsError, OutputError
from mechinterp.report.figures import FONT, PALETTE
from mechinterp.report.files import decode, encode
from mechinterp.studies.circuits import SIZES, Circuit, Floats, Mask

Link = tuple[int, str, str, str]

POSITIVE, NEGATIVE, UNSCORED = PALETTE[0], PALETTE[1], "#999999"
SIGNS = ((POSITIVE, "positive"), (NEGATIVE, "negative"), (UNSCORED, "without score"))
DASH = {"k": "9px,5px", "v": "2px,4px"}
PORT = {"q": 7.0, "k": 0.0, "v": -7.0}
"""Where an edge enters a head: queries above, values below."""
LOOKS = {"head": ("#d7efe6", PALETTE[2]), "MLP": ("#f6e3ee", PALETTE[3]), "embedding, logits": ("#ececec", "#8a8a8a")}
"""Fill and border of each kind of node."""
STEP = 15
"""Pixels from one place in a column to the next; nodes are two or more apart."""
NARROWEST = 600.0
"""Width of a figure with few columns."""
TALL = 20
"""Height of a node."""
THINNEST, WIDEST = 1.0, 5.0
MOST_WORK = 10_000_000
"""Comparisons of two edges after which a layout is taken as it is."""
FORMAT = "mechinterp-circuit-1"


def circuit_figure(circuit: Circuit, max_edges: int = 60) -> go.Figure:
    """Layers from left to right; the strongest edges on top."""
    drawn, links = _strongest(circuit, max_edges)
    place = _Layout(links)
    figure = go.Figure()
    most = float(np.nanmax(np.abs(circuit.scores[drawn]), initial=0))
    for i in reversed(range(len(links))):
        _edge(figure, circuit, links[i], place.path(i), most)
    for i, name in enumerate(place.names):
        _node(figure, name, float(place.x[i]), float(place.y[i]), place.wide)
    _columns(figure, place)
    _legend(figure, circuit, drawn, place)
    caption = _caption(circuit, drawn, most)
    width = max(640, int(place.width) + 40)
    lines = [html.escape(line, quote=False) for line in textwrap.wrap(caption, width // 7)]
    top = 62 + 16 * len(lines)
    figure.update_layout(
        template="plotly_white", width=width, height=top + int(place.height) + 110, hovermode="closest",
        margin={"l": 20, "r": 20, "t": top, "b": 110, "autoexpand": False}, hoverlabel={"font": {"family": FONT}},
        font={"family": FONT, "size": 12, "color": "#222"}, plot_bgcolor="white", paper_bgcolor="white",
        legend={
            "orientation": "h", "x": 0.5, "xanchor": "center", "y": -42 / place.height, "yanchor": "top",
            "itemclick": False, "itemdoubleclick": False, "font": {"size": 11},
        },
        title={
            "text": f"<b>{html.escape(circuit.title, quote=False)}</b>", "x": 0, "xref": "container", "xanchor": "left",
            "font": {"size": 15}, "pad": {"l": 10},
            "subtitle": {"text": "<br>".join(lines), "font": {"size": 12, "color": "#666"}},
        },
    )  # fmt: skip
    return figure


def circuit_picture(circuit: Circuit, max_edges: int = 60) -> Figure:
    """The same, drawn by matplotlib, which needs no browser."""
    drawn, links = _strongest(circuit, max_edges)
    place, most = _Layout(links), float(np.nanmax(np.abs(circuit.scores[drawn]), initial=0))
    lines = textwrap.wrap(_caption(circuit, drawn, most), int(place.width // 6))
    width, top, bottom = place.width + 40, 44 + 15 * len(lines), 70
    height = place.height + top + bottom
    figure = Figure(figsize=(width / 96, height / 96), dpi=192)
    axes = figure.add_axes((20 / width, bottom / height, place.width / width, place.height / height))
    axes.set(xlim=(0, place.width), ylim=(0, place.height))
    axes.axis("off")
    for i in reversed(range(len(links))):
        score = float(circuit.scores[links[i][0]])
        strength = abs(score) / most if most and score == score else 0.0
        points = 0.75 * (THINNEST + (WIDEST - THINNEST) * strength)
        dash = re.findall(r"\d+", DASH.get(kind_of(links[i][2]), ""))
        style = (0, tuple(0.75 * int(pixels) / points for pixels in dash)) if dash else "-"  # in widths of the line
        axes.plot(
            *place.path(i), color=_color(score), alpha=0.65 + 0.3 * strength, linestyle=style,
            linewidth=points, solid_capstyle="butt",
        )  # fmt: skip
    for name, x, y in zip(place.names, place.x, place.y, strict=True):
        fill, border = LOOKS[_kind(name)]
        shape = "round,pad=0,rounding_size=9" if "." in name else "square,pad=0"
        box = FancyBboxPatch((x - place.wide / 2, y - TALL / 2), place.wide, TALL, boxstyle=shape)
        box.set(facecolor=fill, edgecolor=border, linewidth=0.9, zorder=3)
        axes.add_patch(box)
        axes.text(x, y, name, fontsize=7.5, ha="center", va="center_baseline", zorder=4)
    for layer, xs in _spans(place).items():
        axes.text((min(xs) + max(xs)) / 2, -12, f"layer\n{layer}", fontsize=7.5, color="#666", ha="center", va="top")
    figure.text(20 / width, 1 - 12 / height, circuit.title, fontsize=11, fontweight="bold", va="top")
    figure.text(20 / width, 1 - 36 / height, "\n".join(lines), fontsize=8.5, color="#666", va="top")
    signs = {_color(float(score)) for score in circuit.scores[drawn]}
    known: list[tuple[str, Any, str]] = [(color, "-", name) for color, name in SIGNS if color in signs]
    known += [("#555555", {"k": "--", "v": ":"}.get(kind, "-"), name) for kind, name in _into(circuit, drawn)]
    handles = [Line2D([], [], color=color, linewidth=1.8, ls=style) for color, style, _ in known]
    if handles:
        names = [name for *_, name in known]
        figure.legend(handles, names, loc="lower center", ncols=len(names), fontsize=8, frameon=False)
    return figure


def _strongest(circuit: Circuit, max_edges: int) -> tuple[list[int], list[Link]]:
    """The edges that are drawn, and where they lead."""
    if max_edges < 1:
        raise NeedsError(f"The max_edges of Circuit.figure must be at least 1. Got {max_edges}")
    links = circuit.links()
    drawn = [*dict.fromkeys(edge for edge, *_ in links)][:max_edges]
    return drawn, [link for link in links if link[0] in {*drawn}]


def _caption(circuit: Circuit, drawn: Sequence[int], most: float) -> str:
    few = f"Drawn: the strongest {len(drawn):,} of {len(circuit):,} edges. " if len(circuit) > len(drawn) else ""
    how = f"Edges lead to the right, as wide as their scores (up to {most:.3g})." if drawn else "Nothing to draw."
    return f"{circuit.caption}. {few}{how}"


def kind_of(receiver: str) -> str:
    """``q``, ``k``, ``v``, ``mlp`` or ``logits``."""
    return receiver[-2] if "<" in receiver else "logits" if receiver == "logits" else "mlp"


def _kind(node: str) -> str:
    return "head" if "." in node else "MLP" if node.startswith("m") else "embedding, logits"


def _layer(node: str) -> int:
    """-1 for the embedding."""
    return -1 if node == "embed" else int(1e9) if node == "logits" else int(node[1:].split(".")[0])


class _Layout:
    """Where nodes stand, in pixels: columns of heads and of MLPs by layer, and in each an order with few crossings.

    Orders come from the barycentre heuristic (Sugiyama 1981). Then each node in turn moves to where its edges
    cross fewest others and pass under fewest nodes; what still passes under a node is bent around it.
    """

    def __init__(self, links: Sequence[Link]) -> None:
        self.names = sorted({name for _, a, _, b in links for name in (a, b)}, key=_rank)
        numbers = {name: i for i, name in enumerate(self.names)}
        self.a = np.array([numbers[a] for _, a, _, _ in links], int)
        self.b = np.array([numbers[b] for *_, b in links], int)
        self.port = np.array([PORT.get(kind_of(receiver), 0.0) for _, _, receiver, _ in links])
        self.bow = np.zeros(len(links))
        self.wide = 6.2 * max([5, *map(len, self.names)]) + 8
        keys = [_rank(name)[:2] for name in self.names]
        columns = sorted(set(keys))
        gaps = max(1, len(columns) - 1)
        widest = max(self.wide + 34, min(180, (NARROWEST - 28 - self.wide) / gaps))  # few columns have room
        self.gap = float(np.clip((1000 - 40 - self.wide) / gaps, max(34, self.wide / 2 + 9), widest))
        at = {key: self.wide / 2 + 14 + i * self.gap for i, key in enumerate(columns)}
        self.x = np.array([at[key] for key in keys], float)
        self.width = max(NARROWEST, max(at.values(), default=0.0) + self.wide / 2 + 14)
        self.x += (self.width - max(at.values(), default=0.0) - self.wide / 2 - 14) / 2
        self.columns = [[i for i, key in enumerate(keys) if key == column] for column in columns]
        self.beside = {node: column for column in self.columns for node in column}
        most = max(map(len, self.columns), default=1)
        self.places = max(9, 2 * most + 1, min(27, len(links) // 2))
        self.height = (self.places + 1) * STEP
        self.y = np.zeros(len(self.names))
        if links:
            self._barycentres()
            self._improve()

    def path(self, line: int) -> tuple[Floats, Floats]:
        x = np.linspace(self.x[self.a[line]], self.x[self.b[line]] - self.wide / 2, 30)
        return x, self._height(np.array([line]), x[None], self.y[None])[0, 0]

    def _barycentres(self) -> None:
        for column in self.columns:
            self._spread(column)
        for sweep in range(4):
            for column in self.columns[:: 1 if sweep % 2 == 0 else -1]:
                near = {i: np.concatenate([self.a[self.b == i], self.b[self.a == i]]) for i in column}
                means = {i: self.y[near[i]].mean() for i in column}
                self._spread(sorted(column, key=lambda i, means=means: means[i]))

    def _spread(self, column: Sequence[int]) -> None:
        step = max(2, (self.places - 1) // len(column))
        first = (self.places - 1 - step * (len(column) - 1)) // 2
        self.y[list(column)] = [(1 + first + i * step) * STEP for i in range(len(column))]

    def _improve(self) -> None:
        every = np.arange(1, self.places + 1) * float(STEP)
        work = 0
        for _ in range(6):
            before = self.y.copy()
            for node in range(len(self.names)):
                column = self.beside[node]
                others = [i for i in column if i != node]
                free = every[(np.abs(every[:, None] - self.y[others]) >= 2 * STEP).all(1)]
                tries = np.repeat(self.y[None], len(free) + len(others), 0)
                tries[: len(free), node] = free
                for row, other in zip(tries[len(free) :], others, strict=True):
                    row[[node, other]] = row[[other, node]]
                if len(tries) and work < MOST_WORK:
                    self.y = tries[int(np.argmin(self._costs(tries, np.array(column))))]
                    work += len(tries) * len(self.a) ** 2
            if (self.y == before).all():
                break
        for line in np.flatnonzero(self._under(np.arange(len(self.a)), self.y[None])[0].any(1)):
            self._bend(int(line))

    def _costs(self, y: Floats, column: Ints) -> Floats:
        """Of a column's nodes and their edges, for each of several layouts ``layout node``."""
        near = np.isin(self.a, column) | np.isin(self.b, column)
        lines, rest = np.flatnonzero(near), np.flatnonzero(~near)
        under = self._under(lines, y).sum((1, 2)) + self._under(rest, y)[:, :, column].sum((1, 2))
        crossed = self._crossings(lines, y)
        crossings = crossed.sum((1, 2)) - 0.5 * crossed[:, :, lines].sum((1, 2))
        x_gap = np.abs(self.x[column, None] - self.x)
        close = ((x_gap < self.wide + 3) & (np.abs(y[:, column, None] - y[:, None]) < TALL + 4)).sum((1, 2))
        steep = np.abs(y[:, self.a[lines]] - y[:, self.b[lines]]).sum(1) / 300
        outside = np.abs(y[:, column] - self.height / 2).sum(1) / 3000
        return 30 * close + 8 * under + crossings + steep + outside

    def _height(self, lines: Ints, x: Floats, y: Floats) -> Floats:
        """Of each of some lines at its own places, ``layout line place``."""
        x0, x1 = self.x[self.a[lines], None], self.x[self.b[lines], None] - self.wide / 2
        u = np.clip((x - x0) / (x1 - x0), 0, 1)
        y0, y1 = y[:, self.a[lines], None], y[:, self.b[lines], None] + self.port[lines, None]
        curved = 0.5 * u + 0.5 * (3 * u**2 - 2 * u**3)
        return y0 + (y1 - y0) * curved + self.bow[lines, None] * 4 * u * (1 - u)

    def _under(self, lines: Ints, y: Floats) -> Mask:
        """Which nodes a line passes under on its way, ``layout line node``."""
        x = np.broadcast_to(self.x, (len(lines), len(self.x)))
        between = (x > self.x[self.a[lines], None]) & (x < self.x[self.b[lines], None])
        return between & (np.abs(self._height(lines, x, y) - y[:, None]) < TALL / 2 + 5)

    def _crossings(self, lines: Ints, y: Floats) -> Mask:
        """Which of all lines each of some crosses, ``layout line line``."""
        every = np.arange(len(self.a))
        low = np.maximum(self.x[self.a[lines], None], self.x[self.a])
        high = np.minimum(self.x[self.b[lines], None], self.x[self.b]) - self.wide / 2
        first, last = (self._height(lines, x, y) - self._height(every, x.T, y).swapaxes(1, 2) for x in (low, high))
        return (low < high) & (first * last < 0)

    def _bend(self, line: int) -> None:
        costs: list[float] = []
        at, bows = np.array([line]), [side * size for size in (0.0, 1.0, 1.5, 2.0, 3.0) for side in (STEP, -STEP)]
        for bow in bows:
            self.bow[line] = bow
            tangle = 8 * self._under(at, self.y[None]).sum() + self._crossings(at, self.y[None]).sum()
            outside = np.abs(self.path(line)[1] - self.height / 2).max() > self.height / 2 - 4
            costs.append(float(tangle) + abs(bow) / 30 + 100 * outside)
        self.bow[line] = bows[int(np.argmin(costs))]


def _rank(node: str) -> tuple[int, bool, int]:
    return _layer(node), "." not in node, int(node.split(".h")[1]) if "." in node else 0


def _edge(figure: go.Figure, circuit: Circuit, link: Link, path: tuple[Floats, Floats], most: float) -> None:
    edge, sender, receiver, _ = link
    score = float(circuit.scores[edge])
    strength = abs(score) / most if most and score == score else 0.0
    figure.add_scatter(
        x=path[0], y=path[1], mode="lines", showlegend=False, opacity=0.65 + 0.3 * strength,
        line={
            "color": _color(score), "width": THINNEST + (WIDEST - THINNEST) * strength,
            "dash": DASH.get(kind_of(receiver), "solid"),
        },
        hovertemplate=(
            f"{sender} → {html.escape(receiver, quote=False)}<br>"
            f"{'no score' if score != score else f'score {score:.4g}'}<extra></extra>"
        ),
    )  # fmt: skip


def _color(score: float) -> str:
    return UNSCORED if score != score else POSITIVE if score >= 0 else NEGATIVE


def _node(figure: go.Figure, name: str, x: float, y: float, wide: float) -> None:
    w, h = wide / 2, TALL / 2
    fill, border = LOOKS[_kind(name)]
    corners = ((w - h, -h), (w, -h), (w, 0), (w, h), (w - h, h), (h - w, h), (-w, h), (-w, 0), (-w, -h), (h - w, -h))
    pill = "M{} Q{} {} Q{} {} L{} Q{} {} Q{} {} Z".format(*(f"{x:g},{y:g}" for x, y in corners))
    box = {"type": "rect", "x0": -w, "x1": w, "y0": -h, "y1": h}
    outline = {"type": "path", "path": pill} if "." in name else box
    figure.add_shape(
        **outline, xsizemode="pixel", ysizemode="pixel", xanchor=x, yanchor=y, layer="above", fillcolor=fill,
        line={"color": border, "width": 1.2}, label={"text": name, "font": {"size": 10.5, "color": "#222"}},
    )  # fmt: skip


def _columns(figure: go.Figure, place: _Layout) -> None:
    """A pale band for each layer, and its name below."""
    spans = _spans(place)
    middles = [(min(xs) + max(xs)) / 2 for xs in spans.values()]
    margin = min(place.wide / 2 + 5, place.gap / 2 - 2)
    for xs in spans.values():
        figure.add_shape(
            type="rect", x0=min(xs) - margin, x1=max(xs) + margin, y0=0, y1=1, yref="paper",
            layer="below", fillcolor="#f6f6f6", line={"width": 0},
        )  # fmt: skip
    roomy = all(b - a > 52 for a, b in pairwise(middles))
    figure.update_xaxes(
        range=[0, place.width], showgrid=False, zeroline=False, tickangle=0, tickvals=middles, fixedrange=True,
        ticktext=[f"layer {layer}" if roomy else str(layer) for layer in spans], title=None if roomy else "layer",
        tickfont={"size": 11}, title_font={"size": 11}, title_standoff=4,
    )  # fmt: skip
    figure.update_yaxes(range=[0, place.height], visible=False, fixedrange=True)


def _legend(figure: go.Figure, circuit: Circuit, drawn: Sequence[int], place: _Layout) -> None:
    """Of what there is: kinds of nodes, signs, kinds of receivers."""
    nodes = {_kind(name) for name in place.names}
    for kind, (fill, border) in LOOKS.items():
        if kind in nodes:
            symbol = "circle" if kind == "head" else "square"
            marker = {"symbol": symbol, "size": 12, "color": fill, "line": {"color": border, "width": 1.2}}
            figure.add_scatter(x=[None], y=[None], mode="markers", marker=marker, name=kind)
    colors = {_color(float(score)) for score in circuit.scores[drawn]}
    for color, name in SIGNS:
        if color in colors:
            line = {"color": color, "width": 3}
            figure.add_scatter(x=[None], y=[None], mode="lines", line=line, name=name)
    for kind, name in _into(circuit, drawn):
        line = {"color": "#555555", "width": 2, "dash": DASH.get(kind, "solid")}
        figure.add_scatter(x=[None], y=[None], mode="lines", line=line, name=name)


def _spans(place: _Layout) -> dict[int, list[float]]:
    """Where the columns of each layer are."""
    spans: dict[int, list[float]] = {}
    for name, x in zip(place.names, place.x.tolist(), strict=True):
        if name not in ("embed", "logits"):
            spans.setdefault(_layer(name), []).append(x)
    return spans


def _into(circuit: Circuit, drawn: Sequence[int]) -> list[tuple[str, str]]:
    """(kind, what the line says) of receivers that there are; those of solid lines are one."""
    kinds = {kind_of(circuit.graph.receivers[r]) for r in circuit.graph.ends[1][drawn]}
    solid = [name for kind, name in (("q", "queries"), ("mlp", "MLPs"), ("logits", "logits")) if kind in kinds]
    out = [("q", f"into {', '.join(solid)}")] if solid else []
    return out + [(kind, name) for kind, name in (("k", "into keys"), ("v", "into values")) if kind in kinds]


def as_networkx(circuit: Circuit) -> nx.MultiDiGraph:
    """See `Circuit.to_networkx`."""
    graph = nx.MultiDiGraph()
    graph.add_nodes_from(circuit.nodes)
    for edge, sender, receiver, node in circuit.links():
        about = {"kind": kind_of(receiver), "score": float(circuit.scores[edge])}
        graph.add_edge(sender, node, key=receiver, receiver=receiver, **about)
    return graph


def write_dot(circuit: Circuit) -> str:
    """See `Circuit.dot`."""
    lines = ["digraph circuit {", "  rankdir=LR;", f"  label={_quoted(circuit.title)};"]
    lines += [f"  {_quoted(node)} [shape={'ellipse' if '.' in node else 'box'}];" for node in circuit.nodes]
    most = float(np.nanmax(np.abs(circuit.scores[circuit.kept]), initial=0)) or 1.0
    for edge, sender, receiver, node in circuit.links():
        score, style = float(circuit.scores[edge]), {"k": "dashed", "v": "dotted"}.get(kind_of(receiver), "solid")
        said = {"receiver": receiver, "color": _color(score), "style": style}
        if score == score:
            said |= {"score": repr(score), "penwidth": f"{0.5 + 4 * abs(score) / most:.2f}"}
        written = ", ".join(f"{name}={_quoted(value)}" for name, value in said.items())
        lines.append(f"  {_quoted(sender)} -> {_quoted(node)} [{written}];")
    return "\n".join([*lines, "}"]) + "\n"


_STRING = r'"(?:[^"\\]|\\.)*"'
_EDGE = re.compile(rf"\s*({_STRING})\s*->\s*({_STRING})\s*\[(.*)\];?\s*")
_ATTRIBUTE = re.compile(rf"(\w+)=({_STRING})")


def read_dot(text: str, graph: Graph) -> tuple[Floats, Mask]:
    """Scores and kept of `write_dot`'s text. See `Circuit.from_dot`."""
    lines = text.strip().splitlines()
    if not lines or not lines[0].startswith("digraph") or lines[-1].strip() != "}":
        raise OutputError("the text is no whole digraph; give what Circuit.dot wrote")
    scores, kept = np.full(len(graph), np.nan), np.zeros(len(graph), bool)
    for number, line in enumerate(lines, 1):
        if not re.match(rf"\s*{_STRING}\s*->", line):
            continue
        try:
            match = _EDGE.fullmatch(line)
            if match is None:
                raise ValueError("it has no attributes")
            said = {name: _unquoted(value) for name, value in _ATTRIBUTE.findall(match[3])}
            edge = graph.edge(_unquoted(match[1]), said["receiver"])
            if _unquoted(match[2]) not in graph.nodes_of(said["receiver"]):
                raise ValueError(f"{said['receiver']} is not read by {_unquoted(match[2])}")
            kept[edge], scores[edge] = True, float(said.get("score", "nan"))
            if np.isinf(scores[edge]):
                raise ValueError("its score is infinite")
        except (NeedsError, KeyError, ValueError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise OutputError(f"line {number} of the DOT text is no edge of this graph ({what})") from error
    return scores, kept


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + " ".join(escaped.splitlines()) + '"'


def _unquoted(text: str) -> str:
    return re.sub(r"\\(.)", r"\1", text[1:-1])


def write_json(circuit: Circuit) -> str:
    """The circuit as JSON; single precision is written as such, which takes half the digits."""
    single = circuit.scores.astype(np.float32)
    exact = np.array_equal(single.astype(np.float64), circuit.scores, equal_nan=True)
    scores = [float(str(s)) for s in single] if exact else circuit.scores.tolist()
    content = {
        "format": FORMAT,
        "graph": {name: getattr(circuit.graph, name) for name in SIZES},
        "meta": encode(circuit.meta, "meta"),
        "kept": np.flatnonzero(circuit.kept).tolist(),
        "dtype": "float32" if exact else "float64",
        "scores": [None if s != s else s for s in scores],
    }
    return json.dumps(content, separators=(",", ":"), allow_nan=False) + "\n"


def read_json(path: str | Path) -> tuple[Graph, Floats, Mask, dict[str, Any]]:
    """What `write_json` wrote. See `Circuit.load`."""
    try:
        content = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}")
        sizes, scores, kept = [content["graph"][name] for name in SIZES[:3]], content["scores"], content["kept"]
        if not all(type(n) is int and 0 < n <= len(scores) for n in sizes) or sizes[0] * sizes[1] > len(scores):
            raise ValueError(f"no model with {len(scores):,} edges has the sizes {sizes}")
        graph = Graph(sizes[0], sizes[1], sizes[2], bool(content["graph"]["ungrouped"]))
        if sizes[1] % sizes[2] or len(graph) != len(scores):
            raise ValueError(f"it has {len(scores):,} scores for {len(graph):,} edges")
        if not all(s is None or (type(s) is float and math.isfinite(s)) for s in scores):
            raise ValueError("a score is no finite number")
        if not all(type(i) is int and 0 <= i < len(scores) for i in kept) or [*kept] != sorted(set(kept)):
            raise ValueError("kept holds what is no number of an edge")
        mask = np.zeros(len(scores), bool)
        mask[kept] = True
        values = np.array(
            [np.nan if s is None else s for s in scores], {"float32": np.float32}.get(content["dtype"], float)
        )
        return graph, values.astype(np.float64), mask, decode(content["meta"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        said = f"no {error}" if isinstance(error, KeyError) else getattr(error, "strerror", None) or str(error)
        raise OutputError(f"{path} holds no circuit ({said}); give a file that Circuit.save wrote") from error
