"""Permutation tests and effect sizes: exact values, what the smallest p can reach, error rates on real attention."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

import mechinterp as mi
from mechinterp.core import statistics
from mechinterp.core.statistics import compare_groups, largest_p, rank_p, summarize

RUNS = 200


@pytest.mark.parametrize("sizes", [(5, 7), (6, 6), (3, 9)])
def test_small_groups_are_compared_exactly(sizes: tuple[int, int]) -> None:
    """Against scipy, which tries every split, with Welch's t."""
    rng = np.random.default_rng(0)
    one, two = rng.normal(0.8, 1.0, (sizes[0], 3, 2)), rng.normal(0.0, 2.0, (sizes[1], 3, 2))
    got = compare_groups(one, two, resamples=20_000)

    def welch(a: np.ndarray, b: np.ndarray) -> float:
        return abs(float(stats.ttest_ind(a, b, equal_var=False).statistic))

    for cell in ((0, 0), (1, 1), (2, 0)):
        x, y = one[(slice(None), *cell)], two[(slice(None), *cell)]
        exact = stats.permutation_test((x, y), welch, alternative="greater", n_resamples=np.inf, vectorized=False)
        assert got.p[cell] == pytest.approx(exact.pvalue, abs=1e-9)
        assert got.difference[cell] == pytest.approx(x.mean() - y.mean())
        pooled = math.sqrt(((len(x) - 1) * x.var(ddof=1) + (len(y) - 1) * y.var(ddof=1)) / (len(x) + len(y) - 2))
        assert got.d[cell] == pytest.approx((x.mean() - y.mean()) / pooled)
        resampled = stats.bootstrap(
            (x, y), lambda a, b, axis: a.mean(axis) - b.mean(axis), method="percentile", n_resamples=20_000, rng=1
        ).confidence_interval
        assert got.ci_low[cell] == pytest.approx(resampled.low, abs=0.1)
        assert got.ci_high[cell] == pytest.approx(resampled.high, abs=0.1)
    np.testing.assert_allclose(got.q.ravel(), stats.false_discovery_control(got.p.ravel()))
    assert got.least_p[0, 0] == (2 if sizes[0] == sizes[1] else 1) / math.comb(sum(sizes), sizes[0])


def test_groups_have_no_order_but_for_the_sign() -> None:
    rng = np.random.default_rng(1)
    one, two = rng.normal(0.4, 1.0, (6, 40)), rng.normal(0.0, 1.0, (8, 40))
    forth, back, moved = compare_groups(one, two), compare_groups(two, one), compare_groups(one * 3 + 5, two * 3 + 5)
    np.testing.assert_allclose(forth.p, back.p)
    np.testing.assert_allclose(forth.d, -back.d)
    np.testing.assert_allclose(forth.difference, -back.difference)
    np.testing.assert_allclose(moved.p, forth.p)
    np.testing.assert_allclose(moved.d, forth.d)


def test_the_interval_of_d_holds_d() -> None:
    rng = np.random.default_rng(2)
    cells = 4000
    got = compare_groups(rng.normal(0.5, 1.0, (20, cells)), rng.normal(0.0, 1.0, (30, cells)), resamples=2)
    assert np.mean((got.d_ci_low < 0.5) & (got.d_ci_high > 0.5)) == pytest.approx(0.95, abs=0.012)


def test_values_without_spread_and_values_that_are_missing() -> None:
    one, two = np.ones((5, 6)), np.ones((4, 6))
    two[:, 1] = 2.0  # differ, and have no spread
    one[:4, 2] = np.nan  # one value left
    one[:, 3] = np.nan
    two[0, 4] = np.nan  # 5 + 3
    two[0, 5] = 1.5
    got = compare_groups(one, two)
    assert got.p[0] == 1 and got.d[0] == 0
    assert got.p[1] == pytest.approx(1 / math.comb(9, 4)) and np.isnan(got.d[1])
    assert np.isnan(got.p[2:4]).all() and got.difference[2] == 0 and np.isnan(got.difference[3])
    assert got.least_p[4] == 1 / math.comb(8, 5)
    assert got.p[5] == 1  # whoever holds the one other value, t is 1
    with pytest.raises(ValueError, match=r"cells of shapes \(6,\) and \(5,\)"):
        compare_groups(one, two[:, :5])


