"""Does a circuit do what the model does? Faithfulness, its curve over sizes, completeness, minimality."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import xarray as xr

from mechinterp.core.metrics import Metric, logit_diff
from mechinterp.core.result import Result, View
from mechinterp.core.statistics import fdr, summarize
from mechinterp.engine.edges import CircuitScores, CutTo, Kept, run_circuits
from mechinterp.engine.runner import Progress, provenance, shown
from mechinterp.errors import NeedsError
from mechinterp.model.model import Model, as_examples
from mechinterp.studies.circuits import Circuit

FRACTIONS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares of all edges at which the curves of Mueller et al. 2025 (MIB) are taken."""
GUARD = 1e-3
"""Least difference between the whole model and the empty circuit for a share of it to mean anything."""
RESAMPLES = 2000

Floats = npt.NDArray[np.floating]


def faithfulness(
    circuit: Circuit,
    model: Model,
    examples: Any,
    metric: Metric | None = None,
    *,
    cut_to: CutTo = "corrupted",
    batch_size: int | None = None,
    seed: int = 0,
    progress: Progress | bool = False,
) -> Result:
    """(m(C) - m(∅)) / (m(full) - m(∅)), of means over examples (Wang et al. 2023; Hanna et al. 2024).

    Edges outside the circuit carry `cut_to`. 1: the circuit does what the model does; 0: no more than nothing
    does; above 1, or below 0, what was cut worked against it, or for it. NaN, with a warning, where the whole
    model and the empty circuit are nearer than 1e-3, so that there is nothing to share out.

    Result: ``faithfulness`` with ``ci_low, ci_high`` (bootstrap over examples), and by ``example`` the metric of
    the ``circuit``, of the ``full`` model and of the ``empty`` circuit.

    Args:
        examples: pairs, with what the metric needs. Others than the circuit was found on, to be fair to it.
        metric: `logit_diff()` by default.
        cut_to: the ``"corrupted"`` run's value, the clean run's ``"mean"`` over examples, or ``"zero"``.
    Raises:
        NeedsError: the circuit is of another model, or hooks are in force.
    """
    scores = _run(circuit, model, examples, circuit.kept[None], metric, cut_to, batch_size, progress)
    share, low, high = _shares(scores, seed)
    columns = {"faithfulness": share[0], "ci_low": low[0], "ci_high": high[0]}
    each = {"circuit": scores.values[0], "full": scores.full, "empty": scores.empty}
    data = xr.Dataset({**columns, **{name: ("example", value) for name, value in each.items()}})
    return Result(data, _meta("Faithfulness", circuit, model, metric, cut_to, seed))


def faithfulness_curve(
    circuit: Circuit,
    model: Model,
    examples: Any,
    metric: Metric | None = None,
    *,
    fractions: Sequence[float] = FRACTIONS,
    cut_to: CutTo = "corrupted",
    batch_size: int | None = None,
    seed: int = 0,
    progress: Progress | bool = False,
) -> Result:
    """Faithfulness of the best edges, for growing shares of all edges (Mueller et al. 2025, MIB).

    Once with the most positive scores first (``ranking`` "signed"), once with the largest in size ("absolute").

    Result: ``faithfulness`` with ``ci_low, ci_high`` by ``ranking, fraction``; ``edges``, how many that is; and
    by ``ranking`` the areas by the trapezoid rule on a linear axis from the first to the last fraction, with
    intervals: ``cpr`` = ∫ f (higher is better where signed edges are ranked) and ``cmd`` = ∫ |1 - f| (lower is
    better where sizes are). MIB reports CPR of the signed and CMD of the absolute ranking.

    Args:
        fractions: rising shares of all the model's edges, in (0, 1]. Where fewer have a score (a circuit of one
            type), all that have are kept from there on; compare areas of circuits that score the same edges.
        metric: with `kl()` and `loss()`, where lower is the behaviour, only the ranking by size has a meaning.
    Raises:
        NeedsError: as `faithfulness`; fractions that do not rise.
    """
    sizes = list(fractions)
    if len(sizes) < 2 or sizes != sorted({*sizes}) or not 0 < sizes[0] <= sizes[-1] <= 1:
        raise NeedsError(f"The fractions of faithfulness_curve must be two or more that rise in (0, 1]. Got {sizes}")
    rankings = ("signed", "absolute")
    chosen = [circuit.top(float(size), absolute=ranking == "absolute") for ranking in rankings for size in sizes]
    scores = _run(circuit, model, examples, np.stack([c.kept for c in chosen]), metric, cut_to, batch_size, progress)
    shape = (len(rankings), len(sizes))
    share, low, high = (each.reshape(shape) for each in _shares(scores, seed))
    drawn = _drawn(scores, seed).reshape(-1, *shape)
    columns: dict[str, Any] = {
        name: (("ranking", "fraction"), value)
        for name, value in {"faithfulness": share, "ci_low": low, "ci_high": high}.items()
    }
    columns["edges"] = (("ranking", "fraction"), np.array([len(c) for c in chosen]).reshape(shape))
    for name, of in (("cpr", lambda f: f), ("cmd", lambda f: np.abs(1 - f))):
        area, areas = np.trapezoid(of(share), sizes), np.trapezoid(of(drawn), sizes)
        columns |= {name: ("ranking", area)}
        bounds = np.nanquantile(areas, [0.025, 0.975], axis=0) if len(areas) > 1 else np.full((2, 2), np.nan)
        columns |= {f"{name}_ci_low": ("ranking", bounds[0]), f"{name}_ci_high": ("ranking", bounds[1])}
    data = xr.Dataset(columns, {"ranking": list(rankings), "fraction": sizes})
    title = "Faithfulness of the best edges"
    unit = "(m(C) - m(∅)) / (m(full) - m(∅))"
    view = View("lines", "faithfulness", "fraction", by="ranking", title=title, unit=unit, log=True)
    return Result(data, _meta("FaithfulnessCurve", circuit, model, metric, cut_to, seed), (view,))


