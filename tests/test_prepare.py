"""What a run trains on: classes kept, images drawn and held out, normalisation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from dltrain.data.dataset import Dataset, Split
from dltrain.data.prepare import Prepared, measure_normalisation, prepare
from dltrain.data.random import generator
from dltrain.errors import ConfigError

NAMES = ("ant", "bee", "cat", "0")


def dataset(train: int = 60, test: int = 20, classes: Sequence[int] = (0, 1, 2, 3)) -> Dataset:
    """Image number i is filled with i (and test image i with 100 + i), so that every image can be told."""

    def split(count: int, first: int) -> Split:
        images = torch.arange(first, first + count, dtype=torch.uint8)[:, None, None, None].expand(-1, 2, 3, 3)
        labels = torch.tensor(classes)[torch.arange(count) % len(classes)]
        return Split(images.contiguous(), labels)

    return Dataset(split(train, 0), split(test, 100), NAMES, {"a.gz": "sha256:00"}, verified=False)


def numbers(split: Split | None) -> list[int]:
    assert split is not None
    return split.images[:, 0, 0, 0].tolist()


def test_without_settings_everything_is_as_in_the_files():
    data = dataset()
    made = prepare(data, seed=0)
    for split, original in ((made.train, data.train), (made.test, data.test)):
        assert torch.equal(split.images, original.images)
        assert torch.equal(split.labels, original.labels)
    assert made.val is None
    assert (made.classes, made.files, made.verified) == (NAMES, {"a.gz": "sha256:00"}, False)
    assert made.shape == (2, 3, 3)


@pytest.mark.parametrize(
    ("classes", "kept"),
    [
        ([1, 3], [1, 3]),
        ([3, 1], [3, 1]),
        (["cat", "ant"], [2, 0]),
        (["0", 0], [3, 0]),  # the name of class 3, and the number of class 0
        ([3, "bee", 0], [3, 1, 0]),
    ],
)
def test_kept_classes_are_renumbered_in_the_order_that_is_asked_for(classes, kept):
    made = prepare(dataset(), seed=0, classes=classes)
    assert made.classes == tuple(NAMES[number] for number in kept)
    for split, first in ((made.train, 0), (made.test, 100)):
        original = [(number - first) % 4 for number in numbers(split)]  # image i is of class i % 4
        assert split.labels.tolist() == [kept.index(label) for label in original]
        count = 60 if first == 0 else 20
        assert numbers(split) == [first + i for i in range(count) if i % 4 in kept]


def test_a_class_whose_number_is_above_every_label_present_is_no_other_class():
    made = prepare(dataset(classes=(0, 1)), seed=0, classes=[0, 3])
    assert made.classes == ("ant", "0")
    assert set(made.train.labels.tolist()) == {0}


def test_a_limit_is_a_subset_that_the_seed_decides_in_the_files_order():
    made = {seed: numbers(prepare(dataset(), seed=seed, limit=25).train) for seed in (0, 1)}
    assert made[0] == numbers(prepare(dataset(), seed=0, limit=25).train)
    assert made[0] != made[1]
    for found in made.values():
        assert len(set(found)) == 25
        assert set(found) <= set(range(60))
        assert found == sorted(found)
    assert len(prepare(dataset(), seed=0, limit=60).train) == 60


def test_a_limit_takes_every_image_as_often_as_any_other():
    counts = np.zeros(60)
    for seed in range(400):
        counts[numbers(prepare(dataset(), seed=seed, limit=15).train)] += 1
    assert np.abs(counts - 100).max() < 5 * np.sqrt(400 * 0.25 * 0.75)  # five standard deviations


@pytest.mark.parametrize(("val", "held_out"), [(12, 12), (0.2, 12), (0.01, 1), (59, 59), (0.99, 59)])
def test_val_and_train_are_disjoint_and_together_everything(val, held_out):
    made = prepare(dataset(), seed=0, val=val)
    assert len(numbers(made.val)) == held_out
    assert sorted(numbers(made.train) + numbers(made.val)) == list(range(60))
    for split in (made.train, made.val):
        assert numbers(split) == sorted(numbers(split))
        assert split.labels.tolist() == [number % 4 for number in numbers(split)]
    assert numbers(made.test) == list(range(100, 120))


def test_what_is_held_out_is_a_function_of_the_seed():
    made = [numbers(prepare(dataset(), seed=seed, val=12).val) for seed in (0, 0, 1)]
    assert made[0] == made[1] != made[2]


def test_classes_come_before_the_limit_and_the_limit_before_val():
    made = prepare(dataset(), seed=0, classes=[1, 2], limit=20, val=0.25)
    assert (len(made.train), len(numbers(made.val)), len(made.test)) == (15, 5, 10)
    assert {number % 4 for number in numbers(made.train) + numbers(made.val)} == {1, 2}
    limited = prepare(dataset(), seed=0, classes=[1, 2], limit=20)
    assert sorted(numbers(made.train) + numbers(made.val)) == numbers(limited.train)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classes": [0, 4]}, r"data\.classes: no class 4; there is 0 ant, 1 bee, 2 cat, 3 0"),
        ({"classes": ["ant", "dog"]}, r"data\.classes: no class 'dog'; there is 0 ant"),
        ({"classes": [0, "ant"]}, r"data\.classes: \[0, 'ant'\] names a class twice"),
        ({"limit": 61}, r"data\.limit: 61 images asked for, the training split has 60"),
        ({"classes": [0, 1], "limit": 31}, r"data\.limit: 31 images asked for, the training split has 30"),
        ({"val": 60}, r"data\.val: 60 of 60 training images leaves an empty split"),
        ({"val": 1000}, r"data\.val: 1000 of 60"),
        ({"val": 0.999}, r"data\.val: 0\.999 of 60 training images leaves an empty split"),
        ({"val": 0.001}, r"data\.val: 0\.001 of 60 training images leaves an empty split"),
        ({"limit": 5, "val": 5}, r"data\.val: 5 of 5"),
    ],
)
def test_what_cannot_be_had_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        prepare(dataset(), seed=0, **settings)


def test_the_list_of_many_classes_is_cut_short():
    data = dataset()
    many = Dataset(data.train, data.test, tuple(f"kind{number}" for number in range(100)))
    with pytest.raises(ConfigError, match=r"no class 'x'; there is 0 kind0, .* 9 kind9, …$"):
        prepare(many, seed=0, classes=["x", 1])


@pytest.mark.parametrize(("present", "which"), [((0, 1), "training"), ((2, 3), "test")])
def test_classes_without_a_single_image_are_refused(present, which):
    full, part = dataset(), dataset(classes=present)
    data = Dataset(part.train, full.test, NAMES) if which == "training" else Dataset(full.train, part.test, NAMES)
    missing = [number for number in range(4) if number not in present]
    with pytest.raises(ConfigError, match=rf"data\.classes: the {which} split has no image of "):
        prepare(data, seed=0, classes=missing)


def test_a_run_without_val_has_no_val_split_to_ask_for():
    made: Prepared = prepare(dataset(), seed=0)
    assert made.split("test") is made.test
    with pytest.raises(ConfigError, match=r"no val split"):
        made.split("val")


@pytest.mark.parametrize("count", [1, 5, 5000])  # 5000: more than are summed at once
def test_normalisation_is_numpys_mean_and_standard_deviation(count):
    images = torch.randint(256, (count, 3, 4, 5), generator=torch.Generator().manual_seed(count), dtype=torch.uint8)
    images[:, 1] //= 3
    images[:, 2] |= 0xF0
    found = measure_normalisation(images)
    pixels = images.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(found.mean, pixels.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(found.std, pixels.std((0, 2, 3)), rtol=1e-12)


def test_normalisation_by_hand():
    images = torch.tensor([0, 255, 51, 51], dtype=torch.uint8).reshape(2, 2, 1, 1)  # channels [0, 51] and [255, 51]
    found = measure_normalisation(images)
    assert found.mean == pytest.approx([0.1, 0.6])
    assert found.std == pytest.approx([0.1, 0.4])


@pytest.mark.parametrize("value", [0, 7, 255])
def test_a_constant_channel_is_moved_and_not_divided_by_zero(value):
    found = measure_normalisation(torch.full((3, 1, 2, 2), value, dtype=torch.uint8))
    assert found.mean == [value / 255]
    assert found.std == [1.0]


def test_nearly_constant_channels_keep_their_tiny_deviation():
    images = torch.full((2000, 1, 10, 10), 255, dtype=torch.uint8)
    images[0, 0, 0, 0] = 254  # float32 sums would lose it
    share = 1 / 200_000
    assert measure_normalisation(images).std[0] == pytest.approx((share * (1 - share)) ** 0.5 / 255)


def test_normalisation_is_of_the_images_that_are_trained_on():
    made = prepare(dataset(), seed=0, classes=[0, 1], limit=20, val=5)
    assert made.normalisation == measure_normalisation(made.train.images)
    assert made.normalisation != measure_normalisation(dataset().train.images)


def test_a_generator_depends_on_its_parts_and_nothing_else():
    def draw(*parts: object) -> list[int]:
        return torch.randint(1 << 30, (4,), generator=generator(*parts)).tolist()

    torch.manual_seed(0)
    first = draw("order", 0, 1)
    torch.manual_seed(1)
    assert draw("order", 0, 1) == first
    others = [draw("order", 0, 2), draw("order", 1, 0), draw("augment", 0, 1), draw("order", 0, 1, 0), draw("order", 1)]
    assert len({tuple(each) for each in [first, *others]}) == 6
