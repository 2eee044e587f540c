"""Sparse autoencoders and transcoders: the features of one site, and edits of single ones that leave the rest alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.core.interventions import Apply, Intervention, Steer
from mechinterp.errors import HookError, ModelError
from mechinterp.model.architecture import check
from mechinterp.sites import Positions, Site, resolve

if TYPE_CHECKING:
    from mechinterp.model.model import Model
else:
    Model = Any

Kind: TypeAlias = Literal["standard", "gated", "jumprelu", "topk"]
Normalization: TypeAlias = Literal["none", "layer_norm", "constant_norm_rescale"]
Chosen: TypeAlias = int | Sequence[int]

_OWN: dict[str, tuple[str, ...]] = {"gated": ("r_mag", "b_mag"), "jumprelu": ("threshold",)}
"""Weights that only some architectures have."""
_EPSILON = 1e-5
"""Of SAELens' layer_norm."""


@dataclass(frozen=True, eq=False, repr=False)
class SparseAutoencoder:
    """A sparse autoencoder (SAE) of one site's activations, or a transcoder from one site to another.

    Activations x become features f, most of them 0, and features the reconstruction x̂ = f W_dec + b_dec. With
    z = (x - b_dec) W_enc (``apply_b_dec_to_input=False``: x W_enc), f is

    - ``standard`` (Bricken et al. 2023): relu(z + b_enc);
    - ``topk`` (Gao et al. 2024): relu(z + b_enc) of the k largest, 0 of the others;
    - ``jumprelu`` (Rajamanoharan et al. 2024b): relu(z + b_enc) where z + b_enc > threshold, else 0;
    - ``gated`` (Rajamanoharan et al. 2024a): relu(z exp(r_mag) + b_mag) where z + b_enc > 0, else 0; SAELens
      calls this b_enc b_gate.

    A transcoder (Dunefsky et al. 2024) reads `site`, such as ``mlp_in``, and reconstructs `site_out`, such as
    ``mlp_out``. The heads of a site that has them lie side by side.

    Attributes:
        site: what it reads.
        W_enc: ``d_in feature``. b_enc: ``feature``. W_dec: ``feature d_out``. b_dec: ``d_out``.
        threshold, r_mag, b_mag: ``feature``, where the architecture has them.
        k: of topk.
        normalize: what is done to x before, and undone after: its standardization, or a scale to norm √d_in.
        site_out: of a transcoder: what it reconstructs.
        metadata: what else is known, such as ``model_name``; kept in files.
    Raises:
        ModelError: weights that are missing, not finite, of the wrong shape, or of another architecture.
    """

    site: Site
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    architecture: Kind = "standard"
    threshold: Tensor | None = None
    r_mag: Tensor | None = None
    b_mag: Tensor | None = None
    k: int | None = None
    apply_b_dec_to_input: bool = True
    normalize: Normalization = "none"
    site_out: Site | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.architecture not in get_args(Kind) or self.normalize not in get_args(Normalization):
            raise ModelError(
                f"an SAE's architecture must be one of {', '.join(get_args(Kind))}, and its normalize one of"
                f" {', '.join(get_args(Normalization))}. Got {self.architecture!r} and {self.normalize!r}"
            )
        _check_weights(self)
        for site in (self.site, self.out):
            if site.axes[:2] != ("batch", "pos") or site.positions is not None:
                raise ModelError(f"an SAE is of all vectors of a site that has one for each token. Got {site}")
        if self.site_out is not None and self.site_out.order <= self.site.order:
            raise ModelError(f"a transcoder's {self.site_out} must come after the {self.site} that it reads")
        odd = (self.architecture in ("gated", "topk"), self.apply_b_dec_to_input, self.normalize != "none")
        if self.transcoder and any(odd):
            raise ModelError(
                "a transcoder must be standard or jumprelu, with apply_b_dec_to_input=False and normalize='none', as"
                f" SAELens has them. Got {self.architecture}, {self.apply_b_dec_to_input} and {self.normalize!r}"
            )

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        site: Site | str | None = None,
        site_out: Site | str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "SparseAutoencoder":
        """Read a folder in SAELens' format, old or new: ``cfg.json`` and ``sae_weights.safetensors``.

        Factors that files may have beside the weights (``scaling_factor``, and topk's ``rescale_acts_by_decoder_norm``)
        are folded into them, which changes no reconstruction. Arithmetic is done in `dtype`, on `device`.

        Args:
            site, site_out: in place of the hooks that the file names.
        Raises:
            ModelError: files that are missing, damaged or pickled, a hook that is no site, or an option that is not
                implemented, by its name.
        """
        from mechinterp.model.saelens import read

        at, to = (Site.parse(one) if isinstance(one, str) else one for one in (site, site_out))
        return cls(**read(Path(path).expanduser(), at, to, torch.device(device), dtype))

    def save(self, path: str | Path) -> Path:
        """Write the folder that `load`, and SAELens from version 6 on, reads; whole or not at all.

        Raises:
            OutputError: the folder holds something else, or cannot be written.
        """
        from mechinterp.model.saelens import write

        return write(self, path)

    def __len__(self) -> int:
        """How many features it has."""
        return int(self.W_enc.shape[1])

    @property
    def d_in(self) -> int:
        return int(self.W_enc.shape[0])

    @property
    def d_out(self) -> int:
        return int(self.W_dec.shape[1])

    @property
    def out(self) -> Site:
        """The site that is reconstructed, and written to."""
        return self.site if self.site_out is None else self.site_out

    @property
    def transcoder(self) -> bool:
        return self.site_out is not None

    def encode(self, x: Float[Tensor, "*token width"], features: Chosen | None = None) -> Float[Tensor, "*rest"]:
        """Features of activations ``*token d_in`` (or ``*token head d_head``), ``*token feature``; or of some features.

        A single number drops the feature axis.
        """
        x = self._flat(x, self.d_in).to(self.W_enc)
        mean, inner, _ = self._scales(x)
        x = (x - mean) / inner
        if self.apply_b_dec_to_input:
            x = x - self.b_dec
        some = slice(None) if features is None else features if isinstance(features, int) else list(features)
        if self.architecture == "topk":
            assert self.k is not None
            top = (x @ self.W_enc + self.b_enc).topk(self.k, dim=-1)
            every = torch.zeros(*x.shape[:-1], len(self), dtype=x.dtype, device=x.device)
            return every.scatter(-1, top.indices, top.values.relu())[..., some]
        pre = x @ self.W_enc[:, some]
        if self.architecture == "gated":
            assert self.r_mag is not None and self.b_mag is not None
            return (pre * self.r_mag[some].exp() + self.b_mag[some]).relu() * (pre + self.b_enc[some] > 0)
        pre = pre + self.b_enc[some]
        return pre.relu() if self.threshold is None else pre.relu() * (pre > self.threshold[some])

    def decode(
        self, f: Float[Tensor, "*token feature"], x: Float[Tensor, "*rest"] | None = None
    ) -> Float[Tensor, "*token d_out"]:
        """The reconstruction from features.

        Args:
            x: the activations, whose mean and scale come back where `normalize` took them away.
        Raises:
            ModelError: x is needed and not given.
        """
        out = f.to(self.W_dec) @ self.W_dec + self.b_dec
        if self.normalize == "none":
            return out
        if x is None:
            raise ModelError(f"this SAE undoes {self.normalize}, which takes the activations: decode(f, x)")
        mean, _, outer = self._scales(self._flat(x, self.d_in).to(self.W_enc))
        return out * outer + mean

    def reconstruct(self, x: Float[Tensor, "*rest"]) -> Float[Tensor, "*back"]:
        """decode(encode(x)), in the shape and dtype of x; of a transcoder ``*token d_out``."""
        out = self.decode(self.encode(x), x).to(x.dtype).to(x.device)
        return out if self.transcoder else out.reshape(x.shape)

    def error(self, x: Float[Tensor, "*rest"], y: Float[Tensor, "*back"] | None = None) -> Float[Tensor, "*back"]:
        """What the reconstruction of x lacks: x - x̂.

        Args:
            y: of a transcoder, what it was to reconstruct.
        Raises:
            ModelError: y is not given to a transcoder, or given to another.
        """
        if self.transcoder != (y is not None):
            raise ModelError("error takes x, and of a transcoder also y, what stands at the site that it reconstructs")
        target = x if y is None else y
        return target - self.reconstruct(x).reshape(target.shape)

    def direction(self, feature: int) -> Float[Tensor, "d_out"]:
        """What one unit of a feature writes: its row of W_dec, in activation units."""
        return self.W_dec[self.numbers(feature)[0]]

    def written(
        self, x: Float[Tensor, "*token width"], features: Sequence[int] | None = None
    ) -> Float[Tensor, "*some feature"]:
        """How much of its direction each feature puts into x̂: itself, but for what `normalize` does."""
        return self.encode(x, features) * self._scales(self._flat(x, self.d_in).to(self.W_enc))[2]

    def change(
        self, x: Float[Tensor, "*token width"], features: Sequence[int], factor: float, value: float
    ) -> Float[Tensor, "*some d_out"]:
        """What is added to the reconstruction of x where some features f become factor × f + value."""
        more = (factor - 1.0) * self.encode(x, features) + value
        scale = self._scales(self._flat(x, self.d_in).to(self.W_enc))[2]
        return (more * scale) @ self.W_dec[list(features)]

    def ablate(self, features: Chosen, positions: Positions = None) -> "EditFeatures":
        """An intervention that sets features to 0."""
        return self._edit(features, positions, 0.0, 0.0)

    def scale(self, features: Chosen, factor: float, positions: Positions = None) -> "EditFeatures":
        """An intervention that multiplies features."""
        return self._edit(features, positions, factor, 0.0)

    def clamp(self, features: Chosen, value: float, positions: Positions = None) -> "EditFeatures":
        """An intervention that sets features to a value, whether they are active or not (Templeton et al. 2024)."""
        return self._edit(features, positions, 0.0, value)

    def steer(self, feature: int, strength: float, positions: Positions = None) -> Steer:
        """An intervention that adds `strength` activation units along a feature's direction; transcoders, too.

        Raises:
            ModelError: the feature writes nothing.
        """
        if not bool((direction := self.direction(feature)).any()):
            raise ModelError(f"the direction of feature {feature} is 0, so nothing can be steered along it")
        return Steer(self.out.at(positions), direction, strength)

    def splice(self, positions: Positions = None) -> Apply:
        """An intervention that puts the reconstruction in the place of the activations.

        Raises:
            HookError: it is a transcoder.
        """
        if self.transcoder:
            raise HookError(_elsewhere(self, "spliced in", "Features"))
        return Apply(self.site.at(positions), self.reconstruct)

    def check(self, model: Model) -> None:
        """Raise unless a model has these sites, as wide as the weights.

        Raises:
            SiteError: a site that the model lacks. ModelError: another width.
        """
        for site, width in ((self.site, self.d_in), (self.out, self.d_out)):
            check(site, model.arch, model.dims)
            if (there := model.dims.width(site)) != width:
                raise ModelError(
                    f"the SAE is of vectors of width {width}, and {site} of {model.name} has {there}; give the SAE that"
                    " was trained on this model and site"
                )

    def _edit(self, features: Chosen, positions: Positions, factor: float, value: float) -> "EditFeatures":
        return EditFeatures(self.site.at(positions), self, self.numbers(features), factor, value)

    def numbers(self, features: Chosen) -> tuple[int, ...]:
        """Features as numbers, each once.

        Raises:
            ModelError: none, or one that is not there.
        """
        found = (features,) if isinstance(features, int) else tuple(int(one) for one in features)
        odd = [one for one in found if not 0 <= one < len(self)]
        if odd or not found:
            raise ModelError(f"the features are 0 to {len(self) - 1}. Got {odd[0] if odd else 'none'}")
        return tuple(dict.fromkeys(found))

    def _flat(self, x: Tensor, width: int) -> Tensor:
        """Vectors, with heads side by side."""
        if x.shape[-1] == width:
            return x
        if x.ndim > 1 and x.shape[-2] * x.shape[-1] == width:
            return x.flatten(-2)
        raise HookError(
            f"the SAE of {self.site} is of vectors of width {width}, and got a slice of shape {tuple(x.shape)}; give"
            " the SAE of this model and site"
        )

    def _scales(self, x: Tensor) -> tuple[Any, Any, Any]:
        """What x loses before it is encoded: its mean, a divisor; and the factor that the reconstruction gets back."""
        if self.normalize == "layer_norm":
            spread = x.std(-1, keepdim=True)
            return x.mean(-1, keepdim=True), spread + _EPSILON, spread
        if self.normalize == "constant_norm_rescale":
            size = x.norm(dim=-1, keepdim=True) / self.d_in**0.5
            return 0.0, size, size
        return 0.0, 1.0, 1.0

    def __repr__(self) -> str:
        to = f" to {self.site_out}" if self.transcoder else ""
        what = "transcoder" if self.transcoder else "SAE"
        return f"{self.architecture} {what} of {self.site}{to}: {len(self)} features of {self.d_in} dimensions"


