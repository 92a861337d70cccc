"""`dltrain compare`: what runs differ in, what they came to, and whether that is more than chance.

Runs that differ in their seed alone are a group: its mean has an interval.  Groups are compared over their seeds, two
single runs image by image.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from dltrain import overview, registry, rundir
from dltrain.errors import ConfigError
from dltrain.statistics import difference, interval
from dltrain.text import shortened

# settings that change no score: what a run is called, where its data lies, what it writes and shows
ASIDE = [
    *("name", "data.root", "data.verify", "data.resident", "tensorboard"),
    *("evaluate.train", "evaluate.test"),
    *("train.log_every_steps", "train.checkpoint_every_steps", "train.checkpoint_every_minutes"),
]
# settings of data that change none of the images that a split is evaluated on
SAME_IMAGES = {"test": {"val", "limit", "augment", "balance"}, "val": {"augment", "balance"}}

Found = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """A finished run: its config but for what is aside, and its summary."""

    path: Path
    config: dict[str, Any]
    summary: dict[str, Any]

    @property
    def seed(self) -> int:
        return int(self.config["seed"])

    def scores(self, split: str) -> dict[str, float]:
        return overview.scores(self.summary.get(split))

    def row(self) -> Found:
        """JSON-able: where it is, what it took, and its scores on each split that it has been scored on."""
        splits = {split: found for split in ("train", "val", "test") if (found := self.scores(split))}
        took = overview.scores({key: self.summary.get(key) for key in ("epochs", "seconds")})
        chosen_by = str(self.summary.get("chosen_by"))
        none = {"epochs": None, "seconds": None}
        return {"run": str(self.path), "seed": self.seed, **none, **took, "chosen_by": chosen_by, **splits}


def gather(paths: Sequence[Path], split: str, warn: Callable[[str], None]) -> tuple[list[Result], list[str]]:
    """The finished runs that are named, and those below folders that are; and what is to be said of others there.

    Raises ConfigError where a path is neither, where a run that is named has no result, where no run is found or only
    one, or where their data is not the same.
    """
    found: dict[Path, Result] = {}
    notes = []
    for path in paths:
        if not path.is_dir():
            raise ConfigError(f"{path}: no such folder; expected a run's folder, or one with runs below it")
        is_run = overview.is_run(path)
        for each in [path] if is_run else overview.find(path, warn):
            result = _read(each, split)
            if isinstance(result, Result):
                found.setdefault(each.resolve(), result)
            elif is_run:
                raise ConfigError(result)
            else:
                notes.append(f"{result}: left out")
    results = list(found.values())
    if len(results) < 2:
        are = f"only one finished run, {results[0].path}" if results else "no finished run"
        raise ConfigError(f"{', '.join(map(str, paths))}: {are}: give two runs or more, or a folder of them")
    return results, [*notes, *_check_data(results, split)]


def _read(path: Path, split: str) -> Result | str:
    """A run's result, or why it has none to compare."""
    try:
        config, summary = overview.read_config(path), rundir.read_summary(path)
    except OSError as error:
        return f"{path}: {error.strerror}"
    if summary is None:
        return f"{path}: is not finished, and has no result yet"
    if type(config.get("seed")) is not int:
        return f"{path}: its config.yaml is missing or not readable"
    result = Result(path, _without(config, ASIDE), summary)
    if not result.scores(split):
        mend = "its config holds no images out (data.val)" if split == "val" else "its summary.json is not whole"
        if split == "test" and summary.get("test", "") is None:
            mend = "its config says evaluate.test: false; compare by --split val"
        return f"{path}: has no {split} score: {mend}"
    return result


def _without(config: dict[str, Any], keys: Sequence[str], place: str = "") -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if f"{place}{key}" not in keys}
    return {
        key: _without(value, keys, f"{place}{key}.") if isinstance(value, dict) else value
        for key, value in kept.items()
    }


