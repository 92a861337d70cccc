"""`dltrain vary`: one config trained with each of several values of a key, or of two, from the same initial weights.

Each is a whole run as `dltrain train` makes it, in a folder of its own; all are made by one process, which reads the
data once.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from dltrain import config as configs
from dltrain import rundir, runs, yamlfile
from dltrain.build import build
from dltrain.config import Config
from dltrain.errors import ConfigError, DivergedError, DltrainError, RunTakenError, Stopped
from dltrain.mistakes import printable
from dltrain.sharing import Kept, read_once
from dltrain.tables import say

MOST_RUNS = 100
LONGEST_NAME = 60  # of a run's folder

Found = dict[str, Any]
Values = dict[str, str]  # key -> value, as YAML on one line


@dataclass(frozen=True)
class Point:
    """A run that is asked for: a value of each key, and the config with them.

    left_out: settings of the config that belong to other values than these, and are not used with them
    """

    values: Values
    config: Config
    left_out: Values
    path: Path

    @property
    def label(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.values.items())


def read_grid(asked: Sequence[str]) -> dict[str, list[str]]:
    """The values of each key, of texts `KEY=V1,V2`: YAML, separated by the commas outside brackets and quotes.

    Raises ConfigError for anything but one or two keys with two values or more each.
    """
    grid: dict[str, list[str]] = {}
    for text in asked:
        key, equals, listed = (part.strip() for part in text.partition("="))
        where = printable(text, 80)
        if not equals or not key:
            raise ConfigError(f"{where}: expected KEY=V1,V2, for example optim.lr=0.1,0.01; in quotes if it has spaces")
        if key in grid:
            raise ConfigError(f"{where}: {key} is varied twice: give all its values at once")
        try:
            values = [yamlfile.flow(value) for value in yamlfile.parse(f"[{listed}]", where).data]
        except ConfigError as error:  # its line says nothing here
            raise ConfigError(where + re.sub("^:[0-9]+", "", str(error).removeprefix(where))) from None
        if len(values) < 2:
            raise ConfigError(f"{where}: expected two values or more, separated by commas, got {len(values)}")
        if twice := [value for value, count in Counter(values).items() if count > 1]:
            raise ConfigError(f"{where}: {printable(twice[0])} stands twice")
        grid[key] = values
    if len(grid) > 2:
        raise ConfigError(f"{', '.join(grid)}: expected one key, or two for a grid; others are set by --set")
    if (count := math.prod(map(len, grid.values()))) > MOST_RUNS:
        raise ConfigError(f"{', '.join(grid)}: expected at most {MOST_RUNS} runs, got {count}")
    return grid


def folder_names(combinations: Sequence[Values]) -> list[str]:
    """What the folder of each run is called: its values, with a digest of them where that is no name or not its own."""
    short = [re.sub(r"[^\w.+-]+", "_", "__".join(values.values())).strip("_.") for values in combinations]
    counts = Counter(name.lower() for name in short)  # some file systems do not tell them apart
    return [
        name
        if 0 < len(name) <= LONGEST_NAME and counts[name.lower()] == 1
        else f"{name[:LONGEST_NAME]}-{hashlib.sha256(repr(values).encode()).hexdigest()[:8]}"
        for name, values in zip(short, combinations, strict=True)
    ]


def plan(path: Path, asked: Sequence[str], overrides: Sequence[str], out: Path | None) -> list[Point]:
    """The runs, one for each value or pair of values, their configs checked.

    out: the folder for them, which may hold some of them already; None: runs/<name>/vary-<time>

    Raises ConfigError, which names the values, for a config that is wrong; RunTakenError where `out` holds another run
    under the name of one of these.
    """
    grid = read_grid(asked)
    combinations = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    loaded = [(values, *_load(path, values, overrides)) for values in combinations]
    root = out or Path("runs") / loaded[0][1].name / time.strftime("vary-%Y-%m-%dT%H-%M-%S")
    kept: Kept = {}
    points = [
        Point(values, read_once(config, kept), left_out, root / name)
        for (values, config, left_out), name in zip(loaded, folder_names(combinations), strict=True)
    ]
    for point in points:
        _check_folder(point)
    return points


def _load(path: Path, values: Values, overrides: Sequence[str]) -> tuple[Config, Values]:
    """The config with these values, and what of it is left out for them."""
    own = [f"{key}={value}" for key, value in values.items()]
    left_out = _sizes_of_others(path, values, overrides)
    try:
        return configs.load(path, [*overrides, *own, *(f"{key}=null" for key in left_out)]), left_out
    except ConfigError as error:
        named = " ".join(own)
        mine = [f"--set {printable(text, 80)}: " for text in own]  # which were no --set to the user
        said = []
        for line in str(error).splitlines():
            where = next((each for each in mine if line.startswith(each)), "")
            said.append(f"{named}: {line.removeprefix(where)}")
        raise ConfigError("\n".join(said)) from None


def _sizes_of_others(path: Path, values: Values, overrides: Sequence[str]) -> Values:
    """The config's sizes that do not go with these values' variant of descent, where the variant is varied.

    `dltrain train` refuses a batch_size beside `variant: batch`; here it is meant for another of the values.
    """
    data = yamlfile.read(path).data
    if "descent.variant" not in values or not isinstance(data, dict):
        return {}
    for text in overrides:
        configs.override(data, text)
    descent = data.get("descent")
    sizes = {
        key: descent[key]
        for key in ("batch_size", "micro_batch_size")
        if isinstance(descent, dict) and isinstance(descent.get(key), int) and f"descent.{key}" not in values
    }
    variant = values["descent.variant"]
    step = {"stochastic": 1, "mini-batch": sizes.get("batch_size", 128)}.get(variant, math.inf)
    fits = {"batch_size": variant == "mini-batch", "micro_batch_size": sizes.get("micro_batch_size", 1) <= step}
    return {f"descent.{key}": str(size) for key, size in sizes.items() if not fits[key]}


def _check_folder(point: Point) -> None:
    """Raises RunTakenError where the point's folder holds a run of another config."""
    if not (point.path / "config.yaml").exists():
        return
    written = yamlfile.read(point.path / "config.yaml").data
    if others := runs.differences(written if isinstance(written, dict) else {}, point.config.plain()):
        text = f"holds a run of another config ({'; '.join(others[:3])})"
        raise RunTakenError(f"{point.path}: {text}: give another --out")


