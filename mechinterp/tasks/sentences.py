"""Labelled English sentences of a small grammar, for probes of words and of sentences."""

import random
from itertools import product

from mechinterp.core.conllu import depths
from mechinterp.core.sentences import Sentences, tree
from mechinterp.errors import ExamplesError
from mechinterp.tasks.frames import FRAMES, VOICES, Frame, Voice
from mechinterp.tasks.grammar import (
    NUMBERS,
    POLARITIES,
    TENSES,
    Grammar,
    Number,
    Placed,
    Polarity,
    Tense,
    Word,
    written,
)


def sentences(n: int = 288, seed: int = 0) -> Sentences:
    """`n` English sentences with labels of their words and of their own, the same for the same seed.

    Of every 72, each combination of tense, number of the subject, voice, sentiment, and no, a singular or a plural noun
    between the subject and its verb comes once. So what the verb agrees with cannot be told from the noun before it,
    nor the tense from the number. The kinds of sentences come in turn, words are drawn, and no two texts are equal.

    Labels of words are those of `Sentences`: ``pos``, ``head``, ``depth``, ``head_distance``, ``relation`` (Universal
    Dependencies without subtypes), ``number`` of nouns, pronouns, demonstratives and finite verbs that show it, and
    ``tense`` of finite verbs. Punctuation marks are words.

    Labels of sentences: ``sentiment`` (``positive``, ``negative``, ``neutral``), ``tense`` (``past``, ``present``),
    ``subject_number`` (``sing``, ``plur``) and ``voice`` (``active``, ``passive``) of the main clause, ``attractors``
    (nouns between its subject and its verb that are not of the subject's number, Linzen et al. 2016), and ``frame``,
    the kind of sentence, by which to hold some out together.

    Raises:
        ExamplesError: n is below 1.
    """
    if n < 1:
        raise ExamplesError(f"n of sentences must be at least 1. Got {n}")
    rng = random.Random(seed)
    made: dict[str, list[Placed]] = {}
    labels: dict[str, list[str | int]] = {
        name: [] for name in ("sentiment", "tense", "subject_number", "attractors", "voice", "frame")
    }
    cells: list[tuple[Tense, Number, Voice, Polarity | None, Number | None]] = []
    decks: dict[tuple[Voice, bool], list[Frame]] = {}
    while len(made) < n:
        if not cells:
            cells = list(product(TENSES, NUMBERS, VOICES, (*POLARITIES, None), (None, *NUMBERS)))
            rng.shuffle(cells)
        tense, number, voice, polarity, between = cells[-1]
        deck = decks.setdefault((voice, polarity is not None), [])
        if not any(not (frame.bare and between) for frame in deck):
            frames = [frame for frame in FRAMES if (frame.voice, frame.opinion) == (voice, polarity is not None)]
            deck += rng.sample(frames, len(frames))
        frame = next(frame for frame in deck if not (frame.bare and between))
        text, words = written(_made(frame, Grammar(rng, tense, number, between, polarity, set())))
        if text in made:
            continue
        cells.pop()
        deck.remove(frame)
        made[text] = words
        values = (polarity or "neutral", tense, number, _attractors(words), voice, frame.name)
        for column, value in zip(labels.values(), values, strict=True):
            column.append(value)
    rows = list(made.values())
    heads = [[w.head for w in row] for row in rows]
    trees = [tree(row, depths(row, [""] * len(row))) for row in heads]
    return Sentences(
        tuple(made),
        tuple(tuple((w.start, w.start + len(w.form)) for w in row) for row in rows),
        {
            "pos": tuple(tuple(w.word.pos for w in row) for row in rows),
            **{name: tuple(tuple(one[name]) for one in trees) for name in trees[0]},
            "relation": tuple(tuple(w.relation for w in row) for row in rows),
            "number": tuple(tuple(w.word.number for w in row) for row in rows),
            "tense": tuple(tuple(w.word.tense for w in row) for row in rows),
        },
        {name: tuple(column) for name, column in labels.items()},
    )


def _made(frame: Frame, g: Grammar) -> Word:
    root = frame.make(g)
    if not frame.front or not g.chance(0.25):
        return root
    first = g.time() if not g.timed and g.chance(0.6) else ("obl", g.at("in near outside", "PLACE"))
    return root.led_by(first, ("punct", Word(",", "PUNCT")))


def _attractors(words: list[Placed]) -> int:
    """Nouns between the subject and the verb that agrees with it that are not of its number."""
    root = next(i for i, w in enumerate(words) if w.head < 0)
    subject = next(i for i, w in enumerate(words) if w.head == root and w.relation == "nsubj")
    verbs = (i for i, w in enumerate(words) if i == root or (w.head == root and w.relation in ("aux", "cop")))
    verb = next(i for i in verbs if words[i].word.tense is not None)
    between = (w.word for w in words[subject + 1 : verb] if w.word.pos in ("NOUN", "PROPN"))
    return sum(word.number != words[subject].word.number for word in between)
