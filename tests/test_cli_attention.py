"""mechinterp attention-study: what it says, ranks from launchers, and bad input in one line."""

import json
from pathlib import Path

import pytest
import typer

from mechinterp.cli.attention import ranks
from tests.test_attention_study import rows, setup
from tests.test_cli_causal import here, invoke, one_line, said, tiny_folder

__all__ = ["here", "tiny_folder"]  # fixtures

pytestmark = pytest.mark.usefixtures("no_pictures")


def test_a_study_from_the_command_line(here: Path, tiny_folder: Path) -> None:
    config = setup(here)
    text = said(invoke("attention-study", config, "--model", tiny_folder, "--out", here / "mine"))
    right = sum(r["label"] == r["prediction"] for r in rows())
    assert f"{right} of 15 predictions (from the file) are correct" in text
    assert (here / "mine" / "report.html").is_file()


def test_ranks_and_their_join(here: Path, tiny_folder: Path) -> None:
    config = setup(here)
    for rank in range(2):
        text = said(invoke("attention-study", config, "--model", tiny_folder, "--rank", rank, "--world-size", 2))
        assert "join them" in text
    assert not (here / "out").exists()
    said(invoke("attention-study", config, "--model", tiny_folder, "--world-size", 1))
    assert json.loads((here / "out" / "manifest.json").read_text())["samples"] == 15


def test_debug_is_small_and_quick(here: Path, tiny_folder: Path) -> None:
    said(invoke("attention-study", setup(here), "--model", tiny_folder, "--debug"))
    assert json.loads((here / "out-debug" / "manifest.json").read_text())["samples"] == 8
    assert not (here / "out").exists()


def test_a_launcher_says_who_this_is() -> None:
    slurm, torchrun = {"SLURM_PROCID": "2", "SLURM_NTASKS": "4"}, {"RANK": "1", "WORLD_SIZE": "3"}
    assert ranks({}, None, None) == (0, 1)
    assert ranks(slurm, None, None) == (2, 4)
    assert ranks(torchrun, None, None) == (1, 3)
    assert ranks(slurm, 1, 2) == (1, 2)
    assert ranks(slurm, None, 1) == (0, 1)  # the join, after the ranks, in the same job
    assert ranks({"RANK": "x", "WORLD_SIZE": "3"}, None, None) == (0, 1)
    for environment, rank, size in (({}, 3, 2), ({}, 1, None), ({}, None, 2), ({}, 1, 1)):
        with pytest.raises(typer.BadParameter):
            ranks(environment, rank, size)


def test_bad_input_is_one_line(here: Path, tiny_folder: Path) -> None:
    assert "cannot read" in one_line(invoke("attention-study", here / "none.yaml"))
    config = setup(here)
    config.write_text(config.read_text().replace("shard_size", "shard_siz"))
    error = one_line(invoke("attention-study", config))
    assert "study.yaml:1: the key analysis.shard_siz is unknown; did you mean 'shard_size'?" in error
    (here / "out").mkdir()
    (here / "out" / "mine.txt").write_text("mine")
    error = one_line(invoke("attention-study", setup(here), "--model", tiny_folder))
    assert "holds mine.txt, which mechinterp did not write" in error
