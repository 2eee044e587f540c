"""The same needs, answered by another library: TransformerLens, or nnsight.

Each has its own room here and its own hooks; what is wanted at a place is in `visits`, for all of them.
"""

import copy
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mechinterp.errors import HookError, ModelError
from mechinterp.model.backend import NATIVE, Backend
from mechinterp.model.hooks import in_force
from mechinterp.model.model import Model

NAMES = (NATIVE, "transformer_lens", "nnsight")


def check_name(name: str) -> None:
    """Raise a ModelError unless there is such a backend."""
    if name not in NAMES:
        raise ModelError(f"The backend must be one of {', '.join(map(repr, NAMES))}. Got {name!r}")


def connect(model: Model, name: str) -> Backend | None:
    """A library's own model around the same weights; None for the native engine.

    Raises:
        ModelError: there is no such backend, or it cannot run this model.
    """
    check_name(name)
    if model.remote:
        raise ModelError(
            f"{model.name} runs on NDIF, and its weights are not here; load it without remote=True to run it by {name}"
        )
    if name == NATIVE:
        return None
    if model.peft is not None:
        raise ModelError(
            f"{model.name} has an adapter, which {name} would not see switched on and off; use the native backend, or"
            " merge the adapter into the weights (PEFT's merge_and_unload) and wrap the result"
        )
    if name == "nnsight":
        from mechinterp.engine.backends.nnsight import NNsightBackend

        return NNsightBackend.of(model)
    from mechinterp.engine.backends.transformer_lens import BridgeBackend

    return BridgeBackend.of(model)


def remotely(name: Any, backend: str, remote: bool | str, options: Mapping[str, Any], **others: Any) -> Model:
    """A model that NDIF runs, by nnsight.

    Args:
        options: what its configuration and tokenizer are loaded with.
        others: what only weights that are here can take.
    Raises:
        ModelError: another backend or option, no key, no answer, or no such model.
    """
    if backend != "nnsight":
        raise ModelError(f"remote=True is nnsight's, so it takes backend='nnsight'. Got {backend!r}")
    given = options if not isinstance(name, str | os.PathLike) else {}
    if odd := [option for option, value in (*others.items(), *given.items()) if value]:
        raise ModelError(
            f"{', '.join(odd)} cannot be applied to a model that NDIF holds{' and nnsight made' * bool(given)};"
            " leave it out, or load the model without remote=True"
        )
    from mechinterp.engine.backends.remote import load_remote

    return load_remote(str(name) if isinstance(name, os.PathLike) else name, remote, **options)


@dataclass(frozen=True)
class Existing:
    """A library's model that a user has made: the Hugging Face model in it, and how it is run."""

    hf: Any
    tokenizer: Any
    backend: Callable[[Model], Backend]


def existing(thing: Any) -> Existing | None:
    """What a TransformerBridge or a model of nnsight holds; None for anything else.

    Raises:
        ModelError: one that cannot be used as it is.
    """
    kinds = {(cls.__module__.split(".")[0], cls.__name__) for cls in type(thing).__mro__}
    if ("transformer_lens", "TransformerBridge") in kinds:
        from mechinterp.engine.backends.transformer_lens import BridgeBackend, bare

        return Existing(bare(thing), thing.tokenizer, lambda model: BridgeBackend(thing, model))
    if ("nnsight", "Envoy") in kinds:
        from mechinterp.engine.backends.nnsight import NNsightBackend, module

        return Existing(module(thing), getattr(thing, "tokenizer", None), lambda model: NNsightBackend(thing, model))
    return None


def sharing(model: Model) -> Any:
    """A second tree of modules around the very same weights, for a library that puts its own modules in.

    Raises:
        HookError: an `intervene` block is in force, whose hooks would be copied.
    """
    if written := in_force(model.hf, model.arch.base)[0]:
        raise HookError(
            f"a block writes at {written[0][0]} of this model; leave it before another library takes it over"
        )
    shared: list[Any] = list(model.hf.parameters())
    for module in model.hf.modules():  # hooks of the user's are called there, too, and not copies of their objects
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            shared += getattr(module, name).values()
    return copy.deepcopy(model.hf, {id(one): one for one in shared})
