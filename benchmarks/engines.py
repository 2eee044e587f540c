"""The same analysis on three engines, and as TransformerLens's and nnsight's own users write it.

Three analyses of SmolLM2-135M, one of each kind:

- forward: `LogitLens(positions="end", top_k=5)`, `DirectLogitAttribution()` and `HeadRoles(sequences=0, weights=False)`
  on 32 indirect-object prompts, the work of `benchmarks.shared_pass`;
- backward: `AttributionPatching("z", heads="each")` on 16 pairs of 14 tokens;
- sweep: `ActivationPatching("resid_pre", layers=(5, 15, 25))` at every position of one such pair, of which the first
  token alone is the same in both prompts: 39 of 42 cells can change something.

Each runs on the native engine, on TransformerLens and on nnsight (`Model.with_backend`), with not a line changed; and
in each peer's own idiom on a model that the peer loaded:

- forward: one `run_with_cache` of the hooks that are needed, and one trace; then the analyzers' own arithmetic;
- backward: TransformerLens's `cache_activation_and_gradient` on all pairs at once, and its `attribution_patch`, which
  takes one pair at a time and scores MLPs and embeddings, too; in nnsight, a trace of the clean prompts and a trace of
  the corrupted ones with ``.grad`` inside ``with loss.backward()``, which makes the gradients of all weights, too, and
  again with the weights frozen. Intervals and p are ours alone;
- sweep: `generic_activation_patch` (as `get_act_patch_resid_pre`), one pass a cell; and a trace for each layer, the
  positions as its invokes.

The ratio is ours on the native engine over the other. All numbers must be the native engine's to 1e-4 of the largest
value, or the exit status is 1. Floors: the bare forward and the analyzers' arithmetic on saved activations; a bare
forward of the clean prompts, and the gradient at the embeddings of the corrupted ones; the matrix FLOPs of
`benchmarks.sweep`. `--quick` takes a small random model.
"""

import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

import mechinterp as mi
from benchmarks import circuits, shared_pass, sweep
from benchmarks.timing import Line, arguments, compare, environment, interleave, quiet, report
from mechinterp.core.tokens import TokenBatch

TOLERANCE = 1e-4
"""Largest difference in any number, relative to the largest value of its kind."""
ENGINES = ("transformer_lens", "nnsight")
Numbers = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Analysis:
    """One analysis, in every way that it is done.

    Attributes:
        ours: the analyzers, on a model with any engine.
        peers: the same in others' idioms, by what stands in the table.
        floor: its name, and what is timed for it.
        share: the floor is so much of its least time in any round; None where it is its time, round by round.
    """

    work: str
    ours: Callable[[mi.Model], Numbers]
    peers: Mapping[str, Callable[[], Numbers]]
    floor: tuple[str, Callable[[], Any]]
    share: float | None = None


def main() -> None:
    options = arguments(__doc__)
    if options.quick:  # beside other work two threads of so small a model wait for each other
        torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        compete(tiny(folder) if options.quick else circuits.load(), options)


def tiny(folder: str) -> mi.Model:
    """A small random model that peers can load, too: it is a folder."""
    made = mi.testing.tiny("llama", layers=4)
    made.hf.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    model = mi.Model.load(folder)
    model.hf.requires_grad_(False)
    return model


def compete(model: mi.Model, options: Namespace) -> None:
    quick, gaps, lines = options.quick, dict[str, float](), list[Line]()
    for make, rounds in (
        (partial(reading, model, 4 if quick else 32), 7),
        (partial(differentiating, model, 2 if quick else 16), 5),
        (partial(patching, model, (1, 2) if quick else (5, 15, 25)), 5),
    ):
        lines += contest(model, make(), 1 if quick else rounds, gaps)  # peers' copies of the model go before the next
    facts = environment(model=model.name, threads=torch.get_num_threads(), dtype="float32")
    report("Engines and idioms; ratio = ours on the native engine / theirs", lines, facts, options.json)
    print("  largest relative difference from the native engine:")
    for name, gap in gaps.items():
        print(f"    {gap:.1e}  {name}")
    if bad := [name for name, gap in gaps.items() if not gap <= TOLERANCE]:
        sys.exit(f"{'; '.join(bad)}: more than {TOLERANCE:g} apart")


