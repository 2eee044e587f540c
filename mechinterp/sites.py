"""Sites: the names of the places in a Llama-shaped model that can be read or written.

A `Site` is one place: a kind, a layer, and optionally heads, positions or neurons. `Sites` is one kind at
several layers. The constructors at the end (`resid_post`, `z`, `pattern`, ...) make either one and
are what user code calls. Nothing here holds a tensor or imports torch.

Selections follow numpy: a single head, position or neuron drops its axis, a tuple keeps it, None keeps all.
"""

import difflib
import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from mechinterp.errors import SiteError

Position: TypeAlias = int | str
Positions: TypeAlias = Position | Sequence[Position] | None
Heads: TypeAlias = int | Sequence[int] | None
Layers: TypeAlias = int | Sequence[int] | None
Neurons: TypeAlias = int | Sequence[int] | None


@dataclass(frozen=True)
class Kind:
    """One row of the table of sites."""

    name: str
    axes: tuple[str, ...]
    tl: str | None = None
    """TransformerLens name, with ``{L}`` for the layer; None where it has none."""
    module: str | None = None
    """Path of the Hugging Face module whose output (or, marked ``<``, input) this is."""

    @property
    def layered(self) -> bool:
        return self.name not in ("embed", "final_norm", "logits")

    @property
    def head_axis(self) -> str | None:
        """``"head"``, ``"kv_head"``, or None when the site has no heads."""
        return next((axis for axis in self.axes if axis in ("head", "kv_head")), None)


def _kinds() -> dict[str, Kind]:
    layer, attn, mlp = "model.layers.{L}", "model.layers.{L}.self_attn", "model.layers.{L}.mlp"
    resid = ("batch", "pos", "d_model")
    head, kv = ("batch", "pos", "head", "d_head"), ("batch", "pos", "kv_head", "d_head")
    pairs, wide = ("batch", "head", "query", "key"), ("batch", "pos", "d_mlp")
    rows = [
        Kind("embed", resid, "hook_embed", "model.embed_tokens"),
        Kind("resid_pre", resid, "blocks.{L}.hook_resid_pre", f"<{layer}"),
        Kind("attn_in", resid, "blocks.{L}.ln1.hook_out", f"{layer}.input_layernorm"),
        Kind("q", head, "blocks.{L}.attn.hook_q", f"{attn}.q_proj"),
        Kind("q_normed", head, "blocks.{L}.attn.hook_q_normed", f"{attn}.q_norm"),
        Kind("k", kv, "blocks.{L}.attn.hook_k", f"{attn}.k_proj"),
        Kind("k_normed", kv, "blocks.{L}.attn.hook_k_normed", f"{attn}.k_norm"),
        Kind("v", kv, "blocks.{L}.attn.hook_v", f"{attn}.v_proj"),
        Kind("q_rot", head, "blocks.{L}.attn.hook_rot_q"),
        Kind("k_rot", kv, "blocks.{L}.attn.hook_rot_k"),
        Kind("scores", pairs, "blocks.{L}.attn.hook_attn_scores"),
        Kind("pattern", pairs, "blocks.{L}.attn.hook_pattern"),
        Kind("z", head, "blocks.{L}.attn.hook_z", f"<{attn}.o_proj"),
        Kind("head_out", ("batch", "pos", "head", "d_model"), "blocks.{L}.attn.hook_result"),
        Kind("attn_out", resid, "blocks.{L}.hook_attn_out", attn),
        Kind("resid_mid", resid, "blocks.{L}.hook_resid_mid", f"<{layer}.post_attention_layernorm"),
        Kind("mlp_in", resid, "blocks.{L}.ln2.hook_out", f"{layer}.post_attention_layernorm"),
        Kind("mlp_gate", wide, "blocks.{L}.mlp.hook_pre", f"{mlp}.gate_proj"),
        Kind("mlp_up", wide, "blocks.{L}.mlp.hook_pre_linear", f"{mlp}.up_proj"),
        Kind("mlp_act", wide, "blocks.{L}.mlp.hook_post", f"<{mlp}.down_proj"),
        Kind("router", ("batch", "pos", "expert"), None, f"{mlp}.gate"),
        Kind("mlp_out", resid, "blocks.{L}.hook_mlp_out", mlp),
        Kind("resid_post", resid, "blocks.{L}.hook_resid_post", layer),
        Kind("final_norm", resid, "ln_final.hook_out", "model.norm"),
        Kind("logits", ("batch", "pos", "vocab"), "unembed.hook_out", "lm_head"),
    ]
    return {kind.name: kind for kind in rows}