def vary(points: Sequence[Point], console: Console, quiet: bool) -> tuple[Found, DltrainError | None]:
    """Trains each point that is not trained yet: what was found, JSON-able, and what went wrong.

    Every one is built once before any is trained; raises ConfigError, which names the values, for one that cannot be.
    A stop by a signal, or an error of a run, ends it; a run that diverges does not: it is a row that says so, and of
    what is returned it is the error.
    """
    starts = [_start(point, lambda text: None if quiet else say(console, text)) for point in points]
    rows: list[Found] = []
    wrong: DltrainError | None = None
    for number, (point, start) in enumerate(zip(points, starts, strict=True), 1):
        if not quiet:
            say(console, f"{number} of {len(points)}: {point.label}")
        try:
            rows.append(_train(point, start, console, quiet))
        except (Stopped, KeyboardInterrupt) as stop:
            signum = stop.exit_code - 128 if isinstance(stop, Stopped) else signal.SIGINT
            wrong = Stopped(f"stopped in {point.label}: what is done is kept", signum)
            break
        except DltrainError as error:
            wrong = error
            break
    finished = [row for row in rows if not row["diverged"]]
    found = {
        "config": points[0].config.name,
        "keys": {key: list(dict.fromkeys(point.values[key] for point in points)) for key in points[0].values},
        "out": str(points[0].path.parent),
        "complete": wrong is None,
        "initial_weights": _same(starts),
        "score": starts[0].score,
        "score_split": "val" if finished and all(row["val"] for row in finished) else "test",
        "runs": rows,
    }
    diverged = [f"{row['label']} diverged: {row['diverged']}" for row in rows if row["diverged"]]
    return found, wrong or (DivergedError("\n".join(diverged)) if diverged else None)


