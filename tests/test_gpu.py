"""check-gpu: probes that fail alone, tests that notice a wrong device, verdicts on recorded facts."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from rich.console import Console

from dltrain import gpu

PASSED = [
    {"name": "matmul fp32", "ms": 51.2, "result": "pass", "message": "ok", "rate": 51.87, "unit": "TFLOP/s"},
    {"name": "CNN step", "ms": 410.9, "result": "pass", "message": "ok", "rate": 123456.7, "unit": "images/s"},
]
CPU = {"device": "cpu", "kind": "cpu", "name": "Some CPU @ 3 GHz", "cores": 2, "memory_total": 2**34, "tests": PASSED}
H200 = {"device": "cuda:0", "kind": "cuda", "name": "NVIDIA H200", "compute_capability": "9.0", "tests": PASSED}
DRIVER = {"version": "580.82.07", "cuda": "13.0", "gpus": ["NVIDIA H200"]}
CUDA_WHEEL = {"version": "2.15.0+cu132", "build": "cuda", "built_for": "13.2", "architectures": ["sm_80", "sm_90"]}
CPU_WHEEL = {"version": "2.15.0+cpu", "build": "cpu", "built_for": None, "architectures": []}
ROCM_WHEEL = {"version": "2.15.0+rocm7.1", "build": "rocm", "built_for": "7.1.0", "architectures": ["gfx942"]}
CUDA_VISION = {"version": "0.29.2", "operators": {"cuda": "13.2"}}
CPU_VISION = {"version": "0.29.2", "operators": {"cuda": None}}
OLD_CARD = {**H200, "name": "GeForce GTX 1080", "compute_capability": "6.1"}


def failing(device: dict[str, Any], message: str) -> dict[str, Any]:
    failed = {"name": "CNN step", "ms": 3.0, "result": "fail", "message": message}
    return {**device, "tests": [PASSED[0], failed]}


def recorded(*gpus: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The facts of a machine with a CUDA wheel, an H200's driver and these GPUs, with `changes`."""
    facts = {
        "schema": 1,
        "platform": {"os": "Linux-6.8", "python": "3.12.3"},
        "environment": {},
        "torch": CUDA_WHEEL,
        "torchvision": CUDA_VISION,
        "driver": DRIVER,
        "devices": [CPU, *gpus],
        "errors": [],
    }
    return facts | changes


def error(probe: str, text: str) -> list[dict[str, str]]:
    return [{"probe": probe, "error": text}]


