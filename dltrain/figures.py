"""Pictures, drawn by matplotlib without a screen: uint8 `[H, W, 3]`."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

_LABELLED = 20  # classes up to which a confusion matrix has room for names and numbers
_FILTERS = 64  # that a picture of them shows
_THUMBNAIL = 64  # pixels: 1,000 of them make 2048 x 2048, and the projector takes up to 8192 x 8192


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


def grey_or_colour(images: torch.Tensor) -> torch.Tensor:
    """Images `[N, C, H, W]` as they are where C is 1 or 3, else their first channel `[N, 1, H, W]`."""
    return images if images.shape[1] in (1, 3) else images[:, :1]


def filter_picture(filters: torch.Tensor) -> torch.Tensor:
    """The first filters of `[N, C, H, W]` in a grid, in 0..1: zero is grey, what each filter weighs most 0 or 1.

    In colour where C is 3, grey where it is 1; else each channel of a filter is one of its own.
    """
    if filters.shape[1] not in (1, 3):
        filters = filters.flatten(0, 1)[:, None]
    shown = filters[:_FILTERS]
    peaks = shown.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-12)  # a filter of zeros is grey
    return image_grid(0.5 + shown / (2 * peaks))


def sprite(images: torch.Tensor) -> tuple[np.ndarray[Any, Any], int]:
    """Images uint8 `[N, C, H, W]` as thumbnails in a square of rows, `[columns * side, columns * side, 3]`, and side.

    A thumbnail is square, of at most 64 pixels, the image in its top left corner.
    """
    count, _, height, width = images.shape
    side = min(max(height, width), _THUMBNAIL)
    columns = math.ceil(math.sqrt(count))
    scale = side / max(height, width)
    size = (max(round(scale * height), 1), max(round(scale * width), 1))
    small = F.interpolate(grey_or_colour(images).float(), size, mode="area").round().byte()
    thumbnails = images.new_zeros(columns * columns, 3, side, side)
    thumbnails[:count, :, : size[0], : size[1]] = small  # a grey one in all three
    rows = thumbnails.view(columns, columns, 3, side, side).permute(0, 3, 1, 4, 2)
    return rows.reshape(columns * side, columns * side, 3).numpy(), side


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
    pixels = grey_or_colour(images).permute(0, 2, 3, 1).numpy()
    for axes, image, caption in zip(figure.axes, pixels, captions, strict=False):  # the grid's last row may be short
        axes.imshow(image, cmap="gray", vmin=0, vmax=255)  # no colour image heeds the map
        axes.set_title(caption, fontsize=8)
    return _pixels(figure)


def predictions_picture(
    images: torch.Tensor, captions: Sequence[Sequence[str]], maps: torch.Tensor | None = None
) -> bytes:
    """Images uint8 `[N, C, H, W]` in a grid, each above the lines of its caption, as a PNG.

    maps: float32 `[N, H, W]`, shown beside the images, each from 0 (black) to its largest value
    """
    from matplotlib.figure import Figure

    beside = 1 if maps is None else 2
    columns = min(len(images), max(6, math.ceil(math.sqrt(2 * beside * len(images)))) // beside, 10 // beside)
    rows = math.ceil(len(images) / columns)
    side, gap, line = 1.5, 0.15, 0.14  # inches
    tall = side * min(max(images.shape[2] / images.shape[3], 0.5), 2)  # a longer image has room left at its sides
    wide, high = beside * side + gap, tall + line * max(map(len, captions)) + 2 * gap
    width, height = columns * wide + gap, rows * high + gap
    figure = Figure(figsize=(width, height), dpi=120)
    pixels = grey_or_colour(images).permute(0, 2, 3, 1).numpy()
    for number, (image, caption) in enumerate(zip(pixels, captions, strict=True)):
        left, bottom = gap + number % columns * wide, height - gap - number // columns * high - tall
        cells = [(image, "gray", 255), *([] if maps is None else [(maps[number].numpy(), "magma", None)])]
        for place, (cell, colours, largest) in enumerate(cells):
            box = ((left + place * side) / width, bottom / height, side / width, tall / height)
            axes = figure.add_axes(box, xticks=[], yticks=[])
            axes.imshow(cell, cmap=colours, vmin=0, vmax=largest)  # no colour image heeds the map
            axes.spines[:].set_color("0.6")  # a white image on white paper has an edge too
        for place, words in enumerate(caption):
            middle, top = left + beside * side / 2, bottom - 0.06 - place * line
            colour, weight = ("0.4", "normal") if place == 0 else ("black", "bold" if place == 1 else "normal")
            text = figure.text(middle / width, top / height, words, fontsize=7, color=colour, weight=weight)
            text.set(ha="center", va="top", parse_math=False)
    return _png(figure)


def learning_rates(found: Mapping[str, Any]) -> bytes:
    """The curve of a learning-rate range test (lr_find.find), as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot(found["lr"], found["loss"], color="0.8", linewidth=1, label="of each step")
    axes.plot(found["lr"], found["smoothed"], color="C0", label="smoothed")
    for key, colour in (("steepest", "C1"), ("lowest", "C3"), ("suggestion", "C2")):
        axes.axvline(found[key], color=colour, linestyle="--", linewidth=1, label=f"{key}: {found[key]:.2g}")
    low, high = min(found["smoothed"]), max(found["smoothed"])
    axes.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))  # single steps may lie far off
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("training loss")
    axes.legend()
    return _png(figure)


def bench(found: Mapping[str, Any]) -> bytes:
    """Accuracy against seconds of each seed (bench.bench), a panel and a colour for each recipe, as a PNG.

    The first seed's point is hollow: start-up is in its seconds.  The line is the mean, the band its 95 % interval.
    """
    from matplotlib.figure import Figure

    recipes = found["recipes"]
    columns = min(len(recipes), 3)
    rows = math.ceil(len(recipes) / columns)
    figure = Figure(figsize=(max(4.2 * columns, 5), 3.6 * rows), dpi=120, layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for number, (axes, recipe) in enumerate(zip(panels, recipes, strict=False)):
        colour, accuracy = f"C{number % 10}", recipe["accuracy"]
        for row in recipe["runs"]:
            if not row["diverged"]:
                filling = "none" if row["cold"] else colour
                axes.plot(row["seconds"], 100 * row["accuracy"], "o", color=colour, markerfacecolor=filling)
        title = recipe["recipe"]
        if accuracy:
            mean, half_width = 100 * accuracy["mean"], 100 * (accuracy["half_width"] or 0)
            axes.axhline(mean, color=colour, linewidth=1)
            axes.axhspan(mean - half_width, mean + half_width, color=colour, alpha=0.15, linewidth=0)
            title += f": {mean:.2f}" + (f" ± {half_width:.2f} %" if half_width else " %")
        if found["target"] is not None:
            axes.axhline(100 * found["target"], color="0.4", linestyle="--", linewidth=1)
        axes.set_title(title, fontsize=10, parse_math=False)
        axes.set_xlabel("seconds (hollow: cold)")
        axes.set_xlim(left=0)
        axes.ticklabel_format(useOffset=False)
    for axes in panels[len(recipes) :]:
        axes.set_axis_off()
    for axes in panels[::columns]:
        axes.set_ylabel("test accuracy (%)")
    return _png(figure)


def _png(figure: Any) -> bytes:
    png = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that the font has not: a box stands for them
        figure.savefig(png, format="png")
    return png.getvalue()


def _pixels(figure: Any) -> np.ndarray[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
