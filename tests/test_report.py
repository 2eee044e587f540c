"""Figures, files and pages: the same numbers everywhere, whole or not at all, and never a token's own HTML."""

import base64
import dataclasses
import errno
import hashlib
import html.parser
import json
import resource
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import matplotlib.text
import numpy as np
import pandas as pd
import pytest
import xarray as xr

import mechinterp as mi
from mechinterp.core.display import visible
from mechinterp.errors import NeedsError, OutputError
from mechinterp.report import files, study
from mechinterp.report.figures import matplotlib_figure, plotly_figure
from mechinterp.report.html import page
from mechinterp.report.panels import Bars, Heat, Lines, every, panel

HOSTILE = "</script><img src=x onerror=alert(1)>"
LAYERS, HEADS = 5, 3


@pytest.fixture
def result() -> mi.Result:
    """Scores with q and intervals over text × layer × head, a top token each, and one missing cell."""
    rng = np.random.default_rng(0)
    shape = (2, LAYERS, HEADS)
    score = rng.normal(size=shape).astype(np.float32)
    score[0, 1, 2] = np.nan
    dims = ("text", "layer", "head")
    tokens = np.array([" Mary", "\n", HOSTILE, "$\\frac{$", "<b>x</b>", "日本", "é", "a" * 30, "", "&lt;", "\x00", "“"])
    data = xr.Dataset(
        {
            "score": (dims, score),
            "ci_low": (dims, score - 0.5),
            "ci_high": (dims, score + 0.25),
            "q": (dims, np.where(rng.random(shape) < 0.4, 0.01, 0.2)),
            "special": (dims, rng.random(shape) < 0.5),
            "token": (dims, np.resize(tokens, shape)),
        },
        {"text": ["prompts", "random"], "layer": np.arange(LAYERS), "head": np.arange(HEADS)},
        {"unit": "logits"},
    )
    views = (
        mi.View(
            "heatmap", "score", "head", "layer", title="Scores", unit="logits", center=0.5, select={"text": "prompts"}
        ),
        mi.View("heatmap", "score", "head", "layer", text="token", select={"text": "random"}),
        mi.View("lines", "score", "layer", by="head", select={"text": "random"}),
        mi.View("bars", "score", "layer", select={"text": "random", "head": 1}),
    )
    return mi.Result(data, {"analyzer": "MadeUp", "options": {"k": "5"}}, views)


def mesh(figure: Any) -> np.ndarray:
    """The numbers a matplotlib heatmap shows, missing ones as NaN."""
    return figure.axes[0].collections[0].get_array().filled(np.nan)


def drawn(figure: Any) -> list[str]:
    return [t.get_text() for t in figure.axes[0].texts if not isinstance(t, matplotlib.text.Annotation)]


def siblings(path: Path) -> list[str]:
    return sorted(p.name for p in path.parent.iterdir())


# Panels and figures


def test_heatmap_is_the_same_array_in_both_back_ends(result: mi.Result) -> None:
    expected = result.data["score"].sel(text="prompts").values
    ours, theirs = plotly_figure(result, result.views[0]), matplotlib_figure(result, result.views[0])
    assert np.isnan(expected[1, 2])
    np.testing.assert_array_equal(np.asarray(ours.data[0].z), expected)
    np.testing.assert_array_equal(mesh(theirs), expected)
    reach = np.nanmax(np.abs(expected - 0.5))
    assert (ours.data[0].zmin, ours.data[0].zmax) == pytest.approx((0.5 - reach, 0.5 + reach))
    assert theirs.axes[0].collections[0].get_clim() == pytest.approx((0.5 - reach, 0.5 + reach))


def test_layer_0_is_at_the_bottom(result: mi.Result) -> None:
    low, high = matplotlib_figure(result, result.views[0]).axes[0].get_ylim()
    assert low < high
    assert plotly_figure(result, result.views[0]).layout.yaxis.autorange is True
    assert list(plotly_figure(result, result.views[0]).data[0].y) == [str(i) for i in range(LAYERS)]


def test_names_are_read_from_the_top_in_their_own_order(result: mi.Result) -> None:
    by_text = mi.Result(result.data, {}, (mi.View("heatmap", "score", "layer", "text", select={"head": 0}),))
    shown = panel(by_text, by_text.views[0])
    assert isinstance(shown, Heat)
    assert (shown.y, shown.upward) == (("prompts", "random"), False)
    low, high = matplotlib_figure(by_text, by_text.views[0]).axes[0].get_ylim()
    assert low > high


