"""Edges and circuits on SmolLM2: what they cost, what they find, and what they find where the truth is known.

Times, each beside what bounds it, in the same rounds:
- EAP over every edge, on 32 indirect-object pairs of 14 tokens, against one forward and one backward of the bare
  model on the same batch (gradients of activations, as any such method needs); EAP-IG with five steps against
  five of them; and against the literal way, which the EAP-IG repository takes on TransformerLens: an input of its
  own for every receiver, and a difference tensor for every node. Here that is done with hooks on the bare
  model, which is faster than the repository: that took 122 s (136 s for EAP-IG, with its attention sum replaced
  by an einsum), measured once on such a machine; the lines "recorded" compare with these numbers.
- one edge-level forward of a circuit in which every receiver has an input of its own, on 64 pairs, against the bare
  forward; and a faithfulness curve of ten sizes on 32 pairs, against the repository's recorded 143 s.
- peak memory above the model's, each in a process of its own, against that of forward and backward.

Facts, printed as tables: AUROC of every method over the true edges of planted circuits; correlation of EAP-IG with
exact patches, and of these with a loop by hand; areas of the faithfulness curves (CMD, CPR) on SmolLM2, on pairs
that the scores were not found on.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import mechinterp as mi
from benchmarks.sweep import second_names
from benchmarks.timing import Line, arguments, compare, environment, interleave, peak_of, report
from mechinterp.core.graph import Graph
from mechinterp.core.tokens import TokenBatch
from mechinterp.engine.edges import EdgeRuns, run_circuits
from mechinterp.studies.discovery import edges_of_nodes, node_effects
from mechinterp.studies.evaluation import FRACTIONS, summary

RECORDED = {"eap": 122.0, "eap-ig-inputs": 136.0, "curve": 143.0}
"""Seconds of the EAP-IG repository on this work (32 pairs of 14 tokens, 2 threads)."""
STEPS = 5
THRESHOLDS = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
"""ACDC's τ, in nats."""


def main() -> None:
    if len(sys.argv) == 4 and sys.argv[1] == "--peak":
        print(peak(sys.argv[2], int(sys.argv[3])))
        return
    options = arguments(__doc__)
    model = load()
    n, rounds = (4, 1) if options.quick else (32, 5)
    lines = [*attribution(model, n, rounds, options.quick), *circuits(model, n, rounds)]
    lines += memory(n)
    facts = environment(model="smollm2", threads=torch.get_num_threads(), dtype="float32", rounds=rounds)
    report("Edges and circuits; ratio = ours / theirs", lines, facts, None)
    tables = {"planted": planted(8 if options.quick else 24), "exact": correlations(options.quick)}
    if not options.quick:
        tables |= {f"curves, {task}": curves(model, task) for task in ("ioi", "greater_than")}
    for name, table in tables.items():
        print(f"\n{name}\n{table.to_string(index=False, float_format=lambda x: f'{x:.4f}')}")
    if options.json:
        content = {"facts": facts, "lines": [asdict(line) for line in lines]}
        content |= {name: table.round(4).to_dict("records") for name, table in tables.items()}
        options.json.write_text(json.dumps(content, indent=2, default=str) + "\n")


def load() -> mi.Model:
    model = mi.Model.load("smollm2")
    for parameter in model.hf.parameters():
        parameter.requires_grad_(False)
    return model


def forward_backward(model: mi.Model, batch: TokenBatch) -> None:
    """The floor: the metric's gradient at the embeddings, on the bare model."""
    with torch.enable_grad():
        embeds = model.hf.get_input_embeddings()(batch.ids).detach().requires_grad_()
        logits = model.hf(inputs_embeds=embeds, use_cache=False, logits_to_keep=1).logits[:, -1]
        rows = torch.arange(len(batch))
        (logits[rows, batch.side(0)[:, 0]] - logits[rows, batch.side(1)[:, 0]]).sum().backward()


