"""The YAML configuration of an attention study: what it gives, and errors that name line and key."""

from pathlib import Path

import pytest

from mechinterp.errors import ConfigurationError
from mechinterp.studies.configuration import StudyConfig

WHOLE = """\
model:
  name: smollm2
generation:
  mode: constrained
  labels: [increase, decrease]
  prompt: "{text} The outlook is to"
analysis:
  samples: data/samples.jsonl
  vocabulary: words.yaml
  fields:
    text: body
visualisation:
  out: results
  heads: [[0, 1], [3, 2]]
"""


def load(tmp_path: Path, text: str) -> StudyConfig:
    (tmp_path / "study.yaml").write_text(text)
    return StudyConfig.load(tmp_path / "study.yaml")


def test_what_is_not_given_has_defaults_and_paths_are_beside_the_file(tmp_path: Path) -> None:
    found = load(tmp_path, WHOLE)
    assert found.model.name == "smollm2"
    assert found.generation.labels == ("increase", "decrease")
    assert found.generation.continuation == " {label}"
    assert found.analysis.samples == str(tmp_path / "data/samples.jsonl")
    assert found.analysis.vocabulary == str(tmp_path / "words.yaml")
    assert found.analysis.fields.text == "body"
    assert found.analysis.fields.label == "label"
    assert found.visualisation.out == str(tmp_path / "results")
    assert found.visualisation.heads == ((0, 1), (3, 2))
    (tmp_path / "smollm2").mkdir()  # a folder beside the file
    assert load(tmp_path, WHOLE).model.name == str(tmp_path / "smollm2")


@pytest.mark.parametrize(
    ("old", "new", "wanted"),
    [
        ("name: smollm2", "nam: smollm2", r"yaml:2: the key model.nam is unknown; did you mean 'name'\?"),
        ("name: smollm2", "zzz: 1\n  name: x", r"yaml:2: the key model.zzz is unknown; known are name, adapter, dtype"),
        ("    text: body", "    txt: body", r"yaml:11: the key analysis.fields.txt is unknown; did you mean 'text'\?"),
        ("visualisation:", "visualization:", r"yaml:12: the key visualization .* did you mean 'visualisation'\?"),
        ("  samples: data/samples.jsonl\n", "", r"yaml:7: the key analysis.samples is missing; add it"),
        ("model:\n  name: smollm2\n", "", r"yaml:1: the key model is missing; add it"),
        ("mode: constrained", "mode: guessed", r"yaml:4: generation.mode: .*'constrained'.* Got 'guessed'"),
        ("mode: constrained", "max_new_tokens: 0", r"yaml:4: generation.max_new_tokens: .* Got 0"),
        ("mode: constrained", "temperature: hot", r"yaml:4: generation.temperature: .* Got 'hot'"),
        ("mode: constrained", "mode: generated\n  mode: file", r"yaml:5 repeats the key generation.mode, which line 4"),
        ("  labels: [increase, decrease]\n", "", r"yaml:3: generation: mode 'constrained' needs labels"),
        ("[increase, decrease]", "[increase]", r"yaml:5: generation.labels: .*at least 2"),
        (
            "[increase, decrease]",
            "[yes, no]",
            r"^\S+yaml:5: generation.labels.0 must be text; put it in quotes. Got True",
        ),
        ("[increase, decrease]", "[increase, ' Increase']", r"yaml:3: generation: labels must differ"),
        ("{text} The", "The", r"yaml:3: generation: prompt must hold \{text\} exactly once"),
        (
            "mode: constrained",
            "answer: 'it is'\n  mode: constrained",
            r"yaml:3: generation: answer must hold",
        ),
        ("mode: constrained", "mode: constrained\n  system: hello", r"system is part of a chat"),
        ("[[0, 1], [3, 2]]", "[[0, 1], [3, a]]", r"yaml:14: visualisation.heads.1.1: .* Got 'a'"),
        ("model:\n", "model: [\n", r"yaml:\d+ is not plain YAML"),
        ("smollm2", "!!python/object/apply:os.getcwd []", r"yaml:2 is not plain YAML"),
        ("model:\n  name: smollm2", "model:", r"yaml:1: model: .* Got None"),
    ],
    ids=lambda value: value[:30],
)
def test_errors_name_the_line_and_the_key(tmp_path: Path, old: str, new: str, wanted: str) -> None:
    assert old in WHOLE
    with pytest.raises(ConfigurationError, match=wanted):
        load(tmp_path, WHOLE.replace(old, new, 1))


def test_all_errors_are_told_in_the_order_of_lines(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as error:
        load(tmp_path, "model:\n  nam: x\nanalysis:\n  floor: 2\n  samples: a\n")
    said = str(error.value).splitlines()
    lines = [int(one.split(".yaml:")[1].split(":")[0]) for one in said]
    assert lines == sorted(lines)
    assert len(said) == 4


@pytest.mark.parametrize("text", ["", "- a\n", "hello\n"])
def test_a_file_without_keys(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigurationError, match="write the sections model, generation, analysis, visualisation"):
        load(tmp_path, text)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot read"):
        StudyConfig.load(tmp_path / "none.yaml")
