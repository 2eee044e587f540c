"""Fine-tuning a low-rank adapter so that a causal language model answers with label words."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from mechinterp.core.examples import Examples
from mechinterp.errors import ExamplesError, ModelError
from mechinterp.model.model import Model
from mechinterp.report.files import check_target, whole_folder
from mechinterp.studies.classification import Labelling
from mechinterp.studies.predictions import answer_ids
from mechinterp.studies.training import Training, train, with_adapter

MARKER = "training.json"
IGNORED = -100
"""A target of no loss, as in transformers and torch."""


def finetune(
    model: Model,
    texts: Any,
    labels: Sequence[str] | Mapping[str, str],
    template: str = "{text}",
    *,
    gold: Sequence[Any] | None = None,
    out: str | Path,
    answer: str = " {label}",
    chat: bool = False,
    system: str | None = None,
    training: Training = Training(),
    told: Callable[[str], None] | None = None,
) -> Model:
    """Train a LoRA adapter so that the model answers the prompt with the right label.

    Only the label's tokens (and, in a chat, none of the template's after them) have a loss: the target of every token
    of the prompt is -100. The adapter is saved in `out` as PEFT does, with ``training.json``: what was asked, and the
    loss of every step. What is interrupted goes on where it was when it is called again with the same arguments, and
    what is finished is not trained again.

    Args:
        texts: strings, or `Examples` whose labels are what is right.
        labels, template, answer, chat, system: as for `classify`.
        gold: the right label of each text.
        out: folder of the adapter; new, empty, or of an earlier training, which is replaced.
        told: called with a sentence about how the training goes, now and then.
    Returns:
        The model with the adapter. It shares all weights with the given one, which has the adapter from now on, too;
        `Model.without_adapter` is what it was before.
    Raises:
        ConfigurationError: a number that cannot be used.
        ExamplesError: as for `classify`; all texts have the same right label; a prompt that is too long.
        ModelError: the model has an adapter already, is a classifier, or has none of the layers named.
        OutputError: the folder holds something else, or the beginning of another training.
    """
    say = told or (lambda _: None)
    if model.peft is not None:
        raise ModelError(f"{model.name} has an adapter already; load it without one to train another")
    if model.dims.n_labels is not None:
        raise ModelError(f"{model.name} is a classifier, whose labels are no words; give a causal language model")
    check_target(out, MARKER)
    labelling = Labelling.of(model, labels, template, answer, chat, system)
    raw = texts if isinstance(texts, Examples) else Examples.of(texts)
    right = labelling.right(raw.labels if gold is None else gold, len(raw))
    names = [labelling.names[i] for i in right]
    if len(set(names)) < 2:
        raise ExamplesError(
            f"every text has the label {names[0]!r}, so there is nothing to learn; add texts of another"
        )
    sequences = _sequences(model, labelling, raw, names)
    before = {parameter: parameter.requires_grad for parameter in model.hf.parameters()}
    peft = with_adapter(model, training)
    trained = Model(peft, model.tokenizer, model.name)
    key = _key(trained, training, sequences)
    target = Path(out).expanduser().resolve()
    state = target.with_name(f"{target.name}.training")
    try:
        if (losses := _finished(target, key, trained)) is None:

            def loss_of(some: Sequence[int]) -> Tensor:
                return _loss(trained, [sequences[i] for i in some])

            losses, _ = train(trained, training, len(sequences), loss_of, state, key, say)
    except BaseException:
        peft.unload()
        for parameter, learns in before.items():
            parameter.requires_grad_(learns)
        raise
    for parameter in trained.hf.parameters():
        parameter.requires_grad_(False)
    with whole_folder(out, MARKER) as folder:
        # False: "auto" would ask the hub whether the base's vocabulary has changed.
        peft.save_pretrained(str(folder), save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # an empty form
        files = sorted([path.name for path in folder.iterdir()] + [MARKER])
        about = {
            "format": "mechinterp-adapter-1",
            "key": key,
            "model": model.name,
            "examples": len(sequences),
            "labels": dict(labelling.words),
            "template": template,
            "answer": answer,
            "training": asdict(training),
            "loss": losses,
            "files": files,
        }
        (folder / MARKER).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(state, ignore_errors=True)
    return trained


Sequences = list[tuple[tuple[int, ...], tuple[int, ...]]]
"""(prompt, label), as token ids."""


def _sequences(model: Model, labelling: Labelling, texts: Examples, names: Sequence[str]) -> Sequences:
    prompts = labelling.prompts(texts)
    tokens = model.tokenize(prompts)
    out: Sequences = []
    for i, (text, ids, name) in enumerate(zip(prompts.texts, tokens.ids, names, strict=True)):
        label = answer_ids(model.tokenizer, text, ids, labelling.answer.replace("{label}", labelling.words[name]))
        if len(ids) + len(label) > model.dims.context:
            raise ExamplesError(
                f"example {i} has {len(ids) + len(label)} tokens with its label, more than the model's context of"
                f" {model.dims.context}; shorten it"
            )
        out.append((ids, label))
    return out


def _key(model: Model, training: Training, sequences: Sequences) -> str:
    """What a training depends on; the adapter's first weights, which the seed gives, are part of the fingerprint."""
    told = repr((model.fingerprint, str(model.dtype), asdict(training), sequences))
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def padded(sequences: Sequences, pad: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and targets, ``example pos``, padded on the left; targets are -100 but at the labels."""
    width = max(len(prompt) + len(label) for prompt, label in sequences)
    ids = torch.full((len(sequences), width), pad)
    targets = torch.full_like(ids, IGNORED)
    mask = torch.zeros_like(ids)
    for i, (prompt, label) in enumerate(sequences):
        whole = (*prompt, *label)
        ids[i, width - len(whole) :] = torch.tensor(whole)
        mask[i, width - len(whole) :] = 1
        targets[i, width - len(label) :] = torch.tensor(label)
    return ids.to(device), mask.to(device), targets.to(device)


def _loss(model: Model, batch: Sequences) -> Tensor:
    """Mean cross-entropy of the labels' tokens, in nats; logits are made at the labels alone."""
    pad = getattr(model.tokenizer, "pad_token_id", None)
    ids, mask, targets = padded(batch, 0 if pad is None else pad, model.device)
    kept = max(len(label) for _, label in batch) + 1
    out = model.hf(input_ids=ids, attention_mask=mask, logits_to_keep=kept, use_cache=False)
    logits, wanted = out.logits[:, :-1].float(), targets[:, -kept + 1 :]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=IGNORED)


def _finished(folder: Path, key: str, model: Model) -> list[float] | None:
    """The losses of a training that was the same, whose adapter is put into the model; None if there was none."""
    import peft

    try:
        about = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        if about["key"] != key:
            return None
        weights = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError):
        return None
    peft.set_peft_model_state_dict(model.peft, weights)
    return [float(loss) for loss in about["loss"]]
