"""What was predicted for labelled texts: read from a file, or made by the model itself."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mechinterp import sites
from mechinterp.core.analyzer import Analyzer, Batch, Context, Needs, Wanted
from mechinterp.core.analyzer import Model as Declared
from mechinterp.core.display import count
from mechinterp.core.examples import Chat, Examples, Text
from mechinterp.core.result import Part, Result
from mechinterp.engine.forward import Generation
from mechinterp.engine.runner import run
from mechinterp.errors import ExamplesError
from mechinterp.model.model import Model
from mechinterp.studies.configuration import Fields

LINES = 5
"""Line numbers that are named for each thing that is wrong."""


@dataclass(frozen=True)
class Sample:
    """One text of a file.

    Attributes:
        line: of the file, from 1.
        label: what is right, spelled as in the list of labels.
        prediction: what was predicted, spelled so too; None where the file has none.
        more: all other fields.
    """

    line: int
    text: str
    label: str | None = None
    prediction: str | None = None
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Samples:
    """The samples of a file that can be used, in its order.

    Attributes:
        rows: the samples.
        labels: every label that there is.
        skipped: why others cannot be used → their lines.
    """

    rows: tuple[Sample, ...]
    labels: tuple[str, ...]
    skipped: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def without(self, bad: Mapping[str, Sequence[int]], path: str, refuse: bool) -> "Samples":
        """All but some, by reason and line.

        Raises:
            ExamplesError: there are some and they are refused, or nothing is left.
        """
        gone = {line for lines in bad.values() for line in lines}
        rows = tuple(sample for sample in self.rows if sample.line not in gone)
        said = "; ".join(f"{why} ({_lines(lines)})" for why, lines in bad.items())
        if gone and refuse:
            raise ExamplesError(
                f"{path} has {count(len(gone), 'sample')} of {len(self.rows)} that cannot be used: {said}; correct"
                " them, or set analysis.bad_rows: skip, which counts them"
            )
        if not rows:
            raise ExamplesError(f"{path} has no sample that can be used: {said or 'it is empty'}; correct it")
        skipped = {**self.skipped}
        for why, lines in bad.items():
            skipped[why] = tuple(sorted({*skipped.get(why, ()), *lines}))
        return Samples(rows, self.labels, skipped)


def read_samples(
    path: str | Path,
    fields: Fields | None = None,
    labels: Sequence[str] | None = None,
    needed: Sequence[str] = ("label", "prediction"),
    refuse: bool = True,
    limit: int | None = None,
) -> Samples:
    """Labelled texts from a .jsonl file (one object a line) or a .json file (a list of objects).

    Labels and predictions are compared without regard to case and surrounding space.

    Args:
        fields: what the fields are called.
        labels: every label that there is; by default those of the file.
        needed: what every sample must have beside its text: ``label``, ``prediction``, or any other field.
        refuse: samples that cannot be used are an error; otherwise they are left out and counted.
        limit: at most so many, from the first.
    Raises:
        ExamplesError: the file cannot be read, is not JSON, is empty, or holds samples that cannot be used.
    """
    names = fields or Fields()
    rows = list(_objects(Path(path)))[:limit]
    found = [row.get(names.label) for _, row in rows]
    spelled = {_plain(label): label for label in (map(str, labels or (x for x in found if _given(x))))}
    bad: dict[str, list[int]] = {}
    samples: list[Sample] = []
    for line, row in rows:
        why = _wrong(row, names, spelled, needed)
        for reason in why:
            bad.setdefault(reason, []).append(line)
        text, label, prediction = (row.get(name) for name in (names.text, names.label, names.prediction))
        right, said = (spelled.get(_plain(str(x))) if _given(x) else None for x in (label, prediction))
        more = {k: v for k, v in row.items() if k not in (names.text, names.label, names.prediction)}
        samples.append(Sample(line, str(text), right, said, more))
    everything = Samples(tuple(samples), tuple(dict.fromkeys(spelled.values())))
    return everything.without(bad, str(path), refuse)


def _wrong(row: Mapping[str, Any], names: Fields, spelled: Mapping[str, str], needed: Sequence[str]) -> list[str]:
    """What is wrong with one sample, if anything: one reason."""
    text = row.get(names.text)
    if text is None:
        return [f"no field {names.text!r}"]
    if not isinstance(text, str) or not text.strip():
        return [f"field {names.text!r} is no text"]
    for what in needed:
        name = {"label": names.label, "prediction": names.prediction}.get(what, what)
        value = row.get(name)
        if not _given(value):
            return [f"no field {name!r}"]
        if what in ("label", "prediction") and _plain(str(value)) not in spelled:
            return [f"unknown {what} {str(value)[:40]!r}"]
    return []


def _given(value: Any) -> bool:
    return value is not None and str(value).strip() != ""


def _plain(label: str) -> str:
    return label.strip().casefold()


def _lines(lines: Sequence[int]) -> str:
    more = f" and {len(lines) - LINES} more" if len(lines) > LINES else ""
    return f"line{'s' * (len(lines) > 1)} {', '.join(map(str, lines[:LINES]))}{more}"


def _objects(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(line, object) for every object of a file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise ExamplesError(f"cannot read {path}: {reason}; give a .json or .jsonl file") from None
    if not text.strip():
        raise ExamplesError(f"{path} is empty; give one JSON object a line")
    whole = path.suffix == ".json" and text.lstrip().startswith("[")
    decoder, at = json.JSONDecoder(), len(text) - len(text.lstrip())
    at += whole
    while True:
        at = re.compile(r"[\s,]*" if whole else r"\s*").match(text, at).end()  # pyright: ignore[reportOptionalMemberAccess] -- matches nothing, too
        if at >= len(text) or (whole and text[at] == "]"):
            return
        line = text.count("\n", 0, at) + 1
        try:
            row, at = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise ExamplesError(f"{path}:{error.lineno} is not JSON ({error.msg}); write one object a line") from None
        if not isinstance(row, dict):
            raise ExamplesError(f'{path}:{line} is not an object; write {{"text": ..., "label": ...}}')
        yield line, row


def prompt_of(text: str, template: str, chat: bool = False, system: str | None = None) -> tuple[Text, int]:
    """A text in the template, whose ``{text}`` it replaces, and how many characters stand before it.

    In a chat it is the user's message; the characters are those of all contents, joined by line breaks.
    """
    before, after = template.split("{text}")
    whole = before + text + after
    if not chat:
        return whole, len(before)
    first = () if system is None else (("system", system),)
    return Chat((*first, ("user", whole))), len(before) + sum(len(content) + 1 for _, content in first)


@dataclass(frozen=True)
class Choices:
    """How likely each label is as the continuation of each prompt.

    Attributes:
        labels: the labels.
        log_probs: log of each label's whole probability (of all its tokens), ``prompt label``.
        passes: forward passes that were made.
    """

    labels: tuple[str, ...]
    log_probs: npt.NDArray[np.floating]
    passes: int

    @property
    def predictions(self) -> tuple[str, ...]:
        """The likeliest label of each prompt."""
        return tuple(self.labels[i] for i in self.log_probs.argmax(1))


def choose(
    model: Model,
    prompts: Sequence[Text],
    labels: Sequence[str],
    continuation: str = " {label}",
    *,
    batch_size: int | None = None,
) -> Choices:
    """Score every label by its whole probability as the continuation of every prompt.

    The probability of a label is the product of those of all its tokens. A prompt is run once if every label is
    one token, and otherwise once for each label that does not share its first tokens with another.

    Raises:
        ExamplesError: two labels of the same tokens, one that begins another, or a prompt that is too long.
    """
    tokens = model.tokenize(Examples.of(list(prompts)))
    texts, spans, wanted = [], [], []
    for i, (text, ids) in enumerate(zip(prompts, tokens.ids, strict=True)):
        answers = [answer_ids(model.tokenizer, text, ids, continuation.replace("{label}", label)) for label in labels]
        _check(labels, answers)
        for prefix in dict.fromkeys(answer[:-1] for answer in answers):
            if any(len(prefix) < len(a) - 1 and a[: len(prefix)] == prefix for a in answers):
                continue  # a longer row has it, too
            texts.append((*ids, *prefix))
            spans.append((len(ids) - 1, len(ids) + len(prefix)))
            mine = ((n, a) for n, a in enumerate(answers) if a[:-1] == prefix[: len(a) - 1])
            wanted.append((i, tuple(mine)))
    analyzer = _LabelScores(tuple(wanted), len(labels))
    result = run(model, Examples.of(texts, spans={"answer": spans}), analyzer, batch_size=batch_size)
    scores = np.full((len(prompts), len(labels)), -np.inf)
    for (prompt, _), row in zip(wanted, result.data["log_prob"].transpose("example", "label").values, strict=True):
        scores[prompt] = np.where(np.isnan(row), scores[prompt], row)
    return Choices(tuple(labels), scores, int(result.meta["passes"]["forward"]))


@dataclass(frozen=True)
class _LabelScores(Analyzer):
    """Log-probability of labels from the span ``answer`` on; NaN for those of another row."""

    wanted: tuple[tuple[int, tuple[tuple[int, tuple[int, ...]], ...]], ...]
    """For each row its prompt, and the labels (number, tokens) that it can score."""
    n: int

    def needs(self, model: Declared) -> Needs:
        return Needs(reads=sites.logits(positions="answer"))

    def observe(self, batch: Batch) -> Part:
        logs = batch.clean[sites.logits(positions="answer")].float().log_softmax(-1)
        out = torch.full((len(batch.examples), self.n), float("nan"))
        for i, row in enumerate(batch.examples.rows):
            for label, ids in self.wanted[row][1]:
                out[i, label] = float(logs[i, range(len(ids)), ids].sum())
        return Part({"log_prob": (out, "example label")})

    def combine(self, parts: Iterator[Part], context: Context) -> Result:
        return Result.of(parts, unit="log probability")


def answer_ids(tokenizer: Any, text: Text, ids: tuple[int, ...], answer: str) -> tuple[int, ...]:
    """Tokens of an answer as it continues a prompt, where the tokenizer keeps the prompt's own tokens."""
    if isinstance(text, str):
        longer = tuple(tokenizer(text + answer, verbose=False)["input_ids"])
        if len(longer) > len(ids) and longer[: len(ids)] == ids:
            return longer[len(ids) :]
    return tuple(tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"])


def _check(labels: Sequence[str], answers: Sequence[tuple[int, ...]]) -> None:
    for a, mine in zip(labels, answers, strict=True):
        for b, other in zip(labels, answers, strict=True):
            if a != b and other[: len(mine)] == mine:
                raise ExamplesError(
                    f"the tokens of the label {a!r} begin those of {b!r}, so it would always be the likelier one; use"
                    " other labels, or another answer (generation.answer), such as ' {label}.'"
                )


@dataclass(frozen=True)
class Written:
    """What the model wrote after one prompt, and the label found in it (None: none)."""

    generation: Generation
    label: str | None


def write(
    model: Model,
    prompt: Text | Examples,
    labels: Sequence[str],
    *,
    temperature: float = 0.0,
    max_new_tokens: int = 8,
    seed: int = 0,
    reads: Wanted = (),
) -> Written:
    """Let the model write after a prompt, and find a label in it. Sampling is seeded, whatever ran before."""
    examples = prompt if isinstance(prompt, Examples) else Examples.of([prompt])
    options: dict[str, Any] = {}
    if temperature:  # of the whole distribution: a checkpoint's own settings may cut it off
        options = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    devices = [model.device.index or 0] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        made = model.generate(examples, max_new_tokens=max_new_tokens, reads=reads, **options)
    return Written(made, find_label(made.text or "", labels))


def find_label(text: str, labels: Sequence[str]) -> str | None:
    """The label that comes first in a text as a word of its own, in any case; the longest of several there."""
    found = [
        (match.start(), -len(label), label)
        for label in labels
        if (match := re.search(rf"(?<!\w){re.escape(label.strip())}(?!\w)", text, re.IGNORECASE))
    ]
    return min(found)[2] if found else None


def confusion(samples: Sequence[Sample]) -> Mapping[str, Mapping[str, int]]:
    """Label → prediction → how many; ``none`` where no label was found."""
    counts = Counter((str(s.label), "none" if s.prediction is None else s.prediction) for s in samples)
    out: dict[str, dict[str, int]] = {}
    for (label, prediction), n in sorted(counts.items()):
        out.setdefault(label, {})[prediction] = n
    return out
