"""One prediction explained: which words speak for it, what erasing them does, and where in the model it is made."""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from mechinterp.analyzers.direct import DirectLogitAttribution
from mechinterp.analyzers.lens import LogitLens
from mechinterp.analyzers.perturbing import PACKAGES
from mechinterp.analyzers.token_attribution import Method, TokenAttribution
from mechinterp.core.analyzer import Analyzer
from mechinterp.core.display import visible
from mechinterp.core.examples import Examples
from mechinterp.core.metrics import log_odds
from mechinterp.core.result import Result
from mechinterp.engine.runner import run
from mechinterp.errors import ConfigurationError
from mechinterp.model.model import Model
from mechinterp.studies.agreement import attribution_agreement
from mechinterp.studies.classification import Labelling, classify
from mechinterp.studies.erasing import erase_tokens

Depth: TypeAlias = Literal["brief", "standard", "detailed"]
NAMED = 3
"""Words and components that a sentence names."""
COARSE = 0.2
"""The completeness error allowed to integrated gradients that are only compared with."""
OTHERS: tuple[Method, ...] = ("grad-x-input", "integrated-gradients", "partition-shap", "kernel-shap")
"""Methods that a detailed explanation compares, where their packages are installed."""


@dataclass(frozen=True, eq=False)
class Explanation:
    """What `explain_prediction` found.

    Attributes:
        label: the prediction.
        sentences: what is to be said of it.
        results: the numbers behind them: of `classify`, of each attribution, and what more the depth asked for.
    """

    label: str
    sentences: tuple[str, ...]
    results: tuple[Result, ...]

    def __str__(self) -> str:
        return "\n".join(self.sentences)


def explain_prediction(
    model: Model,
    text: str,
    labels: Sequence[str] | Mapping[str, str] | None = None,
    template: str = "{text}",
    *,
    depth: Depth = "standard",
    method: Method | None = None,
    answer: str = " {label}",
    chat: bool = False,
    system: str | None = None,
    evaluations: int = 200,
    seed: int = 0,
) -> Explanation:
    """Explain the label that a model gives a text: the log-odds of that label against all others.

    - ``"brief"``: the prediction, and the words that speak most for and against it.
    - ``"standard"``: also what is left of the log-odds without the first words, beside random ones, and whether the
      attributions add up.
    - ``"detailed"``: also whether other methods name the same words; and of a language model at which layer the
      prediction can first be read off, and which heads and MLPs write it.

    Args:
        labels, template, answer, chat, system: as for `classify`.
        method: of `TokenAttribution`; partition-shap by default where shap is installed, else integrated-gradients.
        evaluations: masked inputs for the methods that take them.
    Raises:
        ConfigurationError: an unknown depth.
        ExamplesError: as for `classify`; two labels begin with the same token.
    """
    if depth not in get_args(Depth):
        raise ConfigurationError(f"The depth must be one of {', '.join(get_args(Depth))}. Got {depth!r}")
    method = method or ("partition-shap" if _there("partition-shap") else "integrated-gradients")
    options: dict[str, Any] = {"answer": answer, "chat": chat, "system": system}
    scored = classify(model, [text], labels, template, **options)
    labelling = Labelling.of(model, labels, template, **options)
    label = str(scored.data["prediction"].values[0])
    examples = labelling.against_others(model, Examples.of([text]), [label])
    methods: list[Method] = [method]
    if depth == "detailed":
        methods.extend(other for other in OTHERS if other != method and _there(other))
    analyzers: list[Analyzer] = [
        TokenAttribution(
            each, log_odds(), "text", tolerance=0.01 if each == method else COARSE, evaluations=evaluations, seed=seed
        )
        for each in methods
    ]
    inside = depth == "detailed" and model.dims.n_labels is None
    if inside:
        analyzers += [LogitLens(), DirectLogitAttribution()]
    results = run(model, examples, analyzers, seed=seed)
    attributed = dict(zip(methods, results, strict=False))
    said = [_predicted(scored, label), _words(attributed[method], label, method)]
    if depth != "brief":
        said.append(_adds_up(attributed[method]))
        if np.isfinite(attributed[method].data["attribution"].values).sum() > 1:
            erased = erase_tokens(model, examples, {method: attributed[method]}, log_odds(), seed=seed)
            said.append(_erased(erased, attributed[method], method))
            results.append(erased)
    if len(attributed) > 1:
        agreement = attribution_agreement({str(name): result for name, result in attributed.items()}, seed=seed)
        results.append(agreement)
        said.append(_agreement(agreement, method))
    if inside:
        said += [_read_off(results[len(methods)]), _written(results[len(methods) + 1])]
    return Explanation(label, tuple(s for s in said if s), (scored, *results))


