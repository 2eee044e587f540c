"""Attach reads and writes to a model, audit that they happened, always detach.

`Attached` is the only place that registers hooks. Within one module the order is: writes in the
order given, then reads, so reads see what was written. Nested attachments act from the outermost in.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from mechinterp.core.interventions import Intervention
from mechinterp.core.tokens import TokenBatch, Where
from mechinterp.core.trace import Read
from mechinterp.errors import HookError, SiteError
from mechinterp.model.architecture import Architecture, Dims
from mechinterp.model.attention import PREFIX, LayerWork, Side, register
from mechinterp.model.weights import linear_weight
from mechinterp.sites import Site, resolve

PATTERN_KINDS = ("scores", "pattern")

Act: TypeAlias = Callable[["Pass", Tensor], Tensor]


class Stop(Exception):
    """Ends a pass after the last site that anyone reads. Private to the engine."""


@dataclass
class Pass:
    """The state of one forward call; it travels down to the attention function as a keyword."""

    batch: TokenBatch
    lenient: bool = True
    """Rows that lack a written position are left as they are, instead of being an error."""
    work: list["_Attention"] = field(default_factory=list)
    kept: dict[str, Tensor] = field(default_factory=dict)
    """What a module was given, after everybody's writes, where a write elsewhere depends on it."""
    head_out: dict[int, Tensor] = field(default_factory=dict)
    """What heads write, by layer, where somebody changed it."""

    def attention(self, layer: int) -> list[LayerWork]:
        return [each for each in self.work if each.layer == layer]


