"""What a classifier should not be using: suspect words where its score is high, each tested by a swap."""

import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from torch import Tensor

from mechinterp import sites
from mechinterp.analyzers.trajectory import log_odds, number
from mechinterp.core.analyzer import Analyzer, Batch, Context, Edit, Model, Needs, Sweep
from mechinterp.core.metrics import Metric, Rows
from mechinterp.core.result import Part, Result, View
from mechinterp.core.statistics import fdr, summarize
from mechinterp.core.tokens import TokenBatch
from mechinterp.errors import ExamplesError, NeedsError
from mechinterp.shapes import Scores

KINDS: Mapping[str, str] = MappingProxyType(
    {
        "date": r"(?:19|20)\d\d[-/.]\d{1,2}(?:[-/.]\d{1,2})?|\d{1,2}[-/.]\d{1,2}[-/.](?:19|20)?\d\d",
        "time": r"\d{1,2}:\d{2}(?::\d{2})?(?:\s?[ap]m)?",
        "number": r"[-+]?[\d.,]*\d%?",
        "identifier": r"#?(?=[\w./-]*\d)(?=[\w./-]*[A-Za-z])[\w./-]+|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}",
        "address": r"\S+@\S+\.\w+|https?://\S+|www\.\S+",
        "markup": r"<[^>]+>|[-=*_#|~]{3,}",
    }
)
"""Kinds of words that rarely carry a text's meaning: a word that one of them matches whole is a suspect."""
BOILERPLATE = "boilerplate"
"""The kind of the words of lines that stand in many texts as they are."""
Places: TypeAlias = tuple[tuple[int, ...], ...]
Ids: TypeAlias = Sequence[Sequence[int]]
_EDGES = ".,;:!?()[]{}\"'"


