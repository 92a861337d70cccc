"""What this machine, its drivers and its torch are: plain data, gathered by probes of which each fails alone.

Nothing is computed on a device yet, and torch is imported inside the probes that need it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dltrain import __version__
from dltrain.gpu import nvml
from dltrain.gpu.worker import first_line

Facts = dict[str, Any]
Probe = Callable[..., Any]  # (name of the probe, function, its arguments) -> what it found, or None

SCHEMA = 2  # of the whole report: docs/check-gpu.schema.json
INSTRUCTION_SETS = {
    "avx2": "avx2",
    "avx512f": "avx512",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "avx512_fp16": "avx512_fp16",
    "amx_bf16": "amx_bf16",
    "amx_fp16": "amx_fp16",
    "asimd": "neon",
    "sve": "sve",
    "bf16": "arm_bf16",
}
VARIABLES = (
    r"(CUDA|CUDNN|CUBLAS|NVIDIA|NCCL|TORCH|TORCHINDUCTOR|TRITON|PYTORCH|HIP|HSA|ROCR|MIOPEN|GPU|OMP|MKL|KMP|GOMP)_\w+"
    r"|DLTRAIN_\w+|LD_LIBRARY_PATH|LD_PRELOAD|SLURM_JOB_GPUS"
)
VENDORS = {"0x10de": "nvidia", "0x1002": "amd"}
SILENT = "does not answer"  # the name of a device that could not be asked for its own
MARKS = {"/.dockerenv": "docker", "/run/.containerenv": "podman"}  # files that a container has
PROC, SYS, DEV = Path("/proc"), Path("/sys"), Path("/dev")  # Linux only: elsewhere they are absent


def collect(torch_died: str | None = None) -> Facts:
    """The facts, JSON-able; docs/check-gpu.schema.json names each.

    What a probe could not find out is None or absent, and `errors` holds why: {"probe", "error"}.  Memory is in bytes.
    torch_died: how torch ended the process that tried it; it is then left alone
    """
    errors: list[dict[str, str]] = []

    def probe(name: str, function: Callable[..., Any], *args: Any) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's, of old drivers and missing architectures: diagnosed later
                return function(*args)
        except Exception as error:  # whatever a broken driver or wheel raises is a finding, not a crash
            errors.append({"probe": name, "error": first_line(error)})
            return None

    driver = probe("driver", nvml.driver, probe)  # before torch: it would count this process among a card's users
    built = None if torch_died else probe("torch", _torch, probe)
    errors += [{"probe": "torch", "error": torch_died}] if torch_died else []
    return {
        "schema": SCHEMA,
        "dltrain": __version__,
        "system": probe("system", _system),
        "python": probe("python", _python),
        "environment": environment(),
        "torch": built,
        "torchvision": probe("torchvision", _torchvision, built, probe),
        "driver": driver,
        "kernel_module": probe("kernel module", _kernel_module),
        "pci": probe("pci", _pci),
        "device_files": probe("device files", _device_files),
        "shm": probe("shm", _space, DEV / "shm"),
        "disk": probe("disk", _space, Path()),
        "devices": _devices(built, driver, probe),
        "errors": errors,
    }


def under_load(index: int) -> Facts:
    """What a load changes, of one card; to be asked right after one, since an idle card slows its link.

    Raises pynvml.NVMLError where the driver has gone; a single probe that fails leaves None.
    """

    def probe(name: str, function: Callable[..., Any], *args: Any) -> Any:
        with contextlib.suppress(Exception):  # it was reported when the facts were collected, or is by the tests
            return function(*args)

    return nvml.under_load(index, probe)


def environment() -> dict[str, str]:
    """The environment variables that change what a GPU or torch does."""
    return {name: value for name, value in sorted(os.environ.items()) if re.fullmatch(VARIABLES, name)}


def _system() -> Facts:
    name = platform.platform()
    if Path("/etc/os-release").exists():
        name = platform.freedesktop_os_release().get("PRETTY_NAME", name)
    return {
        "os": name,
        "kernel": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "container": _container(),
        "wsl": "microsoft" in platform.release().lower(),
    }


def _container() -> str | None:
    """The container this runs in, as far as its traces tell."""
    if "KUBERNETES_SERVICE_HOST" in os.environ:
        return "kubernetes"
    for variable in ("APPTAINER_CONTAINER", "SINGULARITY_CONTAINER"):
        if variable in os.environ:
            return "apptainer"
    for file, name in MARKS.items():
        if Path(file).exists():
            return name
    groups = _read(PROC / "1/cgroup")
    found = re.search(r"kubepods|docker|containerd|libpod|lxc", groups)
    return (found[0] if found else None) or os.environ.get("container")  # noqa: SIM112 (systemd's)


def _python() -> Facts:
    kind = "venv" if sys.prefix != sys.base_prefix else "system"
    if Path(sys.prefix, "conda-meta").exists():
        kind = "conda"
    return {"version": platform.python_version(), "environment": kind, "prefix": sys.prefix}


def _torch(probe: Probe) -> Facts:
    import torch

    version = torch.version.cuda or torch.version.hip
    build = "cuda" if torch.version.cuda else "rocm" if version else "mps" if torch.backends.mps.is_built() else "cpu"
    gpu = build in ("cuda", "rocm")
    return {
        "version": str(torch.__version__),
        "build": build,
        "built_for": version,
        "architectures": torch.cuda.get_arch_list(),  # in the wheel: needs no device
        "cudnn": probe("cudnn", _cudnn) if gpu else None,
        "nccl": probe("nccl", _nccl) if gpu else None,
        "triton": _version("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-windows"),
        "threads": torch.get_num_threads(),
    }


def _cudnn() -> str | None:
    """92600 -> "9.26.0", and before version 9: 8902 -> "8.9.2"."""
    import torch

    number, step = torch.backends.cudnn.version() or 0, 100
    if number < 10_000:
        step = 10
    return f"{number // (100 * step)}.{number // 100 % step}.{number % 100}" if number else None


def _nccl() -> str | None:
    import torch

    if not (torch.distributed.is_available() and torch.distributed.is_nccl_available()):
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))


def _version(*packages: str) -> str | None:
    for package in packages:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _torchvision(built: Facts | None, probe: Probe) -> Facts:
    from packaging.requirements import Requirement

    found: Facts = {"version": importlib.metadata.version("torchvision"), "requires": None, "fits": None}
    needs = map(Requirement, importlib.metadata.requires("torchvision") or [])
    torch = next((need for need in needs if need.name == "torch"), None)
    if torch:
        found["requires"] = str(torch)
        found["fits"] = torch.specifier.contains(built["version"], prereleases=True) if built else None
    found["operators"] = probe("torchvision operators", _torchvision_operators) if built else None
    return found


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
    return {"cuda": nvml.cuda_version(cuda) if cuda > 0 else None}


def _kernel_module() -> str | None:
    """The version of the NVIDIA kernel module, which a container sees even where it was given no card."""
    found = re.search(r"Kernel Module .*?\s(\d+\.\d+(?:\.\d+)?)\s", _read(PROC / "driver/nvidia/version"))
    return found[1] if found else None


def _pci() -> list[Facts]:
    """The display controllers and 3D accelerators of NVIDIA and AMD that Linux sees, with the driver each has."""
    found = []
    for folder in sorted((SYS / "bus/pci/devices").glob("*")):
        vendor = VENDORS.get(_read(folder / "vendor").strip())
        if vendor and re.match(r"0x(03|12)", _read(folder / "class")):  # display controller, processing accelerator
            driver = folder / "driver"
            found.append(
                {"address": folder.name, "vendor": vendor, "driver": driver.resolve().name if driver.exists() else None}
            )
    return found


def _device_files() -> dict[str, bool]:
    """The files through which a GPU is reached -> whether this user may open them."""
    names = [file.name for file in DEV.glob("nvidia*") if re.fullmatch(r"nvidia(\d+|ctl|-uvm)", file.name)]
    names += [name for name in ("kfd", "dxg") if (DEV / name).exists()]
    return {f"/dev/{name}": os.access(DEV / name, os.R_OK | os.W_OK) for name in sorted(names)}


def _space(folder: Path) -> Facts | None:
    if not folder.exists():
        return None
    usage = shutil.disk_usage(folder)
    return {"total": usage.total, "free": usage.free}


def _read(file: Path) -> str:
    """The text of a file of the kernel's; empty where there is none, or none for us."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _devices(built: Facts | None, driver: Facts | None, probe: Probe) -> list[Facts]:
    """The CPU, then each GPU that torch offers."""
    devices: list[Facts] = [{"device": "cpu", "kind": "cpu", "name": "CPU"}]
    devices[0] |= (probe("cpu", cpu) or {}) | (probe("memory", _memory) or {})
    if not built:
        return devices
    for index in range(probe("cuda", _cuda_count, driver is not None) or 0):
        name = f"cuda:{index}"
        device = {"device": name, "kind": "cuda", "name": SILENT}
        found = probe(name, _cuda_device, index)
        if found:
            device |= found | (probe(f"{name} memory", _cuda_memory, index) or {})
        devices.append(device)
    return devices + (probe("mps", _mps_devices) or [])


