"""Spurious patterns: the words, the statistics and the test by hand, and a code that was planted in training."""

from pathlib import Path

import numpy as np
import pytest
import torch

import mechinterp as mi
from mechinterp.analyzers.spurious import KINDS, plain, words_of
from mechinterp.errors import NeedsError
from mechinterp.studies import Training
from mechinterp.tasks.histories import PLANTED, RISKS, WORDS
from mechinterp.testing import check_analyzer, tiny


def texts(n: int = 12, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    words = ["Mary", "John", "went", "to", "the", "store", "A-17", "B-23", "45"]
    return [" ".join(rng.choice(words, 12).tolist() + [f"2020-01-{10 + i}"]) + "\nAll is well.\n" for i in range(n)]


def classifier(family: str = "llama") -> mi.Model:
    return tiny(family, num_labels=2, words=["All is well"])


def final(model: mi.Model, ids: list[int]) -> float:
    with torch.no_grad():
        logits = model.hf(torch.tensor([ids])).logits[0]
    return float(logits[1] - logits[0])


def test_words_are_what_white_space_separates() -> None:
    tokens = ["  Ma", "ry,", " went", "\n", "home", " ", "(A", "-1", ")\n", "x"]
    assert list(words_of(tokens)) == [
        ("Mary,", (0, 1)),
        ("went", (2,)),
        ("home", (4,)),
        ("(A-1)", (6, 7, 8)),
        ("x", (9,)),
    ]
    assert [plain(word) for word, _ in words_of(tokens)] == ["mary", "went", "home", "a-1", "x"]


@pytest.mark.parametrize(
    ("word", "kind"),
    [
        ("2020-01-05", "date"), ("5/11/1999", "date"), ("08:30", "time"), ("45", "number"), ("3.5%", "number"),
        ("-1,000", "number"), ("a-17", "identifier"), ("#12b", "identifier"), ("me@x.org", "address"),
        ("https://x.org/a", "address"), ("<br>", "markup"), ("----", "markup"), ("sepsis", ""), ("well-being", ""),
    ],
)  # fmt: skip
def test_kinds(word: str, kind: str) -> None:
    import re

    found = [name for name, pattern in KINDS.items() if re.fullmatch(pattern, word, re.IGNORECASE)]
    assert (found[-1] if found else "") == kind


@pytest.mark.parametrize("by", ["text", "level", "step"])
def test_everything_by_hand(by: str) -> None:
    model, some = classifier(), texts()
    data = mi.run(model, mi.Examples.of(some), mi.SpuriousPatterns(by=by, quantile=0.8, test="remove")).data  # type: ignore[arg-type]
    ids = [list(row) for row in model.tokenize(some).ids]
    words = [[(plain(w), at) for w, at in words_of(model.to_str_tokens(row)) if plain(w)] for row in ids]
    scores = []
    for row, at in zip(ids, words, strict=True):
        level = [final(model, row[: n + 1]) for n in range(len(row))]
        steps = [level[w[-1]] - (level[w[0] - 1] if w[0] else 0.0) for _, w in at]
        own = {"text": [level[-1]] * len(at), "level": [level[w[-1]] for _, w in at], "step": steps}
        scores.append(own[by])
    flat = np.array([s for row in scores for s in row])
    top, bottom = np.quantile(flat, 0.8), np.quantile(flat, 0.2)
    for i, name in enumerate(data["suspect"].values):
        if name not in {"a-17", "b-23", "45"}:
            continue
        one = data.isel(suspect=i)
        have = [t for t, row in enumerate(words) if any(w == name for w, _ in row)]
        assert int(one["texts"]) == len(have)
        assert int(one["occurrences"]) == sum(w == name for row in words for w, _ in row)
        lifts = {}
        for side, marks in (("high", lambda s: s > top), ("low", lambda s: s < bottom)):
            shares = [
                np.mean([marks(s) for (w, _), s in zip(words[t], scores[t], strict=True) if w == name]) for t in have
            ]
            lifts[side] = np.mean(shares) / np.mean(marks(flat))
        assert str(one["side"].item()) == max(lifts, key=lambda side: lifts[side])
        assert float(one["lift"]) == pytest.approx(max(lifts.values()), rel=1e-6)
        changes = []
        for t in have:
            gone = {k for w, at in words[t] if w == name for k in at}
            changes.append(final(model, ids[t]) - final(model, [x for k, x in enumerate(ids[t]) if k not in gone]))
        assert float(one["effect"]) == pytest.approx(np.mean(changes), abs=1e-4)
        assert float(one["ci_low"]) <= float(one["effect"]) <= float(one["ci_high"])


def test_rare_words_of_a_kind_are_tested_together_and_lines_as_they_are() -> None:
    model, some = classifier(), texts()
    data = mi.run(model, mi.Examples.of(some), mi.SpuriousPatterns(patterns={"people": "mary|john"})).data
    kinds = dict(zip(data["suspect"].values.tolist(), data["kind"].values.tolist(), strict=True))
    assert kinds["every date"] == "date" and kinds["All is well."] == "boilerplate"
    assert kinds["mary"] == kinds["john"] == "people" and "2020-01-10" not in kinds
    i = data["suspect"].values.tolist().index("All is well.")
    assert int(data["texts"][i]) == len(some)


@pytest.mark.parametrize("test", ["blank", "swap"])
def test_other_tests_keep_the_length(test: str) -> None:
    model, some = classifier(), texts()
    data = mi.run(model, mi.Examples.of(some), mi.SpuriousPatterns(test=test)).data  # type: ignore[arg-type]
    i = data["suspect"].values.tolist().index("a-17")
    assert np.isfinite(float(data["effect"][i]))
    if test == "blank":
        ids = [list(row) for row in model.tokenize(some).ids]
        changes = []
        for row in ids:
            gone = [k for w, at in words_of(model.to_str_tokens(row)) if plain(w) == "a-17" for k in at]
            if gone:
                own = model.hf.get_input_embeddings()(torch.tensor([row])).detach().clone()
                own[0, gone] = model.baseline("mean")
                with torch.no_grad():
                    logits = model.hf(inputs_embeds=own).logits[0]
                changes.append(final(model, row) - float(logits[1] - logits[0]))
        assert float(data["effect"][i]) == pytest.approx(np.mean(changes), abs=1e-4)


def test_it_keeps_the_contract() -> None:
    ties = ("lift_p", "lift_q", "effect_p", "effect_q", "word_q", "word")
    examples = mi.Examples.of(texts(8), answers=[("LABEL_1", "LABEL_0")] * 8)
    check_analyzer(mi.SpuriousPatterns(least=4), examples, models=[classifier("qwen3")], ties=ties)


def test_few_texts_have_no_warning_and_say_so() -> None:
    with pytest.warns(UserWarning, match="in enough texts"):
        result = mi.run(classifier(), mi.Examples.of(["Mary went", "John went"]), mi.SpuriousPatterns())
    assert result.meta["warnings"] == 0
    assert len(result.table()) == 0 or "word" in result.data.dims


def test_bad_input() -> None:
    for options, said in (
        ({"kinds": ("dates",)}, "no built-in kind 'dates'"),
        ({"patterns": {"x": "("}}, "'x' is no regular expression"),
        ({"quantile": 0.2}, "quantile from 0.5"),
        ({"least": 0}, "above 0"),
    ):
        with pytest.raises(NeedsError, match=said):
            mi.SpuriousPatterns(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("plant", [True, False])
def test_a_planted_code_is_named_and_nothing_else(plant: bool, tmp_path: Path) -> None:
    """Trained and read where the code goes with the label; and where it does not."""
    model = tiny("llama", words=WORDS, max_position_embeddings=1024)
    seen = mi.tasks.patient_histories(160, seed=0, plant=plant, lines=(3, 5))
    how = Training(rank=8, learning_rate=5e-3, epochs=6, batch_size=8)
    made = mi.train_classifier(
        model, list(seen.texts), seen.labels, out=tmp_path / "c", labels=["stable", "event"], training=how, patience=0
    )
    others = mi.tasks.patient_histories(120, seed=1000, plant=plant, lines=(3, 5))
    features = {"planted": [float(p) for p in others.planted]}
    report = mi.classifier_report(made, list(others.texts), others.labels, features=features)
    data = report.results["spurious"].data
    named = data["suspect"].values[data["warning"].values].tolist()
    assert named == ([PLANTED.lower()] if plant else [])
    assert not any(risk in line for line in report.warnings for risk in RISKS)
    assert len(report.warnings) == plant
    (last,) = [line for line in report.summary() if "arning: " in line]
    least = data["effect"].values[(data["effect_q"].values < 0.05) & (np.abs(data["effect"].values) >= 0.2)]
    assert plant or ("Used, but not surely more frequent" in last) == bool(len(least))
    if plant:
        effect = float(data["effect"].values[data["suspect"].values.tolist().index(PLANTED.lower())])
        assert effect > 0.3
        page = report.write(tmp_path / "report").read_text(encoding="utf-8")
        assert "Warning: adm-7731 (identifier" in page and "updatemenus" in page
        again = mi.Result.load(tmp_path / "report" / "results" / "spurious-patterns")
        assert again.data.identical(report.results["spurious"].data)
