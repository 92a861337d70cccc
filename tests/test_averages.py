"""Averages against torch's, and against the mean worked out plainly."""

import copy

import pytest
import torch
from pydantic import ValidationError
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dltrain import averages
from dltrain.registry import component, find


def walk(steps):
    """The weights after each step, and before the first: float64 `[steps + 1, 3]`."""
    return torch.randn(steps + 1, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def follow(weights, average, steps_per_epoch, epochs, begin=1, **arguments):
    """The running average after each step from `begin` on."""
    mean, found = weights[begin - 1].clone(), []
    for step in range(begin, len(weights)):
        mean = mean + average(step, steps_per_epoch, epochs, **arguments) * (weights[step] - mean)
        found.append(mean)
    return torch.stack(found)


def torchs(weights, **arguments):
    """What AveragedModel makes of these weights, the first of which it copies."""
    model = torch.nn.Linear(3, 1, bias=False, dtype=torch.float64)
    averaged = AveragedModel(model, **arguments)
    found = []
    for each in weights:
        model.weight.data[0] = each
        averaged.update_parameters(model)
        found.append(copy.deepcopy(averaged.module.weight.data[0]))
    return torch.stack(found)


def test_ema_is_torchs_once_its_decay_is_reached():
    weights = walk(60)
    found = follow(weights, averages.ema, 10, 6, begin=21, decay=0.6)  # (1 + 21) / (10 + 21) is 0.71
    expected = torchs(weights[20:], multi_avg_fn=get_ema_multi_avg_fn(0.6))
    torch.testing.assert_close(found, expected[1:])


def test_ema_begins_with_the_decay_of_tensorflows():
    shares = [averages.ema(step, 10, 6, decay=0.5) for step in (1, 2, 6, 7, 8, 9, 100)]
    assert shares == pytest.approx([9 / 11, 9 / 12, 9 / 16, 9 / 17, 0.5, 0.5, 0.5])
    assert [averages.ema(step, 10, 6) for step in (889, 8989, 8990, 99999)] == pytest.approx(
        [9 / 899, 9 / 8999, 0.001, 0.001]
    )


def test_ema_every_few_steps_is_the_ema_of_those_steps():
    weights = walk(40)
    found = follow(weights, averages.ema, 10, 4, decay=0.7, every_steps=4)
    expected = follow(weights[::4], averages.ema, 10, 4, decay=0.7)
    torch.testing.assert_close(found[3::4], expected)
    torch.testing.assert_close(found[4:7], found[3].expand(3, 3))


@pytest.mark.parametrize(
    ("start", "epochs", "first"), [(0.75, 8, 6), (0.75, 10, 7), (0.29, 100, 29), (0.0, 4, 1), (0.9, 1, 1)]
)
def test_swa_is_torchs_of_the_ends_of_epochs(start, epochs, first):
    weights = walk(5 * epochs)
    found = follow(weights, averages.swa, 5, epochs, start=start)
    ends = weights[5::5]
    torch.testing.assert_close(found[4::5][: first - 1], ends[: first - 1])
    torch.testing.assert_close(found[4::5][first - 1 :], torchs(ends[first - 1 :]))
    torch.testing.assert_close(found[-1], ends[first - 1 :].mean(0))


def test_swa_leaves_its_average_alone_within_an_epoch():
    assert [averages.swa(step, 5, 2, start=0.5) for step in range(1, 11)] == [0, 0, 0, 0, 1, 0, 0, 0, 0, 0.5]


def test_swa_wants_its_batch_norm_statistics_measured_anew_and_ema_does_not():
    assert find("swa", "average").facts == {"reestimates": True}
    assert find("ema", "average").facts == {}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("ema", {"decay": 1.0}), ("ema", {"every_steps": 0}), ("swa", {"start": 1.0}), ("swa", {"start": -0.1})],
)
def test_the_config_is_checked(name, arguments):
    with pytest.raises(ValidationError):
        component(find(name, "average"), arguments)
