"""A classifier's way through a text, its weights, and what its dimensions go with."""

import numpy as np
import pytest
import torch
from scipy import stats

import mechinterp as mi
from mechinterp.core.statistics import fdr
from mechinterp.errors import ExamplesError, NeedsError
from mechinterp.testing import check_analyzer, tiny

TEXTS = ["2020-01-05 Mary went\n\nto the store\n2020-02-07 08:30 John\n", "John gave", "Mary and John had a drink\n"]


def classifier(family: str = "llama", labels: int = 2, **config: object) -> mi.Model:
    return tiny(family, num_labels=labels, **config)


def odds_of(logits: torch.Tensor, label: int) -> float:
    others = [i for i in range(len(logits)) if i != label]
    return float(logits[label] - logits[others].logsumexp(0))


@pytest.mark.parametrize("labels", [2, 4])
def test_every_number_is_the_prediction_of_a_prefix(model: mi.Model, labels: int) -> None:
    made = classifier(model.arch.family, labels)
    data = mi.run(made, mi.Examples.of(TEXTS), mi.Trajectory("LABEL_1")).data
    for i, text in enumerate(TEXTS):
        ids = made.tokenize(text).ids[0]
        with torch.no_grad():
            whole = made.hf(torch.tensor([ids])).logits[0]
            assert data["prediction"].values[i] == f"LABEL_{int(whole.argmax())}"
            for n in (1, 3, len(ids)):
                if n <= len(ids):
                    prefix = made.hf(torch.tensor([ids[:n]])).logits[0]
                    assert data["log_odds"].values[i, n - 1] == pytest.approx(odds_of(prefix, 1), abs=1e-5)
    odds = data["log_odds"].values
    np.testing.assert_allclose(np.nansum(data["step"].values, 1), data["final_log_odds"].values, atol=1e-5)
    np.testing.assert_allclose(data["probability"].values, 1 / (1 + np.exp(-odds)), atol=1e-6)


def test_the_last_number_is_the_models_own_to_the_bit() -> None:
    made = classifier("qwen3")
    data = mi.run(made, mi.Examples.of(TEXTS[:1]), mi.Trajectory()).data
    with torch.no_grad():
        logits = made.hf(torch.tensor([made.tokenize(TEXTS[0]).ids[0]])).logits[0]
    assert float(data["final_log_odds"].values[0]) == float(logits[1] - logits[:1].logsumexp(0))


def test_lines_and_times() -> None:
    made = classifier()
    data = mi.run(made, mi.Examples.of(TEXTS), mi.Trajectory()).data
    assert [str(t) for t in data["line_text"].values[0]] == [
        "2020-01-05 Mary went",
        "to the store",
        "2020-02-07 08:30 John",
    ]
    assert [str(t) for t in data["line_time"].values[0]] == ["2020-01-05", "2020-01-05", "2020-02-07 08:30"]
    ends = data["line_end"].values[0]
    np.testing.assert_allclose(data["line_log_odds"].values[0], data["log_odds"].values[0, ends])
    np.testing.assert_allclose(np.nansum(data["line_change"].values, 1), data["final_log_odds"].values, atol=1e-5)
    assert data["line_end"].values[1].tolist() == [1, -1, -1]


def test_a_text_of_twelve_thousand_tokens() -> None:
    made = classifier(layers=2, max_position_embeddings=16384)
    ids = torch.randint(3, made.dims.vocab, (12_000,), generator=torch.Generator().manual_seed(0)).tolist()
    data = mi.run(made, [ids], mi.Trajectory()).data
    with torch.no_grad():
        logits = made.hf(torch.tensor([ids])).logits[0]
    assert data["final_log_odds"].values[0] == pytest.approx(odds_of(logits, 1), abs=1e-5)
    assert np.isfinite(data["log_odds"].values).all()


@pytest.mark.parametrize("by", ["level", "step"])
def test_high_and_low_tokens(by: str) -> None:
    made = classifier()
    whole, found = mi.run(made, mi.Examples.of(TEXTS), [mi.Trajectory(), mi.HighScoreTokens(by=by, top=4, context=2)])  # type: ignore[arg-type]
    values = whole.data["log_odds" if by == "level" else "step"].values
    flat = np.sort(values[np.isfinite(values)])
    data = found.data
    np.testing.assert_allclose(data["value"].sel(side="high"), flat[::-1][:4])
    np.testing.assert_allclose(data["value"].sel(side="low"), flat[:4])
    for side in ("high", "low"):
        for rank in range(1, 5):
            one = data.sel(side=side, rank=rank)
            text, at = int(one["text"]), int(one["at"])
            tokens = [str(t) for t in whole.data["token"].values[text]]
            assert str(one["token"].item()) == tokens[at]
            assert str(one["before"].item()) == "".join(tokens[max(0, at - 2) : at])
            assert str(one["after"].item()) == "".join(tokens[at + 1 : at + 3])


@pytest.mark.parametrize(
    "analyzer", [mi.Trajectory(), mi.HighScoreTokens(top=3), mi.ClassifierWeights(top=3)], ids=lambda a: a.name
)
def test_the_contract(analyzer: mi.Analyzer) -> None:
    texts = [*TEXTS, "the store", "a drink for Mary", "went John"]
    examples = mi.Examples.of(texts, answers=[("LABEL_1", "LABEL_0")] * 6)
    check_analyzer(analyzer, examples, models=[classifier("mistral"), classifier("qwen3_moe", 3)])


