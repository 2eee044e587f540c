"""Carry out a plan: rounds, batches by length, progress, out-of-memory back-off."""

import contextlib
import functools
import importlib.metadata
import platform
import time
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Protocol, overload, runtime_checkable

import torch
from torch import Tensor

from mechinterp.core.analyzer import Analyzer, Batch, Context, Own, Sweep, Swept, as_reads
from mechinterp.core.examples import Examples
from mechinterp.core.result import Part, Result
from mechinterp.core.tokens import TokenBatch, Tokens
from mechinterp.core.trace import Read, Trace
from mechinterp.engine.backward import Differentiated, Gradients
from mechinterp.engine.forward import Passed, forward, out_of_memory
from mechinterp.engine.packed import BUDGET, sweep_packed, why_full
from mechinterp.engine.plan import Plan, Round, compile_round, default_batch_size, describe
from mechinterp.engine.runs import Known
from mechinterp.engine.sweep import source_reads, sweep_full
from mechinterp.errors import MechinterpError, NeedsError
from mechinterp.model.backend import NATIVE
from mechinterp.model.model import Model, as_examples
from mechinterp.sites import Site, resolve

MAX_ROUNDS = 8


@runtime_checkable
class Progress(Protocol):
    """Who is told how the work goes. `Bar` shows it; anything with these two methods will do."""

    def begin(self, plan: Plan, round_number: int) -> None:
        """A round starts; `plan` says what it costs."""
        ...

    def advance(self, what: str, steps: int) -> None:
        """Some passes are done."""
        ...


@contextlib.contextmanager
def shown(progress: Progress | bool) -> Generator[Progress | None, None, None]:
    """Whom to tell how the work goes; True: a bar, for as long as the block lasts."""
    if progress is not True:
        yield progress or None
        return
    from mechinterp.engine.progress import Bar

    with Bar() as bar:
        yield bar


@dataclass
class Run:
    """The state of one call of `run`."""

    model: Model
    tokens: Tokens | None
    batch_size: int | None
    padding_side: str
    seed: int
    progress: Progress | None
    engine: str = "packed"
    budget: int = BUDGET
    passes: Counter[str] = field(default_factory=Counter)
    limit: int | None = None
    """Examples a batch, after memory ran out."""

    def tick(self, what: str, steps: int = 1) -> None:
        self.passes[what] += steps
        if self.progress is not None:
            self.progress.advance(what, steps)


