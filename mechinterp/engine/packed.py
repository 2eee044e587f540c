"""The sweep verb, ``engine="packed"``: all rows of the grid in one wavefront, exactly.

A write at (layer, position) changes only positions from there on and layers from there on. So a row
enters at its own layer, from the base run's residual; it carries only the columns from the first one
written; keys and values before it are the base run's, shared by every row; a row that writes what is
there already is not run; and after the last layer only the metric's columns go on. All rows' tokens
are one matrix for every linear layer, and the model's own modules do the arithmetic.
"""

from collections.abc import Callable, Collection, Iterator

import numpy as np
import torch
from torch import Tensor

from mechinterp.core.analyzer import Sweep, Swept
from mechinterp.core.interventions import Add, Knockout, Mean, Noise, Project, Replace, Scale, Steer, Zero
from mechinterp.core.metrics import Function
from mechinterp.core.tokens import TokenBatch
from mechinterp.engine.cells import Cells, Rows
from mechinterp.engine.flight import Flight, Runs
from mechinterp.engine.forward import score
from mechinterp.engine.sweep import Grid
from mechinterp.errors import NeedsError
from mechinterp.model.attention import PREFIX
from mechinterp.model.model import Model
from mechinterp.model.slices import PATTERN_KINDS
from mechinterp.sites import KINDS, resolve

BUDGET = 1 << 30
"""Bytes that a sweep may take beside the model."""

_LAST = ("final_norm", "logits")


_FIXED = (Replace, Add, Scale, Zero, Mean, Noise, Project, Steer, Knockout)
"""Interventions that make of each position what does not depend on the others; a user's own may."""


def why_full(model: Model, sweep: Sweep, spans: Collection[str] = ()) -> str | None:
    """Why a sweep takes one whole pass for each row; None when it can be packed.

    Args:
        spans: names that the examples give to several tokens.
    """
    if sweep.edits:
        return "inputs are edited"
    if sweep.rows or sweep.held or sweep.neurons:
        return "not packed yet"
    written = [*resolve(sweep.sites, model.dims.n_layers)]
    given = [site for one in sweep.given for site in resolve(one.site, model.dims.n_layers)]
    for site in [*written, *given]:
        if site.per_query_head:
            return f"{site.kind} is written per query head"
        if site.kind in _LAST:
            return f"{site.kind} comes after the last layer"
    if any(site.kind in PATTERN_KINDS for site in given):
        return "what is given writes scores or pattern"
    if any(site.kind == "resid_pre" for site in given) and any(s.kind in ("embed", "resid_post") for s in written):
        return "what is given is written after the row's own site, to the same tensor"
    if sweep.reads:
        return "rows are read"
    if sweep.metric is not None and sweep.metric.positions is None:
        return f"{type(sweep.metric).__name__} needs logits at every position"
    if sweep.metric is not None and sweep.metric.positions in spans:
        return f"{type(sweep.metric).__name__} needs logits at all tokens of {sweep.metric.positions!r}"
    example = next(iter(Grid.of(sweep, model, 1)))[0][0]
    mixing = [one for one in sweep.given if not isinstance(one, _FIXED)]
    if any(s.positions != "end" and not isinstance(s.positions, int) for one in mixing for s in resolve(one.site, 1)):
        return "what is given may carry a change to earlier positions"
    several = example.positions != "end" and not isinstance(example.positions, int) and sweep.positions != "each"
    function = sweep.write is not None and not isinstance(sweep.write(example), _FIXED)
    if function and several and (sweep.window > 1 or sweep.given):
        return "a function of several positions, in several layers, may carry a change to earlier ones"
    if str(model.hf.config._attn_implementation).startswith(PREFIX):
        return "an intervention in force around it must see every row"
    tops = (model.hf, model.hf.get_submodule(model.arch.base))  # a hook there sees unedited runs, and no rows
    if any(m._forward_hooks or m._forward_pre_hooks for m in model.hf.modules() if m not in tops):
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
) -> Swept:
    """All rows of a sweep that `why_full` has nothing against.

    Args:
        budget: bytes beside the model, for caches and rows in flight; an estimate, not a limit.
        skip: leave out rows that write what is there already.
        tick: told of ("sweep_runs", unedited passes), ("sweep_rows", rows) and ("sweep_token_layers", tokens × layers).
    Raises:
        NeedsError: the budget is too small for one row.
    """
    whole = batch.right_padded()
    pieces: list[Swept] = []
    width = int(whole.lengths.max())
    size = _examples_at_once(model, sweep, whole, budget)
    if isinstance(sweep.metric, Function) or _applies(sweep, model):
        size = len(whole)  # a user's function may know the batch by heart
    for start in range(0, len(whole), size):
        some = whole.take(range(start, min(start + size, len(whole))))
        pieces.append(_Sweeping(model, some, sweep, width, tick, budget, skip).run())
    first = pieces[0]

    def join(name: str) -> Tensor | None:
        found = [getattr(piece, name) for piece in pieces]
        return None if found[0] is None else torch.cat(found)

    return Swept(join("values"), first.axes, join("base"), join("source"), {}, first.coords)


