"""Statistics of activations, kind by kind and layer by layer, with the first token apart."""

from collections.abc import Iterator
from dataclasses import dataclass

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
SUMS = ("tokens", "cubes", "fourths", "norm", "zeros", "massive")

GATHERED = {"moments": "power dim", "sums": "sum", "extremes": "extreme"}
"""What is kept of each kind while batches go by, and its axes after ``layer token``."""


@dataclass(frozen=True)
class ActivationStats(Analyzer):
    """What activations are like at each layer, over all real tokens of the examples.

    The first token of a text is often an attention sink with massive activations (Sun et al. 2024) that
    would drown all others, so it stands apart, along ``token``: ``"first"`` and ``"rest"``.

    Result (``kind layer token``), in activation units where nothing else is said: ``mean``, ``std``,
    ``min``, ``max`` over all numbers; ``norm``, the mean L2 norm of a token's vector; ``kurtosis``
    (dimensionless, 3 for a Gaussian) of all numbers; ``zeros``, the share of them that is exactly 0;
    ``massive``, the largest magnitude in a token's vector over the median one, mean over tokens (Sun
    et al. call a value massive from about 1,000); ``top_dim``, the dimension with the largest mean square,
    and ``top_share``, its share of the summed squares; ``tokens`` (``token``), how many there were; and
    ``mean_vector`` (with ``dim``), where all kinds are equally wide, for mean ablation. Heads are laid side by side.
    Sums are kept in float64 and folded batch by batch. A text of one token has no rest: NaN (-1 in ``top_dim``).

    Attributes:
        kinds: kinds of sites with one vector (or one a head) for each token.
        layers: None for all.
    Raises:
        NeedsError: a kind that is none, has no layer, or has no vector for each token (patterns).
    """

    kinds: tuple[str, ...] = ("resid_post", "attn_out", "mlp_out")
    layers: tuple[int, ...] | None = None

    def needs(self, model: Model) -> Needs:
        fitting = [name for name, kind in KINDS.items() if kind.layered and kind.axes[:2] == ("batch", "pos")]
        if not self.kinds or not set(self.kinds) <= set(fitting):
            raise NeedsError(f"The kinds of ActivationStats must be some of {', '.join(fitting)}. Got {self.kinds}")
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
        """Sums add up; of extremes, the further one stays."""
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
        data = xr.Dataset(
            {name: (dims, np.stack([one[name] for one in found])) for name in found[0] if name != "mean_vector"},
            {"kind": list(self.kinds), "layer": list(part.coords["layer"]), "token": list(TOKENS)},
            {"unit": "activation"},
        )
        vectors = [one["mean_vector"] for one in found]
        if len({v.shape for v in vectors}) == 1:
            data["mean_vector"] = ((*dims, "dim"), np.stack(vectors))
        data["tokens"] = ("token", part.values[f"{self.kinds[0]} sums"][0][0, :, 0].numpy().astype(int))
        return Result(data, {}, tuple(_view(*shown) for shown in _SHOWN if data["tokens"].sel(token=shown[1]) > 0))


def _measure(x: Float[Tensor, "token dim"]) -> tuple[Tensor, Tensor, Tensor]:
    """Of some vectors: Σx and Σx² by dimension, ``power dim``; `SUMS`; and the largest of -x and of x."""
    if not len(x):
        width = x.shape[1]
        nothing = torch.full((2,), -torch.inf, dtype=torch.float64, device=x.device)
        return torch.zeros(2, width).to(nothing), torch.zeros(len(SUMS)).to(nothing), nothing
    magnitude = x.abs()
    peak, median = magnitude.amax(1).double(), magnitude.median(1).values.double()
    x = x.double()
    squares = x.square()
    sums = [
        torch.tensor(len(x)).to(x),
        (squares * x).sum(),
        squares.square().sum(),
        squares.sum(1).sqrt().sum(),
        (x == 0).sum().to(x),
        (peak / median).sum(),
    ]
    return torch.stack([x.sum(0), squares.sum(0)]), torch.stack(sums), torch.stack([-x.amin(), x.amax()])


def _statistics(moments: Array, sums: Array, extremes: Array) -> dict[str, npt.NDArray[np.generic]]:
    """All that is reported of one kind, ``layer token`` (and ``dim`` for the mean vector)."""
    first, second = moments[:, :, 0], moments[:, :, 1]  # layer token dim
    tokens, cubes, fourths, norm, zeros, massive = np.moveaxis(sums, -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):  # where there is no token, 0 / 0
        count = np.where(tokens > 0, tokens, np.nan)
        numbers = count * first.shape[-1]
        mean, square = first.sum(-1) / numbers, second.sum(-1) / numbers
        variance = square - mean**2
        fourth = fourths / numbers - 4 * mean * cubes / numbers + 6 * mean**2 * square - 3 * mean**4
        here = tokens > 0
        return {
            "mean": mean,
            "std": np.sqrt(variance.clip(min=0)),
            "min": np.where(here, -extremes[..., 0], np.nan),
            "max": np.where(here, extremes[..., 1], np.nan),
            "norm": norm / count,
            "kurtosis": fourth / variance**2,
            "zeros": zeros / numbers,
            "massive": massive / count,
            "top_dim": np.where(here, second.argmax(-1), -1),
            "top_share": second.max(-1) / second.sum(-1),
            "mean_vector": first / count[..., None],
        }


_SHOWN = (
    ("norm", "rest", "L2 norm of all tokens but the first"),
    ("norm", "first", "L2 norm of the first token"),
    ("massive", "first", "Massive activations, first token"),
    ("massive", "rest", "Massive activations, all tokens but the first"),
    ("kurtosis", "rest", "Kurtosis of all tokens but the first (3 for a Gaussian)"),
)


def _view(name: str, token: str, title: str) -> View:
    unit = {"norm": "L2 norm", "massive": "largest / median magnitude"}.get(name, name)
    return View("lines", name, "layer", by="kind", title=title, unit=unit, select={"token": token})
