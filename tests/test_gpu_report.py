"""The report of check-gpu: what it prints, and that it comes whatever breaks."""

from __future__ import annotations

import copy
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
from conftest import Run
from rich.console import Console

from dltrain.errors import DeviceError
from dltrain.gpu import check, facts, report, selftest, watch

HERE = Path(__file__).parent
MACHINES = {file.stem: json.loads(file.read_text())["facts"] for file in sorted((HERE / "machines").glob("*"))}
SCHEMA = jsonschema.Draft202012Validator(json.loads((HERE.parent / "docs/check-gpu.schema.json").read_text()))
EXPECT = [
    {"device": "cuda:0", "config": "mnist_mlp", "precision": "fp32", "images_per_second": 1234567.8, "most": "own"},
    {"device": "cuda:0", "config": "folder_cnn", "error": "its [size] is unknown"},
]


def whole(name: str, **changes: Any) -> dict[str, Any]:
    return check.judged({**copy.deepcopy(MACHINES[name]), "expect": EXPECT, "seconds": 7.25, **changes})


def rendered(found: dict[str, Any], width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    report.render(found, console)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


@pytest.mark.parametrize("width", [120, 80, 40])
@pytest.mark.parametrize("name", MACHINES)
def test_a_terminal_of_any_width_shows_everything(name: str, width: int) -> None:
    found = whole(name)
    text = rendered(found, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert "\x1b" not in text  # no colour where the output is no terminal
    flowing = "".join(text.split())  # a long word is broken at the line's end
    said = [finding[key] for finding in report.others(found) for key in ("line", "mend")]
    said += [found["verdict"]["line"], found["verdict"]["mend"], *(error["error"] for error in found["errors"])]
    said += [f"{name}={value}" for name, value in found["environment"].items()]
    said += ["mnist_mlp", "1,234,568 images/s in fp32", "no estimate: its [size] is unknown"]
    for device in found["devices"]:
        said += [f"{device['device']}: {device['name']}"]
    for sentence in said:
        assert "".join(sentence.split()) in flowing


@pytest.mark.parametrize("width", [120, 40])
def test_a_test_has_its_line(width: int) -> None:
    lines = rendered(whole("full"), width).splitlines()
    assert any(re.search(r"matmul fp32 +pass +131 ms +[\d.]+ TFLOP/s", line) for line in lines)
    assert any(re.search(r"matmul fp32 +fail +3 ms", line) for line in lines)
    flowing = "".join("".join(lines).split())
    assert "Triedtoallocate64.00MiB" in flowing


def test_what_the_driver_says_of_a_card_is_shown_idle_and_under_load() -> None:
    text = rendered(whole("riser_x1"), 160)
    for line in (
        r"uuid +GPU-9d3c2a10-3b47-49c9-9d5a-0e8f0b1a4090",
        r"temperature +36 °C, 54 °C under load",
        r"power +18 of 450 W, 280 of 450 W under load",
        r"throttle +gpu_idle, none under load",
        r"pcie +generation 1 x1 of 4 x16, generation 3 x1 of 4 x16 under load",
        r"ecc +off\s*\n",  # the same under load, so told once
    ):
        assert re.search(line, text), line


def test_cards_that_torch_does_not_offer_are_shown() -> None:
    assert re.search(
        r"card +NVIDIA GeForce RTX 3060, 0000:01:00.0, 11.6 GiB free of 12.0", rendered(whole("cpu_wheel"), 120)
    )
    assert re.search(r"card +card 1 does not answer", rendered(whole("lost_card"), 120))
    assert re.search(r"pci +nvidia 0000:01:00.0, kernel driver nouveau", rendered(whole("nouveau"), 120))
    assert "card " not in rendered(whole("h100"), 120)


def test_the_verdict_is_not_said_twice() -> None:
    found = whole("ecc")
    assert len(found["findings"]) == 3
    assert report.others(found) == found["findings"][1:]
    assert report.others(whole("ptx_only"))[0]["name"] == "ptx"  # all is well: the note is not part of the verdict


@pytest.mark.parametrize("printed", [lambda found: rendered(found, 200), report.markdown])
def test_no_value_is_taken_for_markup(printed: Any) -> None:
    found = whole("h100", environment={"CUDA_VISIBLE_DEVICES": "[/x]|<b>"})
    found["devices"][1]["tests"][1] |= {"result": "fail", "message": "[red]a|b[/nothing] *c*"}
    text = printed(found).replace("\\", "")
    assert "CUDA_VISIBLE_DEVICES=[/x]|<b>" in text
    assert "[red]a|b[/nothing] *c*" in text


@pytest.mark.parametrize("name", MACHINES)
def test_markdown_is_well_formed(name: str) -> None:
    found = whole(name)
    lines = report.markdown(found).splitlines()
    assert lines[0] == f"**{report._escaped(found['verdict']['line'])}**"
    assert (lines.count("</details>"), lines[-1]) == (1, "</details>")
    columns = 0
    for line in lines:
        if not line.startswith("|"):
            columns = 0
            continue
        cells = len(re.findall(r"(?<!\\)\|", line)) - 1
        assert cells == (columns or cells)  # each row of a table has as many cells as its head
        columns = cells
    tests = sum(len(device["tests"]) for device in found["devices"])
    assert sum(line.startswith("| ") and " ms |" in line for line in lines) == tests


def test_markdown_keeps_what_html_and_tables_would_take() -> None:
    assert report._escaped("a|b <c>\n*d* [e](f) `g` h_i") == r"a\|b \<c\> \*d\* \[e\](f) \`g\` h\_i"


def test_what_names_its_owner_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/home/ada"))
    mask = "GPU-5f0c1a7e-2b6d-4c11-9e0a-7d3b1c9f0000,MIG-5f0c1a7e-2b6d-4c11-9e0a-7d3b1c9f0001"
    found = whole("masked", environment={"CUDA_VISIBLE_DEVICES": mask, "LD_LIBRARY_PATH": "/home/ada/lib:/usr/lib"})
    hidden = report.hide(found)
    text = json.dumps(hidden)
    assert "5f0c1a7e" not in text
    assert "/home/ada" not in text
    assert hidden["environment"] == {
        "CUDA_VISIBLE_DEVICES": "GPU-hidden,MIG-hidden",
        "LD_LIBRARY_PATH": "~/lib:/usr/lib",
    }
    assert hidden["driver"]["cards"][0]["uuid"] == "GPU-hidden"
    assert hidden["driver"]["cards"][0]["pci"] == "0000:31:00.0"
    assert "5f0c1a7e" in json.dumps(found)  # the report itself is left as it was


@pytest.mark.parametrize("name", MACHINES)
def test_the_schema_describes_every_machine(name: str) -> None:
    SCHEMA.validate(whole(name))


@pytest.mark.parametrize("change", [{"schema": 3}, {"news": 1}, {"devices": [{"device": "cpu"}]}, {"driver": {}}])
def test_the_schema_notices_a_change(change: dict[str, Any]) -> None:
    assert not SCHEMA.is_valid(whole("h100") | change)


@pytest.mark.parametrize(
    ("levels", "codes"),
    [  # exit codes: without options, with --allow-cpu, with --strict, with both
        ([], (0, 0, 0, 0)),
        (["note"], (0, 0, 0, 0)),
        (["warn"], (0, 0, 5, 5)),
        (["no_gpu"], (5, 0, 5, 0)),
        (["no_gpu", "warn"], (5, 0, 5, 5)),
        (["fail"], (5, 5, 5, 5)),
    ],
)
def test_exit_codes(levels: list[str], codes: tuple[int, ...]) -> None:
    found = {"findings": [{"level": level} for level in levels]}
    options = [(False, False), (True, False), (False, True), (True, True)]
    assert tuple(check.exit_code(found, *option) for option in options) == codes


class Here:
    """A worker in this process, whose answers to some functions are put in their place."""

    def __init__(self, **instead: Any) -> None:
        self.instead = instead

    def ask(self, timeout: float, function: Any, *args: Any) -> Any:
        answer = self.instead.get(function.__name__, function)
        if isinstance(answer, Exception):
            raise answer
        return answer(*args) if callable(answer) else answer


def checked(worker: Here, monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]], **options: Any) -> Any:
    """The report of a check whose tests gave these rows, and the devices that were to be tested."""
    asked: list[str] = []

    def run(worker: Any, devices: list[str], quick: bool = False) -> Any:
        asked.extend(devices)
        return iter(rows)

    monkeypatch.setattr(selftest, "run", run)
    found = check.check(worker, **options)  # type: ignore[arg-type]
    SCHEMA.validate(found)
    return found, asked


