"""Classical text classifiers whose explanations are known: TF-IDF with logistic regression or a linear SVM."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from torch import Tensor

from mechinterp.core.analyzer import Path
from mechinterp.core.display import count
from mechinterp.core.result import Result, View
from mechinterp.errors import ExamplesError, NeedsError

Kind: TypeAlias = Literal["logistic", "svm"]
Method: TypeAlias = Literal["weight-x-input", "integrated-gradients"]
Baseline: TypeAlias = Literal["zero", "mean"]
Floats: TypeAlias = npt.NDArray[np.floating]
SHOWN = 30
"""Terms in a figure, at most: those of the largest weights or attributions."""


def tfidf_classifier(
    texts: Sequence[str],
    labels: Sequence[Any],
    model: Kind = "logistic",
    *,
    vocabulary: Sequence[str] | None = None,
    C: float = 1.0,
    seed: int = 0,
) -> "TfidfClassifier":
    """Fit a linear classifier of TF-IDF vectors, with scikit-learn's own settings but for what is named here.

        small = mi.tfidf_classifier(texts, labels)
        small.coefficients().table()
        small.attribute(["What a dull film."], "integrated-gradients", label="negative").table()

    A text is a vector of its terms' counts × idf, of length 1; terms are words of two letters or more, in lower case.

    Args:
        texts: to be fitted.
        labels: the right label of each; two different ones or more.
        model: ``"logistic"``, with a softmax over all labels where there are more than two (multinomial); or
            ``"svm"``, linear, with one label against all others where there are more than two (one-vs-rest).
        vocabulary: the terms to use; all of the texts' by default.
        C: inverse strength of L2 regularisation.
        seed: of the SVM's solver.
    Raises:
        NeedsError: an unknown model, or C that is not above 0. ExamplesError: no text, an empty one, texts and
            labels of different number, one label only, or a term that no text can have.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.svm import LinearSVC

    if model not in get_args(Kind):
        raise NeedsError(f"The model of tfidf_classifier must be one of {', '.join(get_args(Kind))}. Got {model!r}")
    if not C > 0:
        raise NeedsError(f"The C of tfidf_classifier must be above 0. Got {C}")
    _check_texts(texts)
    if len(labels) != len(texts):
        raise ExamplesError(f"there are {len(labels)} labels for {len(texts)} texts; give one for each")
    right = [str(label) for label in labels]
    if len(set(right)) < 2:
        raise ExamplesError(f"every text has the label {right[0]!r}; give texts of two labels or more")
    vectorizer = TfidfVectorizer(vocabulary=None if vocabulary is None else list(vocabulary))
    analyze = vectorizer.build_analyzer()
    if vocabulary is not None:
        _check_vocabulary(vocabulary, analyze, texts)
    elif not any(analyze(text) for text in texts):
        raise ExamplesError("no text has a word of two letters or more, so there are no terms; give such texts")
    vectors = vectorizer.fit_transform(texts)

    def fit(weights: Floats | None) -> Any:
        estimator = (
            LogisticRegression(C=C, max_iter=10_000)
            if model == "logistic"
            else LinearSVC(C=C, random_state=seed, max_iter=100_000)
        )
        return estimator.fit(vectors, right, sample_weight=weights)

    names = tuple(sorted(set(right)))
    numbers = np.array([names.index(label) for label in right])
    mean = np.asarray(vectors.mean(0)).ravel()
    found = TfidfClassifier(
        model, names, tuple(vectorizer.get_feature_names_out()), *_of_labels(fit(None)), mean, vectorizer, fit, numbers
    )
    found._vectors(texts)  # says how many have no term
    return found


