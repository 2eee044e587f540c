"""The strongest pairs of tokens, against a sort of the whole patterns."""

import numpy as np
import pytest

import mechinterp as mi


@pytest.mark.parametrize("block", [1, 1 << 20])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_strongest_pairs_of_all_examples(
    model: mi.Model, side: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mechinterp.model.attention.BLOCK_BYTES", block)
    texts = [[5, 6, 7, 5, 6, 6, 9], [8, 3, 8, 3], [4, 9, 2, 7, 1, 4, 4, 2, 9, 4], [1, 2]]
    result = mi.run(model, texts, mi.Hotspots(pairs=5), padding_side=side)
    trace = model.trace(texts, "pattern")
    for layer in range(3):
        for head in range(4):
            pairs = [
                (float(trace[f"pattern.{layer}"][i, head, q, k]), i, q, k)
                for i, ids in enumerate(texts)
                for q in range(len(ids))
                for k in range(1, q)
            ]
            best = sorted(pairs, reverse=True)[:5]
            got = result.data.sel(layer=layer, head=head)
            np.testing.assert_allclose(got["attention"], [b[0] for b in best], atol=1e-5)
            for rank, (_, i, q, k) in enumerate(best):
                one = got.isel(rank=rank)
                assert (int(one["of_example"]), int(one["query_position"]), int(one["key_position"])) == (i, q, k)
                assert str(one["query"].values) == model.to_str_tokens([texts[i][q]])[0]
    top = float(result.data["attention"].max())
    assert float(result.data["strongest"][0]) == pytest.approx(top)


def test_texts_without_pairs_have_none(llama: mi.Model) -> None:
    data = mi.run(llama, [[5, 6]], mi.Hotspots(pairs=2)).data
    assert data["attention"].isnull().all()
    assert (data["of_example"] == -1).all()
    assert (data["query"] == "").all()
    few = mi.run(llama, [[5, 6, 7]], mi.Hotspots(pairs=4)).data
    assert few["attention"].notnull().sum("rank").values.tolist() == [[1] * 4] * 3  # from 2 to 1 alone
