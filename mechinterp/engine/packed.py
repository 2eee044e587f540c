"""The sweep verb, ``engine="packed"``: all rows of the grid in one wavefront, exactly.

A write at (layer, position) changes only positions from there on and layers from there on. So a row
enters at its own layer, from the base run's residual; it carries only the columns from the first one
written; keys and values before it are the base run's, shared by every row; a row that writes what is
there already is not run; and after the last layer only the metric's columns go on. All rows' tokens
are one matrix for every linear layer, and the model's own modules do the arithmetic.
"""

import contextlib
import itertools
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mechinterp.core.analyzer import Sweep, Swept
from mechinterp.core.interventions import Apply, Intervention
from mechinterp.core.metrics import Function
from mechinterp.core.tokens import TokenBatch
from mechinterp.core.trace import Read
from mechinterp.engine.forward import Passed, forward, score
from mechinterp.engine.sweep import Grid
from mechinterp.errors import NeedsError
from mechinterp.model.attention import PREFIX, raw_scores, register, softmax
from mechinterp.model.hooks import route
from mechinterp.model.model import Model
from mechinterp.model.slices import PATTERN_KINDS, overwrite
from mechinterp.sites import KINDS, Site, resolve

BUDGET = 1 << 30
"""Bytes that a sweep may take beside the model."""

Ints: TypeAlias = npt.NDArray[np.int64]
Bools: TypeAlias = npt.NDArray[np.bool_]

_SPREADS = ("embed", "resid_pre", "attn_in", "k", "k_normed", "k_rot", "v")
"""Kinds whose change at a column reaches later columns in the same layer; others reach them in the next."""
_MODULES = {
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "q_normed": "self_attn.q_norm",
    "k_normed": "self_attn.k_norm",
    "mlp_gate": "mlp.gate_proj",
    "mlp_up": "mlp.up_proj",
    "router": "mlp.gate",
}
_LAST = ("final_norm", "logits")


def why_full(model: Model, sweep: Sweep) -> str | None:
    """Why a sweep takes one whole pass for each row; None when it can be packed."""
    if sweep.edits:
        return "inputs are edited"
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
        budget: bytes beside the model, for caches and rows in flight.
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
        pieces.append(_Sweeping(model, some, sweep, budget, skip, tick, width).run())
    first = pieces[0]

    def join(name: str) -> Tensor | None:
        found = [getattr(piece, name) for piece in pieces]
        return None if found[0] is None else torch.cat(found)

    return Swept(join("values"), first.axes, join("base"), join("source"), {}, first.coords)


def packed_cost(model: Model, batch: TokenBatch, sweep: Sweep) -> tuple[int, int]:
    """Rows and token-layers of a sweep, known from the tokens alone."""
    whole = batch.right_padded()
    cells = _Cells(model, whole, sweep, int(whole.lengths.max()))
    rows, _ = cells.rows()
    return len(rows), cells.token_layers(rows)


def _applies(sweep: Sweep, model: Model) -> bool:
    """Whether any write is a user's function."""
    writes = [] if sweep.write is None else [sweep.write(resolve(sweep.sites, model.dims.n_layers)[0])]
    return any(isinstance(write, Apply) for write in (*sweep.given, *writes))


