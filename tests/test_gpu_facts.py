"""The facts of check-gpu: each probe reads what the system says, and fails alone."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from dltrain.gpu import facts, nvml


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty /proc, /sys and /dev; the container's own traces are hidden as far as they are variables."""
    for name in ("proc", "sys", "dev"):
        monkeypatch.setattr(facts, name.upper(), tmp_path / name)
    for name in ("KUBERNETES_SERVICE_HOST", "APPTAINER_CONTAINER", "SINGULARITY_CONTAINER", "container"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_importing_costs_no_torch() -> None:
    code = "import sys; from dltrain.gpu import check, report; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_facts_are_plain_data_of_this_machine() -> None:
    found = facts.collect()
    assert json.loads(json.dumps(found)) == found
    assert found["errors"] == []
    assert found["torch"]["version"] == torch.__version__
    assert found["torch"]["architectures"] == torch.cuda.get_arch_list()
    assert found["torch"]["threads"] == torch.get_num_threads()
    assert found["torchvision"]["fits"] is True
    cpu = found["devices"][0]
    assert (cpu["device"], cpu["memory_total"]) == ("cpu", psutil.virtual_memory().total)
    assert cpu["name"] not in ("", "CPU")
    assert 0 < cpu["memory_free"] <= cpu["memory_total"]
    assert len(found["devices"]) == 1 + torch.cuda.device_count() + torch.backends.mps.is_available()
    assert 0 < found["disk"]["free"] < found["disk"]["total"]


def fail(*args: object) -> None:
    raise OSError("broken here\nand a page of advice")


PROBES = [
    (facts, "_system", "system"),
    (facts, "_python", "python"),
    (facts, "_torch", "torch"),
    (facts, "_cudnn", "cudnn"),
    (facts, "_nccl", "nccl"),
    (facts, "_torchvision", "torchvision"),
    (facts, "_torchvision_operators", "torchvision operators"),
    (nvml, "driver", "driver"),
    (facts, "_kernel_module", "kernel module"),
    (facts, "_pci", "pci"),
    (facts, "_device_files", "device files"),
    (facts, "cpu", "cpu"),
    (facts, "_memory", "memory"),
    (facts, "_cuda_count", "cuda"),
    (facts, "_mps_devices", "mps"),
]


@pytest.mark.parametrize(("module", "function", "probe"), PROBES)
def test_a_probe_fails_alone(monkeypatch: pytest.MonkeyPatch, module: Any, function: str, probe: str) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")  # also where this torch is built without
    whole = facts.collect()
    monkeypatch.setattr(module, function, fail)
    found = facts.collect()
    assert found["errors"] == [*whole["errors"], {"probe": probe, "error": "broken here"}]
    assert found.keys() == whole.keys()
    same = {key for key in found if found[key] == whole[key]} - {"errors"}
    assert {"schema", "dltrain", "environment", "shm"} - {probe} <= same
    if probe != "torch":
        assert found["devices"][0]["device"] == "cpu"
        assert found["torch"]["version"] == whole["torch"]["version"]


def test_a_torch_that_ends_its_process_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(facts, "_torch", fail)
    found = facts.collect(torch_died="the process died of SIGILL")
    assert found["torch"] is None
    assert found["errors"] == [{"probe": "torch", "error": "the process died of SIGILL"}]
    assert [device["device"] for device in found["devices"]] == ["cpu"]
    assert found["torchvision"]["version"] == importlib.metadata.version("torchvision")


def test_variables_are_those_that_change_what_a_gpu_does(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*facts.environment(), "SECRET_TOKEN", "AWS_CUDA_KEY"]:
        monkeypatch.delenv(name, raising=False)
    for name in ("CUDA_VISIBLE_DEVICES", "NCCL_DEBUG", "LD_LIBRARY_PATH", "SECRET_TOKEN", "AWS_CUDA_KEY", "LD_X"):
        monkeypatch.setenv(name, "0")
    assert facts.environment() == dict.fromkeys(("CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "NCCL_DEBUG"), "0")


@pytest.mark.parametrize(
    ("variables", "groups", "container"),
    [
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "0::/", "kubernetes"),
        ({"APPTAINER_CONTAINER": "/images/torch.sif"}, "", "apptainer"),
        ({}, "12:memory:/kubepods/besteffort/pod7\n", "kubepods"),
        ({}, "1:cpu:/lxc/7\n", "lxc"),
        ({"container": "systemd-nspawn"}, "0::/init.scope", "systemd-nspawn"),
        ({}, "0::/init.scope", None),
    ],
)
def test_container(
    system: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], groups: str, container: str | None
) -> None:
    monkeypatch.setattr(facts, "MARKS", {})
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    write(system, {"proc/1/cgroup": groups})
    assert facts._container() == container


def test_a_container_leaves_its_mark(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(system, {"containerenv": ""})
    monkeypatch.setattr(facts, "MARKS", {str(system / "dockerenv"): "docker", str(system / "containerenv"): "podman"})
    assert facts._container() == "podman"


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\n", "535.183.01"),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.10  Release Build  (dvs-builder@U16)  "
            "Tue Dec 10 12:31:00 UTC 2024\nGCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)\n",
            "570.86.10",
        ),
        ("", None),
    ],
)
def test_kernel_module(system: Path, text: str, version: str | None) -> None:
    write(system, {"proc/driver/nvidia/version": text})
    assert facts._kernel_module() == version


