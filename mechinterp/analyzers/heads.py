"""Head roles: previous-token, local, first-token, duplicate-token, induction and copying heads, with nulls."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor

from mechinterp import sites
from mechinterp.analyzers.weight_roles import Array, copying, previous_by_rotary
from mechinterp.core.analyzer import Analyzer, Batch, Context, Model, Needs, Own
from mechinterp.core.result import Part, Result, View
from mechinterp.core.statistics import fdr, summarize
from mechinterp.core.tokens import TokenBatch
from mechinterp.core.trace import Read, Reduce
from mechinterp.tasks.induction import induction

ROLES = ("previous", "local", "first", "duplicate", "induction")
"""Those that a pattern shows; ``copying`` is one that weights show."""
COPYING = 0.5
"""Effect floor of the copying score, which has no share of attention to be measured by."""
THIRDS = ("early", "middle", "late")
LOCAL = 4
QUERIES_AT_ONCE = 512
RANDOM_ROLES = ("previous", "duplicate", "induction")

_NUMBERS = ("score", "null", "ci_low", "ci_high", "p")
_Scores: TypeAlias = tuple[str, str, Array, Array]
"""Text, role, score ``example layer head``, null alike."""


@dataclass(frozen=True)
class HeadRoles(Analyzer):
    """Which heads attend by position or by matching tokens (Olsson et al. 2022; Wang et al. 2023).

    A head's score for a role is the share of a query's attention on the role's keys, averaged over
    the queries that have such a key: the previous token; the four before the query (``local``,
    without the first token); the first token of the text (a common sink); an earlier token equal to
    the query (``duplicate``); the token after such a one (``induction``).

    On the user's text (``prompts``) the null is the expected score after shuffling each query's attention over the
    tokens it sees. On repeated random tokens (``random``, a second, declared pass) the null for duplicate and
    induction is the same head at the same offset on text without the repetition; for previous it is
    the shuffle. p is a sign-flip test of score - null over examples, and q is over all of layers × heads ×
    roles × texts. A head is ``specialised`` when it exceeds its null by `floor` and q < .05.

    By ``weights`` alone, without any text: ``copying``, the sign of the eigenvalues from token to logit, whose floor
    is 0.5; and ``previous``, the attention that rotary alone would give to the previous token. The functions
    `copying` and `previous_by_rotary` say how, and with what nulls; their q is over layers × heads × these two.

    Result (``text role layer head``): ``score``, ``null``, ``ci_low``, ``ci_high`` (of the score),
    ``p``, ``q``, ``specialised``. A role that no query of a text has, or that a text does not show, is NaN.
    For early, middle and late layers (``text role third``): ``mean_score``, and in ``heads`` how many are specialised.

    Attributes:
        sequences, length: repeated random tokens: how many sequences, and tokens in one half; 0
            sequences leaves this pass out.
        floor: least share of attention above the null.
        seed: of the random tokens, and of the null of rotary.
        weights: whether to look at the weights, too.
    """

    sequences: int = 16
    length: int = 24
    floor: float = 0.1
    seed: int = 0
    weights: bool = True

    def needs(self, model: Model) -> Needs:
        on: dict[str, Own] = {}
        if self.sequences:
            examples = induction(model, self.sequences, self.length, self.seed, control=True)
            offsets = OffsetMass(self.length, int(examples.spans["first"][0][0]))
            on["random tokens"] = Own(examples, Read(sites.pattern(), reduce=Reduce(offsets, "example role head")))
        return Needs(reads=Read(sites.pattern(), reduce=Reduce(role_mass, "example role head")), on=on)

    def observe(self, batch: Batch) -> Part:
        mass = batch.clean.stack("pattern")  # layer example role head, summed over queries
        count, expected = role_counts(batch.examples)
        return Part(
            {
                "score": (mass / count.to(mass)[None, :, :, None], "layer example role head"),
                "null": (expected / count, "example role"),
            },
            coords={"role": ROLES},
        )

    def combine(self, parts: Iterator[Part], context: Context) -> Result:
        layers, heads = context.model.dims.n_layers, context.model.dims.n_heads
        found: dict[tuple[str, str], Mapping[str, Array]] = {}
        for text, role, score, null in [*self._prompts(list(parts), context), *self._random(context)]:
            here, above = summarize(score, context.seed), summarize(score - null, context.seed)
            with np.errstate(invalid="ignore"):
                mean_null = np.broadcast_to(np.nanmean(null, 0) if np.isfinite(null).any() else np.nan, (layers, heads))
            found[text, role] = {
                "score": here.mean,
                "null": mean_null,
                "ci_low": here.ci_low,
                "ci_high": here.ci_high,
                "p": above.p,
            }
        found |= self._weights(context.model)
        texts = list(dict.fromkeys(text for text, _ in found))
        roles = list(dict.fromkeys([*ROLES, *(role for _, role in found)]))
        arrays = {n: np.full((len(texts), len(roles), layers, heads), np.nan) for n in _NUMBERS}
        for (text, role), values in found.items():
            for name, value in values.items():
                arrays[name][texts.index(text), roles.index(role)] = value
        by_weights = np.array([text == "weights" for text in texts])
        arrays["q"] = np.full_like(arrays["p"], np.nan)
        for family in (by_weights, ~by_weights):
            arrays["q"][family] = fdr(arrays["p"][family])
        floor = np.array([COPYING if role == "copying" else self.floor for role in roles])[:, None, None]
        special = (arrays["score"] - arrays["null"] >= floor) & (arrays["q"] < 0.05)
        dims = ("text", "role", "layer", "head")
        part = {name: (dims, value.astype(np.float32)) for name, value in arrays.items()}
        coords = {"text": texts, "role": roles, "layer": np.arange(layers), "head": np.arange(heads)}
        data = xr.Dataset({**part, "specialised": (dims, special)}, coords, {"unit": "share of attention"})
        shown = [t for t in _SHOWN if t[0] in texts and data["score"].sel(text=t[0], role=t[1]).notnull().any()]
        return Result(
            data.merge(_by_third(data)), {"floor": self.floor}, tuple(_view(text, role) for text, role in shown)
        )

    def _weights(self, model: Model) -> Mapping[tuple[str, str], Mapping[str, Array]]:
        if not self.weights:
            return {}
        tests = 2 * model.dims.n_layers * model.dims.n_heads
        score, null, p = previous_by_rotary(model, 2 * self.length, tests, self.seed)
        copies, p_copies = copying(model)
        nothing = np.where(np.isfinite(copies), 0.0, np.nan)
        return {
            ("weights", "previous"): {"score": score, "null": null, "p": p},
            ("weights", "copying"): {"score": copies, "null": nothing, "p": p_copies},
        }

    def _prompts(self, parts: list[Part], context: Context) -> list[_Scores]:
        """Every role on the user's text."""
        if not parts:
            return []
        data = Result.of(parts).data.transpose("example", "role", "layer", "head")
        score, null = data["score"].values, data["null"].values[:, :, None, None]
        return [("prompts", role, score[:, i], null[:, i]) for i, role in enumerate(ROLES)]

    def _random(self, context: Context) -> list[_Scores]:
        if "random tokens" not in context.own:
            return []
        n, half = self.sequences, self.length
        mass = context.own["random tokens"].stack("pattern").permute(1, 2, 0, 3).float().cpu().numpy()
        # Mean over the queries: all but the first for previous, the second half for the others.
        start = context.own["random tokens"].batch.spans["first"][0][0]
        width = start + 2 * half
        shuffled = np.mean(1 / np.arange(2, width + 1))
        previous = mass[:n, 0] / (width - 1)
        out: list[_Scores] = [("random", "previous", previous, np.full_like(previous, shuffled))]
        for i, role in enumerate(RANDOM_ROLES[1:], 1):
            out.append(("random", role, mass[:n, i] / half, mass[n:, i] / half))
        return out


