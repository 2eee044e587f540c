"""Text that is written under a steering direction, read again by the model as it is."""

import itertools
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import xarray as xr

from mechinterp.core.interventions import Steer
from mechinterp.core.linear_probe import LinearProbe
from mechinterp.core.result import Result, View
from mechinterp.core.statistics import summarize
from mechinterp.engine.progress import Bar
from mechinterp.engine.runner import provenance
from mechinterp.errors import ExamplesError, NeedsError
from mechinterp.model.model import Model
from mechinterp.sites import Position

CONTROL = "random"


def steered_text(
    model: Model,
    probe: LinearProbe,
    prompts: Sequence[str],
    *,
    name: str | None = None,
    strengths: Sequence[float] = (-4.0, 4.0),
    positions: Position | None = None,
    words: Sequence[str] = (),
    max_new_tokens: int = 30,
    seed: int = 0,
    progress: bool = False,
    **options: Any,
) -> Result:
    """Continuations of prompts with a concept's direction added, with a random one of equal norm, and with none.

    What was written is read again by the model without any steering: whether a probe sees the concept in it, how many
    of the given words it has, and how unlikely it is. A probe that was fitted at the place that is steered is a
    weak witness of what reaches the text; the words, and your own eyes, are better ones.

    Result: ``text`` (``prompt direction strength``); ``probe_score`` and ``perplexity`` of the new tokens, read without
    steering (NaN where fewer than two were written); ``words``, the share of new tokens that begin one of the given
    words; and of each measure ``mean`` (``measure direction strength``) over prompts with ``ci_low, ci_high`` (95%,
    bootstrap). Strength 0 is the text without steering.

    Args:
        name: whose direction; the probe's last class by default.
        strengths: in activation units.
        positions: where it is added; at every token, of prompt and answer, by default.
        words: whose share is counted, such as ``" happy"``.
        options: passed on to `Model.generate`, such as ``do_sample=True``; with the same seed for each text.
    Raises:
        ExamplesError: no prompts. NeedsError: no strengths, or one of 0; a probe of another width. ModelError: the
            model has no tokenizer.
    """
    if not prompts:
        raise ExamplesError("there is no prompt to go on from; give at least one")
    if not strengths or 0.0 in strengths:
        raise NeedsError(f"the strengths must be some, and not 0, which is always there. Got {list(strengths)}")
    own = probe.direction(name)
    other = torch.randn(len(own), generator=torch.Generator().manual_seed(seed))
    named = name or probe.classes[-1]
    directions = {named: own, CONTROL: other}
    levels = sorted({0.0, *map(float, strengths)})
    shape = (len(prompts), len(directions), len(levels))
    texts = np.full(shape, "", dtype=object)
    measured = {m: np.full(shape, np.nan) for m in ("probe_score", "perplexity", "words")}
    probe.check(model)
    tokenizer: Any = model.tokenizer
    starts = {tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in words}  # not its BOS
    with Bar() if progress else nullcontext() as bar:
        if bar is not None:
            bar.start("texts", len(prompts) * (1 + 2 * (len(levels) - 1)))
        for i, prompt in enumerate(prompts):
            for (j, direction), (k, level) in itertools.product(enumerate(directions.values()), enumerate(levels)):
                if level == 0.0 and j:  # not steered twice
                    for held in (texts, *measured.values()):
                        held[i, j, k] = held[i, 0, k]
                    continue
                writes = () if level == 0.0 else (Steer(probe.site.at(positions), direction, level),)
                with torch.random.fork_rng():
                    torch.manual_seed(seed)
                    made = model.generate(prompt, max_new_tokens=max_new_tokens, interventions=writes, **options)
                texts[i, j, k] = str(made)
                for m, value in _read(model, probe, named, made.prompt, made.tokens, starts).items():
                    measured[m][i, j, k] = value
                if bar is not None:
                    bar.advance("texts", 1)
    dims = ("prompt", "direction", "strength")
    variables: dict[str, Any] = {"text": (dims, texts.astype(str))}
    variables |= {m: (dims, v) for m, v in measured.items()}
    found = [summarize(v, seed) for v in measured.values()]
    for part in ("mean", "ci_low", "ci_high"):
        variables[part] = (("measure", *dims[1:]), np.stack([getattr(one, part) for one in found]))
    coords = {"direction": list(directions), "strength": levels, "measure": list(measured)}
    titles = {
        "probe_score": ("What the probe reads in the text", "score"),
        "perplexity": ("How unlikely the text is, not steered", "perplexity"),
        "words": ("Share of the words that were asked for", "share of tokens"),
    }
    views = tuple(
        View("lines", "mean", "strength", by="direction", select={"measure": m}, title=title, unit=unit)
        for m, (title, unit) in titles.items()
        if m != "words" or words
    )
    meta = {**provenance(model), "analyzer": "steered_text", "site": str(probe.site), "class": named, "seed": seed}
    return Result(xr.Dataset(variables, coords), meta, views)


@torch.no_grad()
def _read(
    model: Model, probe: LinearProbe, name: str, prompt: Sequence[int], new: Sequence[int], starts: set[int]
) -> dict[str, float]:
    """What the model, not steered, makes of new tokens."""
    if len(new) < 2:
        return {}
    trace = model.trace([[*prompt, *new]], [probe.site, "logits"])
    scores = probe.scores(trace[probe.site][0, len(prompt) :]).mean(0)
    one = probe.classes.index(name)
    value = scores[one] - scores[1 - one] if len(scores) == 2 else scores[one]
    logits = trace["logits"][0, len(prompt) - 1 : -1].float()
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(list(new), device=logits.device))
    share = sum(token in starts for token in new) / len(new)
    return {"probe_score": float(value), "perplexity": float(loss.exp()), "words": share}
