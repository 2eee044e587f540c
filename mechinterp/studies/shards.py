"""Shards of an attention study: a few samples that are run and kept together, whoever runs them and when."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from mechinterp import sites
from mechinterp.analyzers.categories import AttentionByCategory, expected_shares, pattern_entropy
from mechinterp.core.examples import Examples, Text
from mechinterp.core.result import Result
from mechinterp.core.tokens import Span, TokenBatch
from mechinterp.core.trace import Read, Reduce
from mechinterp.engine.runner import run
from mechinterp.errors import OutputError
from mechinterp.model.model import Model
from mechinterp.report.files import write_file
from mechinterp.shapes import PatternBlock
from mechinterp.studies.configuration import StudyConfig
from mechinterp.studies.predictions import Samples, choose, write

KEY = "key.json"
PREDICTION, GENERATED = "prediction", "generated"
"""Categories that are no words of the vocabulary: the predicted word in the prompt, and what the model wrote."""


@dataclass(frozen=True)
class Shards:
    """A folder of finished shards, each a saved `Result` with the numbers of its samples.

    Which samples share a shard depends on the study alone, and so the numbers do not depend on how many ranks
    there are or how often the work was interrupted.
    """

    folder: Path
    n: int
    size: int

    def open(self, key: Mapping[str, Any]) -> None:
        """Make the folder, or check that it belongs to this study.

        Raises:
            OutputError: it holds shards of another study, or cannot be written.
        """
        file = self.folder / KEY
        if file.exists():
            try:
                found = json.loads(file.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                found = {}
            if odd := [name for name in key if found.get(name) != key[name]]:
                raise OutputError(
                    f"{self.folder} has samples of another study, which differs in {', '.join(odd)}; delete it, or"
                    " choose another visualisation.out"
                )
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"cannot write {self.folder}: {error.strerror}; choose another visualisation.out"
            ) from None
        write_file(file, json.dumps(key, indent=1) + "\n")

    @property
    def numbers(self) -> range:
        """All shards."""
        return range(-(-self.n // self.size))

    def rows(self, shard: int) -> range:
        """The samples of a shard."""
        return range(shard * self.size, min(self.n, (shard + 1) * self.size))

    def path(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}"

    @property
    def missing(self) -> list[int]:
        """Shards that nobody has finished yet."""
        return [shard for shard in self.numbers if not self.path(shard).is_dir()]

    def join(self) -> xr.Dataset:
        """The numbers of all samples, in their order.

        Raises:
            OutputError: a shard is missing or damaged.
        """
        parts: list[xr.Dataset] = []
        for shard in self.numbers:
            try:
                parts.append(Result.load(self.path(shard)).data)
            except OutputError as error:
                raise OutputError(f"{error}; delete {self.path(shard)} and run again") from None
        return xr.concat(parts, "example", data_vars="all", coords="minimal", compat="equals", join="exact")


def study_key(config: StudyConfig, model: Model, samples: Samples, examples: Examples) -> dict[str, Any]:
    """Whatever the numbers of a sample depend on, by name, as plain values."""
    texts = repr([(s.text, s.label, s.prediction) for s in samples.rows])
    categories = repr(sorted(examples.categories.items()))
    analysis = config.analysis
    measured = {name: getattr(analysis, name) for name in ("queries", "prediction_category", "shard_size")}
    return {
        "format": "mechinterp-shards-1",
        "the model": model.fingerprint,
        "the dtype": str(model.dtype),
        "the samples": hashlib.sha256(texts.encode()).hexdigest()[:16],
        "the prompts": hashlib.sha256(repr(examples.texts).encode()).hexdigest()[:16],
        "the vocabulary": hashlib.sha256(categories.encode()).hexdigest()[:16],
        "the generation section": json.loads(config.generation.model_dump_json()),
        "the analysis section": measured,
    }


def run_shard(model: Model, config: StudyConfig, samples: Samples, examples: Examples, rows: Sequence[int]) -> Result:
    """Predictions of some samples, and the attention of their prompts by category.

    Result: that of ``AttentionByCategory(statistics=False)``, with ``prediction`` (``example``; "" for none), and
    of constrained ones ``log_prob`` (``example choice``), of generated ones ``text`` (``example``). With the
    predicted word as a category, its name is `PREDICTION`; what the model wrote itself is `GENERATED`.
    """
    some = take(examples, rows)
    if config.generation.mode == "generated":
        data = _generated(model, config, some, rows)
        return Result(data.assign_coords(example=list(rows)))
    labels = config.generation.labels or samples.labels
    more: dict[str, Any] = {}
    if config.generation.mode == "constrained":
        choices = choose(model, some.texts, labels, config.generation.continuation)
        predictions: Sequence[str] = choices.predictions
        more["log_prob"] = (("example", "choice"), choices.log_probs)
    else:
        predictions = [samples.rows[i].prediction or "" for i in rows]
    categories = dict(some.categories)
    if config.analysis.prediction_category:
        found = zip(some.texts, predictions, strict=True)
        categories[PREDICTION] = tuple(occurrences(text, word) for text, word in found)
    analyzer = AttentionByCategory(config.analysis.queries, statistics=False)
    numbers = run(model, replace(some, categories=categories), analyzer, seed=config.analysis.seed)
    data = numbers.data.assign(prediction=("example", _strings(predictions)), **more)
    if "log_prob" in more:
        data = data.assign_coords(choice=list(labels))
    return Result(data.assign_coords(example=list(rows)), numbers.meta)


def take(examples: Examples, rows: Sequence[int]) -> Examples:
    """Some of the examples, with their categories."""
    chosen = {name: tuple(column[i] for i in rows) for name, column in examples.categories.items()}
    return Examples(tuple(examples.texts[i] for i in rows), categories=chosen)


def occurrences(text: Text, word: str) -> tuple[Span, ...]:
    """Where a word stands in a prompt as a word of its own, in any case; in a chat, in its contents."""
    if isinstance(text, tuple) or not word:
        return ()
    whole = text if isinstance(text, str) else "\n".join(content for _, content in text.messages)
    pattern = rf"(?<!\w){re.escape(word.strip())}(?!\w)"
    return tuple(match.span() for match in re.finditer(pattern, whole, re.IGNORECASE))


def _generated(model: Model, config: StudyConfig, some: Examples, rows: Sequence[int]) -> xr.Dataset:
    """Let the model write after each prompt, with attention taken at every step."""
    labels = config.generation.labels or ()
    parts = [_one(model, config, take(some, [i]), labels, row) for i, row in enumerate(rows)]
    return xr.concat(parts, "example", data_vars="all", coords="minimal", compat="equals", join="exact")


def _one(model: Model, config: StudyConfig, example: Examples, labels: Sequence[str], row: int) -> xr.Dataset:
    """One prompt. Nobody knows yet which label will be written, so attention to each in the prompt is taken."""
    text, options = example.texts[0], config.generation
    names = {label: f"label {label}" for label in labels} if config.analysis.prediction_category else {}
    spans = {name: (occurrences(text, label),) for label, name in names.items()}
    whole = replace(example, categories={**example.categories, **spans})
    known = model.tokenize(whole)
    length = len(known.ids[0])
    made = write(
        model,
        whole,
        labels,
        temperature=options.temperature,
        max_new_tokens=options.max_new_tokens,
        seed=options.seed * 1_000_003 + row,
        reads=Read(sites.pattern(), reduce=Reduce(NewestMass(length), "example head column")),
    )
    steps = len(made.generation.tokens)
    # layer head column: the categories, what was written, the first token, and the entropy
    masses = made.generation.trace.stack("pattern")[:, 0].float().cpu() / steps
    written = ((length, length + steps - 1),) if steps > 1 else ()
    categories = {**known.categories, GENERATED: (written,)}
    batch = replace(made.generation.trace.batch, categories=categories)
    chosen = torch.arange(batch.ids.shape[1], device=batch.ids.device)[None] >= length - 1
    first = torch.arange(batch.ids.shape[1], device=batch.ids.device) == 0
    expected = expected_shares(batch.members & ~first, chosen, batch, model.dims.windows)[:, 0].cpu()
    nobody = expected == 0
    share = masses[..., : len(categories)].masked_fill(nobody[:, None], float("nan"))
    values: dict[str, Any] = {
        "share": (("layer", "example", "head", "category"), share[:, None].numpy()),
        "expected": (("layer", "example", "category"), expected.masked_fill(nobody, float("nan"))[:, None].numpy()),
        "sink": (("layer", "example", "head"), masses[:, None, :, -2].numpy()),
        "entropy": (("layer", "example", "head"), masses[:, None, :, -1].numpy()),
        "queries": ("example", np.array([steps])),
        "matches": (("example", "category"), np.array([[len(column[0]) for column in categories.values()]])),
        "prediction": ("example", _strings([made.label or ""])),
        "text": ("example", _strings([made.generation.text or ""])),
    }
    predicted = names.get(made.label or "")
    category = [PREDICTION if name == predicted else name for name in categories]
    data = xr.Dataset(values, {"layer": range(share.shape[0]), "head": range(share.shape[1]), "category": category})
    kept = [*example.categories, GENERATED, *([PREDICTION] if names else [])]
    return data.reindex(category=kept, fill_value={"share": np.nan, "expected": np.nan, "matches": 0})


@dataclass(frozen=True)
class NewestMass:
    """While generating, attention from the newest token to categories, to what was written, and to the first token.

    Returns ``example head column``, with the entropy as one last column; added up over steps.

    Attributes:
        prompt: tokens of the prompt.
    """

    prompt: int

    def __call__(self, block: PatternBlock, queries: slice, batch: TokenBatch) -> Tensor:
        key = torch.arange(block.shape[-1], device=block.device)
        members = batch.members.to(block.device) & (key > 0)
        columns = torch.cat([members[0], (key >= self.prompt)[None], (key == 0)[None]])
        out = torch.zeros(1, block.shape[1], len(columns) + 1, device=block.device)
        if queries.stop == batch.ids.shape[1]:
            newest = block[:, :, -1].float()
            out[..., :-1] = newest @ columns.T.float()
            out[..., -1] = pattern_entropy(newest)
        return out


def _strings(values: Sequence[str]) -> Any:
    return np.array(list(values), dtype=object)