def cpu() -> Facts:
    text = _read(PROC / "cpuinfo")
    found = {key: re.search(rf"^(?:{key})\s*: (.+)$", text, re.MULTILINE) for key in ("model name", "flags|Features")}
    model, flags = (match[1] if match else "" for match in found.values())
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    units = [name for flag, name in INSTRUCTION_SETS.items() if flag in flags.split()]
    return {
        "name": model or platform.processor() or platform.machine(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "cores_of_machine": os.cpu_count(),
        "quota": _quota(),
        "instruction_sets": units,
        "native": [dtype for dtype in ("fp16", "bf16") if any(unit.endswith(dtype) for unit in units)],
    }


def _quota() -> float | None:
    """The cores' worth of time that control groups give this process; None: as much as there is.

    Version 2 has `cpu.max` ("quota period" in microseconds, or "max period") in each group from ours up to the root,
    and the smallest counts; version 1 has two files.  In a container the own group is the root.
    """
    root = SYS / "fs/cgroup"
    own = re.search(r"^0::/(.*)$", _read(PROC / "self/cgroup"), re.MULTILINE)
    group = root / (own[1] if own else "")
    limits = [_read(folder / "cpu.max").split() for folder in (group, *group.parents) if folder.is_relative_to(root)]
    old = [_read(root / "cpu" / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
    quotas = [int(quota) / int(period) for quota, period in (*filter(None, limits), old) if quota.isdecimal()]
    return min(quotas, default=None)


def _memory() -> Facts:
    import psutil

    memory = psutil.virtual_memory()
    limits = [_read(SYS / "fs/cgroup" / name).strip() for name in ("memory.max", "memory/memory.limit_in_bytes")]
    limit = min((int(limit) for limit in limits if limit.isdecimal()), default=memory.total)
    return {
        "memory_total": memory.total,
        "memory_free": memory.available,
        "memory_limit": limit if limit < memory.total else None,  # the control group's
    }


def _cuda_count(has_driver: bool) -> int:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.device_count()
    if has_driver and (torch.version.cuda or torch.version.hip):
        torch.cuda.init()  # which raises the reason
    return 0


def _cuda_device(index: int) -> Facts:
    import torch

    card: Any = torch.cuda.get_device_properties(index)
    hip = torch.version.hip is not None
    pci = None
    if hasattr(card, "pci_bus_id"):
        pci = f"{card.pci_domain_id:04x}:{card.pci_bus_id:02x}:{card.pci_device_id:02x}.0"
    return {
        "name": card.name,
        "compute_capability": None if hip else f"{card.major}.{card.minor}",
        "architecture": card.gcnArchName if hip else f"sm_{card.major}{card.minor}",
        "processors": card.multi_processor_count,
        "pci": pci,
        "native": _native_amd(card.gcnArchName) if hip else native((card.major, card.minor)),
    }


def _cuda_memory(index: int) -> Facts:
    import torch

    free, total = torch.cuda.mem_get_info(index)  # makes a context, which a full or exclusive card refuses
    return {"memory_total": total, "memory_free": free}


def native(capability: tuple[int, int]) -> list[str]:
    """The types an NVIDIA card of this compute capability multiplies matrices of at a higher rate than fp32.

    Source: NVIDIA, CUDA C++ Programming Guide, "Compute Capabilities", tensor cores' input types.
    """
    since = {"fp16": (7, 0), "bf16": (8, 0), "tf32": (8, 0), "fp8": (8, 9)}
    return [dtype for dtype, first in since.items() if capability >= first]


def _native_amd(architecture: str) -> list[str]:
    """Source: AMD, ROCm documentation, "Data types and precision support"."""
    name = architecture.partition(":")[0].removeprefix("gfx")
    matrix = name in ("908", "90a") or name.startswith(("94", "95", "11", "12"))
    return [*(["fp16", "bf16"] if matrix else []), *(["fp8"] if name.startswith(("94", "95", "12")) else [])]


def _mps_devices() -> list[Facts]:
    import torch

    if not torch.backends.mps.is_available():
        return []
    return [
        {
            "device": "mps",
            "kind": "mps",
            "name": torch.backends.mps.get_name() or "Apple GPU",
            "processors": torch.backends.mps.get_core_count(),
            "memory_total": torch.mps.recommended_max_memory(),
            "native": ["fp16", *(["bf16"] if torch.backends.mps.is_macos_or_newer(14, 0) else [])],
        }
    ]