def _there(method: Method) -> bool:
    return method not in PACKAGES or importlib.util.find_spec(PACKAGES[method]) is not None


def _predicted(scored: Result, label: str) -> str:
    data: Any = scored.data
    rest = sorted(
        (
            (str(other), float(data["probability"].sel(label=other)[0]))
            for other in data["label"].values
            if other != label
        ),
        key=lambda pair: -pair[1],
    )
    others = ", ".join(f"{name} {prob:.3f}" for name, prob in rest[:NAMED])
    return f"Predicted {label} with probability {float(data['confidence'].values[0]):.3f} ({others})."


def word_values(result: Result) -> list[tuple[str, float]]:
    """(word, attribution) of the one example of a `TokenAttribution`."""
    words, values = (result.data[n].isel(example=0).values for n in ("word", "word_attribution"))
    return [(str(w), float(v)) for w, v in zip(words, values, strict=True) if np.isfinite(v)]


def _words(result: Result, label: str, method: str) -> str:
    pairs = sorted(word_values(result), key=lambda pair: -pair[1])
    signed = method != "saliency"
    first = [pair for pair in pairs if pair[1] > 0][:NAMED]
    last = [pair for pair in reversed(pairs) if pair[1] < 0][:NAMED]

    def named(some: Sequence[tuple[str, float]]) -> str:
        return ", ".join(f"{visible(word)} ({value:+.2f})" for word, value in some) or "no word"

    if not signed:
        return f"Words to which it is most sensitive: {named(first)}, by {method}."
    return f"For {label} speak {named(first)}; against it {named(last)} (log-odds in nats, by {method})."


def _adds_up(result: Result) -> str:
    data = result.data
    name = next((n for n in ("completeness_error", "additivity_error") if n in data), None)
    ends = f"from {float(data['baseline_score'][0]):.2f} with the text masked to {float(data['score'][0]):.2f}"
    if name is None:
        return f"The log-odds go {ends}; this method does not divide the difference."
    return f"The words divide the change of log-odds {ends}, up to {abs(float(data[name][0])):.2g}."


def _erased(erased: Result, attribution: Result, method: str) -> str:
    data: Any = erased.data.sel(fraction=0.2)
    score = float(attribution.data["score"][0])
    mine, random = (score - float(data["comprehensiveness"].sel({"method": name})) for name in (method, "random"))
    return (
        f"Without the fifth of the tokens that speak most for it the log-odds are {mine:.2f}, and {random:.2f} without"
        " as many random ones."
    )


def _agreement(agreement: Result, method: str) -> str:
    found: Any = agreement.data["spearman"].sel({"method": method})
    told = ", ".join(
        f"{other} {float(found.sel(other=other)):.2f}" for other in found["other"].values if other != method
    )
    return f"Rank correlation of {method} with other methods, over words: {told}."


def _read_off(lens: Result) -> str:
    margin = lens.data["logit_diff"].isel(example=0)
    above = margin.values > 0
    first = len(above) - int(np.argmin(above[::-1])) if not above.all() else 0
    layers = margin["layer"].values
    if first >= len(layers):
        return "Read by the logit lens, no layer has the label above the others."
    return f"Read by the logit lens, the label is above the others from layer {layers[first]} of {layers[-1]} on."


def _written(direct: Result) -> str:
    values = direct.data["attribution"].isel(example=0)
    order = np.argsort(-np.abs(values.values))[:NAMED]
    told = ", ".join(f"{values['component'].values[i]} ({values.values[i]:+.2f})" for i in order)
    return f"Components that write most of the logit difference: {told}."
