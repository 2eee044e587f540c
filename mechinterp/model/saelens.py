"""SAELens' files: a folder with ``cfg.json`` and ``sae_weights.safetensors``, of versions before and after 6."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from mechinterp.errors import ModelError, SiteError
from mechinterp.model.autoencoder import SparseAutoencoder
from mechinterp.report.files import whole_folder
from mechinterp.sites import Site

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
VERSION = "6.0.0"
"""Of the format that is written."""
_ARCHITECTURES = {
    "standard": "standard",
    "gated": "gated",
    "jumprelu": "jumprelu",
    "topk": "topk",
    "transcoder": "standard",
    "jumprelu_transcoder": "jumprelu",
}
"""SAELens' name → ours."""
_RENAMED = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
"""Names that older files use, and the newer ones."""
_FACTORS = ("scaling_factor", "finetuning_scaling_factor")
"""Of features, after fine-tuning; the first is the older name."""
_ABOUT = ("model_name", "dataset_path", "context_size", "prepend_bos", "neuronpedia_id")
"""What is kept of an older file as metadata, where a newer one has a block of its own."""


def read(
    folder: Path, site: Site | None, site_out: Site | None, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """The fields of a `SparseAutoencoder`; see `SparseAutoencoder.load`."""
    config = _config(folder / CONFIG)
    metadata: dict[str, Any] = {name: config[name] for name in _ABOUT if config.get(name) is not None}
    metadata |= config.get("metadata") or {}
    hooks = {_RENAMED.get(name, name): value for name, value in {**config, **metadata}.items()}
    kind, k = _architecture(config, folder)
    tensors = _tensors(folder / WEIGHTS, device, dtype)
    own = _own_names(tensors, kind)
    _fold(own, config, folder)
    for name, axis in {"d_in": 0, "d_sae": 1}.items():
        if (said := config.get(name)) is not None and own["W_enc"].ndim == 2 and own["W_enc"].shape[axis] != said:
            raise ModelError(
                f"{folder} says {name} {said} and holds W_enc of shape {tuple(own['W_enc'].shape)}; its files do not"
                " belong together"
            )
    chosen = site or _site(hooks, "", folder)
    to = site_out or (_site(hooks, "_out", folder) if hooks.get("hook_name_out") else None)
    if config["architecture"] in ("transcoder", "jumprelu_transcoder") and to is None:
        raise ModelError(f"{folder} is a transcoder and does not name the hook that it writes; give site_out=")
    return {
        **own,
        "site": chosen,
        "site_out": None if to == chosen else to,
        "architecture": kind,
        "k": k,
        "apply_b_dec_to_input": bool(config.get("apply_b_dec_to_input", True)),
        "normalize": _normalization(config, folder),
        "metadata": {name: value for name, value in metadata.items() if not name.startswith("hook_")},
    }


def write(sae: SparseAutoencoder, path: str | Path) -> Path:
    """See `SparseAutoencoder.save`."""
    tensors = {"W_enc": sae.W_enc, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    tensors |= {name: t for name in ("threshold", "r_mag", "b_mag") if (t := getattr(sae, name)) is not None}
    if sae.architecture == "gated":
        tensors["b_gate"] = tensors.pop("b_enc")
    names = [ours for ours, of in _ARCHITECTURES.items() if of == sae.architecture]
    metadata: dict[str, Any] = {"sae_lens_version": VERSION, **sae.metadata, **_hooks(sae.site, "")}
    if sae.site_out is not None:
        metadata |= _hooks(sae.site_out, "_out")
    beside = sae.site.spec.head_axis is not None and not isinstance(sae.site.heads, int)
    config: dict[str, Any] = {
        "architecture": names[1 if sae.transcoder else 0],
        "d_in": sae.d_in,
        "d_sae": len(sae),
        "dtype": str(sae.W_enc.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": sae.apply_b_dec_to_input,
        "normalize_activations": sae.normalize,
        "reshape_activations": "hook_z" if beside else "none",
        "metadata": metadata,
        "format": "mechinterp-sae-1",
        "files": [CONFIG, WEIGHTS],
    }
    if sae.transcoder:
        config["d_out"] = sae.d_out
    if sae.k is not None:
        config |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    with whole_folder(path, CONFIG) as folder:
        kept = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        (folder / WEIGHTS).write_bytes(safetensors.torch.save(kept))
        (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return Path(path)


def _config(path: Path) -> dict[str, Any]:
    """What the file says, by the newer names."""
    if not path.is_file():
        raise ModelError(f"there is no {path}; give a folder that SAELens wrote, with {CONFIG} and {WEIGHTS}")
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({error}); get it again") from error
    if not isinstance(said, dict) or not isinstance(said.get("metadata") or {}, dict):
        raise ModelError(f"{path} is not an object of options; give a folder that SAELens wrote")
    out: dict[str, Any] = {_RENAMED.get(str(name), str(name)): value for name, value in said.items()}
    out.setdefault("architecture", "standard")
    return out


def _architecture(config: Mapping[str, Any], folder: Path) -> tuple[str, int | None]:
    """Our name of the architecture, and the k of topk."""
    given, activation = config["architecture"], config.get("activation_fn") or "relu"
    options: dict[str, Any] = dict(config.get("activation_fn_kwargs") or {})
    k = config.get("k", options.pop("k", None))
    if given not in _ARCHITECTURES:
        raise _refused(folder, "architecture", given, f"one of {', '.join(_ARCHITECTURES)}")
    kind = "topk" if activation == "topk" and given == "standard" else _ARCHITECTURES[given]
    if activation != "relu" and (activation, kind) != ("topk", "topk"):
        raise _refused(folder, "activation_fn", activation, "relu, or topk of a standard or topk SAE")
    if odd := next((name for name, value in options.items() if value), None):
        raise _refused(folder, f"activation_fn_kwargs.{odd}", options[odd], "none but k")
    if config.get("rescale_acts_by_decoder_norm") and kind != "topk":
        raise _refused(folder, "rescale_acts_by_decoder_norm", True, "false, but in a topk SAE")
    if kind == "topk" and (not isinstance(k, int) or isinstance(k, bool)):
        raise _refused(folder, "k", k, "a number")
    return kind, k if kind == "topk" else None


def _normalization(config: Mapping[str, Any], folder: Path) -> str:
    said, reshape = config.get("normalize_activations"), config.get("reshape_activations")
    if reshape not in (None, "none", "hook_z"):
        raise _refused(folder, "reshape_activations", reshape, "none or hook_z")
    if said is True or said == "expected_average_only_in":
        raise ModelError(
            f"{folder} says normalize_activations {said!r}: its weights are of activations times a factor that is in no"
            " file; fold it (W_enc × factor, W_dec and b_dec / factor; SAELens'"
            " fold_activation_norm_scaling_factor) and save it again"
        )
    if said in (None, False, "none"):
        return "none"
    if said not in ("layer_norm", "constant_norm_rescale"):
        raise _refused(folder, "normalize_activations", said, "none, layer_norm or constant_norm_rescale")
    return str(said)


def _tensors(path: Path, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    if not path.is_file():
        pickled = sorted(p.name for p in path.parent.iterdir() if p.suffix in (".pt", ".pth", ".bin", ".pkl", ".ckpt"))
        found = f"it has {pickled[0]}, and pickled weights are refused, since they can run code; " if pickled else ""
        raise ModelError(f"{path.parent} has no {WEIGHTS}; {found}give a folder that SAELens wrote")
    try:
        tensors = safetensors.torch.load_file(path, device=str(device))
    except Exception as error:
        raise ModelError(f"{path} cannot be read ({type(error).__name__}: {error}); get it again") from error
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def _own_names(tensors: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Weights by our names, factors among them."""
    if kind == "gated" and "b_enc" not in tensors and "b_gate" in tensors:
        tensors["b_enc"] = tensors.pop("b_gate")
    if "log_threshold" in tensors and "threshold" not in tensors:
        tensors["threshold"] = tensors.pop("log_threshold").exp()
    known = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "r_mag", "b_mag", *_FACTORS)
    if odd := sorted(set(tensors) - set(known)):
        raise ModelError(f"the SAE holds {odd[0]}, which is no weight of a {kind} SAE as it is implemented here")
    if gone := [name for name in known[:4] if name not in tensors]:
        raise ModelError(f"{gone[0]} is missing from the weights of the {kind} SAE; they hold {', '.join(tensors)}")
    return tensors


def _fold(weights: dict[str, Tensor], config: Mapping[str, Any], folder: Path) -> None:
    """Put factors of features into the matrices: the norms that topk chooses by, and those of fine-tuning."""
    if config.get("rescale_acts_by_decoder_norm"):
        norm = weights["W_dec"].norm(dim=-1)
        if not bool((norm > 0).all()):
            raise ModelError(f"{folder} says rescale_acts_by_decoder_norm and has a feature that writes nothing")
        weights["W_enc"], weights["b_enc"] = weights["W_enc"] * norm, weights["b_enc"] * norm
        weights["W_dec"] = weights["W_dec"] / norm[:, None]
    for name in _FACTORS:
        if (factor := weights.pop(name, None)) is None or bool((factor == 1).all()):
            continue
        if not config.get("finetuning_scaling_factor"):
            raise ModelError(f"{folder} holds a {name} and says finetuning_scaling_factor false; correct {CONFIG}")
        weights["W_dec"] = weights["W_dec"] * factor.reshape(-1, 1)


def _site(hooks: Mapping[str, Any], end: str, folder: Path) -> Site:
    """The site that a hook's name means, of a single head where there is a number of one."""
    name, head = hooks.get(f"hook_name{end}"), hooks.get(f"hook_head_index{end}")
    if not isinstance(name, str):
        raise ModelError(f"{folder} names no hook_name{end}; give site{end}=")
    try:
        site = Site.parse(name)
    except SiteError as error:
        before = "; it is the norm before its weight" if name.endswith("hook_normalized") else ""
        raise ModelError(
            f"{folder} is of the hook {name!r}{before}. {error} Give site{end}= if it is a site all the same"
        ) from None
    return site if head is None else Site(site.kind, site.layer, heads=int(head))


def _hooks(site: Site, end: str) -> dict[str, Any]:
    head = site.heads if isinstance(site.heads, int) else None
    name = site.tl_name if site.heads is None or head is not None else None
    return {f"hook_name{end}": name or str(site), f"hook_head_index{end}": head if name else None}


def _refused(folder: Path, name: str, value: Any, allowed: str) -> ModelError:
    return ModelError(f"{folder} says {name} {value!r}, which is not implemented; it must be {allowed}")
