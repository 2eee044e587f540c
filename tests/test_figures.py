"""Heatmaps side by side, and columns labelled with tokens: the same numbers and labels in both back-ends."""

import dataclasses
import html
import itertools
import json
from dataclasses import replace
from typing import Any

import matplotlib.text
import numpy as np
import pytest
import xarray as xr

import mechinterp as mi
from mechinterp.core.display import visible
from mechinterp.errors import OutputError
from mechinterp.report.figures import drawable, matplotlib_figure, plotly_figure
from mechinterp.report.html import page
from mechinterp.report.panels import Bars, Heat, Heats, panel

HOSTILE = "</script><img src=x onerror=alert(1)>"
TOKENS = ["</script>", "<img onerror>", "$x$", "\n", " to", " to", "日本", "&lt;"]
KINDS = ("state", "mlp", "attn")
LAYERS = 3
TRIPLE = mi.View("heatmap", "effect", "position", "layer", by="kind", x_text="token", unit="prob", title="Trace")


@pytest.fixture
def result() -> mi.Result:
    """Effects of three sizes over kind × layer × position; position 2 has another token in the second example."""
    rng = np.random.default_rng(0)
    dims, shape = ("kind", "layer", "position"), (len(KINDS), LAYERS, len(TOKENS))
    effect = rng.normal(size=shape) * np.array([1.0, 0.3, 0.1])[:, None, None]
    effect[1, 2, 4] = np.nan
    token = np.array([TOKENS, TOKENS], dtype=object)
    token[1, 2], token[1, 7] = " else", ""  # the second example is shorter
    data = xr.Dataset(
        {
            "effect": (dims, effect),
            "q": (dims, np.where(np.abs(effect) > 0.4, 0.01, 0.2)),
            "token": (("example", "position"), token.astype(str)),
            "one": ("position", np.array(TOKENS)),
        },
        {"kind": list(KINDS), "layer": np.arange(LAYERS), "position": np.arange(len(TOKENS)), "example": [0, 1]},
    )
    return mi.Result(data, {"analyzer": "MadeUp"}, (TRIPLE,))


def meshes(figure: Any) -> list[Any]:
    """The heatmaps of a matplotlib figure, from the left, without colour bars."""
    return [a.collections[0] for a in figure.axes if a.get_xlabel()]


def heats(result: mi.Result, view: mi.View) -> Heats:
    shown = panel(result, view)
    assert isinstance(shown, Heats)
    return shown


def labels(result: mi.Result, view: mi.View) -> tuple[str, ...]:
    shown = panel(result, view)
    first = shown.panels[0] if isinstance(shown, Heats) else shown
    assert isinstance(first, Heat)
    assert first.x_text is not None
    return first.x_text


# Panels


@pytest.mark.parametrize("scale", ["own", "shared"])
def test_each_panel_is_its_own_slice_in_both_back_ends(result: mi.Result, scale: Any) -> None:
    view = dataclasses.replace(TRIPLE, scale=scale)
    ours, theirs = plotly_figure(result, view), matplotlib_figure(result, view)
    drawn = meshes(theirs)
    assert [heat.title for heat in heats(result, view).panels] == list(KINDS)
    assert len(ours.data) == len(drawn) == len(KINDS)
    assert {a.text for a in ours.layout.annotations} == set(KINDS)
    assert [a.get_title() for a in theirs.axes if a.get_xlabel()] == list(KINDS)
    for kind, trace, mesh in zip(KINDS, ours.data, drawn, strict=True):
        expected = result.data["effect"].sel(kind=kind).values
        np.testing.assert_array_equal(np.asarray(trace.z), expected)
        np.testing.assert_array_equal(mesh.get_array().filled(np.nan), expected)
        assert mesh.get_clim() == (trace.zmin, trace.zmax)


