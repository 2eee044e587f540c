"""Roles by weights: against dense matrices, the model's own rotated queries and keys, and planted heads."""

import numpy as np
import pytest
import torch
from scipy import stats

import mechinterp as mi
from mechinterp import sites
from mechinterp.analyzers.weight_roles import copying, previous_by_rotary
from mechinterp.errors import ModelError
from mechinterp.tasks import planted
from mechinterp.testing import tiny


def dense_circuits(model: mi.Model, layer: int) -> torch.Tensor:
    """W_E γ W_V W_O γ_f W_Uᵀ of every head, built: head vocab vocab."""
    block = model.hf.model.layers[layer]
    read = model.hf.model.embed_tokens.weight * block.input_layernorm.weight
    write = model.hf.lm_head.weight * model.hf.model.norm.weight
    d, group = model.dims.d_head, model.dims.n_heads // model.dims.n_kv_heads
    out = []
    for head in range(model.dims.n_heads):
        v = block.self_attn.v_proj.weight[head // group * d : (head // group + 1) * d]
        o = block.self_attn.o_proj.weight[:, head * d : (head + 1) * d]
        out.append(read @ v.T @ o.T @ write.T)
    return torch.stack(out).detach()


def test_copying_scores_are_those_of_the_dense_circuits(model: mi.Model) -> None:
    score, _ = copying(model)
    for layer in range(3):
        values = torch.linalg.eigvals(dense_circuits(model, layer).double())
        expected = values.real.sum(-1) / values.abs().sum(-1)
        np.testing.assert_allclose(score[layer], expected, atol=2e-4)


def test_folded_circuits_are_those_of_the_norms_and_weights(model: mi.Model) -> None:
    layer = 1
    block = model.hf.model.layers[layer]
    x, y = torch.randn(2, 5, model.dims.d_model, generator=torch.Generator().manual_seed(0))
    gamma = block.input_layernorm.weight
    with torch.no_grad():
        value = (x * gamma) @ block.self_attn.v_proj.weight.T
        wide = value.unflatten(-1, (2, -1)).repeat_interleave(2, 1).flatten(1)
        torch.testing.assert_close((x @ model.OV(layer, fold=True).AB).sum(0), wide @ block.self_attn.o_proj.weight.T)
        q = ((x * gamma) @ block.self_attn.q_proj.weight.T).unflatten(-1, (4, -1))
        k = ((y * gamma) @ block.self_attn.k_proj.weight.T).unflatten(-1, (2, -1)).repeat_interleave(2, 1)
        size = torch.ones(5, 4)
        if model.arch.qk_norm:
            normed = block.self_attn.q_norm(q), block.self_attn.k_norm(k)
            norms = (block.self_attn.q_norm.weight * q, block.self_attn.k_norm.weight * k)
            size = torch.stack([n.norm(dim=-1) / m.norm(dim=-1) for n, m in zip(norms, normed, strict=True)]).prod(0)
            q, k = normed
        expected = (q * k).sum(-1) * size  # with q/k-norm, up to a positive number for each query and key
        got = torch.einsum("nd,hde,ne->nh", x, model.QK(layer, fold=True).AB, y)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_scaling_a_head_changes_nothing_and_turning_its_sign_turns_the_score() -> None:
    model = tiny("qwen2")
    score, p = copying(model)
    with torch.no_grad():
        model.hf.model.layers[1].self_attn.o_proj.weight.mul_(-3)
    turned, same = copying(model)
    np.testing.assert_allclose(turned[1], -score[1], atol=1e-4)
    np.testing.assert_allclose(same, p, atol=1e-4)
    np.testing.assert_allclose(turned[::2], score[::2])


def test_the_null_of_copying_is_what_random_rotations_give() -> None:
    model = tiny("llama", seed=2)
    _, p = copying(model)
    gamma = model.hf.model.layers[0].input_layernorm.weight.detach()
    overlap = (model.W_U * model.hf.model.norm.weight).T @ model.W_E
    rng = np.random.default_rng(0)
    rotations = torch.from_numpy(stats.ortho_group(32, seed=rng).rvs(4000)).float()
    for head in range(4):
        ov = gamma[:, None] * model.W_V(0, per_query_head=True)[head] @ model.W_O(0)[head]
        fixed = (ov @ overlap).detach()
        drawn = torch.einsum("nij,ji->n", rotations, fixed).abs()
        assert p[0, head] == pytest.approx(float((drawn >= fixed.trace().abs()).float().mean()), abs=0.04)


def test_p_of_both_roles_is_uniform_on_random_models() -> None:
    found = [(copying(m)[1], previous_by_rotary(m, 20, 1, s)[2]) for s in range(24) for m in [tiny("llama", seed=s)]]
    for values in map(np.ravel, map(np.stack, zip(*found, strict=True))):
        assert stats.kstest(values, "uniform").pvalue > 0.001
        assert np.mean(values < 0.05) < 0.1


def test_mean_scores_by_distance_against_the_run(model: mi.Model) -> None:
    """At layer 0, where the residual is the embedding: rotated queries and keys of every token are averaged."""
    width, vocab = 7, model.dims.vocab
    score, _, _ = previous_by_rotary(model, width, 1, 0)
    texts = torch.arange(vocab)[:, None].expand(-1, width)
    trace = model.trace(texts, [sites.q_rot(0), sites.k_rot(0, per_query_head=True)])
    q = trace[sites.q_rot(0)].mean(0)  # pos head d_head
    k = trace[sites.k_rot(0, per_query_head=True)].mean(0)[0]
    scale, window = model.hf.model.layers[0].self_attn.scaling, model.dims.windows[0] or width
    for head in range(4):
        shares = []
        for query in range(1, width):
            by_distance = [float(q[d, head] @ k[head]) * scale for d in range(min(query + 1, window))]
            shares.append(np.exp(by_distance[1]) / np.exp(by_distance).sum())
        assert score[0, head] == pytest.approx(np.mean(shares), abs=1e-5)


def test_more_draws_where_none_reached_the_score() -> None:
    model = planted.induction(2).model
    few, many = (previous_by_rotary(model, 20, tests, 0)[2] for tests in (1, 5000))
    assert few[0, 1] < 0.02
    assert many[0, 1] <= few[0, 1]
    np.testing.assert_array_equal(many[many > 2e-3], few[many > 2e-3])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_planted_induction_and_previous_token_heads_are_named_and_no_others(seed: int) -> None:
    """a0.h0 is the twin of a0.h1: it looks where that looks, and writes to junk."""
    one = planted.induction(24, seed)
    data = mi.run(one.model, one.pairs, mi.HeadRoles(length=10, seed=seed)).data

    def named(text: str, role: str) -> set[str]:
        cells = data["specialised"].sel(text=text, role=role).values.nonzero()
        return {f"a{layer}.h{head}" for layer, head in zip(*cells, strict=True)}

    for text in ("prompts", "random"):
        assert named(text, "induction") == {"a1.h2"}
        assert named(text, "previous") == {"a0.h0", "a0.h1"}
    assert named("weights", "previous") == {"a0.h0", "a0.h1"}
    assert named("weights", "copying") == {"a1.h2"}
    written = data["score"].sel(role="previous", head=[0, 1], layer=0)
    np.testing.assert_allclose(written.sel(text="weights"), written.sel(text="random"), atol=1e-4)


def test_the_copying_head_of_another_planted_model() -> None:
    one = planted.copy(8)
    score, p = copying(one.model)
    assert score[1, 1] == pytest.approx(1, abs=1e-4)
    assert p[1, 1] < 1e-4
    assert np.isnan(np.delete(score.ravel(), 5)).all()  # they write to junk, which no logit reads
    assert np.isnan(np.delete(p.ravel(), 5)).all()


def test_a_classifier_has_no_copying_heads() -> None:
    model = tiny("qwen2", num_labels=3)
    data = mi.run(model, [[5, 6, 7, 5]] * 8, mi.HeadRoles(sequences=0)).data
    assert data["score"].sel(text="weights", role="copying").isnull().all()
    assert data["score"].sel(text="weights", role="previous").notnull().all()


def test_thirds_and_the_rest_of_the_result_add_up(model: mi.Model) -> None:
    data = mi.run(model, [[5, 6, 7, 5, 6]] * 8, mi.HeadRoles(sequences=2, length=6)).data
    assert data["heads"].sum("third").equals(data["specialised"].sum(("layer", "head")))
    one = data["score"].sel(text="weights", role="copying", layer=2).mean("head")
    assert float(data["mean_score"].sel(text="weights", role="copying", third="late")) == pytest.approx(float(one))
    without = mi.run(model, [[5, 6, 7, 5, 6]] * 8, mi.HeadRoles(sequences=2, length=6, weights=False)).data
    assert without["q"].equals(data["q"].sel(text=["prompts", "random"], role=without["role"]))


def test_queries_and_keys_that_are_normed_have_no_matrix_but_folded() -> None:
    model = tiny("qwen3")
    with pytest.raises(ModelError, match="norms q and k"):
        model.QK(0)
    assert model.QK(0, fold=True).shape == (4, 32, 32)


def test_roles_by_weights_of_the_real_model(smollm2: mi.Model) -> None:
    score, p = copying(smollm2)
    assert 100 < int((score > 0.5).sum()) < 180
    assert int((score < -0.5).sum()) > 20
    assert float(np.median(p)) < 0.01
    previous, null, q = previous_by_rotary(smollm2, 48, 540, 0)
    assert previous[1, 2] - null[1, 2] > 0.1  # a previous-token head on text as well
    assert q[1, 2] < 0.01
