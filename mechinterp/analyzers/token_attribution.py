"""Which tokens of the input did it: gradients, integrated gradients, LIME and Shapley values of tokens."""

import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from torch import Tensor

from mechinterp import sites
from mechinterp.analyzers.gradients import check_gradients, token_texts
from mechinterp.analyzers.perturbing import Floats, Game, Masks, check_package
from mechinterp.core.analyzer import Analyzer, Batch, Context, Edit, Grad, Model, Needs, Path, Sweep
from mechinterp.core.display import count, term
from mechinterp.core.metrics import Metric, answer_logit
from mechinterp.core.result import Part, Result, View
from mechinterp.core.tokens import BASELINES, Baseline
from mechinterp.errors import NeedsError

Method: TypeAlias = Literal[
    "saliency",
    "grad-x-input",
    "integrated-gradients",
    "head-x-representation",
    "lime",
    "kernel-shap",
    "partition-shap",
]
PERTURBING = ("lime", "kernel-shap", "partition-shap")
ADDITIVE = {
    "integrated-gradients": "completeness_error",
    "kernel-shap": "additivity_error",
    "partition-shap": "additivity_error",
}
"""Methods whose attributions add up to what masking everything changes, and what the rest is called."""
MANY = 16
"""Times `steps` at most, to bring the completeness error down."""


