"""Whether attributions are faithful: what erasing the tokens that they name does to the metric."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

from mechinterp.core.analyzer import Analyzer, Batch, Context, Edit, Needs, Sweep
from mechinterp.core.analyzer import Model as Declared
from mechinterp.core.metrics import Metric
from mechinterp.core.result import Part, Result, View
from mechinterp.core.statistics import summarize
from mechinterp.core.tokens import Baseline
from mechinterp.engine.runner import Progress, provenance, run
from mechinterp.errors import NeedsError
from mechinterp.model.model import Model

FRACTIONS = (0.01, 0.05, 0.1, 0.2, 0.5)
RANDOM = "random"
Floats = npt.NDArray[np.floating]


def erase_tokens(
    model: Model,
    examples: Any,
    attributions: Mapping[str, Result],
    metric: Metric,
    *,
    fractions: Sequence[float] = FRACTIONS,
    baseline: Baseline = "mean",
    seed: int = 0,
    progress: Progress | bool = False,
) -> Result:
    """Comprehensiveness and sufficiency of token attributions (DeYoung et al. 2020, ERASER), beside random tokens.

    For each share of the attributed tokens (at least one), the most positive ones are masked
    (``comprehensiveness`` = metric - metric without them; higher is better), or all others (``sufficiency`` =
    metric - metric with them alone; lower is better). All masked inputs of all methods are one packed sweep.

    Result: ``comprehensiveness`` and ``sufficiency`` over ``method`` and ``fraction``, means over examples, with
    ``…_ci_low, …_ci_high`` (95% bootstrap); ``aopc_comprehensiveness`` and ``aopc_sufficiency`` (``method``), their
    means over the fractions, with intervals. A masked text is unlike any that the model has seen, so these measure
    faithfulness only as far as the metric means something there; every method meets the same texts.

    Args:
        attributions: results of `TokenAttribution` on the same examples, by a name for each.
        metric: what the tokens are to be necessary and sufficient for, usually the attributed one.
    Raises:
        NeedsError: no attributions, one of other examples or of a single token, or a fraction that is none; the name
            ``random`` is taken.
    """
    if not attributions or RANDOM in attributions:
        raise NeedsError(f"give attributions, by names other than {RANDOM!r}. Got {list(attributions)}")
    if not fractions or not all(0 < share < 1 for share in fractions):
        raise NeedsError(f"fractions must lie between 0 and 1. Got {fractions}")
    values = {name: _values(name, result) for name, result in attributions.items()}
    first = next(iter(values.values()))
    for name, other in values.items():
        if [np.isfinite(row).tolist() for row in other] != [np.isfinite(row).tolist() for row in first]:
            raise NeedsError(f"the attributions {name!r} are of other tokens than the first; run both on the same")
    if small := [i for i, row in enumerate(first) if np.isfinite(row).sum() < 2]:
        raise NeedsError(f"example {small[0]} has fewer than two attributed tokens, so none can be left; leave it out")
    rng = np.random.default_rng(seed)
    values[RANDOM] = [np.where(np.isfinite(row), rng.random(len(row)), np.nan) for row in first]
    edits = tuple(tuple(_edits([of[i] for of in values.values()], fractions, baseline)) for i in range(len(first)))
    found = run(model, examples, _Erasing(metric, edits), seed=seed, progress=progress)
    shape = (len(first), len(values), len(fractions), 2)
    lost = found.data["lost"].transpose("example", "edit").values.reshape(shape)
    data = _summary(lost, list(values), list(fractions), seed)
    unit = f"change of {metric.label}"
    views = tuple(
        View("lines", name, "fraction", by="method", title=title, unit=unit)
        for name, title in (
            ("comprehensiveness", "Comprehensiveness: what masking the first tokens takes away"),
            ("sufficiency", "Sufficiency: what the first tokens alone lack"),
        )
    )
    meta = {**provenance(model), "analyzer": "erase_tokens", "baseline": baseline, "seed": seed}
    return Result(data.assign_attrs(unit=unit), meta, views)


def _values(name: str, result: Result) -> list[Floats]:
    if "attribution" not in result.data:
        raise NeedsError(f"the result {name!r} has no attribution of tokens; give results of TokenAttribution")
    return list(result.data["attribution"].transpose("example", "position").values)


def _edits(rows: Sequence[Floats], fractions: Sequence[float], baseline: Baseline) -> Iterator[Edit]:
    """Of one example: for each method and fraction, the text without its first tokens, and with these alone."""
    for row in rows:
        there = np.flatnonzero(np.isfinite(row))
        order = there[np.argsort(-row[there], kind="stable")]
        for share in fractions:
            k = min(max(1, round(share * len(order))), len(order) - 1)
            yield Edit(tuple(order[:k].tolist()), baseline)
            yield Edit(tuple(order[k:].tolist()), baseline)


@dataclass(frozen=True)
class _Erasing(Analyzer):
    """What each edited input takes from the metric."""

    metric: Metric
    edits: tuple[tuple[Edit, ...], ...]

    def needs(self, model: Declared) -> Needs:
        return Needs(sweeps={"masked": Sweep(self.metric, edits=self.edits, base="clean")})

    def observe(self, batch: Batch) -> Part:
        swept = batch.sweeps["masked"]
        assert swept.values is not None and swept.base is not None
        return Part({"lost": (swept.base[:, None] - swept.values, "example edit")})

    def combine(self, parts: Iterator[Part], context: Context) -> Result:
        return Result.of(parts)


def _summary(lost: Floats, methods: list[str], fractions: list[float], seed: int) -> xr.Dataset:
    """From ``example method fraction kind``."""
    data: dict[str, Any] = {}
    for kind, name in enumerate(("comprehensiveness", "sufficiency")):
        for prefix, axes, values in (
            ("", ("method", "fraction"), lost[..., kind]),
            ("aopc_", ("method",), lost[..., kind].mean(2)),
        ):
            said = summarize(values, seed)
            for suffix, array in (("", said.mean), ("_ci_low", said.ci_low), ("_ci_high", said.ci_high)):
                data[f"{prefix}{name}{suffix}"] = axes, array
    return xr.Dataset(data, {"method": methods, "fraction": fractions})
