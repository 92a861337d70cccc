"""A sweep's file: which config, which of its settings to search, and how; checked as strictly as a config."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, ValidationError
from pydantic_core import PydanticCustomError

from dltrain import config as configs
from dltrain import mistakes, shipped, yamlfile
from dltrain.config import Config
from dltrain.errors import ConfigError
from dltrain.mistakes import NAME
from dltrain.registry import NonNegativeInt, Positive, PositiveInt, Settings, nearest
from dltrain.yamlfile import Document, Place

MAX_POINTS = 10_000  # of a grid
# a trial is scored on val alone; pictures, and passes over other images, would be much of a short one's time
LEAN = (
    "tensorboard.pictures=false",
    "tensorboard.filters=false",
    "tensorboard.pr_curves=false",
    "evaluate.train=false",
    "evaluate.test=false",
)

Number = int | Annotated[float, Field(allow_inf_nan=False)]
Point = dict[str, int | float | str]  # for each key a number of its range, or the JSON of a value of its list


class Range(Settings):
    """Numbers from `low` to `high`, both included; whole ones where both are.

    low: the smallest
    high: the largest
    log: spread evenly over orders of magnitude
    step: only low, low + step, low + 2 step, …
    """

    low: Number
    high: Number
    log: bool = False
    step: Positive | None = None

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int)

    @property
    def spacing(self) -> int | float | None:
        """The step, whole where the numbers are; None of numbers in between."""
        return (int(self.step) if self.step else 1) if self.whole else self.step

    @property
    def last(self) -> int | float:
        """The largest number that the steps reach."""
        if not self.spacing:
            return self.high
        # a hair more, as the quotient of two decimals may come out a little below a whole number
        return _decimal(self.low + math.floor((self.high - self.low) / self.spacing + 1e-9) * self.spacing)


def _list_or_range(value: Any) -> Any:
    if not isinstance(value, list | Mapping):
        text = "a list of values, or {low: …, high: …}"
        raise PydanticCustomError("not_a_space", "{text}", {"text": text})
    return value


Space = Annotated[
    Annotated[Range, Tag("range")] | Annotated[list[Any], Field(min_length=1), Tag("list")],
    Discriminator(lambda value: "list" if isinstance(value, list) else "range"),
    BeforeValidator(_list_or_range),
]


class Sweep(Settings):
    """What to try.

    config: a config's file, named from the sweep's folder, or the name of a shipped one
    space: for each setting a list of values, or a range; a list of one value sets it for all trials
    trials: how many; a grid tries each point
    sampler: how the next settings are found: tpe (by the results so far, Bergstra et al. 2011), random or grid
    pruner: which trials are ended early by their val results: median (below the median of those before at the same
        epoch), halving (only the better part goes on, Li et al. 2020) or none; default: median, of a grid none
    optimise: val_accuracy (val_psnr of reconstruction) or val_loss, of the weights that a run keeps; default: what
        these are chosen by
    seed: where the sampler's randomness comes from
    name: what the sweep is called; default: the file's stem
    """

    config: str
    space: Annotated[dict[str, Space], Field(min_length=1)]
    trials: PositiveInt | None = None
    sampler: Literal["grid", "random", "tpe"] = "tpe"
    pruner: Literal["none", "median", "halving"] | None = None
    optimise: Literal["val_accuracy", "val_psnr", "val_loss"] | None = None
    seed: NonNegativeInt = 0
    name: Annotated[str, Field(pattern=NAME)] | None = None


@dataclass(frozen=True)
class Plan:
    """A sweep that is checked.

    optimise: val_ and the name of a score, or val_loss
    trials: how many; of a grid, its points
    base: the config as it is without the space
    """

    path: Path
    sweep: Sweep
    base: Config
    trials: int
    optimise: str
    document: Document  # the config's, as written
    find_plugin: Callable[[str], Path]

    @property
    def name(self) -> str:
        return self.sweep.name or self.path.stem

    @property
    def maximised(self) -> bool:
        return self.optimise != "val_loss"

    @property
    def pruner(self) -> str:
        return self.sweep.pruner or ("none" if self.sweep.sampler == "grid" else "median")

    def config(self, point: Point, *overrides: str) -> Config:
        """The config of a point, with overrides that come before it.  Raises ConfigError."""
        return configs.check(self.document, [*overrides, *_settings(point)], self.find_plugin)

    def point(self, number: int) -> Point:
        """The point of a grid with this number."""
        ways = [_grid_values(space) for space in self.sweep.space.values()]
        places = []
        for way in reversed(ways):
            number, place = divmod(number, len(way))
            places.append(way[place])
        return dict(zip(self.sweep.space, reversed(places), strict=True))

    def plain(self) -> dict[str, Any]:
        """What its trials depend on, whichever machine they run on."""
        config = self.base.plain()
        config["plugins"] = [Path(name).name for name in config["plugins"]]
        config["data"].pop("root")
        config["train"].pop("device")
        sweep = self.sweep.model_dump(include={"space", "sampler", "seed"})
        return {"config": config, **sweep, "pruner": self.pruner, "optimise": self.optimise}


def plain(point: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a point, as YAML has them."""
    return {key: json.loads(value) if isinstance(value, str) else value for key, value in point.items()}


