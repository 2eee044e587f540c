"""For tests, ours and yours: tiny random models of every family, and the laws that every analyzer must keep."""

import re
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.core.analyzer import Analyzer, Batch, Grad, Needs, Wanted, as_reads
from mechinterp.core.examples import Examples
from mechinterp.core.metrics import logit_diff
from mechinterp.core.result import Part, Result
from mechinterp.core.trace import Read
from mechinterp.engine.runner import run
from mechinterp.errors import MechinterpError, ModelError, NeedsError
from mechinterp.model.architecture import FAMILIES
from mechinterp.model.autoencoder import SparseAutoencoder
from mechinterp.model.model import Model
from mechinterp.report.panels import rows
from mechinterp.sites import Site, Sites
from mechinterp.tasks.agreement import WORDS as AGREEMENT
from mechinterp.tasks.capitals import WORDS as CAPITALS
from mechinterp.tasks.greater_than import WORDS as YEARS
from mechinterp.tasks.ioi import NAMES, OBJECTS, PLACES, TEMPLATES, ioi

_TRAITS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 4},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "tie_word_embeddings": True},
    "qwen3": {"head_dim": 12},
    "qwen3_moe": {
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "mlp_only_layers": [1],
        "norm_topk_prob": True,
    },
}
"""What tiny models of a family have, so that every trait of the table is met: short windows, odd heads, experts."""


