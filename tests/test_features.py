"""Features on texts against loops over traces, features that were planted, and what ablating them does."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import mechinterp as mi
from mechinterp import sites
from mechinterp.cli import main as cli
from mechinterp.core.statistics import ratio, summarize
from mechinterp.errors import ExamplesError, ModelError, NeedsError, SiteError
from mechinterp.model.autoencoder import SparseAutoencoder
from mechinterp.sites import Site
from mechinterp.testing import check_analyzer, tiny, train_sae

TEXTS = [[5, 6, 7, 5, 6, 6, 9], [8, 3, 8, 3], [4, 9, 2, 7, 1, 4, 4, 2, 9, 4], [1, 2, 3], [7, 11]]


def sae(site: Site, n: int = 14, d: int = 32, seed: int = 0, **more: Any) -> SparseAutoencoder:
    """Random, with features that are seldom active."""
    g = torch.Generator().manual_seed(seed)
    W_enc, W_dec = 0.3 * torch.randn(d, n, generator=g), 0.3 * torch.randn(n, d, generator=g)
    return SparseAutoencoder(site, W_enc, torch.linspace(-3, 0.5, n), W_dec, 0.1 * torch.randn(d, generator=g), **more)


def over(layer: int = 1) -> SparseAutoencoder:
    """A transcoder."""
    return sae(sites.mlp_in(layer), site_out=sites.mlp_out(layer), apply_b_dec_to_input=False)


MAKERS: dict[str, Callable[[], SparseAutoencoder]] = {
    "resid": lambda: sae(sites.resid_post(1)),
    "z": lambda: sae(sites.z(1), d=48),
    "over": over,
}


@pytest.fixture(scope="module")
def qwen() -> mi.Model:
    return tiny("qwen3")


def loss_of(model: mi.Model, text: list[int], *writes: mi.Intervention) -> float:
    logits = model.trace(text, sites.logits(), interventions=writes)[sites.logits()][0]
    return float(torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(text[1:])))


# Planted


def test_planted_features_are_found() -> None:
    """Sparse sums of 24 directions in 16 dimensions."""
    g = torch.Generator().manual_seed(0)
    true = torch.nn.functional.normalize(torch.randn(24, 16, generator=g), dim=-1)
    active = torch.rand(20000, 24, generator=g) < 0.08
    x = 7 * (active * (0.5 + torch.rand(active.shape, generator=g))) @ true
    found = train_sae(x, sites.resid_post(0), features=24, k=3, steps=700)
    best = (true @ torch.nn.functional.normalize(found.W_dec, dim=-1).T).max(1)
    assert (best.values > 0.9).all() and len(set(best.indices.tolist())) == 24
    # The feature of a direction is active where it was planted.
    for direction in range(4):
        f = found.encode(x[:2000], int(best.indices[direction]))
        assert np.corrcoef(f > 7 * 0.25, active[:2000, direction])[0, 1] > 0.7
    assert float((found.error(x) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()) < 0.15


# Against loops


def by_hand(model: mi.Model, one: SparseAutoencoder, first: bool) -> dict[str, Any]:
    """Everything, text by text and token by token."""
    out: dict[str, Any] = {name: [] for name in ("f", "x", "made", "text", "at", "clean", "spliced", "zeroed")}
    for number, text in enumerate(TEXTS):
        trace = model.trace(text, [one.site, one.out])
        x, y = trace[one.site][0].flatten(1), trace[one.out][0].flatten(1)
        own = trace[one.out][0]
        f = one.encode(x)
        made = own.clone().flatten(1)
        made[0 if first else 1 :] = one.decode(f)[0 if first else 1 :]
        nothing = torch.zeros_like(made)
        if not first:
            nothing[0] = own.flatten(1)[0]
        for i in range(0 if first else 1, len(text)):
            for name, value in (("f", f[i]), ("x", y[i]), ("made", made[i]), ("text", number), ("at", i)):
                out[name].append(value)
        out["clean"].append(loss_of(model, text))
        for name, new in (("spliced", made), ("zeroed", nothing)):
            out[name].append(loss_of(model, text, mi.Replace(one.out, new.view(own.shape)[None])))
    return {n: torch.stack(v) if isinstance(v[0], Tensor) else np.array(v) for n, v in out.items()}


@pytest.mark.parametrize(
    ("what", "first", "side", "size"),
    [("resid", True, "left", 5), ("z", False, "right", 2), ("over", False, "left", 2)],
)
def test_everything_by_hand(qwen: mi.Model, what: str, first: bool, side: str, size: int) -> None:
    one = MAKERS[what]()
    asked = mi.Features(one, features=(13, 9), top=4, context=2, first=first, per_token=True)
    data = mi.run(qwen, TEXTS, asked, padding_side=side, batch_size=size).data
    hand = by_hand(qwen, one, first)
    f, x, made, text = hand["f"], hand["x"].double(), hand["made"].double(), hand["text"]
    np.testing.assert_allclose(data["density"], (f > 0).float().mean(0), atol=1e-6)
    np.testing.assert_allclose(data["mean"], f.mean(0), atol=1e-5)
    np.testing.assert_allclose(data["max"], f.amax(0), atol=1e-5)
    for name in ("clean", "spliced", "zeroed"):
        np.testing.assert_allclose(data[name], hand[name], atol=1e-4, err_msg=name)
    explained = 1 - (x - made).square().sum() / (x - x.mean(0)).square().sum()
    cosine = torch.nn.functional.cosine_similarity(x, made, dim=-1)
    lost = hand["zeroed"].mean() - hand["clean"].mean()
    recovered = (hand["zeroed"].mean() - hand["spliced"].mean()) / lost
    want = [explained, (f > 0).sum(1).double().mean(), cosine.mean(), recovered, (f.amax(0) == 0).double().mean()]
    assert data["measure"].values.tolist() == ["explained_variance", "l0", "cosine", "recovered", "dead"]
    np.testing.assert_allclose(data["value"], [float(v) for v in want], atol=1e-4, rtol=1e-4)
    assert (data["ci_low"][:3] <= data["value"][:3]).all() and (data["value"][:3] <= data["ci_high"][:3]).all()
    for number in range(len(TEXTS)):
        own = f[text == number]
        best = own.amax(0).sort(descending=True, stable=True)
        active = int((best.values[:4] > 0).sum())
        assert data["strongest"][number, :active].values.tolist() == best.indices[:active].tolist()
        np.testing.assert_allclose(data["strength"][number, :active], best.values[:active], atol=1e-4)
        assert (data["strongest"][number, active:] == -1).all() and data["strength"][number, active:].isnull().all()
        token = data["token_feature"][number]
        for i, row in zip(hand["at"][text == number], own, strict=True):
            top = row.sort(descending=True, stable=True)
            k = min(4, int((row > 0).sum()))
            assert token[i, :k].values.tolist() == top.indices[:k].tolist() and (token[i, k:] == -1).all()
        assert (token[: 0 if first else 1] == -1).all()
    for feature in (13, 9):
        shown = data.sel(shown=feature)
        best = f[:, feature].sort(descending=True, stable=True)
        np.testing.assert_allclose(shown["activation"], best.values[:4], atol=1e-4)
        row, at = int(shown["text"][0]), int(shown["at"][0])
        assert (row, at) == (text[best.indices[0]], hand["at"][best.indices[0]])
        words = qwen.to_str_tokens(TEXTS[row])
        assert shown["token"][0] == words[at]
        assert shown["before"][0] == "".join(words[max(0, at - 2) : at])
        assert shown["after"][0] == "".join(words[at + 1 : at + 3])
    assert data["features"].sum() == (f.amax(0) > 0).sum()


def test_the_mean_ranks_otherwise(qwen: mi.Model) -> None:
    one = sae(sites.resid_post(1))
    data = mi.run(qwen, TEXTS, mi.Features(one, pool="mean", metric=None, top=3)).data
    f = one.encode(qwen.trace(TEXTS[2], one.site)[one.site][0, 1:]).mean(0).topk(3)
    assert data["strongest"][2].values.tolist() == f.indices.tolist()
    np.testing.assert_allclose(data["strength"][2], f.values, atol=1e-5)
    assert "clean" not in data and "recovered" not in data["measure"]


def test_exact_and_empty_reconstructions(qwen: mi.Model) -> None:
    eye, nothing = torch.eye(32), torch.zeros(32)
    whole = SparseAutoencoder(
        sites.resid_post(0), torch.cat([eye, -eye], 1), nothing.repeat(2), torch.cat([eye, -eye]), nothing
    )
    value = mi.run(qwen, TEXTS, mi.Features(whole)).data["value"]
    np.testing.assert_allclose(value.sel(measure=["explained_variance", "cosine", "recovered"]), 1, atol=1e-6)
    assert value.sel(measure="l0") == 32
    dead = SparseAutoencoder(sites.resid_post(0), whole.W_enc, nothing.repeat(2) - 1e6, whole.W_dec, nothing)
    result = mi.run(qwen, TEXTS, mi.Features(dead))
    value = result.data["value"]
    np.testing.assert_allclose(value.sel(measure=["l0", "recovered"]), 0, atol=1e-6)
    assert value.sel(measure="dead") == 1 and (result.data["strongest"] == -1).all()
    assert (result.data["token"] == "").all() and result.data["features"].sum() == 0


def test_a_ratio_and_its_interval() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for seed in range(60):
        bottom = rng.exponential(1, 40)
        top = 0.7 * bottom + rng.normal(0, 0.2, 40)
        value, low, high = ratio(top, bottom, seed, 400)
        assert value == pytest.approx(top.sum() / bottom.sum())
        inside += bool(low <= 0.7 <= high)
    assert 50 <= inside <= 60
    assert np.isnan(ratio([1.0, 2.0], [0.0, 0.0])).all()
    assert np.isnan(ratio([1.0], [2.0])[1]) and ratio([1.0], [2.0])[0] == 0.5


# Effects


@pytest.mark.parametrize("what", MAKERS)
def test_effects_by_hand(qwen: mi.Model, what: str) -> None:
    """What a write of the output without the feature gives, text by text; the interventions' own, where there are."""
    one, pairs = MAKERS[what](), mi.tasks.ioi(6, seed=1)
    asked = mi.FeatureEffects(one, (13, 4, 9), first=True)
    result = mi.run(qwen, pairs, asked, padding_side="left", batch_size=3)
    data = result.data
    rows: dict[str, Any] = {}
    for feature in (13, 4, 9):
        if not one.transcoder:
            rows[str(feature)] = one.ablate(feature)
    if rows:
        hand = mi.sweep(qwen, pairs, rows, engine="full").data
        np.testing.assert_allclose(data["ablated"], hand["value"], atol=1e-4)
        np.testing.assert_allclose(data["effect"], hand["change"], atol=1e-4)
        np.testing.assert_allclose(data["q"], hand["q"], atol=1e-6)
    else:
        for number, text in enumerate(pairs.texts):
            trace = qwen.trace(text, [one.site, one.out])
            new = trace[one.out] - one.encode(trace[one.site], 13)[..., None] * one.direction(13)
            alone = mi.Examples.of([text], answers=[tuple(list(side) for side in pairs.answers[number])])
            hand = mi.sweep(qwen, alone, [mi.Replace(one.out, new)], engine="full").data
            assert float(data["ablated"].sel(feature=13)[number]) == pytest.approx(float(hand["value"][0, 0]), abs=1e-4)
    assert abs(data["effect"].sel(feature=13)) > 1e-3
    assert result.table()["feature"].tolist() == [13, 4, 9]


