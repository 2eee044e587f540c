"""Facts about the real small model."""

from collections.abc import Callable

import pytest
import torch

import mechinterp as mi
from mechinterp import sites


def test_what_it_is(smollm2: mi.Model) -> None:
    d = smollm2.dims
    assert (d.n_layers, d.n_heads, d.n_kv_heads, d.d_model, d.vocab, d.context) == (30, 9, 3, 576, 49152, 8192)


@torch.no_grad()
def test_hooked_and_bare_agree_to_the_bit(smollm2: mi.Model) -> None:
    ids = torch.tensor([smollm2.tokenize("The quick brown fox jumps over the lazy dog").ids[0]])
    bare = smollm2.hf(ids).logits
    trace = smollm2.trace(ids, ["logits", "pattern", "z", "resid_mid", "q_rot", "mlp_act"])
    assert torch.equal(trace["logits"], bare)


def test_it_speaks(smollm2: mi.Model) -> None:
    """Weights that were read wrongly (q and k left permuted, say) would not know this."""
    assert "Paris" in smollm2.generate("The capital of France is", max_new_tokens=5).text


def test_it_finds_indirect_objects(smollm2: mi.Model) -> None:
    lens, dla = mi.run(smollm2, mi.tasks.ioi(90), [mi.LogitLens(), mi.DirectLogitAttribution()])
    last = lens.data.sel(layer=29)
    assert int((last["logit_diff"] > 0).sum()) == 90
    assert float(last["logit_diff"].mean()) > 3.5
    total = dla.data["attribution"].sum("component")
    assert float(abs(total - last["logit_diff"]).max()) < 1e-3


@pytest.mark.parametrize(
    ("task", "accuracy", "prob_diff"),
    [  # measured with 200 examples: accuracy 1.0, 0.99, 1.0; prob_diff 0.39, 0.10, 0.65
        (lambda model: mi.tasks.capitals(40), 0.95, 0.25),
        (lambda model: mi.tasks.agreement(40), 0.9, 0.05),
        (lambda model: mi.tasks.greater_than(model, 40), 0.95, 0.5),
    ],
    ids=["capitals", "agreement", "greater_than"],
)
def test_it_does_the_tasks(
    smollm2: mi.Model, task: Callable[[mi.Model], mi.Examples], accuracy: float, prob_diff: float
) -> None:
    mean = mi.run(smollm2, task(smollm2), mi.Accuracy()).data["mean"].sel(group="all examples")
    assert float(mean.sel(run="clean", measure="accuracy")) >= accuracy
    assert float(mean.sel(run="clean", measure="prob_diff")) >= prob_diff
    assert float(mean.sel(run="corrupted", measure="accuracy")) <= 0.1


def test_its_first_token_has_massive_activations(smollm2: mi.Model) -> None:
    """From layer 11 to 27 one dimension of the first token outweighs all the others."""
    data = mi.run(smollm2, mi.tasks.agreement(8), mi.ActivationStats(("resid_post",))).data.sel(kind="resid_post")
    first, rest = (data.sel(token=token, layer=slice(11, 26)) for token in ("first", "rest"))
    assert (first["top_dim"] == 507).all()
    assert float(first["top_share"].min()) > 0.9
    assert float(first["massive"].min()) > 400
    assert float(rest["massive"].max()) < 100
    assert float((first["norm"] / rest["norm"]).min()) > 30


def test_it_has_induction_and_previous_token_heads(smollm2: mi.Model) -> None:
    examples = mi.tasks.induction(smollm2, n=8, length=24)
    logits = smollm2.trace(examples, "logits")["logits"]
    ids = torch.tensor(examples.texts)
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    assert float(loss[:, :23].mean()) > 11
    assert float(loss[:, 24:].mean()) < 4
    roles = mi.run(smollm2, mi.tasks.ioi(8), mi.HeadRoles()).data.sel(text="random")
    found = roles["specialised"].sel(role="induction")
    assert int(found.sum()) >= 5
    assert float(roles["score"].sel(role="induction").max()) > 0.6
    assert float(roles["null"].sel(role="induction").max()) < 0.2
    assert float(roles["score"].sel(role="previous").max()) > 0.6


def test_patching_finds_the_second_subject_early_and_the_end_late(smollm2: mi.Model) -> None:
    patching = mi.ActivationPatching("resid_pre", positions=("S1", "S2", "end"), layers=(1, 29))
    effect = mi.run(smollm2, mi.tasks.ioi(4), patching).data["effect"]
    assert float(effect.sel(layer=1, position="S2")) > 0.9
    assert float(effect.sel(layer=29, position="end")) > 0.8
    assert float(abs(effect.sel(position="S1")).max()) < 1e-3  # before the first token that differs


def test_a_head_is_ablated_inside_the_block_only(smollm2: mi.Model) -> None:
    end = sites.logits(positions="end")
    prompt = mi.tasks.ioi(2).texts[0]
    before = smollm2.trace(prompt, end)[end]
    with smollm2.intervene(mi.Zero(sites.z(23, heads=3))):
        inside = smollm2.trace(prompt, end)[end]
        assert len(smollm2.generate(prompt, max_new_tokens=3).tokens) == 3
    assert (inside - before).abs().max() > 0.1
    assert torch.equal(smollm2.trace(prompt, end)[end], before)


def test_a_long_text_is_read_in_blocks(smollm2: mi.Model) -> None:
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(100, 40000, (1500,), generator=generator).tolist()
    data = mi.run(smollm2, [text], mi.HeadRoles(sequences=0)).data
    assert float(data["score"].sel(text="prompts", role="first").max()) > 0.5


def test_bf16(smollm2: mi.Model) -> None:
    half = mi.Model.load("smollm2", dtype=torch.bfloat16)
    lens = mi.run(half, mi.tasks.ioi(8), mi.LogitLens()).data.sel(layer=29)
    full = mi.run(smollm2, mi.tasks.ioi(8), mi.LogitLens()).data.sel(layer=29)
    assert float(abs(lens["logit_diff"] - full["logit_diff"]).max()) == pytest.approx(0, abs=0.5)
