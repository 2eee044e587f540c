"""Rows of a packed sweep on their way through the layers, all in one matrix."""

import contextlib
from collections.abc import Callable, Generator, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechinterp.engine.cells import Bools, Ints, Rows
from mechinterp.engine.runs import Runs
from mechinterp.engine.writing import Writing, ragged
from mechinterp.model.attention import PREFIX, raw_scores, register, softmax
from mechinterp.model.hooks import route
from mechinterp.model.model import Model
from mechinterp.model.slices import PATTERN_KINDS
from mechinterp.sites import KINDS, Site

_OUTPUTS = ("q", "k", "v", "q_normed", "k_normed", "mlp_gate", "mlp_up", "router")
"""Kinds that are outputs of modules inside attention and MLP; the table of families says of which."""
CACHE = 1 << 22
"""Bytes of one tensor inside an MLP that a processor keeps near."""
SMALL = 1 << 10
"""Pairs of a query and a key below which a call of attention costs more than what it computes."""
_KINDS = list(KINDS)
_BEFORE_Z = tuple(_KINDS[_KINDS.index("attn_in") : _KINDS.index("z")])
_IN_ATTENTION = (*_BEFORE_Z, "z", "head_out")
_IN_MLP = tuple(_KINDS[_KINDS.index("mlp_in") : _KINDS.index("mlp_out")])


