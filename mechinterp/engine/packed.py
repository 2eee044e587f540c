"""The sweep verb, ``engine="packed"``: all rows of the grid in one wavefront, exactly.

A write at (layer, position) changes only positions from there on and layers from there on. So a row
enters at its own layer, from the base run's residual; it carries only the columns from the first one
written; keys and values before it are the base run's, shared by every row; a row that writes what is
there already is not run; and after the last layer only the metric's columns go on. All rows' tokens
are one matrix for every linear layer, and the model's own modules do the arithmetic.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from mechinterp.core.analyzer import Sweep, Swept, Writes
from mechinterp.core.interventions import Add, Intervention, Knockout, Mean, Noise, Project, Replace, Scale, Steer, Zero
from mechinterp.core.metrics import Function
from mechinterp.core.tokens import TokenBatch
from mechinterp.engine.cells import Cells, Ints, Rows
from mechinterp.engine.flight import Flight
from mechinterp.engine.forward import forward, out_of_memory, score
from mechinterp.engine.runs import Known, Runs
from mechinterp.engine.sweep import Grid, entries
from mechinterp.errors import NeedsError
from mechinterp.model.attention import PREFIX
from mechinterp.model.autoencoder import EditFeatures
from mechinterp.model.hooks import CAPTURING
from mechinterp.model.model import Model
from mechinterp.model.slices import PATTERN_KINDS, select
from mechinterp.sites import KINDS, Site, resolve

BUDGET = 1 << 30
"""Bytes that a sweep may take beside the model."""
TOKENS = 1 << 12
"""Tokens in flight at most on a CPU, where larger tensors gain nothing and are given back to the system each time."""
HELD = 1.5
"""Bytes held for each byte in use: between tensors of many sizes an allocator has some that it cannot hand out."""
_FIXED = (Replace, Add, Scale, Zero, Mean, Noise, Project, Steer, Knockout, EditFeatures)
"""Interventions that make of each position what does not depend on the others; a user's own may."""


def why_full(model: Model, sweep: Sweep, spans: Collection[str] = ()) -> str | None:
    """Why a sweep takes one whole pass for each row; None when it can be packed.

    Args:
        spans: names that the examples give to several tokens.
    """
    if sweep.metric is not None and (at := sweep.metric.site) is not None:
        if sweep.edits:
            return "the metric is of a site, and inputs are edited"
        sweep = replace(sweep, metric=None, reads=(*sweep.reads, at.at(sweep.metric.positions)))
    grid = Grid.of(sweep, model, 1)
    written = [site for group in grid.groups for site in group]
    given = [site for one in sweep.given for site in resolve(one.site, model.dims.n_layers)]
    held = resolve(sweep.held, model.dims.n_layers)
    for what, sites in (("written", [*written, *given, *held]), ("read", sweep.reads)):
        if split := next((site for site in sites if site.per_query_head), None):
            return f"{split.kind} is {what} per query head"
    if any(site.kind == "logits" for site in (*written, *given, *held)):
        return "logits are written, after all that can be packed"
    if any(site.kind in PATTERN_KINDS for site in given):
        return "what is given writes scores or pattern"
    if any(site.kind in PATTERN_KINDS for site in sweep.reads):
        return "rows are read at scores or pattern"
    if any(s.kind == "attn_out" for s in sweep.reads) and any(s.kind == "resid_mid" for s in (*written, *given, *held)):
        return "attn_out is read, of which a write at resid_mid is a change"
    if any(site.positions == "each" for site in held) and sweep.positions is None:
        return "what is held follows positions that the sites have themselves"
    for group, writes in zip(grid.groups, grid.writes, strict=False):
        places = [
            {(s.layer, s.kind) for s, w in zip(group, writes, strict=True) if (w is None) is p} for p in (True, False)
        ]
        if places[0] & places[1]:
            return "a row patches and edits one place, in an order of its own"
    if given and sweep.edits:
        return "inputs are edited, and something is given at their positions"
    twins = any(site.kind in ("embed", "resid_post") for site in (*written, *held, *sweep.reads))
    if any(site.kind == "resid_pre" for site in given) and twins:
        return "what is given is written after the row's own site, to the same tensor"
    return _mixes(sweep, grid, spans) or watched(model)


