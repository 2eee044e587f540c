"""Activation patching sweeps: ours, packed, against TransformerLens, nnsight and hooks on the bare model.

On one indirect-object pair of 14 tokens, the full residual sweep (layers × positions), first with the
cells that cannot change anything left out, then with every cell run; then attn_out and mlp_out by layer
and position, and z by layer and head, on 32 pairs in one call.

Peers do what their users do: TransformerLens's `get_act_patch_resid_pre`, one pass for each cell;
nnsight with all positions of a layer as invokes of one trace; and plain hooks on the Hugging Face model,
with the positions of a layer as a batch. They are timed on some layers and scaled to all, since their
cost is the same in each. All give the same numbers, which is checked.

The floor counts matrix FLOPs: for every row, the tokens that it must carry through every linear layer
(a row that enters at layer l at position p carries the positions from p on through the layers after l,
and one token through l and through the last MLP), plus the unedited runs; at the best rate that the
same matrix products reach on this machine, timed in the same rounds.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

import mechinterp as mi
from benchmarks.timing import arguments, compare, environment, interleave, report
from mechinterp.core.tokens import TokenBatch
from mechinterp.engine.cells import Cells
from mechinterp.engine.packed import sweep_packed

CLEAN = "When Mary and John went to the store, John gave a drink to"
CORRUPTED = "When Tom and John went to the store, John gave a drink to"
LATE = "When Mary and John went to the store, Mary gave a drink to"
TOLERANCE = 1e-3


def main() -> None:
    options = arguments(__doc__)
    model = mi.testing.tiny("llama", layers=6) if options.quick else mi.Model.load("smollm2")
    for parameter in model.hf.parameters():
        parameter.requires_grad_(False)
    rounds = 1 if options.quick else 5
    answers = [(" Mary", " John")]
    early, late = mi.Examples.pairs([CLEAN], [CORRUPTED], answers), mi.Examples.pairs([CLEAN], [LATE], answers)
    lines: list[Any] = []
    residual = mi.Sweep(mi.logit_diff(), mi.sites.resid_pre(), positions="each")
    cells = f"{model.dims.n_layers} × {int(model.tokenize(late).lengths[0])}"
    for work, examples, skip, limits in (
        (f"{cells} residual sweep", late, True, {"TransformerLens": 0.01, "nnsight": 0.05, "floor": 1.5}),
        ("the same, every cell run", early, False, {"TransformerLens": 0.05, "nnsight": 0.25, "floor": 1.5}),
    ):
        batch = model.tokenize(examples).batch([0])
        lines += contest(model, work, batch, residual, skip, limits, rounds, options.quick)
    pairs = model.tokenize(second_names(4 if options.quick else 32)).batch(range(4 if options.quick else 32))
    for kind, limit in (("attn_out", 1 / 15), ("mlp_out", 1 / 15)):
        sweep = mi.Sweep(mi.logit_diff(), mi.Sites(kind), positions="each")
        work = f"{kind} by layer × position, {len(pairs)} pairs"
        limits = {"hooks": limit, "floor": 1.5}
        lines += contest(model, work, pairs, sweep, True, limits, 1 if options.quick else 3, options.quick)
    sweep = mi.Sweep(mi.logit_diff(), mi.sites.z(), heads="each")
    limits = {"hooks": 0.25, "floor": 1.5}
    work = f"z by layer × head, {len(pairs)} pairs"
    lines += contest(model, work, pairs, sweep, True, limits, 1 if options.quick else 3, options.quick)
    facts = environment(model=model.name, threads=torch.get_num_threads(), dtype="float32", rounds=rounds)
    report("Sweeps; ratio = ours / theirs", lines, facts, options.json)


def second_names(n: int) -> mi.Examples:
    """Pairs of 14 tokens that differ in the last name said, so that five positions can matter."""
    names = ["Mary", "John", "Tom", "James", "Sarah", "Anna", "Alice"]
    pairs = [(a, b) for a in names for b in names if a != b][:n]

    def text(a: str, b: str, c: str) -> str:
        return f"When {a} and {b} went to the store, {c} gave a drink to"

    return mi.Examples.pairs(
        [text(a, b, b) for a, b in pairs], [text(a, b, a) for a, b in pairs], [(f" {a}", f" {b}") for a, b in pairs]
    )


def contest(
    model: mi.Model,
    work: str,
    batch: TokenBatch,
    sweep: mi.Sweep,
    skip: bool,
    limits: Mapping[str, float],
    rounds: int,
    quick: bool,
) -> list[Any]:
    """Ours against everybody, in turns; the slow ones on some layers, scaled."""
    n = model.dims.n_layers
    some = [n // 2] if quick else [n // 3, 2 * n // 3]
    ours = sweep_packed(model, batch, sweep, skip=skip)
    assert ours.values is not None
    ways: dict[str, Callable[[], Any]] = {"ours": lambda: sweep_packed(model, batch, sweep, skip=skip)}
    flops, matrices = floor(model, batch, sweep, skip)
    ways["floor"] = matrices
    peers: dict[str, Callable[[], Tensor]] = {"hooks, a layer as a batch": hooks(model, batch, sweep, some)}
    if "TransformerLens" in limits and not quick:
        peers["TransformerLens, a pass a cell"] = transformer_lens(model, batch, some)
        peers["nnsight, positions as invokes"] = nnsight(model, batch, some)
    for name, way in peers.items():
        found = way()
        gap = float((found - ours.values[:, some].to(found)).abs().max())
        assert gap < TOLERANCE, f"{name} differs by {gap} in {work}"
        ways[name] = way
    ways["ours"]()
    seconds = interleave(ways, rounds)
    rate = flops[1] / min(seconds["floor"])
    bound = [flops[0] / rate] * rounds
    out = [compare(work, seconds["ours"], "floor (matrix FLOPs)", bound, limits["floor"])]
    for name in peers:
        scaled = [s * n / len(some) for s in seconds[name]]
        limit = next((value for key, value in limits.items() if name.startswith(key)), None)
        out.append(compare(work, seconds["ours"], f"{name} ({len(some)} of {n} layers, scaled)", scaled, limit))
    return out


def floor(
    model: mi.Model, batch: TokenBatch, sweep: mi.Sweep, skip: bool
) -> tuple[tuple[float, float], Callable[[], Any]]:
    """(FLOPs of the bound, FLOPs of one call of the products), and the products, in the wavefront's own shapes."""
    d = model.dims
    attention = d.d_model * d.d_head * (2 * d.n_heads + 2 * d.n_kv_heads)
    mlp = 3 * d.d_model * d.d_mlp
    cells = Cells(model, batch, sweep, int(batch.lengths.max()))
    rows, _ = cells.rows(skip)
    width = rows.length - rows.start
    layers_after = d.n_layers - 1 - rows.enters  # through which all columns from the first on go; the last MLP has one
    tokens = width * np.maximum(layers_after, 0) + 1  # and one token through the layer of entry
    attended = int(np.where(rows.spreads, width + width * layers_after, tokens).sum())
    through = int(np.where(rows.spreads, width * np.maximum(layers_after, 0) + 1, tokens - width + 1).sum())
    runs = 2 * int(batch.lengths.sum()) * d.n_layers
    flops = 2.0 * ((attended + runs) * attention + (through + runs) * mlp)
    packed = int(np.median([int(width[rows.enters <= i].sum()) for i in range(d.n_layers)]))
    layer: Any = model.hf.get_submodule(model.arch.layer(0))
    modules = [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.mlp.gate_proj, layer.mlp.down_proj]
    inputs = [torch.randn(max(64, min(packed, 8192)), m.in_features) for m in modules]
    repeats = 8

    @torch.no_grad()
    def products() -> None:
        for _ in range(repeats):
            for module, x in zip(modules, inputs, strict=True):
                module(x)

    made = repeats * sum(2.0 * len(x) * m.in_features * m.out_features for m, x in zip(modules, inputs, strict=True))
    return (flops, made), products


