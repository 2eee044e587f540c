"""Fine-tuning a low-rank adapter so that a causal language model answers with label words."""

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from mechinterp.core.examples import Examples
from mechinterp.errors import ConfigurationError, ExamplesError, ModelError, OutputError
from mechinterp.model.model import Model
from mechinterp.report.files import check_target, explained, whole_folder
from mechinterp.studies.classification import Labelling
from mechinterp.studies.predictions import answer_ids

MARKER = "training.json"
STATE = "training.safetensors"
IGNORED = -100
"""A target of no loss, as in transformers and torch."""
KEEP_EVERY = 25
"""Steps between what is kept to go on from."""
LARGEST_GRADIENT = 1.0
WARM_UP = 0.05
"""Share of the steps in which the learning rate rises."""


@dataclass(frozen=True)
class Training:
    """How an adapter is trained: LoRA (Hu et al. 2021) by AdamW, with a learning rate that rises, then falls to 0.

    Attributes:
        rank: of the two factors that are added to each weight.
        alpha: the sum is scaled by alpha / rank.
        targets: names of the linear layers that get factors; all of the model but the unembedding by default.
        learning_rate: its highest value.
        epochs: times that every example is seen.
        batch_size: examples a step.
        seed: of the factors and of the order of examples.
    Raises:
        ConfigurationError: a number that cannot be used.
    """

    rank: int = 8
    alpha: int = 16
    targets: str | tuple[str, ...] = "all-linear"
    learning_rate: float = 2e-4
    epochs: int = 1
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rank", "alpha", "learning_rate", "epochs", "batch_size"):
            if not getattr(self, name) > 0:
                raise ConfigurationError(f"The {name} of Training must be above 0. Got {getattr(self, name)}")


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
    peft = _with_adapter(model, training)
    trained = Model(peft, model.tokenizer, model.name)
    key = _key(trained, training, sequences)
    target = Path(out).expanduser().resolve()
    state = target.with_name(f"{target.name}.training")
    try:
        if (losses := _finished(target, key, trained)) is None:
            losses = _train(trained, training, sequences, state, key, say)
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


def _with_adapter(model: Model, training: Training) -> Any:
    """PEFT's model around it, with new factors: the first random by the seed, the second 0."""
    import peft

    if getattr(model.hf, "is_loaded_in_4bit", False) or getattr(model.hf, "is_loaded_in_8bit", False):
        peft.prepare_model_for_kbit_training(model.hf, use_gradient_checkpointing=False)
    wanted = training.targets if isinstance(training.targets, str) else list(training.targets)
    config = peft.LoraConfig(
        task_type=peft.TaskType.CAUSAL_LM, r=training.rank, lora_alpha=training.alpha, target_modules=wanted
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft's, about a name in transformers
        torch.manual_seed(training.seed)
        try:
            wrapped: Any = peft.get_peft_model(model.hf, config)
        except ValueError as error:
            raise ModelError(f"{model.name} cannot be given an adapter: {error}; name other targets") from None
    wrapped.peft_config["default"].base_model_name_or_path = model.name
    return wrapped


def _key(model: Model, training: Training, sequences: Sequences) -> str:
    """What a training depends on; the adapter's first weights, which the seed gives, are part of the fingerprint."""
    told = repr((model.fingerprint, str(model.dtype), asdict(training), sequences))
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _train(
    model: Model, training: Training, sequences: Sequences, folder: Path, key: str, say: Callable[[str], None]
) -> list[float]:
    """Train in place; the loss of every step."""
    parameters = {name: p for name, p in model.hf.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=training.learning_rate, weight_decay=0.0)
    steps = list(_batches(len(sequences), training))
    losses = _resume(folder, key, parameters, optimizer)
    if losses:
        say(f"going on after step {len(losses)} of {len(steps)}")
    rising = max(1, round(WARM_UP * len(steps)))
    for step in range(len(losses), len(steps)):
        rate = min((step + 1) / rising, (len(steps) - step) / max(1, len(steps) - rising))
        optimizer.param_groups[0]["lr"] = training.learning_rate * rate
        loss = _loss(model, [sequences[i] for i in steps[step]])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), LARGEST_GRADIENT)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        if not np.isfinite(losses[-1]):
            raise ModelError(
                f"the loss of step {step} is {losses[-1]}; lower the learning rate, {training.learning_rate:g}"
            )
        if (step + 1) % KEEP_EVERY == 0 or step + 1 == len(steps):
            _keep(folder, key, parameters, optimizer, losses)
            recent = float(np.mean(losses[-KEEP_EVERY:]))
            say(f"step {step + 1} of {len(steps)}, loss {recent:.3f}")
    return losses


def _batches(n: int, training: Training) -> Iterator[list[int]]:
    """Which examples each step sees: every epoch in another order."""
    for epoch in range(training.epochs):
        order = np.random.default_rng((training.seed, epoch)).permutation(n).tolist()
        for start in range(0, n, training.batch_size):
            yield order[start : start + training.batch_size]


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


def _keep(
    folder: Path, key: str, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, losses: Sequence[float]
) -> None:
    """The adapter and the optimizer's moments, to go on from."""
    tensors = {f"{name}|weight": p.detach().cpu().contiguous() for name, p in parameters.items()}
    for name, p in parameters.items():
        tensors |= {f"{name}|{what}": value.cpu().contiguous() for what, value in optimizer.state[p].items()}
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        scratch = folder / f"{STATE}.new"
        safetensors.torch.save_file(tensors, scratch, {"key": key, "loss": json.dumps(list(losses))})
        scratch.replace(folder / STATE)


def _resume(folder: Path, key: str, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> list[float]:
    """Put back what was kept; the losses so far.

    Raises:
        OutputError: it is of another training, or damaged.
    """
    file = folder / STATE
    if not file.is_file():
        return []
    try:
        with safetensors.safe_open(file, "pt") as kept:
            about = kept.metadata() or {}
            tensors = {name: kept.get_tensor(name) for name in kept.keys()}  # noqa: SIM118
        losses = [float(loss) for loss in json.loads(about["loss"])]
    except Exception as error:
        raise OutputError(f"{file} cannot be read ({type(error).__name__}: {error}); delete {folder}") from error
    if about.get("key") != key:
        raise OutputError(f"{folder} is the beginning of another training; delete it, or choose another folder")
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(tensors[f"{name}|weight"])
            moments = {part: tensors[f"{name}|{part}"] for part in ("step", "exp_avg", "exp_avg_sq")}
            optimizer.state[p] = {part: t if part == "step" else t.to(p.device) for part, t in moments.items()}
    return losses
