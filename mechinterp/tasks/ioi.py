"""Indirect object identification (Wang et al. 2023): "When Mary and John ..., John gave a drink to" → " Mary"."""

import random

from mechinterp.core.examples import Examples
from mechinterp.core.tokens import Span
from mechinterp.tasks.templates import fill

NAMES = [
    "Mary",
    "John",
    "Tom",
    "James",
    "Sarah",
    "Anna",
    "Alice",
    "David",
    "Paul",
    "Mark",
    "Emma",
    "Kate",
    "Laura",
    "Peter",
    "Simon",
    "Lucy",
    "Jack",
    "Adam",
    "Helen",
    "Robert",
]  # one token each, after a space, in the common Llama and Qwen tokenizers
PLACES = ("store", "park", "school", "office", "station", "library", "market", "garden")
OBJECTS = ("drink", "book", "letter", "ring", "ball", "gift", "map", "coat")
TEMPLATES = (
    "When {A} and {B} went to the {place}, {S} gave a {object} to",
    "Then, {A} and {B} had a long talk at the {place}, and {S} handed a {object} to",
    "After {A} and {B} met near the {place}, {S} decided to give a {object} to",
    "While {A} and {B} were working at the {place}, {S} passed a {object} to",
)


def ioi(n: int = 32, seed: int = 0) -> Examples:
    """`n` pairs of prompts with two names, one of which is said again.

    The answer is the name said once (the indirect object, IO) against the one said twice (the
    subject, S). The corrupted prompt says the other name again, which turns the answer round. Half
    of the prompts name IO first. Positions: ``IO``, ``S1``, ``S2`` (and ``end``, always).
    """
    rng = random.Random(seed)
    clean: list[str] = []
    corrupted: list[str] = []
    answers: list[tuple[str, str]] = []
    spans: dict[str, list[Span]] = {"IO": [], "S1": [], "S2": []}
    for i in range(n):
        io, subject = rng.sample(NAMES, 2)
        first, second = (io, subject) if i % 2 == 0 else (subject, io)
        template, place, thing = rng.choice(TEMPLATES), rng.choice(PLACES), rng.choice(OBJECTS)
        filled = template.replace("{place}", place).replace("{object}", thing)
        text, where = fill(filled, {"A": first, "B": second, "S": subject})
        clean.append(text)
        corrupted.append(fill(filled, {"A": first, "B": second, "S": io})[0])
        answers.append((f" {io}", f" {subject}"))
        spans["IO"].append(where["A" if first == io else "B"])
        spans["S1"].append(where["A" if first == subject else "B"])
        spans["S2"].append(where["S"])
    return Examples.pairs(clean, corrupted, answers, positions=spans)
