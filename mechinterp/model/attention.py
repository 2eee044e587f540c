"""The one attention function, registered with transformers by name.

The model's own kernel (SDPA, say) always makes the layer's output, to the bit. Reads of q_rot and
k_rot see its inputs; reads of scores and pattern are a side computation in blocks of queries, freed
as they go. Only a write to scores or pattern, or a gradient there, takes the explicit softmax, in
that layer alone.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mechinterp.errors import ModelError

PREFIX = "mechinterp_"
BLOCK_BYTES = 8 << 20
"""Size of one block of probabilities; blocks depend on shapes alone, so no analyzer moves another's numbers."""

Query: TypeAlias = Float[Tensor, "batch head query d_head"]
Key: TypeAlias = Float[Tensor, "batch kv_head key d_head"]
Pattern: TypeAlias = Float[Tensor, "batch head query key"]


class Side(ABC):
    """Scores and patterns of one layer, for chosen queries or block by block."""

    def __init__(self, query: Query, key: Key) -> None:
        self.query, self.key = query, key

    @abstractmethod
    def at(self, kind: str, chosen: slice) -> Pattern:
        """Scores or pattern of a slice of queries, with all keys."""

    @abstractmethod
    def gather(self, kind: str, columns: Int[Tensor, "batch chosen"]) -> Pattern:
        """Scores or pattern of chosen query columns, with all keys."""

    def blocks(self, kind: str) -> Iterator[tuple[slice, Pattern]]:
        """(queries, block) over all queries, in order; a block has all keys."""
        batch, heads, queries, _ = self.query.shape
        size = max(1, BLOCK_BYTES // (4 * batch * heads * self.key.shape[2]))
        for start in range(0, queries, size):
            chosen = slice(start, min(start + size, queries))
            yield chosen, self.at(kind, chosen)


class Beside(Side):
    """Computed beside the kernel from its inputs; never whole."""

    def __init__(self, query: Query, key: Key, mask: Tensor | None, scaling: float) -> None:
        super().__init__(query, key)
        self.mask, self.scaling = mask, scaling

    def at(self, kind: str, chosen: slice) -> Pattern:
        total, ahead = self.key.shape[2], self.key.shape[2] - self.query.shape[2]
        # With a plain causal mask no query in the slice sees beyond the last one.
        keys = total if self.mask is not None else min(total, ahead + int(chosen.stop))
        scores = raw_scores(self.query[:, :, chosen], self.key[:, :, :keys], self.scaling)
        if self.mask is None:
            here = torch.arange(chosen.start, chosen.stop, device=scores.device)[:, None] + ahead
            visible = torch.arange(keys, device=scores.device) <= here
        else:
            visible = self.mask[:, :, chosen] if self.mask.shape[2] > 1 else self.mask
        out, hidden = apply_mask(scores, visible), float("-inf")
        if kind == "pattern":
            out, hidden = softmax(out, self.query.dtype, self.mask is not None), 0.0
        return out if keys == total else torch.nn.functional.pad(out, (0, total - keys), value=hidden)

    def gather(self, kind: str, columns: Int[Tensor, "batch chosen"]) -> Pattern:
        rows = torch.arange(len(columns), device=columns.device)[:, None]
        query = self.query.transpose(1, 2)[rows, columns].transpose(1, 2)
        scores = raw_scores(query, self.key, self.scaling)
        if self.mask is None:
            ahead = self.key.shape[2] - self.query.shape[2]
            visible = torch.arange(self.key.shape[2], device=columns.device) <= columns[:, None, :, None] + ahead
        else:
            full = self.mask.expand(len(columns), -1, self.query.shape[2], -1)
            visible = full.transpose(1, 2)[rows, columns].transpose(1, 2)
        out = apply_mask(scores, visible)
        return softmax(out, self.query.dtype, self.mask is not None) if kind == "pattern" else out


class Explicit(Side):
    """The tensors that made the layer's output, when the explicit softmax was taken."""

    def __init__(self, query: Query, key: Key, scores: Pattern, pattern: Pattern) -> None:
        super().__init__(query, key)
        self.tensors = {"scores": scores, "pattern": pattern}

    def at(self, kind: str, chosen: slice) -> Pattern:
        return self.tensors[kind][:, :, chosen]

    def gather(self, kind: str, columns: Int[Tensor, "batch chosen"]) -> Pattern:
        rows = torch.arange(len(columns), device=columns.device)[:, None]
        return self.tensors[kind].transpose(1, 2)[rows, columns].transpose(1, 2)


@runtime_checkable
class LayerWork(Protocol):
    """What one attachment wants of one layer's attention; `hooks` implements it."""

    @property
    def explicit(self) -> bool:
        """The explicit softmax must be taken: something is written to scores or pattern, or differentiated."""
        ...

    def edit(self, kind: str, value: Tensor) -> Tensor:
        """Writes at q_rot, k_rot, scores or pattern (and reads of the first two)."""
        ...

    def watch(self, side: Side) -> None:
        """Reads of scores and pattern."""
        ...


def raw_scores(query: Query, key: Key, scaling: float) -> Float[Tensor, "batch head query key"]:
    """Scaled query · key, each query head with the key head of its group."""
    batch, heads, queries, width = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, width)
    return (grouped @ key.transpose(2, 3) * scaling).view(batch, heads, queries, key.shape[2])


