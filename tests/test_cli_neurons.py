"""mechinterp analyze-activations and find-concept-neurons: files, sentences, bad input."""

import json
from pathlib import Path

import pandas as pd
import pytest

import mechinterp as mi
from tests.test_cli_attribution import error, invoke, said, tiny_folder

__all__ = ["tiny_folder"]  # a fixture

NOUNS = ("book", "ring", "drink", "ball", "kiss", "bone", "snack", "basketball", "necklace", "computer")


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    rows = [{"text": f"{name} had a {noun}", "who": name} for noun in NOUNS for name in ("Mary", "John")]
    rows += [{"text": "Anna had a book", "who": ""}, {"text": "Tom had a ring"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_analyze_activations(tiny_folder: Path, tmp_path: Path) -> None:
    texts = tmp_path / "corpus.txt"
    texts.write_text("Mary and John had a book\n\nthe dog had a ring\nJohn\n")
    out = tmp_path / "out"
    chosen = ("--kind", "mlp_act", "--kind", "resid_post", "--layers", "0,2", "--neuron", "2.7", "--neuron", "2.3")
    told = said(invoke("analyze-activations", tiny_folder, texts, *chosen, "--top", 4, "--out", out))
    stats = mi.Result.load(out / "results" / "activation-stats").data
    assert (stats["layer"].values.tolist(), stats["tokens"].values.tolist()) == ([0, 2], [3, 9])
    sparsity = float(stats["hoyer"].sel(kind="mlp_act", token="rest").mean())
    assert "12 tokens of 3 texts" in told and f"Hoyer sparsity {sparsity:.2f}" in told
    top = pd.read_csv(out / "tables" / "max-activating-value.csv")
    assert sorted(set(top["neuron"])) == [3, 7] and set(top["layer"]) == {2} and len(top) == 8
    assert all("«" in text for text in top["context"])
    assert "mlp_act.2.n3 is above 0 at" in told and "mlp_act.2.n7 is above 0 at" in told
    assert {"report.html", "manifest.json"} <= {path.name for path in out.iterdir()}
    shares = pd.read_csv(out / "tables" / "activation-stats-share.csv")
    assert shares.groupby(["kind", "layer", "token"])["share"].sum().round(6).eq(1).all()


def test_find_concept_neurons(tiny_folder: Path, labelled: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ("find-concept-neurons", tiny_folder, labelled, "--label-field", "who", "--out", out)
    told = said(invoke(*command, "--positions", "all", "--sizes", "1,4", "--top", 5))
    data = mi.Result.load(out / "results" / "concept-neurons").data
    assert data["label"].values.tolist() == ["Mary"] and data["size"].values.tolist() == [1, 4]
    best, auroc = data["site"].values[0, 0], float(data["held_out_auroc"][0, 0])
    assert "2 texts without a label left out." in told and f"{best} {auroc:.2f}" in told
    effect = float(data["effect"].sel(label="Mary", order="ranked", size=4, on="label"))
    assert f"The first 4 of them switched off change the loss by {effect:+.3f}" in told
    assert (out / "report.html").exists() and (out / "tables" / "concept-neurons-auroc.csv").exists()
    rows = [json.loads(line) for line in labelled.read_text().splitlines()]
    labelled.write_text("".join(json.dumps({**row, "noun": row["text"].split()[-1]}) + "\n" for row in rows))
    some = (*command[:-1], tmp_path / "draws", "--sizes", "2", "--draws", 3)
    said(invoke(*some))
    data = mi.Result.load(tmp_path / "draws" / "results" / "concept-neurons").data
    assert float(data["excess_p"].min()) >= 0.25
    # Two nouns that the tokenizer does not know make equal texts.
    assert "the groups leak" in error(invoke(*some, "--group-field", "noun"))
    assert "no field 'verb'" in error(invoke(*some, "--group-field", "verb"))


def test_bad_input(tiny_folder: Path, labelled: Path, tmp_path: Path) -> None:
    find, look = ("find-concept-neurons", tiny_folder), ("analyze-activations", tiny_folder)
    assert "has no field 'label'" in error(invoke(*find, labelled))
    assert "has no field 'words'" in error(invoke(*look, labelled, "--text-field", "words"))
    lone = invoke(*find, labelled, "--label-field", "who", "--limit", 8, "--out", tmp_path / "x")
    assert "'John' has 4 texts, and each must have 6" in error(lone)
    deep = invoke(*look, labelled, "--layers", "9", "--out", tmp_path / "x")
    assert "does not exist: the model has layers 0 to 2" in error(deep)
    assert "cannot read" in error(invoke(*look, tmp_path / "none.txt"))
    (tmp_path / "empty.txt").write_text("\n \n")
    assert "has no texts" in error(invoke(*look, tmp_path / "empty.txt"))
    for wrong in (
        (*find, labelled, "--sizes", "one"),
        (*find, labelled, "--layers", "first"),
        (*find, labelled, "--each-token", "--positions", "all"),
        (*find, tmp_path / "texts.pdf"),
        (*look, labelled, "--neuron", "3"),
        (*look, tmp_path / "texts.pdf"),
    ):
        assert invoke(*wrong).exit_code == 2, wrong
    assert not (tmp_path / "x").exists()