def row(device: str, name: str, **changes: Any) -> dict[str, Any]:
    return {"device": device, "name": name, "result": "pass", "ms": 1.0, "message": "", **changes}


def bare(name: str) -> dict[str, Any]:
    """The facts of a machine as they are before the tests."""
    found = copy.deepcopy(MACHINES[name])
    for each in (*found["devices"], *(found["driver"] or {"cards": ()})["cards"]):
        each.pop("tests", None)
        each.pop("under_load", None)
    return found


def test_rows_come_to_their_devices_and_cards_are_asked_under_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that was not loaded is idle, and so is one whose test did not get far: neither is asked."""
    loads = iter([50, 70])
    loaded: list[int] = []

    def under_load(index: int) -> dict[str, Any]:
        loaded.append(index)
        return {"index": index, "temperature": next(loads)}

    worker = Here(collect=lambda: bare("a100_two"), under_load=under_load, estimates=lambda device: [])
    names = [("cpu", "matmul fp32"), ("cuda:1", "context"), ("cuda:1", "matmul fp32"), ("cuda:1", "conv bf16")]
    rows = [*(row(*each) for each in names), row("cuda:0", "matmul fp32", result="fail")]
    found, asked = checked(worker, monkeypatch, rows)
    assert asked == ["cpu", "cuda:0", "cuda:1"]
    assert [[test["name"] for test in device["tests"]] for device in found["devices"]] == [
        ["matmul fp32"],
        ["matmul fp32"],
        ["context", "matmul fp32", "conv bf16"],
    ]
    assert loaded == [1, 1]
    assert found["driver"]["cards"][1]["under_load"]["temperature"] == 70
    assert "under_load" not in found["driver"]["cards"][0]


def test_estimates_are_of_the_first_gpu_and_not_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    estimate = {"config": "mnist_mlp", "precision": "fp32", "images_per_second": float("inf"), "most": "own"}
    for machine, quick, devices in (("a100_two", False, ["cuda:0"]), ("laptop", False, ["cpu"]), ("laptop", True, [])):
        worker = Here(collect=lambda machine=machine: bare(machine), estimates=lambda device: [estimate])
        found, _ = checked(worker, monkeypatch, [], quick=quick)
        assert [line["device"] for line in found["expect"]] == devices
        assert all(line["images_per_second"] is None for line in found["expect"])  # JSON has no infinity


@pytest.mark.parametrize(("machine", "loaded"), [("a100_two", ["cuda:0", "cuda:1"]), ("laptop", ["cpu"])])
def test_stress_is_one_more_test_of_each_gpu(monkeypatch: pytest.MonkeyPatch, machine: str, loaded: list[str]) -> None:
    def samples(worker: Any, device: str, seconds: float) -> Any:
        for second in (1.0, seconds):
            yield {"device": device, "second": second, "rate": 2e12, "wrong": 0, "temperature": 60}

    said: list[str] = []
    monkeypatch.setattr(watch, "stress", samples)
    worker = Here(collect=lambda: bare(machine), estimates=lambda device: [])
    found, _ = checked(worker, monkeypatch, [], stress=4.0, tell=said.append)
    tested = {device["device"]: device for device in found["devices"] if device["tests"]}
    assert list(tested) == loaded
    for name, device in tested.items():
        assert [sample["second"] for sample in device["stress"]] == [1.0, 4.0]
        assert (device["tests"][0]["device"], device["tests"][0]["name"]) == (name, "stress")
        assert f"{name}: stress, 4 of 4 s, 60 °C" in said


def test_watching_shows_each_device_as_it_is() -> None:
    card = MACHINES["hot"]["driver"]["cards"][0] | {"device": "card 0", "throttle": ["hw_thermal"]}
    cpu = {"device": "cpu", "utilization": {"cpu": 12.4}, "memory": {"total": 2**34, "used": 2**33}, "clocks": None}
    lost = {"device": "card 1", "error": "GPU is [/lost]"}
    console = Console(file=io.StringIO(), width=100)
    report.follow(iter([[cpu], [cpu, card, lost]]), console)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert sum("busy" in line for line in lines) == 2  # no terminal: one table after the other
    assert any(re.search(r"cpu +12 % +8.0 of 16.0 GiB *$", line) for line in lines)
    assert any(re.search(r"card 0 +0 % +0.3 of 24.0 GiB +83 °C +18 W +210 MHz +hw_thermal", line) for line in lines)
    assert any(re.search(r"card 1 .*GPU is \[/lost\]", line) for line in lines)


def test_watching_ends_with_ctrl_c(dltrain: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def watched(interval: float) -> Any:
        yield [{"device": "cpu"}]
        raise KeyboardInterrupt

    monkeypatch.setattr(watch, "watch", watched)
    done = dltrain("check-gpu", "--watch")
    assert (done.code, done.err) == (0, "")
    assert "cpu" in done.out


def test_what_takes_the_worker_with_it_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    died = DeviceError("the process that used it died of SIGSEGV")
    worker = Here(collect=lambda: bare("h100"), under_load=died, estimates=died)
    found, _ = checked(worker, monkeypatch, [row("cuda:0", "matmul fp32")])
    assert [error["probe"] for error in found["errors"]] == ["card 0 under load", "expect"]
    assert found["expect"] == []


def test_a_torch_that_kills_its_process_leaves_a_report(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Here(collect=DeviceError("the process that used it died of SIGILL"))
    found, asked = checked(worker, monkeypatch, [])
    assert asked == []
    assert found["verdict"]["level"] == "broken"
    assert "torch cannot be imported: the process that used it died of SIGILL" in found["verdict"]["line"]


def test_a_device_that_does_not_answer_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Here(collect=lambda: bare("lost_card"), estimates=lambda device: [])
    assert checked(worker, monkeypatch, [])[1] == ["cpu", "cuda:0"]


def test_variables_are_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker's process has some that it set for itself."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    worker = Here(collect=lambda: bare("laptop") | {"environment": {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}})
    found, _ = checked(worker, monkeypatch, [], quick=True)
    assert found["environment"] == facts.environment()
    assert found["environment"]["CUDA_VISIBLE_DEVICES"] == "3"


def test_the_command_prints_json_and_nothing_else(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dltrain", "check-gpu", "--quick", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    found = json.loads(done.stdout)
    SCHEMA.validate(found)
    assert done.stderr == ""
    assert {test["result"] for test in found["devices"][0]["tests"]} <= {"pass", "skip"}
    assert done.returncode == check.exit_code(found, allow_cpu=False, strict=False)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a recorded machine in the place of this one."""

    def put(name: str) -> None:
        monkeypatch.setattr(check, "check", lambda *args, **options: whole(name))
        worker = SimpleNamespace(__enter__=lambda self: self, __exit__=lambda self, *error: None)
        monkeypatch.setattr("dltrain.gpu.worker.Worker", type("Worker", (), vars(worker)))

    return put