def packed_cost(model: Model, batch: TokenBatch, sweep: Sweep) -> tuple[int, int]:
    """Rows and token-layers of a sweep, known from the tokens alone."""
    whole = batch.right_padded()
    cells = Cells(model, whole, sweep, int(whole.lengths.max()))
    rows, _ = cells.rows()
    return len(rows), cells.token_layers(rows)


def _applies(sweep: Sweep, model: Model) -> bool:
    """Whether any write is a user's function."""
    writes = [write for row in Grid.of(sweep, model, 1) for _, write in row if write is not None]
    return any(not isinstance(write, _FIXED) for write in (*sweep.given, *writes))


def _examples_at_once(model: Model, sweep: Sweep, batch: TokenBatch, budget: int) -> int:
    """As many as leave half of the budget to the rows in flight."""
    d, item = model.dims, model.dtype.itemsize
    per_token = d.n_layers * (d.d_model + 2 * d.n_kv_heads * d.d_head)
    widths = {"d_model": d.d_model, "d_head": d.d_head, "d_mlp": d.d_mlp, "expert": d.n_experts}
    widths |= {"head": d.n_heads, "kv_head": d.n_kv_heads, "query": 1, "key": int(batch.lengths.max())}
    for site in {s for group in Grid.of(sweep, model).groups for s in group}:
        sizes = [widths.get(axis, 1) for axis in KINDS[site.kind].axes]
        per_token += int(np.prod(sizes)) * (1 if sweep.patches else 2)
    each = max(per_token * item, _bytes_in_flight(model)) * int(batch.lengths.max())
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
    return (4 * d.d_model + max(attention, 4 * d.d_mlp)) * model.dtype.itemsize


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
    ) -> None:
        super().__init__(model, batch, sweep, width, tick)
        self.budget, self.skip = budget, skip

    def run(self) -> Swept:
        metric = self.sweep.metric
        assert metric is not None
        base = score(metric, self.batch.run(self.sweep.base), self.base, self.clean)
        source = None
        if self.source is not None:
            source = score(metric, self.batch.run(self.sweep.source), self.source, self.clean)
        rows, missing = self.rows(self.skip)
        values = base[:, None].repeat(1, self.grid.rows)
        for chunk in self._chunks(rows):
            flight = Flight(self, chunk, self.budget)
            self._score(*flight.run(), values)
            self.tick("sweep_rows", len(chunk))
            self.tick("sweep_token_layers", flight.token_layers)
        values = values.masked_fill(torch.as_tensor(missing, device=self.device), float("nan"))
        shape = tuple(len(entries) for _, entries in self.grid.axes)
        names = tuple(name for name, _ in self.grid.axes)
        return Swept(values.reshape(len(self.lengths), *shape), names, base, source, {}, dict(self.grid.axes))

    def _chunks(self, rows: Rows) -> Iterator[Rows]:
        """Whole cells, early layers first, as many as fit into what the caches leave of the budget."""
        passes = [self.base] if self.source is None else [self.base, self.source]
        caches = sum(v.numel() * v.element_size() for one in passes for v in one.values.values())
        room = max(1, (self.budget - caches) // _bytes_in_flight(self.model))
        rows = rows.take(np.lexsort((rows.cell, rows.enters)))
        firsts = np.nonzero(np.diff(rows.cell, prepend=-1))[0]  # a cell's examples are neighbours
        sizes = np.add.reduceat(rows.length - rows.start, firsts) if len(rows) else firsts
        begin, total = 0, 0
        for first, size in zip(firsts.tolist(), sizes.tolist(), strict=True):
            if total and total + size > room:
                yield rows.take(slice(begin, first))
                begin, total = first, 0
            total += size
        if total:
            yield rows.take(slice(begin, len(rows)))

    def _score(self, rows: Rows, final: Tensor, values: Tensor) -> None:
        """Put the metric of rows, whose final norms at its column are given, into ``example cell``."""
        metric = self.sweep.metric
        assert metric is not None
        wanted, examples = metric.rows(self.batch), len(self.lengths)
        base = self.base.logits[metric]
        of_base = self.batch.run(self.sweep.base)
        cells = np.unique(rows.cell)
        # A callable sees one cell at a time, as it would in passes of its own.
        step = 1 if isinstance(metric, Function) else max(1, self.budget // (16 * base[0].numel() * 4 * examples))
        for begin in range(0, len(cells), step):
            some = cells[begin : begin + step]
            which = np.nonzero((rows.cell >= some[0]) & (rows.cell <= some[-1]))[0]
            cell = np.searchsorted(some, rows.cell[which])
            logits = base.repeat(len(some), *[1] * (base.ndim - 1))
            place = self.tensor(cell * examples + rows.example[which])
            logits[place] = self.model.unembed(final[self.tensor(which)], wanted)
            many = of_base.take(list(range(examples)) * len(some))
            reference = None
            if metric.compares and self.clean is not None:
                reference = self.clean.logits[metric].repeat(len(some), *[1] * (base.ndim - 1))
            got = metric.score(logits, many, wanted, reference)
            values[self.tensor(rows.example[which]), self.tensor(rows.cell[which])] = got[place].to(values.dtype)
