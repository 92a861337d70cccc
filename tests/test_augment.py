"""Augmentations, seen from outside: which change, among all that are allowed, each image of a batch underwent."""

import itertools
from collections import Counter

import pytest
import torch
from pydantic import ValidationError
from random_images import Nowhere, Recorded, levels_apart, likely, noise
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as tv

import dltrain.components  # noqa: F401  registers every augmentation
from dltrain.data import augment
from dltrain.registry import component, entries, find

ALL = [
    ("flip", {}),
    ("vertical_flip", {}),
    ("alternating_flip", {}),
    ("crop", {"pixels": 2}),
    ("translate", {"pixels": 2}),
    ("translate", {"pixels": 2, "pad": "reflect"}),
    ("resized_crop", {}),
    ("cutout", {"size": 3}),
    ("random_erasing", {}),
    ("rotate", {"degrees": 30.0}),
    ("affine", {"degrees": 0.0, "translate": 0.5, "interpolation": "nearest"}),
    ("colour_jitter", {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}),
    ("grayscale", {"probability": 0.5}),
    ("rand_augment", {}),
    ("trivial_augment", {}),
]
SHAPES = [(30, 3, 7, 9), (30, 1, 8, 6), (1, 3, 6, 6), (2, 1, 6, 9)]


def change(name, images, random, arguments):
    return component(find(name, "augmentation"), arguments)(images, random)


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


FLIPS = [(augment.flip, 3), (augment.vertical_flip, 2)]


