"""A classifier's decision as it reads: its head applied at every token, in the one pass that makes the prediction."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from mechinterp import sites
from mechinterp.analyzers.gradients import token_texts
from mechinterp.core.analyzer import Analyzer, Batch, Context, Model, Needs
from mechinterp.core.result import Part, Result, View
from mechinterp.errors import NeedsError

TIME = r"\d{4}-\d{2}-\d{2}(?:[T ]\d{2}:\d{2}(?::\d{2})?)?"
"""A date as ISO 8601 writes it, perhaps with a time."""
LINES, ROWS = 8, 12
"""Texts up to which each has a line in the figure, and its lines' text in the cells."""
Values = npt.NDArray[np.floating]


@dataclass(frozen=True)
class Trajectory(Analyzer):
    """Log-odds of a label at every token: what the classifier would say were the text to end there.

    The head is applied to the final state of every position in the pass itself, so the last number is the model's own
    prediction, to the bit. Nothing trained the head on other positions than the last, so what it reads there
    is an extrapolation, good as far as the log-odds of a prefix run alone are wanted: they are the same number.

    Result: ``log_odds`` of the label against all others (``example position``, nats), ``probability``, ``step``, the
    change from the token before (at the first token its own log-odds), and ``token``; the same at the end of every
    line of the text (``example line``): ``line_log_odds``, ``line_change``, ``line_end``, ``line_text``, and
    ``line_time``, the first time stamp in it, or else that of the line before; ``final_log_odds`` and
    ``prediction`` (``example``). Of texts of different lengths the rest is NaN, or empty.

    Attributes:
        label: whose log-odds; the last label by default.
        times: a regular expression of time stamps.
    Raises:
        NeedsError: the model has no classification head, no such label, or the expression is none.
    """

    label: str | None = None
    times: str = TIME

    def __post_init__(self) -> None:
        try:
            re.compile(self.times)
        except re.error as error:
            raise NeedsError(f"the times of Trajectory are no regular expression: {error}") from None

    def needs(self, model: Model) -> Needs:
        number(model, self.label)
        return Needs(sites.logits())

    def observe(self, batch: Batch) -> Part:
        logits = batch.clean[sites.logits()].float()
        values = {"log_odds": (log_odds(logits, number(batch.model, self.label)), "example position")}
        end = batch.examples.starts + batch.examples.lengths - 1
        last = logits[torch.arange(len(end), device=end.device), end]
        ids = {"id": (batch.examples.ids, "example position"), "top": (last.argmax(-1), "example")}
        return Part({**values, **ids})

    def combine(self, parts: Iterator[Part], context: Context) -> Result:
        data = Result.of(parts, unit="log-odds").data
        odds, ids = (data[name].transpose("example", "position").values for name in ("log_odds", "id"))
        tokens = token_texts(context.model, ids)
        lengths = np.array(context.tokens.lengths)
        at = ("example", "position")
        out = xr.Dataset(
            {
                "log_odds": (at, odds),
                "probability": (at, 1 / (1 + np.exp(-odds))),
                "step": (at, steps(odds)),
                "token": (at, tokens),
                **_lines(tokens, odds, self.times),
                "final_log_odds": ("example", odds[np.arange(len(odds)), lengths - 1]),
                "prediction": ("example", context.model.to_str_outputs(data["top"].values.tolist())),
            },
            {"example": np.arange(len(odds)), "position": np.arange(odds.shape[1])},
        )
        name = context.model.to_str_outputs([number(context.model, self.label)])[0]
        unit = f"log-odds of {name}, nats"
        few, many = len(odds) <= LINES, len(odds) > ROWS
        title = "What the classifier would say here"
        views = (
            View("lines", "log_odds", "position", by="example", title=title, unit=unit) if few else
            View("lines", "log_odds", "position", select={"example": 0}, title=f"{title}: the first text", unit=unit),
            View(
                "heatmap", "line_change", "line", "example", text=None if many else "line_text", center=0.0,
                title="What each line changes", unit=unit,
            ),
        )  # fmt: skip
        return Result(out.assign_coords(line=np.arange(out.sizes["line"])), {"label": name}, views)


