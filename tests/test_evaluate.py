"""One pass over a split, against numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from dltrain import evaluate as evaluation
from dltrain.config import Config  # noqa: F401  registers the losses
from dltrain.data.batches import Normalise
from dltrain.data.dataset import Split
from dltrain.data.prepare import Normalisation, measure_normalisation
from dltrain.device import Placement
from dltrain.evaluate import Evaluation, evaluate, predicted, probabilities
from dltrain.registry import Section

CPU = torch.device("cpu")


def run(model: nn.Module, split: Split, loss: str = "cross_entropy", dtype: torch.dtype = torch.float32) -> Evaluation:
    placement = Placement(CPU, dtype, torch.contiguous_format, {})
    normalise = Normalise(Normalisation([0.0], [1.0]), CPU, torch.contiguous_format)  # pixels 0..1
    return evaluate(model, split, normalise, placement, Section("loss").read(loss))


def split(images: list[list[int]], labels: list[int]) -> Split:
    """One row of pixels an image."""
    return Split(torch.tensor(images, dtype=torch.uint8)[:, None, None, :], torch.tensor(labels))


def linear(weight: list[list[float]]) -> nn.Module:
    layer = nn.Linear(len(weight[0]), len(weight), bias=False)
    layer.weight.data = torch.tensor(weight)
    return nn.Sequential(nn.Flatten(), layer)


def test_loss_and_accuracy_by_hand():
    # the logits are ln 3 times the pixels, so [1, 0] has probabilities 3/4 and 1/4
    model = linear([[math.log(3), 0.0], [0.0, math.log(3)]])
    found = run(model, split([[255, 0], [0, 255], [255, 0], [255, 255]], [0, 1, 1, 0]))
    assert found.loss == pytest.approx((2 * math.log(4 / 3) + math.log(4) + math.log(2)) / 4)
    assert found.accuracy == 0.75
    expected = math.log(3) * torch.tensor([[1.0, 0], [0, 1], [1, 0], [1, 1]])
    torch.testing.assert_close(found.outputs, expected)
    assert found.labels.tolist() == [0, 1, 1, 0]
    assert found.scores() == {"loss": found.loss, "accuracy": 0.75}
    assert found.seconds > 0


def test_one_output_of_a_sigmoid_by_hand():
    model = linear([[2 * math.log(3), -math.log(3)]])
    found = run(model, split([[255, 255], [0, 255], [0, 255], [0, 0]], [1, 0, 1, 0]), "bce")
    # probabilities of class 1: 3/4, 1/4, 1/4, 1/2; the last is no class 1 yet
    assert found.loss == pytest.approx((math.log(4 / 3) * 2 + math.log(4) + math.log(2)) / 4)
    assert found.accuracy == 0.75
    assert found.outputs.shape == (4, 1)


@pytest.mark.parametrize("right", [0, 1, 2, 3])
def test_accuracy_is_the_share_to_the_last_digit(right):
    model = linear([[1.0], [0.0]])
    assert run(model, split([[255]] * 3, [0] * right + [1] * (3 - right))).accuracy == right / 3


def noise(count: int) -> Split:
    random = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 1, 4, 4), generator=random, dtype=torch.uint8)
    return Split(images, torch.randint(3, (count,), generator=random))


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("size", [1, 7, 22, 23, 24])
def test_ragged_batches_are_one_batch(monkeypatch, size, loss):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    model(torch.randn(50, 1, 4, 4))  # statistics that are not 0 and 1
    whole = run(model, noise(23), loss)
    monkeypatch.setattr(evaluation, "BATCH", size)
    parts = run(model, noise(23), loss)
    assert parts.accuracy == whole.accuracy
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    torch.testing.assert_close(parts.outputs, whole.outputs)
    assert torch.equal(parts.labels, noise(23).labels)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_evaluated_and_left_as_it_was(training):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    model(torch.randn(50, 1, 4, 4))
    model.train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    found = run(model, noise(23))
    assert {module.training for module in model.modules()} == {training}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)  # no dropout
    torch.testing.assert_close(found.outputs, model.eval()(noise(23).images / 255), rtol=1e-4, atol=1e-5)


def test_images_are_normalised():
    seen: list[torch.Tensor] = []

    class Watch(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            return x.flatten(1)

    images = noise(23)
    measured = measure_normalisation(images.images)
    normalise = Normalise(measured, CPU, torch.channels_last)
    placement = Placement(CPU, torch.float32, torch.channels_last, {})
    evaluate(Watch(), images, normalise, placement, Section("loss").read("cross_entropy"))
    assert torch.equal(torch.cat(seen), normalise(images.images))


def test_half_precision_is_used_and_outputs_are_float32():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    found = run(model, noise(23), dtype=torch.bfloat16)
    assert found.outputs.dtype == torch.float32
    assert torch.equal(found.outputs, found.outputs.bfloat16().float())  # computed in bfloat16
    torch.testing.assert_close(found.outputs, run(model, noise(23)).outputs, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        ([[1.0, 2, 0], [3, 3, 1], [-1, -2, -3]], [1, 0, 0]),  # the lower class of two that tie
        ([[0.1], [-0.1], [0.0], [5.0]], [1, 0, 0, 1]),
    ],
)
def test_predicted_by_hand(outputs, expected):
    found: Any = predicted(torch.tensor(outputs))
    assert (found.tolist(), found.dtype) == (expected, torch.int64)


def test_probabilities_by_hand():
    three = probabilities(torch.tensor([[math.log(2), math.log(5), math.log(3)], [7.0, 7.0, 7.0]]))
    torch.testing.assert_close(three, torch.tensor([[0.2, 0.5, 0.3], [1 / 3] * 3]))
    one = probabilities(torch.tensor([[math.log(3)], [0.0], [-math.log(4)]]))
    torch.testing.assert_close(one, torch.tensor([[0.25, 0.75], [0.5, 0.5], [0.8, 0.2]]))


def test_probabilities_speak_for_the_predicted_class():
    for width in (1, 4):
        outputs = torch.randn(200, width, generator=torch.Generator().manual_seed(0))
        shares = probabilities(outputs)
        torch.testing.assert_close(shares.sum(1), torch.ones(200))
        assert torch.equal(shares.argmax(1), predicted(outputs))
