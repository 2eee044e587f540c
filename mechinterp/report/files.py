"""Results and traces as files: numbers in safetensors, the rest in JSON, tables, figures. Whole or not at all."""

import contextlib
import errno
import io
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import safetensors.numpy
import safetensors.torch
import torch
import xarray as xr
from safetensors import SafetensorError

from mechinterp.core.result import Result, View
from mechinterp.core.tokens import TokenBatch
from mechinterp.core.trace import Read, Trace
from mechinterp.errors import MechinterpError, OutputError
from mechinterp.report.panels import rows
from mechinterp.sites import Site

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULT = "result.json"
NUMBERS = "numbers.safetensors"
TRACE = "trace.json"
TENSORS = "tensors.safetensors"
_FORMAT = "mechinterp-result-1"
_TRACE_FORMAT = "mechinterp-trace-1"
_LITTER = {".DS_Store", "Thumbs.db", "desktop.ini"}
"""What file browsers leave in a folder that they show."""
MOST_ROWS = 300_000
"""Of a table that is written; larger ones are in the result's own numbers."""


def save_result(result: Result, path: str | Path) -> Path:
    """Write a result into the folder `path`; an earlier result there is replaced.

    Raises:
        OutputError: the folder holds something else, cannot be written, or the result holds what
            neither safetensors nor JSON can.
    """
    with whole_folder(path, RESULT) as folder:
        put_result(result, folder)
    return Path(path)


def put_result(result: Result, folder: Path) -> None:
    """Write a result's two files into a folder that exists."""
    numbers: dict[str, Any] = {}
    variables: list[dict[str, Any]] = []
    for name, variable in result.data.variables.items():
        values = np.asarray(variable.values)
        if not isinstance(name, str) or values.dtype.kind not in "biufOUT":
            raise OutputError(
                f"{name!r} holds {values.dtype}, which cannot be saved; make it numbers, bools or strings"
            )
        entry: dict[str, Any] = {"name": name, "dims": list(variable.dims), "attrs": encode(variable.attrs, name)}
        if values.dtype.kind in "biuf":
            numbers[name] = np.array(values, order="C")
        else:
            entry |= {"dtype": "T" if values.dtype.kind == "T" else values.dtype.str, "shape": list(values.shape)}
            entry["values"] = [encode(v, name) for v in values.ravel().tolist()]
        variables.append({**entry, "coordinate": name in result.data.coords})
    content = {
        "format": _FORMAT,
        "files": [NUMBERS, RESULT],
        "variables": variables,
        "attrs": encode(result.data.attrs, "attrs"),
        "meta": encode(result.meta, "meta"),
        "views": [encode(asdict(view), "views") for view in result.views],
    }
    folder.mkdir(parents=True, exist_ok=True)
    # save() and write, not save_file(): a full disk is then an OSError like any other
    (folder / NUMBERS).write_bytes(safetensors.numpy.save(numbers))
    (folder / RESULT).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def load_result(path: str | Path) -> Result:
    """Read back what `save_result` wrote: the same arrays, dtypes, coordinates, provenance and views.

    Raises:
        OutputError: there is no result at `path`, or its files are damaged.
    """
    with readable(path, RESULT, _FORMAT, "result") as (folder, content):
        numbers = safetensors.numpy.load((folder / NUMBERS).read_bytes())
        data: dict[str, Any] = {}
        coords: dict[str, Any] = {}
        for entry in content["variables"]:
            name = entry["name"]
            values = numbers[name] if "values" not in entry else _strings(entry)
            (coords if entry["coordinate"] else data)[name] = (entry["dims"], values, decode(entry["attrs"]))
        dataset = xr.Dataset(data, coords, decode(content["attrs"]))
        return Result(dataset, decode(content["meta"]), tuple(View(**decode(v)) for v in content["views"]))


