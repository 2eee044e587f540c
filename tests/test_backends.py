"""Other libraries run the model: what they read, write and differentiate is what the native engine does."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import mechinterp as mi
from mechinterp import sites
from mechinterp.core.trace import Read
from mechinterp.engine.backward import backward
from mechinterp.engine.forward import forward
from mechinterp.errors import ExamplesError, HookError, ModelError, SiteError
from mechinterp.model.slices import PATTERN_KINDS
from mechinterp.sites import Site
from mechinterp.studies.equivalence import TOLERANCES
from mechinterp.testing import tiny

IDS = [[3, 5, 7, 9, 11, 2, 8, 4], [4, 6, 9, 2, 5], [3, 5, 7, 9, 11, 2]]
LOGITS = Read(Site("logits", positions="end"))
TOLERANCE = 1e-5
"""Relative to the largest value: ten times what was seen, and a tenth of what the docs promise."""
BACKENDS = ["transformer_lens", "nnsight"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


def tiny_of(family: str, known: dict[str, mi.Model] = {}) -> mi.Model:  # noqa: B006 -- on purpose
    return known.setdefault(family, tiny(family))


def on(family: str, backend: str, known: dict[tuple[str, str], mi.Model] = {}) -> mi.Model:  # noqa: B006
    if (family, backend) not in known:
        known[family, backend] = tiny_of(family).with_backend(backend)
    return known[family, backend]


@pytest.fixture(params=["llama", "mistral", "qwen2", "qwen3", "qwen3_moe"])
def both(request: pytest.FixtureRequest, backend: str) -> tuple[mi.Model, mi.Model]:
    """A model, and the same one on a backend."""
    return tiny_of(request.param), on(request.param, backend)


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def turned(site: Site) -> Callable[[torch.Tensor], torch.Tensor]:
    """An edit that no norm undoes, and that takes the router other experts."""
    if site.kind in PATTERN_KINDS:
        return lambda value: value * 0.7
    return (lambda value: -value) if site.kind == "router" else lambda value: 0.7 * value + 0.2 * value.roll(1, -1)


def able(model: mi.Model, use: str) -> list[Site]:
    assert model.backend is not None
    return [site for site in model.sites if model.backend.lacks(site, use) is None]


def test_every_site_is_read_as_it_is(both: tuple[mi.Model, mi.Model]) -> None:
    """Examples of different lengths, padded on either side."""
    native, other = both
    reads = [Read(site) for site in able(other, "read")]
    assert {r.site for r in reads} == set(native.sites)
    for side in ("right", "left"):
        batch = native.tokenize(IDS).batch(range(3), padding_side=side)
        expected, found = (forward(model, batch, reads).values for model in both)
        for read in reads:
            a, b, real = found[read], expected[read], batch.mask
            assert a.shape == b.shape
            if read.site.kind in PATTERN_KINDS:
                real = (real[:, None, :, None] & real[:, None, None, :]).expand_as(b)
                assert torch.equal(a.isneginf() & real, b.isneginf() & real)
                real = real & ~b.isneginf()
            assert off(a[real], b[real]) < TOLERANCE, (read.site, side)


def test_every_site_is_written_as_it_is(both: tuple[mi.Model, mi.Model]) -> None:
    """All of a kind at once, and each of them moves the logits; the router's experts are chosen anew."""
    native, other = both
    batch = native.tokenize(IDS).batch(range(3), padding_side="left")
    base = forward(native, batch, [LOGITS]).values[LOGITS]
    writable = able(other, "write")
    lacking = {"router"} if other.backend is not None and other.backend.name == "transformer_lens" else set()
    assert {site.kind for site in set(native.sites) - set(writable)} <= lacking
    for kind in {site.kind for site in writable}:
        writes = [mi.Apply(site, turned(site)) for site in writable if site.kind == kind]
        expected, found = (forward(model, batch, [LOGITS], writes=writes).values[LOGITS] for model in both)
        assert off(expected, base) > 1e-3, kind
        assert off(found, expected) < TOLERANCE, kind


