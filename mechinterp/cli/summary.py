"""The findings of a study in sentences, for the terminal and the top of the report."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mechinterp.core.display import visible
from mechinterp.core.result import Result
from mechinterp.core.statistics import MIN_EXAMPLES, summarize
from mechinterp.engine.plan import Plan

ROLE_NAMES = {"induction": "Induction heads", "previous": "Previous-token heads"}

CELLS = 3
"""Cells of a grid that are named."""
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
    for result in results:
        if result.meta.get("analyzer") == "ActivationPatching":
            out += _patching(result)
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
    data = result.data
    n = data.sizes["example"]
    clean, corrupted = (float(data[name].mean()) for name in ("clean", "corrupted"))
    right = int((data["clean"] > 0).sum())
    out = [
        f"Task: the model prefers the right answer on {right} of {n} clean prompts; mean logit difference"
        f" {clean:.2f}, and {corrupted:.2f} on the corrupted ones (an effect of 1 is all of that difference)."
    ]
    frame: Any = result.table("effect")
    several = "kind" in frame.columns
    site = str(dict(result.meta["options"])["site"]).strip("'\"")
    for name, group in frame.groupby("kind", sort=False) if several else [(site, frame)]:
        out.append(f"Patching {name}: {_cells(group, data)}.")
    return out


def _cells(frame: Any, data: Any) -> str:
    """The largest significant cells of a grid, or the largest where none is."""
    frame = frame[frame["effect"].notna()]
    if frame.empty:
        return "no effect could be normalised, because the two prompts give the same answers"
    frame = frame.reindex(frame["effect"].abs().sort_values(ascending=False, kind="stable").index)
    significant = frame[frame["q"] < ALPHA]
    if len(significant):
        said = f"{len(significant)} of {len(frame)} cells are significant (q < .05), the largest "
    elif frame["q"].notna().any():
        said = f"none of {len(frame)} cells is significant (q < .05); the largest are "
    else:
        said = f"too few examples to test, of which it takes {MIN_EXAMPLES}; the largest of {len(frame)} cells are "
    top = significant if len(significant) else frame
    return said + "; ".join(_cell(row, data) for row in top.head(CELLS).to_dict("records"))


def _cell(row: dict[str, Any], data: Any) -> str:
    """``layer 23, head 4 at position 13 (␣to): 0.83 (0.71 to 0.95)``."""
    part = next((a for a in ("head", "kv_head", "neuron") if a in row), None)
    named = [f"layer {row['layer']}"] if "layer" in row else []
    named += [f"{part.replace('_', ' ')} {row[part]}"] if part else []
    where = ", ".join(named)
    if "position" in row:
        where += f" at {'position ' if not isinstance(row['position'], str) else ''}{row['position']}"
        if "token" in data:
            here = set(data["token"].sel(position=row["position"]).values.tolist()) - {""}
            where += f" ({visible(here.pop())})" if len(here) == 1 else ""
    interval = "" if math.isnan(row["ci_low"]) else f" ({row['ci_low']:.2f} to {row['ci_high']:.2f})"
    return f"{where}: {row['effect']:.2f}{interval}"


def _shared(plan: Plan, results: Sequence[Result]) -> list[str]:
    served: list[str] = []
    for one in plan.passes:
        count = one.batches * one.rows
        what = {"clean": "the prompts", "corrupted": "the corrupted prompts"}.get(
            one.run, one.run.removeprefix("own: ")
        )
        served.append(f"{count} {one.what} {'pass' if count == 1 else 'passes'} over {what} for {', '.join(one.users)}")
    made = dict(results[0].meta.get("passes", {})).get("forward", 0) if results else 0
    return [f"Shared: {'; '.join(served)}. Forward passes made in all: {made}."]
