"""Singular directions and composition of heads, against dense matrices and what is planted."""

import numpy as np
import pytest
import torch
from scipy import stats

import mechinterp as mi
from mechinterp.analyzers.head_weights import composition
from mechinterp.tasks import planted
from mechinterp.testing import tiny


def dense(model: mi.Model, layer: int, head: int) -> dict[str, torch.Tensor]:
    """OV and QK of a head, built, with the norms' weights."""
    block = model.hf.model.layers[layer]
    attention, d, group = block.self_attn, model.dims.d_head, model.dims.n_heads // model.dims.n_kv_heads
    own, shared = slice(head * d, (head + 1) * d), slice(head // group * d, (head // group + 1) * d)
    gamma = block.input_layernorm.weight.diag()
    q, k = attention.q_proj.weight[own], attention.k_proj.weight[shared]
    if model.arch.qk_norm:
        q, k = attention.q_norm.weight[:, None] * q, attention.k_norm.weight[:, None] * k
    ov = gamma @ attention.v_proj.weight[shared].T @ attention.o_proj.weight[:, own].T
    return {"OV": ov.detach(), "QK": (gamma @ q.T @ k @ gamma).detach()}


def test_composition_is_that_of_the_dense_matrices(model: mi.Model) -> None:
    """TransformerLens: left.norm * right.norm divides the norm of their product; right is QK, QKᵀ or OV."""
    found = composition(model)
    assert found[:, 0, :, 0].isnan().all()
    assert found[:, 2, :, 1].isnan().all()
    for s, r in ((0, 1), (0, 2), (1, 2)):
        for sender in range(4):
            for receiver in range(4):
                left, right = dense(model, s, sender)["OV"], dense(model, r, receiver)
                for i, w in enumerate((right["QK"], right["QK"].T, right["OV"])):
                    expected = float((left @ w).norm() / (left.norm() * w.norm()))
                    assert float(found[i, s, sender, r, receiver]) == pytest.approx(expected, abs=1e-5)


def test_what_is_subtracted_is_the_root_mean_square_over_random_rotations() -> None:
    """Whatever the singular values."""
    model = tiny("qwen2")
    left, right = dense(model, 0, 1)["OV"], dense(model, 2, 3)["QK"]
    rotations = torch.from_numpy(stats.ortho_group(32, seed=np.random.default_rng(0)).rvs(2000)).float()
    squares = torch.linalg.matrix_norm(left @ rotations @ right).square() / (left.norm() * right.norm()) ** 2
    assert float(squares.mean().sqrt()) == pytest.approx(1 / 32**0.5, rel=0.02)
    data = mi.run(model, [[5]], mi.HeadWeights()).data
    at = data["composition"].sel(kind="Q", sender="a0.h1", receiver="a2.h3")
    assert float(at) == pytest.approx(float(composition(model)[0, 0, 1, 2, 3]) - 1 / 32**0.5, abs=1e-6)


def test_directions_are_those_of_the_dense_matrices(model: mi.Model) -> None:
    data = mi.run(model, [[5]], mi.HeadWeights(directions=2, top=4, composition=False)).data
    read, write = model.W_E.detach(), (model.W_U * model.hf.model.norm.weight).detach()
    for layer, head in ((0, 0), (1, 3), (2, 1)):
        for circuit, matrix in dense(model, layer, head).items():
            U, S, Vh = torch.linalg.svd(matrix)
            here = data.sel(circuit=circuit, layer=layer, head=head)
            np.testing.assert_allclose(here["singular_value"], S[:2], rtol=1e-3)
            np.testing.assert_allclose(here["share"], S[:2] ** 2 / (S**2).sum(), rtol=1e-3)
            for direction in range(2):
                ends = (write if circuit == "OV" else read) @ Vh[direction]
                sign = 1 if ends.max() >= -ends.min() else -1
                for side, products in (("in", read @ U[:, direction]), ("out", ends)):
                    best = (sign * products).topk(4)
                    got = here.sel(side=side, direction=direction)
                    np.testing.assert_allclose(got["weight"], best.values, atol=2e-3)
                    assert got["token"].values[0] == model.to_str_tokens(best.indices[:1].tolist())[0]


def test_all_directions_make_the_whole_matrix(model: mi.Model) -> None:
    data = mi.run(model, [[5]], mi.HeadWeights(directions=99, top=1)).data
    assert data.sizes["direction"] == model.dims.d_head
    np.testing.assert_allclose(data["share"].sum("direction"), 1, atol=1e-4)
    assert (data["singular_value"].diff("direction") <= 1e-5).all()


def test_the_planted_composition_is_the_strongest() -> None:
    """The induction head's key reads what the previous-token head writes; and it says the token that it reads."""
    data = mi.run(planted.induction(2).model, [[5]], mi.HeadWeights(top=1)).data
    assert data["pair"].values[0] == "a0.h1 → a1.h2 K"
    assert float(data["excess"][0]) > 2 * float(data["excess"][1])
    token = data["token"].sel(layer=1, head=2, circuit="OV", rank=0, direction=slice(0, 3))
    assert (token.sel(side="in").values == token.sel(side="out").values).all()


def test_nothing_is_run_and_what_is_there_is_listed(llama: mi.Model) -> None:
    result = mi.run(llama, [[5, 6]], mi.HeadWeights())
    assert not result.meta["passes"].get("forward", 0)
    assert len(result.data["pair"]) == 40
    flat = result.data["composition"].values.ravel()
    best = -np.sort(-flat[np.isfinite(flat)])
    np.testing.assert_allclose(result.data["excess"], best[:40])
    one = mi.run(tiny("llama", layers=1), [[5, 6]], mi.HeadWeights())
    assert "composition" not in one.data
    assert len(one.views) == 2


def test_what_heads_of_a_classifier_write_are_labels() -> None:
    model = tiny("qwen2", num_labels=3)
    token = mi.run(model, [[5]], mi.HeadWeights()).data["token"].sel(circuit="OV", side="out")
    assert set(token.values.ravel()) == {"LABEL_0", "LABEL_1", "LABEL_2", ""}
    assert (token.sel(rank=slice(3, None)) == "").all()


def test_induction_heads_of_the_real_model_read_what_its_previous_token_head_writes(smollm2: mi.Model) -> None:
    """a16.h0 gives 0.9 of its attention to the previous token; heads of layers 17 and 18 are induction heads."""
    found = composition(smollm2)[1].flatten(2)[16, 0]  # K: from a16.h0 to every head
    strongest = {divmod(int(i), 9) for i in torch.nan_to_num(found).topk(3).indices}
    assert strongest <= {(17, 3), (17, 4), (18, 6), (18, 7), (18, 8)}
    assert float(torch.nan_to_num(found).max()) > 3 * smollm2.dims.d_model**-0.5
