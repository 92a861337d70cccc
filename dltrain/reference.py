"""The reference of every component and setting, from their signatures and docstrings."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable, Iterable

from rich.console import Console
from rich.text import Text

from dltrain import registry
from dltrain.errors import ConfigError
from dltrain.mistakes import PATTERNS
from dltrain.registry import KINDS, suggest
from dltrain.schema import SECTIONS, Schema, schema, section, summary

HEAD = """# Reference

Every key and component that a config can have, written by `dltrain list --markdown` from their signatures.

Under each kind of component stands what a function of that kind takes and gives, for those who add one.

A section that names a component may be written short: `optim: adam` is `optim: {name: adam}`.  One with a default need
not name it: `schedule: {warmup_epochs: 2}`.  A layer, an activation and an augmentation are written `relu`,
`maxpool: 2` (where one setting is given, the first is meant) or `conv: {out: 32, kernel: 5}`.
"""
WORDS = {"integer": "whole number", "boolean": "`true` or `false`", "string": "text", "null": "`null`"}
SIGNS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}


def describe_type(found: Schema, kind: Callable[[str], str] = str) -> str:
    """A JSON schema's type in words: number > 0, `same` or `valid`, list of (whole number >= 0 or text).

    kind: how to write the name of a kind of component
    """
    *most, last = _alternatives(found, kind)
    return f"{', '.join(most)} or {last}" if most else last


def _alternatives(found: Schema, kind: Callable[[str], str]) -> list[str]:
    if "anyOf" in found:
        return [words for each in found["anyOf"] for words in _alternatives(each, kind)]
    if "$ref" in found:  # made by schema.section: #/$defs/layer_item
        return [kind(found["$ref"].rpartition("/")[2].rpartition("_")[0])]
    if "enum" in found or "const" in found:
        return [f"`{each}`" for each in found.get("enum", [found.get("const")])]
    if found.get("pattern") in PATTERNS:
        return [PATTERNS[found["pattern"]]]
    if found.get("type") == "array":
        items = describe_type(found.get("items", {}), kind)
        return [f"list of ({items})" if " or " in items else f"list of {items}"]
    if found.get("type") == "object":
        return ["settings" if "properties" in found else "mapping"]
    name = found.get("type", "anything")
    bounds = [f"{sign} {found[key]}" for key, sign in SIGNS.items() if key in found]
    return [f"{WORDS.get(name, name)} {' and '.join(bounds)}".strip()]


def show(kind: str | None, console: Console) -> None:
    """Prints the components of one kind, or of all, with their arguments."""
    if kind is not None and kind not in KINDS:
        raise ConfigError(f"no kind of component is called '{kind}'{suggest(kind, KINDS)}")
    for each in [kind] if kind else KINDS:
        _print(console, f"{each}: {_title(each)}", 0, "bold underline")
        for entry in registry.entries(each):
            console.print()
            _print(console, entry.name, 0, "bold")
            _print(console, entry.summary, 2)
            for name, found, default in _settings(section(entry.arguments)):
                _print(console, f"{name}: {describe_type(found)}; {default}", 4)
                _print(console, found.get("description", ""), 8, "dim")
        console.print()


def _print(console: Console, text: str, indent: int, style: str = "") -> None:
    margin = " " * indent
    wrapped = textwrap.fill(
        text, console.width, initial_indent=margin, subsequent_indent=margin, break_on_hyphens=False
    )
    console.print(Text(wrapped, style))


def _settings(described: Schema) -> Iterable[tuple[str, Schema, str]]:
    """(name, JSON schema, `required` or the default as a config would have it) of each setting."""
    for name, found in described["properties"].items():
        default = found.get("default")
        shown = default if isinstance(default, str) else json.dumps(default)
        if name in described.get("required", []):
            yield name, found, "required"
        else:
            yield name, found, f"default `{shown}`" if "default" in found else ""
        for nested in (found, found.get("items", {}), *found.get("anyOf", [])):
            if "properties" in nested:
                documented = {key: each for key, each in nested["properties"].items() if "description" in each}
                for key, below, given in _settings({**nested, "properties": documented}):
                    yield f"{name}.{key}", below, given


def markdown() -> str:
    """The whole reference as docs/reference.md has it."""
    whole = schema()
    for name in SECTIONS:
        text = whole["properties"][name]["description"]
        whole["properties"][name] = {"type": f"[settings](#{name})", "description": text}
    parts = [HEAD, "## The config\n", _table(whole)]
    for name, settings in SECTIONS.items():
        parts.append(f"### `{name}`\n\n{summary(settings)}\n")
        if name in KINDS:
            parts.append(f"Besides its own settings, each of the {_link(name, _title(name))} has these:\n")
        parts.append(_table(section(settings)))
    for kind, signature in KINDS.items():
        parts.append(f"## {_title(kind).capitalize()}\n\nKind `{kind}`: {signature.partition(': ')[2]}.\n")
        for entry in registry.entries(kind):
            parts.append(f"### `{entry.name}`\n\n{entry.summary}\n")
            parts += [_table(section(entry.arguments))] if entry.arguments.model_fields else []
    return "\n".join(parts)


def _title(kind: str) -> str:
    """What components of a kind are called: optim -> optimizers."""
    return KINDS[kind].partition(":")[0]


def _link(kind: str, text: str | None = None) -> str:
    return f"[{text or kind}](#{_title(kind).replace(' ', '-')})"


def _table(described: Schema) -> str:
    rows = ["| key | type | default | what it is |", "|---|---|---|---|"]
    for name, found, default in _settings(described):
        cells = [
            f"`{name}`",
            describe_type(found, _link),
            default.removeprefix("default "),
            found.get("description", ""),
        ]
        rows.append(f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |")
    return "\n".join(rows) + "\n"
