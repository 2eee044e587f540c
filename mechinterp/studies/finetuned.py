"""What fine-tuning changed: a model with an adapter and without it, scored and explained on the same texts."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

from mechinterp.analyzers.token_attribution import Method, TokenAttribution
from mechinterp.core.examples import Examples
from mechinterp.core.metrics import log_odds
from mechinterp.core.result import Result
from mechinterp.core.statistics import summarize
from mechinterp.engine.runner import run
from mechinterp.errors import ExamplesError, ModelError
from mechinterp.model.model import Model
from mechinterp.studies.agreement import compare_attributions
from mechinterp.studies.classification import Labelling, classify

ZERO_SHOT, FINE_TUNED = "zero_shot", "fine_tuned"
EACH = ("accuracy", "log_loss", "confidence")


@dataclass(frozen=True, eq=False)
class FinetunedComparison:
    """What `compare_finetuned` found.

    Attributes:
        labelling: the labels and the prompt.
        texts, gold: what was classified, and what is right.
        scores: ``zero_shot`` and ``fine_tuned`` → the result of `classify`.
        changes: metric → mean change from zero-shot to fine-tuned over the texts, ``mean, ci_low, ci_high, p``. Of
            accuracy p is McNemar's exact test, of the others that of random signs.
        explanations: the same names → the result of `TokenAttribution` of the first texts; empty if not asked for.
        agreement: how the explanations differ, word by word, as `compare_attributions` says of ``first``, fine-tuned,
            and ``second``, zero-shot; None without them.
    """

    labelling: Labelling
    texts: tuple[str, ...]
    gold: tuple[str, ...]
    scores: Mapping[str, Result]
    changes: Mapping[str, Mapping[str, float]]
    explanations: Mapping[str, Result]
    agreement: Result | None


def compare_finetuned(
    model: Model,
    texts: Any,
    labels: Sequence[str] | Mapping[str, str],
    template: str = "{text}",
    *,
    gold: Sequence[Any] | None = None,
    answer: str = " {label}",
    chat: bool = False,
    system: str | None = None,
    explain: int = 10,
    method: Method = "partition-shap",
    evaluations: int = 100,
    seed: int = 0,
    told: Callable[[str], None] | None = None,
) -> FinetunedComparison:
    """Score and explain a model with its adapter and without it, on the same texts.

    One model is in memory: without is the adapter switched off. What is explained is, of two labels, the log-odds of
    the last against the first, so that a positive word speaks for the last in every text; of more, the log-odds of
    the right label against all others. A label of several tokens is explained by its first.

    Args:
        labels, template, gold, answer, chat, system: as for `classify`.
        explain: how many texts are explained, from the first on; 0 for none.
        method, evaluations: of `TokenAttribution`.
        told: called with a sentence about how the work goes.
    Raises:
        ModelError: the model has no adapter, or is a classifier.
        ExamplesError: as for `classify`; two labels that begin with the same token cannot be explained.
    """
    say = told or (lambda _: None)
    if model.dims.n_labels is not None:
        raise ModelError(f"{model.name} is a classifier, which without its adapter has no labels; give a causal model")
    with model.without_adapter():  # says where there is none
        pass
    raw = texts if isinstance(texts, Examples) else Examples.of(texts)
    labelling = Labelling.of(model, labels, template, answer, chat, system)
    right = labelling.right(raw.labels if gold is None else gold, len(raw))
    if not 0 <= explain <= len(raw):
        raise ExamplesError(f"explain must be from 0 to {len(raw)}, the number of texts. Got {explain}")
    names = tuple(labelling.names[i] for i in right)
    prompts = None
    if explain:
        chosen = (labelling.names[-1],) * explain if len(labelling.names) == 2 else names[:explain]
        prompts = labelling.against_others(model, Examples.of(list(raw.texts[:explain])), chosen)
    analyzer = TokenAttribution(method, log_odds(), "text", evaluations=evaluations, seed=seed)
    scores: dict[str, Result] = {}
    explanations: dict[str, Result] = {}
    for name in (ZERO_SHOT, FINE_TUNED):
        with model.without_adapter() if name == ZERO_SHOT else nullcontext():
            say(f"{name.replace('_', '-')}: classifying {len(raw)} texts ...")
            scores[name] = classify(
                model, raw, labels, template, gold=names, answer=answer, chat=chat, system=system, seed=seed
            )
            if prompts is not None:
                say(f"{name.replace('_', '-')}: explaining {explain} texts by {method} ...")
                explanations[name] = run(model, prompts, analyzer, seed=seed)
    agreement = None
    if explanations:
        agreement = compare_attributions(explanations[FINE_TUNED], explanations[ZERO_SHOT], seed=seed)
    texts_ = tuple(str(text) for text in raw.texts)
    return FinetunedComparison(labelling, texts_, names, scores, _changes(scores, right, seed), explanations, agreement)


def _changes(scores: Mapping[str, Result], right: npt.NDArray[np.intp], seed: int) -> dict[str, dict[str, float]]:
    """From zero-shot to fine-tuned, paired over texts."""
    rows: dict[str, list[npt.NDArray[np.floating]]] = {name: [] for name in EACH}
    for name in (ZERO_SHOT, FINE_TUNED):
        probs = scores[name].data["probability"].transpose("example", "label").values
        rows["accuracy"].append((probs.argmax(1) == right).astype(float))
        rows["log_loss"].append(-np.log(np.clip(probs[np.arange(len(right)), right], 1e-12, None)))
        rows["confidence"].append(probs.max(1))
    changes = np.stack([after - before for before, after in rows.values()], axis=1)
    said = summarize(changes, seed)
    out = {
        name: {
            "mean": float(said.mean[i]), "ci_low": float(said.ci_low[i]), "ci_high": float(said.ci_high[i]),
            "p": float(said.p[i]),
        }
        for i, name in enumerate(EACH)
    }  # fmt: skip
    won, lost = int((changes[:, 0] > 0).sum()), int((changes[:, 0] < 0).sum())
    out["accuracy"] |= {"p": float(stats.binomtest(won, won + lost).pvalue) if won + lost else 1.0}
    out["accuracy"] |= {"corrected": won, "spoiled": lost}
    return out
