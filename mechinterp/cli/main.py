"""mechinterp demo, run, patch, trace, circuit, attention-study, compare-finetuned, looking, comparing, verify.

Exit status: 0, 1 for a failure (one line on standard error; --debug shows the traceback), 2 for
wrong usage, 130 after Ctrl-C.
"""

import importlib.metadata
import inspect
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

import mechinterp as mi
from mechinterp.cli.attention import attention_study
from mechinterp.cli.attribution import (
    analyze_gradients,
    explain_prediction,
    feature_attribution,
    rank_neuron_importance,
)
from mechinterp.cli.causal import patch, trace
from mechinterp.cli.circuit import circuit
from mechinterp.cli.classifier import app as classifier
from mechinterp.cli.features import concept_bottleneck_analysis, features
from mechinterp.cli.finetuned import compare_finetuned
from mechinterp.cli.looking import compare_attention, compare_models_attention, visualize_attention
from mechinterp.cli.neurons import analyze_activations, find_concept_neurons
from mechinterp.cli.probing import probe_concepts, probe_linguistic, probe_representations, steer
from mechinterp.cli.representations import compare_languages, representations
from mechinterp.cli.study import (
    Adapter,
    Debug,
    Device,
    Dtype,
    ModelArgument,
    ModelName,
    Out,
    Seed,
    check_format,
    check_out,
    read_examples,
    reported,
    study,
)
from mechinterp.errors import NeedsError

# Nothing here imports torch before a command needs it, so that --help is quick.

STANDARD = ("logit-lens", "direct-logit-attribution", "head-roles")
"""The analyzers of a demo, and of a run that names none."""
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
    if token := os.environ.get("HUGGINGFACE_TOKEN"):
        os.environ.setdefault("HF_TOKEN", token)


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
    with reported(debug):
        check_out(out)
        examples = mi.tasks.ioi(n=n, seed=seed)
        title = f"Indirect objects in {Path(model).name}: lens, direct attribution and head roles"
        source = f"mi.tasks.ioi(n={n}, seed={seed})"
        analyzers = [_analyzer(each, seed) for each in STANDARD]
        study((model, adapter, dtype, device), examples, analyzers, out, title, seed, source)


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
    check_format(examples, "EXAMPLES")
    with reported(debug):
        check_out(out)
        own = read_examples(examples)
        chosen = list(dict.fromkeys(analyzer or STANDARD))
        if own.answers is None and not analyzer:
            chosen.remove("direct-logit-attribution")
            typer.echo("direct-logit-attribution is left out: the examples have no answers", err=True)
        title = f"{examples.name} in {Path(model).name}"
        analyzers = [_analyzer(each, seed) for each in chosen]
        study((model, adapter, dtype, device), own, analyzers, out, title, seed, str(examples), batch_size)


app.command()(patch)
app.command()(trace)
app.command()(circuit)
app.command()(visualize_attention)
app.command()(compare_attention)
app.command()(compare_models_attention)
app.command()(attention_study)
app.command()(feature_attribution)
app.command()(explain_prediction)
app.command()(analyze_gradients)
app.command()(rank_neuron_importance)
app.command()(analyze_activations)
app.command()(find_concept_neurons)
app.command()(compare_finetuned)
app.command()(probe_representations)
app.command()(probe_linguistic)
app.command()(probe_concepts)
app.command()(steer)
app.command()(features)
app.command()(concept_bottleneck_analysis)
app.command()(compare_languages)
app.command()(representations)
app.add_typer(classifier, name="classifier")


@app.command()
def look(
    model: ModelArgument,
    text: Annotated[str, typer.Argument(help="The prompt.")],
    sites: Annotated[list[str], typer.Argument(help="Such as resid_post, pattern.5, z.10.h3@end.")],
    adapter: Adapter = None,
    dtype: Dtype = None,
    device: Device = None,
    debug: Debug = False,
) -> None:
    """Just look: read sites in one pass, and show their axes, shapes and mean norms."""
    with reported(debug):
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
    backends: Annotated[
        str | None,
        typer.Option(
            "--backends", metavar="NAMES", help="Compare with transformer_lens, nnsight, or all of them, too."
        ),
    ] = None,
    file: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the checks here, too.")] = None,
    debug: Debug = False,
) -> None:
    """Check what every number rests on, on this model: sites, sums, edits, padding, batches, decoding.

    With --backends, every site and analyzers of each kind on other libraries, too. The exit status is 1 if a check
    fails.
    """
    with reported(debug):
        from mechinterp.engine.runner import provenance
        from mechinterp.engine.verify import HEAD, line
        from mechinterp.report.files import check_file, encode, write_file

        if file is not None:
            check_file(file)
        others = _backends(backends)
        loaded = mi.Model.load(model, adapter=adapter, dtype=dtype, device=device, check=False)
        typer.echo(f"{loaded}\n\n{HEAD}")
        found = mi.verify(loaded, quick=quick, told=lambda check: typer.echo(line(check)))
        compared = None
        if others:
            from mechinterp.studies import equivalence as study_of

            typer.echo(f"\n{study_of.HEAD}")
            compared = study_of.equivalence(loaded, others, told=lambda row: typer.echo(str(row)))
        passed = found.passed and (compared is None or compared.passed)
        if file is not None:
            checks = [{**asdict(check), "passed": check.passed} for check in found.checks]
            content: dict[str, Any] = {**provenance(loaded), "adapter": adapter, "passed": passed, "checks": checks}
            content["versions"] = {**content["versions"], **{name: importlib.metadata.version(name) for name in others}}
            if compared is not None:
                content["backends"] = [{**asdict(row), "verdict": row.verdict} for row in compared.rows]
            write_file(file, json.dumps(encode(content, "checks"), indent=1, allow_nan=False) + "\n")
        typer.echo(f"\n{found.summary}")
        if compared is not None:
            typer.echo(compared.summary)
        if not passed:
            raise typer.Exit(1)


def _backends(names: str | None) -> list[str]:
    """Libraries by name, of a list with commas, or all.

    Raises:
        BadParameter: there is none of that name.
    """
    known = ("transformer_lens", "nnsight")
    asked = [] if names is None else [name.strip() for name in names.split(",")]
    if odd := [name for name in asked if name not in (*known, "all")]:
        raise typer.BadParameter(f"--backends must be all, or some of {', '.join(known)}. Got {odd[0]!r}")
    return [name for name in known if name in asked or "all" in asked]


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


if __name__ == "__main__":
    main()
