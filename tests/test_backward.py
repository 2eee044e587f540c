"""Gradients against autograd by hand and finite differences."""

import jaxtyping
import numpy as np
import pytest
import torch

import mechinterp as mi
from mechinterp import sites
from mechinterp.core.analyzer import Path
from mechinterp.core.metrics import Function
from mechinterp.core.trace import Read
from mechinterp.engine.backward import along, backward
from mechinterp.engine.forward import forward, score
from mechinterp.errors import NeedsError, SiteError
from mechinterp.sites import Site


def examples(ids: list[list[int]]) -> mi.Examples:
    return mi.Examples.of([ids[0], ids[1][:6], ids[2]], answers=[(5, 9), (6, 7), ([8, 9], 3)])


def test_gradients_equal_finite_differences_at_every_site(model: mi.Model, ids: list[list[int]]) -> None:
    model = mi.testing.tiny(model.arch.family, dtype=torch.float64)
    if model.dims.sparse:
        model.hf.set_experts_implementation("eager")  # the fast one knows no doubles
    tokens = model.tokenize(examples(ids))
    batch, metric = tokens.batch(range(3)), mi.logit_diff()
    chosen = [s for s in model.sites if s.kind not in ("head_out", "logits") and (s.layer or 1) == 1]
    grads, _ = backward(model, batch, chosen, metric)
    base = forward(model, batch, [Read(s) for s in chosen], [metric]).values
    for site in chosen:
        value, grad = base[Read(site)], grads[Read(site)]
        assert grad.shape == value.shape
        rng = torch.Generator().manual_seed(0)
        step = torch.randn(value.shape, generator=rng, dtype=torch.float64)
        if site.kind == "scores":
            step = step.masked_fill(torch.isinf(value), 0.0)
        step = step / step.flatten(1).norm(dim=1).reshape(-1, *[1] * (step.ndim - 1))
        both = []
        for sign in (1e-2, -1e-2):  # norms are computed in fp32, whatever the model's dtype
            passed = forward(model, batch, (), [metric], [mi.Replace(site, value + sign * step)])
            both.append(score(metric, batch, passed))
        numeric = (both[0] - both[1]) / 2e-2
        exact = torch.where(grad == 0, 0.0, grad * step).flatten(1).sum(1)
        torch.testing.assert_close(exact, numeric, atol=2e-3, rtol=2e-3, msg=lambda m, site=site: f"{site}: {m}")


def test_selected_gradients_are_slices(model: mi.Model, ids: list[list[int]]) -> None:
    batch = model.tokenize(examples(ids)).batch(range(3))
    whole = [Site("z", 1), Site("pattern", 1)]
    some = [Site("z", 1, heads=2, positions="end"), Site("pattern", 1, heads=(1, 3), positions=(0, 2))]
    grads, _ = backward(model, batch, [*whole, *some], mi.logit_diff())
    ends = torch.tensor([8, 5, 8])
    torch.testing.assert_close(grads[Read(some[0])], grads[Read(whole[0])][torch.arange(3), ends, 2])
    torch.testing.assert_close(grads[Read(some[1])], grads[Read(whole[1])][:, [1, 3]][:, :, [0, 2]])


def test_the_last_mlp_sees_what_the_metric_needs(model: mi.Model, ids: list[list[int]]) -> None:
    """And all tokens where somebody looks; the gradients are the same."""
    batch, seen = model.tokenize(examples(ids)).batch(range(3)), list[int]()
    last = model.dims.n_layers - 1
    where = [Site("embed"), Site("z", last), Site("resid_pre", last)]
    few, _ = backward(model, batch, where, mi.logit_diff())
    norm = model.hf.get_submodule(model.arch.layer(last)).post_attention_layernorm
    handle = norm.register_forward_hook(lambda module, args, output: seen.append(output.shape[-2]))
    try:
        whole, _ = backward(model, batch, where, mi.logit_diff())
    finally:
        handle.remove()
    late, _ = backward(model, batch, [*where, Site("mlp_out", last)], mi.logit_diff())
    assert seen == [batch.ids.shape[1]] and late[Read(Site("mlp_out", last))].shape[1] == batch.ids.shape[1]
    for site in where:
        torch.testing.assert_close(few[Read(site)], whole[Read(site)], atol=1e-5, rtol=1e-3)
        torch.testing.assert_close(late[Read(site)], whole[Read(site)], atol=1e-5, rtol=1e-3)