KINDS: dict[str, Kind] = _kinds()
"""Every kind of site, in the order in which a forward pass reaches them."""

_ALIASES = [
    ("embed", "embed.hook_out"),
    ("resid_pre", "blocks.{L}.hook_in"),
    ("attn_in", "blocks.{L}.attn.hook_in"),
    ("q", "blocks.{L}.attn.q.hook_out"),
    ("q_normed", "blocks.{L}.attn.q_norm.hook_out"),
    ("k", "blocks.{L}.attn.k.hook_out"),
    ("k_normed", "blocks.{L}.attn.k_norm.hook_out"),
    ("v", "blocks.{L}.attn.v.hook_out"),
    ("z", "blocks.{L}.attn.o.hook_in"),
    ("attn_out", "blocks.{L}.attn.o.hook_out"),
    ("attn_out", "blocks.{L}.attn.hook_out"),
    ("resid_mid", "blocks.{L}.ln2.hook_in"),
    ("mlp_in", "blocks.{L}.mlp.hook_in"),
    ("mlp_up", "blocks.{L}.mlp.in.hook_out"),
    ("mlp_act", "blocks.{L}.mlp.out.hook_in"),
    ("mlp_out", "blocks.{L}.mlp.out.hook_out"),
    ("mlp_out", "blocks.{L}.mlp.hook_out"),
    ("resid_post", "blocks.{L}.hook_out"),
    ("final_norm", "unembed.hook_in"),
    ("logits", "hook_unembed"),
]
"""Second names of TransformerLens 4, of places where a write there is a write at the site (but `resid_mid`'s, as its
first name). ``mlp.gate.hook_out`` is of two places, by the layer, and so of none.
"""

_ORDER = {name: i for i, name in enumerate(KINDS)}
_TEXT = re.compile(
    r"(?P<kind>[a-z_]+)(\.(?P<layer>\d+))?(\.h(?P<heads>\d+(,\d+)*))?(\.n(?P<neurons>\d+(,\d+)*))?"
    r"(@(?P<positions>[^@]+))?"
)


