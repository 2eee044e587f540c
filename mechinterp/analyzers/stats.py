"""Statistics of activations, kind by kind and layer by layer, with the first token apart."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from mechinterp.core.analyzer import Analyzer, Batch, Context, Model, Needs
from mechinterp.core.result import Part, Result, View
from mechinterp.errors import NeedsError
from mechinterp.sites import KINDS, Site, Sites

Array = npt.NDArray[np.float64]

TOKENS = ("first", "rest")
SUMS = ("tokens", "cubes", "fourths", "norm", "zeros", "massive", "hoyer", "vectors")
GATHERED = {
    "moments": "power dim", "sums": "sum", "extremes": "extreme dim", "large": "dim", "counts": "interval",
}  # fmt: skip
"""What is kept of each kind while batches go by, and its axes after ``layer token``."""

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
NEAR_ZERO = 0.1
"""Times the root mean square of a layer: what is smaller is near zero."""
BINS = (-16.0, -8.0, -4.0, -2.0, -1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Edges of the histogram, times the root mean square of the layer."""
BIN_NAMES = (f"< {BINS[0]:g}", *(f"{a:g} to {b:g}" for a, b in itertools.pairwise(BINS)), f"≥ {BINS[-1]:g}")
SIGMAS = 3.0
"""An outlier dimension's rms is so many standard deviations above the mean over dimensions (Kovaleva et al. 2021)."""
LARGE, LARGE_TOKENS, LARGE_LAYERS = 6.0, 0.06, 0.25
"""Magnitude, share of tokens and share of layers of an outlier feature (Dettmers et al. 2022)."""
LISTED = 20
"""Outlier dimensions that are named in each layer."""

# A float32 without the lower 20 bits of its mantissa numbers an interval: 8 in each octave, on both sides of 0.
_BITS, _SIDE, _FINITE = 20, 1 << 11, 255 << 3
_MAGNITUDES: Array = np.append(
    (np.arange(_FINITE, dtype=np.uint32) << _BITS).view(np.float32).astype(np.float64), 2.0**128
)
_EDGES: Array = np.concatenate([-_MAGNITUDES[:0:-1], _MAGNITUDES])
_SHOWN_KINDS = 3
"""Kinds whose histograms fit side by side."""


