"""Cosine, debiased CKA and RSA: laws, oracles, nulls; layers, groups, two models, and a concept's drift."""

import itertools
import re
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.spatial.distance import pdist

import mechinterp as mi
from mechinterp.analyzers.similarity import _pair_sums, check_measures
from mechinterp.analyzers.units import Units
from mechinterp.core import similarity as core
from mechinterp.core.similarity import MEASURES, likeness, similarity
from mechinterp.errors import AlignmentError, ExamplesError, NeedsError
from mechinterp.studies.representations import _balanced, _cosines, _dealt
from mechinterp.testing import check_analyzer, tiny

TEXTS = [
    "Mary went to the store", "John gave a drink", "Mary and John had a drink", "the book and the ring",
    "Tom had a ring", "the store and a book", "Anna went to the dog", "a drink for Mary and John",
    "John went", "Anna gave the book to Tom", "Tom and Anna", "the dog had a drink",
]  # fmt: skip
LABELS = ["people", "things"] * 6
ANSWERS = [(" Mary", " John")] * len(TEXTS)


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def biased_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    a, b = x - x.mean(0), y - y.mean(0)
    return float((a.T @ b).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm()))


def uniform(p: np.ndarray, draws: int) -> bool:
    """Whether p-values of (hits + 1) / (draws + 1) are from a uniform distribution (Kolmogorov-Smirnov)."""
    jitter = np.random.default_rng(0).random(p.shape) / (draws + 1)
    return stats.kstest((p - jitter).ravel(), "uniform").pvalue > 0.01


@pytest.mark.parametrize("measure", MEASURES)
def test_a_thing_is_like_itself(measure: core.Measure) -> None:
    x = gaussian(40, 12) + 3
    assert similarity(x, x, measure) == pytest.approx(1.0, abs=1e-5)
    assert similarity(x, 7.5 * x, measure) == pytest.approx(1.0, abs=1e-5)
    rotation = torch.linalg.qr(gaussian(12, 12, seed=1)).Q
    other = x @ gaussian(12, 12, seed=2) + gaussian(40, 12, seed=3)
    value = similarity(x, other, measure)
    assert abs(value) < 0.95
    if measure == "cosine":  # both turned
        assert similarity(x @ rotation, other @ rotation, measure) == pytest.approx(value, abs=1e-5)
    else:
        assert similarity(x @ rotation, other, measure) == pytest.approx(value, abs=1e-5)
        assert similarity(x, 3 * other @ torch.linalg.qr(gaussian(12, 12, seed=4)).Q, measure) == pytest.approx(
            value, abs=1e-5
        )
    if measure == "cka":
        assert similarity(x + 100, other - 7, measure) == pytest.approx(value, abs=1e-4)


def test_cka_is_debiased() -> None:
    pairs = [(gaussian(20, 200, seed=2 * i), gaussian(20, 100, seed=2 * i + 1)) for i in range(100)]
    debiased = [similarity(x, y, "cka") for x, y in pairs]
    assert abs(np.mean(debiased)) < 3.5 * np.std(debiased) / 10
    assert np.mean([biased_cka(x, y) for x, y in pairs]) > 0.8


def test_cka_by_hand() -> None:
    """The unbiased HSIC is a mean over all ordered choices of four units (Song et al. 2012)."""
    x, y = gaussian(7, 4), gaussian(7, 3, seed=1)
    y[:, 0] += x[:, 0]

    def hsic(one: torch.Tensor, other: torch.Tensor) -> float:
        k, m = (one @ one.T).numpy(), (other @ other.T).numpy()
        four = list(itertools.permutations(range(7), 4))
        return float(np.mean([k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q]) for i, j, q, r in four]))

    expected = hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y))
    assert similarity(x, y, "cka") == pytest.approx(expected, abs=1e-5)


