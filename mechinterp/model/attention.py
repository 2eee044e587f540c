"""The one attention function, registered with transformers by name.

The model's own kernel (SDPA, say) always makes the layer's output, to the bit. Reads of q_rot and
k_rot see its inputs; reads of scores and pattern are a side computation in blocks of queries, freed
as they go. Only a write to scores or pattern, or a gradient there, takes the explicit softmax, in
that layer alone.
"""

import sys
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mechinterp.core.tokens import TokenBatch
from mechinterp.core.trace import Read
from mechinterp.errors import ModelError, SiteError
from mechinterp.model.slices import PATTERN_KINDS, index
from mechinterp.sites import Site

PREFIX = "mechinterp_"
_KEYS = ("k", "k_normed", "k_rot")
PER_QUERY_HEAD = (*_KEYS, "v")
"""Kinds with a view repeated for each query head."""
BLOCK_BYTES = 8 << 20
"""Size of one block of probabilities; blocks depend on shapes alone, so no analyzer moves another's numbers."""

Query: TypeAlias = Float[Tensor, "batch head query d_head"]
Key: TypeAlias = Float[Tensor, "batch kv_head key d_head"]
Pattern: TypeAlias = Float[Tensor, "batch head query key"]


@dataclass
class Pass:
    """The state of one forward call; it travels down to the attention function as a keyword."""

    batch: TokenBatch
    lenient: bool = True
    """Rows that lack a written position are left as they are, instead of being an error."""
    work: list["LayerWork"] = field(default_factory=list)
    kept: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    """(end, module path) → what went in or came out there, after everybody's writes, where something else needs it."""
    head_out: dict[int, Tensor] = field(default_factory=dict)
    """What heads write, by layer, where somebody changed it."""
    read: set[Site] = field(default_factory=set)
    written: set[Site] = field(default_factory=set)
    """Where anybody writes in this pass."""

    mids: dict[int, object] = field(default_factory=dict)
    """Who wrote resid_mid, by layer."""

    def attention(self, layer: int) -> list["LayerWork"]:
        return [each for each in self.work if each.layer == layer]


Act: TypeAlias = Callable[[Pass, Tensor], Tensor]


@runtime_checkable
class Flight(Protocol):
    """A packed sweep's rows on their way; they attend in groups, to keys that they share."""

    def attend(self, query: Query, key: Key, value: Key, scaling: float) -> Tensor:
        """``1 token head d_head`` from one packed batch."""
        ...


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


