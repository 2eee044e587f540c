"""nnsight: the model run inside its traces, read and written at its envoys, and inside attention at its sources."""

import importlib.metadata
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mechinterp.core.interventions import Intervention
from mechinterp.core.tokens import TokenBatch
from mechinterp.core.trace import Read
from mechinterp.engine.backends.stops import visit
from mechinterp.engine.backends.visits import Visits
from mechinterp.errors import ModelError
from mechinterp.model.backend import Seen, Use
from mechinterp.model.hooks import route
from mechinterp.model.model import Model
from mechinterp.model.slices import PATTERN_KINDS
from mechinterp.sites import Site


class NNsightBackend:
    """An nnsight envoy around a Hugging Face model; every pass is one trace.

    Sites are met in the order of the pass, which nnsight asks for.
    """

    name = "nnsight"

    def __init__(self, envoy: Any, model: Model) -> None:
        self.envoy, self.arch, self.dims, self.model = envoy, model.arch, model.dims, model
        self.version = importlib.metadata.version("nnsight")

    @classmethod
    def of(cls, model: Model) -> "NNsightBackend":
        """An envoy around a second tree of modules with the same weights, and eager attention, whose source is open."""
        from nnsight import NNsight

        from mechinterp.engine.backends import sharing

        tree = sharing(model)
        tree.set_attn_implementation("eager")
        return cls(NNsight(tree), model)

    def lacks(self, site: Site, use: Use) -> str | None:
        if site.per_query_head:
            return "the source that repeats keys and values for each query head is the kernel's own, and varies"
        if site.kind in PATTERN_KINDS and self.envoy._module.config._attn_implementation != "eager":
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
        stops = [self.stop(site, batch) for site in places]

        def at(number: int, value: Tensor) -> Tensor | None:
            new = visits.at(places[number], value)
            # A view is what goes on only if it is given back; then its gradient is the site's.
            return None if new is value and places[number] not in visits.grads else new

        if places:
            with self.envoy.trace(**self.inputs(batch)):
                visit(self.envoy, stops, at)
        return visits.seen()

    def inputs(self, batch: TokenBatch) -> dict[str, Any]:
        """What the model is called with."""
        inputs: dict[str, Any] = {"input_ids": batch.ids, "use_cache": False}
        if not bool(batch.mask.all()):
            inputs["attention_mask"] = batch.mask.long()
        if batch.left_padded:
            inputs["position_ids"] = batch.position_ids
        return inputs

    def stop(self, site: Site, batch: TokenBatch) -> dict[str, Any]:
        """A whole site as `visit` knows it."""
        place = self.arch.place(site)
        how = {"q_rot": "rotated", "k_rot": "rotated", "scores": "pattern", "pattern": "pattern", "head_out": "heads"}
        out: dict[str, Any] = {"kind": site.kind, "layer": site.layer, "how": how.get(site.kind, "module")}
        out |= {"path": place.path, "end": place.end, "heads": self.dims.heads(site.kind), "examples": len(batch)}
        out |= {"dtype": self.model.dtype}
        if site.kind == "head_out":
            out["weight"] = self.weight(site.layer or 0)
        return out | ({"route": self.route} if site.kind == "router" else {})

    route: Any = staticmethod(route)
    """What chooses experts by router logits."""

    def weight(self, layer: int) -> Tensor | None:
        """W_O of a layer; None where it is not here, but with the model."""
        return self.model.W_O(layer)


def module(envoy: Any) -> Any:
    """The Hugging Face model inside an nnsight envoy.

    Raises:
        ModelError: it has no weights yet.
    """
    hf = envoy._module
    if any(parameter.is_meta for parameter in hf.parameters()):
        raise ModelError(
            "this nnsight model has no weights yet; make it with dispatch=True, or load it here with"
            " backend='nnsight', by name or with remote=True, which leaves them on NDIF"
        )
    return hf
