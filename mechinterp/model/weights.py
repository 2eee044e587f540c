"""Weights of the model's projections, as they act in a pass and by head. Views wherever they can be."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechinterp.errors import ModelError, SiteError
from mechinterp.model.architecture import Architecture, Dims, check
from mechinterp.model.factored import FactoredMatrix
from mechinterp.sites import Site

_NUMBERS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class WeightsByHead:
    """A model's weights as they act in a pass, LoRA included, with TransformerLens's axes.

    Row vectors are multiplied from the left. All are views of the parameters wherever that can be: never
    change one in place. Only W_U differs, one row a token, as it is stored and used: W_U[token] is the
    direction that a token's logit reads; write W_U.T where TransformerLens has W_U.
    """

    hf: Any
    arch: Architecture
    dims: Dims
    name: str

    @property
    def W_E(self) -> Float[Tensor, "vocab d_model"]:
        """Token embedding."""
        return linear_weight(self._module(f"{self.arch.base}.{self.arch.embed}"))

    @property
    def W_U(self) -> Float[Tensor, "vocab d_model"]:
        """Unembedding, one row a token (in a classifier: its head, one row a label); TransformerLens's transposed."""
        return linear_weight(self._module(self.arch.unembed))

    @property
    def b_U(self) -> Float[Tensor, "vocab"] | None:
        """Bias of the unembedding; None in most models."""
        return linear_bias(self._module(self.arch.unembed))

    def W_Q(self, layer: int) -> Float[Tensor, "head d_model d_head"]:
        """Query projection of each head: ``q = attn_in @ W_Q[head] + b_Q[head]``, before q-norm and rotary."""
        return by_head(linear_weight(self._projection(layer, "q")), self.dims.n_heads)

    def W_K(self, layer: int, *, per_query_head: bool = False) -> Float[Tensor, "heads d_model d_head"]:
        """Key projection of each key/value head, or repeated (a copy) for each query head of its group."""
        return self._read_by_kv(layer, "k", per_query_head)

    def W_V(self, layer: int, *, per_query_head: bool = False) -> Float[Tensor, "heads d_model d_head"]:
        """Value projection of each key/value head, or repeated (a copy) for each query head of its group."""
        return self._read_by_kv(layer, "v", per_query_head)

    def W_O(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        """Output projection of each head in one layer: ``head_out = z @ W_O[head]``."""
        return linear_weight(self._projection(layer, "o")).T.unflatten(0, (self.dims.n_heads, self.dims.d_head))

    def b_Q(self, layer: int) -> Float[Tensor, "head d_head"] | None:
        """Bias of the queries; None in families without (Qwen2 has one)."""
        return self._bias_by_head(layer, "q", self.dims.n_heads)

    def b_K(self, layer: int) -> Float[Tensor, "kv_head d_head"] | None:
        """Bias of the keys; None in families without."""
        return self._bias_by_head(layer, "k", self.dims.n_kv_heads)

    def b_V(self, layer: int) -> Float[Tensor, "kv_head d_head"] | None:
        """Bias of the values; None in families without."""
        return self._bias_by_head(layer, "v", self.dims.n_kv_heads)

    def W_out(self, layer: int) -> Float[Tensor, "d_mlp d_model"]:
        """What each neuron of a dense MLP writes, times its activation.

        Raises:
            SiteError: the layer has experts in place of one MLP.
        """
        site = Site("mlp_act", layer)
        check(site, self.arch, self.dims)
        return linear_weight(self._module(self.arch.place(site).path)).T

    def b_O(self, layer: int) -> Float[Tensor, "d_model"] | None:
        """Bias of the output projection, which belongs to no head; None in most families."""
        return linear_bias(self._projection(layer, "o"))

    def projection(
        self, kind: str, layer: int, *, per_query_head: bool = False
    ) -> tuple[Float[Tensor, "heads d_model d_head"], Float[Tensor, "heads d_head"] | None]:
        """Weight and bias of ``"q"``, ``"k"`` or ``"v"``, by head; keys and values as `W_K` and `W_V`."""
        if kind == "q":
            return self.W_Q(layer), self.b_Q(layer)
        bias = self._bias_by_head(layer, kind, self.dims.n_kv_heads)
        repeat = self.dims.n_heads // self.dims.n_kv_heads if per_query_head else 1
        weight = self._read_by_kv(layer, kind, per_query_head)
        return weight, bias if bias is None or repeat == 1 else bias.repeat_interleave(repeat, 0)

    def gamma(self, layer: int | None = None) -> Float[Tensor, "d_model"]:
        """γ, the weight of the norm before a layer's attention, or of the final norm; in float32."""
        final = f"{self.arch.base}.{self.arch.norm}"
        return self._module(final if layer is None else f"{self.arch.layer(layer)}.input_layernorm").weight.float()

    def OV(self, layer: int, *, fold: bool = False) -> FactoredMatrix:
        """W_V W_O of each query head, ``head d_model d_model``: what a head writes, of what it attends to.

        Biases and norms are not in it. ``model.W_E @ model.OV(layer) @ model.W_U.T`` is each head's circuit
        from token to logit, vocab × vocab and never built; its ``eigenvalues`` cost d_head × d_head.

        Args:
            fold: γ W_V W_O: with the weight of the norm that the head reads through, on a copy.
        """
        read = self.W_V(layer, per_query_head=True)
        return FactoredMatrix(self.gamma(layer)[:, None] * read.float() if fold else read, self.W_O(layer))

    def QK(self, layer: int, *, ignore_norm: bool = False, fold: bool = False) -> FactoredMatrix:
        """W_Q W_Kᵀ of each query head, ``head d_model d_model``: ``attn_in_q @ QK @ attn_in_kᵀ``.

        Biases, rotary and the scale 1/√d_head are not in it, so it is the score, up to scale, of a query and
        a key at the same position of a model without biases.

        Args:
            ignore_norm: leave out q/k-norm too, where the family has it (Qwen3).
            fold: γ W_Q W_Kᵀ γ: with the weight of the norm that the head reads through, on a copy. Where q and
                k are normed, their norms' weights are in it as well, and scores are what it gives times one
                positive number for each query and each key.
        Raises:
            ModelError: the family norms q and k, so that scores are not bilinear; unless folded.
        """
        if fold:
            gamma = self.gamma(layer)[:, None]
            query, key = self.W_Q(layer).float(), self.W_K(layer, per_query_head=True).float()
            if self.arch.qk_norm:
                attention = f"{self.arch.layer(layer)}.self_attn"
                query = query * self._module(f"{attention}.q_norm").weight.float()
                key = key * self._module(f"{attention}.k_norm").weight.float()
            return FactoredMatrix(gamma * query, (gamma * key).mT)
        if self.arch.qk_norm and not ignore_norm:
            raise ModelError(
                f"{self.arch.family} norms q and k before their product, so no matrix gives layer {layer}'s scores;"
                " read scores or pattern from a trace, or pass ignore_norm=True for W_Q W_Kᵀ without the norm"
            )
        return FactoredMatrix(self.W_Q(layer), self.W_K(layer, per_query_head=True).mT)

    def _module(self, path: str) -> Any:
        """A module whose weights are wanted.

        Raises:
            ModelError: they are not here: the model is remote.
        """
        module = self.hf.get_submodule(path)
        if any(parameter.is_meta for parameter in module.parameters()):
            raise ModelError(
                f"{path} is wanted for its weights, and {self.name} runs on NDIF, which keeps them; load the model"
                " without remote=True, or read what is wanted at a site, such as sites.logits()"
            )
        return module

    def _projection(self, layer: int, name: str) -> Any:
        if not 0 <= layer < self.dims.n_layers:
            raise SiteError(f"there is no layer {layer}: the model has layers 0 to {self.dims.n_layers - 1}")
        return self._module(f"{self.arch.layer(layer)}.self_attn.{name}_proj")

    def _read_by_kv(self, layer: int, name: str, per_query_head: bool) -> Float[Tensor, "heads d_model d_head"]:
        repeat = self.dims.n_heads // self.dims.n_kv_heads if per_query_head else 1
        return by_head(linear_weight(self._projection(layer, name)), self.dims.n_kv_heads, repeat)

    def _bias_by_head(self, layer: int, name: str, heads: int) -> Float[Tensor, "heads d_head"] | None:
        bias = linear_bias(self._projection(layer, name))
        return None if bias is None else bias.unflatten(0, (heads, -1))


def linear_weight(module: nn.Module) -> Float[Tensor, "out in"]:
    """What a linear layer or embedding multiplies with now: the stored weight, active LoRA adapters added.

    Without adapters this is the parameter itself; never change it in place.

    Raises:
        ModelError: the weight is packed by quantisation, or an adapter does more than add to it.
    """
    if (base := _base(module)) is None:
        weight: Any = module.weight
        if weight.dtype not in _NUMBERS or weight.ndim != 2:
            raise ModelError(
                f"the weight of this {type(module).__name__} is packed ({str(weight.dtype).removeprefix('torch.')},"
                f" shape {tuple(weight.shape)}); load the model without quantisation to read its weights"
            )
        return weight
    weight = linear_weight(base)
    layer: Any = module
    for adapter, sign in _adapters(module):
        weight = weight + sign * layer.get_delta_weight(adapter).to(weight.dtype)
    return weight


def linear_bias(module: nn.Module) -> Float[Tensor, "out"] | None:
    """What a linear layer adds now, or None; as `linear_weight`."""
    if (base := _base(module)) is None:
        return getattr(module, "bias", None)
    bias = linear_bias(base)
    layer: Any = module
    for adapter, sign in _adapters(module):
        if adapter in layer.lora_B and (own := getattr(layer.lora_B[adapter], "bias", None)) is not None:
            delta = sign * layer.scaling[adapter] * own
            bias = delta if bias is None else bias + delta.to(bias.dtype)
    return bias


def by_head(weight: Float[Tensor, "out d_model"], heads: int, repeat: int = 1) -> Float[Tensor, "head d_model d_head"]:
    """A projection that heads read the residual stream with, one matrix a head.

    A view, unless each of `heads` (key/value heads) is repeated for the `repeat` query heads of its group:
    query head h has key/value head ``h // repeat``.
    """
    heads_first = weight.unflatten(0, (heads, -1)).transpose(1, 2)
    return heads_first if repeat == 1 else heads_first.repeat_interleave(repeat, 0)


# peft is known by its shape alone, so that it is imported only where somebody uses it. Every layer that
# it wraps has `base_layer`. LoRA and AdaLoRA, and no others, hold `lora_A`, and their get_delta_weight is
# what they add; elsewhere that name may mean a rotation (OFT) or a factor (HiRA).


def _base(module: nn.Module) -> nn.Module | None:
    layer: Any = module
    return layer.base_layer if hasattr(layer, "base_layer") else None


def _adapters(module: nn.Module) -> list[tuple[str, int]]:
    """Adapters whose delta is missing from the stored weight (1), or is in it but not in force (-1)."""
    layer: Any = module
    if not hasattr(layer, "lora_A"):
        raise ModelError(
            f"{type(module).__module__}.{type(module).__name__} wraps a projection in a way that is not known to be"
            " a sum; merge the adapter into the model (merge_and_unload), or use LoRA"
        )
    if layer.disable_adapters:
        found = [(name, -1) for name in layer.merged_adapters]  # the next pass takes them out
    else:
        found = [] if layer.merged_adapters else [(name, 1) for name in layer.active_adapters]
    found = [(n, s) for n, s in found if n in layer.lora_A or n in layer.lora_embedding_A]
    if variant := next((n for n, _ in found if n in getattr(layer, "lora_variant", ())), None):
        raise ModelError(
            f"adapter {variant!r} is {type(layer.lora_variant[variant]).__name__}, which does more than add to the"
            " weight; merge it into the model (merge_and_unload), or use plain LoRA"
        )
    return found
