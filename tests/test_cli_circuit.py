"""mechinterp circuit: the files it writes, the sentences it says, and bad input."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import mechinterp as mi
from tests.test_cli_causal import here, invoke, lines, one_line, rows, said, tiny_folder

__all__ = ["here", "tiny_folder"]  # fixtures


def study(here: Path, folder: Path, *options: Any, pairs: str = "pairs.jsonl") -> str:
    file = lines(here / pairs, *rows(6))
    return said(invoke("circuit", folder, file, *options, "--out", "study"))


def test_a_circuit_with_its_tests_and_files(here: Path, tiny_folder: Path) -> None:
    text = study(here, tiny_folder, "--edges", "12", "--method", "eap")
    out = here / "study"
    found = mi.studies.Circuit.load(out / "circuit.json")
    model, examples = mi.Model.load(tiny_folder), mi.Examples.from_jsonl(here / "pairs.jsonl")
    ours = mi.studies.discover(model, examples, "eap", size=12)["mixed"]
    assert np.array_equal(found.kept, ours.kept)
    assert np.array_equal(mi.studies.Circuit.from_dot((out / "circuit.dot").read_text(), found.graph).kept, found.kept)
    table = pd.read_csv(out / "tables" / "circuit-edges-score.csv")
    assert [*zip(table["sender"], table["receiver"], strict=True)] == [
        *zip(ours.edges["sender"], ours.edges["receiver"], strict=True)
    ]
    nodes = pd.read_parquet(out / "tables" / "circuit-nodes-outgoing.parquet")
    assert list(nodes["node"]) == list(ours.nodes)
    assert f"Circuit: {len(ours)} of {len(ours.graph):,} edges" in text
    assert "those of the 12 largest scores, by size, of eap that are on a path to the logits" in text
    tested = mi.studies.faithfulness(ours, model, examples)
    share = mi.Result.load(out / "results" / "faithfulness").data["faithfulness"]
    np.testing.assert_allclose(share, tested.data["faithfulness"], atol=1e-4)
    assert f"Faithfulness: {float(share):.2f} (95% interval " in text
    assert "on the 6 pairs that it was found on, which flatters it" in text
    assert f"Stability: {'unstable' if ours.unstable else 'stable'}; circuits of examples drawn anew overlap" in text
    assert f"overlap by {ours.meta['stability']:.2f}, where 0.8 counts as stable" in text
    row = ours.edges.iloc[0]
    assert f"Strongest edges: {row.sender} → {row.receiver} {row.score:+.2f}" in text
    curve = mi.Result.load(out / "results" / "faithfulness-curve")
    assert f"CPR {float(curve.data['cpr'].sel(ranking='signed')):.2f} (95%" in text
    assert "lose faithfulness when cut alone" in text
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["circuit"]["method"] == "eap"
    assert manifest["held_out"] == "none"
    drawn = {f"figures/circuit.{end}" for end in ("html", "png", "svg")}
    assert {"circuit.json", "circuit.dot", *drawn, "report.html"} <= {*manifest["files"]}


def test_types_have_their_own_files_and_held_out_pairs_are_named(here: Path, tiny_folder: Path) -> None:
    other = lines(here / "other.jsonl", *rows(8)[6:] * 2)
    options = ("--type", "attention_only", "--type", "mlp_only", "--share", "0.2", "--no-curve", "--held-out", other)
    text = study(here, tiny_folder, *options)
    out = here / "study"
    assert "on the 4 pairs of other.jsonl, other than those it was found on" in text
    assert "Circuit (attention only): " in text
    assert "Faithfulness (mlp only): " in text
    assert "Curve" not in text
    for kind, without in (("attention-only", "m"), ("mlp-only", "a")):
        found = mi.studies.Circuit.load(out / f"circuit-{kind}.json")
        assert not [node for node in found.nodes if node.startswith(without)]
        assert (out / "figures" / f"circuit-{kind}.html").is_file()
        assert (out / "tables" / f"circuit-edges-{kind}-score.csv").is_file()


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        (["--method", "acdc", "--candidates", "20"], "what acdc kept of"),
        (["--faithful", "0.5"], "that reach faithfulness 0.5"),
        (["--faithful", "50"], "all that are on a path to the logits, for no fewer reach faithfulness 50"),
    ],
)
def test_how_many_edges_and_why(here: Path, tiny_folder: Path, options: list[str], wanted: str) -> None:
    assert wanted in study(here, tiny_folder, *options, "--no-curve")


def test_names_are_only_ever_text(here: Path, tiny_folder: Path) -> None:
    study(here, tiny_folder, "--edges", "8", "--no-curve", pairs="<img src=x onerror=alert(1)>.jsonl")
    for page in ("report.html", "figures/circuit.html"):
        html = (here / "study" / page).read_text()
        assert "<img src=x" not in html
        assert "&lt;img src=x" in html
        assert "default-src 'none'" in html
        assert "<q>" not in html.split("<script>")[0]


# Bad input


def test_output_and_files_are_checked_before_the_work(here: Path) -> None:
    file = lines(here / "pairs.jsonl", *rows(1))
    (here / "foreign").mkdir()
    (here / "foreign" / "mine.txt").write_text("mine")
    error = one_line(invoke("circuit", "./no/such/model", file, "--out", "foreign"))
    assert "holds mine.txt, which mechinterp did not write" in error
    assert "there is no folder ./no/such/model" in one_line(invoke("circuit", "./no/such/model", file))
    text = lines(here / "text.jsonl", {"text": "Mary had a book", "answer": " Mary", "wrong": " John"})
    for arguments in ([text], [file, "--held-out", text]):
        assert "text.jsonl has no pairs; give every row" in one_line(invoke("circuit", "./no/such/model", *arguments))
    assert sorted(os.listdir(here)) == ["foreign", "pairs.jsonl", "text.jsonl"]


def test_more_edges_than_there_are(here: Path, tiny_folder: Path) -> None:
    file = lines(here / "pairs.jsonl", *rows(2))
    assert "must be a count up to" in one_line(invoke("circuit", tiny_folder, file, "--edges", 10**6))
    assert os.listdir(here) == ["pairs.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ([], "MODEL"),
        (["smollm2"], "PAIRS"),
        (["smollm2", "pairs.txt"], "neither .jsonl nor .csv"),
        (["smollm2", "p.jsonl", "--held-out", "o.txt"], "--held-out"),
        (["smollm2", "p.jsonl", "--method", "guess"], "guess"),
        (["smollm2", "p.jsonl", "--type", "heads"], "heads"),
        (["smollm2", "p.jsonl", "--edges", "0"], "--edges"),
        (["smollm2", "p.jsonl", "--share", "1.5"], "at most 1"),
        (["smollm2", "p.jsonl", "--faithful", "0"], "must be above 0"),
        (["smollm2", "p.jsonl", "--edges", "5", "--share", "0.1"], "give --edges or --share, and not both"),
        (["smollm2", "p.jsonl", "--method", "acdc", "--edges", "5"], "acdc goes by --threshold"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_wrong_usage_is_status_2(here: Path, arguments: list[str], wanted: str) -> None:
    result = invoke("circuit", *arguments)
    assert result.exit_code == 2, result.output
    assert wanted in " ".join(result.output.replace("│", " ").split())
    assert os.listdir(here) == []


def test_held_out_pairs_that_it_was_found_on_are_counted(here: Path, tiny_folder: Path) -> None:
    other = lines(here / "other.jsonl", *rows(8))
    text = study(here, tiny_folder, "--edges", "4", "--no-curve", "--held-out", other)
    assert "on the 8 pairs of other.jsonl, 6 of which are among those it was found on" in text
