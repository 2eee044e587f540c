"""Peak memory of a packed sweep above the model's own, for budgets from 128 MB to 2 GB.

The work (the residual stream before each of the last four layers, at each of 64 positions, of 16 pairs)
would carry some 133,000 tokens at once, which take more than 4 GB at the widest place of a layer. Each
budget is measured in a process of its own, which has loaded the model and swept one pair before.
"""

import subprocess
import sys

import torch

import mechinterp as mi
from benchmarks.timing import Line, arguments, environment, peak_of, report
from mechinterp.engine.packed import sweep_packed

BUDGETS = (128, 256, 512, 1024, 2048)
LIMIT = 1.2
POSITIONS, PAIRS, LAYERS = 64, 16, 4


def main() -> None:
    if len(sys.argv) == 3 and sys.argv[1] == "--budget":
        print(peak(int(sys.argv[2])))
        return
    options = arguments(__doc__)
    lines: list[Line] = []
    for budget in BUDGETS[:1] if options.quick else BUDGETS:
        command = [sys.executable, "-m", "benchmarks.sweep_memory", "--budget", str(budget)]
        used = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / 2**20
        lines.append(Line(f"{PAIRS} pairs of {POSITIONS} tokens", used, "budget", budget, used / budget, "MB", LIMIT))
    report("Peak memory of a sweep above the model's", lines, environment(model="smollm2"), options.json)


def peak(megabytes: int) -> int:
    """Bytes above what the process held before, at the worst moment of the sweep."""
    model = mi.Model.load("smollm2")
    for parameter in model.hf.parameters():
        parameter.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 40000, (2, PAIRS, POSITIONS), generator=generator)
    pairs = mi.Examples.pairs(ids[0].tolist(), ids[1].tolist(), [(1, 2)] * PAIRS)
    batch = model.tokenize(pairs).batch(range(PAIRS))
    n = model.dims.n_layers
    sweep = mi.Sweep(mi.logit_diff(), mi.sites.resid_pre(range(n - LAYERS, n)), positions="each")
    sweep_packed(model, batch.take([0]), sweep, budget=megabytes << 20)
    return peak_of(lambda: sweep_packed(model, batch, sweep, budget=megabytes << 20))


if __name__ == "__main__":
    main()
