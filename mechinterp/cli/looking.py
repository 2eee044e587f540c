"""mechinterp visualize-attention, compare-attention and compare-models-attention: attention to look at."""

import shlex
import sys
import textwrap
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import mechinterp as mi
from mechinterp.cli.causal import BatchSize
from mechinterp.cli.study import (
    PROVENANCE,
    READERS,
    WAYS_IN,
    Adapter,
    Debug,
    Device,
    Dtype,
    ModelName,
    Out,
    Seed,
    check_out,
    read_examples,
    reported,
)
from mechinterp.core.display import count, visible
from mechinterp.errors import ExamplesError

if TYPE_CHECKING:
    import plotly.graph_objects as go

FORMATS = (".jsonl", ".json", ".txt")
NAMED = 3
"""Heads that a sentence names."""
SIDE_BY_SIDE = 6
"""Heads of each input that are shown beside those of the others."""


def _shown(otherwise: str) -> Any:
    return typer.Option(
        "--heads", metavar="L.H,L.H,...", help=f"Heads to show, such as 10.1,16.0; else those that {otherwise}."
    )


def visualize_attention(
    dialogue: Annotated[
        Path | None,
        typer.Argument(
            metavar="[DIALOGUE]",
            help="A .jsonl or .json file of speaker and text, or a .txt file of 'Speaker: words'.",
            show_default=False,
        ),
    ] = None,
    text: Annotated[str | None, typer.Option("--text", help="One text instead of a dialogue.")] = None,
    heads: Annotated[str | None, _shown("attend most to one token")] = None,
    pair: Annotated[
        str | None,
        typer.Option("--pair", metavar="Q,K", help="Query and key of the neuron view, such as end,4; by position."),
    ] = None,
    model: ModelName = "smollm2",
    seed: Seed = 0,
    adapter: Adapter = None,
    dtype: Dtype = None,
    device: Device = None,
    out: Out = Path("mechinterp-attention"),
    debug: Debug = False,
) -> None:
    """Look at attention: all heads, one head token by token, one token's keys; in a dialogue, who attends to whom."""
    if (dialogue is None) == (text is None):
        raise typer.BadParameter("give a file DIALOGUE or --text, and not both")
    if dialogue is not None and dialogue.suffix not in FORMATS:
        raise typer.BadParameter(f"{dialogue} is none of {', '.join(FORMATS)}", param_hint="DIALOGUE")
    chosen, positions = _heads(heads), _pair(pair)
    with reported(debug):
        from mechinterp.report.attention import attention_figures, strongest

        check_out(out)
        spoken = None if dialogue is None else mi.studies.Dialogue.load(dialogue)
        loaded, begun = _load(model, adapter, dtype, device), time.perf_counter()
        said = spoken.text if spoken is not None else str(text)
        analyzers = [_patterns(loaded, said, chosen, positions), mi.AttentionProfile()]
        if spoken is not None:
            analyzers.append(mi.studies.AttentionBetweenSpeakers(spoken))
        patterns, profile, *between = mi.run(loaded, said, analyzers, seed=seed, progress=True)
        figures = attention_figures(patterns, heads=chosen)
        n = patterns.data.sizes["query"]
        summary = [_sink(profile, n), _focused(patterns, strongest(patterns, most=NAMED))]
        summary += [_speakers(one) for one in between]
        name = "one text" if dialogue is None else dialogue.name
        title = f"Attention on {name} in {Path(model).name}"
        results = [*between, profile, patterns]
        source = "given on the command line" if dialogue is None else str(dialogue)
        _write(out, title, results, summary, {"examples": source, "tokens": n}, begun, figures)


def compare_attention(
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="TEXT TEXT... | FILE", help="Two texts or more, or a .jsonl or .csv file: text, label."),
    ],
    heads: Annotated[str | None, _shown("differ most")] = None,
    batch_size: BatchSize = None,
    model: ModelName = "smollm2",
    seed: Seed = 0,
    adapter: Adapter = None,
    dtype: Dtype = None,
    device: Device = None,
    out: Out = Path("mechinterp-compare"),
    debug: Debug = False,
) -> None:
    """How each head's attention differs between inputs: texts, or the labels of a file (examples are the unit)."""
    file = _file(inputs)
    chosen = _heads(heads)
    with reported(debug):
        from mechinterp.analyzers.patterns import fits
        from mechinterp.report.attention import attention_figures

        check_out(out)
        examples = mi.Examples.of(inputs) if file is None else read_examples(file)
        loaded, begun = _load(model, adapter, dtype, device), time.perf_counter()
        compared = mi.studies.compare_attention(loaded, examples, batch_size=batch_size, seed=seed, progress=True)
        figures: dict[str, go.Figure] = {}
        results = [compared]
        single = len(compared.data["input"]) == len(examples)
        if single and fits(loaded, loaded.tokenize(examples).lengths):  # they can be looked at
            patterns = mi.run(loaded, examples, mi.AttentionPatterns(), batch_size=1, seed=seed)
            same = chosen or _differing(compared, SIDE_BY_SIDE)
            for i, name in enumerate(compared.data["input"].values):
                figures[f"Heads side by side: {name}"] = attention_figures(patterns, i, same)["Heads side by side"]
            results.append(patterns)
        title = f"Attention of {Path(model).name} on {count(len(compared.data['input']), 'input')}"
        source = "given on the command line" if file is None else str(file)
        more = {"examples": source, "n_examples": len(examples), "shuffles": compared.meta["shuffles"]}
        _write(out, title, results, _differences(compared), more, begun, figures)