@pytest.mark.parametrize(("flip", "dim"), FLIPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_flip_mirrors_each_image_or_leaves_it(shape, flip, dim):
    images = noise(*shape)
    mirrored = torch.from_numpy((images.numpy()[:, :, :, ::-1] if dim == 3 else images.numpy()[:, :, ::-1]).copy())
    for image, mirror, changed in zip(images, mirrored, flip(images, Recorded()), strict=True):
        assert torch.equal(changed, image) != torch.equal(changed, mirror)


@pytest.mark.parametrize(("flip", "dim"), FLIPS)
@pytest.mark.parametrize("probability", [0.0, 0.2, 0.5, 1.0])
def test_a_flip_mirrors_that_share(probability, flip, dim):
    changed = flip(asymmetric(10000), Recorded(), probability=probability)
    assert likely(mirrored(changed).sum().item(), 10000, probability)


def asymmetric(count):
    """Images of 2x2, of which one corner is white."""
    images = torch.zeros(count, 1, 2, 2, dtype=torch.uint8)
    images[:, :, 0, 0] = 255
    return images


def mirrored(changed):
    """Which of `asymmetric` were changed: bool `[B]`."""
    return changed[:, 0, 0, 0] == 0


def alternating(seed, epoch, index):
    """Which images an alternating flip mirrors: bool `[B]`."""
    changed = augment.alternating_flip(asymmetric(len(index)), Recorded(seed, epoch, index))
    assert torch.equal(changed[:, 0, 0, 1] == 255, mirrored(changed))  # left and right
    return mirrored(changed)


@pytest.mark.parametrize("seed", [0, 1, 2**70 + 3])
def test_an_alternating_flip_mirrors_half_and_then_the_others(seed):
    index = torch.arange(20000)
    epochs = [alternating(seed, epoch, index) for epoch in range(4)]
    assert likely(epochs[0].sum().item(), 20000, 0.5)
    assert torch.equal(epochs[1], ~epochs[0])
    assert torch.equal(epochs[2], epochs[0])
    assert torch.equal(epochs[3], epochs[1])


def test_an_alternating_flip_depends_on_the_image_and_not_on_its_batch():
    order = torch.randperm(1000)
    assert torch.equal(alternating(5, 0, order), alternating(5, 0, torch.arange(1000))[order])


def test_alternating_flips_of_neighbours_and_of_other_seeds_are_independent():
    index = torch.arange(50000)
    coins = [alternating(seed, 0, index) for seed in range(4)]
    for coin in coins:
        for apart in (1, 2, 10, 128):
            assert likely((coin[apart:] == coin[:-apart]).sum().item(), 50000 - apart, 0.5)
    for one, other in itertools.combinations(coins, 2):
        assert likely((one == other).sum().item(), 50000, 0.5)
        assert one.sum() != other.sum()  # nor are they the same coins in another order


@pytest.mark.parametrize("pad", ["zero", "reflect"])
@pytest.mark.parametrize("shape", SHAPES)
def test_translate_moves_each_image_by_some_shift(shape, pad):
    images = noise(*shape)
    for image, changed in zip(images, augment.translate(images, Recorded(), pixels=2, pad=pad), strict=True):
        shifts = itertools.product(range(-2, 3), range(-2, 3))
        assert len(which(changed, {shift: shifted(image, *shift, pad) for shift in shifts})) == 1


def test_translate_draws_every_shift_equally_often_and_each_image_its_own():
    image = noise(1, 1, 5, 5)
    candidates = {s: shifted(image[0], *s, "zero") for s in itertools.product(range(-2, 3), range(-2, 3))}
    changed = augment.translate(image.expand(5000, -1, -1, -1), Recorded(), pixels=2)
    found = [which(one, candidates)[0] for one in changed]
    assert evenly([found.count(shift) for shift in candidates], kinds=25, draws=5000)


def test_translate_farther_than_the_image_leaves_it_black_at_times():
    changed = augment.translate(noise(500, 1, 2, 2), Recorded(), pixels=3)
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
        augment.translate(noise(2, 1, 8, 5), Recorded(), pixels=5, pad="reflect")


@pytest.mark.parametrize("size", [1, 3, 4, 20])
@pytest.mark.parametrize("shape", SHAPES)
def test_cutout_fills_a_clipped_square_around_some_pixel(shape, size):
    images = noise(*shape)
    centres = list(itertools.product(range(shape[2]), range(shape[3])))
    for image, changed in zip(images, augment.cutout(images, Recorded(), size=size, fill=1), strict=True):
        assert which(changed, {centre: blanked(image, *centre, size, fill=1) for centre in centres})


def test_cutout_draws_every_centre_equally_often_and_each_image_its_own():
    image = noise(1, 1, 4, 6)
    candidates = {c: blanked(image[0], *c, size=3, fill=1) for c in itertools.product(range(4), range(6))}
    changed = augment.cutout(image.expand(5000, -1, -1, -1), Recorded(), size=3, fill=1)
    found = [which(one, candidates)[0] for one in changed]
    assert evenly([found.count(centre) for centre in candidates], kinds=24, draws=5000)


def test_cutout_fills_with_grey():
    assert (augment.cutout(noise(2, 3, 4, 4), Recorded(), size=99) == 128).all()


def boxes(height, width):
    """Every (top, left, height, width) within an image."""
    sizes = itertools.product(range(1, height + 1), range(1, width + 1))
    return [(i, j, h, w) for h, w in sizes for i in range(height - h + 1) for j in range(width - w + 1)]


@pytest.mark.parametrize("shape", [(40, 3, 6, 7), (40, 1, 5, 4)])
def test_resized_crop_enlarges_some_box(shape):
    images = noise(*shape)
    _, _, height, width = shape
    found = Counter()
    for image, changed in zip(images, augment.resized_crop(images, Recorded(), min_scale=0.3, ratio=2), strict=True):
        fits = [
            box
            for box in boxes(height, width)
            # torchvision's weights are of 16 bits on bytes, so that it rounds otherwise at times
            if levels_apart(tv.resized_crop(image, *box, [height, width]), changed) <= 1
        ]
        assert len(fits) == 1
        found[fits[0]] += 1
        _, _, h, w = fits[0]
        # areas of 0.3 to 1, and ratios of 1/2 to 2, but for rounding each side to whole pixels
        assert (h + 0.5) * (w + 0.5) >= 0.3 * height * width
        assert (h - 0.5) / (w + 0.5) <= 2
        assert (w - 0.5) / (h + 0.5) <= 2
    assert len(found) > 15


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.1, 0.9)])
def test_a_box_has_its_area_and_its_ratio(low, high):
    images = torch.zeros(4000, 1, 300, 400, dtype=torch.uint8).expand(4000, 1, 300, 400)
    tall, wide, fits = augment._box(images, Recorded(), low, high, 2.0)
    assert fits.all()
    share = tall * wide / (300 * 400)
    assert low - 0.01 < share.min()
    assert share.max() < high + 0.01
    if low < high:
        stretch = (wide / tall).log2()
        assert -1.02 < stretch.min() < -0.9
        assert 0.9 < stretch.max() < 1.02
        small = share < 0.3  # boxes that fit at the first try, all but a few
        assert likely((stretch[small] > 0).sum().item(), int(small.sum()), 0.5)
        assert likely((stretch[small].abs() < 0.5).sum().item(), int(small.sum()), 0.5)  # uniform in the logarithm


@pytest.mark.parametrize("wide", [True, False])
def test_a_box_that_cannot_fit_is_the_largest_of_its_shape(wide):
    images = noise(2000, 1, 2, 6)
    if wide:
        changed = augment.resized_crop(images, Recorded(), min_scale=1.0, ratio=1.0)
    else:
        changed = augment.resized_crop(images.mT, Recorded(), min_scale=1.0, ratio=1.0).mT
    places = Counter()
    for image, one in zip(images, changed, strict=True):
        (left,) = [j for j in range(5) if levels_apart(tv.resized_crop(image, 0, j, 2, 2, [2, 6]), one) <= 1]
        places[left] += 1
    assert evenly(list(places.values()), kinds=5, draws=2000)


