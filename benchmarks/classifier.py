"""A classifier on a language model: what a trajectory costs, and how often spurious words are found.

Trajectory of one text of 8,000 tokens on SmolLM2 with a linear head, beside the forward of its decoder alone (no LM
head), in the same rounds; and the peak memory of each above that of the model, in processes of their own.

Spurious words over 20 seeds: a tiny Llama is trained, in seconds, on made-up patient histories in which an
administrative code goes with the label and causes nothing, and looked at on others like them; and the same without
the plant. A warning of the code is right, any other is wrong. Precision and recall are over the runs with a
plant, the null rate is the share of runs without one that warn.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import mechinterp as mi
from benchmarks.timing import arguments, compare, environment, interleave, peak_of, report
from mechinterp.studies import Training
from mechinterp.tasks.histories import PLANTED, WORDS

TOKENS = 8000
TRAINING = Training(rank=8, learning_rate=5e-3, epochs=6, batch_size=8)


def main() -> None:
    if len(sys.argv) == 4 and sys.argv[1] == "--peak":
        print(peak(sys.argv[2], int(sys.argv[3])))
        return
    options = arguments(__doc__)
    n = 500 if options.quick else TOKENS
    model = classifier()
    ids = text(model, n)
    ways = {"ours": lambda: trajectory(model, ids), "forward": lambda: forward(model, ids)}
    seconds = interleave(ways, 1 if options.quick else 5)
    work = f"trajectory of {n:,} tokens"
    lines = [compare(work, seconds["ours"], "forward without LM head", seconds["forward"], 1.05)]
    peaks = {way: measured(way, n) for way in ("trajectory", "forward")}
    facts = environment(model="smollm2", peak_mb=peaks, peak_ratio=round(peaks["trajectory"] / peaks["forward"], 3))
    report("A classifier's trajectory", lines, facts, options.json)
    print(f"peak memory above the model's: {peaks} MB, ratio {facts['peak_ratio']} (asked 1.05)")
    seeds = range(2 if options.quick else 20)
    found = [warned(seed, plant) for plant in (True, False) for seed in seeds]
    with_plant, without = found[: len(seeds)], found[len(seeds) :]
    right = sum(PLANTED.lower() in names for names in with_plant)
    wrong = sum(len([name for name in names if name != PLANTED.lower()]) for names in with_plant)
    print(f"planted code named in {right} of {len(seeds)} runs (recall {right / len(seeds):.2f}, asked 0.9)")
    print(f"other warnings there: {wrong} (precision {right / max(1, right + wrong):.2f}, asked 0.9)")
    print(f"runs without a plant that warn: {sum(map(bool, without))} of {len(seeds)} (asked at most 0.05)")
    for seed, names in zip(seeds, with_plant, strict=True):
        if names != [PLANTED.lower()]:
            print(f"  seed {seed}: {names}")


def classifier() -> mi.Model:
    model = mi.Model.load("smollm2")
    torch.manual_seed(0)
    return mi.load_classifier(model, head=torch.nn.Linear(model.dims.d_model, 2))


def text(model: mi.Model, n: int) -> list[int]:
    return torch.randint(100, model.dims.vocab, (n,), generator=torch.Generator().manual_seed(0)).tolist()


def trajectory(model: mi.Model, ids: list[int]) -> mi.Result:
    return mi.run(model, [ids], mi.Trajectory())


@torch.no_grad()
def forward(model: mi.Model, ids: list[int]) -> None:
    model.hf.get_submodule(model.arch.base)(torch.tensor([ids]), use_cache=False)


def measured(way: str, n: int) -> float:
    """MB of peak memory above the model's, in a process of its own.

    Tensors are given back to the system when they are freed, or what a heap cannot hand out again, which differs by
    half from run to run, would be counted as in use.
    """
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 18)}
    command = [sys.executable, "-m", "benchmarks.classifier", "--peak", way, str(n)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout.split()[-1])


def peak(way: str, n: int) -> float:
    model = classifier()
    ids = text(model, n)
    do = trajectory if way == "trajectory" else forward
    do(model, ids[:16])
    return round(peak_of(lambda: do(model, ids)) / 1e6, 1)


def warned(seed: int, plant: bool) -> list[str]:
    """Suspects that one classifier is warned of, trained on one set of histories and read on another."""
    model = mi.testing.tiny("llama", seed=seed, words=WORDS, max_position_embeddings=1024)
    seen = mi.tasks.patient_histories(160, seed=seed, plant=plant, lines=(3, 5))
    others = mi.tasks.patient_histories(120, seed=1000 + seed, plant=plant, lines=(3, 5))
    with tempfile.TemporaryDirectory() as folder:
        made = mi.train_classifier(
            model, list(seen.texts), seen.labels, out=Path(folder) / "c", labels=["stable", "event"],
            training=TRAINING, patience=0,
        )  # fmt: skip
    data = mi.run(made, mi.Examples.of(list(others.texts)), mi.SpuriousPatterns()).data
    return [str(name) for name in data["suspect"].values[data["warning"].values]]


if __name__ == "__main__":
    main()
