"""Steering: a direction added to what the model computes, and what that does to its answers and costs its text."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
import xarray as xr

from mechinterp.core.analyzer import Analyzer, Batch, Context, Model, Needs, Sweep
from mechinterp.core.interventions import Intervention, Project, Steer
from mechinterp.core.linear_probe import LinearProbe
from mechinterp.core.metrics import Metric, log_odds, loss
from mechinterp.core.result import Part, Result, View
from mechinterp.core.statistics import fdr, rank_p, summarize
from mechinterp.errors import NeedsError
from mechinterp.sites import Position

READ_AGAIN = 5
"""Random directions under which the prompts' own text is scored, which takes logits at all tokens."""


@dataclass(frozen=True)
class Steering(Analyzer):
    """A concept's direction added at its site with many strengths, against random directions of equal norm.

    One sweep: each strength of each direction is a row, beside rows that remove its line altogether
    (`LinearProbe.ablate`; Arditi et al. 2024). Random directions are isotropic, and much of what they point to is
    where activations never are: that a concept does more than these is necessary, and no proof of what it means.

    Result (``strength``, in activation units): ``mean`` change of the metric with ``ci_low, ci_high`` (95%, bootstrap
    over examples); ``control`` (``strength draw``), the same of each random direction; ``excess``, the mean less that
    of the controls', with ``p``, two-sided, from the concept's rank among them (`rank_p`; no smaller than 1 / (draws +
    1)), and ``q`` over the strengths; ``cost``, how many times larger the perplexity of the examples' own text gets,
    and ``control_cost``, that of the first five random ones. Where the line is removed (``measure``: the ``effect`` on
    the metric, and the ``cost``): ``ablation`` with ``ablation_ci_low, ablation_ci_high``, ``ablation_control``
    (``measure draw``), the same of random lines, and ``ablation_p`` of the effect, from the rank among these.
    ``effect`` (``example strength``) and ``clean`` (``example``) are what it is made of.

    Attributes:
        probe: with the site and the direction.
        concept: whose direction; the probe's last class by default.
        strengths: in activation units, which `ActivationStats` gives the norms of.
        positions: where it is added; all tokens by default.
        draws: random directions, each as many rows as the concept's; with fewer than 20 no p is below .05.
        metric: what should change. Examples need answers for the default; two tokens or more for the cost.
        seed: of the random directions.
    Raises:
        NeedsError: no strengths, strengths of 0 or twice the same, no draws, or a probe of another width.
    """

    probe: LinearProbe = field(hash=False)
    concept: str | None = None
    strengths: tuple[float, ...] = (-8.0, -4.0, -2.0, 2.0, 4.0, 8.0)
    positions: Position | None = None
    draws: int = 99
    metric: Metric = field(default_factory=log_odds)
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.strengths or 0.0 in self.strengths or len(set(self.strengths)) < len(self.strengths):
            raise NeedsError(f"The strengths of Steering must be some, each once, and not 0. Got {self.strengths}")
        if self.draws < 1:
            raise NeedsError(f"Steering must have at least one random direction to compare with. Got {self.draws}")

    @cached_property  # interventions are equal to themselves alone, and needs() must not change
    def _rows(self) -> tuple[tuple[Intervention, ...], ...]:
        """Of the concept and of each draw: every strength, then the ablation."""
        own = self.probe.direction(self.concept)
        draws = torch.randn(self.draws, len(own), generator=torch.Generator().manual_seed(self.seed))
        site = self.probe.site.at(self.positions)
        return tuple(
            (one,)
            for d in (own, *draws)
            for one in (*(Steer(site, d, strength) for strength in self.strengths), Project(site, d))
        )

    def needs(self, model: Model) -> Needs:
        self.probe.check(model)
        rows = self._rows
        read_again = rows[: (1 + min(READ_AGAIN, self.draws)) * (1 + len(self.strengths))]
        return Needs(
            sweeps={
                "metric": Sweep(self.metric, rows=rows, base="clean"),
                "loss": Sweep(loss(), rows=read_again, base="clean"),
            }
        )

    def observe(self, batch: Batch) -> Part:
        values: dict[str, tuple[Any, str]] = {}
        for name, swept in batch.sweeps.items():
            assert swept.values is not None and swept.base is not None
            change = swept.values - swept.base[:, None]
            values[name] = (
                torch.nn.functional.pad(change, (0, len(self._rows) - change.shape[1]), value=torch.nan),
                "example row",
            )
        values["clean"] = (batch.sweeps["metric"].base, "example")
        return Part(values)

    def combine(self, parts: Iterator[Part], context: Context) -> Result:
        data = Result.of(parts).data
        n, k = data.sizes["example"], len(self.strengths)
        every = {
            v: data[v].transpose("example", "row").values.reshape(n, 1 + self.draws, k + 1) for v in ("metric", "loss")
        }
        change, gone = every["metric"][..., :k], np.stack([every[v][..., k] for v in ("metric", "loss")], -1)
        one, controls = change[:, 0], change[:, 1:].mean(0)  # draw strength
        found, p = summarize(one, context.seed), rank_p(one.mean(0), controls)
        cost = np.exp(every["loss"][..., :k].mean(0))  # direction strength: of the geometric mean over examples
        removed, lines = summarize(gone[:, 0], context.seed), gone[:, 1:].mean(0)  # draw measure

        def times(of: Any) -> Any:
            """The second measure as a ratio of perplexities."""
            return np.stack([of[..., 0], np.exp(of[..., 1])])

        at, measure = ("strength",), ("measure",)
        variables: dict[str, Any] = {
            "mean": (at, found.mean), "ci_low": (at, found.ci_low), "ci_high": (at, found.ci_high),
            "excess": (at, found.mean - controls.mean(0)), "p": (at, p), "q": (at, fdr(p)),
            "cost": (at, cost[0]), "control_cost": (at, np.nanmean(cost[1:], 0)),
            "control": (("strength", "draw"), controls.T),
            "ablation": (measure, times(removed.mean)),
            "ablation_ci_low": (measure, times(removed.ci_low)), "ablation_ci_high": (measure, times(removed.ci_high)),
            "ablation_p": (measure, rank_p(removed.mean, lines)),
            "ablation_control": (("measure", "draw"), times(lines)),
            "effect": (("example", "strength"), one),
            "clean": (("example",), data["clean"].values),
        }  # fmt: skip
        coords: dict[str, Any] = {"strength": list(self.strengths), "measure": ["effect", "cost"]}
        out = xr.Dataset(variables, coords)
        # For the figure: the concept and the mean of the controls as two lines.
        both = np.stack([found.mean, controls.mean(0)])
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
                "lines",
                "cost",
                "strength",
                title="Perplexity of the prompts, steered over not steered",
                unit="times",
                interval=False,
            ),
        )
        about = {"site": str(self.probe.site), "class": self.concept or self.probe.classes[-1], "draws": self.draws}
        return Result(out, about, views)
