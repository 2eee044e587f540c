"""Attribution of tokens against captum, against sums over all coalitions, and against plain Hugging Face."""

import itertools
import math
import warnings

import numpy as np
import pytest
import torch

import mechinterp as mi
from mechinterp import sites
from mechinterp.analyzers.perturbing import Game
from mechinterp.analyzers.token_attribution import word_sums
from mechinterp.errors import ExamplesError, ModelError, NeedsError
from mechinterp.report.tokens import coloured_tokens

SHAPLEY = ("kernel-shap", "partition-shap")


def examples(ids: list[list[int]]) -> mi.Examples:
    return mi.Examples.of([ids[0], ids[1][:6], ids[2]], answers=[(5, 9), (6, 7), ([8, 9], 3)])


def plain(model: mi.Model, embeddings: torch.Tensor, right: int, wrong: int) -> torch.Tensor:
    """The logit difference that Hugging Face gives for embeddings, ``input pos d_model``."""
    logits = model.hf(inputs_embeds=embeddings, use_cache=False).logits[:, -1]
    return logits[:, right] - logits[:, wrong]


def run(model: mi.Model, ids: list[list[int]], **options: object) -> mi.Result:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "integrated gradients")  # tiny models are rough, and that is said
        return mi.run(model, examples(ids), mi.TokenAttribution(metric=mi.logit_diff(), **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("baseline", ["mean", "pad", "zero"])
def test_integrated_gradients_equal_captum(model: mi.Model, ids: list[list[int]], baseline: str) -> None:
    from captum.attr import IntegratedGradients

    ours = run(model, ids, baseline=baseline, steps=20, tolerance=1e9)
    own = model.hf.get_input_embeddings()(torch.tensor([ids[0]])).detach()
    base = model.baseline(baseline).expand_as(own)  # type: ignore[arg-type]
    explainer = IntegratedGradients(lambda e: plain(model, e, 5, 9))
    theirs = explainer.attribute(own, base, n_steps=20, method="gausslegendre").sum(-1)[0].detach()
    mine = torch.as_tensor(ours.data["attribution"].values[0, : len(ids[0])])
    torch.testing.assert_close(mine, theirs.float(), atol=2e-4, rtol=1e-3)


def test_gradients_equal_autograd(model: mi.Model, ids: list[list[int]]) -> None:
    own = model.hf.get_input_embeddings()(torch.tensor([ids[0]])).detach().requires_grad_()
    (grad,) = torch.autograd.grad(plain(model, own, 5, 9).sum(), own)
    for method, expected in (("saliency", grad.norm(dim=-1)), ("grad-x-input", (grad * own).sum(-1))):
        got = torch.as_tensor(run(model, ids, method=method).data["attribution"].values[0, : len(ids[0])])
        torch.testing.assert_close(got, expected[0].detach(), atol=1e-4, rtol=1e-3)


def test_scores_are_those_of_plain_embeddings(model: mi.Model, ids: list[list[int]]) -> None:
    found = run(model, ids, method="grad-x-input").data
    own = model.hf.get_input_embeddings()(torch.tensor([ids[0]])).detach()
    assert found["score"][0].item() == pytest.approx(plain(model, own, 5, 9).item(), abs=1e-4)
    empty = model.baseline("mean").expand_as(own)
    assert found["baseline_score"][0].item() == pytest.approx(plain(model, empty, 5, 9).item(), abs=1e-4)


def test_attributions_add_up_to_what_masking_everything_changes(model: mi.Model, ids: list[list[int]]) -> None:
    fine = run(model, ids, steps=16, tolerance=0.05).data
    size = np.abs(fine["attribution"]).sum("position")
    within = np.abs(fine["completeness_error"]) <= 0.05 * size
    assert bool((within | (fine["steps"] == 16 * 16)).all())  # within tolerance, or all steps were taken
    assert bool(within.any())
    for method in SHAPLEY:
        found = run(model, ids, method=method, evaluations=60).data
        change = np.abs(found["score"] - found["baseline_score"])
        assert float(np.abs(found["additivity_error"]).max()) < 1e-3 * max(1.0, float(change.max())), method


def shapley(value: dict[tuple[bool, ...], float], n: int) -> list[float]:
    """By the definition, over all orders."""
    out = [0.0] * n
    for order in itertools.permutations(range(n)):
        kept = [False] * n
        for player in order:
            before = value[tuple(kept)]
            kept[player] = True
            out[player] += (value[tuple(kept)] - before) / math.factorial(n)
    return out


def test_kernel_shap_is_shapley_by_definition_where_all_coalitions_are_seen(model: mi.Model) -> None:
    ids = [7, 11, 23, 5]
    prompt = mi.Examples.of([ids], answers=[(5, 9)])
    own = model.hf.get_input_embeddings()(torch.tensor([ids])).detach()
    base = model.baseline("mean")
    kept = torch.tensor(list(itertools.product([False, True], repeat=4)))
    with torch.no_grad():
        values = plain(model, torch.where(kept[..., None], own, base), 5, 9)
    table = {tuple(k): float(v) for k, v in zip(kept.tolist(), values.tolist(), strict=True)}
    expected = shapley(table, 4)
    analyzer = mi.TokenAttribution("kernel-shap", mi.logit_diff(), evaluations=2000)
    got = mi.run(model, prompt, analyzer).data["attribution"].values[0]
    np.testing.assert_allclose(got, expected, atol=0.03 * max(map(abs, expected)) + 1e-4)
    tree = mi.TokenAttribution("partition-shap", mi.logit_diff(), evaluations=400)
    found = mi.run(model, prompt, tree).data
    assert float(abs(found["additivity_error"]).max()) < 1e-4


def test_linear_games_are_divided_exactly() -> None:
    """Where the value is w·kept, every method gives w (LIME's lasso a little less)."""
    weights = np.array([2.0, -1.0, 0.5, 3.0, 0.0])
    for method, tolerance in (("kernel-shap", 1e-3), ("partition-shap", 1e-9), ("lime", 0.15)):
        game = Game(lambda kept: kept @ weights + 0.25, [" a", " b", " c", " d", " e"], 200, 0)
        np.testing.assert_allclose(game.attribute(method), weights, atol=tolerance, err_msg=method)


@pytest.mark.parametrize("method", ["grad-x-input", "integrated-gradients", "kernel-shap"])
def test_it_keeps_the_contract(method: str) -> None:
    analyzer = mi.TokenAttribution(method, mi.logit_diff(), steps=4, evaluations=10)  # type: ignore[arg-type]
    some = mi.tasks.ioi(4, seed=3)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "integrated gradients")
        one = mi.Examples.of(some.texts, answers=some.answers)
        mi.testing.check_analyzer(analyzer, one, models=[mi.testing.tiny("qwen3")], ties=("steps", "term"))


def test_a_span_alone_is_attributed(llama: mi.Model) -> None:
    text = "The label of: the man gave a book to Mary is"
    start = text.index("the man")
    span = [(start, start + len("the man gave a book"))]
    some = mi.Examples.of([text], answers=[(" Mary", " John")], spans={"text": span})
    for method in ("integrated-gradients", "partition-shap"):
        analyzer = mi.TokenAttribution(method, mi.logit_diff(), positions="text", evaluations=40, tolerance=1e9)  # type: ignore[arg-type]
        found = mi.run(llama, some, analyzer).data
        first, last = llama.tokenize(some).spans["text"][0]
        there = np.isfinite(found["attribution"].values[0])
        assert there.tolist() == [first <= i < last for i in range(len(there))]
        assert "".join(found["word"].values[0]) == "".join(
            llama.to_str_tokens(llama.tokenize(some).ids[0][first:last])
        ).replace(" ", "")


def test_words_are_sums_of_their_tokens() -> None:
    tokens = ["Un", "believ", "able", " film", ",", "\n", "really", " "]
    values = np.array([1.0, 2.0, 3.0, 4.0, 0.5, 0.25, 7.0, 0.125])
    assert word_sums(tokens, values) == [
        ("Unbelievable", 6.0),
        ("film,", 4.5),
        ("really", 7.375),  # white space alone goes to the word after it, or before the end
    ]


def test_every_example_has_masks_of_its_own(llama: mi.Model, ids: list[list[int]]) -> None:
    analyzer = mi.TokenAttribution("lime", mi.logit_diff(), evaluations=40)
    together = mi.run(llama, examples(ids), analyzer).data["attribution"].values
    alone = mi.run(llama, mi.Examples.of([ids[2]], answers=[([8, 9], 3)]), analyzer).data["attribution"].values
    np.testing.assert_allclose(together[2, : alone.shape[1]], alone[0], atol=1e-4)


def test_a_classifier_is_attributed_by_its_label() -> None:
    model = mi.testing.tiny("qwen3", num_labels=3)
    some = mi.Examples.of(["the man gave", "a book to Mary and John"], answers=["LABEL_1", "LABEL_2"])
    for method in ("integrated-gradients", "partition-shap"):
        found = mi.run(model, some, mi.TokenAttribution(method, steps=64, tolerance=1e9, evaluations=60)).data  # type: ignore[arg-type]
        name = "completeness_error" if method == "integrated-gradients" else "additivity_error"
        assert float(np.abs(found[name]).max()) < 0.1 * float(np.abs(found["attribution"]).sum("position").max())


def test_bad_input() -> None:
    for name, odd in (("method", "ig"), ("baseline", "[PAD]")):
        analyzer = mi.TokenAttribution()
        object.__setattr__(analyzer, name, odd)  # as it would be without run-time type checks
        with pytest.raises(NeedsError, match=f"{name} of TokenAttribution must be one of"):
            analyzer.__post_init__()
    with pytest.raises(NeedsError, match="steps of TokenAttribution must be at least 2"):
        mi.TokenAttribution(steps=0)
    model = mi.testing.tiny("llama")
    with pytest.raises(ExamplesError, match="no answers"):
        mi.run(model, "the man", mi.TokenAttribution())
    with pytest.raises(ExamplesError, match="define no position 'text'"):
        mi.run(model, mi.Examples.of(["the man"], answers=[" Mary"]), mi.TokenAttribution(positions="text"))
    model.hf.is_loaded_in_4bit = True
    with pytest.raises(NeedsError, match="4-bit weights; use method='partition-shap'"):
        mi.run(model, mi.Examples.of(["the man"], answers=[" Mary"]), mi.TokenAttribution())
    bare = mi.Model.wrap(mi.testing.tiny("llama").hf)
    with pytest.raises(ModelError, match="no padding token"):
        mi.run(bare, mi.Examples.of([[3, 4]], answers=[5]), mi.TokenAttribution(baseline="pad"))


def test_what_cannot_be_made_exact_is_said(llama: mi.Model, ids: list[list[int]]) -> None:
    analyzer = mi.TokenAttribution(metric=mi.logit_diff(), steps=2, tolerance=1e-9)
    with pytest.warns(UserWarning, match="do not add up within 1e-09 of their size after 32 steps"):
        mi.run(llama, examples(ids), analyzer)


def test_blank_tokens_in_full_are_blank_tokens_packed(model: mi.Model, ids: list[list[int]]) -> None:
    edits = ((mi.Edit((0, 2), "mean"), mi.Edit((3,), "zero")), (mi.Edit((1, 2, 3), "pad"),), (mi.Edit((4,)),))
    values = []
    for engine in ("packed", "full"):
        wanted = mi.Needs(sweeps={"e": mi.Sweep(mi.logit_diff(), edits=edits, base="clean")})
        values.append(mi.run(model, examples(ids), _Rows(wanted), engine=engine).data["value"].values)
    np.testing.assert_allclose(values[0], values[1], atol=1e-4, rtol=1e-4)
    own = model.hf.get_input_embeddings()(torch.tensor([ids[0]])).detach()
    own[0, [0, 2]] = model.baseline("mean")
    assert values[0][0, 0] == pytest.approx(plain(model, own, 5, 9).item(), abs=1e-4)


def test_colours_are_pasted_as_text(llama: mi.Model) -> None:
    text = "the <img onerror=alert(1)> man </script> gave"
    some = mi.Examples.of([text, "a book"], answers=[" Mary", " John"])
    page = coloured_tokens(mi.run(llama, some, mi.TokenAttribution("saliency")))
    assert "<img" not in page and "</script" not in page and "&lt;" in page
    assert page.count("<p ") == 3 and "<script" not in page and "class=" not in page
    shown = mi.run(llama, some, mi.TokenAttribution("grad-x-input"))
    assert coloured_tokens(shown, [1]).count("<p ") == 2


class _Rows(mi.Analyzer):
    def __init__(self, wanted: mi.Needs) -> None:
        object.__setattr__(self, "wanted", wanted)

    def needs(self, model: mi.Model) -> mi.Needs:
        return self.wanted  # type: ignore[attr-defined]

    def observe(self, batch: mi.Batch) -> mi.Part:
        values = batch.sweeps["e"].values
        assert values is not None
        return mi.Part(values, "example edit")


def test_the_mean_embedding_follows_the_weights(llama: mi.Model) -> None:
    model = mi.testing.tiny("llama")
    before = model.baseline("mean").clone()
    with torch.no_grad():
        model.hf.get_input_embeddings().weight.add_(1.0)
    torch.testing.assert_close(model.baseline("mean"), before + 1.0)
    assert torch.equal(model.trace("the man", sites.embed())[sites.embed()].isnan(), torch.zeros(1, 2, 32).bool())
