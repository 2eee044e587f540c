"""The backward verb: gradients of a metric at any sites, one backward per distinct metric and run."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mechinterp.core.analyzer import Grad, Path
from mechinterp.core.interventions import Apply, Intervention
from mechinterp.core.metrics import Metric
from mechinterp.core.tokens import TokenBatch
from mechinterp.core.trace import Read, Run, Trace
from mechinterp.engine.forward import FINAL_NORM, Passed, out_of_memory, passing
from mechinterp.errors import NeedsError
from mechinterp.model.model import Model
from mechinterp.model.slices import PATTERN_KINDS, real, select
from mechinterp.sites import Site, resolve

TOGETHER = 1 << 11
"""Tokens of several points of a path that are differentiated at once: more are no faster, and take more memory."""
KEPT = 1 << 26
"""Bytes of gradients that one analyzer alone wants, and that are kept while it looks at others."""
Made = tuple[Mapping[Read, Tensor], Mapping[Read, Tensor]]
"""Gradients, and values of the same pass."""


def backward(
    model: Model,
    batch: TokenBatch,
    sites: Sequence[Site],
    metric: Metric,
    reference: Passed | None = None,
    *,
    reads: Sequence[Read] = (),
    writes: Sequence[Intervention] = (),
) -> tuple[Mapping[Read, Tensor], Mapping[Read, Tensor]]:
    """Gradient of the metric, summed over examples, at each site, with the site's own shape; and what is read.

    Examples do not touch each other, so row i is the gradient of example i's own metric.

    Args:
        reads: values of the same pass that are wanted too.
        writes: in force in the pass. What one cuts off from the metric has a gradient of zero.
    Raises:
        NeedsError: the metric does not depend on a site, and nothing is written.
    """
    places = list(dict.fromkeys(site.whole for site in sites))
    if metric.site and (late := [site for site in sites if site.order > metric.site.order]):
        raise NeedsError(
            f"the metric {metric} is of {metric.site}, which {late[0]} comes after; ask for an earlier site"
        )
    with torch.enable_grad():
        head: Any = model.hf.get_submodule(model.arch.unembed)
        # Somebody writes logits, or another library runs the model: then it makes them itself.
        written = bool(head._forward_hooks) or model.backend is not None
        sooner = not written and _nothing_late(model, metric, [*sites, *(r.site for r in reads)], writes)
        end = Site("logits") if written else _before_last_mlp(model) if sooner else FINAL_NORM
        last = Read(metric.site.whole if metric.site else end)
        stop = last.site
        taken = list(dict.fromkeys([last, *reads]))
        seen = passing(model, batch, taken, writes, places, stop)
        values = {read: seen.values[read].detach() for read in reads}
        final = select(seen.values[last], last.site, batch.where(metric.positions))
        final = _after_last_mlp(model, final) if sooner else final
        rows = metric.rows(batch)
        chosen = final if rows is None or not written else final[..., rows]
        logits = chosen if written or metric.site else model.unembed(final, rows)
        against = None if reference is None else reference.logits[metric]
        total = metric.score(logits, batch, rows, against).sum()
        edges = [seen.captured[place][0] for place in places]
        grads = torch.autograd.grad(total, edges, allow_unused=True)
    out: dict[Read, Tensor] = {}
    for site in sites:
        grad = grads[places.index(site.whole)]
        if grad is None and writes:
            grad = final.new_zeros(seen.captured[site.whole][1])
        if grad is None:
            raise NeedsError(f"the metric {metric} does not depend on {site}; ask for the gradient at an earlier site")
        heads = model.dims.heads(site.kind)
        if site.kind in PATTERN_KINDS:  # select() takes batch pos [head] width
            grad = grad.transpose(1, 2)
        elif site.kind == "router":
            grad = grad.view(len(batch), -1, grad.shape[-1])
        elif heads is not None and grad.ndim == 3:
            grad = grad.unflatten(-1, (heads, -1))
        part = select(grad, site, batch.where(site.positions))
        out[Read(site)] = part.transpose(1, 2) if site.kind in PATTERN_KINDS and part.ndim == 4 else part
    return out, values


def _last_layer(model: Model) -> str:
    return model.arch.layer(model.dims.n_layers - 1)


def _before_last_mlp(model: Model) -> Site:
    return Site("resid_mid", model.dims.n_layers - 1)


def _nothing_late(model: Model, metric: Metric, sites: Iterable[Site], writes: Iterable[Intervention]) -> bool:
    """Whether nobody looks after the last attention, so that the metric's positions alone need go on from there."""
    before, arch = _before_last_mlp(model), model.arch
    written = (site for write in writes for site in resolve(write.site, model.dims.n_layers))
    if metric.site or metric.positions is None or any(site.order >= before.order for site in (*sites, *written)):
        return False
    tops = [model.hf.get_submodule(name) for name in (_last_layer(model), f"{arch.base}.{arch.norm}")]
    return not any(module._forward_hooks or module._forward_pre_hooks for top in tops for module in top.modules())


