"""Attribution patching: what activation patching would find, to first order, from two forwards and one backward."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import chain
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from mechinterp.analyzers.patching import ActivationPatching
from mechinterp.core.analyzer import Analyzer, Batch, Chosen, Context, Grad, Model, Needs
from mechinterp.core.interventions import Apply, Intervention
from mechinterp.core.metrics import Metric, logit_diff
from mechinterp.core.result import Part, Result, View
from mechinterp.core.tokens import TokenBatch
from mechinterp.core.trace import Read, Run
from mechinterp.errors import ExamplesError, NeedsError
from mechinterp.model.architecture import check
from mechinterp.model.attention import raw_scores, softmax
from mechinterp.sites import KINDS, Position, Site

QUERIES = ("q", "q_normed", "q_rot")
KEYS = ("k", "k_normed", "k_rot")
OTHERS = ("attn_in", "v", "z", "attn_out", "mlp_in", "mlp_gate", "mlp_up", "mlp_act", "router", "mlp_out")
"""What a layer adds to the residual stream, and what that is made of: GradDrop's nodes."""
REFUSED = {
    "scores": "its values of two runs are both infinite where a query sees nothing; use q, k or z",
    "pattern": "it is a product of q and k; attribute to these, or to z",
    "head_out": "it is z through a matrix; attribute to z, which gives the same numbers",
    "logits": "the metric is a function of them; use final_norm",
}


