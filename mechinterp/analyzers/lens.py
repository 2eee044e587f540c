"""Logit lens: what the residual stream would predict if the model stopped at each layer."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mechinterp import sites
from mechinterp.core.analyzer import Analyzer, Batch, Context, Model, Needs
from mechinterp.core.result import Part, Result, View
from mechinterp.core.statistics import summarize
from mechinterp.errors import NeedsError
from mechinterp.sites import Position

MEASURES = ("prob", "rank", "logit_diff")
TOKENS_AT_ONCE = 256
"""Residuals unembedded together: enough for a good matrix product, little beside the vocabulary."""


@dataclass(frozen=True)
class LogitLens(Analyzer):
    """W_U · norm(resid_post) at every layer (nostalgebraist 2020).

    The last layer's lens is the model's own prediction. Earlier layers are read through the final
    norm and unembedding, which were never trained for them: a biased view of early layers.

    Result (``layer example``, and ``position`` when there are several): ``prob`` and ``rank`` of the
    best right answer (rank 0 is the top), ``logit_diff`` where there are wrong answers, ``entropy``
    in nats; ``top_token``, ``top_prob`` (with axis ``k``); ``mean`` over examples of each
    ``measure`` with its bootstrap interval.

    Attributes:
        top_k: tokens listed for every layer.
        positions: where to look; one, several, or None for all.
        layers: None for all.
    """

    top_k: int = 5
    positions: Position | tuple[Position, ...] | None = "end"
    layers: tuple[int, ...] | None = None

    def needs(self, model: Model) -> Needs:
        if self.top_k < 1:
            raise NeedsError(f"The top_k of LogitLens must be at least 1. Got {self.top_k}")
        return Needs(reads=sites.resid_post(self.layers, positions=self.positions))

    def observe(self, batch: Batch) -> Part:
        resid = batch.clean.stack("resid_post")  # layer example [position] d_model
        shape, flat = resid.shape[:-1], resid.flatten(0, -2)
        of_one_layer = torch.arange(shape[1], device=resid.device).repeat_interleave(shape[2:].numel())
        example = of_one_layer.repeat(shape[0])  # whose residual each row is
        pieces = [
            self._read(flat[i : i + TOKENS_AT_ONCE], example[i : i + TOKENS_AT_ONCE], batch)
            for i in range(0, len(flat), TOKENS_AT_ONCE)
        ]
        axes = "layer example position" if resid.ndim == 4 else "layer example"
        values: dict[str, tuple[Any, str]] = {}
        for name, first in pieces[0].items():
            whole = torch.cat([piece[name] for piece in pieces])
            values[name] = (whole.view(*shape, *first.shape[1:]), axes if first.ndim == 1 else f"{axes} k")
        coords: dict[str, Sequence[Any]] = {}
        if resid.ndim == 4 and self.positions is not None:  # chosen ones, rather than every token
            names = self.positions if isinstance(self.positions, tuple) else range(shape[2])
            coords["position"] = list(names)
        return Part(values, coords=coords)

    def _read(self, resid: Tensor, example: Tensor, batch: Batch) -> dict[str, Tensor]:
        """What the lens says of some residuals, ``token d_model``, of the given rows of the batch."""
        logits = batch.model.unembed(batch.model.norm(resid)).float()
        total = logits.logsumexp(-1)
        out: dict[str, Tensor] = {}
        if batch.examples.answers is not None:
            best = logits.gather(1, batch.examples.side(0)[example]).amax(1)
            out["prob"] = (best - total).exp()
            out["rank"] = (logits > best[:, None]).sum(1)
        if batch.examples.two_sided:
            ids, weights = batch.examples.contrast()
            out["logit_diff"] = (logits.gather(1, ids[example]) * weights[example]).sum(1)
        top = logits.topk(min(self.top_k, logits.shape[-1]), -1)
        # -Σ p log p = log Z - Σ p · logit: one product instead of a second pass over the vocabulary
        probs = (logits - total[:, None]).exp_()
        out["entropy"] = total - torch.linalg.vecdot(probs, logits)
        out["top_prob"], out["top_id"] = (top.values - total[:, None]).exp(), top.indices
        padding = resid.isnan().any(-1)  # of spans that are shorter in some examples
        for name in ("rank", "top_id"):
            if name in out:
                out[name][padding] = -1
        return out

    def combine(self, parts: Iterator[Part], context: Context) -> Result:
        result = Result.of(parts, unit="probability")
        data = result.data
        ids = data["top_id"].values
        unique, where = np.unique(ids.clip(min=0), return_inverse=True)
        names = np.array(context.model.to_str_outputs(unique.tolist()), dtype=str)
        data["top_token"] = (data["top_id"].dims, np.where(ids < 0, "", names[where.reshape(ids.shape)]))
        measures = [name for name in MEASURES if name in data]
        if measures:
            over = [data[name].transpose("example", ...) for name in measures]
            found = [summarize(one.values, context.seed) for one in over]
            dims = ("measure", *over[0].dims[1:])
            data = data.assign_coords(measure=measures)
            for name in ("mean", "ci_low", "ci_high"):
                data[name] = (dims, np.stack([getattr(one, name) for one in found]))
        return Result(data, {"top_k": self.top_k}, _views(measures, "position" in data.dims))


def _views(measures: list[str], many: bool) -> tuple[View, ...]:
    titles = {
        "prob": ("Logit lens: probability of the right answer", "probability"),
        "logit_diff": ("Logit lens: right answer against wrong", "logit difference"),
    }
    lines = [
        View(
            "lines", "mean", "layer", title=title, unit=unit, by="position" if many else None, select={"measure": name}
        )
        for name, (title, unit) in titles.items()
        if name in measures
    ]
    top = View(
        "heatmap",
        "top_prob",
        "position" if many else "example",
        "layer",
        text="top_token",
        title="Logit lens: top token" + (" of the first example" if many else ""),
        unit="probability",
        select={"k": 0, "example": 0} if many else {"k": 0},
    )
    return (*lines, top)
