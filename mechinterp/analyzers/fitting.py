"""Linear fits, many at a time: all folds, shuffles and portions of one site share its matrix of features.

Logistic regression has scikit-learn's objective, C × the summed loss + ½‖w‖² on features standardised over the rows
that are fitted on, with an unpenalised bias; so has ridge regression, with half the squared error for the loss.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

MEMORY = 10
"""Steps that the curvature is judged by (L-BFGS; Liu & Nocedal 1989)."""

STEPS = 500
"""After so many a fit stops, and `Fits.converged` says so."""

LEAST_GAIN = 1e-8
"""A step that promises less, in units of c × the number of rows, is lost in the rounding of float32."""

NUMBERS_AT_ONCE = 1 << 24
"""Scores in memory at once, of units × fits × outputs."""


@dataclass(frozen=True)
class Fits:
    """Many linear fits of the same features, in the features' own scale.

    Attributes:
        weight: ``fit output dim``. One output for two classes (the log-odds of the second), one a class for more.
        bias: ``fit output``.
        objective: what was minimised, ``fit``.
        converged: whether the gradient was brought under the tolerance, ``fit``.
    """

    weight: Float[Tensor, "fit output dim"]
    bias: Float[Tensor, "fit output"]
    objective: Float[Tensor, "fit"]
    converged: Bool[Tensor, "fit"]

    def scores(self, x: Float[Tensor, "unit dim"]) -> Float[Tensor, "unit fit output"]:
        """What each fit says of each unit."""
        return (x @ self.weight.flatten(0, 1).T).view(len(x), *self.bias.shape) + self.bias


def logistic(
    x: Float[Tensor, "unit dim"],
    labels: Int[Tensor, "fit unit"],
    rows: Bool[Tensor, "fit unit"],
    classes: int,
    c: float = 1.0,
    tolerance: float = 3e-5,
) -> Fits:
    """Multinomial logistic regressions; the logistic one for two classes.

    L-BFGS, whose first guess of the curvature is its upper bound on all rows (Böhning 1992), shared by all fits, and
    whose step is the best one along the direction, which costs no product with the features.

    Args:
        labels: class numbers; whatever stands outside `rows` is not looked at.
        rows: what each fit is fitted on.
        tolerance: of the largest entry of the gradient, in units of c × the number of rows.
    """
    outputs = 1 if classes == 2 else classes
    size = max(1, NUMBERS_AT_ONCE // (len(x) * outputs))
    base, center, scale = _standard(x)
    guess = _curvature(base, c * float(rows.float().mean()), 0.25 if outputs == 1 else (classes - 1) / classes**2)
    found = [
        _Logistic(base, labels[i : i + size], rows[i : i + size], classes, c, guess).run(tolerance)
        for i in range(0, len(labels), size)
    ]
    weight, bias, objective, converged = (torch.cat(parts) for parts in zip(*found, strict=True))
    weight = weight / scale
    return Fits(weight, bias - weight @ center, objective, converged)


def ridge(
    x: Float[Tensor, "unit dim"], targets: Float[Tensor, "fit unit"], rows: Bool[Tensor, "fit unit"], c: float = 1.0
) -> Fits:
    """Ridge regressions: C × ½ squared error + ½‖w‖², solved exactly; one factorisation for each set of rows."""
    base, center, scale = _standard(x)
    weight = base.new_empty(len(targets), base.shape[1])
    bias, objective = base.new_empty(len(targets)), base.new_empty(len(targets))
    sets, which = rows.unique(dim=0, return_inverse=True)
    eye = torch.eye(base.shape[1], device=x.device)
    for number, some in enumerate(sets):
        mine = (which == number).nonzero()[:, 0]
        z, middle, spread = _standard(base[some])
        y = targets[mine][:, some].T.to(z)  # unit fit
        mean = y.mean(0)
        w = torch.cholesky_solve(c * (z.T @ (y - mean)), torch.linalg.cholesky(c * (z.T @ z) + eye))
        objective[mine] = c * 0.5 * (y - mean - z @ w).square().sum(0) + 0.5 * w.square().sum(0)
        weight[mine] = (w / spread[:, None]).T
        bias[mine] = mean - weight[mine] @ middle
    weight = weight / scale
    done = torch.ones(len(targets), dtype=torch.bool, device=x.device)
    return Fits(weight[:, None], (bias - weight @ center)[:, None], objective, done)


def _standard(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Features of mean 0 and variance 1, with what was taken off and divided by; constant ones stay at 0."""
    center = x.double().mean(0)
    scale = x.double().var(0, correction=0).sqrt()
    scale = torch.where(scale > 1e-10 * center.abs().clamp(min=1e-20), scale, 1.0)
    return ((x - center) / scale).float(), center.float(), scale.float()


