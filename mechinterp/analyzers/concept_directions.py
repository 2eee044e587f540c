"""Concept directions: the line in activation space along which a concept is told from what it is not."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from jaxtyping import Bool, Float
from scipy import linalg, stats
from torch import Tensor

from mechinterp.analyzers.fitting import logistic
from mechinterp.analyzers.probe import residual
from mechinterp.analyzers.probe_data import Array, Probed, groups_of
from mechinterp.analyzers.units import Pool, Units, features, part
from mechinterp.core.analyzer import Analyzer, Batch, Context, Model, Needs, Wanted
from mechinterp.core.linear_probe import LinearProbe
from mechinterp.core.ranking import auroc
from mechinterp.core.result import Part, Result, View
from mechinterp.core.statistics import MIN_EXAMPLES, compare_groups, fdr, split_p, summarize
from mechinterp.errors import ExamplesError, NeedsError
from mechinterp.sites import Position, Site

METHODS = ("mean-difference", "logistic", "pca")
RESAMPLES = 1000


@dataclass(frozen=True)
class ConceptDirections(Analyzer):
    """A direction for each class against the rest, at every site, from one pass.

    ``mean-difference`` is the mean of the class less the mean of the rest (Marks & Tegmark 2024; the most causal of
    the three in their experiments); ``logistic`` the weight of a logistic regression on standardised features, which
    tells classes apart best and may follow what only correlates; ``pca`` the first principal component, of the
    differences to the group's mean where every group holds the class and the rest, such as pairs (Zou et al. 2023),
    and of everything elsewhere, with the sign that the labels give.

    Some folds of the groups are set apart: neither directions nor the choice of a site see them. That a direction
    tells classes apart does not say that the model uses it; `Steering` measures that.

    Result (``site class``; two classes have one line, whose positive side is the second): ``auroc`` of the projection,
    cross-validated over the other folds, by which `LinearProbe.of` chooses a site; ``test_auroc`` on the folds set
    apart with ``ci_low, ci_high`` (95%, bootstrap over their groups), ``p`` and ``q`` over all; ``coherence``, the mean
    cosine between the directions that single folds give, each without the others, which is near 0 for what is noise;
    ``gap``, the mean projection of the class on the unit direction less that of the rest, in activation units, of what
    it is fitted on; ``alignment`` (``site class other``), cosines between classes; ``weight`` (``site class dim``) and
    ``bias`` (``site class``), for `LinearProbe.of`: scores are projections, 0 half-way between the two means (of
    ``logistic`` they are log-odds, 0 where both classes are as likely).

    Groups, not texts, are independent. Where most of those set apart hold the class and the rest, p is from flipping
    the sign of the difference within each (of the mean rank of the projection); else from shuffling labels over the
    groups of one class (`compare_groups`). Fewer than six groups can show nothing at .05: then the interval, p and q
    are NaN, and ``meta["untested"]`` says so.

    Attributes:
        method: one of the three.
        sites, labels, positions, pool, each, groups, c: as for `Probe`.
        folds: three or more.
        set_apart: how many of the folds are set apart; two or more must be left.
    Raises:
        NeedsError: no such method, or too few folds. ExamplesError: as for `Probe`; labels that are numbers.
    """

    method: Literal["mean-difference", "logistic", "pca"] = "mean-difference"
    sites: Wanted | None = field(default=None, hash=False)
    labels: tuple[Any, ...] | None = field(default=None, hash=False)
    positions: Position = "end"
    pool: Pool = "mean"
    each: str | None = None
    folds: int = 5
    groups: tuple[Any, ...] | None = field(default=None, hash=False)
    c: float = 1.0
    set_apart: int = 1

    def __post_init__(self) -> None:
        if self.method not in METHODS or self.c <= 0:
            raise NeedsError(
                f"ConceptDirections must have one of the methods {', '.join(METHODS)}, and a c above 0. Got"
                f" {self.method!r} and {self.c}"
            )
        if not 1 <= self.set_apart <= self.folds - 2:
            raise NeedsError(
                "ConceptDirections must have three folds or more, of which some are set apart and two are left. Got"
                f" {self.folds} folds, {self.set_apart} set apart"
            )

    @property
    def units(self) -> Units:
        return Units(self.positions, self.pool, self.each)

    def _reads(self, model: Model) -> tuple[Site, ...]:
        n = model.dims.n_layers
        return self.units.reads(residual(n) if self.sites is None else self.sites, n)

    def needs(self, model: Model) -> Needs:
        return Needs(self._reads(model))

    def observe(self, batch: Batch) -> Part:
        return part(self.units, self._reads(batch.model), batch)

    def combine(self, parts: Iterator[Part], context: Context) -> Result:
        x, owner, tokens = features(parts)
        data = Probed.of(
            context.tokens, owner, tokens, self.labels, self.groups, self.folds, context.seed, self.each is not None
        )
        if not data.classes:
            raise ExamplesError("concepts have classes, and these labels are numbers; give labels that are names")
        x = x[:, torch.from_numpy(data.rows)]
        found = [self._site(one.to(context.model.device), data) for one in x]
        classes = [str(name) for name in data.classes]
        variables: dict[str, Any] = {}
        at = ("site", "class")
        for name in ("auroc", "test_auroc", "ci_low", "ci_high"):
            variables[name] = (at, np.stack([one[name] for one in found]))
        p = _tested(np.stack([one["scores"] for one in found]), data, self.set_apart, context.seed)
        variables["p"] = (at, p)
        once = p[:, 1:] if len(classes) == 2 else p  # both classes of two are one test
        variables["q"] = (at, np.broadcast_to(fdr(once), p.shape).copy())
        for name in ("coherence", "gap"):
            variables[name] = (at, np.stack([one[name] for one in found]))
        variables["alignment"] = (("site", "class", "other"), np.stack([one["alignment"] for one in found]))
        variables["weight"] = (("site", "class", "dim"), np.stack([one["weight"] for one in found]))
        variables["bias"] = (at, np.stack([one["bias"] for one in found]))
        sites = [str(site.at(None)) for site in self._reads(context.model)]
        dataset = xr.Dataset(variables, {"site": sites, "class": classes, "other": classes})
        best = sites[int(np.argmax(dataset["auroc"].mean("class").values))]
        apart = data.held[: self.set_apart].any(0)
        groups = len(np.unique(data.group[apart]))
        meta = {
            "method": self.method, "units": len(data.y), "left_out": data.left_out, "chosen": best,
            "set_apart": int(apart.sum()), "groups_set_apart": groups,
            "taken": {"positions": self.positions, "pool": self.pool, "each": self.each},
        }  # fmt: skip
        if groups < MIN_EXAMPLES:
            meta["untested"] = (
                f"{groups} groups are set apart, and a test takes {MIN_EXAMPLES}; give more groups, or set more folds"
                " apart"
            )
        select = {"class": classes[1:]} if len(classes) == 2 else {}
        views = tuple(
            View(
                "lines", name, "site", by="class", title=title, unit=unit, select=select, interval=name == "test_auroc"
            )
            for name, title, unit in (
                ("test_auroc", f"Directions by {self.method}: on the texts set apart", "AUROC"),
                ("coherence", "How alike directions of different texts are", "mean cosine"),
            )
        )
        return Result(dataset, meta, views)

    def _site(self, x: Float[Tensor, "unit dim"], data: Probed) -> dict[str, Array]:
        """All that is reported of one site."""
        held = torch.from_numpy(data.held).to(x.device)
        apart, folds = held[: self.set_apart].any(0), held[self.set_apart :]
        y = torch.from_numpy(data.y).to(x.device)
        group = torch.from_numpy(data.group).to(x.device)
        # On all but what is set apart; without each fold of that; and on each fold alone.
        rows = torch.cat([~apart[None], ~apart & ~folds, folds])
        k, n = len(folds), len(data.classes)
        names = [1] if n == 2 else list(range(n))
        out: dict[str, list[Array]] = {}
        for number in names:
            yes = y == number
            weight, bias = self._fit(x, yes, rows, group)
            scores = (x @ weight.T).double().cpu().numpy()  # unit fit
            truth = yes.cpu().numpy()
            each = [auroc(scores[fold, 1 + i], truth[fold]) for i, fold in enumerate(folds.cpu().numpy())]
            test = apart.cpu().numpy()
            own = torch.nn.functional.normalize(weight[1 + k :], dim=1)
            between = (own @ own.T)[*torch.triu_indices(k, k, 1)] if k > 1 else own.new_full((1,), float("nan"))
            value = auroc(scores[test, 0], truth[test])
            low, high = _interval(scores[test, 0], truth[test], data.group[test])
            along = scores[:, 0] / max(float(weight[0].norm()), 1e-30)
            gap = along[~test & truth].mean() - along[~test & ~truth].mean()
            found = {
                "auroc": np.nanmean(each), "test_auroc": value, "ci_low": low, "ci_high": high, "gap": gap,
                "coherence": float(between.mean()), "weight": weight[0].cpu().numpy(), "bias": float(bias[0]),
                "scores": scores[test, 0],
            }  # fmt: skip
            for name, v in found.items():
                out.setdefault(name, []).append(np.asarray(v, dtype=float))
        joined = {name: np.stack(values) for name, values in out.items()}
        if n == 2:
            half = {name: joined[name][0] / 2 for name in ("weight", "bias")}
            joined = {name: np.repeat(v, 2, 0) for name, v in joined.items()}
            joined |= {name: np.stack([-v, v]) for name, v in half.items()}
            joined["scores"] = joined["scores"] * np.array([[-1.0], [1.0]])
        unit = joined["weight"] / np.maximum(np.linalg.norm(joined["weight"], axis=1, keepdims=True), 1e-30)
        return joined | {"alignment": unit @ unit.T}

    def _fit(
        self, x: Tensor, yes: Bool[Tensor, "unit"], rows: Bool[Tensor, "fit unit"], group: Tensor
    ) -> tuple[Float[Tensor, "fit dim"], Float[Tensor, "fit"]]:
        """Weight and bias of each fit."""
        if self.method == "logistic":
            fits = logistic(x, yes.long().expand(len(rows), -1), rows, 2, self.c)
            return fits.weight[:, 0], fits.bias[:, 0]
        inside, outside = (rows & yes).float(), (rows & ~yes).float()
        one, two = (share @ x / share.sum(1, keepdim=True) for share in (inside, outside))
        weight = one - two
        if self.method == "pca":
            weight = torch.stack([_component(x[some], yes[some], group[some]) for some in rows]).to(weight)
            weight = weight * torch.where((weight * (one - two)).sum(1, keepdim=True) < 0, -1.0, 1.0)
        return weight, -(weight * (one + two) / 2).sum(1)


@dataclass(frozen=True)
class ConceptAssociation(Analyzer):
    """Whether kinds of texts go with a concept: professions with gender, say.

    The kinds have a direction, too, from the mean of the others' texts to that of their own; what is asked is how it
    lies to the concept's (as in word vectors; Caliskan et al. 2017). The texts must not name the concept themselves, or
    that is all that is found. It is association in the model's activations; whether it reaches what the model does is
    for `Steering` and ablation to say.

    What is shuffled is what is independent. Sentences about one profession say the same of it, so with `groups` it is
    professions that have a label each, and that intervals and p are over.

    Result (``group``, the kinds): ``cosine`` of the two directions, with ``p``, two-sided, and ``q``: of the labels
    shuffled over `groups` (over texts where there are none), the kind's direction made anew each time; ``score``, the
    difference along the concept's unit direction in activation units, with ``ci_low, ci_high`` (95%, bootstrap);
    ``d``, Cohen's; ``score_p`` and ``score_q`` of this (studentised permutation); ``members``, how many groups there
    are of the kind, and ``texts``. Over ``member``: ``projection`` of each group's mean, and its ``kind``. Fewer than
    six groups in all can show nothing at .05: then p and q are NaN.

    Attributes:
        probe: with the site and the direction.
        concept: whose direction; the probe's last class by default.
        labels: the kind of each text; the examples' labels by default. None is left out.
        groups: one for each text, such as its profession; those of one group have one label. By default each text is
            its own, and equal texts are one.
        positions, pool: which vector is taken from a text; by default as the probe was fitted, or the last token.
    Raises:
        ExamplesError: no labels, fewer than two kinds, or a group with several. NeedsError: another width.
    """

    probe: LinearProbe = field(hash=False)
    concept: str | None = None
    labels: tuple[Any, ...] | None = field(default=None, hash=False)
    positions: Position | None = None
    pool: Pool | None = None
    groups: tuple[Any, ...] | None = field(default=None, hash=False)

    @property
    def units(self) -> Units:
        taken = self.probe.taken
        positions = taken.get("positions", "end") if self.positions is None else self.positions
        return Units(positions, taken.get("pool", "mean") if self.pool is None else self.pool)

    def _reads(self, model: Model) -> tuple[Site, ...]:
        return self.units.reads(self.probe.site, model.dims.n_layers)

    def needs(self, model: Model) -> Needs:
        self.probe.check(model)
        return Needs(self._reads(model))

    def observe(self, batch: Batch) -> Part:
        return part(self.units, self._reads(batch.model), batch)

    def combine(self, parts: Iterator[Part], context: Context) -> Result:
        x = features(parts)[0][0].double().numpy()
        labels = context.tokens.labels if self.labels is None else self.labels
        if labels is None or len(labels) != len(x):
            raise ExamplesError(f"{len(x)} texts take as many labels, the kinds that they are of. Got {labels!r}")
        kind = np.array(["" if label is None else str(label) for label in labels])
        kinds = sorted(set(kind.tolist()) - {""})
        if len(kinds) < 2:
            raise ExamplesError(f"an association compares two kinds or more. Got {', '.join(kinds) or 'none'}")
        numbers = groups_of(context.tokens, self.groups)
        inside = [
            np.flatnonzero((numbers == one) & (kind != "")) for one in dict.fromkeys(numbers[kind != ""].tolist())
        ]
        # What a group is called, or the number of its first text.
        names = [str(mine[0] if self.groups is None else self.groups[mine[0]]) for mine in inside]
        for name, mine in zip(names, inside, strict=True):
            if len(several := sorted(set(kind[mine].tolist()))) > 1:
                raise ExamplesError(
                    f"the group {name!r} has texts labelled {' and '.join(several)}, and labels are shuffled over whole"
                    " groups; give groups whose texts have one label"
                )
        own = np.array([str(kind[mine[0]]) for mine in inside])
        means = np.stack([x[mine].mean(0) for mine in inside])
        line = self.probe.direction(self.concept).double().cpu().numpy()
        along = means @ line
        testable = len(names) >= MIN_EXAMPLES
        found: dict[str, list[float]] = {}
        for one in kinds:
            order = np.argsort(own != one, kind="stable")  # its own first
            n = int((own == one).sum())
            cosine = partial(_cosine, means[order] @ means[order].T, along[order])
            difference = compare_groups(along[order][:n, None], along[order][n:, None], context.seed)
            columns = {"difference": "score", "ci_low": "ci_low", "ci_high": "ci_high", "d": "d", "p": "score_p"}
            row = {to: float(getattr(difference, of)[0]) for of, to in columns.items()}
            row["cosine"] = float(cosine((np.arange(len(own)) < n).astype(float)[None])[0])
            row["p"] = split_p(cosine, n, len(own), context.seed)
            row |= {"members": n, "texts": int((kind == one).sum())}
            for column, value in row.items():
                missing = column in ("p", "score_p") and not testable
                found.setdefault(column, []).append(float("nan") if missing else value)
        data = xr.Dataset({name: ("group", np.array(values)) for name, values in found.items()}, {"group": kinds})
        two = len(kinds) == 2  # which are one test
        for name in ("q", "score_q"):
            p = data[name.replace("q", "p")].values
            data[name] = "group", (p.copy() if two else fdr(p))
        data = data.assign({"projection": ("member", along), "kind": ("member", own)})
        data = data.assign_coords(member=names)
        told = self.concept or self.probe.classes[-1]
        views = (
            View(
                "bars", "cosine", "group", title=f"Kinds of texts and {told}", unit="cosine", center=0.0,
                interval=False,
            ),
            View("bars", "projection", "member", title=f"Along the direction of {told}", unit="activation"),
        )  # fmt: skip
        about: dict[str, Any] = {"site": str(self.probe.site), "class": told, "left_out": int((kind == "").sum())}
        if not testable:
            about["untested"] = f"there are {len(names)} groups, and a test takes {MIN_EXAMPLES}; give more"
        return Result(data, about, views)


def _cosine(products: Array, along: Array, splits: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    """Of a unit direction with the difference of means of two groups, ``split``.

    Args:
        products: of the units' vectors with one another, ``unit unit``.
        along: projections of the units on the direction.
        splits: 1 for units of the first group and 0 for others, ``split unit``.
    """
    n = splits[:1].sum()
    weight = splits / n - (1 - splits) / (splits.shape[1] - n)
    length = np.sqrt(np.maximum(((weight @ products) * weight).sum(1), 0))
    return np.divide(weight @ along, length, out=np.zeros(len(splits)), where=length > 0)


def _component(x: Tensor, yes: Tensor, group: Tensor) -> Float[Tensor, "dim"]:
    """The first principal component; of the differences to the group's mean where each has both."""
    _, of = group.unique(return_inverse=True)
    counts = torch.zeros(int(of.max()) + 1, 2, device=x.device)
    counts.index_put_((of, yes.long()), torch.ones(len(x), device=x.device), accumulate=True)
    if bool((counts > 0).all()):
        means = torch.zeros(len(counts), x.shape[1], device=x.device).index_add_(0, of, x) / counts.sum(1)[:, None]
        x = x - means[of]
    z = (x - x.mean(0)).double().cpu().numpy()
    square = z.T @ z if z.shape[1] <= len(z) else z @ z.T  # whichever is smaller
    top = linalg.eigh(square, subset_by_index=[len(square) - 1] * 2)[1][:, 0]
    top = top if z.shape[1] <= len(z) else z.T @ top
    return torch.from_numpy(top / max(float(np.linalg.norm(top)), 1e-30)).to(x)


