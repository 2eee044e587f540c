"""Prompt classification against plain Hugging Face, and its scores against scikit-learn."""

import numpy as np
import pytest
import sklearn.metrics
import torch

import mechinterp as mi
from mechinterp.errors import ExamplesError
from mechinterp.studies.classification import scores

TEXTS = ["the man gave a book to Mary", "John gave the book", "a man and John", "Mary and the man gave"]
TEMPLATE = "{text} to"


def test_probabilities_are_those_of_the_next_token(llama: mi.Model) -> None:
    found = mi.classify(llama, TEXTS, ["Mary", "John"], TEMPLATE).data
    for i, text in enumerate(TEXTS):
        ids = torch.tensor([llama.tokenizer(f"{text} to")["input_ids"]])
        logs = llama.hf(ids).logits[0, -1].log_softmax(-1)
        words = [llama.tokenizer(f" {name}")["input_ids"] for name in ("Mary", "John")]
        assert all(len(word) == 1 for word in words)
        expected = torch.stack([logs[word[0]] for word in words])
        np.testing.assert_allclose(found["log_prob"][i], expected.detach(), atol=1e-5)
        np.testing.assert_allclose(found["probability"][i], expected.softmax(0).detach(), atol=1e-5)
    assert "value" not in found and "gold" not in found
    assert found["prediction"].values.tolist() == [["Mary", "John"][i] for i in found["probability"].values.argmax(1)]


def test_a_label_of_several_tokens_has_its_whole_probability(llama: mi.Model) -> None:
    labels = {"two": "Mary and", "one": "John"}
    found = mi.classify(llama, TEXTS[:2], labels, TEMPLATE).data
    assert found["label"].values.tolist() == ["two", "one"]
    prompt = llama.tokenizer(f"{TEXTS[0]} to")["input_ids"]
    first, second = llama.tokenizer(" Mary and")["input_ids"]
    logs = llama.hf(torch.tensor([[*prompt, first]])).logits[0].log_softmax(-1).detach()
    assert found["log_prob"].values[0, 0] == pytest.approx(float(logs[-2, first] + logs[-1, second]), abs=1e-4)


def test_scores_equal_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(3), 200)
    right = np.where(rng.random(200) < 0.6, probs.argmax(1), rng.integers(0, 3, 200))
    found, axes = scores(probs, right, 0)
    value = dict(zip(axes["metric"], found["value"][1], strict=True))
    chosen = probs.argmax(1)
    each = sklearn.metrics.precision_recall_fscore_support(right, chosen)
    for name, expected in zip(("precision", "recall", "f1", "support"), each, strict=True):
        np.testing.assert_allclose(found[name][1], expected)
    for average in ("macro", "weighted"):
        p, r, f, _ = sklearn.metrics.precision_recall_fscore_support(right, chosen, average=average)
        got = [value[f"{average}_{name}"] for name in ("precision", "recall", "f1")]
        np.testing.assert_allclose(got, [p, r, f])
    assert value["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(right, chosen))
    assert value["log_loss"] == pytest.approx(sklearn.metrics.log_loss(right, probs))
    np.testing.assert_array_equal(found["confusion"][1], sklearn.metrics.confusion_matrix(right, chosen))
    assert value["mean_confidence"] == pytest.approx(probs.max(1).mean())
    brier = ((probs - np.eye(3)[right]) ** 2).sum(1).mean()
    assert value["brier"] == pytest.approx(brier)
    assert found["bin_count"][1].sum() == 200


def test_calibration_error_is_zero_for_sure_and_right_and_the_gap_otherwise() -> None:
    sure = np.tile([0.75, 0.25], (40, 1))
    for share, error in ((0.75, 0.0), (0.5, 0.25), (1.0, 0.25)):
        right = np.where(np.arange(40) < share * 40, 0, 1)
        found, axes = scores(sure, right, 0)
        assert dict(zip(axes["metric"], found["value"][1], strict=True))["calibration_error"] == pytest.approx(error)


def test_intervals_cover_the_accuracy_of_the_source() -> None:
    covered = 0
    rng = np.random.default_rng(1)
    for seed in range(60):
        right = rng.integers(0, 2, 80)
        chosen = np.where(rng.random(80) < 0.8, right, 1 - right)
        probs = np.where(np.eye(2)[chosen] > 0, 0.9, 0.1)
        found, _ = scores(probs, right, seed)
        covered += found["ci_low"][1][0] <= 0.8 <= found["ci_high"][1][0]
    assert covered >= 50  # 95% of 60 is 57; a percentile interval of 80 covers a little less


def test_a_result_with_the_truth(llama: mi.Model) -> None:
    gold = ["Mary", "John", "John", "Mary"]
    found = mi.classify(llama, mi.Examples.of(TEXTS, labels=gold), ["Mary", "John"], TEMPLATE)
    table = found.table()
    assert list(table.columns) == ["metric", "value", "ci_low", "ci_high"]
    accuracy = table.set_index("metric").loc["accuracy"]
    hits = (found.data["gold"].values == found.data["prediction"].values).mean()
    assert accuracy["value"] == pytest.approx(hits) and accuracy["ci_low"] <= hits <= accuracy["ci_high"]
    for view in range(len(found.views)):
        found.figure(view)
    assert int(found.data["confusion"].sum()) == 4


def test_a_classifier_has_labels_of_its_own() -> None:
    model = mi.testing.tiny("qwen2", num_labels=2)
    found = mi.classify(model, TEXTS, gold=["LABEL_0", "LABEL_1", "LABEL_1", "LABEL_0"]).data
    ids = torch.tensor([model.tokenizer(TEXTS[1])["input_ids"]])
    expected = model.hf(ids).logits[0].softmax(-1)
    np.testing.assert_allclose(found["probability"][1], expected.detach(), atol=1e-5)
    with pytest.raises(ExamplesError, match="has the labels LABEL_0, LABEL_1"):
        mi.classify(model, TEXTS, ["yes", "no"])


def test_bad_input(llama: mi.Model) -> None:
    with pytest.raises(ExamplesError, match="text 1 is empty"):
        mi.classify(llama, ["the man", " "], ["Mary", "John"])
    with pytest.raises(ExamplesError, match="two or more, and different"):
        mi.classify(llama, TEXTS, ["Mary"])
    with pytest.raises(ExamplesError, match="two or more, and different"):
        mi.classify(llama, TEXTS, ["Mary", "Mary"])
    with pytest.raises(ExamplesError, match=r"must have one \{text\}"):
        mi.classify(llama, TEXTS, ["Mary", "John"], "Label:")
    with pytest.raises(ExamplesError, match="right class of text 2 is 'Ann', which is none of Mary, John"):
        mi.classify(llama, TEXTS, ["Mary", "John"], gold=["Mary", "John", "Ann", "Mary"])
    with pytest.warns(UserWarning, match="no text is John, so recall"):
        mi.classify(llama, TEXTS, ["Mary", "John"], gold=["Mary"] * 4)
    with pytest.raises(ExamplesError, match="gold has 1 entries for 4 texts"):
        mi.classify(llama, TEXTS, ["Mary", "John"], gold=["Mary"])
