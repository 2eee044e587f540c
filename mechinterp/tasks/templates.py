"""Templates of prompts: filled slots whose characters are known, and words that take up as many tokens."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mechinterp.core.tokens import Span

if TYPE_CHECKING:
    from mechinterp.model.model import Model
else:
    Model = Any


def fill(template: str, words: Mapping[str, str]) -> tuple[str, dict[str, Span]]:
    """The text with a word in every ``{slot}``, and the characters that each word takes."""
    text, where = template, dict[str, Span]()
    for slot in sorted(words, key=lambda s: template.index(f"{{{s}}}")):
        start = text.index(f"{{{slot}}}")
        text = text.replace(f"{{{slot}}}", words[slot], 1)
        where[slot] = (start, start + len(words[slot]))
    return text, where


def size(phrase: str, model: Model | None) -> int:
    """Tokens that a phrase adds to a text, after a space; without a model (or its tokenizer), its words."""
    tokenizer: Any = None if model is None else model.tokenizer
    if tokenizer is None:
        return len(phrase.split())
    # in a text, because some tokenizers put a space of their own before what stands alone
    alone, longer = (len(tokenizer(text)["input_ids"]) for text in ("the", f"the {phrase}"))
    return longer - alone
