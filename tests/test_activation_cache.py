"""A trace as a TransformerLens ActivationCache, against what TransformerLens itself caches and computes."""

import contextlib
from collections.abc import Iterable

import pytest
import torch

import mechinterp as mi
from mechinterp import sites
from mechinterp.engine.backends.transformer_lens import BridgeBackend, ours
from mechinterp.errors import HookError, NeedsError, SiteError
from mechinterp.sites import Site
from mechinterp.testing import tiny

IDS = [[3, 5, 7, 9, 11, 2, 8], [4, 6, 9, 2, 5, 3, 1]]


@pytest.fixture(params=["llama", "qwen2", "qwen3", "qwen3_moe"])
def bridged(request: pytest.FixtureRequest) -> mi.Model:
    return tiny(request.param).with_backend("transformer_lens")


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_its_methods_give_what_they_give_on_their_own_cache(bridged: mi.Model) -> None:
    """Every entry, the decomposition, the heads' results and the logit attributions."""
    assert isinstance(bridged.backend, BridgeBackend)
    bridge = bridged.backend.bridge
    with torch.no_grad():
        _, theirs = bridge.run_with_cache(torch.tensor(IDS))
    native = bridged.with_backend("native")
    ours = native.trace(IDS, [s for s in native.sites if s.kind != "head_out"]).to_activation_cache()
    assert {"ln_final.hook_scale", "blocks.1.ln2.hook_scale", "blocks.0.attn.hook_z"} <= set(ours.keys())
    for name in ours.keys():  # noqa: SIM118 -- it is no dictionary
        close(ours[name], theirs[name])
    for cache in (ours, theirs):
        cache.compute_head_results()
    close(ours.stack_head_results(), theirs.stack_head_results())
    for layer in (1, None):
        mine, labels = ours.decompose_resid(layer, return_labels=True)
        other, same = theirs.decompose_resid(layer, return_labels=True)
        assert labels == same
        close(mine, other)
    mine, other = ours.decompose_resid(), theirs.decompose_resid()
    answers, wrong = torch.tensor([[5] * 7, [6] * 7]), torch.tensor([[7] * 7, [8] * 7])
    close(
        ours.logit_attrs(mine, tokens=answers, incorrect_tokens=wrong),
        theirs.logit_attrs(other, tokens=answers, incorrect_tokens=wrong),
    )
    assert ours.logit_attrs(mine, tokens=answers).abs().max() > 0.1
    close(ours.accumulated_resid(apply_ln=True), theirs.accumulated_resid(apply_ln=True))


def test_attributions_of_the_parts_add_up_to_the_logits_once_the_norm_has_its_weight() -> None:
    """A law that needs no other cache. TransformerLens 4.3 leaves the final norm's weight γ out of `logit_attrs` on a
    bridge whose weights are as they were trained: with γ = 1, or the parts multiplied by γ first, the law holds.
    """
    model = tiny("llama")
    reads = [sites.embed(), sites.attn_out(), sites.mlp_out(), sites.resid_post(2), sites.logits()]
    trace = model.trace(IDS, reads)
    cache = trace.to_activation_cache()
    tokens = torch.tensor([[5] * 7, [6] * 7])
    expected = trace["logits"].gather(2, tokens[..., None])[..., 0]
    weight = model.hf.model.norm.weight.detach()
    parts = cache.decompose_resid()
    off = (cache.logit_attrs(parts, tokens=tokens).sum(0) - expected).abs().max()
    assert off > 0.1, "TransformerLens has mended logit_attrs: say so in docs/backends.md"
    total = cache.logit_attrs(parts * weight, tokens=tokens).sum(0)
    torch.testing.assert_close(total, expected, atol=1e-4, rtol=1e-4)


def test_there_and_back(bridged: mi.Model) -> None:
    """What goes through a cache is what was read, to the bit, and a bridge's own cache is a trace of every site."""
    native = bridged.with_backend("native")
    some = [s for s in native.sites if s.kind not in ("scores", "router")]
    trace = native.trace(IDS, some)
    back = mi.Trace.from_activation_cache(trace.to_activation_cache(), torch.tensor(IDS))
    assert set(back) == set(some)
    for site in some:
        torch.testing.assert_close(back[site], trace[site], atol=0, rtol=0)
    assert isinstance(bridged.backend, BridgeBackend)
    with torch.no_grad():
        _, cache = bridged.backend.bridge.run_with_cache(torch.tensor(IDS))
    theirs = mi.Trace.from_activation_cache(cache)
    assert theirs.batch.ids.tolist() == IDS
    expected = native.trace(IDS, list(theirs))
    assert set(theirs) == {s for s in native.sites if s.kind not in ("head_out", "router")}
    for site in theirs:
        close(theirs[site], expected[site])


