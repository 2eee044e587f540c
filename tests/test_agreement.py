"""Agreement of explanations: values by hand, symmetry, identity, and what chance gives."""

from itertools import permutations
from typing import Any

import numpy as np
import pytest
import xarray as xr
from scipy import stats

import mechinterp as mi
from mechinterp.errors import ExamplesError, NeedsError
from mechinterp.report.panels import panel
from mechinterp.studies import attribution_agreement, compare_attributions

RNG = np.random.default_rng(0)
ROWS = [RNG.normal(size=n) for n in (12, 15, 20, 13, 11, 16, 14)]
OTHER = [row + RNG.normal(size=len(row)) for row in ROWS]


def by(result: mi.Result, name: str, axis: str) -> dict[str, float]:
    return result.data[name].to_series().to_dict() if axis in result.data[name].dims else {}


def result_of(words: list[list[str]], values: list[list[float]]) -> mi.Result:
    wide = max(map(len, words))
    padded = [row + [np.nan] * (wide - len(row)) for row in values]
    texts = [row + [""] * (wide - len(row)) for row in words]
    axes = ("example", "word_number")
    return mi.Result(xr.Dataset({"word_attribution": (axes, padded), "word": (axes, texts)}))


def test_values_by_hand() -> None:
    found = compare_attributions([[1.0, -3.0, 0.0, 4.0]], [[2.0, 2.0, 2.0, 2.0]])
    first, second = by(found, "first", "measure"), by(found, "second", "measure")
    shares = np.array([1, 3, 4]) / 8
    # Σ (2i - n - 1) x_i / (n Σ x) of 0, 1, 3, 4: (-3·0 - 1·1 + 1·3 + 3·4) / 32
    assert first == pytest.approx(
        {"mean_attribution": 0.5, "mean_size": 2.0, "gini": 14 / 32, "entropy": -(shares * np.log(shares)).sum()}
    )
    assert second == pytest.approx({"mean_attribution": 2.0, "mean_size": 2.0, "gini": 0.0, "entropy": np.log(4)})
    agreed = by(found, "value", "agreement")
    assert agreed["cosine"] == pytest.approx(4 / (np.sqrt(26) * 4))
    assert np.isnan(agreed["spearman"]) and np.isnan(agreed["top_5"])  # all are equal; four words
    assert found.data["examples"].values.tolist() == [1, 0, 0, 0]
    one_word = compare_attributions([[0.0, 0.0, 5.0, 0.0]], [[0.0, 1.0, 0.0, 0.0]]).data["first"]
    assert float(one_word.sel(measure="gini")) == pytest.approx(3 / 4)
    assert float(one_word.sel(measure="entropy")) == 0


def test_differences_are_of_pairs() -> None:
    found = compare_attributions(ROWS, OTHER)
    sizes = np.array([[np.abs(a).mean(), np.abs(b).mean()] for a, b in zip(ROWS, OTHER, strict=True)])
    gap = sizes[:, 0] - sizes[:, 1]
    row = found.table().set_index("measure").loc["mean_size"]
    assert row["first"] == pytest.approx(sizes[:, 0].mean())
    assert row["difference"] == pytest.approx(gap.mean())
    assert row["d"] == pytest.approx(gap.mean() / gap.std(ddof=1))
    assert row["ci_low"] < row["difference"] < row["ci_high"]
    assert row["d_ci_low"] < row["d"] < row["d_ci_high"]
    np.testing.assert_allclose(found.data["first_each"].sel(measure="mean_size"), sizes[:, 0])
    swapped = compare_attributions(OTHER, ROWS)
    for name in ("difference", "d"):
        np.testing.assert_allclose(found.data[name], -swapped.data[name])
    np.testing.assert_allclose(found.data["value"], swapped.data["value"])
    spearmanr: Any = stats.spearmanr
    spearman = [spearmanr(a, b).statistic for a, b in zip(ROWS, OTHER, strict=True)]
    np.testing.assert_allclose(found.data["agreement_each"].sel(agreement="spearman"), spearman)
    tops = [
        len({*np.argsort(-np.abs(a))[:5]} & {*np.argsort(-np.abs(b))[:5]}) / 5 for a, b in zip(ROWS, OTHER, strict=True)
    ]
    np.testing.assert_allclose(found.data["agreement_each"].sel(agreement="top_5"), tops)


def test_what_is_identical_agrees_wholly() -> None:
    tied = [np.round(row) for row in ROWS]
    for rows in (ROWS, tied, [row * (1 + 1e-15) for row in ROWS]):
        found = compare_attributions(ROWS if rows is not tied else tied, rows)
        np.testing.assert_allclose(found.data["value"], 1)
        np.testing.assert_array_equal(found.data["difference"], 0)
        np.testing.assert_array_equal(found.data["d"], 0)
    opposite = compare_attributions(ROWS, [-row for row in ROWS]).data["value"]
    np.testing.assert_allclose(opposite, [-1, -1, 1, 1])


def test_chance_is_the_mean_over_all_orders() -> None:
    a, b = [3.0, -1.0, 0.5, 0.5, 0.0], [1.0, 0.0, 4.0, -1.5, 1.0]
    orders = list(permutations(b))
    both = {"a": [a] * len(orders), "b": [list(order) for order in orders]}
    found = attribution_agreement(both, planted=[[0, 1]] * len(orders))
    row = found.table().set_index(["method", "other"]).loc[("a", "b")]
    for kind in ("cosine", "spearman", "top_overlap"):
        assert row[f"{kind}_chance"] == pytest.approx(row[kind], abs=1e-9), kind
    table = found.table("planted_overlap").set_index("method")
    assert table.loc["b", "planted_overlap"] == pytest.approx(table.loc["b", "planted_overlap_chance"])
    assert table.loc["a", "planted_overlap"] == 1


