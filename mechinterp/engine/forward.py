"""The forward verb: one pass that gives all reads, stops after the last, and makes logits only where needed."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mechinterp.core.analyzer import Wanted, as_reads
from mechinterp.core.interventions import Apply, Intervention
from mechinterp.core.metrics import Metric, Rows
from mechinterp.core.tokens import TokenBatch
from mechinterp.core.trace import Read, Run, Trace
from mechinterp.errors import ExamplesError, HookError, ModelError, SiteError
from mechinterp.model.attention import Pass
from mechinterp.model.backend import Seen, audit, in_order
from mechinterp.model.hooks import Attached, Stop, check_grad
from mechinterp.model.model import Model, as_examples
from mechinterp.model.slices import PATTERN_KINDS, select
from mechinterp.sites import Site, resolve

FINAL_NORM = Site("final_norm")


@dataclass(frozen=True)
class Passed:
    """What one forward pass gave."""

    values: Mapping[Read, Tensor]
    logits: Mapping[Metric, Tensor]
    """For every metric, logits at its positions and rows, or the values at its site."""
    rows: Mapping[Metric, Rows]


@torch.no_grad()
def forward(
    model: Model,
    batch: TokenBatch,
    reads: Sequence[Read] = (),
    metrics: Sequence[Metric] = (),
    writes: Sequence[Intervention] = (),
    lenient: bool = False,
) -> Passed:
    """Run `batch.ids` once.

    Args:
        lenient: rows that lack a position that is written are left as they are (a sweep marks them).

    Raises:
        SiteError: a site that the model lacks.
        HookError: a read that did not fire or a write that was not reached.
    """
    if not reads and not metrics:
        return Passed({}, {}, {})
    scored = {metric: Read(metric.site.at(metric.positions)) for metric in metrics if metric.site is not None}
    inside = [r for r in reads if r.site.kind != "logits"]
    outside = [r for r in reads if r.site.kind == "logits"]
    # Somebody may be writing logits: then, and for all positions, the model makes them itself.
    head: Any = model.hf.get_submodule(model.arch.unembed)
    written = any(site.kind == "logits" for w in writes for site in resolve(w.site, model.dims.n_layers))
    everywhere = any(r.site.positions is None for r in outside)
    ending = bool(outside) or len(scored) < len(metrics)
    forced = ending and (bool(head._forward_hooks) or written or model.backend is not None)
    whole = forced or everywhere
    writes = [*blanking(model, batch), *writes]
    needed = [*inside, *scored.values(), *([Read(FINAL_NORM)] if ending and not forced else [])]
    stop = max((r.site for r in needed), key=lambda s: s.order, default=None)
    full = Read(Site("logits"))
    made = {metric: Read(full.site.at(metric.positions)) for metric in metrics if metric not in scored}
    taken = list(dict.fromkeys(needed + ([*outside, *made.values()] if forced else [full] if whole else [])))
    values = passing(model, batch, taken, writes, stop=full.site if whole else stop, lenient=lenient).values
    result = {read: values[read] for read in inside}
    for read in outside:
        if forced or read.site.positions is None:
            result[read] = values[read if forced else full]
        else:
            at = select(values[Read(FINAL_NORM)], read.site, batch.where(read.site.positions))
            result[read] = model.unembed(at)
    logits: dict[Metric, Tensor] = {}
    chosen: dict[Metric, Rows] = {}
    for metric in metrics:
        rows = metric.rows(batch)
        chosen[metric] = rows
        if metric in scored:
            logits[metric] = values[scored[metric]]
        elif forced:  # otherwise a product of its own, so that nobody else's reads move it
            logits[metric] = values[made[metric]] if rows is None else values[made[metric]][..., rows]
        else:
            at = select(values[Read(FINAL_NORM)], FINAL_NORM, batch.where(metric.positions))
            logits[metric] = model.unembed(at, rows)
    return Passed(result, logits, chosen)


def score(metric: Metric, batch: TokenBatch, passed: Passed, reference: Passed | None = None) -> Tensor:
    """The metric of a pass, one number an example."""
    against = reference.logits[metric] if metric.compares and reference is not None else None
    values = metric.score(passed.logits[metric], batch, passed.rows[metric], against)
    if values.shape != (len(batch),):
        raise ExamplesError(
            f"the metric {metric} gave shape {tuple(values.shape)} for {len(batch)} examples; return one number each"
        )
    return values if values.is_floating_point() else values.float()


def trace(model: Model, text: Any, reads: Wanted, interventions: Sequence[Intervention] = ()) -> Trace:
    """`Model.trace`."""
    tokens = model.tokenize(as_examples(text))
    batch = tokens.batch(range(len(tokens)), model.device)
    wanted = as_reads(reads, model.dims.n_layers)
    if not wanted:
        raise SiteError("nothing to read; name at least one site, such as sites.resid_post(0)")
    values: dict[Read, Tensor] = {}
    runs: tuple[Run, ...] = ("clean", "corrupted")
    for run in runs:
        if some := [r for r in wanted if r.of == run]:
            values |= forward(model, batch.run(run), some, writes=interventions).values
    return Trace({r: values[r] for r in wanted}, batch, model=model)


@dataclass(frozen=True)
class Generation:
    """What `Model.generate` made.

    Attributes:
        text: the new text alone (None without a tokenizer).
        prompt: token ids that were given.
        tokens: new token ids.
        trace: what was read, joined over steps along positions; the last new token was never fed
            back, so there is one position less than tokens in all. Keys of patterns are padded with 0.
    """

    text: str | None
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    trace: Trace

    def __str__(self) -> str:
        return self.text if self.text is not None else str(list(self.tokens))


@torch.no_grad()
def generate(
    model: Model,
    text: Any,
    max_new_tokens: int,
    reads: Wanted,
    interventions: Sequence[Intervention],
    options: Mapping[str, Any],
) -> Generation:
    """`Model.generate`."""
    tokens = model.tokenize(as_examples(text))
    if model.backend is not None:
        raise ModelError(
            f"generating goes token by token with a cache, which the backend {model.backend.name!r} is not asked for;"
            " use model.with_backend('native').generate(...)"
        )
    if len(tokens) != 1:
        raise ExamplesError(f"generate takes one prompt. Got {len(tokens)}; call it for each")
    batch = tokens.batch([0], model.device)
    wanted = as_reads(reads, model.dims.n_layers)
    if odd := next((r for r in wanted if r.site.positions not in (None, "end")), None):
        raise SiteError(f"{odd.site} cannot be read at every step; read all positions, or 'end' for the newest token")
    several = options.get("num_beams", 1) > 1 or options.get("num_return_sequences", 1) > 1
    if wanted and (several or options.get("use_cache") is False):
        raise ExamplesError(
            "reads while generating follow one sequence with its cache; leave beams and use_cache alone"
        )
    if max_new_tokens < 1 or batch.ids.shape[1] + max_new_tokens > model.dims.context:
        raise ExamplesError(
            f"max_new_tokens={max_new_tokens} after {batch.ids.shape[1]} tokens does not fit; give from 1 to"
            f" {model.dims.context - batch.ids.shape[1]}, which fills the context of {model.dims.context}"
        )
    if model.dims.n_labels is not None:
        raise ExamplesError(f"{model.name} is a classifier, which generates nothing; use trace or run")
    attached = Attached(model.hf, model.arch, model.dims, interventions, wanted, keep_steps=True)
    attached.known = batch
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": max_new_tokens, **options}
    if getattr(model.hf.generation_config, "pad_token_id", None) is None:
        settings.setdefault("pad_token_id", 0)
    with attached:
        out = model.hf.generate(batch.ids, attention_mask=batch.mask.long(), **settings)
        for step in attached.steps:
            fired(wanted, step)
    values = {read: _join(read, [step[read] for step in attached.steps]) for read in wanted}
    new = tuple(int(i) for i in out[0, batch.ids.shape[1] :])
    string = None if model.tokenizer is None else str(model.tokenizer.decode(new, skip_special_tokens=True))
    seen = TokenBatch(out[:1, :-1], torch.ones_like(out[:1, :-1], dtype=torch.bool), rows=(0,))
    return Generation(string, tokens.ids[0], new, Trace(values, seen))


def _join(read: Read, steps: list[Tensor]) -> Tensor:
    """One read of all steps, along positions."""
    if read.reduce is not None:
        return read.reduce.join(steps)
    pattern = read.site.kind in PATTERN_KINDS
    if pattern:
        width = max(step.shape[-1] for step in steps)
        fill = 0.0 if read.site.kind == "pattern" else float("-inf")
        steps = [torch.nn.functional.pad(step, (0, width - step.shape[-1]), value=fill) for step in steps]
    # A single head drops its axis, and with it the query axis moves up.
    axis = 1 if not pattern or isinstance(read.site.heads, int) else 2
    return torch.stack(steps, axis) if read.site.positions == "end" else torch.cat(steps, axis)


def blanking(model: Model, batch: TokenBatch) -> list[Intervention]:
    """What puts baselines in the place of a batch's blank tokens."""
    return [Apply(Site("embed"), partial(model.blanked, blanks=batch.blanks))] if batch.blanks else []


