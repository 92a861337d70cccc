"""How fast a device computes and moves numbers, each measured in a bounded time.

A device is named as torch names it: cpu, cuda:0, mps.  Random numbers come from generators made here, so that measuring
changes none of the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from time import perf_counter

from dltrain.errors import names_memory
from dltrain.lazy import F, torch

LONG = 0.01  # seconds of one product: larger matrices reach no higher rate
LARGEST = 8192  # rows of a square matrix; three of them in fp32 are 0.8 GB


def synchronize(device: torch.device | str) -> None:
    """Waits until the device has done all that it was given."""
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize(torch.device(device))


def seconds_per_call(work: Callable[[], object], device: torch.device | str, seconds: float) -> float:
    """The least time of a call, on average over a burst, among the bursts that fit in about `seconds`.

    The least and not the mean: what else the machine does can only add to it.  `work` is called at least twice, the
    first time, which loads libraries and chooses kernels, without a clock.
    """
    work()
    synchronize(device)
    count, best, spent = 1, math.inf, 0.0
    while spent < seconds:
        start = perf_counter()
        for _ in range(count):
            work()
        synchronize(device)
        elapsed = perf_counter() - start
        best, spent = min(best, elapsed / count), spent + elapsed
        if elapsed < seconds / 8:
            count *= 2
    return best


def normal(shape: Sequence[int], device: torch.device | str, dtype: torch.dtype) -> torch.Tensor:
    """Standard normal numbers, drawn where they are used; a GPU multiplies numbers that are all alike faster."""
    generator = torch.Generator(device).manual_seed(0)
    return torch.randn(tuple(shape), device=device, generator=generator).to(dtype)


def matmul_rate(device: torch.device | str, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of the product of two large square matrices, 2 n³ operations.

    n grows from 512 until one product takes 10 ms, n is 8192 or memory ends; the best rate of them.  Raises what torch
    raises where the device has no such product, or no memory for the smallest one.
    """
    return square_rate(lambda a, b: torch.matmul(a, b), device, dtype, seconds)


def square_rate(
    product: Callable[[torch.Tensor, torch.Tensor], object],
    device: torch.device | str,
    dtype: torch.dtype,
    seconds: float,
) -> float:
    """As `matmul_rate`, of any `product` of matrices `[n, n]` of dtype."""
    best, n = 0.0, 512
    while n <= LARGEST:
        try:
            a = normal((n, n), device, torch.float32).to(dtype)
            each = seconds_per_call(lambda a=a: product(a, a), device, seconds / 5)  # type: ignore[misc]
        except Exception as error:
            if best and names_memory(error):
                break
            raise
        best = max(best, 2 * n**3 / each)
        if each > LONG:
            break
        n *= 2
    return best


def conv_rate(
    device: torch.device | str,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    channels: tuple[int, int] = (64, 128),
    size: int = 16,
    batch: int = 32,
    seconds: float = 0.1,
) -> float:
    """FLOP/s of a 3x3 convolution `[batch, channels[0], size, size]` -> channels[1], forward and backward."""
    inputs, outputs = channels
    x = normal((batch, inputs, size, size), device, dtype).to(memory_format=memory_format).requires_grad_()
    weight = normal((outputs, inputs, 3, 3), device, dtype).to(memory_format=memory_format).requires_grad_()
    above = normal((batch, outputs, size, size), device, dtype).to(memory_format=memory_format)

    def step() -> None:
        torch.autograd.grad(F.conv2d(x, weight, padding=1), (x, weight), above)

    return 3 * 2 * batch * size**2 * 9 * inputs * outputs / seconds_per_call(step, device, seconds)


def bandwidth(device: torch.device | str, size: int = 1 << 26, seconds: float = 0.1) -> float:
    """Bytes/s that an addition in place reads and writes, of `size` bytes of float32."""
    x = torch.zeros(size // 4, device=device)
    return 2 * size / seconds_per_call(lambda: x.add_(1), device, seconds)


def copy_rate(source: torch.Tensor, target: torch.Tensor, seconds: float = 0.1) -> float:
    """Bytes/s of a copy between two tensors of one size, on two devices or on one."""
    device = target.device if source.device.type == "cpu" else source.device
    return source.nbytes / seconds_per_call(lambda: target.copy_(source), device, seconds)


def launch_seconds(device: torch.device | str, wait: bool = False, seconds: float = 0.03) -> float:
    """Seconds of an addition to one number: in a row, or with a wait for the device after each."""
    x = torch.zeros((), device=device)

    def work() -> None:
        x.add_(1)
        if wait:
            synchronize(device)

    return seconds_per_call(work, device, seconds)
