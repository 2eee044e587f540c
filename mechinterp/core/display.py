"""How things are shown in notebooks: plain tables, in which every text is only ever text."""

import html
import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

PUNCTUATION = ".,;:!?()[]{}\"'"
ROWS = 20
"""Rows of a table in a notebook; what is left out is said."""


def html_table(head: Sequence[str], rows: Sequence[Sequence[Any]], caption: str = "", left_out: int = 0) -> str:
    """A table as HTML without scripts or requests: texts escaped, columns of numbers set right, None left empty.

    Args:
        caption: one line above it.
        left_out: how many rows more there are; said below it.
    """
    sides = ["right" if _numeric([row[i] for row in rows]) else "left" for i in range(len(head))]
    parts = [
        f"<p>{html.escape(caption)}</p>" if caption else "",  # a <caption> would be as narrow as its table
        f"<table><thead>{_row('th', head, sides)}</thead>",
        f"<tbody>{''.join(_row('td', row, sides) for row in rows)}</tbody></table>",
        f"<p>… and {left_out:,} more</p>" if left_out else "",
    ]
    return "".join(parts)


def count(n: int, what: str) -> str:
    """``1 example``, ``2 examples``."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def visible(text: str, width: int | None = None, spaces: bool = True) -> str:
    """A token with its newlines, unprintable characters and (if `spaces`) outer spaces shown, cut to `width`."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text))
    if spaces:
        inner = shown.strip(" ")
        left = len(shown) - len(shown.lstrip(" "))
        shown = "␣" * left + inner + "␣" * (len(shown) - left - len(inner))
    return shown if width is None or len(shown) <= width else shown[: width - 1] + "…"


def term(word: str) -> str:
    """A word as what it is counted as over many texts: in lower case, without punctuation around it."""
    return word.strip(PUNCTUATION).lower() or word


def _row(tag: str, cells: Sequence[Any], sides: Sequence[str]) -> str:
    style = "white-space: pre-wrap; text-align"  # a text's own runs of spaces are kept
    shown = zip(cells, sides, strict=True)
    return "<tr>" + "".join(f'<{tag} style="{style}: {side}">{_cell(c)}</{tag}>' for c, side in shown) + "</tr>"


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, Real) and math.isnan(value)):
        return ""
    if _numeric([value]):
        return f"{int(value):,}" if isinstance(value, Integral) else f"{float(value):.4g}"
    return html.escape(str(value))


def _numeric(values: Sequence[Any]) -> bool:
    there = [v for v in values if v is not None]
    return bool(there) and all(isinstance(v, Real) and not isinstance(v, bool) for v in there)
