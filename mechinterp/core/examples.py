"""Examples: what a person wants to run.

`Examples` knows no tokenizer, so one object serves every model; `Examples.tokenize` makes `Tokens`.
"""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from mechinterp.core.display import ROWS, count, html_table, visible
from mechinterp.core.tokens import Span, Tokens
from mechinterp.core.vocabulary import Vocabulary
from mechinterp.errors import AlignmentError, ExamplesError

AnswerSet: TypeAlias = tuple[str | int, ...]


@dataclass(frozen=True)
class Chat:
    """One conversation, rendered by the tokenizer's chat template when it is tokenized."""

    messages: tuple[tuple[str, str], ...]
    """(role, content) in order."""
    add_generation_prompt: bool = True


Text: TypeAlias = str | tuple[int, ...] | Chat


@dataclass(frozen=True)
class Examples:
    """Texts, with what is known about them. Build with `of`, `pairs`, `chat` or `from_*`.

    An example is a string, a tuple of token ids, or a `Chat`. Spans are half-open; in strings they
    count characters, in token ids tokens, in a chat the characters of its contents, joined by line breaks, wherever
    the template puts these. A name in `positions` means one token, the last of its
    span; a name in `spans` means every token that the span touches.
    """

    texts: tuple[Text, ...]
    corrupted: tuple[Text, ...] | None = None
    answers: tuple[tuple[AnswerSet, ...], ...] | None = None
    """Per example: the right answers and, optionally, the wrong ones, each a set of single tokens."""
    labels: tuple[Any, ...] | None = None
    positions: Mapping[str, tuple[Span, ...]] = field(default_factory=dict)
    spans: Mapping[str, tuple[Span, ...]] = field(default_factory=dict)
    categories: Mapping[str, tuple[tuple[Span, ...], ...]] = field(default_factory=dict)
    """Word categories: for each text any number of spans."""

    def __post_init__(self) -> None:
        n = len(self.texts)
        columns = {"corrupted": self.corrupted, "answers": self.answers, "labels": self.labels}
        columns |= {f"positions[{k!r}]": v for k, v in self.positions.items()}
        columns |= {f"spans[{k!r}]": v for k, v in self.spans.items()}
        columns |= {f"categories[{k!r}]": v for k, v in self.categories.items()}
        for name, column in columns.items():
            if column is not None and len(column) != n:
                raise ExamplesError(f"{name} has {len(column)} entries for {n} texts; give one for each text")
        if self.answers is not None and len({len(sides) for sides in self.answers}) > 1:
            raise ExamplesError(
                "some examples have wrong answers and some have none; give (right, wrong) for all, or for none"
            )
        if n == 0:
            raise ExamplesError("Examples must hold at least one text. Got none")
        if both := set(self.positions) & set(self.spans) | {"end", "all"} & {*self.positions, *self.spans}:
            raise ExamplesError(f"the names {sorted(both)} are taken; give each position and span its own name")

    def __hash__(self) -> int:
        return hash((self.texts, self.corrupted, self.answers))

    def __len__(self) -> int:
        return len(self.texts)

    @classmethod
    def of(
        cls,
        texts: str | Sequence[Any],
        labels: Sequence[Any] | None = None,
        answers: Sequence[Any] | None = None,
        positions: Mapping[str, Sequence[Span]] | None = None,
        spans: Mapping[str, Sequence[Span]] | None = None,
    ) -> "Examples":
        """Texts (strings or lists of token ids), one example each.

        Args:
            answers: for each text ``right`` or ``(right, wrong)``; each side is one answer or a list of
                them. An answer is a token id or the string as it continues the text (``" Paris"``).
        """
        many = (texts,) if isinstance(texts, str) else tuple(_text(t) for t in texts)
        return cls(
            many,
            None,
            None if answers is None else tuple(_answer(a) for a in answers),
            None if labels is None else tuple(labels),
            {name: tuple(column) for name, column in (positions or {}).items()},
            {name: tuple(column) for name, column in (spans or {}).items()},
        )

    @classmethod
    def pairs(
        cls,
        clean: Sequence[Any],
        corrupted: Sequence[Any],
        answers: Sequence[Any] | None = None,
        positions: Mapping[str, Sequence[Span]] | None = None,
        spans: Mapping[str, Sequence[Span]] | None = None,
        labels: Sequence[Any] | None = None,
    ) -> "Examples":
        """Clean and corrupted prompts, which must have the same number of tokens, pair by pair."""
        one = cls.of(clean, labels, answers, positions, spans)
        return cls(one.texts, tuple(_text(t) for t in corrupted), one.answers, one.labels, one.positions, one.spans)

    @classmethod
    def chat(
        cls,
        conversations: Sequence[Sequence[Mapping[str, str]]],
        labels: Sequence[Any] | None = None,
        answers: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
    ) -> "Examples":
        """Conversations as lists of ``{"role": ..., "content": ...}``; no second BOS is ever added."""
        if not all(isinstance(m, Mapping) for messages in conversations for m in messages):
            raise ExamplesError('a conversation must be a list of {"role": ..., "content": ...}. Got something else')
        chats = [
            Chat(tuple((m["role"], m["content"]) for m in messages), add_generation_prompt)
            for messages in conversations
        ]
        return cls.of(chats, labels, answers)

    @classmethod
    def from_dataset(cls, rows: Iterable[Mapping[str, Any]]) -> "Examples":
        """Rows with ``text`` (or ``clean`` and ``corrupted``) and, optionally, ``answer``, ``wrong``,
        ``label`` and ``subject``: dictionaries, a Hugging Face dataset, or anything that yields them.

        A subject becomes the span ``subject`` of the (clean) text: a string that occurs in it exactly
        once, or ``[start, stop]``, half-open, in characters (of token ids, in tokens).

        Raises:
            ExamplesError: a row lacks a column that others have, or its subject is not in the text, or
                there several times.
        """
        table = [dict(row) for row in rows]
        columns: set[str] = set[str]().union(*(row.keys() for row in table)) if table else set()
        text = "clean" if "clean" in columns else "text"
        for i, row in enumerate(table):
            needed = {text, *(columns & {"corrupted", "answer", "wrong", "label", "subject"})}
            if gone := {name for name in needed if row.get(name) is None}:
                raise ExamplesError(f"row {i} lacks {sorted(gone)}; every row needs the same columns, {text!r} first")
        answers = None
        if "answer" in columns:
            answers = [(r["answer"], r["wrong"]) if "wrong" in columns else r["answer"] for r in table]
        texts = [row[text] for row in table]
        labels = [row["label"] for row in table] if "label" in columns else None
        spans = None
        if "subject" in columns:
            spans = {"subject": [_subject(row["subject"], row[text], i) for i, row in enumerate(table)]}
        if "corrupted" in columns:
            return cls.pairs(texts, [row["corrupted"] for row in table], answers, spans=spans, labels=labels)
        return cls.of(texts, labels, answers, spans=spans)

    @classmethod
    def from_jsonl(cls, path: str | Path) -> "Examples":
        """One JSON object a line, with the keys of `from_dataset`."""
        return cls.from_dataset(row for _, row in json_lines(path))

    @classmethod
    def from_csv(cls, path: str | Path) -> "Examples":
        """A CSV file with a header line, with the columns of `from_dataset`."""
        return cls.from_dataset(csv.DictReader(io.StringIO(_read(path), newline="")))

    def categorize(self, vocabulary: Vocabulary) -> "Examples":
        """The same examples with the vocabulary's categories, found in their texts, beside those that they have.

        Raises:
            ExamplesError: a category that matches nothing in any text, a name that is taken, or an
                example of token ids, which has no words.
        """
        found: list[dict[str, tuple[Span, ...]]] = []
        for i, text in enumerate(self.texts):
            if isinstance(text, tuple):
                raise ExamplesError(
                    f"example {i} is token ids, which have no words; give their spans with with_category(name, spans)"
                )
            spans = {name: list[Span]() for name in vocabulary.names}
            start = 0
            for part in [text] if isinstance(text, str) else [content for _, content in text.messages]:
                for name, some in vocabulary.find(part).items():
                    spans[name] += [(start + a, start + b) for a, b in some]
                start += len(part) + 1
            found.append({name: tuple(some) for name, some in spans.items()})
        if empty := [name for name in vocabulary.names if not any(one[name] for one in found)]:
            raise ExamplesError(
                f"the categories {empty} match nothing in any of the {len(self)} texts; correct their terms"
                " (whole words, in any case unless case_sensitive), or leave them out"
            )
        out = self
        for name in vocabulary.names:
            out = out.with_category(name, [one[name] for one in found])
        return out

    def with_category(self, name: str, spans: Sequence[Sequence[Span]]) -> "Examples":
        """The same examples with one more word category: for each text any number of half-open spans.

        Raises:
            ExamplesError: the name is taken, no text has a span, or there are not as many entries as texts.
        """
        if name in self.categories:
            raise ExamplesError(f"there already is a category {name!r}; give this one a name of its own")
        if not any(len(some) for some in spans):
            raise ExamplesError(f"the category {name!r} has no span in any text; give some, or leave it out")
        column = tuple(tuple((int(a), int(b)) for a, b in some) for some in spans)
        return replace(self, categories={**self.categories, name: column})

    def tokenize(self, tokenizer: Any, context: int | None = None, labels: Mapping[str, int] | None = None) -> "Tokens":
        """Token ids for every example.

        Args:
            tokenizer: a Hugging Face tokenizer; may be None when all examples are token ids.
            context: the longest prompt the model takes, in tokens.
            labels: of a classifier: then answers are labels, by name or number.
        Raises:
            ExamplesError: an empty or too long prompt, an answer of several tokens, a span without tokens.
            AlignmentError: clean and corrupted prompts of different length.
        """
        encoded = [encode(text, tokenizer, f"example {i}", context) for i, text in enumerate(self.texts)]
        corrupted = None
        if self.corrupted is not None:
            corrupted = [
                encode(t, tokenizer, f"corrupted example {i}", context)[0] for i, t in enumerate(self.corrupted)
            ]
            for i, (a, b) in enumerate(zip(encoded, corrupted, strict=True)):
                if len(a[0]) != len(b):
                    raise AlignmentError(
                        f"clean and corrupted prompt of example {i} have {len(a[0])} and {len(b)} tokens;"
                        " reword one so that they align token by token"
                    )
        answers = None
        if self.answers is not None:
            answers = tuple(
                tuple(
                    tuple(
                        dict.fromkeys(
                            _answer_id(a, text, ids, tokenizer, i) if labels is None else _label_id(a, labels, i)
                            for a in side
                        )
                    )
                    for side in sides
                )
                for i, (text, (ids, _), sides) in enumerate(zip(self.texts, encoded, self.answers, strict=True))
            )

        def locate(name: str, spans: tuple[Span, ...]) -> tuple[Span, ...]:
            rows = zip(spans, encoded, self.texts, strict=True)
            return tuple(
                _span(name, i, _rendered((s,), text, tokenizer, i)[0], *e, text) for i, (s, e, text) in enumerate(rows)
            )

        def members(name: str, column: tuple[tuple[Span, ...], ...]) -> tuple[tuple[Span, ...], ...]:
            rows = zip(column, encoded, self.texts, strict=True)
            return tuple(
                tuple(_span(name, i, s, *e, text) for s in (_rendered(some, text, tokenizer, i) if some else ()))
                for i, (some, e, text) in enumerate(rows)
            )

        pad = getattr(tokenizer, "pad_token_id", None)
        return Tokens(
            tuple(ids for ids, _ in encoded),
            None if corrupted is None else tuple(corrupted),
            answers,
            {name: tuple(stop - 1 for _, stop in locate(name, s)) for name, s in self.positions.items()},
            {name: locate(name, s) for name, s in self.spans.items()},
            self.labels,
            0 if pad is None else pad,
            {name: members(name, c) for name, c in self.categories.items()},
        )

    def _repr_html_(self) -> str:
        columns: dict[str, Sequence[Any]] = {"example": range(len(self)), "text": self.texts}
        if self.corrupted is not None:
            columns["corrupted"] = self.corrupted
        if self.answers is not None:
            columns["right"] = [sides[0] for sides in self.answers]
            if len(self.answers[0]) > 1:
                columns["wrong"] = [sides[1] for sides in self.answers]
        if self.labels is not None:
            columns["label"] = self.labels
        show = {"text": _shown_text, "corrupted": _shown_text, "right": _shown_answers, "wrong": _shown_answers}
        rows = [
            [show[name](column[i]) if name in show else column[i] for name, column in columns.items()]
            for i in range(min(len(self), ROWS))
        ]
        names = [f"{what} {', '.join(held)}" for what, held in (("positions", self.positions), ("spans", self.spans))]
        named = [n for n, held in zip(names, (self.positions, self.spans), strict=True) if held]
        return html_table(
            list(columns), rows, "; ".join([count(len(self), "example"), *named]), max(0, len(self) - ROWS)
        )


