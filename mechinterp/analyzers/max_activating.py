"""The tokens that make a neuron most active, in their context: a corpus of any size, in memory of one size."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.analyzers.stats import check_kinds
from mechinterp.core.analyzer import Analyzer, Batch, Context, Model, Needs
from mechinterp.core.result import Part, Result, View
from mechinterp.errors import ExamplesError, NeedsError
from mechinterp.sites import KINDS, Site, Sites

MARKS = ("«", "»")
"""What stands around the token that a context is of."""
SHOWN, SHOWN_LAYERS = 20, 4
"""Neurons up to which their tokens are a figure, and layers of which they are."""
_ROW = 32
"""A place is the number of the example above so many bits, and that of its token below: in order, as one number."""


@dataclass(frozen=True)
class MaxActivating(Analyzer):
    """The tokens at which each neuron is largest (or smallest too), with what stands around them.

    The largest activations of a corpus show what a neuron answers to at its top, and nothing of what it does below,
    where most of its activity lies: read ``density`` beside them. One neuron may answer to several unrelated things.

    Result: over ``layer``, ``neuron``, ``side`` (``high``, and with `low` also ``low``) and ``rank``: ``value``, in
    activation units; ``example`` and ``position``, the numbers of the text and the token in it; ``token``; and
    ``context``, the text around it, with the token in « ». ``density`` (``layer neuron``) is the share of tokens at
    which the neuron is above 0, and ``tokens`` how many there were. Equal values stand in the order of the texts and
    tokens. With fewer tokens than `top` the rest is NaN, -1 or empty.

    Texts pass batch by batch, and the largest are kept in float32: 12 bytes for each of layers × neurons × sides ×
    `top`, twice that while a batch is merged, beside the activations of one batch; a number for the corpus does not
    come into it.

    Attributes:
        kind: of site, with one vector (or one a head, laid side by side) for each token.
        layers: None for all.
        neurons: numbers in the vector, in every layer; None for all.
        top: tokens of each neuron, on each side.
        low: whether the smallest are wanted too.
        each: ``"token"`` for all tokens, or ``"text"`` for one of each text, its largest (the first of several): then
            texts that repeat each other fill the list less.
        first: whether the first token of a text counts, which often is an attention sink unlike all others.
        context: tokens that are shown on each side.
    Raises:
        NeedsError: a kind without vectors, a neuron that does not exist, a number too small. SiteError: fused experts,
            which have no neurons to hook. ExamplesError: there is no token to look at.
    """

    kind: str = "mlp_act"
    layers: tuple[int, ...] | None = None
    neurons: tuple[int, ...] | None = None
    top: int = 20
    low: bool = False
    each: Literal["token", "text"] = "token"
    first: bool = False
    context: int = 8

    def __post_init__(self) -> None:
        if self.each not in ("token", "text"):
            raise NeedsError(f"The each of MaxActivating must be 'token' or 'text'. Got {self.each!r}")
        if self.top < 1 or self.context < 0 or () in (self.neurons, self.layers):
            raise NeedsError(
                f"MaxActivating takes a top above 0, a context of 0 or more, and some neurons and layers. Got {self}"
            )

    def needs(self, model: Model) -> Needs:
        check_kinds("The kind of MaxActivating must be one", (self.kind,))
        n = width(self.kind, model)
        if odd := [i for i in self.neurons or () if not 0 <= i < n]:
            raise NeedsError(f"{self.kind} of {model.name} has neurons 0 to {n - 1}, and no {odd[0]}")
        return Needs(reads=Sites(self.kind, self.layers))

    @property
    def sides(self) -> tuple[str, ...]:
        return ("high", "low") if self.low else ("high",)

    def observe(self, batch: Batch) -> Part:
        examples, n = batch.examples, batch.model.dims.n_layers
        columns = torch.arange(examples.mask.shape[1], device=examples.mask.device)
        chosen = examples.mask if self.first else examples.mask & (columns != examples.starts[:, None])
        number = torch.tensor(examples.rows, device=chosen.device)
        places = (number[:, None] << _ROW) | (columns - examples.starts[:, None])
        order = places[chosen].argsort()  # as the corpus has them
        place, (row, column) = places[chosen][order], chosen.nonzero()[order].T
        sizes = [size for size in chosen.sum(1)[number.argsort()].tolist() if size]
        layers = sorted(set(range(n) if self.layers is None else self.layers))
        found: list[list[tuple[Tensor, Tensor]]] = []
        above: list[Tensor] = []
        for layer in layers:
            x = batch.clean[Site(self.kind, layer)].flatten(2)[row, column].float()
            x = x if self.neurons is None else x[:, list(self.neurons)]
            above.append((x > 0).sum(0))
            found.append([self._largest(sign * x, place, sizes) for sign in (1, -1)[: len(self.sides)]])
        value, at = (torch.stack([torch.stack([side[i] for side in one], 1) for one in found]) for i in (0, 1))
        return Part(
            {
                "value": (value, "layer neuron side rank"),
                "place": (at, "layer neuron side rank"),
                "above": (torch.stack(above), "layer neuron"),
                "tokens": (chosen.sum(), ""),
            },
            coords={"layer": layers},
        )

    def _largest(
        self, x: Float[Tensor, "token neuron"], place: Int[Tensor, "token"], sizes: Sequence[int]
    ) -> tuple[Float[Tensor, "neuron top"], Int[Tensor, "neuron top"]]:
        """The `top` values of each neuron and their places; -inf and -1 where there are fewer.

        Args:
            sizes: of the texts, whose tokens follow one another.
        """
        if not len(x):
            return x.new_full((x.shape[1], self.top), -torch.inf), place.new_full((x.shape[1], self.top), -1)
        at = place[:, None].expand(-1, x.shape[1])
        if self.each == "text":
            best = [piece.max(0) for piece in x.split(list(sizes))]
            at = torch.stack([p[one.indices] for p, one in zip(place.split(list(sizes)), best, strict=True)])
            x = torch.stack([one.values for one in best])
        k = min(self.top, len(x))
        value, which = x.topk(k, dim=0)
        tied = (x >= value[-1]).sum(0) > k  # of values like the last one, topk takes any
        which[:, tied] = x[:, tied].argsort(dim=0, descending=True, stable=True)[:k]
        which = which.sort(0).values
        which = which.gather(0, x.gather(0, which).argsort(dim=0, descending=True, stable=True))
        gap = (0, self.top - k)
        return (
            torch.nn.functional.pad(x.gather(0, which).T, gap, value=-torch.inf),
            torch.nn.functional.pad(at.gather(0, which).T, gap, value=-1),
        )

    def merge(self, a: Part, b: Part) -> Part:
        """The largest of both; of equal ones, those that come first in the corpus."""
        value, place = (torch.cat([p.values[name][0] for p in (a, b)], -1) for name in ("value", "place"))
        order = place.argsort(-1)
        order = order.gather(-1, value.gather(-1, order).argsort(dim=-1, descending=True, stable=True))[..., : self.top]
        kept = {"value": value.gather(-1, order), "place": place.gather(-1, order)}
        kept |= {name: a.values[name][0] + b.values[name][0] for name in ("above", "tokens")}
        values = {name: (kept[name], axes) for name, (_, axes) in a.values.items()}
        return Part(values, coords=a.coords, rows=a.rows + b.rows)

    def combine(self, parts: Iterator[Part], context: Context) -> Result:
        part = next(parts)
        value, place, above, tokens = (part.values[name][0].numpy() for name in ("value", "place", "above", "tokens"))
        if not tokens:
            raise ExamplesError(
                "every text is one token long, and the first is left out; give longer texts, or first=True"
            )
        there = place >= 0
        value = np.where(there, value * np.array([1, -1], np.float32)[: len(self.sides), None], np.float32(np.nan))
        example, position = np.where(there, place >> _ROW, -1), np.where(there, place & ((1 << _ROW) - 1), -1)
        unique, inverse = np.unique(place, return_inverse=True)
        read = reader(context)
        words = np.empty((2, len(unique)), object)
        for i, one in enumerate(unique.tolist()):
            text, at = divmod(one, 1 << _ROW)
            words[:, i] = ("", "") if one < 0 else (read(text)[at], marked(read(text), at, at + 1, self.context))
        dims = ("layer", "neuron", "side", "rank")
        data = xr.Dataset(
            {
                "value": (dims, value),
                "example": (dims, example),
                "position": (dims, position),
                "token": (dims, words[0][inverse].reshape(place.shape)),
                "context": (dims, words[1][inverse].reshape(place.shape)),
                "density": (("layer", "neuron"), above / tokens),
                "tokens": ((), int(tokens)),
            },
            {
                "layer": list(part.coords["layer"]),
                "neuron": list(range(above.shape[1]) if self.neurons is None else self.neurons),
                "side": list(self.sides),
                "rank": np.arange(1, value.shape[-1] + 1),
            },
            {"unit": "activation"},
        )
        return Result(data, {}, self._views(part.coords["layer"]))

    def _views(self, layers: Sequence[int]) -> tuple[View, ...]:
        if self.neurons is None or len(self.neurons) > SHOWN:
            title = f"Share of tokens at which {self.kind} is above 0, mean over neurons"
            return (View("lines", "density", "layer", title=title, unit="share of tokens"),)
        views: list[View] = []
        for layer, side in itertools.product(layers[:SHOWN_LAYERS], self.sides):
            some = {"layer": layer, "side": side}
            title = f"{'Largest' if side == 'high' else 'Smallest'} activations of {self.kind}.{layer}"
            views += [
                View(
                    "heatmap", "value", "rank", "neuron", text="token", select=some, title=title, unit="activation",
                    center=0.0,
                ),
                View("lines", "value", "rank", by="neuron", select=some, title=f"{title}, by rank", unit="activation"),
            ]  # fmt: skip
        return tuple(views)


def width(kind: str, model: Model) -> int:
    """Numbers in the vector of a token at sites of a kind, heads side by side."""
    dims = model.dims
    sizes = {
        "d_model": dims.d_model, "d_mlp": dims.d_mlp, "d_head": dims.d_head, "head": dims.n_heads,
        "kv_head": dims.n_kv_heads, "expert": dims.n_experts,
    }  # fmt: skip
    return int(np.prod([sizes[axis] for axis in KINDS[kind].axes[2:]]))


def reader(context: Context) -> Callable[[int], list[str]]:
    """What gives the tokens of a text, by its number, as strings; each text is decoded once."""

    @cache
    def read(text: int) -> list[str]:
        return context.model.to_str_tokens(context.tokens.ids[text])

    return read


def marked(tokens: Sequence[str], start: int, stop: int, around: int) -> str:
    """The tokens from start to stop in « », and so many on each side; of many in between, only the ends."""
    before, inside, after = tokens[max(0, start - around) : start], tokens[start:stop], tokens[stop : stop + around]
    if len(inside) > 2 * around + 1:
        inside = [*inside[:around], " … ", *inside[len(inside) - around :]]
    return "".join([*before, MARKS[0], *inside, MARKS[1], *after])
