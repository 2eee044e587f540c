"""A study on disk: tables, figures, results, one HTML page and a manifest, in one atomic step."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechinterp.core.result import Result
from mechinterp.report.files import (
    check_target,
    encode,
    named,
    put_result,
    slug,
    whole_folder,
    write_figures,
    write_picture,
    write_tables,
)

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from matplotlib.figure import Figure

MANIFEST = "manifest.json"
REPORT = "report.html"


def check_study(folder: str | Path) -> None:
    """Say now, before hours of work, that a study cannot be written there.

    Raises:
        OutputError: `folder` holds something other than an earlier study.
    """
    check_target(folder, MANIFEST)


def write_study(
    folder: str | Path,
    title: str,
    results: Sequence[Result],
    *,
    plan: str,
    manifest: Mapping[str, Any],
    summary: Sequence[str] = (),
    explanations: Mapping[str, str] | None = None,
    drawings: "Mapping[str, go.Figure] | None" = None,
    pictures: "Mapping[str, Figure] | None" = None,
    files: Mapping[str, str | bytes] | None = None,
) -> Path:
    """Write ``tables/``, ``figures/``, ``results/``, ``report.html`` and ``manifest.json`` into `folder`.

    All of it appears at once; an earlier study there is replaced. On any exception, Ctrl-C among
    them, nothing is left and an earlier study stays.

    Args:
        plan: what was shared, as text; with drawings, it may be empty.
        manifest: what the numbers depend on: versions, model, seed; plain values.
        summary: findings, a sentence each.
        explanations: analyzer name → what it does; an empty line between paragraphs.
        drawings: heading → a figure of no result's view, for the page and, as a page of its own, ``figures/``.
        pictures: heading → the same drawn by matplotlib, for ``figures/`` as PNG and SVG.
        files: path in the folder → text or bytes of further files.
    Returns:
        The path of the report.
    Raises:
        OutputError: `folder` holds something else, or cannot be written.
    """
    from mechinterp.report.html import drawing_page, page

    by_name = named(results)
    with whole_folder(folder, MANIFEST) as scratch:
        write_tables(by_name, scratch / "tables")
        write_figures(by_name, scratch / "figures")
        for name, result in by_name.items():
            put_result(result, scratch / "results" / name)
        for name, drawing in (drawings or {}).items():
            alone = drawing_page(f"{name}: {title}", drawing)
            (scratch / "figures" / f"{slug(name)}.html").write_text(alone, encoding="utf-8")
        for name, picture in (pictures or {}).items():
            write_picture(picture, scratch / "figures" / slug(name))
        for name, content in (files or {}).items():
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            (scratch / name).write_bytes(content.encode() if isinstance(content, str) else content)
        html = page(
            title, by_name, plan=plan, manifest=manifest, summary=summary, explanations=explanations, drawings=drawings
        )
        (scratch / REPORT).write_text(html, encoding="utf-8")
        there = sorted([p.relative_to(scratch).as_posix() for p in scratch.rglob("*") if p.is_file()] + [MANIFEST])
        content = {"format": "mechinterp-study-1", "title": title, **manifest, "files": there}
        (scratch / MANIFEST).write_text(json.dumps(encode(content, "manifest"), indent=2) + "\n", encoding="utf-8")
    return Path(folder) / REPORT
