"""Augmentations, seen from outside: which change, among all that are allowed, each image of a batch underwent."""

import itertools

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from dltrain.data import augment
from dltrain.registry import component, find

ALL = [
    pytest.param(augment.flip, {}, id="flip"),
    pytest.param(augment.translate, {"pixels": 2}, id="translate"),
    pytest.param(augment.translate, {"pixels": 2, "pad": "reflect"}, id="translate-reflect"),
    pytest.param(augment.cutout, {"size": 3}, id="cutout"),
]
SHAPES = [(30, 3, 7, 9), (30, 1, 8, 6), (1, 3, 6, 6), (2, 1, 6, 9)]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def noise(*shape):
    """Images with no pixel of 0 or 1, so that what a test fills in is seen."""
    return torch.randint(2, 256, shape, dtype=torch.uint8, generator=seeded(1))


def shifted(image, down, right, pad):
    """One image `[C, H, W]`, moved pixel by pixel."""
    _, height, width = image.shape
    moved = torch.zeros_like(image)
    for row, column in itertools.product(range(height), range(width)):
        y, x = row - down, column - right
        if pad == "reflect":  # about the first and the last pixel
            y = -y if y < 0 else 2 * (height - 1) - y if y >= height else y
            x = -x if x < 0 else 2 * (width - 1) - x if x >= width else x
        if 0 <= y < height and 0 <= x < width:
            moved[:, row, column] = image[:, y, x]
    return moved


def blanked(image, y, x, size, fill):
    """One image `[C, H, W]` with the square around a centre filled."""
    result = image.clone()
    top, left = y - size // 2, x - size // 2
    result[:, max(top, 0) : max(top + size, 0), max(left, 0) : max(left + size, 0)] = fill
    return result


def which(changed, candidates):
    """The candidates (parameters -> image) that equal the changed image."""
    return [parameters for parameters, image in candidates.items() if torch.equal(image, changed)]


def evenly(counts, kinds, draws):
    """Whether `kinds` outcomes came up about equally often: each within 5 standard deviations of draws / kinds."""
    mean = draws / kinds
    return len(counts) == kinds and all(abs(count - mean) < 5 * mean**0.5 for count in counts)


@pytest.mark.parametrize("shape", SHAPES)
def test_flip_mirrors_each_image_or_leaves_it(shape):
    images = noise(*shape)
    for image, changed in zip(images, augment.flip(images, seeded()), strict=True):
        assert torch.equal(changed, image) != torch.equal(changed, torch.tensor(image.numpy()[:, :, ::-1].copy()))


@pytest.mark.parametrize("probability", [0.0, 0.2, 0.5, 1.0])
def test_flip_mirrors_that_share(probability):
    images = noise(10000, 1, 1, 2)
    images[:, :, :, 1] = images[:, :, :, 0] // 2  # never symmetric
    mirrored = (augment.flip(images, seeded(), probability=probability) != images).any(3).sum().item()
    assert abs(mirrored - 10000 * probability) <= 5 * (10000 * probability * (1 - probability)) ** 0.5


@pytest.mark.parametrize("pad", ["zero", "reflect"])
@pytest.mark.parametrize("shape", SHAPES)
def test_translate_moves_each_image_by_some_shift(shape, pad):
    images = noise(*shape)
    for image, changed in zip(images, augment.translate(images, seeded(), pixels=2, pad=pad), strict=True):
        shifts = itertools.product(range(-2, 3), range(-2, 3))
        assert len(which(changed, {shift: shifted(image, *shift, pad) for shift in shifts})) == 1


def test_translate_draws_every_shift_equally_often_and_each_image_its_own():
    image = noise(1, 1, 5, 5)
    candidates = {s: shifted(image[0], *s, "zero") for s in itertools.product(range(-2, 3), range(-2, 3))}
    changed = augment.translate(image.expand(5000, -1, -1, -1), seeded(), pixels=2)
    found = [which(one, candidates)[0] for one in changed]
    assert evenly([found.count(shift) for shift in candidates], kinds=25, draws=5000)


