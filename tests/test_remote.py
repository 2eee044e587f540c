"""Passes that NDIF makes: sent to a stand-in for it, which has no mechinterp, and compared with the native engine."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mechinterp as mi
from mechinterp import sites
from mechinterp.core.interventions import Intervention
from mechinterp.core.trace import Read
from mechinterp.engine.forward import forward
from mechinterp.errors import HookError, ModelError, SiteError
from mechinterp.model.slices import PATTERN_KINDS
from mechinterp.sites import Site
from mechinterp.testing import tiny
from tests.test_backends import IDS, INTERVENTIONS, LOGITS, TOLERANCE, off, turned

KEY = "a-key"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[mi.Model, Path, str]]:
    """The model with most traits, its folder, and the address of a server that has it."""
    model = tiny("qwen3_moe")
    folder = tmp_path_factory.mktemp("served")
    model.hf.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    script = Path(__file__).parent / "ndif_server.py"
    server = subprocess.Popen([sys.executable, str(script), str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        yield model, folder, f"http://127.0.0.1:{server.stdout.readline().strip()}"
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


@pytest.fixture
def ndif(served: tuple[mi.Model, Path, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """nnsight as one who has a key sets it up, with another NDIF."""
    import nnsight
    from nnsight.modeling.huggingface import _ID_CACHE

    monkeypatch.setattr(nnsight.CONFIG.API, "HOST", served[2])
    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", KEY)
    monkeypatch.setattr(nnsight.CONFIG.APP, "REMOTE_LOGGING", False)
    monkeypatch.setitem(_ID_CACHE, str(served[1]), "org/tiny")  # nnsight asks the hub for the name's spelling
    return served[2]


def envoy_of(folder: Path) -> Any:
    """nnsight's model without weights."""
    import nnsight
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return nnsight.TransformersModel(
        str(folder), task="text-generation", tokenizer=tokenizer, attn_implementation="eager"
    )


@pytest.fixture
def both(served: tuple[mi.Model, Path, str], ndif: str) -> tuple[mi.Model, mi.Model]:
    """A model, and the same one on NDIF."""
    return served[0], mi.Model.load(envoy_of(served[1]), backend="nnsight", remote=True)


def able(model: mi.Model, use: str) -> list[Site]:
    assert model.backend is not None
    return [site for site in model.sites if model.backend.lacks(site, use) is None]


def test_every_site_is_read(both: tuple[mi.Model, mi.Model]) -> None:
    """Examples of different lengths, padded on either side; a list of positions that not all examples have, too."""
    native, remote = both
    assert all(parameter.is_meta for parameter in remote.hf.parameters()) and remote.remote and not native.remote
    reads = [Read(site) for site in native.sites]
    assert able(remote, "read") == list(native.sites)
    for side in ("right", "left"):
        batch = native.tokenize(IDS).batch(range(3), padding_side=side)
        expected, found = (forward(model, batch, reads).values for model in both)
        for read in reads:
            a, b, real = found[read], expected[read], batch.mask
            assert a.shape == b.shape and not a.requires_grad
            if read.site.kind in PATTERN_KINDS:
                real = (real[:, None, :, None] & real[:, None, None, :]).expand_as(b)
                assert torch.equal(a.isneginf() & real, b.isneginf() & real)
                real = real & ~b.isneginf()
            assert off(a[real], b[real]) < TOLERANCE, (read.site, side)


PARTS = [
    sites.resid_post(1, positions=(0, -1)),
    sites.z(1, heads=3, positions="end"),
    sites.k(2, heads=(0, 1)),
    sites.pattern(0, heads=2, positions="end"),
    sites.pattern(1, heads=(1, 3), positions=(1, -1)),
    sites.scores(2, heads=0),
    sites.logits(positions="end"),
    sites.head_out(1, heads=(0, 2), positions=2),
]


@pytest.mark.parametrize("part", PARTS, ids=str)
def test_parts_of_sites(both: tuple[mi.Model, mi.Model], part: Site) -> None:
    a, b = (model.trace(IDS, part)[part] for model in both)
    assert a.shape == b.shape
    seen = ~a.isneginf() & ~a.isnan()
    assert torch.equal(seen, ~b.isneginf() & ~b.isnan()) or part.kind in PATTERN_KINDS
    assert off(b[seen & ~b.isneginf()], a[seen & ~b.isneginf()]) < TOLERANCE


