"""A classifier on a language model, looked at whole: its weights, its way through texts, what it should not use."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mechinterp.analyzers.classifier_weights import ClassifierWeights
from mechinterp.analyzers.dimensions import DimensionCorrelation
from mechinterp.analyzers.direct import DirectLogitAttribution
from mechinterp.analyzers.spurious import SpuriousPatterns
from mechinterp.analyzers.trajectory import TIME, HighScoreTokens, Trajectory, number
from mechinterp.core.analyzer import Analyzer
from mechinterp.core.display import count
from mechinterp.core.examples import Examples
from mechinterp.core.result import Result
from mechinterp.engine.runner import Progress, provenance, run
from mechinterp.errors import ExamplesError, ModelError
from mechinterp.model.model import Model
from mechinterp.report.study import write_study
from mechinterp.report.trajectory import trajectory_picker
from mechinterp.studies.classification import Labelling, LabelLogProbs, scored

SHOWN = 40
"""Texts in the menu of trajectories."""


@dataclass(frozen=True, eq=False)
class ClassifierReport:
    """What `classifier_report` found.

    Attributes:
        texts: what was read.
        label: whose log-odds.
        results: ``weights``, ``trajectory``, ``high_scores``, ``high_steps``, ``spurious``, ``components``, and
            ``scores`` where what is right is known, ``dimensions`` where features are.
        about: of the model.
    """

    texts: tuple[str, ...]
    label: str
    results: Mapping[str, Result]
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def warnings(self) -> list[str]:
        """A sentence for each suspect that the classifier uses and should not."""
        data: Any = self.results["spurious"].data
        if "suspect" not in data.dims:
            return []
        out: list[str] = []
        for i in np.nonzero(data["warning"].values)[0] if data.sizes["suspect"] else ():
            one = {name: data[name].values[i].item() for name in data.data_vars if data[name].dims == ("suspect",)}
            out.append(
                f"{data['suspect'].values[i]} ({one['kind']}, {count(one['texts'], 'text')}) is {one['lift']:.1f} times"
                f" as often at {one['side']} scores as expected (q {one['lift_q']:.2g}), and adds {one['effect']:+.2f}"
                f" nats to the log-odds of {self.label} ({one['ci_low']:+.2f} to {one['ci_high']:+.2f}, q"
                f" {one['effect_q']:.2g})."
            )
        return out

    def summary(self) -> list[str]:
        """What was found, in sentences."""
        out: list[str] = []
        if "scores" in self.results:
            data: Any = self.results["scores"].data
            accuracy, low, high = (float(data[c].sel(metric="accuracy")) for c in ("value", "ci_low", "ci_high"))
            out.append(
                f"Accuracy {accuracy:.3f} ({low:.3f} to {high:.3f}), macro F1"
                f" {float(data['value'].sel(metric='macro_f1')):.3f}, on {count(len(self.texts), 'text')}."
            )
        parts: Any = self.results["components"].data
        order = np.argsort(-np.abs(parts["mean"].values))[:5]
        named = ", ".join(f"{parts['component'].values[i]} {float(parts['mean'].values[i]):+.2f}" for i in order)
        out.append(f"Most of the log-odds of {self.label} is written by {named} (nats, mean over texts).")
        if self.warnings:
            return [*out, *(f"Warning: {line}" for line in self.warnings)]
        spurious: Any = self.results["spurious"].data
        said = (
            f"No warning: of {count(spurious.sizes.get('suspect', 0), 'suspect')} none is both surely more frequent at"
            " high or low scores and used."
        )
        if used := self._used():
            said += f" Used, but not surely more frequent there, in {count(len(self.texts), 'text')}: {used}."
        return [*out, said]

    def _used(self) -> str:
        """Suspects that move the log-odds, with what they add."""
        result = self.results["spurious"]
        rows = _records(result, "effect")
        least, level = result.meta["effect"], result.meta["level"]
        known = [row for row in rows if row["effect_q"] is not None]
        moved = [row for row in known if row["effect_q"] < level and abs(row["effect"]) >= least]
        return ", ".join(f"{row['suspect']} {row['effect']:+.2f}" for row in moved)

    def write(
        self, folder: str | Path, *, title: str = "Classifier report", manifest: Mapping[str, Any] | None = None
    ) -> Path:
        """The whole as one page with its tables, figures and results; an earlier one there is replaced.

        ``manifest.json`` has the suspects, the words of high and low scores and the tokens there as records.

        Raises:
            OutputError: the folder holds something else, or cannot be written.
        """
        shown = self.results["trajectory"]
        few = Result(shown.data.isel(example=slice(SHOWN)), shown.meta, ())
        about = {**self.about, "texts": len(self.texts), "label": self.label, **suspected(self.results["spurious"])}
        about |= {name: _records(self.results[name], "value") for name in ("high_scores", "high_steps")}
        about |= manifest or {}
        about["created"] = datetime.now(UTC).isoformat(timespec="seconds")
        return write_study(
            folder, title, list(self.results.values()), plan="", manifest=about, summary=self.summary(),
            drawings={"Trajectories": trajectory_picker(few)},
        )  # fmt: skip


def classifier_report(
    model: Model,
    texts: Any,
    gold: Sequence[Any] | None = None,
    *,
    label: str | None = None,
    spurious: SpuriousPatterns | None = None,
    features: Mapping[str, Sequence[float | int]] | None = None,
    times: str = TIME,
    batch_size: int | None = None,
    seed: int = 0,
    progress: Progress | bool = False,
) -> ClassifierReport:
    """Everything about a classifier, from one shared pass over the texts and one sweep.

        mi.classifier_report(classifier, texts, gold).write("report")

    Args:
        texts: strings, or `Examples` whose labels are what is right.
        gold: the right label of each text.
        label: whose log-odds; the last label by default.
        spurious: how suspects are looked for and tested.
        features: name → a known number for each text, which the head's largest dimensions are correlated with.
        times: time stamps, as for `Trajectory`.
        batch_size, seed, progress: as for `run`.
    Raises:
        NeedsError: no classifier, or no such label. ExamplesError: texts and `gold`, or features, do not match, or a
            right label is none of the classifier's.
    """
    raw = texts if isinstance(texts, Examples) else Examples.of(texts)
    truth = raw.labels if gold is None else tuple(gold)
    one = number(model, label)
    labelling = Labelling.of(model, None, "{text}")
    right = None if truth is None else labelling.right(truth, len(raw))
    names = model.to_str_outputs(range(model.dims.n_outputs))
    others = [name for i, name in enumerate(names) if i != one]
    answered = Examples.of(raw.texts, answers=[(names[one], others)] * len(raw))
    asked: dict[str, Analyzer] = {
        "weights": ClassifierWeights(label),
        "trajectory": Trajectory(label, times),
        "high_scores": HighScoreTokens(label),
        "high_steps": HighScoreTokens(label, "step"),
        "spurious": SpuriousPatterns(label, seed=seed) if spurious is None else spurious,
        "components": DirectLogitAttribution(),
        "scores": LabelLogProbs(),
    }
    if features is not None:
        for name, values in features.items():
            if len(values) != len(raw):
                raise ExamplesError(f"the feature {name!r} has {len(values)} numbers for {len(raw)} texts; correct it")
        asked["dimensions"] = DimensionCorrelation({name: tuple(map(float, v)) for name, v in features.items()})
    found = run(model, answered, list(asked.values()), batch_size=batch_size, seed=seed, progress=progress)
    results = dict(zip(asked, found, strict=True))
    log_probs = results.pop("scores").data["log_prob"].transpose("example", "label").values
    if right is not None:
        results["scores"] = scored(model, labelling, log_probs, right, seed)
    told = tuple(text if isinstance(text, str) else repr(text) for text in raw.texts)
    return ClassifierReport(told, names[one], results, provenance(model))


def suspected(spurious: Result) -> dict[str, list[dict[str, Any]]]:
    """What `SpuriousPatterns` found, for JSON: ``suspects``, and ``words`` by lift on either side."""
    return {"suspects": _records(spurious, "effect"), "words": _records(spurious, "word_lift")}


def _records(result: Result, column: str) -> list[dict[str, Any]]:
    """The table with this column, one mapping a row; none where nothing was found."""
    return json.loads(str(result.table(column).to_json(orient="records"))) if column in result.data else []


def shorten(model: Model, texts: Sequence[str], keep: Literal["start", "end"] = "end") -> tuple[list[str], int]:
    """Texts over the model's context cut to it, and how many were. What is kept is text again, of no more tokens.

    Args:
        keep: which side of a text stays.
    Raises:
        ModelError: the model has no tokenizer.
    """
    if model.tokenizer is None:
        raise ModelError(f"{model.name} has no tokenizer to cut texts with; cut them before")
    out: list[str] = []
    cut = 0
    for text in texts:
        ids = list(model.tokenizer(text)["input_ids"])
        n = model.dims.context
        cut += len(ids) > n
        short = text
        while len(ids) > model.dims.context:  # what is decoded may come to more tokens than it was
            short = model.tokenizer.decode(ids[:n] if keep == "start" else ids[-n:], skip_special_tokens=True)
            n, ids = n - 1, list(model.tokenizer(short)["input_ids"])
        out.append(short)
    return out, cut
