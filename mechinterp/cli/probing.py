"""mechinterp probe-representations, probe-linguistic, probe-concepts, steer: what is represented where."""

import shlex
import sys
import textwrap
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

import mechinterp as mi
from mechinterp.cli.causal import BatchSize
from mechinterp.cli.study import (
    PROVENANCE,
    Adapter,
    Debug,
    Device,
    Dtype,
    Limit,
    ModelArgument,
    Out,
    Seed,
    TextField,
    check_out,
    field,
    filled,
    reported,
    rows_of,
    study,
)
from mechinterp.core.display import count
from mechinterp.errors import ExamplesError

GROUP = "frame"
"""The label of sentences that are made alike, and are held out together."""
NO_TASK = ("head", GROUP)
"""Labels that are no classes to tell apart."""
TASKS = (
    *("pos", "depth", "head_distance", "relation", "number", "tense", "sentiment"),
    *("subject_number", "voice", "attractors"),
)
"""The tasks of grammar and sentiment that are probed by default, as far as there are labels."""
SENTENCES = 144


class Pooling(StrEnum):
    mean = "mean"
    last = "last"


class Method(StrEnum):
    mean_difference = "mean-difference"
    logistic = "logistic"
    pca = "pca"


class Where(StrEnum):
    end = "end"
    all = "all"
    token = "token"


Sites = Annotated[
    list[str] | None,
    typer.Option("--site", help="Such as resid_post or mlp_out.5; repeat. By default the residual stream, everywhere."),
]
At = Annotated[
    Where, typer.Option("--at", help="The last token, the whole text but its first token, or each token but that.")
]
Pool = Annotated[Pooling, typer.Option("--pool", help="Of several tokens their mean, or the last.")]
Folds = Annotated[int, typer.Option("--folds", min=2, help="Of the cross-validation.")]
Permutations = Annotated[
    int, typer.Option("--permutations", min=0, help="Fits on shuffled labels for a p-value; 0 for none.")
]
LabelField = Annotated[str, typer.Option("--label-field", help="Of a class, or with --numbers of a number.")]
GroupField = Annotated[
    str | None, typer.Option("--group-field", help="Texts of one group are never on both sides of a fold.")
]


def probe_representations(
    model: ModelArgument,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Labelled texts: .csv, .tsv, .json or .jsonl.")],
    site: Sites = None,
    at: At = Where.end,
    pool: Pool = Pooling.mean,
    text_field: TextField = "text",
    label_field: LabelField = "label",
    group_field: GroupField = None,
    numbers: Annotated[bool, typer.Option("--numbers", help="Labels are numbers: ridge regression.")] = False,
    folds: Folds = 5,
    c: Annotated[float, typer.Option("--c", help="Inverse strength of the penalty, as in scikit-learn.")] = 1.0,
    permutations: Permutations = 0,
    mdl: Annotated[bool, typer.Option("--mdl", help="Description lengths, too.")] = False,
    transfer: Annotated[
        Path | None, typer.Option("--transfer", metavar="FILE", help="A second set of texts to read with the probes.")
    ] = None,
    limit: Limit = None,
    batch_size: BatchSize = None,
    seed: Seed = 0,
    adapter: Adapter = None,
    dtype: Dtype = None,
    device: Device = None,
    out: Out = Path("mechinterp-probe"),
    debug: Debug = False,
) -> None:
    """Linear probes of a label at every site, held out, beside the majority and a control task."""
    if numbers and mdl:
        raise typer.BadParameter("a description length is of classes: leave --mdl or --numbers out", param_hint="--mdl")
    with reported(debug):
        check_out(out)
        examples, groups = _labelled(file, text_field, label_field, group_field, numbers, limit)
        asked = mi.Probe(
            None if site is None else tuple(site), folds=folds, groups=groups, c=c, permutations=permutations,
            mdl=mdl, **_units(at, pool),
        )  # fmt: skip
        other = None if transfer is None else _labelled(transfer, text_field, label_field, group_field, numbers, limit)
        title = f"Probes of {label_field}: {file.name} in {Path(model).name}"
        loaded, (found,) = study(
            (model, adapter, dtype, device), examples, [asked], out, title, seed, str(file), batch_size
        )  # fmt: skip
        if other is not None:
            moved = mi.run(loaded, other[0], mi.ProbeTransfer(found, groups=other[1]), seed=seed)
            typer.echo(f"\n{transfer}: what the probes read there\n{moved.table().to_string(index=False)}")
            if seen := moved.meta["seen"]:
                typer.echo(
                    f"warning: the probes were fitted on {seen} of these {count(moved.meta['texts'], 'text')}, which"
                    " flatters them; give texts that are not in the first file",
                    err=True,
                )
            path = moved.save(out.with_name(f"{out.name}-transfer"))
            typer.echo(f"result: {path}")