@overload
def run(
    model: Model,
    examples: Any,
    analyzers: Analyzer,
    *,
    engine: str = ...,
    batch_size: int | None = ...,
    padding_side: str = ...,
    seed: int = ...,
    progress: "Progress | bool" = ...,
    budget: int = ...,
) -> Result: ...
@overload
def run(
    model: Model,
    examples: Any,
    analyzers: Sequence[Analyzer],
    *,
    engine: str = ...,
    batch_size: int | None = ...,
    padding_side: str = ...,
    seed: int = ...,
    progress: "Progress | bool" = ...,
    budget: int = ...,
) -> list[Result]: ...
def run(
    model: Model,
    examples: Any,
    analyzers: Analyzer | Sequence[Analyzer],
    *,
    engine: str = "packed",
    batch_size: int | None = None,
    padding_side: str = "right",
    seed: int = 0,
    progress: "Progress | bool" = False,
    budget: int = BUDGET,
) -> Any:
    """Run analyzers over examples, in the fewest passes that serve them all.

    Args:
        examples: `Examples`, or a text, texts or token ids; None for analyzers of weights alone.
        analyzers: one, or several; the results come in the same order.
        engine: how sweeps run; ``"packed"`` is one wavefront of all rows, ``"full"`` one whole pass for
            each row. What cannot be packed is run in full, and the plan says why.
        batch_size: examples a batch; by default as many as make 8,192 tokens, at most 64. It is
            halved when memory runs out.
        padding_side: of ragged batches; the numbers do not depend on it beyond rounding.
        seed: handed to analyzers for bootstrap and permutations.
        progress: True for a progress bar, or your own `Progress`.
        budget: bytes that a packed sweep aims to stay within, beside the model, by an estimate from sizes; a
            user's own function of a slice gets all examples of a batch at once, whatever they take.
    Raises:
        MechinterpError: one of its kinds, naming the analyzer where one is to blame.
    """
    if engine not in ("packed", "full"):
        raise NeedsError(f"The engine of run must be 'packed' or 'full'. Got {engine!r}")
    if padding_side not in ("left", "right"):
        raise NeedsError(f"The padding_side of run must be 'left' or 'right'. Got {padding_side!r}")
    if batch_size is not None and batch_size < 1:
        raise NeedsError(f"The batch_size of run must be at least 1. Got {batch_size}")
    if isinstance(budget, bool) or not isinstance(budget, int | float) or budget <= 0:
        raise NeedsError(f"The budget of run must be a number of bytes, such as 2 * 1024**3. Got {budget!r}")
    if not isinstance(model, Model) or isinstance(analyzers, type):
        raise NeedsError("run takes a Model, examples, and Analyzer objects such as LogitLens(), in this order")
    single = isinstance(analyzers, Analyzer)
    todo = [(i, a) for i, a in enumerate([analyzers] if isinstance(analyzers, Analyzer) else analyzers)]
    asked = [analyzer for _, analyzer in todo]
    for analyzer in asked:
        if not isinstance(analyzer, Analyzer):
            raise NeedsError(f"analyzers must be Analyzer objects. Got {analyzer!r}; write {analyzer!r}() for a class")
    tokens = None if examples is None else model.tokenize(as_examples(examples))
    results: list[Result | None] = [None] * len(todo)
    started = time.perf_counter()
    with shown(progress) as told:
        state = Run(model, tokens, batch_size, padding_side, seed, told, engine, budget)
        for number in range(1, MAX_ROUNDS + 1):
            if not todo:
                break
            state.passes["rounds"] = number
            following: list[tuple[int, Analyzer]] = []
            for (index, _), outcome in zip(todo, _round(state, [a for _, a in todo], number), strict=True):
                if isinstance(outcome, Analyzer):
                    following.append((index, outcome))
                else:
                    first = asked[index]  # not the analyzer of its last round
                    results[index] = outcome.with_meta(analyzer=first.name, options=_options(first))
            todo = following
        if todo:
            raise NeedsError(f"{todo[0][1].name} asked for more than {MAX_ROUNDS} rounds; end in a Result")
    meta = provenance(model) | {
        "engine": engine,
        "seed": seed,
        "passes": dict(state.passes),
        "seconds": round(time.perf_counter() - started, 3),
    }
    done = [r.with_meta(**meta) for r in results if r is not None]
    return done[0] if single else done


_version = functools.cache(importlib.metadata.version)


def provenance(model: Model) -> dict[str, Any]:
    """What a number depends on beside the examples: versions, weights, dtype, kernel."""
    packages = ("mechinterp", "torch", "transformers")
    return {
        "model": model.name,
        "model_hash": model.fingerprint,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "kernel": model.kernel,
        "backend": NATIVE if model.backend is None else f"{model.backend.name} {model.backend.version}",
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in packages},
    }


def _options(analyzer: Analyzer) -> dict[str, str]:
    return {f.name: repr(getattr(analyzer, f.name)) for f in fields(analyzer)}


def _round(state: Run, analyzers: list[Analyzer], number: int) -> list["Result | Analyzer"]:
    work = compile_round(state.model, analyzers, state.engine, state.tokens)
    if state.progress is not None:
        state.progress.begin(describe(state.model, state.tokens, work, state.batch_size), number)
    if work.uses_examples and state.tokens is None:
        describe(state.model, None, work, None)  # says what is missing
    own = {examples: _own(state, examples, reads) for examples, reads in work.own.items()}
    theirs = [_own_of(need.on, own, state.model, a.name) for a, need in zip(analyzers, work.needs, strict=True)]
    parts: list[list[Part]] = [[] for _ in analyzers]
    if work.uses_examples and state.tokens is not None:
        size = state.batch_size or default_batch_size(state.tokens)
        for rows in state.tokens.batches(size):
            for each in _with_backoff(state, rows, work, theirs):
                _collect(analyzers, parts, each)
    outcomes: list[Result | Analyzer] = []
    for analyzer, some, traces in zip(analyzers, parts, theirs, strict=True):
        tokens = state.tokens or Examples.of([(0,)]).tokenize(None)
        mine = [(name, trace[read]) for name, trace in traces.items() for read in trace.reads]
        versions = [tensor._version for _, tensor in mine]
        with torch.no_grad():
            outcome: Any = analyzer.combine(iter(some), Context(state.model, tokens, traces, state.seed))
        for (name, tensor), version in zip(mine, versions, strict=True):
            if tensor._version != version:
                raise NeedsError(f"{analyzer.name} changed what was read of {name} in place; clone it first")
        if not isinstance(outcome, Result | Analyzer):
            raise NeedsError(
                f"{analyzer.name}.combine must return a Result or an Analyzer. Got {type(outcome).__name__}"
            )
        outcomes.append(outcome)
    return outcomes


