"""`dltrain check-gpu`: can this machine train, how fast, and if not, why and what to type.

The facts are collected and the devices tried in a process of their own, so that what breaks there does not break the
report.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import Any

from dltrain.errors import DeviceError
from dltrain.gpu import diagnose, facts, nvml, selftest, watch
from dltrain.gpu.worker import Worker

Facts = dict[str, Any]
PATIENCE = 60.0  # seconds for the facts: a first import of torch from a slow disk takes 20


def check(
    worker: Worker, quick: bool = False, stress: float = 0.0, tell: Callable[[str], None] = lambda text: None
) -> Facts:
    """The whole report, JSON-able; docs/check-gpu.schema.json names each part.

    quick: the tests that decide whether a device can train, and no estimates
    stress: seconds of load on each GPU, or on the CPU where there is none, while its state is watched
    tell: is called with what is being done
    """
    start = perf_counter()
    tell("collecting facts")
    found = _collect(worker)
    devices = {device["device"]: device | {"tests": []} for device in found["devices"]}
    found["devices"] = list(devices.values())
    answering = [name for name, device in devices.items() if found["torch"] and device["name"] != facts.SILENT]
    worth = answering[1:] or answering  # the GPUs, or the CPU where there is none
    samples: dict[int, list[Facts]] = {}
    for row in selftest.run(worker, answering, quick):
        devices[row["device"]]["tests"].append(row)
        tell(f"{row['device']}: {row['name']}, {row['result']}")
        card = diagnose.card_of(devices[row["device"]], found)
        if card and row["result"] == "pass" and row["name"].startswith(LOADS):
            samples.setdefault(card["index"], []).extend(_under_load(worker, card["index"], found["errors"]))
    for index, seen in samples.items():
        if seen:
            found["driver"]["cards"][index]["under_load"] = nvml.merged(seen)
    for name in worth if stress else ():
        devices[name]["stress"] = list(_stress(worker, name, stress, tell))
        devices[name]["tests"].append(watch.judge(devices[name]["stress"]))
    found["expect"] = []
    if not quick and found["torch"]:
        tell("estimating what the shipped configs reach")
        found["expect"] = _expect(worker, worth[0], found["errors"])
    found["seconds"] = perf_counter() - start
    return judged(found)


LOADS = ("matmul", "conv")  # the tests after which a card is asked what it does under load


def judged(found: Facts) -> Facts:
    """The report with its findings and its verdict; a number that is not finite becomes None, which JSON can say."""
    findings = diagnose.findings(found)
    verdict = diagnose.verdict(found, findings)
    listed = [dataclasses.asdict(finding) for finding in findings]
    return _finite({**found, "findings": listed, "verdict": dataclasses.asdict(verdict)})  # type: ignore[no-any-return]


def exit_code(report: Facts, allow_cpu: bool, strict: bool) -> int:
    """0 where training can go ahead: on a GPU or, with `allow_cpu`, on the CPU; else 5.  `strict`: warnings count."""
    refused = {"fail", *(() if allow_cpu else ("no_gpu",)), *(("warn",) if strict else ())}
    return DeviceError.exit_code if refused & {finding["level"] for finding in report["findings"]} else 0


def _collect(worker: Worker) -> Facts:
    try:
        found = worker.ask(PATIENCE, facts.collect)
    except DeviceError as error:  # torch or a driver took the process with it
        found = facts.collect(torch_died=str(error))
    return {**found, "environment": facts.environment()}  # of ours: the worker sets variables of its own


def _under_load(worker: Worker, index: int, errors: list[dict[str, str]]) -> list[Facts]:
    """What one card says now, or nothing."""
    try:
        return [worker.ask(PATIENCE, facts.under_load, index)]
    except DeviceError as error:
        errors.append({"probe": f"card {index} under load", "error": str(error)})
        return []


def _stress(worker: Worker, device: str, seconds: float, tell: Callable[[str], None]) -> Iterator[Facts]:
    for sample in watch.stress(worker, device, seconds):
        heat = f", {sample['temperature']:.0f} °C" if sample.get("temperature") is not None else ""
        tell(f"{device}: stress, {sample['second']:.0f} of {seconds:.0f} s{heat}")
        yield sample


def _expect(worker: Worker, device: str, errors: list[dict[str, str]]) -> list[Facts]:
    try:
        return [{"device": device, **row} for row in worker.ask(PATIENCE, estimates, device)]
    except DeviceError as error:
        errors.append({"probe": "expect", "error": str(error)})
        return []


def estimates(device: str) -> list[Facts]:
    """In the worker, since it imports torch."""
    from dltrain.gpu import expect

    return expect.estimates(device)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
