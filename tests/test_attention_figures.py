"""Figures of attention patterns: they show the pattern's own numbers, are bounded, and every token is only text."""

import html
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mechinterp as mi
from mechinterp.errors import OutputError
from mechinterp.report import attention
from mechinterp.report.attention import (
    attention_figures,
    head_grid,
    neurons,
    one_head,
    overview,
    query_lines,
    strongest,
)
from mechinterp.report.html import drawing_page

TEXT = "Mary had a book and John had a ring"
HOSTILE = [
    "</script>",
    "<img src=x onerror=document.title='no'>",
    "$x$",
    "<b>b</b>",
    "\n",
    "&lt;",
    "'\"",
    "日本",
    " to",
]


@pytest.fixture(scope="module")
def result(llama: mi.Model) -> mi.Result:
    return mi.run(llama, [TEXT, "Mary had"], mi.AttentionPatterns(pair=("end", 0)))


@pytest.fixture
def hostile(result: mi.Result) -> mi.Result:
    """The same patterns of tokens that would do harm if they were more than text."""
    data = result.data.isel(example=[0])
    names = np.array([HOSTILE], dtype=str)
    return mi.Result(data.assign(key_token=(("example", "key"), names), query_token=(("example", "query"), names)))


def pattern(result: mi.Result, layer: int, head: int) -> Any:
    return result.data["pattern"].sel(layer=layer, head=head, example=0).values


def test_heads_show_their_own_numbers(result: mi.Result) -> None:
    heads = [(2, 3), (0, 1)]
    for make in (head_grid, one_head):
        figure = make(result, heads)
        for trace, head in zip(figure.data, heads, strict=True):
            np.testing.assert_allclose(trace.z, pattern(result, *head))
            assert list(trace.x) == list(trace.y) and trace.x[1] == "␣had (1)"
    menu: Any = one_head(result, heads).layout
    buttons = menu.updatemenus[0].buttons
    assert [b.label for b in buttons] == ["layer 2, head 3", "layer 0, head 1"]
    assert [b.args[0]["visible"] for b in buttons] == [[True, False], [False, True]]


def test_the_overview_has_every_head_in_its_place(result: mi.Result) -> None:
    figure = overview(result)
    cells, points = figure.data
    n = result.data.sizes["query"]
    for layer in range(3):
        for head in range(4):
            y, x = (2 - layer) * (n + 1), head * (n + 1)
            np.testing.assert_allclose(cells.z[y : y + n, x : x + n], pattern(result, layer, head))
    assert points.hovertext[0].startswith("layer 2, head 0<br>on the first token")
    strong = np.tril(pattern(result, 2, 0), -1)
    strong[:, 0] = 0
    assert f"{strong.max():.2f}" in points.hovertext[0]


def test_lines_are_the_shares_of_each_query(result: mi.Result) -> None:
    figure: Any = query_lines(result, (1, 2), query=4)
    rows = pattern(result, 1, 2)
    for q in range(len(rows)):
        band, points = figure.data[2 + 2 * q : 4 + 2 * q]
        shown = {
            int(y): float(t.rsplit("share ", 1)[1]) for y, t in zip(points.y[1:], points.hovertext[1:], strict=True)
        }
        assert shown == {k: pytest.approx(p, abs=5e-5) for k, p in enumerate(rows[q]) if p >= 0.005}
        assert (band.visible, points.visible) == (q == 4, q == 4)
        ends = np.array([v if v is not None else np.nan for v in band.y], float).reshape(-1, 49)
        widths = ends[:, 47] - ends[:, 0]  # where a band leaves its query
        np.testing.assert_allclose(widths, 0.8 * np.array([rows[q][k] for k in shown]), atol=1e-6)
    on = figure.layout.updatemenus[0].buttons[4].args[0]["visible"]
    assert len(on) == len(figure.data) and on[:2] == [True, True] and sum(on) == 4 and on[10] and on[11]


