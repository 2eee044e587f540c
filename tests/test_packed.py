"""The packed sweep against the full one, on random sweeps of every kind of site; and what holds for it alone."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

import mechinterp as mi
from mechinterp.core.analyzer import Swept
from mechinterp.core.metrics import as_metric
from mechinterp.core.tokens import TokenBatch
from mechinterp.core.trace import Read
from mechinterp.engine import packed, runs
from mechinterp.engine.forward import forward
from mechinterp.engine.packed import sweep_packed, why_full
from mechinterp.engine.sweep import Grid, source_reads, sweep_full
from mechinterp.errors import ExamplesError, NeedsError, SiteError
from mechinterp.sites import KINDS, Site

WRITES: dict[str, Any] = {
    "patch": None,
    "zero": mi.Zero,
    "scale": lambda site: mi.Scale(site, 0.3),
    "noise": lambda site: mi.Noise(site, 0.3, seed=1),
    "apply": lambda site: mi.Apply(site, lambda value: value.flip(-1)),
    "add": lambda site: mi.Add(site, torch.tensor(0.25)),
}
METRICS = {"diff": mi.logit_diff(), "logit": mi.answer_logit("S2"), "prob": mi.answer_prob(), "kl": mi.kl()}


def batch_of(model: mi.Model, side: str = "right", n: int = 5) -> TokenBatch:
    return model.tokenize(mi.tasks.ioi(n, seed=3)).batch(range(n), padding_side=side)


def full(model: mi.Model, batch: TokenBatch, sweep: mi.Sweep) -> Swept:
    metrics = [] if sweep.metric is None else [sweep.metric]
    runs = {
        run: forward(model, batch.run(run), [r for r in source_reads(sweep, model) if r.of == run], metrics)
        for run in dict.fromkeys(["clean", sweep.base, sweep.source])
    }
    return sweep_full(model, batch, sweep, runs[sweep.source].values, runs["clean"], runs)


def close(found: Swept, expected: Swept, tolerance: float = 1e-5) -> None:
    if expected.values is None:
        assert found.values is None and expected.reads
        return
    assert found.values is not None
    scale = float(expected.values.nan_to_num().abs().max().clamp(min=0.1))
    torch.testing.assert_close(found.values, expected.values, atol=tolerance * scale, rtol=0, equal_nan=True)


RANDOM = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)
POSITIONS = ["each", None, "end", "S2", 3, ("IO", "S1"), ("end", 0), (-2, 1, "S2"), ("S2",)]
GIVEN = (
    (),
    (),
    (mi.Noise(Site("embed", positions="IO"), 0.5),),
    (mi.Scale(Site("z", 1, heads=1), 0.5), mi.Zero(Site("mlp_out", 2, positions="end"))),
    (mi.Noise(Site("embed", positions="IO"), 0.5), mi.Scale(Site("resid_pre", 1), 1.1)),
)
ANY = {
    **METRICS,
    "odds": mi.log_odds(),
    "loss": mi.loss(),
    "callable": as_metric(lambda logits: logits[:, 5] - logits.mean(-1)),
}
HELD = ("z", "attn_out", "mlp_out", "q", "v", "k_rot", "resid_post", "pattern")


def kinds_of(model: mi.Model) -> list[str]:
    return [kind for kind in dict.fromkeys(s.kind for s in model.sites) if kind != "logits"]


def layers_of(model: mi.Model, kind: str) -> tuple[int, ...]:
    return tuple(s.layer for s in model.sites if s.kind == kind and s.layer is not None)


def a_site(data: st.DataObject, model: mi.Model) -> Site:
    kind = data.draw(st.sampled_from(kinds_of(model)))
    layers = layers_of(model, kind)
    heads = data.draw(st.sampled_from([None, 1, (1, 0)])) if model.dims.heads(kind) is not None else None
    neurons = data.draw(st.sampled_from([None, 3, (3, 7)])) if "d_mlp" in KINDS[kind].axes else None
    positions = data.draw(st.sampled_from([None, None, "end", "S2", 3, ("IO", "S1")]))
    return Site(kind, data.draw(st.sampled_from(layers)) if layers else None, heads, positions, neurons=neurons)


def an_edit(data: st.DataObject, row: int, n: int) -> mi.Edit:
    """Of few places, so that several of an example begin alike."""
    positions = tuple(sorted(data.draw(st.sets(st.sampled_from([row % n, 1, n // 2, n - 2, n - 1]), min_size=1))))
    tokens = data.draw(st.sampled_from([None, (7,) * len(positions), "mean", "zero"]))
    return mi.Edit(positions, tokens)


def a_sweep(data: st.DataObject, model: mi.Model, batch: TokenBatch) -> mi.Sweep:
    """A grid, a list of rows, or edited inputs; some with reads, some with sites that are held."""
    metric = ANY[data.draw(st.sampled_from(list(ANY)))]
    form = data.draw(st.sampled_from(["grid", "grid", "rows", "edits"]))
    given = data.draw(st.sampled_from(GIVEN))
    base, source = data.draw(st.permutations(["clean", "corrupted"])) if not given else ("clean", "clean")
    if form == "edits":
        lengths = batch.lengths.tolist()
        several = data.draw(st.sampled_from([1, 4]))  # of one, the base run goes along
        edits = tuple(tuple(an_edit(data, row, n) for _ in range(several)) for row, n in enumerate(lengths))
        return mi.Sweep(metric, base=base, edits=edits)
    reads = tuple(a_site(data, model) for _ in range(data.draw(st.sampled_from([0, 0, 1, 2]))))
    chosen = None if reads and data.draw(st.booleans()) else metric
    held = tuple(
        mi.Sites(kind, data.draw(st.sampled_from([None, (1,), (1, 2)])), None, data.draw(st.sampled_from(where)))
        for kind in data.draw(st.lists(st.sampled_from(HELD), max_size=2))
        for where in [[None, "S2"] if form == "rows" else [None, "each", "S2"]]
    )
    if form == "rows":
        makers = [lambda site: site, *(WRITES[name] for name in ("zero", "scale", "noise", "add"))]
        rows = tuple(
            tuple(data.draw(st.sampled_from(makers))(a_site(data, model)) for _ in range(data.draw(st.integers(1, 3))))
            for _ in range(4)
        )
        return mi.Sweep(chosen, source=source, base=base, given=given, held=held, rows=rows, reads=reads)
    kind = data.draw(st.sampled_from(kinds_of(model)))
    write = data.draw(st.sampled_from([*WRITES, *(["knockout"] if kind == "scores" else [])]))
    layers = layers_of(model, kind)
    heads = neurons = None
    if model.dims.heads(kind) is not None:
        heads = data.draw(st.sampled_from([None, "each", (1,), (1, 0), ((0, 1), 1)]))
    if "d_mlp" in KINDS[kind].axes:
        neurons = data.draw(st.sampled_from([None, (1, 5), ((0, 1), 7)]))
    return mi.Sweep(
        chosen,
        mi.Sites(kind, layers) if layers else Site(kind),
        data.draw(st.sampled_from(POSITIONS)),
        heads,
        neurons,
        (lambda site: mi.Knockout(site, "S2")) if write == "knockout" else WRITES[write],
        source,
        base,
        data.draw(st.sampled_from([1, 1, 2, 3])) if len(layers) == model.dims.n_layers else 1,
        given,
        held,
        reads=reads,
    )


@RANDOM
@given(data=st.data())
def test_packed_equals_full(model: mi.Model, data: st.DataObject) -> None:
    if model.dims.n_experts:  # in double precision no two experts are nearly tied
        model = double(model)
    right = batch_of(model)
    sweep = a_sweep(data, model, right)
    assume(why_full(model, sweep) is None)
    written = [site for row in Grid.of(sweep, model, 3) for site, _ in row]
    # A norm makes of an exact zero what rounding makes of it, and whole passes write resid_mid as a sum.
    assume(not any(site.kind == "resid_mid" for site in written) or not (sweep.rows or sweep.write is mi.Zero))
    # The full engine counts a pattern's queries from the first column, padding or not.
    patterns = any(s.kind in ("scores", "pattern") for s in (*written, *sweep.held))
    batch = right if patterns else batch_of(model, data.draw(st.sampled_from(["left", "right"])))
    expected = full(model, batch, sweep)
    skip, budget = data.draw(st.booleans()), data.draw(st.sampled_from([packed.BUDGET, 4_000_000]))
    found = sweep_packed(model, batch, sweep, skip=skip, budget=budget)
    close(found, expected)
    assert found.axes == expected.axes and found.coords == expected.coords
    for site in sweep.reads:
        pair = [swept.reads[site] for swept in (found, expected)]
        assert pair[0].shape == pair[1].shape
        if site.positions is None:  # what stands at padding is nobody's
            axis = len(found.axes) + 1
            real = batch.mask.view(len(batch), *[1] * (axis - 1), -1, *[1] * (pair[0].ndim - axis - 1))
            pair = [torch.where(real, value, 0.0) for value in pair]
        scale = float(pair[1].nan_to_num().abs().max().clamp(min=0.1))
        torch.testing.assert_close(*pair, atol=1e-5 * scale, rtol=0, equal_nan=True)


DOUBLES: dict[str, mi.Model] = {}


def double(model: mi.Model) -> mi.Model:
    if model.name not in DOUBLES:
        DOUBLES[model.name] = mi.testing.tiny(str(model.hf.config.model_type), dtype=torch.float64)
        DOUBLES[model.name].hf.set_experts_implementation("eager")
    return DOUBLES[model.name]


def test_identities(model: mi.Model) -> None:
    batch = batch_of(model)
    whole = sweep_packed(model, batch, mi.Sweep(mi.logit_diff(), mi.sites.resid_pre(0)))
    torch.testing.assert_close(whole.values[:, 0], whole.source, atol=1e-5, rtol=1e-5)
    itself = sweep_packed(
        model, batch, mi.Sweep(mi.logit_diff(), mi.sites.z(), "each", "each", source="corrupted"), skip=False
    )
    values = torch.where(itself.values.isnan(), itself.base[:, None, None, None], itself.values)
    torch.testing.assert_close(values, itself.base[:, None, None, None].expand_as(values), atol=2e-5, rtol=1e-5)


def test_before_the_first_token_that_differs_there_is_exactly_nothing(model: mi.Model) -> None:
    batch = batch_of(model)
    swept = sweep_packed(model, batch, mi.Sweep(mi.logit_diff(), mi.sites.attn_out(), positions="each"))
    for row, second in enumerate(batch.positions["S2"]):
        assert (swept.values[row, :, :second] == swept.base[row]).all()
        assert (swept.values[row, :, second] != swept.base[row]).any()


def test_chunks_order_and_company_do_not_matter(model: mi.Model) -> None:
    sweep = mi.Sweep(mi.logit_diff(), mi.sites.resid_pre(), positions="each", heads=None)
    batch = batch_of(model)
    expected = sweep_packed(model, batch, sweep)
    for budget in (300_000, 600_000, 3_000_000):
        close(sweep_packed(model, batch, sweep, budget=budget), expected)
    turned = sweep_packed(model, batch, mi.Sweep(mi.logit_diff(), mi.sites.resid_pre((2, 1, 0)), positions="each"))
    close(Swept(turned.values.flip(1), (), None, None, {}, {}), expected)
    order = [3, 0, 4, 1, 2]
    shuffled = sweep_packed(model, batch.take(order), sweep)
    close(Swept(shuffled.values, (), None, None, {}, {}), Swept(expected.values[order], (), None, None, {}, {}))
    for row in range(5):
        alone = sweep_packed(model, batch.take([row]), sweep).values[0]
        torch.testing.assert_close(alone, expected.values[row, :, : alone.shape[1]], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("metric", [mi.logit_diff(), mi.loss()], ids=["end", "everywhere"])
def test_edited_inputs_that_begin_alike_carry_it_once(either: mi.Model, metric: mi.Metric) -> None:
    """All masks of three tokens: a tree, of which every branch is what it would be alone."""
    examples = mi.tasks.ioi(2)
    masks = list(itertools.product([False, True], repeat=3))[1:]
    edits = tuple(mi.Edit(tuple(p for p, one in zip((2, 5, 9), mask, strict=True) if one), "mean") for mask in masks)

    class Masked(mi.Analyzer):
        def needs(self, model: mi.Model) -> mi.Needs:
            return mi.Needs(sweeps={"masked": mi.Sweep(metric, edits=edits, base="clean")})

        def observe(self, batch: mi.Batch) -> mi.Part:
            assert batch.sweeps["masked"].values is not None
            return mi.Part(batch.sweeps["masked"].values, "example edit")

    packed, full = (mi.run(either, examples, Masked(), engine=engine) for engine in ("packed", "full"))
    np.testing.assert_allclose(packed.data["value"], full.data["value"], atol=2e-5)
    firsts = [min(p for p, one in zip((2, 5, 9), mask, strict=True) if one) for mask in masks]
    lengths = [len(row) for row in either.tokenize(examples).ids]
    alone = sum(n - first for n in lengths for first in firsts) * either.dims.n_layers
    # As a tree: each token after position 2, 5 or 9 once for each choice that was made until there.
    tree = sum((5 - 2) + (9 - 5) * 3 + (n - 9) * 7 for n in lengths) * either.dims.n_layers
    assert packed.meta["passes"]["sweep_token_layers"] == (tree if metric == mi.logit_diff() else alone)


def test_the_base_runs_keys_and_values_are_never_written(model: mi.Model) -> None:
    batch = batch_of(model)
    for kind in ("k", "v", "k_rot", "resid_pre", "pattern"):
        for write in (None, mi.Zero):
            sweep = mi.Sweep(mi.logit_diff(), mi.Sites(kind), positions=("S2", "end"), write=write)
            cells = packed._Sweeping(model, batch, sweep, 20, lambda what, n: None, packed.BUDGET, True)
            with torch.no_grad():
                cells.run()
                kept = dict(cells.base.values)
                cells.passes()
            for site in (mi.Site(name, layer) for name in ("k_rot", "v") for layer in range(model.dims.n_layers)):
                torch.testing.assert_close(
                    kept[Read(site)][batch.mask], cells.value(site)[batch.mask], atol=1e-6, rtol=1e-5
                )


@torch.no_grad()
@pytest.mark.parametrize(
    "kind", ["embed", "resid_pre", "q", "k", "v", "z", "head_out", "attn_out", "mlp_out", "resid_post"]
)
def test_unedited_runs_may_go_along_with_the_rows(model: mi.Model, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = batch_of(model)
    for skip in (True, False):
        sites = mi.sites.embed() if kind == "embed" else mi.Sites(kind)
        sweep = mi.Sweep(mi.logit_diff(), sites, positions="each")
        cells = packed._Sweeping(model, batch, sweep, 20, lambda what, n: None, packed.BUDGET, skip)
        along = cells.run()
        assert cells.along, "they went along"
        monkeypatch.setattr(runs, "TOGETHER", 0)
        cells = packed._Sweeping(model, batch, sweep, 20, lambda what, n: None, packed.BUDGET, skip)
        apart = cells.run()
        assert not cells.along
        monkeypatch.undo()
        close(along, apart)


def test_runs_that_went_along_when_memory_ran_out_are_passes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mi.testing.tiny("llama")
    batch = batch_of(model)
    sweep = mi.Sweep(mi.logit_diff(), mi.sites.resid_pre(), positions="each")
    expected = sweep_packed(model, batch, sweep)
    fly, calls = packed.Flight.run, []

    def short(self: packed.Flight) -> Any:
        calls.append(len(self.rows))
        if len(self.rows) > 20:
            raise MemoryError
        return fly(self)

    monkeypatch.setattr(packed.Flight, "run", short)
    close(sweep_packed(model, batch, sweep), expected)
    assert calls[0] > calls[1] > 20


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_bf16_is_no_worse_than_whole_passes(family: str) -> None:
    exact, half = mi.testing.tiny(family), mi.testing.tiny(family, dtype=torch.bfloat16)
    with torch.no_grad():
        for a, b in zip(exact.hf.parameters(), half.hf.parameters(), strict=True):
            a.copy_(b)
    batch = batch_of(exact, n=8)
    for sites in (mi.sites.resid_pre(), mi.sites.z(), mi.sites.mlp_out()):
        sweep = mi.Sweep(mi.logit_diff(), sites, positions="each")
        reference = sweep_packed(exact, batch, sweep, skip=False).values.nan_to_num()
        ours = sweep_packed(half, batch, sweep, skip=False).values.float().nan_to_num()
        theirs = full(half, batch, sweep).values.float().nan_to_num()
        assert (ours - reference).norm() <= 1.5 * (theirs - reference).norm()


def test_what_takes_whole_passes_says_why(llama: mi.Model) -> None:
    reasons = {
        "per query head": mi.Sweep(mi.logit_diff(), mi.sites.k(per_query_head=True)),
        "logits are written": mi.Sweep(mi.logit_diff(), mi.sites.logits()),
        "something is given": mi.Sweep(mi.logit_diff(), edits=((mi.Edit((0,)),),), given=(mi.Zero("z.0"),)),
        "read at scores or pattern": mi.Sweep(mi.logit_diff(), mi.sites.z(), reads=(mi.sites.pattern(0),)),
        "is a change": mi.Sweep(mi.logit_diff(), mi.sites.resid_mid(), reads=(mi.sites.attn_out(0),)),
        "given writes scores": mi.Sweep(mi.logit_diff(), mi.sites.z(), given=(mi.Zero("scores.0"),)),
    }
    for reason, sweep in reasons.items():
        assert reason in str(why_full(llama, sweep))
    plain = mi.Sweep(mi.logit_diff(), mi.sites.z())
    assert why_full(llama, plain) is None
    with llama.intervene(mi.Zero(mi.sites.z(0))):
        assert "in force around it" in str(why_full(llama, plain))


def test_an_intervention_around_a_sweep_is_in_every_row(model: mi.Model) -> None:
    """It belongs to the base run; the plan says that such a sweep takes whole passes."""
    examples = mi.tasks.ioi(3, seed=3)
    patching = mi.ActivationPatching("resid_pre", positions=("S2", "end"))
    with model.intervene(mi.Zero(mi.sites.mlp_out(1))):
        around = mi.run(model, examples, patching)
        assert "in force around it" in str(mi.plan(model, examples, patching))
    sweep = mi.Sweep(mi.logit_diff(), mi.sites.resid_pre(), ("S2", "end"), given=(mi.Zero(mi.sites.mlp_out(1)),))
    batch = model.tokenize(examples).batch(range(3))
    got = sweep_packed(model, batch, sweep).values
    source = forward(model, batch, [Read(Site("resid_pre", 2))], writes=sweep.given).values
    assert source and got.shape == (3, 3, 2)
    expected = around.data["patched"].transpose("example", "layer", "position").values
    np.testing.assert_allclose(expected[:, :2], full_with(model, batch, sweep)[:, :2], atol=1e-4)


def full_with(model: mi.Model, batch: TokenBatch, sweep: mi.Sweep) -> Any:
    """Whole passes with what is given in force in the source run too."""
    with model.intervene(*sweep.given):
        return full(model, batch, mi.Sweep(sweep.metric, sweep.sites, sweep.positions)).values.numpy()


def test_a_budget_too_small_for_one_example(llama: mi.Model) -> None:
    with pytest.raises(NeedsError, match=r"too small for one example of \d+ tokens.*give at least"):
        sweep_packed(llama, batch_of(llama), mi.Sweep(mi.logit_diff(), mi.sites.z()), budget=1000)


@pytest.mark.parametrize("budget", [0, True])
def test_a_budget_is_a_number_of_bytes(llama: mi.Model, budget: int) -> None:
    with pytest.raises(NeedsError, match="must be a number of bytes"):
        mi.run(llama, mi.tasks.ioi(n=2), mi.ActivationPatching("resid_pre"), budget=budget)


@pytest.mark.parametrize("kind", ["resid_mid", "q_rot", "k_rot", "scores", "pattern", "z", "mlp_out", "logits"])
def test_whatever_is_in_force_around_a_sweep_is_in_every_row(model: mi.Model, kind: str) -> None:
    examples = mi.tasks.ioi(3, seed=3)
    write = mi.Scale(Site(kind, None if kind == "logits" else 1), 0.3)
    analyzer = mi.ActivationPatching("resid_pre", positions=("S2", "end"))
    with model.intervene(write):
        found = [mi.run(model, examples, analyzer, engine=engine).data["patched"] for engine in ("packed", "full")]
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)


def test_what_may_carry_a_change_backwards_is_not_packed(llama: mi.Model) -> None:
    def mix(site: Site) -> mi.Intervention:
        return mi.Apply(site, lambda value: value.mean(1, keepdim=True).expand_as(value))

    given = mi.Sweep(mi.logit_diff(), mi.sites.resid_pre(0), "each", given=(mix(Site("mlp_out", 0)),))
    assert "earlier positions" in str(why_full(llama, given))
    window = mi.Sweep(mi.logit_diff(), mi.sites.resid_post(), write=mix, base="clean", window=2)
    assert "earlier ones" in str(why_full(llama, window))
    assert why_full(llama, mi.Sweep(mi.logit_diff(), mi.sites.resid_post(), write=mix)) is None


def test_cells_that_are_no_place(llama: mi.Model) -> None:
    examples = mi.tasks.ioi(3)
    for engine in ("packed", "full"):
        with pytest.raises(SiteError, match="heads 0 to 3"):
            mi.run(llama, examples, mi.ActivationPatching("z", heads=(99,)), engine=engine)
        with pytest.raises(ExamplesError, match=r"position 99 is outside every example; the longest has \d+"):
            mi.run(llama, examples, mi.ActivationPatching("z", positions=(99,)), engine=engine)
    with pytest.raises(NeedsError, match="must be a kind, such as 'resid_pre'"):
        mi.ActivationPatching("resid_pre.3")
    for twice, said in (({"layers": (1, 0, 1)}, "Got z.1 twice"), ({"positions": ("end", 0, "end")}, "Got end twice")):
        with pytest.raises(NeedsError, match=said):
            mi.run(llama, examples, mi.ActivationPatching("z", **twice))


def test_hidden_states_that_somebody_asked_for_leave_sweeps_packed() -> None:
    """transformers leaves hooks behind that look at hidden states; they are nobody's intervention."""
    model = mi.testing.tiny("llama")
    model.hf(torch.tensor([[5, 6, 7]]), output_hidden_states=True)
    assert mi.testing.hook_count(model.hf) > 0
    assert why_full(model, mi.Sweep(mi.logit_diff(), mi.sites.resid_pre())) is None
    handle = model.hf.model.layers[1].register_forward_hook(lambda *_: None)
    assert "must see every row" in (why_full(model, mi.Sweep(mi.logit_diff(), mi.sites.resid_pre())) or "")
    handle.remove()


def test_rows_that_change_nothing_leave_the_unedited_runs_alone_in_flight(
    model: mi.Model, ids: list[list[int]]
) -> None:
    pairs = mi.Examples.pairs([ids[0]], [ids[0]], answers=[(5, 9)])
    sweep = mi.Sweep(mi.logit_diff(), mi.sites.resid_pre())
    swept = sweep_packed(model, model.tokenize(pairs).batch([0]), sweep)
    assert swept.values is not None and swept.base is not None
    assert torch.equal(swept.values, swept.base.view(1, 1).expand_as(swept.values))
