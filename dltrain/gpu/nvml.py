"""What the NVIDIA driver says of its cards, through NVML; cards that CUDA_VISIBLE_DEVICES hides from torch as well."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

Facts = dict[str, Any]

# bits of nvmlDeviceGetCurrentClocksEventReasons (nvml.h); sw_power_cap is normal under load, gpu_idle without
THROTTLE = {
    0x1: "gpu_idle",
    0x2: "applications_clocks",
    0x4: "sw_power_cap",
    0x8: "hw_slowdown",
    0x10: "sync_boost",
    0x20: "sw_thermal",
    0x40: "hw_thermal",
    0x80: "hw_power_brake",
    0x100: "display_clock",
}
COMPUTE_MODES = ("default", "exclusive thread", "prohibited", "exclusive process")
CHANGING = ("temperature", "power", "clocks", "throttle", "pcie", "ecc")  # what a load changes


@contextlib.contextmanager
def session() -> Iterator[Any]:
    """The module pynvml between its initialisation and its end.  Raises pynvml.NVMLError."""
    import pynvml

    pynvml.nvmlInit()
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def driver(probe: Callable[..., Any]) -> Facts | None:
    """The driver's version, the newest CUDA it supports, and each card; None: there is no NVIDIA driver."""
    import pynvml

    try:
        with session() as nvml:
            return {
                "version": nvml.nvmlSystemGetDriverVersion(),
                "cuda": cuda_version(nvml.nvmlSystemGetCudaDriverVersion_v2()),
                "cards": [_card(index, nvml, probe) for index in range(nvml.nvmlDeviceGetCount())],
            }
    except pynvml.NVMLError_LibraryNotFound:
        return None


def cuda_version(number: int) -> str:
    """12040 -> "12.4"."""
    return f"{number // 1000}.{number % 1000 // 10}"


def pci_address(card: Any) -> str:
    """As Linux writes it: "0000:1b:00.0"."""
    return f"{card.domain:04x}:{card.bus:02x}:{card.device:02x}.0"


def under_load(index: int, probe: Callable[..., Any]) -> Facts:
    """What a load changes, of one card."""
    with session() as nvml:
        return _card(index, nvml, probe, CHANGING)


def merged(samples: list[Facts]) -> Facts:
    """One card's state under load, from what it said after each of several loads.

    The best link, since one that is fast once is fast; every reason for slowing down; the highest temperature; power
    and clocks of the moment that drew most; the last count of errors.
    """
    found: Facts = {}
    for name in CHANGING:
        values = [sample[name] for sample in samples if sample.get(name) is not None]
        found[name] = values[-1] if values else None
    links = [sample["pcie"] for sample in samples if sample.get("pcie")]
    found["pcie"] = max(links, key=lambda link: (link["width"], link["generation"]), default=None)
    found["throttle"] = sorted({reason for sample in samples for reason in sample.get("throttle") or ()} - {"gpu_idle"})
    temperatures = [sample["temperature"] for sample in samples if sample.get("temperature") is not None]
    found["temperature"] = max(temperatures, default=None)
    busiest = max(samples, key=lambda sample: (sample.get("power") or {"draw": 0.0})["draw"])
    return found | {name: busiest[name] for name in ("power", "clocks") if busiest.get(name)}


def _card(index: int, nvml: Any, probe: Callable[..., Any], names: tuple[str, ...] | None = None) -> Facts:
    """The facts of one card; a card that is lost has its index alone."""
    found: Facts = {"index": index}
    handle = probe(f"card {index}", nvml.nvmlDeviceGetHandleByIndex, index)
    if handle is None:
        return found
    for name in names or PROBES:
        found[name] = probe(f"card {index} {name}", _ask, PROBES[name], nvml, handle)
    return found


def _ask(question: Callable[[Any, Any], Any], nvml: Any, handle: Any) -> Any:
    """None where the card has no such thing: no ECC on a GeForce, no power limit on a laptop."""
    try:
        return question(nvml, handle)
    except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound):
        return None


def _memory(nvml: Any, handle: Any) -> Facts:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    return {"total": memory.total, "free": memory.free, "used": memory.used}


