import pytest
import torch

import mechinterp as mi
from mechinterp import sites
from mechinterp.errors import ExamplesError, SiteError
from mechinterp.testing import hook_count


def test_generation_is_hugging_face_s_own(model: mi.Model, ids: list[list[int]]) -> None:
    out = model.generate(ids[0], max_new_tokens=6)
    bare = model.hf.generate(torch.tensor(ids[:1]), max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert out.tokens == tuple(bare[0, 9:].tolist())
    assert out.prompt == tuple(ids[0])


def test_reads_of_all_steps_equal_one_full_pass(model: mi.Model, ids: list[list[int]]) -> None:
    reads = ["resid_post.2", "q.1", "pattern.1", "scores.0", "k_rot.1", sites.pattern(1, heads=2), "z.0"]
    out = model.generate(ids[0], max_new_tokens=5, reads=reads)
    full = model.trace([*out.prompt, *out.tokens[:-1]], reads)
    for site in full:
        torch.testing.assert_close(out.trace[site], full[site], atol=1e-4, rtol=1e-4)
    newest = model.generate(ids[0], max_new_tokens=5, reads=sites.resid_post(2, positions="end"))
    torch.testing.assert_close(newest.trace.stack("resid_post")[0], full["resid_post.2"][:, 8:], atol=1e-4, rtol=1e-4)


def test_writes_act_at_every_step(model: mi.Model, ids: list[list[int]]) -> None:
    """Against the cache-free way: the whole text again for every token."""
    writes = [mi.Scale(sites.mlp_out(0), -1.0), mi.Zero(sites.z(1, heads=(0, 2))), mi.Scale(sites.pattern(2), 0.5)]
    text = list(ids[0])
    for _ in range(5):
        text.append(int(model.trace(text, sites.logits(), interventions=writes)["logits"][0, -1].argmax()))
    assert list(model.generate(ids[0], max_new_tokens=5, interventions=writes).tokens) == text[9:]
    with model.intervene(*writes):
        assert list(model.generate(ids[0], max_new_tokens=5).tokens) == text[9:]
    assert list(model.generate(ids[0], max_new_tokens=5).tokens) != text[9:]


def test_a_position_counts_from_the_start_of_the_prompt(model: mi.Model, ids: list[list[int]]) -> None:
    """Position 10 is a generated token: the write waits for it."""
    write = mi.Zero(sites.resid_pre(0, positions=10))
    out = model.generate(ids[0], max_new_tokens=5, reads="resid_pre.0", interventions=[write])
    zero = (out.trace["resid_pre.0"][0] == 0).all(-1)
    assert zero.nonzero().flatten().tolist() == [10]


def test_what_cannot_be_done_while_generating(model: mi.Model, ids: list[list[int]]) -> None:
    before = hook_count(model.hf)
    with pytest.raises(SiteError, match=r"k_rot.0 cannot be written while generating"):
        model.generate(ids[0], max_new_tokens=3, interventions=[mi.Zero("k_rot.0")])
    with pytest.raises(SiteError, match=r"v.0 cannot be written per query head while generating"):
        model.generate(ids[0], max_new_tokens=3, interventions=[mi.Zero(sites.v(0, per_query_head=True))])
    with pytest.raises(SiteError, match="a cache of fixed length"):
        model.generate(ids[0], max_new_tokens=3, reads="q_rot.0", cache_implementation="static")
    with pytest.raises(SiteError, match="cannot be read at every step"):
        model.generate(ids[0], reads=sites.z(0, positions=3))
    with pytest.raises(ExamplesError, match="one prompt"):
        model.generate(ids)
    assert hook_count(model.hf) == before


def test_logits_are_written_and_read_at_every_position(model: mi.Model, ids: list[list[int]]) -> None:
    """generate() itself asks for the last position alone."""
    push = torch.zeros(model.dims.vocab)
    push[5] = 1000.0
    plain = model.generate(ids[0], max_new_tokens=4, reads=["logits", "final_norm"])
    assert plain.trace["logits"].shape[1] == plain.trace["final_norm"].shape[1] == 12
    early = model.generate(ids[0], max_new_tokens=4, interventions=mi.Add(sites.logits(positions=0), push))
    assert early.tokens == plain.tokens
    late = model.generate(ids[0], max_new_tokens=4, interventions=mi.Add(sites.logits(positions="end"), push))
    assert late.tokens == (5, 5, 5, 5)


def test_a_pattern_is_written_at_the_same_keys_as_in_a_full_pass(model: mi.Model, ids: list[list[int]]) -> None:
    """Also where the cache of a sliding window has forgotten the first keys."""

    def cut(pattern: torch.Tensor) -> torch.Tensor:
        new = pattern.clone()
        new[..., 7] = 0.0
        return new

    write = mi.Apply(sites.pattern(1), cut)
    made = model.generate(ids[0], max_new_tokens=5, reads=["pattern.1", "resid_post.2"], interventions=write)
    whole = model.trace([*ids[0], *made.tokens[:-1]], ["pattern.1", "resid_post.2"], interventions=write)
    for site in ("pattern.1", "resid_post.2"):
        torch.testing.assert_close(made.trace[site], whole[site], atol=1e-4, rtol=1e-4)


def test_named_positions_are_known(model: mi.Model) -> None:
    examples = mi.tasks.ioi(1)
    write = mi.Zero(sites.resid_post(0, positions="S2"))
    made = model.generate(examples, max_new_tokens=3, reads="resid_post.0", interventions=write)
    zero = (made.trace["resid_post.0"][0] == 0).all(-1).nonzero().flatten().tolist()
    assert zero == list(model.tokenize(examples).positions["S2"])


@pytest.mark.parametrize("n", [0, 400])
def test_more_tokens_than_there_is_room_for(llama: mi.Model, n: int) -> None:
    with pytest.raises(ExamplesError, match=r"give from 1 to 253, which fills the context of 256"):
        llama.generate([5, 6, 7], max_new_tokens=n)