@dataclass(frozen=True)
class SpuriousPatterns(Analyzer):
    """Words of suspect kinds over-represented at high scores, each with what it does to the log-odds.

    First round: the head at every token (as in `Trajectory`). Words are what white space separates, without
    punctuation at their ends, in lower case, and each has a score (see `by`). High is above the `quantile` of all
    words' scores, low below its mirror; a word's lift is its mean share at high scores, over the texts that have it,
    over that of all words. Texts are the unit of the test (random signs of what each text has above the expected), so
    a word that is often said in one text is one observation. Suspects are the words, or classes of words, of suspect
    kinds: each of `kinds`, each of the user's own `patterns`, and of lines that stand as they are in `boilerplate`
    of the texts or more. A word is tested by itself where it is in `least` texts or more; the rarer words of a kind
    together, such as every date.

    Second round: each suspect is swapped, in every text that has it, all its places together, for other words of its
    kind and length that occur, and the change of the final log-odds measured, one sweep over edited inputs. A
    warning is a suspect whose lift has q < `level` on either side, and whose mean change has q < `level` (both over
    all that was tested) and is `effect` nats or more, in the direction in which it is over-represented. So a word
    that only stands where scores are high for other reasons is no warning, and what matters but is of no suspect
    kind, such as a true cause, is none either: the kinds say what should not matter, and that is the user's to know.

    It is a test of the model, not of the world. A swap leaves the text as it was but for the word, and does not see
    what all words of the kind have in common; where there is no other word of the kind and length (a line that all
    texts have, say) the suspect is deleted. ``test="remove"`` deletes always: it sees more, and moves everything
    behind, so that the text may be unlike any that the model has seen. Fewer than six texts with a word give no p, and
    no warning.

    Result: over ``suspect``: ``kind``, ``texts`` and ``occurrences`` (raw counts), ``side``, ``lift``, ``lift_p``,
    ``lift_q``; ``effect``, what the log-odds lose without it (nats), with ``ci_low, ci_high`` (bootstrap over texts),
    ``effect_p``, ``effect_q``; ``warning``; ``example``, the number of a text that has it. Over ``word``, the
    `top` of all words by lift on either side: ``word_lift``, ``word_texts``, ``word_q``, ``word_side``,
    ``word_kind`` (empty for one that is no suspect).

    Attributes:
        label: whose log-odds; the last label by default.
        by: ``"text"``, a word's score is that of its whole text, to which it may add much later; ``"level"``, the
            log-odds at its end; ``"step"``, the change that its own tokens make.
        kinds: which of the built-in kinds are suspect.
        patterns: further kinds: name → regular expression that matches a word whole.
        quantile: above which scores are high.
        least: texts that a suspect must be in.
        boilerplate: share of texts that have a line; above 1 for none.
        test: ``"swap"``; ``"remove"``; or ``"blank"``, which puts the mean embedding in its place.
        effect: least change, nats.
        level: of q.
        most: suspects that are tested, those of smallest p.
        top: words in the table of all words, on each side.
    Raises:
        NeedsError: an option that cannot be, no such label, or no classifier.
    """

    label: str | None = None
    by: Literal["text", "level", "step"] = "text"
    kinds: tuple[str, ...] = (*KINDS, BOILERPLATE)
    patterns: Mapping[str, str] = field(default_factory=dict, hash=False)
    quantile: float = 0.75
    least: int = 6
    boilerplate: float = 0.5
    test: Literal["swap", "remove", "blank"] = "swap"
    effect: float = 0.2
    level: float = 0.05
    most: int = 50
    top: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("by", ("text", "level", "step")), ("test", ("swap", "remove", "blank"))):
            if getattr(self, name) not in known:
                raise NeedsError(
                    f"The {name} of SpuriousPatterns must be one of {', '.join(known)}. Got {getattr(self, name)!r}"
                )
        if odd := [kind for kind in self.kinds if kind not in (*KINDS, BOILERPLATE)]:
            raise NeedsError(f"there is no built-in kind {odd[0]!r}; give some of {', '.join((*KINDS, BOILERPLATE))}")
        for name, pattern in self.patterns.items():
            try:
                re.compile(pattern)
            except re.error as error:
                raise NeedsError(f"the pattern {name!r} is no regular expression: {error}") from None
        if not 0.5 <= self.quantile < 1 or not 0 < self.level < 1 or min(self.least, self.most, self.top) < 1:
            raise NeedsError(
                f"SpuriousPatterns takes a quantile from 0.5 to below 1, a level between 0 and 1, and least, most and"
                f" top above 0. Got {self}"
            )

    def needs(self, model: Model) -> Needs:
        number(model, self.label)
        return Needs(sites.logits())

    def observe(self, batch: Batch) -> Part:
        logits = batch.clean[sites.logits()].float()
        return Part(log_odds(logits, number(batch.model, self.label)), "example position")

    def combine(self, parts: Iterator[Part], context: Context) -> Result | Analyzer:
        odds = Result.of(parts).data["value"].transpose("example", "position").values
        texts = [context.model.to_str_tokens(row) for row in context.tokens.ids]
        found = _Words.of(texts, odds, self)
        suspects = found.suspects(self)
        if not suspects:
            warnings.warn("no word of a suspect kind is in enough texts to be tested", stacklevel=2)
            return _result(self, context, found, [], np.zeros((len(texts), 0)))
        return _Tested.of(self, found, suspects, context.tokens.ids)


@dataclass(frozen=True)
class _Suspect:
    """A word, or a class of words, that should not matter."""

    name: str
    kind: str
    places: Mapping[int, Places] = field(hash=False)
    """Text → the tokens of each occurrence."""
    side: str
    lift: float
    p: float

    @property
    def occurrences(self) -> int:
        return sum(map(len, self.places.values()))


