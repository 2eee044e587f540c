"""Features to look at: two dimensions of them, and clusters, with what these are worth."""

import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from jaxtyping import Float
from threadpoolctl import threadpool_limits
from torch import Tensor

from mechinterp.analyzers.similarity import Kept, Sampled, places, unlabelled
from mechinterp.core.analyzer import Context, Model, Needs
from mechinterp.core.result import Part, Result, View
from mechinterp.core.similarity import LEAST, Array, centred
from mechinterp.core.statistics import fdr
from mechinterp.core.tokens import is_label
from mechinterp.errors import NeedsError

COMPONENTS = 10
"""Principal components that are reported, and in which clusters are looked for."""
MOST_CLUSTERS = 8
NULLS = 10
"""Shuffles for the silhouette that no structure at all would have."""
DRAWS = 1000
BEFORE = 12
"""Tokens before a unit that are shown with it."""


@dataclass(frozen=True)
class RepresentationMap(Sampled):
    """Features of every layer in two dimensions, and clusters among them, to be looked at before it is measured.

    PCA centres the features and keeps the two directions of largest variance; ``explained`` says how little that may
    be. Dimensions of massive activations can be most of it. UMAP (McInnes et al. 2018) keeps neighbourhoods by cosine:
    distances between its groups, and their sizes, mean nothing.

    Clusters are not those of the picture: they are looked for in the first ten principal components, by k-means or by
    Ward's method, and their number is that of the largest mean silhouette (Rousseeuw 1987) unless it is given. A
    clustering finds clusters in anything; ``silhouette_null`` is what it finds in the same components shuffled one by
    one, their number chosen in the same way. Where the examples have labels that repeat, ``ari`` is the adjusted Rand
    index of clusters and labels (Hubert & Arabie 1985; 0 by chance, 1 the same), with p of shuffled labels, text by
    text. Texts without a label (None) are in the map and in clusters, but not in that; ``meta["unlabelled"]`` counts
    them.

    `mechinterp.report.maps.representation_map` draws it, with the text of each unit on hover.

    Result: ``silhouette``, ``silhouette_null``, ``clusters`` and, with labels, ``ari, ari_p, ari_q`` (``layer``);
    ``explained`` (``layer component``), shares of variance; ``coordinate`` (``layer unit axis``); ``cluster`` (``layer
    unit``), from 1; ``text``, ``example`` and ``label`` (``unit``), empty for none. Where features are constant all is
    NaN, the cluster 0.

    Attributes:
        method: ``"pca"`` or ``"umap"``, which takes the extra ``[umap]``.
        clustering: ``"kmeans"`` or ``"agglomerative"``.
        clusters: how many; None to choose from 2 to 8.
    Raises:
        NeedsError: an unknown method, or UMAP is not installed. Else as for `Sampled`.
    """

    method: Literal["pca", "umap"] = "pca"
    clustering: Literal["kmeans", "agglomerative"] = "kmeans"
    clusters: int | None = None

    def needs(self, model: Model) -> Needs:
        if self.method not in ("pca", "umap") or self.clustering not in ("kmeans", "agglomerative"):
            raise NeedsError(f"RepresentationMap has no method {self.method!r} with {self.clustering!r} clusters")
        if self.clusters is not None and self.clusters < 2:
            raise NeedsError(f"The clusters of RepresentationMap must be at least 2. Got {self.clusters}")
        if self.method == "umap" and importlib.util.find_spec("umap") is None:
            raise NeedsError(
                "RepresentationMap takes the package umap-learn for its method 'umap', which is not installed; run: pip"
                " install 'mechinterp[umap]'"
            )
        return super().needs(model)

    def combine(self, parts: Iterator[Part], context: Context) -> Result:
        kept, reads = self.kept(parts), self.reads(context.model)
        if self.clusters is not None and self.clusters >= len(kept.owner):
            raise NeedsError(f"{self.clusters} clusters are too many for {len(kept.owner)} units; ask for fewer")
        labels = context.tokens.labels
        given = [None if labels is None or not is_label(labels[text]) else str(labels[text]) for text in kept.owner]
        known = [label for label in given if label is not None]
        # One group, or none that repeats, is nothing to compare clusters with.
        mine = np.array([label or "" for label in given]) if 1 < len(set(known)) < len(known) else None
        found = [self._site(x, kept, mine) for x in kept.x]
        axis, names = places(reads)
        dims = {"explained": ("component",), "coordinate": ("unit", "axis"), "cluster": ("unit",)}
        data = xr.Dataset(
            {
                name: ((axis, *dims.get(name, ())), np.stack([one[name] for one in found]))
                for name in sorted(found[0], key=lambda name: len(dims.get(name, ())))
            },
            {axis: names, "component": np.arange(1, found[0]["explained"].shape[0] + 1), "axis": ["x", "y"]},
        )
        if mine is not None:
            data["ari_q"] = (axis, fdr(data["ari_p"].values))
            data["label"] = ("unit", mine)
        data["text"] = ("unit", _texts(context, kept))
        data["example"] = ("unit", kept.owner)
        meta = {**kept.meta(reads), "method": self.method, "unlabelled": unlabelled(labels)}
        return Result(data, meta, _views(axis, mine is not None))

    def _site(self, x: Float[Tensor, "unit dim"], kept: Kept, labels: npt.NDArray[Any] | None) -> dict[str, Any]:
        """All numbers of one site."""
        scores, explained = principal(x)
        n = len(scores)
        out: dict[str, Any] = {
            "silhouette": np.nan, "silhouette_null": np.nan, "clusters": 0, "explained": explained,
            "coordinate": np.full((n, 2), np.nan), "cluster": np.zeros(n, dtype=int),
        }  # fmt: skip
        if labels is not None:
            out |= {"ari": np.nan, "ari_p": np.nan}
        if not np.isfinite(explained).all():
            return out
        out["coordinate"] = np.pad(scores, ((0, 0), (0, 2)))[:, :2] if self.method == "pca" else self._umap(x)
        rng = np.random.default_rng(self.seed)
        with threadpool_limits(1):  # many small fits: on a busy machine threads cost far more than they bring
            cluster, silhouette = self._clustered(scores)
            null = [self._clustered(rng.permuted(scores, axis=0))[1] for _ in range(NULLS)]
        out |= {"cluster": cluster, "clusters": int(cluster.max())}
        out |= {"silhouette": silhouette, "silhouette_null": float(np.mean(null))}
        if labels is not None:
            known = labels != ""
            _, first, text = np.unique(kept.owner[known], return_index=True, return_inverse=True)
            groups = np.unique(labels[known], return_inverse=True)[1][first]  # of each text
            drawn = np.stack([groups, *(rng.permutation(groups) for _ in range(DRAWS))])[:, text]
            ari = adjusted_rand(cluster[known] - 1, drawn)
            out |= {"ari": ari[0], "ari_p": float((ari >= ari[0] - 1e-9).mean())}
        return out

    def _clustered(self, scores: Array) -> tuple[npt.NDArray[np.int64], float]:
        """The cluster of each unit, the largest first, and the mean silhouette."""
        from sklearn.cluster import AgglomerativeClustering, KMeans
        from sklearn.metrics import silhouette_score

        numbers = [self.clusters] if self.clusters else range(2, min(MOST_CLUSTERS, len(scores) - 1) + 1)
        best, score = np.zeros(len(scores), dtype=int), -np.inf
        for k in numbers:
            kmeans: Any = KMeans  # whose stub says that n_init is a string
            how = (
                kmeans(k, n_init=4, random_state=self.seed) if self.clustering == "kmeans" else
                AgglomerativeClustering(k)
            )  # fmt: skip
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # fewer distinct points than clusters: then the silhouette says it
                some = np.unique(how.fit_predict(scores), return_inverse=True)[1]
            if not 1 < len(set(some)) < len(scores):
                continue
            if (here := float(silhouette_score(scores, some))) > score:
                best, score = some, here
        order = np.argsort(-np.bincount(best), kind="stable")
        return np.argsort(order)[best] + 1, score if np.isfinite(score) else np.nan

    def _umap(self, x: Float[Tensor, "unit dim"]) -> Array:
        umap: Any = importlib.import_module("umap")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a seed means one thread
            neighbours, start = min(15, len(x) - 1), "spectral" if len(x) > 2 * LEAST else "random"
            made = umap.UMAP(n_neighbors=neighbours, metric="cosine", init=start, random_state=self.seed)
            return np.asarray(made.fit_transform(x.numpy()), dtype=float)


