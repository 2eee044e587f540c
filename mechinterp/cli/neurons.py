"""mechinterp analyze-activations and find-concept-neurons: what activations are like, and which go with what."""

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
    Limit,
    ModelArgument,
    Out,
    Seed,
    TextField,
    check_out,
    field,
    filled,
    reported,
    rows_of,
    study,
)
from mechinterp.errors import ExamplesError

FORMATS = (".csv", ".tsv", ".json", ".jsonl", ".txt")


class Ablation(StrEnum):
    zero = "zero"
    mean = "mean"


Texts = Annotated[Path, typer.Argument(metavar="FILE", help="Texts: .csv, .tsv, .json, .jsonl, or .txt, one a line.")]
Labelled = Annotated[Path, typer.Argument(metavar="FILE", help="Texts with labels: .csv, .tsv, .json or .jsonl.")]
Layers = Annotated[
    str | None, typer.Option("--layers", metavar="N,N,...", help="Some layers, such as 0,5,10; by default all.")
]


def analyze_activations(
    model: ModelArgument,
    file: Texts,
    kind: Annotated[
        list[str] | None,
        typer.Option("--kind", help="Of site, such as mlp_act; repeat. By default resid_post, attn_out and mlp_out."),
    ] = None,
    layers: Layers = None,
    neuron: Annotated[
        list[str] | None,
        typer.Option("--neuron", metavar="L.N", help="Also the tokens that make an MLP neuron most active; repeat."),
    ] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="Tokens for each neuron.")] = 20,
    text_field: TextField = "text",
    limit: Limit = None,
    batch_size: BatchSize = None,
    seed: Seed = 0,
    adapter: Adapter = None,
    dtype: Dtype = None,
    device: Device = None,
    out: Out = Path("mechinterp-activations"),
    debug: Debug = False,
) -> None:
    """What activations are like over a file of texts: size, distribution, sparsity, dead units, outlier dimensions."""
    _check(file, FORMATS)
    chosen, neurons = _layers(layers), _neurons(neuron)
    with reported(debug):
        check_out(out)
        examples = mi.Examples.of(_texts(file, text_field, limit))
        stats = mi.ActivationStats(layers=chosen) if kind is None else mi.ActivationStats(tuple(kind), chosen)
        asked: list[mi.Analyzer] = [stats]
        asked += [mi.MaxActivating("mlp_act", (layer,), some, top) for layer, some in neurons.items()]
        title = f"Activations of {Path(model).name} on {file.name}"
        study((model, adapter, dtype, device), examples, asked, out, title, seed, str(file), batch_size)


def find_concept_neurons(
    model: ModelArgument,
    file: Labelled,
    text_field: TextField = "text",
    label_field: Annotated[
        str, typer.Option("--label-field", help="What texts are told apart by; rows without one are left out.")
    ] = "label",
    layers: Layers = None,
    positions: Annotated[
        str, typer.Option("--positions", help="The token that is looked at: end, a number, or all (their mean).")
    ] = "end",
    each_token: Annotated[
        bool, typer.Option("--each-token", help="Look at every token but the first by itself; takes memory.")
    ] = False,
    sizes: Annotated[
        str, typer.Option("--sizes", metavar="N,N,...", help="How many are switched off together; 0 for none.")
    ] = "1,4,16,64",
    ablation: Annotated[Ablation, typer.Option("--ablation", help="What is put in their place.")] = Ablation.zero,
    top: Annotated[int, typer.Option("--top", min=1, help="Neurons in the table of the best.")] = 20,
    held_out: Annotated[
        float, typer.Option("--held-out", min=0.1, max=0.6, help="Share of the texts that does not rank, but checks.")
    ] = 0.3,
    draws: Annotated[
        int, typer.Option("--draws", min=1, help="Random sets of neurons; p is no smaller than 1 / (draws + 1).")
    ] = 39,
    group_field: Annotated[
        str | None, typer.Option("--group-field", help="Texts of one group are all held out, or none.")
    ] = None,
    limit: Limit = None,
    batch_size: BatchSize = None,
    seed: Seed = 0,
    adapter: Adapter = None,
    dtype: Dtype = None,
    device: Device = None,
    out: Out = Path("mechinterp-concept-neurons"),
    debug: Debug = False,
) -> None:
    """Which MLP neurons go with a label of the texts, checked on held-out texts and by switching them off.

    What is measured is the difference of the columns answer and wrong where the file has them, and the loss elsewhere.
    """
    _check(file, FORMATS[:-1])
    if each_token and positions != "end":
        raise typer.BadParameter("give --positions or --each-token", param_hint="--each-token")
    together = _numbers(sizes, "--sizes")
    chosen = _layers(layers)
    where: int | str = int(positions) if positions.lstrip("-").isdigit() else positions
    with reported(debug):
        check_out(out)
        examples, groups = _labelled(file, text_field, label_field, limit, group_field)
        asked = mi.ConceptNeurons(
            chosen, where, each="token" if each_token else None, sizes=together if together != (0,) else (),
            ablation=ablation.value, top=top, held_out=held_out, seed=seed,
            draws=draws, groups=groups,
        )  # fmt: skip
        title = f"Neurons of {Path(model).name} that go with {label_field} in {file.name}"
        study((model, adapter, dtype, device), examples, [asked], out, title, seed, str(file), batch_size)


def _check(file: Path, formats: tuple[str, ...]) -> None:
    if file.suffix not in formats:
        raise typer.BadParameter(f"{file} is none of {', '.join(formats)}", param_hint="FILE")


def _numbers(text: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} must be numbers with commas between", param_hint=option) from None


def _layers(text: str | None) -> tuple[int, ...] | None:
    return None if text is None else _numbers(text, "--layers")


def _neurons(given: list[str] | None) -> dict[int, tuple[int, ...]]:
    """``10.5``: layer and number; the numbers of each layer."""
    out: dict[int, tuple[int, ...]] = {}
    for one in given or ():
        layer, _, number = one.partition(".")
        if not layer.isdigit() or not number.isdigit():
            raise typer.BadParameter(f"{one!r} must be a layer and a neuron, such as 10.5", param_hint="--neuron")
        out[int(layer)] = tuple(sorted({*out.get(int(layer), ()), int(number)}))
    return dict(sorted(out.items()))


def _texts(file: Path, name: str, limit: int | None) -> list[str]:
    """The first so many texts of a file; of a .txt, its lines.

    Raises:
        ExamplesError: it cannot be read, lacks the field, or a text is missing.
    """
    if file.suffix != ".txt":
        return filled(file, rows_of(file, limit), name)
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ExamplesError(f"cannot read {file}: {reason}; give a file of texts") from None
    if not (texts := [line.strip("\r") for line in lines if line.strip()]):
        raise ExamplesError(f"{file} has no texts; write one a line")
    return texts[:limit]


def _labelled(
    file: Path, text: str, label: str, limit: int | None, group: str | None
) -> tuple["mi.Examples", tuple[Any, ...] | None]:
    """Texts with labels, None where there is none, and answers where the file has them; and groups, if asked for."""
    rows = rows_of(file, limit)
    answers: list[Any] | None = None
    if "answer" in rows[0]:
        answers = filled(file, rows, "answer")
        if "wrong" in rows[0]:
            answers = list(zip(answers, filled(file, rows, "wrong"), strict=True))
    groups = None if group is None else tuple(filled(file, rows, group))
    return mi.Examples.of(filled(file, rows, text), field(file, rows, label), answers), groups
