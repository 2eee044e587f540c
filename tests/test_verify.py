"""The self-check holds on every model that we wrap, and each of its checks can fail."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mechinterp as mi
from mechinterp.engine import verify as module
from mechinterp.errors import ModelError
from mechinterp.model.architecture import FAMILIES, Architecture
from mechinterp.model.attention import Pass
from mechinterp.testing import hook_count, tiny

QUICK = [
    "every site fires",
    "all values are finite",
    "logits of a hooked pass are the bare model's, to the bit",
    "embedding, attention and MLPs sum to the final residual",
    "heads sum to the attention's output",
    "the final norm multiplies by its weight over the root mean square",
]
STATE = "hooks, attention kernel and weights are as they were"
FULL = [
    *QUICK,
    "residual streams are transformers' hidden states, to the bit",
    "patterns are those of transformers' eager attention",
    "what is written back as it is changes nothing",
    "an edit at any site changes the logits",
    "up to 16 tokens of left padding change nothing",
    "up to 16 tokens of right padding change nothing",
    "batches of 2, 4 and 8 give what one prompt alone gives",
    "decoding with a cache gives what one full pass gives",
    "bf16: top tokens that differ from fp32's",
    STATE,
]


def failed(model: mi.Model, quick: bool = False) -> dict[str, str]:
    """Name → detail of the checks that fail."""
    return {c.name: c.detail for c in mi.verify(model, quick=quick).checks if not c.passed}


# It holds


def test_every_family(model: mi.Model) -> None:
    found = mi.verify(model)
    assert found.passed, str(found)
    assert [c.name for c in found.checks] == FULL
    assert [c.name for c in mi.verify(model, quick=True).checks] == [*QUICK, STATE]
    table = found.table().set_index("check")
    assert table["passed"].all()
    assert table.loc["an edit at any site changes the logits", "detail"] == f"{sites_and_views(model)} sites"
    assert table["tolerance"].isna().sum() == 1  # bf16's flips are told, not judged
    assert str(found).splitlines()[-1] == f"all {len(FULL)} checks hold"
    assert "<table" in found._repr_html_()


def sites_and_views(model: mi.Model) -> int:
    return len(model.sites) + sum(site.kind in ("k", "k_normed", "k_rot", "v") for site in model.sites)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(either: mi.Model, dtype: torch.dtype) -> None:
    found = mi.verify(tiny(either.arch.family, dtype=dtype))
    assert found.passed, str(found)
    exact = [c for c in found.checks if "to the bit" in c.name]
    assert [c.value for c in exact] == [0, 0]


def test_ways_in() -> None:
    classifier = mi.verify(tiny("qwen3", num_labels=3))
    assert classifier.passed, str(classifier)
    assert len(classifier.checks) == len(FULL) - 2  # it neither decodes nor has a top token
    bare = mi.Model.wrap(tiny("llama").hf)
    assert bare.tokenizer is None
    assert mi.verify(bare).passed
    ungrouped = mi.verify(tiny("llama", num_key_value_heads=4))  # no views per query head
    assert ungrouped.passed
    eager = tiny("qwen2")
    eager.hf.set_attn_implementation("eager")
    assert mi.verify(eager).passed
    assert eager.kernel == "eager"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")  # which peft asks for
def test_with_an_adapter() -> None:
    import peft

    torch.manual_seed(0)
    wrapped = peft.get_peft_model(
        tiny("qwen3").hf, peft.LoraConfig(target_modules=["q_proj", "o_proj", "up_proj"], init_lora_weights=False)
    )
    model = mi.Model.wrap(wrapped)
    assert mi.verify(model).passed
    with model.without_adapter():
        assert mi.verify(model).passed


def test_it_tells_each_check_and_leaves_the_model_alone() -> None:
    model = tiny("llama")
    mi.verify(model)  # transformers has registered its own hooks now
    before = (hook_count(model.hf), model.kernel, model.fingerprint, [p._version for p in model.hf.parameters()])
    told: list[module.Check] = []
    found = mi.verify(model, told=told.append)
    assert tuple(told) == found.checks
    assert all(c.seconds >= 0 for c in told)
    after = (hook_count(model.hf), model.kernel, model.fingerprint, [p._version for p in model.hf.parameters()])
    assert after == before


# It can fail


@pytest.fixture
def no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward that is patched below would, in a copy of the model, still be the original's."""
    monkeypatch.setattr(module, "FLIPS_BYTES", 0)


def scaled(by: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    """A hook that changes what comes out of a module."""
    return lambda m, args, out: (by(out[0]), *out[1:]) if isinstance(out, tuple) else by(out)


def test_a_residual_that_is_not_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "granite", Architecture("granite"))
    assert mi.verify(tiny("granite")).passed  # its multipliers are one
    assert list(failed(tiny("granite", residual_multiplier=0.5))) == [QUICK[3]]
    assert QUICK[2] in failed(tiny("granite", logits_scaling=2.0))
    assert QUICK[3] in failed(tiny("granite", embedding_multiplier=3.0))


