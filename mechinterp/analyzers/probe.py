"""Linear probes: what can be read off the activations at each site, beside what chance and the words alone give."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from mechinterp.analyzers.fitting import Fits, logistic, ridge
from mechinterp.analyzers.probe_data import Array, Ints, Probed, class_auroc, code_length, interval, rank_correlation
from mechinterp.analyzers.units import Pool, Units, features, part, sharing
from mechinterp.core.analyzer import Analyzer, Batch, Context, Model, Needs, Wanted
from mechinterp.core.display import count
from mechinterp.core.result import Part, Result, View
from mechinterp.core.statistics import fdr
from mechinterp.errors import NeedsError
from mechinterp.sites import Position, Site, Sites


def residual(n_layers: int) -> tuple[Site | Sites, ...]:
    """The residual stream at all its places: before each layer, and after the last."""
    return (Sites("resid_pre"), Site("resid_post", n_layers - 1))


@dataclass(frozen=True)
class Probe(Analyzer):
    """Linear probes of labels at many sites, from one pass (Alain & Bengio 2016).

    Logistic regression for classes, ridge regression for numbers, both on features standardised over what is fitted
    on, scored on folds that share no group. A text that occurs twice is one group. What a probe can read, the model
    need not use: control tasks say how much the probe itself could have learnt (Hewitt & Liang 2019), and only an
    intervention along `LinearProbe.direction` says whether the model uses it.

    Result (``site``): ``auroc``, the mean over folds of that of one class against the rest; ``selectivity``, the
    accuracy less that of the control task; with `permutations`, ``p`` against labels shuffled within folds (all fits
    made again; exact where each text is its own group) and ``q`` over the sites; with `mdl`, the description length
    ``mdl`` in bits by online coding and ``compression``, that of a uniform code over it (Voita & Titov 2020).
    ``accuracy`` (``task site``) on held-out units with ``ci_low, ci_high`` (95%, bootstrap over groups): of the
    ``labels``; of the ``control`` task, a random label for each type (the tokens that a unit is of), in the labels'
    own shares; of the ``majority`` class; and, for words or tokens, of the most frequent label of their ``type``.
    ``confusion`` (``site label prediction``) counts; ``weight`` (``site class dim``) and ``bias`` (``site class``)
    are fitted on everything, for `LinearProbe.of`. For numbers ``r2`` stands for ``accuracy`` (1 - squared error over
    that of the mean of what is fitted on), and ``spearman`` for ``auroc``.

    Attributes:
        sites: of one width; None for the residual stream before each layer and after the last.
        labels: one for each text; with `each`, one for each unit, in order or in a tuple for each text, or one for all
            units of a text. None is unlabelled: left out and counted. By default the examples' own. Floats are numbers,
            all else are classes.
        positions, pool, each: which vectors are taken from a text (`Units`).
        folds: of the cross-validation.
        groups: one for each text; those of one group are never on both sides. By default each text is its own.
        c: inverse strength of the penalty, as in scikit-learn.
        control: whether control tasks are fitted.
        permutations: shuffles for the p-value; it can be no smaller than 1 / (permutations + 1).
        mdl: whether description lengths are measured, of classes. No group is on both sides of a block's beginning.
    Raises:
        NeedsError: fewer than two folds, or sites without one vector a token or of different width. ExamplesError: no
            labels, one class only, a class with fewer groups than folds, equal texts in different groups, a text
            without a group; with `mdl`, numbers, or groups so large that no portion of half the units has all classes.
    """

    sites: Wanted | None = field(default=None, hash=False)
    labels: tuple[Any, ...] | None = field(default=None, hash=False)
    positions: Position = "end"
    pool: Pool = "mean"
    each: str | None = None
    folds: int = 5
    groups: tuple[Any, ...] | None = field(default=None, hash=False)
    c: float = 1.0
    control: bool = True
    permutations: int = 0
    mdl: bool = False

    def __post_init__(self) -> None:
        if self.folds < 2 or self.c <= 0 or self.permutations < 0:
            raise NeedsError(
                f"Probe must have two folds or more, a c above 0 and permutations of 0 or more. Got {self}"
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
        x = x[:, torch.from_numpy(data.rows)]
        device = context.model.device
        found = [self._site(one.to(device), data, context.seed) for one in x]
        sites = [str(site.at(None)) for site in self._reads(context.model)]
        about = {
            "sharing": sharing(owner[data.rows], tokens[data.rows]),
            "fitted_on": sorted(set(_fingerprints(context, owner[data.rows]).values())),
        }
        return _report(self, found, data, sites, about)

    def _site(self, x: Tensor, data: Probed, seed: int) -> dict[str, Array]:
        """All that is reported of one site."""
        held = torch.from_numpy(data.held).to(x.device)  # fold unit
        k, n = held.shape
        everything = torch.ones(1, n, dtype=torch.bool, device=x.device)
        shuffled = data.shuffles(self.permutations, seed)  # shuffle unit
        tasks = [data.y[None], *([data.control[None]] if self.control and data.control is not None else []), shuffled]
        targets = torch.from_numpy(np.concatenate(tasks)).to(x.device)
        # Every task on all folds; then the labels on everything, and on portions.
        portions = torch.from_numpy(data.portions(seed)).to(x.device) if self.mdl else everything[:0]
        labels = torch.cat([targets.repeat_interleave(k, 0), targets[:1].expand(1 + len(portions), n)])
        rows = torch.cat([(~held).repeat(len(targets), 1), everything, portions])
        fits = logistic(x, labels, rows, len(data.classes), self.c) if data.classes else ridge(x, labels, rows, self.c)
        out_of_fold = np.stack(
            [_held_out(fits, x, held, slice(i * k, (i + 1) * k)) for i in range(len(targets))]
        )  # task unit output
        at = len(targets) * k
        out: dict[str, Array] = {"scores": out_of_fold[: len(tasks) - 1]}
        out["weight"], out["bias"] = (v[at].float().cpu().numpy() for v in (fits.weight, fits.bias))
        if not bool(fits.converged.all()):
            out["unconverged"] = np.array(float((~fits.converged).sum()))
        if len(shuffled):
            quality = [data.quality(s, t) for s, t in zip(out_of_fold, np.concatenate(tasks), strict=True)]
            null, real = np.array(quality[len(tasks) - 1 :]), quality[0]
            out["p"] = np.array((1 + (null >= real - 1e-12).sum()) / (1 + len(null)))
        if len(portions):
            out["mdl"] = np.array(code_length(fits, at + 1, portions, x, data))
        return out


def _held_out(fits: Fits, x: Tensor, held: Tensor, which: slice) -> Array:
    """Each unit's scores by the fit that did not see it, ``unit output``."""
    weight, bias = fits.weight[which], fits.bias[which]
    out = x.new_zeros(len(x), bias.shape[1])
    for fold, mine in enumerate(held):
        out[mine] = x[mine] @ weight[fold].T + bias[fold]
    return out.double().cpu().numpy()


