"""YAML, strictly: what is written is what is read, and every value knows its line.

PyYAML's events are read instead of its objects, so nothing is constructed but text, numbers, booleans, lists and
mappings.  Plain scalars follow YAML 1.2's core schema (https://yaml.org/spec/1.2.2, 10.3) without leading zeros,
octal and hexadecimal numbers: `1e-3` is a number, `no`, `012` and `1:30` stay text (and then fail a check that wants
something else).  Tags, several documents, duplicate keys, control characters and sizes that no config has are refused.
"""

from __future__ import annotations

import copy
import math
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
MAX_VALUES = 10_000  # after aliases are replaced by what they stand for

_NULL = re.compile(r"~|null|Null|NULL|")
_TRUE = re.compile(r"true|True|TRUE")
_FALSE = re.compile(r"false|False|FALSE")
_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_MAX_DIGITS = 18  # all such numbers fit 64 bits
_FLOAT = re.compile(r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
# YAML 1.2 allows the line and paragraph separators, but PyYAML takes them, and U+0085, for line breaks
_NOT_TEXT = re.compile("[^\t\n\r -~\u00a0-\u2027\u202a-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")
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
        line = self.line(place)
        return f"{self.source}:{line}" if line else self.source

    def line(self, place: Place) -> int:
        """The line of a value, or of the nearest thing around it that has one; 0 where nothing has."""
        return next((self.lines[place[:end]] for end in range(len(place), -1, -1) if place[:end] in self.lines), 0)


def read(path: Path) -> Document:
    """Reads a YAML file; raises ConfigError with file and line."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise ConfigError(
                f"{path}: {'a folder' if stat.S_ISDIR(mode) else 'not a regular file'}; expected a YAML file"
            )
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
    if stray := _NOT_TEXT.search(text):
        line = text.count("\n", 0, stray.start()) + 1
        raise ConfigError(f"{source}:{line}: {_code(stray)} has no place in a config")
    try:
        _Reader(text, document).whole()
    except yaml.MarkedYAMLError as error:
        raise ConfigError(_not_yaml(error, text, source)) from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the latter: PyYAML's own parser, of "\\UFFFFFFFF"
        raise ConfigError(f"{source}: not YAML: {error}".replace("\n", " ")) from None
    return document


def _not_yaml(error: yaml.MarkedYAMLError, text: str, source: str) -> str:
    """What PyYAML found wrong, where, and where it began what it was reading."""
    message = f"not YAML: {error.problem}"
    mark, begin = error.problem_mark or error.context_mark, error.context_mark
    if mark is None:
        return f"{source}: {message}"
    if error.context and begin and begin.line != mark.line:
        message += f", {error.context} from line {begin.line + 1} on"
    line = text.splitlines()[mark.line : mark.line + 1]
    if line and "\t" in line[0][: len(line[0]) - len(line[0].lstrip())]:
        message += "; indent by spaces, not tabs"
    return f"{source}:{mark.line + 1}: {message}"


def _code(stray: re.Match[str]) -> str:
    return f"character U+{ord(stray[0]):04X}"


def scalar(text: str) -> Any:
    """What a plain (unquoted) scalar means.  Raises ValueError for a number that is too large."""
    if _NULL.fullmatch(text):
        return None
    if _TRUE.fullmatch(text):
        return True
    if _FALSE.fullmatch(text):
        return False
    if _INT.fullmatch(text):
        if len(text.lstrip("+-")) > _MAX_DIGITS:
            raise ValueError(f"a whole number of more than {_MAX_DIGITS} digits; as text, put it in quotes")
        return int(text)
    if _FLOAT.fullmatch(text):
        number = float(text)
        if math.isinf(number):
            raise ValueError("a number beyond 1.8e308; as text, put it in quotes")
        return number
    if _NOT_FINITE.fullmatch(text):
        return float(text.replace(".", ""))
    return text


class _Dumper(yaml.SafeDumper):
    """Writes what `parse` reads as the same: text that looks like a number of YAML 1.2 in quotes, and no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def text(self, data: str) -> yaml.ScalarNode:
        try:
            plain = scalar(data) == data
        except ValueError:
            plain = False
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if plain else "'")


_Dumper.add_representer(str, _Dumper.text)


def dump(data: Any) -> str:
    """YAML text that `parse` reads as the same data."""
    return str(yaml.dump(data, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=100, allow_unicode=True))


def flow(data: Any) -> str:
    """As `dump`, on one line: `{name: sgd, lr: 0.1}`."""
    text = yaml.dump(data, Dumper=_Dumper, sort_keys=False, default_flow_style=True, width=math.inf, allow_unicode=True)
    return str(text).removesuffix("...\n").removesuffix("\n")  # the dots end a document that is one value


class _Reader:
    def __init__(self, text: str, document: Document) -> None:
        self.events: Iterator[Any] = yaml.parse(text, Loader=_LOADER)
        self.doc = document
        self.values = 0
        self.anchors: dict[str, tuple[Any, int]] = {}

    def fail(self, event: Any, message: str) -> ConfigError:
        return ConfigError(f"{self.doc.source}:{_line(event)}: {message}")

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
        self.doc.lines.setdefault(place, _line(event))
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self.anchors:
                raise self.fail(event, f"alias '*{event.anchor:.40}' stands before, or inside, what it names")
            value, size = self.anchors[event.anchor]
            self.values += size
            if self.values > MAX_VALUES:
                raise self.fail(event, f"aliases make this more than {MAX_VALUES} values")
            if len(place) + _height(value) > MAX_DEPTH:
                raise self.fail(event, f"aliases nest this more than {MAX_DEPTH} deep")
            return copy.deepcopy(value)
        if event.tag is not None:
            raise self.fail(event, f"tags such as '{event.tag:.60}' are not part of the config language")
        self.anchors.pop(event.anchor, None)  # from here on the name means this value, which is not whole yet
        before = self.values
        if isinstance(event, yaml.ScalarEvent):
            value = self.scalar(event)
        elif isinstance(event, yaml.SequenceStartEvent):
            value = self.sequence(place)
        else:
            value = self.mapping(place)
        if event.anchor:
            self.anchors[event.anchor] = value, self.values - before
        return value

    def scalar(self, event: yaml.ScalarEvent) -> Any:
        if stray := _NOT_TEXT.search(event.value):  # by an escape such as "\0"
            raise self.fail(event, f"{_code(stray)} has no place in a config")
        if not event.implicit[0]:  # quoted
            return event.value
        try:
            return scalar(event.value)
        except ValueError as error:
            raise self.fail(event, f"'{event.value:.20}…' is {error}") from None

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
            if not key.isprintable():
                raise self.fail(event, f"a key must be plain text, got {key[:40]!r}")
            if key in items:
                first = self.doc.lines[(*place, key)]
                raise self.fail(event, f"key '{key:.40}' stands twice, first in line {first}")
            self.doc.lines[(*place, key)] = _line(event)
            items[key] = self.value(next(self.events), (*place, key))
        return items


def _line(event: Any) -> int:
    return int(event.start_mark.line) + 1


def _height(value: Any) -> int:
    """How deep lists and mappings nest in a value."""
    below = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if below is None else 1 + max(map(_height, below), default=0)