def test_unrelated_explanations_are_at_chance() -> None:
    rng = np.random.default_rng(1)
    one, two = ([rng.normal(size=14) for _ in range(150)] for _ in range(2))
    found = compare_attributions(one, two).data
    assert np.abs(found["value"] - found["chance"]).max() < 0.05
    assert abs(float(found["chance"].sel(agreement="top_5")) - 5 / 14) < 1e-9


def test_agreement_is_symmetric() -> None:
    methods = {"one": ROWS, "two": OTHER, "three": [row**2 for row in ROWS]}
    found = attribution_agreement(methods)
    for kind in ("cosine", "spearman", "top_overlap"):
        matrix = found.data[kind].values
        np.testing.assert_allclose(matrix, matrix.T)
        np.testing.assert_allclose(np.diag(matrix), 1)
        low, high = found.data[f"{kind}_ci_low"].values, found.data[f"{kind}_ci_high"].values
        assert ((low <= matrix + 1e-9) & (matrix <= high + 1e-9)).all()
        assert matrix[0, 1] < 1
    assert len(found.table()) == 9
    for view in found.views:
        panel(found, view)


def test_planted_words() -> None:
    rows = {"finds": [[5.0, 0.1, -4.0, 3.0, 0.2]], "misses": [[0.0, 3.0, 0.0, 2.0, 4.0]]}
    table = attribution_agreement(rows, planted=[{0, 2, 3}]).table("planted_overlap").set_index("method")
    assert table["planted_overlap"].tolist() == pytest.approx([1, 1 / 3])
    assert table["planted_overlap_chance"].tolist() == pytest.approx([3 / 5, 3 / 5])
    tied = attribution_agreement({"a": [[1.0] * 5], "b": [[2.0, 1.0, 1.0, 1.0, 1.0]]}, planted=[[0]])
    table = tied.table("planted_overlap").set_index("method")
    assert table["planted_overlap"].tolist() == pytest.approx([3 / 5, 1])  # a share of each of five that tie


def test_what_has_no_value_is_nan() -> None:
    found = attribution_agreement(
        {"a": [[0.0] * 5, [1.0] * 5], "b": [[1.0, 2.0, 3.0, 4.0, 5.0]] * 2}, planted=[[], [1]]
    )
    row = found.table().set_index(["method", "other"]).loc[("a", "b")]
    assert row["cosine_examples"] == 1 and row["spearman_examples"] == 0 and np.isnan(row["spearman"])
    assert row["top_overlap_examples"] == 1
    assert found.data["planted_overlap_examples"].values.tolist() == [1, 1]
    single = compare_attributions([[2.0]], [[3.0]])
    assert np.isnan(single.data["first"].sel(measure="gini")) and np.isnan(single.data["value"].sel(agreement="top_5"))


def test_results_of_token_attribution(llama: mi.Model) -> None:
    examples = mi.Examples.of(["the man saw the woman in the park", "Mary gave John a book"], answers=[(5, 9), (6, 7)])
    one, two = mi.run(
        llama,
        examples,
        [mi.TokenAttribution("grad-x-input", mi.logit_diff()), mi.TokenAttribution("saliency", mi.logit_diff())],
    )
    found = compare_attributions(one, two)
    words = one.table("word_attribution")
    expected = words.groupby("example")["word_attribution"].apply(lambda v: v.abs().mean())
    np.testing.assert_allclose(found.data["first_each"].sel(measure="mean_size"), expected, rtol=1e-6)
    lists: list[Any] = [g.tolist() for _, g in words.groupby("example")["word_attribution"]]
    assert compare_attributions(lists, two).data["value"].equals(found.data["value"])


def test_bad_input() -> None:
    with pytest.raises(ExamplesError, match="'first' have 1 examples and 'second' 2"):
        compare_attributions([[1.0]], [[1.0], [2.0]])
    with pytest.raises(ExamplesError, match="'first' of example 0 have 2 words and 'second' 1"):
        compare_attributions([[1.0, 2.0]], [[1.0]])
    with pytest.raises(ExamplesError, match="'second' of example 0 are not a list of finite numbers"):
        compare_attributions([[1.0]], [[float("inf")]])
    with pytest.raises(ExamplesError, match="of example 1 have no words"):
        compare_attributions([[1.0], [float("nan")]], [[1.0], [1.0]])
    with pytest.raises(ExamplesError, match="have no examples"):
        compare_attributions([], [])
    with pytest.raises(ExamplesError, match="has no word_attribution"):
        compare_attributions(mi.Result(xr.Dataset({"x": 1.0})), [[1.0]])
    with pytest.raises(ExamplesError, match=r"in example 0 .* the word 'bad' where 'second' have 'good'"):
        compare_attributions(result_of([["a", "bad"]], [[1.0, 2.0]]), result_of([["a", "good"]], [[1.0, 2.0]]))
    with pytest.raises(NeedsError, match="two attributions or more"):
        attribution_agreement({"a": [[1.0]]})
    with pytest.raises(NeedsError, match="top of attribution_agreement must be at least 1"):
        attribution_agreement({"a": [[1.0]], "b": [[1.0]]}, top=0)
    pair = {"a": [[1.0, 2.0]], "b": [[1.0, 2.0]]}
    with pytest.raises(ExamplesError, match="planted has 2 entries for 1 examples"):
        attribution_agreement(pair, planted=[[0], [1]])
    with pytest.raises(ExamplesError, match="example 0 has 2 words, counted from 0, and no word 2"):
        attribution_agreement(pair, planted=[[2]])
