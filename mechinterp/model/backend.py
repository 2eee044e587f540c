"""Backend: another library that runs the model in the native engine's place, and what is in force on it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from mechinterp.core.interventions import Intervention
from mechinterp.core.tokens import TokenBatch
from mechinterp.core.trace import Read
from mechinterp.errors import HookError
from mechinterp.sites import Site, resolve

if TYPE_CHECKING:
    from mechinterp.model.model import Model
else:
    Model = Any

Use: TypeAlias = Literal["read", "write", "gradient"]
NATIVE = "native"


@dataclass(frozen=True)
class Seen:
    """What one pass gave.

    Attributes:
        values: what was read.
        captured: where the gradient of each site arrives, and its shape.
        reached: writes that met an example with their position.
    """

    values: Mapping[Read, Tensor]
    captured: Mapping[Site, tuple[GradientEdge, torch.Size]] = field(default_factory=dict)
    reached: frozenset[tuple[Site, int]] = frozenset()


@runtime_checkable
class Backend(Protocol):
    """Who runs the model: one whole pass with these reads, writes and gradients, by the library's own hooks."""

    name: str
    version: str

    def lacks(self, site: Site, use: Use) -> str | None:
        """Why the library cannot do this at a site; None where it can."""
        ...

    def run(
        self,
        batch: TokenBatch,
        writes: Sequence[tuple[Site, Intervention]],
        reads: Sequence[Read],
        grads: Sequence[Site],
        lenient: bool,
    ) -> Seen:
        """One forward pass over the whole model.

        Args:
            writes: in the order in which they act at one site; reads see what was written.
            grads: whole sites, whose places in the graph are kept.
            lenient: rows that lack a position that is written are left as they are.
        Raises:
            HookError: a read that did not fire.
        """
        ...


class Standing:
    """Interventions in force on a backend, from ``with`` to the end of the block; the counterpart of `Attached`.

    Raises:
        SiteError: a site that this model, or its backend, lacks.
        HookError: on leaving the block, a write that was never reached though the model ran.
    """

    def __init__(self, model: Model, writes: Sequence[Intervention]) -> None:
        self.model = model
        self.writes = in_order(writes, model.dims.n_layers)
        for site, _ in self.writes:
            model.check(site, "write")
        self.passes = 0
        self.reached: set[Site] = set()

    def __enter__(self) -> "Standing":
        if self in self.model.standing:
            raise HookError("this intervention is in force already; make another one to nest it")
        self.passes, self.reached = 0, set()
        self.model.standing.append(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.model.standing.remove(self)
        if kind is None and self.passes:
            audit(self.writes, self.reached, self.passes)


def in_order(writes: Sequence[Intervention], n_layers: int) -> list[tuple[Site, Intervention]]:
    """Single sites in the order of the pass, and as given at one site: what is later sees what is earlier."""
    return sorted(((site, w) for w in writes for site in resolve(w.site, n_layers)), key=lambda each: each[0].order)


def audit(writes: Sequence[tuple[Site, Intervention]], reached: set[Site], passes: int) -> None:
    """Raise unless every write was reached at least once."""
    for site, write in writes:
        if site not in reached:
            raise HookError(
                f"{type(write).__name__} at {site} was never reached in {passes} forward passes;"
                " every pass stopped before it or had no such position: read something after it, or drop it"
            )
