"""Attention by word category: against Hugging Face's eager attention and loops by hand, and the laws it keeps."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

import mechinterp as mi
from mechinterp.analyzers.categories import category_statistics
from mechinterp.errors import ExamplesError
from mechinterp.testing import check_analyzer, tiny

PLACES = mi.Vocabulary.of(
    {"place": ["park", "store", "school", "garden"], "and": ["and"], "first": {"regexes": ["^."]}}
)


def texts(n: int = 6, **more: object) -> mi.Examples:
    """Sentences of different length; all have a place, and some of the other categories."""
    some = [
        "Mary and John went to the park and the garden, and",
        "John saw the store",
        "Then the school and the store and the school",
        "Mary went to the garden",
        "John and Mary and John and Mary in the park",
        "the park",
    ]
    return mi.Examples.of([some[i % 6] for i in range(n)], **more)  # pyright: ignore[reportArgumentType]


def by_hand(
    model: mi.Model, tokens: object, row: int, queries: list[int], categories: dict[str, set[int]], first_token: bool
) -> dict[str, np.ndarray]:
    """The numbers of one example from transformers' eager attention, query by query."""
    ids = torch.tensor([tokens.ids[row]])  # pyright: ignore[reportAttributeAccessIssue]
    model.hf.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            patterns = model.hf(ids, output_attentions=True).attentions
    finally:
        model.hf.set_attn_implementation("sdpa")
    layers, heads = len(patterns), patterns[0].shape[1]
    share = np.zeros((layers, heads, len(categories)))
    expected = np.zeros((layers, len(categories)))
    sink, entropy = np.zeros((layers, heads)), np.zeros((layers, heads))
    for layer, whole in enumerate(patterns):
        window = model.dims.windows[layer] or 10**6
        for q in queries:
            visible = range(max(0, q - window + 1), q + 1)
            p = whole[0, :, q].double().numpy()
            assert p[:, list(visible)].sum(1) == pytest.approx(1, abs=1e-5)
            for c, some in enumerate(categories.values()):
                seen = [k for k in visible if k in some and (k > 0 or first_token)]
                share[layer, :, c] += p[:, seen].sum(1) / len(queries)
                expected[layer, c] += len(seen) / len(visible) / len(queries)
            sink[layer] += p[:, 0] / len(queries)
            entropy[layer] += [-sum(x * math.log(x) for x in head if x > 0) / len(queries) for head in p]
    share[np.broadcast_to((expected == 0)[:, None], share.shape)] = np.nan
    expected[expected == 0] = np.nan
    return {"share": share, "expected": expected, "sink": sink, "entropy": entropy}


