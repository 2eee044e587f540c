"""Linear probes: against loops by hand, what is planted, what is not there, and what must be refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import mechinterp as mi
from mechinterp import sites
from mechinterp.analyzers.probe import Probe
from mechinterp.analyzers.probe_data import Probed
from mechinterp.core.tokens import Tokens
from mechinterp.engine.backward import backward
from mechinterp.errors import ExamplesError, NeedsError, OutputError
from mechinterp.testing import check_analyzer, tiny

NAMES = ["Mary", "John", "Tom", "Paul"]
PLACES = ["store", "park", "school", "office"]
THINGS = ["drink", "book", "ring", "kiss"]


def sentences(n: int = 64, seed: int = 0) -> tuple[list[str], list[str]]:
    """Texts whose label is whether the first name is Mary or John."""
    rng = np.random.default_rng(seed)
    texts, labels = [], []
    while len(texts) < n:
        a, b = rng.choice(NAMES, 2, replace=False)
        text = f"Then {a} and {b} went to the {rng.choice(PLACES)} and had a {rng.choice(THINGS)}"
        if text not in texts:
            texts.append(text)
            labels.append("one" if a in NAMES[:2] else "two")
    return texts, labels


def examples(n: int = 64) -> mi.Examples:
    texts, labels = sentences(n)
    return mi.Examples.of(texts, labels=labels, answers=[(" Mary", " John")] * n)


def words() -> mi.Examples:
    texts, _ = sentences(12)
    spans: list[list[tuple[int, int]]] = []
    labels: list[list[str]] = []
    for text in texts:
        at, some = 0, []
        for word in text.split():
            start = text.index(word, at)
            some.append((start, at := start + len(word)))
        spans.append(some)
        labels.append(["name" if w in NAMES else "noun" if w in PLACES + THINGS else "rest" for w in text.split()])
    return mi.Examples.of(texts, labels=labels, answers=[(" Mary", " John")] * 12).with_category("word", spans)


@pytest.mark.parametrize(
    "probe",
    [
        Probe(sites.resid_post((0, 2)), folds=3, permutations=5, mdl=True),
        Probe("z.1", positions="all", folds=3),
    ],
)
def test_contract(probe: Probe) -> None:
    check_analyzer(probe, examples(24), models=[tiny("qwen3")])


def test_contract_of_words() -> None:
    check_analyzer(Probe(sites.resid_post((1,)), each="word", folds=3), words(), models=[tiny("mistral")])


def test_scores_are_those_of_a_loop_by_hand() -> None:
    model, given = tiny("qwen2"), examples()
    result = mi.run(model, given, Probe(folds=4))
    data = result.data
    assert [str(s) for s in data["site"].values] == ["resid_pre.0", "resid_pre.1", "resid_pre.2", "resid_post.2"]
    tokens = given.tokenize(model.tokenizer)
    owner = np.arange(64)
    folds = Probed.of(tokens, owner, np.stack([owner * 0, owner * 0 + 1], 1), None, None, 4, 0, False).held
    with torch.no_grad():
        hidden = [model.hf(torch.tensor([ids]), output_hidden_states=True).hidden_states for ids in tokens.ids]
    y = np.array([label == "two" for label in given.labels or ()])
    for layer in range(3):  # the last one of these is normed
        x = np.stack([h[layer][0, -1].numpy() for h in hidden]).astype(float)
        right = np.zeros(64)
        for fold in folds:
            fit = make_pipeline(StandardScaler(), LogisticRegression(tol=1e-8, max_iter=5000)).fit(x[~fold], y[~fold])
            right[fold] = fit.predict(x[fold]) == y[fold]
        assert float(data["accuracy"].sel(task="labels").values[layer]) == pytest.approx(right.mean(), abs=1 / 64)
    assert data["accuracy"].sel(task="labels").max() > data["accuracy"].sel(task="majority").max()


def test_what_is_in_the_token_is_read_and_what_is_not_is_not() -> None:
    """The label is the first name; nothing of it is in the embedding of the last token, all of it in that name's."""
    model, (texts, labels) = tiny("llama"), sentences()
    spans = [(5, 5 + len(t.split()[1])) for t in texts]
    given = mi.Examples.of(texts, labels=labels, spans={"first": spans})
    at = mi.run(model, given, Probe("embed", positions="first", folds=4, permutations=40)).data
    assert float(at["accuracy"].sel(task="labels")[0]) == 1.0 and float(at["auroc"][0]) == 1.0
    assert float(at["p"][0]) == pytest.approx(1 / 41)
    end = mi.run(model, given, Probe("embed", folds=4, permutations=40)).data
    assert float(end["p"][0]) > 0.05
    assert float(end["ci_low"].sel(task="labels")[0]) < float(end["accuracy"].sel(task="majority")[0])


