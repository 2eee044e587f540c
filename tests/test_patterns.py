"""AttentionPatterns and AttentionProfile: against transformers' own patterns, and loops by hand."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mechinterp as mi
from mechinterp import sites
from mechinterp.analyzers import patterns
from mechinterp.analyzers.patterns import BINS
from mechinterp.errors import ExamplesError, NeedsError
from mechinterp.report import files
from mechinterp.report.figures import matplotlib_figure
from mechinterp.testing import check_analyzer

TEXTS = [[5, 6, 7, 8, 9, 10, 11, 5, 6], [12, 13, 14, 15], [16, 17, 18, 19, 20, 21]]


def eager(model: mi.Model, ids: list[int]) -> list[np.ndarray[Any, Any]]:
    """transformers' own patterns of one text, ``head query key`` for each layer."""
    model.hf.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            found = model.hf(torch.tensor([ids]), output_attentions=True).attentions
    finally:
        model.hf.set_attn_implementation("sdpa")
    return [one[0].numpy() for one in found]


def test_both_keep_the_contract() -> None:
    check_analyzer(mi.AttentionPatterns(layers=(0, 2), heads=(1, 3), pair=("end", -2)))
    check_analyzer(mi.AttentionProfile())


def test_patterns_are_those_of_transformers(model: mi.Model) -> None:
    data = mi.run(model, TEXTS, mi.AttentionPatterns(layers=(0, 2), heads=(1, 3)), batch_size=2).data
    assert data["pattern"].dims == ("layer", "example", "head", "query", "key")
    for i, ids in enumerate(TEXTS):
        n = len(ids)
        whole = eager(model, ids)
        for layer in (0, 2):
            for head in (1, 3):
                ours = data["pattern"].sel(layer=layer, example=i, head=head).values
                np.testing.assert_allclose(ours[:n, :n], whole[layer][head], atol=1e-6)
                assert np.isnan(ours[n:]).all() and np.isnan(ours[:, n:]).all()
                expected = np.mean([max([0, *whole[layer][head][q, 1:q]]) for q in range(1, n)])
                assert float(data["focus"].sel(layer=layer, example=i, head=head)) == pytest.approx(expected, abs=1e-6)
        assert [t for t in data["key_token"].values[i] if t] == model.to_str_tokens(ids)


def test_products_add_up_to_the_score_of_each_querys_own_group(model: mi.Model) -> None:
    """Differences of scores are those of the logarithms of transformers' own probabilities."""
    ids = TEXTS[0]
    whole = eager(model, ids)
    root = math.sqrt(model.hf.config.head_dim)
    runs = [mi.run(model, [ids], mi.AttentionPatterns(pair=("end", key))).data for key in (-3, -2, 8)]
    for data in runs:
        np.testing.assert_allclose(data["product"], data["query_value"] * data["key_value"])
        np.testing.assert_allclose(data["product"].sum("dim") / root, data["score"], atol=1e-4)
    for layer, pattern in enumerate(whole):
        logs = np.log(pattern[:, 8, [6, 7, 8]])
        sums = np.stack([one["product"].sum("dim").sel(layer=layer, example=0).values for one in runs], -1) / root
        np.testing.assert_allclose(np.diff(sums, axis=-1), np.diff(logs, axis=-1), atol=1e-4)


def test_outside_a_sliding_window_there_are_products_and_no_score() -> None:
    model = mi.testing.tiny("mistral")  # a window of four
    data = mi.run(model, [TEXTS[0]], mi.AttentionPatterns(pair=("end", 0))).data
    assert np.isfinite(data["product"]).all() and np.isnan(data["score"]).all()


def test_profiles_by_hand(model: mi.Model) -> None:
    data = mi.run(model, TEXTS, mi.AttentionProfile(layers=(1,)), padding_side="left").data.sel(layer=1)
    for i, ids in enumerate(TEXTS):
        for head, pattern in enumerate(eager(model, ids)[1]):
            queries = range(1, len(ids))
            bins = dict.fromkeys(BINS, 0.0)
            entropy = first = distance = 0.0
            for q in queries:
                for k in range(q + 1):
                    p = float(pattern[q, k])
                    entropy -= p * math.log2(p) if p else 0
                    distance += p * (q - k)
                    first += p * (k == 0)
                    back = q - k
                    name = str(back) if back <= 2 else "3-4" if back <= 4 else "5-8"
                    bins["first" if k == 0 else name] += p
            here = data.sel(example=i, head=head)
            for name, value in (("entropy", entropy), ("first", first), ("distance", distance)):
                assert float(here[name]) == pytest.approx(value / len(queries), abs=1e-5), name
            np.testing.assert_allclose(here["profile"], np.array(list(bins.values())) / len(queries), atol=1e-5)


