"""mechinterp patch and trace: the files they write, the sentences they say, and bad input."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner, Result

import mechinterp as mi
from mechinterp.cli import main as cli
from mechinterp.cli.summary import findings
from mechinterp.engine.plan import Plan

RUN = CliRunner()
CLEAN, CORRUPTED = "Mary and John had a book, and John", "Mary and John had a book, and Mary"
PAIR = ["--clean", CLEAN, "--corrupted", CORRUPTED, "--answer", " Mary", "--wrong", " John"]
PROMPT = ["--prompt", "Mary had a book and", "--subject", "Mary", "--answer", " John"]


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, llama: mi.Model) -> Path:
    """A checkpoint of the tiny Llama."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    llama.hf.save_pretrained(folder)
    llama.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def invoke(*arguments: Any) -> Result:
    return RUN.invoke(cli.app, [str(a) for a in arguments])


def said(result: Result) -> str:
    """What a command that worked printed, on one line."""
    assert result.exit_code == 0, result.output
    return " ".join(result.stdout.split())


def one_line(result: Result) -> str:
    """The error of a failed command, which must be one line without a traceback."""
    assert result.exit_code == 1, result.output
    assert [line for line in result.stderr.splitlines() if line.startswith("error: ")] == [
        result.stderr.splitlines()[-1]
    ]
    assert "Traceback" not in result.output
    return result.stderr.splitlines()[-1]


