"""Named linear functions of what is at a site: what a probe reads there, and the directions that it reads along."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mechinterp.core.interventions import Project, Steer
from mechinterp.core.metrics import Metric, Rows
from mechinterp.core.tokens import TokenBatch
from mechinterp.errors import NeedsError, OutputError, SiteError
from mechinterp.shapes import Scores
from mechinterp.sites import Position, Site

if TYPE_CHECKING:
    from mechinterp.core.result import Result

FORMAT = "mechinterp-linear-probe-1"


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """score = weight · x + bias for each class, of the activation x at a site.

        probe = mi.LinearProbe.of(result, "resid_post.10")
        probe.scores(model.trace(text, probe.site)[probe.site])
        with model.intervene(probe.steer("positive", 4.0)):
            model.generate("I think that")

    Softmax over the scores gives a classifier's probabilities. At a site with heads, such as ``z``, `dim` is of all
    heads laid side by side, and so is a direction.

    Attributes:
        site: without positions.
        classes: their names.
        weight: ``class dim``.
        bias: ``class``.
        taken: which vectors it was fitted on (``positions``, ``pool`` and ``each``, as for `Probe`); empty where that
            is not known.
    """

    site: Site
    classes: tuple[str, ...]
    weight: Float[Tensor, "class dim"]
    bias: Float[Tensor, "class"]
    taken: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        if not len(self.classes) == len(self.weight) == len(self.bias) > 0:
            raise NeedsError(
                f"a LinearProbe must have a row of weights and a bias for each class. Got {len(self.classes)} classes,"
                f" weight {tuple(self.weight.shape)} and bias {tuple(self.bias.shape)}"
            )
        object.__setattr__(self, "site", self.site.at(None))

    @classmethod
    def of(cls, result: "Result", site: Site | str | None = None) -> "LinearProbe":
        """The probe at one site of a result of `Probe` or `ConceptDirections`.

        Args:
            site: by default that with the best held-out score.
        Raises:
            NeedsError: the result has no probes, or none at the site.
        """
        data = result.data
        if "weight" not in data or "bias" not in data or "site" not in data.dims:
            raise NeedsError(f"{result._title()} has no probes; give one of Probe or ConceptDirections")
        names = [str(name) for name in data["site"].values]
        if site is None:
            value: Any = next(data[name] for name in ("accuracy", "r2", "auroc") if name in data)
            value = value.sel(task="labels") if "task" in value.dims else value.mean("class")
            chosen = int(value.argmax("site"))
        else:
            name = str((Site.parse(site) if isinstance(site, str) else site).at(None))
            if name not in names:
                raise NeedsError(f"there is no probe at {name}; there are some at {', '.join(names)}")
            chosen = names.index(name)
        one = data.isel(site=chosen)
        weight, bias = (torch.from_numpy(one[v].values.copy()).float() for v in ("weight", "bias"))
        classes, taken = tuple(map(str, data["class"].values)), dict(result.meta.get("taken", {}))
        return cls(Site.parse(names[chosen]), classes, weight, bias, taken)

    def scores(self, x: Float[Tensor, "..."]) -> Float[Tensor, "... class"]:
        """One number for each class, in float32 (a classifier's log-odds, a regression's value).

        Where the site has heads, x may be as it was read, ``*batch head d_head``.
        """
        if self._heads and x.ndim > 1 and x.shape[-1] != self.weight.shape[1]:
            x = x.flatten(-2)
        if x.shape[-1] != self.weight.shape[1]:
            raise NeedsError(
                f"this probe is of {self.site} with {self.weight.shape[1]} dimensions. Got values of shape"
                f" {tuple(x.shape)}; give what is at that site, of the model it was fitted on"
            )
        return x.float() @ self.weight.to(x.device).T + self.bias.to(x.device)

    def direction(self, name: str | None = None) -> Float[Tensor, "dim"]:
        """The unit vector along which the score of a class grows fastest; of two, that against the other's.

        So it is the gradient of `metric`, at length 1, and what results call the projection of a class.

        Args:
            name: by default the last class.
        """
        one = self._number(name)
        row = self.weight[one] - self.weight[1 - one] if len(self.classes) == 2 else self.weight[one]
        if not float(row.norm()):
            raise NeedsError(f"the weights of {self.classes[one]!r} at {self.site} are all 0; there is no direction")
        return row / row.norm()

    def steer(self, name: str | None = None, strength: float = 1.0, positions: Position | None = None) -> Steer:
        """Adds `strength` along the direction of a class, in activation units, at all positions by default."""
        return Steer(self.site.at(positions), self.direction(name), strength)

    def ablate(self, names: Sequence[str] | None = None, positions: Position | None = None) -> Project:
        """Removes what lies along the directions of classes; all of them by default."""
        some = self.classes if names is None else tuple(names)
        if len(self.classes) == 2:
            some = some[:1]  # the other one's is the same line
        return Project(self.site.at(positions), torch.stack([self.direction(name) for name in some]))

    def metric(self, name: str | None = None, positions: int | str | None = None) -> "ProbeScore":
        """The score of a class as a metric: for sweeps, gradients and `mi.sweep`.

        Args:
            name: by default the last class. Of two classes, the log-odds against the other.
            positions: one token of each example; by default that which the probe was fitted on, or the last.
        Raises:
            NeedsError: the probe was fitted on several tokens of a text, and none is named.
        """
        if positions is None:
            positions = self.taken.get("positions", "end")
            if self.taken.get("each") is not None or positions == "all":
                fitted = "the mean of its texts" if positions == "all" else f"each {self.taken['each']}"
                raise NeedsError(
                    f"the probe at {self.site} was fitted on {fitted}, and a metric is of one token of each example;"
                    " name it, such as positions='end'"
                )
        assert positions is not None
        return ProbeScore(positions, self, self.classes[self._number(name)])

    def check(self, model: Any) -> None:
        """See that it can have been fitted on this `Model`.

        Raises:
            NeedsError: the model has another width at the site.
        """
        width = model.dims.width(self.site)
        if self.weight.shape[1] != width:
            raise NeedsError(
                f"the probe at {self.site} has {self.weight.shape[1]} dimensions and {model.name} has {width} there;"
                " give one that was fitted on this model"
            )

    @property
    def _heads(self) -> bool:
        """Whether the site has an axis of heads."""
        return self.site.spec.head_axis is not None and not isinstance(self.site.heads, int)

    def save(self, path: str | Path) -> Path:
        """Write the probe as one safetensors file, whole or not at all.

        Raises:
            OutputError: it cannot be written.
        """
        to = Path(path)
        about = {"format": FORMAT, "site": str(self.site), "classes": json.dumps(self.classes)}
        about["taken"] = json.dumps(dict(self.taken))
        part = to.with_name(to.name + ".part")
        try:
            to.parent.mkdir(parents=True, exist_ok=True)
            save_file({"weight": self.weight.contiguous(), "bias": self.bias.contiguous()}, part, about)
            part.replace(to)
        except OSError as error:
            raise OutputError(f"cannot write {to}: {error.strerror}; give a path that can be written") from error
        return to

    @classmethod
    def load(cls, path: str | Path) -> "LinearProbe":
        """Read back what `save` wrote.

        Raises:
            OutputError: there is no such file, or it is no probe.
        """
        try:
            with safe_open(str(path), "pt") as file:
                about = file.metadata() or {}
                if about.get("format") != FORMAT:
                    raise OutputError(f"{path} is no probe that LinearProbe.save wrote; give one")
                weight, bias = file.get_tensor("weight"), file.get_tensor("bias")
                classes, taken = tuple(json.loads(about["classes"])), json.loads(about.get("taken", "{}"))
                return cls(Site.parse(about["site"]), classes, weight, bias, taken)
        except (OSError, SafetensorError, KeyError, ValueError, SiteError) as error:
            raise OutputError(f"cannot read a probe from {path} ({error}); give a file of LinearProbe.save") from error

    def _number(self, name: str | None) -> int:
        if name is None:
            return len(self.classes) - 1
        if name not in self.classes:
            raise NeedsError(f"this probe has no class {name!r}; it has {', '.join(self.classes)}")
        return self.classes.index(name)

    def __repr__(self) -> str:
        return f"LinearProbe at {self.site} of {', '.join(self.classes[:6])}{', …' if len(self.classes) > 6 else ''}"


@dataclass(frozen=True)
class ProbeScore(Metric):
    """What a probe reads at its site; see `LinearProbe.metric`."""

    probe: LinearProbe | None = None
    name: str = ""
    label: ClassVar[str] = "probe score"

    @property
    def site(self) -> Site | None:
        return None if self.probe is None else self.probe.site

    def score(self, logits: Tensor, batch: TokenBatch, rows: Rows, reference: Tensor | None) -> Scores:
        assert self.probe is not None
        if self.probe._heads and logits.ndim == 3:
            logits = logits.flatten(1)
        if logits.ndim != 2:
            raise NeedsError(f"a probe's metric takes one token of each example. Got shape {tuple(logits.shape)}")
        scores = self.probe.scores(logits)
        one = self.probe.classes.index(self.name)
        return scores[:, one] - scores[:, 1 - one] if len(self.probe.classes) == 2 else scores[:, one]
