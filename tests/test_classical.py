"""Classical classifiers: explanations that are known, against hand-made scores and scikit-learn's own."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC

import mechinterp as mi
from mechinterp.errors import ExamplesError, NeedsError
from mechinterp.report.panels import panel
from mechinterp.studies.classical import integrated_gradients

TEXTS = [
    "A superb, moving film.",
    "Superb plot and a charming cast",
    "a dreadful film",
    "The plot was tedious, dreadful; tedious!",
    "charming and moving plot",
    "A clumsy cast in a tedious film",
]
LABELS = ["good", "good", "bad", "bad", "good", "bad"]
THREE = ["good", "good", "bad", "bad", "mixed", "mixed"]


def both(kind: str) -> Any:
    return LogisticRegression(max_iter=10_000) if kind == "logistic" else LinearSVC(random_state=0)


@pytest.fixture(params=["logistic", "svm"])
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.parametrize("labels", [LABELS, THREE], ids=["two", "three"])
def test_scores_and_predictions_are_scikit_learns(kind: Any, labels: list[str]) -> None:
    ours = mi.tfidf_classifier(TEXTS, labels, kind)
    vectorizer = TfidfVectorizer()
    x = vectorizer.fit_transform(TEXTS)
    theirs = both(kind).fit(x, labels)
    expected = theirs.decision_function(x)
    scores = ours.scores(TEXTS)
    np.testing.assert_allclose(scores if scores.shape[1] > 2 else scores[:, 1], expected, atol=2e-3)
    assert ours.predict(TEXTS) == theirs.predict(x).tolist()
    if kind == "logistic" and labels is LABELS:
        probability = 1 / (1 + np.exp(-scores[:, 1]))
        np.testing.assert_allclose(probability, theirs.predict_proba(x)[:, 1], atol=1e-3)


@pytest.mark.parametrize("labels", [LABELS, THREE], ids=["two", "three"])
@pytest.mark.parametrize("baseline", ["zero", "mean"])
def test_integrated_gradients_are_weights_times_input(kind: Any, labels: list[str], baseline: Any) -> None:
    ours = mi.tfidf_classifier(TEXTS, labels, kind)
    x = TfidfVectorizer().fit_transform(TEXTS).toarray()
    start = x.mean(0) if baseline == "mean" else np.zeros(x.shape[1])
    for label in (None, *ours.labels):
        rows = ours.scores(TEXTS).argmax(1) if label is None else np.full(len(TEXTS), ours.labels.index(label))
        expected = ours.weights[rows] * (x - start)
        for method in ("weight-x-input", "integrated-gradients"):
            found = ours.attribute(TEXTS, method, label=label, baseline=baseline).data
            got = found["attribution"].sel(term=list(ours.terms)).values
            np.testing.assert_allclose(got, expected, atol=1e-6)
            assert np.abs(found["completeness_error"]).max() < 1e-6
            np.testing.assert_allclose(found["score"], ours.scores(TEXTS)[np.arange(len(TEXTS)), rows])
            assert found["label"].values.tolist() == [ours.labels[i] for i in rows]


def test_integrated_gradients_of_what_is_not_linear() -> None:
    """Complete, and not the gradient at the input times the input: it is an integral, not w·x under its name."""
    x, baseline = torch.tensor([[1.0, 2.0], [0.5, -1.0]], dtype=torch.float64), torch.tensor([0.1, -0.2]).double()

    def function(at: torch.Tensor) -> torch.Tensor:
        return at[:, 0] * at[:, 1] ** 2 + at[:, 0].sigmoid()

    found = integrated_gradients(function, x, baseline, 50)
    apart = function(x) - function(baseline.expand_as(x))
    torch.testing.assert_close(found.sum(1), apart, atol=1e-10, rtol=0)
    at = x.clone().requires_grad_()
    product = (x - baseline) * torch.autograd.grad(function(at).sum(), at)[0]
    assert (found - product).abs().max() > 0.1


def test_words_share_their_terms(kind: Any) -> None:
    ours = mi.tfidf_classifier(TEXTS, LABELS, kind)
    found = ours.attribute(TEXTS, label="bad")
    words = found.data["word"].values
    assert words[3].tolist() == ["The", "plot", "was", "tedious,", "dreadful;", "tedious!", ""]
    values = found.data["word_attribution"].values
    assert values[3, 3] == values[3, 5] != 0
    np.testing.assert_allclose(np.nansum(values, 1), found.data["attribution"].sum("term"))
    assert values[0, 0] == 0  # "A" is no term
    assert np.isnan(values[3, 6])
    assert found.data["known_terms"].values.tolist() == [3, 5, 2, 5, 4, 5]


def test_weights_and_their_intervals(kind: Any) -> None:
    ours = mi.tfidf_classifier(TEXTS, LABELS, kind, vocabulary=["superb", "tedious", "plot", "film"])
    found = ours.coefficients(resamples=100)
    weight = found.data["weight"]
    assert found.table().columns.tolist()[:3] == ["label", "term", "weight"]
    assert weight["term"].values.tolist() == ["superb", "plot", "film", "tedious"]  # of good, the last label
    np.testing.assert_allclose(weight.sel(label="good"), -weight.sel(label="bad"))
    low, high = found.data["ci_low"], found.data["ci_high"]
    assert bool((low <= weight).all()) and bool((weight <= high).all()) and bool((low < high).all())
    again = ours.coefficients(resamples=100)
    assert found.data.equals(again.data)
    assert ours.coefficients(0).data.data_vars.keys() == {"weight"}
    with pytest.raises(NeedsError, match=r"100 resamples or more, or 0 for none\. Got 5"):
        ours.coefficients(5)


def test_an_interval_is_that_of_texts_drawn_again() -> None:
    """One resample by weights is the fit of a list in which texts are repeated and left out."""
    ours = mi.tfidf_classifier(TEXTS, LABELS)
    often = np.array([2.0, 1, 0, 1, 0, 2])
    x = TfidfVectorizer().fit_transform(TEXTS)[np.repeat(np.arange(6), often.astype(int))]
    listed = LogisticRegression(max_iter=10_000).fit(x, np.repeat(LABELS, often.astype(int)))
    np.testing.assert_allclose(ours._fit(often).coef_, listed.coef_, atol=1e-3)


def test_figures_of_many_terms() -> None:
    words = [f"w{chr(97 + i)}{chr(97 + j)}" for i in range(8) for j in range(8)]
    texts = [" ".join(words[i::4]) for i in range(4)]
    ours = mi.tfidf_classifier(texts, ["a", "a", "b", "b"])
    for result in (ours.coefficients(100), ours.attribute(texts)):
        for view in result.views:
            assert len(getattr(panel(result, view), "x", ())) in (16, 30)  # words of a text, terms of all


def test_texts_without_a_known_term_are_said(kind: Any) -> None:
    ours = mi.tfidf_classifier(TEXTS, LABELS, kind)
    with pytest.warns(UserWarning, match=r"no known term in 1 text \(the first is 1\), so the score is the bias"):
        found = ours.attribute(["superb", "zzz"], label="good").data
    assert found["known_terms"].values.tolist() == [1, 0]
    assert float(found["score"][1]) == pytest.approx(ours.bias[1])
    with pytest.warns(UserWarning, match="no known term in 1 text"):
        assert ours.predict(["zzz"]) == [ours.labels[int(ours.bias.argmax())]]
    with pytest.warns(UserWarning, match=r"no known term in 5 texts \(the first is 0\)"):
        mi.tfidf_classifier(TEXTS, LABELS, kind, vocabulary=["was"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.predict(TEXTS)


def test_bad_input() -> None:
    fit = mi.tfidf_classifier
    with pytest.raises(ExamplesError, match="every text has the label 'good'; give texts of two labels"):
        fit(TEXTS[:2], LABELS[:2])
    with pytest.raises(ExamplesError, match="5 labels for 6 texts"):
        fit(TEXTS, LABELS[:5])
    with pytest.raises(ExamplesError, match="text 1 is empty"):
        fit(["fine", " "], ["a", "b"])
    with pytest.raises(ExamplesError, match="a list of one text or more"):
        fit([], [])
    with pytest.raises(ExamplesError, match="no text has a word of two letters or more"):
        fit(["a", "I !"], ["a", "b"])
    with pytest.raises(ExamplesError, match="'Superb' can be no text's term"):
        fit(TEXTS, LABELS, vocabulary=["Superb"])
    with pytest.raises(ExamplesError, match="each once"):
        fit(TEXTS, LABELS, vocabulary=["film", "film"])
    with pytest.warns(UserWarning, match="1 term of the vocabulary, such as 'xylophone'"):
        fit(TEXTS, LABELS, vocabulary=["xylophone", "superb", "film", "tedious", "plot"])
    with pytest.raises(NeedsError, match=r"C of tfidf_classifier must be above 0. Got 0"):
        fit(TEXTS, LABELS, C=0.0)
    ours = fit(TEXTS, LABELS)
    with pytest.raises(ExamplesError, match="has the labels bad, good, not 'fine'"):
        ours.attribute(TEXTS, label="fine")
    with pytest.raises(NeedsError, match="steps of attribute must be at least 2"):
        ours.attribute(TEXTS, steps=1)
    with pytest.raises(ExamplesError, match="text 0 is empty"):
        ours.attribute([""])
