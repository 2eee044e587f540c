"""Gradients by layer and position, and which neurons a metric rests on, checked by ablating them."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from torch import Tensor

from mechinterp import sites
from mechinterp.analyzers.neuron_sets import RANDOM, curves, switched_off
from mechinterp.core.analyzer import Analyzer, Batch, Context, Grad, Model, Needs, Path, Sweep
from mechinterp.core.interventions import Zero
from mechinterp.core.metrics import Metric, answer_logit
from mechinterp.core.result import Part, Result, View
from mechinterp.core.statistics import summarize
from mechinterp.core.tokens import BASELINES, Baseline
from mechinterp.errors import NeedsError
from mechinterp.sites import Site

KINDS = ("resid_post", "attn_out", "mlp_out")
NeuronMethod: TypeAlias = Literal["gradient", "gradient-x-activation", "integrated-gradients"]


@dataclass(frozen=True)
class GradientAnalysis(Analyzer):
    """How large the gradient of a metric is: at the input, in each layer, and at each head's attention.

    Result: ``norm`` (``kind example layer position``), the L2 norm of the gradient at the vector of each token, for
    resid_post, attn_out and mlp_out; ``input_norm`` (``example position``), the same at the embeddings;
    ``attention_norm`` (``example layer head``), the Frobenius norm of the gradient at a head's pattern; all in units
    of the metric for each unit of activation (of attention). ``by_layer`` (``kind layer``) with ``ci_low, ci_high``
    is the mean over examples of the norm of all positions together, with a 95% bootstrap interval. ``token``
    (``example position``) is the text. At the input it is the saliency of Simonyan et al. (2014). A gradient is
    what an infinitely small change would do: where a component is saturated it is small though the component matters.

    Attributes:
        metric: what is differentiated.
        attention: whether patterns are differentiated too, in a pass of its own with the explicit softmax.
    Raises:
        NeedsError: weights of 4 bits, or a metric without a gradient.
    """

    metric: Metric = field(default_factory=answer_logit)
    attention: bool = True

    def needs(self, model: Model) -> Needs:
        check_gradients(self.name, model)
        stream = (sites.embed(), sites.resid_post(), sites.attn_out(), sites.mlp_out())
        grads = {"stream": Grad(stream, self.metric)}
        if self.attention:
            grads["attention"] = Grad(sites.pattern(), self.metric)
        return Needs(grads=grads)

    def observe(self, batch: Batch) -> Part:
        n, mask = batch.model.dims.n_layers, batch.examples.mask
        grads = batch.grads["stream"]
        norms = torch.stack([torch.stack([_norm(grads[Site(kind, i)]) for i in range(n)], 1) for kind in KINDS])
        whole = norms.masked_fill(~mask[:, None], 0.0).norm(dim=-1)
        values: dict[str, tuple[Tensor, str]] = {
            "norm": (norms, "kind example layer position"),
            "whole": (whole, "kind example layer"),
            "input_norm": (_norm(grads[sites.embed()]), "example position"),
            "id": (batch.examples.ids, "example position"),
        }
        if self.attention:
            patterns = batch.grads["attention"]
            each = [patterns[Site("pattern", i)].float().flatten(2).norm(dim=-1) for i in range(n)]
            values["attention_norm"] = torch.stack(each, 1), "example layer head"
        return Part(values, coords={"kind": list(KINDS), "layer": list(range(n))})

    def combine(self, parts: Iterator[Part], context: Context) -> Result:
        data = Result.of(parts, unit=f"gradient of {self.metric.label}").data
        whole = summarize(data["whole"].transpose("example", "kind", "layer").values, context.seed)
        new = {"by_layer": whole.mean, "ci_low": whole.ci_low, "ci_high": whole.ci_high}
        token = token_texts(context.model, data["id"].transpose("example", "position").values)
        data = data.drop_vars(["whole", "id"]).assign({k: (("kind", "layer"), v) for k, v in new.items()})
        data = data.assign(token=(("example", "position"), token))
        first = [*new, "input_norm", "token", "norm"]
        data = data[[*first, *(str(v) for v in data.data_vars if v not in first)]]
        unit = "norm of the gradient"
        views = (
            View("lines", "by_layer", "layer", by="kind", title="Gradient by layer, all positions", unit=unit),
            View(
                "heatmap", "norm", "position", "layer", title="Gradient at resid_post", unit=unit,
                select={"kind": "resid_post"}, x_text="token",
            ),
        )  # fmt: skip
        if self.attention:
            views += (View("heatmap", "attention_norm", "head", "layer", title="Gradient at attention", unit=unit),)
        return Result(data, {}, views)


@dataclass(frozen=True)
class NeuronImportance(Analyzer):
    """Which MLP neurons a metric rests on, ranked by gradients and checked by switching them off together.

    ``score`` of a neuron (at mlp_act, the input of the MLP's last matrix), summed over positions and averaged over
    examples: ``"gradient"``, the mean size of its gradient; ``"gradient-x-activation"``, activation · gradient, to
    first order what zeroing it would take from the metric (Molchanov et al. 2017; with its sign: positive helps);
    ``"integrated-gradients"``, the same with the gradient averaged over `steps` points between the baseline embedding
    and the input (after Sundararajan et al. 2017; scores of a layer do not add up to the metric's change).
    They are approximations: later layers may compensate or amplify what a neuron does. So a second round zeroes
    the `top` neurons together, for each size in `sizes`, beside as many random ones.

    Result: ``score``, ``rank`` (0 for the largest \\|score\\|) and ``mean_activation`` over ``layer neuron``;
    ``layer_share`` (``layer``), of the sum of all \\|score\\|; over
    ``order`` (``"ranked"``, ``"random"``) and ``size`` the metric that is left, ``curve``, with ``ci_low, ci_high``
    (95% bootstrap over examples; of the mean of 5 random sets), and ``clean``, the metric as it is (``example``). A
    ranking on these same examples makes the curve steeper than new ones would show.

    Attributes:
        metric: what the neurons are for.
        method: how they are ranked.
        sizes: how many are switched off together.
        steps, baseline: of integrated gradients.
        seed: of the random sets.
    Raises:
        NeedsError: an unknown method, sizes that are none or more than there are, weights of 4 bits. SiteError: fused
            experts, which have no neurons to hook.
    """

    metric: Metric = field(default_factory=answer_logit)
    method: NeuronMethod = "gradient-x-activation"
    sizes: tuple[int, ...] = (1, 4, 16, 64, 256)
    steps: int = 20
    baseline: Baseline = "mean"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("method", get_args(NeuronMethod)), ("baseline", BASELINES)):
            if getattr(self, name) not in known:
                raise NeedsError(
                    f"The {name} of NeuronImportance must be one of {', '.join(known)}. Got {getattr(self, name)!r}"
                )
        if not self.sizes or min(self.sizes) < 1 or self.steps < 2:
            raise NeedsError(
                f"The sizes of NeuronImportance must be 1 or more and its steps 2. Got {self.sizes}, {self.steps}"
            )

    def needs(self, model: Model) -> Needs:
        check_gradients(self.name, model)
        there = model.dims.n_layers * model.dims.d_mlp
        if max(self.sizes) > there:
            raise NeedsError(f"{max(self.sizes)} neurons cannot be switched off: there are {there}; give smaller sizes")
        path = Path.of(self.baseline, self.steps) if self.method == "integrated-gradients" else None
        return Needs(reads=sites.mlp_act(), grads={"mlp_act": Grad(sites.mlp_act(), self.metric, along=path)})

    def observe(self, batch: Batch) -> Part:
        mask = batch.examples.mask
        scores, acts = [], []
        for layer in range(batch.model.dims.n_layers):
            grad, act = (of[Site("mlp_act", layer)].float() for of in (batch.grads["mlp_act"], batch.clean))
            each = grad.abs() if self.method == "gradient" else grad * act
            scores.append(each[mask].double().sum(0))
            acts.append(act[mask].double().sum(0))
        sums = {"score": (torch.stack(scores), "layer neuron"), "act": (torch.stack(acts), "layer neuron")}
        return Part({**sums, "tokens": (mask.sum(), "")})

    def merge(self, a: Part, b: Part) -> Part:
        values = {name: (value + b.values[name][0], axes) for name, (value, axes) in a.values.items()}
        return Part(values, coords=a.coords, rows=a.rows + b.rows)

    def combine(self, parts: Iterator[Part], context: Context) -> Analyzer:
        part = next(parts)
        score = part.values["score"][0].numpy() / len(part.rows)
        act = part.values["act"][0].numpy() / float(part.values["tokens"][0])
        return _SwitchedOff(self, Ranking(score, act))


@dataclass(frozen=True, eq=False)
class Ranking:
    """Scores and mean activations of neurons, ``layer neuron``."""

    score: npt.NDArray[np.floating]
    act: npt.NDArray[np.floating]

    @property
    def order(self) -> npt.NDArray[np.intp]:
        """Flat numbers of the neurons, the largest |score| first."""
        return np.argsort(-np.abs(self.score).ravel(), kind="stable")


@dataclass(frozen=True)
class _SwitchedOff(Analyzer):
    """The second round of `NeuronImportance`: the first neurons of the ranking, and random ones, zeroed together."""

    asked: NeuronImportance
    ranking: Ranking

    def _sets(self) -> list[npt.NDArray[np.intp]]:
        """The ranked sets, then `RANDOM` random ones for each size."""
        order, rng = self.ranking.order, np.random.default_rng(self.asked.seed)
        shuffled = [rng.permutation(order) for _ in range(RANDOM)]
        return [one[:size] for one in (order, *shuffled) for size in self.asked.sizes]

    def needs(self, model: Model) -> Needs:
        layers, neurons = self.ranking.score.shape
        rows = tuple(switched_off(chosen, range(layers), neurons, Zero) for chosen in self._sets())
        return Needs(sweeps={"off": Sweep(self.asked.metric, rows=rows, base="clean")})

    def observe(self, batch: Batch) -> Part:
        swept = batch.sweeps["off"]
        assert swept.values is not None and swept.base is not None
        return Part({"left": (swept.values, "example row"), "clean": (swept.base, "example")})

    def combine(self, parts: Iterator[Part], context: Context) -> Result:
        data = Result.of(parts).data
        curve = summarize(curves(data["left"].transpose("example", "row").values, self.asked.sizes), context.seed)
        score = self.ranking.score
        rank = np.empty(score.size, int)
        rank[self.ranking.order] = np.arange(score.size)
        neurons = {"score": score, "mean_activation": self.ranking.act, "rank": rank.reshape(score.shape)}
        drawn = {"curve": curve.mean, "ci_low": curve.ci_low, "ci_high": curve.ci_high}
        out = xr.Dataset(
            {
                **{name: (("layer", "neuron"), value) for name, value in neurons.items()},
                **{name: (("order", "size"), value) for name, value in drawn.items()},
                "clean": ("example", data["clean"].values),
            },
            {"layer": np.arange(len(score)), "neuron": np.arange(score.shape[1]), "example": data["example"].values}
            | {"order": ["ranked", "random"], "size": list(self.asked.sizes)},
            {"unit": str(self.asked.metric)},
        )
        size = np.abs(score).sum(1)
        out = out.assign(layer_share=("layer", size / max(float(size.sum()), 1e-30)))
        views = (
            View(
                "lines", "curve", "size", by="order", title="Metric with neurons switched off", unit="metric", log=True
            ),
            View("bars", "layer_share", "layer", title="Share of all |score| by layer", unit="share"),
        )
        return Result(out, {}, views)


def check_gradients(name: str, model: Model, instead: str = "") -> None:
    """Raise where weights cannot be differentiated through.

    Raises:
        NeedsError: they have 4 bits.
    """
    if getattr(model.hf, "is_loaded_in_4bit", False):
        raise NeedsError(f"{name} needs gradients, and {model.name} has 4-bit weights; {instead}load it in bfloat16")


def token_texts(model: Model, ids: npt.NDArray[np.integer]) -> npt.NDArray[Any]:
    """Tokens as text, ``example position``; empty where there is none (-1)."""
    rows = [model.to_str_tokens(row[row >= 0].tolist()) for row in ids]
    return np.array([[*row, *[""] * (ids.shape[1] - len(row))] for row in rows])


def _norm(grad: Tensor) -> Tensor:
    return grad.float().norm(dim=-1)
