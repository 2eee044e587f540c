"""Rows of a packed sweep on their way through the layers, all in one matrix."""

import contextlib
import itertools
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechinterp.core.analyzer import Sweep
from mechinterp.core.interventions import Intervention
from mechinterp.core.tokens import TokenBatch
from mechinterp.core.trace import Read
from mechinterp.engine.cells import Bools, Cells, Ints, Rows
from mechinterp.engine.forward import Passed, forward
from mechinterp.model.attention import PREFIX, raw_scores, register, softmax
from mechinterp.model.hooks import route
from mechinterp.model.model import Model
from mechinterp.model.slices import PATTERN_KINDS, overwrite
from mechinterp.sites import Site, resolve

_OUTPUTS = ("q", "k", "v", "q_normed", "k_normed", "mlp_gate", "mlp_up", "router")
"""Kinds that are outputs of modules inside attention and MLP; the table of families says of which."""


class Runs(Cells):
    """The cells with their unedited runs: what rows begin from, and what they write."""

    def __init__(
        self, model: Model, batch: TokenBatch, sweep: Sweep, width: int, tick: Callable[[str, int], None]
    ) -> None:
        super().__init__(model, batch, sweep, width)
        self.tick = tick
        self.device = batch.ids.device
        self._passes()

    def _passes(self) -> None:
        """The base run, the source run, and the clean run where a metric compares."""
        model, sweep, n = self.model, self.sweep, self.model.dims.n_layers
        metrics = [] if sweep.metric is None else [sweep.metric]
        kept = [Site(kind, i) for kind in ("resid_pre", "k_rot", "v") for i in range(n)] + [Site("resid_post", n - 1)]
        if not sweep.patches:  # an intervention sees all columns, and those before a row's first are the base's
            kept += [site.whole for group in self.grid.groups for site in group]
        kept += [site.whole for one in sweep.given for site in resolve(one.site, n)]
        reads = [Read(site) for site in dict.fromkeys(kept)]
        self.base = forward(model, self.batch.run(sweep.base), reads, metrics, sweep.given)
        self.tick("sweep_runs", 1)
        self.source: Passed | None = None
        if sweep.patches:
            wanted = dict.fromkeys(Read(site.whole) for group in self.grid.groups for site in group)
            self.source = forward(model, self.batch.run(sweep.source), list(wanted), metrics)
            self.tick("sweep_runs", 1)
        self.clean: Passed | None = None
        if sweep.metric is not None and sweep.metric.compares:
            self.clean = forward(model, self.batch, (), metrics)
            self.tick("sweep_runs", 1)

    def value(self, site: Site) -> Tensor:
        """What the base run had at a whole site."""
        return self.base.values[Read(site)]

    def residual(self, layer: int) -> Tensor:
        """The base run's residual stream entering a layer, or, one beyond the last, leaving it."""
        n = self.model.dims.n_layers
        return self.value(Site("resid_pre", layer) if layer < n else Site("resid_post", n - 1))

    def tensor(self, numbers: Any) -> Tensor:
        return torch.as_tensor(numbers, device=self.device)