def test_dots_mark_exactly_the_cells_with_small_q(result: mi.Result) -> None:
    significant = result.data["q"].sel(text="prompts").values < 0.05
    assert 0 < significant.sum() < significant.size
    text = np.asarray(plotly_figure(result, result.views[0]).data[0].text)
    np.testing.assert_array_equal(text == "•", significant)
    marks = matplotlib_figure(result, result.views[0]).axes[0].texts
    places = {(int(t.get_position()[1]), int(t.get_position()[0])) for t in marks if t.get_text() == "•"}
    assert places == {(int(i), int(j)) for i, j in np.argwhere(significant)}
    assert "q < .05" in panel(result, result.views[0]).note


def test_a_view_may_choose_what_is_marked(result: mi.Result) -> None:
    data = result.data.assign(specialised=result.data["score"] > 0)
    shown = panel(mi.Result(data), dataclasses.replace(result.views[0], mark="specialised"))
    assert isinstance(shown, Heat)
    assert shown.marked is not None
    np.testing.assert_array_equal(shown.marked, data["score"].sel(text="prompts").values > 0)
    assert shown.note == "• specialised"


def test_what_is_left_over_is_averaged_and_loses_q_and_interval(result: mi.Result) -> None:
    view = mi.View("heatmap", "score", "head", "layer", text="token")
    shown = panel(result, view)
    assert isinstance(shown, Heat)
    np.testing.assert_allclose(shown.values, result.data["score"].mean("text").values, rtol=1e-6)
    assert shown.q is None
    assert shown.text is None
    lines = panel(result, mi.View("lines", "score", "layer"))
    assert isinstance(lines, Lines)
    assert lines.series[0].low is None
    np.testing.assert_allclose(lines.series[0].values, result.data["score"].mean(["text", "head"]).values, rtol=1e-5)


def test_lines_have_their_interval_in_both_back_ends(result: mi.Result) -> None:
    data = result.data.sel(text="random")
    ours, theirs = plotly_figure(result, result.views[2]), matplotlib_figure(result, result.views[2])
    lines = [t for t in ours.data if t.name is not None]
    assert [t.name for t in lines] == ["0", "1", "2"]
    for head, trace in enumerate(lines):
        values = data["score"].sel(head=head).values
        np.testing.assert_array_equal(np.asarray(trace.y, dtype=np.float32), values)
        np.testing.assert_array_equal(np.asarray(theirs.axes[0].lines[head].get_ydata(), dtype=np.float32), values)
        np.testing.assert_allclose(trace.error_y.array, 0.25, atol=1e-6)
        np.testing.assert_allclose(trace.error_y.arrayminus, 0.5, atol=1e-6)
    band = ours.data[0]
    assert band.fill == "toself"
    np.testing.assert_array_equal(np.asarray(band.y[:LAYERS], dtype=np.float32), data["ci_high"].sel(head=0).values)


def test_bars_are_the_largest_by_absolute_value_in_both_back_ends() -> None:
    values = np.linspace(-3, 4, 40)
    names = [f"m{i}" for i in range(40)]
    data = xr.Dataset(
        {"mean": ("component", values), "q": ("component", np.where(values > 0, 0.0, 1.0))}, {"component": names}
    )
    view = mi.View("bars", "mean", "component")
    made = mi.Result(data, {}, (view,))
    order = np.argsort(-np.abs(values), kind="stable")[:15]
    shown = panel(made, view)
    assert isinstance(shown, Bars)
    assert shown.names == tuple(names[i] for i in order)
    np.testing.assert_array_equal(shown.solid, values[order] > 0)
    np.testing.assert_array_equal(np.asarray(plotly_figure(made, view).data[0].x), values[order])
    np.testing.assert_array_equal([p.get_width() for p in matplotlib_figure(made, view).axes[0].patches], values[order])


def test_bars_are_not_pale_where_nothing_could_be_tested() -> None:
    data = xr.Dataset({"mean": ("c", [1.0, 2.0]), "q": ("c", [np.nan, np.nan])}, {"c": ["a", "b"]})
    shown = panel(mi.Result(data), mi.View("bars", "mean", "c"))
    assert isinstance(shown, Bars)
    assert shown.solid.all()
    assert "pale" not in shown.note


