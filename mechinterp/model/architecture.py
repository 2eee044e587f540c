"""The table of model families: where each site lives in the module tree, and what the family has.

A family that is built like Llama is one row. `Architecture.place` turns a site into a module.
"""

from dataclasses import dataclass
from typing import Any, Literal

from mechinterp.errors import ModelError, SiteError
from mechinterp.sites import KINDS, Site


@dataclass(frozen=True)
class Architecture:
    """One family: its Hugging Face ``model_type``, its traits, and its module paths."""

    family: str
    qk_norm: bool = False
    """q and k are normed per head before rotary."""
    base: str = "model"
    layers: str = "layers.{L}"
    embed: str = "embed_tokens"
    norm: str = "norm"
    unembed: str = "lm_head"

    def layer(self, index: int) -> str:
        return f"{self.base}.{self.layers}".replace("{L}", str(index))

    def place(self, site: Site) -> "Place":
        """The module, and which end of it, that a site is read and written at.

        Raises:
            SiteError: the family has no such site.
        """
        if site.kind in ("q_normed", "k_normed") and not self.qk_norm:
            raise SiteError(
                f"{site} does not exist: {self.family} has no q/k-norm; use {site.kind[0]} or {site.kind[0]}_rot"
            )
        if site.kind == "router":
            raise SiteError(f"{site} does not exist: {self.family} has dense MLPs; use mlp_gate or mlp_out")
        if site.layer is None:
            path = {
                "embed": f"{self.base}.{self.embed}",
                "final_norm": f"{self.base}.{self.norm}",
                "logits": self.unembed,
            }
            return Place(path[site.kind], "out")
        layer = self.layer(site.layer)
        path, end = _PLACES[site.kind]
        return Place(f"{layer}.{path}" if path else layer, end)


@dataclass(frozen=True)
class Place:
    """A module path and the end of it that carries the site."""

    path: str
    end: Literal["in", "out", "attention"]


_PLACES: dict[str, tuple[str, Literal["in", "out", "attention"]]] = {
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
    "mlp_out": ("mlp", "out"),
    "resid_post": ("", "out"),
}

FAMILIES: dict[str, Architecture] = {
    row.family: row for row in (Architecture("llama"), Architecture("qwen3", qk_norm=True))
}
"""Every family that is wrapped, by Hugging Face ``model_type``."""


@dataclass(frozen=True)
class Dims:
    """Sizes of a model."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_model: int
    d_mlp: int
    vocab: int
    context: int

    @classmethod
    def of(cls, config: Any) -> "Dims":
        """Read from a Hugging Face configuration."""
        heads = config.num_attention_heads
        return cls(
            config.num_hidden_layers,
            heads,
            getattr(config, "num_key_value_heads", None) or heads,
            getattr(config, "head_dim", None) or config.hidden_size // heads,
            config.hidden_size,
            config.intermediate_size,
            config.vocab_size,
            config.max_position_embeddings,
        )

    def heads(self, kind: str) -> int | None:
        """How many heads a kind of site has here, or None when it has no head axis."""
        return {"head": self.n_heads, "kv_head": self.n_kv_heads, None: None}[KINDS[kind].head_axis]


def architecture(config: Any) -> Architecture:
    """The row for a Hugging Face configuration.

    Raises:
        ModelError: the family is not in the table.
    """
    family = getattr(config, "model_type", "unknown")
    if family not in FAMILIES:
        raise ModelError(
            f"models of type {family!r} are not in the architecture table, which has {', '.join(FAMILIES)};"
            " a Llama-shaped family needs one row in mechinterp/model/architecture.py"
        )
    return FAMILIES[family]
