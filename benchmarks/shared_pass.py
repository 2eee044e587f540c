"""Three analyzers from one pass: what it costs beside its floor, beside separate runs, beside peers.

The work: SmolLM2-135M, 32 indirect-object prompts, and from them `LogitLens(positions="end",
top_k=5)`, `DirectLogitAttribution()` and `HeadRoles(sequences=0, weights=False)`, the prompt pass alone.

The floor is one bare Hugging Face forward of ``hf.model`` on the same padded ids and mask (no hooks,
no cache, no unembedding) and then the analyzers' own arithmetic on activations saved beforehand:

- attention patterns of all layers, softmax of the saved rotated q · k, since a kernel that makes
  none has saved none, and their sums over each role's keys, the keys being found once. Written here
  in its plainest form, not taken from mechinterp;
- `observe` and `combine` of the three analyzers as they are: unembedding and statistics of 960
  residuals, the dot products of 301 components, bootstrap and permutation tests.

The floor leaves out what our side must also do: tokenize, plan, hook, save. Its parts are printed,
so that a wasteful analyzer cannot hide in it.

Peers read the same activations their own way, out of one pass each on the same ids and mask, and
are given the same arithmetic (their own helpers would take longer: stack_head_results builds every
head's d_model vector at every position). Lines marked "pass alone" leave that arithmetic out on both
sides. All results must agree with ours, or the exit status is 1.
"""

import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import mechinterp as mi
from benchmarks.timing import Line, arguments, compare, environment, interleave, quiet, report
from mechinterp.analyzers.heads import role_keys, role_mass
from mechinterp.core.analyzer import as_reads
from mechinterp.core.trace import Read
from mechinterp.engine.forward import forward

LIMIT = 1.15
TOLERANCE = 2e-3
"""Largest difference in any number of any result: logits, probabilities, shares of attention."""

COMPARED = ("prob", "logit_diff", "entropy", "top_prob", "attribution", "score")
"""The analyzers' numbers by example."""

Values = dict[Read, Tensor]


@dataclass
class Work:
    """The model, its prompts as one padded batch, and the analyzers."""

    model: mi.Model
    examples: mi.Examples
    analyzers: tuple[mi.Analyzer, ...] = (
        mi.LogitLens(top_k=5, positions="end"),
        mi.DirectLogitAttribution(),
        mi.HeadRoles(sequences=0, weights=False),
    )
    batch: mi.TokenBatch = field(init=False)
    reads: tuple[tuple[Read, ...], ...] = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = self.model.tokenize(self.examples)
        (rows,) = self.tokens.batches(len(self.tokens))
        self.batch = self.tokens.batch(rows)
        layers = self.model.dims.n_layers
        self.reads = tuple(as_reads(a.needs(self.model).reads, layers) for a in self.analyzers)
        self.ids, self.mask = self.batch.ids, self.batch.mask.long()
        self.rows = torch.arange(len(self.ids))
        self.ends = self.mask.sum(1) - 1

    def end(self, value: Tensor) -> Tensor:
        """The last real token's part of ``example position ...``."""
        return value[self.rows, self.ends]

    def place(self, at_end: Mapping[tuple[str, int], Tensor], mass: list[Tensor]) -> Values:
        """What was read, by (kind, layer), as the reads that the analyzers declare."""
        out: Values = {}
        for read in dict.fromkeys(r for reads in self.reads for r in reads):
            layer = read.site.layer or 0
            out[read] = mass[layer] if read.site.kind == "pattern" else at_end[read.site.kind, layer]
        return out

    @torch.no_grad()
    def observe(self, i: int, values: Values) -> mi.Part:
        """One analyzer's part, from activations that somebody read."""
        trace = mi.Trace({read: values[read] for read in self.reads[i]}, self.batch)

        def never(sweep: mi.Sweep, some: Any = None) -> Any:
            raise AssertionError(f"no analyzer here sweeps: {sweep}")

        seen = mi.Batch(self.batch, self.model, trace, mi.Trace({}, self.batch), {}, {}, {}, {}, never)
        part = self.analyzers[i].observe(seen)
        assert part is not None
        return mi.Part(part.values, coords=part.coords, rows=self.batch.rows)

    def combine(self, i: int, part: mi.Part) -> mi.Result:
        result = self.analyzers[i].combine(iter([part]), mi.Context(self.model, self.tokens, {}))
        assert isinstance(result, mi.Result)
        return result

    def finish(self, values: Values) -> list[mi.Result]:
        """The analyzers' own arithmetic, whoever read the activations."""
        return [self.combine(i, self.observe(i, values)) for i in range(len(self.analyzers))]


