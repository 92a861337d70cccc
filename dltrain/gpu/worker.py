"""A process of its own for what computes on a device: what crashes or hangs there does neither here.

A CUDA error stays with its process, where every later call fails too; a new process starts clean.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

from dltrain.errors import DeviceError

P = ParamSpec("P")
T = TypeVar("T")
GRACE = 5.0  # seconds that a process which closed its end is given to be gone


def first_line(error: BaseException | str) -> str:
    """Of the message: torch adds paragraphs of general advice to a CUDA error."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


class Gone(DeviceError):
    """The worker's process died, or did not answer in time."""


class Worker:
    """Computes what it is asked in another process, one question at a time; to be used in a `with` statement.

    torch is imported there at once, while this process does something else.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="dltrain-")
        self._log = Path(self._folder.name) / "log"
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # CUDA does not live through a fork
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, str(self._log)), daemon=True)
        self._process.start()
        theirs.close()  # else its end would never be seen

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
        self._folder.cleanup()

    def _stop(self) -> None:
        self._process.kill()
        self._process.join(GRACE)
        self._ours.close()

    def restart(self) -> None:
        """A new process, for the questions to come."""
        self._stop()
        self._start()

    def ask(self, timeout: float, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """What `function`, one of a module's, gives there.

        timeout: seconds until the answer; the first question also waits for the import of torch

        Raises Gone where no answer comes, DeviceError with the first line of the message where the function raises.
        """
        self.send(function, *args, **kwargs)
        return self.answer(timeout)  # type: ignore[no-any-return]

    def send(self, function: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> None:
        """Asks; `answer` gives the answer."""
        with contextlib.suppress(OSError):  # of a process that is gone, as `answer` will say
            self._ours.send((function, args, kwargs))

    def answer(self, timeout: float) -> Any:
        """The answer to what was sent; raises as `ask` does."""
        try:
            answered = self._ours.poll(timeout)
            found, trouble = self._ours.recv() if answered else (None, None)
        except (EOFError, OSError):
            self._process.join(GRACE)
            text = f"the process that used it died{self._last_words()}"
            self.restart()
            raise Gone(text) from None
        if not answered:
            self.restart()
            raise Gone(f"no answer in {timeout:.0f} s")
        if trouble is not None:
            raise DeviceError(trouble)
        return found

    def _last_words(self) -> str:
        code = self._process.exitcode
        how = f" of {signal.Signals(-code).name}" if code is not None and code < 0 else f" with exit code {code}"
        lines = self._log.read_text(errors="replace").split("\n") if self._log.exists() else []
        said = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"{how}: {said}" if said else how


def _serve(connection: Connection, log: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends this process
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for determinism; cuBLAS reads it at its first use
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):  # what a library prints belongs neither into our JSON nor between our lines
        os.dup2(descriptor, stream)
    warnings.simplefilter("ignore")
    try:
        import torch  # noqa: F401
    except Exception as error:  # a broken wheel: each question will say so
        print(first_line(error), file=sys.stderr)
    while True:
        try:
            function, args, kwargs = connection.recv()
        except EOFError:  # the parent is gone
            return
        answer: tuple[Any, str | None]
        try:
            answer = function(*args, **kwargs), None
        except Exception as error:  # whatever a driver or a wheel raises is told, not raised
            answer = None, first_line(error)
        connection.send(answer)
