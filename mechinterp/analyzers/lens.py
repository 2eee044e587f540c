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
from mechinterp.sites import Position

TOKENS_AT_ONCE = 256
"""Residuals unembedded together: enough for a good matrix product, little beside the vocabulary."""


@dataclass(frozen=True)
class LogitLens(Analyzer):
    """W_U · norm(resid_post) at every layer (nostalgebraist 2020).

    The last layer's lens is the model's own prediction. Earlier layers are read through the final
    norm and unembedding, which were never trained for them: a biased view of early layers.

    Result (``layer example``, and ``position`` when there are several): ``prob`` and ``rank`` of the
    best right answer (rank 0 is the top), ``logit_diff`` where there are wrong answers, ``entropy``
    in nats; ``top_token``, ``top_prob`` (with axis ``k``); over examples ``mean_prob`` with its
    bootstrap interval.

    Attributes:
        top_k: tokens listed for every layer.
        positions: where to look; one, several, or None for all.
        layers: None for all.
    """

    top_k: int = 5
    positions: Position | tuple[Position, ...] | None = "end"
    layers: tuple[int, ...] | None = None

    def needs(self, model: Model) -> Needs:
        return Needs(reads=sites.resid_post(self.layers, positions=self.positions))

    def observe(self, batch: Batch) -> Part:
        resid = batch.clean.stack("resid_post")  # layer example [position] d_model
        shape, many = resid.shape[:-1], resid.ndim == 4
        flat = resid.flatten(1, -2)
        answers, wrong = _answers(batch)
        if many:
            answers = [a.repeat_interleave(shape[2], 0) for a in answers]
            wrong = [a.repeat_interleave(shape[2], 0) for a in wrong]
        rows = [
            torch.cat(columns)
            for columns in zip(
                *(
                    self._read(flat[layer, i : i + TOKENS_AT_ONCE], batch.model, _cut(answers, i), _cut(wrong, i))
                    for layer in range(shape[0])
                    for i in range(0, flat.shape[1], TOKENS_AT_ONCE)
                ),
                strict=True,
            )
        ]
        axes = "layer example position" if many else "layer example"
        entropy, top_prob, top_id = rows[0].view(shape), rows[1].view(*shape, -1), rows[2].view(*shape, -1)
        values: dict[str, tuple[Any, str]] = {}
        if answers:
            values |= {"prob": (rows[3].view(shape), axes), "rank": (rows[4].view(shape), axes)}
        if wrong:
            values["logit_diff"] = (rows[5].view(shape), axes)
        values["entropy"] = (entropy, axes)
        values["top_prob"] = (top_prob, f"{axes} k")
        values["top_id"] = (top_id, f"{axes} k")
        return Part(values)

    def _read(self, resid: Tensor, model: Model, answers: list[Tensor], wrong: list[Tensor]) -> list[Tensor]:
        """Entropy, top probabilities and ids, then what is known of the answers, for ``token d_model``."""
        logits = model.unembed(model.norm(resid)).float()
        logprobs = logits - logits.logsumexp(-1, keepdim=True)
        top = logits.topk(self.top_k, -1)
        out = [-(logprobs.exp() * logprobs).sum(-1), logprobs.gather(1, top.indices).exp(), top.indices]
        if answers:
            best = logits.gather(1, answers[0]).amax(1)
            out += [logprobs.gather(1, answers[0]).amax(1).exp(), (logits > best[:, None]).sum(1)]
        if wrong:
            out.append(logits.gather(1, answers[0]).mean(1) - logits.gather(1, wrong[0]).mean(1))
        return out

    def combine(self, parts: Iterator[Part], context: Context) -> Result:
        result = Result.of(parts, unit="probability")
        data = result.data
        ids = data["top_id"].values
        names = context.model.to_str_tokens(ids.clip(min=0).ravel().tolist())
        data["top_token"] = (data["top_id"].dims, np.where(ids < 0, "", np.array(names, dtype=str).reshape(ids.shape)))
        views: list[View] = []
        if "prob" in data:
            over = data["prob"].transpose("example", ...)
            summary = summarize(over.values, context.seed)
            dims = over.dims[1:]
            data["mean_prob"], data["ci_low"], data["ci_high"] = (
                (dims, summary.mean),
                (dims, summary.ci_low),
                (dims, summary.ci_high),
            )
            title = "Logit lens: probability of the right answer"
            views.append(View("lines", "mean_prob", "layer", title=title, unit="probability"))
        views.append(
            View(
                "heatmap",
                "top_prob",
                "example",
                "layer",
                text="top_token",
                title="Logit lens: top token",
                unit="probability",
                select={"k": 0},
            )
        )
        if "position" in data.dims:
            views[-1] = View(
                "heatmap",
                "top_prob",
                "position",
                "layer",
                text="top_token",
                title="Logit lens: top token of the first example",
                unit="probability",
                select={"k": 0, "example": 0},
            )
        return Result(data, {"top_k": self.top_k}, tuple(views))


def _answers(batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
    """Right and wrong answer ids, ``example answers``; empty lists where there are none."""
    answers = batch.examples.answers
    if answers is None:
        return [], []
    return [batch.examples.side(0)], [batch.examples.side(1)] if all(len(a) > 1 for a in answers) else []


def _cut(columns: Sequence[Tensor], start: int) -> list[Tensor]:
    return [c[start : start + TOKENS_AT_ONCE] for c in columns]
