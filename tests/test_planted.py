"""Planted circuits are what they say: every edge is patched, one by one, in a Llama written out in plain torch."""

import functools
import statistics
from collections.abc import Collection

import pytest
import torch
from torch import Tensor

import mechinterp as mi
from mechinterp.core.graph import Graph
from mechinterp.tasks.planted import BOS, Planted

Edge = tuple[str, str]
CIRCUITS = {"induction": mi.tasks.planted.induction, "copy": mi.tasks.planted.copy, "grouped": mi.tasks.planted.grouped}


@functools.cache
def built(name: str) -> Planted:
    return CIRCUITS[name](16)


@pytest.fixture(params=CIRCUITS)
def planted(request: pytest.FixtureRequest) -> Planted:
    return built(request.param)


def rotate(x: Tensor, theta: float) -> Tensor:
    """Rotary embedding of queries or keys, ``pos dim``: pair (i, i + dim/2) turns by theta^(-2i/dim) a position."""
    half = x.shape[-1] // 2
    angle = torch.arange(len(x))[:, None] * theta ** (-torch.arange(half) / half)
    a, b = x[:, :half], x[:, half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


@torch.no_grad()
def forward(
    model: mi.Model, ids: tuple[int, ...], cut: Collection[Edge] = (), given: dict[str, Tensor] | None = None
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Logits at the last position, what every node writes, and patterns.

    A receiver reads the sum of what nodes before it wrote; along edges that are `cut`, what is `given` instead.
    """
    hf, d = model.hf, model.dims
    given = given or {}
    wrote = {"embed": hf.model.embed_tokens.weight[list(ids)]}
    patterns: dict[str, Tensor] = {}

    def read(receiver: str) -> Tensor:
        terms = [given[s] if (s, receiver) in cut else value for s, value in wrote.items()]
        return torch.stack(terms).sum(0)

    for i, layer in enumerate(hf.model.layers):
        attn, norm = layer.self_attn, layer.input_layernorm
        new: dict[str, Tensor] = {}
        for h in range(d.n_heads):
            kv = h * d.n_kv_heads // d.n_heads
            own, shared = (slice(x * d.d_head, (x + 1) * d.d_head) for x in (h, kv))
            q = norm(read(f"a{i}.h{h}<q>")) @ attn.q_proj.weight[own].T
            k = norm(read(f"a{i}.kv{kv}<k>")) @ attn.k_proj.weight[shared].T
            v = norm(read(f"a{i}.kv{kv}<v>")) @ attn.v_proj.weight[shared].T
            theta = hf.config.rope_parameters["rope_theta"]
            scores = rotate(q, theta) @ rotate(k, theta).T / d.d_head**0.5
            future = torch.ones_like(scores, dtype=torch.bool).triu(1)
            patterns[f"a{i}.h{h}"] = scores.masked_fill(future, -torch.inf).softmax(-1)
            new[f"a{i}.h{h}"] = patterns[f"a{i}.h{h}"] @ v @ attn.o_proj.weight[:, own].T
        wrote |= new
        x = layer.post_attention_layernorm(read(f"m{i}"))
        gate = torch.nn.functional.silu(x @ layer.mlp.gate_proj.weight.T)
        wrote[f"m{i}"] = (gate * (x @ layer.mlp.up_proj.weight.T)) @ layer.mlp.down_proj.weight.T
    return hf.model.norm(read("logits"))[-1] @ hf.lm_head.weight.T, wrote, patterns


def rows(planted: Planted) -> list[tuple[tuple[int, ...], tuple[int, ...], int, int]]:
    """Clean ids, corrupted ids, right answer, wrong answer."""
    tokens = planted.model.tokenize(planted.pairs)
    assert tokens.corrupted is not None
    assert tokens.answers is not None
    assert all(len(side) == 1 for sides in tokens.answers for side in sides)
    answers = [(right[0], wrong[0]) for right, wrong in tokens.answers]
    return [(a, b, *c) for a, b, c in zip(tokens.ids, tokens.corrupted, answers, strict=True)]


def edges(model: mi.Model) -> list[Edge]:
    graph = Graph.of(model)
    return [(graph.senders[s], graph.receivers[r]) for s, r in zip(*(e.tolist() for e in graph.ends), strict=True)]


@functools.cache
def corrupted_runs(name: str) -> list[dict[str, Tensor]]:
    """What every node writes in each corrupted run."""
    return [forward(built(name).model, corrupted)[1] for _, corrupted, _, _ in rows(built(name))]


def mean_difference(planted: Planted, cut: Collection[Edge]) -> float:
    """The mean logit difference of clean runs that receive the corrupted runs' contributions along the edges cut."""
    out: list[float] = []
    for (clean, _, right, wrong), given in zip(rows(planted), corrupted_runs(planted.name), strict=True):
        logits = forward(planted.model, clean, cut, given)[0]
        out.append(float(logits[right] - logits[wrong]))
    return statistics.mean(out)


def test_the_model_written_out_is_the_model(planted: Planted) -> None:
    for clean, corrupted, _, _ in rows(planted)[:4]:
        for ids in (clean, corrupted):
            with torch.no_grad():
                expected = planted.model.hf(torch.tensor([ids])).logits[0, -1]
            torch.testing.assert_close(forward(planted.model, ids)[0], expected, atol=2e-4, rtol=1e-4)


def test_the_model_knows_the_answer_and_the_corruption_takes_it_away(planted: Planted) -> None:
    assert len(planted.pairs) >= 16
    for clean, corrupted, right, wrong in rows(planted):
        logits, other = forward(planted.model, clean)[0], forward(planted.model, corrupted)[0]
        assert int(logits.argmax()) == right
        assert logits[right] - logits[wrong] > 1
        assert other[right] - other[wrong] < 0.1 * (logits[right] - logits[wrong])
        assert BOS == clean[0] == corrupted[0]


def test_true_edges_and_no_others_carry_the_difference(planted: Planted) -> None:
    """Every edge is patched by itself; the weakest true one has many times the effect of the strongest false one."""
    whole = mean_difference(planted, ())
    effects = {edge: whole - mean_difference(planted, {edge}) for edge in edges(planted.model)}
    assert planted.edges < set(effects)
    weakest = min(effects[edge] for edge in planted.edges)
    strongest = max(abs(effect) for edge, effect in effects.items() if edge not in planted.edges)
    assert weakest > 0.4 * whole
    assert weakest > 20 * strongest


def test_exact_scores_are_those_of_the_loop_by_hand(planted: Planted) -> None:
    scores = mi.run(planted.model, planted.pairs, mi.EdgeAttribution("exact")).data
    whole = mean_difference(planted, ())
    for i in range(0, scores.sizes["edge"], 5):
        edge = (str(scores["sender"].values[i]), str(scores["receiver"].values[i]))
        expected = whole - mean_difference(planted, {edge})
        assert float(scores["score"].values[i]) == pytest.approx(expected, abs=1e-5 * whole)


def test_true_edges_suffice_and_none_is_spare(planted: Planted) -> None:
    """With all other edges corrupted the model answers as before; without one more, it does not."""
    others = set(edges(planted.model)) - planted.edges
    whole, nothing = mean_difference(planted, ()), mean_difference(planted, edges(planted.model))
    assert abs(mean_difference(planted, others) - whole) < 0.05 * (whole - nothing)
    for edge in planted.edges:
        assert mean_difference(planted, others | {edge}) < 0.6 * whole


def test_effects_of_the_two_heads_of_a_group_add_up() -> None:
    """What the shared key carries is the answer; what each query carries is half of it."""
    planted = built("grouped")
    whole = mean_difference(planted, ())
    drop = {edge: whole - mean_difference(planted, {edge}) for edge in planted.edges}
    for part in (("embed", "a1.h0<q>"), ("a0.h2", "a1.h1<q>"), ("a1.h0", "logits"), ("a1.h1", "logits")):
        assert drop[part] == pytest.approx(whole / 2, rel=0.1)
    assert drop["embed", "a1.kv0<k>"] == pytest.approx(whole, rel=0.1)


def test_false_senders_differ_too(planted: Planted) -> None:
    """A method cannot find the circuit by leaving out the nodes that are the same in both runs: none is."""
    differs: dict[str, float] = {}
    for (clean, _, _, _), given in zip(rows(planted), corrupted_runs(planted.name), strict=True):
        for sender, value in forward(planted.model, clean)[1].items():
            differs[sender] = max(differs.get(sender, 0.0), float((value - given[sender]).norm(dim=-1).max()))
    assert min(differs.values()) > 0.02


LOOKS = {
    "induction": {"a1.h2": ("answer", "earlier")},
    "copy": {"a1.h1": ("marked", "moved")},
    "grouped": {"a1.h0": ("row", "column"), "a1.h1": ("column", "row")},
}
"""Where heads look from the end, and where they do not."""


def test_heads_look_where_the_docstrings_say(planted: Planted) -> None:
    where = planted.model.tokenize(planted.pairs).positions
    for i, (clean, corrupted, _, _) in enumerate(rows(planted)):
        patterns, other = forward(planted.model, clean)[2], forward(planted.model, corrupted)[2]
        for head, (at, off) in LOOKS[planted.name].items():
            assert patterns[head][-1, where[at][i]] > 0.9
            assert patterns[head][-1, where[off][i]] < 0.05
            assert other[head][-1, where[at][i]] < 0.1
        if planted.name == "copy":
            assert other["a1.h1"][-1, where["moved"][i]] > 0.9
            continue
        previous = "a0.h1" if planted.name == "induction" else "a0.h2"
        assert patterns[previous].diagonal(-1).min() > 0.9
        # by rotary frequencies alone: whatever the tokens are
        torch.testing.assert_close(patterns[previous], other[previous], atol=1e-4, rtol=0)


def test_laws_of_the_prompts(planted: Planted) -> None:
    """Seeded, at many positions, and different in the named tokens (and the questions at the end) alone."""
    circuit = CIRCUITS[planted.name]
    assert circuit(7, seed=3).pairs.texts == circuit(9, seed=3).pairs.texts[:7] != circuit(7, seed=4).pairs.texts
    asked = {"induction": 1, "copy": 0, "grouped": 2}[planted.name]
    where = planted.model.tokenize(planted.pairs).positions
    for i, (clean, corrupted, _, _) in enumerate(rows(planted)):
        changed = {j for j, (a, b) in enumerate(zip(clean, corrupted, strict=True)) if a != b}
        assert changed == {column[i] for column in where.values()} | {len(clean) - 1 - j for j in range(asked)}
    assert all(len(set(column)) > 3 for column in where.values())
    assert len({len(clean) for clean, _, _, _ in rows(planted)}) > 2


def test_two_builds_are_the_same_model_and_leave_the_seed_alone(planted: Planted) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    again = CIRCUITS[planted.name](3)
    assert torch.equal(torch.get_rng_state(), state)
    assert again.model.fingerprint == planted.model.fingerprint
    assert again.model.name == f"planted-{planted.name}"