@dataclass(frozen=True)
class TokenAttribution(Analyzer):
    """How much each token of the input contributes to a metric, such as the answer's logit.

    - ``"saliency"``: the L2 norm of the metric's gradient at the token's embedding (Simonyan 2014). A size, no sign.
    - ``"grad-x-input"``: gradient · embedding (Shrikumar 2017).
    - ``"integrated-gradients"`` (Sundararajan 2017): (embedding - baseline) · the mean gradient on the straight line
      between them, by Gauss-Legendre quadrature. Further rounds double the points, up to 16 times `steps`, for the
      examples whose attributions do not add up to score - baseline_score within `tolerance`; what is left is
      ``completeness_error``, and a warning says where it is above tolerance.
    - ``"head-x-representation"``: w · the token's own final representation, w being what multiplies that of the scored
      token: a row of the head, or, of a metric that is not linear in the logits, its gradient there. It says what the
      head would read at each token, and at the scored token it is the metric less its bias; it says nothing of
      where that token got it from, and does not add up to anything.
    - ``"lime"`` (Ribeiro 2016), ``"kernel-shap"`` (Lundberg & Lee 2017): captum's, from `evaluations` inputs in which
      random tokens are masked. ``"partition-shap"``: shap's Owen values along a tree that halves the text at
      words, from `evaluations` inputs; with 2 for each token and each level of the tree they are exact.

    All masked inputs of an example are one packed sweep: what stands before the first masked token, such as a
    template, is run once, and logits are computed at the metric's position alone. A masked token is one whose
    embedding is the baseline, so integrated gradients and Shapley values divide the same difference. None of them
    says what the model would do with another text; the gradients say so only for small changes.

    Result: ``attribution`` and ``token`` (``example position``, in the metric's units; NaN where nothing was
    attributed); ``word_attribution`` and ``word`` (``example word_number``), the sums over tokens of words, which white
    space separates; ``score`` and ``baseline_score`` (``example``), the metric as it is and with every attributed
    token at the baseline; their difference less the sum of attributions, ``completeness_error`` (integrated
    gradients) or ``additivity_error`` (Shapley values); ``steps``; and over the examples ``mean_attribution``,
    ``mean_size`` and ``occurrences`` of each word that occurs (``term``), in lower case.

    Attributes:
        metric: what is attributed; it must have a gradient for the first four methods.
        positions: the name of a span whose tokens are attributed, such as the text in a template; None for all. The
            first token of a prompt is often an attention sink, and without it nothing is as it was: masking it says
            little about its meaning, and integrated gradients through it take very many steps. A span leaves it out.
        baseline: the embedding of a masked token, and the beginning of the path: ``"mean"`` over the vocabulary,
            ``"pad"``, or ``"zero"``. With RMSNorm zero is nearly singular, and takes very many steps.
        steps: points on the path of integrated gradients.
        tolerance: largest error of integrated gradients, as a share of the sum of |attribution|.
        evaluations: masked inputs for each example.
        seed: of random masks; each example has its own, so that others do not matter.
    Raises:
        NeedsError: an unknown method or baseline, a number that is too small, a gradient through 4-bit weights, or
            a package of the extra ``[attribution]`` that is not there. ModelError: no padding token.
        ExamplesError: the metric has nothing to score, as its own errors say.
    """

    method: Method = "integrated-gradients"
    metric: Metric = field(default_factory=answer_logit)
    positions: str | None = None
    baseline: Baseline = "mean"
    steps: int = 50
    tolerance: float = 0.01
    evaluations: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("method", get_args(Method)), ("baseline", BASELINES)):
            if getattr(self, name) not in known:
                raise NeedsError(
                    f"The {name} of TokenAttribution must be one of {', '.join(known)}. Got {getattr(self, name)!r}"
                )
        for name in ("steps", "evaluations"):
            if getattr(self, name) < 2:
                raise NeedsError(f"The {name} of TokenAttribution must be at least 2. Got {getattr(self, name)}")
        if self.tolerance <= 0:
            raise NeedsError(f"The tolerance of TokenAttribution must be above 0. Got {self.tolerance}")

    def needs(self, model: Model) -> Needs:
        if self.method in PERTURBING:
            check_package(self.method)
        else:
            check_gradients(self.method, model, "use method='partition-shap', 'kernel-shap' or 'lime', or ")
        model.baseline(self.baseline)  # says where there is none
        ends = Sweep(self.metric, edits=(Edit(self.positions, self.baseline),), base="clean")
        grads: dict[str, Grad] = {}
        if self.method == "integrated-gradients":
            grads["mean"] = self._mean_gradient(self.steps)
        elif self.method not in PERTURBING:
            grads["here"] = Grad(self._site, self.metric)
        reads = () if self.method in (*PERTURBING, "saliency") else self._site
        return Needs(reads=reads, grads=grads, sweeps={"ends": ends})

    @property
    def _site(self) -> sites.Site:
        """Whose value a gradient multiplies."""
        return sites.final_norm() if self.method == "head-x-representation" else sites.embed()

    def _mean_gradient(self, steps: int) -> Grad:
        """The gradient on the line from the baseline to the input, averaged by quadrature."""
        return Grad(sites.embed(), self.metric, along=Path.of(self.baseline, steps, self.positions))

    def observe(self, batch: Batch) -> Part:
        swept = batch.sweeps["ends"]
        assert swept.values is not None and swept.base is not None
        score, empty = swept.base, swept.values[:, 0]
        chosen = _chosen(batch, self.positions)
        values: dict[str, tuple[Any, str]] = {}
        if self.method in PERTURBING:
            attribution = self._perturbed(batch, chosen, score, empty)
        elif self.method == "integrated-gradients":
            attribution = self._integrated(batch, chosen)
        else:
            grad = batch.grads["here"][self._site].float()
            if self.method == "head-x-representation":  # at scored tokens alone there is any
                grad = grad.nan_to_num().sum(1, keepdim=True)
            along = grad.norm(dim=-1) if self.method == "saliency" else _dot(grad, batch.clean[self._site])
            attribution = along.masked_fill(~chosen, float("nan"))
        ids = batch.examples.ids.cpu()
        # Of tokens, -1 marks padding on the right and NaN what was not attributed; `_stamp` does the former.
        values |= {"attribution": (attribution, "example position"), "id": (ids, "example position")}
        values |= {"score": (score.float(), "example"), "baseline_score": (empty.float(), "example")}
        return Part(values)

    def _integrated(self, batch: Batch, chosen: Tensor) -> Tensor:
        apart = batch.clean[sites.embed()].float() - batch.model.baseline(self.baseline).float()
        return _dot(batch.grads["mean"][sites.embed()], apart).masked_fill(~chosen, float("nan"))

    def _perturbed(self, batch: Batch, chosen: Tensor, score: Tensor, empty: Tensor) -> Tensor:
        out = torch.full(chosen.shape, float("nan"))
        for i in range(len(batch.examples)):
            columns = chosen[i].nonzero()[:, 0].tolist()
            start = int(batch.examples.starts[i])
            strings = batch.model.to_str_tokens(batch.examples.ids[i, columns].tolist())
            ends = float(score[i]), float(empty[i])
            value = partial(self._value, batch, i, [column - start for column in columns], ends)
            game = Game(value, strings, self.evaluations, self.seed)
            out[i, columns] = torch.as_tensor(game.attribute(self.method), dtype=torch.float32)
        return out

    def _value(self, batch: Batch, row: int, tokens: Sequence[int], ends: tuple[float, float], kept: Masks) -> Floats:
        """The metric of one example with the tokens masked that are not kept, ``input``.

        Args:
            ends: the metric with all of them, and with none.
        """
        position = np.asarray(tokens)
        out = np.where(kept.all(1), *ends)
        some = ~kept.all(1) & kept.any(1)
        if not some.any():
            return out
        edits = tuple(Edit(tuple(position[~one].tolist()), self.baseline) for one in kept[some])
        number = batch.examples.rows[row]
        swept = batch.rerun(Sweep(self.metric, edits=((),) * number + (edits,), base="clean"), [row])
        assert swept.values is not None
        out[some] = swept.values[0].float().cpu().numpy()
        return out

    def combine(self, parts: Iterator[Part], context: Context) -> Result | Analyzer:
        return self._finer(Result.of(parts, unit=self.metric.label).data, self.steps, context)

    def _finer(self, data: xr.Dataset, steps: int, context: Context) -> Result | Analyzer:
        """The result, or, where integrated gradients do not add up yet, another round with twice the steps."""
        if self.method != "integrated-gradients":
            return self._result(data, context)
        if "steps" not in data:
            data = data.assign(steps=("example", np.full(data.sizes["example"], steps)))
        attribution = data["attribution"].transpose("example", "position").values
        error = np.abs((data["score"] - data["baseline_score"]).values - np.nansum(attribution, 1))
        bad = error > self.tolerance * np.nansum(np.abs(attribution), 1)
        if bad.any() and 2 * steps <= MANY * self.steps:
            return _Finer(self, 2 * steps, Coarse(data, bad))
        if bad.any():
            warnings.warn(
                f"integrated gradients of {count(int(bad.sum()), 'example')} (the first is {int(bad.argmax())}) do not"
                f" add up within {self.tolerance:g} of their size after {steps} steps; completeness_error says by how"
                " much, and more steps or another baseline may bring it down",
                stacklevel=2,
            )
        return self._result(data, context)

    def _result(self, data: xr.Dataset, context: Context) -> Result:
        ids = data["id"].transpose("example", "position").values
        data = data.drop_vars("id").assign(token=(("example", "position"), token_texts(context.model, ids)))
        return described(data, self.method, self.baseline, self.metric.label)


