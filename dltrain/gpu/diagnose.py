"""From facts to findings: what is wrong, and what to type.  Pure functions of the facts and of nothing else.

The facts are those of `facts.collect`; each device also holds its `tests`, and each card, where it was asked again
after them, what it said `under_load`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

Facts = dict[str, Any]

REINSTALL = "pip install --force-reinstall torch torchvision"
SELECTOR = "https://pytorch.org/get-started/locally"
DRIVERS = "https://www.nvidia.com/drivers"
RESTART = "restart the machine; else reinstall the driver"
OLDEST_CUDA = 12  # that the builds of torch 2.10 and newer are for
SLOWED = {"hw_slowdown", "sw_thermal", "hw_thermal", "hw_power_brake"}  # not the power cap, which a full load reaches
SLOW_VARIABLES = {  # what each says that makes every kernel, or some, slower
    "CUDA_LAUNCH_BLOCKING": "1",
    "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    "NVIDIA_TF32_OVERRIDE": "0",
    "AMD_SERIALIZE_KERNEL": "3",
    "HIP_LAUNCH_BLOCKING": "1",
}
# what a failed test's message says -> what to do
MENDS = {
    r"no kernel image|invalid device": f"{REINSTALL} with the package index that {SELECTOR} gives for this card",
    r"busy or unavailable": "end the process that holds the card, or `sudo nvidia-smi -c DEFAULT`",
    r"(?i)\becc\b": "`sudo nvidia-smi -r` resets the card; where it comes again, replace it",
    r"(?i)cudnn": f"unset LD_LIBRARY_PATH, which may bring another cuDNN; else {REINSTALL}",
    r"(?i)lost|launch failure|illegal": "`sudo dmesg | grep -i xid` says what the card met; restart the machine",
}
ORDER = ("fail", "no_gpu", "warn", "note")


@dataclass(frozen=True)
class Finding:
    """fail: a device that torch would use cannot train.  no_gpu: torch offers none.  warn: slower or riskier than it
    need be.  note: good to know.

    name: of the diagnosis, stable for programs.  line: what is so.  mend: what to type or do, or empty.
    """

    name: str
    level: Literal["fail", "no_gpu", "warn", "note"]
    line: str
    mend: str = ""


@dataclass(frozen=True)
class Verdict:
    """ok: every device passes.  warn: so they do, with warnings.  no_gpu: torch offers none, the CPU passes.
    broken: training here would fail.
    """

    level: Literal["ok", "warn", "no_gpu", "broken"]
    line: str
    mend: str


def findings(facts: Facts) -> list[Finding]:
    """All that there is to say about these facts, the worst first."""
    if facts["torch"] is None:
        return [Finding("torch", "fail", f"torch cannot be imported: {_error(facts, 'torch')}", REINSTALL)]
    found = [each for diagnosis in DIAGNOSES for each in diagnosis(facts)]
    return sorted(found, key=lambda each: ORDER.index(each.level))


def verdict(facts: Facts, found: list[Finding]) -> Verdict:
    """The worst of what was found, in one line, or that all is well."""
    warnings = [each for each in found if each.level == "warn"]
    worst = found[0] if found and found[0].level in ("fail", "no_gpu") else None
    if worst:
        level: Literal["no_gpu", "broken"] = "broken" if worst.level == "fail" else "no_gpu"
        more = f"; {len(warnings)} warning{'s' * (len(warnings) > 1)} besides" if warnings else ""
        return Verdict(level, worst.line + more, worst.mend)
    well = f"{', '.join(name(device) for device in facts['devices'][1:])} can train"
    if not warnings:
        return Verdict("ok", well, "")
    more = f" (and {len(warnings) - 1} more)" if len(warnings) > 1 else ""
    return Verdict("warn", f"{well}, but {warnings[0].line}{more}", warnings[0].mend)


def name(device: Facts) -> str:
    return f"{device['device']} ({device['name']})"


def card_of(device: Facts, facts: Facts) -> Facts | None:
    """What the driver says of the card that torch calls by this device's name."""
    return next((card for card in _cards(facts) if device.get("pci") and card.get("pci") == device["pci"]), None)