class Writing:
    """A chunk of rows, where their tokens lie in the packed matrix, and what they write.

    A row's tokens lie side by side, from `offset` on: its columns `start` to `stop`.
    """

    def __init__(self, runs: Runs, rows: Rows, budget: int) -> None:
        self.s, self.model, self.rows, self.budget = runs, runs.model, rows, budget
        self.stop = rows.stop.copy()
        self.offset = np.full(len(rows), -1, np.int64)
        self.slot: Ints | None = None
        """In the last layer, where the tokens are that were kept; -1 for others."""
        self.column = np.zeros(0, np.int64)
        """Of every token."""
        self.layer = 0
        self.token_layers = 0
        self.z: Tensor | None = None
        self.group, self.position, self.head = runs.of_cell(rows.cell)
        rotary: Any = self.model.hf.get_submodule(f"{self.model.arch.base}.rotary_emb")
        resid = runs.residual(0)
        self.rotary: tuple[Tensor, Tensor] = rotary(resid[:1], torch.arange(resid.shape[1], device=resid.device)[None])
        self.work = self._work()

    def _work(self) -> dict[tuple[int, str], list[tuple[Site, Intervention | None, Ints]]]:
        """(layer, kind) → writes there, what is given first: (site of a group, what or None to patch, groups)."""
        out: dict[tuple[int, str], list[tuple[Site, Intervention | None, Ints]]] = defaultdict(list)
        sweep, n = self.s.sweep, self.model.dims.n_layers
        every = np.unique(self.group)
        for one in sweep.given:
            for site in resolve(one.site, n):
                if site.kind == "resid_pre" and site.layer:  # tokens that join are given it already
                    out[site.layer - 1, "resid_post"].append((site, one, every))
                elif site.kind not in ("embed", "resid_pre"):
                    out[site.layer or 0, site.kind].append((site, one, every))
        members: dict[Site, list[int]] = defaultdict(list)
        for group in every.tolist():
            for site in self.s.grid.groups[group]:
                members[site].append(group)
        for site, groups in members.items():
            out[site.layer or 0, site.kind].append((site, None, np.array(groups)))
        return out

    def _token(self, rows: Ints, columns: Ints) -> Ints:
        """Where a column of a row is in the packed matrix; -1 where it is not carried."""
        inside = (self.offset[rows] >= 0) & (columns >= self.rows.start[rows]) & (columns < self.stop[rows])
        at = np.where(inside, self.offset[rows] + columns - self.rows.start[rows], -1)
        return at if self.slot is None else np.where(inside, self.slot[at], -1)

    def _act(self, kind: str, value: Tensor, rows: Ints | None = None) -> Tensor:
        """Everything that is written at a kind of site of this layer: ``token [head] width``.

        Args:
            rows: only of these.
        """
        work = self.work.get((self.layer, kind))
        if not work:
            return value
        value = value.clone()
        flying = self.offset >= 0
        for site, given, groups in work:
            chosen = flying & np.isin(self.group, groups)
            if rows is not None:
                chosen &= np.isin(np.arange(len(chosen)), rows) & (given is None)
            if given is not None or not self.s.sweep.patches:
                for cell in np.unique(self.rows.cell[chosen]).tolist():
                    self._intervene(value, site, given, np.nonzero(chosen & (self.rows.cell == cell))[0])
                continue
            for row, column, heads in self._written(site, np.nonzero(chosen)[0]):
                token = self._token(row, column)
                row, column, token = row[token >= 0], column[token >= 0], token[token >= 0]
                assert self.s.source is not None
                source = self.s.source.values[Read(site.whole)]
                new = source[self.s.tensor(self.rows.example[row]), self.s.tensor(column)]
                if heads is None:
                    value[self.s.tensor(token)] = new
                else:
                    value[self.s.tensor(token)[:, None], heads] = new[:, heads]
        return value

    def _written(self, site: Site, rows: Ints) -> Iterator[tuple[Ints, Ints, list[int] | None]]:
        """(row, column, heads) of everything that rows write at a group's site; once for each choice of heads."""
        for position, head in itertools.product(np.unique(self.position[rows]), np.unique(self.head[rows])):
            some = rows[(self.position[rows] == position) & (self.head[rows] == head)]
            where, one = self.s.grid.positions[position], self.s.grid.parts[head]
            columns, valid = self.s.columns(site.positions if where is None else where)
            chosen = site.heads if one is None else one
            heads = None if chosen is None else [chosen] if isinstance(chosen, int) else list(chosen)
            which, at = np.nonzero(valid[self.rows.example[some]])
            yield some[which], columns[self.rows.example[some][which], at], heads

    def _site(self, site: Site, row: int) -> Site:
        """A group's site at the position and head of a row's cell."""
        position, head = self.s.grid.positions[self.position[row]], self.s.grid.parts[self.head[row]]
        return replace(
            site,
            positions=site.positions if position is None else position,
            heads=site.heads if head is None else head,
        )

    def _intervene(self, value: Tensor, site: Site, given: Intervention | None, rows: Ints) -> None:
        """Write in place, for the examples of one cell, what an intervention makes of them among the base's columns."""
        which, columns = ragged(self.rows.start[rows], self.stop[rows])
        token = self._token(rows[which], columns)
        which, columns, token = which[token >= 0], columns[token >= 0], self.s.tensor(token[token >= 0])
        example, column = self.s.tensor(self.rows.example[rows][which]), self.s.tensor(columns)
        canvas = self.s.value(site.whole).clone()
        canvas[example, column] = value[token].view(len(token), *canvas.shape[2:])
        if given is None:
            site = self._site(site, int(rows[0]))
            assert self.s.sweep.write is not None
            given = self.s.sweep.write(site)
        where = self.s.batch.where(site.positions, strict=False)
        new = overwrite(canvas, site, where, given.for_batch(self.s.batch))
        value[token] = new[example, column].view(len(token), *value.shape[1:])

    def _rewrite(self, kind: str, pattern: Tensor, rows: Ints, start: int) -> Tensor:
        """Writes at scores or pattern of rows with the same columns, ``row head query key``."""
        stop, width = start + pattern.shape[2], pattern.shape[3]
        for site, _, groups in self.work.get((self.layer, kind), ()):
            chosen = rows[np.isin(self.group[rows], groups)]
            place = {row: i for i, row in enumerate(rows.tolist())}
            if self.s.sweep.patches:
                assert self.s.source is not None
                source = self.s.source.values[Read(site.whole)]
                for row, column, heads in self._written(site, chosen):
                    inside = (column >= start) & (column < stop)
                    row, column = row[inside], column[inside]
                    i = self.s.tensor([place[r] for r in row.tolist()])
                    new = source[self.s.tensor(self.rows.example[row]), :, self.s.tensor(column), :width]
                    at = self.s.tensor(column - start)
                    if heads is None:
                        pattern[i, :, at] = new
                    else:
                        for head in heads:
                            pattern[i, head, at] = new[:, head]
                continue
            for cell in np.unique(self.rows.cell[chosen]).tolist():
                some = chosen[self.rows.cell[chosen] == cell]
                i = self.s.tensor([place[r] for r in some.tolist()])
                example = self.s.tensor(self.rows.example[some])
                canvas = self.s.value(site.whole).clone()
                canvas[example, :, start:stop, :width] = pattern[i]
                exact = self._site(site, int(some[0]))
                assert self.s.sweep.write is not None
                write = self.s.sweep.write(exact).for_batch(self.s.batch)
                new = overwrite(canvas, exact, self.s.batch.where(exact.positions, strict=False), write)
                pattern[i] = new[example, :, start:stop, :width]
        return pattern