def _mixes(sweep: Sweep, grid: Grid, spans: Collection[str]) -> str | None:
    """Whether a user's function may carry a change to earlier positions."""

    def several(site: Site) -> bool:
        where = site.positions
        return where in spans or (where != "end" and not isinstance(where, int | str))

    if any(_function(one) and several(site) for one in sweep.given for site in resolve(one.site, 1)):
        return "what is given may carry a change to earlier positions"
    if sweep.positions == "each" or not _applies(sweep.write, grid):
        return None
    for row in grid:
        if (sweep.given or len(row) > 1) and any(_function(write) and several(site) for site, write in row):
            return "a function of several positions, in several layers, may carry a change to earlier ones"
    return None


def watched(model: Model) -> str | None:
    """Whether somebody must see every row in a pass of its own."""
    if model.backend is not None:
        return f"{model.backend.name} runs the model, a whole pass at a time"
    if str(model.hf.config._attn_implementation).startswith(PREFIX):
        return "an intervention in force around it must see every row"
    tops = (model.hf, model.hf.get_submodule(model.arch.base))  # a hook there sees unedited runs, and no rows
    hooks = (
        h
        for m in model.hf.modules()
        if m not in tops
        for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())
    )
    if any(getattr(hook, "__module__", None) != CAPTURING for hook in hooks):
        return "hooks, or interventions in force around it, must see every row"
    if len({p.device for p in model.hf.parameters()}) > 1:
        return "the model lies on several devices"
    return None


@torch.no_grad()
def sweep_packed(
    model: Model,
    batch: TokenBatch,
    sweep: Sweep,
    *,
    budget: int = BUDGET,
    skip: bool = True,
    tick: Callable[[str, int], None] = lambda what, n: None,
    known: Known | None = None,
) -> Swept:
    """All rows of a sweep that `why_full` has nothing against.

    Args:
        budget: bytes beside the model, for caches and rows in flight; an estimate, not a limit.
        skip: leave out rows that write what is there already.
        known: where a sweep of edits keeps its unedited runs, for the next one on the same examples.
        tick: told of ("sweep_runs", unedited passes), ("sweep_rows", rows) and ("sweep_token_layers", tokens × layers).
    Raises:
        NeedsError: the budget is too small for one row.
    """
    if sweep.metric is not None and (at := sweep.metric.site) is not None:
        inner = replace(sweep, metric=None, reads=(*sweep.reads, at.at(sweep.metric.positions)))
        found = sweep_packed(model, batch, inner, budget=budget, skip=skip, tick=tick, known=known)
        return _scored(model, batch, sweep, found, tick)
    whole = batch.right_padded()
    pieces: list[Swept] = []
    width = entries(sweep, int(whole.lengths.max()), whole.rows)
    size = _examples_at_once(model, sweep, whole, budget)
    functions = any(map(_function, sweep.given)) or _applies(sweep.write, Grid.of(sweep, model, 1))
    if isinstance(sweep.metric, Function) or functions:
        size = len(whole)  # a user's function may know the batch by heart
    for start in range(0, len(whole), size):
        some = whole.take(range(start, min(start + size, len(whole))))
        pieces.append(_Sweeping(model, some, sweep, width, tick, budget, skip, known).run())
    first = pieces[0]
    shape = [len(each) for _, each in first.coords.items()]
    reads = {site: _joined(batch, site, [piece.reads[site] for piece in pieces]) for site in sweep.reads}
    reads = {site: value.unflatten(1, shape) for site, value in reads.items()}

    def join(name: str) -> Tensor | None:
        found = [getattr(piece, name) for piece in pieces]
        return None if found[0] is None else torch.cat(found)

    return Swept(join("values"), first.axes, join("base"), join("source"), reads, first.coords)


