"""The attention study: who attends to what, when the model is right and when it is wrong."""

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from mechinterp.analyzers.categories import category_statistics
from mechinterp.core.display import count
from mechinterp.core.examples import Examples
from mechinterp.core.result import Result, View
from mechinterp.core.statistics import compare_groups, summarize
from mechinterp.core.tokens import Span
from mechinterp.core.vocabulary import Vocabulary
from mechinterp.errors import ConfigurationError, ExamplesError
from mechinterp.model.model import Model
from mechinterp.report.study import check_study
from mechinterp.studies.configuration import StudyConfig
from mechinterp.studies.predictions import Sample, Samples, answer_ids, prompt_of, read_samples
from mechinterp.studies.shards import GENERATED, PREDICTION, Shards, run_shard, study_key

CORRECT, INCORRECT = "correct", "incorrect"
DEBUG_SAMPLES, DEBUG_SHARD = 8, 4
ALPHA = 0.05


@dataclass(frozen=True, eq=False)
class AttentionStudy:
    """What an attention study found.

    Attributes:
        config: its configuration.
        model: the model.
        samples: the samples that were run, with their predictions.
        examples: their prompts, with the vocabulary's categories.
        groups: of each sample; None belongs to no group.
        each: numbers of each sample, ``layer example head category``.
        heads: of each layer and head, by `mechinterp.analyzers.categories.category_statistics`.
        categories: of the mean over all layers and heads, by category.
        notes: everything that was left out, and everything that could not be tested.
        folder: where it was written.
    """

    config: StudyConfig
    model: Model
    samples: Samples
    examples: Examples
    groups: tuple[str | None, ...]
    each: xr.Dataset
    heads: Result
    categories: Result
    notes: tuple[str, ...]
    folder: Path

    @property
    def compared(self) -> tuple[str, str] | None:
        """The two groups whose difference was taken, the first minus the second."""
        names = tuple(str(name) for name in self.heads.data["group"].values)
        return (names[0], names[1]) if "difference" in self.heads.data else None


def attention_study(
    config: StudyConfig | str | Path,
    *,
    model: Model | None = None,
    rank: int = 0,
    world_size: int = 1,
    debug: bool = False,
    told: Callable[[str], None] | None = None,
) -> AttentionStudy | None:
    """Compare attention to word categories between groups of samples, such as correct and incorrect predictions.

    Samples are run a shard at a time, and each shard is kept in the folder ``OUT.shards`` beside the study: what
    is interrupted goes on where it was. Several ranks share the shards. The last step, by a single rank, joins
    them, tests and writes; the numbers do not depend on how many ranks there were.

    Args:
        config: a configuration, or the path of its YAML file.
        model: used in place of loading the configuration's.
        rank, world_size: this process does every `world_size`-th shard from `rank` on, and of several none joins.
        debug: only the first eight samples, written to ``OUT-debug``.
        told: called with a sentence about how the work goes, now and then.
    Returns:
        The study; None from one of several ranks.
    Raises:
        ConfigurationError: the configuration cannot be used.
        ExamplesError: samples or categories that cannot be used.
        OutputError: the folder holds something else, or cannot be written.
    """
    from mechinterp.studies.attention_report import write_attention_study

    settings = config if isinstance(config, StudyConfig) else StudyConfig.load(config)
    if not 0 <= rank < world_size:
        raise ConfigurationError(f"rank must be from 0 to {world_size - 1}, one less than the world size. Got {rank}")
    settings = _for_debug(settings) if debug else settings
    say = told or (lambda _: None)
    out = Path(settings.visualisation.out)
    check_study(out)
    samples = _read(settings)
    wanted = settings.model
    model = model or Model.load(wanted.name, adapter=wanted.adapter, dtype=wanted.dtype, device=wanted.device)
    _check_heads(settings, model)
    samples, examples, notes = prepare(settings, model, samples, lenient=debug)
    shards = Shards(out.with_name(f"{out.name}.shards"), len(samples), settings.analysis.shard_size)
    shards.open(study_key(settings, model, samples, examples))
    _run(model, settings, samples, examples, shards, (rank, world_size), say)
    if world_size > 1:
        left = len(shards.missing)
        say(
            f"rank {rank} of {world_size} is done; {count(left, 'shard')} of {len(shards.numbers)} to be done by others"
        )
        return None
    say("testing ...")
    study = _test(settings, model, samples, examples, shards.join(), notes)
    say("writing tables, figures and the report ...")
    write_attention_study(study)
    return study