def _tested(scores: Float[Array, "site class unit"], data: Probed, set_apart: int, seed: int) -> Array:
    """p of each class at each site, from the units set apart; NaN with too few groups."""
    apart = data.held[:set_apart].any(0)
    y, (names, of) = data.y[apart], np.unique(data.group[apart], return_inverse=True)
    out = np.full(scores.shape[:2], np.nan)
    ranks = stats.rankdata(scores, axis=-1)
    two = scores.shape[1] == 2  # which is one line, and one test
    for number in (1,) if two else range(scores.shape[1]):
        yes = np.stack([y == number, y != number])[:, None] & (of == np.arange(len(names))[:, None])  # side group unit
        counts = yes.sum(-1)
        with np.errstate(invalid="ignore"):
            means = np.einsum("xgu,su->xgs", yes.astype(float), ranks[:, number]) / counts[..., None]
        both = (counts > 0).all(0)
        one, other = means[0][~both & (counts[0] > 0)], means[1][~both & (counts[1] > 0)]
        if both.sum() >= len(one) + len(other):
            out[:, number] = summarize((means[0] - means[1])[both], seed).p  # NaN below MIN_EXAMPLES
        elif len(one) + len(other) >= MIN_EXAMPLES:
            out[:, number] = compare_groups(one, other, seed).p
    return np.repeat(out[:, 1:], 2, 1) if two else out


def _interval(scores: Array, truth: Any, group: Any) -> tuple[float, float]:
    """95% percentile interval over bootstrap samples of groups."""
    names, of = np.unique(group, return_inverse=True)
    if len(names) < MIN_EXAMPLES:
        return float("nan"), float("nan")
    counts = np.random.default_rng(0).multinomial(len(names), np.full(len(names), 1 / len(names)), RESAMPLES)
    weight = counts[:, of].astype(float)  # draw unit
    ahead = np.sign(scores[truth][:, None] - scores[~truth]) / 2 + 0.5  # of each pair, half for a tie
    one, two = weight[:, truth], weight[:, ~truth]
    with np.errstate(invalid="ignore"):
        drawn = ((one @ ahead) * two).sum(1) / (one.sum(1) * two.sum(1))
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return float(low), float(high)
