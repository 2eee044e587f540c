"""How alike features of the same units are: cosine, debiased linear CKA and RSA, each with an interval and a null.

Each measure is the product of two vectors of length one over *items*: the units (cosine), or the pairs of units (CKA,
RSA). So all pairs of sites are one matrix product, and units in another order are the items in another order.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from mechinterp.errors import ExamplesError, NeedsError

Array: TypeAlias = npt.NDArray[np.floating]
Measure: TypeAlias = Literal["cosine", "cka", "rsa"]
MEASURES: tuple[Measure, ...] = get_args(Measure)

LEAST = 4
"""Units below which the debiased HSIC, which divides by n - 3, is not defined."""
GROUPS = 20
"""Groups of texts that the jackknife leaves out in turn."""
AT_ONCE = 1 << 22
"""Numbers of one block of items."""
ROUNDING = 1e-6
"""Relative: what is less apart is equal."""
EDGE = 1 - ROUNDING


@dataclass(frozen=True)
class Likeness:
    """Similarities ``site other`` with their uncertainty, or ``site`` where each site has one other.

    NaN where features are constant; all but the value are NaN where there are fewer than four texts.

    Attributes:
        value: between -1 and 1.
        ci_low, ci_high: 95% interval of the delete-a-group jackknife over texts, on Fisher's scale.
        p: one-sided, the share of shuffles that are as similar; at least 1 / (shuffles + 1).
        null_mean, null_high: mean and 95th percentile over shuffles.
    """

    value: Array
    ci_low: Array
    ci_high: Array
    p: Array
    null_mean: Array
    null_high: Array


def similarity(x: Float[Tensor, "unit dim"], y: Float[Tensor, "other width"], measure: Measure = "cka") -> float:
    """How alike two sets of features are, whose rows are of the same units.

    - ``"cosine"``: mean over units of the cosine of their two vectors, which must be of one width.
    - ``"cka"``: debiased linear centred kernel alignment, HSIC(K, L) / √(HSIC(K, K) HSIC(L, L)) with K = X Xᵀ and
      L = Y Yᵀ (Kornblith et al. 2019), and the unbiased estimator of HSIC (Song et al. 2012; Murphy et al. 2024). It
      does not change with rotations and scales of either side, and has mean 0 for independent features of any width.
    - ``"rsa"``: representational similarity (Kriegeskorte et al. 2008), Spearman's correlation over pairs of units of
      1 - cosine among x with the same among y.

    Returns:
        Between -1 and 1; NaN where the features of a side are constant.
    Raises:
        NeedsError: an unknown measure, or cosine of unequal widths.
        ExamplesError: unequal numbers of units, or fewer than four.
    """
    a, b = _forms(x[None], y[None], measure)
    return float(_product(a.vectors(), b.vectors(), None, True)[0])


def likeness(
    x: Float[Tensor, "site unit dim"],
    y: Float[Tensor, "other units width"],
    measure: Measure,
    owner: Sequence[int] | npt.NDArray[np.integer] | None = None,
    *,
    matched: bool = False,
    draws: int = 200,
    seed: int = 0,
) -> Likeness:
    """`similarity` of each site of x with each of y, with intervals and a permutation null.

    Intervals leave out groups of whole texts; a bootstrap would draw a unit twice, and the similarity of a unit with
    itself is what the debiased measures leave out. The null shuffles texts of one side against the other, with their
    units in order. Memory: about 8 bytes × sites × units², a measure at a time.

    Args:
        owner: the text that each unit is from; by default each is from one of its own.
        matched: only of the first site with the first, the second with the second, and so on.
        draws: how many shuffles.
    Raises:
        NeedsError, ExamplesError: as for `similarity`.
    """
    a, b = _forms(x, y, measure)
    texts = np.arange(x.shape[1]) if owner is None else np.asarray(owner)
    one = a.vectors()
    other = one if b is a else b.vectors()
    value = _product(one, other, None, matched)
    nothing = np.full(value.shape, np.nan)
    if len(np.unique(texts)) < LEAST:
        return Likeness(value, *(nothing,) * 5)
    low, high = nothing, nothing
    stays = list(folds(texts, seed))
    if min(int(s.sum()) for s in stays) >= LEAST:
        without: list[Array] = []
        for some in map(torch.from_numpy, stays):
            left = a.vectors(some)
            without.append(_product(left, left if b is a else b.vectors(some), None, matched))
        low, high = jackknife(value, np.stack(without))
    if not draws:
        return Likeness(value, low, high, *(nothing,) * 3)
    rng = np.random.default_rng(seed)
    orders = (a.items(torch.from_numpy(shuffled(texts, rng))) for _ in range(draws))
    null = np.stack([_product(one, other, order, matched) for order in orders])
    p = (1 + (null >= value - ROUNDING).sum(0)) / (draws + 1)
    p = np.where(np.isfinite(value), p, np.nan)
    return Likeness(value, low, high, p, null.mean(0), np.quantile(null, 0.95, axis=0))


def jackknife(whole: Array, without: Array) -> tuple[Array, Array]:
    """95% interval of numbers between -1 and 1, from what they are without each group of texts, ``group *cells``.

    The delete-a-group jackknife (Kott 2001) on Fisher's scale, with Student's t for as many groups.
    """
    n = len(without)
    z, centre = (np.arctanh(np.clip(some, -EDGE, EDGE)) for some in (without, whole))
    reach = stats.t.ppf(0.975, n - 1) * np.sqrt((n - 1) / n * ((z - z.mean(0)) ** 2).sum(0))
    return np.tanh(centre - reach), np.tanh(centre + reach)


def folds(owner: npt.NDArray[np.integer], seed: int = 0) -> Iterator[npt.NDArray[np.bool_]]:
    """Which units stay when each group of texts is left out; each text is in one group, of at most `GROUPS`."""
    texts, number = np.unique(owner, return_inverse=True)
    n = min(GROUPS, len(texts))
    group = (np.random.default_rng(seed).permutation(len(texts)) % n)[number]
    for i in range(n):
        yield group != i


def shuffled(owner: npt.NDArray[np.integer], rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """The numbers of all units with their texts in another order; the units of a text stay together, in order.

    Where each text has one unit, this is any permutation.
    """
    texts, number = np.unique(owner, return_inverse=True)
    return np.argsort(rng.permutation(len(texts))[number], kind="stable")


def centred(x: Float[Tensor, "*sites unit dim"]) -> Float[Tensor, "*sites unit dim"]:
    """Features less their mean over units, in float64; exactly 0 where they are constant but for rounding."""
    x = x.double()
    out = x - x.mean(-2, keepdim=True)
    spread, length = (some.norm(dim=-1).amax(-1)[..., None, None] for some in (out, x))
    return torch.where(spread <= ROUNDING * length, 0.0, out)


def standardized(x: Float[Tensor, "*sites unit dim"]) -> Float[Tensor, "*sites unit dim"]:
    """z-scores of each dimension over units, in float64; 0 where a dimension is constant."""
    spread = centred(x)
    deviation = spread.square().mean(-2, keepdim=True).sqrt()
    return torch.where(deviation <= ROUNDING * x.double().mean(-2, keepdim=True).abs(), 0.0, spread / deviation)


def top_share(x: Float[Tensor, "*sites unit dim"]) -> Float[Tensor, "*sites"]:
    """The share of all variance that is in one dimension, the largest; NaN where features are constant."""
    variance = centred(x).square().sum(-2)
    return variance.amax(-1) / variance.sum(-1)


class _Form(ABC):
    """Features of some sites in the form that a measure takes."""

    @abstractmethod
    def vectors(self, stays: Tensor | None = None) -> Float[Tensor, "item site width"]:
        """Of length one over items and width; NaN where features are constant. Of all units, or those that stay."""

    @abstractmethod
    def items(self, order: Tensor) -> Tensor:
        """The items in another order of units."""


class _Cosine(_Form):
    def __init__(self, x: Float[Tensor, "site unit dim"]) -> None:
        self.unit = (x.float() / x.float().norm(dim=-1, keepdim=True)).transpose(0, 1).contiguous()

    def vectors(self, stays: Tensor | None = None) -> Float[Tensor, "item site width"]:
        some = self.unit if stays is None else self.unit[stays]
        return some / math.sqrt(len(some))

    def items(self, order: Tensor) -> Tensor:
        return order


class _Pairs(_Form):
    """Items are pairs of units, each once."""

    def __init__(self, n: int) -> None:
        self.first, self.second = torch.triu_indices(n, n, 1)
        self.number = torch.zeros(n, n, dtype=torch.long)
        self.number[self.first, self.second] = torch.arange(len(self.first))
        self.number += self.number.T.clone()

    def items(self, order: Tensor) -> Tensor:
        return self.number[order[self.first], order[self.second]]


class _CKA(_Pairs):
    def __init__(self, x: Float[Tensor, "site unit dim"]) -> None:
        super().__init__(x.shape[1])
        # U-centring takes out what centring changes off the diagonal; done first, it saves digits
        self.grams = torch.stack([(c @ c.T).float() for c in map(centred, x)])

    def vectors(self, stays: Tensor | None = None) -> Float[Tensor, "item site width"]:
        columns: list[Tensor] = []
        for gram in self.grams:
            some = gram if stays is None else gram[stays][:, stays]
            first, second = (self.first, self.second) if stays is None else torch.triu_indices(*some.shape, 1)
            column = u_centred(some)[first, second]
            equal = column.norm() <= ROUNDING * some.norm()  # all units are equally far apart
            columns.append(torch.where(equal, torch.nan, column / column.norm()))
        return torch.stack(columns, 1)[..., None]


class _RSA(_Pairs):
    def __init__(self, x: Float[Tensor, "site unit dim"]) -> None:
        super().__init__(x.shape[1])
        self.codes: list[Tensor | None] = []  # of each pair, the number of its dissimilarity among all that occur
        for site in x.double():
            unit = site / site.norm(dim=-1, keepdim=True)
            apart = (1 - unit @ unit.T)[self.first, self.second]
            codes = torch.unique(apart.round(decimals=10), return_inverse=True)[1].int()
            self.codes.append(codes if bool(apart.isfinite().all()) else None)

    def vectors(self, stays: Tensor | None = None) -> Float[Tensor, "item site width"]:
        inside = torch.ones(len(self.first), dtype=torch.bool)
        if stays is not None:
            inside = stays[self.first] & stays[self.second]
        columns: list[Tensor] = []
        for codes in self.codes:
            if codes is None:
                columns.append(torch.full((int(inside.sum()),), torch.nan))
                continue
            some = codes[inside]
            count = torch.bincount(some)
            ranks = (count.cumsum(0) - (count - 1) / 2)[some].double()  # equal ones share their mean rank
            ranks -= ranks.mean()
            columns.append((ranks / ranks.norm()).float())  # 0 / 0 where all are equal
        return torch.stack(columns, 1)[..., None]


def u_centred(gram: Float[Tensor, "unit unit"]) -> Float[Tensor, "unit unit"]:
    """A Gram matrix without its diagonal, centred so that products of two are unbiased (Székely & Rizzo 2014).

    The unbiased HSIC of Song et al. (2012) is the sum of the products of two such matrices over n (n - 3).
    """
    n = len(gram)
    hollow = gram - torch.diag(gram.diagonal())
    rows = hollow.sum(0, dtype=torch.float64)
    mean = rows / (n - 2)
    shift = (mean - rows.sum() / (2 * (n - 1) * (n - 2))).to(gram.dtype)
    out = hollow - shift[:, None] - shift
    return out.fill_diagonal_(0.0)


_FORMS: dict[str, Any] = {"cosine": _Cosine, "cka": _CKA, "rsa": _RSA}


def _forms(x: Tensor, y: Tensor, measure: str) -> tuple[_Form, _Form]:
    """Both sides; the same one twice where they are the same features."""
    if measure not in _FORMS:
        raise NeedsError(f"the measure must be one of {', '.join(MEASURES)}. Got {measure!r}")
    if x.shape[1] != y.shape[1]:
        raise ExamplesError(f"there are {x.shape[1]} units on one side and {y.shape[1]} on the other; match them")
    if x.shape[1] < LEAST:
        raise ExamplesError(f"similarity takes {LEAST} units or more, and there are {x.shape[1]}")
    if measure == "cosine" and x.shape[2] != y.shape[2]:
        raise NeedsError(
            f"a cosine takes vectors of one width, and these have {x.shape[2]} and {y.shape[2]} dimensions; use"
            " 'cka' or 'rsa'"
        )
    one = _FORMS[measure](x)
    return one, one if y is x else _FORMS[measure](y)


def _product(one: Tensor, other: Tensor, order: Tensor | None, matched: bool) -> Array:
    """Sums over items and width of one side's vectors times the other's, in the order given."""
    out = torch.zeros(one.shape[1] if matched else (one.shape[1], other.shape[1]), dtype=torch.float64)
    step = max(1, AT_ONCE // (one[0].numel() + other[0].numel()))
    for start in range(0, len(one), step):
        here, there = one[start : start + step], other[start : start + step]
        if order is not None:
            there = other.index_select(0, order[start : start + step])
        if matched:
            out += (here * there).sum((0, 2))
        elif here.shape[2] > 1:
            out += torch.bmm(here, there.transpose(1, 2)).sum(0)
        else:  # as many products of single numbers as there are pairs of units would be slow
            out += here[..., 0].T @ there[..., 0]
    return out.clamp(-1.0, 1.0).numpy()