def prepare(
    config: StudyConfig, model: Model, samples: Samples, lenient: bool = False
) -> tuple[Samples, Examples, tuple[str, ...]]:
    """The samples that fit into the model, their prompts with the vocabulary's categories, and what is to be said.

    The vocabulary is matched in the samples' own texts, not in the rest of the prompt.

    Args:
        lenient: a category without any match is left out and said, rather than refused.
    Raises:
        ExamplesError: a prompt that is too long and refused, a category that matches nothing, or whose name is taken.
    """
    made, options = config.generation, config.analysis
    prompts = [prompt_of(s.text, made.prompt, made.chat, made.system) for s in samples.rows]
    tokens = Examples.of([text for text, _ in prompts]).tokenize(model.tokenizer)
    long: list[int] = []
    for sample, (text, _), ids in zip(samples.rows, prompts, tokens.ids, strict=True):
        more = made.max_new_tokens if made.mode == "generated" else 0
        if made.mode == "constrained":
            answers = (made.continuation.replace("{label}", label) for label in made.labels or ())
            more = max(len(answer_ids(model.tokenizer, text, ids, answer)) for answer in answers) - 1
        if len(ids) + more > model.dims.context:
            long.append(sample.line)
    bad = {f"longer than the model's context of {model.dims.context} tokens": long} if long else {}
    kept = samples.without(bad, options.samples, options.bad_rows == "refuse")
    lines = {sample.line for sample in kept.rows}
    prompts = [prompt for sample, prompt in zip(samples.rows, prompts, strict=True) if sample.line in lines]
    vocabulary = Vocabulary.from_yaml(options.vocabulary)
    if taken := {PREDICTION, GENERATED} & set(vocabulary.names):
        raise ExamplesError(f"the vocabulary's category {min(taken)!r} has a name that the study uses; give it another")
    found = [vocabulary.find(sample.text) for sample in kept.rows]
    spans: dict[str, list[tuple[Span, ...]]] = {
        name: [
            tuple((start + a, start + b) for a, b in one[name]) for one, (_, start) in zip(found, prompts, strict=True)
        ]
        for name in vocabulary.names
    }
    empty = [name for name, column in spans.items() if not any(column)]
    if empty and (not lenient or len(empty) == len(spans)):
        raise ExamplesError(
            f"the categories {empty} of {options.vocabulary} match nothing in any of the {len(kept)} texts; correct"
            " their terms (whole words, in any case unless case_sensitive), or leave them out"
        )
    examples = Examples.of([text for text, _ in prompts])
    for name, column in spans.items():
        examples = examples if name in empty else examples.with_category(name, column)
    notes = [f"{count(len(lines), 'sample')} left out: {why}" for why, lines in kept.skipped.items()]
    notes += [f"the category {name!r} matches nothing here and was left out" for name in empty]
    return kept, examples, tuple(notes)


def _check_heads(config: StudyConfig, model: Model) -> None:
    """Raises ConfigurationError where the model lacks a head whose matrices shall be kept."""
    layers, heads = model.dims.n_layers, model.dims.n_heads
    for layer, head in config.visualisation.heads or ():
        if not (0 <= layer < layers and 0 <= head < heads):
            raise ConfigurationError(
                f"visualisation.heads has layer {layer}, head {head}, which the model does not have; it has layers 0 to"
                f" {layers - 1} with heads 0 to {heads - 1}"
            )


