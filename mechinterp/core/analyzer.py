"""The contract between analyzers and the engine.

An `Analyzer` says what it needs before anything runs (`Needs`), sees it batch by batch (`Batch`),
returns parts (`Part`), and combines them into a `Result` or into the analyzer of a second round.
Neither side imports the other: all that they share is in this file.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from torch import Tensor

from mechinterp.core.examples import Examples
from mechinterp.core.interventions import Intervention
from mechinterp.core.metrics import Metric
from mechinterp.core.result import Part, Result
from mechinterp.core.tokens import BASELINES, Baseline, TokenBatch, Tokens
from mechinterp.core.trace import Read, Run, Trace
from mechinterp.errors import NeedsError
from mechinterp.shapes import Scores
from mechinterp.sites import Position, Site, Sites, resolve

if TYPE_CHECKING:  # core never imports model; an analyzer is handed one
    from mechinterp.model.model import Model
else:
    Model = Any

Wanted: TypeAlias = Site | Sites | str | Read | Iterable[Site | Sites | str | Read]
Writes: TypeAlias = Callable[[Site], Intervention]
Chosen: TypeAlias = str | tuple[int | tuple[int, ...], ...] | None


_legendre = functools.cache(np.polynomial.legendre.leggauss)


@dataclass(frozen=True)
class Path:
    """A straight line between a baseline embedding and a run's own: the path of integrated gradients.

    At the k-th point the tokens at `positions` have baseline + shares[k] × (own - baseline).

    Attributes:
        baseline: a named embedding, as `Model.baseline` gives it.
        positions: of the tokens that are moved, such as a span; None for all.
        weights: of each point in the sum of gradients.
    """

    baseline: Baseline
    shares: tuple[float, ...]
    weights: tuple[float, ...]
    positions: str | None = None

    def __post_init__(self) -> None:
        if not self.shares or len(self.shares) != len(self.weights):
            raise NeedsError(f"a Path must have points, and a weight for each. Got {self.shares} and {self.weights}")

    @classmethod
    def of(cls, baseline: Baseline, steps: int, positions: str | None = None) -> "Path":
        """The mean over the whole line, by Gauss-Legendre quadrature with so many points."""
        at, weights = _legendre(steps)
        return cls(baseline, tuple(((at + 1) / 2).tolist()), tuple((weights / 2).tolist()), positions)


@dataclass(frozen=True)
class Grad:
    """The gradient of the summed metric at sites, in one run. One backward per distinct metric and run.

    Attributes:
        of: the run that is differentiated.
        reads: sites whose values in that run are wanted beside the gradients, in `Batch.values`.
        between: (sites, share): there the run holds share × its own value + (1 - share) × the other run's,
            which is a point on the path of integrated gradients.
        given: interventions in force in the run, such as an `Apply` that detaches a site from the graph.
            Where one cuts a site off from the metric, its gradient is zero.
        along: the gradients at these points, weighed and added up, in place of the gradient of the run itself.
    """

    sites: Site | Sites | str | tuple[Site | Sites | str, ...]
    metric: Metric
    of: Run = "clean"
    reads: Site | Sites | str | tuple[Site | Sites | str, ...] = ()
    between: tuple[tuple[Site | Sites | str, float], ...] = ()
    given: tuple[Intervention, ...] = ()
    along: Path | None = None

    def __post_init__(self) -> None:
        if self.of not in ("clean", "corrupted"):
            raise NeedsError(f"The of of Grad must be 'clean' or 'corrupted'. Got {self.of!r}")
        _check_metric(self.metric)
        if self.along is not None and (self.between or self.reads):
            raise NeedsError("a Grad along a Path is of many runs; it is not between two others, and has no reads")

    def run(self, n_layers: int) -> "Grad":
        """The run alone: equal for all who can share its pass.

        Only with each other those whose gradients make layers take the explicit softmax, which moves numbers.
        """
        explicit = (s for s in resolve(self.sites, n_layers) if s.kind in ("scores", "pattern") or s.per_query_head)
        return replace(self, sites=tuple(sorted(explicit, key=lambda s: s.order)), reads=())


def _check_metric(metric: object) -> None:
    if not isinstance(metric, Metric):
        raise NeedsError(f"a metric must be one such as mi.logit_diff(), or of a subclass of mi.Metric. Got {metric!r}")


@dataclass(frozen=True)
class Edit:
    """An edited input: the tokens at `positions` replaced by `tokens`, or deleted when it is None.

    Positions may be a name, such as that of a span, or None for all tokens. ``"mean"``, ``"zero"`` and ``"pad"`` put
    that embedding in the tokens' place (`Model.baseline`).
    """

    positions: tuple[int, ...] | str | None
    tokens: tuple[int, ...] | Baseline | None = None

    def __post_init__(self) -> None:
        named = isinstance(self.tokens, str)
        if named and self.tokens not in BASELINES:
            raise NeedsError(f"the embedding of an Edit must be one of {', '.join(BASELINES)}. Got {self.tokens!r}")
        listed = self.positions if isinstance(self.positions, tuple) else ()
        fits = self.tokens is None or named or len(self.tokens) == len(listed)
        if self.positions in ((), "") or not fits:
            raise NeedsError(f"an Edit must name positions, and list as many tokens as positions. Got {self}")


@dataclass(frozen=True)
class Sweep:
    """A grid of counterfactuals: one edited run for every row of sites × positions × heads (or neurons).

    Each row starts from run `base` (with `given` in force) and writes at one site: the value of run
    `source` there (activation patching), or whatever `write` makes of the site. Instead of a grid,
    `rows` may list what each row writes, or `edits` the edited inputs that the rows are.

    Attributes:
        metric: what scores a row; None when only `reads` are wanted.
        sites: the grid's ``layer`` axis (or ``site``, when the kinds differ).
        positions: ``"each"`` for an axis over every token, a tuple for an axis over these positions,
            or one position (or None for all at once) without an axis.
        heads: ``"each"`` for an axis over every head of the site, a tuple for an axis over these heads
            (or, where its entries are tuples, sets of heads), or None for all heads at once.
        neurons: the same for neurons of mlp_gate, mlp_up and mlp_act.
        write: makes the intervention at a row's site; `mechinterp.Zero` is one such function.
        window: layers written together, ``[layer - window // 2, layer + window - window // 2)``.
        given: interventions in force in every row and in the base run itself.
        held: sites that every row holds at the base run's values, but for what the row itself writes
            there; with ``positions="each"`` only at the positions that the row writes.
        rows: what each row writes, in place of a grid: interventions, and sites that get the source
            run's values; the ``row`` axis.
        edits: for every example (in the order of the whole set) its edited inputs, or those of each example alike;
            the ``edit`` axis.
        reads: sites wanted from every row (all on the edited run).
    """

    metric: Metric | None = None
    sites: Site | Sites | str | tuple[Site | Sites | str, ...] = ()
    positions: str | int | tuple[Position, ...] | None = None
    heads: Chosen = None
    neurons: Chosen = None
    write: Writes | None = None
    source: Run = "clean"
    base: Run = "corrupted"
    window: int = 1
    given: tuple[Intervention, ...] = ()
    held: tuple[Site | Sites, ...] = ()
    rows: tuple[tuple[Intervention | Site, ...], ...] = ()
    edits: tuple[tuple[Edit, ...], ...] | tuple[Edit, ...] = ()
    reads: tuple[Site, ...] = ()

    def __post_init__(self) -> None:
        if sum(map(bool, (self.sites, self.rows, self.edits))) != 1:
            raise NeedsError("a Sweep must have sites, rows or edits, and only one of them")
        if (self.heads is not None and self.neurons is not None) or (
            self.rows and (self.positions, self.heads, self.neurons, self.window, self.write) != (None,) * 3 + (1, None)
        ):
            raise NeedsError("a Sweep has an axis of heads or of neurons; with rows, which say all, it has no grid")
        if self.edits and (self.held or self.reads):
            raise NeedsError("rows that are edited inputs have positions of their own: nothing is held or read there")
        if self.rows and any(site.positions == "each" for site in self.held):
            raise NeedsError("rows that are listed may write at several positions; hold named ones, or all")
        if not all(self.rows):
            raise NeedsError("a row of a Sweep must write something. Got an empty one")
        if self.metric is None and not self.reads:
            raise NeedsError("a Sweep must have a metric or reads, or its rows leave nothing behind")
        if self.metric is not None:
            _check_metric(self.metric)

    def edits_of(self, example: int) -> tuple[Edit, ...]:
        """The edited inputs of one example, by its number in the whole set.

        Raises:
            NeedsError: it has no list of them.
        """
        if all(isinstance(one, Edit) for one in self.edits):
            return self.edits  # pyright: ignore[reportReturnType] -- what was just checked
        if example >= len(self.edits):
            raise NeedsError(
                f"the sweep has edits for {len(self.edits)} examples and none for {example}; give one list each"
            )
        return self.edits[example]  # pyright: ignore[reportReturnType]

    @property
    def patches(self) -> bool:
        """Whether rows write values of the source run."""
        if self.rows:
            return any(isinstance(one, Site) for row in self.rows for one in row)
        return not self.edits and self.write is None


@dataclass(frozen=True)
class Swept:
    """What a sweep gave for one batch.

    Attributes:
        values: metric of every row, ``example *axes``; NaN where an example has no such row.
        axes: names of the grid's axes, without ``example``.
        base: metric of the base run, ``example``.
        source: metric of the source run, ``example`` (None unless the sweep patches).
        reads: site → ``example *axes`` followed by the site's axes.
        coords: what the entries of each axis are (layers, heads, positions).
    """

    values: Tensor | None
    axes: tuple[str, ...]
    base: Scores | None
    source: Scores | None
    reads: Mapping[Site, Tensor]
    coords: Mapping[str, Sequence[Any]]


@dataclass(frozen=True)
class Own:
    """Examples of the analyzer's own, and what to read from them. Equal ones share a pass."""

    examples: Examples
    reads: Wanted


@dataclass(frozen=True)
class Needs:
    """All that an analyzer will be given. What is not here cannot be read.

    Attributes:
        reads: sites of the clean run; a `Read` names another run, or reduces inside the pass.
        grads: name → gradients of a metric at sites.
        sweeps: name → grid of counterfactuals.
        on: name → the analyzer's own examples.
    """

    reads: Wanted = ()
    grads: Mapping[str, Grad] = field(default_factory=dict)
    sweeps: Mapping[str, Sweep] = field(default_factory=dict)
    on: Mapping[str, Own] = field(default_factory=dict)


@runtime_checkable
class Rerun(Protocol):
    """``batch.rerun(sweep)``, on the batch; ``batch.rerun(sweep, some)`` on some of its examples, by row."""

    def __call__(self, sweep: Sweep, some: Sequence[int] | None = None, /) -> Swept: ...


@dataclass(frozen=True, eq=False)
class Batch:
    """What one analyzer sees of one batch: what it declared, and nothing else."""

    examples: TokenBatch
    """Tokens, mask, labels, answers and named positions of just these rows."""
    model: Model
    """Weights, tokenizer, dims. Running it from here is not shared; declare needs instead."""
    clean: Trace
    corrupted: Trace
    own: Mapping[str, Trace]
    grads: Mapping[str, Trace]
    values: Mapping[str, Trace]
    """Under the name of a gradient, what its `reads` asked of the run that was differentiated."""
    sweeps: Mapping[str, Swept]
    rerun: Rerun
    """Run a sweep that depends on what was just read, at once."""


@dataclass(frozen=True, eq=False)
class Context:
    """What `combine` sees beside the parts."""

    model: Model
    tokens: Tokens
    """All examples, in order, as token ids."""
    own: Mapping[str, Trace]
    seed: int = 0


@dataclass(frozen=True)
class Analyzer:
    """One analysis: subclass it as a frozen dataclass whose fields are its options.

    The engine calls `needs` once, `observe` once a batch, and `combine` once. `merge(a, b)` is
    optional: defined, it folds parts as they come, so that memory stays flat.
    """

    def needs(self, model: Model) -> Needs:
        """What must be read. Pure: nothing has run. Empty for an analysis of weights alone."""
        return Needs()

    def observe(self, batch: Batch) -> Part | None:
        """What one batch contributes. Only called when something was declared."""
        return None

    def combine(self, parts: Iterator[Part], context: Context) -> "Result | Analyzer":
        """The result from all parts, in batch order, or the analyzer of the next round."""
        return Result.of(parts)

    @property
    def name(self) -> str:
        return type(self).__name__


def as_reads(wanted: Wanted, n_layers: int) -> tuple[Read, ...]:
    """Whatever `Needs.reads` may hold, as single reads without repeats."""
    many = (wanted,) if isinstance(wanted, Site | Sites | str | Read) else tuple(wanted)
    out: list[Read] = []
    for one in many:
        read = one if isinstance(one, Read) else Read(one)
        out += [replace(read, sites=site) for site in resolve(read.sites, n_layers)]
    return tuple(dict.fromkeys(out))
