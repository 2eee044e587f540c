"""The table of backends: it says that they agree where they do, and where they do not."""

import json
import math
from pathlib import Path

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
from mechinterp.errors import ModelError
from mechinterp.sites import Site
from mechinterp.studies import equivalence as study
from mechinterp.studies.equivalence import Agreement, Equivalence, equivalence
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
        assert all(row.relative < 1e-5 for row in mine if row.verdict == "agrees")
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
    one = torch.tensor([1.0, float("-inf"), float("nan"), -4.0])
    assert study._gap(one.clone(), one, "here") == (0.0, 0.0, "here")
    assert study._gap(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]), "")[:2] == (2.0, 0.5)
    for other in (float("nan"), 0.0):
        assert math.isinf(study._gap(torch.tensor([1.0, other]), torch.tensor([1.0, float("-inf")]), "")[1])
    rows = (Agreement("nnsight", "read", "z", 1.0, 1.0, 1e-4, "z.1"), Agreement("nnsight", "read", "q", 0.0, 0.0, 1e-4))
    assert Equivalence("m", rows).summary == "1 agree, 0 are refused by name, 1 differ; nnsight read z"
    page = study.markdown({"m": Equivalence("m", rows), "n": Equivalence("n", rows[1:])})
    assert page.splitlines()[-2:] == [
        "| `q` | 0.0e+00 (0.0e+00) | 0.0e+00 (0.0e+00) |",
        "| `z` | **1.0e+00 (1.0e+00)** | – |",
    ]


def test_every_analyzer_agrees() -> None:
    """All that run on any model, on both backends; two sets have the names of classes and of what is refused."""
    model = tiny("llama")
    rows = list(study._analyzers(model, {name: model.with_backend(name) for name in study.OTHERS}))
    names = [row.name for row in rows if row.backend == "nnsight"]
    assert len(names) == len(set(names)) and len(rows) == 2 * len(names)
    assert {name.split("(")[0] for name in names} == OURS - WEIGHTS - FILES - HEADED
    assert all(row.verdict == "agrees" for row in rows)
    assert max(row.relative for row in rows) < 5e-5, max(rows, key=lambda row: row.relative)


OURS = {entry.attr for entry in TABLE.values()}
WEIGHTS = {"HeadWeights", "ClassifierWeights"}
FILES = {"SyntacticHeads"}
HEADED = {"Trajectory", "HighScoreTokens", "SpuriousPatterns"}
"""Analyzers of our own; those that read weights alone, those of a file, and those of a classifier's head."""


def test_a_classifiers_analyzers_agree() -> None:
    model = tiny("qwen3", num_labels=2)
    model.hf.config.pad_token_id = 0
    rows = list(study._analyzers(model, {"nnsight": model.with_backend("nnsight")}))
    assert {row.name.split("(")[0] for row in rows} >= HEADED
    assert all(row.verdict == "agrees" for row in rows)


def test_an_analyzer_that_differs_is_found_out() -> None:
    """Numbers, counts and names, each alone."""
    data = xr.Dataset({"x": ("n", [1.0, -4.0]), "rank": ("n", [3, 10]), "token": ("n", ["a", "b"])})
    for name, other, off in (("x", [1.0, -4.1], 0.025), ("rank", [3, 11], 0.05), ("token", ["a", "c"], 0.5)):
        gaps = study._results(Result(data.assign({name: ("n", other)}), {}), Result(data, {}))
        assert {where.split(":")[0]: relative for _, relative, where in gaps if relative} == {name: pytest.approx(off)}


def test_ends_of_intervals_and_what_is_left_of_sums_have_the_scale_of_the_whole() -> None:
    dims, there = ("example", "position"), [[1.0, -3.0], [2.0, math.nan]]
    data = xr.Dataset({"attribution": (dims, there), "completeness_error": ("example", [0.01, 0.0])})
    data = data.assign(x_ci_low=("n", [0.0, -0.5]), x_ci_high=("n", [5.0, math.nan]))
    expected = Result(data, {})
    scales = {str(name): study._scale(str(name), expected) for name in data.variables}
    assert scales == {"attribution": 3.0, "completeness_error": 4.0, "x_ci_low": 5.0, "x_ci_high": 5.0}
    other = Result(data.assign(x_ci_low=("n", [0.1, -0.5])), {})
    assert [gap for gap in study._results(other, expected) if gap[0]] == [(0.1, 0.02, "x_ci_low")]


def test_heads_by_a_file_and_by_weights_agree() -> None:
    """What `equivalence` leaves out: it has no file, and weights are the same ones."""
    model = tiny("qwen3")
    analyzers = [mi.SyntacticHeads(str(Path(__file__).parent / "sentences.conllu"), least=2), mi.HeadWeights()]
    expected = mi.run(model, [[5]], analyzers)
    for name in study.OTHERS:
        for found, ours in zip(mi.run(model.with_backend(name), [[5]], analyzers), expected, strict=True):
            assert max(relative for _, relative, _ in study._results(found, ours)) < 1e-5
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
    (examples,) = {id(each): each for name, a, each in study._suite(model) if name.startswith("PathPatching")}.values()
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
    monkeypatch.setattr(study, "_suite", lambda model: [])
    file = tmp_path / "checks.json"
    result = CliRunner().invoke(app, ["verify", str(tmp_path / "model"), "--backends", "all", "--json", str(file)])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1].endswith("0 are refused by name, 0 differ")
    rows = json.loads(file.read_text())["backends"]
    assert {row["backend"] for row in rows} == {"transformer_lens", "nnsight"}
    assert {row["verdict"] for row in rows} == {"agrees"}