MACHINES = {
    # name: (facts, level, what the line says, what the mend says)
    "well": (recorded(H200), "ok", "cuda:0 (NVIDIA H200) can train", None),
    "two cards": (recorded(H200, {**H200, "device": "cuda:1"}), "ok", "cuda:0 (NVIDIA H200), cuda:1", None),
    "apple": (
        recorded(
            {"device": "mps", "kind": "mps", "name": "Apple GPU", "tests": PASSED},
            torch={**CPU_WHEEL, "version": "2.15.0", "build": "mps"},
            torchvision=CPU_VISION,
            driver=None,
        ),
        "ok",
        "mps (Apple GPU) can train",
        None,
    ),
    "CPU wheel beside a driver": (
        recorded(torch=CPU_WHEEL, torchvision=CPU_VISION),
        "no_gpu",
        "torch 2.15.0+cpu (CPU build) cannot use the NVIDIA H200",
        "pip install --force-reinstall torch torchvision with the package index that "
        "https://pytorch.org/get-started/locally gives for CUDA 13.0 or older",
    ),
    "CUDA wheel, no driver": (recorded(driver=None), "no_gpu", "there is no NVIDIA driver", "--allow-cpu"),
    "driver without a card": (
        recorded(driver={**DRIVER, "gpus": []}),
        "no_gpu",
        "sees none, nor does the driver",
        "--allow-cpu",
    ),
    "CPU wheel, no driver": (
        recorded(torch=CPU_WHEEL, torchvision=CPU_VISION, driver=None),
        "no_gpu",
        "no GPU here",
        "--allow-cpu",
    ),
    "driver that does not answer": (
        recorded(driver=None, errors=error("driver", "RM has detected an NVML/RM version mismatch.")),
        "no_gpu",
        "the NVIDIA driver does not answer: RM has detected",
        "restart the machine",
    ),
    "masked": (
        recorded(environment={"CUDA_VISIBLE_DEVICES": "7"}, errors=error("cuda", "No CUDA GPUs are available")),
        "no_gpu",
        "CUDA_VISIBLE_DEVICES=7 hides the NVIDIA H200",
        "unset CUDA_VISIBLE_DEVICES",
    ),
    "masked with nothing": (
        recorded(environment={"CUDA_VISIBLE_DEVICES": ""}, errors=error("cuda", "No CUDA GPUs are available")),
        "no_gpu",
        "CUDA_VISIBLE_DEVICES= hides",
        "unset CUDA_VISIBLE_DEVICES",
    ),
    "variable set, but another reason": (
        recorded(environment={"CUDA_VISIBLE_DEVICES": "0"}, errors=error("cuda", "CUDA unknown error")),
        "no_gpu",
        "cannot use the NVIDIA H200: CUDA unknown error",
        "restart the machine",
    ),
    "driver too old": (
        recorded(driver={**DRIVER, "version": "535.1", "cuda": "12.2"}),
        "no_gpu",
        "is for CUDA 13.2, but driver 535.1 for 12.2 or older",
        "gives for CUDA 12.2 or older",
    ),
    "architecture not in the wheel": (
        recorded(failing(OLD_CARD, "CUDA error: no kernel image is available for execution on the device")),
        "broken",
        "has no code for cuda:0 (GeForce GTX 1080), compute capability 6.1",
        "for another CUDA version",
    ),
    "a card whose test failed": (
        recorded(H200, failing({**H200, "device": "cuda:1"}, "CUDA error: uncorrectable ECC error")),
        "broken",
        "cuda:1 (NVIDIA H200) fails CNN step: CUDA error: uncorrectable ECC error",
        "update the driver",
    ),
    "a card whose memory is full": (
        recorded(failing(H200, "CUDA out of memory. Tried to allocate 2 MiB.")),
        "broken",
        "CUDA out of memory",
        "nvidia-smi",
    ),
    "a CPU whose test failed": (
        recorded(devices=[failing(CPU, "loss 2.7 -> 2.7 in 10 steps")], driver=None),
        "broken",
        "cpu (Some CPU @ 3 GHz) fails CNN step: loss 2.7 -> 2.7",
        "pip install --force-reinstall",
    ),
    "CPU torch, CUDA torchvision": (
        recorded(torch=CPU_WHEEL, torchvision={"version": "0.29.2", "operators": None}, driver=None),
        "no_gpu",
        "torchvision 0.29.2 does not load beside torch 2.15.0+cpu",
        "pip install --force-reinstall torch torchvision",
    ),
    "CUDA torch, CPU torchvision": (
        recorded(H200, torchvision=CPU_VISION),
        "ok",
        "can train; torch is built for CUDA 13.2, torchvision 0.29.2 without CUDA",
        "pip install --force-reinstall torch torchvision",
    ),
    "torchvision of another CUDA": (
        recorded(H200, torchvision={"version": "0.29.2", "operators": {"cuda": "12.8"}}),
        "ok",
        "torchvision 0.29.2 for CUDA 12.8",
        "pip install --force-reinstall torch torchvision",
    ),
    "no torchvision": (recorded(H200, torchvision=None), "ok", "torchvision is not installed", "pip install"),
    "torchvision of the same major CUDA": (
        recorded(H200, torchvision={"version": "0.29.2", "operators": {"cuda": "13.0"}}),
        "ok",
        "can train",
        None,
    ),
    "ROCm": (
        recorded(OLD_CARD, torch=ROCM_WHEEL, torchvision=CPU_VISION, driver=None),
        "ok",
        "cuda:0 (GeForce GTX 1080) can train",
        None,
    ),
    "no torch": (
        recorded(torch=None, torchvision=None, errors=error("torch", "libcudart.so.13: cannot open")),
        "broken",
        "torch cannot be imported: libcudart.so.13: cannot open",
        "pip install",
    ),
}


