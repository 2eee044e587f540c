"""Planted circuits: small Llamas whose weights are set by hand, so that the true edges are known.

They are ground truth for methods that find circuits (as the compiled transformers of Lindner et al. 2023,
Tracr, are): every model comes with clean and corrupted prompts and with the edges that carry the difference.

The residual stream is divided into named parts. A large constant direction makes the RMS norms nearly constant,
and a part that nobody reads fills every embedding up to the same length. Rotary pairs that turn quickly decide
where a head looks, pairs that hardly turn what it looks for. Every other head and MLP unit has random weights,
reads everything, differs between the runs, and writes to ``junk``, which nothing on a true path reads.
"""

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mechinterp.core.examples import Examples
from mechinterp.core.tokens import Span

if TYPE_CHECKING:
    from mechinterp.model.model import Model
else:
    Model = Any

BOS = 0
GAIN = 6.0
"""What a head that says a token adds to its logit."""
MATCH, SINK = 7.0, 3.0
"""Attention scores, in nats, of a key that matches the query and of the BOS; of every other key 0."""

_WIDTH, _HEADS, _HEAD_DIM, _UNITS = 128, 4, 32, 32
_CONSTANT, _FEATURES = 10.0, 3
_THETA = 1e12
_TURNING = ((0, 12.0), (1, 10.0))  # rotary pair, nats: they turn by 1 and by 0.178 at each position
_STILL = torch.tensor([*range(4, 16), *range(20, 32)])  # of pairs that turn by at most 0.001 at each position


@dataclass(frozen=True)
class Planted:
    """A model with a known circuit, and prompts that show it.

    Attributes:
        pairs: clean and corrupted token ids, with one right and one wrong answer each.
        edges: (sender, receiver), named as in `mechinterp.core.graph`, with true key/value heads. True is an
            edge whose sender differs between the runs and whose difference changes the logit difference.
    """

    name: str
    model: Model
    pairs: Examples
    edges: frozenset[tuple[str, str]]


def induction(n: int = 24, seed: int = 0) -> Planted:
    """Two heads in two layers continue ``A B … A`` with ``B`` (Elhage et al. 2021; Olsson et al. 2022).

    Head a0.h1 attends to the previous position by rotary frequencies alone: its queries and keys are constants.
    It writes which token stands there into ``previous``. Head a1.h2 looks from the token at the end for the
    position whose ``previous`` equals it (K-composition), the one after its earlier occurrence, and says the token
    that stands there; without a match it rests on the BOS. Head a0.h0 is a twin of a0.h1 that writes to ``junk``.

    The corrupted prompt has other tokens, which occur nowhere else, at ``earlier`` (A), at ``answer`` (B; the new
    token is the wrong answer) and at the end, so nothing matches. True edges, of which each alone spoils the answer:

    - embed → a0.kv1<v>, a0.h1 → a1.kv2<k>: what the token before ``answer`` is;
    - embed → a1.h2<q>: which token to look for;
    - embed → a1.kv2<v>: which token stands at ``answer``; a1.h2 → logits: its logit.

    Not true: embed → a0.h1<q>, a0.kv1<k> and all that only meets constants, since these do not differ.
    """
    size = 23
    draft = _Draft(1 + size, {"bos": 1, "token": size, "previous": size, "said": size}, kv_heads=4, seed=seed)
    draft.embed(BOS, bos=0)
    for t in range(size):
        draft.embed(1 + t, token=t)
        draft.unembed(1 + t, said=t)
    draft.look_back(0, 1, 1)
    draft.move(0, 1, "token", "previous")
    draft.look_back(0, 0, 1)
    draft.move(0, 0, "token", "junk")
    draft.look_for(1, 2, query="token", key="previous")
    draft.move(1, 2, "token", "said")

    rng = random.Random(seed)
    rows: list[tuple[list[int], list[int], tuple[int, int]]] = []
    spans: dict[str, list[Span]] = {"earlier": [], "answer": []}
    for _ in range(n):
        end = rng.randint(8, 14)
        first = rng.randint(1, end - 2)
        fresh = rng.sample(range(1, 1 + size), end + 2)
        clean = [BOS, *fresh[: end - 1]]
        clean.append(clean[first])
        other = _changed(clean, dict(zip((first, first + 1, end), fresh[end - 1 :], strict=True)))
        rows.append((clean, other, (clean[first + 1], other[first + 1])))
        spans["earlier"].append((first, first + 1))
        spans["answer"].append((first + 1, first + 2))
    edges = {
        ("embed", "a0.kv1<v>"),
        ("a0.h1", "a1.kv2<k>"),
        ("embed", "a1.h2<q>"),
        ("embed", "a1.kv2<v>"),
        ("a1.h2", "logits"),
    }
    return Planted("induction", draft.model("induction"), _pairs(rows, spans), frozenset(edges))


