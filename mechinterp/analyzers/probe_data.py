"""What probes are fitted on: labels, groups, folds, control tasks and shuffles; and how their scores are judged."""

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from scipy import stats
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from torch import Tensor

from mechinterp.analyzers.fitting import Fits
from mechinterp.core.ranking import auroc
from mechinterp.core.tokens import Tokens, is_label
from mechinterp.errors import ExamplesError

Array: TypeAlias = npt.NDArray[np.float64]
Ints: TypeAlias = npt.NDArray[np.int64]
Bools: TypeAlias = npt.NDArray[np.bool_]

PORTIONS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.0625, 0.125, 0.25, 0.5, 1.0)
"""Of the units, after which the probe is fitted again in online coding (Voita & Titov 2020)."""

RESAMPLES = 2000


@dataclass(frozen=True, eq=False)
class Probed:
    """Labelled units.

    Attributes:
        rows: which units have a label.
        y: number of each one's class, or its number.
        classes: names, in order; none for numbers.
        group: of each unit.
        held: ``fold unit``.
        type: of each unit: those of the same tokens have the same.
        control: labels by type, drawn at random in the labels' shares; None where there are fewer than two types.
        of_words: whether units are parts of texts.
        left_out: units without a label.
    """

    rows: Ints
    y: npt.NDArray[Any]
    classes: tuple[Any, ...]
    group: Ints
    held: Bools
    type: Ints
    control: npt.NDArray[Any] | None
    of_words: bool
    left_out: int

    @classmethod
    def of(
        cls,
        tokens: Tokens,
        owner: Ints,
        where: Ints,
        labels: Sequence[Any] | None,
        groups: Sequence[Any] | None,
        folds: int,
        seed: int,
        of_words: bool,
        known: Sequence[str] | None = None,
    ) -> "Probed":
        """Labels put to units.

        Args:
            owner, where: the text of each unit, and its tokens there.
            folds: 0 for none.
            known: the classes, where they are not to be found in the labels; empty for numbers.
        """
        given = _per_unit(tokens, owner, labels, of_words)
        rows = np.array([i for i, label in enumerate(given) if label is not None], dtype=np.int64)
        if not len(rows):
            raise ExamplesError("no unit has a label; give labels= to Examples.of or to the probe")
        some = [given[i] for i in rows]
        number = all(isinstance(label, float | np.floating) for label in some) if known is None else not known
        if number:
            odd = [v for v in some if isinstance(v, bool) or not isinstance(v, Real) or not np.isfinite(float(v))]
            if odd:
                raise ExamplesError(f"labels that are numbers must be finite floats. Got {odd[0]!r}")
            y: npt.NDArray[Any] = np.array([float(v) for v in some])
            classes: tuple[Any, ...] = ()
            if y.std() == 0:
                raise ExamplesError(f"all {len(y)} labels are {y[0]}; a probe needs labels that differ")
        else:
            classes = tuple(sorted(set(some), key=str)) if known is None else tuple(known)
            if len({str(name) for name in classes}) < len(classes):
                raise ExamplesError(f"labels must differ as text. Got {', '.join(map(repr, classes[:10]))}")
            numbers = {str(name): i for i, name in enumerate(classes)}
            if strange := [label for label in some if str(label) not in numbers]:
                raise ExamplesError(f"the label {strange[0]!r} is none of the probes' {', '.join(numbers)}")
            y = np.array([numbers[str(label)] for label in some], dtype=np.int64)
            if len(classes) < 2:
                raise ExamplesError(f"all {len(y)} labels are {some[0]!r}; a probe needs two classes or more")
        group = groups_of(tokens, groups)[owner[rows]]
        kinds = [tokens.ids[o][a:b] for o, (a, b) in zip(owner[rows], where[rows], strict=True)]
        names = {kind: i for i, kind in enumerate(dict.fromkeys(kinds))}
        kind = np.array([names[k] for k in kinds], dtype=np.int64)
        held = _folds(y, classes, group, folds, seed) if folds else np.zeros((0, len(y)), dtype=bool)
        control = None
        if folds and len(names) > 1:
            drawn = np.random.default_rng(seed).choice(y, len(names))
            control = drawn[kind] if len(set(drawn[kind].tolist())) > 1 else None
        return cls(rows, y, classes, group, held, kind, control, of_words, len(given) - len(rows))

    def predicted(self, scores: Array) -> Ints:
        """Class numbers, from ``unit output``."""
        return (scores[:, 0] > 0).astype(np.int64) if scores.shape[1] == 1 else scores.argmax(1)

    def gains(self, scores: Array, truth: npt.NDArray[Any]) -> Array:
        """1 or 0 for right and wrong, ``unit``; for numbers the squared errors of probe and mean, ``unit 2``."""
        if self.classes:
            return (self.predicted(scores) == truth).astype(float)
        mean = np.full(len(truth), truth.mean())
        for fold in self.held:
            mean[fold] = truth[~fold].mean()
        return np.stack([(truth - scores[:, 0]) ** 2, (truth - mean) ** 2], -1)

    def quality(self, scores: Array, truth: npt.NDArray[Any]) -> float:
        """Accuracy, or R²."""
        gains = self.gains(scores, truth)
        return float(gains.mean()) if self.classes else float(1 - gains[:, 0].sum() / gains[:, 1].sum())

    def majority(self) -> Array:
        """Whether the most frequent class of the other folds is right, by unit."""
        out = np.zeros(len(self.y))
        for fold in self.held:
            out[fold] = self.y[fold] == np.bincount(self.y[~fold]).argmax()
        return out

    def by_type(self) -> Array:
        """Whether the most frequent class of a unit's type in the other folds is right; new types: the majority."""
        out = np.zeros(len(self.y))
        for fold in self.held:
            counts = np.zeros((self.type.max() + 1, len(self.classes)))
            np.add.at(counts, (self.type[~fold], self.y[~fold]), 1)
            overall = counts.sum(0)
            guess = np.where(counts.any(1), (counts + 1e-9 * overall).argmax(1), overall.argmax())
            out[fold] = guess[self.type[fold]] == self.y[fold]
        return out

    def shuffles(self, n: int, seed: int) -> npt.NDArray[Any]:
        """Labels shuffled within folds, ``shuffle unit``.

        Folds were made for the labels, so that only shuffles within them are as likely as what was observed. Where
        labels differ within a group they are shuffled there, else those of whole groups are.
        """
        rng = np.random.default_rng(seed)
        out = np.repeat(self.y[None], n, 0)
        pools: list[list[Ints]] = []  # of each pool its members, which hand their labels around
        for fold in self.held:
            here = [np.flatnonzero(fold & (self.group == g)) for g in np.unique(self.group[fold])]
            mixed = any(len(set(self.y[m].tolist())) > 1 for m in here)
            pools += [[m[i : i + 1] for i in range(len(m))] for m in here] if mixed else [here]
        for row in out:
            for pool in pools:
                values = [self.y[m[0]] for m in pool]
                for m, value in zip(pool, rng.permutation(np.array(values)), strict=True):
                    row[m] = value
        return out

    def portions(self, seed: int) -> Bools:
        """The portions that online coding fits on, ``portion unit``: those with all classes, and not everything.

        Groups come whole, in a random order, each portion with as many as fit: what a block is coded with shares no
        group with it.

        Raises:
            ExamplesError: the labels are numbers, or no portion has all classes.
        """
        if not self.classes:
            raise ExamplesError("online coding is of classes, and these labels are numbers; leave mdl out")
        names, of = np.unique(self.group, return_inverse=True)
        place = np.random.default_rng(seed).permutation(len(names))[of]  # of each unit's group in the order
        ends = np.bincount(place).cumsum()
        out: list[Bools] = []
        for groups in dict.fromkeys(int((ends <= share * len(place)).sum()) for share in PORTIONS[:-1]):
            some = place < groups
            if len(set(self.y[some].tolist())) == len(self.classes):
                out.append(some)
        if not out:
            raise ExamplesError(
                f"there are {len(names)} groups, and no portion of them with half of the units has all"
                f" {len(self.classes)} classes: nothing to code the rest with; give more texts or smaller groups, or"
                " leave mdl out"
            )
        return np.array(out)


