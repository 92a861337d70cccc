"""The runs below a folder and how each stands, from their files alone: looking makes, changes and waits for nothing.

Files can be torn, of another version, or somebody else's; what they do not say is None.
"""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from dltrain import config as configs
from dltrain import rundir, yamlfile
from dltrain.errors import ConfigError

Found = dict[str, Any]
_T = TypeVar("_T")


def find(folder: Path, warn: Callable[[str], None]) -> list[Path]:
    """The folders of runs, in the order of their paths: `folder` itself, and those below it at any depth."""

    def unreadable(error: OSError) -> None:
        warn(f"{error.filename}: {error.strerror}: not looked into")

    found = []
    for path, below, _ in os.walk(folder, onerror=unreadable):
        if is_run(Path(path)):
            found.append(Path(path))
            below[:] = [name for name in below if name != "checkpoints"]
    return sorted(found)


def is_run(path: Path) -> bool:
    """Whether a folder is a run's: one that was begun, however far it came."""
    made = any((path / name).exists() for name in ("checkpoints", "metrics.jsonl", "summary.json"))
    return made and any((path / name).is_file() for name in ("config.yaml", ".lock"))


def read_config(path: Path) -> dict[str, Any]:
    """A run's config with every default of this version; as it is written where it is not valid here."""
    try:
        written = yamlfile.read(path / "config.yaml").data
    except ConfigError:
        return {}
    if not isinstance(written, dict):
        return {}
    try:
        return configs.from_plain(written, str(path)).plain()
    except ConfigError:  # a setting of another version, or a plugin, which is not run for this
        return written


def scores(of_split: Any) -> dict[str, float]:
    """The finite numbers among a split's scores, by name."""
    if not isinstance(of_split, Mapping):
        return {}
    return {name: float(value) for name, value in of_split.items() if _is_finite(value)}


def _is_finite(value: Any) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:  # of a whole number beyond them
        return False


def leading(names: Sequence[str]) -> str:
    """The score that runs are compared by: the accuracy; of a task that has none, what it has beside the loss."""
    return "accuracy" if "accuracy" in names else next((name for name in names if name != "loss"), "loss")


def rows(folder: Path, warn: Callable[[str], None]) -> list[Found]:
    """A row for each run below the folder, JSON-able, the one that was written to last at the end."""
    now = time.time()
    return sorted((row(path, folder, now) for path in find(folder, warn)), key=lambda each: -each["age_seconds"])


def row(path: Path, folder: Path, now: float) -> Found:
    """How a run stands: running, finished, failed, or stopped, which can be gone on with; or why that is not known."""
    found: Found = {
        **{"run": str(path), "below": str(path.relative_to(folder)), "config": None, "seed": None, "state": "unknown"},
        **{"reason": None, "epochs": None, "of_epochs": None, "best": None},
    }
    written = _last_write(path)
    try:
        found |= _stands(path)
    except OSError as error:
        found["reason"] = f"{error.filename}: {error.strerror}"
    last = datetime.fromtimestamp(written, UTC).isoformat(timespec="seconds")
    return {**found, "last_write": last, "age_seconds": round(max(now - written, 0.0), 1)}


def _stands(path: Path) -> Found:
    held = rundir.is_held(path)  # asked first: what a run writes as it ends is then there
    config, summary = read_config(path), rundir.read_summary(path)
    train = config.get("train")
    found: Found = {
        "config": _only(str, config.get("name")),
        "seed": _only(int, config.get("seed")),
        "of_epochs": _only(int, train.get("epochs")) if isinstance(train, dict) else None,
    }
    if summary and not held:
        best = _best("val", [summary]) or _best("test", [summary])
        return {**found, "state": "finished", "epochs": _only(int, summary.get("epochs")), "best": best}
    records = list(rundir.records(path)) if (path / "metrics.jsonl").is_file() else []
    ends = [record for record in records if record.get("kind") == "epoch"]
    found |= {"epochs": _only(int, ends[-1].get("epoch")) if ends else 0, "best": _best("val", ends)}
    if held:
        return {**found, "state": "running"}
    if records and records[-1].get("kind") == "failed":
        return {**found, "state": "failed", "reason": str(records[-1].get("error"))}
    if not rundir.steps(path):
        return {**found, "state": "failed", "reason": "ended before anything was saved"}
    return {**found, "state": "stopped"}


def _only(kind: type[_T], value: Any) -> _T | None:
    return value if type(value) is kind else None  # by type: true and false are no numbers here


def _best(split: str, records: Sequence[Mapping[str, Any]]) -> Found | None:
    """The best of the leading score of a split in these records: split, score and value."""
    found = [each for record in records if (each := scores(record.get(split)))]
    if not found:
        return None
    name = leading(list(found[0]))
    values = [each[name] for each in found if name in each]
    return {"split": split, "score": name, "value": min(values) if name == "loss" else max(values)}


def _last_write(path: Path) -> float:
    """Seconds since 1970, of the last change of a file of the run."""
    last = 0.0
    for folder in (path, path / "checkpoints"):
        with contextlib.suppress(OSError):  # a folder that cannot be read; a file that a run has removed meanwhile
            for each in folder.iterdir():
                if each.name != ".lock":
                    with contextlib.suppress(OSError):
                        last = max(last, each.stat().st_mtime)
    return last or time.time()
