"""The table of model families: where each site lives in the module tree, and what the family has.

A family that is built like Llama is one row. `Architecture.place` turns a site into a module,
`check` says whether a model has the site, `audit` whether a model is built as its row says.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from mechinterp.errors import ModelError, SiteError
from mechinterp.sites import KINDS, Site

GUIDE = "docs/adding-a-family.md"


@dataclass(frozen=True)
class Architecture:
    """One family: its Hugging Face ``model_type``, its traits, and its module paths."""

    family: str
    qk_norm: bool = False
    """q and k are normed per head before rotary."""
    biases: frozenset[str] = frozenset()
    """Projections that have a bias in every model of the family; others may have one if the configuration says so."""
    windows: bool = False
    """Layers may see a sliding window only, where the configuration says so."""
    experts: bool = False
    """Layers may have a router and fused experts instead of a dense MLP."""
    base: str = "model"
    layers: str = "layers.{L}"
    embed: str = "embed_tokens"
    norm: str = "norm"
    unembed: str = "lm_head"
    """Or the classification head, in models that classify."""

    def layer(self, index: int) -> str:
        return f"{self.base}.{self.layers}".replace("{L}", str(index))

    def place(self, site: Site) -> "Place":
        """The module, and which end of it, that a site is read and written at."""
        if site.layer is None:
            path = {
                "embed": f"{self.base}.{self.embed}",
                "final_norm": f"{self.base}.{self.norm}",
                "logits": self.unembed,
            }
            return Place(path[site.kind], "out")
        layer = self.layer(site.layer)
        path, end = ("self_attn", "attention") if site.per_query_head else _PLACES[site.kind]
        return Place(f"{layer}.{path}" if path else layer, end)


End = Literal["in", "out", "attention"]


@dataclass(frozen=True)
class Place:
    """A module path and the end of it that carries the site."""

    path: str
    end: End


_PLACES: dict[str, tuple[str, End]] = {
    "resid_pre": ("", "in"),
    "attn_in": ("input_layernorm", "out"),
    "q": ("self_attn.q_proj", "out"),
    "k": ("self_attn.k_proj", "out"),
    "v": ("self_attn.v_proj", "out"),
    "q_normed": ("self_attn.q_norm", "out"),
    "k_normed": ("self_attn.k_norm", "out"),
    "q_rot": ("self_attn", "attention"),
    "k_rot": ("self_attn", "attention"),
    "scores": ("self_attn", "attention"),
    "pattern": ("self_attn", "attention"),
    "z": ("self_attn.o_proj", "in"),
    "head_out": ("self_attn.o_proj", "out"),
    "attn_out": ("self_attn", "out"),
    "resid_mid": ("post_attention_layernorm", "in"),
    "mlp_in": ("post_attention_layernorm", "out"),
    "mlp_gate": ("mlp.gate_proj", "out"),
    "mlp_up": ("mlp.up_proj", "out"),
    "mlp_act": ("mlp.down_proj", "in"),
    "router": ("mlp.gate", "out"),
    "mlp_out": ("mlp", "out"),
    "resid_post": ("", "out"),
}
_NEURONS = ("mlp_gate", "mlp_up", "mlp_act")
_INSIDE_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_INSIDE_LAYER = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}

FAMILIES: dict[str, Architecture] = {
    row.family: row
    for row in (
        Architecture("llama"),
        Architecture("mistral", windows=True),
        Architecture("qwen2", biases=frozenset({"q", "k", "v"}), windows=True),
        Architecture("qwen3", qk_norm=True, windows=True),
        Architecture("qwen3_moe", qk_norm=True, windows=True, experts=True),
    )
}
"""Every family that is wrapped, by Hugging Face ``model_type``."""


@dataclass(frozen=True)
class Dims:
    """Sizes of a model, from its Hugging Face configuration.

    Attributes:
        n_labels: outputs of a classification head; None for a language model.
        n_experts: 0 without experts.
        sparse: numbers of the layers that have experts.
        windows: for every layer, how many tokens a query sees, itself included; None for all.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_model: int
    d_mlp: int
    vocab: int
    context: int
    n_labels: int | None = None
    n_experts: int = 0
    sparse: frozenset[int] = frozenset()
    windows: tuple[int | None, ...] = ()

    @classmethod
    def of(cls, config: Any, arch: Architecture, classifies: bool = False) -> "Dims":
        heads, n = config.num_attention_heads, config.num_hidden_layers
        experts = (getattr(config, "num_experts", 0) or 0) if arch.experts else 0
        every, dense = getattr(config, "decoder_sparse_step", 1), getattr(config, "mlp_only_layers", None) or ()
        window = getattr(config, "sliding_window", None) if arch.windows else None
        types = getattr(config, "layer_types", None) or ["sliding_attention"] * n
        return cls(
            n,
            heads,
            getattr(config, "num_key_value_heads", None) or heads,
            getattr(config, "head_dim", None) or config.hidden_size // heads,
            config.hidden_size,
            config.intermediate_size,
            config.vocab_size,
            config.max_position_embeddings,
            config.num_labels if classifies else None,
            experts,
            frozenset(i for i in range(n) if experts and i not in dense and (i + 1) % every == 0),
            tuple(window if kind == "sliding_attention" else None for kind in types),
        )

    @property
    def n_outputs(self) -> int:
        """Width of the logits: the vocabulary, or the labels of a classifier."""
        return self.vocab if self.n_labels is None else self.n_labels

    def heads(self, kind: str) -> int | None:
        """How many heads a kind of site has here, or None when it has no head axis."""
        return {"head": self.n_heads, "kv_head": self.n_kv_heads, None: None}[KINDS[kind].head_axis]

    def width(self, site: Site) -> int:
        """Numbers in one token's slice of a site, of all the heads that it has."""
        sizes = {"d_model": self.d_model, "d_head": self.d_head, "d_mlp": self.d_mlp, "expert": self.n_experts}
        if site.neurons is not None:
            return 1 if isinstance(site.neurons, int) else len(site.neurons)
        count = (self.n_heads if site.per_query_head else self.heads(site.kind)) or 1
        heads = count if site.heads is None else 1 if isinstance(site.heads, int) else len(site.heads)
        return {**sizes, "vocab": self.n_outputs}[site.axes[-1]] * heads


