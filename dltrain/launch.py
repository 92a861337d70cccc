"""Starts the processes of one run on this machine, and ends them all where one ends in error."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from types import FrameType
from typing import IO

from dltrain.errors import DeviceError

PARENT = "DLTRAIN_PARENT"  # of a process that is started here: what it reads from until this process is gone
LOST = 125  # the exit code of a process that only says that another one has gone
GRACE = 5.0  # seconds, to end after another one has


def launch(arguments: Sequence[str], processes: int) -> int:
    """Runs `dltrain` with these arguments in so many processes and gives the exit code; the first one's output is ours.

    SIGINT and SIGTERM are passed on.  Each process gets its share of the cores unless OMP_NUM_THREADS says otherwise.

    Raises DeviceError where a process is ended by a signal that is not ours.
    """
    stays, ends = os.pipe()
    environment = {
        "OMP_NUM_THREADS": str(max(1, _cores() // processes)),
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        PARENT: str(stays),
    }
    with ExitStack() as stack:
        said: list[IO[bytes]] = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(processes)]
        children: list[subprocess.Popen[bytes]] = []

        def pass_on(signum: int, frame: FrameType | None) -> None:
            for child in children:
                child.send_signal(signum)

        for signum in (signal.SIGINT, signal.SIGTERM):
            before = signal.signal(signum, pass_on)
            stack.callback(signal.signal, signum, before)
        try:
            for rank in range(processes):
                children.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "dltrain", *arguments],
                        env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdout=subprocess.DEVNULL if rank else None,
                        stderr=said[rank] if rank else None,
                        pass_fds=[stays],
                        process_group=0,  # a terminal's Ctrl-C comes here alone, and is passed on once
                    )
                )
            codes = _wait(children)
        finally:
            for child in children:
                child.kill()
                child.wait()
            os.close(stays)
            os.close(ends)
        if codes[0] is not None and 0 <= codes[0] != LOST and (codes[0] or not any(codes)):
            return codes[0]
        for rank, code in enumerate(codes):
            if code is not None and code < 0:
                name = signal.Signals(-code).name
                mend = (
                    "if memory ran out, start fewer; a run that was training goes on with: dltrain train --resume RUN"
                )
                raise DeviceError(
                    f"process {rank} of {processes} was ended by {name}, and the others with it; {mend} --processes …"
                )
        for rank, code in enumerate(codes):
            if code not in (None, 0, LOST):
                said[rank].seek(0)
                sys.stderr.write(said[rank].read().decode(errors="replace"))
                return int(code)
        raise DeviceError(f"the {processes} processes lost each other; go on with: dltrain train --resume RUN")


def _wait(children: Sequence[subprocess.Popen[bytes]]) -> list[int | None]:
    """The exit codes once all have ended, or some seconds after one did in error: None of those that still run."""
    deadline = float("inf")
    while True:
        codes = [child.poll() for child in children]
        if any(codes):
            deadline = min(deadline, time.monotonic() + GRACE)
        if None not in codes or time.monotonic() > deadline:
            return codes
        time.sleep(0.05)


def is_started_here() -> bool:
    """Whether `launch` started this process."""
    return PARENT in os.environ


def follow() -> None:
    """Ends this process at once when the one that started it has gone, however that ended.

    And leaves out torch's warnings of what is known: that parameters are looked for, that a peer has gone.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before torch is imported

    def watch(handle: int) -> None:
        os.read(handle, 1)  # nothing is ever written: it returns when the other end is closed
        os._exit(LOST)

    if is_started_here():
        threading.Thread(target=watch, args=(int(os.environ[PARENT]),), daemon=True).start()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port