def _for_debug(config: StudyConfig) -> StudyConfig:
    """A small quick run of the same study, in a folder of its own."""
    few = min(config.analysis.limit or DEBUG_SAMPLES, DEBUG_SAMPLES)
    analysis = config.analysis.model_copy(update={"limit": few, "shard_size": DEBUG_SHARD})
    out = Path(config.visualisation.out)
    visualisation = config.visualisation.model_copy(update={"out": str(out.with_name(f"{out.name}-debug"))})
    return config.model_copy(update={"analysis": analysis, "visualisation": visualisation})


def _read(config: StudyConfig) -> Samples:
    """The samples' file, with the fields that this study needs."""
    options, mode = config.analysis, config.generation.mode
    needed = ["label"] if options.groups in ("correctness", "label") else []
    needed += ["prediction"] if mode == "file" else []
    if options.groups not in ("correctness", "label", "prediction"):
        needed.append(options.groups)
    refuse = options.bad_rows == "refuse"
    return read_samples(options.samples, options.fields, config.generation.labels, needed, refuse, options.limit)


def _run(
    model: Model,
    config: StudyConfig,
    samples: Samples,
    examples: Examples,
    shards: Shards,
    who: tuple[int, int],
    say: Callable[[str], None],
) -> None:
    """Every shard of this rank that is not there yet."""
    rank, world_size = who
    mine = [shard for shard in shards.numbers if shard % world_size == rank]
    missing = set(shards.missing)
    todo = [shard for shard in mine if shard in missing]
    if len(todo) < len(mine):
        say(f"{len(mine) - len(todo)} of {count(len(mine), 'shard')} are there already")
    begun = time.perf_counter()
    for i, shard in enumerate(todo, 1):
        run_shard(model, config, samples, examples, shards.rows(shard)).save(shards.path(shard))
        left = (time.perf_counter() - begun) / i * (len(todo) - i)
        when = (
            f", about {left / 60:.0f} min left" if left > 90 else f", about {left:.0f} s left" if i < len(todo) else ""
        )
        say(f"shard {i} of {len(todo)} is done: samples {shards.rows(shard)[0]} to {shards.rows(shard)[-1]}{when}")


def _test(
    config: StudyConfig, model: Model, samples: Samples, examples: Examples, each: xr.Dataset, notes: Sequence[str]
) -> AttentionStudy:
    """Groups, and the statistics of their difference."""
    each = each.transpose("layer", "example", "head", "category", ...)
    notes = [*notes]
    unseen = [str(c) for c in each["category"].values if not np.isfinite(each["share"].sel(category=c)).any()]
    if unseen:  # only the study's own categories can be: the vocabulary's match somewhere
        notes += [f"no query sees a token of the category {name!r}, which was left out" for name in unseen]
        each = each.sel(category=[c for c in each["category"].values if str(c) not in unseen])
    predictions = [str(p) or None for p in each["prediction"].values]
    rows = tuple(Sample(s.line, s.text, s.label, p, s.more) for s, p in zip(samples.rows, predictions, strict=True))
    samples = Samples(rows, samples.labels, samples.skipped)
    if lost := predictions.count(None):
        notes.append(f"{count(lost, 'sample')} without a prediction: no label was found in what the model wrote")
    groups = tuple(group_of(sample, config.analysis.groups) for sample in rows)
    sizes = {name: groups.count(name) for name in dict.fromkeys(g for g in groups if g is not None)}
    if not sizes:
        fix = "ask for a label in generation.prompt, or raise max_new_tokens" if lost else "give them one"
        raise ExamplesError(f"no sample of {len(rows)} belongs to a group; {'; '.join([*notes, fix])}")
    pair, more = _pair(config, sizes)
    notes += more
    grouped = [i for i, group in enumerate(groups) if group is not None]
    labelled = each.isel(example=grouped)
    labelled = labelled.assign(label=("example", np.array([groups[i] for i in grouped], dtype=object)))
    analysis = config.analysis
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "groups of .* have too few splits")  # it is among the notes
        heads = category_statistics(labelled, pair, analysis.floor, analysis.seed)
    notes += [str(note) for note in heads.meta.get("notes", ()) if "groups=" not in str(note)]
    order = list(dict.fromkeys(str(name) for name in heads.data["group"].values))
    categories = by_category(labelled, order, analysis.seed)
    meta = {"analyzer": "AttentionByCategory", "options": {"queries": analysis.queries, "floor": str(analysis.floor)}}
    return AttentionStudy(
        config, model, samples, examples, groups, each, heads.with_meta(**meta), categories,
        tuple(dict.fromkeys(notes)), Path(config.visualisation.out),
    )  # fmt: skip


