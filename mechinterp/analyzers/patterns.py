"""Attention to look at: whole patterns of chosen heads, and what each head's attention is like at any length."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp import sites
from mechinterp.analyzers.categories import pattern_entropy
from mechinterp.core.analyzer import Analyzer, Batch, Context, Model, Needs
from mechinterp.core.result import Part, Result, View
from mechinterp.core.tokens import TokenBatch
from mechinterp.core.trace import Read, Reduce
from mechinterp.errors import ExamplesError, NeedsError
from mechinterp.sites import Position

MOST_TEXTS = 16
"""Texts whose whole patterns are kept."""
MOST_NUMBERS = 64_000_000
"""Numbers of all patterns of a batch: 256 MB."""
SHOWN = 3
"""Heads with a figure of their own."""
REACH = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
"""The farthest distance of each bin of a profile; the last bin has no end."""
MEASURES = ("entropy", "first", "distance")


@dataclass(frozen=True)
class AttentionPatterns(Analyzer):
    """Attention patterns of chosen layers and heads, whole and with their tokens, to be looked at.

    `mechinterp.report.attention` draws them: a grid of heads, one head token by token, an overview of
    the model, the lines of one query, and the neurons of one pair. For numbers over many or long
    texts take `AttentionProfile`, which keeps no pattern.

    Result: ``focus`` (``layer example head``), the largest share that a query gives to one earlier token
    other than the first (which is often a sink), mean over queries past the first; ``pattern`` (``layer
    example head query key``), probabilities, 0 for keys after the query, NaN at padding; ``query_token``,
    ``key_token`` (``example query``, ``example key``). With
    `pair` also ``query_value``, ``key_value`` and ``product`` (``layer example head dim``): the query's
    and the key's numbers after rotary, each query head with the keys of its group, and their products,
    whose sum over ``dim`` is the score before it is scaled; ``score`` (``layer example head``), scaled,
    NaN where the key is outside a layer's sliding window.

    Attributes:
        layers, heads: None for all; the same heads in every layer.
        pair: positions of a query and a key, numbers or names that the examples define.
    """

    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    pair: tuple[Position, Position] | None = None

    def needs(self, model: Model) -> Needs:
        heads = _chosen(self.heads, model.dims.n_heads, "heads")
        layers = _chosen(self.layers, model.dims.n_layers, "layers")
        reads: list[Any] = [Read(sites.pattern(layers), reduce=Reduce(Kept(heads, len(layers)), _WHOLE))]
        if self.pair is not None:
            reads += self._vectors(layers, self.pair)
        return Needs(reads=reads)

    def observe(self, batch: Batch) -> Part:
        heads = _chosen(self.heads, batch.model.dims.n_heads, "heads")
        layers = _chosen(self.layers, batch.model.dims.n_layers, "layers")
        pattern = batch.clean.stack("pattern")  # layer example head query key
        values: dict[str, Any] = {
            "focus": (torch.stack([focus(one, batch.examples) for one in pattern]), "layer example head"),
            "pattern": (pattern, "layer example head query key"),
        }
        if self.pair is not None:
            found = (batch.clean[some] for some in self._vectors(layers, self.pair))
            query, key, scores = (one[:, :, list(heads)].float() for one in found)
            at = [batch.examples.where(one) for one in self.pair]
            assert at[0] is not None and at[1] is not None
            if bool((at[1].columns > at[0].columns).any()):
                raise NeedsError(
                    f"the pair of AttentionPatterns must be a query and a key that it sees. Got {self.pair};"
                    " a key stands at or before its query"
                )
            here = at[1].columns.view(1, -1, 1, 1).expand(*scores.shape[:3], 1).to(scores.device)
            score = scores.take_along_dim(here, 3)[..., 0]
            score = torch.where(score.isneginf(), float("nan"), score)
            four = "layer example head dim"
            values |= {"product": (query * key, four), "query_value": (query, four), "key_value": (key, four)}
            values["score"] = (score, "layer example head")
        coords: dict[str, Any] = {"layer": list(layers), "head": list(heads)}
        return Part(values, coords=coords)

    @staticmethod
    def _vectors(layers: tuple[int, ...], pair: tuple[Position, Position]) -> list[Any]:
        """The query's, the key's and the score's sites."""
        query, key = pair
        return [
            sites.q_rot(layers, positions=query),
            sites.k_rot(layers, positions=key, per_query_head=True),
            sites.scores(layers, positions=query),
        ]

    def combine(self, parts: Iterator[Part], context: Context) -> Result:
        result = Result.of(parts, unit="share of attention")
        width = result.data.sizes["query"]
        tokens = [[*context.model.to_str_tokens(ids), *[""] * (width - len(ids))] for ids in context.tokens.ids]
        names = np.array(tokens, dtype=str)
        data = result.data.assign(query_token=(("example", "query"), names), key_token=(("example", "key"), names))
        strongest = data["focus"].isel(example=0)
        which = ", in the first text" if data.sizes["example"] > 1 else ""
        order = np.argsort(-strongest.values.ravel(), kind="stable")[:SHOWN]
        views = tuple(
            View(
                "heatmap",
                "pattern",
                "key",
                "query",
                title=f"Attention of layer {layer}, head {head}{which}",
                unit="share of attention",
                select={"layer": layer, "head": head, "example": 0},
                x_text="key_token",
                y_text="query_token",
            )
            for layer, head in (
                (int(strongest["layer"][i]), int(strongest["head"][j]))
                for i, j in (np.unravel_index(int(flat), strongest.shape) for flat in order)
            )
        )
        return Result(data, {} if self.pair is None else {"pair": self.pair}, views)


