"""Labelled texts from files, parts that share no text, and what is left out and said."""

import json
from pathlib import Path
from typing import Any

import pytest

from mechinterp.errors import ExamplesError
from mechinterp.studies.labelled import Labelled, read_labelled

ROWS = [
    {"text": "fine", "label": 1, "split": "train"},
    {"text": "bad", "label": 0, "split": "train"},
    {"text": "bad", "label": 0, "split": "test"},
    {"text": " ", "label": 0, "split": "test"},
    {"text": "odd", "label": 7, "split": "test"},
    {"text": "good", "label": 1, "split": "test"},
    {"text": "none", "label": None, "split": "test"},
]


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    return path


def test_what_cannot_be_used_is_counted(tmp_path: Path) -> None:
    found = read_labelled(jsonl(tmp_path / "a.jsonl", ROWS), labels=["0", "1"])
    assert found.texts == ("fine", "bad", "good") and found.labels == ("1", "0", "1")
    assert found.left_out == (
        "1 text empty", "1 text doubled", "1 text without a label", "1 text with the label '7'",
    )  # fmt: skip
    assert read_labelled(tmp_path / "a.jsonl", split="train").texts == ("fine", "bad")


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl"])
def test_formats(tmp_path: Path, suffix: str) -> None:
    rows = [{"review": 'He said, "no"\nway', "stars": "bad"}, {"review": "yes", "stars": "good"}]
    path = tmp_path / f"a.{suffix}"
    if suffix == "json":
        path.write_text(json.dumps(rows))
    elif suffix == "jsonl":
        jsonl(path, rows)
    else:
        import csv

        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["review", "stars"], delimiter="," if suffix == "csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    found = read_labelled(path, text_field="review", label_field="stars")
    assert found.texts == ('He said, "no"\nway', "yes") and found.labels == ("bad", "good")


def test_parts_share_no_text_and_are_seeded() -> None:
    every = Labelled(tuple(f"text {i}" for i in range(50)), tuple(str(i % 2) for i in range(50)))
    first = every.part(20, 0)
    second = every.part(30, 1, first)
    assert not set(first.texts) & set(second.texts) and len(set(first.texts) | set(second.texts)) == 50
    assert every.part(20, 0) == first != every.part(20, 1)
    assert all(str(int(text.split()[1]) % 2) == label for text, label in zip(first.texts, first.labels, strict=True))
    with pytest.raises(ExamplesError, match="only 30 labelled texts beside the 20 texts of the other part, and 31"):
        every.part(31, 1, first)


def test_bad_input(tmp_path: Path) -> None:
    good = jsonl(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(ExamplesError, match="has no field 'review'; its fields are text, label, split"):
        read_labelled(good, text_field="review")
    with pytest.raises(ExamplesError, match=r"no text of .* has the label '3'; its labels are 0, 1, 7"):
        read_labelled(good, labels=["0", "3"])
    with pytest.raises(ExamplesError, match="no split 'dev'; it has train, test"):
        read_labelled(good, split="dev")
    with pytest.raises(ExamplesError, match=r"cannot read .*: No such file"):
        read_labelled(tmp_path / "none.csv")
    with pytest.raises(ExamplesError, match=r"there is no file ./none"):
        read_labelled("./none")
    (tmp_path / "b.jsonl").write_text('{"text": "a", "label": 1}\n\n{"text": \n')
    with pytest.raises(ExamplesError, match=r"b.jsonl:3 is not JSON"):
        read_labelled(tmp_path / "b.jsonl")
    (tmp_path / "c.jsonl").write_text('{"text": "a", "label": 1}\n3\n')
    with pytest.raises(ExamplesError, match=r"c.jsonl:2 is not an object"):
        read_labelled(tmp_path / "c.jsonl")
    (tmp_path / "d.csv").write_text("text,label\n")
    with pytest.raises(ExamplesError, match="has no rows"):
        read_labelled(tmp_path / "d.csv")
    with pytest.raises(ExamplesError, match="no text with a label that can be used"):
        read_labelled(jsonl(tmp_path / "e.jsonl", [{"text": "", "label": 1}]))
