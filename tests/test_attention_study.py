"""The attention study: laws over shards, ranks and interruptions, oracles for generation, files, and bad input."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import xarray as xr
from safetensors import safe_open

import mechinterp as mi
from mechinterp import sites
from mechinterp.errors import ConfigurationError, ExamplesError, OutputError
from mechinterp.model.architecture import FAMILIES
from mechinterp.studies.attention import group_of, prepare
from mechinterp.studies.configuration import StudyConfig
from mechinterp.studies.predictions import Sample, Samples, read_samples
from mechinterp.studies.shards import GENERATED, PREDICTION, occurrences, run_shard

PEOPLE, PLACES = ("Mary", "John", "Tom", "Anna"), ("store", "school", "garden", "office")
VOCABULARY = "people: [Mary, John, Tom, Anna]\nplaces: [store, school, garden, office]\nverbs: [went to, gave]\n"
N = 15


@pytest.fixture(autouse=True)
def few_pictures(request: pytest.FixtureRequest) -> None:
    if "pictures" not in request.keywords:
        request.getfixturevalue("no_pictures")


def rows(n: int = N) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    out: list[dict[str, Any]] = []
    for i in range(n):
        a, b = rng.permutation(PEOPLE)[:2]
        text = f"Then, {a} and {b} went to the {rng.choice(PLACES)}. {a} gave a drink" + " to Tom" * int(
            rng.integers(3)
        )
        label, prediction = rng.choice(["Mary", "John"], 2)
        out.append({"text": text, "label": str(label), "prediction": str(prediction), "desk": "abc"[i % 3]})
    return out


def setup(here: Path, mode: str = "file", samples: list[Any] | None = None, **analysis: Any) -> Path:
    """The files of a study; returns its configuration."""
    (here / "samples.jsonl").write_text("\n".join(map(json.dumps, rows() if samples is None else samples)))
    (here / "words.yaml").write_text(VOCABULARY)
    options = {"samples": "samples.jsonl", "vocabulary": "words.yaml", "shard_size": 4, **analysis}
    generation = {"mode": mode, "labels": ["Mary", "John"], "max_new_tokens": 4, "temperature": 1.0}
    content = {
        "model": {"name": "tiny"},
        "generation": generation,
        "analysis": options,
        "visualisation": {"out": "out"},
    }
    (here / "study.yaml").write_text(json.dumps(content))  # JSON is YAML
    return here / "study.yaml"


def run(config: Path, model: mi.Model, **options: Any) -> mi.studies.AttentionStudy:
    study = mi.studies.attention_study(config, model=model, **options)
    assert study is not None
    return study


def talker(family: str = "llama") -> mi.Model:
    """A tiny model that often, and not always, writes a label."""
    model = mi.testing.tiny(family)
    tokenizer: Any = model.tokenizer
    with torch.no_grad():
        model.hf.lm_head.weight[tokenizer.convert_tokens_to_ids([" Mary", " John"])] *= 4
    return model


# Laws


@pytest.mark.parametrize("mode", ["file", "constrained", "generated"])
def test_one_rank_and_three_give_the_same_to_the_bit(tmp_path: Path, mode: str) -> None:
    llama = talker()
    alone, several = tmp_path / "alone", tmp_path / "several"
    alone.mkdir()
    several.mkdir()
    one = run(setup(alone, mode), llama)
    config = setup(several, mode)
    for rank in (2, 0, 1):
        assert mi.studies.attention_study(config, model=llama, rank=rank, world_size=3) is None
        assert not (several / "out").exists()
    said: list[str] = []
    joined = run(config, llama, told=said.append)
    assert said[0] == "4 of 4 shards are there already"
    xr.testing.assert_identical(joined.each, one.each)
    xr.testing.assert_identical(joined.heads.data, one.heads.data)
    xr.testing.assert_identical(joined.categories.data, one.categories.data)
    for name in ("comparison_analysis_results.json", "predictions.jsonl", "attention_matrices.safetensors"):
        assert (several / "out" / name).read_bytes() == (alone / "out" / name).read_bytes()


def test_what_is_interrupted_goes_on_where_it_was(tmp_path: Path, llama: mi.Model) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    one = run(setup(whole), llama)
    config = setup(broken)

    def interrupt(line: str) -> None:
        if line.startswith("shard 2"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mi.studies.attention_study(config, model=llama, told=interrupt)
    shards = broken / "out.shards"
    assert sorted(p.name for p in shards.iterdir()) == ["00000", "00001", "key.json"]
    before = {p: p.stat().st_mtime_ns for p in shards.rglob("*.safetensors")}
    again = run(config, llama)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    xr.testing.assert_identical(again.heads.data, one.heads.data)
    assert not (broken / "out").with_name(".out").exists()


def test_shards_of_another_study_are_refused(tmp_path: Path, llama: mi.Model) -> None:
    config = setup(tmp_path)
    run(config, llama)
    with pytest.raises(OutputError, match="another study, which differs in the model; delete it"):
        run(config, mi.testing.tiny("llama", seed=1))
    (tmp_path / "words.yaml").write_text("people: [Mary]\n")
    with pytest.raises(OutputError, match="differs in the vocabulary"):
        run(config, llama)
    with pytest.raises(OutputError, match="differs in the samples, the prompts, the vocabulary"):
        run(setup(tmp_path, samples=rows()[:5]), llama)
    with pytest.raises(OutputError, match="differs in the generation section"):
        run(setup(tmp_path, "constrained"), llama)
    other_statistics = run(setup(tmp_path, seed=3, groups="desk", compare=["a", "b"]), llama)
    assert other_statistics.compared == ("a", "b")


def test_a_shard_that_is_damaged(tmp_path: Path, llama: mi.Model) -> None:
    config = setup(tmp_path)
    run(config, llama)
    (tmp_path / "out.shards" / "00002" / "numbers.safetensors").write_bytes(b"x")
    with pytest.raises(OutputError, match=r"00002 and run again"):
        run(config, llama)


# Against other ways


def test_it_is_the_analyzer_on_all_samples(tmp_path: Path, either: mi.Model) -> None:
    study = run(setup(tmp_path), either)
    examples = mi.Examples.of(
        [r["text"] for r in rows()],
        labels=["correct" if r["label"] == r["prediction"] else "incorrect" for r in rows()],
    ).categorize(mi.Vocabulary.of({"people": PEOPLE, "places": PLACES, "verbs": ["went to", "gave"]}))
    examples = examples.with_category(PREDICTION, [occurrences(r["text"], r["prediction"]) for r in rows()])
    direct = mi.run(either, examples, mi.AttentionByCategory(groups=("correct", "incorrect")))
    seen = study.heads.data["category"]  # a sliding window may see none of some
    assert {"verbs", PREDICTION} & set(seen.values)
    wanted = direct.data.sel(category=seen)
    for name in ("share", "difference", "d", "layer_share", "entropy"):
        np.testing.assert_allclose(study.heads.data[name], wanted[name], atol=1e-4, rtol=1e-3)
    for name in set(direct.data["category"].values) - set(seen.values):
        assert direct.data["share"].sel(category=name).isnull().all()
    assert study.compared == ("correct", "incorrect")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_attention_while_generating_is_that_of_one_pass_over_everything(tmp_path: Path, family: str) -> None:
    """The pass has the prompt and what was written, and the queries are the tokens that wrote."""
    model = talker(family)
    config = StudyConfig.load(setup(tmp_path, "generated"))
    samples, examples, _ = prepare(config, model, read_samples(tmp_path / "samples.jsonl"))
    made = run_shard(model, config, samples, examples, range(3)).data
    for i in range(3):
        ids = model.tokenize(examples).ids[i]
        with torch.random.fork_rng():
            torch.manual_seed(i)
            out = model.hf.generate(
                torch.tensor([ids]), do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=4,
                pad_token_id=0,
            )[0].tolist()  # fmt: skip
        n = len(ids)
        known = model.tokenize(examples).categories
        categories = {name: (column[i],) for name, column in known.items()} | {GENERATED: (((n, len(out) - 1),),)}
        whole = replace(mi.Examples.of([out[:-1]], spans={"writing": [(n - 1, len(out) - 1)]}), categories=categories)
        wanted = mi.run(model, whole, mi.AttentionByCategory("writing", statistics=False)).data.isel(example=0)
        mine = made.isel(example=i).sel(category=wanted["category"])
        assert int(mine["queries"]) == 4
        for name in ("share", "expected", "sink", "entropy"):
            np.testing.assert_allclose(
                mine[name].transpose(*wanted[name].dims), wanted[name], atol=2e-5, rtol=1e-4, err_msg=name
            )
        text = str(made["text"].values[i])
        assert text == model.tokenizer.decode(out[n:])
        label = str(made["prediction"].values[i])
        spot = made["share"].isel(example=i).sel(category=PREDICTION)
        assert np.isfinite(spot).any() == bool(label and occurrences(str(examples.texts[i]), label))


def test_constrained_predictions_are_the_likeliest_labels(tmp_path: Path, llama: mi.Model) -> None:
    study = run(setup(tmp_path, "constrained"), llama)
    tokenizer: Any = llama.tokenizer
    first = [tokenizer(f" {name}")["input_ids"][0] for name in ("Mary", "John")]
    for sample, logs in zip(study.samples.rows, study.each["log_prob"].values, strict=True):
        end = llama.trace(sample.text, sites.logits(positions="end"))["logits"][0].log_softmax(-1)[first]
        np.testing.assert_allclose(logs, end.detach(), atol=1e-4)
        assert sample.prediction == ("Mary", "John")[int(end.argmax())]


def test_the_vocabulary_is_matched_in_the_samples_own_text(tmp_path: Path, llama: mi.Model) -> None:
    config = StudyConfig.load(setup(tmp_path))
    prompt = "Mary gave John a drink. {text} Tom"
    longer = config.model_copy(update={"generation": config.generation.model_copy(update={"prompt": prompt})})
    samples = read_samples(tmp_path / "samples.jsonl")
    plain, framed = (prepare(c, llama, samples)[1] for c in (config, longer))
    shift = prompt.index("{text}")
    for name, column in plain.categories.items():
        moved = tuple(tuple((a + shift, b + shift) for a, b in spans) for spans in column)
        assert framed.categories[name] == moved


# Files


@pytest.mark.pictures
def test_the_files_of_a_study(tmp_path: Path, llama: mi.Model) -> None:
    study = run(setup(tmp_path), llama)
    out = tmp_path / "out"
    manifest = json.loads((out / "manifest.json").read_text())
    there = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert there == set(manifest["files"])
    right = sum(r["label"] == r["prediction"] for r in rows())
    assert manifest["groups"] == {"correct": right, "incorrect": N - right}
    found = json.loads((out / "attention_analysis_results.json").read_text())
    assert set(found["groups"]) == {"correct", "incorrect"}
    mine = found["groups"]["correct"]["categories"]["people"]
    shares: Any = study.each["share"].mean(("layer", "head")).sel(category="people").values
    correct = np.array([group == "correct" for group in study.groups])
    assert mine["mean_share"] == pytest.approx(float(np.nanmean(shares[correct])), abs=1e-6)
    assert sum(sum(row.values()) for row in found["confusion"].values()) == N
    compared = json.loads((out / "comparison_analysis_results.json").read_text())
    assert compared["compared"] == ["correct", "incorrect"]
    overall = compared["categories"]["people"]["mean_over_heads"]
    difference = np.nanmean(shares[correct]) - np.nanmean(shares[~correct])
    assert overall["difference"] == pytest.approx(float(difference), abs=1e-6)
    text = (out / "analysis_summary_report.txt").read_text()
    assert "Every prediction is" not in text
    assert f"{right} of {N} predictions (from the file) are correct" in text
    assert "people" in text and "How to read this" in text
    assert max(map(len, text.splitlines())) <= 130
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [line["group"] for line in lines] == list(study.groups)
    figures = {p.name for p in (out / "figures").iterdir()}
    assert len([f for f in figures if f.endswith(".png")]) == len([f for f in figures if f.endswith(".svg")]) > 6


def test_matrices_are_the_patterns_of_the_model(tmp_path: Path, llama: mi.Model) -> None:
    file = setup(tmp_path)
    config = StudyConfig.load(file)
    chosen = config.visualisation.model_copy(update={"heads": ((1, 2), (0, 3)), "examples": 1})
    study = mi.studies.attention_study(config.model_copy(update={"visualisation": chosen}), model=llama)
    assert study is not None
    path = tmp_path / "out" / "attention_matrices.safetensors"
    tensors = safetensors.torch.load(path.read_bytes())
    assert len(tensors) == 2 * 2  # an example of each group, two heads
    with safe_open(str(path), "pt") as opened:
        metadata = opened.metadata()
    for name, pattern in tensors.items():
        _, sample, _, layer, _, head = name.split()
        text = study.samples.rows[int(sample)].text
        site = sites.pattern(int(layer), heads=int(head))
        torch.testing.assert_close(pattern, llama.trace(text, site)[site][0])
        known = json.loads(metadata["samples"])[sample]
        assert "".join(known["tokens"]) == text
        assert known["group"] == study.groups[int(sample)]


def test_texts_are_only_ever_text(tmp_path: Path, llama: mi.Model) -> None:
    """Names from the user's files, on the page."""
    config = setup(tmp_path, groups="desk", samples=[{**r, "desk": "<img src=x onerror=alert(1)>"} for r in rows()])
    run(config, llama)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<img src=x" not in page
    assert "&lt;img src=x" in page


