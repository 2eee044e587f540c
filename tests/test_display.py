"""What notebooks show: tables that say what is there, and in which every text is only ever text."""

import html.parser
import re
from typing import Any

import numpy as np
import xarray as xr

import mechinterp as mi
from mechinterp import sites
from mechinterp.core.display import ROWS, html_table
from mechinterp.core.trace import Read, Reduce
from tests.test_traces import total

HOSTILE = "</td><script>alert(1)</script><img src=x onerror='alert(1)'>\"&amp;"


class Reader(html.parser.HTMLParser):
    """A table as text: what stands above it, its cells row by row, and what stands below it."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.caption, self.below = "", ""
        self.rows: list[list[str]] = []
        self._in = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self._in = tag
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._in = ""

    def handle_data(self, data: str) -> None:
        if self._in in ("th", "td"):
            self.rows[-1][-1] += data
        elif self.rows:
            self.below += data
        else:
            self.caption += data


def shown(thing: Any) -> Reader:
    """What a notebook shows of it, which holds nothing but a table with plain style."""
    page = thing if isinstance(thing, str) else thing._repr_html_()
    reader = Reader(page)
    assert reader.tags <= {"table", "thead", "tbody", "tr", "th", "td", "p"}
    assert reader.attributes <= {"style"}
    assert not re.search(r"(src|href|url|on\w+)\s*[=(]", re.sub("&.*?;", "", re.sub(">[^<]*<", "><", page)))
    assert len({len(row) for row in reader.rows}) <= 1
    return reader


def test_a_table_rounds_numbers_and_escapes_texts() -> None:
    rows = [[1, 0.123456, HOSTILE, None, True], [12345, float("nan"), "  two  spaces", 3, False]]
    page = html_table(("n", "x", "text", "some", HOSTILE), rows, HOSTILE, left_out=1234)
    reader = shown(page)
    assert reader.rows == [
        ["n", "x", "text", "some", HOSTILE],
        ["1", "0.1235", HOSTILE, "", "True"],
        ["12,345", "", "  two  spaces", "3", "False"],
    ]
    assert (reader.caption, reader.below) == (HOSTILE, "… and 1,234 more")
    sides = re.findall(r"<th style=\"[^\"]*text-align: (\w+)", page)
    assert sides == ["right", "right", "left", "right", "left"]
    assert shown(html_table(("a",), [])).rows == [["a"]]


def test_examples(llama: mi.Model) -> None:
    n = ROWS + 5
    examples = mi.Examples.pairs(
        [f"{HOSTILE}\n{i}" for i in range(n)],
        [f"corrupted\u202e {i}" for i in range(n)],
        answers=[([" Mary", HOSTILE], 7)] * n,
        positions={HOSTILE: [(0, 1)] * n},
        labels=[HOSTILE] * n,
    )
    reader = shown(examples)
    assert reader.rows[0] == ["example", "text", "corrupted", "right", "wrong", "label"]
    assert len(reader.rows) == 1 + ROWS
    assert reader.rows[3] == ["2", f"{HOSTILE}\\n2", "corrupted\\u202e 2", reader.rows[3][3], "7", HOSTILE]
    assert "␣Mary" in reader.rows[3][3]
    assert reader.caption == f"{n} examples; positions {HOSTILE}"
    assert reader.below == "… and 5 more"
    chat = mi.Examples.chat([[{"role": "user", "content": "<b>Hi</b>"}]])
    assert shown(chat).rows[1] == ["0", "user: <b>Hi</b>"]
    ids = mi.Examples.of([[5, 6, 7]], answers=[3], spans={"all of it": [(0, 3)]})
    assert shown(ids).rows == [["example", "text", "right"], ["0", "5 6 7", "3"]]
    assert shown(ids).caption == "1 example; spans all of it"
    assert shown(mi.tasks.ioi(n=4)).rows[0] == ["example", "text", "corrupted", "right", "wrong"]


def test_a_trace_has_the_axes_of_what_was_read(llama: mi.Model) -> None:
    examples = mi.Examples.pairs([[5, 6, 7]] * 2, [[5, 6, 8]] * 2, spans={"<i>": [(0, 2), (1, 3)]})
    reads = [
        Read(sites.z(1, heads=3, positions="end"), of="corrupted"),
        sites.z(1, heads=(3,), positions=(0, 1)),
        sites.k(0, heads=1),
        sites.pattern(2, positions="end"),
        sites.mlp_out(1, positions="<i>"),
        Read(sites.pattern(1), reduce=Reduce(total, "example head")),
    ]
    trace = llama.trace(examples, reads)
    axes = ["batch d_head", "batch pos head d_head", "batch pos d_head", "batch head key", "batch pos d_model"]
    axes.append("example head")
    reader = shown(trace)
    assert reader.rows[0] == ["site", "run", "axes", "shape", "dtype", "size"]
    assert [row[2] for row in reader.rows[1:]] == axes
    for row, read, name in zip(reader.rows[1:], trace.reads, axes, strict=True):
        assert row[0] == str(read.site)
        assert row[3] == " × ".join(map(str, trace[read].shape))
        assert len(name.split()) == trace[read].ndim
        assert f"  {read.site}: {name} {tuple(trace[read].shape)}" in repr(trace)
    assert reader.rows[1][1:2] + reader.rows[1][4:] == ["corrupted", "float32", "0.1 kB"]
    assert reader.caption == "Trace of 2 examples"
    generated = llama.generate([5, 6], max_new_tokens=2, reads=[sites.z(1, heads=1, positions="end")]).trace
    assert shown(generated).rows[1][2] == "batch pos d_head"
    many = shown(llama.trace([5, 6], ["q", "k", "v", "z", "attn_in", "attn_out", "mlp_in", "mlp_out"]))
    assert (len(many.rows), many.below) == (1 + ROWS, f"… and {24 - ROWS} more")


def test_a_model_shows_its_sizes(model: mi.Model) -> None:
    rows = dict(shown(model).rows[1:])
    assert rows["family"] == model.arch.family
    assert (rows["n_heads"], rows["n_kv_heads"], rows["d_model"]) == ("4", "2", "32")
    assert rows["parameters"] == f"{sum(p.numel() for p in model.hf.parameters()):,}"
    assert (rows["dtype"], rows["attention kernel"]) == ("float32", "sdpa")
    named = mi.Model(model.hf, model.tokenizer, HOSTILE)
    assert shown(named).caption == f"Model {HOSTILE}"


def test_a_plan_shows_what_it_prints(llama: mi.Model) -> None:
    class Hostile(mi.LogitLens):
        name = HOSTILE  # pyright: ignore[reportAssignmentType] -- a property there

    plan = mi.plan(llama, mi.tasks.ioi(n=4), [Hostile(), mi.ActivationPatching("resid_pre")])
    reader = shown(plan)
    lines = str(plan).splitlines()
    assert len(reader.rows) == 1 + len(plan.passes)
    for row, line in zip(reader.rows, lines[: len(reader.rows)], strict=True):
        assert re.split(r"\s{2,}", line) == row
    assert HOSTILE in reader.rows[1][-1]
    assert reader.caption == "; ".join(lines[len(reader.rows) :])


def test_a_result_says_its_unit_its_axes_and_what_is_left_out() -> None:
    tokens = np.resize(np.array([" Mary", HOSTILE, "\n"]), (9, 4))
    data = xr.Dataset(
        {
            "prob": (("layer", "head"), np.linspace(0, 1, 36, dtype=np.float32).reshape(9, 4)),
            "token": (("layer", "head"), tokens),
            HOSTILE: ("layer", np.arange(9)),
            "all": ((), 1.5),
        },
        {"layer": np.arange(9), "head": np.arange(4)},
        {"unit": HOSTILE},
    )
    reader = shown(mi.Result(data, {"analyzer": HOSTILE}))
    other = f"{HOSTILE} (layer 9), all (one number)"
    assert reader.caption == f"Result of {HOSTILE} in {HOSTILE}, layer 9 × head 4; not in this table: {other}"
    assert reader.rows[0] == ["layer", "head", "prob", "token"]
    assert reader.rows[1] == ["0", "0", "0", "␣Mary"]
    assert reader.rows[2][2:] == ["0.02857", HOSTILE[:59] + "…"]
    assert reader.rows[3][3] == "\\n"
    assert (len(reader.rows), reader.below) == (1 + ROWS, f"… and {36 - ROWS} more")
    alone = shown(mi.Result(data[["all"]]))
    assert (alone.caption, alone.rows, alone.below) == (
        f"Result of an analyzer in {HOSTILE}, one number",
        [["all"], ["1.5"]],
        "",
    )
    assert shown(mi.Result(xr.Dataset())).caption == "Result of an analyzer: no variables"


def test_what_analyzers_give_can_be_shown(llama: mi.Model) -> None:
    for result in mi.run(llama, mi.tasks.ioi(n=6), [mi.LogitLens(top_k=2), mi.DirectLogitAttribution()]):
        assert len(shown(result).rows) > 1