class Attached:
    """Hooks on a model, from ``with`` to the end of the block, whatever happens inside.

    Args:
        hf, arch, dims: the model and what is known about it.
        writes: interventions, in order.
        reads: what to keep of every forward call; the newest call is in `values`.
        grads: sites whose tensors are kept in the graph, in `captured`, for a backward pass.
        stop: end the pass after this site (the engine catches `Stop`).
        keep_steps: keep what is read in every call, in `steps`, rather than in the newest alone.
    Raises:
        SiteError: a site that this model lacks.
        HookError: on leaving the block, a write that was never reached though the model ran.
    """

    def __init__(
        self,
        hf: nn.Module,
        arch: Architecture,
        dims: Dims,
        writes: Sequence[Intervention] = (),
        reads: Sequence[Read] = (),
        grads: Sequence[Site] = (),
        stop: Site | None = None,
        keep_steps: bool = False,
    ) -> None:
        self.hf, self.arch, self.dims = hf, arch, dims
        # In the order of the pass, and as given at one site: what is later sees what is earlier.
        writes_at = [(site, w) for w in writes for site in resolve(w.site, dims.n_layers)]
        self.writes = sorted(writes_at, key=lambda each: each[0].order)
        self.reads, self.grads, self.stop = tuple(reads), tuple(grads), stop
        self.values: dict[Read, Tensor] = {}
        self.captured: dict[Site, Tensor] = {}
        self.steps: list[dict[Read, Tensor]] = []
        self.keep_steps = keep_steps
        self.passes = 0
        self.now: Pass | None = None
        self._reached: set[Site] = set()
        self._keep: set[str] = set()  # paths whose input is kept for a write elsewhere
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        for site in [*(s for s, _ in self.writes), *(r.site for r in self.reads), *self.grads]:
            check(site, arch, dims)
        for site, _ in self.writes:
            if site.per_query_head:
                raise SiteError(f"{site} cannot be written per query head; write its kv head, or scores, pattern or z")

    def __enter__(self) -> "Attached":
        if self._handles:
            raise HookError("this intervention is in force already; make another one to nest it")
        self.passes, self._reached = 0, set()
        try:
            self._attach()
        except BaseException:
            self._detach()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._detach()
        if kind is None and self.passes:
            self.audit()

    def audit(self) -> None:
        """Raise unless every write was reached at least once."""
        for site, write in self.writes:
            if site not in self._reached:
                raise HookError(
                    f"{type(write).__name__} at {site} was never reached in {self.passes} forward passes;"
                    " every pass stopped before it or had no such position: read something after it, or drop it"
                )

    def _attach(self) -> None:
        ins: dict[str, list[Act]] = defaultdict(list)
        outs: dict[str, list[Act]] = defaultdict(list)
        work: dict[int, _Attention] = {}
        for site, write in self.writes:
            self._place_write(site, write, ins, outs, work)
        for read in self.reads:
            self._place_read(read, ins, outs, work)
        for site in self.grads:
            self._place_grad(site, ins, outs, work)
        if self.stop is not None:
            place = self.arch.place(self.stop)
            (ins if place.end == "in" else outs)[place.path].append(_stop)
        base = self.hf.get_submodule(self.arch.base)
        self._handles.append(base.register_forward_pre_hook(self._begin, with_kwargs=True))
        for path, acts in ins.items():
            self._handles.append(
                self.hf.get_submodule(path).register_forward_pre_hook(self._in(path, acts), with_kwargs=True)
            )
        for path, acts in outs.items():
            self._handles.append(self.hf.get_submodule(path).register_forward_hook(self._out(acts)))
        self._work, self._kernel = list(work.values()), None
        config: Any = self.hf.config
        if work and not str(config._attn_implementation).startswith(PREFIX):
            self._kernel = config._attn_implementation
            config._attn_implementation = register(self._kernel)

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if getattr(self, "_kernel", None) is not None:
            config: Any = self.hf.config
            config._attn_implementation, self._kernel = self._kernel, None

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Every forward call of the base model gets a `Pass`, made by the engine or from the call itself."""
        state = kwargs.get("mechinterp") or Pass(_batch_of_call(args, kwargs))
        if state.batch.offset and any(site.kind == "k_rot" for site, _ in self.writes):
            raise SiteError("k_rot cannot be written while generating: the cache holds the keys already; write k")
        self.now, self.passes = state, self.passes + 1
        self.values = {}
        if self.keep_steps:
            self.steps.append(self.values)
        state.work += self._work
        return args, {**kwargs, "mechinterp": state}

    def _in(self, path: str, acts: list[Act]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            assert self.now is not None
            old: Tensor = args[0] if args else kwargs["hidden_states"]
            new = old
            for act in acts:
                new = act(self.now, new)
            if path in self._keep or path in self.now.kept:
                self.now.kept[path] = new
            if new is old:
                return None
            return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

        return hook

    def _out(self, acts: list[Act]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            assert self.now is not None
            old: Tensor = output[0] if isinstance(output, tuple) else output
            new = old
            for act in acts:
                new = act(self.now, new)
            if new is old:
                return None
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return hook

    def _place_write(
        self,
        site: Site,
        write: Intervention,
        ins: dict[str, list[Act]],
        outs: dict[str, list[Act]],
        work: dict[int, "_Attention"],
    ) -> None:
        place = self.arch.place(site)
        edit = self._edit(site, write)
        if site.kind == "resid_mid":  # no module makes it: a write is a change of attn_out
            assert site.layer is not None
            layer = site.layer
            path = self._kept(self.arch.layer(layer), ins)

            def mid(state: Pass, attn_out: Tensor) -> Tensor:
                old = state.kept[path] + attn_out
                return attn_out + (edit(state, old) - old)

            outs[f"{self.arch.layer(layer)}.self_attn"].append(mid)
        elif site.kind == "head_out":
            outs[place.path].append(self._through_heads(site, edit, ins))
        elif place.end == "attention":
            self._layer(work, site).edits[site.kind].append(edit)
        else:
            (ins if place.end == "in" else outs)[place.path].append(self._split(site, edit))

    def _place_read(
        self, read: Read, ins: dict[str, list[Act]], outs: dict[str, list[Act]], work: dict[int, "_Attention"]
    ) -> None:
        site = read.site
        place = self.arch.place(site)
        if site.kind in PATTERN_KINDS:
            self._layer(work, site).watched.append(read)
            return
        if read.reduce is not None:
            raise SiteError(
                f"{site} cannot be reduced inside the pass; only scores and pattern can, read the rest whole"
            )

        def keep(state: Pass, value: Tensor) -> Tensor:
            self.values[read] = select(value, site, state.batch.where(site.positions), self._repeat(site))
            return value

        if place.end == "attention":
            self._layer(work, site).edits[site.kind].append(keep)
        elif site.kind == "head_out":
            outs[place.path].append(self._through_heads(site, keep, ins))
        else:
            (ins if place.end == "in" else outs)[place.path].append(self._split(site, keep))

    def _place_grad(
        self, site: Site, ins: dict[str, list[Act]], outs: dict[str, list[Act]], work: dict[int, "_Attention"]
    ) -> None:
        place = self.arch.place(site)
        if site.kind == "head_out":
            raise SiteError(f"the gradient at {site} is that of attn_out.{site.layer}; ask for it there")
        if site.per_query_head:
            raise SiteError(f"the gradient at {site} is that of its kv head; ask for it without per_query_head")
        if site.kind == "logits":
            raise SiteError("the gradient at logits is the metric's own; ask for it at final_norm")

        def capture(state: Pass, value: Tensor) -> Tensor:
            if not value.requires_grad:
                value = value.requires_grad_() if value.is_leaf else value
            self.captured[site] = value
            return value

        if place.end == "attention":
            layer = self._layer(work, site)
            layer.edits[site.kind].append(capture)
            layer.differentiated |= site.kind in PATTERN_KINDS
        else:
            (ins if place.end == "in" else outs)[place.path].append(capture)

    def _layer(self, work: dict[int, "_Attention"], site: Site) -> "_Attention":
        assert site.layer is not None
        return work.setdefault(site.layer, _Attention(self, site.layer))

    def _kept(self, path: str, ins: dict[str, list[Act]]) -> str:
        """Keep what a module is given, after all writes there; returns the path."""
        self._keep.add(path)
        ins[path] += []  # so that a hook is there even if nothing is read or written
        return path

    def _edit(self, site: Site, write: Intervention) -> Act:
        def act(state: Pass, value: Tensor) -> Tensor:
            where = state.batch.where(site.positions, strict=not state.lenient)
            if where is None and state.batch.left_padded and site.kind not in PATTERN_KINDS:
                where = _real(state.batch)  # so that a slice starts at the first real token
            if where is not None and where.valid is not None and not bool(where.valid.any()):
                return value
            self._reached.add(site)
            return overwrite(value, site, where, write.for_rows(state.batch.rows))

        return act

    def _split(self, site: Site, act: Act) -> Act:
        """View a projection's output with its head axis, where it has one."""
        heads = self.dims.heads(site.kind)
        if heads is None:
            return act

        def split(state: Pass, value: Tensor) -> Tensor:
            view = value.view(*value.shape[:2], heads, -1)
            new = act(state, view)
            return value if new is view else new.reshape(value.shape)

        return split

    def _through_heads(self, site: Site, act: Act, ins: dict[str, list[Act]]) -> Act:
        """head_out is z through its slice of W_O; a write there is a change of the sum."""
        assert site.layer is not None
        layer, path = site.layer, self._kept(self.arch.place(site).path, ins)
        projection = self.hf.get_submodule(path)

        def through(state: Pass, total: Tensor) -> Tensor:
            old = state.head_out.get(layer)
            if old is None:
                z = state.kept[path].unflatten(-1, (self.dims.n_heads, -1))
                weight = linear_weight(projection).view(self.dims.d_model, self.dims.n_heads, -1)
                old = torch.einsum("bphe,dhe->bphd", z, weight)
            new = act(state, old)
            if new is old:  # not kept: it is as large as a residual stream for every head
                return total
            state.head_out[layer] = new
            return total + (new - old).sum(2)

        return through

    def _repeat(self, site: Site) -> int:
        return self.dims.n_heads // self.dims.n_kv_heads if site.per_query_head else 1


