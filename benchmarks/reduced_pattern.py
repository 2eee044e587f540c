"""Peak memory of reading a reduced attention pattern at all layers of a 2,048-token text.

Every pass runs in a fresh process: model loaded, a short text run to warm up, free heap handed back
(malloc_trim), the kernel's high-water mark of resident memory reset (/proc/self/clear_refs), one
pass, the mark read (VmHWM). ru_maxrss would not do: it cannot be reset, and loading the weights may
stand above the pass. Both passes stop at the last layer, by reading resid_post there at "end"; one
of them also reads `role_mass` of the pattern (what HeadRoles reads) at every layer.

The unit is one layer's worth of patterns: heads × 2,048 × 2,048 × 4 bytes. The difference of the
two peaks, median of repeats, should be at most half of one. A second line shows the same with
MALLOC_MMAP_THRESHOLD_ set low, so that glibc gives every freed tensor back at once: that is live
memory, without the allocator's holes. The last, for scale, is transformers' eager attention, whose
pass holds whole patterns, one layer at a time, without anybody reading them.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from benchmarks.timing import Line, arguments, environment, peak_of, report

TOKENS = 2048
LIMIT = 0.5
LIVE = {"MALLOC_MMAP_THRESHOLD_": str(128 << 10)}


def main() -> None:
    if "--child" in sys.argv:
        return child(sys.argv[-1])
    options = arguments(__doc__)
    repeats = 1 if options.quick else 3
    default = _peaks(repeats, {})
    layer = default["layer"]
    lines = [_line("peak with the read", "without it", default, "read", "bare", LIMIT)]
    if not options.quick:
        lines.append(_line("the same, live bytes", "without it", _peaks(repeats, LIVE), "read", "bare"))
        default |= _peaks(repeats, {}, ("eager",))
        lines.append(_line("eager kernel, nothing read", "without the read", default, "eager", "bare"))
    facts = environment(model="smollm2", tokens=TOKENS, repeats=repeats, layer_MB=layer, **default["facts"])
    report("Reduced pattern at all layers; ratio = (ours - theirs) / one layer of patterns", lines, facts, options.json)


def _line(work: str, beside: str, peaks: Mapping[str, Any], ours: str, theirs: str, limit: float | None = None) -> Line:
    differences = [a - b for a, b in zip(peaks[ours], peaks[theirs], strict=True)]
    ratio = statistics.median(differences) / peaks["layer"]
    return Line(
        work, statistics.median(peaks[ours]), beside, statistics.median(peaks[theirs]), ratio, unit="MB", limit=limit
    )


def _peaks(repeats: int, env: Mapping[str, str], kinds: tuple[str, ...] = ("bare", "read")) -> dict[str, Any]:
    """Peak MB above the start of the pass, kind by kind, from fresh processes that take turns."""
    peaks: dict[str, Any] = {kind: [] for kind in kinds}
    for _ in range(repeats):
        for kind in kinds:
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.reduced_pattern", "--child", kind]
            out = subprocess.run(command, env={**os.environ, **env}, capture_output=True, text=True, check=True)
            measured = json.loads(out.stdout.splitlines()[-1])
            peaks[kind].append(measured["rise"])
            peaks |= {"layer": measured["layer"], "facts": measured["facts"]}
    return peaks


def child(kind: str) -> None:
    """One pass in this process; prints what it took as JSON."""
    import torch

    import mechinterp as mi
    from mechinterp.analyzers.heads import role_mass
    from mechinterp.core.trace import Read, Reduce

    model = mi.Model.load("smollm2", attn_implementation="eager" if kind == "eager" else None)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, model.dims.vocab, (TOKENS,), generator=generator).tolist()
    layers = range(model.dims.n_layers)
    reads: list[Any] = [mi.sites.resid_post(layers[-1], positions="end")]
    if kind == "read":
        mass = Reduce(role_mass, "example role head")
        reads += [Read(mi.Site("pattern", layer), reduce=mass) for layer in layers]
    model.trace(ids[:64], reads)
    rise = peak_of(lambda: model.trace(ids, reads)) / 1e6
    megabytes = model.dims.n_heads * TOKENS**2 * 4 / 1e6
    facts = {"threads": torch.get_num_threads(), "kernel": model.kernel if kind != "eager" else "sdpa"}
    print(json.dumps({"rise": rise, "layer": megabytes, "facts": facts}))


if __name__ == "__main__":
    main()