def has_code_for(capability: str, architectures: list[str], ptx: bool = True) -> bool:
    """Whether a wheel with these architectures runs on a card of this compute capability.

    sm_XY runs on X.Z from Z = Y; compute_XY (PTX, left out without `ptx`) on everything from X.Y; suffix f: on that
    major version only; suffix a: on X.Y only (NVIDIA, CUDA C++ Programming Guide, "Compute Capabilities").
    """
    card = tuple(map(int, capability.split(".")))
    for match in filter(None, (re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", each) for each in architectures)):
        if match[1] == "compute" and not ptx:
            continue
        code = (int(match[2]), int(match[3]))
        everything_newer = match[1] == "compute" and not match[4]
        if card == code or (card > code and match[4] != "a" and (card[0] == code[0] or everything_newer)):
            return True
    return False


def visible(mask: str, cards: list[Facts]) -> list[int]:
    """The indices of the cards that a value of CUDA_VISIBLE_DEVICES leaves, in its order.

    A list of indices or beginnings of UUIDs, which ends at the first that names no card (NVIDIA, CUDA C++ Programming
    Guide, "CUDA Environment Variables").  The indices may be in another order than the driver's; how many are left is
    the same.
    """
    left: list[int] = []
    for part in map(str.strip, mask.split(",")):
        uuids = [index for index, card in enumerate(cards) if part and str(card.get("uuid")).startswith(part)]
        index = int(part) if part.isdecimal() else uuids[0] if len(uuids) == 1 else len(cards)
        if index >= len(cards):
            return left
        left.append(index)
    return left


def _no_gpu(facts: Facts) -> Iterator[Finding]:
    """Why torch offers no GPU: the first reason that holds."""
    if len(facts["devices"]) == 1:
        yield next(filter(None, (reason(facts) for reason in REASONS)))


def _blocked_files(facts: Facts) -> Finding | None:
    ours = {"cuda": "nvidia", "rocm": "kfd"}.get(facts["torch"]["build"], "-")
    blocked = [file for file, allowed in (facts["device_files"] or {}).items() if ours in file and not allowed]
    if not blocked:
        return None
    mend = f"`ls -l {blocked[0]}` names the group that may: `sudo usermod -aG GROUP $USER`, then log in again"
    return Finding("permission", "no_gpu", f"this user may not open {', '.join(blocked)}", mend)


def _version_mismatch(facts: Facts) -> Finding | None:
    error = _error(facts, "driver") or ""
    if "mismatch" not in error:
        return None
    module = f" (the kernel runs {facts['kernel_module']})" if facts["kernel_module"] else ""
    line = f"the NVIDIA driver was updated, but the old one still runs{module}: {error}"
    return Finding("driver_mismatch", "no_gpu", line, "restart the machine")


def _silent_driver(facts: Facts) -> Finding | None:
    error = _error(facts, "driver")
    if not error:
        return None
    mend = RESTART
    if "Not Loaded" in error:
        mend = "`sudo modprobe nvidia`; where that is refused, Secure Boot may want the module signed"
    elif facts["system"] and facts["system"]["container"]:
        mend = "start the container again: one that lost its card's device files does not get them back"
    return Finding("driver", "no_gpu", f"the NVIDIA driver does not answer: {error}", mend)


def _container_without_gpus(facts: Facts) -> Finding | None:
    container = facts["system"] and facts["system"]["container"]
    there = facts["kernel_module"] or _controllers(facts, "nvidia")
    if not container or not there or _cards(facts):
        return None
    hidden = facts["environment"].get("NVIDIA_VISIBLE_DEVICES")
    given = f", NVIDIA_VISIBLE_DEVICES={hidden}" if hidden in ("void", "none", "") else ""
    mend = "start it with `docker run --gpus all IMAGE`, which needs the nvidia-container-toolkit on the host"
    if container == "kubernetes":
        mend = "ask for nvidia.com/gpu in the pod's resources"
    if container == "apptainer":
        mend = "start it with `apptainer exec --nv IMAGE`"
    line = f"the machine has an NVIDIA card, but this container ({container}) was started without it{given}"
    return Finding("container", "no_gpu", line, mend)


def _no_driver(facts: Facts) -> Finding | None:
    if facts["driver"]:
        return None
    if facts["system"] and facts["system"]["wsl"]:
        line = "no NVIDIA driver in this WSL: it takes Windows' own"
        return Finding("wsl", "no_gpu", line, f"install the driver in Windows from {DRIVERS}, then `wsl --update`")
    for controller in _controllers(facts, "nvidia"):
        used_by = controller["driver"] or "none"
        line = f"the NVIDIA card at {controller['address']} has no NVIDIA driver (the kernel's driver: {used_by})"
        mend = f"install the driver, by your distribution or from {DRIVERS}, and restart"
        if used_by == "vfio-pci":
            mend = "it is set aside for a virtual machine: unbind it from vfio-pci"
        return Finding("no_driver", "no_gpu", line, mend)
    return None


def _other_maker(facts: Facts) -> Finding | None:
    """An AMD card, whatever keeps torch from it."""
    built = facts["torch"]
    if _cards(facts) or not (built["build"] == "rocm" or _controllers(facts, "amd")):
        return None
    masks = [f"{key}={facts['environment'][key]}" for key in AMD_MASKS if key in facts["environment"]]
    if built["build"] != "rocm":
        line = f"{_wheel(facts)} cannot use the AMD GPU at {_controllers(facts, 'amd')[0]['address']}"
        mend = f"where ROCm supports it: {REINSTALL} with the package index that {SELECTOR} gives for ROCm"
        return Finding("wheel", "no_gpu", line, mend)
    if _controllers(facts, "amd") and "/dev/kfd" not in (facts["device_files"] or {}):
        line = f"the AMD GPU at {_controllers(facts, 'amd')[0]['address']} has no driver that computes: no /dev/kfd"
        mend = "install amdgpu with ROCm; a container wants `docker run --device /dev/kfd --device /dev/dri IMAGE`"
        return Finding("no_driver", "no_gpu", line, mend)
    if masks:
        line = f"{_wheel(facts)} sees no GPU, with {', '.join(masks)}"
        return Finding("masked", "no_gpu", line, f"unset {' '.join(mask.partition('=')[0] for mask in masks)}")
    return None


def _nothing_here(facts: Facts) -> Finding | None:
    if _cards(facts):
        return None
    line = f"no GPU here: {_wheel(facts)} sees none, "
    line += "nor does the driver" if facts["driver"] else "there is no NVIDIA driver"
    return Finding("none", "no_gpu", line, f"--allow-cpu if the CPU is meant; with an NVIDIA card, {DRIVERS}")


def _cpu_wheel(facts: Facts) -> Finding | None:
    if facts["torch"]["build"] == "cuda":
        return None
    return Finding("wheel", "no_gpu", f"{_wheel(facts)} cannot use the {_card_names(facts)}", _older_build(facts))


def _old_driver(facts: Facts) -> Finding | None:
    """Within a major version of CUDA an older driver will do (NVIDIA, CUDA Compatibility)."""
    built, driver = facts["torch"], facts["driver"]
    if _major(driver["cuda"]) >= _major(built["built_for"]):
        return None
    line = f"{_wheel(facts)} is for CUDA {built['built_for']}, driver {driver['version']} for {driver['cuda']} or older"
    either = "update the driver, or " if _major(driver["cuda"]) >= OLDEST_CUDA else ""
    return Finding("old_driver", "no_gpu", line, either + _older_build(facts))


def _masked(facts: Facts) -> Finding | None:
    mask = facts["environment"].get("CUDA_VISIBLE_DEVICES")
    if mask is None or visible(mask, _cards(facts)):
        return None
    line = f"CUDA_VISIBLE_DEVICES={mask} hides the {_card_names(facts)}"
    return Finding("masked", "no_gpu", line, "unset CUDA_VISIBLE_DEVICES")


def _mig_without_instances(facts: Facts) -> Finding | None:
    if not all(card.get("mig") for card in _cards(facts)) or "No CUDA GPUs" not in _cuda_reason(facts):
        return None
    line = f"the {_card_names(facts)} is in MIG mode and has no instance to compute on"
    mend = "`sudo nvidia-smi mig -cgi 0 -C` makes one, `sudo nvidia-smi -mig 0` ends MIG"
    return Finding("mig", "no_gpu", line, mend)


def _prohibited(facts: Facts) -> Finding | None:
    if not all(card.get("compute_mode") == "prohibited" for card in _cards(facts)):
        return None
    line = f"the {_card_names(facts)} is in compute mode prohibited"
    return Finding("compute_mode", "no_gpu", line, "`sudo nvidia-smi -c DEFAULT`")


def _fabric(facts: Facts) -> Finding | None:
    if "system not yet initialized" not in _cuda_reason(facts):
        return None
    line = f"no fabric manager runs for the {_card_names(facts)}: {_cuda_reason(facts)}"
    version, start = facts["driver"]["version"], "sudo systemctl enable --now nvidia-fabricmanager"
    return Finding(
        "fabric", "no_gpu", line, f"install nvidia-fabricmanager of the driver's version, {version}; `{start}`"
    )


def _wrong_libcuda(facts: Facts) -> Finding | None:
    reason = _cuda_reason(facts)
    if not re.search("forward compatibility|unsupported display driver", reason):
        return None
    line = f"libcuda does not belong to driver {facts['driver']['version']}: {reason}"
    mend = "take folders named `compat` from LD_LIBRARY_PATH, or uninstall cuda-compat; else restart the machine"
    return Finding("libcuda", "no_gpu", line, mend)


def _unknown(facts: Facts) -> Finding:
    line = f"{_wheel(facts)} cannot use the {_card_names(facts)}: {_cuda_reason(facts) or 'torch gives no reason'}"
    return Finding("unknown", "no_gpu", line, "restart the machine; else update the driver")


AMD_MASKS = ("HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")
REASONS = (
    _version_mismatch,
    _blocked_files,
    _silent_driver,
    _container_without_gpus,
    _no_driver,
    _other_maker,
    _nothing_here,
    # from here on the driver has a card
    _cpu_wheel,
    _old_driver,
    _masked,
    _mig_without_instances,
    _prohibited,
    _fabric,
    _wrong_libcuda,
    _unknown,
)


def _no_code(facts: Facts) -> Iterator[Finding]:
    built = facts["torch"]
    mend = f"{REINSTALL} with the package index that {SELECTOR} gives for another {built['build'].upper()} version"
    for device in facts["devices"]:
        capability, architecture = (
            device.get("compute_capability"),
            (device.get("architecture") or "").partition(":")[0],
        )
        if built["build"] == "cuda" and capability:
            what = f"{name(device)}, compute capability {capability}"
            if not has_code_for(capability, built["architectures"]):
                line = f"torch {built['version']} has no code for {what} (it has {' '.join(built['architectures'])})"
                yield Finding("architecture", "fail", line, mend)
            elif not has_code_for(capability, built["architectures"], ptx=False):
                line = f"torch {built['version']} has only PTX for {what}: the first run compiles for minutes"
                yield Finding("ptx", "note", line, mend)
        if built["build"] == "rocm" and architecture and architecture not in built["architectures"]:
            line = f"torch {built['version']} has no code for {name(device)}, {architecture}"
            nearest = "HSA_OVERRIDE_GFX_VERSION=10.3.0 (RDNA 2) or 11.0.0 (RDNA 3) makes it pass for a relative"
            yield Finding("architecture", "fail", line, nearest)


def _silent_devices(facts: Facts) -> Iterator[Finding]:
    for device in facts["devices"][1:]:
        error = _error(facts, device["device"])
        if error:
            yield Finding("vanished", "fail", f"{device['device']} does not answer: {error}", RESTART)


def _failed_tests(facts: Facts) -> Iterator[Finding]:
    """One finding for each device that fails: what fails after the first is mostly its echo."""
    for device in facts["devices"]:
        failed = [test for test in device["tests"] if test["result"] == "fail"]
        if failed:
            message, more = failed[0]["message"], f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
            mend = REINSTALL if device["kind"] == "cpu" else "restart the machine; else update the driver"
            mend = next((text for pattern, text in MENDS.items() if re.search(pattern, message)), mend)
            if re.search("out of memory|ALLOC_FAILED", message):
                mend = f"end the processes that use this device's memory{_users(card_of(device, facts))}"
            yield Finding("test", "fail", f"{name(device)} fails {failed[0]['name']}: {message}{more}", mend)
        for test in device["tests"]:
            if test["result"] == "warn":
                yield Finding("test", "warn", f"{name(device)}, {test['name']}: {test['message']}")


def _full_or_busy(facts: Facts) -> Iterator[Finding]:
    """Less than a tenth of the memory free, or a fifth of the time in use before our tests began."""
    for device in facts["devices"][1:]:
        card, free, total = card_of(device, facts) or {}, device.get("memory_free"), device.get("memory_total")
        users, busy = _users(card), (card.get("utilization") or {}).get("gpu", 0)
        if free is not None and total and free < total / 10:
            line = f"{name(device)} is full: {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
            yield Finding("full", "warn", line, f"end the processes that use it{users}, or choose another device")
        if busy >= 20:
            line = f"{name(device)} is busy: in use {busy} % of the time by others, so the rates here are not its own"
            yield Finding("busy", "warn", line, f"wait, or end the processes that use it{users}")


def _slowed(facts: Facts) -> Iterator[Finding]:
    for device, card in _used_cards(facts):
        loaded = card.get("under_load") or {}
        reasons = sorted(SLOWED & {*(card.get("throttle") or ()), *(loaded.get("throttle") or ())})
        if reasons:
            temperature = loaded.get("temperature") or card.get("temperature")
            at = f" at {temperature} °C" if temperature is not None else ""
            mend = "look at its fans and at the air around it"
            if not any("thermal" in reason for reason in reasons):
                mend = "look at its power cables and at the power supply"
            yield Finding("throttled", "warn", f"{name(device)} slows itself down{at}: {', '.join(reasons)}", mend)


def _narrow_link(facts: Facts) -> Iterator[Finding]:
    """An idle card slows its link, and some narrow it, so only the one under load counts."""
    for device, card in _used_cards(facts):
        link = (card.get("under_load") or {}).get("pcie")
        if link and (link["width"], link["generation"]) < (link["width_max"], link["generation_max"]):
            now, most = (f"generation {link[f'generation{end}']} x{link[f'width{end}']}" for end in ("", "_max"))
            mend = "seat the card again, without a riser cable; the slot's setup is in the BIOS"
            yield Finding("link", "warn", f"{name(device)} is linked by PCIe {now}, of {most}", mend)


def _memory_errors(facts: Facts) -> Iterator[Finding]:
    for device, card in _used_cards(facts):
        ecc = card.get("under_load", {}).get("ecc") or card.get("ecc") or {}
        rows = card.get("remapped_rows") or {}
        if rows.get("failure"):
            line = f"{name(device)} has no spare memory rows left for those that failed"
            yield Finding("row_remap", "warn", line, "have the card replaced (NVIDIA's criterion for it)")
        elif rows.get("pending"):
            line = f"{name(device)} will replace failed memory rows at its next reset"
            yield Finding("row_remap", "warn", line, "`sudo nvidia-smi -r`, or restart the machine")
        if ecc.get("uncorrected"):
            line = f"{name(device)} met {ecc['uncorrected']} memory errors that ECC could not correct"
            yield Finding("ecc", "warn", line, "`sudo nvidia-smi -r` resets the card; where it comes again, replace it")


def _hidden_cards(facts: Facts) -> Iterator[Finding]:
    cards, gpus = _cards(facts), [device for device in facts["devices"] if device["kind"] == "cuda"]
    mask = facts["environment"].get("CUDA_VISIBLE_DEVICES")
    if gpus and mask is not None and len(visible(mask, cards)) < len(cards):
        line = f"CUDA_VISIBLE_DEVICES={mask} leaves {len(gpus)} of {len(cards)} cards"
        yield Finding("hidden", "note", line, "unset CUDA_VISIBLE_DEVICES to use them all")


def _torchvision(facts: Facts) -> Iterator[Finding]:
    """torchvision compares the major versions of CUDA, and so does this."""
    built, vision = facts["torch"], facts["torchvision"]
    mend, line = f"{REINSTALL} with the package index from {SELECTOR}", None
    if vision is None:
        yield Finding("torchvision", "warn", "torchvision is not installed", "pip install torchvision")
    elif vision["fits"] is False:
        line = f"torchvision {vision['version']} is made for {vision['requires']}, not for torch {built['version']}"
    elif vision["operators"] is None:
        line = f"torchvision {vision['version']} does not load beside torch {built['version']}"
    elif built["build"] != "rocm" and _major(vision["operators"]["cuda"]) != _major(built["built_for"]):
        ours, theirs = (
            f"for CUDA {version}" if version else "without CUDA"
            for version in (built["built_for"], vision["operators"]["cuda"])
        )
        line = f"torch is built {ours}, torchvision {vision['version']} {theirs}"
    if line:
        yield Finding("torchvision", "warn", f"{line}: torchvision may fail", mend)


def _too_many_threads(facts: Facts) -> Iterator[Finding]:
    cpu, threads = facts["devices"][0], facts["torch"]["threads"]
    cores = min(cpu.get("cores") or threads, cpu.get("quota") or threads)
    usable = max(1, int(cores))
    if threads > usable:
        line = f"torch computes in {threads} threads on {cores:g} cores that this process may use, which slows the CPU"
        yield Finding("threads", "warn", line, f"export OMP_NUM_THREADS={usable}")


def _slow_variables(facts: Facts) -> Iterator[Finding]:
    for key, value in SLOW_VARIABLES.items():
        if facts["environment"].get(key) == value:
            yield Finding("variable", "warn", f"{key}={value} makes training slower", f"unset {key}")


DIAGNOSES = (
    _silent_devices,
    _no_code,
    _failed_tests,
    _no_gpu,
    _full_or_busy,
    _slowed,
    _narrow_link,
    _memory_errors,
    _torchvision,
    _too_many_threads,
    _slow_variables,
    _hidden_cards,
)


def _cards(facts: Facts) -> list[Facts]:
    return facts["driver"]["cards"] if facts["driver"] else []


def _used_cards(facts: Facts) -> Iterator[tuple[Facts, Facts]]:
    """The devices that torch offers, each with what the driver says of it."""
    for device in facts["devices"]:
        card = card_of(device, facts)
        if card:
            yield device, card


def _controllers(facts: Facts, vendor: str) -> list[Facts]:
    return [each for each in facts["pci"] or [] if each["vendor"] == vendor]


def _card_names(facts: Facts) -> str:
    """ "NVIDIA L4", or "NVIDIA L4 and 3 others"."""
    cards = _cards(facts)
    first = cards[0].get("name") or "NVIDIA card, which does not answer"
    return first + (f" and {len(cards) - 1} other{'s' * (len(cards) > 2)}" if len(cards) > 1 else "")


def _users(card: Facts | None) -> str:
    """ ": 4321 python (70.1 GiB), …", those with most memory first; where the driver tells none, where to look."""
    users = sorted((card or {}).get("processes") or [], key=lambda each: -(each["memory"] or 0))
    if not users:
        return " (nvidia-smi lists them)"
    texts = [
        f"{each['pid']} {each['name'] or ''}".strip()
        + (f" ({each['memory'] / 2**30:.1f} GiB)" if each["memory"] else "")
        for each in users[:3]
    ]
    return f": {', '.join(texts)}" + (", …" if len(users) > 3 else "")


def _wheel(facts: Facts) -> str:
    return f"torch {facts['torch']['version']} ({facts['torch']['build'].upper()} build)"


def _older_build(facts: Facts) -> str:
    cuda = facts["driver"]["cuda"]
    if _major(cuda) < OLDEST_CUDA:
        return f"update the driver ({DRIVERS}), then {REINSTALL} with the package index from {SELECTOR}"
    return f"{REINSTALL} with the package index that {SELECTOR} gives for CUDA {cuda} or older"


def _cuda_reason(facts: Facts) -> str:
    """ "Error 802: system not yet initialized", without torch's guess before it."""
    reason = _error(facts, "cuda") or ""
    found = re.search(r"Error \d+: .*", reason)
    return found[0] if found else reason


def _major(version: str | None) -> int:
    return int((version or "0").partition(".")[0])


def _error(facts: Facts, probe: str) -> str | None:
    return next((error["error"] for error in facts["errors"] if error["probe"] == probe), None)