def _collect(analyzers: Sequence[Analyzer], parts: list[list[Part]], new: Sequence[Part | None]) -> None:
    """Add one batch's parts, folding them where the analyzer can."""
    for analyzer, some, part in zip(analyzers, parts, new, strict=True):
        if part is None:
            continue
        merge = getattr(analyzer, "merge", None)
        if merge is not None and some:
            some[0] = merge(some[0], part)
        else:
            some.append(part)


def _own(state: Run, examples: Examples, reads: tuple[Read, ...]) -> Trace:
    """Run an analyzer's own examples; rows of all batches are joined and padded on the right with NaN."""
    tokens = state.model.tokenize(examples)
    size = state.batch_size or default_batch_size(tokens)
    pieces: list[tuple[TokenBatch, Mapping[Read, Tensor]]] = []
    for rows in tokens.batches(size):
        batch = tokens.batch(rows, state.model.device)
        pieces.append((batch, forward(state.model, batch, reads).values))
        state.tick("forward")
    whole = tokens.batch(range(len(tokens)), state.model.device)
    order = torch.tensor([row for batch, _ in pieces for row in batch.rows]).argsort().to(state.model.device)
    return Trace({r: _join_rows([v[r] for _, v in pieces])[order] for r in reads}, whole)


def _join_rows(pieces: list[Tensor]) -> Tensor:
    size = [max(p.shape[i] for p in pieces) for i in range(pieces[0].ndim)]
    padded: list[Tensor] = []
    for piece in pieces:
        gaps = [gap for i in range(piece.ndim - 1, 0, -1) for gap in (0, size[i] - piece.shape[i])]
        padded.append(torch.nn.functional.pad(piece, gaps, value=float("nan")) if any(gaps) else piece)
    return torch.cat(padded)


def _own_of(on: Mapping[str, Own], all_own: Mapping[Examples, Trace], model: Model, owner: str) -> dict[str, Trace]:
    """Of shared passes over own examples, what one analyzer declared."""
    out: dict[str, Trace] = {}
    for name, one in on.items():
        shared = all_own[one.examples]
        out[name] = Trace(
            {r: shared[r] for r in as_reads(one.reads, model.dims.n_layers)}, shared.batch, f"{owner}, {name}"
        )
    return out


def _with_backoff(
    state: Run, rows: tuple[int, ...], work: Round, own: Sequence[Mapping[str, Trace]]
) -> Iterator[list[Part | None]]:
    """One batch; halved, and halved again, when memory runs out."""
    limit = state.limit or len(rows)
    if len(rows) > limit:
        for start in range(0, len(rows), limit):
            yield from _with_backoff(state, rows[start : start + limit], work, own)
        return
    try:
        done = _batch(state, rows, work, own)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error) or len(rows) == 1:
            raise
        state.limit = len(rows) // 2
    else:
        yield done
        return
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    yield from _with_backoff(state, rows, work, own)


