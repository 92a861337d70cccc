"""Templates: layers that `define` names, written out before a config is checked.

    define:
      block: {stride: 1, layers: [{conv: {out: $out, stride: $stride, padding: same}}, batchnorm, relu]}
      head: [globalpool, {linear: classes}]
    layers: [{block: {out: 32}}, {block: {out: 64, stride: 2}}, head]

What is written out is checked as if it had been written so, and what is wrong with it is told at the place that it
came from.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, ValidationError, WithJsonSchema, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from dltrain.registry import Settings, most_like, names
from dltrain.yamlfile import MAX_DEPTH, MAX_VALUES, Place

LAYERS = {"type": "array", "minItems": 1}
Templates = Annotated[
    dict[str, Any],
    Field(exclude=True),  # from what a config is written as: the layers are written out there
    WithJsonSchema(
        {
            "type": "object",
            "additionalProperties": {
                "anyOf": [LAYERS, {"type": "object", "properties": {"layers": LAYERS}, "required": ["layers"]}]
            },
        }
    ),
]
_PARAMETER = re.compile(r"\$(\w+)")


class Templated(Settings):
    """Settings with `layers` in which the names that `define` defines may stand."""

    @model_validator(mode="wrap")
    @classmethod
    def _written_out(cls, data: Any, handler: Callable[[Any], Any]) -> Any:
        if not isinstance(data, Mapping) or not data.get("define"):
            return handler(data)
        writer = _Writer(data["define"])
        layers = None if writer.mistakes else writer.layers(data.get("layers"))
        if writer.mistakes:
            raise ValidationError.from_exception_data("templates", writer.mistakes)
        rest = {key: value for key, value in data.items() if key not in ("define", "layers")}
        try:
            return handler(rest if layers is None else {**rest, "layers": _plain(layers)})
        except ValidationError as error:
            raise ValidationError.from_exception_data(
                "templates",
                [
                    _at_its_source(line, layers, list(writer.templates))
                    for line in error.errors(include_url=False)[:100]
                ],
            ) from None


@dataclass(frozen=True)
class _Node:
    """A value, and where it was written."""

    value: Any  # a list of nodes, a mapping of text to nodes, or anything else
    place: Place


def _node(value: Any, place: Place) -> _Node:
    if isinstance(value, Mapping):
        value = {key: _node(each, (*place, key)) for key, each in value.items()}
    elif isinstance(value, list):
        value = [_node(each, (*place, index)) for index, each in enumerate(value)]
    return _Node(value, place)


def _plain(node: _Node) -> Any:
    if isinstance(node.value, dict):
        return {key: _plain(each) for key, each in node.value.items()}
    return [_plain(each) for each in node.value] if isinstance(node.value, list) else node.value


def _at_its_source(line: Any, layers: _Node | None, templates: list[str]) -> InitErrorDetails:
    """An error of the layers as they are written out, at the place in the config that it comes from."""
    node, place = layers, line["loc"]
    if node is not None and place[:1] == ("layers",):
        place = node.place
        for part in line["loc"][1:]:
            below = node.value
            if (isinstance(below, dict) and part in below) or (isinstance(below, list) and isinstance(part, int)):
                node = below[part]
                place = node.place
            else:  # of pydantic's own, or a key that is missing
                place = (*place, part)
    facts = dict(line.get("ctx", {}))
    if line["type"] == "unknown_name" and facts["kind"] == "layer":
        facts["known"] = [*facts["known"], *templates]
    return InitErrorDetails(type=PydanticCustomError(line["type"], line["msg"], facts), loc=place, input=line["input"])


@dataclass(frozen=True)
class _Template:
    name: str
    layers: _Node
    defaults: Mapping[str, _Node]
    used: Mapping[str, None]  # its parameters, in the order in which they stand there

    def first(self) -> str | None:
        """What `- block: 3` sets: the parameter that has no default, else the only one."""
        required = [name for name in self.used if name not in self.defaults]
        candidates = required or [*self.used]
        return candidates[0] if len(candidates) == 1 else None


class _TooMuch(Exception):
    """Raised where templates grow beyond what a file may hold."""


class _Writer:
    """Writes layers out; `mistakes` has what was wrong."""

    def __init__(self, define: Any) -> None:
        self.mistakes: list[InitErrorDetails] = []
        self.values = 0
        self.templates: dict[str, _Template] = {}
        known = names("layer", "activation")
        if not isinstance(define, Mapping):
            self.wrong("not_settings", ("define",), define)
            return
        for name, value in define.items():
            place = ("define", name)
            if name in known:
                self.expected("a name that no layer has", place, name)
            elif template := self.read(name, _node(value, place)):
                self.templates[name] = template

    def wrong(self, error: Any, place: Place, value: Any, **facts: Any) -> None:
        self.mistakes.append(InitErrorDetails(type=PydanticCustomError(error, error, facts), loc=place, input=value))

    def expected(self, what: Any, place: Place, value: Any) -> None:
        """Says `expected {what}, got {value}`."""
        self.mistakes.append(InitErrorDetails(type=PydanticCustomError("template", what), loc=place, input=value))

    def read(self, name: str, node: _Node) -> _Template | None:
        settings = node.value if isinstance(node.value, dict) else {"layers": node}
        layers = settings.get("layers")
        if layers is None:
            self.wrong("missing", (*node.place, "layers"), None)
            return None
        if not isinstance(layers.value, list) or not layers.value:
            self.expected("a list of layers", layers.place, _plain(layers))
            return None
        used = dict.fromkeys(_parameters(layers))
        defaults = {key: value for key, value in settings.items() if key != "layers"}
        for key in defaults.keys() - used.keys():
            self.wrong("unknown_key", (*node.place, key), key, known=[*used, "layers"])
        return _Template(name, layers, defaults, used)

    def layers(self, value: Any) -> _Node | None:
        """The layers with every template written out; None where there are none."""
        if value is None:
            return None
        try:
            return self.write(_node(value, ("layers",)), {}, (), 1)
        except _TooMuch as error:
            self.expected(str(error), ("layers",), value)
            return None

    def write(self, node: _Node, given: Mapping[str, _Node], inside: tuple[str, ...], depth: int) -> _Node:
        """The node with parameters replaced and templates written out.

        given: the parameters' values; inside: the templates that are being written out
        """
        self.values += 1
        if self.values > MAX_VALUES:
            raise _TooMuch(f"at most {MAX_VALUES:,} values once templates are written out")
        if depth > MAX_DEPTH:
            raise _TooMuch(f"layers nested at most {MAX_DEPTH} deep once templates are written out")
        value = node.value
        if isinstance(value, str) and (found := _PARAMETER.fullmatch(value)) and found[1] in given:
            return self.write(given[found[1]], {}, inside, depth)
        if isinstance(value, dict):
            return _Node({key: self.write(each, given, inside, depth + 1) for key, each in value.items()}, node.place)
        if not isinstance(value, list):
            return node
        items: list[_Node] = []
        for each in value:
            item = self.write(each, given, inside, depth + 1)
            template, arguments = self.use(item)
            if template is None:
                items.append(item)
            elif template.name in inside:
                self.expected("a template that does not use itself", each.place, template.name)
            elif (filled := self.fill(template, item, arguments)) is not None:
                items += self.write(template.layers, filled, (*inside, template.name), depth + 1).value
        return _Node(items, node.place)

    def use(self, item: _Node) -> tuple[_Template | None, _Node | None]:
        """The template that a layer list's item names, and what it is given."""
        value = item.value
        if isinstance(value, str):
            return self.templates.get(value), None
        if isinstance(value, dict) and len(value) == 1:
            ((name, arguments),) = value.items()
            return self.templates.get(name), arguments
        return None, None

    def fill(self, template: _Template, item: _Node, arguments: _Node | None) -> dict[str, _Node] | None:
        """The values of a template's parameters where it is used; None where they are wrong."""
        place = (*item.place, template.name)
        given: dict[str, _Node] = {}
        if arguments is not None and isinstance(arguments.value, dict):
            given = arguments.value
        elif arguments is not None and arguments.value is not None:
            first = template.first()
            if first is None:
                mend = f"settings ({', '.join(template.used)})" if template.used else "no settings"
                self.expected(mend, arguments.place, _plain(arguments))
                return None
            given = {first: arguments}
        unknown = given.keys() - template.used.keys()
        for key in unknown:
            self.wrong("unknown_key", (*place, key), key, known=[*template.used])
        filled = {**template.defaults, **given}
        missing = template.used.keys() - filled.keys()
        for name in () if unknown else missing:
            near = most_like(name, template.used.keys() - {name}, cutoff=0.6)
            meant = f" (or does the template mean ${near} by it?)" if near else ""
            self.expected(f"a value for ${name}{meant}", place, None)
        return None if unknown or missing else filled


def _parameters(node: _Node) -> Iterator[str]:
    """The parameters that stand in a node."""
    if isinstance(node.value, str) and (found := _PARAMETER.fullmatch(node.value)):
        yield found[1]
    below = node.value.values() if isinstance(node.value, dict) else node.value if isinstance(node.value, list) else ()
    for each in below:
        yield from _parameters(each)