def floor(work: Work) -> dict[str, Callable[[], Any]]:
    """The floor's parts; saves the activations first."""
    model, layers = work.model, range(work.model.dims.n_layers)
    rotated = model.trace(work.examples, [mi.sites.q_rot(), mi.sites.k_rot()])
    back = list(work.batch.rows)  # a trace keeps the examples' order, a batch goes by length
    query = [rotated[f"q_rot.{i}"][back].transpose(1, 2).contiguous() for i in layers]
    key = [rotated[f"k_rot.{i}"][back].transpose(1, 2).contiguous() for i in layers]
    kinds = {"resid_post", "embed", "z", "mlp_out"}
    kept = model.trace(work.examples, [r for r in _all(work) if r.site.kind in kinds])
    at_end = {(site.kind, site.layer or 0): kept[site][back] for site in kept}
    group = model.dims.n_heads // model.dims.n_kv_heads

    @torch.no_grad()
    def bare() -> None:
        model.hf.model(input_ids=work.ids, attention_mask=work.mask, use_cache=False)

    @torch.no_grad()
    def patterns() -> Values:
        width = work.ids.shape[1]
        keys = role_keys(work.batch, slice(0, width)).flatten(2).float()  # example role (query key)
        hidden = torch.ones(width, width, dtype=torch.bool).triu(1)
        mass: list[Tensor] = []
        for q, k in zip(query, key, strict=True):
            scores = q.unflatten(1, (-1, group)) @ k[:, :, None].transpose(-1, -2) * model.dims.d_head**-0.5
            pattern = scores.masked_fill_(hidden, float("-inf")).softmax(-1).flatten(1, 2)
            mass.append(keys @ pattern.flatten(2).transpose(1, 2))
        return work.place(at_end, mass)

    values = patterns()
    parts = [work.observe(i, values) for i in range(len(work.analyzers))]
    names = [a.name for a in work.analyzers]
    steps: dict[str, Callable[[], Any]] = {"bare forward": bare, "patterns and role sums": patterns}
    for i, name in enumerate(names):
        steps[f"{name}.observe"] = lambda i=i: work.observe(i, values)
        steps[f"{name}.combine"] = lambda i=i: work.combine(i, parts[i])

    def whole() -> list[mi.Result]:
        bare()
        return work.finish(patterns())

    return {"floor": whole, **steps}


def transformer_lens(work: Work, folder: str) -> Callable[[], Values]:
    """One run_with_cache of just the hooks that are needed; no logits are returned."""
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(folder, device="cpu", tokenizer=work.model.tokenizer)
    layers = range(work.model.dims.n_layers)
    hooks = {"resid_post": "hook_resid_post", "z": "attn.hook_z", "mlp_out": "hook_mlp_out"}
    names = [f"blocks.{i}.{hook}" for i in layers for hook in (*hooks.values(), "attn.hook_pattern")]
    every = slice(0, work.ids.shape[1])

    @torch.no_grad()
    def read() -> Values:
        _, cache = bridge.run_with_cache(
            work.ids, attention_mask=work.mask, names_filter=["hook_embed", *names], return_type=None
        )
        at_end = {(kind, i): work.end(cache[f"blocks.{i}.{hook}"]) for i in layers for kind, hook in hooks.items()}
        at_end["embed", 0] = work.end(cache["hook_embed"])
        mass = [role_mass(cache[f"blocks.{i}.attn.hook_pattern"], every, work.batch) for i in layers]
        return work.place(at_end, mass)

    return read


def nnsight(work: Work, folder: str) -> Callable[[], Values]:
    """One trace on eager attention, reduced inside, stopped after the last layer."""
    from nnsight.modeling.transformers import TransformersModel

    model: Any = TransformersModel(folder, task="text-generation", attn_implementation="eager", dispatch=True)
    heads, every = work.model.dims.n_heads, slice(0, work.ids.shape[1])
    inputs = {"input_ids": work.ids, "attention_mask": work.mask}

    @torch.no_grad()
    def read() -> Values:
        with model.trace(inputs) as tracer:
            at_end: Any = dict().save()  # pyright: ignore[reportAttributeAccessIssue]  # noqa: C408
            mass: Any = list().save()  # pyright: ignore[reportAttributeAccessIssue]  # noqa: C408
            at_end["embed", 0] = work.end(model.model.embed_tokens.output)
            for i, layer in enumerate(model.model.layers):
                at_end["z", i] = work.end(layer.self_attn.o_proj.input).unflatten(-1, (heads, -1))
                mass.append(role_mass(layer.self_attn.output[1], every, work.batch))
                at_end["mlp_out", i] = work.end(layer.mlp.output)
                at_end["resid_post", i] = work.end(layer.output)
            tracer.stop()
        return work.place(at_end, mass)

    return read


