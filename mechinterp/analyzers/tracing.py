"""Causal tracing: which states, restored one at a time, bring back an answer that noise on the subject destroyed."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr

from mechinterp import sites
from mechinterp.core.analyzer import Analyzer, Batch, Context, Model, Needs, Sweep
from mechinterp.core.interventions import Noise
from mechinterp.core.metrics import Metric, answer_prob
from mechinterp.core.result import Part, Result, View
from mechinterp.core.statistics import summarize
from mechinterp.core.tokens import Span, Tokens
from mechinterp.errors import ExamplesError, NeedsError
from mechinterp.sites import Position, Site, Sites

Array = npt.NDArray[np.float64]
Strings = npt.NDArray[Any]  # beartype knows no dtype of strings of any length

KINDS = {"states": "resid_post", "attention": "attn_out", "mlp": "mlp_out"}
"""What can be restored, and the site that it is."""

SEVERED = {"mlp": "mlp_out", "attention": "attn_out"}

START, EARLIER = "first token", "earlier tokens"
ROLES = (
    "first subject token",
    "middle subject tokens",
    "last subject token",
    "first subsequent token",
    "further tokens",
    "last token",
)
"""What a token is to the subject, as in figure 2 of Meng et al. (2022).

Before it, the prompt's first token is `START`, often an attention sink, and others are `EARLIER`.
"""


@dataclass(frozen=True)
class CausalTracing(Analyzer):
    """Noise on the subject, and one state at a time restored to its clean value (Meng et al. 2022).

    Three runs are compared: the clean one; the noised one, with Gaussian noise on the subject's
    embeddings; and, for every layer and token, the noised one with one clean state put back. Noise has
    `noise` times the standard deviation of all numbers in the embeddings of all subjects of the set.
    Metrics are means over `copies` noised runs; copy i has the noise of seed i, the same for every cell
    and every example. Prompts whose top token is not a right answer are skipped: they are NaN
    everywhere, and `meta` counts them (``skipped``).

    ``effect`` is the indirect effect, restored - noised, mean over examples of the mean over the tokens
    of a role (`ROLES`). A token has one role: a subject of one token is its last one, and the last token
    of the prompt is that rather than a subsequent one. (The reference code counts such tokens twice, and
    weights tokens rather than prompts.) Tokens before the subject have no role: noise does not reach
    them, so their effect is exactly zero. ``total_effect`` is clean - noised.

    Result: ``effect``, ``ci_low``, ``ci_high``, ``p``, ``q`` (``kind layer role``), q over all of them;
    ``total_effect``, with ``total_ci_low``, ``total_ci_high``, ``total_p``; ``restored`` (``kind example
    layer position``); ``clean``, ``noised``, ``correct`` (``example``); ``token`` and ``token_role``
    (``example position``), strings. In ``meta``: ``sigma``, the standard deviation, and ``noise_std``.
    With named `positions` they take the place of roles, and there are no tokens.

    Attributes:
        subject: name that the examples give to the subject's tokens: a span, or the position of one token
            (in `tasks.capitals` the span is ``"country"``).
        kinds: ``"states"`` restores resid_post at one layer; ``"attention"`` and ``"mlp"`` attn_out and
            mlp_out at the `window` layers [layer - window // 2, layer + window - window // 2).
        window: layers restored together for attention and mlp.
        copies: noised runs.
        noise: standard deviation of the noise, in those of the subjects' embeddings.
        positions: ``"each"`` token, or a tuple of positions.
        sever: ``"mlp"`` or ``"attention"``: at the restored token, every layer's mlp_out or attn_out is held at
            its value in the noised run (but for what is itself restored), so that what is left of the
            effect does not pass through them.
        layers: None for all.
        metric: what is measured.
        skip_wrong: False to trace all prompts, also those the model gets wrong.
    Raises:
        NeedsError: an option that is none.
        ExamplesError: the examples do not name the subject, have no answers, or the model gets none right.
    """

    subject: str = "subject"
    kinds: tuple[str, ...] = tuple(KINDS)
    window: int = 10
    copies: int = 10
    noise: float = 3.0
    positions: str | tuple[Position, ...] = "each"
    sever: str | None = None
    layers: tuple[int, ...] | None = None
    metric: Metric = field(default_factory=answer_prob)
    skip_wrong: bool = True

    def __post_init__(self) -> None:
        if not self.kinds or not set(self.kinds) <= set(KINDS) or len(set(self.kinds)) < len(self.kinds):
            raise NeedsError(f"The kinds of CausalTracing must be some of {', '.join(KINDS)}. Got {self.kinds}")
        if self.sever is not None and self.sever not in SEVERED:
            raise NeedsError(f"The sever of CausalTracing must be None, 'mlp' or 'attention'. Got {self.sever!r}")
        for name, least in (("window", 1), ("copies", 1), ("noise", 0)):
            if getattr(self, name) < least:
                raise NeedsError(f"The {name} of CausalTracing must be at least {least}. Got {getattr(self, name)}")
        if self.positions != "each" and (not isinstance(self.positions, tuple) or not self.positions):
            raise NeedsError(
                f"The positions of CausalTracing must be 'each' or a tuple, such as ('end',). Got {self.positions!r}"
            )

    @property
    def scored(self) -> Site:
        """The prediction that is right or wrong."""
        return sites.logits(positions="end" if self.metric.positions is None else self.metric.positions)

    def needs(self, model: Model) -> Needs:
        return Needs(reads=[sites.embed(positions=self.subject), *([self.scored] if self.skip_wrong else [])])

    def observe(self, batch: Batch) -> Part:
        embed = batch.clean[sites.embed(positions=self.subject)]
        values = {"embed": (embed.reshape(len(embed), -1, embed.shape[-1]), "example subject d_model")}
        correct = torch.ones(len(embed), dtype=torch.bool)
        if self.skip_wrong:
            top = batch.clean[self.scored].argmax(-1)
            correct = (top[:, None] == batch.examples.side(0)).any(1)
        return Part({**values, "correct": (correct, "example")})

    def combine(self, parts: Iterator[Part], context: Context) -> "Result | Analyzer":
        found = Result.of(parts).data
        correct: npt.NDArray[np.bool_] = found["correct"].values
        if not correct.any():
            raise ExamplesError(
                f"CausalTracing: in none of the {len(correct)} prompts is the model's top token a right answer; use"
                " prompts that it gets right, or skip_wrong=False"
            )
        embed = found["embed"].values.astype(np.float64)
        sigma = float(np.std(embed[np.isfinite(embed)], ddof=1))
        return Restoring(self, sigma, tuple(bool(c) for c in correct))


@dataclass(frozen=True)
class Restoring(Analyzer):
    """The second round of `CausalTracing`, when the noise is known."""

    options: CausalTracing
    sigma: float
    correct: tuple[bool, ...]

    def needs(self, model: Model) -> Needs:
        asked = self.options
        std = asked.noise * self.sigma
        noises = [Noise(sites.embed(positions=asked.subject), std, seed=copy) for copy in range(asked.copies)]
        held = () if asked.sever is None else (Sites(SEVERED[asked.sever], None, positions="each"),)
        grids = {
            f"{kind} {copy}": Sweep(
                asked.metric,
                Sites(KINDS[kind], asked.layers),
                asked.positions,
                source="clean",
                base="clean",
                window=1 if kind == "states" else asked.window,
                given=(noise,),
                held=held,
            )
            for copy, noise in enumerate(noises)
            for kind in asked.kinds
        }
        return Needs(sweeps=grids)

    def observe(self, batch: Batch) -> Part:
        values: dict[str, tuple[torch.Tensor, str]] = {}
        for kind in self.options.kinds:
            grids = [batch.sweeps[f"{kind} {copy}"] for copy in range(self.options.copies)]
            restored = [grid.values for grid in grids if grid.values is not None]
            values[kind] = (torch.stack(restored).mean(0), "example layer position")
        one = [batch.sweeps[f"{self.options.kinds[0]} {copy}"] for copy in range(self.options.copies)]
        noised = [grid.base for grid in one if grid.base is not None]
        assert one[0].source is not None
        values |= {"clean": (one[0].source, "example"), "noised": (torch.stack(noised).mean(0), "example")}
        # The grid's own coordinates say that its positions are token indices already, not columns.
        return Part(values, coords={name: list(entries) for name, entries in one[0].coords.items()})

    def combine(self, parts: Iterator[Part], context: Context) -> Result:
        asked, found = self.options, Result.of(parts).data
        correct = np.array(self.correct)
        dims = ("kind", "example", "layer", "position")
        restored = np.stack([found[kind].transpose(*dims[1:]).values.astype(np.float64) for kind in asked.kinds])
        restored[:, ~correct] = np.nan
        clean, noised = (np.where(correct, found[name].values, np.nan) for name in ("clean", "noised"))
        change = np.moveaxis(restored - noised[:, None, None], 1, 0)  # example kind layer position
        named: dict[str, tuple[tuple[str, ...], Strings]] = {}
        across = "position"
        if asked.positions == "each":
            across, roles = "role", roles_of(context.tokens, asked.subject, restored.shape[-1])
            change = np.stack([_mean_where(change, roles == role) for role in ROLES], -1)
            named["token"] = (("example", "position"), _strings(context, restored.shape[-1]))
            named["token_role"] = (("example", "position"), np.where(np.isin(roles, ROLES), roles, ""))
        effect, total = summarize(change, context.seed), summarize(clean - noised, context.seed)
        order = ("mean", "ci_low", "ci_high", "p", "q")
        data = xr.Dataset(
            {
                **{name: (("kind", "layer", across), getattr(effect, name)) for name in order},
                "total_effect": ((), total.mean),
                **{f"total_{name}": ((), getattr(total, name)) for name in order[1:4]},
                "restored": (dims, restored),
                "clean": ("example", clean),
                "noised": ("example", noised),
                "correct": ("example", correct),
                **named,
            },
            {
                "kind": list(asked.kinds),
                "layer": found["layer"].values,
                "position": found["position"].values,
                "example": np.arange(len(correct)),
                **({"role": list(ROLES)} if across == "role" else {}),
            },
            {"unit": _unit(asked.metric)},
        ).rename(mean="effect")
        meta = {
            "skipped": int((~correct).sum()),
            "sigma": self.sigma,
            "noise_std": asked.noise * self.sigma,
        }
        return Result(data, meta, _views(asked, across, len(correct)))


def subject_spans(tokens: Tokens, name: str) -> tuple[Span, ...]:
    """First token of each example's subject, and the one after its last.

    Raises:
        ExamplesError: the examples have no span and no position of that name.
    """
    if name in tokens.spans:
        return tokens.spans[name]
    if name in tokens.positions:
        return tuple((at, at + 1) for at in tokens.positions[name])
    known = ", ".join([*tokens.spans, *tokens.positions]) or "none"
    raise ExamplesError(
        f"these examples name no subject {name!r} (they name {known}); give spans={{{name!r}: [(start, stop), ...]}}"
        " in characters, a column 'subject' in a file, or subject= one of the names"
    )


def roles_of(tokens: Tokens, subject: str, width: int) -> Strings:
    """Role of every token, ``example position``: one of `ROLES`, `START` or `EARLIER`; "" beyond an example's end."""
    rows = zip(tokens.lengths, subject_spans(tokens, subject), strict=True)
    return np.array([[_role(i, length, *span) if i < length else "" for i in range(width)] for length, span in rows])


def _role(at: int, length: int, start: int, stop: int) -> str:
    if at < start:
        return EARLIER if at else START
    first, middle, last, subsequent, further, end = ROLES
    if at < stop:
        return last if at == stop - 1 else first if at == start else middle
    return end if at == length - 1 else subsequent if at == stop else further


def _mean_where(values: Array, chosen: npt.NDArray[np.bool_]) -> Array:
    """Of ``example kind layer position``, the mean over the chosen positions of each example; NaN where it has none."""
    some = np.where(chosen[:, None, None], values, 0.0).sum(-1)
    counts = chosen.sum(-1)[:, None, None]
    return np.where(counts > 0, some / np.maximum(counts, 1), np.nan)


def _strings(context: Context, width: int) -> Strings:
    """Every token as text, ``example position``; "" beyond an example's end."""
    return np.array([[*context.model.to_str_tokens(ids), *[""] * (width - len(ids))] for ids in context.tokens.ids])


def _unit(metric: Metric) -> str:
    return f"{metric.label}, restored - noised"


def _views(asked: CausalTracing, across: str, examples: int) -> tuple[View, ...]:
    """A panel for each kind: of one example over its tokens, of several over roles."""
    severed = "" if asked.sever is None else f", {asked.sever} severed"
    window = f", or {asked.window} layers of attention or MLPs," if set(asked.kinds) != {"states"} else ""
    title = f"Causal tracing: one state{window} restored{severed}"
    if examples == 1 and across == "role":
        unit = asked.metric.label
        return (View("heatmap", "restored", "position", "layer", by="kind", title=title, unit=unit, x_text="token"),)
    unit = f"change of {asked.metric.label}"
    return (View("heatmap", "effect", across, "layer", by="kind", title=title, unit=unit, center=0.0),)
