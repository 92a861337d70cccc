"""Each fault that is put into a device's arithmetic is found by the test of it, and by no other."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest
import torch

from dltrain.errors import DeviceError
from dltrain.gpu import rates, selftest
from dltrain.gpu.worker import Gone, Worker

NO_CPU = {"copy pinned", "matmul tf32", "matmul fp16", "matmul fp8", "CUDA graph", "all-reduce"}
SLOW = {"compile"}  # by seconds
DETERMINISM = "deterministic"


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates are measured in one call, which is said to take half a second."""

    def seconds_per_call(work: Callable[[], object], device: str, seconds: float) -> float:
        work()
        return 0.5

    monkeypatch.setattr(rates, "seconds_per_call", seconds_per_call)


def failing(names: set[str] = frozenset(selftest.TESTS) - SLOW) -> set[str]:  # type: ignore[assignment]
    return {name for name in names if selftest.row_of("cpu", name)["result"] not in ("pass", "skip")}


def test_the_cpu_passes_and_nothing_of_the_caller_is_changed() -> None:
    before = torch.get_rng_state()
    rows = [selftest.row_of("cpu", name) for name in selftest.TESTS]
    assert {row["name"]: row["result"] for row in rows} == {
        name: "skip" if name in NO_CPU else "pass" for name in selftest.TESTS
    }
    assert all(row["device"] == "cpu" and row["ms"] >= 0 and row["message"] for row in rows)
    assert json.loads(json.dumps(rows)) == rows
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.are_deterministic_algorithms_enabled()
    found = {row["name"]: row["rate"] for row in rows if "rate" in row}
    assert found["matmul fp32"] == pytest.approx(2 * 512**3 / 0.5 / 1e12)
    assert found["kernel launch"] == 0.5e6  # µs
    assert found["copy pageable"] == pytest.approx((1 << 24) / 0.5 / 1e9)


