"""Concept bottlenecks: exact where the decision is linear, no better than chance for random concepts, and bad input."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeCV
from torch import Tensor
from typer.testing import CliRunner, Result

import mechinterp as mi
from mechinterp import sites
from mechinterp.analyzers.concept_bottleneck import ALPHAS, _ridge
from mechinterp.cli import main as cli
from mechinterp.errors import ExamplesError, MechinterpError
from mechinterp.testing import check_analyzer, tiny

N = 60


@pytest.fixture(scope="module")
def qwen() -> mi.Model:
    return tiny("qwen3")


@pytest.fixture(scope="module")
def texts() -> mi.Examples:
    """Random tokens of two lengths, and one question for all: token 7 or token 9."""
    g = torch.Generator().manual_seed(2)
    ids = [torch.randint(2, 90, (5 + i % 2,), generator=g).tolist() for i in range(N)]
    return mi.Examples.of(ids, answers=[(7, 9)] * N, spans={"last": [(len(t) - 3, len(t)) for t in ids]})


def directions(model: mi.Model, n: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """What the decision reads, as two parts that are not orthogonal, and others."""
    g = torch.Generator().manual_seed(seed)
    read = (model.W_U[7] - model.W_U[9]).detach()
    noise = torch.randn(n, 32, generator=g)
    return {"one": read + 2 * noise[0], "two": -read + noise[1] - 2 * noise[0]}


def test_it_is_exact_where_the_decision_is_linear(qwen: mi.Model, texts: mi.Examples) -> None:
    """At the final norm: two concepts that span what is read, with the third that is not."""
    read = (qwen.W_U[7] - qwen.W_U[9]).detach()
    g = torch.Generator().manual_seed(0)
    other = torch.randn(2, 32, generator=g)
    concepts = {"part": read + other[0], "rest": other[0], "idle": other[1] - other[1] @ read / (read @ read) * read}
    data = mi.run(qwen, texts, mi.ConceptBottleneck(concepts, "final_norm", draws=19)).data
    assert data["input"].values.tolist() == ["concepts", "random", "full", "majority"]
    r2 = dict(zip(data["input"].values.tolist(), data["r2"].values.tolist(), strict=True))
    assert r2["concepts"] > 0.9999 and r2["full"] > 0.99 and r2["random"] < 0.5 and r2["majority"] == 0
    assert data["p"][0] == 0.05 and data["accuracy"][0] == 1
    np.testing.assert_allclose(data["change"], data["predicted_change"], atol=2e-3)
    np.testing.assert_allclose(data["slope"].sel(concept=["part", "rest"]), 1, atol=1e-3)
    np.testing.assert_allclose(data["correlation"].sel(concept=["part", "rest"]), 1, atol=1e-3)
    assert abs(data["weight"].sel(concept="idle")) < 1e-2 < abs(data["weight"].sel(concept="part"))
    assert float(data["slope_all"]) == pytest.approx(1, abs=1e-3)
    # The weights are those of the direction itself: its parts, times the spread of their scores.
    lengths = torch.stack([concepts[c].norm() for c in ("part", "rest")]).numpy()
    want = lengths * np.array([1, -1]) * data["spread"].sel(concept=["part", "rest"]).values
    np.testing.assert_allclose(data["weight"].sel(concept=["part", "rest"]), want, rtol=1e-2)
    low, high = (data[f"weight_{end}"].sel(concept="part") for end in ("ci_low", "ci_high"))
    assert low <= data["weight"].sel(concept="part") <= high


@pytest.mark.parametrize(("site", "positions"), [("resid_post.1", "end"), ("resid_mid.2", "last"), ("mlp_out.0", -2)])
def test_changes_and_scores_by_hand(qwen: mi.Model, texts: mi.Examples, site: str, positions: Any) -> None:
    concepts = directions(qwen)
    asked = mi.ConceptBottleneck(concepts, site, positions, draws=1)
    data = mi.run(qwen, texts, asked, padding_side="left", batch_size=7).data
    where = mi.Site.parse(site).at(positions)
    vectors = torch.stack([v / v.norm() for v in concepts.values()])
    x = qwen.trace(texts, where)[where]
    score = ((x if x.ndim == 2 else x.mean(1)) @ vectors.T).numpy()
    np.testing.assert_allclose(data["score"], score, atol=1e-4)
    i = 7
    text = mi.Examples.of([texts.texts[i]], answers=[(7, 9)], spans={"last": [texts.spans["last"][i]]})
    rows = [mi.Add(where, float(score[:, c].mean() - score[i, c]) * vectors[c]) for c in (0, 1)]
    hand = mi.sweep(qwen, text, rows, engine="full").data
    np.testing.assert_allclose(data["decision"][i], hand["base"][0], atol=1e-4)
    np.testing.assert_allclose(data["change"][i], (hand["value"] - hand["base"])[0], atol=1e-4)
    np.testing.assert_allclose(data["effect"], data["change"].mean("example"), atol=1e-6)
    # Slope and correlation of real on predicted changes.
    a, b = data["predicted_change"].values, data["change"].values
    for c in range(2):
        slope = np.polyfit(a[:, c], b[:, c], 1)[0]
        assert float(data["slope"][c]) == pytest.approx(slope, abs=1e-6)
        assert float(data["correlation"][c]) == pytest.approx(np.corrcoef(a[:, c], b[:, c])[0, 1], abs=1e-6)
    assert float(data["correlation_all"]) == pytest.approx(np.corrcoef(a.ravel(), b.ravel())[0, 1], abs=1e-6)


def test_the_order_and_length_of_concepts_change_nothing(qwen: mi.Model, texts: mi.Examples) -> None:
    concepts = {**directions(qwen), "three": torch.randn(32, generator=torch.Generator().manual_seed(5))}
    turned = {name: 3.0 * concepts[name] for name in ("three", "one", "two")}
    one, two = (mi.run(qwen, texts, mi.ConceptBottleneck(c, "resid_post.1", draws=5)).data for c in (concepts, turned))
    two = two.sel(concept=one["concept"])
    for name in one:
        np.testing.assert_allclose(one[name], two[name], atol=1e-4, rtol=1e-3, err_msg=str(name))


def test_random_concepts_are_no_better_than_random_ones(qwen: mi.Model, texts: mi.Examples) -> None:
    p: list[float] = []
    for seed in range(6):
        g = torch.Generator().manual_seed(seed + 10)
        concepts = {f"c{i}": torch.randn(32, generator=g) for i in range(3)}
        found = mi.run(qwen, texts, mi.ConceptBottleneck(concepts, "resid_post.2", draws=19), seed=seed)
        p.append(float(found.data["p"][0]))
    assert 0.25 < np.mean(p) < 0.75 and min(p) < 0.5 < max(p) and sum(v <= 0.1 for v in p) <= 2


def test_concepts_that_only_correlate_do_not_change_the_decision(qwen: mi.Model) -> None:
    """The same direction again, in a copy of the state that nobody reads."""
    texts = [[i, 11, 12] for i in range(20, 60)]
    examples = mi.Examples.of(texts, answers=[(7, 9)] * 40)
    end = sites.resid_post(2, positions="end")
    asked = mi.ConceptBottleneck({"any": torch.ones(32)}, "resid_post.2", draws=1)
    decided = torch.tensor(mi.run(qwen, examples, asked).data["decision"].values)
    # At the first token, after the last layer, nothing is read any more, though it may say what the decision will be.
    first = torch.cat([qwen.trace(t, end.at(0))[end.at(0)] for t in texts]).double()
    fit = torch.linalg.lstsq(first - first.mean(0), (decided - decided.mean())[:, None]).solution
    data = mi.run(qwen, examples, mi.ConceptBottleneck({"copy": fit[:, 0].float()}, "resid_post.2", 0, draws=1)).data
    assert data["r2"][0] > 0.5 and (data["change"] == 0).all()
    assert np.isnan(data["slope"][0]) or data["slope"][0] == 0


def test_a_group_is_in_one_fold(qwen: mi.Model, texts: mi.Examples) -> None:
    """Copies of an example say nothing new: what is predicted of it is from a fit without them."""
    concepts = {f"c{i}": v for i, v in enumerate(torch.randn(16, 32, generator=torch.Generator().manual_seed(3)))}
    some = {"answers": [(7, 9)] * 20, "spans": {"last": list(texts.spans["last"][:20])}}
    once = mi.Examples.of(texts.texts[:20], **some)
    copies = mi.Examples.of(texts.texts[:20] * 3, answers=[(7, 9)] * 60, spans={"last": some["spans"]["last"] * 3})
    asked = mi.ConceptBottleneck(concepts, "resid_post.0", draws=3)
    found = mi.run(qwen, copies, asked).data
    np.testing.assert_allclose(found["prediction"][:20], found["prediction"][20:40], atol=1e-6)  # of one fold
    best = float(mi.run(qwen, once, asked).data["r2"][0])
    assert float(found["r2"].sel(input="concepts")) < 0.9 and float(found["r2"].sel(input="full")) < 0.9, best
    shuffled = mi.ConceptBottleneck(concepts, "resid_post.0", draws=3, groups=tuple(range(20)) * 3)
    np.testing.assert_allclose(mi.run(qwen, copies, shuffled).data["prediction"], found["prediction"], atol=1e-6)
    pairs = mi.ConceptBottleneck(concepts, "resid_post.0", draws=3, groups=tuple(i // 2 for i in range(60)))
    data = mi.run(qwen, texts, pairs).data
    wide, narrow = (
        float(one["effect_ci_high"][0] - one["effect_ci_low"][0]) for one in (found, mi.run(qwen, once, asked).data)
    )
    assert wide == pytest.approx(narrow, rel=1e-4) and data.sizes["example"] == 60
    with pytest.raises(ExamplesError, match="5 folds take 10 groups of examples or more, and there are 4"):
        mi.run(qwen, texts, mi.ConceptBottleneck(concepts, "resid_post.0", groups=tuple(i % 4 for i in range(60))))


def test_the_contract() -> None:
    small = tiny("qwen3", layers=2)
    asked = mi.ConceptBottleneck(directions(small), "resid_post.0", draws=3, folds=2)
    check_analyzer(asked, mi.tasks.ioi(8, seed=3), models=[small])


@pytest.mark.parametrize(("n", "d"), [(50, 4), (30, 30), (20, 60)])
def test_the_fit_is_scikit_learns(n: int, d: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, n, d)) * rng.exponential(1, d) + 3
    y = x[0, :, :3].sum(1) + rng.standard_normal(n)
    fit = _ridge(x, y)
    for i in range(2):
        z = (x[i] - x[i].mean(0)) / x[i].std(0)
        theirs = RidgeCV(ALPHAS).fit(z, y)
        assert fit.penalty[i] == theirs.alpha_
        np.testing.assert_allclose(fit.offset[i] + x[i] @ fit.weights[i], theirs.predict(z), rtol=1e-6)


def test_bad_input(qwen: mi.Model, texts: mi.Examples) -> None:
    good = directions(qwen)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"concepts": {}}, "takes a concept or more"),
        ({"concepts": {"a": torch.zeros(32)}}, "'a' must be a finite vector that is not 0"),
        ({"concepts": {"a": torch.full((32,), torch.nan)}}, "must be a finite vector"),
        ({"concepts": {"a": torch.ones(2, 32)}}, r"Got one of shape \(2, 32\)"),
        ({"concepts": {"a": torch.ones(32), "b": torch.ones(16)}}, r"have widths \[16, 32\]"),
        ({"concepts": {"a": torch.ones(16)}}, "the concepts have width 16, and resid_post.1 has 32"),
        ({"site": "resid_post"}, "one layer and no heads"),
        ({"site": "z.1"}, "one layer and no heads"),
        ({"site": "pattern.1"}, "no vector for each token"),
        ({"positions": "all"}, "one token, or a span by its name"),
        ({"folds": 1}, "two folds or more"),
        ({"positions": "S2"}, "no position 'S2'"),
    ]
    for change, said in cases:
        with pytest.raises(MechinterpError, match=said):
            mi.run(qwen, texts, mi.ConceptBottleneck(**{"concepts": good, "site": "resid_post.1"} | change))
    with pytest.raises(ExamplesError, match="5 folds take 10 examples or more, and there are 3"):
        mi.run(qwen, mi.tasks.ioi(3), mi.ConceptBottleneck(good, "resid_post.1"))
    same = mi.Examples.of([[5, i, 7] for i in range(6, 18)], answers=[(7, 9)] * 12)
    first = mi.LinearProbe(mi.Site("resid_post", 2), ("a",), torch.ones(1, 32), torch.zeros(1)).metric(positions=0)
    with pytest.raises(ExamplesError, match="the probe score is the same in all examples"):
        mi.run(qwen, same, mi.ConceptBottleneck(good, "resid_post.1", metric=first))


# Concepts given as texts, and the command

NAMES = (("Mary", "John"), ("Tom", "Anna"))
PLACES = [f"Then, {a} and {b} went to the {c}" for a, b in NAMES for c in ("park", "store")]
THINGS = [f"Then, {a} gave a {c} to {b}" for a, b in NAMES for c in ("book", "drink")]


def test_directions_are_differences_of_means(qwen: mi.Model) -> None:
    pairs = mi.tasks.ioi(12)
    options: dict[str, Any] = {"site": "resid_post.1", "positions": "end"}
    concepts = {"place": PLACES, "thing": THINGS}
    found = mi.studies.concept_bottleneck(qwen, pairs, concepts, others=["He had a"], **options)
    end = sites.resid_post(1, positions="end")
    means = [qwen.trace(some, end)[end].double() for some in (PLACES, THINGS, ["He had a"])]
    place = means[0].mean(0) - torch.cat(means[1:]).mean(0)
    thing = means[1].mean(0) - torch.cat([means[0], means[2]]).mean(0)
    hand = mi.run(qwen, pairs, mi.ConceptBottleneck({"place": place, "thing": thing}, **options)).data
    np.testing.assert_allclose(found.data["weight"], hand["weight"], rtol=1e-3)
    assert found.meta["texts"] == {"place": 4, "thing": 4}
    with pytest.raises(ExamplesError, match="the concept 'place' has 1 texts, and 4 are not its own"):
        mi.studies.concept_bottleneck(qwen, pairs, {"place": PLACES[:1], "thing": THINGS}, **options)
    both = mi.Examples.of([*pairs.texts, PLACES[1], THINGS[0]], answers=[*pairs.answers, *pairs.answers[:2]])
    with pytest.raises(
        ExamplesError, match=r"2 of the 14 examples are among the texts .*, the first of them example 12"
    ):
        mi.studies.concept_bottleneck(qwen, both, concepts, others=["He had a"], **options)
    with pytest.raises(ExamplesError, match="'place' has 4 texts, and 0 are not its own"):
        mi.studies.concept_bottleneck(qwen, pairs, {"place": PLACES}, **options)


def test_the_command(qwen: mi.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mi.Model, "load", classmethod(lambda cls, *a, **k: qwen))

    def file(name: str, rows: list[dict[str, Any]]) -> Path:
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
        return tmp_path / name

    def invoke(*arguments: Any) -> Result:
        every = ["concept-bottleneck-analysis", "tiny", *arguments, "--out", tmp_path / "out"]
        return CliRunner().invoke(cli.app, [str(a) for a in every])

    rows = [{"text": t, "concept": "place"} for t in PLACES] + [{"text": t, "concept": ""} for t in THINGS]
    concepts = file("concepts.jsonl", rows)
    pairs = mi.tasks.ioi(12)
    asked = [{"text": t, "answer": a[0][0], "wrong": a[1][0]} for t, a in zip(pairs.texts, pairs.answers, strict=True)]
    examples = file("examples.jsonl", asked)
    done = invoke(concepts, examples, "--site", "resid_post.1", "--decision", "log-odds")
    assert done.exit_code == 0, done.output
    assert "place" in done.stdout and (tmp_path / "out" / "report.html").is_file()
    kept = mi.Result.load(tmp_path / "out" / "results" / "concept-bottleneck").data
    assert kept["concept"].values.tolist() == ["place"] and kept.attrs["unit"] == "log-odds in nats"
    plain = file("plain.jsonl", [{"text": t} for t in pairs.texts])
    bare = file("bare.jsonl", [{"text": t} for t in PLACES])
    none = file("none.jsonl", [{"text": t, "concept": ""} for t in PLACES])
    for arguments, code, said in (
        ((concepts, plain, "--site", "resid_post.1"), 1, "must have answer and wrong in every row"),
        ((bare, examples, "--site", "resid_post.1"), 1, "row 1 of"),
        ((none, examples, "--site", "resid_post.1"), 1, "names no concept"),
        ((concepts, examples, "--site", "resid_post"), 1, "one layer and no heads"),
        ((concepts, examples), 2, "--site"),
    ):
        done = invoke(*arguments)
        assert done.exit_code == code and "Traceback" not in done.output, done.output
        assert said in " ".join(done.stderr.replace("│", " ").split()), done.stderr
