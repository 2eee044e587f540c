"""The cells of a packed sweep, and the rows that they come to: known from the tokens, before anything runs."""

import itertools
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from mechinterp.core.analyzer import Sweep
from mechinterp.core.tokens import TokenBatch, Where
from mechinterp.engine.sweep import Grid, edit
from mechinterp.model.model import Model
from mechinterp.sites import Site, resolve

Ints: TypeAlias = npt.NDArray[np.int64]
Bools: TypeAlias = npt.NDArray[np.bool_]

SPREADS = ("embed", "resid_pre", "attn_in", "k", "k_normed", "k_rot", "v")
"""Kinds whose change at a column reaches later columns in the same layer; others reach them in the next."""


@dataclass
class Rows:
    """Rows as columns: row i is cell `cell[i]` of example `example[i]`, and carries columns `start[i]` to `stop[i]`."""

    cell: Ints
    example: Ints
    start: Ints
    stop: Ints
    length: Ints
    """The row's tokens: where `stop` goes once its change has spread."""
    enters: Ints
    """Layer at which the row joins."""
    spreads: Bools
    """Whether it carries all later columns from its first layer on."""

    def __len__(self) -> int:
        return len(self.cell)

    def take(self, which: Any) -> "Rows":
        return Rows(*(getattr(self, name)[which] for name in Rows.__dataclass_fields__))

    def neighbours(self) -> Ints:
        """The order that has rows side by side which will carry the same columns, those that join first in front."""
        return np.lexsort((self.cell, self.example, self.stop, ~self.spreads, self.enters, self.length, self.start))

    @classmethod
    def none(cls) -> "Rows":
        some = np.zeros(0, np.int64)
        return cls(some, some, some, some, some, some, np.zeros(0, bool))

    @classmethod
    def joined(cls, many: "list[Rows]") -> "Rows":
        return cls(*(np.concatenate([getattr(rows, name) for rows in many]) for name in cls.__dataclass_fields__))