@pytest.mark.parametrize("center", [None, 0.0])
def test_a_shared_scale_is_one_range_and_one_colour_bar(result: mi.Result, center: float | None) -> None:
    own = heats(result, dataclasses.replace(TRIPLE, center=center))
    ranges = [(one.low, one.high) for one in own.panels]
    assert len(set(ranges)) == len(KINDS)
    alone = dataclasses.replace(TRIPLE, by=None, center=center, select={"kind": "mlp"})
    single = panel(result, alone)
    assert isinstance(single, Heat)
    assert ranges[1] == (single.low, single.high)  # what it has when it is drawn alone
    assert "a scale of its own" in own.note
    view = dataclasses.replace(TRIPLE, center=center, scale="shared")
    shared = heats(result, view)
    assert {(one.low, one.high) for one in shared.panels} == {
        (min(low for low, _ in ranges), max(high for _, high in ranges))
    }
    assert "scale" not in shared.note
    for wanted, bars, colors in ((view, 1, 1), (dataclasses.replace(view, scale="own"), 3, 3)):
        figure = plotly_figure(result, wanted)
        assert sum(t.showscale for t in figure.data) == bars
        assert len({json.dumps(t.to_plotly_json()["colorscale"]) for t in figure.data}) == colors
        drawn = matplotlib_figure(result, wanted)
        assert len(drawn.axes) == len(KINDS) + bars
        assert len({m.get_cmap().name for m in meshes(drawn)}) == colors


def test_panels_share_rows_and_do_not_overlap(result: mi.Result) -> None:
    figure = plotly_figure(result, TRIPLE)
    ends = [figure.layout[f"xaxis{i}"].domain for i in ("", 2, 3)]
    assert all(a[1] < b[0] for a, b in itertools.pairwise(ends))
    assert ends[-1][1] <= 1
    assert [figure.layout[f"yaxis{i}"].matches for i in ("", 2, 3)] == [None, "y", "y"]
    drawn = matplotlib_figure(result, TRIPLE)
    drawn.canvas.draw()
    axes = [a for a in drawn.axes if a.get_xlabel()]
    assert {a.get_ylim() for a in axes} == {(0.0, float(LAYERS))}
    boxes = [a.get_tightbbox() for a in axes]
    assert all(a.x1 <= b.x0 for a, b in itertools.pairwise(boxes))
    top = max(box.y1 for box in boxes)
    title, note = drawn.get_suptitle(), drawn.texts[-1]
    assert title.strip() == "Trace"
    assert note.get_window_extent().y0 >= top  # neither covers a panel


def test_rows_that_are_names_are_read_from_the_top(result: mi.Result) -> None:
    view = dataclasses.replace(TRIPLE, y="kind", by="layer")
    assert [one.title for one in heats(result, view).panels] == ["layer 0", "layer 1", "layer 2"]
    axes = [a for a in matplotlib_figure(result, view).axes if a.get_xlabel()]
    assert {a.get_ylim() for a in axes} == {(float(len(KINDS)), 0.0)}
    assert plotly_figure(result, view).layout.yaxis.autorange == "reversed"


def test_dots_and_what_is_averaged_keep_their_rules(result: mi.Result) -> None:
    for one, kind in zip(heats(result, TRIPLE).panels, KINDS, strict=True):
        assert one.marked is not None
        np.testing.assert_array_equal(one.marked, result.data["q"].sel(kind=kind).values < 0.05)
    assert heats(result, TRIPLE).note.startswith("• q < .05")
    mean = heats(result, dataclasses.replace(TRIPLE, y="kind", by="kind", x_text=None))
    assert mean.panels[0].q is None  # layers are averaged
    none = mi.Result(result.data.assign(q=result.data["q"] * 0 + 0.5))
    assert heats(none, TRIPLE).note.startswith("no cell is significant")


def test_a_panel_without_numbers_is_grey_beside_the_others(result: mi.Result) -> None:
    gone = mi.Result(result.data.assign(effect=result.data["effect"].where(result.data["kind"] != "mlp")))
    for center in (None, 0.0):
        view = dataclasses.replace(TRIPLE, center=center)
        assert [np.isfinite(one.values).any() for one in heats(gone, view).panels] == [True, False, True]
        assert meshes(matplotlib_figure(gone, view))[1].get_array().mask.all()
        assert np.isnan(np.asarray(plotly_figure(gone, view).data[1].z)).all()


