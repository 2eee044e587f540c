"""Zero-shot against fine-tuned: numbers of the same texts, and every file of the study."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

import mechinterp as mi
from mechinterp.errors import ExamplesError, ModelError, OutputError
from mechinterp.studies.finetuned import FinetunedComparison, compare_finetuned
from mechinterp.studies.finetuned_report import badge_files, findings, write_comparison
from mechinterp.studies.finetuning import finetune
from mechinterp.studies.training import Training
from mechinterp.testing import tiny

MARY = ["the man gave a book to Mary", "a man and Mary", "Mary gave the book", "the book to Mary", "Mary and a man"]
TEXTS = [*MARY, *(text.replace("Mary", "John") for text in MARY)]
GOLD = ["m"] * 5 + ["j"] * 5
WORDS = {"m": "Mary", "j": "John"}
TEMPLATE = "{text} and"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[mi.Model, Path]:
    out = tmp_path_factory.mktemp("lora") / "adapter"
    how = Training(rank=4, learning_rate=0.02, epochs=12, batch_size=5)
    return finetune(tiny(), TEXTS, WORDS, TEMPLATE, gold=GOLD, out=out, training=how), out


@pytest.fixture(scope="module")
def found(trained: tuple[mi.Model, Path]) -> FinetunedComparison:
    return compare_finetuned(trained[0], TEXTS, WORDS, TEMPLATE, gold=GOLD, explain=6, evaluations=40)


def test_without_its_adapter_it_is_the_base(trained: tuple[mi.Model, Path], found: FinetunedComparison) -> None:
    model = trained[0]
    base, tuned = (found.scores[name].data for name in ("zero_shot", "fine_tuned"))
    np.testing.assert_allclose(
        base["log_prob"], mi.classify(tiny(), TEXTS, WORDS, TEMPLATE).data["log_prob"], atol=1e-5
    )
    np.testing.assert_allclose(
        tuned["log_prob"], mi.classify(model, TEXTS, WORDS, TEMPLATE).data["log_prob"], atol=1e-5
    )
    assert float(tuned["value"].sel(metric="accuracy")) == 1
    before, after = (np.asarray(data["prediction"].values == data["gold"].values) for data in (base, tuned))
    change = found.changes["accuracy"]
    assert change["mean"] == pytest.approx(after.mean() - before.mean())
    assert change["corrected"] == (after & ~before).sum() and change["spoiled"] == 0
    assert change["p"] == pytest.approx(
        stats.binomtest(int((after & ~before).sum()), int((after != before).sum())).pvalue
    )


def test_what_is_explained_is_the_log_odds_of_the_last_label(
    trained: tuple[mi.Model, Path], found: FinetunedComparison
) -> None:
    for name, result in found.explanations.items():
        logs = found.scores[name].data["log_prob"].transpose("example", "label").values[:6]
        np.testing.assert_allclose(result.data["score"], logs[:, 1] - logs[:, 0], atol=1e-4)
        np.testing.assert_allclose(result.data["additivity_error"], 0, atol=1e-3)
        there = np.isfinite(result.data["attribution"].values[0])
        assert result.data["token"].values[0][there].tolist()[-2:] == [" to", " Mary"]  # and no token of the template
    assert found.agreement is not None
    same = found.agreement.data["agreement_each"].sel(agreement="cosine").values
    one, two = (found.explanations[n].data["word_attribution"].values[0] for n in ("fine_tuned", "zero_shot"))
    keep = np.isfinite(one)
    cosine = one[keep] @ two[keep] / np.linalg.norm(one[keep]) / np.linalg.norm(two[keep])
    assert same[0] == pytest.approx(cosine, abs=1e-6)


def test_every_file(trained: tuple[mi.Model, Path], found: FinetunedComparison, tmp_path: Path) -> None:
    page = write_comparison(found, trained[0], tmp_path / "out", adapter=trained[1])
    folder = page.parent
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    for side in ("zero_shot", "fine_tuned"):
        assert {f"{side}_metrics.json", f"{side}_shap.json", f"{side}_shap_summary.png"} <= names
    assert {"metrics_comparison.png", "interpretability_metrics.json", "predictions.jsonl"} <= names
    assert {"lora_adapter/adapter_config.json", "lora_adapter/adapter_model.safetensors"} <= names
    assert {"project_badge.svg", "project_badge.json", "report.html", "manifest.json"} <= names
    metrics = json.loads((folder / "fine_tuned_metrics.json").read_text())
    assert metrics["metrics"]["accuracy"]["value"] == 1 and metrics["per_class"]["m"]["support"] == 5
    assert np.trace(metrics["confusion"]["counts"]) == 10
    explained = json.loads((folder / "zero_shot_shap.json").read_text())
    for row in explained["examples"]:
        total = sum(row["values"]) + row["additivity_error"]
        assert total == pytest.approx(row["score"] - row["baseline_score"], abs=1e-4)
        assert len(row["tokens"]) == len(row["values"]) == len(row["text"].split())
    assert explained["words"][0]["mean_size"] >= explained["words"][-1]["mean_size"]
    statistics = json.loads((folder / "interpretability_metrics.json").read_text())
    assert set(statistics["measures"]) == {"mean_attribution", "mean_size", "gini", "entropy"}
    assert {"cosine", "spearman", "top_5", "top_10"} == set(statistics["agreement"])
    assert "fine_tuned" in statistics["measures"]["gini"] and "d_ci_low" in statistics["measures"]["gini"]
    html = page.read_text()
    assert "background-color:rgb(" in html and "McNemar" in html
    again = write_comparison(found, trained[0], tmp_path / "out", badge=None)  # an earlier one is replaced
    assert not (again.parent / "project_badge.svg").exists() and not (again.parent / "lora_adapter").exists()


def test_without_explanations(trained: tuple[mi.Model, Path], tmp_path: Path) -> None:
    found = compare_finetuned(trained[0], TEXTS, WORDS, TEMPLATE, gold=GOLD, explain=0)
    page = write_comparison(found, trained[0], tmp_path / "out")
    assert found.agreement is None and len(findings(found)) == 3
    assert not list(page.parent.glob("*shap*"))


def test_three_labels_explain_the_right_one(trained: tuple[mi.Model, Path]) -> None:
    words: Any = {**WORDS, "b": "book"}
    gold = [*GOLD[:-1], "b"]
    found = compare_finetuned(trained[0], TEXTS, words, TEMPLATE, gold=gold, explain=2, evaluations=20)
    probs = np.exp(found.scores["fine_tuned"].data["log_prob"].transpose("example", "label").values[:2])
    expected = np.log(probs[:, 0] / probs[:, 1:].sum(1))
    np.testing.assert_allclose(found.explanations["fine_tuned"].data["score"], expected, atol=1e-4)


def test_bad_input(trained: tuple[mi.Model, Path]) -> None:
    with pytest.raises(ModelError, match="has no adapter to switch off"):
        compare_finetuned(tiny(), TEXTS, WORDS, TEMPLATE, gold=GOLD)
    with pytest.raises(ModelError, match="is a classifier"):
        compare_finetuned(tiny(num_labels=2), TEXTS, WORDS, TEMPLATE, gold=GOLD)
    with pytest.raises(ExamplesError, match="explain must be from 0 to 10"):
        compare_finetuned(trained[0], TEXTS, WORDS, TEMPLATE, gold=GOLD, explain=11)


def test_a_badge_may_only_draw(tmp_path: Path) -> None:
    own = badge_files("")
    assert own["project_badge.svg"] and json.loads(own["project_badge.json"])["source"] == "mechinterp"
    head = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
    good = tmp_path / "mine.svg"
    good.write_text(f"{head}<title>My study</title><rect/></svg>")
    about = json.loads(badge_files(good)["project_badge.json"])
    assert about["title"] == "My study" and about["source"] == "mine.svg"
    for bad, said in (
        (f"{head}<script>1</script></svg>", "<script>"),
        (f'{head}<rect onload="x()"/></svg>', "attribute onload"),
        (f'{head}<a xlink:href="javascript:x()"/></svg>', "attribute href"),
        ("<!DOCTYPE svg []><svg/>", "document type"),
        ("<html></html>", "is <html>, not <svg>"),
        ("nothing", "is no SVG"),
    ):
        good.write_text(bad)
        with pytest.raises(OutputError, match=said):
            badge_files(good)
    with pytest.raises(OutputError, match="cannot read the badge"):
        badge_files(tmp_path / "none.svg")
