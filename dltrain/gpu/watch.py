"""A device over time: what it is doing now, and what it does under a load that lasts.

A sample is plain data: device, name, utilization {cpu or gpu, memory} (%), memory {total, used} (bytes), temperature
(°C), clocks {cpu or sm, …} (MHz), and of a GPU also power {draw, limit} (W), throttle (what slows it down) and ecc.
What cannot be found out is None; a card that does not answer has `error` instead.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from time import monotonic, sleep
from typing import Any

from dltrain.errors import DeviceError
from dltrain.gpu import nvml
from dltrain.gpu.diagnose import SLOWED
from dltrain.gpu.rates import LONG, normal, synchronize
from dltrain.gpu.worker import Worker, first_line
from dltrain.lazy import torch

Sample = dict[str, Any]
WATCHED = ("name", "uuid", "utilization", "memory", "temperature", "power", "clocks", "throttle", "ecc")
SLOWER = 0.9  # of its first rate, below which a device that warms up is worth a warning
BURST = 1.0  # seconds of load between two samples
START = 60.0  # seconds that the first burst may take: torch is imported, and memory filled
WORDS = 1 << 24  # int32 words in a tile of memory, 64 MiB


def watch(interval: float) -> Iterator[list[Sample]]:
    """A sample of the CPU and of every card, at once and then every `interval` seconds, without end."""
    while True:
        yield sample()
        sleep(interval)


def sample() -> list[Sample]:
    """The CPU and the cards as they are now; no driver is no card."""
    return [_cpu(), *_cards()]


def _cpu() -> Sample:
    """utilization: since the last sample."""
    import psutil

    memory = psutil.virtual_memory()
    sensors: dict[str, Any] = getattr(psutil, "sensors_temperatures", dict)()  # Linux and BSD
    hottest = max((each.current for found in sensors.values() for each in found), default=None)
    try:
        clock = psutil.cpu_freq()
    except (OSError, NotImplementedError):  # a container, a virtual machine
        clock = None
    return {
        "device": "cpu",
        "name": "CPU",
        "utilization": {"cpu": psutil.cpu_percent()},
        "memory": {"total": memory.total, "used": memory.total - memory.available},
        "temperature": hottest,
        "clocks": {"cpu": clock.current} if clock and clock.current else None,
    }


def _cards() -> list[Sample]:
    try:
        import pynvml

        with nvml.session() as module:
            return [_card(index, module) for index in range(module.nvmlDeviceGetCount())]
    except ImportError as error:
        return [{"device": "driver", "error": first_line(error)}]
    except pynvml.NVMLError_LibraryNotFound:
        return []
    except Exception as error:  # a driver that hangs itself up is worth a line, not the end
        return [{"device": "driver", "error": first_line(error)}]


def _card(index: int, module: Any) -> Sample:
    found: Sample = {"device": f"card {index}"}
    try:
        handle = module.nvmlDeviceGetHandleByIndex(index)
    except Exception as error:  # lost
        return {**found, "error": first_line(error)}
    for name in WATCHED:
        try:
            found[name] = nvml.PROBES[name](module, handle)
        except Exception:  # not supported here, or lost in between: the others are asked all the same
            found[name] = None
    return found


def stress(worker: Worker, device: str, seconds: float) -> Iterator[Sample]:
    """Loads a device for so long; about once a second its sample with second, rate (FLOP/s) and wrong besides.

    wrong: numbers of a product, and words in memory, that are not what they were at first

    A device that fails ends it with a sample that has `error`; nothing is raised.
    """
    start, timeout = monotonic(), START
    try:
        uuid = worker.ask(START, card_of, device)
        start = monotonic()
        while monotonic() - start < seconds:
            worker.send(burst, device, BURST)
            sleep(BURST / 2)
            now = next((each for each in sample() if _is_of(each, device, uuid)), {})
            now = {key: value for key, value in now.items() if key != "uuid"}  # reports are published
            done = worker.answer(timeout)
            timeout = 10 * BURST
            yield {**now, "device": device, "second": monotonic() - start, **done}
    except DeviceError as error:
        yield {"device": device, "second": monotonic() - start, "error": str(error)}


def card_of(device: str) -> str | None:
    """The UUID, as NVML has it, of what torch calls cuda:N; None of other devices."""
    if torch.device(device).type != "cuda":
        return None
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def _is_of(sample: Sample, device: str, uuid: str | None) -> bool:
    return sample["device"] == device if uuid is None else sample.get("uuid") == uuid


_loads: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = {}


def burst(device: str, seconds: float) -> dict[str, float]:
    """Multiplies matrices for so long, then reads a block of memory: {"rate": FLOP/s, "wrong": numbers}.

    One product must always have the same bits, and memory hold what was written to it: what differs is a fault of the
    device, its memory or its power.  The block stays from one burst to the next.
    """
    if device not in _loads:
        _loads[device] = _load(device)
    a, expected, tile, block = _loads[device]
    start, count, elapsed = monotonic(), 0, 0.0
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    product = torch.empty_like(expected)
    while not count or elapsed < seconds:
        for _ in range(8):
            torch.matmul(a, a, out=product)
        wrong += (product != expected).sum()
        count += 8
        synchronize(device)
        elapsed = monotonic() - start
    for part in block:
        wrong += (part != tile).sum()
    return {"rate": 2 * len(a) ** 3 * count / elapsed, "wrong": int(wrong)}


def _load(device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A matrix that takes long to square, its square, a tile of numbers, and half of the free memory full of it."""
    cuda = torch.device(device).type == "cuda"
    dtype = torch.bfloat16 if cuda and torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    n = 512
    while True:
        a = normal((n, n), device, dtype)
        torch.matmul(a, a)
        synchronize(device)
        start = monotonic()
        expected = torch.matmul(a, a)
        synchronize(device)
        if monotonic() - start > LONG or n == 8192:
            break
        n *= 2
    tile = torch.arange(WORDS, dtype=torch.int32, device=device).mul_(0x9E3779B1 - (1 << 32))  # wraps around
    tiles = torch.cuda.mem_get_info(device)[0] // 2 // tile.nbytes if cuda else 2
    return a, expected, tile, tile.expand(tiles, WORDS).clone()


