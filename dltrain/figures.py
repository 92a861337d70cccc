"""Pictures, drawn by matplotlib without a screen: uint8 `[H, W, 3]`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

_LABELLED = 20  # classes up to which a confusion matrix has room for names and numbers


def image_grid(images: torch.Tensor) -> torch.Tensor:
    """Images `[N, C, H, W]` as one image `[C, rows (H + 1) - 1, columns (W + 1) - 1]`, a line of zeros between two."""
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    _, channels, height, width = images.shape
    grid = images.new_zeros(channels, rows * (height + 1) - 1, columns * (width + 1) - 1)
    for place, image in enumerate(images):
        top, left = place // columns * (height + 1), place % columns * (width + 1)
        grid[:, top : top + height, left : left + width] = image
    return grid


def confusion_picture(matrix: torch.Tensor, classes: Sequence[str]) -> np.ndarray[Any, Any]:
    """A confusion matrix (int64 `[K, K]`, rows true, columns predicted), each row coloured by its shares."""
    from matplotlib.figure import Figure

    count = len(classes)
    figure = Figure(figsize=(6.4, 6), dpi=100, layout="constrained")
    axes = figure.subplots()
    shares = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if count <= _LABELLED:
        axes.set_xticks(range(count), classes, rotation=45, ha="right")
        axes.set_yticks(range(count), classes)
        for row in range(count):
            for column in range(count):
                ink = "white" if shares[row, column] > 0.5 else "black"
                text = f"{int(matrix[row, column])}"
                axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=8 if count <= 10 else 5)
    return _pixels(figure)


def mistakes_picture(images: torch.Tensor, captions: Sequence[str]) -> np.ndarray[Any, Any]:
    """Images uint8 `[N, C, H, W]` in a grid, each below its caption."""
    from matplotlib.figure import Figure

    columns = min(5, len(images))
    rows = math.ceil(len(images) / columns)
    figure = Figure(figsize=(1.7 * columns, 1.9 * rows), dpi=100, layout="constrained")
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.set_axis_off()
    for axes, image, caption in zip(figure.axes, images, captions, strict=False):  # the grid's last row may be short
        grey = image.shape[0] != 3
        pixels = (image[0] if grey else image.permute(1, 2, 0)).numpy()
        axes.imshow(pixels, cmap="gray" if grey else None, vmin=0, vmax=255)
        axes.set_title(caption, fontsize=8)
    return _pixels(figure)


def _pixels(figure: Any) -> np.ndarray[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
