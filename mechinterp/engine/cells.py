"""The cells of a packed sweep, and the rows that they come to: known from the tokens, before anything runs."""

import itertools
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from mechinterp.core.analyzer import Sweep
from mechinterp.core.tokens import TokenBatch
from mechinterp.engine.sweep import Grid
from mechinterp.model.model import Model
from mechinterp.sites import resolve

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
    """The example's tokens: where `stop` goes once the row's change has spread."""
    enters: Ints
    """Layer at which the row joins."""
    spreads: Bools
    """Whether it carries all later columns from its first layer on."""

    def __len__(self) -> int:
        return len(self.cell)

    def take(self, which: Any) -> "Rows":
        return Rows(*(getattr(self, name)[which] for name in Rows.__dataclass_fields__))


class Cells:
    """The cells of a sweep over right-padded examples, and the rows that they come to. Runs nothing."""

    def __init__(self, model: Model, batch: TokenBatch, sweep: Sweep, width: int) -> None:
        self.model, self.batch, self.sweep = model, batch, sweep
        self.grid = Grid.of(sweep, model, width)
        self.lengths: Ints = batch.lengths.cpu().numpy()
        self._columns: dict[Any, tuple[Ints, Bools]] = {}

    def columns(self, positions: Any) -> tuple[Ints, Bools]:
        """(columns, valid), ``example chosen``, of a choice of positions; None is every real one."""
        if positions not in self._columns:
            where = self.batch.where(positions, strict=False)
            n = len(self.lengths)
            if where is None:
                columns = np.tile(np.arange(int(self.lengths.max())), (n, 1))
                valid = columns < self.lengths[:, None]
            else:
                columns = where.columns.cpu().numpy().reshape(n, -1)
                valid = np.ones(columns.shape, bool)
                if where.valid is not None:
                    valid = where.valid.cpu().numpy().reshape(columns.shape)
            self._columns[positions] = columns, valid
        return self._columns[positions]

    def of_cell(self, cells: Ints) -> tuple[Ints, Ints, Ints]:
        """Numbers of the group, the position and the head of each cell."""
        heads, positions = len(self.grid.parts), len(self.grid.positions)
        return cells // (heads * positions), cells // heads % positions, cells % heads

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

    def rows(self, skip: bool = True) -> tuple[Rows, Bools]:
        """The rows that must be run, and (``example cell``) which cells an example lacks.

        Args:
            skip: leave out rows that write what is there already.
        """
        examples, none = len(self.lengths), np.iinfo(np.int64).max
        first = self._first_difference() if self.sweep.patches and skip else np.zeros(examples, np.int64)
        missing = np.zeros((examples, self.grid.rows), bool)
        heads = len(self.grid.parts)
        found: list[Rows] = []
        for number, (group, position) in enumerate(itertools.product(self.grid.groups, self.grid.positions)):
            start, stop = np.full(examples, none), np.zeros(examples, np.int64)
            gone = np.zeros(examples, bool)
            for site in group:
                columns, valid = self.columns(site.positions if position is None else position)
                gone |= ~valid.any(1)
                active = valid & (columns >= first[:, None])
                start = np.minimum(start, np.where(active, columns, none).min(1))
                stop = np.maximum(stop, np.where(active, columns + 1, 0).max(1))
            cells = np.arange(number * heads, (number + 1) * heads)
            missing[:, cells] = gone[:, None]
            entry = min(group, key=lambda s: s.order)
            some = np.nonzero((stop > start) & ~gone)[0]
            # At the end of a layer is before the next.
            spreads = entry.kind == "resid_post" or any(
                site.kind in SPREADS and site.layer == entry.layer for site in group
            )
            cell, example = (each.ravel() for each in np.meshgrid(cells, some, indexing="ij"))
            length = self.lengths[example]
            enters = (entry.layer or 0) + (entry.kind == "resid_post")
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
        return Rows(
            *(np.concatenate([getattr(rows, name) for rows in found]) for name in Rows.__dataclass_fields__)
        ), missing

    def token_layers(self, rows: Rows) -> int:
        """Tokens × layers that rows carry, all columns of the last layer included."""
        later = self.model.dims.n_layers - rows.enters
        entry = np.where(rows.spreads, 0, rows.stop - rows.length)
        return int(((rows.length - rows.start) * later + np.where(later > 0, entry, 0)).sum())
