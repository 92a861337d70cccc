"""What the NVIDIA driver says, with a driver of our own in NVML's place."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import psutil
import pynvml
import pytest

from dltrain.gpu import facts, nvml

ANSWERS: dict[str, Any] = {  # of each card, by NVML's functions
    "nvmlDeviceGetName": "NVIDIA A100-PCIE-40GB",
    "nvmlDeviceGetUUID": "GPU-5f0c1a7e-2b6d-4c11-9e0a-7d3b1c9f0000",
    "nvmlDeviceGetPciInfo": SimpleNamespace(domain=0, bus=0xB1, device=0),
    "nvmlDeviceGetCudaComputeCapability": (8, 0),
    "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=100, free=70, used=30),
    "nvmlDeviceGetComputeRunningProcesses": [SimpleNamespace(pid=7, usedGpuMemory=20)],
    "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=97, memory=61),
    "nvmlDeviceGetTemperature": 48,
    "nvmlDeviceGetPowerUsage": 190_500,
    "nvmlDeviceGetEnforcedPowerLimit": 250_000,
    "nvmlDeviceGetClockInfo": 1410,
    "nvmlDeviceGetMaxClockInfo": 1500,
    "nvmlDeviceGetCurrentClocksThrottleReasons": 0x44,
    "nvmlDeviceGetCurrPcieLinkGeneration": 1,
    "nvmlDeviceGetCurrPcieLinkWidth": 8,
    "nvmlDeviceGetMaxPcieLinkGeneration": 4,
    "nvmlDeviceGetMaxPcieLinkWidth": 16,
    "nvmlDeviceGetEccMode": [1, 0],
    "nvmlDeviceGetTotalEccErrors": 2,
    "nvmlDeviceGetRemappedRows": (1, 2, 1, 0),
    "nvmlDeviceGetMigMode": [0, 1],
    "nvmlDeviceGetComputeMode": 3,
}
CARD = {
    "index": 0,
    "name": "NVIDIA A100-PCIE-40GB",
    "uuid": "GPU-5f0c1a7e-2b6d-4c11-9e0a-7d3b1c9f0000",
    "pci": "0000:b1:00.0",
    "compute_capability": "8.0",
    "memory": {"total": 100, "free": 70, "used": 30},
    "processes": [{"pid": 7, "name": "python", "memory": 20}],
    "utilization": {"gpu": 97, "memory": 61},
    "temperature": 48,
    "power": {"draw": 190.5, "limit": 250.0},
    "clocks": {"sm": 1410, "sm_max": 1500, "memory": 1410, "memory_max": 1500},
    "throttle": ["sw_power_cap", "hw_thermal"],
    "pcie": {"generation": 1, "width": 8, "generation_max": 4, "width_max": 16},
    "ecc": {"enabled": True, "corrected": 2, "uncorrected": 2},
    "remapped_rows": {"corrected": 1, "uncorrected": 2, "pending": True, "failure": False},
    "mig": False,
    "compute_mode": "exclusive process",
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One card behind pynvml; which functions were called, of those that begin and end."""
    made: list[str] = []

    def answer(name: str, value: Any) -> Callable[..., Any]:
        def function(*args: Any) -> Any:
            made.append(name)
            return value

        return function

    system = {
        "nvmlInit": None,
        "nvmlShutdown": None,
        "nvmlSystemGetDriverVersion": "550.90.07",
        "nvmlSystemGetCudaDriverVersion_v2": 12040,
        "nvmlDeviceGetCount": 1,
        "nvmlDeviceGetHandleByIndex": object(),
    }
    for name, value in (system | ANSWERS).items():
        monkeypatch.setattr(pynvml, name, answer(name, value))
    monkeypatch.setattr(psutil, "Process", lambda pid: SimpleNamespace(name=lambda: "python"))
    return made


def raises(monkeypatch: pytest.MonkeyPatch, function: str, code: int) -> None:
    def refuse(*args: Any) -> None:
        raise pynvml.NVMLError(code)

    monkeypatch.setattr(pynvml, function, refuse)


def collected() -> tuple[Any, list[dict[str, str]]]:
    found = facts.collect()
    return found["driver"], [error for error in found["errors"] if error["probe"].startswith(("driver", "card"))]


def test_all_that_a_card_says(calls: list[str]) -> None:
    driver, errors = collected()
    assert driver == {"version": "550.90.07", "cuda": "12.4", "cards": [CARD]}
    assert errors == []
    assert (calls[0], calls[-1], calls.count("nvmlShutdown")) == ("nvmlInit", "nvmlShutdown", 1)