@dataclass(frozen=True, eq=False)
class _Words:
    """Every word of every text, with its tokens and score."""

    term: tuple[tuple[str, ...], ...]
    tokens: tuple[tuple[tuple[int, ...], ...], ...]
    high: tuple[npt.NDArray[np.bool_], ...]
    low: tuple[npt.NDArray[np.bool_], ...]
    kind: Mapping[str, str]
    """Of each word that is of a suspect kind; words of boilerplate lines are there as (line) suspects only."""
    lines: Mapping[str, Mapping[int, Places]]
    """Line that many texts have → text → the tokens of each time."""

    @classmethod
    def of(cls, texts: Sequence[Sequence[str]], odds: npt.NDArray[np.floating], asked: SpuriousPatterns) -> "_Words":
        terms: list[tuple[str, ...]] = []
        tokens: list[tuple[tuple[int, ...], ...]] = []
        scores: list[npt.NDArray[np.floating]] = []
        for row, values in zip(texts, odds, strict=True):
            words = [(name, at) for word, at in words_of(row) if (name := plain(word))]
            level = np.array([values[at[-1]] for _, at in words])
            before = np.array([values[at[0] - 1] if at[0] else 0.0 for _, at in words])
            terms.append(tuple(name for name, _ in words))
            tokens.append(tuple(at for _, at in words))
            whole = np.full(len(words), values[len(row) - 1])
            scores.append({"text": whole, "level": level, "step": level - before}[asked.by])
        if not any(map(len, scores)):
            raise ExamplesError("the texts have no words; give texts")
        every = np.concatenate(scores)
        top, bottom = np.quantile(every, asked.quantile), np.quantile(every, 1 - asked.quantile)
        kinds = {**{kind: KINDS[kind] for kind in asked.kinds if kind in KINDS}, **asked.patterns}
        compiled = {kind: re.compile(pattern, re.IGNORECASE) for kind, pattern in kinds.items()}
        distinct = {name for row in terms for name in row}
        # The user's own patterns come last and win.
        kind = {name: k for k, pattern in compiled.items() for name in sorted(distinct) if pattern.fullmatch(name)}
        lines = _boilerplate(texts, asked.boilerplate) if BOILERPLATE in asked.kinds else {}
        high, low = (tuple(s > top for s in scores), tuple(s < bottom for s in scores))
        return cls(tuple(terms), tuple(tokens), high, low, kind, lines)

    def tested(self, places: Mapping[int, Sequence[int]]) -> tuple[str, float, float]:
        """Side, lift and p of words at these numbers in each text; the side where they are most over-represented."""
        best = ("", 0.0, 1.0)
        for side, marks in (("high", self.high), ("low", self.low)):
            expected = float(np.concatenate(marks).mean())
            share = np.array([marks[i][list(some)].mean() for i, some in places.items()])
            lift = float(share.mean() / max(expected, 1e-12))
            p = float(summarize((share - expected)[:, None], 0, resamples=1).p[0]) if lift > 1 else 1.0
            if lift > best[1]:
                best = side, lift, p
        return best

    def words(self, least: int) -> dict[str, dict[int, list[int]]]:
        """Word → text → its numbers there, of those in enough texts."""
        found: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        for i, row in enumerate(self.term):
            for j, name in enumerate(row):
                found[name][i].append(j)
        return {name: dict(places) for name, places in found.items() if len(places) >= least}

    def lifted(self, asked: SpuriousPatterns) -> list[dict[str, Any]]:
        """The words of highest lift on each side, suspect or not."""
        names, rows = [], []
        for name, places in self.words(asked.least).items():
            names.append(name)
            rows.append((*self.tested(places), len(places)))
        q = fdr(np.array([p for _, _, p, _ in rows]))
        out: list[dict[str, Any]] = []
        for side in ("high", "low"):
            some = sorted((i for i, row in enumerate(rows) if row[0] == side), key=lambda i: (q[i], -rows[i][1]))
            out += [
                {
                    "word": names[i], "word_side": side, "word_lift": rows[i][1], "word_q": q[i],
                    "word_texts": rows[i][3], "word_kind": self.kind.get(names[i], ""),
                }
                for i in some[: asked.top]
            ]  # fmt: skip
        return out

    def suspects(self, asked: SpuriousPatterns) -> list[_Suspect]:
        """Words and classes of words of suspect kinds, those of smallest p first."""
        words = self.words(1)
        classes: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
        out: list[_Suspect] = []

        def add(name: str, kind: str, places: Mapping[int, Sequence[int]]) -> None:
            if len(places) < asked.least:
                return
            side, lift, p = self.tested(places)
            at = {i: tuple(self.tokens[i][j] for j in some) for i, some in places.items()}
            out.append(_Suspect(name, kind, at, side, lift, p))

        alone: set[str] = set()
        for name, kind in self.kind.items():
            add(name, kind, words[name])
            if len(words[name]) >= asked.least:
                alone.add(kind)
            else:
                for i, some in words[name].items():
                    classes[kind][i] += some
        for kind, places in classes.items():
            called = f"{'other' if kind in alone else 'every'} {kind}"
            add(called, kind, {i: sorted(some) for i, some in places.items()})
        for line, at in self.lines.items():
            spans = {i: {token for place in places for token in place} for i, places in at.items()}
            inside = {i: [j for j, w in enumerate(self.tokens[i]) if spans[i].issuperset(w)] for i in at}
            inside = {i: some for i, some in inside.items() if some}
            if len(inside) >= asked.least:
                side, lift, p = self.tested(inside)
                out.append(_Suspect(line, BOILERPLATE, {i: at[i] for i in inside}, side, lift, p))
        return sorted(out, key=lambda one: (one.p if np.isfinite(one.p) else 1.0, -one.lift))[: asked.most]