def test_a_profile_sums_to_one_at_any_length_and_block(llama: mi.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.randint(2, llama.dims.vocab, (1, 200), generator=torch.Generator().manual_seed(0)).tolist()
    whole = mi.run(llama, ids, mi.AttentionProfile()).data
    monkeypatch.setattr("mechinterp.model.attention.BLOCK_BYTES", 4 * 4 * 200 * 7)  # seven queries a block
    blocks = mi.run(llama, ids, mi.AttentionProfile()).data
    np.testing.assert_allclose(whole["profile"].sum("bin"), 1, atol=1e-5)
    for name in ("entropy", "first", "distance", "profile"):
        np.testing.assert_allclose(whole[name], blocks[name], atol=1e-4)


def test_a_text_of_one_token_has_no_profile(llama: mi.Model) -> None:
    data = mi.run(llama, [[5], [6, 7]], mi.AttentionProfile()).data
    assert np.isnan(data["entropy"].sel(example=0)).all() and np.isfinite(data["entropy"].sel(example=1)).all()


def test_a_head_that_looks_at_the_token_before_it(smollm2: mi.Model) -> None:
    text = "When Mary and John went to the store, John gave a drink to"
    kept, profile = mi.run(smollm2, text, [mi.AttentionPatterns(layers=(11,), heads=(1,)), mi.AttentionProfile()])
    pattern = kept.data["pattern"].values[0, 0, 0]
    assert np.diagonal(pattern, -1).mean() > 0.7
    assert float(profile.data["profile"].sel(layer=11, head=1, bin="1").sum()) > 0.6
    assert float(profile.data["first"].sel(layer=24).mean()) > 0.6  # a sink


def test_figures_label_both_axes_with_tokens(llama: mi.Model) -> None:
    result = mi.run(llama, "Mary had a book", mi.AttentionPatterns())
    tokens = ["Mary", "␣had", "␣a", "␣book"]
    assert len(result.views) == 3
    layout: Any = result.figure().layout
    assert list(layout.xaxis.ticktext) == list(layout.yaxis.ticktext) == tokens
    assert layout.yaxis.autorange == "reversed"
    axes = matplotlib_figure(result, result.views[0]).axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == [t.get_text() for t in axes.get_xticklabels()] == tokens


def test_a_table_of_whole_patterns_is_written_only_where_it_is_small(
    llama: mi.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = mi.run(llama, "Mary had a book", mi.AttentionPatterns())
    monkeypatch.setattr(files, "MOST_ROWS", 3 * 4 * 16)
    assert "p-pattern.csv" in [p.name for p in files.write_tables({"p": result}, tmp_path)]
    monkeypatch.setattr(files, "MOST_ROWS", 3 * 4 * 16 - 1)
    written = [p.name for p in files.write_tables({"p": result}, tmp_path)]
    assert "p-pattern.csv" not in written and "p-focus.csv" in written


def test_what_cannot_be_looked_at_is_said(llama: mi.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in (mi.AttentionPatterns(layers=(3,)), mi.AttentionProfile(layers=()), mi.AttentionProfile((-1,))):
        with pytest.raises(NeedsError, match="layers of an attention analyzer must be some of 0 to 2"):
            mi.run(llama, TEXTS, wrong)
    with pytest.raises(NeedsError, match="heads of an attention analyzer must be some of 0 to 3"):
        mi.run(llama, TEXTS, mi.AttentionPatterns(heads=(4,)))
    with pytest.raises(NeedsError, match="stands at or before its query"):
        mi.run(llama, TEXTS, mi.AttentionPatterns(pair=(1, "end")))
    with pytest.raises(ExamplesError, match="at most 16 texts"):
        mi.run(llama, [[5, 6]] * 17, mi.AttentionPatterns())
    monkeypatch.setattr(patterns, "MOST_NUMBERS", 3 * 4 * 81 - 1)
    with pytest.raises(ExamplesError, match="3 layers with 4 heads over 9 tokens"):
        mi.run(llama, [TEXTS[0]], mi.AttentionPatterns())
    mi.run(llama, [TEXTS[0]], mi.AttentionPatterns(layers=(1,)))
    assert llama.trace(TEXTS[0], sites.pattern(0))[sites.pattern(0)].shape == (1, 4, 9, 9)  # nothing was left behind
