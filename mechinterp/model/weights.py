"""Weights of the model's projections, as they act in a pass and by head. Views wherever they can be."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mechinterp.errors import ModelError

_NUMBERS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
