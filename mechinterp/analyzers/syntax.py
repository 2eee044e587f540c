"""Syntactic heads: which heads attend along the dependencies of a parsed text."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from mechinterp import sites
from mechinterp.core.analyzer import Analyzer, Context, Model, Needs, Own
from mechinterp.core.conllu import Sentence, read_conllu
from mechinterp.core.examples import Examples
from mechinterp.core.result import Part, Result, View
from mechinterp.core.statistics import fdr, summarize
from mechinterp.core.tokens import Span, TokenBatch
from mechinterp.core.trace import Read, Reduce
from mechinterp.errors import ExamplesError

DIRECTIONS = ("head before", "head after")
SHOWN = 4
Link: TypeAlias = tuple[int, int, str, str]
"""Later word, earlier word, relation, direction."""


@dataclass(frozen=True)
class SyntacticHeads(Analyzer):
    """Heads that attend from a word to its syntactic head, or back (Clark et al. 2019; Voita et al. 2019).

    The text is a CoNLL-U file with dependencies. A causal model attends backwards only, so every dependency is asked
    of the later of its two words: with the ``head before`` the dependent, whether the dependent's last token attends
    most to the head; with the ``head after`` it, whether the head's last token attends most to the dependent. A word
    gets the attention of all its tokens, and is compared with all words before the query's word but for the one with
    the text's first token, which is a sink. The score of a head is the share of such dependencies that it hits.

    The null is the best fixed offset: the share that is hit by always choosing the word that stands, of all offsets
    the best for this relation, so many words before. p is a sign-flip test over sentences of hits - null's hits, q is
    over all relations × directions × layers × heads, and a head is ``specialised`` if it beats its null by `floor`
    and q < .05.

    Words and tokens meet by characters. A word that shares a token with another, or that does not stand in the text
    (inside a multi-word token such as *du*), is unmapped; dependencies with an unmapped word, or to the first
    token's, are left out and counted in `meta`. Relations are taken without subtypes; ``root`` is none,
    and neither is a head that is not said (``_``).

    Result (``relation direction layer head``): ``score``, ``null``, ``p``, ``q``, ``specialised``; ``links``, how many
    dependencies, and ``offset``, the null's (``relation direction``). NaN below `least` dependencies.

    Attributes:
        path: the CoNLL-U file.
        least: dependencies below which a relation in a direction is not scored.
        floor: least share above the null.
        seed: of the sign flips.
    Raises:
        ExamplesError: the file is no CoNLL-U, has no sentences, or the model has no fast tokenizer.
    """

    path: str
    least: int = 20
    floor: float = 0.1
    seed: int = 0

    def needs(self, model: Model) -> Needs:
        texts = [place(sentence, model) for sentence in read_conllu(self.path)]
        if not any(t.links for t in texts):
            raise ExamplesError(f"{self.path} has no dependency between two words that are mapped; give a parsed text")
        hits = Hits(tuple(t.words for t in texts), tuple(tuple(link[:2] for link in t.links) for t in texts))
        own = Own(Examples.of([t.ids for t in texts]), Read(sites.pattern(), reduce=Reduce(hits, "example head link")))
        return Needs(on={"sentences": own})

    def combine(self, parts: Iterator[Part], context: Context) -> Result:
        texts = [place(sentence, context.model) for sentence in read_conllu(self.path)]
        hits = context.own["sentences"].stack("pattern").permute(1, 3, 0, 2).float().cpu().numpy()
        links = [(i, j, *link) for i, text in enumerate(texts) for j, link in enumerate(text.links)]
        counts = Counter((relation, direction) for *_, relation, direction in links)
        relations = [r for r, _ in Counter(relation for *_, relation, _ in links).most_common()]
        layers, heads = hits.shape[2:]
        shape = (len(relations), len(DIRECTIONS), layers, heads)
        arrays = {name: np.full(shape, np.nan, np.float32) for name in ("score", "null", "p")}
        offsets = np.full(shape[:2], -1)
        for (relation, direction), n in counts.items():
            if n < self.least:
                continue
            mine = [link for link in links if link[4:] == (relation, direction)]
            best, null = Counter(later - earlier for _, _, later, earlier, *_ in mine).most_common(1)[0]
            sentences = sorted({i for i, *_ in mine})
            excess = np.zeros((len(sentences), layers, heads))
            total = np.zeros((layers, heads))
            for i, j, later, earlier, *_ in mine:
                total += hits[i, j]
                excess[sentences.index(i)] += hits[i, j] - (later - earlier == best)
            at = (relations.index(relation), DIRECTIONS.index(direction))
            arrays["score"][at], arrays["null"][at], offsets[at] = total / n, null / n, best
            arrays["p"][at] = summarize(excess, self.seed).p
        arrays["q"] = fdr(arrays["p"]).astype(np.float32)
        special = (arrays["score"] - arrays["null"] >= self.floor) & (arrays["q"] < 0.05)
        dims = ("relation", "direction", "layer", "head")
        numbers = np.array([[counts[r, d] for d in DIRECTIONS] for r in relations]).reshape(shape[:2])
        data = xr.Dataset(
            {**{name: (dims, a) for name, a in arrays.items()}, "specialised": (dims, special)}
            | {"links": (dims[:2], numbers), "offset": (dims[:2], offsets)},
            {"relation": relations, "direction": list(DIRECTIONS), "layer": range(layers), "head": range(heads)},
            {"unit": "share of dependencies"},
        )
        meta = {
            "sentences": len(texts),
            "words": sum(len(t.words) for t in texts),
            "unmapped_words": sum(w is None for t in texts for w in t.words),
            "dependencies": sum(t.dependencies for t in texts),
            "dependencies_left_out": sum(t.dependencies - len(t.links) for t in texts),
        }
        views = [_view(data, direction, meta) for direction in DIRECTIONS]
        return Result(data, meta, tuple(v for v in views if v is not None))


@dataclass(frozen=True)
class Placed:
    """A sentence in tokens.

    Attributes:
        words: the tokens of each word, half-open; None for one that is unmapped.
        links: dependencies between words that can be asked for.
        dependencies: how many there are in all.
    """

    ids: tuple[int, ...]
    words: tuple[Span | None, ...]
    links: tuple[Link, ...]
    dependencies: int


@dataclass(frozen=True)
class Hits:
    """Whether the earlier word of a link has most of the attention of the later one's last token."""

    words: tuple[tuple[Span | None, ...], ...]
    links: tuple[tuple[tuple[int, int], ...], ...]

    def __call__(
        self, block: Float[Tensor, "example head query key"], queries: slice, batch: TokenBatch
    ) -> Float[Tensor, "example head link"]:
        """1 for every link that is hit, from the block that has its query; 0 else, and beyond a sentence's links."""
        width = max(map(len, self.links))
        out = torch.zeros(*block.shape[:2], width, device=block.device)
        for row, (example, start) in enumerate(zip(batch.rows, batch.starts.tolist(), strict=True)):
            words, links = self.words[example], self.links[example]
            usable = [i for i, span in enumerate(words) if span is not None and span[0] > 0]
            spans = torch.tensor([words[i] for i in usable], device=block.device).reshape(-1, 2) + start
            asked = {j: start + words[later][1] - 1 for j, (later, _) in enumerate(links)}  # pyright: ignore[reportOptionalSubscript] -- links join mapped words
            here = [j for j, column in asked.items() if queries.start <= column < queries.stop]
            if not here:
                continue
            rows = block[row][:, [asked[j] - queries.start for j in here]].float()  # head link key
            running = torch.nn.functional.pad(rows.cumsum(-1), (1, 0))
            each = running[..., spans[:, 1]] - running[..., spans[:, 0]]  # head link word
            before = torch.tensor([[i < links[j][0] for i in usable] for j in here], device=block.device)
            best = each.masked_fill(~before, -1).argmax(-1)
            target = torch.tensor([usable.index(links[j][1]) for j in here], device=block.device)
            out[row][:, here] = (best == target).float()
        return out


