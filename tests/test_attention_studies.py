"""Attention compared: between inputs, between models, between the speakers of a dialogue."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from scipy.spatial.distance import jensenshannon
from tokenizers.processors import TemplateProcessing

import mechinterp as mi
from mechinterp.errors import ExamplesError, ModelError
from mechinterp.studies import AttentionBetweenSpeakers, Dialogue, compare_attention, compare_models
from mechinterp.studies.comparing import _contrast
from mechinterp.testing import check_analyzer, tiny

CLEAN, OTHER = "Mary and John had a book, and John", "Mary and John had a book, and Mary"
LONGER = "the dog had a ring and went to the store, and Mary had a book"
TURNS = (("Anna", "had a book"), ("Tom", "the dog had a ring"), ("Anna", "and a book"), ("Tom", "to the store"))


# Inputs


def test_divergences_are_scipys(model: mi.Model) -> None:
    data = compare_attention(model, [CLEAN, OTHER, LONGER]).data
    assert data["pair"].values.tolist() == ["1 → 2", "1 → 3", "2 → 3"]
    profile, kept = mi.run(model, [CLEAN, OTHER, LONGER], [mi.AttentionProfile(), mi.AttentionPatterns()])
    n = model.tokenize(CLEAN).lengths[0]
    for layer in range(3):
        for head in range(4):
            here = data["difference"].sel(layer=layer, head=head)
            rows = profile.data["profile"].sel(layer=layer, head=head).values
            for pair, (a, b) in {"1 → 2": (0, 1), "1 → 3": (0, 2), "2 → 3": (1, 2)}.items():
                expected = jensenshannon(rows[a], rows[b], base=2) ** 2
                assert float(here.sel(pair=pair, measure="js")) == pytest.approx(np.nan_to_num(expected), abs=1e-6)
            first, second = (
                kept.data["pattern"].sel(layer=layer, head=head, example=i).values[1:n, :n] for i in (0, 1)
            )
            expected = np.mean(
                np.nan_to_num([jensenshannon(a, b, base=2) ** 2 for a, b in zip(first, second, strict=True)])
            )
            assert float(here.sel(pair="1 → 2", measure="js_tokens")) == pytest.approx(expected, abs=1e-5)
    assert np.isnan(data["difference"].sel(measure="js_tokens", pair=["1 → 3", "2 → 3"])).all()
    entropy = profile.data["entropy"].transpose("example", "layer", "head").values
    np.testing.assert_allclose(
        data["difference"].sel(measure="entropy", pair="1 → 3"), entropy[2] - entropy[0], atol=1e-6
    )
    np.testing.assert_allclose(data["mean"].sel(measure="entropy"), entropy)
    assert np.isnan(data["p"]).all()  # one text each


def test_a_text_does_not_differ_from_itself(llama: mi.Model) -> None:
    data = compare_attention(llama, [LONGER, LONGER]).data
    assert float(abs(data["difference"]).max()) < 1e-6


def made_up(n: int, planted: float, seed: int) -> Any:
    """Profiles of n + n examples, 3 layers of 4 heads; head 2 of layer 1 differs between the halves."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(2 * n, 3, 4, 5)) * 0.5
    logits[n:, 1, 2, 0] += planted
    bins = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    dims = ("example", "layer", "head")
    measures = {name: (dims, rng.normal(size=(2 * n, 3, 4))) for name in ("entropy", "first", "distance")}
    return xr.Dataset({"profile": ((*dims, "bin"), bins), **measures})


def test_a_planted_difference_is_found_and_chance_is_not() -> None:
    found = _contrast(made_up(15, 2.0, 0), range(15), range(15, 30), 0)["js"][1]
    assert found[1, 2] == found.min() == 1 / 481
    p = np.concatenate(
        [
            np.ravel(one)
            for i in range(20)
            for _, one in _contrast(made_up(10, 0, i), range(10), range(10, 20), i).values()
        ]
    )
    assert abs((p < 0.05).mean() - 0.05) < 0.02  # 960 tests
    assert np.isnan(_contrast(made_up(3, 0, 0), range(3), range(3, 6), 0)["js"][1]).all()  # 20 ways


