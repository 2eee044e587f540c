"""Word categories: found on characters, carried to tokens, never a silent zero."""

import copy
from pathlib import Path

import pytest
import tokenizers
import torch

import mechinterp as mi
from mechinterp.errors import ExamplesError


def words(text: str, found: dict[str, tuple[tuple[int, int], ...]]) -> dict[str, list[str]]:
    return {name: [text[a:b] for a, b in spans] for name, spans in found.items()}


def test_whole_words_in_any_case_and_terms_of_several_words() -> None:
    vocabulary = mi.Vocabulary.of({"up": ["rise", "record high", "high", "$"], "down": ["fall", "C++"]})
    text = "RISE at sunrise, a Record\n high; risers rise. High? US$5 in C++ falls, fall_back, no fall."
    assert words(text, vocabulary.find(text)) == {
        "up": ["RISE", "Record\n high", "rise", "High", "$"],
        "down": ["C++", "fall"],
    }


def test_regexes_and_case() -> None:
    vocabulary = mi.Vocabulary.of(
        {
            "numbers": {"regexes": [r"[0-9]+(\.[0-9]+)?", r"[0-9]+%", r"x*"]},
            "names": {"terms": ["Apple"], "case_sensitive": True},
        }
    )
    text = "Apple sold 12.5% and 7 apples"
    # Overlapping matches are one, and a match of nothing is none.
    assert words(text, vocabulary.find(text)) == {"numbers": ["12.5%", "7"], "names": ["Apple"]}


def test_a_yaml_file_takes_words_as_written(tmp_path: Path) -> None:
    path = tmp_path / "v.yaml"
    path.write_text("answers: [yes, no, on]\nyears:\n  terms: [2024, 1e3]\n  regexes: ['[0-9]+']\n")
    vocabulary = mi.Vocabulary.from_yaml(path)
    assert vocabulary.names == ("answers", "years")
    assert vocabulary.categories["answers"].terms == ("yes", "no", "on")
    assert vocabulary.categories["years"].terms == ("2024", "1e3")
    assert vocabulary == mi.Vocabulary.of(
        {"answers": ["yes", "no", "on"], "years": {"terms": ["2024", "1e3"], "regexes": ["[0-9]+"]}}
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("up: [a]\nup: [b]\n", r"v.yaml:2: the key 'up' is there twice"),
        (
            "up: [a]\ndown:\n  terms: [b]\n  words: [c]\n",
            r"v.yaml:4: the category 'down' has the key 'words'; the keys",
        ),
        ("up:\n- a\n-\n", r"v.yaml:3: the terms of the category 'up' must be text. Got None"),
        ("up:\n  regexes:\n  - a\n  - '('\n", r"v.yaml:4: '\(' of the category 'up' is no regular expression"),
        ("up: a\n", r"v.yaml:1: the terms of the category 'up' must be a list. Got 'a'"),
        ("ok: [a]\nup: []\n", r"v.yaml:2: the category 'up' is empty; give it terms"),
        ("up:\n  terms: [a]\n  case_sensitive: perhaps\n", r"v.yaml:3: case_sensitive of the category 'up' must be"),
        ("- a\n", r"v.yaml:1: a vocabulary must map names"),
        ("", r"v.yaml:1: a vocabulary must map names"),
        ("up: [a\n", r"v.yaml:2 is not YAML"),
        ("up: !!python/object/apply:os.system [ls]\n--- \na: b\n", r"v.yaml:2 is not YAML"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_by_line_and_key(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "v.yaml").write_text(text)
    with pytest.raises(ExamplesError, match=said):
        mi.Vocabulary.from_yaml(tmp_path / "v.yaml")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ExamplesError, match=r"cannot read .*No such file"):
        mi.Vocabulary.from_yaml(tmp_path / "none.yaml")


UP = mi.Vocabulary.of({"up": ["gain", "record high"], "names": {"regexes": ["New York|Oslo"]}})
TEXTS = ["New York saw a record high today", "Oslo", "A gain and a gain, and then nothing more was said of it"]


def pieces(model: mi.Model, batch: mi.TokenBatch, row: int) -> list[str]:
    """The texts of each category's tokens in a row, by hand from the mask."""
    return [
        "".join(
            model.to_str_tokens(batch.ids[row][batch.members[row, c][batch.offset :]].tolist()) if some.any() else []
        )
        for c, some in enumerate(batch.members[row])
    ]


@pytest.mark.parametrize("side", ["left", "right"])
def test_categories_become_masks_of_tokens(smollm2: mi.Model, side: str) -> None:
    tokens = smollm2.tokenize(mi.Examples.of(TEXTS).categorize(UP))
    batch = tokens.batch(range(3), padding_side=side)
    assert list(batch.categories) == ["up", "names"]
    assert batch.members.shape == (3, 2, batch.ids.shape[1])
    assert [pieces(smollm2, batch, row) for row in range(3)] == [
        [" record high", "New York"],
        ["", "Oslo"],
        [" gain gain", ""],
    ]
    assert not (batch.members & ~batch.mask[:, None]).any()
    some = batch.take([2, 1])
    torch.testing.assert_close(some.members, batch.members[[2, 1]][:, :, : some.ids.shape[1]])
    right = batch.right_padded()
    assert [pieces(smollm2, right, row) for row in range(3)] == [pieces(smollm2, batch, row) for row in range(3)]


def test_a_bos_moves_nothing(llama: mi.Model) -> None:
    tokenizer = copy.deepcopy(llama.tokenizer)
    tokenizer.add_special_tokens({"bos_token": "<unk>"})
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<unk> $A", special_tokens=[("<unk>", tokenizer.bos_token_id)]
    )
    examples = mi.Examples.of(["the park the store"]).categorize(mi.Vocabulary.of({"place": ["store"]}))
    with_bos, without = examples.tokenize(tokenizer), examples.tokenize(llama.tokenizer)
    assert len(with_bos.ids[0]) == len(without.ids[0]) + 1
    for tokens, shift in ((without, 0), (with_bos, 1)):
        [(start, stop)] = tokens.categories["place"][0]
        assert llama.tokenizer.decode(tokens.ids[0][start:stop]).strip() == "store"
        assert start == without.categories["place"][0][0][0] + shift


