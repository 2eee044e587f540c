"""mechinterp feature-attribution, explain-prediction, analyze-gradients, rank-neuron-importance."""

import shlex
import sys
import textwrap
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import mechinterp as mi
from mechinterp.cli.causal import BatchSize
from mechinterp.cli.finetuned import words_of
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
    read_examples,
    reported,
    study,
    unescaped,
)
from mechinterp.errors import ExamplesError

if TYPE_CHECKING:
    from mechinterp.core.metrics import Metric

TOP = 20
"""Neurons that are printed."""


class Method(StrEnum):
    saliency = "saliency"
    grad_x_input = "grad-x-input"
    integrated_gradients = "integrated-gradients"
    head_x_representation = "head-x-representation"
    lime = "lime"
    kernel_shap = "kernel-shap"
    partition_shap = "partition-shap"


class NeuronMethod(StrEnum):
    gradient = "gradient"
    gradient_x_activation = "gradient-x-activation"
    integrated_gradients = "integrated-gradients"


class Baseline(StrEnum):
    mean = "mean"
    pad = "pad"
    zero = "zero"


class Depth(StrEnum):
    brief = "brief"
    standard = "standard"
    detailed = "detailed"


File = Annotated[
    Path | None,
    typer.Argument(metavar="[EXAMPLES]", help="A .jsonl or .csv file: text, answer, wrong.", show_default=False),
]
Text = Annotated[str | None, typer.Option("--text", help="One prompt instead of a file,")]
Answer = Annotated[str | None, typer.Option("--answer", help="its answer, such as ' Paris' with its space,")]
Wrong = Annotated[str | None, typer.Option("--wrong", help="and a wrong one: then the log-odds are explained.")]
Methods = Annotated[
    list[Method] | None, typer.Option("--method", help="Repeat for several; by default integrated-gradients.")
]
BaselineOption = Annotated[Baseline, typer.Option("--baseline", help="The embedding of a masked token.")]
Steps = Annotated[int, typer.Option("--steps", min=2, help="Of integrated gradients.")]
Evaluations = Annotated[int, typer.Option("--evaluations", min=2, help="Masked inputs for lime and SHAP.")]


def feature_attribution(
    model: ModelArgument,
    examples: File = None,
    text: Text = None,
    answer: Answer = None,
    wrong: Wrong = None,
    template: Annotated[
        str | None,
        typer.Option(
            "--template",
            callback=unescaped,
            help="The prompt around every text, {text}; then only the text is attributed. \\n is a new line.",
        ),
    ] = None,
    method: Methods = None,
    baseline: BaselineOption = Baseline.mean,
    steps: Steps = 50,
    evaluations: Evaluations = 200,
    batch_size: BatchSize = None,
    seed: Seed = 0,
    adapter: Adapter = None,
    dtype: Dtype = None,
    device: Device = None,
    out: Out = Path("mechinterp-attribution"),
    debug: Debug = False,
) -> None:
    """Which tokens of a prompt speak for its answer: gradients, integrated gradients, LIME, Shapley values."""
    own, source = _given(examples, text, answer, wrong)
    with reported(debug):
        check_out(out)
        prompts = _read(own, source, model)
        span = None
        if template is not None:
            prompts, span = _templated(prompts, template), "text"
        metric = _metric(prompts)
        chosen: list[Any] = list(dict.fromkeys(each.value for each in method or [Method.integrated_gradients]))
        analyzers: list[mi.Analyzer] = [
            mi.TokenAttribution(each, metric, span, baseline.value, steps, evaluations=evaluations, seed=seed)
            for each in chosen
        ]
        title = f"Token attribution by {', '.join(chosen)} in {Path(model).name}"
        study((model, adapter, dtype, device), prompts, analyzers, out, title, seed, source, batch_size)


def analyze_gradients(
    model: ModelArgument,
    examples: File = None,
    text: Text = None,
    answer: Answer = None,
    wrong: Wrong = None,
    attention: Annotated[
        bool, typer.Option("--attention/--no-attention", help="Also at every head's pattern, in a pass of its own.")
    ] = True,
    batch_size: BatchSize = None,
    seed: Seed = 0,
    adapter: Adapter = None,
    dtype: Dtype = None,
    device: Device = None,
    out: Out = Path("mechinterp-gradients"),
    debug: Debug = False,
) -> None:
    """How large the gradient of the answer's logit is: at the input, by layer and token, at each head's attention."""
    own, source = _given(examples, text, answer, wrong)
    with reported(debug):
        check_out(out)
        prompts = _read(own, source, model)
        analyzer = mi.GradientAnalysis(_metric(prompts), attention)
        title = f"Gradients in {Path(model).name}"
        study((model, adapter, dtype, device), prompts, [analyzer], out, title, seed, source, batch_size)


