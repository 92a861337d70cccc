"""The report of `dltrain check-gpu`, for a terminal, for an issue, and with what names its owner taken out.

A report is plain data: the facts with each device's `tests`, `expect`, `findings` and `verdict`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.live import Live
from rich.table import Table
from rich.text import Text

from dltrain.gpu.diagnose import card_of

if TYPE_CHECKING:
    from rich.console import Console

Facts = dict[str, Any]
Lines = Iterator[tuple[str, str]]  # (label, text)

STYLES = {
    **{"pass": "green", "warn": "yellow", "fail": "bold red", "skip": "dim"},
    **{"ok": "bold green", "no_gpu": "bold yellow", "broken": "bold red", "note": "cyan"},
}
UUID = re.compile(r"\b(GPU|MIG)-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\b")


def hide(value: Any) -> Any:
    """The same data without the cards' UUIDs and without the path of the user's home."""
    if isinstance(value, dict):
        return {key: hide(each) for key, each in value.items()}
    if isinstance(value, list):
        return [hide(each) for each in value]
    if not isinstance(value, str):
        return value
    home = str(Path.home())
    return UUID.sub(r"\1-hidden", value.replace(home, "~") if len(home) > 1 else value)


def render(report: Facts, console: Console) -> None:
    """Prints it, readable down to 40 columns."""
    console.print(_grid(machine(report)))
    for device in report["devices"]:
        console.print("", Text(f"{device['device']}: {device['name']}", style="bold"), sep="\n")
        console.print(_grid(details(device, card_of(device, report))), _tests(device["tests"], console.width))
        for test in device["tests"] if console.width < 80 else ():
            if test["result"] in ("fail", "warn"):
                console.print(Text(f"{test['name']}: {test['message']}", style=STYLES[test["result"]]))
    if report["expect"]:
        console.print("", Text(f"To expect on {report['expect'][0]['device']} (estimates)", style="bold"), sep="\n")
        console.print(_grid(expected(report)))
    if others(report):
        console.print()
    for finding in others(report):
        style = STYLES[finding["level"]]
        console.print(Text(f"{finding['level'].replace('_', ' ')}: {finding['line']}", style=style))
        if finding["mend"]:
            console.print(Text(f"  try: {finding['mend']}"))
    verdict = report["verdict"]
    console.print("", Text(f"Verdict: {verdict['line']}", style=STYLES[verdict["level"]]), sep="\n")
    if verdict["mend"]:
        console.print(Text(f"Try: {verdict['mend']}"))


def follow(moments: Iterable[list[Facts]], console: Console) -> None:
    """Shows the samples of `watch.watch` as they come: in place on a terminal, else one table after the other."""
    if not console.is_terminal:
        for samples in moments:
            console.print(now(samples))
        return
    with Live(console=console, auto_refresh=False) as live:
        for samples in moments:
            live.update(now(samples), refresh=True)


def now(samples: list[Facts]) -> Table:
    """One moment of each device: how busy, how full, how hot, what it draws, how fast it runs and what slows it."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("device", "busy", "memory", "heat", "power", "clock", "slowed by"):
        table.add_column(heading, justify="left" if heading in ("device", "slowed by") else "right", overflow="fold")
    for sample in samples:
        busy, memory, power = sample.get("utilization"), sample.get("memory"), sample.get("power")
        heat, clocks = sample.get("temperature"), sample.get("clocks")
        cells = (
            sample["device"],
            f"{busy.get('gpu', busy.get('cpu')):.0f} %" if busy else "",
            f"{memory['used'] / 2**30:.1f} of {_bytes(memory['total'])}" if memory else "",
            f"{heat:.0f} °C" if heat is not None else "",
            f"{power['draw']:.0f} W" if power else "",
            f"{clocks['sm']:.0f} MHz" if clocks else "",
            sample.get("error") or " ".join(sample.get("throttle") or ()),
        )
        table.add_row(*map(Text, cells))
    return table


