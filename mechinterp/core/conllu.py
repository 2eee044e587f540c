"""CoNLL-U: parsed sentences from a file with a word a line (https://universaldependencies.org/format.html)."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from mechinterp.core.tokens import Span
from mechinterp.errors import ExamplesError

NOT_SAID = "_"
Line: TypeAlias = tuple[int, list[str]]
"""The number of a line of the file, and its fields."""


@dataclass(frozen=True)
class Sentence:
    """A sentence of a CoNLL-U file.

    Attributes:
        text: as the file has it, or else its words with the spaces that they say.
        forms: the words.
        spans: each word's characters; None for one that does not stand in the text (*de* and *le* in *du*).
        heads: the number of each word's head, from 0; -1 for a root, None where the file does not say.
        depths: how many dependencies each word is from its root; None where a head on the way is None.
        relations: to the head, without subtypes.
        pos: universal parts of speech.
        feats: morphological features by name.
        comments: what the lines ``# name = value`` say, but for the text.
    """

    text: str
    forms: tuple[str, ...]
    spans: tuple[Span | None, ...]
    heads: tuple[int | None, ...]
    depths: tuple[int | None, ...]
    relations: tuple[str, ...]
    pos: tuple[str, ...]
    feats: tuple[Mapping[str, str], ...]
    comments: Mapping[str, str]


def read_conllu(path: str | Path) -> list[Sentence]:
    """The sentences of a CoNLL-U file; empty nodes are left out.

    Raises:
        ExamplesError: the file cannot be read, a line is not as the format says, a sentence has no words or heads that
            go in a circle, or there is no sentence.
    """
    sentences: list[Sentence] = []
    for start, comments, block in blocks(path, "a CoNLL-U file"):
        for number, fields in block:
            if len(fields) != 10:
                raise ExamplesError(f"{path}:{number} has {len(fields)} columns; CoNLL-U has 10, between tabs")
        words = [(number, fields) for number, fields in block if "." not in fields[0]]
        if any("-" not in fields[0] for _, fields in words):
            sentences.append(_sentence(path, words, comments))
        elif block or "text" in comments:
            raise ExamplesError(f"{path}:{start}: the sentence has no words; give it some, or leave it out")
    if not sentences:
        raise ExamplesError(f"{path} has no sentences; give a CoNLL-U file with dependencies")
    return sentences


def blocks(path: str | Path, what: str, comment: str = "#") -> Iterator[tuple[int, dict[str, str], list[Line]]]:
    """What stands between the empty lines of a file: the line it begins at, its comments by name, and its lines.

    Args:
        what: the file that it should be, in words.
        comment: a regular expression that matches the beginning of a comment.
    Raises:
        ExamplesError: the file cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ExamplesError(f"cannot read {path}: {reason}; give {what} in UTF-8") from None
    start, comments, block = 0, dict[str, str](), list[Line]()
    for number, line in enumerate([*text.split("\n"), ""], 1):
        if not line.strip():
            if start:
                yield start, comments, block
            start, comments, block = 0, {}, []
            continue
        start = start or number
        if re.match(comment, line):
            name, equals, value = line.removeprefix("#").partition("=")
            if equals:
                comments[name.strip()] = value.strip()
        else:
            block.append((number, line.rstrip("\r").split("\t")))


def depths(heads: Sequence[int | None], lines: Sequence[str]) -> tuple[int | None, ...]:
    """How many dependencies each word is from its root, 0 for a root; None where a head on the way is None.

    Args:
        heads: numbers of words, from 0; -1 for a root.
        lines: where each word is, for the error.
    Raises:
        ExamplesError: the heads go in a circle.
    """
    found: list[int | None] = []
    for word in range(len(heads)):
        way: list[int] = []
        at: int | None = word
        while at is not None and at >= 0:
            if at in way:
                raise ExamplesError(
                    f"{lines[at]}: the heads of the words {', '.join(str(i + 1) for i in [*way[way.index(at) :], at])}"
                    " go in a circle; every word must lead to a root, which has the head 0"
                )
            way.append(at)
            at = heads[at]
        found.append(None if at is None else len(way) - 1)
    return tuple(found)


def head_of(value: str, count: int, line: str) -> int | None:
    """A head as a file has it, 0 for a root or the number of a word from 1, as a number from 0; None for ``_``.

    Raises:
        ExamplesError: it is no number from 0 to `count`.
    """
    if value == NOT_SAID:
        return None
    if not re.fullmatch("[0-9]+", value) or int(value) > count:
        raise ExamplesError(f"{line} has the head {value!r}; it must be 0 to {count}, or _ where it is not known")
    return int(value) - 1


def _sentence(path: str | Path, block: list[Line], comments: dict[str, str]) -> Sentence:
    """One sentence, of lines that are words or multi-word tokens."""
    _check_numbers(path, block)
    text = comments.pop("text", None)
    if text is None:
        pieces, inside = list[str](), 0
        for _, fields in block:
            first, _, last = fields[0].partition("-")
            if last or int(first) > inside:
                pieces.append(fields[1] + ("" if "SpaceAfter=No" in fields[9].split("|") else " "))
                inside = int(last or first)
        text = "".join(pieces).strip()
    spans: list[Span | None] = []
    at, within = 0, (0, 0, 0)  # within: the last word and the characters of a multi-word token
    for number, fields in block:
        first, _, last = fields[0].partition("-")
        single = bool(last) or int(first) > within[0]
        start = text.find(fields[1], at, None if single else within[2])
        if single and (start < 0 or text[at:start].strip()):
            raise ExamplesError(
                f"{path}:{number}: {fields[1]!r} does not come after {text[:at]!r} in the sentence's text; correct"
                " the word or the text"
            )
        if last:
            within = (int(last), start, start + len(fields[1]))
            at = start
            continue
        spans.append(None if start < 0 else (start, start + len(fields[1])))
        at = at if start < 0 else start + len(fields[1])
        at = max(at, within[2]) if int(first) == within[0] else at
    words = [(number, fields) for number, fields in block if "-" not in fields[0]]
    lines = [f"{path}:{number}" for number, _ in words]
    heads = [head_of(fields[6], len(words), line) for line, (_, fields) in zip(lines, words, strict=True)]
    return Sentence(
        text,
        tuple(fields[1] for _, fields in words),
        tuple(spans),
        tuple(heads),
        depths(heads, lines),
        tuple(fields[7].split(":")[0] for _, fields in words),
        tuple(fields[3] for _, fields in words),
        tuple(dict(_feats(fields[5])) for _, fields in words),
        comments,
    )


def _feats(field: str) -> Iterator[tuple[str, str]]:
    for one in field.split("|"):
        name, equals, value = one.partition("=")
        if equals:
            yield name, value


def _check_numbers(path: str | Path, block: list[Line]) -> None:
    due = 1
    for number, fields in block:
        first, _, last = fields[0].partition("-")
        whole = re.fullmatch("[0-9]+(-[0-9]+)?", fields[0]) is not None
        if not whole or int(first) != due or (last and int(last) < due):
            raise ExamplesError(f"{path}:{number} has the number {fields[0]!r}; number a sentence's words 1, 2, ...")
        due += not last
        if not fields[1]:
            raise ExamplesError(f"{path}:{number} has no word; write it in the second column")