def _scored(model: Model, batch: TokenBatch, sweep: Sweep, found: Swept, tick: Callable[[str, int], None]) -> Swept:
    """The metric of what rows have at its site, in place of that."""
    metric = sweep.metric
    assert metric is not None and metric.site is not None
    reads = dict(found.reads)
    at = metric.site.at(metric.positions)
    values = reads[at] if at in sweep.reads else reads.pop(at)
    shape = values.shape[: 1 + len(found.axes)]
    cells = values.flatten(1, len(found.axes)).transpose(0, 1)  # cell example *site
    scores = torch.stack([metric.score(cell, batch, None, None) for cell in cells], 1).reshape(shape)
    whole = batch.right_padded()
    gone = Cells(model, whole, sweep, entries(sweep, int(whole.lengths.max()), whole.rows)).rows()[1]
    missing = torch.as_tensor(gone, device=scores.device).reshape(shape)
    ends: list[Tensor | None] = [None, None]
    for i, run in enumerate([sweep.base, sweep.source] if sweep.patches else [sweep.base]):
        writes = sweep.given if i == 0 else ()
        ends[i] = score(metric, batch.run(run), forward(model, batch.run(run), (), [metric], writes))
        tick("sweep_runs", 1)
    return Swept(scores.masked_fill(missing, float("nan")), found.axes, ends[0], ends[1], reads, found.coords)


def _joined(batch: TokenBatch, site: Site, pieces: list[Tensor]) -> Tensor:
    """``example cell ...`` of all examples; all positions stand where the batch has them, padding is NaN."""
    where = batch.where(site.positions, strict=False)
    if where is not None and where.columns.ndim == 2:  # a span may be shorter in some pieces
        wide = max(piece.shape[2] for piece in pieces)
        gaps = [[0, 0] * (piece.ndim - 3) + [0, wide - piece.shape[2]] for piece in pieces]
        pad = torch.nn.functional.pad
        return torch.cat([pad(piece, gap, value=float("nan")) for piece, gap in zip(pieces, gaps, strict=True)])
    if where is not None:
        return torch.cat(pieces)
    width = batch.ids.shape[1]
    out = pieces[0].new_full((len(batch), pieces[0].shape[1], width, *pieces[0].shape[3:]), float("nan"))
    row = 0
    for piece in pieces:
        for one in piece:
            start, length = int(batch.starts[row]), int(batch.lengths[row])
            out[row, :, start : start + length] = one[:, :length]
            row += 1
    return out


def packed_cost(model: Model, batch: TokenBatch, sweep: Sweep) -> tuple[int, int]:
    """Rows and token-layers of a sweep, known from the tokens alone; edited inputs that begin alike take fewer."""
    whole = batch.right_padded()
    cells = Cells(model, whole, sweep, entries(sweep, int(whole.lengths.max()), whole.rows))
    rows, _ = cells.rows()
    return len(rows), cells.token_layers(rows)


def _applies(made: Writes | None, grid: Grid) -> bool:
    """Whether rows write what a user's function makes; a grid's `write` makes one kind of intervention everywhere."""
    if grid.writes:
        return any(map(_function, (write for row in grid.writes for write in row)))
    sites = grid.groups[0] if grid.groups else ()
    return made is not None and any(_function(made(grid.at(s, grid.positions[0], grid.parts[0]))) for s in sites)


def _function(write: Intervention | None) -> bool:
    return write is not None and not isinstance(write, _FIXED)


