"""The command line: what it writes, and one sentence with the right exit status for every bad input."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import mechinterp as mi
from mechinterp.cli import main as cli
from mechinterp.errors import ModelError
from mechinterp.model.architecture import FAMILIES, Architecture
from mechinterp.testing import tiny

RUN = CliRunner()


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, llama: mi.Model) -> Path:
    """A checkpoint of the tiny Llama."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    llama.hf.save_pretrained(folder)
    llama.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def invoke(*arguments: Any) -> Result:
    return RUN.invoke(cli.app, [str(a) for a in arguments])


def one_line(result: Result) -> str:
    """The error of a failed command, which must be one line without a traceback."""
    assert result.exit_code == 1, result.output
    lines = result.stderr.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert errors == lines[-1:], result.output
    assert "Traceback" not in result.output
    return errors[0]


def lines(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


GOOD = {"text": "Then, Mary and John had a book, and John gave a book to", "answer": " Mary", "wrong": " John"}


# What it does


def test_demo_writes_a_study_and_ends_by_naming_the_report(here: Path, tiny_folder: Path) -> None:
    result = invoke("demo", "--model", tiny_folder, "--n", 6, "--out", "study")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == f"report: {Path('study') / 'report.html'}"
    assert (here / "study" / "report.html").stat().st_size > 1_000_000
    assert os.listdir(here) == ["study"]
    manifest = json.loads((here / "study" / "manifest.json").read_text())
    assert manifest["passes"] == {"rounds": 1, "forward": 2}
    assert set(manifest["analyzers"]) == {"LogitLens", "DirectLogitAttribution", "HeadRoles"}
    assert {"versions", "model_hash", "seed", "dtype", "kernel", "seconds", "created"} <= manifest.keys()
    assert "top_k" not in manifest  # an analyzer's own
    # The sentences say what the saved numbers say.
    lens = mi.Result.load(here / "study" / "results" / "logit-lens").data
    right = int((lens["logit_diff"].isel(layer=-1) > 0).sum())
    assert f"prefers the right answer on {right} of 6 prompts" in result.stdout
    direct = mi.Result.load(here / "study" / "results" / "direct-logit-attribution").table("mean")
    top = direct.loc[direct["mean"].abs().idxmax()]
    assert f"largest components are {top['component']} {top['mean']:+.2f}" in result.stdout
    assert "Forward passes made in all: 2." in " ".join(result.stdout.split())
    assert re.search(r"forward +clean +6 ", result.stdout)  # the plan


def test_the_same_seed_gives_the_same_numbers(here: Path, tiny_folder: Path) -> None:
    seeds = {"a": 3, "b": 3, "c": 4}
    for name, seed in seeds.items():
        command = ("run", lines(here / "e.jsonl", GOOD), "--model", tiny_folder, "--analyzer", "head-roles")
        assert invoke(*command, "--seed", seed, "--out", name).exit_code == 0
    a, b, c = (
        mi.Result.load(here / name / "results" / "head-roles").data["score"].sel(text="random") for name in seeds
    )
    assert a.identical(b)
    assert not a.equals(c)


def test_run_takes_what_the_examples_allow_and_says_so(here: Path, tiny_folder: Path) -> None:
    file = here / "e.csv"
    file.write_text("text\nThen Mary had a book\nThen John had a ring\n")
    result = invoke("run", file, "--model", tiny_folder, "--batch-size", 1)
    assert result.exit_code == 0, result.output
    assert "direct-logit-attribution is left out" in result.stderr
    assert sorted(os.listdir(here / "mechinterp-run" / "results")) == ["head-roles", "logit-lens"]
    asked = invoke("run", file, "--model", tiny_folder, "--analyzer", "direct-logit-attribution", "--out", "b")
    assert "no answers" in one_line(asked)
    assert not (here / "b").exists()


def test_look_shows_axes_shapes_and_norms(tiny_folder: Path, llama: mi.Model) -> None:
    result = invoke("look", tiny_folder, "Mary had a book", "resid_post", "z.1.h3@end", "blocks.0.attn.hook_pattern")
    assert result.exit_code == 0, result.output
    rows = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines()[1:]}
    seen = llama.trace("Mary had a book", ["resid_post.2", "z.1.h3@end"])
    tokens = len(seen.batch.ids[0])
    assert list(rows) == ["resid_post.0", "resid_post.1", "resid_post.2", "z.1.h3@end", "pattern.0"]
    assert rows["resid_post.2"][:-1] == ["batch", "pos", "d_model", "1", str(tokens), "32"]
    assert float(rows["resid_post.2"][-1]) == pytest.approx(seen["resid_post.2"].norm(dim=-1).mean().item(), rel=1e-3)
    assert rows["z.1.h3@end"][:-1] == ["batch", "d_head", "1", "8"]
    assert rows["pattern.0"][:-1] == ["batch", "head", "query", "key", "1", "4", str(tokens), str(tokens)]