@pytest.mark.parametrize("queries", ["end", "all", 1, -2, "verb", "phrase"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_against_eager_attention_by_hand(model: mi.Model, queries: str | int, side: str) -> None:
    examples = texts(5)
    spans = {"phrase": [(0, len(str(t)) // 2) for t in examples.texts]}
    examples = mi.Examples.of(examples.texts, positions={"verb": [(5, 8)] * 5}, spans=spans).categorize(PLACES)
    tokens = model.tokenize(examples)
    first_token = queries == -2
    analyzer = mi.AttentionByCategory(queries=queries, statistics=False, first_token=first_token)
    data = mi.run(model, examples, analyzer, batch_size=3, padding_side=side).data
    for row in range(5):
        n = len(tokens.ids[row])
        chosen = {
            "end": [n - 1],
            "all": list(range(n)),
            1: [1],
            -2: [n - 2],
            "verb": [tokens.positions["verb"][row]],
            "phrase": list(range(*tokens.spans["phrase"][row])),
        }[queries]
        members = {
            name: {k for start, stop in column[row] for k in range(start, stop)}
            for name, column in tokens.categories.items()
        }
        wanted = by_hand(model, tokens, row, chosen, members, first_token)
        for name, value in wanted.items():
            axes = [a for a in ("layer", "head", "category") if a in data[name].dims]
            np.testing.assert_allclose(data[name].sel(example=row).transpose(*axes), value, atol=1e-5, err_msg=name)
        assert int(data["queries"][row]) == len(chosen)
        assert data["matches"].values[row].tolist() == [len(column[row]) for column in tokens.categories.values()]


def test_categories_that_cover_all_tokens_share_all_attention(model: mi.Model) -> None:
    generator = np.random.default_rng(0)
    ids = [generator.integers(2, model.dims.vocab, n).tolist() for n in (9, 4, 6)]
    examples = mi.Examples.of(ids)
    examples = examples.with_category("even", [[(i, i + 1) for i in range(0, len(t), 2)] for t in ids])
    examples = examples.with_category("odd", [[(i, i + 1) for i in range(1, len(t), 2)] for t in ids])
    for queries in ("end", "all"):
        apart = mi.run(model, examples, mi.AttentionByCategory(queries=queries, statistics=False)).data
        np.testing.assert_allclose(apart["share"].fillna(0).sum("category") + apart["sink"], 1, atol=1e-5)
        whole = mi.run(
            model, examples, mi.AttentionByCategory(queries=queries, statistics=False, first_token=True)
        ).data
        np.testing.assert_allclose(whole["share"].fillna(0).sum("category"), 1, atol=1e-5)
        np.testing.assert_allclose(whole["expected"].fillna(0).sum("category"), 1, atol=1e-6)


def test_uniform_attention_is_as_expected(model: mi.Model) -> None:
    """Without queries every score is zero: shares are those expected, and the entropy that of what is seen."""
    flat = tiny(next(family for family in _families() if model.name == f"tiny-{family}"))
    with torch.no_grad():
        for name, parameter in flat.hf.named_parameters():
            if "q_proj" in name or "q_norm" in name:
                parameter.zero_()
    for queries in ("end", "all"):
        data = mi.run(flat, texts().categorize(PLACES), mi.AttentionByCategory(queries=queries, statistics=False)).data
        expected = data["expected"].broadcast_like(data["share"]).transpose(*data["share"].dims)
        np.testing.assert_allclose(data["share"], expected, atol=1e-5)
        for row, n in enumerate(flat.tokenize(texts()).lengths):
            for layer, window in enumerate(flat.dims.windows):
                seen = [min(q + 1, window or n) for q in (range(n) if queries == "all" else [n - 1])]
                got = data["entropy"].sel(example=row, layer=layer).values
                np.testing.assert_allclose(got, np.mean(np.log(seen)), atol=1e-5)


def _families() -> list[str]:
    from mechinterp.model.architecture import FAMILIES

    return list(FAMILIES)


@pytest.mark.parametrize("queries", ["end", "all"])
def test_the_contract(queries: str) -> None:
    vocabulary = mi.Vocabulary.of({"and": ["and"], "names": {"regexes": ["[A-Z][a-z]+"]}})
    examples = replace(mi.tasks.ioi(16, seed=3), labels=("right", "wrong") * 8).categorize(vocabulary)
    ties = ("difference_p", "difference_q", "category_p", "category_q")
    models = [mi.testing.tiny(family) for family in ("mistral", "qwen3")]
    check_analyzer(mi.AttentionByCategory(queries=queries), examples, models=models, ties=ties)
    check_analyzer(mi.AttentionByCategory(queries=queries, statistics=False), examples, models=[mi.testing.tiny()])


def test_stored_and_joined_parts_give_the_same(llama: mi.Model, tmp_path: Path) -> None:
    labels = ["right", "wrong", "wrong"] * 6
    examples = texts(18, labels=labels).categorize(PLACES)
    whole = mi.run(llama, examples, mi.AttentionByCategory())
    each = mi.AttentionByCategory(statistics=False)
    datasets = []
    for part, rows in enumerate((slice(0, 7), slice(7, 18))):
        some = mi.Examples.of(
            examples.texts[rows], labels=labels[rows]
        ).categorize(PLACES)  # fmt: skip
        mi.run(llama, some, each).save(tmp_path / str(part))
        datasets.append(mi.Result.load(tmp_path / str(part)).data)
    joined = category_statistics(xr.concat(datasets, "example"))
    assert joined.meta["groups"] == whole.meta["groups"] == {"right": 6, "wrong": 12}
    assert set(joined.data) == set(whole.data)
    for name in whole.data:
        np.testing.assert_allclose(joined.data[name], whole.data[name], atol=1e-5, err_msg=str(name))


def test_a_planted_difference_is_found_and_named(smollm2: mi.Model) -> None:
    examples = texts(40, labels=["b"] * 20 + ["a"] * 20).categorize(PLACES)
    each = mi.run(smollm2, examples, mi.AttentionByCategory(statistics=False)).data
    rng = np.random.default_rng(0)
    each["share"] = each["share"] * 0 + rng.normal(0.3, 0.02, each["share"].shape)
    each["expected"] = each["expected"] * 0 + 0.1
    each["share"].loc[{"layer": 11, "head": 3, "category": "and", "example": each["label"] == "a"}] += 0.1
    result = category_statistics(each)
    assert result.meta["groups"] == {"a": 20, "b": 20}
    found = result.table("difference").query("significant")
    assert found[["layer", "head", "category"]].values.tolist() == [[11, 3, "and"]]
    assert found["d"].item() > 1 and found["difference_ci_low"].item() > 0
    assert result.meta["notes"] == ["no difference in first: fewer than two examples of a group see their tokens"]
    whole = result.data["category_q"]
    assert float(whole.sel(category="and")) < 0.05 < float(whole.sel(category="place"))
    assert np.isnan(float(whole.sel(category="first")))  # only the first token, which stands apart
    assert result.data["specialised"].sel(category="place").all()
    assert not category_statistics(each, floor=0.5).data["specialised"].any()
    turned = category_statistics(each, groups=("b", "a")).data
    np.testing.assert_allclose(turned["difference"], -result.data["difference"])
    for view in range(len(result.views)):
        assert len(result.figure(view).data) > 0


def test_groups_that_cannot_be_compared_are_refused_or_said(llama: mi.Model) -> None:
    def run(labels: list[str | None] | None, groups: tuple[str, str] | None = None) -> mi.Result:
        return mi.run(llama, texts(12, labels=labels).categorize(PLACES), mi.AttentionByCategory(groups=groups))

    with pytest.raises(ExamplesError, match=r"the group 'wrong' has no example: there are 12 of 'right'"):
        run(["right"] * 12, ("right", "wrong"))
    with pytest.raises(ExamplesError, match="the examples have no labels"):
        run(None, ("right", "wrong"))
    one = run(["right"] * 12)
    assert "difference" not in one.data
    unseen = "no query sees a token of first, so that there is no share"
    assert one.meta["notes"] == ["one group, 'right': no differences", unseen]
    assert run(None).meta["notes"] == ["no labels: one group, no differences", unseen]
    assert run(["a", "b", "c"] * 4).meta["notes"] == ["3 groups: no differences; name two in groups=", unseen]
    with pytest.warns(UserWarning, match="groups of 4 and 4 examples have too few splits for one cell of 36"):
        two = run(["a", "b", "c"] * 4, ("a", "c"))
    assert two.meta["notes"][0] == "4 of 12 examples are in none of the groups and were left out"
    assert list(two.data["group"].values) == ["a", "c"]
    some = run(["a", None, "a"] * 4)
    assert some.meta["groups"] == {"a": 8}
    assert some.meta["notes"][1] == "4 of 12 examples are in none of the groups and were left out"
    with pytest.raises(ExamplesError, match="none of the 12 examples has a label"):
        run([None] * 12)


def test_bad_input(llama: mi.Model) -> None:
    with pytest.raises(ExamplesError, match=r"no word categories; give them some: examples.categorize"):
        mi.run(llama, texts(), mi.AttentionByCategory())
    long = mi.Examples.of(["the park " * 200]).categorize(mi.Vocabulary.of({"p": ["park"]}))
    with pytest.raises(ExamplesError, match="more than the model's context of 256"):
        mi.run(llama, long, mi.AttentionByCategory())
    with pytest.raises(ExamplesError, match="define no position 'verb'"):
        mi.run(llama, texts().categorize(PLACES), mi.AttentionByCategory(queries="verb"))


def test_a_category_that_comes_after_all_queries_is_said(llama: mi.Model) -> None:
    examples = mi.Examples.of(["Mary saw the park", "John saw the park"]).categorize(
        mi.Vocabulary.of({"place": ["park"], "verb": ["saw"]})
    )
    result = mi.run(llama, examples, mi.AttentionByCategory(queries=1))
    assert result.data["share"].sel(category="place").isnull().all()
    assert result.meta["notes"][-1] == "no query sees a token of place, so that there is no share"


def test_a_text_without_the_category_has_no_share(llama: mi.Model) -> None:
    examples = mi.Examples.of(["the park and then", "Mary then saw John"]).categorize(
        mi.Vocabulary.of({"park": ["park"]})
    )
    data = mi.run(llama, examples, mi.AttentionByCategory(statistics=False)).data
    assert data["share"].sel(example=0).notnull().all()
    assert data["share"].sel(example=1).isnull().all()
    whole = mi.run(llama, examples, mi.AttentionByCategory()).data
    assert int(whole["examples"].squeeze()) == 1
    assert int(whole["matches"].squeeze()) == 1
