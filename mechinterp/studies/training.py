"""Training of a low-rank adapter, step by step, so that what is interrupted goes on where it was."""

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
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
    state = _State.of(model, training, folder, key)
    steps = list(_batches(n, training))
    ends = set(np.cumsum([-(-n // training.batch_size)] * training.epochs).tolist())
    state.resume()
    losses, held = state.losses, state.held
    if losses:
        say(f"going on after step {len(losses)} of {len(steps)}")
    rising = max(1, round(WARM_UP * len(steps)))
    with Bar() if progress else nullcontext() as bar:
        if bar is not None:
            bar.start("training: steps", len(steps) - len(losses))
        for step in range(len(losses), len(steps)):
            rate = min((step + 1) / rising, (len(steps) - step) / max(1, len(steps) - rising))
            if _done(held, patience):
                break
            losses.append(state.step(loss_of(steps[step]), training.learning_rate * rate))
            if not np.isfinite(losses[-1]):
                raise ModelError(
                    f"the loss of step {step} is {losses[-1]}; lower the learning rate, {training.learning_rate:g}"
                )
            if check is not None and step + 1 in ends:
                state.judge(check())
            if (step + 1) % KEEP_EVERY == 0 or step + 1 in ends:
                state.keep()
                recent = float(np.mean(losses[-KEEP_EVERY:]))
                more = f", held out {held[-1]:.3f}" if held else ""
                say(f"step {step + 1} of {len(steps)}, loss {recent:.3f}{more}")
            if bar is not None:
                bar.advance("step", 1)
    with torch.no_grad():
        for name, value in state.best.items():
            state.parameters[name].copy_(value)
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


@dataclass
class _State:
    """Where a training is, and where that is kept.

    Attributes:
        parameters: what is trained, by name.
        best: the same as it was after the best epoch.
        losses: of every step so far.
        held: on the examples held out, of every epoch so far.
    """

    parameters: dict[str, torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    folder: Path
    key: str
    best: dict[str, Tensor] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    held: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, model: Model, training: Training, folder: Path, key: str) -> "_State":
        parameters = {name: p for name, p in model.hf.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(parameters.values(), lr=training.learning_rate, weight_decay=0.0)
        return cls(parameters, optimizer, folder, key)

    def step(self, loss: Tensor, rate: float) -> float:
        """One step down the loss, which is returned."""
        self.optimizer.param_groups[0]["lr"] = rate
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), LARGEST_GRADIENT)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    def judge(self, loss: float) -> None:
        """Take in an epoch's loss on the examples held out."""
        self.held.append(loss)
        if loss == min(self.held):
            self.best = {name: p.detach().clone() for name, p in self.parameters.items()}

    def keep(self) -> None:
        """Write what is trained, the optimizer's moments and the best so far, to go on from."""
        tensors = {f"{name}|weight": p.detach().cpu().contiguous() for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            moments = self.optimizer.state[p].items()
            tensors |= {f"{name}|{what}": value.cpu().contiguous() for what, value in moments}
        tensors |= {f"{name}|best": value.cpu().contiguous() for name, value in self.best.items()}
        about = {"key": self.key, "loss": json.dumps(self.losses), "held": json.dumps(self.held)}
        with explained(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            scratch = self.folder / f"{STATE}.new"
            safetensors.torch.save_file(tensors, scratch, about)
            scratch.replace(self.folder / STATE)

    def resume(self) -> None:
        """Put back what was kept, if anything was.

        Raises:
            OutputError: it is of another training, or damaged.
        """
        file = self.folder / STATE
        if not file.is_file():
            return
        try:
            with safetensors.safe_open(file, "pt") as kept:
                about = kept.metadata() or {}
                tensors = {name: kept.get_tensor(name) for name in kept.keys()}  # noqa: SIM118
            losses, held = (list(map(float, json.loads(about[name]))) for name in ("loss", "held"))
        except Exception as error:
            raise OutputError(
                f"{file} cannot be read ({type(error).__name__}: {error}); delete {self.folder}"
            ) from error
        if about.get("key") != self.key:
            raise OutputError(
                f"{self.folder} is the beginning of another training; delete it, or choose another folder"
            )
        self.losses, self.held = losses, held
        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(tensors[f"{name}|weight"])
                moments = {part: tensors[f"{name}|{part}"] for part in ("step", "exp_avg", "exp_avg_sq")}
                if f"{name}|best" in tensors:
                    self.best[name] = tensors[f"{name}|best"].to(p.device)
                self.optimizer.state[p] = {part: t if part == "step" else t.to(p.device) for part, t in moments.items()}
