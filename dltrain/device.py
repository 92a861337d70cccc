"""Device, precision and memory format: what `auto` chooses, and why."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dltrain.errors import ConfigError, DeviceError


@dataclass(frozen=True)
class Placement:
    """Where tensors live and how they are computed with."""

    device: torch.device
    dtype: torch.dtype  # of the arithmetic: bfloat16 under autocast, or float32
    memory_format: torch.memory_format
    why: dict[str, str]  # what was chosen for device, precision and memory_format -> the reason

    def take(self, model: nn.Module) -> None:
        """Moves a model here, its convolutions' weights in the memory format."""
        model.to(self.device)
        model.to(memory_format=self.memory_format)

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


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
    device = torch.device(asked)
    mend = "use --device auto or cpu; `dltrain check-gpu` says what is here"
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise DeviceError(f"device {asked}: {count or 'no'} CUDA device{'s' * (count != 1)} here; {mend}")
        device = torch.device("cuda", device.index or 0)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError(f"device mps: not available here; {mend}")
    return device, "asked for"


def place(asked: str, precision: str, memory_format: str, model: nn.Module) -> Placement:
    """Decides what `auto` leaves open, for this model."""
    device, device_why = choose_device(asked)
    convolves = any(isinstance(module, nn.Conv2d) for module in model.modules())
    if precision != "auto":
        bf16, precision_why = precision == "bf16", "asked for"
    elif device.type == "cuda":
        bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
        precision_why = "compute capability 8 or newer" if bf16 else "compute capability below 8"
    elif device.type == "cpu" and convolves:
        units = sorted({"amx_bf16", "avx512_bf16"} & cpu_flags())
        bf16, precision_why = bool(units), f"convolutions, and the CPU has {' and '.join(units) or 'no bf16 units'}"
    else:
        bf16, precision_why = (
            False,
            f"{'the' if convolves else 'no convolutions; the'} {device.type} gains nothing by bf16",
        )
    if memory_format != "auto":
        last, format_why = memory_format == "channels_last", "asked for"
    else:
        last, format_why = convolves, "convolutions" if convolves else "no convolutions"
    return Placement(
        device,
        torch.bfloat16 if bf16 else torch.float32,
        torch.channels_last if last else torch.contiguous_format,
        {
            "device": f"{device} ({device_why})",
            "precision": f"{'bf16' if bf16 else 'fp32'} ({precision_why})",
            "memory_format": f"{'channels_last' if last else 'contiguous'} ({format_why})",
        },
    )


def cpu_flags() -> set[str]:
    """The CPU's instruction sets as Linux names them; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return set()
    found = re.search(r"^flags\s*:(.*)$", text, flags=re.MULTILINE)
    return set(found[1].split()) if found else set()


def be_deterministic() -> None:
    """Only algorithms whose bits are the same each time; raises RuntimeError later where an operation has none."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS wants it before its first use
    torch.use_deterministic_algorithms(True)


def bits_depend_on(placement: Placement) -> dict[str, Any]:
    """What must be the same for two runs of one config to give the same bits."""
    device = placement.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "torch": torch.__version__,
        "device": f"{device.type} {name}",
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "arithmetic": str(placement.dtype).removeprefix("torch."),
        "layout": str(placement.memory_format).removeprefix("torch."),
    }


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