def test_pci_lists_gpus_and_their_drivers(system: Path) -> None:
    devices = {
        "0000:00:02.0": ("0x8086", "0x030000"),  # graphics in an Intel processor
        "0000:01:00.0": ("0x10de", "0x030000"),
        "0000:01:00.1": ("0x10de", "0x040300"),  # its sound
        "0000:03:00.0": ("0x1002", "0x038000"),
        "0000:05:00.0": ("0x1002", "0x120000"),  # an accelerator without a display
    }
    for address, (vendor, kind) in devices.items():
        folder = f"sys/bus/pci/devices/{address}"
        write(system, {f"{folder}/vendor": f"{vendor}\n", f"{folder}/class": f"{kind}\n"})
    (system / "sys/bus/pci/drivers/nouveau").mkdir(parents=True)
    (system / "sys/bus/pci/devices/0000:01:00.0/driver").symlink_to(system / "sys/bus/pci/drivers/nouveau")
    assert facts._pci() == [
        {"address": "0000:01:00.0", "vendor": "nvidia", "driver": "nouveau"},
        {"address": "0000:03:00.0", "vendor": "amd", "driver": None},
        {"address": "0000:05:00.0", "vendor": "amd", "driver": None},
    ]


def test_device_files_that_may_not_be_opened(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(system, dict.fromkeys(("dev/nvidia0", "dev/nvidiactl", "dev/nvidia-modeset", "dev/kfd", "dev/null"), ""))
    monkeypatch.setattr(os, "access", lambda file, mode: file.name != "nvidia0" or mode != os.R_OK | os.W_OK)
    assert facts._device_files() == {"/dev/kfd": True, "/dev/nvidia0": False, "/dev/nvidiactl": True}


CPUINFO = {
    "x86": ("model name\t: AMD EPYC 7B13\nflags\t\t: fpu avx2 sha_ni\n", "AMD EPYC 7B13", ["avx2"], []),
    "amx": (
        "model name\t: Xeon\nflags\t\t: avx2 avx512f amx_bf16 avx512_bf16 amx_tile avx512_fp16\n",
        "Xeon",
        ["avx2", "avx512", "avx512_bf16", "avx512_fp16", "amx_bf16"],
        ["fp16", "bf16"],
    ),
    "arm": ("Features\t: fp asimd sve bf16\n", None, ["neon", "sve", "arm_bf16"], ["bf16"]),
}


@pytest.mark.parametrize("name", CPUINFO)
def test_cpu_as_linux_describes_it(system: Path, name: str) -> None:
    text, model, units, native = CPUINFO[name]
    write(system, {"proc/cpuinfo": f"processor\t: 0\n{text}"})
    cpu = facts.cpu()
    assert (cpu["instruction_sets"], cpu["native"]) == (units, native)
    assert cpu["name"] == (model or cpu["name"]) != ""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux binds a process to cores")
def test_cores_are_those_the_process_may_use() -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert (facts.cpu()["cores"], facts.cpu()["cores_of_machine"]) == (1, os.cpu_count())
    finally:
        os.sched_setaffinity(0, before)
    assert facts.cpu()["cores"] == len(before)


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"sys/fs/cgroup/cpu.max": "max 100000"}, None),
        ({"sys/fs/cgroup/cpu.max": "150000 100000"}, 1.5),  # a container, whose own group is the root
        (
            {
                "proc/self/cgroup": "0::/user.slice/job\n",
                "sys/fs/cgroup/user.slice/cpu.max": "400000 100000",
                "sys/fs/cgroup/user.slice/job/cpu.max": "max 100000",
            },
            4.0,  # the parent's, which counts for all that is in it
        ),
        (
            {
                "proc/self/cgroup": "0::/user.slice/job\n",
                "sys/fs/cgroup/user.slice/cpu.max": "100000 100000",
                "sys/fs/cgroup/user.slice/job/cpu.max": "200000 100000",
            },
            1.0,
        ),
        ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
        ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, None),
    ],
)
def test_quota_of_control_groups(system: Path, files: dict[str, str], quota: float | None) -> None:
    write(system, files)
    assert facts._quota() == quota


@pytest.mark.parametrize("file", ["memory.max", "memory/memory.limit_in_bytes"])
@pytest.mark.parametrize(("text", "limit"), [("1073741824\n", 2**30), ("max\n", None), (f"{2**63 - 4096}\n", None)])
def test_memory_limit_of_control_groups(system: Path, file: str, text: str, limit: int | None) -> None:
    write(system, {f"sys/fs/cgroup/{file}": text})
    assert facts._memory()["memory_limit"] == limit