def _fingerprints(context: Context, owner: Ints) -> dict[int, str]:
    """A hash of the tokens of each text that a unit is of."""
    texts = {text: np.array(context.tokens.ids[text], dtype="<i8").tobytes() for text in np.unique(owner).tolist()}
    return {text: hashlib.blake2b(ids, digest_size=8).hexdigest() for text, ids in texts.items()}


def _report(
    probe: Probe, found: Sequence[dict[str, Array]], data: Probed, sites: list[str], about: dict[str, Any]
) -> Result:
    """Everything that was found at all sites, with intervals and baselines; `about` is more for `Result.meta`."""
    names = ["labels", *(["control"] if len(found[0]["scores"]) > 1 else [])]
    truths = [data.y] if data.control is None or len(names) == 1 else [data.y, data.control]
    right = np.stack([[data.gains(one["scores"][i], truth) for one in found] for i, truth in enumerate(truths)])
    # task site unit [2 for numbers: what the probe and what the mean leave unexplained]
    if data.classes:
        extra = [("majority", data.majority()), *([("type", data.by_type())] if data.of_words else [])]
        names += [name for name, _ in extra]
        right = np.concatenate([right, np.stack([np.repeat(g[None], len(sites), 0) for _, g in extra])])
    value = "accuracy" if data.classes else "r2"
    mean, low, high = interval(right, data.group, bool(data.classes))
    level = ("task", "site")
    at = ("site",)
    variables: dict[str, Any] = {value: (level, mean), "ci_low": (level, low), "ci_high": (level, high)}
    if "control" in names:
        variables["selectivity"] = (at, mean[0] - mean[1])
    if data.classes:
        variables["auroc"] = (at, np.array([class_auroc(one["scores"][0], data) for one in found]))
        guess = np.stack([data.predicted(one["scores"][0]) for one in found])
        counts = np.zeros((len(sites), len(data.classes), len(data.classes)), dtype=int)
        for i, row in enumerate(guess):
            np.add.at(counts[i], (data.y, row), 1)
        variables["confusion"] = (("site", "label", "prediction"), counts)
    else:
        rank = [rank_correlation(one["scores"][0][:, 0], data.y) for one in found]
        variables["spearman"] = (at, np.array(rank))
    if "p" in found[0]:
        p = np.array([float(one["p"]) for one in found])
        variables |= {"p": (at, p), "q": (at, fdr(p))}
    if "mdl" in found[0]:
        bits = np.array([float(one["mdl"]) for one in found])
        variables |= {"mdl": (at, bits), "compression": (at, len(data.y) * np.log2(len(data.classes)) / bits)}
    weight, bias = (np.stack([one[name] for one in found]) for name in ("weight", "bias"))
    if len(data.classes) == 2:  # the log-odds of the second: half for it, half against the first
        weight, bias = (np.concatenate([-v / 2, v / 2], 1) for v in (weight, bias))
    variables |= {"weight": (("site", "class", "dim"), weight), "bias": (("site", "class"), bias)}
    classes = [str(name) for name in data.classes] or ["value"]
    coords: dict[str, Any] = {"task": names, "site": sites, "class": classes}
    if data.classes:
        coords |= {"label": classes, "prediction": classes}
    units = probe.units
    meta = {
        "units": len(data.y), "left_out": data.left_out, "groups": len(set(data.group.tolist())),
        "chance": 1 / len(data.classes) if data.classes else 0.0,
        "taken": {"positions": units.positions, "pool": units.pool, "each": units.each}, **about,
    }  # fmt: skip
    if unconverged := sum(float(one.get("unconverged", 0.0)) for one in found):
        meta["unconverged"] = int(unconverged)
    title = "Accuracy of linear probes, held out" if data.classes else "R² of linear probes, held out"
    views = [View("lines", value, "site", by="task", title=title, unit=value if data.classes else "R²")]
    if data.classes:
        best = sites[int(mean[0].argmax())]
        title = f"Labels and predictions at {best}, the site of the highest accuracy"
        view = View("heatmap", "confusion", "prediction", "label", select={"site": best}, unit="units", title=title)
        views.append(view)
    if "mdl" in found[0]:
        title = "Compression of the labels by online coding (1: nothing is read)"
        views.append(View("lines", "compression", "site", title=title, unit="uniform code length / code length"))
    return Result(xr.Dataset(variables, coords), meta, tuple(views))


