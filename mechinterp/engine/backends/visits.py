"""What is wanted at each place of one pass, whoever runs it.

A library brings the whole tensor of a site, in our axes, and gets back what is to go on from there.
"""

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from mechinterp.core.interventions import Intervention
from mechinterp.core.tokens import TokenBatch
from mechinterp.core.trace import Read
from mechinterp.errors import HookError, SiteError
from mechinterp.model.backend import Seen
from mechinterp.model.slices import PATTERN_KINDS, select, written
from mechinterp.sites import Site


class Visits:
    """Writes, reads and gradients of one pass, by the place that they are at.

    Args:
        writes: in the order in which they act at one site.
        grads: whole sites.
        lenient: rows that lack a position that is written are left as they are.
    """

    def __init__(
        self,
        batch: TokenBatch,
        writes: Sequence[tuple[Site, Intervention]],
        reads: Sequence[Read],
        grads: Sequence[Site],
        lenient: bool,
    ) -> None:
        self.batch, self.lenient = batch, lenient
        self.writes: dict[Site, list[tuple[int, Site, Intervention]]] = defaultdict(list)
        self.reads: dict[Site, list[Read]] = defaultdict(list)
        self.grads = set(grads)
        for number, (site, write) in enumerate(writes):
            self.writes[site.whole].append((number, site, write))
        for read in reads:
            self.reads[read.site.whole].append(read)
        self.wanted = tuple(reads)
        self.values: dict[Read, Tensor] = {}
        self.captured: dict[Site, tuple[GradientEdge, torch.Size]] = {}
        self.reached: set[tuple[Site, int]] = set()
        self.entering: dict[int, Tensor] = {}
        """The residual stream entering a layer, where its middle is written."""
        self.unseen: dict[int, Tensor] = {}
        """Queries that see no key at all once scores were written, by layer: ``batch head query 1``."""

    def places(self) -> list[Site]:
        """The whole sites that the pass must stop at, in its order."""
        places = {*self.writes, *self.reads, *self.grads}
        for site in self.writes:
            if site.kind == "resid_mid":  # no module makes it: a write is a change of attn_out
                places |= {Site("resid_pre", site.layer), Site("attn_out", site.layer)}
            if site.kind == "scores":  # a query that sees nothing attends to nothing
                places.add(Site("pattern", site.layer))
        return sorted(places, key=lambda site: site.order)

    def at(self, site: Site, value: Tensor) -> Tensor:
        """Everything that is wanted at a whole site; what goes on from there, the same object where it is unchanged."""
        new = value
        layer = site.layer or 0
        if site.kind == "pattern" and layer in self.unseen:
            new = new.masked_fill(self.unseen[layer], 0.0)
        if site.kind != "resid_mid":
            new = self._write(site, new)
        if site.kind == "resid_pre":
            self.entering[layer] = new
        middle = Site("resid_mid", layer)
        if site.kind == "attn_out" and middle in self.writes:
            old = self.entering[layer] + new
            new = new + (self._write(middle, old) - old)
        if site.kind == "scores" and site in self.writes:
            new = new.masked_fill(value.isneginf(), float("-inf"))  # what is masked stays so
            self.unseen[layer] = new.isneginf().all(-1, keepdim=True)
        if site in self.grads:
            new = new if new.requires_grad else new.requires_grad_()
            self.captured[site] = get_gradient_edge(new), new.shape
        if site.kind == "pattern" and (site in self.writes or site in self.grads):
            new = new.masked_fill(self.hidden(new), 0.0)  # nobody attends to the future, or to padding
        for read in self.reads.get(site, ()):
            self.values[read] = self._read(read, new)
        return new

    def _write(self, place: Site, value: Tensor) -> Tensor:
        for number, site, write in self.writes.get(place, ()):
            new = written(value, site, write, self.batch, self.lenient)
            if new is not None:
                self.reached.add((site, number))
                value = new
        return value

    def _read(self, read: Read, value: Tensor) -> Tensor:
        site, pattern = read.site, read.site.kind in PATTERN_KINDS
        if read.reduce is not None:
            if not pattern or site.positions is not None or site.heads is not None:
                raise SiteError(
                    f"{site} is reduced, which only whole scores and patterns can be; choose in the function"
                )
            real = self.batch.mask[:, None, :, None].to(value.device)
            block = value * real if site.kind == "pattern" else value  # padding attends to nothing
            return read.reduce.join([read.reduce.fn(block, slice(0, value.shape[2]), self.batch)])
        where = self.batch.where(site.positions)
        where = None if where is None else where.to(value.device)
        if not pattern:
            return select(value, site, where)
        part = select(value.transpose(1, 2), site, where)
        return part.transpose(1, 2) if part.ndim == 4 else part

    def hidden(self, pattern: Tensor) -> Tensor:
        """Keys that a query cannot see: the future, and padding."""
        queries, keys = pattern.shape[2:]
        future = torch.ones(queries, keys, dtype=torch.bool, device=pattern.device).triu(keys - queries + 1)
        return future | ~self.batch.mask[:, None, None, -keys:].to(pattern.device)

    def seen(self) -> Seen:
        """What the pass gave.

        Raises:
            HookError: a read that did not fire.
        """
        for read in self.wanted:
            if read not in self.values:
                raise HookError(
                    f"the read of {read.site} ({' '.join(read.site.axes)}) did not fire: the library did not run that"
                    " place in this pass; check that nothing replaced it"
                )
        return Seen(self.values, self.captured, frozenset(self.reached))


def masked(scores: Tensor) -> Tensor:
    """Scores with -inf where a library has added the least number of the dtype, which fp16 reaches soon."""
    return scores.masked_fill(scores < torch.finfo(scores.dtype).min / 2, float("-inf"))
