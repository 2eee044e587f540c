"""Whether TransformerLens and nnsight give what the native engine gives, on your own model: sites, and analyzers."""

import html
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.core.analyzer import Analyzer
from mechinterp.core.examples import Examples
from mechinterp.core.interventions import Apply
from mechinterp.core.metrics import logit_diff
from mechinterp.core.result import Result
from mechinterp.core.tokens import TokenBatch
from mechinterp.core.trace import Read
from mechinterp.engine.backends import NAMES
from mechinterp.engine.backward import backward
from mechinterp.engine.forward import forward
from mechinterp.engine.runner import run
from mechinterp.engine.verify import prompts
from mechinterp.errors import MechinterpError, ModelError, SiteError
from mechinterp.model.backend import NATIVE, Use
from mechinterp.model.model import Model
from mechinterp.model.slices import PATTERN_KINDS
from mechinterp.sites import KINDS, Site
from mechinterp.studies.equivalence_suite import LAST, suite
from mechinterp.studies.yardsticks import Gap, counts, gap, numbers, rows, sizes

OTHERS = tuple(name for name in NAMES if name != NATIVE)
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
"""Largest relative difference, by dtype."""
COUNTS = 0.02
"""Largest share of a variable's counts and choices that may be others, and largest jump of a count."""
FULL = (torch.float32, torch.float64)
"""The dtypes in which analyzers are compared: they add up what half precision has rounded differently."""
_SITES = ("read", "write", "gradient")
_LEAST = 1e-2
"""Of the layer's largest gradient: what the gradient at a token is held against at least. In half precision: all."""
_QUERIES = ("q", "q_normed", "q_rot", "scores")
"""Kinds whose gradient at the first token is 0 but for rounding, as it sees one key: there the largest counts."""


@dataclass(frozen=True)
class Agreement:
    """One line of the table: one thing that was done on the native engine and on a backend.

    Attributes:
        what: ``read``, ``write``, ``gradient``, ``analyzer`` (its measurements), ``counts`` (what it counts and
            chooses), or ``model`` where the backend cannot run it at all.
        name: of the site's kind, of the analyzer, or of the model.
        absolute: largest difference; NaN where the backend refuses, by name.
        relative: largest difference relative to what it is held against: reads and gradients the largest value at
            the same token, writes the largest change of a logit, measurements the variable's largest value; of
            counts and choices the share that are others, or the largest jump of one relative to the largest. In
            half precision: reads the middle one of all tokens at least, writes the logits, gradients the largest.
        detail: where the largest was, or why it was refused.
    """

    backend: str
    what: str
    name: str
    absolute: float
    relative: float
    tolerance: float
    detail: str = ""

    @property
    def verdict(self) -> str:
        """``agrees``, ``differs``, or ``lacks`` where the backend says that it cannot."""
        if math.isnan(self.relative):
            return "lacks"
        return "agrees" if self.relative <= self.tolerance else "differs"

    def __str__(self) -> str:
        found = ["–" if math.isnan(value) else f"{value:.2g}" for value in (self.absolute, self.relative)]
        numbers = f"{found[0]:>10}  {found[1]:>10}  {self.tolerance:10.2g}"
        text = f"{self.verdict:8}{self.backend:18}{self.what:10}{self.name:40}{numbers}"
        return f"{text}  {self.detail}".rstrip()


HEAD = f"{'':8}{'backend':18}{'what':10}{'site or analyzer':40}{'absolute':>10}  {'relative':>10}  {'tolerance':>10}"


@dataclass(frozen=True)
class Equivalence:
    """What `equivalence` found. Prints as a table."""

    model: str
    rows: tuple[Agreement, ...]
    note: str = ""

    @property
    def passed(self) -> bool:
        """Nothing differs; what a backend lacks and refuses is no failure."""
        return all(row.verdict != "differs" for row in self.rows)

    @property
    def summary(self) -> str:
        """One line: how many agree, which are refused, and which differ."""
        said = {verdict: [r for r in self.rows if r.verdict == verdict] for verdict in ("agrees", "lacks", "differs")}
        text = f"{len(said['agrees'])} agree, {len(said['lacks'])} are refused by name, {len(said['differs'])} differ"
        differing = "".join(f"; {r.backend} {r.what} {r.name}" for r in said["differs"])
        return text + differing + (f". {self.note}" if self.note else "")

    def table(self) -> pd.DataFrame:
        """One row a comparison: backend, what, name, absolute, relative, tolerance, verdict, detail."""
        names = ("backend", "what", "name", "absolute", "relative", "tolerance", "verdict", "detail")
        return pd.DataFrame({name: [getattr(row, name) for row in self.rows] for name in names})

    def __str__(self) -> str:
        return "\n".join([self.model, HEAD, *map(str, self.rows), self.summary])

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(self.model)}</p>{self.table().to_html(index=False)}"


