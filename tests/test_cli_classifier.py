"""mechinterp classifier: weights, trajectory, spurious and report, and bad input."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import mechinterp as mi
from mechinterp.cli import main as cli
from mechinterp.tasks.histories import WORDS

RUN = CliRunner()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier as `save_classifier` writes it, beside its base."""
    where = tmp_path_factory.mktemp("classifier")
    base = mi.testing.tiny("llama", words=WORDS)
    base.hf.save_pretrained(where / "base")
    base.tokenizer.save_pretrained(where / "base")
    torch.manual_seed(0)
    made = mi.load_classifier(str(where / "base"), head=torch.nn.Linear(32, 2), labels=["stable", "event"])
    mi.save_classifier(made, where / "kept")
    return where / "kept"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    some = mi.tasks.patient_histories(14, lines=(3, 4))
    path = tmp_path / "texts.jsonl"
    rows = [{"text": text, "label": label} for text, label in zip(some.texts, some.labels, strict=True)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def invoke(*arguments: Any) -> Result:
    return RUN.invoke(cli.app, ["classifier", *(str(a) for a in arguments)])


def test_weights(folder: Path, tmp_path: Path) -> None:
    done = invoke("weights", folder, "--out", tmp_path / "out", "--top", 4)
    assert done.exit_code == 0, done.output
    assert "ClassifierWeights" in done.stdout and (tmp_path / "out" / "report.html").is_file()
    kept = mi.Result.load(tmp_path / "out" / "results" / "classifier-weights")
    assert kept.data.sizes["place"] == 4


def test_trajectory_and_spurious(folder: Path, texts: Path, tmp_path: Path) -> None:
    done = invoke("trajectory", folder, texts, "--out", tmp_path / "way", "--limit", 3)
    assert done.exit_code == 0, done.output
    page = (tmp_path / "way" / "report.html").read_text(encoding="utf-8")
    assert "updatemenus" in page and "Trajectory of each text" in page
    done = invoke(
        "spurious", folder, texts, "--out", tmp_path / "odd", "--pattern", "code=adm-\\d+", "--test", "remove"
    )
    assert done.exit_code == 0, done.output
    kinds = mi.Result.load(tmp_path / "odd" / "results" / "spurious-patterns").data["kind"].values.tolist()
    assert "code" in kinds and "identifier" not in kinds
    said = json.loads((tmp_path / "odd" / "manifest.json").read_text(encoding="utf-8"))
    assert [one["kind"] for one in said["suspects"]] == kinds
    assert {"suspect", "texts", "lift", "lift_q", "effect", "effect_q", "warning"} <= set(said["suspects"][0])
    assert {"word", "word_side", "word_lift"} <= set(said["words"][0])


def test_report(folder: Path, texts: Path, tmp_path: Path) -> None:
    done = invoke("report", folder, texts, "--label-field", "label", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "Accuracy" in done.stdout and "warning" in done.stdout.lower()
    assert len(list((tmp_path / "out" / "results").iterdir())) == 7
    said = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))
    assert said["suspects"] and len(said["high_scores"]) == len(said["high_steps"]) == 40


def test_texts_over_the_context(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"text": " stroke" * 400}) + "\n")
    done = invoke("trajectory", folder, path, "--out", tmp_path / "out")
    assert done.exit_code == 1 and "context" in done.stderr and not (tmp_path / "out").exists()
    done = invoke("trajectory", folder, path, "--out", tmp_path / "out", "--too-long", "keep-end")
    assert done.exit_code == 0, done.output
    assert "1 of 1 texts were cut to 256 tokens (keep-end)" in done.stderr


def test_bad_input(folder: Path, texts: Path, tmp_path: Path) -> None:
    for arguments, code, said in (
        (("report", folder, texts, "--label-field", "gold"), 1, "has no field 'gold'; its fields are text, label"),
        (("report", folder, texts, "--text-field", "body"), 1, "has no field 'body'"),
        (("report", folder, tmp_path / "no.jsonl"), 1, "cannot read"),
        (("weights", folder, "--target", "calm"), 1, "no label 'calm'; give one of stable, event"),
        (("weights", folder.parent / "base"), 1, "no head was given"),
        (("weights", folder.parent / "base", "--head", folder / "head.safetensors", "--label", "one"), 1, "2 outputs"),
        (("spurious", folder, texts, "--pattern", "code"), 2, "NAME=REGEX"),
        (("spurious", folder, texts, "--pattern", "code=("), 1, "no regular expression"),
    ):
        done = invoke(*arguments, "--out", tmp_path / "out")
        assert done.exit_code == code, (arguments, done.output)
        assert said in " ".join(done.stderr.replace("│", " ").split()), done.stderr
        assert "Traceback" not in done.output and not (tmp_path / "out").exists()