@pytest.mark.parametrize(
    ("name", "options", "code"),
    [
        ("h100", [], 0),
        ("h100", ["--strict"], 0),
        ("hot", [], 0),
        ("hot", ["--strict"], 5),
        ("laptop", [], 5),
        ("laptop", ["--allow-cpu"], 0),
        ("cut_pod", ["--allow-cpu", "--strict"], 5),
        ("full", ["--allow-cpu"], 5),
    ],
)
def test_the_commands_exit_code(dltrain: Run, machine: Any, name: str, options: list[str], code: int) -> None:
    machine(name)
    done = dltrain("check-gpu", *options)
    assert (done.code, done.err) == (code, "")
    assert "Verdict: " in done.out


def test_uuids_are_shown_on_request(dltrain: Run, machine: Any) -> None:
    machine("h100")
    uuid = MACHINES["h100"]["driver"]["cards"][0]["uuid"]
    for form in ([], ["--json"], ["--markdown"]):
        assert uuid not in dltrain("check-gpu", *form).out
        assert uuid in dltrain("check-gpu", "--full", *form).out


def test_markdown_is_all_of_stdout(dltrain: Run, machine: Any) -> None:
    machine("hot")
    done = dltrain("check-gpu", "--markdown")
    assert (done.out, done.err) == (report.markdown(report.hide(whole("hot"))) + "\n", "")


@pytest.mark.parametrize(
    "options",
    [
        ["--quick", "--watch"],
        ["--quick", "--stress", "5"],
        ["--markdown", "--json"],
        ["--watch", "--json"],
        ["--stress", "0"],
    ],
)
def test_options_that_exclude_each_other(dltrain: Run, options: list[str]) -> None:
    done = dltrain("check-gpu", *options)
    assert (done.code, done.out) == (2, "")
    assert "--" in done.err
