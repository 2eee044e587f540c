"""Steering: a direction added to what the model computes, and what that does to its answers and costs its text."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
import xarray as xr

from mechinterp.core.analyzer import Analyzer, Batch, Context, Model, Needs, Sweep
from mechinterp.core.interventions import Intervention, Steer
from mechinterp.core.linear_probe import LinearProbe
from mechinterp.core.metrics import Metric, log_odds, loss
from mechinterp.core.result import Part, Result, View
from mechinterp.core.statistics import summarize
from mechinterp.errors import NeedsError
from mechinterp.sites import Position


@dataclass(frozen=True)
class Steering(Analyzer):
    """A concept's direction added at its site with many strengths, against random directions of equal norm.

    One sweep: each strength of each direction is a row, beside one that removes the concept's line altogether
    (`LinearProbe.ablate`; Arditi et al. 2024). Random directions are isotropic, and much of what they point to is
    where activations never are: that a concept does more than these is necessary, and no proof of what it means.

    Result (``strength``, in activation units): ``mean`` change of the metric with ``ci_low, ci_high`` (95%, bootstrap
    over examples); ``control`` (``strength draw``), the same of each random direction; ``excess``, the mean less that
    of the controls', with ``p`` (sign flips over examples) and ``q`` over the strengths; ``cost``, how many times
    larger the perplexity of the examples' own text gets, and ``control_cost``, that of random ones. ``ablation``
    (``measure``) has the change of the metric where the line is removed, and its cost. ``effect`` (``example
    strength``) and ``clean`` (``example``) are what it is made of.

    Attributes:
        probe: with the site and the direction.
        concept: whose direction; the probe's last class by default.
        strengths: in activation units, which `ActivationStats` gives the norms of.
        positions: where it is added; all tokens by default.
        draws: random directions.
        metric: what should change. Examples need answers for the default; two tokens or more for the cost.
        seed: of the random directions.
    Raises:
        NeedsError: no strengths, strengths of 0 or twice the same, no draws, or a probe of another width.
    """

    probe: LinearProbe = field(hash=False)
    concept: str | None = None
    strengths: tuple[float, ...] = (-8.0, -4.0, -2.0, 2.0, 4.0, 8.0)
    positions: Position | None = None
    draws: int = 5
    metric: Metric = field(default_factory=log_odds)
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.strengths or 0.0 in self.strengths or len(set(self.strengths)) < len(self.strengths):
            raise NeedsError(f"The strengths of Steering must be some, each once, and not 0. Got {self.strengths}")
        if self.draws < 1:
            raise NeedsError(f"Steering must have at least one random direction to compare with. Got {self.draws}")

    @cached_property  # interventions are equal to themselves alone, and needs() must not change
    def _rows(self) -> tuple[tuple[Intervention, ...], ...]:
        """The concept and the draws, strength by strength; and the ablation."""
        own = self.probe.direction(self.concept)
        draws = torch.randn(self.draws, len(own), generator=torch.Generator().manual_seed(self.seed))
        site = self.probe.site.at(self.positions)
        rows: list[tuple[Intervention, ...]] = [
            (Steer(site, d, strength),) for d in (own, *draws) for strength in self.strengths
        ]
        names = None if len(self.probe.classes) == 2 else [self.concept or self.probe.classes[-1]]
        return (*rows, (self.probe.ablate(names, self.positions),))

    def needs(self, model: Model) -> Needs:
        width = self.probe.weight.shape[1]
        if "d_model" in self.probe.site.axes and width != model.dims.d_model:
            raise NeedsError(
                f"the probe at {self.probe.site} has {width} dimensions and {model.name} has {model.dims.d_model};"
                " give one that was fitted on this model"
            )
        rows = self._rows
        wanted = {"metric": self.metric, "loss": loss()}
        return Needs(sweeps={name: Sweep(metric, rows=rows, base="clean") for name, metric in wanted.items()})

    def observe(self, batch: Batch) -> Part:
        values: dict[str, tuple[Any, str]] = {}
        for name, swept in batch.sweeps.items():
            assert swept.values is not None and swept.base is not None
            values[name] = (swept.values - swept.base[:, None], "example row")
        values["clean"] = (batch.sweeps["metric"].base, "example")
        return Part(values)

    def combine(self, parts: Iterator[Part], context: Context) -> Result:
        data = Result.of(parts).data
        n, k = data.sizes["example"], len(self.strengths)
        change, worse = (
            data[v].transpose("example", "row").values[:, :-1].reshape(n, -1, k) for v in ("metric", "loss")
        )
        one, controls = change[:, 0], change[:, 1:]
        found = summarize(one, context.seed)
        excess = summarize(one - controls.mean(1), context.seed)
        cost = np.exp(worse.mean(0))  # direction strength: of the geometric mean over examples
        last = [np.array([data[v].values[:, -1].mean()]) for v in ("metric", "loss")]
        at = ("strength",)
        variables: dict[str, Any] = {
            "mean": (at, found.mean), "ci_low": (at, found.ci_low), "ci_high": (at, found.ci_high),
            "excess": (at, excess.mean), "p": (at, excess.p), "q": (at, excess.q),
            "cost": (at, cost[0]), "control_cost": (at, cost[1:].mean(0)),
            "control": (("strength", "draw"), controls.mean(0).T),
            "ablation": (("measure",), np.concatenate([last[0], np.exp(last[1])])),
            "effect": (("example", "strength"), one),
            "clean": (("example",), data["clean"].values),
        }  # fmt: skip
        coords: dict[str, Any] = {"strength": list(self.strengths), "measure": ["effect", "cost"]}
        out = xr.Dataset(variables, coords)
        # For the figure: the concept and the mean of the controls as two lines.
        both = np.stack([found.mean, controls.mean((0, 1))])
        out["change"] = (("direction", "strength"), both)
        out = out.assign_coords(direction=[self.concept or self.probe.classes[-1], "random directions"])
        views = (
            View(
                "lines",
                "change",
                "strength",
                by="direction",
                title="Steering",
                unit=f"change of the {self.metric.label}",
            ),
            View(
                "lines", "cost", "strength", title="Perplexity of the prompts, steered over not steered", unit="times"
            ),
        )
        about = {"site": str(self.probe.site), "class": self.concept or self.probe.classes[-1], "draws": self.draws}
        return Result(out, about, views)