PEERS = {"transformer_lens": transformer_lens, "nnsight": nnsight}


def difference(ours: list[mi.Result], theirs: list[mi.Result]) -> float:
    """Largest difference between per-example numbers of the same results; top tokens' order is left to their scores."""
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        for name in COMPARED:
            if name in a.data:
                gap = abs(a.data[name] - b.data[name])
                assert bool((a.data[name].isnull() == b.data[name].isnull()).all()), f"{name} is missing elsewhere"
                worst = max(worst, float(gap.max()))
    return worst


def contestants(work: Work, quick: bool) -> dict[str, Callable[[], Any]]:
    """Every way to time, by name. Peers that are not installed are left out, and said."""
    model, examples = work.model, work.examples
    ways: dict[str, Callable[[], Any]] = {"ours": lambda: mi.run(model, examples, work.analyzers), **floor(work)}
    if quick:
        ways = {name: ways[name] for name in ("ours", "floor", "bare forward")}
    ways["ours, pass alone"] = lambda: forward(model, work.batch, _all(work))
    for analyzer in () if quick else work.analyzers:
        ways[analyzer.name] = lambda analyzer=analyzer: mi.run(model, examples, analyzer)
    if not quick:
        ways["full"] = lambda: mi.run(model, examples, [*work.analyzers[:2], mi.HeadRoles()])
    for peer, make in PEERS.items():
        if importlib.util.find_spec(peer) is None:
            print(f"{peer} is not installed; left out")
            continue
        with quiet():
            read = make(work, str(model.hf.config._name_or_path))
        ways[peer] = lambda read=read: work.finish(read())
        ways[f"{peer}, pass alone"] = read
    return ways


def main() -> None:
    options = arguments(__doc__)
    work = Work(mi.Model.load("smollm2"), mi.tasks.ioi(8 if options.quick else 32))
    ways = contestants(work, options.quick)
    warm = {name: way() for name, way in ways.items()}
    ours = warm["ours"]
    gaps = {name: difference(ours, warm[name]) for name in ("floor", *PEERS) if name in ways}
    seconds = interleave(ways, 1 if options.quick else 9)
    facts = environment(
        model=work.model.name,
        kernel=work.model.kernel,
        threads=torch.get_num_threads(),
        prompts=len(work.examples),
        passes=ours[0].meta["passes"]["forward"],
    )
    report("Three analyzers on one pass; ratio = ours / theirs", lines(work, seconds), facts, options.json)
    print("  largest difference from ours: " + ", ".join(f"{name} {gap:.1e}" for name, gap in gaps.items()))
    if bad := [name for name, gap in gaps.items() if not gap <= TOLERANCE]:
        sys.exit(f"{', '.join(bad)} did other work: more than {TOLERANCE} apart")


def lines(work: Work, seconds: Mapping[str, list[float]]) -> list[Line]:
    """The table: floor, peers, each alone and their sum, then the parts of the floor."""
    ours, passed = seconds["ours"], seconds["ours, pass alone"]
    out = [compare("three analyzers", ours, "floor", seconds["floor"], LIMIT)]
    out.append(compare("pass alone, all reads", passed, "bare forward", seconds["bare forward"]))
    for peer in (p for p in PEERS if p in seconds):
        out.append(compare("three analyzers", ours, peer, seconds[peer]))
        out.append(compare("pass alone, all reads", passed, peer, seconds[f"{peer}, pass alone"]))
    if "full" not in seconds:
        return out
    alone = [seconds[a.name] for a in work.analyzers]
    out.append(compare("three analyzers", ours, "three runs", [sum(s) for s in zip(*alone, strict=True)]))
    out += [compare(a.name, s, "floor", seconds["floor"]) for a, s in zip(work.analyzers, alone, strict=True)]
    out.append(compare("with the random-token pass", seconds["full"], "three analyzers", ours))
    steps = [name for name in seconds if name == "bare forward" or "." in name or "patterns" in name]
    return out + [compare(f"floor: {name}", seconds[name], "floor", seconds["floor"]) for name in steps]


def _all(work: Work) -> tuple[Read, ...]:
    return tuple(dict.fromkeys(r for reads in work.reads for r in reads))


if __name__ == "__main__":
    main()
