"""The table of backends: it says that they agree where they do, and where they do not."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from typer.testing import CliRunner

import mechinterp as mi
from mechinterp.analyzers import TABLE
from mechinterp.cli.main import app
from mechinterp.core.result import Result
from mechinterp.core.trace import Read
from mechinterp.engine.backends.transformer_lens import BridgeBackend
from mechinterp.engine.backward import backward
from mechinterp.errors import HookError, ModelError
from mechinterp.sites import Site
from mechinterp.studies import equivalence as study
from mechinterp.studies.equivalence import Agreement, Equivalence, equivalence
from mechinterp.studies.yardsticks import _scale, counts, gap, numbers, rows, sizes
from mechinterp.testing import tiny


def test_sites_agree_and_what_is_lacking_is_said() -> None:
    model = tiny("qwen3_moe")
    seen: list[Agreement] = []
    found = equivalence(model, analyzers=False, told=seen.append)
    assert tuple(seen) == found.rows and found.passed
    kinds = {site.kind for site in model.sites}
    for backend in ("transformer_lens", "nnsight"):
        mine = [row for row in found.rows if row.backend == backend]
        assert {row.name for row in mine if row.what == "read"} == kinds
        assert {row.name for row in mine if row.what == "gradient"} == kinds - {"head_out", "logits"}
        lacking = {(row.what, row.name) for row in mine if row.verdict == "lacks"}
        assert lacking == ({("write", "router"), ("gradient", "router")} if backend == "transformer_lens" else set())
        assert all(row.relative < 5e-5 for row in mine if row.verdict == "agrees")
    assert found.summary.endswith(" agree, 2 are refused by name, 0 differ")
    page = study.markdown({"moe": found, "again": found})
    assert page.startswith("On `transformer_lens`:\n\n| site | moe | again |\n|---|---|---|\n| `embed` | ")
    assert page.count("; refused: write, gradient |") == 2 and page.count("On `nnsight`:") == 1
    assert found.table()["verdict"].value_counts()["lacks"] == 2
    assert str(found).splitlines()[-1] == found.summary


def test_a_backend_that_is_wrong_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another attention scale in the bridge's own modules: what comes before it agrees, what comes after differs."""
    made = BridgeBackend.of

    def spoiled(model: mi.Model) -> BridgeBackend:
        backend = made(model)
        backend.bridge.original_model.model.layers[1].self_attn.original_component.scaling *= 1.01
        return backend

    monkeypatch.setattr(BridgeBackend, "of", spoiled)
    found = equivalence(tiny("llama"), ["transformer_lens"], analyzers=False)
    verdicts = {(row.what, row.name): row.verdict for row in found.rows}
    assert not found.passed and "differ; transformer_lens read" in found.summary
    assert (
        verdicts["read", "embed"] == "agrees" and verdicts["read", "scores"] == verdicts["read", "logits"] == "differs"
    )
    assert any(row.name == "scores" and row.detail.startswith("scores.") for row in found.rows)


def test_gaps() -> None:
    """Each row is held against its own size."""
    rows = torch.tensor([[1.0, float("-inf"), float("nan"), -4.0], [1e6, 0.0, 0.0, 0.0]])
    assert sizes(rows).tolist() == [4.0, 1e6]
    assert gap(rows.clone(), rows, ["a", "b"], sizes(rows)) == (0.0, 0.0, "a")
    other = rows + torch.tensor([[2.0, 0.0, 0.0, 0.0], [10.0, 0.0, 0.0, 0.0]])
    assert gap(other, rows, ["a", "b"], sizes(rows)) == (10.0, 0.5, "a")
    assert gap(other, rows, ["a", "b"], torch.tensor([4e6, 10.0])) == (10.0, 1.0, "b")
    one = torch.ones(1)
    for odd in (float("nan"), 0.0):
        assert math.isinf(gap(torch.tensor([[1.0, odd]]), torch.tensor([[1.0, float("-inf")]]), [""], one).relative)
    assert math.isinf(gap(torch.tensor([[1e-9]]), torch.tensor([[0.0]]), [""], torch.zeros(1)).relative)
    assert gap(torch.zeros(0, 4), torch.zeros(0, 4), [], torch.zeros(0)) == (0.0, 0.0, "")
    narrow = gap(torch.ones(2, 1), torch.ones(2, 4), ["a", "b"], torch.ones(2))
    assert math.isinf(narrow.relative) and narrow.where == "a: shape (2, 1) instead of (2, 4)"