def attribution(model: mi.Model, n: int, rounds: int, quick: bool) -> list[Line]:
    pairs = second_names(n)
    batch = model.tokenize(pairs).batch(range(n))
    names = {"eap": mi.EdgeAttribution("eap"), "eap, ungrouped": mi.EdgeAttribution("eap", ungrouped=True)}
    names["eap-ig-inputs"] = mi.EdgeAttribution("eap-ig-inputs", steps=STEPS)
    ways: dict[str, Callable[[], Any]] = {
        name: (lambda one=one: mi.run(model, pairs, one)) for name, one in names.items()
    }
    ways["floor"] = lambda: forward_backward(model, batch)
    some = batch.take(range(min(n, 8)))  # the literal way keeps too much for more
    ways["literal"] = lambda: literal(model, some)
    found = mi.run(model, second_names(len(some)), names["eap"]).data["score"].values * len(some)
    gap = np.abs(found - literal(model, some).numpy()).max() / np.abs(found).max()
    assert gap < 1e-3, f"the literal way differs by {gap}"
    ways["eap"]()
    seconds = interleave(ways, rounds)
    edges, ungrouped = (len(Graph.of(model, each)) for each in (False, True))
    floor, five = seconds["floor"], [s * STEPS for s in seconds["floor"]]
    return [
        compare(f"EAP, {edges:,} edges, {n} pairs", seconds["eap"], "forward and backward", floor, 3),
        compare(f"EAP, {ungrouped:,} edges, {n} pairs", seconds["eap, ungrouped"], "forward and backward", floor, 3),
        compare(f"EAP-IG, {STEPS} steps", seconds["eap-ig-inputs"], f"{STEPS} forwards and backwards", five, 1.8),
        compare(
            f"EAP, {edges:,} edges, {n} pairs", seconds["eap"], f"literal, {len(some)} pairs, scaled",
            [s * n / len(some) for s in seconds["literal"]],
        ),
        *([] if quick else [
            compare("EAP, ungrouped", seconds["eap, ungrouped"], "the repository, recorded",
                    [RECORDED["eap"]] * rounds, 1 / 20),
            compare("EAP-IG", seconds["eap-ig-inputs"], "the repository, recorded",
                    [RECORDED["eap-ig-inputs"]] * rounds),
        ]),
    ]  # fmt: skip


def circuits(model: mi.Model, n: int, rounds: int) -> list[Line]:
    graph, rng = Graph.of(model), np.random.default_rng(0)
    pairs = mi.tasks.ioi(2 * n)
    tokens = model.tokenize(pairs)
    batch = tokens.batch(range(2 * n))
    runs = EdgeRuns(model, batch, graph, mi.logit_diff())
    half = rng.random((1, len(graph))) < 0.5
    curve = second_names(n)
    scored = mi.Circuit(graph, rng.normal(size=len(graph)))
    rows = np.stack([scored.top(float(share)).kept for share in FRACTIONS])

    @torch.no_grad()
    def bare() -> None:
        model.hf(batch.ids, attention_mask=batch.mask.long(), use_cache=False, logits_to_keep=1)

    ways: dict[str, Callable[[], Any]] = {
        "circuit": lambda: runs.run(half),
        "bare": bare,
        "curve": lambda: run_circuits(model, model.tokenize(curve), graph, rows, mi.logit_diff()),
    }
    for way in ways.values():
        way()
    seconds = interleave(ways, rounds)
    return [
        compare(f"a circuit of half the edges, {2 * n} pairs", seconds["circuit"], "bare forward", seconds["bare"], 4),
        *([] if n < 32 else [
            compare(f"curve of {len(FRACTIONS)} sizes, {n} pairs", seconds["curve"], "the repository, recorded",
                    [RECORDED["curve"]] * rounds, 0.25),
        ]),
    ]  # fmt: skip