def choices(values: Sequence[Any]) -> list[str]:
    """The values of a list as text, which any storage keeps and an override takes."""
    return [json.dumps(value, ensure_ascii=False) for value in values]


def _settings(point: Point) -> list[str]:
    return [f"{key}={value}" for key, value in point.items()]


def _grid_values(space: Range | list[Any]) -> Sequence[int | float | str]:
    if isinstance(space, list):
        return choices(space)
    spacing = space.spacing or 1
    count = round((space.last - space.low) / spacing) + 1
    return [_decimal(space.low + number * spacing) for number in range(count)]


def _decimal(value: int | float) -> int | float:
    """Without what adding decimals leaves behind: 0.3 and not 0.30000000000000004."""
    return value if isinstance(value, int) else float(f"{value:.14g}")


def find(name: str) -> Path:
    """The file that a user means by a path, or by the name of a shipped sweep.  Raises ConfigError."""
    path, folder = Path(name), shipped.folder() / "sweeps"
    if path.exists():
        return path
    known = sorted(each.stem for each in folder.glob("*.yaml"))
    if name in known:
        return folder / f"{name}.yaml"
    hint = nearest(path.stem, known)
    raise ConfigError(f"{name}: no such file, and no sweep of that name comes with dltrain{hint}")


def load(path: Path) -> Plan:
    """Reads a sweep's file and its config, and tries each value of the space; raises ConfigError, a line a mistake."""
    document = yamlfile.read(path)
    if not isinstance(document.data, dict):
        raise ConfigError(f"{document.where(())}: a sweep is a mapping (key: value), with config and space")
    try:
        sweep = Sweep.model_validate(document.data)
    except ValidationError as error:
        found = mistakes.find(error, document.data)
        places = sorted(found, key=document.line)[: configs.MAX_ERRORS]
        lines = [f"{document.where(place)}: {mistakes.key(place)}: {mistakes.wrong(found[place])}" for place in places]
        raise ConfigError("\n".join(lines)) from None
    if wrong := [f"{document.where(place)}: {mistakes.key(place)}: {text}" for place, text in _disagreements(sweep)]:
        raise ConfigError("\n".join(wrong[: configs.MAX_ERRORS]))
    beside = path.parent / sweep.config
    try:
        config_path = shipped.find(str(beside) if beside.exists() else sweep.config)
    except ConfigError as error:
        raise ConfigError(f"{document.where(('config',))}: config: {error}") from None
    base = configs.load(config_path)
    written = yamlfile.read(config_path)
    written.data.setdefault("name", base.name)
    if sweep.sampler == "grid":
        trials = math.prod(len(_grid_values(space)) for space in sweep.space.values())
    else:
        trials = sweep.trials or 0
    plan = Plan(path, sweep, base, trials, "", written, lambda name: config_path.parent / Path(name).expanduser())
    return dataclasses.replace(plan, optimise=_objective(plan, document))


