"""Losses against torch's, against numbers worked out by hand, and in parts against the whole."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from dltrain import losses
from dltrain.registry import component, find

WEIGHTS = [0.5, 1.0, 2.0, 4.0, 0.25]

# every loss with the number of outputs that it takes
CASES = [
    pytest.param(losses.cross_entropy, {}, 5, id="cross_entropy"),
    pytest.param(losses.cross_entropy, {"label_smoothing": 0.1}, 5, id="smoothed"),
    pytest.param(losses.cross_entropy, {"class_weights": WEIGHTS}, 5, id="weighted"),
    pytest.param(losses.cross_entropy, {"label_smoothing": 0.2, "class_weights": WEIGHTS}, 5, id="smoothed-weighted"),
    pytest.param(losses.mse, {}, 5, id="mse"),
    pytest.param(losses.mse, {}, 1, id="mse-one-output"),
    pytest.param(losses.bce, {}, 1, id="bce"),
]


def batch(size, width, dtype=torch.float64):
    """Logits `[size, width]` that want a gradient, and targets `[size]`."""
    random = torch.Generator().manual_seed(size + 100 * width)
    outputs = 3 * torch.randn(size, width, generator=random, dtype=dtype)
    targets = torch.randint(max(width, 2), (size,), generator=random)
    return outputs.requires_grad_(), targets


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_cross_entropy_is_torchs_sum_over_the_number_of_images(smoothing, weights):
    outputs, targets = batch(40, 5)
    tensor = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    expected = F.cross_entropy(outputs, targets, tensor, label_smoothing=smoothing, reduction="sum") / 40
    found = losses.cross_entropy(outputs, targets, label_smoothing=smoothing, class_weights=weights)
    torch.testing.assert_close(found, expected)


def test_cross_entropy_without_weights_is_torchs_mean():
    outputs, targets = batch(40, 5)
    torch.testing.assert_close(losses.cross_entropy(outputs, targets), F.cross_entropy(outputs, targets))


def test_cross_entropy_by_hand():
    outputs = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]])  # probabilities 3/4 1/4, 1/2 1/2
    targets = torch.tensor([0, 1])
    plain = losses.cross_entropy(outputs, targets)
    assert plain.item() == pytest.approx((math.log(4 / 3) + math.log(2)) / 2)
    smoothed = losses.cross_entropy(outputs, targets, label_smoothing=0.2)  # targets 0.9 0.1, 0.1 0.9
    assert smoothed.item() == pytest.approx((0.9 * math.log(4 / 3) + 0.1 * math.log(4) + math.log(2)) / 2)
    weighted = losses.cross_entropy(outputs, targets, class_weights=[3.0, 1.0])
    assert weighted.item() == pytest.approx((3 * math.log(4 / 3) + math.log(2)) / 2)


def test_mse_is_torchs_against_one_hot_targets():
    outputs, targets = batch(40, 5)
    torch.testing.assert_close(losses.mse(outputs, targets), F.mse_loss(outputs, torch.eye(5).double()[targets]))


def test_mse_by_hand():
    outputs = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]])
    assert losses.mse(outputs, torch.tensor([2, 0])).item() == pytest.approx(((1 + 4 + 4) / 3 + (1 + 1 + 0) / 3) / 2)


def test_mse_of_one_output_compares_its_sigmoid_with_0_or_1():
    outputs = torch.tensor([[math.log(3)], [0.0]])  # sigmoids 3/4, 1/2
    assert losses.mse(outputs, torch.tensor([0, 1])).item() == pytest.approx((9 / 16 + 1 / 4) / 2)


def test_bce_is_the_cross_entropy_of_a_second_output_held_at_0():
    outputs, targets = batch(40, 1)
    pairs = torch.cat((torch.zeros_like(outputs), outputs), dim=1)
    torch.testing.assert_close(losses.bce(outputs, targets), F.cross_entropy(pairs, targets))


def test_bce_by_hand_and_far_out():
    outputs = torch.tensor([[math.log(3)], [-1000.0]])
    assert losses.bce(outputs, torch.tensor([1, 1])).item() == pytest.approx((math.log(4 / 3) + 1000) / 2)


@pytest.mark.parametrize(("loss", "arguments", "width"), CASES)
def test_parts_weighted_by_their_sizes_add_up_to_the_whole(loss, arguments, width):
    outputs, targets = batch(23, width)
    whole = loss(outputs, targets, **arguments)
    parts = [
        loss(some, true, **arguments) * len(true) / 23
        for some, true in zip(outputs.split([10, 9, 4]), targets.split([10, 9, 4]), strict=True)
    ]
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(*(torch.autograd.grad(value, outputs)[0] for value in (sum(parts), whole)))


@pytest.mark.parametrize(("loss", "arguments", "width"), CASES)
def test_gradient_against_finite_differences(loss, arguments, width):
    outputs, targets = batch(6, width)
    assert torch.autograd.gradcheck(lambda outputs: loss(outputs, targets, **arguments), outputs)


@pytest.mark.parametrize(("loss", "arguments", "width"), CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(loss, arguments, width, dtype):
    outputs, targets = batch(64, width, dtype)
    value = loss(outputs, targets, **arguments)
    assert value.dtype == torch.float32
    assert torch.equal(value, loss(outputs.float(), targets, **arguments))


@pytest.mark.parametrize(("loss", "arguments", "width"), CASES)
def test_nothing_waits_for_the_device(loss, arguments, width):
    outputs, targets = batch(8, width)
    value = loss(outputs.to("meta"), targets.to("meta"), **arguments)  # a meta tensor has no value to wait for
    assert value.shape == ()


def test_weights_first_used_by_an_evaluation_serve_training():
    losses._weights.cache_clear()
    outputs, targets = batch(8, 5)
    with torch.inference_mode():
        losses.cross_entropy(outputs.detach(), targets, class_weights=WEIGHTS)
    losses.cross_entropy(outputs, targets, class_weights=WEIGHTS).backward()
    assert losses._weights.cache_info().hits == 1


def test_weights_are_one_per_class():
    outputs, targets = batch(8, 5)
    with pytest.raises(ValueError, match=r"class_weights: expected 5 weights, one per class, got 3"):
        losses.cross_entropy(outputs, targets, class_weights=[1.0, 2.0, 3.0])


def test_cross_entropy_of_one_output_names_bce_and_softmax():
    with pytest.raises(ValueError, match=r"loss: bce.*model\.output: softmax"):
        losses.cross_entropy(*batch(8, 1))


@pytest.mark.parametrize("width", [2, 5])
def test_bce_of_several_outputs_says_what_it_needs(width):
    with pytest.raises(ValueError, match=rf"got {width} outputs: .*model\.output: sigmoid.*data\.classes"):
        losses.bce(*batch(8, width))


@pytest.mark.parametrize(
    "arguments",
    [
        {"label_smoothing": 1.0},
        {"label_smoothing": -0.1},
        {"class_weights": [1.0, 0.0]},
        {"class_weights": [1.0, math.inf]},
        {"class_weights": 2.0},
    ],
)
def test_the_config_is_checked(arguments):
    with pytest.raises(ValidationError):
        component(find("cross_entropy", "loss"), arguments)