# What cannot be compared, or cannot be used


@pytest.mark.parametrize("right", [True, False])
def test_a_group_without_samples_is_said(tmp_path: Path, llama: mi.Model, right: bool) -> None:
    other = {"Mary": "John", "John": "Mary"}
    samples = [{**r, "prediction": r["label"] if right else other[r["label"]]} for r in rows()]
    study = run(setup(tmp_path, samples=samples), llama)
    assert study.compared is None
    there, gone = ("correct", "incorrect") if right else ("incorrect", "correct")
    wanted = f"nothing was compared: the group '{gone}' has no sample (there are {N} {there})"
    assert wanted in study.notes
    compared = json.loads((tmp_path / "out" / "comparison_analysis_results.json").read_text())
    assert compared["compared"] is None
    assert wanted in compared["notes"]
    text = (tmp_path / "out" / "analysis_summary_report.txt").read_text()
    assert "Nothing was compared" in text


def test_a_category_that_one_group_never_sees(tmp_path: Path, llama: mi.Model) -> None:
    """One prediction is wrong, and in its text nobody goes to a place."""
    samples = [{**r, "prediction": r["label"]} for r in rows()]
    samples[3] |= {"text": "Then, Tom gave a drink", "prediction": {"Mary": "John", "John": "Mary"}[rows()[3]["label"]]}
    study = run(setup(tmp_path, samples=samples), llama)
    assert study.compared == ("correct", "incorrect")
    assert any(note.startswith("no difference in") and "places" in note for note in study.notes)
    places = json.loads((tmp_path / "out" / "comparison_analysis_results.json").read_text())["categories"]["places"]
    assert places["mean_over_heads"]["difference"] is None and places["any_head"]["p"] is None
    assert places["strongest_heads"] == []
    text = (tmp_path / "out" / "analysis_summary_report.txt").read_text()
    assert "places: not compared" in text