class Cells:
    """The cells of a sweep over right-padded examples, and the rows that they come to. Runs nothing."""

    def __init__(self, model: Model, batch: TokenBatch, sweep: Sweep, width: int) -> None:
        self.model, self.batch, self.sweep = model, batch, sweep
        self.grid = Grid.of(sweep, model, width)
        self.lengths: Ints = batch.lengths.cpu().numpy()
        self._columns: dict[Any, tuple[Ints, Bools]] = {}
        self._tables: dict[tuple[Any, ...], tuple[Ints, Bools]] = {}
        self.edited = self._edited() if sweep.edits else None
        """Every edited input of every example, one after the other."""
        self.place: Ints = self._places()
        """Where in `edited` a cell of an example is, ``example cell``; -1 where it is not."""

    def _edited(self) -> TokenBatch | None:
        """Every edited input; None where these examples have none."""
        base = self.batch.run(self.sweep.base)
        pairs = [(i, one) for i, row in enumerate(self.batch.rows) for one in self.sweep.edits_of(row)]
        return edit(base, [i for i, _ in pairs], [one for _, one in pairs]) if pairs else None

    def _places(self) -> Ints:
        out = np.full((len(self.lengths), self.grid.rows), -1, np.int64)
        if self.edited is not None:
            counts = [len(self.sweep.edits_of(row)) for row in self.batch.rows]
            for i, (first, count) in enumerate(zip(np.cumsum([0, *counts]).tolist(), counts, strict=False)):
                out[i, :count] = np.arange(first, first + count)
        return out

    def columns(self, positions: Any) -> tuple[Ints, Bools]:
        """(columns, valid), ``example chosen``, of a choice of positions; None is every real one."""
        if positions not in self._columns:
            self._columns[positions] = _columns(self.batch, positions)
        return self._columns[positions]

    def table(self, choices: tuple[Any, ...]) -> tuple[Ints, Bools]:
        """(columns, valid), ``choice example chosen``, of several choices of positions."""
        if choices not in self._tables:
            found = [self.columns(positions) for positions in choices]
            wide = max(columns.shape[1] for columns, _ in found)
            pad = [((0, 0), (0, wide - columns.shape[1])) for columns, _ in found]
            self._tables[choices] = (
                np.stack([np.pad(columns, p) for (columns, _), p in zip(found, pad, strict=True)]),
                np.stack([np.pad(valid, p) for (_, valid), p in zip(found, pad, strict=True)]),
            )
        return self._tables[choices]

    def metric_columns(self, rows: Rows) -> tuple[Ints, Bools]:
        """(columns, valid), ``row chosen``, at which the metric wants logits of rows; none without a metric."""
        if self.sweep.metric is None:
            return np.zeros((len(rows), 0), np.int64), np.zeros((len(rows), 0), bool)
        where = self.sweep.metric.positions
        if self.edited is None:
            columns, valid = self.columns(where)
            return columns[rows.example], valid[rows.example]
        columns, valid = _columns(self.edited, where)
        at, own = self.placed(rows)
        columns, valid = columns[at], valid[at]
        if own.any():  # one column, which is all that a run must be asked for to go along
            columns[own], valid[own] = (each[rows.example[own]] for each in self.columns(where))
        return columns, valid

    def placed(self, rows: Rows) -> tuple[Ints, Bools]:
        """Where in `edited` each row is, and which rows are no edited input but an unedited run that goes along."""
        own = rows.cell >= self.grid.rows
        return self.place[rows.example, np.where(own, 0, rows.cell)], own

    def of_cell(self, cells: Ints) -> tuple[Ints, Ints, Ints]:
        """Numbers of the group, the position and the part of each cell."""
        parts, positions = len(self.grid.parts), len(self.grid.positions)
        return cells // (parts * positions), cells // parts % positions, cells % parts

    def rows(self, skip: bool = True) -> tuple[Rows, Bools]:
        """The rows that must be run, and (``example cell``) which cells an example lacks.

        Args:
            skip: leave out rows that write what is there already.
        """
        if self.sweep.edits:
            return Rows.none() if self.edited is None else self._rows_of_edits(self.edited), self.place < 0
        examples = len(self.lengths)
        first = self._first_difference() if self.sweep.patches and skip else np.zeros(examples, np.int64)
        missing = np.zeros((examples, self.grid.rows), bool)
        parts = len(self.grid.parts)
        found: list[Rows] = []
        known: dict[Any, tuple[Ints, Ints, Bools]] = {}
        for number, (g, position) in enumerate(itertools.product(range(len(self.grid.groups)), self.grid.positions)):
            group = self.grid.groups[g]
            patches = self.sweep.patches and (not self.grid.writes or not any(self.grid.writes[g]))
            where = tuple(dict.fromkeys(site.positions if position is None else position for site in group))
            if (where, patches) not in known:
                known[where, patches] = self._reach(where, first if patches else np.zeros(examples, np.int64))
            start, stop, gone = known[where, patches]
            cells = np.arange(number * parts, (number + 1) * parts)
            missing[:, cells] = gone[:, None]
            if not len(some := np.nonzero((stop > start) & ~gone)[0]):
                continue
            enters, spreads = self._entry(group)
            cell, example = np.repeat(cells, len(some)), np.tile(some, len(cells))
            length = self.lengths[example]
            found.append(
                Rows(
                    cell,
                    example,
                    start[example],
                    length if spreads else stop[example],
                    length,
                    np.full(len(cell), enters),
                    np.full(len(cell), spreads),
                )
            )
        return Rows.joined([Rows.none(), *found]), missing

    def _reach(self, where: tuple[Any, ...], first: Ints) -> tuple[Ints, Ints, Bools]:
        """First column that is written from `first` on, one beyond the last, and which examples lack the position."""
        examples, none = len(self.lengths), np.iinfo(np.int64).max
        start, stop = np.full(examples, none), np.zeros(examples, np.int64)
        gone = np.zeros(examples, bool)
        for positions in where:
            columns, valid = self.columns(positions)
            gone |= ~valid.any(1)
            active = valid & (columns >= first[:, None])
            start = np.minimum(start, np.where(active, columns, none).min(1))
            stop = np.maximum(stop, np.where(active, columns + 1, 0).max(1))
        return start, stop, gone

    def _entry(self, group: tuple[Site, ...]) -> tuple[int, bool]:
        """The layer at which rows that write these sites join, and whether they carry later columns from there."""
        first = min(group, key=lambda s: s.order)
        if first.kind == "final_norm":
            return self.model.dims.n_layers, False
        if first.kind == "resid_post":  # at the end of a layer is before the next
            return (first.layer or 0) + 1, True
        return first.layer or 0, any(s.kind in SPREADS and (s.layer or 0) == (first.layer or 0) for s in group)

    def _first_difference(self) -> Ints:
        """For each example, the first column at which the source run may differ from the base run."""
        base, source = (self.batch.run(r).ids for r in (self.sweep.base, self.sweep.source))
        differs = ((base != source) & self.batch.mask).cpu().numpy()
        for one in self.sweep.given:
            for site in resolve(one.site, self.model.dims.n_layers):
                columns, valid = self.columns(site.positions)
                examples = np.nonzero(valid)[0]
                differs[examples, columns[valid]] = True
        return np.where(differs.any(1), differs.argmax(1), self.lengths)

    def _rows_of_edits(self, edited: TokenBatch) -> Rows:
        """Rows that share with the base run whatever stands before the first token that is not its own."""
        example, cell = np.nonzero(self.place >= 0)
        length: Ints = edited.lengths.cpu().numpy()
        width = min(edited.ids.shape[1], self.batch.ids.shape[1])
        base = self.batch.run(self.sweep.base).ids[torch.as_tensor(example, device=edited.ids.device), :width]
        changed = base != edited.ids[:, :width]
        for blank in edited.blanks.values():
            changed |= blank[:, :width]
        differs = changed.cpu().numpy() & (np.arange(width) < length[:, None])
        start = np.where(differs.any(1), differs.argmax(1), np.minimum(length, self.lengths[example]))
        same = (start == length) & (length == self.lengths[example])  # a token replaced by itself
        count = len(cell)
        rows = Rows(cell, example, start, length, length, np.zeros(count, np.int64), np.ones(count, bool))
        rows.start = np.minimum(start, self._wanted(rows))
        return rows.take(~same)

    def _wanted(self, rows: Rows) -> Ints:
        """The first column of edited inputs that the metric wants, which a row carries though another has it too."""
        columns, valid = self.metric_columns(rows)
        if self.sweep.metric is not None and self.sweep.metric.positions is None:
            return rows.length - 1
        return np.where(valid, columns, rows.length[:, None] - 1).min(1)

    def sharing(self, rows: Rows) -> tuple[Rows, Ints | None]:
        """Rows that fly together, in the order that they attend in, and (``row column``) which of them carries what.

        Edited inputs that begin alike carry the common columns once: a tree of tokens. In order of their tokens, a
        row has more in common with its neighbour than with any before it. -1 is what the base run carries; None
        stands for rows that carry all from their start on, as for a metric of every position they must, and as one
        edited input of each example does.
        """
        metric = self.sweep.metric
        alone = np.bincount(rows.example[rows.cell < self.grid.rows]).max(initial=0) <= 1
        if self.edited is None or alone or metric is None or metric.positions is None:
            return rows.take(rows.neighbours()), None
        width, begin = int(rows.length.max()), int(rows.start.min())
        codes = self._codes(self.edited)[self.place[rows.example, rows.cell], :width]
        order = np.lexsort((*codes[:, begin:].T[::-1], rows.example))
        rows, codes = rows.take(order), codes[order]
        differs = (codes[1:] != codes[:-1]) | (rows.example[1:] != rows.example[:-1])[:, None]
        common = np.where(differs.any(1), differs.argmax(1), width)
        shared = np.concatenate([[0], common])
        follows = shared > rows.start  # the neighbour has more of it than the base run
        rows.start = np.minimum(np.where(follows, shared, rows.start), self._wanted(rows))
        number = np.empty(len(rows), np.int64)
        number[perm := rows.neighbours()] = np.arange(len(rows))
        carrier = np.full((len(rows), width), -1, np.int64)
        for i, start in enumerate(rows.start.tolist()):
            if follows[i]:
                carrier[i, :start] = carrier[i - 1, :start]
            carrier[i, start : rows.length[i]] = number[i]
        return rows.take(perm), carrier[perm]

    def _codes(self, edited: TokenBatch) -> Ints:
        """A number for each token of each edited input, below 0 for a blank or padding."""
        out: Ints = edited.ids.cpu().numpy().copy()
        out[~edited.mask.cpu().numpy()] = -1
        for i, blank in enumerate(edited.blanks.values()):
            out[blank.cpu().numpy()] = -2 - i
        return out

    def token_layers(self, rows: Rows) -> int:
        """Tokens × layers that rows carry, all columns of the last layer included."""
        later = self.model.dims.n_layers - rows.enters
        entry = np.where(rows.spreads, 0, rows.stop - rows.length)
        return int(((rows.length - rows.start) * later + np.where(later > 0, entry, 0)).sum())


def _columns(batch: TokenBatch, positions: Any) -> tuple[Ints, Bools]:
    """(columns, valid), ``example chosen``; None is every real one."""
    where: Where | None = batch.where(positions, strict=False)
    lengths: Ints = batch.lengths.cpu().numpy()
    n = len(lengths)
    if where is None:
        columns = np.tile(np.arange(int(lengths.max())), (n, 1))
        return columns, columns < lengths[:, None]
    columns = where.columns.cpu().numpy().reshape(n, -1)
    valid = np.ones(columns.shape, bool)
    if where.valid is not None:
        valid = where.valid.cpu().numpy().reshape(columns.shape)
    return columns, valid
