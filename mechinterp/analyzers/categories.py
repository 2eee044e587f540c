"""Attention by word category: who attends to what, and whether groups of examples differ in it."""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor

from mechinterp import sites
from mechinterp.core.analyzer import Analyzer, Batch, Context, Model, Needs
from mechinterp.core.result import Part, Result, View
from mechinterp.core.statistics import compare_groups, fdr, largest_p, summarize
from mechinterp.core.tokens import TokenBatch
from mechinterp.core.trace import Read, Reduce
from mechinterp.errors import ExamplesError
from mechinterp.shapes import PatternBlock
from mechinterp.sites import Position

ALL = "all examples"
"""The group of examples without labels."""


@dataclass(frozen=True)
class AttentionByCategory(Analyzer):
    """Attention from chosen queries to the tokens of each word category, by layer and head, and by group.

    The examples need categories (``Examples.categorize``); their labels, where they have some, are the groups.
    Of each example, averaged over its queries: ``share``, the part of a head's attention that goes to the
    category's tokens; ``expected``, the part that uniform attention over the tokens that the query sees would
    give them; ``sink``, the part that goes to the text's first token, which is often an attention sink and so
    belongs to no category unless `first_token`; ``entropy`` of the pattern, in nats. Where no query sees a
    token of the category, the example has no share (NaN), rather than one of zero.

    Result: that of `category_statistics`. With ``statistics=False`` the numbers of each example alone, to be
    stored, joined and given to it later: ``share`` (``layer example head category``), ``expected`` (``layer
    example category``), ``sink`` and ``entropy`` (``layer example head``), ``queries`` (``example``), ``matches``
    (``example category``: how often the category's terms occur), and ``label`` (``example``) where there are labels.

    Whole patterns are never held: one query is read where it is, and for all queries, or for a name, each
    block of queries is summed up inside the pass.

    Attributes:
        queries: ``"end"``, a position's number, ``"all"``, or the name of a position or a span.
        groups: two labels, whose difference is taken, first less second; None for all that there are.
        floor: least share of attention above what is expected, for a head to be ``specialised``.
        first_token: the text's first token counts in its categories.
        statistics: False for the numbers of each example alone.
    Raises:
        ExamplesError: the examples have no categories, or a group of `groups` has no example.
    """

    queries: Position = "end"
    groups: tuple[str, str] | None = None
    floor: float = 0.05
    first_token: bool = False
    statistics: bool = True

    def needs(self, model: Model) -> Needs:
        if self._one:
            return Needs(reads=sites.pattern(positions=self.queries))
        return Needs(reads=Read(sites.pattern(), reduce=Reduce(Received(self.queries), "example head key")))

    @property
    def _one(self) -> bool:
        return isinstance(self.queries, int) or self.queries == "end"

    def observe(self, batch: Batch) -> Part:
        examples = batch.examples
        if not examples.categories:
            raise ExamplesError(
                "these examples have no word categories; give them some: examples.categorize(vocabulary)"
            )
        found = batch.clean.stack("pattern").float()  # layer example head key
        chosen = chosen_queries(self.queries, examples)
        n = chosen.sum(1)[:, None, None]
        if self._one:
            attention, entropy = found, pattern_entropy(found)
        else:
            attention, entropy = found[..., :-1] / n, (found[..., -1:] / n)[..., 0]
        members = examples.members
        first = torch.arange(members.shape[2], device=members.device) == examples.starts[:, None]
        if not self.first_token:
            members = members & ~first[:, None]
        columns = torch.cat([members, first[:, None]], 1).to(attention)
        masses = attention @ columns.transpose(1, 2)  # layer example head (category and the first token)
        expected = expected_shares(members, chosen, examples, batch.model.dims.windows)
        share = masses[..., :-1].masked_fill((expected == 0)[:, :, None], float("nan"))
        values = {
            "share": (share, "layer example head category"),
            "expected": (expected.masked_fill(expected == 0, float("nan")), "layer example category"),
            "sink": (masses[..., -1], "layer example head"),
            "entropy": (entropy, "layer example head"),
            "queries": (chosen.sum(1), "example"),
        }
        return Part(values, coords={"category": list(examples.categories)})

    def combine(self, parts: Iterator[Part], context: Context) -> Result:
        tokens = context.tokens
        data = Result.of(parts, unit="share of attention").data
        matches = np.array([[len(spans) for spans in column] for column in tokens.categories.values()])
        data["matches"] = (("example", "category"), matches.T)
        if tokens.labels is not None:
            labels = ["" if label is None else str(label) for label in tokens.labels]
            data["label"] = ("example", np.array(labels, dtype=object))
        if not self.statistics:
            return Result(data, {"queries": str(self.queries), "first_token": self.first_token})
        result = category_statistics(data, self.groups, self.floor, context.seed)
        return result.with_meta(queries=str(self.queries), first_token=self.first_token)


