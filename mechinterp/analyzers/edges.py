"""Edge attribution: which connections between heads, MLPs, embedding and logits carry a behaviour."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from mechinterp.analyzers.paths import as_written
from mechinterp.core.analyzer import Analyzer, Batch, Context, Grad, Model, Needs, Sweep
from mechinterp.core.graph import Graph
from mechinterp.core.interventions import Add, Noise, Replace, Steer
from mechinterp.core.metrics import Metric, logit_diff
from mechinterp.core.result import Part, Result, View
from mechinterp.core.statistics import summarize
from mechinterp.core.tokens import TokenBatch
from mechinterp.core.trace import Read, Run, Trace
from mechinterp.errors import NeedsError
from mechinterp.model.slices import select
from mechinterp.sites import Site

METHODS = ("eap", "eap-ig-inputs", "eap-ig-activations", "exact")
ROWS = 256
"""Exact patches that one sweep makes."""

INSIDE = (
    *("embed", "z", "mlp_out", "q_normed", "k_normed", "q_rot", "k_rot", "scores", "pattern"),
    *("mlp_gate", "mlp_up", "mlp_act", "router"),
)
"""Sites at the end of a node or inside it: what is written there is seen in what nodes send, and in gradients."""
STREAM = ("resid_pre", "resid_mid", "resid_post", "attn_out", "head_out")
"""Sites that belong to no node: what is added there changes neither a difference of two runs nor a gradient."""

Senders = Float[Tensor, "sender example pos d_model"]
Receivers = Float[Tensor, "receiver example pos d_model"]
Gradients = Iterator[tuple[int, dict[str, Receivers]]]
"""(layer, kind of receiver → gradient at the input of each), the logits at last."""
Edges = Float[Tensor, "edge"] | Float[Tensor, "example edge"]


@dataclass(frozen=True)
class EdgeAttribution(Analyzer):
    """Score every edge of the model: what the metric loses when the edge alone carries the corrupted value.

    An edge u → v is what node u writes and receiver v reads (`mechinterp.core.graph`). Its ``score`` is the mean
    over examples of Σ_pos (clean_u - corrupted_u) · ∂metric/∂(input of v), the input taken before the norm of v,
    so a positive edge helps the behaviour. All in fp32. Methods:

    - ``"eap"`` (Syed et al. 2023): the gradient of the clean run. One forward, one backward. First order: it
      errs where attention is saturated, or a norm's input changes much, and may give large edges the wrong sign.
    - ``"eap-ig-inputs"`` (Hanna et al. 2024): gradients averaged over runs whose embeddings are corrupted + (k/n)
      (clean - corrupted), k = 0 ... n-1, each pulled back through its own run's norms.
    - ``"eap-ig-activations"``: the same along each sender's own path: embedding, heads of a layer, or MLP at
      corrupted + (k/n)(clean - corrupted), k = 1 ... n, and everything before it clean; only that sender's
      edges take these gradients. (2 × layers + 1) × n backwards.
    - ``"exact"``: the clean run with the edge's corrupted value, for every edge: what the others estimate. One
      counterfactual for each edge, so for small models.

    Result: ``score`` by ``edge``, with ``sender`` and ``receiver``; where `intervals`, ``ci_low``, ``ci_high``
    (bootstrap over examples), ``p`` (sign flips, NaN below six examples) and ``q``, and every example's ``scores``.

    Attributes:
        metric: higher is the behaviour; with `kl` and `loss`, where lower is, edges that help are negative. "eap"
            refuses `kl`, whose gradient is zero in the clean run.
        steps: n.
        ungrouped: keys and values get an edge for each query head, as TransformerLens and MIB count, rather than
            for each key/value head.
        intervals: keep scores of every example, ``example edge``.
    Raises:
        NeedsError: an unknown method, fewer than one step, or "eap" of a metric that compares with the clean run;
            hooks in force, or interventions between what nodes write and what others read. Those at what a node
            writes or inside it are accounted for, and so is whatever only adds (but with "exact", which makes
            receivers' own input, where it adds to that).
    """

    method: Literal["eap", "eap-ig-inputs", "eap-ig-activations", "exact"] = "eap-ig-inputs"
    metric: Metric = field(default_factory=logit_diff)
    steps: int = 5
    ungrouped: bool = False
    intervals: bool = False

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            known = ", ".join(map(repr, METHODS))
            raise NeedsError(f"The method of EdgeAttribution must be one of {known}. Got {self.method!r}")
        if self.method == "eap" and self.metric.compares:
            raise NeedsError(
                f"the clean run's gradient of {self.metric} is zero, since it compares with the clean run; give"
                ' EdgeAttribution another method, such as "eap-ig-inputs", or another metric, such as logit_diff()'
            )
        if not isinstance(self.steps, int) or self.steps < 1:
            raise NeedsError(f"The steps of EdgeAttribution must be a whole number, at least 1. Got {self.steps}")

    def needs(self, model: Model) -> Needs:
        _check_in_force(model, self.method)
        n = model.dims.n_layers
        senders = (Site("embed"), *(Site(kind, i) for i in range(n) for kind in ("z", "mlp_out")))
        corrupted = [Read(site, "corrupted") for site in senders]
        if self.method == "eap":  # the run that is differentiated gives its own values
            grad = Grad(self._receivers(n), self.metric, reads=(*senders, *_inputs(n)))
            return Needs(reads=corrupted, grads={"clean": grad})
        clean = [Read(site) for site in senders]
        if self.method == "exact":
            return Needs(reads=[*clean, *corrupted, *(Read(site) for site in _inputs(n))])
        grads: dict[str, Grad] = {}
        for name, layer, (at, shares) in self._paths(n):
            for k, share in enumerate(shares):
                beside = _inputs(n, layer)
                if share == 0:  # the path over inputs begins at the corrupted run, which so needs no pass of its own
                    beside, corrupted = (*beside, *senders), []
                grads[f"{name} {k}"] = Grad(
                    self._receivers(n, layer), self.metric, reads=beside, between=((at, share),)
                )
        return Needs(reads=[*clean, *corrupted], grads=grads)

    def observe(self, batch: Batch) -> Part:
        graph = Graph.of(batch.model, self.ungrouped)
        start = batch.examples.first_difference
        if self.method == "exact" or batch.model.in_force()[0]:
            start = 0  # a function that is in force may carry a change to earlier positions
        values = batch.values["clean"] if self.method == "eap" else batch.clean
        averaged: Gradients = iter(())
        if self.method == "eap-ig-inputs":
            changes = _changes(batch, values, batch.values["inputs 0"], "clean", start)
            # Before what heads send is made, so that it does not lie beside a backward pass.
            averaged = self._averaged(batch, graph, "inputs", start, ("q", 0))
        else:
            changes = _changes(batch, values, batch.corrupted, "corrupted", start)
        changed = graph.sent(batch.model, changes.pop)
        if self.method == "exact":
            scores = self._exact(batch, graph, changed)
        elif self.method == "eap":
            read = _pull_back(batch.model, graph, batch.grads["clean"], batch.values["clean"], start)
            scores = self._product(graph, changed, read)
        elif self.method == "eap-ig-inputs":
            scores = self._product(graph, changed, averaged)
        else:
            scores = self._along_activations(batch, graph, changed, start)
        if self.intervals:
            return Part({"scores": (scores, "example edge")})
        return Part({"total": (scores, "edge"), "count": (torch.tensor(len(batch.examples)), "")})

    def combine(self, parts: Iterator[Part], context: Context) -> Result:
        graph = Graph.of(context.model, self.ungrouped)
        coords = _named(graph)
        if self.intervals:
            data = Result.of(parts, unit="metric").data.drop_vars("edge")
            new = summarize(data["scores"].values, context.seed)
            columns = {"score": new.mean, **{name: getattr(new, name) for name in ("ci_low", "ci_high", "p", "q")}}
            data = data.assign({name: ("edge", value) for name, value in columns.items()})[[*columns, "scores"]]
        else:
            total, count = torch.zeros(len(graph), dtype=torch.float64), 0
            for part in parts:
                total += part.values["total"][0].double()
                count += int(part.values["count"][0])
            data = xr.Dataset({"score": ("edge", (total / count).numpy())})
        data = data.assign_coords(coords)
        sizes = {"n_layers": graph.n_layers, "n_heads": graph.n_heads, "n_kv_heads": graph.n_kv_heads}
        data.attrs = {"unit": "metric", **sizes, "ungrouped": int(self.ungrouped)}
        title = f"Largest edges ({self.method}): what the metric loses without them"
        return Result(data, {}, (View("bars", "score", "edge", title=title, unit=str(type(self.metric).__name__)),))

    def _receivers(self, n: int, after: tuple[str, int] = ("q", 0)) -> tuple[Site, ...]:
        """Where gradients are wanted, from a kind of receiver of a layer on."""
        kind, first = after
        layers = range(first + (kind == "mlp"), n)
        qkv = [Site("q", i) for i in layers]
        qkv += [Site(name, i, per_query_head=self.ungrouped) for name in ("k", "v") for i in layers]
        return (*qkv, *(Site("mlp_in", i) for i in range(min(first, n), n)), Site("final_norm"))

    def _paths(self, n: int) -> Iterator[tuple[str, tuple[str, int], tuple[Site, list[float]]]]:
        """(name, the first receiver that is reached, (sender, shares)) of every path that is integrated along."""
        inputs = [k / self.steps for k in range(self.steps)]
        if self.method == "eap-ig-inputs":
            yield "inputs", ("q", 0), (Site("embed"), inputs)
            return
        own = [k / self.steps for k in range(1, self.steps + 1)]
        yield "embed", ("q", 0), (Site("embed"), own)
        for i in range(n):
            yield f"a{i}", ("mlp", i), (Site("z", i), own)
            yield f"m{i}", ("q", i + 1), (Site("mlp_out", i), own)

    def _averaged(self, batch: Batch, graph: Graph, name: str, start: int, after: tuple[str, int]) -> Gradients:
        """Gradients at receivers' inputs, averaged over the steps of a path."""
        (kind, layer), width = after, graph.n_heads + 2 * graph.keys + 1
        earlier = min(layer, graph.n_layers) * width + (width - 1 if kind == "mlp" else 0)
        examples, columns = batch.examples.ids[:, start:].shape
        # In one piece, made before the passes, so that it does not lie strewn among what they leave.
        shape = (len(graph.receivers) - earlier, examples, columns, batch.model.dims.d_model)
        rest = torch.zeros(shape, device=batch.examples.ids.device)
        total: list[tuple[int, dict[str, Tensor]]] = []
        for k in range(self.steps):
            grads, values = batch.grads[f"{name} {k}"], batch.values[f"{name} {k}"]
            for place, (layer, read) in enumerate(_pull_back(batch.model, graph, grads, values, start, after)):
                if not k:
                    *parts, rest = rest.split([*map(len, read.values()), len(rest) - sum(map(len, read.values()))])
                    total.append((layer, dict(zip(read, parts, strict=True))))
                for receiver, gradient in read.items():
                    total[place][1][receiver].add_(gradient, alpha=1 / self.steps)
            del grads, values  # or they would lie beside those of the next step
        return iter(total)

    def _product(
        self, graph: Graph, changed: Senders, read: Gradients, out: Tensor | None = None, among: slice = slice(0, None)
    ) -> Edges:
        """Scores of edges, added up over examples or, where there are intervals, for every example.

        Args:
            out: where scores are put; new zeros by default.
            among: only of these senders.
        """
        each = self.intervals
        out = changed.new_zeros(*([changed.shape[1]] if each else []), len(graph)) if out is None else out
        for layer, gradients in read:
            reach = graph.into("logits" if "logits" in gradients else "mlp", layer)[1][1]
            senders, rows = changed[:reach][among], torch.cat(list(gradients.values()))
            if each:
                some = torch.bmm(rows.transpose(0, 1).flatten(2), senders.transpose(0, 1).flatten(2).mT)
            else:
                some = rows.flatten(1) @ senders.flatten(1).T
            first = 0
            for kind in gradients:
                place, (count, reach) = graph.into(kind, layer)
                block = out[..., place].view(*out.shape[:-1], count, reach)[..., among]
                block.copy_(some[..., first : first + count, : block.shape[-1]])
                first += count
        return out

    def _along_activations(self, batch: Batch, graph: Graph, changed: Senders, start: int) -> Edges:
        out = changed.new_zeros(*([changed.shape[1]] if self.intervals else []), len(graph))
        width = graph.n_heads + 1
        for name, after, _ in self._paths(graph.n_layers):
            layer = 0 if name == "embed" else int(name[1:])
            first = 0 if name == "embed" else 1 + layer * width + (graph.n_heads if name[0] == "m" else 0)
            among = slice(first, first + (graph.n_heads if name[0] == "a" else 1))
            self._product(graph, changed, self._averaged(batch, graph, name, start, after), out, among)
        return out

    def _exact(self, batch: Batch, graph: Graph, changed: Senders) -> Edges:
        """Every edge patched by itself: rows of sweeps that write what its receiver makes of its input."""
        out = changed.new_zeros(changed.shape[1], len(graph))
        sender, receiver = graph.ends
        last = Site("resid_post", graph.n_layers - 1)
        place, _ = graph.into("logits")
        final = batch.clean[last]
        scores = torch.stack([_score(batch, self.metric, final - c.to(final), final) for c in changed])
        out[:, place] = (_score(batch, self.metric, final, final) - scores).T.float()
        for begin in range(0, place.start, ROWS):
            edges = range(begin, min(begin + ROWS, place.start))
            rows = tuple((self._patch(batch, changed[sender[e]], graph.receivers[receiver[e]]),) for e in edges)
            swept = batch.rerun(Sweep(self.metric, rows=rows, base="clean"))
            assert swept.values is not None and swept.base is not None
            out[:, begin : edges.stop] = swept.base[:, None] - swept.values
        return out if self.intervals else out.sum(0)

    def _patch(self, batch: Batch, changed: Tensor, receiver: str) -> Replace:
        """What a receiver makes of its clean input less what one sender has changed, as a write there."""
        model, examples = batch.model, batch.examples
        if receiver.startswith("m"):
            layer, site, clean = int(receiver[1:]), Site("mlp_in", int(receiver[1:])), "resid_mid"
            norm = _norm(model, f"{model.arch.layer(layer)}.post_attention_layernorm")
        else:
            stem, kind = receiver[:-1].split("<")
            layer, head = (int(part.strip("akvh")) for part in stem.split("."))
            split = self.ungrouped and kind != "q"
            site, clean = Site(kind, layer, heads=head, per_query_head=split), "resid_pre"
            norm = _norm(model, f"{model.arch.layer(layer)}.input_layernorm")
        resid = batch.clean[Site(clean, layer)]
        value = norm.forward(resid - changed.to(resid))
        if clean == "resid_pre":
            weight, bias = model.projection(site.kind, layer, per_query_head=site.per_query_head)
            value = value @ weight[site.heads] + (0 if bias is None else bias[site.heads])
        return Replace(site, as_written(value, site, examples), of=examples.rows)


def _check_in_force(model: Model, method: str) -> None:
    """Raise where somebody changes what travels along edges, of which neither gradients nor patches know."""
    written, others = model.in_force()
    if others:
        raise NeedsError("edges cannot be scored while hooks are inside the model: remove them, or use intervene()")
    for site, write in written:
        adds = isinstance(write, Add | Steer | Noise)
        if site.kind not in (INSIDE if method == "exact" else (*INSIDE, "logits")) and not (
            adds and (method != "exact" or site.kind in STREAM)
        ):
            raise NeedsError(
                f"edges cannot be scored with method={method!r} while {type(write).__name__} writes at {site}, between"
                " what nodes write and what others read; write at embed, z or mlp_out, or leave the intervene() block"
            )


def _inputs(n: int, after: tuple[str, int] = ("q", 0)) -> tuple[Site, ...]:
    """What receivers read, before its norm, from a kind of receiver of a layer on."""
    kind, first = after
    pre = [Site("resid_pre", i) for i in range(first + (kind == "mlp"), n)]
    return (*pre, *(Site("resid_mid", i) for i in range(min(first, n), n)), Site("resid_post", n - 1))


def _named(graph: Graph) -> dict[str, Any]:
    """Coordinates of the edges."""
    sender, receiver = graph.ends
    senders, receivers = np.array(graph.senders)[sender], np.array(graph.receivers)[receiver]
    names = [f"{u} → {v}" for u, v in zip(senders, receivers, strict=True)]
    return {"edge": ("edge", names), "sender": ("edge", senders), "receiver": ("edge", receivers)}


def _changes(batch: Batch, clean: Trace, other: Trace, of: Run, start: int) -> dict[Site, Tensor]:
    """What is written at senders' sites in the clean run less in another, from a column on; zero at padding."""
    n, padding = batch.model.dims.n_layers, ~batch.examples.mask[:, start:]
    sites = [Site("embed"), *(Site(kind, i) for i in range(n) for kind in ("z", "mlp_out"))]
    out = {site: clean[site][:, start:].float() - other[Read(site, of)][:, start:].float() for site in sites}
    for change in out.values() if bool(padding.any()) else ():
        change[padding] = 0.0
    return out


def _pull_back(
    model: Model, graph: Graph, grads: Trace, values: Trace, start: int, after: tuple[str, int] = ("q", 0)
) -> Gradients:
    """Gradients at receivers' inputs, before the norm, in columns from `start` on, from a kind of a layer on."""
    kind, first = after

    def value(site: Site) -> Tensor:
        return values[Read(site, "clean")][:, start:].float()

    def gradient(site: Site) -> Tensor:
        return grads[site][:, start:].float()

    for i in range(min(first, graph.n_layers), graph.n_layers):
        base, read = model.arch.layer(i), dict[str, Tensor]()
        if (kind, first) != ("mlp", i):
            norm, resid = _norm(model, f"{base}.input_layernorm"), value(Site("resid_pre", i))
            for name in "qkv":
                split = graph.ungrouped and name != "q"
                weight = model.projection(name, i, per_query_head=split)[0].float()
                read[name] = _through_projection(gradient(Site(name, i, per_query_head=split)), weight, norm, resid)
        norm, resid = _norm(model, f"{base}.post_attention_layernorm"), value(Site("resid_mid", i))
        read["mlp"] = _through_norm(gradient(Site("mlp_in", i)), norm, resid)[None]
        yield i, read
    norm, resid = _norm(model, f"{model.arch.base}.{model.arch.norm}"), value(Site("resid_post", graph.n_layers - 1))
    yield 0, {"logits": _through_norm(gradient(Site("final_norm")), norm, resid)[None]}


def _through_norm(gradient: Tensor, norm: Any, resid: Tensor) -> Float[Tensor, "example pos d_model"]:
    """The transposed Jacobian of an RMSNorm: γg/rms - x (x · γg) / (d rms³)."""
    rms = (resid.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
    into = gradient * norm.weight.float() * rms
    return into.addcmul_(resid, (resid * into).mean(-1, keepdim=True) * rms.square(), value=-1)


def _through_projection(
    gradient: Float[Tensor, "example pos head d_head"],
    weight: Float[Tensor, "head d_model d_head"],
    norm: Any,
    resid: Float[Tensor, "example pos d_model"],
) -> Receivers:
    """The same, after the transpose of each head's projection; only the result is as wide as heads × d_model."""
    rms = (resid.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
    read = weight * norm.weight.float()[:, None]  # the norm's γ belongs to the projection
    by = (gradient * rms[..., None]).flatten(0, 1).transpose(0, 1)  # head token d_head
    flat = resid.flatten(0, 1)
    along = ((flat @ read) * by).sum(-1, keepdim=True) * (rms.square().flatten(0, 1) / flat.shape[-1])
    return (by @ read.mT).addcmul_(flat, along, value=-1).unflatten(1, resid.shape[:2])


def _norm(model: Model, path: str) -> Any:
    return model.hf.get_submodule(path)


def _score(batch: Batch, metric: Metric, resid: Tensor, clean: Tensor) -> Tensor:
    """The metric where a final residual stream is this."""
    examples: TokenBatch = batch.examples
    rows, where = metric.rows(examples), examples.where(metric.positions)

    def logits(value: Tensor) -> Tensor:
        return batch.model.unembed(batch.model.norm(select(value, Site("resid_post", 0), where)), rows)

    return metric.score(logits(resid), examples, rows, logits(clean) if metric.compares else None)