def _batch(state: Run, rows: tuple[int, ...], work: Round, own: Sequence[Mapping[str, Trace]]) -> list[Part | None]:
    """All passes of one batch, then every analyzer's part of it."""
    model, tokens = state.model, state.tokens
    assert tokens is not None
    batch = tokens.batch(rows, model.device, state.padding_side)
    passed: dict[str, Passed] = {}
    for run_name in work.runs():
        passed[run_name] = forward(model, batch.run(run_name), work.reads[run_name], work.metrics[run_name])
        state.tick("forward")
    nothing = Passed({}, {}, {})
    clean = passed.get("clean", nothing)
    n = model.dims.n_layers
    users = Counter(run for need in work.needs for run in {grad.run(n) for grad in need.grads.values()})
    differentiated = Differentiated(model, batch, work.grads, users, passed, partial(state.tick, "backward"))

    def tick_rows(of: TokenBatch, n: int) -> None:
        """Whole passes, each with the row of every example."""
        state.tick("sweep_rows", n * len(of))
        state.passes["sweep_passes"] += n
        state.passes["sweep_token_layers"] += n * int(of.lengths.sum()) * model.dims.n_layers

    def tick_packed(what: str, n: int) -> None:
        if what == "sweep_rows":
            state.tick(what, n)
        else:
            state.passes[what] += n

    def sweep(one: Sweep) -> Swept:
        if work.sweeps[one] is None:
            return sweep_packed(model, batch, one, budget=state.budget, tick=tick_packed)
        # The base run with what is given, and once more for what is held.
        state.tick("forward", (one.metric is not None and bool(one.given)) + bool(one.held))
        source = passed.get(one.source, nothing).values
        return sweep_full(model, batch, one, source, clean, passed, partial(tick_rows, batch))

    known: Known = {}

    def rerun(one: Sweep, some: Sequence[int] | None = None) -> Swept:
        mine = batch if some is None else batch.take(some)
        if state.engine == "packed" and why_full(model, one, batch.spans) is None:
            return sweep_packed(model, mine, one, budget=state.budget, tick=tick_packed, known=known)
        extra = {} if some is not None else {name: list(p.values.items()) for name, p in passed.items()}
        runs: dict[str, Passed] = {}
        for name in dict.fromkeys(["clean", one.base, one.source] if batch.corrupted_ids is not None else ["clean"]):
            metrics = [] if one.metric is None else [one.metric]
            reads = [r for r in source_reads(one, model) if r.of == name]
            fresh = forward(model, mine.run(name), reads, metrics)
            runs[name] = Passed({**dict(extra.get(name, [])), **fresh.values}, fresh.logits, fresh.rows)
            state.tick("forward")
        state.tick("forward", (one.metric is not None and bool(one.given)) + bool(one.held))
        source = runs[one.source].values if one.source in runs else {}
        return sweep_full(model, mine, one, source, runs["clean"], runs, partial(tick_rows, mine))

    swept = {one: sweep(one) for one in work.sweeps}
    everything = {r: t for p in passed.values() for r, t in p.values.items()}
    shared = _shared(everything, own, swept, batch)
    parts: list[Part | None] = []
    for index, (analyzer, need) in enumerate(zip(work.analyzers, work.needs, strict=True)):
        if not work.observes(index):
            parts.append(None)
            continue
        mine = list(work.declared[index])

        def seen(run_name: str, mine: list[Read] = mine, analyzer: Analyzer = analyzer) -> Trace:
            some = {r: everything[r] for r in mine if r.of == run_name}
            return Trace(
                some, batch.run(run_name) if batch.corrupted_ids is not None else batch, f"{analyzer.name} ({run_name})"
            )

        view = Batch(
            examples=batch,
            model=model,
            clean=seen("clean"),
            corrupted=seen("corrupted"),
            own=own[index],
            grads=Gradients(differentiated, need.grads, analyzer.name, values=False),
            values=Gradients(differentiated, need.grads, analyzer.name, values=True),
            sweeps={name: swept[one] for name, one in need.sweeps.items()},
            rerun=rerun,
        )
        whole = any(r.site.positions is None for r in mine) or bool(need.grads)
        whole |= any(one.edits for one in need.sweeps.values())
        parts.append(_observe(analyzer, view, shared, differentiated, _layers(work, index, model), whole))
    return parts


