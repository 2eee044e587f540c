"""Token attribution of any Hugging Face sequence classifier: BERT and others that the table of families lacks.

Nothing inside such a model is named, read or written: only its input embeddings, its last hidden state and its logits.
"""

import contextlib
import itertools
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from mechinterp.analyzers.perturbing import Floats, Game, Masks, check_package
from mechinterp.analyzers.token_attribution import MANY, PERTURBING, Method, described
from mechinterp.core.analyzer import Path
from mechinterp.core.result import Result
from mechinterp.errors import ExamplesError, ModelError, NeedsError

Blank: TypeAlias = Literal["mean", "zero", "pad", "mask"]
TOGETHER = 32
"""Inputs in one pass."""
Embedded: TypeAlias = Float[Tensor, "input token d_model"]


def attribute_classifier(
    hf: Any,
    tokenizer: Any,
    texts: Sequence[str],
    method: Method = "integrated-gradients",
    *,
    label: str | None = None,
    baseline: Blank = "mean",
    steps: int = 50,
    tolerance: float = 0.01,
    evaluations: int = 200,
    seed: int = 0,
) -> Result:
    """What each token contributes to a label's log-odds, for any ``…ForSequenceClassification``.

        mi.studies.attribute_classifier(bert, tokenizer, ["A fine film.", "A dull one."], "partition-shap").table()

    The methods, and the result, are those of `TokenAttribution`, which is to be preferred where the model's family has
    a row: it shares passes. Here each text is run alone, in batches of its own variants. The score is the label's
    logit less the log-sum-exp of the others (with two labels their difference; with one output that itself). What
    the tokenizer adds, such as ``[CLS]``, are never masked and get no attribution. ``"head-x-representation"`` is the
    score's gradient at the last hidden state, summed over tokens, times the last hidden state of each: where
    the head is linear in one token's state, its row.

    Args:
        hf: the model; it is run in evaluation mode and left as it was.
        tokenizer: a fast one, which knows where tokens stand in the text.
        label: a name in ``config.id2label``; None for the one that each text is predicted to have.
        baseline: the embedding of a masked token: the vocabulary's mean, 0, the padding or the mask token's.
        steps, tolerance, evaluations, seed: as in `TokenAttribution`.
    Raises:
        ModelError: not such a model, or one that does not take embeddings; no such token for a baseline.
        NeedsError: an option that cannot be. ExamplesError: no texts, a text without tokens, one that is too long, or
            an unknown label.
    """
    labels = _checked(hf, tokenizer, method, baseline, min(steps, evaluations))
    if label is not None and label not in labels:
        raise ExamplesError(f"the model has no label {label!r}; give one of {', '.join(labels)}")
    if isinstance(texts, str) or not len(texts):
        raise ExamplesError(f"give a list of texts, at least one. Got {texts!r}")
    with _still(hf):
        weight = hf.get_input_embeddings().weight.detach()
        blank = _blank(weight, tokenizer, baseline)
        found = [
            _Text.of(hf, tokenizer, text, i, label, blank).attribute(method, steps, tolerance, evaluations, seed)
            for i, text in enumerate(texts)
        ]
    width = max(len(one.attribution) for one in found)

    def table(name: str, fill: Any) -> Any:
        rows = [getattr(one, name) for one in found]
        return ("example", "position"), np.array([[*row, *[fill] * (width - len(row))] for row in rows])

    data = xr.Dataset(
        {
            "attribution": table("attribution", np.nan),
            "token": table("tokens", ""),
            "score": ("example", [one.score for one in found]),
            "baseline_score": ("example", [one.baseline_score for one in found]),
            "label": ("example", [one.label for one in found]),
            **({"steps": ("example", [one.steps for one in found])} if method == "integrated-gradients" else {}),
        },
        {"example": np.arange(len(found)), "position": np.arange(width)},
    )
    result = described(data, method, baseline, f"log-odds of {'the prediction' if label is None else label}")
    return Result(result.data, {**result.meta, "analyzer": "attribute_classifier", "seed": seed}, result.views)


