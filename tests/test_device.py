"""What `auto` chooses, what is refused, and what is recorded of it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from dltrain import device
from dltrain.device import Placement, be_deterministic, bits_depend_on, choose_device, environment, place
from dltrain.errors import ConfigError, DeviceError

CNN = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
MLP = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))

# `flags` lines of /proc/cpuinfo, shortened: which CPUs compute bfloat16 in hardware
SAPPHIRE_RAPIDS = "fpu sse2 avx2 avx512f avx512_vnni avx512_bf16 amx_bf16 avx512_fp16 amx_tile amx_int8"
ZEN_4 = "fpu sse2 avx2 avx512f avx512_bf16 avx512_vnni"
ICE_LAKE = "fpu sse2 avx2 avx512f avx512_vnni avx512_vbmi2"


def have(monkeypatch: pytest.MonkeyPatch, cuda: int = 0, mps: bool = False, flags: str = "") -> None:
    """Makes torch see other devices than there are."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: cuda - 1)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(device, "cpu_flags", lambda: set(flags.split()))


@pytest.mark.parametrize(
    ("cuda", "mps", "expected", "why"),
    [
        (0, False, "cpu", "neither CUDA nor MPS is here"),
        (1, False, "cuda:0", "a CUDA device is here"),
        (2, True, "cuda:1", "a CUDA device is here"),  # the one that is current
        (0, True, "mps", "no CUDA device is here, MPS is"),
    ],
)
def test_auto_takes_the_fastest_that_is_here(monkeypatch, cuda, mps, expected, why):
    have(monkeypatch, cuda, mps)
    assert choose_device("auto") == (torch.device(expected), why)