def described(data: xr.Dataset, method: str, baseline: str, unit: str) -> Result:
    """The result of attributions, tokens and scores: what they leave over, and their sums over words and examples."""
    attribution, tokens = (data[name].transpose("example", "position").values for name in ("attribution", "token"))
    words = [word_sums(row, values) for row, values in zip(tokens, attribution, strict=True)]
    if name := ADDITIVE.get(method):
        data = data.assign({name: data["score"] - data["baseline_score"] - data["attribution"].sum("position")})
    sums = {
        "word": _table("word_number", [[word for word, _ in row] for row in words], ""),
        "word_attribution": _table("word_number", [[value for _, value in row] for row in words], np.nan),
    }
    data = data.assign({**sums, **_by_term(words)})
    data = data.assign_coords({d: np.arange(n) for d, n in data.sizes.items() if d not in data.coords})
    order = ["attribution", "token", "word_attribution", "word"]
    data = data[[*order, *(str(name) for name in data.data_vars if name not in order)]]
    unit = f"{method}, {unit}"
    views = (
        View(
            "heatmap", "attribution", "position", "example", text="token", center=0.0,
            title="What each token contributes", unit=unit,
        ),
        View("bars", "mean_attribution", "term", title="Mean contribution of each word where it occurs", unit=unit),
    )  # fmt: skip
    return Result(data, {"baseline": baseline, "method": method}, views)


