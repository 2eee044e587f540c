"""What each analyzer computes: oracles on random models, loops by hand, planted cases."""

import numpy as np
import pytest
import torch

import mechinterp as mi
from mechinterp import sites
from mechinterp.core.statistics import fdr, summarize
from mechinterp.errors import ExamplesError


def test_the_last_layer_of_the_lens_is_the_model(model: mi.Model) -> None:
    examples = mi.tasks.ioi(5, seed=1)
    data = mi.run(model, examples, mi.LogitLens(top_k=4)).data
    logits = model.trace(examples, sites.logits(positions="end"))[sites.logits(positions="end")]
    batch = model.tokenize(examples).batch(range(5))
    right, wrong = batch.side(0)[:, 0], batch.side(1)[:, 0]
    rows = torch.arange(5)
    last = data.sel(layer=2)
    np.testing.assert_allclose(last["logit_diff"], logits[rows, right] - logits[rows, wrong], atol=1e-4)
    np.testing.assert_allclose(last["prob"], logits.softmax(-1)[rows, right], atol=1e-6)
    assert last["top_id"].values.tolist() == logits.topk(4).indices.tolist()
    assert last["rank"].values.tolist() == (logits > logits[rows, right][:, None]).sum(1).tolist()
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    np.testing.assert_allclose(last["entropy"], entropy, atol=1e-4)
    assert last["top_token"].values[0, 0] == model.to_str_tokens([int(logits[0].argmax())])[0]


def test_earlier_layers_of_the_lens_by_hand(model: mi.Model) -> None:
    examples = mi.tasks.ioi(3, seed=1)
    data = mi.run(model, examples, mi.LogitLens(positions=None, layers=(0, 1))).data
    resid = model.trace(examples, "resid_post.1")["resid_post.1"]
    lengths = model.tokenize(examples).lengths
    for row in range(3):
        with torch.no_grad():
            logits = model.hf.lm_head(model.hf.model.norm(resid[row, : lengths[row]]))
        top = data["top_prob"].sel(layer=1, example=row, k=0).values
        np.testing.assert_allclose(top[: lengths[row]], logits.softmax(-1).amax(-1), atol=1e-6)
        assert np.isnan(top[lengths[row] :]).all()


def test_the_lens_at_chosen_positions(model: mi.Model) -> None:
    """Two positions of texts of two tokens: an axis of choices is not one of tokens."""
    texts = mi.Examples.of([[5, 6], [7], [8, 9]], answers=[3, 4, 5])
    whole = mi.run(model, texts, mi.LogitLens(positions=None)).data["prob"]
    chosen = mi.run(model, texts, mi.LogitLens(positions=("end", 0)), padding_side="left").data["prob"]
    assert list(chosen["position"].values) == ["end", "0"]
    np.testing.assert_allclose(chosen.sel(position="0"), whole.sel(position=0), atol=1e-5)
    np.testing.assert_allclose(chosen.sel(position="end", example=1), whole.sel(position=0, example=1), atol=1e-5)
    np.testing.assert_allclose(chosen.sel(position="end", example=0), whole.sel(position=1, example=0), atol=1e-5)


def test_the_lens_needs_no_answers(model: mi.Model) -> None:
    result = mi.run(model, [[5, 6, 7]], mi.LogitLens(top_k=2))
    assert set(result.data.data_vars) == {"entropy", "top_prob", "top_id", "top_token"}


def test_components_sum_to_the_logit_difference(model: mi.Model) -> None:
    examples = mi.tasks.ioi(6, seed=4)
    dla, lens = mi.run(model, examples, [mi.DirectLogitAttribution(), mi.LogitLens()])
    np.testing.assert_allclose(
        dla.data["attribution"].sum("component"), lens.data["logit_diff"].sel(layer=2), atol=1e-4
    )
    assert dla.table()["component"].nunique() == 1 + 3 * (4 + 1)


def test_answer_sets_of_different_size_are_averaged(model: mi.Model) -> None:
    sets = [([5, 6], 9), (7, [8, 3, 4])]
    examples = mi.Examples.of([[11, 12, 13], [14, 15, 16, 17]], answers=sets)
    dla, lens = mi.run(model, examples, [mi.DirectLogitAttribution(), mi.LogitLens()])
    for row, (right, wrong) in enumerate(sets):
        logits = model.trace(examples.texts[row], sites.logits(positions="end"))[sites.logits(positions="end")][0]
        expected = float(logits[right].mean() - logits[wrong].mean())
        assert float(lens.data["logit_diff"].sel(layer=2, example=row)) == pytest.approx(expected, abs=1e-4)
        assert float(dla.data["attribution"].sel(example=row).sum()) == pytest.approx(expected, abs=1e-4)