@dataclass(frozen=True)
class _Odds(Metric):
    """Log-odds of a classifier's label against all others."""

    label: ClassVar[str] = "log-odds in nats"
    output: int = 0

    def score(self, logits: Tensor, batch: TokenBatch, rows: Rows, reference: Tensor | None) -> Scores:
        return log_odds(logits.float(), self.output)


@dataclass(frozen=True)
class _Tested(Analyzer):
    """The second round: every suspect left out of, or swapped in, the texts that have it."""

    asked: SpuriousPatterns
    found: _Words = field(hash=False)
    suspects: tuple[_Suspect, ...] = field(hash=False)
    edits: tuple[tuple[tuple[int, Edit], ...], ...] = field(hash=False)
    """Of each text, the suspects that it has, by number, and what is done to it."""

    @classmethod
    def of(cls, asked: SpuriousPatterns, found: _Words, suspects: Sequence[_Suspect], ids: Ids) -> "_Tested":
        rng = np.random.default_rng(asked.seed)
        out: list[list[tuple[int, Edit]]] = [[] for _ in found.term]
        pools = _pools(found, ids)
        for i, one in enumerate(suspects):
            for text, places in one.places.items():
                at = tuple(sorted({token for place in places for token in place}))
                new = [_other(pools[one.kind], tuple(ids[text][t] for t in place), rng) for place in places]
                if asked.test == "blank":
                    edit = Edit(at, "mean")
                elif asked.test == "swap" and None not in new:
                    where = tuple(t for place in places for t in place)
                    edit = Edit(where, tuple(t for word in new for t in word or ()))
                elif len(at) == len(ids[text]):
                    continue  # nothing would be left
                else:
                    edit = Edit(at)
                out[text].append((i, edit))
        return cls(asked, found, tuple(suspects), tuple(map(tuple, out)))

    def needs(self, model: Model) -> Needs:
        edits = tuple(tuple(edit for _, edit in row) for row in self.edits)
        if not any(edits):
            return Needs()
        metric = _Odds(output=number(model, self.asked.label))
        return Needs(sweeps={"without": Sweep(metric, edits=edits, base="clean")})

    def observe(self, batch: Batch) -> Part:
        swept = batch.sweeps["without"]
        assert swept.values is not None and swept.base is not None
        effect = torch.full((len(batch.examples), len(self.suspects)), float("nan"))
        for i, row in enumerate(batch.examples.rows):
            for j, (suspect, _) in enumerate(self.edits[row]):
                effect[i, suspect] = float(swept.base[i] - swept.values[i, j])
        return Part(effect, "example suspect")

    def combine(self, parts: Iterator[Part], context: Context) -> Result:
        effects = Result.of(parts).data["value"].transpose("example", "suspect").values if any(self.edits) else None
        if effects is None:
            effects = np.full((len(self.found.term), len(self.suspects)), np.nan)
        return _result(self.asked, context, self.found, self.suspects, effects)


