"""The config: one YAML file, checked before anything is read or computed.

`load` reads a file, applies `--set` overrides, checks everything and says what is wrong with file, line and the nearest
valid name.  The checks of a component's settings come from its signature (see registry).  This module imports no torch.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_serializer, model_validator

import dltrain.components  # noqa: F401  registers what a config can name
from dltrain import mistakes, registry, yamlfile
from dltrain import plugins as plugin_files
from dltrain.errors import ConfigError
from dltrain.mistakes import CUDA, NAME
from dltrain.registry import (
    Augmentations,
    Component,
    NonNegativeInt,
    Positive,
    PositiveInt,
    Section,
    Settings,
    check_known,
)
from dltrain.yamlfile import Document, Place

MAX_ERRORS = 5


class _Shared(Settings):
    """A section whose settings are partly the component's and partly the same for every component of the kind."""

    source: Annotated[Component, Section("")]

    @model_validator(mode="wrap")
    @classmethod
    def _known_keys(cls, data: Any, handler: Callable[[Any], Any]) -> Any:
        entry, settings = cls.written().split(data)
        shared = [field.alias or name for name, field in cls.model_fields.items() if name != "source"]

        def whole(known: Mapping[str, Any]) -> Any:
            source = {key: value for key, value in known.items() if key not in shared}
            return handler(
                {**{key: known[key] for key in shared if key in known}, "source": {"name": entry.name, **source}}
            )

        return check_known(settings, [*entry.arguments.model_fields, *shared], whole)

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
    if isinstance(value, Settings):
        return value.model_dump()
    return registry.Item(value.kind).write(value) if isinstance(value, Component) else value


class Data(_Shared):
    """What to train on.

    root: the folder that holds the data sets; default: $DLTRAIN_DATA, else the user's cache folder
    verify: compare the files with their published checksums
    val: images (or a fraction of the training images) held out to choose and stop by; 0: none
    classes: keep only these classes, by number or name, renumbered in this order
    limit: train on a seeded subset of this many images (before `val` is taken from them)
    balance: draw as many images of each class, so that those of rare ones come several times in an epoch
    resident: keep the training images on the device (true), or bring each batch there in the background (false), to the
        same results; auto: keep them where they take at most half of its free memory
    augment: what is done to each batch of training images, in order
    """

    source: Annotated[Component, Section("data")]
    root: str | None = None
    verify: bool = True
    val: NonNegativeInt | Annotated[float, Field(gt=0, lt=1)] = 0
    classes: Annotated[list[NonNegativeInt | str], Field(min_length=2)] | None = None
    limit: PositiveInt | None = None
    balance: bool = False
    resident: Literal["auto"] | bool = "auto"
    augment: Augmentations = Field(default=[])


class Model(_Shared):
    """What maps images to outputs.

    output: what turns outputs into probabilities: softmax over the classes, or one sigmoid for two classes; pixels of a
        reconstruction are of a sigmoid too
    frozen: parameters that stay as they are initialised, by patterns of their names such as `0_conv.*`; a normalisation
        all of whose parameters are frozen keeps its running statistics too
    """

    source: Annotated[Component, Section("model")]
    output: Literal["softmax", "sigmoid"] = "softmax"
    frozen: list[str] = Field(default=[])


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

    def sizes(self, images: int) -> tuple[int, int]:
        """(images in a step, images that go through the model at once) for a training set of `images`."""
        step = {"batch": images, "stochastic": 1, "mini-batch": self.batch_size or 128}[self.variant]
        micro = self.micro_batch_size or (1000 if self.variant == "batch" else step)
        return step, min(micro, step)


Schedule = Annotated[Component, Section("schedule", "feedback", default="constant")]


class Group(_Shared):
    """Parameters that are trained otherwise than the rest: those that fit all of match, kind and ndim.

    Besides these come settings of the optimizer, in place of its own, or another optimizer's `name` and settings.

    match: a pattern of their names, such as `*.bias` or `0_conv.*`; `dltrain train --dry-run` shows names
    kind: the kind of layer that they belong to
    ndim: how many dimensions they have: 1 for biases and normalisation, 2 for linear and 4 for convolution weights
    schedule: of their learning rate, in place of the config's
    """

    source: Annotated[Component, Section("optim")]  # with what it takes over from the optimizer it is a group of
    match: str | None = None
    kind: Literal["conv", "linear", "norm"] | None = None
    ndim: PositiveInt | None = None
    schedule: Schedule | None = None
    given: dict[str, Any] = Field(alias="as given")  # a key that no config has

    @model_serializer
    def _plain(self) -> dict[str, Any]:
        return self.given

    @classmethod
    def whole(cls, given: Any, beside: Mapping[str, Any]) -> Any:
        """What to check of a group as the config gives it, in an optimizer with the settings `beside`."""
        if not isinstance(given, Mapping):
            return given
        known = {repr(key) if key == "as given" else key: value for key, value in given.items()}
        return {**({} if "name" in given else beside), **known, "as given": dict(given)}


