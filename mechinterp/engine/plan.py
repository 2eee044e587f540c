"""Plan: the passes that a set of analyzers costs, known before anything runs.

`compile_round` merges the needs of all analyzers of a round into the fewest passes; `Plan` shows
them; the runner carries them out.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from mechinterp.core.analyzer import Analyzer, Grad, Needs, Sweep, as_reads
from mechinterp.core.display import html_table
from mechinterp.core.examples import Examples
from mechinterp.core.metrics import Metric
from mechinterp.core.tokens import Tokens
from mechinterp.core.trace import Read, Run
from mechinterp.engine.backward import passes_along
from mechinterp.engine.packed import packed_cost, why_full
from mechinterp.engine.sweep import Grid, row_count, source_reads
from mechinterp.errors import ExamplesError, MechinterpError, NeedsError
from mechinterp.model.model import Model, as_examples
from mechinterp.sites import KINDS, Site, Sites, resolve

TOKENS_PER_BATCH = 8192
EXAMPLES_PER_BATCH = 64


@dataclass(frozen=True)
class Round:
    """The merged work of the analyzers of one round.

    Attributes:
        reads: what the shared pass of each run must give: all analyzers' reads, and what sweeps patch with.
        metrics: metrics of each unedited run that sweeps compare with.
        own: examples of analyzers' own → all reads from them.
    """

    analyzers: tuple[Analyzer, ...]
    needs: tuple[Needs, ...]
    declared: tuple[tuple[Read, ...], ...]
    reads: Mapping[Run, tuple[Read, ...]]
    metrics: Mapping[Run, tuple[Metric, ...]]
    own: Mapping[Examples, tuple[Read, ...]]
    grads: Mapping[Grad, tuple[tuple[Site, ...], tuple[Read, ...]]]
    """Every run that is differentiated: at which sites, and what is read of it."""
    sweeps: Mapping[Sweep, str | None]
    """Every sweep, and why it takes one whole pass for each row; None where it is packed."""

    @property
    def uses_examples(self) -> bool:
        return bool(any(self.reads.values()) or any(self.metrics.values()) or self.grads or self.sweeps)

    def observes(self, index: int) -> bool:
        """Whether an analyzer sees batches: it declared something, be it only examples of its own."""
        need = self.needs[index]
        return bool(self.declared[index] or need.grads or need.sweeps)

    def runs(self) -> list[Run]:
        return [run for run in _RUNS if self.reads[run] or self.metrics[run]]


_RUNS: tuple[Run, ...] = ("clean", "corrupted")


def compile_round(
    model: Model, analyzers: Sequence[Analyzer], engine: str = "packed", tokens: Tokens | None = None
) -> Round:
    """Merge what the analyzers need. Equal reads, gradients, sweeps and examples are done once.

    Args:
        engine: ``"packed"`` where that can be, or ``"full"``.
        tokens: all examples, where there are any.
    Raises:
        SiteError: an analyzer needs a site that the model lacks; the message names the analyzer.
        ExamplesError: a sweep's position lies outside every example.
    """
    layers = model.dims.n_layers
    needs: list[Needs] = []
    declared: list[tuple[Read, ...]] = []
    reads: dict[Run, dict[Read, None]] = {"clean": {}, "corrupted": {}}
    metrics: dict[Run, dict[Metric, None]] = {"clean": {}, "corrupted": {}}
    own: dict[Examples, dict[Read, None]] = {}
    grads: dict[Grad, tuple[dict[Site, None], dict[Read, None]]] = {}
    sweeps: dict[Sweep, str | None] = {}
    for analyzer in analyzers:
        try:
            need = analyzer.needs(model)
            wanted = as_reads(need.reads, layers)
            for read in wanted:
                model.check(read.site)
                reads[read.of][read] = None
            for one in need.on.values():
                for read in as_reads(one.reads, layers):
                    model.check(read.site)
                    own.setdefault(one.examples, {})[read] = None
            for grad in need.grads.values():
                at, beside = grads.setdefault(grad.run(layers), ({}, {}))
                for site in resolve(grad.sites, layers):
                    model.check(site, "gradient")
                    at[site] = None
                for site in resolve(grad.reads, layers):
                    model.check(site)
                    beside[Read(site, grad.of)] = None
                for read in _mixed(grad, layers):
                    model.check(read.site, "write")
                    reads[read.of][read] = None
                _compare(grad.metric, metrics)
            for sweep in need.sweeps.values():
                _check_sweep(model, sweep, tokens)
                spans = () if tokens is None else tokens.spans
                sweeps[sweep] = "engine='full' was asked for" if engine == "full" else why_full(model, sweep, spans)
                if sweeps[sweep] is None:
                    continue  # it makes passes of its own, over as many examples as fit its budget
                for read in source_reads(sweep, model):
                    reads[read.of][read] = None
                if sweep.metric is not None:
                    _compare(sweep.metric, metrics)
                    if not sweep.given:
                        metrics[sweep.base][sweep.metric] = None
                    if sweep.patches:
                        metrics[sweep.source][sweep.metric] = None
        except MechinterpError as error:
            error.args = (f"{analyzer.name}: {error}",)
            raise
        needs.append(need)
        declared.append(wanted)
    return Round(
        tuple(analyzers),
        tuple(needs),
        tuple(declared),
        {run: tuple(r) for run, r in reads.items()},
        {run: tuple(m) for run, m in metrics.items()},
        {examples: tuple(r) for examples, r in own.items()},
        {run: (tuple(at), tuple(beside)) for run, (at, beside) in grads.items()},
        sweeps,
    )


def _check_sweep(model: Model, sweep: Sweep, tokens: Tokens | None) -> None:
    """Raise unless every cell is a place in the model and in some example."""
    for site in sweep.reads:
        model.check(site)
    for site in resolve(sweep.held, model.dims.n_layers):
        model.check(site, "write")
    if sweep.edits:
        return
    grid = Grid.of(sweep, model, 1)
    for group, part in itertools.product(grid.groups, grid.parts):
        for site in group:
            model.check(grid.at(site, None, part), "write")
    if tokens is None:
        return
    longest = max(tokens.lengths)
    asked = sweep.positions if isinstance(sweep.positions, tuple) else (sweep.positions,)
    listed = [site for group in grid.groups for site in group] if sweep.rows else []
    places = [("", position) for position in asked]
    places += [
        (f"{site}: ", position)
        for site in listed
        for position in (site.positions if isinstance(site.positions, tuple) else (site.positions,))
    ]
    for site, position in places:
        if isinstance(position, int) and not -longest <= position < longest:
            raise ExamplesError(
                f"{site}position {position} is outside every example; the longest has {longest} tokens, so give one"
                f" from {-longest} to {longest - 1}, or a name"
            )


def _mixed(grad: Grad, layers: int) -> list[Read]:
    """What of both runs is mixed in a run on the path between them."""
    runs: tuple[Run, Run] = ("clean", "corrupted")
    sites = [site.whole for where, _ in grad.between for site in resolve(where, layers)]
    return [Read(site, run) for site in sites for run in runs]


def _compare(metric: Metric, metrics: dict[Run, dict[Metric, None]]) -> None:
    if metric.compares:
        metrics["clean"][metric] = None


@dataclass(frozen=True)
class PlannedPass:
    """One line of the plan."""

    what: str
    run: str
    users: tuple[str, ...]
    examples: int
    batches: int
    """Passes that are made; along a path of gradients, several for each batch."""
    layers: int
    """Decoder layers that are run in each pass."""
    reads: int
    rows: int
    """1, or the rows of a sweep: its cells × examples, but for those that change nothing."""
    token_layers: int
    """Tokens × layers, padding left out."""
    held: int
    """Bytes of what is read, for the largest batch, before analyzers reduce it."""


@dataclass(frozen=True)
class Plan:
    """The passes of the first round. Later rounds depend on what the first one finds."""

    passes: tuple[PlannedPass, ...]
    notes: tuple[str, ...] = field(default=())
    """How each sweep is run, and why."""

    @property
    def token_layers(self) -> int:
        return sum(p.token_layers for p in self.passes)

    def __str__(self) -> str:
        lines = [_HEAD, *([f"{c:,}" if isinstance(c, int) else c for c in row] for row in self._rows())]
        widths = [max(len(line[i]) for line in lines) for i in range(len(_HEAD))]
        rows = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        return "\n".join([*rows, self._total(), *self.notes])

    def _repr_html_(self) -> str:
        return html_table(_HEAD, self._rows(), "; ".join([self._total(), *self.notes]))

    def _rows(self) -> list[tuple[str | int, ...]]:
        return [
            (
                p.what,
                p.run,
                p.examples,
                p.batches,
                p.layers,
                p.reads,
                p.rows,
                p.token_layers,
                f"{p.held / 1e6:.1f} MB",
                ", ".join(p.users),
            )
            for p in self.passes
        ]

    def _total(self) -> str:
        return f"total {self.token_layers:,} tokens × layers in the first round; an analyzer may ask for another"


_HEAD = ("pass", "run", "examples", "batches", "layers", "reads", "rows", "token-layers", "held", "shared by")


def plan(
    model: Model,
    examples: Any,
    analyzers: Analyzer | Sequence[Analyzer],
    *,
    engine: str = "packed",
    batch_size: int | None = None,
) -> Plan:
    """The passes that `run` with the same arguments will make in its first round. Runs nothing.

    Raises:
        SiteError, ExamplesError, NeedsError: as `run` would.
    """
    chosen = [analyzers] if isinstance(analyzers, Analyzer) else list(analyzers)
    tokens = None if examples is None else model.tokenize(as_examples(examples))
    return describe(model, tokens, compile_round(model, chosen, engine, tokens), batch_size)


def describe(model: Model, tokens: Tokens | None, work: Round, batch_size: int | None) -> Plan:
    """The plan of one round."""
    passes: list[PlannedPass] = []
    notes: list[str] = []
    if work.uses_examples:
        if tokens is None:
            raise NeedsError(f"{', '.join(a.name for a in work.analyzers)} need examples to run on; give some")
        if tokens.corrupted is None and (work.reads["corrupted"] or work.metrics["corrupted"]):
            tokens.batch([0]).run("corrupted")  # says what is missing
        size = batch_size or default_batch_size(tokens)
        batches = tokens.batches(size)
        total = sum(tokens.lengths)
        widest = max((len(b) * max(tokens.lengths[i] for i in b) for b in batches), default=0)
        longest = max(tokens.lengths)

        def longest_of(rows: tuple[int, ...], lengths: tuple[int, ...] = tokens.lengths) -> int:
            return max(lengths[i] for i in rows)

        for run in work.runs():
            reads, metrics = work.reads[run], work.metrics[run]
            users = _users(work, partial(_touches, run=run))
            depth = _depth(model, [r.site for r in reads], bool(metrics))
            held = sum(_bytes(model, r, widest, longest, len(batches[-1])) for r in reads)
            passes.append(
                PlannedPass("forward", run, users, len(tokens), len(batches), depth, len(reads), 1, total * depth, held)
            )
        for run, (sites, beside) in work.grads.items():
            users = _users(
                work, lambda need, _, run=run: run in {g.run(model.dims.n_layers) for g in need.grads.values()}
            )
            held = sum(_bytes(model, r, widest, longest, len(batches[-1])) for r in [*map(Read, sites), *beside])
            n, count = model.dims.n_layers, len(sites) + len(beside)
            if run.of == "corrupted" and tokens.corrupted is None:
                tokens.batch([0]).run("corrupted")  # says what is missing
            points = 1 if run.along is None else len(run.along.shares)
            cost = 2 * total * n * points
            times = sum(1 if run.along is None else passes_along(run.along, len(b), longest_of(b)) for b in batches)
            passes.append(PlannedPass("backward", run.of, users, len(tokens), times, n, count, points, cost, held))
        for sweep, why in work.sweeps.items():
            users = _users(work, lambda need, _, sweep=sweep: sweep in need.sweeps.values())
            n = model.dims.n_layers
            if why is None:
                if sweep.patches and tokens.corrupted is None and "corrupted" in (sweep.base, sweep.source):
                    tokens.batch([0]).run("corrupted")  # says what is missing
                costs = [packed_cost(model, tokens.batch(b), sweep) for b in batches]
                rows, cost = sum(r for r, _ in costs), sum(c for _, c in costs)
                runs = [sweep.base, *([sweep.source] if sweep.patches else [])]
                runs += ["clean"] if sweep.metric is not None and sweep.metric.compares else []
                own, each = ", ".join(runs), total * n * len(runs)
                passes.append(PlannedPass("sweep runs", own, users, len(tokens), len(batches), n, 0, 1, each, 0))
                notes.append(f"sweep of {_named(sweep)}: packed, {rows:,} rows in one wavefront")
            else:
                counts = [row_count(sweep, model, max(tokens.lengths[i] for i in b), b) for b in batches]
                rows = sum(r * len(b) for r, b in zip(counts, batches, strict=True))
                cost = n * sum(r * sum(tokens.lengths[i] for i in b) for r, b in zip(counts, batches, strict=True))
                notes.append(f"sweep of {_named(sweep)}: one whole pass for each row, because {why}")
            passes.append(
                PlannedPass("sweep", sweep.base, users, len(tokens), len(batches), n, len(sweep.reads), rows, cost, 0)
            )
    for own, reads in work.own.items():
        users = _users(work, lambda need, _, own=own: own in {o.examples for o in need.on.values()})
        names = dict.fromkeys(name for need in work.needs for name, o in need.on.items() if o.examples == own)
        mine = model.tokenize(own)
        size = batch_size or default_batch_size(mine)
        depth = _depth(model, [r.site for r in reads], False)
        widest, longest = min(size, len(mine)) * max(mine.lengths), max(mine.lengths)
        held = sum(_bytes(model, r, widest, longest, min(size, len(mine))) for r in reads)
        passes.append(
            PlannedPass(
                "forward",
                f"own: {', '.join(names)}",
                users,
                len(mine),
                len(mine.batches(size)),
                depth,
                len(reads),
                1,
                sum(mine.lengths) * depth,
                held,
            )
        )
    return Plan(tuple(passes), tuple(notes))


def default_batch_size(tokens: Tokens) -> int:
    """Depends on the examples alone, so that adding an analyzer leaves every batch as it was."""
    return max(1, min(EXAMPLES_PER_BATCH, TOKENS_PER_BATCH // max(tokens.lengths)))


def _named(sweep: Sweep) -> str:
    if sweep.edits:
        return "edited inputs"
    sites = sweep.sites if isinstance(sweep.sites, tuple) else (sweep.sites,)
    return ", ".join(dict.fromkeys(s.kind if isinstance(s, Site | Sites) else str(s) for s in sites))


def _users(work: Round, uses: Any) -> tuple[str, ...]:
    pairs = zip(work.analyzers, work.needs, work.declared, strict=True)
    return tuple(dict.fromkeys(a.name for a, need, declared in pairs if uses(need, declared)))


def _touches(need: Needs, declared: tuple[Read, ...], run: Run) -> bool:
    """Whether an analyzer is served by the shared pass of a run."""
    swept = any(
        (s.metric is not None and run == s.base) or (s.patches and run == s.source) for s in need.sweeps.values()
    )
    grads: list[Grad] = list(need.grads.values())
    compares = run == "clean" and any(g.metric.compares for g in grads)
    mixed = any(g.between for g in grads)
    return swept or compares or mixed or any(r.of == run for r in declared)


def _depth(model: Model, sites: Sequence[Site], logits: bool) -> int:
    """How many decoder layers a pass must run for these sites."""
    if logits or any(s.kind in ("final_norm", "logits") for s in sites):
        return model.dims.n_layers
    return max((s.layer + 1 for s in sites if s.layer is not None), default=0)


def _bytes(model: Model, read: Read, tokens: int, longest: int, examples: int) -> int:
    """Size of one read for the largest batch; reduced reads are small and counted as nothing."""
    if read.reduce is not None:
        return 0
    d, site = model.dims, read.site
    sizes = {"d_model": d.d_model, "d_head": d.d_head, "d_mlp": d.d_mlp, "vocab": d.n_outputs, "key": longest}
    heads = {"head": d.n_heads, "kv_head": d.n_kv_heads, "expert": d.n_experts}
    if site.heads is not None:
        heads = dict.fromkeys(heads, 1 if isinstance(site.heads, int) else len(site.heads))
    if site.neurons is not None:
        sizes["d_mlp"] = 1 if isinstance(site.neurons, int) else len(site.neurons)
    width = 1
    for axis in KINDS[site.kind].axes:
        width *= sizes.get(axis, 1) * heads.get(axis, 1)
    places = (
        tokens
        if site.positions is None
        else examples * (len(site.positions) if isinstance(site.positions, tuple) else 1)
    )
    return places * width * model.dtype.itemsize