def test_gradients_at_every_site(both: tuple[mi.Model, mi.Model]) -> None:
    native, other = both
    examples = mi.Examples.of(IDS, answers=[(3, 4), (5, 6), (7, 8)])
    batch = native.tokenize(examples).batch(range(3))
    places = [site for site in able(other, "gradient") if site.kind not in ("head_out", "logits")]
    expected, found = (backward(model, batch, places, mi.logit_diff())[0] for model in both)
    for read, grad in expected.items():
        assert grad.abs().max() > 0
        torch.testing.assert_close(
            found[read],
            grad,
            atol=TOLERANCE * float(grad.abs().max()),
            rtol=0.0,
            msg=lambda m, r=read: f"{r.site}: {m}",
        )


INTERVENTIONS = [
    mi.Zero(sites.z(1, heads=(0, 3))),
    mi.Add(sites.resid_mid(1, positions=(1, -1)), 0.5),
    mi.Scale(sites.mlp_act(2, neurons=(0, 7), positions="end"), 3.0),
    mi.Knockout(sites.scores(0, positions="end"), (0, 1)),
    mi.Knockout(sites.scores(1, heads=2), "end"),
    mi.Noise(sites.embed(positions=0), 0.3),
    mi.Scale(sites.pattern(2, heads=1, positions=(-1,)), 0.1),
    mi.Zero(sites.head_out(0, heads=1, positions="end")),
    mi.Scale(sites.logits(), 2.0),
]


@pytest.mark.parametrize("side", ["right", "left"])
def test_interventions(backend: str, side: str) -> None:
    """At positions, heads and neurons, alone and all together; what is read sees what was written."""
    models = tiny_of("llama"), on("llama", backend)
    batch = models[0].tokenize(IDS).batch(range(3), padding_side=side)
    reads = [LOGITS, *(Read(Site(kind, 2, positions="end")) for kind in ("resid_post", "pattern", "mlp_act"))]
    for writes in [*([one] for one in INTERVENTIONS), INTERVENTIONS]:
        expected, found = (forward(model, batch, reads, writes=writes).values for model in models)
        for read in reads:
            assert found[read].isfinite().all()
            assert off(found[read], expected[read]) < TOLERANCE, (writes, read.site)


def test_a_block_of_interventions(backend: str) -> None:
    """In force inside the block alone, nested from the outermost in; what it asks for must be there."""
    native, other = tiny_of("llama"), on("llama", backend)
    plain = other.trace(IDS, "logits")["logits"]
    outer, inner = mi.Scale(sites.resid_post(0), 2.0), mi.Add(sites.resid_post(0), 1.0)
    found = []
    for model in (native, other):
        with model.intervene(outer), model.intervene(inner):
            found.append(model.trace(IDS, sites.logits(positions="end"))["logits"])
            assert model.in_force() == ([(outer.site, outer), (inner.site, inner)], False)
    assert off(found[1], found[0]) < TOLERANCE
    assert torch.equal(other.trace(IDS, "logits")["logits"], plain)
    with pytest.raises(ZeroDivisionError), other.intervene(outer):
        raise ZeroDivisionError
    assert other.standing == []
    with (
        pytest.raises(ExamplesError, match="position 20 is outside example 0, which has 8 tokens"),
        other.intervene(mi.Zero(sites.z(0, positions=20))),
    ):
        other.trace(IDS, "embed")


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_error_inside_a_pass_is_the_users_own_and_leaves_nothing_behind(backend: str, error: type) -> None:
    other = on("llama", backend)
    plain = other.trace(IDS, "logits")["logits"]

    def fail(value: torch.Tensor) -> torch.Tensor:
        raise error

    with pytest.raises(error):
        other.trace(IDS, "logits", interventions=mi.Apply(sites.z(1), fail))
    assert torch.equal(other.trace(IDS, "logits")["logits"], plain)
    with pytest.raises(ExamplesError, match="position 6 is outside example 1"):
        other.trace(IDS, sites.z(1, positions=6))


