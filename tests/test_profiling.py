"""Where a step's time goes: the spans, the clock, the table and the trace."""

from __future__ import annotations

import gzip
import io
import json
import re
from collections import Counter
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Run
from rich.console import Console
from torch.autograd import DeviceType

from dltrain import checkpoint, config, profiling, tables
from dltrain import step as step_module
from dltrain.build import build
from dltrain.runs import new_run
from dltrain.spans import measured_by, span
from dltrain.step import Steps

LINEAR = """
data: {name: digits, limit: 200, val: 0}
model: perceptron
optim: {name: sgd, lr: 0.1}
descent: {batch_size: 32}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "c.yaml").write_text(LINEAR)
    return tmp_path / "c.yaml"


def test_a_span_is_nothing_until_somebody_measures() -> None:
    asked: list[str] = []

    def note(name: str) -> Any:
        asked.append(name)
        return nullcontext()

    with span("before") as nothing:
        assert nothing is None
    assert span("before") is span("before too")
    with pytest.raises(ZeroDivisionError), measured_by(note), span("within"):
        raise ZeroDivisionError
    with span("after"):
        pass
    assert asked == ["within"]


def test_a_span_has_no_time_of_those_within_it_and_all_sum_to_the_whole() -> None:
    times = iter([10.0, 11.0, 13.0, 16.0, 20.0, 25.0, 31.0, 38.0])
    watch = profiling.Stopwatch(torch.device("cpu"), clock=lambda: next(times))
    with measured_by(watch):
        watch.mark()
        with span("outer"), span("inner"):  # from 11, within it from 13 to 16
            pass
        with span("inner"):  # 25 to 31, after outer ended at 20
            pass
        watch.mark()
    seconds = watch.seconds()
    assert seconds == {"rest": 1 + 5 + 7, "outer": 2 + 4, "inner": 3 + 6}
    assert sum(seconds.values()) == 38 - 10
    assert list(seconds) == ["rest", "outer", "inner"]


def test_elsewhere_the_devices_own_clock_counts_in_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for CUDA's events: those recorded have a time once the device has been waited for."""
    done: list[str] = []

    class Event:
        recorded = 0

        def __init__(self, device: torch.device, enable_timing: bool) -> None:
            assert (device.type, enable_timing) == ("cuda", True)

        def record(self) -> None:
            Event.recorded += 1
            self.at = 1000.0 * Event.recorded**2

        def elapsed_time(self, end: Event) -> float:
            assert done == ["cuda"]
            return end.at - self.at

    monkeypatch.setattr(torch, "Event", Event)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: done.append(device.type))
    watch = profiling.Stopwatch(torch.device("cuda"))
    watch.mark()  # at 1 s
    with watch("forward"):  # 4 to 9
        pass
    watch.mark()  # 16
    assert watch.seconds() == {"rest": 3 + 7, "forward": 5}


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [
            "optim=adamw",
            "schedule=cosine",
            "model={name: mlp, hidden: [8], dropout: 0.5}",
            "data.augment=[{translate: 1}]",
        ],
        ["optim.sam_rho=0.1", "train.clip_norm=0.5", "optim.lookahead={every_steps: 2}"],
        ["optim=lbfgs", "descent={variant: batch}"],
        ["model={name: mlp, hidden: [8], batchnorm: true}", "model.frozen=[2.*]"],  # whose statistics then stay
    ],
)
def test_its_steps_are_those_of_training(dltrain: Run, path: Path, overrides: list[str]) -> None:
    overrides = ["data.limit=192", "train.epochs=2", "train.choose_by=last", *overrides]
    loaded = config.load(path, overrides)
    setup = build(loaded, print)
    step = profiling._stepper(Steps(new_run(setup)))
    for _ in range(2 * setup.steps_per_epoch):
        step()
    done = dltrain("train", path, "--out", "run", *(part for each in overrides for part in ("--set", each)))
    assert done.code == 0, done.err
    trained, _ = checkpoint.read(Path("run/best.safetensors"))
    own = {f"model.{name}": each for name, each in setup.model.state_dict().items()}
    assert trained.keys() == own.keys()
    assert all(torch.equal(trained[name], each) for name, each in own.items())


