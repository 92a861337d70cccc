"""Does a device compute what training needs?  Each test says so by itself, and may fail alone.

A row is plain data: device, name, result ("pass", "warn", "fail" or "skip"), ms (of the whole test), message, and where
something was measured rate and unit.  References are computed on the CPU in float64.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import Any

from dltrain.errors import DeviceError, names_memory
from dltrain.gpu import rates
from dltrain.gpu.worker import Gone, Worker, first_line
from dltrain.lazy import F, nn, torch

Row = dict[str, Any]
Outcome = dict[str, Any]  # of a row: all but device, name and ms
TIMEOUT = 60.0  # seconds after which a test hangs: many times what the slowest takes
MOST_RESTARTS = 3  # of the worker for one device, each for a test that left its process unusable: 3 s each
BYTES = 1 << 24  # of a copy, and of the memory that is written and read

# the largest error of a product's entry, in standard deviations of the entries: sums are kept in fp32 or better, so it
# is the rounding of the result, half a unit in the last place at 4 to 5 deviations (2^-9 * 8 = 0.016 in bf16, 0.002 in
# fp16), and in TF32 that of the factors (2^-11 each, 0.002 in the worst of 10^5 sums); three times that passes
TOLERANCE = {"float32": 1e-4, "tf32": 0.006, "bfloat16": 0.05, "float16": 0.006, "float8_e4m3fn": 0.05}


class Skip(Exception):
    """A test that says nothing here; its message says why."""


def run(worker: Worker, devices: Sequence[str], quick: bool = False) -> Iterator[Row]:
    """The rows of all tests on all devices, each as soon as it is known; nothing is raised.

    quick: only those that decide whether the device can be trained on, and shorter measurements
    """
    compiling = next((device for device in devices if device != "cpu"), "cpu")  # one will do: it takes seconds
    for device in devices:
        stopped, restarts = "", 0
        for name, (function, is_quick) in TESTS.items():
            if quick and not is_quick:
                continue
            if stopped or (function is compile_ and device != compiling):
                yield _row(device, name, 0.0, "skip", stopped or f"tried on {compiling}")
                continue
            start = perf_counter()
            try:
                row = worker.ask(TIMEOUT, row_of, device, name, quick)
            except DeviceError as error:
                row = _row(device, name, 1000 * (perf_counter() - start), "fail", str(error))
                restarts += 1
                if isinstance(error, Gone) and row["ms"] >= 1000 * TIMEOUT:
                    stopped = f"not tried: {name} hangs"
            yield row
            if row["result"] != "fail":
                continue
            if function in ESSENTIAL:
                stopped = stopped or f"not tried: {name} fails"
            elif "error: " in row["message"]:  # CUDA's and HIP's stay with their process
                worker.restart()
                restarts += 1
            if restarts >= MOST_RESTARTS:
                stopped = stopped or f"not tried: {restarts} tests before left the device unusable"


def row_of(device: str, name: str, quick: bool = False) -> Row:
    """The row of one test, in this process."""
    function, _ = TESTS[name]
    start = perf_counter()
    outcome: Outcome
    try:
        outcome = function(device, quick)
    except Skip as reason:
        outcome = {"result": "skip", "message": str(reason)}
    except Exception as error:  # out of memory, no code for this card, a device that vanished, …
        outcome = {"result": "fail", "message": first_line(error)}
    return {**_row(device, name, 1000 * (perf_counter() - start), "", ""), **outcome}


def _row(device: str, name: str, ms: float, result: str, message: str) -> Row:
    return {"device": device, "name": name, "result": result, "ms": ms, "message": message}


def _judged(good: bool, message: str, rate: float | None = None, unit: str = "") -> Outcome:
    measured = {} if rate is None else {"rate": rate, "unit": unit}
    return {"result": "pass" if good else "fail", "message": message, **measured}


def _kind(device: str) -> str:
    return torch.device(device).type


def _needs_cuda(device: str) -> None:
    if _kind(device) != "cuda":
        raise Skip("CUDA only")


def _needs_capability(device: str, least: tuple[int, int], what: str) -> None:
    """Skips an NVIDIA card older than what brought a type of number; AMD's have no such number."""
    if _kind(device) == "cuda" and not torch.version.hip:
        found = torch.cuda.get_device_capability(device)
        if found < least:
            raise Skip(f"{what} needs compute capability {least[0]}.{least[1]}, this has {found[0]}.{found[1]}")


