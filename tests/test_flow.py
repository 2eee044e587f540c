"""Information flow: knock-outs against a loop written by hand, and what comes back."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import mechinterp as mi
from mechinterp import sites
from mechinterp.analyzers.tracing import EARLIER, ROLES, START
from mechinterp.errors import ExamplesError, NeedsError, OutputError
from mechinterp.studies import Flow, trace_information_flow

TEXTS = ([5, 6, 7, 8, 9, 10, 20], [11, 12, 13, 14], [15, 16, 17, 18, 19])
SPANS = [(1, 4), (0, 2), (2, 3)]
RIGHT = ([4], [5], [7, 8])
FIRST, MIDDLE, LAST, SUBSEQUENT, FURTHER, END = ROLES
TOKENS: dict[str, tuple[tuple[int, ...], ...]] = {  # by hand, from SPANS
    START: ((0,), (), (0,)),
    EARLIER: ((), (), (1,)),
    FIRST: ((1,), (0,), ()),
    MIDDLE: ((2,), (), ()),
    LAST: ((3,), (1,), (2,)),
    SUBSEQUENT: ((4,), (2,), (3,)),
    FURTHER: ((5,), (), ()),
    END: ((6,), (3,), (4,)),
}


def facts(answers: Any = None) -> mi.Examples:
    given = [4, 5, [7, 8]] if answers is None else answers
    return mi.Examples.of([list(t) for t in TEXTS], answers=given, spans={"subject": SPANS})


def flow(model: mi.Model, **options: Any) -> Flow:
    return trace_information_flow(model, facts(), **{"copies": 1, "window": 2, "skip_wrong": False, **options})


def cut(model: mi.Model, row: int, receiver: str, sender: str, layers: list[int]) -> float:
    """The answer's probability when some queries see some keys no more, by a function on scores."""
    queries, keys = list(TOKENS[receiver][row]), list(TOKENS[sender][row])

    def hide(scores: torch.Tensor) -> torch.Tensor:
        hidden = scores.clone()
        for query in queries:
            hidden[:, :, query, keys] = float("-inf")
        return hidden

    edits = [mi.Apply(sites.scores(layer), hide) for layer in layers]
    logits = model.trace(list(TEXTS[row]), "logits", interventions=edits)["logits"][0, -1]
    return float(logits.softmax(-1)[RIGHT[row]].sum())


def test_drops_equal_a_loop_by_hand(model: mi.Model) -> None:
    edges = flow(model, layers=(0, 1)).edges.set_index(["sender", "receiver", "layer"])["drop"]
    clean = [cut(model, row, END, START, []) for row in range(3)]
    seen = 0
    for (sender, receiver, layer), drop in edges.items():
        rows = [row for row in range(3) if TOKENS[sender][row] and TOKENS[receiver][row]]
        around = {0: [0], 1: [0, 1]}[layer]
        expected = np.mean([1 - cut(model, row, receiver, sender, around) / clean[row] for row in rows])
        assert drop == pytest.approx(expected, abs=2e-4), (sender, receiver, layer)
        seen += abs(drop) > 1e-3
    assert seen > len(edges) / 2
    roles = [START, EARLIER, *ROLES]
    pairs = {(a, b) for i, b in enumerate(roles) if i > 3 for a in roles[:i]}
    assert {(a, b) for a, b, _ in edges.index} == pairs - {(EARLIER, FURTHER)}  # no example has both


def test_the_last_layer_moves_nothing_to_where_nothing_is_read(model: mi.Model) -> None:
    edges = flow(model, layers=(model.dims.n_layers - 1,), window=1).edges
    elsewhere = edges[edges["receiver"] != END]["drop"]
    assert len(elsewhere) == 14
    assert elsewhere.abs().max() < 1e-5
    assert edges[edges["receiver"] == END]["drop"].abs().max() > 1e-3


def test_nodes_are_causal_tracing(llama: mi.Model) -> None:
    nodes = flow(llama).nodes
    traced = mi.run(llama, facts(), mi.CausalTracing(kinds=("states",), copies=1, skip_wrong=False))
    table = traced.table("effect").set_index(["role", "layer"])["effect"]
    assert len(nodes) == len(table) == 18
    pd.testing.assert_series_equal(nodes.set_index(["role", "layer"])["effect"], table)


def test_wrong_prompts_are_left_out_of_both(llama: mi.Model) -> None:
    says = [int(llama.trace(list(t), "logits")["logits"][0, -1].argmax()) for t in TEXTS]
    examples = facts(answers=[(says[0] + 1) % 50, says[1], says[2]])
    found = trace_information_flow(llama, examples, copies=1, window=2, layers=(1,))
    assert (found.meta["examples"], found.meta["skipped"]) == (3, 1)
    assert {MIDDLE, FURTHER}.isdisjoint({*found.edges["sender"], *found.edges["receiver"], *found.nodes["role"]})
    of_two = found.edges.set_index(["sender", "receiver"])["drop"]
    clean = llama.trace(list(TEXTS[1]), "logits")["logits"][0, -1].softmax(-1)[says[1]]
    edit = mi.Knockout(sites.scores([0, 1], positions=3), 0)  # the first subject token is text 1's alone
    less = llama.trace(list(TEXTS[1]), "logits", interventions=[edit])["logits"][0, -1].softmax(-1)[says[1]]
    assert of_two[FIRST, END] == pytest.approx(float(1 - less / clean), abs=1e-4)


