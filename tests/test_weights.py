"""Weights by head and their low-rank products, against the run and against products that are built."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mechinterp as mi
from mechinterp import sites
from mechinterp.errors import ModelError, SiteError
from mechinterp.model.weights import linear_bias, linear_weight
from mechinterp.testing import tiny

IDS = [[5, 6, 7, 8], [9, 20, 30, 2]]
LORA = ["q_proj", "k_proj", "v_proj", "o_proj", "lm_head"]


def matrix(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def assert_same_eigenvalues(found: Tensor, built: Tensor, atol: float) -> None:
    """The eigenvalues of `built`, of which all that `found` lacks are zero, as multisets."""
    expected = torch.linalg.eigvals(built)
    for few, many in zip(found.reshape(-1, found.shape[-1]), expected.reshape(-1, expected.shape[-1]), strict=True):
        left = list(many)
        for value in few:
            nearest = min(range(len(left)), key=lambda i: abs(left[i] - value))
            assert abs(left.pop(nearest) - value) < atol
        assert all(abs(value) < atol for value in left)


def with_biases(family: str) -> mi.Model:
    """A tiny model whose projections have biases, as Qwen2's have."""
    model = tiny(family)
    for layer in model.hf.model.layers:
        for name in "qkvo":
            projection = getattr(layer.self_attn, f"{name}_proj")
            projection.bias = nn.Parameter(matrix(projection.out_features, dtype=torch.float32))
    return model


@pytest.fixture
def biased(model: mi.Model) -> mi.Model:
    return with_biases(model.arch.family)


def plus(value: Tensor, bias: Tensor | None) -> Tensor:
    return value if bias is None else value + bias


# Against the run


@torch.no_grad()
def agrees_with_the_run(model: mi.Model, ids: list[list[int]]) -> None:
    d = model.dims
    trace = model.trace(ids, ["attn_in", "q", "k", "v", "z", "head_out", "attn_out", "embed", "logits", "final_norm"])
    torch.testing.assert_close(model.W_E[torch.tensor(ids)], trace["embed"])
    torch.testing.assert_close(plus(trace["final_norm"] @ model.W_U.T, model.b_U), trace["logits"], atol=1e-4, rtol=0)
    for i in range(d.n_layers):
        x = trace[f"attn_in.{i}"][:, :, None, None]  # batch pos head 1 d_model
        for name, weight, bias in (
            ("q", model.W_Q(i), model.b_Q(i)),
            ("k", model.W_K(i), model.b_K(i)),
            ("v", model.W_V(i), model.b_V(i)),
        ):
            assert weight.shape == (d.n_heads if name == "q" else d.n_kv_heads, d.d_model, d.d_head)
            torch.testing.assert_close(plus((x @ weight).squeeze(-2), bias), trace[f"{name}.{i}"])
        z = trace[f"z.{i}"]
        heads = (z[:, :, :, None] @ model.W_O(i)).squeeze(-2)
        torch.testing.assert_close(heads, trace[f"head_out.{i}"])
        torch.testing.assert_close(plus(heads.sum(2), model.b_O(i)), trace[f"attn_out.{i}"])


def test_weights_by_head_are_what_the_run_multiplies_with(model: mi.Model, ids: list[list[int]]) -> None:
    agrees_with_the_run(model, ids)


def test_a_family_without_biases_has_none(llama: mi.Model) -> None:
    assert [llama.b_Q(0), llama.b_K(0), llama.b_V(0), llama.b_O(0), llama.b_U] == [None] * 5


def test_biases_by_head_are_what_the_run_adds(biased: mi.Model, ids: list[list[int]]) -> None:
    agrees_with_the_run(biased, ids)


