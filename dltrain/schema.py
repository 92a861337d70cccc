"""The JSON schema of the config language, from the signatures of its components."""

from __future__ import annotations

import inspect
from typing import Any

from pydantic import BaseModel

from dltrain import registry
from dltrain.config import Config, Data, Descent, Evaluate, Group, Lookahead, Model, Optim, TensorBoard, Train, View
from dltrain.models.templates import Templated
from dltrain.registry import KINDS, Component, Entry

Schema = dict[str, Any]
# those of data, model and optim are partly the component's own
SECTIONS: dict[str, type[BaseModel]] = {
    "data": Data,
    "model": Model,
    "descent": Descent,
    "optim": Optim,
    "train": Train,
    "evaluate": Evaluate,
    "tensorboard": TensorBoard,
}
NESTED: dict[str, type[BaseModel]] = {"Group": Group, "Lookahead": Lookahead, "View": View}  # settings within those


def schema() -> Schema:
    """JSON schema (draft 2020-12) of a whole config."""
    whole = section(Config)
    whole["required"].remove("name")  # default: the file's stem
    for name, settings in SECTIONS.items():
        found: Schema = {"$ref": f"#/$defs/{name}_section"} if name in KINDS else section(settings)
        whole["properties"][name] = {**found, "description": whole["properties"][name]["description"]}
    definitions: dict[str, Schema] = {}
    while missing := (_references(whole) | _references(definitions)) - definitions.keys():
        definitions |= {name: _definition(*name.rsplit("_", 1)) for name in missing}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "dltrain config",
        **whole,
        "$defs": definitions,
    }


def _definition(kind: str, form: str) -> Schema:
    """A component of a kind as it is written in a section of its own, or as an item of a list."""
    entries = registry.entries(kind)
    short: Schema = {"enum": [entry.name for entry in entries if not entry.required()]}
    if form == "item":
        return {"anyOf": [short, *(_item(entry) for entry in entries)]}
    return {"anyOf": [short, *(each for entry in entries for each in _sections(entry, _default(kind)))]}


def _references(node: Any) -> set[str]:
    """The names of the definitions that a schema refers to."""
    if isinstance(node, list):
        return set().union(*map(_references, node))
    if not isinstance(node, dict):
        return set()
    own = {node["$ref"].removeprefix("#/$defs/")} if isinstance(node.get("$ref"), str) else set()
    return own.union(*map(_references, node.values()))


def _default(kind: str) -> str | None:
    """The component that a section means where it names none."""
    metadata = Config.model_fields[kind].metadata if kind in Config.model_fields else []
    return next((written.default for written in metadata if isinstance(written, registry.Section)), None)


def summary(settings: type[BaseModel]) -> str:
    return registry.read_docstring(inspect.getdoc(settings) or "")[0]


def section(settings: type[BaseModel]) -> Schema:
    """The schema of some settings: references to components point to the definitions that `schema` makes.

    Of a section that names a component it has the settings that all its components share.
    """
    found = settings.model_json_schema()
    local = found.pop("$defs", {})
    resolved: Schema = _resolve(found, local)
    for key in ("title", "description"):
        resolved.pop(key, None)
    documented = registry.read_docstring(inspect.getdoc(settings) or "")[1]
    resolved.setdefault("properties", {}).pop("source", None)
    resolved["properties"].pop("as given", None)  # of Group, and no key
    if "source" in resolved.get("required", []):
        resolved.pop("required")
    for name, each in resolved["properties"].items():
        each.pop("title", None)
        each.pop("default", None)
        default = settings.model_fields[name].get_default(call_default_factory=True)
        if not settings.model_fields[name].is_required() and not isinstance(default, BaseModel):
            each["default"] = _plain(default)
        if name in documented:
            each["description"] = documented[name]
    return {"type": "object", "additionalProperties": False, **resolved}


def _plain(default: Any) -> Any:
    """A default as a config would have it."""
    if not isinstance(default, Component):
        return default
    bare = registry.component(default.entry, {})
    return default.name if default.plain() == bare.plain() else registry.Item(default.kind).write(default)


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
    if (name := node.get("$ref", "").removeprefix("#/$defs/")) in local:
        rest = {key: value for key, value in node.items() if key != "$ref"}
        found = _nested(NESTED[name]) if name in NESTED else _resolve(local[name], local)
        return {**found, **_resolve(rest, local)}
    return {key: _resolve(value, local) for key, value in node.items()}


def _nested(settings: type[BaseModel]) -> Schema:
    """Settings within settings.  A group may have any optimizer's, whose values are more than a schema can say."""
    found = section(settings)
    if settings is Group:
        optimizers = registry.entries("optim")
        names: Schema = {"enum": [entry.name for entry in optimizers]}
        given: Schema = {name: {} for entry in optimizers for name in entry.arguments.model_fields}
        found["properties"] |= {"name": {**names, "description": "of another optimizer, beside its settings"}, **given}
    return found


def _item(entry: Entry) -> Schema:
    arguments = section(entry.arguments)
    forms = [arguments]
    first = next(iter(arguments["properties"]), None)
    if first and set(entry.required()) <= {first}:
        forms.append(arguments["properties"][first])
    if not entry.required():
        forms.append({"type": "null"})
    return {
        "type": "object",
        "properties": {entry.name: {"anyOf": forms, "description": entry.summary}},
        "required": [entry.name],
        "additionalProperties": False,
    }


def _sections(entry: Entry, default: str | None) -> list[Schema]:
    arguments = section(entry.arguments)
    shared = section(SECTIONS[entry.kind])["properties"] if entry.kind in SECTIONS else {}
    found: Schema = {
        "type": "object",
        "description": entry.summary,
        "properties": {"name": {"const": entry.name}, **arguments["properties"], **shared},
        "required": [*([] if entry.name == default else ["name"]), *arguments.get("required", [])],
        "additionalProperties": False,
    }
    if not issubclass(entry.arguments, Templated):
        return [found]
    # which names and parameters are right beside `define` is more than a schema can say: its layers may be anything
    properties = found["properties"]
    layers = {**properties["layers"], "items": {"anyOf": [properties["layers"]["items"], {}]}}
    plain = {key: value for key, value in properties.items() if key != "define"}
    return [
        {**found, "properties": plain},
        {**found, "properties": {**properties, "layers": layers}, "required": [*found["required"], "define"]},
    ]
