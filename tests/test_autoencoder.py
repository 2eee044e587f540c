"""Sparse autoencoders: formulas by hand, SAELens' files old and new, edits of features, and what is refused."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import mechinterp as mi
from mechinterp import sites
from mechinterp.errors import HookError, ModelError, OutputError
from mechinterp.model.autoencoder import SparseAutoencoder
from mechinterp.sites import Site
from mechinterp.testing import tiny

D, N, K = 32, 12, 3
KINDS = ("standard", "gated", "jumprelu", "topk")
IDS = [[5, 6, 7, 5, 6, 9], [8, 3, 8, 3], [4, 9, 2, 7, 1]]
END = sites.logits(positions="end")


def weights(d: int = D, n: int = N, d_out: int | None = None, seed: int = 0) -> dict[str, Tensor]:
    """Random weights of every architecture."""
    g = torch.Generator().manual_seed(seed)
    out = d_out or d
    shapes = {"W_enc": (d, n), "b_enc": (n,), "W_dec": (n, out), "b_dec": (out,), "r_mag": (n,), "b_mag": (n,)}
    made = {name: 0.4 * torch.randn(shape, generator=g) for name, shape in shapes.items()}
    return made | {"threshold": torch.rand(n, generator=g)}


def sae(kind: str = "standard", site: Site | None = None, d: int = D, **more: Any) -> SparseAutoencoder:
    own = {"gated": ("r_mag", "b_mag"), "jumprelu": ("threshold",)}.get(kind, ())
    w = weights(d)
    kept = {name: w[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec", *own)}
    more = ({"k": K} if kind == "topk" else {}) | more
    return SparseAutoencoder(site or sites.resid_post(1), **kept, architecture=kind, **more)


def exact(site: Site, d: int = D) -> SparseAutoencoder:
    """x = relu(x) - relu(-x)."""
    eye, nothing = torch.eye(d), torch.zeros(d)
    return SparseAutoencoder(site, torch.cat([eye, -eye], 1), nothing.repeat(2), torch.cat([eye, -eye]), nothing)


def by_hand(one: SparseAutoencoder, x: Tensor) -> list[float]:
    """The features of one vector, number by number."""
    rows = [(float(v) - float(b) * one.apply_b_dec_to_input) for v, b in zip(x, one.b_dec, strict=True)]
    z = [sum(row * float(one.W_enc[i, j]) for i, row in enumerate(rows)) for j in range(len(one))]
    pre = [v + float(b) for v, b in zip(z, one.b_enc, strict=True)]
    if one.architecture == "topk":
        best = sorted(range(len(pre)), key=lambda j: -pre[j])[:K]
        return [max(v, 0.0) if j in best else 0.0 for j, v in enumerate(pre)]
    if one.architecture == "gated":
        size = [v * math.exp(float(r)) + float(b) for v, r, b in zip(z, one.r_mag, one.b_mag, strict=True)]
        return [max(s, 0.0) if v > 0 else 0.0 for v, s in zip(pre, size, strict=True)]
    if one.architecture == "jumprelu":
        return [v if v > max(float(t), 0.0) else 0.0 for v, t in zip(pre, one.threshold, strict=True)]
    return [max(v, 0.0) for v in pre]


# Formulas


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("apply", [True, False])
def test_encode_and_decode_by_hand(kind: str, apply: bool) -> None:
    one = sae(kind, apply_b_dec_to_input=apply)
    x = torch.randn(2, 3, D, generator=torch.Generator().manual_seed(1))
    f = one.encode(x)
    torch.testing.assert_close(f, torch.tensor([[by_hand(one, v) for v in row] for row in x]), atol=1e-5, rtol=1e-5)
    assert (f > 0).any() and (f == 0).any()
    made = one.b_dec + sum(f[..., j, None] * one.direction(j) for j in range(N))
    torch.testing.assert_close(one.decode(f), made, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(one.error(x), x - made, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(one.encode(x, (7, 2)), f[..., [7, 2]])
    torch.testing.assert_close(one.encode(x, 5), f[..., 5])


def test_what_normalize_takes_comes_back() -> None:
    x = 5 + 3 * torch.randn(4, D, generator=torch.Generator().manual_seed(1))
    plain = sae()
    spread, mean = x.std(-1, keepdim=True), x.mean(-1, keepdim=True)
    normed = sae(normalize="layer_norm")
    f = plain.encode((x - mean) / (spread + 1e-5))
    torch.testing.assert_close(normed.encode(x), f)
    torch.testing.assert_close(normed.reconstruct(x), plain.decode(f) * spread + mean)
    scaled, size = sae(normalize="constant_norm_rescale"), x.norm(dim=-1, keepdim=True) / D**0.5
    f = plain.encode(x / size)
    torch.testing.assert_close(scaled.encode(x), f)
    torch.testing.assert_close(scaled.decode(f, x), plain.decode(f) * size)
    with pytest.raises(ModelError, match=r"undoes layer_norm, which takes the activations: decode\(f, x\)"):
        normed.decode(f)
    # An edit is the difference of two reconstructions.
    edited = f.clone()
    edited[:, 4] = 2.0
    change = scaled.decode(edited, x) - scaled.decode(f, x)
    torch.testing.assert_close(scaled.clamp(4, 2.0)(x), x + change, atol=1e-5, rtol=1e-5)


# Files


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalize", ["none", "layer_norm"])
def test_it_comes_back_from_files(kind: str, normalize: str, tmp_path: Path) -> None:
    site = sites.resid_pre(2) if kind == "gated" else sites.z(1) if kind == "topk" else sites.z(0, heads=3)
    one = sae(kind, site, normalize=normalize, metadata={"model_name": "tiny", "context_size": 128})
    again = SparseAutoencoder.load(one.save(tmp_path / "sae"))
    assert repr(again) == repr(one) and again.site == site and again.normalize == normalize
    assert again.metadata["model_name"] == "tiny" and again.k == one.k
    x = torch.randn(5, D)
    torch.testing.assert_close(again.reconstruct(x), one.reconstruct(x), atol=0, rtol=0)
    config = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    assert config["architecture"] == kind and (config["d_in"], config["d_sae"]) == (D, N)
    assert config["metadata"]["hook_name"] == site.tl_name
    assert config["reshape_activations"] == ("hook_z" if kind == "topk" else "none")
    assert set(safetensors.torch.load_file(tmp_path / "sae" / "sae_weights.safetensors")) == {
        "gated": {"W_enc", "b_gate", "r_mag", "b_mag", "W_dec", "b_dec"},
        "jumprelu": {"W_enc", "b_enc", "threshold", "W_dec", "b_dec"},
    }.get(kind, {"W_enc", "b_enc", "W_dec", "b_dec"})
    one.save(tmp_path / "sae")  # over itself
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"mine.txt"):
        one.save(tmp_path / "other")


@pytest.mark.parametrize("kind", ["standard", "jumprelu"])
def test_transcoders_come_back_from_files(kind: str, tmp_path: Path) -> None:
    one = sae(kind, sites.mlp_in(1), site_out=sites.mlp_out(1), apply_b_dec_to_input=False)
    again = SparseAutoencoder.load(one.save(tmp_path / "t"))
    assert (again.site, again.out, again.transcoder) == (sites.mlp_in(1), sites.mlp_out(1), True)
    config = json.loads((tmp_path / "t" / "cfg.json").read_text())
    assert config["architecture"] == {"standard": "transcoder", "jumprelu": "jumprelu_transcoder"}[kind]
    assert config["d_out"] == D and config["metadata"]["hook_name_out"] == "blocks.1.hook_mlp_out"
    x, y = torch.randn(2, 5, D)
    torch.testing.assert_close(again.error(x, y), y - (one.encode(x) @ one.W_dec + one.b_dec))
    for wrong in ((x, None), (sae(), x, y)):
        with pytest.raises(ModelError, match="error takes x, and of a transcoder also y"):
            (wrong[0] if isinstance(wrong[0], SparseAutoencoder) else again).error(*wrong[-2:])


def folder(path: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    path.mkdir(exist_ok=True)
    (path / "cfg.json").write_text(json.dumps(config))
    safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, path / "sae_weights.safetensors")
    return path


OLD = {
    "hook_point": "blocks.1.hook_resid_pre",
    "hook_point_layer": 1,
    "hook_point_head_index": None,
    "d_in": D,
    "d_sae": N,
    "activation_fn_str": "relu",
    "activation_fn_kwargs": {},
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "finetuning_scaling_factor": False,
    "model_name": "gelu-2l",
    "l1_coefficient": 0.1,
    "dtype": "torch.float32",
}
NEW = {
    "architecture": "standard",
    "d_in": D,
    "d_sae": N,
    "apply_b_dec_to_input": False,
    "normalize_activations": "none",
    "reshape_activations": "none",
    "metadata": {"sae_lens_version": "6.5.1", "hook_name": "blocks.2.hook_resid_post", "model_name": "qwen"},
}
PLAIN = {name: weights()[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}


def test_old_files(tmp_path: Path) -> None:
    x = torch.randn(6, D)
    ones = {"scaling_factor": torch.ones(N)}
    read = SparseAutoencoder.load(folder(tmp_path / "a", OLD, PLAIN | ones))
    assert read.site == sites.resid_pre(1) and read.metadata == {"model_name": "gelu-2l"}
    torch.testing.assert_close(read.reconstruct(x), sae().reconstruct(x))
    # Factors of features, which are folded into the decoder.
    factor = torch.rand(N) + 0.5
    tuned = OLD | {"finetuning_scaling_factor": True}
    read = SparseAutoencoder.load(folder(tmp_path / "b", tuned, PLAIN | {"scaling_factor": factor}))
    made = (sae().encode(x) * factor) @ PLAIN["W_dec"] + PLAIN["b_dec"]
    torch.testing.assert_close(read.reconstruct(x), made)
    # topk is an activation of what is else a standard one.
    topk = OLD | {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "hook_point": "blocks.0.attn.hook_z"}
    read = SparseAutoencoder.load(folder(tmp_path / "c", topk, PLAIN))
    assert (read.architecture, read.k, read.site) == ("topk", K, sites.z(0))
    torch.testing.assert_close(read.encode(x.view(6, 4, 8)), sae("topk").encode(x))
    # A transcoder.
    over = OLD | {"hook_point": "blocks.1.ln2.hook_out", "hook_name_out": "blocks.1.hook_mlp_out"}
    read = SparseAutoencoder.load(folder(tmp_path / "d", over | {"apply_b_dec_to_input": False}, PLAIN))
    assert (read.site, read.site_out) == (sites.mlp_in(1), sites.mlp_out(1))


def test_new_files(tmp_path: Path) -> None:
    x = torch.randn(6, D)
    read = SparseAutoencoder.load(folder(tmp_path / "a", NEW, PLAIN))
    assert read.site == sites.resid_post(2) and read.metadata["model_name"] == "qwen"
    torch.testing.assert_close(read.reconstruct(x), sae(apply_b_dec_to_input=False).reconstruct(x))
    read = SparseAutoencoder.load(tmp_path / "a", site="resid_pre.1", dtype=torch.bfloat16)
    assert read.site == sites.resid_pre(1) and read.W_enc.dtype == torch.bfloat16
    # One head, and a threshold as a logarithm.
    head = NEW | {"architecture": "jumprelu", "d_in": 8}
    head["metadata"] = {"hook_name": "blocks.1.attn.hook_z", "hook_head_index": 2}
    w = weights(8)
    small = {name: w[name] for name in PLAIN} | {"log_threshold": w["threshold"].log()}
    read = SparseAutoencoder.load(folder(tmp_path / "b", head, small))
    assert read.site == sites.z(1, heads=2)
    torch.testing.assert_close(read.threshold, w["threshold"])
    # topk chooses by what a feature writes.
    norm = PLAIN["W_dec"].norm(dim=-1)
    rescaled = NEW | {"architecture": "topk", "k": K, "rescale_acts_by_decoder_norm": True}
    read = SparseAutoencoder.load(folder(tmp_path / "c", rescaled, PLAIN))
    pre = (x @ PLAIN["W_enc"] + PLAIN["b_enc"]) * norm
    top = pre.topk(K)
    f = torch.zeros(6, N).scatter(1, top.indices, top.values.relu())
    torch.testing.assert_close(read.encode(x), f)
    torch.testing.assert_close(read.reconstruct(x), (f / norm) @ PLAIN["W_dec"] + PLAIN["b_dec"])


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"architecture": "skip_transcoder"}, "architecture 'skip_transcoder', which is not implemented"),
        ({"architecture": "matryoshka_batchtopk"}, "it must be one of standard, gated, jumprelu, topk"),
        ({"activation_fn": "tanh-relu"}, "activation_fn 'tanh-relu', which is not implemented"),
        ({"activation_fn": "topk", "activation_fn_kwargs": {"k": 2, "signed": True}}, "activation_fn_kwargs.signed"),
        ({"activation_fn": "topk"}, "says k None"),
        ({"architecture": "topk", "k": 99}, "a k from 1 to its 12 features. Got 99"),
        ({"normalize_activations": "expected_average_only_in"}, "activations times a factor that is in no file"),
        ({"normalize_activations": "batch_norm"}, "normalize_activations 'batch_norm'"),
        ({"reshape_activations": "conv"}, "reshape_activations 'conv'"),
        ({"rescale_acts_by_decoder_norm": True}, "rescale_acts_by_decoder_norm True"),
        ({"architecture": "jumprelu"}, "threshold is missing from a jumprelu SAE"),
        ({"architecture": "transcoder"}, "does not name the hook that it writes; give site_out="),
        ({"d_sae": 13}, r"says d_sae 13 and holds W_enc of shape \(32, 12\)"),
        ({"metadata": {}}, "names no hook_name; give site="),
        ({"metadata": {"hook_name": "blocks.3.ln2.hook_normalized"}}, "it is the norm before its weight"),
        ({"metadata": {"hook_name": "blocks.3.hook_mlp_outt"}}, "hook 'blocks.3.hook_mlp_outt'. No site stands"),
        ({"metadata": {"hook_name": "blocks.1.attn.hook_pattern"}}, "a site that has one for each token"),
        (
            {"apply_b_dec_to_input": True, "metadata": NEW["metadata"] | {"hook_name_out": "logits"}},
            "a transcoder must",
        ),
    ],
)
def test_options_that_are_not_implemented(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=said):
        SparseAutoencoder.load(folder(tmp_path / "sae", NEW | config, PLAIN))


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"b_dec": None}, "b_dec is missing from the weights of the standard SAE"),
        ({"W_skip": torch.zeros(D, D)}, "holds W_skip, which is no weight of a standard SAE"),
        ({"threshold": torch.zeros(N)}, "threshold is no weight of a standard SAE"),
        ({"W_enc": torch.full((D, N), torch.nan)}, "W_enc of the SAE of resid_post.2 has values that are not finite"),
        ({"b_enc": torch.zeros(N + 1)}, r"b_enc of the SAE of resid_post.2 has shape \(13,\); it must have \(12,\)"),
        ({"W_dec": torch.zeros(D, N)}, r"W_dec of the SAE of resid_post.2 has shape \(32, 12\)"),
        ({"W_enc": torch.zeros(D)}, "must be matrices"),
        ({"scaling_factor": torch.zeros(N)}, "holds a scaling_factor and says finetuning_scaling_factor false"),
    ],
)
def test_weights_that_do_not_fit(tensors: dict[str, Any], said: str, tmp_path: Path) -> None:
    whole = {name: tensor for name, tensor in (PLAIN | tensors).items() if tensor is not None}
    with pytest.raises(ModelError, match=said):
        SparseAutoencoder.load(folder(tmp_path / "sae", NEW, whole))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no .*cfg.json; give a folder that SAELens wrote"):
        SparseAutoencoder.load(tmp_path)
    path = folder(tmp_path / "sae", NEW, PLAIN)
    (path / "cfg.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        SparseAutoencoder.load(path)
    (path / "cfg.json").write_text("[]")
    with pytest.raises(ModelError, match="not an object of options"):
        SparseAutoencoder.load(path)
    folder(path, NEW, PLAIN)
    (path / "sae_weights.safetensors").write_bytes(b"PK\x03\x04 a pickle of torch.save")
    with pytest.raises(ModelError, match=r"sae_weights.safetensors cannot be read"):
        SparseAutoencoder.load(path)
    (path / "sae_weights.safetensors").rename(path / "sae.pt")
    with pytest.raises(ModelError, match=r"it has sae.pt, and pickled weights are refused"):
        SparseAutoencoder.load(path)


def test_it_must_fit_the_model(llama: mi.Model) -> None:
    for site in (sites.resid_post(1), sites.z(1), sites.final_norm()):
        sae(site=site).check(llama)
    sae(site=sites.z(1, heads=2), d=8).check(llama)
    sae(site=sites.mlp_act(0), d=48).check(llama)
    with pytest.raises(ModelError, match=r"vectors of width 32, and mlp_act.0 of tiny-llama has 48"):
        sae(site=sites.mlp_act(0)).check(llama)
    with pytest.raises(mi.errors.SiteError, match="layers 0 to 2"):
        sae(site=sites.resid_post(3)).check(llama)


# Edits


@pytest.fixture(scope="module")
def qwen() -> mi.Model:
    return tiny("qwen3")


def ending(model: mi.Model, *writes: mi.Intervention) -> Tensor:
    return model.trace(IDS, END, interventions=writes)[END]


@pytest.mark.parametrize(
    ("kind", "site"),
    list(zip(KINDS, (sites.resid_post(1), sites.z(1), sites.z(2, heads=1), sites.mlp_act(0)), strict=True)),
    ids=KINDS,
)
def test_an_edit_keeps_the_error(qwen: mi.Model, kind: str, site: Site) -> None:
    """x + decode(f') - decode(f), whatever the SAE leaves out."""
    d = {"z": 48 if site.heads is None else 12, "mlp_act": 48}.get(site.kind, 32)
    one = sae(kind, site, d)
    one.check(qwen)
    clean = ending(qwen)
    assert (ending(qwen, one.scale((0, 3, 5), 1.0)) - clean).abs().max() < 1e-6

    def edited(features: list[int], factor: float, value: float, x: Tensor) -> Tensor:
        f = one.encode(x)
        new = f.clone()
        new[..., features] = factor * new[..., features] + value
        return x + (one.decode(new) - one.decode(f)).reshape(x.shape)

    for edit, hand in (
        (one.scale((2, 4), -1.5), ([2, 4], -1.5, 0.0)),
        (one.clamp(7, 3.0), ([7], 0.0, 3.0)),
        (one.ablate(range(12)), (list(range(12)), 0.0, 0.0)),
    ):
        got = ending(qwen, edit)
        torch.testing.assert_close(got, ending(qwen, mi.Apply(site, partial(edited, *hand))), atol=1e-4, rtol=1e-4)
        assert (got - clean).abs().max() > 1e-3


def test_a_feature_that_is_never_active_can_be_ablated(qwen: mi.Model) -> None:
    one = sae("jumprelu", sites.resid_post(0))
    high = one.threshold.clone()
    high[5] = 1e6
    dead = SparseAutoencoder(one.site, one.W_enc, one.b_enc, one.W_dec, one.b_dec, "jumprelu", high)
    assert torch.equal(ending(qwen, dead.ablate(5)), ending(qwen))
    assert not torch.equal(ending(qwen, dead.ablate(range(12))), ending(qwen))


@pytest.mark.parametrize("site", [sites.resid_post(0), sites.z(1), sites.mlp_out(2)], ids=str)
def test_an_exact_reconstruction_changes_nothing(qwen: mi.Model, site: Site) -> None:
    one = exact(site, 48 if site.kind == "z" else 32)
    assert (ending(qwen, one.splice()) - ending(qwen)).abs().max() < 1e-6
    everything = one.ablate(range(len(one)))  # leaves its bias, which is 0
    torch.testing.assert_close(ending(qwen, everything), ending(qwen, mi.Zero(site)), atol=1e-4, rtol=1e-4)


def test_edits_in_sweeps_and_while_generating(qwen: mi.Model) -> None:
    pairs = mi.tasks.ioi(5)
    one, two = sae("topk", sites.resid_post(0)), sae("gated", sites.z(1), 48)
    rows = {
        "ablate": one.ablate((1, 4)),
        "scale": two.scale(3, 4.0, positions="S2"),
        "both": [one.clamp(2, 5.0), two.clamp((0, 1), 2.0, positions="end")],
        "steer": one.steer(3, 2.0),
        "splice": one.splice(),
    }
    packed, full = (mi.sweep(qwen, pairs, rows, engine=engine).data for engine in ("packed", "full"))
    torch.testing.assert_close(*(torch.tensor(d["value"].values) for d in (packed, full)), atol=1e-4, rtol=1e-4)
    assert (abs(full["value"] - full["base"]).max("example") > 1e-3).all()
    plan = str(mi.plan(qwen, pairs, _Rows(tuple(rows["both"]))))
    assert "whole pass" not in plan  # features are edited position by position, so rows are packed
    text = "Then, Mary and John had a book"
    site = sites.resid_post(0)
    ran = qwen.generate(text, max_new_tokens=4, reads=site, interventions=one.clamp(2, 9.0))
    whole = qwen.trace([*ran.prompt, *ran.tokens[:-1]], site, interventions=one.clamp(2, 9.0))
    torch.testing.assert_close(ran.trace[site], whole[site], atol=1e-4, rtol=1e-4)


class _Rows(mi.Analyzer):
    def __init__(self, row: tuple[mi.Intervention, ...]) -> None:
        object.__setattr__(self, "row", row)

    def needs(self, model: mi.Model) -> mi.Needs:
        return mi.Needs(sweeps={"rows": mi.Sweep(mi.logit_diff(), rows=(self.row,), base="clean")})  # pyright: ignore


def test_edits_that_make_no_sense(qwen: mi.Model) -> None:
    over = sae("jumprelu", sites.mlp_in(1), site_out=sites.mlp_out(1), apply_b_dec_to_input=False)
    for edit in (lambda: over.ablate(1), lambda: over.clamp(1, 2.0), over.splice):
        with pytest.raises(HookError, match=r"reads mlp_in.1, which a write at mlp_out.1 does not see; use mi.Feature"):
            edit()
    new = ending(qwen, over.steer(3, 2.0))
    unit = over.direction(3) / over.direction(3).norm()
    torch.testing.assert_close(new, ending(qwen, mi.Add(sites.mlp_out(1), 2.0 * unit)))
    one = sae()
    for features in (12, (0, -1), ()):
        with pytest.raises(ModelError, match=r"the features are 0 to 11. Got"):
            one.ablate(features)
    with pytest.raises(HookError, match=r"is of resid_post.1, so its features cannot be edited at resid_post.2"):
        mi.EditFeatures(sites.resid_post(2), one, (1,))
    with pytest.raises(HookError, match=r"is of vectors of width 32, and got a slice of shape \(3, 6, 48\)"):
        ending(qwen, sae(site=sites.mlp_act(0)).ablate(1))
    flat = SparseAutoencoder(one.site, one.W_enc, one.b_enc, one.W_dec * (torch.arange(N) != 4)[:, None], one.b_dec)
    with pytest.raises(ModelError, match="direction of feature 4 is 0"):
        flat.steer(4, 1.0)