@dataclass(frozen=True, eq=False)
class TfidfClassifier:
    """A fitted `tfidf_classifier`; a label's score is weights · x + bias of the text's TF-IDF vector x.

    With two labels the score of one is the other's with its sign changed: the log-odds of the label (logistic), or the
    signed distance from the boundary in half-widths of the margin (SVM). With more it is the label's logit (logistic;
    the softmax of all is their probabilities), or that distance from the boundary to all other labels (SVM).

    Attributes:
        labels: in alphabetical order.
        weights: ``label term``.
        bias: ``label``.
        mean: the mean vector of the texts that were fitted, ``term``.
    """

    model: Kind
    labels: tuple[str, ...]
    terms: tuple[str, ...]
    weights: Floats
    bias: Floats
    mean: Floats
    _vectorizer: Any
    _fit: Callable[[Floats | None], Any]
    _right: npt.NDArray[np.intp]

    def scores(self, texts: Sequence[str]) -> Floats:
        """Each label's score, ``example label``; with a warning where a text has no known term.

        Raises:
            ExamplesError: no text, or an empty one.
        """
        return np.asarray(self._vectors(texts) @ self.weights.T) + self.bias

    def predict(self, texts: Sequence[str]) -> list[str]:
        """The label of the largest score, for each text; errors and warnings are those of `scores`."""
        return [self.labels[i] for i in self.scores(texts).argmax(1)]

    def coefficients(self, resamples: int = 1000, seed: int = 0) -> Result:
        """The weights, ``label term``, with their uncertainty; terms by the weight of the last label, largest first.

        Result: ``weight``; ``ci_low, ci_high``, 95% percentile bootstrap (Efron 1979): the classifier is fitted again
        to texts drawn with replacement within each label, and what TF-IDF weighs terms by stays; and
        ``interval_excludes_zero``. Regularisation pulls weights and intervals towards zero.

        Args:
            resamples: fits; 0 for weights alone.
        Raises:
            NeedsError: resamples that are too few for an interval.
        """
        if resamples and resamples < 100:
            raise NeedsError(f"an interval takes 100 resamples or more, or 0 for none. Got {resamples}")
        order = np.argsort(-self.weights[-1], kind="stable")
        data: dict[str, Any] = {"weight": (("label", "term"), self.weights[:, order])}
        if resamples:
            drawn = np.stack([_of_labels(self._fit(w))[0] for w in _draws(self._right, resamples, seed)])
            low, high = np.quantile(drawn, [0.025, 0.975], axis=0)[:, :, order]
            data |= {"ci_low": (("label", "term"), low), "ci_high": (("label", "term"), high)}
            data["interval_excludes_zero"] = ("label", "term"), (low > 0) | (high < 0)
        terms = np.array(self.terms)[order]
        view = View(
            "heatmap", "weight", "term", "label", title="Weight of each term", unit=_UNITS[self.model], center=0.0,
            mark="interval_excludes_zero" if resamples else None, select=_largest(terms, self.weights[:, order]),
        )  # fmt: skip
        whole = xr.Dataset(data, {"label": list(self.labels), "term": terms}, {"unit": _UNITS[self.model]})
        return Result(whole, {"analyzer": "coefficients", "model": self.model, "seed": seed}, (view,))

    def attribute(
        self,
        texts: Sequence[str],
        method: Method = "weight-x-input",
        *,
        label: str | None = None,
        baseline: Baseline = "zero",
        steps: int = 50,
    ) -> Result:
        """What each term of each text contributes to a label's score, less that of the baseline.

        - ``"weight-x-input"``: weight · (x - baseline), which for a linear score is what it is made of.
        - ``"integrated-gradients"`` (Sundararajan 2017): (x - baseline) · the mean gradient of the score on the line
          between them, by automatic differentiation at Gauss-Legendre points, as `TokenAttribution` does it.

        Result: ``attribution`` (``example term``); ``word_attribution`` and ``word`` (``example word_number``), where
        words are what white space separates and a term's attribution is divided among its occurrences: 0 for a word
        that is no term, and terms that the text lacks (which contribute where the baseline is ``"mean"``) have no
        word; ``label``, ``score``, ``baseline_score``, and ``completeness_error``, their difference less the sum of
        attributions; and ``known_terms``, how many different terms of the text are known. A text with none has a
        warning, and its words 0.

        Args:
            label: whose score; each text's predicted label by default.
            baseline: ``"zero"``, a text without any known term, or ``"mean"`` of the texts that were fitted.
            steps: points on the path of integrated gradients.
        Raises:
            NeedsError: an unknown method or baseline, or fewer than 2 steps. ExamplesError: an unknown label, no
                text, or an empty one.
        """
        for name, value, kind in (("method", method, Method), ("baseline", baseline, Baseline)):
            if value not in get_args(kind):
                known = ", ".join(get_args(kind))
                raise NeedsError(f"The {name} of attribute must be one of {known}. Got {value!r}")
        if steps < 2:
            raise NeedsError(f"The steps of attribute must be at least 2. Got {steps}")
        if label is not None and label not in self.labels:
            raise ExamplesError(f"the classifier has the labels {', '.join(self.labels)}, not {label!r}; give one")
        x = np.asarray(self._vectors(texts).toarray(), dtype=float)
        start = self.mean if baseline == "mean" else np.zeros(len(self.terms))
        everything = x @ self.weights.T + self.bias
        chosen = everything.argmax(1) if label is None else np.full(len(texts), self.labels.index(label))
        each = np.arange(len(texts))
        if method == "weight-x-input":
            found = self.weights[chosen] * (x - start)
        else:
            weights, bias = torch.as_tensor(self.weights), torch.as_tensor(self.bias)

            def score(vectors: Tensor) -> Tensor:
                return torch.nn.functional.linear(vectors, weights, bias)[each, chosen]

            found = integrated_gradients(score, torch.as_tensor(x), torch.as_tensor(start), steps).numpy()
        score_of = everything[each, chosen]
        empty = (self.weights @ start + self.bias)[chosen]
        words = [self._words(text, row) for text, row in zip(texts, found, strict=True)]
        wide = max(len(row) for row in words)
        order = np.argsort(-self.weights[-1], kind="stable")
        terms = np.array(self.terms)[order]
        by_word = [[v for _, v in row] + [np.nan] * (wide - len(row)) for row in words]
        data = xr.Dataset(
            {
                "attribution": (("example", "term"), found[:, order]),
                "word_attribution": (("example", "word_number"), np.array(by_word)),
                "word": (("example", "word_number"), [[w for w, _ in r] + [""] * (wide - len(r)) for r in words]),
                "label": ("example", np.array(self.labels)[chosen]),
                "score": ("example", score_of),
                "baseline_score": ("example", empty),
                "completeness_error": ("example", score_of - empty - found.sum(1)),
                "known_terms": ("example", (x != 0).sum(1)),
            },
            {"example": each, "term": terms, "word_number": np.arange(wide)},
            {"unit": _UNITS[self.model]},
        )
        unit = f"{method}, in {_UNITS[self.model]}"
        views = (
            View(
                "heatmap", "attribution", "term", "example", title="What each term contributes", unit=unit, center=0.0,
                select=_largest(terms, found[:, order]),
            ),
            View(
                "heatmap", "word_attribution", "word_number", "example", title="What each word contributes", unit=unit,
                text="word", center=0.0,
            ),
        )  # fmt: skip
        return Result(data, {"analyzer": "attribute", "method": method, "baseline": baseline}, views)

    def _vectors(self, texts: Sequence[str]) -> Any:
        """TF-IDF, a sparse ``example term``."""
        _check_texts(texts)
        found = self._vectorizer.transform(texts)
        if (empty := np.flatnonzero(found.getnnz(1) == 0)).size:
            warnings.warn(
                f"there is no known term in {count(len(empty), 'text')} (the first is {int(empty[0])}), so the score is"
                " the bias alone; leave such texts out, or fit with more texts or terms",
                stacklevel=3,
            )
        return found

    def _words(self, text: str, attribution: Floats) -> list[tuple[str, float]]:
        """(word, attribution) of what white space separates."""
        analyze = self._vectorizer.build_analyzer()
        place: dict[str, int] = self._vectorizer.vocabulary_
        terms = [[place[term] for term in analyze(word) if term in place] for word in text.split()]
        often = np.bincount([t for some in terms for t in some], minlength=len(attribution))
        return [
            (word, float(sum(attribution[t] / often[t] for t in some)))
            for word, some in zip(text.split(), terms, strict=True)
        ]


