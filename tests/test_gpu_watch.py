"""Samples of cards that are not there, and loads that go wrong."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from dltrain.errors import DeviceError
from dltrain.gpu import nvml, watch
from dltrain.gpu.worker import Gone


class LibraryNotFound(Exception):
    pass


def driver(monkeypatch: pytest.MonkeyPatch, init: Exception | None = None, cards: int = 1) -> None:
    """pynvml with so many cards, of which the second is lost."""

    def initialise() -> None:
        if init:
            raise init

    def handle(index: int) -> int:
        if index == 1:
            raise RuntimeError("GPU is lost\nand advice")
        return index

    module = SimpleNamespace(
        NVMLError_LibraryNotFound=LibraryNotFound,
        nvmlInit=initialise,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: cards,
        nvmlDeviceGetHandleByIndex=handle,
    )
    monkeypatch.setitem(sys.modules, "pynvml", module)


def test_the_cpu_is_always_there(monkeypatch: pytest.MonkeyPatch) -> None:
    driver(monkeypatch, init=LibraryNotFound())
    (cpu,) = watch.sample()
    assert (cpu["device"], cpu["memory"]["total"]) == ("cpu", psutil.virtual_memory().total)
    assert 0 < cpu["memory"]["used"] < cpu["memory"]["total"]
    assert 0 <= cpu["utilization"]["cpu"] <= 100
    assert json.loads(json.dumps(cpu)) == cpu


@pytest.mark.parametrize("clock", [OSError("no cpufreq"), NotImplementedError(), None])
def test_a_cpu_that_tells_little(monkeypatch: pytest.MonkeyPatch, clock: Exception | None) -> None:
    def frequency() -> None:
        if clock:
            raise clock

    driver(monkeypatch, init=LibraryNotFound())
    monkeypatch.setattr(psutil, "cpu_freq", frequency)
    monkeypatch.delattr(psutil, "sensors_temperatures", raising=False)
    (cpu,) = watch.sample()
    assert cpu["clocks"] is None
    assert cpu["temperature"] is None


def test_the_hottest_sensor_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    driver(monkeypatch, init=LibraryNotFound())
    sensors = {"coretemp": [SimpleNamespace(current=51.0), SimpleNamespace(current=63.0)], "nvme": []}
    monkeypatch.setattr(psutil, "sensors_temperatures", lambda: sensors, raising=False)
    assert watch.sample()[0]["temperature"] == 63.0


def test_a_card_that_is_lost_and_a_question_that_fails_take_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    driver(monkeypatch, cards=3)

    def broken(module: Any, handle: int) -> None:
        raise RuntimeError("Not Supported")

    probes = {name: (lambda module, handle, name=name: f"{name} of {handle}") for name in watch.WATCHED}
    monkeypatch.setattr(nvml, "PROBES", probes | {"power": broken})
    _, first, second, third = watch.sample()
    assert first == {"device": "card 0"} | {name: f"{name} of 0" for name in watch.WATCHED} | {"power": None}
    assert second == {"device": "card 1", "error": "GPU is lost"}
    assert third["temperature"] == "temperature of 2"


def test_a_driver_that_does_not_answer_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    driver(monkeypatch, init=RuntimeError("Driver/library version mismatch"))
    assert watch.sample()[1:] == [{"device": "driver", "error": "Driver/library version mismatch"}]


def test_watching_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(watch, "sleep", slept.append)
    monkeypatch.setattr(watch, "sample", lambda: [{"device": "cpu"}])
    samples = watch.watch(2.5)
    assert [next(samples) for _ in range(3)] == [[{"device": "cpu"}]] * 3
    assert slept == [2.5, 2.5]


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """A load that takes no time."""
    monkeypatch.setattr(watch, "LONG", 0.0)
    monkeypatch.setattr(watch, "WORDS", 1 << 10)
    monkeypatch.setattr(watch, "_loads", {})


@pytest.mark.usefixtures("little")
def test_a_healthy_load_has_the_same_bits_each_time() -> None:
    for _ in range(2):
        found = watch.burst("cpu", 0.01)
        assert found["wrong"] == 0
        assert found["rate"] > 0
    a, expected, tile, block = watch._loads["cpu"]
    assert torch.equal(expected, a @ a)
    assert len(tile.unique()) == len(tile)  # so that a word in another's place is wrong too
    assert torch.equal(block, torch.stack([tile, tile]))


@pytest.mark.usefixtures("little")
def test_words_that_changed_in_memory_are_counted() -> None:
    watch.burst("cpu", 0.001)
    block = watch._loads["cpu"][3]
    block[1, 5] ^= 1 << 7  # one bit
    block[0, 9] += 1
    assert watch.burst("cpu", 0.001)["wrong"] == 2


@pytest.mark.usefixtures("little")
def test_products_that_change_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    watch.burst("cpu", 0.001)
    right = watch.torch.matmul

    def matmul(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
        right(a, b, out=out)
        out[3, 4] = torch.nextafter(out[3, 4], torch.tensor(torch.inf))  # the last bit

    monkeypatch.setattr(watch.torch, "matmul", matmul)
    assert watch.burst("cpu", 0.0)["wrong"] == 1


class Loaded:
    """A worker that answers bursts with what it is given, and then fails."""

    def __init__(self, answers: list[dict[str, float]], uuid: str | None = None) -> None:
        self.answers, self.uuid = iter(answers), uuid

    def ask(self, timeout: float, function: object, device: str) -> str | None:
        return self.uuid

    def send(self, function: object, device: str, seconds: float) -> None:
        pass

    def answer(self, timeout: float) -> dict[str, float]:
        answer = next(self.answers, None)
        if answer is None:
            raise Gone("the process that used it died of SIGKILL")
        return answer


def test_stress_gives_the_sample_of_the_loaded_card(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(100))
    monkeypatch.setattr(watch, "monotonic", lambda: float(next(now)))
    monkeypatch.setattr(watch, "sleep", lambda seconds: None)
    cards = [{"device": f"card {index}", "uuid": f"GPU-{index}", "temperature": 50 + index} for index in range(2)]
    monkeypatch.setattr(watch, "sample", lambda: [{"device": "cpu", "temperature": 40}, *cards])
    done = {"rate": 1e12, "wrong": 0}
    samples = list(watch.stress(Loaded([done] * 9, "GPU-1"), "cuda:0", 5.0))  # type: ignore[arg-type]
    assert samples == [{"device": "cuda:0", "temperature": 51, "second": second, **done} for second in (2.0, 4.0)]
    (sample, *_) = watch.stress(Loaded([done], None), "cpu", 5.0)  # type: ignore[arg-type]
    assert sample["temperature"] == 40


def test_a_device_that_vanishes_under_load_is_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "sleep", lambda seconds: None)
    monkeypatch.setattr(watch, "sample", list)
    samples = list(watch.stress(Loaded([{"rate": 1.0, "wrong": 0}]), "cpu", 60.0))  # type: ignore[arg-type]
    assert [each.get("error") for each in samples] == [None, "the process that used it died of SIGKILL"]
    assert watch.judge(samples)["result"] == "fail"

    class Absent(Loaded):
        def ask(self, timeout: float, function: object, device: str) -> str | None:
            raise DeviceError("CUDA error: invalid device ordinal")

    (only,) = watch.stress(Absent([]), "cuda:9", 60.0)  # type: ignore[arg-type]
    assert watch.judge([only])["message"] == "CUDA error: invalid device ordinal"


def samples(count: int = 8, **changes: Any) -> list[dict[str, Any]]:
    """A steady load; a change is a value for all samples, or a list of one for each."""
    found = []
    for index in range(count):
        each = {"device": "cuda:0", "second": index + 1.0, "rate": 100e12, "wrong": 0, "temperature": 70}
        each |= {"clocks": {"sm": 1400 + index}, "throttle": ["sw_power_cap"], "ecc": {"uncorrected": 3}}
        each |= {name: value[index] if isinstance(value, list) else value for name, value in changes.items()}
        found.append(each)
    return found


@pytest.mark.parametrize(
    ("changes", "result", "said"),
    [
        ({}, "pass", "100 TFLOP/s at first, 100 at the end; 0 wrong numbers; up to 70 °C; 1400 to 1407 MHz"),
        ({"rate": [100e12] * 2 + [95e12] * 4 + [91e12] * 2}, "pass", "100 TFLOP/s at first, 91 at the end"),
        ({"rate": [100e12] * 2 + [95e12] * 4 + [89e12] * 2}, "warn", "100 TFLOP/s at first, 89 at the end"),
        ({"wrong": [0] * 7 + [2]}, "fail", "2 wrong numbers"),
        ({"throttle": [[]] * 7 + [["hw_thermal", "sw_power_cap"]]}, "warn", "slowed down by hw_thermal"),
        ({"ecc": [{"uncorrected": 3}] * 7 + [{"uncorrected": 5}]}, "fail", "2 uncorrected memory errors"),
        ({"ecc": None, "temperature": None, "clocks": None, "throttle": None}, "pass", "0 wrong numbers"),
        ({"ecc": {"uncorrected": None}}, "pass", "0 wrong numbers"),
        ({"clocks": {"cpu": 2600.0}}, "pass", "; 2600 MHz"),
    ],
)
def test_judging_a_load(changes: dict[str, Any], result: str, said: str) -> None:
    row = watch.judge(samples(**changes))
    assert (row["result"], row["name"], row["device"], row["ms"]) == (result, "stress", "cuda:0", 8000.0)
    assert said in row["message"]
    assert ("MHz" in row["message"]) == (changes.get("clocks", 1) is not None)
    assert row["unit"] == "TFLOP/s"


def test_one_sample_is_judged_too() -> None:
    assert watch.judge(samples(1))["result"] == "pass"