_WHOLE = "example head query key"


@dataclass(frozen=True)
class Kept:
    """Chosen heads of a block; refuses, in the first block of a pass, what would not fit.

    Raises:
        ExamplesError: too many texts, or patterns that are too large.
    """

    heads: tuple[int, ...]
    layers: int

    def __call__(self, block: Float[Tensor, "example head query key"], queries: slice, batch: TokenBatch) -> Tensor:
        if batch.rows and max(batch.rows) >= MOST_TEXTS:
            raise ExamplesError(
                f"AttentionPatterns keeps whole patterns of at most {MOST_TEXTS} texts, and there are more; choose"
                " some, or take AttentionProfile for all"
            )
        n = len(batch) * self.layers * len(self.heads) * block.shape[-1] ** 2
        if n > MOST_NUMBERS:
            raise ExamplesError(
                f"patterns of {self.layers} layers with {len(self.heads)} heads over {block.shape[-1]} tokens are"
                f" {n / 1e6:,.0f} million numbers, more than {MOST_NUMBERS / 1e6:,.0f} million; name fewer layers and"
                " heads, give a shorter text, or take AttentionProfile, which keeps no pattern"
            )
        return block[:, list(self.heads)].float()


def fits(model: Model, lengths: Sequence[int]) -> bool:
    """Whether `AttentionPatterns` can keep the patterns of all layers and heads for texts of so many tokens."""
    numbers = len(lengths) * model.dims.n_layers * model.dims.n_heads * max(lengths) ** 2
    return len(lengths) <= MOST_TEXTS and numbers <= MOST_NUMBERS


def focus(pattern: Float[Tensor, "example head query key"], batch: TokenBatch) -> Float[Tensor, "example head"]:
    """Largest share on one earlier token but the first, mean over queries past the first; NaN for one token."""
    start = batch.starts.to(pattern.device)[:, None, None]
    column = torch.arange(pattern.shape[-1], device=pattern.device)
    counted = batch.mask.to(pattern.device)[:, :, None] & (column[:, None] > start)
    earlier = counted & (column > start) & (column < column[:, None])
    return (pattern * earlier[:, None]).amax(-1).sum(-1) / counted.sum((1, 2))[:, None]


