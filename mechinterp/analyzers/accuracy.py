"""Accuracy: how well the loaded model does a task, before anyone asks how."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import xarray as xr
from scipy import stats

from mechinterp import sites
from mechinterp.core.analyzer import Analyzer, Batch, Context, Model, Needs
from mechinterp.core.result import Part, Result, View
from mechinterp.core.statistics import Array, summarize
from mechinterp.core.trace import Read, Run
from mechinterp.errors import ExamplesError, NeedsError
from mechinterp.sites import Position

UNITS = {
    "accuracy": "share of examples",
    "logit_diff": "logits",
    "prob": "probability",
    "prob_diff": "probability",
    "rank": "tokens above",
}
TITLES = {"logit_diff": "Right answers against wrong ones", "prob": "Probability of the right answers"}


@dataclass(frozen=True)
class Accuracy(Analyzer):
    """Whether the right answer wins, and by how much, on the clean run and, of pairs, on the corrupted one.

    An example is done right when its best right answer has a higher logit than its best wrong one;
    without wrong answers, when it is the top token. The corrupted run is scored with the same answers,
    so that the corruption works where it scores low; it takes a second round.

    Result: ``mean`` with ``ci_low``, ``ci_high`` over ``run group measure``, and ``examples`` in each
    group; groups are ``"all examples"`` and, where examples have different labels, each label. Measures, which are
    also variables by example (``run example``): ``accuracy``; ``logit_diff``, the mean logit of the right
    answers minus that of the wrong ones; ``prob``, the total probability of the right answers;
    ``prob_diff``, that minus the wrong ones' (Hanna et al. 2023); ``rank`` of the best right answer
    (0 is the top). The interval of ``accuracy`` is Wilson's (1927), those of the others are bootstrapped.

    Attributes:
        positions: the one position whose prediction is scored.
    Raises:
        ExamplesError: the examples have no answers.
    """

    positions: Position = "end"

    def needs(self, model: Model) -> Needs:
        return Needs(reads=sites.logits(positions=self.positions))

    def observe(self, batch: Batch) -> Part:
        return _scores(batch, "clean")

    def combine(self, parts: Iterator[Part], context: Context) -> "Result | Analyzer":
        clean = Result.of(parts).data
        if context.tokens.corrupted is not None:
            return OfCorrupted(self.positions, clean)
        return _report({"clean": clean}, context)


@dataclass(frozen=True, eq=False)
class OfCorrupted(Analyzer):
    """The second round of `Accuracy`: the same of the corrupted run, beside what was found on the clean one."""

    positions: Position
    clean: xr.Dataset

    def needs(self, model: Model) -> Needs:
        return Needs(reads=Read(sites.logits(positions=self.positions), of="corrupted"))

    def observe(self, batch: Batch) -> Part:
        return _scores(batch, "corrupted")

    def combine(self, parts: Iterator[Part], context: Context) -> Result:
        return _report({"clean": self.clean, "corrupted": Result.of(parts).data}, context)


def _scores(batch: Batch, run: Run) -> Part:
    """Every measure of every example of a batch."""
    examples = batch.examples
    logits = (batch.clean if run == "clean" else batch.corrupted)[sites.logits()].float()  # example vocab
    if logits.ndim != 2:
        raise ExamplesError(f"the position of Accuracy must be one token. Got logits of shape {tuple(logits.shape)}")
    right = logits.gather(1, examples.side(0))
    best, probs = right.amax(1), logits.softmax(-1)
    rank = (logits > best[:, None]).sum(1)
    values = {"prob": (probs.gather(1, examples.side(0)) * (examples.weights(0) > 0)).sum(1), "rank": rank.float()}
    if examples.two_sided:
        wrong = logits.gather(1, examples.side(1))
        ids, weights = examples.contrast()
        values["accuracy"] = (best > wrong.amax(1)).float()
        values["logit_diff"] = (logits.gather(1, ids) * weights).sum(1)
        against = (probs.gather(1, examples.side(1)) * (examples.weights(1) > 0)).sum(1)
        values["prob_diff"] = values["prob"] - against
    else:
        values["accuracy"] = (rank == 0).float()
    return Part({name: (values[name], "example") for name in UNITS if name in values})


def _report(runs: Mapping[str, xr.Dataset], context: Context) -> Result:
    """Means and intervals by run, group and measure, beside the numbers that they are of."""
    each = xr.concat(runs.values(), "run").assign_coords(run=list(runs))
    measures = [str(name) for name in each.data_vars]
    groups = {"all examples": np.ones(each.sizes["example"], bool)}
    if context.tokens.labels is not None:
        labels = np.array([str(label) for label in context.tokens.labels])
        if "all examples" in labels or len(set(labels)) < len(set(context.tokens.labels)):
            raise NeedsError(
                "labels of Accuracy must differ as text, and none may be 'all examples', which names the whole set;"
                " rename them"
            )
        each = each.assign_coords(label=("example", labels))
        if len(set(labels)) > 1:
            groups |= {str(label): labels == label for label in dict.fromkeys(labels)}
    values = each.to_dataarray("measure").transpose("example", "run", "measure").values
    found = [_summary(values[rows], measures, context.seed) for rows in groups.values()]
    dims = ("group", "run", "measure")
    summary = {
        name: (dims, np.stack([one[i] for one in found])) for i, name in enumerate(("mean", "ci_low", "ci_high"))
    }
    counts = np.array([rows.sum() for rows in groups.values()])[:, None, None]
    summary["examples"] = (dims, np.broadcast_to(counts, summary["mean"][1].shape).copy())
    data = xr.Dataset(
        summary,
        {"group": list(groups), "measure": measures, "unit": ("measure", [UNITS[name] for name in measures])},
    )
    return Result(xr.merge([data, each]), {}, _views(list(groups)[1:], len(runs) > 1, measures))


def _summary(values: Array, measures: list[str], seed: int) -> tuple[Array, Array, Array]:
    """Mean, ci_low and ci_high of ``example run measure``."""
    found = summarize(values, seed)
    low, high = found.ci_low, found.ci_high
    at = measures.index("accuracy")
    for run, right in enumerate(values[:, :, at].sum(0)):
        interval = stats.binomtest(int(right), len(values)).proportion_ci(method="wilson")
        low[run, at], high[run, at] = interval.low, interval.high
    return found.mean, low, high


def _views(labels: list[str], paired: bool, measures: list[str]) -> tuple[View, ...]:
    out: list[View] = []
    strength = "logit_diff" if "logit_diff" in measures else "prob"
    for name, title in (("accuracy", "Accuracy"), (strength, TITLES[strength])):
        by = "label" if labels else "run" if paired else ""
        only = {"measure": name} | ({"group": tuple(labels)} if labels else {})
        kind, x = ("lines", "group") if labels and paired else ("bars", "run" if paired else "group")
        out.append(
            View(
                kind,
                "mean",
                x,
                by="run" if labels and paired else None,
                title=f"{title} by {by}" if by else title,
                unit=UNITS[name],
                select=only,
            )
        )
    return tuple(out)
