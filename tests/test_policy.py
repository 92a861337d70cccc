"""Policies against torchvision's functions, image by image, with the operations that were drawn."""

import math
from functools import partial

import pytest
import torch
from random_images import Recorded, levels_apart, likely, noise, pictures
from torchvision.transforms.v2 import functional as tv

from dltrain.data import policy

NARROW = {"shear": 0.3, "degrees": 30, "factor": 0.9, "bits": 4}
WIDE = {"shear": 0.99, "degrees": 135, "factor": 0.99, "bits": 6}


def sheared(image, x, y, fill):
    angles = [math.degrees(math.atan(x)), math.degrees(math.atan(y))]
    return tv.affine(image, 0.0, [0, 0], 1.0, angles, fill=fill, center=[0.0, 0.0])


def shifted(image, x, y, fill):
    return tv.affine(image, 0.0, [int(x), int(y)], 1.0, [0.0, 0.0], fill=fill)


def blended(adjust, image, factor):
    """In floats: on bytes torchvision rounds down twice."""
    return (adjust(image / 255, factor) * 255).round().to(torch.uint8)


def torchvisions(image, name, level, sign, shift, fill, shear, degrees, factor, bits):
    """One image after one operation as torchvision's RandAugment does it."""
    signed = level * sign
    return {
        "identity": lambda: image,
        "shear_x": lambda: sheared(image, signed * shear, 0, fill),
        "shear_y": lambda: sheared(image, 0, signed * shear, fill),
        "translate_x": lambda: shifted(image, signed * shift[0], 0, fill),
        "translate_y": lambda: shifted(image, 0, signed * shift[1], fill),
        "rotate": lambda: tv.rotate(image, signed * degrees, fill=fill),
        "brightness": lambda: blended(tv.adjust_brightness, image, 1 + signed * factor),
        "colour": lambda: blended(tv.adjust_saturation, image, 1 + signed * factor),
        "contrast": lambda: blended(tv.adjust_contrast, image, 1 + signed * factor),
        "sharpness": lambda: blended(tv.adjust_sharpness, image, 1 + signed * factor),
        "posterize": lambda: tv.posterize(image, 8 - round(level * bits)),
        "solarize": lambda: tv.solarize(image, 255 * (1 - level)),
        "autocontrast": lambda: tv.autocontrast(image),
        "equalize": lambda: tv.equalize(image),
    }[name]()


EXACT = {"identity", "posterize", "solarize", "equalize"}
MAPPED = {"shear_x", "shear_y", "translate_x", "translate_y", "rotate"}


def check(images, changed, drawn, levels, signs, **ranges):
    """Compares each image with torchvision's, and sees that each operation was drawn and did something."""
    did = set()
    for image, one, which, level, sign in zip(
        images, changed, drawn.tolist(), levels.tolist(), signs.tolist(), strict=True
    ):
        name = policy.OPERATIONS[which]
        expected = torchvisions(image, name, level, sign, **ranges)
        if name in EXACT:
            assert torch.equal(one, expected), name
        elif name in MAPPED:  # a place half way between two pixels may go to either
            assert (one != expected).float().mean() < 0.01, name
        else:  # half a level may be rounded to either side; autocontrast torchvision rounds down
            assert levels_apart(one, expected) <= 1, name
        if not torch.equal(one, image):
            did.add(name)
    idle = {"identity"} | ({"colour"} if images.shape[1] == 1 else set())
    assert set(policy.OPERATIONS) - did == idle


@pytest.mark.parametrize("magnitude", [5, 9, 30])
@pytest.mark.parametrize("make", [partial(noise, low=0), pictures])
@pytest.mark.parametrize("shape", [(150, 3, 20, 24), (150, 1, 17, 17)])
def test_rand_augment_is_torchvisions(shape, make, magnitude):
    images, random = make(*shape), Recorded(3)
    changed = policy.rand_augment(images, random, operations=1, magnitude=magnitude, fill=77)
    drawn, coin = random.whole
    levels = torch.full((150,), magnitude / 30, dtype=torch.float64)
    shift = (150 / 331 * shape[3], 150 / 331 * shape[2])
    check(images, changed, drawn, levels, coin * 2 - 1, shift=shift, fill=77, **NARROW)


@pytest.mark.parametrize("shape", [(400, 3, 40, 36), (400, 1, 36, 36)])
def test_trivial_augment_is_torchvisions(shape):
    images, random = pictures(*shape), Recorded()
    changed = policy.trivial_augment(images, random, fill=5)
    drawn, coin, level = random.whole
    assert level.unique().tolist() == list(range(31))
    # where it is even, solarize's threshold is a whole level, and float32 may put it to either side of that
    clear = (policy.OPERATIONS.index("solarize") != drawn) | (level % 2 == 1)
    each = (images, changed, drawn, level / 30, coin * 2 - 1)
    check(*(kept[clear] for kept in each), shift=(32, 32), fill=5, **WIDE)


def test_several_operations_come_one_after_another():
    images, together, apart = pictures(60, 3, 16, 16), Recorded(1), Recorded(1)
    changed = images
    for _ in range(3):
        changed = policy.rand_augment(changed, apart, operations=1, magnitude=15)
    assert torch.equal(policy.rand_augment(images, together, operations=3, magnitude=15), changed)


def test_operations_and_signs_are_drawn_evenly_and_for_each_image():
    random = Recorded()
    policy.rand_augment(noise(5000, 1, 1, 1), random, operations=1)
    drawn, coin = random.whole
    counts = drawn.bincount(minlength=14).tolist()
    assert len(counts) == 14
    assert all(likely(count, 5000, 1 / 14) for count in counts)
    assert likely(int(coin.sum()), 5000, 0.5)


@pytest.mark.parametrize("name", ["equalize", "autocontrast"])
def test_flat_channels_stay(name):
    images = torch.tensor([0, 7, 255], dtype=torch.uint8).reshape(3, 1, 1, 1).expand(3, 3, 8, 8).clone()
    images[1, 0, 0, 0] = 9  # nearly flat: equalize has too few pixels to spread
    drawn = torch.full((3,), policy.OPERATIONS.index(name))
    level, sign = torch.ones(3), torch.ones(3)
    changed = policy._operate(images, drawn, level, sign, shift=(0, 0), fill=0, **NARROW)
    function = tv.equalize if name == "equalize" else tv.autocontrast
    for image, one in zip(images, changed, strict=True):
        assert levels_apart(one, function(image)) <= (name == "autocontrast")  # which torchvision rounds down


def test_two_channels_are_refused():
    with pytest.raises(ValueError, match="one channel or three, got 2"):
        policy.rand_augment(noise(2, 2, 4, 4), Recorded())
