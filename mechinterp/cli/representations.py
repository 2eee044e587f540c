"""mechinterp representations and compare-languages: how alike layers, groups and languages are, and maps of them."""

import shlex
import sys
import textwrap
from datetime import UTC, datetime
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
    ModelName,
    Out,
    Seed,
    TextField,
    check_out,
    explanation,
    filled,
    reported,
    rows_of,
)
from mechinterp.core.display import count

MOSTLY = 0.5
"""The share of variance in one dimension above which that is said."""


class Where(StrEnum):
    all = "all"
    end = "end"


class Map(StrEnum):
    pca = "pca"
    umap = "umap"
    none = "none"


Position = Annotated[
    Where, typer.Option("--position", help="The mean over a text's tokens but the first, or its last token.")
]
MapOption = Annotated[Map, typer.Option("--map", help="How the map is made; umap takes the extra [umap].")]


def compare_languages(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A .tsv, .csv, .json or .jsonl file with a column per language.")
    ],
    language: Annotated[
        list[str] | None, typer.Option("--language", help="A column; repeat. By default all but id.")
    ] = None,
    limit: Limit = None,
    position: Position = Where.all,
    drawn: MapOption = Map.pca,
    batch_size: BatchSize = None,
    model: ModelName = "smollm2",
    seed: Seed = 0,
    adapter: Adapter = None,
    dtype: Dtype = None,
    device: Device = None,
    out: Out = Path("mechinterp-languages"),
    debug: Debug = False,
) -> None:
    """Whether sentences and their translations are represented alike: retrieval, similarity and a map, by layer."""
    with reported(debug):
        check_out(out)
        parallel = mi.studies.read_parallel(file, language)
        shown = parallel if limit is None else parallel.first(limit)
        for line in parallel.left_out:
            typer.echo(line, err=True)
        loaded = mi.Model.load(model, adapter=adapter, dtype=dtype, device=device)
        typer.echo(f"{loaded}\n")
        units = _units(position)
        asked = [mi.CrossLingual(shown.rows, units=units, seed=seed), *_map(drawn, units, seed, True)]
        found = mi.run(loaded, shown.examples, asked, batch_size=batch_size, seed=seed, progress=True)
        title = f"{count(len(shown.languages), 'language')} in {Path(model).name}"
        about = {"examples": str(file), "sentences": len(shown), "left_out": list(parallel.left_out)}
        options = {name: value for name, value in found[0].meta["options"].items() if name != "rows"}
        _write([found[0].with_meta(options=options), *found[1:]], asked, out, title, _languages(found[0]), about)


def representations(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A .tsv, .csv, .json or .jsonl file of texts.")],
    text_field: TextField = "text",
    label_field: Annotated[str | None, typer.Option("--label-field", help="What the groups of texts are.")] = None,
    limit: Limit = None,
    position: Position = Where.end,
    standardize: Annotated[
        bool, typer.Option("--standardize", help="z-scores of each dimension, against massive activations.")
    ] = False,
    drawn: MapOption = Map.pca,
    batch_size: BatchSize = None,
    model: ModelName = "smollm2",
    seed: Seed = 0,
    adapter: Adapter = None,
    dtype: Dtype = None,
    device: Device = None,
    out: Out = Path("mechinterp-representations"),
    debug: Debug = False,
) -> None:
    """How alike layers are, whether texts of a group are more alike than others, and a map of every layer."""
    with reported(debug):
        check_out(out)
        rows = rows_of(file, limit)
        labels = None if label_field is None else filled(file, rows, label_field)
        examples = mi.Examples.of(filled(file, rows, text_field), labels)
        loaded = mi.Model.load(model, adapter=adapter, dtype=dtype, device=device)
        typer.echo(f"{loaded}\n")
        units = _units(position)
        asked: list[mi.Analyzer] = [mi.Similarity(units=units, seed=seed, standardize=standardize)]
        if label_field is not None:
            asked.append(mi.GroupSimilarity(units=units, seed=seed, standardize=standardize))
        asked += _map(drawn, units, seed, standardize)
        found = mi.run(loaded, examples, asked, batch_size=batch_size, seed=seed, progress=True)
        summary = [line for result in found for line in _TOLD[str(result.meta["analyzer"])](result)]
        title = f"Representations of {file.name} in {Path(model).name}"
        _write(found, asked, out, title, summary, {"examples": str(file), "n_examples": len(examples)})


def _units(position: Where) -> Any:
    from mechinterp.analyzers.units import Units

    return Units(position.value)


def _map(drawn: Map, units: Any, seed: int, standardize: bool) -> "list[mi.Analyzer]":
    """The map that is asked for."""
    if drawn is Map.none:
        return []
    method = "umap" if drawn is Map.umap else "pca"
    return [mi.RepresentationMap(units=units, seed=seed, standardize=standardize, method=method)]


def _languages(found: "mi.Result") -> list[str]:
    """For each pair of languages the layer where translations are found best."""
    data: Any = found.data
    axis = str(data["cka"].dims[-1])
    out: list[str] = []
    for i, pair in enumerate(data["pair"].values):
        raw, centred, scaled = data["accuracy"].isel(direction=[2 * i, 2 * i + 1]).mean("direction")
        if (at := _largest(scaled)) is None:
            out.append(f"{pair}: the features are all the same.")
            continue
        here = data.isel({axis: at, "pair": i}).sel(scaling="standardized")
        out.append(
            f"{pair}, {count(int(here['sentences']), 'sentence')}: translations are found best in"
            f" {axis} {data[axis].values[at]} ({float(scaled[at]):.0%} of standardized features,"
            f" {float(centred[at]):.0%} with each language centred, {float(raw[at]):.0%} of raw ones; chance"
            f" {float(data['chance'][2 * i]):.1%}); debiased CKA there {float(here['cka']):.2f}"
            f" ({float(here['cka_ci_low']):.2f} to {float(here['cka_ci_high']):.2f}), standardized."
        )
    significant: Any = data["q"].sel(features="standardized") < 0.05
    out.append(
        f"{int(significant.sum())} of {significant.size} cells of direction and {axis} are above chance (standardized,"
        " q < .05)."
    )
    return [*out, *_dominated(data["top_share"], axis)]