def lacks(site: Site, arch: Architecture, dims: Dims) -> str | None:
    """Why a model has no such kind of site there, and what to use instead; None when it has."""
    if site.kind in ("q_normed", "k_normed") and not arch.qk_norm:
        return f"{arch.family} has no q/k-norm; use {site.kind[0]} or {site.kind[0]}_rot"
    if site.kind == "router" and site.layer not in dims.sparse:
        return "it is a dense MLP; use mlp_gate or mlp_out"
    if site.kind in _NEURONS and site.layer in dims.sparse:
        return f"the {dims.n_experts} experts are fused and have no neurons to hook; use router, mlp_in or mlp_out"
    return None


def check(site: Site, arch: Architecture, dims: Dims) -> None:
    """Raise unless this model has the site.

    Raises:
        SiteError: no such layer, head, or kind in this model.
    """
    if site.layer is not None and not 0 <= site.layer < dims.n_layers:
        raise SiteError(f"{site} does not exist: the model has layers 0 to {dims.n_layers - 1}")
    if reason := lacks(site, arch, dims):
        raise SiteError(f"{site} does not exist: {reason}")
    count = dims.n_heads if site.per_query_head else dims.heads(site.kind)
    for head in (site.heads,) if isinstance(site.heads, int) else site.heads or ():
        if count is not None and not 0 <= head < count:
            kind = "key/value heads" if site.axes[2] == "kv_head" else "heads"
            raise SiteError(f"{site} does not exist: layer {site.layer} has {kind} 0 to {count - 1}")
    for neuron in (site.neurons,) if isinstance(site.neurons, int) else site.neurons or ():
        if not 0 <= neuron < dims.d_mlp:
            raise SiteError(f"{site} does not exist: layer {site.layer} has neurons 0 to {dims.d_mlp - 1}")