def _curvature(x: Float[Tensor, "unit dim"], c: float, bound: float) -> Float[Tensor, "dim+1 dim+1"]:
    """The inverse of an upper bound of the second derivative, with the bias as the last dimension."""
    z = torch.cat([x, x.new_ones(len(x), 1)], 1)
    hessian = (c * bound) * (z.T @ z)
    hessian.diagonal()[:-1] += 1.0
    hessian.diagonal()[-1] += 1e-6 * len(x)
    return torch.cholesky_inverse(torch.linalg.cholesky(hessian))


class _Logistic:
    """The state of some fits while they are made. Parameters are ``fit output dim + 1``, the bias last."""

    def __init__(self, x: Tensor, labels: Tensor, rows: Tensor, classes: int, c: float, guess: Tensor) -> None:
        self.x, self.c, self.guess = x, c, guess
        self.outputs = 1 if classes == 2 else classes
        share = rows.float()  # fit unit
        n = share.sum(1, keepdim=True)
        self.mean = (share @ x) / n
        variance = (share @ x.square()) / n - self.mean.square()
        self.spread = torch.where(variance > 1e-8, variance.clamp(min=1e-8).sqrt(), 1.0)
        self.n = n[:, 0]
        self.whole = self.mean, self.spread
        self.inside = share.T[:, :, None]  # unit fit 1
        at = labels.T.clamp(0, classes - 1)  # what stands outside rows may be anything
        self.target = at[..., None].float() if classes == 2 else torch.nn.functional.one_hot(at, classes).float()

    def run(self, tolerance: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weight and bias in units of `x`, the objective, and whether it converged."""
        fits, dims = len(self.n), self.x.shape[1] + 1
        theta = self.x.new_zeros(fits, self.outputs, dims)
        done = torch.zeros(fits, dtype=torch.bool, device=self.x.device)
        final = torch.zeros_like(theta)
        value = self.x.new_zeros(fits)
        left = torch.arange(fits, device=self.x.device)  # what is still being fitted
        logits = self.x.new_zeros(len(self.x), fits, self.outputs)
        gradient = self._gradient(theta, logits)
        history: list[tuple[Tensor, Tensor, Tensor]] = []
        gain = torch.full_like(self.n, torch.inf)  # twice what a step was expected to bring
        for step in range(STEPS + 1):
            small = (gradient.abs().amax((1, 2)) <= tolerance * self.c * self.n) | (
                gain <= LEAST_GAIN * self.c * self.n
            )
            if step == STEPS or small.all() or (small.float().mean() > 0.25):
                go = ~small & (step < STEPS)
                out = left[~go]
                final[out], done[out] = theta[~go], small[~go]
                value[out] = self._objective(theta, logits)[~go]
                if not go.any():
                    break
                left, theta, logits, gradient, gain = left[go], theta[go], logits[:, go], gradient[go], gain[go]
                history = [(s[go], y[go], r[go]) for s, y, r in history]
                self._keep(go)
            direction = self._direction(gradient, history)
            gain = -(gradient * direction).sum((1, 2))
            moved = self._logits(direction)
            size = self._length(theta, direction, logits, moved)[:, None, None]
            theta = theta + size * direction
            logits = logits + size[None, :, :, 0] * moved
            before, gradient = gradient, self._gradient(theta, logits)
            s, y = size * direction, gradient - before
            inner = (s * y).sum((1, 2))
            rho = torch.where(inner > 0, 1 / inner.clamp(min=1e-30), 0.0)  # a step of no curvature is not learnt from
            history = [*history[-MEMORY + 1 :], (s, y, rho)]
        mean, spread = self.whole
        weight = final[..., :-1] / spread[:, None]
        return weight, final[..., -1] - (weight * mean[:, None]).sum(-1), value, done

    def _keep(self, go: Tensor) -> None:
        """Go on with some of the fits."""
        self.mean, self.spread, self.n = self.mean[go], self.spread[go], self.n[go]
        self.inside, self.target = self.inside[:, go], self.target[:, go]

    def _logits(self, theta: Tensor) -> Float[Tensor, "unit fit output"]:
        weight = theta[..., :-1] / self.spread[:, None]
        bias = theta[..., -1] - (weight * self.mean[:, None]).sum(-1)
        return (self.x @ weight.flatten(0, 1).T).view(len(self.x), *bias.shape) + bias

    def _probs(self, logits: Tensor) -> Tensor:
        return logits.sigmoid() if self.outputs == 1 else logits.softmax(-1)

    def _objective(self, theta: Tensor, logits: Tensor) -> Float[Tensor, "fit"]:
        if self.outputs == 1:
            loss = torch.nn.functional.softplus(logits) - self.target * logits
        else:
            loss = logits.logsumexp(-1, keepdim=True) - (self.target * logits).sum(-1, keepdim=True)
        return self.c * (loss * self.inside).sum((0, 2)) + 0.5 * theta[..., :-1].square().sum((1, 2))

    def _gradient(self, theta: Tensor, logits: Tensor) -> Float[Tensor, "fit output parameter"]:
        rest = self.c * self.inside * (self._probs(logits) - self.target)
        total = rest.sum(0)[..., None]  # fit output 1
        raw = (rest.flatten(1).T @ self.x).view(*total.shape[:2], -1)
        return torch.cat([(raw - self.mean[:, None] * total) / self.spread[:, None] + theta[..., :-1], total], -1)

    def _direction(self, gradient: Tensor, history: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
        """Down the gradient, corrected for the curvature: the two loops of L-BFGS."""
        q = gradient
        shares: list[Tensor] = []
        for s, y, rho in reversed(history):
            shares.append((rho * (s * q).sum((1, 2)))[:, None, None])
            q = q - shares[-1] * y
        q = (q.flatten(0, 1) @ self.guess).view_as(q)
        if history:
            s, y, rho = history[-1]
            bent = (y.flatten(0, 1) @ self.guess).view_as(y)
            ratio = (s * y).sum((1, 2)) / (y * bent).sum((1, 2)).clamp(min=1e-30)
            q = q * torch.where(rho > 0, ratio, 1.0)[:, None, None]
        for (s, y, rho), share in zip(history, reversed(shares), strict=True):
            q = q + s * (share - (rho * (y * q).sum((1, 2)))[:, None, None])
        return -q

    def _length(self, theta: Tensor, direction: Tensor, logits: Tensor, moved: Tensor) -> Float[Tensor, "fit"]:
        """How far to go: where the slope is a tenth of what it was at the start, by Newton's method on one number."""
        w, d = theta[..., :-1], direction[..., :-1]
        along, square = (w * d).sum((1, 2)), (d * d).sum((1, 2))
        size, first = self.x.new_ones(len(w)), None
        weighed = self.c * self.inside * moved
        for _ in range(8):
            at = 0.0 if first is None else size[None, :, None]
            probs = self._probs(logits + at * moved)
            slope = (weighed * (probs - self.target)).sum((0, 2)) + along + (0.0 if first is None else size) * square
            if first is None:
                first = slope.abs()
                continue
            open_ = slope.abs() > 0.1 * first
            if not open_.any():
                break
            if self.outputs == 1:
                bend = weighed * moved * probs * (1 - probs)
            else:
                bend = weighed * probs * (moved - (probs * moved).sum(-1, keepdim=True))
            newton = size - slope / (bend.sum((0, 2)) + square).clamp(min=1e-30)
            size = torch.where(open_, torch.minimum(torch.maximum(newton, 0.1 * size), 10 * size), size)
        return size
