"""Dialogues: who attends to whose turns."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from mechinterp import sites
from mechinterp.core.analyzer import Analyzer, Batch, Context, Model, Needs
from mechinterp.core.examples import encode
from mechinterp.core.result import Part, Result, View
from mechinterp.core.statistics import fdr, summarize
from mechinterp.core.tokens import TokenBatch
from mechinterp.core.trace import Read, Reduce
from mechinterp.errors import ExamplesError

FORMATS = (".jsonl", ".json", ".txt")
MOST_TURNS = 400
MOST_SPEAKERS = 8
FIRST = "(first token)"
_LINE = re.compile(r"\s*([^\s:][^:]{0,39}?)\s*:(?:\s+|$)(.*)", re.DOTALL)


@dataclass(frozen=True)
class Dialogue:
    """Turns of speech, each with its speaker.

    Raises:
        ExamplesError: fewer than two speakers, too many turns, or a turn that is empty.
    """

    turns: tuple[tuple[str, str], ...]
    """(speaker, what was said), in order."""

    def __post_init__(self) -> None:
        for i, (speaker, text) in enumerate(self.turns):
            if not speaker.strip() or not text.strip():
                raise ExamplesError(
                    f"turn {i} has no {'speaker' if not speaker.strip() else 'text'}; give every turn both"
                )
        if not 2 <= len(self.speakers) <= MOST_SPEAKERS:
            raise ExamplesError(
                f"a dialogue must have 2 to {MOST_SPEAKERS} speakers. Got {len(self.speakers)}; name the speaker of"
                " each turn, such as 'Anna: words'"
            )
        if FIRST in self.speakers:
            raise ExamplesError(f"the name {FIRST!r} is taken; give that speaker another")
        if len(self.turns) > MOST_TURNS:
            raise ExamplesError(f"the dialogue has {len(self.turns)} turns, more than {MOST_TURNS}; give a part of it")

    @property
    def speakers(self) -> tuple[str, ...]:
        """In the order in which they first speak."""
        return tuple(dict.fromkeys(speaker for speaker, _ in self.turns))

    @property
    def text(self) -> str:
        """``Speaker: words``, a line for each turn."""
        return "\n".join(f"{speaker}: {said}" for speaker, said in self.turns)

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """The characters of each turn in `text`, its speaker's name and the end of its line included."""
        ends = np.cumsum([len(f"{speaker}: {said}") + 1 for speaker, said in self.turns])
        return tuple((int(a), int(b)) for a, b in zip([0, *ends[:-1]], ends, strict=True))

    @classmethod
    def load(cls, path: str | Path) -> "Dialogue":
        """Read a dialogue.

        ``.jsonl``: an object with ``speaker`` and ``text`` a line; ``.json``: a list of such, or an object with
        the list under ``turns``; ``.txt``: ``Speaker: words`` a line, where a line without a speaker goes on with
        the turn before.

        Raises:
            ExamplesError: the file cannot be read, is of another format, or holds no dialogue.
        """
        file = Path(path)
        if file.suffix not in FORMATS:
            raise ExamplesError(f"{path} is none of {', '.join(FORMATS)}; give the dialogue in one of these formats")
        try:
            content = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise ExamplesError(f"cannot read {path}: {reason}; give a file with a dialogue") from None
        try:
            return cls(tuple(_lines(content) if file.suffix == ".txt" else _objects(content, file.suffix)))
        except ExamplesError as error:
            raise ExamplesError(f"{path}: {error}") from None


