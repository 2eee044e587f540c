"""mechinterp circuit: which edges a behaviour needs, and whether they do what the model does."""

import shlex
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import mechinterp as mi
from mechinterp.cli.causal import BatchSize
from mechinterp.cli.study import (
    PROVENANCE,
    Adapter,
    Debug,
    Device,
    Dtype,
    ModelArgument,
    Out,
    Seed,
    check_format,
    check_out,
    explanation,
    read_examples,
    reported,
)
from mechinterp.core.display import count
from mechinterp.errors import ExamplesError

if TYPE_CHECKING:
    from mechinterp.studies import Circuit

FAITHFUL = 0.85
MOST_CUT = 200
"""Edges of the largest circuit from which each edge is cut alone."""
NAMED, ALPHA = 5, 0.05


class Method(StrEnum):
    eap = "eap"
    eap_ig = "eap-ig"
    eap_ig_activations = "eap-ig-activations"
    acdc = "acdc"
    activation_patching = "activation-patching"
    exact = "exact"


class Kind(StrEnum):
    mixed = "mixed"
    attention_only = "attention_only"
    mlp_only = "mlp_only"


@dataclass(frozen=True)
class Found:
    """One circuit, and what was measured of it."""

    name: str
    """What its headings and files add to theirs; empty where there is only one."""
    circuit: "Circuit"
    faithfulness: "mi.Result"
    curve: "mi.Result | None"
    minimality: "mi.Result | None"


def circuit(
    model: ModelArgument,
    pairs: Annotated[
        Path, typer.Argument(metavar="PAIRS", help="A .jsonl or .csv file: clean, corrupted, answer, wrong.")
    ],
    method: Annotated[Method, typer.Option("--method", help="What scores the edges.")] = Method.eap_ig,
    kinds: Annotated[
        list[Kind] | None,
        typer.Option("--type", help="What edges are among; repeat for several. By default mixed."),
    ] = None,
    edges: Annotated[int | None, typer.Option("--edges", min=1, help="How many edges,")] = None,
    share: Annotated[float | None, typer.Option("--share", help="or which share of all, such as 0.01;")] = None,
    faithful: Annotated[
        float | None,
        typer.Option("--faithful", help=f"else as few as are this faithful ({FAITHFUL})."),
    ] = None,
    held_out: Annotated[
        Path | None, typer.Option("--held-out", metavar="FILE", help="Other pairs, to test the circuit on.")
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Of integrated gradients.")] = 5,
    ungrouped: Annotated[
        bool, typer.Option("--ungrouped", help="Keys and values of each head, not of each group of heads.")
    ] = False,
    candidates: Annotated[int, typer.Option("--candidates", min=1, help="acdc: edges that it begins with.")] = 300,
    threshold: Annotated[
        float, typer.Option("--threshold", min=0, help="acdc: KL, in nats, that an edge must be worth.")
    ] = 0.01,
    curve: Annotated[bool, typer.Option("--curve/--no-curve", help="Faithfulness by size, CPR and CMD.")] = True,
    batch_size: BatchSize = None,
    seed: Seed = 0,
    adapter: Adapter = None,
    dtype: Dtype = None,
    device: Device = None,
    out: Out = Path("mechinterp-circuit"),
    debug: Debug = False,
) -> None:
    """Circuit discovery: the edges between heads and MLPs that a behaviour needs, and how faithful they are.

    An edge outside the circuit carries the corrupted prompt's value.
    Faithfulness 1 is the whole model's logit difference, 0 that with every edge cut.
    """
    check_format(pairs, "PAIRS")
    check_format(held_out or pairs, "--held-out")
    _check_size(method, edges, share, faithful)
    options: dict[str, Any] = {"size": edges if share is None else share, "faithful": faithful or FAITHFUL}
    options |= {"steps": steps, "ungrouped": ungrouped, "candidates": candidates, "threshold": threshold}
    types: list[Any] = [kind.value for kind in dict.fromkeys(kinds or [Kind.mixed])]
    with reported(debug):
        check_out(out)
        examples, tested = _read(pairs), _read(held_out or pairs)
        begun = time.perf_counter()
        loaded = mi.Model.load(model, adapter=adapter, dtype=dtype, device=device)
        typer.echo(f"{loaded}\n")
        ready = time.perf_counter()
        common: dict[str, Any] = {"batch_size": batch_size, "seed": seed, "progress": True}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "no circuit of type")  # the summary says it
            circuits = mi.studies.discover(loaded, examples, method.value, types, **options, **common)
        found = [
            _test(f" ({kind.replace('_', ' ')})" if len(types) > 1 else "", one, loaded, tested, curve, common)
            for kind, one in circuits.items()
        ]
        ran = time.perf_counter()
        known = [*zip(examples.texts, examples.corrupted or (), strict=True)]
        again = sum(pair in known for pair in zip(tested.texts, tested.corrupted or (), strict=True))
        summary = _summary(found, options, len(tested), held_out, again)
        for line in summary:
            typer.echo(textwrap.fill(line, 100, subsequent_indent="    ", break_on_hyphens=False))
        manifest = {
            **{key: value for key, value in found[0].circuit.meta.items() if key in PROVENANCE},
            "circuit": {"method": method.value, "types": types, **options},
            "examples": str(pairs),
            "n_examples": len(examples),
            "held_out": str(held_out or "none"),
            "command": shlex.join(["mechinterp", *sys.argv[1:]]),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": {"load": round(ready - begun, 2), "run": round(ran - ready, 2)},
        }
        typer.echo("\nwriting tables, figures and the report ...", err=True)
        report = _write(out, f"Circuit of {pairs.name} in {Path(model).name}", found, manifest, summary)
        typer.echo(f"\nreport: {report}")


