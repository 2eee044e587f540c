"""Time to import mechinterp, in fresh processes that take turns with torch and the peers.

``import mechinterp`` must import neither torch nor transformers. The interpreter's own start is not
counted; with more than one round, the first only fills the page cache.
"""

import importlib.util
import statistics
import subprocess
import sys

from benchmarks.timing import Line, arguments, environment, report

LIMIT = 0.3
BESIDE = ("torch", "transformer_lens", "nnsight")
HEAVY = ("torch", "transformers", "numpy", "pandas", "xarray")
CHILD = """
import sys, time
started = time.perf_counter()
import {name}
print(time.perf_counter() - started, *(m for m in {heavy} if m in sys.modules))
"""


def main() -> None:
    options = arguments(__doc__)
    names = ["mechinterp", *(name for name in BESIDE if importlib.util.find_spec(name) is not None)]
    for name in BESIDE:
        if name not in names:
            print(f"{name} is not installed; left out")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    loaded: set[str] = set()
    rounds = 1 if options.quick else 8
    for i in range(rounds):
        for name in names:
            taken, also = _import(name)
            if i or rounds == 1:
                seconds[name].append(taken)
            loaded |= also if name == "mechinterp" else set()
    ours = statistics.median(seconds["mechinterp"])
    lines = [Line("import mechinterp", ours, "limit", LIMIT, ours / LIMIT, limit=1)]
    for name in names[1:]:
        theirs = statistics.median(seconds[name])
        lines.append(Line("import mechinterp", ours, f"import {name}", theirs, ours / theirs))
    facts = environment(processes=len(seconds["mechinterp"]), also_imported=" ".join(sorted(loaded)) or "nothing heavy")
    report("Import time, median of fresh processes; ratio = ours / theirs", lines, facts, options.json)
    if bad := loaded & {"torch", "transformers"}:
        sys.exit(f"import mechinterp imported {' and '.join(sorted(bad))}")


def _import(name: str) -> tuple[float, set[str]]:
    """Seconds, and which heavy packages came along."""
    code = CHILD.format(name=name, heavy=HEAVY)
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    seconds, *loaded = out.stdout.strip().splitlines()[-1].split()
    return float(seconds), set(loaded)


if __name__ == "__main__":
    main()
