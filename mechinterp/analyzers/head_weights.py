"""What heads read and write, and which heads read what others write: OV, QK and composition, by weights alone."""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from mechinterp.analyzers.weight_roles import VOCAB_AT_ONCE
from mechinterp.core.analyzer import Analyzer, Context, Model
from mechinterp.core.result import Part, Result, View

CIRCUITS, SIDES = ("OV", "QK"), ("in", "out")
COMPOSITIONS = ("Q", "K", "V")
STRONGEST = 40
"""Pairs of heads that are listed."""


@dataclass(frozen=True)
class HeadWeights(Analyzer):
    """Singular directions of every head with their tokens, and composition of heads (Elhage et al. 2021).

    Nothing is run. The norm's weight γ that a head reads through is in its matrices (on copies), biases are not.

    *Directions.* Singular vectors of γ W_V W_O (``OV``), from what a head reads (``in``) to what it writes (``out``),
    and of γ W_Q W_Kᵀ γ (``QK``), from queries (``in``) to keys (``out``); Millidge & Black 2022. Each is named by the
    tokens whose embedding has most of it or, for what OV writes, whose logit it raises most (through the final norm's
    γ). A pair of vectors may be turned together, so its sign is the one under which the larger end of ``out`` is
    positive. Rotary is not in QK: it is the score at distance 0. Where q and k are normed (Qwen3), QK holds the
    norms' weights, and scores are its values times one positive number for each query and each key.

    *Composition.* How much of what an earlier head writes a later head reads, as ‖W_OV W‖ / (‖W_OV‖ ‖W‖), Frobenius,
    with W the later head's QK matrix from the query's side (``Q``), from the key's (``K``), or its OV matrix (``V``).
    Subtracted is 1/√d_model: exactly the root mean square over random rotations between the two heads, whatever
    their singular values, and so what heads give that have nothing to do with each other. An excess of 0 is chance.

    Result: ``singular_value``, ``share`` of the matrix's squared norm (``circuit layer head direction``); ``token``,
    ``weight``, its product with the direction (``circuit side layer head direction rank``); ``composition``, the
    excess (``kind sender receiver``, heads as ``a3.h1``; NaN unless the receiver is in a later layer), its largest
    value for each pair of layers (``strongest``), and the largest of all by name (``excess`` over ``pair``).

    Attributes:
        directions: how many of each circuit.
        top: tokens for each.
        composition: whether to compare all pairs of heads, which takes most of the time.
    """

    directions: int = 3
    top: int = 6
    composition: bool = True

    @torch.no_grad()
    def combine(self, parts: Iterator[Part], context: Context) -> Result:
        model = context.model
        data, views = _directions(model, self.directions, self.top), (_spectrum("OV"), _spectrum("QK"))
        if self.composition and model.dims.n_layers > 1:
            return Result(xr.merge([data, _compared(model)]), {}, (*_COMPARED, *views))
        return Result(data, {}, views)


@torch.no_grad()
def composition(model: Model) -> Float[Tensor, "kind layer head later_layer later_head"]:
    """‖W_OV W‖ / (‖W_OV‖ ‖W‖) of every head with every head of a later layer, by `COMPOSITIONS`; NaN elsewhere.

    A product A B has the norm of R_A B's, where A = Q_A R_A. So each sender is L = R_A W_O, d_head × d_model, each
    receiver M = W R_Bᵀ, d_model × d_head, and a pair costs the product of these two: nothing of d_model × d_model.
    """
    n, heads = model.dims.n_layers, model.dims.n_heads
    out = torch.full((3, n, heads, n, heads), math.nan)
    senders: list[Tensor] = []  # of each layer, heads × d_head rows of d_model
    for layer in range(n):
        ov, qk = model.OV(layer, fold=True), model.QK(layer, fold=True)
        for kind, matrix in enumerate((qk, qk.T, ov)):
            read = matrix.A @ torch.linalg.qr(matrix.B.mT, mode="r").R.mT / matrix.norm[:, None, None]
            side = read.transpose(0, 1).flatten(1)
            for earlier, written in enumerate(senders):
                both = (written @ side.to(written.device)).unflatten(1, (heads, -1)).unflatten(0, (heads, -1))
                out[kind, earlier, :, layer] = both.pow(2).sum((1, 3)).sqrt().cpu()
        write = torch.linalg.qr(ov.A, mode="r").R @ ov.B / ov.norm[:, None, None]
        senders.append(write.flatten(0, 1))
    return out


