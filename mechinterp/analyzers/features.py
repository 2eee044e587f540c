"""Features of a sparse autoencoder on texts: which are active where, and what they leave out."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from torch import Tensor

from mechinterp.analyzers.gradients import token_texts
from mechinterp.analyzers.paths import as_written
from mechinterp.core.analyzer import Analyzer, Batch, Context, Model, Needs, Sweep
from mechinterp.core.interventions import Replace
from mechinterp.core.metrics import Loss, Metric, loss
from mechinterp.core.result import Part, Result, View
from mechinterp.core.statistics import ratio
from mechinterp.core.tokens import TokenBatch
from mechinterp.errors import ExamplesError, NeedsError
from mechinterp.model.autoencoder import SparseAutoencoder

Array = npt.NDArray[Any]

SHOWN = 20
"""Features whose strongest tokens are shown, where none are named."""
AT_ONCE = 1 << 24
"""Numbers in one block of tokens × features."""
BINS = 20
"""Of the histogram of densities."""


@dataclass(frozen=True)
class Features(Analyzer):
    """The features of a sparse autoencoder or transcoder on texts, and how much of the activations they explain.

    Over all tokens but each text's first, which is often an attention sink that no SAE was trained on:

    - ``explained_variance`` = 1 - Σ‖x - x̂‖² / Σ‖x - mean x‖²; ``l0``, active features a token; ``cosine`` of x and x̂;
    - ``recovered`` = (m(0) - m(x̂)) / (m(0) - m(x)), of a metric m with zeros, with the reconstruction, and with the
      activations themselves at the site, all else as it is (for the loss, "loss recovered": Bricken et al. 2023);
    - ``dead``, the share of features that are active nowhere in these texts.

    A reconstruction that explains most of the variance may still lose what the model goes by, so look at both.
    The tokens where a feature is strongest show the top of its range, and say little of the rest.

    Result: ``value, ci_low, ci_high`` (``measure``), of all texts together, bootstrapped over them; ``density``, the
    share of tokens at which a feature is active, ``mean`` over all tokens and ``max`` (``feature``); ``tokens, l0,
    cosine`` and the metric as ``clean, spliced, zeroed`` (``example``); ``strongest`` and ``strength`` (``example
    rank``), each text's features by their largest or mean activation; ``activation, text, at, token, before, after``
    (``shown place``), where features are strongest, with the number of the text and of the token in it;
    ``features`` (``log10_density``), how many have about this density. With `per_token` also ``token_feature``,
    ``token_activation`` (``example position rank``) and ``token_text`` (``example position``).

    Attributes:
        sae: whose site is read; see `mechinterp.SparseAutoencoder`.
        features: whose strongest tokens are shown; by default the `SHOWN` that write most.
        top: features a text and a token, and tokens a feature.
        pool: how a text's features are ranked: by their largest activation, or the mean over its tokens.
        metric: of ``recovered``; None to leave it out.
        context: tokens that are shown on each side of one.
        first: whether each text's first token counts, too.
        per_token: whether every token's strongest features are kept.
    Raises:
        NeedsError: a number that is too small, or the loss of a classifier. ExamplesError: a text of one token.
        ModelError: a feature that is not there, or an SAE of another width. SiteError: a site that the model lacks.
    """

    sae: SparseAutoencoder
    features: tuple[int, ...] | None = None
    top: int = 10
    pool: Literal["max", "mean"] = "max"
    metric: Metric | None = field(default_factory=loss)
    context: int = 8
    first: bool = False
    per_token: bool = False

    def __post_init__(self) -> None:
        if self.top < 1 or self.context < 0 or self.pool not in ("max", "mean"):
            raise NeedsError(f"Features takes a top above 0, a context of 0 or more, and pool max or mean. Got {self}")
        if self.features is not None:
            self.sae.numbers(self.features)

    def needs(self, model: Model) -> Needs:
        self.sae.check(model)
        if isinstance(self.metric, Loss) and model.dims.n_labels is not None:
            raise NeedsError(f"{model.name} is a classifier and has no loss of tokens; give metric=log_odds(), or None")
        return Needs(tuple(dict.fromkeys((self.sae.site, self.sae.out))))

    def observe(self, batch: Batch) -> Part:
        sae, examples = self.sae, batch.examples
        x, y = batch.clean[sae.site], batch.clean[sae.out]
        kept = counted(examples, self.first)
        seen = _Seen.empty(sae, self.top)
        spliced, zeroed = y.clone(), y.clone()
        per_text: list[dict[str, Tensor]] = []
        k = min(self.top, len(sae))
        shape = (*kept.shape, k)
        ranked = torch.full(shape, -1), torch.full(shape, float("nan"))
        for row, number in enumerate(examples.rows):
            columns = kept[row].nonzero()[:, 0]
            start = int(examples.starts[row])
            text = _Text.empty(sae)
            for some in columns.split(max(1, AT_ONCE // len(sae))):
                f = sae.encode(x[row, some])
                made = sae.decode(f, x[row, some]).to(y).reshape(y[row, some].shape)
                spliced[row, some], zeroed[row, some] = made, torch.zeros_like(made)
                text.add(f, y[row, some].flatten(1), made.flatten(1))
                seen.add(f, number, (some - start).to(f.device))
                if self.per_token:
                    best = f.topk(k, dim=-1)
                    active = best.values > 0
                    ranked[0][row, some] = best.indices.where(active, -1).cpu()
                    ranked[1][row, some] = best.values.float().where(active, torch.nan).cpu()
            per_text.append(text.told(self.pool, k))
        values: dict[str, tuple[Tensor, str]] = {
            **seen.told(),
            **{name: (torch.stack([one[name] for one in per_text]), axes) for name, axes in _Text.TOLD.items()},
        }
        if self.per_token:
            values["token_feature"] = (ranked[0], "example position rank")
            values["token_activation"] = (ranked[1], "example position rank")
        if self.metric is not None:
            rows = tuple(
                (Replace(sae.out, as_written(value, sae.out, examples), of=examples.rows),)
                for value in (spliced, zeroed)
            )
            swept = batch.rerun(Sweep(self.metric, rows=rows, base="clean"))
            assert swept.values is not None and swept.base is not None
            values["scores"] = (torch.cat([swept.base[:, None], swept.values], 1).float(), "example run")
        return Part(values)

    def merge(self, a: Part, b: Part) -> Part:
        """Counts add up, strongest tokens stay, and texts are laid one after the other."""
        values: dict[str, tuple[Any, str]] = {}
        for name, (one, axes) in a.values.items():
            two = b.values[name][0]
            if axes.startswith("example"):
                values[name] = (_stacked(one, two), axes)
            elif name == "largest":
                values[name] = (torch.maximum(one, two), axes)
            elif name not in ("top", "where"):
                values[name] = (one + two, axes)
        top, where = _Seen.strongest(*(torch.cat([p.values[name][0] for p in (a, b)]) for name in ("top", "where")))
        k = len(a.values["top"][0])
        values |= {"top": (top[:k], "place feature"), "where": (where[:k], "place feature")}
        return Part(values, rows=a.rows + b.rows)

    def combine(self, parts: Iterator[Part], context: Context) -> Result:
        part = next(parts)
        order = np.argsort(part.rows)
        found = {name: value.numpy() for name, (value, _) in part.values.items()}
        texts = {name: found[name][order] for name, (_, axes) in part.values.items() if axes.startswith("example")}
        tokens = texts["tokens"].sum()
        density, mean = found["active"] / tokens, found["total"] / tokens
        data: dict[str, Any] = {
            **{name: ("measure", value) for name, value in self._measures(texts, density, context.seed).items()},
            "density": ("feature", density),
            "mean": ("feature", mean),
            "max": ("feature", found["largest"]),
            **{name: ("example", texts[name] / texts["tokens"]) for name in ("l0", "cosine")},
            "tokens": ("example", texts["tokens"].astype(int)),
            "strongest": (("example", "rank"), texts["strongest"]),
            "strength": (("example", "rank"), texts["strength"]),
        }
        if "scores" in texts:
            data |= {name: ("example", texts["scores"][:, i]) for i, name in enumerate(("clean", "spliced", "zeroed"))}
        shown = self._shown(mean * self.sae.W_dec.norm(dim=-1).double().cpu().numpy(), density)
        data |= _contexts(found["top"][:, shown].T, found["where"][:, shown].T, self.context, context)
        bins, counts = _histogram(density[density > 0])
        data["features"] = ("log10_density", counts)
        coords: dict[str, Any] = {
            "measure": self._names(),
            "feature": np.arange(len(self.sae)),
            "example": np.arange(len(order)),
            "rank": np.arange(1, texts["strongest"].shape[1] + 1),
            "shown": shown,
            "place": np.arange(1, len(found["top"]) + 1),
            "log10_density": bins,
        }
        if self.per_token:
            for name in ("token_feature", "token_activation"):
                data[name] = (("example", "position", "rank"), texts[name])
            ids = np.full((len(order), max(context.tokens.lengths)), -1)
            for row, each in enumerate(context.tokens.ids):
                ids[row, : len(each)] = each
            data["token_text"] = (("example", "position"), token_texts(context.model, ids))
            coords["position"] = np.arange(ids.shape[1])
        return Result(xr.Dataset(data, coords), {"sae": repr(self.sae)}, self._views())

    def _names(self) -> list[str]:
        return ["explained_variance", "l0", "cosine", *(["recovered"] if self.metric else []), "dead"]

    def _measures(self, texts: dict[str, Array], density: Array, seed: int) -> dict[str, Array]:
        n = texts["tokens"]
        mean = texts["sum"].sum(0) / n.sum()
        spread = texts["squares"] - 2 * texts["sum"] @ mean + n * (mean @ mean)
        unexplained, low, high = ratio(texts["errors"], spread, seed)
        found = [(1 - unexplained, 1 - high, 1 - low), ratio(texts["l0"], n, seed), ratio(texts["cosine"], n, seed)]
        if "scores" in texts:
            clean, spliced, zeroed = texts["scores"].T
            found.append(ratio(zeroed - spliced, zeroed - clean, seed))
        found.append((np.array((density == 0).mean()), np.array(np.nan), np.array(np.nan)))
        return {name: np.array([one[i] for one in found]) for i, name in enumerate(("value", "ci_low", "ci_high"))}

    def _shown(self, written: Array, density: Array) -> list[int]:
        if self.features is not None:
            return list(self.sae.numbers(self.features))
        order = np.argsort(-written, kind="stable")[:SHOWN]
        return [int(i) for i in order if density[i] > 0] or [int(order[0])]

    def _views(self) -> tuple[View, ...]:
        titles = f"Features of {self.sae.out} by density", f"Strongest tokens of features of {self.sae.out}"
        return (
            View("lines", "features", "log10_density", title=titles[0], unit="features"),
            View("heatmap", "activation", "place", "shown", text="token", title=titles[1], unit="activation"),
        )


def counted(examples: TokenBatch, first: bool) -> Tensor:
    """Real tokens, perhaps without each text's first, ``example pos``, on the CPU.

    Raises:
        ExamplesError: a text has none that counts.
    """
    columns = torch.arange(examples.ids.shape[1])
    out = examples.mask.cpu() & (first | (columns != examples.starts[:, None].cpu()))
    if bool((gone := ~out.any(1)).any()):
        row = examples.rows[int(gone.nonzero()[0])]
        raise ExamplesError(f"example {row} has one token only, and the first is left out; give a longer text")
    return out


@dataclass
class _Seen:
    """What is kept of each feature while texts go by."""

    active: Tensor
    total: Tensor
    largest: Tensor
    top: Tensor
    """The largest activations, ``place feature``; 0 where there are none yet."""
    where: Tensor
    """Of each the text and its token, as text × `WIDE` + token."""

    WIDE: ClassVar[int] = 1 << 32

    @classmethod
    def empty(cls, sae: SparseAutoencoder, k: int) -> "_Seen":
        n, device = len(sae), sae.W_enc.device
        exact = torch.zeros(2, n, dtype=torch.float64, device=device)
        nothing = torch.zeros(k, n, device=device)
        return cls(exact[0], exact[1], nothing[0].clone(), nothing, torch.zeros_like(nothing, dtype=torch.long))

    def add(self, f: Tensor, text: int, tokens: Tensor) -> None:
        """Features of some tokens of one text, ``token feature``."""
        f = f.float()
        self.active += (f > 0).sum(0)
        self.total += f.double().sum(0)
        k = len(self.top)
        best = f.topk(min(k, len(f)), dim=0)
        self.largest = torch.maximum(self.largest, best.values[0])
        where = torch.cat([self.where, text * self.WIDE + tokens[best.indices]])
        top, where = self.strongest(torch.cat([self.top, best.values]), where)
        self.top, self.where = top[:k], where[:k]

    @staticmethod
    def strongest(top: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        """The largest first; of equal ones that which was seen first."""
        order = top.argsort(dim=0, descending=True, stable=True)
        return top.gather(0, order), where.gather(0, order)

    def told(self) -> dict[str, tuple[Tensor, str]]:
        sums = {name: (getattr(self, name), "feature") for name in ("active", "total", "largest")}
        return {**sums, "top": (self.top, "place feature"), "where": (self.where, "place feature")}


@dataclass
class _Text:
    """What is kept of one text: sums over its tokens."""

    largest: Tensor
    total: Tensor
    sums: Tensor
    """tokens, l0, cosine, errors, squares."""
    vector: Tensor

    TOLD: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("tokens", "l0", "cosine", "errors", "squares"), "example"),
        "sum": "example dim",
        "strongest": "example rank",
        "strength": "example rank",
    }

    @classmethod
    def empty(cls, sae: SparseAutoencoder) -> "_Text":
        f = sae.W_enc.new_zeros(2, len(sae))
        exact = torch.zeros(5, dtype=torch.float64)
        return cls(f[0], f[1], exact, torch.zeros(sae.d_out, dtype=torch.float64))

    def add(self, f: Tensor, y: Tensor, made: Tensor) -> None:
        """Features of some tokens, what stands there and what was made of it."""
        self.largest = torch.maximum(self.largest, f.amax(0))
        self.total = self.total + f.sum(0)
        y, made = y.double().cpu(), made.double().cpu()
        cosine = torch.nn.functional.cosine_similarity(y, made, dim=-1).sum()
        active = (f > 0).sum().double().cpu()
        errors, squares = (y - made).square().sum(), y.square().sum()
        self.sums += torch.stack([torch.tensor(float(len(y)), dtype=torch.float64), active, cosine, errors, squares])
        self.vector += y.sum(0)

    def told(self, pool: str, k: int) -> dict[str, Tensor]:
        best = (self.largest if pool == "max" else self.total / float(self.sums[0])).topk(k)
        active = best.values > 0
        return {
            **dict(zip(("tokens", "l0", "cosine", "errors", "squares"), self.sums, strict=True)),
            "sum": self.vector,
            "strongest": best.indices.where(active, -1),
            "strength": best.values.float().where(active, torch.nan),
        }


def _stacked(one: Tensor, two: Tensor) -> Tensor:
    """Texts of two batches, one after the other; shorter ones are padded."""
    if one.ndim > 2 and one.shape[1] != two.shape[1]:
        wide = max(one.shape[1], two.shape[1])
        fill = float("nan") if one.is_floating_point() else -1
        one, two = (torch.nn.functional.pad(x, (0, 0, 0, wide - x.shape[1]), value=fill) for x in (one, two))
    return torch.cat([one, two])


def _contexts(top: Array, where: Array, n: int, context: Context) -> dict[str, Any]:
    """Where features are strongest, ``shown place``, with the text around."""
    at = ("shown", "place")
    active = top > 0
    text, token = (np.where(active, each, -1) for each in np.divmod(where, _Seen.WIDE))

    def said(low: int, high: int) -> Array:
        """Tokens from `low` to `high`, counted from each."""
        out = np.full(top.shape, "", object)
        for place in np.argwhere(active):
            row, i = text[tuple(place)], int(token[tuple(place)])
            ids = context.tokens.ids[row][max(0, i + low) : max(0, i + high)]
            out[tuple(place)] = "".join(context.model.to_str_tokens(ids))
        return out.astype(str)

    return {
        "activation": (at, np.where(active, top, np.nan)),
        "text": (at, text),
        "at": (at, token),
        "token": (at, said(0, 1)),
        "before": (at, said(-n, 0)),
        "after": (at, said(1, 1 + n)),
    }


def _histogram(density: Array) -> tuple[Array, Array]:
    """Middles of bins of log10 density, and how many features lie in each."""
    low = np.floor(np.log10(density.min())) if len(density) else -1.0
    counts, edges = np.histogram(np.log10(density), BINS, (min(low, -1.0), 0.0))
    return (edges[1:] + edges[:-1]) / 2, counts.astype(float)
