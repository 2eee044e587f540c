"""Laws of the forward pass, on every family."""

import gc
import itertools
import weakref

import pytest
import torch
from torch import Tensor

import mechinterp as mi
from mechinterp import sites
from mechinterp.core.trace import Read, Reduce
from mechinterp.engine.forward import forward
from mechinterp.errors import ExamplesError, HookError, NeedsError, SiteError
from mechinterp.sites import Site, resolve
from mechinterp.testing import hook_count


def padded(model: mi.Model) -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    draw = torch.randint(2, model.dims.vocab, (3, 9), generator=generator).tolist()
    return [draw[0], draw[1][:5], draw[2][:7]]


@torch.no_grad()
def test_a_hooked_untouched_pass_is_bit_equal_to_hugging_face(model: mi.Model, ids: list[list[int]]) -> None:
    bare = model.hf(torch.tensor(ids)).logits
    trace = model.trace(ids, model.sites)
    assert torch.equal(trace["logits"], bare)
    assert torch.equal(model.hf(torch.tensor(ids)).logits, bare)


@torch.no_grad()
def test_so_is_a_padded_one(model: mi.Model) -> None:
    texts = padded(model)
    mask = torch.tensor([[1] * len(t) + [0] * (9 - len(t)) for t in texts])
    full = torch.tensor([t + [0] * (9 - len(t)) for t in texts])
    bare = model.hf(full, attention_mask=mask).logits
    assert torch.equal(model.trace(texts, ["logits", "pattern", "z"])["logits"], bare)


def test_components_equal_a_manual_recomputation(model: mi.Model, ids: list[list[int]]) -> None:
    trace = model.trace(ids, model.sites)
    for i in range(model.dims.n_layers):
        layer = model.hf.model.layers[i]
        with torch.no_grad():
            attn_in = layer.input_layernorm(trace[f"resid_pre.{i}"])
            torch.testing.assert_close(trace[f"attn_in.{i}"], attn_in)
            for name in "qkv":
                flat = getattr(layer.self_attn, f"{name}_proj")(attn_in)
                torch.testing.assert_close(trace[f"{name}.{i}"].flatten(2), flat)
            groups = model.dims.n_heads // model.dims.n_kv_heads
            keys = trace[f"k_rot.{i}"].repeat_interleave(groups, 2)
            scores = torch.einsum("bqhe,bkhe->bhqk", trace[f"q_rot.{i}"], keys) * layer.self_attn.scaling
            distance = torch.arange(9)[:, None] - torch.arange(9)
            hidden = (distance < 0) | (distance >= (model.dims.windows[i] or 9))
            scores = scores.masked_fill(hidden, float("-inf"))
            torch.testing.assert_close(trace[f"scores.{i}"], scores)
            torch.testing.assert_close(trace[f"pattern.{i}"], scores.softmax(-1))
            values = trace[f"v.{i}"].repeat_interleave(groups, 2)
            torch.testing.assert_close(trace[f"z.{i}"], torch.einsum("bhqk,bkhe->bqhe", scores.softmax(-1), values))
            torch.testing.assert_close(trace[f"head_out.{i}"].sum(2), trace[f"attn_out.{i}"])
            torch.testing.assert_close(trace[f"resid_mid.{i}"], trace[f"resid_pre.{i}"] + trace[f"attn_out.{i}"])
            torch.testing.assert_close(trace[f"mlp_in.{i}"], layer.post_attention_layernorm(trace[f"resid_mid.{i}"]))
            if i in model.dims.sparse:
                flat = trace[f"mlp_in.{i}"].flatten(0, 1)
                torch.testing.assert_close(trace[f"router.{i}"].flatten(0, 1), flat @ layer.mlp.gate.weight.T)
                torch.testing.assert_close(trace[f"mlp_out.{i}"], layer.mlp(trace[f"mlp_in.{i}"]))
                continue
            act = torch.nn.functional.silu(trace[f"mlp_gate.{i}"]) * trace[f"mlp_up.{i}"]
            torch.testing.assert_close(trace[f"mlp_act.{i}"], act)
            torch.testing.assert_close(trace[f"mlp_out.{i}"], layer.mlp.down_proj(act))
    parts = trace["embed"] + trace.stack("attn_out").sum(0) + trace.stack("mlp_out").sum(0)
    torch.testing.assert_close(parts, trace[f"resid_post.{model.dims.n_layers - 1}"], atol=1e-4, rtol=0)
    torch.testing.assert_close(model.norm(trace[f"resid_post.{model.dims.n_layers - 1}"]), trace["final_norm"])