def _shown_text(text: Text) -> str:
    if isinstance(text, Chat):
        text = "\n".join(f"{role}: {content}" for role, content in text.messages)
    return visible(text if isinstance(text, str) else " ".join(map(str, text)), 200, spaces=False)


def _shown_answers(answers: AnswerSet) -> str:
    return ", ".join(visible(str(a)) for a in answers)


def _text(text: Any) -> Text:
    if hasattr(text, "tolist"):  # a tensor or an array
        text = text.tolist()
    if isinstance(text, str | Chat):
        return text
    if isinstance(text, Sequence) and all(isinstance(i, int) for i in text):
        return tuple(text)
    raise ExamplesError(f"an example must be a string or token ids. Got {type(text).__name__}")


def _answer(answer: Any) -> tuple[AnswerSet, ...]:
    """``right``, ``(right, wrong)``; each side one answer or a list or set of them."""
    sides = answer if isinstance(answer, tuple) else (answer,)
    if not 1 <= len(sides) <= 2:
        raise ExamplesError(f"an answer must be right or (right, wrong). Got a tuple of {len(sides)}")
    out = tuple((s,) if isinstance(s, str | int) else tuple(sorted(s, key=str)) for s in sides)
    if not all(out):
        raise ExamplesError("an answer set must hold at least one answer. Got an empty one")
    return out