def architecture(hf: nn.Module) -> Architecture:
    """The row for a Hugging Face model.

    Raises:
        ModelError: the family is not in the table; the message says how far it is from a row.
    """
    config: Any = hf.config
    family = getattr(config, "model_type", "unknown")
    if family in FAMILIES:
        return FAMILIES[family]
    known = f"models of type {family!r} are not in the architecture table, which has {', '.join(FAMILIES)}"
    normed = any(path.endswith("self_attn.q_norm") for path, _ in hf.named_modules())
    if differences := list(_differences(hf, Architecture(family, qk_norm=normed))):
        raise ModelError(
            f"{known}, and this one is not built like Llama: {'; '.join(differences)}. A row would need a"
            f" new trait or path for that; {GUIDE} says how to add one"
        )
    row = f"Architecture({family!r}{', qk_norm=True' if normed else ''})"
    raise ModelError(
        f"{known}; its modules have Llama's names, so FAMILIES[{family!r}] = {row} may do:"
        f" add it and run verify on the model, as {GUIDE} shows"
    )


def audit(hf: nn.Module, arch: Architecture, dims: Dims) -> None:
    """Raise unless the module tree and the configuration are what the row says.

    Raises:
        ModelError: a module is missing, or there is one that the row does not know; an unknown kind of attention.
    """
    config: Any = hf.config
    for layer, kind in enumerate(getattr(config, "layer_types", None) or ()):
        if kind not in ("full_attention", "sliding_attention"):
            raise ModelError(
                f"the configuration names the attention {kind!r} in layer {layer}; only 'full_attention' and"
                " 'sliding_attention' can be hooked here: check config.json, or use another model"
            )
    if differences := list(_differences(hf, arch, dims.sparse)):
        raise ModelError(
            f"{type(hf).__name__} is not built as the row of {arch.family!r} says: {'; '.join(differences)};"
            " load it with the transformers version that it was saved with, or wrap the original model"
        )


def _differences(hf: nn.Module, arch: Architecture, sparse: frozenset[int] = frozenset()) -> Iterable[str]:
    """What a Llama-shaped row with these traits would not find in a model, or not expect there."""
    tree = dict(hf.named_modules())
    if gone := [p for p in (f"{arch.base}.{arch.embed}", f"{arch.base}.{arch.norm}", arch.layer(0)) if p not in tree]:
        yield f"it lacks {', '.join(gone)}"
    stem = arch.layer(0).removesuffix("0")
    numbers = sorted({int(m[1]) for path in tree if (m := re.fullmatch(rf"{re.escape(stem)}(\d+)", path))})
    seen: dict[str, None] = {}
    for number in numbers:
        mlp = {"gate", "experts"} if number in sparse else {"gate_proj", "up_proj", "down_proj"}
        attention = _INSIDE_ATTENTION | ({"q_norm", "k_norm"} if arch.qk_norm else set())
        for inside, names in {"": _INSIDE_LAYER, "self_attn": attention, "mlp": mlp}.items():
            module = tree.get(f"{arch.layer(number)}.{inside}".rstrip("."))
            if module is None:
                continue
            # What has no weights is nobody's site (an activation, say).
            have = {name for name, child in module.named_children() if any(True for _ in child.parameters())}
            extra, lost = sorted(have - names), sorted(names - {name for name, _ in module.named_children()})
            lost += [
                f"a bias of {n}_proj" for n in sorted(arch.biases) if inside == "self_attn" and _unbiased(module, n)
            ]
            parts = [f"has {', '.join(extra)}"] * bool(extra) + [f"lacks {', '.join(lost)}"] * bool(lost)
            if parts:
                seen[f"layers.N{'.' * bool(inside)}{inside} {' and '.join(parts)}"] = None
    yield from seen


def _unbiased(attention: Any, name: str) -> bool:
    return getattr(getattr(attention, f"{name}_proj", None), "bias", None) is None