def hooks(model: mi.Model, batch: TokenBatch, sweep: mi.Sweep, layers: list[int]) -> Callable[[], Tensor]:
    """What a careful notebook does: clean values kept, and all cells of a layer in one batch of corrupted prompts."""
    hf, examples, length = model.hf, len(batch), batch.ids.shape[1]
    kind = mi.sites.resolve(sweep.sites, 1)[0].kind
    heads = model.dims.n_heads if sweep.heads else 1
    positions = length if sweep.positions == "each" else 1
    right, wrong = batch.side(0)[:, 0], batch.side(1)[:, 0]

    def module(i: int) -> tuple[Any, bool]:
        layer = hf.model.layers[i]
        at = {"resid_pre": layer, "attn_out": layer.self_attn, "mlp_out": layer.mlp, "z": layer.self_attn.o_proj}
        return at[kind], kind in ("resid_pre", "z")

    def held(i: int, ids: Tensor, act: Callable[[Tensor], Tensor | None]) -> Tensor:
        target, before = module(i)

        def into(_: Any, args: Any, kwargs: Any) -> Any:
            old = args[0] if args else kwargs["hidden_states"]
            new = act(old)
            if new is None:
                return None
            return ((new, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": new})

        def out(_: Any, args: Any, output: Any) -> Any:
            old = output[0] if isinstance(output, tuple) else output
            new = act(old)
            return None if new is None else (new, *output[1:]) if isinstance(output, tuple) else new

        handle = (
            target.register_forward_pre_hook(into, with_kwargs=True) if before else target.register_forward_hook(out)
        )
        try:
            return hf(ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        finally:
            handle.remove()

    @torch.no_grad()
    def run() -> Tensor:
        found: list[Tensor] = []
        for i in layers:
            kept: list[Tensor] = []
            held(i, batch.ids, lambda value, kept=kept: kept.append(value) or None)
            clean = kept[0]

            def patch(value: Tensor, clean: Tensor = clean) -> Tensor:
                new = value.clone().view(examples, positions * heads, length, -1)
                for p in range(positions):
                    for h in range(heads):
                        wide = new.shape[-1] // heads
                        at = slice(h * wide, (h + 1) * wide)
                        columns = slice(None) if positions == 1 else slice(p, p + 1)
                        new[:, p * heads + h, columns, at] = clean[:, columns, at]
                return new.view_as(value)

            rows = positions * heads
            logits = held(i, batch.run("corrupted").ids.repeat_interleave(rows, 0), patch)
            index = torch.arange(examples * rows)
            each = [w.repeat_interleave(rows) for w in (right, wrong)]
            found.append((logits[index, each[0]] - logits[index, each[1]]).view(examples, rows))
        return torch.stack(found, 1)

    return run


def transformer_lens(model: mi.Model, batch: TokenBatch, layers: list[int]) -> Callable[[], Tensor]:
    """`get_act_patch_resid_pre`, over the cells of some layers."""
    import pandas as pd
    from transformer_lens import patching
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(model.hf.config._name_or_path, device="cpu", tokenizer=model.tokenizer)
    cells = pd.DataFrame([(i, p) for i in layers for p in range(batch.ids.shape[1])], columns=["layer", "pos"])
    right, wrong = int(batch.side(0)[0, 0]), int(batch.side(1)[0, 0])

    @torch.no_grad()
    def run() -> Tensor:
        _, cache = bridge.run_with_cache(batch.ids, names_filter=lambda name: name.endswith("hook_resid_pre"))
        found = patching.generic_activation_patch(
            bridge,
            batch.run("corrupted").ids,
            cache,
            lambda logits: logits[0, -1, right] - logits[0, -1, wrong],
            patching.layer_pos_patch_setter,
            "resid_pre",
            index_df=cells,
        )
        return found.view(1, len(layers), -1)

    return run


def nnsight(model: mi.Model, batch: TokenBatch, layers: list[int]) -> Callable[[], Tensor]:
    """One trace a layer; every position is an invoke."""
    from nnsight.modeling.transformers import TransformersModel

    lm: Any = TransformersModel(model.hf.config._name_or_path, task="text-generation", dispatch=True)
    right, wrong = int(batch.side(0)[0, 0]), int(batch.side(1)[0, 0])
    corrupted = batch.run("corrupted").ids

    @torch.no_grad()
    def run() -> Tensor:
        found: list[Tensor] = []
        for i in layers:
            with lm.trace(batch.ids) as tracer:
                clean = lm.model.layers[i].input.save()
                tracer.stop()
            scores: list[Any] = []
            with lm.trace() as tracer:
                scores = list().save()  # pyright: ignore[reportAttributeAccessIssue]  # noqa: C408
                for p in range(corrupted.shape[1]):
                    with tracer.invoke(corrupted):
                        lm.model.layers[i].input[:, p] = clean[:, p]
                        logits = lm.output.logits[:, -1]
                        scores.append(logits[0, right] - logits[0, wrong])
            found.append(torch.stack([torch.as_tensor(s) for s in scores]))
        return torch.stack(found)[None]

    return run


if __name__ == "__main__":
    main()
