"""Clusters of heads, against patterns that are written, and loops by hand."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

import mechinterp as mi
from mechinterp import sites
from mechinterp.analyzers.clusters import FEATURES, silhouettes
from mechinterp.errors import ExamplesError, NeedsError
from mechinterp.tasks import planted
from mechinterp.testing import tiny

KINDS = {"previous": [(0, 1), (1, 0), (2, 3), (2, 2)], "first": [(0, 0), (0, 2), (1, 3), (1, 2), (2, 1)]}
"""Heads whose patterns are written; the others attend to all that they see alike."""


def written(n: int) -> list[mi.Intervention]:
    patterns = {"previous": torch.eye(n).roll(1, 0), "first": torch.zeros(n, n)}
    patterns["previous"][0] = torch.eye(n)[0]
    patterns["first"][:, 0] = 1
    even = torch.ones(n, n).tril() / torch.arange(1, n + 1)[:, None]
    kind_of = {cell: kind for kind, cells in KINDS.items() for cell in cells}
    cells = [(layer, head) for layer in range(3) for head in range(4)]

    def fixed(pattern: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda old: pattern[: old.shape[-1], : old.shape[-1]].expand_as(old)

    return [mi.Apply(sites.pattern(i, heads=h), fixed(patterns.get(kind_of.get((i, h), ""), even))) for i, h in cells]


def test_heads_of_one_kind_fall_into_one_cluster() -> None:
    model = tiny("llama", seed=1)
    texts = torch.randint(2, model.dims.vocab, (6, 24), generator=torch.Generator().manual_seed(0)).tolist()
    with model.intervene(*written(24)):
        result = mi.run(model, texts, mi.HeadClusters(shown=8))
    data = result.data
    assert data.sizes["group"] == 3
    found = {frozenset(map(tuple, np.argwhere(data["cluster"].values == i).tolist())) for i in (1, 2, 3)}
    rest = {(i, h) for i in range(3) for h in range(4)} - {c for cells in KINDS.values() for c in cells}
    assert found == {*map(frozenset, KINDS.values()), frozenset(rest)}
    assert data["size"].values.tolist() == [5, 4, 3]
    np.testing.assert_allclose(data["stability"], 1)
    assert data["group"].values.tolist() == ["1 first", "2 previous", "3 entropy"]
    np.testing.assert_allclose(data["silhouette"], 1, atol=1e-3)
    centre = data["centre"].sel(feature="entropy").values
    np.testing.assert_allclose(centre, [0, 0, 1], atol=1e-5)


def test_twins_of_the_planted_model_are_together() -> None:
    one = planted.induction(12)
    data = mi.run(one.model, one.pairs, mi.HeadClusters()).data
    cluster = data["cluster"].values
    assert cluster[0, 0] == cluster[0, 1]
    assert (cluster == cluster[0, 0]).sum() == 2
    assert cluster[1, 2] != cluster[0, 0]


def profile_by_hand(ids: list[int], pattern: np.ndarray) -> dict[str, float]:
    """Of one head, by loops over queries and keys."""
    n = len(ids)
    keys = {
        "previous": lambda q: [q - 1] if q else [],
        "local": lambda q: [k for k in range(q - 4, q) if k > 0],
        "first": lambda q: [0] if q else [],
        "duplicate": lambda q: [k for k in range(q) if ids[k] == ids[q]],
        "induction": lambda q: [k + 1 for k in range(q) if ids[k] == ids[q]],
        "self": lambda q: [q],
        "recent": lambda q: [k for k in range(q - 16, q - 4) if k > 0],
    }
    out = {}
    for name, of in keys.items():
        sums = [sum(pattern[q, k] for k in of(q)) for q in range(n) if of(q)]
        out[name] = float(np.mean(sums)) if sums else np.nan
    spread = [-sum(p * np.log(p) for p in pattern[q, : q + 1] if p > 0) / np.log(q + 1) for q in range(1, n)]
    return out | {"entropy": float(np.mean(spread))}


@pytest.mark.parametrize("block", [1, 1 << 20])
@pytest.mark.parametrize("side", ["left", "right"])
def test_profiles_by_hand(model: mi.Model, side: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mechinterp.model.attention.BLOCK_BYTES", block)
    texts = [
        [5, 6, 7, 5, 6, 6, 9, 3, 5, 8],
        [8, 3, 8],
        [4, 9, 2, 7, 1, 4, 4, 2, 9, 4, 11, 12, 13, 14, 15, 16, 17, 18, 19],
    ]
    result = mi.run(model, texts, mi.HeadClusters(clusters=3, example=2, shown=7), padding_side=side)
    trace = model.trace(texts, "pattern")
    for layer, head in ((0, 0), (1, 3), (2, 1)):
        each = [
            profile_by_hand(t, trace[f"pattern.{layer}"][i, head, : len(t), : len(t)].numpy())
            for i, t in enumerate(texts)
        ]
        for feature in FEATURES:
            expected = np.nanmean([e[feature] for e in each])
            assert float(result.data["profile"].sel(layer=layer, head=head, feature=feature)) == pytest.approx(
                expected, abs=1e-5
            )
    for i, name in enumerate(result.data["representative"].values):
        layer, head = map(int, name[1:].split(".h"))
        whole = model.trace(texts[2], "pattern")[f"pattern.{layer}"][0, head]
        np.testing.assert_allclose(result.data["pattern"][i], whole[:7, :7], atol=1e-5)
        members = result.data["cluster"].values == i + 1
        assert members[layer, head]
        rows = result.data["profile"].values[:, members].T
        sums = ((rows[:, None] - rows) ** 2).sum(-1) ** 0.5
        mine = result.data["profile"].values[:, layer, head]
        assert ((rows - mine) ** 2).sum(-1).__pow__(0.5).sum() == pytest.approx(sums.sum(1).min(), abs=1e-5)


def test_silhouettes_by_hand() -> None:
    rng = np.random.default_rng(0)
    points, groups = rng.normal(size=(9, 3)), np.array([0, 0, 0, 1, 1, 1, 1, 2, 0])
    distances = ((points[:, None] - points) ** 2).sum(-1) ** 0.5
    for i, got in enumerate(silhouettes(distances, groups)):
        own = [j for j in range(9) if groups[j] == groups[i] and j != i]
        if not own:
            assert got == 0
            continue
        a = np.mean([distances[i, j] for j in own])
        b = min(distances[i, groups == g].mean() for g in range(3) if g != groups[i])
        assert got == pytest.approx((b - a) / max(a, b))


def test_what_cannot_be_clustered(llama: mi.Model) -> None:
    data = mi.run(llama, [[5, 6, 7, 8]], mi.HeadClusters(clusters=2)).data
    assert data["stability"].isnull().all()  # a single example
    assert "duplicate" not in data["feature"].values  # no token stands twice
    with pytest.raises(NeedsError, match=r"must be 2 to 11 of 12\. Got 12"):
        mi.run(llama, [[5, 6, 7]], mi.HeadClusters(clusters=12))
    with pytest.raises(ExamplesError, match="no example 3"):
        mi.run(llama, [[5, 6, 7]], mi.HeadClusters(example=3))
