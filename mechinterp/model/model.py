"""Model: a Hugging Face causal LM with its tokenizer, its dimensions and its weights by head."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.core.analyzer import Wanted
from mechinterp.core.display import html_table
from mechinterp.core.examples import Examples
from mechinterp.core.interventions import Intervention
from mechinterp.core.tokens import Tokens
from mechinterp.core.trace import Trace
from mechinterp.errors import ExamplesError, ModelError, SiteError
from mechinterp.model.architecture import Architecture, Dims, architecture
from mechinterp.model.factored import FactoredMatrix
from mechinterp.model.hooks import Attached
from mechinterp.model.load import load_hf
from mechinterp.model.weights import by_head, linear_bias, linear_weight
from mechinterp.shapes import Logits, Resid

if TYPE_CHECKING:
    from mechinterp.engine.forward import Generation


class Model:
    """A wrapped model. It never rewrites: logits are bit-equal to the bare Hugging Face model's.

    Attributes:
        hf: the Hugging Face model.
        tokenizer: its tokenizer, or None; then prompts must be token ids.
        dims: its sizes.
        arch: its row in the table of families.
        name: what it was loaded from.
    """

    def __init__(self, hf: Any, tokenizer: Any = None, name: str = "") -> None:
        self.hf = hf
        self.tokenizer = tokenizer
        self.arch: Architecture = architecture(hf.config)
        self.dims = Dims.of(hf.config)
        self.name = name or str(getattr(hf.config, "_name_or_path", "")) or type(hf).__name__
        try:
            hf.get_submodule(self.arch.unembed)
        except AttributeError:
            raise ModelError(
                f"{type(hf).__name__} has no {self.arch.unembed}; wrap a causal language model (…ForCausalLM)"
            ) from None

    @classmethod
    def load(
        cls,
        name: Any,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        revision: str | None = None,
        attn_implementation: str | None = None,
    ) -> "Model":
        """Load a model by name.

        Args:
            name: ``"smollm2"`` (bundled), a hub id, a local folder, or a ``.gguf`` file; a Hugging Face
                object is wrapped as it is.
            dtype: of the weights; the checkpoint's own by default.
            device: where to put it; the CPU by default.
            revision: branch, tag or commit of a hub id.
            attn_implementation: transformers' attention kernel; its own choice (SDPA) by default.
        Raises:
            ModelError: the model is unknown, of a family without a row, or its files cannot be used.
        """
        if isinstance(name, torch.nn.Module):
            return cls.wrap(name)
        hf, tokenizer = load_hf(
            str(name), dtype=dtype, device=device, revision=revision, attn_implementation=attn_implementation
        )
        return cls(hf, tokenizer, str(name))

    @classmethod
    def wrap(cls, hf: Any, tokenizer: Any = None) -> "Model":
        """Wrap a Hugging Face causal LM that exists already. It is put into evaluation mode."""
        return cls(hf.eval(), tokenizer)

    def trace(self, text: Any, reads: Wanted, *, interventions: Sequence[Intervention] = ()) -> Trace:
        """Run once and return what was read; "just look".

        Args:
            text: a string, several, token ids (one list, a list of lists or a tensor), or `Examples`.
            reads: sites, as constructors, strings, or TransformerLens names.
            interventions: in force during this run only.
        """
        from mechinterp.engine.forward import trace

        return trace(self, text, reads, interventions)

    def intervene(self, *interventions: Intervention) -> Attached:
        """``with model.intervene(Zero(sites.z(10, heads=3))): ...``: in force inside the block, undone on any exit."""
        return Attached(self.hf, self.arch, self.dims, interventions)

    def generate(
        self,
        text: Any,
        *,
        max_new_tokens: int = 20,
        reads: Wanted = (),
        interventions: Sequence[Intervention] = (),
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

        return generate(self, text, max_new_tokens, reads, interventions, options)

    def tokenize(self, examples: Any) -> Tokens:
        """Examples (or a text, texts, ids) as token ids, checked against the context length."""
        tokens = as_examples(examples).tokenize(self.tokenizer, self.dims.context)
        answers = [answer for sides in tokens.answers or () for side in sides for answer in side]
        for i in (*answers, *(i for row in (*tokens.ids, *(tokens.corrupted or ())) for i in row)):
            if not 0 <= i < self.dims.vocab:
                raise ExamplesError(f"token id {i} is outside the vocabulary of {self.dims.vocab}; use another")
        return tokens

    def to_str_tokens(self, ids: Int[Tensor, "pos"] | Sequence[int]) -> list[str]:
        """Each token as the text it stands for; ``<id>`` where there is no tokenizer."""
        numbers = [int(i) for i in ids]
        if self.tokenizer is None:
            return [f"<{i}>" for i in numbers]
        return [str(self.tokenizer.decode([i], clean_up_tokenization_spaces=False)) for i in numbers]

    @property
    def device(self) -> torch.device:
        return self._module(f"{self.arch.base}.{self.arch.embed}").weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self._module(f"{self.arch.base}.{self.arch.embed}").weight.dtype

    # Weights by head, with TransformerLens's axes: row vectors are multiplied from the left. They are
    # what acts in a pass, LoRA included, and views of the parameters wherever that can be: never
    # change one in place. Only W_U differs, one row a token, as it is stored and used: W_U[token] is
    # the direction that a token's logit reads; write W_U.T where TransformerLens has W_U.

    @property
    def W_E(self) -> Float[Tensor, "vocab d_model"]:
        """Token embedding."""
        return linear_weight(self._module(f"{self.arch.base}.{self.arch.embed}"))

    @property
    def W_U(self) -> Float[Tensor, "vocab d_model"]:
        """Unembedding, one row a token (TransformerLens's W_U is this transposed)."""
        return linear_weight(self._module(self.arch.unembed))

    @property
    def b_U(self) -> Float[Tensor, "vocab"] | None:
        """Bias of the unembedding; None in most models."""
        return linear_bias(self._module(self.arch.unembed))

    def W_Q(self, layer: int) -> Float[Tensor, "head d_model d_head"]:
        """Query projection of each head: ``q = attn_in @ W_Q[head] + b_Q[head]``, before q-norm and rotary."""
        return by_head(linear_weight(self._projection(layer, "q")), self.dims.n_heads)

    def W_K(self, layer: int, *, per_query_head: bool = False) -> Float[Tensor, "heads d_model d_head"]:
        """Key projection of each key/value head, or repeated (a copy) for each query head of its group."""
        return self._read_by_kv(layer, "k", per_query_head)

    def W_V(self, layer: int, *, per_query_head: bool = False) -> Float[Tensor, "heads d_model d_head"]:
        """Value projection of each key/value head, or repeated (a copy) for each query head of its group."""
        return self._read_by_kv(layer, "v", per_query_head)

    def W_O(self, layer: int) -> Float[Tensor, "head d_head d_model"]:
        """Output projection of each head in one layer: ``head_out = z @ W_O[head]``."""
        return linear_weight(self._projection(layer, "o")).T.unflatten(0, (self.dims.n_heads, self.dims.d_head))

    def b_Q(self, layer: int) -> Float[Tensor, "head d_head"] | None:
        """Bias of the queries; None in families without (Qwen2 has one)."""
        return self._bias_by_head(layer, "q", self.dims.n_heads)

    def b_K(self, layer: int) -> Float[Tensor, "kv_head d_head"] | None:
        """Bias of the keys; None in families without."""
        return self._bias_by_head(layer, "k", self.dims.n_kv_heads)

    def b_V(self, layer: int) -> Float[Tensor, "kv_head d_head"] | None:
        """Bias of the values; None in families without."""
        return self._bias_by_head(layer, "v", self.dims.n_kv_heads)

    def b_O(self, layer: int) -> Float[Tensor, "d_model"] | None:
        """Bias of the output projection, which belongs to no head; None in most families."""
        return linear_bias(self._projection(layer, "o"))

    def OV(self, layer: int) -> FactoredMatrix:
        """W_V W_O of each query head, ``head d_model d_model``: what a head writes, of what it attends to.

        Biases and norms are not in it. ``model.W_E @ model.OV(layer) @ model.W_U.T`` is each head's circuit
        from token to logit, vocab × vocab and never built; its ``eigenvalues`` cost d_head × d_head.
        """
        return FactoredMatrix(self.W_V(layer, per_query_head=True), self.W_O(layer))

    def QK(self, layer: int, *, ignore_norm: bool = False) -> FactoredMatrix:
        """W_Q W_Kᵀ of each query head, ``head d_model d_model``: ``attn_in_q @ QK @ attn_in_kᵀ``.

        Biases, rotary and the scale 1/√d_head are not in it, so it is the score, up to scale, of a query and
        a key at the same position of a model without biases.

        Args:
            ignore_norm: leave out q/k-norm too, where the family has it (Qwen3).
        Raises:
            ModelError: the family norms q and k, so that scores are not bilinear.
        """
        if self.arch.qk_norm and not ignore_norm:
            raise ModelError(
                f"{self.arch.family} norms q and k before their product, so no matrix gives layer {layer}'s scores;"
                " read scores or pattern from a trace, or pass ignore_norm=True for W_Q W_Kᵀ without the norm"
            )
        return FactoredMatrix(self.W_Q(layer), self.W_K(layer, per_query_head=True).mT)

    def norm(self, resid: Resid) -> Resid:
        """The final norm, by the model's own module."""
        # forward(), not a call: arithmetic on what was read must not fire the hooks of a pass
        return self._module(f"{self.arch.base}.{self.arch.norm}").forward(resid)

    def norm_scale(self, resid: Resid) -> Resid:
        """γ / rms(resid): what the final norm multiplies this residual by, elementwise, in fp32."""
        norm = self._module(f"{self.arch.base}.{self.arch.norm}")
        rms = (resid.float().pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
        return norm.weight.float() / rms

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
        for name, parameter in self.hf.named_parameters():
            flat = parameter.detach().flatten()
            sample = flat[:: max(1, flat.numel() // 1024)].float().cpu().contiguous()
            digest.update(name.encode() + str(tuple(parameter.shape)).encode() + sample.numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def kernel(self) -> str:
        """transformers' name of the attention kernel."""
        return str(self.hf.config._attn_implementation)

    def _module(self, path: str) -> Any:
        return self.hf.get_submodule(path)

    def _projection(self, layer: int, name: str) -> Any:
        if not 0 <= layer < self.dims.n_layers:
            raise SiteError(f"there is no layer {layer}: the model has layers 0 to {self.dims.n_layers - 1}")
        return self._module(f"{self.arch.layer(layer)}.self_attn.{name}_proj")

    def _read_by_kv(self, layer: int, name: str, per_query_head: bool) -> Float[Tensor, "heads d_model d_head"]:
        repeat = self.dims.n_heads // self.dims.n_kv_heads if per_query_head else 1
        return by_head(linear_weight(self._projection(layer, name)), self.dims.n_kv_heads, repeat)

    def _bias_by_head(self, layer: int, name: str, heads: int) -> Float[Tensor, "heads d_head"] | None:
        bias = linear_bias(self._projection(layer, name))
        return None if bias is None else bias.unflatten(0, (heads, -1))

    def _repr_html_(self) -> str:
        more = {"parameters": sum(p.numel() for p in self.hf.parameters()), "attention kernel": self.kernel}
        more |= {"dtype": str(self.dtype).removeprefix("torch."), "device": str(self.device)}
        rows = list(({"family": self.arch.family} | asdict(self.dims) | more).items())
        return html_table(("", "value"), rows, f"Model {self.name}")

    def __repr__(self) -> str:
        d = self.dims
        heads = f"{d.n_heads} heads" + (f" ({d.n_kv_heads} kv)" if d.n_kv_heads != d.n_heads else "")
        return (
            f"Model {self.name}: {self.arch.family}, {d.n_layers} layers, {heads}, d_model {d.d_model},"
            f" vocab {d.vocab}, context {d.context}, {str(self.dtype).removeprefix('torch.')} on {self.device}"
        )


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