def test_every_site_is_written(both: tuple[mi.Model, mi.Model]) -> None:
    native, remote = both
    writable = able(remote, "write")
    assert {site.kind for site in set(native.sites) - set(writable)} <= {"router"}
    batch = native.tokenize(IDS).batch(range(3), padding_side="left")
    base = forward(native, batch, [LOGITS]).values[LOGITS]
    for kind in {site.kind for site in writable}:
        writes = [mi.Apply(site, turned(site)) for site in writable if site.kind == kind]
        expected, found = (forward(model, batch, [LOGITS], writes=writes).values[LOGITS] for model in both)
        assert off(expected, base) > 1e-3, kind
        assert off(found, expected) < TOLERANCE, kind


VECTOR = torch.linspace(-1, 1, 32)
MORE = [
    mi.Replace(sites.resid_post(1, positions=(0, 2)), VECTOR),
    mi.Replace(sites.z(0, heads=1), torch.arange(3.0).view(3, 1, 1).expand(3, 8, 8)),
    mi.Add(sites.resid_post(0, positions="end"), VECTOR),
    mi.Mean(sites.attn_out(1), torch.randn(5, 32, generator=torch.Generator().manual_seed(0))),
    mi.Steer(sites.resid_post(1), VECTOR, 3.0),
    mi.Project(sites.z(1), VECTOR),
    mi.Project(sites.resid_post(1, positions=1), torch.stack([VECTOR, VECTOR**2])),
    mi.Knockout(sites.scores(0), 0),
]


@pytest.mark.parametrize("side", ["right", "left"])
def test_every_intervention(both: tuple[mi.Model, mi.Model], side: str) -> None:
    """Alone and all together; what is read sees what was written."""
    batch = both[0].tokenize(IDS).batch(range(3), padding_side=side)
    reads = [LOGITS, *(Read(Site(kind, 2, positions="end")) for kind in ("resid_post", "pattern"))]
    usable = [each for each in [*INTERVENTIONS, *MORE] if not _of_neurons(each, both[0])]
    for writes in [*([one] for one in usable), usable]:
        expected, found = (forward(model, batch, reads, writes=writes).values for model in both)
        for read in reads:
            assert found[read].isfinite().all()
            assert off(found[read], expected[read]) < TOLERANCE, (writes, read.site)


def _of_neurons(write: Intervention, model: mi.Model) -> bool:
    return isinstance(write.site, Site) and write.site.kind == "mlp_act" and write.site.layer in model.dims.sparse


ANALYZERS = [
    mi.HeadRoles(sequences=2, length=6, weights=False),
    mi.ActivationPatching("resid_pre", positions=("S2", "end")),
    mi.PathPatching("logits", "attn_out", positions=("S2", "end")),
    mi.Ablation("z", "resample", heads=((1, 2),), layers=(0, 2)),
]


@pytest.mark.parametrize("analyzer", ANALYZERS, ids=lambda a: a.name)
def test_analyzers_run_unchanged(both: tuple[mi.Model, mi.Model], ndif: str, analyzer: mi.Analyzer) -> None:
    pairs = mi.tasks.ioi(n=3, seed=0)
    expected, found = (mi.run(model, pairs, analyzer, batch_size=2) for model in both)
    assert found.meta["backend"].startswith("nnsight ") and found.meta["backend"].endswith(f"at {ndif}")
    assert found.meta["model_hash"] != expected.meta["model_hash"]
    for name, value in expected.data.data_vars.items():
        if value.dtype.kind == "f" and bool(np.isfinite(value.values).any()):
            scale = float(np.nanmax(np.abs(value.values)))
            np.testing.assert_allclose(found.data[name].values, value.values, atol=1e-4 * scale, rtol=0, err_msg=name)