def markdown(report: Facts) -> str:
    """It as GitHub shows it in an issue: the verdict first, what passes folded away."""
    verdict = report["verdict"]
    lines = [f"**{_escaped(verdict['line'])}**"]
    lines += ["", f"Try: {_escaped(verdict['mend'])}"] if verdict["mend"] else []
    for finding in others(report):
        mend = f" — {_escaped(finding['mend'])}" if finding["mend"] else ""
        lines += ["", f"- {finding['level'].replace('_', ' ')}: {_escaped(finding['line'])}{mend}"]
    lines += ["", "<details><summary>dltrain check-gpu</summary>", "", *_rows(("", ""), machine(report))]
    for device in report["devices"]:
        lines += ["", f"**{_escaped(device['device'])}: {_escaped(device['name'])}**", ""]
        lines += _rows(("", ""), details(device, card_of(device, report)))
        tests = [
            (each["name"], each["result"], f"{each['ms']:.0f} ms", rate(each), each["message"])
            for each in device["tests"]
        ]
        lines += ["", *_rows(("test", "result", "time", "rate", "message"), tests)] if tests else []
    if report["expect"]:
        lines += ["", *_rows(("config", "to expect"), expected(report))]
    return "\n".join([*lines, "", "</details>"])


def others(report: Facts) -> list[Facts]:
    """The findings that the verdict does not repeat: it is made of the first, unless all is well."""
    findings: list[Facts] = report["findings"]
    return findings if report["verdict"]["level"] == "ok" else findings[1:]


def machine(report: Facts) -> Lines:
    """What is no device's own."""
    system, built, vision, driver = (report[key] for key in ("system", "torch", "torchvision", "driver"))
    yield "dltrain", report["dltrain"]
    if system:
        container = f"in a container ({system['container']})" if system["container"] else None
        yield (
            "system",
            _joined(system["os"], system["kernel"], system["machine"], container, "WSL" if system["wsl"] else None),
        )
    if report["python"]:
        yield (
            "python",
            _joined(report["python"]["version"], report["python"]["environment"], report["python"]["prefix"]),
        )
    if built:
        built_for = f"{built['build'].upper()} {built['built_for'] or ''}".strip()
        parts = [
            f"{label} {built[key]}"
            for key, label in (("cudnn", "cuDNN"), ("nccl", "NCCL"), ("triton", "Triton"))
            if built[key]
        ]
        codes = f"for {' '.join(built['architectures'])}" if built["architectures"] else None
        yield (
            "torch",
            _joined(f"{built['version']}, built with {built_for}", codes, *parts, f"threads {built['threads']}"),
        )
    else:
        yield "torch", "none that can be imported"
    if vision:
        operators = vision["operators"]
        cuda = operators and f"built with {'CUDA ' + operators['cuda'] if operators['cuda'] else 'no CUDA'}"
        yield (
            "torchvision",
            _joined(vision["version"], cuda or "does not load", vision["requires"] and f"wants {vision['requires']}"),
        )
    else:
        yield "torchvision", "none"
    yield "driver", f"{driver['version']}, CUDA {driver['cuda']} or older" if driver else "none of NVIDIA's"
    for card in driver["cards"] if driver else ():
        if not any(card_of(device, report) is card for device in report["devices"]):
            memory = (
                card.get("memory") and f"{_bytes(card['memory']['free'])} free of {_bytes(card['memory']['total'])}"
            )
            yield "card", _joined(card.get("name") or f"card {card['index']} does not answer", card.get("pci"), memory)
    for controller in report["pci"] or () if not driver else ():
        yield "pci", f"{controller['vendor']} {controller['address']}, kernel driver {controller['driver'] or 'none'}"
    for name in ("shm", "disk"):
        if report[name]:
            yield name, f"{_bytes(report[name]['free'])} free of {_bytes(report[name]['total'])}"
    for name, value in report["environment"].items():
        yield "variable", f"{name}={value}"
    for error in report["errors"]:
        yield "error", f"{error['probe']}: {error['error']}"


def details(device: Facts, card: Facts | None) -> Lines:
    """What is known of one device; `card`: what the driver says of it."""
    if device["kind"] == "cpu":
        quota = f"quota {device['quota']:g}" if device.get("quota") else None
        if device.get("cores"):
            yield "cores", _joined(f"{device['cores']} of {device['cores_of_machine']}", quota)
        yield "units", " ".join(device.get("instruction_sets") or ["none known"])
    else:
        capability = device.get("compute_capability")
        processors = device.get("processors") and f"{device['processors']} processors"
        yield (
            "kind",
            _joined(
                capability and f"compute capability {capability}",
                device.get("architecture"),
                processors,
                device.get("pci"),
            ),
        )
    yield "native", " ".join(device.get("native") or ["fp32 alone"])
    if device.get("memory_total"):
        free = f"{_bytes(device['memory_free'])} free of " if device.get("memory_free") is not None else ""
        limit = f"limit {_bytes(device['memory_limit'])}" if device.get("memory_limit") else None
        yield "memory", _joined(f"{free}{_bytes(device['memory_total'])}", limit)
    if card:
        yield from _card(card, card.get("under_load") or {})


