"""The closed form beside configs/mnist_linear_regression.yaml: what least squares reach without any descent.

    python benchmarks/least_squares.py
    python benchmarks/least_squares.py mnist_linear_regression --set data.val=0

Solves for the weights and biases of least squared error between outputs and one-hot targets, on the images that the
config trains on, normalised as in training, by torch.linalg.lstsq in float64.  Of the weights that are equally good
(pixels that are black in every image decide nothing) it takes the smallest, which descent from zero nears too.  The
data must be in the data root.
"""

from __future__ import annotations

import argparse

import torch
from torch.nn import functional as F

from dltrain import config as configs
from dltrain import shipped
from dltrain.build import load_data
from dltrain.data.batches import Normalise
from dltrain.data.dataset import Split


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", nargs="?", default="mnist_linear_regression")
    parser.add_argument("--set", action="append", default=[], dest="settings")
    arguments = parser.parse_args()
    config = configs.load(shipped.find(arguments.name), arguments.settings)
    data = load_data(config, None, print)
    normalise = Normalise(data.normalisation, torch.device("cpu"), torch.contiguous_format)

    def rows(split: Split) -> torch.Tensor:
        """float64 `[N, pixels + 1]`: the last number, 1, is what the bias multiplies."""
        return F.pad(normalise(split.images).flatten(1), (0, 1), value=1).double()

    targets = F.one_hot(data.train.labels, len(data.classes)).double()
    weights = torch.linalg.lstsq(rows(data.train), targets, driver="gelsd").solution
    for name, split in data.splits.items():
        outputs = rows(split) @ weights
        error = F.mse_loss(outputs, F.one_hot(split.labels, len(data.classes)).double())
        accuracy = (outputs.argmax(1) == split.labels).double().mean()
        print(f"{name}: mean squared error {error:.4f}, accuracy {100 * accuracy:.2f} %")


if __name__ == "__main__":
    main()
