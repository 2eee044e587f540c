"""Maps: PCA and its variance, clusters and labels, hostile texts, and UMAP that is or is not installed."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.metrics import adjusted_rand_score

import mechinterp as mi
from mechinterp.analyzers.representation_map import adjusted_rand, principal
from mechinterp.analyzers.similarity import Kept
from mechinterp.analyzers.units import Units
from mechinterp.errors import NeedsError, OutputError
from mechinterp.report.html import drawing_page
from mechinterp.report.maps import representation_map
from mechinterp.testing import check_analyzer, tiny

PLACES = ("store", "book", "ring", "dog")
TEXTS = [f"{name} went to the {place}" for place in PLACES for name in ("Mary", "John", "Tom")]
LABELS = ["first", "second", "third"] * 4


def test_the_contract() -> None:
    examples = mi.Examples.of(TEXTS[:7], LABELS[:7], answers=[(" Mary", " John")] * 7)
    check_analyzer(mi.RepresentationMap("resid_post.1"), examples, models=[tiny("qwen3", layers=2)], ties=("cluster",))


def test_pca_is_that_of_scikit_learn() -> None:
    x = torch.randn(30, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([5.0, 3, 2, 1, 1, 0.5]) + 4
    scores, explained = principal(x)
    other = PCA(6).fit(x.double().numpy())
    np.testing.assert_allclose(explained, other.explained_variance_ratio_, atol=1e-6)
    np.testing.assert_allclose(np.abs(scores), np.abs(other.transform(x.double().numpy())), atol=1e-5)
    assert (scores[np.abs(scores).argmax(0), range(6)] > 0).all()
    assert explained.sum() == pytest.approx(1.0)


def test_the_adjusted_rand_index_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    clusters, labels = rng.integers(0, 3, 20), rng.integers(0, 4, (5, 20))
    labels[0], labels[1] = clusters, 0
    expected = [adjusted_rand_score(some, clusters) for some in labels]
    np.testing.assert_allclose(adjusted_rand(clusters, labels), expected, atol=1e-12)


def test_clusters_that_are_there_are_found(llama: mi.Model) -> None:
    examples = mi.Examples.of(TEXTS, LABELS)
    asked = mi.RepresentationMap(("resid_post.0", "resid_post.2"), Units(0))  # at the name, which is the label
    data = mi.run(llama, examples, asked).data
    np.testing.assert_allclose(data["ari"], 1)
    assert (data["ari_q"] < 0.05).all() and (data["clusters"] == 3).all()
    assert (data["silhouette"] > 0.99).all() and (data["silhouette_null"] < 0.8).all()
    assert data["label"].values.tolist() == LABELS and data["text"].values[0] == "Mary"
    some = [None if i in (0, 5) else label for i, label in enumerate(LABELS)]
    part = mi.run(llama, mi.Examples.of(TEXTS, some), asked)
    np.testing.assert_allclose(part.data["ari"], 1)  # a group of those without a label would lower it
    assert part.meta["unlabelled"] == 2 and part.data["label"].values[0] == ""
    assert "no label" in {trace.name for trace in representation_map(part).data}
    shuffled = [LABELS[i] for i in np.random.default_rng(1).permutation(12)]
    other = mi.run(llama, mi.Examples.of(TEXTS, shuffled), asked).data
    assert (other["ari"] < 0.5).all() and (other["ari_q"] > 0.05).all()
    few = mi.run(llama, TEXTS, mi.RepresentationMap("resid_post.2", clusters=4, clustering="agglomerative")).data
    assert few["clusters"].item() == 4 and "ari" not in few and "label" not in few
    sizes = np.bincount(few["cluster"].values.ravel())[1:]
    assert (np.diff(sizes) <= 0).all() and sizes.sum() == 12


@pytest.mark.parametrize("clustering", ["kmeans", "agglomerative"])
def test_the_null_has_the_same_choice_of_clusters(clustering: Any) -> None:
    """On the same shuffles a choice among numbers of clusters finds more than any one number does."""
    x = torch.randn(1, 20, 4, generator=torch.Generator().manual_seed(0))
    kept = Kept(x, np.arange(20), np.zeros((20, 2), int), 20, np.ones(1))

    def null(clusters: int | None) -> float:
        asked = mi.RepresentationMap(clustering=clustering, clusters=clusters)
        return float(asked._site(x[0], kept, None)["silhouette_null"])

    assert null(None) > max(null(k) for k in range(2, 9)) + 0.005


def test_units_in_a_text_are_shown_where_they_stand(llama: mi.Model) -> None:
    found = mi.run(llama, TEXTS, mi.RepresentationMap("resid_post", Units(each="token"), most=15))
    texts = found.data["text"].values.tolist()
    assert len(texts) == 15 and found.meta["units_seen"] == 48
    for text, example in zip(texts, found.data["example"].values, strict=True):
        before, _, token = text.removesuffix("]").partition("[")
        assert TEXTS[example].startswith(before + token), text
    assert "15 units of 48" in str(representation_map(found).layout.title.subtitle.text)


def test_hostile_texts_are_only_text() -> None:
    bad = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    model = tiny("llama", words=[bad])
    texts = [f"{bad} {text}" for text in TEXTS]
    examples = mi.Examples.of(texts, [f"<b>{label}" for label in LABELS])
    found = mi.run(model, examples, mi.RepresentationMap("resid_post", Units("all")))
    figure = representation_map(found)
    shown = [t for t in figure.data if t.visible]
    assert len(figure.data) == 9 and len(shown) == 3
    assert all(text.startswith("/script&gt;&lt;script&gt;") for trace in shown for text in trace.text)
    assert {trace.name for trace in shown} == {f"&lt;b&gt;{label}" for label in dict.fromkeys(LABELS)}
    page = drawing_page("map", figure)
    assert "alert(1)" in page and "<img src" not in page and page.count("</script>") == page.count("<script")
    with pytest.raises(OutputError, match="no map"):
        representation_map(mi.run(model, TEXTS, mi.Similarity("resid_post.1", draws=2)))


def test_constant_features(llama: mi.Model) -> None:
    found = mi.run(llama, [f"{t}." for t in TEXTS], mi.RepresentationMap(("embed", "resid_post.1")))
    data = found.data.isel(site=0)
    assert data["coordinate"].isnull().all() and np.isnan(float(data["silhouette"])) and (data["cluster"] == 0).all()
    assert found.data.isel(site=1)["coordinate"].notnull().all()
    assert representation_map(found) is not None


def test_what_is_not_installed_is_named(llama: mi.Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = mi.RepresentationMap("resid_post.1", method="umap")
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "umap" else real(name))
    with pytest.raises(NeedsError, match=r"pip install 'mechinterp\[umap\]'"):
        mi.run(llama, TEXTS, asked)
    monkeypatch.setattr(importlib.util, "find_spec", real)
    (tmp_path / "umap.py").write_text(  # stands for the real one, which is an extra
        "class UMAP:\n"
        "    def __init__(self, n_neighbors, metric, init, random_state):\n"
        "        assert (n_neighbors, metric, init, random_state) == (11, 'cosine', 'spectral', 0)\n"
        "    def fit_transform(self, x):\n"
        "        return x[:, 5:7]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = mi.run(llama, TEXTS, asked)
    states = llama.trace(TEXTS[0], "resid_post.1")["resid_post.1"][0, -1]
    np.testing.assert_allclose(found.data["coordinate"].values[0, 0], states[5:7], atol=1e-5)
    assert "distances between groups mean nothing" in str(representation_map(found).layout.title.subtitle.text)
    for options, told in (
        ({"clusters": 1}, "at least 2"),
        ({"clusters": 12}, "too many for 12 units"),
    ):
        with pytest.raises(NeedsError, match=told):
            mi.run(llama, TEXTS, mi.RepresentationMap("resid_post.1", **options))  # type: ignore[arg-type]