def _processes(nvml: Any, handle: Any) -> list[Facts]:
    """The processes that compute on a card; memory is None where the driver does not tell."""
    return [
        {"pid": process.pid, "name": _process_name(process.pid), "memory": process.usedGpuMemory}
        for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle)
    ]


def _process_name(pid: int) -> str | None:
    """None for a process that is gone, or that lives outside our container."""
    import psutil

    try:
        return psutil.Process(pid).name()
    except psutil.Error:
        return None


def _utilization(nvml: Any, handle: Any) -> Facts:
    rates = nvml.nvmlDeviceGetUtilizationRates(handle)
    return {"gpu": rates.gpu, "memory": rates.memory}  # %


def _power(nvml: Any, handle: Any) -> Facts:
    draw, limit = nvml.nvmlDeviceGetPowerUsage(handle), nvml.nvmlDeviceGetEnforcedPowerLimit(handle)  # mW
    return {"draw": draw / 1000, "limit": limit / 1000}


def _clocks(nvml: Any, handle: Any) -> Facts:
    found = {}
    for name, kind in (("sm", nvml.NVML_CLOCK_SM), ("memory", nvml.NVML_CLOCK_MEM)):
        found[name] = nvml.nvmlDeviceGetClockInfo(handle, kind)  # MHz
        found[f"{name}_max"] = nvml.nvmlDeviceGetMaxClockInfo(handle, kind)
    return found


def _throttle(nvml: Any, handle: Any) -> list[str]:
    reasons = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
    return [name for bit, name in THROTTLE.items() if reasons & bit]


def _pcie(nvml: Any, handle: Any) -> Facts:
    """generation_max and width_max are of this card in this slot, not of the card alone."""
    return {
        "generation": nvml.nvmlDeviceGetCurrPcieLinkGeneration(handle),
        "width": nvml.nvmlDeviceGetCurrPcieLinkWidth(handle),
        "generation_max": nvml.nvmlDeviceGetMaxPcieLinkGeneration(handle),
        "width_max": nvml.nvmlDeviceGetMaxPcieLinkWidth(handle),
    }


def _ecc(nvml: Any, handle: Any) -> Facts:
    """Errors since the driver was loaded."""
    enabled, _ = nvml.nvmlDeviceGetEccMode(handle)  # (now, after a reboot)
    if not enabled:
        return {"enabled": False, "corrected": None, "uncorrected": None}
    counts = {
        name: nvml.nvmlDeviceGetTotalEccErrors(handle, kind, nvml.NVML_VOLATILE_ECC)
        for name, kind in (
            ("corrected", nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED),
            ("uncorrected", nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED),
        )
    }
    return {"enabled": True, **counts}


def _remapped_rows(nvml: Any, handle: Any) -> Facts:
    corrected, uncorrected, pending, failure = nvml.nvmlDeviceGetRemappedRows(handle)
    return {"corrected": corrected, "uncorrected": uncorrected, "pending": bool(pending), "failure": bool(failure)}


PROBES: dict[str, Callable[[Any, Any], Any]] = {
    "name": lambda nvml, handle: nvml.nvmlDeviceGetName(handle),
    "uuid": lambda nvml, handle: nvml.nvmlDeviceGetUUID(handle),
    "pci": lambda nvml, handle: pci_address(nvml.nvmlDeviceGetPciInfo(handle)),
    "compute_capability": lambda nvml, handle: "{}.{}".format(*nvml.nvmlDeviceGetCudaComputeCapability(handle)),
    "memory": _memory,
    "processes": _processes,
    "utilization": _utilization,
    "temperature": lambda nvml, handle: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),  # °C
    "power": _power,
    "clocks": _clocks,
    "throttle": _throttle,
    "pcie": _pcie,
    "ecc": _ecc,
    "remapped_rows": _remapped_rows,
    "mig": lambda nvml, handle: bool(nvml.nvmlDeviceGetMigMode(handle)[0]),  # (now, after a reset)
    "compute_mode": lambda nvml, handle: COMPUTE_MODES[nvml.nvmlDeviceGetComputeMode(handle)],
}
