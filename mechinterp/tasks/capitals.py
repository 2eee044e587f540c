"""Capitals of countries (the attribute recall of Meng et al. 2022; Geva et al. 2023): "The capital of France is"."""

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

CAPITALS = {
    "France": "Paris",
    "Germany": "Berlin",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Portugal": "Lisbon",
    "Greece": "Athens",
    "Austria": "Vienna",
    "Poland": "Warsaw",
    "Hungary": "Budapest",
    "Ireland": "Dublin",
    "Scotland": "Edinburgh",
    "Wales": "Cardiff",
    "Sweden": "Stockholm",
    "Norway": "Oslo",
    "Denmark": "Copenhagen",
    "Finland": "Helsinki",
    "Belgium": "Brussels",
    "Bulgaria": "Sofia",
    "Russia": "Moscow",
    "Egypt": "Cairo",
    "Tunisia": "Tunis",
    "Kenya": "Nairobi",
    "Iraq": "Baghdad",
    "Iran": "Tehran",
    "Syria": "Damascus",
    "Afghanistan": "Kabul",
    "Japan": "Tokyo",
    "China": "Beijing",
    "Cuba": "Havana",
    "Jamaica": "Kingston",
    "Peru": "Lima",
    "Chile": "Santiago",
    "Canada": "Ottawa",
    "South Korea": "Seoul",
    "New Zealand": "Wellington",
    "the Netherlands": "Amsterdam",
    "the Philippines": "Manila",
    "the Czech Republic": "Prague",
    "the United Kingdom": "London",
    "the United States": "Washington",
}  # every word is one token, after a space, in the tokenizers of SmolLM2 and Llama 3
TEMPLATES = (
    "The capital of {country} is",
    "The capital city of {country} is",
    "Today the capital of {country} is the city of",
    "As we learned at school, the capital of {country} is",
)
WORDS = " ".join([*CAPITALS, *CAPITALS.values(), *TEMPLATES])


def capitals(n: int = 32, seed: int = 0, model: Model | None = None) -> Examples:
    """`n` pairs of prompts that ask for the capital of a country; no country comes twice before all have come.

    The corrupted prompt names another country with as many tokens, and its capital is the wrong
    answer, so that the corruption turns the answer round. Positions: ``subject``, the last token of the
    country (and ``end``, always); span: ``country``, all its tokens.

    Args:
        model: leave out the countries whose capital its tokenizer splits, and pair the others by its
            number of tokens; without it, by the number of words.
    Raises:
        ExamplesError: no two countries are left.
    """
    known = [country for country, capital in CAPITALS.items() if size(capital, model) == 1]
    sizes = {country: size(country, model) for country in known}
    others = {a: [b for b in known if b != a and sizes[b] == sizes[a]] for a in known}
    usable = [country for country in known if others[country]]
    if not usable:
        raise ExamplesError("this tokenizer splits the capital of every country; write your own pairs")
    rng = random.Random(seed)
    clean: list[str] = []
    corrupted: list[str] = []
    answers: list[tuple[str, str]] = []
    where: list[Span] = []
    deck: list[str] = []
    for _ in range(n):
        deck = deck or rng.sample(usable, len(usable))
        country = deck.pop()
        other, template = rng.choice(others[country]), rng.choice(TEMPLATES)
        text, at = fill(template, {"country": country})
        clean.append(text)
        corrupted.append(fill(template, {"country": other})[0])
        answers.append((f" {CAPITALS[country]}", f" {CAPITALS[other]}"))
        where.append(at["country"])
    return Examples.pairs(clean, corrupted, answers, positions={"subject": where}, spans={"country": where})