def test_attributions_are_exact_where_all_is_linear(qwen: mi.Model) -> None:
    """At the final norm the logit difference is linear in what is written."""
    one, pairs = sae(sites.final_norm()), mi.tasks.ioi(8)
    data = mi.run(qwen, pairs, mi.FeatureEffects(one, top=5)).data
    np.testing.assert_allclose(data["attribution"], data["effect"], atol=1e-4)
    everything = mi.run(qwen, pairs, mi.FeatureEffects(one, tuple(range(14)))).data
    size = abs(everything["ablated"] - everything["clean"]).mean("example")
    order = size.sortby(size, ascending=False)["feature"].values[:5]
    assert data["feature"].values.tolist() == order.tolist()  # ranked by the mean size of the estimate
    np.testing.assert_allclose(everything["active"].sel(feature=13), 1)


def test_choosing_by_size_keeps_the_level_of_the_test() -> None:
    """Effects of random sign: those of the largest mean size stay uniform in p, those of the largest mean do not."""
    rng = np.random.default_rng(0)
    low = np.zeros(2)
    for seed in range(30):
        effects = rng.normal(0, rng.exponential(1, 200), (20, 200))
        for i, size in enumerate((np.abs(effects).mean(0), np.abs(effects.mean(0)))):
            low[i] += (summarize(effects[:, np.argsort(-size)[:10]], seed, 10).p < 0.1).mean() / 30
    assert 0.05 < low[0] < 0.16 and low[1] > 0.25


