"""An image folder: how long until it is ready, the first time and later, and how fast it trains against `cifar10`.

    python benchmarks/image_folder.py FOLDER [EPOCHS]

FOLDER holds train/<class>/… and test/<class>/…, images of one size.  What is decoded goes to a cache that is removed in
the end ($XDG_CACHE_HOME: on Linux); the system may hold the files themselves in memory from before.  What trains is a
perceptron, with batches of 128 that are flipped and shifted, so that an epoch is mostly the data's: on the folder, and
on `cifar10`, which must be in the data root ($DLTRAIN_DATA), in turn in one process.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import torch
from rich.console import Console

from dltrain import config as configs
from dltrain import rundir, runs
from dltrain.data.dataset import Dataset
from dltrain.data.files import Files, data_root
from dltrain.data.folder import folder
from dltrain.yamlfile import parse

# verify: another copy of CIFAR-10 is as fast
CONFIG = """
name: image_folder
data: {name: DATA, verify: false, augment: [flip, {translate: 4}]}
model: perceptron
optim: {name: sgd, lr: 0.01}
descent: {batch_size: 128}
"""


def ready(path: str) -> tuple[Dataset, float]:
    start = perf_counter()
    dataset = folder(Files(data_root()), path=path)
    return dataset, perf_counter() - start


def images_a_second(data: str, epochs: int) -> float:
    config = configs.check(parse(CONFIG.replace("DATA", data), "benchmark"), [f"train.epochs={epochs}"])
    with tempfile.TemporaryDirectory() as place:
        run = rundir.RunFolder(Path(place) / "run", resume=False)
        summary = runs.start(config, run, Console(quiet=True), quiet=True)
        run.close()
    return summary["images_per_second"]


def main() -> None:
    path = str(Path(sys.argv[1]).resolve())
    epochs = int(sys.argv[2]) if len(sys.argv) > 2 else 4
    with tempfile.TemporaryDirectory() as cache:
        os.environ["XDG_CACHE_HOME"] = cache
        dataset, seconds = ready(path)
        print(f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}, torch threads {torch.get_num_threads()}")
        print(f"{len(dataset.train) + len(dataset.test):,} images of {'x'.join(map(str, dataset.shape))}")
        print(f"ready the first time {seconds:.1f} s")
        print(f"ready later          {statistics.median(ready(path)[1] for _ in range(5)):.2f} s, median of 5")
        ours, other = [], []
        for _ in range(3):  # in turn, so that a machine that slows down slows both
            other.append(images_a_second("cifar10", epochs))
            ours.append(images_a_second(f"folder, path: {path!r}", epochs))
    one, two = statistics.median(ours), statistics.median(other)
    print(f"training, median of {len(ours)} runs of {epochs} epochs each, load {os.getloadavg()[0]:.1f}")
    print(f"folder  {one:,.0f} images/s")
    print(f"cifar10 {two:,.0f} images/s")
    print(f"ratio   {one / two:.2f}")


if __name__ == "__main__":
    main()
