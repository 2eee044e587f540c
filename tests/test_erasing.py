"""Erasing tokens against plain Hugging Face on masked embeddings, and on orders of which one must be better."""

import numpy as np
import pytest
import torch

import mechinterp as mi
from mechinterp.errors import NeedsError
from mechinterp.studies import erase_tokens

IDS = [[7, 11, 23, 5, 9, 14, 3, 8], [4, 6, 12, 31, 2]]


def examples() -> mi.Examples:
    return mi.Examples.of(IDS, answers=[(5, 9), (6, 7)])


def value(model: mi.Model, row: int, masked: list[int]) -> float:
    own = model.hf.get_input_embeddings()(torch.tensor([IDS[row]])).detach()
    own[0, masked] = model.baseline("mean")
    logits = model.hf(inputs_embeds=own, use_cache=False).logits[0, -1].detach()
    return float(logits[5] - logits[9] if row == 0 else logits[6] - logits[7])


def test_what_is_lost_is_that_of_plain_embeddings(model: mi.Model) -> None:
    metric = mi.logit_diff()
    result = mi.run(model, examples(), mi.TokenAttribution("grad-x-input", metric))
    found = erase_tokens(model, examples(), {"gxi": result}, metric, fractions=(0.25, 0.5)).data
    for share in (0.25, 0.5):
        lost: dict[str, list[float]] = {"comprehensiveness": [], "sufficiency": []}
        for row, ids in enumerate(IDS):
            values = result.data["attribution"].values[row, : len(ids)]
            order = np.argsort(-values, kind="stable").tolist()
            k = max(1, round(share * len(ids)))
            whole = value(model, row, [])
            lost["comprehensiveness"].append(whole - value(model, row, order[:k]))
            lost["sufficiency"].append(whole - value(model, row, order[k:]))
        for name, expected in lost.items():
            got = float(found[name].sel({"method": "gxi", "fraction": share}))
            assert got == pytest.approx(np.mean(expected), abs=1e-3, rel=1e-3)


def test_the_better_of_two_orders_is_more_comprehensive(llama: mi.Model) -> None:
    """Tokens in the order of what masking each alone takes away, and the same order turned round."""
    metric = mi.logit_diff()
    some = mi.tasks.ioi(6, seed=1)
    plain = mi.Examples.of(some.texts, answers=some.answers)
    result = mi.run(llama, plain, mi.TokenAttribution("partition-shap", metric, evaluations=60))
    worse = result.data.copy()
    worse["attribution"] = -worse["attribution"]
    pair = {"shap": result, "reversed": mi.Result(worse)}
    found = erase_tokens(llama, plain, pair, metric).data["aopc_comprehensiveness"]
    assert (
        float(found.sel({"method": "shap"}))
        > float(found.sel({"method": "random"}))
        > float(found.sel({"method": "reversed"}))
    )


def test_bad_input(llama: mi.Model) -> None:
    result = mi.run(llama, examples(), mi.TokenAttribution("saliency"))
    with pytest.raises(NeedsError, match="names other than 'random'"):
        erase_tokens(llama, examples(), {"random": result}, mi.answer_logit())
    with pytest.raises(NeedsError, match="fractions must lie between 0 and 1"):
        erase_tokens(llama, examples(), {"a": result}, mi.answer_logit(), fractions=(0.0, 2.0))
    with pytest.raises(NeedsError, match="has no attribution of tokens"):
        erase_tokens(llama, examples(), {"a": mi.run(llama, examples(), mi.LogitLens())}, mi.answer_logit())
    single = mi.Examples.of([[7]], answers=[(5, 9)])
    with pytest.raises(NeedsError, match="fewer than two attributed tokens"):
        erase_tokens(llama, single, {"a": mi.run(llama, single, mi.TokenAttribution("saliency"))}, mi.answer_logit())
    other = mi.run(llama, mi.Examples.of(IDS[:1], answers=[(5, 9)]), mi.TokenAttribution("saliency"))
    with pytest.raises(NeedsError, match="are of other tokens"):
        erase_tokens(llama, examples(), {"a": result, "b": other}, mi.answer_logit())
