"""mechinterp demo, run, trace and verify.

Exit status: 0, 1 for a failure (one line on standard error; --debug shows the traceback), 2 for
wrong usage, 130 after Ctrl-C.
"""

import contextlib
import inspect
import json
import os
import shlex
import sys
import textwrap
import time
import traceback
from collections.abc import Generator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

import mechinterp as mi
from mechinterp.errors import MechinterpError, NeedsError

# Nothing here imports torch before a command needs it, so that --help is quick.

STANDARD = ("logit-lens", "direct-logit-attribution", "head-roles")
"""The analyzers of a demo, and of a run that names none."""
PROVENANCE = (
    *("model", "model_hash", "dtype", "device", "kernel", "threads"),
    *("python", "versions", "engine", "seed", "passes"),
)
"""What the results of one run have in common, for the manifest."""
READERS = {".jsonl": "from_jsonl", ".csv": "from_csv"}

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
_WAYS_IN = "smollm2 (bundled), a folder, a .gguf file, or a hub id."
ModelName = Annotated[str, typer.Option("--model", help=_WAYS_IN)]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=_WAYS_IN)]
Adapter = Annotated[str | None, typer.Option("--adapter", help="A PEFT adapter on top: a folder, or a hub id.")]
Device = Annotated[str | None, typer.Option("--device", help="Such as cuda; the CPU by default.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="Such as bfloat16; the checkpoint's own by default.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of prompts, random tokens, bootstrap and permutations.")]
Out = Annotated[Path, typer.Option("--out", help="Folder for tables, figures and the report.")]

app = typer.Typer(
    name="mechinterp",
    help="Mechanistic interpretability of Qwen and Llama models: many analyzers over one shared forward pass.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """The entry point."""
    app()


def _known(chosen: list[str] | None) -> list[str] | None:
    """Refuse a name that no package has, before anything is read or imported."""
    from mechinterp.analyzers import locate

    try:
        for name in chosen or ():
            locate(name)
    except NeedsError as error:
        raise typer.BadParameter(str(error)) from None
    return chosen


def _version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"mechinterp {mi.__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def start(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Set up what must be set before transformers is imported."""
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


@app.command()
def demo(
    model: ModelName = "smollm2",
    n: Annotated[int, typer.Option("--n", min=1, help="How many prompts.")] = 32,
    seed: Seed = 0,
    adapter: Adapter = None,
    dtype: Dtype = None,
    device: Device = None,
    out: Out = Path("mechinterp-demo"),
    debug: Debug = False,
) -> None:
    """Three analyzers on indirect-object prompts, from one shared pass; ends with an HTML report."""
    with _reported(debug):
        _check_out(out)
        examples = mi.tasks.ioi(n=n, seed=seed)
        title = f"Indirect objects in {Path(model).name}: lens, direct attribution and head roles"
        source = f"mi.tasks.ioi(n={n}, seed={seed})"
        _study((model, adapter, dtype, device), examples, STANDARD, out, title, seed, source)


@app.command()
def run(
    examples: Annotated[
        Path, typer.Argument(help="A .jsonl or .csv file: text (or clean, corrupted), answer, wrong, subject.")
    ],
    model: ModelName = "smollm2",
    analyzer: Annotated[
        list[str] | None,
        typer.Option("--analyzer", help=f"Repeat for several; by default {', '.join(STANDARD)}.", callback=_known),
    ] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", min=1, help="Examples a batch.")] = None,
    seed: Seed = 0,
    adapter: Adapter = None,
    dtype: Dtype = None,
    device: Device = None,
    out: Out = Path("mechinterp-run"),
    debug: Debug = False,
) -> None:
    """The same analyzers, or others, on your own examples."""
    if examples.suffix not in READERS:
        raise typer.BadParameter(f"{examples} is neither .jsonl nor .csv", param_hint="EXAMPLES")
    with _reported(debug):
        _check_out(out)
        own: mi.Examples = getattr(mi.Examples, READERS[examples.suffix])(examples)
        chosen = list(dict.fromkeys(analyzer or STANDARD))
        if own.answers is None and not analyzer:
            chosen.remove("direct-logit-attribution")
            typer.echo("direct-logit-attribution is left out: the examples have no answers", err=True)
        title = f"{examples.name} in {Path(model).name}"
        _study((model, adapter, dtype, device), own, chosen, out, title, seed, str(examples), batch_size)


@app.command()
def trace(
    model: ModelArgument,
    text: Annotated[str, typer.Argument(help="The prompt.")],
    sites: Annotated[list[str], typer.Argument(help="Such as resid_post, pattern.5, z.10.h3@end.")],
    adapter: Adapter = None,
    dtype: Dtype = None,
    device: Device = None,
    debug: Debug = False,
) -> None:
    """Just look: read sites in one pass, and show their axes, shapes and mean norms."""
    with _reported(debug):
        from mechinterp.sites import resolve

        for site in sites:
            resolve(site, 1)  # a typo is found before the model loads
        seen = mi.Model.load(model, adapter=adapter, dtype=dtype, device=device).trace(text, sites)
        rows = [("site", "axes", "shape", "mean norm over the last axis")]
        for read in seen.reads:
            value = seen[read]
            norm = f"{float(value.float().norm(dim=-1).mean()):.4g}"
            rows.append((str(read.site), " ".join(_axes(read.site)), " ".join(map(str, value.shape)), norm))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        for row in rows:
            typer.echo("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())


@app.command()
def verify(
    model: ModelArgument,
    quick: Annotated[bool, typer.Option("--quick", help="Only what is checked whenever a model is loaded.")] = False,
    adapter: Adapter = None,
    dtype: Dtype = None,
    device: Device = None,
    file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the checks here, too.")] = None,
    debug: Debug = False,
) -> None:
    """Check what every number rests on, on this model: sites, sums, edits, padding, batches, decoding.

    The exit status is 1 if a check fails.
    """
    with _reported(debug):
        from mechinterp.engine.runner import provenance
        from mechinterp.engine.verify import HEAD, line
        from mechinterp.report.files import check_file, encode, write_file

        if file is not None:
            check_file(file)
        loaded = mi.Model.load(model, adapter=adapter, dtype=dtype, device=device, check=False)
        typer.echo(f"{loaded}\n\n{HEAD}")
        found = mi.verify(loaded, quick=quick, told=lambda check: typer.echo(line(check)))
        if file is not None:
            checks = [{**asdict(check), "passed": check.passed} for check in found.checks]
            content = {**provenance(loaded), "adapter": adapter, "passed": found.passed, "checks": checks}
            write_file(file, json.dumps(encode(content, "checks"), indent=1, allow_nan=False) + "\n")
        typer.echo(f"\n{found.summary}")
        if not found.passed:
            raise typer.Exit(1)


def _axes(site: "mi.Site") -> list[str]:
    """The axes that are left once single heads and positions have dropped theirs."""
    gone: set[str] = set()
    if isinstance(site.heads, int):
        gone |= {"head", "kv_head"}
    if site.positions is not None and not isinstance(site.positions, tuple):
        gone |= {"pos", "query"}
    if isinstance(site.neurons, int):
        gone |= {"d_mlp"}
    return [axis for axis in site.axes if axis not in gone]


def _check_out(out: Path) -> None:
    from mechinterp.report.study import check_study

    check_study(out)


def _analyzer(name: str, seed: int) -> "mi.Analyzer":
    """An analyzer with its defaults, and the seed where it takes one.

    Raises:
        NeedsError: it has no default for something.
    """
    from mechinterp.analyzers import find

    kind: Any = find(name)
    options = inspect.signature(kind).parameters
    if lacking := [option for option, p in options.items() if p.default is p.empty]:
        raise NeedsError(
            f"{name} must be given its {' and '.join(lacking)}, and the command line runs analyzers as they are;"
            f" use it from Python: mi.run(model, examples, {kind.__name__}({', '.join(f'{o}=...' for o in lacking)}))"
        )
    return kind(seed=seed) if "seed" in options else kind()


def _study(
    ways_in: tuple[str, str | None, str | None, str | None],
    examples: "mi.Examples",
    chosen: Sequence[str],
    out: Path,
    title: str,
    seed: int,
    source: str,
    batch_size: int | None = None,
) -> None:
    """Load (model, adapter, dtype, device), plan, run, summarize, write: what demo and run share."""
    from mechinterp.cli.summary import findings
    from mechinterp.report.study import write_study

    analyzers = [_analyzer(each, seed) for each in chosen]
    begun = time.perf_counter()
    name, adapter, dtype, device = ways_in
    model = mi.Model.load(name, adapter=adapter, dtype=dtype, device=device)
    typer.echo(f"{model}\n")
    loaded = time.perf_counter()
    plan = mi.plan(model, examples, analyzers, batch_size=batch_size)
    typer.echo(f"{plan}\n")
    results = mi.run(model, examples, analyzers, batch_size=batch_size, seed=seed, progress=True)
    ran = time.perf_counter()
    summary = findings(results, plan)
    for line in summary:
        typer.echo(textwrap.fill(line, 100, subsequent_indent="    ", break_on_hyphens=False))
    manifest = {
        **{key: results[0].meta[key] for key in PROVENANCE},
        "analyzers": {str(r.meta["analyzer"]): dict(r.meta["options"]) for r in results},
        "examples": source,
        "n_examples": len(examples),
        "command": shlex.join(["mechinterp", *sys.argv[1:]]),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": {"load": round(loaded - begun, 2), "run": round(ran - loaded, 2)},
    }
    typer.echo("\nwriting tables, figures and the report ...", err=True)
    explanations = {a.name: _explanation(type(a)) for a in analyzers}
    report = write_study(
        out, title, results, plan=str(plan), manifest=manifest, summary=summary, explanations=explanations
    )
    typer.echo(f"\nreport: {report}")


def _explanation(kind: type) -> str:
    """The paragraphs of a docstring before it turns to the result's columns and the options."""
    paragraphs = (inspect.getdoc(kind) or "").split("\n\n")
    cut = next((i for i, p in enumerate(paragraphs) if p.startswith(("Result", "Attributes:"))), len(paragraphs))
    return "\n\n".join(paragraphs[:cut])


@contextlib.contextmanager
def _reported(debug: bool) -> Generator[None, None, None]:
    """One line on standard error instead of a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("interrupted; nothing half-written is left", err=True)
        raise typer.Exit(130) from None
    except (typer.Exit, BrokenPipeError):
        raise
    except Exception as error:
        if debug:
            traceback.print_exc()
        said = " ".join(str(error).split())
        if not isinstance(error, MechinterpError):
            said = f"unexpected {type(error).__name__}: {said}; run again with --debug and report what it shows"
        typer.echo(f"error: {said}", err=True)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    main()