def _disagreements(sweep: Sweep) -> Iterator[tuple[Place, str]]:
    """What is right by itself, but not together."""
    grid, points = sweep.sampler == "grid", 1
    for key, space in sweep.space.items():
        place: Place = ("space", key)
        if isinstance(space, list):
            texts = choices(space)
            if twice := next((text for index, text in enumerate(texts) if text in texts[:index]), None):
                yield place, f"{mistakes.printable(twice)} stands twice"
            points *= len(space)
            continue
        if space.low >= space.high:
            yield (*place, "high"), f"expected more than low, which is {space.low:g}, got {space.high:g}"
        elif space.log and space.low <= 0:
            yield (*place, "low"), f"expected more than 0, as log: true says, got {space.low:g}"
        elif space.log and (space.step or grid):
            yield (*place, "log"), "has no steps: leave step out, or list the values of a grid"
        elif space.whole and space.step and not float(space.step).is_integer():
            yield (*place, "step"), f"expected a whole number, as low and high are, got {space.step:g}"
        elif grid and not space.spacing:
            yield (*place, "step"), "missing: a grid has steps, or a list of values"
        else:
            points *= round((space.last - space.low) / (space.spacing or 1)) + 1 if grid else 1
    if grid and sweep.trials:
        yield ("trials",), f"a grid tries each of its {points:,} points: leave it out"
    elif grid and points > MAX_POINTS:
        yield ("space",), f"{points:,} points, at most {MAX_POINTS:,}: sampler random or tpe tries some of them"
    elif not grid and not sweep.trials:
        yield ("trials",), "missing: how many settings to try"


def _objective(plan: Plan, document: Document) -> str:
    """Tries each value of the space, of a range its ends, and gives what is optimised.

    A list of one value holds while the others are tried.
    """
    ways = {
        key: choices(space) if isinstance(space, list) else [space.low, space.last]
        for key, space in plan.sweep.space.items()
    }
    fixed: Point = {key: values[0] for key, values in ways.items() if len(values) == 1}
    points = [fixed, *({**fixed, key: value} for key, values in ways.items() if len(values) > 1 for value in values)]
    wrong: list[str] = []
    chosen_by = ""
    for point in points:
        last = next(reversed(point), "")
        try:
            config = plan.config(point)
        except ConfigError as error:
            wrong += [_said(line, point, last, document) for line in str(error).splitlines()]
            continue
        if not config.data.val:
            place = ("space", "data.val") if "data.val" in point else ("config",)
            text = "no images are held out to compare trials by: set data.val, e.g. to 0.1; the test split is no choice"
            wrong.append(f"{document.where(place)}: {place[0]}: {text}")
        known = f"val_{config.task.entry.facts['score']}"
        if plan.sweep.optimise not in (None, known, "val_loss"):
            text = f"expected {known} or val_loss of {config.task.name}, got {plan.sweep.optimise}"
            wrong.append(f"{document.where(('optimise',))}: optimise: {text}")
        chosen_by = chosen_by or config.chosen_by
    if wrong:
        raise ConfigError("\n".join(list(dict.fromkeys(wrong))[: configs.MAX_ERRORS]))
    if not plan.sweep.optimise and chosen_by == "last":
        text = "missing: what trials are compared by, as the config keeps the last weights whatever they score"
        raise ConfigError(f"{document.where(())}: optimise: {text}")
    return plan.sweep.optimise or chosen_by


def _said(line: str, point: Point, last: str, document: Document) -> str:
    """What is wrong with a config, at the line of the setting that makes it so."""
    for key, value in point.items():
        said = f"--set {mistakes.printable(f'{key}={value}', 80)}: "
        if line.startswith(said):
            return f"{document.where(('space', key))}: space: {line.removeprefix(said)}"
    return f"{document.where(('space', last))}: space: {last}={point[last]}: {line}" if last else line
