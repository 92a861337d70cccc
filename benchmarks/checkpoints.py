"""What checkpoints cost: of a run's time, to verify and load a large one, and to go on late in a run.

    python benchmarks/checkpoints.py [EPOCHS]

The first needs MNIST and CIFAR-10 (any copy) and trains both configs as they are shipped, or for EPOCHS epochs, which
makes the share of the save at the end larger.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.console import Console

from dltrain import checkpoint, rundir, runs, shipped, train
from dltrain import config as configs
from dltrain.rundir import RunFolder
from dltrain.yamlfile import parse

QUIET = Console(quiet=True)
SMALL = """
name: long
data: {name: digits, val: 200}
model: {name: mlp, hidden: [64], dropout: 0.2}
optim: {name: adamw, lr: 1.0e-3}
descent: {batch_size: 32}
train: {epochs: 400}
"""


def share_of_a_run(name: str, overrides: list[str], folder: Path) -> tuple[float, float, int]:
    """Seconds in saves, seconds of the whole run, and how many saves there were."""
    config = configs.load(shipped.find(name), ["data.verify=false", *overrides])
    saves, save = [], train._save

    def timed(*arguments: Any) -> None:
        start = perf_counter()
        save(*arguments)
        saves.append(perf_counter() - start)

    train._save = timed
    try:
        start = perf_counter()
        runs.start(config, RunFolder(folder / name, resume=False), QUIET, quiet=True)
        return sum(saves), perf_counter() - start, len(saves)
    finally:
        train._save = save


def loading(folder: Path) -> tuple[float, float, float, float]:
    """Of a checkpoint of 90 MB: its size in bytes, seconds to encode, to write to the disk, to verify and load."""
    tensors = {f"model.{number}": torch.randn(1_125_000) for number in range(20)}
    path, rows = folder / "large.safetensors", []
    for _ in range(5):
        times = [perf_counter()]
        content = checkpoint.encode(tensors, {"step": 1})
        times.append(perf_counter())
        rundir.write_atomically(path, content)
        times.append(perf_counter())
        checkpoint.read(path)
        times.append(perf_counter())
        rows.append([after - before for before, after in pairwise(times)])
    encode, write, read = (statistics.median(column) for column in zip(*rows, strict=True))
    return path.stat().st_size, encode, write, read


class _Reached(Exception):
    pass


class _Watched(RunFolder):
    """A folder whose run ends at the first log line of that step or a later one."""

    def __init__(self, path: Path, step: int) -> None:
        super().__init__(path, resume=True)
        self.step = step

    def append(self, record: dict[str, Any]) -> None:
        super().append(record)
        if record["step"] >= self.step:
            raise _Reached


def resuming(early: int, late: int, folder: Path) -> tuple[float, float]:
    """Seconds from taking the folder of a run that was killed after so many steps to its next step."""
    config = configs.check(parse(SMALL, "benchmark"), [f"train.checkpoint_every_steps={early}"])

    def go_on(name: str, until: int) -> float:
        begin = perf_counter()
        run = _Watched(folder / name, until)
        with contextlib.closing(run), contextlib.suppress(_Reached):
            if rundir.steps(run.path):
                runs.resume(run, lambda _: config, QUIET, quiet=True, allow_inexact=False)
            else:
                runs.start(config, run, QUIET, quiet=True)
        return perf_counter() - begin

    def here(*arguments: Any) -> None:
        raise _Reached

    go_on("late", until=early + 1)
    shutil.copytree(folder / "late", folder / "early")
    go_on("late", until=late + 1)
    loop, runs.train = runs.train, here
    rows = [(go_on("early", until=0), go_on("late", until=0)) for _ in range(10)]  # in turn: load slows both
    runs.train = loop
    return min(row[0] for row in rows), min(row[1] for row in rows)


def main() -> None:
    overrides = [f"train.epochs={sys.argv[1]}"] if len(sys.argv) > 1 else []
    load = os.getloadavg()[0]
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {os.cpu_count()} cores, load {load:.1f}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size, encode, write, read = loading(folder)
        print(f"{size / 1e6:.0f} MB: encode {encode:.2f} s, write {write:.2f} s, verify and load {read:.2f} s")
        early, late = resuming(100, 10_000, folder)
        ratio = late / early
        print(f"going on to the next step: {early:.3f} s at step 100, {late:.3f} s at step 10,000, ratio {ratio:.2f}")
        for config in ("mnist_mlp", "cifar10_cnn"):
            saving, whole, count = share_of_a_run(config, overrides, folder)
            print(f"{config}: {count} saves, {saving:.3f} s of {whole:.1f} s, {100 * saving / whole:.3f} %")


if __name__ == "__main__":
    main()