def test_too_many_panels_are_refused() -> None:
    data = xr.Dataset(
        {"effect": (("kind", "layer", "head"), np.ones((9, 2, 2)))}, {"kind": [f"k{i}" for i in range(9)]}
    )
    with pytest.raises(OutputError, match="9 entries of 'kind', and at most 8"):
        plotly_figure(mi.Result(data), mi.View("heatmap", "effect", "head", "layer", by="kind"))


# Labels


@pytest.mark.parametrize("view", [TRIPLE, dataclasses.replace(TRIPLE, by=None, select={"kind": "mlp"})])
def test_a_label_is_the_token_of_all_examples_or_the_position(result: mi.Result, view: mi.View) -> None:
    expected = [visible(t) for t in TOKENS]
    expected[2] = "2 …"
    assert labels(result, view) == tuple(expected)
    figure = plotly_figure(result, view)
    assert list(figure.layout.xaxis.ticktext) == [html.escape(t, quote=False) for t in expected]
    assert figure.layout.xaxis.tickangle == -45
    drawn = matplotlib_figure(result, view)
    drawn.canvas.draw()  # where ticks are made anew
    axes = next(a for a in drawn.axes if a.get_xlabel())
    assert [t.get_text() for t in axes.get_xticklabels()] == [drawable(t) for t in expected]
    assert {t.get_rotation() for t in axes.get_xticklabels()} == {45.0}
    assert not any(t.get_parse_math() for t in drawn.findobj(matplotlib.text.Text))


def test_columns_with_the_same_token_stay_apart(result: mi.Result) -> None:
    trace = plotly_figure(result, TRIPLE).data[0]
    assert list(trace.x) == [str(i) for i in range(len(TOKENS))]
    np.testing.assert_array_equal(np.asarray(trace.z)[:, 4:6], result.data["effect"].sel(kind="state").values[:, 4:6])
    assert list(np.asarray(trace.customdata)[0, 4:6, 0]) == ["␣to", "␣to"]
    assert trace.hovertemplate.startswith("layer %{y}<br>position %{x} (%{customdata[0]})")


def test_numbers_on_an_axis_are_below_their_own_column() -> None:
    """Plotly looks a tick up among the names of columns before it counts columns."""
    data = xr.Dataset({"value": (("layer", "rank"), np.eye(4))}, {"layer": [3, 2, 1, 0], "rank": [1, 2, 3, 4]})
    result = mi.Result(data, {}, (mi.View("heatmap", "value", "rank", "layer"),))
    layout, (cells,) = plotly_figure(result, result.views[0]).layout, plotly_figure(result, result.views[0]).data
    for axis, names in ((layout.xaxis, cells.x), (layout.yaxis, cells.y)):
        assert list(axis.ticktext) == [str(name) for name in names] == [str(at) for at in axis.tickvals]


def test_a_selected_example_has_its_own_tokens(result: mi.Result) -> None:
    each = result.data["effect"].expand_dims(example=[0, 1])
    made = mi.Result(result.data.drop_vars("q").assign(effect=each))
    for chosen, third in ((1, "␣else"), (0, "$x$"), ((0, 1), "2 …")):
        view = dataclasses.replace(TRIPLE, select={"example": chosen})
        assert labels(made, view)[2] == third
    assert labels(made, dataclasses.replace(TRIPLE, select={"example": 1}))[7] == "7"  # it has no such token


