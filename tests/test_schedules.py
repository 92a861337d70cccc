"""Schedules against torch's, and against numbers worked out by hand."""

import math

import numpy as np
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
    pytest.param(schedules.multistep, {"milestones_epochs": [5.0, 8.0]}, id="multistep"),
    pytest.param(schedules.linear, {}, id="linear"),
    pytest.param(schedules.polynomial, {}, id="polynomial"),
    pytest.param(schedules.exponential, {"factor": 0.9}, id="exponential"),
    pytest.param(schedules.knots, {"knots": [[4.0, 1.0], [9.0, 0.1]]}, id="knots"),
    pytest.param(schedules.warm_restarts, {"period_epochs": 3.0, "growth": 2.0}, id="warm_restarts"),
    pytest.param(schedules.one_cycle, {}, id="one_cycle"),
]
LINEAR = ALL[:-1]  # those whose warm-up is a straight line


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


def test_multistep_is_torchs_multi_step_lr():
    expected = torchs(70, lambda optimizer: lr_scheduler.MultiStepLR(optimizer, milestones=[14, 35, 56], gamma=0.3))
    found = ours(70, 7, schedules.multistep, milestones_epochs=[2.0, 5.0, 8.0, 100.0], factor=0.3)
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("final", [0.0, 0.05])
def test_linear_is_torchs_linear_lr(final):
    def make(optimizer):
        return lr_scheduler.LinearLR(optimizer, start_factor=1, end_factor=final, total_iters=70)

    assert ours(70, 7, schedules.linear, final=final) == pytest.approx(torchs(70, make), rel=1e-9)


@pytest.mark.parametrize("power", [0.9, 1.0, 2.0])
def test_polynomial_is_torchs_polynomial_lr(power):
    expected = torchs(70, lambda optimizer: lr_scheduler.PolynomialLR(optimizer, total_iters=70, power=power))
    assert ours(70, 7, schedules.polynomial, power=power) == pytest.approx(expected, rel=1e-9)
    lifted = [0.1 + 0.9 * multiplier for multiplier in expected]
    assert ours(70, 7, schedules.polynomial, power=power, final=0.1) == pytest.approx(lifted, rel=1e-9)


def test_exponential_is_torchs_exponential_lr():
    expected = torchs(70, lambda optimizer: lr_scheduler.ExponentialLR(optimizer, gamma=0.8 ** (1 / 7)))
    assert ours(70, 7, schedules.exponential, factor=0.8) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("growth", "final"), [(1, 0.0), (2, 0.0), (3, 0.1)])
def test_warm_restarts_is_torchs(growth, final):
    def make(optimizer):
        return lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=14, T_mult=growth, eta_min=final)

    found = ours(280, 7, schedules.warm_restarts, period_epochs=2.0, growth=float(growth), final=final)
    assert found == pytest.approx(torchs(280, make), rel=1e-9)


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


KNOTS = [[1.0, 0.2], [3.0, 1.0], [4.5, 0.4], [8.0, 0.0]]


def test_knots_are_numpys_interpolation():
    found = ours(100, 10, schedules.knots, knots=KNOTS)
    expected = np.interp(np.arange(100) / 10, [epoch for epoch, _ in KNOTS], [value for _, value in KNOTS])
    assert found == pytest.approx(expected.tolist(), abs=1e-12)


def test_one_knot_is_a_constant():
    assert ours(10, 2, schedules.knots, knots=[[2.0, 0.3]]) == [0.3] * 10


def test_knots_are_counted_from_the_start_of_the_run_and_a_warm_up_multiplies_them():
    plain = ours(20, 2, schedules.knots, knots=KNOTS)
    ramp = ours(20, 2, schedules.constant, warmup_epochs=2.5)
    warm = ours(20, 2, schedules.knots, knots=KNOTS, warmup_epochs=2.5)
    assert warm == pytest.approx([a * b for a, b in zip(plain, ramp, strict=True)])


@pytest.mark.parametrize(
    ("schedule", "arguments", "message"),
    [
        (schedules.knots, {"knots": [[0.0, 1.0], [3.0, 0.5], [2.0, 0.0]]}, "schedule.knots: .*knot 3 at 2 .*one at 3:"),
        (schedules.knots, {"knots": [[1.0, 1.0], [1.0, 0.5]]}, "schedule.knots: .*knot 2 at 1 .*one at 1:"),
        (
            schedules.multistep,
            {"milestones_epochs": [3.0, 9.0, 6.5]},
            "schedule.milestones_epochs: .*milestone 3 at 6.5",
        ),
    ],
)
def test_epochs_that_do_not_increase_are_named_at_the_first_step(schedule, arguments, message):
    with pytest.raises(ValueError, match=message):
        schedule(0, 10, **arguments)