def test_heads_that_are_not_there_are_refused_before_the_work(tmp_path: Path, llama: mi.Model) -> None:
    config = StudyConfig.load(setup(tmp_path))
    for head in ((3, 0), (0, 4)):
        shown = config.visualisation.model_copy(update={"heads": ((0, 0), head)})
        with pytest.raises(ConfigurationError, match=rf"layer {head[0]}, head {head[1]}.*0 to 2 with heads 0 to 3"):
            mi.studies.attention_study(config.model_copy(update={"visualisation": shown}), model=llama)
    assert not (tmp_path / "out.shards").exists()


def test_three_groups_need_two_to_compare(tmp_path: Path, llama: mi.Model) -> None:
    study = run(setup(tmp_path, groups="desk"), llama)
    assert study.compared is None
    assert "there are 3 groups (5 a, 5 b, 5 c); name two in analysis.compare" in study.notes[0]
    assert set(study.heads.data["group"].values) == {"a", "b", "c"}


def test_a_category_that_matches_nothing_is_refused_and_in_debug_said(tmp_path: Path, llama: mi.Model) -> None:
    config = setup(tmp_path)
    (tmp_path / "words.yaml").write_text(VOCABULARY + "nothing: [zebra]\n")
    with pytest.raises(ExamplesError, match=r"\['nothing'\] of .*words.yaml match nothing in any of the 15 texts"):
        run(config, llama)
    study = run(config, llama, debug=True)
    assert study.folder.name == "out-debug"
    assert len(study.samples) == 8
    assert "the category 'nothing' matches nothing here and was left out" in study.notes
    (tmp_path / "words.yaml").write_text("generated: [Mary]\n")
    with pytest.raises(ExamplesError, match="'generated' has a name that the study uses"):
        run(config, llama)


