"""A concept from texts to interventions: where it is told apart, and what moving along its direction does."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mechinterp.analyzers.concept_directions import ConceptDirections
from mechinterp.analyzers.probe import Probe
from mechinterp.analyzers.steering import Steering
from mechinterp.core.analyzer import Wanted
from mechinterp.core.examples import Examples
from mechinterp.core.linear_probe import LinearProbe
from mechinterp.core.result import Result
from mechinterp.engine.runner import Progress, provenance, run
from mechinterp.model.model import Model
from mechinterp.report.study import write_study
from mechinterp.sites import Position
from mechinterp.studies.steering import steered_text
from mechinterp.tasks.concepts import Concept, concepts

SAFETY = ("harm", "truthfulness", "helpfulness")
"""The concepts of `safety_study`."""
STEPS = (-2.0, -1.0, 1.0, 2.0)
"""Strengths, as multiples of the distance between the two means."""
SHOWN = 3
"""Prompts that are gone on from."""


@dataclass(frozen=True, eq=False)
class ConceptStudy:
    """What `concept_study` found.

    Attributes:
        concept: its texts.
        target: the class that is steered towards.
        probe: the direction, at the site that was chosen on other folds than it was tested on.
        results: ``directions``, ``probe``; and, where the concept has words and prompts to steer on, ``steering`` and
            ``text``.
        about: of the model.
    """

    concept: Concept
    target: str
    probe: LinearProbe
    results: Mapping[str, Result]
    about: Mapping[str, Any] = field(default_factory=dict)

    def summary(self) -> list[str]:
        """What was found, in sentences."""
        one: Any = self.results["directions"].data.sel({"site": str(self.probe.site), "class": self.target})
        low, high = float(one["ci_low"]), float(one["ci_high"])
        out = [
            f"{self.concept.name}: on {self.results['directions'].meta['set_apart']} texts of templates set apart,"
            f" {self.target} is told by the direction at {self.probe.site} with AUROC {float(one['test_auroc']):.3f}"
            f" ({low:.3f} to {high:.3f}); directions of different folds have a mean cosine of"
            f" {float(one['coherence']):.2f}."
        ]
        if "steering" not in self.results:
            return [*out, "There are no words to steer towards, so whether the model uses it was not asked."]
        data: Any = self.results["steering"].data
        top = data.isel(strength=-1)
        moved = "more than random directions do" if float(top["q"]) < 0.05 and float(top["excess"]) > 0 else (
            "which is not more than random directions do"
        )  # fmt: skip
        out.append(
            f"Steering by {float(top['strength']):+.3g} moves the log-odds of its words by {float(top['mean']):+.2f}"
            f" nats ({float(top['ci_low']):+.2f} to {float(top['ci_high']):+.2f}), {moved} (theirs"
            f" {float(top['control'].mean()):+.2f}, q {float(top['q']):.2g}); the prompts' own text becomes"
            f" {float(top['cost']):.2f} times less likely a token, and {float(top['control_cost']):.2f} times under"
            " random ones."
        )
        gone = data["ablation"]
        out.append(
            f"With the line removed, the log-odds change by {float(gone.sel(measure='effect')):+.2f} nats, and"
            f" perplexity by {float(gone.sel(measure='cost')):.2f} times."
        )
        return out

    def write(self, folder: str | Path) -> Path:
        """A page with figures and tables, and the direction as ``direction.safetensors``.

        Raises:
            OutputError: the folder holds something else, or cannot be written.
        """
        about = {**self.about, "concept": self.concept.name, "target": self.target, "texts": len(self.concept)}
        about["created"] = datetime.now(UTC).isoformat(timespec="seconds")
        title = f"Concept {self.concept.name}: {self.target}"
        page = write_study(
            folder, title, list(self.results.values()), plan="", manifest=about, summary=self.summary()
        )  # fmt: skip
        self.probe.save(Path(folder) / "direction.safetensors")
        return page


def concept_study(
    model: Model,
    concept: Concept | str,
    *,
    target: str | None = None,
    method: Any = "mean-difference",
    sites: Wanted | None = None,
    positions: Position = "all",
    folds: int = 5,
    max_new_tokens: int = 20,
    batch_size: int | None = None,
    seed: int = 0,
    progress: Progress | bool = False,
) -> ConceptStudy:
    """Find a concept's direction on some templates, test it on others, and see what moving along it does.

    Args:
        concept: texts with classes and groups, or the name of a shipped set (`mi.tasks.CONCEPTS`).
        target: the class to steer towards; the first one by default.
        method, sites, positions, folds: as for `ConceptDirections`.
        max_new_tokens: of the texts that are written under steering.
        batch_size, seed, progress: as for `run`.
    Raises:
        ExamplesError: no such concept or class, or too few groups.
    """
    one = concepts(concept) if isinstance(concept, str) else concept
    aim = one.classes[0] if target is None else target
    common: dict[str, Any] = {"sites": sites, "positions": positions, "groups": one.groups, "folds": folds}
    asked = [ConceptDirections(method, **common), Probe(**common)]
    found = run(model, one.examples, asked, batch_size=batch_size, seed=seed, progress=progress)
    results: dict[str, Result] = {"directions": found[0], "probe": found[1]}
    probe = LinearProbe.of(found[0])
    row = probe.weight[probe.classes.index(aim)]
    others = [i for i, name in enumerate(probe.classes) if name != aim]
    distance = float((row - probe.weight[others].mean(0)).norm())
    words = _single(model, one.targets.get(aim, ()))
    against = _single(model, [word for name, some in one.targets.items() if name != aim for word in some])
    if words and against and one.prompts:
        prompts = Examples.of(one.prompts, answers=[(words, against)] * len(one.prompts))
        strengths = tuple(step * distance for step in STEPS)
        steering = Steering(probe, aim, strengths, seed=seed)
        results["steering"] = run(model, prompts, steering, batch_size=batch_size, seed=seed, progress=progress)
        results["text"] = steered_text(
            model, probe, one.prompts[:SHOWN], name=aim, strengths=(strengths[0], strengths[-1]), words=words,
            max_new_tokens=max_new_tokens, seed=seed, progress=bool(progress), pad_token_id=0,
        )  # fmt: skip
    return ConceptStudy(one, aim, probe, results, provenance(model))


def _single(model: Model, words: Sequence[str]) -> list[str]:
    """Those that are one token, which is what an answer is."""
    tokenizer: Any = model.tokenizer
    return [word for word in words if len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1]


def safety_study(model: Model, **options: Any) -> dict[str, ConceptStudy]:
    """`concept_study` of harm, truthfulness and helpfulness, on texts of our own.

    That a direction tells harmful requests from harmless ones is no sign that the model would refuse: a base model was
    never taught to, and a small one tells little apart but words. What the numbers show is that much, and no more.
    """
    return {name: concept_study(model, name, **options) for name in SAFETY}