def test_rsa_and_cosine_by_hand() -> None:
    x, y = gaussian(15, 6), gaussian(15, 6, seed=1)
    x[3] = x[4]  # a dissimilarity of 0, and ties
    x[5], x[6] = x[7], x[8]
    spearmanr: Any = stats.spearmanr
    expected = spearmanr(pdist(x.numpy(), "cosine").round(10), pdist(y.numpy(), "cosine").round(10)).statistic
    assert similarity(x, y, "rsa") == pytest.approx(expected, abs=1e-6)
    each = [float(a @ b / a.norm() / b.norm()) for a, b in zip(x, y, strict=True)]
    assert similarity(x, y, "cosine") == pytest.approx(np.mean(each), abs=1e-6)


@pytest.mark.parametrize("measure", MEASURES)
def test_all_pairs_of_sites_are_the_single_ones(measure: core.Measure, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = gaussian(3, 9, 5), gaussian(2, 9, 5, seed=1)
    y[1] += 2 * x[0]
    found = likeness(x, y, measure, draws=20)
    for i, j in itertools.product(range(3), range(2)):
        assert found.value[i, j] == pytest.approx(similarity(x[i], y[j], measure), abs=1e-6)
    matched = likeness(x[:2], y, measure, draws=20, matched=True)
    for name in ("value", "ci_low", "ci_high", "p", "null_mean", "null_high"):
        np.testing.assert_allclose(getattr(matched, name), np.diag(getattr(found, name)[:2]), atol=1e-5)
    kept = [[j for j in range(9) if j != i] for i in range(9)]
    left = np.array([similarity(x[0][rows], y[1][rows], measure) for rows in kept])
    z = np.arctanh(left)
    reach = stats.t.ppf(0.975, 8) * np.sqrt(8 / 9 * ((z - z.mean()) ** 2).sum())
    ends = np.tanh(np.arctanh(found.value[0, 1]) + np.array([-reach, reach]))
    np.testing.assert_allclose((found.ci_low[0, 1], found.ci_high[0, 1]), ends, atol=1e-4)
    monkeypatch.setattr(core, "AT_ONCE", 50)
    np.testing.assert_allclose(likeness(x, y, measure, draws=20).null_high, found.null_high, atol=1e-6)


@pytest.mark.parametrize("measure", MEASURES)
def test_p_is_uniform_under_the_null(measure: core.Measure) -> None:
    p = [
        likeness(gaussian(8, 12, 4, seed=2 * i), gaussian(8, 12, 4, seed=2 * i + 1), measure, draws=99, matched=True,
                 seed=i).p
        for i in range(10)
    ]  # fmt: skip
    assert uniform(np.stack(p), 99)
    x = gaussian(1, 30, 4)
    found = likeness(x, x + 0.3 * gaussian(1, 30, 4, seed=1), measure, draws=99)
    assert found.p.item() == 0.01 and found.null_high < found.ci_low < found.value < found.ci_high
    assert abs(found.null_mean.item()) < 0.1


def test_tokens_of_a_text_are_no_independent_units() -> None:
    """Ten texts of six units that are alike: p holds when texts are shuffled whole, and not when units are."""
    owner = np.repeat(np.arange(10), 6)
    p: dict[bool, list[np.ndarray]] = {True: [], False: []}
    for i in range(12):
        x, y = (
            gaussian(4, 10, 3, seed=100 + 2 * i + k).repeat_interleave(6, 1)
            + 0.3 * gaussian(4, 60, 3, seed=200 + 2 * i + k)
            for k in (0, 1)
        )
        for known, found in p.items():
            found.append(likeness(x, y, "cka", owner if known else None, draws=39, matched=True, seed=i).p)
    assert uniform(np.stack(p[True]), 39)
    assert (np.stack(p[False]) < 0.05).mean() > 0.2


def test_the_interval_covers() -> None:
    def sample(n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = gaussian(n, 6, seed=seed) * torch.tensor([3, 2, 1, 1, 1, 1])
        return x, x @ gaussian(6, 4, seed=9999) + 4 * gaussian(n, 4, seed=seed + 50_000)

    truth = np.mean([similarity(*sample(1500, 1000 + i), "cka") for i in range(4)])
    held = 0
    for seed in range(40):
        x, y = sample(40, seed)
        found = likeness(x[None], y[None], "cka", draws=0)
        held += bool(found.ci_low.item() <= truth <= found.ci_high.item())
    assert held >= 33  # of 40; 38 are expected


def test_constant_features_have_no_similarity() -> None:
    x, flat = gaussian(1, 8, 5), torch.full((1, 8, 5), 0.37)
    for measure in ("cka", "rsa"):
        found = likeness(x, flat, measure, draws=5)
        assert all(np.isnan(getattr(found, name)).all() for name in ("value", "ci_low", "p", "null_mean"))
    assert np.isnan(similarity(x[0], torch.zeros(8, 5), "cosine"))
    assert np.isnan(similarity(torch.eye(8), x[0], "cka"))  # all equally far apart
    few = likeness(x, x + gaussian(1, 8, 5, seed=1), "cka", np.repeat([0, 1, 2], [3, 3, 2]), draws=5)
    assert np.isfinite(few.value).all() and np.isnan(few.p).all() and np.isnan(few.ci_low).all()
    for x, y, measure, kind, said in (
        (gaussian(5, 2), gaussian(6, 2), "cka", ExamplesError, "5 units on one side and 6"),
        (gaussian(3, 2), gaussian(3, 2), "cka", ExamplesError, "4 units or more, and there are 3"),
        (gaussian(5, 2), gaussian(5, 3), "cosine", NeedsError, "2 and 3 dimensions"),
        (gaussian(5, 2), gaussian(5, 2), "cca", NeedsError, "must be one of cosine, cka, rsa"),
    ):
        with pytest.raises(kind, match=said):
            core._forms(x[None], y[None], measure)


# ---- layers


@pytest.mark.parametrize(
    "analyzer",
    [
        mi.Similarity(("resid_post", "attn_out.1"), Units(each="token"), most=15, draws=10, measures=("rsa", "cosine")),
        mi.GroupSimilarity(draws=50),
    ],
    ids=lambda a: a.name,
)
def test_the_contract(analyzer: mi.Analyzer) -> None:
    examples = mi.Examples.of(TEXTS[:6], LABELS[:6], ANSWERS[:6])
    check_analyzer(analyzer, examples, models=[tiny("qwen3", layers=2)], ties=("at_chance",))


def test_layers_by_hand(llama: mi.Model) -> None:
    found = mi.run(llama, TEXTS, mi.Similarity(units=Units("all"), draws=40), batch_size=5)
    features = []
    for layer in range(3):
        rows = [llama.trace(text, mi.sites.resid_post(layer))[mi.sites.resid_post(layer)][0, 1:] for text in TEXTS]
        features.append(torch.stack([row.mean(0) for row in rows]))
    data = found.data
    for measure, (i, j) in itertools.product(MEASURES, itertools.combinations_with_replacement(range(3), 2)):
        one = data.sel(measure=measure, layer=i, other_layer=j)
        assert float(one["similarity"]) == pytest.approx(similarity(features[i], features[j], measure), abs=1e-4)
        mirror = data.sel(measure=measure, layer=j, other_layer=i)
        for name in set(data.data_vars) - {"top_share"}:
            np.testing.assert_equal(one[name].values, mirror[name].values)
        assert np.isnan(float(one["q"])) == (i == j)
    assert found.meta["units"] == found.meta["units_seen"] == found.meta["texts"] == len(TEXTS)


def test_some_units_are_kept_whatever_the_batches(llama: mi.Model) -> None:
    asked = mi.Similarity(units=Units(each="token"), most=25, draws=5)
    first, second = (mi.run(llama, TEXTS, asked, batch_size=n) for n in (1, 12))
    whole = sum(len(ids) - 1 for ids in llama.tokenize(TEXTS).ids)
    assert first.meta["units"] == 25 and first.meta["units_seen"] == whole > 25
    np.testing.assert_allclose(first.data["similarity"], second.data["similarity"], atol=1e-5)
    other = mi.run(llama, TEXTS, mi.Similarity(units=Units(each="token"), most=25, draws=5, seed=1))
    assert not np.allclose(first.data["similarity"], other.data["similarity"], atol=1e-4)


def test_z_scores_are_those_of_the_units(llama: mi.Model) -> None:
    plain, scaled = (
        mi.run(llama, TEXTS, mi.Similarity("resid_post", measures=("cka", "cosine"), draws=5, standardize=way)).data
        for way in (False, True)
    )
    x, y = (llama.trace(TEXTS, site)[site].double() for site in ("resid_post.0@end", "resid_post.2@end"))
    np.testing.assert_allclose(plain["top_share"], scaled["top_share"])
    assert float(plain["top_share"][0]) == pytest.approx(float(x.var(0).max() / x.var(0).sum()), abs=1e-5)
    x, y = (torch.from_numpy(stats.zscore(side)) for side in (x, y))
    for measure in ("cka", "cosine"):
        value = float(scaled["similarity"].sel(measure=measure, layer=0, other_layer=2))
        assert value == pytest.approx(similarity(x, y, measure), abs=1e-4)  # type: ignore[arg-type]
        assert abs(value - float(plain["similarity"].sel(measure=measure, layer=0, other_layer=2))) > 1e-3
    assert not core.standardized(torch.ones(5, 3)).any()


def test_embeddings_of_one_token_are_constant(llama: mi.Model) -> None:
    texts = [f"{text}." for text in TEXTS]
    found = mi.run(llama, texts, mi.Similarity(("embed", "resid_post.0", "resid_post.2"), draws=5))
    assert found.meta["constant"] == ["embed@end"]
    data = found.data.sel(measure=["cka", "rsa"])
    assert data["similarity"].sel(site="embed@end").isnull().all()
    assert data["similarity"].sel(site="resid_post.2@end", other_site="resid_post.0@end").notnull().all()
    assert found.figure() is not None


def test_what_cannot_be_compared_is_refused(llama: mi.Model) -> None:
    for asked, kind, said in (
        (mi.Similarity(measures=()), NeedsError, "must be some of"),
        (mi.Similarity(most=3), NeedsError, "at least 4 units"),
        (mi.Similarity(("resid_post", "mlp_act")), NeedsError, "not equally wide"),
        (mi.Similarity("pattern"), NeedsError, "no vector for each token"),
    ):
        with pytest.raises(kind, match=said):
            mi.run(llama, TEXTS, asked)
    with pytest.raises(ExamplesError, match="4 units or more, and there are 3"):
        mi.run(llama, TEXTS[:3], mi.Similarity())
    with pytest.raises(NeedsError, match="measures of Similarity must be some of cosine, cka, rsa"):
        check_measures("Similarity", ["cca"])


# ---- groups


def test_groups_by_hand(llama: mi.Model) -> None:
    found = mi.run(llama, mi.Examples.of(TEXTS, LABELS), mi.GroupSimilarity(units=Units(each="token"), draws=50))
    site = mi.sites.resid_post(1)
    units = [(i, v / v.norm()) for i, text in enumerate(TEXTS) for v in llama.trace(text, site)[site][0, 1:]]
    means: dict[tuple[str, str], list[float]] = {}
    for (i, a), (j, b) in itertools.permutations(units, 2):
        if i != j:
            means.setdefault((LABELS[i], LABELS[j]), []).append(float(a @ b))
    data = found.data.sel(layer=1)
    for (a, b), values in means.items():
        cell = data["similarity"].sel(group=a, other_group=b)
        assert float(cell) == pytest.approx(np.mean(values), abs=1e-5)
    inside = np.mean([np.mean(means[name, name]) for name in ("people", "things")])
    assert float(data["gap"][0]) == pytest.approx(inside - np.mean(means["people", "things"]), abs=1e-5)
    assert data["texts"].values.tolist() == [6, 6]


def test_groups_that_differ_and_groups_that_do_not(llama: mi.Model) -> None:
    texts = [f"{name} went to the {place}" for name in ("Mary", "John") for place in ("store", "book", "ring", "dog")]
    labels = [text.split()[0] for text in texts]
    apart = mi.run(llama, mi.Examples.of(texts, labels), mi.GroupSimilarity("resid_post.0", Units(0), draws=400))
    assert (apart.data["gap"] > 0.1).all() and (apart.data["q"] < 0.05).all() and (apart.data["gap_ci_low"] > 0).all()
    x = gaussian(120, 12, 5)
    sums, counts = _pair_sums(x, torch.arange(12), 12)
    group = np.repeat([0, 1], 6)
    mine = np.eye(2)[group]
    means = np.einsum("tg,stu,uh->ghs", mine, sums, mine) / (mine.T @ counts @ mine)[..., None]
    gap = (means[0, 0] + means[1, 1]) / 2 - means[0, 1]
    assert uniform(mi.GroupSimilarity(draws=99)._p(sums, counts, group, 0, 1, gap), 99)


def test_texts_without_a_label_are_in_no_group(llama: mi.Model) -> None:
    """Groups and drift are as if these texts were not there, and they are counted."""
    more = [*TEXTS[:2], *TEXTS], [None, float("nan"), *LABELS]
    asked = mi.GroupSimilarity("resid_post.1", draws=50, standardize=True)
    found = mi.run(llama, mi.Examples.of(*more), asked)
    without = mi.run(llama, mi.Examples.of(TEXTS, LABELS), asked).data
    assert found.data["group"].values.tolist() == without["group"].values.tolist()
    for name in ("gap", "texts"):
        np.testing.assert_allclose(found.data[name], without[name], atol=1e-6)
    assert found.meta["unlabelled"] == 2 and found.meta["units"] == 12
    with pytest.raises(ExamplesError, match="takes 4 units with a label or more, and there are 3"):
        mi.run(llama, mi.Examples.of(TEXTS, [*LABELS[:3], *[None] * 9]), asked)
    other = tiny("llama", seed=1)
    drift = mi.studies.concept_drift(llama, mi.Examples.of(*more), other, draws=20)
    alone = mi.studies.concept_drift(llama, mi.Examples.of(TEXTS, LABELS), other, draws=20).data
    np.testing.assert_allclose(drift.data["drift"], alone["drift"], atol=1e-6)
    assert drift.meta["unlabelled"] == 2


def test_groups_that_are_none_are_refused(llama: mi.Model) -> None:
    for labels, said in (
        (None, "no labels"),
        (["same"] * 12, "two groups to compare"),
        (["alone", *["same"] * 11], "'alone' has one text"),
    ):
        with pytest.raises(ExamplesError, match=said):
            mi.run(llama, mi.Examples.of(TEXTS, labels), mi.GroupSimilarity())


# ---- two models


def test_a_model_compared_with_itself_and_with_a_wider_one(llama: mi.Model) -> None:
    again = mi.studies.compare_representations(llama, llama, TEXTS, draws=10)
    inside = mi.run(llama, TEXTS, mi.Similarity(draws=10))
    np.testing.assert_allclose(again.data["similarity"], inside.data["similarity"], atol=1e-6)
    assert (again.data["p"].sel(measure="cosine").values.diagonal() <= 0.2).all()
    wide = tiny("qwen3", layers=2, hidden_size=48, words=["zebra quagga"])
    assert wide.tokenizer.get_vocab() != llama.tokenizer.get_vocab()
    words = [[(m.start(), m.end()) for m in re.finditer(r"\S+", text)][1:] for text in TEXTS]
    examples = mi.Examples.of(TEXTS).with_category("word", words)
    found = mi.studies.compare_representations(llama, wide, examples, units=Units(each="word"), draws=10)
    assert found.data["measure"].values.tolist() == ["cka", "rsa"]
    assert found.data["similarity"].shape == (2, 3, 2) and found.meta["units"] == sum(map(len, words))
    assert found.meta["passes"]["forward"] == 2 and "tiny-qwen3" in found.meta["model"]
    assert found.figure() is not None
    odd = mi.studies.compare_representations(llama, wide, TEXTS, sites="resid_post.1", other_sites="embed", draws=5)
    assert odd.data["similarity"].dims == ("measure", "site", "other_site")
    with pytest.raises(NeedsError, match="32 and 48 dimensions"):
        mi.studies.compare_representations(llama, wide, TEXTS, measures=["cosine"])
    other = tiny("llama", vocab_size=800)
    other.tokenizer.add_tokens(["went to"])
    with pytest.raises(AlignmentError, match="text 0 has other tokens"):
        mi.studies.compare_representations(llama, other, TEXTS, units=Units(each="token"))


def test_a_direction_that_does_not_drift_and_one_that_does(llama: mi.Model) -> None:
    openings = ("Mary gave", "Tom had", "John and", "for Mary", "to a", "with the")
    texts = [f"{opening} {word}" for opening, word in itertools.product(openings, ("book", "ring", "Anna", "dog"))]
    changed = tiny("llama")
    token = changed.tokenize(" Anna").ids[0][0]
    weight = changed.hf.get_input_embeddings().weight
    with torch.no_grad():
        weight[token] = gaussian(32).float()  # one word has changed its meaning
    thing, person = ([text for text in texts if text.split()[-1] in some] for some in (("book", "ring"), ("dog",)))
    same = mi.studies.concept_drift(
        llama, mi.Examples.of(thing + person, ["thing"] * 12 + ["animal"] * 6), changed, draws=50
    ).data
    np.testing.assert_allclose(same["drift"], 0, atol=1e-6)
    np.testing.assert_allclose(same["p"], 1)
    texts = [text for text in texts if text.split()[-1] in ("book", "Anna")]
    examples = mi.Examples.of(texts, ["thing", "person"] * 6)
    sites = ("embed", "resid_post.1")
    found = mi.studies.concept_drift(llama, examples, changed, sites=sites, draws=200)
    x, y = (torch.stack([m.trace(t, "resid_post.1")["resid_post.1"][0, -1] for t in texts]) for m in (llama, changed))
    first, second = (v[1::2].mean(0) - v[::2].mean(0) for v in (x, y))
    cosine = float(torch.cosine_similarity(first, second, dim=0))
    data = found.data
    assert float(data["drift"][1]) == pytest.approx(1 - cosine, abs=1e-4)
    assert (data["q"] < 0.05).all() and (data["null_high"] < data["drift"]).all()
    assert ((data["ci_low"] <= data["drift"]) & (data["drift"] <= data["ci_high"])).all()
    assert found.meta["concept"] == "person - thing" and found.figure() is not None


def test_a_concept_in_two_groups_of_texts(llama: mi.Model) -> None:
    first, second = (mi.Examples.of(TEXTS[i : i + 6], LABELS[i : i + 6]) for i in (0, 6))
    data = mi.studies.concept_drift(llama, first, second, units=Units(each="token"), draws=20).data
    assert data["drift"].notnull().all() and (data["p"] > 0).all()
    label, side = np.tile([False, True], 12), np.repeat([0, 1], 12)
    p = []
    for seed in range(4):
        x, rng = gaussian(30, 24, 6, seed=seed), np.random.default_rng(seed)
        x[:, 12:] += 4  # where a group lies is not what its labels differ in
        x = torch.cat([_balanced(x[:, :12], label[:12]), _balanced(x[:, 12:], label[12:])], 1)
        whole = _cosines(x, label, (side == 0)[None])[0]
        null = _cosines(x, label, _dealt(label, side, False, 99, rng))
        p.append((1 + (null <= whole + 1e-9).sum(0)) / 100)
    assert uniform(np.stack(p), 99)
    dealt = _dealt(label, side, True, 50, np.random.default_rng(0))
    assert (dealt[:, :12] != dealt[:, 12:]).all() and 0.4 < dealt.mean() < 0.6
    cases: list[tuple[Any, Any, str]] = [
        (mi.Examples.of(TEXTS), llama, "two labels differ in"),
        (mi.Examples.of(TEXTS, ["a", "b", "c"] * 4), llama, "two labels differ in"),
        (first, mi.Examples.of(TEXTS[6:], ["x", "y"] * 3), "the same two in both"),
        (mi.Examples.of(TEXTS[:3], LABELS[:3]), llama, "'things' has one text only"),
    ]
    for examples, other, said in cases:
        with pytest.raises(ExamplesError, match=said):
            mi.studies.concept_drift(llama, examples, other)
    with pytest.raises(NeedsError, match="a drift takes the same in both"):
        mi.studies.concept_drift(llama, first, tiny("llama", layers=2))
