"""Circuit discovery: score edges, choose as few as do what the model does."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from mechinterp.analyzers.edges import EdgeAttribution
from mechinterp.analyzers.patching import ActivationPatching
from mechinterp.core.graph import Graph
from mechinterp.core.metrics import KL, Metric, logit_diff
from mechinterp.core.tokens import Tokens
from mechinterp.engine.edges import EdgeRuns, examples_at_once, graph_of, run_circuits
from mechinterp.engine.plan import Plan, PlannedPass
from mechinterp.engine.runner import Progress, provenance, run, shown
from mechinterp.errors import ExamplesError, NeedsError
from mechinterp.model.model import Model, as_examples
from mechinterp.studies.circuits import Circuit, drawn_anew
from mechinterp.studies.evaluation import shares

Method = Literal["eap", "eap-ig", "eap-ig-activations", "acdc", "activation-patching", "exact"]
Kind = Literal["mixed", "attention_only", "mlp_only"]

HELD = 4
"""Batches that ACDC keeps in memory."""

Mask = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.floating]


def discover(
    model: Model,
    pairs: Any,
    method: Method = "eap-ig",
    circuit_types: Sequence[Kind] = ("mixed",),
    *,
    metric: Metric | None = None,
    size: int | float | None = None,
    faithful: float = 0.85,
    steps: int = 5,
    ungrouped: bool = False,
    candidates: int = 300,
    threshold: float = 0.01,
    resamples: int = 20,
    batch_size: int | None = None,
    seed: int = 0,
    progress: Progress | bool = False,
) -> dict[str, Circuit]:
    """Find the circuit of a behaviour on pairs of prompts; one for each type.

    Edges are scored by one method, and the best (by size of score) are kept: as many as `size` says, or else the
    first, of sizes that grow by a quarter, whose faithfulness on these pairs reaches `faithful`. Edges on no
    path from the embedding to the logits are dropped. Where edges are scored by `mechinterp.EdgeAttribution`, the
    examples are drawn anew, and a circuit whose edges change too much (`Circuit.stability`) says so.

    - ``"eap"``, ``"eap-ig"``, ``"eap-ig-activations"``, ``"exact"``: `mechinterp.EdgeAttribution`.
    - ``"activation-patching"``: nodes by their exact effect when noised (`mechinterp.ActivationPatching`: heads,
      MLPs, embedding); an edge has the smaller score of its two ends.
    - ``"acdc"`` (Conmy et al. 2023): begins with the `candidates` best edges of "eap-ig", goes from the logits
      back through the receivers, and at each from its last sender to its first, and drops an edge where the KL
      divergence from the model's own prediction rises by less than `threshold`. The order is part of the
      result, and so are the candidates. Scores are those of "eap-ig"; `size` and `faithful` are not used.

    Args:
        circuit_types: ``"mixed"``; ``"attention_only"``, edges among embedding, heads and logits alone;
            ``"mlp_only"``, among embedding, MLPs and logits alone. What is left out carries corrupted values.
        metric: `logit_diff()` by default; what is scored, and what faithfulness is of.
        size: number of edges before those on no path are dropped, or as a float the share of all edges; all edges
            of a type that has fewer.
        steps, ungrouped: as for `mechinterp.EdgeAttribution`.
        threshold: ACDC's τ, in nats.
        resamples: how often examples are drawn anew for the stability of a circuit; 0 for none.
    Returns:
        circuit by type; its `meta` says method, metric, number of examples, ``faithfulness`` on these pairs, and
        for ACDC how many edges were tried.
    Raises:
        NeedsError: an unknown method or type, a number that is none, or scores that are not finite.
        ExamplesError: as `run`; pairs whose difference does not matter to the metric.
    """
    _check(method, circuit_types, candidates, threshold, faithful)
    chosen = metric or logit_diff()
    graph, tokens = Graph.of(model, ungrouped), model.tokenize(as_examples(pairs))
    graph_of(model, graph)
    if size is not None:
        Circuit(graph, np.zeros(len(graph))).top(size)  # what is no size is refused before the work
    with shown(progress) as told:
        options: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "progress": told or False}
        scores, drawn = _scores(model, pairs, graph, method, chosen, steps, resamples, options)
        if not np.isfinite(scores).all():
            raise NeedsError(
                f"{int((~np.isfinite(scores)).sum())} of {len(scores):,} edges have a score that is not finite; load"
                " the model in float32, or leave out the examples that overflow"
            )
        meta = provenance(model) | {"method": method, "metric": repr(chosen), "examples": len(tokens), "seed": seed}
        found: dict[str, Circuit] = {}
        for kind in circuit_types:
            allowed = _allowed(graph, kind)
            whole = Circuit(graph, np.where(allowed, scores, np.nan), meta=meta | {"circuit_type": kind})
            if method == "acdc":
                found[kind] = _acdc(model, tokens, whole, candidates, threshold, batch_size, told)
            elif size is not None:
                beyond = isinstance(size, int) and int(allowed.sum()) < size <= len(graph)
                found[kind] = whole.top(int(allowed.sum()) if beyond else size)
            else:
                found[kind] = _fewest(model, tokens, whole, chosen, faithful, batch_size, told)
            if drawn is not None and len(found[kind]):
                stability = found[kind].stability(np.where(allowed, drawn, np.nan))
                found[kind] = replace(found[kind], meta={**found[kind].meta, **stability})
            found[kind] = _judged(model, tokens, found[kind].prune(), chosen, batch_size, told)
    return found


def _check(method: str, types: Sequence[str], candidates: int, threshold: float, faithful: float) -> None:
    for name, given, known in (("method", (method,), get_args(Method)), ("circuit_types", types, get_args(Kind))):
        if isinstance(given, str) or not given or not {*given} <= {*known}:
            raise NeedsError(f"The {name} of discover must be some of {', '.join(map(repr, known))}. Got {given!r}")
    odd = [value for value in (candidates, threshold, faithful) if isinstance(value, bool | str) or value is None]
    if odd or candidates < 1 or threshold < 0 or not faithful > 0:
        raise NeedsError(
            "The candidates of discover must be at least 1, its threshold not under 0, its faithful above 0. Got"
            f" {candidates}, {threshold}, {faithful}"
        )


def _scores(
    model: Model,
    pairs: Any,
    graph: Graph,
    method: Method,
    metric: Metric,
    steps: int,
    resamples: int,
    options: dict[str, Any],
) -> tuple[Floats, Floats | None]:
    """Of every edge; and from examples drawn anew, ``resample edge``, where edges of each example are scored."""
    if method == "activation-patching":
        return edges_of_nodes(graph, node_effects(model, pairs, metric, options)), None
    how: Any = {"eap-ig": "eap-ig-inputs", "acdc": "eap-ig-inputs"}.get(method, method)
    drawing = resamples > 1 and method != "acdc"
    found = run(model, pairs, EdgeAttribution(how, metric, steps, graph.ungrouped, drawing), **options).data
    if not drawing or found.sizes["example"] < 2:
        return found["score"].values, None
    return found["score"].values, drawn_anew(found["scores"].values, resamples, options["seed"])


def node_effects(model: Model, pairs: Any, metric: Metric, options: dict[str, Any]) -> dict[str, float]:
    """What the metric loses, on average, when a node alone carries the corrupted run's value: exact, by node."""
    asked = [
        ActivationPatching("z", metric, positions=None, heads="each", direction="noise"),
        ActivationPatching("mlp_out", metric, positions=None, direction="noise"),
        ActivationPatching("embed", metric, positions=None, direction="noise"),
    ]
    heads, mlps, embed = (
        (result.data["clean"] - result.data["patched"]).mean("example")
        for result in run(model, pairs, asked, **options)
    )
    n = model.dims.n_layers
    out = {"embed": float(embed.values.reshape(-1)[0])}
    for i in range(n):
        out |= {f"a{i}.h{h}": float(heads.sel(layer=i, head=h)) for h in range(model.dims.n_heads)}
        out[f"m{i}"] = float(mlps.sel(layer=i))
    return out