def copy(n: int = 24, seed: int = 0) -> Planted:
    """One head attends to the marked token and says it; an MLP tells it where the mark is.

    Every token exists plain and marked. The first unit of m0 writes to ``marked`` wherever a mark is, and head
    a1.h1 attends there (its query is constant) and says the token: the copying head of Elhage et al. 2021, with an
    MLP for its keys.

    In the corrupted prompt the token ``marked`` is another one (the wrong answer), without the mark, which has
    moved to the token at ``moved``. True edges, of which each alone spoils the answer:

    - embed → m0, m0 → a1.kv1<k>: where the mark is;
    - embed → a1.kv1<v>: which token stands there; a1.h1 → logits: its logit.

    Not true: embed → a1.kv1<k>, since the key reads the mark from m0 alone, and all edges into a1.h1<q>.
    """
    size = 16
    parts = {"bos": 1, "token": size, "plain": 1, "mark": 1, "marked": 1, "said": size}
    draft = _Draft(1 + 2 * size, parts, kv_heads=4, seed=seed)
    draft.embed(BOS, bos=0)
    for t in range(size):
        draft.embed(1 + t, token=t, plain=0)
        draft.embed(1 + size + t, token=t, mark=0)
        draft.unembed(1 + t, said=t)
    draft.detect(0, "mark", "marked")
    draft.look_for(1, 1, query="constant", key="marked")
    draft.move(1, 1, "token", "said")

    rng = random.Random(seed)
    rows: list[tuple[list[int], list[int], tuple[int, int]]] = []
    spans: dict[str, list[Span]] = {"marked": [], "moved": []}
    for _ in range(n):
        end = rng.randint(8, 14)
        *fresh, wrong = rng.sample(range(1, 1 + size), end + 1)
        at, to = rng.sample(range(1, end), 2)
        plain = [BOS, *fresh]
        clean = _changed(plain, {at: plain[at] + size})
        rows.append((clean, _changed(plain, {at: wrong, to: plain[to] + size}), (plain[at], wrong)))
        spans["marked"].append((at, at + 1))
        spans["moved"].append((to, to + 1))
    edges = {("embed", "m0"), ("m0", "a1.kv1<k>"), ("embed", "a1.kv1<v>"), ("a1.h1", "logits")}
    return Planted("copy", draft.model("copy"), _pairs(rows, spans), frozenset(edges))


