"""mechinterp probe-representations, probe-linguistic, probe-concepts and steer; and the study of a concept."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

import mechinterp as mi
from mechinterp.cli import main as cli
from mechinterp.cli.study import field, filled, rows_of
from mechinterp.errors import ExamplesError
from mechinterp.tasks.concepts import Concept

RUN = CliRunner()
GOOD, BAD = ("Mary", "Tom"), ("store", "office")
FILLER = ("park", "school", "drink", "book", "ring", "kiss")


def rows(n: int = 60) -> list[dict[str, Any]]:
    """Texts whose last word says the label; every group has as many of both."""
    rng = np.random.default_rng(0)
    out: list[dict[str, Any]] = []
    for i in range(n):
        word = (GOOD if i % 2 else BAD)[i // 2 % 2]
        text = f"{' '.join(rng.choice(FILLER, 4))} {word}"
        out.append({"text": text, "label": "good" if i % 2 else "bad", "group": f"g{i // 2 % 10}", "length": len(text)})
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("model")
    base = mi.testing.tiny("llama")
    base.hf.save_pretrained(where)
    base.tokenizer.save_pretrained(where)
    return where


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows())))
    return path


def invoke(*arguments: Any) -> Result:
    return RUN.invoke(cli.app, [str(a) for a in arguments])


def test_probe_representations(folder: Path, texts: Path, tmp_path: Path) -> None:
    other, both = tmp_path / "other.jsonl", tmp_path / "both.jsonl"
    new = [{**row, "text": f"{row['text'].split()[-1]} has the {row['text']}"} for row in rows()]
    other.write_text("\n".join(map(json.dumps, new)))
    both.write_text(other.read_text() + "\n" + "\n".join(texts.read_text().split("\n")[:5]))
    done = invoke(
        "probe-representations", folder, texts, "--group-field", "group", "--site", "embed", "--site", "resid_post.1",
        "--folds", 4, "--permutations", 10, "--mdl", "--transfer", other, "--out", tmp_path / "out",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert (
        "best at embed, accuracy 1.000" in " ".join(done.stdout.split()) and "what the probes read there" in done.stdout
    )
    assert (tmp_path / "out" / "report.html").is_file()
    kept = mi.Result.load(tmp_path / "out" / "results" / "probe")
    assert kept.meta["groups"] == 10 and "mdl" in kept.data and "warning: the probes" not in done.output
    assert float(mi.Result.load(tmp_path / "out-transfer").data["accuracy"].max()) == 1.0
    done = invoke(
        "probe-representations", folder, texts, "--site", "embed", "--transfer", both, "--out", tmp_path / "t"
    )
    assert "fitted on 5 of these 65 texts" in " ".join(done.output.split())
    done = invoke(
        "probe-representations", folder, texts, "--label-field", "length", "--numbers", "--at", "all", "--site",
        "embed", "--out", tmp_path / "numbers",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "R²" in done.stdout
    both = invoke("probe-representations", folder, texts, "--numbers", "--mdl")
    assert both.exit_code == 2 and "is of classes" in " ".join(both.output.split())


def test_probe_linguistic(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = invoke(
        "probe-linguistic", folder, "--task", "pos", "--task", "depth", "--task", "tense", "--site", "embed", "--limit",
        72, "--folds", 3, "--out", out,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    said = " ".join(done.stdout.split())
    assert "Probes of pos" in said and "word alone" in said and "Probes of depth" in said
    assert mi.Result.load(out / "results" / "probe-pos").meta["taken"]["each"] == "word"
    wrong = invoke("probe-linguistic", folder, "--task", "colour", "--out", tmp_path / "x")
    assert wrong.exit_code == 1 and "no labels for 'colour'; it has pos" in " ".join(wrong.output.split())


SENTENCES = Path(__file__).parent / "sentences.conllu"


def test_probe_linguistic_of_a_file(folder: Path, tmp_path: Path) -> None:
    """Comments are no tasks, what cannot be probed is said and skipped, and so are words that have no place."""
    out, path = tmp_path / "out", tmp_path / "some.conllu"
    lines = SENTENCES.read_text().replace("1\tThe\tthe\tDET\t_\t_", "1\tThe\tthe\tDET\t_\tNumber=Sing")
    path.write_text(f"{lines}\n# sent_id = last\n# text = du pain\n1-2\tdu" + "\t_" * 8 + "\n" + "".join(
        f"{i + 1}\t{word}\t{word}\tADP\t_\t_\t0\troot\t_\t_\n" for i, word in enumerate(("de", "le", "pain"))
    ))  # fmt: skip
    done = invoke("probe-linguistic", folder, path, "--site", "embed", "--folds", 3, "--out", out)
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert "2 words that do not stand in their text are left out" in said
    assert "number: not probed, as fewer than two classes are left" in said
    assert "labels that are probed only where --task names them: sent_id" in said
    kept = sorted(one.name for one in (out / "results").iterdir())
    assert kept == ["probe-depth", "probe-head-distance", "probe-pos", "probe-relation"]
    left_out = json.loads((out / "manifest.json").read_text())["left_out"]
    assert any("2 words that do not stand" in line for line in left_out)
    few = invoke("probe-linguistic", folder, path, "--limit", 2, "--folds", 3, "--out", tmp_path / "x")
    said = " ".join(few.output.split())
    assert few.exit_code == 1 and "the first 2 of 49 sentences; more with --limit" in said
    assert "has nothing to probe" in said and "give more sentences, or fewer --folds" in said


def test_probe_concepts_and_steer(folder: Path, texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = invoke(
        "probe-concepts", folder, "--file", texts, "--group-field", "group", "--at", "end", "--site", "resid_post.2",
        "--out", out, "--target", "good",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    said = " ".join(done.stdout.split())
    assert "texts, towards good (of bad, good): on" in said and "groups set apart, good is told" in said
    assert "no words to steer towards" in said
    direction = out / "direction.safetensors"
    assert mi.LinearProbe.load(direction).classes == ("bad", "good")
    done = invoke(
        "steer", folder, direction, "--prompt", "park school", "--strength", -3, "--strength", 3, "--word", " Mary",
        "--tokens", 3, "--class", "good", "--out", tmp_path / "steer",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "good +3:" in done.stdout and (tmp_path / "steer" / "report.html").is_file()
    wrong = invoke("probe-concepts", folder, "--file", texts, "--concept", "harm", "--out", tmp_path / "x")
    assert wrong.exit_code == 2
    wrong = invoke("probe-concepts", tmp_path / "no-model", "--concept", "safety", "--target", "harmful")  # nothing ran
    assert wrong.exit_code == 1
    assert "truthfulness has no class 'harmful' to steer towards; its classes are true, false" in " ".join(
        wrong.output.split()
    )
    wrong = invoke("probe-concepts", folder, "--concept", "weather", "--out", tmp_path / "x")
    assert wrong.exit_code == 1 and "there is no concept 'weather'" in " ".join(wrong.output.split())


def test_a_label_of_zero_is_a_label(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": "Mary", "label": label}) for label in (0, False, "", None)))
    some = rows_of(path, 2)
    assert filled(path, some, "label") == ["0", "False"]
    assert field(path, rows_of(path), "label") == [0, False, None, None]
    with pytest.raises(ExamplesError, match="row 3 of"):
        filled(path, rows_of(path), "label")


def test_bad_files(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"text": "Mary", "label": "x", "group": ""}))
    for more, said in (
        (["--label-field", "colour"], "has no field 'colour'; its fields are text, label"),
        (["--group-field", "group"], "row 1 of"),
        (["--numbers"], "which is no number; leave --numbers out"),
        ([], "a probe needs two classes or more"),
    ):
        done = invoke("probe-representations", folder, path, *more, "--out", tmp_path / "x")
        assert done.exit_code == 1 and said in " ".join(done.output.split()), done.output


def test_a_concept_from_texts_to_steering(tmp_path: Path) -> None:
    """The class is in the last word, the words to steer towards are the same: moving along it moves them."""
    model = mi.testing.tiny("llama")
    made = rows()
    examples = mi.Examples.of([r["text"] for r in made], labels=[r["label"] for r in made])
    targets = {"good": tuple(f" {w}" for w in GOOD), "bad": tuple(f" {w}" for w in BAD)}
    concept = Concept(
        "names", ("good", "bad"), examples, tuple(r["group"] for r in made), targets, ("park school", "ring book drink")
    )
    study = mi.studies.concept_study(model, concept, positions="end", max_new_tokens=3, draws=3)
    assert set(study.results) == {"directions", "probe", "steering", "text"} and study.target == "good"
    data: Any = study.results["directions"].data
    assert float(data["test_auroc"].sel({"site": "resid_pre.0", "class": "good"})) == 1.0
    assert study.probe.taken == {"positions": "end", "pool": "mean", "each": None}
    distance = float((study.probe.weight[1] - study.probe.weight[0]).norm())
    np.testing.assert_allclose(
        study.results["steering"].data["strength"], np.array([-2, -1, 1, 2]) * distance, rtol=1e-5
    )
    assert len(study.summary()) == 3 and "steering by" in study.summary()[1] and "(of good, bad)" in study.summary()[0]
    page = study.write(tmp_path / "study")
    assert page.is_file()
    kept = mi.LinearProbe.load(tmp_path / "study" / "direction.safetensors")
    assert kept.site == study.probe.site and kept.classes == ("bad", "good")


@pytest.mark.parametrize("method", ["logistic", "pca"])
def test_strengths_are_in_activation_units_whatever_the_method(method: str) -> None:
    """Of the gap between the classes' means along the direction, where a weight may be of any length."""
    model, made = mi.testing.tiny("llama"), rows()
    examples = mi.Examples.of([r["text"] for r in made], labels=[r["label"] for r in made])
    concept = Concept(
        "names", ("good", "bad"), examples, tuple(r["group"] for r in made), {"good": (" Mary",), "bad": (" store",)},
        ("park school", "ring book drink"),
    )  # fmt: skip
    study = mi.studies.concept_study(
        model, concept, method=method, sites="resid_post.1", positions="end", max_new_tokens=2, draws=1
    )
    steps = study.results["steering"].data["strength"].values
    np.testing.assert_allclose(steps, np.array([-2, -1, 1, 2]) * steps[2])
    gap = study.results["directions"].data["gap"].sel({"site": "resid_post.1", "class": "good"})
    assert steps[2] == pytest.approx(float(gap)) and gap > 0  # which test_concept_directions measures by hand
    site = mi.sites.resid_post(1, positions="end")
    x = model.trace(examples, site)[site]
    length = float(torch.diff(study.probe.weight, dim=0).norm())
    assert float(gap) < float(torch.cdist(x, x).max())  # no two texts are further apart
    assert abs(float(gap) / length - 1) > 0.2  # a weight's length is another number


