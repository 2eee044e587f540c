"""Heads grouped by where they look: profiles reduced inside the pass, clustered, and shown by their middle heads."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from jaxtyping import Float
from scipy.cluster.hierarchy import cut_tree, linkage
from scipy.spatial.distance import pdist, squareform
from torch import Tensor

from mechinterp import sites
from mechinterp.analyzers.categories import pattern_entropy
from mechinterp.analyzers.heads import ROLES, at_offset, role_counts, role_mass
from mechinterp.core.analyzer import Analyzer, Batch, Context, Model, Needs, Own
from mechinterp.core.display import visible
from mechinterp.core.examples import Examples
from mechinterp.core.result import Part, Result, View
from mechinterp.core.tokens import TokenBatch
from mechinterp.core.trace import Read, Reduce
from mechinterp.errors import ExamplesError, NeedsError

Array = npt.NDArray[np.floating]

FEATURES = (*ROLES, "self", "recent", "entropy")
RECENT = (5, 16)
MOST = 8
RESAMPLES = 100


@dataclass(frozen=True)
class HeadClusters(Analyzer):
    """Heads grouped by their patterns on any text, with one head of each group to look at.

    A head's profile has eight numbers between 0 and 1, each a mean over queries and then over examples: attention on
    the previous token, the four before the query, the first token, equal tokens, and tokens after equal ones (as in
    `HeadRoles`); on the query itself; on the tokens 5 to 16 back (``recent``, without the first token); and the
    entropy of its attention as a share of the largest possible (``entropy``). They are reduced inside the pass, so no
    pattern is held. What no query of any example has is left out.

    Profiles are clustered by Ward's method on Euclidean distances; all are shares, so none is rescaled. The number
    of clusters is the one with the largest mean silhouette (Rousseeuw 1987), from 2 to 8. A cluster's ``stability`` is
    the mean, over 100 bootstrap samples of the examples that are clustered anew, of its Jaccard similarity to the
    most similar new cluster (Hennig 2007; below 0.6 it should not be believed); NaN for a single example. Its
    ``representative`` is its medoid, whose ``pattern`` on the first tokens of one example is read in a second pass.
    A cluster is named by its number and the feature in which it is farthest above the mean of all heads.

    Result: ``cluster``, ``kind`` (its name) and ``silhouette`` (``layer head``); ``profile`` (``feature layer head``);
    ``centre`` (``cluster feature``); ``size``, ``stability``, ``representative`` (``cluster``); ``mean_silhouette``
    (``clusters``, by their number); ``pattern`` (``cluster query key``).

    Attributes:
        clusters: how many; None to choose by silhouette.
        example: number of the example that representatives are shown on.
        shown: how many of its tokens, from the first.
        seed: of the bootstrap.
    Raises:
        NeedsError: fewer heads than clusters, or no more than two heads.
        ExamplesError: there is no such example.
    """

    clusters: int | None = None
    example: int = 0
    shown: int = 20
    seed: int = 0

    def needs(self, model: Model) -> Needs:
        heads = model.dims.n_layers * model.dims.n_heads
        if heads < 3 or (self.clusters is not None and not 2 <= self.clusters < heads):
            raise NeedsError(f"the clusters of HeadClusters must be 2 to {heads - 1} of {heads}. Got {self.clusters}")
        return Needs(reads=Read(sites.pattern(), reduce=Reduce(profile_mass, "example feature head")))

    def observe(self, batch: Batch) -> Part:
        mass = batch.clean.stack("pattern")  # layer example feature head
        count = profile_counts(batch.examples).to(mass)[None, :, :, None]
        return Part(mass / count, "layer example feature head", {"feature": FEATURES})

    def combine(self, parts: Iterator[Part], context: Context) -> Analyzer:
        values = Result.of(parts).data["value"].transpose("example", "layer", "head", "feature")
        if not 0 <= self.example < values.sizes["example"]:
            raise ExamplesError(f"there is no example {self.example} among {values.sizes['example']}; choose another")
        each = values.values.reshape(values.sizes["example"], -1, len(FEATURES))
        known = np.asarray(np.isfinite(each).any((0, 1)))
        each = each[:, :, known]
        data = self._grouped(each, [f for f, k in zip(FEATURES, known, strict=True) if k], context.model)
        ids = context.tokens.ids[self.example][: self.shown]
        return Representatives(data, ids)

    def _grouped(
        self, each: Float[np.ndarray, "example unit feature"], features: list[str], model: Model
    ) -> xr.Dataset:
        """All but the patterns; a unit is a head of a layer."""
        profile = weighted_mean(each, np.ones((1, len(each))))[0]
        tree, distances = linkage(profile, "ward"), squareform(pdist(profile))
        numbers = list(range(2, min(MOST, len(profile) - 1) + 1)) if self.clusters is None else [self.clusters]
        cuts = [np.asarray(cut_tree(tree, n))[:, 0] for n in numbers]
        scores = [silhouettes(distances, cut) for cut in cuts]
        best = int(np.argmax([s.mean() for s in scores]))
        order = np.argsort(-np.bincount(cuts[best]), kind="stable")  # largest first
        groups = np.argsort(order)[cuts[best]]
        members = [np.flatnonzero(groups == i) for i in range(len(order))]
        medoids = [m[distances[np.ix_(m, m)].sum(1).argmin()] for m in members]
        centre = np.stack([profile[m].mean(0) for m in members])
        names = [f"{i + 1} {features[(c - profile.mean(0)).argmax()]}" for i, c in enumerate(centre)]
        heads, shape = model.dims.n_heads, (model.dims.n_layers, model.dims.n_heads)
        cells = ("layer", "head")
        return xr.Dataset(
            {
                "cluster": (cells, groups.reshape(shape) + 1),
                "kind": (cells, np.array(names, dtype=object)[groups].reshape(shape)),
                "silhouette": (cells, scores[best].reshape(shape)),
                "profile": (("feature", *cells), profile.T.reshape(-1, *shape)),
                "centre": (("group", "feature"), centre),
                "size": (("group",), np.array([len(m) for m in members])),
                "stability": (("group",), self._stability(each, groups)),
                "representative": (
                    ("group",),
                    np.array([f"a{m // heads}.h{m % heads}" for m in medoids], dtype=object),
                ),
                "mean_silhouette": (("clusters",), np.array([s.mean() for s in scores])),
            },
            {
                "layer": np.arange(shape[0]),
                "head": np.arange(heads),
                "feature": features,
                "group": names,
                "clusters": numbers,
            },
            {"unit": "share of attention"},
        )

    def _stability(self, each: Float[np.ndarray, "example unit feature"], groups: npt.NDArray[np.integer]) -> Array:
        n, count = len(each), groups.max() + 1
        if n < 2:
            return np.full(count, np.nan)
        draws = np.random.default_rng(self.seed).multinomial(n, np.full(n, 1 / n), RESAMPLES)
        found: list[Array] = []
        for profile in weighted_mean(each, draws):
            again = np.asarray(cut_tree(linkage(profile, "ward"), count))[:, 0]
            both = np.zeros((count, count))
            np.add.at(both, (groups, again), 1)
            found.append((both / (both.sum(1)[:, None] + both.sum(0) - both)).max(1))
        return np.mean(found, 0)


@dataclass(frozen=True, eq=False)
class Representatives(Analyzer):
    """The second round of `HeadClusters`: the patterns of one head of each cluster, on one text."""

    data: xr.Dataset
    ids: tuple[int, ...]

    def needs(self, model: Model) -> Needs:
        by_layer: dict[int, set[int]] = {}
        for layer, head in self._heads():
            by_layer.setdefault(layer, set()).add(head)
        reads = [sites.pattern(layer, heads=tuple(sorted(heads))) for layer, heads in sorted(by_layer.items())]
        return Needs(on={"shown": Own(Examples.of([self.ids]), reads)})

    def combine(self, parts: Iterator[Part], context: Context) -> Result:
        trace, patterns = context.own["shown"], []
        for layer, head in self._heads():
            read = next(r.site for r in trace.reads if r.site.layer == layer)
            assert isinstance(read.heads, tuple)
            patterns.append(trace[read][0, read.heads.index(head)].float().cpu().numpy())
        tokens = [f"{i} {visible(t)}" for i, t in enumerate(context.model.to_str_tokens(self.ids))]
        groups = zip(self.data["group"].values, self.data["representative"].values, strict=True)
        names = [f"{name}: {head}" for name, head in groups]
        shown = xr.DataArray(
            np.stack(patterns), {"shown": names, "query": tokens, "key": tokens}, ("shown", "query", "key")
        )
        return Result(self.data.assign(pattern=shown), {}, _views(names))

    def _heads(self) -> list[tuple[int, int]]:
        names = (str(name)[1:].split(".h") for name in self.data["representative"].values)
        return [(int(layer), int(head)) for layer, head in names]


def profile_mass(block: Float[Tensor, "example head query key"], queries: slice, batch: TokenBatch) -> Tensor:
    """What `FEATURES` are made of, summed over a block of queries, ``example feature head``."""
    recent = torch.stack([at_offset(block, queries, batch, offset, 1) for offset in range(RECENT[0], RECENT[1] + 1)])
    visible_keys = batch.mask.cumsum(1)[:, queries]
    spread = pattern_entropy(block.float())  # example head query
    share = spread / visible_keys.clamp(min=2).log()[:, None]
    entropy = (share * (batch.mask[:, queries] & (visible_keys > 1))[:, None]).sum(-1).to(block.dtype)
    more = torch.stack([at_offset(block, queries, batch, 0), recent.sum(0), entropy], 1)
    return torch.cat([role_mass(block, queries, batch), more], 1)


def profile_counts(batch: TokenBatch) -> Float[Tensor, "example feature"]:
    """How many queries of each example have what a feature is about."""
    lengths = batch.lengths
    more = torch.stack([lengths, (lengths - 1 - RECENT[0]).clamp(min=0), lengths - 1], 1)
    return torch.cat([role_counts(batch)[0], more], 1)


def weighted_mean(
    each: Float[np.ndarray, "example unit feature"], weights: npt.NDArray[Any]
) -> Float[np.ndarray, "draw unit feature"]:
    """Means over examples that have a feature; where none of a draw has it, over all examples."""
    have = np.isfinite(each)
    filled = np.where(have, each, 0.0)
    total, count = np.tensordot(weights, filled, 1), np.tensordot(weights, have.astype(float), 1)
    plain = filled.sum(0) / np.maximum(have.sum(0), 1)
    return np.where(count > 0, total / np.maximum(count, 1e-9), plain)


def silhouettes(distances: Float[np.ndarray, "unit unit"], groups: npt.NDArray[np.integer]) -> Array:
    """(b - a) / max(a, b) of every unit, a its mean distance to its group and b to the nearest other; 0 if alone."""
    member = np.eye(groups.max() + 1)[groups]
    sizes = member.sum(0)
    mean = distances @ member / sizes
    own = sizes[groups]
    inside = np.take_along_axis(mean, groups[:, None], 1)[:, 0] * own / np.maximum(own - 1, 1)
    other = np.where(member > 0, np.inf, mean).min(1)
    largest = np.maximum(inside, other)
    return np.where((own > 1) & (largest > 0), (other - inside) / np.where(largest > 0, largest, 1), 0.0)


def _views(shown: list[str]) -> tuple[View, ...]:
    return (
        View(
            "heatmap", "cluster", "head", "layer", text="kind", title="Clusters of heads", unit="number of the cluster"
        ),
        View("heatmap", "centre", "feature", "group", title="Profiles of the clusters", unit="share of attention"),
        View(
            "heatmap",
            "pattern",
            "key",
            "query",
            by="shown",
            title="A representative head of each cluster",
            unit="attention",
            scale="shared",
            select={"shown": tuple(shown[:MOST])},
        ),
    )