@pytest.mark.parametrize(
    ("asked", "expected"), [("cpu", "cpu"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1"), ("mps", "mps")]
)
def test_a_device_that_is_asked_for_is_taken(monkeypatch, asked, expected):
    have(monkeypatch, cuda=2, mps=True)
    assert choose_device(asked) == (torch.device(expected), "asked for")


@pytest.mark.parametrize(
    ("asked", "cuda", "message"),
    [
        ("cuda", 0, "device cuda: no CUDA devices here; use --device auto or cpu"),
        ("cuda:0", 0, "device cuda:0: no CUDA devices here"),
        ("cuda:1", 1, "device cuda:1: 1 CUDA device here"),
        ("cuda:999", 1, "device cuda:999: 1 CUDA device here"),
        ("cuda:5", 2, "device cuda:5: 2 CUDA devices here"),
        ("mps", 2, "device mps: not available here; use --device auto or cpu"),
    ],
)
def test_an_absent_device_is_refused_and_what_is_here_is_named(monkeypatch, asked, cuda, message):
    have(monkeypatch, cuda)
    with pytest.raises(DeviceError, match=message) as caught:
        choose_device(asked)
    assert caught.value.exit_code == 5


@pytest.mark.parametrize("asked", ["gpu", "cuda:", "cuda:x", "CPU", "xpu", "", "cuda:-1", "cpu\n"])
def test_what_names_no_device_is_a_usage_error(asked):
    with pytest.raises(ConfigError, match=r"expected auto, cpu, mps, cuda or cuda:N") as caught:
        choose_device(asked)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("model", "flags", "precision", "why"),
    [
        (CNN, SAPPHIRE_RAPIDS, "bf16", "convolutions, and the CPU has amx_bf16 and avx512_bf16"),
        (CNN, ZEN_4, "bf16", "convolutions, and the CPU has avx512_bf16"),
        (CNN, ICE_LAKE, "fp32", "the CPU has no bf16 units"),
        (CNN, "", "fp32", "the CPU has no bf16 units"),
        (MLP, SAPPHIRE_RAPIDS, "fp32", "no convolutions, and the CPU has amx_bf16 and avx512_bf16"),
    ],
)
def test_precision_on_a_cpu_follows_its_instruction_sets(monkeypatch, model, flags, precision, why):
    have(monkeypatch, flags=flags)
    placed = place("auto", "auto", "auto", model)
    assert placed.device == torch.device("cpu")
    assert placed.dtype == {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    assert placed.why["precision"] == f"{precision} ({why})"
    assert placed.why["device"] == "cpu (neither CUDA nor MPS is here)"


@pytest.mark.parametrize(
    ("model", "flags", "share", "precision", "timed"),
    [
        (MLP, SAPPHIRE_RAPIDS, 0.79, "bf16", True),
        (MLP, SAPPHIRE_RAPIDS, 0.81, "fp32", True),
        (CNN, ZEN_4, 0.5, "bf16", True),
        (CNN, ZEN_4, 1.2, "fp32", True),
        (CNN, SAPPHIRE_RAPIDS, 1.2, "bf16", False),
        (MLP, ICE_LAKE, 0.5, "fp32", False),
    ],
)
def test_what_a_cpu_reports_does_not_settle_is_timed(monkeypatch, model, flags, share, precision, timed):
    have(monkeypatch, flags=flags)
    asked = []

    def seconds(placement):
        asked.append((placement.dtype, placement.memory_format))
        return {torch.float32: 0.5, torch.bfloat16: 0.5 * share}[placement.dtype]

    placed = place("auto", "auto", "auto", model, seconds=seconds)
    assert asked == [(dtype, placed.memory_format) for dtype in (torch.float32, torch.bfloat16) if timed]
    assert placed.why["precision"].startswith(precision)
    assert (f"a step in bf16 took {share:.2f} of the time in fp32" in placed.why["precision"]) == timed


@pytest.mark.parametrize(
    ("device", "precision", "why"),
    [("cpu", "bf16", "as it was trained before"), ("cuda", "fp32", "no convolutions, and the CPU has amx")],
)
def test_auto_keeps_to_what_was_recorded_on_the_same_device(monkeypatch, device, precision, why):
    have(monkeypatch, flags=SAPPHIRE_RAPIDS)
    recorded = {**bits_depend_on(PLACED), "arithmetic": "bfloat16"}
    recorded["device"] = recorded["device"].replace("cpu", device)
    placed = place("auto", "auto", "auto", MLP, recorded=recorded)
    assert placed.why["precision"].startswith(f"{precision} ({why}")
    asked = place("auto", "fp32", "auto", MLP, recorded=recorded)
    assert asked.why["precision"] == "fp32 (asked for)"


def test_the_c_library_keeps_the_memory_that_tensors_gave_back():
    """Freed blocks of a tensor's size do not go back to the system, so the next ones cost no page faults."""
    code = """
import resource, torch
from dltrain.device import keep_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(16 << 20)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
before = faults()
keep_memory()
faults()
print(before, faults())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    if platform.libc_ver()[0] == "glibc":
        assert after < before / 10


@pytest.mark.parametrize(
    ("capability", "precision", "why"),
    [
        ((9, 0), "bf16", "compute capability 8 or newer"),
        ((8, 0), "bf16", "compute capability 8 or newer"),
        ((7, 5), "fp32", "compute capability below 8"),
    ],
)
@pytest.mark.parametrize("model", [CNN, MLP])
def test_precision_on_cuda_follows_the_compute_capability(monkeypatch, model, capability, precision, why):
    have(monkeypatch, cuda=1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    placed = place("auto", "auto", "auto", model)
    assert placed.why["precision"] == f"{precision} ({why})"
    assert placed.dtype == {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]


@pytest.mark.parametrize("model", [CNN, MLP])
def test_mps_computes_in_float32(monkeypatch, model):
    have(monkeypatch, mps=True)
    placed = place("auto", "auto", "auto", model)
    assert placed.dtype == torch.float32
    assert placed.why["precision"].endswith("the mps gains nothing by bf16)")


@pytest.mark.parametrize(
    ("model", "memory_format", "why"),
    [(CNN, torch.channels_last, "channels_last (convolutions)"), (MLP, torch.contiguous_format, "contiguous (no conv")],
)
def test_memory_format_follows_the_model(monkeypatch, model, memory_format, why):
    have(monkeypatch)
    placed = place("auto", "auto", "auto", model)
    assert placed.memory_format == memory_format
    assert placed.why["memory_format"].startswith(why)


@pytest.mark.parametrize("model", [CNN, MLP])
@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize(
    ("written", "memory_format"), [("contiguous", torch.contiguous_format), ("channels_last", torch.channels_last)]
)
def test_explicit_choices_are_honoured(monkeypatch, model, precision, dtype, written, memory_format):
    have(monkeypatch, cuda=1, mps=True, flags=SAPPHIRE_RAPIDS)
    placed = place("cpu", precision, written, model)
    assert (placed.device, placed.dtype, placed.memory_format) == (torch.device("cpu"), dtype, memory_format)
    assert placed.why == {
        "device": "cpu (asked for)",
        "precision": f"{precision} (asked for)",
        "memory_format": f"{written} (asked for)",
    }


def test_a_model_is_taken_in_the_memory_format():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    before = [parameter.clone() for parameter in model.parameters()]
    placed = place("cpu", "fp32", "channels_last", model)
    placed.take(model)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_autocast_computes_in_the_precision(precision, dtype):
    placed = place("cpu", precision, "auto", MLP)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of what it cannot cast to
        with placed.autocast():
            assert MLP(torch.ones(1, 4)).dtype == dtype


def test_cpu_flags_are_read_from_where_linux_keeps_them(monkeypatch, tmp_path):
    text = "processor\t: 0\nmodel name\t: X\nflags\t\t: {}\nbugs\t\t: none\n\nprocessor\t: 1\nflags\t\t: other\n"
    (tmp_path / "cpuinfo").write_text(text.format(ZEN_4))
    monkeypatch.setattr(device, "Path", lambda _: tmp_path / "cpuinfo")
    assert device.cpu_flags() == set(ZEN_4.split())
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nFeatures\t: fp asimd bf16\n")  # an ARM CPU's
    assert device.cpu_flags() == set()
    (tmp_path / "cpuinfo").unlink()
    assert device.cpu_flags() == set()


def test_be_deterministic_holds_for_torch_and_for_cublas(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is as before when the test ends
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    torch.use_deterministic_algorithms(False)
    be_deterministic()
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    be_deterministic()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"  # the user's own


PLACED = Placement(torch.device("cpu"), torch.float32, torch.contiguous_format, {"device": "cpu (asked for)"})


def test_what_the_bits_depend_on_is_recorded():
    torch.set_num_threads(1)
    one = bits_depend_on(PLACED)
    torch.set_num_threads(2)
    two = bits_depend_on(PLACED)
    assert one == {
        "torch": torch.__version__,
        "device": f"cpu {platform.machine()}",
        "threads": 1,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "arithmetic": "float32",
        "layout": "contiguous_format",
        "compile": "off",
    }
    assert two == {**one, "threads": 2}
    assert json.loads(json.dumps(one)) == one


def test_the_environment_names_software_and_reasons(monkeypatch):
    def missing(package: str) -> str:
        if package == "torchvision":
            raise device.PackageNotFoundError
        return "1.2.3"

    monkeypatch.setattr(device, "version", missing)
    found = environment(PLACED)
    assert json.loads(json.dumps(found)) == found
    assert found["device"] == "cpu (asked for)"
    assert found["torch"] == torch.__version__
    assert found["python"] == platform.python_version()
    assert (found["versions"]["torchvision"], found["versions"]["numpy"]) == ("not installed", "1.2.3")


def test_the_git_revision_is_that_of_the_folder_or_none(monkeypatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    device._git_revision.cache_clear()
    assert environment(PLACED)["git"] is None
    name = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run(["git", "init", "-q"], check=True)
    subprocess.run(["git", *name, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    device._git_revision.cache_clear()
    assert environment(PLACED)["git"] == head
    device._git_revision.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))  # no git here
    assert environment(PLACED)["git"] is None
    device._git_revision.cache_clear()