@torch.no_grad()
def test_patterns_equal_eager_attention(model: mi.Model) -> None:
    texts = padded(model)
    mask = torch.tensor([[1] * len(t) + [0] * (9 - len(t)) for t in texts])
    full = torch.tensor([t + [0] * (9 - len(t)) for t in texts])
    trace = model.trace(texts, "pattern")
    model.hf.set_attn_implementation("eager")
    try:
        eager = model.hf(full, attention_mask=mask, output_attentions=True).attentions
        again = model.trace(texts, ["pattern", "logits"])
        assert torch.equal(again["logits"], model.hf(full, attention_mask=mask).logits)
    finally:
        model.hf.set_attn_implementation("sdpa")
    for i, expected in enumerate(eager):
        for row, text in enumerate(texts):
            n = len(text)
            torch.testing.assert_close(trace[f"pattern.{i}"][row, :, :n, :n], expected[row, :, :n, :n])
            torch.testing.assert_close(again[f"pattern.{i}"][row, :, :n, :n], expected[row, :, :n, :n])


def test_selections_follow_numpy(model: mi.Model, ids: list[list[int]]) -> None:
    whole = model.trace(ids, model.sites)
    for site in model.sites:
        full = whole[site]
        swap = site.kind in ("scores", "pattern")
        positions_first = full.transpose(1, 2) if swap else full
        tolerance = {"atol": 1e-6, "rtol": 1e-5} if swap or site.kind == "logits" else {"atol": 0, "rtol": 0}
        one = model.trace(ids, site.at("end"))[site.at("end")]
        torch.testing.assert_close(one, positions_first[:, -1], **tolerance)
        some = model.trace(ids, site.at((0, -2)))[site.at((0, -2))]
        torch.testing.assert_close(
            some, (positions_first[:, [0, -2]].transpose(1, 2) if swap else full[:, [0, -2]]), **tolerance
        )
        if site.spec.head_axis:
            single = Site(site.kind, site.layer, heads=1, positions=3)
            torch.testing.assert_close(model.trace(ids, single)[single], positions_first[:, 3, 1], **tolerance)
            two = Site(site.kind, site.layer, heads=(1, 0))
            expected = full[:, [1, 0]] if swap else full[:, :, [1, 0]]
            torch.testing.assert_close(model.trace(ids, two)[two], expected, **tolerance)


def test_keys_and_values_by_query_head(model: mi.Model, ids: list[list[int]]) -> None:
    trace = model.trace(ids, [sites.v(1), sites.v(1, per_query_head=True)])
    repeated = trace[sites.v(1, per_query_head=True)]
    assert repeated.shape[2] == model.dims.n_heads
    assert torch.equal(repeated[:, :, 3], trace[sites.v(1)][:, :, 1])
    only = model.trace(ids, sites.v(per_query_head=True))
    assert torch.equal(only.stack("v")[1], repeated)
    for asked in ("v.1", sites.v(1)):
        with pytest.raises(NeedsError, match=r"v.1 was read with per_query_head=True for this trace; ask"):
            only[asked]


def total(block: Tensor, queries: slice, batch: mi.TokenBatch) -> Tensor:
    return block.sum((2, 3))


def per_query(block: Tensor, queries: slice, batch: mi.TokenBatch) -> Tensor:
    return block.amax(3)


