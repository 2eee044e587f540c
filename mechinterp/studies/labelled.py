"""Labelled texts from a file or from the hub, and seeded parts of them that share no text."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mechinterp.core.display import count
from mechinterp.errors import ExamplesError

SPLIT = "split"
"""The column of a file that says which part a row belongs to."""
FILES = (".csv", ".tsv", ".jsonl", ".json")


@dataclass(frozen=True)
class Labelled:
    """Texts and the label of each.

    Attributes:
        texts: as they were.
        labels: as text.
        left_out: what was left out, in words.
    """

    texts: tuple[str, ...]
    labels: tuple[str, ...]
    left_out: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.texts)

    def part(self, n: int | None, seed: int, without: "Labelled | None" = None) -> "Labelled":
        """n of them at random, in a random order, none of whose texts is in another part; all by default.

        Raises:
            ExamplesError: there are fewer.
        """
        taken = set() if without is None else set(without.texts)
        rows = [i for i, text in enumerate(self.texts) if text not in taken]
        order = np.random.default_rng(seed).permutation(len(rows))
        if n is not None and n > len(rows):
            beside = f" beside the {count(len(taken), 'text')} of the other part" if taken else ""
            raise ExamplesError(f"there are only {count(len(rows), 'labelled text')}{beside}, and {n} were asked for")
        chosen = [rows[i] for i in order[:n]]
        if not chosen:
            raise ExamplesError("no labelled text is left for this part; give more of them, or smaller parts")
        return Labelled(tuple(self.texts[i] for i in chosen), tuple(self.labels[i] for i in chosen), self.left_out)


def read_labelled(
    source: str | Path,
    *,
    text_field: str = "text",
    label_field: str = "label",
    split: str | None = None,
    labels: Sequence[str] | None = None,
) -> Labelled:
    """Labelled texts of a CSV, TSV, JSON or JSONL file, or of a dataset on the hub.

    Args:
        source: a file's path, or a hub id such as ``"cornell-movie-review-data/rotten_tomatoes"``, which is fetched.
        split: of a hub dataset; of a file with a column ``split``, the rows that have this value there.
        labels: the label space. Rows with another label are left out, and counted in `Labelled.left_out`, as are
            empty and doubled texts; by default every label is taken.
    Raises:
        ExamplesError: it cannot be read, lacks a field or the split, or nothing is left.
    """
    path = Path(source).expanduser()
    of_file = path.suffix in FILES or path.exists()
    rows = file_rows(path, split) if of_file else _hub_rows(str(source), split)
    for field in (text_field, label_field):
        if rows and field not in rows[0]:
            raise ExamplesError(
                f"{source} has no field {field!r}; its fields are {', '.join(map(str, rows[0]))}: name the text's and"
                " the label's"
            )
    texts: list[str] = []
    found: list[str] = []
    odd = {"empty": 0, "doubled": 0, "without a label": 0}
    strange: dict[str, int] = {}
    seen: set[str] = set()
    for row in rows:
        text, label = row.get(text_field), row.get(label_field)
        name = "" if label is None else str(label).strip()
        if not isinstance(text, str) or not text.strip():
            odd["empty"] += 1
        elif not name:
            odd["without a label"] += 1
        elif labels is not None and name not in labels:
            strange[name] = strange.get(name, 0) + 1
        elif text in seen:
            odd["doubled"] += 1
        else:
            seen.add(text)
            texts.append(text)
            found.append(name)
    left_out = [f"{count(n, 'text')} {what}" for what, n in odd.items() if n]
    left_out += [f"{count(n, 'text')} with the label {name!r}" for name, n in list(strange.items())[:10]]
    if not texts:
        raise ExamplesError(
            f"{source} has no text with a label that can be used"
            f"{f' ({chr(44).join(left_out)})' if left_out else ''}; check the fields and the labels"
        )
    if labels is not None and (absent := [name for name in labels if name not in found]):
        raise ExamplesError(
            f"no text of {source} has the label {absent[0]!r}; its labels are"
            f" {', '.join(list(dict.fromkeys([*found, *strange]))[:10])}: correct the label space"
        )
    return Labelled(tuple(texts), tuple(found), tuple(left_out))


def file_rows(path: Path, split: str | None = None) -> list[Mapping[str, Any]]:
    """Rows of a CSV, TSV, JSON or JSONL file; of one with a column ``split``, those that have this value there.

    Raises:
        ExamplesError: it cannot be read, or has none.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ExamplesError(f"cannot read {path}: {reason}; give a CSV, TSV, JSON or JSONL file, or a hub id") from None
    if path.suffix in (".csv", ".tsv"):
        rows: list[Any] = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=",\t"[path.suffix == ".tsv"]))
    else:
        rows = _json_rows(path, text)
    if not rows:
        raise ExamplesError(f"{path} has no rows; give labelled texts")
    if SPLIT in rows[0] and split is not None:
        there = list(dict.fromkeys(str(row.get(SPLIT)) for row in rows))
        rows = [row for row in rows if str(row.get(SPLIT)) == split]
        if not rows:
            raise ExamplesError(f"{path} has no split {split!r}; it has {', '.join(there[:10])}")
    return rows


def _json_rows(path: Path, text: str) -> list[Any]:
    whole = text.lstrip().startswith("[")
    lines = [(1, text)] if whole else [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    rows: list[Any] = []
    for number, line in lines:
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            at = number + error.lineno - 1
            raise ExamplesError(f"{path}:{at} is not JSON ({error.msg}); write one object a line") from None
        rows += row if whole else [row]
        if not all(isinstance(row, dict) for row in rows[-1:]):
            raise ExamplesError(f'{path}:{number} is not an object; write {{"text": ..., "label": ...}}')
    return rows


def _hub_rows(name: str, split: str | None) -> list[Mapping[str, Any]]:
    """Rows of a hub dataset; numbers of classes become their names."""
    if name.startswith((".", "/", "~")) or not 1 <= len([part for part in name.split("/") if part]) <= 2:
        raise ExamplesError(f"there is no file {name}; give a CSV, TSV, JSON or JSONL file, or a hub id")
    try:
        import datasets
    except ImportError:
        raise ExamplesError(
            f"{name!r} is no file, and datasets of the hub take the package datasets; run: pip install datasets"
        ) from None
    try:
        loaded: Any = datasets.load_dataset(name, split=split or "train")
    except Exception as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ExamplesError(
            f"{name!r} is no file, and the hub gave no split {split or 'train'!r} of a dataset of that name: {said};"
            " check the name, the split, the network, or your token"
        ) from error
    named = {field: kind for field, kind in loaded.features.items() if hasattr(kind, "int2str")}
    return [
        {**row, **{f: kind.int2str(row[f]) for f, kind in named.items() if row[f] in range(kind.num_classes)}}
        for row in loaded
    ]
