"""Circuits as sets of edges: laws on random graphs, files there and back, and what a figure shows."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
import xarray as xr

import mechinterp as mi
from mechinterp.core.graph import Graph
from mechinterp.core.result import Result
from mechinterp.errors import NeedsError, OutputError
from mechinterp.studies import Circuit
from mechinterp.studies.circuit_figure import circuit_picture

GRAPHS = [
    Graph(1, 1, 1),
    Graph(2, 2, 1),
    Graph(3, 4, 2),
    Graph(3, 4, 2, ungrouped=True),
    Graph(4, 6, 2),
    Graph(5, 3, 3),
]
SEEDS = range(4)


def scored(graph: Graph, seed: int = 0, **meta: Any) -> Circuit:
    """Random scores, some missing."""
    rng = np.random.default_rng(seed)
    scores = rng.standard_t(2, len(graph))
    return Circuit(graph, np.where(rng.random(len(graph)) < 0.1, np.nan, scores), meta=meta)


def random(graph: Graph, seed: int = 0, share: float = 0.2) -> Circuit:
    """Random edges, among them some without score."""
    rng = np.random.default_rng(seed + 100)
    return replace(scored(graph, seed), kept=rng.random(len(graph)) < share)


def names(circuit: Circuit) -> set[tuple[str, str]]:
    return {(str(s), str(r)) for s, r, _ in circuit.edges.itertuples(index=False)}


every_graph = pytest.mark.parametrize("graph", GRAPHS, ids=str)


@every_graph
@pytest.mark.parametrize("seed", SEEDS)
def test_pruned_is_what_lies_on_a_path(graph: Graph, seed: int) -> None:
    """Against networkx, where a receiver is a vertex between senders and the nodes that it feeds."""
    for share in (0.05, 0.2, 0.6):
        circuit = random(graph, seed, share)
        pruned = circuit.prune()
        assert names(pruned.prune()) == names(pruned) <= names(circuit)
        full = nx.DiGraph([(s, ("in", r)) for s, r in names(circuit)])
        full.add_nodes_from(["embed", "logits"])
        full.add_edges_from([(("in", r), node) for _, r in names(circuit) for node in graph.nodes_of(r)])
        before, after = nx.descendants(full, "embed") | {"embed"}, nx.ancestors(full, "logits")
        assert names(pruned) == {(s, r) for s, r in names(circuit) if s in before and ("in", r) in after}
        drawn = pruned.to_networkx()
        for node in drawn:  # nothing dangles, in the shared keys of a group neither
            assert node == "embed" or nx.has_path(drawn, "embed", node)
            assert node == "logits" or nx.has_path(drawn, node, "logits")


@every_graph
@pytest.mark.parametrize("seed", SEEDS)
def test_sets_of_edges(graph: Graph, seed: int) -> None:
    a, b = random(graph, seed), random(graph, seed + 1)
    assert len(a & b) + len(a | b) == len(a) + len(b)
    assert names(a - b) == names(a) - names(b)
    assert names(a & b) == names(a) & names(b)
    assert names(a | b) == names(a) | names(b)
    assert np.array_equal((a - b).scores, a.scores, equal_nan=True)
    assert (np.isnan((a | b).scores) == (np.isnan(a.scores) & np.isnan(b.scores))).all()
    assert all(edge in a for edge in names(a))
    assert not any(edge in a for edge in names(b - a))


@every_graph
@pytest.mark.parametrize("absolute", [True, False])
def test_the_best_are_nested_and_best(graph: Graph, absolute: bool) -> None:
    circuit = scored(graph)
    key = np.abs(circuit.scores) if absolute else circuit.scores
    counts = [n for n in (0, 1, 2, 5, 10, 40, len(circuit)) if n <= len(circuit)]
    tops = [circuit.top(n, absolute) for n in counts]
    assert [len(top) for top in tops] == counts
    for smaller, larger in itertools.pairwise(tops):
        assert not (smaller.kept & ~larger.kept).any()
    for top in tops[1:-1]:
        assert key[top.kept].min() >= np.nanmax(key[~top.kept])


def test_equals_are_taken_by_number() -> None:
    circuit = Circuit(GRAPHS[1], np.tile([1.0, -1.0], len(GRAPHS[1]) // 2))
    assert np.flatnonzero(circuit.top(5).kept).tolist() == [0, 1, 2, 3, 4]
    assert np.flatnonzero(circuit.top(3, absolute=False).kept).tolist() == [0, 2, 4]


def test_shares_are_of_all_edges() -> None:
    graph = Graph(4, 6, 2)
    circuit = scored(graph)
    assert len(circuit.top(0.1)) == round(0.1 * len(graph))
    assert len(circuit.top(1e-9)) == 1
    assert len(circuit.top(1.0)) == np.isfinite(circuit.scores).sum() < len(graph)
    assert len(circuit.top(1)) == 1
    assert len(circuit.top(3).top(10)) == 10  # of all that have a score


@pytest.mark.parametrize("n", [-1, 10**6, 0.0, 1.5, -0.1, float("nan"), True, "5"])
def test_bad_counts_are_refused(n: Any) -> None:
    with pytest.raises((NeedsError, TypeError)):  # TypeError's heirs: beartype at a string
        scored(GRAPHS[2]).top(n)


def test_overlap() -> None:
    graph = Graph(3, 4, 2)
    a, b = random(graph, 1), random(graph, 2)
    own = a.overlap(a)
    assert own == {"edges": 1, "nodes": 1, "shared": len(a), "only_here": 0, "only_there": 0, "spearman": 1}
    found, other = a.overlap(b), b.overlap(a)
    assert found["shared"] + found["only_here"] == len(a)
    assert found["edges"] == found["shared"] / len(names(a) | names(b)) == other["edges"]
    assert found["nodes"] == len({*a.nodes} & {*b.nodes}) / len({*a.nodes} | {*b.nodes})
    turned = Circuit(graph, -(a.scores**3), a.kept)
    assert a.overlap(turned)["spearman"] == pytest.approx(-1)
    nothing = Circuit(graph, np.full(len(graph), np.nan))
    assert nothing.overlap(nothing)["edges"] == 1
    assert np.isnan(nothing.overlap(a)["spearman"])


def test_keys_lead_to_the_heads_of_their_group_that_are_there() -> None:
    graph = Graph(2, 4, 2)
    kept = np.zeros(len(graph), bool)
    kept[graph.edge("embed", "a0.kv1<k>")] = True
    alone = Circuit(graph, np.ones(len(graph)), kept)
    assert alone.nodes == ("embed", "a0.h2", "a0.h3")
    kept[graph.edge("a0.h3", "logits")] = True
    two = Circuit(graph, np.ones(len(graph)), kept)
    assert two.nodes == ("embed", "a0.h3", "logits")
    assert [link[1:] for link in two.links()] == [("embed", "a0.kv1<k>", "a0.h3"), ("a0.h3", "logits", "logits")]
    assert len(two.prune()) == 2 and len(alone.prune()) == 0


@every_graph
def test_tables(graph: Graph) -> None:
    circuit = random(graph)
    table = circuit.table()
    assert names(circuit) == {(s, r) for s, r, _, kept in table.itertuples(index=False) if kept}
    assert len(table) == (circuit.kept | np.isfinite(circuit.scores)).sum()
    sizes = circuit.edges["score"].abs().to_numpy()
    assert (np.diff(sizes[np.isfinite(sizes)]) <= 0).all() and np.isfinite(sizes[: np.isfinite(sizes).sum()]).all()
    for sender, receiver, score in circuit.edges.itertuples(index=False):
        assert np.array_equal(score, circuit.scores[graph.edge(sender, receiver)], equal_nan=True)
    drawn = circuit.to_networkx()
    assert (*sorted(drawn),) == (*sorted(circuit.nodes),)
    assert nx.is_directed_acyclic_graph(drawn)
    assert {(s, about["receiver"]) for s, _, about in drawn.edges(data=True)} == names(circuit)
    nodes = circuit.by_node().set_index("node")
    assert (*nodes.index,) == circuit.nodes
    assert nodes["outgoing"].sum() == pytest.approx(np.nansum(sizes))
    for node in circuit.nodes:
        reached = [abs(score) for _, _, score in drawn.in_edges(node, data="score")]
        assert nodes["incoming"][node] == pytest.approx(np.nansum(reached))


@every_graph
@pytest.mark.parametrize("single", [True, False])
def test_json_there_and_back(graph: Graph, single: bool, tmp_path: Path) -> None:
    circuit = random(graph)
    if single:
        circuit = replace(circuit, scores=circuit.scores.astype(np.float32))
    circuit = replace(circuit, meta={"model": "m", "passes": {"forward": 2}, "window": (1, 2), "nan": float("inf")})
    found = Circuit.load(circuit.save(tmp_path / "circuit.json"))
    assert found.graph == circuit.graph and found.meta == circuit.meta
    assert np.array_equal(found.scores, circuit.scores, equal_nan=True)
    assert np.array_equal(found.kept, circuit.kept)
    circuit.top(0).save(tmp_path / "circuit.json")  # replaced
    assert len(Circuit.load(tmp_path / "circuit.json")) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["circuit.json"]


def test_damaged_json_is_one_sentence(tmp_path: Path) -> None:
    path = random(GRAPHS[2]).save(tmp_path / "circuit.json")
    good = json.loads(path.read_text())
    graph, scores = good["graph"], good["scores"]
    bad: list[Any] = [
        *([], 3, None, {}),
        *({k: v for k, v in good.items() if k != name} for name in good),
        good | {"format": "mechinterp-flow-1"},
        good | {"graph": graph | {"n_layers": 10**9}},
        good | {"graph": graph | {"n_layers": "3"}},
        good | {"graph": graph | {"n_kv_heads": 3}},
        good | {"graph": graph | {"ungrouped": True}},
        good | {"scores": scores[1:]},
        good | {"scores": ["1", *scores[1:]]},
        good | {"scores": [float("inf"), *scores[1:]]},
        *(good | {"kept": kept} for kept in ([-1], [len(scores)], [1.5], [True], [1, 1], 5, ["1"])),
    ]
    for content in bad:
        path.write_text(json.dumps(content))
        with pytest.raises(OutputError, match=r"holds no circuit \(.+\); give a file") as error:
            Circuit.load(path)
        assert "\n" not in str(error.value)
    path.write_text('{"format": "mech')
    with pytest.raises(OutputError, match="holds no circuit"):
        Circuit.load(path)
    with pytest.raises(OutputError, match="No such file"):
        Circuit.load(tmp_path / "none.json")
    with pytest.raises(OutputError, match="there is no folder"):
        random(GRAPHS[2]).save(tmp_path / "none" / "circuit.json")


@every_graph
def test_dot_there_and_back(graph: Graph) -> None:
    title = 'a "quoted" \\ name\n}; "embed" -> "logits" [receiver="logits"];'
    circuit = replace(random(graph), meta={"model": title})
    found = Circuit.from_dot(circuit.dot(), graph)
    assert np.array_equal(found.kept, circuit.kept)
    assert np.array_equal(found.scores[found.kept], circuit.scores[circuit.kept], equal_nan=True)
    assert np.isnan(found.scores[~found.kept]).all()
    assert len(Circuit.from_dot(circuit.top(0).dot(), graph)) == 0


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("digraph", "graph", "no whole digraph"),
        ("}\n", "", "no whole digraph"),
        ('receiver="logits"', 'receiver="a9.h0<q>"', "line 6 .* no node"),
        ('receiver="logits", ', "", "line 6 .*\\(no 'receiver'"),
        ('score="1.0"', 'score="much"', "line 6 .*\\(could not convert"),
        ('score="1.0"', 'score="inf"', "line 6 .*infinite"),
        ('-> "logits"', '-> "m1"', "line 6 .* not"),
    ],
)
def test_damaged_dot_is_refused(old: str, new: str, match: str) -> None:
    graph = Graph(2, 2, 1)
    kept = np.zeros(len(graph), bool)
    kept[graph.edge("embed", "logits")] = True
    text = Circuit(graph, np.ones(len(graph)), kept).dot()
    assert old in text
    with pytest.raises(OutputError, match=match):
        Circuit.from_dot(text.replace(old, new), graph)


def test_stability() -> None:
    graph = Graph(3, 4, 2)
    circuit = Circuit(graph, np.arange(len(graph), dtype=float)).top(10)
    rng = np.random.default_rng(0)
    calm = circuit.scores + 0.01 * rng.normal(size=(20, len(graph)))
    found = circuit.stability(calm)
    assert found == {"stability": 1, "stable": True, "to_this": 1, "resamples": 20, "n": 10}
    wild = rng.normal(size=(3, len(graph)))
    wild[:, :5] = 100
    found = circuit.stability(wild, n=8)
    best = [{*np.argsort(-np.abs(row), kind="stable")[:8].tolist()} for row in wild]
    pairs = [len(a & b) / len(a | b) for a, b in itertools.combinations(best, 2)]
    assert found["stability"] == pytest.approx(np.mean(pairs), abs=1e-6)
    assert not found["stable"] and found["n"] == 8
    judged = replace(circuit, meta=found)
    for shown in (repr(judged), judged._repr_html_(), judged.figure().to_json()):
        assert "unstable" in shown
    assert "unstable" in repr(judged.prune())
    assert "unstable" not in repr(judged.top(3)) and "unstable" not in repr(circuit)
    for rows in (calm[:1], calm[0], calm[:, 1:]):
        with pytest.raises(NeedsError, match="resampled of stability"):
            circuit.stability(rows)


@every_graph
def test_of_a_result(graph: Graph) -> None:
    scores = scored(graph).scores
    order = np.random.default_rng(0).permutation(len(graph))[: max(1, len(graph) // 2)]  # by name, in any order
    senders, receivers = (
        np.array(n)[e[order]] for n, e in zip((graph.senders, graph.receivers), graph.ends, strict=True)
    )
    coords = {"sender": ("edge", senders), "receiver": ("edge", receivers)}
    attrs = {n: getattr(graph, n) for n in ("n_layers", "n_heads", "n_kv_heads")} | {"ungrouped": int(graph.ungrouped)}
    data = xr.Dataset({"score": ("edge", scores[order])}, coords, attrs)
    circuit = Circuit.of(Result(data, {"model": "m", "options": {"method": "'eap'", "metric": "LogitDiff()"}}))
    assert "method eap; metric LogitDiff()" in circuit.caption
    assert circuit.graph == graph and circuit.meta["model"] == "m"
    assert np.array_equal(circuit.scores[order], scores[order], equal_nan=True)
    assert np.isfinite(circuit.scores).sum() == np.isfinite(scores[order]).sum() == len(circuit)
    with pytest.raises(NeedsError, match="no score;"):
        Circuit.of(Result(data.rename(score="effect")))
    with pytest.raises(NeedsError, match="no n_layers, n_heads"):
        Circuit.of(Result(data.assign_attrs(n_heads=1).drop_attrs()))


def test_what_does_not_fit_is_refused() -> None:
    a, b = random(Graph(3, 4, 2)), random(Graph(3, 4, 2, ungrouped=True))
    for made in (lambda: a & b, lambda: a | b, lambda: a - b, lambda: a.overlap(b)):
        with pytest.raises(NeedsError, match="different graphs"):
            made()
    with pytest.raises(NeedsError, match="scores of Circuit"):
        Circuit(a.graph, b.scores)
    with pytest.raises(NeedsError, match="kept of Circuit"):
        Circuit(a.graph, a.scores, np.ones(len(a.graph)))
    with pytest.raises(NeedsError, match="infinite"):
        Circuit(a.graph, np.full(len(a.graph), np.inf))
    with pytest.raises(NeedsError, match="no node"):
        assert ("embed", "a9.h0<q>") in a
    with pytest.raises(NeedsError, match="max_edges"):
        a.figure(0)
    with pytest.raises(ValueError, match="read-only"):
        a.kept[0] = True


def labels(figure: Any) -> list[str]:
    return [shape.label.text for shape in figure.layout.shapes if shape.label.text]


@every_graph
def test_the_figure_names_every_node_and_edge(graph: Graph) -> None:
    circuit = replace(random(graph, share=0.3), meta={"model": "<b>&", "metric": "logit_diff", "examples": 3})
    figure = circuit.figure(max_edges=1000)
    assert sorted(labels(figure)) == sorted(circuit.nodes)
    said = [trace.hovertemplate for trace in figure.data if trace.hovertemplate]
    assert len(said) == len(circuit.links())
    for sender, receiver, _ in circuit.edges.itertuples(index=False):
        assert any(f"{sender} → {receiver}".replace("<", "&lt;").replace(">", "&gt;") in text for text in said)
    assert "&lt;b&gt;&amp;" in figure.layout.title.text
    assert "Drawn" not in figure.layout.title.subtitle.text
    again = circuit.figure(max_edges=1000)
    assert again.to_json() == figure.to_json()


def test_labels_lie_apart() -> None:
    """As many nodes as a person can read, in many layers or in few; sizes are in pixels."""
    for graph, seed in itertools.product((Graph(30, 9, 3), Graph(4, 6, 2)), range(2)):
        rng = np.random.default_rng(seed)
        some = {"embed", "logits", *rng.choice(graph.senders[1:], 24, replace=False)}
        kept = [
            graph.senders[s] in some and bool({*graph.nodes_of(graph.receivers[r])} & some)
            for s, r in zip(*graph.ends, strict=True)
        ]
        circuit = Circuit(graph, rng.normal(size=len(graph)), np.array(kept))
        figure = circuit.figure()
        assert figure.layout.width <= 1060 and figure.layout.height <= 660
        assert f"Drawn: the strongest 60 of {len(circuit)} edges" in figure.layout.title.subtitle.text.replace(
            "<br>", " "
        )
        boxes = [shape for shape in figure.layout.shapes if shape.label.text]
        wide = max(max(float(w) for w in (b.x1,) if w is not None) for b in boxes if b.type == "rect") * 2
        for a, b in itertools.combinations(boxes, 2):
            assert abs(a.xanchor - b.xanchor) >= wide or abs(a.yanchor - b.yanchor) >= 20, (a.label.text, b.label.text)
        right = figure.layout.xaxis.range[1]
        assert all(wide / 2 <= b.xanchor <= right - wide / 2 for b in boxes)


SOLID = "into queries, MLPs, logits"


@pytest.mark.parametrize("size", [0, 25])
def test_the_picture_shows_what_the_figure_does(size: int) -> None:
    circuit = scored(Graph(3, 4, 2), circuit_type="attention_only").top(size)
    picture = circuit_picture(circuit)
    (axes,) = picture.axes
    assert {text.get_text() for text in axes.texts} >= {*circuit.nodes}
    assert len(axes.lines) == len(circuit.links())
    assert any("of type attention only" in text.get_text() for text in picture.texts)
    picture.canvas.draw()  # and nothing of it warns


def test_the_figure_of_few_or_no_edges() -> None:
    graph = Graph(3, 4, 2)
    figure = random(graph).top(0).figure()
    assert "Nothing to draw" in figure.layout.title.subtitle.text
    kept = np.zeros(len(graph), bool)
    kept[[graph.edge("embed", "m1"), graph.edge("m1", "a2.h1<q>"), graph.edge("a2.h1", "logits")]] = True
    figure = Circuit(graph, np.ones(len(graph)), kept).figure()
    assert (*figure.layout.xaxis.ticktext,) == ("layer 1", "layer 2")
    assert {t.name for t in figure.data if t.name} == {"head", "MLP", "embedding, logits", "positive", SOLID}


def test_in_words() -> None:
    circuit = replace(scored(Graph(3, 4, 2)), meta={"model": "<tiny>", "analyzer": "EdgeAttribution", "examples": 1})
    first = circuit.edges.iloc[0]
    for shown in (repr(circuit), circuit._repr_html_()):
        assert "1 example" in shown and "EdgeAttribution" in shown and first["sender"] in shown and "more" in shown
    assert "<tiny>" in repr(circuit) and "&lt;tiny&gt;" in circuit._repr_html_()
    assert "a0" not in repr(circuit.top(0))


def test_of_a_run(model: mi.Model) -> None:
    prompts = mi.Examples.pairs([[5, 6, 7, 8]] * 2, [[5, 9, 7, 8], [5, 10, 7, 8]], answers=[(1, 3), (2, 4)])
    result = mi.run(model, prompts, mi.EdgeAttribution("eap", ungrouped=True))
    circuit = Circuit.of(result)
    assert circuit.graph == Graph.of(model, ungrouped=True)
    assert np.array_equal(circuit.scores, result.data["score"].values)
    assert circuit.title == f"Circuit of {model.name}" and "EdgeAttribution; method eap" in circuit.caption
