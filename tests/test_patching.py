"""Activation patching of sets of heads and neurons and of several kinds; its tokens; figures that mislead nobody."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import mechinterp as mi
from mechinterp.core.statistics import fdr
from mechinterp.errors import NeedsError, SiteError
from mechinterp.report.panels import Bars, Heat, Heats, Lines, panel
from mechinterp.testing import tiny


@pytest.fixture
def pairs(model: mi.Model, ids: list[list[int]]) -> mi.Examples:
    """Seven pairs of random tokens, six to nine of them, with answers."""
    rows = [[(i * 7 + k) % model.dims.vocab for i in row] for k in range(3) for row in ids][:7]
    clean = [row[: 9 - k % 4] for k, row in enumerate(rows)]
    corrupted = [[row[0], *[(i + 5) % model.dims.vocab for i in row[1:]]] for row in clean]
    return mi.Examples.pairs(clean, corrupted, answers=[(3 + k, 11) for k in range(7)])


def one(result: mi.Result, name: str = "patched") -> np.ndarray:
    return result.data[name].transpose("example", ...).values


# Laws


def test_the_set_of_all_heads_is_the_whole_site(model: mi.Model, pairs: mi.Examples) -> None:
    every = tuple(range(model.dims.n_heads))
    sets, whole = mi.run(
        model, pairs, [mi.ActivationPatching("z", heads=(every, 1)), mi.ActivationPatching("z", heads=None)]
    )
    label = "+".join(map(str, every))
    assert list(sets.data["head"].values) == [label, "1"]
    np.testing.assert_allclose(one(sets)[..., 0], one(whole), atol=1e-5)
    single = mi.run(model, pairs, mi.ActivationPatching("z", heads=(1,)))
    np.testing.assert_allclose(one(sets)[..., 1], one(single)[..., 0], atol=1e-5)
    assert np.nanmax(np.abs(one(single)[..., 0] - one(whole))) > 1e-4  # or nothing was told apart


def test_a_set_of_heads_by_hand(model: mi.Model, pairs: mi.Examples) -> None:
    """Against plain hooks on the input of o_proj."""
    result = mi.run(model, pairs, mi.ActivationPatching("z", heads=((0, 3), (2,)), positions="end"))
    width = model.dims.d_head
    for row, (clean, corrupted) in enumerate(zip(pairs.texts, pairs.corrupted or (), strict=True)):
        for layer in range(model.dims.n_layers):
            for column, heads in enumerate([(0, 3), (2,)]):
                modules = model.hf.model.layers[layer].self_attn.o_proj
                channels = [h * width + i for h in heads for i in range(width)]
                expected = by_hand(model, modules, channels, clean, corrupted, (3 + row, 11))
                assert float(result.data["patched"][row, layer, column]) == pytest.approx(expected, abs=1e-4)


def by_hand(model: mi.Model, module: Any, channels: list[int], clean: Any, corrupted: Any, answers: Any) -> float:
    """Logit difference of the corrupted prompt with the clean run's channels of a module's input at the last token."""
    kept: list[torch.Tensor] = []
    hook = module.register_forward_pre_hook(lambda _, args: kept.append(args[0][0, -1, channels].clone()))
    with torch.no_grad():
        model.hf(torch.tensor([clean]))
    hook.remove()

    def write(_: Any, args: Any) -> Any:
        value = args[0].clone()
        value[0, -1, channels] = kept[0]
        return (value, *args[1:])

    hook = module.register_forward_pre_hook(write)
    with torch.no_grad():
        logits = model.hf(torch.tensor([corrupted])).logits[0, -1]
    hook.remove()
    return float(logits[answers[0]] - logits[answers[1]])


def test_neurons_by_hand_and_all_of_them(model: mi.Model, pairs: mi.Examples) -> None:
    analyzer = mi.ActivationPatching("mlp_act", neurons=((1, 5, 8), 2), positions="end")
    if model.arch.family == "qwen3_moe":  # its experts are fused
        with pytest.raises(SiteError, match="mlp_act"):
            mi.run(model, pairs, analyzer)
        return
    result = mi.run(model, pairs, analyzer)
    assert list(result.data["neuron"].values) == ["1+5+8", "2"]
    for row in (0, 3):
        for layer in range(model.dims.n_layers):
            for column, neurons in enumerate([[1, 5, 8], [2]]):
                module = model.hf.model.layers[layer].mlp.down_proj
                texts = pairs.texts[row], (pairs.corrupted or ())[row]
                expected = by_hand(model, module, neurons, *texts, (3 + row, 11))
                assert float(result.data["patched"][row, layer, column]) == pytest.approx(expected, abs=1e-4)
    every = tuple(range(model.dims.d_mlp))
    whole = mi.run(model, pairs, mi.ActivationPatching("mlp_act", positions="end"))
    sets = mi.run(model, pairs, mi.ActivationPatching("mlp_act", positions="end", neurons=(every,)))
    np.testing.assert_allclose(one(sets)[..., 0], one(whole), atol=1e-5)
    each = mi.run(model, pairs, mi.ActivationPatching("mlp_act", positions="end", neurons="each", layers=(1,)))
    assert each.data.sizes["neuron"] == model.dims.d_mlp
    np.testing.assert_allclose(one(each)[:, 0, 2], one(result)[:, 1, 1], atol=1e-5)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_several_kinds_are_each_of_them_alone(model: mi.Model, pairs: mi.Examples, direction: Any) -> None:
    kinds = ("resid_mid", "mlp_out", "attn_out")
    options: dict[str, Any] = {"direction": direction, "layers": (2, 0)}
    together = mi.run(model, pairs, mi.ActivationPatching(kinds, **options))
    assert together.data["effect"].dims == ("kind", "layer", "position")
    assert list(together.data["layer"].values) == [2, 0]
    for kind in kinds:
        alone = mi.run(model, pairs, mi.ActivationPatching(kind, **options))
        for name in ("effect", "ci_low", "ci_high", "p"):
            np.testing.assert_allclose(together.data[name].sel(kind=kind), alone.data[name], atol=1e-4, rtol=1e-4)
        np.testing.assert_allclose(together.data["patched"].sel(kind=kind), alone.data["patched"], atol=1e-5)
    np.testing.assert_allclose(together.data["q"], fdr(together.data["p"].values))  # over all kinds


@pytest.mark.parametrize("options", [{}, {"batch_size": 2}, {"batch_size": 3, "padding_side": "left"}])
def test_tokens_are_the_clean_prompts_own(model: mi.Model, pairs: mi.Examples, options: dict[str, Any]) -> None:
    data = mi.run(model, pairs, mi.ActivationPatching("attn_out", layers=(0,)), **options).data
    assert data["token"].dims == ("example", "position")
    for row, text in enumerate(pairs.texts):
        expected = [*model.to_str_tokens(list(text)), *[""] * (data.sizes["position"] - len(text))]
        assert list(data["token"].values[row]) == expected
    named = mi.run(model, pairs, mi.ActivationPatching("attn_out", layers=(0,), positions=(0, "end")))
    assert "token" not in named.data


# Figures


def shown(result: mi.Result) -> list[Any]:
    return [panel(result, view) for view in result.views]


def cells(drawn: Any) -> np.ndarray:
    """The numbers of one figure."""
    if isinstance(drawn, Lines):
        return np.concatenate([s.values for s in drawn.series])
    return np.stack([h.values for h in drawn.panels]) if isinstance(drawn, Heats) else drawn.values


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({"site": "resid_pre"}, [Heat]),
        ({"site": "resid_pre", "positions": None}, [Lines]),
        ({"site": ("attn_out", "mlp_out"), "positions": None}, [Lines]),
        ({"site": ("attn_out", "mlp_out")}, [Heats]),
        ({"site": "z", "heads": "each", "positions": "end"}, [Heat]),
        ({"site": "k", "heads": "each", "positions": "end"}, [Heat]),
        ({"site": "z", "heads": "each", "positions": (0, "end")}, [Heats, Bars]),
        ({"site": "z", "heads": ((0, 1), 2)}, [Heats, Bars]),
        ({"site": ("q", "z"), "heads": "each"}, [Bars]),
        ({"site": ("q", "z"), "heads": "each", "positions": "end"}, [Heats]),
        ({"site": "mlp_up", "neurons": (3, 4), "positions": "end"}, [Heat]),
        ({"site": "mlp_up", "neurons": tuple(range(16)), "layers": (0,)}, [Bars]),
        ({"site": "embed"}, [Heat]),
    ],
)
def test_no_cell_of_a_figure_is_a_mean_of_cells(options: dict[str, Any], kinds: list[type]) -> None:
    llama = tiny("llama")
    clean = [[i, i + 7, i + 1, i + 2, i + 3, i + 5, i + 6, i + 4] for i in range(10, 16)]
    corrupted = [[i, i + 8, i + 1, i + 4, i + 3, i + 5, i + 6, i + 4] for i in range(10, 16)]
    examples = mi.Examples.pairs(clean, corrupted, answers=[(3, 4)] * 6)
    result = mi.run(llama, examples, mi.ActivationPatching(**options))
    drawn = shown(result)
    assert [type(d) for d in drawn] == kinds
    effect = result.data["effect"].values
    for one_figure in drawn:
        numbers = cells(one_figure)
        if isinstance(one_figure, Bars):
            assert one_figure.low is not None  # a mean would have no interval
            largest = np.sort(np.abs(effect).ravel())[::-1][: len(numbers)]
            np.testing.assert_allclose(np.abs(numbers), largest, atol=1e-6)
            at = result.data["cell"].values == one_figure.names[0]
            assert at.sum() == 1
            assert numbers[0] == pytest.approx(float(effect[at][0]))
            mi.Site.parse(one_figure.names[0])  # it names a site as everywhere else
        else:
            np.testing.assert_allclose(np.sort(numbers.ravel()), np.sort(effect.ravel()), atol=1e-6)
        if isinstance(one_figure, Heats):
            assert one_figure.shared
        for heat in one_figure.panels if isinstance(one_figure, Heats) else [one_figure]:
            if isinstance(heat, Heat):
                assert heat.q is not None
                tokens = heat.x_name == "position" and options.get("positions", "each") == "each"
                assert (heat.x_text is not None) == tokens


def test_names_of_cells_are_their_sites(llama: mi.Model) -> None:
    examples = mi.Examples.pairs([[5, 6, 7]], [[5, 8, 7]], answers=[(3, 4)])
    data = mi.run(llama, examples, mi.ActivationPatching("z", heads=((0, 2), 3), positions=(1, "end"))).data
    assert data["cell"].sel(layer=1, position="end", head="0+2").item() == "z.1.h0,2@end"
    assert data["cell"].sel(layer=2, head="3").values.tolist() == ["z.2.h3@1", "z.2.h3@end"]


def test_the_axis_of_a_real_prompt_shows_its_tokens(smollm2: mi.Model) -> None:
    """And the name that was changed carries everything at the first layer, the last token at the last one."""
    pair = mi.Examples.pairs(
        ["When Mary and John went to the store, John gave a drink to"],
        ["When Mary and John went to the store, Mary gave a drink to"],
        answers=[(" Mary", " John")],
    )
    result = mi.run(smollm2, pair, mi.ActivationPatching("resid_post", layers=(0, 29)))
    heat = shown(result)[0]
    assert isinstance(heat, Heat)
    assert heat.x_text is not None
    assert " ".join(heat.x_text) == "When ␣Mary ␣and ␣John ␣went ␣to ␣the ␣store , ␣John ␣gave ␣a ␣drink ␣to"
    assert [heat.x_text[i] for i in heat.values.argmax(1)] == ["␣John", "␣to"]
    np.testing.assert_allclose(heat.values.max(1), 1, atol=0.05)


# Bad input


def refused(**options: Any) -> Callable[[], Any]:
    return lambda: mi.ActivationPatching(**options)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (refused(site="resid_pre.3"), "must be a kind, such as 'resid_pre', or a tuple"),
        (refused(site=()), "must be a kind"),
        (refused(site=("resid_pre", "resid_prae")), "must be a kind"),
        (refused(site=("resid_pre", "embed")), "embed has no layers; patch it alone"),
        (refused(site="embed", layers=(0,)), "embed has no layers"),
        (refused(site=("attn_out", "attn_out")), "must be different ones"),
        (refused(site="z", heads="all"), "must be 'each', or a tuple .* Got 'all'"),
        (refused(site="z", heads=()), r"Got \(\)"),
        (refused(site="z", heads=((0, 1), ())), "none of them empty"),
        (refused(site="z", heads=(0, -1)), "counted from 0"),
        (refused(site="z", heads=((0, 1), (1, 0))), "each of them once"),
        (refused(site="z", heads=((0, 0),)), "each of them once"),
        (refused(site="resid_pre", heads="each"), r"'resid_pre'\) has no heads .* z, head_out"),
        (refused(site="resid_pre", neurons="each"), "has no neurons .* mlp_gate, mlp_up, mlp_act"),
        (refused(site="mlp_act", neurons=(1,), heads=(1,)), "heads or neurons, and not both"),
        (refused(site=("z", "v"), heads="each"), "z, v have different axes of heads"),
    ],
)
def test_options_that_make_no_sense(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(NeedsError, match=said):
        make()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"site": "z", "heads": ((0, 4),)}, "heads 0 to 3"),
        ({"site": "mlp_act", "neurons": (9999,)}, "has neurons 0 to"),
    ],
)
def test_what_the_model_lacks(llama: mi.Model, options: dict[str, Any], said: str) -> None:
    examples = mi.Examples.pairs([[5, 6, 7]], [[5, 8, 7]], answers=[(3, 4)])
    with pytest.raises(SiteError, match=f"ActivationPatching: .*{said}"):
        mi.run(llama, examples, mi.ActivationPatching(**options))
