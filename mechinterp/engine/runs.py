"""The unedited runs that rows of a packed sweep begin from, and whose values they write."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from mechinterp.core.analyzer import Sweep
from mechinterp.core.metrics import Function, Metric
from mechinterp.core.tokens import Baseline, TokenBatch
from mechinterp.core.trace import Read
from mechinterp.engine.cells import Cells, Ints, Rows
from mechinterp.engine.forward import Passed, forward
from mechinterp.model.model import Model
from mechinterp.model.slices import PATTERN_KINDS
from mechinterp.sites import Site, resolve

TOGETHER = 256
"""Tokens of a run up to which the base and the source run go through the layers among the rows."""
Known: TypeAlias = dict[Any, tuple["Passed", "Passed | None"]]
"""The base and the clean run of the latest sweep of edits, by what they depend on."""


@dataclass(frozen=True, eq=False)
class Along:
    """An unedited run that goes through the layers among the rows, as rows of a cell of its own."""

    cell: int
    sites: tuple[Site, ...]
    """What is kept of it."""
    shape: tuple[int, int]
    """Examples and columns."""
    values: dict[Read, Tensor]
    logits: dict[Metric, Tensor]
    passed: Passed
    """The same two, as a pass gives them; complete once the rows have landed."""

    @classmethod
    def of(cls, model: Model, batch: TokenBatch, metric: Metric, cell: int, sites: Iterable[Site]) -> "Along":
        embed: Any = model.hf.get_submodule(f"{model.arch.base}.{model.arch.embed}")
        known = embed(batch.ids)
        values: dict[Read, Tensor] = {Read(Site("resid_pre", 0)): known, Read(Site("embed")): known}
        logits: dict[Metric, Tensor] = {}
        shape = (len(batch), batch.ids.shape[1])
        return cls(cell, tuple(sites), shape, values, logits, Passed(values, logits, {metric: metric.rows(batch)}))

    def keep(self, site: Site, where: tuple[Tensor, Tensor], value: Tensor) -> None:
        """Put what tokens have at a site where a pass would have put it; zeros stand where none was carried."""
        whole = value.new_zeros(*self.shape, *value.shape[1:])
        whole[where] = value
        self.values[Read(site)] = whole


class Runs(Cells):
    """The cells with their unedited runs: what rows begin from, and what they write."""

    def __init__(
        self,
        model: Model,
        batch: TokenBatch,
        sweep: Sweep,
        width: int,
        tick: Callable[[str, int], None],
        known: Known | None,
    ) -> None:
        super().__init__(model, batch, sweep, width)
        self.tick, self.shared = tick, known is not None
        """Whether the unedited runs are kept for another sweep of edits."""
        self.known: Known = {} if known is None else known
        self.device = batch.ids.device
        self.held = resolve(sweep.held, model.dims.n_layers)
        self.reads: dict[Site, Tensor] = {}
        """What rows have at sites, ``example cell *site``; the base run's where a row is not run."""
        self.along: tuple[Along, ...] = ()
        """The base and the source run, where they go through the layers among the rows."""
        self.source: Passed | None = None
        self.clean: Passed | None = None

    def board(self, rows: Rows, room: int, skip: bool) -> Rows:
        """Give the base and the source run a place among the rows, in front, where that is cheaper and changes nothing.

        A pass of few tokens costs what reading the weights costs, which the rows pay anyway. Where an example has
        several edited inputs, its base run is made before: they may share more of it than they carry.

        Args:
            room: tokens that may be in flight.
        """
        model, sweep, metric = self.model, self.sweep, self.sweep.metric
        patched, edited = self._sites()
        alone = sweep.edits and len(rows) and not self.shared and np.bincount(rows.example).max() == 1
        if metric is None or edited or not (sweep.patches or alone) or not self._plain(metric):
            return rows
        kept, nothing = self._caches(), np.zeros_like(self.lengths)
        if (rows.enters == (n := model.dims.n_layers)).any():
            kept.append(Site("resid_post", n - 1))
        runs = [(sweep.base, kept, nothing)]
        if sweep.patches:
            first = self._first_difference() if skip else nothing
            columns, _ = self.columns(metric.positions)
            runs.append((sweep.source, patched, np.minimum(first, columns.min(1))))
        size = sum(int((self.lengths - start).sum()) for *_, start in runs) + int((rows.length - rows.start).sum())
        if size > room or any(site.kind in PATTERN_KINDS for site in patched):
            return rows
        self.along = tuple(
            Along.of(model, self.batch.run(run), metric, self.grid.rows + i, dict.fromkeys(sites))
            for i, (run, sites, _) in enumerate(runs)
        )
        self.base, *others = (each.passed for each in self.along)
        self.source = others[0] if others else None
        every = np.arange(len(self.lengths))
        riders = [
            Rows(nothing + run.cell, every, start, self.lengths, self.lengths, nothing, nothing == 0)
            for run, (_, _, start) in zip(self.along, runs, strict=True)
        ]
        return Rows.joined([*riders, rows])

    def _plain(self, metric: Metric) -> bool:
        """Whether the unedited runs are few tokens, of which nobody asks more than the metric at one position."""
        sweep, model = self.sweep, self.model
        tops = (model.hf, model.hf.get_submodule(model.arch.base))  # hooks there are to see unedited runs
        ours = type(metric).__module__ == Metric.__module__  # another may know its batch
        where = self.batch.where(metric.positions)
        return (
            ours
            and not isinstance(metric, Function)
            and where is not None
            and where.columns.ndim == 1
            and not metric.compares
            and not (sweep.given or self.held or sweep.reads)
            and self.batch.ids.numel() <= TOGETHER
            and not any(top._forward_hooks or top._forward_pre_hooks for top in tops)
        )

    def land(self, rows: Rows, row: Ints, final: Tensor) -> None:
        """The logits of the runs that went along, from the final norms of rows at the metric's column.

        Args:
            row: of each of `final`.
        """
        self.tick("sweep_runs", 1)
        for run in self.along:
            at = np.nonzero(rows.cell[row] == run.cell)[0]
            ((metric, wanted),) = run.passed.rows.items()
            new = self.model.unembed(final[self.tensor(at)], wanted)
            run.logits[metric] = new[self.tensor(np.argsort(rows.example[row[at]]))]

    def passes(self) -> None:
        """The base run, the source run, and the clean run where a metric compares."""
        model, sweep, n = self.model, self.sweep, self.model.dims.n_layers
        metrics = [] if sweep.metric is None else [sweep.metric]
        self.along = ()
        which = self.batch.rows, sweep.base, sweep.metric, sweep.given
        if sweep.edits and which in self.known:
            self.base, self.clean = self.known[which]
            return
        patched, edited = self._sites()
        kept = [*self._caches(), Site("resid_post", n - 1)]
        kept += edited  # an intervention sees all columns, and those before a row's first are the base's
        kept += [site.whole for one in sweep.given for site in resolve(one.site, n)]
        kept += [site.whole for site in (*self.held, *sweep.reads)]
        if sweep.given and not metrics:
            kept.append(Site("final_norm"))  # something may be given there
        reads, wanted = ([Read(site) for site in dict.fromkeys(sites)] for sites in (kept, patched))
        self.base = forward(model, self.batch.run(sweep.base), reads, metrics, sweep.given)
        self.source = forward(model, self.batch.run(sweep.source), wanted, metrics) if sweep.patches else None
        self.clean = forward(model, self.batch, (), metrics) if metrics and metrics[0].compares else None
        self.tick("sweep_runs", 1 + sweep.patches + (self.clean is not None))
        if sweep.edits:
            self.known.clear()
            self.known[which] = self.base, self.clean

    def _caches(self) -> list[Site]:
        """What rows begin from, and attend to."""
        return [Site(kind, i) for kind in ("resid_pre", "k_rot", "v") for i in range(self.model.dims.n_layers)]

    def _sites(self) -> tuple[list[Site], list[Site]]:
        """The whole sites at which source values are written, and those where interventions act."""
        patched: dict[Site, None] = {}
        edited: dict[Site, None] = {}
        for number, group in enumerate(self.grid.groups):
            for i, site in enumerate(group):
                write = self.grid.writes[number][i] if self.grid.writes else self.grid.write
                (patched if write is None else edited)[site.whole] = None
        return list(patched), list(edited)

    def value(self, site: Site) -> Tensor:
        """What the base run had at a whole site."""
        return self.base.values[Read(site)]

    def residual(self, layer: int) -> Tensor:
        """The base run's residual stream entering a layer, or, one beyond the last, leaving it."""
        n = self.model.dims.n_layers
        return self.value(Site("resid_pre", layer) if layer < n else Site("resid_post", n - 1))

    def entering(self, layer: int, rows: Rows, which: Ints, columns: Ints) -> Tensor:
        """What tokens of rows that join at a layer begin from: the base run's residual, or their own embedding."""
        if self.edited is None:
            example, column = self.tensor(rows.example[which]), self.tensor(columns)
            out = self.residual(layer)[example, column]
            for run in self.along if layer == 0 else ():
                own = self.tensor(rows.cell[which] == run.cell)
                out[own] = run.values[Read(Site("embed"))][example[own], column[own]]
            return out
        at, own = (each[which] for each in self.placed(rows))
        out = self.residual(0).new_empty(len(at), self.model.dims.d_model)
        place, mine = (self.tensor(at[~own]), self.tensor(columns[~own])), self.tensor(own)
        embed: Any = self.model.hf.get_submodule(f"{self.model.arch.base}.{self.model.arch.embed}")
        blanks: dict[Baseline, Tensor] = {name: blank[place] for name, blank in self.edited.blanks.items()}
        out[~mine] = self.model.blanked(embed(self.edited.ids[place][None])[0], blanks)
        out[mine] = self.residual(0)[self.tensor(rows.example[which][own]), self.tensor(columns[own])]
        return out

    def tensor(self, numbers: Any) -> Tensor:
        return torch.as_tensor(numbers, device=self.device)
