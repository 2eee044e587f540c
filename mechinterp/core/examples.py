"""Examples: what a person wants to run. Tokens and TokenBatch: the same, as aligned token ids.

`Examples` knows no tokenizer, so one object serves every model. `Examples.tokenize` makes `Tokens`
(all rows, Python lists), and `Tokens.batch` makes a `TokenBatch` (some rows, padded tensors), which
is what analyzers and metrics see. Positions are always counted in an example's own tokens, from its
first real one, so padding on either side changes nothing.
"""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.errors import AlignmentError, ExamplesError
from mechinterp.shapes import TokenIds
from mechinterp.sites import Position

Span: TypeAlias = tuple[int, int]
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
    count characters, in token ids tokens. A name in `positions` means one token, the last of its
    span; a name in `spans` means every token that the span touches.
    """

    texts: tuple[Text, ...]
    corrupted: tuple[Text, ...] | None = None
    answers: tuple[tuple[AnswerSet, ...], ...] | None = None
    """Per example: the right answers and, optionally, the wrong ones, each a set of single tokens."""
    labels: tuple[Any, ...] | None = None
    positions: Mapping[str, tuple[Span, ...]] = field(default_factory=dict)
    spans: Mapping[str, tuple[Span, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = len(self.texts)
        columns = {"corrupted": self.corrupted, "answers": self.answers, "labels": self.labels}
        columns |= {f"positions[{k!r}]": v for k, v in self.positions.items()}
        columns |= {f"spans[{k!r}]": v for k, v in self.spans.items()}
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
        chats = [
            Chat(tuple((m["role"], m["content"]) for m in messages), add_generation_prompt)
            for messages in conversations
        ]
        return cls.of(chats, labels, answers)

    @classmethod
    def from_dataset(cls, rows: Iterable[Mapping[str, Any]]) -> "Examples":
        """Rows with ``text`` (or ``clean`` and ``corrupted``) and, optionally, ``answer``,
        ``wrong`` and ``label``: dictionaries, a Hugging Face dataset, or anything that yields them."""
        table = [dict(row) for row in rows]
        columns: set[str] = set[str]().union(*(row.keys() for row in table)) if table else set()
        text = "clean" if "clean" in columns else "text"
        for i, row in enumerate(table):
            needed = {text, *(columns & {"corrupted", "answer", "wrong", "label"})}
            if gone := {name for name in needed if row.get(name) is None}:
                raise ExamplesError(f"row {i} lacks {sorted(gone)}; every row needs the same columns, {text!r} first")
        answers = None
        if "answer" in columns:
            answers = [(r["answer"], r["wrong"]) if "wrong" in columns else r["answer"] for r in table]
        texts = [row[text] for row in table]
        labels = [row["label"] for row in table] if "label" in columns else None
        if "corrupted" in columns:
            return cls.pairs(texts, [row["corrupted"] for row in table], answers, labels=labels)
        return cls.of(texts, labels, answers)

    @classmethod
    def from_jsonl(cls, path: str | Path) -> "Examples":
        """One JSON object a line, with the keys of `from_dataset`."""
        rows: list[Mapping[str, Any]] = []
        for number, line in enumerate(_read(path).split("\n"), 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ExamplesError(f"{path}:{number} is not JSON ({error.msg}); write one object a line") from None
                if not isinstance(row, dict):
                    raise ExamplesError(f'{path}:{number} is not an object; write {{"text": ...}}')
                rows.append(row)
        return cls.from_dataset(rows)

    @classmethod
    def from_csv(cls, path: str | Path) -> "Examples":
        """A CSV file with a header line, with the columns of `from_dataset`."""
        return cls.from_dataset(csv.DictReader(io.StringIO(_read(path), newline="")))

    def tokenize(self, tokenizer: Any, context: int | None = None) -> "Tokens":
        """Token ids for every example.

        Args:
            tokenizer: a Hugging Face tokenizer; may be None when all examples are token ids.
            context: the longest prompt the model takes, in tokens.
        Raises:
            ExamplesError: an empty or too long prompt, an answer of several tokens, a span without tokens.
            AlignmentError: clean and corrupted prompts of different length.
        """
        encoded = [_encode(text, tokenizer, f"example {i}", context) for i, text in enumerate(self.texts)]
        corrupted = None
        if self.corrupted is not None:
            corrupted = [
                _encode(t, tokenizer, f"corrupted example {i}", context)[0] for i, t in enumerate(self.corrupted)
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
                tuple(tuple(dict.fromkeys(_answer_id(a, text, ids, tokenizer, i) for a in side)) for side in sides)
                for i, (text, (ids, _), sides) in enumerate(zip(self.texts, encoded, self.answers, strict=True))
            )

        def locate(name: str, spans: tuple[Span, ...]) -> tuple[Span, ...]:
            rows = zip(spans, encoded, self.texts, strict=True)
            return tuple(_span(name, i, s, *e, text) for i, (s, e, text) in enumerate(rows))

        pad = getattr(tokenizer, "pad_token_id", None)
        return Tokens(
            self,
            tuple(ids for ids, _ in encoded),
            None if corrupted is None else tuple(corrupted),
            answers,
            {name: tuple(stop - 1 for _, stop in locate(name, s)) for name, s in self.positions.items()},
            {name: locate(name, s) for name, s in self.spans.items()},
            0 if pad is None else pad,
        )


@dataclass(frozen=True)
class Tokens:
    """All examples as token ids, unpadded."""

    examples: Examples
    ids: tuple[tuple[int, ...], ...]
    corrupted: tuple[tuple[int, ...], ...] | None
    answers: tuple[tuple[tuple[int, ...], ...], ...] | None
    positions: Mapping[str, tuple[int, ...]]
    spans: Mapping[str, tuple[Span, ...]]
    pad: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> tuple[int, ...]:
        return tuple(len(row) for row in self.ids)

    def batches(self, size: int) -> list[tuple[int, ...]]:
        """Row numbers of batches of at most `size` examples, shortest first, so that little is padded."""
        order = sorted(range(len(self)), key=lambda i: (len(self.ids[i]), i))
        return [tuple(order[i : i + size]) for i in range(0, len(order), size)]

    def batch(self, rows: Sequence[int], device: Any = "cpu", padding_side: str = "right") -> "TokenBatch":
        """The given rows as padded tensors."""
        width = max(len(self.ids[i]) for i in rows)

        def pad(all_ids: tuple[tuple[int, ...], ...], fill: int) -> Tensor:
            gaps = [[fill] * (width - len(all_ids[i])) for i in rows]
            padded = [
                [*gap, *all_ids[i]] if padding_side == "left" else [*all_ids[i], *gap]
                for i, gap in zip(rows, gaps, strict=True)
            ]
            return torch.tensor(padded, device=device)

        real = pad(tuple((1,) * len(ids) for ids in self.ids), 0).bool()
        labels = self.examples.labels
        return TokenBatch(
            ids=pad(self.ids, self.pad),
            mask=real,
            rows=tuple(rows),
            corrupted_ids=None if self.corrupted is None else pad(self.corrupted, self.pad),
            answers=None if self.answers is None else tuple(self.answers[i] for i in rows),
            labels=None if labels is None else tuple(labels[i] for i in rows),
            positions={name: tuple(column[i] for i in rows) for name, column in self.positions.items()},
            spans={name: tuple(column[i] for i in rows) for name, column in self.spans.items()},
        )


@dataclass(frozen=True)
class Where:
    """Columns of a batch that a choice of positions means, row by row."""

    columns: Int[Tensor, "example"] | Int[Tensor, "example chosen"]
    """One column a row (the position axis is dropped), or several (it is kept)."""
    valid: Bool[Tensor, "example"] | Bool[Tensor, "example chosen"] | None = None
    """False where a row has no such position here; None when all rows have."""


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Some examples as padded tensors, with all that is known about just these rows."""

    ids: TokenIds
    mask: Bool[Tensor, "example total"]
    """True at real tokens; may be longer than `ids` on the left by `offset` cached tokens."""
    rows: tuple[int, ...] = ()
    """Numbers of these examples in the whole set."""
    corrupted_ids: TokenIds | None = None
    answers: tuple[tuple[tuple[int, ...], ...], ...] | None = None
    labels: tuple[Any, ...] | None = None
    positions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    spans: Mapping[str, tuple[Span, ...]] = field(default_factory=dict)
    offset: int = 0
    """Tokens already in a key/value cache, when generating."""

    def __len__(self) -> int:
        return int(self.ids.shape[0])

    @property
    def lengths(self) -> Int[Tensor, "example"]:
        """Real tokens in each row."""
        return self.mask.sum(1)

    @property
    def starts(self) -> Int[Tensor, "example"]:
        """Column of each row's first real token."""
        return self.mask.int().argmax(1)

    @property
    def left_padded(self) -> bool:
        return not bool(self.mask[:, 0].all())

    @property
    def position_ids(self) -> Int[Tensor, "example pos"]:
        """Positions counted from each row's first real token; never read at padding."""
        return (self.mask.long().cumsum(1) - 1).clamp(min=0)[:, self.offset :]

    def run(self, of: str) -> "TokenBatch":
        """The batch with the ids of the ``"clean"`` or the ``"corrupted"`` run in `ids`.

        Raises:
            ExamplesError: corrupted prompts are wanted and there are none.
        """
        if of == "clean":
            return self
        if self.corrupted_ids is None:
            raise ExamplesError("these examples have no corrupted prompts; build them with Examples.pairs")
        return replace(self, ids=self.corrupted_ids)

    def side(self, index: int) -> Int[Tensor, "example answers"]:
        """Answer ids of side 0 (right) or 1 (wrong), padded by repeating the first.

        Raises:
            ExamplesError: the examples have no answers, or none on that side.
        """
        if self.answers is None or any(len(sides) <= index for sides in self.answers):
            what = "answers" if index == 0 else "wrong answers"
            raise ExamplesError(
                f"these examples have no {what}; give answers=[{'right' if index == 0 else '(right, wrong)'}, ...]"
            )
        width = max(len(sides[index]) for sides in self.answers)
        rows = [[*s[index], *[s[index][0]] * (width - len(s[index]))] for s in self.answers]
        return torch.tensor(rows, device=self.ids.device)

    @property
    def two_sided(self) -> bool:
        """Whether every example has wrong answers as well as right ones."""
        return self.answers is not None and all(len(sides) > 1 for sides in self.answers)

    def contrast(self) -> tuple[Int[Tensor, "example answers"], Float[Tensor, "example answers"]]:
        """Ids and weights whose product with logits is the logit difference (or the right answer's logit).

        Raises:
            ExamplesError: the examples have no answers.
        """
        if not self.two_sided:
            return self.side(0), self.weights(0)
        return torch.cat([self.side(0), self.side(1)], 1), torch.cat([self.weights(0), -self.weights(1)], 1)

    def weights(self, index: int) -> Float[Tensor, "example answers"]:
        """1/n at each of a row's n answers on a side and 0 at padding, so that ``(x * weights).sum(1)`` is a mean."""
        sizes = torch.tensor([len(sides[index]) for sides in self.answers or ()], device=self.ids.device)
        real = torch.arange(self.side(index).shape[1], device=self.ids.device) < sizes[:, None]
        return real / sizes[:, None]

    def where(self, positions: Position | tuple[Position, ...] | None, strict: bool = True) -> Where | None:
        """Columns of `positions` in every row; None means all columns.

        Args:
            strict: a position beyond a row's end is an error rather than marked invalid.
        Raises:
            ExamplesError: a name that the examples do not define, or a position that a row lacks.
        """
        if positions is None:
            return None
        if isinstance(positions, str) and positions in self.spans:
            return self._span(positions)
        one = not isinstance(positions, tuple)
        columns = torch.stack([self._column(p, strict) for p in ((positions,) if one else positions)], 1)
        columns = columns - self.offset
        valid = (
            (columns >= 0)
            & (columns < self.ids.shape[1])
            & (columns + self.offset < (self.starts + self.lengths)[:, None])
        )
        bound = columns.clamp(0, self.ids.shape[1] - 1)
        keep = None if bool(valid.all()) else valid
        return Where(bound[:, 0], None if keep is None else keep[:, 0]) if one else Where(bound, keep)

    def _column(self, position: Position, strict: bool) -> Int[Tensor, "example"]:
        lengths = self.lengths
        if position == "end":
            return self.starts + lengths - 1
        if isinstance(position, str):
            if position not in self.positions:
                spans = "; a span cannot stand beside other positions" if position in self.spans else ""
                known = ", ".join(["end", *self.positions, *self.spans])
                raise ExamplesError(f"these examples define no position {position!r}{spans}; they have {known}")
            return self.starts + torch.tensor(self.positions[position], device=self.ids.device)
        inside = (lengths > position) & (lengths >= -position)
        if strict and self.offset == 0 and not bool(inside.all()):
            row = int((~inside).nonzero()[0])
            raise ExamplesError(
                f"position {position} is outside example {self.rows[row] if self.rows else row},"
                f" which has {int(lengths[row])} tokens; name the position, or count from the end with -1"
            )
        # A row that is too short gets a column that is no real one, on whichever side its padding is.
        return torch.where(inside, self.starts + (position if position >= 0 else lengths + position), -1 - self.offset)

    def _span(self, name: str) -> Where:
        bounds = torch.tensor(self.spans[name], device=self.ids.device)
        steps = torch.arange(int((bounds[:, 1] - bounds[:, 0]).max()), device=self.ids.device)
        columns = (self.starts + bounds[:, 0])[:, None] + steps - self.offset
        valid = (steps < (bounds[:, 1] - bounds[:, 0])[:, None]) & (columns >= 0) & (columns < self.ids.shape[1])
        return Where(columns.clamp(0, self.ids.shape[1] - 1), valid)


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
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ExamplesError(f"cannot read {path}: {reason}; give a text file of examples") from None


def _encode(text: Text, tokenizer: Any, name: str, context: int | None) -> tuple[tuple[int, ...], list[Span] | None]:
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
            messages = [{"role": role, "content": content} for role, content in text.messages]
            text = str(
                tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=text.add_generation_prompt
                )
            )
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