def tiny(
    family: str = "llama",
    *,
    seed: int = 0,
    layers: int = 3,
    dtype: torch.dtype = torch.float32,
    words: Sequence[str] = (),
    **config: Any,
) -> Model:
    """A random model of a family, small enough to run hundreds of times: 4 heads in 2 groups, d_model 32.

    Weights are drawn with a standard deviation of 0.2, so that every part of the model matters. The
    tokenizer knows the words of the tasks, each with its leading space, and single characters.

    Args:
        words: texts whose words the tokenizer knows, beside those of the tasks.
        config: more of the Hugging Face configuration, such as ``attention_bias=True``; with
            ``num_labels`` the model is a classifier.
    Raises:
        ModelError: the family is not in the architecture table.
    """
    import transformers

    if family not in FAMILIES:
        raise ModelError(f"The family of tiny must be one of {', '.join(FAMILIES)}. Got {family!r}")
    tokenizer = _tokenizer(words)
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
        **_TRAITS.get(family, {}),
        **config,
    }
    kind: Any = (
        transformers.AutoModelForSequenceClassification if "num_labels" in config else transformers.AutoModelForCausalLM
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        hf = kind.from_config(transformers.AutoConfig.for_model(family, **settings), dtype=dtype)
        # Norm weights start at one and biases at zero, which would hide a forgotten γ or b.
        for name, parameter in hf.named_parameters():
            if "norm" in name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
            elif name.endswith("bias"):
                torch.nn.init.uniform_(parameter, -0.5, 0.5)
    return Model(hf.eval(), tokenizer, f"tiny-{family}")


def train_sae(
    x: Float[Tensor, "token dim"], site: Site, *, features: int = 64, k: int = 4, steps: int = 1000, seed: int = 0
) -> SparseAutoencoder:
    """A topk SAE of some activations, trained in seconds: for tests and examples.

    Squared error alone, decoder rows kept at length 1 (Gao et al. 2024), and nothing that revives dead features.
    """
    generator = torch.Generator().manual_seed(seed)
    scale = float((x - x.mean(0)).norm(dim=-1).mean())
    directions = torch.randn(features, x.shape[1], generator=generator)
    directions /= directions.norm(dim=-1, keepdim=True)
    made = [directions.T.clone(), torch.zeros(features), directions, x.mean(0) / scale]
    weights = [tensor.requires_grad_() for tensor in made]
    W_enc, b_enc, W_dec, b_dec = weights
    optimizer = torch.optim.Adam(weights, 3e-3)
    with torch.enable_grad():
        for _ in range(steps):
            some = x[torch.randint(len(x), (256,), generator=generator)] / scale
            top = ((some - b_dec) @ W_enc + b_enc).topk(k)
            f = torch.zeros(len(some), features).scatter(1, top.indices, top.values.relu())
            optimizer.zero_grad()
            (f @ W_dec + b_dec - some).square().sum(-1).mean().backward()
            optimizer.step()
            with torch.no_grad():
                W_dec /= W_dec.norm(dim=-1, keepdim=True)
    return SparseAutoencoder(site, W_enc, b_enc * scale, W_dec, b_dec * scale, "topk", k=k)


def hook_count(hf: torch.nn.Module) -> int:
    """Forward hooks on all modules; equal before and after everything that mechinterp does."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in hf.modules())


def check_analyzer(
    analyzer: Analyzer | Callable[[Model], Analyzer],
    examples: Examples | None = None,
    *,
    models: Sequence[Model] = (),
    ties: Collection[str] = (),
) -> None:
    """Check that an analyzer keeps the contract, on a tiny model of every family.

    - `needs` is pure, and the passes that are made are the passes that were declared;
    - a read that is dropped from `needs` is missed: what is not declared cannot be read, and what is
      declared is read;
    - the numbers depend neither on the batch size, nor on the padding side, nor (to the bit) on who
      else runs;
    - hooks, the attention kernel and the weights are as they were, after success and after an error;
    - what was shared is not changed in place; the result makes a table, and is the same after saving
      and loading; the intervals that its figures draw are those of the values that they show.

    Args:
        analyzer: the analyzer, or a function that makes one for a model.
        examples: what to run it on; by default seven pairs of `mechinterp.tasks.ioi`.
        models: what to run it on instead of one tiny model a family.
        ties: variables, or entries of an axis such as ``"rank"``, that jump when two numbers are nearly
            equal; they are compared for who else runs, and not between batch sizes. p and q are such.
    Raises:
        AssertionError: naming the analyzer, the model and the law that is broken.
    """
    if isinstance(analyzer, type):
        raise NeedsError(f"check_analyzer takes an analyzer, such as {analyzer.__name__}(), or a function of a model")
    pairs = ioi(7, seed=3) if examples is None else examples
    for model in models or [tiny(family) for family in FAMILIES]:
        mine = analyzer if isinstance(analyzer, Analyzer) else analyzer(model)
        case = _Case(mine, model, pairs, frozenset(ties) | {"p", "q"})
        before = case.state()
        try:
            whole = case.declared_passes()
            case.must(case.state() == before, "it left hooks, another attention kernel, or changed weights behind")
            case.dropped_reads()
            case.batches(whole)
            case.company(whole)
        except MechinterpError as error:
            raise AssertionError(f"{mine.name} on {model.name}: {error}") from error
        case.failing(before)
        case.kept(whole)
        case.figures(whole)
        case.must(case.state() == before, "it left hooks, another attention kernel, or changed weights behind")


@dataclass(frozen=True)
class _Case:
    """One analyzer on one model."""

    analyzer: Analyzer
    model: Model
    examples: Examples
    ties: frozenset[str]

    def must(self, holds: bool, law: str) -> None:
        if not holds:
            raise AssertionError(f"{self.analyzer.name} on {self.model.name}: {law}")

    def state(self) -> tuple[Any, ...]:
        versions = [(p._version, p.requires_grad) for p in self.model.hf.parameters()]
        return hook_count(self.model.hf), self.model.kernel, versions, self.model.fingerprint

    def run(self, *analyzers: Analyzer, **options: Any) -> Result:
        return run(self.model, self.examples, analyzers, **options)[0]

    def declared_passes(self) -> Result:
        calls: list[int] = []
        base = self.model.hf.get_submodule(self.model.arch.base)
        handle = base.register_forward_pre_hook(lambda *_: calls.append(1))
        try:
            first, second = self.analyzer.needs(self.model), self.analyzer.needs(self.model)
            self.must(not calls, "needs() ran the model; it must only declare")
            self.must(first == second, "needs() gave something else the second time; it must be pure")
            passes = self.run(self.analyzer).meta["passes"]
        finally:
            handle.remove()
        known = sum(passes.get(name, 0) for name in ("forward", "backward", "sweep_runs", "sweep_passes"))
        self.must(len(calls) == known, f"it made {len(calls)} passes and declared {known}; declare all in needs()")
        result = self.run(self.analyzer)  # without the hook, beside which a sweep's short runs are passes of their own
        self.must(len(result.table()) > 0, "its result has an empty table")
        again = self.run(self.analyzer)
        self.must(again.data.identical(result.data), "a second run gave other numbers; take seeds from context.seed")
        return result

    def dropped_reads(self) -> None:
        need = self.analyzer.needs(self.model)
        reads = as_reads(need.reads, self.model.dims.n_layers)
        for kind, of in dict.fromkeys((read.site.kind, read.of) for read in reads):
            kept = tuple(r for r in reads if (r.site.kind, r.of) != (kind, of))
            less = Needs(kept or _ANYTHING, need.grads, need.sweeps, need.on)
            try:
                self.run(_variant(self.analyzer, needs=lambda _, model, less=less: less))
            except NeedsError:
                continue
            self.must(False, f"it declares {kind} of the {of} run and does without it; declare what is read, no more")

    def batches(self, whole: Result) -> None:
        for size, side in ((1, "right"), (3, "left"), (len(self.examples), "left")):
            other = self.run(self.analyzer, batch_size=size, padding_side=side)
            self.must(set(other.data.data_vars) == set(whole.data.data_vars), f"batches of {size} give other variables")
            for name, values in whole.data.data_vars.items():
                if name in self.ties:
                    continue
                keep = {d: [x not in self.ties for x in values[d].values.tolist()] for d in values.dims}
                a, b = values.isel(keep).values, other.data[name].isel(keep).values
                same = np.isclose(b, a, 1e-3, 2e-4, equal_nan=True) if a.dtype.kind == "f" else a == b
                self.must(
                    a.shape == b.shape and bool(np.all(same)),
                    f"{name} depends on the batch: {int(np.sum(~np.asarray(same)))} of {a.size} numbers differ with"
                    f" batches of {size}, padded on the {side}; use batch.examples.mask, and names for positions",
                )

    def company(self, whole: Result) -> None:
        shared = self.run(self.analyzer, _Company())
        self.must(shared.data.identical(whole.data), "another analyzer beside it changes its numbers")

    def figures(self, whole: Result) -> None:
        for view in whole.views:
            frame = rows(whole, view)
            own = f"{view.value}_" if f"{view.value}_ci_low" in frame else ""
            if view.kind == "heatmap" or f"{own}ci_low" not in frame or not (own or view.interval):
                continue
            low, value, high = (frame[name].to_numpy(float) for name in (f"{own}ci_low", view.value, f"{own}ci_high"))
            outside = ((value < low - 1e-6) | (value > high + 1e-6)) & np.isfinite(low)
            self.must(
                2 * int(outside.sum()) <= len(frame),
                f"{view.value} is outside {own}ci_low and {own}ci_high at {int(outside.sum())} of {len(frame)} rows,"
                f" which are another value's; write View(..., interval=False), or call its own {view.value}_ci_low",
            )

    def failing(self, before: tuple[Any, ...]) -> None:
        def fail(*_: Any) -> Any:
            raise ZeroDivisionError("on purpose")

        for method in ("observe", "combine"):
            try:
                self.run(_variant(self.analyzer, **{method: fail}))
            except ZeroDivisionError:
                self.must(self.state() == before, f"an error in {method}() left hooks or changed weights behind")

    def kept(self, whole: Result) -> None:
        for view in range(len(whole.views)):
            try:
                whole.figure(view)
            except (MechinterpError, KeyError, ValueError) as error:
                self.must(False, f"its figure {view} cannot be drawn: {error}")
        with tempfile.TemporaryDirectory() as folder:
            loaded = Result.load(whole.save(Path(folder) / "result"))
        self.must(loaded.data.identical(whole.data), "its result is another one after saving and loading")


_ANYTHING = Sites("resid_pre", (0,))


@dataclass(frozen=True)
class _Company(Analyzer):
    """Reads, differentiates and reduces whatever it can, beside the analyzer that is checked."""

    def needs(self, model: Model) -> Needs:
        wanted: Wanted = [Read(site) for site in model.sites]
        return Needs(wanted, {"all": Grad(("attn_in", "pattern"), logit_diff())})

    def observe(self, batch: Batch) -> Part:
        return Part(batch.clean["resid_post.0"].norm(dim=-1), "example position")


def _variant(analyzer: Analyzer, **methods: Any) -> Analyzer:
    """The same analyzer, with the same options, with some methods replaced."""
    kind = type(analyzer.name, (type(analyzer),), methods)
    return kind(**{f.name: getattr(analyzer, f.name) for f in fields(analyzer) if f.init})


def _tokenizer(more: Sequence[str]) -> Any:
    import tokenizers
    import transformers

    pattern = r" ?[A-Za-z]+|[^A-Za-z]"
    tasks = [*NAMES, *PLACES, *OBJECTS, "A B S", *TEMPLATES, AGREEMENT, CAPITALS, YEARS]
    texts = re.sub(r"[{}]", "", " ".join([*tasks, *more]))
    characters = [chr(i) for i in range(32, 127)] + ["\n"]
    pieces = dict.fromkeys(["<pad>", "<unk>", *characters, *(re.findall(pattern, texts + " " + texts))])
    words = dict.fromkeys([*pieces, *(p.strip() for p in pieces if p.strip()), *(f" {p.strip()}" for p in pieces)])
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
