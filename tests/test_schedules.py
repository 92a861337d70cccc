"""Schedules against torch's, and against numbers worked out by hand."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch.optim import lr_scheduler

from dltrain import schedules
from dltrain.registry import component, find

ALL = [
    pytest.param(schedules.constant, {}, id="constant"),
    pytest.param(schedules.step, {"every_epochs": 2}, id="step"),
    pytest.param(schedules.cosine, {}, id="cosine"),
    pytest.param(schedules.one_cycle, {}, id="one_cycle"),
]
LINEAR = ALL[:3]  # those whose warm-up is a straight line


def torchs(steps, make):
    """The multipliers that a scheduler of torch gives at `steps` steps."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = make(optimizer)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def ours(steps, steps_per_epoch, schedule, **arguments):
    return [schedule(i / steps_per_epoch, steps / steps_per_epoch, **arguments) for i in range(steps)]


def test_constant():
    assert ours(20, 4, schedules.constant) == [1.0] * 20


def test_step_is_torchs_step_lr():
    expected = torchs(70, lambda optimizer: lr_scheduler.StepLR(optimizer, step_size=3 * 7, gamma=0.2))
    assert ours(70, 7, schedules.step, every_epochs=3, factor=0.2) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("final", [0.0, 0.05])
def test_cosine_is_torchs_cosine_annealing(final):
    expected = torchs(70, lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=70, eta_min=final))
    assert ours(70, 7, schedules.cosine, final=final) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("warmup_epochs", "share"), [(None, 0.3), (4.0, 0.4)])
def test_one_cycle_is_torchs_one_cycle(warmup_epochs, share):
    # torch counts from the first step to the last; ours ends a step after the last, where the run does
    def make(optimizer):
        return lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=101, pct_start=(share * 100 + 1) / 101)

    expected = torchs(100, make)
    assert ours(100, 10, schedules.one_cycle, warmup_epochs=warmup_epochs) == pytest.approx(expected, rel=1e-9)


def test_cosine_by_hand():
    assert schedules.cosine(0, 10) == 1.0
    assert schedules.cosine(5, 10) == pytest.approx(0.5)
    assert schedules.cosine(10 / 3, 10) == pytest.approx(0.75)  # cos 60 degrees is 1/2
    assert schedules.cosine(10, 10) == pytest.approx(0.0, abs=1e-15)
    assert schedules.cosine(5, 10, final=0.2) == pytest.approx(0.6)
    assert schedules.cosine(10, 10, final=0.2) == pytest.approx(0.2)


def test_one_cycle_by_hand():
    assert schedules.one_cycle(0, 10) == pytest.approx(0.04)
    assert schedules.one_cycle(1.5, 10) == pytest.approx(0.52)  # half way up
    assert schedules.one_cycle(3, 10) == pytest.approx(1.0)
    assert schedules.one_cycle(6.5, 10) == pytest.approx((1 + 4e-6) / 2)  # half way down
    assert schedules.one_cycle(10, 10) == pytest.approx(4e-6)
    assert schedules.one_cycle(0, 10, warmup_epochs=0.0) == 1.0


@pytest.mark.parametrize(
    ("epoch", "every_epochs", "changes"),
    [(0, 30, 0), (29.999, 30, 0), (30, 30, 1), (59.99, 30, 1), (60, 30, 2), (0.3, 0.1, 3), (0.7, 0.1, 7)],
)
def test_step_changes_at_the_epoch_itself(epoch, every_epochs, changes):
    assert schedules.step(epoch, 90, every_epochs=every_epochs, factor=0.5) == 0.5**changes


def test_step_counts_from_the_end_of_the_warm_up():
    multipliers = [schedules.step(epoch, 9, every_epochs=3, factor=0.1, warmup_epochs=2) for epoch in (2, 4.9, 5, 8)]
    assert multipliers == pytest.approx([1.0, 1.0, 0.1, 0.01])


@pytest.mark.parametrize(("schedule", "arguments"), LINEAR)
def test_warm_up_is_a_line_from_a_25th(schedule, arguments):
    found = [schedule(epoch, 20, warmup_epochs=4, **arguments) for epoch in (0, 1, 2, 3, 4)]
    assert found == pytest.approx([0.04, 0.28, 0.52, 0.76, 1.0])


def test_cosine_has_the_rest_of_the_run_after_the_warm_up():
    for epoch in (0, 2.5, 7, 16):
        assert schedules.cosine(4 + epoch, 20, warmup_epochs=4) == pytest.approx(schedules.cosine(epoch, 16))


@pytest.mark.parametrize("warmup_epochs", [0.0, 0.5, 3.0])
@pytest.mark.parametrize(("schedule", "arguments"), ALL)
def test_no_step_is_wasted_and_none_is_above_the_learning_rate(schedule, arguments, warmup_epochs):
    multipliers = ours(60, 6, schedule, warmup_epochs=warmup_epochs, **arguments)
    assert all(0 < multiplier <= 1 for multiplier in multipliers)
    assert multipliers[round(6 * warmup_epochs)] == 1.0


@pytest.mark.parametrize("warmup_epochs", [3, 3.5])
@pytest.mark.parametrize(("schedule", "arguments"), ALL)
def test_a_warm_up_as_long_as_the_run_is_refused_at_the_first_step(schedule, arguments, warmup_epochs):
    with pytest.raises(ValueError, match=rf"warmup_epochs: {warmup_epochs:g} .* 3 epochs.*train\.epochs"):
        schedule(0, 3, warmup_epochs=warmup_epochs, **arguments)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("constant", {"warmup_epochs": -1.0}),
        ("cosine", {"final": 1.5}),
        ("one_cycle", {"warmup_epochs": math.nan}),
        ("step", {}),
        ("step", {"every_epochs": 0}),
        ("step", {"every_epochs": 3, "factor": 0.0}),
    ],
)
def test_the_config_is_checked(name, arguments):
    with pytest.raises(ValidationError):
        component(find(name, "schedule"), arguments)