def _after_last_mlp(model: Model, mid: Tensor) -> Tensor:
    """The final norm's output of what the last layer's attention has left."""
    arch = model.arch
    layer: Any = model.hf.get_submodule(_last_layer(model))
    norm: Any = model.hf.get_submodule(f"{arch.base}.{arch.norm}")
    flat = mid.reshape(1, -1, mid.shape[-1])
    return norm(flat + layer.mlp(layer.post_attention_layernorm(flat))).view(mid.shape)


def along(
    model: Model,
    batch: TokenBatch,
    sites: Sequence[Site],
    metric: Metric,
    path: Path,
    reference: Passed | None = None,
    *,
    writes: Sequence[Intervention] = (),
    tick: Callable[[], None] = lambda: None,
) -> Mapping[Read, Tensor]:
    """The weighted sum of gradients at the points of a path; many points of many examples in one pass.

    Half as many at once, and half again, when memory runs out.
    """
    total: dict[Read, Tensor] = {}
    baseline = model.baseline(path.baseline)
    every = [(point, example) for example in range(len(batch)) for point in range(len(path.shares))]
    size = _points_at_once(batch.ids.shape[1])
    while every:
        points, examples = zip(*every[:size], strict=True)
        some = batch.take(examples)
        shares, weights = (
            torch.tensor([of[point] for point in points], device=model.device) for of in (path.shares, path.weights)
        )
        here = Apply(Site("embed", positions=path.positions), partial(_between, baseline, shares))
        against = None
        if reference is not None:
            against = Passed({}, {metric: reference.logits[metric][list(examples)]}, reference.rows)
        try:
            grads, _ = backward(model, some, sites, metric, against, writes=[here, *writes])
        except (RuntimeError, MemoryError) as error:
            if len(points) == 1 or not out_of_memory(error):
                raise
            size = len(points) // 2
            continue
        del every[:size]
        tick()
        where = torch.tensor(examples, device=model.device)
        for read, grad in grads.items():
            weighed = grad * weights.to(grad.device).view(-1, *[1] * (grad.ndim - 1))  # in fp32 at least
            if read not in total:
                total[read] = weighed.new_zeros(len(batch), *_wide(read.site, batch, grad))
            into = total[read]
            into[tuple(slice(0, n) for n in (len(into), *weighed.shape[1:]))].index_add_(
                0, where.to(grad.device), weighed
            )
    return total


