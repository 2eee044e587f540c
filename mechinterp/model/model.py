"""Model: a Hugging Face causal LM or classifier with its tokenizer, its dimensions and its weights by head."""

import contextlib
import copy
import hashlib
import os
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.core.analyzer import Wanted
from mechinterp.core.display import html_table
from mechinterp.core.examples import Examples
from mechinterp.core.interventions import Intervention
from mechinterp.core.tokens import Baseline, Tokens
from mechinterp.core.trace import Trace
from mechinterp.errors import ExamplesError, HookError, ModelError, SiteError
from mechinterp.model.architecture import Dims, architecture, audit, check, lacks
from mechinterp.model.backend import NATIVE, Backend, Standing, Use
from mechinterp.model.hooks import Attached, in_force
from mechinterp.model.load import Loaded, load_hf
from mechinterp.model.weights import WeightsByHead
from mechinterp.shapes import Logits, Resid
from mechinterp.sites import KINDS, Site

if TYPE_CHECKING:
    from mechinterp.engine.forward import Generation


_NATIVE = "use backend='native', which can (model.with_backend('native'))"


class Model(WeightsByHead):
    """A wrapped model. It never rewrites: logits are bit-equal to the bare Hugging Face model's.

    Attributes:
        hf: the Hugging Face model, with an adapter's layers in it where there is one.
        tokenizer: its tokenizer, or None; then prompts must be token ids.
        peft: PEFT's model around `hf`, or None.
        dims: its sizes.
        arch: its row in the table of families.
        name: what it was loaded from.
        backend: the library that runs it, or None for the native engine.
        standing: interventions in force on that library, the outermost first.
    """

    def __init__(self, hf: Any, tokenizer: Any = None, name: str = "") -> None:
        self.backend: Backend | None = None
        self.standing: list[Standing] = []
        self.peft = hf if hasattr(hf, "get_base_model") else None
        self.hf = hf if self.peft is None else self.peft.get_base_model()
        self.tokenizer = tokenizer
        row = architecture(self.hf)
        head = next((path for path in ("lm_head", "score") if hasattr(self.hf, path)), None)
        if head is None:
            raise ModelError(
                f"{type(self.hf).__name__} has neither lm_head nor score; wrap a causal language model"
                " (…ForCausalLM) or a classifier (…ForSequenceClassification)"
            )
        self.arch = replace(row, unembed=head)
        self.dims = Dims.of(self.hf.config, self.arch, classifies=head == "score")
        audit(self.hf, self.arch, self.dims)
        self._vocabulary: Tensor | None = None
        self._mean: tuple[tuple[int, int], Tensor] | None = None
        """The mean embedding, and of which weights it is."""
        self.name = name or str(getattr(self.hf.config, "_name_or_path", "")) or type(self.hf).__name__

    @classmethod
    def load(
        cls,
        name: Any,
        *,
        adapter: str | None = None,
        dtype: torch.dtype | str | None = None,
        device: str | torch.device | None = None,
        device_map: Any = None,
        revision: str | None = None,
        attn_implementation: str | None = None,
        load_in_4bit: bool = False,
        backend: str = NATIVE,
        remote: bool | str = False,
        check: bool = True,
    ) -> "Model":
        """Load a model by name.

        Gated models are opened with the token that ``HF_TOKEN`` or ``hf auth login`` gives, as everywhere.

        Args:
            name: ``"smollm2"`` (bundled), a hub id, a local folder, or a ``.gguf`` file; a Hugging Face
                object is wrapped as it is, and so are a TransformerBridge and a model of nnsight.
            adapter: a PEFT adapter (LoRA, say) on top, from a folder or a hub id; see `without_adapter`.
            dtype: of the weights, such as ``"bfloat16"``; the checkpoint's own by default.
            device: where to put it; the CPU by default.
            device_map: accelerate's, for models on several devices, such as ``"auto"``.
            revision: branch, tag or commit of a hub id.
            attn_implementation: transformers' attention kernel; its own choice (SDPA) by default.
            load_in_4bit: pack the weights of linear layers by bitsandbytes, on CUDA.
            backend: who runs the model: ``"native"``, ``"transformer_lens"`` or ``"nnsight"``; see `with_backend`.
            remote: leave the weights with NDIF, and have every pass made there; with ``backend="nnsight"``, which is
                given it as it is (a server's address and ``"local"`` are its other values). See docs/backends.md.
            check: run the quick part of `mechinterp.verify` and refuse a model that fails it.
        Raises:
            ModelError: the model is unknown, of a family without a row, or its files cannot be used; or `remote`
                without a key of NDIF's, or without its answer.
        """
        from mechinterp.engine.backends import check_name, remotely

        check_name(backend)
        if remote:
            more = {"dtype": dtype, "revision": revision, "kernel": attn_implementation}
            rest = {"adapter": adapter, "device": device, "device_map": device_map, "load_in_4bit": load_in_4bit}
            return remotely(name, backend, remote, more, **rest)
        if not isinstance(name, str | os.PathLike):
            options = {"adapter": adapter, "dtype": dtype, "device": device, "device_map": device_map}
            options |= {"revision": revision, "attn_implementation": attn_implementation}
            options |= {"load_in_4bit": load_in_4bit or None}
            if odd := [option for option, value in options.items() if value is not None]:
                raise ModelError(
                    f"{', '.join(odd)} cannot be applied to a model that exists already; leave it out, or load by name"
                )
            wrapped = cls.wrap(name)
            return wrapped if backend == NATIVE else wrapped.with_backend(backend)
        loaded: Loaded = load_hf(
            str(name),
            adapter=adapter,
            dtype=dtype,
            device=device,
            device_map=device_map,
            revision=revision,
            attn_implementation=attn_implementation,
            load_in_4bit=load_in_4bit,
        )
        model = cls(loaded.peft or loaded.hf, loaded.tokenizer, str(name))
        if check:
            from mechinterp.engine.verify import quick_check

            quick_check(model)
        return model if backend == NATIVE else model.with_backend(backend)

    @classmethod
    def wrap(cls, hf: Any, tokenizer: Any = None) -> "Model":
        """Wrap a Hugging Face causal LM or classifier (or PEFT's model around one), in evaluation mode.

        A TransformerBridge, or a model of nnsight, is wrapped too, and goes on running it.

        Raises:
            ModelError: it is none of these, or one that cannot be used.
        """
        from mechinterp.engine.backends import existing

        if (found := existing(hf)) is not None:
            made = cls(found.hf.eval(), tokenizer or found.tokenizer)
            made.backend = found.backend(made)
            return made
        if not isinstance(hf, torch.nn.Module) or not hasattr(hf, "config"):
            raise ModelError(f"wrap takes a Hugging Face model. Got {type(hf).__name__}; to load by name, use load")
        return cls(hf.eval(), tokenizer)

    def with_backend(self, name: str) -> "Model":
        """The same model, run by another library: ``"native"``, ``"transformer_lens"`` or ``"nnsight"``.

        Weights are shared, not copied; a bridge or an nnsight model of yours stays the one that it is. Analyzers,
        traces and interventions are used as before; what the library cannot do is refused by name.

        Raises:
            ModelError: there is no such backend, or it cannot run this model.
            HookError: an `intervene` block is in force, which would not be on the other model.
        """
        from mechinterp.engine.backends import connect

        if self.backend is not None and self.backend.name == name and not self.remote:
            return self
        if written := self.in_force()[0]:
            raise HookError(
                f"a block writes at {written[0][0]}, and it is this model's alone; leave it before with_backend"
            )
        other = copy.copy(self)
        other.standing, other.backend = [], connect(self, name)
        return other

    @contextlib.contextmanager
    def without_adapter(self) -> Generator["Model"]:
        """``with model.without_adapter(): ...``: the base model, inside the block.

        A classification head that came with the adapter stays, since the base has none.

        Raises:
            ModelError: the model has no adapter.
        """
        if self.peft is None:
            raise ModelError(f"{self.name} has no adapter to switch off; load it with adapter=")
        trained = [parameter.requires_grad for parameter in self.hf.parameters()]
        try:
            with self.peft.disable_adapter():
                head = self._module(self.arch.unembed)
                if self.dims.n_labels is not None and hasattr(head, "modules_to_save"):
                    head.enable_adapters(True)
                yield self
        finally:
            for parameter, requires in zip(self.hf.parameters(), trained, strict=True):
                parameter.requires_grad_(requires)  # which switching on again sets

    def trace(self, text: Any, reads: Wanted, *, interventions: Intervention | Sequence[Intervention] = ()) -> Trace:
        """Run once and return what was read; "just look".

        Args:
            text: a string, several, token ids (one list, a list of lists or a tensor), or `Examples`.
            reads: sites, as constructors, strings, or TransformerLens names.
            interventions: in force during this run only.
        """
        from mechinterp.engine.forward import trace

        return trace(self, text, reads, _several(interventions))

    def intervene(self, *interventions: Intervention) -> Attached | Standing:
        """``with model.intervene(Zero(sites.z(10, heads=3))): ...``: in force inside the block, undone on any exit."""
        if self.backend is not None:
            return Standing(self, interventions)
        return Attached(self.hf, self.arch, self.dims, interventions)

    def generate(
        self,
        text: Any,
        *,
        max_new_tokens: int = 20,
        reads: Wanted = (),
        interventions: Intervention | Sequence[Intervention] = (),
        **options: Any,
    ) -> "Generation":
        """Generate (greedily unless `options` say otherwise), reading and writing at every step.

        Args:
            text: one prompt: a string, token ids, or `Examples` with one text.
            reads: kept at every step and joined along positions.
            interventions: act at every step; a position counts tokens from the start of the prompt,
                ``"end"`` is the newest token, and None every token of each step.
            options: passed on to Hugging Face's ``generate``.
        """
        from mechinterp.engine.forward import generate

        return generate(self, text, max_new_tokens, reads, _several(interventions), options)

    def check(self, site: Site, use: Use = "read") -> None:
        """Raise unless this can be done at a site of this model, by whoever runs it.

        Raises:
            SiteError: no such layer, head, or kind in this model, or one that its backend lacks.
        """
        check(site, self.arch, self.dims)
        reason = None if self.backend is None else self.backend.lacks(site, use)
        if self.backend is not None and reason is not None:
            view = " per query head" if site.per_query_head else ""
            did = {"read": "read", "write": "written", "gradient": "differentiated"}[use]
            raise SiteError(
                f"{site} cannot be {did}{view} by the backend {self.backend.name!r}: {reason};"
                f" {'load it without remote=True' if self.remote else _NATIVE}"
            )

    def in_force(self) -> tuple[list[tuple[Site, Intervention]], bool]:
        """What ``intervene`` blocks write at present, and whether somebody else's hooks are inside the model, too."""
        if self.backend is not None:
            return [write for block in self.standing for write in block.writes], False
        return in_force(self.hf, self.arch.base)

    def tokenize(self, examples: Any) -> Tokens:
        """Examples (or a text, texts, ids) as token ids, checked against the context length."""
        labels = None if self.dims.n_labels is None else {str(k): v for k, v in self.hf.config.label2id.items()}
        tokens = as_examples(examples).tokenize(self.tokenizer, self.dims.context, labels)
        for i in (i for row in (*tokens.ids, *(tokens.corrupted or ())) for i in row):
            if not 0 <= i < self.dims.vocab:
                raise ExamplesError(f"token id {i} is outside the vocabulary of {self.dims.vocab}; use another")
        for i in (answer for sides in tokens.answers or () for side in sides for answer in side):
            if not 0 <= i < self.dims.n_outputs:
                what = "token id" if labels is None else "label"
                whole = "vocabulary of" if labels is None else "labels, which are"
                raise ExamplesError(f"{what} {i} is outside the {whole} {self.dims.n_outputs}; use another")
        return tokens

    def to_str_tokens(self, ids: Int[Tensor, "pos"] | Sequence[int]) -> list[str]:
        """Each token as the text it stands for; ``<id>`` where there is no tokenizer."""
        numbers = [int(i) for i in ids]
        if self.tokenizer is None:
            return [f"<{i}>" for i in numbers]
        return [str(self.tokenizer.decode([i], clean_up_tokenization_spaces=False)) for i in numbers]

    def to_str_outputs(self, ids: Int[Tensor, "some"] | Sequence[int]) -> list[str]:
        """What entries of the logits stand for: tokens, or a classifier's labels."""
        if self.dims.n_labels is None:
            return self.to_str_tokens(ids)
        return [str(self.hf.config.id2label.get(int(i), int(i))) for i in ids]

    @property
    def sites(self) -> tuple[Site, ...]:
        """Every place that this model has, in the order of a pass."""
        layered = [Site(kind.name, i) for kind in KINDS.values() if kind.layered for i in range(self.dims.n_layers)]
        every = [Site("embed"), *layered, Site("final_norm"), Site("logits")]
        return tuple(sorted((s for s in every if not lacks(s, self.arch, self.dims)), key=lambda s: s.order))

    @property
    def device(self) -> torch.device:
        """Where token ids go in; layers may lie on other devices."""
        return torch.device("cpu") if self.remote else self._embed.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self._embed.weight.dtype

    @property
    def remote(self) -> bool:
        """Whether the weights are NDIF's, and not here."""
        return bool(self._embed.weight.is_meta)

    @property
    def _embed(self) -> Any:
        return self.hf.get_submodule(f"{self.arch.base}.{self.arch.embed}")

    def baseline(self, name: Baseline) -> Float[Tensor, "d_model"]:
        """An embedding that stands for no token in particular: of a masked token, or where a path begins.

        ``"mean"`` is the mean over the vocabulary, ``"zero"`` is 0, and ``"pad"`` the padding token's (or, in a
        tokenizer without one, that of the end of text).

        Raises:
            ModelError: ``"pad"`` where the tokenizer has neither.
        """
        weight = self._module(f"{self.arch.base}.{self.arch.embed}").weight.detach()
        if name == "zero":
            return torch.zeros_like(weight[0])
        if name == "pad":
            ids = (getattr(self.tokenizer, f"{kind}_token_id", None) for kind in ("pad", "eos"))
            if (token := next((i for i in ids if i is not None), None)) is None:
                raise ModelError(f"{self.name} has no padding token; use the baseline 'mean' or 'zero'")
            return weight[token]
        state = weight.data_ptr(), weight._version
        if self._mean is None or self._mean[0] != state:  # of a large vocabulary it takes a while
            self._mean = state, weight.mean(0, dtype=torch.float32).to(weight.dtype)
        return self._mean[1]

    @property
    def vocabulary(self) -> Float[Tensor, "vocab d_model"] | None:
        """The language model's unembedding, one row a token; None of a classifier where it is not known.

        A classifier has it from the causal model that it was made of, or from its embedding, where the two are tied.
        """
        if self.dims.n_labels is None:
            return self.W_U
        tied = bool(getattr(self.hf.config, "tie_word_embeddings", False))
        return self.W_E if self._vocabulary is None and tied else self._vocabulary

    def blanked(self, embedded: Tensor, blanks: Mapping[Baseline, Tensor]) -> Tensor:
        """Embeddings with baselines where `blanks` say so."""
        for name, where in blanks.items():
            embedded = torch.where(where[..., None], self.baseline(name), embedded)
        return embedded

    def norm(self, resid: Resid) -> Resid:
        """The final norm, by the model's own module."""
        # forward(), not a call: arithmetic on what was read must not fire the hooks of a pass
        return self._module(f"{self.arch.base}.{self.arch.norm}").forward(resid)

    def norm_scale(self, resid: Resid) -> Resid:
        """γ / rms(resid): what the final norm multiplies this residual by, elementwise, in fp32."""
        norm = self._module(f"{self.arch.base}.{self.arch.norm}")
        rms = (resid.float().pow(2).mean(-1, keepdim=True) + self.norm_eps).sqrt()
        return norm.weight.float() / rms

    @property
    def norm_eps(self) -> float:
        """What norms add to the mean square, so that they never divide by zero."""
        return float(self._module(f"{self.arch.base}.{self.arch.norm}").variance_epsilon)

    def unembed(self, resid: Resid, rows: Int[Tensor, "rows"] | None = None) -> Logits:
        """Logits of a normed residual; of all the vocabulary (the model's own module), or of some rows."""
        if rows is None:
            return self._module(self.arch.unembed).forward(resid)
        bias = self.b_U
        return torch.nn.functional.linear(resid, self.W_U[rows], None if bias is None else bias[rows])

    @property
    def fingerprint(self) -> str:
        """A short hash of configuration and weights (a spread sample of each tensor), for provenance."""
        digest = hashlib.sha256(repr(sorted(self.hf.config.to_diff_dict().items(), key=str)).encode())
        layers = (m for m in self.hf.modules() if hasattr(m, "base_layer") and hasattr(m, "disable_adapters"))
        if (adapted := next(layers, None)) is not None:  # which adapters act, if any
            digest.update(repr(() if adapted.disable_adapters else tuple(adapted.active_adapters)).encode())
        if self.remote:  # whose weights nobody here has seen
            digest.update(repr((self.name, self.backend and self.backend.version)).encode())
        for name, parameter in () if self.remote else self.hf.named_parameters():
            flat = parameter.detach().flatten()
            sample = flat[:: max(1, flat.numel() // 1024)].float().cpu().contiguous()
            digest.update(name.encode() + str(tuple(parameter.shape)).encode() + sample.numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def kernel(self) -> str:
        """transformers' name of the attention kernel."""
        return str(self.hf.config._attn_implementation)

    def _repr_html_(self) -> str:
        more = {"parameters": sum(p.numel() for p in self.hf.parameters()), "attention kernel": self.kernel}
        more |= {"dtype": str(self.dtype).removeprefix("torch."), "device": str(self.device)}
        dims = {name: value for name, value in asdict(self.dims).items() if value not in (None, 0, frozenset())}
        dims["windows"] = ", ".join(sorted({str(w or "none") for w in self.dims.windows}))
        rows = list(({"family": self.arch.family} | dims | more).items())
        return html_table(("", "value"), rows, f"Model {self.name}")

    def __repr__(self) -> str:
        d = self.dims
        heads = f"{d.n_heads} heads" + (f" ({d.n_kv_heads} kv)" if d.n_kv_heads != d.n_heads else "")
        more = "" if d.n_labels is None else f", classifier of {d.n_labels} labels"
        more += "" if self.peft is None else f", adapter {', '.join(self.peft.peft_config)}"
        more += "" if self.backend is None else f", run by {self.backend.name} {self.backend.version}"
        more += "" if self.tokenizer is not None else ", no tokenizer: prompts and answers must be token ids"
        return (
            f"Model {self.name}: {self.arch.family}, {d.n_layers} layers, {heads}, d_model {d.d_model},"
            f" vocab {d.vocab}, context {d.context}, {str(self.dtype).removeprefix('torch.')} on {self.device}{more}"
        )


def _several(interventions: Intervention | Sequence[Intervention]) -> Sequence[Intervention]:
    return (interventions,) if isinstance(interventions, Intervention) else interventions


def as_examples(text: Any) -> Examples:
    """Whatever a user may pass as text."""
    if isinstance(text, Examples):
        return text
    if isinstance(text, str):
        return Examples.of([text])
    if isinstance(text, Tensor):
        text = text.tolist()
    if isinstance(text, Sequence) and text and all(isinstance(i, int) for i in text):
        return Examples.of([text])
    return Examples.of(text)
