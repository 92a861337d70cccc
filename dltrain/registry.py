"""Name -> factory, where the factory's signature is its schema.

A component (a model, a layer, a loss, …) is a function or class whose positional arguments the program supplies and
whose keyword-only arguments the config supplies:

    @register("loss")
    def huber(outputs: torch.Tensor, targets: torch.Tensor, *, delta: Positive = 1.0) -> torch.Tensor:
        '''Squared near zero, absolute beyond `delta`.

        delta: where the square ends, in units of the output
        '''

From the keyword-only arguments and the docstring come the check, the error messages, the JSON schema and the reference
documentation.  This module imports no torch.
"""

from __future__ import annotations

import difflib
import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, LiteralString, get_type_hints

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    TypeAdapter,
    ValidationError,
    create_model,
    model_validator,
)
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema

from dltrain.errors import ConfigError

KINDS = {
    "data": "data sets: `(files) -> Dataset`",
    "augmentation": "augmentations: `(images, random) -> images`, both uint8 `[B, C, H, W]`",
    "mixing": "mixings: `(images, targets, random) -> (images, targets)`, uint8 `[B, C, H, W]`, float32 `[B, classes]`",
    "model": "models: `(shape, outputs) -> nn.Module`, from `[B, *shape]` to `[B, outputs]`",
    "layer": "layers: `(shape, outputs) -> nn.Module`",
    "activation": "activations: `(shape, outputs) -> nn.Module`",
    "init": "initialisations: `(weight) -> None`, in place",
    "data_init": "initialisations from data: `(layer, inputs) -> None`, in place",
    "task": "tasks: `(shape, classes, output) -> Task`",
    "loss": "losses: `(outputs, targets) -> scalar`",
    "optim": "optimizers: `(params) -> torch.optim.Optimizer`",
    "schedule": "schedules: `(epoch, epochs) -> multiplier of the learning rate`",
    "feedback": "schedules that follow results: `(losses) -> multiplier of the learning rate`, a loss an epoch so far",
    "average": "averages of the weights: `(step, steps_per_epoch, epochs) -> share of the weights of that step`",
}

MOST_NAMES = 15  # in a message

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]