def sites_by_name(names: Iterable[str]) -> dict[str, Site]:
    """Hooks that a site stands for."""
    known: dict[str, Site] = {}
    for name in names:
        with contextlib.suppress(SiteError):
            known[name] = Site.parse(name)
    return known


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_every_name_of_a_hook_is_of_the_site_that_it_names(family: str) -> None:
    """Of all hooks of a bridge, by value. Those without a site are scales, and inputs of one branch of several."""
    native = tiny(family)
    backend = native.with_backend("transformer_lens").backend
    assert isinstance(backend, BridgeBackend)
    with torch.no_grad():
        _, cache = backend.bridge.run_with_cache(torch.tensor(IDS))
    known = sites_by_name(cache.keys())
    trace = native.trace(IDS, [*dict.fromkeys(known.values())])
    for name, site in known.items():
        close(ours(site, cache[name], len(IDS)), trace[site])
        assert name in trace and str(site) in trace and "blocks.9.hook_in" not in trace
    last = {name.removeprefix("blocks.1.") for name in cache.keys() if name not in known}  # noqa: SIM118
    left = {name for name in last if not name.startswith(("blocks.", "rotary")) and "norm" not in name}
    branches = {"ln1.hook_in", *(f"attn.{each}.hook_in" for each in "qkv"), "mlp.gate.hook_in", "mlp.in.hook_in"}
    scales = {"ln1.hook_scale", "ln2.hook_scale", "attn.hook_cos", "attn.hook_sin", "ln_final.hook_scale"}
    assert left == branches | scales | {"embed.hook_in", "ln_final.hook_in", "mlp.gate.hook_out"}
    one = native.trace(IDS, [sites.z(0, heads=(3,)), sites.k(0, per_query_head=True)])
    assert "z.0.h3" in one and "z.0" not in one and sites.z(0, heads=(3,)) in one
    with pytest.raises(SiteError, match=r"No site stands for the hook 'blocks.1.ln1.hook_scale'; did you mean"):
        native.trace(IDS, "blocks.1.ln1.hook_scale")
    with pytest.raises(NeedsError, match=r"stack takes a kind and stacks its layers; write 'z'. Got 'blocks.1.attn.ho"):
        trace.stack("blocks.1.attn.hook_z")
    alone = {"blocks.1.mlp.hook_in": cache["blocks.1.mlp.hook_in"], "embed.hook_in": torch.tensor(IDS)}
    cache.cache_dict = alone
    assert list(mi.Trace.from_activation_cache(cache)) == [sites.mlp_in(1)]
    with pytest.raises(NeedsError, match="are not those that this cache is of, which it holds; leave tokens= out"):
        mi.Trace.from_activation_cache(cache, torch.tensor(IDS) + 1)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_write_at_a_hooks_name_is_a_write_at_the_site(family: str) -> None:
    """For each second name of a place; the middle of a layer is said to be otherwise in docs/backends.md."""
    native = tiny(family)
    backend = native.with_backend("transformer_lens").backend
    assert isinstance(backend, BridgeBackend)
    ids = torch.tensor(IDS)
    plain = backend.bridge(ids)
    tried = 0
    for name, site in sites_by_name(backend.bridge.hook_dict).items():
        if site.layer in (None, 1) and site.kind not in ("resid_mid", "scores", "head_out"):
            theirs = backend.bridge.run_with_hooks(ids, fwd_hooks=[(name, lambda value, hook: 0.5 * value)])
            mine = native.trace(IDS, "logits", interventions=mi.Scale(site, 0.5))["logits"]
            close(mine, theirs)
            tried += site.kind not in ("resid_pre", "resid_post") and bool((mine - plain).abs().max() > 1e-3)
    assert tried > 20


def test_without_its_batch_axis(llama: mi.Model) -> None:
    cache = llama.trace(IDS[0], "resid_post").to_activation_cache().remove_batch_dim()
    assert mi.Trace.from_activation_cache(cache, torch.tensor(IDS[0]))["resid_post.1"].shape == (1, 7, 32)


def test_what_cannot_be_a_cache_is_refused(llama: mi.Model) -> None:
    with pytest.raises(NeedsError, match=r"z.1@end was read in part; read z.1 as it is, with all positions"):
        llama.trace(IDS, sites.z(1, positions="end")).to_activation_cache()
    with (
        llama.intervene(mi.Zero(sites.z(1))),
        pytest.raises(HookError, match=r"a block writes at z.1 of this model; leave"),
    ):
        llama.trace(IDS, "resid_post").to_activation_cache()
    alone = mi.Trace({}, llama.trace(IDS, "embed").batch)
    with pytest.raises(NeedsError, match="knows its model, and this trace does not; give it as model="):
        alone.to_activation_cache()
    cache = llama.trace(IDS, "embed").to_activation_cache()
    with pytest.raises(NeedsError, match="does not hold the token ids that it is of; give them as tokens="):
        mi.Trace.from_activation_cache(cache)
    with pytest.raises(NeedsError, match=r"was read per query head; read k.1 as it is"):
        llama.trace(IDS, sites.k(1, per_query_head=True)).to_activation_cache()
    with pytest.raises(
        NeedsError, match=r"hook_embed in this cache has shape \(2, 7, 32\), and its token ids \(2, 5\)"
    ):
        mi.Trace.from_activation_cache(cache, torch.tensor(IDS)[:, :5])
    with pytest.raises(NeedsError, match=r"the mask has shape \(1, 7\), and the token ids \(2, 7\)"):
        mi.Trace.from_activation_cache(cache, torch.tensor(IDS), torch.ones(7))
    with pytest.raises(NeedsError, match=r"takes a TransformerLens ActivationCache. Got dict"):
        mi.Trace.from_activation_cache({"a": 1})  # type: ignore[arg-type]
    cache.cache_dict = {"ln_final.hook_scale": torch.ones(1)}
    with pytest.raises(NeedsError, match="none of the 1 entries of this cache is a site"):
        mi.Trace.from_activation_cache(cache, torch.tensor(IDS))
