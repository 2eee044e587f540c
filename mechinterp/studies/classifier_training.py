"""Training a classifier: a linear head on the last token's state, with a low-rank adapter below it or without."""

import hashlib
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.core.examples import Examples
from mechinterp.errors import ConfigurationError, ExamplesError, ModelError
from mechinterp.model.classifier import MARKER, save_classifier, with_head
from mechinterp.model.model import Model
from mechinterp.report.files import check_target
from mechinterp.studies.training import Training, train, with_adapter


def train_classifier(
    model: Model,
    texts: Any,
    gold: Sequence[Any],
    *,
    out: str | Path,
    labels: Sequence[str] | None = None,
    adapter: bool = True,
    class_weights: Literal["balanced"] | Mapping[str, float | int] | None = None,
    held_out: float = 0.2,
    patience: int = 2,
    training: Training = Training(),
    told: Callable[[str], None] | None = None,
    progress: bool = False,
) -> Model:
    """Train a linear head on a causal model's last token, and LoRA below it, and save both in `out`.

        classifier = mi.train_classifier(model, texts, gold, out="classifier", training=mi.studies.Training(epochs=3))

    Of a share of the texts that is held out, evenly by label, the loss is taken after every epoch; after `patience`
    epochs without a better one training ends, and the best epoch's weights stay. What is interrupted goes on where it
    was when the same is called again. `load_classifier` opens the folder.

    Args:
        gold: the right label of each text.
        labels: all labels, in the order of the head's outputs; by default those of `gold`, sorted.
        adapter: False trains the head alone, on states that are computed once.
        class_weights: of the loss: ``"balanced"``, n / (labels × texts of the label), or a mapping.
        held_out: share of the texts; 0 for none, and then every epoch is trained.
        patience: epochs without a better held-out loss after which it ends; 0 for never.
        training: rank, learning rate, epochs, batch size and seed. Without an adapter the rate is that of the head,
            for which 1e-2 and more epochs are usual.
        told: called with a sentence about how it goes, now and then.
        progress: show a bar on a terminal.
    Returns:
        The classifier, which takes over the model: its decoder has the adapter from now on.
    Raises:
        ExamplesError: texts and `gold` do not match, one label only, one that is not in `labels` or has no text, too
            few to hold any out, or an empty or too long text. ModelError: the model is a classifier, has an adapter, or
            its loss is not finite. ConfigurationError: a number that cannot be used. OutputError: the folder
            holds something else, or the beginning of another training. Nothing half-trained is ever saved there.
    """
    say = told or (lambda _: None)
    if model.peft is not None:
        raise ModelError(f"{model.name} has an adapter already; load it without one to train another")
    if not 0 <= held_out < 1 or patience < 0:
        raise ConfigurationError(f"held_out is from 0 to below 1 and patience 0 or more. Got {held_out} and {patience}")
    check_target(out, MARKER)
    raw = texts if isinstance(texts, Examples) else Examples.of(texts)
    names, right = _right(raw, gold, labels)
    ids = model.tokenize(Examples.of(raw.texts)).ids
    weights = _weights(class_weights, names, right)
    held, kept = _split(right, held_out, training.seed)
    generator = torch.Generator().manual_seed(training.seed)
    first = torch.randn(len(names), model.dims.d_model, generator=generator) / model.dims.d_model**0.5
    head = torch.nn.Linear(model.dims.d_model, len(names), device="meta")
    head.weight, head.bias = torch.nn.Parameter(first), torch.nn.Parameter(torch.zeros(len(names)))
    before = {parameter: parameter.requires_grad for parameter in model.hf.parameters()}
    if adapter:
        model = Model(with_adapter(model, training), model.tokenizer, model.name)
    else:
        for parameter in before:
            parameter.requires_grad_(False)
    made = with_head(model, head, names)
    for parameter in made.hf.score.parameters():
        parameter.requires_grad_(True)
    told_of = repr((made.fingerprint, asdict(training), ids, right, weights, held, patience, adapter))
    key = hashlib.sha256(told_of.encode()).hexdigest()[:16]
    target = Path(out).expanduser().resolve()
    state = target.with_name(f"{target.name}.training")
    targets, balance = torch.tensor(right), torch.tensor(weights)
    states = None if adapter else _states(made, ids, training.batch_size)

    def loss_of(some: Sequence[int]) -> Tensor:
        last = _last(made, [ids[i] for i in some]) if states is None else states[list(some)]
        logits = made.hf.score(last).float()
        wanted, scale = targets[list(some)].to(logits.device), balance[list(some)].to(logits.device)
        each = torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
        return (each * scale).mean()

    @torch.no_grad()
    def check() -> float:
        parts = [held[i : i + training.batch_size] for i in range(0, len(held), training.batch_size)]
        return float(sum(loss_of(part) * len(part) for part in parts) / len(held))

    try:
        train(
            made, training, len(kept), lambda some: loss_of([kept[i] for i in some]), state, key, say,
            check if held else None, patience, progress,
        )  # fmt: skip
    except BaseException:
        if made.peft is not None:
            made.peft.base_model.model = model.hf
            made.peft.unload()
        for parameter, learns in before.items():
            parameter.requires_grad_(learns)
        raise
    for parameter in made.hf.parameters():
        parameter.requires_grad_(False)
    save_classifier(made, out)
    shutil.rmtree(state, ignore_errors=True)
    return made