@dataclass
class LayerWork:
    """What one attachment wants of one layer's attention."""

    layer: int
    path: str
    """Of the layer's attention module."""
    rotary: Callable[..., tuple[Tensor, Tensor]]
    """The model's rotary embedding: (values, position ids) → cos and sin."""
    edits: dict[str, list[Act]] = field(default_factory=lambda: defaultdict(list))
    """Writes and reads of q_rot, k_rot, scores and pattern, in order; see `key` for views per query head."""
    watched: list[Read] = field(default_factory=list)
    """Reads of scores and pattern."""
    differentiated: bool = False
    state: Pass | None = None
    values: dict[Read, Tensor] = field(default_factory=dict)

    @staticmethod
    def key(site: Site) -> str:
        return f"{site.kind} per query head" if site.per_query_head else site.kind

    @property
    def explicit(self) -> bool:
        """The explicit softmax must be taken: something is written to scores or pattern, or differentiated."""
        return self.differentiated or any(self.edits[kind] for kind in PATTERN_KINDS)

    def edit(self, key: str, value: Tensor) -> Tensor:
        """The value at a place inside attention after everything that is wanted there."""
        assert self.state is not None
        for act in self.edits[key]:
            value = act(self.state, value)
        return value

    def watch(self, side: Side) -> None:
        """Take the scores and patterns that are read, whole, at chosen queries, or reduced block by block."""
        assert self.state is not None
        batch = self.state.batch
        # A sliding window's cache forgets the first keys; the key axis still counts from the first token.
        forgotten = batch.mask.shape[1] - side.key.shape[2]

        def aligned(kind: str, found: Tensor) -> Tensor:
            fill = 0.0 if kind == "pattern" else float("-inf")
            return torch.nn.functional.pad(found, (forgotten, 0), value=fill) if forgotten else found

        reduced: dict[str, list[Read]] = defaultdict(list)
        for read in self.watched:
            site = read.site
            where = batch.where(site.positions)
            if read.reduce is not None:
                if where is not None or site.heads is not None:
                    raise SiteError(
                        f"{site} is reduced, so it takes all heads and queries; choose among them in the function"
                    )
                reduced[site.kind].append(read)
            elif where is None:
                whole = aligned(site.kind, side.at(site.kind, slice(0, side.query.shape[2])))
                self.values[read] = whole if site.heads is None else whole[:, index(site.heads)]
            else:
                where = where.to(side.query.device)
                single = where.columns.ndim == 1
                chosen = side.gather(site.kind, where.columns[:, None] if single else where.columns)
                chosen = aligned(site.kind, chosen)
                if where.valid is not None:
                    valid = where.valid.reshape(len(chosen), 1, -1, 1)
                    chosen = chosen.masked_fill(~valid, float("nan"))
                chosen = chosen[:, :, 0] if single else chosen
                self.values[read] = chosen if site.heads is None else chosen[:, index(site.heads)]
        for kind, reads in reduced.items():
            pieces: dict[Read, list[Tensor]] = {read: [] for read in reads}
            real = batch.mask[:, None, batch.offset :, None].to(side.query.device)
            padded = kind == "pattern" and not bool(real.all())
            for queries, found in side.blocks(kind):
                whole = aligned(kind, found)
                block = whole * real[:, :, queries] if padded else whole  # padding attends to nothing
                for read in reads:
                    assert read.reduce is not None
                    pieces[read].append(read.reduce.fn(block, queries, batch))
            for read in reads:
                assert read.reduce is not None
                self.values[read] = read.reduce.join(pieces[read])


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
    state: Pass | Flight | None = kwargs.pop("mechinterp", None)
    layer: Any = module
    if isinstance(state, Flight):
        return state.attend(query, key, value, float(kwargs["scaling"])), None
    name = str(layer.config._attn_implementation).removeprefix(PREFIX)
    work = [] if state is None else state.attention(layer.layer_idx)
    for each in work:
        query = each.edit("q_rot", query.transpose(1, 2)).transpose(1, 2)
        cached = key.shape[2] - query.shape[2]  # with a key/value cache, keys of earlier steps stand first
        new = each.edit("k_rot", key[:, :, cached:].transpose(1, 2)).transpose(1, 2)
        key = torch.cat([key[:, :, :cached], new], 2) if cached else new
    scaling, mask = float(kwargs["scaling"]), attention_mask
    repeated = None if state is None else _per_query_head(layer, key, work, state, kwargs.get("position_ids"))
    if repeated is not None or any(each.explicit for each in work):
        keys, values = (None, None) if repeated is None else repeated
        keys, values = key if keys is None else keys, value if values is None else values
        side, out = _explicit(query, keys, values, _full_mask(mask), scaling, work)
    else:
        out = _kernel(name, module)(module, query, key, value, mask, **kwargs)[0]
        side = Beside(query, key, _full_mask(mask), scaling)
    for each in work:
        each.watch(side)
    return out, None


