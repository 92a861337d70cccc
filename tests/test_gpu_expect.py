"""Operations are counted by hand and at the real size; the estimate is arithmetic on made-up rates."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from dltrain import config, shipped
from dltrain.gpu import expect
from dltrain.gpu.expect import Count, Operation, Rates, Step

FP32, BF16 = torch.float32, torch.bfloat16


def named(name: str) -> config.Config:
    return config.load(shipped.find(name))


def test_operations_are_counted_with_flops_and_bytes() -> None:
    x, weight = torch.zeros(8, 5), torch.zeros(5, 3)
    with Count() as count:
        y = x @ weight
        z = y.t()
        z.add_(1)
        torch.relu(z.bfloat16())
        torch.rand(4)
    assert count.operations == [
        Operation("matmul", FP32, 2 * 8 * 5 * 3, 4 * (8 * 5 + 5 * 3 + 8 * 3)),
        Operation("view", FP32, 0, 4 * (8 * 3 * 2)),
        Operation("other", FP32, 0, 4 * 8 * 3),  # in place: one tensor
        Operation("other", BF16, 0, (4 + 2) * 8 * 3),
        Operation("other", BF16, 0, 2 * 2 * 8 * 3),
        Operation("random", FP32, 0, 4 * 4),
    ]


@pytest.mark.parametrize(
    ("layer", "kinds"),
    [
        (nn.Conv2d(2, 3, 3, bias=False), ["conv", "conv"]),
        (nn.BatchNorm2d(2), ["norm", "norm"]),
        (nn.GroupNorm(1, 2), ["norm", "norm"]),
        (nn.MaxPool2d(2), ["pool", "pool"]),
        (nn.AvgPool2d(2), ["pool", "pool"]),
        (nn.Linear(6, 3, bias=False), ["matmul", "matmul", "matmul"]),
        (nn.ReLU(), ["other", "other"]),
        (nn.Dropout(0.5), ["random"]),
    ],
)
def test_layers_are_of_their_kind_forward_and_backward(layer: nn.Module, kinds: list[str]) -> None:
    x = torch.rand(2, 2, 4, 6, requires_grad=True)
    with Count() as count:
        layer(x).sum().backward()
    found = [each.kind for each in count.operations]
    extra = {"view", "other"} - set(kinds)
    assert [kind for kind in found if kind not in extra][: len(kinds)] == kinds


@pytest.mark.parametrize("name", ["digits_mlp", "mnist_cnn", "mnist_lenet5"])
def test_a_step_worked_out_from_small_ones_is_the_step(name: str) -> None:
    settings = named(name)
    found = expect.count_step(settings, "cpu")
    step = expect.stepper(expect.small(settings, "cpu", found.images))
    with Count() as count:
        step()
    assert found.images == settings.descent.batch_size
    assert [(each.kind, each.dtype, each.flops) for each in found.operations] == [
        (each.kind, each.dtype, each.flops) for each in count.operations
    ]
    total, exact = (sum(each.bytes for each in each_of) for each_of in (found.operations, count.operations))
    assert total == pytest.approx(exact, rel=5e-3)  # the whole set is counted where some of it is taken


def test_batch_and_stochastic_descent_take_the_images_that_go_through_at_once() -> None:
    settings = named("digits_mlp")
    for variant, images in (("batch", 1000), ("stochastic", 1)):
        changed = settings.model_copy(update={"descent": config.Descent(variant=variant)})  # type: ignore[arg-type]
        assert expect.count_step(changed, "cpu").images == images


def test_every_shipped_config_has_images_of_a_known_size() -> None:
    for name in shipped.names():
        channels, height, width, classes = expect._shape(named(name))
        assert channels in (1, 3, 8)  # gray, colour, the frames of a film
        assert min(height, width, classes) >= 8


def test_the_shapes_are_those_of_the_data(tmp_path: Path) -> None:
    digits = named("digits_mlp").data.source.build(None)
    assert expect.SHAPES["digits"] == (*digits.shape, len(digits.classes))
    synthetic = named("synthetic_cnn")
    assert expect._shape(synthetic) == (3, 32, 32, synthetic.data.source.args["class_count"])


def test_interpolation_is_linear_on_logarithmic_axes_and_flat_beyond() -> None:
    curve = [(1.0, 10.0), (100.0, 1000.0), (1000.0, 1000.0)]
    for x, y in ((0.1, 10), (1, 10), (10, 100), (50, 500), (100, 1000), (300, 1000), (1e6, 1000)):
        assert expect.interpolate(curve, x) == pytest.approx(y)
    assert expect.interpolate([(5.0, 7.0)], 1.0) == expect.interpolate([(5.0, 7.0)], 9.0) == 7.0


CURVES = {("matmul", FP32): [(1.0, 1e9)], ("other", FP32): [(1.0, 1e6)], ("other", BF16): [(1.0, 2e6)]}
OPERATIONS = [
    Operation("matmul", FP32, 3e6, 10.0),  # 3 ms
    Operation("other", FP32, 0, 4e3),  # 4 ms
    Operation("other", BF16, 0, 4e3),  # 2 ms
    Operation("matmul", BF16, 1e6, 10.0),  # 1 ms, at the rate of fp32
    Operation("view", FP32, 0, 1e12),  # moves nothing
    Operation("other", FP32, 0, 1.0),  # 1 µs, or a launch
]


@pytest.mark.parametrize(
    ("overhead", "launch", "waits", "seconds"),
    [
        (1e-3, 0.0, True, 6e-3 + 10.001e-3),
        (1e-3, 5e-3, True, 6e-3 + 4 * 5e-3 + 5e-3),
        (1e-3, 0.0, False, 10.001e-3),  # a GPU is still at work when the program is done
        (2e-3, 0.0, False, 12e-3),  # and here it waits for the program
    ],
)
def test_seconds_of_a_step(overhead: float, launch: float, waits: bool, seconds: float) -> None:
    assert Rates(CURVES, overhead, launch, waits).seconds(OPERATIONS) == pytest.approx(seconds)


def test_an_estimate_says_what_takes_most() -> None:
    rates = Rates(CURVES, 1e-4, 0.0, True)
    found = expect.estimate(Step(OPERATIONS, 32, "fp32"), rates)
    assert found == {"precision": "fp32", "images_per_second": pytest.approx(32 / 10.601e-3), "most": "other"}
    assert expect.estimate(Step(OPERATIONS, 32, "fp32"), Rates(CURVES, 1.0, 0.0, True))["most"] == "own"


def test_a_rate_is_the_kinds_own_work_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds_per_call(work: Callable[[], object], device: str, seconds: float) -> float:
        work()
        return 0.5

    monkeypatch.setattr(expect, "seconds_per_call", seconds_per_call)
    monkeypatch.setattr(expect, "BATCH", 8)
    rates = expect.measure("cpu", {("matmul", FP32), ("other", FP32)})
    products = 3 * expect.LAYERS  # forward, and the gradients of input and weight
    assert rates.curves["matmul", FP32] == [
        (pytest.approx(flops / size), products * flops / 0.5)
        for flops, size in ((2 * 8 * n * n, 4 * (2 * 8 * n + n * n)) for n in (256, 1024))
    ]
    numbers = 8 * 32 * 8 * 8  # forward two tensors, backward three
    assert rates.curves["other", FP32][0] == (4 * 2.5 * numbers, expect.LAYERS * 4 * 5 * numbers / 0.5)
    assert set(rates.curves) == {("matmul", FP32), ("other", FP32)}
    assert rates.waits
    assert rates.overhead == 0.5 / len(count_digits())


def count_digits() -> list[Operation]:
    step = expect.stepper(expect.small(named("digits_mlp"), "cpu", 2))
    with Count() as count:
        step()
    return count.operations


def test_one_config_that_fails_takes_no_other_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    right = expect.count_step

    def count_step(settings: config.Config, device: str) -> Step:
        if settings.name == "mnist_cnn":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee the documentation")
        return right(settings, device)

    monkeypatch.setattr(expect, "count_step", count_step)
    monkeypatch.setattr(expect, "seconds_per_call", lambda work, device, seconds: 1e-3)
    rows = expect.estimates("cpu", ["mnist_cnn", "digits_mlp", "mnist_perceptron"])
    assert {row["config"]: row.get("error") for row in rows} == {
        "digits_mlp": None,
        "mnist_perceptron": None,
        "mnist_cnn": "CUDA out of memory. Tried to allocate 2 GiB.",
    }
    assert all(math.isfinite(row["images_per_second"]) and row["precision"] == "fp32" for row in rows[:2])