def passing(
    model: Model,
    batch: TokenBatch,
    reads: Sequence[Read],
    writes: Sequence[Intervention] = (),
    grads: Sequence[Site] = (),
    stop: Site | None = None,
    lenient: bool = False,
) -> Seen:
    """One pass over a batch, by whoever runs the model; every pass that is no row of a wavefront is made here.

    Args:
        grads: whole sites, whose places in the graph are kept.
        stop: nothing after this site is wanted; a backend goes on to the end all the same.
        lenient: rows that lack a position that is written are left as they are.
    Raises:
        SiteError: a site that the model, or its backend, lacks.
        HookError: a read that did not fire or a write that was not reached.
    """
    if model.backend is None:
        attached = Attached(model.hf, model.arch, model.dims, writes, reads, grads, stop=stop)
        with attached:
            call(model, batch, lenient)
            fired(reads, attached.values)
        return Seen(attached.values, attached.captured)
    own = in_order(writes, model.dims.n_layers)
    for site, _ in own:
        model.check(site, "write")
    for read in reads:
        model.check(read.site)
    for site in grads:
        check_grad(site)
        model.check(site, "gradient")
    around = [write for block in model.standing for write in block.writes]
    seen = model.backend.run(batch, [*around, *own], reads, grads, lenient)
    audit(own, {site for site, number in seen.reached if number >= len(around)}, 1)
    for block in model.standing:
        block.passes += 1
        block.reached |= {site for site, number in seen.reached if number < len(around)}
    return seen


def call(model: Model, batch: TokenBatch, lenient: bool = False) -> None:
    """Run the Hugging Face model on a batch, until the end or until a hook says stop."""
    padded = not bool(batch.mask.all())
    kwargs: dict[str, Any] = {"attention_mask": batch.mask.long()} if padded else {}
    if batch.left_padded:
        kwargs["position_ids"] = batch.position_ids
    with contextlib.suppress(Stop):
        model.hf(input_ids=batch.ids, use_cache=False, mechinterp=Pass(batch, lenient), **kwargs)


def fired(reads: Sequence[Read], values: Mapping[Read, Tensor]) -> None:
    """Raise unless every read fired."""
    for read in reads:
        if read not in values:
            raise HookError(
                f"the read of {read.site} ({' '.join(read.site.axes)}) did not fire: the model did not run that"
                " module in this pass; check that nothing replaced it"
            )


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whatever device."""
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or ("alloc" in text and "memory" in text)
