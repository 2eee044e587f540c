"""Prompt generators: their answers are right, their pairs align, their names point at what they say."""

import re
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import tokenizers
import transformers

import mechinterp as mi
from mechinterp.errors import ExamplesError
from mechinterp.tasks.agreement import NOUNS
from mechinterp.tasks.agreement import WORDS as AGREEMENT
from mechinterp.tasks.capitals import CAPITALS

TASKS: dict[str, Callable[[mi.Model, int, int], mi.Examples]] = {
    "ioi": lambda model, n, seed: mi.tasks.ioi(n, seed),
    "agreement": lambda model, n, seed: mi.tasks.agreement(n, seed),
    "agreement by tokens": lambda model, n, seed: mi.tasks.agreement(n, seed, model),
    "capitals": lambda model, n, seed: mi.tasks.capitals(n, seed),
    "capitals by tokens": lambda model, n, seed: mi.tasks.capitals(n, seed, model),
    "greater_than": mi.tasks.greater_than,
}


@pytest.fixture(params=["smollm2", "llama"])
def either(request: pytest.FixtureRequest) -> mi.Model:
    """The real small model, and a tiny one."""
    return request.getfixturevalue(request.param)


def number_tokenizer(digits: int) -> transformers.PreTrainedTokenizerFast:
    """Words, spaces, and numbers in chunks of at most so many digits: 2 as in old BPEs, 3 as in Llama 3."""
    words = {w for text in (AGREEMENT, *mi.tasks.greater_than(mi.testing.tiny(), 60).texts) for w in text.split()}
    numbers = [f"{i:0{width}}" for width in range(1, digits + 1) for i in range(10**width)]
    vocab = ["<unk>", " ", ",", *(re.sub(",", "", w) for w in words if not w.isdigit()), "From", *numbers]
    model = tokenizers.models.WordLevel({w: i for i, w in enumerate(dict.fromkeys(vocab))}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(
        tokenizers.Regex(rf"[A-Za-z]+|\d{{1,{digits}}}|[^A-Za-z\d]"), "isolated"
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.mark.parametrize("name", TASKS)
def test_laws_of_every_task(name: str, either: mi.Model) -> None:
    """Seeded, as many as asked for, aligned, with answers that are single tokens and on one side only."""
    task = TASKS[name]
    examples = task(either, 40, 3)
    assert examples == task(either, 40, 3)
    assert examples.texts != task(either, 40, 4).texts
    assert task(either, 7, 3).texts == examples.texts[:7]
    tokens = either.tokenize(examples)  # refuses what does not align, and answers of several tokens
    assert len(tokens) == 40
    assert tokens.corrupted is not None and tokens.answers is not None
    unknown = either.tokenizer.unk_token_id if either.tokenizer.unk_token == "<unk>" else None
    for clean, corrupted, (right, wrong) in zip(tokens.ids, tokens.corrupted, tokens.answers, strict=True):
        assert clean != corrupted
        assert not set(right) & set(wrong)
        assert unknown not in {*clean, *corrupted, *right, *wrong}
    for column in tokens.positions.values():
        assert all(0 < p < len(row) for p, row in zip(column, tokens.ids, strict=True))


def last_words(model: mi.Model, examples: mi.Examples, name: str, of: str = "ids") -> list[str]:
    """The token at a named position of every example, without its space."""
    tokens = model.tokenize(examples)
    at = tokens.positions[name]
    return [model.to_str_tokens(row)[p].strip() for row, p in zip(getattr(tokens, of), at, strict=True)]


def changed(model: mi.Model, examples: mi.Examples) -> list[list[int]]:
    """Positions at which clean and corrupted differ."""
    tokens = model.tokenize(examples)
    rows = zip(tokens.ids, tokens.corrupted or (), strict=True)
    return [[i for i, (a, b) in enumerate(zip(*row, strict=True)) if a != b] for row in rows]


def test_agreement_is_between_subject_and_verb(either: mi.Model) -> None:
    examples = mi.tasks.agreement(40, seed=1)
    singular, plural = ({noun[i] for noun in NOUNS} for i in (0, 1))
    subjects, distractors = (last_words(either, examples, name) for name in ("subject", "distractor"))
    for subject, flipped, distractor, label, (right, wrong) in zip(
        subjects,
        last_words(either, examples, "subject", "corrupted"),
        distractors,
        examples.labels or (),
        examples.answers or (),
        strict=True,
    ):
        assert (subject, flipped) in NOUNS or (flipped, subject) in NOUNS
        assert (right, wrong) == (((" are",), (" is",)) if subject in plural else ((" is",), (" are",)))
        assert (label == "congruent") == ((subject in singular) == (distractor in singular))
        assert subject != distractor
    assert changed(either, examples) == [[p] for p in either.tokenize(examples).positions["subject"]]
    assert [(examples.labels or ()).count(label) for label in ("congruent", "incongruent")] == [20, 20]
    assert sum(subject in plural for subject in subjects) == 20


def test_capitals_are_of_the_named_country(either: mi.Model) -> None:
    examples = mi.tasks.capitals(2 * len(CAPITALS), seed=1)
    tokens, differ = either.tokenize(examples), changed(either, examples)
    named: list[str] = []
    for row, (right, wrong) in enumerate(examples.answers or ()):
        start, stop = tokens.spans["country"][row]
        assert tokens.positions["subject"][row] == stop - 1
        clean, corrupted = (
            "".join(either.to_str_tokens(ids[row][start:stop])).strip() for ids in (tokens.ids, tokens.corrupted)
        )
        assert (right, wrong) == ((f" {CAPITALS[clean]}",), (f" {CAPITALS[corrupted]}",))
        assert set(differ[row]) <= set(range(start, stop))
        named.append(clean)
    assert sorted(named) == sorted([*CAPITALS, *CAPITALS])  # all come before one comes twice
    assert len(set(CAPITALS.values())) == len(CAPITALS)


def test_nouns_and_capitals_that_a_tokenizer_splits_are_left_out() -> None:
    """A tokenizer of letters: plurals are longer than singulars, and every capital is split."""
    letters = mi.Model.wrap(mi.testing.tiny().hf, number_tokenizer(1))
    letters.tokenizer.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    with pytest.raises(ExamplesError, match="splits the plural of every noun"):
        mi.tasks.agreement(4, model=letters)
    with pytest.raises(ExamplesError, match="splits the capital of every country"):
        mi.tasks.capitals(4, model=letters)


def years(examples: mi.Examples) -> list[tuple[str, str, str]]:
    """(start, start of the corrupted prompt, century) by reading the texts."""
    pairs = zip(examples.texts, examples.corrupted or (), strict=True)
    return [(*re.findall(r"\d{4}", f"{a} {b}"), re.findall(r"\d+", str(a))[-1]) for a, b in pairs]


def test_tens_digits_are_the_answers_where_digits_are_tokens(either: mi.Model) -> None:
    examples = mi.tasks.greater_than(either, 16, seed=1)
    for (start, corrupted, century), (right, wrong) in zip(years(examples), examples.answers or (), strict=True):
        assert start[:2] == corrupted[:2] == century
        assert corrupted[2:] == "01"
        assert right == tuple(d for d in "0123456789" if d > start[2])
        assert wrong == tuple(d for d in "0123456789" if d < start[2])
        assert right and wrong
    starts = [start for start, _, _ in years(examples)]
    for name, digit in {"XX": 1, "tens": 2, "YY": 3}.items():
        assert last_words(either, examples, name) == [start[digit] for start in starts]
    tokens = either.tokenize(examples)
    assert all(stop - start == 4 for start, stop in tokens.spans["start"])
    assert {len(where) for where in changed(either, examples)} <= {1, 2}  # the tens digit, and the last unless it is 1


@pytest.mark.parametrize(("digits", "year"), [(2, ("17", "32")), (3, ("173", "2"))])
def test_endings_are_the_answers_where_they_are_tokens(digits: int, year: Sequence[str]) -> None:
    model = mi.Model.wrap(mi.testing.tiny().hf, number_tokenizer(digits))
    assert model.to_str_tokens(model.tokenizer("1732")["input_ids"]) == list(year)
    examples = mi.tasks.greater_than(model, 8, seed=1)
    for (start, _, _), (right, wrong) in zip(years(examples), examples.answers or (), strict=True):
        assert sorted(right + wrong) == [f"{i:02}" for i in range(100)]
        assert min(map(int, right)) == int(start[2:]) + 1 > max(map(int, wrong))
    tokens = examples.tokenize(model.tokenizer)
    names = ("XX", "tens", "YY")
    found = {
        name: model.to_str_tokens([row[p] for row, p in zip(tokens.ids, tokens.positions[name], strict=True)])
        for name in names
    }
    for (start, _, _), xx, tens, yy in zip(years(examples), *(found[name] for name in names), strict=True):
        assert (xx, tens, yy) == (
            (start[:2], start[2:], start[2:]) if digits == 2 else (start[:3], start[:3], start[3:])
        )
    assert all(len(sides[0]) + len(sides[1]) == 100 for sides in tokens.answers or ())


def test_greater_than_needs_a_tokenizer(llama: mi.Model) -> None:
    with pytest.raises(ExamplesError, match="this model has none; load one"):
        mi.tasks.greater_than(mi.Model.wrap(llama.hf))


def test_histories_whose_risks_tell_the_label_and_exceptions() -> None:
    plain, some = (mi.tasks.patient_histories(400, seed=3, exceptions=share) for share in (0.0, 0.2))
    against = [
        np.mean([(risks >= 2) != (label == "event") for risks, label in zip(one.risks, one.labels, strict=True)])
        for one in (plain, some)
    ]
    assert against[0] == 0 and 0.14 < against[1] < 0.26
    carried = np.array([label == "event" for label in some.labels]) == np.array(some.planted)
    assert carried.mean() > 0.85  # the code goes with the label, not with the risks
    with pytest.raises(ExamplesError, match="a share from 0 to 1"):
        mi.tasks.patient_histories(4, exceptions=2.0)
