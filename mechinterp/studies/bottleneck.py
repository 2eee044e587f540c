"""A concept bottleneck whose concepts are given as texts: directions fitted on these, and tested on other examples."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import xarray as xr
from torch import Tensor

from mechinterp.analyzers import units
from mechinterp.analyzers.concept_bottleneck import ConceptBottleneck
from mechinterp.core.analyzer import Analyzer, Batch, Context, Needs
from mechinterp.core.analyzer import Model as Declared
from mechinterp.core.examples import Examples
from mechinterp.core.metrics import Metric, logit_diff
from mechinterp.core.result import Part, Result
from mechinterp.engine.runner import Progress, run
from mechinterp.errors import ExamplesError
from mechinterp.model.model import Model
from mechinterp.sites import Position, Site

LEAST = 2
"""Texts of a concept, and texts without it."""


def concept_bottleneck(
    model: Model,
    examples: Any,
    texts: Mapping[str, Sequence[str]],
    *,
    others: Sequence[str] = (),
    site: str | Site,
    positions: Position = "end",
    pool: units.Pool = "mean",
    metric: Metric | None = None,
    seed: int = 0,
    progress: Progress | bool = False,
) -> Result:
    """`ConceptBottleneck` of concepts that are given as texts.

    The direction of a concept is the difference of means: of the activations of its texts, less that of all other
    texts, those of other concepts and those of none.

    Args:
        examples: on which the model decides; none of them may be among the texts.
        texts: concept → its texts, two or more.
        others: texts of no concept; needed where there is one concept only.
        site, positions, pool: of the concepts' texts as of the examples.
        metric: `logit_diff()` by default.
    Raises:
        ExamplesError: a concept of fewer than two texts, or with fewer than two that are not its own; examples that are
            among the texts.
    """
    every = list(dict.fromkeys([*(one for some in texts.values() for one in some), *others]))
    members = torch.tensor([[one in set(some) for one in every] for some in texts.values()])
    for name, row in zip(texts, members, strict=True):
        own, rest = int(row.sum()), int((~row).sum())
        if own < LEAST or rest < LEAST:
            raise ExamplesError(
                f"the concept {name!r} has {own} texts, and {rest} are not its own; give at least {LEAST} of each"
            )
    seen, shown = set(model.tokenize(Examples.of(every)).ids), model.tokenize(examples).ids
    if both := [i for i, ids in enumerate(shown) if ids in seen]:
        raise ExamplesError(
            f"{len(both)} of the {len(shown)} examples are among the texts that concepts are fitted on, the first of"
            f" them example {both[0]}, and concepts are tested on texts that they have not seen; leave them out on one"
            " side"
        )
    asked = _Means(site, units.Units(positions, pool), members)
    found = run(model, Examples.of(every), asked, seed=seed, progress=progress)
    means = found.data["direction"].values
    if flat := [name for name, one in zip(texts, means, strict=True) if not one.any()]:
        raise ExamplesError(f"the texts of {flat[0]!r} have the same activations as the others at {site}; give others")
    concepts: dict[str, Tensor] = {name: torch.tensor(one) for name, one in zip(texts, means, strict=True)}
    bottleneck = ConceptBottleneck(concepts, site, positions, pool, logit_diff() if metric is None else metric)
    result = run(model, examples, bottleneck, seed=seed, progress=progress)
    return result.with_meta(texts={name: len(some) for name, some in texts.items()})


@dataclass(frozen=True, eq=False)
class _Means(Analyzer):
    """Differences of means.

    Attributes:
        members: which texts are of which concept, ``concept text``.
    """

    site: str | Site
    units: units.Units
    members: Tensor

    def needs(self, model: Declared) -> Needs:
        return Needs(self.units.reads(self.site, model.dims.n_layers))

    def observe(self, batch: Batch) -> Part:
        return units.part(self.units, self.units.reads(self.site, batch.model.dims.n_layers), batch)

    def combine(self, parts: Iterator[Part], context: Context) -> Result:
        x = units.features(parts)[0][0].double()
        own = self.members.double()
        direction = own @ x / own.sum(1, keepdim=True) - (1 - own) @ x / (1 - own).sum(1, keepdim=True)
        return Result(xr.Dataset({"direction": (("concept", "dim"), direction.numpy())}))
