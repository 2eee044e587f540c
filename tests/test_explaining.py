"""A prediction explained in sentences whose numbers are those of the analyzers behind them."""

import pytest
import torch

import mechinterp as mi
from mechinterp.errors import ExamplesError
from mechinterp.studies.explaining import explain_prediction
from mechinterp.testing import tiny

TEXT = "the man gave a book to the woman"
WORDS = {"m": "Mary", "j": "John"}
TEMPLATE = "{text} and"


def log_odds(model: mi.Model, text: str, label: str) -> float:
    ids = torch.tensor([model.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        logits = model.hf(ids).logits[0, -1]
    mine, other = (model.tokenizer(f" {WORDS[name]}")["input_ids"][0] for name in (label, "mj".replace(label, "")))
    return float(logits[mine] - logits[other])


@pytest.mark.parametrize("depth", ["brief", "standard", "detailed"])
def test_what_each_depth_says(llama: mi.Model, depth: str) -> None:
    found = explain_prediction(llama, TEXT, WORDS, TEMPLATE, depth=depth, method="grad-x-input", evaluations=30)
    expected = max(WORDS, key=lambda name: log_odds(llama, f"{TEXT} and", name))
    assert found.label == expected
    assert found.sentences[0].startswith(f"Predicted {expected} with probability 0.")
    assert found.sentences[1].startswith(f"For {expected} speak ")
    said = str(found)
    assert ("as many random ones" in said) == (depth != "brief")
    assert ("Rank correlation of grad-x-input with other methods" in said) == (depth == "detailed")
    assert ("logit lens" in said and "Components that write most" in said) == (depth == "detailed")
    attribution = next(r for r in found.results if r.meta.get("method") == "grad-x-input")
    assert float(attribution.data["score"][0]) == pytest.approx(log_odds(llama, f"{TEXT} and", expected), abs=1e-4)
    if depth != "brief":
        assert f"to {float(attribution.data['score'][0]):.2f}" in said


def test_a_classifier_explains_its_own_labels() -> None:
    model = tiny(num_labels=3)
    found = explain_prediction(model, TEXT, depth="detailed", method="partition-shap", evaluations=40)
    assert found.label in model.to_str_outputs(range(3))
    assert "divide the change of log-odds" in str(found) and "logit lens" not in str(found)


def test_bad_input(llama: mi.Model) -> None:
    with pytest.raises(ExamplesError, match="begin with the same token"):
        explain_prediction(llama, TEXT, {"a": "Mary and", "b": "Mary to"}, TEMPLATE)
    with pytest.raises(ExamplesError, match="text 0 is empty"):
        explain_prediction(llama, " ", WORDS, TEMPLATE)