def rank_neuron_importance(
    model: ModelArgument,
    examples: File = None,
    text: Text = None,
    answer: Answer = None,
    wrong: Wrong = None,
    method: Annotated[
        NeuronMethod, typer.Option("--method", help="What ranks them.")
    ] = NeuronMethod.gradient_x_activation,
    sizes: Annotated[
        str, typer.Option("--sizes", metavar="N,N,...", help="How many are switched off together.")
    ] = "1,4,16,64,256",
    batch_size: BatchSize = None,
    seed: Seed = 0,
    adapter: Adapter = None,
    dtype: Dtype = None,
    device: Device = None,
    out: Out = Path("mechinterp-neurons"),
    debug: Debug = False,
) -> None:
    """Which MLP neurons an answer rests on, checked by switching the first ones off, beside random ones.

    OUT/tables/ has every neuron's score and rank as CSV.
    """
    own, source = _given(examples, text, answer, wrong)
    try:
        together = tuple(int(size) for size in sizes.split(","))
    except ValueError:
        raise typer.BadParameter(f"{sizes!r} must be numbers with commas between", param_hint="--sizes") from None
    with reported(debug):
        check_out(out)
        prompts = _read(own, source, model)
        analyzer = mi.NeuronImportance(_metric(prompts), method.value, together, seed=seed)
        title = f"Neurons ranked by {method.value} in {Path(model).name}"
        study((model, adapter, dtype, device), prompts, [analyzer], out, title, seed, source, batch_size)


def explain_prediction(
    model: ModelArgument,
    text: Annotated[str, typer.Argument(help="What is classified.")],
    label: Annotated[
        list[str] | None,
        typer.Option(
            "--label",
            metavar="NAME[=WORD]",
            help="A label, and the word that stands for it; repeat for each. A classifier has its own.",
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
    depth: Annotated[
        Depth,
        typer.Option("--explanation-depth", help="Words; also what erasing them does; also other methods, and layers."),
    ] = Depth.standard,
    method: Annotated[
        Method | None, typer.Option("--method", help="partition-shap, or without shap integrated-gradients.")
    ] = None,
    evaluations: Evaluations = 200,
    answer: Annotated[str, typer.Option("--answer", help="How a label continues the prompt.")] = " {label}",
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a user's message.")] = False,
    seed: Seed = 0,
    adapter: Adapter = None,
    dtype: Dtype = None,
    device: Device = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for a report; none by default.")] = None,
    debug: Debug = False,
) -> None:
    """Explain in sentences which label a model gives a text, and why."""  # fmt: skip
    words = words_of(label)
    with reported(debug):
        if out is not None:
            check_out(out)
        from mechinterp.studies.classification import question
        from mechinterp.studies.explaining import explain_prediction as explain

        loaded = mi.Model.load(model, adapter=adapter, dtype=dtype, device=device)
        if not words and loaded.dims.n_labels is None:
            raise ExamplesError(f"{model} is a language model; give its labels: --label positive --label negative")
        prompt = template or (question(list(words.values())) if words else "{text}")
        found = explain(
            loaded, text, words or None, prompt, depth=depth.value, method=None if method is None else method.value,
            evaluations=evaluations, answer=answer, chat=chat, seed=seed,
        )  # fmt: skip
        for line in found.sentences:
            typer.echo(textwrap.fill(line, 100, subsequent_indent="    ", break_on_hyphens=False))
        if out is not None:
            from mechinterp.engine.runner import provenance
            from mechinterp.report.study import write_study

            about: dict[str, Any] = {
                **provenance(loaded), "text": text, "template": prompt, "seed": seed,
                "command": shlex.join(["mechinterp", *sys.argv[1:]]),
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
            }  # fmt: skip
            title = f"Why {Path(model).name} says {found.label}"
            report = write_study(out, title, found.results, plan="", manifest=about, summary=found.sentences)
            typer.echo(f"\nreport: {report}")


def _given(
    examples: Path | None, text: str | None, answer: str | None, wrong: str | None
) -> tuple[Path | dict[str, str], str]:
    """A file, or one example from the options; and where it comes from."""
    if examples is not None:
        if text is not None or answer is not None or wrong is not None:
            raise typer.BadParameter("give a file, or --text and --answer", param_hint="EXAMPLES")
        check_format(examples, "EXAMPLES")
        return examples, str(examples)
    if text is None or answer is None:
        raise typer.BadParameter("give a file, or --text and --answer", param_hint="EXAMPLES")
    row = {"text": text, "answer": answer} | ({} if wrong is None else {"wrong": wrong})
    return row, "given on the command line"


def _read(own: Path | dict[str, str], source: str, model: str) -> "mi.Examples":
    examples = read_examples(own) if isinstance(own, Path) else mi.Examples.from_dataset([own])
    if examples.answers is None:
        raise ExamplesError(f"{source} has no answers to explain; give every row of it an answer, and perhaps a wrong")
    return examples


def _metric(examples: "mi.Examples") -> "Metric":
    """The log-odds of right against wrong answers, or the right one's logit."""
    two = examples.answers is not None and len(examples.answers[0]) > 1
    return mi.log_odds() if two else mi.answer_logit()


def _templated(examples: "mi.Examples", template: str) -> "mi.Examples":
    """The texts in the template, where they are the span ``text``."""
    if template.count("{text}") != 1:
        raise ExamplesError(f"a template must have one {{text}}, where the text goes. Got {template!r}")
    start = template.index("{text}")
    texts = [str(text) for text in examples.texts]
    spans = {"text": [(start, start + len(text)) for text in texts]}
    answers = [sides[0] if len(sides) == 1 else tuple(map(list, sides)) for sides in examples.answers or ()]
    prompts = [template.replace("{text}", text) for text in texts]
    return mi.Examples.of(prompts, examples.labels, [list(a) if len(a) == 1 else a for a in answers], spans=spans)