def test_only_logits_that_are_wanted_come_back(
    both: tuple[mi.Model, mi.Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = both[1]
    assert remote.backend is not None
    asked: list[Read] = []
    run = remote.backend.run
    monkeypatch.setattr(
        remote.backend,
        "run",
        lambda batch, w, reads, g, lenient: (asked.extend(reads), run(batch, w, reads, g, lenient))[1],
    )
    mi.run(remote, mi.tasks.ioi(n=2), mi.Ablation("z", "zero", layers=(1,)))
    assert {str(read.site) for read in asked} == {"logits@end"}


def test_what_needs_weights_or_gradients_is_refused(both: tuple[mi.Model, mi.Model]) -> None:
    remote = both[1]
    pairs = mi.tasks.ioi(n=1)
    weights = r"is wanted for its weights, and .* runs on NDIF, which keeps them; load the model without remote=True"
    for analyzer in (
        mi.LogitLens(),
        mi.DirectLogitAttribution(),
        mi.TokenAttribution(),
        mi.HeadWeights(),
        mi.HeadRoles(sequences=2, length=6),
    ):
        with pytest.raises(ModelError, match=weights):
            mi.run(remote, pairs, analyzer)
    for use in (lambda: remote.W_U, lambda: remote.W_O(0), lambda: remote.baseline("mean")):
        with pytest.raises(ModelError, match=weights):
            use()
    gradients = r"cannot be differentiated .* without the metric .*load it without remote=True"
    for analyzer in (mi.AttributionPatching("z"), mi.EdgeAttribution("eap"), mi.GradientAnalysis()):
        with pytest.raises(SiteError, match=gradients):
            mi.run(remote, pairs, analyzer)
    for name in ("native", "nnsight", "transformer_lens"):
        with pytest.raises(ModelError, match=r"weights are not here; load it without remote=True to run it by"):
            remote.with_backend(name)
    with pytest.raises(ModelError, match="generating goes token by token"):
        remote.generate("A", max_new_tokens=1)
    with pytest.raises(SiteError, match=r"router.0 cannot be written .* function of this package"):
        remote.trace(IDS, "logits", interventions=mi.Zero(sites.router(0)))


def test_functions_that_cannot_be_sent(both: tuple[mi.Model, mi.Model]) -> None:
    """Of this package: refused by name; of a user, failing there: NDIF's own words."""
    remote = both[1]
    with pytest.raises(HookError, match=r"at resid_post.1 is the function tiny of this package, which NDIF's servers"):
        remote.trace(IDS, "logits", interventions=mi.Apply(sites.resid_post(1), tiny))
    with pytest.raises(HookError, match=r"Add does not fit resid_post.1"):
        remote.trace(IDS, "logits", interventions=mi.Add(sites.resid_post(1), torch.ones(5)))

    def fails(value: torch.Tensor) -> torch.Tensor:
        return value / torch.ones(7)

    def narrows(value: torch.Tensor) -> torch.Tensor:
        return value[:, :1]

    for fn, said in ((fails, r"RuntimeError: The size of tensor a"), (narrows, "ValueError: Apply gave shape")):
        with pytest.raises(ModelError, match=rf"NDIF at http.* did not run this pass of .*{said}") as caught:
            remote.trace(IDS, "logits", interventions=mi.Apply(sites.resid_post(1), fn))
        assert type(caught.value.__cause__).__name__ == "RemoteError"

    lock = threading.Lock()
    with pytest.raises(ModelError, match=r"could not be sent to NDIF, or read back \(TypeError: cannot pickle"):
        remote.trace(IDS, "logits", interventions=mi.Apply(sites.resid_post(1), lambda value: (lock, value)[1]))
    assert remote.trace(IDS, "logits")["logits"].isfinite().any()


def test_a_model_that_ndif_does_not_have(served: tuple[mi.Model, Path, str], ndif: str, monkeypatch: Any) -> None:
    from nnsight.modeling.huggingface import _ID_CACHE

    monkeypatch.setitem(_ID_CACHE, str(served[1]), "org/other")
    remote = mi.Model.load(envoy_of(served[1]), backend="nnsight", remote=True)
    with pytest.raises(ModelError, match=r"did not run this pass .*there is no .*org/other.*nnsight.status\(\)"):
        remote.trace(IDS, "logits")


def test_the_key(served: tuple[mi.Model, Path, str], ndif: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import nnsight

    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", "another")
    with pytest.raises(ModelError, match=r"does not take this API key \(401\); set NDIF_API_KEY"):
        mi.Model.load("org/tiny", backend="nnsight", remote=True)
    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", None)
    with pytest.raises(ModelError, match="wants an API key, and nnsight has none; set NDIF_API_KEY before"):
        mi.Model.load("org/tiny", backend="nnsight", remote=True)


def test_no_network(both: tuple[mi.Model, mi.Model], monkeypatch: pytest.MonkeyPatch) -> None:
    """When the model is loaded, and when NDIF has gone away since."""
    import nnsight

    nowhere = "http://127.0.0.1:9"
    monkeypatch.setattr(nnsight.CONFIG.API, "HOST", nowhere)
    with pytest.raises(
        ModelError, match=rf"NDIF at {nowhere} does not answer \(ConnectError: .*check the network and NDIF_HOST"
    ):
        mi.Model.load("org/tiny", backend="nnsight", remote=True)
    with pytest.raises(ModelError, match=rf"NDIF at {nowhere} does not answer \(ConnectionRefusedError: ") as caught:
        both[1].trace(IDS, "logits")
    assert isinstance(caught.value.__cause__, ConnectionRefusedError)


@pytest.fixture
def hub(served: tuple[mi.Model, Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of the hub's that has the model's configuration and tokenizer, and no weights; nothing is asked for."""
    import huggingface_hub.constants as constants
    from nnsight.modeling.huggingface import _ID_CACHE

    snapshot = tmp_path / "models--org--tiny" / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--org--tiny" / "refs").mkdir()
    (tmp_path / "models--org--tiny" / "refs" / "main").write_text("0")
    for file in served[1].glob("*.json"):
        (snapshot / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setitem(_ID_CACHE, "org/tiny", "org/tiny")


def test_by_name(served: tuple[mi.Model, Path, str], ndif: str, hub: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from nnsight.modeling.huggingface import _ID_CACHE

    remote = mi.Model.load("org/tiny", backend="nnsight", remote=True)
    assert remote.name == "org/tiny" and "run by nnsight" in repr(remote)
    text = "Then Mary went to"
    expected, found = (model.trace(text, "logits")["logits"] for model in (served[0], remote))
    assert off(found, expected) < TOLERANCE
    with pytest.raises(ModelError, match=r"'org/none', which a remote model needs here, cannot be read"):
        mi.Model.load("org/none", backend="nnsight", remote=True)
    monkeypatch.delitem(_ID_CACHE, "org/tiny")
    with pytest.raises(ModelError, match=r"the hub does not say how 'org/tiny' is spelt.*OfflineModeIsEnabled"):
        mi.Model.load("org/tiny", backend="nnsight", remote=True)


def test_options(served: tuple[mi.Model, Path, str], ndif: str) -> None:
    def refused(said: str, *args: Any, **options: Any) -> None:
        with pytest.raises(ModelError, match=said):
            mi.Model.load(*args, remote=True, **options)

    refused("remote=True is nnsight's, so it takes backend='nnsight'. Got 'native'", "org/tiny")
    refused("adapter, device cannot be applied to", "org/tiny", backend="nnsight", adapter="a", device="cuda")
    refused("dtype cannot be applied to .* nnsight made", envoy_of(served[1]), backend="nnsight", dtype="float32")
    refused("NDIF knows models by their hub id", str(served[1]), backend="nnsight")
    refused("NDIF knows models by their hub id", "smollm2", backend="nnsight")
    with pytest.raises(ModelError, match=r"no weights yet; make it with dispatch=True, or load it here .* remote=True"):
        mi.Model.load(envoy_of(served[1]), backend="nnsight")
    refused("a Qwen3MoeModel has no name that NDIF could know", served[0].hf.model, backend="nnsight")


def test_a_dry_run(served: tuple[mi.Model, Path, str], ndif: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """nnsight's own: the request is made, read back where no module of ours can be imported, and run here; no key."""
    import nnsight

    monkeypatch.setattr(nnsight.CONFIG.API, "APIKEY", None)
    remote = mi.Model.load(envoy_of(served[1]), backend="nnsight", remote="local")
    write = mi.Add(sites.resid_mid(1, positions=(1, -1)), 0.5)
    expected, found = (model.trace(IDS, "logits", interventions=write)["logits"] for model in (served[0], remote))
    real = ~expected.isnan()
    assert off(found[real], expected[real]) < TOLERANCE