def test_what_matters_and_its_graph() -> None:
    edges = pd.DataFrame(
        [
            [FIRST, LAST, 0, 0.9, 0.8, 1.0, 0.3, 0.4],
            [LAST, END, 1, 0.5, 0.4, 0.6, 0.001, 0.01],
            [LAST, END, 2, 0.6, 0.5, 0.7, 0.001, 0.01],
            [EARLIER, END, 1, -0.5, -0.6, -0.4, 0.001, 0.01],
            [START, END, 1, 0.9, 0.8, 1.0, 0.001, 0.01],
        ],
        columns=["sender", "receiver", "layer", "drop", "ci_low", "ci_high", "p", "q"],
    )
    nodes = pd.DataFrame(
        [[role, layer, 0.1 * layer, 0.0, 0.2, 0.1, 0.2] for role in (FIRST, LAST, END) for layer in range(3)],
        columns=["role", "layer", "effect", "ci_low", "ci_high", "p", "q"],
    )
    meta = {"model": "m", "window": 1, "n_layers": 3, "examples": 9, "skipped": 1}
    tested = Flow(nodes, edges, meta)
    assert tested.strongest[["sender", "receiver", "layer"]].to_numpy().tolist() == [[LAST, END, 2]]
    assert "q < 0.05" in tested.caption and "8 prompts, 1 skipped" in tested.caption
    few = Flow(nodes, edges.assign(p=float("nan"), q=float("nan")), meta)
    assert few.strongest["sender"].tolist() == [FIRST, LAST]
    assert "the largest, pale: under 6 prompts nothing is tested" in few.caption
    weak = Flow(nodes, edges.assign(q=0.2), meta)
    assert weak.strongest["layer"].tolist() == [0, 2]
    assert "none has q < 0.05: the largest, pale" in weak.caption
    graph = tested.graph()
    assert graph.nodes[LAST, 2]["effect"] == pytest.approx(0.2)
    assert graph.nodes[EARLIER, 1]["effect"] == 0.0
    assert graph.edges[(LAST, 1), (END, 1)] == pytest.approx(
        {"drop": 0.5, "ci_low": 0.4, "ci_high": 0.6, "p": 0.001, "q": 0.01, "matters": True}
    )
    assert not graph.edges[(FIRST, 0), (LAST, 0)]["matters"]
    assert graph.number_of_edges() == 5
    arrow, number = tested.figure().layout.annotations
    assert (arrow.ay, arrow.y) == (2, 2)
    assert "−60%" in number.text
    assert len(few.figure().layout.annotations) == 4
    page = tested._repr_html_()
    assert "last subject token" in page and "earlier" not in page
    assert "last subject token" in repr(tested)


def test_saving_and_loading(llama: mi.Model, tmp_path: Path) -> None:
    found = flow(llama, layers=(1,))
    again = Flow.load(found.save(tmp_path / "flow.json"))
    pd.testing.assert_frame_equal(again.nodes, found.nodes, rtol=1e-12)
    pd.testing.assert_frame_equal(again.edges, found.edges, rtol=1e-12)
    assert dict(again.meta) == dict(found.meta)
    (tmp_path / "other.json").write_text('{"format": "else"}')
    with pytest.raises(OutputError, match=r"holds no flow \(its format is 'else'\); give a file that Flow.save wrote"):
        Flow.load(tmp_path / "other.json")
    with pytest.raises(OutputError, match="holds no flow"):
        Flow.load(tmp_path / "none.json")
    with pytest.raises(OutputError, match="cannot write"):
        found.save(tmp_path / "no" / "flow.json")


def test_one_prompt_makes_a_figure(llama: mi.Model) -> None:
    examples = mi.Examples.of([list(TEXTS[0])], answers=[4], spans={"it": [(1, 4)]})
    found = trace_information_flow(llama, examples, "it", copies=1, window=2, skip_wrong=False)
    assert not found.significant
    assert 0 < len(found.strongest) <= 5
    assert len(found.figure().layout.annotations) == 2 * len(found.strongest)
    axes = found.picture().axes[0]
    drawn = sorted(text.get_text() for text in axes.texts if text.get_text().startswith("−"))
    assert drawn == sorted(f"−{drop:.0%}" for drop in found.strongest["drop"])
    assert "1 prompt, 0 skipped" in found.caption


def test_what_cannot_be_traced(llama: mi.Model) -> None:
    with pytest.raises(NeedsError, match="window of trace_information_flow must be at least 1"):
        flow(llama, window=0)
    with pytest.raises(NeedsError, match=r"some of 0 to 2. Got \(3,\)"):
        flow(llama, layers=(3,))
    with pytest.raises(ExamplesError, match=r"name no subject 'who' \(they name subject\)"):
        trace_information_flow(llama, facts(), "who")
    with pytest.raises(ExamplesError, match="no answers"):
        trace_information_flow(llama, mi.Examples.of([[5, 6, 7]], spans={"subject": [(0, 1)]}))
    with pytest.raises(ExamplesError, match="none of the 3 prompts"):
        trace_information_flow(llama, facts(), copies=1)


def test_capitals_reach_the_end_late(smollm2: mi.Model) -> None:
    """The end attends to the subject in late layers only (Geva et al. 2023)."""
    known = {"France": " Paris", "Italy": " Rome", "Japan": " Tokyo", "Russia": " Moscow"}
    rows = [{"text": f"The capital of {a} is", "subject": a, "answer": b} for a, b in known.items()]
    found = trace_information_flow(smollm2, mi.Examples.from_dataset(rows), copies=1, layers=(3, 24))
    assert found.meta["skipped"] == 0
    drop = found.edges.set_index(["sender", "receiver", "layer"])["drop"]
    assert drop[LAST, END, 24] > 0.8
    assert abs(drop[LAST, END, 3]) < 0.3