class Lookahead(Settings):
    """Every few steps the weights go back part of the way to where they were then (Zhang et al. 2019).

    every_steps: steps between two looks back
    share: of the way gone that is kept
    """

    every_steps: PositiveInt = 5
    share: Annotated[float, Field(gt=0, le=1)] = 0.5


class Optim(_Shared):
    """What a step makes of the gradient.

    groups: parameters with settings, an optimizer or a schedule of their own; the first that fits takes a parameter
    decay_norms_and_biases: whether weight decay also shrinks parameters of one dimension
    sam_rho: radius of sharpness-aware minimisation (Foret et al. 2021), e.g. 0.05; a step then takes two gradients
    lookahead: keep only part of the way that each few steps go
    """

    source: Annotated[Component, Section("optim")]
    groups: list[Group] = Field(default=[])
    decay_norms_and_biases: bool = True
    sam_rho: Positive | None = None
    lookahead: Lookahead | None = None

    @model_validator(mode="wrap")
    @classmethod
    def _with_groups(cls, data: Any, handler: Callable[[Any], Any]) -> Any:
        if not isinstance(data, Mapping) or not isinstance(data.get("groups"), list):
            return handler(data)
        alone = handler({key: data[key] for key in data if key != "groups"})  # its mistakes are not each group's too
        beside = {"name": alone.source.name, **{key: data[key] for key in data if key in alone.source.args}}
        return handler({**data, "groups": [Group.whole(group, beside) for group in data["groups"]]})


class Train(Settings):
    """How to train.

    epochs: how often each training image is seen
    device: auto (CUDA, else MPS, else the CPU), cpu, cuda, cuda:N or mps
    precision: fp32, bf16 (bfloat16 autocast), or auto: bf16 where the device computes it faster, by
        what it reports, else by timing a few steps
    memory_format: contiguous, channels_last, or auto: channels_last for convolutions
    compile: off, default or max-autotune (torch.compile's modes), or auto: off, but in a run of ten minutes and more
        default where a compiled step is measured to be faster
    deterministic: only algorithms that give the same bits each time (on CUDA some are slower; a CPU always does)
    clip_norm: scale the gradient down to this 2-norm where it is larger
    choose_by: which epoch's weights are kept as the best: by val_accuracy (val_psnr of reconstruction), val_loss, or
        the last; default: val_accuracy or val_psnr where `data.val` holds images out, else last
    patience_epochs: stop after this many epochs without a better one
    average: a running average of the weights, which is what is evaluated and kept
    log_every_steps: steps between two log lines
    checkpoint_every_steps: save after every so many steps, besides the clock
    checkpoint_every_minutes: save when this much time has passed since the last save
    sync_batchnorm: of several processes, take batch norm's statistics from the images of all, not of each; of one
        process it changes nothing
    """

    epochs: PositiveInt = 10
    device: Literal["auto", "cpu", "mps", "cuda"] | Annotated[str, Field(pattern=CUDA)] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    memory_format: Literal["auto", "contiguous", "channels_last"] = "auto"
    compile: Literal["auto", "off", "default", "max-autotune"] = "auto"
    deterministic: bool = False
    clip_norm: Positive | None = None
    choose_by: Literal["val_accuracy", "val_psnr", "val_loss", "last"] | None = None
    patience_epochs: PositiveInt | None = None
    average: Annotated[Component, Section("average")] | None = None
    log_every_steps: PositiveInt = 50
    checkpoint_every_steps: PositiveInt | None = None
    checkpoint_every_minutes: Positive = 1.0
    sync_batchnorm: bool = False


class View(Settings):
    """One view of an image: shifted, then mirrored.

    weight: of its outputs in the average; weights are divided by their sum
    mirror: left and right
    shift: by so many pixels [down, right]; negative: up, left
    pad: what comes in at the border: reflect (the image mirrored in its outermost pixels), replicate (those pixels
        again) or zero (black)
    """

    weight: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    mirror: bool = False
    shift: Annotated[list[int], Field(min_length=2, max_length=2)] = Field(default=[0, 0])
    pad: Literal["reflect", "replicate", "zero"] = "reflect"