def _checked(hf: Any, tokenizer: Any, method: str, baseline: str, least: int) -> list[str]:
    """The model's labels.

    Raises:
        ModelError, NeedsError: as `attribute_classifier`.
    """
    if not isinstance(hf, torch.nn.Module) or not getattr(getattr(hf, "config", None), "id2label", None):
        raise ModelError(
            f"attribute_classifier takes a Hugging Face …ForSequenceClassification. Got {type(hf).__name__}"
        )
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError("attribute_classifier takes a fast tokenizer, which knows where tokens stand in the text")
    for name, value, known in (("method", method, get_args(Method)), ("baseline", baseline, get_args(Blank))):
        if value not in known:
            raise NeedsError(f"The {name} of attribute_classifier must be one of {', '.join(known)}. Got {value!r}")
    if least < 2:
        raise NeedsError(f"steps and evaluations must be at least 2. Got {least}")
    if method in PERTURBING:
        check_package(method)
    elif getattr(hf, "is_loaded_in_4bit", False):
        raise NeedsError(f"{method} takes gradients, which weights of 4 bits do not have; use method='partition-shap'")
    config: Any = hf.config
    return [str(config.id2label[i]) for i in sorted(config.id2label)][: int(config.num_labels)]


def _blank(weight: Tensor, tokenizer: Any, name: Blank) -> Tensor:
    if name in ("mean", "zero"):
        return weight.mean(0) if name == "mean" else torch.zeros_like(weight[0])
    token = getattr(tokenizer, f"{name}_token_id", None)
    if token is None:
        raise ModelError(f"the tokenizer has no {name} token; use the baseline 'mean' or 'zero'")
    return weight[token]


@contextlib.contextmanager
def _still(hf: Any) -> Generator[None]:
    """In evaluation mode, and as it was afterwards."""
    training = hf.training
    hf.eval()
    try:
        yield
    finally:
        hf.train(training)