def test_a_predicted_word_that_no_prompt_has(tmp_path: Path, llama: mi.Model) -> None:
    samples = [{**r, "label": "up", "prediction": "up" if i % 2 else "down"} for i, r in enumerate(rows())]
    config = StudyConfig.load(setup(tmp_path, samples=samples))
    labels = config.generation.model_copy(update={"labels": ("up", "down")})
    study = mi.studies.attention_study(config.model_copy(update={"generation": labels}), model=llama)
    assert study is not None
    assert "no query sees a token of the category 'prediction', which was left out" in study.notes
    assert PREDICTION not in study.heads.data["category"].values


def test_texts_over_the_context(tmp_path: Path, llama: mi.Model) -> None:
    samples = rows()
    samples[3]["text"] += " and Mary" * 130
    with pytest.raises(ExamplesError, match=r"longer than the model's context of 256 tokens \(line 4\)"):
        run(setup(tmp_path, samples=samples), llama)
    study = run(setup(tmp_path, samples=samples, bad_rows="skip"), llama)
    assert len(study.samples) == N - 1
    assert study.notes[0] == "1 sample left out: longer than the model's context of 256 tokens"
    assert "1 sample left out" in (tmp_path / "out" / "analysis_summary_report.txt").read_text()


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"text": "Mary went to the store", "label": "Mary"}, "no field 'prediction'"),
        ({"text": "Mary went to the store", "label": "Mary", "prediction": "Tom"}, "unknown prediction 'Tom'"),
        ({"label": "Mary", "prediction": "Tom"}, "no field 'text'"),
    ],
)
def test_samples_that_cannot_be_used(tmp_path: Path, llama: mi.Model, row: dict[str, Any], why: str) -> None:
    with pytest.raises(ExamplesError, match=rf"{why} \(line 16\)"):
        run(setup(tmp_path, samples=[*rows(), row]), llama)
    study = run(setup(tmp_path, samples=[*rows(), row], bad_rows="skip"), llama)
    assert study.notes[0] == f"1 sample left out: {why}"


