"""The backward verb: gradients of a metric at any sites, one backward per distinct metric."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mechinterp.core.interventions import Intervention
from mechinterp.core.metrics import Metric
from mechinterp.core.tokens import TokenBatch
from mechinterp.core.trace import Read
from mechinterp.engine.forward import FINAL_NORM, Passed, call, fired
from mechinterp.errors import NeedsError
from mechinterp.model.hooks import Attached
from mechinterp.model.model import Model
from mechinterp.model.slices import PATTERN_KINDS, select
from mechinterp.sites import Site


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
    with torch.enable_grad():
        head: Any = model.hf.get_submodule(model.arch.unembed)
        written = bool(head._forward_hooks)  # somebody writes logits: then the model makes them itself
        last = Read(Site("logits") if written else FINAL_NORM)
        stop = last.site
        taken = list(dict.fromkeys([last, *reads]))
        attached = Attached(model.hf, model.arch, model.dims, writes, taken, places, stop=stop)
        with attached:
            call(model, batch)
            fired(taken, attached.values)
            values = {read: attached.values[read].detach() for read in reads}
            final = select(attached.values[last], last.site, batch.where(metric.positions))
        rows = metric.rows(batch)
        chosen = final if rows is None or not written else final[..., rows]
        logits = chosen if written else model.unembed(final, rows)
        against = None if reference is None else reference.logits[metric]
        total = metric.score(logits, batch, rows, against).sum()
        tensors = [attached.captured[place] for place in places]
        grads = torch.autograd.grad(total, tensors, allow_unused=True)
    out: dict[Read, Tensor] = {}
    for site in sites:
        grad = grads[places.index(site.whole)]
        if grad is None and writes:
            grad = torch.zeros_like(attached.captured[site.whole])
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