def test_weights_are_shared_and_the_model_is_left_alone(backend: str) -> None:
    model = tiny("qwen3")
    before = {name: type(module) for name, module in model.hf.named_modules()}
    logits = model.trace(IDS, "logits")["logits"]
    other = model.with_backend(backend)
    assert {name: type(module) for name, module in model.hf.named_modules()} == before
    assert other.fingerprint == model.fingerprint and model.kernel == "sdpa"
    other.trace(IDS, "pattern")
    assert torch.equal(model.trace(IDS, "logits")["logits"], logits)
    with torch.no_grad():
        model.hf.model.layers[0].mlp.up_proj.weight.mul_(2.0)
    assert off(other.trace(IDS, "logits")["logits"][0], model.trace(IDS, "logits")["logits"][0]) < TOLERANCE
    assert "run by " + backend in repr(other) and other.with_backend("native").backend is None


def test_hooks_of_ones_own_are_called_and_not_copied(backend: str) -> None:
    class Counts:
        calls = 0

        def __call__(self, module: torch.nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return 0.5 * out

    model, counts, method = tiny("qwen3"), Counts(), Counts()
    plain = model.trace(IDS, "logits")["logits"]
    model.hf.model.layers[1].mlp.register_forward_hook(counts)
    model.hf.model.layers[2].mlp.register_forward_hook(method.__call__)
    expected = model.trace(IDS, "logits")["logits"]
    assert counts.calls == method.calls == 1 and off(expected[0], plain[0]) > 1e-3
    assert off(model.with_backend(backend).trace(IDS, "logits")["logits"][0], expected[0]) < TOLERANCE
    assert counts.calls == method.calls == 2


ANALYZERS = [
    mi.LogitLens(),
    mi.HeadRoles(sequences=2, length=6),
    mi.Hotspots(pairs=3),
    mi.AttributionPatching("z", heads="each"),
    mi.EdgeAttribution("eap-ig-inputs", steps=2),
    mi.ActivationPatching("resid_pre", positions=("S2", "end")),
    mi.PathPatching("logits", "attn_out", positions=("S2", "end")),
    mi.Ablation("z", "resample", heads=((1, 2),), layers=(0, 2)),
    mi.CausalTracing("S1", ("states",), copies=1, window=2, layers=(1,), skip_wrong=False),
]


@pytest.mark.parametrize("analyzer", ANALYZERS, ids=lambda a: a.name)
def test_analyzers_run_unchanged(analyzer: mi.Analyzer, backend: str) -> None:
    """Of every kind: forward, backward and sweep; on examples of two lengths, in batches of two."""
    pairs = mi.tasks.ioi(n=3, seed=0)
    native, other = tiny_of("llama"), on("llama", backend)
    expected, found = (mi.run(model, pairs, analyzer, batch_size=2) for model in (native, other))
    assert found.meta["backend"].startswith(backend) and expected.meta["backend"] == "native"
    for name, value in expected.data.data_vars.items():
        if value.dtype.kind == "f" and bool(np.isfinite(value.values).any()):
            scale = float(np.nanmax(np.abs(value.values)))
            np.testing.assert_allclose(found.data[name].values, value.values, atol=1e-4 * scale, rtol=0, err_msg=name)


def test_a_sweep_takes_whole_passes_and_says_so(backend: str) -> None:
    plan = mi.plan(on("llama", backend), mi.tasks.ioi(n=1, seed=0), mi.ActivationPatching("resid_pre"))
    assert f"{backend} runs the model, a whole pass at a time" in str(plan)


def test_what_a_backend_lacks_is_refused_by_name(backend: str) -> None:
    other = on("qwen3_moe", backend)
    again = rf"by the backend '{backend}'.*use backend='native', which can \(model.with_backend\('native'\)\)"
    with pytest.raises(SiteError, match=rf"k.0 cannot be read per query head {again}"):
        other.trace(IDS, sites.k(0, per_query_head=True))
    with pytest.raises(SiteError, match=rf"v.1 cannot be written per query head {again}"):
        other.trace(IDS, "logits", interventions=mi.Zero(sites.v(1, per_query_head=True)))
    with pytest.raises(SiteError, match=rf"EdgeAttribution: k.0 cannot be differentiated per query head {again}"):
        mi.run(other, mi.tasks.ioi(n=1), mi.EdgeAttribution("eap", ungrouped=True))
    with pytest.raises(SiteError, match=r"mlp_act.0 does not exist: the 6 experts are fused"):
        other.trace(IDS, sites.mlp_act(0))
    with pytest.raises(
        ModelError, match=rf"the backend '{backend}' is not asked for; use model.with_backend\('native'"
    ):
        other.generate("A", max_new_tokens=2)
    if backend == "transformer_lens":
        for use in (lambda: other.trace(IDS, "logits", interventions=mi.Zero(sites.router(0))),):
            with pytest.raises(SiteError, match=r"router.0 cannot be written .* after the experts were chosen"):
                use()


def test_backends_that_there_are(llama: mi.Model) -> None:
    with pytest.raises(ModelError, match=r"must be one of 'native', 'transformer_lens', 'nnsight'. Got 'tl'"):
        llama.with_backend("tl")
    with pytest.raises(ModelError, match="Got 'tl'"):  # before anything is looked for
        mi.Model.load("no/such-model", backend="tl")
    with pytest.raises(ModelError, match=r"TransformerLens cannot wrap tiny-llama \(LlamaForSequenceClassification\)"):
        tiny("llama", num_labels=2).with_backend("transformer_lens")
    classifier = tiny("llama", num_labels=2)
    expected, found = (m.trace(IDS, "logits")["logits"] for m in (classifier, classifier.with_backend("nnsight")))
    assert off(found[0], expected[0]) < TOLERANCE


def test_a_bridge_that_exists_already() -> None:
    """It is run as it is, with the hooks that its owner added, and its weights are seen by head."""
    native = tiny_of("qwen3")
    other = on("qwen3", "transformer_lens")
    bridge = other.backend.bridge  # type: ignore[union-attr]
    loaded = mi.Model.load(bridge), mi.Model.load(bridge, backend="transformer_lens")
    for model in (mi.Model.wrap(bridge, native.tokenizer), *loaded):
        assert model.backend is not None and model.backend.bridge is bridge  # type: ignore[attr-defined]
        theirs = dict(native.hf.named_parameters())
        assert all(tensor is theirs[name] for name, tensor in model.hf.named_parameters())
        assert off(model.trace(IDS[:1], "logits")["logits"], native.trace(IDS[:1], "logits")["logits"]) < TOLERANCE
        alone = model.with_backend("native").trace(IDS[:1], "logits")["logits"]
        assert off(alone, native.trace(IDS[:1], "logits")["logits"]) < TOLERANCE
    seen: list[str] = []
    with bridge.hooks(fwd_hooks=[("blocks.0.attn.hook_z", lambda value, hook: seen.append(hook.name))]):
        model.trace(IDS, "logits")
    assert seen
    bridge.compatibility_mode = True
    try:
        with pytest.raises(ModelError, match="compatibility mode or has processed its weights"):
            mi.Model.wrap(bridge)
        with pytest.raises(ModelError, match="compatibility mode or has processed its weights"):  # after it was wrapped
            model.trace(IDS, "logits")
        with pytest.raises(ModelError, match="compatibility mode or has processed its weights"):  # or a cache of one
            native.trace(IDS, "embed").to_activation_cache(model)
    finally:
        bridge.compatibility_mode = False
    bridge._weights_processed = True
    try:
        with pytest.raises(ModelError, match="process_weights"):
            mi.Model.wrap(bridge)
    finally:
        bridge._weights_processed = False


def test_what_else_is_read_or_written_in_a_pass_changes_nothing(backend: str) -> None:
    """Each site alone, and beside each site of an earlier, the same, and a later layer."""
    native, other = tiny_of("qwen3"), on("qwen3", backend)
    layered = [site for site in native.sites if site.layer in (0, 1)]
    for late in ("head_out", "z", "attn_out", "resid_mid", "pattern"):
        site = Site(late, 1)
        alone = other.trace(IDS[:1], site)[site]
        cut = [mi.Scale(site, 0.3)]
        edited = native.trace(IDS[:1], "logits", interventions=cut)["logits"]
        for beside in layered:
            assert off(other.trace(IDS[:1], [beside, site])[site], alone) < TOLERANCE, (beside, site)
            assert off(other.trace(IDS[:1], [beside, "logits"], interventions=cut)["logits"], edited) < TOLERANCE
        for early in (Site("z", 0), Site("head_out", 0), Site("q", 1)):
            both = [mi.Scale(early, 0.5), *cut]
            one, two = (each.trace(IDS[:1], "logits", interventions=both)["logits"] for each in (other, native))
            assert off(one, two) < TOLERANCE, (early, site)


def test_a_block_makes_nothing_lenient(backend: str) -> None:
    """A position that an example lacks is an error in a block, and in a pass inside one, as on the native engine."""
    for model in (tiny_of("qwen3"), on("qwen3", backend)):
        with (
            pytest.raises(ExamplesError, match="position 6 is outside example 1"),
            model.intervene(mi.Zero(sites.z(0))),
        ):
            model.trace([IDS[0], IDS[0][:4]], "logits", interventions=mi.Zero(sites.z(1, positions=6)))
        with (
            pytest.raises(ExamplesError, match="position 6 is outside example 1"),
            model.intervene(mi.Zero(sites.z(0, positions=6))),
        ):
            model.trace([IDS[0], IDS[0][:4]], "logits")


def test_a_block_is_of_one_model(backend: str) -> None:
    for model, name in ((tiny_of("qwen3"), backend), (on("qwen3", backend), "native")):
        with (
            model.intervene(mi.Zero(sites.z(1))),
            pytest.raises(HookError, match=r"a block writes at z.1, and it is this"),
        ):
            model.with_backend(name)


@pytest.mark.parametrize("flag", ["use_attn_in", "use_split_qkv_input", "use_attn_result", "use_hook_mlp_in"])
def test_a_bridge_with_more_hooks(flag: str) -> None:
    """What nothing reads any more is refused; everything else is as it was."""
    native, other = tiny_of("qwen3"), on("qwen3", "transformer_lens")
    bridge: Any = other.backend.bridge  # type: ignore[union-attr]
    getattr(bridge, f"set_{flag}")(True)
    try:
        seen: list[str] = []
        if flag == "use_attn_result":  # a hook of its owner's there goes on acting
            with bridge.hooks(fwd_hooks=[("blocks.0.attn.hook_result", lambda value, hook: seen.append(hook.name))]):
                for wanted in ("logits", "head_out"):
                    other.trace(IDS, wanted)
            assert len(seen) == 2
        for kind in ("resid_pre", "attn_in", "q", "z", "head_out", "resid_mid", "mlp_in", "mlp_out"):
            write = mi.Scale(Site(kind, 1), 0.3)
            assert off(*(each.trace(IDS, Site(kind, 1))[Site(kind, 1)] for each in (other, native))) < TOLERANCE
            if kind == "attn_in" and flag in ("use_attn_in", "use_split_qkv_input"):
                with pytest.raises(SiteError, match=f"attn_in.1 cannot be written .* while {flag} is on"):
                    other.trace(IDS, "logits", interventions=write)
                continue
            one, two = (each.trace(IDS, "logits", interventions=write)["logits"] for each in (other, native))
            assert off(one, two) < TOLERANCE
    finally:
        getattr(bridge, f"set_{flag}")(False)


def test_an_nnsight_model_that_exists_already() -> None:
    """With the attention that it has: without eager attention it has no patterns, and says so."""
    from nnsight import NNsight

    native = tiny_of("llama")
    hf = copy.deepcopy(native.hf)
    envoy = NNsight(hf)
    model = mi.Model.load(envoy, backend="nnsight")
    assert model.hf is hf and model.backend is not None and model.backend.envoy is envoy  # type: ignore[attr-defined]
    expected = native.trace(IDS, ["z", "logits"])
    found = model.trace(IDS, ["z", "logits"])
    for site in expected:
        assert off(found[site][0], expected[site][0]) < TOLERANCE
    with pytest.raises(SiteError, match=r"pattern.1 cannot be read .* make the model with attn_implementation='eager'"):
        model.trace(IDS, sites.pattern(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_half_precision_is_transformers_own(family: str, dtype: torch.dtype, backend: str) -> None:
    """Norms, rotary and softmax are rounded where transformers rounds them: logits are its own to the bit, with eager
    attention. What is masked is -inf in every dtype, and sites are the native engine's within rounding.
    """
    native = tiny(family, dtype=dtype)
    other = native.with_backend(backend)
    eager = copy.deepcopy(native.hf)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        assert torch.equal(other.trace(IDS[:1], "logits")["logits"], eager(torch.tensor(IDS[:1])).logits)
    batch, reads = native.tokenize(IDS).batch(range(3)), [Read(site) for site in able(other, "read")]
    expected, found = (forward(model, batch, reads).values for model in (native, other))
    real = batch.mask
    for read in reads:
        a, b = found[read], expected[read]
        assert a.dtype == b.dtype
        where = real
        if read.site.kind in PATTERN_KINDS:
            where = (real[:, None, :, None] & real[:, None, None, :]).expand_as(b)
            assert torch.equal(a.isneginf() & where, b.isneginf() & where), read.site
            where = where & ~b.isneginf()
        assert off(a[where].float(), b[where].float()) < TOLERANCES[dtype], read.site


def test_texts_are_tokenized_by_us_whoever_runs_the_model(backend: str) -> None:
    """No BOS that the tokenizer would not put there; docs/backends.md has what a bridge makes of the text itself."""
    native = tiny_of("qwen3")
    tokenizer = copy.deepcopy(native.tokenizer)
    tokenizer.bos_token = "<unk>"
    model, text = mi.Model(native.hf, tokenizer, "begun"), "When Mary and John went to the store"
    expected, found = (each.trace(text, "logits") for each in (model, model.with_backend(backend)))
    assert found.batch.ids.tolist() == expected.batch.ids.tolist() == [tokenizer(text)["input_ids"]]
    assert tokenizer.bos_token_id not in found.batch.ids
    assert off(found["logits"], expected["logits"]) < TOLERANCE


def test_an_edit_of_the_middle_of_a_layer_reaches_both_ways_out_of_it() -> None:
    """TransformerLens's own hook there changes what the MLP reads and leaves the residual stream as it was."""
    model = tiny_of("llama")
    other = on("llama", "transformer_lens")
    after = Site("resid_post", 1)
    own: dict[str, torch.Tensor] = {}
    other.backend.bridge.run_with_hooks(  # type: ignore[union-attr]
        torch.tensor(IDS[:1]),
        fwd_hooks=[
            ("blocks.1.hook_resid_mid", lambda value, hook: torch.zeros_like(value)),
            ("blocks.1.hook_resid_post", lambda value, hook: own.update(after=value.detach())),
        ],
    )
    plain = model.trace(IDS[:1], ["resid_mid.1"])["resid_mid.1"]
    assert off(own["after"], plain) < TOLERANCE, "TransformerLens has mended hook_resid_mid: say so in docs/backends.md"
    for each in (model, other):
        ours = each.trace(IDS[:1], after, interventions=mi.Zero(sites.resid_mid(1)))[after]
        assert ours.abs().max() < TOLERANCE * plain.abs().max()
