"""Concept directions and steering: what is planted is found and moves what it should; what is not there is not."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score
from tokenizers.processors import TemplateProcessing

import mechinterp as mi
from mechinterp import sites
from mechinterp.analyzers.concept_directions import ConceptDirections, _tested
from mechinterp.analyzers.probe_data import Probed
from mechinterp.core.analyzer import Context
from mechinterp.core.statistics import compare_groups
from mechinterp.core.tokens import Tokens
from mechinterp.errors import ExamplesError, NeedsError
from mechinterp.testing import check_analyzer, tiny

WORDS = ["Mary", "John", "Tom", "Paul", "store", "park", "school", "office", "drink", "book", "ring", "kiss"]
METHODS: list[Any] = ["mean-difference", "logistic", "pca"]


def texts(n: int, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, 8)) for _ in range(n)]


@pytest.mark.parametrize("method", METHODS)
def test_contract(method: Any) -> None:
    analyzer = ConceptDirections(method, sites.resid_post((0, 2)), folds=3)
    examples = mi.Examples.of(texts(18), labels=["yes", "no", "maybe"] * 6, answers=[(" Mary", " John")] * 18)
    check_analyzer(analyzer, examples, models=[tiny("qwen2")])


@pytest.mark.parametrize("method", METHODS)
def test_a_planted_direction_is_recovered(method: Any) -> None:
    """Added to the residual stream of half of the texts, at layer 1: found there and after it, and not before."""
    model = tiny("llama", layers=3)
    planted = torch.randn(32, generator=torch.Generator().manual_seed(3))
    planted = planted / planted.norm()
    labels = np.random.default_rng(1).permutation(["no", "yes"] * 150)
    size = float(model.trace(texts(20), "resid_post.1")["resid_post.1"].std()) * 32**0.5
    values = torch.tensor(labels == "yes").float()[:, None, None] * planted * (4.0 if method == "pca" else 1.0) * size
    given = mi.Examples.of(texts(300), labels=labels.tolist())
    with model.intervene(mi.Add(sites.resid_post(1), values)):
        result = mi.run(model, given, ConceptDirections(method, positions="all", pool="mean"))
    probe = mi.LinearProbe.of(result, "resid_pre.2")
    cosine = float(probe.direction("yes") @ planted)
    assert cosine > (0.98 if method != "logistic" else 0.7), cosine  # a logistic weight is turned by the covariance
    data = result.data.sel({"class": "yes"})
    assert float(data["test_auroc"].sel(site="resid_pre.2")) > 0.95 and float(data["q"].sel(site="resid_pre.2")) < 0.01
    assert float(data["test_auroc"].sel(site="resid_pre.0")) < 0.75
    assert float(data["coherence"].sel(site="resid_pre.2")) > 0.5 > float(data["coherence"].sel(site="resid_pre.0"))
    assert result.meta["chosen"] in ("resid_pre.2", "resid_post.2")
    assert result.meta["set_apart"] == 60


def test_pairs_take_away_what_they_share() -> None:
    """Every group is a yes and a no of one text, which varies far more than the concept does."""
    rng = np.random.default_rng(0)
    shared = rng.standard_normal((60, 16)) * np.r_[20.0, np.ones(15)]
    concept = np.eye(16)[3]
    x = torch.from_numpy(np.concatenate([shared + concept, shared - concept]) + 0.1 * rng.standard_normal((120, 16)))
    data = drawn(np.array(["b"] * 60 + ["a"] * 60), groups=tuple(range(60)) * 2)
    found = ConceptDirections("pca")._site(x.float(), data)
    weight = found["weight"][1] / np.linalg.norm(found["weight"][1])
    assert weight @ concept > 0.98
    apart = ConceptDirections("pca")._site(x.float(), drawn(np.array(["b"] * 60 + ["a"] * 60)))
    assert abs(apart["weight"][1] @ concept) / np.linalg.norm(apart["weight"][1]) < 0.3


def drawn(y: Any, groups: Any = None, folds: int = 5, seed: int = 0) -> Probed:
    n = len(y)
    tokens = Tokens(tuple((i,) for i in range(n)), None, None, {}, {}, tuple(y.tolist()))
    return Probed.of(
        tokens, np.arange(n), np.stack([np.zeros(n, int), np.ones(n, int)], 1), None, groups, folds, seed, False
    )


@pytest.mark.parametrize("kind", ["texts", "groups of one class", "groups of both", "few groups"])
def test_p_is_uniform_where_there_is_nothing(kind: str) -> None:
    """Texts of one group are alike, so that to take them for independent would find what is not there."""
    found, texts_found = [], []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        group = np.arange(120) if kind == "texts" else np.arange(120) // (6 if kind != "few groups" else 15)
        groups = int(group.max()) + 1
        if kind == "groups of both":  # each group has its own line between the classes
            y = np.array(["a", "b"] * 60)
            x = rng.standard_normal((groups, 8))[group] * np.where(y == "a", 1, -1)[:, None]
        else:
            y = rng.permutation(["a", "b"] * (groups // 2))[group]
            x = 3 * rng.standard_normal((groups, 8))[group]
        x = torch.from_numpy(x + rng.standard_normal((120, 8))).float()
        data = drawn(y, tuple(group.tolist()), folds=4, seed=seed)
        asked = ConceptDirections(folds=4, set_apart=2)
        one = asked._site(x, data)
        assert one["auroc"][0] == one["auroc"][1] and np.allclose(one["weight"][0], -one["weight"][1])
        p = _tested(one["scores"][None], data, 2, seed)[0]
        found.append(float(p[1]))
        truth = y[data.held[:2].any(0)] == "b"
        texts_found.append(stats.mannwhitneyu(one["scores"][1][truth], one["scores"][1][~truth]).pvalue)
    if kind == "few groups":
        assert np.isnan(found).all()
        return
    assert stats.kstest(found, "uniform").pvalue > 0.01
    assert kind == "texts" or stats.kstest(texts_found, "uniform").pvalue < 1e-4


def test_too_few_groups_are_said() -> None:
    model = tiny("llama", layers=1)
    given = mi.Examples.of(texts(40), labels=["no", "yes"] * 20)
    groups = tuple(i // 4 for i in range(40))
    few = mi.run(model, given, ConceptDirections(groups=groups))
    assert few.meta["groups_set_apart"] == 2 and few.meta["untested"].startswith("2 groups are set apart")
    assert all(bool(few.data[name].isnull().all()) for name in ("ci_low", "ci_high", "p", "q"))
    assert bool(few.data["test_auroc"].notnull().all())
    more = mi.run(model, given, ConceptDirections(groups=groups, set_apart=3))
    assert more.meta["groups_set_apart"] == 6 and more.meta["set_apart"] == 24 and "untested" not in more.meta
    assert all(bool(more.data[name].notnull().all()) for name in ("ci_low", "ci_high", "p", "q"))


def test_what_is_refused() -> None:
    with pytest.raises(NeedsError, match="three folds or more"):
        ConceptDirections(folds=2)
    with pytest.raises(NeedsError, match="5 folds, 4 set apart"):
        ConceptDirections(set_apart=4)
    with pytest.raises(ExamplesError, match="these labels are numbers"):
        mi.run(tiny("llama"), mi.Examples.of(texts(9), labels=list(map(float, range(9)))), ConceptDirections(folds=3))


def probe_of(model: mi.Model, layer: int = 1, seed: int = 0) -> mi.LinearProbe:
    weight = torch.randn(1, 32, generator=torch.Generator().manual_seed(seed))
    return mi.LinearProbe(mi.Site("resid_post", layer), ("no", "yes"), torch.cat([-weight, weight]), torch.zeros(2))


def prompts() -> mi.Examples:
    return mi.Examples.of(texts(8, seed=4), answers=[([" Mary", " John"], [" Tom", " Paul"])] * 8)


def test_steering_keeps_the_contract() -> None:
    model = tiny("qwen3")
    check_analyzer(mi.Steering(probe_of(model), strengths=(-1.0, 2.0), draws=2), prompts(), models=[model])


def test_steering_is_what_interventions_do() -> None:
    model, given = tiny("qwen2"), prompts()
    probe = probe_of(model)
    data = mi.run(model, given, mi.Steering(probe, strengths=(-1.5, 3.0), draws=2, seed=5)).data
    tokens = given.tokenize(model.tokenizer)

    def odds_and_loss(i: int) -> tuple[float, float]:
        with torch.no_grad():
            logits = model.hf(torch.tensor([tokens.ids[i]])).logits[0]
        right, wrong = (logits[-1, list(side)].logsumexp(0) for side in (tokens.answers or ())[i])
        loss = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(tokens.ids[i][1:]))
        return float(right - wrong), float(loss)

    before = [odds_and_loss(i) for i in range(8)]
    with model.intervene(probe.steer("yes", 3.0)):
        after = [odds_and_loss(i) for i in range(8)]
    change = np.array(after) - np.array(before)
    np.testing.assert_allclose(data["effect"].sel(strength=3.0), change[:, 0], atol=1e-4)
    assert float(data["cost"].sel(strength=3.0)) == pytest.approx(np.exp(change[:, 1].mean()), rel=1e-4)
    with model.intervene(probe.ablate()):
        gone = np.array([odds_and_loss(i) for i in range(8)]) - np.array(before)
    assert float(data["ablation"].sel(measure="effect")) == pytest.approx(gone[:, 0].mean(), abs=1e-4)
    assert float(data["ablation"].sel(measure="cost")) == pytest.approx(np.exp(gone[:, 1].mean()), rel=1e-4)
    low, high = (float(data[f"ablation_ci_{end}"].sel(measure="effect")) for end in ("low", "high"))
    assert low < gone[:, 0].mean() < high
    draw = torch.randn(2, 32, generator=torch.Generator().manual_seed(5))[1]
    with model.intervene(mi.Steer(sites.resid_post(1), draw, -1.5)):
        other = np.array([odds_and_loss(i) for i in range(8)]) - np.array(before)
    assert float(data["control"].sel(strength=-1.5)[1]) == pytest.approx(other[:, 0].mean(), abs=1e-4)
    with model.intervene(mi.Project(sites.resid_post(1), draw)):
        other = np.array([odds_and_loss(i) for i in range(8)]) - np.array(before)
    line = data["ablation_control"].sel(draw=1)
    assert float(line.sel(measure="effect")) == pytest.approx(other[:, 0].mean(), abs=1e-4)
    assert float(line.sel(measure="cost")) == pytest.approx(np.exp(other[:, 1].mean()), rel=1e-4)
    # Its rank among the random ones, by the distance from the mean of all three.
    every = np.r_[data["mean"].sel(strength=3.0), data["control"].sel(strength=3.0)]
    far = np.abs(every - every.mean())
    assert float(data["p"].sel(strength=3.0)) == pytest.approx((far >= far[0]).mean())


def test_the_p_of_a_random_direction_is_uniform() -> None:
    """A direction that is one more draw is not to stand out, with few prompts that all move the same way, too."""
    model, given = tiny("llama", layers=2), prompts()
    found = {"p": [], "ablation_p": []}
    for seed in range(40):
        asked = mi.Steering(probe_of(model, 1, 1000 + seed), strengths=(4.0,), draws=19, seed=seed)
        data = mi.run(model, given, asked).data
        found["p"].append(float(data["p"][0]))
        found["ablation_p"].append(float(data["ablation_p"].sel(measure="effect")))
    jitter = np.random.default_rng(0).random(40) / 20  # p is a multiple of 1/20
    for p in found.values():
        assert stats.kstest(np.array(p) - jitter, "uniform").pvalue > 0.01


def test_the_direction_of_the_answers_moves_them() -> None:
    """After the last layer, the unembedding of an answer is the direction that raises it, and random ones are not."""
    model = tiny("llama")
    rows = model.W_U.detach().float()
    ids = [model.tokenize([w]).ids[0][0] for w in (" Mary", " John", " Tom", " Paul")]
    line = rows[ids[0]] + rows[ids[1]] - rows[ids[2]] - rows[ids[3]]
    probe = mi.LinearProbe(mi.Site("resid_post", 2), ("no", "yes"), torch.stack([-line, line]), torch.zeros(2))
    data = mi.run(model, prompts(), mi.Steering(probe, strengths=(20.0,))).data
    assert float(data["p"][0]) == pytest.approx(0.01) == float(data["ablation_p"].sel(measure="effect"))  # 1 in 100
    assert float(data["mean"][0]) > 2 * float(data["control"].max()) and float(data["q"][0]) < 0.05
    assert float(data["ci_low"][0]) > 0


def test_bad_steering() -> None:
    model = tiny("llama")
    with pytest.raises(NeedsError, match="each once, and not 0"):
        mi.Steering(probe_of(model), strengths=(0.0, 1.0))
    with pytest.raises(NeedsError, match="at least one random direction"):
        mi.Steering(probe_of(model), draws=0)
    wide = mi.LinearProbe(mi.Site("resid_post", 1), ("a", "b"), torch.ones(2, 7), torch.zeros(2))
    with pytest.raises(NeedsError, match="has 7 dimensions and tiny-llama has 32"):
        mi.run(model, prompts(), mi.Steering(wide))


def test_steered_text(tmp_path: Path) -> None:
    model = tiny("llama")
    rows = model.W_U.detach().float()
    mary = model.tokenize([" Mary"]).ids[0][0]
    line = rows[mary] - rows.mean(0)
    probe = mi.LinearProbe(mi.Site("resid_post", 2), ("no", "yes"), torch.stack([-line, line]), torch.zeros(2))
    given = ["Then Tom went to the", "John had a"]
    result = mi.studies.steered_text(
        model, probe, given, strengths=(200.0,), words=[" Mary"], max_new_tokens=6, pad_token_id=0
    )
    data = mi.Result.load(result.save(tmp_path / "r")).data
    assert data.sizes["prompt"] == 2 and list(data["strength"].values) == [0.0, 200.0]
    plain = str(model.generate(given[0], max_new_tokens=6, pad_token_id=0))
    assert str(data["text"].sel(direction="yes", strength=0.0)[0].item()) == plain
    words = data["words"].mean("prompt")
    assert float(words.sel(direction="yes", strength=200.0)) == 1.0
    assert float(words.sel(direction="random", strength=200.0)) < 1.0
    perplexity = data["perplexity"].mean("prompt")
    assert float(perplexity.sel(direction="yes", strength=200.0)) > float(perplexity.sel(direction="yes", strength=0.0))
    with pytest.raises(ExamplesError, match="no prompt to go on from"):
        mi.studies.steered_text(model, probe, [])
    with pytest.raises(NeedsError, match="not 0, which is always there"):
        mi.studies.steered_text(model, probe, given, strengths=(0.0,))


def test_the_first_token_of_a_text_is_no_word_of_it() -> None:
    """With a tokenizer that begins every text with BOS, the words are still those that were asked for."""
    model = tiny("llama")
    rows = model.W_U.detach().float()
    line = rows[model.tokenize([" Mary"]).ids[0][0]] - rows.mean(0)
    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.add_special_tokens({"bos_token": "<unk>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<unk> $A", special_tokens=[("<unk>", tokenizer.bos_token_id)]
    )
    model = mi.Model(model.hf, tokenizer, "with-bos")
    assert model.tokenize([" Mary"]).ids[0][0] == tokenizer.bos_token_id
    probe = mi.LinearProbe(mi.Site("resid_post", 2), ("no", "yes"), torch.stack([-line, line]), torch.zeros(2))
    options: Any = {"strengths": (200.0,), "words": [" Mary"], "max_new_tokens": 4, "pad_token_id": 0}
    data = mi.studies.steered_text(model, probe, ["Tom had a"], **options).data
    assert float(data["words"].sel(direction="yes", strength=200.0)[0]) == 1.0


def test_the_line_that_is_tested_is_the_line_that_is_steered() -> None:
    """Three classes, not balanced, whose weights do not add up to zero: the score is the projection on direction()."""
    rng = np.random.default_rng(0)
    y = np.array(["a"] * 60 + ["b"] * 30 + ["c"] * 30)
    x = rng.standard_normal((120, 6)) + np.eye(6)[[0] * 60 + [1] * 30 + [2] * 30] + 5 * np.eye(6)[3]
    data = drawn(y)
    for method in METHODS:
        found = ConceptDirections(method)._site(torch.from_numpy(x).float(), data)
        weight, bias = (torch.from_numpy(found[name]).float() for name in ("weight", "bias"))
        probe = mi.LinearProbe(mi.Site("resid_post", 0), tuple("abc"), weight, bias)
        for i, name in enumerate("abc"):
            along = (torch.from_numpy(x).float() @ probe.direction(name)).numpy()
            auroc = roc_auc_score(y[data.held[0]] == name, along[data.held[0]])
            assert found["test_auroc"][i] == pytest.approx(auroc, abs=1e-9)
            rest = ~data.held[0]
            gap = along[rest & (y == name)].mean() - along[rest & (y != name)].mean()
            assert found["gap"][i] == pytest.approx(gap, rel=1e-4) and gap > 0


def test_kinds_along_a_direction() -> None:
    """Texts of one kind get the direction added; the test says which kind, how far, and nothing of the others."""
    model = tiny("qwen3")
    some = mi.Examples.of(texts(12), labels=["a", "b", "c"] * 4, answers=[(" Mary", " John")] * 12)
    check_analyzer(mi.ConceptAssociation(probe_of(model)), some, models=[model])
    probe = probe_of(model)
    given = mi.Examples.of(texts(90), labels=["cook", "pilot", "smith"] * 30)
    values = torch.tensor([1.0, 0.0, 0.0] * 30)[:, None, None] * probe.direction("yes") * 5.0
    with model.intervene(mi.Add(sites.resid_post(1), values)):
        data = mi.run(model, given, mi.ConceptAssociation(probe)).data
    plain = mi.run(model, given, mi.ConceptAssociation(probe)).data
    moved = float(data["score"].sel(group="cook") - plain["score"].sel(group="cook"))
    assert moved == pytest.approx(5.0, abs=1e-3)
    assert float(data["q"].sel(group="cook")) < 0.01 and float(plain["q"].min()) > 0.01
    assert float(data["score_q"].sel(group="cook")) < 0.01 and float(plain["score_q"].min()) > 0.01
    # The cosine is that of the two directions, by hand.
    x = model.trace(given.texts, sites.resid_post(1, positions="end"))[sites.resid_post(1, positions="end")]
    cook = torch.tensor([True, False, False] * 30)
    difference = x[cook].mean(0) - x[~cook].mean(0)
    cosine = float(difference @ probe.direction("yes") / difference.norm())
    assert float(plain["cosine"].sel(group="cook")) == pytest.approx(cosine, abs=1e-5)
    np.testing.assert_allclose(plain["projection"], x @ probe.direction("yes"), atol=1e-4)
    with pytest.raises(ExamplesError, match="compares two kinds or more"):
        mi.run(model, mi.Examples.of(texts(8), labels=["a"] * 8), mi.ConceptAssociation(probe))
    with pytest.raises(ExamplesError, match="the group 'x' has texts labelled cook and pilot"):
        mi.run(model, given, mi.ConceptAssociation(probe, groups=("x", "x", "y") * 30))


def test_an_association_takes_groups_for_what_is_independent() -> None:
    """Texts of a profession are alike: to shuffle texts finds kinds where professions were labelled at random."""
    rng = np.random.default_rng(0)
    line = torch.eye(6)[0]
    probe = mi.LinearProbe(mi.Site("resid_post", 0), ("no", "yes"), torch.stack([-line, line]), torch.zeros(2))
    model = tiny("llama", layers=1)
    p: dict[str, list[float]] = {"groups": [], "texts": [], "score": []}
    group = np.arange(60) // 6
    for seed in range(80):
        x = torch.from_numpy(3 * rng.standard_normal((10, 6))[group] + rng.standard_normal((60, 6))).float()
        kinds = tuple(rng.permutation(["a", "b"] * 5)[group].tolist())
        tokens = Tokens(tuple((i,) for i in range(60)), None, None, {}, {}, kinds)
        values: dict[str, Any] = {
            "features": (x[None], "site unit dim"), "owner": (torch.arange(60), "unit"),
            "tokens": (torch.tensor([[0, 1]] * 60), "unit bound"),
        }  # fmt: skip
        context = Context(model, tokens, {}, seed)
        by_group = mi.ConceptAssociation(probe, groups=tuple(group.tolist())).combine(iter([mi.Part(values)]), context)
        by_text = compare_groups(x[np.array(kinds) == "a", :1].numpy(), x[np.array(kinds) == "b", :1].numpy(), seed)
        p["groups"].append(float(by_group.data["p"][0]))
        p["score"].append(float(by_group.data["score_p"][0]))
        p["texts"].append(float(by_text.p[0]))
        assert by_group.data["members"].values.tolist() == [5, 5] and by_group.data.sizes["member"] == 10
    jitter = rng.random(80) * 2 / 252  # the exact test lists 252 splits, each with its mirror image
    assert stats.kstest(np.array(p["groups"]) - jitter, "uniform").pvalue > 0.01
    assert stats.kstest(np.array(p["score"]) - jitter, "uniform").pvalue > 0.01
    assert stats.kstest(p["texts"], "uniform").pvalue < 1e-4