def _layers(work: Round, index: int, model: Model) -> list[list[int]]:
    """The sets of layers that an analyzer declared, kind by kind, for the coordinates of its parts."""
    sites: list[Site] = [r.site for r in work.declared[index]]
    for one in [*work.needs[index].grads.values(), *work.needs[index].sweeps.values()]:
        sites += resolve(one.sites, model.dims.n_layers)
        sites += resolve(one.reads, model.dims.n_layers)
    by_kind: dict[str, set[int]] = {}
    for site in sites:
        if site.layer is not None:
            by_kind.setdefault(site.kind, set()).add(site.layer)
    return [sorted(layers) for layers in by_kind.values()]


def _shared(
    everything: Mapping[Read, Tensor],
    own: Sequence[Mapping[str, Trace]],
    swept: Mapping[Sweep, Swept],
    batch: TokenBatch,
) -> list[tuple[str, Tensor]]:
    """Every tensor that several analyzers may see, by name."""
    out = [(str(read.site), tensor) for read, tensor in everything.items()]
    for traces in own:
        out += [(f"{read.site} of {name}", trace[read]) for name, trace in traces.items() for read in trace.reads]
    for one in swept.values():
        tensors = [one.values, one.base, one.source, *one.reads.values()]
        out += [("a sweep", t) for t in tensors if t is not None]
    return out + [("the tokens", t) for t in (batch.ids, batch.mask, batch.corrupted_ids) if t is not None]


@torch.no_grad()
def _observe(
    analyzer: Analyzer,
    batch: Batch,
    shared: list[tuple[str, Tensor]],
    differentiated: Differentiated,
    layers: list[list[int]],
    whole: bool,
) -> Part:
    versions = [t._version for _, t in shared]
    try:
        part: Any = analyzer.observe(batch)
    except MechinterpError as error:
        error.args = (f"{analyzer.name}: {error}",)
        raise
    spoiled = differentiated.changed()
    for (name, tensor), version in zip(shared, versions, strict=True):
        spoiled = name if tensor._version != version else spoiled
    if spoiled is not None:
        raise NeedsError(f"{analyzer.name} changed {spoiled} in place, which others read too; clone it first")
    if not isinstance(part, Part):
        raise NeedsError(f"{analyzer.name}.observe must return a Part. Got {type(part).__name__}")
    return _stamp(part, analyzer, batch.examples, layers, whole)


def _stamp(part: Part, analyzer: Analyzer, batch: TokenBatch, layers: list[list[int]], whole: bool) -> Part:
    """Move to the CPU, mark padding (where the analyzer read `whole` texts), and add the coordinates of layers."""
    values: dict[str, tuple[Any, str]] = {}
    coords = dict(part.coords)
    for name, (value, axes) in part.values.items():
        names = axes.split()
        if isinstance(value, Tensor):
            value = value.detach().cpu()
            if "example" in names:
                if value.shape[names.index("example")] != len(batch):
                    raise NeedsError(
                        f"{analyzer.name}: part {name!r} has {value.shape[names.index('example')]} examples"
                        f" in a batch of {len(batch)}; keep every example"
                    )
                for axis in ({"position", "query", "key"} & set(names)) - coords.keys() if whole else ():
                    value = _align(value, names.index("example"), names.index(axis), batch)
        if "layer" in names and "layer" not in coords:
            n = value.shape[names.index("layer")]
            fitting = {tuple(some) for some in layers if len(some) == n}
            if len(fitting) != 1:
                raise NeedsError(
                    f"{analyzer.name}: part {name!r} has {n} layers, which fits {len(fitting)} of the declared"
                    ' sets of layers; pass coords={"layer": [...]}'
                )
            coords["layer"] = list(fitting.pop())
        values[name] = (value, axes)
    return Part(values, coords=coords, rows=batch.rows)


def _align(value: Tensor, example: int, axis: int, batch: TokenBatch) -> Tensor:
    """Real tokens moved to the left along one axis; padding marked NaN (-1 in integers)."""
    if value.shape[axis] != batch.ids.shape[1]:
        return value
    moved = value.movedim((example, axis), (0, 1))
    fill = float("nan") if value.is_floating_point() else False if value.dtype == torch.bool else -1
    out = torch.full_like(moved, fill)
    for i, mask in enumerate(batch.mask.cpu()):
        real = moved[i][mask]
        out[i, : len(real)] = real
    return out.movedim((0, 1), (example, axis))