def _examples_at_once(model: Model, sweep: Sweep, batch: TokenBatch, budget: int) -> int:
    """As many as leave half of the budget to the rows in flight."""
    d, item = model.dims, model.dtype.itemsize * HELD
    per_token = d.n_layers * (d.d_model + 2 * d.n_kv_heads * d.d_head)
    widths = {"d_model": d.d_model, "d_head": d.d_head, "d_mlp": d.d_mlp, "expert": d.n_experts}
    widths |= {"head": d.n_heads, "kv_head": d.n_kv_heads, "query": 1, "key": int(batch.lengths.max())}
    written = {site.whole for group in Grid.of(sweep, model).groups for site in group}
    for site in [*written, *(site.whole for site in (*resolve(sweep.held, d.n_layers), *sweep.reads))]:
        sizes = [widths.get(axis, 1) for axis in KINDS[site.kind].axes]
        per_token += int(np.prod(sizes)) * (1 if sweep.patches else 2)
    each = int(max(per_token * item, _bytes_in_flight(model))) * int(batch.lengths.max())
    if each * 2 > budget:
        raise NeedsError(
            f"a budget of {budget / 1e6:.3g} MB is too small for one example of {int(batch.lengths.max())} tokens,"
            f" whose base run, or one row, takes {each / 1e6:.3g} MB; give at least {2 * each / 1e6:.3g} MB"
        )
    return max(1, min(len(batch), budget // (2 * each)))


def _bytes_in_flight(model: Model) -> int:
    """What one token takes at the widest place of a layer."""
    d = model.dims
    attention = 5 * d.n_heads * d.d_head + 4 * d.n_kv_heads * d.d_head
    return (4 * d.d_model + max(attention, 4 * d.d_mlp)) * int(model.dtype.itemsize * HELD)


class _Sweeping(Runs):
    """One sweep over a few examples: its rows in chunks, and their scores."""

    def __init__(
        self,
        model: Model,
        batch: TokenBatch,
        sweep: Sweep,
        width: int,
        tick: Callable[[str, int], None],
        budget: int,
        skip: bool,
        known: Known | None = None,
    ) -> None:
        super().__init__(model, batch, sweep, width, tick, known)
        self.budget, self.skip = budget, skip
        self.values: Tensor | None = None
        """The metric of every row, ``example cell``."""
        self.ends: tuple[Tensor | None, Tensor | None] = (None, None)
        """The metric of the base and the source run."""

    def run(self) -> Swept:
        """`reads` are ``example cell *site`` here."""
        rows, missing = self.rows(self.skip)
        aboard = self.board(rows, min(TOKENS, self.budget // 2 // _bytes_in_flight(self.model)), self.skip)
        if not self.along or not self._fly(aboard):
            self.passes()
            self._unedited()
            for chunk in self._chunks(rows):
                self._fly(chunk)
        values = self.values
        if values is not None:
            values = values.masked_fill(torch.as_tensor(missing, device=self.device), float("nan"))
            values = values.reshape(len(self.lengths), *(len(entries) for _, entries in self.grid.axes))
        names = tuple(name for name, _ in self.grid.axes)
        return Swept(values, names, *self.ends, self.reads, dict(self.grid.axes))

    def _unedited(self) -> None:
        """What the unedited runs give, which is what rows have that are not run."""
        metric, sweep = self.sweep.metric, self.sweep
        if metric is not None:
            base = score(metric, self.batch.run(sweep.base), self.base, self.clean)
            source = self.source and score(metric, self.batch.run(sweep.source), self.source, self.clean)
            self.ends, self.values = (base, source), base[:, None].repeat(1, self.grid.rows)
        for site in sweep.reads:
            whole = select(self.value(site.whole), site, self.batch.where(site.positions, strict=False))
            self.reads[site] = whole[:, None].repeat(1, self.grid.rows, *[1] * (whole.ndim - 1))

    def _fly(self, rows: Rows) -> bool:
        """Take a chunk of rows through the model; halved, and halved again, when memory runs out.

        False if it ran out with the unedited runs among the rows, which are not parted from them.
        """
        try:
            flying, carrier = self.sharing(rows)
            flight = Flight(self, flying, carrier, self.budget)
            row, which, final = flight.run()
            if self.along:
                self.land(flying, row, final)
                self._unedited()
            if self.values is not None:
                self._score(flying, row, which, final, self.values)
        except (RuntimeError, MemoryError) as error:
            cells = np.unique(rows.cell)
            if not out_of_memory(error) or (len(cells) == 1 and not self.along):
                raise
            half = rows.cell < cells[len(cells) // 2]
        else:
            own = rows.cell < self.grid.rows
            unedited = int((rows.length - rows.start)[~own].sum()) * self.model.dims.n_layers
            self.tick("sweep_rows", int(own.sum()))
            self.tick("sweep_token_layers", flight.token_layers - unedited)
            return True
        if self.along:
            return False
        self.budget = max(1, self.budget // 2)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        for part in (rows.take(half), rows.take(~half)):
            self._fly(part)
        return True

    def _chunks(self, rows: Rows) -> Iterator[Rows]:
        """Whole cells, early layers first, as many as fit into what the caches leave of the budget."""
        passes = [self.base] if self.source is None else [self.base, self.source]
        caches = int(HELD * sum(v.numel() * v.element_size() for one in passes for v in one.values.values()))
        rows = rows.take(np.lexsort((rows.cell, rows.enters)))
        firsts = np.nonzero(np.diff(rows.cell, prepend=-1))[0]  # a cell's examples are neighbours
        sizes = np.add.reduceat(rows.length - rows.start, firsts) if len(rows) else firsts
        begin, total = 0, 0
        for first, size in zip(firsts.tolist(), sizes.tolist(), strict=True):
            room = max(1, (self.budget - caches) // _bytes_in_flight(self.model))
            room = room if self.device.type == "cuda" else min(room, TOKENS)
            if total and total + size > room:
                yield rows.take(slice(begin, first))
                begin, total = first, 0
            total += size
        if total:
            yield rows.take(slice(begin, len(rows)))

    def _score(self, rows: Rows, row: Ints, which: Ints, final: Tensor, values: Tensor) -> None:
        """Put the metric of rows into ``example cell``.

        Args:
            final: final norms of `row` at the metric's column number `which`.
        """
        metric = self.sweep.metric
        assert metric is not None
        wanted, base, every = self.base.rows[metric], self.base.logits[metric], metric.positions is None
        where = self.batch.where(metric.positions)
        several = where is None or where.columns.ndim == 2
        for some, slots, examples, cells in self._together(rows, base[0].numel()):
            place = np.full(len(rows), -1)
            place[some] = slots
            at = np.nonzero(place[row] >= 0)[0]
            logits, to = base[self.tensor(examples)], self.tensor(place[row[at]])
            new = self.model.unembed(final[self.tensor(at)], wanted)
            if several:
                logits[to, self.tensor(which[at])] = new
            else:
                logits[to] = new
            inputs = self.batch.run(self.sweep.base)
            if self.edited is None:
                inputs = inputs.take(examples.tolist())
            else:
                inputs = self.edited.take(self.place[examples, cells].tolist())
            reference = None
            if metric.compares and self.clean is not None:
                reference = self.clean.logits[metric][self.tensor(examples)]
            width = inputs.ids.shape[1]
            logits, reference = (x[:, :width] if every and x is not None else x for x in (logits, reference))
            assert logits is not None
            got = metric.score(logits, inputs, wanted, reference)[self.tensor(slots)]
            values[self.tensor(rows.example[some]), self.tensor(rows.cell[some])] = got.to(values.dtype)

    def _together(self, rows: Rows, size: int) -> Iterator[tuple[Ints, Ints, Ints, Ints]]:
        """Rows to score at once, where they stand among what is scored, and the examples and cells of all that is.

        A callable sees every example of one cell, as it would in passes of its own.
        """
        if not isinstance(self.sweep.metric, Function):
            step, every = max(1, self.budget // (64 * size)), np.nonzero(rows.cell < self.grid.rows)[0]
            for begin in range(0, len(every), step):
                some = every[begin : begin + step]
                yield some, np.arange(len(some)), rows.example[some], rows.cell[some]
            return
        for cell in np.unique(rows.cell):
            some = np.nonzero(rows.cell == cell)[0]
            having = np.arange(len(self.lengths)) if self.edited is None else np.nonzero(self.place[:, cell] >= 0)[0]
            yield some, np.searchsorted(having, rows.example[some]), having, np.full(len(having), cell)
