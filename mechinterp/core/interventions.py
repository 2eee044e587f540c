"""Interventions: what to write at sites. Each is a function of the selected slice, and a value.

The slice has the site's axes with its heads and positions selected as in `sites`: a single one drops
its axis. Several interventions at one site act in the order given; reads see what was written.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from mechinterp.sites import KINDS, Site, Sites

Where: TypeAlias = Site | Sites | str


@dataclass(frozen=True, eq=False)
class Intervention:
    """One edit of the values at a site (or of each of several). Subclasses are final."""

    site: Where

    def __call__(self, value: Tensor) -> Tensor:
        """The new value of the slice; same shape, never changed in place."""
        raise TypeError("Intervention is abstract; use Replace, Add, Scale, Zero, Mean, Noise, Project, Steer or Apply")


@dataclass(frozen=True, eq=False)
class Replace(Intervention):
    """Put `value` there (broadcast to the slice): activation patching when it comes from another run."""

    value: Tensor

    def __call__(self, value: Tensor) -> Tensor:
        return self.value.to(value).expand_as(value)


@dataclass(frozen=True, eq=False)
class Add(Intervention):
    """Add `value` (broadcast to the slice)."""

    value: Tensor

    def __call__(self, value: Tensor) -> Tensor:
        return value + self.value.to(value)


@dataclass(frozen=True, eq=False)
class Scale(Intervention):
    """Multiply by `factor`."""

    factor: float

    def __call__(self, value: Tensor) -> Tensor:
        return value * self.factor


@dataclass(frozen=True, eq=False)
class Zero(Intervention):
    """Zero ablation."""

    def __call__(self, value: Tensor) -> Tensor:
        return torch.zeros_like(value)


@dataclass(frozen=True, eq=False)
class Mean(Intervention):
    """Mean ablation: put the mean of `reference` over everything but the site's own axes there.

    `reference` holds activations of this site over a data set: any axes (examples, positions), then
    the site's own, such as d_model, or head d_head. NaN entries (padding) are left out.
    """

    reference: Tensor

    def __call__(self, value: Tensor) -> Tensor:
        site = Site.parse(self.site) if isinstance(self.site, str) else self.site
        own = 2 if KINDS[site.kind].head_axis and not isinstance(site.heads, int) else 1
        mean = self.reference.reshape(-1, *self.reference.shape[-own:]).nanmean(0)
        return mean.to(value).expand_as(value)


@dataclass(frozen=True, eq=False)
class Noise(Intervention):
    """Add Gaussian noise, the same draw for every example, so that batches do not matter.

    The draw has the shape of one example's slice and depends on `seed` alone.
    """

    std: float
    seed: int = 0

    def __call__(self, value: Tensor) -> Tensor:
        draw = torch.randn(value.shape[1:], generator=torch.Generator().manual_seed(self.seed))
        return value + (self.std * draw).to(value)


@dataclass(frozen=True, eq=False)
class Project(Intervention):
    """Remove the component along `directions` (one vector, or rows spanning a subspace)."""

    directions: Tensor

    def __call__(self, value: Tensor) -> Tensor:
        rows = self.directions.reshape(-1, self.directions.shape[-1]).double()
        basis = torch.linalg.qr(rows.T)[0].to(value)  # orthonormal columns
        return value - (value @ basis) @ basis.T


@dataclass(frozen=True, eq=False)
class Steer(Intervention):
    """Add `strength` times the unit vector along `direction`; strength is in activation units."""

    direction: Tensor
    strength: float

    def __call__(self, value: Tensor) -> Tensor:
        return value + self.strength * (self.direction / self.direction.norm()).to(value)


@dataclass(frozen=True, eq=False)
class Apply(Intervention):
    """Any edit, as a function from the slice to its new value."""

    fn: Callable[[Tensor], Tensor]

    def __call__(self, value: Tensor) -> Tensor:
        return self.fn(value)
