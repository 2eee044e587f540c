"""The edge-level forward: the clean run of a model in which any set of edges is cut, many circuits in one call.

Every receiver (each head's queries, each key/value head's keys and values, every MLP, the logits) has an
input of its own: what stands on the residual stream before it in the reference run, plus, for each edge that
is kept, what its sender writes now less what it wrote in the reference run. So a circuit with all edges is the
clean run, one without any is the reference run, and neither needs a residual stream for every head: what senders
have changed is one matrix, and the inputs of a layer's receivers are one product with it.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.core.graph import Graph
from mechinterp.core.metrics import Metric
from mechinterp.core.tokens import TokenBatch, Tokens
from mechinterp.core.trace import Read
from mechinterp.engine.forward import Passed, forward, score
from mechinterp.engine.packed import BUDGET, TOKENS, watched
from mechinterp.engine.plan import Plan, PlannedPass
from mechinterp.errors import ExamplesError, NeedsError
from mechinterp.model.model import Model
from mechinterp.model.slices import select
from mechinterp.sites import Site

if TYPE_CHECKING:
    from mechinterp.engine.runner import Progress
else:
    Progress = Any

Kept: TypeAlias = npt.NDArray[np.bool_]
"""Circuits as ``circuit edge``: True where an edge is kept."""
CutTo: TypeAlias = Literal["corrupted", "mean", "zero"]


class EdgeRuns:
    """Some examples with their clean run and what cut edges carry instead; runs circuits on them.

    Args:
        cut_to: an edge that is cut carries the ``"corrupted"`` run's value, the ``"mean"`` over examples of the
            clean run at each position, or ``"zero"``.
        means: for ``"mean"``: as `reference_means` gives it.
        budget: bytes that circuits in flight may take.
    """

    def __init__(
        self,
        model: Model,
        batch: TokenBatch,
        graph: Graph,
        metric: Metric,
        *,
        cut_to: CutTo = "corrupted",
        means: Mapping[Site, Tensor] | None = None,
        budget: int = BUDGET,
    ) -> None:
        self.model, self.graph, self.metric, self.budget = model, graph, metric, budget
        self.batch = batch.right_padded()
        self.n = model.dims.n_layers
        sites = [Site("embed"), *(Site(kind, i) for i in range(self.n) for kind in ("z", "mlp_out"))]
        clean = forward(model, self.batch, [Read(site) for site in sites], [metric])
        self.clean = Passed({}, clean.logits, clean.rows)
        self.full = score(metric, self.batch, clean, clean)
        """Metric of the clean run, ``example``."""
        self.first = self.batch.first_difference if cut_to == "corrupted" else 0
        """The column from which on circuits can differ; before it, all runs are one."""
        self.reference = self._reference(cut_to, means)
        """What stands at the sites of senders, and on the residual stream, where every edge is cut."""
        self.changed = graph.sent(
            model, lambda site: clean.values[Read(site)][:, self.first :].float() - self._rest(site).float()
        )
        """What senders of `start` write less what they write in the reference, ``sender example pos d_model``."""
        self.start: Kept = np.ones(len(graph), bool)
        """The circuit that `changed` is of: at first all edges."""
        self.rotary = self._rotary()
        self._plain: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def _rest(self, site: Site) -> Tensor:
        """The reference in the columns where circuits can differ."""
        return self.reference[site][:, self.first :]

    def _reference(self, cut_to: CutTo, means: Mapping[Site, Tensor] | None) -> dict[Site, Tensor]:
        n = self.n
        if cut_to == "corrupted":
            reads = [Read(site) for site in reference_sites(n)]
            return {
                read.site: value
                for read, value in forward(self.model, self.batch.run("corrupted"), reads).values.items()
            }
        shape = self.batch.ids.shape
        if cut_to == "mean":
            assert means is not None
            return {
                site: value[None, : shape[1]].expand(shape[0], -1, *value.shape[1:]) for site, value in means.items()
            }
        d, device, dtype = self.model.dims, self.batch.ids.device, self.model.dtype
        nothing = torch.zeros(*shape, d.d_model, device=device, dtype=dtype)
        out: dict[Site, Tensor] = {Site("embed"): nothing}
        resid = nothing
        for i in range(n):  # biases belong to no edge, and stay
            out[Site("z", i)] = nothing.new_zeros(*shape, d.n_heads, d.d_head)
            out[Site("mlp_out", i)], out[Site("resid_pre", i)] = nothing, resid
            bias = self.model.b_O(i)
            resid = resid if bias is None else resid + bias
            out[Site("resid_mid", i)] = resid
        out[Site("resid_post", n - 1)] = resid
        return out

    def _heads(self, layer: int, z: Float[Tensor, "row pos head d_head"]) -> Float[Tensor, "head row pos d_model"]:
        """What heads write less what they write in the reference."""
        old = self._rest(Site("z", layer))
        new = z.reshape(-1, *old.shape) - old  # several circuits of the same examples
        by_head = new.flatten(0, 2).transpose(0, 1)
        return (by_head @ self.model.W_O(layer)).float().unflatten(1, z.shape[:2])

    def _rotary(self) -> tuple[Tensor, Tensor]:
        module: Any = self.model.hf.get_submodule(f"{self.model.arch.base}.rotary_emb")
        columns = torch.arange(self.batch.ids.shape[1], device=self.batch.ids.device)
        return module(self.reference[Site("resid_pre", 0)][:1], columns[None])

    @torch.no_grad()
    def run(self, kept: Kept, tick: Callable[[int], None] = lambda n: None) -> Float[Tensor, "circuit example"]:
        """The metric of every circuit on every example; as many circuits together as the budget holds.

        Args:
            kept: ``circuit edge``.
            tick: told how many circuits are done.
        """
        if kept.ndim != 2 or kept.shape[1] != len(self.graph):
            raise NeedsError(f"circuits must be circuit × {len(self.graph)} edges. Got shape {kept.shape}")
        out = self.full.new_empty(len(kept), len(self.batch))
        entry = self._entries(kept)
        order = np.argsort(entry, kind="stable")
        size = max(1, self.budget // self._bytes())
        if self.batch.ids.device.type != "cuda":
            size = max(1, min(size, TOKENS // self.batch.ids.numel()))
        for begin in range(0, len(kept), size):
            some = order[begin : begin + size]
            out[torch.as_tensor(some)] = self._fly(kept[some], int(entry[some].min()))
            tick(len(some))
        return out

    def _bytes(self) -> int:
        """Of one circuit: what its senders change, and the inputs of a layer's receivers, several times over."""
        width = self.graph.n_heads + 2 * self.graph.keys + 1
        return (len(self.graph.senders) + 4 * width) * self.batch.ids.numel() * self.model.dims.d_model * 4

    def _entries(self, kept: Kept) -> npt.NDArray[np.int64]:
        """The first layer at which each circuit differs from `start`; the number of layers where none does."""
        width = self.graph.n_heads + 2 * self.graph.keys + 1
        _, receiver = self.graph.ends
        layer = np.minimum(receiver // width, self.n)
        return np.where(kept == self.start, self.n, layer).min(1)

    @torch.no_grad()
    def begin_from(self, kept: Kept) -> None:
        """Let circuits to come be run from where they first differ from this one, ``edge``, and not from all edges."""
        kept = kept.copy()  # a circuit's own may not be written to, which torch warns of
        entry = int(self._entries(kept[None])[0])
        self.changed = self._changes(kept[None], entry, np.ones(len(self.graph.senders), bool))[0]
        self.start = kept

    def _changes(
        self, kept: Kept, entry: int, heard: npt.NDArray[np.bool_]
    ) -> Float[Tensor, "circuit sender row pos d_model"]:
        """What senders of circuits change, which are `start` before layer `entry`; of others than `heard`, anything."""
        circuits, heads = len(kept), self.graph.n_heads
        masks = torch.as_tensor(kept, device=self.batch.ids.device)
        known = 1 + entry * (heads + 1)  # senders before the entry
        changed = self.changed.new_zeros(circuits, *self.changed.shape)
        changed[:, :known] = self.changed[:known]
        for layer in range(entry, self.n):
            first = 1 + layer * (heads + 1)
            if heard[first : first + heads].any():
                z = self._attention(layer, masks, changed[:, :first])
                changed[:, first : first + heads] = self._heads(layer, z).unflatten(1, (circuits, -1)).transpose(0, 1)
            if heard[first + heads]:
                place, _ = self.graph.into("mlp", layer)
                changed[:, first + heads] = self._mlp(layer, masks[:, None, place], changed[:, : first + heads])
        return changed

    def _fly(self, kept: Kept, entry: int) -> Float[Tensor, "circuit example"]:
        """The metric of circuits that are `start` before layer `entry`."""
        heard = np.bincount(self.graph.ends[0][kept.any(0)], minlength=len(self.graph.senders)) > 0
        masks, changed = torch.as_tensor(kept, device=self.batch.ids.device), self._changes(kept, entry, heard)
        place, _ = self.graph.into("logits")
        where, last = self.batch.where(self.metric.positions), Site("resid_post", self.n - 1)
        scores: list[Tensor] = []
        rows = self.metric.rows(self.batch)
        for one in self._input(last, masks[:, None, place], changed)[:, 0]:
            final = torch.cat([self.reference[last][:, : self.first], one.to(self.model.dtype)], 1)
            at = select(final, Site("final_norm"), where)
            passed = Passed({}, {self.metric: self.model.unembed(self.model.norm(at), rows)}, {self.metric: rows})
            scores.append(score(self.metric, self.batch, passed, self.clean))
        return torch.stack(scores)

    def _input(
        self, site: Site, masks: Tensor, changed: Float[Tensor, "circuit sender row pos d_model"]
    ) -> Float[Tensor, "circuit receiver row pos d_model"]:
        """What receivers read: the reference's residual stream and all changes that reach them, in fp32."""
        rest = self._rest(site).float()
        used = masks.any(1).any(0)
        if int(used.sum()) * 2 < len(used):  # a small circuit: read those senders alone
            masks, changed = masks[:, :, used], changed[:, used]
        flat = torch.bmm(masks.to(changed.dtype), changed.flatten(2))
        return flat.view(*masks.shape[:2], *rest.shape).add_(rest)

    def _attention(
        self, layer: int, masks: Tensor, changed: Float[Tensor, "circuit sender row pos d_model"]
    ) -> Float[Tensor, "flight pos head d_head"]:
        """z of every circuit and example, one after the other."""
        module: Any = self.model.hf.get_submodule(f"{self.model.arch.layer(layer)}.self_attn")
        q, k, v = self._project(layer, masks, changed)
        if self.model.arch.qk_norm:
            q, k = module.q_norm.forward(q), module.k_norm.forward(k)
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        if getattr(module, "use_rope", True):
            turn = sys.modules[type(module).__module__].apply_rotary_pos_emb
            q, k = turn(q, k, *self.rotary)
        steps = torch.arange(q.shape[2], device=q.device)
        distance = steps[self.first :, None] - steps
        visible = distance >= 0
        if (window := self.model.dims.windows[layer]) is not None:
            visible &= distance < window
        z = torch.nn.functional.scaled_dot_product_attention(
            q[:, :, self.first :], k, v, attn_mask=visible, scale=float(module.scaling), enable_gqa=True
        )
        return z.transpose(1, 2)

    def _project(
        self, layer: int, masks: Tensor, changed: Float[Tensor, "circuit sender row pos d_model"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of all heads, each from an input of its own, ``flight column head d_head``."""
        graph, circuits = self.graph, len(masks)
        counts = (graph.n_heads, graph.keys, graph.keys)
        mine = torch.cat([masks[:, graph.into(kind, layer)[0]] for kind in "qkv"], 1).view(circuits, sum(counts), -1)
        reached = mine.any(2).any(0)  # nothing reaches the others in any circuit
        out = [each.repeat(circuits, 1, 1, 1) for each in self._plain_projections(layer)]
        if not bool(reached.any()):
            return out[0], out[1], out[2]
        norm: Any = self.model.hf.get_submodule(f"{self.model.arch.layer(layer)}.input_layernorm")
        read = norm.forward(self._input(Site("resid_pre", layer), mine[:, reached], changed)).to(self.model.dtype)
        flat = read.flatten(2, 3).transpose(0, 1).flatten(1, 2)  # receiver, all tokens, d_model
        shape, first = (circuits * read.shape[2], read.shape[3], -1), 0
        for kind, some, into in zip("qkv", reached.split(counts), out, strict=True):
            weight, bias = self._weights(kind, layer)
            if not (number := int(some.sum())):
                continue
            new = flat[first : first + number] @ weight[some]
            new = new if bias is None else new + bias[some, None]
            into[:, self.first :, some] = new.view(number, *shape).permute(1, 2, 0, 3)
            first += number
        return out[0], out[1], out[2]

    def _weights(self, kind: str, layer: int) -> tuple[Tensor, Tensor | None]:
        """By receiver: ``receiver d_model d_head`` and ``receiver d_head``."""
        return self.model.projection(kind, layer, per_query_head=self.graph.ungrouped)

    def _plain_projections(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of receivers that no edge reaches, ``example pos head d_head``."""
        if layer not in self._plain:
            norm: Any = self.model.hf.get_submodule(f"{self.model.arch.layer(layer)}.input_layernorm")
            read = norm.forward(self.reference[Site("resid_pre", layer)])

            def through(kind: str) -> Tensor:
                weight, bias = self._weights(kind, layer)
                return torch.einsum("bpd,hde->bphe", read, weight) + (0 if bias is None else bias)

            self._plain[layer] = through("q"), through("k"), through("v")
        return self._plain[layer]

    def _mlp(
        self, layer: int, masks: Tensor, changed: Float[Tensor, "circuit sender row pos d_model"]
    ) -> Float[Tensor, "circuit row pos d_model"]:
        """What the MLP writes less what it writes in the reference."""
        block: Any = self.model.hf.get_submodule(self.model.arch.layer(layer))
        into = self._input(Site("resid_mid", layer), masks, changed)[:, 0]
        read = block.post_attention_layernorm.forward(into).to(self.model.dtype)
        out: Tensor = block.mlp(read.flatten(0, 1))
        return out.float().unflatten(0, into.shape[:2]) - self._rest(Site("mlp_out", layer)).float()


@dataclass(frozen=True)
class CircuitScores:
    """The metric of circuits, and of the two runs between which they lie."""

    values: npt.NDArray[np.floating]
    """``circuit example``."""
    full: npt.NDArray[np.floating]
    """No edge cut: the clean run, ``example``."""
    empty: npt.NDArray[np.floating]
    """Every edge cut, ``example``."""


def run_circuits(
    model: Model,
    tokens: Tokens,
    graph: Graph,
    kept: Kept,
    metric: Metric,
    *,
    cut_to: CutTo = "corrupted",
    start: npt.NDArray[np.bool_] | None = None,
    batch_size: int | None = None,
    budget: int = BUDGET,
    progress: Progress | None = None,
) -> CircuitScores:
    """The metric of circuits on all examples, ``kept`` being ``circuit edge``.

    Args:
        cut_to: what an edge that is cut carries: the ``"corrupted"`` run's value, ``"zero"``, or the ``"mean"`` of
            the clean run over examples, position by position. Zero takes an MLP's own bias with it.
        start: a circuit, ``edge``, that most of the others are like, from which they begin; else all edges.
        batch_size: examples a batch; by default as many as fit the budget.
        budget: bytes beside the model that are aimed at.
    Raises:
        NeedsError: interventions or hooks are in force, which edges know nothing of.
        ExamplesError: no corrupted prompts, or prompts of different lengths where a mean is wanted.
    """
    graph_of(model, graph)
    size = batch_size or examples_at_once(model, tokens, graph, budget)
    batches = tokens.batches(size)
    if progress is not None:
        rows, n = len(kept) * len(tokens), model.dims.n_layers
        cost = len(kept) * sum(tokens.lengths) * n
        progress.begin(Plan((PlannedPass("sweep", "circuits", (), len(tokens), len(batches), n, 0, rows, cost, 0),)), 1)
    means = reference_means(model, tokens, size) if cut_to == "mean" else None
    out = np.full((len(kept) + 2, len(tokens)), np.nan)
    none = np.zeros((1, len(graph)), bool)
    for rows in batches:
        batch = tokens.batch(rows, model.device)
        runs = EdgeRuns(model, batch, graph, metric, cut_to=cut_to, means=means, budget=budget)
        out[0, list(rows)] = runs.full.float().cpu().numpy()
        out[1, list(rows)] = runs.run(none)[0].float().cpu().numpy()
        if start is not None:
            runs.begin_from(start)

        def tick(circuits: int, examples: int = len(rows)) -> None:
            if progress is not None:
                progress.advance("sweep_rows", circuits * examples)

        out[2:, list(rows)] = runs.run(kept, tick).float().cpu().numpy()
    return CircuitScores(out[2:], out[0], out[1])


def graph_of(model: Model, graph: Graph) -> None:
    """Raise unless circuits of a graph can be run on a model.

    Raises:
        NeedsError: the graph is another model's, or somebody writes inside the model.
    """
    if graph != Graph.of(model, graph.ungrouped):
        d = model.dims
        raise NeedsError(
            f"this circuit is of a model with {graph.n_layers} layers of {graph.n_heads} heads ({graph.n_kv_heads} kv);"
            f" {model.name} has {d.n_layers} layers of {d.n_heads} ({d.n_kv_heads} kv)"
        )
    if why := watched(model):
        raise NeedsError(f"circuits cannot be run here: {why}; leave the intervene() block, or remove the hooks")


def examples_at_once(model: Model, tokens: Tokens, graph: Graph, budget: int = BUDGET) -> int:
    """How many examples of the longest length let a circuit stay within a budget."""
    width = graph.n_heads + 2 * graph.keys + 1
    each = (2 * len(graph.senders) + 4 * width) * max(tokens.lengths) * model.dims.d_model * 4
    return max(1, min(64, budget // each))


def reference_means(model: Model, tokens: Tokens, size: int) -> dict[Site, Tensor]:
    """Means of the clean run over all examples, ``pos ...``, of all that a reference has.

    Raises:
        ExamplesError: the examples differ in length.
    """
    if len(set(tokens.lengths)) > 1:
        raise ExamplesError(
            f"a mean at each position needs examples of one length. Got {min(tokens.lengths)} to {max(tokens.lengths)}"
            ' tokens; cut to "corrupted" or to "zero", or take prompts of one length'
        )
    total: dict[Site, Tensor] = {}
    reads = [Read(site) for site in reference_sites(model.dims.n_layers)]
    for rows in tokens.batches(size):
        for read, value in forward(model, tokens.batch(rows, model.device), reads).values.items():
            part = value.float().sum(0)
            total[read.site] = part if read.site not in total else total[read.site] + part
    return {site: (value / len(tokens)).to(model.dtype) for site, value in total.items()}


def reference_sites(n_layers: int) -> list[Site]:
    """What is read of a reference run."""
    kinds = ("z", "mlp_out", "resid_pre", "resid_mid")
    layered = [Site(kind, i) for i in range(n_layers) for kind in kinds]
    return [Site("embed"), *layered, Site("resid_post", n_layers - 1)]
