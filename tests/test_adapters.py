"""Adapters on top, classifiers, and the bad input that belongs to them."""

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
import transformers

import mechinterp as mi
from mechinterp import sites
from mechinterp.errors import ExamplesError, ModelError
from mechinterp.testing import hook_count, tiny

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]


def save(model: mi.Model, path: Path) -> Path:
    model.hf.save_pretrained(path)
    if model.tokenizer is not None:
        model.tokenizer.save_pretrained(path)
    return path


def adapter(base: mi.Model, path: Path, **options: Any) -> Path:
    """A LoRA whose weights are not zero, saved; the base is left without it."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False, **options)
    wrapped = peft.get_peft_model(base.hf, config)
    for name, parameter in wrapped.named_parameters():
        if "modules_to_save" in name:
            torch.nn.init.normal_(parameter)
    wrapped.save_pretrained(path)
    wrapped.unload()
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny("qwen3"), tmp_path_factory.mktemp("base") / "tiny-base")


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    model = tiny("qwen3")
    model.hf.config._name_or_path = str(base)
    return adapter(model, tmp_path_factory.mktemp("lora"), task_type="CAUSAL_LM")


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_an_adapter_is_part_of_the_model_and_can_be_switched_off(tmp_path: Path, family: str) -> None:
    plain = tiny(family)
    path = save(plain, tmp_path / "base")
    lora = adapter(plain, tmp_path / "lora")
    ids = [[5, 6, 7, 8, 9]]
    model = mi.Model.load(str(path), adapter=str(lora))
    assert "adapter default" in repr(model)
    with_adapter = model.trace(ids, [*model.sites, "logits"])
    expected = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(path).eval(), str(lora)
    )(torch.tensor(ids)).logits
    assert torch.equal(with_adapter["logits"], expected)
    base = mi.Model.load(str(path)).trace(ids, "logits")["logits"]
    assert (with_adapter["logits"] - base).abs().max() > 1e-2
    # weights by head are the ones in force
    for i in range(3):
        heads = torch.einsum("bphe,hed->bphd", with_adapter[f"z.{i}"], model.W_O(i))
        torch.testing.assert_close(heads, with_adapter[f"head_out.{i}"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(heads.sum(2), with_adapter[f"attn_out.{i}"], atol=1e-5, rtol=1e-5)
    before, trained = hook_count(model.hf), [p.requires_grad for p in model.hf.parameters()]
    with model.without_adapter():
        assert torch.equal(model.trace(ids, "logits")["logits"], base)
    with pytest.raises(ZeroDivisionError), model.without_adapter():
        raise ZeroDivisionError
    assert torch.equal(model.trace(ids, "logits")["logits"], with_adapter["logits"])
    assert (hook_count(model.hf), [p.requires_grad for p in model.hf.parameters()]) == (before, trained)


def test_sums_hold_with_an_adapter(base: Path, lora: Path) -> None:
    model = mi.Model.load(str(base), adapter=str(lora))
    lens, direct = mi.run(model, mi.tasks.ioi(5), [mi.LogitLens(), mi.DirectLogitAttribution()])
    gap = direct.data["attribution"].sum("component") - lens.data["logit_diff"].sel(layer=2)
    assert float(abs(gap).max()) < 1e-4


def test_peft_models_are_wrapped(lora: Path) -> None:
    wrapped = peft.PeftModel.from_pretrained(tiny("qwen3").hf, str(lora))
    model = mi.Model.wrap(wrapped)
    assert model.peft is wrapped
    with pytest.raises(ModelError, match="no adapter to switch off"), tiny("llama").without_adapter():
        pass


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_classifier(tmp_path: Path, family: str) -> None:
    original = tiny(family, num_labels=3)
    model = mi.Model.load(str(save(original, tmp_path)))
    assert (model.dims.n_labels, model.dims.n_outputs) == (3, 3)
    assert "classifier of 3 labels" in repr(model)
    ids = [[5, 6, 7, 8], [9, 8, 7]]
    trace = model.trace(ids, [sites.logits(), sites.logits(positions="end"), sites.resid_post(2)])
    for row, text in enumerate(ids):  # at every position what the classifier says of the text up to there
        for end in range(1, len(text) + 1):
            torch.testing.assert_close(
                trace[sites.logits()][row, end - 1], model.hf(torch.tensor([text[:end]])).logits[0]
            )
        torch.testing.assert_close(trace[sites.logits(positions="end")][row], model.hf(torch.tensor([text])).logits[0])
    with pytest.raises(ExamplesError, match="is a classifier, which generates nothing"):
        model.generate(ids[0])
    pairs = mi.Examples.of(["A B", "B A S"], answers=[("LABEL_2", "LABEL_0"), (1, 0)])
    lens, direct = mi.run(model, pairs, [mi.LogitLens(), mi.DirectLogitAttribution()])
    assert set(lens.data["top_token"].values.flat) <= {"LABEL_0", "LABEL_1", "LABEL_2"}
    gap = direct.data["attribution"].sum("component") - lens.data["logit_diff"].sel(layer=2)
    assert float(abs(gap).max()) < 1e-4
    with pytest.raises(ExamplesError, match=r"' Mary' of example 0 is none of the labels LABEL_0, LABEL_1, LABEL_2"):
        model.tokenize(mi.Examples.of(["A"], answers=[" Mary"]))
    with pytest.raises(ExamplesError, match="label 3 is outside the labels, which are 3"):
        model.tokenize(mi.Examples.of(["A"], answers=[3]))


@torch.no_grad()
def test_an_adapter_that_brings_the_head_makes_a_classifier_of_a_language_model(base: Path, tmp_path: Path) -> None:
    """Qwen3 + LoRA + linear head: the base is a language model, the head is in the adapter."""
    classifier = tiny("qwen3", num_labels=4)
    classifier.hf.model.load_state_dict(tiny("qwen3").hf.model.state_dict())
    path = adapter(classifier, tmp_path / "lora", task_type="SEQ_CLS")
    model = mi.Model.load(str(base), adapter=str(path))
    assert model.dims.n_labels == 4
    saved = safetensors.torch.load_file(path / "adapter_model.safetensors")["base_model.model.score.weight"]
    torch.testing.assert_close(model.W_U, saved)
    final = model.trace([[5, 6, 7]], ["final_norm", "logits"])
    torch.testing.assert_close(final["logits"], final["final_norm"] @ saved.T)
    plain = tiny("qwen3").trace([[5, 6, 7]], "final_norm")["final_norm"]
    with model.without_adapter():  # the body is the base's; its head would be random, so the adapter's stays
        off = model.trace([[5, 6, 7]], ["final_norm", "logits"])
    assert torch.equal(off["final_norm"], plain)
    torch.testing.assert_close(off["logits"], plain @ saved.T)


def test_wrong_adapters(base: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(name: str, config: dict[str, Any] | None = None) -> Path:
        path = Path(shutil.copytree(lora, tmp_path / name))
        if config is not None:
            old = json.loads((path / "adapter_config.json").read_text())
            (path / "adapter_config.json").write_text(json.dumps(old | config))
        return path

    def load(path: Path | str) -> None:
        mi.Model.load(str(base), adapter=str(path))

    other = save(tiny("qwen3", head_dim=16), tmp_path / "wide" / "tiny-base")
    with pytest.raises(ModelError, match=r"does not fit .*size mismatch.*load it on the base that it was trained on"):
        mi.Model.load(str(other), adapter=str(lora))
    shallow = save(tiny("qwen3", layers=2), tmp_path / "shallow" / "tiny-base")
    with pytest.raises(ModelError, match=r"does not fit .*the model has no place for .*layers\.2"):
        mi.Model.load(str(shallow), adapter=str(lora))
    deep = save(tiny("qwen3", layers=4), tmp_path / "deep" / "tiny-base")
    with pytest.raises(ModelError, match=r"does not fit .*it has nothing for .*layers\.3"):
        mi.Model.load(str(deep), adapter=str(lora))
    with pytest.raises(ModelError, match=r"does not fit .*Target modules"):
        load(spoiled("targets", {"target_modules": ["query_key_value"]}))
    with pytest.raises(ModelError, match=r"'PROMPT_TUNING', which is no set of layers"):
        load(spoiled("prompt", {"peft_type": "PROMPT_TUNING"}))
    asked: list[Any] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *host: asked.append(host))
    with pytest.warns(UserWarning, match="says that it was trained on 'someone/else'"):
        load(spoiled("named", {"base_model_name_or_path": "someone/else"}))
    assert not asked  # nobody asked for the network
    cut = spoiled("cut")
    whole = (cut / "adapter_model.safetensors").read_bytes()
    (cut / "adapter_model.safetensors").write_bytes(whole[:50])
    with pytest.raises(ModelError, match=r"cannot be read .*get it again"):
        load(cut)
    (cut / "adapter_model.safetensors").unlink()
    torch.save({}, cut / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"only pickled weights.*save the adapter again"):
        load(cut)
    (cut / "adapter_config.json").unlink()
    with pytest.raises(ModelError, match=r"has no adapter_config.json"):
        load(cut)
    with pytest.raises(ModelError, match=r"there is no folder ./nowhere"):
        load("./nowhere")


def test_incomplete_and_mismatched_checkpoints(tmp_path: Path) -> None:
    path = save(tiny("llama", num_labels=3), tmp_path / "wide")
    weights = safetensors.torch.load_file(path / "model.safetensors")
    safetensors.torch.save_file(
        weights | {"score.weight": torch.zeros(3, 20)}, path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ModelError, match=r"score.weight of .* has shape \(3, 20\) .* makes it \(3, 32\)"):
        mi.Model.load(str(path))
    safetensors.torch.save_file(
        {k: v for k, v in weights.items() if k != "score.weight"}, path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ModelError, match=r"has no weights for score.weight, which would be random in LlamaFor"):
        mi.Model.load(str(path))
    sharded = tmp_path / "sharded"
    tiny("llama").hf.save_pretrained(sharded, max_shard_size="30KB")
    gone = sorted(sharded.glob("model-0000*"))[1]
    gone.unlink()
    with pytest.raises(ModelError, match=rf"has \d of \d shards; get {gone.name}"):
        mi.Model.load(str(sharded))
    (sharded / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ModelError, match=r"index.json cannot be read"):
        mi.Model.load(str(sharded))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "qwen3_moe"])
def test_unknown_attention_and_other_kinds_of_models(tmp_path: Path, family: str) -> None:
    path = save(tiny(family), tmp_path / "model")
    config = json.loads((path / "config.json").read_text())

    def loads(**changed: Any) -> mi.Model:
        (path / "config.json").write_text(json.dumps(config | changed))
        return mi.Model.load(str(path))

    with pytest.raises(ModelError, match=r"kernel that it, .*nonesuch.*load it with attn_implementation=\"sdpa\""):
        loads(attn_implementation="nonesuch")
    # Given layer types, transformers takes a Mistral for a Ministral, which has no row.
    linear = "'ministral' are not in" if family == "mistral" else "names the attention 'linear_attention' in layer 0"
    with pytest.raises(ModelError, match=linear):
        loads(layer_types=["linear_attention", "full_attention", "full_attention"])
    with pytest.raises(ModelError, match=r"is a LlamaForTokenClassification, which is neither"):
        loads(architectures=["LlamaForTokenClassification"])
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"load it with attn_implementation=\"sdpa\""):
        mi.Model.load(str(path), attn_implementation="nonesuch")


def test_dtype_device_and_device_map(tmp_path: Path) -> None:
    path = str(save(tiny("llama"), tmp_path / "model"))
    assert mi.Model.load(path, dtype="bfloat16").dtype == torch.bfloat16
    mapped = mi.Model.load(path, device_map="auto")
    ids = [[5, 6, 7]]
    torch.testing.assert_close(
        mapped.trace(ids, "logits")["logits"].cpu(), tiny("llama").trace(ids, "logits")["logits"], atol=1e-4, rtol=1e-4
    )
    with pytest.raises(ModelError, match=r"device and device_map say the same thing twice"):
        mi.Model.load(path, device="cpu", device_map="auto")
    with pytest.raises(ModelError, match=r"dtype of Model.load must be 'float32'.* Got 'int8'"):
        mi.Model.load(path, dtype="int8")
    offloaded = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu"}
    offloaded["model.rotary_emb"] = "cpu"
    with pytest.raises(ModelError, match=r"leaves weights of .* on disk"):
        mi.Model.load(path, device_map=offloaded)


def test_without_a_tokenizer(tmp_path: Path) -> None:
    tiny("llama").hf.save_pretrained(tmp_path)
    model = mi.Model.load(str(tmp_path))
    assert "no tokenizer: prompts and answers must be token ids" in repr(model)
    with pytest.raises(ExamplesError, match=r"this model has no tokenizer; give token ids"):
        model.trace("hello", "embed")
    with pytest.raises(ExamplesError, match=r"this model has no tokenizer; give its token id"):
        model.tokenize(mi.Examples.of([[5, 6]], answers=[" Paris"]))
    assert model.generate([5, 6], max_new_tokens=2).text is None


def test_a_gated_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def gated(*args: object, **kwargs: object) -> None:
        raise OSError("You are trying to access a gated repo.\nMake sure to have access to it")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", gated)
    with pytest.raises(ModelError, match=r"is a gated model on the hub: accept its terms there, then set HF_TOKEN"):
        mi.Model.load("meta-llama/Llama-3.1-8B")