def test_each_component_by_hand(model: mi.Model) -> None:
    """Against the components themselves, folded through the norm's own scale."""
    examples = mi.tasks.ioi(4, seed=4)
    data = mi.run(model, examples, mi.DirectLogitAttribution()).data["attribution"]
    trace = model.trace(
        examples,
        [sites.head_out(positions="end"), sites.mlp_out(positions="end"), sites.resid_post(2, positions="end")],
    )
    batch = model.tokenize(examples).batch(range(4))
    final = trace[sites.resid_post(2)]
    rms = (final.pow(2).mean(-1, keepdim=True) + model.hf.config.rms_norm_eps).sqrt()
    direction = (model.W_U[batch.side(0)[:, 0]] - model.W_U[batch.side(1)[:, 0]]) * model.hf.model.norm.weight / rms
    for layer in range(3):
        heads = torch.einsum("nhd,nd->nh", trace[sites.head_out(layer)], direction).detach()
        for head in range(4):
            np.testing.assert_allclose(data.sel(component=f"a{layer}.h{head}"), heads[:, head], atol=1e-4)
        mlp = (trace[sites.mlp_out(layer)] * direction).sum(-1).detach()
        np.testing.assert_allclose(data.sel(component=f"m{layer}"), mlp, atol=1e-4)


def test_attribution_with_biases_still_sums(llama: mi.Model) -> None:
    import transformers

    config = transformers.LlamaConfig(**{**llama.hf.config.to_dict(), "attention_bias": True, "mlp_bias": True})
    torch.manual_seed(0)
    hf = transformers.LlamaForCausalLM(config)
    for name, p in hf.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p)
    model = mi.Model.wrap(hf, llama.tokenizer)
    dla, lens = mi.run(model, mi.tasks.ioi(4), [mi.DirectLogitAttribution(), mi.LogitLens()])
    assert "a1.bias" in dla.data["component"]
    np.testing.assert_allclose(
        dla.data["attribution"].sum("component"), lens.data["logit_diff"].sel(layer=2), atol=1e-4
    )


def test_attribution_needs_answers(llama: mi.Model) -> None:
    with pytest.raises(ExamplesError, match="DirectLogitAttribution: these examples have no answers"):
        mi.run(llama, [[5, 6, 7]], mi.DirectLogitAttribution())


def roles_by_hand(ids: list[int], pattern: np.ndarray) -> dict[str, tuple[np.ndarray, float]]:
    """(score per head, shuffled null) of each role by a plain loop over queries and keys."""
    heads, n = pattern.shape[0], len(ids)
    keys_of = {
        "previous": lambda q: [q - 1] if q else [],
        "local": lambda q: [k for k in range(q - 4, q) if k > 0],
        "first": lambda q: [0] if q else [],
        "duplicate": lambda q: [k for k in range(q) if ids[k] == ids[q]],
        "induction": lambda q: [k + 1 for k in range(q) if ids[k] == ids[q]],
    }
    out: dict[str, tuple[np.ndarray, float]] = {}
    for role, keys in keys_of.items():
        queries = [q for q in range(n) if keys(q)]
        score = np.array([[sum(pattern[h, q, k] for k in keys(q)) for q in queries] for h in range(heads)])
        null = [len(keys(q)) / (q + 1) for q in queries]
        out[role] = (score.mean(1) if queries else np.full(heads, np.nan), float(np.mean(null)) if queries else np.nan)
    return out


