"""What the tests of image files share: pictures, files of them, and folders of files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dltrain.data.dataset import Dataset
from dltrain.data.files import Files
from dltrain.data.folder import folder

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def noise(seed: int, height: int = 6, width: int = 4, channels: int = 3) -> np.ndarray:
    """uint8 [H, W, C]"""
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def draw(path: Path, pixels: np.ndarray | Image.Image | bytes, **options: object) -> Path:
    """Writes an image; pixels: an array [H, W, C], an image, or the bytes of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(pixels, np.ndarray):
        pixels = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    if isinstance(pixels, bytes):
        path.write_bytes(pixels)
    else:
        pixels.save(path, **options)
    return path


def pets(root: Path, *splits: str, each: int = 2, channels: int = 3) -> dict[str, np.ndarray]:
    """A folder of cats and dogs; returns each file's pixels, [C, H, W], by name."""
    drawn = {}
    for number, name in enumerate(
        f"{split}{kind}/{number}.png"
        for split in splits or ("train/", "test/")
        for kind in ("dog", "cat")
        for number in range(each)
    ):
        drawn[name] = noise(number, channels=channels)
        draw(root / "pets" / name, drawn[name])
    return {name: pixels.transpose(2, 0, 1) for name, pixels in drawn.items()}


def read_pets(
    root: Path, report: Callable[[str], None] = lambda note: None, recheck: bool = False, **changes: object
) -> Dataset:
    return folder(Files(root, report=report, recheck=recheck), **{"path": "pets"} | changes)


def first(dataset: Dataset) -> np.ndarray:
    """The first training image, [C, H, W]."""
    return dataset.train.images[0].numpy()


def same(one: Dataset, other: Dataset) -> bool:
    """Two data sets hold the same."""
    return (one.classes, one.files) == (other.classes, other.files) and all(
        torch.equal(getattr(getattr(one, split), field), getattr(getattr(other, split), field))
        for split in ("train", "test")
        for field in ("images", "labels")
    )
