"""The self-check of a model: what must hold for any number that this package gives to be right.

The quick part runs whenever a model is loaded; `verify` runs all of it, and `mechinterp verify` shows it.
"""

import contextlib
import html
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from mechinterp.core.examples import Examples
from mechinterp.core.interventions import Apply
from mechinterp.core.tokens import TokenBatch
from mechinterp.core.trace import Read
from mechinterp.engine.forward import forward, generate
from mechinterp.errors import ExamplesError, HookError, ModelError
from mechinterp.model.attention import PER_QUERY_HEAD
from mechinterp.model.model import Model
from mechinterp.model.slices import PATTERN_KINDS
from mechinterp.sites import Site

TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-5, torch.float16: 0.0125, torch.bfloat16: 0.1}
"""Largest error relative to the largest value, by dtype: what another shape of the same sum may cost.

In half precision that is 26 roundings: sound models of 30 and 40 layers were seen to need 20.
"""
FLIPS_BYTES = 2 << 30
"""Models with more bytes of weights are not copied to count bf16's flips."""
ROWS = 64
"""Edits made in one pass, each in a row of its own."""

_TEXTS = (
    "When Mary and John went to the store, John gave a drink to",
    "The capital of France is Paris, and the capital of Italy is",
    "def add(a, b):\n    return a +",
    "In 1969, two people walked on the moon for the first time. Years later",
    "The keys that lie near the old cabinet",
    "Water boils at one hundred degrees",
    "She opened the letter, read it twice, and",
    "One, two, three, four, five, six,",
)


@dataclass(frozen=True)
class Check:
    """One line of the table.

    Attributes:
        name: what must hold.
        value: what was measured; `unit` says in what.
        tolerance: the largest value that passes; None where the value is only reported.
        detail: where it went wrong, or what the number is about.
    """

    name: str
    value: float | int
    unit: str
    tolerance: float | int | None
    detail: str = ""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return self.tolerance is None or self.value <= self.tolerance

    @property
    def mark(self) -> str:
        return "info" if self.tolerance is None else "ok" if self.passed else "FAILED"


@dataclass(frozen=True)
class Verification:
    """What `verify` found. Prints as a table."""

    model: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def table(self) -> pd.DataFrame:
        """One row a check: check, value, unit, tolerance, passed, detail, seconds."""
        columns = {
            "check": [c.name for c in self.checks],
            "value": [c.value for c in self.checks],
            "unit": [c.unit for c in self.checks],
            "tolerance": [c.tolerance for c in self.checks],
            "passed": [c.passed for c in self.checks],
            "detail": [c.detail for c in self.checks],
            "seconds": [c.seconds for c in self.checks],
        }
        return pd.DataFrame(columns)

    @property
    def summary(self) -> str:
        """One line: how many checks hold, and which failed."""
        failed = [c.name for c in self.checks if not c.passed]
        if not failed:
            return f"all {len(self.checks)} checks hold"
        return f"{len(failed)} of {len(self.checks)} checks failed: {'; '.join(failed)}"

    def __str__(self) -> str:
        return "\n".join([self.model, HEAD, *map(line, self.checks), self.summary])

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(self.model)}</p>{self.table().to_html(index=False)}"


HEAD = f"{'':6}  {'check':63}  {'measured':>10}  {'tolerance':>10}  unit"


def line(check: Check) -> str:
    """One check as a line of the printed table."""
    tolerance = "" if check.tolerance is None else f"{check.tolerance:.3g}"
    text = f"{check.mark:6}  {check.name:63}  {check.value:10.3g}  {tolerance:>10}  {check.unit}"
    return f"{text} ({check.detail})" if check.detail else text


