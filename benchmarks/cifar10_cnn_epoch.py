"""A CIFAR-10 epoch of a CNN of three convolutions (32, 64, 128) with random crops and flips: dltrain against its peers.

    python benchmarks/cifar10_cnn_epoch.py [--only dltrain,bare] [--repeats 3] [--images 5000] [--no-verify]

The convolutions are 3x3, padded to the same size, each followed by batch normalisation, ReLU and a 2x2 maximum; then
comes one linear layer.  peers.py says who the peers are, what each does and how they are timed;
`pip install -e '.[bench]'` installs those that dltrain itself does not need.  Keras moves each image by its
RandomTranslation: its RandomCrop cuts all images of a batch at one place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peers
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Dataset

from dltrain.data.cifar import cifar10
from dltrain.data.files import Files

CONFIG = """
name: cifar10_cnn_epoch
data: {name: cifar10, augment: [{crop: 4}, flip]}
model:
  name: cnn
  layers:
    - conv: {out: 32, kernel: 3, padding: same}
    - batchnorm
    - relu
    - maxpool: 2
    - conv: {out: 64, kernel: 3, padding: same}
    - batchnorm
    - relu
    - maxpool: 2
    - conv: {out: 128, kernel: 3, padding: same}
    - batchnorm
    - relu
    - maxpool: 2
    - flatten
    - linear: classes
"""


class Images(Dataset[Any]):
    """The training images as torchvision's CIFAR10 keeps and gives them; it takes the published bytes alone."""

    def __init__(self, files: Files, transform: Callable[[Any], torch.Tensor]) -> None:
        split = cifar10(files).train
        self.data = split.images.permute(0, 2, 3, 1).contiguous().numpy()
        self.targets = split.labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(Image.fromarray(self.data[index])), self.targets[index]


def block(channels: int, out: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU(), nn.MaxPool2d(2)]


def network() -> nn.Module:
    return nn.Sequential(*block(3, 32), *block(32, 64), *block(64, 128), nn.Flatten(), nn.Linear(128 * 4 * 4, 10))


def keras_layers(layers: Any) -> list[Any]:
    reach = peers.PIXELS / 32
    found = [layers.RandomTranslation(reach, reach, fill_mode="constant", interpolation="nearest")]
    found += [layers.RandomFlip("horizontal")]
    for out in (32, 64, 128):
        found += [layers.Conv2D(out, 3, padding="same"), layers.BatchNormalization(), layers.ReLU()]
        found += [layers.MaxPooling2D(2)]
    return [*found, layers.Flatten(), layers.Dense(10)]


WORK = peers.Work(
    title="CIFAR-10, 3x(conv-bn-relu-pool) 32/64/128 + linear, crop and flip",
    config=CONFIG,
    read=cifar10,
    dataset=Images,
    images=50_000,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    augment=True,
    network=network,
    keras_layers=keras_layers,
    contenders=("dltrain", "bare", "bare-bf16", "pytorch", "lightning", "keras"),
)

if __name__ == "__main__":
    peers.main(WORK)