def test_a_lone_cell_of_many_can_be_found() -> None:
    """Under 1,350 tests a p of 1 in 2,001 is a q of .67, however large the effect."""
    rng = np.random.default_rng(3)
    values = rng.normal(size=(30, 1350))
    values[:, 7] += 3.0
    alone = summarize(values)
    assert alone.q[7] < 0.05 and (np.delete(alone.q, 7) > 0.05).all()
    compared = compare_groups(values, rng.normal(size=(30, 1350)))
    assert compared.reachable
    assert compared.q[7] < 0.05 and (np.delete(compared.q, 7) > 0.05).all()


def test_too_few_splits_are_said() -> None:
    rng = np.random.default_rng(4)
    few = compare_groups(rng.normal(5.0, 1.0, (3, 100)), rng.normal(0.0, 1.0, (4, 100)))
    assert few.least_p[0] == 1 / 35
    assert not few.reachable
    assert compare_groups(rng.normal(size=(3, 1)), rng.normal(size=(4, 1))).reachable


@pytest.mark.parametrize("test", ["signs", "groups"])
def test_sequential_p_is_no_smaller_than_it_should_be(test: str) -> None:
    """Under the null, P(p <= a) <= a down to p-values that only cells that go on can have."""
    rng = np.random.default_rng(5)
    values = rng.normal(size=(40, 20_000))
    p = summarize(values, resamples=2).p if test == "signs" else compare_groups(*np.split(values, 2), resamples=2).p
    assert (p > 0).all()
    for level in (0.5, 0.05, 0.01, 0.005, 0.001, 0.0002):
        assert np.mean(p <= level) == pytest.approx(level, abs=4 * math.sqrt(level / len(p)))


def test_more_draws_are_made_only_where_they_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(6).normal(size=(30, 500))
    values[:, :5] += 3.0
    drawn: list[tuple[int, int]] = []
    as_extreme = statistics._as_extreme

    def counted(some: np.ndarray, observed: np.ndarray) -> np.ndarray:
        drawn.append(some.shape)
        return as_extreme(some, observed)

    monkeypatch.setattr(statistics, "_as_extreme", counted)
    p = summarize(values, resamples=2).p
    assert p[:5].max() < 0.05 / 500
    assert 10_000 <= sum(draws for draws, _ in drawn) <= 20_000  # 200 × 500 over 5 cells, or over some more by chance
    assert sum(draws * cells for draws, cells in drawn) < 1.3 * 2_000 * 500


@pytest.fixture(scope="module")
def shares(smollm2: mi.Model) -> np.ndarray:
    """Attention of the last token to two categories, ``example layer head category``, in 60 texts."""
    rng = np.random.default_rng(7)
    words = {
        "up": ["rise", "gain", "growth", "profit", "record high"],
        "down": ["fall", "loss", "decline", "debt", "record low"],
    }
    frame = "Analysts of the {} bank saw a {} in {} after the {}, while the {} of its rival came with a {}. Shares will"
    texts = [
        frame.format(
            rng.choice(["large", "small", "old", "new", "local"]),
            rng.choice(words["up"]),
            rng.choice(["May", "June", "spring", "summer", "winter"]),
            rng.choice(words["down"]),
            rng.choice(["report", "statement", "plan", "forecast"]),
            rng.choice(words["up"] + words["down"]),
        )
        for _ in range(60)
    ]
    examples = mi.Examples.of(texts).categorize(mi.Vocabulary.of(words))
    each = mi.run(smollm2, examples, mi.AttentionByCategory(statistics=False), batch_size=20)
    return each.data["share"].transpose("example", "layer", "head", "category").values.astype(float)


def test_type_one_error_on_real_attention(shares: np.ndarray) -> None:
    """Groups drawn at random differ in any of 540 cells in no more than 5% of runs, and sampling error."""
    found = 0
    for run in range(RUNS):
        order = np.random.default_rng(run).permutation(60)
        found += bool((compare_groups(shares[order[:30]], shares[order[30:]], run, resamples=2).q < 0.05).any())
    print(f"any q < .05 in {found} of {RUNS} runs with shuffled groups")
    assert found / RUNS <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / RUNS)


