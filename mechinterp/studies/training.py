"""Training of a low-rank adapter, step by step, so that what is interrupted goes on where it was."""

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from mechinterp.engine.progress import Bar
from mechinterp.errors import ConfigurationError, ModelError, OutputError
from mechinterp.model.model import Model
from mechinterp.report.files import explained

STATE = "training.safetensors"
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


def with_adapter(model: Model, training: Training) -> Any:
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


def train(
    model: Model,
    training: Training,
    n: int,
    loss_of: Callable[[Sequence[int]], Tensor],
    folder: Path,
    key: str,
    say: Callable[[str], None],
    check: Callable[[], float] | None = None,
    patience: int = 0,
    progress: bool = False,
) -> tuple[list[float], list[float]]:
    """Train whatever of the model has gradients, in place.

    Args:
        n: examples.
        loss_of: the mean loss of some of them, by number.
        folder: where the state is kept from time to time, to go on from; it stays.
        key: what the training depends on; a state of another is refused.
        check: a loss on examples held out, asked for after every epoch.
        patience: epochs without a better one after which to stop; the weights of the best are put back.
        progress: show a bar on a terminal.
    Returns:
        The loss of every step, and that of the examples held out after every epoch.
    """
    parameters = {name: p for name, p in model.hf.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=training.learning_rate, weight_decay=0.0)
    steps = list(_batches(n, training))
    ends = set(np.cumsum([-(-n // training.batch_size)] * training.epochs).tolist())
    best: dict[str, Tensor] = {}
    held: list[float] = []
    losses = _resume(folder, key, parameters, optimizer, best, held)
    if losses:
        say(f"going on after step {len(losses)} of {len(steps)}")
    rising = max(1, round(WARM_UP * len(steps)))
    with Bar() if progress else nullcontext() as bar:
        if bar is not None:
            bar.start("training: steps", len(steps) - len(losses))
        for step in range(len(losses), len(steps)):
            rate = min((step + 1) / rising, (len(steps) - step) / max(1, len(steps) - rising))
            optimizer.param_groups[0]["lr"] = training.learning_rate * rate
            if _done(held, patience):
                break
            loss = loss_of(steps[step])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters.values(), LARGEST_GRADIENT)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(loss.detach()))
            if not np.isfinite(losses[-1]):
                raise ModelError(
                    f"the loss of step {step} is {losses[-1]}; lower the learning rate, {training.learning_rate:g}"
                )
            if check is not None and step + 1 in ends:
                held.append(check())
                if held[-1] == min(held):
                    best = {name: p.detach().clone() for name, p in parameters.items()}
            if (step + 1) % KEEP_EVERY == 0 or step + 1 in ends:
                _keep(folder, key, parameters, optimizer, best, losses, held)
                recent = float(np.mean(losses[-KEEP_EVERY:]))
                more = f", held out {held[-1]:.3f}" if held else ""
                say(f"step {step + 1} of {len(steps)}, loss {recent:.3f}{more}")
            if bar is not None:
                bar.advance("step", 1)
    with torch.no_grad():
        for name, value in best.items():
            parameters[name].copy_(value)
    return losses, held


def _done(held: Sequence[float], patience: int) -> bool:
    """Whether so many epochs have brought nothing better."""
    return bool(patience and held) and len(held) - 1 - int(np.argmin(held)) >= patience


def _batches(n: int, training: Training) -> Iterator[list[int]]:
    """Which examples each step sees: every epoch in another order."""
    for epoch in range(training.epochs):
        order = np.random.default_rng((training.seed, epoch)).permutation(n).tolist()
        for start in range(0, n, training.batch_size):
            yield order[start : start + training.batch_size]


def _keep(
    folder: Path,
    key: str,
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    best: Mapping[str, Tensor],
    losses: Sequence[float],
    held: Sequence[float],
) -> None:
    """What is trained, the optimizer's moments and the best so far, to go on from."""
    tensors = {f"{name}|weight": p.detach().cpu().contiguous() for name, p in parameters.items()}
    for name, p in parameters.items():
        tensors |= {f"{name}|{what}": value.cpu().contiguous() for what, value in optimizer.state[p].items()}
    tensors |= {f"{name}|best": value.cpu().contiguous() for name, value in best.items()}
    about = {"key": key, "loss": json.dumps(list(losses)), "held": json.dumps(list(held))}
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        scratch = folder / f"{STATE}.new"
        safetensors.torch.save_file(tensors, scratch, about)
        scratch.replace(folder / STATE)


def _resume(
    folder: Path,
    key: str,
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    best: dict[str, Tensor],
    held: list[float],
) -> list[float]:
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
        held += [float(loss) for loss in json.loads(about.get("held", "[]"))]
    except Exception as error:
        raise OutputError(f"{file} cannot be read ({type(error).__name__}: {error}); delete {folder}") from error
    if about.get("key") != key:
        raise OutputError(f"{folder} is the beginning of another training; delete it, or choose another folder")
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(tensors[f"{name}|weight"])
            moments = {part: tensors[f"{name}|{part}"] for part in ("step", "exp_avg", "exp_avg_sq")}
            if f"{name}|best" in tensors:
                best[name] = tensors[f"{name}|best"].to(p.device)
            optimizer.state[p] = {part: t if part == "step" else t.to(p.device) for part, t in moments.items()}
    return losses