class Flight(Writing):
    """The rows on their way through the layers."""

    def run(self) -> tuple[Rows, Tensor]:
        """The rows that reach the metric, and the final norm's output at its column of each."""
        n, arch = self.model.dims.n_layers, self.model.arch
        metric = self.s.sweep.metric
        columns, _ = self.s.columns("end" if metric is None else metric.positions)
        at = columns[self.rows.example, 0]
        tokens = self.s.residual(0).new_empty(0, self.model.dims.d_model)
        with _packed(self.model):
            for layer in range(int(self.rows.enters.min()), n):
                self.layer = layer
                tokens = self._through(tokens, at if self.layer == n - 1 else None)
        self.layer = n
        tokens = self._join(tokens, np.nonzero(self.rows.enters == n)[0])
        place = self._token(np.arange(len(self.rows)), at)
        reached = np.nonzero(place >= 0)[0]
        norm: Any = self.model.hf.get_submodule(f"{arch.base}.{arch.norm}")
        return self.rows.take(reached), norm(tokens[self.s.tensor(place[reached])][None])[0]

    def _through(self, tokens: Tensor, only: Ints | None) -> Tensor:
        """One decoder layer; in the last, only the metric's columns go on after attention."""
        layer: Any = self.model.hf.get_submodule(self.model.arch.layer(self.layer))
        new = self.rows.enters == self.layer
        tokens = self._join(tokens, np.nonzero(new & self.rows.spreads)[0])
        suffixes = len(tokens)
        local = np.nonzero(new & ~self.rows.spreads)[0]
        tokens = self._join(tokens, local)
        if not len(tokens):
            return tokens
        self.token_layers += len(tokens)
        tokens = self._act("resid_pre", self._act("embed", tokens) if self.layer == 0 else tokens)
        cos, sin = (each[:, self.s.tensor(self.column)] for each in self.rotary)
        with self._hooked():
            attn = layer.self_attn(
                hidden_states=self._act("attn_in", layer.input_layernorm(tokens[None])[0])[None],
                position_embeddings=(cos, sin),
                attention_mask=None,
                mechinterp=self,
            )[0][0]
            attn = self._act("attn_out", self._heads(layer.self_attn.o_proj, attn))
            if only is not None:
                keep = self._token(np.arange(len(self.rows)), only)
                keep = np.unique(keep[keep >= 0])
                self.slot = np.full(len(tokens), -1, np.int64)
                self.slot[keep] = np.arange(len(keep))
                tokens, attn = tokens[self.s.tensor(keep)], attn[self.s.tensor(keep)]
            tokens = self._act("resid_mid", tokens + attn)
            mlp_in = self._act("mlp_in", layer.post_attention_layernorm(tokens[None])[0])
            tokens = self._act("resid_post", tokens + self._act("mlp_out", layer.mlp(mlp_in[None])[0]))
        if only is not None or not len(local):
            return tokens
        ends, sizes = tokens[suffixes:], self.stop[local] - self.rows.start[local]
        tokens, self.column = tokens[:suffixes], self.column[:suffixes]
        self.stop[local] = self.rows.length[local]
        self.layer += 1
        tokens = self._join(tokens, local, enter=False)
        self.layer -= 1
        _, columns = ragged(self.rows.start[local], self.rows.start[local] + sizes)
        tokens[self.s.tensor(self._token(np.repeat(local, sizes), columns))] = ends
        return tokens

    def _join(self, tokens: Tensor, rows: Ints, enter: bool = True) -> Tensor:
        """Append the tokens of rows, from the base run's residual entering the layer."""
        if not len(rows):
            return tokens
        which, columns = ragged(self.rows.start[rows], self.stop[rows])
        base = self.s.residual(self.layer)
        some = base[self.s.tensor(self.rows.example[rows][which]), self.s.tensor(columns)]
        sizes = self.stop[rows] - self.rows.start[rows]
        self.offset[rows] = len(tokens) + np.cumsum(sizes) - sizes
        if self.slot is not None:  # after the last layer
            self.slot = np.concatenate([self.slot[: len(self.column)], np.arange(len(some)) + len(tokens)])
            self.offset[rows] += len(self.column) - len(tokens)
        self.column = np.concatenate([self.column, columns])
        tokens = torch.cat([tokens, some])
        if enter:  # a write at the end of the layer before is where such a row begins
            self.layer -= 1
            tokens = self._act("resid_post", tokens, rows)
            self.layer += 1
        return tokens

    @contextlib.contextmanager
    def _hooked(self) -> Generator[None]:
        """Writes at the outputs and inputs of modules inside attention and MLP."""
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
            if (self.layer, kind) in self.work:
                handles.append(module(kind).register_forward_hook(out(kind)))
        if (self.layer, "mlp_act") in self.work:
            handles.append(module("mlp_act").register_forward_pre_hook(into))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _heads(self, projection: Any, attn: Tensor) -> Tensor:
        """Writes at head_out: a change of the sum."""
        if (self.layer, "head_out") not in self.work:
            return attn
        assert self.z is not None
        old = torch.einsum("the,hed->thd", self.z, self.model.W_O(self.layer))
        return attn + (self._act("head_out", old) - old).sum(1)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """What queries make of their own row's keys and, before them, the base run's: ``1 token head d_head``."""
        query, key = (self._act(k, x[0].transpose(0, 1)) for k, x in (("q_rot", query), ("k_rot", key)))
        value = value[0].transpose(0, 1)
        z = torch.empty_like(query)
        flying = np.nonzero(self.offset >= 0)[0]
        spread = self.rows.spreads[flying] | (self.rows.enters[flying] < self.layer)
        shapes = np.stack([self.rows.start[flying], self.stop[flying], spread], 1)
        for shape in np.unique(shapes, axis=0):
            start, stop, whole = (int(n) for n in shape)
            rows = flying[(shapes == shape).all(1)]
            size = max(1, self.budget // 16 // (stop * 2 * query[0].numel() * query.element_size()))
            for begin in range(0, len(rows), size):
                self._group(z, query, key, value, rows[begin : begin + size], start, stop, bool(whole), scaling)
        self.z = self._act("z", z)
        return self.z[None]

    def _group(
        self,
        z: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rows: Ints,
        start: int,
        stop: int,
        whole: bool,
        scaling: float,
    ) -> None:
        """Attention of rows with the same columns. Rows that have not spread yet see the base run's keys alone."""
        at = self.s.tensor(self.offset[rows][:, None] + np.arange(stop - start))
        example = self.s.tensor(self.rows.example[rows])
        seen = start if whole else stop
        keys, values = (self.s.value(Site(kind, self.layer))[example, :seen] for kind in ("k_rot", "v"))
        if whole:
            keys, values = torch.cat([keys, key[at]], 1), torch.cat([values, value[at]], 1)
        columns = torch.arange(stop, device=at.device)
        distance = columns[start:, None] - columns
        visible = distance >= 0
        if (window := self.model.dims.windows[self.layer]) is not None:
            visible &= distance < window
        some, keys, values = (x.transpose(1, 2) for x in (query[at], keys, values))
        out = torch.nn.functional.scaled_dot_product_attention(
            some, keys, values, attn_mask=visible, scale=scaling, enable_gqa=True
        )
        z[at] = out.transpose(1, 2)
        patterned = rows[self._patterned(rows)]
        if len(patterned):
            which = np.nonzero(np.isin(rows, patterned))[0]
            pick = self.s.tensor(which)
            z[at[pick]] = self._explicit(patterned, some[pick], keys[pick], values[pick], visible, start, scaling)

    def _patterned(self, rows: Ints) -> Bools:
        groups = [g for kind in PATTERN_KINDS for _, _, g in self.work.get((self.layer, kind), ())]
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


def ragged(start: Ints, stop: Ints) -> tuple[Ints, Ints]:
    """(row number, column) of every column from `start` to `stop` of each row, row after row."""
    sizes = stop - start
    rows = np.repeat(np.arange(len(sizes)), sizes)
    return rows, np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes) + np.repeat(start, sizes)


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