def save_trace(trace: Trace, path: str | Path) -> Path:
    """Write a trace into the folder `path`; an earlier trace there is replaced.

    Raises:
        OutputError: a read was reduced by a function, the folder holds something else or cannot be
            written, or the batch holds labels that JSON cannot.
    """
    tensors: dict[str, torch.Tensor] = {}
    reads: list[dict[str, Any]] = []
    for i, read in enumerate(trace.reads):
        if read.reduce is not None:
            raise OutputError(
                f"{read.site} was reduced to {read.reduce.axes!r} by a function, which a file cannot hold; save the"
                " Result made of it, or trace again without this read"
            )
        site = read.site
        name = f"{i} {site}"  # numbered: the short form leaves out per_query_head and which run
        tensors[name] = trace[read]
        entry = {name: getattr(site, name) for name in ("kind", "layer", "heads", "positions", "neurons")}
        entry |= {"per_query_head": site.per_query_head}
        reads.append({"tensor": name, "of": read.of, "site": encode(entry, str(site))})
    known: dict[str, Any] = {}
    for name, value in vars(trace.batch).items():
        if isinstance(value, torch.Tensor):
            tensors[name] = value
        else:
            known[name] = encode(value, name)
    content = {"format": _TRACE_FORMAT, "files": [TENSORS, TRACE], "reads": reads, "batch": known}
    # A copy of each: two reads may share memory, which safetensors refuses.
    whole = {n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}
    with whole_folder(path, TRACE) as folder:
        (folder / TENSORS).write_bytes(safetensors.torch.save(whole))
        (folder / TRACE).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return Path(path)


def load_trace(path: str | Path) -> Trace:
    """Read back what `save_trace` wrote: the same reads, tensors and dtypes, on the CPU, and their batch.

    Raises:
        OutputError: there is no trace at `path`, or its files are damaged.
    """
    with readable(path, TRACE, _TRACE_FORMAT, "trace") as (folder, content):
        tensors = safetensors.torch.load((folder / TENSORS).read_bytes())
        found = {Read(Site(**decode(r["site"])), r["of"]): tensors.pop(r["tensor"]) for r in content["reads"]}
        saved: dict[str, Any] = {**decode(content["batch"]), **tensors}
        batch = TokenBatch(**saved)
        n = len(batch)
        odd = [name for name, tensor in tensors.items() if len(tensor) != n]
        odd += [str(read.site) for read, tensor in found.items() if tensor.ndim < 1 or len(tensor) != n]
        if batch.mask.dtype != torch.bool or batch.ids.is_floating_point() or not 0 <= batch.offset < 1 << 31:
            odd.append("the batch")
        if odd:
            raise ValueError(f"{', '.join(odd)} does not fit a batch of {n} examples")
        return Trace(found, batch)


@contextlib.contextmanager
def readable(path: str | Path, name: str, form: str, what: str) -> Generator[tuple[Path, Any], None, None]:
    """The folder `path` and what its JSON file `name` holds; errors in the block mean damaged files.

    Raises:
        OutputError: there is no such file, it is of another format, or what is in the folder is damaged.
    """
    folder = Path(path).expanduser()
    if not (folder / name).is_file():
        raise OutputError(f"{path} holds no saved {what} (no {name}); give a folder that {what.title()}.save wrote")
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        if content["format"] != form:
            raise OutputError(
                f"{path} has format {content['format']!r}, not {form!r}; read it with the version that wrote it"
            )
        yield folder, content
    except OutputError:
        raise
    except (
        *(OSError, SafetensorError, MechinterpError, RecursionError),
        *(ValueError, KeyError, TypeError, AttributeError),
    ) as error:
        said = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise OutputError(
            f"the {what} in {path} cannot be read ({said}); its files are damaged, save it again"
        ) from error


def _strings(entry: Mapping[str, Any]) -> Any:
    dtype: Any = np.dtypes.StringDType() if entry["dtype"] == "T" else np.dtype(entry["dtype"])
    values = np.empty(len(entry["values"]), dtype)
    values[:] = [decode(v) for v in entry["values"]]
    return values.reshape(entry["shape"])


def encode(value: Any, where: str) -> Any:
    """A value as strict JSON that `decode` turns back: tuples, NaN and odd keys are marked with ``$``.

    Raises:
        OutputError: it holds what JSON cannot; `where` names it.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, tuple):
        return {"$tuple": [encode(v, where) for v in value]}
    if isinstance(value, list):
        return [encode(v, where) for v in value]
    if isinstance(value, Mapping):
        if all(isinstance(k, str) and not k.startswith("$") for k in value):
            return {k: encode(v, f"{where}.{k}") for k, v in value.items()}
        return {"$dict": [[encode(k, where), encode(v, where)] for k, v in value.items()]}
    raise OutputError(
        f"{where} holds a {type(value).__name__}, which cannot be saved; use numbers, strings, lists, dicts"
    )


def plain(value: Any) -> Any:
    """A value for other people's JSON readers: NaN is null, keys are text, numpy's numbers are numbers."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


