"""Names and numbers of nodes and edges."""

import numpy as np
import pytest

import mechinterp as mi
from mechinterp.core.graph import Graph
from mechinterp.errors import NeedsError


@pytest.mark.parametrize(
    ("layers", "heads", "kv_heads", "ungrouped", "count"),
    [
        (12, 12, 12, True, 32_491),  # GPT-2
        (30, 9, 3, True, 123_211),  # SmolLM2-135M
        (30, 9, 3, False, 70_651),
        (24, 14, 2, True, 179_749),  # Qwen2.5-0.5B
        (24, 14, 2, False, 79_813),
    ],
)
def test_counts_are_those_of_the_literature(
    layers: int, heads: int, kv_heads: int, ungrouped: bool, count: int
) -> None:
    assert len(Graph(layers, heads, kv_heads, ungrouped)) == count


@pytest.mark.parametrize("ungrouped", [False, True])
def test_every_edge_has_a_number_and_a_name(model: mi.Model, ungrouped: bool) -> None:
    graph = Graph.of(model, ungrouped)
    sender, receiver = graph.ends
    assert len(sender) == len(graph) == len({*zip(sender.tolist(), receiver.tolist(), strict=True)})
    for i in range(0, len(graph), 7):
        assert graph.edge(graph.senders[sender[i]], graph.receivers[receiver[i]]) == i


def test_edges_into_one_kind_lie_side_by_side(model: mi.Model) -> None:
    graph = Graph.of(model)
    seen = np.zeros(len(graph), int)
    _, receiver = graph.ends
    for layer in range(graph.n_layers):
        for kind in ("q", "k", "v", "mlp"):
            place, shape = graph.into(kind, layer)
            seen[place] += 1
            block = receiver[place].reshape(shape)
            assert (block == block[:, :1]).all()
            names = [graph.receivers[r] for r in block[:, 0]]
            stem = f"m{layer}" if kind == "mlp" else f"a{layer}."
            assert all(n.startswith(stem) and (kind == "mlp" or n.endswith(f"<{kind}>")) for n in names)
    place, _ = graph.into("logits")
    seen[place] += 1
    assert (seen == 1).all()


def test_a_key_feeds_the_heads_of_its_group(model: mi.Model) -> None:
    graph = Graph.of(model)
    assert graph.nodes_of("a1.kv1<k>") == ("a1.h2", "a1.h3")
    assert graph.nodes_of("a1.h2<q>") == ("a1.h2",)
    assert graph.nodes_of("m0") == ("m0",)


def test_what_is_no_edge_is_refused(model: mi.Model) -> None:
    graph = Graph.of(model)
    with pytest.raises(NeedsError, match="does not come before"):
        graph.edge("a1.h0", "a1.h1<q>")
    with pytest.raises(NeedsError, match="no node"):
        graph.edge("embed", "a1.h1<k>")