@dataclass(frozen=True)
class AttributionPatching(Analyzer):
    """First-order estimate of `ActivationPatching`: all cells from two forwards and one backward (Nanda 2023).

    With m the metric, ``estimate`` = Σ (source - base) · ∂m/∂site, the gradient taken in the base run, summed
    over the site's own axes in a cell: what writing the source run's value into the base run would change, were m
    linear (Syed et al. 2023 use the same for edges). ``effect`` is (base + estimate - corrupted) / (clean -
    corrupted), as in `ActivationPatching`; `exact` is the analyzer with the same cells, to compare with.

    It is an approximation, good for small parts (a head, a neuron, a late site). It fails where m is far from
    linear on the way: for whole residual sites (and the first MLP, which makes most of one), which every later norm
    rescales; for q and k of saturated attention, whose gradient vanishes though a write would move it; and where
    a direct effect and one through later layers cancel. ``method="atp*"`` (AtP*, Kramár et al. 2024) mends the
    last two:

    - q and k (also normed, or rotated): the pattern is computed anew, exactly, with the queries, or keys,
      of the cell at the source's values and all else at the base's, and what follows is linear:
      estimate = Σ Δpattern · ∂m/∂pattern. A key head counts in every query head of its group. Same cost; signed.
    - other sites in a layer: GradDrop. For every layer ℓ the gradient is taken once more with what ℓ adds to the
      residual stream (attn_out and mlp_out) held constant. The estimate of a cell in layer l is Σ_{ℓ≠l} |estimate
      without ℓ| / (L - 1), L backwards in all: dropping l itself leaves nothing, and dropping an earlier ℓ
      changes nothing. It is a size and has no sign: ``effect`` is estimate / |clean - corrupted|, 0 in either
      direction where nothing is done, and there is no p or q. The paper does both to q and k; here no layer is
      dropped for them, and they keep their sign.

    Result: ``effect``, ``ci_low``, ``ci_high``, ``p``, ``q`` over the grid's axes and ``cell`` and ``token``, all as
    in `ActivationPatching`; ``estimate`` (with ``example``), ``clean``, ``corrupted`` as metrics.

    Attributes:
        site: the kind of site, such as ``"z"``, or several, which then are an axis ``kind``.
        metric: what is measured. It must have a gradient.
        positions: ``"each"`` token index; named positions as a tuple; one position; or None for all at once.
        heads: ``"each"``; some, as a tuple, where a tuple among them is a set; or None for all at once.
        neurons: the same for neurons of mlp_gate, mlp_up and mlp_act.
        layers: None for all.
        direction: ``"denoise"`` (base corrupted, source clean) or ``"noise"`` (the reverse).
        guard: least |clean - corrupted| for an effect to mean anything; below it a cell is NaN, with a warning.
        method: ``"atp"`` or ``"atp*"``.
    Raises:
        NeedsError: sites without such an estimate; ``"atp*"`` of the residual stream or the final norm, which no
            layer's gradient can be dropped for; a metric that compares with the clean run (kl), and has no
            gradient there, when noising; an intervention in force at the logits or, with "atp*" of q or k, at
            scores or pattern, which are made anew here. Any other is accounted for.
    """

    site: str | tuple[str, ...]
    metric: Metric = field(default_factory=logit_diff)
    positions: str | int | tuple[Position, ...] | None = "each"
    heads: Chosen = None
    neurons: Chosen = None
    layers: tuple[int, ...] | None = None
    direction: Literal["denoise", "noise"] = "denoise"
    guard: float = 1e-3
    method: Literal["atp", "atp*"] = "atp"

    def __post_init__(self) -> None:
        try:
            kinds = self.exact._kinds
        except NeedsError as error:
            raise NeedsError(str(error).replace("ActivationPatching", "AttributionPatching")) from None
        if self.method not in ("atp", "atp*"):
            raise NeedsError(f"The method of AttributionPatching must be 'atp' or 'atp*'. Got {self.method!r}")
        for kind in kinds:
            if kind in REFUSED:
                raise NeedsError(f"{kind} has no attribution patching: {REFUSED[kind]}")
            if self.method == "atp*" and kind not in (*QUERIES, *KEYS, *OTHERS):
                raise NeedsError(
                    f"The site of AttributionPatching with method='atp*' must lie inside a layer, as"
                    f" {', '.join((*QUERIES, *KEYS, *OTHERS))} do, so that other layers can be dropped. Got {kind!r}"
                )
        if self.method == "atp*" and len({kind in OTHERS for kind in kinds}) > 1:
            raise NeedsError(
                f"method='atp*' gives q and k a sign and other sites none; attribute to them apart. Got {self.site!r}"
            )
        if self.metric.compares and self.direction == "noise":
            raise NeedsError(
                "a metric that compares with the clean run has no gradient there; use direction='denoise', or"
                f" a metric such as logit_diff(). Got {self.metric!r}"
            )

    @property
    def exact(self) -> ActivationPatching:
        """What this estimates: activation patching of the same cells."""
        return ActivationPatching(
            self.site,
            self.metric,
            self.positions,
            self.heads,
            self.neurons,
            self.layers,
            self.direction,
            self.guard,
        )

    @property
    def runs(self) -> tuple[Run, Run]:
        """The run that is differentiated, and the run whose values would be put there."""
        return ("corrupted", "clean") if self.direction == "denoise" else ("clean", "corrupted")

    @property
    def signed(self) -> bool:
        """Whether an estimate says in which direction the metric would move."""
        return self.method == "atp" or self.exact._kinds[0] not in OTHERS

    def needs(self, model: Model) -> Needs:
        self._check_in_force(model)
        base, source = self.runs
        sites, count = self._sites(model), model.dims.n_layers
        for site in sites:
            heads, neurons = (
                None if isinstance(some, str | None) else tuple(_flat(some)) for some in (self.heads, self.neurons)
            )
            check(replace(site, heads=heads, neurons=neurons), model.arch, model.dims)
        # The metric of both runs is made of these, with the very product that the engine would make.
        last = Site("final_norm", positions=self.metric.positions)
        if self.method == "atp*" and self.signed:
            inside = {
                name: [Site(name, site.layer) for site in sites] for name in ("pattern", "scores", "q_rot", "k_rot")
            }
            rotated = dict.fromkeys(Site(_rotated(site.kind), site.layer) for site in sites)
            beside = (*inside["scores"], *inside["q_rot"], *inside["k_rot"], last)
            whole = Grad(tuple(inside["pattern"]), self.metric, base, reads=tuple(dict.fromkeys(beside)))
            return Needs([Read(site, source) for site in (*rotated, last)], {"whole": whole})
        grads = {"whole": Grad(sites, self.metric, base, reads=(*sites, last))}
        if not self.signed:
            if count == 1:
                raise NeedsError("method='atp*' drops other layers, and this model has one layer; use method='atp'")
            for layer in range(count):
                if some := _before(sites, layer):
                    grads[f"without {layer}"] = Grad(some, self.metric, base, given=_cut(layer))
        return Needs([Read(site, source) for site in (*sites, last)], grads)

    def observe(self, batch: Batch) -> Part:
        sites, kinds = self._sites(batch.model), self.exact._kinds
        chosen = None if self.positions == "each" else _chosen(batch.examples, self.positions)
        metric = self._metric(batch)
        cells = torch.stack([one.cpu() for one in self._estimates(batch, sites, chosen)], 1)
        names = ["layer"] if sites[0].layer is not None else ["site"]
        coords: dict[str, list[Any]] = {"layer": [site.layer for site in sites[: len(sites) // len(kinds)]]}
        if names == ["site"]:
            coords = {"site": [str(site) for site in sites]}
        if len(kinds) > 1:
            cells, names, coords["kind"] = cells.unflatten(1, (len(kinds), -1)), ["kind", *names], list(kinds)
        if self.positions == "each" or isinstance(self.positions, tuple):
            names.append("position")
        if isinstance(self.positions, tuple):
            coords["position"] = list(self.positions)
        if self.heads is not None or self.neurons is not None:
            some = self.heads if self.neurons is None else self.neurons
            parts = some if isinstance(some, tuple) else tuple(range(cells.shape[-1]))
            sets = any(isinstance(part, tuple) for part in parts)
            names.append("neuron" if self.heads is None else str(sites[0].spec.head_axis))
            coords[names[-1]] = ["+".join(map(str, _flat((part,)))) if sets else part for part in parts]
        base = metric[self.runs[0]] if self.signed else metric["corrupted"]
        # In doubles, so that the estimate is not rounded by the metric beside it.
        patched = base.reshape(-1, *[1] * (cells.ndim - 1)) + cells.double()
        values = {"patched": (patched, " ".join(("example", *names)))}
        values |= {run: (value, "example") for run, value in metric.items()}
        if self.positions == "each":
            values["token_id"] = (batch.examples.ids, "example position")
        return Part(values, coords=coords)

    def combine(self, parts: Iterator[Part], context: Context) -> Result:
        longest = max(context.tokens.lengths)
        for position in self.positions if isinstance(self.positions, tuple) else (self.positions,):
            if isinstance(position, int) and not -longest <= position < longest:
                raise ExamplesError(f"position {position} is outside every example; the longest has {longest} tokens")
        # A size is counted from nothing, as what denoising adds to the corrupted run.
        exact = self.exact if self.signed else replace(self.exact, direction="denoise")
        result = exact.combine(parts, context)
        data, base = result.data, result.data[self.runs[0] if self.signed else "corrupted"]
        data = data.assign(estimate=data["patched"] - base)
        if not self.signed:
            data = _sized(data)
        views = tuple(self._relabelled(view) for view in result.views)
        order = ["effect", "ci_low", "ci_high", "p", "q", "cell", "estimate", "clean", "corrupted", "token"]
        return Result(data[[name for name in order if name in data]], {}, views)

    def _check_in_force(self, model: Model) -> None:
        """Raise where somebody writes what is made anew here: the logits, or a pattern from its scores."""
        anew = ("logits", "scores", "pattern") if self.method == "atp*" and self.signed else ("logits",)
        written, _ = model.in_force()
        head: Any = model.hf.get_submodule(model.arch.unembed)
        if bad := [f"{type(write).__name__} writes at {site}" for site, write in written if site.kind in anew]:
            raise NeedsError(f"there is no attribution patching while {bad[0]}; leave the intervene() block")
        if head._forward_hooks and not any(site.kind == "logits" for site, _ in written):
            raise NeedsError(f"there is no attribution patching while a hook is on {model.arch.unembed}; remove it")

    def _sites(self, model: Model) -> tuple[Site, ...]:
        """Kind by kind, all layers of each."""
        layers = range(model.dims.n_layers) if self.layers is None else self.layers
        each = ([Site(kind, i) for i in layers] if KINDS[kind].layered else [Site(kind)] for kind in self.exact._kinds)
        return tuple(chain.from_iterable(each))

    def _metric(self, batch: Batch) -> Mapping[Run, Tensor]:
        """The metric of both runs, one number an example, from what the final norm gave."""
        last = Site("final_norm", positions=self.metric.positions)
        base, source = self.runs
        finals: dict[Run, Tensor] = {base: batch.values["whole"][last], source: self._source(batch, last)}
        rows = {run: self.metric.rows(batch.examples.run(run)) for run in finals}
        logits = {run: batch.model.unembed(final, rows[run]) for run, final in finals.items()}
        against = logits["clean"] if self.metric.compares else None
        scores: dict[Run, Tensor] = {}
        for run in finals:
            scores[run] = self.metric.score(logits[run], batch.examples.run(run), rows[run], against).cpu().double()
        return scores

    def _source(self, batch: Batch, site: Site) -> Tensor:
        return (batch.clean if self.runs[1] == "clean" else batch.corrupted)[site]

    def _estimates(self, batch: Batch, sites: Sequence[Site], chosen: Tensor | None) -> list[Tensor]:
        """The estimate of every cell, ``example [position] [part]``, at each site."""
        base = batch.values["whole"]
        if self.method == "atp*" and self.signed:
            return [self._through_pattern(batch, Site(_rotated(site.kind), site.layer), chosen) for site in sites]
        changes = {site: _wide(self._source(batch, site)) - _wide(base[site]) for site in sites}

        def linear(name: str, some: Iterable[Site]) -> dict[Site, Tensor]:
            gradients, out = batch.grads[name], dict[Site, Tensor]()
            for site in some:
                product = changes[site] * _wide(gradients[site])
                if self.neurons is None:
                    product = product.sum(-1, keepdim=site.spec.head_axis is None)
                out[site] = self._cells(product, batch, chosen)
            return out

        whole, count = linear("whole", sites), batch.model.dims.n_layers
        if self.signed:
            return list(whole.values())
        # Each gradient is made when it is looked at, so one at a time. Dropping an earlier layer changes nothing.
        total = {site: (site.layer or 0) * value.abs() for site, value in whole.items()}
        for layer in range(count):
            if some := _before(sites, layer):
                for site, value in linear(f"without {layer}", some).items():
                    total[site] = total[site] + value.abs()
        return [value / (count - 1) for value in total.values()]

    def _through_pattern(self, batch: Batch, site: Site, chosen: Tensor | None) -> Tensor:
        change = _wide(self._source(batch, site)) - _wide(batch.values["whole"][site])
        if site.kind in QUERIES:
            return self._cells(_of_queries(batch, site, change), batch, chosen)
        return self._cells(_of_keys(batch, site, change, chosen), batch, None)

    def _cells(self, values: Tensor, batch: Batch, chosen: Tensor | None) -> Tensor:
        """Sums of ``example position part`` over each cell; NaN where an example has none of its positions.

        Args:
            chosen: the positions of each entry, ``example entry pos``; None where the axis is right already.
        """
        if chosen is not None:
            real, chosen = batch.examples.mask[..., None].to(values.device), chosen.to(values.device)
            sums = chosen.to(values.dtype) @ values.masked_fill(~real, 0.0)
            values = sums.masked_fill(~chosen.any(-1, keepdim=True), float("nan"))
        if self.positions != "each" and not isinstance(self.positions, tuple):
            values = values.squeeze(1)
        some = self.heads if self.neurons is None else self.neurons
        if some is None:
            return values.sum(-1)
        if isinstance(some, str):
            return values
        return torch.stack([values[..., _flat((part,))].sum(-1) for part in some], -1)

    def _relabelled(self, view: View) -> View:
        how = f"({self.direction}{', AtP*' if self.method == 'atp*' else ''})"
        title = re.sub(r"^Activation(.*)\((denoise|noise)\)", rf"Attribution\1{how}", view.title)
        return replace(view, title=title, center=view.center if self.signed else None)


def _before(sites: Sequence[Site], layer: int) -> tuple[Site, ...]:
    """The sites whose gradient changes when a layer is dropped."""
    return tuple(site for site in sites if site.layer is not None and site.layer < layer)


@cache
def _cut(layer: int) -> tuple[Intervention, ...]:
    """What keeps a layer out of the gradient; the same objects each time, so that equal gradients are one."""
    return tuple(Apply(Site(kind, layer), Tensor.detach) for kind in ("attn_out", "mlp_out"))


def _of_queries(batch: Batch, site: Site, change: Tensor) -> Tensor:
    """Σ Δpattern · gradient with the queries of one position moved, ``example pos head``."""
    key = _wide(batch.values["whole"][Site("k_rot", site.layer)])
    old, new = _scores(batch, site, change, key)
    moved = (softmax(new, new.dtype, True) - softmax(old, old.dtype, True)) * _gradient(batch, site)
    return moved.sum(-1).transpose(1, 2)


def _of_keys(batch: Batch, site: Site, change: Tensor, chosen: Tensor | None) -> Tensor:
    """Σ Δpattern · gradient with the keys of a cell's positions moved, ``example position kv_head``."""
    query, gradient = _wide(batch.values["whole"][Site("q_rot", site.layer)]), _gradient(batch, site)
    old, new = _scores(batch, site, query, change)
    if chosen is None:
        found = one_key_each(old, new, gradient).sum(2).transpose(1, 2)
    else:
        entries: list[Tensor] = []
        for entry in chosen.to(old.device).unbind(1):
            moved = softmax(torch.where(entry[:, None, None], new, old), old.dtype, True)
            entries.append(((moved - softmax(old, old.dtype, True)) * gradient).sum((2, 3)))
        lacking = ~chosen.any(-1, keepdim=True).to(old.device)
        found = torch.stack(entries, 1).masked_fill(lacking, float("nan"))
    return found.unflatten(-1, (batch.model.dims.n_kv_heads, -1)).sum(-1)


def one_key_each(old: Tensor, new: Tensor, gradient: Tensor) -> Tensor:
    """Σ over keys of Δsoftmax · gradient when key j alone has its new score, for every j at once.

    The other keys keep their proportions, so that only two numbers are needed of them: the log of their
    summed exponentials, and the mean of their gradients. All arguments are ``... query key``, and so is the result.
    """
    pattern = softmax(old, old.dtype, True)
    mean = (pattern * gradient).sum(-1, keepdim=True)
    others = old.logsumexp(-1, keepdim=True) + torch.log1p(-pattern)
    around = (mean - pattern * gradient) / (1 - pattern)
    # For a row's largest key these differences may be of nearly equal numbers: there they are summed anew.
    top = pattern.argmax(-1, keepdim=True)
    rest = old.scatter(-1, top, float("-inf"))
    others = others.scatter(-1, top, rest.logsumexp(-1, keepdim=True))
    around = around.scatter(-1, top, (softmax(rest, rest.dtype, True) * gradient).sum(-1, keepdim=True))
    change = torch.lerp(around, gradient, (new - others).sigmoid()) - mean
    return change.masked_fill(old.isneginf().all(-1, keepdim=True), 0.0)  # padding


def _scores(batch: Batch, site: Site, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """The run's scores, and these with query · key added; what is hidden, by whomever, stays hidden."""
    attention: Any = batch.model.hf.get_submodule(f"{batch.model.arch.layer(site.layer or 0)}.self_attn")
    scores = batch.values["whole"][Site("scores", site.layer)]
    old = _wide(scores).masked_fill(scores < torch.finfo(scores.dtype).min / 2, float("-inf"))
    return old, old + raw_scores(query.transpose(1, 2), key.transpose(1, 2), float(attention.scaling))


def _gradient(batch: Batch, site: Site) -> Tensor:
    return _wide(batch.grads["whole"][Site("pattern", site.layer)])


def _rotated(kind: str) -> str:
    """A query or key as attention sees it: its norm and rotary mix no positions."""
    return f"{kind[0]}_rot"


def _wide(value: Tensor) -> Tensor:
    """At least fp32, to multiply and add up in."""
    return value.to(torch.promote_types(value.dtype, torch.float32))


def _chosen(batch: TokenBatch, positions: Any) -> Tensor:
    """The positions of each entry of the axis, ``example entry pos``."""
    out: list[Tensor] = []
    for position in positions if isinstance(positions, tuple) else (positions,):
        where = batch.where(None if position == "all" else position, strict=False)
        if where is None:
            out.append(batch.mask)
            continue
        columns = where.columns.reshape(len(batch), -1)
        valid = (
            torch.ones_like(columns, dtype=torch.bool) if where.valid is None else where.valid.reshape(columns.shape)
        )
        hits = torch.nn.functional.one_hot(columns, batch.mask.shape[1]).bool() & valid[..., None]
        out.append(hits.any(1))
    return torch.stack(out, 1)


def _flat(chosen: Chosen) -> list[int]:
    """All heads or neurons of a choice."""
    return [i for part in chosen or () for i in (part if isinstance(part, tuple) else (part,)) if isinstance(i, int)]


def _sized(data: xr.Dataset) -> xr.Dataset:
    """The same effects as sizes: their sign is that of clean - corrupted; no size is below zero, to be tested."""
    low, high = np.abs(data["ci_low"]), np.abs(data["ci_high"])
    new = {"effect": np.abs(data["effect"]), "ci_low": np.minimum(low, high), "ci_high": np.maximum(low, high)}
    return data.drop_vars(["p", "q"]).assign(new).assign_attrs(unit="estimate / |clean - corrupted|")
