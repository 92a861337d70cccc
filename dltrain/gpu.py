"""`dltrain check-gpu`: can this machine train, how fast, and if not, why and what to type.

`collect` and `measure` gather facts as plain data (JSON-able), `verdict` judges facts and touches nothing else,
`render` prints.  torch is imported inside the functions that need it.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.table import Table
from rich.text import Text

from dltrain.errors import DeviceError

if TYPE_CHECKING:
    from rich.console import Console

Facts = dict[str, Any]

INSTRUCTION_SETS = {"avx2": "avx2", "avx512f": "avx512", "avx512_bf16": "avx512_bf16", "amx_bf16": "amx_bf16"}
REINSTALL = "pip install --force-reinstall torch torchvision"
SELECTOR = "https://pytorch.org/get-started/locally"


def collect() -> Facts:
    """What this machine and its torch are; nothing is computed on a device yet.

    Keys: schema (1), platform, environment, torch, torchvision, driver (None: no NVIDIA driver), devices (the CPU
    first; each has `device`, `kind`, `name`; memory is in bytes), errors.  What a probe could not find out is None or
    absent, and `errors` holds why: {"probe", "error"}.
    """
    errors: list[dict[str, str]] = []

    def probe(name: str, function: Callable[..., Any], *args: Any) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's, of old drivers and missing architectures: verdict says those
                return function(*args)
        except Exception as error:  # whatever a broken driver or wheel raises is a finding, not a crash
            errors.append({"probe": name, "error": _first_line(error)})
            return None

    built, driver = probe("torch", _torch), probe("driver", _driver)
    torchvision = probe("torchvision", lambda: {"version": importlib.metadata.version("torchvision")})
    if built and torchvision:
        torchvision["operators"] = probe("torchvision operators", _torchvision_operators)
    devices: list[Facts] = [{"device": "cpu", "kind": "cpu", "name": "CPU"}]
    devices[0] |= (probe("cpu", _cpu) or {}) | (probe("memory", _memory) or {})
    if built:
        for index in range(probe("cuda", _cuda_count, driver is not None) or 0):
            device = {"device": f"cuda:{index}", "kind": "cuda", "name": "does not answer"}
            devices.append(device | (probe(f"cuda:{index}", _cuda_device, index) or {}))
        devices += probe("mps", _mps_devices) or []
    return {
        "schema": 1,
        "platform": {"os": platform.platform(), "python": platform.python_version()},
        "environment": {name: os.environ[name] for name in ("CUDA_VISIBLE_DEVICES",) if name in os.environ},
        "torch": built,
        "torchvision": torchvision,
        "driver": driver,
        "devices": devices,
        "errors": errors,
    }


def _first_line(error: Exception) -> str:
    """Of the message: torch adds paragraphs of general advice to a CUDA error."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _torch() -> Facts:
    import torch

    version = torch.version.cuda or torch.version.hip
    build = "cuda" if torch.version.cuda else "rocm" if version else "mps" if torch.backends.mps.is_built() else "cpu"
    architectures = torch.cuda.get_arch_list()  # in the wheel: needs no device
    return {"version": str(torch.__version__), "build": build, "built_for": version, "architectures": architectures}


def _torchvision_operators() -> Facts:
    """Loads torchvision's compiled operators and asks for which CUDA they were built (None: for none).

    They are the part of `import torchvision` that fails beside a torch it was not built for, and take 0.01 s where
    the whole import takes 1.5 s.  A later import finds them loaded.
    """
    import torch

    spec = importlib.util.find_spec("torchvision")
    folders = spec.submodule_search_locations if spec else None
    libraries = [file for folder in folders or () for file in Path(folder).glob("_C*")]
    if not libraries:
        raise FileNotFoundError("torchvision has no compiled operators")
    torch.ops.load_library(str(libraries[0]))
    cuda = torch.ops.torchvision._cuda_version()
    return {"cuda": _cuda_version(cuda) if cuda > 0 else None}


def _cuda_version(number: int) -> str:
    """12040 -> "12.4"."""
    return f"{number // 1000}.{number % 1000 // 10}"


def _driver() -> Facts | None:
    """The NVIDIA driver and all cards it sees, also those that CUDA_VISIBLE_DEVICES hides from torch."""
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError_LibraryNotFound:
        return None
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return {
            "version": pynvml.nvmlSystemGetDriverVersion(),
            "cuda": _cuda_version(pynvml.nvmlSystemGetCudaDriverVersion_v2()),
            "gpus": [pynvml.nvmlDeviceGetName(handle) for handle in handles],
        }
    finally:
        pynvml.nvmlShutdown()