def drawn(x: torch.Tensor, y: np.ndarray, folds: int = 2, seed: int = 0, of_words: bool = False) -> Probed:
    n = len(y)
    tokens = Tokens(tuple((i,) for i in range(n)), None, None, {}, {}, tuple(y.tolist()))
    where = np.stack([np.zeros(n, int), np.ones(n, int)], 1)
    return Probed.of(tokens, np.arange(n), where, None, None, folds, seed, of_words)


@pytest.mark.parametrize("kind", ["classes", "numbers"])
def test_p_is_uniform_where_there_is_nothing(kind: str) -> None:
    found = []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        x = torch.from_numpy(rng.standard_normal((41, 6))).float()
        y = rng.integers(0, 2, 41).astype(str) if kind == "classes" else rng.standard_normal(41)
        data = drawn(x, y, 3, seed)
        one = Probe(permutations=39, control=False)._site(x, data, seed)
        found.append(float(one["p"]) - np.random.default_rng(seed).uniform(0, 1 / 40))  # ranks, made continuous
    assert stats.kstest(found, "uniform").pvalue > 0.01
    assert np.mean(np.array(found) < 0.05) < 0.13


def test_description_length() -> None:
    """Labels that are read at once cost less than those that are not, which cost no less than a uniform code."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 400)
    x = torch.from_numpy(rng.standard_normal((400, 8)) + 3.0 * y[:, None]).float()
    easy = Probe(mdl=True)._site(x, drawn(x, y.astype(str)), 0)
    shuffled = rng.permutation(y)
    hard = Probe(mdl=True)._site(x, drawn(x, shuffled.astype(str)), 0)
    assert 400 / float(easy["mdl"]) > 5
    assert float(hard["mdl"]) > 400 * 0.98


def test_online_coding_keeps_groups_whole() -> None:
    """What a block is coded with has no unit of its groups: labels that only say the group cost a uniform code or more.

    Each group is one point with a label of its own, so that a probe that has seen one of its units knows the others.
    """
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(40), 10)
    y, x = rng.integers(0, 2, 40)[group], torch.from_numpy(rng.standard_normal((40, 60))).float()[group]
    tokens = Tokens(tuple((i,) for i in range(400)), None, None, {}, {}, tuple(y.astype(str).tolist()))
    where = np.stack([np.zeros(400, int), np.ones(400, int)], 1)

    def coded(groups: tuple[int, ...] | None) -> tuple[Probed, float]:
        data = Probed.of(tokens, np.arange(400), where, None, groups, 2, 0, False)
        return data, 400 / float(Probe(mdl=True)._site(x, data, 0)["mdl"])

    data, compression = coded(tuple(group.tolist()))
    for portion in data.portions(0):
        assert not set(group[portion]) & set(group[~portion])
    assert compression < 1.05 < 2 < coded(None)[1]


def test_online_coding_is_measured_or_refused() -> None:
    model, (texts, labels) = tiny("llama"), sentences(12)
    given = mi.Examples.of(texts, labels=labels)
    with pytest.raises(ExamplesError, match="these labels are numbers; leave mdl out"):
        mi.run(model, given, Probe(labels=tuple(float(len(t)) for t in texts), mdl=True))
    some = Probe(labels=("a",) * 5 + ("b",) * 5 + ("a", "b"), groups=(1,) * 5 + (2,) * 5 + (3, 4), mdl=True, folds=2)
    with pytest.raises(ExamplesError, match="nothing to code the rest with"):
        mi.run(model, given, some, seed=1)


def test_a_control_task_is_learnt_by_type() -> None:
    """In the embedding every type is a point, so that random labels of types are learnt as well as true ones."""
    data = mi.run(tiny("llama"), words(), Probe("embed", each="word", folds=3, c=1000.0)).data
    value = {str(t): float(data["accuracy"].sel(task=t)[0]) for t in data["task"].values}
    assert value["labels"] > 0.9 and value["control"] > 0.9 and value["type"] > 0.9
    assert float(data["selectivity"][0]) == pytest.approx(value["labels"] - value["control"])


def test_numbers_are_regressed() -> None:
    model, (texts, _) = tiny("qwen3"), sentences()
    lengths = tuple(float(len(t)) for t in texts)
    result = mi.run(model, mi.Examples.of(texts), Probe(labels=lengths, positions="all", permutations=20))
    data = result.data
    assert float(data["r2"].sel(task="labels").max()) > 0.3 and float(data["p"].min()) < 0.05
    assert float(data["spearman"].max()) > 0.5
    probe = mi.LinearProbe.of(result)
    assert probe.classes == ("value",) and float(probe.direction().norm()) == pytest.approx(1.0)


def test_equal_texts_and_groups_stay_together() -> None:
    texts, labels = sentences(24)
    given = mi.Examples.of(texts + texts, labels=labels + labels)
    tokens = given.tokenize(tiny("llama").tokenizer)
    owner = np.arange(48)
    where = np.stack([owner * 0, owner * 0 + 1], 1)
    held = Probed.of(tokens, owner, where, None, None, 3, 0, False).held
    assert (held[:, :24] == held[:, 24:]).all()
    groups = tuple(i % 8 for i in range(24)) * 2
    held = Probed.of(tokens, owner, where, None, groups, 3, 0, False).held
    for group in range(8):
        mine = np.array(groups) == group
        assert any((held[f, mine]).all() for f in range(3))


def test_probes_are_kept_and_moved_to_other_texts(tmp_path: Path) -> None:
    model, given = tiny("qwen3"), examples()
    result = mi.run(model, given, Probe(folds=4, positions="all"))
    loaded = mi.Result.load(result.save(tmp_path / "probe"))
    moved = mi.run(model, given, mi.ProbeTransfer(loaded))
    assert moved.meta["seen"] == moved.meta["texts"] == 64
    assert "64 of 64 texts they were fitted on" in moved.views[0].title
    same = moved.data
    x = model.trace(given, sites.resid_post(2))
    probe = mi.LinearProbe.of(loaded, "resid_post.2")
    real = x.batch.mask.clone()
    real[:, 0] = False
    mean = (x["resid_post.2"] * real[..., None]).sum(1) / real.sum(1, keepdim=True)
    guess = [probe.classes[i] for i in probe.scores(mean).argmax(1).tolist()]
    assert float(same["accuracy"][-1]) == pytest.approx(np.mean(np.array(guess) == np.array(given.labels)))
    texts, labels = sentences(40, seed=7)
    some = mi.run(model, mi.Examples.of([*texts, given.texts[3]], labels=[*labels, "one"]), mi.ProbeTransfer(loaded))
    assert some.meta["seen"] == 1 + len(set(texts) & set(given.texts))
    other = mi.run(model, mi.Examples.of(texts, labels=labels), mi.ProbeTransfer(loaded)).data
    assert float(other["accuracy"].max()) > float(other["majority"][0])
    with pytest.raises(ExamplesError, match="the label 'three' is none of the probes'"):
        mi.run(model, mi.Examples.of(texts[:2], labels=["one", "three"]), mi.ProbeTransfer(loaded))
    with pytest.raises(NeedsError, match="must have a result of Probe"):
        mi.ProbeTransfer(mi.run(model, given, mi.ActivationStats()))


@pytest.mark.parametrize("labels", [None, [None, "a"] * 6])
def test_labels_that_are_not_there(labels: Any) -> None:
    texts, _ = sentences(12)
    match = "have no labels" if labels is None else "a probe needs two classes"
    with pytest.raises(ExamplesError, match=match):
        mi.run(tiny("llama"), mi.Examples.of(texts, labels=labels), Probe())


def test_unlabelled_texts_are_counted() -> None:
    texts, labels = sentences(30)
    some: list[str | None] = [None if i % 3 == 0 else label for i, label in enumerate(labels)]
    result = mi.run(tiny("llama"), mi.Examples.of(texts, labels=some), Probe(folds=2))
    assert result.meta["left_out"] == 10 and result.meta["units"] == 20


def test_words_that_share_a_token_are_counted() -> None:
    """Words that are halves of one token have one vector; each of them is counted, and no other word."""
    texts, _ = sentences(12)
    spans = [[(0, 2), (2, 4), (5, 9)] if i < 3 else [(0, 4), (5, 9)] for i in range(12)]
    given = mi.Examples.of(texts).with_category(
        "word", [[(a, min(b, len(texts[i]))) for a, b in row] for i, row in enumerate(spans)]
    )
    labels = tuple(tuple("ab"[j % 2] for j in range(len(row))) for row in spans)
    result = mi.run(tiny("llama"), given, Probe("embed", labels, each="word", folds=2))
    assert result.meta["sharing"] == 6 and result.meta["units"] == 3 * 3 + 9 * 2
    assert mi.run(tiny("llama"), given, mi.ProbeTransfer(result, labels)).meta["sharing"] == 6


def test_what_is_refused() -> None:
    model, (texts, labels) = tiny("llama"), sentences(12)
    given = mi.Examples.of(texts, labels=labels)
    with pytest.raises(NeedsError, match="two folds or more"):
        Probe(folds=1)
    with pytest.raises(NeedsError, match=r"pattern\.0 has no vector for each token"):
        mi.run(model, given, Probe("pattern.0"))
    with pytest.raises(NeedsError, match="not equally wide"):
        mi.run(model, given, Probe(("resid_post.0", "mlp_act.0"), folds=2))
    with pytest.raises(ExamplesError, match=r"the class 'one' is in 6 groups, fewer than the 11 folds"):
        mi.run(model, given, Probe(folds=11, labels=("one",) * 6 + ("two",) * 6))
    twice = mi.Examples.of([texts[0], *texts], labels=[labels[0], *labels])
    with pytest.raises(ExamplesError, match="the groups leak: examples 0 and 1 are the same text"):
        mi.run(model, twice, Probe(groups=tuple(range(13)), folds=2))
    with pytest.raises(ExamplesError, match="example 1 has no group; give it one"):
        mi.run(model, given, Probe(groups=("a", None, *range(10)), folds=2))
    with pytest.raises(ExamplesError, match="no category 'word'; each= can be token"):
        mi.run(model, given, Probe(each="word"))
    with pytest.raises(ExamplesError, match="example 0 has 2 labels; give one, or each="):
        mi.run(model, mi.Examples.of(texts, labels=[["a", "b"]] * 12), Probe())
    with pytest.raises(ExamplesError, match="has 2 labels for 11 words or tokens"):
        mi.run(model, mi.Examples.of(texts, labels=[["a", "b"]] * 12), Probe(each="token"))
    with pytest.raises(ExamplesError, match="there are 3 labels for 12 texts"):
        mi.run(model, given, Probe(labels=("a", "b", "a")))
    with pytest.raises(ExamplesError, match="must be finite floats"):
        mi.run(model, given, Probe(labels=(float("inf"), *map(float, range(11)))))


def test_a_linear_probe(tmp_path: Path) -> None:
    site = mi.Site("resid_post", 1)
    weight = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    probe = mi.LinearProbe(site, ("no", "yes"), weight, torch.tensor([0.5, -0.5]))
    back = mi.LinearProbe.load(probe.save(tmp_path / "deep" / "probe.safetensors"))
    assert (back.site, back.classes) == (probe.site, probe.classes)
    assert torch.equal(back.weight, probe.weight) and torch.equal(back.bias, probe.bias)
    torch.testing.assert_close(probe.direction("yes"), -probe.direction("no"))
    model = tiny("llama")
    x = model.trace("Then Mary went", site)[site]
    with model.intervene(probe.ablate()):
        flat = model.trace("Then Mary went", site)[site]
    torch.testing.assert_close(flat @ probe.direction(), torch.zeros(1, 3), atol=1e-4, rtol=0.0)
    with model.intervene(probe.steer("yes", 2.0)):
        moved = model.trace("Then Mary went", site)[site]
    torch.testing.assert_close((moved - x) @ probe.direction("yes"), torch.full((1, 3), 2.0), atol=1e-4, rtol=0.0)
    with pytest.raises(NeedsError, match="no class 'maybe'; it has no, yes"):
        probe.direction("maybe")
    with pytest.raises(NeedsError, match="with 32 dimensions"):
        probe.scores(torch.zeros(2, 7))
    (tmp_path / "not").write_text("hello")
    with pytest.raises(OutputError, match="cannot read a probe"):
        mi.LinearProbe.load(tmp_path / "not")


def test_a_direction_is_what_the_score_grows_along() -> None:
    """Of two classes and of more, with rows that do not add up to zero: the gradient of the metric, at length 1."""
    g = torch.Generator().manual_seed(0)
    for k in (1, 2, 4):
        weight = torch.randn(k, 6, generator=g) + torch.randn(6, generator=g)
        probe = mi.LinearProbe(mi.Site("resid_post", 1), tuple("abcd"[:k]), weight, torch.zeros(k))
        for name in probe.classes:
            x = torch.randn(3, 6, generator=g, requires_grad=True)
            metric = probe.metric(name)
            batch = mi.Examples.of([[1]] * 3).tokenize(None).batch((0, 1, 2))
            metric.score(x, batch, None, None).sum().backward()
            assert x.grad is not None
            along = x.grad[0] / x.grad[0].norm()
            torch.testing.assert_close(probe.direction(name), along, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["z.1", "z.1.h2", "v.0"])
def test_probes_of_heads(name: str, tmp_path: Path) -> None:
    """At all heads, or at one: what a probe reads it also writes, and what it removes it no longer reads."""
    model = tiny("qwen3")
    given = mi.Examples.of(sentences(24)[0], labels=["no", "yes"] * 12)
    probe = mi.LinearProbe.of(mi.run(model, given, Probe(name, folds=3)))
    probe = mi.LinearProbe.load(probe.save(tmp_path / "probe"))
    probe.check(model)
    site = mi.Site.parse(name)
    assert probe.site == site and probe.weight.shape == (2, model.dims.width(site))
    before = model.trace(given.texts[:4], site)[site]
    along = probe.direction()

    def read() -> torch.Tensor:
        x = model.trace(given.texts[:4], site)[site]
        return (x.flatten(2) if x.ndim > 3 else x) @ along - (before.flatten(2) if x.ndim > 3 else before) @ along

    with model.intervene(probe.steer("yes", 3.0)):
        torch.testing.assert_close(read(), torch.full_like(read(), 3.0), atol=1e-4, rtol=0.0)
    with model.intervene(probe.ablate()):
        x = model.trace(given.texts[:4], site)[site]
        flat = x.flatten(2) if x.ndim > 3 else x
        torch.testing.assert_close(flat @ along, torch.zeros_like(flat[..., 0]), atol=1e-4, rtol=0.0)
    scores = probe.scores(before)
    assert scores.shape == (*before.shape[:2], 2)
    answers = mi.Examples.of(sentences(6)[0], answers=[(" Mary", " John")] * 6)
    asked = mi.Steering(probe, strengths=(2.0,), draws=2), mi.ActivationPatching("embed", metric=probe.metric())
    packed, full = (mi.run(model, answers, asked[0], engine=engine).data for engine in ("packed", "full"))
    np.testing.assert_allclose(packed["effect"], full["effect"], atol=1e-4)
    pairs = mi.Examples.pairs(["Then he saw Mary"], ["Then he saw John"])
    mi.run(model, pairs, asked[1])
    with pytest.raises(NeedsError, match=f"{name} has {probe.weight.shape[1]} dimensions and tiny-llama has"):
        probe.check(tiny("llama", head_dim=4))


def test_a_probe_knows_what_it_was_fitted_on(tmp_path: Path) -> None:
    model = tiny("llama")
    given = mi.Examples.of(sentences(24)[0], labels=["no", "yes"] * 12)
    for options, said in (({"positions": "all"}, "the mean of its texts"), ({"each": "token"}, "each token")):
        probe = mi.LinearProbe.of(mi.run(model, given, Probe("embed", folds=3, **options)))
        probe = mi.LinearProbe.load(probe.save(tmp_path / "probe"))
        assert probe.taken == {"positions": "end", "pool": "mean", "each": None} | options
        with pytest.raises(NeedsError, match=f"fitted on {said}, and a metric is of one token"):
            probe.metric()
        assert probe.metric(positions="end").positions == "end"
    probe = mi.LinearProbe.of(mi.run(model, given, Probe("embed", folds=3, positions=1)))
    assert probe.metric().positions == 1 and mi.LinearProbe.load(probe.save(tmp_path / "probe")).metric().positions == 1


@pytest.mark.parametrize("position", ["end", 2])
def test_a_probe_is_a_metric(position: Any) -> None:
    """At its site: packed equals full, the gradient is the direction, and a patch of the site itself is exact."""
    model = tiny("qwen3")
    weight = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    metric = mi.LinearProbe(mi.Site("resid_post", 1), ("a", "b", "c"), weight, torch.zeros(3)).metric("b", position)
    pairs = mi.Examples.pairs(["Then Mary went to", "John had a"], ["Then John went to", "Mary had a"])
    found = {}
    for engine in ("packed", "full"):
        wanted = mi.ActivationPatching(("resid_pre", "mlp_out"), positions="each", metric=metric)
        found[engine] = mi.run(model, pairs, wanted, engine=engine).data
    for name in ("effect", "patched"):
        if name in found["full"]:
            np.testing.assert_allclose(found["packed"][name], found["full"][name], atol=1e-4)
    late = found["packed"]["effect"].sel(site="mlp_out.2") if "site" in found["packed"].dims else None
    assert late is None or np.nan_to_num(late.values).max() == 0.0

    class Slope(mi.Analyzer):
        def needs(self, model: mi.Model) -> mi.Needs:
            return mi.Needs(grads={"own": mi.Grad(sites.resid_post(1, positions=position), metric)})

        def observe(self, batch: mi.Batch) -> mi.Part:
            return mi.Part(batch.grads["own"][sites.resid_post(1)], "example dim")

    slope = torch.from_numpy(mi.run(model, pairs, Slope()).data["value"].transpose("example", "dim").values)
    torch.testing.assert_close(slope, weight[1].expand(2, -1), atol=1e-5, rtol=1e-4)

    with pytest.raises(NeedsError, match=r"which resid_post\.2 comes after"):
        backward(model, pairs.tokenize(model.tokenizer).batch((0, 1)), [mi.Site("resid_post", 2)], metric)