class Evaluate(Settings):
    """How the chosen weights are scored at the end of a run, by `dltrain eval` and by `dltrain predict`.

    views: ways to show each image to the model, whose outputs are averaged; none: the image as it is; each view costs
        one more pass over the images (docs/evaluation.md)
    train: score the training split too, at the end of a run; it costs a pass over it
    test: score the test split, at the end of a run; not while settings are searched, which are chosen by val
    """

    views: list[View] = Field(default=[])
    train: bool = True
    test: bool = True


class TensorBoard(Settings):
    """What TensorBoard shows beside curves; docs/tensorboard.md says what each costs.

    pictures: training images as the model sees them, its graph, the confusion matrix and the worst mistakes
    weight_histograms: of each parameter, after each epoch
    gradient_histograms: of each parameter's gradient in the last step of an epoch, after each epoch
    filters: the first layer's weights as pictures, after epochs 1, 2, 4, 8, … and at the end
    pr_curves: precision against recall of each class on the test split, at the end
    embedding: what enters the last linear layer for up to 1,000 test images, at the end
    layers: norms of each parameter and its gradient, activations and dead units, after each epoch; metrics.jsonl has
        them too
    """

    pictures: bool = True
    weight_histograms: bool = False
    gradient_histograms: bool = False
    filters: bool = True
    pr_curves: bool = True
    embedding: bool = False
    layers: bool = False


def multiplier(schedule: Component, epoch: float, epochs: float, losses: Sequence[float]) -> float:
    """Of the learning rate at a position in the run, after epochs with these losses."""
    try:
        found: float = schedule(losses) if schedule.kind == "feedback" else schedule(epoch, epochs)
    except OverflowError:  # of a factor above 1, many times
        return math.inf
    return found


def _default(kind: str, name: str) -> Any:
    return Field(default_factory=lambda: registry.component(registry.find(name, kind), {}))


