"""Statistics of activations against numpy and scipy on whole traces."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

import mechinterp as mi
from mechinterp import sites
from mechinterp.errors import NeedsError

TEXTS = [[5, 6, 7, 5, 6, 6, 9], [8, 3, 8, 3], [4, 9, 2, 7, 1, 4, 4, 2, 9, 4], [1, 2, 3], [7]]
NAMES = ("mean", "std", "min", "max", "norm", "kurtosis", "zeros", "massive", "top_dim", "top_share")


def by_hand(x: np.ndarray) -> dict[str, float]:
    """All statistics of some vectors, ``token dim``."""
    squares = (x**2).sum(0)
    magnitude = np.sort(np.abs(x), 1)
    return {
        "mean": x.mean(),
        "std": x.std(),
        "min": x.min(),
        "max": x.max(),
        "norm": np.linalg.norm(x, axis=1).mean(),
        "kurtosis": stats.kurtosis(x.ravel(), fisher=False),
        "zeros": (x == 0).mean(),
        "massive": (magnitude[:, -1] / magnitude[:, (x.shape[1] - 1) // 2]).mean(),
        "top_dim": squares.argmax(),
        "top_share": squares.max() / squares.sum(),
    }


def vectors(model: mi.Model, kind: str, layer: int, token: str) -> np.ndarray:
    """The vectors of all first tokens, or of all others, text by text, ``token dim``."""
    site = sites.Site(kind, layer)
    rows = [model.trace(text, site)[site][0].double().flatten(1).numpy() for text in TEXTS]
    return np.concatenate([row[:1] if token == "first" else row[1:] for row in rows])


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("side", ["left", "right"])
def test_statistics_by_hand(model: mi.Model, side: str, size: int) -> None:
    """Whatever the batches and the padding: the same as of every text by itself."""
    kinds = ("resid_pre", "attn_out", "mlp_out")
    analyzer = mi.ActivationStats(kinds, layers=(2, 0))
    data = mi.run(model, TEXTS, analyzer, padding_side=side, batch_size=size).data
    assert data["tokens"].values.tolist() == [5, 20]
    assert data["layer"].values.tolist() == [0, 2]
    for kind, layer, token in itertools.product(kinds, (0, 2), ("first", "rest")):
        x = vectors(model, kind, layer, token)
        cell = data.sel(kind=kind, layer=layer, token=token)
        for name, value in by_hand(x).items():
            np.testing.assert_allclose(cell[name], value, rtol=1e-5, atol=1e-5, err_msg=f"{name} of {kind}.{layer}")
        np.testing.assert_allclose(cell["mean_vector"], x.mean(0), rtol=1e-5, atol=1e-5)


def test_kinds_of_different_width_have_no_mean_vector(model: mi.Model) -> None:
    data = mi.run(model, TEXTS, mi.ActivationStats(("k", "resid_post", "attn_in"))).data
    assert "mean_vector" not in data
    assert data["top_dim"].sel(kind="k").max() < model.dims.n_kv_heads * model.dims.d_head
    assert data["norm"].sel(kind="k", layer=1, token="rest") == pytest.approx(
        by_hand(vectors(model, "k", 1, "rest"))["norm"], rel=1e-5
    )


def test_zeros_and_a_planted_massive_dimension(llama: mi.Model) -> None:
    """Write the activations: half zeros, and one dimension at the first token that dwarfs the others."""
    made = torch.zeros(32)
    made[::2] = 1.0
    with llama.intervene(mi.Replace(sites.mlp_out(1), made)):
        data = mi.run(llama, TEXTS, mi.ActivationStats(("mlp_out",))).data.sel(kind="mlp_out")
    assert (data["zeros"].sel(layer=1) == 0.5).all()
    assert (data["zeros"].sel(layer=0) == 0).all()
    spike = torch.ones(32)
    spike[13] = -2000.0
    with llama.intervene(mi.Replace(sites.resid_post(0, positions=0), spike)):
        data = mi.run(llama, TEXTS, mi.ActivationStats(("resid_post",))).data.sel(kind="resid_post", layer=0)
    first = data.sel(token="first")
    assert (float(first["massive"]), int(first["top_dim"]), float(first["min"])) == (2000.0, 13, -2000.0)
    assert float(first["top_share"]) == pytest.approx(1, abs=1e-5)
    assert float(data["massive"].sel(token="rest")) < 100


def test_a_mean_vector_ablates(model: mi.Model) -> None:
    """Written back at the first token of texts that all start alike, the mean changes nothing."""
    texts = [[5, 6, 7], [5, 8], [5, 9, 4]]
    data = mi.run(model, texts, mi.ActivationStats(("resid_post",))).data
    mean = torch.tensor(data["mean_vector"].sel(kind="resid_post", layer=1, token="first").values).float()
    end = sites.logits(positions="end")
    before = model.trace(texts, end)[end]
    after = model.trace(texts, end, interventions=[mi.Replace(sites.resid_post(1, positions=0), mean)])[end]
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


def test_texts_of_one_token_have_no_rest(llama: mi.Model) -> None:
    result = mi.run(llama, [[5], [6]], mi.ActivationStats())
    rest = result.data.sel(token="rest")
    assert all(np.isnan(rest[name]).all() for name in NAMES if name != "top_dim")
    assert (rest["top_dim"] == -1).all()
    assert [view.select["token"] for view in result.views] == ["first", "first"]
    assert np.isfinite(result.data["norm"].sel(token="first")).all()
    assert result.figure().data


def test_kinds_that_have_no_vector_for_each_token(llama: mi.Model) -> None:
    for kinds in (("pattern",), ("embed",), ("nothing",), ()):
        with pytest.raises(NeedsError, match="must be some of resid_pre, attn_in, "):
            mi.run(llama, TEXTS, mi.ActivationStats(kinds))