def test_translate_farther_than_the_image_leaves_it_black_at_times():
    changed = augment.translate(noise(500, 1, 2, 2), seeded(), pixels=3)
    black = int((changed == 0).all(dim=(1, 2, 3)).sum())
    assert (
        abs(black - 500 * 40 / 49) < 5 * (500 * 40 / 49 * 9 / 49) ** 0.5
    )  # it stays in sight for 3 of 7 shifts each way


@pytest.mark.parametrize("pixels", [1, 3])
def test_reflect_is_torchs(pixels):
    images = noise(4, 3, 5, 4)
    padded = augment._reflect(augment._reflect(images, pixels, dim=2), pixels, dim=3)
    assert torch.equal(padded.float(), F.pad(images.float(), (pixels,) * 4, mode="reflect"))


def test_an_image_too_small_to_reflect_is_refused():
    with pytest.raises(ValueError, match="8x5 can be reflected by 4 pixels at most, got 5"):
        augment.translate(noise(2, 1, 8, 5), seeded(), pixels=5, pad="reflect")


@pytest.mark.parametrize("size", [1, 3, 4, 20])
@pytest.mark.parametrize("shape", SHAPES)
def test_cutout_fills_a_clipped_square_around_some_pixel(shape, size):
    images = noise(*shape)
    centres = list(itertools.product(range(shape[2]), range(shape[3])))
    for image, changed in zip(images, augment.cutout(images, seeded(), size=size, fill=1), strict=True):
        assert which(changed, {centre: blanked(image, *centre, size, fill=1) for centre in centres})


def test_cutout_draws_every_centre_equally_often_and_each_image_its_own():
    image = noise(1, 1, 4, 6)
    candidates = {c: blanked(image[0], *c, size=3, fill=1) for c in itertools.product(range(4), range(6))}
    changed = augment.cutout(image.expand(5000, -1, -1, -1), seeded(), size=3, fill=1)
    found = [which(one, candidates)[0] for one in changed]
    assert evenly([found.count(centre) for centre in candidates], kinds=24, draws=5000)


def test_cutout_fills_with_grey():
    assert (augment.cutout(noise(2, 3, 4, 4), seeded(), size=99) == 128).all()


@pytest.mark.parametrize(("change", "arguments"), ALL)
def test_the_input_stays_and_the_output_is_like_it(change, arguments):
    images = noise(50, 3, 6, 8)
    before = images.clone()
    changed = change(images, seeded(), **arguments)
    assert torch.equal(images, before)
    assert changed.data_ptr() != images.data_ptr()
    assert (changed.shape, changed.dtype) == (images.shape, torch.uint8)
    assert not torch.equal(changed, images)


@pytest.mark.parametrize(("change", "arguments"), ALL)
def test_the_generator_decides_and_nothing_else(change, arguments):
    images = noise(50, 3, 6, 8)
    torch.manual_seed(0)
    first = change(images, seeded(7), **arguments)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(change(images, seeded(7), **arguments), first)
    assert not torch.equal(change(images, seeded(8), **arguments), first)
    assert torch.equal(torch.get_rng_state(), state)  # the global one is not drawn from


@pytest.mark.parametrize(("change", "arguments"), ALL)
def test_a_generator_that_goes_on_gives_other_changes(change, arguments):
    images, random = noise(50, 3, 6, 8), seeded()
    assert not torch.equal(change(images, random, **arguments), change(images, random, **arguments))


@pytest.mark.parametrize(("change", "arguments"), ALL)
def test_nothing_waits_for_the_device(change, arguments):
    changed = change(noise(5, 3, 6, 8).to("meta"), None, **arguments)  # a meta tensor has no value to wait for
    assert (changed.shape, changed.device.type) == ((5, 3, 6, 8), "meta")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("flip", {"probability": 1.1}),
        ("translate", {}),
        ("translate", {"pixels": 0}),
        ("translate", {"pixels": 4, "pad": "edge"}),
        ("cutout", {"size": 8, "fill": 256}),
        ("cutout", {"size": 8.0}),
    ],
)
def test_the_config_is_checked(name, arguments):
    with pytest.raises(ValidationError):
        component(find(name, "augmentation"), arguments)