@dataclass(frozen=True)
class Received:
    """Attention that each key receives from the chosen queries, summed block by block.

    Returns ``example head key``, with the summed entropy of the queries' patterns as one last column.
    """

    queries: Position

    def __call__(self, block: PatternBlock, queries: slice, batch: TokenBatch) -> Tensor:
        keys = block.shape[-1]
        block = block[..., : batch.offset + queries.stop].float()  # nobody attends to what comes later
        chosen = chosen_queries(self.queries, batch)[:, queries].to(block)
        received = (chosen[:, None, None] @ block)[:, :, 0]
        entropy = (pattern_entropy(block) * chosen[:, None]).sum(2, keepdim=True)
        return torch.cat([torch.nn.functional.pad(received, (0, keys - received.shape[-1])), entropy], 2)


def pattern_entropy(pattern: Float[Tensor, "*rows key"]) -> Float[Tensor, "*rows"]:
    """-Σ p ln p of each query's attention, in nats."""
    logs = pattern.clamp_min(torch.finfo(pattern.dtype).tiny).log_()
    return -logs.mul_(pattern).sum(-1)


def chosen_queries(queries: Position, batch: TokenBatch) -> Bool[Tensor, "example pos"]:
    """Which columns are queries: all real tokens, or those at a position or of a span."""
    if queries == "all":
        return batch.mask[:, batch.offset :]
    where = batch.where(queries)
    assert where is not None
    columns = where.columns.reshape(len(batch), -1)
    valid = torch.ones_like(columns, dtype=torch.bool) if where.valid is None else where.valid.reshape(columns.shape)
    out = torch.zeros(batch.ids.shape, dtype=torch.int, device=batch.ids.device)
    return out.scatter_add_(1, columns, valid.int()) > 0


def expected_shares(
    members: Bool[Tensor, "example category total"],
    chosen: Bool[Tensor, "example pos"],
    batch: TokenBatch,
    windows: Sequence[int | None],
) -> Float[Tensor, "layer example category"]:
    """Mean over the chosen queries of the categories' part of the tokens that the query sees, in each layer."""
    width = chosen.shape[1]
    before = torch.nn.functional.pad(members.cumsum(2), (1, 0))  # members in the columns before each one
    column = torch.arange(batch.offset, batch.offset + width, device=members.device)
    of_window: dict[int | None, Tensor] = {}
    for window in dict.fromkeys(windows):
        begin = batch.starts[:, None].expand(-1, width)
        if window is not None:
            begin = torch.maximum(begin, column - window + 1)
        count = before[:, :, column + 1] - before.take_along_dim(begin[:, None].expand(-1, members.shape[1], -1), 2)
        shares = count / (column + 1 - begin).clamp(min=1)[:, None]
        of_window[window] = (shares * chosen[:, None]).sum(2) / chosen.sum(1)[:, None]
    return torch.stack([of_window[window] for window in windows])


