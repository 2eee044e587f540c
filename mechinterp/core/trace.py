"""Trace: what was read in one pass. Read and Reduce: what to read."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor

from mechinterp.core.display import ROWS, count, html_table
from mechinterp.core.tokens import TokenBatch
from mechinterp.errors import NeedsError, SiteError
from mechinterp.shapes import PatternBlock
from mechinterp.sites import KINDS, Site, Sites

if TYPE_CHECKING:  # core never imports these; a trace is handed its model
    from transformer_lens import ActivationCache

    from mechinterp.model.model import Model
else:
    Model = ActivationCache = Any

Run: TypeAlias = Literal["clean", "corrupted"]


@dataclass(frozen=True)
class Reduce:
    """A function applied inside the pass, so that a whole pattern never exists.

    Attributes:
        fn: called as ``fn(block, queries, batch)``, where ``block`` holds the attention probabilities
            (or scores) of one layer for some queries, ``example head query key`` with all keys,
            ``queries`` is the slice of query columns it covers, and ``batch`` the `TokenBatch`.
            Queries that are padding have a pattern of zeros.
        axes: axes of what it returns, such as ``"example head query"``. Blocks are joined along
            ``query`` where it is among them, and added up otherwise.

    A module-level function makes equal reduces equal, and so shared between analyzers.
    """

    fn: Callable[[PatternBlock, slice, TokenBatch], Tensor]
    axes: str

    def join(self, blocks: list[Tensor]) -> Tensor:
        """The blocks of one layer as one tensor."""
        axes = self.axes.split()
        if "query" in axes:
            return torch.cat(blocks, axes.index("query"))
        total = blocks[0]
        for block in blocks[1:]:
            total = total + block
        return total


@dataclass(frozen=True)
class Read:
    """What to read: one site or several, of which run of a pair, and optionally reduced inside the pass."""

    sites: Site | Sites | str
    of: Run = "clean"
    reduce: Reduce | None = None

    def __post_init__(self) -> None:
        if self.of not in ("clean", "corrupted"):
            raise NeedsError(f"The of of Read must be 'clean' or 'corrupted'. Got {self.of!r}")

    @property
    def site(self) -> Site:
        """The one site of a read that the engine has made single."""
        if not isinstance(self.sites, Site):
            raise NeedsError(f"{self.sites} may be several sites; name one, such as sites.z(3)")
        return self.sites


class Trace:
    """What was read in one pass: ``trace[site]`` is a tensor with the site's axes.

    Immutable. A site is found by its exact name, or without positions and heads where that is
    unambiguous; site strings and TransformerLens names work too. Each tensor belongs to the trace:
    changing one in place never changes the model, and inside `observe` it is refused.
    """

    def __init__(
        self, tensors: Mapping[Read, Tensor], batch: TokenBatch, owner: str = "this trace", model: Model | None = None
    ) -> None:
        self._tensors = dict(tensors)
        self._model = model
        self._owner = owner
        self.batch = batch
        """The examples that were run: ids, mask, lengths."""

    def __getitem__(self, key: "Site | Sites | Read | str") -> Tensor:
        """The tensor at one site; for `Sites`, stacked with a layer axis in front.

        Raises:
            NeedsError: the site was not read, or the name fits several reads.
        """
        if isinstance(key, Sites):
            return self.stack(key.kind, key)
        if isinstance(key, Read) and isinstance(key.sites, Sites):
            read = {r.site.layer for r in self._tensors if r.site.kind == key.sites.kind}
            layers = tuple(sorted(set(key.sites.layers or (i for i in read if i is not None))))
            return torch.stack([self[replace(key, sites=s)] for s in replace(key.sites, layers=layers).of(0)])
        if isinstance(key, Read):
            found = [r for r in self._tensors if r == key]
        else:
            site = Site.parse(key) if isinstance(key, str) else key
            found = [r for r in self._tensors if r.site == site] or [
                r
                for r in self._tensors
                if (r.site.kind, r.site.layer) == (site.kind, site.layer)
                and site.positions in (None, r.site.positions)
                and site.heads in (None, r.site.heads)
                and site.neurons in (None, r.site.neurons)
                and site.per_query_head == r.site.per_query_head
            ]
        if len(found) == 1:
            return self._tensors[found[0]]
        have = ", ".join(dict.fromkeys(str(r.site) for r in self._tensors)) or "nothing"
        if found:
            raise NeedsError(f"{key} was read {len(found)} times here; ask for the exact site or Read: {have}")
        if not isinstance(key, Read):
            site = Site.parse(key) if isinstance(key, str) else key
            for other in (r.site for r in self._tensors):
                if (other.kind, other.layer, not other.per_query_head) == (site.kind, site.layer, site.per_query_head):
                    way = f"per_query_head={other.per_query_head}"
                    raise NeedsError(f"{key} was read with {way} for {self._owner}; ask for it with the same")
        raise NeedsError(f"{key} was not read for {self._owner}, which has {have}; declare it in needs() or reads")

    def stack(self, kind: str, of: Sites | None = None) -> Tensor:
        """All layers that were read of one kind, in layer order, with a layer axis in front.

        Raises:
            SiteError: there is no such kind.
            NeedsError: the kind was not read, or its layers were read in different ways.
        """
        if kind not in KINDS:
            raise NeedsError(f"stack takes a kind and stacks its layers; write {Site.parse(kind).kind!r}. Got {kind!r}")
        read = [r.site for r in self._tensors if r.site.kind == kind]
        layers = sorted({site.layer for site in read if site.layer is not None})
        if of is not None and of.layers is not None:
            layers = sorted(set(of.layers))
        if not layers:
            raise NeedsError(f"{kind} was not read for {self._owner}; declare it in needs() or reads")
        chosen = of or Sites(kind, per_query_head={site.per_query_head for site in read} == {True})
        return torch.stack([self[one] for one in replace(chosen, layers=tuple(layers)).of(0)])

    @property
    def reads(self) -> tuple[Read, ...]:
        return tuple(self._tensors)

    def save(self, path: str | Path) -> Path:
        """Write tensors as safetensors, in their own dtypes, and the rest as JSON into the folder `path`.

        Whole or not at all; an earlier trace there is replaced.

        Raises:
            OutputError: a read was reduced by a function, or the folder cannot be written.
        """
        from mechinterp.report.files import save_trace

        return save_trace(self, path)

    @classmethod
    def load(cls, path: str | Path) -> "Trace":
        """Read back what `save` wrote, onto the CPU.

        Raises:
            OutputError: there is no trace at `path`, or its files are damaged.
        """
        from mechinterp.report.files import load_trace

        return load_trace(path)

    def to_activation_cache(self, model: Model | None = None, of: Run = "clean") -> "ActivationCache":
        """What was read as a TransformerLens `ActivationCache`, whose methods work on it.

        ``decompose_resid`` takes embed, attn_out and mlp_out of all layers, ``accumulated_resid`` the residual
        streams, ``stack_head_results`` z, and ``logit_attrs`` and whatever else applies the final norm resid_post of
        the last layer, from which its scale is made. Tensors are shared, not copied.

        Args:
            model: that was run; by default the one whose `trace` made this.
            of: which run of a pair.
        Raises:
            NeedsError: a site was read in part, or it is not known which model was run.
            ModelError: TransformerLens cannot wrap the model.
        """
        from mechinterp.engine.backends.cache import to_activation_cache

        if (found := model or self._model) is None:
            raise NeedsError("an ActivationCache knows its model, and this trace does not; give it as model=")
        return to_activation_cache(self, found, of)

    @classmethod
    def from_activation_cache(
        cls, cache: "ActivationCache", tokens: Tensor | None = None, mask: Tensor | None = None
    ) -> "Trace":
        """A trace of all that a TransformerLens `ActivationCache` has at sites; what is no site is left out.

        Args:
            tokens: ids that were run, ``batch pos``; a TransformerBridge's cache has them already.
            mask: True at real tokens; by default all are.
        Raises:
            NeedsError: it holds no site, or no token ids and none were given, or of another shape, or others than it
                holds.
            ModelError: it is of a bridge that has changed its weights, as its compatibility mode does.
        """
        from mechinterp.engine.backends.cache import from_activation_cache

        return from_activation_cache(cache, tokens, mask)

    def __iter__(self) -> Iterator[Site]:
        return iter(dict.fromkeys(r.site for r in self._tensors))

    def __len__(self) -> int:
        return len({r.site for r in self._tensors})

    def __contains__(self, key: object) -> bool:
        """Whether exactly this was read, by any of its names."""
        site: object = None
        if isinstance(key, str):
            with contextlib.suppress(SiteError):
                site = Site.parse(key)
        return any(key in (read, str(read.site)) or (site or key) == read.site for read in self._tensors)

    def __repr__(self) -> str:
        rows = [f"  {r.site}: {' '.join(_axes(r, t))} {tuple(t.shape)}" for r, t in self._tensors.items()]
        return "\n".join([self._title(), *rows])

    def _repr_html_(self) -> str:
        rows = [
            (
                str(read.site),
                read.of,
                " ".join(_axes(read, tensor)),
                " × ".join(map(str, tensor.shape)),
                str(tensor.dtype).removeprefix("torch."),
                f"{tensor.nbytes / 1e6:,.1f} MB" if tensor.nbytes >= 1e5 else f"{tensor.nbytes / 1e3:.1f} kB",
            )
            for read, tensor in list(self._tensors.items())[:ROWS]
        ]
        head = ("site", "run", "axes", "shape", "dtype", "size")
        return html_table(head, rows, self._title(), max(0, len(self._tensors) - ROWS))

    def _title(self) -> str:
        return f"Trace of {count(len(self.batch), 'example')}"


def _axes(read: Read, tensor: Tensor) -> list[str]:
    """Axes of what was read: a single head or position has dropped its own."""
    if read.reduce is not None:
        return read.reduce.axes.split()
    one_head = isinstance(read.site.heads, int)
    axes = [a for a in read.site.axes if not (one_head and a in ("head", "kv_head"))]
    return axes if len(axes) == tensor.ndim else [a for a in axes if a not in ("pos", "query")]