def _examples_at_once(model: Model, sweep: Sweep, batch: TokenBatch, budget: int) -> int:
    """As many as leave half of the budget to the rows in flight."""
    d, item = model.dims, model.dtype.itemsize
    per_token = d.n_layers * (d.d_model + 2 * d.n_kv_heads * d.d_head)
    widths = {"d_model": d.d_model, "d_head": d.d_head, "d_mlp": d.d_mlp, "expert": d.n_experts}
    widths |= {"head": d.n_heads, "kv_head": d.n_kv_heads, "query": 1, "key": int(batch.lengths.max())}
    for site in {s for group in Grid.of(sweep, model).groups for s in group}:
        sizes = [widths.get(axis, 1) for axis in KINDS[site.kind].axes]
        per_token += int(np.prod(sizes)) * (1 if sweep.patches else 2)
    each = per_token * item * int(batch.lengths.max())
    if each * 2 > budget:
        raise NeedsError(
            f"a budget of {budget / 1e6:.0f} MB is too small for one example of {int(batch.lengths.max())} tokens,"
            f" whose base run alone keeps {each / 1e6:.0f} MB; give at least {2 * each / 1e6:.0f} MB"
        )
    return max(1, min(len(batch), budget // (2 * each)))


@dataclass
class _Rows:
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

    def take(self, which: Any) -> "_Rows":
        return _Rows(*(getattr(self, name)[which] for name in _Rows.__dataclass_fields__))


class _Cells:
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
        heads, positions = len(self.grid.heads), len(self.grid.positions)
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

    def rows(self, skip: bool = True) -> tuple[_Rows, Bools]:
        """The rows that must be run, and (``example cell``) which cells an example lacks.

        Args:
            skip: leave out rows that write what is there already.
        """
        examples, none = len(self.lengths), np.iinfo(np.int64).max
        first = self._first_difference() if self.sweep.patches and skip else np.zeros(examples, np.int64)
        missing = np.zeros((examples, self.grid.rows), bool)
        heads = len(self.grid.heads)
        found: list[_Rows] = []
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
                site.kind in _SPREADS and site.layer == entry.layer for site in group
            )
            cell, example = (each.ravel() for each in np.meshgrid(cells, some, indexing="ij"))
            length = self.lengths[example]
            enters = (entry.layer or 0) + (entry.kind == "resid_post")
            found.append(
                _Rows(
                    cell,
                    example,
                    start[example],
                    length if spreads else stop[example],
                    length,
                    np.full(len(cell), enters),
                    np.full(len(cell), spreads),
                )
            )
        return _Rows(
            *(np.concatenate([getattr(rows, name) for rows in found]) for name in _Rows.__dataclass_fields__)
        ), missing

    def token_layers(self, rows: _Rows) -> int:
        """Tokens × layers that rows carry, all columns of the last layer included."""
        later = self.model.dims.n_layers - rows.enters
        entry = np.where(rows.spreads, 0, rows.stop - rows.length)
        return int(((rows.length - rows.start) * later + np.where(later > 0, entry, 0)).sum())


class _Sweeping(_Cells):
    """One sweep over a few examples: its unedited runs, its rows in flight, its scores."""

    def __init__(
        self,
        model: Model,
        batch: TokenBatch,
        sweep: Sweep,
        budget: int,
        skip: bool,
        tick: Callable[[str, int], None],
        width: int,
    ) -> None:
        super().__init__(model, batch, sweep, width)
        self.budget, self.skip, self.tick = budget, skip, tick
        self.device = batch.ids.device
        self._passes()

    def _passes(self) -> None:
        """The base run, the source run, and the clean run where a metric compares."""
        model, sweep, n = self.model, self.sweep, self.model.dims.n_layers
        metrics = [] if sweep.metric is None else [sweep.metric]
        kept = [Site(kind, i) for kind in ("resid_pre", "k_rot", "v") for i in range(n)] + [Site("resid_post", n - 1)]
        if not sweep.patches:  # an intervention sees all columns, and those before a row's first are the base's
            kept += [site.whole for group in self.grid.groups for site in group]
        kept += [site.whole for one in sweep.given for site in resolve(one.site, n)]
        reads = [Read(site) for site in dict.fromkeys(kept)]
        self.base = forward(model, self.batch.run(sweep.base), reads, metrics, sweep.given)
        self.tick("sweep_runs", 1)
        self.source: Passed | None = None
        if sweep.patches:
            wanted = dict.fromkeys(Read(site.whole) for group in self.grid.groups for site in group)
            self.source = forward(model, self.batch.run(sweep.source), list(wanted), metrics)
            self.tick("sweep_runs", 1)
        self.clean: Passed | None = None
        if sweep.metric is not None and sweep.metric.compares:
            self.clean = forward(model, self.batch, (), metrics)
            self.tick("sweep_runs", 1)

    def value(self, site: Site) -> Tensor:
        """What the base run had at a whole site."""
        return self.base.values[Read(site)]

    def residual(self, layer: int) -> Tensor:
        """The base run's residual stream entering a layer, or, one beyond the last, leaving it."""
        n = self.model.dims.n_layers
        return self.value(Site("resid_pre", layer) if layer < n else Site("resid_post", n - 1))

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
            flight = _Flight(self, chunk)
            self._score(*flight.run(), values)
            self.tick("sweep_rows", len(chunk))
            self.tick("sweep_token_layers", flight.token_layers)
        values = values.masked_fill(torch.as_tensor(missing, device=self.device), float("nan"))
        shape = tuple(len(entries) for _, entries in self.grid.axes)
        names = tuple(name for name, _ in self.grid.axes)
        return Swept(values.reshape(len(self.lengths), *shape), names, base, source, {}, dict(self.grid.axes))

    def _chunks(self, rows: _Rows) -> Iterator[_Rows]:
        """Whole cells, early layers first, as many as fit into what the caches leave of the budget."""
        d, item = self.model.dims, self.model.dtype.itemsize
        passes = [self.base] if self.source is None else [self.base, self.source]
        caches = sum(v.numel() * v.element_size() for one in passes for v in one.values.values())
        attention = 5 * d.n_heads * d.d_head + 4 * d.n_kv_heads * d.d_head
        room = max(1, (self.budget - caches) // ((4 * d.d_model + max(attention, 4 * d.d_mlp)) * item))
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

    def _score(self, rows: _Rows, final: Tensor, values: Tensor) -> None:
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

    def tensor(self, numbers: Any) -> Tensor:
        return torch.as_tensor(numbers, device=self.device)


class _Flight:
    """A chunk of rows on their way through the layers.

    A row's tokens lie side by side in the packed matrix, from `offset` on: its columns `start` to `stop`.
    """

    def __init__(self, sweeping: _Sweeping, rows: _Rows) -> None:
        self.s, self.model, self.rows = sweeping, sweeping.model, rows
        self.stop = rows.stop.copy()
        self.offset = np.full(len(rows), -1, np.int64)
        self.slot: Ints | None = None
        """In the last layer, where the tokens are that were kept; -1 for others."""
        self.column = np.zeros(0, np.int64)
        """Of every token."""
        self.layer = 0
        self.token_layers = 0
        self.z: Tensor | None = None
        self.group, self.position, self.head = sweeping.of_cell(rows.cell)
        rotary: Any = self.model.hf.get_submodule(f"{self.model.arch.base}.rotary_emb")
        resid = sweeping.residual(0)
        self.rotary: tuple[Tensor, Tensor] = rotary(resid[:1], torch.arange(resid.shape[1], device=resid.device)[None])
        self.work = self._work()

    def _work(self) -> dict[tuple[int, str], list[tuple[Site, Intervention | None, Ints]]]:
        """(layer, kind) → writes there, what is given first: (site of a group, what or None to patch, groups)."""
        out: dict[tuple[int, str], list[tuple[Site, Intervention | None, Ints]]] = defaultdict(list)
        sweep, n = self.s.sweep, self.model.dims.n_layers
        every = np.unique(self.group)
        for one in sweep.given:
            for site in resolve(one.site, n):
                if site.kind == "resid_pre" and site.layer:  # tokens that join are given it already
                    out[site.layer - 1, "resid_post"].append((site, one, every))
                elif site.kind not in ("embed", "resid_pre"):
                    out[site.layer or 0, site.kind].append((site, one, every))
        members: dict[Site, list[int]] = defaultdict(list)
        for group in every.tolist():
            for site in self.s.grid.groups[group]:
                members[site].append(group)
        for site, groups in members.items():
            out[site.layer or 0, site.kind].append((site, None, np.array(groups)))
        return out

    def run(self) -> tuple[_Rows, Tensor]:
        """The rows that reach the metric, and the final norm's output at its column of each."""
        n, arch = self.model.dims.n_layers, self.model.arch
        metric = self.s.sweep.metric
        columns, _ = self.s.columns("end" if metric is None else metric.positions)
        at = columns[self.rows.example, 0]
        tokens = self.s.residual(0).new_empty(0, self.model.dims.d_model)
        with _packed(self.model):
            for layer in range(int(self.rows.enters.min()), n):
                self.layer = layer
                tokens = self._through(tokens, at if self.layer == n - 1 else None)
        self.layer = n
        tokens = self._join(tokens, np.nonzero(self.rows.enters == n)[0])
        place = self._token(np.arange(len(self.rows)), at)
        reached = np.nonzero(place >= 0)[0]
        norm: Any = self.model.hf.get_submodule(f"{arch.base}.{arch.norm}")
        return self.rows.take(reached), norm(tokens[self.s.tensor(place[reached])][None])[0]

    def _through(self, tokens: Tensor, only: Ints | None) -> Tensor:
        """One decoder layer; in the last, only the metric's columns go on after attention."""
        layer: Any = self.model.hf.get_submodule(self.model.arch.layer(self.layer))
        new = self.rows.enters == self.layer
        tokens = self._join(tokens, np.nonzero(new & self.rows.spreads)[0])
        suffixes = len(tokens)
        local = np.nonzero(new & ~self.rows.spreads)[0]
        tokens = self._join(tokens, local)
        if not len(tokens):
            return tokens
        self.token_layers += len(tokens)
        tokens = self._act("resid_pre", self._act("embed", tokens) if self.layer == 0 else tokens)
        cos, sin = (each[:, self.s.tensor(self.column)] for each in self.rotary)
        with self._hooked(layer):
            attn = layer.self_attn(
                hidden_states=self._act("attn_in", layer.input_layernorm(tokens[None])[0])[None],
                position_embeddings=(cos, sin),
                attention_mask=None,
                mechinterp=self,
            )[0][0]
            attn = self._act("attn_out", self._heads(layer.self_attn.o_proj, attn))
            if only is not None:
                keep = self._token(np.arange(len(self.rows)), only)
                keep = np.unique(keep[keep >= 0])
                self.slot = np.full(len(tokens), -1, np.int64)
                self.slot[keep] = np.arange(len(keep))
                tokens, attn = tokens[self.s.tensor(keep)], attn[self.s.tensor(keep)]
            tokens = self._act("resid_mid", tokens + attn)
            mlp_in = self._act("mlp_in", layer.post_attention_layernorm(tokens[None])[0])
            tokens = self._act("resid_post", tokens + self._act("mlp_out", layer.mlp(mlp_in[None])[0]))
        if only is not None or not len(local):
            return tokens
        ends, sizes = tokens[suffixes:], self.stop[local] - self.rows.start[local]
        tokens, self.column = tokens[:suffixes], self.column[:suffixes]
        self.stop[local] = self.rows.length[local]
        self.layer += 1
        tokens = self._join(tokens, local, enter=False)
        self.layer -= 1
        _, columns = _ragged(self.rows.start[local], self.rows.start[local] + sizes)
        tokens[self.s.tensor(self._token(np.repeat(local, sizes), columns))] = ends
        return tokens

    def _join(self, tokens: Tensor, rows: Ints, enter: bool = True) -> Tensor:
        """Append the tokens of rows, from the base run's residual entering the layer."""
        if not len(rows):
            return tokens
        which, columns = _ragged(self.rows.start[rows], self.stop[rows])
        base = self.s.residual(self.layer)
        some = base[self.s.tensor(self.rows.example[rows][which]), self.s.tensor(columns)]
        sizes = self.stop[rows] - self.rows.start[rows]
        self.offset[rows] = len(tokens) + np.cumsum(sizes) - sizes
        if self.slot is not None:  # after the last layer
            self.slot = np.concatenate([self.slot[: len(self.column)], np.arange(len(some)) + len(tokens)])
            self.offset[rows] += len(self.column) - len(tokens)
        self.column = np.concatenate([self.column, columns])
        tokens = torch.cat([tokens, some])
        if enter:  # a write at the end of the layer before is where such a row begins
            self.layer -= 1
            tokens = self._act("resid_post", tokens, rows)
            self.layer += 1
        return tokens

    def _token(self, rows: Ints, columns: Ints) -> Ints:
        """Where a column of a row is in the packed matrix; -1 where it is not carried."""
        inside = (self.offset[rows] >= 0) & (columns >= self.rows.start[rows]) & (columns < self.stop[rows])
        at = np.where(inside, self.offset[rows] + columns - self.rows.start[rows], -1)
        return at if self.slot is None else np.where(inside, self.slot[at], -1)

    # Writes.

    def _act(self, kind: str, value: Tensor, rows: Ints | None = None) -> Tensor:
        """Everything that is written at a kind of site of this layer: ``token [head] width``.

        Args:
            rows: only of these.
        """
        work = self.work.get((self.layer, kind))
        if not work:
            return value
        value = value.clone()
        flying = self.offset >= 0
        for site, given, groups in work:
            chosen = flying & np.isin(self.group, groups)
            if rows is not None:
                chosen &= np.isin(np.arange(len(chosen)), rows) & (given is None)
            if given is not None or not self.s.sweep.patches:
                for cell in np.unique(self.rows.cell[chosen]).tolist():
                    self._intervene(value, site, given, np.nonzero(chosen & (self.rows.cell == cell))[0])
                continue
            for row, column, heads in self._written(site, np.nonzero(chosen)[0]):
                token = self._token(row, column)
                row, column, token = row[token >= 0], column[token >= 0], token[token >= 0]
                assert self.s.source is not None
                source = self.s.source.values[Read(site.whole)]
                new = source[self.s.tensor(self.rows.example[row]), self.s.tensor(column)]
                if heads is None:
                    value[self.s.tensor(token)] = new
                else:
                    value[self.s.tensor(token)[:, None], heads] = new[:, heads]
        return value

    def _written(self, site: Site, rows: Ints) -> Iterator[tuple[Ints, Ints, list[int] | None]]:
        """(row, column, heads) of everything that rows write at a group's site; once for each choice of heads."""
        for position, head in itertools.product(np.unique(self.position[rows]), np.unique(self.head[rows])):
            some = rows[(self.position[rows] == position) & (self.head[rows] == head)]
            where, one = self.s.grid.positions[position], self.s.grid.heads[head]
            columns, valid = self.s.columns(site.positions if where is None else where)
            chosen = site.heads if one is None else one
            heads = None if chosen is None else [chosen] if isinstance(chosen, int) else list(chosen)
            which, at = np.nonzero(valid[self.rows.example[some]])
            yield some[which], columns[self.rows.example[some][which], at], heads

    def _site(self, site: Site, row: int) -> Site:
        """A group's site at the position and head of a row's cell."""
        position, head = self.s.grid.positions[self.position[row]], self.s.grid.heads[self.head[row]]
        return replace(
            site,
            positions=site.positions if position is None else position,
            heads=site.heads if head is None else head,
        )

    def _intervene(self, value: Tensor, site: Site, given: Intervention | None, rows: Ints) -> None:
        """Write in place, for the examples of one cell, what an intervention makes of them among the base's columns."""
        which, columns = _ragged(self.rows.start[rows], self.stop[rows])
        token = self._token(rows[which], columns)
        which, columns, token = which[token >= 0], columns[token >= 0], self.s.tensor(token[token >= 0])
        example, column = self.s.tensor(self.rows.example[rows][which]), self.s.tensor(columns)
        canvas = self.s.value(site.whole).clone()
        canvas[example, column] = value[token].view(len(token), *canvas.shape[2:])
        if given is None:
            site = self._site(site, int(rows[0]))
            assert self.s.sweep.write is not None
            given = self.s.sweep.write(site)
        where = self.s.batch.where(site.positions, strict=False)
        new = overwrite(canvas, site, where, given.for_rows(self.s.batch.rows))
        value[token] = new[example, column].view(len(token), *value.shape[1:])

    @contextlib.contextmanager
    def _hooked(self, layer: Any) -> Generator[None]:
        """Writes at the outputs and inputs of modules inside attention and MLP."""
        handles: list[Any] = []

        def out(kind: str) -> Callable[..., Any]:
            def hook(module: Any, args: Any, output: Any) -> Any:
                old: Tensor = output[0] if isinstance(output, tuple) else output
                heads = self.model.dims.heads(kind)
                packed = old.reshape(-1, old.shape[-1]) if heads is None else old.view(len(self.column), heads, -1)
                new = self._act(kind, packed).view(old.shape)
                return (new, *route(module, new)) if isinstance(output, tuple) else new

            return hook

        def into(module: Any, args: Any) -> Any:
            return (self._act("mlp_act", args[0][0])[None], *args[1:])

        for kind, path in _MODULES.items():
            if (self.layer, kind) in self.work:
                handles.append(layer.get_submodule(path).register_forward_hook(out(kind)))
        if (self.layer, "mlp_act") in self.work:
            handles.append(layer.mlp.down_proj.register_forward_pre_hook(into))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _heads(self, projection: Any, attn: Tensor) -> Tensor:
        """Writes at head_out: a change of the sum."""
        if (self.layer, "head_out") not in self.work:
            return attn
        assert self.z is not None
        old = torch.einsum("the,hed->thd", self.z, self.model.W_O(self.layer))
        return attn + (self._act("head_out", old) - old).sum(1)

    # Attention.

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """What queries make of their own row's keys and, before them, the base run's: ``1 token head d_head``."""
        query, key = (self._act(k, x[0].transpose(0, 1)) for k, x in (("q_rot", query), ("k_rot", key)))
        value = value[0].transpose(0, 1)
        z = torch.empty_like(query)
        flying = np.nonzero(self.offset >= 0)[0]
        spread = self.rows.spreads[flying] | (self.rows.enters[flying] < self.layer)
        shapes = np.stack([self.rows.start[flying], self.stop[flying], spread], 1)
        for shape in np.unique(shapes, axis=0):
            start, stop, whole = (int(n) for n in shape)
            rows = flying[(shapes == shape).all(1)]
            size = max(1, self.s.budget // 16 // (stop * 2 * query[0].numel() * query.element_size()))
            for begin in range(0, len(rows), size):
                self._group(z, query, key, value, rows[begin : begin + size], start, stop, bool(whole), scaling)
        self.z = self._act("z", z)
        return self.z[None]

    def _group(
        self,
        z: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rows: Ints,
        start: int,
        stop: int,
        whole: bool,
        scaling: float,
    ) -> None:
        """Attention of rows with the same columns. Rows that have not spread yet see the base run's keys alone."""
        at = self.s.tensor(self.offset[rows][:, None] + np.arange(stop - start))
        example = self.s.tensor(self.rows.example[rows])
        seen = start if whole else stop
        keys, values = (self.s.value(Site(kind, self.layer))[example, :seen] for kind in ("k_rot", "v"))
        if whole:
            keys, values = torch.cat([keys, key[at]], 1), torch.cat([values, value[at]], 1)
        columns = torch.arange(stop, device=at.device)
        distance = columns[start:, None] - columns
        visible = distance >= 0
        if (window := self.model.dims.windows[self.layer]) is not None:
            visible &= distance < window
        some, keys, values = (x.transpose(1, 2) for x in (query[at], keys, values))
        out = torch.nn.functional.scaled_dot_product_attention(
            some, keys, values, attn_mask=visible, scale=scaling, enable_gqa=True
        )
        z[at] = out.transpose(1, 2)
        patterned = rows[self._patterned(rows)]
        if len(patterned):
            which = np.nonzero(np.isin(rows, patterned))[0]
            pick = self.s.tensor(which)
            z[at[pick]] = self._explicit(patterned, some[pick], keys[pick], values[pick], visible, start, scaling)

    def _patterned(self, rows: Ints) -> Bools:
        groups = [g for kind in PATTERN_KINDS for _, _, g in self.work.get((self.layer, kind), ())]
        return np.isin(self.group[rows], np.concatenate(groups)) if groups else np.zeros(len(rows), bool)

    def _explicit(
        self, rows: Ints, query: Tensor, key: Tensor, value: Tensor, visible: Tensor, start: int, scaling: float
    ) -> Tensor:
        """z of rows whose scores or patterns are written, ``row query head d_head``."""
        scores = raw_scores(query, key, scaling).masked_fill(~visible, float("-inf"))
        scores = self._rewrite("scores", scores, rows, start).masked_fill(~visible, float("-inf"))
        pattern = self._rewrite("pattern", softmax(scores, query.dtype, False), rows, start).masked_fill(~visible, 0.0)
        batch, heads, queries, keys = pattern.shape
        grouped = pattern.reshape(batch, value.shape[1], -1, keys)
        return (grouped @ value).view(batch, heads, queries, -1).transpose(1, 2)

    def _rewrite(self, kind: str, pattern: Tensor, rows: Ints, start: int) -> Tensor:
        """Writes at scores or pattern of rows with the same columns, ``row head query key``."""
        stop, width = start + pattern.shape[2], pattern.shape[3]
        for site, _, groups in self.work.get((self.layer, kind), ()):
            chosen = rows[np.isin(self.group[rows], groups)]
            place = {row: i for i, row in enumerate(rows.tolist())}
            if self.s.sweep.patches:
                assert self.s.source is not None
                source = self.s.source.values[Read(site.whole)]
                for row, column, heads in self._written(site, chosen):
                    inside = (column >= start) & (column < stop)
                    row, column = row[inside], column[inside]
                    i = self.s.tensor([place[r] for r in row.tolist()])
                    new = source[self.s.tensor(self.rows.example[row]), :, self.s.tensor(column), :width]
                    at = self.s.tensor(column - start)
                    if heads is None:
                        pattern[i, :, at] = new
                    else:
                        for head in heads:
                            pattern[i, head, at] = new[:, head]
                continue
            for cell in np.unique(self.rows.cell[chosen]).tolist():
                some = chosen[self.rows.cell[chosen] == cell]
                i = self.s.tensor([place[r] for r in some.tolist()])
                example = self.s.tensor(self.rows.example[some])
                canvas = self.s.value(site.whole).clone()
                canvas[example, :, start:stop, :width] = pattern[i]
                exact = self._site(site, int(some[0]))
                assert self.s.sweep.write is not None
                write = self.s.sweep.write(exact).for_rows(self.s.batch.rows)
                new = overwrite(canvas, exact, self.s.batch.where(exact.positions, strict=False), write)
                pattern[i] = new[example, :, start:stop, :width]
        return pattern


def _ragged(start: Ints, stop: Ints) -> tuple[Ints, Ints]:
    """(row number, column) of every column from `start` to `stop` of each row, row after row."""
    sizes = stop - start
    rows = np.repeat(np.arange(len(sizes)), sizes)
    return rows, np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes) + np.repeat(start, sizes)


@contextlib.contextmanager
def _packed(model: Model) -> Generator[None]:
    """The model's attention goes to the flight that calls it."""
    config: Any = model.hf.config
    kernel = config._attn_implementation
    config._attn_implementation = register(str(kernel).removeprefix(PREFIX))
    try:
        yield
    finally:
        config._attn_implementation = kernel