def spoiled(function: Callable[..., Any], spoil: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    return lambda *args, **kwargs: spoil(function(*args, **kwargs))


def one_entry(by: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """One entry of many is off, but for the references, which are float64."""

    def spoil(result: torch.Tensor) -> torch.Tensor:
        if result.dtype == torch.float64:
            return result
        offset = torch.zeros_like(result)
        offset.view(-1)[-1] = by
        return result + offset

    return spoil


@pytest.mark.parametrize(
    ("module", "name", "spoil", "found"),
    [
        ("torch", "matmul", one_entry(0.2 * 528**0.5), {"matmul fp32", "matmul bf16"}),  # 0.2 standard deviations
        ("torch", "matmul", one_entry(float("nan")), {"matmul fp32", "matmul bf16"}),
        ("F", "conv2d", one_entry(0.2 * 216**0.5), {"conv contiguous", "conv channels_last", "conv bf16"}),
        ("F", "conv2d", one_entry(float("nan")), {"conv contiguous", "conv channels_last", "conv bf16"}),
        ("F", "scaled_dot_product_attention", one_entry(0.1), {"attention"}),
        ("F", "linear", one_entry(0.2), {"autocast bf16"}),
        ("F", "linear", torch.Tensor.float, {"autocast bf16"}),  # which autocast should have made bf16
        ("F", "cross_entropy", lambda loss: loss * 1.05 if loss.dtype == torch.float32 else loss, {"training"}),
        ("F", "cross_entropy", lambda loss: loss * 0, {"training"}),  # which trains nothing, on any device
        ("F", "cross_entropy", lambda loss: loss * float("nan"), {"training"}),
        ("torch", "zeros", one_entry(1.0), {"context"}),
    ],
)
def test_a_wrong_result_is_found(
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    name: str,
    spoil: Callable[[torch.Tensor], torch.Tensor],
    found: set[str],
) -> None:
    lazy = getattr(selftest, module)
    monkeypatch.setattr(lazy, name, spoiled(getattr(lazy, name), spoil))
    assert failing(set(selftest.TESTS) - SLOW - {DETERMINISM}) == found


def test_a_wrong_word_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right, calls = torch.arange, iter(range(100))

    def arange(*args: Any, **kwargs: Any) -> torch.Tensor:
        numbers = right(*args, **kwargs)
        numbers[-1] += next(calls) % 2 == 0  # the device's, and not what they are compared with
        return numbers

    monkeypatch.setattr(selftest.torch, "arange", arange)
    found = {"kernel launch", "memory", "out of memory", "training"}
    assert failing(set(selftest.TESTS) - SLOW - {DETERMINISM}) == found


def test_a_wrong_byte_of_a_copy_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch.Tensor.copy_

    def copy_(self: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        right(self, source)
        self.view(-1)[-1] += 1
        return self

    monkeypatch.setattr(torch.Tensor, "copy_", copy_)
    assert failing({"copy pageable"}) == {"copy pageable"}
    assert selftest.row_of("cpu", "copy pageable")["message"].startswith("1 of 16777216 bytes wrong")


def test_a_loss_that_does_not_fall_fails_even_where_the_reference_does_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args: [0 * gradient for gradient in right(*args)])
    assert failing({"training"}) == {"training"}


def test_other_bits_the_second_time_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right, calls = selftest.F.cross_entropy, iter(range(1000))

    def cross_entropy(*args: torch.Tensor) -> torch.Tensor:
        return right(*args) * (1 + 1e-6 * next(calls))

    monkeypatch.setattr(selftest.F, "cross_entropy", cross_entropy)
    assert failing({DETERMINISM, "training"}) == {DETERMINISM}
    assert not torch.are_deterministic_algorithms_enabled()


def test_memory_that_is_not_there_must_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch.empty
    monkeypatch.setattr(selftest.torch, "empty", lambda *args, **kwargs: right(1))
    assert failing({"out of memory"}) == {"out of memory"}

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("CUDA error: the launch timed out and was terminated")

    monkeypatch.setattr(selftest.torch, "empty", refuse)  # no refusal, but another trouble
    assert selftest.row_of("cpu", "out of memory")["message"] == "CUDA error: the launch timed out and was terminated"


def test_what_compile_raises_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(function: object) -> None:
        raise RuntimeError("backend='inductor' raised:\n\nInvalidCxxCompiler: No working C++ compiler found\nmore")

    monkeypatch.setattr(selftest.torch, "compile", refuse)
    row = selftest.row_of("cpu", "compile")
    assert row["result"] == "warn"
    assert row["message"].endswith("backend='inductor' raised: InvalidCxxCompiler: No working C++ compiler found")


def test_a_wrong_compilation_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest.torch, "compile", lambda function: lambda *args: 1.1 * function(*args))
    assert failing({"compile"}) == {"compile"}


def test_what_raises_fails_alone_with_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 MiB.\nSee the documentation")

    monkeypatch.setattr(selftest.torch, "matmul", fail)
    row = selftest.row_of("cpu", "matmul fp32")
    assert (row["result"], row["message"]) == ("fail", "CUDA out of memory. Tried to allocate 64.00 MiB.")
    assert failing({"conv bf16", "training"}) == set()


def test_an_absent_device_fails_every_test_with_a_message() -> None:
    rows = [selftest.row_of("cuda:99", name) for name in selftest.TESTS if name != "compile"]
    assert {row["name"] for row in rows if row["result"] != "fail"} == {"all-reduce"}
    assert all(row["message"] for row in rows)


@pytest.mark.parametrize(
    ("capability", "skipped"),
    [
        ((7, 5), {"matmul bf16", "matmul tf32", "matmul fp8", "conv bf16", "autocast bf16"}),
        ((8, 0), {"matmul fp8"}),
        ((8, 9), set()),
    ],
)
def test_a_card_is_not_asked_for_numbers_that_it_has_not(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], skipped: set[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    named = ("matmul bf16", "matmul fp16", "matmul tf32", "matmul fp8", "conv bf16", "autocast bf16")
    rows = {name: selftest.row_of("cuda:99", name) for name in named}
    assert {name for name, row in rows.items() if row["result"] == "skip"} == skipped
    assert all(f"this has {capability[0]}.{capability[1]}" in rows[name]["message"] for name in skipped)


def test_fp8_products_are_right_where_a_cpu_computes_them() -> None:
    a, b = (torch.randn(32, 32).to(torch.float8_e4m3fn) for _ in range(2))
    exact = a.double() @ b.double()
    assert torch.allclose(selftest.fp8_product(a, b).double(), exact, rtol=2**-8, atol=1e-3)


class Here:
    """A worker in this process, which answers what it is told to."""

    def __init__(self, answer: Callable[[str, str], dict[str, Any]]) -> None:
        self.answer, self.restarts, self.asked = answer, 0, []

    def ask(self, timeout: float, function: object, device: str, name: str, quick: bool) -> dict[str, Any]:
        self.asked.append((device, name))
        return self.answer(device, name)

    def restart(self) -> None:
        self.restarts += 1


def passing(device: str, name: str) -> dict[str, Any]:
    return {"device": device, "name": name, "result": "pass", "ms": 1.0, "message": ""}


def run(worker: Here, devices: list[str], quick: bool = False) -> dict[tuple[str, str], dict[str, Any]]:
    rows = list(selftest.run(worker, devices, quick))  # type: ignore[arg-type]
    return {(row["device"], row["name"]): row for row in rows}


def test_every_device_gets_every_test_and_one_compiles() -> None:
    worker = Here(passing)
    rows = run(worker, ["cpu", "cuda:0", "cuda:1"])
    assert list(rows) == [(device, name) for device in ("cpu", "cuda:0", "cuda:1") for name in selftest.TESTS]
    assert {key for key, row in rows.items() if row["result"] == "skip"} == {("cpu", "compile"), ("cuda:1", "compile")}
    assert run(Here(passing), ["cpu"])["cpu", "compile"]["result"] == "pass"


def test_quick_is_some_of_them() -> None:
    rows = run(Here(passing), ["cpu"], quick=True)
    assert {"context", "training", "matmul bf16"} <= {name for _, name in rows} < set(selftest.TESTS)


def test_where_no_kernel_runs_nothing_else_is_tried() -> None:
    def answer(device: str, name: str) -> dict[str, Any]:
        failed = {"result": "fail", "message": "CUDA error: no kernel image is available"}
        return passing(device, name) | (failed if name == "kernel launch" and device == "cuda:0" else {})

    worker = Here(answer)
    rows = run(worker, ["cpu", "cuda:0"])
    assert [name for device, name in worker.asked if device == "cuda:0"] == ["context", "kernel launch"]
    assert rows["cuda:0", "training"]["result"] == "skip"
    assert rows["cuda:0", "training"]["message"] == "not tried: kernel launch fails"
    assert rows["cpu", "training"]["result"] == "pass"


def test_an_error_that_stays_with_the_process_ends_with_it() -> None:
    def answer(device: str, name: str) -> dict[str, Any]:
        message = {"memory": "CUDA error: an illegal memory access was encountered", "attention": "largest error 1"}
        return passing(device, name) | ({"result": "fail", "message": message[name]} if name in message else {})

    worker = Here(answer)
    rows = run(worker, ["cuda:0"])
    assert worker.restarts == 1
    assert [name for (_, name), row in rows.items() if row["result"] == "fail"] == ["memory", "attention"]


def test_a_process_that_dies_fails_one_test_and_three_times_is_enough() -> None:
    def answer(device: str, name: str) -> dict[str, Any]:
        if name.startswith("matmul"):
            raise Gone("the process that used it died of SIGSEGV")
        return passing(device, name)

    rows = run(Here(answer), ["cuda:0"])
    failed = [name for (_, name), row in rows.items() if row["result"] == "fail"]
    assert failed == ["matmul fp32", "matmul tf32", "matmul bf16"]
    assert rows["cuda:0", "matmul fp32"]["message"] == "the process that used it died of SIGSEGV"
    assert rows["cuda:0", "training"]["message"] == "not tried: 3 tests before left the device unusable"


def test_a_device_that_hangs_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "TIMEOUT", 0.0)

    def answer(device: str, name: str) -> dict[str, Any]:
        if name == "copy pageable":
            raise Gone("no answer in 60 s")
        return passing(device, name)

    rows = run(Here(answer), ["cuda:0"])
    assert rows["cuda:0", "copy pageable"]["result"] == "fail"
    assert rows["cuda:0", "training"]["message"] == "not tried: copy pageable hangs"


def test_a_worker_survives_what_it_is_asked(capfd: pytest.CaptureFixture[str]) -> None:
    """A crash, a hang, an error and a print over there leave this process and its output alone."""
    with Worker() as worker:
        first = worker.ask(60, os.getpid)
        assert first != os.getpid()
        assert worker.ask(60, selftest.row_of, "cpu", "context")["result"] == "pass"
        with pytest.raises(DeviceError, match=r"^integer division or modulo by zero$") as caught:
            worker.ask(60, divmod, 1, 0)
        assert not isinstance(caught.value, Gone)
        assert worker.ask(60, os.write, 1, b"noise\n") == 6
        assert worker.ask(60, os.write, 2, b"terminate called: CUDA error\n\n") == 30
        with pytest.raises(Gone, match=r"^the process that used it died of SIGABRT: terminate called: CUDA error$"):
            worker.ask(60, os.abort)
        second = worker.ask(60, os.getpid)
        assert second != first
        with pytest.raises(Gone, match=r"^no answer in 0 s$"):
            worker.ask(0.1, time.sleep, 60)
        assert not psutil.pid_exists(second)
        process = worker._process
        assert process.is_alive()
    assert not process.is_alive()
    assert capfd.readouterr() == ("", "")