def place(sentence: Sentence, model: Model) -> Placed:
    """A sentence's words and dependencies in a model's tokens."""
    tokenizer: Any = model.tokenizer
    if not getattr(tokenizer, "is_fast", False):
        raise ExamplesError(
            "words are found by their characters, which needs a fast tokenizer; load one with the model"
        )
    out = tokenizer(sentence.text, return_offsets_mapping=True, verbose=False)
    touched = [
        [t for t, (a, b) in enumerate(out["offset_mapping"]) if span and a < span[1] and b > span[0]]
        for span in sentence.spans
    ]
    owners = Counter(t for tokens in touched for t in tokens)
    words = tuple((t[0], t[-1] + 1) if t and all(owners[i] == 1 for i in t) else None for t in touched)
    links: list[Link] = []
    dependencies = 0
    for dependent, (head, relation) in enumerate(zip(sentence.heads, sentence.relations, strict=True)):
        if head is None or head < 0:
            continue
        dependencies += 1
        later, earlier = max(dependent, head), min(dependent, head)
        target = words[earlier]
        if words[later] is not None and target is not None and target[0] > 0:
            links.append((later, earlier, relation, DIRECTIONS[head > dependent]))
    return Placed(tuple(out["input_ids"]), words, tuple(links), dependencies)


def _view(data: xr.Dataset, direction: str, meta: dict[str, int]) -> View | None:
    scored = data["score"].sel(direction=direction).notnull().any(("layer", "head"))
    shown = [str(r) for r in data["relation"].values[scored.values]][:SHOWN]
    if not shown:
        return None
    return View(
        "heatmap",
        "score",
        "head",
        "layer",
        by="relation",
        title=f"Syntactic heads, {direction} the dependent ({meta['sentences']} sentences)",
        unit="share of dependencies",
        mark="specialised",
        select={"direction": direction, "relation": tuple(shown)},
        scale="shared",
    )
