"""nnsight: the model run inside its traces, read and written at its envoys, and inside attention at its sources."""

import importlib.metadata
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mechinterp.core.interventions import Intervention
from mechinterp.core.tokens import TokenBatch
from mechinterp.core.trace import Read
from mechinterp.engine.backends.visits import Visits, masked
from mechinterp.errors import ModelError
from mechinterp.model.backend import Seen, Use
from mechinterp.model.hooks import route
from mechinterp.model.model import Model
from mechinterp.model.slices import PATTERN_KINDS
from mechinterp.sites import Site

_ROTARY, _ATTENTION, _SOFTMAX = "apply_rotary_pos_emb_0", "attention_interface_1", "nn_functional_softmax_0"
"""Operations in the source of transformers' attention and of its eager kernel, as nnsight numbers them."""
_ROTATED = ("q_rot", "k_rot")


class NNsightBackend:
    """An nnsight envoy around a Hugging Face model; every pass is one trace.

    Sites are met in the order of the pass, which nnsight asks for.
    """

    name = "nnsight"

    def __init__(self, envoy: Any, model: Model) -> None:
        self.envoy, self.arch, self.dims, self.model = envoy, model.arch, model.dims, model
        self.version = importlib.metadata.version("nnsight")
        self.eager = str(module(envoy).config._attn_implementation) == "eager"

    @classmethod
    def of(cls, model: Model) -> "NNsightBackend":
        """An envoy around a second tree of modules with the same weights, and eager attention, whose source is open."""
        from nnsight import NNsight

        from mechinterp.engine.backends import sharing

        tree = sharing(model.hf)
        tree.set_attn_implementation("eager")
        return cls(NNsight(tree), model)

    def lacks(self, site: Site, use: Use) -> str | None:
        if site.per_query_head:
            return "the source that repeats keys and values for each query head is the kernel's own, and varies"
        if site.kind in PATTERN_KINDS and not self.eager:
            return "scores and patterns exist in eager attention only: make the model with attn_implementation='eager'"
        return None

    def run(
        self,
        batch: TokenBatch,
        writes: Sequence[tuple[Site, Intervention]],
        reads: Sequence[Read],
        grads: Sequence[Site],
        lenient: bool,
    ) -> Seen:
        visits = Visits(batch, writes, reads, grads, lenient)
        places = visits.places()
        inputs: dict[str, Any] = {"input_ids": batch.ids, "use_cache": False}
        if not bool(batch.mask.all()):
            inputs["attention_mask"] = batch.mask.long()
        if batch.left_padded:
            inputs["position_ids"] = batch.position_ids
        met = _Meetings(self, visits, places)
        for layer in {site.layer for site in places if site.kind in (*_ROTATED, *PATTERN_KINDS)}:
            met.source(layer)  # which nnsight must know before the pass
        if places:
            with self.envoy.trace(**inputs):
                met.all()
        return visits.seen()


class _Meetings:
    """The places of one pass, one after the other, inside a trace."""

    def __init__(self, backend: NNsightBackend, visits: Visits, places: Sequence[Site]) -> None:
        self.backend, self.visits, self.places = backend, visits, places
        self.z: Tensor | None = None

    def all(self) -> None:
        """Wait for each place in turn, and do what is wanted there."""
        places = list(self.places)
        while places:
            site = places.pop(0)
            if site.kind in _ROTATED:  # one operation gives both
                other = Site("k_rot", site.layer)
                both = [site] + ([places.pop(0)] if places and places[0] == other and site != other else [])
                self._rotated(both)
            elif site.kind in PATTERN_KINDS:
                self._pattern(site)
            elif site.kind == "head_out":
                self._heads(site)
            else:
                self._module(site)

    def _module(self, site: Site) -> None:
        place = self.backend.arch.place(site)
        envoy = self.backend.envoy.get(place.path)
        raw = envoy.input if place.end == "in" else envoy.output
        old: Tensor = raw[0] if isinstance(raw, tuple) else raw
        if site.kind == "z":
            self.z = old
        ours = self._split(site, old)
        new = self.visits.at(site, ours)
        if new is ours and site not in self.visits.grads:
            return
        new = new if new.shape == old.shape else new.reshape(old.shape)
        if site.kind == "z":
            self.z = new
        if place.end == "in":
            envoy.input = new
        elif site.kind == "router":  # which has chosen its experts already: they are chosen again
            envoy.output = (new, *route(envoy._module, new))
        else:
            envoy.output = (new, *raw[1:]) if isinstance(raw, tuple) else new

    def _split(self, site: Site, value: Tensor) -> Tensor:
        """A projection's output with its head axis, and a router's with examples and positions apart."""
        if site.kind == "router":
            return value.view(len(self.visits.batch), -1, value.shape[-1])
        heads = self.backend.dims.heads(site.kind)
        return value if heads is None or value.ndim == 4 else value.unflatten(-1, (heads, -1))

    def _heads(self, site: Site) -> None:
        """head_out is z through its slice of W_O; a write there is a change of the sum."""
        envoy = self.backend.envoy.get(self.backend.arch.place(site).path)
        entering = envoy.input if self.z is None else self.z
        total = envoy.output
        z = entering.unflatten(-1, (self.backend.dims.n_heads, -1))
        old = torch.einsum("bphe,hed->bphd", z, self.backend.model.W_O(site.layer or 0))
        new = self.visits.at(site, old)
        self.z = None
        if new is not old:
            envoy.output = total + (new - old).sum(2)

    def source(self, layer: int | None) -> Any:
        """The operations of a layer's attention."""
        path = self.backend.arch.layer(layer or 0)
        return self.backend.envoy.get(f"{path}.self_attn").source

    def _rotated(self, places: Sequence[Site]) -> None:
        operation = getattr(self.source(places[0].layer), _ROTARY)
        both: dict[str, Tensor] = dict(zip(_ROTATED, operation.output, strict=True))
        changed = False
        for site in places:
            ours = both[site.kind].transpose(1, 2)
            new = self.visits.at(site, ours)
            if new is not ours or site in self.visits.grads:
                both[site.kind], changed = new.transpose(1, 2), True
        if changed:
            operation.output = tuple(both[kind] for kind in _ROTATED)

    def _pattern(self, site: Site) -> None:
        softmax = getattr(getattr(self.source(site.layer), _ATTENTION).source, _SOFTMAX)
        if site.kind == "pattern":
            raw = softmax.output  # in float32, and rounded to the model's dtype before it goes on
            old = raw.to(self.backend.model.dtype)
            new = self.visits.at(site, old)
            if new is not old or site in self.visits.grads:
                softmax.output = new.to(raw.dtype)
            return
        raw = softmax.input
        old = masked(raw)
        new = self.visits.at(site, old)
        if new is not old or site in self.visits.grads:
            softmax.input = new.masked_fill(new.isneginf(), torch.finfo(new.dtype).min)


def module(envoy: Any) -> Any:
    """The Hugging Face model inside an nnsight envoy.

    Raises:
        ModelError: it has no weights yet.
    """
    hf = envoy._module
    if any(parameter.is_meta for parameter in hf.parameters()):
        raise ModelError(
            "this nnsight model has no weights yet; make it with dispatch=True, or load it here by name with"
            " backend='nnsight'"
        )
    return hf
