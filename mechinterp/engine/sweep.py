"""The sweep verb, ``engine="full"``: one whole pass with plain hooks for every row of the grid.

Slow and simple: the reference for any faster way.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mechinterp.core.analyzer import Edit, Sweep, Swept, Writes
from mechinterp.core.interventions import Apply, Intervention
from mechinterp.core.tokens import Baseline, TokenBatch
from mechinterp.core.trace import Read
from mechinterp.engine.forward import Passed, forward, score
from mechinterp.errors import ExamplesError, NeedsError
from mechinterp.model.model import Model
from mechinterp.model.slices import PATTERN_KINDS, real, select
from mechinterp.sites import Position, Site, resolve


@dataclass(frozen=True)
class Grid:
    """A sweep met with a model: what its rows are.

    Attributes:
        axes: (name, entries) of every axis that the grid has.
        groups: the sites written together in each entry of the first axis.
        positions: one for each entry of the position axis; a single one without it. ``"each"`` is
            resolved batch by batch.
        parts: heads or neurons of each entry of their axis; a single None without it.
        part: which of the two, as a field of `Site`.
        writes: for explicit rows, what is written at each site of a group; None is the source run's value.
        write: for grids, what makes an intervention of a site; None writes the source run's value.
    """

    axes: tuple[tuple[str, tuple[Any, ...]], ...]
    groups: tuple[tuple[Site, ...], ...]
    positions: tuple[Position | None, ...] = (None,)
    parts: tuple[int | tuple[int, ...] | None, ...] = (None,)
    part: str = "heads"
    writes: tuple[tuple[Intervention | None, ...], ...] = ()
    write: Writes | None = None

    @classmethod
    def of(cls, sweep: Sweep, model: Model, width: int = 0) -> "Grid":
        """For batches `width` tokens wide, or with as many edits.

        Raises:
            NeedsError: heads of a site without heads, a window over sites without layers, or a cell twice.
        """
        if sweep.edits:  # nothing is written: each row is an input of its own, `width` of them
            return cls((("edit", tuple(range(width))),), ((),) * width)
        if sweep.rows:
            return cls._of_rows(sweep, model)
        sites = resolve(sweep.sites, model.dims.n_layers)
        if not sites or () in (sweep.positions, sweep.heads, sweep.neurons):
            raise NeedsError("a grid must have at least one layer, position, head and neuron. Got an empty choice")
        for cells in (sites, sweep.positions if isinstance(sweep.positions, tuple) else ()):
            if len(set(cells)) < len(cells):
                twice = next(one for i, one in enumerate(cells) if one in cells[:i])
                raise NeedsError(f"a grid has each layer and position once. Got {twice} twice")
        layered = len({s.kind for s in sites}) == 1 and all(s.layer is not None for s in sites)
        axes: list[tuple[str, tuple[Any, ...]]] = [
            ("layer", tuple(s.layer for s in sites)) if layered else ("site", tuple(str(s) for s in sites))
        ]
        groups = tuple((s,) for s in sites)
        if sweep.window > 1:
            if not layered:
                raise NeedsError(f"a window of {sweep.window} layers needs sites of one layered kind")
            before, after = sweep.window // 2, sweep.window - sweep.window // 2
            n = model.dims.n_layers
            groups = tuple(
                tuple(
                    replace(s, layer=i) for i in range(max(0, (s.layer or 0) - before), min(n, (s.layer or 0) + after))
                )
                for s in sites
            )
        positions: tuple[Position | None, ...]
        if sweep.positions == "each":
            positions = tuple(range(width))
        elif isinstance(sweep.positions, tuple):
            positions = sweep.positions
        else:
            positions = (None if sweep.positions == "all" else sweep.positions,)
        if sweep.positions == "each" or isinstance(sweep.positions, tuple):
            axes.append(("position", positions))
        part = "heads" if sweep.neurons is None else "neurons"
        parts: tuple[int | tuple[int, ...] | None, ...] = (None,)
        chosen = sweep.heads if sweep.neurons is None else sweep.neurons
        if chosen is not None:
            counts = {_count(model, site, part) for site in sites}
            count = counts.pop()
            if counts or count is None:
                raise NeedsError(f"{part}={chosen!r} needs sites with equal {part}; {sites[0]} is not such a one")
            parts = tuple(range(count)) if isinstance(chosen, str) else chosen
            name = "neuron" if part == "neurons" else next(a for a in sites[0].axes if a in ("head", "kv_head"))
            sets = any(isinstance(one, tuple) for one in parts)
            axes.append((name, tuple(_label(one) for one in parts) if sets else parts))
        return cls(tuple(axes), groups, positions, parts, part, write=sweep.write)

    @classmethod
    def _of_rows(cls, sweep: Sweep, model: Model) -> "Grid":
        rows = [
            [
                (site, None if isinstance(one, Site) else replace(one, site=site))
                for one in row
                for site in resolve(one if isinstance(one, Site) else one.site, model.dims.n_layers)
            ]
            for row in sweep.rows
        ]
        return cls(
            (("row", tuple(range(len(rows)))),),
            tuple(tuple(site for site, _ in row) for row in rows),
            writes=tuple(tuple(write for _, write in row) for row in rows),
        )

    @property
    def rows(self) -> int:
        return len(self.groups) * len(self.positions) * len(self.parts)

    def at(self, site: Site, position: Position | None, part: int | tuple[int, ...] | None) -> Site:
        """A group's site at a position and a part; None leaves the site's own."""
        chosen: dict[str, Any] = {} if part is None else {self.part: part}
        return replace(site, positions=site.positions if position is None else position, **chosen)

    def __iter__(self) -> Iterator[tuple[tuple[Site, Intervention | None], ...]]:
        """(site, what is written there, or None for the source run's value) of each row, in the order of the axes."""
        for number, group in enumerate(self.groups):
            for position, part in itertools.product(self.positions, self.parts):
                sites = [self.at(site, position, part) for site in group]
                if self.writes:
                    yield tuple(zip(sites, self.writes[number], strict=True))
                else:
                    yield tuple((site, None if self.write is None else self.write(site)) for site in sites)


def _count(model: Model, site: Site, part: str) -> int | None:
    """How many heads or neurons a site has; None where it has none."""
    if part == "neurons":
        return model.dims.d_mlp if "d_mlp" in site.axes else None
    return model.dims.n_heads if site.per_query_head else model.dims.heads(site.kind)


def _label(part: int | tuple[int, ...] | None) -> str:
    """A set of heads or neurons in a table: ``3+7``."""
    return str(part) if not isinstance(part, tuple) else "+".join(map(str, part))


def source_reads(sweep: Sweep, model: Model) -> tuple[Read, ...]:
    """What rows of an activation-patching sweep take from the source run."""
    if not sweep.patches:
        return ()
    grid = Grid.of(sweep, model, 1)
    writes = grid.writes or tuple((grid.write,) * len(group) for group in grid.groups)
    pairs = (pair for group, row in zip(grid.groups, writes, strict=True) for pair in zip(group, row, strict=True))
    return tuple(dict.fromkeys(Read(site.whole, sweep.source) for site, write in pairs if write is None))


def row_count(sweep: Sweep, model: Model, width: int, rows: Sequence[int]) -> int:
    """Passes for one batch of the given examples, the longest of `width` tokens."""
    return Grid.of(sweep, model, entries(sweep, width, rows)).rows


def entries(sweep: Sweep, width: int, rows: Sequence[int]) -> int:
    """Entries of the axis that a batch decides: its longest example's positions, or the most edits of one.

    Raises:
        NeedsError: some example has no list of edits.
    """
    if not sweep.edits:
        return width
    return max(len(sweep.edits_of(row)) for row in rows)


@torch.no_grad()
def sweep_full(
    model: Model,
    batch: TokenBatch,
    sweep: Sweep,
    source: Mapping[Read, Tensor],
    clean: Passed,
    runs: Mapping[str, Passed],
    tick: Callable[[int], None] = lambda _: None,
) -> Swept:
    """One whole pass for every row.

    Args:
        source: values of `source_reads`, all positions.
        clean: the unedited clean run, for metrics that compare.
        runs: the unedited runs by name, with the sweep's metric.
        tick: told how many rows were done.
    """
    if sweep.edits:
        return _edits(model, batch, sweep, clean, runs, tick)
    metrics = [] if sweep.metric is None else [sweep.metric]
    base_batch = batch.run(sweep.base)
    grid = Grid.of(sweep, model, int(batch.lengths.max()))
    values: list[Tensor] = []
    reads: dict[Site, list[Tensor]] = {site: [] for site in sweep.reads}
    wanted = [Read(site) for site in sweep.reads]
    if not metrics or metrics[0].site:  # a row may write after all that is read, and is run to the end all the same
        wanted.append(Read(Site("logits", positions="end")))
    held = resolve(sweep.held, model.dims.n_layers)
    whole = [Read(site.whole) for site in held]
    resting: Mapping[Read, Tensor] = {}
    if held:
        resting = forward(model, base_batch, [*whole, Read(Site("logits", positions="end"))], (), sweep.given).values
    for row in grid:
        sites = [site for site, _ in row]
        missing = torch.zeros(len(batch), dtype=torch.bool, device=batch.ids.device)
        for site in sites:
            missing |= _missing(batch, site)
        if bool(missing.all()):  # nobody here has such a row
            row, sites = (), [Site("embed")]
        writes = list(sweep.given)
        for site in held:
            chosen = site.at(sites[0].positions) if site.positions == "each" else site
            writes.append(_put(chosen, resting[Read(site.whole)], batch))
        for site, write in row:
            writes.append(_put(site, source[Read(site.whole, sweep.source)], batch) if write is None else write)
        passed = forward(model, base_batch, wanted, metrics, writes, lenient=True)
        if sweep.metric is not None:
            values.append(score(sweep.metric, base_batch, passed, clean).masked_fill(missing, float("nan")))
        for site in sweep.reads:
            reads[site].append(passed.values[Read(site)])
        tick(1)
    shape = tuple(len(entries) for _, entries in grid.axes)
    base = of_source = None
    if sweep.metric is not None:
        unedited = forward(model, base_batch, (), metrics, sweep.given) if sweep.given else runs[sweep.base]
        base = score(sweep.metric, base_batch, unedited, clean)
        if sweep.patches:
            of_source = score(sweep.metric, batch.run(sweep.source), runs[sweep.source], clean)
    return Swept(
        values=torch.stack(values, 1).reshape(len(batch), *shape) if values else None,
        axes=tuple(name for name, _ in grid.axes),
        base=base,
        source=of_source,
        reads={site: torch.stack(v, 1).reshape(len(batch), *shape, *v[0].shape[1:]) for site, v in reads.items()},
        coords=dict(grid.axes),
    )


def _put(site: Site, value: Tensor, batch: TokenBatch) -> Intervention:
    """Writes a run's value of the whole site there."""
    if site.kind in PATTERN_KINDS:
        value = value.transpose(1, 2)
    where = batch.where(site.positions, strict=False)
    if where is None and batch.left_padded and site.kind not in PATTERN_KINDS:
        where = real(batch)  # as the write will
    part = select(value, site, where)
    put = part.transpose(1, 2) if site.kind in PATTERN_KINDS and part.ndim == 4 else part
    return Apply(site, lambda old: put.to(old))


def _missing(batch: TokenBatch, site: Site) -> Tensor:
    """Examples without any position that the site names."""
    where = batch.where(site.positions, strict=False)
    if where is None or where.valid is None:
        return torch.zeros(len(batch), dtype=torch.bool, device=batch.ids.device)
    return ~(where.valid if where.valid.ndim == 1 else where.valid.any(1))


def _edits(
    model: Model,
    batch: TokenBatch,
    sweep: Sweep,
    clean: Passed,
    runs: Mapping[str, Passed],
    tick: Callable[[int], None],
) -> Swept:
    """Rows that are edited inputs, one pass for the i-th edit of every example."""
    if sweep.metric is None:
        raise NeedsError("a sweep of edited inputs must have a metric; their positions differ, so reads have no shape")
    base_batch = batch.run(sweep.base)
    width = entries(sweep, 0, batch.rows)
    todo = [sweep.edits_of(row) for row in batch.rows]
    base = runs[sweep.base] if not sweep.given else forward(model, base_batch, (), [sweep.metric], sweep.given)
    unedited = score(sweep.metric, base_batch, base, clean)
    values = unedited.new_full((len(batch), width), float("nan"))
    for j in range(width):
        rows = [i for i, edits in enumerate(todo) if j < len(edits)]
        edited = edit(base_batch, rows, [todo[i][j] for i in rows])
        passed = forward(model, edited, (), [sweep.metric], sweep.given)
        against = clean if not sweep.metric.compares else _rows(clean, sweep.metric, rows)
        values[rows, j] = score(sweep.metric, edited, passed, against)
        tick(1)
    return Swept(values, ("edit",), unedited, None, {}, {"edit": tuple(range(width))})


def _rows(passed: Passed, metric: Any, rows: Sequence[int]) -> Passed:
    return Passed(passed.values, {metric: passed.logits[metric][list(rows)]}, passed.rows)


def edit(batch: TokenBatch, rows: Sequence[int], edits: Sequence[Edit]) -> TokenBatch:
    """The chosen rows with their tokens replaced, blanked or deleted; named positions move along, or go.

    Raises:
        ExamplesError: an edit outside its example, or one that deletes a whole example.
    """
    sequences: list[list[int]] = []
    kept: list[list[int]] = []
    blanks: dict[Baseline, list[tuple[int, int]]] = {}
    for i, one in zip(rows, edits, strict=True):
        tokens = batch.ids[i][batch.mask[i]].tolist()
        positions = _positions(batch, i, one)
        if any(not 0 <= p < len(tokens) for p in positions):
            raise ExamplesError(f"{one} reaches outside example {batch.rows[i]}, which has {len(tokens)} tokens")
        keep = list(range(len(tokens)))
        if isinstance(one.tokens, str):
            blanks.setdefault(one.tokens, []).extend((len(sequences), p) for p in positions)
        elif one.tokens is None:
            keep = [p for p in keep if p not in positions]
            if not keep:
                raise ExamplesError(f"{one} deletes all of example {batch.rows[i]}; leave at least one token")
        else:
            for p, token in zip(positions, one.tokens, strict=True):
                tokens[p] = token
        sequences.append([tokens[p] for p in keep])
        kept.append(keep)
    width = max(map(len, sequences))
    ids = torch.tensor([[*s, *[0] * (width - len(s))] for s in sequences], device=batch.ids.device)
    mask = torch.tensor([[True] * len(s) + [False] * (width - len(s)) for s in sequences], device=batch.ids.device)

    positions = {
        name: tuple(keep.index(where[i]) for i, keep in zip(rows, kept, strict=True))
        for name, where in batch.positions.items()
        if all(where[i] in keep for i, keep in zip(rows, kept, strict=True))
    }
    return TokenBatch(
        ids,
        mask,
        tuple(batch.rows[i] for i in rows),
        answers=None if batch.answers is None else tuple(batch.answers[i] for i in rows),
        labels=None if batch.labels is None else tuple(batch.labels[i] for i in rows),
        positions=positions,
        blanks={name: _marked(ids, where) for name, where in blanks.items()},
    )


def _positions(batch: TokenBatch, row: int, one: Edit) -> Sequence[int]:
    """Tokens of one example that an edit is of, counted from its first."""
    if isinstance(one.positions, tuple):
        return one.positions
    where = batch.where(one.positions)
    start = int(batch.starts[row])
    if where is None:
        return range(int(batch.lengths[row]))
    columns = where.columns[row].reshape(-1)
    valid = torch.ones_like(columns, dtype=torch.bool) if where.valid is None else where.valid[row].reshape(-1)
    return [column - start for column in columns[valid].tolist()]


def _marked(ids: Tensor, where: Sequence[tuple[int, int]]) -> Tensor:
    """True at these (row, column)."""
    out = torch.zeros_like(ids, dtype=torch.bool)
    out[tuple(torch.tensor(where, device=ids.device).T)] = True
    return out