def role_keys(batch: TokenBatch, queries: slice) -> Bool[Tensor, "example role query key"]:
    """Which keys count for each role of `ROLES`, for a slice of query columns."""
    ids, real = batch.ids, batch.mask
    column = torch.arange(ids.shape[1], device=ids.device)
    q, k = column[queries, None], column
    start = batch.starts[:, None, None]
    seen = (real[:, queries, None] & real[:, None, :]) & (k <= q)
    same = (ids[:, queries, None] == ids[:, None, :]) & (k < q)
    after = torch.zeros_like(same)
    after[:, :, 1:] = (same & real[:, None, :])[:, :, :-1]
    past_first = (q > start) & (k > start)
    roles = [
        (k == q - 1).expand_as(seen),
        (k >= q - LOCAL) & (k < q) & past_first,
        (k == start) & (q > start),
        same,
        after,
    ]
    return torch.stack([seen & role for role in roles], 1)


def role_counts(batch: TokenBatch) -> tuple[Float[Tensor, "example role"], Float[Tensor, "example role"]]:
    """How many queries have a key for each role, and the attention on such keys if each query's were shuffled."""
    visible = batch.mask.cumsum(1).clamp(min=1)[:, None]  # how many keys each query sees
    width = batch.ids.shape[1]
    count = expected = torch.zeros(len(batch), len(ROLES), device=batch.ids.device)
    for start in range(0, width, QUERIES_AT_ONCE):
        queries = slice(start, min(start + QUERIES_AT_ONCE, width))
        keys = role_keys(batch, queries).sum(-1)
        count = count + (keys > 0).sum(-1)
        expected = expected + (keys / visible[:, :, queries]).sum(-1)
    return count, expected


