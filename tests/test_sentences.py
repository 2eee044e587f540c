"""Labelled words: what the grammar makes, what it can be told from, and files of people's own."""

import json
import re
from collections import Counter
from pathlib import Path

import networkx as nx
import numpy as np
import pandas as pd
import pytest

import mechinterp as mi
from mechinterp.core.sentences import Sentences
from mechinterp.errors import ExamplesError, OutputError
from mechinterp.tasks.frames import FRAMES
from mechinterp.tasks.lexicon import ADJECTIVES, NOUNS

POS = {"NOUN", "PROPN", "VERB", "AUX", "DET", "ADJ", "ADV", "ADP", "PRON", "CCONJ", "SCONJ", "PART", "NUM", "PUNCT"}
RELATIONS = (
    "acl advcl advmod amod aux case cc ccomp conj cop det expl iobj mark nmod nsubj nummod obj obl punct root xcomp"
)
FILE = Path(__file__).parent / "sentences.conllu"


@pytest.fixture(scope="module")
def made() -> Sentences:
    return mi.tasks.sentences(288)


def majority(table: pd.DataFrame, label: str) -> float:
    """Accuracy of the label that each word type has most often, on the very words it is counted on."""
    known = table[table[label].notna()]
    counts = known.groupby([known["word"].str.lower(), label]).size()
    return counts.groupby(level=0).max().sum() / counts.sum()


def test_they_are_the_same_for_a_seed_and_no_two_are_equal(made: Sentences) -> None:
    first = mi.tasks.sentences(80)
    assert first == mi.tasks.sentences(80)
    assert first.texts == made.texts[:80]
    assert len({*first.texts, *mi.tasks.sentences(80, seed=1).texts}) > 155
    assert len(set(made.texts)) == len(made) == 288
    with pytest.raises(ExamplesError, match="n of sentences must be at least 1"):
        mi.tasks.sentences(0)


def test_words_are_where_they_stand(made: Sentences) -> None:
    for text, spans in zip(made.texts, made.words, strict=True):
        assert text[0].isupper() and text.endswith(".") and "  " not in text
        words = [text[slice(*span)] for span in spans]
        assert " ".join(words).replace(" ,", ",").replace(" .", ".") == text
    assert not [text for text in made.texts if re.search(r"\ba [aeiou]|\ban [^aeiou]", text, re.IGNORECASE)]


def test_heads_are_a_tree_without_crossing(made: Sentences) -> None:
    columns = (made.word_labels[name] for name in ("head", "depth", "head_distance"))
    for heads, depths, distances in zip(*columns, strict=True):
        tree = nx.DiGraph([(head, i) for i, head in enumerate(heads) if head >= 0])
        (root,) = [i for i, head in enumerate(heads) if head < 0]
        assert nx.is_arborescence(tree) and len(tree) == len(heads)
        lengths = nx.single_source_shortest_path_length(tree, root)
        assert [lengths[i] for i in range(len(heads))] == list(depths)
        for i, (head, distance) in enumerate(zip(heads, distances, strict=True)):
            assert distance == (None if i == root else head - i)
            inside = range(min(i, head) + 1, max(i, head)) if i != root else ()
            assert all(nx.has_path(tree, head, j) for j in inside)


