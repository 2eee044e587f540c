"""Faithfulness and its kin: each against circuits that are run one by one, and against circuits known to be true."""

from itertools import pairwise
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch

import mechinterp as mi
from mechinterp.core.graph import Graph
from mechinterp.core.statistics import fdr
from mechinterp.engine.edges import run_circuits
from mechinterp.errors import NeedsError
from mechinterp.studies import completeness, faithfulness, faithfulness_curve, minimality
from mechinterp.studies.evaluation import FRACTIONS, summary
from mechinterp.tasks.planted import Planted

PAIRS = mi.tasks.ioi(6)
"""Of several lengths."""
ALIKE = mi.Examples.pairs(
    [[5, 6, 7, 8], [9, 8, 7, 5], [6, 6, 9, 8]], [[5, 9, 7, 8], [9, 6, 7, 5], [6, 5, 9, 8]], [(5, 9), (6, 7), (8, 5)]
)
"""Of one length, so that there is a mean at each position."""
CUTS = (("corrupted", PAIRS), ("zero", PAIRS), ("mean", ALIKE))


def random_circuit(model: mi.Model, share: float, seed: int = 0) -> mi.Circuit:
    """Random scores, and a random share of the edges."""
    graph, rng = Graph.of(model), np.random.default_rng(seed)
    return mi.Circuit(graph, rng.normal(size=len(graph)), rng.random(len(graph)) < share)


def true_circuit(planted: Planted, without: tuple[str, str] | None = None) -> mi.Circuit:
    graph = Graph.of(planted.model)
    kept = np.zeros(len(graph), bool)
    kept[[graph.edge(*edge) for edge in planted.edges - {without}]] = True
    return mi.Circuit(graph, kept.astype(float), kept)


def alone(model: mi.Model, kept: np.ndarray, examples: mi.Examples = PAIRS, cut_to: Any = "corrupted") -> float:
    """Faithfulness of one circuit, from a run of its own."""
    graph, tokens = Graph.of(model), model.tokenize(examples)
    scores = run_circuits(model, tokens, graph, kept[None], mi.logit_diff(), cut_to=cut_to)
    full, empty = float(scores.full.mean()), float(scores.empty.mean())
    return (float(scores.values[0].mean()) - empty) / (full - empty)


@torch.no_grad()
def logit_differences(model: mi.Model, run: str) -> list[float]:
    """From plain passes, one example each."""
    tokens, out = model.tokenize(PAIRS), []
    for i in range(len(tokens)):
        batch = tokens.batch([i])
        (right, wrong), logits = batch.answers[0], model.hf(batch.run(run).ids).logits[0, -1]
        out.append(float(logits[right[0]] - logits[wrong[0]]))
    return out


def turned(model: mi.Model) -> mi.Examples:
    """The same pairs, the answers the way round that a random model prefers: every difference is above zero."""
    both = zip(*(logit_differences(model, run) for run in ("clean", "corrupted")), strict=True)
    answers = zip(PAIRS.answers, both, strict=True)
    turned = [(b, a) if clean < corrupted else (a, b) for (a, b), (clean, corrupted) in answers]
    return mi.Examples.pairs(PAIRS.texts, PAIRS.corrupted, turned)


@pytest.mark.parametrize(("cut_to", "examples"), CUTS, ids=lambda x: x if isinstance(x, str) else "")
def test_the_whole_model_is_faithful_and_nothing_is_not(model: mi.Model, cut_to: Any, examples: mi.Examples) -> None:
    graph = Graph.of(model)
    for kept, share in ((np.ones(len(graph), bool), 1.0), (np.zeros(len(graph), bool), 0.0)):
        found = faithfulness(mi.Circuit(graph, kept.astype(float), kept), model, examples, cut_to=cut_to).data
        assert [float(found[name]) for name in ("faithfulness", "ci_low", "ci_high")] == pytest.approx(
            [share] * 3, abs=1e-3
        )
        expected = found["full" if share else "empty"]
        np.testing.assert_allclose(found["circuit"], expected, atol=1e-4, rtol=1e-4)