def test_weights_by_hand(model: mi.Model) -> None:
    made = classifier(model.arch.family, 3)
    weight = made.W_U.detach().double()
    data = mi.run(made, None, mi.ClassifierWeights(top=5)).data
    direction = (weight[2] - weight[:2].mean(0)).numpy()
    got = data.sel(label="LABEL_2")
    np.testing.assert_allclose(got["weight"], direction, atol=1e-6)
    np.testing.assert_allclose(got["sorted"], np.sort(direction)[::-1], atol=1e-6)
    said = {str(s): float(v) for s, v in zip(data["statistic"].values, got["value"].values, strict=True)}
    assert said["kurtosis"] == pytest.approx(stats.kurtosis(direction), rel=1e-4)
    assert said["l2"] == pytest.approx(np.linalg.norm(direction), rel=1e-5)
    assert said["participation"] == pytest.approx((direction**2).sum() ** 2 / (direction**4).sum(), rel=1e-4)
    assert int(got["count"].sum()) == made.dims.d_model
    assert got["top_dimension"].sel(side="for").values[0] == direction.argmax()
    assert got["top_dimension"].sel(side="against").values[0] == direction.argmin()
    pair = mi.run(made, None, mi.ClassifierWeights("LABEL_2", against="LABEL_0")).data
    np.testing.assert_allclose(pair["weight"].values[0], (weight[2] - weight[0]).numpy(), atol=1e-6)
    if not made.dims.n_experts:
        layer, neuron = (int(got[name].sel(side="for").values[0]) for name in ("neuron_layer", "neuron"))
        along = made.gamma().detach().double().numpy() * direction
        wrote = made.W_out(layer)[neuron].detach().double().numpy()
        cosine = wrote @ along / np.linalg.norm(wrote) / np.linalg.norm(along)
        assert float(got["neuron_cosine"].sel(side="for").values[0]) == pytest.approx(cosine, abs=1e-5)


def test_directions_in_words() -> None:
    base = tiny()
    token = base.tokenize(" Mary").ids[0][0]
    head = torch.nn.Linear(32, 1, bias=False)
    head.weight.data = base.W_U[token][None].clone() * 3
    data = mi.run(mi.load_classifier(base, head=head), None, mi.ClassifierWeights(top=3)).data
    assert str(data["word"].sel(side="for").values[0, 0]) == " Mary"
    assert float(data["word_cosine"].sel(side="for").values[0, 0]) == pytest.approx(1.0, abs=1e-5)


def test_components_sum_to_the_log_odds(model: mi.Model) -> None:
    made = classifier(model.arch.family)
    examples = mi.Examples.of(TEXTS, answers=[("LABEL_1", "LABEL_0")] * 3)
    way, parts = mi.run(made, examples, [mi.Trajectory(), mi.DirectLogitAttribution()])
    np.testing.assert_allclose(parts.data["attribution"].sum("component"), way.data["final_log_odds"], atol=2e-4)


def test_dimensions_against_scipy() -> None:
    made, rng = classifier(), np.random.default_rng(0)
    ids = rng.integers(3, made.dims.vocab, (9, 6)).tolist()
    feature = tuple(rng.normal(size=9).tolist())
    asked = mi.DimensionCorrelation({"noise": feature, "same": (1.0,) * 9}, dimensions=(4, 0, 9))
    data = mi.run(made, ids, asked).data
    states = made.trace(ids, mi.sites.final_norm(positions="end"))[mi.sites.final_norm(positions="end")]
    for d in (4, 0, 9):
        expected = stats.pearsonr(states[:, d].double().numpy(), feature)
        got = data.sel(feature="noise", dimension=d)
        assert float(got["correlation"]) == pytest.approx(expected.statistic, abs=1e-6)
        assert float(got["p"]) == pytest.approx(expected.pvalue, rel=1e-4)
        low, high = expected.confidence_interval(0.95)
        assert (float(got["ci_low"]), float(got["ci_high"])) == pytest.approx((low, high), abs=1e-5)
    np.testing.assert_allclose(data["q"].sel(feature="noise"), fdr(data["p"].sel(feature="noise").values), atol=1e-12)
    assert data["correlation"].sel(feature="same").isnull().all()
    with pytest.raises(ExamplesError, match="2 numbers for 9 texts"):
        mi.run(made, ids, mi.DimensionCorrelation({"short": (1.0, 2.0)}))
    with pytest.raises(NeedsError, match="no dimension 99"):
        mi.run(made, ids, mi.DimensionCorrelation({"x": feature}, dimensions=(99,)))


def test_what_is_no_classifier_is_refused(llama: mi.Model) -> None:
    for analyzer in (mi.Trajectory(), mi.HighScoreTokens(), mi.ClassifierWeights(), mi.SpuriousPatterns()):
        with pytest.raises(NeedsError, match="no head of two labels"):
            mi.run(llama, mi.Examples.of(TEXTS), analyzer)
    with pytest.raises(NeedsError, match="no label 'x'; give one of LABEL_0, LABEL_1"):
        mi.run(classifier(), mi.Examples.of(TEXTS), mi.Trajectory("x"))
    with pytest.raises(NeedsError, match="no regular expression"):
        mi.Trajectory(times="(")
    with pytest.raises(NeedsError, match="above 0"):
        mi.HighScoreTokens(top=0)
    with pytest.raises(NeedsError, match="compared with itself"):
        mi.ClassifierWeights("LABEL_0", against="LABEL_0")
