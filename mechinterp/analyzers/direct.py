"""Direct logit attribution: what each head and MLP writes along the answer's direction."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from mechinterp import sites
from mechinterp.core.analyzer import Analyzer, Batch, Context, Model, Needs
from mechinterp.core.result import Part, Result, View
from mechinterp.core.statistics import summarize
from mechinterp.sites import Position


@dataclass(frozen=True)
class DirectLogitAttribution(Analyzer):
    """(c ⊙ γ / rms(x_L)) · (W_U[right] − W_U[wrong]) for every component c (Elhage et al. 2021; Wang et al. 2023).

    rms is that of the run itself, so the components (embedding, every head, every MLP, and biases
    where there are any) sum to the logit difference exactly; answer sets are averaged. Without
    wrong answers it is the right answer's logit that is split. It says what is written directly,
    not what a component changes through later ones.

    Result: ``attribution`` (``example component``) in logits, with ``mean``, bootstrap interval, ``p``
    and ``q`` for every component, and coordinates ``layer``, ``head`` (-1 where it has none) and ``type``.

    Attributes:
        positions: the one position whose prediction is split.
    """

    positions: Position = "end"

    def needs(self, model: Model) -> Needs:
        at = self.positions
        last = model.dims.n_layers - 1
        return Needs(
            reads=[
                sites.embed(positions=at),
                sites.z(positions=at),
                sites.mlp_out(positions=at),
                sites.resid_post(last, positions=at),
            ]
        )

    def observe(self, batch: Batch) -> Part:
        model = batch.model
        final = batch.clean[sites.resid_post(model.dims.n_layers - 1)].float()  # example d_model
        ids, weights = batch.examples.contrast()
        along = torch.einsum("nad,na->nd", model.W_U[ids].float(), weights)
        direction = model.norm_scale(final) * along
        columns = [(batch.clean[sites.embed()].float() * direction).sum(-1, keepdim=True)]
        z, mlp = batch.clean.stack("z").float(), batch.clean.stack("mlp_out").float()
        for layer in range(model.dims.n_layers):
            # The direction pulled back through W_O, so that no head_out is built.
            read_out = torch.einsum("hed,nd->nhe", model.W_O(layer).float(), direction)
            columns.append((z[layer] * read_out).sum(-1))
            columns.append((mlp[layer] * direction).sum(-1, keepdim=True))
            bias = model.b_O(layer)
            if bias is not None:
                columns.append((direction @ bias.float())[:, None])
        if model.b_U is not None:
            columns.append((model.b_U[ids].float() * weights).sum(1, keepdim=True))
        return Part(torch.cat(columns, 1), "example component")

    def combine(self, parts: Iterator[Part], context: Context) -> Result:
        data = Result.of(parts, unit="logits").data.rename(value="attribution")
        names, types, layers, heads = zip(*_components(context.model), strict=True)
        data = data.assign_coords(
            component=list(names),
            type=("component", list(types)),
            layer=("component", list(layers)),
            head=("component", list(heads)),
        )
        summary = summarize(data["attribution"].values, context.seed)
        for name in ("mean", "ci_low", "ci_high", "p", "q"):
            data[name] = ("component", getattr(summary, name).astype(np.float32))
        views = (
            View(
                "heatmap",
                "mean",
                "head",
                "layer",
                title="Direct logit attribution of heads",
                unit="logits",
                center=0.0,
                select={"type": "head"},
            ),
            View("bars", "mean", "component", title="Direct logit attribution: largest components", unit="logits"),
        )
        return Result(data, {}, views)


def _components(model: Model) -> list[tuple[str, str, int, int]]:
    """(name, type, layer, head) in the order of the columns."""
    out: list[tuple[str, str, int, int]] = [("embed", "embed", -1, -1)]
    for layer in range(model.dims.n_layers):
        out += [(f"a{layer}.h{h}", "head", layer, h) for h in range(model.dims.n_heads)]
        out.append((f"m{layer}", "mlp", layer, -1))
        if model.b_O(layer) is not None:
            out.append((f"a{layer}.bias", "bias", layer, -1))
    if model.b_U is not None:
        out.append(("logits.bias", "bias", -1, -1))
    return out