def category_statistics(
    each: xr.Dataset | Result, groups: tuple[str, str] | None = None, floor: float = 0.05, seed: int = 0
) -> Result:
    """Statistics of stored numbers of each example, as ``AttentionByCategory(statistics=False)`` gives them.

    Parts of a set may be joined first: ``xarray.concat(datasets, "example")``.

    Result, by ``group layer head category``: ``share`` (mean, with ``ci_low`` and ``ci_high``), ``ratio`` (mean
    share over mean expected share), ``above`` (mean of share - expected), ``p`` (sign flips of that) and ``q``
    (over all of it), and ``specialised``: `floor` or more above, and q < .05. With two groups, by ``layer head
    category``: ``difference`` of their means, Cohen's ``d``, each with interval, and ``difference_p`` and
    ``difference_q`` of a permutation test, ``significant`` where q < .05; and by ``category``, ``category_p`` and
    ``category_q`` of the test whether the groups differ anywhere in it (`largest_p`). By ``group layer category``:
    ``layer_share``, the mean over heads of each example's share, with interval. By ``group layer head``: mean
    ``sink`` and ``entropy``. By ``group category``: ``examples`` that see the category, ``matches``, how often
    its terms occur, and ``specialised_heads``, how many there are. The meta holds the groups' sizes, and
    ``notes``: all that was left out, or cannot be found with so few examples.

    Args:
        groups: two labels, whose difference is taken, first less second. None for all labels in order; the
            difference is then taken where there are two.
        floor: least mean share above what is expected, for a head to be specialised.
    Raises:
        ExamplesError: a group of `groups` has no example, or all labels are missing.
    """
    data = (each.data if isinstance(each, Result) else each).transpose("example", "layer", "head", "category", ...)
    rows, notes = _groups(data, groups)
    found = [_of_group(data.isel(example=row), seed) for row in rows.values()]
    seen = np.sum([one["examples"][1] for one in found], 0)
    unseen = [str(name) for name, n in zip(data["category"].values, seen, strict=True) if not n]
    if unseen and len(rows) != 2:  # of two groups, it is said that these cannot be compared
        notes.append(f"no query sees a token of {', '.join(unseen)}, so that there is no share")
    variables: dict[str, Any] = {
        name: (("group", *axes), np.stack([one[name][1] for one in found])) for name, (axes, _) in found[0].items()
    }
    by_cell, by_category = ("group", "layer", "head", "category"), ("group", "category")
    q = fdr(variables["p"][1])
    special = (variables["above"][1] >= floor) & (q < 0.05)
    variables |= {"q": (by_cell, q), "specialised": (by_cell, special)}
    variables["specialised_heads"] = (by_category, special.sum((1, 2)))
    if len(rows) == 2:
        variables |= _compared(data, rows, notes, seed)
    coords = {"group": list(rows), **{axis: data[axis].values for axis in ("layer", "head", "category")}}
    meta = {"floor": floor, "groups": {name: len(row) for name, row in rows.items()}, "notes": notes}
    dataset = xr.Dataset(variables, coords, {"unit": "share of attention"})
    return Result(dataset, meta, _views(dataset))


def _of_group(data: xr.Dataset, seed: int) -> dict[str, tuple[tuple[str, ...], Any]]:
    """Axes and values of all that is said of one group."""
    share, expected = data["share"].values.astype(float), data["expected"].values.astype(float)[:, :, None]
    here, above, layered = (summarize(x, seed) for x in (share, share - expected, share.mean(2)))
    with np.errstate(invalid="ignore"):
        ratio = here.mean / (here.mean - above.mean)
    cell, line = ("layer", "head", "category"), ("layer", "category")
    return {
        "share": (cell, here.mean),
        "ci_low": (cell, here.ci_low),
        "ci_high": (cell, here.ci_high),
        "ratio": (cell, ratio),
        "above": (cell, above.mean),
        "p": (cell, above.p),
        "layer_share": (line, layered.mean),
        "layer_share_ci_low": (line, layered.ci_low),
        "layer_share_ci_high": (line, layered.ci_high),
        "sink": (("layer", "head"), data["sink"].values.mean(0)),
        "entropy": (("layer", "head"), data["entropy"].values.mean(0)),
        "examples": (("category",), np.isfinite(share).any((1, 2)).sum(0)),
        "matches": (("category",), data["matches"].values.sum(0)),
    }