# The contract, bad input, the command


def test_the_contract() -> None:
    ties = ("strongest", "text", "at", "token", "before", "after", "token_feature")
    pairs, qwen = mi.tasks.ioi(3, seed=3), tiny("qwen3", layers=2)
    check_analyzer(mi.Features(over(), (13, 12), top=2, per_token=True), pairs, models=[qwen], ties=ties)
    check_analyzer(mi.FeatureEffects(sae(sites.resid_post(1)), top=3), pairs, models=[qwen])


def test_bad_input(qwen: mi.Model) -> None:
    one = sae(sites.resid_post(1))
    for make, said in (
        (lambda: mi.Features(one, top=0), "a top above 0"),
        (lambda: mi.FeatureEffects(one, top=0), "must be above 0"),
    ):
        with pytest.raises(NeedsError, match=said):
            make()
    for make in (lambda: mi.Features(one, (14,)), lambda: mi.FeatureEffects(one, (-1,))):
        with pytest.raises(ModelError, match="the features are 0 to 13"):
            make()
    with pytest.raises(ExamplesError, match="example 1 has one token only"):
        mi.run(qwen, [[5, 6], [7]], mi.Features(one))
    for kind in (mi.Features, mi.FeatureEffects):
        with pytest.raises(ModelError, match=r"of vectors of width 24, and resid_post.1 of tiny-qwen3 has 32"):
            mi.run(qwen, TEXTS, kind(sae(sites.resid_post(1), d=24)))
        with pytest.raises(SiteError, match="layers 0 to 2"):
            mi.run(qwen, TEXTS, kind(sae(sites.resid_post(7))))
    silent = SparseAutoencoder(one.site, one.W_enc, one.b_enc - 1e6, one.W_dec, one.b_dec)
    with pytest.raises(ExamplesError, match="none of the 14 features is active"):
        mi.run(qwen, mi.tasks.ioi(3), mi.FeatureEffects(silent))
    classifier = tiny("llama", num_labels=2)
    with pytest.raises(NeedsError, match="is a classifier and has no loss"):
        mi.run(classifier, TEXTS, mi.Features(one))
    labelled = mi.Examples.of(TEXTS, answers=[(0, 1)] * 5)
    data = mi.run(classifier, labelled, mi.Features(one, metric=mi.log_odds())).data
    assert np.isfinite(data["value"].sel(measure="recovered"))


def test_the_command(qwen: mi.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mi.Model, "load", classmethod(lambda cls, *a, **k: qwen))
    one = sae(sites.resid_post(1))
    one.save(tmp_path / "sae")
    pairs = mi.tasks.ioi(6)
    rows = [{"text": t, "answer": a[0][0], "wrong": a[1][0]} for t, a in zip(pairs.texts, pairs.answers, strict=True)]
    (tmp_path / "some.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "out"
    arguments = ["features", "tiny", str(tmp_path / "sae"), str(tmp_path / "some.jsonl"), "--out", str(out)]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    kept = mi.Result.load(out / "results" / "feature-effects").data
    assert {"effect", "attribution"} <= set(kept) and (out / "report.html").is_file()
    assert mi.Result.load(out / "results" / "features").data["density"].sizes == {"feature": 14}
    done = CliRunner().invoke(cli.app, [*arguments[:2], str(tmp_path), *arguments[3:]])
    assert done.exit_code == 1 and "there is no" in done.stderr and "Traceback" not in done.output
