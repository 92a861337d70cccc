"""Rotations and affine maps against torchvision's, image by image, with the parameters that were drawn."""

import pytest
import torch
from random_images import Recorded, levels_apart, noise, pictures
from torchvision.transforms.v2 import functional as tv

from dltrain.data import warp

FULL = {"degrees": 40.0, "translate": 0.2, "min_scale": 0.7, "max_scale": 1.5, "shear": 20.0}


def torchvisions(images, random, degrees, translate, min_scale, max_scale, shear, fill, interpolation):
    """Each image after torchvision's affine, by the draws that `random` recorded."""
    _, _, height, width = images.shape
    four, scale = random.uniforms
    assert min_scale <= scale.min()
    assert scale.max() <= max_scale
    changed = []
    for image, (angle, lean, right, down), factor in zip(images, four.T.tolist(), scale.tolist(), strict=True):
        # on floats and less the filling: torchvision darkens the border of bytes when it is given a fill
        moved = tv.affine(
            image.double() - fill,
            angle=angle * degrees,
            translate=[round(right * translate * width), round(down * translate * height)],
            scale=factor,
            shear=[lean * shear, 0.0],
            interpolation=tv.InterpolationMode(interpolation),
        )
        changed.append((moved + fill).round().to(torch.uint8))
    return torch.stack(changed)


@pytest.mark.parametrize("fill", [0, 200])
@pytest.mark.parametrize("shape", [(40, 3, 12, 17), (40, 1, 16, 16)])
@pytest.mark.parametrize("interpolation", ["bilinear", "nearest"])
def test_affine_is_torchvisions(shape, interpolation, fill):
    images, random = noise(*shape), Recorded()
    changed = warp.affine(images, random, **FULL, interpolation=interpolation, fill=fill)
    expected = torchvisions(images, random, **FULL, interpolation=interpolation, fill=fill)
    # float32 finds places to 1e-6 of a pixel: what is half way between two levels may be rounded to either
    assert levels_apart(changed, expected) <= 1
    assert (changed != expected).float().mean() < 0.001


@pytest.mark.parametrize("interpolation", ["bilinear", "nearest"])
def test_rotate_is_torchvisions(interpolation):
    images, random = pictures(30, 3, 14, 14), Recorded()
    changed = warp.rotate(images, random, degrees=180.0, interpolation=interpolation, fill=9)
    for image, one, angle in zip(images, changed, random.uniforms[0][0].tolist(), strict=True):
        expected = tv.rotate(image.double() - 9, -angle * 180, tv.InterpolationMode(interpolation)) + 9
        assert levels_apart(one, expected.round().to(torch.uint8)) <= 1


def test_draws_are_even_and_independent():
    random = Recorded()
    warp.affine(noise(10000, 1, 1, 1), random, degrees=0.0)
    four = random.uniforms[0]
    assert (four.abs() <= 1).all()
    assert four.mean(1).abs().max() < 5 * (1 / 3 / 10000) ** 0.5
    assert torch.allclose(four.cov(), torch.eye(4) / 3, atol=5 / 3 / 10000**0.5)


@pytest.mark.parametrize("interpolation", ["bilinear", "nearest"])
@pytest.mark.parametrize("size", [(7, 9), (32, 32), (224, 160)])
def test_nothing_asked_for_changes_nothing(size, interpolation):
    images = noise(3, 3, *size, low=0)
    assert torch.equal(warp.affine(images, Recorded(), degrees=0.0, interpolation=interpolation), images)


def test_a_shift_alone_is_by_whole_pixels():
    images, random = noise(50, 1, 8, 10), Recorded()
    changed = warp.affine(images, random, degrees=0.0, translate=0.3, fill=1)
    shifts = set()
    for image, one, (_, _, right, down) in zip(images, changed, random.uniforms[0].T.tolist(), strict=True):
        x, y = round(right * 3), round(down * 2.4)
        shifts.add((x, y))
        expected = torch.ones_like(image)
        expected[:, max(y, 0) : 8 + y, max(x, 0) : 10 + x] = image[
            :, max(-y, 0) : 8 - max(y, 0), max(-x, 0) : 10 - max(x, 0)
        ]
        assert torch.equal(one, expected)
    assert len(shifts) > 20


def test_scales_the_wrong_way_round_are_refused():
    with pytest.raises(ValueError, match=r"min_scale 1\.2 is above max_scale 1"):
        warp.affine(noise(2, 1, 4, 4), Recorded(), degrees=0.0, min_scale=1.2)
