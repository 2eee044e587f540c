"""One HTML page that holds everything, opens offline, and can run nothing but its own script."""

import base64
import hashlib
import html
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from plotly.offline import get_plotlyjs

from mechinterp.core.display import visible
from mechinterp.core.result import Result, View
from mechinterp.report.figures import plotly_figure
from mechinterp.report.panels import ALPHA, labels, rows
from mechinterp.report.tokens import coloured_tokens

if TYPE_CHECKING:
    import plotly.graph_objects as go

ROWS = 20
"""Rows of each table on the page; all of them are in the files beside it."""
COLUMNS = 14
"""Columns of a table beside a figure, above which it has the figure's own alone; all of them are in the files."""
TEXTS = 20
"""Texts shown on the colour of their tokens' attributions."""
LONG = 120
"""Characters of an option above which only its beginning is on the page."""

_STYLE = """
body { font: 15px/1.55 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", Arial, sans-serif; color: #222;
  background: #fff; max-width: 1240px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px; }
h2 { font-size: 20px; margin: 52px 0 6px; padding-top: 16px; border-top: 1px solid #ddd; }
p { max-width: 860px; margin: 6px 0; }
.quiet { color: #666; font-size: 13.5px; }
ul.findings { background: #f4f7fb; border-left: 4px solid #0072B2; margin: 20px 0; padding: 12px 20px 12px 36px; }
ul.findings li { margin: 3px 0; }
.row { display: flex; flex-wrap: wrap; gap: 4px 36px; align-items: flex-start; margin: 22px 0 30px; }
.figure { overflow-x: auto; max-width: 100%; }
.numbers { overflow-x: auto; max-width: 100%; padding-top: 14px; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: #666; font-size: 13px; padding-bottom: 6px; }
th { text-align: right; font-weight: 600; border-bottom: 1.5px solid #888; padding: 3px 10px; white-space: nowrap; }
td { text-align: right; border-bottom: 1px solid #eee; padding: 3px 10px; white-space: nowrap; }
th.name, td.name { text-align: left; }
td.name { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; font-size: 12.5px; }
tr.unsure td { color: #888; }
table.manifest th { border-bottom: 1px solid #eee; font-weight: 500; color: #666; vertical-align: top; }
table.manifest td { white-space: normal; overflow-wrap: anywhere; }
pre { background: #f6f6f6; padding: 12px 14px; overflow-x: auto; font-size: 12.5px; line-height: 1.5; }
noscript { color: #a33; }
@media print { body { max-width: none; } .row { break-inside: avoid; } }
"""

_BOOT = """
for (const place of document.querySelectorAll("div[data-figure]")) {
  const figure = JSON.parse(document.getElementById(place.dataset.figure).textContent);
  Plotly.newPlot(place, figure.data, figure.layout, {displaylogo: false, typesetMath: false,
    showSendToCloud: false, plotlyServerURL: "",
    modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"], toImageButtonOptions: {scale: 2}});
}
"""


def page(
    title: str,
    results: Mapping[str, Result],
    *,
    plan: str,
    manifest: Mapping[str, Any],
    summary: Sequence[str] = (),
    explanations: Mapping[str, str] | None = None,
    drawings: "Mapping[str, go.Figure] | None" = None,
) -> str:
    """The page as text. Arguments as for `write_study`, with results by name.

    plotly.js is inlined once. A content security policy allows the page's own two scripts, by their
    hashes, and no request to anywhere; every text is escaped besides.

    Raises:
        OutputError: a view does not fit its result.
    """
    explanations = explanations or {}
    body = [
        f"<h1>{_text(title)}</h1>",
        f'<p class="quiet">{_text(_subtitle(manifest))}</p>',
        "<noscript><p>The figures here need JavaScript; the folder figures/ has them as PNG and SVG.</p></noscript>",
    ]
    if summary:
        body.append(f'<ul class="findings">{"".join(f"<li>{_text(s)}</li>" for s in summary)}</ul>')
    figures: list[str] = []
    for name, drawing in (drawings or {}).items():
        body += [f"<h2>{_text(name)}</h2>", f'<div class="row">{_figure(drawing, figures)}</div>']
    for name, result in results.items():
        body.append(_section(name, result, explanations, figures))
    if plan:
        body += [
            "<h2>What was shared</h2>",
            '<p class="quiet">Passes through the model, as planned before anything ran, and who was served by'
            " each.</p>",
            f"<pre>{_text(plan)}</pre>",
        ]
    body += [
        "<h2>Manifest</h2>",
        '<p class="quiet">What these numbers depend on; also in manifest.json.</p>',
        _manifest(manifest),
    ]
    return _document(title, body, figures)