@pytest.mark.parametrize("name", MACHINES)
def test_verdict(name: str) -> None:
    facts, level, line, mend = MACHINES[name]
    before = json.dumps(facts)
    judged = gpu.verdict(facts)
    assert judged.level == level
    assert line in judged.line
    assert judged.mend == "" if mend is None else mend in judged.mend
    assert "\n" not in judged.line + judged.mend
    assert json.dumps(facts) == before


def test_two_troubles_with_one_mend_give_it_once() -> None:
    judged = gpu.verdict(recorded(torch=CPU_WHEEL, torchvision={"version": "0.29.2", "operators": None}))
    assert "cannot use the NVIDIA H200; torchvision 0.29.2 does not load" in judged.line
    assert judged.mend.count("pip install") == 1


@pytest.mark.parametrize(("level", "without", "with_allow_cpu"), [("ok", 0, 0), ("no_gpu", 5, 0), ("broken", 5, 5)])
def test_exit_code(level: Any, without: int, with_allow_cpu: int) -> None:
    judged = gpu.Verdict(level, "", "")
    assert gpu.exit_code(judged, allow_cpu=False) == without
    assert gpu.exit_code(judged, allow_cpu=True) == with_allow_cpu


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ("9.0", "sm_80 sm_90", True),
        ("8.9", "sm_86", True),  # a newer card of the same major version
        ("8.0", "sm_86", False),
        ("9.0", "sm_86", False),
        ("6.1", "sm_75 sm_80", False),
        ("9.0", "sm_80 compute_86", True),  # PTX is compiled for what is newer
        ("8.0", "compute_86", False),
        ("9.0", "sm_90a", True),
        ("10.0", "sm_90a compute_90a", False),
        ("12.1", "sm_120a", False),
        ("12.1", "sm_120f", True),
        ("12.0", "sm_100f compute_100f", False),
        ("12.0", "sm_100 sm_120", True),
        ("9.0", "gfx942", False),
        ("9.0", "", False),
    ],
)
def test_architectures_that_run_on_a_card(capability: str, architectures: str, runs: bool) -> None:
    assert gpu._has_code_for(capability, architectures.split()) is runs


def test_importing_costs_no_torch() -> None:
    code = "import sys, dltrain.gpu; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_collect_gives_plain_facts_of_this_machine() -> None:
    facts = gpu.collect()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["schema"] == 1
    assert facts["torch"]["version"] == torch.__version__
    assert facts["torch"]["architectures"] == torch.cuda.get_arch_list()
    assert facts["torchvision"]["version"]
    cpu = facts["devices"][0]
    assert (cpu["device"], cpu["memory_total"]) == ("cpu", psutil.virtual_memory().total)
    assert cpu["name"] not in ("", "CPU")
    assert 0 < cpu["memory_free"] <= cpu["memory_total"]
    assert len(facts["devices"]) == 1 + torch.cuda.device_count() + torch.backends.mps.is_available()
    assert facts["errors"] == []


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux binds a process to cores")
def test_cores_are_those_the_process_may_use() -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert gpu._cpu()["cores"] == 1
    finally:
        os.sched_setaffinity(0, before)
    assert gpu._cpu()["cores"] == len(before)


@pytest.mark.parametrize(
    ("function", "probe"),
    [
        ("_torch", "torch"),
        ("_torchvision_operators", "torchvision operators"),
        ("_driver", "driver"),
        ("_cpu", "cpu"),
        ("_memory", "memory"),
        ("_cuda_count", "cuda"),
        ("_mps_devices", "mps"),
    ],
)
def test_a_probe_fails_alone(monkeypatch: pytest.MonkeyPatch, function: str, probe: str) -> None:
    def fail(*args: object) -> None:
        raise OSError("broken here\nand a page of advice")

    whole = gpu.collect()
    monkeypatch.setattr(gpu, function, fail)
    facts = gpu.collect()
    assert facts["errors"] == error(probe, "broken here")
    assert facts.keys() == whole.keys()
    assert facts["platform"] == whole["platform"]
    if probe not in ("torch", "torchvision operators"):
        assert facts["torch"] == whole["torch"]
        assert facts["torchvision"] == whole["torchvision"]
    for device in facts["devices"]:
        device["tests"] = PASSED
    console = Console(file=io.StringIO(), width=40)
    gpu.render(facts, gpu.verdict(facts), console)