def _check_data(results: Sequence[Result], split: str) -> Iterator[str]:
    """What is to be said of settings that may make the images others.

    Raises ConfigError where data set or classes are not the same.
    """
    first = results[0]
    for other in results[1:]:
        for key in ("name", "classes"):
            here, there = (_data(each).get(key) for each in (first, other))
            if here != there:
                text = f"data.{key} is {_value(there)}, in {first.path} it is {_value(here)}"
                raise ConfigError(f"{other.path}: {text}: give runs on the same data, for other images compare nothing")
    for key, values in differences([_data(each) for each in results], "data").items():
        if key.split(".")[1] not in SAME_IMAGES[split]:
            shown = ", ".join(dict.fromkeys(map(_value, values)))
            yield f"{key} differs ({shown}): the scores compare as far as the {split} images are the same"


def _data(result: Result) -> dict[str, Any]:
    data = result.config.get("data")
    return data if isinstance(data, dict) else {"name": data}


def differences(values: Sequence[Any], place: str = "") -> dict[str, list[Any]]:
    """The settings that are not the same in all: dotted key -> the value in each, None where it has none."""
    if all(value == values[0] for value in values):
        return {}
    if all(isinstance(value, dict) for value in values):
        keys: list[Any] = list(dict.fromkeys(key for value in values for key in value))
        inner = [[value.get(key) for value in values] for key in keys]
    elif all(isinstance(value, list) and len(value) == len(values[0]) for value in values) and any(
        isinstance(each, dict) for value in values for each in value
    ):
        keys, inner = list(range(len(values[0]))), [list(each) for each in zip(*values, strict=True)]
    else:
        return {place: list(values)}
    found: dict[str, list[Any]] = {}
    for key, each in zip(keys, inner, strict=True):
        found |= differences(each, f"{place}.{key}" if place else str(key))
    return found


def compare(
    paths: Sequence[Path],
    split: str,
    *,
    device: str,
    data_root: str | None,
    plugins: Sequence[Path],
    warn: Callable[[str], None],
) -> tuple[Found, Callable[[], bytes] | None]:
    """What there is to say of the runs, JSON-able, and what draws a figure of it as a PNG.

    Raises ConfigError where they cannot be compared; of two single runs also what `dltrain eval` raises of each.
    """
    results, notes = gather(paths, split, warn)
    groups, left_out = _groups(results)
    score = _score(results, split)
    found = over_seeds(groups, split, score)
    draw: Callable[[], bytes] | None = partial(_draw_groups, found)
    notes += left_out
    if [len(group) for group in groups] == [1, 1] and all(map(_classifies, results)):
        from dltrain import image_by_image

        pair = [each.path for (each,) in groups]
        test, draw = image_by_image.compare(pair, split, device, data_root, plugins, warn)
        found["comparisons"] = [{"first": "A", "second": "B", "score": score, **test}]
        notes.append("this is about these two trained models, not their settings: other seeds may turn it round")
    if len(groups) > 2:
        notes.append("each interval is of one comparison: of 20 between equals, one looks like a difference by chance")
        if split == "test":
            notes.append(
                "to choose one of these by its test score is to choose on the test split: choose by --split val, "
                "and report the test score of that one"
            )
    return {**found, "notes": notes}, draw


def _classifies(result: Result) -> bool:
    task = result.config.get("task")
    return isinstance(task, dict) and any(
        entry.name == task.get("name") and entry.facts["classifies"] for entry in registry.entries("task")
    )


def _score(results: Sequence[Result], split: str) -> str:
    """The score that all are compared by."""
    first, *others = ((each, overview.leading(list(each.scores(split)))) for each in results)
    for result, score in others:
        if score != first[1]:
            raise ConfigError(f"{result.path}: is scored by {score}, {first[0].path} by {first[1]}: nothing to compare")
    return first[1]


def _groups(results: Sequence[Result]) -> tuple[list[list[Result]], list[str]]:
    """The runs that differ in their seed alone together, by seed.

    A second run of the same seed is left out, and that is said: it shows nothing of the spread between seeds.
    """
    groups: dict[str, dict[int, Result]] = {}
    notes = []
    for result in results:
        group = groups.setdefault(json.dumps(_without(result.config, ["seed"]), sort_keys=True), {})
        if result.seed in group:
            notes.append(f"{result.path}: has config and seed of {group[result.seed].path}: left out")
        else:
            group[result.seed] = result
    return [[group[seed] for seed in sorted(group)] for group in groups.values()], notes


