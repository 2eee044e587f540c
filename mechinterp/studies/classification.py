"""A language model as a classifier: label words scored at the answer position, and how good that is."""

import itertools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr

from mechinterp import sites
from mechinterp.core.analyzer import Analyzer, Batch, Needs
from mechinterp.core.analyzer import Model as Declared
from mechinterp.core.examples import Examples
from mechinterp.core.result import Part, Result, View
from mechinterp.engine.runner import Progress, provenance, run
from mechinterp.errors import ExamplesError
from mechinterp.model.model import Model
from mechinterp.studies.predictions import answer_ids, choose, prompt_of

BINS = 10
"""Of confidence, for calibration."""
RESAMPLES = 2000
Floats = npt.NDArray[np.floating]


def classify(
    model: Model,
    texts: Any,
    labels: Sequence[str] | Mapping[str, str] | None = None,
    template: str = "{text}",
    *,
    gold: Sequence[Any] | None = None,
    answer: str = " {label}",
    chat: bool = False,
    system: str | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    progress: Progress | bool = False,
) -> Result:
    """Classify texts by how likely the model finds each label as what follows the prompt, and score that.

        mi.classify(model, texts, ["negative", "positive"], "Review: {text}\\nSentiment:", gold=truth)

    A label's probability is that of all its tokens together; all labels of one token are scored in one pass. The
    classes' probabilities are these, divided by their sum. A classifier (…ForSequenceClassification) has its own
    labels and takes the text as it is.

    Result: ``probability`` and ``log_prob`` (``example label``; over the labels, and as the model has it),
    ``prediction`` and ``confidence`` (the largest probability); where what is right is known, ``gold``, and
    ``value`` with ``ci_low, ci_high`` of each ``metric``: accuracy, macro and weighted precision, recall and F1,
    log loss, Brier score, expected calibration error (ten bins of equal width; Naeini 2015), mean confidence, and the
    accuracy of the most frequent class; ``precision``, ``recall``, ``f1`` with intervals and ``support`` of each
    label; ``confusion`` (``gold_label label``, in examples); and ``bin_confidence``, ``bin_accuracy``, ``bin_count``
    of each ``bin``. Intervals are 95% percentile bootstrap over examples. A class that is never predicted has
    precision 0, and one that never occurs recall 0, with a warning; both count in the means.

    Args:
        texts: strings, or `Examples` whose labels then are what is right.
        labels: what the classes are called in the prompt; or class → the words that stand for it there.
        template: the prompt, in which ``{text}`` is replaced.
        gold: the right class of each text.
        answer: how a label continues the prompt.
        chat: the prompt is a user's message, and the answer the assistant's.
        system: a message before it.
    Raises:
        ExamplesError: an empty text, fewer than two labels, two of the same tokens, a right class that is no label,
            or a template without ``{text}``.
    """
    raw = texts if isinstance(texts, Examples) else Examples.of(texts)
    truth = raw.labels if gold is None else tuple(gold)
    labelling = Labelling.of(model, labels, template, answer, chat, system)
    right = None if truth is None else labelling.right(truth, len(raw))
    return scored(model, labelling, labelling.log_probs(model, raw, batch_size, progress), right, seed)


def scored(
    model: Model, labelling: "Labelling", log_probs: Floats, right: npt.NDArray[np.intp] | None, seed: int
) -> Result:
    """What `classify` says of log-probabilities, ``example label``."""
    data = _dataset(labelling.names, log_probs, right, seed)
    views = (View("bars", "value", "metric", title="How good the predictions are"),)
    if right is None:
        views = (View("bars", "probability", "label", title="Mean probability of each label"),)
    else:
        views += (
            View("heatmap", "confusion", "label", "gold_label", title="Right class and prediction", unit="examples"),
            View("lines", "bin_accuracy", "bin_confidence", title="Calibration", unit="accuracy"),
        )  # fmt: skip
    about = {"analyzer": "classify", "template": labelling.template, "answer": labelling.answer, "seed": seed}
    return Result(data, {**provenance(model), **about}, views)