def test_padding_is_nobodys() -> None:
    """Rows are of real tokens, and what a query gives to padded keys is no part of them."""
    model = tiny("llama")
    tokens = model.tokenize([[3, 5, 7], [4, 6]])
    for side in ("left", "right"):
        batch = tokens.batch(range(2), padding_side=side)
        spoiled = torch.where(batch.mask[:, None, None, :], 1.0, float("nan")).expand(2, 4, 3, 3).clone()
        spoiled.transpose(2, 3)[~batch.mask[:, None, None, :].expand(2, 4, 3, 3)] = float("nan")
        found = rows(spoiled, Site("pattern", 0), batch)
        assert found.shape == (5, 12) and not found.isnan().any()
        assert rows(batch.ids[..., None].float(), Site("embed"), batch)[:, 0].tolist() == [3, 5, 7, 4, 6]


def test_the_printed_and_the_published_table() -> None:
    rows = (Agreement("nnsight", "read", "z", 1.0, 1.0, 1e-4, "z.1"), Agreement("nnsight", "read", "q", 0.0, 0.0, 1e-4))
    assert Equivalence("m", rows).summary == "1 agree, 0 are refused by name, 1 differ; nnsight read z"
    assert Equivalence("m", rows[1:], "Note").summary == "1 agree, 0 are refused by name, 0 differ. Note"
    page = study.markdown({"m": Equivalence("m", rows), "n": Equivalence("n", rows[1:])})
    assert page.splitlines()[-2:] == [
        "| `q` | 0 | 0 |",
        "| `z` | **1.0e+00 (1.0e+00)** | – |",
    ]
    jumped = Agreement("nnsight", "counts", "Probe()", 1.0, 0.5, 0.02)
    none = Agreement("native", "analyzer", "Probe()", math.nan, math.nan, 1e-4)
    page = study.markdown({"m": Equivalence("m", (jumped, none))})
    assert "| `Probe()` | refused: native |\n\nWhat they count and choose" in page
    assert page.endswith("| `Probe()` | **5.0e-01 (1.0e+00)** |")


def compared(model: mi.Model, *backends: str) -> list[Agreement]:
    return list(study._analyzers(model, [model.with_backend(name) for name in backends]))


def test_every_analyzer_agrees() -> None:
    """All that run on any model, on both backends."""
    found = compared(tiny("llama"), *study.OTHERS)
    rows = [row for row in found if row.what == "analyzer"]
    names = [row.name for row in rows if row.backend == "nnsight"]
    assert len(names) == len(set(names)) and len(rows) == 2 * len(names)
    assert {name.split("(")[0] for name in names} == OURS - LEFT_OUT - HEADED
    assert all(row.verdict == "agrees" for row in found)
    assert max(row.relative for row in rows) < 5e-5, max(rows, key=lambda row: row.relative)


OURS = {entry.attr for entry in TABLE.values()}
LEFT_OUT = {"SyntacticHeads", "HeadWeights"}
HEADED = {"ClassifierWeights", "Trajectory", "HighScoreTokens", "SpuriousPatterns"}
"""Analyzers of our own; those that take a file or minutes, and those of a classifier's head."""


