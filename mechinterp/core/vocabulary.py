"""Vocabulary: categories of words, found in texts as character spans."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from mechinterp.core.tokens import Span
from mechinterp.errors import ExamplesError

KEYS = ("terms", "regexes", "case_sensitive")


@dataclass(frozen=True)
class Category:
    """What belongs to one category: whole words, terms of several words, and regular expressions.

    A term matches as a whole: no letter, digit or underscore may touch its ends, so ``rise`` is not in
    ``sunrise``; between its words any white space may stand. In scripts without spaces between words
    give regular expressions, which match anywhere.
    """

    terms: tuple[str, ...] = ()
    regexes: tuple[str, ...] = ()
    case_sensitive: bool = False

    @cached_property
    def patterns(self) -> tuple[re.Pattern[str], ...]:
        """The terms as one pattern, the longest first, and each regular expression."""
        flags = re.RegexFlag(0) if self.case_sensitive else re.IGNORECASE
        terms = "|".join(_whole(term) for term in sorted(set(self.terms), key=len, reverse=True))
        return tuple(re.compile(one, flags) for one in ([terms] if terms else []) + list(self.regexes))

    def find(self, text: str) -> tuple[Span, ...]:
        """Half-open character spans of all matches, in order; those that overlap are one."""
        found = sorted(m.span() for pattern in self.patterns for m in pattern.finditer(text) if m.end() > m.start())
        spans: list[Span] = []
        for start, stop in found:
            if spans and start < spans[-1][1]:
                spans[-1] = spans[-1][0], max(stop, spans[-1][1])
            else:
                spans.append((start, stop))
        return tuple(spans)


@dataclass(frozen=True)
class Vocabulary:
    """Named categories of words, to be found in texts by ``Examples.categorize``. Build with `of` or `from_yaml`.

    A word may belong to several categories.
    """

    categories: Mapping[str, Category]

    @classmethod
    def of(cls, categories: Mapping[str, Any]) -> "Vocabulary":
        """Categories by name, each a list of terms, or a mapping of ``terms``, ``regexes`` and ``case_sensitive``.

            mi.Vocabulary.of({"up": ["rise", "record high"], "numbers": {"regexes": [r"[0-9]+%"]}})

        Raises:
            ExamplesError: a category that is empty or has an unknown key, or a regular expression that is none.
        """
        return _vocabulary(categories, lambda _: "")

    @classmethod
    def from_yaml(cls, path: str | Path) -> "Vocabulary":
        """The same mapping from a YAML file. Terms are taken as they are written: ``no`` and ``2024`` are words.

        Raises:
            ExamplesError: as `of`, and for a file that cannot be read or is no YAML, with line and key.
        """
        lines: dict[tuple[Any, ...], int] = {}
        try:
            node = yaml.compose(Path(path).read_text(encoding="utf-8"), yaml.SafeLoader)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            at = f":{mark.line + 1}" if mark is not None else ""
            raise ExamplesError(f"{path}{at} is not YAML ({getattr(error, 'problem', None) or error})") from None
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise ExamplesError(f"cannot read {path}: {reason}; give a YAML file of categories") from None
        tree = None if node is None else _plain(node, (), lines, path)
        return _vocabulary(tree, lambda at: f"{path}:{lines.get(at, 1)}: ")

    @property
    def names(self) -> tuple[str, ...]:
        """The categories' names, in order."""
        return tuple(self.categories)

    def find(self, text: str) -> dict[str, tuple[Span, ...]]:
        """Half-open character spans of every category in a text."""
        return {name: category.find(text) for name, category in self.categories.items()}


def _whole(term: str) -> str:
    """A term as a pattern: whole words where its ends are letters, any white space between them."""
    before = r"(?<!\w)" if re.match(r"\w", term) else ""
    after = r"(?!\w)" if re.search(r"\w$", term) else ""
    return before + r"\s+".join(map(re.escape, term.split())) + after


def _vocabulary(tree: Any, place: Callable[[tuple[Any, ...]], str]) -> Vocabulary:
    """From a mapping that may be anything; `place` says where in a file an entry is."""
    if not isinstance(tree, Mapping) or not tree:
        raise ExamplesError(f"{place(())}a vocabulary must map names of categories to terms. Got {tree!r:.60}")
    return Vocabulary({str(name): _category(str(name), value, place) for name, value in tree.items()})


def _category(name: str, value: Any, place: Callable[[tuple[Any, ...]], str]) -> Category:
    what = f"the category {name!r}"
    content: Mapping[str, Any] = value if isinstance(value, Mapping) else {"terms": value}
    for key in content:
        if key not in KEYS:
            raise ExamplesError(f"{place((name, key))}{what} has the key {key!r}; the keys are {', '.join(KEYS)}")
    lists: dict[str, tuple[str, ...]] = {}
    for key in KEYS[:2]:
        path = (name, key) if isinstance(value, Mapping) else (name,)
        entries = content.get(key, ())
        if isinstance(entries, str) or not isinstance(entries, Sequence):
            raise ExamplesError(f"{place(path)}the {key} of {what} must be a list. Got {entries!r:.60}")
        for i, entry in enumerate(entries):
            if not isinstance(entry, str) or not entry.strip():
                raise ExamplesError(f"{place((*path, i))}the {key} of {what} must be text. Got {entry!r:.60}")
        lists[key] = tuple(entries)
    for i, regex in enumerate(lists["regexes"]):
        try:
            re.compile(regex)
        except re.error as error:
            raise ExamplesError(
                f"{place((name, 'regexes', i))}{regex!r} of {what} is no regular expression: {error}"
            ) from None
    exact = content.get("case_sensitive", False)
    if exact not in (True, False):
        raise ExamplesError(
            f"{place((name, 'case_sensitive'))}case_sensitive of {what} must be true or false. Got {exact!r}"
        )
    if not any(lists.values()):
        raise ExamplesError(f"{place((name,))}{what} is empty; give it terms or regexes, or leave it out")
    return Category(lists["terms"], lists["regexes"], bool(exact))


def _plain(node: yaml.Node, at: tuple[Any, ...], lines: dict[tuple[Any, ...], int], path: Any) -> Any:
    """A YAML node as mappings, lists and strings as written; `lines` gets the line of every entry."""
    lines.setdefault(at, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        out: dict[str, Any] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in out:
                raise ExamplesError(f"{path}:{line}: the key {name!r} is there twice; give each its own name")
            lines[*at, name] = line
            out[name] = _plain(value, (*at, name), lines, path)
        return out
    if isinstance(node, yaml.SequenceNode):
        return [_plain(one, (*at, i), lines, path) for i, one in enumerate(node.value)]
    if node.tag == "tag:yaml.org,2002:null":
        return None
    if at[-1:] == ("case_sensitive",) and node.tag == "tag:yaml.org,2002:bool":
        return str(node.value).lower() in ("true", "yes", "on")
    return str(node.value)
