"""mechinterp classifier: a head on a language model, its weights, its way through texts, and what it should not use."""

import shlex
import sys
import textwrap
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

import mechinterp as mi
from mechinterp.cli.study import Debug, Device, Dtype, Limit, Out, Seed, TextField, check_out, filled, reported, rows_of

app = typer.Typer(no_args_is_help=True, help="A classifier: weights, trajectories through texts, spurious patterns.")


class Truncation(StrEnum):
    refuse = "refuse"
    keep_start = "keep-start"
    keep_end = "keep-end"


Base = Annotated[
    str,
    typer.Argument(metavar="CLASSIFIER", help="A folder of a classifier or checkpoint; or, with --head, its base."),
]
Texts = Annotated[Path, typer.Argument(metavar="FILE", help="A .csv, .tsv, .json or .jsonl file of texts.")]
AdapterOption = Annotated[str | None, typer.Option("--adapter", help="A PEFT adapter on the base.")]
Head = Annotated[Path | None, typer.Option("--head", help="The linear layer, a .safetensors file.")]
Config = Annotated[Path | None, typer.Option("--config", help="YAML with base, adapter, head and labels.")]
Labels = Annotated[
    list[str] | None, typer.Option("--label", help="Names of the head's outputs, in order; repeat for each.")
]
Target = Annotated[str | None, typer.Option("--target", help="Whose log-odds; the last label by default.")]
LabelField = Annotated[str | None, typer.Option("--label-field", help="Of what is right, where it is known.")]
TooLong = Annotated[Truncation, typer.Option("--too-long", help="What happens to texts over the context.")]


class Test(StrEnum):
    swap = "swap"
    remove = "remove"
    blank = "blank"


@app.command()
def weights(
    base: Base,
    adapter: AdapterOption = None,
    head: Head = None,
    config: Config = None,
    label: Labels = None,
    target: Target = None,
    top: Annotated[int, typer.Option("--top", min=1, help="Dimensions, words and neurons on each side.")] = 20,
    dtype: Dtype = None,
    device: Device = None,
    out: Out = Path("mechinterp-classifier"),
    debug: Debug = False,
) -> None:
    """The head's direction: statistics, largest dimensions, and the words and neurons that it is near."""
    with reported(debug):
        check_out(out)
        model = _load(base, adapter, head, config, label, dtype, device)
        _write(model, mi.run(model, None, [mi.ClassifierWeights(target, top=top)]), out, "Weights of a classifier")


@app.command()
def trajectory(
    base: Base,
    file: Texts,
    adapter: AdapterOption = None,
    head: Head = None,
    config: Config = None,
    label: Labels = None,
    target: Target = None,
    top: Annotated[int, typer.Option("--top", min=1, help="Tokens of highest and lowest score.")] = 20,
    text_field: TextField = "text",
    limit: Limit = None,
    too_long: TooLong = Truncation.refuse,
    dtype: Dtype = None,
    device: Device = None,
    out: Out = Path("mechinterp-classifier"),
    debug: Debug = False,
) -> None:
    """Log-odds at every token of every text, and where they are highest, lowest, and change most."""
    with reported(debug):
        check_out(out)
        texts = filled(file, rows_of(file, limit), text_field)
        model = _load(base, adapter, head, config, label, dtype, device)
        examples = mi.Examples.of(_cut(model, texts, too_long))
        asked = [
            mi.Trajectory(target),
            mi.HighScoreTokens(target, top=top),
            mi.HighScoreTokens(target, "step", top=top),
        ]
        _write(model, mi.run(model, examples, asked, progress=True), out, f"Trajectories: {file.name}")


@app.command()
def spurious(
    base: Base,
    file: Texts,
    adapter: AdapterOption = None,
    head: Head = None,
    config: Config = None,
    label: Labels = None,
    target: Target = None,
    pattern: Annotated[
        list[str] | None,
        typer.Option("--pattern", metavar="NAME=REGEX", help="A kind of word that should not matter; repeat."),
    ] = None,
    test: Annotated[Test, typer.Option("--test", help="What is done to a suspect.")] = Test.swap,
    text_field: TextField = "text",
    limit: Limit = None,
    too_long: TooLong = Truncation.refuse,
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = None,
    out: Out = Path("mechinterp-classifier"),
    debug: Debug = False,
) -> None:
    """Dates, numbers, codes and the like that stand at high scores, each with what leaving it out changes."""
    patterns = _patterns(pattern)
    with reported(debug):
        check_out(out)
        texts = filled(file, rows_of(file, limit), text_field)
        model = _load(base, adapter, head, config, label, dtype, device)
        examples = mi.Examples.of(_cut(model, texts, too_long))
        asked = mi.SpuriousPatterns(target, patterns=patterns, test=test.value, seed=seed)
        from mechinterp.studies.classifier import suspected

        found = mi.run(model, examples, [asked], progress=True)
        _write(model, found, out, f"Spurious patterns: {file.name}", suspected(found[0]))