def test_labels_are_inputs_and_examples_the_unit(llama: mi.Model) -> None:
    ioi, agreement = mi.tasks.ioi(8).texts, mi.tasks.agreement(8).texts
    examples = mi.Examples.of([*ioi, *agreement], labels=["names"] * 8 + ["verbs"] * 8)
    result = compare_attention(llama, examples)
    data = result.data
    assert data["input"].values.tolist() == ["names", "verbs"] and data["pair"].values.tolist() == ["names → verbs"]
    assert "js_tokens" not in data["measure"] and result.meta["shuffles"] == 480
    distance = (
        mi.run(llama, examples, mi.AttentionProfile()).data["distance"].transpose("example", "layer", "head").values
    )
    np.testing.assert_allclose(data["mean"].sel(measure="distance", input="verbs"), distance[8:].mean(0), atol=1e-5)
    tested = data.sel(measure=["js", "entropy", "first", "distance"])
    assert (tested["q"] >= tested["p"] - 1e-12).all() and (tested["p"] > 0).all()
    assert (data["ci_low"].sel(measure="first") < data["mean"].sel(measure="first")).all()
    assert bool((data["q"].sel(measure="distance") < 0.05).any())  # prompts of other lengths
    for view in range(len(result.views)):
        result.figure(view)


def test_what_cannot_be_compared_is_said(llama: mi.Model) -> None:
    with pytest.raises(ExamplesError, match="one input"):
        compare_attention(llama, [CLEAN])
    with pytest.raises(ExamplesError, match="one input"):
        compare_attention(llama, mi.Examples.of([CLEAN, OTHER], labels=["a", "a"]))
    with pytest.raises(ExamplesError, match="13 inputs are more"):
        compare_attention(llama, [CLEAN] * 13)
    with pytest.raises(ExamplesError, match="example 1 is one token"):
        compare_attention(llama, [CLEAN, "a"])
    with pytest.raises(ExamplesError, match="example 1 is empty"):
        compare_attention(llama, [CLEAN, ""])
    with pytest.raises(ExamplesError, match="more than the model's context of 256"):
        compare_attention(llama, [CLEAN, " a" * 300])


# Models


def test_with_one_tokenizer_units_are_tokens(llama: mi.Model) -> None:
    other = tiny("qwen3", layers=5)
    result = compare_models([llama, other], LONGER)
    assert result.meta["units"] == llama.to_str_tokens(llama.tokenize(LONGER).ids[0])
    for model in (llama, other):
        profile = mi.run(model, LONGER, mi.AttentionProfile()).data.isel(example=0)
        ours = result.data.sel(model=model.name).isel(layer=slice(model.dims.n_layers))
        for name in ("entropy", "first", "distance"):
            np.testing.assert_allclose(ours[name], profile[name].transpose("layer", "head"), atol=1e-4)
            assert float(result.data[f"{name}_by_depth"].sel(model=model.name, depth=100)) == pytest.approx(
                float(ours[name].isel(layer=-1).mean())
            )
    assert np.isnan(result.data["entropy"].sel(model=llama.name, layer=[3, 4])).all()
    js = result.data["js"].isel(pair=0)
    assert js.isel(layer=slice(3)).notnull().all() and js.isel(layer=slice(3, 5)).isnull().all()
    for view in range(len(result.views)):
        result.figure(view)