def contest(model: mi.Model, one: Analysis, rounds: int, gaps: dict[str, float]) -> list[Line]:
    """Everybody once, to warm up and to compare numbers; then in turns."""
    ways: dict[str, Callable[[], Any]] = {"ours": lambda: one.ours(model)}
    for name in ENGINES:
        ways[f"ours on {name}"] = partial(one.ours, model.with_backend(name))
    ways |= one.peers
    expected = ways["ours"]()
    for name in [name for name in ways if name != "ours"]:
        gaps[f"{one.work}: {name}"] = difference(ways[name](), expected)
    floor, bare = one.floor
    ways[floor] = bare
    bare()
    seconds = interleave(ways, rounds)
    if one.share is not None:
        seconds[floor] = [min(seconds[floor]) * one.share] * rounds
    return [compare(one.work, seconds["ours"], name, seconds[name]) for name in ways if name != "ours"]


def difference(found: Numbers, expected: Numbers) -> float:
    """Largest difference relative to the largest value of the same name."""
    assert found.keys() == expected.keys(), f"{sorted(found)} instead of {sorted(expected)}"
    worst = 0.0
    for name, b in expected.items():
        a = found[name]
        assert a.shape == b.shape and bool((np.isnan(a) == np.isnan(b)).all()), f"{name} is missing elsewhere"
        worst = max(worst, float(np.nanmax(np.abs(a - b)) / np.nanmax(np.abs(b))))
    return worst


def reading(model: mi.Model, n: int) -> Analysis:
    """Three analyzers on one pass: `benchmarks.shared_pass`, with its peers and its floor."""
    work = shared_pass.Work(model, mi.tasks.ioi(n))
    folder = str(model.hf.config._name_or_path)

    def numbers(results: list[mi.Result]) -> Numbers:
        return {
            f"{analyzer.name} {name}": result.data[name].values
            for analyzer, result in zip(work.analyzers, results, strict=True)
            for name in shared_pass.COMPARED
            if name in result.data
        }

    idioms = {"transformer_lens": "TransformerLens, run_with_cache", "nnsight": "nnsight, one trace"}
    peers: dict[str, Callable[[], Numbers]] = {}
    for peer, name in idioms.items():
        with quiet():
            read = shared_pass.PEERS[peer](work, folder)
        peers[name] = lambda read=read: numbers(work.finish(read()))
    return Analysis(
        f"lens, logit attribution and head roles, {n} prompts",
        lambda on: numbers(mi.run(on, work.examples, work.analyzers)),
        peers,
        ("floor (bare forward, arithmetic)", shared_pass.floor(work)["floor"]),
    )


def differentiating(model: mi.Model, n: int) -> Analysis:
    """Attribution patching of every head at every position."""
    pairs, analyzer = sweep.second_names(n), mi.AttributionPatching("z", heads="each")
    batch = model.tokenize(pairs).batch(range(n))
    corrupted = batch.run("corrupted")

    def ours(on: mi.Model) -> Numbers:
        data = mi.run(on, pairs, analyzer).data
        return {"estimate": data["estimate"].transpose("example", "layer", "position", "head").values}

    @torch.no_grad()
    def forward() -> None:
        model.hf(batch.ids, use_cache=False, logits_to_keep=1)

    def floor() -> None:
        forward()
        circuits.forward_backward(model, corrupted)

    with quiet():
        peers = {**transformer_lens(model, batch), **nnsight(model, batch)}
    return Analysis(
        f"attribution patching of z by head, {n} pairs",
        ours,
        peers,
        ("floor (bare forward; forward, backward)", floor),
    )


def patching(model: mi.Model, layers: tuple[int, ...]) -> Analysis:
    """Activation patching of the residual stream, with the peers and the floor of `benchmarks.sweep`."""
    pair = mi.Examples.pairs([sweep.CLEAN], [sweep.CORRUPTED], [(" Mary", " John")])
    analyzer = mi.ActivationPatching("resid_pre", layers=layers)
    batch = model.tokenize(pair).batch([0])

    def ours(on: mi.Model) -> Numbers:
        data = mi.run(on, pair, analyzer).data
        return {"patched": data["patched"].transpose("example", "layer", "position").values}

    with quiet():
        found = {
            "TransformerLens, a pass a cell": sweep.transformer_lens(model, batch, list(layers)),
            "nnsight, positions as invokes": sweep.nnsight(model, batch, list(layers)),
        }
    grid = analyzer.needs(model).sweeps["grid"]
    (flops, made), products = sweep.floor(model, batch, grid, skip=True)
    return Analysis(
        f"activation patching of resid_pre, {len(layers)} × {batch.ids.shape[1]} cells, one pair",
        ours,
        {name: lambda way=way: {"patched": way().numpy()} for name, way in found.items()},
        ("floor (matrix FLOPs)", products),
        share=flops / made,
    )


