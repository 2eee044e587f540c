"""Statistics of activations against numpy and scipy on whole traces."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

import mechinterp as mi
from mechinterp import sites
from mechinterp.analyzers.stats import BIN_NAMES, BINS, QUANTILES, _measure, _statistics
from mechinterp.errors import NeedsError
from mechinterp.testing import tiny

TEXTS = [[5, 6, 7, 5, 6, 6, 9], [8, 3, 8, 3], [4, 9, 2, 7, 1, 4, 4, 2, 9, 4], [1, 2, 3], [7]]
NAMES = ("mean", "std", "min", "max", "norm", "kurtosis", "zeros", "massive", "top_dim", "top_share", "rms", "hoyer")


def by_hand(x: np.ndarray) -> dict[str, float]:
    """All statistics of some vectors, ``token dim``."""
    squares, n = (x**2).sum(0), x.shape[1]
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
        "rms": np.sqrt((x**2).mean()),
        "hoyer": np.mean([(n**0.5 - np.abs(v).sum() / np.linalg.norm(v)) / (n**0.5 - 1) for v in x]),
        "never_positive": (x <= 0).all(0).sum(),
        "never_positive_share": (x <= 0).all(0).mean(),
        "never_nonzero": (x == 0).all(0).sum(),
        "near_zero": (np.abs(x) < 0.1 * np.sqrt((x**2).mean())).mean(),
    }


def vectors(traces: list[mi.Trace], kind: str, layer: int, token: str) -> np.ndarray:
    """The vectors of all first tokens, or of all others, text by text, ``token dim``."""
    rows = [trace[sites.Site(kind, layer)][0].double().flatten(1).numpy() for trace in traces]
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
    traces = [model.trace(text, kinds) for text in TEXTS]
    for kind, layer, token in itertools.product(kinds, (0, 2), ("first", "rest")):
        x = vectors(traces, kind, layer, token)
        cell = data.sel(kind=kind, layer=layer, token=token)
        for name, value in by_hand(x).items():
            off = 0.04 if name == "near_zero" else 1e-5  # read off a histogram
            np.testing.assert_allclose(cell[name], value, rtol=off, atol=off, err_msg=f"{name} of {kind}.{layer}")
        np.testing.assert_allclose(cell["mean_vector"], x.mean(0), rtol=1e-5, atol=1e-5)


def test_kinds_of_different_width_have_no_mean_vector(model: mi.Model) -> None:
    data = mi.run(model, TEXTS, mi.ActivationStats(("k", "resid_post", "attn_in"))).data
    assert "mean_vector" not in data
    assert data["top_dim"].sel(kind="k").max() < model.dims.n_kv_heads * model.dims.d_head
    assert data["norm"].sel(kind="k", layer=1, token="rest") == pytest.approx(
        by_hand(vectors([model.trace(text, "k.1") for text in TEXTS], "k", 1, "rest"))["norm"], rel=1e-5
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


def read_off(x: np.ndarray, size: int = 7) -> dict[str, np.ndarray]:
    """What the analyzer makes of all numbers of a layer, measured and merged in pieces, ``token dim``."""
    pieces = [_measure(torch.tensor(part).float()) for part in np.array_split(x, size)]
    whole = [torch.stack(some) for some in zip(*pieces, strict=True)]
    gathered = [(some.amax(0) if i == 2 else some.sum(0))[None, None].numpy() for i, some in enumerate(whole)]
    return {name: value[0, 0] for name, value in _statistics(*gathered).items()}


@pytest.mark.parametrize("scale", [1e-6, 1.0, 3000.0])
def test_quantiles_and_histogram_of_any_scale(scale: float) -> None:
    x = scale * np.random.default_rng(0).standard_t(3, size=(501, 16)).astype(np.float32)
    x[:50] = 0
    found, rms = read_off(x), np.sqrt((x.astype(float) ** 2).mean())
    exact = np.quantile(x, QUANTILES, method="inverted_cdf")
    np.testing.assert_allclose(found["quantile_value"], exact, rtol=1 / 8, atol=1e-9 * scale)
    edges = np.array([-np.inf, *(np.array(BINS) * rms), np.inf])
    np.testing.assert_allclose(found["share"], np.histogram(x, edges)[0] / x.size, atol=0.01)
    assert found["share"].sum() == pytest.approx(1, abs=1e-12)
    assert found["near_zero"] == pytest.approx((np.abs(x) < 0.1 * rms).mean(), abs=0.01)
    assert found["min"] == pytest.approx(x.min()) and found["max"] == pytest.approx(x.max())


def test_what_a_gaussian_has() -> None:
    """The numbers that the docstring names."""
    found = read_off(np.random.default_rng(1).normal(size=(400, 1024)).astype(np.float32))
    assert found["near_zero"] == pytest.approx(stats.norm.cdf(0.1) - stats.norm.cdf(-0.1), abs=0.003)
    assert found["hoyer"] == pytest.approx((32 - 32 * np.sqrt(2 / np.pi)) / 31, abs=0.003)
    assert found["outliers"] < 8 and (found["large"], found["never_positive"]) == (0, 0)  # 1.4 of 1,024 by chance


def test_nothing_but_zeros_and_minus_zero() -> None:
    found = read_off(np.array([[0.0, -0.0, 0.0]] * 8))
    assert (found["near_zero"], found["never_nonzero"], found["never_positive_share"]) == (1, 3, 1)
    assert np.isnan(found["share"]).all() and np.isnan(found["hoyer"]) and (found["quantile_value"] == 0).all()
    half = read_off(np.array([[-0.0, 1.0]] * 8))  # -0.0 is not below 0
    assert half["share"][BIN_NAMES.index("-0.25 to 0")] == 0 and half["share"][BIN_NAMES.index("0 to 0.25")] == 0.5


def test_dead_units_and_planted_outliers(llama: mi.Model) -> None:
    made = torch.linspace(0.5, 1.0, 32)
    made[[3, 4]], made[9], made[[20, 7]] = 0.0, -1.0, torch.tensor([30.0, -40.0])
    writes = [mi.Replace(sites.mlp_out(layer), made) for layer in (0, 2)]
    with llama.intervene(*writes):
        data = mi.run(llama, TEXTS, mi.ActivationStats(("mlp_out",))).data.sel(kind="mlp_out", layer=0)
    for token in ("first", "rest"):
        cell = data.sel(token=token)
        assert (int(cell["never_positive"]), int(cell["never_nonzero"]), int(cell["outliers"])) == (4, 2, 2)
        assert float(cell["never_nonzero_share"]) == pytest.approx(2 / 32)
        assert cell["outliers_which"].item() == cell["large_which"].item() == "7 20" and int(cell["large"]) == 2


def test_a_large_dimension_must_be_so_in_enough_tokens_and_layers(llama: mi.Model) -> None:
    """One token of twenty is less than 6%, and one of five layers less than a quarter."""
    spike = torch.ones(32)
    spike[13] = 100.0
    five = tiny("llama", layers=5)

    def large(model: mi.Model, *writes: mi.Intervention) -> list[str]:
        with model.intervene(*writes):
            data = mi.run(model, TEXTS, mi.ActivationStats(("mlp_out",))).data
        return data["large_which"].sel(kind="mlp_out", token="rest").values.tolist()

    assert large(five, mi.Replace(sites.mlp_out(1), spike)) == [""] * 5
    assert large(five, *(mi.Replace(sites.mlp_out(i), spike) for i in (1, 4))) == ["", "13", "", "", "13"]
    assert large(llama, mi.Replace(sites.mlp_out(1), spike)) == ["", "13", ""]

    def at_one_token(x: torch.Tensor) -> torch.Tensor:
        out = x.clone()
        out[-1, 9] = spike  # of the longest text, which comes last
        return out

    assert large(llama, mi.Apply(sites.mlp_out(1), at_one_token)) == [""] * 3
