"""SIGINT and SIGTERM between two runs of one process."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from dltrain.errors import Stopped


@contextmanager
def stop_at_signals() -> Iterator[None]:
    """Raises Stopped where SIGINT or SIGTERM comes; a run in training has its own way, which saves it first."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield
        return

    def receive(signum: int, frame: FrameType | None) -> None:
        raise Stopped("", signum)

    before = {signum: signal.signal(signum, receive) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
