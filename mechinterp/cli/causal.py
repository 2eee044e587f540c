"""mechinterp patch and trace: what restores an answer, and where."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

import mechinterp as mi
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
)
from mechinterp.errors import ExamplesError

BY_POSITION = ("resid_pre", "attn_out", "mlp_out")
"""Sites that are patched at each position; at each head it is z."""


class By(StrEnum):
    """The axes of a grid, beside layers."""

    position = "position"
    head = "head"
    both = "both"


class Direction(StrEnum):
    denoise = "denoise"
    noise = "noise"


class Engine(StrEnum):
    packed = "packed"
    full = "full"


class Severed(StrEnum):
    mlp = "mlp"
    attention = "attention"


EngineOption = Annotated[
    Engine, typer.Option("--engine", help="One wavefront of all rows, or a whole pass for each (slow).")
]
Budget = Annotated[
    int | None, typer.Option("--budget", min=1, metavar="MB", help="Memory to aim for, beside the model's own.")
]
BatchSize = Annotated[int | None, typer.Option("--batch-size", min=1, help="Examples a batch.")]
Layers = Annotated[str | None, typer.Option("--layers", metavar="L,L,...", help="Such as 0,15,29; all by default.")]


def patch(
    model: ModelArgument,
    pairs: Annotated[
        Path | None,
        typer.Argument(
            metavar="[PAIRS]", help="A .jsonl or .csv file: clean, corrupted, answer, wrong.", show_default=False
        ),
    ] = None,
    clean: Annotated[str | None, typer.Option("--clean", help="One pair instead of a file: its clean prompt,")] = None,
    corrupted: Annotated[
        str | None, typer.Option("--corrupted", help="its corrupted prompt, with as many tokens,")
    ] = None,
    answer: Annotated[
        str | None, typer.Option("--answer", help="the clean prompt's answer, such as ' Mary' with its space,")
    ] = None,
    wrong: Annotated[str | None, typer.Option("--wrong", help="and the corrupted prompt's.")] = None,
    site: Annotated[
        list[str] | None,
        typer.Option(
            "--site",
            help=f"Kind of site; repeat for several. By default {', '.join(BY_POSITION)}; z by head.",
            show_default=False,
        ),
    ] = None,
    by: Annotated[By, typer.Option("--by", help="Layer by position, layer by head, or all three axes.")] = By.position,
    positions: Annotated[
        str | None,
        typer.Option(
            "--positions",
            metavar="P,P,...",
            help="Such as end or 0,7,end; by default each, or (by head) all at once.",
            show_default=False,
        ),
    ] = None,
    layers: Layers = None,
    direction: Annotated[
        Direction,
        typer.Option(
            "--direction", help="Write clean values into the corrupted run (denoise), or the reverse (noise)."
        ),
    ] = Direction.denoise,
    engine: EngineOption = Engine.packed,
    budget: Budget = None,
    batch_size: BatchSize = None,
    seed: Seed = 0,
    adapter: Adapter = None,
    dtype: Dtype = None,
    device: Device = None,
    out: Out = Path("mechinterp-patch"),
    debug: Debug = False,
) -> None:
    """Activation patching: which sites, at which tokens or heads, carry the difference between two prompts.

    The effect is measured by the logit difference of the right and the wrong answer: 1 is the clean
    prompt's, 0 the corrupted one's.
    """
    own = _one_or_file(
        "PAIRS", pairs, {"--clean": clean, "--corrupted": corrupted, "--answer": answer, "--wrong": wrong}
    )
    sites = tuple(dict.fromkeys(site or (BY_POSITION if by is By.position else ("z",))))
    chosen = _layers(layers)
    where = (None if by is By.head else "each") if positions is None else _positions(positions)
    with reported(debug):
        check_out(out)
        analyzer = mi.ActivationPatching(
            sites[0] if len(sites) == 1 else sites,
            positions=where,
            heads=None if by is By.position else "each",
            layers=chosen,
            direction=direction.value,
        )
        examples = read_examples(pairs) if pairs is not None else mi.Examples.from_dataset([own])
        if examples.corrupted is None or examples.answers is None or len(examples.answers[0]) < 2:
            raise ExamplesError(f"{pairs} has no pairs to patch; give every row clean, corrupted, answer and wrong")
        name = "one pair" if pairs is None else pairs.name
        title = f"Activation patching of {', '.join(sites)} on {name} in {Path(model).name}"
        options: dict[str, Any] = {} if budget is None else {"budget": budget * 1_000_000}
        source = "given on the command line" if pairs is None else str(pairs)
        ways_in = (model, adapter, dtype, device)
        study(ways_in, examples, [analyzer], out, title, seed, source, batch_size, engine.value, **options)


def trace(
    model: ModelArgument,
    examples: Annotated[
        Path | None,
        typer.Argument(metavar="[EXAMPLES]", help="A .jsonl or .csv file: text, subject, answer.", show_default=False),
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="One prompt instead of a file,")] = None,
    subject: Annotated[str | None, typer.Option("--subject", help="its subject, as it stands in the prompt,")] = None,
    answer: Annotated[str | None, typer.Option("--answer", help="and its answer, with its leading space.")] = None,
    window: Annotated[int, typer.Option("--window", min=1, help="Layers of attention or MLP restored together.")] = 10,
    copies: Annotated[int, typer.Option("--copies", min=1, help="Noised runs, which are averaged.")] = 10,
    noise: Annotated[
        float, typer.Option("--noise", min=0, help="In standard deviations of the subjects' embeddings.")
    ] = 3.0,
    sever: Annotated[
        Severed | None,
        typer.Option("--sever", help="Hold these at the noised run's values, to see what passes through them."),
    ] = None,
    layers: Layers = None,
    engine: EngineOption = Engine.packed,
    budget: Budget = None,
    batch_size: BatchSize = None,
    seed: Seed = 0,
    adapter: Adapter = None,
    dtype: Dtype = None,
    device: Device = None,
    out: Out = Path("mechinterp-trace"),
    debug: Debug = False,
) -> None:
    """Causal tracing: noise on a subject, and which states, restored one at a time, bring the answer back."""
    own = _one_or_file("EXAMPLES", examples, {"--prompt": prompt, "--subject": subject, "--answer": answer})
    own = {"text" if name == "prompt" else name: value for name, value in own.items()}
    chosen = _layers(layers)
    with reported(debug):
        check_out(out)
        analyzer = mi.CausalTracing(
            window=window, copies=copies, noise=noise, sever=None if sever is None else sever.value, layers=chosen
        )
        read = read_examples(examples) if examples is not None else mi.Examples.from_dataset([own])
        if read.answers is None or "subject" not in {*read.spans, *read.positions}:
            raise ExamplesError(f"{examples} has no subjects to trace; give every row text, subject and answer")
        title = f"Causal tracing of {'one prompt' if examples is None else examples.name} in {Path(model).name}"
        options: dict[str, Any] = {} if budget is None else {"budget": budget * 1_000_000}
        source = "given on the command line" if examples is None else str(examples)
        ways_in = (model, adapter, dtype, device)
        study(ways_in, read, [analyzer], out, title, seed, source, batch_size, engine.value, **options)


def _one_or_file(name: str, file: Path | None, given: dict[str, str | None]) -> dict[str, str]:
    """The options that make one example, by name; none where there is a file. Anything else is wrong usage."""
    there = {option: value for option, value in given.items() if value is not None}
    if file is not None:
        if there:
            raise typer.BadParameter(f"give {name} or {next(iter(there))}, and not both")
        check_format(file, name)
        return {}
    if lacking := [option for option in given if option not in there]:
        raise typer.BadParameter(
            f"{', '.join(lacking)} missing; give a file {name}, or {', '.join(given)}" if there
            else f"give a file {name}, or {', '.join(given)}"
        )  # fmt: skip
    return {option.removeprefix("--"): value for option, value in there.items()}


def _layers(text: str | None) -> tuple[int, ...] | None:
    """``0,15,29``."""
    try:
        return None if text is None else tuple(int(one) for one in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"must be numbers with commas. Got {text!r}", param_hint="--layers") from None


def _positions(text: str) -> Any:
    """``end``: one; ``0,end``: an axis; ``each`` and ``all`` are themselves."""
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise typer.BadParameter(f"must be positions with commas. Got {text!r}", param_hint="--positions")
    chosen = tuple(int(part) if part.lstrip("-").isdigit() else part for part in parts)
    return {"each": "each", "all": None}.get(str(chosen[0]), chosen[0]) if len(chosen) == 1 else chosen