@dataclass(frozen=True)
class ActivationStats(Analyzer):
    """What activations are like at each layer, over all real tokens of the examples.

    The first token of a text is often an attention sink with massive activations (Sun et al. 2024) that
    would drown all others, so it stands apart, along ``token``: ``"first"`` and ``"rest"``.

    Result (``kind layer token``), in activation units where nothing else is said: ``mean``, ``std``,
    ``min``, ``max`` over all numbers, and ``rms``, the root of their mean square; ``norm``, the mean L2 norm of a
    token's vector; ``kurtosis`` (dimensionless, 3 for a Gaussian) of all numbers; ``massive``, the largest magnitude
    in a token's vector over the median one, mean over tokens (Sun et al. call a value massive from about 1,000);
    ``top_dim``, the dimension with the largest mean square, and ``top_share``, its share of the summed squares;
    ``tokens`` (``token``), how many there were; and ``mean_vector`` (with ``dim``), where all kinds are equally wide,
    for mean ablation. Heads are laid side by side.

    Sparsity: ``zeros``, the share of numbers that is exactly 0; ``near_zero``, the share of magnitude below 0.1 rms
    (.080 for a Gaussian); ``hoyer``, mean over tokens of (√n - ‖x‖₁/‖x‖₂) / (√n - 1) of a vector x of n numbers, 0
    where all are equally large and 1 where one alone is not 0 (Hoyer 2004; about .2 for a wide Gaussian; a vector of
    zeros is left out).

    Dead units: how many dimensions are above 0 at no token (``never_positive``) or 0 at every one
    (``never_nonzero``), and ``…_share``. That says as much of the texts as of the model: a unit may wait for others.
    A gated neuron (act(gate) · up) also acts below 0.

    Outlier dimensions, how many and which (the largest 20): ``outliers`` and ``outliers_which``, those whose root mean
    square over tokens is more than 3 standard deviations above the mean over dimensions (the rule by which Kovaleva
    et al. 2021 find outliers among LayerNorm weights); ``large`` and ``large_which``, those with a magnitude of 6 or
    more at 6% of tokens or more, in this layer and in a quarter of the layers looked at (Dettmers et al. 2022, at
    what attn_in and mlp_in are here; 6 means little at sites of another scale).

    Distribution: ``quantile_value`` (with ``quantile``) and ``share`` (with ``bin``) of numbers between multiples of
    the rms. Both are read off counts in fixed intervals, 8 in each octave of magnitude on either side of 0, and
    interpolated inside one, so a quantile is off by an eighth of itself at most.

    Sums are kept in float64, and all is folded batch by batch. A text of one token has no rest: NaN (-1 in counts,
    no number in lists).

    Attributes:
        kinds: kinds of sites with one vector (or one a head) for each token.
        layers: None for all.
    Raises:
        NeedsError: a kind that is none, has no layer, or has no vector for each token (patterns).
    """

    kinds: tuple[str, ...] = ("resid_post", "attn_out", "mlp_out")
    layers: tuple[int, ...] | None = None

    def needs(self, model: Model) -> Needs:
        check_kinds("The kinds of ActivationStats must be some", self.kinds)
        return Needs(reads=[Sites(kind, self.layers) for kind in self.kinds])

    def observe(self, batch: Batch) -> Part:
        examples = batch.examples
        column = torch.arange(examples.mask.shape[1], device=examples.mask.device)
        first = column == examples.starts[:, None]
        chosen = [examples.mask & first, examples.mask & ~first]  # in the order of TOKENS
        layers = sorted(set(range(batch.model.dims.n_layers) if self.layers is None else self.layers))
        values: dict[str, tuple[Tensor, str]] = {}
        for kind in self.kinds:
            found = [[_measure(batch.clean[Site(kind, layer)][some].flatten(1)) for some in chosen] for layer in layers]
            for i, (name, axes) in enumerate(GATHERED.items()):
                stacked = torch.stack([torch.stack([token[i] for token in layer]) for layer in found])
                values[f"{kind} {name}"] = (stacked, f"layer token {axes}")
        return Part(values, coords={"layer": layers})

    def merge(self, a: Part, b: Part) -> Part:
        """Sums and counts add up; of extremes, the further one stays."""
        values = {
            name: (
                torch.maximum(old, b.values[name][0]) if name.endswith("extremes") else old + b.values[name][0],
                axes,
            )
            for name, (old, axes) in a.values.items()
        }
        return Part(values, coords=a.coords, rows=a.rows + b.rows)

    def combine(self, parts: Iterator[Part], context: Context) -> Result:
        part = next(parts)
        found = [_statistics(*(part.values[f"{kind} {n}"][0].numpy() for n in GATHERED)) for kind in self.kinds]
        dims = ("kind", "layer", "token")
        more = {"mean_vector": ("dim",), "quantile_value": ("quantile",), "share": ("bin",)}
        same = len({one["mean_vector"].shape for one in found}) == 1
        data = xr.Dataset(
            {
                name: ((*dims, *more.get(name, ())), np.stack([one[name] for one in found]))
                for name in found[0]
                if same or name != "mean_vector"
            },
            {"kind": list(self.kinds), "layer": list(part.coords["layer"]), "token": list(TOKENS)}
            | {"quantile": list(QUANTILES), "bin": list(BIN_NAMES)},
            {"unit": "activation"},
        )
        data["tokens"] = ("token", part.values[f"{self.kinds[0]} sums"][0][0, :, 0].numpy().astype(int))
        return Result(data, {}, tuple(view for view in self._views() if data["tokens"].sel(token=view.select["token"])))

    def _views(self) -> Iterator[View]:
        yield from (_view(*shown) for shown in _SHOWN)
        some = {"token": "rest", "kind": self.kinds[:_SHOWN_KINDS]}
        title = "Distribution of all tokens but the first, in units of the layer's rms"
        yield View(
            "heatmap", "share", "bin", "layer", by="kind", select=some, title=title, unit="share of numbers",
            scale="shared",
        )  # fmt: skip


