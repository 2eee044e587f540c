"""What single dimensions of a hidden state go with: their correlation with known features of the text."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import xarray as xr
from scipy import stats

from mechinterp.core.analyzer import Analyzer, Batch, Context, Model, Needs
from mechinterp.core.result import Part, Result, View
from mechinterp.core.statistics import fdr
from mechinterp.errors import ExamplesError, NeedsError
from mechinterp.sites import Position, Site


@dataclass(frozen=True)
class DimensionCorrelation(Analyzer):
    """Pearson's correlation over examples of hidden dimensions with features of the texts that are known.

    That a dimension correlates is no sign that the model uses it, and a feature may be spread over many: dimensions
    are no natural basis of the residual stream, save for its outliers.

    Result: ``correlation`` (``feature dimension``), with ``ci_low, ci_high`` (95%, Fisher's z), ``p`` (Student's t) and
    ``q`` (over all of them). NaN where a feature or a dimension is the same in all texts.

    Attributes:
        features: name → a number for each example.
        dimensions: which; None for the `top` of largest |weight| in a classifier's head, or the first ones elsewhere.
        site: whose dimensions; what the head reads by default.
        positions: of the one token of each text.
        top: how many, where none are named.
    Raises:
        NeedsError: no features, or a dimension that is not there. ExamplesError: a feature of another length, or fewer
            than four examples.
    """

    features: Mapping[str, tuple[float, ...]] = field(hash=False)
    dimensions: tuple[int, ...] | None = None
    site: str = "final_norm"
    positions: Position = "end"
    top: int = 20

    def __post_init__(self) -> None:
        if not self.features or self.top < 1:
            raise NeedsError(f"DimensionCorrelation must have features and a top above 0. Got {self}")

    def needs(self, model: Model) -> Needs:
        if odd := [d for d in self.dimensions or () if not 0 <= d < model.dims.d_model]:
            raise NeedsError(f"{model.name} has {model.dims.d_model} dimensions, and no dimension {odd[0]}")
        return Needs(self._site)

    @property
    def _site(self) -> Site:
        return (Site.parse(self.site) if "." in self.site else Site(self.site)).at(self.positions)

    def observe(self, batch: Batch) -> Part:
        value = batch.clean[self._site]
        return Part(value[:, list(self._chosen(batch.model))].float(), "example dimension")

    def _chosen(self, model: Model) -> tuple[int, ...]:
        if self.dimensions is not None:
            return self.dimensions
        if model.dims.n_labels is None:
            return tuple(range(min(self.top, model.dims.d_model)))
        weight = model.W_U.detach().float()
        return tuple((weight - weight.mean(0)).norm(dim=0).argsort(descending=True)[: self.top].tolist())

    def combine(self, parts: Iterator[Part], context: Context) -> Result:
        values = Result.of(parts).data["value"].transpose("example", "dimension").values.astype(float)
        n = len(values)
        if n < 4:
            raise ExamplesError(f"a correlation takes four texts or more, and there are {n}")
        names = list(self.features)
        for name in names:
            if len(self.features[name]) != n:
                raise ExamplesError(f"the feature {name!r} has {len(self.features[name])} numbers for {n} texts")
        known = np.array([self.features[name] for name in names], dtype=float)
        a = values - values.mean(0)
        b = known - known.mean(1, keepdims=True)
        with np.errstate(invalid="ignore", divide="ignore"):
            r = b @ a / (np.linalg.norm(b, axis=1)[:, None] * np.linalg.norm(a, axis=0))
            r = np.clip(r, -1.0, 1.0)
            t = r * np.sqrt((n - 2) / np.maximum(1 - r**2, 1e-15))
            p = 2 * stats.t.sf(np.abs(t), n - 2)
            z, reach = np.arctanh(np.clip(r, -1 + 1e-12, 1 - 1e-12)), stats.norm.ppf(0.975) / np.sqrt(n - 3)
        at = ("feature", "dimension")
        data = xr.Dataset(
            {
                "correlation": (at, r),
                "ci_low": (at, np.tanh(z - reach)),
                "ci_high": (at, np.tanh(z + reach)),
                "p": (at, p),
                "q": (at, fdr(p.ravel()).reshape(p.shape)),
            },
            {"feature": names, "dimension": list(self._chosen(context.model))},
        )
        view = View(
            "heatmap", "correlation", "dimension", "feature", center=0.0, title="Dimensions and features of the text",
            unit="Pearson's r",
        )  # fmt: skip
        return Result(data, {"examples": n}, (view,))
