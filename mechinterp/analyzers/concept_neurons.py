"""Which neurons tell texts of one label from the others, and what switching them off does."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from torch import Tensor

from mechinterp.analyzers.ablation import mean_at
from mechinterp.analyzers.max_activating import marked, reader
from mechinterp.analyzers.neuron_sets import alike, by_set, switched_off
from mechinterp.analyzers.probe_data import groups_of
from mechinterp.analyzers.units import Pool, Units, features, part
from mechinterp.core.analyzer import Analyzer, Batch, Context, Model, Needs, Sweep, Writes
from mechinterp.core.display import count
from mechinterp.core.interventions import Intervention, Zero
from mechinterp.core.metrics import Metric, answer_logit, logit_diff, loss
from mechinterp.core.ranking import auroc_interval, separate
from mechinterp.core.result import Part, Result, View
from mechinterp.core.statistics import fdr, rank_p, summarize
from mechinterp.errors import ExamplesError, NeedsError
from mechinterp.sites import Position, Site

Floats: TypeAlias = npt.NDArray[np.floating]
Numbers: TypeAlias = npt.NDArray[np.integer]
Bools: TypeAlias = npt.NDArray[np.bool_]

SITE = "mlp_act"
LEAST = 6
"""Texts of each label, of which two or more are held out."""
AROUND = 8
"""Tokens that are shown around what a value is of."""
SHOWN = 4
"""Labels that have figures of their own, and neurons whose texts are shown in one."""
ALPHA = 0.05


@dataclass(frozen=True)
class ConceptNeurons(Analyzer):
    """MLP neurons whose activation goes with a label of the texts, and what the model loses without them.

    Every neuron of the chosen layers is ranked by how far its AUROC is from .5 for one label against the rest (of two
    labels, the last), where AUROC is the chance that it is more active in a text of the label than in another; then by
    the point-biserial correlation. The best of thousands look better than they are, so a part of the texts takes no
    part in the ranking: on it alone the AUROC of the top neurons is measured once more, and with it what switching them
    off does. That second round overwrites the first neurons of the ranking together, for each size in `sizes`, at all
    positions, beside as many random neurons of the same layers.

    A neuron that goes with a label is no proof that the model uses it, and one that it uses may say other things too:
    labels go with length, topic and single words, and a concept may lie across many neurons, each of them weak.

    Result, over ``label``, ``layer`` and ``neuron``, of the texts that are not held out: ``auroc``, ``correlation``,
    ``p`` and ``q`` of the rank-sum test and ``correlation_p``, ``correlation_q`` of Student's t (`core.ranking`; q over
    all neurons and labels; NaN for a neuron that is the same in all), and ``rank``, 0 for the best. Over ``label`` and
    ``top``: the ``site`` of the top neurons, and ``held_out_auroc`` with its 95% interval,
    ``held_out_auroc_ci_low, …_ci_high`` (`auroc_interval`); with ``shown``, the texts where each is largest: ``value``,
    ``example``, its ``example_label``, and ``context`` with the tokens in « ». Over ``label`` and ``layer``:
    ``significant``, how many neurons have q < .05. Over ``label``: ``texts`` and ``held_out``, how many texts of the
    label there are, and how many of these are held out.

    Over ``label``, ``order`` (``"ranked"``, ``"random"``), ``size`` and ``on`` (held-out texts of the ``"label"``, and
    the ``"rest"``): ``effect``, the metric with the neurons overwritten less the metric as it is, with
    ``effect_ci_low, effect_ci_high`` (95% bootstrap over texts), ``effect_p`` and ``effect_q``; random is the mean of
    the draws. ``excess``, likewise, is ranked less random, text by text; its p is two-sided, from the rank of the
    ranked set among the random ones (`rank_p`), and no smaller than 1 / (draws + 1), .025 unless more are asked for.
    The metric is in ``meta["metric"]``.

    Memory: the activations of all units are kept in float32, 4 bytes for each of units × layers × neurons, a little
    more than twice; with ``each="token"`` give fewer layers.

    Attributes:
        layers: None for all.
        positions, pool, each: which tokens of a text are looked at (`Units`): one token, a span, ``"all"`` but the
            first, or ``each="token"`` or a word category, for one unit of each. A unit has its text's label, and tests
            take texts, not units, for independent.
        sizes: how many neurons are switched off together; none for no second round, which has 1 + `draws` rows for
            each size and label, on held-out texts.
        ablation: what is put in their place: ``"zero"``, or ``"mean"``, their mean over all tokens of all texts but
            the first of each.
        metric: what is measured; by default the logit difference of the answers (or the answer's logit), and the loss
            where there are none.
        top, shown: neurons in the table of the best, and texts for each.
        held_out: share of the texts of each label that is held out.
        draws: random sets of neurons for each size.
        seed: of which texts are held out, and of the random neurons.
        groups: one for each text; those of one group are all held out, or none, and effects are of groups. By default
            each text is its own, and equal texts are one.
    Raises:
        NeedsError: an option that cannot be, or a classifier without answers, which has no loss. ExamplesError: no
            labels, one label only, fewer than six texts of one, or groups too large to be held out (rows whose
            label is None are left out, and counted in ``meta["unlabelled"]``). SiteError: fused experts, which have no
            neurons to hook, or no such layer.
    """

    layers: tuple[int, ...] | None = None
    positions: Position = "end"
    pool: Pool = "mean"
    each: str | None = None
    sizes: tuple[int, ...] = (1, 4, 16, 64)
    ablation: Literal["zero", "mean"] = "zero"
    metric: Metric | None = None
    top: int = 20
    shown: int = 5
    held_out: float = 0.3
    draws: int = 39
    seed: int = 0
    groups: tuple[Any, ...] | None = field(default=None, hash=False)

    def __post_init__(self) -> None:
        if self.ablation not in ("zero", "mean"):
            raise NeedsError(f"The ablation of ConceptNeurons must be 'zero' or 'mean'. Got {self.ablation!r}")
        if (
            min(self.top, self.shown, self.draws, *self.sizes) < 1
            or not 0.1 <= self.held_out <= 0.6
            or self.layers == ()
        ):
            raise NeedsError(
                "ConceptNeurons takes some layers, sizes, top, shown and draws of 1 or more, and a held_out share from"
                f" .1 to .6. Got {self}"
            )
        Units(self.positions, self.pool, self.each)  # raises where these cannot be

    def needs(self, model: Model) -> Needs:
        layers = self.among(model)
        if max(self.sizes, default=0) > (there := len(layers) * model.dims.d_mlp):
            raise NeedsError(
                f"{max(self.sizes)} neurons cannot be switched off: there are {there} in these layers; give smaller"
                " sizes"
            )
        whole = [Site(SITE, layer) for layer in layers] if self._averages else []
        return Needs(reads=[*self._reads(model), *whole])

    def among(self, model: Model) -> tuple[int, ...]:
        """The layers that are looked at."""
        return tuple(sorted(set(range(model.dims.n_layers) if self.layers is None else self.layers)))

    @property
    def units(self) -> Units:
        return Units(self.positions, self.pool, self.each)

    def _reads(self, model: Model) -> tuple[Site, ...]:
        return self.units.reads([Site(SITE, layer) for layer in self.among(model)], model.dims.n_layers)

    @property
    def _averages(self) -> bool:
        """Whether means over all tokens are gathered."""
        return self.ablation == "mean" and bool(self.sizes)

    def observe(self, batch: Batch) -> Part:
        found = part(self.units, self._reads(batch.model), batch)
        if not self._averages:
            return found
        examples, layers = batch.examples, self.among(batch.model)
        column = torch.arange(examples.mask.shape[1], device=examples.mask.device)
        chosen = examples.mask & (column != examples.starts[:, None])
        sums = torch.stack([batch.clean[Site(SITE, layer)][chosen].double().sum(0) for layer in layers])
        more: dict[str, tuple[Any, str]] = {"sum": (sums, "layer neuron"), "count": (chosen.sum(), "")}
        return Part({**found.values, **more}, coords={"layer": list(layers)})

    def combine(self, parts: Iterator[Part], context: Context) -> Result | Analyzer:
        found, layers, metric = list(parts), self.among(context.model), self._metric(context)
        means: dict[int, Tensor] = {}
        if self._averages:
            sums, tokens = (torch.stack([p.values[name][0] for p in found]).sum(0) for name in ("sum", "count"))
            means = dict(zip(layers, sums / tokens, strict=True))
        values, owner, tokens = features(found)
        units = _Units(values.numpy(), owner, tokens, layers)
        group = groups_of(context.tokens, self.groups)
        concepts = _Concepts.of(context.tokens.labels, owner, self.held_out, self.seed, group)
        data, orders = _ranked(concepts, units)
        data = data.merge(_best(concepts, units, orders[:, : self.top], self.shown, reader(context)))
        meta = {"unlabelled": len(context.tokens) - len(concepts.label), "metric": metric.label}
        result = Result(data, meta, _views(concepts.targets, data.sizes["top"]))
        if not self.sizes:
            return result
        write = Zero if self.ablation == "zero" else partial(mean_at, means)
        return _SwitchedOff(self, result, concepts, orders, metric, self._rows(context.model, orders, write))

    def _rows(self, model: Model, orders: Numbers, write: Writes) -> tuple[tuple[Intervention, ...], ...]:
        """Of each label: its first neurons, of each size, and as many random ones of their layers, draw by draw."""
        layers, n = self.among(model), model.dims.d_mlp
        rng = np.random.default_rng(self.seed)
        sets: list[Numbers] = []
        for order in orders:
            ranked = [order[:size] for size in self.sizes]
            sets += [*ranked, *(alike(one, n, rng) for _ in range(self.draws) for one in ranked)]
        return tuple(switched_off(one, layers, n, write, SITE) for one in sets)

    def _metric(self, context: Context) -> Metric:
        answers = context.tokens.answers
        if self.metric is not None:
            return self.metric
        if answers is not None:
            return logit_diff() if len(answers[0]) > 1 else answer_logit()
        if context.model.dims.n_labels is not None and self.sizes:
            raise NeedsError(
                f"{context.model.name} is a classifier, which has no loss of next tokens: give the examples answers, or"
                " a metric, or no sizes"
            )
        return loss()


@dataclass(frozen=True, eq=False)
class _Concepts:
    """Labels of texts, and which texts are held out.

    Attributes:
        label: of each text that has one, by its number.
        targets: the labels that are told from the rest.
        texts: numbers of the texts that have a label and units, in order.
        held_out: of each of these.
        group: of each of these.
    """

    label: Mapping[int, str]
    targets: tuple[str, ...]
    texts: Numbers
    held_out: Bools
    group: Numbers

    @classmethod
    def of(cls, labels: Sequence[Any] | None, owner: Numbers, share: float, seed: int, groups: Numbers) -> "_Concepts":
        """Of the texts that units are from.

        Args:
            groups: the group of each text, of all that there are; groups are not divided.
        Raises:
            ExamplesError: no labels, only one, too few texts with one, or groups that are too large to be divided.
        """
        if labels is None:
            raise ExamplesError("ConceptNeurons tells labels apart, and the examples have none; give labels=")
        there = {i: one for i, one in enumerate(labels) if one is not None and one == one}
        try:
            names = [str(one) for one in sorted(set(there.values()))]
        except TypeError:  # of several kinds
            names = sorted({str(one) for one in there.values()})
        label = {i: str(one) for i, one in there.items()}
        texts = np.array([i for i in np.unique(owner).tolist() if i in label], int)
        counts = {name: sum(label[i] == name for i in texts.tolist()) for name in names}
        if len(names) < 2:
            only = f"all are {names[0]!r}" if names else f"all {len(labels)} are None"
            raise ExamplesError(f"two labels or more can be told apart, and {only}; give texts with another")
        if few := [name for name, n in counts.items() if n < LEAST]:
            raise ExamplesError(
                f"the label {few[0]!r} has {count(counts[few[0]], 'text')}, and each must have {LEAST}, of which some"
                " are held out; give more, or leave it out (None)"
            )
        group, of = groups[texts], np.array([label[i] for i in texts.tolist()])
        rng, held_out = np.random.default_rng(seed), np.zeros(len(texts), bool)
        for name, n in counts.items():
            want = max(2, round(share * n))
            for one in rng.permutation(np.unique(group[of == name])):
                if held_out[of == name].sum() < want:
                    held_out |= group == one
        for name, n in counts.items():
            if not 2 <= int(held_out[of == name].sum()) <= n - 2:
                raise ExamplesError(
                    f"groups are so large that the label {name!r}, in {len(np.unique(group[of == name]))} of them, has"
                    " too few texts to rank on, or to hold out; give smaller groups, or more of them"
                )
        return cls(label, tuple(names) if len(names) > 2 else tuple(names[1:]), texts, held_out, group)

    def chosen(self, which: Bools) -> Bools:
        """Whether some of the texts have each target's label, ``label text``."""
        return np.array([[self.label[i] == name for i in self.texts[which].tolist()] for name in self.targets])


@dataclass(frozen=True, eq=False)
class _Units:
    """Activations of all units.

    Attributes:
        values: ``layer unit neuron``.
        owner: the text of each unit, in order.
        tokens: ``unit bound``.
    """

    values: Floats
    owner: Numbers
    tokens: Numbers
    layers: Sequence[int]

    def of(self, texts: Numbers) -> tuple[Bools, Numbers]:
        """Which units are of some texts, and the text of each of these, numbered from 0."""
        inside = np.isin(self.owner, texts)
        return inside, np.unique(self.owner[inside], return_inverse=True)[1]

    def site(self, neuron: int) -> str:
        """The name of a neuron, by its number through all layers."""
        place, number = divmod(neuron, self.values.shape[2])
        return str(Site(SITE, self.layers[place], neurons=number))

    def column(self, neuron: int) -> Floats:
        """The activation of a neuron in all units."""
        place, number = divmod(neuron, self.values.shape[2])
        return self.values[place, :, number]


def _ranked(concepts: _Concepts, units: _Units) -> tuple[xr.Dataset, Numbers]:
    """Statistics of every neuron without the held-out texts; and ``label rank``, the neurons' numbers, best first."""
    rest = ~concepts.held_out
    chosen = concepts.chosen(rest)
    inside, text = units.of(concepts.texts[rest])
    each = [separate(layer[inside], text, chosen) for layer in units.values]
    auroc, p, r, r_p = (
        np.stack([getattr(one, name) for one in each], 1) for name in ("auroc", "p", "correlation", "correlation_p")
    )
    by = [-np.nan_to_num(np.abs(one).round(9), nan=-1.0).reshape(len(one), -1) for one in (r, auroc - 0.5)]
    orders = np.lexsort(by)
    rank = np.argsort(orders).reshape(auroc.shape)
    columns = {"auroc": auroc, "correlation": r, "p": p, "q": fdr(p), "correlation_p": r_p, "correlation_q": fdr(r_p)}
    data = xr.Dataset(
        {name: (("label", "layer", "neuron"), column) for name, column in {**columns, "rank": rank}.items()},
        {"label": list(concepts.targets), "layer": list(units.layers), "neuron": np.arange(auroc.shape[2])},
    )
    data["significant"] = (data["q"] < ALPHA).sum("neuron")
    data["texts"] = "label", chosen.sum(1) + concepts.chosen(concepts.held_out).sum(1)
    data["held_out"] = "label", concepts.chosen(concepts.held_out).sum(1)
    return data, orders


def _best(
    concepts: _Concepts, units: _Units, tops: Numbers, shown: int, read: Callable[[int], list[str]]
) -> xr.Dataset:
    """The top neurons, ``label top``, once more on the held-out texts; and where they are largest."""
    chosen = concepts.chosen(concepts.held_out)
    inside, text = units.of(concepts.texts[concepts.held_out])
    labelled = np.flatnonzero(np.isin(units.owner, concepts.texts))
    per_text = np.bincount(text)
    values = np.stack([np.stack([units.column(int(i)) for i in top], 1) for top in tops])  # label unit top
    auroc = np.stack([separate(x[inside], text, one[None]).auroc[0] for x, one in zip(values, chosen, strict=True)])
    independent = [[per_text[some].sum() ** 2 / (per_text[some] ** 2).sum() for some in (one, ~one)] for one in chosen]
    low, high = auroc_interval(auroc, *np.array(independent).T[..., None])
    of_labelled = values[:, labelled]
    at = np.argsort(-of_labelled, axis=1, kind="stable")[:, :shown]  # label shown top
    unit = labelled[at].swapaxes(1, 2)
    dims = ("label", "top", "shown")

    def said(pick: Callable[[int], str]) -> npt.NDArray[Any]:
        return np.vectorize(pick, otypes=[object])(unit).astype(str)

    def around(u: int) -> str:
        start, stop = units.tokens[u].tolist()
        return marked(read(int(units.owner[u])), start, stop, AROUND)

    return xr.Dataset(
        {
            "site": (dims[:2], np.array([[units.site(int(i)) for i in top] for top in tops])),
            "held_out_auroc": (dims[:2], auroc),
            "held_out_auroc_ci_low": (dims[:2], low),
            "held_out_auroc_ci_high": (dims[:2], high),
            "value": (dims, np.take_along_axis(of_labelled, at, 1).swapaxes(1, 2)),
            "example": (dims, units.owner[unit]),
            "example_label": (dims, said(lambda u: concepts.label[int(units.owner[u])])),
            "context": (dims, said(around)),
        },
        {"label": list(concepts.targets), "top": np.arange(tops.shape[1]), "shown": np.arange(unit.shape[2])},
    )


@dataclass(frozen=True, eq=False)
class _SwitchedOff(Analyzer):
    """The second round: the first neurons of each label's ranking, and random ones of their layers, overwritten."""

    asked: ConceptNeurons
    first: Result
    concepts: _Concepts
    orders: Numbers
    metric: Metric
    rows: tuple[tuple[Intervention, ...], ...]

    def needs(self, model: Model) -> Needs:
        return Needs(Site("embed"))  # which costs nothing: what is swept is known by the batch, and is of few texts

    def observe(self, batch: Batch) -> Part:
        held = set(self.concepts.texts[self.concepts.held_out].tolist())
        some = [i for i, text in enumerate(batch.examples.rows) if text in held]
        change = torch.full((len(batch.examples.rows), len(self.rows)), torch.nan)
        if some:
            swept = batch.rerun(Sweep(self.metric, rows=self.rows, base="clean"), some)
            assert swept.values is not None and swept.base is not None
            change[some] = (swept.values - swept.base[:, None]).float().cpu()
        return Part(change, "example row")

    def combine(self, parts: Iterator[Part], context: Context) -> Result:
        held = self.concepts.held_out
        change = Result.of(parts).data["value"].transpose("example", "row").values[self.concepts.texts[held]]
        by_label = np.split(change, len(self.orders), 1)
        every = np.stack([by_set(some, self.asked.sizes) for some in by_label], 1)  # text label set size
        inside = self.concepts.chosen(held).T
        on = np.stack([inside, ~inside], -1)[:, :, None, None]
        every = _by_group(np.where(on, every[..., None], np.nan), self.concepts.group[held])
        ranked, random = every[:, :, 0], every[:, :, 1:].mean(2)
        sets = np.nanmean(every, 0).swapaxes(0, 1)  # set label size on: each side has some
        p = rank_p(sets[0], sets[1:])
        found = {"effect": summarize(np.stack([ranked, random], 2), context.seed)}
        found["excess"] = replace(summarize(ranked - random, context.seed), p=p, q=fdr(p))
        data, dims = self.first.data, ("label", "order", "size", "on")
        for name, one in found.items():
            columns = {"": one.mean, "_ci_low": one.ci_low, "_ci_high": one.ci_high, "_p": one.p, "_q": one.q}
            axes = dims if name == "effect" else ("label", *dims[2:])
            data = data.assign({f"{name}{end}": (axes, column) for end, column in columns.items()})
        data = data.assign_coords(order=["ranked", "random"], size=list(self.asked.sizes), on=["label", "rest"])
        views = [
            View(
                "lines", "effect", "size", by="order", select={"label": target, "on": "label"}, log=True,
                title=f"Neurons switched off together, on held-out texts of {target!r}",
                unit=f"change of {self.metric.label}",
            )
            for target in self.concepts.targets[:SHOWN]
        ]  # fmt: skip
        return replace(self.first, data=data, views=(*self.first.views, *views))


def _by_group(values: Floats, group: Numbers) -> Floats:
    """Means of what is there over the texts of each group, ``text ...`` → ``group ...``."""
    names, of = np.unique(group, return_inverse=True)
    sums, counts = np.zeros((len(names), *values.shape[1:])), np.zeros((len(names), *values.shape[1:]))
    there = np.isfinite(values)
    np.add.at(sums, of, np.where(there, values, 0.0))
    np.add.at(counts, of, there)
    return np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)


def _views(targets: Sequence[str], tops: int) -> tuple[View, ...]:
    views: list[View] = []
    for target in targets[:SHOWN]:
        some = {"label": target, "top": tuple(range(min(tops, SHOWN)))}
        views += [
            View(
                "bars", "held_out_auroc", "site", select={"label": target}, center=0.5,
                title=f"Neurons that go with {target!r}, on held-out texts", unit="AUROC",
            ),
            View(
                "lines", "value", "shown", by="top", select=some, unit="activation",
                title=f"Texts where the first neurons that go with {target!r} are largest",
            ),
        ]  # fmt: skip
    return (*views, View("lines", "significant", "layer", by="label", title="Neurons with q < .05", unit="neurons"))