@dataclass
class _Text:
    """One text, as the model gets it, and what was found of it."""

    hf: Any
    inputs: Mapping[str, Tensor]
    """What goes with the embeddings, each for one input."""
    own: Embedded
    blank: Tensor
    columns: list[int]
    """Tokens that may be masked."""
    tokens: list[str]
    label: str = ""
    target: int = 0
    attribution: Floats | tuple[()] = ()
    score: float = 0.0
    baseline_score: float = 0.0
    steps: int = 0

    @classmethod
    def of(cls, hf: Any, tokenizer: Any, text: str, number: int, label: str | None, blank: Tensor) -> "_Text":
        encoded = tokenizer(text, return_tensors="pt", return_offsets_mapping=True, return_special_tokens_mask=True)
        offsets, special = (encoded.pop(name)[0].tolist() for name in ("offset_mapping", "special_tokens_mask"))
        inputs = {name: value.to(blank.device) for name, value in encoded.items()}
        ids = inputs.pop("input_ids")
        columns = [i for i, added in enumerate(special) if not added]
        if not columns:
            raise ExamplesError(f"text {number} has no tokens; leave it out")
        longest = getattr(hf.config, "max_position_embeddings", None) or ids.shape[1]
        if ids.shape[1] > longest:
            raise ExamplesError(f"text {number} has {ids.shape[1]} tokens, and the model takes {longest}; cut it")
        # A token's text reaches from the end of the one before, so that words keep the space in front of them.
        ends = [0, *(offsets[i][1] for i in columns)]
        tokens = [text[begin:end] for begin, end in itertools.pairwise(ends)]
        own = hf.get_input_embeddings()(ids).detach()
        one = cls(hf, inputs, own, blank, columns, tokens)
        try:
            logits = one.logits(own)[0]
        except (NotImplementedError, ValueError, TypeError) as error:
            raise ModelError(f"{type(hf).__name__} cannot be run from embeddings ({error}); use another") from error
        if logits.ndim != 1:
            raise ModelError(f"{type(hf).__name__} gives no logits of one text, but {tuple(logits.shape)}; use another")
        names = {str(name): int(i) for i, name in hf.config.id2label.items()}
        one.target = int(logits.argmax()) if label is None else names[label]
        one.label = str(hf.config.id2label[one.target])
        return one

    def logits(self, embedded: Embedded, hidden: bool = False) -> Any:
        """``input label``; with `hidden`, the whole output."""
        more = {name: value.expand(len(embedded), *value.shape[1:]) for name, value in self.inputs.items()}
        out = self.hf(inputs_embeds=embedded, **more, **({"output_hidden_states": True} if hidden else {}))
        return out if hidden else out.logits

    def scores(self, logits: Tensor) -> Tensor:
        """Log-odds of the label, ``input``."""
        logits = logits.float()
        if logits.shape[1] == 1:
            return logits[:, 0]
        others = torch.arange(logits.shape[1], device=logits.device) != self.target
        return logits[:, self.target] - logits[:, others].logsumexp(1)

    def attribute(self, method: Method, steps: int, tolerance: float, evaluations: int, seed: int) -> "_Text":
        ends = self.values(np.stack([np.ones(len(self.columns), bool), np.zeros(len(self.columns), bool)]))
        self.score, self.baseline_score = map(float, ends)
        if method in PERTURBING:
            self.attribution = np.asarray(Game(self.values, self.tokens, evaluations, seed).attribute(method))
        elif method == "integrated-gradients":
            self.attribution = self._integrated(steps, tolerance)
        elif method == "head-x-representation":
            with torch.enable_grad():
                out = self.logits(self.own.clone().requires_grad_(), hidden=True)
                last = out.hidden_states[-1]
                (grad,) = torch.autograd.grad(self.scores(out.logits).sum(), last)
            self.attribution = self._chosen((grad.sum(1, keepdim=True) * last).detach())
        else:
            grad = self.gradient(self.own)
            along = grad.norm(dim=-1, keepdim=True) if method == "saliency" else grad * self.own
            self.attribution = self._chosen(along)
        return self

    @torch.no_grad()
    def values(self, kept: Masks) -> Floats:
        """The score with the tokens masked that are not kept, ``input``."""
        out: list[Tensor] = []
        for some in torch.as_tensor(kept, device=self.own.device).split(TOGETHER):
            embedded = self.own.repeat(len(some), 1, 1)
            embedded[:, self.columns] = torch.where(some[..., None], embedded[:, self.columns], self.blank)
            out.append(self.scores(self.logits(embedded)))
        return torch.cat(out).cpu().numpy()

    def gradient(self, embedded: Embedded) -> Embedded:
        """Of the score, at the embeddings of each input."""
        with torch.enable_grad():
            embedded = embedded.detach().clone().requires_grad_()
            return torch.autograd.grad(self.scores(self.logits(embedded)).sum(), embedded)[0]

    def _integrated(self, steps: int, tolerance: float) -> Floats:
        """Until they add up; the steps that were taken are noted."""
        base, most = self.own.clone(), MANY * steps
        base[:, self.columns] = self.blank
        apart = self.own - base
        while True:
            path = Path.of("mean", steps)
            mean = torch.zeros_like(self.own)
            pairs = torch.tensor([path.shares, path.weights], dtype=self.own.dtype, device=self.own.device)
            for shares, weights in zip(pairs[0].split(TOGETHER), pairs[1].split(TOGETHER), strict=True):
                grad = self.gradient(base + shares[:, None, None] * apart)
                mean += (weights[:, None, None] * grad).sum(0, keepdim=True)
            found, self.steps = self._chosen(mean * apart), steps
            error = abs(self.score - self.baseline_score - found.sum())
            if error <= tolerance * np.abs(found).sum() or 2 * steps > most:
                return found
            steps *= 2

    def _chosen(self, values: Tensor) -> Floats:
        """Summed over the width, of the tokens that may be masked."""
        return values[0, self.columns].float().sum(-1).cpu().numpy()