def group_of(sample: Sample, groups: str) -> str | None:
    """The group of a sample; None where it has no prediction to go by."""
    if groups == "correctness":
        return None if sample.prediction is None else CORRECT if sample.prediction == sample.label else INCORRECT
    if groups in ("label", "prediction"):
        return getattr(sample, groups)
    return str(sample.more[groups])


def _pair(config: StudyConfig, sizes: Mapping[str, int]) -> tuple[tuple[str, str] | None, list[str]]:
    """The two groups to compare, and what is to be said where there are none."""
    have = ", ".join(f"{n} {name}" for name, n in sizes.items())
    wanted = config.analysis.compare
    if wanted is None and config.analysis.groups == "correctness":
        wanted = (CORRECT, INCORRECT)
    if wanted is None and len(sizes) == 2:
        first, second = sorted(sizes)
        wanted = (first, second)
    if wanted is None:
        fix = "; name two in analysis.compare" if len(sizes) > 2 else ""
        return None, [f"nothing was compared: there are {count(len(sizes), 'group')} ({have}){fix}"]
    if empty := [name for name in wanted if name not in sizes]:
        return None, [f"nothing was compared: the group {empty[0]!r} has no sample (there are {have})"]
    return wanted, []


def by_category(each: xr.Dataset, groups: Sequence[str], seed: int = 0) -> Result:
    """Attention to each category averaged over all layers and heads, by group, and the difference of two.

    Result, by ``group category``: ``mean_share`` with interval, ``expected``, ``examples`` that see the category.
    With two groups, by ``category``: their ``difference`` with ``ci_low`` and ``ci_high``, Cohen's ``d`` with
    interval, ``p`` and ``q`` of a permutation test (`mechinterp.core.statistics.compare_groups`).
    """
    values = each["share"].mean(("layer", "head")).transpose("example", "category").values.astype(float)
    expected = each["expected"].mean("layer").transpose("example", "category").values.astype(float)
    labels = np.array([str(label) for label in each["label"].values])
    rows = [np.flatnonzero(labels == group) for group in groups]
    found = [summarize(values[row], seed) for row in rows]
    seen = [np.isfinite(values[row]).sum(0) for row in rows]
    sums = [np.nansum(expected[row], 0) for row in rows]
    by: dict[str, Any] = {
        "mean_share": np.stack([s.mean for s in found]),
        "mean_share_ci_low": np.stack([s.ci_low for s in found]),
        "mean_share_ci_high": np.stack([s.ci_high for s in found]),
        "expected": np.stack([s / np.where(n > 0, n, np.nan) for s, n in zip(sums, seen, strict=True)]),
        "examples": np.stack(seen),
    }
    variables: dict[str, Any] = {name: (("group", "category"), value) for name, value in by.items()}
    views = [
        View("lines", "mean_share", "category", by="group", title="Attention to each category, over all heads",
             unit="share of attention"),
    ]  # fmt: skip
    if len(groups) == 2:
        compared = compare_groups(*(values[row] for row in rows), seed=seed)
        names = ("difference", "ci_low", "ci_high", "d", "d_ci_low", "d_ci_high", "p", "q")
        variables |= {name: ("category", getattr(compared, name)) for name in names}
        title = f"Difference in attention to each category, {groups[0]} - {groups[1]}"
        views.append(View("bars", "difference", "category", title=title, unit="share of attention", center=0.0))
    coords = {"group": list(groups), "category": [str(c) for c in each["category"].values]}
    data = xr.Dataset(variables, coords, {"unit": "share of attention"})
    return Result(data, {"analyzer": "CategoriesOverall", "options": {}}, tuple(views))