@pytest.mark.parametrize("block", [1, 2000, 1 << 20])
@pytest.mark.parametrize("side", ["left", "right"])
def test_role_scores_on_text_by_hand(model: mi.Model, side: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mechinterp.model.attention.BLOCK_BYTES", block)
    monkeypatch.setattr("mechinterp.analyzers.heads.QUERIES_AT_ONCE", max(1, block // 500))
    texts = [[5, 6, 7, 5, 6, 6, 9], [8, 3, 8, 3], [4, 9, 2, 7, 1, 4, 4, 2, 9, 4], [1, 2, 3]]
    data = mi.run(model, texts, mi.HeadRoles(sequences=0), padding_side=side).data.sel(text="prompts")
    trace = model.trace(texts, "pattern")
    expected = [
        [roles_by_hand(t, trace[f"pattern.{layer}"][i, :, : len(t), : len(t)].numpy()) for i, t in enumerate(texts)]
        for layer in range(3)
    ]
    for layer in range(3):
        for role in ("previous", "local", "first", "duplicate", "induction"):
            score = np.nanmean([e[role][0] for e in expected[layer]], axis=0)
            null = np.nanmean([e[role][1] for e in expected[layer]])
            np.testing.assert_allclose(data["score"].sel(layer=layer, role=role), score, atol=1e-5)
            np.testing.assert_allclose(data["null"].sel(layer=layer, role=role), null, atol=1e-5)


def test_role_scores_on_repeated_tokens_by_hand(model: mi.Model) -> None:
    heads = mi.HeadRoles(sequences=3, length=7, seed=2)
    data = mi.run(model, [[5, 6, 7]], heads).data.sel(text="random")
    examples = mi.tasks.induction(model, 3, 7, 2, control=True)
    pattern = model.trace(examples, "pattern").stack("pattern").numpy()  # layer example head query key
    q = np.arange(7, 14)
    for role, offset in (("induction", 6), ("duplicate", 7)):
        mass = pattern[:, :, :, q, q - offset].mean(-1)
        np.testing.assert_allclose(data["score"].sel(role=role), mass[:, :3].mean(1), atol=1e-5)
        np.testing.assert_allclose(data["null"].sel(role=role), mass[:, 3:].mean(1), atol=1e-5)
    q = np.arange(1, 14)
    np.testing.assert_allclose(
        data["score"].sel(role="previous"), pattern[:, :3, :, q, q - 1].mean(-1).mean(1), atol=1e-5
    )


def test_random_models_have_no_specialised_heads_by_matching(model: mi.Model) -> None:
    data = mi.run(model, [[5, 6, 7]], mi.HeadRoles(sequences=12, length=12)).data.sel(text="random")
    assert not data["specialised"].sel(role=["induction", "duplicate"]).any()


def test_a_planted_previous_token_head_is_found() -> None:
    """Write the pattern: one head attends to the previous token, and only it is called one."""
    model = mi.testing.tiny("llama", seed=3)
    n = 20
    shift = torch.zeros(n, n)
    shift[0, 0] = 1
    shift[torch.arange(1, n), torch.arange(n - 1)] = 1
    texts = torch.randint(2, model.dims.vocab, (16, n), generator=torch.Generator().manual_seed(0)).tolist()
    with model.intervene(mi.Replace(sites.pattern(1, heads=2), shift)):
        result = mi.run(model, texts, mi.HeadRoles(sequences=0, floor=0.5))
    found = result.data["specialised"].sel(text="prompts", role="previous").values
    assert found.tolist() == [[False] * 4, [False, False, True, False], [False] * 4]


def test_summaries_against_scipy() -> None:
    from scipy import stats

    rng = np.random.default_rng(0)
    values = rng.normal(0.3, 1.0, (11, 4, 3))
    values[0, 0, 0] = np.nan
    got = summarize(values)
    np.testing.assert_allclose(got.mean, np.nanmean(values, 0))
    for cell in ((0, 0), (2, 1), (3, 2)):
        x = values[(slice(None), *cell)]
        x = x[np.isfinite(x)]
        exact = stats.permutation_test((x,), np.mean, permutation_type="samples", n_resamples=np.inf, vectorized=False)
        assert got.p[cell] == pytest.approx(exact.pvalue, abs=1e-9)
        low, high = stats.bootstrap((x,), np.mean, method="percentile", n_resamples=20_000, rng=1).confidence_interval
        assert got.ci_low[cell] == pytest.approx(low, abs=0.05)
        assert got.ci_high[cell] == pytest.approx(high, abs=0.05)
    np.testing.assert_allclose(got.q.ravel(), stats.false_discovery_control(got.p.ravel()))


def test_too_few_examples_have_no_p() -> None:
    got = summarize(np.ones((5, 2)))
    assert np.isnan(got.p).all()
    assert (got.mean == 1).all()
    assert np.isnan(summarize(np.ones((1, 2))).ci_low).all()
    assert np.isnan(fdr([np.nan, 0.01])[0])


def test_p_is_uniform_under_the_null() -> None:
    values = np.random.default_rng(1).normal(size=(16, 2000))
    p = summarize(values, resamples=500).p
    assert abs((p < 0.05).mean() - 0.05) < 0.02
    assert not (summarize(values, resamples=500).q < 0.05).any()
