"""What happens inside an nnsight trace, in plain functions that can run where this package is not installed.

NDIF gets them as source, with plain data beside them: nothing here may use more than torch, or builtins that its
servers allow (neither exec nor open, and no dataclasses). Annotations travel too, so they are plain as well.
"""

from typing import Any

import torch

_ROTARY, _ATTENTION, _SOFTMAX = "apply_rotary_pos_emb_0", "attention_interface_1", "nn_functional_softmax_0"
"""Operations in the source of transformers' attention and of its eager kernel, as nnsight numbers them."""


def visit(envoy: Any, stops: Any, at: Any) -> None:
    """Wait for each stop in the order of the pass, and put there what `at` gives.

    Args:
        stops: dictionaries: ``how`` and ``kind`` of place, its ``path`` and ``end``, and what its axes need.
        at: from the number of a stop and the value there to a new value; None where it is left as it is.
    """
    for path in {stop["path"] for stop in stops if stop["how"] in ("rotated", "pattern")}:
        envoy.get(path).source  # noqa: B018 -- which nnsight must know before the pass
    z, made_at = None, None  # z of one layer is nothing to the head_out of another
    number = 0
    while number < len(stops):
        stop = stops[number]
        module = envoy.get(stop["path"])
        if stop["how"] == "rotated":  # one operation gives both
            numbers = [number]
            if number + 1 < len(stops) and stops[number + 1]["how"] == "rotated":
                numbers += [number + 1] if stops[number + 1]["path"] == stop["path"] else []
            _rotated(module.source, numbers, stops, at)
            number += len(numbers)
            continue
        if stop["how"] == "pattern":
            _pattern(getattr(getattr(module.source, _ATTENTION).source, _SOFTMAX), number, stop, at)
        elif stop["how"] == "heads":
            _heads(module, number, stop, at, z if made_at == stop["path"] else None)
        else:
            z, made_at = _module(module, number, stop, at), stop["path"]
        number += 1


def _module(module: Any, number: Any, stop: Any, at: Any) -> Any:
    """An input or an output of a module; gives back what goes on where that is z, which head_out is made of."""
    raw = module.input if stop["end"] == "in" else module.output
    old = raw[0] if isinstance(raw, tuple) else raw
    ours = old
    if stop["kind"] == "router":  # with examples and positions apart
        ours = old.view(stop["examples"], -1, old.shape[-1])
    elif stop["heads"] is not None and old.ndim == 3:
        ours = old.unflatten(-1, (stop["heads"], -1))
    new = at(number, ours)
    if new is not None:
        new = new if new.shape == old.shape else new.reshape(old.shape)
        if stop["end"] == "in":
            module.input = new
        elif stop["kind"] == "router":  # which has chosen its experts already: they are chosen again
            module.output = (new, *stop["route"](module._module, new))
        else:
            module.output = (new, *raw[1:]) if isinstance(raw, tuple) else new
    if stop["kind"] != "z":
        return None
    return old if new is None else new


def _heads(module: Any, number: Any, stop: Any, at: Any, z: Any) -> None:
    """head_out is z through its slice of W_O; a write there is a change of the sum."""
    entering = module.input if z is None else z
    total = module.output
    weight = stop["weight"]
    if weight is None:
        weight = module._module.weight.T.unflatten(0, (stop["heads"], -1))
    old = torch.einsum("bphe,hed->bphd", entering.unflatten(-1, (stop["heads"], -1)), weight)
    new = at(number, old)
    if new is not None:
        module.output = total + (new - old).sum(2)


def _rotated(source: Any, numbers: Any, stops: Any, at: Any) -> None:
    operation = getattr(source, _ROTARY)
    both = list(operation.output)
    changed = False
    for number in numbers:
        which = 0 if stops[number]["kind"] == "q_rot" else 1
        new = at(number, both[which].transpose(1, 2))
        if new is not None:
            both[which], changed = new.transpose(1, 2), True
    if changed:
        operation.output = tuple(both)


def _pattern(softmax: Any, number: Any, stop: Any, at: Any) -> None:
    """Scores are what goes into the softmax, -inf where a key is hidden; the pattern comes out."""
    if stop["kind"] == "pattern":
        raw = softmax.output  # in float32, and rounded to the values' dtype before it goes on
        new = at(number, raw.to(stop["dtype"]))
        if new is not None:
            softmax.output = new.to(raw.dtype)
        return
    raw = softmax.input
    new = at(number, raw.masked_fill(raw < torch.finfo(raw.dtype).min / 2, float("-inf")))
    if new is not None:
        softmax.input = new.masked_fill(new.isneginf(), torch.finfo(new.dtype).min)


