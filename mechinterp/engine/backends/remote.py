"""nnsight's remote traces: every pass is one request to NDIF, which holds the weights.

Its servers have torch and nnsight, and not this package. So what a pass is to do is worked out here, to plain tensors,
and the functions of `stops` are sent as source, by nnsight's own means.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mechinterp.core.interventions import (
    Add,
    Apply,
    Intervention,
    Knockout,
    Mean,
    Noise,
    Project,
    Replace,
    Scale,
    Steer,
    Zero,
)
from mechinterp.core.tokens import TokenBatch, Where
from mechinterp.core.trace import Read
from mechinterp.engine.backends import stops
from mechinterp.engine.backends.nnsight import NNsightBackend
from mechinterp.engine.backends.stops import carried, part_of
from mechinterp.engine.backends.visits import Visits
from mechinterp.errors import HookError, ModelError
from mechinterp.model.backend import Seen, Use
from mechinterp.model.load import is_local
from mechinterp.model.model import Model
from mechinterp.model.slices import PATTERN_KINDS, index, overwrite, real
from mechinterp.sites import Site

Spot = tuple[bool, Tensor | None, Tensor | None, Any]
"""A slice as `stops` knows it: queries before heads, columns, which of them are valid, heads or neurons."""
_LOCAL = "local"
"""nnsight's dry run: the request is made and read back, and run here."""


class RemoteBackend(NNsightBackend):
    """A model of nnsight without weights, whose passes are made by NDIF."""

    def __init__(self, envoy: Any, model: Model, remote: bool | str) -> None:
        from nnsight import register

        super().__init__(envoy, model)
        self.remote = remote
        self.version += f" at {_host(remote)}"
        register(stops)

    def lacks(self, site: Site, use: Use) -> str | None:
        if use == "gradient":
            return "NDIF is sent one pass forward, without the metric and its backward pass"
        if site.kind == "router" and use == "write":
            return "experts are chosen anew by a function of this package, which NDIF's servers do not have"
        return super().lacks(site, use)

    route = None

    def weight(self, layer: int) -> Tensor | None:
        return None

    def run(
        self,
        batch: TokenBatch,
        writes: Sequence[tuple[Site, Intervention]],
        reads: Sequence[Read],
        grads: Sequence[Site],
        lenient: bool,
    ) -> Seen:
        visits = Visits(batch, writes, reads, grads, lenient)
        asked: list[dict[str, Any]] = []
        reached: set[tuple[Site, int]] = set()
        places = visits.places()
        for place in places:
            own = Site("resid_mid", place.layer) if place.kind == "attn_out" else place
            job = {"edits": self._edits(visits, place, reached) if place.kind != "resid_mid" else []}
            job |= {"middle": self._edits(visits, own, reached) if own != place else []}
            wanted = [(number, read) for number, read in enumerate(reads) if read.site.whole == place]
            asked.append(job | {"reads": [(number, _spot(batch, read)) for number, read in wanted]})
        envoy, inputs, ways = self.envoy, self.inputs(batch), [self.stop(place, batch) for place in places]
        width = batch.ids.shape[1]
        hidden = visits.hidden(torch.zeros(()).expand(1, 1, width, width))
        held: Any = {}
        if places:
            try:
                with envoy.trace(**inputs, remote=self.remote):
                    held = carried(envoy, ways, asked, hidden).save()
            except Exception as error:
                raise ModelError(self._failed(error)) from error
        values = {read: _reduced(batch, read, held[number]) for number, read in enumerate(reads)}
        return Seen(values, {}, frozenset(reached))

    def _edits(self, visits: Visits, place: Site, reached: set[tuple[Site, int]]) -> list[tuple[Spot, str, Any]]:
        """Every write at a whole site, as `stops` knows it; those that meet an example are added to `reached`."""
        out: list[tuple[Spot, str, Any]] = []
        for number, site, write in visits.writes.get(place, ()):
            batch = visits.batch
            where = batch.where(site.positions, strict=not visits.lenient)
            if where is None and batch.left_padded and site.kind not in PATTERN_KINDS:
                where = real(batch)
            if where is None or where.valid is None or bool(where.valid.any()):
                reached.add((site, number))
                spot = _spot_of(site, where)
                out.append((spot, *_edit(write.for_batch(batch), site, where, spot, self._zeros(site, batch))))
        return out

    def _zeros(self, site: Site, batch: TokenBatch) -> Tensor:
        """Zeros of the shape of a whole site, which take no memory."""
        examples, width = batch.ids.shape
        heads = self.dims.heads(site.kind)
        if site.kind in PATTERN_KINDS:
            return torch.zeros(()).expand(examples, self.dims.n_heads, width, width)
        inner = self.dims.width(site.whole) // (heads or 1)
        return torch.zeros(()).expand(examples, width, *([] if heads is None else [heads]), inner)

    def _failed(self, error: Exception) -> str:
        """What went wrong with a pass, and what to do."""
        from nnsight.intervention.backends.remote import RemoteError

        said = f"{type(error).__name__}: {str(error).strip() or 'it says no more'}"
        if isinstance(error, RemoteError):
            return (
                f"NDIF at {_host(self.remote)} did not run this pass of {self.model.name} ({said}); nnsight.status()"
                " lists the models that it holds, and nnsight.compare() its versions"
            )
        if _unreachable(error):
            return f"NDIF at {_host(self.remote)} does not answer ({said}); {_ELSEWHERE}"
        return (
            f"the pass of {self.model.name} could not be sent to NDIF, or read back ({said}); give Apply a function"
            " that uses nothing but torch, tensors and numbers"
        )