@dataclass(frozen=True)
class ProbeTransfer(Analyzer):
    """Probes that were fitted elsewhere, on these examples: do they read the same thing here?

    Result (``site``): ``accuracy`` with ``ci_low, ci_high`` (95%, bootstrap over groups), ``auroc`` over all units,
    and ``majority``, the share of the most frequent label here; for numbers ``r2`` (of the mean here) and ``spearman``.
    ``meta["seen"]`` counts the texts that the probes were fitted on, by their tokens: of these nothing is learnt.

    Attributes:
        probes: a result of `Probe`, as it was or loaded again.
        labels, groups: as for `Probe`; the labels must be among the probes' classes.
    Raises:
        NeedsError: the result is of another analyzer. ExamplesError: labels that the probes do not know.
    """

    probes: Result = field(hash=False)
    labels: tuple[Any, ...] | None = field(default=None, hash=False)
    groups: tuple[Any, ...] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        if not {"taken", "fitted_on"} <= set(self.probes.meta) or "weight" not in self.probes.data:
            raise NeedsError(f"ProbeTransfer must have a result of Probe. Got {self.probes._title()}")

    @property
    def units(self) -> Units:
        return Units(**self.probes.meta["taken"])

    def _reads(self, model: Model) -> tuple[Site, ...]:
        sites = [Site.parse(str(site)) for site in self.probes.data["site"].values]
        return self.units.reads(sites, model.dims.n_layers)

    def needs(self, model: Model) -> Needs:
        return Needs(self._reads(model))

    def observe(self, batch: Batch) -> Part:
        return part(self.units, self._reads(batch.model), batch)

    def combine(self, parts: Iterator[Part], context: Context) -> Result:
        x, owner, tokens = features(parts)
        names: list[str] = self.probes.data["class"].values.tolist()
        known = [] if names == ["value"] else names
        data = Probed.of(
            context.tokens, owner, tokens, self.labels, self.groups, 0, context.seed, self.units.each is not None,
            known=known,
        )  # fmt: skip
        x = x[:, torch.from_numpy(data.rows)]
        weight, bias = (torch.from_numpy(self.probes.data[v].values).float() for v in ("weight", "bias"))
        scores = (torch.einsum("sud,scd->suc", x, weight) + bias[:, None]).double().numpy()
        if len(known) == 2:
            scores = scores[..., 1:] - scores[..., :1]
        right = np.stack([data.gains(one, data.y) for one in scores])[None]
        mean, low, high = interval(right, data.group, bool(known))
        value: Literal["accuracy", "r2"] = "accuracy" if known else "r2"
        at = ("site",)
        variables: dict[str, Any] = {value: (at, mean[0]), "ci_low": (at, low[0]), "ci_high": (at, high[0])}
        if known:
            variables["auroc"] = (at, np.array([class_auroc(one, data) for one in scores]))
            share = float(np.bincount(data.y).max() / len(data.y))
            variables["majority"] = (at, np.full(len(scores), share))
        else:
            rank = [rank_correlation(one[:, 0], data.y) for one in scores]
            variables["spearman"] = (at, np.array(rank))
        texts = _fingerprints(context, owner[data.rows]).values()
        seen = len([text for text in texts if text in set(self.probes.meta["fitted_on"])])
        title = f"{'Accuracy' if known else 'R²'} of probes that were fitted elsewhere"
        title += f"; {seen} of {count(len(texts), 'text')} they were fitted on" if seen else ""
        view = View("lines", value, "site", title=title, unit=value if known else "R²")
        sites = self.probes.data["site"].values.tolist()
        meta = {
            "units": len(data.y),
            "left_out": data.left_out,
            "texts": len(texts),
            "seen": seen,
            "sharing": sharing(owner[data.rows], tokens[data.rows]),
        }
        return Result(xr.Dataset(variables, {"site": sites}), meta, (view,))
