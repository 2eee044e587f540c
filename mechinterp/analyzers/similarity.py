"""How alike layers are, and texts within groups and between them: features of units, kept few and compared."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from mechinterp.analyzers.units import Units, features, part, sharing
from mechinterp.core.analyzer import Analyzer, Batch, Context, Model, Needs, Wanted
from mechinterp.core.result import Part, Result, View
from mechinterp.core.similarity import (
    LEAST,
    MEASURES,
    Array,
    Likeness,
    Measure,
    centred,
    folds,
    jackknife,
    likeness,
    standardized,
    top_share,
)
from mechinterp.core.statistics import fdr
from mechinterp.core.tokens import is_label
from mechinterp.errors import ExamplesError, NeedsError
from mechinterp.sites import Site

FEW = 6
"""Pairs of groups that are still drawn as lines."""


@dataclass(frozen=True)
class Kept:
    """Features that were kept: ``site unit dim``, the text of each unit, and its tokens."""

    x: Float[Tensor, "site unit dim"]
    owner: npt.NDArray[np.int64]
    tokens: npt.NDArray[np.int64]
    seen: int
    """Units that there were."""
    top_share: Array
    """Of each site, the share of variance that is in one dimension, before any standardizing."""

    def meta(self, reads: Sequence[Site]) -> dict[str, Any]:
        """What a result says of its units, and of sites where they are all the same."""
        constant = [str(site) for site, x in zip(reads, self.x, strict=True) if not bool(centred(x).any())]
        return {
            "units": len(self.owner),
            "units_seen": self.seen,
            "sharing": sharing(self.owner, self.tokens),
            "texts": len(np.unique(self.owner)),
            "constant": constant,
        }


@dataclass(frozen=True)
class Sampled(Analyzer):
    """Reads features of units and keeps at most so many of these, drawn at random by their text and the seed alone.

    To subclass: `combine` gets what was kept from `kept`. Memory is sites × `most` × width × 4 bytes, twice.

    Attributes:
        sites: of one width, each with one vector for each token.
        units: what one vector stands for: a text, a span, each token or word.
        most: units that are kept; where there are more, `Result.meta` says how many (``units``, ``units_seen``).
        seed: of the choice of units, and of whatever else is drawn.
        standardize: take z-scores of each dimension over the units. A dimension of massive activations can hold nearly
            all variance, and then every measure is about it alone (Timkey & van Schijndel 2021).
    Raises:
        NeedsError: sites without a vector for each token, or of several widths, or a `most` below 4.
        ExamplesError: fewer than four units.
    """

    sites: Wanted = "resid_post"
    units: Units = field(default_factory=Units)
    most: int = 1000
    seed: int = 0
    standardize: bool = False

    def needs(self, model: Model) -> Needs:
        if self.most < LEAST:
            raise NeedsError(f"The most of {self.name} must be at least {LEAST} units. Got {self.most}")
        return Needs(self.reads(model))

    def reads(self, model: Model) -> tuple[Site, ...]:
        return self.units.reads(self.sites, model.dims.n_layers)

    def observe(self, batch: Batch) -> Part:
        values = part(self.units, self.reads(batch.model), batch).values
        owner = Counter(values["owner"][0].tolist())  # a text's units stand together
        keys = [np.random.default_rng((self.seed, text)).random(n) for text, n in owner.items()]
        key, seen = torch.from_numpy(np.concatenate([np.empty(0), *keys])), torch.tensor([owner.total()])
        return self._thinned({**values, "key": (key, "unit"), "seen": (seen, "one")}, ())

    def merge(self, a: Part, b: Part) -> Part:
        values: dict[str, tuple[Tensor, str]] = {}
        for name, (value, axes) in a.values.items():
            other = b.values[name][0]
            at = axes.split().index("unit") if name != "seen" else 0
            values[name] = (value + other if name == "seen" else torch.cat([value, other], at), axes)
        return self._thinned(values, a.rows + b.rows)

    def _thinned(self, values: Mapping[str, tuple[Tensor, str]], rows: tuple[int, ...]) -> Part:
        """The units of the smallest keys, in their order."""
        key = values["key"][0]
        if len(key) <= self.most:
            return Part(values, rows=rows)
        chosen = key.argsort()[: self.most].sort().values
        axes = {name: names.split() for name, (_, names) in values.items()}
        return Part(
            {
                name: (value.index_select(axes[name].index("unit"), chosen) if name != "seen" else value, names)
                for name, (value, names) in values.items()
            },
            rows=rows,
        )

    def kept(self, parts: Iterable[Part], labels: Sequence[Any] | None = None) -> Kept:
        """All that was kept, in the order of the texts.

        Args:
            labels: of the texts; units of those without are left out.
        Raises:
            ExamplesError: fewer than four units.
        """
        found = list(parts)
        seen = sum(int(p.values["seen"][0]) for p in found)
        if seen < LEAST:
            raise ExamplesError(f"{self.name} takes {LEAST} units or more, and there are {seen}; give more texts")
        x, owner, tokens = features(found)
        if labels is not None:
            mine = np.flatnonzero([is_label(labels[text]) for text in owner])
            if len(mine) < LEAST:
                raise ExamplesError(
                    f"{self.name} takes {LEAST} units with a label or more, and there are {len(mine)}; give more"
                )
            x, owner, tokens = x[:, torch.from_numpy(mine)], owner[mine], tokens[mine]
        share = np.array([float(top_share(site)) for site in x])
        for site in x if self.standardize else ():
            site.copy_(standardized(site))
        return Kept(x, owner, tokens, seen, share)


@dataclass(frozen=True)
class UnitFeatures(Sampled):
    """The features themselves, for studies of several runs: ``features`` (``site unit dim``), ``owner``, ``tokens``."""

    def combine(self, parts: Iterator[Part], context: Context) -> Result:
        kept, reads = self.kept(parts), self.reads(context.model)
        data = xr.Dataset(
            {
                "features": (("site", "unit", "dim"), kept.x.numpy()),
                "owner": ("unit", kept.owner),
                "tokens": (("unit", "bound"), kept.tokens),
            },
            {"site": [str(site) for site in reads]},
        )
        return Result(data, kept.meta(reads))


@dataclass(frozen=True)
class Similarity(Sampled):
    """How alike the layers of a model are: cosine, debiased CKA and RSA of all pairs of sites, from one shared pass.

    The measures are those of `mechinterp.core.similarity`: the mean cosine of a unit's two vectors, linear CKA with
    the unbiased HSIC, and Spearman's correlation of dissimilarities (1 - cosine). A text's first token, often an
    attention sink with massive activations, is in no unit but one that names it: a position, a span or a word there.

    Intervals are those of the jackknife over texts, nulls shuffle texts of one side against the other, and q is over
    all pairs of sites and measures. Layers of one model share a residual stream, so that nearly all of them are more
    alike than chance: the null says where zero is, not what is surprising.

    Result (``measure layer other_layer``; ``site`` in place of ``layer`` where kinds differ): ``similarity``,
    ``ci_low, ci_high``, ``p``, ``q``, ``null_mean`` and ``null_high`` (its 95th percentile), ``at_chance`` (q of .05 or
    more); and ``top_share`` (``layer``), the share of variance that is in one dimension. NaN where the features of a
    site are constant, such as embeddings of equal last tokens; `meta` names these.

    Attributes:
        measures: some of ``"cosine"``, ``"cka"``, ``"rsa"``.
        draws: shuffles; p is at least 1 / (draws + 1), and NaN without any.
    Raises:
        NeedsError, ExamplesError: as for `Sampled`; an unknown measure.
    """

    measures: tuple[Measure, ...] = MEASURES
    draws: int = 200

    def needs(self, model: Model) -> Needs:
        check_measures(self.name, self.measures)
        return super().needs(model)

    def combine(self, parts: Iterator[Part], context: Context) -> Result:
        kept, reads = self.kept(parts), self.reads(context.model)
        found: dict[Measure, Likeness] = {
            name: likeness(kept.x, kept.x, name, kept.owner, draws=self.draws, seed=self.seed)
            for name in self.measures
        }  # fmt: skip
        axis, labels = places(reads)
        data = compared(found, axis, labels, labels, same=True).assign(top_share=(axis, kept.top_share))
        return Result(data, kept.meta(reads), (likeness_view(axis, f"How alike the {axis}s are"),))


@dataclass(frozen=True)
class GroupSimilarity(Sampled):
    """Whether texts of a group are more alike than texts of different groups, at every layer; groups are the labels.

    Texts without a label (None) are in no group: left out, and counted in ``meta["unlabelled"]``.

    Mean cosine over pairs of units of different texts. The gap of two groups is the mean of the similarities within
    the two, less that between them; its p is that of a test that shuffles the labels of their texts, one-sided, and q
    is over all pairs of groups and sites. Vectors of a layer often share a large common direction, which brings all
    cosines near 1; the gap is what is left of it.

    Result: ``similarity`` (``group other_group layer``) with ``similarity_ci_low, similarity_ci_high``; ``gap`` (``pair
    layer``) with ``gap_ci_low, gap_ci_high`` (jackknife over texts), ``p`` and ``q``; ``texts`` (``group``).

    Attributes:
        draws: shuffles; p is at least 1 / (draws + 1).
    Raises:
        NeedsError, ExamplesError: as for `Sampled`; no labels, a single group, or one with a single text.
    """

    draws: int = 1000

    def combine(self, parts: Iterator[Part], context: Context) -> Result:
        kept, reads = self.kept(parts, context.tokens.labels), self.reads(context.model)
        texts, number = np.unique(kept.owner, return_inverse=True)
        names, group = _groups(context, texts)
        member = np.eye(len(names))[group]
        sums, counts = _pair_sums(kept.x, torch.from_numpy(number), len(texts))
        whole = _means(sums, counts, member)
        stays = np.stack(list(folds(np.arange(len(texts)), self.seed)))
        without = np.stack([_means(sums, counts, member * some[:, None]) for some in stays])
        pairs = list(combinations(range(len(names)), 2))
        gap, left = (np.stack([_gap(some, a, b) for a, b in pairs], -2) for some in (whole, without))
        p = np.stack([self._p(sums, counts, group, a, b, gap[i]) for i, (a, b) in enumerate(pairs)])
        low, high = jackknife(whole, without)
        gap_low, gap_high = (2 * bound for bound in jackknife(gap / 2, left / 2))  # of cosines: between -2 and 2
        axis, labels = places(reads)
        two, one = ("group", "other_group", axis), ("pair", axis)
        data = xr.Dataset(
            {
                "gap": (one, gap), "gap_ci_low": (one, gap_low), "gap_ci_high": (one, gap_high),
                "p": (one, p), "q": (one, fdr(p)),
                "similarity": (two, whole), "similarity_ci_low": (two, low), "similarity_ci_high": (two, high),
                "texts": ("group", np.bincount(group, minlength=len(names))),
            },
            {
                axis: labels, "group": names, "other_group": names,
                "pair": [f"{names[a]} | {names[b]}" for a, b in pairs],
            },
        )  # fmt: skip
        title, unit = "How much more alike texts are within their groups", "cosine within - between"
        few = len(pairs) <= FEW and axis == "layer"
        view = (
            View("lines", "gap", axis, by="pair", title=title, unit=unit) if few else
            View("heatmap", "gap", axis, "pair", center=0.0, title=title, unit=unit)
        )  # fmt: skip
        return Result(data, {**kept.meta(reads), "unlabelled": unlabelled(context.tokens.labels)}, (view,))

    def _p(self, sums: Array, counts: Array, group: npt.NDArray[np.int64], a: int, b: int, gap: Array) -> Array:
        """One-sided, by shuffling which of two groups' texts are the first's; ``site``."""
        here = np.flatnonzero((group == a) | (group == b))
        first = (group[here] == a).astype(float)
        rng = np.random.default_rng((self.seed, a, b))
        dealt = rng.permuted(np.repeat(first[None], self.draws, 0), axis=1)
        pairs = counts[np.ix_(here, here)]
        out: list[float] = []
        for site, observed in zip(sums, gap, strict=True):
            inside, between, outside = (
                s / n for s, n in zip(_blocks(dealt, site[np.ix_(here, here)]), _blocks(dealt, pairs), strict=True)
            )
            drawn = (inside + outside) / 2 - between
            out.append((1 + float((drawn >= observed - 1e-9).sum())) / (self.draws + 1))
        return np.where(np.isfinite(gap), out, np.nan)


def unlabelled(labels: Sequence[Any] | None) -> int:
    """How many texts have no label, where some have."""
    return sum(not is_label(label) for label in labels or ())


def check_measures(name: str, measures: Sequence[str]) -> None:
    """Refuse none, and unknown ones.

    Raises:
        NeedsError: there is one.
    """
    if not measures or not set(measures) <= set(MEASURES):
        raise NeedsError(f"The measures of {name} must be some of {', '.join(MEASURES)}. Got {measures!r}")


def places(reads: Sequence[Site]) -> tuple[str, list[Any]]:
    """Name and entries of the axis of sites: ``layer`` and numbers where all are of one kind, or ``site`` and names."""
    layers = [site.layer for site in reads]
    if len({site.kind for site in reads}) == 1 and None not in layers and len(set(layers)) == len(layers):
        return "layer", layers
    return "site", [str(site) for site in reads]


def compared(
    found: Mapping[Measure, Likeness], axis: str, labels: Sequence[Any], others: Sequence[Any], same: bool = False
) -> xr.Dataset:
    """Likenesses of all pairs of sites as one dataset; where both sides are the same, each pair is tested once."""
    names = ("value", "ci_low", "ci_high", "p", "null_mean", "null_high")
    value, low, high, p, mean, top = (np.stack([getattr(one, name) for one in found.values()]) for name in names)
    if same:
        upper = np.triu(np.ones(p.shape[1:], dtype=bool), 1)
        q = _mirrored(fdr(np.where(upper, p, np.nan)))
        value, low, high, p, mean, top = map(_mirrored, (value, low, high, np.where(upper, p, np.nan), mean, top))
    else:
        q = fdr(p)
    dims = ("measure", axis, f"other_{axis}")
    arrays = {
        "similarity": value, "ci_low": low, "ci_high": high, "p": p, "q": q, "null_mean": mean, "null_high": top,
        "at_chance": q >= 0.05,
    }  # fmt: skip
    return xr.Dataset(
        {name: (dims, array) for name, array in arrays.items()},
        {"measure": list(found), axis: list(labels), f"other_{axis}": list(others)},
    )


def likeness_view(axis: str, title: str) -> View:
    return View(
        "heatmap", "similarity", f"other_{axis}", axis, by="measure", scale="shared", mark="at_chance", title=title,
        unit="similarity",
    )  # fmt: skip


def _mirrored(values: Array) -> Array:
    """The upper triangle of the last two axes on both sides of the diagonal."""
    lower = np.tril(np.ones(values.shape[-2:], dtype=bool), -1)
    return np.where(lower, np.swapaxes(values, -1, -2), values)


def _groups(context: Context, texts: npt.NDArray[np.int64]) -> tuple[list[str], npt.NDArray[np.int64]]:
    """The groups' names, as they come, and the group of each text."""
    labels = context.tokens.labels
    if labels is None:
        raise ExamplesError("these examples have no labels, which say what their groups are; give Examples.of labels=")
    mine = [str(labels[text]) for text in texts]
    names = list(dict.fromkeys(mine))
    if len(names) < 2:
        raise ExamplesError(f"all texts have the label {names[0]!r}, and it takes two groups to compare")
    if alone := [name for name in names if mine.count(name) < 2]:
        raise ExamplesError(f"the group {alone[0]!r} has one text, which can be like no other of its group; give more")
    return names, np.array([names.index(name) for name in mine])


