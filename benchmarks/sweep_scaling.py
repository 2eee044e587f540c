"""How the time of a packed sweep grows: measured over its bound, one axis at a time.

The full residual sweep (layers × positions, every cell run) of random prompts on models of SmolLM2's shape
with random weights: 6 to 30 layers (14 positions, 1 example), 8 to 64 positions (6 layers, 1 example), 1 to 32
examples (6 layers, 14 positions). The bound is that of `benchmarks/sweep.py`: matrix FLOPs at the best rate
seen over the wavefront's own shapes in the same rounds. What is asked: the ratio at the largest is at most 1.1
times the one at the smallest.
"""

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import transformers
from matplotlib.figure import Figure

import mechinterp as mi
from benchmarks.sweep import floor
from benchmarks.timing import Line, arguments, environment, interleave, report
from mechinterp.engine.packed import sweep_packed

AXES = {"layers": (6, 12, 18, 24, 30), "positions": (8, 16, 32, 64), "examples": (1, 4, 8, 16, 32)}
REST = {"layers": 6, "positions": 14, "examples": 1}
LIMIT = 1.1


def main() -> None:
    options = arguments(__doc__, figure=True)
    lines: list[Line] = []
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for axis, entries in AXES.items():
        values = list(entries[:2] if options.quick else entries)
        ratios = [over_bound(REST | {axis: value}, 1 if options.quick else 3) for value in values]
        curves[axis] = values, ratios
        ends = f"{axis} {values[-1]}, time over its bound"
        lines.append(Line(ends, ratios[-1], f"{axis} {values[0]}", ratios[0], ratios[-1] / ratios[0], "×", LIMIT))
    facts = environment(shape="SmolLM2, random weights", threads=torch.get_num_threads(), dtype="float32")
    facts |= {axis: " ".join(f"{v}:{r:.2f}" for v, r in zip(*curve, strict=True)) for axis, curve in curves.items()}
    report("Growth of a sweep", lines, facts, options.json)
    if options.figure:
        draw(curves, options.figure)


def over_bound(size: dict[str, int], rounds: int) -> float:
    """Median time of the sweep over its bound."""
    config = transformers.LlamaConfig(
        vocab_size=2048, hidden_size=576, intermediate_size=1536, num_hidden_layers=size["layers"],
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    model = mi.Model.wrap(transformers.LlamaForCausalLM(config).eval().requires_grad_(False))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2000, (2, size["examples"], size["positions"]), generator=generator).tolist()
    pairs = mi.Examples.pairs(ids[0], ids[1], [(1, 2)] * size["examples"])
    batch = model.tokenize(pairs).batch(range(size["examples"]))
    sweep = mi.Sweep(mi.logit_diff(), mi.sites.resid_pre(), positions="each")
    flops, products = floor(model, batch, sweep, skip=False)
    ways: dict[str, Callable[[], Any]] = {
        "ours": lambda: sweep_packed(model, batch, sweep, skip=False),
        "floor": products,
    }
    for way in ways.values():
        way()
    seconds = interleave(ways, rounds)
    bound = flops[0] * min(seconds["floor"]) / flops[1]
    return median(seconds["ours"]) / bound


def draw(curves: dict[str, tuple[list[int], list[float]]], file: Any) -> None:
    figure = Figure(figsize=(9, 3), layout="constrained", dpi=150)
    for axes, (axis, (values, ratios)) in zip(figure.subplots(1, 3, sharey=True), curves.items(), strict=True):
        axes.plot(values, ratios, marker="o", color="#0072B2")
        axes.set_xlabel(axis)
        axes.grid(axis="y", color="#e6e6e6")
    figure.axes[0].set_ylabel("measured time / bound")
    figure.axes[0].set_ylim(0, 1.1 * max(max(ratios) for _, ratios in curves.values()))  # of all three
    figure.savefig(file)


if __name__ == "__main__":
    main()