def verify(model: Model, *, quick: bool = False, told: Callable[[Check], None] | None = None) -> Verification:
    """Check everything that results rest on, on this model, dtype, device and attention kernel.

    Nothing here depends on what the model was trained for, so random weights will do.

    Args:
        quick: only what two short passes can show, as when a model is loaded.
        told: called with every check as it is done.
    Raises:
        ModelError: the tokenizer makes ids that the model lacks, the attention kernel cannot be read from, or another
            library runs the model.
    """
    if model.backend is not None:
        raise ModelError(
            f"verify is of the native engine, and {model.name} is run by {model.backend.name}; verify"
            " model.with_backend('native'), and compare the two by mechinterp.studies.equivalence"
        )
    checks: list[Check] = []

    def add(check: Check, started: float) -> None:
        checks.append(replace(check, seconds=time.perf_counter() - started))
        if told is not None:
            told(checks[-1])

    with torch.no_grad():
        if not quick:  # transformers registers hooks of its own the first time that it is asked for these
            with _eager(model):
                _base(model)(_one(model, [0]).ids, use_cache=False, output_hidden_states=True, output_attentions=True)
        before = _state(model)
        for step in [_quick] if quick else [_quick, _oracles, _edits, _padding, _batches, _decoding, _flips]:
            started = time.perf_counter()
            try:
                for check in step(model):
                    add(check, started)
                    started = time.perf_counter()
            except ModelError:
                raise
            except Exception as error:  # of a model that is built otherwise: the other checks may say more about it
                said = f"{type(error).__name__}: {' '.join(str(error).split())}"
                add(Check(f"{step.__name__.strip('_')}: runs without an error", 1, "error", 0, said), started)
        started = time.perf_counter()
        changed = [name for name, was, now in zip(_STATE, before, _state(model), strict=True) if was != now]
        detail = ", ".join(changed)
        add(Check("hooks, attention kernel and weights are as they were", len(changed), "changed", 0, detail), started)
    return Verification(repr(model), tuple(checks))


def quick_check(model: Model) -> None:
    """The quick part, for loading.

    Raises:
        ModelError: a check failed; the message says which and by how much.
    """
    if failed := [c for c in verify(model, quick=True).checks if not c.passed]:
        first = failed[0]
        raise ModelError(
            f"{model.name} fails its self-check: {first.name}: {first.value:.3g} {first.unit}, and at most"
            f" {first.tolerance:.3g} is right{f' ({first.detail})' if first.detail else ''}; nothing measured on it"
            " could be trusted. `mechinterp verify` shows all checks, and check=False loads it all the same"
        )


_STATE = ("hooks", "attention kernel", "weights")


def _state(model: Model) -> tuple[int, str, int]:
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.hf.modules())
    return hooks, model.kernel, sum(p._version for p in model.hf.parameters())