def test_a_classifiers_analyzers_agree_where_it_can_run() -> None:
    """TransformerLens wraps no classifiers: one line says so, and nnsight is compared all the same."""
    model = tiny("qwen3", num_labels=2)
    model.hf.config.pad_token_id = 0
    found = equivalence(model)
    assert [(row.backend, row.what) for row in found.rows if row.verdict == "lacks"] == [("transformer_lens", "model")]
    page = study.markdown({"classifier": found})
    assert "On `nnsight`:" in page and page.count("| `Trajectory()` | ") == 1
    more = Equivalence("m", (*found.rows, Agreement("transformer_lens", "read", "z", 0.0, 0.0, 1e-4)))
    assert "On `transformer_lens`:\n\n| site | classifier |\n|---|---|\n| `z` | refused |" in study.markdown(
        {"classifier": more}
    )
    assert {row.name.split("(")[0] for row in found.rows} >= HEADED
    assert found.passed, found.summary
    with pytest.raises(ModelError, match="TransformerLens cannot wrap tiny-qwen3"):
        equivalence(model, ["transformer_lens"])


@pytest.mark.parametrize("family", ["mistral", "qwen3_moe"])
def test_every_analyzer_that_a_family_can_have(family: str) -> None:
    """Experts have no neurons. Two windows of the tiny Mistral tie: one choice in three hundred is another."""
    found = compared(tiny(family), "nnsight")
    names = {row.name.split("(")[0] for row in found if row.what == "analyzer"}
    without = {"NeuronImportance", "ConceptNeurons"} if family == "qwen3_moe" else set()
    assert names == OURS - LEFT_OUT - HEADED - without
    assert {row.verdict for row in found} == {"agrees"}
    if family == "mistral":
        chosen = {row.name: row.relative for row in found if row.what == "counts" and row.relative}
        assert set(chosen) == {"MaxActivating()"} and 0 < chosen["MaxActivating()"] < 0.01


def test_half_precision_compares_sites_alone() -> None:
    found = equivalence(tiny("llama", dtype=torch.bfloat16), ["nnsight"])
    assert found.passed and {row.what for row in found.rows} == {"read", "write", "gradient"}
    assert found.summary.endswith("0 differ. Analyzers are compared in float32 and float64 alone")
    found = equivalence(tiny("qwen3_moe", dtype=torch.float16), ["nnsight"], analyzers=False)
    assert found.summary.endswith(
        "Where experts score nearly alike, engines may choose others, and what follows differs"
    )