def _result(
    asked: SpuriousPatterns,
    context: Context,
    found: _Words,
    suspects: Sequence[_Suspect],
    effects: npt.NDArray[np.floating],
) -> Result:
    """Warnings and what they rest on.

    Args:
        effects: what the log-odds lose without a suspect, ``example suspect``; NaN in texts that lack it.
    """
    said = summarize(effects, asked.seed)
    lift_p = np.array([one.p for one in suspects])
    lift_q, effect_q = fdr(lift_p), fdr(said.p)
    sign = np.array([1.0 if one.side == "high" else -1.0 for one in suspects])
    with np.errstate(invalid="ignore"):
        warned = (lift_q < asked.level) & (effect_q < asked.level) & (sign * said.mean >= asked.effect)
    words = found.lifted(asked)
    data: dict[str, Any] = {
        "kind": [one.kind for one in suspects], "texts": [len(one.places) for one in suspects],
        "occurrences": [one.occurrences for one in suspects], "side": [one.side for one in suspects],
        "lift": [one.lift for one in suspects], "lift_p": lift_p, "lift_q": lift_q, "effect": said.mean,
        "ci_low": said.ci_low, "ci_high": said.ci_high, "effect_p": said.p, "effect_q": effect_q, "warning": warned,
        "example": [min(one.places) for one in suspects],
    }  # fmt: skip
    order = np.lexsort((-np.abs(np.nan_to_num(said.mean)), ~warned)) if suspects else np.zeros(0, int)
    table = xr.Dataset({name: ("suspect", np.array(column)[order]) for name, column in data.items()})
    table = table.assign_coords(suspect=[suspects[i].name for i in order])
    terms = {name: ("word", np.array([row[name] for row in words])) for name in (words[0] if words else ())}
    table = table.assign({name: column for name, column in terms.items() if name != "word"})
    table = table.assign_coords(word=terms["word"][1] if terms else [])
    model = context.model
    label = model.to_str_outputs([number(model, asked.label)])[0]
    meta = {"label": label, "texts": len(found.term), "test": asked.test, "by": asked.by, "warnings": int(warned.sum())}
    meta |= {"effect": asked.effect, "level": asked.level}
    unit = f"change of log-odds of {label}, nats"
    views = (View("bars", "effect", "suspect", mark="warning", title="What each suspect adds", unit=unit),)
    return Result(table, meta, views if suspects else ())


def words_of(tokens: Sequence[str]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(word, its tokens) of what white space separates; a token with white space inside belongs to both sides' last."""
    word, at = "", []
    for i, token in enumerate(tokens):
        if not token.strip():
            if at:
                yield word, tuple(at)
            word, at = "", []
            continue
        if at and token[:1].isspace():
            yield word, tuple(at)
            word, at = "", []
        word, at = word + token.strip(), [*at, i]
        if token[-1:].isspace():
            yield word, tuple(at)
            word, at = "", []
    if at:
        yield word, tuple(at)


def plain(word: str) -> str:
    """A word as it is counted."""
    return word.strip(_EDGES).lower()


def _boilerplate(texts: Sequence[Sequence[str]], share: float) -> dict[str, dict[int, Places]]:
    """Lines that so many of the texts have, with their tokens in each."""
    found: dict[str, dict[int, list[tuple[int, ...]]]] = defaultdict(lambda: defaultdict(list))
    for i, tokens in enumerate(texts):
        begin, line = 0, ""
        for j, token in enumerate(tokens):
            line += token
            if "\n" in token or j + 1 == len(tokens):
                if len(line.split()) > 1:
                    found[" ".join(line.split())][i].append(tuple(range(begin, j + 1)))
                begin, line = j + 1, ""
    enough = max(2, share * len(texts))
    return {line: {i: tuple(at) for i, at in of.items()} for line, of in found.items() if len(of) >= enough}


def _pools(found: _Words, ids: Ids) -> dict[str, dict[int, list[tuple[int, ...]]]]:
    """Kind → number of tokens → the words of that kind and length, each once, as token ids."""
    out: dict[str, dict[int, dict[tuple[int, ...], None]]] = defaultdict(lambda: defaultdict(dict))
    for i, (terms, tokens) in enumerate(zip(found.term, found.tokens, strict=True)):
        for name, at in zip(terms, tokens, strict=True):
            if name in found.kind:
                out[found.kind[name]][len(at)][tuple(ids[i][t] for t in at)] = None
    return defaultdict(dict, {kind: {n: list(some) for n, some in sizes.items()} for kind, sizes in out.items()})


def _other(
    pool: Mapping[int, Sequence[tuple[int, ...]]], own: tuple[int, ...], rng: np.random.Generator
) -> tuple[int, ...] | None:
    """Another word as long as this one; None where there is none."""
    others = [word for word in pool.get(len(own), ()) if word != own]
    return others[int(rng.integers(len(others)))] if others else None