def _card(card: Facts, loaded: Facts) -> Lines:
    """Where something changed under load, both: "34 °C, 61 °C under load"."""
    yield "uuid", str(card["uuid"])
    for key, text in CHANGING.items():
        idle, busy = (text(each[key]) if each.get(key) is not None else None for each in (card, loaded))
        if idle or busy:
            yield key, _joined(idle, busy and busy != idle and f"{busy} under load")
    if card["utilization"]:
        yield "in use", f"{card['utilization']['gpu']} % of the time, its memory {card['utilization']['memory']} %"
    for process in card["processes"] or ():
        memory = process["memory"] and _bytes(process["memory"])
        yield "process", _joined(f"{process['pid']} {process['name'] or ''}".strip(), memory)
    rows = card["remapped_rows"]
    if rows and any(rows.values()):
        yield "rows", _joined(*(f"{key} {value}" for key, value in rows.items()))
    if card["mig"]:
        yield "MIG", "on"
    if card["compute_mode"] not in (None, "default"):
        yield "mode", card["compute_mode"]


CHANGING: dict[str, Callable[[Any], str]] = {
    "temperature": lambda degrees: f"{degrees} °C",
    "power": lambda power: f"{power['draw']:.0f} of {power['limit']:.0f} W",
    "clocks": lambda clocks: (
        f"{clocks['sm']} of {clocks['sm_max']} MHz, memory {clocks['memory']} of {clocks['memory_max']}"
    ),
    "throttle": lambda reasons: " ".join(reasons) or "none",
    "pcie": lambda link: (
        f"generation {link['generation']} x{link['width']} of {link['generation_max']} x{link['width_max']}"
    ),
    "ecc": lambda ecc: f"corrected {ecc['corrected']}, not {ecc['uncorrected']}" if ecc["enabled"] else "off",
}


def expected(report: Facts) -> Lines:
    """Of each shipped config "12,300 images/s in bf16", or why there is no estimate."""
    for row in report["expect"]:
        speed = "error" not in row and f"{row['images_per_second']:,.0f} images/s in {row['precision']}"
        yield row["config"], speed or f"no estimate: {row['error']}"


def rate(test: Facts) -> str:
    """ "51.9 TFLOP/s", or nothing."""
    number = test.get("rate")
    return "" if number is None else f"{number:{',.0f' if number >= 100 else '.3g'}} {test['unit']}"


def _tests(tests: list[Facts], width: int) -> Table:
    """A wide terminal has room for the messages."""
    table = Table.grid(padding=(0, 1))
    table.add_column(overflow="fold")
    for column in range(3):
        table.add_column(justify="left" if column == 0 else "right", no_wrap=True)
    table.add_column(overflow="fold")
    for each in tests:
        result, message = Text(each["result"], style=STYLES[each["result"]]), each["message"] if width >= 80 else ""
        table.add_row(Text(each["name"]), result, f"{each['ms']:.0f} ms", rate(each), Text(message))
    return table


def _grid(lines: Lines) -> Table:
    table = Table.grid(padding=(0, 1))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in lines:
        table.add_row(label, Text(text, style="red" if label == "error" else ""))  # Text: a "[…]" in it is no markup
    return table


def _rows(heads: tuple[str, ...], rows: Any) -> list[str]:
    """A Markdown table."""
    cells = [heads, tuple("---" for _ in heads), *(tuple(map(_escaped, row)) for row in rows)]
    return [f"| {' | '.join(row)} |" for row in cells]


def _escaped(text: str) -> str:
    """Characters that Markdown or HTML would take for its own, and line ends."""
    return re.sub(r"([\\|`*_<>\[\]#])", r"\\\1", re.sub(r"\s+", " ", text))


def _joined(*parts: str | bool | None) -> str:
    return ", ".join(part for part in parts if part and isinstance(part, str))


def _bytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