def test_errors_of_a_pass_differ_and_refusals_before_it_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook that never fires is no refusal, in a site's line or an analyzer's, and the table goes on."""
    model = tiny("llama")
    suite = [(name, *rest) for name, *rest in study.suite(model) if name.startswith(("LogitLens", "DirectLogit"))]
    monkeypatch.setattr(study, "suite", lambda model: suite)
    passes = BridgeBackend.run

    def missing(self: BridgeBackend, batch: Any, writes: Any, reads: Any, *rest: Any) -> Any:
        if any(read.site.kind == "resid_post" for read in reads):
            raise HookError("the read of resid_post did not fire")
        return passes(self, batch, writes, reads, *rest)

    monkeypatch.setattr(BridgeBackend, "run", missing)
    lacking = BridgeBackend.lacks

    def lacks(self: BridgeBackend, site: Site, use: Any) -> str | None:
        return "not here" if str(site.whole) in ("embed", "z.1") else lacking(self, site, use)

    monkeypatch.setattr(BridgeBackend, "lacks", lacks)
    found = equivalence(model, ["transformer_lens"])
    rows = {(row.what, row.name): row for row in found.rows}
    assert [row.verdict for row in found.rows if (row.what, row.name) == ("read", "z")] == ["lacks", "agrees"]
    assert (
        not found.passed and "transformer_lens read resid_post; transformer_lens analyzer LogitLens()" in found.summary
    )
    for key in (("read", "resid_post"), ("analyzer", "LogitLens()")):
        assert rows[key].verdict == "differs" and math.isinf(rows[key].relative)
        assert "did not fire" in rows[key].detail
    assert rows["read", "embed"].verdict == "lacks" and rows["read", "embed"].detail == "embed: not here"
    assert rows["analyzer", "DirectLogitAttribution()"].verdict == "lacks"
    assert rows["write", "resid_post"].verdict == "agrees"


DATA = xr.Dataset(
    {
        "x": ("n", [1.0, -4.0]),
        "top_rank": ("m", [0] * 99 + [49000]),
        "rank": ("n", [3, 10]),
        "token": ("n", ["a", "b"]),
        "word": ("n", np.array(["a", math.nan], dtype=object)),
        "x_p": ("n", [0.5, 1.0]),
    },
    {"n": [3, 4]},
)


@pytest.mark.parametrize(
    ("name", "other", "off", "counted"),
    [
        ("x", [1.0, -4.1], 0.025, False),
        ("rank", [3, 11], 0.5, True),
        ("top_rank", [4] * 99 + [49000], 0.99, True),
        ("top_rank", [0] * 99 + [49001], 0.0, True),
        ("top_rank", [0] * 99 + [40000], 9000 / 49000, True),
        ("rank", [9, 10], 0.6, True),
        ("token", ["a", "c"], 0.5, True),
        ("word", np.array(["b", math.nan], dtype=object), 0.5, True),
        ("x_p", [0.2, 1.0], 0.5, True),
        ("x_p", [0.5 + 1e-6, 1.0], 0.0, True),
        ("n", [3, 5], math.inf, False),
    ],
)
def test_an_analyzer_that_differs_is_found_out(name: str, other: Any, off: float, counted: bool) -> None:
    """Numbers, counts, choices and coordinates, each alone."""
    found, expected = Result(DATA.assign({name: (DATA[name].dims, other)}), {}), Result(DATA, {})
    numeric, chosen = list(numbers(found, expected)), list(counts(found, expected, 1e-4))
    assert max(each.relative for each in (chosen if counted else numeric)) == pytest.approx(off)
    assert all(each.relative == 0 for each in (numeric if counted else chosen))


def test_what_one_side_has_besides_differs() -> None:
    result = Result(DATA, {})
    more = Result(DATA.assign(y=("n", [0.0, 0.0])), {})
    assert [each.where for each in numbers(more, result) if each.relative] == ["y is new"]
    assert [each.where for each in numbers(result, more) if each.relative] == ["y is missing"]
    longer = Result(xr.Dataset({"x": ("n", [1.0, -4.0, 2.0])}), {})
    few = Result(xr.Dataset({"x": ("n", [1.0, -4.0])}), {})
    assert [each.where for each in numbers(longer, few) if each.relative] == ["x has axes {'n': 3} instead of {'n': 2}"]
    renamed = Result(xr.Dataset({"x": ("m", [1.0, -4.0])}), {})
    assert [each.where for each in numbers(renamed, few) if each.relative] == [
        "x has axes {'m': 2} instead of {'n': 2}"
    ]
    assert not list(counts(longer, few, 1e-4))


def test_measures_of_one_variable_have_a_scale_each() -> None:
    """A mean of ranks is a count, and no yardstick for a probability beside it."""
    dims, names = ("measure", "n"), {"measure": ["prob", "rank"]}
    data = xr.Dataset(
        {"mean": (dims, [[0.001, 0.002], [3.5, 400.0]]), "ci_low": (dims, [[0.0, 0.001], [3.0, 300.0]])}, names
    )
    for values, numeric, counted in (
        ([[0.001, 0.003], [3.5, 400.0]], {"mean prob": 0.5}, {}),
        ([[0.001, 0.002], [3.5, 380.0]], {}, {"mean rank": 0.05}),
    ):
        found, expected = Result(data.assign(mean=(dims, values)), {}), Result(data, {})
        assert {g.where: pytest.approx(g.relative) for g in numbers(found, expected) if g.relative} == numeric
        assert {g.where: pytest.approx(g.relative) for g in counts(found, expected, 1e-4) if g.relative} == counted
    found = Result(data.assign(ci_low=(dims, [[0.0, 0.002], [3.0, 300.0]])), {})
    said = {gap.where: gap.relative for gap in numbers(found, Result(data, {})) if gap.relative}
    assert said == {"ci_low prob": pytest.approx(1.0)}


def test_ends_of_intervals_and_what_is_left_of_sums_have_the_scale_of_the_whole() -> None:
    dims, there = ("example", "position"), [[1.0, -3.0], [2.0, math.nan]]
    data = xr.Dataset({"attribution": (dims, there), "completeness_error": ("example", [0.01, 0.0])})
    data = data.assign(x_ci_low=("n", [0.0, -0.5]), x_ci_high=("n", [5.0, math.nan]), y_ci_low=("n", [1.0, 2.0]))
    expected = Result(data, {})
    scales = {str(name): _scale(str(name), expected, {}) for name in data.variables}
    assert scales.pop("y_ci_low") == 2.0  # alone
    assert scales == {"attribution": 3.0, "completeness_error": 4.0, "x_ci_low": 5.0, "x_ci_high": 5.0}
    other = Result(data.assign(x_ci_low=("n", [0.1, -0.5])), {})
    assert [each for each in numbers(other, expected) if each.absolute] == [(0.1, 0.02, "x_ci_low")]


def test_heads_by_a_file_and_by_weights_agree() -> None:
    """What `equivalence` leaves out."""
    model = tiny("qwen3")
    analyzers = [mi.SyntacticHeads(str(Path(__file__).parent / "sentences.conllu"), least=2), mi.HeadWeights()]
    expected = mi.run(model, [[5]], analyzers)
    for name in study.OTHERS:
        for found, ours in zip(mi.run(model.with_backend(name), [[5]], analyzers), expected, strict=True):
            assert max(each.relative for each in [*numbers(found, ours), *counts(found, ours, 1e-4)]) < 1e-5
            assert any(np.isfinite(value).any() for value in ours.data.values() if value.dtype.kind == "f")


def test_gradients_are_of_answers_that_differ(smollm2: mi.Model) -> None:
    """SmolLM2's tokens 5 and 9 are two that training never saw, with one logit: their difference has no gradient."""
    batch = smollm2.tokenize(study._examples(smollm2)).batch(range(3))
    site = Site("resid_post", 28)
    assert backward(smollm2, batch, [site], mi.logit_diff())[0][Read(site)].abs().max() > 1e-3


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe"])
def test_shares_have_denominators(family: str) -> None:
    """The pairs differ by as much as their logits do, so a share of it is no quotient of two roundings."""
    model = tiny(family)
    (examples,) = {id(each): each for name, a, each in study.suite(model) if name.startswith("PathPatching")}.values()
    found = mi.run(model, examples, mi.PathPatching("logits", "attn_out", positions="end")).data
    change = found["clean"].values - found["corrupted"].values
    assert change.min() > 0.5 and change.mean() > 0.2 * abs(found["patched"].values).max()


def test_unknown_backends(llama: mi.Model) -> None:
    with pytest.raises(ModelError, match=r"verify is of the native engine, and tiny-llama is run by nnsight"):
        mi.verify(llama.with_backend("nnsight"))
    with pytest.raises(ModelError, match=r"must be among transformer_lens, nnsight. Got 'jax'"):
        equivalence(llama, ["jax"])
    result = CliRunner().invoke(app, ["verify", "smollm2", "--backends", "jax"])
    assert result.exit_code in (1, 2) and "--backends must be all, or some of" in result.output.replace("\n", " ")


def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama", layers=1)
    model.hf.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(study, "suite", lambda model: [])
    file = tmp_path / "checks.json"
    result = CliRunner().invoke(app, ["verify", str(tmp_path / "model"), "--backends", "all", "--json", str(file)])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1].endswith("0 are refused by name, 0 differ")
    rows = json.loads(file.read_text())["backends"]
    assert {row["backend"] for row in rows} == {"transformer_lens", "nnsight"}
    assert {row["verdict"] for row in rows} == {"agrees"}