def completeness(
    circuit: Circuit,
    model: Model,
    examples: Any,
    metric: Metric | None = None,
    *,
    subsets: int = 20,
    cut_to: CutTo = "corrupted",
    batch_size: int | None = None,
    seed: int = 0,
    progress: Progress | bool = False,
) -> Result:
    """Whether the circuit without some of its nodes does what the model does without them (Wang et al. 2023).

    For random sets K of the circuit's nodes (each is in one with probability 1/2): m(C without K) against m(model
    without K). A circuit that lacks a backup of what it has differs there, though it be faithful. A node is
    taken out by cutting every edge from it and into it.

    Result: by ``subset``: ``circuit`` and ``model``, the faithfulness of each without K, their ``difference`` with
    ``ci_low, ci_high, p, q``, and ``removed``, the names of K; and ``incompleteness``, the mean |difference|.

    Raises:
        NeedsError: as `faithfulness`; no nodes to take out, or no subsets.
    """
    nodes = [node for node in circuit.nodes if node not in ("embed", "logits")]
    if subsets < 1:
        raise NeedsError(f"The subsets of completeness must be at least 1. Got {subsets}")
    if not nodes:
        raise NeedsError("completeness takes out nodes; this circuit has none beside embed and logits")
    rng = np.random.default_rng(seed)
    chosen = [
        [node for node, out in zip(nodes, rng.random(len(nodes)) < 0.5, strict=True) if out] for _ in range(subsets)
    ]
    cut = np.stack([_touching(circuit, removed) for removed in chosen])
    rows = np.concatenate([circuit.kept & ~cut, ~cut])
    scores = _run(circuit, model, examples, rows, metric, cut_to, batch_size, progress)
    whole = _whole(scores)
    share = (scores.values.mean(1) - scores.empty.mean()) / whole
    found = summarize(((scores.values[:subsets] - scores.values[subsets:]) / whole).T, seed)
    columns = {"circuit": share[:subsets], "model": share[subsets:], "difference": found.mean}
    columns |= {name: getattr(found, name) for name in ("ci_low", "ci_high", "p", "q")}
    names = np.array([" ".join(removed) for removed in chosen])
    data = xr.Dataset({**{n: ("subset", v) for n, v in columns.items()}, "removed": ("subset", names)})
    data = data.assign_coords(subset=np.arange(subsets)).assign(incompleteness=float(np.abs(found.mean).mean()))
    return Result(data, _meta("Completeness", circuit, model, metric, cut_to, seed))


def minimality(
    circuit: Circuit,
    model: Model,
    examples: Any,
    metric: Metric | None = None,
    *,
    cut_to: CutTo = "corrupted",
    batch_size: int | None = None,
    seed: int = 0,
    progress: Progress | bool = False,
) -> Result:
    """What each edge adds to the circuit: the faithfulness that is lost when it alone is cut from it.

    As in Wang et al. (2023), with edges for nodes, and the circuit itself for their set K. An edge whose loss
    is not told from 0 (``q``) is one that the circuit does not need here.

    Result: by ``edge``, largest loss first: ``sender, receiver, loss, ci_low, ci_high, p, q``, and its ``score``.

    Raises:
        NeedsError: as `faithfulness`; the circuit has no edges.
    """
    edges = np.flatnonzero(circuit.kept)
    if not len(edges):
        raise NeedsError("an empty circuit has no edges to take out; take some with top(n)")
    rows = np.repeat(circuit.kept[None], len(edges) + 1, 0)
    rows[np.arange(1, len(edges) + 1), edges] = False
    scores = _run(circuit, model, examples, rows, metric, cut_to, batch_size, progress, circuit.kept)
    found = summarize(((scores.values[0] - scores.values[1:]) / _whole(scores)).T, seed)
    order = np.argsort(-found.mean, kind="stable")
    sender, receiver = (ends[edges[order]] for ends in circuit.graph.ends)
    senders, receivers = np.array(circuit.graph.senders)[sender], np.array(circuit.graph.receivers)[receiver]
    columns = {"loss": found.mean, **{name: getattr(found, name) for name in ("ci_low", "ci_high", "p")}}
    columns = {name: ("edge", value[order]) for name, value in columns.items()}
    columns |= {"q": ("edge", fdr(found.p)[order]), "score": ("edge", circuit.scores[edges[order]])}
    names = [f"{u} → {v}" for u, v in zip(senders, receivers, strict=True)]
    coords = {"edge": names, "sender": ("edge", senders), "receiver": ("edge", receivers)}
    view = View("bars", "loss", "edge", title="What single edges add to the circuit", unit="faithfulness")
    return Result(xr.Dataset(columns, coords), _meta("Minimality", circuit, model, metric, cut_to, seed), (view,))


