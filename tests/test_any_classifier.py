"""Attribution of classifiers of other families, against captum, our own analyzer, and a linear model."""

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

import mechinterp as mi
from mechinterp.errors import ExamplesError, MechinterpError, ModelError, NeedsError
from mechinterp.studies import attribute_classifier

METHODS = ("saliency", "grad-x-input", "integrated-gradients", "head-x-representation", "lime", "kernel-shap")
WORDS = ["the", "film", "is", "good", "bad", "dull", "un", "##even", "a", "fine"]
TEXT = "The film is uneven good"


@pytest.fixture(scope="module")
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    vocab = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    inner = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))  # type: ignore[arg-type]
    inner.normalizer = normalizers.BertNormalizer()  # type: ignore[assignment]
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
    inner.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **special)


@pytest.fixture(scope="module")
def bert() -> transformers.PreTrainedModel:
    config = transformers.BertConfig(
        vocab_size=15, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=12, num_labels=3, id2label={0: "dull", 1: "plain", 2: "fine"}, initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return transformers.BertForSequenceClassification(config)


def test_what_adds_up_adds_up_and_special_tokens_stay(bert, tokenizer) -> None:  # type: ignore[no-untyped-def]
    bert.train()
    data = attribute_classifier(bert, tokenizer, [TEXT, "a dull film"], "partition-shap", label="fine").data
    assert bert.training  # left as it was
    bert.eval()
    np.testing.assert_allclose(data["additivity_error"], 0, atol=1e-5)
    assert [str(t) for t in data["token"].values[0]] == ["The", " film", " is", " un", "even", " good"]
    assert [str(w) for w in data["word"].values[0]] == ["The", "film", "is", "uneven", "good"]
    assert np.isnan(data["attribution"].values[1, 3:]).all()
    encoded = tokenizer(TEXT, return_tensors="pt")
    with torch.no_grad():
        logits = bert(**encoded).logits[0]
    assert data["score"].values[0] == pytest.approx(float(logits[2] - logits[:2].logsumexp(0)), abs=1e-5)


def test_integrated_gradients_equal_captum(bert, tokenizer) -> None:  # type: ignore[no-untyped-def]
    from captum.attr import IntegratedGradients

    found = attribute_classifier(bert, tokenizer, [TEXT], label="dull", baseline="mask", steps=40, tolerance=1e9).data
    encoded = tokenizer(TEXT, return_tensors="pt")
    own = bert.bert.embeddings.word_embeddings(encoded["input_ids"]).detach()
    base = own.clone()
    base[:, 1:-1] = bert.bert.embeddings.word_embeddings.weight[4].detach()

    def forward(embedded: torch.Tensor) -> torch.Tensor:
        logits = bert(inputs_embeds=embedded).logits
        return logits[:, 0] - logits[:, 1:].logsumexp(1)

    theirs = IntegratedGradients(forward).attribute(own, base, n_steps=40, method="gausslegendre").sum(-1)[0, 1:-1]
    np.testing.assert_allclose(found["attribution"].values[0], theirs.detach().numpy(), atol=1e-5)
    fine = attribute_classifier(bert, tokenizer, [TEXT], label="dull", baseline="mask", steps=2, tolerance=1e-3).data
    assert fine["steps"].item() > 2
    size = np.abs(fine["attribution"].values).sum()
    assert abs(fine["completeness_error"].item()) <= 1e-3 * size or fine["steps"].item() == 32


@pytest.mark.parametrize("method", METHODS)
def test_of_a_family_with_a_row_it_is_token_attribution(method) -> None:  # type: ignore[no-untyped-def]
    model = mi.testing.tiny("qwen2", num_labels=2)
    text = "Mary and John went"
    plain = attribute_classifier(
        model.hf, model.tokenizer, [text], method, label="LABEL_1", baseline="pad", steps=10, tolerance=1e9, seed=3,
        evaluations=40,
    ).data  # fmt: skip
    analyzer = mi.TokenAttribution(
        method, mi.logit_diff(), baseline="pad", steps=10, tolerance=1e9, seed=3, evaluations=40
    )
    ours = mi.run(model, mi.Examples.of([text], answers=[("LABEL_1", "LABEL_0")]), analyzer).data
    for name in ("attribution", "score", "baseline_score", "word_attribution"):
        np.testing.assert_allclose(plain[name], ours[name], atol=2e-4, rtol=1e-3)
    assert list(plain["word"].values[0]) == list(ours["word"].values[0])


def test_the_head_times_representations_reads_the_logit() -> None:
    """At the scored token it is the metric without its bias; no other token has a say in another's number."""
    model = mi.testing.tiny("llama", num_labels=2)
    examples = mi.Examples.of(["Mary and John went", "John"], answers=[("LABEL_1", "LABEL_0")] * 2)
    data = mi.run(model, examples, mi.TokenAttribution("head-x-representation", mi.logit_diff())).data
    trace = model.trace(examples, [mi.sites.final_norm()])
    weight = model.W_U[1] - model.W_U[0]
    for i, n in enumerate((len(model.tokenize(examples).ids[0]), 1)):
        expected = (trace[mi.sites.final_norm()][i, :n] @ weight).detach()
        np.testing.assert_allclose(data["attribution"].values[i, :n], expected, atol=1e-5)
        assert data["attribution"].values[i, n - 1] == pytest.approx(data["score"].values[i], abs=1e-5)


def test_bad_input_is_named(bert, tokenizer) -> None:  # type: ignore[no-untyped-def]
    cases: list[tuple[str, type[MechinterpError], dict[str, object]]] = [
        ("no label 'superb'", ExamplesError, {"label": "superb"}),
        ("text 0 has no tokens", ExamplesError, {"texts": [""]}),
        ("text 1 has 21 tokens, and the model takes 12", ExamplesError, {"texts": ["a", "good " * 19]}),
        ("a list of texts", ExamplesError, {"texts": []}),
        ("at least 2. Got 1", NeedsError, {"steps": 1}),
        ("Got Linear", ModelError, {"hf": torch.nn.Linear(2, 2)}),
        ("a fast tokenizer", ModelError, {"tokenizer": None}),
    ]
    for said, error, change in cases:
        given = {"hf": bert, "tokenizer": tokenizer, "texts": [TEXT], **change}
        with pytest.raises(error, match=said):
            attribute_classifier(**given)  # type: ignore[arg-type]