@pytest.mark.parametrize(("file", "message"), [("_C.so", "_C.so"), ("version.py", "no compiled operators")])
def test_a_torchvision_that_does_not_load_is_recorded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, file: str, message: str
) -> None:
    (tmp_path / file).write_bytes(b"no library")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: spec)
        facts = gpu.collect()
    assert facts["torchvision"]["operators"] is None
    assert [item["probe"] for item in facts["errors"]] == ["torchvision operators"]
    assert message in facts["errors"][0]["error"]


class LibraryNotFound(Exception):
    pass


def nvml(calls: list[str], init: Exception | None = None, count: Exception | None = None) -> SimpleNamespace:
    """pynvml on a machine with two cards, whose calls raise what is given."""

    def call(name: str, result: Any, error: Exception | None = None) -> Any:
        def function(*args: Any) -> Any:
            calls.append(name)
            if error:
                raise error
            return result

        return function

    return SimpleNamespace(
        NVMLError_LibraryNotFound=LibraryNotFound,
        nvmlInit=call("init", None, init),
        nvmlShutdown=call("shutdown", None),
        nvmlDeviceGetCount=call("count", 2, count),
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName=lambda handle: f"card {handle}",
        nvmlSystemGetDriverVersion=lambda: "550.54.15",
        nvmlSystemGetCudaDriverVersion_v2=lambda: 12040,
    )


def test_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setitem(sys.modules, "pynvml", nvml(calls))
    assert gpu._driver() == {"version": "550.54.15", "cuda": "12.4", "gpus": ["card 0", "card 1"]}
    assert calls == ["init", "count", "shutdown"]


def test_no_driver_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml([], init=LibraryNotFound()))
    facts = gpu.collect()
    assert facts["driver"] is None
    assert facts["errors"] == []


def test_a_driver_that_stops_answering_is_recorded_and_released(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setitem(sys.modules, "pynvml", nvml(calls, count=RuntimeError("GPU is lost")))
    facts = gpu.collect()
    assert facts["driver"] is None
    assert facts["errors"] == error("driver", "GPU is lost")
    assert calls == ["init", "count", "shutdown"]


def test_torch_is_asked_why_it_sees_no_card_where_there_is_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise RuntimeError("No CUDA GPUs are available")

    monkeypatch.setattr(gpu, "_driver", lambda: DRIVER)
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    assert gpu.collect()["errors"] == error("cuda", "No CUDA GPUs are available")


def test_a_card_that_vanished_stays_in_the_list(monkeypatch: pytest.MonkeyPatch) -> None:
    def properties(index: int) -> SimpleNamespace:
        if index == 1:
            raise RuntimeError("CUDA error: unspecified launch failure")
        return SimpleNamespace(name="NVIDIA L4", major=8, minor=9)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (3, 5))  # (free, total)
    facts = gpu.collect()
    first, second = (device for device in facts["devices"] if device["kind"] == "cuda")
    assert first == {
        "device": "cuda:0",
        "kind": "cuda",
        "name": "NVIDIA L4",
        "compute_capability": "8.9",
        "memory_total": 5,
        "memory_free": 3,
    }
    assert second == {"device": "cuda:1", "kind": "cuda", "name": "does not answer"}
    assert facts["errors"] == error("cuda:1", "CUDA error: unspecified launch failure")


def results(measured: dict[str, Any]) -> dict[str, str]:
    return {test["name"]: test["result"] for test in measured["tests"]}


