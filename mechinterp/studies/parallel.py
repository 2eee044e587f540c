"""Parallel texts: sentences and their translations, from a file with one column for each language."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mechinterp.core.display import count
from mechinterp.core.examples import Examples
from mechinterp.errors import ExamplesError
from mechinterp.studies.labelled import file_rows

NOT_LANGUAGES = ("id",)
"""Columns that are no language, where none are named."""


@dataclass(frozen=True)
class Parallel:
    """Sentences in several languages.

        parallel = mi.studies.read_parallel("sentences.tsv")
        found = mi.run(model, parallel.examples, mi.CrossLingual(parallel.rows))

    Attributes:
        languages: in the order of the columns.
        sentences: for each row its text in each language, None where there is no translation.
        left_out: what was not taken, and what is missing, a phrase each.
    """

    languages: tuple[str, ...]
    sentences: tuple[tuple[str | None, ...], ...]
    left_out: tuple[str, ...] = ()

    @property
    def examples(self) -> Examples:
        """All texts, row by row, with their languages as labels."""
        texts = [text for row in self.sentences for text in row if text is not None]
        labels = [name for row in self.sentences for name, text in zip(self.languages, row, strict=True) if text]
        return Examples.of(texts, labels=labels)

    @property
    def rows(self) -> tuple[int, ...]:
        """The number of the sentence that each text of `examples` is."""
        return tuple(i for i, row in enumerate(self.sentences) for text in row if text is not None)

    def __len__(self) -> int:
        return len(self.sentences)

    def first(self, n: int) -> "Parallel":
        """The first n sentences."""
        return Parallel(self.languages, self.sentences[:n], self.left_out)


def read_parallel(source: str | Path, languages: Sequence[str] | None = None) -> Parallel:
    """Parallel sentences of a TSV, CSV, JSON or JSONL file whose rows have one column for each language.

    A translation that is missing (empty or null) is left out of the pairs that it would be in, and counted; so are
    sentences in one language only, and those of which a text already stood in a row before: of two equal texts neither
    has one translation. All that is in ``left_out``.

    Args:
        languages: the columns; by default all but ``id``.
    Raises:
        ExamplesError: it cannot be read, has fewer than two languages or lacks one, a cell is no text or spans several
            lines (in a TSV file: a quotation mark that is not closed), a row has more cells than the header; or nothing
            is left.
    """
    path = Path(source).expanduser()
    rows = file_rows(path)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    names = [c for c in columns if c is not None and c not in NOT_LANGUAGES] if languages is None else list(languages)
    if gone := [name for name in names if name not in columns]:
        raise ExamplesError(f"{source} has no column {gone[0]!r}; its columns are {', '.join(map(str, columns))}")
    if len(set(names)) < 2:
        raise ExamplesError(
            f"{source} has {count(len(set(names)), 'language')}: {', '.join(names)}; give one column for each of two or"
            " more (with a header line, separated by tabs in a .tsv file)"
        )
    taken: list[tuple[str | None, ...]] = []
    seen: set[tuple[str, str]] = set()
    missing, alone, doubled = dict.fromkeys(names, 0), 0, 0
    for number, row in enumerate(rows, 1):
        if None in row:
            raise ExamplesError(f"row {number} of {source} has more cells than the header; correct it")
        cells = tuple(_cell(row.get(name), name, number, path) for name in names)
        there = [(name, text) for name, text in zip(names, cells, strict=True) if text is not None]
        if len(there) < 2:
            alone += 1
        elif any(one in seen for one in there):
            doubled += 1
        else:
            taken.append(cells)
            for name, text in zip(names, cells, strict=True):
                missing[name] += text is None
        seen.update(there)
    if not taken:
        raise ExamplesError(f"no row of {source} has a sentence in two of the languages {', '.join(names)}")
    told = [
        f"{count(n, 'sentence')} {what}" for n, what in ((alone, "in one language only"), (doubled, "doubled")) if n
    ]
    told += [f"{count(n, 'sentence')} without {name}" for name, n in missing.items() if n]
    return Parallel(tuple(dict.fromkeys(names)), tuple(taken), tuple(told))


def _cell(value: object, name: str, number: int, path: Path) -> str | None:
    """A text, or None."""
    if value is None:
        return None
    if not isinstance(value, str):
        raise ExamplesError(
            f"{name!r} of row {number} of {path} is {value!r}, which is no text; correct it, or name the columns that"
            " are languages"
        )
    text = value.strip()
    if path.suffix == ".tsv" and "\n" in text:
        raise ExamplesError(
            f"{name!r} of row {number} of {path} spans several lines; a quotation mark at its start is not closed:"
            " double it, or write the file as JSONL"
        )
    return text or None