def plain_json(value: Any) -> str:
    """The text of a JSON file of `plain` values."""
    return json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def decode(value: Any) -> Any:
    """What `encode` was given."""
    if isinstance(value, list):
        return [decode(v) for v in value]
    if not isinstance(value, dict):
        return value
    if "$float" in value:
        return float(value["$float"])
    if "$tuple" in value:
        return tuple(decode(v) for v in value["$tuple"])
    if "$dict" in value:
        return {decode(k): decode(v) for k, v in value["$dict"]}
    return {k: decode(v) for k, v in value.items()}


def named(results: Sequence[Result]) -> dict[str, Result]:
    """Results by a name for their files, such as ``head-roles``; a repeated one gets a number.

    What a result is of (``meta["of"]``), where several are of one analyzer, comes behind it: ``probe-tense``.
    """
    out: dict[str, Result] = {}
    for result in results:
        whole = "-".join(str(result.meta[key]) for key in ("analyzer", "of") if key in result.meta) or "result"
        name = slug(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", whole))
        out[_free(name, out)] = result
    return out


def write_tables(results: Mapping[str, Result], folder: str | Path) -> list[Path]:
    """Every tidy table as parquet and CSV, ``NAME-VARIABLE.parquet``; NaN is empty in CSV.

    Tables of more than `MOST_ROWS` rows, such as whole attention patterns, are left out.

    Raises:
        OutputError: the folder cannot be written.
    """
    out: list[Path] = []
    with explained(folder):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, result in results.items():
            for variable, frame in result.tables(MOST_ROWS).items():
                path = folder / f"{name}-{slug(variable)}"
                frame = _plain_columns(frame)
                buffer = io.BytesIO()
                frame.to_parquet(buffer, index=False)
                path.with_suffix(".parquet").write_bytes(buffer.getvalue())
                frame.to_csv(path.with_suffix(".csv"), index=False, encoding="utf-8", lineterminator="\n")
                out += [path.with_suffix(".parquet"), path.with_suffix(".csv")]
    return out


def write_figures(results: Mapping[str, Result], folder: str | Path) -> list[Path]:
    """Every view as PNG and SVG, drawn by matplotlib; needs no browser. Views without a number are left out.

    Raises:
        OutputError: the folder cannot be written, or a view does not fit its result.
    """
    from mechinterp.report.figures import matplotlib_figure

    out: list[Path] = []
    with explained(folder):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, result in results.items():
            for title, view in _figure_names(name, result).items():
                out += write_picture(matplotlib_figure(result, view), folder / title)
    return out


def write_picture(figure: "Figure", stem: Path) -> list[Path]:
    """A matplotlib figure as ``STEM.png`` and ``STEM.svg``; the same numbers give the same files."""
    import matplotlib

    paths = [stem.with_name(f"{stem.name}.{end}") for end in ("png", "svg")]
    with matplotlib.rc_context({"svg.hashsalt": "mechinterp"}):  # a fixed salt, and no date
        figure.savefig(paths[0], metadata={"Software": None})
        figure.set_layout_engine(None)  # laid out by now; once is enough
        figure.savefig(paths[1], metadata={"Date": None})
    return paths


def _figure_names(name: str, result: Result) -> dict[str, View]:
    """The views of a result that show something, by the names of their files, without suffix."""
    out: dict[str, View] = {}
    for view in result.views:
        if rows(result, view).empty:
            continue
        title = slug(view.title or view.value)
        out[_free(title if title.startswith(name) else f"{name}-{title}", out)] = view
    return out


def slug(text: str) -> str:
    """Lower case letters, digits and dashes: a safe file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:80] or "unnamed"


def check_target(path: str | Path, marker: str) -> Path:
    """The real path of a folder that can be written: new, empty, or an earlier one of ours.

    A folder is ours when its `marker` file lists all files in it, so nothing of anybody else is ever deleted.

    Raises:
        OutputError: it is something else.
    """
    target = Path(path).expanduser()
    with explained(path):
        target = target.resolve()
        above = next(p for p in target.parents if p.exists())
        if not above.is_dir():
            raise OutputError(f"cannot write {path}: {above} is a file; choose another folder")
        if not os.access(above, os.W_OK | os.X_OK):
            raise OutputError(f"cannot write {path}: {above} may not be written; choose a folder that you may write to")
        if not target.exists():
            return target
        if not target.is_dir():
            raise OutputError(f"{path} is a file; choose a folder")
        there = {
            p.relative_to(target).as_posix() for p in target.rglob("*") if not p.is_dir() and p.name not in _LITTER
        }
        if not there:
            return target
        try:
            listed = json.loads((target / marker).read_text(encoding="utf-8"))
            ours = set(listed["files"]) if str(listed["format"]).startswith("mechinterp-") else set[str]()
        except (OSError, ValueError, KeyError, TypeError):
            ours = set[str]()
        if foreign := sorted(there - ours):
            raise OutputError(
                f"{path} holds {foreign[0]}, which mechinterp did not write; move it away or choose another folder"
            )
    return target


@contextlib.contextmanager
def whole_folder(path: str | Path, marker: str) -> Generator[Path, None, None]:
    """An empty folder to fill, beside `path`, that takes its place when the block ends well.

    On any exception, Ctrl-C among them, it is removed and `path` stays as it was.

    Raises:
        OutputError: `path` holds something that is not ours, or cannot be written.
    """
    target = check_target(path, marker)
    scratch = target.parent / f".{target.name}-{secrets.token_hex(4)}"
    earlier = target.parent / f"{scratch.name}-earlier"
    with explained(path):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            scratch.mkdir()
            yield scratch
            if target.exists():
                os.replace(target, earlier)
            os.replace(scratch, target)
        finally:
            if earlier.exists() and not target.exists():
                os.replace(earlier, target)
            shutil.rmtree(scratch, ignore_errors=True)
            shutil.rmtree(earlier, ignore_errors=True)


def check_file(path: str | Path) -> Path:
    """The real path of a file that can be written; one that is there already will be replaced.

    Raises:
        OutputError: it is a folder, or the folder above is not there or may not be written.
    """
    with explained(path):
        target = Path(path).expanduser().resolve()
        if target.is_dir():
            raise OutputError(f"{path} is a folder; name a file in it")
        if not target.parent.is_dir():
            raise OutputError(f"cannot write {path}: there is no folder {target.parent}; make it, or name another file")
        if not os.access(target.parent, os.W_OK | os.X_OK):
            raise OutputError(f"cannot write {path}: {target.parent} may not be written; name another file")
    return target


def write_file(path: str | Path, text: str) -> None:
    """Write a text file, whole or not at all; an earlier one is replaced.

    Raises:
        OutputError: it cannot be written.
    """
    target = check_file(path)
    scratch = target.with_name(f".{target.name}-{secrets.token_hex(4)}")
    with explained(path):
        try:
            scratch.write_text(text, encoding="utf-8")
            os.replace(scratch, target)
        finally:
            scratch.unlink(missing_ok=True)


@contextlib.contextmanager
def explained(path: str | Path) -> Generator[None, None, None]:
    """Turn an operating system's error into one sentence with the fix."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        fixes = {
            **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space, or choose a folder on another disk"),
            **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "choose a folder that you may write to"),
            **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "a file is in the way: choose another folder"),
            errno.ENAMETOOLONG: "choose a shorter name",
        }
        fix = fixes.get(error.errno or 0, "choose another folder")
        raise OutputError(f"cannot write {path}: {error.strerror or error}; {fix}") from error


def _free(name: str, taken: Mapping[str, Any]) -> str:
    numbered = (name if i == 1 else f"{name}-{i}" for i in range(1, len(taken) + 2))
    return next(n for n in numbered if n not in taken)


def _plain_columns(frame: Any) -> pd.DataFrame:
    """Columns that mix names and numbers (positions such as "end" and 3) as text, which parquet needs."""
    mixed = [c for c in frame.columns if frame[c].dtype == object and frame[c].map(type).nunique() > 1]
    return frame.astype(dict.fromkeys(mixed, str)) if mixed else frame
