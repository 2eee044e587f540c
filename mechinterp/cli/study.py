"""What the commands share: options, reading examples, carrying out and writing a study, and errors in one line."""

import contextlib
import inspect
import shlex
import sys
import textwrap
import time
import traceback
from collections.abc import Generator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

import mechinterp as mi
from mechinterp.errors import ExamplesError, MechinterpError

PROVENANCE = (
    *("model", "model_hash", "dtype", "device", "kernel", "threads"),
    *("python", "versions", "engine", "seed", "passes"),
)
"""What the results of one run have in common, for the manifest."""
READERS = {".jsonl": "from_jsonl", ".csv": "from_csv"}

WaysIn: TypeAlias = tuple[str, str | None, str | None, str | None]
"""Model, adapter, dtype, device."""

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
WAYS_IN = "smollm2 (bundled), a folder, a .gguf file, or a hub id."
ModelName = Annotated[str, typer.Option("--model", help=WAYS_IN)]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=WAYS_IN)]
Adapter = Annotated[str | None, typer.Option("--adapter", help="A PEFT adapter on top: a folder, or a hub id.")]
Device = Annotated[str | None, typer.Option("--device", help="Such as cuda; the CPU by default.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="Such as bfloat16; the checkpoint's own by default.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of prompts, random tokens, bootstrap and permutations.")]
TextField = Annotated[str, typer.Option("--text-field", help="Of the file, what is read.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="The first so many texts.")]
Out = Annotated[Path, typer.Option("--out", help="Folder for tables, figures and the report.")]


def check_format(path: Path, hint: str) -> None:
    """Refuse a file of examples by its ending, which is wrong usage."""
    if path.suffix not in READERS:
        raise typer.BadParameter(f"{path} is neither .jsonl nor .csv", param_hint=hint)


def read_examples(path: Path) -> "mi.Examples":
    """Examples from a .jsonl or .csv file."""
    return getattr(mi.Examples, READERS[path.suffix])(path)


def rows_of(file: Path, limit: int | None = None) -> list[Mapping[str, Any]]:
    """The first so many rows of a CSV, TSV, JSON or JSONL file, all by default."""
    from mechinterp.studies.labelled import file_rows

    return file_rows(file)[:limit]


def field(file: Path, rows: Sequence[Mapping[str, Any]], name: str) -> list[Any]:
    """A field of every row, None where it is empty.

    Raises:
        ExamplesError: the file has no such field.
    """
    if name not in rows[0]:
        raise ExamplesError(f"{file} has no field {name!r}; its fields are {', '.join(map(str, rows[0]))}")
    return [None if row.get(name) is None or not str(row[name]).strip() else row[name] for row in rows]


def filled(file: Path, rows: Sequence[Mapping[str, Any]], name: str) -> list[str]:
    """A field that every row must have, as text.

    Raises:
        ExamplesError: the file has no such field, or a row has nothing there.
    """
    values = field(file, rows, name)
    if None in values:
        raise ExamplesError(f"row {values.index(None) + 1} of {file} has no {name!r}; correct it, or leave it out")
    return [str(value) for value in values]


def check_out(out: Path) -> None:
    """Say now, before the work, that a study cannot be written there."""
    from mechinterp.report.study import check_study

    check_study(out)


def study(
    ways_in: WaysIn,
    examples: "mi.Examples",
    analyzers: "Sequence[mi.Analyzer]",
    out: Path,
    title: str,
    seed: int,
    source: str,
    batch_size: int | None = None,
    engine: str = "packed",
    names: Sequence[str] = (),
    about: Mapping[str, Any] | None = None,
    **run: Any,
) -> "tuple[mi.Model, list[mi.Result]]":
    """Load, plan, run, summarize, write. `run` are further options of `mi.run`.

    Args:
        names: of the analyzers, where several are of one kind.
        about: what else the manifest has.
    """
    from mechinterp.cli.summary import findings
    from mechinterp.report.study import write_study

    begun = time.perf_counter()
    name, adapter, dtype, device = ways_in
    model = mi.Model.load(name, adapter=adapter, dtype=dtype, device=device)
    typer.echo(f"{model}\n")
    loaded = time.perf_counter()
    plan = mi.plan(model, examples, analyzers, engine=engine, batch_size=batch_size)
    typer.echo(f"{plan}\n")
    options: dict[str, Any] = {"engine": engine, "batch_size": batch_size, "seed": seed, **run}
    results = mi.run(model, examples, analyzers, progress=True, **options)
    ran = time.perf_counter()
    results = [r.with_meta(of=name) for r, name in zip(results, names, strict=True)] if names else results
    summary = findings(results, plan)
    for line in summary:
        typer.echo(textwrap.fill(line, 100, subsequent_indent="    ", break_on_hyphens=False))
    manifest = {
        **{key: results[0].meta[key] for key in PROVENANCE},
        "analyzers": {
            " of ".join([str(r.meta["analyzer"]), *names[i : i + 1]]): dict(r.meta["options"])
            for i, r in enumerate(results)
        },
        "examples": source,
        "n_examples": len(examples),
        **(about or {}),
        "command": shlex.join(["mechinterp", *sys.argv[1:]]),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": {"load": round(loaded - begun, 2), "run": round(ran - loaded, 2)},
    }
    typer.echo("\nwriting tables, figures and the report ...", err=True)
    explanations = {a.name: explanation(type(a)) for a in analyzers}
    report = write_study(
        out, title, results, plan=str(plan), manifest=manifest, summary=summary, explanations=explanations
    )
    typer.echo(f"\nreport: {report}")
    return model, results


def unescaped(template: str | None) -> str | None:
    """A template as it was meant: a shell's quotes leave a backslash and an n where a new line should be."""
    return template and template.replace("\\n", "\n").replace("\\t", "\t")


def explanation(what: object) -> str:
    """The paragraphs of a docstring before it turns to the result's columns and the options."""
    paragraphs = (inspect.getdoc(what) or "").split("\n\n")
    cut = next((i for i, p in enumerate(paragraphs) if p.startswith(("Result", "Attributes:"))), len(paragraphs))
    return "\n\n".join(paragraphs[:cut])


@contextlib.contextmanager
def reported(debug: bool) -> Generator[None, None, None]:
    """One line on standard error instead of a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("interrupted; nothing half-written is left", err=True)
        raise typer.Exit(130) from None
    except (typer.Exit, typer.BadParameter, BrokenPipeError):
        raise
    except Exception as error:
        if debug:
            traceback.print_exc()
        said = " ".join(str(error).split())
        if not isinstance(error, MechinterpError):
            said = f"unexpected {type(error).__name__}: {said}; run again with --debug and report what it shows"
        typer.echo(f"error: {said}", err=True)
        raise typer.Exit(1) from None
