"""Examples and their tokens: what aligns, what is refused."""

import json
from pathlib import Path

import pytest
import torch

import mechinterp as mi
from mechinterp.errors import AlignmentError, ExamplesError
from mechinterp.tasks.ioi import NAMES


def test_named_positions_are_the_last_token_of_their_span(smollm2: mi.Model) -> None:
    examples = mi.tasks.ioi(8, seed=1)
    tokens = smollm2.tokenize(examples)
    for row in range(8):
        pieces = smollm2.to_str_tokens(tokens.ids[row])
        io, subject = (answer[0] for answer in examples.answers[row])
        assert pieces[tokens.positions["IO"][row]].strip() == io.strip()
        assert pieces[tokens.positions["S1"][row]].strip() == subject.strip()
        assert pieces[tokens.positions["S2"][row]].strip() == subject.strip()
        corrupted = smollm2.to_str_tokens(tokens.corrupted[row])
        assert [i for i, (a, b) in enumerate(zip(pieces, corrupted, strict=True)) if a != b] == [
            tokens.positions["S2"][row]
        ]


def test_answers_are_single_tokens_as_they_continue_the_text(smollm2: mi.Model) -> None:
    assert all(len(smollm2.tokenizer(f" {name}")["input_ids"]) == 1 for name in NAMES)
    tokens = smollm2.tokenize(mi.Examples.of(["The capital of France is"], answers=[(" Paris", [" London", " Rome"])]))
    assert [len(side) for side in tokens.answers[0]] == [1, 2]
    with pytest.raises(ExamplesError, match=r"the answer 'Madrid' of example 0 is 2 tokens .*write ' Madrid'"):
        smollm2.tokenize(mi.Examples.of(["The capital of Spain is"], answers=["Madrid"]))
    with pytest.raises(ExamplesError, match=r"is \d tokens .*give its first token"):
        smollm2.tokenize(mi.Examples.of(["The capital of"], answers=[" Liechtenstein by the sea"]))


def test_pairs_of_different_length_do_not_align(smollm2: mi.Model) -> None:
    pairs = mi.Examples.pairs(["Mary gave"], ["Mary then gave"])
    with pytest.raises(AlignmentError, match="example 0 have 2 and 3 tokens; reword one"):
        smollm2.tokenize(pairs)


def test_a_second_bos_is_never_added(llama: mi.Model) -> None:
    import copy

    import tokenizers

    tokenizer = copy.deepcopy(llama.tokenizer)
    tokenizer.add_special_tokens({"bos_token": "<unk>"})
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<unk> $A", special_tokens=[("<unk>", bos)]
    )
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['role'] }} {{ m['content'] }}{% endfor %}"
    plain = mi.Examples.of(["the park"]).tokenize(tokenizer).ids[0]
    typed = mi.Examples.of(["<unk>the park"]).tokenize(tokenizer).ids[0]
    chat = mi.Examples.chat([[{"role": "A", "content": "the park"}]]).tokenize(tokenizer).ids[0]
    assert plain == typed
    assert [ids.count(bos) for ids in (plain, typed, chat)] == [1, 1, 1]


def test_a_chat_is_rendered_by_the_template(smollm2: mi.Model) -> None:
    chat = [{"role": "user", "content": "Say hello."}]
    ids = smollm2.tokenize(mi.Examples.chat([chat])).ids[0]
    expected = smollm2.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert list(ids) == list(expected)


def test_batches_are_by_length_and_hold_every_row_once(llama: mi.Model) -> None:
    texts = [[3] * n for n in (5, 2, 9, 2, 7)]
    tokens = llama.tokenize(texts)
    batches = tokens.batches(2)
    assert batches == [(1, 3), (0, 4), (2,)]
    batch = tokens.batch(batches[1], padding_side="left")
    assert batch.ids.shape == (2, 7)
    assert batch.lengths.tolist() == [5, 7]
    assert batch.starts.tolist() == [2, 0]
    assert batch.left_padded
    assert batch.position_ids[0].tolist() == [0, 0, 0, 1, 2, 3, 4]
    where = batch.where(("end", 0, -2))
    assert where is not None
    assert where.columns.tolist() == [[6, 2, 5], [6, 0, 5]]


def test_files(tmp_path: Path) -> None:
    rows = [
        {"text": "a b", "answer": " c", "wrong": " d", "label": 1},
        {"text": "e", "answer": [" f"], "wrong": " g", "label": 0},
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps(r) for r in rows) + "\n\n")
    examples = mi.Examples.from_jsonl(tmp_path / "x.jsonl")
    assert examples.texts == ("a b", "e")
    assert examples.answers == (((" c",), (" d",)), ((" f",), (" g",)))
    assert examples.labels == (1, 0)
    (tmp_path / "x.csv").write_text('clean,corrupted,answer\n"a,\nb",c,d\n')
    pairs = mi.Examples.from_csv(tmp_path / "x.csv")
    assert (pairs.texts, pairs.corrupted, pairs.answers) == (("a,\nb",), ("c",), ((("d",),),))
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(ExamplesError, match=r"bad.jsonl:2 is not JSON"):
        mi.Examples.from_jsonl(tmp_path / "bad.jsonl")
    with pytest.raises(ExamplesError, match=r"cannot read .*No such file"):
        mi.Examples.from_jsonl(tmp_path / "none.jsonl")
    (tmp_path / "odd.jsonl").write_text('{"prompt": "a"}\n')
    with pytest.raises(ExamplesError, match="row 0 lacks"):
        mi.Examples.from_jsonl(tmp_path / "odd.jsonl")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ExamplesError, match=r"empty.jsonl is empty; give it one example a line"):
        mi.Examples.from_jsonl(tmp_path / "empty.jsonl")