def _compared(model: Model) -> xr.Dataset:
    """Composition above chance: of every pair, of every pair of layers, and the strongest by name."""
    found = composition(model).numpy() - 1 / math.sqrt(model.dims.d_model)
    names = [f"a{layer}.h{head}" for layer in range(found.shape[1]) for head in range(found.shape[2])]
    flat = found.reshape(3, len(names), len(names))
    order = np.argsort(-np.nan_to_num(flat, nan=-np.inf), axis=None, kind="stable")[:STRONGEST]
    best = [at for at in zip(*np.unravel_index(order, flat.shape), strict=True) if np.isfinite(flat[at])]
    strongest = np.where(np.isfinite(found), found, -np.inf).max((2, 4))
    layers = np.arange(found.shape[1])
    return xr.Dataset(
        {
            "composition": (("kind", "sender", "receiver"), flat),
            "strongest": (("kind", "sender_layer", "receiver_layer"), np.where(strongest > -np.inf, strongest, np.nan)),
            "excess": (("pair",), np.array([flat[at] for at in best])),
        },
        {
            "kind": list(COMPOSITIONS),
            "sender": names,
            "receiver": names,
            "sender_layer": layers,
            "receiver_layer": layers,
            "pair": [f"{names[sender]} → {names[receiver]} {COMPOSITIONS[kind]}" for kind, sender, receiver in best],
        },
    )


def _directions(model: Model, count: int, top: int) -> xr.Dataset:
    """Singular values and vectors of both circuits of all heads, the vectors by their tokens."""
    dims = model.dims
    count = min(count, dims.d_head, dims.d_model)
    size = (2, dims.n_layers, dims.n_heads, count)
    top = min(top, dims.vocab)
    values, shares = np.empty(size, np.float32), np.empty(size, np.float32)
    ids = np.full((2, 2, *size[1:], top), -1)
    weights = np.full(ids.shape, np.nan, np.float32)
    gamma = model.gamma()
    for circuit, layer in itertools.product(range(2), range(dims.n_layers)):
        matrix = (model.OV, model.QK)[circuit](layer, fold=True)
        U, S, Vh = matrix.svd()
        values[circuit, layer] = S[:, :count].cpu()
        shares[circuit, layer] = (S[:, :count] / matrix.norm[:, None]).square().cpu()
        writes = circuit == 0
        out = Vh[:, :count] * gamma.to(Vh.device) if writes else Vh[:, :count]
        ends = _products(model.W_U if writes else model.W_E, out)
        low, high = ends.aminmax(dim=-1)
        sign = torch.where(high >= -low, 1.0, -1.0)[..., None]
        starts = _products(model.W_E, U[..., :count].mT)
        for side, found in enumerate((starts, ends)):
            best = (found * sign.to(found.device)).topk(min(top, found.shape[-1]))
            weights[circuit, side, layer, ..., : best.values.shape[-1]] = best.values.cpu()
            ids[circuit, side, layer, ..., : best.values.shape[-1]] = best.indices.cpu()
    cells = ("layer", "head", "direction")
    tokens = _names(model, ids)
    return xr.Dataset(
        {
            "singular_value": (("circuit", *cells), values),
            "share": (("circuit", *cells), shares),
            "out": (("circuit", *cells), tokens[:, 1, ..., 0]),
            "token": (("circuit", "side", *cells, "rank"), tokens),
            "weight": (("circuit", "side", *cells, "rank"), weights),
        },
        {
            "circuit": list(CIRCUITS),
            "side": list(SIDES),
            "layer": np.arange(dims.n_layers),
            "head": np.arange(dims.n_heads),
            "direction": np.arange(count),
            "rank": np.arange(top),
        },
    )


def _products(
    rows: Float[Tensor, "vocab d_model"], directions: Float[Tensor, "head direction d_model"]
) -> Float[Tensor, "head direction vocab"]:
    flat = directions.flatten(0, 1).T.to(rows.device)
    parts = [some.float() @ flat for some in rows.split(VOCAB_AT_ONCE)]
    return torch.cat(parts).T.unflatten(0, directions.shape[:2])


def _names(model: Model, ids: npt.NDArray[np.integer]) -> npt.NDArray[Any]:
    """The text of each id, and "" for -1; what an OV circuit writes may be a classifier's labels."""

    def texts(some: npt.NDArray[np.integer], name: Callable[[list[int]], list[str]]) -> npt.NDArray[Any]:
        known = [int(i) for i in np.unique(some) if i >= 0]
        by_id = dict(zip(known, name(known), strict=True)) | {-1: ""}
        return np.array([by_id[int(i)] for i in some.ravel()], dtype=object).reshape(some.shape)

    out = texts(ids, model.to_str_tokens)
    out[0, 1] = texts(ids[0, 1], model.to_str_outputs)
    return out


def _spectrum(circuit: str) -> View:
    what = "writes" if circuit == "OV" else "looks for"
    return View(
        "heatmap",
        "share",
        "head",
        "layer",
        text="out",
        title=f"{circuit}: strength of the strongest direction, and the token that it {what}",
        unit="share of the squared norm",
        select={"circuit": circuit, "direction": 0},
    )


_COMPARED = (
    View(
        "bars",
        "excess",
        "pair",
        title="Composition: the strongest pairs of heads",
        unit="composition score above chance",
    ),
    View(
        "heatmap",
        "strongest",
        "sender_layer",
        "receiver_layer",
        by="kind",
        title="Composition: the strongest pair of heads of two layers",
        unit="composition score above chance",
        center=0.0,
        scale="shared",
    ),
)