def test_tokens_without_characters_join_the_first_unit(llama: mi.Model) -> None:
    tokenizer = copy.deepcopy(llama.tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<unk> $A", special_tokens=[("<unk>", 1)])
    other = mi.Model(tiny("mistral").hf, tokenizer, "with-bos")
    result = compare_models([llama, other], CLEAN)
    assert result.meta["units"] == llama.to_str_tokens(llama.tokenize(CLEAN).ids[0])
    ids = other.tokenize(CLEAN).ids[0]
    assert len(ids) == len(result.meta["units"]) + 1
    pattern = mi.run(other, CLEAN, mi.AttentionPatterns()).data["pattern"].isel(example=0).values
    expected = (pattern[:, :, 2:, 0] + pattern[:, :, 2:, 1]).mean(-1)
    np.testing.assert_allclose(result.data["first"].sel(model="with-bos"), expected, atol=1e-5)


def test_units_of_two_tokenizers(smollm2: mi.Model, llama: mi.Model) -> None:
    text = "Mary had umbrellas, and 17 books "
    result = compare_models([smollm2, llama], text)
    units = result.meta["units"]
    assert "".join(units) == text
    ends = set(np.cumsum([len(u) for u in units]).tolist())
    for model in (smollm2, llama):
        offsets = model.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        assert ends <= {*(stop for _, stop in offsets), len(text)}
    assert 1 < len(units) < max(len(m.tokenize(text).ids[0]) for m in (smollm2, llama))


def test_the_distance_of_two_models_heads(llama: mi.Model) -> None:
    """For as many heads, the mean gap between both in order."""
    other = tiny("llama", seed=1)
    data = compare_models([llama, other], CLEAN, ["one", "two"]).data
    first, second = (np.sort(data["entropy"].sel(model=name).values.ravel()) for name in ("one", "two"))
    assert float(data["entropy_apart"][0]) == pytest.approx(np.abs(first - second).mean())


def test_models_that_cannot_be_compared(llama: mi.Model) -> None:
    with pytest.raises(ModelError, match="takes two models"):
        compare_models([llama], CLEAN)
    with pytest.raises(ModelError, match="tiny-llama and tiny-llama are the same model"):
        compare_models([tiny("llama"), tiny("llama")], CLEAN)
    with pytest.raises(ExamplesError, match="the text is empty"):
        compare_models([llama, tiny("qwen3")], "")
    with pytest.raises(ExamplesError, match="one piece"):
        compare_models([llama, tiny("qwen3")], "book")
    with pytest.raises(ExamplesError, match="more than the model's context"):
        compare_models([llama, tiny("qwen3")], " a" * 300)


# Dialogues


def test_three_formats_hold_the_same_dialogue(tmp_path: Path) -> None:
    rows = [{"speaker": speaker, "text": text} for speaker, text in TURNS]
    files = {
        "d.jsonl": "".join(json.dumps(row) + "\n" for row in rows),
        "d.json": json.dumps(rows),
        "e.json": json.dumps({"turns": rows}),
        "d.txt": "\n\n".join(f"{speaker}: {text}" for speaker, text in TURNS),
        "e.txt": "Anna: had\n  a book\nTom: the dog had a ring\nAnna: and a book\nTom: to\nthe store\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
        assert Dialogue.load(tmp_path / name) == Dialogue(TURNS), name
    dialogue = Dialogue(TURNS)
    spoken = [(dialogue.text + "\n")[a:b] for a, b in dialogue.spans]
    assert spoken == [f"{speaker}: {text}\n" for speaker, text in TURNS]


@pytest.mark.parametrize(
    ("name", "content", "wanted"),
    [
        ("d.md", "Anna: a", "none of .jsonl, .json, .txt"),
        ("d.txt", "had a book\nTom: a", "line 1 names no speaker"),
        ("d.txt", "Anna: a\nAnna: b", "2 to 8 speakers. Got 1; name the speaker of each turn"),
        ("d.txt", "Anna: a\nTom:", "turn 1 has no text"),
        ("d.txt", "", "Got 0"),
        ("d.txt", "(first token): a\nTom: b", "is taken"),
        ("d.json", "{", "line 1 is not JSON"),
        ("d.json", "3", "no list of turns"),
        ("d.jsonl", '{"speaker": "Anna"}', "turn 0 lacks a speaker or text"),
        ("d.jsonl", '{"speaker": "Anna", "text": "a"}\n{', "line 2 is not JSON"),
    ],
)
def test_a_file_without_a_dialogue_is_said(tmp_path: Path, name: str, content: str, wanted: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ExamplesError) as error:
        Dialogue.load(tmp_path / name)
    assert wanted in str(error.value) and name in str(error.value)
    with pytest.raises(ExamplesError, match="cannot read"):
        Dialogue.load(tmp_path / "none.txt")


def test_who_attends_to_whom_by_hand(model: mi.Model) -> None:
    dialogue = Dialogue(TURNS)
    result = mi.run(model, dialogue.text, AttentionBetweenSpeakers(dialogue))
    tokens = model.to_str_tokens(model.tokenize(dialogue.text).ids[0])
    turns = np.cumsum([0, *(t == "\n" for t in tokens)])[:-1]  # the end of a line is its turn's
    speakers = [TURNS[t][0] for t in turns]
    pattern = mi.run(model, dialogue.text, mi.AttentionPatterns()).data["pattern"].isel(example=0).values
    share = result.data["share"]
    for speaker in ("Anna", "Tom"):
        mine = [t for t in range(1, 4) if TURNS[t][0] == speaker]
        for other in ("Anna", "Tom", "(first token)"):
            keys = [k for k in range(len(tokens)) if (speakers[k] == other if k else other == "(first token)")]
            by_turn = [pattern[:, :, turns == t][..., keys].sum(-1).mean(-1) for t in mine]
            ours = share.sel(speaker=speaker, other=other)
            np.testing.assert_allclose(ours, np.mean(by_turn, 0), atol=1e-5)
    np.testing.assert_allclose(share.sum("other"), 1, atol=1e-5)
    first = share.sel(other="(first token)")
    np.testing.assert_allclose(result.data["expected"].sum("other") + first, 1, atol=1e-5)
    np.testing.assert_allclose(result.data["by_turn"].sum("other_turn"), 1, atol=1e-5)
    assert np.isnan(result.data["p"]).all()  # few turns
    for view in range(len(result.views)):
        result.figure(view)


def test_even_attention_is_what_is_expected(llama: mi.Model) -> None:
    """Queries of zero attend to all that they see alike, to the first token too."""
    dialogue = Dialogue(TURNS)
    flat = tiny("llama")
    for layer in flat.hf.model.layers:
        layer.self_attn.q_proj.weight.data.zero_()
    data = mi.run(flat, dialogue.text, AttentionBetweenSpeakers(dialogue)).data
    even, share = data["expected"].isel(other=slice(2)), data["share"].isel(other=slice(2))
    np.testing.assert_allclose(even, share, atol=0.01)


def test_speakers_keep_the_contract() -> None:
    dialogue = Dialogue(TURNS)
    examples = mi.Examples.pairs([dialogue.text], [dialogue.text], answers=[(" Mary", " John")])
    check_analyzer(AttentionBetweenSpeakers(dialogue), examples, models=[tiny("llama"), tiny("mistral")])


def test_enough_turns_are_tested(llama: mi.Model) -> None:
    dialogue = Dialogue(TURNS * 4)
    data = mi.run(llama, dialogue.text, AttentionBetweenSpeakers(dialogue)).data
    assert np.isfinite(data["q"].sel(other=["Anna", "Tom"])).all()
    assert (data["ci_low"] <= data["share"] + 1e-9).all() and (data["share"] <= data["ci_high"] + 1e-9).all()


def test_another_text_than_the_dialogues_is_refused(llama: mi.Model) -> None:
    with pytest.raises(ExamplesError, match=r"run on dialogue\.text"):
        mi.run(llama, CLEAN, AttentionBetweenSpeakers(Dialogue(TURNS)))
