"""The reference of every component and setting, from their signatures and docstrings."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel
from rich import box
from rich.console import Console
from rich.table import Table

from dltrain import registry
from dltrain.config import Config, Data, Descent, Model, Train
from dltrain.errors import ConfigError
from dltrain.registry import KINDS, Entry, suggest
from dltrain.schema import section

HEAD = """# Reference

Every key and component that a config can have, made by `dltrain list --markdown` from their signatures.
"""


def describe_type(schema: dict[str, Any]) -> str:
    """A JSON schema's type in words: `number > 0`, `"same" or "valid"`."""
    if "anyOf" in schema:
        return " or ".join(describe_type(each) for each in schema["anyOf"])
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "enum" in schema:
        return " or ".join(map(str, schema["enum"]))
    if "const" in schema:
        return str(schema["const"])
    if schema.get("type") == "array":
        return f"list of {describe_type(schema.get('items', {}))}"
    words = {"integer": "whole number", "null": "none", "boolean": "true or false", "string": "text"}
    name = words.get(schema.get("type", ""), schema.get("type", "any"))
    signs = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    bounds = [f"{sign} {schema[key]}" for key, sign in signs.items() if key in schema]
    return f"{name} {' and '.join(bounds)}".strip()


def arguments(settings: type[BaseModel]) -> Iterable[tuple[str, str, str, str]]:
    """(name, type, default, documentation) of each setting."""
    described = section(settings)
    for name, schema in described["properties"].items():
        required = name in described.get("required", [])
        default = schema.get("default")
        shown = (
            "required"
            if required
            else "none"
            if default is None
            else str(default).lower()
            if isinstance(default, bool)
            else str(default)
        )
        yield name, describe_type(schema), shown, schema.get("description", "")


def show(kind: str | None, console: Console) -> None:
    """Prints one kind, or all."""
    if kind is not None and kind not in KINDS:
        raise ConfigError(f"no kind of component is called '{kind}'{suggest(kind, KINDS)}")
    for each in [kind] if kind else KINDS:
        table = Table(box=box.SIMPLE_HEAD, title=each, title_justify="left", pad_edge=False)
        for column in ("name", "argument", "type", "default", "what it is"):
            table.add_column(column, overflow="fold")
        for entry in registry.entries(each):
            table.add_row(f"[bold]{entry.name}[/bold]", "", "", "", entry.summary)
            for name, type_, default, text in arguments(entry.arguments):
                table.add_row("", name, type_, default, text)
        console.print(table)


def markdown() -> str:
    """The whole reference as docs/reference.md has it."""
    parts = [HEAD, "## The config\n"]
    for title, settings in (("", Config), ("data", Data), ("model", Model), ("descent", Descent), ("train", Train)):
        parts.append(f"### {title or 'top level'}\n\n{_first_line(settings)}\n")
        parts.append(_table(settings))
    for kind, signature in KINDS.items():
        parts.append(f"## {kind}\n\n{signature[0].upper()}{signature[1:]}.\n")
        parts += [_entry(entry) for entry in registry.entries(kind)]
    return "\n".join(parts)


def _first_line(settings: type[BaseModel]) -> str:
    return (inspect.getdoc(settings) or "").split("\n\n")[0]


def _entry(entry: Entry) -> str:
    head = f"### `{entry.name}`\n\n{entry.summary}\n"
    return f"{head}\n{_table(entry.arguments)}" if entry.arguments.model_fields else head


def _table(settings: type[BaseModel]) -> str:
    rows = ["| key | type | default | |", "|---|---|---|---|"]
    rows += [
        f"| `{name}` | {type_} | {default} | {text} |".replace("| none | none |", "| none | |")
        for name, type_, default, text in arguments(settings)
    ]
    return "\n".join(rows) + "\n"