def probe_linguistic(
    model: ModelArgument,
    file: Annotated[
        Path | None,
        typer.Argument(
            metavar="[FILE]",
            help="Labelled words: .conllu, .tsv or .jsonl; else sentences of our own.",
            show_default=False,
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option("--task", help="Such as pos or depth; repeat. By default those of grammar and sentiment."),
    ] = None,
    site: Sites = None,
    pool: Pool = Pooling.last,
    folds: Folds = 5,
    permutations: Permutations = 0,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Sentences; of a file the first so many.")] = SENTENCES,
    batch_size: BatchSize = None,
    seed: Seed = 0,
    adapter: Adapter = None,
    dtype: Dtype = None,
    device: Device = None,
    out: Out = Path("mechinterp-linguistic"),
    debug: Debug = False,
) -> None:
    """What words' vectors tell of grammar: part of speech, depth in the tree, number, tense; one pass for all."""
    with reported(debug):
        check_out(out)
        data: Any = mi.tasks.sentences(limit, seed=seed) if file is None else _words(file)
        name_of = "our sentences" if file is None else str(file)
        said: list[str] = []
        if len(data) > limit:
            said.append(f"the first {limit:,} of {count(len(data), 'sentence')}; more with --limit")
            data = data.first(limit)
        if data.unplaced:
            said.append(f"{count(data.unplaced, 'word')} that do not stand in their text are left out")
        known = [name for name in (*data.word_labels, *data.labels) if name not in NO_TASK]
        if odd := [name for name in task or () if name not in known]:
            raise ExamplesError(f"{name_of} has no labels for {odd[0]!r}; it has {', '.join(known)}")
        wanted = [name for name in task or TASKS if name in known]
        if others := [name for name in known if name not in (*TASKS, *wanted)]:
            said.append(f"labels that are probed only where --task names them: {', '.join(others)}")
        sites = None if site is None else tuple(site)
        groups = data.labels.get(GROUP)
        asked: dict[str, Any] = {}
        for name in wanted:
            labels, why = _probed(data, name, groups, folds)
            said += [f"{name}: {line}" for line in why]
            if labels is not None:
                of_words = name in data.word_labels
                units: dict[str, Any] = {"each": "word", "pool": pool.value} if of_words else {"positions": "end"}
                asked[name] = mi.Probe(
                    sites, labels, folds=folds, permutations=permutations, groups=groups, **units
                )  # fmt: skip
        for line in said:
            typer.echo(f"{name_of}: {line}", err=True)
        if not asked:
            raise ExamplesError(
                f"{name_of} has nothing to probe; its labels are {', '.join(known) or 'none'}: name some with --task,"
                " give more sentences, or fewer --folds"
            )
        source = f"mi.tasks.sentences({limit}, seed={seed})" if file is None else str(file)
        title = f"Linguistic probes in {Path(model).name}: {', '.join(asked)}"
        study(
            (model, adapter, dtype, device), data.examples(), list(asked.values()), out, title, seed, source,
            batch_size, names=list(asked), about={"left_out": said},
        )  # fmt: skip


def probe_concepts(
    model: ModelArgument,
    concept: Annotated[
        list[str] | None,
        typer.Option("--concept", help="Of those that are shipped, or safety for three; repeat. By default sentiment."),
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", metavar="FILE", help="Texts of your own, with a label and perhaps a group.")
    ] = None,
    target: Annotated[
        str | None, typer.Option("--target", help="The class to steer towards; else one is named.")
    ] = None,
    method: Annotated[Method, typer.Option("--method", help="How directions are found.")] = Method.mean_difference,
    site: Sites = None,
    at: Annotated[Where, typer.Option("--at", help="The last token, or the whole text but its first.")] = Where.all,
    folds: Annotated[int, typer.Option("--folds", min=3, help="Some are set apart, to test on.")] = 4,
    draws: Annotated[
        int, typer.Option("--draws", min=1, help="Random directions; p is no smaller than 1 / (draws + 1).")
    ] = 99,
    text_field: TextField = "text",
    label_field: LabelField = "label",
    group_field: GroupField = None,
    batch_size: BatchSize = None,
    seed: Seed = 0,
    adapter: Adapter = None,
    dtype: Dtype = None,
    device: Device = None,
    out: Out = Path("mechinterp-concepts"),
    debug: Debug = False,
) -> None:
    """Directions of named concepts: where they are told apart, and what moving along them does; saved for steer."""
    if file is not None and concept:
        raise typer.BadParameter("give --concept or --file, and not both")
    if at is Where.token:
        raise typer.BadParameter("a concept is of texts: give end or all", param_hint="--at")
    with reported(debug):
        from mechinterp.studies.concepts import SAFETY, target_of
        from mechinterp.tasks.concepts import Concept, concepts

        names = [one for name in concept or ["sentiment"] for one in (SAFETY if name == "safety" else [name])]
        sets = [concepts(name) for name in names] if file is None else []
        if file is not None:
            examples, groups = _labelled(file, text_field, label_field, group_field, False, None)
            classes = tuple(sorted({str(label) for label in examples.labels or () if label is not None}))
            own = groups or tuple(map(str, range(len(examples))))
            sets.append(Concept(file.stem, classes, examples, own, {}, ()))
        for one in sets:
            target_of(one, target)  # which may not be there, before anything is run
        folders = {one.name: out if len(sets) == 1 else out / one.name for one in sets}
        for folder in folders.values():
            check_out(folder)
        loaded = mi.Model.load(model, adapter=adapter, dtype=dtype, device=device)
        typer.echo(f"{loaded}\n")
        for one in sets:
            found = mi.studies.concept_study(
                loaded, one, target=target, method=method.value, sites=None if site is None else tuple(site),
                positions=at.value, folds=folds, draws=draws, batch_size=batch_size, seed=seed, progress=True,
            )  # fmt: skip
            for line in found.summary():
                typer.echo(textwrap.fill(line, 100, subsequent_indent="    ", break_on_hyphens=False))
            page = found.write(folders[one.name])
            typer.echo(f"report: {page}\ndirection: {folders[one.name] / 'direction.safetensors'}\n")


def steer(
    model: ModelArgument,
    direction: Annotated[Path, typer.Argument(metavar="DIRECTION", help="What probe-concepts saved.")],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="Go on from here; repeat.")] = None,
    strength: Annotated[list[float] | None, typer.Option("--strength", help="In activation units; repeat.")] = None,
    name: Annotated[str | None, typer.Option("--class", help="Whose direction; the last class by default.")] = None,
    word: Annotated[list[str] | None, typer.Option("--word", help="Whose share is counted, such as ' good'.")] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="New tokens of each text.")] = 30,
    seed: Seed = 0,
    adapter: Adapter = None,
    dtype: Dtype = None,
    device: Device = None,
    out: Out = Path("mechinterp-steer"),
    debug: Debug = False,
) -> None:
    """Write with a direction added, with a random one of equal norm, and with none; and read it again without."""
    with reported(debug):
        from mechinterp.report.study import write_study

        check_out(out)
        probe = mi.LinearProbe.load(direction)
        loaded = mi.Model.load(model, adapter=adapter, dtype=dtype, device=device)
        probe.check(loaded)
        typer.echo(f"{loaded}\n{probe}\n")
        result = mi.studies.steered_text(
            loaded, probe, prompt or ["I think that", "The weather today"], name=name,
            strengths=tuple(strength or (-8.0, 8.0)), words=tuple(word or ()), max_new_tokens=tokens, seed=seed,
            progress=True, pad_token_id=0,
        )  # fmt: skip
        written = [
            f"{row['direction']} {row['strength']:+g}: {' '.join(str(row['text']).split())}"
            for row in result.table("text").to_dict("records")
            if row["strength"] or row["direction"] != "random"
        ]
        typer.echo("\n".join(written))
        typer.echo(f"\n{result.table('mean').to_string(index=False)}")
        about = {
            **{k: result.meta[k] for k in PROVENANCE if k in result.meta},
            "command": shlex.join(["mechinterp", *sys.argv[1:]]),
        }
        title = f"Steering {loaded.name} at {probe.site}"
        typer.echo(f"\nreport: {write_study(out, title, [result], plan='', manifest=about, summary=written)}")


