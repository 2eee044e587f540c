"""Roles of heads that their weights alone show: copying, and looking at the previous token by rotary."""

import math
import sys
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from mechinterp.core.analyzer import Model
from mechinterp.model.factored import FactoredMatrix

Array = npt.NDArray[np.floating]

VOCAB_AT_ONCE = 16_384
TOKENS = 2048
"""Tokens whose normed queries and keys are averaged, where averages of q and k alone are not enough (q/k-norm)."""
DRAWS = 1000
AT_ONCE = 2048


@torch.no_grad()
def copying(model: Model) -> tuple[Array, Array]:
    """Copying score of each head, and its p, ``layer head`` each (Elhage et al. 2021).

    The score is Σ Re λ / Σ|λ| over the eigenvalues of W_E γ W_V W_O γ_f W_Uᵀ, token to logit: 1 for a head that
    raises what it attends to, -1 for one that lowers it. They are those of the d_head × d_head matrix
    W_O γ_f (W_Uᵀ W_E) γ W_V. Biases are no part of it.

    The null turns what the head reads by a random rotation of the residual stream: the same singular values,
    read in directions that have nothing to do with those it writes. The sum of the eigenvalues is then the trace of
    a rotation times a fixed matrix, which is normal with mean 0 and variance ‖γ W_V W_O γ_f W_Uᵀ W_E‖² / d_model,
    Frobenius (D'Aristotile, Diaconis & Newman 2003), so p is two-sided from that, and the null's score is 0.
    NaN in a classifier, where a label is no token, and for a head that writes nothing.
    """
    shape = (model.dims.n_layers, model.dims.n_heads)
    if model.dims.n_labels is not None:
        return np.full(shape, np.nan), np.full(shape, np.nan)
    overlap = _overlap(model)
    score, p = np.empty(shape), np.empty(shape)
    for layer in range(model.dims.n_layers):
        ov = model.OV(layer, fold=True)
        circuit = FactoredMatrix(ov.A, ov.B @ overlap.to(ov.B.device))
        values = circuit.eigenvalues
        total, size = values.real.sum(-1).double().cpu().numpy(), values.abs().sum(-1).double().cpu().numpy()
        spread = circuit.norm.double().cpu().numpy() / math.sqrt(model.dims.d_model)
        with np.errstate(invalid="ignore", divide="ignore"):
            score[layer], p[layer] = total / size, 2 * stats.norm.sf(np.abs(total / spread))
    p[np.isnan(score)] = np.nan
    return score, p


@torch.no_grad()
def previous_by_rotary(model: Model, width: int, tests: int, seed: int) -> tuple[Array, Array, Array]:
    """Attention on the previous token by position alone: score, null and p, ``layer head`` each.

    A head's score is what it would give to the previous token, on average over the queries of a text of `width`
    tokens, if all keys and queries were the mean ones, so that only rotary tells positions apart. The means are over
    the vocabulary, of tokens that go straight from the embedding into the head: q̄ = W_Qᵀ γ x̄ + b_Q with x̄ the mean
    embedding after RMS scaling, and k̄ alike; q̄ᵀ R(d) k̄ / √d_head is therefore the expected score of two random
    tokens at distance d. Where q and k are normed, which no mean commutes with, q̄ and k̄ are means of the normed ones
    over `TOKENS` tokens, evenly spaced in the vocabulary. What earlier layers add to the residual is not in it.

    The null is the same head with q̄ and k̄ in random directions, their lengths kept. p is the share of draws that
    reach the score, of as many as a single head needs to pass q < .05 among `tests`.
    """
    generator = torch.Generator().manual_seed(seed)
    tables = _rotary(model, width)
    d_head, shape = model.dims.d_head, (model.dims.n_layers, model.dims.n_heads)

    def kernels(n: int) -> Float[Tensor, "draw distance"]:
        q, k = torch.nn.functional.normalize(torch.randn(n, 2, d_head, generator=generator), dim=-1).unbind(1)
        some = zip(q.split(AT_ONCE), k.split(AT_ONCE), strict=True)
        return torch.cat([_by_distance(model, a, b, tables) for a, b in some])

    many = kernels(max(DRAWS, 20 * tests))  # the smallest p is then 0.05 / tests
    score, null, p = np.empty(shape), np.empty(shape), np.empty(shape)
    for layer, (q, k) in enumerate(_means(model)):
        window = model.dims.windows[layer]
        own = _on_previous(_by_distance(model, q, k, tables), window)
        lengths = q.norm(dim=-1) * k.norm(dim=-1)
        for head in range(model.dims.n_heads):
            few = _on_previous(lengths[head] * many[:DRAWS], window)
            drawn, hits = len(few), int((few >= own[head]).sum())
            if hits == 0:
                drawn = len(many)
                hits = sum(
                    int((_on_previous(lengths[head] * m, window) >= own[head]).sum()) for m in many.split(AT_ONCE)
                )
            score[layer, head], null[layer, head] = float(own[head]), float(few.mean())
            p[layer, head] = (1 + hits) / (1 + drawn)
    return score, null, p