@torch.no_grad()
def test_a_query_head_uses_the_kv_head_of_its_group(model: mi.Model, ids: list[list[int]]) -> None:
    d = model.dims
    group = d.n_heads // d.n_kv_heads
    assert group > 1
    trace = model.trace(ids, ["attn_in.1", sites.v(1, per_query_head=True), sites.k(1, per_query_head=True)])
    x = trace["attn_in.1"][:, :, None, None]
    for name, one, many, bias in (
        ("v", model.W_V(1), model.W_V(1, per_query_head=True), model.b_V(1)),
        ("k", model.W_K(1), model.W_K(1, per_query_head=True), model.b_K(1)),
    ):
        assert many.shape == (d.n_heads, d.d_model, d.d_head)
        for head in range(d.n_heads):
            assert torch.equal(many[head], one[head // group])
        expected = trace[mi.Site(name, 1, per_query_head=True)]
        repeated = None if bias is None else bias.repeat_interleave(group, 0)
        torch.testing.assert_close(plus((x @ many).squeeze(-2), repeated), expected)


@torch.no_grad()
def test_ov_is_what_a_head_writes_of_what_it_attends_to(model: mi.Model, ids: list[list[int]]) -> None:
    for chosen in (model, with_biases(model.arch.family)):
        trace = chosen.trace(ids, ["attn_in.2", "pattern.2", "head_out.2"])
        moved = (trace["attn_in.2"][:, None] @ chosen.OV(2)).AB  # example head pos d_model
        bias = chosen.b_V(2)
        if bias is not None:
            group = chosen.dims.n_heads // chosen.dims.n_kv_heads
            moved = moved + bias.repeat_interleave(group, 0)[:, None] @ chosen.W_O(2)
        torch.testing.assert_close((trace["pattern.2"] @ moved).transpose(1, 2), trace["head_out.2"])


@torch.no_grad()
def test_qk_is_the_score_at_one_position_and_refuses_a_norm(model: mi.Model, ids: list[list[int]]) -> None:
    built = model.W_Q(1) @ model.W_K(1, per_query_head=True).mT
    torch.testing.assert_close(model.QK(1, ignore_norm=True).AB, built)
    if model.arch.qk_norm:
        with pytest.raises(ModelError, match=rf"{model.arch.family} norms q and k .* layer 1.*ignore_norm=True"):
            model.QK(1)
        return
    if model.b_Q(1) is not None or model.b_K(1) is not None:
        return  # a bias is in the score
    trace = model.trace(ids, ["attn_in.1", "scores.1"])
    x = trace["attn_in.1"][:, None]  # rotary turns a query and a key at one position alike
    scores = (x @ model.QK(1) @ x.mT).AB * model.hf.model.layers[1].self_attn.scaling
    torch.testing.assert_close(
        scores.diagonal(dim1=-2, dim2=-1), trace["scores.1"].diagonal(dim1=-2, dim2=-1), atol=1e-5, rtol=1e-5
    )


def test_accessors_are_views_and_change_nothing(model: mi.Model) -> None:
    before = [p._version for p in model.hf.parameters()]
    attention = model.hf.model.layers[1].self_attn
    for weight, projection in (
        (model.W_Q(1), attention.q_proj),
        (model.W_K(1), attention.k_proj),
        (model.W_V(1), attention.v_proj),
        (model.W_O(1), attention.o_proj),
        (model.W_U, model.hf.lm_head),
        (model.OV(1).B, attention.o_proj),
        (model.QK(1, ignore_norm=True).A, attention.q_proj),
    ):
        assert weight.untyped_storage().data_ptr() == projection.weight.untyped_storage().data_ptr()
    model.OV(1).svd()
    assert (model.W_E @ model.OV(0) @ model.W_U.T).eigenvalues.shape == (model.dims.n_heads, model.dims.d_head)
    assert [p._version for p in model.hf.parameters()] == before


@pytest.mark.parametrize("name", ["W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O", "OV", "QK"])
def test_a_layer_that_is_not_there_is_named(llama: mi.Model, name: str) -> None:
    for layer in (3, -1):
        with pytest.raises(SiteError, match=f"no layer {layer}: the model has layers 0 to 2"):
            getattr(llama, name)(layer)


# Factored products


@torch.no_grad()
def test_circuits_agree_with_the_products_that_are_built(model: mi.Model) -> None:
    rows = torch.arange(0, model.dims.vocab, model.dims.vocab // 60)[:60]  # some of the vocabulary, to build it
    W_E, W_U = model.W_E[rows].double(), model.W_U[rows].double()
    W_V, W_O = model.W_V(1, per_query_head=True).double(), model.W_O(1).double()
    for made, built in (
        (model.OV(1), W_V @ W_O),
        (model.QK(1, ignore_norm=True), model.W_Q(1).double() @ model.W_K(1, per_query_head=True).double().mT),
        (model.W_E[rows] @ model.OV(1) @ model.W_U[rows].T, W_E @ W_V @ W_O @ W_U.T),
        ((model.W_E[rows] @ model.OV(1)) @ (model.OV(0)[2] @ model.W_U[rows].T), None),
    ):
        if built is None:
            built = W_E @ W_V @ W_O @ (model.W_V(0)[1] @ model.W_O(0)[2]).double() @ W_U.T
        assert made.shape == built.shape
        torch.testing.assert_close(made.AB.double(), built, atol=1e-4, rtol=1e-4)
        scale = float(torch.linalg.matrix_norm(built, 2).max())
        assert_same_eigenvalues(made.eigenvalues, built, atol=1e-4 * scale)
        S = made.svd()[1].double()
        expected = torch.linalg.svdvals(built)
        torch.testing.assert_close(S, expected[..., : S.shape[-1]], atol=1e-5 * scale, rtol=1e-4)
        assert bool((expected[..., S.shape[-1] :] < 1e-5 * scale).all())
        torch.testing.assert_close(made.norm.double(), torch.linalg.matrix_norm(built), rtol=1e-5, atol=0)


def test_nothing_of_full_size_is_built(llama: mi.Model) -> None:
    """A vocabulary squared would be 4 TB here."""
    W_E = matrix(1_000_000, 32, dtype=torch.float32)
    circuit = W_E @ llama.OV(0)[1] @ W_E.T
    assert circuit.shape == (1_000_000, 1_000_000)
    assert circuit.A.shape == (1_000_000, 8)
    assert circuit.eigenvalues.shape == (8,)
    U, S, Vh = circuit[None].T.svd()
    assert (U.shape, S.shape, Vh.shape) == ((1, 1_000_000, 8), (1, 8), (1, 8, 1_000_000))
    torch.testing.assert_close(circuit.norm, S.norm())


@pytest.mark.parametrize(("m", "r", "n"), [(7, 3, 7), (3, 7, 3), (5, 5, 5), (9, 2, 4), (4, 6, 9)])
def test_the_algebra_of_products(m: int, r: int, n: int) -> None:
    A, B = matrix(2, 1, m, r), matrix(3, r, n, seed=1)  # leading axes broadcast
    made, built = mi.FactoredMatrix(A, B), A @ B
    assert made.shape == built.shape == (2, 3, m, n)
    torch.testing.assert_close(made.AB, built)
    torch.testing.assert_close(made.T.AB, built.mT)
    torch.testing.assert_close(made.norm, torch.linalg.matrix_norm(built))
    U, S, Vh = made.svd()
    torch.testing.assert_close(U @ torch.diag_embed(S) @ Vh, built)
    eye = torch.eye(S.shape[-1], dtype=S.dtype).expand(2, 3, -1, -1)
    torch.testing.assert_close(U.mT @ U, eye)
    torch.testing.assert_close(Vh @ Vh.mT, eye)
    if m == n:
        assert made.eigenvalues.shape[-1] == min(m, r)
        assert_same_eigenvalues(made.eigenvalues, built, atol=1e-9)
    for left in (matrix(2, 3, 4, m, seed=2), matrix(1, m, seed=2)):
        torch.testing.assert_close((left @ made).AB, left @ built)
        assert (left @ made).A.shape[-1] == min(r, m)
    for right in (matrix(3, n, 5, seed=3), matrix(n, 1, seed=3)):
        torch.testing.assert_close((made @ right).AB, built @ right)
        assert (made @ right).A.shape[-1] == min(r, n)
    for inner in (1, 4, 8):
        other = mi.FactoredMatrix(matrix(n, inner, seed=4), matrix(inner, 6, seed=5))
        torch.testing.assert_close((made @ other).AB, built @ other.AB)
        assert (made @ other).A.shape[-1] == min(r, inner)


def test_indexing_selects_heads() -> None:
    A, B = matrix(2, 1, 5, 3), matrix(4, 3, 6, seed=1)
    made, built = mi.FactoredMatrix(A, B), A @ B
    mask = torch.tensor([True, False, True, True])
    for index in (1, -1, slice(1), (1, 2), (slice(None), 3), (0, [2, 0]), ([0, 1], [3, 1]), (0, mask), None, (None, 1)):
        torch.testing.assert_close(made[index].AB, built[index])
    with pytest.raises(ModelError, match=r"2 leading axes of a matrix of shape \(2, 4, 5, 6\); use \.AB"):
        made[0, 0, 0]
    for index in (0, ..., slice(1)):
        with pytest.raises(ModelError, match="0 leading axes"):
            made[0, 0][index]
    assert [one.shape for one in made] == [(4, 5, 6)] * 2
    with pytest.raises(IndexError):
        made[2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    model = tiny("llama", dtype=dtype)
    made = model.W_E[:50] @ model.OV(1) @ model.W_U[:50].T
    wide = (model.W_E[:50].double() @ model.W_V(1, per_query_head=True).double() @ model.W_O(1).double()) @ (
        model.W_U[:50].double().T
    )
    assert made.AB.dtype == torch.float32
    assert made.eigenvalues.dtype == torch.complex64
    assert made.svd()[1].dtype == made.norm.dtype == torch.float32
    torch.testing.assert_close(made.AB.double(), wide, atol=1e-4, rtol=1e-4)  # ten times closer than half precision


def test_shapes_that_do_not_fit_are_said(llama: mi.Model) -> None:
    with pytest.raises(ModelError, match=r"shapes \(2, 3\) and \(4, 2\) cannot be multiplied"):
        mi.FactoredMatrix(matrix(2, 3), matrix(4, 2))
    with pytest.raises(ModelError, match=r"\(2, 2, 3\) and \(3, 3, 2\) have leading axes"):
        mi.FactoredMatrix(matrix(2, 2, 3), matrix(3, 3, 2))
    with pytest.raises(ModelError, match=r"x\[None\]"):
        matrix(32) @ llama.OV(0)
    with pytest.raises(ModelError, match="cannot be multiplied"):
        llama.OV(0) @ matrix(3, 3)
    with pytest.raises(ModelError, match="cannot be multiplied"):
        matrix(3, 3) @ llama.OV(0)
    with pytest.raises(ModelError, match=r"shape \(4, 32, 5\) has no eigenvalues; use svd"):
        _ = (llama.OV(0) @ matrix(32, 5)).eigenvalues
    assert repr(llama.OV(0)) == "FactoredMatrix (4, 32, 32), inner size 8, float32 on cpu"


# Adapters and packed weights


def with_lora(*more: str, **options: Any) -> mi.Model:
    import peft

    model = with_biases("llama")
    config = peft.LoraConfig(r=3, target_modules=[*LORA, *more], init_lora_weights=False, **options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        peft.inject_adapter_in_model(config, model.hf)
    model.hf.eval()
    return model


def layers_of(model: mi.Model) -> list[Any]:
    return [m for m in model.hf.modules() if hasattr(m, "lora_A")]


def test_lora_is_in_the_weights_while_it_is_in_force() -> None:
    adapted = with_lora("embed_tokens")
    base = with_biases("llama")
    assert not torch.allclose(adapted.W_Q(1), base.W_Q(1))
    active = [adapted.W_Q(1), adapted.W_K(1), adapted.W_V(1), adapted.W_O(1), adapted.W_U, adapted.W_E]
    agrees_with_the_run(adapted, IDS)
    rows = torch.tensor([5, 9])
    resid = matrix(2, 32, dtype=torch.float32)
    torch.testing.assert_close(adapted.unembed(resid, rows), adapted.unembed(resid)[:, rows])
    for layer in layers_of(adapted):
        layer.merge()
    agrees_with_the_run(adapted, IDS)
    for now, then in zip(
        [adapted.W_Q(1), adapted.W_K(1), adapted.W_V(1), adapted.W_O(1), adapted.W_U, adapted.W_E], active, strict=True
    ):
        torch.testing.assert_close(now, then)
    for layer in layers_of(adapted):
        layer.enable_adapters(False)
    torch.testing.assert_close(adapted.W_Q(1), base.W_Q(1))  # merged, and to be taken out by the next pass
    agrees_with_the_run(adapted, IDS)
    torch.testing.assert_close(adapted.W_E, base.W_E)
    torch.testing.assert_close(adapted.OV(1).AB, base.OV(1).AB)


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")  # where the layer has none: it is read all the same
def test_biases_of_lora_count_too() -> None:
    model = with_lora(lora_bias=True)
    base = with_biases("llama")
    assert not torch.allclose(model.b_Q(1), base.b_Q(1))
    assert model.b_U is not None
    agrees_with_the_run(model, IDS)


def test_an_adapter_that_is_no_sum_is_refused() -> None:
    import peft

    model = with_lora(use_dora=True)
    with pytest.raises(ModelError, match=r"'default' is Dora.*merge_and_unload"):
        model.W_Q(0)
    other = tiny("llama")
    peft.inject_adapter_in_model(peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), other.hf)
    with pytest.raises(ModelError, match=r"peft.*ia3.*merge"):
        other.W_K(0)
    with pytest.raises(ModelError, match="merge"):
        linear_bias(other.hf.model.layers[0].self_attn.k_proj)


def test_a_packed_weight_is_refused() -> None:
    packed = nn.Linear(4, 4, bias=False)
    packed.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ModelError, match=r"Linear is packed \(uint8, shape \(8, 1\)\); load the model without"):
        linear_weight(packed)
