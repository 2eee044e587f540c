"""Edges: attribution against autograd on split inputs, circuits against the runs they lie between, and each other."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import mechinterp as mi
from mechinterp.core.graph import Graph
from mechinterp.engine.edges import EdgeRuns, run_circuits
from mechinterp.errors import ExamplesError, NeedsError

PAIRS = mi.tasks.ioi(4, seed=3)
"""Of several lengths, so that batches are padded."""
FEW = mi.tasks.ioi(2, seed=3)


def split_gradients(model: mi.Model, embeds: Tensor, right: int, wrong: int) -> dict[str, Tensor]:
    """The gradient at every receiver's own input, from a pass in which each has one; literal, on plain modules."""
    total, leaves = split_run(model, embeds, right, wrong, {})
    return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))


def split_run(
    model: mi.Model, embeds: Tensor, right: int, wrong: int, moved: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The logit difference where receivers have an input of their own, some of them `moved`; and how much, as leaves.

    What others write at queries, keys and values is kept as it is, as something added.
    """
    hf: Any = model.hf
    d, leaves, handles = model.dims, {}, []

    def leaf(name: str, like: Tensor) -> Tensor:
        leaves[name] = (torch.zeros_like(like) + moved.get(name, 0)).detach().requires_grad_()
        return leaves[name]

    def project(layer: int, kind: str) -> Callable[..., Tensor]:
        block = hf.model.layers[layer]
        heads = d.n_heads if kind == "q" else d.n_kv_heads

        def hook(module: Any, args: Any, output: Tensor) -> Tensor:
            out = []
            for h in range(heads):
                rows = slice(h * d.d_head, (h + 1) * d.d_head)
                name = f"a{layer}.{'h' if kind == 'q' else 'kv'}{h}<{kind}>"
                read = block.input_layernorm(seen[layer] + leaf(name, seen[layer]))
                bias = None if module.bias is None else module.bias[rows]
                out.append(torch.nn.functional.linear(read, module.weight[rows], bias))
            plain = torch.nn.functional.linear(args[0], module.weight, module.bias)
            return torch.cat(out, -1) + (output - plain).detach()

        return hook

    seen: dict[int, Tensor] = {}
    for i, block in enumerate(hf.model.layers):
        handles.append(
            block.register_forward_pre_hook(
                lambda _, args, kwargs, i=i: seen.__setitem__(i, args[0] if args else kwargs["hidden_states"]),
                with_kwargs=True,
            )
        )
        for kind in "qkv":
            handles.append(getattr(block.self_attn, f"{kind}_proj").register_forward_hook(project(i, kind)))
        handles.append(
            block.post_attention_layernorm.register_forward_pre_hook(
                lambda _, args, i=i: (args[0] + leaf(f"m{i}", args[0]),)
            )
        )
    handles.append(hf.model.norm.register_forward_pre_hook(lambda _, args: (args[0] + leaf("logits", args[0]),)))
    try:
        logits = hf(inputs_embeds=embeds, use_cache=False).logits
        return logits[0, -1, right] - logits[0, -1, wrong], leaves
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def contributions(model: mi.Model, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """(embedding, what every node writes), from a trace."""
    trace = model.trace(ids, [mi.sites.embed(), mi.sites.z(), mi.sites.mlp_out()])
    out = {"embed": trace["embed"]}
    for i in range(model.dims.n_layers):
        by_head = torch.einsum("bphe,hed->hbpd", trace[f"z.{i}"], model.W_O(i))
        out |= {f"a{i}.h{h}": one for h, one in enumerate(by_head)} | {f"m{i}": trace[f"mlp_out.{i}"]}
    return out["embed"], out


def by_hand(model: mi.Model, pairs: mi.Examples, shares: list[float]) -> np.ndarray:
    """EAP by its definition, one example at a time."""
    graph, tokens = Graph.of(model), model.tokenize(pairs)
    total = np.zeros(len(graph))
    sender, receiver = graph.ends
    for i in range(len(tokens)):
        batch = tokens.batch([i])
        right, wrong = batch.answers[0]
        (clean, ours), (corrupted, theirs) = (
            contributions(model, batch.run(run).ids) for run in ("clean", "corrupted")
        )
        grads: dict[str, Tensor] = {}
        for share in shares:
            embeds = corrupted + share * (clean - corrupted)
            found = split_gradients(model, embeds, right[0], wrong[0])
            grads = {name: grads.get(name, 0) + g / len(shares) for name, g in found.items()}
        for e in range(len(graph)):
            u, v = graph.senders[sender[e]], graph.receivers[receiver[e]]
            total[e] += float(((ours[u] - theirs[u]) * grads[v]).sum())
    return total / len(tokens)


def relative(found: Any, expected: Any) -> float:
    found, expected = np.asarray(found, float), np.asarray(expected, float)
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize(("method", "shares"), [("eap", [1.0]), ("eap-ig-inputs", [0.0, 0.5])])
def test_scores_are_those_of_split_inputs(model: mi.Model, method: str, shares: list[float]) -> None:
    expected = by_hand(model, PAIRS, shares)
    for side in ("right", "left"):
        found = mi.run(model, PAIRS, mi.EdgeAttribution(method, steps=2), padding_side=side, batch_size=3)  # pyright: ignore[reportArgumentType]
        assert relative(found.data["score"], expected) < 1e-4
    each = mi.run(model, PAIRS, mi.EdgeAttribution(method, steps=2, intervals=True))  # pyright: ignore[reportArgumentType]
    assert relative(each.data["score"], expected) < 1e-4
    assert each.data["scores"].shape == (4, len(Graph.of(model)))


ADDED = torch.linspace(-1, 1, 32)
SEEN = {
    "z": mi.Scale(mi.sites.z(1, heads=2), 0.3),
    "mlp_out": mi.Zero(mi.sites.mlp_out(0)),
    "embed": mi.Apply(mi.sites.embed(), lambda x: x * x.abs()),
    "k_rot": mi.Scale(mi.sites.k_rot(1), -1.5),
    "pattern": mi.Zero(mi.sites.pattern(2, heads=(0, 1))),
    "mlp_act": mi.Apply(mi.sites.mlp_act(1), lambda x: x**2),
    "resid_post": mi.Steer(mi.sites.resid_post(0), ADDED, 3.0),
    "attn_out": mi.Add(mi.sites.attn_out(1, positions="end"), ADDED),
    "resid_mid": mi.Noise(mi.sites.resid_mid(2), 0.5),
}
"""Writes that belong to a node, or only add."""
ADDING = {
    "q": mi.Add(mi.sites.q(1), 0.5),
    "v": mi.Add(mi.sites.v(2), -0.3),
    "mlp_in": mi.Add(mi.sites.mlp_in(1), ADDED),
    "logits": mi.Apply(mi.sites.logits(), lambda x: torch.tanh(x) * 3),
}
"""Writes at what a receiver makes of its input."""


@pytest.mark.parametrize("name", [*SEEN, *ADDING])
def test_scores_of_what_is_in_force(either: mi.Model, name: str) -> None:
    """Interventions around an attribution are seen in what senders write and in gradients at receivers."""
    if name == "mlp_act" and either.dims.sparse:  # has no such site
        name = "mlp_out"
    without = by_hand(either, PAIRS, [0.0, 0.5])
    with either.intervene((SEEN | ADDING)[name]):
        expected = by_hand(either, PAIRS, [0.0, 0.5])
        found = mi.run(either, PAIRS, mi.EdgeAttribution("eap-ig-inputs", steps=2))
    assert relative(found.data["score"], expected) < 1e-4
    assert relative(without, expected) > 1e-3


@pytest.mark.parametrize("name", ["z", "k_rot", "resid_post"])
def test_performed_patches_of_what_is_in_force(either: mi.Model, name: str) -> None:
    """Exact scores, against runs in which one receiver's input lacks what one sender changed."""
    graph, tokens = Graph.of(either), either.tokenize(FEW)
    sender, receiver = graph.ends
    some = np.random.default_rng(0).choice(len(graph), 12, replace=False)
    expected = np.zeros(len(some))
    with either.intervene(SEEN[name]):
        found = mi.run(either, FEW, mi.EdgeAttribution("exact")).data["score"].values
        for i in range(len(tokens)):
            batch = tokens.batch([i])
            right, wrong = batch.answers[0]
            (clean, ours), (_, theirs) = (contributions(either, batch.run(run).ids) for run in ("clean", "corrupted"))
            base, _ = split_run(either, clean, right[0], wrong[0], {})
            for j, edge in enumerate(some):
                u = graph.senders[sender[edge]]
                moved = {graph.receivers[receiver[edge]]: theirs[u] - ours[u]}
                patched, _ = split_run(either, clean, right[0], wrong[0], moved)
                expected[j] += float((base - patched).detach()) / len(tokens)
    np.testing.assert_allclose(found[some], expected, atol=2e-5 + 1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("method", "write"),
    [
        ("eap", mi.Scale(mi.sites.q(1), 0.5)),
        ("eap", mi.Zero(mi.sites.attn_out(1))),
        ("eap-ig-inputs", mi.Scale(mi.sites.resid_post(0), 0.5)),
        ("eap-ig-activations", mi.Zero(mi.sites.mlp_in(0))),
        ("eap", mi.Zero(mi.sites.head_out(1, heads=0))),
        ("exact", mi.Add(mi.sites.q(1), 0.5)),
        ("exact", mi.Scale(mi.sites.logits(), 2.0)),
        ("exact", mi.Add(mi.sites.final_norm(), 2.0)),
    ],
)
def test_what_scores_of_edges_know_nothing_of_is_refused(method: Any, write: mi.Intervention) -> None:
    model = mi.testing.tiny("llama")
    with model.intervene(write), pytest.raises(NeedsError, match=rf"{type(write).__name__} writes at .*leave"):
        mi.run(model, PAIRS, mi.EdgeAttribution(method))
    handle = model.hf.model.layers[0].mlp.register_forward_hook(lambda m, a, out: out * 2)
    with pytest.raises(NeedsError, match="hooks are inside the model"):
        mi.run(model, PAIRS, mi.EdgeAttribution(method))
    handle.remove()
    mi.run(model, FEW, mi.EdgeAttribution(method))


def test_activation_paths_are_integrated_sender_by_sender(model: mi.Model) -> None:
    """At one step, all clean, it is EAP; at two, the gradients of a sender's edges are its own path's."""
    one = mi.run(model, PAIRS, [mi.EdgeAttribution("eap-ig-activations", steps=1), mi.EdgeAttribution("eap")])
    assert relative(one[0].data["score"], one[1].data["score"]) < 1e-4
    two = mi.run(model, PAIRS, mi.EdgeAttribution("eap-ig-activations", steps=2)).data["score"].values
    graph, tokens = Graph.of(model), model.tokenize(PAIRS)
    sender, receiver = graph.ends
    halfway = np.zeros(len(graph))
    for i in range(len(tokens)):
        batch = tokens.batch([i])
        right, wrong = batch.answers[0]
        (clean, ours), (_, theirs) = (contributions(model, batch.run(run).ids) for run in ("clean", "corrupted"))
        z = [model.trace(batch.run(run).ids, mi.sites.z(1))["z.1"] for run in ("clean", "corrupted")]
        with model.intervene(mi.Replace(mi.sites.z(1), (z[0] + z[1]) / 2)):
            grads = split_gradients(model, clean, right[0], wrong[0])
        for e in np.nonzero([graph.senders[s].startswith("a1.") for s in sender])[0]:
            u, v = graph.senders[sender[e]], graph.receivers[receiver[e]]
            halfway[e] += float(((ours[u] - theirs[u]) * grads[v]).sum()) / len(tokens)
    mine = np.array([graph.senders[s].startswith("a1.") for s in sender])
    assert relative(two[mine], (halfway + one[1].data["score"].values)[mine] / 2) < 1e-4


def test_key_and_value_edges_of_a_group_sum_to_its_own(model: mi.Model) -> None:
    grouped, split = Graph.of(model), Graph.of(model, ungrouped=True)
    for method in ("eap", "eap-ig-inputs"):
        own, parts = (
            mi.run(model, PAIRS, mi.EdgeAttribution(method, steps=2, ungrouped=u)).data["score"].values
            for u in (False, True)
        )
        for layer in range(grouped.n_layers):
            for kind in "kv":
                (a, shape), (b, wide) = grouped.into(kind, layer), split.into(kind, layer)
                total = parts[b].reshape(shape[0], -1, wide[1]).sum(1)
                assert relative(total, own[a].reshape(shape)) < 1e-4
            (a, _), (b, _) = grouped.into("q", layer), split.into("q", layer)
            assert relative(parts[b], own[a]) < 1e-4


def test_a_node_is_the_sum_of_its_edges(model: mi.Model) -> None:
    """The gradient at what a node writes is the sum of those at all that read it."""
    edges = mi.run(model, PAIRS, mi.EdgeAttribution("eap")).data
    nodes = [
        mi.AttributionPatching("z", heads="each", direction="noise", positions=None),
        mi.AttributionPatching("mlp_out", direction="noise", positions=None),
    ]
    heads, mlps = mi.run(model, PAIRS, nodes)
    outgoing = edges["score"].to_series().groupby(edges["sender"].values).sum()
    for i in range(model.dims.n_layers):
        mlp = -float(mlps.data["estimate"].sel(layer=i).mean())
        assert float(outgoing[f"m{i}"]) == pytest.approx(mlp, abs=1e-4)
        for h in range(model.dims.n_heads):
            head = -float(heads.data["estimate"].sel(layer=i, head=h).mean())
            assert float(outgoing[f"a{i}.h{h}"]) == pytest.approx(head, abs=1e-4)


@pytest.mark.parametrize("ungrouped", [False, True])
def test_an_exact_patch_is_the_circuit_without_the_edge(either: mi.Model, ungrouped: bool) -> None:
    """Two ways to the same number: a sweep that writes what a receiver makes of it, and the edge-level forward."""
    graph, tokens = Graph.of(either, ungrouped), either.tokenize(PAIRS)
    kept = ~np.eye(len(graph), dtype=bool)[:: 11 if ungrouped else 3]
    runs = run_circuits(either, tokens, graph, kept, mi.logit_diff(), batch_size=3)
    for side in ("left",) if ungrouped else ("right", "left"):
        exact = mi.run(
            either,
            PAIRS,
            mi.EdgeAttribution("exact", ungrouped=ungrouped, intervals=True),
            padding_side=side,
            batch_size=3,
        )
        found = exact.data["scores"].values[:, :: 11 if ungrouped else 3].T
        assert relative(found, runs.full - runs.values) < 1e-4


@pytest.mark.parametrize("ungrouped", [False, True])
@pytest.mark.parametrize("cut_to", ["corrupted", "zero", "mean"])
def test_all_edges_are_the_clean_run_and_none_the_reference(model: mi.Model, ungrouped: bool, cut_to: Any) -> None:
    pairs = mi.Examples.pairs([[5, 6, 7, 8], [9, 8, 7, 5]], [[5, 9, 7, 8], [9, 6, 7, 5]], [(5, 9), (6, 7)])
    graph, batch = Graph.of(model, ungrouped), model.tokenize(pairs).batch([0, 1])
    from mechinterp.engine.edges import reference_means

    means = reference_means(model, model.tokenize(pairs), 1) if cut_to == "mean" else None
    runs = EdgeRuns(model, batch, graph, mi.logit_diff(), cut_to=cut_to, means=means)
    every, none = np.ones((1, len(graph)), bool), np.zeros((1, len(graph)), bool)
    computed = runs._fly(every, 0)  # from the first layer on, though it is known to be the clean run
    torch.testing.assert_close(computed[0], runs.full, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(runs.run(every)[0], runs.full, atol=1e-4, rtol=1e-4)
    n = model.dims.n_layers
    if cut_to == "corrupted":
        expected = mi.sweep(model, pairs, [mi.sites.embed()], mi.logit_diff()).data["value"].values[:, 0]
    else:
        value = 0.0 if means is None else means[mi.sites.resid_post(n - 1)]
        biases = sum((b for i in range(n) if (b := model.b_O(i)) is not None), torch.zeros(model.dims.d_model))
        last = value if cut_to == "mean" else biases
        expected = (
            mi.sweep(model, pairs, [mi.Replace(mi.sites.resid_post(n - 1), last)], mi.logit_diff(), base="clean")
            .data["value"]
            .values[:, 0]
        )
    np.testing.assert_allclose(runs.run(none)[0], expected, atol=1e-4, rtol=1e-4)


def test_circuits_depend_neither_on_their_company_nor_on_the_budget(model: mi.Model) -> None:
    graph, tokens = Graph.of(model), model.tokenize(PAIRS)
    kept = np.random.default_rng(0).random((9, len(graph))) < np.linspace(0.1, 0.99, 9)[:, None]
    whole = run_circuits(model, tokens, graph, kept, mi.kl())
    small = run_circuits(model, tokens, graph, kept[::-1], mi.kl(), batch_size=1, budget=1)
    np.testing.assert_allclose(whole.values, small.values[::-1], atol=2e-5)
    assert np.abs(whole.values[:5]).min() > 1e-3


def test_circuits_from_their_first_cut_on_are_circuits_from_the_start(model: mi.Model) -> None:
    graph = Graph.of(model)
    batch = model.tokenize(PAIRS).batch(range(4))
    runs = EdgeRuns(model, batch, graph, mi.logit_diff())
    kept = np.ones((2, len(graph)), bool)
    kept[0, graph.edge("a0.h1", "a2.h1<q>")] = kept[1, graph.edge("m1", "logits")] = False
    assert runs._entries(kept).tolist() == [2, 3]
    torch.testing.assert_close(runs.run(kept), runs._fly(kept, 0), atol=1e-5, rtol=1e-5)
    assert float((runs.run(kept) - runs.full).abs().min()) > 0


def test_planted_circuits_are_found() -> None:
    for planted in (mi.tasks.planted.induction(8), mi.tasks.planted.copy(8), mi.tasks.planted.grouped(8)):
        methods = ("exact", "eap-ig-inputs", "eap-ig-activations")
        for result in mi.run(planted.model, planted.pairs, [mi.EdgeAttribution(m) for m in methods]):  # pyright: ignore[reportArgumentType]
            edges = result.data
            truth = [
                (u, v) in planted.edges for u, v in zip(edges["sender"].values, edges["receiver"].values, strict=True)
            ]
            assert sum(truth) == len(planted.edges)
            size = np.abs(edges["score"].values)
            true, false = size[truth], size[~np.array(truth)]
            auroc = (true[:, None] > false).mean()
            assert auroc >= (1.0 if result.meta["options"]["method"] == "'exact'" else 0.95)


def test_bad_input(model: mi.Model) -> None:
    odd = mi.EdgeAttribution()
    object.__setattr__(odd, "method", "best")  # past the run-time check of types in tests
    with pytest.raises(NeedsError, match="method of EdgeAttribution"):
        odd.__post_init__()
    with pytest.raises(NeedsError, match="steps of EdgeAttribution"):
        mi.EdgeAttribution(steps=0)
    with pytest.raises(ExamplesError, match="corrupted"):
        mi.run(model, mi.Examples.of([[5, 6]], answers=[(5, 6)]), mi.EdgeAttribution("eap"))
    tokens, graph = model.tokenize(PAIRS), Graph.of(model)
    none = np.zeros((1, len(graph)), bool)
    with pytest.raises(ExamplesError, match="one length"):
        run_circuits(model, tokens, graph, none, mi.logit_diff(), cut_to="mean")
    with pytest.raises(NeedsError, match="of a model with"):
        run_circuits(model, tokens, Graph(9, 4, 2), none, mi.logit_diff())
    with model.intervene(mi.Zero(mi.sites.z(0))), pytest.raises(NeedsError, match="intervene"):
        run_circuits(model, tokens, graph, none, mi.logit_diff())
