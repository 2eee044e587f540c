"""What one row of features stands for: a text at one token, a span, or each of its tokens or words."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.core.analyzer import Batch, Wanted, as_reads
from mechinterp.core.result import Part
from mechinterp.core.tokens import TokenBatch
from mechinterp.errors import ExamplesError, NeedsError
from mechinterp.sites import Position, Site

Pool: TypeAlias = Literal["mean", "last"]


@dataclass(frozen=True)
class Units:
    """Which vectors are taken from each text.

    Attributes:
        positions: one token (``"end"``, a number, a name), a span by its name, or ``"all"``: the whole text but its
            first token, which often is an attention sink.
        pool: of several tokens, their mean or the last one.
        each: None for one vector a text; ``"token"`` for every token but the first; or a word category of the examples,
            for each of its spans, pooled.
    """

    positions: Position = "end"
    pool: Pool = "mean"
    each: str | None = None

    def __post_init__(self) -> None:
        if self.pool not in ("mean", "last"):
            raise NeedsError(f"The pool must be 'mean' or 'last'. Got {self.pool!r}")
        if self.each is not None and self.positions != "end":
            raise NeedsError(f"one vector for each {self.each} takes no positions. Got {self.positions!r}")

    def reads(self, wanted: Wanted, n_layers: int) -> tuple[Site, ...]:
        """The sites to declare, with the positions that are needed.

        Raises:
            NeedsError: a site without one vector for each token.
        """
        found = tuple(read.site for read in as_reads(wanted, n_layers))
        if odd := [site for site in found if site.axes[:2] != ("batch", "pos")]:
            raise NeedsError(f"{odd[0]} has no vector for each token; its axes are {' '.join(odd[0].axes)}")
        whole = self.each is not None or self.positions == "all"
        return tuple(site.at(None if whole else self.positions) for site in found)

    def of(self, value: Float[Tensor, "example *rest"], batch: TokenBatch) -> Float[Tensor, "unit dim"]:
        """The vectors of a batch, from what was read at one site; heads are laid side by side.

        Raises:
            ExamplesError: a text that has one token only where its first is left out, or no such category.
        """
        span = isinstance(self.positions, str) and self.positions in batch.spans
        if self.each is None and self.positions != "all" and not span:
            return value.flatten(1) if value.ndim > 1 else value[:, None]
        x = value.flatten(2) if value.ndim > 2 else value[..., None]
        if span:
            return self._pooled(x, ~x.isnan().any(-1))  # NaN past its end
        if self.each is None:
            return self._pooled(x, self._inner(batch))
        if self.each == "token":
            return x[self._inner(batch)]
        rows, spans = self._words(batch)
        columns = torch.arange(x.shape[1], device=x.device)
        starts = batch.starts[rows]
        low, high = (starts + torch.tensor([s[i] for s in spans], device=x.device) for i in (0, 1))
        if self.pool == "last":
            return x[rows, high - 1]
        out = torch.zeros(len(rows), x.shape[2], dtype=torch.float32, device=x.device)
        inside = (columns >= low[:, None]) & (columns < high[:, None])
        for row in rows.unique().tolist():  # one product a text: the whole batch would be units × tokens
            mine = rows == row
            share = inside[mine].float()
            out[mine] = share @ x[row].float().nan_to_num() / share.sum(1, keepdim=True)
        return out.to(x.dtype)

    def owners(self, batch: TokenBatch) -> list[int]:
        """The number, in the whole set, of the text that each vector is from."""
        if self.each is None:
            return list(batch.rows)
        if self.each == "token":
            rows = self._inner(batch).nonzero()[:, 0]
        else:
            rows, _ = self._words(batch)
        return [batch.rows[i] for i in rows.tolist()]

    def columns(self, batch: TokenBatch) -> list[tuple[int, int]]:
        """The tokens that each vector is from, half-open, counted from its text's first."""
        starts = batch.starts.tolist()
        if self.each == "token":
            return [(c - starts[r], c - starts[r] + 1) for r, c in self._inner(batch).nonzero().tolist()]
        if self.each is not None:
            return [(b - 1 if self.pool == "last" else a, b) for a, b in self._words(batch)[1]]
        if self.positions == "all":
            return [(n - 1 if self.pool == "last" else 1, n) for n in batch.lengths.tolist()]
        if isinstance(self.positions, str) and self.positions in batch.spans:
            return [(b - 1 if self.pool == "last" else a, b) for a, b in batch.spans[self.positions]]
        where = batch.where(self.positions)
        assert where is not None
        return [(c - s, c - s + 1) for c, s in zip(where.columns.tolist(), starts, strict=True)]

    def _inner(self, batch: TokenBatch) -> Tensor:
        """Real tokens but the first, ``example pos``."""
        if (lengths := batch.lengths).min() < 2:
            row = batch.rows[int(lengths.argmin())]
            raise ExamplesError(f"example {row} has one token only, and the first is left out; give a longer text")
        columns = torch.arange(batch.mask.shape[1], device=batch.mask.device)
        return batch.mask & (columns != batch.starts[:, None])

    def _words(self, batch: TokenBatch) -> tuple[Tensor, list[tuple[int, int]]]:
        """Row of the batch and span of every word, in order."""
        if self.each is None or self.each not in batch.categories:
            known = ", ".join(["token", *batch.categories])
            raise ExamplesError(f"these examples have no category {self.each!r}; each= can be {known}")
        found = [(row, span) for row, spans in enumerate(batch.categories[self.each]) for span in spans]
        return torch.tensor([r for r, _ in found], dtype=torch.long, device=batch.ids.device), [s for _, s in found]

    def _pooled(self, x: Tensor, real: Tensor) -> Tensor:
        if self.pool == "last":
            columns = torch.arange(x.shape[1], device=x.device)
            last = torch.where(real, columns, -1).amax(1)
            return x[torch.arange(len(x), device=x.device), last]
        total = x.masked_fill(~real[..., None], 0.0).float().sum(1)
        return (total / real.sum(1, keepdim=True)).to(x.dtype)