def _cpu() -> Facts:
    cpuinfo = Path("/proc/cpuinfo")  # Linux only
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    found = {key: re.search(rf"^{key}\s*: (.+)$", text, re.MULTILINE) for key in ("model name", "flags")}
    model, flags = (match[1] if match else "" for match in found.values())
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return {
        "name": model or platform.processor() or platform.machine(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "instruction_sets": [name for flag, name in INSTRUCTION_SETS.items() if flag in flags.split()],
    }


def _memory() -> Facts:
    import psutil

    memory = psutil.virtual_memory()
    return {"memory_total": memory.total, "memory_free": memory.available}


def _cuda_count(has_driver: bool) -> int:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.device_count()
    if has_driver and torch.version.cuda:
        torch.cuda.init()
    return 0


def _cuda_device(index: int) -> Facts:
    import torch

    card = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    capability = f"{card.major}.{card.minor}"
    return {"name": card.name, "compute_capability": capability, "memory_total": total, "memory_free": free}


def _mps_devices() -> list[Facts]:
    import torch

    if not torch.backends.mps.is_available():
        return []
    memory = torch.mps.recommended_max_memory()
    return [{"device": "mps", "kind": "mps", "name": "Apple GPU", "memory_total": memory}]


def measure(device: str) -> Facts:
    """Small tests on one device: {"tests": [...]}.  A failure is a result, so nothing is raised.

    Each test has name, result ("pass" or "fail"), ms (for all of it, also the first use of the device), message, and
    where it ran to its end rate and unit.
    """
    tests = []
    for name, test in (("matmul fp32", _matmul), ("matmul bf16", _matmul_bf16), ("CNN step", _cnn_step)):
        start = time.perf_counter()
        try:
            outcome = test(device)
        except Exception as error:  # out of memory, no code for this card, a device that vanished, …
            outcome = {"result": "fail", "message": _first_line(error)}
        if outcome:
            tests.append({"name": name, "ms": 1000 * (time.perf_counter() - start), **outcome})
    return {"tests": tests}


def _seconds(work: Callable[[], object], count: int, device: str) -> float:
    import torch

    start = time.perf_counter()
    for _ in range(count):
        work()
    if device != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() - start


def _matmul(device: str, dtype_name: str = "float32", tolerance: float = 0.01) -> Facts:
    """The product of two n x n matrices of standard normal numbers, against NumPy's in float64 on the CPU.

    The error is in units of the standard deviation of the product's entries, sqrt(n): about 2e-6 in fp32, 2e-3 in TF32
    (an environment variable can turn it on for fp32, so that must pass), 1e-2 in bf16.
    """
    import numpy as np
    import torch

    n = 512 if device == "cpu" else 4096  # bf16 where the CPU has none takes 2 s at 1024; a GPU is not busy below 4096
    generator = torch.Generator(device).manual_seed(0)
    dtype = getattr(torch, dtype_name)
    a, b = (torch.randn(n, n, device=device, generator=generator).to(dtype) for _ in range(2))
    product = torch.matmul(a, b)
    rows = slice(None, None, max(1, n // 256))  # 256 of 4096: all of them would take the CPU seconds
    exact = a[rows].cpu().double().numpy() @ b.cpu().double().numpy()
    error = float(np.abs(product[rows].cpu().double().numpy() - exact).max()) / n**0.5

    count, elapsed = 1, 0.0
    while elapsed < 0.05:  # long enough to time, on a fast device and on a slow one
        count *= 2
        elapsed = _seconds(lambda: torch.matmul(a, b), count, device)
    return {
        "result": "pass" if error <= tolerance else "fail",  # a NaN fails
        "message": f"largest error {error:.1e} standard deviations",
        "rate": 2 * n**3 * count / elapsed / 1e12,
        "unit": "TFLOP/s",
    }


def _matmul_bf16(device: str) -> Facts | None:
    """None on an NVIDIA card older than Ampere, which has no bf16."""
    import torch

    if torch.device(device).type == "cuda" and torch.cuda.get_device_capability(device)[0] < 8:
        return None
    return _matmul(device, "bfloat16", tolerance=0.05)


def _cnn_step(device: str) -> Facts:
    """SGD steps of a small CNN on one batch, ten patterns in noise, whose loss must come down by a fifth.

    The update is written out: the first use of torch.optim would import for 0.9 s.
    """
    import torch
    from torch import nn
    from torch.nn import functional as F

    batch, steps, lr = (64 if device == "cpu" else 512), 10, 0.003
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        layers = [nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten()]
        model = nn.Sequential(*layers, nn.Linear(32 * 8 * 8, 10)).to(device)
        labels = torch.arange(batch) % 10
        images = torch.randn(10, 3, 32, 32)[labels] + 0.5 * torch.randn(batch, 3, 32, 32)  # [B, C, H, W]
    images, labels, parameters = images.to(device), labels.to(device), list(model.parameters())
    losses = []

    def step() -> None:
        loss = F.cross_entropy(model(images), labels)
        losses.append(loss.detach())
        with torch.no_grad():
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter.sub_(gradient, alpha=lr)

    _seconds(step, 1, device)  # the first loads libraries and chooses kernels
    elapsed = _seconds(step, steps, device)
    first, last = losses[0].item(), losses[-1].item()
    return {
        "result": "pass" if last <= 0.8 * first else "fail",  # a NaN fails
        "message": f"loss {first:.3f} -> {last:.3f} in {steps} steps",
        "rate": batch * steps / elapsed,
        "unit": "images/s",
    }


@dataclass(frozen=True)
class Verdict:
    """ok: every GPU passes its tests.  no_gpu: torch offers none, the CPU passes.  broken: training here would fail.

    line: what is so.  mend: what to type or do; empty where there is nothing.
    """

    level: Literal["ok", "no_gpu", "broken"]
    line: str
    mend: str


def verdict(facts: Facts) -> Verdict:
    """Judges the facts of `collect`, in which each device also holds its `tests` from `measure`.  A pure function."""
    if facts["torch"] is None:
        return Verdict("broken", f"torch cannot be imported: {_error(facts, 'torch')}", REINSTALL)
    judged, mismatch = _judge_devices(facts), _torchvision_mismatch(facts)
    if mismatch is None:
        return judged
    mend = judged.mend
    if REINSTALL not in mend:
        mend = f"{REINSTALL} with the package index from {SELECTOR}" + (f"; {mend}" if mend else "")
    return Verdict(judged.level, f"{judged.line}; {mismatch}: torchvision may fail", mend)


def _judge_devices(facts: Facts) -> Verdict:
    built = facts["torch"]
    cpu, *gpus = facts["devices"]
    for device in (*gpus, cpu):
        capability = device.get("compute_capability")
        if capability and built["build"] == "cuda" and not _has_code_for(capability, built["architectures"]):
            line = f"torch {built['version']} has no code for {_name(device)}, compute capability {capability}"
            mend = f"{REINSTALL} with the package index that {SELECTOR} gives for another CUDA version"
            return Verdict("broken", line, mend)
        failed = [test for test in device["tests"] if test["result"] == "fail"]
        if failed:
            mend = REINSTALL if device is cpu else "update the driver and restart the machine"
            if "out of memory" in failed[0]["message"]:
                mend = "end the processes that use this device's memory (nvidia-smi lists them)"
            return Verdict("broken", f"{_name(device)} fails {failed[0]['name']}: {failed[0]['message']}", mend)
    if gpus:
        return Verdict("ok", f"{', '.join(map(_name, gpus))} can train", "")
    return Verdict("no_gpu", *_why_no_gpu(facts))


def _why_no_gpu(facts: Facts) -> tuple[str, str]:
    """(line, mend) where torch offers no GPU."""
    built, driver, driver_error = facts["torch"], facts["driver"], _error(facts, "driver")
    wheel = f"torch {built['version']} ({built['build'].upper()} build)"
    if driver_error:
        return f"the NVIDIA driver does not answer: {driver_error}", "restart the machine; else reinstall the driver"
    if not driver or not driver["gpus"]:
        line = f"no GPU here: {wheel} sees none, " + ("nor does the driver" if driver else "there is no NVIDIA driver")
        return line, "--allow-cpu if the CPU is meant; with an NVIDIA card, https://www.nvidia.com/drivers"
    card, reason = driver["gpus"][0], _error(facts, "cuda") or "torch gives no reason"
    visible = facts["environment"].get("CUDA_VISIBLE_DEVICES")
    older_build = f"{REINSTALL} with the package index that {SELECTOR} gives for CUDA {driver['cuda']} or older"
    if built["build"] != "cuda":
        return f"{wheel} cannot use the {card}", older_build
    if _major(driver["cuda"]) < _major(built["built_for"]):  # within a major version an older driver will do
        line = f"{wheel} is for CUDA {built['built_for']}, but driver {driver['version']} for {driver['cuda']} or older"
        return line, f"update the driver, or {older_build}"
    if visible is not None and "No CUDA GPUs" in reason:
        return f"CUDA_VISIBLE_DEVICES={visible} hides the {card}", "unset CUDA_VISIBLE_DEVICES"
    return f"{wheel} cannot use the {card}: {reason}", "restart the machine; else update the driver"


def _torchvision_mismatch(facts: Facts) -> str | None:
    built, vision = facts["torch"], facts["torchvision"]
    if vision is None:
        return "torchvision is not installed"
    if vision["operators"] is None:
        return f"torchvision {vision['version']} does not load beside torch {built['version']}"
    cuda = vision["operators"]["cuda"]
    if built["build"] == "rocm" or _major(cuda) == _major(built["built_for"]):  # torchvision compares the same
        return None
    ours, theirs = (f"for CUDA {version}" if version else "without CUDA" for version in (built["built_for"], cuda))
    return f"torch is built {ours}, torchvision {vision['version']} {theirs}"


def _has_code_for(capability: str, architectures: list[str]) -> bool:
    """Whether a wheel with these architectures runs on a card of this compute capability.

    sm_XY runs on X.Z from Z = Y; compute_XY (PTX) on everything from X.Y; suffix f: on that major version only;
    suffix a: on X.Y only (NVIDIA, CUDA C++ Programming Guide, "Compute Capabilities").
    """
    card = tuple(map(int, capability.split(".")))
    for match in filter(None, (re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name) for name in architectures)):
        code = (int(match[2]), int(match[3]))
        everything_newer = match[1] == "compute" and not match[4]
        if card == code or (card > code and match[4] != "a" and (card[0] == code[0] or everything_newer)):
            return True
    return False


def _major(version: str | None) -> int:
    return int((version or "0").partition(".")[0])


def _name(device: Facts) -> str:
    return f"{device['device']} ({device['name']})"


def _error(facts: Facts, probe: str) -> str | None:
    return next((error["error"] for error in facts["errors"] if error["probe"] == probe), None)


def exit_code(verdict: Verdict, allow_cpu: bool) -> int:
    """0 where training can go ahead: on a GPU or, with `allow_cpu`, on the CPU; else 5."""
    return 0 if verdict.level == "ok" or (allow_cpu and verdict.level == "no_gpu") else DeviceError.exit_code


def render(facts: Facts, verdict: Verdict, console: Console) -> None:
    """Prints the facts, the tests of each device and the verdict, readable down to 40 columns."""
    table = Table.grid(padding=(0, 1))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name in ("platform", "torch", "torchvision", "driver"):
        table.add_row(name, Text(_words(facts[name]) or "none"))  # Text: a "[…]" in a value is no markup
    for name, value in facts["environment"].items():
        table.add_row("variable", Text(f"{name}={value}"))
    for error in facts["errors"]:
        table.add_row("error", Text(f"{error['probe']}: {error['error']}", style="red"))
    console.print(table)
    for device in facts["devices"]:
        known = {key: value for key, value in device.items() if key not in ("device", "kind", "name", "tests")}
        heading = ", ".join(filter(None, [f"{device['device']}: {device['name']}", _words(known)]))
        console.print("", Text(heading, style="bold"), sep="\n")
        table, messages = Table.grid(padding=(0, 1)), []
        for column in range(4):
            table.add_column(justify="left" if column < 2 else "right", no_wrap=column < 3)
        for test in device["tests"]:
            passed, rate = test["result"] == "pass", test.get("rate")
            rate_text = "" if rate is None else f"{rate:{',.0f' if rate >= 100 else '.3g'}} {test['unit']}"
            result = Text(test["result"], style="green" if passed else "bold red")
            table.add_row(test["name"], result, f"{test['ms']:.0f} ms", rate_text)
            messages += [] if passed else [Text(f"{test['name']}: {test['message']}", style="red")]
        console.print(table, *messages, sep="\n")
    style = {"ok": "bold green", "no_gpu": "bold yellow", "broken": "bold red"}[verdict.level]
    console.print("", Text(verdict.line, style=style), sep="\n")
    if verdict.mend:
        console.print(Text(f"Try: {verdict.mend}"))


def _words(facts: Facts | None) -> str:
    """{"cores": 2, "memory_total": 2**31} -> "cores 2, memory total 2.0 GiB"; what is None or empty is left out."""
    words = []
    for key, value in (facts or {}).items():
        if key.startswith("memory"):
            value = f"{value / 2**30:.1f} GiB"
        text = _words(value) if isinstance(value, dict) else ", ".join(value) if isinstance(value, list) else value
        words += [f"{key.replace('_', ' ')} {text}"] if text else []
    return ", ".join(words)
