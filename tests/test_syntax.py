"""Heads along dependencies: the file, words in tokens, hits by hand, and the null."""

from pathlib import Path

import numpy as np
import pytest
import torch

import mechinterp as mi
from mechinterp import sites
from mechinterp.analyzers.syntax import place
from mechinterp.core.conllu import read_conllu
from mechinterp.errors import ExamplesError
from mechinterp.testing import tiny

FILE = Path(__file__).parent / "sentences.conllu"

CONTRACTED = """# text = Il don't va au lac.
1\tIl\t_\t_\t_\t_\t4\tnsubj:expl\t_\t_
2-3\tdon't\t_\t_\t_\t_\t_\t_\t_\t_
2\tdo\t_\t_\t_\t_\t4\taux\t_\t_
3\tn't\t_\t_\t_\t_\t4\tadvmod\t_\t_
4\tva\t_\t_\t_\t_\t0\troot\t_\t_
4.1\tghost\t_\t_\t_\t_\t_\t_\t_\t_
5-6\tau\t_\t_\t_\t_\t_\t_\t_\t_
5\tà\t_\t_\t_\t_\t7\tcase\t_\t_
6\tle\t_\t_\t_\t_\t7\tdet\t_\t_
7\tlac\t_\t_\t_\t_\t4\tobl\t_\tSpaceAfter=No
8\t.\t_\t_\t_\t_\t4\tpunct\t_\t_
"""


def test_words_of_a_file_are_where_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "one.conllu"
    path.write_text(CONTRACTED + "\n\n" + CONTRACTED.split("\n", 1)[1], encoding="utf-8")
    one, other = read_conllu(path)
    assert one == other  # the text is made of its words, where the file has none
    found = [one.text[slice(*span)] if span else None for span in one.spans]
    assert found == ["Il", "do", "n't", "va", None, None, "lac", "."]
    assert one.heads == (3, 3, 3, -1, 6, 6, 3, 3)
    assert one.relations[0] == "nsubj"


def test_words_that_share_a_token_are_unmapped(tmp_path: Path, llama: mi.Model) -> None:
    path = tmp_path / "one.conllu"
    path.write_text(CONTRACTED, encoding="utf-8")
    (sentence,) = read_conllu(path)
    placed = place(sentence, llama)  # Il| don|'|t| va| au| lac|.
    assert placed.words == ((0, 1), None, None, (4, 5), None, None, (6, 7), (7, 8))
    assert placed.dependencies == 7
    assert placed.links == ((6, 3, "obl", "head before"), (7, 3, "punct", "head before"))  # Il has the first token


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("block", [1, 1 << 20])
def test_scores_by_hand(either: mi.Model, side: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mechinterp.model.attention.BLOCK_BYTES", block)
    result = mi.run(either, [[5]], mi.SyntacticHeads(str(FILE)), padding_side=side, batch_size=5)
    hits: dict[tuple[str, str], list[np.ndarray]] = {}
    offsets: dict[tuple[str, str], list[int]] = {}
    for sentence in read_conllu(FILE):
        placed = place(sentence, either)
        pattern = either.trace([list(placed.ids)], "pattern").stack("pattern")[:, 0].numpy()
        for dependent, (head, relation) in enumerate(zip(sentence.heads, sentence.relations, strict=True)):
            later, earlier = max(dependent, head), min(dependent, head)
            spans = placed.words
            if head < 0 or spans[earlier][0] == 0:
                continue
            query = spans[later][1] - 1
            words = [i for i in range(later) if spans[i][0] > 0]
            each = np.stack([pattern[:, :, query, slice(*spans[i])].sum(-1) for i in words])
            key = (relation, "head after" if head > dependent else "head before")
            hits.setdefault(key, []).append(np.array(words)[each.argmax(0)] == earlier)
            offsets.setdefault(key, []).append(later - earlier)
    for (relation, direction), found in hits.items():
        at = result.data.sel(relation=relation, direction=direction)
        assert int(at["links"]) == len(found)
        if len(found) < 20:
            assert at["score"].isnull().all()
            continue
        np.testing.assert_allclose(at["score"], np.mean(found, 0), atol=1e-6)
        shares = {o: np.mean(np.array(offsets[relation, direction]) == o) for o in offsets[relation, direction]}
        np.testing.assert_allclose(at["null"], max(shares.values()), atol=1e-6)
    assert result.meta["dependencies"] - result.meta["dependencies_left_out"] == sum(map(len, hits.values()))


def test_a_previous_token_head_is_not_syntactic() -> None:
    """It hits whatever stands at a fixed offset, which is what the null does."""
    model = tiny("llama", seed=3)
    shift = torch.eye(40).roll(1, 0)
    shift[0] = torch.eye(40)[0]
    with model.intervene(
        mi.Apply(sites.pattern(1, heads=2), lambda x: shift[: x.shape[-1], : x.shape[-1]].expand_as(x))
    ):
        data = mi.run(model, [[5]], mi.SyntacticHeads(str(FILE)), batch_size=1).data
    scored = data["score"].sel(layer=1, head=2).notnull()
    excess = (data["score"] - data["null"]).sel(layer=1, head=2).where(scored)
    assert float(excess.max()) == pytest.approx(0, abs=1e-6)
    assert float(data["score"].sel(layer=1, head=2).max()) > 0.4
    assert not data["specialised"].sel(layer=1, head=2).any()


def test_syntactic_heads_of_the_real_model(smollm2: mi.Model) -> None:
    data = mi.run(smollm2, [[5]], mi.SyntacticHeads(str(FILE))).data
    excess = (data["score"] - data["null"]).max(("layer", "head"))
    assert data["specialised"].any()
    assert float(excess.max()) > 0.2
    assert not (data["specialised"] & (data["score"] - data["null"] < 0.1)).any()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no sentences"),
        ("1\tA\t_\n", ":1 has 3 columns"),
        ("1\tA\t_\t_\t_\t_\t7\tdep\t_\t_\n", ":1 has the head '7'; it must be 0 to 1"),
        ("# text = B\n1\tA\t_\t_\t_\t_\t0\troot\t_\t_\n", ":2: 'A' does not come after '' in the sentence's text"),
        ("1\tA\t_\t_\t_\t_\t0\troot\t_\t_\n", "has no dependency between two words"),
    ],
)
def test_what_is_no_parsed_text(text: str, message: str, tmp_path: Path, llama: mi.Model) -> None:
    path = tmp_path / "bad.conllu"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ExamplesError, match=message):
        mi.run(llama, [[5]], mi.SyntacticHeads(str(path)))


def test_a_file_that_is_not_there(tmp_path: Path, llama: mi.Model) -> None:
    with pytest.raises(ExamplesError, match="cannot read"):
        mi.run(llama, [[5]], mi.SyntacticHeads(str(tmp_path / "none.conllu")))