def test_labels_may_be_of_columns_alone(result: mi.Result) -> None:
    assert labels(result, dataclasses.replace(TRIPLE, x_text="one")) == tuple(visible(t) for t in TOKENS)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"x_text": "tokne"}, "'tokne', and the result has"),
        ({"x_text": "effect"}, r"must be over \(example, position\)"),
        ({"x": "layer", "y": "position"}, r"must be over \(example, layer\)"),
        ({"kind": "lines", "y": None}, "labels heatmaps only"),
        ({"by": "kinds"}, "'kinds'"),
    ],
)
def test_a_view_that_does_not_fit_says_what_is_wrong(result: mi.Result, changes: dict[str, Any], said: str) -> None:
    for draw in (plotly_figure, matplotlib_figure):
        with pytest.raises(OutputError, match=said):
            draw(result, dataclasses.replace(TRIPLE, **changes))


# Pages and files


def test_hostile_names_and_tokens_are_text_everywhere(result: mi.Result) -> None:
    data = result.data.assign_coords(kind=[HOSTILE, "mlp", "attn"])
    hostile = mi.Result(data, {}, (dataclasses.replace(TRIPLE, title=HOSTILE, unit=HOSTILE),))
    figure = plotly_figure(hostile, hostile.views[0])
    shown = [figure.layout.title.text, figure.layout.annotations[0].text, *figure.layout.xaxis.ticktext]
    shown += [*np.asarray(figure.data[0].customdata)[..., 0].ravel(), figure.data[0].hovertemplate]
    for text in shown:
        assert "<" not in text.replace("<br>", "").replace("<b>", "").replace("</b>", "").replace("<extra></extra>", "")
    made = page("t", {"r": hostile}, plan="", manifest={})
    assert "<img" not in made
    assert made.count("</script>") == made.count("<script")


def test_the_rows_beside_a_figure_have_their_tokens(result: mi.Result) -> None:
    made = page("t", {"r": result}, plan="", manifest={})
    assert '<th>position</th><th class="name">token</th><th>effect</th>' in made


def test_a_saved_view_comes_back(result: mi.Result, tmp_path: Any) -> None:
    made = dataclasses.replace(result, views=(dataclasses.replace(TRIPLE, scale="shared"),))
    assert mi.Result.load(made.save(tmp_path / "r")).views == made.views


def test_bars_begin_at_the_centre_and_are_those_farthest_from_it() -> None:
    """Noising: 1 is what a cell has that does nothing."""
    values = np.array([1.0, 0.2, 1.05, 0.9])
    data = xr.Dataset({"effect": ("cell", values)}, {"cell": list("abcd")})
    view = mi.View("bars", "effect", "cell", center=1.0)
    made = mi.Result(data, {}, (view,))
    shown = panel(made, view)
    assert isinstance(shown, Bars)
    assert shown.names == ("b", "d", "c", "a")
    assert "begin at 1" in shown.note
    bars = plotly_figure(made, view).data[0]
    assert bars.base == 1.0
    np.testing.assert_allclose(np.asarray(bars.x) + bars.base, values[[1, 3, 2, 0]])
    for patch, value in zip(matplotlib_figure(made, view).axes[0].patches, shown.values, strict=True):
        assert patch.get_x() == 1.0
        assert patch.get_x() + patch.get_width() == pytest.approx(value)


def test_bars_that_a_view_marks_are_dark() -> None:
    columns = {"value": ("word", [3.0, 2.0, -1.0]), "warning": ("word", [False, True, False])}
    result = mi.Result(xr.Dataset(columns, {"word": ["end", "code", "date"]}), {})
    shown = panel(result, mi.View("bars", "value", "word", mark="warning"))
    assert isinstance(shown, Bars) and shown.solid.tolist() == [False, True, False] and "dark: warning" in shown.note
    none = panel(
        mi.Result(result.data.assign(warning=("word", [False] * 3)), {}),
        mi.View("bars", "value", "word", mark="warning"),
    )
    assert isinstance(none, Bars) and not none.solid.any() and "dark: warning (none)" in none.note