def _draw(*shape: int, seed: int = 0) -> torch.Tensor:
    """float64 on the CPU, standard normal."""
    return torch.empty(shape, dtype=torch.float64).normal_(generator=torch.Generator().manual_seed(seed))


def _error(found: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest difference, in standard deviations of the exact entries; NaN where one is."""
    exact = exact.detach()
    return float((found.detach().cpu().double() - exact).abs().max() / exact.std())


def context(device: str, quick: bool) -> Outcome:
    """The first use of the device."""
    zeros = torch.zeros(3, device=device)
    rates.synchronize(device)
    return _judged(zeros.cpu().tolist() == [0.0] * 3, "three zeros come back")


def kernel_launch(device: str, quick: bool) -> Outcome:
    numbers = torch.arange(1000, device=device) * 3 + 1
    good = torch.equal(numbers.cpu(), torch.arange(1, 3001, 3))
    in_a_row, with_wait = (1e6 * rates.launch_seconds(device, wait) for wait in (False, True))
    message = f"{'1000 sums right' if good else 'wrong sums'}; {with_wait:.1f} µs with a wait after each"
    return _judged(good, message, in_a_row, "µs")


def memory(device: str, quick: bool) -> Outcome:
    """Every word of a block is written with a number of its own and read again; then the block is freed."""
    before = _allocated(device)
    odd = 0x9E3779B1 - (1 << 32)  # an odd factor gives no number twice; products wrap around
    block = torch.arange(BYTES // 4, dtype=torch.int32, device=device) * odd
    wrong = int((block.cpu() != torch.arange(BYTES // 4, dtype=torch.int32) * odd).sum())
    del block
    left = _allocated(device) - before
    message = f"{BYTES >> 20} MiB written and read, {wrong} words wrong, {left} bytes not freed"
    return _judged(wrong == 0 and left == 0, message, rates.bandwidth(device) / 1e9, "GB/s")


def _allocated(device: str) -> int:
    """Bytes in tensors; 0 where nobody counts."""
    return torch.cuda.memory_allocated(device) if _kind(device) == "cuda" else 0


def _copies(device: str, pinned: bool) -> Outcome:
    source = torch.empty(BYTES, dtype=torch.uint8).random_(generator=torch.Generator().manual_seed(0))
    back = torch.empty_like(source, pin_memory=pinned)
    if pinned:
        source = source.pin_memory()
    there = torch.empty(BYTES, dtype=torch.uint8, device=device)
    there.copy_(source)
    back.copy_(there)
    wrong = int((back != source).sum())
    to, fro = (rates.copy_rate(*pair) / 1e9 for pair in ((source, there), (there, back)))
    return _judged(wrong == 0, f"{wrong} of {BYTES} bytes wrong; back at {fro:.1f} GB/s", to, "GB/s")


def copy_pageable(device: str, quick: bool) -> Outcome:
    return _copies(device, pinned=False)


def copy_pinned(device: str, quick: bool) -> Outcome:
    _needs_cuda(device)
    return _copies(device, pinned=True)


def _product(
    device: str,
    quick: bool,
    dtype: torch.dtype,
    tolerance: float,
    multiply: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> Outcome:
    """A product of matrices that fill no tile exactly, and the rate of large ones."""
    multiply = multiply or (lambda a, b: torch.matmul(a, b))
    a, b = (_draw(496, 528).to(dtype), _draw(528, 528, seed=1)[:, :512].to(dtype))  # b's rows lie apart in memory
    error = _error(multiply(a.to(device), b.to(device)), a.double() @ b.double())
    rate = rates.square_rate(multiply, device, dtype, 0.1 if quick else 0.4)
    return _judged(error <= tolerance, f"largest error {error:.1e} standard deviations", rate / 1e12, "TFLOP/s")


def matmul_fp32(device: str, quick: bool) -> Outcome:
    """On CUDA in full precision, which an environment variable may forbid: then TF32's error must do."""
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "ieee"
    try:
        forced = os.environ.get("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE") == "1" or "NVIDIA_TF32_OVERRIDE" in os.environ
        return _product(device, quick, torch.float32, TOLERANCE["tf32" if forced else "float32"])
    finally:
        settings.fp32_precision = before


def matmul_tf32(device: str, quick: bool) -> Outcome:
    _needs_cuda(device)
    _needs_capability(device, (8, 0), "TF32")
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "tf32"
    try:
        return _product(device, quick, torch.float32, TOLERANCE["tf32"])
    finally:
        settings.fp32_precision = before


def matmul_bf16(device: str, quick: bool) -> Outcome:
    _needs_capability(device, (8, 0), "bf16")
    return _product(device, quick, torch.bfloat16, TOLERANCE["bfloat16"])


def matmul_fp16(device: str, quick: bool) -> Outcome:
    if _kind(device) == "cpu":
        raise Skip("nothing trains in fp16 on a CPU")
    return _product(device, quick, torch.float16, TOLERANCE["float16"])


def fp8_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """bf16 `[m, n]` of float8 `[m, k]`, `[k, n]`; the hardware wants the second one column by column."""
    one = torch.ones((), device=a.device)
    return torch._scaled_mm(a, b.t().contiguous().t(), one, one, out_dtype=torch.bfloat16)


def matmul_fp8(device: str, quick: bool) -> Outcome:
    _needs_cuda(device)
    _needs_capability(device, (8, 9), "fp8")
    return _product(device, quick, torch.float8_e4m3fn, TOLERANCE["float8_e4m3fn"], fp8_product)


def attention(device: str, quick: bool) -> Outcome:
    """Scaled dot-product attention of 2 heads of 40 numbers over 60 places, and its gradient."""
    query, key, value, above = (_draw(3, 2, 60, 40, seed=seed) for seed in range(4))

    def both(move: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        inputs = [move(each).requires_grad_() for each in (query, key, value)]
        output = F.scaled_dot_product_attention(inputs[0], inputs[1], inputs[2])
        return [output, *torch.autograd.grad(output, inputs, move(above))]

    found, exact = both(lambda each: each.float().to(device)), both(lambda each: each.clone())
    error = max(_error(one, other) for one, other in zip(found, exact, strict=True))
    return _judged(error <= TOLERANCE["tf32"], f"largest error {error:.1e} standard deviations, gradients too")


def _convolution(device: str, quick: bool, memory_format: torch.memory_format, dtype: torch.dtype) -> Outcome:
    """A 3x3 convolution with 24 and 40 channels, which fill no tile, forward and backward; the rate of 64 and 128."""
    x, weight, above = _draw(8, 24, 14, 14), _draw(40, 24, 3, 3, seed=1), _draw(8, 40, 14, 14, seed=2)

    def both(move: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        inputs = [move(each).requires_grad_() for each in (x, weight)]
        output = F.conv2d(inputs[0], inputs[1], padding=1)
        return [output, *torch.autograd.grad(output, inputs, move(above))]

    found = both(lambda each: each.to(device=device, dtype=dtype, memory_format=memory_format))
    exact = both(lambda each: each.to(dtype).double())
    error = max(_error(one, other) for one, other in zip(found, exact, strict=True))
    tolerance = TOLERANCE["tf32" if dtype == torch.float32 else "bfloat16"]  # cuDNN takes TF32 for fp32 by default
    batch = 32 if _kind(device) == "cpu" else 256
    rate = rates.conv_rate(device, dtype, memory_format, batch=batch)
    message = f"largest error {error:.1e} standard deviations, gradients too"
    return _judged(error <= tolerance, message, rate / 1e12, "TFLOP/s")


def conv_contiguous(device: str, quick: bool) -> Outcome:
    return _convolution(device, quick, torch.contiguous_format, torch.float32)


def conv_channels_last(device: str, quick: bool) -> Outcome:
    return _convolution(device, quick, torch.channels_last, torch.float32)


def conv_bf16(device: str, quick: bool) -> Outcome:
    _needs_capability(device, (8, 0), "bf16")
    return _convolution(device, quick, torch.channels_last, torch.bfloat16)


def autocast(device: str, quick: bool) -> Outcome:
    """A layer under bf16 autocast: its output is bf16, its gradient fp32, and both near the exact ones."""
    _needs_capability(device, (8, 0), "bf16")
    x, weight = _draw(64, 96), _draw(32, 96, seed=1) / 96**0.5
    parameter = weight.float().to(device).requires_grad_()
    with torch.autocast(_kind(device), torch.bfloat16):
        output = F.linear(x.float().to(device), parameter)
    (gradient,) = torch.autograd.grad(output.float().square().mean(), parameter)
    exact = x @ weight.T
    error = max(_error(output, exact), _error(gradient, 2 / exact.numel() * exact.T @ x))
    types = (output.dtype, gradient.dtype) == (torch.bfloat16, torch.float32)
    message = f"{_short(output.dtype)} output, {_short(gradient.dtype)} gradient, largest error {error:.1e}"
    return _judged(types and error <= TOLERANCE["bfloat16"], f"{message} standard deviations")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


BATCH, STEPS, RATE = 64, 15, 0.05
AGREES = 0.02  # of the loss, between fp32 and float64: they are 2e-5 apart, and 4e-3 where cuDNN takes TF32 for fp32


def _train(device: str, dtype: torch.dtype) -> tuple[list[float], list[torch.Tensor], float]:
    """Losses before each of STEPS + 1 steps of a small CNN on one batch of ten noisy patterns, the weights, seconds.

    The update is written out: the first use of torch.optim would import for 0.9 s.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        layers = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten()]
        model = nn.Sequential(*layers, nn.Linear(16 * 4 * 4, 10)).to(device=device, dtype=dtype)
    labels = torch.arange(BATCH) % 10
    images = torch.empty(10, 3, 16, 16).normal_(generator=generator)[labels]  # [B, C, H, W]
    images += 0.5 * torch.empty(BATCH, 3, 16, 16).normal_(generator=generator)
    images, labels = images.to(device=device, dtype=dtype), labels.to(device)
    parameters = list(model.parameters())
    losses = []

    def step() -> None:
        loss = F.cross_entropy(model(images), labels)
        losses.append(loss.detach())
        with torch.no_grad():
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter.sub_(gradient, alpha=RATE)

    step()  # the first loads libraries and chooses kernels
    rates.synchronize(device)
    start = perf_counter()
    for _ in range(STEPS):
        step()
    rates.synchronize(device)
    seconds = perf_counter() - start
    return [float(loss) for loss in losses], [parameter.detach().cpu() for parameter in parameters], seconds


def training(device: str, quick: bool) -> Outcome:
    """The loss must come down to a quarter, step by step as it does on the CPU in float64."""
    losses, _, seconds = _train(device, torch.float32)
    exact, _, _ = _train("cpu", torch.float64)
    apart = max(abs(one - other) / other for one, other in zip(losses, exact, strict=True))
    agrees = all(abs(one - other) <= AGREES * other for one, other in zip(losses, exact, strict=True))  # no NaN does
    message = f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {STEPS} steps, {apart:.1e} from the CPU's in float64"
    return _judged(agrees and losses[-1] < losses[0] / 4, message, BATCH * STEPS / seconds, "images/s")


def deterministic(device: str, quick: bool) -> Outcome:
    """Trained twice with deterministic algorithms alone: the same bits."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        (losses, weights, _), (again, others, _) = (_train(device, torch.float32) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(before)
    same = losses == again and all(map(torch.equal, weights, others))
    return _judged(same, f"{STEPS} steps twice: {'the same bits' if same else 'other bits'}")


def cuda_graph(device: str, quick: bool) -> Outcome:
    """A product and a ReLU, recorded once and replayed on other numbers."""
    _needs_cuda(device)
    one, other = (_draw(64, 64, seed=seed).float().to(device) for seed in range(2))
    x = one.clone()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.device(device):
        with torch.cuda.stream(stream):  # the first call makes what a recording may not
            torch.relu(x @ x)
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = torch.relu(x @ x)
        x.copy_(other)
        graph.replay()
        rates.synchronize(device)
    error = _error(output, torch.relu(other.cpu().double() @ other.cpu().double()))
    return _judged(error <= TOLERANCE["tf32"], f"largest error {error:.1e} standard deviations")


def out_of_memory(device: str, quick: bool) -> Outcome:
    """More memory than there is, asked for and refused, must leave a device that computes."""
    count = torch.cuda.mem_get_info(device)[1] * 2 if _kind(device) == "cuda" else 1 << 50
    try:
        torch.empty(count, dtype=torch.uint8, device=device)
    except Exception as error:
        if not names_memory(error) and "buffer size" not in str(error):  # Metal's words
            raise
    else:
        return _judged(False, f"{count:.1e} bytes were given, which are not there")
    good = torch.equal(torch.arange(1000, device=device).cpu() * 3, torch.arange(0, 3000, 3))
    return _judged(good, f"refused; the device computes on{'' if good else ', and wrongly'}")


def all_reduce(device: str, quick: bool) -> Outcome:
    """The sum over all GPUs, by NCCL."""
    _needs_cuda(device)
    count = torch.cuda.device_count()
    if count == 1 or torch.device(device).index:
        raise Skip("there is one GPU" if count == 1 else "tried on cuda:0")
    tensors = [torch.full((1 << 20,), 1.0 + index, device=f"cuda:{index}") for index in range(count)]
    torch.cuda.nccl.all_reduce(tensors)
    wrong = sum(int((each != count * (count + 1) / 2).sum()) for each in tensors)
    return _judged(wrong == 0, f"{count} GPUs, {wrong} of {count << 20} sums wrong")


def compile_(device: str, quick: bool) -> Outcome:
    """torch.compile of a layer and its gradient; training can do without, so what it raises is a warning."""
    x, weight = _draw(32, 48).float().to(device), _draw(48, 16, seed=1).float().to(device).requires_grad_()

    def layer(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ weight).square().mean()

    (expected,) = torch.autograd.grad(layer(x, weight), weight)
    try:
        (found,) = torch.autograd.grad(torch.compile(layer)(x, weight), weight)
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return {"result": "warn", "message": f"torch.compile does not work here: {' '.join(lines[:2])}"}
    apart = _error(found, expected.cpu().double())
    return _judged(apart <= TOLERANCE["tf32"], f"gradient {apart:.1e} standard deviations from the one without")


Test = Callable[[str, bool], Outcome]
TESTS: dict[str, tuple[Test, bool]] = {  # name -> (test, whether it is one of the quick ones), in this order
    "context": (context, True),
    "kernel launch": (kernel_launch, True),
    "memory": (memory, True),
    "copy pageable": (copy_pageable, True),
    "copy pinned": (copy_pinned, False),
    "matmul fp32": (matmul_fp32, True),
    "matmul tf32": (matmul_tf32, False),
    "matmul bf16": (matmul_bf16, True),
    "matmul fp16": (matmul_fp16, False),
    "matmul fp8": (matmul_fp8, False),
    "conv contiguous": (conv_contiguous, False),
    "conv channels_last": (conv_channels_last, True),
    "conv bf16": (conv_bf16, False),
    "attention": (attention, False),
    "autocast bf16": (autocast, False),
    "training": (training, True),
    "deterministic": (deterministic, False),
    "CUDA graph": (cuda_graph, False),
    "out of memory": (out_of_memory, False),
    "all-reduce": (all_reduce, False),
    "compile": (compile_, False),
}
ESSENTIAL = (context, kernel_launch)  # where these fail, nothing else can pass
