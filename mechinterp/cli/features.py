"""mechinterp features and concept-bottleneck-analysis: what an SAE, or concepts given as texts, say of a model."""

import shlex
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

import mechinterp as mi
from mechinterp.cli.causal import BatchSize
from mechinterp.cli.study import (
    Adapter,
    Debug,
    Device,
    Dtype,
    ModelArgument,
    Out,
    Seed,
    check_format,
    check_out,
    explanation,
    read_examples,
    reported,
    study,
)
from mechinterp.errors import ExamplesError

FILES = (".csv", ".tsv", ".jsonl", ".json")


class Decision(StrEnum):
    logit_diff = "logit-diff"
    log_odds = "log-odds"


def features(
    model: ModelArgument,
    sae: Annotated[Path, typer.Argument(metavar="SAE", help="A folder in SAELens' format.")],
    examples: Annotated[
        Path, typer.Argument(metavar="FILE", help="A .jsonl or .csv file: text and, for effects, answer and wrong.")
    ],
    feature: Annotated[
        list[int] | None, typer.Option("--feature", min=0, help="Whose tokens and effects are shown; repeat.")
    ] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="Features a text, and tokens a feature.")] = 10,
    site: Annotated[
        str | None, typer.Option("--site", help="What the SAE reads, where its file names no site.")
    ] = None,
    batch_size: BatchSize = None,
    seed: Seed = 0,
    adapter: Adapter = None,
    dtype: Dtype = None,
    device: Device = None,
    out: Out = Path("mechinterp-features"),
    debug: Debug = False,
) -> None:
    """Features of a sparse autoencoder on your texts: density, strongest tokens, reconstruction, loss recovered.

    Where the texts have answers, also what ablating a feature takes from the logit difference.
    """
    check_format(examples, "FILE")
    with reported(debug):
        check_out(out)
        own = read_examples(examples)
        loaded = mi.SparseAutoencoder.load(sae, site=site, device=device or "cpu")
        chosen = tuple(feature) if feature else None
        asked: list[mi.Analyzer] = [mi.Features(loaded, chosen, top=top)]
        if own.answers is not None:
            metric = mi.logit_diff() if all(len(sides) > 1 for sides in own.answers) else mi.answer_logit()
            asked.append(mi.FeatureEffects(loaded, chosen, metric))
        title = f"Features of {loaded.out} on {examples.name} in {Path(model).name}"
        study((model, adapter, dtype, device), own, asked, out, title, seed, str(examples), batch_size)


def concept_bottleneck_analysis(
    model: ModelArgument,
    concepts: Annotated[
        Path,
        typer.Argument(metavar="CONCEPTS", help="A .jsonl or .csv file: text, concept (empty for texts of none)."),
    ],
    examples: Annotated[
        Path, typer.Argument(metavar="EXAMPLES", help="A .jsonl or .csv file of what is decided: text, answer, wrong.")
    ],
    site: Annotated[str, typer.Option("--site", help="Where the concepts are, such as resid_post.15.")],
    positions: Annotated[str, typer.Option("--positions", help="One token of each text: end, or a number.")] = "end",
    decision: Annotated[Decision, typer.Option("--decision", help="What is predicted.")] = Decision.logit_diff,
    seed: Seed = 0,
    adapter: Adapter = None,
    dtype: Dtype = None,
    device: Device = None,
    out: Out = Path("mechinterp-bottleneck"),
    debug: Debug = False,
) -> None:
    """How far a decision is a linear function of concepts given as texts, and what changing these does to it."""
    if concepts.suffix not in FILES:
        raise typer.BadParameter(f"{concepts} is none of {', '.join(FILES)}", param_hint="CONCEPTS")
    check_format(examples, "EXAMPLES")
    with reported(debug):
        check_out(out)
        from mechinterp.report.study import write_study

        texts, others = _concepts(concepts)
        own = read_examples(examples)
        if own.answers is None or any(len(sides) < 2 for sides in own.answers):
            raise ExamplesError(f"{examples} must have answer and wrong in every row; the decision is between them")
        loaded = mi.Model.load(model, adapter=adapter, dtype=dtype, device=device)
        typer.echo(f"{loaded}\n")
        where = int(positions) if positions.lstrip("-").isdigit() else positions
        metric = mi.logit_diff() if decision is Decision.logit_diff else mi.log_odds()
        found = mi.studies.concept_bottleneck(
            loaded, own, texts, others=others, site=site, positions=where, metric=metric, seed=seed, progress=True
        )
        for name in ("r2", "weight"):
            typer.echo(f"{found.table(name).to_string(index=False)}\n")
        about = {**found.meta, "command": shlex.join(["mechinterp", *sys.argv[1:]]), "concepts": str(concepts)}
        title = f"Concepts of {concepts.name} in the decisions of {Path(model).name} on {examples.name}"
        told = {"ConceptBottleneck": explanation(mi.ConceptBottleneck)}
        typer.echo(f"report: {write_study(out, title, [found], plan='', manifest=about, explanations=told)}")


def _concepts(file: Path) -> tuple[dict[str, list[str]], list[str]]:
    """Texts by concept, and those of none."""
    from mechinterp.studies.labelled import file_rows

    texts: dict[str, list[str]] = {}
    others: list[str] = []
    for i, row in enumerate(file_rows(file)):
        if not str(row.get("text") or "").strip() or "concept" not in row:
            raise ExamplesError(f"row {i + 1} of {file} must have a text and a concept (empty for a text of none)")
        name: Any = row["concept"]
        (texts.setdefault(str(name), []) if name else others).append(str(row["text"]))
    if not texts:
        raise ExamplesError(f"{file} names no concept; give each text of one its name in the field 'concept'")
    return texts, others