@pytest.mark.parametrize("code", [pynvml.NVML_ERROR_NOT_SUPPORTED, pynvml.NVML_ERROR_FUNCTION_NOT_FOUND])
@pytest.mark.parametrize(("function", "key"), [("nvmlDeviceGetEccMode", "ecc"), ("nvmlDeviceGetMigMode", "mig")])
def test_what_a_card_does_not_have_is_no_error(
    calls: list[str], monkeypatch: pytest.MonkeyPatch, function: str, key: str, code: int
) -> None:
    raises(monkeypatch, function, code)
    driver, errors = collected()
    assert driver["cards"] == [CARD | {key: None}]
    assert errors == []


@pytest.mark.parametrize(
    ("function", "key"),
    [
        ("nvmlDeviceGetName", "name"),
        ("nvmlDeviceGetPciInfo", "pci"),
        ("nvmlDeviceGetComputeRunningProcesses", "processes"),
        ("nvmlDeviceGetPowerUsage", "power"),
        ("nvmlDeviceGetMaxPcieLinkWidth", "pcie"),
        ("nvmlDeviceGetTotalEccErrors", "ecc"),
    ],
)
def test_a_question_fails_alone(calls: list[str], monkeypatch: pytest.MonkeyPatch, function: str, key: str) -> None:
    raises(monkeypatch, function, pynvml.NVML_ERROR_UNKNOWN)
    driver, errors = collected()
    assert driver["cards"] == [CARD | {key: None}]
    assert errors == [{"probe": f"card 0 {key}", "error": "Unknown Error"}]


def test_ecc_that_is_off_counts_nothing(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pynvml, "nvmlDeviceGetEccMode", lambda handle: [0, 1])
    driver, _ = collected()
    assert driver["cards"][0]["ecc"] == {"enabled": False, "corrected": None, "uncorrected": None}


def test_a_lost_card_keeps_its_place(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def handle(index: int) -> object:
        if index == 0:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return object()

    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: 2)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", handle)
    driver, errors = collected()
    assert driver["cards"] == [{"index": 0}, CARD | {"index": 1}]
    assert errors == [{"probe": "card 0", "error": "GPU is lost"}]


def test_no_driver_is_no_error(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    raises(monkeypatch, "nvmlInit", pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)
    assert collected() == (None, [])


def test_a_driver_that_stops_answering_is_recorded_and_released(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    raises(monkeypatch, "nvmlDeviceGetCount", pynvml.NVML_ERROR_GPU_IS_LOST)
    assert collected() == (None, [{"probe": "driver", "error": "GPU is lost"}])
    assert calls[-1] == "nvmlShutdown"


def test_a_process_of_another_container_has_no_name(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(pid: int) -> None:
        raise psutil.NoSuchProcess(pid)

    monkeypatch.setattr(psutil, "Process", gone)
    assert collected()[0]["cards"][0]["processes"] == [{"pid": 7, "name": None, "memory": 20}]


def test_under_load_a_card_is_asked_for_what_changes(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    raises(monkeypatch, "nvmlDeviceGetTemperature", pynvml.NVML_ERROR_UNKNOWN)
    expected = {key: CARD[key] for key in ("power", "clocks", "throttle", "pcie", "ecc")}
    assert facts.under_load(0) == {"index": 0, "temperature": None, **expected}
    assert calls[-1] == "nvmlShutdown"


def sample(draw: float, sm: int, link: tuple[int, int], **changes: Any) -> dict[str, Any]:
    generation, width = link
    return {
        "temperature": 50,
        "power": {"draw": draw, "limit": 250.0},
        "clocks": {"sm": sm},
        "throttle": [],
        "pcie": {"generation": generation, "width": width},
        "ecc": {"uncorrected": 0},
    } | changes


def test_samples_under_load_become_one() -> None:
    merged = nvml.merged(
        [
            sample(90.0, 1000, (1, 16), throttle=["gpu_idle", "sw_thermal"], temperature=71),
            sample(200.0, 1400, (4, 16), throttle=["sw_power_cap"]),
            sample(120.0, 1200, (3, 16), ecc={"uncorrected": 1}, temperature=None),
        ]
    )
    assert merged == {
        "temperature": 71,
        "power": {"draw": 200.0, "limit": 250.0},
        "clocks": {"sm": 1400},
        "throttle": ["sw_power_cap", "sw_thermal"],
        "pcie": {"generation": 4, "width": 16},
        "ecc": {"uncorrected": 1},
    }


def test_samples_of_a_card_that_says_nothing() -> None:
    nothing = dict.fromkeys(nvml.CHANGING)
    assert nvml.merged([nothing, {"index": 0}]) == nothing | {"throttle": []}
