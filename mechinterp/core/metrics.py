"""Metrics: what scores a run, one number an example.

A metric says at which positions it needs logits, and of which vocabulary rows, so that nothing else
is computed; or that it scores what is at a site further in, as a probe does. Higher is always the
behaviour under study, except for `kl` and `loss`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.core.tokens import TokenBatch
from mechinterp.errors import ExamplesError, NeedsError
from mechinterp.shapes import Scores
from mechinterp.sites import Site

Rows: TypeAlias = Int[Tensor, "rows"] | None


@dataclass(frozen=True)
class Metric:
    """One number an example from the logits at `positions`. Subclass it, or use the functions below."""

    positions: int | str | None = "end"
    """Where logits are needed; None is every position."""

    label: ClassVar[str] = "metric"
    """What it is called in figures."""

    compares: ClassVar[bool] = False
    """True when `score` needs the logits of the unedited clean run as `reference`."""

    @property
    def site(self) -> Site | None:
        """The site whose values at `positions` are scored in place of logits; None for logits."""
        return None

    def rows(self, batch: TokenBatch) -> Rows:
        """Vocabulary ids whose logits are needed, or None for all of them."""
        return None

    def score(
        self,
        logits: Float[Tensor, "example *chosen rows"],
        batch: TokenBatch,
        rows: Rows,
        reference: Float[Tensor, "example *chosen rows"] | None,
    ) -> Scores:
        """One number an example.

        Args:
            logits: at `positions`; its last axis follows `rows`. Where there is a `site`, its values.
            reference: the clean run's logits, where the metric compares.
        """
        raise TypeError(f"{type(self).__name__} must define score(logits, batch, rows, reference)")


@dataclass(frozen=True)
class LogitDiff(Metric):
    """Mean logit of the right answers minus mean logit of the wrong ones."""

    label: ClassVar[str] = "logit difference"

    def rows(self, batch: TokenBatch) -> Rows:
        batch.side(1)  # raises where there are none
        return batch.contrast()[0].unique()

    def score(self, logits: Tensor, batch: TokenBatch, rows: Rows, reference: Tensor | None) -> Scores:
        return _weigh(logits, rows, *batch.contrast())


@dataclass(frozen=True)
class AnswerLogit(Metric):
    """Mean logit of the right answers."""

    label: ClassVar[str] = "answer logit"

    def rows(self, batch: TokenBatch) -> Rows:
        return batch.side(0).unique()

    def score(self, logits: Tensor, batch: TokenBatch, rows: Rows, reference: Tensor | None) -> Scores:
        return _weigh(logits, rows, batch.side(0), batch.weights(0))


@dataclass(frozen=True)
class LogOdds(Metric):
    """Log of the right answers' total probability minus that of the wrong ones', in nats."""

    label: ClassVar[str] = "log-odds in nats"

    def rows(self, batch: TokenBatch) -> Rows:
        return torch.cat([batch.side(0).flatten(), batch.side(1).flatten()]).unique()

    def score(self, logits: Tensor, batch: TokenBatch, rows: Rows, reference: Tensor | None) -> Scores:
        right, wrong = (
            _chosen(logits, rows, batch.side(k)).masked_fill(batch.weights(k) == 0, -torch.inf).logsumexp(1)
            for k in (0, 1)
        )
        return right - wrong


@dataclass(frozen=True)
class AnswerProb(Metric):
    """Total probability of the right answers; needs the whole vocabulary for its normalisation."""

    label: ClassVar[str] = "answer probability"

    def score(self, logits: Tensor, batch: TokenBatch, rows: Rows, reference: Tensor | None) -> Scores:
        probs = logits.float().softmax(-1).gather(1, batch.side(0))
        return (probs * (batch.weights(0) > 0)).sum(1)


@dataclass(frozen=True)
class KL(Metric):
    """KL(clean run ‖ this run), in nats, at one position."""

    label: ClassVar[str] = "KL divergence"
    compares: ClassVar[bool] = True

    def score(self, logits: Tensor, batch: TokenBatch, rows: Rows, reference: Tensor | None) -> Scores:
        if reference is None:
            raise ExamplesError("kl() compares with a clean run, and none was given; use it in a sweep")
        p, q = reference.float().log_softmax(-1), logits.float().log_softmax(-1)
        return (p.exp() * (p - q)).sum(-1)


@dataclass(frozen=True)
class Loss(Metric):
    """Mean cross-entropy of each next token, in nats, over the real tokens of the example."""

    label: ClassVar[str] = "loss"
    positions: int | str | None = None

    def score(self, logits: Tensor, batch: TokenBatch, rows: Rows, reference: Tensor | None) -> Scores:
        if int(batch.lengths.min()) < 2:
            raise ExamplesError("loss() needs at least two tokens in every example; give longer texts")
        if int(batch.ids.max()) >= logits.shape[-1]:
            raise NeedsError(
                f"loss() is of the next token, and this model has {logits.shape[-1]} outputs, which are no vocabulary;"
                " use log_odds() with a classifier"
            )
        real = batch.mask[:, 1:] & batch.mask[:, :-1]
        losses = torch.nn.functional.cross_entropy(
            logits[:, :-1].float().transpose(1, 2), batch.ids[:, 1:], reduction="none"
        )
        return torch.where(real, losses, 0.0).sum(1) / real.sum(1)


@dataclass(frozen=True)
class Function(Metric):
    """A callable on the full-vocabulary logits at the last token, ``example vocab`` -> ``example``."""

    fn: Callable[[Tensor], Tensor] | None = None

    def score(self, logits: Tensor, batch: TokenBatch, rows: Rows, reference: Tensor | None) -> Scores:
        assert self.fn is not None
        out = self.fn(logits)
        return out if out.is_floating_point() else out.float()  # right or wrong, a rank, ...


def logit_diff(positions: int | str = "end") -> LogitDiff:
    """Logit of the right answer minus the wrong one; answer sets are averaged. Examples need pairs of answers."""
    return LogitDiff(positions)


def answer_logit(positions: int | str = "end") -> AnswerLogit:
    """Logit of the right answer."""
    return AnswerLogit(positions)


def answer_prob(positions: int | str = "end") -> AnswerProb:
    """Probability of the right answer; summed over an answer set."""
    return AnswerProb(positions)


def log_odds(positions: int | str = "end") -> LogOdds:
    """Log of (total probability of the right answers / that of the wrong ones), in nats. Examples need both.

    With one answer on each side it is `logit_diff`; with label words on both, the log-odds of one class against all
    others.
    """
    return LogOdds(positions)


def kl(positions: int | str = "end") -> KL:
    """KL divergence from the clean run's next-token distribution, in nats."""
    return KL(positions)


def loss() -> Loss:
    """Mean next-token cross-entropy over the example, in nats."""
    return Loss()


def as_metric(metric: Metric | Callable[[Tensor], Tensor]) -> Metric:
    """The metric itself, or a `Function` around a callable on logits."""
    return metric if isinstance(metric, Metric) else Function(fn=metric)


def _weigh(logits: Tensor, rows: Rows, ids: Tensor, weights: Tensor) -> Scores:
    """Sum of weighted logits of chosen ids, for ``example rows``."""
    return (_chosen(logits, rows, ids) * weights).sum(1)


def _chosen(logits: Tensor, rows: Rows, ids: Tensor) -> Tensor:
    """Logits of chosen ids, of ``example rows``."""
    if logits.ndim != 2:
        raise ExamplesError(
            f"this metric takes one position for each example, and got logits of shape {tuple(logits.shape)}"
        )
    return logits.gather(1, ids if rows is None else torch.searchsorted(rows, ids))