def _check_size(method: Method, edges: int | None, share: float | None, faithful: float | None) -> None:
    """Refuse a size that makes no sense before anything is read."""
    sizes = {"--edges": edges, "--share": share, "--faithful": faithful}
    given = [name for name, value in sizes.items() if value is not None]
    if len(given) > 1:
        raise typer.BadParameter(f"give {given[0]} or {given[1]}, and not both")
    if given and method is Method.acdc:
        raise typer.BadParameter(f"acdc goes by --threshold; leave out {given[0]}", param_hint=given[0])
    if share is not None and not 0 < share <= 1:
        raise typer.BadParameter(f"must be above 0 and at most 1. Got {share}", param_hint="--share")
    if faithful is not None and not faithful > 0:
        raise typer.BadParameter(f"must be above 0. Got {faithful}", param_hint="--faithful")


def _read(path: Path) -> "mi.Examples":
    examples = read_examples(path)
    if examples.corrupted is None or any(len(sides) < 2 for sides in examples.answers or [()]):
        raise ExamplesError(f"{path} has no pairs; give every row clean, corrupted, answer and wrong")
    return examples


def _test(
    name: str, one: "Circuit", model: "mi.Model", pairs: "mi.Examples", curve: bool, options: dict[str, Any]
) -> Found:
    """Measure a circuit; the results say of which one they are."""

    def measured(test: "Callable[..., mi.Result]") -> "mi.Result":
        result = test(one, model, pairs, **options)
        return result.with_meta(analyzer=f"{result.meta['analyzer']}{name}")

    return Found(
        name,
        one,
        measured(mi.studies.faithfulness),
        measured(mi.studies.faithfulness_curve) if curve else None,
        measured(mi.studies.minimality) if 0 < len(one) <= MOST_CUT else None,
    )


def _summary(found: Sequence[Found], options: dict[str, Any], n: int, held_out: Path | None, again: int) -> list[str]:
    """What was found, in sentences; `again` of the pairs that it was tested on are those it was found on."""
    full: Any = found[0].faithfulness.data["full"].values
    on = "that it was found on, which flatters it (--held-out takes others)"
    if held_out:
        those = "other than those" if not again else f"{again:,} of which are among those"
        on = f"of {held_out.name}, {those} it was found on"
    out = [
        f"Task: the model prefers the right answer on {int((full > 0).sum())} of {count(n, 'pair')}; mean logit"
        f" difference {float(full.mean()):.2f}."
    ]
    for one in found:
        out += [_size(one, options), *_stability(one), _faithfulness(one, f"the {count(n, 'pair')} {on}")]
        out += [_curve(one)] if one.curve is not None else []
        if edges := [f"{u} → {v} {score:+.2f}" for u, v, score in one.circuit.edges.head(NAMED).to_numpy()]:
            out.append(f"Strongest edges{one.name}: {', '.join(edges)}.")
        out += [_minimality(one.minimality, one.name)] if one.minimality is not None else []
    return out


def _size(one: Found, options: dict[str, Any]) -> str:
    """How many edges, and why so many."""
    meta, graph = one.circuit.meta, one.circuit.graph
    size, goal = options["size"], f"faithfulness {options['faithful']:g}"
    why = f"the fewest of the largest scores, by size, of {meta['method']} that reach {goal}"
    if meta["method"] == Method.acdc:
        why = f"what acdc kept of {meta['tried']:,} candidates, each worth {meta['threshold']:g} nats or more"
    elif size is not None:
        asked = size if isinstance(size, int) else max(1, round(size * len(graph)))
        why = f"those of the {asked:,} largest scores, by size, of {meta['method']} that are on a path to the logits"
    elif not meta["faithfulness"] >= options["faithful"]:
        why = f"all that are on a path to the logits, for no fewer reach {goal}"
    said = f"Circuit{one.name}: {len(one.circuit):,} of {len(graph):,} edges"
    return f"{said} ({100 * len(one.circuit) / len(graph):.2g}%), {count(len(one.circuit.nodes), 'node')}; {why}."


