"""The slice of a tensor that a site's positions, heads and neurons mean: taken, or put back edited."""

from typing import Any

import torch
from torch import Tensor

from mechinterp.core.interventions import Intervention
from mechinterp.core.tokens import TokenBatch, Where
from mechinterp.errors import HookError
from mechinterp.sites import Site

PATTERN_KINDS = ("scores", "pattern")


def select(value: Tensor, site: Site, where: Where | None) -> Tensor:
    """The slice of ``batch pos [head] width`` that a site's positions, heads and neurons mean.

    Padding among chosen positions is NaN.
    """
    out = value
    if where is not None:
        rows = torch.arange(len(out), device=out.device)
        out = out[rows if where.columns.ndim == 1 else rows[:, None], where.columns]
    if site.heads is not None:
        out = (
            out[:, index(site.heads)] if where is not None and where.columns.ndim == 1 else out[:, :, index(site.heads)]
        )
    if site.neurons is not None:
        out = out[..., index(site.neurons)]
    if where is not None and where.valid is not None:
        valid = where.valid.reshape(*where.valid.shape, *[1] * (out.ndim - where.valid.ndim))
        out = out.masked_fill(~valid, float("nan"))
    return out


def overwrite(value: Tensor, site: Site, where: Where | None, write: Intervention) -> Tensor:
    """A copy of the whole tensor with the site's slice edited.

    Raises:
        HookError: the intervention returned another shape.
    """
    swap = site.kind in PATTERN_KINDS  # batch head query key: positions select queries
    whole = value.transpose(1, 2) if swap else value
    rows: Any = slice(None)
    columns: Any = slice(None)
    if where is not None:
        rows = torch.arange(len(whole), device=whole.device)
        rows, columns = (rows if where.columns.ndim == 1 else rows[:, None]), where.columns
    part = whole[rows, columns]
    some = site.heads if site.neurons is None else site.neurons  # no kind has both
    heads = None if some is None else index(some)
    chosen = (slice(None),) * (1 if where is not None and where.columns.ndim == 1 else 2) + (heads,)
    old = part if heads is None else part[chosen]
    # With both axes left, the slice of a pattern is batch head query key, as it is read.
    turned = swap and old.ndim == 4
    shown = old.transpose(1, 2) if turned else old
    try:
        new = write(shown)
    except RuntimeError as error:
        if not any(said in str(error) for said in ("must match", "cannot be multiplied", "must be equal")):
            raise
        raise HookError(
            f"{type(write).__name__} does not fit {site}, a slice of shape {tuple(shown.shape)}; give it tensors whose"
            f" shapes broadcast to that ({error})"
        ) from error
    returned: Any = new
    if not isinstance(returned, Tensor):
        raise HookError(
            f"{type(write).__name__} at {site} returned {type(returned).__name__}; return a tensor of shape"
            f" {tuple(shown.shape)}"
        )
    if new.shape != shown.shape:
        raise HookError(
            f"{type(write).__name__} at {site} returned shape {tuple(new.shape)} for a slice of shape"
            f" {tuple(shown.shape)}; return the same shape"
        )
    new = (new.transpose(1, 2) if turned else new).to(old.dtype)
    if where is not None and where.valid is not None:
        valid = where.valid.reshape(*where.valid.shape, *[1] * (new.ndim - where.valid.ndim))
        new = torch.where(valid, new, old)
    if heads is not None:
        part = part.clone()
        part[chosen] = new
        new = part
    out = whole.clone()
    if where is not None and where.valid is not None and where.columns.ndim == 2:
        # Invalid slots point at a real column; writing them back could undo a valid write there.
        r, c = rows.expand_as(columns)[where.valid], columns[where.valid]
        out[r, c] = new[where.valid]
    else:
        out[rows, columns] = new
    return out.transpose(1, 2) if swap else out


def written(value: Tensor, site: Site, write: Intervention, batch: TokenBatch, lenient: bool) -> Tensor | None:
    """The whole tensor with one write in force at a site; None where no example of the batch has such a position.

    Args:
        lenient: rows that lack the position are left as they are.
    Raises:
        ExamplesError: a row lacks the position, unless `lenient`.
        HookError: the intervention returned another shape.
    """
    where = batch.where(site.positions, strict=not lenient)
    if where is None and batch.left_padded and site.kind not in PATTERN_KINDS:
        where = real(batch)  # so that a slice starts at the first real token
    if where is not None and where.valid is not None and not bool(where.valid.any()):
        return None
    where = None if where is None else where.to(value.device)
    return overwrite(value, site, where, write.for_batch(batch))


def index(heads: int | tuple[int, ...]) -> Any:
    """Heads as an index: one drops the axis."""
    return heads if isinstance(heads, int) else list(heads)


def real(batch: TokenBatch) -> Where:
    """All real tokens of left-padded rows, from the first on."""
    steps = torch.arange(int(batch.lengths.max()), device=batch.ids.device)
    columns = batch.starts[:, None] + steps - batch.offset
    valid = (steps < batch.lengths[:, None]) & (columns >= 0)
    return Where(columns.clamp(0, batch.ids.shape[1] - 1), valid)
