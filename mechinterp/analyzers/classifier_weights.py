"""A classification head's weights: how they are spread, and what their direction means in words and in neurons."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from scipy import stats
from torch import Tensor

from mechinterp.analyzers.trajectory import number
from mechinterp.core.analyzer import Analyzer, Context, Model, Needs
from mechinterp.core.result import Part, Result, View
from mechinterp.errors import NeedsError

BINS = 50
"""Of the histogram, at most."""
Floats: TypeAlias = npt.NDArray[np.floating]
Ints: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ClassifierWeights(Analyzer):
    """The direction along which a label's log-odds grow: its row of the head less the others' mean.

    With two labels that is W[1] - W[0]; with more, each label has one (one against the rest), or `against` names the
    one that it is compared with. The head reads normed states, so words are compared with it directly, and what
    neurons write only after the final norm's γ; that a direction is near a word's does not say that
    the word has anything to do with the decision.

    Result: ``weight`` (``label dimension``), ``sorted`` (``label rank``, from the largest), ``bias`` (``label``);
    ``value`` (``label statistic``): mean, std, min, max, l1, l2, skew, kurtosis (excess), share_positive,
    ``participation`` (Σw²)² / Σw⁴, how many dimensions it is like, and ``top_1_percent``, the share of Σw² in that
    many dimensions; ``count`` over ``bin`` (its middle; ``bin_from``, ``bin_to``); ``top_dimension`` and
    ``top_weight`` over ``side`` and ``place``; over the same, of the vocabulary ``word`` and ``word_cosine``, and of
    the neurons ``neuron_layer``, ``neuron`` and ``neuron_cosine``, of γ ⊙ direction and what the neuron writes; and
    ``cosine`` between the labels' directions.

    Attributes:
        label: one label; all of them by default, of which two labels have one.
        against: the label that it is compared with.
        top: places on each side.
    Raises:
        NeedsError: the model has no classification head, no such label, or labels are the same.
    """

    label: str | None = None
    against: str | None = None
    top: int = 20

    def __post_init__(self) -> None:
        if self.top < 1:
            raise NeedsError(f"The top of ClassifierWeights must be at least 1. Got {self.top}")
        if self.against is not None and self.against == self.label:
            raise NeedsError(f"a label cannot be compared with itself. Got {self.label!r} against {self.against!r}")

    def needs(self, model: Model) -> Needs:
        for label in (self.label, self.against):
            number(model, label)
        return Needs()

    def combine(self, parts: Iterator[Part], context: Context) -> Result:
        model = context.model
        names = model.to_str_outputs(range(model.dims.n_outputs))
        chosen = [self.label] if self.label is not None else names[-1:] if len(names) == 2 else names
        directions, bias = zip(*(self._direction(model, str(name)) for name in chosen), strict=True)
        w = torch.stack(directions)
        many = w.double().cpu().numpy()
        at, top = ("label", "side", "place"), min(self.top, w.shape[1])
        edges = np.histogram_bin_edges(many, min(BINS, 2 * int(np.sqrt(w.shape[1]))))
        counts = np.stack([np.histogram(row, edges)[0] for row in many])
        dims, sizes = _ends(many, top)
        unit = many / np.maximum(np.linalg.norm(many, axis=1, keepdims=True), 1e-30)
        values = np.stack([list(_statistics(row).values()) for row in many])
        data = {
            "weight": (("label", "dimension"), many), "sorted": (("label", "rank"), -np.sort(-many, 1)),
            "bias": ("label", list(bias)), "value": (("label", "statistic"), values),
            "count": (("label", "bin"), counts), "bin_from": ("bin", edges[:-1]), "bin_to": ("bin", edges[1:]),
            "top_dimension": (at, dims), "top_weight": (at, sizes), "cosine": (("label", "other"), unit @ unit.T),
        }  # fmt: skip
        if model.vocabulary is not None:
            ids, cosine = _ends(_cosines(model.vocabulary, w), self.top)
            texts = [[model.to_str_tokens(side) for side in row] for row in ids.tolist()]
            data |= {"word": (at, np.array(texts)), "word_cosine": (at, cosine)}
        if not model.dims.n_experts:
            layers, neurons, cosine = self._neurons(model, w)
            data |= {"neuron_layer": (at, layers), "neuron": (at, neurons), "neuron_cosine": (at, cosine)}
        coords = {
            "label": list(chosen), "other": list(chosen), "dimension": np.arange(w.shape[1]),
            "rank": np.arange(w.shape[1]), "side": ["for", "against"], "place": np.arange(1, top + 1),
            "statistic": list(_statistics(many[0])), "bin": (edges[1:] + edges[:-1]) / 2,
        }  # fmt: skip
        views = (
            View("lines", "sorted", "rank", by="label", title="Weights of the head, sorted", unit="weight"),
            View("lines", "count", "bin", by="label", title="Spread of the weights", unit="dimensions"),
            View("bars", "weight", "dimension", title="Dimensions with the largest weights", unit="weight"),
        )
        return Result(xr.Dataset(data, coords), {"against": self.against or "the rest"}, views)

    def _direction(self, model: Model, label: str) -> tuple[Tensor, float]:
        """``d_model``, and the difference of the biases."""
        n = model.dims.n_outputs
        one = number(model, label)
        others = [i for i in range(n) if i != one] if self.against is None else [number(model, self.against)]
        weight, bias = model.W_U.detach().float(), model.b_U
        apart = 0.0 if bias is None else float(bias[one] - bias[others].mean())
        return weight[one] - weight[others].mean(0), apart

    def _neurons(self, model: Model, w: Tensor) -> tuple[Ints, Ints, Floats]:
        """Layer, neuron and cosine of those that write most along each direction, or against it."""
        along = w * model.gamma().float()
        every = np.concatenate(
            [_cosines(model.W_out(layer), along) for layer in range(model.dims.n_layers)],
            axis=1,
        )
        ids, cosine = _ends(every, self.top)
        return ids // model.dims.d_mlp, ids % model.dims.d_mlp, cosine


def _cosines(rows: Tensor, directions: Tensor) -> Floats:
    """``direction row``"""
    rows = rows.float()
    size = rows.norm(dim=1).clamp_min(1e-30) * directions.norm(dim=1, keepdim=True).clamp_min(1e-30)
    return (directions @ rows.T / size).cpu().numpy()


def _ends(values: Floats, top: int) -> tuple[Ints, Floats]:
    """Numbers and values of the largest and the smallest of each row, ``row side place``."""
    order = np.argsort(-values, 1, kind="stable")
    ids = np.stack([order[:, :top], order[:, ::-1][:, :top]], 1)
    return ids, np.take_along_axis(values[:, None], ids, 2)


def _statistics(w: Floats) -> dict[str, float]:
    squares = np.sort(w**2)[::-1]
    total = max(float(squares.sum()), 1e-300)
    return {
        "mean": float(w.mean()), "std": float(w.std()), "min": float(w.min()), "max": float(w.max()),
        "l1": float(np.abs(w).sum()), "l2": float(np.sqrt(squares.sum())), "skew": float(stats.skew(w)),
        "kurtosis": float(stats.kurtosis(w)), "share_positive": float((w > 0).mean()),
        "participation": float(total**2 / max(float((squares**2).sum()), 1e-300)),
        "top_1_percent": float(squares[: max(1, len(w) // 100)].sum() / total),
    }  # fmt: skip