def literal(model: mi.Model, batch: TokenBatch) -> Tensor:
    """EAP with an input of its own for every receiver, and all nodes' differences in one tensor; ``edge``, summed."""
    hf, d, graph = model.hf, model.dims, Graph.of(model)
    leaves: dict[str, Tensor] = {}
    seen: dict[tuple[str, int], Tensor] = {}
    handles: list[Any] = []

    def leaf(name: str, like: Tensor, copies: int) -> Tensor:
        leaves[name] = like.detach()[:, :, None].expand(-1, -1, copies, -1).clone().requires_grad_()
        return like[:, :, None] + (leaves[name] - leaves[name].detach())

    def project(layer: int, kind: str, heads: int) -> Callable[..., Tensor]:
        block = hf.model.layers[layer]

        def hook(module: Any, args: Any, output: Tensor) -> Tensor:
            read = block.input_layernorm.forward(leaf(f"{kind}{layer}", seen["pre", layer], heads))
            return torch.einsum("bphd,hed->bphe", read, module.weight.unflatten(0, (heads, -1))).flatten(2)

        return hook

    def keep(kind: str, layer: int, into: bool) -> Callable[..., None]:
        def hook(module: Any, args: Any, *rest: Any) -> None:
            out = rest[-1] if rest else None
            seen[kind, layer] = (args[0] if into else out[0] if isinstance(out, tuple) else out).detach()

        return hook

    def attach(grad: bool) -> None:
        handles.append(hf.model.embed_tokens.register_forward_hook(keep("embed", 0, False)))
        for i, block in enumerate(hf.model.layers):
            handles.append(block.self_attn.o_proj.register_forward_pre_hook(keep("z", i, True)))
            handles.append(block.mlp.register_forward_hook(keep("mlp", i, False)))
            if not grad:
                continue

            def pre(_: Any, args: Any, kwargs: Any, i: int = i) -> None:
                seen["pre", i] = args[0] if args else kwargs["hidden_states"]

            handles.append(block.register_forward_pre_hook(pre, with_kwargs=True))
            for kind, heads in (("q", d.n_heads), ("k", d.n_kv_heads), ("v", d.n_kv_heads)):
                module = getattr(block.self_attn, f"{kind}_proj")
                handles.append(module.register_forward_hook(project(i, kind, heads)))
            handles.append(
                block.post_attention_layernorm.register_forward_pre_hook(
                    lambda _, args, i=i: (leaf(f"m{i}", args[0], 1)[:, :, 0],)
                )
            )
        if grad:
            handles.append(
                hf.model.norm.register_forward_pre_hook(lambda _, args: (leaf("logits", args[0], 1)[:, :, 0],))
            )

    def nodes() -> Tensor:
        out = [seen["embed", 0][:, :, None]]
        for i, block in enumerate(hf.model.layers):
            z = seen["z", i].unflatten(-1, (d.n_heads, -1))
            out.append(torch.einsum("bphe,dhe->bphd", z, block.self_attn.o_proj.weight.unflatten(1, (d.n_heads, -1))))
            out.append(seen["mlp", i][:, :, None])
        return torch.cat(out, 2)

    def run(ids: Tensor, grad: bool) -> Tensor:
        attach(grad)
        try:
            return hf(ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        finally:
            while handles:
                handles.pop().remove()

    with torch.no_grad():
        run(batch.run("corrupted").ids, False)
        corrupted = nodes()
    with torch.enable_grad():
        logits = run(batch.ids, True)
        rows = torch.arange(len(batch))
        total = (logits[rows, batch.side(0)[:, 0]] - logits[rows, batch.side(1)[:, 0]]).sum()
        grads = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))
    changed = nodes() - corrupted
    scores = torch.zeros(len(graph))
    for layer in range(d.n_layers):
        for kind in ("q", "k", "v", "mlp"):
            place, (_, reach) = graph.into(kind, layer)
            grad = grads[f"m{layer}" if kind == "mlp" else f"{kind}{layer}"]
            scores[place] = torch.einsum("bpfd,bphd->hf", changed[:, :, :reach], grad).flatten()
    place, _ = graph.into("logits")
    scores[place] = torch.einsum("bpfd,bphd->hf", changed, grads["logits"]).flatten()
    return scores


def memory(n: int) -> list[Line]:
    used: dict[str, float] = {}
    for what in ("floor", "eap", "eap-ig-inputs"):
        command = [sys.executable, "-m", "benchmarks.circuits", "--peak", what, str(n)]
        used[what] = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / 2**20
    floor = used["floor"]
    return [
        Line(f"peak of {what}, {n} pairs", used[what], "forward and backward", floor, used[what] / floor, "MB", 2.0)
        for what in ("eap", "eap-ig-inputs")
    ]


def peak(what: str, n: int) -> int:
    """Bytes above what the process held before, at the worst moment."""
    model = load()
    tokens = model.tokenize(second_names(n))
    ways: dict[str, Callable[[int], Any]] = {
        "floor": lambda n: forward_backward(model, tokens.batch(range(n))),
        "eap": lambda n: mi.run(model, second_names(n), mi.EdgeAttribution("eap")),
        "eap-ig-inputs": lambda n: mi.run(model, second_names(n), mi.EdgeAttribution("eap-ig-inputs")),
    }
    ways[what](1)
    return peak_of(lambda: ways[what](n))


def planted(n: int) -> pd.DataFrame:
    """AUROC of the sizes of scores over all edges, the true ones being known."""
    rows: list[dict[str, Any]] = []
    for make in (mi.tasks.planted.induction, mi.tasks.planted.copy, mi.tasks.planted.grouped):
        one = make(n)
        graph = Graph.of(one.model)
        sender, receiver = graph.ends
        true = np.array(
            [(graph.senders[u], graph.receivers[v]) in one.edges for u, v in zip(sender, receiver, strict=True)]
        )
        methods = ("exact", "eap", "eap-ig-inputs", "eap-ig-activations")
        results = mi.run(one.model, one.pairs, [mi.EdgeAttribution(method) for method in methods])
        scores = {method: r.data["score"].values for method, r in zip(methods, results, strict=True)}
        scores["activation patching, nodes"] = edges_of_nodes(
            graph, node_effects(one.model, one.pairs, mi.logit_diff(), {})
        )
        scores["attribution patching, nodes"] = attributed(one.model, one.pairs)
        scores["attribution patching (AtP*), nodes"] = attributed(one.model, one.pairs, "atp*")
        scores["acdc"] = by_threshold(one.model, one.pairs)
        for method, values in scores.items():
            size = np.abs(values)
            rank = (size[true][:, None] > size[~true]) + 0.5 * (size[true][:, None] == size[~true])
            most = size[~true].max()
            margin = size[true].min() / most if most else np.inf
            rows.append(
                {"circuit": one.name, "method": method, "auroc": rank.mean(), "least true / most false": margin}
            )
    return pd.DataFrame(rows)


