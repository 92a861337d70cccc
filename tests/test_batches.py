"""Batches: which images in which order, what is done to them, and that their parts add up to the whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

import dltrain.components  # noqa: F401  registers losses and augmentations
from dltrain import registry
from dltrain.config import Descent
from dltrain.data.batches import Batches, Normalise
from dltrain.data.dataset import Split
from dltrain.data.prepare import Normalisation, measure_normalisation
from dltrain.data.random import Random
from dltrain.registry import Item, Section
from dltrain.tasks import Classification, labels_of, shares

CPU = torch.device("cpu")
AS_THEY_ARE = Normalise(Normalisation([0.0], [1 / 255]), CPU, torch.contiguous_format)  # pixels 0..255 as floats


def numbered(count: int) -> Split:
    """Image i is filled with i, its label is i % 3."""
    images = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 2, 2).contiguous()
    return Split(images, torch.arange(count) % 3)


@dataclass
class Change:
    """An augmentation as Batches sees one."""

    function: Callable[..., Any]
    kind: str = "augmentation"

    def build(self, *positional: Any) -> Any:
        return self.function(*positional)


def batches(
    split: Split,
    step_size: int,
    micro_size: int = 0,
    seed: int = 0,
    augment: Sequence[Any] = (),
    normalise: Any = None,
    balance: bool = False,
) -> Batches:
    return Batches(
        split,
        normalise or AS_THEY_ARE,
        task=Classification((1, 1, 1), 10, "softmax"),
        seed=seed,
        step_size=step_size,
        micro_size=micro_size or step_size,
        augment=augment,
        classes=3,
        balance=balance,
        resident=True,
        device=CPU,
    )


def taken(made: Batches, epoch: int, step: int) -> list[int]:
    """The numbers of the images that a step takes."""
    return [int(number) for images, _, _ in made.step(epoch, step) for number in images[:, 0, 0, 0]]


@pytest.mark.parametrize(
    ("images", "written", "steps", "parts_of_first_step"),
    [
        (24, {"batch_size": 8}, 3, [8]),
        (20, {"batch_size": 8}, 3, [8]),  # the last step takes four
        (20, {"batch_size": 8, "micro_batch_size": 3}, 3, [3, 3, 2]),
        (20, {"batch_size": 8, "micro_batch_size": 100}, 3, [8]),
        (20, {"variant": "batch"}, 1, [20]),
        (20, {"variant": "batch", "micro_batch_size": 6}, 1, [6, 6, 6, 2]),
        (20, {"variant": "stochastic"}, 20, [1]),
        (200, {}, 2, [128]),
    ],
)
def test_an_epoch_takes_every_image_once(images, written, steps, parts_of_first_step):
    descent = Descent(**written)
    made = batches(numbered(images), *descent.sizes(images))
    assert made.steps == steps
    for epoch in (0, 1):
        sizes = []
        found: list[int] = []
        for step in range(steps):
            parts = list(made.step(epoch, step))
            sizes.append([len(labels) for _, labels, _ in parts])
            assert sum(share for _, _, share in parts) == pytest.approx(1, abs=1e-12)
            assert [share * sum(sizes[-1]) for _, _, share in parts] == pytest.approx(sizes[-1])
            assert made.images_before(step) == len(found)
            found += [int(number) for images, _, _ in parts for number in images[:, 0, 0, 0]]
            assert made.images_in(step) == sum(sizes[-1])
            for pixels, labels, _ in parts:
                assert torch.equal(pixels[:, 0, 0, 0].long() % 3, labels)
        assert sorted(found) == list(range(images))
        assert found != sorted(found)
        assert sizes[0] == parts_of_first_step
        assert made.images_before(steps) == images


def test_a_batch_of_all_images_goes_through_the_model_in_parts_of_a_thousand():
    assert Descent(variant="batch").sizes(60_000) == (60_000, 1000)


def test_the_order_is_a_function_of_seed_and_epoch():
    split = numbered(50)
    torch.manual_seed(0)
    order = batches(split, 8).order(3)
    torch.manual_seed(1)
    assert torch.equal(batches(split, 5, 2).order(3), order)  # whatever the batches' size
    others = [batches(split, 8, seed=seed).order(epoch) for seed, epoch in ((0, 2), (0, 4), (1, 3), (3, 0))]
    assert all(not torch.equal(other, order) for other in others)
    assert all(not torch.equal(one, other) for one, other in pairwise(others))


def drawn(draws: list[tuple[float, ...]]) -> Change:
    """An augmentation that only notes what it draws."""

    def augment(images: torch.Tensor, random: Random) -> torch.Tensor:
        draws.append(tuple(random.uniform(3).tolist()))
        return images

    return Change(augment)


def test_the_augmentation_is_a_function_of_seed_epoch_step_and_place():
    found: dict[tuple[int, ...], list[tuple[float, ...]]] = {}
    for history in (0, 1):
        torch.manual_seed(history)
        for seed in (0, 1):
            draws: list[tuple[float, ...]] = []
            made = batches(numbered(20), 8, 4, seed=seed, augment=[drawn(draws)])
            for epoch in (1, 0) if history else (0, 1):
                for step in range(made.steps):
                    before = len(draws)
                    list(made.step(epoch, step))
                    found.setdefault((seed, epoch, step), []).extend(draws[before:])
    assert len(found) == 2 * 2 * 3
    for key, draws in found.items():
        parts = 1 if key[2] == 2 else 2  # of the last step, four images
        assert draws[:parts] == draws[parts:], key  # the same with another history
    assert len({draw for draws in found.values() for draw in draws}) == 2 * 2 * 5  # and nowhere the same twice


def test_augmentations_follow_one_another_and_draw_on():
    draws: list[tuple[float, ...]] = []
    plus, times = Change(lambda images, random: images + 1), Change(lambda images, random: images * 2)
    made = batches(numbered(4), 4, augment=[plus, drawn(draws), times, drawn(draws)])
    plain = batches(numbered(4), 4)
    assert taken(made, 0, 0) == [2 * (number + 1) for number in taken(plain, 0, 0)]
    assert draws[0] != draws[1]


def test_an_augmentation_is_told_epoch_seed_and_which_images() -> None:
    told: list[tuple[int, int, list[int]]] = []

    def note(images: torch.Tensor, random: Random) -> torch.Tensor:
        assert random.index.tolist() == images[:, 0, 0, 0].tolist()
        told.append((random.seed, random.epoch, random.index.tolist()))
        return images

    made = batches(numbered(6), 4, 3, seed=7, augment=[Change(note)])
    for epoch in (0, 2):
        for step in range(2):
            list(made.step(epoch, step))
    assert [(seed, epoch) for seed, epoch, _ in told] == [(7, 0)] * 3 + [(7, 2)] * 3
    assert sorted(number for _, _, index in told[:3] for number in index) == list(range(6))


def test_a_mixing_gets_shares_of_the_classes_and_what_follows_sees_them() -> None:
    def halve(images: torch.Tensor, targets: torch.Tensor, random: Random) -> tuple[torch.Tensor, torch.Tensor]:
        return images, (targets + targets.roll(1, 0)) / 2

    split = numbered(6)
    made = batches(split, 6, augment=[Change(halve, "mixing"), Change(lambda images, random: images)])
    images, targets, _ = next(made.step(0, 0))
    labels = images[:, 0, 0, 0].long() % 3
    expected = torch.zeros(6, 3)
    for row, (own, other) in enumerate(zip(labels.tolist(), labels.roll(1).tolist(), strict=True)):
        expected[row, own] += 0.5
        expected[row, other] += 0.5
    assert torch.equal(targets, expected)
    assert targets.dtype == torch.float32


def test_labels_of_shares_and_back() -> None:
    labels = torch.tensor([2, 0, 1])
    assert shares(labels, 3).tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0]]
    assert torch.equal(labels_of(shares(labels, 3)), labels)
    assert labels_of(labels) is labels
    mixed = torch.tensor([[0.3, 0.7]])
    assert shares(mixed, 2) is mixed


def test_balanced_batches_draw_every_class_equally_often() -> None:
    counts = [900, 90, 10]
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor(counts))
    split = Split(torch.zeros(1000, 1, 2, 2, dtype=torch.uint8), labels)
    made = batches(split, 100, balance=True)
    order = made.order(0)
    assert len(order) == made.images == 1000
    drawn_of_class = labels[order].bincount()
    assert (drawn_of_class - 1000 / 3).abs().max() < 4 * (1000 * 2 / 9) ** 0.5  # four standard deviations
    rare = order[labels[order] == 2].bincount(minlength=1000)[990:]
    assert (rare > 10).all()  # each of the ten about 33 times
    assert torch.equal(batches(split, 7, balance=True).order(0), order)
    assert not torch.equal(made.order(1), order)


def test_a_step_is_the_same_whatever_came_before():
    noise = torch.randint(256, (50, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    split = Split(noise, torch.arange(50) % 3)
    augment = [Item("augmentation").read(each) for each in ("flip", {"translate": 2}, {"cutout": 3})]
    normalise = Normalise(measure_normalisation(noise), CPU, torch.contiguous_format)
    walked = batches(split, 6, 4, augment=augment, normalise=normalise)
    for epoch in range(2):
        for step in range(walked.steps):
            last = list(walked.step(epoch, step))
            if (epoch, step) == (1, 7):
                break
    torch.manual_seed(123)
    asked = list(batches(split, 6, 4, augment=augment, normalise=normalise).step(1, 7))
    assert len(asked) == len(last) == 2
    for (images, labels, share), (images_, labels_, share_) in zip(asked, last, strict=True):
        assert torch.equal(images, images_)
        assert torch.equal(labels, labels_)
        assert share == share_
    plain, _, _ = next(batches(split, 6, 4, normalise=normalise).step(1, 7))
    assert not torch.equal(asked[0][0], plain)


def test_neither_augmenting_nor_normalising_changes_the_images_in_memory():
    split = numbered(20)
    before = split.images.clone()
    augment = [Item("augmentation").read(each) for each in ("flip", {"translate": 1}, {"cutout": 1})]
    for step in range(3):
        list(batches(split, 8, augment=augment).step(0, step))
    assert torch.equal(split.images, before)


MEASURED = Normalisation([0.1307, 0.5], [0.3081, 0.25])


def test_normalise_is_its_formula():
    images = torch.arange(256, dtype=torch.uint8).reshape(2, 2, 8, 8)
    found = Normalise(MEASURED, CPU, torch.contiguous_format)(images)
    assert found.dtype == torch.float32
    pixels = images.double() / 255
    mean, std = (torch.tensor(values).double()[:, None, None] for values in (MEASURED.mean, MEASURED.std))
    torch.testing.assert_close(found.double(), (pixels - mean) / std, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_one_normalise_serves_images_of_any_size_also_after_inference(memory_format: torch.memory_format) -> None:
    normalise = Normalise(MEASURED, CPU, memory_format)
    for height, width in ((4, 6), (1, 1), (6, 4), (4, 6)):
        images = torch.randint(256, (3, 2, height, width), dtype=torch.uint8)
        with torch.inference_mode():
            within = normalise(images)
        found = normalise(images)
        assert torch.equal(found, within)
        assert found.is_contiguous(memory_format=memory_format)
        mean, std = (torch.tensor(values)[:, None, None] * 255 for values in (MEASURED.mean, MEASURED.std))
        torch.testing.assert_close(found, (images - mean) / std, rtol=1e-5, atol=1e-5)
        weight = torch.ones(found.shape, requires_grad=True)
        (found * weight).sum().backward()
        assert torch.equal(weight.grad, found)


def test_normalised_training_images_have_mean_0_and_standard_deviation_1():
    images = torch.randint(256, (500, 3, 6, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images[:, 2] //= 4
    found = Normalise(measure_normalisation(images), CPU, torch.contiguous_format)(images).double()
    torch.testing.assert_close(found.mean((0, 2, 3)), torch.zeros(3).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.std((0, 2, 3), correction=0), torch.ones(3).double(), rtol=0, atol=1e-5)


def test_undo_gives_the_pixels_back_between_0_and_1():
    normalise = Normalise(MEASURED, CPU, torch.contiguous_format)
    images = torch.arange(256, dtype=torch.uint8).reshape(2, 2, 8, 8)
    torch.testing.assert_close(normalise.undo(normalise(images)), images / 255, rtol=0, atol=1e-6)
    far = torch.tensor([-100.0, 100.0]).reshape(1, 2, 1, 1)
    assert normalise.undo(far).flatten().tolist() == [0, 1]


def test_channels_last_is_another_layout_of_the_same_numbers():
    split = Split(torch.randint(256, (10, 3, 4, 5), dtype=torch.uint8), torch.zeros(10, dtype=torch.int64))
    normalisation = measure_normalisation(split.images)
    formats = torch.contiguous_format, torch.channels_last
    plain, last = (
        next(batches(split, 10, normalise=Normalise(normalisation, CPU, memory_format)).step(0, 0))[0]
        for memory_format in formats
    )
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert plain.is_contiguous()
    assert torch.equal(plain, last)


# every registered loss with a number of outputs that it takes, and what makes its terms weigh otherwise
LOSSES = [
    pytest.param({"name": name}, outputs, id=f"{name}-{outputs}")
    for name, facts in ((entry.name, entry.facts) for entry in registry.entries("loss"))
    if "classification" in facts.get("tasks", ["classification"])
    for outputs in {"bce": [1], "hinge": [1], "mse": [1, 3], "perceptron": [1, 3]}.get(name, [3])
] + [
    pytest.param({"name": "cross_entropy", "class_weights": [0.2, 1.0, 3.0]}, 3, id="weighted"),
    pytest.param({"name": "cross_entropy", "label_smoothing": 0.1}, 3, id="smoothed"),
]


@pytest.mark.parametrize("micro_size", [1, 7, 20, 23])
@pytest.mark.parametrize(("written", "outputs"), LOSSES)
def test_batch_gradient_descent_is_exact(written, outputs, micro_size):
    """The gradients of micro-batches, each weighted by its share, are the gradient of all images at once."""
    noise = torch.randint(256, (23, 1, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    split = Split(noise, torch.arange(23) % max(outputs, 2))
    loss = Section("loss").read(written)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, outputs)).double()
    normalise = Normalise(measure_normalisation(noise), CPU, torch.contiguous_format)

    total = 0.0
    for images, labels, share in batches(split, 23, micro_size, normalise=normalise).step(0, 0):
        part = loss(model(images.double()), labels) * share
        part.backward()
        total += part.item()
    accumulated = [parameter.grad for parameter in model.parameters()]

    whole = loss(model(normalise(split.images).double()), split.labels)
    expected = torch.autograd.grad(whole, list(model.parameters()))
    assert total == pytest.approx(whole.item(), rel=1e-12)
    for found, full in zip(accumulated, expected, strict=True):
        torch.testing.assert_close(found, full, rtol=1e-10, atol=1e-12)
