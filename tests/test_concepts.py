"""Concepts: texts of balanced classes, in groups that share no words of the concept."""

from collections import Counter

import numpy as np
import pytest

import mechinterp as mi
from mechinterp.errors import ExamplesError
from mechinterp.tasks.concept_sentences import FACTS, PROFESSIONS, PRONOUN_TEMPLATES
from mechinterp.tasks.concept_texts import EMOTION, GENDER, HARM, PROFESSION, SENTIMENT, Templates

CONCEPTS = mi.tasks.CONCEPTS


def labels(concept: mi.tasks.Concept) -> tuple[str, ...]:
    assert concept.examples.labels is not None
    return concept.examples.labels


def words(text: object) -> list[str]:
    return [word.strip('.,?!"“”:').lower() for word in str(text).split()]


@pytest.mark.parametrize("name", CONCEPTS)
def test_laws_of_every_concept(name: str) -> None:
    concept = mi.tasks.concepts(name)
    assert concept == mi.tasks.concepts(name) and concept.name == name
    texts = concept.examples.texts
    assert len(concept) == len(texts) == len(concept.groups) >= 120
    assert len({" ".join(words(text)) for text in texts}) == len(texts)  # so none is in two classes
    cells = Counter(zip(concept.groups, labels(concept), strict=True))
    groups = dict.fromkeys(concept.groups)
    assert len(groups) >= 10
    assert all(len({cells[group, label] for label in concept.classes}) == 1 for group in groups)
    assert set(labels(concept)) == set(concept.classes) == set(concept.targets or concept.classes)
    assert labels(concept)[: len(concept.classes)] == concept.classes
    assert all(str(text)[0].isupper() or not str(text)[0].isalpha() for text in texts)
    assert not any("{" in str(text) or "  " in str(text) for text in texts)
    assert len(set(concept.prompts)) == len(concept.prompts) >= 4
    said = {word for targets in concept.targets.values() for word in targets}
    held = [prompt for some in concept.prompts_of.values() for prompt in some]
    assert not said & {f" {word}" for prompt in (*concept.prompts, *held) for word in prompt.split()}
    assert set(concept.targets) == set(concept.classes) and all(concept.targets.values())
    # Prompts that hold a class are pairs, none of them among the texts.
    assert set(concept.prompts_of) in (set(), set(concept.classes))
    assert len({len(some) for some in concept.prompts_of.values()}) <= 1 and len(set(held)) == len(held)
    bodies = {" ".join(words(text)) for text in texts}
    assert not any(body in " ".join(words(prompt)) for prompt in held for body in bodies)
    for pair in zip(*concept.prompts_of.values(), strict=True):
        assert len(set(words(pair[0])) & set(words(pair[1]))) >= len(set(words(pair[0]))) / 2


@pytest.mark.parametrize("name", CONCEPTS)
def test_targets_are_single_tokens_on_one_side_only(name: str, smollm2: mi.Model) -> None:
    concept = mi.tasks.concepts(name)
    tokens = {label: [smollm2.tokenizer(word)["input_ids"] for word in some] for label, some in concept.targets.items()}
    assert {len(ids) for some in tokens.values() for ids in some} <= {1}
    flat = [ids[0] for some in tokens.values() for ids in some]
    assert len(set(flat)) == len(flat)


@pytest.mark.parametrize("templates", [GENDER, PROFESSION, EMOTION, SENTIMENT, HARM])
def test_no_template_and_no_words_of_the_concept_are_in_two_groups(templates: Templates) -> None:
    variants = [
        variant.strip() for *_, some in templates for group in some.split(";") for variant in group.split(" / ")
    ]
    assert len(set(variants)) == len(variants)
    openings = [f"{template}{fillers}" for _, template, fillers, _ in templates]
    assert len(set(openings)) == len(openings) == len({name for name, *_ in templates})


def test_true_and_false_statements_have_the_same_words() -> None:
    concept = mi.tasks.concepts("truthfulness")
    rows = list(zip(concept.groups, labels(concept), concept.examples.texts, strict=True))
    for group in dict.fromkeys(concept.groups):
        bags = [
            Counter(word for g, label, text in rows if (g, label) == (group, side) for word in words(text))
            for side in ("true", "false")
        ]
        assert bags[0] == bags[1]
    negated = Counter(label for _, label, text in rows if "not" in words(text))
    assert negated == {"true": 48, "false": 48}
    true = {str(text) for _, label, text in rows if label == "true"}
    assert {"Paris is in France.", "Paris is not in Spain.", "A hen does not have fur.", "Coal is not white."} <= true
    assert len({word for *_, first, second in FACTS for word in (first, second)}) == 2 * len(FACTS)


@pytest.mark.parametrize(
    ("name", "most"), [("helpfulness", 0.15), ("harm", 0.15), ("truthfulness", 0), ("gender", 0), ("sentiment", 0)]
)
def test_classes_are_about_as_long(name: str, most: float) -> None:
    concept = mi.tasks.concepts(name)
    lengths = [
        np.mean([len(words(t)) for t, side in zip(concept.examples.texts, labels(concept), strict=True) if side == one])
        for one in concept.classes
    ]
    assert max(lengths) / min(lengths) - 1 <= most


def test_an_unknown_concept() -> None:
    with pytest.raises(ExamplesError, match="there is no concept 'irony'; the concepts are sentiment, emotion"):
        mi.tasks.concepts("irony")


def test_no_profession_goes_with_a_gender() -> None:
    data = mi.tasks.gender_association()
    assert data == mi.tasks.gender_association()
    assert data.examples.labels is not None
    rows = list(zip(data.professions, data.groups, data.examples.labels, data.expected, strict=True))
    each = Counter(rows)
    assert set(each.values()) == {1} and len(each) == 24 * len(PRONOUN_TEMPLATES) * 2
    assert len({(profession, group, gender) for profession, group, gender, _ in rows}) == len(rows)
    assert all(profession in PROFESSIONS[expected] for profession, _, _, expected in rows)
    agrees = Counter("neither" if e == "neither" else str(e == gender) for _, _, gender, e in rows)
    assert len(set(agrees.values())) == 1
    pronouns = {"female": "she", "male": "he"}
    for text, span, (profession, _, gender, _) in zip(
        data.examples.texts, data.examples.spans["profession"], rows, strict=True
    ):
        assert str(text)[slice(*span)] == profession
        assert [word for word in words(text) if word in ("she", "he")] == [pronouns[gender]]
    for i, (prompt, span) in enumerate(zip(data.prompts.texts, data.prompts.spans["profession"], strict=True)):
        assert str(data.examples.texts[2 * i]).startswith(f"{prompt} she")
        assert str(data.examples.texts[2 * i + 1]).startswith(f"{prompt} he")
        assert str(prompt)[slice(*span)] == data.professions[2 * i]
        assert (data.prompts.labels or ())[i] == data.expected[2 * i]
    assert set(data.prompts.answers or ()) == {((" she",), (" he",))}
    assert len(data.words["female"]) == len(data.words["male"]) == len({*data.words["female"], *data.words["male"]}) / 2