def test_a_concept_on_prompts_that_hold_it() -> None:
    """The model says a name after a name: prompts that hold the class differ, and so does removing its line there."""
    model, made = mi.testing.tiny("llama"), rows()
    examples = mi.Examples.of([r["text"] for r in made], labels=[r["label"] for r in made])
    held = {
        "bad": tuple(f"{word} drink {BAD[i % 2]}" for i, word in enumerate(FILLER)),
        "good": tuple(f"{word} drink {GOOD[i % 2]}" for i, word in enumerate(FILLER)),
    }
    concept = Concept(
        "names", ("good", "bad"), examples, tuple(r["group"] for r in made), {"good": (" Mary",), "bad": (" store",)},
        ("park school", "ring book drink"), held,
    )  # fmt: skip
    study = mi.studies.concept_study(model, concept, sites="embed", positions="end", max_new_tokens=2, draws=4)
    assert {"steering: good", "steering: bad"} < set(study.results)
    good, bad = (study.results[f"steering: {name}"].data for name in ("good", "bad"))
    assert good.sizes["example"] == bad.sizes["example"] == 6
    answers = [([" Mary"], [" store"])] * 6
    for data, name in ((good, "good"), (bad, "bad")):
        given = mi.Examples.of(held[name], answers=answers)
        swept = mi.sweep(model, given, [study.probe.ablate()], mi.log_odds()).data
        change = (swept["value"] - swept["base"]).values
        assert float(data["ablation"].sel(measure="effect")) == pytest.approx(change.mean(), abs=1e-4)
        np.testing.assert_allclose(data["clean"], swept["base"], atol=1e-5)
    said = study.summary()
    assert any(
        "partners that are bad" in line and f"{float((good['clean'] - bad['clean']).mean()):+.2f}" in line
        for line in said
    )
    assert sum("With the line removed there" in one for one in said) == 3


def test_professions_and_the_direction_of_gender(tmp_path: Path) -> None:
    """From the command line: kinds of professions against the direction, labels shuffled over professions."""
    concept, folder, out = mi.tasks.concepts("gender"), tmp_path / "model", tmp_path / "out"
    assert concept.association is not None
    said = " ".join(map(str, (*concept.examples.texts, *concept.association.prompts.texts))).split()
    model = mi.testing.tiny("llama", layers=1, words=said)
    model.hf.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    done = invoke("probe-concepts", folder, "--concept", "gender", "--site", "embed", "--draws", 1, "--out", out)
    assert done.exit_code == 0, done.output
    assert "Of 24 professions, labelled with what readers expect" in " ".join(done.stdout.split())
    kept = mi.Result.load(out / "results" / "concept-association").data
    assert kept["group"].values.tolist() == ["female", "male", "neither"] and kept["members"].values.tolist() == [8] * 3
    assert kept.sizes["member"] == 24 and set(kept["member"].values) >= {"nurse", "plumber", "student"}
    assert bool(kept["cosine"].notnull().all()) and float(kept["p"].min()) >= 1e-4
