"""The table of backends: it says that they agree where they do, and where they do not."""

import json
import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import mechinterp as mi
from mechinterp.cli.main import app
from mechinterp.engine.backends.transformer_lens import BridgeBackend
from mechinterp.errors import ModelError
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
    assert "| write | `router` | refused | " in found.markdown()
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
    assert "**1.0e+00 (1.0e+00)**" in Equivalence("m", rows).markdown()


def test_analyzers_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of them here: all take longer than a test may."""
    every = study._suite
    monkeypatch.setattr(study, "_suite", lambda model: [each for each in every(model) if each[0] in CHOSEN])
    model = tiny("llama")
    rows = list(study._analyzers(model, {"nnsight": model.with_backend("nnsight")}))
    assert {row.name for row in rows} == CHOSEN and all(row.verdict == "agrees" for row in rows)


CHOSEN = {"LogitLens()", "AttributionPatching(atp, z)"}


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