def markdown(found: Mapping[str, Equivalence]) -> str:
    """What was found on several models, for a page: the largest difference, relative (and absolute).

    For each backend a table of sites, the worst of reading, writing and differentiating; then one of analyzers, and
    one of what they count, where any is another, the worst of all backends. What differs is in bold; a dash is what
    the model has not.

    Args:
        found: by the name that stands above a column.
    """
    every = [(model, row) for model, each in found.items() for row in each.rows]
    out: list[str] = []
    for backend in (backend for backend in OTHERS if backend in {row.backend for _, row in every}):
        mine = [(model, row) for model, row in every if row.backend == backend and row.what in (*_SITES, "model")]
        out += [f"On `{backend}`:", "", *_grid("site", list(found), mine, "what"), ""]
    others = {row.name for _, row in every if row.what == "counts" and row.relative}
    measured = [(model, row) for model, row in every if row.what == "analyzer"]
    counted = [(model, row) for model, row in every if row.what == "counts" and row.name in others]
    for title, mine in (("Analyzers, on both:", measured), ("What they count and choose, on both:", counted)):
        if mine:
            out += [title, "", *_grid("analyzer", list(found), mine, "backend"), ""]
    return "\n".join(out).rstrip()


def _grid(head: str, models: Sequence[str], rows: Sequence[tuple[str, Agreement]], refused: str) -> list[str]:
    """Name by model; `refused` is the field that says what of a cell a backend refuses."""
    lines = [f"| {head} | {' | '.join(models)} |", "|---|" + "---|" * len(models)]
    names = dict.fromkeys(row.name for _, row in rows if row.what != "model")
    without = {model for model, row in rows if row.what == "model"}
    for name in sorted(names, key=list(KINDS).index) if head == "site" else names:
        there = {model: [row for of, row in rows if (of, row.name) == (model, name)] for model in models}
        cells = ["refused" if model in without else _cell(there[model], refused) for model in models]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return lines


def _cell(rows: Sequence[Agreement], refused: str) -> str:
    done = [row for row in rows if row.verdict != "lacks"]
    lacking = ", ".join(str(getattr(row, refused)) for row in rows if row.verdict == "lacks")
    said = [f"refused: {lacking}"] if lacking else []
    if done:
        worst = max(done, key=lambda row: row.relative)
        absolute = max(row.absolute for row in done)
        text = f"{worst.relative:.1e} ({absolute:.1e})" if absolute else "0"
        said.insert(0, f"**{text}**" if worst.verdict == "differs" else text)
    return "; ".join(said) or "–"


def equivalence(
    model: Model,
    backends: Sequence[str] = OTHERS,
    *,
    analyzers: bool = True,
    told: Callable[[Agreement], None] | None = None,
) -> Equivalence:
    """Do on each backend what the native engine does, and compare: every site read, written and differentiated, and
    analyzers of each kind (forward, backward, sweep).

    Prompts have different lengths and are padded, on both sides. Nothing depends on what the model was trained for.

    Args:
        analyzers: compare analyzers, too, whose sweeps take one whole pass for each row; never in half precision,
            whose roundings they add up.
        told: called with every line as it is done.
    Raises:
        ModelError: a backend that there is not, or none that can run this model.
    """
    if odd := [name for name in backends if name not in OTHERS]:
        raise ModelError(f"The backends of equivalence must be among {', '.join(OTHERS)}. Got {odd[0]!r}")
    native, others = model.with_backend(NATIVE), list[Model]()
    found: list[Agreement] = []
    refusals: list[ModelError] = []
    for name in backends:
        try:
            others.append(model.with_backend(name))
        except ModelError as error:
            refusals.append(error)
            found.append(_lacks(name, model.dtype, "model", model.name, str(error)))
    if refusals and not others:
        raise refusals[0]
    wanted = analyzers and native.dtype in FULL
    steps = (iter(found), _reads(native, others), _writes(native, others), _gradients(native, others))
    rows: list[Agreement] = []
    for row in itertools.chain(*steps, _analyzers(native, others) if wanted else ()):
        rows.append(row)
        if told is not None:
            told(row)
    notes = ["Analyzers are compared in float32 and float64 alone"] * (analyzers and not wanted)
    if native.dtype not in FULL and "router" in _kinds(native):
        notes.append("Where experts score nearly alike, engines may choose others, and what follows differs")
    return Equivalence(repr(native), tuple(rows), ". ".join(notes))


