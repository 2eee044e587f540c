"""Attention by word category over all queries, layers and heads, beside the same from transformers' eager attention.

The peer is what a script would do: `output_attentions=True` with eager attention, and of each layer's patterns the
mean over queries, the shares of three categories and of the first token, and the entropy. Both run the same batches.
The numbers must agree to 1e-5 before anything is timed. Peak memory is that of one batch in a process of its own,
above what it held with the model loaded and a short text run. The last line is one text of 8,000 tokens, of which the
peer's patterns would take 69 GB: the peak is that of the whole process, beside 2.5 GB.
"""

import json
import subprocess
import sys
from typing import Any

import torch

import mechinterp as mi
from benchmarks.timing import Line, arguments, compare, environment, interleave, peak_of, report, status

SAMPLES, TOKENS, BATCH, LONG = 30, 512, 5, 8000
TIME, MEMORY, LONG_MB = 1.0, 0.2, 2500
ANALYZER = mi.AttentionByCategory(queries="all", statistics=False)


def main() -> None:
    if "--child" in sys.argv:
        return child(*sys.argv[-2:])
    options = arguments(__doc__)
    samples, tokens, rounds = (2, 128, 1) if options.quick else (SAMPLES, TOKENS, 3)
    model, eager = load("ours"), load("eager")
    examples = work(model, samples, tokens)
    difference = largest_difference(ours(model, examples), theirs(eager, examples))
    if difference > 1e-5:
        sys.exit(f"ours and transformers' numbers differ by {difference:.2g}")
    name = f"{samples} × {tokens} tokens"
    seconds = interleave(
        {"ours": lambda: ours(model, examples), "eager": lambda: theirs(eager, examples)}, rounds
    )  # fmt: skip
    lines = [compare(name, seconds["ours"], "eager, output_attentions", seconds["eager"], TIME)]
    del model, eager
    a, b = (measure(kind, tokens)["rise"] for kind in ("ours", "eager"))
    lines.append(
        Line(f"{BATCH} × {tokens} tokens, peak", a, "eager", b, a / b, "MB", None if options.quick else MEMORY)
    )
    long = measure("long", 1000 if options.quick else LONG)
    lines.append(
        Line(f"one text of {long['tokens']}, whole process", long["peak"], "asked", LONG_MB, long["peak"] / LONG_MB,
             "MB", 1.0)
    )  # fmt: skip
    facts = environment(model="smollm2", difference=difference, long_seconds=long["seconds"])
    report("Attention by category, all queries, layers and heads", lines, facts, options.json)


def load(kind: str) -> mi.Model:
    return mi.Model.load("smollm2", attn_implementation="eager" if kind == "eager" else None)


def work(model: mi.Model, samples: int, tokens: int) -> mi.Examples:
    """Random tokens, every fifth of which belongs to a category, in turn."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, model.dims.vocab, (samples, tokens), generator=generator).tolist()
    examples = mi.Examples.of(ids)
    for c, name in enumerate(("a", "b", "c")):
        spans = [(i, i + 1) for i in range(5 + 5 * c, tokens, 15)]
        examples = examples.with_category(name, [spans] * samples)
    return examples


def ours(model: mi.Model, examples: mi.Examples) -> dict[str, Any]:
    """share ``layer example head category``, sink and entropy ``layer example head``."""
    data = mi.run(model, examples, ANALYZER, batch_size=BATCH).data
    return {name: data[name].transpose("layer", "example", "head", ...).values for name in ("share", "sink", "entropy")}


@torch.no_grad()
def theirs(model: mi.Model, examples: mi.Examples) -> dict[str, Any]:
    """The same from whole patterns."""
    tokens = model.tokenize(examples)
    found: dict[str, list[torch.Tensor]] = {"share": [], "sink": [], "entropy": []}
    for start in range(0, len(tokens), BATCH):
        batch = tokens.batch(range(start, min(start + BATCH, len(tokens))))
        members = batch.members.float()
        members[:, :, 0] = 0
        patterns = model.hf(batch.ids, output_attentions=True, use_cache=False).attentions
        received = torch.stack([pattern.mean(2) for pattern in patterns])
        entropy = [-(p * p.clamp_min(1e-38).log()).sum(-1).mean(-1) for p in patterns]
        found["share"].append(received @ members.transpose(1, 2))
        found["sink"].append(received[..., 0])
        found["entropy"].append(torch.stack(entropy))
    return {name: torch.cat(parts, 1).numpy() for name, parts in found.items()}


def largest_difference(one: dict[str, Any], two: dict[str, Any]) -> float:
    return max(float(abs(one[name] - two[name]).max()) for name in one)


def measure(kind: str, tokens: int) -> dict[str, Any]:
    """What a process of its own took."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.attention", "--child", kind, str(tokens)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(out.splitlines()[-1])


def child(kind: str, tokens: str) -> None:
    """One batch in this process; prints what it took as JSON."""
    import time

    model = load(kind)
    way = theirs if kind == "eager" else ours
    way(model, work(model, 1, 64))
    examples = work(model, 1 if kind == "long" else BATCH, int(tokens))
    most = status("VmHWM")  # for the long text the peak counts from the start of the process, loading included
    started = time.perf_counter()
    rise = peak_of(lambda: way(model, examples))
    seconds, most = time.perf_counter() - started, max(most, status("VmHWM"))
    print(json.dumps({"rise": rise / 1e6, "peak": most / 1e6, "seconds": seconds, "tokens": int(tokens)}))


if __name__ == "__main__":
    main()
