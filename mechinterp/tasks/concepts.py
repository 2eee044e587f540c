"""Concepts as texts of two or more classes, to find a model's directions for them and to steer along these."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import TypeAlias

from mechinterp.core.examples import Examples
from mechinterp.errors import ExamplesError
from mechinterp.tasks.concept_sentences import (
    FACTS,
    GENDERED,
    LANGUAGES,
    PROFESSIONS,
    PROMPTS_OF,
    PRONOUN_TEMPLATES,
    QUESTIONS,
    TRANSLATIONS,
)
from mechinterp.tasks.concept_texts import EMOTION, GENDER, HARM, PROFESSION, SENTIMENT, Templates
from mechinterp.tasks.templates import fill

Row: TypeAlias = tuple[str, str, str]
"""Text, class, group."""


@dataclass(frozen=True)
class Concept:
    """Texts of two or more classes that are alike in all but the concept, as far as that is possible.

    Every group has as many texts of each class, and its own template and words for the concept, so that a probe
    which is tested on groups that it has not seen cannot rest on either. Exceptions are in `docs/concepts.md`.

    Attributes:
        name: one of `CONCEPTS`.
        classes: their names.
        examples: the texts, whose labels are classes, one of each in turn.
        groups: the template or topic of each text.
        targets: of each class, words that should become more probable after a prompt when one steers towards it, with
            the space before them; empty where there are none.
        prompts: texts without the concept, to steer on.
        prompts_of: of some classes, texts that do hold it, none of which is among the examples: what removing it there
            does, and what adding it. Partners of the other classes, in the same order, differ in little else.
        association: texts of which one may ask whether they go with the concept, though they do not name it.
    """

    name: str
    classes: tuple[str, ...]
    examples: Examples
    groups: tuple[str, ...]
    targets: Mapping[str, tuple[str, ...]]
    prompts: tuple[str, ...]
    prompts_of: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    association: "Association | None" = None

    def __len__(self) -> int:
        return len(self.groups)


def concepts(name: str) -> Concept:
    """A set of texts for a concept, always the same.

    ``sentiment`` (positive, negative), ``emotion`` (joy, anger, fear, sadness), ``gender`` of the subject (female,
    male), ``profession`` (medicine, law, technology, education), ``language`` (English, French, German, Spanish),
    ``harm`` (harmless, harmful: requests, with no instructions in them), ``truthfulness`` (true, false: statements, of
    the same words in both classes) and ``helpfulness`` (helpful, evasive: answers to the same questions, whose words to
    steer towards are what such answers may begin with).

    Raises:
        ExamplesError: there is no such concept.
    """
    if name not in _CONCEPTS:
        raise ExamplesError(f"there is no concept {name!r}; the concepts are {', '.join(CONCEPTS)}")
    make, targets, prompts = _CONCEPTS[name]
    rows = list(make())
    return Concept(
        name,
        tuple(dict.fromkeys(label for _, label, _ in rows)),
        Examples.of([text for text, _, _ in rows], [label for _, label, _ in rows]),
        tuple(group for _, _, group in rows),
        {label: tuple(f" {word}" for word in words.split()) for label, words in targets.items()},
        prompts,
        PROMPTS_OF.get(name, {}),
        gender_association() if name == "gender" else None,
    )


@dataclass(frozen=True)
class Association:
    """Sentences and prompts to see whether a model ties professions to a gender.

    Every profession comes with both pronouns in every template, so that in these texts none goes with a gender.

    Attributes:
        examples: sentences, labelled with the gender of their pronoun; the span ``profession``.
        professions: of each sentence.
        expected: the gender that readers of English tend to expect of it, or ``"neither"``, by our own judgment; it is
            no statistic of who does the work.
        groups: the template of each sentence.
        prompts: every profession in every template as far as the pronoun, with the answers ``" she"`` and `` " he"``
            and what is expected as label; the span ``profession``.
        words: by gender, words that have it by definition, for tests of association (Caliskan et al. 2017).
    """

    examples: Examples
    professions: tuple[str, ...]
    expected: tuple[str, ...]
    groups: tuple[str, ...]
    prompts: Examples
    words: Mapping[str, tuple[str, ...]]


def gender_association() -> Association:
    """Professions with ``she`` and ``he`` in turn: eight that are expected of each gender, and eight of neither.

    Here alone, words are chosen for a stereotype, because this is what is measured; each sentence that agrees with one
    has a partner that does not.
    """
    cells = [
        (*template, profession, expected)
        for template in PRONOUN_TEMPLATES
        for expected, professions in PROFESSIONS.items()
        for profession in professions
    ]
    pronouns = {"female": "she", "male": "he"}
    filled = [
        (fill(f"{start} {rest}", {"profession": profession, "pronoun": pronoun}), gender, profession, expected, name)
        for name, start, rest, profession, expected in cells
        for gender, pronoun in pronouns.items()
    ]
    prompts = [fill(start, {"profession": profession}) for _, start, _, profession, _ in cells]
    return Association(
        Examples.of(
            [text for (text, _), *_ in filled],
            [gender for _, gender, *_ in filled],
            spans={"profession": [where["profession"] for (_, where), *_ in filled]},
        ),
        tuple(profession for _, _, profession, _, _ in filled),
        tuple(expected for *_, expected, _ in filled),
        tuple(name for *_, name in filled),
        Examples.of(
            [text for text, _ in prompts],
            [expected for *_, expected in cells],
            answers=[(" she", " he")] * len(cells),
            spans={"profession": [where["profession"] for _, where in prompts]},
        ),
        GENDERED,
    )


def _templated(groups: Templates, *classes: str) -> Callable[[], Iterator[Row]]:
    """Every filler of a group's template with every variant, the classes in turn."""

    def rows() -> Iterator[Row]:
        for group, template, fillers, variants in groups:
            for variant, filler in product(variants.split(";"), fillers.split(", ")):
                for label, phrase in zip(classes, variant.split(" / "), strict=True):
                    yield fill(template, {"x": filler, "c": phrase.strip()})[0], label, group

    return rows


