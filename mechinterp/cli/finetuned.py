"""mechinterp compare-finetuned: what fine-tuning changed in how well texts are classified, and why."""

import os
import shlex
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer

import mechinterp as mi
from mechinterp.cli.study import Debug, Device, Dtype, ModelArgument, Out, Seed, check_out, reported, unescaped

EVALUATED, TRAINED, EXPLAINED = 300, 600, 10
"""Texts, if no other number is given and there are so many."""
METHOD = "partition-shap"


def compare_finetuned(
    model: ModelArgument,
    dataset: Annotated[
        str, typer.Argument(metavar="DATASET", help="A .csv, .tsv, .json or .jsonl file, or a dataset's hub id.")
    ],
    finetune: Annotated[bool, typer.Option("--finetune", help="Train a LoRA adapter here,")] = False,
    adapter: Annotated[str | None, typer.Option("--adapter", help="or take this one: a folder, or a hub id.")] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(
            "--label",
            metavar="NAME[=WORD]",
            help="A label of the data, and the word that stands for it in the answer; repeat for each. Rows with"
            " others are left out. By default every label of the data.",
        ),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(
            "--template",
            callback=unescaped,
            help="The prompt, with {text} in it; by default a question. \\n is a new line.",
        ),
    ] = None,
    answer: Annotated[
        str | None, typer.Option("--answer", help='How a label continues it; " {label}", in a chat "{label}".')
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a user's message.")] = False,
    system: Annotated[str | None, typer.Option("--system", help="The system's message of a chat.")] = None,
    text_field: Annotated[str, typer.Option("--text-field")] = "text",
    label_field: Annotated[str, typer.Option("--label-field")] = "label",
    eval_dataset: Annotated[
        str | None, typer.Option("--eval-dataset", help="Another file or hub id to evaluate on.")
    ] = None,
    train_split: Annotated[
        str, typer.Option("--train-split", help="Of a hub dataset, or of a file's column split.")
    ] = "train",
    eval_split: Annotated[str, typer.Option("--eval-split")] = "test",
    train_size: Annotated[
        int | None, typer.Option("--train-size", min=2, help=f"Texts to train on; {TRAINED} if there are so many.")
    ] = None,
    eval_size: Annotated[
        int | None, typer.Option("--eval-size", min=2, help=f"Texts to evaluate on; {EVALUATED} if there are so many.")
    ] = None,
    explain: Annotated[int, typer.Option("--explain", min=1, help="Of them, texts to explain.")] = EXPLAINED,
    evaluations: Annotated[
        int, typer.Option("--evaluations", min=2, help="Masked inputs for each explained text.")
    ] = 100,
    run_shap: Annotated[bool, typer.Option("--run-shap/--no-run-shap", help="Explain, or only evaluate.")] = True,
    epochs: Annotated[int, typer.Option("--epochs", min=1)] = 1,
    learning_rate: Annotated[float, typer.Option("--learning-rate")] = 2e-4,
    rank: Annotated[int, typer.Option("--rank", min=1, help="Of the LoRA factors.")] = 8,
    train_batch_size: Annotated[int, typer.Option("--train-batch-size", min=1)] = 8,
    load_in_4bit: Annotated[bool, typer.Option("--load-in-4bit", help="By bitsandbytes, on CUDA.")] = False,
    badge: Annotated[Path | None, typer.Option("--badge", help="An SVG to put beside the outputs.")] = None,
    project_badge: Annotated[
        bool, typer.Option("--project-badge/--no-project-badge", help="Whether there is one.")
    ] = True,
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = None,
    out: Out = Path("mechinterp-finetuned"),
    debug: Debug = False,
) -> None:
    """Evaluate and explain a model zero-shot and with a LoRA adapter, on the same texts.

    The adapter is trained here or loaded; one model is in memory, and without the adapter is zero-shot. A gated
    model or dataset is opened with the token in HF_TOKEN or HUGGINGFACE_TOKEN.
    """
    if finetune == (adapter is not None):
        raise typer.BadParameter("give one of --finetune and --adapter", param_hint="--finetune")
    if not project_badge and badge is not None:
        raise typer.BadParameter("contradicts --no-project-badge", param_hint="--badge")
    words = words_of(label)
    with reported(debug):
        check_out(out)
        from mechinterp.analyzers.perturbing import check_package
        from mechinterp.studies.classification import Labelling, question
        from mechinterp.studies.finetuned import compare_finetuned as compare
        from mechinterp.studies.finetuned_report import badge_files, findings, write_comparison
        from mechinterp.studies.finetuning import finetune as train
        from mechinterp.studies.labelled import read_labelled
        from mechinterp.studies.training import Training

        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        own: str | Path | None = (badge or "") if project_badge else None
        if own is not None:
            badge_files(own)  # what cannot be used is said before the work
        if run_shap:
            check_package(METHOD)
        fields: dict[str, Any] = {
            "text_field": text_field,
            "label_field": label_field,
            "labels": list(words) if words else None,
        }
        every = read_labelled(eval_dataset or dataset, split=eval_split, **fields)
        other = read_labelled(dataset, split=train_split, **fields) if finetune else None
        shared = other is not None and other.texts == every.texts
        most = max(1, len(every) // 3) if shared else len(every)
        evaluated = every.part(min(EVALUATED, most) if eval_size is None else eval_size, seed)
        words = words or {name: name for name in sorted(set(every.labels))}
        prompt = template or question(list(words.values()))
        for line in every.left_out:
            typer.echo(f"left out: {line}", err=True)
        continuation = answer if answer is not None else "{label}" if chat else " {label}"
        asked: dict[str, Any] = {"answer": continuation, "chat": chat, "system": system}
        loaded = mi.Model.load(model, adapter=adapter, dtype=dtype, device=device, load_in_4bit=load_in_4bit)
        typer.echo(f"{loaded}\n")
        if run_shap:
            first = mi.Examples.of([evaluated.texts[0]])
            Labelling.of(loaded, words, prompt, **asked).against_others(loaded, first, list(words)[:1])
        kept: Path | None = None
        about: dict[str, object] = {"dataset": dataset, "seed": seed, "adapter": adapter}
        if other is not None:
            left = len(other.part(None, seed + 1, evaluated))
            training = other.part(min(TRAINED, left) if train_size is None else train_size, seed + 1, evaluated)
            how = Training(rank, 2 * rank, "all-linear", learning_rate, epochs, train_batch_size, seed)
            kept = out.with_name(f"{out.name}.adapter")
            typer.echo(f"training on {len(training)} texts ...", err=True)
            loaded = train(
                loaded, list(training.texts), words, prompt, gold=training.labels, out=kept, training=how,
                told=lambda line: typer.echo(line, err=True), **asked,
            )  # fmt: skip
            about |= {"trained_on": len(training)}
        found = compare(
            loaded, list(evaluated.texts), words, prompt, gold=evaluated.labels,
            explain=min(explain, len(evaluated)) if run_shap else 0, method=METHOD, evaluations=evaluations, seed=seed,
            told=lambda line: typer.echo(line, err=True), **asked,
        )  # fmt: skip
        for line in findings(found):
            typer.echo(textwrap.fill(line, 100, subsequent_indent="    ", break_on_hyphens=False))
        about |= {"command": shlex.join(["mechinterp", *sys.argv[1:]])}
        title = f"What fine-tuning changed: {Path(dataset).name} in {Path(model).name}"
        report = write_comparison(found, loaded, out, title=title, adapter=kept, badge=own, manifest=about)
        if kept is not None:  # it is in the study now
            shutil.rmtree(kept)
        typer.echo(f"\nreport: {report}")


def words_of(labels: list[str] | None) -> dict[str, str]:
    """Label → word, as the options say."""
    out: dict[str, str] = {}
    for each in labels or ():
        name, is_, word = each.partition("=")
        if not name.strip() or (is_ and not word.strip()) or name.strip() in out:
            raise typer.BadParameter(f"{each!r} must be NAME or NAME=WORD, each name once", param_hint="--label")
        out[name.strip()] = word.strip() or name.strip()
    if len(out) == 1:
        raise typer.BadParameter("give two or more, or none", param_hint="--label")
    return out