def compare_models_attention(
    text: Annotated[str, typer.Argument(help="The text that all models read.")],
    model: Annotated[list[str], typer.Option("--model", help=f"Repeat for two models or more: {WAYS_IN}")],
    seed: Seed = 0,
    dtype: Dtype = None,
    device: Device = None,
    out: Out = Path("mechinterp-compare-models"),
    debug: Debug = False,
) -> None:
    """How the attention of several models differs on one text: by depth, over all heads, layer by layer."""
    if len(model) < 2:
        raise typer.BadParameter("give two models or more", param_hint="--model")
    with reported(debug):
        check_out(out)
        begun = time.perf_counter()
        loaded = [_load(name, None, dtype, device) for name in model]
        names = [Path(name).name for name in model]
        compared = mi.studies.compare_models(loaded, text, names, seed=seed)
        title = f"Attention of {' and '.join(compared.data['model'].values)} on one text"
        more = {"examples": "given on the command line", "units": len(compared.meta["units"])}
        _write(out, title, [compared], _models(compared), more, begun, {})


def _load(name: str, adapter: str | None, dtype: str | None, device: str | None) -> "mi.Model":
    model = mi.Model.load(name, adapter=adapter, dtype=dtype, device=device)
    typer.echo(f"{model}\n")
    return model


def _patterns(
    model: "mi.Model", text: str, heads: list[tuple[int, int]] | None, pair: tuple[Any, Any] | None
) -> "mi.Analyzer":
    """Of all heads, or, where the text is too long for that, of those that are named.

    Raises:
        ExamplesError: it is too long, and none is named.
    """
    from mechinterp.analyzers.patterns import fits

    n = model.tokenize(text).lengths[0]
    if fits(model, [n]):
        return mi.AttentionPatterns(pair=pair)
    if heads is None:
        raise ExamplesError(f"the patterns of all heads over {n} tokens are too large to show; name some with --heads")
    layers, numbers = (tuple(sorted(set(some))) for some in zip(*heads, strict=True))
    return mi.AttentionPatterns(layers, numbers, pair)


def _file(inputs: Sequence[str]) -> Path | None:
    """The file that a single input names; None for texts. Anything else is wrong usage."""
    if len(inputs) > 1:
        if names := [one for one in inputs if Path(one).suffix in READERS and len(one.split()) == 1]:
            raise typer.BadParameter(
                f"{names[0]} is a file, and only one can be given; put all rows into one, with a label each",
                param_hint="TEXT",
            )
        return None
    file = Path(inputs[0])
    if file.suffix not in READERS:
        raise typer.BadParameter("give two texts or more, or one .jsonl or .csv file", param_hint="TEXT")
    return file


def _heads(text: str | None) -> list[tuple[int, int]] | None:
    """``10.1,16.0``: layer and head."""
    try:
        chosen = None if text is None else [tuple(int(n) for n in one.split(".")) for one in text.split(",")]
        if chosen and any(len(one) != 2 for one in chosen):
            raise ValueError
        return None if chosen is None else [(layer, head) for layer, head in chosen]
    except ValueError:
        raise typer.BadParameter(
            f"must be layers and heads, such as 10.1,16.0. Got {text!r}", param_hint="--heads"
        ) from None