@dataclass(frozen=True)
class AttentionBetweenSpeakers(Analyzer):
    """Who attends to whose turns, by layer and head.

    The text must be that of the dialogue. A token belongs to the turn in which its last character is; the
    text's first token, often a sink, is a column of its own. A turn's attention is the mean over its
    tokens, summed over the tokens of each other turn, and reduced to turns inside the pass.

    Result: ``share`` (``layer head speaker other``), the attention that the tokens of `speaker`'s turns pay
    to the turns of `other` (their own turn and earlier ones of their own among those of the speaker), mean
    over turns past the first, as the first has nobody to listen to; with the first token it adds up to 1.
    ``expected``, the same if what the first token leaves were spread evenly over all tokens that are
    seen; ``ci_low, ci_high`` of the share, and p (sign flips of share - expected) and q, all over turns: NaN
    under six. ``by_turn`` (``turn other_turn``), mean over all layers and heads. ``text`` (``turn``).
    """

    dialogue: Dialogue

    def needs(self, model: Model) -> Needs:
        turns = self.turns(model)
        return Needs(reads=Read(sites.pattern(), reduce=Reduce(TurnMass(turns), "example head turn other_turn")))

    def turns(self, model: Model) -> tuple[int, ...]:
        """Which turn each token belongs to.

        Raises:
            ExamplesError: a turn without tokens, or a tokenizer that does not say which characters a token covers.
        """
        _, offsets = encode(self.dialogue.text, model.tokenizer, "the dialogue", model.dims.context)
        if offsets is None:
            raise ExamplesError("turns are found by characters, which needs a fast tokenizer; load the model with one")
        last = np.maximum.accumulate([max(stop - 1, 0) for _, stop in offsets])
        turns = np.searchsorted([stop for _, stop in self.dialogue.spans], last, side="right")
        if len(gone := set(range(len(self.dialogue.turns))) - set(turns.tolist())):
            raise ExamplesError(f"turn {min(gone)} of the dialogue has no token of its own; make it longer")
        return tuple(turns.tolist())

    def observe(self, batch: Batch) -> Part:
        return Part(batch.clean.stack("pattern"), "layer example head turn other_turn", coords=self._coords())

    def _coords(self) -> dict[str, Sequence[Any]]:
        n = len(self.dialogue.turns)
        return {"turn": range(n), "other_turn": [FIRST, *map(str, range(n))]}

    def combine(self, parts: Any, context: Context) -> Result:
        mass = Result.of(parts).data["value"].transpose("turn", "layer", "head", "other_turn", ...).values[..., 0]
        turns = np.array(self.turns(context.model))
        sizes = np.bincount(turns)
        mass = mass / sizes[:, None, None, None]
        speakers = self.dialogue.speakers
        owner = np.array([speakers.index(speaker) for speaker, _ in self.dialogue.turns])
        belongs = np.zeros((mass.shape[-1], len(speakers) + 1))
        belongs[0, -1] = 1
        belongs[np.arange(len(owner)) + 1, owner] = 1
        share = mass @ belongs  # turn layer head other
        even = (1 - share[..., -1:]) * (_seen(turns) @ belongs[1:, :-1])[:, None, None]
        layers, heads = share.shape[1:3]
        names = ("share", "expected", "ci_low", "ci_high", "p")
        arrays = {name: np.full((layers, heads, len(speakers), len(speakers) + 1), np.nan) for name in names}
        for i in range(len(speakers)):
            mine = np.flatnonzero((owner == i) & (np.arange(len(owner)) > 0))
            if not len(mine):
                continue
            here, above = (
                summarize(share[mine], context.seed),
                summarize(share[mine][..., :-1] - even[mine], context.seed),
            )
            for name, value in (("share", here.mean), ("ci_low", here.ci_low), ("ci_high", here.ci_high)):
                arrays[name][:, :, i] = value
            arrays["expected"][:, :, i, :-1], arrays["p"][:, :, i, :-1] = even[mine].mean(0), above.p
        return self._result(arrays, mass.mean((1, 2)), context)

    def _result(self, arrays: Mapping[str, Any], by_turn: Any, context: Context) -> Result:
        speakers = self.dialogue.speakers
        dims = ("layer", "head", "speaker", "other")
        layers, heads = arrays["share"].shape[:2]
        coords: dict[str, Any] = {"layer": np.arange(layers), "head": np.arange(heads), "speaker": list(speakers)}
        coords |= {"other": [*speakers, FIRST], **{k: list(v) for k, v in self._coords().items()}}
        whole = {**arrays, "q": fdr(arrays["p"])}
        data = xr.Dataset(
            {name: (dims, value) for name, value in whole.items()}, coords, {"unit": "share of attention"}
        )
        future = np.arange(by_turn.shape[1])[None] > np.arange(by_turn.shape[0])[:, None] + 1
        data["by_turn"] = (("turn", "other_turn"), np.where(future, np.nan, by_turn))
        shown = [f"{i} {speaker}" for i, (speaker, _) in enumerate(self.dialogue.turns)]
        data["turn_name"] = ("turn", np.array(shown, dtype=str))
        data["other_name"] = ("other_turn", np.array([FIRST, *shown], dtype=str))
        data["text"] = ("turn", np.array([said for _, said in self.dialogue.turns], dtype=str))
        return Result(data, {"tokens": len(context.tokens.ids[0])}, self._views())

    def _views(self) -> tuple[View, ...]:
        speakers, unit = self.dialogue.speakers, "share of attention"
        views = [
            View("heatmap", "share", "other", "speaker", unit=unit,
                 title="Who attends to whom"),
            View("heatmap", "by_turn", "other_turn", "turn", unit=unit, x_text="other_name", y_text="turn_name",
                 title="Which turn attends to which"),
        ]  # fmt: skip
        views += [
            View("lines", "share", "layer", by="other", select={"speaker": speaker}, unit=unit,
                 title=f"Whom {speaker} attends to, by layer")
            for speaker in speakers
        ]  # fmt: skip
        views += [
            View("heatmap", "share", "head", "layer", by="other", scale="shared", unit=unit,
                 select={"speaker": speaker, "other": speakers}, title=f"Whom {speaker} attends to, by head")
            for speaker in speakers
        ]  # fmt: skip
        return tuple(views)