def test_neurons_add_up_to_what_the_menu_says(result: mi.Result) -> None:
    figure: Any = neurons(result, [(1, 3)])
    total = float(np.sum(figure.data[0].y))
    score = float(result.data["score"].sel(layer=1, head=3, example=0))
    assert figure.layout.updatemenus[0].buttons[0].label == f"layer 1, head 3: sum {total:.2f}, scaled {score:.2f}"
    assert total / 8**0.5 == pytest.approx(score, abs=1e-4)


def test_long_texts_are_pooled_and_many_heads_left_out_and_both_said(llama: mi.Model) -> None:
    ids = [list(range(10, 135))]
    long = mi.run(llama, ids, mi.AttentionPatterns(layers=(1,)))
    grid: Any = head_grid(long)
    whole = pattern(long, 1, 0)
    assert grid.data[0].z.shape == (42, 42)
    assert grid.data[0].z[41, 5] == pytest.approx(whole[123:, 15:18].max())
    assert "the largest of 3 × 3 tokens" in grid.layout.title.subtitle.text
    lines: Any = query_lines(long, (1, 0))
    assert len(lines.data) == 4 and "60 strongest keys of 125" in lines.layout.title.subtitle.text
    size = max(len(figure.to_json() or "") for figure in attention_figures(long).values())
    assert size < 3_000_000


def test_the_strongest_heads_are_shown_where_there_are_too_many(
    result: mi.Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "MOST_HEADS", 5)
    figure: Any = one_head(result)
    focus = result.data["focus"].isel(example=0)
    order = [(int(focus["layer"][i]), int(focus["head"][j])) for i, j in np.argwhere(focus.values >= 0)]
    order.sort(key=lambda head: -float(focus.sel(layer=head[0], head=head[1])))
    assert [b.label for b in figure.layout.updatemenus[0].buttons] == [f"layer {a}, head {b}" for a, b in order[:5]]
    assert "the 5 of 12 heads" in figure.layout.title.subtitle.text
    assert strongest(result, most=2) == order[:2]


def test_every_token_is_only_text(hostile: mi.Result, tmp_path: Path) -> None:
    """In the source, and, where there is a browser, on the page."""
    browser = next((b for b in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if b), None)
    for name, figure in attention_figures(hostile).items():
        source = drawing_page(name, figure)
        assert source.count("</script>") == 3 and "<img" not in source.split("<script", 1)[0]
        inside = re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', source, re.DOTALL)
        assert len(inside) == 1 and "<" not in inside[0]
        json = figure.to_json() or ""
        assert "<img" not in json and "\\u003cimg" not in json  # what plotly reads is escaped, too
        if browser is None:
            continue
        page = tmp_path / "page.html"
        page.write_text(source, encoding="utf-8")
        arguments = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000", "--dump-dom"]
        done = subprocess.run([browser, *arguments, page.as_uri()], capture_output=True, text=True, timeout=120)
        dom = re.sub(r"<script.*?</script>", "", done.stdout, flags=re.DOTALL)
        assert f"<title>{html.escape(name)}</title>" in dom and "main-svg" in dom, done.stderr
        assert "<img" not in dom
        if name.startswith(("One head", "What one")):
            assert "&lt;/script&gt;" in dom


def test_what_there_is_not_is_said(result: mi.Result, llama: mi.Model) -> None:
    with pytest.raises(OutputError, match="no layer 3, head 0; they have layers 0, 1, 2 with heads 0, 1, 2, 3"):
        head_grid(result, [(3, 0)])
    with pytest.raises(OutputError, match="at least one layer and head"):
        one_head(result, [])
    with pytest.raises(OutputError, match="no pair"):
        neurons(mi.run(llama, TEXT, mi.AttentionPatterns()))
    with pytest.raises(OutputError, match="position of 0 to 8"):
        query_lines(result, (0, 0), query=9)
    with pytest.raises(OutputError, match="none of number 2"):
        overview(result, example=2)
    with pytest.raises(OutputError, match="no attention patterns"):
        overview(mi.run(llama, TEXT, mi.AttentionProfile()))
    assert overview(result, example=1).data[0].z.shape == (3 * 3 - 1, 4 * 3 - 1)  # of two tokens