@dataclass(frozen=True)
class Site:
    """The name of one place in the model.

    ``str(site)`` is its short form, ``z.10.h3@end``, which `Site.parse` reads back (but for
    `per_query_head`, and tuples of one, which it reads as that one).
    """

    kind: str
    layer: int | None = None
    heads: int | tuple[int, ...] | None = None
    positions: Position | tuple[Position, ...] | None = None
    per_query_head: bool = False
    """k and v only: the view repeated for each query head of its group."""
    neurons: int | tuple[int, ...] | None = None
    """mlp_gate, mlp_up and mlp_act only."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise SiteError(_miss(self.kind))
        if self.spec.layered == (self.layer is None):
            raise SiteError(
                f"{self.kind} {'needs a layer' if self.spec.layered else 'has no layer'};"
                f" write sites.{self.kind}({'LAYER' if self.spec.layered else ''})"
            )
        if self.heads is not None and self.spec.head_axis is None:
            raise SiteError(f"{self.kind} has no head axis; its axes are {' '.join(self.axes)}")
        if self.neurons is not None and "d_mlp" not in self.axes:
            raise SiteError(f"{self.kind} has no neurons; its axes are {' '.join(self.axes)}")
        if self.per_query_head and self.spec.head_axis != "kv_head":
            raise SiteError(f"per_query_head is for k and v; {self.kind} has one per query head already")
        object.__setattr__(self, "positions", _positions(self.positions))
        object.__setattr__(self, "heads", _numbers(self.heads))
        object.__setattr__(self, "layer", _numbers(self.layer))
        object.__setattr__(self, "neurons", _numbers(self.neurons))

    @property
    def spec(self) -> Kind:
        return KINDS[self.kind]

    @property
    def axes(self) -> tuple[str, ...]:
        """Axes of the whole site, before heads and positions are selected."""
        axes = self.spec.axes
        return tuple("head" if a == "kv_head" else a for a in axes) if self.per_query_head else axes

    @property
    def tl_name(self) -> str | None:
        """The name of this place in TransformerLens, or None where it has no name there."""
        return None if self.spec.tl is None else self.spec.tl.replace("{L}", str(self.layer))

    @property
    def whole(self) -> "Site":
        """The same place with all heads, positions and neurons."""
        return Site(self.kind, self.layer, per_query_head=self.per_query_head)

    @property
    def of_kv_head(self) -> "Site":
        """The same place without the view per query head."""
        return replace(self, heads=None, per_query_head=False)

    @property
    def order(self) -> tuple[int, int]:
        """Sort key: when a forward pass reaches this place."""
        last = {"embed": -1, "final_norm": 1 << 30, "logits": 1 << 30}
        # What is repeated for each query head exists only inside attention.
        kind = "k_rot" if self.per_query_head else self.kind
        return (last.get(self.kind, self.layer or 0), _ORDER[kind])

    def at(self, positions: Positions) -> "Site":
        """The same place and heads at other positions."""
        return replace(self, positions=_positions(positions))

    def __str__(self) -> str:
        where = self.positions if isinstance(self.positions, tuple) else (self.positions,)
        return (
            self.kind
            + ("" if self.layer is None else f".{self.layer}")
            + _listed("h", self.heads)
            + _listed("n", self.neurons)
            + ("" if self.positions is None else f"@{','.join(map(str, where))}")
        )

    @classmethod
    def parse(cls, text: str) -> "Site":
        """The site that `text` names: short form, TransformerLens name, or Hugging Face module path.

        Raises:
            SiteError: nothing has that name; the message lists the nearest ones.
        """
        site = next((found for form in (_short, _tl, _module) if (found := form(text)) is not None), None)
        if site is None:
            raise SiteError(_miss(text))
        return site


@dataclass(frozen=True)
class Sites:
    """One kind at several layers; ``layers=None`` is every layer of whatever model it meets."""

    kind: str
    layers: tuple[int, ...] | None = None
    heads: int | tuple[int, ...] | None = None
    positions: Position | tuple[Position, ...] | None = None
    per_query_head: bool = False
    neurons: int | tuple[int, ...] | None = None

    def of(self, n_layers: int) -> tuple[Site, ...]:
        """The single sites, for a model of `n_layers` layers."""
        layers = range(n_layers) if self.layers is None else self.layers
        return tuple(Site(self.kind, i, self.heads, self.positions, self.per_query_head, self.neurons) for i in layers)


def resolve(wanted: "Site | Sites | str | Iterable[Site | Sites | str]", n_layers: int) -> tuple[Site, ...]:
    """Whatever a user may write for sites, as single sites in the order given."""
    if isinstance(wanted, Site):
        return (wanted,)
    if isinstance(wanted, Sites):
        return wanted.of(n_layers)
    if isinstance(wanted, str):
        layered = wanted in KINDS and KINDS[wanted].layered
        return Sites(wanted).of(n_layers) if layered else (Site.parse(wanted),)
    return tuple(site for one in wanted for site in resolve(one, n_layers))


def _positions(positions: Positions) -> Position | tuple[Position, ...] | None:
    if positions is None or positions == "all":
        return None
    if isinstance(positions, str):
        return positions
    many: Any = positions
    try:
        return operator.index(many)
    except TypeError:
        return tuple(p if isinstance(p, str) else operator.index(p) for p in many)


def _listed(letter: str, numbers: int | tuple[int, ...] | None) -> str:
    """``.h1,2``; nothing where there is no choice."""
    if numbers is None:
        return ""
    return f".{letter}{','.join(map(str, (numbers,) if isinstance(numbers, int) else numbers))}"


def _short(text: str) -> Site | None:
    match = _TEXT.fullmatch(text)
    if match is None or match["kind"] not in KINDS:
        return None
    heads, neurons = (
        tuple(int(n) for n in match[name].split(",")) if match[name] else None for name in ("heads", "neurons")
    )
    names = match["positions"].split(",") if match["positions"] else []
    where = tuple(int(p) if p.lstrip("-").isdigit() else p for p in names)
    return Site(
        match["kind"],
        int(match["layer"]) if match["layer"] else None,
        heads[0] if heads and len(heads) == 1 else heads,
        None if not where else where[0] if len(where) == 1 else where,
        neurons=neurons[0] if neurons and len(neurons) == 1 else neurons,
    )


def _named(text: str, names: Iterable[tuple[str, str | None]]) -> Site | None:
    for kind, template in names:
        if template is not None:
            pattern = re.escape(template).replace(r"\{L\}", r"(\d+)")
            if match := re.fullmatch(pattern, text):
                return Site(kind, int(match[1]) if match.groups() else None)
    return None


def _tl(text: str) -> Site | None:
    return _named(text, [*((kind.name, kind.tl) for kind in KINDS.values()), *_ALIASES])


def _module(text: str) -> Site | None:
    """A module path names the module's output, as a forward hook there would see it."""
    outputs = [(k.name, k.module) for k in KINDS.values() if k.module and not k.module.startswith("<")]
    same = [("attn_out", "model.layers.{L}.self_attn.o_proj"), ("mlp_out", "model.layers.{L}.mlp.down_proj")]
    return _named(text, outputs + same)