def _units(at: Where, pool: Pooling) -> dict[str, Any]:
    return {"each": "token"} if at is Where.token else {"positions": at.value, "pool": pool.value}


def _probed(data: Any, name: str, groups: Any, folds: int) -> tuple[tuple[Any, ...] | None, list[str]]:
    """Labels of a task without its rare classes, None where it cannot be probed; and what is left out, in words.

    Numbers are floats, which are regressed. A class must be in as many groups as there are folds.
    """
    of_words = name in data.word_labels
    labels = data.column(name) if of_words else data.labels[name]
    owner = (
        [i for i, row in enumerate(data.words) for span in row if span is not None] if of_words else range(len(data))
    )
    here = [(data.texts if groups is None else groups)[i] for i in owner]
    if all(isinstance(label, int | float) and not isinstance(label, bool) for label in labels if label is not None):
        numbers = tuple(None if label is None else float(label) for label in labels)
        there = {group for group, label in zip(here, numbers, strict=True) if label is not None}
        if len(set(numbers) - {None}) > 1 and len(there) >= folds:
            return numbers, []
        return None, [f"not probed, as its numbers are all the same, or in fewer than {folds} groups of texts"]
    where: dict[Any, set[Any]] = {}
    for group, label in zip(here, labels, strict=True):
        if label is not None:
            where.setdefault(label, set()).add(group)
    rare = {label for label, there in where.items() if len(there) < folds}
    said = [f"without {', '.join(sorted(map(str, rare)))}, in fewer than {folds} groups of texts"] if rare else []
    if len(where) - len(rare) < 2:
        return None, [*said, "not probed, as fewer than two classes are left"]
    return tuple(None if label in rare else label for label in labels), said


def _words(file: Path) -> Any:
    """Labelled words of a file, by its ending."""
    from mechinterp.core.sentences import Sentences

    readers = {".conllu": Sentences.from_conllu, ".tsv": Sentences.from_tsv, ".jsonl": Sentences.from_jsonl}
    if file.suffix not in readers:
        raise ExamplesError(f"{file} is none of {', '.join(readers)}; give labelled words in one of these formats")
    return readers[file.suffix](file)


def _labelled(
    file: Path, text: str, label: str, group: str | None, numbers: bool, limit: int | None
) -> tuple["mi.Examples", tuple[str, ...] | None]:
    """Texts with labels, and groups where a field says so. A row without a label is kept, and counted later."""
    rows = rows_of(file, limit)
    labels: list[Any] = []
    for i, value in enumerate(field(file, rows, label), 1):
        try:
            labels.append(None if value is None else float(value) if numbers else str(value))
        except ValueError:
            raise ExamplesError(
                f"row {i} of {file} has the {label!r} {value!r}, which is no number; leave --numbers out"
            ) from None
    groups = None if group is None else tuple(filled(file, rows, group))
    return mi.Examples.of(filled(file, rows, text), labels), groups
