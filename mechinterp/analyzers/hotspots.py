"""Hotspots: the pairs of tokens between which each head's attention is strongest."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from mechinterp import sites
from mechinterp.core.analyzer import Analyzer, Batch, Context, Model, Needs
from mechinterp.core.display import visible
from mechinterp.core.result import Part, Result, View
from mechinterp.core.tokens import TokenBatch
from mechinterp.core.trace import Read, Reduce

NAMED = 40
"""Heads whose strongest pair is listed."""


@dataclass(frozen=True)
class Hotspots(Analyzer):
    """The strongest pairs of tokens of every head: who attends, to whom, in which example.

    Left out are keys that stand first in the text (a sink of nearly all heads) and a query's own position. Each block
    of queries keeps its strongest pairs inside the pass, so no pattern is held.

    Result (``layer head rank``, strongest first): ``attention``, ``query`` and ``key`` (tokens), ``query_position``,
    ``key_position``, ``of_example``; NaN, "" and -1 where the texts have fewer pairs. The heads with the strongest
    pairs by name: ``strongest`` (``pair``), one pair a head.

    Attributes:
        pairs: how many for each head, over all examples.
    """

    pairs: int = 10

    def needs(self, model: Model) -> Needs:
        # Candidates of a block stand where its queries would, so that blocks are joined and not added up.
        return Needs(reads=Read(sites.pattern(), reduce=Reduce(Strongest(self.pairs), "example head query candidate")))

    def observe(self, batch: Batch) -> Part:
        found = batch.clean.stack("pattern")  # layer example head candidate (attention, query, key)
        best = found[..., 0].topk(min(self.pairs, found.shape[3]), dim=-1)
        chosen = found.gather(3, best.indices[..., None].expand(*best.indices.shape, 3))
        none = chosen[..., 0] <= 0
        place = (chosen[..., 1:] - batch.examples.starts[None, :, None, None, None]).masked_fill(none[..., None], -1)
        axes = "layer example head rank"
        attention = chosen[..., 0].masked_fill(none, float("nan"))
        values = {"attention": (attention, axes), "query": (place[..., 0], axes), "key": (place[..., 1], axes)}
        return Part(values, coords={"rank": range(attention.shape[-1])})

    def combine(self, parts: Iterator[Part], context: Context) -> Result:
        data = Result.of(parts).data.transpose("layer", "head", "example", "rank")
        n = data.sizes["example"]
        layers, heads = data.sizes["layer"], data.sizes["head"]
        flat = data["attention"].values.reshape(layers, heads, -1)
        order = np.argsort(-np.nan_to_num(flat, nan=-1), axis=-1, kind="stable")[..., : self.pairs]
        attention = np.take_along_axis(flat, order, -1)
        example = np.where(np.isfinite(attention), order // data.sizes["rank"], -1)
        assert (example < n).all()
        places = [
            np.nan_to_num(np.take_along_axis(data[name].values.reshape(flat.shape), order, -1), nan=-1).astype(int)
            for name in ("query", "key")
        ]
        tokens = [context.model.to_str_tokens(ids) for ids in context.tokens.ids]
        words = [
            np.array([tokens[e][p] if e >= 0 else "" for e, p in zip(example.flat, at.flat, strict=True)], dtype=object)
            for at in places
        ]
        query, key = (w.reshape(example.shape) for w in words)
        top = attention[..., 0].ravel()
        named = [int(i) for i in np.argsort(-np.nan_to_num(top, nan=-1), kind="stable")[:NAMED] if np.isfinite(top[i])]
        pairs = [
            f"a{i // heads}.h{i % heads}: {visible(str(q), 12)} → {visible(str(k), 12)}"
            for i in named
            for q, k in [(query[i // heads, i % heads, 0], key[i // heads, i % heads, 0])]
        ]
        cells = ("layer", "head", "rank")
        out = xr.Dataset(
            {
                "attention": (cells, attention.astype(np.float32)),
                "query": (cells, query),
                "key": (cells, key),
                "query_position": (cells, places[0]),
                "key_position": (cells, places[1]),
                "of_example": (cells, example),
                "strongest": (("pair",), top[named].astype(np.float32)),
            },
            {
                **{name: data[name].values for name in ("layer", "head")},
                "rank": np.arange(order.shape[-1]),
                "pair": pairs,
            },
            {"unit": "share of attention"},
        )
        view = View(
            "bars",
            "strongest",
            "pair",
            title="Hotspots: the strongest pair of each head, query → key",
            unit="share of the query's attention",
        )
        return Result(out, {}, (view,))


@dataclass(frozen=True)
class Strongest:
    """The strongest pairs of a block of queries: attention, and columns of query and key."""

    pairs: int

    def __call__(
        self, block: Float[Tensor, "example head query key"], queries: slice, batch: TokenBatch
    ) -> Float[Tensor, "example head candidate 3"]:
        column = torch.arange(block.shape[-1], device=block.device)
        query = column[queries, None]
        allowed = (column < query) & (column > batch.starts[:, None, None]) & batch.mask[:, queries, None]
        flat = (block.float() * allowed[:, None]).flatten(2)
        best = flat.topk(min(self.pairs, flat.shape[-1]), dim=-1)
        at = best.indices
        found = torch.stack([best.values, queries.start + at // len(column), at % len(column)], -1)
        gap = self.pairs - found.shape[2]  # in a block of very few pairs
        return torch.nn.functional.pad(found, (0, 0, 0, gap))