class Config(Settings):
    """A whole config.

    plugins: Python files with components of your own (docs/extending.md), named from the config's folder
    name: what the run is called; default: the file's stem
    seed: where all randomness comes from
    data: what to train on
    model: what maps images to outputs
    task: what the model is to make of an image
    loss: what is minimised
    descent: how many images make one step
    optim: what a step makes of the gradient
    schedule: how the learning rate changes over the run
    train: how long, on which device, and what is kept
    evaluate: how the chosen weights are scored
    tensorboard: what TensorBoard shows of the run
    """

    plugins: list[str] = Field(default=[])
    name: Annotated[str, Field(pattern=NAME)]
    seed: NonNegativeInt = 0
    data: Data
    model: Model
    task: Annotated[Component, Section("task", default="classification")] = _default("task", "classification")
    loss: Annotated[Component, Section("loss", default="cross_entropy")] = _default("loss", "cross_entropy")
    descent: Descent = Descent()
    optim: Optim
    schedule: Schedule = _default("schedule", "constant")
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    tensorboard: TensorBoard = TensorBoard()

    @property
    def chosen_by(self) -> str:
        """Which epoch's weights are kept: val_accuracy (val_psnr), val_loss or last."""
        return self.train.choose_by or (f"val_{self.task.entry.facts['score']}" if self.data.val else "last")

    def plain(self) -> dict[str, Any]:
        """The whole config with every default, as YAML and JSON have it."""
        return self.model_dump()

    def yaml(self) -> str:
        return yamlfile.dump(self.plain())


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Reads, overrides and checks a config; raises ConfigError with one line per mistake."""
    document = yamlfile.read(path)
    if isinstance(document.data, dict):
        document.data.setdefault("name", _as_name(path.stem))
    return check(document, overrides, lambda name: path.parent / Path(name).expanduser())


def _as_name(stem: str) -> str:
    stem = "".join(char if char.isalpha() or char.isdecimal() or char in "_.-" else "_" for char in stem)
    return re.sub(r"^[.-]", "_", stem)[:100]


def from_plain(
    plain: Mapping[str, Any], source: str, overrides: Sequence[str] = (), plugins: Sequence[Path] = ()
) -> Config:
    """A config from what `plain()` gave, e.g. from a checkpoint.

    plugins: files that the user has named, as no file may decide what code is run
    """

    def find_plugin(name: str) -> Path:
        found = next((path for path in plugins if path.name == Path(name).name), None)
        if found is None:
            text = "code of your own or of whoever made this; where you trust it, name it: --plugin"
            raise ConfigError(f"{source}: needs the plugin {Path(name).name}, {text} FILE")
        return found

    return check(Document(source, dict(plain)), overrides, find_plugin)


def _use_plugins(data: dict[str, Any], find: Callable[[str], Path]) -> None:
    """Makes known what the plugins register, and names each by where it is, for a run that goes on elsewhere."""
    named = data.get("plugins")
    if isinstance(named, list) and all(isinstance(name, str) for name in named):
        data["plugins"] = [str(find(name).absolute()) for name in named]
        plugin_files.use([Path(path) for path in data["plugins"]])
    else:
        plugin_files.use([])


def check(document: Document, overrides: Sequence[str] = (), find_plugin: Callable[[str], Path] = Path) -> Config:
    """Applies the overrides and checks everything; raises ConfigError with one line per mistake."""
    if not isinstance(document.data, dict):
        raise ConfigError(f"{document.where(())}: a config is a mapping (key: value), with data, model and optim")
    try:
        data = copy.deepcopy(document.data)
        puts = [override(data, text) for text in overrides]

        def where(place: Place) -> str:
            """The override that put a value there, else its line in the file."""
            last = next((text for put, text in reversed(puts) if place[: len(put)] == put), None)
            return last or document.where(place)

        _use_plugins(data, find_plugin)
        config = Config.model_validate(data)
    except RecursionError:  # no file nests so deep, but what comes from elsewhere may
        raise ConfigError(f"{document.source}: nested too deep") from None
    except ValidationError as error:
        found = mistakes.find(error, data)
        places = sorted(found, key=document.line)
        places, rest = places[:MAX_ERRORS], places[MAX_ERRORS:]
        lines = [f"{where(place)}: {mistakes.key(place)}: {mistakes.wrong(found[place])}" for place in places]
        if rest:
            lines.append(f"{document.source}: and {len(rest)} more")
    else:
        lines = [f"{where(place)}: {text}" for place, text in _disagreements(config)]
    if lines:
        raise ConfigError("\n".join(lines))
    return config


def _disagreements(config: Config) -> Iterator[tuple[Place, str]]:
    """Settings that are right, each for itself, but not together."""
    descent, train = config.descent, config.train
    if descent.batch_size and descent.variant != "mini-batch":
        text = "belongs to variant mini-batch (batch takes all images, stochastic one): leave it out, or null"
        yield ("descent", "batch_size"), f"descent.batch_size: {text}"
    elif descent.micro_batch_size and descent.variant != "batch" and descent.micro_batch_size > descent.sizes(1)[0]:
        text = f"expected at most the {descent.sizes(1)[0]} of a step, got {descent.micro_batch_size}"
        yield ("descent", "micro_batch_size"), f"descent.micro_batch_size: {text}"
    if config.data.balance and descent.variant == "batch":
        text = "draws some images more often than others, and batch descent takes each once: leave one of the two out"
        yield ("data", "balance"), f"data.balance: {text}"
    yield from _task_disagreements(config)
    needs = "needs images to choose by: set data.val, e.g. to 0.1"
    if train.choose_by not in (None, "last") and not config.data.val:
        yield ("train", "choose_by"), f"train.choose_by: {needs}"
    elif train.patience_epochs and not config.data.val:
        yield ("train", "patience_epochs"), f"train.patience_epochs: {needs}"
    elif train.patience_epochs and train.choose_by == "last":
        text = "nothing is better than the last epoch: set train.choose_by to val_accuracy or val_loss"
        yield ("train", "patience_epochs"), f"train.patience_epochs: {text}"
    averaging = [each.name for each, facts in _optimizers(config) if "averages" in facts]
    if config.optim.lookahead and averaging:
        text = f"{averaging[0]} keeps an average of its own, which lookahead would not reach: leave one of the two out"
        yield ("optim", "lookahead"), f"optim.lookahead: {text}"
    if train.average and averaging:
        text = f"{averaging[0]} is evaluated at an average of its own: leave one of the two out"
        yield ("train", "average"), f"train.average: {text}"
    schedules: list[tuple[Place, registry.Component]] = [(("schedule",), config.schedule)]
    for index, group in enumerate(config.optim.groups):
        if group.schedule:
            schedules.append((("optim", "groups", index, "schedule"), group.schedule))
        if group.match is None and group.kind is None and group.ndim is None:
            group_place: Place = ("optim", "groups", index)
            yield (
                group_place,
                f"{mistakes.key(group_place)}: expected match, kind or ndim, which say what parameters it takes",
            )
    for where, schedule in schedules:
        try:
            multiplier(schedule, 0.0, config.train.epochs, [])
        except ValueError as error:
            text = str(error).removeprefix("schedule.")
            key, colon, _ = text.partition(":")
            named = bool(colon) and key in schedule.args
            yield (*where, key) if named else where, f"{mistakes.key(where)}{'.' if named else ': '}{text}"
    yield from _closure_disagreements(config)


def _task_disagreements(config: Config) -> Iterator[tuple[Place, str]]:
    """What belongs to another task than the config's."""
    task, loss, chosen = config.task, config.loss, config.train.choose_by
    if task.name not in loss.entry.facts.get("tasks", ("classification",)):
        fitting = [each.name for each in registry.entries("loss") if task.name in each.facts.get("tasks", ())]
        known = f": set loss to {' or '.join(fitting)}" if fitting else ""
        yield ("loss",), f"loss: {loss.name} is not of {task.name}{known}"
    score = f"val_{task.entry.facts['score']}"
    if chosen not in (None, "last", "val_loss", score):
        text = f"expected {score}, val_loss or last of {task.name}, got {chosen}"
        yield ("train", "choose_by"), f"train.choose_by: {text}"
    if task.entry.facts["classifies"]:
        return
    text = f"needs an image to be of one class, and the task is {task.name}: leave it out"
    for index, each in enumerate(config.data.augment):
        if each.kind == "mixing":
            yield ("data", "augment", index), f"data.augment.{index}: {each.name} {text}"
    if config.data.balance:
        yield ("data", "balance"), f"data.balance: {text}"
    if config.evaluate.views:
        yield ("evaluate", "views"), f"evaluate.views: {text}"