def _pair(text: str | None) -> tuple[Any, Any] | None:
    """``end,4``: positions of a query and a key."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 2 or not all(part == "end" or part.lstrip("-").isdigit() for part in parts):
        raise typer.BadParameter(f"must be two positions, such as end,4. Got {text!r}", param_hint="--pair")
    query, key = (part if part == "end" else int(part) for part in parts)
    return query, key


def _write(
    out: Path,
    title: str,
    results: "Sequence[mi.Result]",
    summary: Sequence[str],
    more: dict[str, Any],
    begun: float,
    figures: "dict[str, go.Figure]",
) -> None:
    """Say what was found, and write it."""
    from mechinterp.report.study import write_study

    ran = time.perf_counter()
    for line in summary:
        typer.echo(textwrap.fill(line, 100, subsequent_indent="    ", break_on_hyphens=False))
    manifest = {
        **{key: results[0].meta[key] for key in PROVENANCE if key in results[0].meta},
        **more,
        "command": shlex.join(["mechinterp", *sys.argv[1:]]),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": {"run": round(ran - begun, 2)},
    }
    typer.echo("\nwriting tables, figures and the report ...", err=True)
    report = write_study(
        out, title, results, plan="", manifest=manifest, summary=summary, explanations=_EXPLAINED, drawings=figures
    )
    typer.echo(f"\nreport: {report}")


_EXPLAINED = {
    "AttentionPatterns": "Whole patterns of the heads that attend most to one earlier token but the first. All"
    " patterns are in results/, as safetensors.",
    "AttentionProfile": "Of each head: the entropy of a query's attention, its share on the text's first token (often a"
    " sink), and how many tokens back it reaches; means over the queries past the first.",
    "AttentionBetweenSpeakers": "The share of a speaker's attention on the turns of each speaker; the text's first"
    " token, often a sink, is a column of its own. Expected is what the rest would be if spread evenly over all tokens"
    " seen.",
    "AttentionComparison": "Divergence is Jensen-Shannon's, in bits, 0 to 1: of two inputs' distributions of attention"
    " over distances, and, between texts with as many tokens, of their patterns, query by query. Dots are q < .05 of a"
    " permutation test over examples.",
    "AttentionOfModels": "All models are measured over the same pieces of text, the finest at which tokens of all of"
    " them end. Layers are compared by depth, heads by their distribution, and each layer's mean pattern with every"
    " layer of the other model.",
}


def _sink(profile: "mi.Result", n: int) -> str:
    data: Any = profile.data
    first = float(data["first"].mean())
    return (
        f"{count(n, 'token')}; on average {first:.0%} of attention is on the first token, the entropy is"
        f" {float(data['entropy'].mean()):.2f} bits, and attention reaches {float(data['distance'].mean()):.1f} tokens"
        " back."
    )


def _focused(patterns: "mi.Result", heads: Sequence[tuple[int, int]]) -> str:
    focus: Any = patterns.data["focus"].isel(example=0)
    named = ", ".join(f"a{a}.h{b} {float(focus.sel(layer=a, head=b)):.2f}" for a, b in heads)
    return f"The heads that attend most to one earlier token but the first: {named}."


def _differing(compared: "mi.Result", most: int) -> list[tuple[int, int]]:
    """The heads whose attention differs most between two inputs: token by token, where that can be said of some."""
    difference: Any = compared.data["difference"]
    measure = "js_tokens" if "js_tokens" in difference["measure"].values else "js"
    frame: Any = difference.sel(measure=measure).max("pair").to_series().sort_values(ascending=False, kind="stable")
    return [(int(layer), int(head)) for layer, head in frame.index[:most]]


def _speakers(between: "mi.Result") -> str:
    frame: Any = between.table("share")
    frame = frame[frame["expected"].notna()]
    told: list[str] = []
    for (speaker, other), cell in frame.groupby(["speaker", "other"], sort=False):
        told.append(
            f"{visible(str(speaker), 20)} to {visible(str(other), 20)} {cell['share'].mean():.2f}"
            f" (evenly spread {cell['expected'].mean():.2f})"
        )
    tested = int((frame["q"] < 0.05).sum())
    heads = f"{tested} of {len(frame)} cells of layer, head and speakers differ from an even spread (q < .05)"
    if frame["q"].isna().all():
        heads = "too few turns for a test"
    return f"Who attends to whom, mean over layers and heads: {'; '.join(told)}. {heads[0].upper() + heads[1:]}."


def _differences(compared: "mi.Result") -> list[str]:
    frame: Any = compared.table("difference")
    out: list[str] = []
    tests = {"js": "profiles", "js_tokens": "patterns, token by token,"}
    for measure, what in tests.items():
        for pair, some in frame[frame["measure"] == measure].groupby("pair", sort=False):
            top = some.sort_values("difference", ascending=False, kind="stable").head(NAMED)
            named = ", ".join(f"a{r['layer']}.h{r['head']} {r['difference']:.3f}" for r in top.to_dict("records"))
            tested = some["q"].notna().any()
            told = f"; {int((some['q'] < 0.05).sum())} of {len(some)} heads differ (q < .05)" if tested else ""
            mean = some["difference"].mean()
            out.append(f"{pair}: attention {what} differ by {mean:.3f} bits on average, most in {named}{told}.")
    return out


def _models(compared: "mi.Result") -> list[str]:
    data: Any = compared.data
    out = [f"The text is {count(len(compared.meta['units']), 'piece')} in which tokens of all models end."]
    for name in data["model"].values:
        one = data.sel(model=name)
        first, entropy, distance = (float(one[m].mean()) for m in ("first", "entropy", "distance"))
        out.append(
            f"{name}: {first:.0%} of attention on the first piece, entropy {entropy:.2f} bits, {distance:.1f} pieces"
            " back."
        )
    for i, pair in enumerate(data["pair"].values):
        js: Any = data["js"].isel(pair=i)
        least: Any = js.where(js == js.min(), drop=True)
        layer, other = int(least["layer"][0]), int(least["other_layer"][0])
        out.append(
            f"{pair}: heads lie {float(data['first_apart'][i]):.2f} apart in attention on the first piece and"
            f" {float(data['entropy_apart'][i]):.2f} bits in entropy (Wasserstein distance); the most similar layers"
            f" are {layer} and {other} ({float(js[layer, other]):.3f} bits)."
        )
    return out