def check_kinds(whose: str, kinds: tuple[str, ...]) -> None:
    """Raise unless every kind is one that layers have, with one vector (or one a head) for each token.

    Args:
        whose: begins the message, such as ``"The kinds of ActivationStats must be some"``.
    Raises:
        NeedsError: one is not, or there is none.
    """
    fitting = [name for name, kind in KINDS.items() if kind.layered and kind.axes[:2] == ("batch", "pos")]
    if not kinds or not set(kinds) <= set(fitting):
        raise NeedsError(f"{whose} of {', '.join(fitting)}. Got {kinds if len(kinds) != 1 else repr(kinds[0])}")


def _measure(x: Float[Tensor, "token dim"]) -> tuple[Tensor, ...]:
    """What is in `GATHERED`, of some vectors.

    Σx and Σx² by dimension, `SUMS`, the largest of -x and of x by dimension, how often a dimension is `LARGE`, and how
    many numbers lie in each interval.
    """
    width = x.shape[1]
    bits = (x.float() + 0.0).view(torch.int32).flatten()  # + 0.0 makes -0.0 a 0.0
    counts = torch.bincount((bits >> _BITS) + _SIDE, minlength=2 * _SIDE)
    magnitude = x.abs()
    large = (magnitude >= LARGE).sum(0)
    if not len(x):
        nothing = torch.full((2, width), -torch.inf, dtype=torch.float64, device=x.device)
        return torch.zeros(2, width).to(nothing), torch.zeros(len(SUMS)).to(nothing), nothing, large, counts
    peak, median = magnitude.amax(1).double(), magnitude.median(1).values.double()
    absolute = magnitude.sum(1, dtype=torch.float64)
    ends = torch.stack([-x.amin(0), x.amax(0)]).double()
    x = x.double()
    squares = x.square()
    norm = squares.sum(1).sqrt()
    hoyer = (width**0.5 - absolute / norm) / (width**0.5 - 1)
    sums = [
        torch.tensor(len(x)).to(x),
        (squares * x).sum(),
        squares.square().sum(),
        norm.sum(),
        (x == 0).sum().to(x),
        (peak / median).sum(),
        torch.where(norm > 0, hoyer, 0.0).sum(),
        (norm > 0).sum().to(x),
    ]
    return torch.stack([x.sum(0), squares.sum(0)]), torch.stack(sums), ends, large, counts


def _statistics(
    moments: Array, sums: Array, extremes: Array, large: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]
) -> dict[str, npt.NDArray[Any]]:
    """All that is reported of one kind, ``layer token``; with ``dim``, ``quantile`` or ``bin`` where these follow."""
    first, second = moments[:, :, 0], moments[:, :, 1]  # layer token dim
    tokens, cubes, fourths, norm, zeros, massive, hoyer, vectors = np.moveaxis(sums, -1, 0)
    low, high = -extremes[..., 0, :], extremes[..., 1, :]
    here, width = tokens > 0, first.shape[-1]
    with np.errstate(invalid="ignore", divide="ignore"):  # where there is no token, 0 / 0
        count = np.where(here, tokens, np.nan)
        numbers = count * width
        mean, square = first.sum(-1) / numbers, second.sum(-1) / numbers
        variance = square - mean**2
        fourth = fourths / numbers - 4 * mean * cubes / numbers + 6 * mean**2 * square - 3 * mean**4
        each = np.sqrt(second / count[..., None])  # rms of each dimension
        outlier = each > (each.mean(-1) + SIGMAS * each.std(-1))[..., None]
        often = large / count[..., None] >= LARGE_TOKENS
        rms = np.sqrt(square)
        out: dict[str, npt.NDArray[Any]] = {
            "mean": mean,
            "std": np.sqrt(variance.clip(min=0)),
            "rms": rms,
            "min": np.where(here, low.min(-1), np.nan),
            "max": np.where(here, high.max(-1), np.nan),
            "norm": norm / count,
            "kurtosis": fourth / variance**2,
            "massive": massive / count,
            "top_dim": np.where(here, second.argmax(-1), -1),
            "top_share": second.max(-1) / second.sum(-1),
            "zeros": zeros / numbers,
            "near_zero": np.full(mean.shape, np.nan),
            "hoyer": hoyer / vectors,
        }
        for name, dead in (("never_positive", high <= 0), ("never_nonzero", (low == 0) & (high == 0))):
            out[name] = np.where(here, dead.sum(-1), -1)
            out[f"{name}_share"] = np.where(here, dead.mean(-1), np.nan)
        often &= often.mean(0) >= LARGE_LAYERS
        for name, which, listed in (("outliers", outlier, "outliers_which"), ("large", often, "large_which")):
            out[name] = np.where(here, which.sum(-1), -1)
            out[listed] = _listed(which, each)
        out["mean_vector"] = first / count[..., None]
    out["quantile_value"] = np.full((*mean.shape, len(QUANTILES)), np.nan)
    out["share"] = np.full((*mean.shape, len(BIN_NAMES)), np.nan)
    for at in map(tuple, np.argwhere(here)):
        if np.isnan(rms[at]):
            continue
        spread = _Spread(counts[at])
        out["quantile_value"][at] = spread.quantiles(QUANTILES).clip(out["min"][at], out["max"][at])
        if rms[at] == 0:  # nothing but zeros, which have no unit
            out["near_zero"][at] = 1.0
            continue
        out["share"][at] = np.diff(spread.below(np.array(BINS) * rms[at]), prepend=0.0, append=1.0)
        out["near_zero"][at] = np.diff(spread.below(np.array([-NEAR_ZERO, NEAR_ZERO]) * rms[at]))[0]
    return out


