"""A rate is work by time: the work is counted in a second way, the time is a clock that the test moves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dltrain.gpu import rates


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time of `rates`, in seconds."""
    now = [0.0]
    monkeypatch.setattr(rates, "perf_counter", lambda: now[0])
    return now


def test_the_fastest_burst_counts_and_the_first_call_does_not(clock: list[float]) -> None:
    times = [100.0, 3.0, 2.0, 4.0, 1.0]
    calls = iter(times)

    def work() -> None:
        clock[0] += next(calls)

    assert rates.seconds_per_call(work, "cpu", seconds=8.0) == 2.0  # 3 + 2 + 4 are enough
    assert list(calls) == [1.0]


def test_calls_that_are_short_are_timed_many_at_once(clock: list[float]) -> None:
    bursts: list[float] = []
    reads = iter(range(10**6))

    def work() -> None:
        clock[0] += 1e-3
        bursts.append(next(reads))

    assert rates.seconds_per_call(work, "cpu", seconds=0.8) == pytest.approx(1e-3)
    # 1 without a clock; then 1, 2, 4, … 128, of 0.1 s and more, until 0.8 s have gone
    doubled = [2**power for power in range(8)]
    assert len(bursts) == 1 + sum(doubled) + 128 * -(-(800 - sum(doubled)) // 128)


def timed(monkeypatch: pytest.MonkeyPatch, spent: Callable[[int], float]) -> list[int]:
    """`seconds_per_call` says what `spent` makes of the FLOPs of a call, which are counted by torch's own counter."""
    counts: list[int] = []

    def seconds_per_call(work: Callable[[], object], device: str, seconds: float) -> float:
        with FlopCounterMode(display=False) as counter:
            work()
        counts.append(counter.get_total_flops())
        return spent(counts[-1])

    monkeypatch.setattr(rates, "seconds_per_call", seconds_per_call)
    return counts


def test_matrices_grow_until_a_product_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "LONG", 2e-5)
    counts = timed(monkeypatch, lambda flops: 1e-5 + flops / 1e14)
    assert rates.matmul_rate("cpu", torch.float32) == pytest.approx(2 * 1024**3 / (1e-5 + 2 * 1024**3 / 1e14))
    assert counts == [2 * 512**3, 2 * 1024**3]  # 1.3e-5 s and 3.1e-5 s


def test_the_best_rate_counts_and_matrices_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "LARGEST", 1024)
    timed(monkeypatch, lambda flops: flops / {2 * 512**3: 3e12, 2 * 1024**3: 2e12}[flops])
    assert rates.matmul_rate("cpu", torch.float32) == pytest.approx(3e12)


@pytest.mark.parametrize(("most", "found"), [(512, 2 * 512**3 / 1e-3), (0, None)])
def test_where_memory_ends_the_rate_is_that_of_what_fits(
    monkeypatch: pytest.MonkeyPatch, most: int, found: float | None
) -> None:
    timed(monkeypatch, lambda flops: 1e-3)

    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if len(a) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return a @ b

    if found is None:
        with pytest.raises(torch.OutOfMemoryError):
            rates.square_rate(product, "cpu", torch.float32, 0.1)
    else:
        assert rates.square_rate(product, "cpu", torch.float32, 0.1) == pytest.approx(found)


def test_another_error_is_raised_even_where_a_smaller_product_went_well(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, lambda flops: 1e-3)

    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if len(a) > 512:
            raise RuntimeError("CUDA error: unspecified launch failure")
        return a @ b

    with pytest.raises(RuntimeError, match="launch failure"):
        rates.square_rate(product, "cpu", torch.float32, 0.1)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_convolutions_count_forward_and_both_gradients(
    monkeypatch: pytest.MonkeyPatch, memory_format: torch.memory_format
) -> None:
    counts = timed(monkeypatch, lambda flops: 2.0)
    rate = rates.conv_rate("cpu", torch.float32, memory_format, channels=(3, 5), size=6, batch=2)
    assert rate == counts[0] / 2


def test_bytes_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, lambda flops: 0.25)
    assert rates.bandwidth("cpu", size=1 << 12) == 2 * (1 << 12) * 4  # read and written
    source, target = torch.arange(100.0), torch.zeros(100)
    assert rates.copy_rate(source, target) == 400 * 4
    assert torch.equal(source, target)


@pytest.mark.parametrize("wait", [False, True])
def test_a_launch_waits_where_it_is_told_to(monkeypatch: pytest.MonkeyPatch, wait: bool) -> None:
    waits: list[str] = []
    timed(monkeypatch, lambda flops: 1e-6)
    monkeypatch.setattr(rates, "synchronize", waits.append)
    assert rates.launch_seconds("cpu", wait) == 1e-6
    assert waits == ["cpu"] * wait


def test_measuring_draws_none_of_the_callers_numbers() -> None:
    before = torch.get_rng_state()
    rates.matmul_rate("cpu", torch.float32, seconds=0.001)
    rates.conv_rate("cpu", torch.float32, torch.channels_last, channels=(3, 5), size=6, batch=2, seconds=0.001)
    assert torch.equal(torch.get_rng_state(), before)
    one, other = (rates.normal((1000,), "cpu", torch.float32) for _ in range(2))
    assert torch.equal(one, other)
    assert abs(one.mean()) < 0.1  # 3 standard errors
    assert 0.9 < one.std() < 1.1