@pytest.mark.parametrize(
    ("view", "said"),
    [
        (mi.View("heatmap", "nothing", "head", "layer"), "'nothing'"),
        (mi.View("heatmap", "score", "haed", "layer"), "'haed'"),
        (mi.View("heatmap", "score", "head"), "no y"),
        (mi.View("lines", "score", "layer", select={"text": "gone"}), "text 'gone', which is none of prompts, random"),
        (mi.View("lines", "score", "layer", select={"texts": "gone"}), "'texts'"),
    ],
)
def test_a_view_that_does_not_fit_says_what_is_wrong(result: mi.Result, view: mi.View, said: str) -> None:
    for draw in (plotly_figure, matplotlib_figure):
        with pytest.raises(OutputError, match=said):
            draw(result, view)


def test_hostile_tokens_are_text_for_plotly(result: mi.Result) -> None:
    data = result.data.assign(token=(result.data["token"].dims, np.full((2, LAYERS, HEADS), HOSTILE)))
    trace = plotly_figure(mi.Result(data, {}, result.views), result.views[1]).data[0]
    shown = [*np.asarray(trace.text).ravel(), *np.asarray(trace.customdata)[..., 0].ravel()]
    assert not [s for s in shown if "<" in s]
    assert f"“{HOSTILE}”".replace("<", "&lt;").replace(">", "&gt;") in shown


def test_matplotlib_draws_any_token_as_it_is(result: mi.Result, tmp_path: Path) -> None:
    figure = matplotlib_figure(result, result.views[1])
    figure.savefig(tmp_path / "a.svg")  # "$\frac{$" as a formula, or a missing glyph, would fail or warn here
    assert not any(t.get_parse_math() for t in figure.findobj(matplotlib.text.Text))
    expected = {visible(t, 7) for t in result.data["token"].sel(text="random").values.ravel()}
    assert {t.replace("•", "") for t in drawn(figure)} - {""} == {t.replace("日本", "□□") for t in expected} - {""}


def test_visible_shows_what_cannot_be_seen() -> None:
    assert visible(" a\nb\x00\u202e") == "␣a\\nb\\x00\\u202e"
    assert visible("abcdefgh", 4) == "abc…"
    assert visible("abcd", 4) == "abcd"


@pytest.mark.parametrize("n", [1, 7, 30, 32, 33, 100, 1234])
def test_ticks_are_few_and_even(n: int) -> None:
    ticks = every(n, 32)
    assert ticks[0] == 0
    assert len(ticks) <= 32
    assert len(set(np.diff(ticks))) <= 1
    assert n > 32 or ticks == list(range(n))


def test_a_view_without_a_number_is_said_not_drawn(result: mi.Result, tmp_path: Path) -> None:
    scores = result.data["score"].where(result.data["text"] == "random")
    empty = mi.Result(result.data.assign(score=scores), {"analyzer": "MadeUp"}, result.views[:3])
    with pytest.raises(OutputError, match="every score is missing"):
        empty.figure(0)
    report = write(tmp_path / "s", empty).read_text()
    assert "Scores: nothing to show, every score is missing." in report
    assert report.count('type="application/json"') == 2
    assert len(list((tmp_path / "s" / "figures").iterdir())) == 4


def test_result_figure_is_the_plotly_one(result: mi.Result) -> None:
    assert result.figure(2).to_json() == plotly_figure(result, result.views[2]).to_json()
    with pytest.raises(OutputError, match="4 figures"):
        result.figure(4)


# Tables


def test_padding_leaves_no_rows_in_a_table() -> None:
    parts = [
        mi.Part(
            {"prob": (np.ones((1, n)), "example position"), "id": (np.ones((1, n), int), "example position")}, rows=(i,)
        )
        for i, n in enumerate((2, 4))
    ]
    made = mi.Result.of(parts)
    assert made.data["id"].values.min() == -1
    assert len(made.table("prob")) == 6
    assert made.table("prob")["id"].min() == 1


def test_a_number_alone_is_a_table_of_one_row() -> None:
    table = mi.Result(xr.Dataset({"a": ((), 1.5), "b": ((), 2)})).table()
    assert table.to_dict("list") == {"a": [1.5], "b": [2]}