def test_predictions_that_are_no_label_belong_to_no_group(tmp_path: Path) -> None:
    study = run(setup(tmp_path, "generated"), talker())
    lost = [s.prediction for s in study.samples.rows].count(None)
    assert 0 < lost < N
    assert study.groups.count(None) == lost
    assert f"{lost} samples without a prediction: no label was found in what the model wrote" in study.notes


def test_a_rank_outside_the_world(tmp_path: Path, llama: mi.Model) -> None:
    with pytest.raises(ConfigurationError, match="rank must be from 0 to 2"):
        mi.studies.attention_study(setup(tmp_path), model=llama, rank=3, world_size=3)


def test_groups_of_a_sample() -> None:
    sample = Sample(1, "x", "up", "down", {"desk": 3})
    assert [group_of(sample, g) for g in ("correctness", "label", "prediction", "desk")] == [
        "incorrect",
        "up",
        "down",
        "3",
    ]
    assert group_of(replace(sample, prediction="up"), "correctness") == "correct"
    assert group_of(replace(sample, prediction=None), "correctness") is None
    assert len(Samples((sample,), ("up", "down"))) == 1


def test_one_prediction_for_all_is_said(tmp_path: Path, llama: mi.Model) -> None:
    same = [{**row, "prediction": "Mary"} for row in rows()]
    study = run(setup(tmp_path, samples=same, prediction_category=False), llama)
    said = (study.folder / "analysis_summary_report.txt").read_text()
    assert "Every prediction is Mary, so right and wrong differ in their label, too." in " ".join(said.split())
