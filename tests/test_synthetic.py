from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from dltrain.data import synthetic as synthetic_module
from dltrain.data.files import Files
from dltrain.data.synthetic import CLASSES, CONTRAST, SYNTHETIC, synthetic
from dltrain.registry import component, find


@pytest.fixture
def make(tmp_path):
    def made(**settings):
        return synthetic(Files(tmp_path / "absent", download=False), **{"train": 60, "test": 30} | settings)

    return made


def same(one, other):
    return torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)


@pytest.mark.parametrize(
    ("settings", "shape"), [({}, (3, 32, 32)), ({"channels": 1, "size": 17}, (1, 17, 17)), ({"size": 64}, (3, 64, 64))]
)
def test_images_are_of_the_size_and_number_asked_for(make, settings, shape):
    dataset = make(**settings)
    assert dataset.shape == shape
    assert (len(dataset.train), len(dataset.test)) == (60, 30)
    assert dataset.classes == CLASSES[:10]
    assert dataset.train.labels.bincount().tolist() == [6] * 10
    assert dataset.verified
    assert dataset.files == {}


def test_the_defaults_are_what_the_list_of_data_sets_says():
    entry = find("synthetic", "data")
    assert entry.facts["published"] is SYNTHETIC
    defaults = entry.arguments().model_dump()
    assert (defaults["train"], defaults["test"]) == (SYNTHETIC.train, SYNTHETIC.test)


def test_a_seed_always_draws_the_same_and_another_one_does_not(make):
    first, again, other = make(seed=1), make(seed=1), make(seed=2)
    assert same(first.train, again.train)
    assert same(first.test, again.test)
    assert not same(first.train, other.train)


def test_training_and_test_images_are_not_the_same(make):
    dataset = make(train=30, test=30)
    assert not torch.equal(dataset.train.images, dataset.test.images)


def test_what_is_drawn_for_one_split_does_not_depend_on_the_other(make):
    assert same(make(train=7).test, make(train=60).test)


def test_images_are_all_drawn_where_they_take_several_blocks(make, monkeypatch):
    monkeypatch.setattr(synthetic_module, "BLOCK", 7 * 32 * 32)  # 60 images are no whole number of blocks
    images = make(noise=0.0).train.images
    assert all(len(image.unique()) > 1 for image in images)


def test_a_drawing_has_two_colours_apart(make):
    for image in make(noise=0.0, class_count=24, train=96).train.images:
        for channel in image:
            low, high = channel.unique().tolist()
            assert high - low >= CONTRAST - 1  # each is rounded


def boxed(make, name, size, train=96):
    """Where the images of a class are drawn on: bool arrays of the smallest box around, and its upper left corner."""
    dataset = make(class_count=24, train=train, size=size, noise=0.0, channels=1)
    boxes = []
    for image in dataset.train.images[dataset.train.labels == CLASSES.index(name)]:
        inside = (image[0] != image[0, 0, 0]).numpy()  # a corner is outside of every shape
        rows, columns = np.nonzero(inside.any(1))[0], np.nonzero(inside.any(0))[0]
        boxes.append((inside[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], (rows[0], columns[0])))
    return boxes


@pytest.mark.parametrize(
    ("name", "share", "width"),
    [
        ("plain disc", np.pi / 4, 1),
        ("plain square", 1, 1),
        ("plain diamond", 1 / 2, 1),
        ("plain triangle", 1 / 2, 2 / np.sqrt(3)),
        ("plain ring", np.pi / 4 * (1 - 0.6**2), 1),
        ("plain cross", (4 * 0.95 * 0.3 * 2 - 0.6**2) / 1.9**2, 1),
    ],
)
def test_shapes_fill_what_geometry_says(make, name, share, width):
    """share: of the box around it; width: of that box, in heights"""
    boxes = [box for box, _ in boxed(make, name, 128)]
    assert np.mean([box.mean() for box in boxes]) == pytest.approx(share, abs=0.02)
    assert np.mean([box.shape[1] / box.shape[0] for box in boxes]) == pytest.approx(width, abs=0.04)


def test_shapes_have_places_and_sizes_of_their_own(make):
    discs = boxed(make, "plain disc", 64, train=960)
    diameters = np.array([len(box) for box, _ in discs])
    centres = np.array([corner for _, corner in discs]) + diameters[:, None] / 2
    for values in (diameters, *centres.T):  # drawn from 32..51, and from as far as the disc stays inside
        assert np.std(values) > 3


def test_textures_leave_out_every_other_row_or_column(make):
    """What a filled square looks like along its rows and its columns."""
    for texture, along_rows, along_columns, share in (
        ("plain", 0, 0, 1),
        ("rows", 1, 0, 0.5),
        ("columns", 0, 1, 0.5),
        ("checks", 1, 1, 0.5),
    ):
        for box, _ in boxed(make, f"{texture} square", 64):
            assert bool((box[1:] != box[:-1]).any()) == along_rows
            assert bool((box[:, 1:] != box[:, :-1]).any()) == along_columns
            assert box.mean() == pytest.approx(share, abs=0.15)  # a stripe more than half of them, where they are few


def test_the_noise_has_the_deviation_asked_for(make):
    clean, noisy = (make(noise=noise, train=20).train.images.double() for noise in (0.0, 10.0))
    middle = (clean > 60) & (clean < 195)  # where no noise is cut off
    assert (noisy - clean)[middle].std().item() == pytest.approx(10, rel=0.05)
    assert (noisy - clean)[middle].mean().item() == pytest.approx(0, abs=0.3)


def test_a_convolution_learns_what_a_linear_model_cannot(make):
    dataset = make(train=1200, test=300, class_count=4, size=16, channels=1)
    images, tested = (split.images.float() / 127.5 - 1 for split in (dataset.train, dataset.test))

    def accuracy(model, rate):
        torch.manual_seed(0)
        for layer in model:
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
        optimizer = torch.optim.Adam(model.parameters(), rate)
        for _ in range(6):
            for index in torch.randperm(len(images)).split(50):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images[index]), dataset.train.labels[index]).backward()
                optimizer.step()
        model.eval()
        return (model(tested).argmax(1) == dataset.test.labels).float().mean().item()

    linear = accuracy(nn.Sequential(nn.Flatten(), nn.Linear(256, 4)), 1e-3)
    layers = [nn.Conv2d(1, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(12, 24, 3), nn.BatchNorm2d(24), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten()]
    assert linear < 0.5
    assert accuracy(nn.Sequential(*layers, nn.Linear(24, 4)), 1e-2) > 0.8


@pytest.mark.parametrize(
    "settings", [{"class_count": 25}, {"class_count": 1}, {"size": 15}, {"channels": 2}, {"train": 0}, {"noise": 256.0}]
)
def test_what_cannot_be_drawn_is_refused(settings):
    with pytest.raises(ValidationError):
        component(find("synthetic", "data"), settings)


def test_more_images_than_fit_are_refused(make):
    with pytest.raises(ValueError, match=f"train: {10**9} images of 4096x4096 do not fit in memory"):
        make(train=10**9, size=4096)