def test_multistep_counts_from_the_start_of_the_run():
    multipliers = [
        schedules.multistep(epoch, 9, milestones_epochs=[3.0, 6.0], warmup_epochs=2) for epoch in (2, 2.9, 3, 5.9, 6)
    ]
    assert multipliers == pytest.approx([1.0, 1.0, 0.1, 0.1, 0.01])


def test_exponential_by_hand_counts_from_the_end_of_the_warm_up():
    multipliers = [schedules.exponential(epoch, 9, factor=0.25, warmup_epochs=2) for epoch in (2, 2.5, 3, 5)]
    assert multipliers == pytest.approx([1.0, 0.5, 0.25, 0.25**3])


@pytest.mark.parametrize(
    ("epoch", "period_epochs", "growth", "expected"),
    [
        (2.999, 3, 2, 0),
        (3, 3, 2, 1),
        (6, 3, 2, 0.5),
        (9, 3, 2, 1),
        (0.3, 0.1, 1, 1),
        (0.7, 0.1, 1, 1),
        (0.3, 0.1, 2, 1),
    ],
)
def test_warm_restarts_begin_anew_at_the_epoch_itself(epoch, period_epochs, growth, expected):
    found = schedules.warm_restarts(epoch, 90, period_epochs=period_epochs, growth=growth)
    assert found == pytest.approx(expected, abs=1e-6)


def test_warm_restarts_count_from_the_end_of_the_warm_up():
    for epoch in (0, 1, 3, 6.5):
        plain = schedules.warm_restarts(epoch, 20, period_epochs=2, growth=1.5)
        assert schedules.warm_restarts(4 + epoch, 20, period_epochs=2, growth=1.5, warmup_epochs=4) == plain


@pytest.mark.parametrize(
    "arguments",
    [
        {"factor": 0.5, "patience_epochs": 3},
        {"factor": 0.5, "patience_epochs": 0, "threshold": 0.0},
        {"factor": 0.3, "patience_epochs": 1, "threshold": 0.05, "cooldown_epochs": 2},
        {"factor": 0.2, "patience_epochs": 2, "cooldown_epochs": 1, "final": 0.03},
    ],
)
def test_plateau_decides_as_torchs_reduce_on_plateau(arguments):
    given = {"factor": "factor", "patience_epochs": "patience", "threshold": "threshold"}
    given |= {"cooldown_epochs": "cooldown", "final": "min_lr"}
    random = torch.Generator().manual_seed(0)
    for _ in range(10):
        noise = 1 + 0.3 * torch.rand(60, generator=random)
        losses = (noise * torch.linspace(0, -0.3, 60).exp()).tolist()
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        settings = {given[name]: value for name, value in arguments.items()}
        scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, eps=0.0, **settings)
        for epoch, loss in enumerate(losses, 1):
            scheduler.step(loss)
            assert schedules.plateau(losses[:epoch], **arguments) == pytest.approx(optimizer.param_groups[0]["lr"])
        assert optimizer.param_groups[0]["lr"] < 1


def test_plateau_by_hand():
    losses = [1.0, 0.5, 0.5, 0.6, 0.4, 0.41, 0.42, 0.43]  # two epochs no better at the fourth, the seventh
    found = [schedules.plateau(losses[:n], factor=0.1, patience_epochs=1) for n in range(len(losses) + 1)]
    assert found == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize(("schedule", "arguments"), LINEAR)
def test_warm_up_is_a_line_from_a_25th(schedule, arguments):
    found = [schedule(epoch, 20, warmup_epochs=4, **arguments) for epoch in (0, 1, 2, 3, 4)]
    assert found == pytest.approx([0.04, 0.28, 0.52, 0.76, 1.0])


@pytest.mark.parametrize("schedule", [schedules.cosine, schedules.linear, schedules.polynomial])
def test_a_curve_has_the_rest_of_the_run_after_the_warm_up(schedule):
    for epoch in (0, 2.5, 7, 16):
        assert schedule(4 + epoch, 20, warmup_epochs=4) == pytest.approx(schedule(epoch, 16))


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
        ("multistep", {"milestones_epochs": []}),
        ("multistep", {"milestones_epochs": 3.0}),
        ("linear", {"final": -0.1}),
        ("polynomial", {"power": 0.0}),
        ("exponential", {}),
        ("knots", {"knots": []}),
        ("knots", {"knots": [[1.0, 1.0, 1.0]]}),
        ("knots", {"knots": [[1.0, -1.0]]}),
        ("warm_restarts", {"period_epochs": 0.0}),
        ("warm_restarts", {"period_epochs": 1.0, "growth": 0.5}),
        ("plateau", {"factor": 1.0}),
        ("plateau", {"patience_epochs": 1.5}),
        ("plateau", {"threshold": 1.0}),
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
        component(find(name, "schedule", "feedback"), arguments)