def test_in_a_chat_words_are_found_in_the_contents_alone(smollm2: mi.Model) -> None:
    chat = [
        {"role": "system", "content": "You help. user"},
        {"role": "user", "content": "  Will Oslo see a record high, user?\n"},
        {"role": "assistant", "content": "A gain, user"},
    ]
    vocabulary = mi.Vocabulary.of({"role": ["user"], "up": ["record high", "gain"], "across": ["help", "user A"]})
    examples = mi.Examples.chat([chat, chat[:1]]).categorize(vocabulary)
    assert len(examples.categories["role"][0]) == 3  # not the template's own word
    tokens = smollm2.tokenize(examples)
    said = [smollm2.tokenizer.decode(tokens.ids[0][a:b]).strip() for a, b in tokens.categories["up"][0]]
    assert said == ["record high", "gain"]
    roles = [smollm2.tokenizer.decode(tokens.ids[0][a:b]) for a, b in tokens.categories["role"][0]]
    assert roles == [" user", " user", " user"]
    assert [len(spans) for spans in tokens.categories["across"]] == [1, 1]  # no term goes from one content to the next


def test_a_template_that_changes_the_contents_is_refused(llama: mi.Model) -> None:
    tokenizer = copy.deepcopy(llama.tokenizer)
    park, store = ({"role": "user", "content": f"the {place}"} for place in ("park", "store"))
    examples = mi.Examples.chat([[park, store]]).categorize(mi.Vocabulary.of({"p": ["park"]}))
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    [(start, stop)] = examples.tokenize(tokenizer).categories["p"][0]
    assert tokenizer.decode(examples.tokenize(tokenizer).ids[0][start:stop]).strip() == "park"
    for order, content in (("", "| upper"), ("", "[:3]"), ("| reverse", "")):
        tokenizer.chat_template = f"{{% for m in messages {order} %}}{{{{ m['content'] {content} }}}} {{% endfor %}}"
        with pytest.raises(ExamplesError, match="changes or moves the contents of example 0"):
            examples.tokenize(tokenizer)


def test_spans_may_be_given_straight(smollm2: mi.Model) -> None:
    examples = mi.Examples.of([[5, 6, 7, 8], "Oslo wins"]).with_category("prediction", [[(1, 3), (2, 4)], [(5, 9)]])
    tokens = smollm2.tokenize(examples)
    assert tokens.categories["prediction"][0] == ((1, 3), (2, 4))
    batch = tokens.batch([0, 1])
    assert batch.members[0, 0].tolist() == [False, True, True, True]
    assert smollm2.to_str_tokens(batch.ids[1][batch.members[1, 0]].tolist()) == [" wins"]
    with pytest.raises(ExamplesError, match=r"'far' of example 0 is \(3, 9\), outside its 4 tokens"):
        smollm2.tokenize(mi.Examples.of([[5, 6, 7, 8]]).with_category("far", [[(3, 9)]]))


def test_nothing_is_a_silent_zero() -> None:
    examples = mi.Examples.of(TEXTS)
    with pytest.raises(ExamplesError, match=r"\['nowhere', 'never'\] match nothing in any of the 3 texts"):
        examples.categorize(mi.Vocabulary.of({"nowhere": ["xyzzy"], "names": ["Oslo"], "never": ["recor"]}))
    with pytest.raises(ExamplesError, match="already is a category 'up'"):
        examples.categorize(UP).categorize(UP)
    with pytest.raises(ExamplesError, match="'p' has no span in any text"):
        examples.with_category("p", [[], [], []])
    with pytest.raises(ExamplesError, match="2 entries for 3 texts"):
        examples.with_category("p", [[(0, 1)], []])
    with pytest.raises(ExamplesError, match="example 0 is token ids, which have no words"):
        mi.Examples.of([[1, 2]]).categorize(UP)


def test_a_span_in_a_chat_counts_its_contents(smollm2: mi.Model) -> None:
    from dataclasses import replace

    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The wine was bad."}]
    at = len("Be brief.\nThe ")
    plain = mi.Examples.chat([chat])
    examples = replace(plain, spans={"noun": ((at, at + 4),)}, positions={"noun_end": ((at, at + 4),)})
    tokens = smollm2.tokenize(examples)
    start, stop = tokens.spans["noun"][0]
    assert smollm2.to_str_tokens(tokens.ids[0][start:stop]) == [" wine"]
    assert tokens.positions["noun_end"] == (stop - 1,)
