"""Films of moving digits: what is in a frame, how it moves, and what that depends on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_files import write_mnist

from dltrain.data.dataset import Dataset
from dltrain.data.files import Files
from dltrain.data.mnist import mnist
from dltrain.data.moving import moving_mnist
from dltrain.data.random import generator
from dltrain.registry import component, find

COUNTS = (30, 12)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_mnist(folder, *COUNTS)
    return folder


def made(root: Path, **settings: Any) -> Dataset:
    return moving_mnist(Files(root, verify=False), **settings)


def halved(images: torch.Tensor) -> np.ndarray:
    """[N, 14, 14]: the mean of each two by two pixels, rounded."""
    pixels = images[:, 0].numpy().astype(float)
    return (pixels[:, ::2, ::2] + pixels[:, ::2, 1::2] + pixels[:, 1::2, ::2] + pixels[:, 1::2, 1::2]) / 4


def corners(films: torch.Tensor) -> np.ndarray:
    """[N, frames, 2]: the row and column where the digit begins; every pixel of these digits is above 0."""
    bright = films.numpy() > 0
    return np.stack([bright.any(3).argmax(2), bright.any(2).argmax(2)], 2)


def test_every_frame_is_the_digit_at_half_its_size_and_black_around(root: Path) -> None:
    films = made(root, size=20).test.images.numpy()
    digits = halved(mnist(Files(root, verify=False)).test.images)
    assert films.shape == (12, 8, 20, 20)
    for film, digit in zip(films, digits, strict=True):
        for frame, (top, left) in zip(film, corners(torch.from_numpy(film)[None])[0], strict=True):
            np.testing.assert_allclose(frame[top : top + 14, left : left + 14], digit, atol=0.5)
            assert np.count_nonzero(frame) == 196


def test_a_digit_goes_straight_on_and_turns_around_at_the_edges(root: Path) -> None:
    """Against a ball that is moved frame by frame, from where and as fast as the recipe draws."""
    size, frames = 24, 40
    room = size - 14
    found = corners(made(root, size=size, frames=frames).train.images)
    drawn = torch.rand(COUNTS[0], 4, generator=generator("moving_mnist", "train", 0))
    start, direction, speed = np.split(drawn.numpy(), [2, 3], 1)
    for way, at, angle, share in zip(found, start * room, direction * 2 * np.pi, 1 + 2 * speed, strict=True):
        place, pace = at.astype(float), share * np.array([np.sin(angle), np.cos(angle)])[:, 0]
        for frame in range(frames):
            assert np.abs(way[frame] - place).max() < 0.501  # the nearest whole pixel
            place = place + pace
            pace = np.where((place < 0) | (place > room), -pace, pace)
            place = np.where(place < 0, -place, np.where(place > room, 2 * room - place, place))
    assert (found.min(), found.max()) == (0, room)


def test_a_films_way_depends_on_seed_split_and_place_alone(root: Path) -> None:
    whole = made(root)
    few = made(root, train=5, test=4, frames=3)
    assert torch.equal(few.train.images, whole.train.images[:5, :3])
    assert torch.equal(few.test.images, whole.test.images[:4, :3])
    assert not np.array_equal(corners(whole.train.images[:12]), corners(whole.test.images))
    assert not np.array_equal(corners(made(root, seed=1).test.images), corners(whole.test.images))


def test_labels_classes_and_files_are_those_of_mnist(root: Path) -> None:
    films, digits = made(root, train=20), mnist(Files(root, verify=False))
    assert torch.equal(films.train.labels, digits.train.labels[:20])
    assert torch.equal(films.test.labels, digits.test.labels)
    assert (films.classes, films.files, films.verified) == (digits.classes, digits.files, False)
    assert len(films.files) == 4


def test_a_digit_that_fills_the_frame_stands_still(root: Path) -> None:
    films = made(root, size=14).train.images
    assert (films == films[:, :1]).all()


@pytest.mark.parametrize("settings", [{"size": 13}, {"frames": 0}, {"frames": 65}, {"train": 0}])
def test_what_cannot_be_filmed_is_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        component(find("moving_mnist", "data"), settings)