def test_the_two_ends_are_the_clean_and_the_corrupted_run(model: mi.Model) -> None:
    found = faithfulness(random_circuit(model, 0.5), model, PAIRS).data
    np.testing.assert_allclose(found["full"], logit_differences(model, "clean"), atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(found["empty"], logit_differences(model, "corrupted"), atol=1e-4, rtol=1e-4)
    circuit, full, empty = (float(found[name].mean()) for name in ("circuit", "full", "empty"))
    assert float(found["faithfulness"]) == pytest.approx((circuit - empty) / (full - empty))


def test_edges_that_hang_in_the_air_carry_nothing(model: mi.Model) -> None:
    dropped = 0
    for seed, share in enumerate((0.03, 0.06, 0.1, 0.2)):
        circuit = random_circuit(model, share, seed)
        pruned = circuit.prune()
        dropped += len(circuit) - len(pruned)
        one, other = (faithfulness(each, model, PAIRS).data["circuit"] for each in (circuit, pruned))
        np.testing.assert_allclose(one, other, atol=1e-4, rtol=1e-4)
    assert dropped > 20


@pytest.mark.parametrize("ungrouped", [False, True])
def test_an_interval_is_that_of_examples_drawn_anew(llama: mi.Model, ungrouped: bool) -> None:
    graph = Graph.of(llama, ungrouped)
    circuit = mi.Circuit(graph, np.ones(len(graph)), np.random.default_rng(1).random(len(graph)) < 0.7)
    found = faithfulness(circuit, llama, mi.tasks.ioi(24)).data
    value, full, empty = (found[name].values for name in ("circuit", "full", "empty"))
    rng, drawn = np.random.default_rng(5), []
    for _ in range(4000):
        some = rng.integers(0, 24, 24)
        drawn.append((value[some].mean() - empty[some].mean()) / (full[some].mean() - empty[some].mean()))
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert float(found["ci_low"]) < float(found["faithfulness"]) < float(found["ci_high"])
    width = high - low
    assert float(found["ci_low"]) == pytest.approx(low, abs=0.15 * width)
    assert float(found["ci_high"]) == pytest.approx(high, abs=0.15 * width)


def test_of_one_example_there_is_no_interval_and_without_a_difference_no_share(llama: mi.Model) -> None:
    circuit = random_circuit(llama, 0.5)
    one = mi.Examples.pairs(PAIRS.texts[:1], PAIRS.corrupted[:1], PAIRS.answers[:1])
    found = faithfulness(circuit, llama, one).data
    assert np.isfinite(found["faithfulness"])
    assert np.isnan(found["ci_low"]) and np.isnan(found["ci_high"])
    curve = faithfulness_curve(circuit, llama, one).data
    assert np.isfinite(curve["cpr"]).all() and np.isnan(curve["cpr_ci_low"]).all()
    same = mi.Examples.pairs(PAIRS.texts, PAIRS.texts, PAIRS.answers)
    with pytest.warns(UserWarning, match="faithfulness is NaN"):
        assert np.isnan(faithfulness(circuit, llama, same).data["faithfulness"])


def test_a_curve_is_made_of_circuits_that_are_run_alone(either: mi.Model) -> None:
    circuit, pairs, shares = random_circuit(either, 0.5), turned(either), (0.02, 0.1, 0.35, 0.8, 1.0)
    found = faithfulness_curve(circuit, either, pairs, fractions=shares, batch_size=4).data
    for ranking in ("signed", "absolute"):
        at = found.sel(ranking=ranking)
        values = at["faithfulness"].values
        for share, value, edges in zip(shares, values, at["edges"].values, strict=True):
            best = circuit.top(share, absolute=ranking == "absolute")
            assert len(best) == edges == round(share * len(circuit.graph))
            assert value == pytest.approx(alone(either, best.kept, pairs), abs=1e-3, rel=1e-3)
            assert value == pytest.approx(
                float(faithfulness(best, either, pairs).data["faithfulness"]), abs=1e-3, rel=1e-3
            )
        assert values[-1] == pytest.approx(1.0, abs=1e-4)
        for name, height in (("cpr", values), ("cmd", np.abs(1 - values))):
            steps = zip(pairwise(shares), pairwise(height), strict=True)
            area = sum((b - a) * (one + other) / 2 for (a, b), (one, other) in steps)
            assert float(at[name]) == pytest.approx(area)
            assert float(at[f"{name}_ci_low"]) <= float(at[f"{name}_ci_high"])
        assert (at["ci_low"] <= at["faithfulness"] + 1e-6).all() and (at["faithfulness"] <= at["ci_high"] + 1e-6).all()
        assert float(at["cpr_ci_low"]) < float(at["cpr"]) < float(at["cpr_ci_high"])
    assert not np.allclose(*(found["faithfulness"].sel(ranking=r) for r in ("signed", "absolute")), atol=1e-2)


@pytest.mark.parametrize(("cut_to", "examples"), CUTS, ids=lambda x: x if isinstance(x, str) else "")
def test_curves_of_every_cut(llama: mi.Model, cut_to: Any, examples: mi.Examples) -> None:
    circuit = random_circuit(llama, 0.5)
    found = faithfulness_curve(circuit, llama, examples, fractions=(0.3, 0.7, 1.0), cut_to=cut_to).data
    for share in (0.3, 0.7, 1.0):
        value = float(found["faithfulness"].sel(ranking="signed", fraction=share))
        expected = alone(llama, circuit.top(share, absolute=False).kept, examples, cut_to)
        assert value == pytest.approx(expected, abs=1e-3, rel=1e-3)


def test_a_summary_has_the_areas_that_mib_reports(llama: mi.Model) -> None:
    curves = {name: random_circuit(llama, 0.5, seed).curve(llama, PAIRS) for seed, name in enumerate("ab")}
    assert tuple(curves["a"].data["fraction"].values) == FRACTIONS
    table = summary(curves).set_index("method")
    for name, curve in curves.items():
        assert table.loc[name, "cpr"] == float(curve.data["cpr"].sel(ranking="signed"))
        assert table.loc[name, "cmd"] == float(curve.data["cmd"].sel(ranking="absolute"))
        assert table.loc[name, "cmd_ci_high"] == float(curve.data["cmd_ci_high"].sel(ranking="absolute"))


def test_the_whole_model_is_complete(model: mi.Model) -> None:
    graph = Graph.of(model)
    found = completeness(mi.Circuit(graph, np.ones(len(graph))), model, PAIRS, subsets=6).data
    np.testing.assert_allclose(found["difference"], 0, atol=1e-4)
    assert float(found["incompleteness"]) < 1e-4
    assert float(np.abs(found["model"] - 1).max()) > 0.05, "nothing was taken out"


def test_completeness_is_the_difference_without_the_nodes(model: mi.Model) -> None:
    """Of keys and values of a group only those are cut of which every head is gone."""
    circuit = random_circuit(model, 0.6)
    found, graph = completeness(circuit, model, PAIRS, subsets=4, seed=3).data, circuit.graph
    assert len({*found["removed"].values}) == 4
    for i in range(4):
        gone = str(found["removed"].values[i]).split()
        assert {*gone} <= {*circuit.nodes} - {"embed", "logits"}
        stays = np.array(
            [
                graph.senders[s] not in gone and not all(node in gone for node in graph.nodes_of(graph.receivers[r]))
                for s, r in zip(*graph.ends, strict=True)
            ]
        )
        ours, theirs = alone(model, circuit.kept & stays), alone(model, stays)
        at = found.isel(subset=i)
        assert float(at["circuit"]) == pytest.approx(ours, abs=1e-3, rel=1e-3)
        assert float(at["model"]) == pytest.approx(theirs, abs=1e-3, rel=1e-3)
        assert float(at["difference"]) == pytest.approx(ours - theirs, abs=1e-3, rel=1e-3)
        assert float(at["ci_low"]) <= float(at["difference"]) <= float(at["ci_high"])
    assert float(found["incompleteness"]) == pytest.approx(float(np.abs(found["difference"]).mean()))


def test_minimality_is_the_loss_without_each_edge(model: mi.Model) -> None:
    circuit = random_circuit(model, 1.0).top(24)
    found, graph = minimality(circuit, model, PAIRS, batch_size=4).data, circuit.graph
    whole = alone(model, circuit.kept)
    edges = [*zip(found["sender"].values, found["receiver"].values, strict=True)]
    assert {graph.edge(*edge) for edge in edges} == {*np.flatnonzero(circuit.kept)}
    for i, edge in enumerate(edges):
        kept = circuit.kept.copy()
        kept[graph.edge(*edge)] = False
        assert float(found["loss"][i]) == pytest.approx(whole - alone(model, kept), abs=1e-3, rel=1e-3)
        assert float(found["score"][i]) == circuit.scores[graph.edge(*edge)]
    assert (np.diff(found["loss"]) <= 0).all()
    np.testing.assert_allclose(found["q"], fdr(found["p"].values))


@pytest.mark.parametrize("planted", [mi.tasks.planted.induction, mi.tasks.planted.copy, mi.tasks.planted.grouped])
def test_planted_circuits_are_faithful_complete_and_minimal(planted: Any) -> None:
    known = planted(12)
    circuit = true_circuit(known)
    found = circuit.faithfulness(known.model, known.pairs).data
    assert 0.97 < float(found["ci_low"]) <= float(found["faithfulness"]) <= float(found["ci_high"]) < 1.03
    assert float(circuit.completeness(known.model, known.pairs).data["incompleteness"]) < 0.05
    losses = circuit.minimality(known.model, known.pairs).data
    assert {*zip(losses["sender"].values, losses["receiver"].values, strict=True)} == known.edges
    assert float(losses["loss"].min()) > 0.3
    assert float(losses["q"].max()) < 0.05
    spare = circuit.graph.edge("embed", "logits")
    kept = circuit.kept.copy()
    kept[spare] = True
    more = mi.Circuit(circuit.graph, circuit.scores, kept).minimality(known.model, known.pairs).data
    assert abs(float(more["loss"].sel(edge="embed → logits"))) < 0.02
    lacking = true_circuit(known, without=min(known.edges))
    assert float(lacking.faithfulness(known.model, known.pairs).data["faithfulness"]) < 0.7


def test_bad_input(llama: mi.Model) -> None:
    circuit, graph = random_circuit(llama, 0.5), Graph.of(llama)
    for fractions in ((0.1,), (0.5, 0.1), (0.1, 0.1), (0.0, 0.5), (0.5, 1.1), ()):
        with pytest.raises(
            NeedsError, match=r"fractions of faithfulness_curve must be two or more that rise in \(0, 1"
        ):
            faithfulness_curve(circuit, llama, PAIRS, fractions=fractions)
    nothing = mi.Circuit(graph, np.ones(len(graph)), np.zeros(len(graph), bool))
    with pytest.raises(NeedsError, match="an empty circuit has no edges"):
        minimality(nothing, llama, PAIRS)
    with pytest.raises(NeedsError, match="this circuit has none beside embed and logits"):
        completeness(nothing, llama, PAIRS)
    with pytest.raises(NeedsError, match=r"subsets of completeness must be at least 1. Got 0"):
        completeness(circuit, llama, PAIRS, subsets=0)
    other = Graph(2, 4, 2)
    with pytest.raises(NeedsError, match="of a model with 2 layers"):
        faithfulness(mi.Circuit(other, np.ones(len(other))), llama, PAIRS)
    jaxtyping.config.update("jaxtyping_disable", True)  # past the run-time check of types in tests
    try:
        with pytest.raises(NeedsError, match="cut_to of a circuit must be 'corrupted'"):
            faithfulness(circuit, llama, PAIRS, cut_to="noise")  # pyright: ignore[reportArgumentType]
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
