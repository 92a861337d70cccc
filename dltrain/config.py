"""The config: one YAML file, checked before anything is read or computed.

`load` reads a file, applies `--set` overrides, checks everything and says what is wrong with file, line and the nearest
valid name.  The checks of a component's settings come from its signature (see registry).  This module imports no torch.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, ValidationError, model_serializer, model_validator
from pydantic_core import PydanticCustomError

import dltrain.components  # noqa: F401  registers what a config can name
from dltrain import registry, yamlfile
from dltrain.errors import ConfigError
from dltrain.registry import (
    Augmentations,
    Component,
    NonNegativeInt,
    Positive,
    PositiveInt,
    Section,
    Settings,
    known_keys,
    nearest,
)
from dltrain.yamlfile import Document, Place

MAX_ERRORS = 5


def _name(name: str) -> str:
    if not re.fullmatch(r"\w[\w.-]{0,99}", name):  # it becomes the name of a folder
        raise PydanticCustomError("name", "expected letters, digits, '_', '.' and '-'")
    return name


def _device(device: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,3})?", device):
        raise PydanticCustomError("device", "expected auto, cpu, mps, cuda or cuda:N")
    return device


class _Shared(Settings):
    """A section whose settings are partly the component's and partly the same for every component of the kind."""

    source: Annotated[Component, Section("")]

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        written = cls.written()
        if isinstance(data, str):
            data = {"name": data}
        if not isinstance(data, Mapping) or not isinstance(data.get("name"), str):
            raise PydanticCustomError(
                "not_a_section", "expected a name, or settings with `name:`{hint}", written.hint()
            )
        entry = written.entry(data["name"], ("name",))
        shared = [name for name in cls.model_fields if name != "source"]
        known_keys(data, ["name", *shared, *entry.arguments.model_fields])
        split = {key: data[key] for key in shared if key in data}
        return {**split, "source": {key: data[key] for key in data if key not in shared}}

    @model_serializer
    def _plain(self) -> dict[str, Any]:
        shared = {name: getattr(self, name) for name in type(self).model_fields if name != "source"}
        written = self.written().write(self.source)
        return {**written, **{name: _plain_value(value) for name, value in shared.items()}}

    @classmethod
    def written(cls) -> Section:
        return next(item for item in cls.model_fields["source"].metadata if isinstance(item, Section))


def _plain_value(value: Any) -> Any:
    """A shared setting as YAML would have it."""
    if isinstance(value, list):
        return [_plain_value(item) for item in value]
    return registry.Item(value.kind).write(value) if isinstance(value, Component) else value


class Data(_Shared):
    """What to train on.

    root: the folder that holds the data sets; default: $DLTRAIN_DATA, else the user's cache folder
    verify: compare the files with their published checksums
    val: images (or a fraction of the training images) held out to choose and stop by; 0: none
    classes: keep only these classes, by number or name, renumbered in this order
    limit: train on a seeded subset of this many images (before `val` is taken from them)
    augment: what is done to each batch of training images, in order
    """

    source: Annotated[Component, Section("data")]
    root: str | None = None
    verify: bool = True
    val: NonNegativeInt | Annotated[float, Field(gt=0, lt=1)] = 0
    classes: Annotated[list[NonNegativeInt | str], Field(min_length=2)] | None = None
    limit: PositiveInt | None = None
    augment: Augmentations = Field(default=[])


class Model(_Shared):
    """What maps images to outputs.

    output: what turns outputs into probabilities: softmax over the classes, or one sigmoid for two classes
    """

    source: Annotated[Component, Section("model")]
    output: Literal["softmax", "sigmoid"] = "softmax"


