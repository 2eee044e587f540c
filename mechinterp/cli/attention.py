"""mechinterp attention-study: who attends to what, when the model is right and when it is wrong."""

import os
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

import mechinterp as mi
from mechinterp.cli.study import WAYS_IN, reported

RANKS = (("SLURM_PROCID", "SLURM_NTASKS"), ("RANK", "WORLD_SIZE"))
"""Where a launcher says which process this is, and of how many."""


def attention_study(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="A YAML file: model, generation, analysis, visualisation.")
    ],
    model: Annotated[str | None, typer.Option("--model", help=f"In place of the configuration's. {WAYS_IN}")] = None,
    samples: Annotated[Path | None, typer.Option("--samples", help="In place of the configuration's.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="In place of the configuration's.")] = None,
    rank: Annotated[
        int | None, typer.Option("--rank", min=0, help="Which process this is; by default what Slurm or torchrun say.")
    ] = None,
    world_size: Annotated[
        int | None,
        typer.Option("--world-size", min=1, help="Of how many. 1 joins what several ranks did, and writes the study."),
    ] = None,
    debug: Annotated[
        bool, typer.Option("--debug", help="A small quick run of 8 samples into OUT-debug, with tracebacks of errors.")
    ] = False,
) -> None:
    """Compare attention to word categories between correct and incorrect predictions (docs/attention-study.md)."""
    with reported(debug):
        who = ranks(os.environ, rank, world_size)
        from mechinterp.studies.attention_report import findings
        from mechinterp.studies.configuration import StudyConfig

        settings = StudyConfig.load(config).instead(
            model=model, samples=None if samples is None else str(samples), out=None if out is None else str(out)
        )
        study = mi.studies.attention_study(
            settings, rank=who[0], world_size=who[1], debug=debug, told=lambda line: typer.echo(line, err=True)
        )
        if study is None:
            typer.echo(f"when all ranks are done, join them: mechinterp attention-study {config} --world-size 1")
            return
        for line in findings(study):
            typer.echo(textwrap.fill(line, 100, subsequent_indent="    ", break_on_hyphens=False))
        typer.echo(f"\nreport: {study.folder / 'report.html'}")


def ranks(environment: Mapping[str, str], rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Rank and world size: those given, else those of the launcher, else one alone."""
    launcher = next((pair for pair in RANKS if all(environment.get(name, "").isdigit() for name in pair)), None)
    if world_size is not None and world_size > 1 and rank is None and launcher is None:
        raise typer.BadParameter("is needed beside --world-size, where no launcher gives it", param_hint="--rank")
    told = (0, 1) if launcher is None or world_size == 1 else tuple(int(environment[name]) for name in launcher)
    mine = (told[0] if rank is None else rank), (told[1] if world_size is None else world_size)
    if not mine[0] < mine[1]:
        raise typer.BadParameter(f"must be less than the world size, {mine[1]}. Got {mine[0]}", param_hint="--rank")
    return mine