def prompts(model: Model) -> list[tuple[int, ...]]:
    """Eight prompts of different length, as token ids: text where there is a tokenizer, random where there is none.

    Raises:
        ModelError: the tokenizer makes ids that the model lacks.
    """
    if model.tokenizer is not None:
        try:
            ids = Examples.of(_TEXTS).tokenize(model.tokenizer).ids
            if all(0 <= i < model.dims.vocab for row in ids for i in row):
                return [row[: model.dims.context // 2 or 1] for row in ids]
            raise ExamplesError(f"its token ids go beyond the vocabulary of {model.dims.vocab}")
        except ExamplesError as error:
            raise ModelError(f"the tokenizer of {model.name} is not this model's: {error}") from error
    draw = torch.Generator().manual_seed(0)
    return [tuple(torch.randint(0, model.dims.vocab, (6 + i,), generator=draw).tolist()) for i in range(8)]


def _base(model: Model) -> Any:
    return model.hf.get_submodule(model.arch.base)


def _one(model: Model, ids: Sequence[int], rows: int = 1) -> TokenBatch:
    tokens = torch.tensor([list(ids)] * rows, device=model.device)
    return TokenBatch(tokens, torch.ones_like(tokens, dtype=torch.bool))


@contextlib.contextmanager
def _eager(model: Model) -> Generator[None]:
    """With transformers' own eager attention, the one kernel that gives its patterns away."""
    kernel = model.kernel
    try:
        model.hf.set_attn_implementation("eager")
        yield
    finally:
        model.hf.set_attn_implementation(kernel)


def _bare(model: Model, batch: TokenBatch) -> Tensor:
    """Logits at every position from the Hugging Face model alone."""
    if model.dims.n_labels is None:
        return model.hf(batch.ids, use_cache=False).logits
    return model.hf.get_submodule(model.arch.unembed)(_base(model)(batch.ids, use_cache=False).last_hidden_state)


def _off(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected value."""
    gap = (found.float() - expected.to(found.device).float()).abs()
    gap = gap.masked_fill(found.isneginf() & expected.to(found.device).isneginf(), 0.0)
    scale = expected.float().masked_fill(expected.isinf(), 0.0).abs().max()
    return _largest(gap / scale.clamp(min=1e-12))


def _largest(gap: Tensor) -> float:
    """The largest of some differences; a NaN among them is as large as can be."""
    return float("inf") if bool(gap.isnan().any()) else float(gap.max())


def _quick(model: Model) -> Iterator[Check]:
    tolerance = TOLERANCES[model.dtype]
    batch = _one(model, prompts(model)[0][:8])
    try:
        values = forward(model, batch, [Read(site) for site in model.sites]).values
    except HookError as error:
        yield Check("every site fires", 1, "missing", 0, str(error))
        return
    yield Check("every site fires", 0, "missing", 0, f"{len(values)} sites")
    broken = [str(r.site) for r, v in values.items() if r.site.kind != "scores" and not bool(v.isfinite().all())]
    yield Check("all values are finite", len(broken), "sites", 0, ", ".join(broken[:3]))
    logits, bare = values[Read(Site("logits"))], _bare(model, batch)
    differ = _largest((logits.float() - bare.float()).abs())
    yield Check("logits of a hooked pass are the bare model's, to the bit", differ, "logits", 0)

    def at(kind: str, layer: int | None = None) -> Tensor:
        return values[Read(Site(kind, layer))]

    last = at("resid_post", model.dims.n_layers - 1)
    parts = at("embed").clone()
    worst, where = 0.0, ""
    for i in range(model.dims.n_layers):
        parts = parts + at("attn_out", i).to(parts.device) + at("mlp_out", i).to(parts.device)
        bias = model.b_O(i)
        heads = at("head_out", i).sum(2) + (0 if bias is None else bias)
        if (off := _off(heads, at("attn_out", i))) > worst:
            worst, where = off, f"layer {i}"
    yield Check("embedding, attention and MLPs sum to the final residual", _off(parts, last), "relative", tolerance)
    yield Check("heads sum to the attention's output", worst, "relative", tolerance, where)
    normed = _off(last.float() * model.norm_scale(last), at("final_norm"))
    yield Check("the final norm multiplies by its weight over the root mean square", normed, "relative", tolerance)


def _oracles(model: Model) -> Iterator[Check]:
    """Against what transformers itself can show."""
    tolerance = TOLERANCES[model.dtype]
    batch = _one(model, prompts(model)[1])
    resid, pattern = [[Site(kind, i) for i in range(model.dims.n_layers)] for kind in ("resid_pre", "pattern")]
    values = forward(model, batch, [Read(site) for site in [*resid, *pattern]]).values
    states = _base(model)(batch.ids, use_cache=False, output_hidden_states=True).hidden_states
    gaps = [_largest((values[Read(s)].float() - states[i].float()).abs()) for i, s in enumerate(resid)]
    yield Check("residual streams are transformers' hidden states, to the bit", max(gaps), "activation", 0)
    with _eager(model):
        eager = _base(model)(batch.ids, use_cache=False, output_attentions=True).attentions
    worst = max(_largest((values[Read(s)] - eager[i]).abs()) for i, s in enumerate(pattern))
    yield Check("patterns are those of transformers' eager attention", worst, "probability", tolerance)


def _edits(model: Model) -> Iterator[Check]:
    """Written back as it was, a site changes nothing; edited in a row of its own, it moves that row's logits."""
    kinds = PER_QUERY_HEAD if model.dims.n_heads > model.dims.n_kv_heads else ()
    views = [replace(site, per_query_head=True) for site in model.sites if site.kind in kinds]
    # Views per query head apart: after one of them, a whole group has no key to write.
    groups = {"at all sites": list(model.sites), "keys and values per query head": views}
    batch, logits = _one(model, prompts(model)[4]), Read(Site("logits"))
    bare, gaps = _bare(model, batch), dict[str, float]()
    for name, sites in groups.items():
        same = forward(model, batch, [logits], writes=[Apply(site, torch.clone) for site in sites])
        gaps[name] = _off(same.values[logits], bare)
    worst = max(gaps, key=lambda name: gaps[name])
    yield Check(
        "what is written back as it is changes nothing", gaps[worst], "relative", TOLERANCES[model.dtype], worst
    )
    silent: list[str] = []
    for sites in groups.values():
        for start in range(0, len(sites), ROWS):
            silent += _silent(model, [site.at("end") for site in sites[start : start + ROWS]])
    detail = ", ".join(silent[:3]) or f"{len(model.sites) + len(views)} sites"
    yield Check("an edit at any site changes the logits", len(silent), "silent", 0, detail)


def _silent(model: Model, sites: Sequence[Site]) -> list[str]:
    """Those of some sites where an edit, each in a row of its own, leaves the last token's logits as they are."""
    batch, end = _one(model, prompts(model)[4][:6], len(sites)), Read(Site("logits", positions="end"))
    same = [Apply(site, torch.clone) for site in sites]  # so that both passes take the same kernels
    moved = [Apply(site, _perturb(site, row)) for row, site in enumerate(sites)]
    base, other = (forward(model, batch, [end], writes=writes).values[end] for writes in (same, moved))
    still = ((base == other).all(-1) | other.isnan().any(-1)).tolist()
    return [_named(site) for site, unmoved in zip(sites, still, strict=True) if unmoved]


def _named(site: Site) -> str:
    return f"{site.whole} per query head" if site.per_query_head else str(site.whole)


def _perturb(site: Site, row: int) -> Callable[[Tensor], Tensor]:
    def edit(value: Tensor) -> Tensor:
        new, old = value.clone(), value[row].float()
        draw = torch.randn(old.shape, generator=torch.Generator().manual_seed(row)).to(old.device)
        if site.kind == "pattern":
            new[row] = draw.masked_fill(old == 0, float("-inf")).softmax(-1).to(value.dtype)
        elif site.kind in PATTERN_KINDS:
            new[row] = (old + draw).to(value.dtype)
        elif site.kind == "router":
            new[row] = -value[row]  # the last become the first
        else:
            new[row] = (old + draw * old.std().clamp(min=1e-3)).to(value.dtype)
        return new

    return edit


def _compared(model: Model) -> list[Read]:
    """A cheap cross-section of a pass at the last token."""
    last = model.dims.n_layers - 1
    sites = [Site(kind, i) for kind in ("attn_in", "z", "mlp_in") for i in (0, last // 2, last)]
    return [Read(site.at("end")) for site in [*sites, Site("resid_post", last), Site("logits")]]


def _padding(model: Model) -> Iterator[Check]:
    ids, reads = prompts(model)[5], _compared(model)
    alone = forward(model, _one(model, ids), reads).values
    for side in ("left", "right"):
        worst, where = 0.0, ""
        for pads in (1, 2, 4, 8, 16):
            gap = [0] * pads
            row = [*gap, *ids] if side == "left" else [*ids, *gap]
            real = [False] * pads + [True] * len(ids) if side == "left" else [True] * len(ids) + [False] * pads
            padded = TokenBatch(torch.tensor([row], device=model.device), torch.tensor([real], device=model.device))
            for read, value in forward(model, padded, reads).values.items():
                if (off := _off(value, alone[read])) > worst:
                    worst, where = off, f"{read.site} with {pads}"
        yield Check(
            f"up to 16 tokens of {side} padding change nothing", worst, "relative", TOLERANCES[model.dtype], where
        )


def _batches(model: Model) -> Iterator[Check]:
    texts, reads = prompts(model), _compared(model)
    alone = [forward(model, _one(model, ids), reads).values for ids in texts]
    worst, where = 0.0, ""
    for size in (2, 4, 8):
        for start in range(0, 8, size):
            some = texts[start : start + size]
            width = max(map(len, some))
            rows = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in some], device=model.device)
            real = torch.tensor([[True] * len(i) + [False] * (width - len(i)) for i in some], device=model.device)
            for read, value in forward(model, TokenBatch(rows, real), reads).values.items():
                for row in range(size):
                    if (off := _off(value[row], alone[start + row][read][0])) > worst:
                        worst, where = off, f"{read.site} in a batch of {size}"
    yield Check(
        "batches of 2, 4 and 8 give what one prompt alone gives", worst, "relative", TOLERANCES[model.dtype], where
    )


def _decoding(model: Model) -> Iterator[Check]:
    if model.dims.n_labels is not None:
        return
    last = model.dims.n_layers - 1
    reads = [Read(s) for s in (Site("k", last), Site("pattern", last), Site("resid_post", last), Site("logits"))]
    ids = prompts(model)[3]
    made = generate(model, [ids], 8, [r.sites for r in reads], (), {"eos_token_id": None})
    whole = forward(model, _one(model, [*ids, *made.tokens[:-1]]), reads).values
    gaps = {str(r.site): _off(made.trace[r], whole[r]) for r in reads}
    worst = max(gaps, key=lambda name: gaps[name])
    yield Check(
        "decoding with a cache gives what one full pass gives", gaps[worst], "relative", TOLERANCES[model.dtype], worst
    )


def _flips(model: Model) -> Iterator[Check]:
    """How often bf16 changes the top token. No error: a fact to know before reading single predictions."""
    import copy

    bytes_ = sum(p.numel() * p.element_size() for p in model.hf.parameters())
    if model.dims.n_labels is not None or model.dtype != torch.float32 or bytes_ > FLIPS_BYTES:
        return
    half = copy.deepcopy(model.hf).to(torch.bfloat16)
    flipped = total = 0
    for ids in prompts(model):
        tokens = torch.tensor([ids], device=model.device)
        top, other = (hf(tokens, use_cache=False).logits[0].argmax(-1) for hf in (model.hf, half))
        flipped, total = flipped + int((top != other).sum()), total + len(ids)
    yield Check("bf16: top tokens that differ from fp32's", flipped / total, "share", None, f"{flipped} of {total}")
