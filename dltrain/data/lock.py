"""One process at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from dltrain.errors import OutputError


@contextlib.contextmanager
def alone(path: Path, doing: str, cannot: str, report: Callable[[str], None]) -> Iterator[None]:
    """Makes the folder of the lock file `path` and holds the lock, which is free again however the process ends.

    doing: what it is held for, as in "fetching x.gz", to be reported where this process must wait for another
    cannot: what is impossible, as in "cannot store a download there", where the folder cannot be written: OutputError
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            report(f"waiting for another process that is {doing}")
            lock.acquire()
    except OSError as error:
        raise OutputError(f"{path.parent}: {cannot}: {error.strerror or error}") from None
    try:
        yield
    finally:
        lock.release()