def drawing_page(title: str, drawing: "go.Figure") -> str:
    """One figure alone, as a page that opens offline and is as closed as `page`."""
    figures: list[str] = []
    body = ["<noscript><p>This figure needs JavaScript.</p></noscript>", _figure(drawing, figures)]
    return _document(title, body, figures)


def _document(title: str, body: Sequence[str], figures: Sequence[str]) -> str:
    """The whole page around its body and the JSON of its figures."""
    library = get_plotlyjs()
    scripts = " ".join(f"'sha256-{_hash(s)}'" for s in (library, _BOOT))
    policy = (
        f"default-src 'none'; script-src {scripts}; style-src 'unsafe-inline'; img-src data: blob:;"
        " base-uri 'none'; form-action 'none'"
    )
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>",
            *body,
            *figures,
            f"<script>{library}</script>\n<script>{_BOOT}</script>\n</body>\n</html>\n",
        ]
    )


def _figure(drawing: "go.Figure", figures: list[str]) -> str:
    """The place of a figure on the page; adds its JSON to `figures`."""
    number = f"figure-{len(figures)}"
    # "<" in a string of the JSON could otherwise end the script element that holds it
    safe = (drawing.to_json() or "{}").replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    figures.append(f'<script type="application/json" id="{number}">{safe}</script>')
    return f'<div class="figure"><div data-figure="{number}"></div></div>'


def _short(option: object) -> str:
    """An option in a line; the saved result has a long list whole."""
    text = str(option)
    return text if len(text) <= LONG else f"{text[: LONG // 2].rstrip(', ')} … ({len(text):,} characters)"


def _section(name: str, result: Result, explanations: Mapping[str, str], figures: list[str]) -> str:
    """One analyzer: what it does, its figures, and the rows that stand out in each (a figure with text shows its own).

    Adds to `figures`.
    """
    analyzer = str(result.meta.get("analyzer", name))
    out = [f'<h2 id="{_text(name)}">{_text(_spaced(analyzer))}</h2>']
    if analyzer in explanations:
        out += map(_paragraph, explanations[analyzer].strip().split("\n\n"))
    options = ", ".join(f"{k} = {_short(v)}" for k, v in dict(result.meta.get("options", {})).items())
    if options:
        out.append(f'<p class="quiet">Options: {_text(options)}.</p>')
    if not result.views:
        frame = result.table()
        out.append(_table(frame.head(ROWS), f"first rows of {len(frame)}" if len(frame) > 1 else ""))
    for view in result.views:
        if rows(result, view).empty:
            title = view.title or view.value
            out.append(f'<p class="quiet">{_text(title)}: nothing to show, every {_text(view.value)} is missing.</p>')
            continue
        beside = "" if view.text is not None else f'<div class="numbers">{_numbers(result, view)}</div>'
        out.append(f'<div class="row">{_figure(plotly_figure(result, view), figures)}{beside}</div>')
    if {"attribution", "token"} <= set(result.data.data_vars):
        n = int(result.data.sizes["example"])
        out.append(coloured_tokens(result, range(min(n, TEXTS))))
        out.append(f'<p class="quiet">first {TEXTS} of {n} texts</p>' if n > TEXTS else "")
    return "\n".join(out)