def test_labels_are_balanced_and_crossed(made: Sentences) -> None:
    names = ("tense", "subject_number", "voice", "sentiment")
    cells = Counter(zip(*(made.labels[name] for name in names), strict=True))
    assert len(cells) == 2 * 2 * 2 * 3 and set(cells.values()) == {288 // 24}


def test_all_kinds_of_sentences_and_labels_are_there(made: Sentences) -> None:
    assert set(made.labels["attractors"]) == {0, 1, 2}
    assert set(made.labels["frame"]) == {frame.name for frame in FRAMES} and len(FRAMES) > 36
    assert set(made.column("pos")) == POS
    assert set(made.column("relation")) == set(RELATIONS.split())
    assert set(made.column("number")) == {"sing", "plur", None}
    assert set(made.column("tense")) == {"past", "present", None}


def test_the_noun_before_the_verb_says_nothing_of_the_subject(made: Sentences) -> None:
    """What stands between them is counted anew, from the words."""
    nearest: list[bool] = []
    last: list[bool] = []
    for i, text in enumerate(made.texts):
        pos, head, relation, numbers, tenses = (
            made.word_labels[name][i] for name in ("pos", "head", "relation", "number", "tense")
        )
        forms = [text[slice(*span)] for span in made.words[i]]
        root = head.index(-1)
        main = [j for j in range(len(head)) if head[j] == root]
        subject = next(j for j in main if relation[j] == "nsubj")
        helped = [j for j in main if relation[j] in ("aux", "cop")]
        verb = next(j for j in sorted([*helped, root]) if tenses[j] is not None)
        number, tense = made.labels["subject_number"][i], made.labels["tense"][i]
        shown = tense == "present" or forms[verb] in ("was", "were")
        assert (numbers[subject], tenses[verb], numbers[verb]) == (number, tense, number if shown else None)
        nouns = [numbers[j] for j in range(subject + 1, verb) if pos[j] == "NOUN"]
        assert made.labels["attractors"][i] == len(nouns) - nouns.count(number)
        nearest += [noun == number for noun in nouns[-1:]]
        last.append([numbers[j] for j, kind in enumerate(pos) if kind in ("NOUN", "PROPN", "PRON")][-1] == number)
        be = any(relation[j] == "aux" and forms[j] in ("is", "are", "was", "were") for j in helped)
        assert (made.labels["voice"][i] == "passive") == (be and not forms[root].endswith("ing"))
    assert len(nearest) == 192 and np.mean(nearest) == 0.5
    assert np.mean(last) < 0.7


def test_word_types_do_not_give_the_labels_away() -> None:
    words = mi.tasks.sentences(720, seed=3).table().query("pos != 'PUNCT'")
    assert majority(words, "pos") < 0.95
    both = words.groupby(words["word"].str.lower())["pos"].agg(set)
    assert sum({"NOUN", "VERB"} <= kinds for kinds in both) >= 25
    assert {"that", "to", "before", "after", "outside", "inside"} <= set(both.index[both.map(len) > 1])
    assert majority(words, "number") < 0.97  # plans: plural as a noun, singular as a verb
    finite = words[words["pos"] == "VERB"].assign(tense=words["tense"].fillna("none"))
    assert majority(finite, "tense") < 0.9  # walked, was walked; walk, does not walk


def test_groups_of_nouns_have_what_is_said_of_them() -> None:
    assert set(ADJECTIVES) == set(NOUNS)
    nouns = [noun for group in NOUNS.values() for noun in group]
    assert len(set(nouns)) == len(nouns)


def test_columns_go_with_the_words_that_are_read(made: Sentences, llama: mi.Model) -> None:
    part = mi.tasks.sentences(12)
    examples = part.examples("tense")
    assert examples.labels == part.labels["tense"] and part.examples().labels is None
    tokens = llama.tokenize(examples)
    assert sum(map(len, tokens.categories["word"])) == len(part.column("pos")) == len(part.forms)
    for words, text, spans in zip(tokens.categories["word"], part.texts, part.words, strict=True):
        covers = llama.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        for (start, stop), (first, last) in zip(words, spans, strict=True):
            assert covers[start][0] <= first < covers[start][1] and covers[stop - 1][0] < last <= covers[stop - 1][1]
    assert part.table()["word"].tolist() == list(part.forms)
    with pytest.raises(ExamplesError, match="these words have no label 'case'; theirs are pos, head"):
        part.column("case")
    with pytest.raises(ExamplesError, match="these sentences have no label 'mood'; theirs are sentiment"):
        part.examples("mood")


def test_conllu_there_and_back(made: Sentences, tmp_path: Path) -> None:
    path = tmp_path / "made.conllu"
    made.to_conllu(path)
    assert Sentences.from_conllu(path) == made
    read = Sentences.from_conllu(FILE)
    read.to_conllu(path)
    assert Sentences.from_conllu(path) == read


CONLLU = """# text = Il va au lac, hélas!
# mood = statement
1\tIl\til\tPRON\t_\tNumber=Sing|Person=3\t2\tnsubj:expl\t_\t_
2\tva\taller\tVERB\t_\tNumber=Sing|Tense=Pres|VerbForm=Fin\t0\troot\t_\t_
3-4\tau\t_\t_\t_\t_\t_\t_\t_\t_
3\tà\tà\tADP\t_\t_\t5\tcase\t_\t_
4\tle\tle\tDET\t_\tNumber=Sing\t5\tdet\t_\t_
5\tlac\tlac\tNOUN\t_\tNumber=Sing\t2\tobl\t_\tSpaceAfter=No
6\t,\t,\tPUNCT\t_\t_\t7\tpunct\t_\t_
7\thélas\thélas\tINTJ\t_\t_\t2\tdiscourse\t_\tSpaceAfter=No
8\t!\t!\tPUNCT\t_\t_\t2\tpunct\t_\t_

# text = Vu
1\tVu\tvoir\tVERB\t_\tTense=Past|VerbForm=Part\t_\t_\t_\t_
"""


def test_a_word_that_does_not_stand_in_the_text_has_a_place_in_the_tree_only(tmp_path: Path) -> None:
    path = tmp_path / "one.conllu"
    path.write_text(CONLLU, encoding="utf-8")
    read = Sentences.from_conllu(path)
    assert read.forms == ("Il", "va", "lac", ",", "hélas", "!", "Vu") and read.unplaced == 2
    assert read.first(1).forms == read.forms[:-1] and read.first(1).labels == {"mood": ("statement",)}
    assert read.column("head") == (1, -1, 1, 6, 1, 1, None)
    assert read.column("depth") == (1, 0, 1, 2, 1, 1, None)
    assert read.column("head_distance") == (1, None, -3, 1, -5, -6, None)
    assert read.column("number") == ("sing", "sing", "sing", None, None, None, None)
    assert read.column("tense") == (None, "present", None, None, None, None, None)
    assert read.word_labels["pos"][0][2:4] == ("ADP", "DET")
    assert read.column("relation")[0] == "nsubj"
    assert read.labels == {"mood": ("statement", None)}
    with pytest.raises(OutputError, match="sentence 0 has a tab, a line break, or a word that is not in its text"):
        read.to_conllu(path)
    with pytest.raises(OutputError, match="cannot write"):
        mi.tasks.sentences(2).to_conllu(tmp_path / "none" / "x.conllu")


TSV = """# a file of ours

# text = "Dogs" bark, we hear.
# year = 1999
word\tpos\thead\tfamiliarity
Dogs\tNOUN\t2\t6.5
bark\tVERB\t4\t_
we\tPRON\t4\t7
hear\tVERB\t0\t

# year = 2001
#\tSYM\t_\t1
1\tNUM\t1\t2
"""
JSONL = [
    {
        "text": '"Dogs" bark, we hear.',
        "words": ["Dogs", "bark", "we", "hear"],
        "pos": ["NOUN", "VERB", "PRON", "VERB"],
        "head": [2, 4, 4, 0],
        "familiarity": [6.5, None, 7, None],
        "year": 1999,
    },
    {
        "text": "# 1",
        "words": [[0, 1], [2, 3]],
        "pos": ["SYM", "NUM"],
        "head": [None, 1],
        "familiarity": [1, 2],
        "year": 2001,
    },
]


def test_the_same_from_tsv_and_jsonl(tmp_path: Path) -> None:
    (tmp_path / "own.tsv").write_text(TSV, encoding="utf-8-sig")
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, JSONL)), encoding="utf-8")
    tsv, jsonl = Sentences.from_tsv(tmp_path / "own.tsv"), Sentences.from_jsonl(tmp_path / "own.jsonl")
    assert tsv == jsonl
    assert tsv.forms == ("Dogs", "bark", "we", "hear", "#", "1")
    assert tsv.words == (((1, 5), (7, 11), (13, 15), (16, 20)), ((0, 1), (2, 3)))
    assert tsv.column("familiarity") == (6.5, None, 7, None, 1, 2)
    assert tsv.column("depth") == (2, 1, 1, 0, None, None)
    assert tsv.column("head") == (1, 3, 3, -1, None, 0)
    assert tsv.labels == {"year": (1999, 2001)}


