"""For tests, ours and yours: tiny random models of every family, and a count of hooks."""

import re
from typing import Any

import torch

from mechinterp.errors import ModelError
from mechinterp.model.architecture import FAMILIES
from mechinterp.model.model import Model
from mechinterp.tasks.agreement import WORDS as AGREEMENT
from mechinterp.tasks.capitals import WORDS as CAPITALS
from mechinterp.tasks.greater_than import WORDS as YEARS
from mechinterp.tasks.ioi import NAMES, OBJECTS, PLACES, TEMPLATES


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
    family: str = "llama", *, seed: int = 0, layers: int = 3, dtype: torch.dtype = torch.float32, **config: Any
) -> Model:
    """A random model of a family, small enough to run hundreds of times: 4 heads in 2 groups, d_model 32.

    Weights are drawn with a standard deviation of 0.2, so that every part of the model matters. The
    tokenizer knows the words of the tasks, each with its leading space, and single characters.

    Args:
        config: more of the Hugging Face configuration, such as ``attention_bias=True``; with
            ``num_labels`` the model is a classifier.
    Raises:
        ModelError: the family is not in the architecture table.
    """
    import transformers

    if family not in FAMILIES:
        raise ModelError(f"The family of tiny must be one of {', '.join(FAMILIES)}. Got {family!r}")
    tokenizer = _tokenizer()
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


def hook_count(hf: torch.nn.Module) -> int:
    """Forward hooks on all modules; equal before and after everything that mechinterp does."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in hf.modules())


def _tokenizer() -> Any:
    import tokenizers
    import transformers

    pattern = r" ?[A-Za-z]+|[^A-Za-z]"
    tasks = [*NAMES, *PLACES, *OBJECTS, "A B S", *TEMPLATES, AGREEMENT, CAPITALS, YEARS]
    texts = re.sub(r"[{}]", "", " ".join(tasks))
    characters = [chr(i) for i in range(32, 127)] + ["\n"]
    pieces = dict.fromkeys(["<pad>", "<unk>", *characters, *(re.findall(pattern, texts + " " + texts))])
    words = dict.fromkeys([*pieces, *(p.strip() for p in pieces if p.strip()), *(f" {p.strip()}" for p in pieces)])
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