def _pair_sums(
    x: Float[Tensor, "site unit dim"], number: Tensor, texts: int
) -> tuple[Float[np.ndarray, "site text other"], Float[np.ndarray, "text other"]]:
    """Sums of cosines over the units of two texts, and how many there are; 0 of a text with itself."""
    out: list[Array] = []
    for site in x.double():
        total = torch.zeros(texts, site.shape[1], dtype=torch.float64)
        total.index_add_(0, number, site / site.norm(dim=-1, keepdim=True))
        out.append((total @ total.T).fill_diagonal_(0.0).numpy())
    each = torch.bincount(number, minlength=texts).double()
    return np.stack(out), torch.outer(each, each).fill_diagonal_(0.0).numpy()


def _means(sums: Array, counts: Array, member: Array) -> Array:
    """Mean cosine of pairs of units of different texts, ``group other site``."""
    total = np.einsum("tg,stu,uh->ghs", member, sums, member, optimize=True)
    return _share(total, (member.T @ counts @ member)[..., None])


def _share(total: Array, count: Array) -> Array:
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=np.broadcast_to(count > 0, total.shape))


def _gap(means: Array, a: int, b: int) -> Array:
    """Within two groups less between them, ``... site``, from means ``... group other site``."""
    return (means[..., a, a, :] + means[..., b, b, :]) / 2 - means[..., a, b, :]


def _blocks(first: Array, values: Array) -> tuple[Array, Array, Array]:
    """Sums of a symmetric matrix within the first group, between, and within the second, for each draw of the first."""
    inside = ((first @ values) * first).sum(1)
    rows = first @ values.sum(0)
    return inside, rows - inside, values.sum() - 2 * rows + inside