def test_layers_without_rotary(monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolLM3 turns no keys in every fourth layer; a key that is written per query head must not be, either."""
    monkeypatch.setitem(FAMILIES, "smollm3", Architecture("smollm3"))
    model = tiny("smollm3", layers=4)
    assert [bool(layer.self_attn.use_rope) for layer in model.hf.model.layers] == [True, True, True, False]
    assert mi.verify(model).passed
    for layer in model.hf.model.layers:
        layer.self_attn.use_rope = not layer.self_attn.use_rope
    assert mi.verify(model).passed


def test_a_layer_that_turns_its_keys_otherwise() -> None:
    model = tiny("llama")

    def still(m: Any, args: Any, kwargs: Any) -> Any:
        cos, sin = kwargs["position_embeddings"]
        return args, {**kwargs, "position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))}

    model.hf.model.layers[2].self_attn.register_forward_pre_hook(still, with_kwargs=True)
    assert failed(model) == {"what is written back as it is changes nothing": "keys and values per query head"}


def test_another_norm(monkeypatch: pytest.MonkeyPatch, no_copy: None) -> None:
    """Gemma multiplies by 1 + γ, and its norm names its ε otherwise."""
    monkeypatch.setitem(FAMILIES, "gemma", Architecture("gemma"))
    found = failed(tiny("gemma"))
    assert list(found) == ["quick: runs without an error"]
    assert "variance_epsilon" in found["quick: runs without an error"]
    model = tiny("llama")
    norm = model.hf.model.norm
    monkeypatch.setattr(norm, "forward", lambda x: type(norm).forward(norm, x) + x / 100)
    assert list(failed(model)) == [QUICK[5]]


def test_a_site_that_never_fires(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    attention = model.hf.model.layers[1].self_attn

    def unhooked(*args: Any, **kwargs: Any) -> Any:  # what torch.compile, or a fused kernel, may do
        return attention.o_proj.forward(torch.zeros(*kwargs["hidden_states"].shape[:2], 32)), None

    monkeypatch.setattr(attention, "forward", unhooked)
    found = failed(model, quick=True)
    assert list(found) == ["every site fires"]
    assert "q.1" in found["every site fires"]


def test_values_that_are_not_finite() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.hf.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    found = failed(model, quick=True)
    assert "all values are finite" in found
    assert "mlp_up.1" in found["all values are finite"]
    assert QUICK[3] in found  # a NaN is never within a tolerance


def test_a_hooked_pass_that_differs() -> None:
    model = tiny("llama")

    def noticing(m: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return ((args[0] * 1.001, *args[1:]), kwargs) if isinstance(kwargs.get("mechinterp"), Pass) else None

    model.hf.model.layers[1].register_forward_pre_hook(noticing, with_kwargs=True)
    found = failed(model)
    assert QUICK[2] in found
    assert "residual streams are transformers' hidden states, to the bit" in found


def test_heads_that_do_not_sum() -> None:
    model = tiny("llama")
    model.hf.model.layers[2].self_attn.o_proj.register_forward_hook(scaled(lambda out: out * 1.01))
    assert QUICK[4] in failed(model, quick=True)
    assert {c.name: c.detail for c in mi.verify(model, quick=True).checks}[QUICK[4]] == "layer 2"


def test_other_patterns_than_eager_attention() -> None:
    model = tiny("llama")
    attention: Any = model.hf.model.layers[1].self_attn

    def cooler(m: Any, args: Any, kwargs: Any) -> None:
        m.scaling = 0.2 if model.kernel == "eager" else 8**-0.5

    attention.register_forward_pre_hook(cooler, with_kwargs=True)
    assert list(failed(model)) == ["patterns are those of transformers' eager attention"]


def test_a_silent_edit(monkeypatch: pytest.MonkeyPatch, no_copy: None) -> None:
    model = tiny("llama")
    mlp: Any = model.hf.model.layers[1].mlp
    weight = mlp.down_proj.weight

    def bypassing(x: torch.Tensor) -> torch.Tensor:  # the module is called, and what it gives is not used
        act = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
        mlp.down_proj(act)
        return act @ weight.T

    monkeypatch.setattr(mlp, "forward", bypassing)
    assert failed(model) == {"an edit at any site changes the logits": "mlp_act.1"}


def test_a_write_that_is_never_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mechinterp.model.attention._per_query_head", lambda *_: None)
    found = failed(tiny("llama"))
    assert list(found) == ["edits: runs without an error"]
    assert "Apply at k.0 was never reached" in found["edits: runs without an error"]


def test_positions_that_padding_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    rotary: Any = model.hf.model.rotary_emb
    whole = type(rotary).forward

    def by_column(x: torch.Tensor, position_ids: torch.Tensor) -> Any:  # learned, absolute positions would do this
        cos, sin = whole(rotary, x, position_ids)
        columns = torch.arange(x.shape[1]) / 10
        return cos + columns[:, None], sin

    monkeypatch.setattr(rotary, "forward", by_column)
    found = failed(model)
    assert "up to 16 tokens of left padding change nothing" in found
    assert "up to 16 tokens of right padding change nothing" not in found


def test_attention_to_padding() -> None:
    model = tiny("llama")

    def last(m: Any, args: Any, kwargs: Any, out: Any) -> Any:  # what comes after a token reaches it
        return (out[0] + out[0].mean(1, keepdim=True), *out[1:])

    model.hf.model.layers[0].self_attn.register_forward_hook(last, with_kwargs=True)
    assert "up to 16 tokens of right padding change nothing" in failed(model)


def test_rows_that_talk_to_each_other() -> None:
    model = tiny("llama")
    model.hf.model.layers[0].mlp.register_forward_hook(scaled(lambda out: out + out.mean(0, keepdim=True) - out[:1]))
    found = failed(model)
    assert list(found) == ["batches of 2, 4 and 8 give what one prompt alone gives"]


def test_decoding_that_is_not_the_full_pass() -> None:
    model = tiny("llama")

    def short(m: Any, args: Any, kwargs: Any, out: Any) -> Any:
        return (out[0] * 1.01, *out[1:]) if kwargs["hidden_states"].shape[1] == 1 else None

    model.hf.model.layers[1].self_attn.register_forward_hook(short, with_kwargs=True)
    assert list(failed(model)) == ["decoding with a cache gives what one full pass gives"]


def test_what_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    quick = module._quick

    def leaving(model: mi.Model) -> Any:
        yield from quick(model)
        model.hf.register_forward_hook(lambda *_: None)
        model.W_E.mul_(1.0)

    monkeypatch.setattr(module, "_quick", leaving)
    assert failed(model) == {STATE: "hooks, weights"}


def test_a_check_that_cannot_be_made_is_a_failed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")

    def broken(model: mi.Model) -> Any:
        raise ZeroDivisionError("on\npurpose")

    monkeypatch.setattr(module, "_oracles", broken)
    found = mi.verify(model)
    assert {c.name: c.detail for c in found.checks if not c.passed} == {
        "broken: runs without an error": "ZeroDivisionError: on purpose"
    }
    assert found.summary == f"1 of {len(FULL) - 1} checks failed: broken: runs without an error"


# At load


@pytest.fixture
def spoiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint whose residual stream is not the sum of its parts."""
    monkeypatch.setitem(FAMILIES, "granite", Architecture("granite"))
    model = tiny("granite", residual_multiplier=0.5)
    model.hf.save_pretrained(tmp_path / "granite")
    model.tokenizer.save_pretrained(tmp_path / "granite")
    return tmp_path / "granite"


def test_load_refuses_what_fails_its_quick_check(spoiled: Path) -> None:
    with pytest.raises(ModelError, match=rf"granite fails its self-check: {QUICK[3]}: .* relative.*check=False"):
        mi.Model.load(str(spoiled))
    assert mi.Model.load(str(spoiled), check=False).dims.n_layers == 3


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    small = tiny("llama", vocab_size=40)
    small.hf.save_pretrained(tmp_path / "model")
    small.tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match=r"the tokenizer of .* is not this model's: its token ids go beyond"):
        mi.Model.load(str(tmp_path / "model"))
    os.remove(tmp_path / "model" / "tokenizer.json")
    os.remove(tmp_path / "model" / "tokenizer_config.json")
    assert mi.Model.load(str(tmp_path / "model")).tokenizer is None


def test_it_says_nothing_by_itself(capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mi.verify(tiny("qwen3"))
    assert capfd.readouterr() == ("", "")


def test_smollm2(smollm2: mi.Model) -> None:
    found = mi.verify(smollm2)
    assert found.passed, str(found)


@pytest.mark.parametrize("where", ["batch", "padding", "weights"])
def test_nothing_that_is_not_a_number_passes(where: str) -> None:
    model = mi.testing.tiny("qwen3")
    nan = float("nan")

    def spoil(module: torch.nn.Module, args: Any) -> Any:
        return (
            (args[0] * nan, *args[1:]) if len(args[0]) > 1 or (where == "padding" and args[0].shape[1] > 20) else None
        )

    if where == "weights":
        with torch.no_grad():
            model.hf.model.layers[1].mlp.up_proj.weight.fill_(nan)
    else:
        model.hf.model.norm.register_forward_pre_hook(spoil)
    failed = {check.name for check in mi.verify(model).checks if not check.passed}
    assert any("batches" in name for name in failed)
    assert ("up to 16 tokens of left padding change nothing" in failed) == (where != "batch")
