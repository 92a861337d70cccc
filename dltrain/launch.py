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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
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
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads(processes)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }
    with ExitStack() as stack:
        said: list[IO[bytes]] = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(processes)]
        environments = [{**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
        codes = wait(stack.enter_context(children(arguments, environments, [None, *said[1:]])))
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


@contextmanager
def children(
    arguments: Sequence[str],
    environments: Sequence[Mapping[str, str]],
    said: Sequence[IO[bytes] | None],
    handles: Sequence[int] = (),
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """`dltrain` with these arguments, once in each environment; what still runs where the block is left is ended.

    SIGINT and SIGTERM are passed on.

    said: where each one's stderr goes, and its stdout nowhere; None: both are ours
    handles: open files that they have too
    """
    stays, ends = os.pipe()
    started: list[subprocess.Popen[bytes]] = []

    def pass_on(signum: int, frame: FrameType | None) -> None:
        for child in started:
            child.send_signal(signum)

    before = {signum: signal.signal(signum, pass_on) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        for environment, errors in zip(environments, said, strict=True):
            started.append(
                subprocess.Popen(
                    [sys.executable, "-m", "dltrain", *arguments],
                    env={**environment, PARENT: str(stays)},
                    stdout=subprocess.DEVNULL if errors else None,
                    stderr=errors,
                    pass_fds=[stays, *handles],
                    process_group=0,  # a terminal's Ctrl-C comes here alone, and is passed on once
                )
            )
        yield started
    finally:
        for child in started:
            child.kill()
            child.wait()
        os.close(stays)
        os.close(ends)
        for signum, handler in before.items():
            signal.signal(signum, handler)


def wait(children: Sequence[subprocess.Popen[bytes]], meanwhile: Callable[[], None] = lambda: None) -> list[int | None]:
    """The exit codes once all have ended, or some seconds after one did in error: None of those that still run.

    meanwhile: called again and again
    """
    deadline = float("inf")
    while True:
        codes = [child.poll() for child in children]
        meanwhile()
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


def workers(tasks: int) -> int:
    """How many processes so many tasks are shared by, where each can do with one core."""
    return min(_cores(), tasks)


def threads(processes: int) -> int:
    """The share of each process in the cores, unless OMP_NUM_THREADS says otherwise."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() else max(1, _cores() // processes)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def process_age() -> float:
    """Seconds since this process was started."""
    stat = Path("/proc/self/stat")
    if not stat.exists():
        import psutil

        return time.time() - psutil.Process().create_time()
    # counted from the boot, whose time Linux gives in whole seconds: the time of the start itself is that coarse
    ticks = int(stat.read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port