def line(form: str, head: str = "0", number: str = "1") -> str:
    return f"{number}\t{form}\t_\t_\t_\t_\t{head}\tdep\t_\t_\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no sentences"),
        ("1\tA\n", ":1 has 2 columns; CoNLL-U has 10"),
        ("# text = A\n\n" + line("A"), ":1: the sentence has no words"),
        ("# text = A\n" + line("A", number="1.1"), ":1: the sentence has no words"),
        ("# text = B\n" + line("A"), ":2: 'A' does not come after '' in the sentence's text"),
        ("# text = B A\n" + line("A"), ":2: 'A' does not come after '' in the sentence's text"),
        (line("A", "2"), ":1 has the head '2'; it must be 0 to 1"),
        (line("A", "x"), ":1 has the head 'x'; it must be 0 to 1"),
        (line("A", "1"), ":1: the heads of the words 1, 1 go in a circle"),
        (line("A") + line("B", "3", "2") + line("C", "2", "3"), ":2: the heads of the words 2, 3, 2 go in a circle"),
        (line("A", number="2"), ":1 has the number '2'; number a sentence's words 1, 2"),
        (line("A", number="one"), ":1 has the number 'one'"),
        (line(""), ":1 has no word; write it in the second column"),
    ],
)
def test_what_is_no_conllu(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.conllu"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ExamplesError, match=f"{path}{message}" if message[0] == ":" else message):
        Sentences.from_conllu(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", " has no sentences"),
        ("word\tpos\n", " has no sentences"),
        ("form\tpos\nA\tX\n", ":1: the first line must name the columns.*'word'"),
        ("word\nA\n", ":1: the first line must name the columns"),
        ("word\tpos\tpos\nA\tX\tX\n", ":1: the first line must name the columns"),
        ("word\tpos\nA\tX\nB\n", ":3 has 1 columns where the first line has 2 \\(word, pos\\); write _"),
        ("# text = A C\nword\tpos\nA\tX\nB\tX\n", ":4: the word 'B' does not come after 'A' in the text 'A C'"),
        ("# text = A C\nword\tpos\nA\tX\n", ":3: ' C' of the text 'A C' is no word"),
        ("word\tpos\nA\tX\n\n# text = B\n\n", ":4: the sentence has no words"),
        ("word\thead\nA\t2\nB\t1\n", ":2: the heads of the words 1, 2, 1 go in a circle"),
        ("word\thead\nA\t3\nB\t0\n", ":2 has the head '3'; it must be 0 to 2"),
        ("word\thead\tdepth\nA\t0\t0\n", ":2: depth is made from head; leave it out"),
        ("word\texample\nA\t0\n", "the name 'example' is taken"),
    ],
)
def test_what_is_no_tsv(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.tsv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ExamplesError, match=message if message[0] == "t" else f"{path}{message}"):
        Sentences.from_tsv(path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("{", ":1 is not JSON"),
        ("[]", ":1 is not an object"),
        ('{"text": "A"}', ":1: the sentence has no words"),
        ('{"text": "A", "words": []}', ":1: the sentence has no words"),
        ('{"text": "A", "words": [3]}', ':1: "words" must be all text, or all \\[start, stop\\]'),
        ('{"words": [[0, 1]]}', ':1: words are \\[start, stop\\] of "text", which must be text'),
        ('{"text": 3, "words": ["A"]}', ':1: "text" must be text'),
        ('{"text": "A B", "words": [[0, 4]]}', ":1: word 0 is at \\[0, 4\\], which is not in the text of 3 characters"),
        ('{"text": "A B", "words": [[2, 3], [0, 1]]}', ":1: word 1 is at \\[0, 1\\], .* after the word before it"),
        ('{"text": "A B", "words": [[1, 2]]}', ":1: word 0 is at \\[1, 2\\]"),
        ('{"text": "Cat", "words": ["at"]}', ":1: the word 'at' does not come after ''"),
        ('{"words": ["A"], "pos": ["X", "Y"]}', ":1: pos has 2 labels for 1 words"),
        ('{"words": ["A"], "pos": ["X"]}\n{"words": ["A"]}', ":2: 'pos' is in some lines and in others not"),
        ('{"words": ["A"], "pos": ["X"]}\n{"words": ["A"], "pos": "X"}', ":2: 'pos' is a list in some lines"),
        ('{"words": ["A"], "head": ["x"]}', ":1 has the head 'x'"),
        ('{"words": ["A", "B"], "head": [2, 1]}', ":1: the heads of the words 1, 2, 1 go in a circle"),
    ],
)
def test_what_is_no_jsonl(rows: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(rows, encoding="utf-8")
    with pytest.raises(ExamplesError, match=f"{path}{message}"):
        Sentences.from_jsonl(path)


def test_what_is_made_by_hand_is_checked() -> None:
    good = Sentences(("A b",), (((0, 1), None),), {"pos": (("X", None),)}, {"kind": (1,)})
    assert good.column("pos") == ("X",) and good.table().columns.tolist() == ["example", "word_number", "word", "pos"]
    with pytest.raises(ExamplesError, match="at least one text"):
        Sentences((), (), {}, {})
    with pytest.raises(ExamplesError, match="sentence 0: the sentence has no words"):
        Sentences(("A",), ((),), {}, {})
    with pytest.raises(ExamplesError, match="words has 0 entries for 1 texts"):
        Sentences(("A",), (), {}, {})
    with pytest.raises(ExamplesError, match="kind has 2 entries for 1 texts"):
        Sentences(("A",), (((0, 1),),), {}, {"kind": (1, 2)})
    with pytest.raises(ExamplesError, match="sentence 0: pos has 2 labels for 1 words"):
        Sentences(("A",), (((0, 1),),), {"pos": (("X", "Y"),)}, {})
    with pytest.raises(ExamplesError, match="the name 'word' is taken"):
        Sentences(("A",), (((0, 1),),), {"word": (("X",),)}, {})