def over_seeds(groups: Sequence[Sequence[Result]], split: str, score: str) -> Found:
    """Each group with its scores, and what can be told of it against the first."""
    names = [_letters(number) for number in range(len(groups))]
    alone = all(len(group) == 1 for group in groups)
    differing = differences([each[0].config if alone else _without(each[0].config, ["seed"]) for each in groups])
    rows = [
        {
            "group": name,
            "settings": {key: values[number] for key, values in differing.items()},
            "scores": _summarised(group, split),
            "runs": [each.row() for each in group],
        }
        for number, (name, group) in enumerate(zip(names, groups, strict=True))
    ]
    comparisons = [
        _compared(names[0], groups[0], name, group, split, score)
        for name, group in zip(names[1:], groups[1:], strict=True)
    ]
    return {"split": split, "score": score, "groups": rows, "comparisons": comparisons}


def _draw_groups(found: Found) -> bytes:
    from dltrain import figures

    return figures.comparison(found)


def _letters(number: int) -> str:
    """A, B, …, Z, AA, AB, … for 0, 1, …"""
    before, last = divmod(number, 26)
    return (_letters(before - 1) if before else "") + chr(ord("A") + last)


def _summarised(group: Sequence[Result], split: str) -> Found:
    """The interval of each score that all runs of a group have."""
    found = [each.scores(split) for each in group]
    return {
        name: interval([scores[name] for scores in found])
        for name in found[0]
        if all(name in scores for scores in found)
    }


def _compared(
    first_name: str, first: Sequence[Result], name: str, group: Sequence[Result], split: str, score: str
) -> Found:
    """What the seeds of two groups tell of the difference between them, in numbers and in words."""
    values = [[each.scores(split)[score] for each in runs] for runs in (first, group)]
    paired = [each.seed for each in first] == [each.seed for each in group]
    found = difference(values[0], values[1], paired)
    test = None if found["half_width"] is None else "paired t" if paired else "Welch's t"
    words = _in_words(first_name, name, score, found, [len(first), len(group)])
    how = {"paired t": "; paired by seed", "Welch's t": "; Welch's t", None: ""}[test]
    return {"first": first_name, "second": name, "score": score, "test": test, **found, "words": f"{words}{how}"}


def _in_words(first: str, second: str, score: str, found: Found, counts: Sequence[int]) -> str:
    apart, half_width = found["difference"], found["half_width"]
    if half_width is None:
        why = "their seeds show no spread" if min(counts) > 1 else "a single seed shows no spread"
        return f"{second} - {first} is {amount(score, apart)}; whether that is chance cannot be told: {why}"
    if abs(apart) <= half_width:
        low, high = (amount(score, apart + sign * half_width, unit=False) for sign in (-1, 1))
        n = f"n = {counts[0]}" if counts[0] == counts[1] else f"n = {counts[0]} and {counts[1]}"
        at = f"{second} - {first} is {amount(score, apart)}, 95 % interval {low} to {high}"
        return f"no difference can be told between {first} and {second} at {n}: {at}"
    low, high = (amount(score, abs(apart) + sign * half_width, unit=False) for sign in (-1, 1))
    ahead, behind = (second, first) if (apart < 0) == (score == "loss") else (first, second)
    return f"{ahead} is better than {behind} by {amount(score, abs(apart))} (95 % interval {low} to {high})"


def amount(score: str, value: float, unit: bool = True) -> str:
    """A difference of scores: of accuracies in points of per cent."""
    scale, decimals, named = {"accuracy": (100, 2, " points"), "psnr": (1, 2, " dB")}.get(score, (1, 4, ""))
    return f"{round(scale * value, decimals) + 0.0:.{decimals}f}{named if unit else ''}"  # + 0.0: no -0.00


def _value(value: Any) -> str:
    return shortened(json.dumps(value, ensure_ascii=False), 40)