def _read(path: str | Path) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ExamplesError(f"cannot read {path}: {reason}; give a text file of examples") from None
    if not text.strip():
        raise ExamplesError(f"{path} is empty; give it one example a line")
    return text


def json_lines(path: str | Path) -> list[tuple[int, dict[str, Any]]]:
    """The objects of a JSONL file, each with the number of its line.

    Raises:
        ExamplesError: the file cannot be read or is empty, or a line is no JSON object.
    """
    rows: list[tuple[int, dict[str, Any]]] = []
    for number, line in enumerate(_read(path).split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ExamplesError(f"{path}:{number} is not JSON ({error.msg}); write one object a line") from None
            if not isinstance(row, dict):
                raise ExamplesError(f'{path}:{number} is not an object; write {{"text": ...}}')
            rows.append((number, row))
    return rows


def _subject(subject: Any, text: Any, row: int) -> Span:
    """Where a row's subject is in its text."""
    if isinstance(subject, Sequence) and not isinstance(subject, str) and list(map(type, subject)) == [int, int]:
        if not 0 <= subject[0] < subject[1] <= len(text):
            raise ExamplesError(f"the subject of row {row} is {list(subject)}, outside its text of length {len(text)}")
        return subject[0], subject[1]
    if not isinstance(subject, str) or not subject or not isinstance(text, str):
        raise ExamplesError(
            f"the subject of row {row} must be a part of its text, or [start, stop]. Got {subject!r} for {text!r}"
        )
    starts = [i for i in range(len(text)) if text.startswith(subject, i)]
    if len(starts) != 1:
        found = "does not occur" if not starts else f"occurs {len(starts)} times, at {starts},"
        fix = "spell it as the text does, or leave the column out" if not starts else "give [start, stop] in characters"
        raise ExamplesError(f"the subject {subject!r} of row {row} {found} in {text!r}; {fix}")
    return starts[0], starts[0] + len(subject)


def encode(text: Text, tokenizer: Any, name: str, context: int | None) -> tuple[tuple[int, ...], list[Span] | None]:
    """Token ids and, for strings from fast tokenizers, the characters each token covers."""
    offsets: list[Span] | None = None
    if isinstance(text, tuple):
        ids = text
    elif tokenizer is None:
        raise ExamplesError(
            f"{name} is text, and this model has no tokenizer; give token ids, or load with a tokenizer"
        )
    else:
        special = True
        if isinstance(text, Chat):
            if not getattr(tokenizer, "chat_template", None):
                raise ExamplesError(f"{name} is a chat, and this tokenizer has no chat template; give its text")
            text = _render(text.messages, text, tokenizer)
            special = False
        elif tokenizer.bos_token and text.startswith(tokenizer.bos_token):
            special = False
        if not text:
            raise ExamplesError(f"{name} is empty; give at least one token")
        fast = bool(getattr(tokenizer, "is_fast", False))
        # The pipeline may warn about length; the check below is ours.
        out = tokenizer(text, add_special_tokens=special, return_offsets_mapping=fast, verbose=False)
        ids, offsets = tuple(out["input_ids"]), [tuple(o) for o in out["offset_mapping"]] if fast else None
    if not ids:
        raise ExamplesError(f"{name} is empty; give at least one token")
    if context is not None and len(ids) > context:
        raise ExamplesError(f"{name} has {len(ids)} tokens, more than the model's context of {context}; shorten it")
    return ids, offsets


def _render(messages: Iterable[tuple[str, str]], chat: Chat, tokenizer: Any) -> str:
    """A conversation as the tokenizer's template writes it, with `messages` for its own."""
    content = [{"role": role, "content": content} for role, content in messages]
    return str(tokenizer.apply_chat_template(content, tokenize=False, add_generation_prompt=chat.add_generation_prompt))


_MARKS = "\ue000\ue001"
"""Of Unicode's private use: they stand around a chat's contents to see where the template puts these."""


def _rendered(spans: tuple[Span, ...], text: Text, tokenizer: Any, row: int) -> tuple[Span, ...]:
    """Spans that count characters of a chat's contents, as characters of what the template makes of it."""
    if not isinstance(text, Chat):
        return spans
    contents = [content for _, content in text.messages]
    marked = [c.replace(c.strip(), _MARKS[0] + c.strip() + _MARKS[1], 1) if c.strip() else c for c in contents]
    plain = _render(text.messages, text, tokenizer)
    out = _render(((role, c) for (role, _), c in zip(text.messages, marked, strict=True)), text, tokenizer)
    where: list[int] = []  # for each character of the contents its place in the rendered text
    at = 0
    whole = out.replace(_MARKS[0], "").replace(_MARKS[1], "") == plain
    for content in contents:
        core = content.strip()
        if core:
            at = out.find(_MARKS[0], at) + 1
            whole = whole and at > 0 and out.startswith(core + _MARKS[1], at)
        first = at - out.count(_MARKS[0], 0, at) - out.count(_MARKS[1], 0, at)
        lead = len(content) - len(content.lstrip())
        where += [first + min(max(i - lead, 0), len(core)) for i in range(len(content) + 1)]
    if not whole:
        raise ExamplesError(
            f"the chat template changes or moves the contents of example {row}, so its spans and the words"
            " of its categories cannot be found in it; give the rendered text as a string"
        )
    if bad := [span for span in spans if not 0 <= span[0] < span[1] < len(where)]:
        raise ExamplesError(f"the span {bad[0]} is outside the contents of example {row}; count their characters")
    return tuple((where[a], where[b]) for a, b in spans)


def _answer_id(answer: str | int, text: Text, ids: tuple[int, ...], tokenizer: Any, row: int) -> int:
    if isinstance(answer, int):
        return answer
    if tokenizer is None:
        raise ExamplesError(f"the answer {answer!r} is text, and this model has no tokenizer; give its token id")

    def encode(string: str) -> list[int]:
        return list(tokenizer(string, add_special_tokens=False, verbose=False)["input_ids"])

    tokens = encode(answer)
    if isinstance(text, str):  # as it continues the prompt, where the tokenizer keeps the prompt's tokens
        longer = list(tokenizer(text + answer, verbose=False)["input_ids"])
        if tuple(longer[: len(ids)]) == ids:
            tokens = longer[len(ids) :]
    if len(tokens) != 1:
        hint = (
            f"write {' ' + answer!r}" if len(encode(" " + answer)) == 1 else "give its first token, or another answer"
        )
        pieces = tokenizer.convert_ids_to_tokens(tokens)
        raise ExamplesError(f"the answer {answer!r} of example {row} is {len(tokens)} tokens {pieces}; {hint}")
    return int(tokens[0])


def _label_id(answer: str | int, labels: Mapping[str, int], row: int) -> int:
    if isinstance(answer, int):
        return answer
    if answer not in labels:
        raise ExamplesError(f"the answer {answer!r} of example {row} is none of the labels {', '.join(labels)}")
    return labels[answer]


def _span(name: str, row: int, span: Span, ids: tuple[int, ...], offsets: list[Span] | None, text: Text) -> Span:
    """Characters to tokens: every token that the span touches."""
    if offsets is None:
        if isinstance(text, str | Chat):
            raise ExamplesError(
                f"{name!r} of example {row} counts characters, which needs a fast tokenizer; give token ids"
            )
        if not 0 <= span[0] < span[1] <= len(ids):
            raise ExamplesError(f"{name!r} of example {row} is {span}, outside its {len(ids)} tokens")
        return span
    touched = [i for i, (a, b) in enumerate(offsets) if a < span[1] and b > span[0] and b > a]
    if not touched:
        raise ExamplesError(f"{name!r} of example {row}, characters {span}, covers no token; check the span")
    return touched[0], touched[-1] + 1