@dataclass(frozen=True)
class Labelling:
    """Which labels there are, the words that stand for them, and how a text becomes the prompt that asks for one.

    Attributes:
        words: label → what stands for it in the answer; of a classifier, its own labels.
        template, answer, chat, system: as for `classify`.
    """

    words: Mapping[str, str]
    template: str
    answer: str = " {label}"
    chat: bool = False
    system: str | None = None

    @classmethod
    def of(
        cls,
        model: Model,
        labels: Sequence[str] | Mapping[str, str] | None,
        template: str,
        answer: str = " {label}",
        chat: bool = False,
        system: str | None = None,
    ) -> "Labelling":
        """Checked against the model.

        Raises:
            ExamplesError: fewer than two labels, two that are the same, not a classifier's, or a template without
                ``{text}`` or an answer without ``{label}``.
        """
        for what, text, slot in (("a template", template, "{text}"), ("an answer", answer, "{label}")):
            if text.count(slot) != 1:
                raise ExamplesError(f"{what} must have one {slot}, where the {slot[1:-1]} goes. Got {text!r}")
        if model.dims.n_labels is not None:
            names = model.to_str_outputs(range(model.dims.n_labels))
            if labels is not None and set(labels) != set(names):
                raise ExamplesError(
                    f"the classifier has the labels {', '.join(names)}; give no others. Got {list(labels)}"
                )
            return cls({name: name for name in names}, template)
        words = dict(labels) if isinstance(labels, Mapping) else {str(label): str(label) for label in labels or ()}
        if len(words) < 2 or (labels is not None and len(words) < len(labels)):
            raise ExamplesError(f"labels must be two or more, and different. Got {list(labels or ())}")
        return cls(words, template, answer, chat, system)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.words)

    def prompts(self, texts: Examples) -> Examples:
        """A prompt for each text, in which the text is the span ``text``.

        Raises:
            ExamplesError: a text that is empty, or no string.
        """
        for i, text in enumerate(texts.texts):
            if not isinstance(text, str) or not text.strip():
                raise ExamplesError(f"text {i} is {'empty' if isinstance(text, str) else 'no string'}; give a text")
        strings = [str(text) for text in texts.texts]
        made = [prompt_of(text, self.template, self.chat, self.system) for text in strings]
        spans = [(start, start + len(text)) for (_, start), text in zip(made, strings, strict=True)]
        return Examples.of([prompt for prompt, _ in made], spans={"text": spans})

    def against_others(self, model: Model, texts: Examples, chosen: Sequence[str]) -> Examples:
        """Prompts whose answers are, for each text, a label on one side and all others on the other.

        With `log_odds` they are what an explanation is about. A label of several tokens stands for its first.

        Raises:
            ExamplesError: as `prompts`; two labels begin with the same token.
        """
        prompts = self.prompts(texts)
        if model.dims.n_labels is not None:
            sides = [(name, [other for other in self.names if other != name]) for name in chosen]
            return replace(prompts, answers=Examples.of(list(prompts.texts), answers=sides).answers)
        answers: list[Any] = []
        for text, ids, name in zip(prompts.texts, model.tokenize(prompts).ids, chosen, strict=True):
            first = {
                label: answer_ids(model.tokenizer, text, ids, self.answer.replace("{label}", word))[0]
                for label, word in self.words.items()
            }
            if twins := [(a, b) for a, b in itertools.combinations(first, 2) if first[a] == first[b]]:
                raise ExamplesError(
                    f"the words for {twins[0][0]!r} and {twins[0][1]!r} begin with the same token, so the log-odds"
                    " between them cannot be explained at one position; give other words"
                )
            answers.append(([first[name]], [token for label, token in first.items() if label != name]))
        return replace(prompts, answers=Examples.of(list(prompts.texts), answers=answers).answers)

    def right(self, truth: Sequence[Any] | None, n: int) -> npt.NDArray[np.intp]:
        """The number of the right label of each of n texts.

        Raises:
            ExamplesError: naming what is no label.
        """
        if truth is None or len(truth) != n:
            raise ExamplesError(f"gold has {len(truth or ())} entries for {n} texts; give one for each")
        place = {name: i for i, name in enumerate(self.names)}
        if unknown := next(((i, str(label)) for i, label in enumerate(truth) if str(label) not in place), None):
            raise ExamplesError(
                f"the right class of text {unknown[0]} is {unknown[1]!r}, which is none of {', '.join(self.names)};"
                " correct it, or add that label"
            )
        return np.array([place[str(label)] for label in truth])

    def log_probs(
        self, model: Model, texts: Examples, batch_size: int | None = None, progress: Progress | bool = False
    ) -> Floats:
        """Log of each label's probability as the answer, ``example label``."""
        prompts = self.prompts(texts)
        if model.dims.n_labels is not None:
            result = run(model, prompts, LabelLogProbs(), batch_size=batch_size, progress=progress)
            return result.data["log_prob"].transpose("example", "label").values
        return choose(model, prompts.texts, tuple(self.words.values()), self.answer, batch_size=batch_size).log_probs


def question(words: Sequence[str]) -> str:
    """A template that asks for one of the words."""
    return f"Is the text below {', '.join(words[:-1])} or {words[-1]}?\nText: {{text}}\nAnswer:"


@dataclass(frozen=True)
class LabelLogProbs(Analyzer):
    """Log-probability of each label of a classifier."""

    def needs(self, model: Declared) -> Needs:
        return Needs(reads=sites.logits(positions="end"))

    def observe(self, batch: Batch) -> Part:
        logits = batch.clean[sites.logits(positions="end")]
        return Part({"log_prob": (logits.float().log_softmax(-1), "example label")})


