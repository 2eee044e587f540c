"""Predictions: read from files with their faults, chosen among labels against hand-written loops, and generated."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mechinterp as mi
from mechinterp.errors import ExamplesError
from mechinterp.studies.configuration import Fields
from mechinterp.studies.predictions import Samples, choose, confusion, find_label, prompt_of, read_samples, write

ROWS: list[dict[str, Any]] = [
    {"text": "profits rose", "label": "increase", "prediction": "increase", "desk": "a"},
    {"text": "profits fell", "label": "Decrease", "prediction": " increase ", "desk": "b"},
    {"text": "nothing", "label": "decrease", "prediction": "DECREASE", "desk": "a"},
]


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def test_lines_and_lists_hold_the_same(tmp_path: Path) -> None:
    lines = read_samples(jsonl(tmp_path / "a.jsonl", ROWS[0], "", *ROWS[1:]))
    whole = tmp_path / "a.json"
    whole.write_text(json.dumps(ROWS, indent=2))
    listed = read_samples(whole)
    assert [s.line for s in lines.rows] == [1, 3, 4]
    assert [s.line for s in listed.rows] == [2, 8, 14]
    for one in (lines, listed):
        assert one.labels == ("increase", "decrease")
        assert [(s.label, s.prediction) for s in one.rows] == [
            ("increase", "increase"),
            ("decrease", "increase"),
            ("decrease", "decrease"),
        ]
        assert [s.more for s in one.rows] == [{"desk": "a"}, {"desk": "b"}, {"desk": "a"}]
    assert confusion(lines.rows) == {"increase": {"increase": 1}, "decrease": {"increase": 1, "decrease": 1}}


def test_fields_have_other_names(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", {"body": "x", "gold": 1, "said": 0}, {"body": "y", "gold": 0, "said": 0})
    found = read_samples(file, Fields(text="body", label="gold", prediction="said"))
    assert [(s.text, s.label, s.prediction) for s in found.rows] == [("x", "1", "0"), ("y", "0", "0")]


FAULTS = [
    ({"label": "increase", "prediction": "increase"}, r"no field 'text' \(line 2\)"),
    ({"text": " ", "label": "increase", "prediction": "increase"}, r"field 'text' is no text \(line 2\)"),
    ({"text": ["x"], "label": "increase", "prediction": "increase"}, r"field 'text' is no text \(line 2\)"),
    ({"text": "x", "prediction": "increase"}, r"no field 'label' \(line 2\)"),
    ({"text": "x", "label": "increase"}, r"no field 'prediction' \(line 2\)"),
    ({"text": "x", "label": "increase", "prediction": None}, r"no field 'prediction' \(line 2\)"),
    ({"text": "x", "label": "up", "prediction": "increase"}, r"unknown label 'up' \(line 2\)"),
    ({"text": "x", "label": "increase", "prediction": "up"}, r"unknown prediction 'up' \(line 2\)"),
]


@pytest.mark.parametrize(("row", "wanted"), FAULTS, ids=[wanted for _, wanted in FAULTS])
def test_a_sample_that_cannot_be_used_is_refused_or_counted(tmp_path: Path, row: dict[str, Any], wanted: str) -> None:
    file = jsonl(tmp_path / "a.jsonl", ROWS[0], row, *ROWS[1:])
    labels = ("increase", "decrease")
    with pytest.raises(ExamplesError, match=wanted):
        read_samples(file, labels=labels)
    kept = read_samples(file, labels=labels, refuse=False)
    assert [s.line for s in kept.rows] == [1, 3, 4]
    assert list(kept.skipped.values()) == [(2,)]


def test_many_faults_are_one_sentence(tmp_path: Path) -> None:
    file = jsonl(tmp_path / "a.jsonl", *ROWS, *[{"text": "x"}] * 7)
    with pytest.raises(ExamplesError, match=r"7 samples of 10 .* no field 'label' \(lines 4, 5, 6, 7, 8 and 2 more\)"):
        read_samples(file)


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        ('{"text": "a", "label": "b", "prediction": "b"}\n{"text": \n', r"a.jsonl:3 is not JSON"),
        ('{"text": "a"}\nhello\n', r"a.jsonl:2 is not JSON"),
        ("[1]\n", r"a.jsonl:1 is not an object"),
        ('{"label": "b", "prediction": "b"}\n', r"1 sample of 1 that cannot be used: no field 'text'"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path: Path, content: str, wanted: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(content)
    with pytest.raises(ExamplesError, match=wanted):
        read_samples(file)
    with pytest.raises(ExamplesError, match="cannot read"):
        read_samples(tmp_path / "none.jsonl")


def test_when_nothing_is_left_it_says_why(tmp_path: Path) -> None:
    with pytest.raises(ExamplesError, match=r"no sample that can be used: no field 'prediction' \(lines 1, 2\)"):
        read_samples(jsonl(tmp_path / "a.jsonl", *[{"text": "x", "label": "y"}] * 2), refuse=False)
    with pytest.raises(ExamplesError, match="it is empty"):
        Samples((), ()).without({}, "a.jsonl", False)


# By the model


TEXTS = ["Then, Mary and John went to the store. Mary gave", "John gave a drink", "The school had"]


@pytest.mark.parametrize(
    "labels",
    [("Mary", "John"), ("Mary Anna", "John", "Tom gave a"), ("Mary Anna", "Mary John", "Tom"), ("a b c", "a b d e")],
)
def test_choices_are_whole_probabilities(model: mi.Model, labels: tuple[str, ...]) -> None:
    """Against one plain Hugging Face pass for each prompt and label."""
    found = choose(model, TEXTS, labels)
    tokenizer: Any = model.tokenizer
    for i, text in enumerate(TEXTS):
        prompt = tokenizer(text)["input_ids"]
        for j, label in enumerate(labels):
            ids = [*prompt, *tokenizer(f" {label}")["input_ids"]]
            with torch.no_grad():
                logs = model.hf(torch.tensor([ids])).logits[0].double().log_softmax(-1)
            whole = sum(float(logs[at - 1, ids[at]]) for at in range(len(prompt), len(ids)))
            assert found.log_probs[i, j] == pytest.approx(whole, abs=1e-4)
    assert found.predictions == tuple(labels[i] for i in found.log_probs.argmax(1))


@pytest.mark.parametrize(
    ("labels", "rows"),
    [(("Mary", "John", "Tom"), 1), (("Mary Anna", "John"), 1), (("Mary Anna", "Mary John"), 1), (("a b", "c d"), 2)],
)
def test_labels_share_rows(llama: mi.Model, labels: tuple[str, ...], rows: int) -> None:
    """A label of one token needs only the prompt, which every other row begins with."""
    assert choose(llama, TEXTS, labels, batch_size=1).passes == rows * len(TEXTS)
    assert choose(llama, TEXTS, labels).passes == 1


def test_a_label_that_begins_another(llama: mi.Model) -> None:
    with pytest.raises(ExamplesError, match="the label 'Mary' begin those of 'Mary Anna'"):
        choose(llama, TEXTS, ("Mary", "Mary Anna"))
    with pytest.raises(ExamplesError, match="begin those of"):
        choose(llama, TEXTS, ("zzzqx", "yyyqx"))  # both are unknown words
    assert np.isfinite(choose(llama, TEXTS, ("Mary", "Mary Anna"), " {label}.").log_probs).all()


def test_what_is_written_is_seeded(model: mi.Model) -> None:
    plain = write(model, TEXTS[0], ("Mary", "John"), max_new_tokens=6)
    assert plain.generation.tokens == model.generate(TEXTS[0], max_new_tokens=6).tokens
    state = torch.get_rng_state()
    hot = [write(model, TEXTS[0], ("Mary",), temperature=2.0, max_new_tokens=6, seed=s) for s in (1, 2, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    assert hot[0].generation.tokens == hot[2].generation.tokens != hot[1].generation.tokens


def test_sampling_follows_the_temperature(llama: mi.Model) -> None:
    """The share of each first token against softmax(logits / T)."""
    logits = llama.trace(TEXTS[2], mi.sites.logits(positions="end"))["logits"][0]
    wanted = (logits / 0.3).softmax(-1)
    drawn = [
        write(llama, TEXTS[2], ("Mary",), temperature=0.3, max_new_tokens=1, seed=s).generation.tokens[0]
        for s in range(300)
    ]
    best = int(wanted.argmax())
    share, p = drawn.count(best) / 300, float(wanted[best])
    assert 0.05 < p < 0.95
    assert abs(share - p) < 4 * (p * (1 - p) / 300) ** 0.5
    assert len(set(drawn)) > 10  # neither top_k nor top_p of a checkpoint cuts it off


@pytest.mark.parametrize(
    ("text", "label"),
    [
        (" Increase.", "increase"),
        ("a decrease, not an increase", "decrease"),
        ("increases", None),
        ("I do not know", None),
        ("", None),
        ("strong increase", "strong increase"),
    ],
)
def test_a_label_is_found_as_a_word(text: str, label: str | None) -> None:
    assert find_label(text, ("increase", "decrease", "strong", "strong increase")) == label


# Prompts


@pytest.mark.parametrize("text", ["profits rose", " profits rose\n"])
def test_a_prompt_knows_where_its_text_is(text: str) -> None:
    plain, start = prompt_of(text, "News: {text}\nAnswer:")
    assert plain == f"News: {text}\nAnswer:"
    assert isinstance(plain, str) and plain[start : start + len(text)] == text
    chat, start = prompt_of(text, "News: {text}", chat=True, system="profits rose or fall?")
    assert isinstance(chat, mi.Chat)
    assert chat.messages == (("system", "profits rose or fall?"), ("user", f"News: {text}"))
    assert "\n".join(content for _, content in chat.messages)[start : start + len(text)] == text
    alone, start = prompt_of(text, "{text}", chat=True)
    assert (alone, start) == (mi.Chat((("user", text),)), 0)
