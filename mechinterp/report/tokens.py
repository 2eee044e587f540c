"""Texts with each token on the colour of its attribution, as HTML that keeps its colours when it is copied."""

import html
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mechinterp.core.display import visible
from mechinterp.core.result import Result
from mechinterp.errors import OutputError

FOR, AGAINST = (0, 114, 178), (213, 94, 0)
"""Blue raises the metric and orange lowers it (Okabe & Ito); the farther from white, the more."""


def coloured_tokens(result: Result, examples: Sequence[int] | None = None) -> str:
    """The texts of a token attribution, one paragraph each, under a legend.

    Colours are relative to the largest |attribution| of each text, and the number is shown on hover. There are no
    scripts, classes or style sheets: every token carries its own colours, so that the text can be pasted into a
    document or a mail. Every text is escaped.

    Args:
        examples: by number; all by default.
    Raises:
        OutputError: the result has no attribution of tokens, or no such example.
    """
    if not {"attribution", "token"} <= set(result.data.data_vars):
        raise OutputError(f"{result.meta.get('analyzer', 'this result')} has no tokens to colour; use TokenAttribution")
    values = result.data["attribution"].transpose("example", "position").values
    tokens = result.data["token"].transpose("example", "position").values
    chosen = range(len(values)) if examples is None else examples
    if odd := [i for i in chosen if not 0 <= i < len(values)]:
        raise OutputError(f"there is no example {odd[0]}; the result has {len(values)}, counted from 0")
    unit = html.escape(str(result.data.attrs.get("unit", "")))
    legend = (
        f'<p style="color:#555;font:13px sans-serif">{_span("raises", 1.0, None)} {_span("lowers", -1.0, None)}'
        f" {unit}; colours are relative to each text's largest, numbers show on hover</p>"
    )
    rows = [_paragraph(i, tokens[i], values[i], result) for i in chosen]
    return "\n".join([legend, *rows])


def _paragraph(number: int, tokens: npt.NDArray[Any], values: npt.NDArray[np.floating], result: Result) -> str:
    last = max((i for i, token in enumerate(tokens) if token), default=-1) + 1
    largest = float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 0.0
    parts = [
        _span(str(token), 0.0 if np.isnan(value) or largest == 0 else float(value) / largest, float(value))
        for token, value in zip(tokens[:last], values[:last], strict=True)
    ]
    score = f" · score {float(result.data['score'][number]):.4g}" if "score" in result.data else ""
    head = f'<span style="color:#888;font-size:12px">{number}{score}</span>'
    return f'<p style="font:15px/1.9 sans-serif;max-width:860px">{head} {"".join(parts)}</p>'


def _span(token: str, share: float, value: float | None) -> str:
    """A token on its colour; white space stays as it is, other unprintable characters are shown."""
    color = FOR if share > 0 else AGAINST
    mixed = ",".join(str(round(255 + (c - 255) * min(abs(share), 1.0))) for c in color)
    text = "#fff" if abs(share) > 0.65 else "#222"
    title = "" if value is None or np.isnan(value) else f' title="{value:.4g}"'
    shown = html.escape(visible(token, spaces=False))
    style = f"background-color:rgb({mixed});color:{text};white-space:pre-wrap;border-radius:3px"
    return f'<span style="{style}"{title}>{shown}</span>'
