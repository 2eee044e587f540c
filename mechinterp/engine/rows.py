"""`mi.sweep`: counterfactuals that a script lists, without an analyzer of its own."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from mechinterp.core.analyzer import Analyzer, Batch, Context, Needs, Sweep
from mechinterp.core.interventions import Intervention
from mechinterp.core.metrics import Metric, as_metric, logit_diff
from mechinterp.core.result import Part, Result, View
from mechinterp.core.statistics import summarize
from mechinterp.core.trace import Run
from mechinterp.engine.packed import BUDGET
from mechinterp.engine.runner import Progress, run
from mechinterp.errors import NeedsError
from mechinterp.model.model import Model
from mechinterp.sites import Site, Sites, resolve

Row: TypeAlias = Intervention | Site | Sites | str | Sequence[Intervention | Site | Sites | str]


def sweep(
    model: Model,
    examples: Any,
    writes: Sequence[Row] | Mapping[str, Row],
    metric: Metric | Callable[[Tensor], Tensor] | None = None,
    *,
    base: Run = "clean",
    source: Run = "corrupted",
    given: Sequence[Intervention] = (),
    held: Sequence[Site | Sites] = (),
    engine: str = "packed",
    batch_size: int | None = None,
    seed: int = 0,
    progress: Progress | bool = False,
    budget: int = BUDGET,
) -> Result:
    """Run every example once for each row of writes, and score each run.

        mi.sweep(model, pairs, {"no head 3": mi.Zero(mi.sites.z(10, heads=3)), "its value elsewhere": mi.sites.z(10)})

    Result: ``value`` (``example row``) and ``base`` (``example``), the metric with and without the writes; ``change``,
    the mean of value - base over examples, with ``ci_low, ci_high`` (bootstrap), ``p`` (sign flips, NaN below six
    examples) and ``q`` (over all rows). A value is NaN where an example lacks a position that its row writes.

    Args:
        writes: what each row writes: an intervention, a site (it gets the `source` run's value), or several of
            them. Names, where it is a mapping; else a row is named by what it writes.
        metric: `logit_diff()` by default; or any callable on the logits at the last token.
        base: the run that rows edit.
        given: in force in every row, and in the base run itself.
        held: sites that every row holds at the base run's values, but for what it writes there itself.
        engine, batch_size, seed, progress, budget: as for `run`.
    Raises:
        NeedsError: nothing to write; ExamplesError, SiteError, HookError: as `run`.
    """
    if isinstance(writes, Intervention | Site | Sites | str):  # a string would be rows of one letter each
        raise NeedsError(f"the rows of a sweep are a list, or a mapping from names. Got {writes!r}; put it in a list")
    named = writes if isinstance(writes, Mapping) else {}
    rows = tuple(_row(one, model) for one in (writes.values() if isinstance(writes, Mapping) else writes))
    if not rows:
        raise NeedsError("there are no rows to sweep; give at least one write")
    labels = tuple(named) or tuple(" ".join(map(_shown, row)) for row in rows)
    labels = tuple(
        f"{one} ({labels[: i + 1].count(one)})" if one in labels[:i] else one for i, one in enumerate(labels)
    )
    chosen = logit_diff() if metric is None else as_metric(metric)
    wanted = Sweep(chosen, rows=rows, base=base, source=source, given=tuple(given), held=tuple(held))
    options: dict[str, Any] = {"engine": engine, "batch_size": batch_size, "seed": seed, "budget": budget}
    return run(model, examples, Rows(wanted, labels), progress=progress, **options)


@dataclass(frozen=True)
class Rows(Analyzer):
    """The rows of one sweep against its base run; what `sweep` runs."""

    wanted: Sweep
    labels: tuple[str, ...]

    def needs(self, model: Model) -> Needs:
        return Needs(sweeps={"rows": self.wanted})

    def observe(self, batch: Batch) -> Part:
        swept = batch.sweeps["rows"]
        assert swept.values is not None and swept.base is not None
        coords = {"row": list(self.labels)}
        return Part({"value": (swept.values, "example row"), "base": (swept.base, "example")}, coords=coords)

    def combine(self, parts: Iterator[Part], context: Context) -> Result:
        data = Result.of(parts, unit=f"{self.wanted.metric}").data
        change = summarize(data["value"].values - data["base"].values[:, None], context.seed)
        new = {"change": change.mean, **{name: getattr(change, name) for name in ("ci_low", "ci_high", "p", "q")}}
        data = data.assign({name: ("row", value) for name, value in new.items()})
        what = f"the {self.wanted.metric.label}" if self.wanted.metric else "the metric"
        view = View("bars", "change", "row", title=f"Change of {what} by row", unit=f"change of {what}")
        return Result(data[[*new, "value", "base"]], {}, (view,))


def _row(one: Row, model: Model) -> tuple[Intervention | Site, ...]:
    """What a row writes, sites singly."""
    several = (one,) if isinstance(one, Intervention | Site | Sites | str) else tuple(one)
    out: list[Intervention | Site] = []
    for each in several:
        out += [each] if isinstance(each, Intervention) else resolve(each, model.dims.n_layers)
    return tuple(out)


def _shown(one: Intervention | Site) -> str:
    if isinstance(one, Site):
        return f"patch {one}"
    many = one.site
    where = f"{many.kind} at all layers" if isinstance(many, Sites) and many.layers is None else str(many)
    return f"{type(one).__name__} {where}"
