"""What rows of a packed sweep write on their way, and what is read of them."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from mechinterp.core.interventions import Intervention
from mechinterp.core.trace import Read
from mechinterp.engine.cells import Ints, Rows
from mechinterp.engine.runs import Along, Runs
from mechinterp.model.slices import index, overwrite
from mechinterp.sites import Site, resolve


@dataclass(frozen=True)
class Work:
    """Something that is written at a site in the rows of some groups."""

    site: Site
    groups: Ints
    write: Intervention | None = None
    """None for the source run's value, or, where it is made cell by cell, what the grid's `write` makes."""
    made: bool = False
    held: bool = False
    """The base run's value is put there."""
    given: bool = False
    """In force in the base run too."""


class Writing:
    """A chunk of rows, where their tokens lie in the packed matrix, and what they write.

    A row's tokens lie side by side, from `offset` on: its columns `start` to `stop`.
    """

    def __init__(self, runs: Runs, rows: Rows, budget: int) -> None:
        self.s, self.model, self.rows, self.budget = runs, runs.model, rows, budget
        self.stop = rows.stop.copy()
        self.offset = np.full(len(rows), -1, np.int64)
        self.slot: Ints | None = None
        """In the last layer, where the tokens are that were kept; -1 for others."""
        self.column = np.zeros(0, np.int64)
        """Of every token."""
        self.layer = 0
        self.token_layers = 0
        self.group, self.position, self.part = runs.of_cell(rows.cell)
        self.work = self._work()
        self.read: dict[tuple[int, str], list[Site]] = defaultdict(list)
        """(layer, kind) → sites that are read there."""
        for site in runs.sweep.reads:
            self.read[self._when(site)].append(site)
        self.record: dict[tuple[int, str], list[tuple[Along, Site]]] = defaultdict(list)
        """(layer, kind) → what is kept there of the unedited runs that go along."""
        self.along: dict[int, tuple[Ints, Ints, tuple[Tensor, Tensor]]] = {}
        """Cell → row and column of each token of such a run, and the example and column that these are."""
        for run in runs.along:
            row = np.nonzero(rows.cell == run.cell)[0]
            which, column = ragged(rows.start[row], rows.length[row])
            row = row[which]
            self.along[run.cell] = row, column, (runs.tensor(rows.example[row]), runs.tensor(column))
            for site in run.sites:
                before = site.kind == "resid_pre" and site.layer  # the end of the layer before
                when = (site.layer - 1, "resid_post") if before and site.layer else self._when(site)
                if site.layer or site.kind not in ("embed", "resid_pre"):  # which are known
                    self.record[when].append((run, site))

    def _when(self, site: Site) -> tuple[int, str]:
        last = site.kind in ("final_norm", "logits")
        return self.model.dims.n_layers if last else site.layer or 0, site.kind

    def _work(self) -> dict[tuple[int, str], list[Work]]:
        """(layer, kind) → writes there: what is given, then what is held, then the rows' own."""
        out: dict[tuple[int, str], list[Work]] = defaultdict(list)
        every = np.unique(self.group[self.rows.cell < self.s.grid.rows])  # not of runs that go along
        for one in self.s.sweep.given:
            for site in resolve(one.site, self.model.dims.n_layers):
                if site.kind == "resid_pre" and site.layer:  # tokens that join are given it already
                    out[site.layer - 1, "resid_post"].append(Work(site, every, one, given=True))
                elif site.kind not in ("embed", "resid_pre"):
                    out[self._when(site)].append(Work(site, every, one, given=True))
        for site in self.s.held:
            out[self._when(site)].append(Work(site, every, held=True))
        members: dict[Site, list[int]] = defaultdict(list)
        for group in every.tolist():
            writes = self.s.grid.writes[group] if self.s.grid.writes else ()
            for i, site in enumerate(self.s.grid.groups[group]):
                if writes and writes[i] is not None:
                    out[self._when(site)].append(Work(site, np.array([group]), writes[i]))
                else:
                    members[site].append(group)
        for site, groups in members.items():
            out[self._when(site)].append(Work(site, np.array(groups), made=self.s.grid.write is not None))
        return out

    def _token(self, rows: Ints, columns: Ints) -> Ints:
        """Where a column of a row is in the packed matrix; -1 where it is not carried."""
        inside = (self.offset[rows] >= 0) & (columns >= self.rows.start[rows]) & (columns < self.stop[rows])
        at = np.where(inside, self.offset[rows] + columns - self.rows.start[rows], -1)
        return at if self.slot is None else np.where(inside, self.slot[at], -1)

    def _act(self, kind: str, value: Tensor, joining: Ints | None = None) -> Tensor:
        """Everything that is written at a kind of site of this layer, ``token [head] width``; then it may be read.

        Args:
            joining: only these rows, by what they write themselves: the base run has the rest already.
        """
        flying = self.offset >= 0
        for run, site in self.record.get((self.layer, kind), ()) if joining is None else ():
            row, column, where = self.along[run.cell]
            run.keep(site, where, value[self.s.tensor(self._token(row, column))])
        work = self.work.get((self.layer, kind), ())
        value = value.clone() if work else value
        for one in work:
            chosen = flying & np.isin(self.group, one.groups)
            if joining is not None:
                chosen &= np.isin(np.arange(len(chosen)), joining) & (not one.given and not one.held)
            rows = np.nonzero(chosen)[0]
            if one.write is not None or one.made:
                for cell in np.unique(self.rows.cell[rows]).tolist():
                    self._intervene(value, one, rows[self.rows.cell[rows] == cell])
            else:
                self._put(value, one, rows)
        for site in self.read.get((self.layer, kind), ()):
            self._keep(site, value, np.nonzero(flying)[0] if joining is None else joining)
        return value

    def _put(self, value: Tensor, work: Work, rows: Ints) -> None:
        """Write the source run's value in place, or, held, the base run's."""
        new = self._whole(work)
        for row, column, part in self._written(work, rows):
            token = self._token(row, column)
            row, column, token = row[token >= 0], column[token >= 0], self.s.tensor(token[token >= 0])
            some = new[self.s.tensor(self.rows.example[row]), self.s.tensor(column)]
            if part is None:
                value[token] = some
            else:
                value[token[:, None], part] = some[:, part]

    def _whole(self, work: Work) -> Tensor:
        """What a run had at the whole site."""
        if work.held:
            return self.s.value(work.site.whole)
        assert self.s.source is not None
        return self.s.source.values[Read(work.site.whole)]

    def _exact(self, work: Work, position: int, part: int) -> Site:
        """The site at the position and part (by number) of a row's cell."""
        where = self.s.grid.positions[position]
        if not work.held:
            return self.s.grid.at(work.site, where, self.s.grid.parts[part])
        return work.site.at(where) if work.site.positions == "each" else work.site

    def _written(self, work: Work, rows: Ints) -> Iterator[tuple[Ints, Ints, list[int] | None]]:
        """(row, column, heads or neurons) of all that is written in rows; once for each choice of these."""
        where = tuple(self._exact(work, position, 0).positions for position in range(len(self.s.grid.positions)))
        columns, valid = self.s.table(where)
        for part in np.unique(self.part[rows]).tolist():
            some = rows[self.part[rows] == part]
            site = self._exact(work, 0, part)
            chosen = site.heads if site.neurons is None else site.neurons
            which, at = np.nonzero(valid[self.position[some], self.rows.example[some]])
            row = some[which]
            yield (
                row,
                columns[self.position[row], self.rows.example[row], at],
                None if chosen is None else [chosen] if isinstance(chosen, int) else list(chosen),
            )

    def _made(self, work: Work, row: int) -> tuple[Site, Intervention]:
        """What an intervention writes in the rows of one cell, and where."""
        if work.given:
            assert work.write is not None
            return work.site, work.write.for_batch(self.s.batch)
        site = self._exact(work, int(self.position[row]), int(self.part[row]))
        write = work.write
        if write is None:
            assert self.s.grid.write is not None
            write = self.s.grid.write(site)
        return site, write.for_batch(self.s.batch)

    def _intervene(self, value: Tensor, work: Work, rows: Ints) -> None:
        """Write in place, for the examples of one cell, what an intervention makes of them among the base's columns."""
        which, columns = ragged(self.rows.start[rows], self.stop[rows])
        token = self._token(rows[which], columns)
        which, columns, token = which[token >= 0], columns[token >= 0], self.s.tensor(token[token >= 0])
        example, column = self.s.tensor(self.rows.example[rows][which]), self.s.tensor(columns)
        canvas = self.s.value(work.site.whole).clone()
        canvas[example, column] = value[token].view(len(token), *canvas.shape[2:])
        site, write = self._made(work, int(rows[0]))
        new = overwrite(canvas, site, self.s.batch.where(site.positions, strict=False), write)
        value[token] = new[example, column].view(len(token), *value.shape[1:])

    def _keep(self, site: Site, value: Tensor, rows: Ints, through: Callable[[Tensor], Tensor] | None = None) -> None:
        """What rows have at a site that is read of them; or what a function makes of its tokens."""
        columns, valid = self.s.columns(site.positions)
        example = self.rows.example[rows]
        token = np.where(valid[example], self._token(rows[:, None], columns[example]), -1)
        row, at = np.nonzero(token >= 0)
        new = value[self.s.tensor(token[row, at])]
        new = new if through is None else through(new)
        if (part := site.heads if site.neurons is None else site.neurons) is not None:
            new = new[:, index(part)]
        out = self.s.reads[site]
        single = self.s.batch.where(site.positions, strict=False)
        cell = self.s.tensor(self.rows.cell[rows][row])
        if single is not None and single.columns.ndim == 1:
            out[self.s.tensor(example[row]), cell] = new
        else:
            out[self.s.tensor(example[row]), cell, self.s.tensor(at)] = new

    def _rewrite(self, kind: str, pattern: Tensor, rows: Ints, start: int) -> Tensor:
        """Writes at scores or pattern of rows with the same columns, ``row head query key``."""
        stop, width = start + pattern.shape[2], pattern.shape[3]
        place = {row: i for i, row in enumerate(rows.tolist())}
        for work in self.work.get((self.layer, kind), ()):
            chosen = rows[np.isin(self.group[rows], work.groups)]
            if work.write is None and not work.made:
                new = self._whole(work)
                for row, column, heads in self._written(work, chosen):
                    inside = (column >= start) & (column < stop)
                    row, column = row[inside], column[inside]
                    i = self.s.tensor(np.array([place[r] for r in row.tolist()], np.int64))
                    at = self.s.tensor(column - start)
                    some = new[self.s.tensor(self.rows.example[row]), :, self.s.tensor(column), :width]
                    for head in range(pattern.shape[1]) if heads is None else heads:
                        pattern[i, head, at] = some[:, head]
                continue
            for cell in np.unique(self.rows.cell[chosen]).tolist():
                some = chosen[self.rows.cell[chosen] == cell]
                i = self.s.tensor([place[r] for r in some.tolist()])
                example = self.s.tensor(self.rows.example[some])
                canvas = self.s.value(work.site.whole).clone()
                canvas[example, :, start:stop, :width] = pattern[i]
                site, write = self._made(work, int(some[0]))
                new = overwrite(canvas, site, self.s.batch.where(site.positions, strict=False), write)
                pattern[i] = new[example, :, start:stop, :width]
        return pattern


def ragged(start: Ints, stop: Ints) -> tuple[Ints, Ints]:
    """(row number, column) of every column from `start` to `stop` of each row, row after row."""
    sizes = stop - start
    rows = np.repeat(np.arange(len(sizes)), sizes)
    return rows, np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes) + np.repeat(start, sizes)