class _Spread:
    """How numbers are distributed, from how many lie in each interval (in the order of a float32's bits)."""

    def __init__(self, counts: npt.NDArray[np.int64]) -> None:
        self.counts = np.concatenate([counts[:_FINITE][::-1], counts[_SIDE : _SIDE + _FINITE]])
        self.sums = np.cumsum(self.counts)

    def below(self, at: Array) -> Array:
        """The share of numbers below some values."""
        return np.interp(at, _EDGES, np.concatenate([[0], self.sums])) / self.sums[-1]

    def quantiles(self, shares: tuple[float, ...]) -> Array:
        """The values that such shares of the numbers lie below."""
        wanted = np.array(shares) * self.sums[-1]
        i = np.searchsorted(self.sums, wanted)
        inside = (wanted - self.sums[i]) / self.counts[i] + 1
        return _EDGES[i] + inside * (_EDGES[i + 1] - _EDGES[i])


def _listed(chosen: npt.NDArray[np.bool_], size: Array) -> npt.NDArray[Any]:
    """The chosen of ``layer token dim`` as numbers with blanks between, those of largest size first."""
    out = np.full(chosen.shape[:2], "", object)
    for at in map(tuple, np.argwhere(chosen.any(-1))):
        order = np.argsort(-size[at], kind="stable")
        out[at] = " ".join(map(str, order[chosen[at][order]][:LISTED].tolist()))
    return out.astype(str)


_SHOWN = (
    ("norm", "rest", "L2 norm of all tokens but the first"),
    ("norm", "first", "L2 norm of the first token"),
    ("massive", "first", "Massive activations, first token"),
    ("massive", "rest", "Massive activations, all tokens but the first"),
    ("kurtosis", "rest", "Kurtosis of all tokens but the first (3 for a Gaussian)"),
    ("hoyer", "rest", "Sparsity of all tokens but the first (Hoyer; about .2 for a Gaussian)"),
    ("never_positive_share", "rest", "Dimensions never above 0, in all tokens but the first"),
    ("outliers", "rest", "Outlier dimensions of all tokens but the first (3 standard deviations)"),
)


def _view(name: str, token: str, title: str) -> View:
    unit = {
        "norm": "L2 norm", "massive": "largest / median magnitude", "hoyer": "Hoyer sparsity",
        "never_positive_share": "share of dimensions", "outliers": "dimensions",
    }.get(name, name)  # fmt: skip
    return View("lines", name, "layer", by="kind", title=title, unit=unit, select={"token": token})
