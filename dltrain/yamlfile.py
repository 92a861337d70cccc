"""YAML, strictly: what is written is what is read, and every value knows its line.

PyYAML's events are read instead of its objects, so nothing is constructed but text, numbers, booleans, lists and
mappings.  Plain scalars follow YAML 1.2's core schema without its octal and hexadecimal forms: `1e-3` is a number,
`no`, `012` and `1:30` stay text (and then fail a check that wants something else).  Tags, several documents,
duplicate keys and sizes that no config has are refused.
"""

from __future__ import annotations

import copy
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dltrain.errors import ConfigError

Place = tuple[str | int, ...]  # the keys and list positions that lead to a value

MAX_BYTES = 256 * 1024
MAX_DEPTH = 40
MAX_VALUES = 20_000  # after aliases are replaced by what they stand for

_NULL = re.compile(r"~|null|Null|NULL|")
_TRUE = re.compile(r"true|True|TRUE")
_FALSE = re.compile(r"false|False|FALSE")
_INT = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})")
_FLOAT = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
# the C parser is some ten times faster; a PyYAML built without it has the same events
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass
class Document:
    """A YAML file's data and, for the place of each value in it, the line where it stands."""

    source: str
    data: Any
    lines: dict[Place, int] = field(default_factory=dict)

    def where(self, place: Place) -> str:
        """`file:line` of a value, or of the nearest thing around it that has a line."""
        for end in range(len(place), -1, -1):
            if place[:end] in self.lines:
                return f"{self.source}:{self.lines[place[:end]]}"
        return self.source


def read(path: Path) -> Document:
    """Reads a YAML file; raises ConfigError with file and line."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ConfigError(f"{path}: not a regular file")
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_BYTES // 1024} KiB, which no config needs")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}:{line}: not UTF-8; save the file as UTF-8") from None
    return parse(text, str(path))


def parse(text: str, source: str) -> Document:
    """Reads YAML text; `source` is what errors call it."""
    document = Document(source, None)
    try:
        _Reader(text, document).whole()
    except yaml.YAMLError as error:
        mark: Any = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        raise ConfigError(f"{source}{line}: not YAML: {problem}".replace("\n", " ")) from None
    return document


def scalar(text: str) -> Any:
    """What a plain (unquoted) scalar means."""
    if _NULL.fullmatch(text):
        return None
    if _TRUE.fullmatch(text):
        return True
    if _FALSE.fullmatch(text):
        return False
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text) and not text.lstrip("+-").isdigit():  # digits too many for _INT stay text
        return float(text)
    if _NOT_FINITE.fullmatch(text):
        return float(text.replace(".", ""))
    return text


class _Reader:
    def __init__(self, text: str, document: Document) -> None:
        self.events: Iterator[Any] = yaml.parse(text, Loader=_LOADER)
        self.doc = document
        self.values = 0
        self.anchors: dict[str, tuple[Any, int]] = {}

    def fail(self, event: Any, message: str) -> ConfigError:
        return ConfigError(f"{self.doc.source}:{event.start_mark.line + 1}: {message}")

    def whole(self) -> None:
        next(self.events)  # the stream's start
        event = next(self.events)
        if isinstance(event, yaml.StreamEndEvent):
            raise ConfigError(f"{self.doc.source}: empty")
        self.doc.data = self.value(next(self.events), ())
        next(self.events)  # the document's end
        event = next(self.events)
        if not isinstance(event, yaml.StreamEndEvent):
            raise self.fail(event, "a second document starts here; a config is one document")

    def value(self, event: Any, place: Place) -> Any:
        self.values += 1
        if self.values > MAX_VALUES:
            raise self.fail(event, f"more than {MAX_VALUES} values")
        if len(place) > MAX_DEPTH:
            raise self.fail(event, f"nested more than {MAX_DEPTH} deep")
        self.doc.lines.setdefault(place, event.start_mark.line + 1)
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self.anchors:
                raise self.fail(event, f"alias '*{event.anchor}' stands before, or inside, what it names")
            value, size = self.anchors[event.anchor]
            self.values += size
            if self.values > MAX_VALUES:
                raise self.fail(event, f"aliases make this more than {MAX_VALUES} values")
            return copy.deepcopy(value)
        if event.tag is not None:
            raise self.fail(event, f"tags such as '{event.tag}' are not part of the config language")
        before = self.values
        if isinstance(event, yaml.ScalarEvent):
            value = scalar(event.value) if event.implicit[0] else event.value
        elif isinstance(event, yaml.SequenceStartEvent):
            value = self.sequence(place)
        else:
            value = self.mapping(place)
        if event.anchor:
            self.anchors[event.anchor] = value, self.values - before
        return value

    def sequence(self, place: Place) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            items.append(self.value(event, (*place, len(items))))
        return items

    def mapping(self, place: Place) -> dict[str, Any]:
        items: dict[str, Any] = {}
        event: Any
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent) or event.tag is not None:
                raise self.fail(event, "a key must be plain text")
            key = event.value
            line = event.start_mark.line + 1
            if key in items:
                first = self.doc.lines[(*place, key)]
                raise self.fail(event, f"key '{key}' stands twice (first in line {first})")
            self.doc.lines[(*place, key)] = line
            items[key] = self.value(next(self.events), (*place, key))
        return items
