"""Path patching: which heads or layers speak to a receiver directly, and what that does to the metric."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
import xarray as xr
from torch import Tensor

from mechinterp.analyzers.patching import at_one, share
from mechinterp.core.analyzer import Analyzer, Batch, Chosen, Context, Model, Needs, Sweep, Swept
from mechinterp.core.interventions import Replace
from mechinterp.core.metrics import Metric, logit_diff
from mechinterp.core.result import Part, Result, View
from mechinterp.core.tokens import TokenBatch
from mechinterp.core.trace import Run
from mechinterp.errors import NeedsError
from mechinterp.model.architecture import check
from mechinterp.model.slices import real
from mechinterp.sites import Position, Site, Sites, resolve

Receivers = Site | Sites | str | tuple[Site | Sites | str, ...]

SENDERS = ("z", "attn_out", "mlp_out", "embed")
RECEIVERS = (
    *("resid_pre", "attn_in", "q", "q_normed", "q_rot", "k", "k_normed", "k_rot", "v"),
    *("resid_mid", "mlp_in", "mlp_gate", "mlp_up", "mlp_act", "resid_post"),
)
"""What is computed from the residual stream before any head of its layer is held."""


@dataclass(frozen=True)
class PathPatching(Analyzer):
    """Patch the direct path from each sender to the receivers (Wang et al. 2023; Goldowsky-Dill et al. 2023).

    First pass: the base run with one sender at the source run's value and z of every other head held at
    the base run's (with ``mlps="frozen"`` every other mlp_out, too); what then arrives at the receivers is
    read. Second pass: the base run with the receivers at these values, and nothing held, is scored. With
    ``receivers="logits"`` the first pass itself is scored: it is the direct path into the final residual.
    As attention is held, what a sender writes arrives at its own position only.

    ``effect`` is (patched - base) / (source - base), the share of the difference between the two runs that
    travels along the path, with the mean difference over the examples that have the cell as denominator; 0
    is the base run. It is as in `ActivationPatching` when denoising, and 1 minus that when noising. A sender
    after the last receiver has no path to it: its effect is exactly 0, and p and q are NaN, as there is
    nothing to test. Intervals and p are over examples (of patched - base, sign flips, NaN below six
    examples), the denominator held fixed; q is over all cells that have a path.

    Result: ``effect``, ``ci_low``, ``ci_high``, ``p``, ``q`` by ``layer``, ``position`` (where several are
    given) and ``head`` of the sender, and ``patched`` (with ``example``), ``clean``, ``corrupted`` as metrics.

    Attributes:
        receivers: ``"logits"``; or sites, patched together, such as ``mi.sites.q(9, heads=(3, 7))``, with their
            heads and positions. k and v are those of the key/value heads, which a group of query heads shares.
        senders: ``"z"`` (by head), ``"attn_out"``, ``"mlp_out"`` or ``"embed"``.
        mlps: whether MLPs between sender and receivers are ``"recomputed"`` (a path goes through them, as in
            Wang et al.) or ``"frozen"``.
        metric: what is measured.
        positions: where the sender is patched; one, or None for all at once, or a tuple for each in turn.
        heads: ``"each"``, or some; of senders z only.
        layers: of senders; None for all.
        direction: ``"noise"`` patches the clean run with the corrupted one's values, ``"denoise"`` the reverse.
        guard: least |clean - corrupted| for an effect to mean anything; below it a cell is NaN, with a warning.
    Raises:
        NeedsError: receivers that the first pass holds (z and what comes from it), or that no sender precedes.
    """

    receivers: Receivers = "logits"
    senders: Literal["z", "attn_out", "mlp_out", "embed"] = "z"
    mlps: Literal["recomputed", "frozen"] = "recomputed"
    metric: Metric = field(default_factory=logit_diff)
    positions: Position | tuple[Position, ...] | None = None
    heads: str | tuple[int | tuple[int, ...], ...] = "each"
    layers: tuple[int, ...] | None = None
    direction: Literal["denoise", "noise"] = "noise"
    guard: float = 1e-3

    def __post_init__(self) -> None:
        for name, choice in (
            ("senders", SENDERS),
            ("mlps", ("recomputed", "frozen")),
            ("direction", ("denoise", "noise")),
        ):
            if getattr(self, name) not in choice:
                known = " or ".join(map(repr, choice))
                raise NeedsError(f"The {name} of PathPatching must be {known}. Got {getattr(self, name)!r}")
        if self.senders != "z" and self.heads != "each":
            raise NeedsError(f"{self.senders} has no heads; leave heads= of PathPatching alone. Got {self.heads!r}")
        if self.positions == "each":
            raise NeedsError("The positions of PathPatching must be named, such as ('S2', 'end'). Got 'each'")

    @property
    def runs(self) -> tuple[Run, Run]:
        """The run that is edited, and the run whose values are put there."""
        return ("corrupted", "clean") if self.direction == "denoise" else ("clean", "corrupted")

    def needs(self, model: Model) -> Needs:
        base, source = self.runs
        last = model.dims.n_layers - 1
        receivers = self._sites(model)
        heads: Chosen = self.heads if self.senders == "z" else None
        paths = Sweep(
            None if receivers else self.metric,
            self._senders(model, receivers),
            self.positions,
            heads,
            base=base,
            source=source,
            held=self._before(model, receivers, "z", *(("mlp_out",) if self.mlps == "frozen" else ())),
            reads=receivers,
        )
        if not receivers:
            return Needs(sweeps={"paths": paths})
        # Its only row ends as the source run does: what the metric is without a patch, and with all of them.
        ends = Sweep(self.metric, Site("resid_post", last), base=base, source=source)
        return Needs(sweeps={"paths": paths, "ends": ends})

    def observe(self, batch: Batch) -> Part:
        paths = batch.sweeps["paths"]
        ends, patched = paths, paths.values
        if patched is None:
            ends, patched = batch.sweeps["ends"], self._received(batch, paths)
        assert ends.base is not None and ends.source is not None
        clean, corrupted = (ends.base, ends.source) if self.direction == "noise" else (ends.source, ends.base)
        axes = " ".join(("example", *paths.axes))
        return Part(
            {"patched": (patched, axes), "clean": (clean, "example"), "corrupted": (corrupted, "example")},
            coords={name: list(entries) for name, entries in paths.coords.items()},
        )

    def combine(self, parts: Iterator[Part], context: Context) -> Result:
        data = Result.of(parts, unit="(patched - base) / (source - base)").data
        data["patched"] = data["patched"].transpose("example", ...)
        base, source = (data[run] for run in self.runs)
        new = share(
            data["patched"].values, base.values, source.values, base.values, self.metric, self.guard, context.seed
        )
        dims = [str(d) for d in data["patched"].dims[1:]]
        data = data.assign({name: (dims, value) for name, value in new.items()})
        if "layer" in dims:  # senders that no path leads from were not run
            run = data["layer"].values
            data = data.reindex(layer=list(range(context.model.dims.n_layers) if self.layers is None else self.layers))
            ran = data["layer"].isin(run)
            still = {name: data[name].where(ran, 0.0) for name in ("effect", "ci_low", "ci_high")}
            data = data.assign(still | {"patched": data["patched"].where(ran, base)})
        order = ["effect", "ci_low", "ci_high", "p", "q", "patched", "clean", "corrupted"]
        return Result(data[order].transpose("example", *dims), {}, tuple(self._views(dims, data)))

    def _sites(self, model: Model) -> tuple[Site, ...]:
        """The receivers, singly; none where they are the logits."""
        if self.receivers == "logits":
            return ()
        sites = resolve(self.receivers, model.dims.n_layers)
        if odd := next((site for site in sites if site.kind not in RECEIVERS), None):
            raise NeedsError(
                f"{odd} cannot receive: the first pass holds z and what comes of it, and the logits stand alone, as"
                f' receivers="logits"; name some of {", ".join(RECEIVERS)}'
            )
        return sites

    def _senders(self, model: Model, receivers: tuple[Site, ...]) -> tuple[Site, ...]:
        """Those that come before the last receiver."""
        kind, layers = self.senders, model.dims.n_layers
        asked = (Site("embed"),) if kind == "embed" else Sites(kind, self.layers).of(layers)
        for site in asked:
            check(site, model.arch, model.dims)  # those that are left out, too
        before = self._before(model, receivers, kind)
        if not (found := tuple(site for site in asked if site in before)):
            raise NeedsError(
                f"no sender {kind} of {'all layers' if self.layers is None else f'the layers {self.layers}'}"
                f" comes before the receivers {', '.join(map(str, receivers))}; name later receivers, or earlier layers"
            )
        return found

    def _before(self, model: Model, receivers: tuple[Site, ...], *kinds: str) -> tuple[Site, ...]:
        """All sites of some kinds that a pass reaches before the last receiver."""
        sites = resolve([Site(kind) if kind == "embed" else kind for kind in kinds], model.dims.n_layers)
        return tuple(site for site in sites if not receivers or site.order < max(each.order for each in receivers))

    def _received(self, batch: Batch, paths: Swept) -> Tensor:
        """The second pass: the metric with the receivers at what arrived, ``example *axes``."""
        shape = tuple(len(paths.coords[axis]) for axis in paths.axes)
        arrived = {site: value.flatten(1, len(shape)) for site, value in paths.reads.items()}
        rows = tuple(
            tuple(
                Replace(site, as_written(value[:, row], site, batch.examples), of=batch.examples.rows)
                for site, value in arrived.items()
            )
            for row in range(math.prod(shape))
        )
        values = batch.rerun(Sweep(self.metric, rows=rows, base=self.runs[0])).values
        assert values is not None
        present = torch.stack([_present(batch.examples, p) for p in paths.coords.get("position", (self.positions,))], 1)
        where = [size if axis == "position" else 1 for axis, size in zip(paths.axes, shape, strict=True)]
        return values.reshape(-1, *shape).masked_fill(~present.view(-1, *where), float("nan"))

    def _views(self, dims: list[str], data: xr.Dataset) -> Iterator[View]:
        to = self.receivers if isinstance(self.receivers, tuple) else (self.receivers,)
        sender = self.senders + at_one(self.positions)
        title = f"Direct paths from {sender} to {', '.join(map(str, to))} ({self.direction})"
        if "layer" not in dims:
            yield View("bars", "effect", dims[-1], title=title, unit="effect")
            return
        for position in data["position"].values.tolist() if "position" in dims else [None]:
            chosen = {} if position is None else {"position": position}
            at = title if position is None else f"{title}, at {position}"
            if "head" in dims:
                yield View("heatmap", "effect", "head", "layer", title=at, unit="effect", center=0.0, select=chosen)
            else:
                yield View("lines", "effect", "layer", title=at, unit="effect", select=chosen)


def as_written(value: Tensor, site: Site, batch: TokenBatch) -> Tensor:
    """What was read at a site, as a write there sees it: a slice of all positions starts at the first real token."""
    if site.positions is not None or not batch.left_padded:
        return value
    return value[torch.arange(len(value), device=value.device)[:, None], real(batch).columns]


def _present(batch: TokenBatch, position: Position | None) -> Tensor:
    """Examples that have a position, ``example``."""
    where = batch.where(position, strict=False)
    if where is None or where.valid is None:
        return torch.ones(len(batch), dtype=torch.bool, device=batch.ids.device)
    return where.valid if where.valid.ndim == 1 else where.valid.any(1)