class Descent(Settings):
    """How many images make one step of gradient descent.

    variant: batch (all of them: one step an epoch), stochastic (one) or mini-batch
    batch_size: images in a mini-batch; default 128
    micro_batch_size: images that go through the model at once, their gradients summed to the same step; default: all of
        a mini-batch, 1000 of a batch
    """

    variant: Literal["batch", "stochastic", "mini-batch"] = "mini-batch"
    batch_size: PositiveInt | None = None
    micro_batch_size: PositiveInt | None = None

    @model_validator(mode="after")
    def _agrees(self) -> Descent:
        if self.batch_size is not None and self.variant != "mini-batch":
            text = "descent.batch_size belongs to variant mini-batch; batch takes all images, stochastic one"
            raise PydanticCustomError("batch_size", "{text}", {"text": text})
        return self

    def sizes(self, images: int) -> tuple[int, int]:
        """(images in a step, images that go through the model at once) for a training set of `images`."""
        step = {"batch": images, "stochastic": 1, "mini-batch": self.batch_size or 128}[self.variant]
        micro = self.micro_batch_size or (1000 if self.variant == "batch" else step)
        return step, min(micro, step)


class Train(Settings):
    """How to train.

    epochs: how often each training image is seen
    device: auto (CUDA, else MPS, else the CPU), cpu, cuda, cuda:N or mps
    precision: fp32, bf16 (bfloat16 autocast), or auto: bf16 where the device computes it faster
    memory_format: contiguous, channels_last, or auto: channels_last for convolutions
    deterministic: only algorithms that give the same bits each time (on CUDA some are slower; a CPU always does)
    clip_norm: scale the gradient down to this 2-norm where it is larger
    choose_by: which epoch's weights are kept as the best: by val_accuracy, val_loss, or the last; default: val_accuracy
        where `data.val` holds images out, else last
    patience_epochs: stop after this many epochs without a better one
    log_every_steps: steps between two log lines
    checkpoint_every_steps: save after every so many steps, besides the clock
    checkpoint_every_minutes: save when this much time has passed since the last save
    """

    epochs: PositiveInt = 10
    device: Annotated[str, AfterValidator(_device)] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    memory_format: Literal["auto", "contiguous", "channels_last"] = "auto"
    deterministic: bool = False
    clip_norm: Positive | None = None
    choose_by: Literal["val_accuracy", "val_loss", "last"] | None = None
    patience_epochs: PositiveInt | None = None
    log_every_steps: PositiveInt = 50
    checkpoint_every_steps: PositiveInt | None = None
    checkpoint_every_minutes: Positive = 1.0


def _default(kind: str, name: str) -> Any:
    return Field(default_factory=lambda: registry.component(registry.find(name, kind), {}))