@dataclass(frozen=True, eq=False)
class EditFeatures(Intervention):
    """Change some features where they stand, and leave all else, the SAE's error included: x + decode(f′) - decode(f).

    f′ = factor × f + value for the features that are named, and f′ = f for the others; so factor 1 and value 0 is the
    identity. `SparseAutoencoder.ablate`, `scale` and `clamp` make these.

    Raises:
        HookError: of a transcoder, whose features are read elsewhere than where they are written.
        ModelError: a feature that is not there.
    """

    sae: SparseAutoencoder
    features: tuple[int, ...]
    factor: float = 0.0
    value: float = 0.0

    def __post_init__(self) -> None:
        if self.sae.transcoder:
            raise HookError(_elsewhere(self.sae, "edited", "FeatureEffects"))
        object.__setattr__(self, "features", self.sae.numbers(self.features))
        for site in resolve(self.site, 1):
            if site.whole != self.sae.site.whole or site.heads != self.sae.site.heads:
                raise HookError(f"the SAE is of {self.sae.site}, so its features cannot be edited at {site}")

    def __call__(self, value: Tensor) -> Tensor:
        new = self.sae.change(value, self.features, self.factor, self.value)
        return value + new.reshape(value.shape).to(value)


def _elsewhere(sae: SparseAutoencoder, what: str, analyzer: str) -> str:
    """Why a transcoder's features cannot be changed by a write."""
    return (
        f"a transcoder cannot be {what} by an intervention: it reads {sae.site}, which a write at {sae.out} does not"
        f" see; use mi.{analyzer}, which reads first and writes in a second run, or steer along its directions"
    )


