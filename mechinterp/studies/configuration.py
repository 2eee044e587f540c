"""The configuration of an attention study: four sections of a YAML file, validated with line and key."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mechinterp.errors import ConfigurationError

Path_: TypeAlias = tuple[str | int, ...]


class _Section(BaseModel):
    """A section holds its own keys and no others."""

    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=False)


class ModelSection(_Section):
    """Which model, as `mechinterp.Model.load` takes it."""

    name: str = Field(min_length=1)
    adapter: str | None = None
    dtype: str | None = None
    device: str | None = None


class GenerationSection(_Section):
    """Where predictions come from, and how a sample becomes a prompt."""

    mode: Literal["file", "constrained", "generated"] = "file"
    """``file``: they are in the samples' file. ``constrained``: the label to which the model gives the largest
    probability. ``generated``: the model writes freely, and a label is looked for in what it wrote."""
    labels: tuple[str, ...] | None = Field(default=None, min_length=2)
    """All labels that there are; a sample or prediction with another is refused."""
    prompt: str = "{text}"
    chat: bool = False
    """The prompt is a user's message, in the tokenizer's chat template."""
    system: str | None = None
    """The system's message of a chat."""
    answer: str | None = None
    """How a label continues the prompt: by default " {label}", in a chat "{label}"."""
    temperature: float = Field(default=0.0, ge=0)
    """Of generation; 0 takes the likeliest token."""
    max_new_tokens: int = Field(default=8, ge=1)
    seed: int = Field(default=0, ge=0)

    @property
    def continuation(self) -> str:
        """`answer`, or its default."""
        return self.answer if self.answer is not None else "{label}" if self.chat else " {label}"

    @model_validator(mode="after")
    def _fits(self) -> "GenerationSection":
        if self.prompt.count("{text}") != 1:
            raise ValueError("prompt must hold {text} exactly once")
        if "{label}" not in self.continuation:
            raise ValueError("answer must hold {label}")
        if self.mode != "file" and self.labels is None:
            raise ValueError(f"mode {self.mode!r} needs labels: a list of all of them")
        if self.labels is not None and len({_plain(label) for label in self.labels}) < len(self.labels):
            raise ValueError("labels must differ by more than case and surrounding space")
        if self.system is not None and not self.chat:
            raise ValueError("system is part of a chat; set chat: true, or leave it out")
        return self


class Fields(_Section):
    """Names of the fields of the samples' file."""

    text: str = "text"
    label: str = "label"
    prediction: str = "prediction"


class AnalysisSection(_Section):
    """What is measured, of which samples, and which groups are compared."""

    samples: str = Field(min_length=1)
    """A .json or .jsonl file, one object a sample; relative to the configuration."""
    vocabulary: str = Field(min_length=1)
    """A YAML file of categories; relative to the configuration."""
    fields: Fields = Fields()
    groups: str = "correctness"
    """``correctness``, ``label``, ``prediction``, or a field of the samples' file."""
    compare: tuple[str, str] | None = None
    """The two groups that are compared, where there are more: the first minus the second."""
    queries: Literal["end", "all"] = "end"
    """Attention from the last token of the prompt, where the answer is given; or from all."""
    prediction_category: bool = True
    """Occurrences of the predicted word in the prompt are a category of their own, ``prediction``."""
    floor: float = Field(default=0.05, ge=0, le=1)
    """Least share of attention above what is expected, for a head to be specialised."""
    bad_rows: Literal["refuse", "skip"] = "refuse"
    """What happens to samples that cannot be used. Skipped ones are counted, with their lines."""
    limit: int | None = Field(default=None, ge=1)
    """At most so many samples, from the first."""
    shard_size: int = Field(default=16, ge=1)
    """Samples that are run and kept together: what an interruption loses at most."""
    seed: int = Field(default=0, ge=0)
    """Of bootstrap and permutations."""


class VisualisationSection(_Section):
    """Where the study is written, and which patterns are kept whole."""

    out: str = "attention-study"
    """The folder of the study; relative to the configuration."""
    title: str | None = None
    heads: Annotated[tuple[tuple[int, int], ...] | None, Field(min_length=1)] = None
    """(layer, head) whose attention matrices are kept; by default the three that differ most."""
    examples: int = Field(default=2, ge=0)
    """Samples of each group whose attention matrices are kept."""


