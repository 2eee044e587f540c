"""Subject-verb agreement across a distractor (Linzen et al. 2016; Lakretz et al. 2019): "The keys near the cabinet"."""

import random
from typing import TYPE_CHECKING, Any

from mechinterp.core.examples import Examples
from mechinterp.core.tokens import Span
from mechinterp.errors import ExamplesError
from mechinterp.tasks.templates import fill, size

if TYPE_CHECKING:
    from mechinterp.model.model import Model
else:
    Model = Any

NOUNS = (
    ("key", "keys"),
    ("cabinet", "cabinets"),
    ("book", "books"),
    ("letter", "letters"),
    ("picture", "pictures"),
    ("box", "boxes"),
    ("table", "tables"),
    ("chair", "chairs"),
    ("window", "windows"),
    ("door", "doors"),
    ("lamp", "lamps"),
    ("bottle", "bottles"),
    ("machine", "machines"),
    ("car", "cars"),
    ("truck", "trucks"),
    ("boat", "boats"),
    ("ship", "ships"),
    ("house", "houses"),
    ("tower", "towers"),
    ("bridge", "bridges"),
    ("garden", "gardens"),
    ("fence", "fences"),
    ("tree", "trees"),
    ("horse", "horses"),
    ("dog", "dogs"),
    ("cat", "cats"),
    ("bird", "birds"),
    ("boy", "boys"),
    ("girl", "girls"),
    ("farmer", "farmers"),
    ("teacher", "teachers"),
    ("student", "students"),
    ("doctor", "doctors"),
    ("lawyer", "lawyers"),
    ("singer", "singers"),
    ("guard", "guards"),
)  # (singular, plural), one token each, after a space, in the tokenizers of SmolLM2 and Llama 3
TEMPLATES = (
    "The {subject} near the old {distractor}",
    "The {subject} behind the {distractor}",
    "Yesterday I heard that the {subject} beside the large {distractor}",
    "They say that the {subject} next to the {distractor}",
)
VERBS = (" is", " are")
WORDS = " ".join([*(form for noun in NOUNS for form in noun), *TEMPLATES, *VERBS])


def agreement(n: int = 32, seed: int = 0, model: Model | None = None) -> Examples:
    """`n` pairs of prompts whose verb must agree with the subject, not with the noun that stands nearer.

    " are" is right after a plural subject and " is" after a singular one; the corrupted prompt flips the
    subject's number alone. Labels: ``"congruent"`` where both nouns of the clean prompt have the
    same number, ``"incongruent"`` where the distractor pulls the other way; the four combinations of
    numbers come in turn. Positions: ``subject``, ``distractor`` (and ``end``, always, which is the
    distractor's last token).

    Args:
        model: leave out the nouns whose plural has more tokens than their singular in its tokenizer.
    Raises:
        ExamplesError: fewer than two nouns are left.
    """
    nouns = [noun for noun in NOUNS if size(noun[0], model) == size(noun[1], model)]
    if len(nouns) < 2:
        raise ExamplesError("this tokenizer splits the plural of every noun; write your own pairs")
    rng = random.Random(seed)
    clean: list[str] = []
    corrupted: list[str] = []
    answers: list[tuple[str, str]] = []
    labels: list[str] = []
    spans: dict[str, list[Span]] = {"subject": [], "distractor": []}
    for i in range(n):
        number, other = i % 2, i // 2 % 2  # 0 singular, 1 plural
        subject, distractor = rng.sample(nouns, 2)
        template = rng.choice(TEMPLATES)
        text, where = fill(template, {"subject": subject[number], "distractor": distractor[other]})
        clean.append(text)
        corrupted.append(fill(template, {"subject": subject[1 - number], "distractor": distractor[other]})[0])
        answers.append((VERBS[number], VERBS[1 - number]))
        labels.append("congruent" if number == other else "incongruent")
        for name, column in spans.items():
            column.append(where[name])
    return Examples.pairs(clean, corrupted, answers, positions=spans, labels=labels)
