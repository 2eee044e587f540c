"""A linear head on a causal language model: what it makes of the last token's final state is the decision."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml
from jaxtyping import Float
from torch import Tensor

from mechinterp.errors import ConfigurationError, ModelError
from mechinterp.model.model import Model
from mechinterp.report.files import whole_folder

CONFIGURATION, HEAD, ADAPTER, MARKER = "classifier.yaml", "head.safetensors", "adapter", "files.json"
_KNOWN = ("base", "adapter", "head", "labels")


def load_classifier(
    base: Any = None,
    *,
    adapter: str | Path | None = None,
    head: str | Path | torch.nn.Linear | None = None,
    labels: Sequence[str] | None = None,
    config: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
) -> Model:
    """A classifier: a causal language model whose last token's final state goes through a linear head.

        mi.load_classifier("Qwen/Qwen3-8B", adapter="adapter", head="head.safetensors", labels=["stable", "event"])
        mi.load_classifier("my-classifier")  # what `save_classifier` wrote, or a Trainer's checkpoints

    A head of one output is one of two: the logits are 0 and that output, whose softmax is its sigmoid. The result
    is a `Model` like any other with labels in place of a vocabulary; ``model.vocabulary`` is the language model's
    unembedding (``token d_model``), None where none is known.

    Args:
        base: a name or folder as for `Model.load`, or a `Model`, which the classifier then takes over. A folder may
            also be one that `save_classifier` wrote; a ``…ForSequenceClassification`` checkpoint; the adapter that a
            Trainer saved, which names its base; or a Trainer's output, whose newest ``checkpoint-…`` is opened.
        adapter: folder or hub id of a PEFT adapter, trained on the causal model or, with its head, on a classifier.
        head: a safetensors file with one matrix ``label d_model`` (and perhaps a bias), a folder with such a file,
            or the layer itself. None where the checkpoint or the adapter brings it.
        labels: names of the head's outputs; ``LABEL_0`` and so on by default.
        config: a YAML file that says ``base``, ``adapter``, ``head`` and ``labels``, as far as the arguments do not;
            paths in it are relative to it. By default the ``classifier.yaml`` of `base`.
    Raises:
        ModelError: the base, the adapter or the head cannot be used: unknown, of another width, not finite, or without
            a head. ConfigurationError: the YAML file cannot be used.
    """
    folder = None if isinstance(base, Model | torch.nn.Module) or base is None else Path(str(base)).expanduser()
    if config is None and folder is not None and (folder / CONFIGURATION).is_file():
        config, base = folder / CONFIGURATION, None
    said = {} if config is None else _configured(Path(config))
    base, head = base if base is not None else said.get("base"), head if head is not None else said.get("head")
    adapter, labels = adapter or said.get("adapter"), labels or said.get("labels")
    if base is None:
        raise ModelError("load_classifier has no base; give a model's name or folder, or a config= that says base:")
    base, adapter = _checkpoint(base, adapter)
    if head is None and adapter is not None and (Path(adapter) / HEAD).is_file():
        head = Path(adapter) / HEAD
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    model = base if isinstance(base, Model) else Model.load(base, adapter=adapter and str(adapter), **options)
    if head is not None:
        return with_head(model, head if isinstance(head, torch.nn.Linear) else _read(Path(head).expanduser()), labels)
    if model.dims.n_labels is None:
        raise ModelError(f"{model.name} is a language model and no head was given; give head=, or train one")
    if labels is not None:
        _name(model.hf.config, labels, model.dims.n_labels)
    return model


def with_head(model: Model, head: torch.nn.Linear, labels: Sequence[str] | None = None) -> Model:
    """A classifier of a causal model's decoder, which it takes over, and a head.

    Raises:
        ModelError: the model is a classifier already, or the head does not fit it.
    """
    import transformers

    hf: Any = model.hf
    if model.dims.n_labels is not None:
        raise ModelError(f"{model.name} has a head already; give a causal language model")
    weight, bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
    if weight.shape[1] != model.dims.d_model:
        raise ModelError(
            f"the head takes states of width {weight.shape[1]}, and those of {model.name} have {model.dims.d_model};"
            " give the head that was trained on this model"
        )
    if not all(bool(torch.isfinite(part).all()) for part in (weight, bias) if part is not None):
        raise ModelError("the head has weights that are not finite; train it again, with a lower learning rate perhaps")
    if len(weight) == 1:
        weight = torch.cat([torch.zeros_like(weight), weight])
        bias = None if bias is None else torch.cat([torch.zeros_like(bias), bias])
    kind: Any = transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(hf.config), None)
    if kind is None:
        raise ModelError(f"transformers has no sequence classifier of the family {model.arch.family}; use another base")
    config, decoder = hf.config, hf.get_submodule(model.arch.base)
    _name(config, labels, len(weight))
    if config.pad_token_id is None:
        config.pad_token_id = getattr(model.tokenizer, "pad_token_id", None)
    with torch.device("meta"):
        made: Any = kind(config)
    setattr(made, made.base_model_prefix, decoder)
    made.config = config  # the decoder's own, by which the attention kernel is chosen
    made.score = torch.nn.Linear(weight.shape[1], len(weight), bias=bias is not None)
    made.score.weight = torch.nn.Parameter(weight.to(model.device, model.dtype), requires_grad=False)
    if bias is not None:
        made.score.bias = torch.nn.Parameter(bias.to(model.device, model.dtype), requires_grad=False)
    if model.peft is not None:
        model.peft.base_model.model = made
    out = Model(made.eval() if model.peft is None else model.peft, model.tokenizer, model.name)
    out._vocabulary = hf.get_submodule(model.arch.unembed).weight.detach()
    return out


def save_classifier(model: Model, folder: str | Path, *, base: str | None = None) -> Path:
    """Write a classifier's adapter, head and configuration, whole or not at all; not the base's weights.

    Args:
        base: the name or folder by which `load_classifier` is to find the base; the model's own name by default.
    Raises:
        ModelError: the model has no head. OutputError: the folder holds something else, or cannot be written.
    """
    if model.dims.n_labels is None:
        raise ModelError(f"{model.name} is a language model; there is no head to save")
    with whole_folder(folder, MARKER) as target:
        score = model.hf.score
        tensors = {"weight": score.weight.detach().cpu().contiguous()}
        if getattr(score, "bias", None) is not None:
            tensors["bias"] = score.bias.detach().cpu().contiguous()
        safetensors.torch.save_file(tensors, target / HEAD)
        labels = model.to_str_outputs(range(len(score.weight)))
        base = base or model.name
        where = Path(base).expanduser()
        found = str(where.resolve()) if where.is_dir() else base
        about: dict[str, Any] = {"base": found, "head": HEAD, "labels": labels}
        if model.peft is not None:
            model.peft.save_pretrained(str(target / ADAPTER), save_embedding_layers=False)
            (target / ADAPTER / "README.md").unlink(missing_ok=True)
            about["adapter"] = ADAPTER
        said = yaml.safe_dump(about, sort_keys=False, allow_unicode=True)
        (target / CONFIGURATION).write_text(said, encoding="utf-8")
        files = sorted(path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file())
        listed = {"format": "mechinterp-classifier-1", "files": [*files, MARKER]}
        (target / MARKER).write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")
    return Path(folder)


def _configured(path: Path) -> Mapping[str, Any]:
    """What a YAML file says; its paths as they are seen from here."""
    try:
        said = yaml.safe_load(path.expanduser().read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigurationError(f"{path} cannot be read ({error}); give a YAML file") from None
    odd = sorted(set(said) - set(_KNOWN)) if isinstance(said, dict) else ["no mapping"]
    if odd:
        raise ConfigurationError(f"{path} says {odd[0]!r}; it may say {', '.join(_KNOWN)}")
    out = {key: value for key, value in said.items() if value is not None}
    for key in ("base", "adapter", "head"):
        if not isinstance(out.get(key, ""), str):
            raise ConfigurationError(f"{key} of {path} must be a name or a path. Got {out[key]!r}")
        here = path.expanduser().parent / str(out.get(key, ""))
        if key in out and (here.exists() or key == "head"):
            out[key] = str(here)
        elif key == "adapter" and key in out and str(out[key]).count("/") != 1:  # a hub's id is owner/name
            raise ConfigurationError(f"{path} says adapter: {out[key]}, and there is no folder {here}; correct it")
    labels = out.get("labels")
    if labels is not None and not (isinstance(labels, list) and all(isinstance(one, str | int) for one in labels)):
        raise ConfigurationError(f"labels of {path} must be a list of names. Got {labels!r}")
    return out | ({} if labels is None else {"labels": [str(one) for one in labels]})


def _checkpoint(base: Any, adapter: Any) -> tuple[Any, Any]:
    """The base and the adapter of what a Trainer wrote; anything else as it is."""
    if isinstance(base, torch.nn.Module):
        return Model.wrap(base), adapter
    if isinstance(base, Model):
        if adapter is not None:
            raise ModelError("an adapter cannot be put on a model that exists already; leave it out, or load by name")
        return base, None
    folder = Path(str(base)).expanduser()
    if not folder.is_dir():
        return str(base), adapter
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        steps = {int(found[1]): p for p in folder.iterdir() if (found := re.fullmatch(r"checkpoint-(\d+)", p.name))}
        if steps:
            folder = steps[max(steps)]
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        try:
            named = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(
                f"{folder}/adapter_config.json does not name its base ({error}); give base= and adapter="
            ) from None
        return str(named), str(folder)
    return str(folder), adapter


def _read(path: Path) -> torch.nn.Linear:
    """The one matrix of a file, with its bias."""
    if path.is_dir():
        found = [p for p in sorted(path.glob("*.safetensors")) if p.name != "adapter_model.safetensors"]
        path = path / HEAD if (path / HEAD).is_file() or len(found) != 1 else found[0]
    if path.suffix != ".safetensors":
        raise ModelError(
            f"the head {path} is no .safetensors file; save it with safetensors, since pickles can run code"
        )
    if not path.is_file():
        raise ModelError(f"there is no head {path}; give the .safetensors file of the linear layer")
    try:
        tensors = safetensors.torch.load_file(path)
    except Exception as error:
        raise ModelError(f"the head {path} cannot be read ({type(error).__name__}: {error}); get it again") from error
    matrices = {name: tensor for name, tensor in tensors.items() if tensor.ndim == 2}
    if len(matrices) != 1:
        names = ", ".join(f"{name} {tuple(t.shape)}" for name, t in list(tensors.items())[:4])
        raise ModelError(f"the head {path} must hold one matrix, label × d_model, and perhaps a bias. It has {names}")
    ((_, weight),) = matrices.items()
    biases = [tensor for tensor in tensors.values() if tensor.shape == weight.shape[:1]]
    return linear(weight, biases[0] if biases else None)


def linear(weight: Float[Tensor, "label d_model"], bias: Float[Tensor, "label"] | None = None) -> torch.nn.Linear:
    """A layer of these weights."""
    out = torch.nn.Linear(weight.shape[1], len(weight), bias=bias is not None, device="meta")
    out.weight = torch.nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        out.bias = torch.nn.Parameter(bias, requires_grad=False)
    return out


def _name(config: Any, labels: Sequence[str] | None, n: int) -> None:
    """Say in the configuration how many labels there are, and how they are called."""
    names = [f"LABEL_{i}" for i in range(n)] if labels is None else [str(label) for label in labels]
    if len(names) != n or len(set(names)) < n:
        raise ModelError(f"the head has {n} outputs, and the labels are {', '.join(names)}; name each once")
    config.num_labels = n
    config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