def transformer_lens(model: mi.Model, batch: TokenBatch) -> dict[str, Callable[[], Numbers]]:
    """Attribution patching with the library's cache of activations and gradients, and with its own function for it."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformer_lens.tools.analysis.attribution_patching import attribution_patch, cache_activation_and_gradient

    folder = str(model.hf.config._name_or_path)
    bridge: Any = TransformerBridge.boot_transformers(folder, device="cpu", tokenizer=model.tokenizer)
    clean, corrupted = batch.ids, batch.run("corrupted").ids
    right, wrong, rows = batch.side(0)[:, 0], batch.side(1)[:, 0], torch.arange(len(batch))
    n_layers, n_heads = model.dims.n_layers, model.dims.n_heads
    hooks = [f"blocks.{i}.attn.hook_z" for i in range(n_layers)]
    kept = ["hook_embed", *hooks]  # the first must be on the path itself, or its backward reaches no other

    def metric(logits: Tensor) -> Tensor:
        return (logits[rows, -1, right] - logits[rows, -1, wrong]).sum()

    def cached() -> Numbers:
        with torch.no_grad():
            source = cache_activation_and_gradient(bridge, clean, metric, kept, compute_gradient=False).activations
        base = cache_activation_and_gradient(bridge, corrupted, metric, kept)
        grads: Any = base.gradients
        each = [((source[hook] - base.activations[hook]) * grads[hook]).sum(-1) for hook in hooks]
        return {"estimate": torch.stack(each, 1).numpy()}

    def whole() -> Numbers:
        each: list[np.ndarray] = []
        for i in range(len(batch)):
            scores = attribution_patch(
                bridge,
                clean[i : i + 1],
                corrupted[i : i + 1],
                lambda logits, i=i: logits[0, -1, right[i]] - logits[0, -1, wrong[i]],
            ).node_scores  # the embeddings by position, then by layer and position the heads and the MLP
            nodes = np.array(list(scores.values()))[clean.shape[1] :]
            each.append(nodes.reshape(n_layers, clean.shape[1], n_heads + 1)[..., :-1])
        return {"estimate": np.stack(each)}

    return {"TransformerLens, cache of gradients": cached, "TransformerLens, attribution_patch": whole}


def nnsight(model: mi.Model, batch: TokenBatch) -> dict[str, Callable[[], Numbers]]:
    """Attribution patching from two traces, with the weights as they are loaded, and frozen."""
    from nnsight.modeling.transformers import TransformersModel

    folder = str(model.hf.config._name_or_path)
    lm: Any = TransformersModel(folder, task="text-generation", dispatch=True)
    clean, corrupted = batch.ids, batch.run("corrupted").ids
    right, wrong, rows = batch.side(0)[:, 0], batch.side(1)[:, 0], torch.arange(len(batch))

    @torch.no_grad()
    def clean_run() -> list[Tensor]:
        with lm.trace(clean) as tracer:
            source: Any = list().save()  # pyright: ignore[reportAttributeAccessIssue]  # noqa: C408
            for layer in lm.model.layers:
                source.append(layer.self_attn.o_proj.input)
            tracer.stop()
        return source

    def run(frozen: bool) -> Numbers:
        lm.requires_grad_(not frozen)
        source = clean_run()
        with lm.trace(corrupted):
            base: Any = list().save()  # pyright: ignore[reportAttributeAccessIssue]  # noqa: C408
            grads: Any = list().save()  # pyright: ignore[reportAttributeAccessIssue]  # noqa: C408
            if frozen:
                lm.model.embed_tokens.output.requires_grad_()
            for layer in lm.model.layers:
                base.append(layer.self_attn.o_proj.input)
            logits = lm.output.logits
            with (logits[rows, -1, right] - logits[rows, -1, wrong]).sum().backward():
                for z in reversed(base):
                    grads.append(z.grad)
        each = [
            ((a - b.detach()) * grad).unflatten(-1, (model.dims.n_heads, -1)).sum(-1)
            for a, b, grad in zip(source, base, reversed(grads), strict=True)
        ]
        return {"estimate": torch.stack(each, 1).numpy()}

    return {"nnsight, two traces": partial(run, False), "nnsight, two traces, weights frozen": partial(run, True)}


if __name__ == "__main__":
    main()