@dataclass
class _Attention:
    """One attachment's work inside one layer's attention."""

    owner: Attached
    layer: int
    edits: dict[str, list[Act]] = field(default_factory=lambda: defaultdict(list))
    watched: list[Read] = field(default_factory=list)
    differentiated: bool = False

    @property
    def explicit(self) -> bool:
        return self.differentiated or any(self.edits[kind] for kind in PATTERN_KINDS)

    def edit(self, kind: str, value: Tensor) -> Tensor:
        state = self.owner.now
        assert state is not None
        for act in self.edits[kind]:
            value = act(state, value)
        return value

    def watch(self, side: Side) -> None:
        state = self.owner.now
        assert state is not None
        reduced: dict[str, list[Read]] = defaultdict(list)
        for read in self.watched:
            site = read.site
            where = state.batch.where(site.positions)
            if read.reduce is not None:
                if where is not None or site.heads is not None:
                    raise SiteError(
                        f"{site} is reduced, so it takes all heads and queries; choose among them in the function"
                    )
                reduced[site.kind].append(read)
            elif where is None:
                whole = side.at(site.kind, slice(0, side.query.shape[2]))
                self.owner.values[read] = whole if site.heads is None else whole[:, _index(site.heads)]
            else:
                single = where.columns.ndim == 1
                chosen = side.gather(site.kind, where.columns[:, None] if single else where.columns)
                if where.valid is not None:
                    valid = where.valid.reshape(len(chosen), 1, -1, 1)
                    chosen = chosen.masked_fill(~valid, float("nan"))
                chosen = chosen[:, :, 0] if single else chosen
                self.owner.values[read] = chosen if site.heads is None else chosen[:, _index(site.heads)]
        for kind, reads in reduced.items():
            pieces: dict[Read, list[Tensor]] = {read: [] for read in reads}
            real = state.batch.mask[:, None, state.batch.offset :, None]
            padded = kind == "pattern" and not bool(real.all())
            for queries, whole in side.blocks(kind):
                block = whole * real[:, :, queries] if padded else whole  # padding attends to nothing
                for read in reads:
                    assert read.reduce is not None
                    pieces[read].append(read.reduce.fn(block, queries, state.batch))
            for read in reads:
                assert read.reduce is not None
                self.owner.values[read] = read.reduce.join(pieces[read])


