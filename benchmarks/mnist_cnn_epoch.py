"""An MNIST epoch of a CNN of two convolutions, conv32-relu-conv64-relu-maxpool-linear128-relu-linear10, against peers.

    python benchmarks/mnist_cnn_epoch.py [--only dltrain,bare] [--repeats 3] [--images 6000]

The convolutions are 3x3 without padding, as in PyTorch's MNIST example.  peers.py says who the peers are, what each
does and how they are timed; `pip install -e '.[bench]'` installs those that dltrain itself does not need.
"""

from __future__ import annotations

from typing import Any

import peers
from torch import nn

from dltrain.data.mnist import mnist

CONFIG = """
name: mnist_cnn_epoch
data: mnist
model:
  name: cnn
  layers:
    - conv: {out: 32, kernel: 3}
    - relu
    - conv: {out: 64, kernel: 3}
    - relu
    - maxpool: 2
    - flatten
    - linear: 128
    - relu
    - linear: classes
"""


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 12 * 12, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def keras_layers(layers: Any) -> list[Any]:
    return [
        layers.Conv2D(32, 3, activation="relu"),
        layers.Conv2D(64, 3, activation="relu"),
        layers.MaxPooling2D(2),
        layers.Flatten(),
        layers.Dense(128, activation="relu"),
        layers.Dense(10),
    ]


WORK = peers.Work(
    title="MNIST, conv32-conv64-pool-fc128",
    config=CONFIG,
    read=mnist,
    dataset=peers.torchvision_mnist,
    images=60_000,
    mean=peers.MNIST_MEAN,
    std=peers.MNIST_STD,
    augment=False,
    network=network,
    keras_layers=keras_layers,
    contenders=("dltrain", "bare", "bare-bf16", "pytorch", "lightning", "keras"),
)

if __name__ == "__main__":
    peers.main(WORK)
