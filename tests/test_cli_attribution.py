"""mechinterp compare-finetuned, explain-prediction and attribution: files, sentences and bad input."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner, Result

import mechinterp as mi
from mechinterp.cli import main as cli

RUN = CliRunner()
MARY = ["the man gave a book to Mary", "a man and Mary", "Mary gave the book", "the book to Mary", "Mary and a man"]
TEXTS = [f"{text}{end}" for end in ("", " and", " to") for text in MARY]
ROWS = [{"review": text, "stars": "m"} for text in TEXTS]
ROWS += [{"review": text.replace("Mary", "John"), "stars": "j"} for text in TEXTS]


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, llama: mi.Model) -> Path:
    """A checkpoint of the tiny Llama."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    llama.hf.save_pretrained(folder)
    llama.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "reviews.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    path = tmp_path / "examples.jsonl"
    rows = [{"text": f"{text} and", "answer": " John", "wrong": " Mary"} for text in MARY]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def invoke(*arguments: Any) -> Result:
    return RUN.invoke(cli.app, [str(a) for a in arguments])


def said(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return " ".join(result.stdout.split())


def error(result: Result) -> str:
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    return result.stderr.splitlines()[-1]


FIELDS = ("--text-field", "review", "--label-field", "stars", "--label", "j=John", "--label", "m=Mary")
FAST = ("--learning-rate", 0.02, "--epochs", 4, "--template", "{text} and", "--explain", 2, "--evaluations", 20)


def test_compare_finetuned_trains_and_then_loads(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "study"
    told = said(invoke("compare-finetuned", tiny_folder, data, "--finetune", *FIELDS, *FAST, "--out", out))
    assert "Fine-tuning corrected" in told and "Explanations of 2 texts, word by word" in told
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["trained_on"] == 20 and manifest["texts"] == 10  # a third is evaluated, the rest trains
    seen = {json.loads(line)["text"] for line in (out / "predictions.jsonl").read_text().splitlines()}
    assert len(seen) == 10 and (out / "project_badge.svg").exists() and not (tmp_path / "study.adapter").exists()
    again = tmp_path / "again"
    told = said(
        invoke(
            "compare-finetuned", tiny_folder, data, "--adapter", out / "lora_adapter", *FIELDS, "--template",
            "{text} and", "--eval-size", 10, "--no-run-shap", "--no-project-badge", "--out", again,
        )
    )  # fmt: skip
    assert "word by word" not in told
    first, second = (json.loads((folder / "fine_tuned_metrics.json").read_text()) for folder in (out, again))
    assert first["metrics"] == second["metrics"]
    assert not list(again.glob("*shap*")) and not (again / "project_badge.svg").exists()


def test_compare_finetuned_refuses(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    start = ("compare-finetuned", tiny_folder, data)
    assert invoke(*start).exit_code == 2  # neither trained nor loaded
    assert invoke(*start, "--finetune", "--adapter", "x").exit_code == 2
    assert invoke(*start, "--finetune", "--label", "only").exit_code == 2
    out = ("--out", tmp_path / "out", "--finetune")
    assert "has no field 'text'" in error(invoke(*start, *out))
    assert "has the label 'z'" in error(invoke(*start, *out, *FIELDS, "--label", "z"))
    assert "only 30 labelled texts, and 99 were asked for" in error(invoke(*start, *out, *FIELDS, "--eval-size", 99))
    twins = ("--text-field", "review", "--label-field", "stars", "--label", "j=Mary to", "--label", "m=Mary and")
    assert "begin with the same token" in error(invoke(*start, *out, *twins))
    bad = tmp_path / "bad.svg"
    bad.write_text("<svg xmlns='http://www.w3.org/2000/svg'><script/></svg>")
    assert "may only draw" in error(invoke(*start, *out, *FIELDS, "--badge", bad))
    assert not (tmp_path / "out").exists()


def test_explain_prediction(tiny_folder: Path, tmp_path: Path) -> None:
    labels = ("--label", "m=Mary", "--label", "j=John", "--template", "{text} and", "--evaluations", 20)
    told = said(invoke("explain-prediction", tiny_folder, MARY[0], *labels, "--explanation-depth", "brief"))
    assert told.startswith("Predicted ") and "speak" in told and "random" not in told
    out = tmp_path / "why"
    told = said(invoke("explain-prediction", tiny_folder, MARY[0], *labels, "--out", out))
    assert "as many random ones" in told
    assert "background-color:rgb(" in (out / "report.html").read_text()
    assert "give its labels" in error(invoke("explain-prediction", tiny_folder, MARY[0]))


def test_feature_attribution(tiny_folder: Path, pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"
    methods = ("--method", "grad-x-input", "--method", "partition-shap", "--evaluations", 20)
    around = ("--template", r"a book : {text}\n")  # as a shell's quotes leave it
    told = said(invoke("feature-attribution", tiny_folder, pairs, *methods, *around, "--out", out))
    assert told.count("Most contribute, on average where they occur: “") == 2 and "within 0.0% of their size" in told
    assert "\\" not in (out / "tables" / "token-attribution-word-attribution.csv").read_text()
    table = pd.read_csv(out / "tables" / "token-attribution-word-attribution.csv")
    assert "book" not in table["word"].fillna("").tolist()[:1]  # of the template
    one = tmp_path / "one"
    said(invoke("feature-attribution", tiny_folder, "--text", MARY[0], "--answer", " John", "--out", one))
    assert (one / "report.html").exists()
    assert invoke("feature-attribution", tiny_folder, "--text", MARY[0]).exit_code == 2
    assert invoke("feature-attribution", tiny_folder, pairs, "--answer", "x").exit_code == 2


def test_gradients_and_neurons(tiny_folder: Path, pairs: Path, tmp_path: Path) -> None:
    told = said(invoke("analyze-gradients", tiny_folder, pairs, "--no-attention", "--out", tmp_path / "g"))
    assert "mlp_out: the gradient is largest at layer" in told
    assert (tmp_path / "g" / "report.html").exists()
    told = said(invoke("rank-neuron-importance", tiny_folder, pairs, "--sizes", "1,4", "--out", tmp_path / "n"))
    assert "With the first 4 neurons switched off it is" in told
    tables = [pd.read_csv(path) for path in (tmp_path / "n" / "tables").glob("*.csv")]
    ranks = next(table for table in tables if {"layer", "neuron", "rank"} <= set(table.columns))
    assert sorted(ranks["rank"]) == list(range(len(ranks)))
    assert invoke("rank-neuron-importance", tiny_folder, pairs, "--sizes", "one").exit_code == 2