def check(site: Site, arch: Architecture, dims: Dims) -> None:
    """Raise unless this model has the site.

    Raises:
        SiteError: no such layer, head, or kind in this model.
    """
    arch.place(site)
    if site.layer is not None and not 0 <= site.layer < dims.n_layers:
        raise SiteError(f"{site} does not exist: the model has layers 0 to {dims.n_layers - 1}")
    count = dims.n_heads if site.per_query_head else dims.heads(site.kind)
    for head in (site.heads,) if isinstance(site.heads, int) else site.heads or ():
        if count is not None and not 0 <= head < count:
            kind = "key/value heads" if site.axes[2] == "kv_head" else "heads"
            raise SiteError(f"{site} does not exist: layer {site.layer} has {kind} 0 to {count - 1}")


def select(value: Tensor, site: Site, where: Where | None, repeat: int = 1) -> Tensor:
    """The slice of ``batch pos [head] width`` that a site's positions and heads mean.

    Padding among chosen positions is NaN.
    """
    out = value if repeat == 1 else value.repeat_interleave(repeat, 2)
    if where is not None:
        rows = torch.arange(len(out), device=out.device)
        out = out[rows if where.columns.ndim == 1 else rows[:, None], where.columns]
    if site.heads is not None:
        out = (
            out[:, _index(site.heads)]
            if where is not None and where.columns.ndim == 1
            else out[:, :, _index(site.heads)]
        )
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
    at_head = 1 if where is not None and where.columns.ndim == 1 else 2
    heads = None if site.heads is None else _index(site.heads)
    chosen = (slice(None),) * at_head + (heads,)
    old = part if heads is None else part[chosen]
    # With both axes left, the slice of a pattern is batch head query key, as it is read.
    turned = swap and old.ndim == 4
    shown = old.transpose(1, 2) if turned else old
    try:
        new = write(shown)
    except RuntimeError as error:
        if "must match" not in str(error):
            raise
        raise HookError(
            f"{type(write).__name__} does not fit {site}, a slice of shape {tuple(shown.shape)}: {error}"
        ) from error
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


def _index(heads: int | tuple[int, ...]) -> Any:
    return heads if isinstance(heads, int) else list(heads)


def _real(batch: TokenBatch) -> Where:
    """All real tokens of left-padded rows, from the first on."""
    steps = torch.arange(int(batch.lengths.max()), device=batch.ids.device)
    columns = batch.starts[:, None] + steps - batch.offset
    valid = (steps < batch.lengths[:, None]) & (columns >= 0)
    return Where(columns.clamp(0, batch.ids.shape[1] - 1), valid)


def _stop(state: Pass, value: Tensor) -> Tensor:
    raise Stop


def _batch_of_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> TokenBatch:
    """The batch of a call that somebody else made: Hugging Face's generate, or a user's own."""
    ids = args[0] if args else kwargs.get("input_ids")
    if ids is None:
        embeds = kwargs["inputs_embeds"]
        ids = torch.zeros(embeds.shape[:2], dtype=torch.long, device=embeds.device)
    cache = kwargs.get("past_key_values")
    offset = 0 if cache is None else int(cache.get_seq_length())
    mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
    if mask is None or mask.ndim != 2:
        mask = torch.ones((ids.shape[0], offset + ids.shape[1]), device=ids.device)
    return TokenBatch(ids, mask.bool(), offset=offset)
