"""Sentences: texts whose words are marked and labelled, as probes of words need them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from mechinterp.core.conllu import NOT_SAID, blocks, depths, head_of, read_conllu
from mechinterp.core.examples import Examples, json_lines
from mechinterp.core.tokens import Span
from mechinterp.errors import ExamplesError, OutputError

CATEGORY = "word"
WHERE = ("example", "word_number", "word")
"""The columns of `Sentences.table` that say which word it is."""
DERIVED = ("depth", "head_distance")
FEATS = {"Sing": "sing", "Plur": "plur", "Past": "past", "Pres": "present"}
"""Values of CoNLL-U features and what they are called here; others are in small letters."""


@dataclass(frozen=True)
class Sentences:
    """Texts with the characters of their words, and labels of words and of sentences.

    `mi.tasks.sentences` makes some; `from_conllu`, `from_tsv` and `from_jsonl` read yours. A label is text or a number,
    and None where it is not known or there is none. Some names mean the same wherever they come from:

    - ``pos``: universal part of speech (Petrov et al. 2012), such as ``NOUN``;
    - ``head``: the number of the word's syntactic head in its sentence, from 0, and -1 for a root;
    - ``depth``: dependencies from the root, 0 for a root, and ``head_distance``: the head's number minus the word's,
      negative where the head stands before. Both are made from ``head``;
    - ``relation`` to the head, without subtypes; ``number``, ``sing`` or ``plur``; ``tense``, ``past`` or ``present``.

    Attributes:
        texts: the sentences.
        words: of each text, its words' characters, half-open and in order; None for a word that does not stand in the
            text (*de* and *le* in *du*).
        word_labels: by name, of each text, a label for each word.
        labels: by name, a label for each text.
    Raises:
        ExamplesError: a text without words, a word that is not in its text, or labels that are not as many as words.
    """

    texts: tuple[str, ...]
    words: tuple[tuple[Span | None, ...], ...]
    word_labels: Mapping[str, tuple[tuple[Any, ...], ...]]
    labels: Mapping[str, tuple[Any, ...]]

    def __post_init__(self) -> None:
        n = len(self.texts)
        if n == 0:
            raise ExamplesError("Sentences must hold at least one text. Got none")
        columns = {"words": self.words, **self.word_labels}
        for name, column in [*columns.items(), *self.labels.items()]:
            if name in WHERE:
                raise ExamplesError(f"the name {name!r} is taken; call this label something else")
            if len(column) != n:
                raise ExamplesError(f"{name} has {len(column)} entries for {n} texts; give one for each text")
        for i, (text, words) in enumerate(zip(self.texts, self.words, strict=True)):
            _check(f"sentence {i}", text, words, {name: column[i] for name, column in self.word_labels.items()})

    def __len__(self) -> int:
        return len(self.texts)

    @classmethod
    def from_conllu(cls, path: str | Path) -> "Sentences":
        """A CoNLL-U file: ``pos`` (UPOS), ``head``, ``relation``, ``number`` and ``tense`` as far as it has them.

        ``tense`` is that of finite verbs: a participle has none. Comments ``# name = value`` are labels of sentences.

        Raises:
            ExamplesError: the file cannot be read or a line is not as the format says; names file and line.
        """
        rows: list[_Row] = []
        for one in read_conllu(path):
            columns = {
                "pos": [_said(p) for p in one.pos],
                **tree(one.heads, one.depths),
                "relation": [_said(r) for r in one.relations],
                "number": [_feature(f.get("Number")) for f in one.feats],
                "tense": [_feature(f.get("Tense")) if f.get("VerbForm", "Fin") == "Fin" else None for f in one.feats],
            }
            rows.append(_Row(one.text, one.spans, columns, one.comments))
        return _sentences(rows)

    @classmethod
    def from_tsv(cls, path: str | Path) -> "Sentences":
        """A word a line, fields between tabs, and an empty line after each sentence; the first line has names.

        The column ``word`` has the words; the others are labels of words, ``_`` or empty where there is none. ``head``
        is as in CoNLL-U: 0 for a root, or the number of a word of the sentence, from 1. Lines ``# name = value`` before
        a sentence are its labels, but for ``# text = ``: the sentence as it is written, and else its words with
        spaces between. A label that is written as a number wherever it is known is a number.

        Raises:
            ExamplesError: a column is missing, or a word not in the text; names file, line and what to correct.
        """
        names: list[str] | None = None
        rows: list[_Row] = []
        for start, comments, block in blocks(path, "a TSV file with a word a line", comment="#[^\t]*$"):
            if names is None and block:
                first, names = block.pop(0)
                if "word" not in names or len(set(names)) < max(2, len(names)):
                    raise ExamplesError(
                        f"{path}:{first}: the first line must name the columns, between tabs and each once, one of them"
                        f" 'word' and the others labels. Got {names}"
                    )
            if not block and "text" in comments:
                raise ExamplesError(f"{path}:{start}: the sentence has no words; give it some, or leave it out")
            if not block or names is None:
                continue
            for number, fields in block:
                if len(fields) != len(names):
                    raise ExamplesError(
                        f"{path}:{number} has {len(fields)} columns where the first line has {len(names)}"
                        f" ({', '.join(names)}); write _ for a label that is not known"
                    )
            table = {name: [fields[i] for _, fields in block] for i, name in enumerate(names)}
            forms, lines = table.pop("word"), [f"{path}:{number}" for number, _ in block]
            text = comments.pop("text", " ".join(forms))
            columns = {name: [_said(label) for label in column] for name, column in table.items()}
            rows.append(_Row(text, _find(text, forms, lines), _with_tree(columns, lines), comments))
        if not rows:
            raise ExamplesError(f"{path} has no sentences; give it a line with names, and then a word a line")
        return _sentences(rows)

    @classmethod
    def from_jsonl(cls, path: str | Path) -> "Sentences":
        """One JSON object a line: ``{"text": "Dogs bark.", "words": ["Dogs", "bark"], "pos": ["NOUN", "VERB"]}``.

        ``words`` are all words of the text in order, with or without punctuation, or ``[start, stop]`` of those that
        are labelled, in characters and half-open. Other lists are labels of these words, and what is no list is a
        label of the sentence; null where there is none. ``head`` is as in CoNLL-U: 0 for a root, or the number of a
        word, from 1. Without ``text``, it is the words with spaces between.

        Raises:
            ExamplesError: a key is missing, or a word not in the text; names file, line and what to correct.
        """
        rows: list[_Row] = []
        lists: dict[str, bool] = {}
        for number, row in json_lines(path):
            line = f"{path}:{number}"
            if not isinstance(row.get("words"), list) or not row["words"]:
                raise ExamplesError(f"{line}: the sentence has no words; give a list of words, or of [start, stop]")
            here = {name: isinstance(value, list) for name, value in row.items()}
            lists = lists or here
            if gone := sorted(lists.keys() ^ here.keys()):
                raise ExamplesError(
                    f"{line}: {gone[0]!r} is in some lines and in others not; give every line the same keys, with null"
                    " for a label that is not known"
                )
            if odd := [name for name in lists if lists[name] != here[name]]:
                raise ExamplesError(
                    f"{line}: {odd[0]!r} is a list in some lines and in others not; give a list to label words, or one"
                    " value to label the sentence"
                )
            rows.append(_json_row(row, line))
        return _sentences(rows)

    def to_conllu(self, path: str | Path) -> None:
        """Write ``pos``, ``head``, ``relation``, ``number`` and ``tense`` as CoNLL-U, for `SyntacticHeads` say.

        Labels of sentences are comments; other labels of words have no column there and are left out.

        Raises:
            OutputError: the file cannot be written, or a sentence has a tab, a line break, or a word not in its text.
        """
        out: list[str] = []
        for i, (text, words) in enumerate(zip(self.texts, self.words, strict=True)):
            lines = [f"# text = {text}"]
            lines += [f"# {name} = {column[i]}" for name, column in self.labels.items() if column[i] is not None]
            if None in words or any(re.search(r"[\t\n\r]", line) for line in lines):
                raise OutputError(
                    f"sentence {i} has a tab, a line break, or a word that is not in its text, which cannot be written"
                    " as CoNLL-U; leave it out"
                )
            out += [*lines, *self._conllu(i), ""]
        try:
            Path(path).write_text("\n".join([*out, ""]), encoding="utf-8")
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror}; name a file in a folder that is there") from None

    def _conllu(self, row: int) -> list[str]:
        """The lines of one sentence."""
        spans = [span for span in self.words[row] if span is not None]
        blank = [None] * len(spans)
        columns = (
            self.word_labels[name][row] if name in self.word_labels else blank
            for name in ("pos", "head", "relation", "number", "tense")
        )
        out: list[str] = []
        for i, (span, pos, head, relation, number, tense) in enumerate(zip(spans, *columns, strict=True)):
            feats = [] if number is None else [f"Number={_unfeature(number)}"]
            feats += [] if tense is None else [f"Tense={_unfeature(tense)}", "VerbForm=Fin"]
            close = i + 1 < len(spans) and spans[i + 1][0] == span[1]
            fields = (
                i + 1, self.texts[row][slice(*span)], None, pos, None, "|".join(feats) or None,
                None if head is None else head + 1, relation, None, "SpaceAfter=No" if close else None,
            )  # fmt: skip
            out.append("\t".join(NOT_SAID if field is None else str(field) for field in fields))
        return out

    def examples(self, label: str | None = None) -> Examples:
        """The texts as examples with the word category ``"word"``, which has every word that stands in its text.

        Args:
            label: of sentences; becomes the examples' labels.
        Raises:
            ExamplesError: there is no such label.
        """
        labels = None if label is None else _named(label, self.labels, "sentences")
        words = [[span for span in row if span is not None] for row in self.words]
        return Examples.of(self.texts, labels).with_category(CATEGORY, words)

    @property
    def forms(self) -> tuple[str, ...]:
        """Every word that stands in its text, as it is written there, in the order of `column`."""
        return tuple(self.texts[i][slice(*span)] for i, _, span in self._placed())

    @property
    def unplaced(self) -> int:
        """Words that do not stand in their text, which no example has: *de* and *le* of *du*."""
        return sum(span is None for row in self.words for span in row)

    def first(self, n: int) -> "Sentences":
        """The first n of them."""
        word_labels, labels = (
            {name: column[:n] for name, column in some.items()} for some in (self.word_labels, self.labels)
        )
        return Sentences(self.texts[:n], self.words[:n], word_labels, labels)

    def column(self, name: str) -> tuple[Any, ...]:
        """A label of every word that stands in its text: one for each span of the category ``"word"``, in its order.

        Raises:
            ExamplesError: there is no such label.
        """
        column = _named(name, self.word_labels, "words")
        return tuple(column[i][j] for i, j, _ in self._placed())

    def table(self) -> pd.DataFrame:
        """Every word that stands in its text: ``example``, ``word_number``, ``word``, and its labels, NaN for None."""
        where = [(i, j) for i, j, _ in self._placed()]
        columns = dict(zip(WHERE, ([i for i, _ in where], [j for _, j in where], self.forms), strict=True))
        return pd.DataFrame({**columns, **{name: self.column(name) for name in self.word_labels}})

    def _placed(self) -> list[tuple[int, int, Span]]:
        return [(i, j, span) for i, row in enumerate(self.words) for j, span in enumerate(row) if span is not None]


@dataclass(frozen=True)
class _Row:
    """A sentence as it is read."""

    text: str
    spans: Sequence[Span | None]
    columns: Mapping[str, Sequence[Any]]
    labels: Mapping[str, Any]


def _sentences(rows: Sequence[_Row]) -> Sentences:
    """Rows as sentences; a label that is nowhere known is left out."""
    word_labels: dict[str, tuple[tuple[Any, ...], ...]] = {}
    for name in dict.fromkeys(name for row in rows for name in row.columns):
        flat = iter(_typed([label for row in rows for label in row.columns[name]]))
        column = tuple(tuple(next(flat) for _ in row.spans) for row in rows)
        if any(label is not None for labels in column for label in labels):
            word_labels[name] = column
    labels = {
        name: tuple(_typed([row.labels.get(name) for row in rows]))
        for name in dict.fromkeys(name for row in rows for name in row.labels)
    }
    return Sentences(
        tuple(row.text for row in rows),
        tuple(tuple(row.spans) for row in rows),
        word_labels,
        {name: column for name, column in labels.items() if any(label is not None for label in column)},
    )


def _json_row(row: dict[str, Any], line: str) -> _Row:
    words = row.pop("words")
    spans: Sequence[Span | None]
    if all(isinstance(word, str) for word in words):
        text = row.pop("text", " ".join(words))
        if not isinstance(text, str):
            raise ExamplesError(f'{line}: "text" must be text. Got {text!r:.60}')
        spans = _find(text, words, [line] * len(words))
    elif all(isinstance(word, list) and [type(i) for i in word] == [int, int] for word in words):
        text = row.pop("text", None)
        if not isinstance(text, str):
            raise ExamplesError(f'{line}: words are [start, stop] of "text", which must be text. Got {text!r:.60}')
        spans = [(start, stop) for start, stop in words]
    else:
        raise ExamplesError(f'{line}: "words" must be all text, or all [start, stop]. Got {words!r:.60}')
    columns = {name: value for name, value in row.items() if isinstance(value, list)}
    _check(line, text, spans, columns)
    if "head" in columns:
        columns["head"] = [None if head is None else str(head) for head in columns["head"]]
    return _Row(
        text,
        spans,
        _with_tree(columns, [line] * len(words)),
        {name: value for name, value in row.items() if name not in columns},
    )


def _find(text: str, forms: Sequence[str], lines: Sequence[str]) -> list[Span]:
    """The characters of all words of a text, in order; nothing with letters or digits may be left out.

    Raises:
        ExamplesError: they are not the text's words; `lines` says where each is.
    """
    spans: list[Span] = []
    at = 0
    for form, line in zip(forms, lines, strict=True):
        start = text.find(form, at)
        if not form.strip() or start < 0 or _has_letters(text[at:start]):
            raise ExamplesError(
                f"{line}: the word {form!r} does not come after {text[:at]!r} in the text {text!r}; write all of its"
                " words, as it has them"
            )
        at = start + len(form)
        spans.append((start, at))
    if _has_letters(text[at:]):
        raise ExamplesError(f"{lines[-1]}: {text[at:]!r} of the text {text!r} is no word; write all of its words")
    return spans


def _has_letters(text: str) -> bool:
    return any(c.isalnum() for c in text)


def _check(where: str, text: str, words: Sequence[Span | None], columns: Mapping[str, Sequence[Any]]) -> None:
    """Words in their text, one after the other, and as many labels; raises with `where` the sentence is."""
    if not words:
        raise ExamplesError(f"{where}: the sentence has no words; give it some, or leave it out")
    at = 0
    for number, span in enumerate(words):
        if span is None:
            continue
        if not at <= span[0] < span[1] <= len(text) or not text[slice(*span)].strip():
            raise ExamplesError(
                f"{where}: word {number} is at {list(span)}, which is not in the text of {len(text)} characters, after"
                f" the word before it: {text!r}; correct [start, stop]"
            )
        at = span[1]
    for name, column in columns.items():
        if len(column) != len(words):
            raise ExamplesError(
                f"{where}: {name} has {len(column)} labels for {len(words)} words; give one for each word, None or"
                " null where it is not known"
            )


def _with_tree(columns: Mapping[str, Sequence[Any]], lines: Sequence[str]) -> Mapping[str, Sequence[Any]]:
    """Columns of a file with its heads as numbers from 0, and what follows from them."""
    if "head" not in columns:
        return columns
    if given := [name for name in DERIVED if name in columns]:
        raise ExamplesError(f"{lines[0]}: {given[0]} is made from head; leave it out, or call it something else")
    values = zip(columns["head"], lines, strict=True)
    heads = [head_of(NOT_SAID if value is None else value, len(lines), line) for value, line in values]
    return {**columns, **tree(heads, depths(heads, lines))}


def tree(heads: Sequence[int | None], found: Sequence[int | None]) -> dict[str, Sequence[int | None]]:
    """Labels of words that their heads give, from the numbers of these and from `depths`."""
    distances = [None if head is None or head < 0 else head - i for i, head in enumerate(heads)]
    return {"head": heads, **dict(zip(DERIVED, (found, distances), strict=True))}


def _typed(column: Sequence[Any]) -> Iterable[Any]:
    """Text that is a number wherever it is known, as numbers."""
    known = [label for label in column if label is not None]
    if not known or not all(isinstance(v, str) and re.fullmatch(r"[+-]?\d+(\.\d+)?", v) for v in known):
        return column
    kind = float if any("." in label for label in known) else int
    return [None if label is None else kind(label) for label in column]


def _said(label: str) -> str | None:
    return None if label in ("", NOT_SAID) else label


def _feature(value: str | None) -> str | None:
    return None if value is None else FEATS.get(value, value.lower())


def _unfeature(value: Any) -> str:
    return {here: there for there, here in FEATS.items()}.get(str(value), str(value).capitalize())


def _named(name: str, known: Mapping[str, Any], what: str) -> Any:
    if name not in known:
        raise ExamplesError(f"these {what} have no label {name!r}; theirs are {', '.join(known) or 'none'}")
    return known[name]