def _run(
    circuit: Circuit,
    model: Model,
    examples: Any,
    kept: Kept,
    metric: Metric | None,
    cut_to: CutTo,
    batch_size: int | None,
    progress: Progress | bool,
    start: Kept | None = None,
) -> CircuitScores:
    if cut_to not in ("corrupted", "mean", "zero"):
        raise NeedsError(f"The cut_to of a circuit must be 'corrupted', 'mean' or 'zero'. Got {cut_to!r}")
    with shown(progress) as told:
        return run_circuits(
            model,
            model.tokenize(as_examples(examples)),
            circuit.graph,
            kept,
            metric or logit_diff(),
            cut_to=cut_to,
            start=start,
            batch_size=batch_size,
            progress=told,
        )


def _whole(scores: CircuitScores) -> float:
    """m(full) - m(∅); NaN where it is too small."""
    whole = float(scores.full.mean() - scores.empty.mean())
    if abs(whole) >= GUARD:
        return whole
    warnings.warn(
        f"the model scores {scores.full.mean():.3g} and the empty circuit {scores.empty.mean():.3g}, so faithfulness is"
        " NaN; give pairs whose difference matters to the metric",
        stacklevel=4,
    )
    return float("nan")


def shares(scores: CircuitScores) -> Floats:
    """Faithfulness of each circuit; NaN, with a warning, where there is nothing to be faithful to."""
    return (scores.values.mean(1) - scores.empty.mean()) / _whole(scores)


def _shares(scores: CircuitScores, seed: int) -> tuple[Floats, Floats, Floats]:
    """Faithfulness of each circuit, and its interval."""
    share = shares(scores)
    drawn = _drawn(scores, seed)
    if len(drawn) < 2:
        return share, np.full_like(share, np.nan), np.full_like(share, np.nan)
    low, high = np.nanquantile(drawn, [0.025, 0.975], axis=0)
    return share, low, high


def _drawn(scores: CircuitScores, seed: int) -> Floats:
    """Faithfulness of each circuit in examples drawn anew, ``resample circuit``; both differences are drawn."""
    n = len(scores.full)
    if n < 2 or abs(float(scores.full.mean() - scores.empty.mean())) < GUARD:
        return np.zeros((0, len(scores.values)))
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), RESAMPLES) / n
    whole = weights @ (scores.full - scores.empty)
    whole = np.where(np.abs(whole) < GUARD, np.nan, whole)
    return weights @ (scores.values - scores.empty).T / whole[:, None]


def _touching(circuit: Circuit, nodes: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Edges from or into some nodes. A key or value is cut where every head of its group is among them."""
    graph, gone = circuit.graph, {*nodes}
    sender, receiver = graph.ends
    into = np.array([{*graph.nodes_of(r)} <= gone for r in graph.receivers])
    return np.array([s in gone for s in graph.senders])[sender] | into[receiver]


def _meta(name: str, circuit: Circuit, model: Model, metric: Metric | None, cut_to: CutTo, seed: int) -> dict[str, Any]:
    found = {"analyzer": name, "options": {"metric": repr(metric or logit_diff()), "cut_to": repr(cut_to)}}
    return provenance(model) | found | {"seed": seed, "edges": len(circuit)}


def summary(curves: "dict[str, Result]") -> pd.DataFrame:
    """Areas of several curves side by side: ``method, cpr, cmd`` with intervals, as MIB reports them."""
    rows: list[dict[str, Any]] = []
    for name, curve in curves.items():
        row: dict[str, Any] = {"method": name}
        for column, ranking in (("cmd", "absolute"), ("cpr", "signed")):
            at = curve.data.sel(ranking=ranking)
            row |= {each: float(at[each]) for each in (column, f"{column}_ci_low", f"{column}_ci_high")}
        rows.append(row)
    return pd.DataFrame(rows)