def test_weights_keep_no_gradient(model: mi.Model, ids: list[list[int]]) -> None:
    batch = model.tokenize(examples(ids)).batch(range(3))
    backward(model, batch, [Site("resid_pre", 1)], mi.answer_logit())
    assert all(p.grad is None for p in model.hf.parameters())


def test_a_metric_that_does_not_depend_on_a_site(model: mi.Model, ids: list[list[int]]) -> None:
    batch = model.tokenize(examples(ids)).batch(range(3))
    with pytest.raises(NeedsError, match=r"does not depend on k.2"):
        backward(
            model,
            batch,
            [Site("k", 2), Site("q", 2)],
            Function(fn=lambda x: x[:, 0].detach().requires_grad_()),
        )
    with pytest.raises(SiteError, match="attn_out"):
        backward(model, batch, [Site("head_out", 1)], mi.answer_logit())
    jaxtyping.config.update("jaxtyping_disable", True)  # past the run-time check of types in tests
    try:
        with pytest.raises(NeedsError, match=r"of of Grad must be 'clean' or 'corrupted'. Got 'dirty'"):
            mi.Grad(sites.q(), mi.answer_logit(), of="dirty")  # pyright: ignore[reportArgumentType]
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def test_gradients_reach_an_analyzer_one_backward_for_each_metric(model: mi.Model, ids: list[list[int]]) -> None:
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Norms(mi.Analyzer):
        kind: str

        def needs(self, model: mi.Model) -> mi.Needs:
            return mi.Needs(grads={"g": mi.Grad(mi.Sites(self.kind), mi.logit_diff())})

        def observe(self, batch: mi.Batch) -> mi.Part:
            return mi.Part(batch.grads["g"].stack(self.kind).flatten(2).norm(dim=-1), "layer example")

    results = mi.run(model, examples(ids), [Norms("resid_pre"), Norms("mlp_out"), Norms("resid_pre")])
    assert results[0].meta["passes"] == {"rounds": 1, "backward": 1}
    batch = model.tokenize(examples(ids)).batch(range(3))
    expected, _ = backward(model, batch, [Site("mlp_out", i) for i in range(3)], mi.logit_diff())
    for i in range(3):
        for row in range(3):
            norm = expected[Read(sites.mlp_out(i))][row].norm()
            assert float(results[1].data["value"].sel(layer=i, example=row)) == pytest.approx(float(norm), rel=1e-4)


def test_a_run_between_two_is_differentiated_where_it_is(model: mi.Model, ids: list[list[int]]) -> None:
    """Its values and gradients are those of the same embeddings written by hand."""
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class Between(mi.Analyzer):
        def needs(self, model: mi.Model) -> mi.Needs:
            return mi.Needs(
                grads={
                    "g": mi.Grad(sites.q(), mi.logit_diff(), reads=sites.resid_mid(), between=((sites.embed(), 0.25),)),
                    "own": mi.Grad(sites.q(), mi.logit_diff()),
                }
            )

        def observe(self, batch: mi.Batch) -> mi.Part:
            part = {name: (batch.grads[name].stack("q"), "layer example position head d_head") for name in ("g", "own")}
            return mi.Part(part | {"mid": (batch.values["g"].stack("resid_mid"), "layer example position d_model")})

    clean, corrupted = ids[0], [*ids[0][:3], *ids[1][3:]]
    pairs = mi.Examples.pairs([clean], [corrupted], [(5, 9)])
    result = mi.run(model, pairs, Between())
    assert result.meta["passes"] == {"rounds": 1, "forward": 2, "backward": 2}
    batch = model.tokenize(pairs).batch([0])
    a, b = (
        forward(model, batch.run(run), [Read(sites.embed())]).values[Read(sites.embed())]
        for run in ("clean", "corrupted")
    )
    write = mi.Replace(sites.embed(), 0.25 * a + 0.75 * b)
    expected, values = backward(
        model, batch, list(sites.q().of(3)), mi.logit_diff(), reads=[Read(Site("resid_mid", 2))], writes=[write]
    )
    for i in range(3):
        found = torch.as_tensor(result.data["g"].sel(layer=i).values)
        torch.testing.assert_close(found, expected[Read(Site("q", i))], atol=1e-5, rtol=1e-4)
    found = torch.as_tensor(result.data["mid"].sel(layer=2).values)
    torch.testing.assert_close(found, values[Read(Site("resid_mid", 2))], atol=1e-5, rtol=1e-4)
    assert not np.allclose(result.data["g"], result.data["own"])


