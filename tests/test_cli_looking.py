"""The commands that show and compare attention: their files and sentences, and bad input."""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mechinterp as mi
from mechinterp.testing import tiny
from tests.test_cli_causal import here, invoke, one_line, said

__all__ = ["here"]  # a fixture


TEXT, OTHER = "Mary and John had a book, and John", "the dog had a ring and went to the store"
DIALOGUE = "Anna: had a book\nTom: the dog had a ring\nAnna: and a book\nTom: to the store\n"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Checkpoints of two tiny models."""
    out: dict[str, str] = {}
    for name, model in {"llama": tiny("llama"), "qwen": tiny("qwen3", layers=5)}.items():
        folder = tmp_path_factory.mktemp("models") / name
        model.hf.save_pretrained(folder)
        model.tokenizer.save_pretrained(folder)
        out[name] = str(folder)
    return out


def study(folder: Path) -> dict[str, Any]:
    """The manifest, whose files are those that are there."""
    manifest = json.loads((folder / "manifest.json").read_text())
    there = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert there == set(manifest["files"])
    assert not any(token in (folder / "report.html").read_text() for token in ("<img", "http-equiv=refresh"))
    return manifest


def test_a_dialogue_is_shown_by_speaker(here: Path, folders: dict[str, str]) -> None:
    (here / "d.txt").write_text(DIALOGUE)
    text = said(invoke("visualize-attention", "d.txt", "--model", folders["llama"], "--out", "s", "--heads", "1.2,0.0"))
    saved = mi.Result.load(here / "s/results/attention-between-speakers")
    cell = float(saved.data["share"].sel(speaker="Tom", other="Anna").mean())
    assert f"Tom to Anna {cell:.2f} (evenly spread" in text and "Too few turns for a test." in text
    manifest = study(here / "s")
    wanted = {"figures/all-heads.html", "figures/heads-side-by-side.html", "figures/one-head-token-by-token.html"}
    wanted |= {"figures/what-one-token-attends-to.html", "tables/attention-between-speakers-share.csv", "report.html"}
    assert wanted <= set(manifest["files"]) and manifest["tokens"] == 25
    patterns = mi.Result.load(here / "s/results/attention-patterns")
    assert patterns.data["pattern"].shape == (3, 1, 4, 25, 25)
    assert "layer 1, head 2" in (here / "s/figures/one-head-token-by-token.html").read_text()


def test_one_text_with_its_neurons(here: Path, folders: dict[str, str]) -> None:
    text = said(invoke("visualize-attention", "--text", TEXT, "--pair", "end,0", "--model", folders["qwen"]))
    profile = mi.Result.load(here / "mechinterp-attention/results/attention-profile")
    assert f"on average {float(profile.data['first'].mean()):.0%} of attention is on the first token" in text
    assert "figures/neurons-of-one-query-and-key.html" in study(here / "mechinterp-attention")["files"]


def test_a_long_text_is_shown_in_the_heads_that_are_named(
    here: Path, folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mechinterp.analyzers.patterns.MOST_NUMBERS", 2 * 2 * 81)
    asked = ["visualize-attention", "--text", TEXT, "--model", folders["llama"], "--out", "s"]
    assert "over 9 tokens are too large to show; name some with --heads" in one_line(invoke(*asked))
    said(invoke(*asked, "--heads", "1.2,2.0"))
    assert mi.Result.load(here / "s/results/attention-patterns").data["pattern"].shape == (2, 1, 2, 9, 9)
    said(invoke("compare-attention", TEXT, TEXT, "--model", folders["llama"], "--out", "t"))
    assert not [f for f in study(here / "t")["files"] if "patterns" in f]


def test_texts_are_compared(here: Path, folders: dict[str, str]) -> None:
    text = said(invoke("compare-attention", TEXT, OTHER, "--model", folders["llama"], "--out", "s"))
    saved = mi.Result.load(here / "s/results/attention-comparison").data["difference"].sel(measure="js", pair="1 → 2")
    at = np.unravel_index(int(saved.values.argmax()), saved.shape)
    assert (
        f"differ by {float(saved.mean()):.3f} bits on average, most in a{at[0]}.h{at[1]} {float(saved.max()):.3f}"
        in text
    )
    pages = [f for f in study(here / "s")["files"] if f.startswith("figures/heads-side-by-side-")]
    assert len(pages) == 2
    titles = re.findall(r"layer (\d+), head (\d+)", (here / "s" / pages[0]).read_text())
    order = np.argsort(-saved.values.ravel())[:6]  # the texts differ in length
    assert [4 * int(layer) + int(head) for layer, head in titles] == order.tolist()
    views = mi.Result.load(here / "s/results/attention-patterns").views
    assert all(view.title.endswith(", in the first text") for view in views)


def test_labels_of_a_file_are_compared_over_examples(here: Path, folders: dict[str, str]) -> None:
    rows = [*({"text": t, "label": "names"} for t in mi.tasks.ioi(6).texts)]
    rows += [*({"text": t, "label": "verbs"} for t in mi.tasks.agreement(6).texts)]
    (here / "e.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = said(invoke("compare-attention", "e.jsonl", "--model", folders["llama"], "--out", "s"))
    q = mi.Result.load(here / "s/results/attention-comparison").data["q"].sel(measure="js")
    assert f"{int((q < 0.05).sum())} of 12 heads differ (q < .05)" in text
    assert study(here / "s")["shuffles"] == 480


def test_models_are_compared(here: Path, folders: dict[str, str]) -> None:
    models = ["--model", folders["llama"], "--model", folders["qwen"]]
    text = said(invoke("compare-models-attention", TEXT, *models, "--out", "s"))
    data = mi.Result.load(here / "s/results/attention-of-models").data
    assert data["model"].values.tolist() == ["llama", "qwen"]
    assert f"llama: {float(data['first'].sel(model='llama').mean()):.0%} of attention on the first piece" in text
    js = data["js"].isel(pair=0)
    assert f"({float(js.min()):.3f} bits)" in text
    study(here / "s")


# Bad input


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["visualize-attention", "--text", ""], "empty"),
        (["visualize-attention", "--text", " a" * 300], "more than the model's context of 256"),
        (["visualize-attention", "--text", TEXT, "--heads", "9.0"], "no layer 9, head 0"),
        (["visualize-attention", "--text", TEXT, "--heads", "0.4"], "no layer 0, head 4"),
        (["visualize-attention", "--text", TEXT, "--pair", "end,99"], "position 99 is outside"),
        (["visualize-attention", "--text", TEXT, "--pair", "0,end"], "stands at or before its query"),
        (["visualize-attention", "none.txt"], "cannot read none.txt"),
        (["visualize-attention", "mute.txt"], "line 1 names no speaker"),
        (["compare-attention", TEXT, ""], "empty"),
        (["compare-attention", "none.jsonl"], "cannot read none.jsonl"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else None,
)
def test_what_cannot_be_shown_is_one_line(
    here: Path, folders: dict[str, str], arguments: list[str], wanted: str
) -> None:
    (here / "mute.txt").write_text("had a book\n")
    assert wanted in one_line(invoke(*arguments, "--model", folders["llama"]))
    assert os.listdir(here) == ["mute.txt"]


def test_equal_models_are_one_line(here: Path, folders: dict[str, str]) -> None:
    models = ["--model", folders["llama"], "--model", folders["llama"]]
    assert "are the same model" in one_line(invoke("compare-models-attention", TEXT, *models))
    assert "is empty" in one_line(
        invoke("compare-models-attention", "", models[0], models[1], "--model", folders["qwen"])
    )
    assert os.listdir(here) == []


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["visualize-attention"], "give a file DIALOGUE or --text"),
        (["visualize-attention", "d.txt", "--text", "a"], "and not both"),
        (["compare-attention", "a.jsonl", "b.jsonl"], "only one can be given"),
        (["visualize-attention", "d.md"], "d.md is none of .jsonl, .json, .txt"),
        (["visualize-attention", "--text", "a", "--heads", "1"], "must be layers and heads"),
        (["visualize-attention", "--text", "a", "--heads", "a.b"], "must be layers and heads"),
        (["visualize-attention", "--text", "a", "--pair", "1"], "must be two positions"),
        (["compare-attention"], "TEXT"),
        (["compare-attention", "one text"], "give two texts or more"),
        (["compare-models-attention", "a", "--model", "smollm2"], "give two models or more"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_wrong_usage_is_status_2(here: Path, arguments: list[str], wanted: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert wanted in " ".join(result.output.replace("│", " ").split())
    assert os.listdir(here) == []
