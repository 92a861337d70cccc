"""Two processes of one thread against one process of two, on the CNN of configs/cifar10_cnn.yaml.

    OMP_NUM_THREADS=2 python benchmarks/processes.py [ROUNDS] [KEY=VALUE …]

It needs CIFAR-10 (any copy).  Each round trains both as shipped, but with batch norm's statistics of all images, one
after the other: images a second are of the median step, without the first.  Then once 50 steps of both in float32 with
plain descent, and how far their losses are apart: under the shipped recipe one process with one thread and one with two
are 1e-3 apart after five steps, since Muon makes as much of a small gradient's rounding as of a large gradient.
KEY=VALUE changes the config of all.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from dltrain import rundir

SETTINGS = (
    *("data.verify=false", "data.val=0", "data.limit=16000"),
    *("train.epochs=1", "train.log_every_steps=1", "train.sync_batchnorm=true"),
)
COMPARABLE = (
    *("train.precision=fp32", "optim={name: sgd, lr: 0.05, momentum: 0.9}"),
    *("data.limit=12500", "descent.batch_size=250"),
)
THREADS = 2


def steps(processes: int, folder: str, changes: list[str]) -> list[dict[str, Any]]:
    """The records of an epoch's steps, by so many processes that have THREADS threads together."""
    out = Path(folder) / str(processes)
    sets = [part for change in (*SETTINGS, *changes) for part in ("--set", change)]
    command = [sys.executable, "-m", "dltrain", "train", "cifar10_cnn", "--out", str(out), "-q", *sets]
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS // processes)}
    subprocess.run([*command, "--processes", str(processes)], env=environment, check=True, stdout=subprocess.DEVNULL)
    return [record for record in rundir.records(out) if record["kind"] == "step"]


def main(rounds: int, changes: list[str]) -> None:
    rates: dict[int, list[float]] = {1: [], 2: []}
    for number in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            for processes in (1, 2) if number % 2 else (2, 1):
                rates[processes] += [step["images_per_second"] for step in steps(processes, folder, changes)[1:]]
    one, two = (statistics.median(rates[processes]) for processes in (1, 2))
    print(f"one process, {THREADS} threads:   {one:,.0f} images/s ({len(rates[1])} steps)")
    print(f"two processes, 1 thread each: {two:,.0f} images/s, {two / one:.3f} times as many")
    with tempfile.TemporaryDirectory() as folder:
        runs = (steps(processes, folder, [*COMPARABLE, *changes]) for processes in (1, 2))
        apart = [abs(one["loss"] - two["loss"]) for one, two in zip(*runs, strict=True)]
    print(f"losses of {len(apart)} comparable steps: at most {max(apart):.1e} apart")


if __name__ == "__main__":
    main(int(next(iter(sys.argv[1:]), 1)), sys.argv[2:])