def grouped(n: int = 24, seed: int = 0) -> Planted:
    """Two query heads with the same key and value, and a query of their own each (Ainslie et al. 2023).

    Tokens before the end are cards with a row, a column and a colour; then come two questions, each for a colour.
    The answer (r, c) has the row of the card that the last question asks for, and the column of the card that the
    question before it asks for. Keys of a1.kv0 are the cards' colours, values their rows and columns. Head
    a1.h0 takes its query from the question where it is and says the row; head a1.h1 takes its from ``asked``, where
    a0.h2 (a previous-token head, by rotary frequencies alone) wrote the question before, and says the column. Head
    a0.h3 has the key and the value of a0.h2, attends to its own position, and writes to ``junk``.

    The corrupted prompt has, at ``row`` and ``column``, cards with other rows and columns (those of the wrong
    answer) and with colours that nobody asks for, and its questions ask for colours that no card has. True edges:

    - embed → a1.kv0<k>, embed → a1.kv0<v>: the cards, for both heads, so that each alone spoils the whole answer;
    - embed → a1.h0<q>, a1.h0 → logits: the row, half of the logit difference;
    - embed → a0.kv1<v>, a0.h2 → a1.h1<q>, a1.h1 → logits: the column, the other half.

    Not true: embed → a1.h1<q> and a0.h2 → a1.h0<q>, which are the sources of the other head of the group.
    """
    side, colours = 4, 10
    parts = {"bos": 1, "row": side, "column": side, "colour": colours, "ask": colours, "asked": colours}
    cards = 1 + side * side
    asks = cards + colours * side * side
    draft = _Draft(asks + colours, parts | {"said row": side, "said column": side}, kv_heads=2, seed=seed)
    draft.embed(BOS, bos=0)
    for cell in range(side * side):
        row, column = divmod(cell, side)
        draft.embed(1 + cell)
        draft.unembed(1 + cell, **{"said row": row, "said column": column})
        for colour in range(colours):
            draft.embed(cards + colour * side * side + cell, row=row, column=column, colour=colour)
    for colour in range(colours):
        draft.embed(asks + colour, ask=colour)
    draft.look_back(0, 2, 1)
    draft.move(0, 2, "ask", "asked")
    draft.look_back(0, 3, 0)
    draft.move(0, 3, "ask", "junk")
    for head, query, kind, first in ((0, "ask", "row", 0), (1, "asked", "column", side)):
        draft.look_for(1, head, query=query, key="colour")
        draft.move(1, head, kind, f"said {kind}", first)

    rng = random.Random(seed)
    rows: list[tuple[list[int], list[int], tuple[int, int]]] = []
    spans: dict[str, list[Span]] = {"row": [], "column": []}
    for _ in range(n):
        count = rng.randint(3, 6)
        order = rng.sample(range(colours), colours)
        cells = [rng.randrange(side * side) for _ in range(count)]
        held = [cards + colour * side * side + cell for colour, cell in zip(order, cells, strict=False)]
        at = rng.sample(range(count), 2)
        # Another row and another column, both: one to three steps on, around the border.
        turned = [_turned(cells[i], side, rng) for i in at]
        clean = [BOS, *held, asks + order[at[1]], asks + order[at[0]]]
        changes = {1 + i: cards + order[-1 - j] * side * side + turned[j] for j, i in enumerate(at)}
        changes |= {count + 1: asks + order[-3], count + 2: asks + order[-4]}
        answer, wrong = ((a // side) * side + b % side for a, b in ((cells[at[0]], cells[at[1]]), tuple(turned)))
        rows.append((clean, _changed(clean, changes), (1 + answer, 1 + wrong)))
        for name, i in zip(spans, at, strict=True):
            spans[name].append((1 + i, 2 + i))
    edges = {
        ("embed", "a0.kv1<v>"),
        ("a0.h2", "a1.h1<q>"),
        ("embed", "a1.h0<q>"),
        ("embed", "a1.kv0<k>"),
        ("embed", "a1.kv0<v>"),
        ("a1.h0", "logits"),
        ("a1.h1", "logits"),
    }
    return Planted("grouped", draft.model("grouped"), _pairs(rows, spans), frozenset(edges))


def _turned(cell: int, side: int, rng: random.Random) -> int:
    row, column = divmod(cell, side)
    return (row + rng.randrange(1, side)) % side * side + (column + rng.randrange(1, side)) % side


def _changed(ids: list[int], changes: Mapping[int, int]) -> list[int]:
    return [changes.get(i, token) for i, token in enumerate(ids)]


def _pairs(rows: list[tuple[list[int], list[int], tuple[int, int]]], positions: dict[str, list[Span]]) -> Examples:
    clean, corrupted, answers = zip(*rows, strict=True)
    return Examples.pairs(clean, corrupted, answers, positions=positions)


class _Draft:
    """A Llama of two layers, with four heads each, whose weights are zero until a method sets them.

    Features have length 1 in the residual stream, and a head or MLP that moves one writes it with length 1.

    Attributes:
        parts: the coordinates of each named part; ``constant``, ``fill`` and ``junk`` are added.
        unit: what undoes the norm: the root mean square of every embedding.
    """

    def __init__(self, vocab: int, parts: Mapping[str, int], *, kv_heads: int, seed: int) -> None:
        import transformers

        config = transformers.LlamaConfig(
            vocab_size=vocab,
            hidden_size=_WIDTH,
            intermediate_size=_UNITS,
            num_hidden_layers=2,
            num_attention_heads=_HEADS,
            num_key_value_heads=kv_heads,
            head_dim=_HEAD_DIM,
            max_position_embeddings=64,
            rope_parameters={"rope_type": "default", "rope_theta": _THETA},
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
        )
        with torch.random.fork_rng(devices=[]):
            self.hf: Any = transformers.LlamaForCausalLM(config).float().requires_grad_(False)
        for name, parameter in self.hf.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        self.group = _HEADS // kv_heads
        self.generator = torch.Generator().manual_seed(seed)
        self.unit = math.sqrt((_CONSTANT**2 + _FEATURES) / _WIDTH)
        sizes = {"constant": 1, "fill": 1, **parts}
        sizes["junk"] = _WIDTH - sum(sizes.values())
        coordinates = iter(torch.arange(_WIDTH).split(list(sizes.values())))
        self.parts = dict(zip(sizes, coordinates, strict=True))

    def embed(self, token: int, /, **features: int) -> None:
        """A token as the constant, one feature of each of some parts, and what makes every token equally long."""
        row = self.hf.model.embed_tokens.weight[token]
        row[self.parts["constant"]] = _CONSTANT
        for part, index in features.items():
            row[self.parts[part][index]] = 1.0
        row[self.parts["fill"]] = math.sqrt(_FEATURES - len(features))

    def unembed(self, token: int, /, **features: int) -> None:
        """The logit of a token is the sum of these features, times `GAIN`."""
        for part, index in features.items():
            self.hf.lm_head.weight[token, self.parts[part][index]] = GAIN * self.unit

    def look_back(self, layer: int, head: int, offset: int) -> None:
        """Attend so many positions back: Σ nats · cos(turn · (distance − offset)), from constants alone."""
        q, k, _, _ = self._weights(layer, head)
        constant, half = self.parts["constant"], _HEAD_DIM // 2
        for pair, nats in _TURNING:
            angle = offset * _THETA ** (-pair / half)
            scale = nats * math.sqrt(_HEAD_DIM) * self._read("constant")
            q[pair, constant], q[pair + half, constant] = scale * math.cos(angle), -scale * math.sin(angle)
            k[pair, constant] = self._read("constant")

    def look_for(self, layer: int, head: int, *, query: str, key: str) -> None:
        """Attend where the key has the query's feature, or else to the BOS."""
        q, k, _, _ = self._weights(layer, head)
        n = len(self.parts[key])
        for (a, b), nats, dims in (((query, key), MATCH, _STILL[:n]), (("constant", "bos"), SINK, _STILL[n : n + 1])):
            q[dims[:, None], self.parts[a]] = nats * math.sqrt(_HEAD_DIM) * self._read(a) * torch.eye(len(dims))
            k[dims[:, None], self.parts[b]] = self._read(b) * torch.eye(len(dims))

    def move(self, layer: int, head: int, source: str, target: str, first: int = 0) -> None:
        """Values that read one part, from their dimension `first` on, and are written to (the start of) another."""
        _, _, v, o = self._weights(layer, head)
        n = len(self.parts[source])
        dims = torch.arange(first, first + n)
        v[dims[:, None], self.parts[source]] = self._read(source) * torch.eye(n)
        o[self.parts[target][:n, None], dims] = torch.eye(n)

    def detect(self, layer: int, source: str, target: str) -> None:
        """The first unit of an MLP writes to one part where another is present."""
        mlp, high = self.hf.model.layers[layer].mlp, 10.0  # where SiLU is the identity; at 0 it is 0
        mlp.gate_proj.weight[0, self.parts[source]] = high * self._read(source)
        mlp.up_proj.weight[0, self.parts["constant"]] = self._read("constant")
        mlp.down_proj.weight[self.parts[target], 0] = 1 / high

    def model(self, name: str) -> Model:
        """The finished model: whatever has no weights yet gets random ones, and writes to ``junk``."""
        from mechinterp.model.model import Model

        junk, most = self.parts["junk"], torch.arange(1, _WIDTH)  # all but the constant
        quiet = 0.3 / math.sqrt(len(junk))  # so that no node writes more than a few features' worth
        for layer in range(2):
            for head in range(_HEADS):
                q, k, v, o = self._weights(layer, head)
                if not q.any():
                    q[:] = self._random(0.1, q.shape)
                    o[junk] = self._random(quiet, (len(junk), _HEAD_DIM))
                if not k.any():
                    k[:] = self._random(0.1, k.shape)
                    v[:, most] = self._random(0.1, (_HEAD_DIM, len(most)))
            mlp = self.hf.model.layers[layer].mlp
            free = ~mlp.down_proj.weight.any(0)
            for weight in (mlp.gate_proj.weight, mlp.up_proj.weight):
                weight[free.nonzero(), most] = self._random(0.2, (int(free.sum()), len(most)))
            mlp.down_proj.weight[junk[:, None], free.nonzero()[:, 0]] = self._random(
                quiet, (len(junk), int(free.sum()))
            )
        return Model(self.hf.eval().requires_grad_(True), None, f"planted-{name}")

    def _read(self, part: str) -> float:
        """The weight that reads a feature of a part as 1."""
        return self.unit / (_CONSTANT if part == "constant" else 1.0)

    def _random(self, std: float, shape: tuple[int, ...]) -> Tensor:
        return std * torch.randn(shape, generator=self.generator)

    def _weights(self, layer: int, head: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Query, key and value weights of a head, ``dim d_model``, and output weights, ``d_model dim``, to write to."""
        attn = self.hf.model.layers[layer].self_attn
        own = slice(head * _HEAD_DIM, (head + 1) * _HEAD_DIM)
        shared = slice(head // self.group * _HEAD_DIM, (head // self.group + 1) * _HEAD_DIM)
        return (
            attn.q_proj.weight[own],
            attn.k_proj.weight[shared],
            attn.v_proj.weight[shared],
            attn.o_proj.weight[:, own],
        )
