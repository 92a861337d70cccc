"""Commands of dltrain in forks of one process: a new process would spend a second or two on importing torch.

For programs that begin with `prepare()`, and never for pytest's own process: threads do not survive a fork.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import torch

from dltrain import cli
from dltrain.board import Board


def prepare() -> None:
    """One thread, and no pictures, which would be most of what a short run costs."""
    torch.set_num_threads(1)
    for drawing in ("_examples", "_pictures"):
        setattr(Board, drawing, lambda *arguments: None)


def run(arguments: list[str], before: Callable[[], object] = lambda: None) -> int:
    """A command's exit code, in a fork that calls `before` first; -9 where SIGKILL ended it."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            before()
            with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
                code = cli.run([*arguments, "--quiet"])
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
