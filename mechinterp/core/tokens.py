"""Tokens: examples as token ids. TokenBatch: some of them as padded tensors, with all that is known of just these.

Positions are always counted in an example's own tokens, from its first real one, so padding on
either side changes nothing.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.errors import ExamplesError
from mechinterp.shapes import TokenIds
from mechinterp.sites import Position

Span: TypeAlias = tuple[int, int]
Baseline: TypeAlias = Literal["mean", "zero", "pad"]
"""Embeddings that stand for no token in particular; `Model.baseline` makes them."""
BASELINES: tuple[Baseline, ...] = get_args(Baseline)


def is_label(value: Any) -> bool:
    """Whether a text has this label: None and NaN say that it has none."""
    return value is not None and not (isinstance(value, float) and math.isnan(value))


@dataclass(frozen=True)
class Tokens:
    """All examples as token ids, unpadded."""

    ids: tuple[tuple[int, ...], ...]
    corrupted: tuple[tuple[int, ...], ...] | None
    answers: tuple[tuple[tuple[int, ...], ...], ...] | None
    positions: Mapping[str, tuple[int, ...]]
    spans: Mapping[str, tuple[Span, ...]]
    labels: tuple[Any, ...] | None = None
    pad: int = 0
    categories: Mapping[str, tuple[tuple[Span, ...], ...]] = field(default_factory=dict)
    """Word categories: for each example the tokens of every match, which may share some."""

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
        return TokenBatch(
            ids=pad(self.ids, self.pad),
            mask=real,
            rows=tuple(rows),
            corrupted_ids=None if self.corrupted is None else pad(self.corrupted, self.pad),
            answers=None if self.answers is None else tuple(self.answers[i] for i in rows),
            labels=None if self.labels is None else tuple(self.labels[i] for i in rows),
            positions={name: tuple(column[i] for i in rows) for name, column in self.positions.items()},
            spans={name: tuple(column[i] for i in rows) for name, column in self.spans.items()},
            categories={name: tuple(column[i] for i in rows) for name, column in self.categories.items()},
        )


@dataclass(frozen=True)
class Where:
    """Columns of a batch that a choice of positions means, row by row."""

    columns: Int[Tensor, "example"] | Int[Tensor, "example chosen"]
    """One column a row (the position axis is dropped), or several (it is kept)."""
    valid: Bool[Tensor, "example"] | Bool[Tensor, "example chosen"] | None = None
    """False where a row has no such position here; None when all rows have."""

    def to(self, device: Any) -> "Where":
        """The same on a device; layers may lie on several."""
        return Where(self.columns.to(device), None if self.valid is None else self.valid.to(device))


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
    categories: Mapping[str, tuple[tuple[Span, ...], ...]] = field(default_factory=dict)
    """Word categories: for each example the tokens of every match; `members` has them as masks."""
    blanks: Mapping[Baseline, Bool[Tensor, "example pos"]] = field(default_factory=dict)
    """Tokens whose embedding is a baseline, whatever `ids` say."""

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
    def members(self) -> Bool[Tensor, "example category total"]:
        """Whether each token belongs to each category, in the order of `categories`; as wide as `mask`."""
        out = torch.zeros(len(self), len(self.categories), self.mask.shape[1], dtype=torch.bool)
        starts = self.starts.tolist()
        for c, column in enumerate(self.categories.values()):
            for row, spans in enumerate(column):
                for start, stop in spans:
                    out[row, c, starts[row] + start : starts[row] + stop] = True
        return out.to(self.mask.device)

    @property
    def position_ids(self) -> Int[Tensor, "example pos"]:
        """Positions counted from each row's first real token; never read at padding."""
        return (self.mask.long().cumsum(1) - 1).clamp(min=0)[:, self.offset :]

    @property
    def first_difference(self) -> int:
        """The first column at which any example's two prompts differ; the last one where none do.

        Raises:
            ExamplesError: there are no corrupted prompts.
        """
        differs = (self.ids != self.run("corrupted").ids).any(0)
        return int(differs.int().argmax()) if bool(differs.any()) else len(differs) - 1

    def right_padded(self) -> "TokenBatch":
        """The same examples with their first real tokens in column 0."""
        if not self.left_padded:
            return self
        order = (~self.mask).int().argsort(dim=1, stable=True)  # real tokens first, in order
        swapped = None if self.corrupted_ids is None else self.corrupted_ids.gather(1, order)
        return replace(self, ids=self.ids.gather(1, order), mask=self.mask.gather(1, order), corrupted_ids=swapped)

    def take(self, which: Sequence[int]) -> "TokenBatch":
        """Some of the examples, by row of this batch; right-padded ones as wide as the longest of them."""
        some = torch.as_tensor(list(which), device=self.ids.device)
        width = self.ids.shape[1] if self.left_padded else int(self.mask[some].sum(1).max())

        def pick(column: Any) -> Any:
            return None if column is None else tuple(column[i] for i in which)

        return replace(
            self,
            ids=self.ids[some, :width],
            mask=self.mask[some, :width],
            rows=pick(self.rows) if self.rows else (),
            corrupted_ids=None if self.corrupted_ids is None else self.corrupted_ids[some, :width],
            answers=pick(self.answers),
            labels=pick(self.labels),
            positions={name: pick(column) for name, column in self.positions.items()},
            spans={name: pick(column) for name, column in self.spans.items()},
            categories={name: pick(column) for name, column in self.categories.items()},
            blanks={name: which[some, :width] for name, which in self.blanks.items()},
        )

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
            what = "answers" if index == 0 or self.answers is None else "wrong answers"
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
                raise ExamplesError(
                    f"these examples define no position {position!r}{spans}; they have {known}; use one of these, or"
                    f" define {position!r} in positions= or spans= (in a file, the column 'subject' is a span)"
                )
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