class StudyConfig(_Section):
    """All of an attention study's configuration: the sections model, generation, analysis, visualisation."""

    model: ModelSection
    generation: GenerationSection = GenerationSection()
    analysis: AnalysisSection
    visualisation: VisualisationSection = VisualisationSection()

    @model_validator(mode="after")
    def _fits(self) -> "StudyConfig":
        if self.generation.mode == "generated" and self.analysis.queries == "all":
            raise ValueError("analysis.queries must be 'end' in mode 'generated': each token that is written")
        return self

    @classmethod
    def load(cls, path: str | Path) -> "StudyConfig":
        """Read a YAML file; paths in it are relative to its folder.

        Raises:
            ConfigurationError: it cannot be read, is no YAML, has an unknown, repeated or missing key, or a
                value that does not fit; with the line and the key.
        """
        file = Path(path)
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise ConfigurationError(f"cannot read {path}: {reason}; give a YAML file") from None
        values, lines = read_yaml(text, str(path))
        try:
            config = cls.model_validate(values)
        except ValidationError as error:
            raise ConfigurationError("\n".join(_said(error, lines, str(path)))) from None
        here = file.expanduser().absolute().parent

        def beside(name: str) -> str:
            return str(here / Path(name).expanduser())

        # A model's folder may be relative, too; a hub's name may look the same, and is left alone.
        name = beside(config.model.name)
        return config.instead(
            model=name if Path(name).exists() else None,
            samples=beside(config.analysis.samples),
            vocabulary=beside(config.analysis.vocabulary),
            out=beside(config.visualisation.out),
        )

    def instead(
        self,
        *,
        model: str | None = None,
        samples: str | None = None,
        vocabulary: str | None = None,
        out: str | None = None,
    ) -> "StudyConfig":
        """The same configuration with another model, other files or another folder, where they are given."""

        def new(section: Any, **keys: str | None) -> Any:
            return section.model_copy(update={key: value for key, value in keys.items() if value is not None})

        return self.model_copy(
            update={
                "model": new(self.model, name=model),
                "analysis": new(self.analysis, samples=samples, vocabulary=vocabulary),
                "visualisation": new(self.visualisation, out=out),
            }
        )


def read_yaml(text: str, name: str) -> tuple[Any, Mapping[Path_, int]]:
    """The values of a YAML text, and the line of each key and entry, by its path.

    Raises:
        ConfigurationError: it is no YAML, is no mapping, or repeats a key.
    """
    try:
        tree = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f":{mark.line + 1}"
        said = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigurationError(f"{name}{line} is not plain YAML ({said}); correct it") from None
    if not isinstance(values, dict):
        raise ConfigurationError(f"{name} holds no keys; write the sections {', '.join(StudyConfig.model_fields)}")
    lines: dict[Path_, int] = {}
    _walk(tree, (), lines, name)
    return values, lines


def _walk(node: Any, path: Path_, lines: dict[Path_, int], name: str) -> None:
    """Note the lines below a node. YAML itself would take the last of a key's values without a word."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*path, str(key.value))
            if here in lines:
                raise ConfigurationError(
                    f"{name}:{key.start_mark.line + 1} repeats the key {'.'.join(map(str, here))}, which line"
                    f" {lines[here]} has; remove one"
                )
            lines[here] = key.start_mark.line + 1
            _walk(value, here, lines, name)
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            lines[(*path, i)] = value.start_mark.line + 1
            _walk(value, (*path, i), lines, name)


def _said(error: ValidationError, lines: Mapping[Path_, int], name: str) -> list[str]:
    """One sentence for each thing that is wrong, in the order of lines."""
    out: list[tuple[int, str]] = []
    errors = error.errors()
    for each in errors:
        loc: Path_ = tuple(each["loc"])
        if any(len(other["loc"]) > len(loc) and other["loc"][: len(loc)] == loc for other in errors):
            continue  # too short a list, say, because its entries are wrong
        known = next((loc[:n] for n in range(len(loc), 0, -1) if loc[:n] in lines), loc[:0])
        line = lines.get(known, 1)
        key = ".".join(map(str, known)) or "the top"
        if each["type"] == "extra_forbidden":
            names = _keys(known[:-1])
            close = difflib.get_close_matches(str(loc[-1]), names, 1, 0.5)
            fix = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(names)}"
            said = f"the key {key} is unknown; {fix}"
        elif each["type"] == "missing":
            said = f"the key {'.'.join(map(str, loc))} is missing; add it"
        elif each["type"] == "string_type" and isinstance(each["input"], int | float):  # `yes` is a truth to YAML
            said = f"{key} must be text; put it in quotes. Got {each['input']!r}"
        else:
            what = each["msg"].removeprefix("Value error, ")
            got = "" if each["type"] == "value_error" else f". Got {each['input']!r}"
            said = f"{key}: {what[:1].lower() + what[1:]}{got}"
        out.append((line, f"{name}:{line}: {said}"))
    return [said for _, said in dict.fromkeys(sorted(out))]


def _keys(path: Path_) -> list[str]:
    """The keys that a section has."""
    section: Any = StudyConfig
    for step in path:
        section = section.model_fields[str(step)].annotation
    return list(section.model_fields)


def _plain(label: str) -> str:
    return label.strip().casefold()