def _examples(model: Model) -> Examples:
    """Prompts of three lengths; answers are each prompt's most and least likely, which no vocabulary lacks.

    Two fixed tokens may be ones that no training has seen, whose logits are the same.
    """
    ids = sorted(prompts(model), key=len)
    few = [ids[0], ids[len(ids) // 2], ids[-1]]
    logits = forward(model, model.tokenize(Examples.of(few)).batch(range(3), model.device), [LAST]).values[LAST]
    return Examples.of(few, answers=[(int(row.argmax()), int(row.argmin())) for row in logits])


def _kinds(model: Model) -> dict[str, list[Site]]:
    """Every kind of site, at all layers that have it."""
    out: dict[str, list[Site]] = {}
    for site in model.sites:
        out.setdefault(site.kind, []).append(site)
    return out


def _row(other: Model, what: str, name: str, gaps: Iterable[Gap], tolerance: float | None = None) -> Agreement:
    """The largest of the gaps, as they are measured; an error while that is done is as large as can be."""
    try:
        every = list(gaps)
    except Exception as error:  # whatever a library raises, the table goes on
        every = [_failed(error)]
    worst = max(every, key=lambda each: each.relative, default=Gap(0.0, 0.0, ""))
    absolute = max((each.absolute for each in every), default=0.0)
    least = TOLERANCES[other.dtype] if tolerance is None else tolerance
    return Agreement(_who(other), what, name, absolute, worst.relative, least, worst.where)


def _failed(error: Exception) -> Gap:
    return Gap(math.inf, math.inf, f"{type(error).__name__}: {error}")


def _lacks(who: str, dtype: torch.dtype, what: str, name: str, reason: str) -> Agreement:
    return Agreement(who, what, name, math.nan, math.nan, TOLERANCES[dtype], reason)


def _who(model: Model) -> str:
    return NATIVE if model.backend is None else model.backend.name


def _at(
    other: Model, use: Use, kind: str, sites: Sequence[Site], gaps: Callable[[Model, Sequence[Site]], Iterable[Gap]]
) -> Iterator[Agreement]:
    """What a backend refuses of a kind of site, by name; and the largest gap of the others."""
    assert other.backend is not None
    refused = {site: reason for site in sites if (reason := other.backend.lacks(site, use)) is not None}
    for site in list(refused)[:1]:
        yield _lacks(_who(other), other.dtype, use, kind, f"{site}: {refused[site]}")
    if able := [site for site in sites if site not in refused]:
        yield _row(other, use, kind, gaps(other, able))


def _batches(native: Model) -> dict[str, TokenBatch]:
    """Three prompts, by the side that they are padded on."""
    tokens = native.tokenize(_examples(native))
    return {side: tokens.batch(range(3), native.device, side) for side in ("right", "left")}


def _names(batch: TokenBatch, what: str) -> list[str]:
    """What each real token is called."""
    lengths = enumerate(batch.lengths.tolist())
    return [f"{what}, token {token} of prompt {prompt}" for prompt, length in lengths for token in range(length)]


def _sizes(values: Float[Tensor, "row value"], dtype: torch.dtype) -> Float[Tensor, " row"]:
    """What rows are held against: each its largest value; in half precision, where small ones have too few digits,
    the middle one of all at least.
    """
    each = sizes(values)
    return each if dtype in FULL else each.clamp(min=float(each.median()))


def _reads(native: Model, others: Sequence[Model]) -> Iterator[Agreement]:
    """Token by token."""
    batches = _batches(native)

    def gaps(expected: Mapping[str, Mapping[Read, Tensor]], other: Model, sites: Sequence[Site]) -> Iterator[Gap]:
        for side, batch in batches.items():
            found = forward(other, batch, [Read(site) for site in sites]).values
            for site in sites:
                a, b = (rows(values[Read(site)], site, batch) for values in (found, expected[side]))
                yield gap(a, b, _names(batch, f"{site} padded on the {side}"), _sizes(b, other.dtype))

    for kind, sites in _kinds(native).items():
        reads = [Read(site) for site in sites]
        expected = {side: forward(native, batch, reads).values for side, batch in batches.items()}
        for other in others:
            yield from _at(other, "read", kind, sites, partial(gaps, expected))


def _edit(site: Site) -> Apply:
    """A large edit, so that what it changes has digits to compare; no norm undoes it, and a router takes others."""
    if site.kind in PATTERN_KINDS:
        return Apply(site, lambda value: 3 * value)
    return Apply(site, lambda value: value.roll(1, -1))


def _writes(native: Model, others: Sequence[Model]) -> Iterator[Agreement]:
    """At the first, a middle and the last layer, each in a pass of its own: what it changes of the last logits."""
    batches = _batches(native)
    plain = {side: forward(native, batch, [LAST]).values[LAST].double() for side, batch in batches.items()}

    def logits(model: Model, site: Site) -> dict[str, Tensor]:
        edit = [_edit(site)]
        return {side: forward(model, batch, [LAST], writes=edit).values[LAST] for side, batch in batches.items()}

    def gaps(expected: Mapping[Site, dict[str, Tensor]], other: Model, sites: Sequence[Site]) -> Iterator[Gap]:
        for site in sites:
            for side, found in logits(other, site).items():
                value = expected[site][side]
                changed = value - plain[side] if other.dtype in FULL else value
                prompts = [f"{site} padded on the {side}, prompt {i}" for i in range(3)]
                yield gap(found, value, prompts, _sizes(changed, other.dtype))

    for kind, sites in _kinds(native).items():
        some = list(dict.fromkeys([sites[0], sites[len(sites) // 2], sites[-1]]))
        expected = {site: logits(native, site) for site in some}
        for other in others:
            yield from _at(other, "write", kind, some, partial(gaps, expected))


def _gradients(native: Model, others: Sequence[Model]) -> Iterator[Agreement]:
    """Of the logit difference, token by token."""
    batches = _batches(native)

    def gaps(expected: Mapping[str, Mapping[Read, Tensor]], other: Model, sites: Sequence[Site]) -> Iterator[Gap]:
        for side, batch in batches.items():
            found = backward(other, batch, sites, logit_diff())[0]
            for site in sites:
                a, b = (rows(values[Read(site)], site, batch) for values in (found, expected[side]))
                against = sizes(b)
                against = against.clamp(min=float(against.max()) * (_LEAST if other.dtype in FULL else 1.0))
                if site.kind in _QUERIES:
                    against[(batch.lengths.cumsum(0) - batch.lengths).cpu()] = against.max()
                yield gap(a, b, _names(batch, f"{site} padded on the {side}"), against)

    for kind, sites in _kinds(native).items():
        if kind in ("head_out", "logits"):  # whose gradients are another's, and the metric's own
            continue
        expected = {side: backward(native, batch, sites, logit_diff())[0] for side, batch in batches.items()}
        for other in others:
            yield from _at(other, "gradient", kind, sites, partial(gaps, expected))


def _analyzers(native: Model, others: Sequence[Model]) -> Iterator[Agreement]:
    """The numbers of each; then, in a line of their own, what it counts and chooses."""
    for name, analyzer, examples in suite(native):
        try:
            expected = _quietly(native, analyzer, examples)
        except SiteError as error:
            yield _lacks(NATIVE, native.dtype, "analyzer", name, str(error))
            continue
        except MechinterpError as error:
            yield _row(native, "analyzer", name, [_failed(error)])
            continue
        for other in others:
            try:
                found = _quietly(other, analyzer, examples)
            except SiteError as error:  # by name, before the passes: the native engine has these sites
                yield _lacks(_who(other), other.dtype, "analyzer", name, str(error))
            except Exception as error:  # whatever a library raises, the table goes on
                yield _row(other, "analyzer", name, [_failed(error)])
            else:
                yield _row(other, "analyzer", name, numbers(found, expected))
                if some := list(counts(found, expected, TOLERANCES[native.dtype])):
                    yield _row(other, "counts", name, some, COUNTS)


def _quietly(model: Model, analyzer: Analyzer, examples: Examples) -> Result:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return run(model, examples, analyzer, batch_size=3)
