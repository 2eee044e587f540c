"""Attach reads and writes to a model, audit that they happened, always detach.

`Attached` is the only place that registers hooks. Within one module the order is: writes in the
order given, then reads, so reads see what was written. Nested attachments act from the outermost in.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from mechinterp.core.interventions import Intervention
from mechinterp.core.tokens import TokenBatch
from mechinterp.core.trace import Read
from mechinterp.errors import HookError, SiteError
from mechinterp.model.architecture import Architecture, Dims, check
from mechinterp.model.attention import PREFIX, Act, LayerWork, Pass, check_written, register
from mechinterp.model.backend import audit, in_order
from mechinterp.model.slices import PATTERN_KINDS, select, written
from mechinterp.model.weights import linear_weight
from mechinterp.sites import Site

CAPTURING = "transformers.utils.output_capturing"
"""Whose hooks stay on a model once hidden states were asked of it; they only look, and in such a call alone."""


class Stop(Exception):
    """Ends a pass after the last site that anyone reads. Private to the engine."""


class Attached:
    """Hooks on a model, from ``with`` to the end of the block, whatever happens inside.

    Args:
        hf, arch, dims: the model and what is known about it.
        writes: interventions, in order.
        reads: what to keep of every forward call; the newest call is in `values`.
        grads: sites whose places in the graph are kept, in `captured`, for a backward pass.
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
        self.writes = in_order(writes, dims.n_layers)
        self.reads, self.grads, self.stop = tuple(reads), tuple(grads), stop
        self.values: dict[Read, Tensor] = {}
        self.captured: dict[Site, tuple[GradientEdge, torch.Size]] = {}
        """Where the gradient of each site arrives, and its shape; a site's tensor is free to go."""
        self.steps: list[dict[Read, Tensor]] = []
        self.keep_steps = keep_steps
        self.known: TokenBatch | None = None
        """What is known of the one prompt of calls that somebody else makes: named positions and spans."""
        self.passes = 0
        self.now: Pass | None = None
        self._reached: set[Site] = set()
        self._keep: set[tuple[str, str]] = set()  # (end, path) of what is kept for somebody elsewhere
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._ins: dict[str, list[Act]] = defaultdict(list)
        self._outs: dict[str, list[Act]] = defaultdict(list)
        self._work: dict[int, LayerWork] = {}
        self._kernel: str | None = None
        for site in [*(s for s, _ in self.writes), *(r.site for r in self.reads), *self.grads]:
            check(site, arch, dims)

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
        audit(self.writes, self._reached, self.passes)

    def _attach(self) -> None:
        self._ins, self._outs, self._work = defaultdict(list), defaultdict(list), {}
        for site, write in self.writes:
            self._place_write(site, write)
        for read in self.reads:
            self._place_read(read)
        for site in self.grads:
            self._place_grad(site)
        if self.stop is not None:
            place = self.arch.place(self.stop)
            (self._ins if place.end == "in" else self._outs)[place.path].append(_stop)
        if any(s.kind == "logits" for s in (*(s for s, _ in self.writes), *(r.site for r in self.reads))):
            self._handles.append(self.hf.register_forward_pre_hook(_all_logits, with_kwargs=True))
        base = self.hf.get_submodule(self.arch.base)
        self._handles.append(base.register_forward_pre_hook(self._begin, with_kwargs=True))
        for path, acts in self._ins.items():
            self._handles.append(
                self.hf.get_submodule(path).register_forward_pre_hook(self._in(path, acts), with_kwargs=True)
            )
        for path, acts in self._outs.items():
            self._handles.append(self.hf.get_submodule(path).register_forward_hook(self._out(path, acts)))
        config: Any = self.hf.config
        if self._work and not str(config._attn_implementation).startswith(PREFIX):
            self._kernel = kernel = str(config._attn_implementation)
            config._attn_implementation = register(kernel)

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._kernel is not None:
            config: Any = self.hf.config
            config._attn_implementation, self._kernel = self._kernel, None
        for each in self._work.values():  # passes and what was read in them know each other
            each.state, each.values = None, {}
        self._ins, self._outs, self._work, self.now = {}, {}, {}, None  # they know this, and it them

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Every forward call of the base model gets a `Pass`, made by the engine or from the call itself."""
        cache = kwargs.get("past_key_values")
        if self._work and getattr(cache, "is_compileable", False):
            raise SiteError("inside attention, a cache of fixed length cannot be read or written; use a dynamic one")
        state = kwargs.get("mechinterp") or Pass(_batch_of_call(args, kwargs, self.known))
        if state.batch.offset:
            _check_cached([site for site, _ in self.writes])
        state.written |= {site for site, _ in self.writes}
        state.read |= {read.site for read in self.reads} | set(self.grads)
        check_written(state.written, state.read)
        self.now, self.passes = state, self.passes + 1
        self.values = {}
        if self.keep_steps:
            self.steps.append(self.values)
        for each in self._work.values():
            each.state, each.values = state, self.values
        state.work += self._work.values()
        return args, {**kwargs, "mechinterp": state}

    def _in(self, path: str, acts: list[Act]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            assert self.now is not None
            old: Tensor = args[0] if args else kwargs["hidden_states"]
            new = old
            for act in acts:
                new = act(self.now, new)
            self._remember(("in", path), new)
            if new is old:
                return None
            return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

        return hook

    def _out(self, path: str, acts: list[Act]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            assert self.now is not None
            old: Tensor = output[0] if isinstance(output, tuple) else output
            new = old
            for act in acts:
                new = act(self.now, new)
            self._remember(("out", path), new)
            if new is old:
                return None
            if hasattr(module, "num_experts"):
                return (new, *route(module, new))
            return (new, *output[1:]) if isinstance(output, tuple) else new

        return hook

    def _remember(self, place: tuple[str, str], value: Tensor) -> None:
        assert self.now is not None
        if place in self._keep or place in self.now.kept:
            self.now.kept[place] = value

    def _place_write(self, site: Site, write: Intervention) -> None:
        place = self.arch.place(site)
        edit = self._edit(site, write)
        if site.kind == "resid_mid":  # no module makes it: a write is a change of attn_out
            assert site.layer is not None
            layer = site.layer
            entering = self._kept("in", self.arch.layer(layer))

            def mid(state: Pass, attn_out: Tensor) -> Tensor:
                state.mids[layer] = self
                old = state.kept[entering] + attn_out
                return attn_out + (edit(state, old) - old)

            self._outs[f"{self.arch.layer(layer)}.self_attn"].append(mid)
        elif site.kind == "head_out":
            self._outs[place.path].append(self._through_heads(site, edit))
        elif place.end == "attention":
            self._inside(site, edit)
        else:
            (self._ins if place.end == "in" else self._outs)[place.path].append(self._split(site, edit))

    def _place_read(self, read: Read) -> None:
        site = read.site
        place = self.arch.place(site)
        if site.kind in PATTERN_KINDS:
            self._layer(site).watched.append(read)
            return
        if read.reduce is not None:
            raise SiteError(
                f"{site} cannot be reduced inside the pass; only scores and pattern can, read the rest whole"
            )

        def keep(state: Pass, value: Tensor) -> Tensor:
            where = state.batch.where(site.positions)
            self.values[read] = select(value, site, None if where is None else where.to(value.device))
            return value

        if place.end == "attention":
            self._inside(site, keep)
        elif site.kind == "head_out":
            self._outs[place.path].append(self._through_heads(site, keep))
        else:
            (self._ins if place.end == "in" else self._outs)[place.path].append(self._split(site, keep))

    def _place_grad(self, site: Site) -> None:
        place = self.arch.place(site)
        check_grad(site)

        def capture(state: Pass, value: Tensor) -> Tensor:
            if not value.requires_grad:
                value = value.requires_grad_()
            if site.per_query_head:  # a new tensor, or the model would go on with the group's own
                value = value.clone()
            self.captured[site] = get_gradient_edge(value), value.shape
            return value

        if place.end == "attention":
            self._inside(site, capture)
            self._layer(site).differentiated |= site.kind in PATTERN_KINDS
        else:
            (self._ins if place.end == "in" else self._outs)[place.path].append(capture)

    def _inside(self, site: Site, act: Act) -> None:
        """Act inside the attention function; a view per query head starts from what its module gave."""
        self._layer(site).edits[LayerWork.key(site)].append(act)
        if site.per_query_head and site.kind != "k_rot":
            self._kept("out", self.arch.place(site.of_kv_head).path)

    def _layer(self, site: Site) -> LayerWork:
        assert site.layer is not None
        if site.layer not in self._work:
            rotary: Any = self.hf.get_submodule(f"{self.arch.base}.rotary_emb")
            self._work[site.layer] = LayerWork(site.layer, f"{self.arch.layer(site.layer)}.self_attn", rotary)
        return self._work[site.layer]

    def _kept(self, end: Literal["in", "out"], path: str) -> tuple[str, str]:
        """Keep what goes into a module, or comes out of it, after all writes there; returns where it is kept."""
        self._keep.add((end, path))
        (self._ins if end == "in" else self._outs)[
            path
        ] += []  # so that a hook is there even if nothing is read or written
        return end, path

    def _edit(self, site: Site, write: Intervention) -> Act:
        def act(state: Pass, value: Tensor) -> Tensor:
            _check_mid(site, state.mids.get(site.layer or 0, self) is self)
            new = written(value, site, write, state.batch, state.lenient)
            if new is None:
                return value
            self._reached.add(site)
            return new

        return act

    def _split(self, site: Site, act: Act) -> Act:
        """View a projection's output with its head axis, and a router's with examples and positions apart."""
        heads = self.dims.heads(site.kind)
        if heads is None and site.kind != "router":
            return act

        def split(state: Pass, value: Tensor) -> Tensor:
            lead = (len(state.batch), -1) if heads is None else (*value.shape[:2], heads)
            view = value.view(*lead, value.shape[-1] if heads is None else -1)
            new = act(state, view)
            return value if new is view else new.reshape(value.shape)

        return split

    def _through_heads(self, site: Site, act: Act) -> Act:
        """head_out is z through its slice of W_O; a write there is a change of the sum."""
        assert site.layer is not None
        layer, entering = site.layer, self._kept("in", self.arch.place(site).path)
        projection = self.hf.get_submodule(entering[1])

        def through(state: Pass, total: Tensor) -> Tensor:
            old = state.head_out.get(layer)
            if old is None:
                z = state.kept[entering].unflatten(-1, (self.dims.n_heads, -1))
                weight = linear_weight(projection).view(self.dims.d_model, self.dims.n_heads, -1)
                old = torch.einsum("bphe,dhe->bphd", z, weight)
            new = act(state, old)
            if new is old:  # not kept: it is as large as a residual stream for every head
                return total
            state.head_out[layer] = new
            return total + (new - old).sum(2)

        return through


def in_force(hf: nn.Module, base: str) -> tuple[list[tuple[Site, Intervention]], bool]:
    """What blocks around this one write, and whether somebody else's hooks are inside the model, too.

    Args:
        base: path of the base model, whose own hooks, and those of the whole model, are not counted.
    """
    tops = (hf, hf.get_submodule(base))
    blocks = (getattr(hook, "__self__", None) for hook in tops[1]._forward_pre_hooks.values())
    written = [write for block in blocks if isinstance(block, Attached) for write in block.writes]
    inside = (module for module in hf.modules() if module not in tops)
    hooks = (hook for m in inside for hook in (*m._forward_pre_hooks.values(), *m._forward_hooks.values()))
    return written, any(getattr(hook, "__module__", None) not in (__name__, CAPTURING) for hook in hooks)


def route(gate: Any, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and numbers of the experts that router logits choose, as transformers' own router does."""
    probs = logits.softmax(-1, dtype=torch.float32)
    top = probs.topk(gate.top_k, dim=-1)
    weights = top.values / top.values.sum(-1, keepdim=True) if gate.norm_topk_prob else top.values
    return weights.to(logits.dtype), top.indices