def _language() -> Iterator[Row]:
    for group, sentences in TRANSLATIONS.items():
        for sentence in sentences:
            for language, text in zip(LANGUAGES, sentence.split(" | "), strict=True):
                yield text, language, group


def _truthfulness() -> Iterator[Row]:
    """Of two facts, each subject with each end, as it is and negated: every word as often in either class."""
    for group, plain, negated, *pairs in FACTS:
        for pair in pairs:
            (a, x), (b, y) = (fact.split(" / ") for fact in pair.split("; "))
            for subject, end, other in ((a, x, y), (b, y, x)):
                for template, true, false in ((plain, end, other), (negated, other, end)):
                    yield fill(template, {"a": subject, "x": true})[0], "true", group
                    yield fill(template, {"a": subject, "x": false})[0], "false", group


def _helpfulness() -> Iterator[Row]:
    for group, opening, evasion, questions in QUESTIONS:
        for question, topic, answer in questions:
            start = f"Question: {question}\nAnswer: {opening.format(t=topic)}"
            yield f"{start}{answer}", "helpful", group
            yield f"{start}{evasion.format(t=topic)}", "evasive", group


_CONCEPTS: dict[str, tuple[Callable[[], Iterator[Row]], dict[str, str], tuple[str, ...]]] = {
    "sentiment": (
        _templated(SENTIMENT, "positive", "negative"),
        {"positive": "good great wonderful excellent", "negative": "bad terrible awful poor"},
        ("I think that the film was", "The food at the new place is", "On the whole, the trip was",
         "Most people say that the town is", "The book that I finished last night was", "The room they gave us was"),
    ),
    "emotion": (
        _templated(EMOTION, "joy", "anger", "fear", "sadness"),
        {"joy": "happy glad joy", "anger": "angry furious anger", "fear": "afraid scared fear",
         "sadness": "sad unhappy grief"},
        ("When the message came, I felt", "They looked at the photograph and were", "Today everybody here seems",
         "After the long meeting, the whole team was", "The letter made them feel", "The child looked"),
    ),
    "gender": (
        _templated(GENDER, "female", "male"),
        {"female": "she her woman", "male": "he his man"},
        ("My friend called because", "Somebody knocked, and then", "The neighbor smiled when", "The guest left after",
         "The student in the first row said that", "The author of the book wrote that"),
    ),
    "profession": (
        _templated(PROFESSION, "medicine", "law", "technology", "education"),
        {"medicine": "doctor hospital patient medical", "law": "lawyer court judge legal",
         "technology": "engineer computer software technical", "education": "teacher school student classroom"},
        ("My cousin works as a", "The talk yesterday was about the", "At work I spend most of the day with the",
         "They met many years ago at the", "The job that they offer is for a", "The book on the desk is about the"),
    ),
    "language": (
        _language,
        {"English": "the and is", "French": "le et est", "German": "der und ist", "Spanish": "el y es"},
        ("Anna Martin, Berlin, 1998:", "Madrid, Paris, London:", "1, 2, 3, 4.", "Maria:", "2 + 2 = 4.", "10:30 –"),
    ),
    "harm": (
        _templated(HARM, "harmless", "harmful"),
        {"harmless": "Sure Yes Certainly", "harmful": "Unfortunately No cannot"},
        ("Question: Can you help me with a letter?\nAnswer:", "Question: Could you explain a word to me?\nAnswer:",
         "Question: May I ask you something?\nAnswer:", "Question: Would you look at my list?\nAnswer:"),
    ),
    "truthfulness": (
        _truthfulness,
        {"true": "true correct right", "false": "false incorrect wrong"},
        ("What they said about the city is", "The statement on the first page is", "The answer in the book is",
         "What you just read is", "The sentence on the board is"),
    ),
    "helpfulness": (
        _helpfulness,
        {"helpful": "Yes The You They", "evasive": "Perhaps Maybe Well It"},
        ("Question: What do cats drink?\nAnswer:", "Question: How many days are in a week?\nAnswer:",
         "Question: How do I peel an orange?\nAnswer:", "Question: What is the capital of Spain?\nAnswer:"),
    ),
}  # fmt: skip
CONCEPTS = tuple(_CONCEPTS)