@dataclass(frozen=True)
class HighScoreTokens(Analyzer):
    """The tokens where a label's log-odds are highest and lowest, or where they rise and fall most, with context.

    Result: over ``side`` (``high``, ``low``) and ``rank``: ``value`` (nats), ``text`` and ``at``, the numbers of the
    example and the token; ``token``, and ``before`` and ``after``, the text around it.

    Attributes:
        label: whose log-odds; the last label by default.
        by: ``"level"``, the log-odds at the token, or ``"step"``, their change from the token before.
        top: tokens on each side, of all texts together.
        context: tokens that are shown on each side of one.
    Raises:
        NeedsError: the model has no classification head, no such label, or a number is too small.
    """

    label: str | None = None
    by: Literal["level", "step"] = "level"
    top: int = 20
    context: int = 12

    def __post_init__(self) -> None:
        if self.by not in ("level", "step"):
            raise NeedsError(f"The by of HighScoreTokens must be 'level' or 'step'. Got {self.by!r}")
        if self.top < 1 or self.context < 0:
            raise NeedsError(f"HighScoreTokens takes a top above 0 and a context of 0 or more. Got {self}")

    def needs(self, model: Model) -> Needs:
        number(model, self.label)
        return Needs(sites.logits())

    def observe(self, batch: Batch) -> Part:
        logits = batch.clean[sites.logits()].float()
        odds = log_odds(logits, number(batch.model, self.label))
        return Part({"log_odds": (odds, "example position"), "id": (batch.examples.ids, "example position")})

    def combine(self, parts: Iterator[Part], context: Context) -> Result:
        data = Result.of(parts, unit="log-odds").data
        odds, ids = (data[name].transpose("example", "position").values for name in ("log_odds", "id"))
        tokens = token_texts(context.model, ids)
        values = odds if self.by == "level" else steps(odds)
        places = np.argwhere(np.isfinite(values))
        order = np.argsort(values[np.isfinite(values)], kind="stable")
        sides = {"high": places[order[::-1][: self.top]], "low": places[order[: self.top]]}
        rows = {name: np.stack([side[:, i] for side in sides.values()]) for i, name in enumerate(("text", "at"))}
        n = self.context

        def said(pick: Any) -> tuple[tuple[str, str], npt.NDArray[Any]]:
            return ("side", "rank"), np.array([[pick(tokens[i], int(p)) for i, p in side] for side in sides.values()])

        at = ("side", "rank")
        out = xr.Dataset(
            {
                "value": (at, np.stack([values[tuple(side.T)] for side in sides.values()])),
                "text": (at, rows["text"]),
                "at": (at, rows["at"]),
                "token": said(lambda row, p: str(row[p])),
                "before": said(lambda row, p: "".join(row[max(0, p - n) : p])),
                "after": said(lambda row, p: "".join(row[p + 1 : p + 1 + n])),
            },
            {"side": list(sides), "rank": np.arange(1, rows["text"].shape[1] + 1)},
        )
        name = context.model.to_str_outputs([number(context.model, self.label)])[0]
        level = self.by == "level"
        title = "Where it is highest and lowest" if level else "Where it rises and falls most"
        unit = f"{'' if level else 'change of '}log-odds of {name}, nats"
        views = (View("heatmap", "value", "rank", "side", text="token", center=0.0, title=title, unit=unit),)
        return Result(out, {"label": name, "by": self.by}, views)


def number(model: Model, label: str | None) -> int:
    """The output of a label; the last by default.

    Raises:
        NeedsError: the model has no classification head, or no such label.
    """
    n = model.dims.n_labels
    if n is None or n < 2:
        raise NeedsError(f"{model.name} has no head of two labels or more; load a classifier with load_classifier")
    names = model.to_str_outputs(range(n))
    if label is not None and label not in names:
        raise NeedsError(f"{model.name} has no label {label!r}; give one of {', '.join(names)}")
    return n - 1 if label is None else names.index(label)


def log_odds(logits: Float[Tensor, "*some label"], label: int) -> Float[Tensor, "*some"]:
    """A label's logit less the log-sum-exp of all others; of two labels their difference."""
    others = torch.arange(logits.shape[-1], device=logits.device) != label
    return logits[..., label] - logits[..., others].logsumexp(-1)


def steps(odds: Values) -> Values:
    """Change from the token before; the first token has its own."""
    return np.diff(odds, axis=1, prepend=0.0)


def _lines(tokens: npt.NDArray[Any], odds: Values, times: str) -> dict[str, Any]:
    """What stands at the end of each line, ``example line``."""
    rows = [
        list(_line_ends(row[: int(np.isfinite(values).sum())].tolist()))
        for row, values in zip(tokens, odds, strict=True)
    ]
    wide = max(map(len, rows))
    shape, at = (len(rows), wide), ("example", "line")
    level, change, end = np.full(shape, np.nan), np.full(shape, np.nan), np.full(shape, -1)
    text, time = np.full(shape, "", object), np.full(shape, "", object)
    for i, row in enumerate(rows):
        before, stamp = 0.0, ""
        for j, (last, line) in enumerate(row):
            found = re.search(times, line)
            stamp = stamp if found is None else found[0]
            level[i, j], change[i, j], end[i, j] = odds[i, last], odds[i, last] - before, last
            text[i, j], time[i, j], before = line.strip(), stamp, float(odds[i, last])
    return {
        "line_log_odds": (at, level), "line_change": (at, change), "line_end": (at, end),
        "line_text": (at, text.astype(str)), "line_time": (at, time.astype(str)),
    }  # fmt: skip


def _line_ends(tokens: Sequence[str]) -> Iterator[tuple[int, str]]:
    """(last token, text) of each line that is not blank; a token with a line break ends its line."""
    line = ""
    for i, token in enumerate(tokens):
        line += str(token)
        if "\n" in str(token) or i + 1 == len(tokens):
            if line.strip():
                yield i, line
            line = ""
