"""Colours against torchvision's functions on floats, image by image, with the factors that were drawn."""

import pytest
import torch
from random_images import Recorded, levels_apart, likely, noise, pictures
from torchvision.transforms.v2 import functional as tv

from dltrain.data import colour

ADJUST = {
    "brightness": tv.adjust_brightness,
    "contrast": tv.adjust_contrast,
    "saturation": tv.adjust_saturation,
    "hue": tv.adjust_hue,
}
SETTINGS = [
    {"brightness": 0.9},
    {"contrast": 1.5},
    {"saturation": 2.0},
    {"hue": 0.5},
    {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1},
]


def spectrum():
    """Every colour whose channels are multiples of 51, black, greys and white among them: `[1, 3, 6, 36]`."""
    levels = torch.arange(0, 256, 51, dtype=torch.uint8)
    return torch.cartesian_prod(levels, levels, levels).T.reshape(1, 3, 6, 36)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("make", [noise, pictures, lambda *_: spectrum().expand(40, 3, 6, 36)])
def test_colour_jitter_is_torchvisions(settings, make):
    images, random = make(40, 3, 12, 10), Recorded()
    changed = colour.colour_jitter(images, random, **settings)
    for place, (image, one) in enumerate(zip(images, changed, strict=True)):
        expected = image / 255
        for (name, spread), drawn in zip(settings.items(), random.uniforms, strict=True):
            factor = float(drawn[place])
            middle = 0 if name == "hue" else 1
            assert middle - spread <= factor <= middle + spread
            expected = ADJUST[name](expected, factor)
        # torchvision's weights of grey add up to 0.9999, and half a level may be rounded to either side
        assert levels_apart(one, (expected * 255).round().to(torch.uint8)) <= 1


def test_colour_jitter_of_grey_images_is_torchvisions():
    images, random = pictures(20, 1, 8, 8), Recorded()
    changed = colour.colour_jitter(images, random, brightness=0.5, contrast=0.5, saturation=0.5, hue=0.5)
    for image, one, bright, contrast in zip(images, changed, *random.uniforms, strict=True):
        expected = tv.adjust_contrast(tv.adjust_brightness(image / 255, float(bright)), float(contrast))
        assert levels_apart(one, (expected * 255).round().to(torch.uint8)) <= 1


@pytest.mark.parametrize(("name", "middle"), [("brightness", 1), ("contrast", 1), ("saturation", 1), ("hue", 0)])
def test_factors_are_even_over_their_range_and_each_image_has_its_own(name, middle):
    random = Recorded()
    colour.colour_jitter(noise(5000, 3, 1, 1), random, **{name: 0.3})
    (factors,) = random.uniforms
    assert factors.numel() == 5000
    counts = torch.histc(factors, 10, middle - 0.3, middle + 0.3)
    assert counts.sum() == 5000
    assert all(likely(count, 5000, 0.1) for count in counts.tolist())


def test_factors_are_never_negative():
    random = Recorded()
    colour.colour_jitter(noise(5000, 3, 1, 1), random, contrast=3.0)
    assert 0 <= random.uniforms[0].min() < 0.01
    assert 3.99 < random.uniforms[0].max() <= 4


def test_a_hue_turned_by_a_third_is_the_next_channel():
    images = noise(1, 3, 9, 9, low=0)
    turned = colour._turn_hue(images.float(), torch.full((1, 1, 1), 1 / 3))
    assert torch.allclose(turned, images.float().roll(1, 1), atol=1e-3)


@pytest.mark.parametrize("make", [noise, pictures])
def test_grayscale_is_torchvisions(make):
    images = make(400, 3, 5, 6)
    changed = colour.grayscale(images, Recorded(), probability=0.3)
    grey = (changed == changed[:, :1]).all(1).flatten(1).all(1)
    assert likely(int(grey.sum()), 400, 0.3)
    assert torch.equal(changed[~grey], images[~grey])
    # torchvision rounds down, and its weights add up to 0.9999
    assert levels_apart(changed[grey], tv.rgb_to_grayscale(images[grey], 3)) <= 1


def test_grey_of_black_and_white_is_exact():
    black_and_white = torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1).expand(2, 3, 1, 1)
    assert colour.grayscale(black_and_white, Recorded(), probability=1.0).unique().tolist() == [0, 255]


def test_images_of_one_channel_are_grey_already():
    images = noise(10, 1, 4, 4)
    assert torch.equal(colour.grayscale(images, Recorded(), probability=1.0), images)


def test_nothing_to_change_is_refused():
    with pytest.raises(ValueError, match="set brightness, contrast, saturation or hue above 0"):
        colour.colour_jitter(noise(2, 3, 4, 4), Recorded())


@pytest.mark.parametrize("change", [colour.grayscale, lambda *given: colour.colour_jitter(*given, brightness=0.1)])
def test_other_numbers_of_channels_are_refused(change):
    with pytest.raises(ValueError, match="one channel or three, got 2"):
        change(noise(2, 2, 4, 4), Recorded())