def role_mass(block: Float[Tensor, "example head query key"], queries: slice, batch: TokenBatch) -> Tensor:
    """Attention on each role's keys (`role_keys`), summed over a block of queries, ``example role head``.

    Roles by position are diagonals and a column of the block; only matching tokens need a mask.
    """
    start, real = batch.starts[:, None], batch.mask[:, queries]
    query = torch.arange(queries.start, queries.stop, device=block.device)
    at_first = block.take_along_dim(start[:, :, None, None].expand(*block.shape[:3], 1), 3)[..., 0]
    first = (at_first * (real & (query > start))[:, None]).sum(-1)
    local = torch.stack([at_offset(block, queries, batch, offset, 1) for offset in range(1, LOCAL + 1)]).sum(0)
    same = batch.ids[:, queries, None] == batch.ids[:, None, :]
    same &= (torch.arange(block.shape[-1], device=block.device) < query[:, None]) & batch.mask[:, None, :]
    matches = torch.zeros(len(batch), 2, *same.shape[1:], dtype=block.dtype, device=block.device)
    matches[:, 0], matches[:, 1, :, 1:] = same, same[:, :, :-1]
    matches *= real[:, None, :, None]
    by_match = matches.flatten(2) @ block.flatten(2).transpose(1, 2)
    return torch.cat([torch.stack([at_offset(block, queries, batch, 1), local, first], 1), by_match], 1)


def at_offset(
    block: Float[Tensor, "example head query key"], queries: slice, batch: TokenBatch, offset: int, past: int = 0
) -> Float[Tensor, "example head"]:
    """Attention on the key `offset` before each query, where that is `past` the first token, summed over queries."""
    query = torch.arange(queries.start, queries.stop, device=block.device)
    key = query - offset
    seen = batch.mask[:, queries] & (key >= batch.starts[:, None] + past)
    return (block[:, :, torch.arange(len(query), device=block.device), key.clamp(min=0)] * seen[:, None]).sum(-1)


@dataclass(frozen=True)
class OffsetMass:
    """Attention at the offsets that previous, duplicate and induction heads have on text said twice.

    Offsets rather than token equality, so that the control text is scored at the same places.
    """

    length: int
    start: int

    def __call__(self, block: Float[Tensor, "example head query key"], queries: slice, batch: TokenBatch) -> Tensor:
        """``example role head`` for `RANDOM_ROLES`, summed over a block of queries."""
        column = torch.arange(block.shape[-1], device=block.device)
        q = column[queries, None]
        second = q >= self.start + self.length
        roles = [column == q - 1, (column == q - self.length) & second, (column == q - self.length + 1) & second]
        keys = torch.stack([r.expand(block.shape[2], -1) for r in roles]).to(block.dtype)
        return torch.einsum("bhqk,rqk->brh", block, keys)


def _by_third(data: xr.Dataset) -> xr.Dataset:
    """Early, middle and late layers: the mean score, and how many heads are specialised."""
    layers = data.sizes["layer"]
    third = np.arange(layers) * len(THIRDS) // layers
    flat = data[["score", "specialised"]].stack(cell=("layer", "head"), create_index=False)
    kept = [flat.isel(cell=np.repeat(third == i, data.sizes["head"])) for i in range(len(THIRDS))]
    mean = xr.concat([k["score"].mean("cell") for k in kept], "third")
    heads = xr.concat([k["specialised"].sum("cell") for k in kept], "third")
    out = xr.Dataset({"mean_score": mean, "heads": heads}).transpose("text", "role", "third")
    return out.assign_coords(third=list(THIRDS))


_SHOWN = (
    ("random", "induction"),
    ("random", "previous"),
    ("prompts", "duplicate"),
    ("prompts", "previous"),
    ("prompts", "first"),
    ("weights", "copying"),
    ("weights", "previous"),
)


def _view(text: str, role: str) -> View:
    on = {"random": "on repeated random tokens", "prompts": "on the prompts", "weights": "by weights alone"}[text]
    copies = role == "copying"
    return View(
        "heatmap",
        "score",
        "head",
        "layer",
        title=f"Head roles: {role} {on}",
        unit="Σ Re λ / Σ|λ|" if copies else "share of attention",
        mark="specialised",
        center=0.0 if copies else None,
        select={"text": text, "role": role},
    )