def most_like(word: str, candidates: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The candidate that is most like `word`, whatever the case of its letters; None where none is."""
    lower = {candidate.lower(): candidate for candidate in candidates}
    near = difflib.get_close_matches(word.lower(), lower, n=1, cutoff=cutoff)
    return lower[near[0]] if near else None


def nearest(word: str, candidates: Iterable[str]) -> str:
    """`; did you mean 'x'?` with the candidate that is most like `word`, or nothing where none is."""
    near = most_like(word, candidates)
    return f"; did you mean '{near}'?" if near else ""


def suggest(word: str, candidates: Iterable[str]) -> str:
    """The nearest candidate, else all of them, or as many as are read."""
    known = sorted(candidates)
    shown = ", ".join(known[:MOST_NAMES]) + (", …" if len(known) > MOST_NAMES else "")
    return nearest(word, known) or (f"; there is {shown}" if known else "")


class Settings(BaseModel):
    """Settings from YAML: no coercion, no unknown key, no change after loading."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    @model_validator(mode="wrap")
    @classmethod
    def _known_keys(cls, data: Any, handler: Callable[[Any], Any]) -> Any:
        if not isinstance(data, Mapping):
            raise PydanticCustomError("not_settings", "expected settings")
        return check_known(data, list(cls.model_fields), handler)


def check_known(data: Mapping[str, Any], known: list[str], handler: Callable[[Any], Any]) -> Any:
    """What `handler` makes of the data; raises ValidationError for its unknown keys and whatever is wrong besides."""
    unknown = [key for key in data if key not in known]
    if not unknown:
        return handler(data)
    names = [name for name in known if name.isidentifier()]  # others are the program's own, which no config has
    lines = [mistake("unknown_key", (key,), key, known=names) for key in unknown]
    try:
        handler({key: value for key, value in data.items() if key in known})
    except ValidationError as error:
        lines += [
            InitErrorDetails(
                type=PydanticCustomError(line["type"], line["msg"], line.get("ctx")),
                loc=line["loc"],
                input=line["input"],
            )
            for line in error.errors(include_url=False)[:100]  # more help nobody, and cost time at each level above
        ]
    raise ValidationError.from_exception_data("settings", lines)


def mistake(error: LiteralString, place: tuple[str, ...], value: Any, **facts: Any) -> InitErrorDetails:
    """One error for a ValidationError; `config` has the words for each."""
    return InitErrorDetails(type=PydanticCustomError(error, error, facts), loc=place, input=value)


@dataclass(frozen=True)
class Entry:
    """One registered component."""

    kind: str
    name: str
    factory: Callable[..., Any]
    arguments: type[Settings]  # one field per keyword-only argument
    summary: str  # the first line of its documentation
    facts: Mapping[str, Any]  # what else was registered with it

    def required(self) -> list[str]:
        return [name for name, field in self.arguments.model_fields.items() if field.is_required()]

    @cached_property
    def below_name(self) -> TypeAdapter[dict[str, Settings]]:
        """Checks `{name: arguments}`, so that the places of its errors have the name too."""
        return TypeAdapter(dict[str, self.arguments])  # type: ignore[name-defined]


_entries: dict[str, dict[str, Entry]] = {kind: {} for kind in KINDS}


def register(
    kind: str, name: str | None = None, settings: type[Settings] = Settings, **facts: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a component under its own name, or `name`.

    settings: what its settings are checked as, besides their types

    Raises ValueError where the kind is unknown, the name is taken, an argument has no annotation or is called `name`,
    which in a section of the config says which component it is.
    """
    if kind not in KINDS:
        raise ValueError(f"no kind of component is called {kind!r}{suggest(kind, KINDS)}")

    def decorate(factory: Callable[..., Any]) -> Callable[..., Any]:
        entry_name = name or factory.__name__
        summary, documented = read_docstring(inspect.getdoc(factory) or "")
        fields = {}
        for argument, annotation, default in _keyword_arguments(factory):
            field = Field(description=documented.get(argument))
            fields[argument] = (Annotated[annotation, field], ... if default is inspect.Parameter.empty else default)
        arguments = create_model(f"{kind} {entry_name}", __base__=settings, **fields)  # type: ignore[call-overload]
        add([Entry(kind, entry_name, factory, arguments, summary, facts)])
        return factory

    return decorate


def _keyword_arguments(factory: Callable[..., Any]) -> Iterable[tuple[str, Any, Any]]:
    """(name, annotation, default) of each keyword-only argument.

    Only these annotations are evaluated: evaluating a `torch.Tensor` among the others would import torch.
    """
    function = inspect.unwrap(factory.__init__ if inspect.isclass(factory) else factory)
    names = getattr(function, "__globals__", {})  # what an __init__ that a class inherits from C has none of
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            raise ValueError(f"{factory.__qualname__}: **{parameter.name} hides its arguments: name each")
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        if parameter.annotation is inspect.Parameter.empty:
            raise ValueError(f"{factory.__qualname__}: argument {parameter.name!r} needs a type annotation")
        if parameter.name == "name":
            raise ValueError(f"{factory.__qualname__}: an argument cannot be called 'name'")
        hints = get_type_hints(
            type("Hints", (), {"__annotations__": {parameter.name: parameter.annotation}}),
            globalns=dict(names),
            include_extras=True,
        )
        yield parameter.name, hints[parameter.name], parameter.default


def read_docstring(text: str) -> tuple[str, dict[str, str]]:
    """The first paragraph, and what each line `name: text` says (with its indented continuation lines)."""
    summary = text.split("\n\n")[0].replace("\n", " ")
    found = re.findall(r"^(\w+): (.+(?:\n +.+)*)", text, flags=re.MULTILINE)
    return summary, {name: re.sub(r"\s+", " ", body) for name, body in found}


def names(*kinds: str) -> list[str]:
    return sorted(name for kind in kinds for name in _entries[kind])


def entries(kind: str) -> list[Entry]:
    return [_entries[kind][name] for name in names(kind)]


def everything() -> list[Entry]:
    return [entry for kind in KINDS for entry in _entries[kind].values()]


def add(entries: Iterable[Entry]) -> None:
    """Registers what was removed.  Raises ValueError where a name is taken by now."""
    for entry in entries:
        if entry.name in _entries[entry.kind]:
            raise ValueError(f"{entry.kind} {entry.name!r} is registered twice")
        _entries[entry.kind][entry.name] = entry


def remove(entries: Iterable[Entry]) -> None:
    for entry in entries:
        if _entries[entry.kind].get(entry.name) is entry:
            del _entries[entry.kind][entry.name]


def find(name: str, *kinds: str) -> Entry:
    """The entry called `name`; raises KeyError whose text suggests the nearest name."""
    for kind in kinds:
        if name in _entries[kind]:
            return _entries[kind][name]
    raise KeyError(f"unknown {kinds[0]} '{name}'{suggest(name, names(*kinds))}")


@dataclass(frozen=True)
class Component:
    """A registered factory with its arguments from the config; calling it supplies the rest."""

    kind: str
    name: str
    args: Mapping[str, Any]

    @property
    def entry(self) -> Entry:
        return find(self.name, self.kind)

    def __call__(self, *positional: Any) -> Any:
        return self.entry.factory(*positional, **self.args)

    def build(self, *positional: Any) -> Any:
        """As calling it, but a ValueError becomes a ConfigError that names the component."""
        try:
            return self(*positional)
        except ValueError as error:
            raise ConfigError(f"{self.kind} {self.name}: {error}") from error

    def plain(self) -> dict[str, Any]:
        """The arguments as YAML would have them."""
        return dict(self.entry.arguments.model_construct(**self.args).model_dump())


def component(entry: Entry, arguments: Mapping[str, Any]) -> Component:
    """Checks the arguments against the signature; raises pydantic's ValidationError."""
    return _component(entry, entry.arguments.model_validate(dict(arguments)))


def _component(entry: Entry, checked: Settings) -> Component:
    return Component(entry.kind, entry.name, {name: getattr(checked, name) for name in entry.arguments.model_fields})


class _Written(ABC):
    """In an annotation: how a component of some kinds is written in YAML."""

    def __init__(self, *kinds: str) -> None:
        self.kinds = kinds

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            lambda value: value if isinstance(value, Component) else self.read(value),
            serialization=core_schema.plain_serializer_function_ser_schema(self.write),
        )

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        return {f"x-{type(self).__name__}": list(self.kinds)}  # schema.section() replaces this by a reference

    @abstractmethod
    def read(self, value: Any) -> Component:
        """The component that the value writes; raises ValidationError."""

    @abstractmethod
    def write(self, value: Component) -> Any:
        """As `read` reads it."""

    def entry(self, name: Any, place: tuple[str, ...] = ()) -> Entry:
        for kind in self.kinds:
            if isinstance(name, str) and name in _entries[kind]:
                return _entries[kind][name]
        raise self.wrong("unknown_name", place, name)

    def wrong(self, error: LiteralString, place: tuple[str, ...], value: Any) -> ValidationError:
        line = mistake(error, place, value, kind=self.kinds[0], known=names(*self.kinds))
        return ValidationError.from_exception_data("component", [line])


class Section(_Written):
    """A component that has a section of its own: `sgd`, or `{name: sgd, lr: 0.1}`.

    default: the component meant where the section names none, as in `{warmup_epochs: 2}` of a schedule
    """

    def __init__(self, *kinds: str, default: str | None = None) -> None:
        super().__init__(*kinds)
        self.default = default

    def read(self, value: Any) -> Component:
        entry, arguments = self.split(value)
        return component(entry, arguments)

    def split(self, value: Any) -> tuple[Entry, dict[str, Any]]:
        """The component that a section names, and its other settings."""
        if isinstance(value, str):
            return self.entry(value), {}
        if not isinstance(value, Mapping):
            raise self.wrong("not_a_section", (), value)
        if "name" in value:
            return self.entry(value["name"], ("name",)), {key: value[key] for key in value if key != "name"}
        if self.default is not None:
            entry = self.entry(self.default)
            if not most_like("name", value.keys() - entry.arguments.model_fields.keys(), cutoff=0.7):
                return entry, dict(value)
        raise self.wrong("no_name", ("name",), list(value))

    def write(self, value: Component) -> Any:
        return {"name": value.name, **value.plain()}


class Item(_Written):
    """A component in a list: `relu`, `{maxpool: 2}` (its first argument) or `{conv: {out: 32, kernel: 3}}`."""

    def read(self, value: Any) -> Component:
        if isinstance(value, str):
            value = {value: None}
        if not isinstance(value, Mapping) or not value:
            raise self.wrong("not_an_item", (), value)
        if len(value) > 1:
            raise self.wrong("several_keys", (), list(value))
        ((name, arguments),) = value.items()
        entry = self.entry(name)
        first = next(iter(entry.arguments.model_fields), None)
        if arguments is None:
            arguments = {}
        elif not isinstance(arguments, Mapping):
            if first is None:
                raise self.wrong("no_settings", (name,), arguments)
            arguments = {first: arguments}
        return _component(entry, entry.below_name.validate_python({name: arguments})[name])

    def write(self, value: Component) -> Any:
        return {value.name: value.plain()} if value.args else value.name


Activation = Annotated[Component, Item("activation")]
Layers = Annotated[list[Annotated[Component, Item("layer", "activation")]], Field(min_length=1)]
Augmentations = list[Annotated[Component, Item("augmentation", "mixing")]]
Init = Annotated[Component, Item("init", "data_init")]