def code_length(fits: Fits, first: int, portions: Tensor, x: Tensor, data: Probed) -> float:
    """Bits of all labels: each block by the probe of what came before it, the first one uniformly."""
    total = float(portions[0].sum()) * np.log2(len(data.classes))
    y = torch.from_numpy(data.y).to(x.device)
    for i, seen in enumerate(portions):
        block = (portions[i + 1] if i + 1 < len(portions) else torch.ones_like(seen)) & ~seen
        scores = x[block] @ fits.weight[first + i].T + fits.bias[first + i]
        if scores.shape[1] == 1:
            scores = torch.cat([torch.zeros_like(scores), scores], 1)
        total += float(torch.nn.functional.cross_entropy(scores.double(), y[block], reduction="sum")) / np.log(2)
    return total


def class_auroc(scores: Array, data: Probed) -> float:
    """Of one class against the rest, mean over classes and over folds (over all at once where there are none)."""
    folds = data.held if len(data.held) else np.ones((1, len(data.y)), dtype=bool)
    columns = np.concatenate([-scores, scores], 1) if scores.shape[1] == 1 else scores
    each = [
        auroc(columns[fold, number], data.y[fold] == number) for fold in folds for number in range(len(data.classes))
    ]
    known = [value for value in each if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def rank_correlation(one: Array, two: Array) -> float:
    """Spearman's; NaN where one is constant."""
    a, b = stats.rankdata(one), stats.rankdata(two)
    return float(np.corrcoef(a, b)[0, 1]) if a.std() and b.std() else float("nan")


def interval(gains: Array, group: Ints, classes: bool) -> tuple[Array, Array, Array]:
    """Mean and 95% percentile interval over bootstrap samples of groups, ``task site``.

    Args:
        gains: ``task site unit``, or with an axis of the two squared errors behind it.
    """
    names, of = np.unique(group, return_inverse=True)
    counts = np.random.default_rng(0).multinomial(len(names), np.full(len(names), 1 / len(names)), RESAMPLES)
    tasks, sites, n = gains.shape[:3]
    flat = gains.reshape(tasks * sites, n, -1).transpose(1, 0, 2)  # unit cell [2]
    sums = np.zeros((len(names), *flat.shape[1:]))
    np.add.at(sums, of, flat)
    drawn = np.einsum("rg,gcv->rcv", counts, sums)
    if classes:
        size = counts @ np.bincount(of)
        values, mean = drawn[..., 0] / size[:, None], flat[..., 0].mean(0)
    else:
        with np.errstate(invalid="ignore", divide="ignore"):
            values = 1 - drawn[..., 0] / drawn[..., 1]
        mean = 1 - flat[..., 0].sum(0) / flat[..., 1].sum(0)
    low, high = np.nanquantile(values, [0.025, 0.975], axis=0)
    return mean.reshape(tasks, sites), low.reshape(tasks, sites), high.reshape(tasks, sites)


def _per_unit(tokens: Tokens, owner: Ints, labels: Sequence[Any] | None, several: bool) -> list[Any]:
    """The label of every unit, None where it has none."""
    column = tokens.labels if labels is None else labels
    if column is None:
        raise ExamplesError("the examples have no labels; give labels= to Examples.of or to the probe")
    if several and len(column) == len(owner):  # one for each unit, in order
        return [label if is_label(label) else None for label in column]
    if len(column) != len(tokens):
        raise ExamplesError(f"there are {len(column)} labels for {len(tokens)} texts; give one for each")
    counts = np.bincount(owner, minlength=len(tokens))
    out: list[Any] = []
    for text, label in enumerate(column):
        if isinstance(label, tuple | list):
            if not several:
                raise ExamplesError(
                    f"example {text} has {len(label)} labels; give one, or each= for one a word or token"
                )
            if len(label) != counts[text]:
                raise ExamplesError(f"example {text} has {len(label)} labels for {counts[text]} words or tokens")
            out += list(label)
        else:
            out += [label] * int(counts[text])
    return [label if is_label(label) else None for label in out]


def groups_of(tokens: Tokens, groups: Sequence[Any] | None) -> Ints:
    """A number for the group of each text; equal texts are of one."""
    if groups is None:
        numbers = {ids: i for i, ids in enumerate(dict.fromkeys(tokens.ids))}
        return np.array([numbers[ids] for ids in tokens.ids], dtype=np.int64)
    if len(groups) != len(tokens):
        raise ExamplesError(f"there are {len(groups)} groups for {len(tokens)} texts; give one for each")
    if None in groups:
        raise ExamplesError(f"example {groups.index(None)} has no group; give it one, or leave it out")
    first: dict[tuple[int, ...], int] = {}
    for text, ids in enumerate(tokens.ids):
        before = first.setdefault(ids, text)
        if groups[before] != groups[text]:
            raise ExamplesError(
                f"the groups leak: examples {before} and {text} are the same text, and are in the groups"
                f" {groups[before]!r} and {groups[text]!r}; put them into one, or leave one out"
            )
    numbers = {name: i for i, name in enumerate(dict.fromkeys(groups))}
    return np.array([numbers[name] for name in groups], dtype=np.int64)


def _folds(y: npt.NDArray[Any], classes: Sequence[Any], group: Ints, folds: int, seed: int) -> Bools:
    """Held-out units, ``fold unit``; groups stay whole, and classes have their shares where that can be."""
    names = np.unique(group)
    if len(names) < folds:
        raise ExamplesError(f"there are {len(names)} groups for {folds} folds; give fewer folds, or more texts")
    held = np.zeros((folds, len(y)), dtype=bool)
    if not classes:
        order = np.random.default_rng(seed).permutation(len(names))
        fold = order[np.searchsorted(names, group)] % folds
        held[fold, np.arange(len(y))] = True
        return held
    for number, name in enumerate(classes):
        if (n := len(np.unique(group[y == number]))) < folds:
            raise ExamplesError(
                f"the class {name!r} is in {n} groups, fewer than the {folds} folds; give fewer folds, or more of it"
            )
    whole = len(names) == len(y)
    splitter: Any = (StratifiedKFold if whole else StratifiedGroupKFold)(folds, shuffle=True, random_state=seed)
    for fold, (_, out) in enumerate(splitter.split(np.zeros(len(y)), y, None if whole else group)):
        held[fold, out] = True
    for fold in held:
        gone = set(range(len(classes))) - set(y[~fold].tolist())
        if gone or not fold.any():
            raise ExamplesError(
                f"groups are so large that a fold has no {classes[min(gone, default=0)]!r} to fit on; give fewer folds,"
                " or smaller groups"
            )
    return held