@dataclass(frozen=True)
class AttentionProfile(Analyzer):
    """What each head's attention is like, reduced as it is computed: any number of texts, of any length.

    Means over the queries past the first token (which can only attend to itself).

    Result (``layer example head``): ``entropy`` of a query's attention, in bits; ``first``, its share on
    the text's first token, which is often a sink; ``distance``, the mean number of tokens back. And
    ``profile`` (``layer example head bin``): the distribution of attention over the first token and,
    among all others, over distances 0 (the query's own token), 1, 2, 3-4, 5-8, and so on; it sums to 1.
    All NaN for a text of one token.

    Attributes:
        layers: None for all.
    """

    layers: tuple[int, ...] | None = None

    def needs(self, model: Model) -> Needs:
        layers = _chosen(self.layers, model.dims.n_layers, "layers")
        return Needs(reads=Read(sites.pattern(layers), reduce=Reduce(profile_sums, "example head measure")))

    def observe(self, batch: Batch) -> Part:
        sums = batch.clean.stack("pattern")  # layer example head measure
        queries = (batch.examples.lengths - 1).to(sums)[None, :, None, None]
        means = torch.where(queries > 0, sums / queries, float("nan"))
        n = len(MEASURES)
        named = {name: (means[..., i], "layer example head") for i, name in enumerate(MEASURES)}
        return Part({**named, "profile": (means[..., n:], "layer example head bin")}, coords={"bin": BINS})

    def combine(self, parts: Iterator[Part], context: Context) -> Result:
        shown = {
            "entropy": ("Entropy of attention", "bits"),
            "first": ("Attention on the first token", "share of attention"),
            "distance": ("Mean distance of attention", "tokens"),
        }
        views = tuple(
            View("heatmap", name, "head", "layer", title=title, unit=unit) for name, (title, unit) in shown.items()
        )
        return Result.of(parts, views=views)


BINS = (
    "first",
    *(str(b) if b - a == 1 else f"{a + 1}-{b}" for a, b in zip((-1, *REACH), REACH, strict=False)),
    ">2048",
)


def profile_sums(block: Float[Tensor, "example head query key"], queries: slice, batch: TokenBatch) -> Tensor:
    """``example head measure``: `MEASURES` and the mass in each of `BINS`, summed over queries past the first token."""
    pattern = block.float()
    start = batch.starts.to(block.device)[:, None]
    column = torch.arange(queries.start, queries.stop, device=block.device)
    counted = (batch.mask[:, queries].to(block.device) & (column > start)).to(pattern)  # example query
    keys = torch.arange(block.shape[-1], device=block.device, dtype=pattern.dtype)
    entropy = pattern_entropy(pattern) / np.log(2)
    distance = pattern.sum(-1) * column - pattern @ keys
    first = pattern.take_along_dim(start[:, :, None, None].expand(*pattern.shape[:3], 1), 3)[..., 0]
    below = torch.nn.functional.pad(pattern.cumsum(-1), (1, 0))  # mass on keys before each one

    def until(distance: int) -> Tensor:
        """Mass on keys after the first token and at most so far back: example head query."""
        key = torch.maximum(column - distance, start + 1)[:, None, :, None]
        whole = below[..., -1:] - below.take_along_dim(key.expand(*pattern.shape[:3], 1), 3)
        return whole[..., 0]

    reached = torch.stack([torch.zeros_like(first), *(until(d) for d in REACH), below[..., -1] - first])
    measures = torch.cat([torch.stack([entropy, first, distance, first]), reached.diff(dim=0)])
    return torch.einsum("mbhq,bq->bhm", measures, counted)


def _chosen(some: tuple[int, ...] | None, n: int, what: str) -> tuple[int, ...]:
    """Layers or heads in order.

    Raises:
        NeedsError: there are no such ones.
    """
    chosen = tuple(range(n)) if some is None else tuple(sorted(set(some)))
    if not chosen or not set(chosen) <= set(range(n)):
        raise NeedsError(f"The {what} of an attention analyzer must be some of 0 to {n - 1}. Got {some}")
    return chosen
