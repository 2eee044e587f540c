"""Whether sentences and their translations are represented alike, layer by layer."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from mechinterp.analyzers.similarity import places
from mechinterp.analyzers.units import Units, features, part
from mechinterp.core.analyzer import Analyzer, Batch, Context, Model, Needs, Wanted
from mechinterp.core.result import Part, Result, View
from mechinterp.core.similarity import ROUNDING, Array, Likeness, centred, likeness, standardized, top_share
from mechinterp.core.statistics import fdr, summarize
from mechinterp.core.tokens import is_label
from mechinterp.errors import ExamplesError, NeedsError
from mechinterp.sites import Site

LEAST_PAIRS = 6
"""Sentences that two languages must share: below, no interval or test says anything."""
FEATURES = ("raw", "centred", "standardized")
"""As they are; less their mean over the sentences of a language; as z-scores of each dimension over these."""
DRAWS_AT_ONCE = 100


@dataclass(frozen=True)
class CrossLingual(Analyzer):
    """How alike a model represents sentences and their translations, by layer and pair of languages.

    The examples' labels are the languages, and `rows` says which sentence each text is; `mi.studies.read_parallel`
    makes both from a file. Of every pair of languages, over the sentences that both have:

    - the *gap*: mean cosine of a sentence with its translation, less that with the translations of all others. Cosines
      alone say little, since all vectors of a layer may share a large direction. p is of shuffled translations;
    - *retrieval accuracy*: how often the nearest by cosine among all sentences of the other language is the
      translation, in both directions; chance is 1 / sentences;
    - *debiased CKA*, which needs no shared coordinates (`mechinterp.core.similarity`).

    Where the large direction differs by language it swamps all else; and a few tokens with massive activations, mostly
    in one dimension, can make up nearly all of a mean over tokens. So gap and accuracy are measured of ``features`` as
    they are (``raw``), less each language's mean (``centred``; Libovický et al. 2020), and as z-scores of each
    dimension within each language (``standardized``; Timkey & van Schijndel 2021), and CKA, which centres by itself, of
    the first and the last. ``top_share`` is the share of a language's variance that is in one dimension.

    Intervals are 95%: over sentences by bootstrap for the gap, Wilson's for accuracy (which holds at 0 and 1, where a
    bootstrap has no width), by jackknife for CKA. q is over all tests of the same table. Sentences that stand in a
    fixed order in one document, or share words and numbers, are alike across languages without being understood.

    Result: ``accuracy`` (``features direction layer``) with ``accuracy_ci_low, accuracy_ci_high``, ``p``, ``q``;
    ``gap``, ``gap_ci_low, gap_ci_high``, ``paired``, ``unpaired``, ``gap_p``, ``gap_q`` (``features pair layer``);
    ``cka``, ``cka_ci_low, cka_ci_high``, ``cka_p``, ``cka_q``, ``cka_null_mean, cka_null_high`` (``scaling pair
    layer``); ``top_share`` (``language layer``), ``sentences`` (``pair``) and ``chance`` (``direction``). NaN where a
    language's features are all the same.

    All features are in memory: texts × sites × width × 4 bytes, twice.

    Attributes:
        rows: the number of the sentence that each text is or translates.
        sites: of one width, each with one vector for each token.
        units: one vector a text; by default the mean over all tokens but the first.
        draws: shuffles, for CKA at most 200; p is at least 1 / (shuffles + 1).
        seed: of shuffles and bootstrap.
    Raises:
        NeedsError: several vectors a text, or sites that do not fit.
        ExamplesError: a text without a label, texts of one language, or twice the same sentence in a language; as many
            rows as texts are needed; two languages that share fewer than six sentences.
    """

    rows: tuple[int, ...]
    sites: Wanted = "resid_post"
    units: Units = field(default_factory=lambda: Units("all"))
    draws: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.units.each is not None or self.draws < 1:
            raise NeedsError(f"CrossLingual must have one vector a text, and draws above 0. Got {self.units}")

    def needs(self, model: Model) -> Needs:
        return Needs(self._reads(model))

    def _reads(self, model: Model) -> tuple[Site, ...]:
        return self.units.reads(self.sites, model.dims.n_layers)

    def observe(self, batch: Batch) -> Part:
        return part(self.units, self._reads(batch.model), batch)

    def combine(self, parts: Iterator[Part], context: Context) -> Result:
        x, _, _ = features(parts)
        pairs = self._pairs(context)
        axis, labels = places(self._reads(context.model))
        found: dict[str, list[dict[str, Array]]] = {name: [] for name in FEATURES}
        alike: dict[str, list[Likeness]] = {"raw": [], "standardized": []}
        for shared in pairs.values():
            one, other = (x[:, list(some)] for some in zip(*shared, strict=True))
            sides = dict(zip(FEATURES, zip(*(_features(some) for some in (one, other)), strict=True), strict=True))
            orders = self._orders(len(shared))
            for name, (a, b) in sides.items():
                found[name].append(_measured(_cosines(a, b), orders, self.seed))
                if name in alike:
                    draws = min(self.draws, 200)
                    alike[name].append(likeness(a, b, "cka", matched=True, draws=draws, seed=self.seed))
        data = _dataset(found, alike, pairs, axis, labels)
        spoken = np.array([str(label) for label in context.tokens.labels or ()])
        languages = list(dict.fromkeys(spoken.tolist()))
        shares = np.stack([top_share(x[:, torch.from_numpy(spoken == name)]).numpy() for name in languages])
        data = data.assign_coords(language=languages).assign(top_share=(("language", axis), shares))
        return Result(data, {"texts": x.shape[1]}, _views(axis, len(pairs)))

    def _orders(self, n: int) -> npt.NDArray[np.int64]:
        """Shuffled translations, ``draw sentence``."""
        return np.random.default_rng(self.seed).permuted(np.tile(np.arange(n), (self.draws, 1)), axis=1)

    def _pairs(self, context: Context) -> dict[tuple[str, str], list[tuple[int, int]]]:
        """Of each two languages the texts that are translations of each other."""
        labels = context.tokens.labels
        if labels is None:
            raise ExamplesError("these examples have no labels, which say what language each text is in; give labels=")
        if len(self.rows) != len(labels):
            raise ExamplesError(f"CrossLingual has {len(self.rows)} rows for {len(labels)} texts; give one for each")
        if gone := [i for i, label in enumerate(labels) if not is_label(label)]:
            raise ExamplesError(f"text {gone[0]} has no label, which says its language; give it one, or leave it out")
        by_language: dict[str, dict[int, int]] = {}
        for i, (label, row) in enumerate(zip(labels, self.rows, strict=True)):
            mine = by_language.setdefault(str(label), {})
            if row in mine:
                raise ExamplesError(f"texts {mine[row]} and {i} are both sentence {row} in {label}; leave one out")
            mine[row] = i
        if len(by_language) < 2:
            raise ExamplesError("all texts are in one language, and it takes two to compare")
        out: dict[tuple[str, str], list[tuple[int, int]]] = {}
        for a, b in combinations(by_language, 2):
            one, other = by_language[a], by_language[b]
            shared = [(one[row], other[row]) for row in sorted(one.keys() & other.keys())]
            if len(shared) < LEAST_PAIRS:
                raise ExamplesError(
                    f"{a} and {b} share {len(shared)} sentences, and {LEAST_PAIRS} are the least; give more"
                    " translations, or leave a language out"
                )
            out[a, b] = shared
        return out


def _features(x: Float[Tensor, "site n dim"]) -> tuple[Tensor, Tensor, Tensor]:
    """In the order of `FEATURES`."""
    return x.double(), centred(x), standardized(x)


def _cosines(one: Float[Tensor, "site n dim"], other: Float[Tensor, "site n dim"]) -> Float[np.ndarray, "site n n"]:
    a, b = (x / x.norm(dim=-1, keepdim=True) for x in (one, other))
    return (a @ b.transpose(1, 2)).numpy()


def _measured(cosines: Float[np.ndarray, "site n n"], orders: npt.NDArray[np.int64], seed: int) -> dict[str, Array]:
    """What the cosines of all sentences of two languages come to, each ``site``, and accuracies ``direction site``."""
    n = cosines.shape[1]
    own = np.arange(n)
    paired = cosines[:, own, own]  # site sentence
    unpaired = ((cosines.sum(1) + cosines.sum(2)) / 2 - paired) / (n - 1)
    each = summarize((paired - unpaired).T, seed)
    nearest = np.stack([cosines.argmax(2), cosines.argmax(1)])  # direction site sentence
    known = np.isfinite(cosines).all((1, 2))
    right = np.where(known, (nearest == own).mean(-1), np.nan)
    as_close, as_right = np.ones(len(cosines)), np.ones(right.shape)
    for start in range(0, len(orders), DRAWS_AT_ONCE):
        some = orders[start : start + DRAWS_AT_ONCE]
        as_close += (cosines[:, own, some].mean(-1) >= paired.mean(-1)[:, None] - ROUNDING).sum(1)
        as_right += ((nearest[..., None, :] == some).mean(-1) >= right[..., None] - ROUNDING).sum(-1)
    low, high = _wilson(right, n)
    total = len(orders) + 1
    return {
        "gap": each.mean, "gap_ci_low": each.ci_low, "gap_ci_high": each.ci_high, "paired": paired.mean(-1),
        "unpaired": unpaired.mean(-1), "gap_p": np.where(known, as_close / total, np.nan),
        "accuracy": right, "accuracy_ci_low": low, "accuracy_ci_high": high,
        "p": np.where(known, as_right / total, np.nan),
    }  # fmt: skip


def _wilson(share: Array, n: int) -> tuple[Array, Array]:
    """95% interval of a share of n (Wilson 1927)."""
    z = float(stats.norm.ppf(0.975))
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    reach = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    return np.maximum(middle - reach, 0.0), np.minimum(middle + reach, 1.0)


def _dataset(
    found: Mapping[str, Sequence[Mapping[str, Array]]],
    alike: Mapping[str, Sequence[Likeness]],
    pairs: Mapping[tuple[str, str], Sequence[Any]],
    axis: str,
    labels: Sequence[Any],
) -> xr.Dataset:
    names = list(next(iter(found.values()))[0])
    stacked = {name: np.stack([[one[name] for one in of] for of in found.values()]) for name in names}
    ways = {name: stacked.pop(name) for name in names if name.startswith("accuracy") or name == "p"}
    joined = {name: values.reshape(len(found), -1, len(labels)) for name, values in ways.items()}
    cka = {
        "cka" if name == "value" else f"cka_{name}": np.stack(
            [[getattr(one, name) for one in some] for some in alike.values()]
        )
        for name in ("value", "ci_low", "ci_high", "p", "null_mean", "null_high")
    }
    sentences = [len(shared) for shared in pairs.values()]
    here, there, each = ("features", "direction", axis), ("features", "pair", axis), ("scaling", "pair", axis)
    return xr.Dataset(
        {
            **{name: (here, values) for name, values in joined.items()},
            "q": (here, fdr(joined["p"])),
            **{name: (there, values) for name, values in stacked.items()},
            "gap_q": (there, fdr(stacked["gap_p"])),
            **{name: (each, values) for name, values in cka.items()},
            "cka_q": (each, fdr(cka["cka_p"])),
            "sentences": ("pair", np.array(sentences)),
            "chance": ("direction", np.repeat(1 / np.array(sentences), 2)),
        },
        {
            "features": list(found), "scaling": list(alike), axis: list(labels),
            "pair": [f"{a} | {b}" for a, b in pairs],
            "direction": [way for a, b in pairs for way in (f"{a} → {b}", f"{b} → {a}")],
        },
    )  # fmt: skip


def _views(axis: str, pairs: int) -> tuple[View, ...]:
    """Lines of all kinds of features, and all pairs as heatmaps."""
    means = " (mean over pairs)" if pairs > 1 else ""
    best = FEATURES[2]
    return (
        View("lines", "accuracy", axis, by="features", title=f"Retrieval of translations{means}", unit="accuracy"),
        View("heatmap", "accuracy", axis, "direction", title=f"Retrieval by direction, {best} features",
             select={"features": best}),
        View("heatmap", "gap", axis, "pair", title=f"Translations less other sentences, {best} features",
             unit="cosine paired - unpaired", select={"features": best}),
        View("heatmap", "cka", axis, "pair", title=f"Debiased CKA of two languages, {best} features", unit="CKA",
             select={"scaling": best}),
        View("lines", "top_share", axis, by="language", title="How much of the variance is in one dimension",
             unit="share of variance"),
    )  # fmt: skip