def _dataset(names: tuple[str, ...], log_probs: Floats, right: npt.NDArray[np.intp] | None, seed: int) -> xr.Dataset:
    probs = torch.as_tensor(log_probs).double().softmax(-1).numpy()
    chosen = probs.argmax(1)
    data: dict[str, Any] = {
        "probability": (("example", "label"), probs),
        "log_prob": (("example", "label"), log_probs),
        "prediction": ("example", np.array(names)[chosen]),
        "confidence": ("example", probs.max(1)),
    }
    coords: dict[str, Any] = {"label": list(names), "example": np.arange(len(probs))}
    if right is not None:
        _told_of(names, right)
        more, axes = scores(probs, right, seed)
        data |= {"gold": ("example", np.array(names)[right]), **more}
        coords |= {**axes, "gold_label": list(names)}
    first = ["value", "ci_low", "ci_high"] if right is not None else []
    whole = xr.Dataset({name: data[name] for name in [*first, *(n for n in data if n not in first)]}, coords)
    return whole.assign_attrs(unit="probability")


def _told_of(names: tuple[str, ...], right: npt.NDArray[np.intp]) -> None:
    """Warn of labels that no text has."""
    if absent := [name for i, name in enumerate(names) if i not in right]:
        warnings.warn(
            f"no text is {' or '.join(absent)}, so recall and F1 there, 0, say nothing, and the macro means fall with"
            " them; add such texts, or leave the label out",
            stacklevel=5,
        )


def scores(probs: Floats, right: npt.NDArray[np.intp], seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `classify` says of probabilities, ``example label``, where the right class is known: variables, coords."""
    n, k = probs.shape
    chosen, sure = probs.argmax(1), probs.max(1)
    hit = np.eye(k)[right][:, :, None] * np.eye(k)[chosen][:, None, :]
    where = np.minimum((sure * BINS).astype(int), BINS - 1)
    bins = np.eye(BINS)[where]
    own = np.clip(probs[np.arange(n), right], 1e-12, None)
    each = {
        "log_loss": -np.log(own),
        "brier": ((probs - np.eye(k)[right]) ** 2).sum(1),
        "mean_confidence": sure,
    }

    def measure(weights: Floats) -> tuple[dict[str, Floats], dict[str, Floats]]:
        """Every metric of weighted examples, ``resample example``: of all, and of each label."""
        counts = np.einsum("re,egc->rgc", weights, hit)
        support, predicted, diagonal = counts.sum(2), counts.sum(1), np.einsum("rcc->rc", counts)
        precision, recall = _ratio(diagonal, predicted), _ratio(diagonal, support)
        f1 = _ratio(2 * precision * recall, precision + recall)
        one = {"accuracy": diagonal.sum(1) / n}
        for name, value in (("precision", precision), ("recall", recall), ("f1", f1)):
            one |= {f"macro_{name}": value.mean(1), f"weighted_{name}": (value * support).sum(1) / n}
        one |= {name: weights @ value / n for name, value in each.items()}
        gap = weights @ (bins * (sure - (right == chosen))[:, None])
        one["calibration_error"] = np.abs(gap).sum(1) / n
        one["majority_accuracy"] = support.max(1) / n
        return one, {"precision": precision, "recall": recall, "f1": f1}

    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), RESAMPLES).astype(float)
    (whole, by_label), (wholes, by_labels) = measure(np.ones((1, n))), measure(drawn)
    out: dict[str, Any] = {"value": ("metric", [float(value[0]) for value in whole.values()])}
    for side, share in (("ci_low", 0.025), ("ci_high", 0.975)):
        out[side] = "metric", [float(np.quantile(value, share)) for value in wholes.values()]
        out |= {f"{name}_{side}": ("label", np.quantile(value, share, axis=0)) for name, value in by_labels.items()}
    out |= {name: ("label", value[0]) for name, value in by_label.items()}
    out["support"] = "label", np.bincount(right, minlength=k)
    out["confusion"] = ("gold_label", "label"), hit.sum(0).astype(int)
    filled = bins.sum(0)
    out["bin_count"] = "bin", filled.astype(int)
    with np.errstate(invalid="ignore"):
        out["bin_confidence"] = "bin", (bins * sure[:, None]).sum(0) / filled
        out["bin_accuracy"] = "bin", (bins * (right == chosen)[:, None]).sum(0) / filled
    edges = [f"{i / BINS:.1f} to {(i + 1) / BINS:.1f}" for i in range(BINS)]
    return out, {"metric": list(whole), "bin": edges}


def _ratio(above: Floats, below: Floats) -> Floats:
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)
