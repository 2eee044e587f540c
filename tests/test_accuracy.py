"""Accuracy against loops by hand, on tiny models."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

import mechinterp as mi
from mechinterp import sites
from mechinterp.core.statistics import summarize
from mechinterp.errors import ExamplesError

END = sites.logits(positions="end")
SETS = [([5, 6], [9]), ([7], [8, 3, 4]), ([2], [3]), ([10, 11, 12], [13, 14]), ([20], [21]), ([4, 9], [5])]
TEXTS = [[11, 12, 13], [14, 15, 16, 17], [3, 4], [9, 8, 7, 6, 5], [2, 2], [30]]


def by_hand(model: mi.Model, texts: list[list[int]]) -> dict[str, list[float]]:
    """Every measure of every text, from the logits of that text alone."""
    out: dict[str, list[float]] = {name: [] for name in ("accuracy", "logit_diff", "prob", "prob_diff", "rank")}
    for text, (right, wrong) in zip(texts, SETS, strict=True):
        logits = model.trace(text, END)[END][0].double()
        probs = logits.softmax(0)
        best = max(float(logits[i]) for i in right)
        out["accuracy"].append(float(best > max(float(logits[i]) for i in wrong)))
        out["logit_diff"].append(float(logits[right].mean() - logits[wrong].mean()))
        out["prob"].append(float(probs[right].sum()))
        out["prob_diff"].append(float(probs[right].sum() - probs[wrong].sum()))
        out["rank"].append(sum(float(x) > best for x in logits))
    return out


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("side", ["left", "right"])
def test_both_runs_by_hand(model: mi.Model, side: str, size: int) -> None:
    corrupted = [[i + 20 for i in text] for text in TEXTS]
    pairs = mi.Examples.pairs(TEXTS, corrupted, SETS, labels=["a", "b", "a", "a", "b", "a"])
    result = mi.run(model, pairs, mi.Accuracy(), padding_side=side, batch_size=size)
    data = result.data
    for run, texts in (("clean", TEXTS), ("corrupted", corrupted)):
        expected = by_hand(model, texts)
        for name, values in expected.items():
            np.testing.assert_allclose(data[name].sel(run=run), values, atol=1e-4)
            for group, rows in {"all examples": range(6), "a": (0, 2, 3, 5), "b": (1, 4)}.items():
                cell = data.sel(run=run, group=group, measure=name)
                some = np.array([values[row] for row in rows])
                assert float(cell["mean"]) == pytest.approx(some.mean(), abs=1e-4)
                assert int(cell["examples"]) == len(rows)
                if name == "accuracy":
                    interval = stats.binomtest(int(some.sum()), len(some)).proportion_ci(method="wilson")
                else:
                    found = summarize(some)
                    interval = SimpleNamespace(low=found.ci_low, high=found.ci_high)
                np.testing.assert_allclose([cell["ci_low"], cell["ci_high"]], [interval.low, interval.high], atol=1e-4)
    assert result.meta["analyzer"] == "Accuracy"
    assert result.meta["passes"]["forward"] == 2 * -(-6 // size)


def test_texts_without_pairs_take_one_pass(model: mi.Model) -> None:
    texts = mi.Examples.of(TEXTS, answers=SETS)
    both = mi.run(model, texts, [mi.Accuracy(), mi.LogitLens()])
    assert both[0].meta["passes"]["forward"] == 1
    assert list(both[0].data["run"].values) == ["clean"]
    last = both[1].data.sel(layer=2)
    np.testing.assert_allclose(both[0].data["logit_diff"][0], last["logit_diff"], atol=1e-4)
    assert both[0].data["rank"][0].values.tolist() == last["rank"].values.tolist()


def test_without_wrong_answers_the_right_one_must_be_on_top(model: mi.Model) -> None:
    logits = model.trace(TEXTS, END)[END]
    answers = [[int(row.argmax()), 5] if i % 2 else int(row.argmin()) for i, row in enumerate(logits)]
    data = mi.run(model, mi.Examples.of(TEXTS, answers=answers), mi.Accuracy()).data
    assert data["accuracy"][0].values.tolist() == [0, 1] * 3
    assert list(data["measure"].values) == ["accuracy", "prob", "rank"]
    assert data["rank"][0].values.tolist() == [model.dims.vocab - 1, 0] * 3


def test_what_a_task_shows(llama: mi.Model, tmp_path: Path) -> None:
    """Tables, figures and files of every mixture of pairs and labels."""
    agreement = mi.tasks.agreement(8)
    singles = mi.Examples.of(agreement.texts, agreement.labels, agreement.answers)
    many = {"pairs and labels": agreement, "pairs": mi.tasks.ioi(8), "labels": singles}
    kinds = {"pairs and labels": ("lines", "group"), "pairs": ("bars", "run"), "labels": ("bars", "group")}
    for name, examples in many.items():
        result = mi.run(llama, examples, mi.Accuracy())
        assert [(view.kind, view.x) for view in result.views] == [kinds[name]] * 2
        assert result.figure(0).data and result.figure(1).data
        assert mi.Result.load(result.save(tmp_path / name)).data.identical(result.data)
        assert {"run", "group", "measure", "unit", "mean", "ci_low", "ci_high", "examples"} == set(result.table())
    table = mi.run(llama, agreement, mi.Accuracy()).table("accuracy")
    assert table["label"].tolist() == [*agreement.labels, *agreement.labels]


def test_what_cannot_be_scored(llama: mi.Model) -> None:
    with pytest.raises(ExamplesError, match=r"Accuracy: these examples have no answers; give answers=\[right"):
        mi.run(llama, [[5, 6, 7]], mi.Accuracy())
    with pytest.raises(ExamplesError, match="must be one token"):
        mi.run(llama, mi.tasks.capitals(4), mi.Accuracy("country"))
