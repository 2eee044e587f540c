"""A concept from texts to interventions: where it is told apart, and what moving along its direction does."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mechinterp.analyzers.concept_directions import ConceptAssociation, ConceptDirections
from mechinterp.analyzers.probe import Probe
from mechinterp.analyzers.steering import Steering
from mechinterp.core.analyzer import Wanted
from mechinterp.core.examples import Examples
from mechinterp.core.linear_probe import LinearProbe
from mechinterp.core.result import Result
from mechinterp.core.statistics import MIN_EXAMPLES, summarize
from mechinterp.engine.runner import Progress, provenance, run
from mechinterp.errors import ExamplesError
from mechinterp.model.model import Model
from mechinterp.report.study import write_study
from mechinterp.sites import Position
from mechinterp.studies.steering import steered_text
from mechinterp.tasks.concepts import Concept, concepts

SAFETY = {"harm": "harmful", "truthfulness": "true", "helpfulness": "helpful"}
"""The concepts of `safety_study`, and the class that each is steered towards."""
STEPS = (-2.0, -1.0, 1.0, 2.0)
"""Strengths, as multiples of the gap between the two means along the direction."""
ALPHA = 0.05
SHOWN = 3
"""Prompts that are gone on from."""


@dataclass(frozen=True, eq=False)
class ConceptStudy:
    """What `concept_study` found.

    Attributes:
        concept: its texts.
        target: the class that is steered towards.
        probe: the direction, at the site that was chosen on other folds than it was tested on.
        results: ``directions``, ``probe``; where the concept has words and prompts to steer on, ``steering`` and
            ``text``, and ``steering: CLASS`` on prompts that hold a class; and ``association``, where it has texts for
            one.
        about: of the model.
    """

    concept: Concept
    target: str
    probe: LinearProbe
    results: Mapping[str, Result]
    about: Mapping[str, Any] = field(default_factory=dict)

    def summary(self) -> list[str]:
        """What was found, in sentences."""
        directions = self.results["directions"]
        one: Any = directions.data.sel({"site": str(self.probe.site), "class": self.target})
        low, high = float(one["ci_low"]), float(one["ci_high"])
        interval = f"{low:.3f} to {high:.3f}, p {float(one['p']):.2g}"
        out = [
            f"{self.concept.name}, towards {self.target} (of {', '.join(self.concept.classes)}): on"
            f" {directions.meta['set_apart']} texts of {directions.meta['groups_set_apart']} groups set apart,"
            f" {self.target} is told by the direction at {self.probe.site} with AUROC {float(one['test_auroc']):.3f}"
            f" ({directions.meta.get('untested', interval)}); directions of different folds have a mean cosine of"
            f" {float(one['coherence']):.2f}."
        ]
        if "association" in self.results:
            out += _associated(self.results["association"])
        if "steering" not in self.results:
            return [*out, "There are no words to steer towards, so whether the model uses it was not asked."]
        out += _steered(self.results["steering"], "prompts without it")
        keys = {name: f"steering: {name}" for name in (self.target, *self.concept.classes)}
        held = {name: self.results[key] for name, key in keys.items() if key in self.results}
        if len(held) == 2:
            out.append(_told_apart(*held.items()))
        for name, result in held.items():
            out += _steered(result, f"prompts that are {name}")
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


def _told_apart(one: tuple[str, Result], two: tuple[str, Result]) -> str:
    """Whether prompts of the first kind make its words more likely than their partners of the second do."""
    (name, first), (other, second) = one, two
    found = summarize((first.data["clean"].values - second.data["clean"].values)[:, None])
    mean, low, high, p = (float(v[0]) for v in (found.mean, found.ci_low, found.ci_high, found.p))
    if p < ALPHA:
        verdict = ", so it tells them apart in what it says." if mean > 0 else ", the wrong way round."
    else:
        verdict = ": that it tells them apart is not shown."
    return (
        f"As the model is, the log-odds of these words are {mean:+.2f} nats higher on prompts that are {name} than on"
        f" partners that are {other} ({low:+.2f} to {high:+.2f}, p {p:.2g}){verdict}"
    )


def _steered(result: Result, where: str) -> list[str]:
    """What the largest strength does, and what removing the line does, beside random directions."""
    data: Any = result.data
    top, gone = data.isel(strength=-1), data.sel(measure="effect")
    moved, ablated = (
        "unlike" if p < ALPHA else "which is not unlike" for p in (float(top["q"]), float(gone["ablation_p"]))
    )
    low, high = float(gone["ablation_ci_low"]), float(gone["ablation_ci_high"])
    return [
        f"On {data.sizes['example']} {where}, steering by {float(top['strength']):+.3g} moves the log-odds of its words"
        f" by {float(top['mean']):+.2f} nats ({float(top['ci_low']):+.2f} to {float(top['ci_high']):+.2f}), {moved}"
        f" random directions (on average {float(top['control'].mean()):+.2f}; q {float(top['q']):.2g}); the prompts'"
        f" own text becomes {float(top['cost']):.2f} times less likely a token, and {float(top['control_cost']):.2f}"
        " times under random ones.",
        f"With the line removed there, they change by {float(gone['ablation']):+.2f} nats ({low:+.2f} to {high:+.2f}),"
        f" {ablated} random lines (p {float(gone['ablation_p']):.2g}), and perplexity by"
        f" {float(data['ablation'].sel(measure='cost')):.2f} times.",
    ]


def _associated(result: Result) -> list[str]:
    """Which kinds of texts go with the concept."""
    data: Any = result.data
    said = ", ".join(
        f"{name} {float(one['cosine']):+.2f} (p {float(one['p']):.2g})"
        for name in data["group"].values.tolist()
        for one in [data.sel(group=name)]
    )
    return [
        f"Of {data.sizes['member']} professions, labelled with what readers expect, the direction of each kind from the"
        f" others has this cosine with that of {result.meta['class']}: {said}; labels shuffled over professions."
    ]


def concept_study(
    model: Model,
    concept: Concept | str,
    *,
    target: str | None = None,
    method: Any = "mean-difference",
    sites: Wanted | None = None,
    positions: Position = "all",
    folds: int = 4,
    draws: int = 99,
    max_new_tokens: int = 20,
    batch_size: int | None = None,
    seed: int = 0,
    progress: Progress | bool = False,
) -> ConceptStudy:
    """Find a concept's direction on some templates, test it on others, and see what moving along it does.

    As many folds of the groups are set apart as a test takes (six groups), if two are left. Strengths are multiples of
    the gap between the two means along the direction, whatever the method.

    Args:
        concept: texts with classes and groups, or the name of a shipped set (`mi.tasks.CONCEPTS`).
        target: the class to steer towards; by default that of `SAFETY`, or the concept's first. The summary names it.
        method, sites, positions, folds: as for `ConceptDirections`.
        draws: random directions beside the concept's (`Steering`).
        max_new_tokens: of the texts that are written under steering.
        batch_size, seed, progress: as for `run`.
    Raises:
        ExamplesError: no such concept or class, or too few groups.
    """
    one = concepts(concept) if isinstance(concept, str) else concept
    aim = target_of(one, target)
    options: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "progress": progress}
    common: dict[str, Any] = {"sites": sites, "positions": positions, "groups": one.groups, "folds": folds}
    size = max(len(set(one.groups)) // folds, 1)  # groups of a fold
    apart = max(min(-(-MIN_EXAMPLES // size), folds - 2), 1)
    found = run(model, one.examples, [ConceptDirections(method, **common, set_apart=apart), Probe(**common)], **options)
    results: dict[str, Result] = {"directions": found[0], "probe": found[1]}
    probe = LinearProbe.of(found[0])
    if one.association is not None:
        some = one.association.prompts
        names = tuple(str(text)[slice(*span)] for text, span in zip(some.texts, some.spans["profession"], strict=True))
        results["association"] = run(model, some, ConceptAssociation(probe, aim, groups=names), **options)
    words = _single(model, one.targets.get(aim, ()))
    against = _single(model, [word for name, some in one.targets.items() if name != aim for word in some])
    if words and against and one.prompts:
        at: dict[str, Any] = {"site": str(probe.site), "class": aim}
        gap = float(found[0].data["gap"].sel(at))
        steering = Steering(probe, aim, tuple(step * gap for step in STEPS), draws=draws, seed=seed)
        for name, texts in (("", one.prompts), *one.prompts_of.items()):
            prompts = Examples.of(texts, answers=[(words, against)] * len(texts))
            result = run(model, prompts, steering, **options)
            views = tuple(replace(view, title=f"{view.title}: {name or 'neutral'} prompts") for view in result.views)
            results[f"steering: {name}" if name else "steering"] = replace(result, views=views).with_meta(prompts=name)
        results["text"] = steered_text(
            model, probe, one.prompts[:SHOWN], name=aim, strengths=(STEPS[0] * gap, STEPS[-1] * gap), words=words,
            max_new_tokens=max_new_tokens, seed=seed, progress=bool(progress), pad_token_id=0,
        )  # fmt: skip
    return ConceptStudy(one, aim, probe, results, provenance(model))


def target_of(concept: Concept, target: str | None) -> str:
    """The class that a study steers towards.

    Raises:
        ExamplesError: the concept has no such class.
    """
    aim = SAFETY.get(concept.name, concept.classes[0]) if target is None else target
    if aim not in concept.classes:
        raise ExamplesError(
            f"the concept {concept.name} has no class {aim!r} to steer towards; its classes are"
            f" {', '.join(concept.classes)}"
        )
    return aim


def _single(model: Model, words: Sequence[str]) -> list[str]:
    """Those that are one token, which is what an answer is."""
    tokenizer: Any = model.tokenizer
    return [word for word in words if len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1]


def safety_study(model: Model, **options: Any) -> dict[str, ConceptStudy]:
    """`concept_study` of harm, truthfulness and helpfulness, on texts of our own.

    Harm and truthfulness are steered and removed on prompts that hold them, too: whether a harmful request makes words
    of refusal more likely than its harmless partner does, whether removing the direction takes that away, and whether
    adding it to harmless requests makes the model refuse these. Helpfulness lies in answers, so it is steered on plain
    questions alone, and its words are what answers may begin with.

    That a direction tells harmful requests from harmless ones is no sign that the model would refuse: a base model was
    never taught to, and a small one tells little apart but words. With six prompts of a kind, only large differences
    show. What the numbers show is that much, and no more.
    """
    return {name: concept_study(model, name, **options) for name in SAFETY}
