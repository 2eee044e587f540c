"""Neurons that go with a label: against scikit-learn on traces, a planted neuron, and what random labels give."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score

import mechinterp as mi
from mechinterp import sites
from mechinterp.analyzers.concept_neurons import _best, _Concepts, _ranked, _Units
from mechinterp.analyzers.neuron_sets import alike
from mechinterp.core.statistics import fdr
from mechinterp.errors import ExamplesError, NeedsError, SiteError
from mechinterp.testing import check_analyzer, tiny

RNG = np.random.default_rng(0)
TEXTS = [RNG.integers(3, 90, 3 + i % 4).tolist() for i in range(24)]
LABELS = ["b" if i % 3 else "a" for i in range(24)]  # 8 and 16
ANSWERS = [(5, 9)] * 24
RANKED = mi.ConceptNeurons(sizes=(), top=4, shown=3)


def examples(labels: Any = LABELS) -> mi.Examples:
    return mi.Examples.of(TEXTS, labels, ANSWERS)


@pytest.fixture(scope="module")
def acts(llama: mi.Model) -> list[np.ndarray]:
    """Of each text alone, ``layer pos neuron``."""
    return [llama.trace(text, "mlp_act").stack("mlp_act")[:, 0].numpy() for text in TEXTS]


def held_out(labels: Any, seed: int = 0) -> list[int]:
    found = _Concepts.of(labels, np.arange(len(labels)), 0.3, seed, np.arange(len(labels)))
    return found.texts[found.held_out].tolist()


@pytest.mark.parametrize("how", ["end", "all", "token"])
def test_statistics_of_every_neuron(llama: mi.Model, acts: list[np.ndarray], how: str) -> None:
    options: dict[str, Any] = {"each": "token"} if how == "token" else {"positions": how}
    data = mi.run(llama, examples(), mi.ConceptNeurons((2, 0), sizes=(), **options), batch_size=5).data
    out = held_out(LABELS)
    assert (data["texts"].item(), data["held_out"].item(), data["label"].item()) == (16, 5, "b")
    assert sum(LABELS[i] == "a" for i in out) == 2
    for layer in (0, 2):
        of: dict[bool, list[np.ndarray]] = {True: [], False: []}
        labels: dict[bool, list[bool]] = {True: [], False: []}
        for i in range(24):
            x = acts[i][layer]
            units = {"end": x[-1:], "all": x[1:].mean(0)[None], "token": x[1:]}[how]
            of[i in out].append(units)
            labels[i in out] += [LABELS[i] == "b"] * len(units)
        for neuron in (0, 20, 47):
            cell = data.sel(label="b", layer=layer, neuron=neuron)
            x, y = np.concatenate(of[False])[:, neuron], labels[False]
            assert float(cell["auroc"]) == pytest.approx(roc_auc_score(y, x), abs=1e-9)
            assert float(cell["correlation"]) == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-5)
        for top in range(3):
            site = mi.Site.parse(str(data["site"].values[0, top]))
            assert isinstance(site.neurons, int)
            if site.layer == layer:
                auroc = roc_auc_score(labels[True], np.concatenate(of[True])[:, site.neurons])
                assert float(data["held_out_auroc"][0, top]) == pytest.approx(auroc, abs=1e-9)
                assert int(data["rank"].sel(label="b", layer=layer, neuron=site.neurons)) == top
    np.testing.assert_allclose(data["q"].values, fdr(data["p"].values))
    strength = np.abs(data["auroc"].values - 0.5).ravel()[np.argsort(data["rank"].values.ravel())]
    assert (np.diff(strength) <= 1e-9).all()


def test_the_texts_where_a_neuron_is_largest(llama: mi.Model, acts: list[np.ndarray]) -> None:
    data = mi.run(llama, examples(), RANKED).data.sel(label="b")
    for top in range(4):
        site = mi.Site.parse(str(data["site"].values[top]))
        assert isinstance(site.layer, int) and isinstance(site.neurons, int)
        ends = np.array([acts[i][site.layer, -1, site.neurons] for i in range(24)])
        order = np.argsort(-ends)[:3]
        assert data["example"].values[top].tolist() == order.tolist()
        np.testing.assert_allclose(data["value"][top], ends[order], atol=1e-5)
        assert data["example_label"].values[top].tolist() == [LABELS[i] for i in order]
        words = llama.to_str_tokens(TEXTS[order[0]])
        assert data["context"].values[top, 0] == "".join(words[:-1]) + f"«{words[-1]}»"


def test_unlabelled_texts_are_left_out_and_counted(llama: mi.Model) -> None:
    """As if they were not there; several labels are told from the rest each."""
    some: list[Any] = [(None, float("nan"))[i % 2] if i in (3, 10, 17) else (i % 3) * 7 for i in range(24)]
    kept = [i for i in range(24) if i not in (3, 10, 17)]
    result = mi.run(llama, examples(some), RANKED)
    fewer = mi.Examples.of([TEXTS[i] for i in kept], [some[i] for i in kept])
    other = mi.run(llama, fewer, RANKED)
    assert (result.meta["unlabelled"], other.meta["unlabelled"]) == (3, 0)
    assert result.data["label"].values.tolist() == ["0", "7", "14"]
    for name in ("auroc", "p", "q", "held_out_auroc", "value"):
        np.testing.assert_allclose(result.data[name], other.data[name], atol=1e-5, err_msg=name)
    assert [kept[i] for i in other.data["example"].values.ravel()] == result.data["example"].values.ravel().tolist()


def test_switched_off_against_a_plain_sweep(llama: mi.Model) -> None:
    asked = mi.ConceptNeurons((1, 2), sizes=(1, 5), metric=mi.logit_diff())
    result = mi.run(llama, examples(), asked)
    data, out = result.data.sel(label="b"), held_out(LABELS)
    assert result.meta["metric"] == "logit difference"
    first = data["rank"].values < 5
    writes = [
        mi.Zero(sites.mlp_act(layer, neurons=tuple(np.flatnonzero(first[i]).tolist())))
        for i, layer in enumerate((1, 2))
        if first[i].any()
    ]
    swept = mi.sweep(llama, examples(), {"off": writes}, mi.logit_diff()).data
    change = (swept["value"].squeeze().values - swept["base"].values)[out]
    inside = np.array([LABELS[i] == "b" for i in out])
    for on, which in (("label", inside), ("rest", ~inside)):
        cell = data.sel(order="ranked", size=5, on=on)
        assert float(cell["effect"]) == pytest.approx(change[which].mean(), abs=1e-5)
        excess = data["effect"].sel(size=5, on=on)
        assert float(data["excess"].sel(size=5, on=on)) == pytest.approx(
            float(excess.sel(order="ranked") - excess.sel(order="random")), abs=1e-6
        )


def test_mean_ablation_puts_the_mean_of_all_tokens_there(llama: mi.Model, acts: list[np.ndarray]) -> None:
    asked = mi.ConceptNeurons((1,), sizes=(3,), ablation="mean")
    data, out = mi.run(llama, examples(), asked, batch_size=7).data.sel(label="b"), held_out(LABELS)
    neurons = tuple(np.flatnonzero(data["rank"].values[0] < 3).tolist())
    mean = np.concatenate([x[1, 1:] for x in acts])[:, list(neurons)].mean(0)
    write = mi.Replace(sites.mlp_act(1, neurons=neurons), torch.tensor(mean))
    swept = mi.sweep(llama, examples(), {"off": [write]}, mi.logit_diff()).data
    change = (swept["value"].squeeze().values - swept["base"].values)[out]
    inside = np.array([LABELS[i] == "b" for i in out])
    effect = data["effect"].sel(order="ranked", size=3, on="label")
    assert float(effect) == pytest.approx(change[inside].mean(), abs=1e-5)


def planted() -> tuple[mi.Model, mi.Examples]:
    """A model whose neuron 17 of layer 1 is active at the end of texts that end in one of some tokens, and writes."""
    model, rng = tiny("llama", layers=2, seed=3), np.random.default_rng(2)
    texts = [[*rng.integers(3, 60, 3).tolist(), 60 + i] for i in range(28)]
    labels = [i % 2 == 0 for i in range(28)]
    site = sites.mlp_in(1, positions="end")
    x = model.trace(texts, site)[site]
    wanted = torch.tensor([1.0 if one else -1.0 for one in labels])
    along = torch.linalg.lstsq(x, wanted[:, None]).solution[:, 0]
    with torch.no_grad():
        mlp = model.hf.get_submodule(model.arch.layer(1) + ".mlp")
        mlp.gate_proj.weight[17] = 10 * along
        mlp.up_proj.weight[17] = along
        mlp.down_proj.weight[:, 17] = 2 * (model.W_U[5] - model.W_U[9])
    return model, mi.Examples.of(texts, labels, [(5, 9)] * 28)


def test_a_planted_neuron_comes_first() -> None:
    model, some = planted()
    data = mi.run(model, some, mi.ConceptNeurons(sizes=(1, 8))).data.sel(label="True")
    assert int(data["rank"].sel(layer=1, neuron=17)) == 0 and data["site"].values[0] == "mlp_act.1.n17"
    cell = data.sel(layer=1, neuron=17)
    assert float(cell["auroc"]) == 1 and float(cell["correlation"]) > 0.99 and float(cell["q"]) < 0.05
    assert float(data["held_out_auroc"][0]) == 1 and float(data["held_out_auroc_ci_low"][0]) < 0.8
    assert data["example_label"].values[0].tolist() == ["True"] * 5
    one = data.sel(size=1)
    assert float(one["effect"].sel(order="ranked", on="label")) < -3
    assert abs(float(one["effect"].sel(order="ranked", on="rest"))) < 0.5
    assert float(one["excess_ci_high"].sel(on="label")) < -3
    assert float(one["excess_p"].sel(on="label")) <= 2 / 40  # the first of 40 sets; one of them may have the neuron
    assert float(data["excess_p"].min()) >= 1 / 40


def test_the_best_of_many_is_nothing_on_held_out_texts() -> None:
    """Random labels: the best of 2,000 features looks good on what chose it, and is at chance on the others."""
    best, again, hits = [], [], 0
    for seed in range(25):
        rng = np.random.default_rng(seed)
        owner = np.arange(40)
        values = rng.normal(size=(2, 40, 1000)).astype(np.float32)
        units = _Units(values, owner, np.stack([owner, owner + 1], 1), (0, 1))
        concepts = _Concepts.of(rng.permutation([0, 1] * 20).tolist(), owner, 0.3, seed, owner)
        data, orders = _ranked(concepts, units)
        found = _best(concepts, units, orders[:, :4], 1, lambda _: ["x"] * 50)
        best.append(np.abs(data["auroc"].values - 0.5).max())
        side = np.sign(data["auroc"].values.ravel()[orders[0, :4]] - 0.5)
        again.append((side * (found["held_out_auroc"].values[0] - 0.5)).mean())
        hits += bool((data["q"].values < 0.05).any())
    assert min(best) > 0.25 and hits <= 4
    assert abs(np.mean(again)) < 4 * np.std(again) / 5


def test_random_neurons_are_of_the_same_layers() -> None:
    chosen, rng = np.array([3, 7, 12, 13, 14, 15, 18]), np.random.default_rng(0)  # of layers of ten
    counts = np.zeros(20, int)
    for _ in range(2000):
        drawn = alike(chosen, 10, rng)
        assert len(set(drawn.tolist())) == 7
        assert np.bincount(drawn // 10).tolist() == [2, 5]
        counts[drawn] += 1
    np.testing.assert_allclose(counts / 2000, [0.2] * 10 + [0.5] * 10, atol=0.05)  # chosen ones as often as others


def test_the_p_of_neurons_that_mean_nothing_is_uniform() -> None:
    """Labels at random: the neurons that go with them are as good as others, though all texts move the same way."""
    model, found = tiny("llama", layers=2), []
    for seed in range(40):
        labels = np.random.default_rng(seed).permutation(LABELS).tolist()
        asked = mi.ConceptNeurons((1,), sizes=(4,), top=1, draws=19, seed=seed)
        found.append(float(mi.run(model, examples(labels), asked).data["excess_p"].sel(on="label", size=4)[0]))
    jitter = np.random.default_rng(0).random(40) / 20  # p is a multiple of 1/20
    assert stats.kstest(np.array(found) - jitter, "uniform").pvalue > 0.01


@pytest.mark.parametrize("given", [True, False])
def test_no_group_is_on_both_sides(llama: mi.Model, given: bool) -> None:
    """Equal texts are one group. Five copies weigh as much as one, in what switching neurons off does."""
    texts = [TEXTS[i // 3] for i in range(72)] if not given else [[*TEXTS[i % 24], 7 + i // 24] for i in range(72)]
    group = [i // 3 if not given else i % 24 for i in range(72)]
    labels = [LABELS[g] for g in group]
    numbers = np.array(group)
    for seed in range(8):
        found = _Concepts.of(labels, np.arange(72), 0.3, seed, numbers)
        assert not set(numbers[found.held_out]) & set(numbers[~found.held_out])
        held = [labels[i] for i in np.flatnonzero(found.held_out)]
        assert (held.count("a"), held.count("b")) == (9, 15)  # of 24 and 48: as near to 30% as threes come
    some = mi.Examples.of(texts, labels, [(5, 9)] * 72)
    asked = mi.ConceptNeurons((1,), sizes=(2,), draws=2, groups=tuple(group) if given else None)
    data = mi.run(llama, some, asked).data.sel(label="b")
    assert (int(data["held_out"]), int(data["texts"])) == (15, 48)
    if not given:  # copies of a text are the text: the same neurons, and as wide an interval
        asked = mi.ConceptNeurons((1,), sizes=(2,), draws=2, held_out=0.25)  # 2 of 8 and 4 of 16, or three times that
        data, once = (mi.run(llama, one, asked).data.sel(label="b") for one in (some, examples()))
        np.testing.assert_array_equal(data["rank"], once["rank"])
        for name in ("effect", "effect_ci_low", "effect_ci_high"):
            np.testing.assert_allclose(data[name], once[name], atol=1e-5)


def test_without_answers_the_loss_is_measured(llama: mi.Model) -> None:
    bare = mi.Examples.of(TEXTS, LABELS)
    result = mi.run(llama, bare, mi.ConceptNeurons((1,), sizes=(2,)))
    assert result.meta["metric"] == "loss"
    assert [view.value for view in result.views] == ["held_out_auroc", "value", "significant", "effect"]
    assert all(result.figure(i).data for i in range(4))


def test_the_contract() -> None:
    some = replace(mi.tasks.ioi(12, seed=3), labels=("x", "y") * 6)
    check_analyzer(mi.ConceptNeurons((0, 2), sizes=(2,), ablation="mean", top=3), some, models=[tiny("qwen2")])


def test_bad_input(llama: mi.Model) -> None:
    def said(labels: Any, kind: type[Exception], match: str, **options: Any) -> None:
        with pytest.raises(kind, match=match):
            mi.run(llama, examples(labels), mi.ConceptNeurons(**options))

    said(None, ExamplesError, "the examples have none; give labels=")
    said(["a"] * 24, ExamplesError, "two labels or more can be told apart, and all are 'a'")
    said([None] * 24, ExamplesError, "and all 24 are None")
    said(["a"] * 20 + ["b"] * 4, ExamplesError, "'b' has 4 texts, and each must have 6")
    said(LABELS, ExamplesError, "groups are so large that the label 'a', in 1 of them", groups=(0,) * 24)
    said(LABELS, SiteError, "mlp_act.3@end does not exist: the model has layers 0 to 2", layers=(3,), sizes=())
    said(LABELS, NeedsError, "49 neurons cannot be switched off: there are 48", layers=(1,), sizes=(49,))
    said(LABELS, ExamplesError, "define no position 'S'", positions="S")
    for odd in ({"sizes": (0,)}, {"top": 0}, {"held_out": 0.9}, {"layers": ()}):
        with pytest.raises(NeedsError, match="ConceptNeurons takes some layers"):
            mi.ConceptNeurons(**odd)
    with pytest.raises(NeedsError, match="takes no positions"):
        mi.ConceptNeurons(positions="all", each="token")
    with pytest.raises(SiteError, match="6 experts are fused and have no neurons to hook; use router, mlp_in"):
        mi.run(tiny("qwen3_moe"), examples(), mi.ConceptNeurons())
    classifier = tiny("llama", num_labels=2)
    with pytest.raises(NeedsError, match="has no loss of next tokens: give the examples answers"):
        mi.run(classifier, mi.Examples.of(TEXTS, LABELS), mi.ConceptNeurons())
    assert mi.run(classifier, mi.Examples.of(TEXTS, LABELS), RANKED).data.sizes["top"] == 4
