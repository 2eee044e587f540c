"""Circuit: the edges of a model that a behaviour needs, with their scores."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import stats

from mechinterp.core.display import ROWS, count, html_table
from mechinterp.core.graph import Graph, Ints
from mechinterp.core.metrics import Metric
from mechinterp.core.result import Result
from mechinterp.errors import NeedsError
from mechinterp.model.model import Model
from mechinterp.report.files import write_file

if TYPE_CHECKING:
    import networkx as nx
    import plotly.graph_objects as go

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]
Meta = Mapping[str, Any]

STABLE = 0.8
"""Mean Jaccard index of resampled circuits from which on a circuit is called stable."""
SIZES = ("n_layers", "n_heads", "n_kv_heads", "ungrouped")


@dataclass(frozen=True, eq=False, init=False, repr=False)
class Circuit:
    """Some of a model's edges, and the scores of all.

    Attributes:
        graph: the nodes and edges of the model.
        scores: of every edge, ``edge``, with sign: positive where the edge helps; NaN where not scored.
        kept: which edges are in the circuit, ``edge``; by default all that have a score.
        meta: model, method, metric, number of examples, and where else the numbers come from; with what
            `stability` found (``replace(circuit, meta={**circuit.meta, **circuit.stability(...)})``) an
            unstable circuit says that it is.
    """

    graph: Graph
    scores: Floats
    kept: Mask
    meta: Meta

    def __init__(
        self, graph: Graph, scores: npt.ArrayLike, kept: npt.ArrayLike | None = None, meta: Meta | None = None
    ) -> None:
        """Copy what is given.

        Raises:
            NeedsError: not one number, or not one bool, for each edge; an infinite score.
        """
        values = np.array(scores, np.float64)
        mask = np.isfinite(values) if kept is None else np.array(kept)
        for name, array, kind in (("scores", values, "float64"), ("kept", mask, "bool")):
            if array.shape != (len(graph),) or array.dtype != kind:
                found = f"{array.dtype} of shape {array.shape}"
                raise NeedsError(
                    f"The {name} of Circuit must be {len(graph):,} {kind}s, one for each edge. Got {found}"
                )
            array.flags.writeable = False
        if np.isinf(values).any():
            infinite = int(np.isinf(values).sum())
            raise NeedsError(f"{count(infinite, 'score')} of infinite size; score in float32, or give NaN to leave out")
        for name, value in (("graph", graph), ("scores", values), ("kept", mask), ("meta", dict(meta or {}))):
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, result: Result) -> "Circuit":
        """All edges that a result scores, such as that of EdgeAttribution.

        Raises:
            NeedsError: it has no variable ``score`` on ``edge``, or not the sizes of the model.
        """
        data, wanted = result.data, ("score", "sender", "receiver", *SIZES)
        lacking = [name for name in wanted if name not in data.variables and name not in data.attrs]
        if lacking:
            raise NeedsError(f"the result has no {', '.join(lacking)}; give one that scores edges")
        graph = Graph(**{name: int(data.attrs[name]) for name in SIZES[:3]}, ungrouped=bool(data.attrs["ungrouped"]))
        found, senders, receivers = data["score"], data["sender"].values, data["receiver"].values
        if found.dims != ("edge",):
            raise NeedsError(f"score has axes {found.dims}, not ('edge',); take its mean over the others")
        scores = np.full(len(graph), np.nan)
        scores[[graph.edge(str(s), str(r)) for s, r in zip(senders, receivers, strict=True)]] = found.values
        options = result.meta.get("options", {})  # as text, strings in quotes
        chosen = {name: options[name].strip("'") for name in ("method", "metric") if name in options}
        return cls(graph, scores, meta={**result.meta, **chosen})

    def top(self, n: int | float, absolute: bool = True) -> "Circuit":
        """The `n` best of all edges that have a score, kept here or not.

        Args:
            n: how many; or, as a float, the share of the model's edges (1.0: all that have a score).
            absolute: best is largest in size; False: most positive. Of equals, the one numbered first.
        Raises:
            NeedsError: `n` is no such number.
        """
        return self._with(_top(self.scores, _amount(n, self.scores), absolute))

    def prune(self) -> "Circuit":
        """Without edges on no path from ``embed`` to ``logits``; alike in effect, where cuts carry corrupted values."""
        kept = self.kept & _on_paths(self.graph, self.kept)
        return Circuit(self.graph, self.scores, kept, self.meta)  # what was unstable still is

    def __and__(self, other: "Circuit") -> "Circuit":
        return self._with(self.kept & self._alike(other).kept)

    def __or__(self, other: "Circuit") -> "Circuit":
        """Edges of either; scores of the other where there is none here."""
        scores = np.where(np.isnan(self.scores), self._alike(other).scores, self.scores)
        return Circuit(self.graph, scores, self.kept | other.kept, _unjudged(self.meta))

    def __sub__(self, other: "Circuit") -> "Circuit":
        return self._with(self.kept & ~self._alike(other).kept)

    def __len__(self) -> int:
        """How many edges are in the circuit."""
        return int(self.kept.sum())

    def __contains__(self, edge: tuple[str, str]) -> bool:
        """Whether ``(sender, receiver)`` is in the circuit; NeedsError where the model has no such edge."""
        return bool(self.kept[self.graph.edge(*edge)])

    @property
    def nodes(self) -> tuple[str, ...]:
        """Every node at an end of an edge of the circuit, in the order of the pass.

        An edge into the keys or values of a group leads to those heads of the group that another edge
        brings into the circuit; to all of them where none does.
        """
        there = {*self.graph.ends[0][self.kept].tolist(), *(node for fed in self._fed.values() for node in fed)}
        names = (*self.graph.senders, "logits")
        return tuple(names[i] for i in sorted(there))

    @property
    def edges(self) -> pd.DataFrame:
        """A row for each edge of the circuit: ``sender, receiver, score``; largest size first."""
        return self._frame(self.kept)

    def table(self) -> pd.DataFrame:
        """A row for each edge that has a score or is kept: ``sender, receiver, score, kept``; largest size first."""
        some = self.kept | np.isfinite(self.scores)
        return self._frame(some).assign(kept=self.kept[self._order(some)])

    def by_node(self) -> pd.DataFrame:
        """Sums of score sizes over the circuit's edges: ``node, outgoing, incoming``, in the order of the pass.

        An edge into the keys or values of a group counts in full for every head that it leads to.
        """
        return pd.DataFrame(_sums(self), columns=["node", "outgoing", "incoming"])

    def overlap(self, other: "Circuit") -> dict[str, float]:
        """How alike two circuits of one graph are.

        Returns:
            ``edges, nodes``: Jaccard indices (1 of two empty circuits); ``shared, only_here, only_there``:
            numbers of edges; ``spearman``: of the scores of all edges that both score, kept or not.
        Raises:
            NeedsError: they are of different graphs.
        """
        return _overlap(self, self._alike(other))

    def stability(
        self, resampled: npt.ArrayLike | Result, n: int | float | None = None, absolute: bool = True
    ) -> dict[str, Any]:
        """Whether the best edges stay the best when the examples are drawn anew.

        Args:
            resampled: ``resample edge``; or a result of EdgeAttribution(intervals=True), to draw 50 times from.
            n, absolute: which are best, as for `top`; None: as many as are kept here.
        Returns:
            ``stability``: mean Jaccard index of the best edges over pairs of resamples; ``stable``:
            whether it is .8 or more; ``to_this``: mean Jaccard index with the best by `scores`;
            ``resamples``, ``n``.
        Raises:
            NeedsError: not such scores, or no such number.
        """
        return _stability(self, resampled, n, absolute)

    def faithfulness(self, model: Model, examples: Any, metric: Metric | None = None, **options: Any) -> Result:
        """See `mechinterp.studies.faithfulness`."""
        return self._tested("faithfulness", model, examples, metric, options)

    def curve(self, model: Model, examples: Any, metric: Metric | None = None, **options: Any) -> Result:
        """CPR and CMD: see `mechinterp.studies.faithfulness_curve`."""
        return self._tested("faithfulness_curve", model, examples, metric, options)

    def completeness(self, model: Model, examples: Any, metric: Metric | None = None, **options: Any) -> Result:
        """See `mechinterp.studies.completeness`."""
        return self._tested("completeness", model, examples, metric, options)

    def minimality(self, model: Model, examples: Any, metric: Metric | None = None, **options: Any) -> Result:
        """See `mechinterp.studies.minimality`."""
        return self._tested("minimality", model, examples, metric, options)

    def _tested(self, how: str, model: Model, examples: Any, metric: Metric | None, options: Meta) -> Result:
        from mechinterp.studies import evaluation

        return getattr(evaluation, how)(self, model, examples, metric, **options)

    @property
    def unstable(self) -> bool:
        """Whether `meta` says so: a ``stability`` under .8."""
        return bool(self.meta.get("stability", 1.0) < STABLE)

    def to_networkx(self) -> "nx.MultiDiGraph":
        """`nodes`, and between them ``score, receiver`` and ``kind``: q, k, v, mlp or logits; keys are receivers.

        An edge into the keys or values of a group is there once for every head that it leads to.
        """
        from mechinterp.studies.circuit_figure import as_networkx

        return as_networkx(self)

    def dot(self) -> str:
        """As text for Graphviz, which `from_dot` reads back."""
        from mechinterp.studies.circuit_figure import write_dot

        return write_dot(self)

    @classmethod
    def from_dot(cls, text: str, graph: Graph) -> "Circuit":
        """What `dot` wrote: the same edges, and their scores.

        Raises:
            OutputError: the text is not of that form, or names edges that `graph` lacks.
        """
        from mechinterp.studies.circuit_figure import read_dot

        return cls(graph, *read_dot(text, graph))

    def save(self, path: str | Path) -> Path:
        """Write the circuit as one JSON file, which `load` reads back; an earlier file is replaced.

        Raises:
            OutputError: it cannot be written, or `meta` holds what JSON cannot.
        """
        from mechinterp.studies.circuit_figure import write_json

        write_file(path, write_json(self))
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> "Circuit":
        """Read back what `save` wrote.

        Raises:
            OutputError: there is no such file, or it holds something else.
        """
        from mechinterp.studies.circuit_figure import read_json

        return cls(*read_json(path))

    def figure(self, max_edges: int = 60) -> "go.Figure":
        """Layers from left to right, edges coloured by sign and as wide as their scores.

        Args:
            max_edges: of a larger circuit the strongest are drawn, and the figure says so.
        Raises:
            NeedsError: `max_edges` is under 1.
        """
        from mechinterp.studies.circuit_figure import circuit_figure

        return circuit_figure(self, max_edges)

    @property
    def caption(self) -> str:
        """What the circuit is, in words."""
        return _caption(self)

    @property
    def title(self) -> str:
        return f"Circuit of {self.meta['model']}" if "model" in self.meta else "Circuit"

    def links(self) -> list[tuple[int, str, str, str]]:
        """(number, sender, receiver, node) of every edge and each node that it leads to; largest scores first."""
        names = (*self.graph.senders, "logits")
        senders, receivers = self.graph.ends
        return [
            (int(edge), names[senders[edge]], self.graph.receivers[receivers[edge]], names[node])
            for edge in self._order(self.kept)
            for node in self._fed[int(receivers[edge])]
        ]

    def __repr__(self) -> str:
        frame = self.edges
        more = f"\n… and {len(frame) - ROWS:,} more" if len(frame) > ROWS else ""
        return f"{self.title} ({self.caption})\n{frame.head(ROWS).to_string(index=False)}{more}"

    def _repr_html_(self) -> str:
        shown = [list(row) for row in self.edges.head(ROWS).itertuples(index=False, name=None)]
        head = ("sender", "receiver", "score")
        return html_table(head, shown, f"{self.title}: {self.caption}", max(0, len(self) - ROWS))

    @functools.cached_property
    def _fed(self) -> dict[int, tuple[int, ...]]:
        """Of each receiver in the circuit, the numbers of the nodes there that it feeds."""
        (senders, receivers), feeds = self.graph.ends, _feeds(self.graph)
        here = np.unique(receivers[self.kept]).tolist()
        others = {*senders[self.kept].tolist(), *(feeds[r][0] for r in here if len(feeds[r]) == 1)}
        return {r: tuple(node for node in feeds[r] if node in others) or feeds[r] for r in here}

    def _order(self, some: Mask) -> Ints:
        """Numbers of some edges, largest size first, those without a score last; of equals, the first first."""
        numbers = np.flatnonzero(some)
        size = np.nan_to_num(np.abs(self.scores[numbers]), nan=-1)
        return numbers[np.argsort(-size, kind="stable")]

    def _frame(self, some: Mask) -> pd.DataFrame:
        order = self._order(some)
        senders, receivers = (ends[order] for ends in self.graph.ends)
        rows = [(self.graph.senders[s], self.graph.receivers[r]) for s, r in zip(senders, receivers, strict=True)]
        return pd.DataFrame(rows, columns=["sender", "receiver"]).assign(score=self.scores[order])

    def _with(self, kept: Mask) -> "Circuit":
        return Circuit(self.graph, self.scores, kept, _unjudged(self.meta))

    def _alike(self, other: "Circuit") -> "Circuit":
        if other.graph != self.graph:
            raise NeedsError(f"circuits of different graphs cannot be compared: {self.graph} and {other.graph}")
        return other


@functools.lru_cache(maxsize=8)
def _feeds(graph: Graph) -> tuple[tuple[int, ...], ...]:
    """Of each receiver, the numbers of the nodes that it feeds; that of the logits is one past the senders."""
    numbers = {name: i for i, name in enumerate((*graph.senders, "logits"))}
    return tuple(tuple(numbers[node] for node in graph.nodes_of(r)) for r in graph.receivers)


def _on_paths(graph: Graph, kept: Mask) -> Mask:
    """Edges whose sender is reached from ``embed``, and from whose receiver the logits are."""
    reached, useful = (np.zeros(len(graph.senders) + 1, bool) for _ in range(2))
    reached[0] = useful[-1] = True
    into = [*zip(graph.starts.tolist(), graph.reach.tolist(), _feeds(graph), strict=True)]
    for start, reach, fed in into:  # in the order of the pass, so what is sent is settled before it is read
        if (kept[start : start + reach] & reached[:reach]).any():
            reached[list(fed)] = True
    for start, reach, fed in reversed(into):
        if useful[list(fed)].any():
            useful[:reach] |= kept[start : start + reach]
    senders, receivers = graph.ends
    leads = np.array([useful[list(fed)].any() for fed in _feeds(graph)])
    return reached[senders] & leads[receivers]


def _top(scores: Floats, n: int, absolute: bool) -> Mask:
    numbers = np.flatnonzero(np.isfinite(scores))
    values = np.abs(scores[numbers]) if absolute else scores[numbers]
    best = np.zeros(len(scores), bool)
    best[numbers[np.argsort(-values, kind="stable")[:n]]] = True
    return best


def _amount(n: int | float, scores: Floats) -> int:
    """How many edges `n` are, whether a count or a share."""
    scored = int(np.isfinite(scores).sum())
    if isinstance(n, Integral) and not isinstance(n, bool) and 0 <= n <= scored:
        return int(n)
    if isinstance(n, Real) and not isinstance(n, Integral) and 0 < n <= 1:
        return min(scored, max(1, round(float(n) * len(scores))))
    raise NeedsError(
        f"The n of a circuit's best edges must be a count up to {scored:,}, the edges that have a score,"
        f" or a share of all, a float in (0, 1]. Got {n!r}"
    )


def drawn_anew(scores: Floats | npt.NDArray[np.floating], resamples: int, seed: int = 0) -> Floats:
    """Mean scores of examples drawn with replacement, ``resample edge``, from ``example edge``."""
    n = len(scores)
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), resamples) @ np.asarray(scores, float) / n


def _stability(
    circuit: Circuit, resampled: npt.ArrayLike | Result, n: int | float | None, absolute: bool
) -> dict[str, Any]:
    if isinstance(resampled, Result):
        if "scores" not in resampled.data:
            raise NeedsError("stability needs scores of every example; run EdgeAttribution with intervals=True")
        resampled = drawn_anew(resampled.data["scores"].values, 50)
    rows = np.asarray(resampled, np.float64)
    if rows.ndim != 2 or rows.shape[1] != len(circuit.graph) or len(rows) < 2:
        raise NeedsError(
            f"The resampled of stability must be two or more rows of {len(circuit.graph):,} scores. Got {rows.shape}"
        )
    amount = min(_amount(len(circuit) if n is None else n, row) for row in (circuit.scores, *rows))
    pairs, to_this = _agreement(np.stack([_top(row, amount, absolute) for row in (circuit.scores, *rows)]))
    return {"stability": pairs, "stable": pairs >= STABLE, "to_this": to_this, "resamples": len(rows), "n": amount}


def _agreement(best: Mask) -> tuple[float, float]:
    """Mean Jaccard index of as many edges, ``resample edge``: over pairs but for the first; and with the first."""
    columns = best[:, best.any(0)].astype(np.float32)
    shared = columns @ columns.T
    jaccard = shared / np.maximum(2 * best[0].sum() - shared, 1) if best.any() else np.ones_like(shared)
    return float(jaccard[1:, 1:][np.triu_indices(len(best) - 1, 1)].mean()), float(jaccard[0, 1:].mean())


def _sums(circuit: Circuit) -> list[tuple[str, float, float]]:
    """Of each node, the sizes of the scores that leave it and that reach it."""
    sums = {node: [0.0, 0.0] for node in circuit.nodes}
    size = np.nan_to_num(np.abs(circuit.scores))
    for sender, edge in zip(circuit.graph.ends[0][circuit.kept], np.flatnonzero(circuit.kept), strict=True):
        sums[circuit.graph.senders[sender]][0] += float(size[edge])
    for edge, _, _, node in circuit.links():
        sums[node][1] += float(size[edge])
    return [(node, sent, received) for node, (sent, received) in sums.items()]


def _caption(circuit: Circuit) -> str:
    said = [f"{count(len(circuit), 'edge')} of {len(circuit.graph):,} between {count(len(circuit.nodes), 'node')}"]
    said += [f"{name} {circuit.meta[name]}" for name in ("analyzer", "method", "metric") if name in circuit.meta]
    kind = str(circuit.meta.get("circuit_type", "mixed"))
    said += [f"of type {kind.replace('_', ' ')}"] if kind != "mixed" else []
    said += [count(circuit.meta["examples"], "example")] if isinstance(circuit.meta.get("examples"), Integral) else []
    if circuit.unstable:
        said.append(f"unstable: resampled circuits overlap by {circuit.meta['stability']:.2f}, less than {STABLE}")
    return "; ".join(said)


def _overlap(a: Circuit, b: Circuit) -> dict[str, float]:
    nodes, others = {*a.nodes}, {*b.nodes}
    shared, either = int((a.kept & b.kept).sum()), int((a.kept | b.kept).sum())
    both = np.isfinite(a.scores) & np.isfinite(b.scores)
    x, y = a.scores[both], b.scores[both]
    rank: Any = stats.spearmanr(x, y) if len(x) > 1 and np.ptp(x) > 0 and np.ptp(y) > 0 else None
    jaccard = (shared / either, len(nodes & others) / len(nodes | others)) if either else (1.0, 1.0)
    counts = {"shared": shared, "only_here": len(a) - shared, "only_there": len(b) - shared}
    return {"edges": jaccard[0], "nodes": jaccard[1], **counts, "spearman": float(rank.statistic) if rank else np.nan}


def _unjudged(meta: Meta) -> dict[str, Any]:
    """Without what `Circuit.stability` found, which holds of one choice of edges."""
    return {name: value for name, value in meta.items() if name not in ("stability", "stable", "to_this", "resamples")}