@pytest.fixture(scope="module")
def adapter_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of the tiny Llama, as PEFT saves it."""
    import peft

    folder = tmp_path_factory.mktemp("adapters") / "lora"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks for what transformers has renamed
        config = peft.LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False)
        peft.get_peft_model(tiny("llama").hf, config).save_pretrained(folder)
    return folder


def test_verify_prints_a_table_and_writes_it(here: Path, tiny_folder: Path) -> None:
    result = invoke("verify", tiny_folder, "--json", "checks.json")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"Model {tiny_folder}: llama, 3 layers")
    assert [line[:6].strip() for line in lines[3:-2]] == ["ok"] * 14 + ["info", "ok"]
    assert lines[-1] == "all 16 checks hold"
    content = json.loads((here / "checks.json").read_text())
    assert content["passed"]
    assert content["kernel"] == "sdpa"
    assert set(content["checks"][0]) == {"name", "value", "unit", "tolerance", "passed", "detail", "seconds"}
    assert [c["name"] for c in content["checks"]] == [line[8:].split("  ")[0].strip() for line in lines[3:-2]]
    assert os.listdir(here) == ["checks.json"]
    again = invoke("verify", tiny_folder, "--quick", "--dtype", "bfloat16", "--json", "checks.json")
    assert again.exit_code == 0, again.output
    content = json.loads((here / "checks.json").read_text())
    assert (len(content["checks"]), content["dtype"]) == (7, "bfloat16")


def test_verify_of_a_model_that_fails(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "granite", Architecture("granite"))
    model = tiny("granite", residual_multiplier=0.5)
    model.hf.save_pretrained(tmp_path / "granite")
    result = invoke("verify", tmp_path / "granite", "--quick", "--json", "checks.json")
    assert result.exit_code == 1
    assert result.stderr == ""  # it did what it was asked
    law = "embedding, attention and MLPs sum to the final residual"
    assert [line for line in result.stdout.splitlines() if line.startswith(f"FAILED  {law}")]
    assert result.stdout.splitlines()[-1] == f"1 of 7 checks failed: {law}"
    content = json.loads((here / "checks.json").read_text())
    assert not content["passed"]
    assert [c["name"] for c in content["checks"] if not c["passed"]] == [law]
    assert "fails its self-check" in one_line(invoke("look", tmp_path / "granite", "1 2", "resid_post"))


def test_verify_says_before_the_work_what_it_cannot_write(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "is a folder" in one_line(invoke("verify", "./no/such/model", "--json", "."))
    assert "there is no folder" in one_line(invoke("verify", "./no/such/model", "--json", "no/checks.json"))
    assert "there is no folder ./no/such/model" in one_line(invoke("verify", "./no/such/model"))


def test_checks_are_written_whole_or_not_at_all(here: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    (here / "checks.json").write_text("earlier")
    monkeypatch.setattr("mechinterp.report.files.os.replace", full)
    assert "free some space" in one_line(invoke("verify", tiny_folder, "--quick", "--json", "checks.json"))
    assert os.listdir(here) == ["checks.json"]
    assert (here / "checks.json").read_text() == "earlier"


def test_adapter_and_dtype(here: Path, tiny_folder: Path, adapter_folder: Path) -> None:
    options = ("--adapter", adapter_folder, "--dtype", "bfloat16")
    result = invoke("verify", tiny_folder, *options, "--quick")
    assert result.exit_code == 0, result.output
    assert "bfloat16 on cpu, adapter default" in result.stdout
    plain = invoke("look", tiny_folder, "Mary had a book", "z.0")
    other = invoke("look", tiny_folder, "Mary had a book", "z.0", *options)
    assert plain.exit_code == other.exit_code == 0
    assert plain.stdout.splitlines()[1] != other.stdout.splitlines()[1]
    command = ("run", lines(here / "e.jsonl", GOOD), "--model", tiny_folder, "--analyzer", "accuracy", *options)
    assert "adapter default" in invoke(*command, "--out", "study").stdout
    assert json.loads((here / "study" / "manifest.json").read_text())["dtype"] == "bfloat16"
    assert "there is no folder ./none" in one_line(invoke("demo", "--model", tiny_folder, "--adapter", "./none"))
    assert "must be 'float32'" in one_line(invoke("verify", tiny_folder, "--dtype", "float12"))


def test_any_analyzer_with_defaults_runs(here: Path, tiny_folder: Path) -> None:
    file = lines(here / "e.jsonl", GOOD, GOOD)
    command = ("run", file, "--model", tiny_folder, "--analyzer", "accuracy", "--analyzer", "activation-stats")
    result = invoke(*command, "--out", "study")
    assert result.exit_code == 0, result.output
    assert sorted(os.listdir(here / "study" / "results")) == ["accuracy", "activation-stats"]
    said = one_line(invoke("run", file, "--model", "./no/such/model", "--analyzer", "activation-patching"))
    assert "must be given its site" in said
    assert "ActivationPatching(site=...)" in said


def test_version() -> None:
    result = invoke("--version")
    assert (result.exit_code, result.stdout) == (0, f"mechinterp {mi.__version__}\n")


def test_help_imports_no_torch() -> None:
    code = "import sys, mechinterp.cli.main; print({'torch', 'transformers', 'plotly', 'pandas'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


# Bad input


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: shutil.rmtree(f), "there is no folder"),
        (lambda f: (f / "model.safetensors").unlink(), "no *.safetensors"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pickled weights"),
        (
            lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-1000]),
            "cannot be read",
        ),
        (lambda f: (f / "config.json").unlink(), "no config.json"),
    ],
    ids=["unknown", "no weights", "pickle", "truncated", "no config"],
)
def test_a_model_that_cannot_be_loaded(here: Path, tiny_folder: Path, damage: Any, said: str) -> None:
    shutil.copytree(tiny_folder, here / "model")
    damage(here / "model")
    before = sorted(os.listdir(here))
    assert said in one_line(invoke("demo", "--model", "./model", "--out", "study"))
    assert said in one_line(invoke("look", "./model", "a text", "resid_post"))
    assert sorted(os.listdir(here)) == before


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([GOOD, {**GOOD, "text": ""}], "example 1 is empty"),
        ([{**GOOD, "answer": " Mary John"}], "is 2 tokens"),
        ([{"clean": "Mary had a book", "corrupted": "John had a big book"}], "have 4 and 5 tokens"),
        ([{**GOOD, "text": "book " * 300}], "context of 256"),
        ([GOOD, {"txt": "a"}], "row 1 lacks"),
    ],
    ids=["empty", "long answer", "unaligned", "too long", "missing column"],
)
def test_examples_that_cannot_be_run(here: Path, tiny_folder: Path, rows: list[dict[str, Any]], said: str) -> None:
    file = lines(here / "e.jsonl", *rows)
    assert said in one_line(invoke("run", file, "--model", tiny_folder))
    assert os.listdir(here) == ["e.jsonl"]


@pytest.mark.parametrize(("content", "said"), [(None, "cannot read"), ("{", "is not JSON"), ("", "is empty")])
def test_a_file_that_is_no_examples(here: Path, content: str | None, said: str) -> None:
    if content is not None:
        (here / "e.jsonl").write_text(content)
    assert said in one_line(invoke("run", "e.jsonl", "--model", "./no/such/model"))  # before any model is looked for


@pytest.mark.parametrize(
    ("site", "said"),
    [("resid_pots", "did you mean resid_post"), ("resid_post.99", "99"), ("router.0", "router"), ("z.0@S1", "'S1'")],
)
def test_a_site_that_is_not_there(tiny_folder: Path, site: str, said: str) -> None:
    assert said in one_line(invoke("look", tiny_folder, "Mary had a book", site))


def test_output_that_cannot_be_written_is_said_before_the_work(here: Path) -> None:
    (here / "file").write_text("mine")
    (here / "full").mkdir()
    (here / "full" / "thesis.tex").write_text("mine")
    for out, said in (("file", "is a file"), ("full", "thesis.tex"), ("file/below", "cannot write file/below")):
        assert said in one_line(invoke("demo", "--model", "./no/such/model", "--out", out))
    assert (here / "full" / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize(
    "arguments",
    [
        ["demo", "--n", "0"],
        ["demo", "--n", "many"],
        ["demo", "--sede", "1"],
        ["dmeo"],
        ["run"],
        ["run", "examples.txt"],
        ["run", "e.jsonl", "--analyzer", "logit-lense"],
        ["run", "e.jsonl", "--batch-size", "0"],
        ["look", "smollm2", "text"],
        ["verify"],
        ["verify", "smollm2", "--adapter"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_status_2(here: Path, arguments: list[str]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    assert os.listdir(here) == []


def test_debug_shows_the_traceback_and_the_same_status(here: Path) -> None:
    result = invoke("demo", "--model", "./no/such/model", "--debug")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert "ModelError" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: there is no folder")


def test_a_message_of_several_lines_becomes_one(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ModelError("first\n  second")

    monkeypatch.setattr(mi.Model, "load", fails)
    assert one_line(invoke("demo")) == "error: first second"


def test_a_bug_is_told_from_bad_input(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(mi.Model, "load", fails)
    assert one_line(invoke("demo")).startswith("error: unexpected ZeroDivisionError: by zero; run again with --debug")


def test_interrupt_while_writing_leaves_nothing(here: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def interrupted(*_: Any, **__: Any) -> None:
        seen.append(os.listdir(here))
        raise KeyboardInterrupt

    monkeypatch.setattr("mechinterp.report.study.write_figures", interrupted)
    result = invoke("demo", "--model", tiny_folder, "--n", 2)
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1].startswith("interrupted")
    assert len(seen[0]) == 1  # the folder was being filled
    assert os.listdir(here) == []


def test_ctrl_c_in_a_real_process(here: Path, tiny_folder: Path) -> None:
    """SIGINT at the moment when the hidden folder appears; once more where a busy machine let the study end first."""
    command = [sys.executable, "-m", "mechinterp.cli.main", "demo", "--model", str(tiny_folder), "--n", "2"]
    pipe = subprocess.PIPE

    def heeding() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # what runs these tests in the background may ignore it

    for _ in range(3):
        with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=here, preexec_fn=heeding) as process:
            deadline = time.monotonic() + 120
            while process.poll() is None and not os.listdir(here) and time.monotonic() < deadline:
                time.sleep(0.01)
            assert os.listdir(here), "the study was never begun"
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        if process.returncode != 0:
            break
        shutil.rmtree(here / "mechinterp-demo")
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("interrupted")
    assert os.listdir(here) == []