def _miss(text: str) -> str:
    stem = re.split(r"[.@\[]", text)[0]
    known = [*KINDS, *(k.tl for k in KINDS.values() if k.tl), *(k.module for k in KINDS.values() if k.module)]
    masked = re.sub(r"(?<=\.)\d+(?=\.|$)", "{L}", text)
    near = difflib.get_close_matches(masked, known, 3, 0.6) or difflib.get_close_matches(stem, KINDS, 3, 0.4)
    hint = " or ".join(name.lstrip("<") for name in near) or ", ".join(KINDS)
    what = "No site stands for the hook" if re.search(r"(^|\.)hook_", text) else "There is no site named"
    return f"{what} {text!r}; did you mean {hint}?"


def _make(
    kind: str,
    layers: Layers,
    positions: Positions,
    heads: Heads = None,
    per_query_head: bool = False,
    neurons: Neurons = None,
) -> Site | Sites:
    where, chosen, at = _positions(positions), _numbers(heads), _numbers(layers)
    some = _numbers(neurons)
    if isinstance(at, int):
        return Site(kind, at, chosen, where, per_query_head, some)
    return Sites(kind, at, chosen, where, per_query_head, some)


def _numbers(value: Any) -> int | tuple[int, ...] | None:
    """One number, several, or None; numpy's numbers are as good as Python's."""
    if value is None:
        return None
    try:
        return operator.index(value)
    except TypeError:
        return tuple(operator.index(v) for v in value)


# The constructors, in the order of a forward pass. `layers`: one number makes a Site; several, or
# None for all, make Sites. `positions`: numbers, "end", "all", or names that the examples define.


def embed(*, positions: Positions = None) -> Site:
    """Token embeddings, ``batch pos d_model``."""
    return Site("embed", positions=_positions(positions))


def resid_pre(layers: Layers = None, *, positions: Positions = None) -> Site | Sites:
    """Residual stream entering the layer, ``batch pos d_model``."""
    return _make("resid_pre", layers, positions)


def attn_in(layers: Layers = None, *, positions: Positions = None) -> Site | Sites:
    """Input of attention, after the norm and its weight, ``batch pos d_model``."""
    return _make("attn_in", layers, positions)


def q(layers: Layers = None, *, heads: Heads = None, positions: Positions = None) -> Site | Sites:
    """Queries as projected, before q/k-norm and rotary, ``batch pos head d_head``."""
    return _make("q", layers, positions, heads)


def k(
    layers: Layers = None, *, heads: Heads = None, positions: Positions = None, per_query_head: bool = False
) -> Site | Sites:
    """Keys as projected, before q/k-norm and rotary, ``batch pos kv_head d_head``."""
    return _make("k", layers, positions, heads, per_query_head)


def v(
    layers: Layers = None, *, heads: Heads = None, positions: Positions = None, per_query_head: bool = False
) -> Site | Sites:
    """Values as projected, ``batch pos kv_head d_head``."""
    return _make("v", layers, positions, heads, per_query_head)


