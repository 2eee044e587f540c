"""The largest activations against a plain sort of everything, whatever the batches; ties, contexts, bad input."""

import numpy as np
import pytest
import torch

import mechinterp as mi
from mechinterp import sites
from mechinterp.analyzers.max_activating import marked
from mechinterp.errors import ExamplesError, NeedsError, SiteError
from mechinterp.testing import check_analyzer, tiny

TEXTS = [[5, 6, 7, 5, 6, 6, 9], [8, 3, 8, 4], [4, 9, 2, 7, 1, 4, 4, 2, 9, 4], [1, 2, 3], [7]]


@pytest.fixture(scope="module")
def qwen() -> mi.Model:
    return tiny("qwen3")


def everything(model: mi.Model, kind: str, layer: int, first: bool = False) -> list[tuple[np.ndarray, int, int]]:
    """(vector, text, position) of every token."""
    site, out = sites.Site(kind, layer), []
    for text, ids in enumerate(TEXTS):
        value = model.trace(ids, site)[site][0].flatten(1).numpy()  # alone, without padding
        out += [(value[at], text, at) for at in range(0 if first else 1, len(ids))]
    return out


def by_hand(rows: list[tuple[np.ndarray, int, int]], neuron: int, top: int, low: bool) -> list[tuple[float, int, int]]:
    values = [(float(x[neuron]), text, at) for x, text, at in rows]
    return sorted(values, key=lambda row: (row[0] if low else -row[0], row[1], row[2]))[:top]


@pytest.mark.parametrize(("kind", "first"), [("mlp_act", False), ("z", True)])
def test_the_whole_corpus_sorted(qwen: mi.Model, kind: str, first: bool) -> None:
    found = {}
    for size, side in ((1, "right"), (2, "left"), (5, "right")):
        asked = mi.MaxActivating(kind, (2, 0), top=6, low=True, first=first)
        found[size] = mi.run(qwen, TEXTS, asked, batch_size=size, padding_side=side).data
    data = found[1]
    assert data["layer"].values.tolist() == [0, 2] and int(data["tokens"]) == (25 if first else 20)
    for layer in (0, 2):
        rows = everything(qwen, kind, layer, first)
        np.testing.assert_allclose(data["density"].sel(layer=layer), (np.stack([x for x, _, _ in rows]) > 0).mean(0))
        for neuron in (0, 7, 31):
            for side in ("high", "low"):
                cell = data.sel(layer=layer, neuron=neuron, side=side)
                expected = by_hand(rows, neuron, 6, side == "low")
                np.testing.assert_allclose(cell["value"], [row[0] for row in expected], atol=1e-5)
                places = list(zip(cell["example"].values.tolist(), cell["position"].values.tolist(), strict=True))
                assert places == [row[1:] for row in expected]
    for other in found.values():
        np.testing.assert_allclose(other["value"], data["value"], atol=1e-5)
        for name in ("example", "position", "context", "density"):
            assert (other[name] == data[name]).mean() > 0.999, name  # neighbours may swap by rounding


def test_one_token_of_each_text(qwen: mi.Model) -> None:
    for size in (1, 3):
        data = mi.run(qwen, TEXTS, mi.MaxActivating(layers=(1,), top=5, each="text"), batch_size=size).data
        rows = everything(qwen, "mlp_act", 1)
        for neuron in (3, 40):
            best = [by_hand([row for row in rows if row[1] == text], neuron, 1, False)[0] for text in range(4)]
            cell = data.sel(layer=1, neuron=neuron, side="high")
            assert cell["example"].values.tolist() == [row[1] for row in sorted(best, reverse=True)] + [-1]
            np.testing.assert_allclose(cell["value"][:4], sorted([row[0] for row in best], reverse=True), atol=1e-5)
            assert np.isnan(cell["value"][4]) and cell["context"].values[4] == ""