def lines(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows(n: int) -> list[dict[str, Any]]:
    names = ["Mary", "John", "Tom", "Anna", "Paul", "Emma", "Kate", "Mark"]
    out = []
    for i in range(n):
        a, b = names[i % 8], names[(i + 3) % 8]
        text = f"{a} and {b} had a book, and "
        out.append({"clean": text + b, "corrupted": text + a, "answer": f" {a}", "wrong": f" {b}"})
    return out


# What they do


def test_patch_of_one_pair_writes_a_study_and_says_what_it_found(
    here: Path, tiny_folder: Path, llama: mi.Model
) -> None:
    result = invoke("patch", tiny_folder, *PAIR, "--out", "study")
    text = said(result)
    assert os.listdir(here) == ["study"]
    assert result.stdout.splitlines()[-1] == f"report: {Path('study') / 'report.html'}"
    saved = mi.Result.load(here / "study" / "results" / "activation-patching")
    asked = mi.ActivationPatching(("resid_pre", "attn_out", "mlp_out"))
    ours = mi.run(llama, mi.Examples.pairs([CLEAN], [CORRUPTED], [(" Mary", " John")]), asked)
    np.testing.assert_allclose(saved.data["effect"], ours.data["effect"], atol=1e-4)
    assert "sweep of resid_pre, attn_out, mlp_out: packed" in text  # the plan
    assert f"mean logit difference {float(ours.data['clean'].mean()):.2f}, and" in text
    attention = ours.table("effect").query("kind == 'attn_out'").dropna(subset="effect")
    top = attention.loc[attention["effect"].abs().idxmax()]
    token = llama.to_str_tokens(llama.tokenizer(CLEAN)["input_ids"])[top["position"]].replace(" ", "␣")
    expected = (
        f"Denoising attn_out: too few examples for a test (it takes 6); the largest of {len(attention)} cells are"
    )
    assert f"{expected} layer {top['layer']} at position {top['position']} ({token}): {top['effect']:.2f};" in text
    manifest = json.loads((here / "study" / "manifest.json").read_text())
    assert manifest["examples"] == "given on the command line"
    assert manifest["passes"]["sweep_rows"] > 0
    figure = here / "study" / "figures"
    assert sorted(p.suffix for p in figure.iterdir()) == [".png", ".svg"]
    assert "Activation patching of resid_pre, attn_out, mlp_out on one pair" in (here / "study/report.html").read_text()


@pytest.mark.parametrize(
    ("options", "dims", "sites"),
    [
        (["--by", "head"], ("layer", "head"), "z"),
        (["--by", "head", "--site", "v", "--positions", "end"], ("layer", "kv_head"), "v"),
        (["--by", "both", "--layers", "0,2", "--positions", "0,end"], ("layer", "position", "head"), "z"),
        (["--site", "mlp_out", "--positions", "0,end"], ("layer", "position"), "mlp_out"),
        (["--site", "mlp_out", "--positions", "all"], ("layer",), "mlp_out"),
    ],
)
def test_patch_by_any_axes(here: Path, tiny_folder: Path, options: list[str], dims: Any, sites: str) -> None:
    file = lines(here / "pairs.jsonl", *rows(6))
    text = said(invoke("patch", tiny_folder, file, *options, "--batch-size", "4", "--budget", "500"))
    saved = mi.Result.load(here / "mechinterp-patch" / "results" / "activation-patching")
    assert saved.data["effect"].dims == dims
    assert f"Denoising {sites}: " in text
    assert "cells" in text.split(f"Denoising {sites}: ")[1]


def test_directions_and_engines(here: Path, tiny_folder: Path) -> None:
    file = lines(here / "pairs.jsonl", *rows(2))
    found = {}
    for engine in ("packed", "full"):
        options = ("--site", "attn_out", "--direction", "noise", "--engine", engine, "--layers", "1", "--out", engine)
        text = said(invoke("patch", tiny_folder, file, *options))
        assert ("one whole pass for each row, because engine='full' was asked for" in text) == (engine == "full")
        assert "the clean prompts' own is 1. Noising attn_out:" in text
        found[engine] = mi.Result.load(here / engine / "results" / "activation-patching")
        assert found[engine].meta["options"]["direction"].strip("'\"") == "noise"
        assert found[engine].views[0].center == 1.0
    np.testing.assert_allclose(found["packed"].data["effect"], found["full"].data["effect"], atol=1e-3)


def test_trace_of_one_prompt(here: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gets = mi.Model.load(tiny_folder).trace(PROMPT[1], "logits")["logits"][0, -1].argmax()
    right = mi.Model.load(tiny_folder).to_str_tokens([int(gets)])[0]
    arguments = [*PROMPT[:-1], right, "--copies", "2", "--window", "2", "--layers", "0,2"]
    text = said(invoke("trace", tiny_folder, *arguments, "--sever", "mlp", "--out", "study"))
    saved = mi.Result.load(here / "study" / "results" / "causal-tracing")
    assert saved.meta["options"]["copies"] == "2"
    assert list(saved.data["layer"].values) == [0, 2]
    assert "Task: 1 of 1 prompt traced" in text
    assert (
        f"probability is {float(saved.data['clean'].mean()):.3f}, and {float(saved.data['noised'].mean()):.3f}" in text
    )
    change = (saved.data["restored"] - saved.data["noised"]).sel(kind="attention").isel(example=0)
    at = np.unravel_index(int(np.abs(change.values).argmax()), change.shape)
    largest = f"layer {int(change['layer'][at[0]])} at position {at[1]} "
    assert largest in text.split("Restoring attention:")[1].split("Restoring")[0]


def test_trace_of_a_file(here: Path, tiny_folder: Path) -> None:
    texts = ["Mary had a book and", "John had a ring and", "the dog had a ring and"]
    model = mi.Model.load(tiny_folder)
    tops = [model.to_str_tokens([int(model.trace(t, "logits")["logits"][0, -1].argmax())])[0] for t in texts]
    subjects = ["Mary", "John", "dog"]
    columns = zip(texts, tops, subjects, strict=True)
    file = lines(here / "e.jsonl", *({"text": t, "answer": a, "subject": s} for t, a, s in columns))
    text = said(invoke("trace", tiny_folder, file, "--copies", "1", "--window", "2", "--out", "study"))
    saved = mi.Result.load(here / "study" / "results" / "causal-tracing")
    assert f"Task: {int(saved.data['correct'].sum())} of 3 prompts traced" in text
    assert "last subject token" in text


def test_the_sentences_say_what_is_significant(llama: mi.Model) -> None:
    """On made-up numbers: significant cells first, the residual stream once for each place, nothing invented."""
    examples = mi.tasks.ioi(6)
    result = mi.run(llama, examples, mi.ActivationPatching(("resid_pre", "mlp_out"), positions=("S2", "end")))
    effect, q = result.data["effect"].copy(), result.data["q"].copy()
    effect[:], q[:] = 0.01, 0.5
    effect[0, :, 0], q[0, :, 0] = [0.5, 0.9, 0.7], 0.01
    effect[0, 2, 1], q[0, 2, 1] = -0.6, 0.02
    effect[1, 1, 1] = 0.3
    made = mi.Result(result.data.assign(effect=effect, q=q, ci_low=effect - 0.1, ci_high=effect + 0.1), result.meta)
    resid, mlp = findings([made], Plan(()))[1:3]
    assert resid == (
        "Denoising resid_pre: 4 of 6 cells are significant (q < .05), the largest (one layer each) layer 1 at S2: 0.90"
        " (0.80 to 1.00); layer 2 at end: -0.60 (-0.70 to -0.50)."
    )
    assert mlp.startswith(
        "Denoising mlp_out: none of 6 cells is significant (q < .05); the largest are layer 1 at end: 0.30"
    )
    nothing = mi.Result(made.data.assign(effect=effect * np.nan), result.meta)
    assert "no effect could be normalised" in findings([nothing], Plan(()))[1]


# Bad input


@pytest.mark.parametrize(
    ("command", "options", "wanted"),
    [
        ("patch", [*PAIR[:3], "Mary and John had a big book, and Mary", *PAIR[4:]], "have 9 and 10 tokens"),
        ("patch", [*PAIR[:5], " Mary John", *PAIR[6:]], "is 2 tokens"),
        ("patch", [*PAIR, "--site", "resid_pree"], "must be a kind"),
        ("patch", [*PAIR, "--site", "resid_pre", "--by", "head"], "has no heads"),
        ("patch", [*PAIR, "--site", "attn_out", "--site", "embed"], "embed has no layers"),
        ("patch", [*PAIR, "--layers", "7"], "layers 0 to 2"),
        ("patch", [*PAIR, "--positions", "99,end"], "position 99 is outside"),
        ("patch", [*PAIR, "--positions", "S3"], "'S3'"),
        ("trace", [*PROMPT[:3], "Tom", *PROMPT[4:]], "Tom"),
        ("trace", [*PROMPT[:5], "book"], "none of the 1 prompts|token"),
    ],
)
def test_what_cannot_be_run_is_one_sentence(
    here: Path, tiny_folder: Path, command: str, options: list[str], wanted: str
) -> None:
    error = one_line(invoke(command, tiny_folder, *options))
    assert any(one in error for one in wanted.split("|")), error
    assert os.listdir(here) == []


@pytest.mark.parametrize(
    ("command", "row", "wanted"),
    [
        ("patch", {"text": "Mary had a book", "answer": " Mary", "wrong": " John"}, "no pairs to patch"),
        (
            "patch",
            {"clean": CLEAN, "corrupted": CORRUPTED, "answer": " Mary"},
            "give every row clean, corrupted, answer",
        ),
        ("trace", {"text": "Mary had a book", "answer": " Mary"}, "no subjects to trace"),
        ("trace", {"text": "Mary had a book", "subject": "Mary"}, "give every row text, subject and answer"),
        ("trace", {"text": "Mary had a book", "subject": "Tom", "answer": " a"}, "'Tom'"),
    ],
)
def test_a_file_that_lacks_something_is_said_before_a_model_is_looked_for(
    here: Path, command: str, row: dict[str, Any], wanted: str
) -> None:
    assert wanted in one_line(invoke(command, "./no/such/model", lines(here / "e.jsonl", row)))
    assert os.listdir(here) == ["e.jsonl"]


@pytest.mark.parametrize("command", [["patch", *PAIR], ["trace", *PROMPT]], ids=lambda c: c[0])
def test_output_and_model_are_checked_first(here: Path, command: list[str]) -> None:
    (here / "file").write_text("mine")
    assert "is a file" in one_line(invoke(command[0], "./no/such/model", *command[1:], "--out", "file"))
    assert "there is no folder ./no/such/model" in one_line(invoke(command[0], "./no/such/model", *command[1:]))


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["patch"], "MODEL"),
        (["patch", "smollm2"], "give a file PAIRS, or --clean"),
        (["patch", "smollm2", "--clean", "a"], "--corrupted, --answer, --wrong missing"),
        (["patch", "smollm2", "pairs.txt"], "neither .jsonl nor .csv"),
        (["patch", "smollm2", "pairs.jsonl", "--clean", "a"], "give PAIRS or --clean, and not both"),
        (["patch", "smollm2", *PAIR, "--by", "layer"], "layer"),
        (["patch", "smollm2", *PAIR, "--direction", "up"], "up"),
        (["patch", "smollm2", *PAIR, "--engine", "fast"], "fast"),
        (["patch", "smollm2", *PAIR, "--budget", "0"], "--budget"),
        (["patch", "smollm2", *PAIR, "--layers", "one"], "must be numbers with commas"),
        (["patch", "smollm2", *PAIR, "--positions", "1,,2"], "must be positions with commas"),
        (["trace", "smollm2"], "give a file EXAMPLES, or --prompt"),
        (["trace", "smollm2", "--prompt", "a", "--answer", " b"], "--subject missing"),
        (["trace", "smollm2", *PROMPT, "--sever", "heads"], "heads"),
        (["trace", "smollm2", *PROMPT, "--copies", "0"], "--copies"),
        (["trace", "smollm2", *PROMPT, "--noise", "-1"], "--noise"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_wrong_usage_is_status_2(here: Path, arguments: list[str], wanted: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    shown = " ".join(result.output.replace("│", " ").split())
    assert wanted in shown
    assert "Traceback" not in result.output
    assert os.listdir(here) == []