def part(units: Units, reads: Sequence[Site], batch: Batch) -> Part:
    """Features of one batch, ``site unit dim``, with ``owner`` and the tokens they are from; join with `features`.

    Raises:
        NeedsError: the sites are not equally wide.
    """
    found = [units.of(batch.clean[site], batch.examples) for site in reads]
    if len({x.shape[1] for x in found}) > 1:
        widths = ", ".join(f"{site} {x.shape[1]}" for site, x in zip(reads, found, strict=True))
        raise NeedsError(f"the sites are not equally wide ({widths}); give those of one width")
    values: dict[str, tuple[Any, str]] = {
        "features": (torch.stack(found), "site unit dim"),
        "owner": (torch.tensor(units.owners(batch.examples), dtype=torch.long), "unit"),
        "tokens": (torch.tensor(units.columns(batch.examples), dtype=torch.long).reshape(-1, 2), "unit bound"),
    }
    return Part(values)


def sharing(owner: npt.NDArray[np.integer], tokens: npt.NDArray[np.integer]) -> int:
    """How many units are from a token that another unit of the same text is from, too: their vectors are alike by it.

    Args:
        owner, tokens: of each unit, as `features` gives them.
    """
    each = [[(text, at) for at in range(*span)] for text, span in zip(owner.tolist(), tokens.tolist(), strict=True)]
    times = Counter(token for unit in each for token in unit)
    return sum(any(times[token] > 1 for token in unit) for unit in each)


def features(parts: Iterable[Part]) -> tuple[Tensor, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """All features ``site unit dim`` in float32, in the order of the texts; the text of each; and its tokens.

    Each part is let go once it is copied, so that features are in memory little more than twice.
    """
    found = list(parts)
    owner = torch.cat([p.values["owner"][0] for p in found])
    tokens = torch.cat([p.values["tokens"][0] for p in found])
    order = owner.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    sites, _, dim = found[0].values["features"][0].shape
    out = torch.empty(sites, len(order), dim)
    start = 0
    for p in found:
        x = p.values["features"][0]
        out[:, place[start : start + x.shape[1]]] = x.float()
        start += x.shape[1]
    return out, owner[order].numpy(), tokens[order].numpy()