_ELSEWHERE = "check the network and NDIF_HOST, or load the model without remote=True"


def load_remote(name: Any, remote: bool | str, dtype: Any, revision: str | None, kernel: str | None) -> Model:
    """A model whose weights stay with NDIF.

    Args:
        name: a hub id, or a model of nnsight's that knows its name there.
        remote: nnsight's: True, the address of a server, or ``"local"`` for a dry run that needs none.
    Raises:
        ModelError: no key, no answer, or no such model.
    """
    import nnsight

    if remote != _LOCAL:
        _check_key()
        _check_answer(remote)
    if not isinstance(name, str):
        if "Remotable" not in {cls.__name__ for cls in type(name).__mro__}:
            raise ModelError(
                f"a {type(name).__name__} has no name that NDIF could know; give a hub id, or an nnsight"
                " TransformersModel"
            )
        envoy = name
    else:
        if is_local(name):
            raise ModelError(
                f"{name} is on this machine, and NDIF knows models by their hub id; leave out remote={remote!r}"
            )
        import transformers

        options: dict[str, Any] = {} if dtype is None else {"dtype": str(dtype).removeprefix("torch.")}
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, revision=revision)
            envoy = nnsight.TransformersModel(
                name,
                task="text-generation",
                tokenizer=tokenizer,  # nnsight 0.8 does not find it, with transformers 5
                attn_implementation=kernel or "eager",
                revision=revision,
                **options,
            )
        except Exception as error:
            raise ModelError(
                f"the configuration and tokenizer of {name!r}, which a remote model needs here, cannot be read"
                f" ({type(error).__name__}: {str(error).strip()}); check the name, the network, or your hub token"
            ) from error
    model = Model(envoy._module.eval(), envoy.tokenizer, name if isinstance(name, str) else "")
    if remote != _LOCAL:
        try:
            envoy.to_model_key()
        except Exception as error:
            raise ModelError(
                f"the hub does not say how {model.name!r} is spelt, by which NDIF knows it ({type(error).__name__}:"
                f" {str(error).strip()}); check the name, the network, or your hub token"
            ) from error
    model.backend = RemoteBackend(envoy, model, remote)
    return model


