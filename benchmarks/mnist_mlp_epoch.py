"""An MNIST epoch of dltrain's loop against a bare PyTorch loop over tensors in memory.

    python benchmarks/mnist_mlp_epoch.py [EPOCHS]

Both train a 784-256-128-10 MLP on the 60,000 MNIST images with batches of 128 by SGD with momentum 0.9, in turn in one
process.  dltrain's epoch holds what its user gets: normalising, running loss and accuracy, the gradient's norm, log
lines, TensorBoard.  The bare loop does nothing but train, on images that were normalised before the clock starts.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import torch
from rich.console import Console

from dltrain import config as configs
from dltrain import rundir, runs
from dltrain.data.files import Files, data_root
from dltrain.data.mnist import mnist
from dltrain.yamlfile import parse

CONFIG = """
name: mnist_mlp_epoch
data: mnist
model: {name: mlp, hidden: [256, 128]}
optim: {name: sgd, lr: 0.05, momentum: 0.9}
descent: {batch_size: 128}
"""


def dltrain_epochs(epochs: int) -> list[float]:
    config = configs.check(parse(CONFIG, "benchmark"), [f"train.epochs={epochs}"])
    with tempfile.TemporaryDirectory() as folder:
        run = rundir.RunFolder(Path(folder) / "run", resume=False)
        runs.start(config, run, Console(quiet=True), quiet=True)
        seconds = [line["seconds"] for line in rundir.records(run.path) if line["kind"] == "epoch"]
        run.close()
    return seconds


def bare_epochs(epochs: int) -> list[float]:
    split = mnist(Files(data_root())).train
    images = (split.images.float() / 255 - 0.1307) / 0.3081
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Flatten(),
        torch.nn.Linear(784, 256),
        torch.nn.ReLU(),
        torch.nn.Linear(256, 128),
        torch.nn.ReLU(),
        torch.nn.Linear(128, 10),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    seconds = []
    for _ in range(epochs):
        start = perf_counter()
        for index in torch.randperm(len(images)).split(128):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images[index]), split.labels[index]).backward()
            optimizer.step()
        seconds.append(perf_counter() - start)
    return seconds


def main() -> None:
    epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    ours, bare = [], []
    for _ in range(3):  # in turn, so that a machine that slows down slows both
        bare += bare_epochs(epochs)[1:]
        ours += dltrain_epochs(epochs)[1:]
    one, other = statistics.median(ours), statistics.median(bare)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, median of {len(ours)} epochs each")
    print(f"dltrain   {one:.3f} s an epoch")
    print(f"bare loop {other:.3f} s an epoch")
    print(f"ratio     {one / other:.2f}")


if __name__ == "__main__":
    main()
