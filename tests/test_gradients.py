"""Gradients by layer and neurons by importance, against autograd on plain hooks and a planted neuron."""

import numpy as np
import pytest
import torch

import mechinterp as mi
from mechinterp import sites
from mechinterp.errors import NeedsError, SiteError


def examples(ids: list[list[int]]) -> mi.Examples:
    return mi.Examples.of([ids[0], ids[1][:6], ids[2]], answers=[(5, 9), (6, 7), ([8, 9], 3)])


def hooked(model: mi.Model, path: str, ids: list[int], end: str = "out") -> tuple[torch.Tensor, torch.Tensor]:
    """What a module gives (or takes) and the gradient of logit 5 - logit 9 there, by a hook on plain Hugging Face."""
    kept: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, args: tuple, out: object = None) -> None:
        value = args[0] if end == "in" else out[0] if isinstance(out, tuple) else out
        assert isinstance(value, torch.Tensor)
        value.retain_grad()
        kept.append(value)

    module = model.hf.get_submodule(path)
    handle = module.register_forward_pre_hook(keep) if end == "in" else module.register_forward_hook(keep)
    try:
        logits = model.hf(torch.tensor([ids]), use_cache=False).logits[0, -1]
        (logits[5] - logits[9]).backward()
    finally:
        handle.remove()
        model.hf.zero_grad()
    assert kept[0].grad is not None
    return kept[0].detach(), kept[0].grad


def test_norms_equal_hooks_on_plain_hugging_face(model: mi.Model, ids: list[list[int]]) -> None:
    found = mi.run(model, examples(ids), mi.GradientAnalysis(mi.logit_diff())).data
    for layer in range(model.dims.n_layers):
        _, grad = hooked(model, model.arch.layer(layer) + ".self_attn", ids[0])
        got = found["norm"].sel(kind="attn_out", layer=layer, example=0).values[: len(ids[0])]
        np.testing.assert_allclose(got, grad[0].norm(dim=-1), atol=1e-5, rtol=1e-3)
    _, grad = hooked(model, f"{model.arch.base}.{model.arch.embed}", ids[0])
    np.testing.assert_allclose(found["input_norm"][0].values, grad[0].norm(dim=-1), atol=1e-5, rtol=1e-3)
    assert np.isnan(found["norm"].values[:, 1, :, 6:]).all()
    assert (found["attention_norm"].values > 0).all()


def test_gradient_analysis_keeps_the_contract() -> None:
    mi.testing.check_analyzer(mi.GradientAnalysis(mi.logit_diff()), models=[mi.testing.tiny("qwen3_moe")])


def test_neuron_importance_keeps_the_contract() -> None:
    analyzer = mi.NeuronImportance(mi.logit_diff(), "integrated-gradients", sizes=(1, 5), steps=3)
    mi.testing.check_analyzer(analyzer, models=[mi.testing.tiny("qwen2")], ties=("rank", "curve", "ci_low", "ci_high"))


def test_neuron_scores_equal_hooks_on_plain_hugging_face(ids: list[list[int]], model: mi.Model) -> None:
    if model.dims.sparse:
        with pytest.raises(SiteError, match="fused"):
            mi.run(model, examples(ids), mi.NeuronImportance(mi.logit_diff(), sizes=(1,)))
        return
    one = mi.Examples.of([ids[0]], answers=[(5, 9)])
    for method in ("gradient", "gradient-x-activation"):
        analyzer = mi.NeuronImportance(mi.logit_diff(), method, sizes=(1,))  # type: ignore[arg-type]
        found = mi.run(model, one, analyzer).data
        for layer in range(model.dims.n_layers):
            act, grad = hooked(model, model.arch.layer(layer) + ".mlp.down_proj", ids[0], "in")
            expected = (grad.abs() if method == "gradient" else grad * act)[0].sum(0)
            np.testing.assert_allclose(found["score"].sel(layer=layer), expected, atol=1e-5, rtol=1e-3)


def test_the_curve_is_what_zeroing_the_first_neurons_leaves(llama: mi.Model) -> None:
    some = mi.tasks.ioi(4, seed=0)
    found = mi.run(llama, some, mi.NeuronImportance(mi.logit_diff(), sizes=(1, 6))).data
    first = found["rank"].values < 6
    writes = [
        mi.Zero(sites.mlp_act(layer, neurons=tuple(np.flatnonzero(first[layer]).tolist())))
        for layer in range(llama.dims.n_layers)
        if first[layer].any()
    ]
    swept = mi.sweep(llama, some, {"off": writes}, mi.logit_diff())
    assert float(found["curve"].sel(order="ranked", size=6)) == pytest.approx(
        float(swept.data["value"].mean()), abs=1e-5
    )


def test_a_planted_neuron_comes_first() -> None:
    model = mi.testing.tiny("llama", layers=2, seed=3)
    down = model.hf.get_submodule(model.arch.layer(1) + ".mlp.down_proj")
    with torch.no_grad():  # one neuron writes the answer's own direction
        down.weight[:, 17] = 40 * (model.W_U[5] - model.W_U[9])
    some = mi.Examples.of([[3, 4, 6, 2], [8, 2, 7]], answers=[(5, 9), (5, 9)])
    for method in ("gradient", "gradient-x-activation"):
        found = mi.run(model, some, mi.NeuronImportance(mi.logit_diff(), method, sizes=(1,))).data  # type: ignore[arg-type]
        assert int(found["rank"].sel(layer=1, neuron=17)) == 0, method


def test_bad_input(llama: mi.Model) -> None:
    odd = mi.NeuronImportance()
    object.__setattr__(odd, "method", "taylor")  # as it would be without run-time type checks
    with pytest.raises(NeedsError, match="method of NeuronImportance"):
        odd.__post_init__()
    with pytest.raises(NeedsError, match="sizes of NeuronImportance"):
        mi.NeuronImportance(sizes=())
    with pytest.raises(NeedsError, match="cannot be switched off"):
        mi.run(llama, mi.tasks.ioi(2), mi.NeuronImportance(sizes=(10_000,)))
    model = mi.testing.tiny("llama")
    model.hf.is_loaded_in_4bit = True
    with pytest.raises(NeedsError, match="4-bit"):
        mi.run(model, mi.tasks.ioi(2), mi.GradientAnalysis())
