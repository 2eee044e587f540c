"""Discovery: circuits that are known, ACDC against a slow one, and scores of nodes against circuits without them."""

import warnings
from typing import Any, get_args

import jaxtyping
import numpy as np
import pytest

import mechinterp as mi
from mechinterp.core.graph import Graph
from mechinterp.engine.edges import run_circuits
from mechinterp.engine.plan import Plan
from mechinterp.errors import NeedsError
from mechinterp.studies import discover, discovery
from mechinterp.studies.discovery import Method, edges_of_nodes, node_effects

PAIRS = mi.tasks.ioi(6)
FEW = mi.tasks.ioi(3)
"""For what is slow."""
PLANTED = {"induction": mi.tasks.planted.induction, "copy": mi.tasks.planted.copy, "grouped": mi.tasks.planted.grouped}
BY_EDGE: tuple[Any, ...] = ("eap", "eap-ig", "eap-ig-activations", "exact", "acdc")


def named(circuit: mi.Circuit) -> set[tuple[str, str]]:
    return {*zip(circuit.edges["sender"], circuit.edges["receiver"], strict=True)}


@pytest.mark.parametrize("name", PLANTED)
def test_every_method_that_scores_edges_finds_exactly_the_true_ones(name: str) -> None:
    known = PLANTED[name](8)
    assert {*BY_EDGE} == {*get_args(Method)} - {"activation-patching"}
    for method in BY_EDGE:
        found = discover(known.model, known.pairs, method)["mixed"]
        assert named(found) == known.edges, method
        expected = float(found.faithfulness(known.model, known.pairs).data["faithfulness"])
        assert found.meta["faithfulness"] == pytest.approx(expected, abs=1e-4)
        assert 0.95 < expected < 1.05
        assert found.meta["method"] == method
        assert found.meta["examples"] == 8
    split = discover(known.model, known.pairs, "eap-ig", ungrouped=True)["mixed"]
    heads = {(u, node) for u, v in named(split) for node in split.graph.nodes_of(v)}
    assert heads <= {(u, node) for u, v in known.edges for node in Graph.of(known.model).nodes_of(v)}


@pytest.mark.parametrize("name", PLANTED)
def test_scores_of_nodes_find_the_true_edges_among_those_between_true_nodes(name: str) -> None:
    known = PLANTED[name](8)
    found = discover(known.model, known.pairs, "activation-patching")["mixed"]
    assert known.edges < named(found)
    graph = found.graph
    true = {node for u, v in known.edges for node in (u, *graph.nodes_of(v))}
    assert {*found.nodes} <= true, "edges between true nodes alone"


def test_a_node_has_what_is_lost_without_all_that_it_sends(model: mi.Model) -> None:
    """Patching a whole node is the circuit in which every edge from it is cut."""
    graph, tokens = Graph.of(model), model.tokenize(PAIRS)
    effects = node_effects(model, PAIRS, mi.logit_diff(), {})
    assert [*effects] == [*graph.senders]
    kept = np.arange(len(graph.senders))[:, None] != graph.ends[0]
    scores = run_circuits(model, tokens, graph, kept, mi.logit_diff())
    np.testing.assert_allclose(
        [*effects.values()], (scores.full - scores.values).mean(1), atol=1e-3 * np.abs([*effects.values()]).max()
    )


def test_an_edge_has_the_smaller_score_of_its_ends() -> None:
    graph = Graph(1, 2, 1)
    scores = edges_of_nodes(graph, {"embed": 3.0, "a0.h0": -2.0, "a0.h1": 0.5, "m0": 1.0})
    expected = {
        ("embed", "a0.h0<q>"): -2.0,
        ("embed", "a0.h1<q>"): 0.5,
        ("embed", "a0.kv0<k>"): -2.0,  # of the group, the larger in size
        ("embed", "a0.kv0<v>"): -2.0,
        ("embed", "m0"): 1.0,
        ("a0.h0", "m0"): 1.0,
        ("a0.h1", "m0"): 0.5,
        ("embed", "logits"): 3.0,  # of the logits there is no score
        ("a0.h0", "logits"): -2.0,
        ("a0.h1", "logits"): 0.5,
        ("m0", "logits"): 1.0,
    }
    assert len(expected) == len(graph)
    assert {edge: scores[graph.edge(*edge)] for edge in expected} == expected
    split = Graph(1, 2, 1, ungrouped=True)
    alone = edges_of_nodes(split, {"embed": 3.0, "a0.h0": -2.0, "a0.h1": 0.5, "m0": 1.0})
    assert [alone[split.edge("embed", f"a0.h{h}<k>")] for h in (0, 1)] == [-2.0, 0.5]