def judge(samples: Sequence[Sample]) -> dict[str, Any]:
    """The row of a stress test, as of a self-test, from all its samples, one at least.  A pure function."""
    row = {"device": samples[0]["device"], "name": "stress", "ms": 1000 * samples[-1]["second"]}
    error = next((each["error"] for each in samples if "error" in each), None)
    whole = [each for each in samples if "rate" in each]
    if error:
        return {**row, "result": "fail", "message": error}
    wrong = sum(each["wrong"] for each in whole)
    quarter = max(1, len(whole) // 4)
    first, last = (statistics.mean(each["rate"] for each in part) for part in (whole[:quarter], whole[-quarter:]))
    throttled = sorted({reason for each in whole for reason in each.get("throttle") or ()} & SLOWED)
    lost = [each["ecc"]["uncorrected"] for each in whole if (each.get("ecc") or {}).get("uncorrected") is not None]
    lost_here = lost[-1] - lost[0] if lost else 0
    said = [f"{first / 1e12:.3g} TFLOP/s at first, {last / 1e12:.3g} at the end", f"{wrong} wrong numbers"]
    heat = [each["temperature"] for each in whole if each.get("temperature") is not None]
    clocks = [next(iter(each["clocks"].values())) for each in whole if each.get("clocks")]
    said += [f"up to {max(heat):.0f} °C"] if heat else []
    said += (
        [" to ".join(sorted({f"{clock:.0f}" for clock in (min(clocks), max(clocks))}, key=int)) + " MHz"]
        if clocks
        else []
    )
    said += [f"slowed down by {', '.join(throttled)}"] if throttled else []
    said += [f"{lost_here} uncorrected memory errors"] if lost_here else []
    result = "fail" if wrong or lost_here else "warn" if throttled or last < SLOWER * first else "pass"
    return {**row, "result": result, "message": "; ".join(said), "rate": last / 1e12, "unit": "TFLOP/s"}
