"""An MNIST epoch of an MLP, 784-256-128-10 with ReLU: dltrain against its peers.

    python benchmarks/mnist_mlp_epoch.py [--only dltrain,bare] [--repeats 3] [--epochs 5] [--images 6000]

peers.py says who the peers are, what each does and how they are timed; `pip install -e '.[bench]'` installs those that
dltrain itself does not need.
"""

from __future__ import annotations

from typing import Any

import peers
from torch import nn

from dltrain.data.mnist import mnist

CONFIG = """
name: mnist_mlp_epoch
data: mnist
model: {name: mlp, hidden: [256, 128]}
"""


def network() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def keras_layers(layers: Any) -> list[Any]:
    hidden = [layers.Dense(width, activation="relu") for width in (256, 128)]
    return [layers.Flatten(), *hidden, layers.Dense(10)]


WORK = peers.Work(
    title="MNIST, MLP 784-256-128-10",
    config=CONFIG,
    read=mnist,
    dataset=peers.torchvision_mnist,
    images=60_000,
    mean=peers.MNIST_MEAN,
    std=peers.MNIST_STD,
    augment=False,
    network=network,
    keras_layers=keras_layers,
    contenders=("dltrain", "bare", "pytorch", "lightning", "keras", "scikit-learn"),
    hidden=(256, 128),
)

if __name__ == "__main__":
    peers.main(WORK)