def test_a_size_is_that_many_of_the_best_edges(model: mi.Model) -> None:
    best = mi.Circuit.of(mi.run(model, PAIRS, mi.EdgeAttribution("eap-ig-inputs", steps=3)))
    for size in (12, 0.1):
        found = discover(model, PAIRS, "eap-ig", size=size, steps=3)["mixed"]
        expected = best.top(size).prune()
        assert named(found) == named(expected)
        assert len(found) <= (size if isinstance(size, int) else round(size * len(best.graph)))
        np.testing.assert_allclose(found.scores, best.scores, atol=1e-5)


def test_the_fewest_that_are_faithful_enough(model: mi.Model) -> None:
    """The one that is found is faithful, and smaller ones of the same sizes are not."""
    scored = len(Graph.of(model))
    sizes = [scored]
    while sizes[-1] > 4:
        sizes.append(int(sizes[-1] / 1.25))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = discover(model, PAIRS, "eap", faithful=0.6)["mixed"]
    assert found.meta["faithfulness"] >= 0.6
    for n in sorted(n for n in sizes if n >= 4):
        least = found.top(n)
        if float(least.faithfulness(model, PAIRS).data["faithfulness"]) >= 0.6:
            break
    assert named(found) == named(least.prune())


def test_types_have_edges_of_their_own_alone(model: mi.Model) -> None:
    found = discover(model, PAIRS, "eap", ("mixed", "attention_only", "mlp_only"), size=0.2)
    assert [*found] == ["mixed", "attention_only", "mlp_only"]
    for kind, letters in (("mixed", "aelm"), ("attention_only", "ael"), ("mlp_only", "elm")):
        circuit = found[kind]
        names = {name for edge in named(circuit) for name in edge}
        assert {name[0] for name in names} <= {*letters}, kind
        assert circuit.meta["circuit_type"] == kind
        graph = circuit.graph
        ends = zip(*graph.ends, strict=True)
        allowed = [{graph.senders[s][0], graph.receivers[r][0]} <= {*letters} for s, r in ends]
        assert (np.isfinite(circuit.scores) == allowed).all()
    n = model.dims.n_layers
    scored = int(np.isfinite(found["mlp_only"].scores).sum())
    assert scored == (n + 1) * (n + 2) // 2
    few = discover(model, PAIRS, "eap", ("mlp_only",), size=scored + 5, resamples=0)["mlp_only"]
    assert len(few) == scored  # all that the type has


def slow_acdc(model: mi.Model, begun: mi.Circuit, threshold: float) -> tuple[np.ndarray, float]:
    """Conmy et al. 2023, every step a run of its own from the embedding on."""
    graph, tokens, kept = begun.graph, model.tokenize(FEW), begun.kept.copy()

    def divergence() -> float:
        return float(run_circuits(model, tokens, graph, kept[None], mi.kl()).values.mean())

    now = divergence()
    for receiver in reversed(graph.receivers):
        for sender in reversed(graph.senders):
            if graph.senders.index(sender) >= graph.reach[graph.receivers.index(receiver)]:
                continue
            edge = graph.edge(sender, receiver)
            if kept[edge]:
                kept[edge] = False
                without = divergence()
                if without - now < threshold:
                    now = without
                else:
                    kept[edge] = True
    return kept, now