def test_the_whole_image_cropped_is_the_image():
    images = noise(20, 3, 9, 9)
    assert torch.equal(augment.resized_crop(images, Recorded(), min_scale=1.0, ratio=1.0), images)


def test_random_erasing_fills_some_box():
    images = noise(300, 3, 5, 6)
    changed = augment.random_erasing(images, Recorded(), probability=0.7, min_scale=0.1, max_scale=0.5, ratio=2, fill=1)
    erased = 0
    for image, one in zip(images, changed, strict=True):
        if torch.equal(image, one):
            continue
        erased += 1
        rows, columns = (one == 1).all(0).any(1).nonzero(), (one == 1).all(0).any(0).nonzero()
        i, h = int(rows[0]), len(rows)
        j, w = int(columns[0]), len(columns)
        assert torch.equal(one, tv.erase(image, i, j, h, w, torch.tensor(1)))
        assert (h - 0.5) * (w - 0.5) <= 0.5 * 30
        assert (h + 0.5) * (w + 0.5) >= 0.1 * 30
        assert (h - 0.5) / (w + 0.5) <= 2
        assert (w - 0.5) / (h + 0.5) <= 2
    assert likely(erased, 300, 0.7)


def test_random_erasing_puts_its_box_anywhere():
    arguments = {"probability": 1.0, "min_scale": 0.25, "max_scale": 0.25, "ratio": 1.0, "fill": 1}
    changed = augment.random_erasing(noise(5000, 1, 4, 4), Recorded(), **arguments)
    places = Counter(int((one == 1).flatten().int().argmax()) for one in changed)
    assert evenly(list(places.values()), kinds=9, draws=5000)


def test_where_no_box_fits_nothing_is_erased():
    images = noise(50, 1, 2, 8)
    arguments = {"probability": 1.0, "min_scale": 0.9, "max_scale": 0.9, "ratio": 1.0}
    assert torch.equal(augment.random_erasing(images, Recorded(), **arguments), images)


@pytest.mark.parametrize("name", ["resized_crop", "random_erasing"])
def test_scales_the_wrong_way_round_are_refused(name):
    with pytest.raises(ValueError, match=r"min_scale 0\.5 is above max_scale 0\.4"):
        change(name, noise(2, 1, 8, 8), Recorded(), {"min_scale": 0.5, "max_scale": 0.4})


def test_all_are_here():
    ours = {entry.name for entry in entries("augmentation") if entry.factory.__module__.startswith("dltrain.")}
    assert {name for name, _ in ALL} == ours


@pytest.mark.parametrize(("name", "arguments"), ALL)
@pytest.mark.parametrize("channels", [1, 3])
def test_the_input_stays_and_the_output_is_like_it(name, arguments, channels):
    images = noise(60, channels, 6, 8)
    before = images.clone()
    changed = change(name, images, Recorded(count=60), arguments)
    assert torch.equal(images, before)
    assert changed.data_ptr() != images.data_ptr()
    assert (changed.shape, changed.dtype) == (images.shape, torch.uint8)
    assert torch.equal(changed, images) == (name == "grayscale" and channels == 1)


@pytest.mark.parametrize(("name", "arguments"), ALL)
def test_the_random_decides_and_nothing_else(name, arguments):
    images = noise(60, 3, 6, 8)
    torch.manual_seed(0)
    first = change(name, images, Recorded(7, count=60), arguments)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert torch.equal(change(name, images, Recorded(7, count=60), arguments), first)
    assert not torch.equal(change(name, images, Recorded(8, count=60), arguments), first)
    assert torch.equal(torch.get_rng_state(), state)  # the global one is not drawn from


@pytest.mark.parametrize(("name", "arguments"), [each for each in ALL if each[0] != "alternating_flip"])
def test_a_random_that_goes_on_gives_other_changes(name, arguments):
    images, random = noise(60, 3, 6, 8), Recorded()
    first = change(name, images, random, arguments)
    assert not torch.equal(change(name, images, random, arguments), first)


@pytest.mark.parametrize(("name", "arguments"), ALL)
def test_images_may_be_as_small_as_they_come(name, arguments):
    images = noise(60, 3, 1, 1)
    if arguments.get("pad") != "reflect":  # which says that it cannot
        assert change(name, images, Recorded(count=60), arguments).shape == images.shape


@pytest.mark.parametrize(("name", "arguments"), ALL)
def test_nothing_waits_for_the_device(name, arguments):
    changed = change(name, noise(5, 3, 6, 8).to("meta"), Nowhere(5), arguments)  # no value to wait for
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
        ("resized_crop", {"min_scale": 0.0}),
        ("resized_crop", {"ratio": 0.75}),
        ("random_erasing", {"max_scale": 1.5}),
        ("alternating_flip", {"probability": 0.5}),
    ],
)
def test_the_config_is_checked(name, arguments):
    with pytest.raises(ValidationError):
        component(find(name, "augmentation"), arguments)
