"""What the benchmarks share: interleaved timing, medians of paired ratios, one table, one JSON file."""

import argparse
import contextlib
import ctypes
import importlib.metadata
import io
import json
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PACKAGES = ("mechinterp", "torch", "transformers", "transformer-lens", "nnsight")


@dataclass(frozen=True)
class Line:
    """One comparison. `ratio` is the median of ratios of neighbouring runs, not the ratio of the medians."""

    work: str
    ours: float
    beside: str
    """A peer, a floor, or another way to do the same."""
    theirs: float
    ratio: float
    """ours / theirs."""
    unit: str = "s"
    limit: float | None = None
    """What the ratio must not exceed; None where nothing was promised."""


def arguments(doc: str | None, figure: bool = False) -> argparse.Namespace:
    """``--quick``, ``--json FILE`` and perhaps ``--figure FILE``; the module's docstring is the help."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="little work: checks that it runs and agrees")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write facts and lines as JSON")
    if figure:
        parser.add_argument("--figure", type=Path, metavar="FILE", help="also draw the curves, as PNG or SVG")
    return parser.parse_args()


def interleave(ways: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every way in every round. Run each once before, to warm it up.

    All ways take turns, each round starting with the next one, so that drift of the machine and the
    order fall on all alike.
    """
    names = list(ways)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            started = time.perf_counter()
            ways[name]()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def compare(work: str, ours: list[float], beside: str, theirs: list[float], limit: float | None = None) -> Line:
    """A line from seconds of the same rounds."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return Line(
        work, statistics.median(ours), beside, statistics.median(theirs), statistics.median(ratios), limit=limit
    )


def peak_of(work: Callable[[], Any]) -> int:
    """Bytes above what this process holds now, at the worst moment of some work.

    What was freed before is given back to the system first, or the work would run in it unseen; and the
    kernel's high-water mark is reset, or it would be that of loading the model.
    """
    if sys.platform != "linux":
        sys.exit("peak memory is measured on Linux: the kernel's high-water mark is reset and read")
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    work()
    return status("VmHWM") - before


def status(name: str) -> int:
    """Bytes that the system counts for this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


@contextlib.contextmanager
def quiet() -> Generator[None]:
    """Without what libraries say while they load a model."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def environment(**facts: Any) -> dict[str, Any]:
    """What the numbers depend on: machine, versions, threads, and the given facts."""
    installed = {d.name.lower().replace("_", "-") for d in importlib.metadata.distributions() if d.name}
    versions = {p: importlib.metadata.version(p) if p in installed else "not installed" for p in PACKAGES}
    return {
        **facts,
        "cpus": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        **versions,
    }


def report(title: str, lines: Sequence[Line], facts: Mapping[str, Any], file: Path | None) -> None:
    """Print facts and table; write them as JSON where a file is given."""
    print(f"\n{title}")
    print("  " + ", ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in facts.items()))
    head = ("work", "ours", "beside", "theirs", "ratio", "limit")
    rows = [
        (
            line.work,
            f"{line.ours:.3f} {line.unit}",
            line.beside,
            f"{line.theirs:.3f} {line.unit}",
            f"{line.ratio:.2f}",
            "" if line.limit is None else f"{line.limit:g} {'ok' if line.ratio <= line.limit else 'OVER'}",
        )
        for line in lines
    ]
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    if file is not None:
        content = {"title": title, "facts": dict(facts), "lines": [asdict(line) for line in lines]}
        file.write_text(json.dumps(content, indent=2, default=str) + "\n")
