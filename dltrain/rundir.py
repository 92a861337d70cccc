"""A run's folder: who may write to it, what lies where, and which checkpoint is the latest that is whole."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from dltrain.errors import CheckpointError, OtherFormatError, OutputError, RunTakenError

_T = TypeVar("_T")

SEEDS = "seeds.json"  # in the folder above the runs of several seeds: what they are, and what they came to
KEPT = 2  # checkpoints: the latest, and the one before in case the latest is damaged


def write_atomically(path: Path, content: bytes) -> None:
    """The whole content or nothing under the name, also after a power cut.

    Raises OutputError, with nothing left behind, where it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _fsync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OutputError(f"{path}: {error.strerror} (errno {error.errno})") from error


def _fsync_folder(folder: Path) -> None:
    """Makes a rename last.  Windows has no such call, and needs none."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def take(path: Path, below: str = "") -> FileLock:
    """Takes a folder for this process until the lock is released; makes it, and the one below it, if need be.

    Raises RunTakenError where another process holds it, OutputError where it cannot be written.
    """
    try:
        (path / below).mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / ".lock")
        lock.acquire(timeout=0.2)  # `is_held` of another process has it for an instant
        (path / ".lock").touch()
    except Timeout:
        raise RunTakenError(f"{path}: another process is training here; give this run a folder of its own") from None
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror} (errno {error.errno})") from error
    return lock


class RunFolder:
    """A run's folder, held by this process until `close`.

    The lock is the operating system's and goes with the process, however it ends.
    """

    def __init__(self, path: Path, resume: bool) -> None:
        """Takes the folder, making it if need be.

        Raises RunTakenError where another process holds it, or where it holds a run and `resume` is false;
        OutputError where it cannot be written.
        """
        self.path = path
        self.made = not path.exists()
        self.lock = take(path, "checkpoints")
        if (path / "config.yaml").exists() and not resume:
            self.close()
            raise RunTakenError(f"{path}: holds a run already; go on with it by --resume, or give another --out")
        for leftover in (*path.iterdir(), *self.checkpoints.iterdir()):
            if re.fullmatch(r"\..+\.[0-9a-f]{8}\.tmp", leftover.name):  # of a write_atomically that was killed
                leftover.unlink()

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def close(self) -> None:
        self.lock.release()

    def discard(self) -> None:
        """Takes back a folder in which nothing was trained: all of it where this process made it."""
        self.close()
        if self.made:
            shutil.rmtree(self.path)
        else:
            (self.path / ".lock").unlink(missing_ok=True)
            self.checkpoints.rmdir()

    def write(self, name: str, content: str | bytes) -> None:
        write_atomically(self.path / name, content.encode() if isinstance(content, str) else content)

    def remove(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    def append(self, record: dict[str, Any]) -> None:
        """Adds a line to metrics.jsonl."""
        path = self.path / "metrics.jsonl"
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise OutputError(f"{path}: {error.strerror} (errno {error.errno})") from error

    def forget_after(self, step: int) -> None:
        """Drops what belongs to later steps than the one training goes on from: metrics and broken saves."""
        for each in steps(self.path):
            if step_of(each) > step:
                each.unlink()
        kept = [json.dumps(record) for record in records(self.path) if record["step"] <= step]
        self.write("metrics.jsonl", "".join(f"{line}\n" for line in kept))

    def save(self, step: int, content: bytes) -> None:
        """Writes a step's checkpoint, and only then removes the oldest."""
        write_atomically(self.checkpoints / f"step-{step:09d}.safetensors", content)
        for old in steps(self.path)[KEPT:]:
            old.unlink()


class Reader(RunFolder):
    """A run's folder as those processes of the run have it that write nothing."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def close(self) -> None: ...
    def discard(self) -> None: ...
    def write(self, name: str, content: str | bytes) -> None: ...
    def append(self, record: dict[str, Any]) -> None: ...
    def forget_after(self, step: int) -> None: ...
    def save(self, step: int, content: bytes) -> None: ...
    def remove(self, name: str) -> None: ...


def is_held(path: Path) -> bool:
    """Whether a process trains in the folder, asked without making, changing or keeping anything."""
    if not (path / ".lock").is_file():
        return False
    if sys.platform == "win32":
        try:
            with FileLock(path / ".lock", blocking=False):
                return False
        except Timeout:
            return True
    import fcntl

    handle = os.open(path / ".lock", os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two that ask at once do not see each other
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def create(root: Path, name: str) -> RunFolder:
    """A new run's folder root/<name>/<time>."""
    folder = RunFolder(make(root, name), resume=False)
    folder.made = True
    return folder


def make(root: Path, name: str) -> Path:
    """A new folder root/<name>/<time>; two that start in the same second get two."""
    now = time.strftime("%Y-%m-%dT%H-%M-%S")
    for attempt in range(1, 1000):
        path = root / name / (now if attempt == 1 else f"{now}-{attempt}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise OutputError(f"{path}: cannot be written: {error.strerror} (errno {error.errno})") from error
        return path
    raise OutputError(f"{root / name}: a thousand runs started in this second")


def steps(path: Path) -> list[Path]:
    """The run's checkpoints, the highest step first: by step and not by time, which can jump."""
    found = [each for each in (path / "checkpoints").glob("step-*.safetensors") if re.fullmatch(r"step-\d+", each.stem)]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint's name says."""
    return int(checkpoint.stem.removeprefix("step-"))


def latest(path: Path, read: Callable[[Path], _T], warn: Callable[[str], None]) -> _T | None:
    """What `read` makes of the newest checkpoint that is whole; a broken one is warned of and passed over.

    Raises OtherFormatError where the newest is of another format: going on from an older one would lose what it holds.
    """
    waiting = steps(path)
    while waiting:
        each = waiting.pop(0)
        try:
            return read(each)
        except OtherFormatError:
            raise
        except CheckpointError as error:
            if each.exists():
                warn(f"{error}; it is passed over")
            else:  # a run that goes on meanwhile has removed it, after writing a newer one
                waiting = steps(path)
    return None


def holds_seeds(path: Path) -> bool:
    """Whether a folder is the one above the runs of several seeds."""
    return (path / SEEDS).is_file()


def read_summary(path: Path) -> dict[str, Any] | None:
    """A run's results; None where it has none yet, or what there is was cut off."""
    if not (path / "summary.json").is_file():
        return None
    try:
        summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None
    return summary if isinstance(summary, dict) else None


def records(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl; what is no record, as a last line that was cut off by a kill, is left out."""
    metrics = path / "metrics.jsonl"
    if not metrics.exists():
        return
    for line in metrics.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            yield record