def check_grad(site: Site) -> None:
    """Raise where a gradient is another site's, or a metric's own."""
    if site.kind == "head_out":
        raise SiteError(f"the gradient at {site} is that of attn_out.{site.layer}; ask for it there")
    if site.kind == "logits":
        raise SiteError("the gradient at logits is the metric's own; ask for it at final_norm")


def _check_mid(site: Site, own: bool) -> None:
    """Raise where a block around this one has written resid_mid already, which a write to attn_out would undo."""
    if site.kind == "attn_out" and not own:
        raise SiteError(
            f"{site} cannot be written inside a block that writes resid_mid.{site.layer}, which comes after it;"
            " give both to one intervene()"
        )


def _check_cached(written: Sequence[Site]) -> None:
    """Raise where a later step of generating would not see what was written in an earlier one."""
    for site in written:
        if site.kind == "k_rot" or site.per_query_head:
            view = " per query head" if site.per_query_head else ""
            raise SiteError(
                f"{site} cannot be written{view} while generating: the cache holds it already; write the"
                f" {'group' if view else 'projection'}'s own, {site.kind[0]}.{site.layer}"
            )


def _all_logits(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """generate() asks for the last position's logits alone; a site has all."""
    return (args, kwargs | {"logits_to_keep": 0}) if "logits_to_keep" in kwargs else None


def _stop(state: Pass, value: Tensor) -> Tensor:
    raise Stop


def _batch_of_call(args: tuple[Any, ...], kwargs: dict[str, Any], known: TokenBatch | None) -> TokenBatch:
    """The batch of a call that somebody else made: Hugging Face's generate, or a user's own."""
    ids = args[0] if args else kwargs.get("input_ids")
    if ids is None:
        embeds = kwargs["inputs_embeds"]
        ids = torch.zeros(embeds.shape[:2], dtype=torch.long, device=embeds.device)
    cache = kwargs.get("past_key_values")
    offset = 0 if cache is None else int(cache.get_seq_length())
    mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2:  # generate may have made one for each kind of layer
        mask = torch.ones((ids.shape[0], offset + ids.shape[1]), device=ids.device)
    batch = TokenBatch(ids, mask.bool(), offset=offset)
    if known is None or len(batch) != 1:
        return batch
    return replace(batch, rows=known.rows, positions=known.positions, spans=known.spans, categories=known.categories)