def _check_weights(sae: SparseAutoencoder) -> None:
    """Weights detached, of one dtype on one device.

    Raises:
        ModelError: see `SparseAutoencoder`.
    """
    own = _OWN.get(sae.architecture, ())
    if sae.W_enc.ndim != 2 or sae.W_dec.ndim != 2:
        raise ModelError(f"W_enc and W_dec of the SAE of {sae.site} must be matrices, d_in × feature and back")
    d_in, n = sae.W_enc.shape
    d_out = d_in if sae.site_out is None else sae.W_dec.shape[1]
    shapes = {"W_enc": (d_in, n), "b_enc": (n,), "W_dec": (n, d_out), "b_dec": (d_out,)}
    shapes |= {name: (n,) for names in _OWN.values() for name in names}
    for name, shape in shapes.items():
        tensor: Tensor | None = getattr(sae, name)
        wanted = name in own or name in ("W_enc", "b_enc", "W_dec", "b_dec")
        if wanted != (tensor is not None):
            raise ModelError(f"{name} {'is missing from' if wanted else 'is no weight of'} a {sae.architecture} SAE")
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape or not tensor.numel():
            raise ModelError(f"{name} of the SAE of {sae.site} has shape {tuple(tensor.shape)}; it must have {shape}")
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{name} of the SAE of {sae.site} has values that are not finite numbers; get it again")
        object.__setattr__(sae, name, tensor.detach().to(sae.W_enc))
    if (sae.architecture == "topk") != (sae.k is not None) or (sae.k is not None and not 1 <= sae.k <= n):
        raise ModelError(f"a topk SAE, and no other, must have a k from 1 to its {n} features. Got {sae.k}")
