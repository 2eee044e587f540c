"""AUROC, its test and its interval, against scikit-learn, scipy, permutations and simulation."""

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from mechinterp.core.ranking import auroc, auroc_interval, separate
from mechinterp.core.statistics import fdr


def features(n: int, cells: int, seed: int = 0) -> np.ndarray:
    """Values with many ties, of which one column is constant."""
    values = np.random.default_rng(seed).normal(size=(n, cells)).astype(np.float32)
    values[:, ::3] = values[:, ::3].round()
    values[:, 1] = 2.5
    return values


def test_auroc_is_that_of_scikit_learn_and_of_separate() -> None:
    rng = np.random.default_rng(0)
    scores, truth = rng.integers(0, 5, 40).astype(float), rng.random(40) < 0.4
    assert auroc(scores, truth) == pytest.approx(roc_auc_score(truth, scores))
    assert auroc(scores, truth) == pytest.approx(separate(scores[:, None], np.arange(40), truth[None]).auroc.item())
    assert np.isnan(auroc(scores, np.ones(40, bool)))


def test_against_scikit_learn_and_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    """All features at once, in blocks that do not divide them, for several labels."""
    monkeypatch.setattr("mechinterp.core.ranking.CELLS_AT_ONCE", 4)
    values, rng = features(40, 11), np.random.default_rng(1)
    labels = rng.integers(0, 3, 40)
    chosen = np.stack([labels == k for k in range(3)])
    found = separate(values, np.arange(40), chosen)
    for k in range(3):
        for j in range(11):
            inside, rest = (values[some, j].astype(float) for some in (chosen[k], ~chosen[k]))
            assert found.auroc[k, j] == pytest.approx(roc_auc_score(chosen[k], values[:, j]), abs=1e-12)
            if j == 1:
                assert np.isnan([found.p[k, j], found.correlation[k, j], found.correlation_p[k, j]]).all()
                continue
            ranked = stats.mannwhitneyu(inside, rest, use_continuity=False, method="asymptotic")
            assert found.p[k, j] == pytest.approx(ranked.pvalue, rel=1e-9)
            r = stats.pointbiserialr(chosen[k], values[:, j].astype(float))
            assert found.correlation[k, j] == pytest.approx(r.statistic, abs=1e-12)
            assert found.correlation_p[k, j] == pytest.approx(r.pvalue, rel=1e-6)


def test_texts_of_many_units_against_shuffled_labels() -> None:
    """The variance is exact: over all ways to give four of eight texts the label."""
    import itertools

    text = np.repeat(np.arange(8), [3, 1, 2, 5, 1, 2, 4, 2])
    values = features(len(text), 6, seed=2) + np.random.default_rng(3).normal(size=8)[text, None]
    ranks = stats.rankdata(values, axis=0)
    ways = [np.isin(np.arange(8), some) for some in itertools.combinations(range(8), 4)]
    sums = np.array([(ranks[way[text]] - ranks.mean(0)).sum(0) for way in ways])
    observed = separate(values, text, ways[5][None])
    np.testing.assert_allclose(sums.mean(0), 0, atol=1e-9)
    z = sums[5] / sums.std(0)
    np.testing.assert_allclose(observed.p[0], 2 * stats.norm.sf(np.abs(z)), rtol=1e-9)
    inside = ways[5][text]
    for j in range(6):
        assert observed.auroc[0, j] == pytest.approx(roc_auc_score(inside, values[:, j]), abs=1e-12)


@pytest.mark.parametrize("units", [1, 6])
def test_shuffled_labels_are_rarely_significant(units: int) -> None:
    """Heavy tails and correlated features, unequal groups; units of a text alike: any q < .05 in at most 5% of runs."""
    rng = np.random.default_rng(4)
    runs, m, cells = 150, 40, 120
    text = np.repeat(np.arange(m), units)
    hits = 0
    for _ in range(runs):
        shared = rng.standard_t(2, size=(m, 1))
        values = rng.standard_t(2, size=(m, cells)) + shared
        values = values[text] + 0.2 * rng.normal(size=(m * units, cells))
        chosen = rng.permutation(m)[None] < 12
        hits += bool((fdr(separate(values, text, chosen).p) < 0.05).any())
    assert hits <= stats.binom.ppf(0.995, runs, 0.05)


def test_a_difference_is_found() -> None:
    rng = np.random.default_rng(5)
    values = rng.normal(size=(60, 500))
    chosen = np.arange(60)[None] < 30
    values[:30, 123] += 3
    q = fdr(separate(values, np.arange(60), chosen).p)[0]
    assert q[123] < 1e-4 and (np.delete(q, 123) < 0.05).sum() <= 3


def test_the_interval_inverts_its_test() -> None:
    auroc, m, n = np.array([0.5, 0.7, 0.93, 1.0, 0.0]), 12.0, 20.0
    low, high = auroc_interval(auroc, m, n)
    for end, inside in ((low, slice(0, 4)), (high, [0, 1, 2, 4])):  # no lower end below 0, nor upper above 1
        at = end[inside]
        inner = (m + n) / 2 - 1
        variance = at * (1 - at) * (1 + inner * ((1 - at) / (2 - at) + at / (1 + at))) / (m * n)
        np.testing.assert_allclose((auroc[inside] - at) ** 2, 1.959964**2 * variance, atol=1e-7)
    assert (low[3], high[3]) == (pytest.approx(0.8, abs=0.1), 1.0)
    assert (low <= auroc).all() and (auroc <= high).all() and low[4] == 0
    np.testing.assert_allclose(auroc_interval(1 - auroc, n, m)[0], 1 - high, atol=1e-12)
    assert np.isnan(auroc_interval(np.array([np.nan]), 3.0, 4.0)).all()


def test_the_interval_covers() -> None:
    rng = np.random.default_rng(6)
    true = stats.norm.cdf(1.2 / np.sqrt(2))
    chosen = np.arange(25)[None] < 10
    values = rng.normal(size=(25, 4000)) + 1.2 * chosen.T
    auroc = separate(values, np.arange(25), chosen).auroc[0]
    low, high = auroc_interval(auroc, 10.0, 15.0)
    assert 0.93 <= ((low <= true) & (true <= high)).mean() <= 0.98