def _overlap(model: Model) -> Float[Tensor, "d_model d_model"]:
    """γ_f W_Uᵀ W_E: which residual directions' logits go to the tokens that have which directions."""
    read, written = model.W_U, model.W_E
    total = torch.zeros(model.dims.d_model, model.dims.d_model, device=written.device)
    for u, e in zip(read.split(VOCAB_AT_ONCE), written.split(VOCAB_AT_ONCE), strict=True):
        total += u.float().to(written.device).T @ e.float()
    return model.gamma().to(written.device)[:, None] * total


def _means(model: Model) -> Any:
    """Mean query and key of every layer's heads, each ``head d_head``, on the CPU."""
    norm: Any = model.hf.get_submodule(f"{model.arch.layer(0)}.input_layernorm")

    def scaled(rows: Tensor) -> Tensor:
        return rows.float() * (rows.float().pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()

    vocab = len(model.W_E)
    if model.arch.qk_norm:
        inputs = scaled(model.W_E[torch.linspace(0, vocab - 1, min(TOKENS, vocab)).long()])
    else:
        inputs = torch.stack([scaled(rows).sum(0) for rows in model.W_E.split(VOCAB_AT_ONCE)]).sum(0)[None] / vocab
    for layer in range(model.dims.n_layers):
        yield tuple(_mean(model, inputs, layer, kind) for kind in "qk")


def _mean(model: Model, inputs: Float[Tensor, "token d_model"], layer: int, kind: str) -> Float[Tensor, "head d_head"]:
    weight, bias = model.projection(kind, layer, per_query_head=True)
    heads = (inputs.to(weight.device) * model.gamma(layer)) @ weight.float()  # head token d_head
    if bias is not None:
        heads = heads + bias.float()[:, None]
    if model.arch.qk_norm:
        heads = model.hf.get_submodule(f"{model.arch.layer(layer)}.self_attn.{kind}_norm").forward(heads)
    return heads.mean(1).cpu()


def _rotary(model: Model, width: int) -> tuple[Tensor, Tensor]:
    """cos and sin of the first positions, ``1 position d_head``, on the CPU."""
    module: Any = model.hf.get_submodule(f"{model.arch.base}.rotary_emb")
    device = model.W_E.device
    cos, sin = module(torch.zeros(1, width, 1, device=device), torch.arange(width, device=device)[None])
    return cos.cpu(), sin.cpu()


def _by_distance(
    model: Model, q: Float[Tensor, "head d_head"], k: Float[Tensor, "head d_head"], tables: tuple[Tensor, Tensor]
) -> Float[Tensor, "head distance"]:
    """Scores of one query and one key a head, at every distance, by the model's own rotation."""
    width = tables[0].shape[1]
    attention: Any = model.hf.get_submodule(f"{model.arch.layer(0)}.self_attn")
    turn = sys.modules[type(attention).__module__].apply_rotary_pos_emb
    query, key = turn(q[None, :, None].expand(-1, -1, width, -1), k[None, :, None].expand(-1, -1, width, -1), *tables)
    return (query[0] @ key[0, :, 0, :, None])[..., 0] * float(attention.scaling)


def _on_previous(scores: Float[Tensor, "row distance"], window: int | None) -> Float[Tensor, "row"]:
    """The softmax at distance 1, over all that a query sees, averaged over all queries but the first."""
    width = scores.shape[1]
    seen = scores.logcumsumexp(-1)
    if window is not None and window < width:
        seen[:, window:] = scores[:, :window].logsumexp(-1, keepdim=True)
        if window < 2:
            return torch.zeros(len(scores))
    return (scores[:, 1:2] - seen[:, 1:]).exp().mean(-1)