# What follows is done on NDIF's servers alone; here, `Visits` and `slices` do it.


def carried(envoy: Any, stops: Any, jobs: Any, hidden: Any) -> Any:
    """What `Visits.at` does at every stop, from a plain list of it; what was read, by number.

    Args:
        jobs: for each stop its ``edits`` (where, how, with what), those of the ``middle`` after attn_out, and
            its ``reads`` (number, where).
        hidden: keys that a query cannot see, ``example 1 query key``.
    """
    held: Any = {}
    entering: Any = {}
    unseen: Any = {}

    def edited(value: Any, edits: Any) -> Any:
        for where, how, what in edits:
            value = _put_back(value, where, _edit(part_of(value, where), how, what))
        return value

    def at(number: Any, value: Any) -> Any:
        job, kind, layer = jobs[number], stops[number]["kind"], stops[number]["layer"]
        new = value
        if kind == "pattern" and layer in unseen:
            new = new.masked_fill(unseen[layer], 0.0)
        new = edited(new, job["edits"])
        if kind == "resid_pre":
            entering[layer] = new
        if job["middle"]:
            old = entering[layer] + new
            new = new + (edited(old, job["middle"]) - old)
        if kind == "scores" and job["edits"]:
            new = new.masked_fill(value.isneginf(), float("-inf"))
            unseen[layer] = new.isneginf().all(-1, keepdim=True)
        if kind == "pattern" and job["edits"]:
            new = new.masked_fill(hidden.to(new.device), 0.0)
        for number_of_read, where in job["reads"]:
            held[number_of_read] = _blanked(part_of(new, where), where).detach()
        return None if new is value else new

    visit(envoy, stops, at)
    return held


def part_of(value: Any, where: Any) -> Any:
    """The slice of a whole site, as `slices.select` takes it."""
    swap, columns, _, inner = where
    part = value.transpose(1, 2) if swap else value
    if columns is not None:
        rows = torch.arange(len(part), device=part.device)
        part = part[rows if columns.ndim == 1 else rows[:, None], columns.to(part.device)]
    if inner is not None:
        part = part[:, inner] if columns is not None and columns.ndim == 1 else part[:, :, inner]
    return part.transpose(1, 2) if swap and part.ndim == 4 else part


def _blanked(part: Any, where: Any) -> Any:
    """A slice with NaN where a row has no such position."""
    swap, _, valid, _ = where
    if valid is None:
        return part
    turned = part.transpose(1, 2) if swap and part.ndim == 4 else part
    valid = valid.to(part.device).reshape(*valid.shape, *[1] * (turned.ndim - valid.ndim))
    turned = turned.masked_fill(~valid, float("nan"))
    return turned.transpose(1, 2) if swap and part.ndim == 4 else turned


def _put_back(value: Any, where: Any, new: Any) -> Any:
    """A copy of a whole site with the slice edited, as `slices.overwrite` makes it."""
    swap, columns, valid, inner = where
    new = new.transpose(1, 2) if swap and new.ndim == 4 else new
    out = (value.transpose(1, 2) if swap else value).clone()
    if columns is None:
        out[:, :, slice(None) if inner is None else inner] = new.to(out.dtype)
        return out.transpose(1, 2) if swap else out
    columns = columns.to(out.device)
    rows = torch.arange(len(out), device=out.device)
    rows = rows if columns.ndim == 1 else rows[:, None].expand_as(columns)
    part = out[rows, columns]
    if inner is None:
        part = new.to(out.dtype)
    elif columns.ndim == 1:
        part[:, inner] = new.to(out.dtype)
    else:
        part[:, :, inner] = new.to(out.dtype)
    if valid is None:
        out[rows, columns] = part
    else:
        valid = valid.to(out.device)
        out[rows[valid], columns[valid]] = part[valid]
    return out.transpose(1, 2) if swap else out


def _edit(old: Any, how: Any, what: Any) -> Any:
    if how == "put":
        return what.to(old)
    if how == "add":
        return old + what.to(old)
    if how == "scale":
        return old * what
    if how == "hide":
        return old.masked_fill(what.to(old.device), float("-inf"))
    if how == "project":
        flat, basis = old if old.shape[-1] == len(what) else old.flatten(-2), what.to(old)
        return (flat - (flat @ basis) @ basis.T).reshape(old.shape)
    new = what(old)
    if new.shape != old.shape:
        raise ValueError(f"Apply gave shape {tuple(new.shape)} for a slice of shape {tuple(old.shape)}")
    return new