def _stability(one: Found) -> list[str]:
    """Whether other draws of the examples give the same edges, where it is known."""
    from mechinterp.studies.circuits import STABLE

    meta = one.circuit.meta
    if "stability" not in meta:
        return []
    word = "unstable" if one.circuit.unstable else "stable"
    share = f"{meta['stability']:.2f}, where {STABLE:g} counts as stable"
    return [f"Stability{one.name}: {word}; circuits of examples drawn anew overlap by {share} (mean Jaccard index)."]


def _faithfulness(one: Found, where: str) -> str:
    data: Any = one.faithfulness.data
    share, low, high = (float(data[name]) for name in ("faithfulness", "ci_low", "ci_high"))
    means = {name: f"{float(data[name].mean()):.2f}" for name in ("circuit", "full", "empty")}
    return (
        f"Faithfulness{one.name}: {_interval(share, low, high)} on {where}; mean logit difference {means['circuit']},"
        f" the whole model's {means['full']}, and {means['empty']} with every edge cut."
    )


def _curve(one: Found) -> str:
    from mechinterp.studies.evaluation import summary

    assert one.curve is not None
    row: Any = summary({"": one.curve}).iloc[0]
    cpr = _interval(row["cpr"], row["cpr_ci_low"], row["cpr_ci_high"])
    cmd = _interval(row["cmd"], row["cmd_ci_low"], row["cmd_ci_high"])
    told = f"CPR {cpr}, most positive scores first, higher is better; CMD {cmd}, largest first, lower is better"
    return f"Curve{one.name}, over all sizes: {told}."


def _minimality(result: "mi.Result", name: str) -> str:
    frame: Any = result.table("loss")
    needed, first = int(((frame["q"] < ALPHA) & (frame["loss"] > 0)).sum()), frame.iloc[0]
    said = f"{needed} of {count(len(frame), 'edge')} lose faithfulness when cut alone (q < .05)"
    if frame["q"].isna().all():
        said = "too few pairs for a test of single edges"
    loss = _interval(first["loss"], first["ci_low"], first["ci_high"])
    return f"Minimality{name}: {said}; the largest loss is {loss}, of {first['sender']} → {first['receiver']}."


def _interval(value: float, low: float, high: float) -> str:
    """``0.88 (95% interval 0.80 to 0.95)``; NaN: too few pairs."""
    said, *ends = (f"{round(each, 2) + 0.0:.2f}" for each in (value, low, high))  # never -0.00
    said = "not defined" if value != value else said
    return said if low != low else f"{said} (95% interval {ends[0]} to {ends[1]})"


def _write(out: Path, title: str, found: Sequence[Found], manifest: dict[str, Any], summary: Sequence[str]) -> Path:
    from mechinterp.report.files import slug
    from mechinterp.report.study import write_study
    from mechinterp.studies.circuit_figure import circuit_picture, write_json

    results: list[mi.Result] = []
    files, explanations = dict[str, str](), dict[str, str]()
    for one in found:
        tests = (("faithfulness", one.faithfulness), ("faithfulness_curve", one.curve), ("minimality", one.minimality))
        there = [(how, result) for how, result in tests if result is not None]
        results += [*_tables(one), *(result for _, result in there)]
        for how, result in there:  # what its docstring says first
            explanations[str(result.meta["analyzer"])] = explanation(getattr(mi.studies, how))
        stem = slug(f"circuit{one.name}")
        files |= {f"{stem}.json": write_json(one.circuit), f"{stem}.dot": one.circuit.dot()}
    drawings = {f"Circuit{one.name}": one.circuit.figure() for one in found}
    pictures = {f"Circuit{one.name}": circuit_picture(one.circuit) for one in found}
    more: dict[str, Any] = {"explanations": explanations, "drawings": drawings, "pictures": pictures, "files": files}
    return write_study(out, title, results, plan="", manifest=manifest, summary=summary, **more)


def _tables(one: Found) -> "list[mi.Result]":
    """The circuit's edges and nodes as results, largest first."""
    import xarray as xr

    edges: Any = one.circuit.edges
    named: Any = edges.set_index(edges["sender"] + " → " + edges["receiver"]).rename_axis("edge")
    scores = xr.Dataset.from_dataframe(named).set_coords(["sender", "receiver"])
    sent = xr.Dataset.from_dataframe(one.circuit.by_node().set_index("node"))
    strongest = mi.View("bars", "score", "edge", title="The strongest edges", unit="score")
    sending = mi.View("bars", "outgoing", "node", title="What nodes send", unit="sum of sizes of scores")
    meta = {key: one.circuit.meta[key] for key in ("model", "method", "metric", "seed")}
    return [
        mi.Result(scores, {**meta, "analyzer": f"CircuitEdges{one.name}"}, (strongest,)),
        mi.Result(sent, {**meta, "analyzer": f"CircuitNodes{one.name}"}, (sending,)),
    ]
