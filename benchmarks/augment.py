"""Augmenting a batch of 512 CIFAR-10 images: dltrain's whole-batch operations against torchvision's per image.

    python benchmarks/augment.py

Both do the same kinds of change, with parameters of its own for each image, on the CPU and on one thread, in turn in
one process.  torchvision's transforms (v2, on uint8 tensors) are called for each image, as a data loader calls them,
and the images put into a batch.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from time import perf_counter

import torch
from torchvision.transforms import v2

import dltrain.components  # noqa: F401  registers every augmentation
from dltrain.data.cifar import cifar10
from dltrain.data.files import Files, data_root
from dltrain.data.random import Random
from dltrain.registry import Item

BATCH = 512
ROUNDS = 15

JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
CUTOUT = v2.RandomErasing(p=1, scale=(0.0625, 0.0625), ratio=(1, 1), value=128)  # 8x8 pixels of 32x32
CASES = [
    (
        "flip, translate 4, cutout 8",
        ["flip", {"translate": 4}, {"cutout": 8}],
        v2.Compose([v2.RandomHorizontalFlip(), v2.RandomCrop(32, padding=4), CUTOUT]),
    ),
    ("resized_crop", ["resized_crop"], v2.RandomResizedCrop(32)),
    (
        "affine",
        [{"affine": {"degrees": 15.0, "translate": 0.1, "min_scale": 0.9, "max_scale": 1.1}}],
        v2.RandomAffine(15, (0.1, 0.1), (0.9, 1.1), interpolation=v2.InterpolationMode.BILINEAR),
    ),
    ("colour_jitter", [{"colour_jitter": JITTER}], v2.ColorJitter(**JITTER)),
    ("random_erasing", ["random_erasing"], v2.RandomErasing()),
    ("rand_augment", ["rand_augment"], v2.RandAugment()),
    ("trivial_augment", ["trivial_augment"], v2.TrivialAugmentWide()),
]


def seconds(work: Callable[[], object]) -> float:
    start = perf_counter()
    work()
    return perf_counter() - start


def main() -> None:
    torch.set_num_threads(1)
    images = cifar10(Files(data_root(), verify=False)).train.images[:BATCH]
    random = Random("benchmark", seed=0, epoch=0, index=torch.arange(BATCH))
    print(f"torch {torch.__version__}, {BATCH} images of 3x32x32, one thread, median of {ROUNDS}")
    print(f"{'':30}{'dltrain':>12}{'torchvision':>14}{'ratio':>9}")
    for title, items, transform in CASES:
        augmentations = [Item("augmentation").read(item) for item in items]

        def batched(augmentations: list = augmentations) -> torch.Tensor:
            changed = images
            for augmentation in augmentations:
                changed = augmentation(changed, random)
            return changed

        def per_image(transform: Callable = transform) -> torch.Tensor:
            return torch.stack([transform(image) for image in images])

        batched(), per_image()
        ours, theirs = [], []
        for _ in range(ROUNDS):  # in turn, so that a machine that slows down slows both
            ours.append(seconds(batched))
            theirs.append(seconds(per_image))
        one, other = statistics.median(ours), statistics.median(theirs)
        print(f"{title:30}{one * 1e3:9.1f} ms{other * 1e3:11.1f} ms{one / other:9.3f}")


if __name__ == "__main__":
    main()