@pytest.mark.parametrize(("number", "version"), [(92600, "9.26.0"), (91002, "9.10.2"), (8902, "8.9.2"), (None, None)])
def test_version_of_cudnn(monkeypatch: pytest.MonkeyPatch, number: int | None, version: str | None) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: number)
    assert facts._cudnn() == version


@pytest.mark.parametrize(
    ("requires", "fits"),
    [("torch==2.9.1", True), ("torch (==2.9.1)", True), ("torch==2.10.0", False), ("numpy", None)],
)
def test_whether_torchvision_was_made_for_this_torch(
    monkeypatch: pytest.MonkeyPatch, requires: str, fits: bool | None
) -> None:
    monkeypatch.setattr(importlib.metadata, "requires", lambda package: ["numpy", requires])
    found = facts._torchvision({"version": "2.9.1+cu128"}, lambda name, function: None)
    assert found["fits"] is fits


@pytest.mark.parametrize(("file", "message"), [("_C.so", "_C.so"), ("version.py", "no compiled operators")])
def test_a_torchvision_that_does_not_load_is_recorded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, file: str, message: str
) -> None:
    (tmp_path / file).write_bytes(b"no library")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: spec)
        found = facts.collect()
    assert found["torchvision"]["operators"] is None
    assert [item["probe"] for item in found["errors"]] == ["torchvision operators"]
    assert message in found["errors"][0]["error"]


@pytest.fixture
def two_cards(monkeypatch: pytest.MonkeyPatch) -> dict[int, Exception]:
    """torch with two cards, of which one raises what is put into the dictionary."""
    raised: dict[int, Exception] = {}

    def properties(index: int) -> SimpleNamespace:
        if index in raised:
            raise raised[index]
        address = {"pci_domain_id": 0, "pci_bus_id": 0xB1, "pci_device_id": index}
        return SimpleNamespace(name="NVIDIA L4", major=8, minor=9, multi_processor_count=58, **address)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (3, 5))  # (free, total)
    monkeypatch.setattr(torch.version, "hip", None)
    return raised


def test_a_card_that_vanished_stays_in_the_list(two_cards: dict[int, Exception]) -> None:
    two_cards[1] = RuntimeError("CUDA error: unspecified launch failure")
    found = facts.collect()
    first, second = (device for device in found["devices"] if device["kind"] == "cuda")
    assert first == {
        "device": "cuda:0",
        "kind": "cuda",
        "name": "NVIDIA L4",
        "compute_capability": "8.9",
        "architecture": "sm_89",
        "processors": 58,
        "pci": "0000:b1:00.0",
        "native": ["fp16", "bf16", "tf32", "fp8"],
        "memory_total": 5,
        "memory_free": 3,
    }
    assert second == {"device": "cuda:1", "kind": "cuda", "name": "does not answer"}
    assert found["errors"] == [{"probe": "cuda:1", "error": "CUDA error: unspecified launch failure"}]


def test_a_card_too_full_for_a_context_keeps_its_name(
    two_cards: dict[int, Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", fail)
    found = facts.collect()
    assert found["devices"][1]["name"] == "NVIDIA L4"
    assert "memory_free" not in found["devices"][1]
    assert [error["probe"] for error in found["errors"]] == ["cuda:0 memory", "cuda:1 memory"]


def test_an_amd_card_is_named_by_its_architecture(
    two_cards: dict[int, Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    card = SimpleNamespace(name="AMD Instinct MI300X", gcnArchName="gfx942:sramecc+:xnack-", multi_processor_count=304)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    found = facts._cuda_device(0)
    assert (found["compute_capability"], found["architecture"]) == (None, "gfx942:sramecc+:xnack-")
    assert found["native"] == ["fp16", "bf16", "fp8"]
    assert found["pci"] is None


def test_torch_is_asked_why_it_sees_no_card_where_there_is_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise RuntimeError("No CUDA GPUs are available")

    monkeypatch.setattr(nvml, "driver", lambda probe: {"version": "580.82.07", "cuda": "13.0", "cards": []})
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    assert facts.collect()["errors"] == [{"probe": "cuda", "error": "No CUDA GPUs are available"}]


@pytest.mark.parametrize(
    ("capability", "native"),
    [
        ((6, 1), []),
        ((7, 5), ["fp16"]),
        ((8, 0), ["fp16", "bf16", "tf32"]),
        ((8, 9), ["fp16", "bf16", "tf32", "fp8"]),
        ((12, 0), ["fp16", "bf16", "tf32", "fp8"]),
    ],
)
def test_types_that_tensor_cores_multiply(capability: tuple[int, int], native: list[str]) -> None:
    assert facts.native(capability) == native
