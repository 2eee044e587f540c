"""What a metric loses without single features of a sparse autoencoder: ranked by a gradient, ablated one by one."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechinterp.analyzers.features import AT_ONCE, counted
from mechinterp.analyzers.gradients import check_gradients
from mechinterp.analyzers.paths import as_written
from mechinterp.core.analyzer import Analyzer, Batch, Context, Grad, Model, Needs, Sweep
from mechinterp.core.interventions import Apply
from mechinterp.core.metrics import Metric, logit_diff
from mechinterp.core.result import Part, Result, View
from mechinterp.core.statistics import summarize
from mechinterp.errors import ExamplesError, NeedsError
from mechinterp.model.autoencoder import SparseAutoencoder


@dataclass(frozen=True)
class FeatureEffects(Analyzer):
    """What a metric loses when one feature of a sparse autoencoder or transcoder is set to 0, feature by feature.

    The feature's share of the reconstruction, f_i W_dec[i], is taken away at every token but each text's first, and
    everything else stays, the SAE's error included; ``effect`` is ablated - clean. Features are first ranked by the
    linear estimate of that effect, ``attribution`` = -Σ f_i W_dec[i] · ∂m/∂x over tokens (Marks et al. 2024), one
    gradient for all of them: by the mean over texts of its magnitude, which does not know the sign of any
    text's effect, so that the sign-flip test of those that are chosen stays what it is. Features of a transcoder
    are read in the clean run, which is exact, since nothing before its output is written.

    An effect is of the feature as this SAE has it: a concept that is split over many features has a small effect in
    each, and one that a more specific feature absorbed is missing there.

    Result: ``effect``, ``ci_low``, ``ci_high``, ``p``, ``q`` (over the features that were ablated), ``attribution``
    and ``active``, the share of texts with it (``feature``); ``ablated`` (``example feature``) and ``clean``.

    Attributes:
        sae: see `mechinterp.SparseAutoencoder`.
        features: which; by default the `top` of largest |attribution|.
        metric: what is measured.
        top: how many are ablated, where none are named.
        first: whether each text's first token is ablated, too.
    Raises:
        NeedsError: a top below 1, or a metric without a gradient. ExamplesError: no feature is active anywhere.
        ModelError, SiteError: as `Features`.
    """

    sae: SparseAutoencoder
    features: tuple[int, ...] | None = None
    metric: Metric = field(default_factory=logit_diff)
    top: int = 32
    first: bool = False

    def __post_init__(self) -> None:
        if self.top < 1:
            raise NeedsError(f"The top of FeatureEffects must be above 0. Got {self.top}")
        if self.features is not None:
            self.sae.numbers(self.features)

    def needs(self, model: Model) -> Needs:
        self.sae.check(model)
        check_gradients(self.name, model)
        return Needs(self.sae.site, {"out": Grad(self.sae.out, self.metric)})

    def observe(self, batch: Batch) -> Part:
        sae = self.sae
        x, gradient = batch.clean[sae.site], batch.grads["out"][sae.out]
        kept = counted(batch.examples, self.first)
        signed = torch.zeros(len(x), len(sae), dtype=torch.float64)
        active = torch.zeros(len(sae), dtype=torch.long)
        for row in range(len(x)):
            here = torch.zeros(len(sae), dtype=torch.bool)
            for some in kept[row].nonzero()[:, 0].split(max(1, AT_ONCE // len(sae))):
                f = sae.written(x[row, some])
                along = gradient[row, some].flatten(1).to(f) @ sae.W_dec.T
                signed[row] -= (f * along).sum(0).double().cpu()
                here |= (f > 0).any(0).cpu()
            active += here
        values = {"magnitude": signed.abs().sum(0), "signed": signed.sum(0), "active": active}
        return Part({name: (value, "feature") for name, value in values.items()})

    def merge(self, a: Part, b: Part) -> Part:
        values = {name: (value + b.values[name][0], axes) for name, (value, axes) in a.values.items()}
        return Part(values, rows=a.rows + b.rows)

    def combine(self, parts: Iterator[Part], context: Context) -> Result | Analyzer:
        part = next(parts)
        magnitude, signed, active = (part.values[n][0].numpy() for n in ("magnitude", "signed", "active"))
        if self.features is not None:
            chosen = self.sae.numbers(self.features)
        else:
            order = np.argsort(-magnitude, kind="stable")[: self.top]
            chosen = tuple(int(i) for i in order if active[i])
        if not chosen:
            raise ExamplesError(f"none of the {len(self.sae)} features is active in these texts; give others")
        n, some = len(part.rows), list(chosen)
        return _Ablating(self, chosen, tuple(signed[some] / n), tuple(active[some] / n))


@dataclass(frozen=True)
class _Ablating(Analyzer):
    """One feature at a time."""

    asked: FeatureEffects
    chosen: tuple[int, ...]
    attribution: tuple[float, ...]
    active: tuple[float, ...]

    def needs(self, model: Model) -> Needs:
        return Needs(self.asked.sae.site)

    def observe(self, batch: Batch) -> Part:
        sae, examples = self.asked.sae, batch.examples
        kept = counted(examples, self.asked.first)
        f = sae.written(batch.clean[sae.site], self.chosen)
        f = f.where(kept.to(f.device)[..., None], 0.0)
        rows = tuple(
            (Apply(sae.out, partial(_without, as_written(f[..., i], sae.out, examples), sae.direction(feature))),)
            for i, feature in enumerate(self.chosen)
        )
        swept = batch.rerun(Sweep(self.asked.metric, rows=rows, base="clean"))
        assert swept.values is not None and swept.base is not None
        return Part(
            {"ablated": (swept.values, "example feature"), "clean": (swept.base, "example")},
            coords={"feature": list(self.chosen)},
        )

    def combine(self, parts: Iterator[Part], context: Context) -> Result:
        asked = self.asked
        data = Result.of(parts, unit=f"{asked.metric}").data
        said = summarize(data["ablated"].values - data["clean"].values[:, None], context.seed)
        new: dict[str, Any] = {"effect": said.mean, **{n: getattr(said, n) for n in ("ci_low", "ci_high", "p", "q")}}
        new |= {"attribution": np.array(self.attribution), "active": np.array(self.active)}
        data = data.assign({name: ("feature", value) for name, value in new.items()})
        unit, title = f"change of {asked.metric.label}", f"Features of {asked.sae.out}, ablated one by one"
        view = View("bars", "effect", "feature", title=title, unit=unit)
        return Result(data[[*new, "ablated", "clean"]], {"sae": repr(asked.sae)}, (view,))


def _without(f: Tensor, direction: Tensor, value: Tensor) -> Tensor:
    """A slice of all positions less what a feature writes, ``example pos`` times its direction."""
    new = f[:, : value.shape[1], None] * direction
    return value - new.reshape(value.shape).to(value)
