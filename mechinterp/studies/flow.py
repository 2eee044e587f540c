"""Information flow: at which layers an answer leaves the subject, and by which attention it reaches the end."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from mechinterp import sites
from mechinterp.analyzers.tracing import EARLIER, ROLES, START, CausalTracing, roles_of, subject_spans
from mechinterp.core.display import ROWS, count, html_table
from mechinterp.core.examples import Examples
from mechinterp.core.interventions import Knockout
from mechinterp.core.metrics import answer_prob
from mechinterp.core.result import Result
from mechinterp.core.statistics import MIN_EXAMPLES, summarize
from mechinterp.core.tokens import Tokens
from mechinterp.engine.rows import sweep
from mechinterp.engine.runner import Progress, run
from mechinterp.errors import NeedsError, OutputError
from mechinterp.model.model import Model, as_examples

if TYPE_CHECKING:
    import networkx as nx
    import plotly.graph_objects as go
    from matplotlib.figure import Figure

Mask = npt.NDArray[np.bool_]

ALL_ROLES = (START, EARLIER, *ROLES)
RECEIVERS = ROLES[2:]
"""Whose attention is cut: the last subject token, and all roles after it."""
ALPHA = 0.05
LARGEST = 5
"""Arrows of a figure where none is significant."""
_FORMAT = "mechinterp-flow-1"


@dataclass(frozen=True, eq=False)
class Flow:
    """Which states and which attention carry an answer from the subject to the end of a prompt.

    Attributes:
        nodes: a row for each ``role, layer``: ``effect``, how much of the answer's probability a clean
            state there restores, with ``ci_low, ci_high, p, q`` (see `CausalTracing`).
        edges: a row for each ``sender, receiver, layer``: ``drop``, the share of the answer's probability
            that is lost when the receiver's tokens cannot attend to the sender's in the window of layers
            around it (negative where it rises), with ``ci_low, ci_high, p, q``.
        meta: model, window, number of examples, how many were skipped, ``clean`` and ``noised``
            probability, and where the numbers come from.
    """

    nodes: pd.DataFrame
    edges: pd.DataFrame
    meta: Mapping[str, Any]

    @property
    def significant(self) -> bool:
        """Whether some knock-out among those that could be `strongest` has q < .05."""
        return bool((self._losses["q"] < ALPHA).any())

    @property
    def strongest(self) -> pd.DataFrame:
        """Of each sender and receiver, the layer whose knock-out costs most; largest first.

        Only those with q < .05; where there is none, the five largest. Never among them: a knock-out that
        raises the probability, and one of attention to the prompt's first token, which is often a sink
        that heads attend to when they do nothing, so that without it they do what they never did.
        `edges` has both.
        """
        frame: Any = self._losses
        if self.significant:
            frame = frame[frame["q"] < ALPHA]
        frame = frame.sort_values("drop", ascending=False, kind="stable").drop_duplicates(["sender", "receiver"])
        return (frame if self.significant else frame.head(LARGEST)).reset_index(drop=True)

    @property
    def _losses(self) -> pd.DataFrame:
        frame: Any = self.edges[(self.edges["drop"] > 0) & (self.edges["sender"] != START)]
        return frame

    def graph(self) -> "nx.DiGraph":
        """Nodes ``(role, layer)`` with ``effect, q``; edges between roles of one layer with ``drop, p, q, matters``.

        Every knock-out that was made is an edge, at the middle layer of its window; ``matters`` says
        whether q < .05. Tokens before the subject have effect 0: noise does not reach them.
        """
        import networkx as nx

        graph = nx.DiGraph()
        for row in self.nodes.to_dict("records"):
            graph.add_node((row["role"], row["layer"]), effect=row["effect"], q=row["q"])
        for row in self.edges.to_dict("records"):
            for role in (row["sender"], row["receiver"]):
                if (role, row["layer"]) not in graph:
                    graph.add_node((role, row["layer"]), effect=0.0, q=float("nan"))
            numbers = {name: row[name] for name in ("drop", "ci_low", "ci_high", "p", "q")}
            matters = bool(row["q"] < ALPHA)
            graph.add_edge((row["sender"], row["layer"]), (row["receiver"], row["layer"]), **numbers, matters=matters)
        return graph

    def figure(self) -> "go.Figure":
        """Layers upward, roles in columns: restored effects as dots, the `strongest` knock-outs as arrows.

        An arrow rises from the first to the last layer of the window whose knock-out costs most.
        """
        from mechinterp.studies.flow_figure import flow_figure

        return flow_figure(self)

    def picture(self) -> "Figure":
        """The same drawn by matplotlib, for ``savefig`` as PNG, SVG or PDF."""
        from mechinterp.studies.flow_figure import flow_picture

        return flow_picture(self)

    @property
    def caption(self) -> str:
        """What the figure shows, in words."""
        used = self.meta["examples"] - self.meta["skipped"]
        if self.significant:
            shown = f"q < {ALPHA}"
        elif np.isfinite(self.edges["q"].to_numpy(float)).any():
            shown = f"none has q < {ALPHA}: the largest, pale"
        else:
            shown = f"the largest, pale: under {MIN_EXAMPLES} prompts nothing is tested"
        return (
            f"{count(used, 'prompt')}, {self.meta['skipped']} skipped. Dots: probability restored by a clean state."
            f" Arrows: probability lost without this attention, where a cut of {self.meta['window']} layers costs most"
            f" ({shown}; cuts to the first token are left out)"
        )

    def save(self, path: str | Path) -> Path:
        """Write tables and provenance as one JSON file; `load` reads it back.

        Raises:
            OutputError: the file cannot be written.
        """
        tables = {
            name: json.loads(getattr(self, name).to_json(orient="split", double_precision=15)) for name in _TABLES
        }
        content = {"format": _FORMAT, **tables, "meta": dict(self.meta)}
        try:
            Path(path).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"cannot write {path} ({error.strerror}); choose another file") from error
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> "Flow":
        """Read back what `save` wrote.

        Raises:
            OutputError: there is no such file, or it holds something else.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content["format"] != _FORMAT:
                raise ValueError(f"its format is {content['format']!r}")
            nodes, edges = (_table(content[name]) for name in _TABLES)
            return cls(nodes, edges, content["meta"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OutputError(f"{path} holds no flow ({error}); give a file that Flow.save wrote") from error

    def __repr__(self) -> str:
        return f"Flow of {self.meta['model']} ({self.caption})\n{self.strongest.to_string(index=False)}"

    def _repr_html_(self) -> str:
        frame = self.strongest
        shown = [list(row) for row in frame.head(ROWS).itertuples(index=False, name=None)]
        caption = f"Flow of {self.meta['model']}: {self.caption}"
        return html_table([str(c) for c in frame.columns], shown, caption, max(0, len(frame) - ROWS))


_TABLES = ("nodes", "edges")
_NUMBERS = {"effect", "drop", "ci_low", "ci_high", "p", "q"}


def _table(saved: Mapping[str, Any]) -> pd.DataFrame:
    """What pandas wrote as JSON by ``orient="split"``; null is NaN."""
    frame = pd.DataFrame(saved["data"], columns=saved["columns"])
    return frame.astype(dict.fromkeys(_NUMBERS & {*saved["columns"]}, float))


def trace_information_flow(
    model: Model,
    examples: Any,
    subject: str = "subject",
    *,
    window: int = 9,
    layers: tuple[int, ...] | None = None,
    copies: int = 10,
    noise: float = 3.0,
    skip_wrong: bool = True,
    engine: str = "packed",
    batch_size: int | None = None,
    seed: int = 0,
    progress: Progress | bool = False,
) -> Flow:
    """Which positions and layers carry the answer, from the subject to the end of the prompt.

    Two experiments on the same prompts. Causal tracing of states (Meng et al. 2022) says where the
    subject's information is: `mechinterp.CausalTracing`, by layer and by the token's role. Attention
    knock-out (Geva et al. 2023, "Dissecting recall of factual associations") says how it gets there:
    tokens of one role can no longer attend to those of another, in a window of layers around each
    layer; ``drop`` is (clean - cut) / clean, of the answer's probability, mean over examples. Receivers
    are the last subject token and the roles after it; senders are all roles before the receiver (the
    prompt's first token is one of its own, if it is not the subject's). What a role's tokens say to each
    other is not cut. Intervals, p (sign flips, NaN below six examples) and q are over
    all cells of each experiment. Prompts whose top token is no right answer are skipped in both.

    Args:
        examples: with answers, and a span or position that names the subject.
        window: layers cut together, [layer - window // 2, layer + window - window // 2).
        layers: middles of the windows, and layers whose states are restored; None for all.
        copies, noise, skip_wrong: as for `mechinterp.CausalTracing`.
        engine, batch_size, seed, progress: as for `mechinterp.run`.
    Raises:
        ExamplesError: no subject of that name, no answers, or the model gets none right.
        NeedsError: an option that is none.
    """
    depth = model.dims.n_layers
    chosen = tuple(range(depth)) if layers is None else tuple(layers)
    if window < 1:
        raise NeedsError(f"The window of trace_information_flow must be at least 1. Got {window}")
    if not chosen or not set(chosen) <= set(range(depth)):
        raise NeedsError(f"The layers of trace_information_flow must be some of 0 to {depth - 1}. Got {chosen}")
    tokens = model.tokenize(as_examples(examples))
    roles = roles_of(tokens, subject, max(tokens.lengths))
    has = {role: (roles == role).any(1) for role in ALL_ROLES}
    named = _named(tokens, subject, roles)
    asked = CausalTracing("subject", ("states",), copies=copies, noise=noise, layers=chosen, skip_wrong=skip_wrong)
    options: dict[str, Any] = {"engine": engine, "batch_size": batch_size, "seed": seed, "progress": progress}
    traced = run(model, named, asked, **options)
    correct: Mask = traced.data["correct"].values
    pairs = [
        (sender, receiver)
        for receiver in RECEIVERS
        for sender in ALL_ROLES[: ALL_ROLES.index(receiver)]
        if (has[sender] & has[receiver] & correct).any()
    ]
    cuts = {
        (sender, receiver, layer): Knockout(sites.scores(_around(layer, window, depth), positions=receiver), sender)
        for sender, receiver in pairs
        for layer in chosen
    }
    edges = _edges(model, named, cuts, has, correct, options) if cuts else pd.DataFrame(columns=_EDGES)
    nodes: Any = traced.table("effect")[["role", "layer", "effect", "ci_low", "ci_high", "p", "q"]]
    return Flow(nodes, edges, _meta(traced, subject, window, depth))


_EDGES = ["sender", "receiver", "layer", "drop", "ci_low", "ci_high", "p", "q"]


def _edges(
    model: Model,
    named: Examples,
    cuts: Mapping[tuple[str, str, int], Knockout],
    has: Mapping[str, Mask],
    correct: Mask,
    options: Mapping[str, Any],
) -> pd.DataFrame:
    """Every knock-out's drop, over the examples that have both roles."""
    labels = {f"{sender} > {receiver} at {layer}": cut for (sender, receiver, layer), cut in cuts.items()}
    swept = sweep(model, named, labels, answer_prob(), base="clean", **options).data
    clean = swept["base"].values.astype(np.float64)[:, None]
    there = np.stack([has[sender] & has[receiver] & correct for sender, receiver, _ in cuts], 1)
    values = swept["value"].transpose("example", "row").values
    drop = summarize(np.where(there, (clean - values) / np.where(clean > 0, clean, np.nan), np.nan), options["seed"])
    numbers = {"drop": drop.mean, "ci_low": drop.ci_low, "ci_high": drop.ci_high, "p": drop.p, "q": drop.q}
    return pd.DataFrame(list(cuts), columns=_EDGES[:3]).assign(**numbers)


def _around(layer: int, window: int, depth: int) -> list[int]:
    """The layers of a window, cut off at both ends of the model."""
    return list(range(max(0, layer - window // 2), min(depth, layer + window - window // 2)))


def _named(tokens: Tokens, subject: str, roles: npt.NDArray[Any]) -> Examples:
    """The same prompts as token ids, with a span for every role; where an example has none, its first token stands in.

    What stands in is left out of every mean.
    """
    spans = {"subject": subject_spans(tokens, subject)}
    for role in ALL_ROLES:
        found = [np.flatnonzero(row == role) for row in roles]
        spans[role] = tuple((int(at[0]), int(at[-1]) + 1) if len(at) else (0, 1) for at in found)
    return Examples(tokens.ids, answers=tokens.answers, spans=spans)


def _meta(traced: Result, subject: str, window: int, depth: int) -> dict[str, Any]:
    kept = ("model", "model_hash", "dtype", "device", "versions", "seed", "skipped", "sigma", "noise_std")
    numbers = {name: float(traced.data[name].mean()) for name in ("clean", "noised")}
    found = {"subject": subject, "window": window, "n_layers": depth, "examples": traced.data.sizes["example"]}
    return {name: traced.meta[name] for name in kept} | found | numbers
