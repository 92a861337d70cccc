"""From facts to findings, on the recorded facts of machines in tests/machines."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from dltrain.gpu import diagnose

MACHINES = {file.stem: json.loads(file.read_text()) for file in sorted((Path(__file__).parent / "machines").glob("*"))}


@pytest.mark.parametrize("name", MACHINES)
def test_what_is_found_on_a_machine(name: str) -> None:
    facts, expect = MACHINES[name]["facts"], MACHINES[name]["expect"]
    before = copy.deepcopy(facts)
    found = diagnose.findings(facts)
    verdict = diagnose.verdict(facts, found)
    assert [finding.name for finding in found] == expect["findings"]
    assert verdict.level == expect["level"]
    assert expect["line"] in verdict.line
    assert expect["mend"] in verdict.mend
    assert bool(verdict.mend) == bool(expect["mend"])
    assert facts == before
    for finding in found:
        assert "\n" not in finding.line + finding.mend
        assert "None" not in finding.line + finding.mend


def test_every_diagnosis_has_a_machine() -> None:
    """A reason that no recorded machine gives could be wrong without a test to notice."""
    told: dict[Any, int] = {}
    for machine in MACHINES.values():
        facts = machine["facts"]
        if facts["torch"] is None:
            continue
        for diagnosis in diagnose.DIAGNOSES:
            told[diagnosis] = told.get(diagnosis, 0) + len(list(diagnosis(facts)))
        if len(facts["devices"]) == 1:
            reason = next(reason for reason in diagnose.REASONS if reason(facts))
            told[reason] = told.get(reason, 0) + 1
    assert {each.__name__ for each in (*diagnose.DIAGNOSES, *diagnose.REASONS) if not told.get(each)} == set()


def test_the_worst_comes_first_and_warnings_are_counted() -> None:
    facts = copy.deepcopy(MACHINES["ecc"]["facts"])
    facts["environment"] = {"CUDA_LAUNCH_BLOCKING": "1", "CUDA_VISIBLE_DEVICES": "0"}
    facts["driver"]["cards"].append({"index": 1})
    facts["devices"][0]["tests"][0]["result"] = "warn"
    found = diagnose.findings(facts)
    assert [finding.level for finding in found] == ["fail", *["warn"] * 4, "note"]
    assert diagnose.verdict(facts, found).line.endswith("; 4 warnings besides")


def test_one_warning_is_told_and_the_others_are_counted() -> None:
    facts = copy.deepcopy(MACHINES["h100"]["facts"])
    facts["environment"] = {"CUDA_LAUNCH_BLOCKING": "1", "NVIDIA_TF32_OVERRIDE": "0"}
    verdict = diagnose.verdict(facts, diagnose.findings(facts))
    assert verdict.line.endswith("can train, but CUDA_LAUNCH_BLOCKING=1 makes training slower (and 1 more)")
    assert verdict.mend == "unset CUDA_LAUNCH_BLOCKING"


@pytest.mark.parametrize(
    ("key", "value", "name"),
    [
        ("memory_free", 0.09, "full"),
        ("memory_free", 0.11, None),
        ("utilization", 20, "busy"),
        ("utilization", 19, None),
    ],
)
def test_limits_of_full_and_busy(key: str, value: float, name: str | None) -> None:
    facts = copy.deepcopy(MACHINES["h100"]["facts"])
    if key == "utilization":
        facts["driver"]["cards"][0]["utilization"]["gpu"] = value
    else:
        facts["devices"][1]["memory_free"] = int(value * facts["devices"][1]["memory_total"])
    assert [finding.name for finding in diagnose.findings(facts)] == ([name] if name else [])


def test_a_link_counts_under_load_alone() -> None:
    """Without the sample under load an idle link of the first generation says nothing."""
    facts = copy.deepcopy(MACHINES["riser_x1"]["facts"])
    del facts["driver"]["cards"][0]["under_load"]
    assert diagnose.findings(facts) == []


@pytest.mark.parametrize(("threads", "told"), [(2, False), (3, True)])
@pytest.mark.parametrize("key", ["cores", "quota"])
def test_more_threads_than_cores(threads: int, told: bool, key: str) -> None:
    facts = copy.deepcopy(MACHINES["laptop"]["facts"])
    facts["torch"]["threads"] = threads
    facts["devices"][0][key] = {"cores": 2, "quota": 2.5}[key]
    assert ("threads" in [finding.name for finding in diagnose.findings(facts)]) is told


def test_half_a_core_is_one_thread() -> None:
    facts = copy.deepcopy(MACHINES["laptop"]["facts"])
    facts["devices"][0]["quota"] = 0.5
    finding = next(finding for finding in diagnose.findings(facts) if finding.name == "threads")
    assert finding.mend == "export OMP_NUM_THREADS=1"
    assert "12 threads on 0.5 cores" in finding.line


@pytest.mark.parametrize(
    ("message", "mend"),
    [
        ("CUDA error: no kernel image is available for execution on the device", "package index"),
        ("CUDA error: CUDA-capable device(s) is/are busy or unavailable", "nvidia-smi -c DEFAULT"),
        ("CUDA error: uncorrectable ECC error encountered", "nvidia-smi -r"),
        ("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED", "LD_LIBRARY_PATH"),
        ("CUDA error: an illegal memory access was encountered", "xid"),
        (
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
            "memory (nvidia-smi lists them)",
        ),
        ("loss 2.511 -> 2.511", "update the driver"),
    ],
)
def test_what_to_do_about_a_failed_test(message: str, mend: str) -> None:
    facts = copy.deepcopy(MACHINES["h100"]["facts"])
    facts["devices"][1]["tests"][1] |= {"result": "fail", "message": message}
    (finding,) = diagnose.findings(facts)
    assert finding.line == f"cuda:0 (NVIDIA H100 80GB HBM3) fails matmul fp32: {message}"
    assert mend in finding.mend


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
    assert diagnose.has_code_for(capability, architectures.split()) is runs


def test_ptx_can_be_left_out() -> None:
    assert not diagnose.has_code_for("9.0", ["sm_80", "compute_86"], ptx=False)
    assert diagnose.has_code_for("9.0", ["sm_90", "compute_86"], ptx=False)


@pytest.mark.parametrize(
    ("mask", "left"),
    [
        ("0", [0]),
        ("1,0", [1, 0]),
        ("0,7,1", [0]),  # the list ends at the first that names none
        ("7", []),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        (" 1 ", [1]),
        ("GPU-bb", [1]),
        ("GPU-aa,GPU-bb", [0, 1]),
        ("GPU-", []),  # names two
        ("GPU-cc", []),
    ],
)
def test_cards_that_a_mask_leaves(mask: str, left: list[int]) -> None:
    cards = [{"index": 0, "uuid": "GPU-aa11"}, {"index": 1, "uuid": "GPU-bb22"}]
    assert diagnose.visible(mask, cards) == left