def _right(texts: Examples, gold: Sequence[Any], labels: Sequence[str] | None) -> tuple[list[str], list[int]]:
    """Names of the labels, and the number of each text's."""
    if len(gold) != len(texts):
        raise ExamplesError(f"gold has {len(gold)} entries for {len(texts)} texts; give one for each")
    said = [str(one) for one in gold]
    names = sorted(set(said)) if labels is None else [str(one) for one in labels]
    if odd := next((one for one in said if one not in names), None):
        raise ExamplesError(f"a text has the label {odd!r}, which is none of {', '.join(names)}; add it to labels")
    if len(names) < 2:
        raise ExamplesError(f"every text has the label {names[0]!r}, so nothing can be learnt; add texts of another")
    if gone := [name for name in names if name not in said]:
        raise ExamplesError(f"no text has the label {gone[0]!r}; add some, or leave it out")
    return names, [names.index(one) for one in said]


def _weights(asked: Any, names: Sequence[str], right: Sequence[int]) -> list[float]:
    """Of each text."""
    if asked is None:
        return [1.0] * len(right)
    count = Counter(right)
    if asked == "balanced":
        each = [len(right) / (len(names) * count[i]) for i in range(len(names))]
    else:
        if missing := [name for name in names if name not in asked]:
            raise ConfigurationError(f"class_weights has none for {missing[0]!r}; give one for each label")
        each = [float(asked[name]) for name in names]
        if min(each) < 0 or not max(each) > 0:
            raise ConfigurationError(f"class_weights must be 0 or more, and one above 0. Got {dict(asked)}")
    return [each[i] for i in right]


def _split(right: Sequence[int], share: float, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the texts held out, evenly by label, and of the others."""
    if not share:
        return [], list(range(len(right)))
    rng = np.random.default_rng(seed)
    held: list[int] = []
    for label in sorted(set(right)):
        some = rng.permutation([i for i, one in enumerate(right) if one == label])
        n = round(share * len(some))
        if not 0 < n < len(some):
            raise ExamplesError(
                f"of {len(some)} texts with one label {share:.0%} cannot be held out; give more texts, or held_out=0"
            )
        held += some[:n].tolist()
    out = sorted(held)
    return out, [i for i in range(len(right)) if i not in set(out)]


def _last(model: Model, rows: Sequence[Sequence[int]]) -> Float[Tensor, "text d_model"]:
    """Final states of the last tokens."""
    width = max(map(len, rows))
    ids = torch.tensor([[*[0] * (width - len(row)), *row] for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    decoder = model.hf.get_submodule(model.arch.base)
    return decoder(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state[:, -1]


@torch.no_grad()
def _states(model: Model, ids: Sequence[Sequence[int]], size: int) -> Float[Tensor, "text d_model"]:
    """The same of all texts, those of like length together."""
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    found = [_last(model, [ids[i] for i in order[k : k + size]]) for k in range(0, len(order), size)]
    return torch.cat(found)[torch.tensor(order).argsort().to(model.device)]