def test_a_column_names_the_subject(tmp_path: Path, smollm2: mi.Model) -> None:
    rows = [
        {"text": "The capital of New Zealand is", "answer": " Wellington", "subject": "New Zealand"},
        {"text": "Cat eats cat", "answer": " food", "subject": [9, 12]},
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    examples = mi.Examples.from_jsonl(tmp_path / "x.jsonl")
    assert examples.spans == {"subject": ((15, 26), (9, 12))}
    tokens = smollm2.tokenize(examples)
    said = [smollm2.to_str_tokens(ids[a:b]) for ids, (a, b) in zip(tokens.ids, tokens.spans["subject"], strict=True)]
    assert said == [[" New", " Zealand"], [" cat"]]
    (tmp_path / "x.csv").write_text("clean,corrupted,subject\nIn Rome now,In Oslo now,Rome\n")
    pairs = mi.Examples.from_csv(tmp_path / "x.csv")
    assert (pairs.corrupted, pairs.spans) == (("In Oslo now",), {"subject": ((3, 7),)})
    assert mi.Examples.from_dataset([{"text": [5, 6, 7], "subject": [1, 3]}]).spans == {"subject": ((1, 3),)}
    assert mi.Examples.from_dataset([{"text": "a"}]).spans == {}


@pytest.mark.parametrize(
    ("text", "subject", "message"),
    [
        ("The park", "Park", r"subject 'Park' of row 1 does not occur in 'The park'; spell it as the text does, or"),
        ("aXa", "a", r"subject 'a' of row 1 occurs 2 times, at \[0, 2\], in 'aXa'; give \[start, stop\]"),
        ("anana", "ana", "occurs 2 times"),
        ("ab", [1, 3], r"subject of row 1 is \[1, 3\], outside its text of length 2"),
        ("ab", [1], "must be a part of its text, or"),
        ("ab", "", "must be a part of its text, or"),
        ([5, 6], "5", "must be a part of its text, or"),
        ("ab", None, r"row 1 lacks \['subject'\]"),
    ],
)
def test_subjects_that_cannot_be(text: object, subject: object, message: str) -> None:
    with pytest.raises(ExamplesError, match=message):
        mi.Examples.from_dataset([{"text": "ab", "subject": "b"}, {"text": text, "subject": subject}])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: mi.Examples.of([]), "at least one text"),
        (lambda: mi.Examples.of(["a"], labels=[1, 2]), "labels has 2 entries for 1 texts"),
        (lambda: mi.Examples.of(["a"], answers=[("b", "c", "d")]), "right or"),
        (lambda: mi.Examples.of(["a"], answers=[[]]), "at least one answer"),
        (lambda: mi.Examples.of([{"a": 1}]), "string or token ids"),
        (lambda: mi.Examples.of(["a", "b"], answers=[("c", "d"), "e"]), "some have none"),
        (
            lambda: mi.Examples.from_dataset([{"text": "a", "answer": "b"}, {"text": "c", "answer": None}]),
            "row 1 lacks",
        ),
        (lambda: mi.Examples.of(["a"], positions={"end": [(0, 1)]}), "are taken"),
    ],
)
def test_examples_that_cannot_be(build: object, message: str) -> None:
    with pytest.raises(ExamplesError, match=message):
        build()  # pyright: ignore[reportCallIssue] -- parametrized callables


def test_spans_outside_the_text(smollm2: mi.Model) -> None:
    with pytest.raises(ExamplesError, match="covers no token"):
        smollm2.tokenize(mi.Examples.of(["ab"], positions={"x": [(5, 9)]}))
    with pytest.raises(ExamplesError, match="outside its 3 tokens"):
        smollm2.tokenize(mi.Examples.of([[1, 2, 3]], positions={"x": [(2, 5)]}))


def test_a_model_without_a_tokenizer_takes_ids_only(llama: mi.Model) -> None:
    bare = mi.Model.wrap(llama.hf)
    assert bare.trace([3, 4], "embed")["embed"].shape == (1, 2, 32)
    assert bare.trace(torch.tensor([[3, 4], [5, 6]]), "embed")["embed"].shape == (2, 2, 32)
    assert bare.to_str_tokens([3]) == ["<3>"]
    with pytest.raises(ExamplesError, match="no tokenizer; give token ids"):
        bare.trace("hello", "embed")


def test_induction_repeats_and_its_control_does_not(smollm2: mi.Model) -> None:
    examples = mi.tasks.induction(smollm2, n=3, length=10, seed=2, control=True)
    repeated, control = examples.texts[:3], examples.texts[3:]
    assert all(row[:10] == row[10:] and len(set(row)) == 10 for row in repeated)
    assert all(len(set(row)) == 20 for row in control)
    assert [a[:10] for a in repeated] == [b[:10] for b in control]
    assert examples == mi.tasks.induction(smollm2, n=3, length=10, seed=2, control=True)
    assert not set(sum(repeated, ())) & set(smollm2.tokenizer.all_special_ids)


def test_ids_outside_the_vocabulary_are_refused(llama: mi.Model) -> None:
    with pytest.raises(ExamplesError, match="token id 99999 is outside the vocabulary"):
        llama.trace([5, 99999], "embed")
    with pytest.raises(ExamplesError, match="token id -1 is outside"):
        llama.tokenize(mi.Examples.of([[5]], answers=[-1]))