def test_power_on_real_attention(shares: np.ndarray) -> None:
    """A difference of one standard deviation in one category, at every head, is found in 95% of runs.

    As cells of q < .05 and as a category. In the other category, where nothing was planted, the cells' false discovery
    rate allows for some among the many true ones, and only the test of whole categories stays at 5%.
    """
    found, category, elsewhere, wrong = 0, 0, 0, 0
    for run in range(RUNS):
        order = np.random.default_rng(run).permutation(60)
        one, two = shares[order[:30]].copy(), shares[order[30:]]
        one[..., 0] += shares[..., 0].std(0, ddof=1)
        hit = compare_groups(one, two, run, resamples=2).q < 0.05
        found += bool(hit[..., 0].any())
        elsewhere += int(hit[..., 1].sum())
        whole = largest_p(one, two, run, draws=1000)
        category += bool(whole[0] < 0.05)
        wrong += bool(whole[1] < 0.05)
    print(f"planted: cells in {found}, category in {category} of {RUNS} runs; other: {elsewhere} cells, {wrong} runs")
    assert found / RUNS >= 0.95
    assert category / RUNS >= 0.95
    assert wrong / RUNS <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / RUNS)
    assert elsewhere / RUNS / 270 < 0.05


def test_a_lone_difference_of_one_standard_deviation_is_mostly_missed() -> None:
    """What docs/attention.md says of 30 + 30 examples and 540 cells."""
    found, runs = 0, RUNS // 4
    for run in range(runs):
        rng = np.random.default_rng(run)
        one, two = rng.normal(size=(30, 540)), rng.normal(size=(30, 540))
        one[:, 0] += 1.0
        found += bool(compare_groups(one, two, run, resamples=2).q[0] < 0.05)
    print(f"one cell of 540 with d = 1.0 found in {found} of {runs} runs")
    assert 0.15 < found / runs < 0.6


def test_the_largest_of_many_against_scipy() -> None:
    """One p a category, of the largest t over its cells, with an example missing in some."""
    rng = np.random.default_rng(8)
    one, two = rng.normal(0.5, 1.0, (5, 3, 4, 2)), rng.normal(0.0, 1.0, (6, 3, 4, 2))
    one[0, 1, :, 0] = np.nan
    one[..., 1] = 1.0
    two[..., 1] = 1.0

    whole = np.concatenate([one, two])[..., 0].reshape(11, 12)

    def largest(rows: tuple[int, ...]) -> float:
        others = [i for i in range(11) if i not in rows]
        t = stats.ttest_ind(whole[list(rows)], whole[others], equal_var=False, nan_policy="omit").statistic
        return float(np.abs(t).max())

    drawn = np.array([largest(rows) for rows in itertools.combinations(range(11), 5)])
    got = largest_p(one, two)
    assert got[0] == pytest.approx(np.mean(drawn >= largest((0, 1, 2, 3, 4)) * (1 - 1e-9)))
    assert got[1] == 1
    assert np.isnan(largest_p(one[:1], two)).all()


def test_a_rank_among_random_draws() -> None:
    """One of n + 1 alike has every rank as often; what is alone stands at 1 / (n + 1); a hole is NaN."""
    rng = np.random.default_rng(0)
    draws = rng.exponential(size=(20, 4000)) ** 2  # skewed: the mean is far from the median
    p = rank_p(draws[0], draws[1:])
    assert set(np.round(20 * p).astype(int).tolist()) <= set(range(1, 21))
    assert stats.kstest(p - rng.random(4000) / 20, "uniform").pvalue > 0.01
    np.testing.assert_allclose(rank_p([9.0, -9.0, 0.0], np.zeros((99, 3))), [0.01, 0.01, 1])
    np.testing.assert_allclose(rank_p([1.0, 9.0], [[np.nan, 0.0], [2.0, 0.0]]), [np.nan, 1 / 3])
