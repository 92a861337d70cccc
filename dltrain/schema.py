"""The JSON schema of the config language, from the signatures of its components."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema

from dltrain import registry
from dltrain.config import Config, Data, Model
from dltrain.registry import KINDS, Entry

Schema = dict[str, Any]
SHARED: dict[str, type[BaseModel]] = {
    "data": Data,
    "model": Model,
}  # sections whose settings are partly the component's own


def schema() -> Schema:
    """JSON schema (draft 2020-12) of a whole config."""
    whole = section(Config)
    definitions: dict[str, Schema] = {}
    for kind in KINDS:
        entries = registry.entries(kind)
        definitions[f"{kind}_item"] = {"anyOf": [_names(entries), *map(_item, entries)]}
        definitions[f"{kind}_section"] = {"anyOf": [_names(entries), *(_section(kind, entry) for entry in entries)]}
    whole["required"] = [name for name in whole["required"] if name != "name"]  # default: the file's stem
    for kind in SHARED:
        whole["properties"][kind] = {"$ref": f"#/$defs/{kind}_section"}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "dltrain config",
        **whole,
        "$defs": definitions,
    }


def section(settings: type[BaseModel]) -> Schema:
    """The schema of some settings: references to components point to the definitions that `schema` makes."""
    found = settings.model_json_schema(schema_generator=GenerateJsonSchema)
    local = found.pop("$defs", {})
    resolved: Schema = _resolve(found, local)
    resolved.pop("description", None)
    documented = registry.read_docstring(settings.__doc__ or "")[1]
    for name, each in resolved.setdefault("properties", {}).items():
        each.pop("title", None)
        if name in documented:
            each["description"] = documented[name]
    return {"type": "object", "additionalProperties": False, **resolved}


def _resolve(node: Any, local: Schema) -> Any:
    if isinstance(node, list):
        return [_resolve(each, local) for each in node]
    if not isinstance(node, dict):
        return node
    for form, suffix in (("x-Item", "item"), ("x-Section", "section")):
        if form in node:
            references = [{"$ref": f"#/$defs/{kind}_{suffix}"} for kind in node[form]]
            rest = {key: value for key, value in node.items() if key != form}
            return {**(references[0] if len(references) == 1 else {"anyOf": references}), **rest}
    if node.get("$ref", "").removeprefix("#/$defs/") in local:
        rest = {key: value for key, value in node.items() if key != "$ref"}
        return {**_resolve(local[node["$ref"].removeprefix("#/$defs/")], local), **_resolve(rest, local)}
    return {key: _resolve(value, local) for key, value in node.items()}


def _names(entries: list[Entry]) -> Schema:
    """The short form, for those that need no settings."""
    return {"enum": [entry.name for entry in entries if not entry.required()]}


def _item(entry: Entry) -> Schema:
    arguments = section(entry.arguments)
    forms = [arguments, *list(arguments["properties"].values())[:1]]
    if not entry.required():
        forms.append({"type": "null"})
    return {
        "type": "object",
        "properties": {entry.name: {"anyOf": forms, "description": entry.summary}},
        "required": [entry.name],
        "additionalProperties": False,
    }


def _section(kind: str, entry: Entry) -> Schema:
    shared = dict(section(SHARED[kind])["properties"]) if kind in SHARED else {}
    shared.pop("source", None)
    arguments = section(entry.arguments)
    return {
        "type": "object",
        "description": entry.summary,
        "properties": {"name": {"const": entry.name}, **arguments["properties"], **shared},
        "required": ["name", *arguments.get("required", [])],
        "additionalProperties": False,
    }