def test_a_site_that_is_cut_off_has_no_gradient(model: mi.Model, ids: list[list[int]]) -> None:
    batch = model.tokenize(examples(ids)).batch(range(3))
    cut = [mi.Apply(Site(kind, 1), torch.Tensor.detach) for kind in ("attn_out", "mlp_out")]
    at = [Site("z", 1), Site("mlp_in", 1), Site("z", 0)]
    grads, _ = backward(model, batch, at, mi.logit_diff(), writes=cut)
    assert float(grads[Read(at[0])].abs().max()) == float(grads[Read(at[1])].abs().max()) == 0.0
    whole, _ = backward(model, batch, at, mi.logit_diff())
    assert float(grads[Read(at[2])].abs().max()) > 0.0
    assert not torch.allclose(grads[Read(at[2])], whole[Read(at[2])])


def test_a_path_is_the_weighted_sum_of_its_points(
    model: mi.Model, ids: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many points of examples of several lengths in one pass, against one pass for each point."""
    batch = model.tokenize(examples(ids)).batch(range(3))
    places = [Site("embed"), Site("resid_post", 1), Site("z", 1, heads=2, positions="end"), Site("pattern", 1)]
    path, base = Path("mean", (0.1, 0.7, 1.0), (0.5, 0.25, 0.25)), model.baseline("mean")
    monkeypatch.setattr("mechinterp.engine.backward.TOGETHER", 36)  # so that passes part examples and points
    passes: list[int] = []
    found = along(model, batch, places, mi.logit_diff(), path, tick=lambda: passes.append(1))
    assert len(passes) == 3
    for site in places:
        expected = torch.zeros_like(found[Read(site)])
        for share, weight in zip(path.shares, path.weights, strict=True):
            point = mi.Apply(sites.embed(), lambda own, share=share: torch.lerp(base.expand_as(own), own, share))
            expected += weight * backward(model, batch, [site], mi.logit_diff(), writes=[point])[0][Read(site)]
        torch.testing.assert_close(found[Read(site)], expected, atol=1e-5, rtol=1e-3)


def test_a_path_takes_fewer_points_where_memory_runs_out(
    model: mi.Model, ids: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    import mechinterp.engine.backward as module

    batch, path = model.tokenize(examples(ids)).batch(range(3)), Path.of("mean", 5)
    expected = along(model, batch, [Site("embed")], mi.logit_diff(), path)
    sizes: list[int] = []
    made = module.backward

    def small(one: mi.Model, some: mi.TokenBatch, *args: object, **kwargs: object) -> object:
        sizes.append(len(some))
        if len(some) > 4:
            raise torch.OutOfMemoryError("tried to allocate memory")
        return made(one, some, *args, **kwargs)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(module, "backward", small)
    found = along(model, batch, [Site("embed")], mi.logit_diff(), path)
    assert sizes == [15, 7, 3, 3, 3, 3, 3]
    torch.testing.assert_close(found[Read(Site("embed"))], expected[Read(Site("embed"))], atol=1e-5, rtol=1e-3)
