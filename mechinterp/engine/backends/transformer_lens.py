"""TransformerLens 4: the model run as a TransformerBridge, read and written at its hook points."""

import importlib.metadata
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mechinterp.core.interventions import Intervention
from mechinterp.core.tokens import TokenBatch
from mechinterp.core.trace import Read
from mechinterp.engine.backends.visits import Visits, masked
from mechinterp.errors import ModelError
from mechinterp.model.backend import Seen, Use
from mechinterp.model.model import Model
from mechinterp.sites import Site

_TURNED = ("q_normed", "k_normed")
"""Kinds that TransformerLens holds as ``batch head pos d_head``."""
_WRAPPED = "_original_component."


class BridgeBackend:
    """A `TransformerBridge`, which wraps the modules of a Hugging Face model and makes attention itself."""

    name = "transformer_lens"

    def __init__(self, bridge: Any, model: Model) -> None:
        self.bridge, self.dims = bridge, model.dims
        self.version = importlib.metadata.version("transformer-lens")
        self.hooks: frozenset[str] = frozenset(bridge.hook_dict)

    @classmethod
    def of(cls, model: Model) -> "BridgeBackend":
        """A bridge around the same weights.

        Raises:
            ModelError: TransformerLens cannot wrap this model; the message has its reason.
        """
        from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

        from mechinterp.engine.backends import sharing

        tree = sharing(model)
        tree.set_attn_implementation("eager")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                bridge = build_bridge_from_module(
                    tree, type(tree).__name__, hf_config=tree.config, model_name=model.name
                )
        except Exception as error:
            raise ModelError(
                f"TransformerLens cannot wrap {model.name} ({type(tree).__name__}): {type(error).__name__}: {error};"
                " use backend='native'"
            ) from error
        return cls(bridge, model)

    def lacks(self, site: Site, use: Use) -> str | None:
        if site.per_query_head:
            return "TransformerLens has no hook where keys and values are repeated for each query head"
        if site.kind == "router" and use != "read":
            return "TransformerLens's hook sees the router's logits after the experts were chosen by them"
        if site.kind == "attn_in" and use != "read":  # attention then reads copies made before this hook
            for flag in ("use_attn_in", "use_split_qkv_input"):
                if getattr(self.bridge.cfg, flag, False):
                    return f"nothing reads this hook while {flag} is on; bridge.set_{flag}(False) turns it off"
        if hook(site) not in self.hooks:
            return f"the bridge has no hook {hook(site)}"
        return None

    def run(
        self,
        batch: TokenBatch,
        writes: Sequence[tuple[Site, Intervention]],
        reads: Sequence[Read],
        grads: Sequence[Site],
        lenient: bool,
    ) -> Seen:
        check_weights(self.bridge)
        visits = Visits(batch, writes, reads, grads, lenient)
        places = visits.places()
        hooks = [(hook(site), self._visit(visits, site)) for site in places]
        more: dict[str, Any] = {"use_cache": False}
        if not bool(batch.mask.all()):
            more["attention_mask"] = batch.mask.long()
        if batch.left_padded:
            more["position_ids"] = batch.position_ids
        by_head = any(site.kind == "head_out" for site in places)
        switched = by_head and not getattr(self.bridge.cfg, "use_attn_result", False)
        try:
            if switched:
                self.bridge.set_use_attn_result(True)
            self.bridge.run_with_hooks(batch.ids, fwd_hooks=hooks, return_type=None, **more)
        finally:
            if switched:
                self.bridge.set_use_attn_result(False)
        return visits.seen()

    def _visit(self, visits: Visits, site: Site) -> Callable[..., Tensor | None]:
        def act(value: Tensor, hook: Any) -> Tensor | None:
            old = ours(site, value, len(visits.batch))
            new = visits.at(site, old)
            # A view is what goes on only if it is given back; then its gradient is the site's.
            return None if new is old and site not in visits.grads else theirs(site, new)

        return act


def hook(site: Site) -> str:
    """The name of a site's hook point in a bridge."""
    # On dense layers the same name is the gate projection, so that nobody can read it as a site.
    return f"blocks.{site.layer}.mlp.gate.hook_out" if site.kind == "router" else str(site.tl_name)


def ours(site: Site, value: Tensor, examples: int) -> Tensor:
    """What TransformerLens holds at a site, with the site's own axes."""
    if site.kind in _TURNED:
        return value.transpose(1, 2)
    if site.kind == "scores":
        return masked(value)
    return value.view(examples, -1, value.shape[-1]) if site.kind == "router" else value


def theirs(site: Site, value: Tensor) -> Tensor:
    """A site's value as TransformerLens holds it."""
    if site.kind in _TURNED:
        return value.transpose(1, 2)
    if site.kind == "scores":
        return value.masked_fill(value.isneginf(), torch.finfo(value.dtype).min)
    return value.flatten(0, 1) if site.kind == "router" else value


def check_weights(bridge: Any) -> None:
    """Raise where a bridge has changed its weights, which it can do at any time."""
    if getattr(bridge, "compatibility_mode", False) or getattr(bridge, "_weights_processed", False):
        raise ModelError(
            "this TransformerBridge is in compatibility mode or has processed its weights, which may fold norms into"
            " them and centre them, so that sites hold other numbers; take a bridge on which neither"
            " enable_compatibility_mode() nor process_weights() was called"
        )


def bare(bridge: Any) -> nn.Module:
    """The Hugging Face model that a bridge was made of, anew, around the same weights.

    Raises:
        ModelError: the bridge has changed the weights, as its compatibility mode does.
    """
    check_weights(bridge)
    theirs: Any = bridge.original_model
    with torch.device("meta"):
        made: nn.Module = type(theirs)(theirs.config)

    tensors = (theirs.named_parameters(remove_duplicate=False), theirs.named_buffers(remove_duplicate=False))
    held = {name.replace(_WRAPPED, ""): tensor for some in tensors for name, tensor in some}
    for path, module in made.named_modules():
        for table in (module._parameters, module._buffers):
            own = {leaf: old for leaf, old in table.items() if old is not None}  # a bridge adds a bias of zeros
            table.update({leaf: held.get(f"{path}.{leaf}".lstrip("."), old) for leaf, old in own.items()})
    if left := [name for name, tensor in (*made.named_parameters(), *made.named_buffers()) if tensor.is_meta]:
        raise ModelError(f"the bridge has no weights for {left[0]}; load the model by name with this backend instead")
    return made