def edges_of_nodes(graph: Graph, effects: dict[str, float]) -> Floats:
    """Each edge has the score of the end that is smaller in size; of a group's keys, the largest head is the end."""
    sender, receiver = graph.ends
    values = np.array([effects[name] for name in graph.senders])
    ends = [max((effects.get(node, np.inf) for node in graph.nodes_of(r)), key=abs) for r in graph.receivers]
    pair = np.stack([values[sender], np.array(ends)[receiver]])
    return np.take_along_axis(pair, np.abs(pair).argmin(0)[None], 0)[0]


def _allowed(graph: Graph, kind: Kind) -> Mask:
    """Edges of a type of circuit."""
    sender, receiver = graph.ends

    def other(name: str) -> bool:
        return name[0] == {"attention_only": "m", "mlp_only": "a"}.get(kind)

    senders, receivers = (np.array([other(name) for name in names]) for names in (graph.senders, graph.receivers))
    return ~(senders[sender] | receivers[receiver])


def _fewest(
    model: Model,
    tokens: Tokens,
    whole: Circuit,
    metric: Metric,
    faithful: float,
    batch_size: int | None,
    told: Progress | None,
) -> Circuit:
    """The smallest of growing circuits that is faithful enough; all edges, with a warning, where none is."""
    scored = int(np.isfinite(whole.scores).sum())
    sizes = [scored]
    while sizes[0] > 4:
        sizes.insert(0, int(sizes[0] / 1.25))
    sizes = [n for n in sizes if n >= min(4, scored)]
    for begin in range(0, len(sizes), 4):  # most circuits are small
        some = [whole.top(n) for n in sizes[begin : begin + 4]]
        for circuit, share in zip(some, _faithfulness(model, tokens, some, metric, batch_size, told), strict=True):
            if share >= faithful:
                return circuit
    warnings.warn(
        f"no circuit of type {whole.meta['circuit_type']} reaches a faithfulness of {faithful}; all its edges are kept",
        stacklevel=3,
    )
    return whole


