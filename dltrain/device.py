"""Device, precision and memory format: what `auto` chooses, and why."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import subprocess
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dltrain.errors import ConfigError, DeviceError

WORTH_BF16 = 0.8  # a step in bf16 is to take at most so much of one in fp32: its fewer digits are to be worth it

# of mallopt, in malloc.h
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


@dataclass(frozen=True)
class Placement:
    """Where tensors live and how they are computed with."""

    device: torch.device
    dtype: torch.dtype  # of the arithmetic: bfloat16 under autocast, or float32
    memory_format: torch.memory_format
    why: dict[str, str]  # what was chosen for device, precision, memory_format, … -> the reason
    compile: str = "off"  # or default, max-autotune: how forward and backward pass are compiled

    def take(self, model: nn.Module) -> None:
        """Moves a model here, the weights of its convolutions of images in the memory format."""
        model.to(self.device)
        for parameter in model.parameters():
            if parameter.ndim == 4:  # torch's own model.to refuses those of conv3d
                parameter.data = parameter.data.to(memory_format=self.memory_format)

    def autocast(self) -> AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return nullcontext()  # one that does nothing costs 25 us a step
        return torch.autocast(self.device.type, self.dtype)


def choose_device(asked: str) -> tuple[torch.device, str]:
    """The device, and why.  Raises ConfigError where `asked` names none, DeviceError where it is absent."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:[0-9]{1,3})?", asked):
        raise ConfigError(f"device {asked}: expected auto, cpu, mps, cuda or cuda:N")
    if asked == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device()), "a CUDA device is here"
        if torch.backends.mps.is_available():
            return torch.device("mps"), "no CUDA device is here, MPS is"
        return torch.device("cpu"), "neither CUDA nor MPS is here"
    kind, _, number = asked.partition(":")
    index = int(number or 0)  # torch.device reads 128 and more as negative
    device = torch.device(kind)
    mend = "use --device auto or cpu; `dltrain check-gpu` says what is here"
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if index >= count:
            raise DeviceError(f"device {asked}: {count or 'no'} CUDA device{'s' * (count != 1)} here; {mend}")
        device = torch.device("cuda", index)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError(f"device mps: not available here; {mend}")
    return device, "asked for"


def place(
    asked: str,
    precision: str,
    memory_format: str,
    model: nn.Module,
    *,
    recorded: Mapping[str, Any] | None = None,
    seconds: Callable[[Placement], float] | None = None,
) -> Placement:
    """Decides what `auto` leaves open, for this model; but for compiling, which is for `dltrain.compiling` to decide.

    recorded: what `bits_depend_on` said when the model was last trained, which `auto` keeps to on the same device
    seconds: of a step; where what the device reports does not settle it, it decides
    """
    device, device_why = choose_device(asked)
    convolves = any(isinstance(module, nn.Conv2d) for module in model.modules())
    if memory_format != "auto":
        last, format_why = memory_format == "channels_last", "asked for"
    else:
        last, format_why = convolves, "convolutions" if convolves else "no convolutions"
    layout = torch.channels_last if last else torch.contiguous_format

    def trial(dtype: torch.dtype) -> float | None:
        return seconds(Placement(device, dtype, layout, {})) if seconds else None

    if precision != "auto":
        bf16, precision_why = precision == "bf16", "asked for"
    elif recorded and recorded["device"] == _name(device):
        bf16, precision_why = recorded["arithmetic"] == "bfloat16", "as it was trained before"
    elif device.type == "cuda":
        bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
        precision_why = "compute capability 8 or newer" if bf16 else "compute capability below 8"
    elif device.type == "cpu":
        bf16, precision_why = _cpu_precision(convolves, trial)
    else:
        bf16, precision_why = False, f"the {device.type} gains nothing by bf16"
    return Placement(
        device,
        torch.bfloat16 if bf16 else torch.float32,
        layout,
        {
            "device": f"{device} ({device_why})",
            "precision": f"{'bf16' if bf16 else 'fp32'} ({precision_why})",
            "memory_format": f"{'channels_last' if last else 'contiguous'} ({format_why})",
        },
    )


def _cpu_precision(convolves: bool, seconds: Callable[[torch.dtype], float | None]) -> tuple[bool, str]:
    """Whether a CPU is to compute in bf16, and why; other units than AMX, and matrix products, are timed."""
    units = sorted({"amx_bf16", "avx512_bf16"} & cpu_flags())
    if not units:
        return False, "the CPU has no bf16 units"
    has = f"{'' if convolves else 'no '}convolutions, and the CPU has {' and '.join(units)}"
    if convolves and "amx_bf16" in units:
        return True, has
    single, half = seconds(torch.float32), seconds(torch.bfloat16)
    if single is None or half is None:
        return convolves, has
    return half < WORTH_BF16 * single, f"{has}: a step in bf16 took {half / single:.2f} of the time in fp32"


def cpu_flags() -> set[str]:
    """The CPU's instruction sets as Linux names them; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return set()
    found = re.search(r"^flags\s*:(.*)$", text, flags=re.MULTILINE)
    return set(found[1].split()) if found else set()


def keep_memory() -> None:
    """Has the C library keep memory that tensors gave back, where it knows how (glibc).

    By default it gives large blocks back to the system, which has to fill the next step's with zeros, page by page:
    a quarter of a step's time on a CPU.
    """
    try:
        tune = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, or another system
        return
    for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 64 << 20)):
        tune(parameter, value)


def be_deterministic() -> None:
    """Only algorithms whose bits are the same each time; raises RuntimeError later where an operation has none."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS wants it before its first use
    torch.use_deterministic_algorithms(True)


def bits_depend_on(placement: Placement) -> dict[str, Any]:
    """What must be the same for two runs of one config to give the same bits."""
    return {
        "torch": torch.__version__,
        "device": _name(placement.device),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "arithmetic": str(placement.dtype).removeprefix("torch."),
        "layout": str(placement.memory_format).removeprefix("torch."),
        "compile": placement.compile,
    }


def _name(device: torch.device) -> str:
    return f"{device.type} {torch.cuda.get_device_name(device) if device.type == 'cuda' else platform.machine()}"


def environment(placement: Placement) -> dict[str, Any]:
    """What a reader of the results wants to know of the machine and the software."""
    versions = {}
    for package in ("dltrain", "torchvision", "numpy", "safetensors", "pydantic", "tensorboard"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        **bits_depend_on(placement),
        **placement.why,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cuda": torch.version.cuda,
        "versions": versions,
        "git": _git_revision(),
    }


@cache
def _git_revision() -> str | None:
    """The commit of the folder that dltrain is run in; None outside a checkout."""
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