def test_tables_read_back_as_they_were(result: mi.Result, tmp_path: Path) -> None:
    mixed = xr.Dataset({"effect": ("position", [1.0, 2.0])}, {"position": np.array(["end", 3], dtype=object)})
    results = files.named([result, mi.Result(mixed, {"analyzer": "MadeUp"})])
    assert list(results) == ["made-up", "made-up-2"]
    written = files.write_tables(results, tmp_path / "t")
    assert sorted(written) == sorted((tmp_path / "t").iterdir())
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "t" / "made-up-score.parquet"), result.table())
    csv = pd.read_csv(tmp_path / "t" / "made-up-score.csv")
    np.testing.assert_array_equal(csv["score"].astype(np.float32), result.table()["score"])
    assert csv["token"].fillna("").tolist() == result.table()["token"].tolist()
    assert pd.read_parquet(tmp_path / "t" / "made-up-2-effect.parquet")["position"].tolist() == ["end", "3"]


def test_figures_are_files_that_open_and_do_not_change(result: mi.Result, tmp_path: Path) -> None:
    one = mi.Result(result.data, result.meta, result.views[3:])
    first, second = (files.write_figures(files.named([one]), tmp_path / d) for d in "ab")
    assert [p.suffix for p in first] == [".png", ".svg"]
    assert first[0].read_bytes().startswith(b"\x89PNG")
    assert ET.parse(first[1]).getroot().tag.endswith("svg")
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]


# Saving and loading


def test_a_result_comes_back_exactly(result: mi.Result, tmp_path: Path) -> None:
    dims = ("layer", "head")
    shape = (LAYERS, HEADS)
    data = result.data.assign(
        half=(dims, np.full(shape, np.inf, np.float16)),
        count=(dims, np.full(shape, -1, np.int8)),
        alone=((), np.float64(np.nan)),
        none=("empty", np.zeros(0, np.int32)),
        names=("layer", np.array(["é", "\n", "", HOSTILE, "日本"], dtype=np.dtypes.StringDType())),
    ).assign_coords(position=("layer", np.array(["end", 3, -1, None, 2.5], dtype=object)))
    data["score"].attrs["why"] = "because"
    meta = {"nan": float("nan"), "t": (1, (2.5, None)), "inf": -np.inf, 3: {"$x": [True]}, "np": np.int64(7)}
    saved = mi.Result(data, meta, result.views)
    back = mi.Result.load(saved.save(tmp_path / "r"))
    xr.testing.assert_identical(back.data, data)
    assert {n: v.dtype for n, v in back.data.variables.items()} == {n: v.dtype for n, v in data.variables.items()}
    assert [type(p) for p in back.data["position"].values] == [str, int, int, type(None), float]
    assert list(back.data.data_vars) == list(data.data_vars)
    assert back.views == result.views
    assert np.isnan(back.meta["nan"])
    assert {k: v for k, v in back.meta.items() if k != "nan"} == {k: v for k, v in meta.items() if k != "nan"}
    assert isinstance(back.meta["t"], tuple)
    assert siblings(tmp_path / "r") == ["r"]
    json.loads((tmp_path / "r" / "result.json").read_text(), parse_constant=pytest.fail)  # strict JSON has no NaN


def test_saving_again_replaces_and_never_touches_what_is_not_ours(result: mi.Result, tmp_path: Path) -> None:
    result.save(tmp_path / "r")
    result.with_meta(again=1).save(tmp_path / "r")
    assert mi.Result.load(tmp_path / "r").meta["again"] == 1
    (tmp_path / "r" / "notes.md").write_text("mine")
    with pytest.raises(OutputError, match=r"notes\.md"):
        result.save(tmp_path / "r")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text('{"name": "somebody else\'s"}')
    with pytest.raises(OutputError, match=r"manifest\.json"):
        files.check_target(tmp_path / "other", "manifest.json")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="is a file"):
        result.save(tmp_path / "file")
    assert (tmp_path / "r" / "notes.md").read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "other", "r"]


def test_what_cannot_be_saved_is_named(result: mi.Result, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"meta\.options\.f holds a function"):
        result.with_meta(options={"f": len.__class__ and (lambda: 0)}).save(tmp_path / "r")
    times = mi.Result(xr.Dataset({"t": ("x", np.zeros(2, "datetime64[ns]"))}))
    with pytest.raises(OutputError, match="'t' holds datetime64"):
        times.save(tmp_path / "r")
    assert list(tmp_path.iterdir()) == []


