"""The findings of a study in sentences, for the terminal and the top of the report."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mechinterp.core.display import count, visible
from mechinterp.core.result import Result
from mechinterp.core.statistics import MIN_EXAMPLES, summarize
from mechinterp.engine.plan import Plan

ROLE_NAMES = {"induction": "Induction heads", "previous": "Previous-token heads"}

CELLS = 3
"""Cells of a grid that are named."""
NEURONS = 5
"""Neurons whose tokens are named."""
ALPHA = 0.05


def findings(results: Sequence[Result], plan: Plan) -> list[str]:
    """What the results say, a sentence or two each, and what was shared in making them."""
    by_name = {str(r.meta.get("analyzer")): r for r in results}
    lens, direct, roles = (by_name.get(n) for n in ("LogitLens", "DirectLogitAttribution", "HeadRoles"))
    out: list[str] = []
    if lens is not None:
        out += _task(lens) + _lens(lens)
    if direct is not None:
        out += _direct(direct, lens)
    if roles is not None:
        out += _roles(roles)
    sentences: dict[str, Callable[[Result], list[str]]] = {
        "ActivationPatching": _patching,
        "CausalTracing": _tracing,
        "Probe": _probe,
        "ConceptDirections": _directions,
        "ActivationStats": _activations,
        "MaxActivating": _most_active,
        "ConceptNeurons": _concepts,
        "TokenAttribution": _attribution,
        "GradientAnalysis": _gradient,
        "NeuronImportance": _importance,
    }
    for result in results:
        if (say := sentences.get(str(result.meta.get("analyzer")))) is not None:
            out += say(result)
    return out + _shared(plan, results)


def _task(lens: Result) -> list[str]:
    """How well the model does the task: its own prediction is the lens at the last layer."""
    last = lens.data.isel(layer=-1)
    n = last.sizes["example"]
    if "logit_diff" in last:
        values = last["logit_diff"].values
        s = summarize(values)
        return [
            f"Task: the model prefers the right answer on {int((values > 0).sum())} of {n} prompts;"
            f" mean logit difference {s.mean:.2f} (95% interval {s.ci_low:.2f} to {s.ci_high:.2f})."
        ]
    if "rank" in last:
        right = int((last["rank"].values == 0).sum())
        return [f"Task: the right answer is the model's top token on {right} of {n} prompts."]
    return []


def _lens(lens: Result) -> list[str]:
    if "rank" not in lens.data:
        return ["Logit lens: the examples have no answers to look for; the top tokens are in the table."]
    share = (lens.data["rank"] == 0).mean("example")
    layers = [int(i) for i in lens.data["layer"].values]
    found = [i for i, s in zip(layers, share.values, strict=True) if s > 0.5]
    if not found:
        best = int(np.argmax(share.values))
        return [
            f"Logit lens: at no layer is the right answer the top token for most prompts"
            f" (best: layer {layers[best]}, {share.values[best]:.0%})."
        ]
    return [
        f"Logit lens: the right answer is the top token for most prompts first at layer {found[0]}"
        f" (layers are 0 to {layers[-1]}), for {float(share.sel(layer=found[0])):.0%} of them."
    ]


def _direct(direct: Result, lens: Result | None) -> list[str]:
    table: Any = direct.table("mean")
    top = table.reindex(table["mean"].abs().sort_values(ascending=False, kind="stable").index[:5])
    named = ", ".join(
        f"{r.component} {r.mean:+.2f} ({r.ci_low:.2f} to {r.ci_high:.2f})" for r in top.itertuples(index=False)
    )
    total = direct.data["attribution"].sum("component")
    sums = f"All {len(table)} components sum to {float(total.mean()):.2f} logits"
    if lens is not None and "logit_diff" in lens.data:
        target = lens.data["logit_diff"].isel(layer=-1)
        off = float(abs(total.values - target.values).max())
        sums += f"; the logit difference is {float(target.mean()):.2f} (largest gap on a prompt: {off:.0e})"
    return [f"Direct logit attribution: the largest components are {named}.", f"{sums}."]


def _roles(roles: Result) -> list[str]:
    table: Any = roles.table("score")
    out: list[str] = []
    for role, name in ROLE_NAMES.items():
        for text, where in (("random", "repeated random tokens"), ("prompts", "the prompts")):
            mine = table[(table["role"] == role) & (table["text"] == text)]
            if len(mine):
                out.append(f"{name} on {where}: {_heads(mine)}.")
                break
    return out


def _heads(table: Any) -> str:
    """Of one role on one text: the heads that stand out, strongest first."""
    top = table[table["specialised"]].sort_values("score", ascending=False, kind="stable").head(5)
    if top.empty:
        return "no head stands out from its null"
    named = ", ".join(
        f"a{r.layer}.h{r.head} {r.score:.2f} (null {r.null:.2f}, q {r.q:.1g})" for r in top.itertuples(index=False)
    )
    rest = int(table["specialised"].sum()) - len(top)
    return named + (f", and {rest} more" if rest else "")


def _patching(result: Result) -> list[str]:
    """What was restored, or destroyed, and by which cells."""
    data, options = result.data, dict(result.meta["options"])
    n = data.sizes["example"]
    clean, corrupted = (float(data[name].mean()) for name in ("clean", "corrupted"))
    right = int((data["clean"] > 0).sum())
    noising = str(options["direction"]).strip("'\"") == "noise"
    rest = 1.0 if noising else 0.0
    nothing = "the clean prompts' own is 1" if noising else "the corrupted prompts' own is 0"
    out = [
        f"Task: the model prefers the right answer on {right} of {n} clean prompts; mean logit difference {clean:.2f},"
        f" and {corrupted:.2f} on the corrupted ones. An effect of 1 is the former and 0 the latter; {nothing}."
    ]
    frame: Any = result.table("effect")
    site = str(options["site"]).strip("'\"")
    for name, group in frame.groupby("kind", sort=False) if "kind" in frame.columns else [(site, frame)]:
        out.append(f"{'Noising' if noising else 'Denoising'} {name}: {_cells(group, data, rest, str(name))}.")
    return out


def _tracing(result: Result) -> list[str]:
    """What noise on the subject took away, and which states bring back."""
    data = result.data
    used = int(data["correct"].sum())
    out = [
        f"Task: {used} of {count(data.sizes['example'], 'prompt')} traced, those that the model gets right;"
        f" the answer's probability is {float(data['clean'].mean()):.3f}, and {float(data['noised'].mean()):.3f} with"
        f" noise of standard deviation {float(result.meta['noise_std']):.3g} on the subject."
    ]
    frame: Any = result.table("effect")
    if "role" in frame.columns and data.sizes["example"] == 1:  # its tokens say more than their roles
        one = (data["restored"] - data["noised"]).isel(example=0).rename("effect")
        frame = one.drop_vars("example").to_dataframe(dim_order=["kind", "layer", "position"]).reset_index()
        frame = frame.assign(ci_low=math.nan, ci_high=math.nan, q=math.nan)
    for name, group in frame.groupby("kind", sort=False):
        out.append(f"Restoring {name}: {_cells(group, data, 0.0, str(name))}.")
    return out


def _probe(result: Result) -> list[str]:
    """Where a label is read best, and beside what."""
    data: Any = result.data
    value = "accuracy" if "accuracy" in data else "r2"
    own = data[value].sel(task="labels")
    best = int(np.argmax(own.values))
    site = str(data["site"].values[best])
    low, high = (float(data[name].sel(task="labels")[best]) for name in ("ci_low", "ci_high"))
    of = f" of {result.meta['of']}" if "of" in result.meta else ""
    left = f" ({result.meta['left_out']} without a label left out)" if result.meta["left_out"] else ""
    shared = int(result.meta["sharing"])
    left += f" ({shared} of them share a token with another word)" if shared else ""
    said = (
        f"Probes{of}, on {count(result.meta['units'], 'vector')}{left}:"
        f" best at {site}, {'R²' if value == 'r2' else value} {float(own[best]):.3f} ({low:.3f} to {high:.3f})"
    )
    beside = [
        f"{name} {float(data[value].sel(task=task)[best]):.3f}"
        for task, name in (("majority", "majority"), ("type", "word alone"), ("control", "control task"))
        if task in data["task"].values
    ]
    said += f"; beside it: {', '.join(beside)}" if beside else ""
    if "q" in data:
        said += (
            f"; {int((data['q'].values < ALPHA).sum())} of {data.sizes['site']} sites beat shuffled labels (q < .05)"
        )
    return [f"{said}. The best of many sites is chosen with hindsight."]


def _directions(result: Result) -> list[str]:
    """The site that was chosen, and how it does on what was set apart."""
    data: Any = result.data
    site = str(result.meta["chosen"])
    classes = [str(name) for name in data["class"].values]
    shown = classes[1:] if len(classes) == 2 else classes
    parts: list[str] = []
    for name in shown:
        one = data.sel({"site": site, "class": name})
        told = f"{float(one['ci_low']):.3f} to {float(one['ci_high']):.3f}, q {float(one['q']):.1g}"
        parts.append(f"{name} {float(one['test_auroc']):.3f} ({result.meta.get('untested', told)})")
    return [
        f"Directions by {result.meta['method']}: the site chosen by cross-validation is {site}; AUROC on"
        f" {count(result.meta['set_apart'], 'vector')} set apart: {', '.join(parts)}."
    ]


def _cells(frame: Any, data: Any, rest: float, kind: str) -> str:
    """The largest significant cells of a grid, or the largest where none is.

    Args:
        rest: the effect of a cell that does nothing.
    """
    frame = frame[frame["effect"].notna()]
    if frame.empty:
        return "no effect could be normalised, because the model gives both prompts the same answers"
    frame = frame.reindex((frame["effect"] - rest).abs().sort_values(ascending=False, kind="stable").index)
    significant = frame[frame["q"] < ALPHA]
    if len(significant):
        said = f"{len(significant)} of {len(frame)} cells are significant (q < .05), the largest "
    elif frame["q"].notna().any():
        said = f"none of {len(frame)} cells is significant (q < .05); the largest are "
    else:
        said = f"too few examples for a test (it takes {MIN_EXAMPLES}); the largest of {len(frame)} cells are "
    top = significant if len(significant) else frame
    across = next((axis for axis in ("position", "role") if axis in frame.columns), None)
    if across and kind.startswith(("resid", "state")):  # what is there at one layer is there at the next
        top, said = top.drop_duplicates(across), f"{said}(one layer each) "
    return said + "; ".join(_cell(row, data) for row in top.head(CELLS).to_dict("records"))


def _cell(row: dict[Any, Any], data: Any) -> str:
    """``layer 23, head 4 at position 13 (␣to): 0.83 (0.71 to 0.95)``."""
    part = next((a for a in ("head", "kv_head", "neuron") if a in row), None)
    named = [f"layer {row['layer']}"] if "layer" in row else []
    named += [f"{part.replace('_', ' ')} {row[part]}"] if part else []
    where = ", ".join(named)
    if "role" in row:
        where += f" at the {row['role']}"
    if "position" in row:
        where += f" at {'position ' if not isinstance(row['position'], str) else ''}{row['position']}"
        if "token" in data:
            here = set(data["token"].sel(position=row["position"]).values.tolist()) - {""}
            where += f" ({visible(here.pop())})" if len(here) == 1 else ""
    interval = "" if math.isnan(row["ci_low"]) else f" ({row['ci_low']:.2f} to {row['ci_high']:.2f})"
    return f"{where}: {row['effect']:.2f}{interval}"


def _activations(result: Result) -> list[str]:
    """Of each kind, over all tokens but the first: how sparse, what never acts, and the outlier dimensions."""
    data: Any = result.data
    n = int(data["tokens"].sum())
    texts = count(int(data["tokens"].sel(token="first")), "text")
    out = [f"{count(n, 'token')} of {texts}; what follows leaves out the first of each."]
    for kind in data["kind"].values.tolist():
        one = data.sel(kind=kind, token="rest")
        if not np.isfinite(one["rms"].values).any():
            continue
        low, high = float(one["rms"].min()), float(one["rms"].max())
        worst = one.isel(layer=int(one["never_positive"].values.argmax()))
        most = one.isel(layer=int(one["outliers"].values.argmax()))
        listed = str(most["outliers_which"].item()).split()[:CELLS]
        out.append(
            f"{kind}: rms {low:.3g} to {high:.3g} by layer; Hoyer sparsity {float(one['hoyer'].mean()):.2f};"
            f" {float(one['near_zero'].mean()):.0%} of numbers are near zero; never above 0 are at most"
            f" {int(worst['never_positive'])} dimensions (layer {int(worst['layer'])});"
            f" {int(one['outliers'].sum())} outlier dimensions over all layers"
            + (f", most in layer {int(most['layer'])} ({', '.join(listed)}{_more(most, listed)})." if listed else ".")
        )
    return out


def _more(layer: Any, listed: Sequence[str]) -> str:
    rest = int(layer["outliers"]) - len(listed)
    return f" and {rest} more" if rest > 0 else ""


def _most_active(result: Result) -> list[str]:
    """Of the first neurons, the tokens at which each is largest."""
    data: Any = result.data.sel(side="high")
    kind = str(result.meta["options"]["kind"]).strip("'\"")
    cells = [data.isel(layer=i, neuron=j) for i in range(data.sizes["layer"]) for j in range(data.sizes["neuron"])]
    out: list[str] = []
    for cell in cells[:NEURONS]:
        said = ", ".join(f"“{visible(str(token), 20)}”" for token in cell["token"].values[:CELLS] if token)
        name = f"{kind}.{int(cell['layer'])}.n{int(cell['neuron'])}"
        out.append(f"{name} is above 0 at {float(cell['density']):.0%} of tokens, and largest at {said}.")
    return out


def _concepts(result: Result) -> list[str]:
    """Of each label, how many neurons go with it, the best of them on held-out texts, and what they do."""
    data: Any = result.data
    left_out = int(result.meta["unlabelled"])
    out = [f"{count(left_out, 'text')} without a label left out."] if left_out else []
    for label in data["label"].values.tolist():
        one = data.sel(label=label)
        tested = int(np.isfinite(one["p"].values).sum())
        columns = ("site", "held_out_auroc", "held_out_auroc_ci_low", "held_out_auroc_ci_high")
        best = zip(*(one[name].values[:CELLS].tolist() for name in columns), strict=True)
        named = [f"{site} {auroc:.2f} ({low:.2f} to {high:.2f})" for site, auroc, low, high in best]
        out.append(
            f"{visible(label, 20, spaces=False)} ({count(int(one['texts']), 'text')}): {int(one['significant'].sum())}"
            f" of {tested:,} neurons go with it (q < .05); AUROC of the best on the {int(one['held_out'])} held-out"
            f" texts of the label and the others: {', '.join(named)}."
        )
        if "effect" in data:
            out.append(_off(one, visible(label, 20, spaces=False), str(result.meta["metric"])))
    return out


def _attribution(result: Result) -> list[str]:
    """The words that contribute most where they occur, and what is left over."""
    data: Any = result.data
    unit = result.views[0].unit
    terms = [
        f"“{visible(str(term), 20)}” {float(value):+.3g}"
        for term, value in zip(data["term"].values[:NEURONS], data["mean_attribution"].values, strict=False)
    ]
    out = f"Most contribute, on average where they occur: {', '.join(terms)} ({unit})."
    for name in ("completeness_error", "additivity_error"):
        if name in data:
            size = np.nansum(np.abs(data["attribution"].transpose("example", "position").values), 1)
            share = float((np.abs(data[name].values) / np.maximum(size, 1e-12)).max())
            out += f" They add up to the change of the metric within {share:.1%} of their size."
    return [out]


def _gradient(result: Result) -> list[str]:
    """Where the gradient is largest."""
    out: list[str] = []
    for kind in result.data["kind"].values.tolist():
        one = result.data.sel(kind=kind)
        at = one.isel(layer=int(one["by_layer"].values.argmax()))
        value, low, high = (float(at[name]) for name in ("by_layer", "ci_low", "ci_high"))
        out.append(
            f"{kind}: the gradient is largest at layer {int(at['layer'])}, {value:.3g} ({low:.3g} to {high:.3g})."
        )
    return out


def _importance(result: Result) -> list[str]:
    """The first neurons of the ranking, and what switching them off does."""
    data: Any = result.data
    rank = data["rank"].transpose("layer", "neuron").values
    first = np.dstack(np.unravel_index(np.argsort(rank, None)[:CELLS], rank.shape))[0].tolist()
    named = [f"mlp_act.{int(data['layer'][i])}.n{int(data['neuron'][j])}" for i, j in first]
    out = [f"The first neurons of the ranking are {', '.join(named)}. The metric is {float(data['clean'].mean()):.3g}."]
    for size in data["size"].values.tolist():
        off = [data.sel(size=size, order=order) for order in ("ranked", "random")]
        said = [f"{float(o['curve']):.3g} ({float(o['ci_low']):.3g} to {float(o['ci_high']):.3g})" for o in off]
        out.append(
            f"With the first {count(int(size), 'neuron')} switched off it is {said[0]}; as many random ones, {said[1]}."
        )
    return out


def _off(one: Any, label: str, metric: str) -> str:
    """What switching the most neurons off together does, beside random ones."""
    last = one.isel(size=-1)

    def said(order: str, on: str) -> str:
        cell = last.sel(order=order, on=on)
        low, high = float(cell["effect_ci_low"]), float(cell["effect_ci_high"])
        return f"{float(cell['effect']):+.3f} ({low:+.3f} to {high:+.3f})"

    return (
        f"The first {int(last['size'])} of them switched off change the {metric} by {said('ranked', 'label')} on"
        f" held-out texts of {label} and {said('ranked', 'rest')} on the others; as many random neurons of the same"
        f" layers by {said('random', 'label')} and {said('random', 'rest')}."
    )


def _shared(plan: Plan, results: Sequence[Result]) -> list[str]:
    served: list[str] = []
    runs = {"clean": "the prompts", "corrupted": "the corrupted prompts"}
    for one in plan.passes:
        made = one.batches * one.rows
        what = " and ".join(runs.get(run, run.removeprefix("own: ")) for run in one.run.split(", "))
        if one.what == "sweep":
            said = f"{count(one.rows, 'row')} of a sweep over {what}"
        elif one.what == "sweep runs":
            said = f"unedited passes over {what}"
        else:
            said = f"{made} {one.what} {'pass' if made == 1 else 'passes'} over {what}"
        served.append(f"{said} for {', '.join(one.users)}")
    passes = dict(results[0].meta.get("passes", {})) if results else {}
    edited = f", and {count(passes['sweep_rows'], 'edited row')}" if passes.get("sweep_rows") else ""
    whole = passes.get("forward", 0) + passes.get("sweep_runs", 0)
    return [f"Shared: {'; '.join(served)}. Forward passes made in all: {whole}{edited}."]