def principal(x: Float[Tensor, "unit dim"]) -> tuple[Array, Array]:
    """Scores of at most ten principal components, ``unit component``, and their shares of the variance.

    The sign of a component is that of the unit farthest out. NaN where the features are constant.
    """
    spread = centred(x)
    values, vectors = torch.linalg.eigh(spread @ spread.T)
    k = min(COMPONENTS, *x.shape)
    values, vectors = values.flip(0)[:k].clamp(min=0.0), vectors.flip(1)[:, :k]
    total = spread.square().sum()
    if not bool(total > 0):
        return np.full((len(x), k), np.nan), np.full(k, np.nan)
    far = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return (vectors * far.sign() * values.sqrt()).numpy(), (values / total).numpy()


def adjusted_rand(clusters: npt.NDArray[np.int64], labels: npt.NDArray[np.int64]) -> Array:
    """Adjusted Rand index (Hubert & Arabie 1985) of one clustering with each of several labellings, ``draw unit``."""
    one, other = np.eye(clusters.max() + 1)[clusters], np.eye(labels.max() + 1)
    table = np.stack([one.T @ other[some] for some in labels])  # draw cluster label
    both = _choose_two(table).sum((1, 2))
    rows, columns = _choose_two(table.sum(2)).sum(1), _choose_two(table.sum(1)).sum(1)
    expected = rows * columns / _choose_two(len(clusters))
    largest = (rows + columns) / 2
    same = largest == expected
    return np.where(same, 1.0, (both - expected) / np.where(same, 1.0, largest - expected))


