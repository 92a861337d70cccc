"""Mixings, on images that say which they are: every pixel of image i has the level i."""

from collections import Counter

import pytest
import torch
from pydantic import ValidationError
from random_images import Nowhere, Recorded, likely, noise

from dltrain.data import mix
from dltrain.registry import component, find

BOTH = [mix.mixup, mix.cutmix]


def numbered(count, height, width):
    return torch.arange(count, dtype=torch.uint8)[:, None, None, None].repeat(1, 3, height, width)


def one_hot(count):
    """Image i is of class i."""
    return torch.eye(count)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 5.0])
def test_mixup_blends_images_and_targets_in_one_share(alpha):
    images, targets, random = noise(30, 3, 5, 6, low=0), torch.rand(30, 7).softmax(1), Recorded(5)
    blended, shared = mix.mixup(images, targets, random, alpha=alpha)
    (keep,), (partner,) = random.betas[0].tolist(), random.permutations
    assert 0.01 < keep < 0.99
    for i, j in enumerate(partner.tolist()):
        exact = keep * images[i].double() + (1 - keep) * images[j].double()
        assert (blended[i] - exact).abs().max() <= 0.5001
        assert torch.allclose(shared[i], keep * targets[i] + (1 - keep) * targets[j])


def test_cutmix_puts_one_box_of_another_image_into_each():
    places = Counter()
    for seed in range(60):
        random = Recorded(seed)
        mixed, shared = mix.cutmix(numbered(20, 8, 11), one_hot(20), random)
        (partner,), (keep,) = random.permutations, random.betas[0].tolist()
        y, x = (int(centre) for centre in random.whole)
        side = (1 - keep) ** 0.5
        half_height, half_width = int(side * 8 / 2), int(side * 11 / 2)
        box = torch.zeros(8, 11, dtype=torch.bool)
        box[max(y - half_height, 0) : y + half_height, max(x - half_width, 0) : x + half_width] = True
        for i, j in enumerate(partner.tolist()):
            assert torch.equal(mixed[i], torch.where(box, j, i).to(torch.uint8).expand(3, 8, 11))
            expected = (box.sum() * one_hot(20)[j] + (~box).sum() * one_hot(20)[i]) / 88
            assert torch.allclose(shared[i], expected)
        places[y, x] += 1
    assert len(places) > 35


def test_cutmix_is_the_papers_box():
    """rand_bbox of github.com/clovaai/CutMix-PyTorch, with the numbers that were drawn."""
    for seed in range(50):
        random = Recorded(seed)
        mixed, _ = mix.cutmix(numbered(2, 13, 9), one_hot(2), random)
        keep = float(random.betas[0])
        cy, cx = (int(centre) for centre in random.whole)
        cut_height, cut_width = int(13 * (1 - keep) ** 0.5), int(9 * (1 - keep) ** 0.5)
        top, bottom = (min(max(edge, 0), 13) for edge in (cy - cut_height // 2, cy + cut_height // 2))
        left, right = (min(max(edge, 0), 9) for edge in (cx - cut_width // 2, cx + cut_width // 2))
        expected = numbered(2, 13, 9)
        expected[:, :, top:bottom, left:right] = expected[random.permutations[0], :, top:bottom, left:right]
        assert torch.equal(mixed, expected)


@pytest.mark.parametrize("mixing", BOTH)
@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_that_share_of_the_batches_is_mixed(mixing, probability):
    mixed = 0
    for seed in range(400):
        images, targets = mixing(numbered(8, 16, 16), one_hot(8), Recorded(seed), alpha=5.0, probability=probability)
        changed = not torch.equal(targets, one_hot(8))
        assert changed or torch.equal(images, numbered(8, 16, 16))
        mixed += changed
    assert likely(mixed, 400, probability)


@pytest.mark.parametrize("mixing", BOTH)
def test_targets_stay_distributions_and_what_is_given_stays(mixing):
    images, targets = noise(16, 3, 9, 9), torch.rand(16, 4).softmax(1)
    given = images.clone(), targets.clone()
    mixed, shared = mixing(images, targets, Recorded())
    assert torch.equal(images, given[0])
    assert torch.equal(targets, given[1])
    assert (mixed.shape, mixed.dtype) == (images.shape, torch.uint8)
    assert (shared.shape, shared.dtype) == (targets.shape, torch.float32)
    assert torch.allclose(shared.sum(1), torch.ones(16))
    assert torch.allclose(shared.sum(0), targets.sum(0))  # partners are a permutation: no class gains
    assert not torch.equal(mixed, images)


@pytest.mark.parametrize("mixing", BOTH)
def test_the_random_decides_and_nothing_else(mixing):
    given = noise(16, 3, 9, 9), one_hot(16)
    first = mixing(*given, Recorded(7))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    again, other = mixing(*given, Recorded(7)), mixing(*given, Recorded(8))
    assert torch.equal(torch.get_rng_state(), state)
    for one, same, different in zip(first, again, other, strict=True):
        assert torch.equal(one, same)
        assert not torch.equal(one, different)


@pytest.mark.parametrize("mixing", BOTH)
def test_one_image_is_mixed_with_itself(mixing):
    images = noise(1, 3, 6, 6)
    mixed, shared = mixing(images, one_hot(1), Recorded())
    assert torch.equal(mixed, images)
    assert torch.equal(shared, one_hot(1))


@pytest.mark.parametrize("mixing", BOTH)
def test_nothing_waits_for_the_device(mixing):
    mixed, shared = mixing(noise(5, 3, 6, 8).to("meta"), one_hot(5).to("meta"), Nowhere(5))
    assert (mixed.shape, mixed.device.type) == ((5, 3, 6, 8), "meta")
    assert (shared.shape, shared.device.type) == ((5, 5), "meta")


@pytest.mark.parametrize("name", ["mixup", "cutmix"])
@pytest.mark.parametrize("arguments", [{"alpha": 0.0}, {"probability": 1.5}])
def test_the_config_is_checked(name, arguments):
    with pytest.raises(ValidationError):
        component(find(name, "mixing"), arguments)
