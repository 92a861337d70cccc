"""Lines of handwritten digits, made from MNIST's images by a seeded recipe."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from pydantic import Field

from dltrain.data.dataset import Dataset, Split
from dltrain.data.files import Files
from dltrain.data.mnist import MNIST, SIDE, mnist
from dltrain.data.random import generator
from dltrain.lazy import torch
from dltrain.registry import NonNegativeInt, PositiveInt, register

PUBLISHED = dataclasses.replace(MNIST, title="lines of digits (made from MNIST)")
STEP = 18, 26  # pixels from one digit's left edge to the next one's, which is 28 wide with a border of about 4
RISE = 3  # pixels that a digit stands above or below the middle, at most
HEIGHT = SIDE + 2 * RISE + 2  # a multiple of four, as two poolings want it


@register("data", published=PUBLISHED)
def digit_lines(
    files: Files,
    *,
    longest: Annotated[int, Field(ge=1, le=20)] = 6,
    train: PositiveInt = 20_000,
    test: PositiveInt = 5_000,
    seed: NonNegativeInt = 0,
) -> Dataset:
    """Lines of 1 to `longest` MNIST digits, gray, 36 pixels high and as wide as the longest may be.

    For `task: transcription`.  How many digits a line has, which (training lines of training images, test lines of test
    images), how far apart and how high they stand depends on the seed, the split and the line's place there alone.

    longest: digits in a line, at most; shorter lines end in black
    train: so many training lines; a line of 6 digits takes 6 kB of memory
    test: so many test lines
    seed: what the lines are drawn from; the run's own seed does not change them

    Raises DataError as `mnist` does.
    """
    digits = mnist(files)
    splits = {
        name: _lines(split, count, longest, generator("digit_lines", name, seed))
        for name, split, count in (("train", digits.train, train), ("test", digits.test, test))
    }
    return Dataset(splits["train"], splits["test"], digits.classes, digits.files, digits.verified)


def _lines(digits: Split, count: int, longest: int, random: torch.Generator) -> Split:
    """Draws `count` lines from images uint8 `[N, 1, 28, 28]`."""

    def draw(low: int, high: int) -> torch.Tensor:
        """int64 `[count, longest]` in low..high."""
        return torch.randint(low, high + 1, (count, longest), generator=random)

    lengths = draw(1, longest)[:, :1]
    which, steps, rises = draw(0, len(digits) - 1), draw(*STEP), draw(-RISE, RISE)
    width = -(-(SIDE + STEP[1] * (longest - 1)) // 4) * 4
    images = torch.zeros(count, 1, HEIGHT, width, dtype=torch.uint8)
    left = steps.cumsum(1) - steps[:, :1]  # the first digit stands at the left edge
    there = torch.arange(longest) < lengths
    inside = torch.arange(SIDE)
    for place in range(longest):
        line = there[:, place].nonzero()  # [M, 1]
        down = ((HEIGHT - SIDE) // 2 + rises[line, place])[:, :, None] + inside[:, None]  # [M, 28, 1]
        across = left[line, place][:, :, None] + inside  # [M, 1, 28]
        at = (line[:, :, None], 0, down, across)
        images[at] = images[at].maximum(digits.images[which[line[:, 0], place], 0])  # ink over ink stays ink
    return Split(images, digits.labels[which].masked_fill(~there, -1))