def _choose_two(counts: Any) -> Any:
    return counts * (counts - 1) / 2


def _texts(context: Context, kept: Kept) -> npt.NDArray[Any]:
    """The tokens of each unit; in brackets, after some of what comes before, where that is more than one token."""
    out: list[str] = []
    for text, (start, stop) in zip(kept.owner, kept.tokens, strict=True):
        ids = context.tokens.ids[text]
        said = _decoded(context.model, ids[start:stop])
        whole = start <= 1 and stop == len(ids)  # but for the first token, as units of whole texts are
        before = "" if whole else _decoded(context.model, ids[max(0, start - BEFORE) : start])
        out.append(f"{before}[{said}]" if before else said)
    return np.array(out, dtype=object).astype(str)


def _decoded(model: Model, ids: Sequence[int]) -> str:
    """Tokens together, since a character may be several tokens."""
    if model.tokenizer is None:
        return "".join(model.to_str_tokens(ids))
    return str(model.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def _views(axis: str, labelled: bool) -> tuple[View, ...]:
    shown = (
        View(
            "lines", "explained", axis, by="component", title="Variance along the first two principal components",
            unit="share of variance", select={"component": (1, 2)},
        ),
        View("lines", "silhouette", axis, title="How separate the clusters are", unit="mean silhouette"),
    )  # fmt: skip
    ari = View("lines", "ari", axis, title="Clusters and labels", unit="adjusted Rand index")
    return (*shown, ari) if labelled else shown
