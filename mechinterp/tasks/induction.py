"""Repeated random tokens (Olsson et al. 2022): the second half can be foretold by copying from the first."""

from typing import TYPE_CHECKING, Any

import torch

from mechinterp.core.examples import Examples
from mechinterp.errors import ExamplesError

if TYPE_CHECKING:
    from mechinterp.model.model import Model
else:
    Model = Any


def induction(model: Model, n: int = 16, length: int = 24, seed: int = 0, control: bool = False) -> Examples:
    """`n` sequences of `length` random tokens, said twice; no token occurs twice within a half.

    A BOS stands in front where the tokenizer adds one. Spans: ``first`` and ``second`` half. Labels:
    ``"repeated"``, and with `control` as many sequences again, labelled ``"control"``, whose second
    half is new: the same text without the repetition.

    Raises:
        ExamplesError: the vocabulary is too small for `length` distinct tokens.
    """
    tokenizer: Any = model.tokenizer
    special = set() if tokenizer is None else set(tokenizer.all_special_ids)
    bos: list[int] = []
    if tokenizer is not None and tokenizer.bos_token_id is not None:
        built = tokenizer("a")["input_ids"]
        bos = [built[0]] if built[0] == tokenizer.bos_token_id else []
    # A vocabulary may be padded with rows that stand for no token.
    known = model.dims.vocab if tokenizer is None else min(model.dims.vocab, len(tokenizer))
    usable = torch.tensor([i for i in range(known) if i not in special])
    if len(usable) < 2 * length:
        raise ExamplesError(f"{len(usable)} ordinary tokens are too few for 2 × {length} distinct ones; shorten length")
    generator = torch.Generator().manual_seed(seed)
    rows: list[list[int]] = []
    others: list[list[int]] = []
    for _ in range(n):
        drawn = usable[torch.randperm(len(usable), generator=generator)[: 2 * length]].tolist()
        rows.append([*bos, *drawn[:length], *drawn[:length]])
        others.append([*bos, *drawn])
    texts = rows + (others if control else [])
    start = len(bos)
    return Examples.of(
        texts,
        labels=["repeated"] * n + ["control"] * (len(texts) - n),
        spans={
            "first": [(start, start + length)] * len(texts),
            "second": [(start + length, start + 2 * length)] * len(texts),
        },
    )
