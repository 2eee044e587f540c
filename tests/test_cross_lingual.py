"""Translations: read from a file, represented alike or not, and the command that compares languages."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import mechinterp as mi
from mechinterp.analyzers.cross_lingual import FEATURES, _measured, _wilson
from mechinterp.analyzers.units import Units
from mechinterp.core.similarity import similarity
from mechinterp.errors import ExamplesError, NeedsError
from mechinterp.studies import Parallel, read_parallel
from mechinterp.testing import check_analyzer, tiny
from tests.test_cli_causal import here, invoke, one_line, said
from tests.test_cli_looking import study

__all__ = ["here"]  # a fixture

WORDS = {"Mary": "Anna", "John": "Tom", "went": "gave", "store": "book", "had": "and", "drink": "ring"}
SENTENCES = [
    "Mary went to the store", "John had a drink", "Mary and John had a drink", "the store had a ring",
    "Mary gave John a book", "to the store went Mary", "a drink for John", "John went to the dog",
]  # fmt: skip


def translated(text: str, how: int) -> str:
    """Another tiny language: its own words, or its own order."""
    words = [WORDS.get(word, word) for word in text.split()]
    return " ".join(words if how == 1 else reversed(words))


def parallel(missing: bool = True) -> Parallel:
    rows = [(text, translated(text, 1), translated(text, 2)) for text in SENTENCES]
    return Parallel(("a", "b", "c"), tuple(rows[:7] + [(*rows[7][:2], None)]) if missing else tuple(rows))


def test_the_contract() -> None:
    texts = Parallel(("a", "b"), tuple(row[:2] for row in parallel().sentences[:6]))
    examples = mi.Examples.of(
        texts.examples.texts, texts.examples.labels, answers=[(" Mary", " John")] * len(texts.rows)
    )
    check_analyzer(mi.CrossLingual(texts.rows, draws=50), examples, models=[tiny("qwen3", layers=2)])


def test_every_number_by_hand(llama: mi.Model) -> None:
    texts = parallel()
    assert texts.rows == (*(i for i in range(7) for _ in range(3)), 7, 7)
    data = mi.run(llama, texts.examples, mi.CrossLingual(texts.rows, draws=50)).data
    site = mi.sites.resid_post(1)
    for a, b in itertools.combinations(range(3), 2):
        rows = [row for row in texts.sentences if row[a] and row[b]]
        sides = [
            torch.stack([llama.trace(str(row[k]), site)[site][0, 1:].mean(0) for row in rows]).double() for k in (a, b)
        ]
        x, y = sides
        pair, n = f"{'abc'[a]} | {'abc'[b]}", len(rows)
        here = data.sel(pair=pair, layer=1)
        assert int(here["sentences"]) == n == (8 if (a, b) == (0, 1) else 7)
        for name in FEATURES:
            if name != "raw":
                x, y = x - x.mean(0), y - y.mean(0)
            if name == "standardized":
                x, y = (stats.zscore(side) for side in (x, y))
            if name != "centred":
                cka = float(here["cka"].sel(scaling=name))
                assert cka == pytest.approx(similarity(torch.as_tensor(x), torch.as_tensor(y), "cka"), abs=1e-4)
            c = np.array([[float(u @ v / (u @ u) ** 0.5 / (v @ v) ** 0.5) for v in y] for u in x])
            paired = c.diagonal().mean()
            unpaired = (c.sum() - c.trace()) / (n * (n - 1))
            cell = here.sel(features=name)
            assert float(cell["paired"]) == pytest.approx(paired, abs=1e-5)
            assert float(cell["unpaired"]) == pytest.approx(unpaired, abs=1e-5)
            assert float(cell["gap"]) == pytest.approx(paired - unpaired, abs=1e-5)
            variance = sides[0].var(0)
            share = data["top_share"].sel(language="abc"[a], layer=1)
            if n == 8:  # all sentences of the language are in the pair
                assert float(share) == pytest.approx(float(variance.max() / variance.sum()), abs=1e-5)
            for way, found in ((f"{'abc'[a]} → {'abc'[b]}", c), (f"{'abc'[b]} → {'abc'[a]}", c.T)):
                right = np.mean([max(range(n), key=lambda j: found[i, j]) == i for i in range(n)])
                accuracy = data["accuracy"].sel(features=name, direction=way, layer=1)
                assert float(accuracy) == pytest.approx(right, abs=1e-6)
                assert float(data["chance"].sel(direction=way)) == pytest.approx(1 / n)


def test_the_same_sentences_are_found(llama: mi.Model) -> None:
    same = Parallel(("a", "b"), tuple((text, text) for text in SENTENCES))
    found = mi.run(llama, same.examples, mi.CrossLingual(same.rows, draws=400))
    data = found.data
    np.testing.assert_allclose(data["accuracy"], 1)
    np.testing.assert_allclose(data["cka"], 1, atol=1e-4)
    assert (data["q"] < 0.05).all() and (data["gap_q"] < 0.05).all() and (data["gap_ci_low"] > 0).all()
    assert (data["accuracy_ci_low"] < 0.8).all()  # eight sentences are few
    assert all(found.figure(i) is not None for i in range(len(found.views)))


def test_nothing_is_found_among_strangers() -> None:
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=(300, 9, 20)) for _ in range(2))
    x, y = (v / np.linalg.norm(v, axis=-1, keepdims=True) for v in (x, y))
    orders = rng.permuted(np.tile(np.arange(9), (199, 1)), axis=1)
    found = _measured(x @ y.transpose(0, 2, 1), orders, 0)
    assert found["accuracy"].mean() == pytest.approx(1 / 9, abs=0.02)
    assert stats.kstest(found["gap_p"], "uniform").pvalue > 0.01
    assert (found["p"] <= 0.05).mean() < 0.08  # discrete, so at most
    assert ((found["gap_ci_low"] <= 0) & (found["gap_ci_high"] >= 0)).mean() > 0.8
    expected = stats.binomtest(3, 9).proportion_ci(0.95, "wilson")
    np.testing.assert_allclose(np.ravel(_wilson(np.array([1 / 3]), 9)), (expected.low, expected.high), rtol=1e-6)


def test_constant_features_and_bad_input(llama: mi.Model) -> None:
    texts = parallel(False)
    dotted = Parallel(texts.languages, tuple(tuple(f"{text}." for text in row) for row in texts.sentences))
    data = mi.run(llama, dotted.examples, mi.CrossLingual(dotted.rows, "embed", Units("end"), draws=20)).data
    for name in FEATURES[1:]:
        assert data["accuracy"].sel(features=name).isnull().all()
    assert data["cka"].isnull().all() and data["top_share"].isnull().all()
    assert (data["gap"].sel(features="raw").round(5) == 0).all()
    examples = texts.examples
    one = mi.Examples.of(SENTENCES, ["a"] * 8)
    few = Parallel(("a", "b"), texts.sentences[:5])
    few = Parallel(few.languages, tuple(row[:2] for row in few.sentences))
    for given, rows, told in (
        (mi.Examples.of(SENTENCES), range(8), "no labels"),
        (examples, range(8), "8 rows for 24 texts"),
        (mi.Examples.of(SENTENCES, ["a", None, *"abbabb"]), range(8), "text 1 has no label"),
        (one, range(8), "all texts are in one language"),
        (examples, [0] * 24, "texts 0 and 3 are both sentence 0 in a"),
        (few.examples, few.rows, "a and b share 5 sentences, and 6 are the least"),
    ):
        with pytest.raises(ExamplesError, match=told):
            mi.run(llama, given, mi.CrossLingual(tuple(rows)))
    with pytest.raises(NeedsError, match="one vector a text"):
        mi.CrossLingual((0,), units=Units(each="token"))


# ---- files


def test_what_is_missing_or_doubled_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "p.tsv"
    rows = ["en\tfr\tid", "one\tun\t1", " two \t\t2", "three\ttrois\t3", "one\tuno\t4", "four\tquatre\t5", "\tcinq\t6"]
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    found = read_parallel(path)
    assert found.languages == ("en", "fr")
    assert found.sentences == (("one", "un"), ("three", "trois"), ("four", "quatre"))
    assert found.left_out == ("2 sentences in one language only", "1 sentence doubled")
    assert found.examples.labels == ("en", "fr") * 3 and found.rows == (0, 0, 1, 1, 2, 2)
    assert found.first(2).sentences == found.sentences[:2] and found.first(9) == found
    three = tmp_path / "p.jsonl"
    three.write_text("\n".join(map(json.dumps, [{"en": "a", "fr": "b", "de": "c"}, {"en": "d", "fr": "e"}])))
    found = read_parallel(three)
    assert found.sentences == (("a", "b", "c"), ("d", "e", None)) and found.left_out == ("1 sentence without de",)
    assert read_parallel(three, ["de", "en"]).sentences == (("c", "a"),)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("p.tsv", "en\none\n", "1 language: en; give one column for each"),
        ("p.tsv", "en fr\none un\n", "1 language: en fr; give one column for each"),
        ("p.tsv", "en\tfr\none\tun\tuno\n", "row 1 of .* has more cells than the header"),
        ("p.tsv", 'en\tfr\n"one\tun\ntwo\tdeux\n', "spans several lines"),
        ("p.jsonl", '{"en": "one", "fr": 1}', "'fr' of row 1 of .* is 1, which is no text"),
        ("p.csv", "en,fr\none,\n,deux\n", "no row of .* has a sentence in two of the languages en, fr"),
        ("p.csv", "en,fr\n", "no rows"),
    ],
)
def test_files_that_are_not_parallel(tmp_path: Path, name: str, content: str, told: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ExamplesError, match=told):
        read_parallel(tmp_path / name)
    if name == "p.csv":
        with pytest.raises(ExamplesError, match=r"no column 'de'|no rows"):
            read_parallel(tmp_path / name, ["en", "de"])


# ---- commands


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    where, model = tmp_path_factory.mktemp("models") / "llama", tiny("llama", layers=2)
    model.hf.save_pretrained(where)
    model.tokenizer.save_pretrained(where)
    return str(where)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def test_languages_are_compared(here: Path, folder: str) -> None:
    rows = [dict(zip("abc", row, strict=True)) for row in parallel().sentences]
    write(here / "p.jsonl", [*rows, {"a": "alone"}])
    asked = ["compare-languages", "p.jsonl", "--model", folder, "--out", "s"]
    done = invoke(*asked, "--language", "a", "--language", "b", "--limit", 7, "--position", "end", "--map", "none")
    text = said(done)
    assert "1 sentence in one language only" in done.stderr
    saved = mi.Result.load(here / "s/results/cross-lingual")
    assert saved.data["pair"].values.tolist() == ["a | b"] and "rows" not in saved.meta["options"]
    assert "'end'" in saved.meta["options"]["units"]
    best = float(saved.data["accuracy"].sel(features="standardized").mean("direction").max())
    assert "a | b, 7 sentences: translations are found best in layer" in text and f"({best:.0%} of standardized" in text
    manifest = study(here / "s")
    assert manifest["sentences"] == 7 and manifest["passes"]["forward"] == 1
    assert "tables/cross-lingual-accuracy.csv" in manifest["files"] and "figures/map.html" not in manifest["files"]
    asked[-1] = "u"
    assert "share" in one_line(invoke(*asked, "--limit", 4))
    assert "no column 'x'" in one_line(invoke(*asked, "--language", "x"))
    assert not (here / "u").exists()


@pytest.mark.usefixtures("no_pictures")
def test_representations(here: Path, folder: str) -> None:
    rows = [{"text": text, "kind": "<b>&" if i % 2 else "</script>"} for i, text in enumerate(SENTENCES)]
    write(here / "t.jsonl", rows)
    asked = ["representations", "t.jsonl", "--model", folder, "--out", "s"]
    text = said(invoke(*asked, "--label-field", "kind", "--limit", 7))
    assert "7 units of 7, from 7 texts" in text and "most alike within their groups in layer" in text
    assert "adjusted Rand index" in text and "CKA: the first and the last layer" in text
    manifest = study(here / "s")
    assert {"similarity", "group-similarity", "representation-map"} == {
        f.split("/")[1] for f in manifest["files"] if f.startswith("results/")
    }
    assert "figures/map.html" in manifest["files"] and manifest["passes"]["forward"] == 1
    page = (here / "s/report.html").read_text(encoding="utf-8")
    assert "<b>&" not in page and page.count("</script>") == page.count("<script")
    assert "no field 'body'" in one_line(invoke(*asked, "--text-field", "body"))
    assert "no field 'x'" in one_line(invoke(*asked, "--label-field", "x"))