def _numbers(result: Result, view: View) -> str:
    """The rows of a figure that stand out, as a table."""
    frame: Any = rows(result, view)
    distance = (frame[view.value].astype(float) - (view.center or 0.0)).abs()
    order = distance.sort_values(ascending=False, kind="stable", na_position="last").index[:ROWS]
    if view.kind == "lines":
        order = order.sort_values()
    alone = [c for c in view.select if not isinstance(view.select[c], tuple | list)]
    top = frame.loc[order].drop(columns=[c for c in alone if c not in (view.value, view.text)])
    for column, text in ((view.y, view.y_text), (view.x, view.x_text)):
        if column is not None and text is not None and text not in top.columns:
            entries = np.asarray(top[column].unique())
            named = dict(zip(entries.tolist(), labels(result, view, column, text, entries) or (), strict=True))
            top.insert(top.columns.get_loc(column) + 1, text, [named[e] for e in top[column].tolist()])
    if len(top.columns) > COLUMNS:  # the axes, what is shown, and what is said of it
        own = {view.x, view.y, view.by, view.value, view.x_text, view.y_text, "ci_low", "ci_high", "p", "q"}
        axes = {str(dim) for dim in result.data[view.value].dims}
        top = top[[c for c in top.columns if c in own | axes or str(c).startswith(f"{view.value}_")]]
    told = (
        f"{len(top)} of {len(frame)} rows, largest first"
        if view.kind != "lines"
        else f"the {len(top)} largest of {len(frame)} rows"
    )
    return _table(top, told if len(top) < len(frame) else f"all {len(frame)} rows")


def _table(frame: pd.DataFrame, caption: str) -> str:
    numeric = {c: pd.api.types.is_numeric_dtype(frame[c]) and frame[c].dtype != bool for c in frame.columns}
    head = "".join(f"<th{'' if numeric[c] else _NAME}>{_text(str(c).replace('_', ' '))}</th>" for c in frame.columns)
    unsure = [False] * len(frame) if "q" not in frame.columns else (frame["q"].astype(float) >= ALPHA).tolist()
    lines: list[str] = []
    for values, grey in zip(frame.itertuples(index=False, name=None), unsure, strict=True):
        cells = "".join(
            f"<td{'' if numeric[c] else _NAME}>{_text(_cell(v))}</td>"
            for c, v in zip(frame.columns, values, strict=True)
        )
        lines.append(f"<tr{_UNSURE if grey else ''}>{cells}</tr>")
    note = "; grey: q ≥ .05" if any(unsure) else ""
    return f"<table><caption>{_text(caption + note)}</caption><tr>{head}</tr>{''.join(lines)}</table>"


_NAME, _UNSURE = ' class="name"', ' class="unsure"'


def _cell(value: Any) -> str:
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, float | np.floating):
        number = float(value)
        if np.isnan(number):
            return "–"
        return f"{number:.3f}" if 0.001 <= abs(number) < 1000 or number == 0 else f"{number:.2g}"
    return str(value) if isinstance(value, int | np.integer) else visible(str(value), 100)


def _manifest(manifest: Mapping[str, Any]) -> str:
    lines: list[str] = []
    for key, value in manifest.items():
        text = value if isinstance(value, str) else _flat(value)  # a command is there to be copied: whole
        lines.append(f"<tr><th{_NAME}>{_text(key.replace('_', ' '))}</th><td{_NAME}>{_text(text)}</td></tr>")
    return f'<table class="manifest">{"".join(lines)}</table>'


def _flat(value: Any) -> str:
    """Nested values on one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{k} ({_flat(v)})" if isinstance(v, Mapping) else f"{k} {_flat(v)}" for k, v in value.items())
    return ", ".join(map(_flat, value)) if isinstance(value, list | tuple) else _short(value)


def _subtitle(manifest: Mapping[str, Any]) -> str:
    told = [f"model {manifest['model']}"] if "model" in manifest else []
    told += [str(manifest[k]) for k in ("dtype", "created") if k in manifest]
    return " · ".join([*told, "made by mechinterp; opens offline"])


def _spaced(name: str) -> str:
    """CamelCase as words, the first one capital."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name).split()
    return " ".join([words[0], *(w.lower() for w in words[1:])]) if words else name


def _paragraph(text: str) -> str:
    """A paragraph of a docstring, or a list."""
    before, *items = re.split(r"(?:^|\n)- ", text)
    out = f"<p>{_text(_prose(before))}</p>" if before.strip() else ""
    return out + (f"<ul>{''.join(f'<li>{_text(_prose(item))}</li>' for item in items)}</ul>" if items else "")


def _prose(text: str) -> str:
    """A paragraph of a docstring without its markup."""
    return " ".join(re.sub(r"\*(\w[^*]*)\*", r"\1", text.replace("`", "")).split())


def _text(text: str) -> str:
    return html.escape(str(text), quote=True)


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