def by_threshold(model: mi.Model, pairs: mi.Examples) -> np.ndarray:
    """ACDC gives sets: an edge has the largest of rising thresholds at which it is still kept; 0 where at none."""
    graph = Graph.of(model)
    scores = np.zeros(len(graph))
    for threshold in THRESHOLDS:
        options: dict[str, Any] = {"candidates": len(graph), "threshold": threshold}
        scores[mi.studies.discover(model, pairs, "acdc", **options)["mixed"].kept] = threshold
    return scores


def attributed(model: mi.Model, pairs: mi.Examples, method: Literal["atp", "atp*"] = "atp") -> np.ndarray:
    """Edges by attribution patching of their nodes; the embedding, which no layer can be dropped for, by AtP."""
    asked = [
        mi.AttributionPatching("z", heads="each", direction="noise", positions=None, method=method),
        mi.AttributionPatching("mlp_out", direction="noise", positions=None, method=method),
        mi.AttributionPatching("embed", direction="noise", positions=None),
    ]
    heads, mlps, embed = (-r.data["estimate"].mean("example") for r in mi.run(model, pairs, asked))
    effects = {"embed": float(embed.values.reshape(-1)[0])}
    for i in range(model.dims.n_layers):
        effects |= {f"a{i}.h{h}": float(heads.sel(layer=i, head=h)) for h in range(model.dims.n_heads)}
        effects[f"m{i}"] = float(mlps.sel(layer=i))
    return edges_of_nodes(Graph.of(model), effects)


def correlations(quick: bool) -> pd.DataFrame:
    """EAP and EAP-IG against exact patches, which our sweep and the edge-level forward make."""
    models = {"planted induction": mi.tasks.planted.induction(8)}
    cases = {name: (one.model, one.pairs) for name, one in models.items()}
    cases["random, 4 layers"] = (mi.testing.tiny("llama", layers=2 if quick else 4), mi.tasks.ioi(6))
    rows: list[dict[str, Any]] = []
    for name, (model, pairs) in cases.items():
        methods = ("exact", "eap", "eap-ig-inputs", "eap-ig-activations")
        found = [r.data["score"].values for r in mi.run(model, pairs, [mi.EdgeAttribution(m) for m in methods])]
        graph = Graph.of(model)
        cut = run_circuits(model, model.tokenize(pairs), graph, ~np.eye(len(graph), dtype=bool), mi.logit_diff())
        by_edge = (cut.full - cut.values).mean(1)
        gap = np.abs(found[0] - by_edge).max() / np.abs(by_edge).max()
        row: dict[str, Any] = {"model": name, "edges": len(graph), "sweep - edge forward, relative": gap}
        rows.append(
            row | {f"r of {m}": np.corrcoef(found[0], x)[0, 1] for m, x in zip(methods[1:], found[1:], strict=True)}
        )
    return pd.DataFrame(rows)


def curves(model: mi.Model, task: str) -> pd.DataFrame:
    """Areas of the faithfulness curves on 32 pairs, of scores found on 32 others (4 for EAP-IG over activations)."""
    make = mi.tasks.ioi if task == "ioi" else partial(mi.tasks.greater_than, model)
    pairs, others = make(n=32, seed=0), make(n=32, seed=1)
    methods = [mi.EdgeAttribution("eap"), mi.EdgeAttribution("eap-ig-inputs", steps=STEPS)]
    scores = {r.meta["options"]["method"].strip("'"): mi.Circuit.of(r) for r in mi.run(model, pairs, methods)}
    few = make(n=4, seed=0)
    activations = mi.run(model, few, mi.EdgeAttribution("eap-ig-activations", steps=STEPS))
    graph = Graph.of(model)
    scores["eap-ig-activations, 4 pairs"] = mi.Circuit.of(activations)
    scores["attribution patching, nodes"] = mi.Circuit(graph, attributed(model, pairs))
    scores["random"] = mi.Circuit(graph, np.random.default_rng(0).normal(size=len(graph)))
    table = summary({name: circuit.curve(model, others) for name, circuit in scores.items()})
    return table


if __name__ == "__main__":
    main()
