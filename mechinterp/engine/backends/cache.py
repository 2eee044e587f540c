"""What was read as a TransformerLens `ActivationCache`, and the other way round."""

from typing import Any

import torch
from torch import Tensor

from mechinterp.core.tokens import TokenBatch
from mechinterp.core.trace import Read, Trace
from mechinterp.engine.backends.transformer_lens import BridgeBackend, check_weights, hook, ours, theirs
from mechinterp.errors import NeedsError, SiteError
from mechinterp.model.model import Model
from mechinterp.model.slices import PATTERN_KINDS
from mechinterp.sites import Site

_SCALED = {"resid_pre": "ln1", "resid_mid": "ln2"}
"""Residual streams whose norm's scale a cache holds beside them."""


def to_activation_cache(trace: Trace, model: Model, of: str = "clean") -> Any:
    """`Trace.to_activation_cache`."""
    from transformer_lens.ActivationCache import ActivationCache

    held: dict[str, Tensor] = {}
    for read in (read for read in trace.reads if read.of == of):
        site = read.site
        if read.reduce is not None or site != site.whole or site.per_query_head:
            how = "per query head" if site.per_query_head else "in part"
            raise NeedsError(
                f"an ActivationCache holds whole sites, and {site} was read {how}; read"
                f" {Site(site.kind, site.layer)} as it is, with all positions and heads"
            )
        value = trace[read]
        held[hook(site)] = theirs(site, value)
        if site.kind in _SCALED:
            held[f"blocks.{site.layer}.{_SCALED[site.kind]}.hook_scale"] = _scale(model, value)
        if site == Site("resid_post", model.dims.n_layers - 1):
            held["ln_final.hook_scale"] = _scale(model, value)
    backend = model.backend
    bridge = backend.bridge if isinstance(backend, BridgeBackend) else BridgeBackend.of(model).bridge
    check_weights(bridge)
    return ActivationCache(held, bridge, has_batch_dim=True)


def _scale(model: Model, resid: Tensor) -> Tensor:
    """Root mean square of a residual stream, by which a norm divides it."""
    return (resid.float().pow(2).mean(-1, keepdim=True) + model.norm_eps).sqrt().to(resid.dtype)


def from_activation_cache(cache: Any, tokens: Tensor | None = None, mask: Tensor | None = None) -> Trace:
    """`Trace.from_activation_cache`."""
    if not hasattr(cache, "cache_dict"):
        raise NeedsError(f"from_activation_cache takes a TransformerLens ActivationCache. Got {type(cache).__name__}")
    check_weights(cache.model)
    one = not cache.has_batch_dim
    run = cache.cache_dict.get("embed.hook_in")
    given = tokens if tokens is not None else run
    if given is None:
        raise NeedsError("this cache does not hold the token ids that it is of; give them as tokens=")
    ids = torch.as_tensor(given)
    ids = ids[None] if ids.ndim == 1 else ids
    if run is not None and ids.tolist() != run.reshape(-1, run.shape[-1]).tolist():
        raise NeedsError("tokens= are not those that this cache is of, which it holds; leave tokens= out")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else torch.as_tensor(mask).bool()
    real = real[None] if real.ndim == 1 else real
    if real.shape != ids.shape:
        raise NeedsError(
            f"the mask has shape {tuple(real.shape)}, and the token ids {tuple(ids.shape)}; give one of each"
        )
    batch = TokenBatch(ids, real.to(ids.device), rows=tuple(range(len(ids))))
    held: dict[Read, Tensor] = {}
    points: set[str] = set(getattr(cache.model, "hook_dict", ()))
    for name, value in cache.items():
        try:
            site = Site.parse(name)
        except SiteError:  # scales, rotary tables and the like are no sites
            continue
        experts = f"blocks.{site.layer}.mlp.gate.hook_expert_indices" in points
        if experts and site.kind in ("mlp_gate", "mlp_act"):  # there these are names of the MLP's input and output
            continue
        if Read(site) in held and name != site.tl_name:  # second names come second
            continue
        here = ours(site, value[None] if one else value, len(ids))
        if here.ndim != len(site.axes):  # copies for each head, which some flags of a bridge make
            continue
        if (here.shape[0], here.shape[-1 if site.kind in PATTERN_KINDS else 1]) != ids.shape:
            raise NeedsError(
                f"{name} in this cache has shape {tuple(value.shape)}, and its token ids {tuple(ids.shape)}; give those"
                " that were run, and a cache of all positions"
            )
        held[Read(site)] = here
    if not held:
        raise NeedsError(
            f"none of the {len(cache)} entries of this cache is a site; cache hooks such as hook_resid_post"
        )
    return Trace(held, batch)