def test_damaged_files_are_one_sentence(result: mi.Result, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no saved result"):
        mi.Result.load(tmp_path)
    folder = result.save(tmp_path / "r")
    numbers, text = folder / "numbers.safetensors", folder / "result.json"
    whole, words = numbers.read_bytes(), text.read_text()
    for damage in (whole[:-10], whole[:5], b""):
        numbers.write_bytes(damage)
        with pytest.raises(OutputError, match="damaged"):
            mi.Result.load(folder)
    numbers.write_bytes(whole)
    for damage in (words[:-20], "[]", "{}", words.replace("mechinterp-result-1", "mechinterp-result-9")):
        text.write_text(damage)
        with pytest.raises(OutputError, match=r"damaged|format"):
            mi.Result.load(folder)
    numbers.unlink()
    text.write_text(words)
    with pytest.raises(OutputError, match="No such file"):
        mi.Result.load(folder)


def test_a_full_disk_leaves_the_earlier_result_alone(
    result: mi.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result.save(tmp_path / "r")

    def full(self: Path, text: str, **_: Any) -> None:
        assert (self.parent / "numbers.safetensors").exists()  # midway
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        with pytest.raises(OutputError, match="No space left on device; free some space"):
            result.with_meta(again=1).save(tmp_path / "r")
        with pytest.raises(OutputError, match="No space"):
            result.save(tmp_path / "new")
    assert siblings(tmp_path / "r") == ["r"]
    assert "again" not in mi.Result.load(tmp_path / "r").meta


def test_the_earlier_result_comes_back_when_the_last_step_fails(
    result: mi.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result.save(tmp_path / "r")
    replace, calls = files.os.replace, []

    def second_fails(a: Any, b: Any) -> None:
        calls.append(a)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(a, b)

    monkeypatch.setattr(files.os, "replace", second_fails)
    with pytest.raises(KeyboardInterrupt):
        result.with_meta(again=1).save(tmp_path / "r")
    assert len(calls) == 3
    assert siblings(tmp_path / "r") == ["r"]
    assert "again" not in mi.Result.load(tmp_path / "r").meta


# Studies and pages


def write(folder: Path, result: mi.Result, **more: Any) -> Path:
    return study.write_study(folder, "A study", [result], plan="one pass", manifest={"model": "tiny"}, **more)


def test_a_study_holds_everything_and_lists_it(result: mi.Result, tmp_path: Path) -> None:
    report = write(tmp_path / "deep" / "s", result, summary=["It works."])
    assert report == tmp_path / "deep" / "s" / "report.html"
    folder = report.parent
    there = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["files"] == there
    assert manifest["model"] == "tiny"
    assert {p.split("/")[0] for p in there} == {"figures", "tables", "results", "report.html", "manifest.json"}
    assert len(list((folder / "figures").glob("*.png"))) == len(result.views)
    xr.testing.assert_identical(mi.Result.load(folder / "results" / "made-up").data, result.data)
    assert "It works." in report.read_text()
    write(folder, mi.Result(result.data, {"analyzer": "Second"}, result.views[2:3]))
    assert [p.name for p in (folder / "results").iterdir()] == ["second"]  # the earlier study is gone, whole
    assert siblings(folder) == ["s"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device"), ValueError()])
def test_a_study_that_fails_at_its_end_leaves_nothing(
    result: mi.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    small = mi.Result(result.data, result.meta, result.views[2:3])
    before = write(tmp_path / "s", small, summary=["before"]).read_bytes()

    def fails(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr("mechinterp.report.html.page", fails)
    wanted = OutputError if isinstance(error, OSError) else type(error)
    for folder in (tmp_path / "s", tmp_path / "new"):
        with pytest.raises(wanted):
            write(folder, small)
    assert siblings(tmp_path / "s") == ["s"]
    assert (tmp_path / "s" / "report.html").read_bytes() == before


@pytest.mark.parametrize("limit", [300, 5_000, 1_000_000])
def test_a_real_write_that_the_system_refuses_leaves_nothing(result: mi.Result, tmp_path: Path, limit: int) -> None:
    """Files may not grow beyond `limit` bytes: the first table, a figure, or the report is cut short."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OutputError, match=r"cannot write .*File too large; choose"):
            write(tmp_path / "s", mi.Result(result.data, result.meta, result.views[2:3]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


class Reader(html.parser.HTMLParser):
    """Tags with their attributes, and the text of script elements."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] == "script" and self.scripts[-1][1] == "":
            self.scripts[-1] = (self.scripts[-1][0], data)
        else:
            self.text += data


@pytest.fixture
def read(result: mi.Result) -> Reader:
    """A page where every text that can be hostile is."""
    data = result.data.assign_coords(text=[HOSTILE, "random"]).rename(special="<i>special</i>")
    views = (
        mi.View(
            "heatmap", "score", "head", "layer", text="token", title=HOSTILE, unit=HOSTILE, select={"text": HOSTILE}
        ),
        mi.View("lines", "score", "layer", by="text", title=HOSTILE, select={"head": 0}),
        mi.View("bars", "score", "token", title=HOSTILE),
    )
    hostile = mi.Result(data, {"analyzer": HOSTILE, "options": {HOSTILE: HOSTILE}}, views)
    reader = Reader()
    reader.feed(
        page(
            HOSTILE,
            {HOSTILE: hostile},
            plan=HOSTILE,
            manifest={HOSTILE: HOSTILE, "model": HOSTILE, "versions": {HOSTILE: [HOSTILE]}},
            summary=[HOSTILE],
            explanations={HOSTILE: HOSTILE},
        )
    )
    return reader


def test_hostile_text_is_only_ever_text(read: Reader) -> None:
    allowed = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "ul", "li", "div", "table", "caption"}
    allowed |= {"tr", "th", "td", "pre", "script", "noscript"}
    assert {tag for tag, _ in read.tags} <= allowed
    names = {name for _, attributes in read.tags for name in attributes}
    assert names <= {"lang", "charset", "http-equiv", "content", "name", "class", "id", "data-figure", "type"}
    assert read.text.count(HOSTILE) >= 8
    assert len(read.scripts) == 5  # three figures, the library and what starts it


def test_a_list_in_an_explanation_is_a_list(result: mi.Result) -> None:
    told = "Of *two* kinds:\n- ``a``, which\n  is first;\n- <b>."
    text = page("t", {"r": result}, plan="", manifest={}, explanations={"MadeUp": told})
    assert "<p>Of two kinds:</p><ul><li>a, which is first;</li><li>&lt;b&gt;.</li></ul>" in text
    assert "What was shared" not in text  # where there is no plan


def test_a_long_option_is_shortened(result: mi.Result) -> None:
    groups = str(("film",) * 216)
    long = result.with_meta(options={"groups": groups})
    text = page("t", {"r": long}, plan="", manifest={"analyzers": [groups]})
    assert groups not in text and text.count(f" … ({len(groups):,} characters)") == 2


def test_the_page_can_run_and_fetch_nothing_else(read: Reader) -> None:
    policy = next(a["content"] for t, a in read.tags if t == "meta" and "http-equiv" in a) or ""
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert "http" not in policy
    runnable = [text for attributes, text in read.scripts if attributes.get("type") != "application/json"]
    hashes = {f"'sha256-{base64.b64encode(hashlib.sha256(t.encode()).digest()).decode()}'" for t in runnable}
    assert set(rules["script-src"].split()) == hashes
    assert len(runnable) == 2
    first = next(i for i, (t, _) in enumerate(read.tags) if t in ("script", "style"))
    assert any("http-equiv" in a for _, a in read.tags[:first])  # the policy stands before what it governs


def test_figures_in_the_page_are_the_figures(read: Reader, result: mi.Result) -> None:
    places = [a["data-figure"] for _, a in read.tags if "data-figure" in a]
    data = {a["id"]: json.loads(text) for a, text in read.scripts if a.get("type") == "application/json"}
    assert sorted(data) == sorted(str(p) for p in places)
    z = data["figure-0"]["data"][0]["z"]
    values = np.frombuffer(base64.b64decode(z["bdata"]), z["dtype"]).reshape(LAYERS, HEADS)
    np.testing.assert_array_equal(values, result.data["score"].sel(text="prompts").values)


def test_a_result_without_figures_still_has_its_numbers(result: mi.Result) -> None:
    made = page("t", {"r": mi.Result(result.data, {"analyzer": "Plain"})}, plan="", manifest={})
    assert f"{float(result.data['score'][0, 0, 0]):.3f}" in made
    with pytest.raises(NeedsError):
        result.table("gone")