def _faithfulness(
    model: Model,
    tokens: Tokens,
    circuits: Sequence[Circuit],
    metric: Metric,
    batch_size: int | None,
    told: Progress | None,
) -> Floats:
    kept = np.stack([circuit.kept for circuit in circuits])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is an error here
        found = shares(
            run_circuits(model, tokens, circuits[0].graph, kept, metric, batch_size=batch_size, progress=told)
        )
    if np.isnan(found).any():
        raise ExamplesError(
            "the corrupted prompts leave the metric as it is, so there is no circuit to find; give pairs whose"
            " difference matters to the metric"
        )
    return found


def _judged(
    model: Model, tokens: Tokens, circuit: Circuit, metric: Metric, batch_size: int | None, told: Progress | None
) -> Circuit:
    share = float(_faithfulness(model, tokens, [circuit], metric, batch_size, told)[0])
    return replace(circuit, meta={**circuit.meta, "faithfulness": share})


class _Divergence:
    """KL of circuits from the model's own prediction, mean over all examples.

    The first `HELD` batches stay in memory; the others are made anew each time, so that many examples take long
    rather than much memory.
    """

    def __init__(self, model: Model, tokens: Tokens, start: Circuit, batch_size: int | None) -> None:
        self.model, self.tokens, self.start = model, tokens, start
        self.batches = tokens.batches(batch_size or examples_at_once(model, tokens, start.graph))
        self.held = [self._runs(rows) for rows in self.batches[:HELD]]

    def _runs(self, rows: Sequence[int]) -> EdgeRuns:
        runs = EdgeRuns(self.model, self.tokens.batch(rows, self.model.device), self.start.graph, KL())
        runs.begin_from(self.start.kept)  # what is dropped later changes later layers only
        return runs

    def __call__(self, kept: Mask) -> float:
        total = sum(float(one.run(kept[None]).sum()) for one in self.held)
        for rows in self.batches[HELD:]:
            total += float(self._runs(rows).run(kept[None]).sum())
        return total / len(self.tokens)


def _acdc(
    model: Model,
    tokens: Tokens,
    whole: Circuit,
    candidates: int,
    threshold: float,
    batch_size: int | None,
    told: Progress | None,
) -> Circuit:
    """Drop edges from the logits back, one at a time, where the divergence hardly rises."""
    graph = whole.graph
    begun = whole.top(min(candidates, int(np.isfinite(whole.scores).sum()))).prune()
    kept, (sender, receiver) = begun.kept.copy(), graph.ends
    divergence = _Divergence(model, tokens, begun, batch_size)
    now = divergence(kept)
    edges = sorted(np.flatnonzero(kept).tolist(), key=lambda e: (-receiver[e], -sender[e]))
    if told is not None:
        rows, n = len(edges), graph.n_layers
        cost = rows * sum(tokens.lengths) * n
        line = PlannedPass("sweep", "ACDC", (), len(tokens), len(divergence.batches), n, 0, rows, cost, 0)
        told.begin(Plan((line,)), 1)
    for edge in edges:
        kept[edge] = False
        without = divergence(kept)
        if without - now < threshold:
            now = without
        else:
            kept[edge] = True
        if told is not None:
            told.advance("sweep_rows", 1)
    meta = {**whole.meta, "threshold": threshold, "tried": len(edges), "kl": now}
    return Circuit(graph, whole.scores, kept, meta)