def _compared(
    data: xr.Dataset, rows: dict[str, npt.NDArray[np.intp]], notes: list[str], seed: int
) -> dict[str, tuple[tuple[str, ...], Any]]:
    """Axes and values of all that is said of the difference of two groups; `notes` gets what cannot be said."""
    one, two = (data["share"].values[row].astype(float) for row in rows.values())
    compared, whole = compare_groups(one, two, seed), largest_p(one, two, seed)
    if not compared.reachable:
        sizes, cells = " and ".join(str(len(row)) for row in rows.values()), compared.p.size
        notes.append(f"groups of {sizes} examples have too few splits for one cell of {cells} to reach q < .05")
        warnings.warn(f"{notes[-1]}; give more examples, or fewer categories", stacklevel=3)
    if lone := [str(name) for name, p in zip(data["category"].values, whole, strict=True) if np.isnan(p)]:
        notes.append(f"no difference in {', '.join(lone)}: fewer than two examples of a group see their tokens")
    found = {
        "difference": compared.difference,
        "difference_ci_low": compared.ci_low,
        "difference_ci_high": compared.ci_high,
        "d": compared.d,
        "d_ci_low": compared.d_ci_low,
        "d_ci_high": compared.d_ci_high,
        "difference_p": compared.p,
        "difference_q": compared.q,
        "significant": compared.q < 0.05,
    }
    cell = ("layer", "head", "category")
    out: dict[str, tuple[tuple[str, ...], Any]] = {name: (cell, value) for name, value in found.items()}
    return out | {"category_p": (("category",), whole), "category_q": (("category",), fdr(whole))}


def _groups(data: xr.Dataset, wanted: tuple[str, str] | None) -> tuple[dict[str, npt.NDArray[np.intp]], list[str]]:
    """Rows of each group, by its label, and what must be said about them."""
    n = data.sizes["example"]
    if "label" not in data:
        if wanted is not None:
            raise ExamplesError(f"there are no groups {wanted}: the examples have no labels; give labels=")
        return {ALL: np.arange(n)}, ["no labels: one group, no differences"]
    labels = [str(label) for label in data["label"].values]
    sizes = {label: labels.count(label) for label in sorted({*labels} - {""})}
    names = list(sizes) if wanted is None else [str(name) for name in wanted]
    if empty := [name for name in names if name not in sizes]:
        have = ", ".join(f"{count} of {label!r}" for label, count in sizes.items())
        raise ExamplesError(f"the group {empty[0]!r} has no example: there are {have}; give examples of each group")
    notes: list[str] = []
    if len(names) == 1:
        notes.append(f"one group, {names[0]!r}: no differences")
    elif len(names) > 2:
        notes.append(f"{len(names)} groups: no differences; name two in groups=")
    if left := n - sum(sizes[name] for name in names):
        notes.append(f"{left} of {n} examples are in none of the groups and were left out")
    if not names:
        raise ExamplesError(f"none of the {n} examples has a label; give labels=, or none at all")
    return {name: np.array([i for i, label in enumerate(labels) if label == name]) for name in names}, notes


def _views(data: xr.Dataset) -> tuple[View, ...]:
    """Shares of each group, their difference, categories beside each other, progression, and specialised heads."""
    seen = data["share"].notnull().any(("layer", "head"))
    groups = [str(name) for name in data["group"].values if seen.sel(group=name).any()]
    categories = [str(name) for name in data["category"].values if seen.sel(category=name).any()]
    unit, of = "share of attention", {name: f", {name}" if len(groups) > 1 else "" for name in groups}
    views = [
        View("heatmap", "share", "head", "layer", by="category", scale="shared", mark="specialised",
             title=f"Attention by category{of[name]}", unit=unit, select={"group": name})
        for name in groups
    ]  # fmt: skip
    if "difference" in data and data["difference"].notnull().any():
        title = f"Difference in attention, {groups[0]} - {groups[1]}"
        views.append(
            View("heatmap", "difference", "head", "layer", by="category", scale="shared", mark="significant",
                 title=title, unit=unit, center=0.0)
        )  # fmt: skip
    for name in groups:
        views.append(
            View("bars", "ratio", "category", title=f"Attention over what is expected{of[name]}",
                 unit="ratio, mean over layers and heads", center=1.0, select={"group": name}, interval=False)
        )  # fmt: skip
    mean = f"{unit}, mean over heads"
    if data.sizes["group"] == 1:
        views.append(View("lines", "layer_share", "layer", by="category", title="Attention by layer", unit=mean))
    else:
        views += [
            View("lines", "layer_share", "layer", by="group", title=f"Attention to {name} by layer", unit=mean,
                 select={"category": name})
            for name in categories
        ]  # fmt: skip
    for name in groups:
        views.append(
            View("bars", "specialised_heads", "category", title=f"Specialised heads by category{of[name]}",
                 unit="heads", select={"group": name})
        )  # fmt: skip
    return tuple(views)