def test_the_smaller_last_step_is_left_out_and_epochs_follow(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[int, int, int]] = []
    direction = step_module.direction

    def note(setup, batches, epoch, step, outputs):
        taken.append((epoch, step, batches.images_in(step)))
        return direction(setup, batches, epoch, step, outputs)

    monkeypatch.setattr(step_module, "direction", note)
    loaded = config.load(path, ["data.limit=100", "train.epochs=3", "train.log_every_steps=2"])
    run = new_run(build(loaded, print))
    step = profiling._stepper(Steps(run))
    counted = []
    for _ in range(11):
        step()
        counted.append(run.sums[0].item())
    # 100 = 3 * 32 + 4; the run has no fourth epoch, whose rates no schedule would know
    assert taken == [(n // 3 % 3, n % 3, 32) for n in range(11)]
    assert [now != before for before, now in pairwise([0.0, *counted[:3]])] == [False, True, True]


@pytest.mark.parametrize(
    ("seconds", "taken", "expected"),
    [
        ([0.5, 0.1, 0.2, 0.1, 0.1], 5, 0.1),
        ([9.0, 8.0], 2, 8.0),  # steps that are long from the first on
        ([90.0, 1.2, 1.0, 1.1], 4, 1.0),  # the first one compiled
    ],
)
def test_it_warms_up_until_steps_are_fast(
    seconds: list[float], taken: int, expected: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, waiting = [0.0], list(seconds)

    def step() -> None:
        now[0] += waiting.pop(0)

    monkeypatch.setattr(profiling, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    assert profiling._warm_up(step, torch.device("cpu")) == pytest.approx(expected)
    assert len(seconds) - len(waiting) == taken


def event(key: str, count: int, cpu: float = 0, device: float = 0, on: Any = DeviceType.CPU, span: bool = False) -> Any:
    """What torch.profiler sums up under one name, in microseconds."""
    return SimpleNamespace(
        key=key,
        count=count,
        cpu_time_total=2 * cpu,
        self_cpu_time_total=cpu,
        self_device_time_total=device,
        device_type=on,
        is_user_annotation=span,
    )


def test_operators_kernels_and_spans_are_told_apart() -> None:
    events = [
        event("ProfilerStep*", 4, cpu=4000, span=True),
        event("ProfilerStep*", 4, device=9e6, on=DeviceType.CUDA, span=True),
        event("dltrain: forward", 4, cpu=3e6, span=True),
        event("dltrain: forward", 4, device=5e6, on=DeviceType.CUDA, span=True),
        event("aten::mm", 8, cpu=400, device=600),
        event("gemm", 8, device=600, on=DeviceType.CUDA),
    ]
    whole, operators, kernels = profiling._read(events, 4)
    assert whole == pytest.approx(8000e-6 / 4)
    assert operators == {"aten::mm": (2, pytest.approx(100e-6))}
    assert kernels == {"gemm": (2, pytest.approx(150e-6))}


def test_the_longest_are_listed_and_the_others_summed() -> None:
    times = {f"op{n}": (n, float(n)) for n in range(1, 13)}  # 78 s in all
    rows = profiling._longest(times, 100.0, "operator")
    assert [row["name"] for row in rows[:10]] == [f"op{n}" for n in range(12, 2, -1)]
    assert rows[0] == {"name": "op12", "calls": 12, "seconds": 12, "share": 0.12}
    assert rows[10] == {"name": "other operators", "calls": 3, "seconds": 3, "share": 0.03}
    assert rows[11] == {"name": "no operator", "calls": 0, "seconds": 22, "share": 0.22}
    few = profiling._longest({"op": (1, 3.0)}, 2.0, "operator")  # of two threads at once
    assert [(row["name"], row["share"]) for row in few] == [("op", 1.5), ("no operator", 0)]


def test_parts_sum_to_the_step_and_the_trace_holds_the_steps(dltrain: Run, path: Path) -> None:
    done = dltrain("train", path, "--profile", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    parts = {row["name"]: row["seconds"] for row in found["parts"]}
    assert list(parts) == ["batch", "forward", "loss", "backward", "norm", "optimizer", "count", "rest"]
    assert sum(parts.values()) == pytest.approx(found["step_seconds"])
    assert min(parts.values()) > 0
    for kind in ("parts", "operators"):
        assert sum(row["share"] for row in found[kind]) == pytest.approx(1)
    assert sum(row["seconds"] for row in found["operators"]) == pytest.approx(found["profiled_step_seconds"])
    assert found["kernels"] == []
    assert found["images_per_step"] == 32
    assert found["images_per_second"] == pytest.approx(32 / found["step_seconds"])
    assert found["flops_per_image"] == 2 * 64 * 10  # 8x8 pixels to 10 classes
    assert found["flops_per_second"] == pytest.approx(3 * 1280 * found["images_per_second"])

    (trace,) = [each for each in Path("runs").rglob("*") if each.is_file()]
    assert str(trace) == found["trace"]
    assert trace.parent == Path("runs/c/profile")
    assert re.fullmatch(r"c\.\d+\.pt\.trace\.json\.gz", trace.name)  # what TensorBoard's plugin looks for
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    counts = Counter(each["name"] for each in events if each.get("ph") == "X")
    steps = found["profiled_steps"]
    once = ("forward", "loss", "backward", "norm", "optimizer")
    assert [counts[f"dltrain: {name}"] for name in once] == [steps] * len(once)
    numbers = {name for name in counts if name.startswith("ProfilerStep#")}
    assert numbers == {f"ProfilerStep#{n}" for n in range(1, steps + 1)}  # 0 was the profiler's own first step
    assert counts["aten::addmm"] == steps  # a linear layer's forward pass: one a step


@pytest.mark.parametrize("width", [40, 80])
def test_the_table_fits_and_adds_up(dltrain: Run, path: Path, width: int) -> None:
    found = json.loads(dltrain("train", path, "--profile", "--json", "-q", "--out", "p").out)
    found["operators"][0]["name"] = "aten::[bold]max_pool2d_with_indices_backward_of_a_very_long_name"
    found["kernels"] = [{"name": "void gemm<float, 128, 64>(float*)", "calls": 1, "seconds": 0.001, "share": 0.5}]
    written = io.StringIO()
    tables.profile(found, Console(width=width, file=written, force_terminal=True, color_system=None))
    lines = written.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    rows = [line.split() for line in lines if line.rstrip().endswith("%")]
    split = next(index for index, row in enumerate(rows) if row[0] == "step")
    assert sum(float(row[-2]) for row in rows[:split]) == pytest.approx(100, abs=0.3)
    assert float(rows[split][1]) == pytest.approx(1000 * found["step_seconds"], abs=1e-3)
    assert rows[-1][-2:] == ["50.0", "%"]
    text = " ".join(written.getvalue().split())
    assert "[bold]max" in text
    assert "images/s" in text
    assert "the run itself was not kept" in text


def test_notes_are_left_out_when_quiet_and_on_stderr_beside_json(dltrain: Run, path: Path) -> None:
    noted = dltrain("train", path, "--profile", "--json")
    assert "steps are timed, then" in noted.err
    quiet = dltrain("train", path, "--profile", "-q")
    assert (quiet.code, quiet.err) == (0, "")
    assert quiet.out.split()[:4] == ["part", "of", "a", "step"]
    assert len(list(Path("runs/c/profile").iterdir())) == 2  # an earlier one stays


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--resume"], 2, "--profile and --resume: give one of them"),
        (["--dry-run"], 2, "--profile and --dry-run: give one of them"),
        (["--out", "c.yaml"], 6, "c.yaml: File exists"),
        (["--set", "optim.lr=1e30", "--set", "loss=mse"], 7, "the loss is inf"),
    ],
)
def test_what_is_refused(dltrain: Run, path: Path, more: list[str], code: int, message: str) -> None:
    done = dltrain("train", path, "--profile", *more)
    assert (done.code, done.err.count("\n")) == (code, 1)
    assert message in done.err
    assert not [each for each in Path("runs").rglob("*") if each.is_file()]


def test_a_device_that_is_not_asked_each_step_is_asked_at_the_end(
    dltrain: Run, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_module, "_asks_each_step", lambda device: False)
    one_long_epoch = ["descent={variant: stochastic}", "data.limit=500", "train.log_every_steps=1000"]
    settings = [part for each in (*one_long_epoch, "optim.lr=1e30", "loss=mse") for part in ("--set", each)]
    done = dltrain("train", path, "--profile", *settings)
    assert (done.code, done.err.count("\n")) == (7, 1)
    assert "error: step " in done.err


def test_a_trace_that_torch_could_not_write_is_said(dltrain: Run, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.profiler leaves nothing on a full disk, and raises nothing."""
    monkeypatch.setattr(torch.profiler.profile, "export_chrome_trace", lambda *arguments: None)
    done = dltrain("train", path, "--profile", "--out", "p")
    assert (done.code, done.err.count("\n")) == (6, 1)
    assert "the trace cannot be written there; make room" in done.err
    assert list(Path("p").iterdir()) == []