class Flight(Writing):
    """The rows on their way through the layers."""

    def __init__(self, runs: Runs, rows: Rows, carrier: Ints | None, budget: int) -> None:
        super().__init__(runs, rows, budget)
        self.carrier = carrier
        """Which row has the keys and values of a column of a row, where `Cells.sharing` says so."""
        self.z: Tensor | None = None
        rotary: Any = self.model.hf.get_submodule(f"{self.model.arch.base}.rotary_emb")
        resid = runs.residual(0)
        columns = torch.arange(int(rows.length.max(initial=1)), device=resid.device)
        self.rotary: tuple[Tensor, Tensor] = rotary(resid[:1], columns[None])

    def run(self) -> tuple[Ints, Ints, Tensor]:
        """Rows and the number of the metric's column, side by side, and the final norm's output there."""
        n, arch = self.model.dims.n_layers, self.model.arch
        columns, valid = self.s.metric_columns(self.rows)
        columns = np.where(valid, columns, -1)
        # What is written at the end of a layer joins at the next.
        last = max((layer + (kind == "resid_post") for layer, kind in self.read), default=-1)
        to_the_end = self.s.sweep.metric is not None or last == n
        tokens = self.s.residual(0).new_empty(0, self.model.dims.d_model)
        with _packed(self.model):
            for layer in range(int(self.rows.enters.min()), n if to_the_end else last + 1):
                self.layer = layer
                tokens = self._through(tokens, columns if layer == n - 1 and last < layer else None)
        nothing = np.zeros(0, np.int64)
        if not to_the_end:
            return nothing, nothing, tokens[:0]
        self.layer = n
        tokens = self._append(tokens, np.nonzero(self.rows.enters == n)[0])
        norm: Any = self.model.hf.get_submodule(f"{arch.base}.{arch.norm}")
        final = self._act("final_norm", norm(tokens[None])[0])
        for site in self.read.get((n, "logits"), ()):
            self._keep(site, final, np.nonzero(self.offset >= 0)[0], self.model.unembed)
        place = self._token(np.arange(len(self.rows))[:, None], columns)
        row, which = np.nonzero(place >= 0)
        return row, which, final[self.s.tensor(place[row, which])]

    def _through(self, tokens: Tensor, only: Ints | None) -> Tensor:
        """One decoder layer; in the last, only the metric's columns (``row chosen``) go on after attention."""
        layer: Any = self.model.hf.get_submodule(self.model.arch.layer(self.layer))
        tokens = self._arrange(tokens)
        if not len(tokens):
            return tokens
        self.token_layers += len(tokens)
        tokens = self._act("resid_pre", self._act("embed", tokens) if self.layer == 0 else tokens)
        with self._hooked():
            attn = self._act("attn_out", self._attention(layer, tokens))
            if only is not None:
                keep = self._token(np.arange(len(self.rows))[:, None], only)
                keep = np.unique(np.concatenate([keep[keep >= 0], self._late()]))
                self.slot = np.full(len(tokens), -1, np.int64)
                self.slot[keep] = np.arange(len(keep))
                tokens, attn = tokens[self.s.tensor(keep)], attn[self.s.tensor(keep)]
            tokens = self._act("resid_mid", attn.add_(tokens))
            return self._act("resid_post", self._mlp(layer, tokens))

    def _late(self) -> Ints:
        """Tokens of which something is kept after the attention of this layer."""
        after = _KINDS[_KINDS.index("attn_out") + 1 :]
        cells = {run.cell for kind in after for run, _ in self.record.get((self.layer, kind), ())}
        rows = np.nonzero(np.isin(self.rows.cell, list(cells)))[0]
        which, columns = ragged(self.rows.start[rows], self.rows.length[rows])
        return self._token(rows[which], columns)

    def _attention(self, layer: Any, tokens: Tensor) -> Tensor:
        """attn_out of tokens; nothing is computed that would be held anyway."""
        if self._held("attn_out", _IN_ATTENTION):
            return torch.zeros_like(tokens)
        if self._held("z", _BEFORE_Z):
            heads = self.model.dims.n_heads
            self.z = self._act("z", tokens.new_zeros(len(tokens), heads, self.model.dims.d_head))
            return self._heads(layer.self_attn.o_proj, layer.self_attn.o_proj(self.z.flatten(1)[None])[0])
        cos, sin = (each[:, self.s.tensor(self.column)] for each in self.rotary)
        out = layer.self_attn(
            hidden_states=self._act("attn_in", layer.input_layernorm(tokens[None])[0])[None],
            position_embeddings=(cos, sin),
            attention_mask=None,
            mechinterp=self,
        )[0][0]
        return self._heads(layer.self_attn.o_proj, out)

    def _mlp(self, layer: Any, tokens: Tensor) -> Tensor:
        """resid_post of tokens; nothing is computed that would be held anyway."""
        if self._held("mlp_out", _IN_MLP):
            return self._act("mlp_out", torch.zeros_like(tokens)).add_(tokens)
        if any(map(self._busy, _IN_MLP)) or tokens.is_cuda or self.model.dims.n_experts:
            out = layer.mlp(self._act("mlp_in", layer.post_attention_layernorm(tokens[None])[0])[None])[0]
        else:  # what lies between the matrices is as wide as d_mlp: as much at a time as a processor keeps near
            out, size = torch.empty_like(tokens), max(256, CACHE // (self.model.dims.d_mlp * tokens.element_size()))
            for some, into in zip(tokens.split(size), out.split(size), strict=True):
                into.copy_(layer.mlp(layer.post_attention_layernorm(some[None]))[0])
        return self._act("mlp_out", out).add_(tokens)

    def _held(self, kind: str, before: tuple[str, ...]) -> bool:
        """Whether all of a kind is held in this layer, and nothing is written or read before it."""
        whole = any(w.held and w.site == w.site.whole for w in self.work.get((self.layer, kind), ()))
        return whole and not any((self.layer, k) in self.read or (self.layer, k) in self.work for k in before)

    def _arrange(self, tokens: Tensor) -> Tensor:
        """Tokens in the order of rows, which is that of the groups that attend together.

        Rows that enter at this layer join, and those that entered at the one before carry all later columns now.
        """
        start, flying = self.rows.start, self.offset >= 0
        joining = (self.rows.enters == self.layer) & ~flying
        grown = flying & (self.stop < self.rows.length)
        if not joining.any() and not grown.any():
            return tokens
        old = np.nonzero(flying)[0]
        which, columns = ragged(start[old], self.stop[old])
        was = (old[which], columns)
        first = np.where(joining, start, self.stop)  # of the columns that are new
        self.stop[grown] = self.rows.length[grown]
        fresh = np.nonzero(joining | grown)[0]
        which, columns = ragged(first[fresh], self.stop[fresh])
        new = (fresh[which], columns)
        sizes = np.where(flying | joining, self.stop - start, 0)
        self.offset = np.where(flying | joining, np.cumsum(sizes) - sizes, -1)
        out = tokens.new_empty(int(sizes.sum()), tokens.shape[1])
        self.column = np.zeros(len(out), np.int64)
        for (row, column), some in ((was, tokens), (new, self.s.entering(self.layer, self.rows, *new))):
            at = self._token(row, column)
            self.column[at] = column
            out[self.s.tensor(at)] = some
        return self._begin(out, np.nonzero(joining)[0])

    def _append(self, tokens: Tensor, rows: Ints) -> Tensor:
        """Rows that join after the last layer, where the order no longer matters."""
        if not len(rows):
            return tokens
        which, columns = ragged(self.rows.start[rows], self.stop[rows])
        some = self.s.entering(self.layer, self.rows, rows[which], columns)
        sizes = self.stop[rows] - self.rows.start[rows]
        self.offset[rows] = len(self.column) + np.cumsum(sizes) - sizes
        if self.slot is not None:
            self.slot = np.concatenate([self.slot, np.arange(len(some)) + len(tokens)])
        self.column = np.concatenate([self.column, columns])
        return self._begin(torch.cat([tokens, some]), rows)

    def _begin(self, tokens: Tensor, rows: Ints) -> Tensor:
        """A write at the end of the layer before is where a row begins that has one."""
        self.layer -= 1
        tokens = self._act("resid_post", tokens, rows)
        self.layer += 1
        return tokens

    @contextlib.contextmanager
    def _hooked(self) -> Generator[None]:
        """Writes and reads at the outputs and inputs of modules inside attention and MLP."""
        handles: list[Any] = []

        def out(kind: str) -> Callable[..., Any]:
            def hook(module: Any, args: Any, output: Any) -> Any:
                old: Tensor = output[0] if isinstance(output, tuple) else output
                heads = self.model.dims.heads(kind)
                packed = old.reshape(-1, old.shape[-1]) if heads is None else old.view(len(self.column), heads, -1)
                new = self._act(kind, packed).view(old.shape)
                return (new, *route(module, new)) if isinstance(output, tuple) else new

            return hook

        def into(module: Any, args: Any) -> Any:
            return (self._act("mlp_act", args[0][0])[None], *args[1:])

        def module(kind: str) -> Any:
            return self.model.hf.get_submodule(self.model.arch.place(Site(kind, self.layer)).path)

        for kind in _OUTPUTS:
            if self._busy(kind):
                handles.append(module(kind).register_forward_hook(out(kind)))
        if self._busy("mlp_act"):
            handles.append(module("mlp_act").register_forward_pre_hook(into))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _busy(self, kind: str) -> bool:
        """Whether anything is written or read at a kind in this layer."""
        return any((self.layer, kind) in each for each in (self.work, self.read, self.record))

    def _heads(self, projection: Any, attn: Tensor) -> Tensor:
        """Writes at head_out: a change of the sum."""
        if not self._busy("head_out"):
            return attn
        assert self.z is not None
        old = torch.einsum("the,hed->thd", self.z, self.model.W_O(self.layer))
        new = self._act("head_out", old)
        return attn if new is old else attn + (new - old).sum(1)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """What queries make of their own row's keys and, before them, the base run's: ``1 token head d_head``."""
        query, key = (self._act(k, x[0].transpose(0, 1)) for k, x in (("q_rot", query), ("k_rot", key)))
        value = value[0].transpose(0, 1)
        z = torch.empty_like(query)
        own = len(key)
        stores = [torch.cat([x, self._base(kind).flatten(0, 1)]) for kind, x in (("k_rot", key), ("v", value))]
        for rows in self._pieces(2 * query[0].numel() * query.element_size()):
            self._attend(z, query, stores, own, rows, scaling)
        self.z = self._act("z", z)
        return self.z[None]

    def _base(self, kind: str) -> Tensor:
        """The base run's keys or values in this layer, ``example column head d_head``."""
        return self.s.value(Site(kind, self.layer))

    def _pieces(self, size: int) -> Iterator[Ints]:
        """Neighbouring rows that attend in one call: as wide as the widest, where that wastes no more than it saves.

        Args:
            size: bytes of one column's key and value.
        """
        flying = np.nonzero(self.offset >= 0)[0]
        width, stop = (self.stop - self.rows.start)[flying], self.stop[flying]
        alike = np.nonzero(np.diff(width, prepend=-1) | np.diff(stop, prepend=-1))[0]
        begin, wide, far, real = 0, 0, 0, 0
        for first, last in zip(alike, [*alike[1:], len(flying)], strict=True):
            w, k = max(wide, int(width[first])), max(far, int(stop[first]))
            area = int(width[first] * stop[first]) * int(last - first)
            if begin < first and int(last - begin) * w * k > max(2 * (real + area), SMALL):
                yield from self._fitting(flying[begin:first], wide, far, size)
                begin, w, k, real = int(first), int(width[first]), int(stop[first]), 0
            wide, far, real = w, k, real + area
        yield from self._fitting(flying[begin:], wide, far, size)

    def _fitting(self, rows: Ints, width: int, stop: int, size: int) -> Iterator[Ints]:
        """As many rows at a time as a part of the budget allows."""
        step = max(1, self.budget // 16 // (stop * (size + 5 * width)))
        for begin in range(0, len(rows), step):
            yield rows[begin : begin + step]

    def _attend(self, z: Tensor, query: Tensor, stores: list[Tensor], own: int, rows: Ints, scaling: float) -> None:
        """Attention of neighbouring rows, put into z; before their writes have spread, they see the base's keys.

        Args:
            stores: keys and values: of all tokens in flight, `own` in number, and behind them the base run's.
        """
        start, stop = self.rows.start[rows], self.stop[rows]
        first, width, columns = self.offset[rows], stop - start, np.arange(int(stop.max()))
        if self.carrier is None:
            spread = self.rows.spreads[rows] | (self.rows.enters[rows] < self.layer)
            mine = (columns >= start[:, None]) & (columns < stop[:, None]) & spread[:, None]
            theirs = rows[:, None]
        else:
            theirs = self.carrier[rows, : len(columns)]
            mine = theirs >= 0
        base = own + self.rows.example[rows][:, None] * self._base("v").shape[1] + columns
        at = np.arange(int(width.max()))

        def taken(store: Tensor, token: Ints) -> Tensor:
            """``row head column d_head``"""
            found = store.index_select(0, self.s.tensor(token.ravel()))
            return found.view(*token.shape, *store.shape[1:]).transpose(1, 2)

        seen = np.where(mine, (self.offset - self.rows.start)[theirs] + columns, base)
        key, value = (taken(store, seen) for store in stores)
        some = taken(query, first[:, None] + np.minimum(at, width[:, None] - 1))
        alike = start[:1] if (start == start[0]).all() else start  # one mask for all, if it can be
        distance = alike[:, None, None] + at[:, None] - columns
        window = self.model.dims.windows[self.layer]
        visible = self.s.tensor((distance >= 0) & (distance < (window or np.inf)))[:, None]
        out = torch.nn.functional.scaled_dot_product_attention(
            some, key, value, attn_mask=visible, scale=scaling, enable_gqa=True
        )
        real = self.s.tensor(at < width[:, None])
        z[int(first[0]) : int(first[-1] + width[-1])] = out.transpose(1, 2)[real]
        which = np.nonzero(self._patterned(rows))[0]
        shapes = np.stack([start, stop], 1)[which]
        for same in np.split(which, np.nonzero((shapes[1:] != shapes[:-1]).any(1))[0] + 1) if len(which) else ():
            i, wide, far = int(same[0]), int(width[same[0]]), int(stop[same[0]])
            pick = self.s.tensor(same)
            new = self._explicit(
                rows[same],
                some[pick, :, :wide],
                key[pick, :, :far],
                value[pick, :, :far],
                visible[0 if len(alike) == 1 else i, :, :wide, :far],
                int(start[i]),
                scaling,
            )
            for row, one in zip(rows[same], new, strict=True):
                z[int(self.offset[row]) : int(self.offset[row]) + wide] = one

    def _patterned(self, rows: Ints) -> Bools:
        groups = [w.groups for kind in PATTERN_KINDS for w in self.work.get((self.layer, kind), ())]
        return np.isin(self.group[rows], np.concatenate(groups)) if groups else np.zeros(len(rows), bool)

    def _explicit(
        self, rows: Ints, query: Tensor, key: Tensor, value: Tensor, visible: Tensor, start: int, scaling: float
    ) -> Tensor:
        """z of rows whose scores or patterns are written, ``row query head d_head``."""
        scores = raw_scores(query, key, scaling).masked_fill(~visible, float("-inf"))
        scores = self._rewrite("scores", scores, rows, start).masked_fill(~visible, float("-inf"))
        pattern = self._rewrite("pattern", softmax(scores, query.dtype, True), rows, start)
        pattern = pattern.tril(start)  # nobody attends to the future
        batch, heads, queries, keys = pattern.shape
        grouped = pattern.reshape(batch, value.shape[1], -1, keys)
        return (grouped @ value).view(batch, heads, queries, -1).transpose(1, 2)


@contextlib.contextmanager
def _packed(model: Model) -> Generator[None]:
    """The model's attention goes to the flight that calls it."""
    config: Any = model.hf.config
    kernel = config._attn_implementation
    config._attn_implementation = register(str(kernel).removeprefix(PREFIX))
    try:
        yield
    finally:
        config._attn_implementation = kernel