@pytest.mark.parametrize("size", [1, 2, 5])
def test_equal_values_stand_in_the_order_of_the_corpus(qwen: mi.Model, size: int) -> None:
    """Neuron 0 is the same everywhere; neuron 1 is larger at one place; topk alone would take any of the others."""
    order = [(text, at) for text, ids in enumerate(TEXTS) for at in range(1, len(ids))]
    asked = mi.MaxActivating(layers=(1,), neurons=(0, 1), top=4, low=True)

    def write(x: torch.Tensor) -> torch.Tensor:
        out = x.clone()
        out[..., 0], out[..., 1] = 0.5, 0.0
        out[:, 3, 1] = 1.0
        return out

    one = TEXTS[:3]  # all have a token 3
    with qwen.intervene(mi.Apply(sites.mlp_act(1), write)):
        data = mi.run(qwen, one, asked, batch_size=size).data.sel(layer=1)
    for side in ("high", "low"):
        same = data.sel(neuron=0, side=side)
        assert list(zip(same["example"].values, same["position"].values, strict=True)) == order[:4]
    peaked = data.sel(neuron=1, side="high")
    places = list(zip(peaked["example"].values, peaked["position"].values, strict=True))
    assert places == [(0, 3), (1, 3), (2, 3), (0, 1)]
    assert float(data["density"].sel(neuron=1)) == pytest.approx(3 / 18)


def test_memory_is_that_of_the_top(qwen: mi.Model) -> None:
    """Merged, two parts are as large as one."""
    asked = mi.MaxActivating(top=3)
    parts: list[mi.Part] = []

    class Spied(mi.MaxActivating):
        def observe(self, batch: mi.Batch) -> mi.Part:
            parts.append(super().observe(batch))
            return parts[-1]

    mi.run(qwen, TEXTS, Spied(top=3), batch_size=2)
    merged = asked.merge(asked.merge(parts[0], parts[1]), parts[2])
    assert {n: v.shape for n, (v, _) in merged.values.items()} == {n: v.shape for n, (v, _) in parts[0].values.items()}
    assert merged.values["value"][0].shape == (3, 48, 1, 3)


def test_tokens_and_their_context(qwen: mi.Model) -> None:
    texts = ["Mary had a book and John", "the dog"]
    result = mi.run(qwen, texts, mi.MaxActivating(layers=(1,), neurons=(4, 9), top=2, context=2))
    for row in result.table("value").to_dict("records"):
        words = qwen.to_str_tokens(qwen.tokenize(texts).ids[row["example"]])
        at = row["position"]
        assert row["token"] == words[at]
        before, after = "".join(words[max(0, at - 2) : at]), "".join(words[at + 1 : at + 3])
        assert row["context"] == f"{before}«{words[at]}»{after}"
    assert [view.value for view in result.views] == ["value", "value"]
    assert result.figure(0).data and result.figure(1).data
    assert marked(list("abcdefghij"), 1, 9, 2) == "a«bc … hi»j"


def test_the_contract(qwen: mi.Model) -> None:
    where = ("example", "position", "token", "context")  # prompts begin alike: values are equal but for rounding
    check_analyzer(mi.MaxActivating(top=4, low=True), models=[qwen], ties=where)


def test_bad_input(llama: mi.Model) -> None:
    with pytest.raises(NeedsError, match=r"must be one of resid_pre, attn_in, .* Got 'pattern'"):
        mi.run(llama, TEXTS, mi.MaxActivating("pattern"))
    with pytest.raises(NeedsError, match="mlp_act of tiny-llama has neurons 0 to 47, and no 48"):
        mi.run(llama, TEXTS, mi.MaxActivating(neurons=(3, 48)))
    with pytest.raises(SiteError, match="the model has layers 0 to 2"):
        mi.run(llama, TEXTS, mi.MaxActivating(layers=(3,)))
    with pytest.raises(ExamplesError, match="every text is one token long"):
        mi.run(llama, [[5], [6]], mi.MaxActivating())
    assert int(mi.run(llama, [[5], [6]], mi.MaxActivating(first=True, top=1)).data["tokens"]) == 2
    for odd in ({"top": 0}, {"context": -1}, {"neurons": ()}, {"layers": ()}):
        with pytest.raises(NeedsError, match="MaxActivating takes a top above 0"):
            mi.MaxActivating(**odd)
    sparse = tiny("qwen3_moe")
    with pytest.raises(SiteError, match="6 experts are fused and have no neurons to hook; use router, mlp_in"):
        mi.run(sparse, TEXTS, mi.MaxActivating())
    assert mi.run(sparse, TEXTS, mi.MaxActivating(layers=(1,), top=1)).data.sizes["neuron"] == 48
    assert mi.run(sparse, TEXTS, mi.MaxActivating("router", layers=(0,), top=1)).data.sizes["neuron"] == 6