def test_acdc_is_the_slow_one(llama: mi.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    best = mi.Circuit.of(mi.run(llama, FEW, mi.EdgeAttribution("eap-ig-inputs", steps=3)))
    begun = best.top(40).prune()
    found = discover(llama, FEW, "acdc", candidates=40, threshold=0.001, steps=3, batch_size=2)["mixed"]
    kept, divergence = slow_acdc(llama, begun, 0.001)
    expected = mi.Circuit(best.graph, best.scores, kept).prune()
    assert 0 < len(expected) < len(begun)
    assert named(found) == named(expected)
    assert found.meta["kl"] == pytest.approx(divergence, abs=1e-4)
    assert found.meta["tried"] == len(begun)
    assert found.meta["threshold"] == 0.001
    monkeypatch.setattr("mechinterp.studies.discovery.HELD", 1)  # what is made anew is the same
    again = discover(llama, FEW, "acdc", candidates=40, threshold=0.001, steps=3, batch_size=1)["mixed"]
    assert named(again) == named(found)


class Told:
    """Counts what a bar would show."""

    def __init__(self) -> None:
        self.totals: list[int] = []
        self.done: list[int] = []

    def begin(self, plan: Plan, round_number: int) -> None:
        self.totals.append(sum(p.rows if p.what == "sweep" else p.batches for p in plan.passes))
        self.done.append(0)

    def advance(self, what: str, steps: int) -> None:
        self.done[-1] += steps


@pytest.mark.parametrize("method", ["eap", "acdc"])
def test_all_the_work_is_told(llama: mi.Model, method: Any) -> None:
    """Scores, then every group of sizes that is tried (or ACDC), then the circuit itself."""
    told = Told()
    discover(llama, FEW, method, candidates=10, threshold=0.01, progress=told)
    assert len(told.totals) >= 3 and told.done == told.totals


def test_acdc_between_its_ends(llama: mi.Model) -> None:
    """At a threshold of 0 only that goes whose loss is a gain; at a huge one, everything."""
    ways: Any = {"candidates": 30, "steps": 3}
    begun = discover(llama, PAIRS, "eap-ig", size=30, steps=3)["mixed"]
    careful = discover(llama, PAIRS, "acdc", threshold=0.0, **ways)["mixed"]
    tokens = llama.tokenize(PAIRS)
    kept = np.stack([begun.kept, careful.kept])
    before, after = run_circuits(llama, tokens, begun.graph, kept, mi.kl()).values.mean(1)
    assert after <= before + 1e-5
    assert named(careful) <= named(begun)
    nothing = discover(llama, PAIRS, "acdc", threshold=1e6, **ways)["mixed"]
    assert len(nothing) == 0
    assert nothing.meta["tried"] == len(begun)
    assert nothing.meta["faithfulness"] == pytest.approx(0, abs=1e-4)


def test_it_says_when_nothing_is_faithful_enough() -> None:
    known = mi.tasks.planted.induction(8)
    with pytest.warns(UserWarning, match=r"no circuit of type mlp_only reaches a faithfulness of 0\.85; all its edges"):
        found = discover(known.model, known.pairs, "eap", ("mlp_only",))["mlp_only"]
    n = known.model.dims.n_layers
    assert len(found) == (n + 1) * (n + 2) // 2
    assert found.meta["faithfulness"] < 0.1


def test_bad_input(llama: mi.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    for options in ({"candidates": 0}, {"threshold": -0.1}, {"faithful": 0.0}, {"faithful": float("nan")}):
        with pytest.raises(NeedsError, match="candidates of discover must be at least 1, its threshold not under 0, "):
            discover(llama, PAIRS, **options)  # pyright: ignore[reportArgumentType]
    with pytest.raises(NeedsError, match="circuit_types of discover must be some of 'mixed'"):
        discover(llama, PAIRS, circuit_types=())
    with monkeypatch.context() as before_any_work:
        before_any_work.setattr(discovery, "_scores", None)
        for size in (0.0, 1.5, 10**6):
            with pytest.raises(NeedsError, match="n of a circuit's best edges must be a count up to"):
                discover(llama, PAIRS, "eap", size=size)
    with llama.intervene(mi.Zero(mi.sites.z(0))), pytest.raises(NeedsError, match="intervene"):
        discover(llama, PAIRS, "eap")
    jaxtyping.config.update("jaxtyping_disable", True)  # past the run-time check of types in tests
    try:
        with pytest.raises(NeedsError, match=r"method of discover must be some of 'eap', 'eap-ig'.* Got \('best',\)"):
            discover(llama, PAIRS, "best")  # pyright: ignore[reportArgumentType]
        for types in (("mixed", "heads"), "mixed"):
            with pytest.raises(NeedsError, match="circuit_types of discover must be some of 'mixed', 'attention_only'"):
                discover(llama, PAIRS, circuit_types=types)  # pyright: ignore[reportArgumentType]
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
