"""Made-up patient histories for classifiers: what decides the label is known, and so is what does not."""

from dataclasses import dataclass

import numpy as np

from mechinterp.errors import ExamplesError

RISKS = ("syncope", "chest pain", "sepsis", "stroke", "bleeding")
ORDINARY = (
    "blood pressure check", "flu vaccination", "eye examination", "routine blood test", "dental cleaning",
    "knee physiotherapy", "skin allergy", "sleep advice", "diet counselling", "hearing test", "prescription renewal",
    "annual review",
)  # fmt: skip
PLANTED = "ADM-7731"
CODES = ("ADM-2204", "ADM-5518", "ADM-3096", "ADM-8842")
"""Administrative codes that say nothing."""
WORDS = (*RISKS, *ORDINARY, PLANTED, *CODES, "End of history")


@dataclass(frozen=True)
class Histories:
    """Texts, and for each whether it has an event, how many risks it names, and whether the planted code is in it."""

    texts: tuple[str, ...]
    labels: tuple[str, ...]
    risks: tuple[int, ...]
    planted: tuple[bool, ...]


def patient_histories(
    n: int = 200, seed: int = 0, *, plant: bool = True, lines: tuple[int, int] = (6, 12), exceptions: float = 0.0
) -> Histories:
    """Dated visits, one a line; the label is ``event`` where two risks or more are named, else ``stable``.

    Half of each. With `plant` the code ``ADM-7731``, of the clinic's administration, stands in nine of ten histories
    with an event and in one of ten without: it goes with the label and causes nothing. Other codes
    are anybody's. Without it, it is like them.

    Args:
        lines: least and most visits, 3 or more.
        exceptions: the share of histories whose risks are like those of the other label. Where there are none, the
            risks tell the label, and a model that counts them has no use for the code.
    Raises:
        ExamplesError: too few visits, no histories, or no such share.
    """
    if not 0 <= exceptions <= 1:
        raise ExamplesError(f"the exceptions must be a share from 0 to 1. Got {exceptions}")
    if not 3 <= lines[0] <= lines[1] or n < 1:
        raise ExamplesError(f"a history has 3 visits or more, and there must be one history. Got {lines} and {n}")
    rng = np.random.default_rng(seed)
    texts: list[str] = []
    counts: list[int] = []
    have: list[bool] = []
    for i in range(n):
        event = i % 2 == 1
        visits = int(rng.integers(lines[0], lines[1] + 1))
        odd = exceptions > 0 and rng.random() < exceptions
        risks = int(rng.integers(2, 4)) if event != odd else int(rng.integers(0, 2))
        share = (0.9 if event else 0.1) if plant else 0.3
        planted = bool(rng.random() < share)
        said = [str(rng.choice(ORDINARY)) for _ in range(visits)]
        for k in rng.choice(visits, risks, replace=False):
            said[int(k)] = str(rng.choice(RISKS))
        codes = {int(k): str(rng.choice(CODES)) for k in rng.choice(visits, 2, replace=False)}
        free = [k for k in range(visits) if k not in codes]
        if planted:
            codes[int(rng.choice(free))] = PLANTED
        day = np.datetime64("2019-01-01") + int(rng.integers(0, 700))
        rows: list[str] = []
        for k, what in enumerate(said):
            day += int(rng.integers(5, 60))
            rows.append(f"{day} {what}{f' {codes[k]}' if k in codes else ''}")
        texts.append("\n".join(rows) + "\nEnd of history.")
        counts.append(risks)
        have.append(planted)
    labels = tuple("event" if i % 2 else "stable" for i in range(n))
    return Histories(tuple(texts), labels, tuple(counts), tuple(have))