@pytest.mark.parametrize("size", [1, 500, 1 << 20])
def test_a_reduce_sees_blocks_and_gives_what_the_whole_pattern_gives(
    model: mi.Model, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mechinterp.model.attention.BLOCK_BYTES", size)
    texts = padded(model)
    whole = model.trace(texts, "pattern")
    reads = [
        Read(Site("pattern", 1), reduce=Reduce(total, "example head")),
        Read(Site("pattern", 1), reduce=Reduce(per_query, "example head query")),
    ]
    reduced = model.trace(texts, reads)
    real = whole["pattern.1"] * whole.batch.mask[:, None, :, None]  # padding attends to nothing
    torch.testing.assert_close(reduced[reads[0]], real.sum((2, 3)))
    torch.testing.assert_close(reduced[reads[1]], real.amax(3))
    for row, text in enumerate(texts):
        torch.testing.assert_close(reduced[reads[0]][row], model.trace(text, reads[0])[reads[0]][0], atol=1e-5, rtol=0)


def test_the_pass_stops_after_the_last_read(model: mi.Model, ids: list[list[int]]) -> None:
    calls: list[int] = []
    handles = [
        layer.register_forward_hook(lambda *_, i=i: calls.append(i)) for i, layer in enumerate(model.hf.model.layers)
    ]
    head = model.hf.lm_head.register_forward_hook(lambda *_: calls.append(99))
    try:
        model.trace(ids, ["z.1"])
        assert calls == [0]  # layer 1 is entered but not finished
        calls.clear()
        model.trace(ids, ["resid_post.1"])
        assert calls == [0, 1]
        calls.clear()
        model.trace(ids, [sites.logits()])
        assert calls == [0, 1, 2, 99]
    finally:
        [h.remove() for h in [*handles, head]]


@torch.no_grad()
def test_the_table_of_kinds_is_in_the_order_of_the_pass(either: mi.Model) -> None:
    """The later of any two sites of a layer is where the pass may stop: both must have fired by then."""
    for layer in (1, 2):  # in some families one of them is dense and one has experts
        for pair in itertools.combinations([s for s in either.sites if s.layer == layer], 2):
            assert len(either.trace([5, 6, 7], pair)) == 2


def test_logits_at_some_positions_are_those_of_the_full_pass(model: mi.Model) -> None:
    texts = padded(model)
    full = model.trace(texts, "logits")["logits"]
    end = model.trace(texts, sites.logits(positions="end"))["logits"]
    for i, text in enumerate(texts):
        torch.testing.assert_close(end[i], full[i, len(text) - 1], atol=1e-5, rtol=1e-5)


def test_padding_side_and_batch_change_nothing(model: mi.Model) -> None:
    texts = padded(model)
    tokens = model.tokenize(texts)
    from mechinterp.engine.forward import forward

    reads = [
        Read(s)
        for s in resolve(
            [sites.resid_post(positions=(0, -1)), sites.pattern(positions="end"), sites.z(positions="end")], 3
        )
    ]
    right = forward(model, tokens.batch(range(3)), reads).values
    left = forward(model, tokens.batch(range(3), padding_side="left"), reads).values
    for read in reads:
        if read.site.kind == "pattern":  # its keys are columns: compare the real ones
            for i, text in enumerate(texts):
                torch.testing.assert_close(
                    left[read][i, :, 9 - len(text) :], right[read][i, :, : len(text)], atol=1e-5, rtol=0
                )
        else:
            torch.testing.assert_close(left[read], right[read], atol=1e-5, rtol=0)
        for i in range(3):
            alone = forward(model, tokens.batch([i]), [read]).values[read]
            kept = right[read][i, ..., : len(texts[i])] if read.site.kind == "pattern" else right[read][i]
            torch.testing.assert_close(alone[0], kept, atol=1e-5, rtol=0)


def test_hooks_are_gone_after_success_exception_and_interrupt(model: mi.Model, ids: list[list[int]]) -> None:
    before, kernel = hook_count(model.hf), model.kernel
    model.trace(ids, model.sites)
    assert (hook_count(model.hf), model.kernel) == (before, kernel)
    for error in (ValueError("boom"), KeyboardInterrupt()):

        def fail(value: Tensor, error: BaseException = error) -> Tensor:
            raise error

        for site in ("mlp_out.1", "pattern.1"):
            with pytest.raises(type(error)):
                model.trace(ids, ["logits", "q_rot.0"], interventions=[mi.Apply(Site.parse(site), fail)])
            assert (hook_count(model.hf), model.kernel) == (before, kernel)
    with pytest.raises(SiteError):
        model.trace(ids, "z.77")
    assert (hook_count(model.hf), model.kernel) == (before, kernel)


def test_hooks_of_others_stay(model: mi.Model, ids: list[list[int]]) -> None:
    calls: list[int] = []
    before = hook_count(model.hf)  # transformers itself keeps some, once attentions were asked for
    handle = model.hf.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    try:
        model.trace(ids, "resid_post.2")
        model.trace(ids, "resid_post.2")
        assert calls == [1, 1]
        assert hook_count(model.hf) == before + 1
    finally:
        handle.remove()


def test_a_trace_belongs_to_its_reader(model: mi.Model, ids: list[list[int]]) -> None:
    trace = model.trace(ids, ["resid_post.1", "logits"])
    kept = trace["logits"].clone()
    trace["resid_post.1"].zero_()
    trace["logits"].zero_()
    assert torch.equal(model.trace(ids, "logits")["logits"], kept)


def test_weights_are_never_touched(model: mi.Model, ids: list[list[int]]) -> None:
    before = [p._version for p in model.hf.parameters()]
    model.trace(ids, model.sites, interventions=[mi.Zero(sites.head_out(0)), mi.Scale(sites.resid_mid(), 0.5)])
    assert [p._version for p in model.hf.parameters()] == before


def test_a_replaced_module_is_noticed(llama: mi.Model) -> None:
    """A read that does not fire is an error, not an empty result."""
    layer = llama.hf.model.layers[1]
    bypass, kept = torch.nn.Identity(), layer.mlp.forward
    layer.mlp.forward = lambda x: bypass(x)  # never calls gate_proj
    try:
        with pytest.raises(HookError, match=r"mlp_gate.1 .*did not fire"):
            llama.trace([1, 2, 3], ["mlp_gate.1", "logits"])
    finally:
        layer.mlp.forward = kept


def test_bad_input_is_refused_by_name(model: mi.Model) -> None:
    with pytest.raises(SiteError, match=r"layers 0 to 2"):
        model.trace([1, 2], "resid_post.9")
    with pytest.raises(SiteError, match=r"heads 0 to 3"):
        model.trace([1, 2], sites.z(1, heads=4))
    with pytest.raises(SiteError, match=r"key/value heads 0 to 1"):
        model.trace([1, 2], sites.v(1, heads=2))
    with pytest.raises(SiteError, match="dense"):
        model.trace([1, 2], "router.1")
    if model.dims.sparse:
        with pytest.raises(SiteError, match=r"mlp_act.0 does not exist: the 6 experts are fused"):
            model.trace([1, 2], "mlp_act.0")
    with pytest.raises(SiteError, match="did you mean"):
        model.trace([1, 2], "resid_pots")
    with pytest.raises(ExamplesError, match="position 7 is outside example 0"):
        model.trace([1, 2], sites.resid_post(0, positions=7))
    with pytest.raises(ExamplesError, match="no position 'S3'"):
        model.trace([1, 2], sites.resid_post(0, positions="S3"))
    with pytest.raises(ExamplesError, match="empty"):
        model.trace("", "embed")
    with pytest.raises(ExamplesError, match="more than the model's context of 256"):
        model.trace([3] * 257, "embed")
    with pytest.raises(NeedsError, match=r"resid_post.1 was not read"):
        model.trace([1, 2], "resid_post.0")["resid_post.1"]
    if not model.arch.qk_norm:
        with pytest.raises(SiteError, match="no q/k-norm"):
            model.trace([1, 2], "q_normed.0")


def test_what_was_read_is_freed_with_its_last_user(model: mi.Model) -> None:
    """Not when the garbage is collected: a sweep in pieces would hold the reads of all its passes."""
    batch = model.tokenize(mi.Examples.of([[5, 6, 7]])).batch([0])
    reads = [Read(site) for site in model.sites if site.kind in ("resid_post", "k_rot", "v", "pattern", "z")]
    gc.disable()
    try:
        values = forward(model, batch, reads).values
        alive = [weakref.ref(value) for value in values.values()]
        assert all(ref() is not None for ref in alive)
        del values
        assert not any(ref() is not None for ref in alive)
    finally:
        gc.enable()