@dataclass(frozen=True, eq=False)
class Coarse:
    """What was found so far, and which examples do not add up yet."""

    data: xr.Dataset
    bad: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class _Finer(Analyzer):
    """Integrated gradients once more, with more steps, of the examples that do not add up."""

    asked: TokenAttribution
    steps: int
    coarse: Coarse

    def needs(self, model: Model) -> Needs:
        return Needs(reads=sites.embed(), grads={"mean": self.asked._mean_gradient(self.steps)})

    def observe(self, batch: Batch) -> Part:
        chosen = _chosen(batch, self.asked.positions)
        if self.coarse.bad[list(batch.examples.rows)].any():  # else the gradient is not looked at, and not made
            new = self.asked._integrated(batch, chosen)
        else:
            new = torch.full(chosen.shape, float("nan"))
        return Part(new, "example position")

    def combine(self, parts: Iterator[Part], context: Context) -> Result | Analyzer:
        bad, data = self.coarse.bad, self.coarse.data.copy()
        new = Result.of(parts).data["value"].transpose("example", "position")
        data["attribution"] = data["attribution"].transpose("example", "position").where(~bad[:, None], new.values)
        data["steps"] = ("example", np.where(bad, self.steps, data["steps"].values))
        return self.asked._finer(data, self.steps, context)


def _table(axis: str, rows: Sequence[Sequence[Any]], fill: Any) -> tuple[tuple[str, str], npt.NDArray[Any]]:
    """Rows of different length, ``example axis``."""
    wide = max(map(len, rows))
    return ("example", axis), np.array([[*row, *[fill] * (wide - len(row))] for row in rows])


def _by_term(words: Sequence[Sequence[tuple[str, float]]]) -> dict[str, xr.DataArray]:
    """Over all examples, what each word contributes where it occurs, in the order of its mean size."""
    found: dict[str, list[float]] = defaultdict(list)
    for word, value in (pair for row in words for pair in row):
        found[term(word)].append(value)
    terms = sorted(found, key=lambda name: -float(np.mean(np.abs(found[name]))))
    columns = {
        "mean_attribution": [float(np.mean(found[name])) for name in terms],
        "mean_size": [float(np.mean(np.abs(found[name]))) for name in terms],
        "occurrences": [len(found[name]) for name in terms],
    }
    return {name: xr.DataArray(column, {"term": terms}, ("term",)) for name, column in columns.items()}


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b.float()).sum(-1)


def _chosen(batch: Batch, positions: str | None) -> Tensor:
    """True at the tokens that are attributed, ``example pos``."""
    examples = batch.examples
    where = examples.where(positions)
    if where is None:
        return examples.mask
    out = torch.zeros_like(examples.mask)
    columns = where.columns.reshape(len(examples), -1)
    valid = torch.ones_like(columns, dtype=torch.bool) if where.valid is None else where.valid.reshape(columns.shape)
    rows = torch.arange(len(examples), device=out.device)[:, None].expand_as(columns)
    out[rows[valid], columns[valid]] = True
    return out


def word_sums(tokens: Sequence[str] | npt.NDArray[Any], values: npt.NDArray[np.floating]) -> list[tuple[str, float]]:
    """(word, sum of its tokens' values) of the tokens that have one; words are what white space separates.

    A token of white space alone belongs to the word after it, or, at the end, before it.
    """
    out: list[tuple[str, float]] = []
    open_word, waiting = False, 0.0
    for token, value in zip(tokens, values, strict=False):
        if np.isnan(value):
            open_word = False
            continue
        text = token.strip()
        if not text:
            waiting, open_word = waiting + float(value), False
            continue
        if not open_word or token[:1].isspace():
            out.append((text, waiting + float(value)))
            waiting = 0.0
        else:
            out[-1] = out[-1][0] + text, out[-1][1] + float(value)
        open_word = not token[-1:].isspace()
    if waiting:
        out = [*out[:-1], (out[-1][0], out[-1][1] + waiting)] if out else [("␣", waiting)]
    return out