def _host(remote: bool | str) -> str:
    from nnsight import CONFIG

    return remote if isinstance(remote, str) else CONFIG.API.HOST


def _check_key() -> None:
    from nnsight import CONFIG

    if not CONFIG.API.APIKEY:
        raise ModelError(
            "remote=True asks NDIF, which wants an API key, and nnsight has none; set NDIF_API_KEY before nnsight is"
            " first imported, or run nnsight.login() once; without a key, leave out remote=True"
        )


def _check_answer(remote: bool | str) -> None:
    """Ask NDIF who the key belongs to, so that what is wrong is known before the first pass."""
    import httpx
    from nnsight import CONFIG

    try:
        httpx.get(f"{_host(remote)}/whoami", headers={"ndif-api-key": CONFIG.API.APIKEY or ""}).raise_for_status()
    except httpx.HTTPStatusError as error:
        if error.response.status_code in (401, 403):
            raise ModelError(
                f"NDIF at {_host(remote)} does not take this API key ({error.response.status_code}); set NDIF_API_KEY"
                " to one that it gave you, or run nnsight.login()"
            ) from error
    except httpx.HTTPError as error:
        raise ModelError(
            f"NDIF at {_host(remote)} does not answer ({type(error).__name__}: {error}); {_ELSEWHERE}"
        ) from error


def _unreachable(error: Exception) -> bool:
    """Whether the network failed, rather than the request."""
    import httpx
    import websocket

    return isinstance(error, httpx.HTTPError | websocket.WebSocketException | ConnectionError | TimeoutError)


def _spot(batch: TokenBatch, read: Read) -> Spot:
    if read.reduce is not None:  # by a function of this package: the whole comes back
        return read.site.kind in PATTERN_KINDS, None, None, None
    return _spot_of(read.site, batch.where(read.site.positions))


def _spot_of(site: Site, where: Where | None) -> Spot:
    some = site.heads if site.neurons is None else site.neurons  # no kind has both
    columns, valid = (None, None) if where is None else (where.columns, where.valid)
    return site.kind in PATTERN_KINDS, columns, valid, None if some is None else index(some)


def _edit(write: Intervention, site: Site, where: Where | None, spot: Spot, zeros: Tensor) -> tuple[str, Any]:
    """A write without its class: what is done to the slice, and with what.

    Raises:
        HookError: it does not fit, or is a function that cannot be sent.
    """
    if isinstance(write, Apply):
        function: Any = write.fn
        while isinstance(function, partial):
            function = function.func
        named = "<" not in getattr(function, "__qualname__", "<")  # others are sent as source
        if named and str(getattr(function, "__module__", "")).split(".")[0] == "mechinterp":
            raise HookError(
                f"the write at {site} is the function {function.__qualname__} of this package, which NDIF's servers"
                " do not have; load the model without remote=True"
            )
        return "apply", write.fn
    overwrite(zeros, site, where, write)  # which says what does not fit, before anything is sent
    if isinstance(write, Scale):
        return "scale", write.factor
    if isinstance(write, Project):
        rows = write.directions.reshape(-1, write.directions.shape[-1]).double()
        return "project", torch.linalg.qr(rows.T)[0]
    made = write(part_of(zeros, spot))
    if isinstance(write, Knockout):
        return "hide", made.isneginf()
    if isinstance(write, Replace | Zero | Mean):
        return "put", made
    if isinstance(write, Add | Noise | Steer):
        return "add", made
    raise HookError(
        f"{type(write).__name__} at {site} is a class that NDIF's servers do not have; use Replace, Add, Scale, Zero,"
        " Mean, Noise, Project, Steer, Knockout or Apply"
    )


def _reduced(batch: TokenBatch, read: Read, value: Tensor) -> Tensor:
    """What came back for a read, reduced here where it asks for that."""
    if read.reduce is None:
        return value
    visits = Visits(batch, (), [read], (), False)
    visits.at(read.site.whole, value)
    values: Mapping[Read, Tensor] = visits.values
    return values[read]
