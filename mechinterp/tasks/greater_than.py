"""Greater-than (Hanna et al. 2023): "The war lasted from the year 1732 to the year 17" → an ending above 32."""

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mechinterp.core.examples import Examples
from mechinterp.core.tokens import Span
from mechinterp.errors import ExamplesError
from mechinterp.tasks.templates import fill, size

if TYPE_CHECKING:
    from mechinterp.model.model import Model
else:
    Model = Any

CENTURIES = range(11, 18)
STARTS = range(20, 80)
ENDINGS = tuple(f"{i:02}" for i in range(100))
DIGITS = tuple("0123456789")
NOUNS = ("war", "siege", "conflict", "rebellion", "expedition", "voyage", "dynasty", "reign", "plague", "famine")
TEMPLATES = (
    "The {noun} lasted from the year {start} to the year {century}",
    "The {noun} went on from the year {start} until the year {century}",
    "Historians date the {noun} from the year {start} to the year {century}",
    "The {noun}, which began in the year {start}, ended in the year {century}",
)
WORDS = " ".join([*NOUNS, *TEMPLATES])


def greater_than(model: Model, n: int = 32, seed: int = 0) -> Examples:
    """`n` pairs of prompts that stop in the middle of a year, which must be later than an earlier one.

    What counts as an answer depends on the model's tokenizer. Where all endings ``00`` to ``99`` are
    single tokens the right answers are those above the start's and the wrong ones the rest, as in the
    paper. Where every digit is a token the model says the tens digit first: right are the digits above
    the start's tens digit, wrong those below it, and the digit itself, which does not decide, is
    neither. Starts end in 20 to 79, so that neither side is empty.

    The start of the corrupted prompt ends in ``01``, after which nearly every ending is right (02 to
    99; of the tens digits, 1 to 9), so the wrong answers lose what held them down. Positions:
    ``XX`` and ``YY``, the last token of the start's century and of its ending, ``tens``, the token with the
    tens digit of the ending (and ``end``, always: the century that is said again); span: ``start``, the
    whole year. A token that crosses from the century into the ending ("173" "2") is both ``XX`` and ``tens``.

    Raises:
        ExamplesError: the model has no tokenizer, or no year aligns with one that ends in 01.
    """
    if model.tokenizer is None:
        raise ExamplesError("greater_than asks the tokenizer what years look like, and this model has none; load one")
    years = [
        (str(century), str(ending))
        for century in CENTURIES
        for ending in STARTS
        if size(f"{century}{ending}", model) == size(f"{century}01", model)
    ]
    if not years:
        raise ExamplesError(
            "this tokenizer gives no year as many tokens as the one that ends in 01; write your own pairs"
        )
    whole = _whole(model)
    rng = random.Random(seed)
    clean: list[str] = []
    corrupted: list[str] = []
    answers: list[tuple[Sequence[str], Sequence[str]]] = []
    columns: dict[str, list[Span]] = {"XX": [], "tens": [], "YY": [], "start": []}
    for _ in range(n):
        century, ending = rng.choice(years)
        template, noun = rng.choice(TEMPLATES), rng.choice(NOUNS)
        words = {"noun": noun, "start": century + ending, "century": century}
        text, where = fill(template, words)
        clean.append(text)
        corrupted.append(fill(template, words | {"start": f"{century}01"})[0])
        number, tens = int(ending), int(ending[0])
        answers.append((ENDINGS[number + 1 :], ENDINGS[: number + 1]) if whole else (DIGITS[tens + 1 :], DIGITS[:tens]))
        at = where["start"][0]
        for name, span in {"XX": (0, 2), "tens": (2, 3), "YY": (2, 4), "start": (0, 4)}.items():
            columns[name].append((at + span[0], at + span[1]))
    start = columns.pop("start")
    return Examples.pairs(clean, corrupted, answers, positions=columns, spans={"start": start})


def _whole(model: Model) -> bool:
    """Whether every ending is one token, as it continues a century or else by itself."""
    prompt = Examples.of(["From the year 1732 to the year 17"], answers=[list(ENDINGS)])
    try:
        prompt.tokenize(model.tokenizer)
    except ExamplesError:
        return False
    return True