class Config(Settings):
    """A whole config.

    name: what the run is called; default: the file's stem
    seed: where all randomness comes from
    """

    name: Annotated[str, AfterValidator(_name)]
    seed: NonNegativeInt = 0
    data: Data
    model: Model
    loss: Annotated[Component, Section("loss")] = _default("loss", "cross_entropy")
    descent: Descent = Descent()
    optim: Annotated[Component, Section("optim")]
    schedule: Annotated[Component, Section("schedule")] = _default("schedule", "constant")
    train: Train = Train()

    @model_validator(mode="after")
    def _agrees(self) -> Config:
        for key in ("choose_by", "patience_epochs"):
            if getattr(self.train, key) not in (None, "last") and not self.data.val:
                text = f"train.{key} needs images to choose by: set data.val, e.g. to 0.1"
                raise PydanticCustomError(key, "{text}", {"text": text})
        return self

    @property
    def chosen_by(self) -> str:
        """Which epoch's weights are kept: val_accuracy, val_loss or last."""
        return self.train.choose_by or ("val_accuracy" if self.data.val else "last")

    def plain(self) -> dict[str, Any]:
        """The whole config with every default, as YAML and JSON have it."""
        return self.model_dump()

    def yaml(self) -> str:
        return yaml.safe_dump(self.plain(), sort_keys=False, default_flow_style=None, width=100, allow_unicode=True)


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Reads, overrides and checks a config; raises ConfigError with one line per mistake."""
    document = yamlfile.read(path)
    if isinstance(document.data, dict):
        document.data.setdefault("name", path.stem)
    return check(document, overrides)


def from_plain(plain: Mapping[str, Any], source: str, overrides: Sequence[str] = ()) -> Config:
    """A config from what `plain()` gave, e.g. from a checkpoint."""
    return check(Document(source, copy.deepcopy(dict(plain))), overrides)


def check(document: Document, overrides: Sequence[str] = ()) -> Config:
    if not isinstance(document.data, dict):
        raise ConfigError(f"{document.where(())}: a config is a mapping (key: value), with data, model and optim")
    places = dict(override(document.data, text) for text in overrides)
    try:
        return Config.model_validate(document.data)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(error, document, places))) from None


def override(data: dict[str, Any], text: str) -> tuple[Place, str]:
    """Applies `key.key=value` to the data; returns the place and the text for messages."""
    key, equals, value = text.partition("=")
    where = f"--set {text}"
    if not equals or not all(key.split(".")):
        raise ConfigError(f"{where}: expected key=value, for example optim.lr=0.05")
    parsed = yamlfile.parse(value, where).data if value.strip() else None
    parts = key.split(".")
    place: list[str | int] = []
    node: Any = data
    for depth, part in enumerate(parts):
        step: Any = part
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                raise ConfigError(
                    f"{where}: {'.'.join(parts[:depth])} is a list of {len(node)}; expected 0..{len(node) - 1}"
                )
            step = int(part)
        place.append(step)
        if depth == len(parts) - 1:
            node[step] = parsed
            break
        child = node[step] if isinstance(node, list) else node.get(step)
        if child is None:
            child = {}
        elif isinstance(child, str):  # `optim: sgd` is short for `optim: {name: sgd}`, and `- relu` for `- relu: {}`
            child = {child: {}} if isinstance(node, list) else {"name": child}
        elif not isinstance(child, dict | list):
            raise ConfigError(f"{where}: {'.'.join(parts[: depth + 1])} is {child!r} and has nothing below it")
        node[step] = child
        node = child
    return tuple(place), where


_MESSAGES = {
    "missing": "missing",
    "int_type": "expected a whole number",
    "float_type": "expected a number",
    "string_type": "expected text",
    "bool_type": "expected true or false",
    "list_type": "expected a list",
    "greater_than": "expected more than {gt}",
    "greater_than_equal": "expected at least {ge}",
    "less_than": "expected less than {lt}",
    "less_than_equal": "expected at most {le}",
    "literal_error": "expected {expected}",
    "finite_number": "expected a finite number",
    "too_short": "expected at least {min_length} items",
}


def _explain(error: ValidationError, document: Document, overrides: Mapping[Place, str]) -> list[str]:
    """One line for each mistake: where, which key, what is wrong and what was found."""
    wrong: dict[Place, list[str]] = {}
    found: dict[Place, str] = {}
    for line in error.errors(include_url=False):
        place, value = _place(line["loc"], document.data)
        if line["type"] == "missing":
            place = (*place, line["loc"][-1])
        text = _MESSAGES.get(line["type"], line["msg"]).format(**line.get("ctx", {}))
        if text not in wrong.setdefault(place, []):
            wrong[place].append(text)
        if text.startswith("expected"):
            found[place] = f", got {_short(value)}"
        if line["type"] == "literal_error" and isinstance(value, str):
            found[place] += nearest(value, re.findall(r"'([^']*)'", line["ctx"]["expected"]))
    lines = []
    for place, texts in wrong.items():
        where = next((overrides[place[:end]] for end in range(len(place), 0, -1) if place[:end] in overrides), None)
        text = " or ".join([texts[0], *(text.removeprefix("expected ") for text in texts[1:])]) + found.get(place, "")
        key = ".".join(map(str, place))
        lines.append(f"{where or document.where(place)}: {key + ': ' if key else ''}{text}")
    if len(lines) > MAX_ERRORS:
        lines[MAX_ERRORS:] = [f"{document.source}: and {len(lines) - MAX_ERRORS} more mistakes"]
    return lines


def _place(loc: Sequence[str | int], data: Any) -> tuple[Place, Any]:
    """Where in the file pydantic's location points, its own names for unions and the like left out; and the value."""
    place: list[str | int] = []
    part: Any
    for part in loc:
        if (isinstance(data, dict) and part in data) or (isinstance(data, list) and isinstance(part, int)):
            data = data[part]
            place.append(part)
    return tuple(place), data


def _short(value: Any) -> str:
    text = {dict: "a mapping", list: "a list", type(None): "nothing", bool: str(value).lower()}.get(
        type(value), repr(value)
    )
    return text if len(text) <= 60 else f"{text[:57]}…"