_UNITS = {"logistic": "log-odds", "svm": "margin half-widths"}


def integrated_gradients(function: Callable[[Tensor], Tensor], x: Tensor, baseline: Tensor, steps: int) -> Tensor:
    """(x - baseline) · mean gradient on the line between them, ``example feature`` (Sundararajan 2017).

    Args:
        function: of vectors ``example feature`` → one number for each example, which no other example changes.
    """
    path = Path.of("zero", steps)
    mean = torch.zeros_like(x)
    for share, weight in zip(path.shares, path.weights, strict=True):
        point = (baseline + share * (x - baseline)).requires_grad_()
        mean += weight * torch.autograd.grad(function(point).sum(), point)[0]
    return (x - baseline) * mean


def _of_labels(estimator: Any) -> tuple[Floats, Floats]:
    """Weights ``label term`` and bias ``label``; scikit-learn has one row for two labels, which is the second's."""
    weights, bias = np.asarray(estimator.coef_), np.asarray(estimator.intercept_)
    return (
        (np.concatenate([-weights, weights]), np.concatenate([-bias, bias])) if len(weights) == 1 else (weights, bias)
    )


def _draws(right: npt.NDArray[np.intp], resamples: int, seed: int) -> Floats:
    """How often each text is drawn, ``resample example``, within each label."""
    rng = np.random.default_rng(seed)
    out = np.zeros((resamples, len(right)))
    for label in np.unique(right):
        inside = np.flatnonzero(right == label)
        out[:, inside] = rng.multinomial(len(inside), np.full(len(inside), 1 / len(inside)), resamples)
    return out


def _largest(terms: npt.NDArray[Any], values: Floats) -> dict[str, Any]:
    """The terms that a figure has room for."""
    if len(terms) <= SHOWN:
        return {}
    first = np.argsort(-np.abs(values).max(0), kind="stable")[:SHOWN]
    return {"term": tuple(terms[np.sort(first)].tolist())}


def _check_texts(texts: Sequence[str]) -> None:
    if isinstance(texts, str) or not len(texts):
        raise ExamplesError(f"texts must be a list of one text or more. Got {texts!r}")
    for i, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise ExamplesError(f"text {i} is {'empty' if isinstance(text, str) else 'no string'}; give a text")


def _check_vocabulary(vocabulary: Sequence[str], analyze: Callable[[str], list[str]], texts: Sequence[str]) -> None:
    if not len(vocabulary) or len(set(vocabulary)) < len(vocabulary):
        raise ExamplesError(f"the vocabulary must be terms, each once. Got {list(vocabulary)}")
    if odd := [term for term in vocabulary if analyze(term) != [term]]:
        raise ExamplesError(
            f"{odd[0]!r} can be no text's term, since terms are single words of two letters or more, in lower case;"
            " correct it"
        )
    there = {term for text in texts for term in analyze(text)}
    if gone := [term for term in vocabulary if term not in there]:
        warnings.warn(
            f"no text has {count(len(gone), 'term')} of the vocabulary, such as {gone[0]!r}, whose weight is then 0;"
            " leave them out",
            stacklevel=3,
        )
