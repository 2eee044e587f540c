"""Graph: the nodes of a model that circuits are made of, and the edges between them.

A node writes into the residual stream: ``embed``, every head ``a5.h3``, every MLP ``m5``. A receiver reads
the sum of all that was written before it: the queries of a head ``a5.h3<q>``, the keys and values of a
key/value head ``a5.kv1<k>``, ``a5.kv1<v>`` (ungrouped: of each query head, ``a5.h3<k>``), an MLP ``m5``, and
``logits``. An edge leads from a node to a receiver; biases belong to no edge.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.errors import NeedsError
from mechinterp.sites import Site

if TYPE_CHECKING:
    from mechinterp.model.model import Model
else:
    Model = Any

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Graph:
    """All nodes and edges of a model, in the order of the pass.

    Senders stand in such an order that those before a receiver are the first so many of all. So edges are
    numbered receiver by receiver, and scores or masks of all edges are one vector, ``edge``; the edges into
    one kind of receiver of a layer, `into`, lie side by side as ``receiver sender``.

    Attributes:
        ungrouped: keys and values have a receiver for each query head, as in TransformerLens, instead of
            one for each key/value head.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    ungrouped: bool = False

    @classmethod
    def of(cls, model: Model, ungrouped: bool = False) -> "Graph":
        d = model.dims
        return cls(d.n_layers, d.n_heads, d.n_kv_heads, ungrouped)

    def __len__(self) -> int:
        """How many edges there are."""
        return int(self.reach.sum())

    @functools.cached_property
    def senders(self) -> tuple[str, ...]:
        """Every node that writes."""
        layers = [[*(f"a{i}.h{h}" for h in range(self.n_heads)), f"m{i}"] for i in range(self.n_layers)]
        return ("embed", *(name for layer in layers for name in layer))

    @functools.cached_property
    def receivers(self) -> tuple[str, ...]:
        """Everything that reads, layer by layer: queries, keys, values, the MLP; at last the logits."""
        out: list[str] = []
        for i in range(self.n_layers):
            out += [f"a{i}.h{h}<q>" for h in range(self.n_heads)]
            head = "h" if self.ungrouped else "kv"
            out += [f"a{i}.{head}{h}<{kind}>" for kind in "kv" for h in range(self.keys)]
            out.append(f"m{i}")
        return (*out, "logits")

    @property
    def keys(self) -> int:
        """Receivers for the keys (and as many for the values) of a layer."""
        return self.n_heads if self.ungrouped else self.n_kv_heads

    @functools.cached_property
    def reach(self) -> Ints:
        """For each receiver, how many senders come before it."""
        out: list[int] = []
        for i in range(self.n_layers):
            before = 1 + i * (self.n_heads + 1)
            out += [before] * (self.n_heads + 2 * self.keys) + [before + self.n_heads]
        return np.array([*out, len(self.senders)], np.int64)

    @functools.cached_property
    def starts(self) -> Ints:
        """Number of the first edge into each receiver."""
        return np.cumsum(self.reach) - self.reach

    @functools.cached_property
    def ends(self) -> tuple[Ints, Ints]:
        """(sender, receiver) of each edge, by number."""
        receiver = np.repeat(np.arange(len(self.receivers)), self.reach)
        return np.arange(len(self)) - self.starts[receiver], receiver

    def into(self, kind: str, layer: int = 0) -> tuple[slice, tuple[int, int]]:
        """The edges into ``"q"``, ``"k"``, ``"v"`` or ``"mlp"`` of a layer, or into the ``"logits"``.

        Returns:
            their place among all edges, and their shape there, ``(receiver, sender)``.
        """
        count = {"q": self.n_heads, "k": self.keys, "v": self.keys}.get(kind, 1)
        width = self.n_heads + 2 * self.keys + 1
        first = {"q": 0, "k": self.n_heads, "v": self.n_heads + self.keys, "mlp": width - 1}.get(kind, 0)
        receiver = len(self.receivers) - 1 if kind == "logits" else layer * width + first
        start, reach = int(self.starts[receiver]), int(self.reach[receiver])
        return slice(start, start + count * reach), (count, reach)

    def edge(self, sender: str, receiver: str) -> int:
        """The number of an edge.

        Raises:
            NeedsError: no such node or receiver, or the sender does not come before the receiver.
        """
        numbers = self._numbers
        if sender not in numbers[0] or receiver not in numbers[1]:
            odd = sender if sender not in numbers[0] else receiver
            kv = "a0.h0<k>" if self.ungrouped else "a0.kv0<k>"
            raise NeedsError(f"{odd!r} is no node of this model; nodes are named as embed, a0.h1, m0; a0.h1<q>, {kv}")
        if numbers[0][sender] >= self.reach[numbers[1][receiver]]:
            raise NeedsError(f"there is no edge {sender} -> {receiver}: {sender} does not come before {receiver}")
        return int(self.starts[numbers[1][receiver]]) + numbers[0][sender]

    @functools.cached_property
    def _numbers(self) -> tuple[dict[str, int], dict[str, int]]:
        return tuple({name: i for i, name in enumerate(names)} for names in (self.senders, self.receivers))  # pyright: ignore[reportReturnType] -- a tuple of two

    @torch.no_grad()
    def sent(self, model: Model, change: Callable[[Site], Tensor]) -> Float[Tensor, "sender example pos d_model"]:
        """What every node writes more in one run than in another, in fp32.

        Args:
            change: how much more there is at the sites of senders: ``embed``, ``z`` and ``mlp_out`` of every layer.
        """
        first = change(Site("embed")).float()
        out = first.new_empty(len(self.senders), *first.shape)
        out[0] = first
        for i in range(self.n_layers):
            at = 1 + i * (self.n_heads + 1)
            z = change(Site("z", i)).float().flatten(0, 1).transpose(0, 1)
            torch.bmm(z, model.W_O(i).float(), out=out[at : at + self.n_heads].view(self.n_heads, -1, out.shape[-1]))
            out[at + self.n_heads] = change(Site("mlp_out", i))
        return out

    def nodes_of(self, receiver: str) -> tuple[str, ...]:
        """The nodes that a receiver feeds: a head, every head of a key/value head's group, an MLP, or the logits."""
        if "<" not in receiver:
            return (receiver,)
        stem = receiver.split("<")[0]
        layer, head = stem.split(".")
        if head.startswith("h"):
            return (stem,)
        group = self.n_heads // self.n_kv_heads
        first = int(head.removeprefix("kv")) * group
        return tuple(f"{layer}.h{h}" for h in range(first, first + group))