@app.command()
def report(
    base: Base,
    file: Texts,
    adapter: AdapterOption = None,
    head: Head = None,
    config: Config = None,
    label: Labels = None,
    target: Target = None,
    pattern: Annotated[
        list[str] | None,
        typer.Option("--pattern", metavar="NAME=REGEX", help="A kind of word that should not matter; repeat."),
    ] = None,
    test: Annotated[Test, typer.Option("--test", help="What is done to a suspect.")] = Test.swap,
    text_field: TextField = "text",
    label_field: LabelField = None,
    limit: Limit = None,
    too_long: TooLong = Truncation.refuse,
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = None,
    out: Out = Path("mechinterp-classifier"),
    debug: Debug = False,
) -> None:
    """All of it as one page, with a menu to go from text to text."""
    patterns = _patterns(pattern)
    with reported(debug):
        check_out(out)
        from mechinterp.studies.classifier import classifier_report

        rows = rows_of(file, limit)
        texts = filled(file, rows, text_field)
        gold = None if label_field is None else filled(file, rows, label_field)
        model = _load(base, adapter, head, config, label, dtype, device)
        cut = _cut(model, texts, too_long)
        asked = mi.SpuriousPatterns(target, patterns=patterns, test=test.value, seed=seed)
        found = classifier_report(model, cut, gold, label=target, spurious=asked, seed=seed, progress=True)
        for line in found.summary():
            typer.echo(textwrap.fill(line, 100, subsequent_indent="    ", break_on_hyphens=False))
        about = {"command": shlex.join(["mechinterp", *sys.argv[1:]])}
        page = found.write(out, title=f"Classifier report: {file.name}", manifest=about)
        typer.echo(f"\nreport: {page}")


def _load(
    base: str,
    adapter: str | None,
    head: Path | None,
    config: Path | None,
    label: list[str] | None,
    dtype: str | None,
    device: str | None,
) -> "mi.Model":
    given: Any = None if base == "-" else base
    model = mi.load_classifier(
        given, adapter=adapter, head=head, config=config, labels=label, dtype=dtype, device=device
    )
    typer.echo(f"{model}\n")
    return model


def _cut(model: "mi.Model", texts: list[str], how: Truncation) -> list[str]:
    """Texts as they are, or cut to the context; how many were is said."""
    from mechinterp.studies.classifier import shorten

    if how is Truncation.refuse:
        return texts
    short, cut = shorten(model, texts, "start" if how is Truncation.keep_start else "end")
    if cut:
        typer.echo(f"{cut} of {len(texts)} texts were cut to {model.dims.context} tokens ({how.value})", err=True)
    return short


def _patterns(given: list[str] | None) -> dict[str, str]:
    out: dict[str, str] = {}
    for each in given or ():
        name, is_, regex = each.partition("=")
        if not is_ or not name or not regex:
            raise typer.BadParameter(f"{each!r} must be NAME=REGEX", param_hint="--pattern")
        out[name] = regex
    return out


def _write(
    model: "mi.Model", results: "list[mi.Result]", out: Path, title: str, more: Mapping[str, Any] | None = None
) -> None:
    from mechinterp.engine.runner import provenance
    from mechinterp.report.study import write_study
    from mechinterp.report.trajectory import trajectory_picker

    drawings: dict[str, Any] = {}
    for result in results:
        if "line_change" in result.data:
            drawings["Trajectories"] = trajectory_picker(result)
        typer.echo(f"{result.meta['analyzer']}\n{result.table().head(20).to_string(index=False)}\n")
    about = {**provenance(model), **(more or {}), "command": shlex.join(["mechinterp", *sys.argv[1:]])}
    typer.echo(f"report: {write_study(out, title, results, plan='', manifest=about, drawings=drawings)}")