def test_counts_have_no_halves_and_a_difference_stays_on_its_line() -> None:
    data = xr.Dataset({"heads": ("category", [3, 0])}, {"category": ["risk", "filler"]})
    title = "Specialised heads by category, when correct - when incorrect, 1 → 2"
    view = mi.View("bars", "heads", "category", title=title)
    made = mi.Result(data, {}, (view,))
    picture = matplotlib_figure(made, view)
    picture.canvas.draw()
    assert all(float(tick).is_integer() for tick in picture.axes[0].get_xticks())
    assert plotly_figure(made, view).layout.xaxis.dtick == 1
    numbers = mi.Result(xr.Dataset({"n": (("a", "b"), np.eye(2) + 1)}), {}, (mi.View("heatmap", "n", "b", "a"),))
    bar = matplotlib_figure(numbers, numbers.views[0]).axes[1]
    assert all(float(tick).is_integer() for tick in bar.get_yticks())
    assert plotly_figure(numbers, numbers.views[0]).data[0].colorbar.dtick == 1
    lines = picture.axes[0].get_title(loc="left").split("\n")
    assert " ".join(lines) == title and len(lines) > 1
    assert not any(line.startswith(("-", "→")) or line.endswith(("-", "→")) for line in lines)


def test_a_logarithmic_axis_has_plain_numbers() -> None:
    shares = [0.001, 0.01, 0.1, 1.0]
    data = xr.Dataset({"share": ("fraction", [0.1, 0.2, 0.6, 1.0])}, {"fraction": shares})
    result = mi.Result(data, {}, (mi.View("lines", "share", "fraction", log=True),))
    (axes,) = matplotlib_figure(result, result.views[0]).axes
    axes.figure.canvas.draw()
    assert axes.get_xscale() == "log" and result.figure().layout.xaxis.type == "log"
    assert {"0.001", "0.01", "0.1", "1"} <= {label.get_text() for label in axes.get_xticklabels()}


def by_site(names: list[str]) -> mi.Result:
    values = np.linspace(0.2, 0.9, 2 * len(names)).reshape(2, -1)
    columns = {"accuracy": values, "ci_low": values - 0.1, "ci_high": values + 0.1}
    data = xr.Dataset({k: (("task", "site"), v) for k, v in columns.items()}, {"task": ["a", "b"], "site": names})
    return mi.Result(data, {}, (mi.View("lines", "accuracy", "site", by="task"),))


def test_an_interval_is_drawn_around_its_own_value_alone() -> None:
    result = by_site(["resid_pre.0", "resid_pre.1"])
    own = result.views[0]
    with_band, without = (plotly_figure(result, v).data for v in (own, replace(own, interval=False)))
    assert any(trace.fill for trace in with_band) and not any(trace.fill for trace in without)
    assert all(trace.error_y.array is None for trace in without)


@pytest.mark.parametrize("layers", [3, 16, 30, 80])
def test_sites_along_the_depth_are_a_line_whose_labels_can_be_read(layers: int) -> None:
    result = by_site([*(f"resid_pre.{i}" for i in range(layers)), f"resid_post.{layers - 1}"])
    figure = matplotlib_figure(result, result.views[0])
    figure.canvas.draw()
    (axes,) = figure.axes
    boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
    assert len(boxes) > 3 and all(a.x1 < b.x0 for a, b in itertools.pairwise(boxes))
    assert all(line.get_linestyle() == "-" and line.get_linewidth() > 0 for line in axes.lines)
    drawn = plotly_figure(result, result.views[0])
    assert list(drawn.layout.xaxis.ticktext) == [label.get_text() for label in axes.get_xticklabels()]
    assert [len(trace.x) for trace in drawn.data if trace.showlegend is None] == [layers + 1] * 2


def test_sites_of_several_kinds_are_points_with_a_name_each() -> None:
    names = [f"{kind}.{i}" for kind in ("mlp_out", "attn_out") for i in range(9)]
    result = by_site(names)
    (axes,) = matplotlib_figure(result, result.views[0]).axes
    labels = axes.get_xticklabels()
    assert [label.get_text() for label in labels] == names and all(label.get_rotation() == 40 for label in labels)
    assert all(line.get_linewidth() == 0 for line in axes.lines)
    assert {trace.mode for trace in plotly_figure(result, result.views[0]).data} == {"markers"}