@dataclass(frozen=True)
class _Start:
    """What a run begins with: images in its training split and in a step, and its parameters' shapes and digest.

    score: what its task says of a split
    """

    images: int
    step_size: int
    shapes: dict[str, tuple[int, ...]]
    weights: str
    score: str


def _start(point: Point, note: Callable[[str], None]) -> _Start:
    try:
        setup = build(point.config, note)
    except ConfigError as error:
        raise ConfigError(f"{point.label}: {error}") from None
    parameters = {name: each.detach().cpu() for name, each in setup.model.named_parameters()}
    digest = hashlib.sha256()
    for each in parameters.values():
        digest.update(each.contiguous().numpy().tobytes())
    shapes = {name: tuple(each.shape) for name, each in parameters.items()}
    return _Start(len(setup.data.train), setup.step_size, shapes, digest.hexdigest(), setup.task.score)


def _same(starts: Sequence[_Start]) -> str:
    """Whether all runs begin with the same weights: same, other shapes, or other numbers in the same shapes."""
    if any(each.shapes != starts[0].shapes for each in starts):
        return "other shapes"
    return "same" if len({each.weights for each in starts}) == 1 else "other numbers"


def _train(point: Point, start: _Start, console: Console, quiet: bool) -> Found:
    """Trains a point, or goes on with it, or takes it as it is where it is finished."""
    diverged = None
    summary = rundir.read_summary(point.path)
    if summary is None:
        with closing(rundir.RunFolder(point.path, resume=True)) as folder:
            try:
                if (point.path / "config.yaml").exists():
                    plugins = [Path(name) for name in point.config.plugins]
                    summary = runs.resume(folder, lambda before: point.config, console, quiet, False, plugins)
                else:
                    summary = runs.start(point.config, folder, console, quiet)
            except DivergedError as error:
                diverged = str(error).partition("; then: ")[0]
                if not quiet:
                    say(console, f"{point.label}: diverged")
    curve = _curve(point.path, start.images)
    last = curve[-1] if curve else None
    return {
        "label": point.label,
        "values": point.values,
        "left_out": point.left_out,
        "run": str(point.path),
        "diverged": diverged,
        "training_images": start.images,
        "step_size": start.step_size,
        "epochs": last["epoch"] if last else 0,
        "steps": last["step"] if last else 0,
        "seconds": last["seconds"] if last else 0.0,
        "train_loss": last["train_loss"] if last else None,
        "val": summary and summary["val"],
        "test": summary and summary["test"],
        "curve": curve,
    }


def _curve(run: Path, images: int) -> list[Found]:
    """The losses of each epoch of a run, with the steps, seconds of training and images so far."""
    curve, seconds = [], 0.0
    for record in rundir.records(run):
        if record["kind"] == "epoch":
            seconds += record["seconds"]
            at = {"epoch": record["epoch"], "step": record["step"], "images": record["epoch"] * images}
            losses = {f"{split}_loss": record[split] and record[split]["loss"] for split in ("train", "val")}
            curve.append({**at, "seconds": seconds, **losses})
    return curve


def trace(row: Found) -> list[Found]:
    """The training loss at each log line of a row's run, a mean since the line before, against what `curve` has."""
    steps_per_epoch = -(-row["training_images"] // row["step_size"])
    found, seconds, before = [], 0.0, 0
    for record in rundir.records(Path(row["run"])):
        if record["kind"] == "step":
            epochs, step = divmod(record["step"], steps_per_epoch)
            seen = epochs * row["training_images"] + step * row["step_size"]
            seconds += (seen - before) / record["images_per_second"]
            before = seen
            at = {"epoch": seen / row["training_images"], "seconds": seconds, "images": seen}
            found.append({**at, "train_loss": record["loss"]})
    return found