def passes_along(path: Path, examples: int, width: int) -> int:
    """How many passes `along` makes of a batch."""
    return -(-len(path.shares) * examples // _points_at_once(width))


def _points_at_once(width: int) -> int:
    return max(1, TOGETHER // width)


def _wide(site: Site, batch: TokenBatch, grad: Tensor) -> tuple[int, ...]:
    """The shape of a site's slice in the whole batch: some of its examples may be narrower."""
    where = batch.where(site.positions, strict=False)
    width = batch.ids.shape[1] if where is None else where.columns.shape[-1]
    if where is not None and where.columns.ndim == 1:
        return tuple(grad.shape[1:])
    if site.kind in PATTERN_KINDS:
        queries = grad.ndim - 2
        return (*grad.shape[1:queries], width, batch.ids.shape[1])
    return (width, *grad.shape[2:])


def _between(baseline: Tensor, shares: Tensor, value: Tensor) -> Tensor:
    shares = shares.view(-1, *[1] * (value.ndim - 1)).to(value.device)
    return (baseline.to(value.device) + shares * (value - baseline.to(value.device))).to(value.dtype)


class Differentiated:
    """The runs of one batch whose gradients are wanted, each made when somebody first looks.

    A run that several analyzers share is kept for all of them; the oldest of the others are let go where all
    together take more than `KEPT` bytes, so that a hundred gradients along a path take the memory of a few.

    Args:
        wanted: every run: at which sites, and what is read of it.
        users: for every run, how many analyzers want it.
        passed: the unedited runs, by name.
        tick: told of every pass.
    """

    def __init__(
        self,
        model: Model,
        batch: TokenBatch,
        wanted: Mapping[Grad, tuple[Sequence[Site], Sequence[Read]]],
        users: Mapping[Grad, int],
        passed: Mapping[str, Passed],
        tick: Callable[[], None],
    ) -> None:
        self.model, self.batch, self.wanted, self.users = model, batch, wanted, users
        self.passed, self.tick = passed, tick
        self._kept: dict[Grad, Made] = {}
        self._versions: dict[Grad, list[tuple[str, Tensor, int]]] = {}

    def get(self, run: Grad) -> Made:
        """Gradients and values of one run.

        Raises:
            NeedsError: the metric does not depend on a site, or what was given before was changed in place.
        """
        if run not in self._kept:
            if name := self.changed():
                raise NeedsError(f"{name} was changed in place, which others read; clone it first")
            self._let_go()
            at, beside = self.wanted[run]
            clean = self.passed.get("clean") if run.metric.compares else None
            writes = [*self._mix(run), *run.given]
            own = self.batch.run(run.of)
            if run.along is None:
                made = backward(self.model, own, at, run.metric, clean, reads=beside, writes=writes)
            else:
                made = along(self.model, own, at, run.metric, run.along, clean, writes=writes, tick=self.tick), {}
            self._kept[run] = made
            self._versions[run] = [(str(r.site), t, t._version) for some in made for r, t in some.items()]
            if run.along is None:
                self.tick()
        return self._kept[run]

    def _let_go(self) -> None:
        def size(run: Grad) -> int:
            return sum(tensor.nbytes for _, tensor, _ in self._versions[run])

        total = sum(map(size, self._kept))
        for run in [run for run in self._kept if self.users[run] == 1]:
            if total > KEPT:
                total -= size(run)
                del self._kept[run], self._versions[run]

    def changed(self) -> str | None:
        """What of all that was given so far was changed in place."""
        given = (each for some in self._versions.values() for each in some)
        return next((f"what a gradient gave at {name}" for name, tensor, v in given if tensor._version != v), None)

    def _mix(self, run: Grad) -> list[Intervention]:
        """What puts a run between the two of a pair."""
        other: Run = "corrupted" if run.of == "clean" else "clean"
        out: list[Intervention] = []
        for where, share in run.between:
            for site in (each.whole for each in resolve(where, self.model.dims.n_layers)):
                own, others = (self.passed[name].values[Read(site, name)] for name in (run.of, other))
                between = torch.lerp(others, own, share)
                if self.batch.left_padded:  # a write of all positions starts at the first real token
                    between = select(between, site, real(self.batch))
                out.append(Apply(site, partial(_put, between)))
        return out


def _put(new: Tensor, old: Tensor) -> Tensor:
    return new


class Gradients(Mapping[str, Trace]):
    """`Batch.grads`, or `Batch.values`, of one analyzer: each is made when it is looked at."""

    def __init__(self, runs: Differentiated, wanted: Mapping[str, Grad], owner: str, values: bool) -> None:
        self._runs, self._wanted, self._owner, self._values = runs, wanted, owner, values

    def __getitem__(self, name: str) -> Trace:
        one = self._wanted[name]
        layers, batch = self._runs.model.dims.n_layers, self._runs.batch.run(one.of)
        grads, values = self._runs.get(one.run(layers))
        if self._values:
            reads = [Read(site, one.of) for site in resolve(one.reads, layers)]
            return Trace({read: values[read] for read in reads}, batch, f"{self._owner}, values of {name}")
        at = [Read(site) for site in resolve(one.sites, layers)]
        return Trace({read: grads[read] for read in at}, batch, f"{self._owner}, gradients {name}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._wanted)

    def __len__(self) -> int:
        return len(self._wanted)
