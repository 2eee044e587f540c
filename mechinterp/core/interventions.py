"""Interventions: what to write at sites. Each is a function of the selected slice, and a value.

The slice has the site's axes with its heads and positions selected as in `sites`: a single one drops
its axis. Several interventions at one site act in the order given; reads see what was written.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mechinterp.core.tokens import TokenBatch
from mechinterp.errors import HookError
from mechinterp.sites import Position, Site, Sites, resolve

Where: TypeAlias = Site | Sites | str


@dataclass(frozen=True, eq=False)
class Intervention:
    """One edit of the values at a site (or of each of several). Subclasses are final."""

    site: Where

    def __call__(self, value: Tensor) -> Tensor:
        """The new value of the slice; same shape, never changed in place."""
        raise TypeError("Intervention is abstract; use Replace, Add, Scale, Zero, Mean, Noise, Project, Steer or Apply")

    def for_batch(self, batch: TokenBatch) -> "Intervention":
        """The same, knowing which examples it meets and where their positions are."""
        return self


@dataclass(frozen=True, eq=False)
class Replace(Intervention):
    """Put `value` there (broadcast to the slice): activation patching when it comes from another run.

    With an axis of examples in front (as many axes as the slice), its rows follow the examples' order,
    or are those of the examples `of`: what `observe` saw of one batch can be put back into just these.
    Such a value may be wider than a slice of all positions, whose batch is cut to its longest example.
    """

    value: Any
    """A tensor, or a number."""
    rows: tuple[int, ...] = ()
    """Filled in for each batch."""
    of: tuple[int, ...] = ()
    """Numbers of the examples that the value has a row for (`TokenBatch.rows`); none, when it has one for each."""

    def __post_init__(self) -> None:
        _as_tensor(self, "value")
        if self.of and self.value.shape[:1] != (len(self.of),):
            raise HookError(
                f"a value of shape {tuple(self.value.shape)} has no axis of the {len(self.of)} examples that it is of;"
                " give one row for each of them"
            )

    def __call__(self, value: Tensor) -> Tensor:
        new = _of_rows(self.value, self.rows, value)
        if self.of and new.ndim == value.ndim == _axes(self.site):  # past the width is padding of all these examples
            new = new[:, : value.shape[1]]
        return new.to(value).expand_as(value)

    def for_batch(self, batch: TokenBatch) -> "Replace":
        if not self.of:
            return replace(self, rows=batch.rows)
        if gone := set(batch.rows) - set(self.of):
            raise HookError(
                f"a value of the examples {self.of} has no row for example {min(gone)}; write it in their batch alone"
            )
        return replace(self, rows=tuple(self.of.index(row) for row in batch.rows))


@dataclass(frozen=True, eq=False)
class Add(Intervention):
    """Add `value` (broadcast to the slice); with an axis of examples as in `Replace`."""

    value: Any
    """A tensor, or a number."""
    rows: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _as_tensor(self, "value")

    def __call__(self, value: Tensor) -> Tensor:
        return value + _of_rows(self.value, self.rows, value).to(value)

    def for_batch(self, batch: TokenBatch) -> "Add":
        return replace(self, rows=batch.rows)


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

    def __post_init__(self) -> None:
        _as_tensor(self, "reference")

    def __call__(self, value: Tensor) -> Tensor:
        site = resolve(self.site, 1)[0]
        if site.kind in ("scores", "pattern"):
            own = value.ndim - 1
        else:
            own = 2 if site.spec.head_axis and not isinstance(site.heads, int) else 1
            own -= isinstance(site.neurons, int)
        mean = self.reference.reshape(-1, *self.reference.shape[self.reference.ndim - own :]).nanmean(0)
        return mean.to(value).expand_as(value)


@dataclass(frozen=True, eq=False)
class Noise(Intervention):
    """Add Gaussian noise, the same draw for every example, so that batches do not matter.

    The draw has the shape of one example's slice and depends on `seed` alone.
    """

    std: float
    seed: int = 0

    def __call__(self, value: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        lone = isinstance(resolve(self.site, 1)[0].neurons, int)
        if value.ndim == (1 if lone else 2):
            draw = torch.randn(value.shape[1:], generator=generator)
        else:  # position by position, so that a longer batch begins with the same draw
            draw = torch.stack([torch.randn(value.shape[2:], generator=generator) for _ in range(value.shape[1])])
        return value + (self.std * draw).to(value)


@dataclass(frozen=True, eq=False)
class Project(Intervention):
    """Remove the component along `directions` (one vector, or rows spanning a subspace).

    At a site with heads they are of each head, ``d_head``, or of all heads laid side by side.
    """

    directions: Tensor

    def __call__(self, value: Tensor) -> Tensor:
        rows = self.directions.reshape(-1, self.directions.shape[-1]).double()
        basis = torch.linalg.qr(rows.T)[0].to(value)  # orthonormal columns
        flat = value.flatten(-2) if _side_by_side(self.directions, value) else value
        return (flat - (flat @ basis) @ basis.T).reshape(value.shape)


@dataclass(frozen=True, eq=False)
class Steer(Intervention):
    """Add `strength` times the unit vector along `direction`; strength is in activation units.

    At a site with heads it is of each head, ``d_head``, or of all heads laid side by side.
    """

    direction: Tensor
    strength: float

    def __post_init__(self) -> None:
        _as_tensor(self, "direction")
        if not 0 < float(self.direction.norm()) < float("inf"):
            raise HookError(
                f"the direction of Steer at {self.site} has norm {float(self.direction.norm()):g}; give another"
            )

    def __call__(self, value: Tensor) -> Tensor:
        unit = self.direction / self.direction.norm()
        if _side_by_side(unit, value):
            unit = unit.reshape(value.shape[-2:])
        return value + self.strength * unit.to(value)


@dataclass(frozen=True, eq=False)
class Knockout(Intervention):
    """Attention knockout (Geva et al. 2023): at `scores`, the site's queries no longer see `keys`.

    The rest of a query's attention is renormalised; a query that sees nothing at all attends to nothing.
    """

    keys: Position | tuple[Position, ...]
    """Positions, or names that the examples give to a token or a span."""
    columns: Tensor | None = None
    """Of the keys, ``example chosen``; filled in for each batch, -1 where there is none."""

    def __post_init__(self) -> None:
        if any(site.kind != "scores" for site in resolve(self.site, 1)):
            raise HookError(f"Knockout cuts attention, so its site must be scores. Got {self.site}")
        if self.keys in (None, "all"):
            raise HookError(f"Knockout must name the keys that it hides, such as 'S2' or (0, 1). Got {self.keys!r}")

    def __call__(self, value: Tensor) -> Tensor:
        if self.columns is None:
            raise HookError("Knockout must know the batch whose keys it hides; use it in a run, trace or sweep")
        keys = torch.arange(value.shape[-1], device=value.device)
        hidden = (self.columns[:, :, None] == keys).any(1)
        return value.masked_fill(hidden.view(len(value), *[1] * (value.ndim - 2), -1), float("-inf"))

    def for_batch(self, batch: TokenBatch) -> "Knockout":
        where = batch.where(self.keys, strict=False)
        assert where is not None
        columns = where.columns + batch.offset  # keys before them may lie in a cache
        if where.valid is not None:
            columns = columns.masked_fill(~where.valid, -1)
        return replace(self, columns=columns.reshape(len(batch), -1))


@dataclass(frozen=True, eq=False)
class Apply(Intervention):
    """Any edit, as a function from the slice to its new value."""

    fn: Callable[[Tensor], Tensor]

    def __call__(self, value: Tensor) -> Any:
        return self.fn(value)


def _as_tensor(intervention: Intervention, name: str) -> None:
    """A field as a tensor; numbers become one.

    Raises:
        HookError: it is something else.
    """
    value = getattr(intervention, name)
    if isinstance(value, Real):
        value = torch.tensor(float(value))
    if not isinstance(value, Tensor):
        raise HookError(
            f"The {name} of {type(intervention).__name__} must be a tensor, such as trace[site]."
            f" Got {type(value).__name__}"
        )
    object.__setattr__(intervention, name, value)


def _side_by_side(direction: Tensor, value: Tensor) -> bool:
    """Whether a direction is of all heads of a value, ``... head d_head``."""
    return value.ndim > 2 and value.shape[-1] != direction.shape[-1] == value.shape[-2] * value.shape[-1]


def _axes(where: Where) -> int:
    """Axes of a site's slice when it has one of positions; 0 for scores and pattern, whose axes differ."""
    site = resolve(where, 1)[0]
    if site.axes[1] != "pos":
        return 0
    return len(site.axes) - isinstance(site.heads, int) - isinstance(site.neurons, int)


def _of_rows(value: Any, rows: tuple[int, ...], part: Tensor) -> Tensor:
    """The rows of a value that has one for every example; any other value as it is."""
    if not rows or value.ndim != part.ndim or value.shape[0] == 1:
        return value
    if max(rows) >= len(value):
        raise HookError(f"a value of shape {tuple(value.shape)} has no row for example {max(rows)}; give one for each")
    return value[list(rows)]