def q_normed(layers: Layers = None, *, heads: Heads = None, positions: Positions = None) -> Site | Sites:
    """Queries after q-norm (Qwen3 only), ``batch pos head d_head``."""
    return _make("q_normed", layers, positions, heads)


def k_normed(
    layers: Layers = None, *, heads: Heads = None, positions: Positions = None, per_query_head: bool = False
) -> Site | Sites:
    """Keys after k-norm (Qwen3 only), ``batch pos kv_head d_head``."""
    return _make("k_normed", layers, positions, heads, per_query_head)


def q_rot(layers: Layers = None, *, heads: Heads = None, positions: Positions = None) -> Site | Sites:
    """Queries after rotary, ``batch pos head d_head``."""
    return _make("q_rot", layers, positions, heads)


def k_rot(
    layers: Layers = None, *, heads: Heads = None, positions: Positions = None, per_query_head: bool = False
) -> Site | Sites:
    """Keys after rotary, ``batch pos kv_head d_head``."""
    return _make("k_rot", layers, positions, heads, per_query_head)


def scores(layers: Layers = None, *, heads: Heads = None, positions: Positions = None) -> Site | Sites:
    """Attention scores, scaled and masked, ``batch head query key``; positions select queries."""
    return _make("scores", layers, positions, heads)


def pattern(layers: Layers = None, *, heads: Heads = None, positions: Positions = None) -> Site | Sites:
    """Attention probabilities, ``batch head query key``; positions select queries."""
    return _make("pattern", layers, positions, heads)


def z(layers: Layers = None, *, heads: Heads = None, positions: Positions = None) -> Site | Sites:
    """Values mixed by the pattern, before W_O, ``batch pos head d_head``."""
    return _make("z", layers, positions, heads)


def head_out(layers: Layers = None, *, heads: Heads = None, positions: Positions = None) -> Site | Sites:
    """Each head's write to the residual stream, z through its slice of W_O, ``batch pos head d_model``."""
    return _make("head_out", layers, positions, heads)


def attn_out(layers: Layers = None, *, positions: Positions = None) -> Site | Sites:
    """Output of attention, ``batch pos d_model``."""
    return _make("attn_out", layers, positions)


def resid_mid(layers: Layers = None, *, positions: Positions = None) -> Site | Sites:
    """Residual stream between attention and MLP, ``batch pos d_model``."""
    return _make("resid_mid", layers, positions)


def mlp_in(layers: Layers = None, *, positions: Positions = None) -> Site | Sites:
    """Input of the MLP, after the norm and its weight, ``batch pos d_model``."""
    return _make("mlp_in", layers, positions)


def mlp_gate(layers: Layers = None, *, positions: Positions = None, neurons: Neurons = None) -> Site | Sites:
    """Gate projection before the activation, ``batch pos d_mlp``."""
    return _make("mlp_gate", layers, positions, neurons=neurons)


def mlp_up(layers: Layers = None, *, positions: Positions = None, neurons: Neurons = None) -> Site | Sites:
    """Up projection, ``batch pos d_mlp``."""
    return _make("mlp_up", layers, positions, neurons=neurons)


def mlp_act(layers: Layers = None, *, positions: Positions = None, neurons: Neurons = None) -> Site | Sites:
    """Neuron activations, act(gate) * up, ``batch pos d_mlp``."""
    return _make("mlp_act", layers, positions, neurons=neurons)


def router(layers: Layers = None, *, positions: Positions = None) -> Site | Sites:
    """Router logits of a mixture of experts, ``batch pos expert``."""
    return _make("router", layers, positions)


def mlp_out(layers: Layers = None, *, positions: Positions = None) -> Site | Sites:
    """Output of the MLP, ``batch pos d_model``."""
    return _make("mlp_out", layers, positions)


def resid_post(layers: Layers = None, *, positions: Positions = None) -> Site | Sites:
    """Residual stream leaving the layer, ``batch pos d_model``."""
    return _make("resid_post", layers, positions)


def final_norm(*, positions: Positions = None) -> Site:
    """Output of the final norm, ``batch pos d_model``."""
    return Site("final_norm", positions=_positions(positions))


def logits(*, positions: Positions = None) -> Site:
    """Logits over the vocabulary, ``batch pos vocab``."""
    return Site("logits", positions=_positions(positions))