def _dominated(shares: Any, axis: str) -> list[str]:
    """A warning where one dimension has most of the variance."""
    most: Any = shares.max([name for name in shares.dims if name != axis])
    where = [str(entry) for entry, share in zip(most[axis].values, most.values, strict=True) if share > MOSTLY]
    if not where:
        return []
    return [
        f"One dimension has up to {float(most.max()):.0%} of the variance, and over {MOSTLY:.0%} in {axis}"
        f" {', '.join(where)}: without standardizing, similarity there is about this dimension."
    ]


def _alike(found: "mi.Result") -> list[str]:
    data: Any = found.data
    axis = str(data["similarity"].dims[1])
    meta = found.meta
    out = [f"{count(meta['units'], 'unit')} of {meta['units_seen']:,}, from {count(meta['texts'], 'text')}."]
    if constant := found.meta["constant"]:
        out.append(f"The features are the same in all units at {', '.join(constant)}: no similarity there.")
    for measure in data["measure"].values:
        one: Any = data["similarity"].sel(measure=measure)
        n = one.sizes[axis]
        neighbours = [float(one[i, i + 1]) for i in range(n - 1)]
        if n > 1:
            at = min(range(n - 1), key=lambda i: (neighbours[i] != neighbours[i], neighbours[i]))
            out.append(
                f"{str(measure).upper() if measure != 'cosine' else 'Cosine'}: the first and the last {axis}"
                f" {float(one[0, -1]):.2f}; of neighbours, {data[axis].values[at]} and {data[axis].values[at + 1]} are"
                f" least alike ({neighbours[at]:.2f})."
            )
    standardized = found.meta["options"]["standardize"] == "True"
    return out if standardized else [*out, *_dominated(data["top_share"], axis)]


def _groups(found: "mi.Result") -> list[str]:
    data: Any = found.data
    axis = str(data["gap"].dims[1])
    out: list[str] = []
    for i, pair in enumerate(data["pair"].values):
        one: Any = data.isel(pair=i)
        if (at := _largest(one["gap"])) is None:
            out.append(f"{pair}: no gap can be said, since some features have no length.")
            continue
        here = one.isel({axis: at})
        out.append(
            f"{pair}: texts are most alike within their groups in {axis} {data[axis].values[at]}, by"
            f" {float(here['gap']):+.3f} in cosine ({float(here['gap_ci_low']):+.3f} to"
            f" {float(here['gap_ci_high']):+.3f}, q {float(here['q']):.2g})."
        )
    return out


def _clusters(found: "mi.Result") -> list[str]:
    data: Any = found.data
    axis = str(data["silhouette"].dims[0])
    best: Any = data["ari"] if "ari" in data else data["silhouette"] - data["silhouette_null"]
    if (at := _largest(best)) is None:
        return ["No clusters: the features are all the same."]
    here = data.isel({axis: at})
    told = (
        f"Clusters are most separate in {axis} {here[axis].item()}: silhouette {float(here['silhouette']):.2f} with"
        f" {count(int(here['clusters']), 'cluster')}, {float(here['silhouette_null']):.2f} without any structure."
    )
    if "ari" in data:
        told = (
            f"Clusters and labels agree most in {axis} {here[axis].item()}: adjusted Rand index"
            f" {float(here['ari']):.2f} (q {float(here['ari_q']):.2g}) with {count(int(here['clusters']), 'cluster')}."
        )
    return [told]


def _largest(values: Any) -> int | None:
    """Where a row is largest; None where nothing is known."""
    numbers = values.values
    return None if (numbers != numbers).all() else int(values.fillna(-2.0).values.argmax())


_TOLD = {"Similarity": _alike, "GroupSimilarity": _groups, "RepresentationMap": _clusters}


def _write(
    found: "list[mi.Result]",
    asked: "list[mi.Analyzer]",
    out: Path,
    title: str,
    summary: list[str],
    about: dict[str, Any],
) -> None:
    """Say what was found, and write it."""
    from mechinterp.report.maps import representation_map
    from mechinterp.report.study import write_study

    for line in summary:
        typer.echo(textwrap.fill(line, 100, subsequent_indent="    ", break_on_hyphens=False))
    maps = [representation_map(result) for result in found if "coordinate" in result.data]
    manifest = {
        **{key: found[0].meta[key] for key in PROVENANCE},
        "analyzers": {str(r.meta["analyzer"]): dict(r.meta["options"]) for r in found},
        **about,
        "command": shlex.join(["mechinterp", *sys.argv[1:]]),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    explanations = {one.name: explanation(type(one)) for one in asked}
    typer.echo("\nwriting tables, figures and the report ...", err=True)
    report = write_study(
        out,
        title,
        found,
        plan="",
        manifest=manifest,
        summary=summary,
        explanations=explanations,
        drawings={"Map": maps[0]} if maps else None,
    )
    typer.echo(f"\nreport: {report}")