@dataclass(frozen=True)
class TurnMass:
    """Attention between turns, summed over queries and keys: ``example head turn other_turn``.

    The first token is the first of the other turns, and belongs to no turn as a key.
    """

    turns: tuple[int, ...]

    def __call__(self, block: Float[Tensor, "example head query key"], queries: slice, batch: TokenBatch) -> Tensor:
        if tuple(batch.lengths.tolist()) != (len(self.turns),) * len(batch):
            raise ExamplesError("the text must be that of the dialogue; run on dialogue.text alone")
        turns = torch.tensor(self.turns, device=block.device)
        column = torch.arange(block.shape[-1], device=block.device) - int(batch.starts[0])
        real = (column >= 0) & (column < len(turns))
        member = turns[column.clamp(0, len(turns) - 1)][:, None] == torch.arange(
            int(turns.max()) + 1, device=block.device
        )
        member = (member & real[:, None]).to(torch.float32)
        key = torch.cat([torch.zeros_like(member[:, :1]), member], 1)
        key[column == 0] = torch.eye(key.shape[1], device=block.device)[0]
        return torch.einsum("bhqk,qt,ku->bhtu", block.float(), member[queries], key)


def _seen(turns: Any) -> Any:
    """Mean over a turn's tokens of the share of each turn among the tokens seen, the first token left out."""
    n = int(turns.max()) + 1
    member = turns[:, None] == np.arange(n)
    counts = np.cumsum(member & (np.arange(len(turns)) > 0)[:, None], 0)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    return (member.T.astype(float) @ shares) / member.sum(0)[:, None]


def _lines(content: str) -> list[tuple[str, str]]:
    turns: list[tuple[str, str]] = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        if found := _LINE.fullmatch(line):
            turns.append((found[1], found[2].strip()))
        elif turns:
            turns[-1] = (turns[-1][0], f"{turns[-1][1]} {line.strip()}".strip())
        else:
            raise ExamplesError(f"line {number} names no speaker; begin turns with 'Speaker: '")
    return turns


def _objects(content: str, suffix: str) -> list[tuple[str, str]]:
    rows: list[Any] = []
    if suffix == ".json":
        try:
            whole = json.loads(content)
        except json.JSONDecodeError as error:
            raise ExamplesError(f"line {error.lineno} is not JSON ({error.msg}); give a list of turns") from None
        rows = whole.get("turns", whole) if isinstance(whole, dict) else whole
        if not isinstance(rows, list):
            raise ExamplesError('it holds no list of turns; write [{"speaker": ..., "text": ...}, ...]')
    else:
        for number, line in enumerate(content.split("\n"), 1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise ExamplesError(f"line {number} is not JSON ({error.msg}); write one object a line") from None
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in ("speaker", "text")):
            raise ExamplesError(f'turn {i} lacks a speaker or text; write {{"speaker": ..., "text": ...}}')
    return [(row["speaker"].strip(), row["text"].strip()) for row in rows]