def _optimizers(config: Config) -> Iterator[tuple[Component, Mapping[str, Any]]]:
    """Each optimizer of a config, and what else was registered with it."""
    for source in (config.optim.source, *(group.source for group in config.optim.groups)):
        yield source, source.entry.facts


def _closure_disagreements(config: Config) -> Iterator[tuple[Place, str]]:
    """What an optimizer that asks for the gradient several times in a step does not go with."""
    name = next((each.name for each, facts in _optimizers(config) if "closure" in facts), None)
    if name is None:
        return
    optim, train = config.optim, config.train
    if config.descent.variant != "batch":
        text = "compares losses within a step, which must be of all images: set descent.variant to batch"
        yield ("descent", "variant"), f"descent.variant: {name} {text}"
    for key, given in (("groups", optim.groups), ("sam_rho", optim.sam_rho), ("lookahead", optim.lookahead)):
        if given:
            yield ("optim", key), f"optim.{key}: {name} trains all parameters at once, and alone: leave it out"
    if train.clip_norm:
        yield ("train", "clip_norm"), f"train.clip_norm: {name} needs the gradient as it is: leave it out"


def override(data: dict[str, Any], text: str) -> tuple[Place, str]:
    """Applies `key.key=value` to the data; returns the place of all that it put there, and its name for messages."""
    key, equals, value = text.partition("=")
    where = f"--set {mistakes.printable(text, 80)}"
    *path, last = key.strip().split(".")
    if not equals or not all([*path, last]):
        raise ConfigError(f"{where}: expected key=value, for example optim.lr=0.05")
    try:
        parsed = yamlfile.parse(value, where).data if value.strip() else None
    except ConfigError as error:
        raise ConfigError(where + re.sub("^:[0-9]+", "", str(error).removeprefix(where))) from None
    place: list[str | int] = []
    put: Place = ()
    node: Any = data
    for part in path:
        step = _step(node, part, place, where)
        child = node.get(step) if isinstance(node, dict) else node[step]
        place.append(step)
        if child is None:
            child = {}
            put = put or tuple(place)
        elif isinstance(child, str) and len(place) == 1:  # `optim: sgd` is short for `optim: {name: sgd}`
            child = {"name": child}
        elif isinstance(child, str) and isinstance(node, list):  # and `- relu` for `- relu: {}`
            child = {child: {}}
        elif not isinstance(child, dict | list):
            found = f"{mistakes.key(place)} is {mistakes.short(child)}"
            raise ConfigError(f"{where}: {found} and has nothing below it; set it whole")
        node[step] = child
        node = child
    step = _step(node, last, place, where)
    node[step] = parsed
    return put or (*place, step), where


def _step(node: Any, part: str, place: Sequence[str | int], where: str) -> str | int:
    """The key, or the position in a list, that a part of an override's key means."""
    if isinstance(node, dict):
        return part
    if re.fullmatch("[0-9]{1,6}", part) and int(part) < len(node):
        return int(part)
    mend = f"expected 0..{len(node) - 1} after it, got {mistakes.short(part)}" if node else "set it whole"
    raise ConfigError(f"{where}: {mistakes.key(place)} is {mistakes.short(node)}; {mend}")