def test_the_cpu_passes_and_nothing_random_is_used_up() -> None:
    before = torch.get_rng_state()
    tests = gpu.measure("cpu")["tests"]
    assert [(test["name"], test["unit"]) for test in tests] == [
        ("matmul fp32", "TFLOP/s"),
        ("matmul bf16", "TFLOP/s"),
        ("CNN step", "images/s"),
    ]
    assert all(test["result"] == "pass" for test in tests), tests
    assert all(test["rate"] > 0 and test["ms"] > 0 for test in tests)
    assert torch.equal(torch.get_rng_state(), before)


def test_rates_are_work_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(work: Any, count: int, device: str) -> float:
        for _ in range(count):
            work()
        return 0.5 * count

    monkeypatch.setattr(gpu, "_seconds", seconds)
    rates = {test["name"]: test["rate"] for test in gpu.measure("cpu")["tests"]}
    assert rates["matmul fp32"] == pytest.approx(2 * 512**3 / 0.5 / 1e12)
    assert rates["CNN step"] == pytest.approx(64 / 0.5)


@pytest.mark.parametrize("wrong", [0.1, float("nan")])
def test_a_wrong_product_fails(monkeypatch: pytest.MonkeyPatch, wrong: float) -> None:
    right = torch.matmul

    def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        product = right(a, b)
        product[100, 7] += wrong * 512**0.5  # one entry, by a tenth of the entries' standard deviation
        return product

    monkeypatch.setattr(torch, "matmul", matmul)
    measured = gpu.measure("cpu")
    assert results(measured) == {"matmul fp32": "fail", "matmul bf16": "fail", "CNN step": "pass"}
    assert "largest error" in measured["tests"][0]["message"]


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan")])
def test_a_loss_that_does_not_fall_fails(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    right = torch.autograd.grad

    def grad(*args: Any) -> list[torch.Tensor]:
        return [factor * gradient for gradient in right(*args)]

    monkeypatch.setattr(torch.autograd, "grad", grad)
    assert results(gpu.measure("cpu")) == {"matmul fp32": "pass", "matmul bf16": "pass", "CNN step": "fail"}


def test_a_test_that_raises_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def matmul(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 MiB.\nSee the documentation")

    monkeypatch.setattr(torch, "matmul", matmul)
    measured = gpu.measure("cpu")
    assert results(measured) == {"matmul fp32": "fail", "matmul bf16": "fail", "CNN step": "pass"}
    assert measured["tests"][0]["message"] == "CUDA out of memory. Tried to allocate 64.00 MiB."


def test_an_absent_device_fails_every_test() -> None:
    measured = gpu.measure("cuda:99")
    assert set(results(measured).values()) == {"fail"}
    assert all(test["message"] for test in measured["tests"])
    json.dumps(measured)


def test_bf16_is_left_out_on_a_card_that_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert list(results(gpu.measure("cuda:99"))) == ["matmul fp32", "CNN step"]


@pytest.mark.parametrize("width", [80, 40])
@pytest.mark.parametrize("name", MACHINES)
def test_render_says_everything_at_any_width(name: str, width: int) -> None:
    facts = MACHINES[name][0]
    judged = gpu.verdict(facts)
    console = Console(file=io.StringIO(), width=width)
    gpu.render(facts, judged, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in text
    assert "\x1b" not in text  # no colour where the output is no terminal
    flowing = "".join(text.split())  # a long word is broken at the line's end
    said = [judged.line, judged.mend]
    for device in facts["devices"]:
        said += [f"{device['device']}: {device['name']}"]
        said += [test["message"] for test in device["tests"] if test["result"] == "fail"]
    for sentence in said:
        assert "".join(sentence.split()) in flowing
    assert any("51.9 TFLOP/s" in line and "pass" in line and "51 ms" in line for line in lines)


def test_render_takes_no_value_for_markup() -> None:
    facts = recorded(failing(H200, "[red]bracket[/nothing]"), environment={"CUDA_VISIBLE_DEVICES": "[/x]"})
    console = Console(file=io.StringIO(), width=80)
    gpu.render(facts, gpu.verdict(facts), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "[red]bracket[/nothing]" in text
    assert "CUDA_VISIBLE_DEVICES=[/x]" in text