def apply_mask(scores: Tensor, mask: Tensor | None) -> Tensor:
    """-inf where a boolean mask is False; an additive mask is added."""
    if mask is None:
        return scores
    return scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask


def softmax(scores: Tensor, dtype: torch.dtype, masked: bool) -> Tensor:
    """In fp32, as transformers' eager attention; where `masked`, a query that sees nothing (padding) gets zeros."""
    out = scores.softmax(-1, dtype=torch.float32)
    if masked:
        out = out.masked_fill(scores.isneginf().all(-1, keepdim=True), 0.0)
    return out.to(dtype)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The kernel that the model would have used, with the pass's reads and writes around it.

    The pass travels down to here as the keyword ``mechinterp``.
    """
    state = kwargs.pop("mechinterp", None)
    layer: Any = module
    name = str(layer.config._attn_implementation).removeprefix(PREFIX)
    work: list[LayerWork] = [] if state is None else state.attention(layer.layer_idx)
    for each in work:
        query = each.edit("q_rot", query.transpose(1, 2)).transpose(1, 2)
        cached = key.shape[2] - query.shape[2]  # with a key/value cache, keys of earlier steps stand first
        new = each.edit("k_rot", key[:, :, cached:].transpose(1, 2)).transpose(1, 2)
        key = torch.cat([key[:, :, :cached], new], 2) if cached else new
    scaling, mask = float(kwargs["scaling"]), attention_mask
    if any(each.explicit for each in work):
        side, out = _explicit(query, key, value, _full_mask(mask), scaling, work)
    else:
        out = _kernel(name, module)(module, query, key, value, mask, **kwargs)[0]
        side = Beside(query, key, _full_mask(mask), scaling)
    for each in work:
        each.watch(side)
    return out, None


def _explicit(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, work: list[LayerWork]
) -> tuple[Side, Tensor]:
    scores = Beside(query, key, mask, scaling).at("scores", slice(0, query.shape[2]))
    for each in work:
        scores = each.edit("scores", scores)
    pattern = softmax(scores, query.dtype, mask is not None)
    for each in work:
        pattern = each.edit("pattern", pattern)
    batch, heads, queries, keys = pattern.shape
    grouped = pattern.reshape(batch, value.shape[1], -1, keys)
    out = (grouped @ value).view(batch, heads, queries, -1).transpose(1, 2).contiguous()
    return Explicit(query, key, scores, pattern), out


def _kernel(name: str, module: torch.nn.Module) -> Callable[..., Any]:
    if name == "eager":  # each modeling file has its own
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[name]


def _full_mask(mask: Tensor | None) -> Bool[Tensor, "batch 1 query key"] | Float[Tensor, "batch 1 query key"] | None:
    if mask is None or mask.ndim == 4:
        return mask
    raise ModelError(
        f"this attention kernel takes a mask of shape {tuple(mask.shape)}, from which scores and patterns"
        ' cannot be read; load the model with attn_implementation="sdpa"'
    )


def register(name: str) -> str:
    """Make the function known to transformers as a variant of kernel `name`; returns its name."""
    ours = PREFIX + name
    if ours not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(ours, attention)
        ALL_MASK_ATTENTION_FUNCTIONS.register(ours, ALL_MASK_ATTENTION_FUNCTIONS[name])
    return ours
