"""Ablation: what the metric loses when a component is switched off, alone or together with others."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mechinterp.analyzers.patching import at_one
from mechinterp.core.analyzer import Analyzer, Batch, Chosen, Context, Model, Needs, Sweep, Writes
from mechinterp.core.interventions import Mean, Zero
from mechinterp.core.metrics import Metric, logit_diff
from mechinterp.core.result import Part, Result, View
from mechinterp.core.statistics import summarize
from mechinterp.errors import ExamplesError, NeedsError
from mechinterp.model.slices import index
from mechinterp.sites import KINDS, Position, Site, Sites

Array = npt.NDArray[Any]

RANDOM = 10
"""Random orders that make the control; in a single one the first may happen to be a strong component."""


@dataclass(frozen=True)
class Ablation(Analyzer):
    """Overwrite one component at a time in the clean run, and measure what the metric loses.

    ``effect`` is ablated - clean, in units of the metric; a component that the behaviour needs has a negative
    one. Three values are usual in place of the component's own:

    - ``"zero"``;
    - ``"mean"`` (Wang et al. 2023): one vector for each layer (and head), the mean of its activation in the
      clean run over all real tokens of all examples but each example's first, which is often an attention
      sink unlike all others; tokens weigh alike, so longer examples weigh more. It is put at every position
      that is ablated. Wang et al. average position by position, over prompts of one shape. A first round
      gathers the means (as sums, in float64), a second ablates;
    - ``"resample"`` (Chan et al. 2022): the value in the example's corrupted prompt.

    `cumulative` adds a round that ablates the k components of largest \\|effect\\| together, for every k in it,
    and as many at random as a control, the mean of `RANDOM` random orders. They are ranked by these same
    examples, so a ranked curve is steeper than new examples would show.

    Result: ``effect``, ``ci_low``, ``ci_high``, ``p``, ``q`` over the grid's axes (``layer``, ``position``,
    ``head`` or ``neuron``), ``ablated`` (with ``example``) and ``clean`` as metrics. With `cumulative` also
    ``rank`` of each component, 0 for the largest \\|effect\\|, and over ``order`` (``"ranked"``, ``"random"``) and
    ``size`` the same numbers of what is ablated together, as ``cumulative``, ``cumulative_ci_low`` and so on.
    Intervals and p are over examples (bootstrap; sign flips, NaN below six examples), q over the cells of each.

    Attributes:
        site: the kind of site, such as ``"z"`` or ``"mlp_out"``.
        method: ``"zero"``, ``"mean"`` or ``"resample"``.
        heads: ``"each"``, some (a tuple among them is a set, ablated together), or None for all at once. A
            site without heads has no such axis.
        neurons: the same for mlp_gate, mlp_up and mlp_act; by default all at once.
        positions: where it is ablated: None for everywhere, one position, or an axis of several or ``"each"``.
        layers: None for all.
        metric: what is measured.
        cumulative: sizes of the sets ablated together, such as ``(1, 2, 4, 8)``; none by default.
        seed: of the random orders.
    Raises:
        NeedsError: a site without layers, means of attention, or more components together than there are.
        ExamplesError: ``"resample"`` without corrupted prompts; means of examples that are one token long.
    """

    site: str = "z"
    method: Literal["zero", "mean", "resample"] = "zero"
    heads: Chosen = "each"
    neurons: Chosen = None
    positions: str | int | tuple[Position, ...] | None = None
    layers: tuple[int, ...] | None = None
    metric: Metric = field(default_factory=logit_diff)
    cumulative: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.site not in KINDS or not KINDS[self.site].layered:
            raise NeedsError(
                "The site of Ablation must be a kind that layers have, such as 'z', with layers=, heads= and"
                f" positions= beside it. Got {self.site!r}"
            )
        if self.method not in ("zero", "mean", "resample"):
            raise NeedsError(f"The method of Ablation must be 'zero', 'mean' or 'resample'. Got {self.method!r}")
        if self.method == "mean" and KINDS[self.site].axes[:2] != ("batch", "pos"):
            raise NeedsError(
                f"{self.site} has no vector for each token ({' '.join(KINDS[self.site].axes)}), so no mean; use 'zero'"
            )
        if any(size < 1 for size in self.cumulative):
            raise NeedsError(f"The cumulative sizes of Ablation must be 1 or more. Got {self.cumulative}")
        if self.cumulative and (self.positions == "each" or isinstance(self.positions, tuple)):
            raise NeedsError(
                "components are ablated together at all positions, or at one; leave positions= of Ablation None, or"
                f" name one, beside cumulative=. Got {self.positions!r}"
            )

    def needs(self, model: Model) -> Needs:
        if (most := max(self.cumulative, default=0)) > (there := self._components(model)):
            raise NeedsError(f"{most} components cannot be ablated together: there are {there}; give smaller sizes")
        return Needs(reads=Sites(self.site, self.layers)) if self.method == "mean" else self._then(None).needs(model)

    def observe(self, batch: Batch) -> Part:
        if self.method != "mean":
            return self._then(None).observe(batch)
        examples = batch.examples
        column = torch.arange(examples.mask.shape[1], device=examples.mask.device)
        chosen = examples.mask & (column != examples.starts[:, None])
        layers = list(range(batch.model.dims.n_layers) if self.layers is None else self.layers)
        sums = torch.stack([batch.clean[Site(self.site, layer)][chosen].double().sum(0) for layer in layers])
        axes = "layer head dim" if sums.ndim == 3 else "layer dim"
        return Part({"sum": (sums, axes), "tokens": (chosen.sum(), "")}, coords={"layer": layers})

    @property
    def merge(self) -> Callable[[Part, Part], Part] | None:
        """Sums for means are added up as batches go by; cells are joined at the end."""
        return _add if self.method == "mean" else None

    def combine(self, parts: Iterator[Part], context: Context) -> Result | Analyzer:
        if self.method != "mean":
            return self._then(None).combine(parts, context)
        part = next(parts)
        if not (tokens := int(part.values["tokens"][0])):
            raise ExamplesError(
                "every example is one token long, and first tokens are left out of means; give longer texts, or"
                " ablate with 'zero'"
            )
        return self._then(dict(zip(part.coords["layer"], part.values["sum"][0] / tokens, strict=True)))

    def _then(self, means: Mapping[int, Tensor] | None) -> "_Each":
        """The round that ablates."""
        if means is not None:
            return _Each(self, partial(mean_at, means))
        return _Each(self, Zero if self.method == "zero" else None)

    @property
    def by_head(self) -> Chosen:
        """Heads, of a site that has them."""
        return None if KINDS[self.site].head_axis is None and self.heads == "each" else self.heads

    def _components(self, model: Model) -> int:
        layers = model.dims.n_layers if self.layers is None else len(self.layers)
        chosen, count = self.by_head, model.dims.heads(self.site) or 1
        if self.neurons is not None:
            chosen, count = self.neurons, model.dims.d_mlp
        return layers * (1 if chosen is None else count if isinstance(chosen, str) else len(chosen))


@dataclass(frozen=True)
class _Each(Analyzer):
    """One component at a time.

    Attributes:
        asked: the analysis.
        write: what is put there; None for the value of the corrupted run.
    """

    asked: Ablation
    write: Writes | None

    def needs(self, model: Model) -> Needs:
        asked = self.asked
        grid = Sweep(
            asked.metric,
            Sites(asked.site, asked.layers),
            asked.positions,
            asked.by_head,
            asked.neurons,
            self.write,
            source="corrupted",
            base="clean",
        )
        return Needs(sweeps={"grid": grid})

    def observe(self, batch: Batch) -> Part:
        grid = batch.sweeps["grid"]
        assert grid.values is not None and grid.base is not None
        axes = " ".join(("example", *grid.axes))
        coords = {name: list(entries) for name, entries in grid.coords.items()}
        return Part({"ablated": (grid.values, axes), "clean": (grid.base, "example")}, coords=coords)

    def combine(self, parts: Iterator[Part], context: Context) -> Result | Analyzer:
        data = Result.of(parts, unit=f"{self.asked.metric}").data
        data["ablated"] = data["ablated"].transpose("example", ...)
        dims = [str(d) for d in data["ablated"].dims[1:]]
        effect = _change(data["ablated"].values, data["clean"].values, context.seed)
        data = data.assign({name: (dims, value) for name, value in effect.items()})[[*effect, "ablated", "clean"]]
        result = Result(data, {}, _views(dims, self.asked))
        return _Together(self.asked, self.write, result) if self.asked.cumulative else result


@dataclass(frozen=True, eq=False)
class _Together(Analyzer):
    """Sets of components: the first of a ranking, and of random orders."""

    asked: Ablation
    write: Writes | None
    each: Result

    def orders(self) -> list[Array]:
        """Numbers of the components, as they lie in the grid, in the order in which they go: ranked, then random."""
        effect = self.each.data["effect"].values.ravel()
        ranked = np.argsort(-np.nan_to_num(np.abs(effect), nan=-1.0), kind="stable")
        random = np.random.default_rng(self.asked.seed)
        return [ranked, *(random.permutation(len(effect)) for _ in range(RANDOM))]

    def needs(self, model: Model) -> Needs:
        asked = self.asked
        sets = [self._sites(order[:size]) for order in self.orders() for size in asked.cumulative]
        rows = tuple(tuple(site if self.write is None else self.write(site) for site in some) for some in sets)
        return Needs(sweeps={"sets": Sweep(asked.metric, rows=rows, source="corrupted", base="clean")})

    def _sites(self, components: Array) -> tuple[Site, ...]:
        """One site for each layer that some components lie in."""
        effect, asked = self.each.data["effect"], self.asked
        layers: dict[int, set[int]] = {}
        for place in zip(*np.unravel_index(components, effect.shape), strict=True):
            entries = {str(dim): effect[dim].values[i] for dim, i in zip(effect.dims, place, strict=True)}
            parts = layers.setdefault(int(entries.pop("layer")), set())
            for part in entries.values():  # one head or neuron, or a set of them
                parts.update(map(int, str(part).split("+")))
        name = "heads" if asked.neurons is None else "neurons"
        return tuple(
            replace(Site(asked.site, layer, positions=asked.positions), **{name: tuple(sorted(parts)) or None})
            for layer, parts in sorted(layers.items())
        )

    def observe(self, batch: Batch) -> Part:
        values = batch.sweeps["sets"].values
        assert values is not None
        sizes = self.asked.cumulative
        curves = values.reshape(len(values), -1, len(sizes))
        two = torch.stack([curves[:, 0], curves[:, 1:].mean(1)], 1)
        coords = {"order": ["ranked", "random"], "size": list(sizes)}
        return Part({"together": (two, "example order size")}, coords=coords)

    def combine(self, parts: Iterator[Part], context: Context) -> Result:
        together = Result.of(parts).data["together"].transpose("example", "order", "size")
        data, dims = self.each.data, self.each.data["effect"].dims
        change = _change(together.values, data["clean"].values, context.seed)
        names = {name: "cumulative" if name == "effect" else f"cumulative_{name}" for name in change}
        rank = np.argsort(self.orders()[0]).reshape(data["effect"].shape)
        data = data.assign_coords(order=together["order"], size=together["size"]).assign(
            {"rank": (dims, rank)} | {names[name]: (("order", "size"), value) for name, value in change.items()}
        )
        first = [*change, "rank"]
        title = f"{_where(self.asked)} ablated together ({self.asked.method}), largest first and at random"
        view = View("lines", "cumulative", "size", by="order", title=title, unit=_unit(self.asked))
        return Result(data[[*first, *(n for n in data.data_vars if n not in first)]], {}, (*self.each.views, view))


def mean_at(means: Mapping[int, Tensor], site: Site) -> Mean:
    """Puts the mean of a site's own heads and neurons there."""
    assert site.layer is not None
    mean = means[site.layer]
    if site.heads is not None:
        mean = mean[index(site.heads)]
    return Mean(site, mean if site.neurons is None else mean[..., index(site.neurons)])


def _add(a: Part, b: Part) -> Part:
    values = {name: (value + b.values[name][0], axes) for name, (value, axes) in a.values.items()}
    return Part(values, coords=a.coords, rows=a.rows + b.rows)


def _change(ablated: Array, clean: Array, seed: int) -> dict[str, Array]:
    """Mean of ablated - clean over examples, with its uncertainty; ``example *cells``."""
    found = summarize(ablated - clean.reshape(-1, *[1] * (ablated.ndim - 1)), seed)
    return {"effect": found.mean, "ci_low": found.ci_low, "ci_high": found.ci_high, "p": found.p, "q": found.q}


def _unit(asked: Ablation) -> str:
    return f"change of {asked.metric.label}"


def _where(asked: Ablation) -> str:
    return asked.site + at_one(asked.positions)


def _views(dims: list[str], asked: Ablation) -> tuple[View, ...]:
    title, unit = f"Ablation of {_where(asked)} ({asked.method})", _unit(asked)
    if len(dims) == 1:
        return (View("lines", "effect", dims[0], title=title, unit=unit),)
    return (View("heatmap", "effect", dims[-1], dims[0], title=title, unit=unit, center=0.0),)