def _per_query_head(
    module: Any, key: Key, work: list[LayerWork], state: Pass, position_ids: Tensor | None
) -> tuple[Tensor | None, Tensor | None] | None:
    """Keys and values repeated for each query head and written there; None where nothing was.

    A key that is written before the norm or rotary goes through the model's own from there on.
    """
    wanted = [kind for kind in PER_QUERY_HEAD if any(each.edits[f"{kind} per query head"] for each in work)]
    if not wanted:
        return None

    def edit(kind: str, heads: Tensor) -> Tensor:
        for each in work:
            heads = each.edit(f"{kind} per query head", heads)
        return heads

    def kept(name: str) -> Tensor:
        out = state.kept["out", f"{work[0].path}.{name}"]
        return out.view(*out.shape[:2], -1, module.head_dim)

    def rotated(heads: Tensor) -> Tensor:
        if not getattr(module, "use_rope", True):  # some families have layers without positions
            return heads
        cos, sin = work[0].rotary(heads, position_ids)
        turn = sys.modules[type(module).__module__].apply_rotary_pos_emb
        return turn(heads.transpose(1, 2), heads.transpose(1, 2), cos, sin)[1].transpose(1, 2)

    def own(kind: str) -> Tensor:
        """One head for each query head: batch pos head d_head."""
        names = {"k": "k_proj", "k_normed": "k_norm", "v": "v_proj"}
        new = key[:, :, key.shape[2] - state.batch.ids.shape[1] :].transpose(1, 2) if kind == "k_rot" else None
        return (kept(names[kind]) if new is None else new).repeat_interleave(module.num_key_value_groups, 2)

    keys: Tensor | None = None  # from the first write on
    for kind in _KEYS:
        if keys is not None and kind == "k_normed" and hasattr(module, "k_norm"):
            keys = module.k_norm.forward(keys)
        if keys is not None and kind == "k_rot":
            keys = rotated(keys)
        if kind in wanted:
            old = own(kind) if keys is None else keys
            new = edit(kind, old)
            keys = new if keys is not None or new is not old else None
    values: Tensor | None = None
    if "v" in wanted:
        old = own("v")
        values = None if (new := edit("v", old)) is old else new
    if keys is None and values is None:
        return None
    return None if keys is None else keys.transpose(1, 2), None if values is None else values.transpose(1, 2)


def check_written(sites: Iterable[Site], read: Iterable[Site] = ()) -> None:
    """Raise where a key or value is written per query head, and then written or read for its whole group.

    Raises:
        SiteError: such a pair; a group that has come apart has no one key or value.
    """
    written = list(sites)
    for split in (site for site in written if site.per_query_head):
        later = ("v",) if split.kind == "v" else _KEYS[_KEYS.index(split.kind) :]
        for site in read:
            if site.layer == split.layer and site.kind in later and not site.per_query_head:
                raise SiteError(
                    f"{site} cannot be read in a pass that writes {split.whole} per query head, after which a group"
                    " has several; read it with per_query_head=True"
                )
    keys = [site for site in written if site.kind in _KEYS]
    for split in (site for site in keys if site.per_query_head):
        for later in (site for site in keys if site.layer == split.layer and not site.per_query_head):
            if _KEYS.index(later.kind) > _KEYS.index(split.kind):
                raise SiteError(
                    f"{later} cannot be written in a pass that writes {split.whole} per query head, after which a"
                    " group has several keys; write both with per_query_head=True, or in two passes"
                )


def _explicit(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, work: list[LayerWork]
) -> tuple[Side, Tensor]:
    scores = Beside(query, key, mask, scaling).at("scores", slice(0, query.shape[2]))
    hidden = scores < torch.finfo(scores.dtype).min / 2  # a score that is masked stays so, whatever is written
    state = work[0].state
    assert state is not None
    forgotten = state.batch.mask.shape[1] - scores.shape[3]  # by a window's cache; writes count from the first token

    def edited(kind: str, value: Tensor) -> Tensor:
        if not any(each.edits[kind] for each in work):
            return value
        fill = 0.0 if kind == "pattern" else float("-inf")
        whole = torch.nn.functional.pad(value, (forgotten, 0), value=fill)
        for each in work:
            whole = each.edit(kind, whole)
        return whole[..., forgotten:]

    scores = edited("scores", scores)
    if any(each.edits["scores"] for each in work):
        scores = scores.masked_fill(hidden, float("-inf"))
    pattern = edited("pattern", softmax(scores, query.dtype, True))
    if any(each.edits["pattern"] for each in work):  # nobody attends to the future, or to padding
        keys, queries = pattern.shape[3], pattern.shape[2]
        future = torch.ones(queries, keys, dtype=torch.bool, device=pattern.device).triu(keys - queries + 1)
        padding = ~state.batch.mask[:, None, None, -keys:].to(pattern.device)
        pattern = pattern.masked_fill(future | padding, 0.0)
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
