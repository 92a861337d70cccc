"""`dltrain train --profile`: where a step's time goes, nothing else kept."""

from __future__ import annotations

import gzip
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function

from dltrain import rundir
from dltrain.averaging import training_mode
from dltrain.build import build
from dltrain.config import Config
from dltrain.dryrun import FORWARD_PASSES, count_flops
from dltrain.errors import OutputError
from dltrain.gpu.rates import synchronize
from dltrain.runs import describe, new_run
from dltrain.spans import measured_by, span
from dltrain.step import Steps

WARM_UP = 5  # steps before anything is measured: the first ones allocate, and compile where the config asks for it
TIMED = 100  # steps, at most
PROFILED = 20  # steps, at most: a trace of more is slow to open
SECONDS = 3.0  # for each of the three; of long steps fewer are taken
OPERATORS = 10  # that are listed


def profile(config: Config, folder: Path, note: Callable[[str], None]) -> dict[str, Any]:
    """Takes the first steps of a run and measures them; JSON-able.  The run itself is thrown away.

    step_seconds: of the mean of `timed_steps` steps, without a profiler; the parts' seconds sum to it
    parts: each span of a step with `seconds` and `share`, without those of spans within it; `rest` is what is in none
    profiled_step_seconds: of the mean of `profiled_steps` more steps, under torch.profiler
    operators: those with the most time of their own in these: `name` as in the trace, `calls` and `seconds` a step, and
        `share` of profiled_step_seconds; `other operators`, and `no operator`: Python, the autograd engine's waits, …
    kernels: likewise by time on the device, as a share of step_seconds; none on a CPU
    flops_per_second: of the step's images, FORWARD_PASSES times a forward pass each
    trace: the file for TensorBoard's profiler plugin, chrome://tracing and ui.perfetto.dev

    Raises OutputError where the trace cannot be written, DivergedError where the loss or a gradient is not finite.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it tells stderr that it begins, ends and finds no GPU
    setup = build(config, note)
    for line in describe(setup):
        note(line)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: {error.strerror} (errno {error.errno})") from None
    device = setup.placement.device
    flops = count_flops(setup.model, torch.zeros(1, *setup.data.shape, device=device)).get_total_flops()
    steps = Steps(new_run(setup))
    step = _stepper(steps)
    expected = _warm_up(step, device)
    timed, profiled = (max(1, min(most, int(SECONDS / expected))) for most in (TIMED, PROFILED))
    note(f"profile: {timed} steps are timed, then {profiled} traced")

    watch = Stopwatch(device)
    with measured_by(watch):
        watch.mark()
        for _ in range(timed):
            step()
        watch.mark()
    parts = {name: seconds / timed for name, seconds in watch.seconds().items()}
    parts["rest"] = parts.pop("rest")  # last
    whole = sum(parts.values())

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    schedule = torch.profiler.schedule(wait=0, warmup=1, active=profiled, repeat=1)
    with (
        torch.profiler.profile(activities=activities, schedule=schedule) as profiler,
        measured_by(lambda name: record_function(f"dltrain: {name}")),
    ):
        for _ in range(1 + profiled):
            step()
            synchronize(device)  # a kernel is to lie in the step that it is of
            profiler.step()
    steps.read()  # raises where what is still unread is not finite
    traced, operators, kernels = _read(profiler.key_averages(), profiled)
    images = setup.step_size / whole
    return {
        "config": config.plain(),
        **setup.placement.why,
        "images_per_step": setup.step_size,
        "timed_steps": timed,
        "profiled_steps": profiled,
        "step_seconds": whole,
        "profiled_step_seconds": traced,
        "parts": [{"name": name, "seconds": each, "share": each / whole} for name, each in parts.items()],
        "operators": _longest(operators, traced, "operator"),
        "kernels": _longest(kernels, whole, "kernel") if kernels else [],
        "images_per_second": images,
        "flops_per_image": flops,
        "flops_per_second": images * FORWARD_PASSES * flops,
        "trace": str(_write(profiler, folder, config.name)),
    }


class Stopwatch:
    """Time by span, each without what opens within it, so that they and `rest` sum to the whole.

    On a CPU the clock's, else the device's own: its queue is not waited for, and a pause in it counts as the span's
    whose commands came late.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self.device = device
        self.clock = clock
        self.open = ["rest"]
        self.marks: list[tuple[str, Any]] = []  # from when on which span is the innermost

    def __call__(self, name: str) -> Stopwatch:
        self.open.append(name)
        return self

    def __enter__(self) -> None:
        self.mark()

    def __exit__(self, *error: object) -> None:
        self.open.pop()
        self.mark()

    def mark(self) -> None:
        if self.device.type == "cpu":
            now: Any = self.clock()
        else:
            now = torch.Event(self.device, enable_timing=True)
            now.record()
        self.marks.append((self.open[-1], now))

    def seconds(self) -> dict[str, float]:
        """By span, in the order of their first opening, between the first and the last mark."""
        synchronize(self.device)
        found: dict[str, float] = {}
        for (name, begin), (_, end) in pairwise(self.marks):
            took = end - begin if self.device.type == "cpu" else begin.elapsed_time(end) / 1000
            found[name] = found.get(name, 0.0) + took
        return found


def _stepper(steps: Steps) -> Callable[[], None]:
    """What takes one more step at each call, and reads what they gave where `train` would log it.

    The smaller last step of an epoch is left out.
    """
    run, at, settings = steps.run, steps.run.progress, steps.run.setup.config.train
    whole = steps.batches.images // steps.batches.step_size
    training_mode(run.setup.model)

    def step() -> None:
        steps.take()
        epoch_ends = at.step == whole
        if epoch_ends or run.global_step % settings.log_every_steps == 0:
            with span("count"):
                steps.read()
        if epoch_ends:
            at.epoch, at.step = (at.epoch + 1) % settings.epochs, 0

    return step


def _warm_up(step: Callable[[], None], device: torch.device) -> float:
    """Takes steps until they are as fast as they get; seconds of one."""
    took: list[float] = []
    while len(took) < WARM_UP and sum(took[1:]) < SECONDS:  # the first may have compiled for minutes
        begin = time.perf_counter()
        step()
        synchronize(device)
        took.append(time.perf_counter() - begin)
    return min(took)


Times = dict[str, tuple[float, float]]  # name -> calls and seconds a step


def _read(events: Any, steps: int) -> tuple[float, Times, Times]:
    """Seconds of a step, its operators' on the CPU and its kernels' on the device, from a profiler's key averages."""
    whole, operators, kernels = 0.0, {}, {}
    for event in events:
        if event.key == "ProfilerStep*" and event.device_type.name == "CPU":
            whole = event.cpu_time_total / 1e6 / steps
        elif event.is_user_annotation:  # a span of ours, or an optimizer's step: what they hold is listed by itself
            continue
        elif event.device_type.name == "CPU":
            operators[event.key] = event.count / steps, event.self_cpu_time_total / 1e6 / steps
        else:
            kernels[event.key] = event.count / steps, event.self_device_time_total / 1e6 / steps
    return whole, operators, kernels


def _longest(times: Mapping[str, tuple[float, float]], whole: float, kind: str) -> list[dict[str, Any]]:
    """The longest first, then what the others take together, and what is in none of them."""
    ordered = sorted(times.items(), key=lambda item: item[1][1], reverse=True)
    rows = [(name, calls, seconds) for name, (calls, seconds) in ordered[:OPERATORS]]
    if others := [each for _, each in ordered[OPERATORS:]]:
        rows.append((f"other {kind}s", sum(calls for calls, _ in others), sum(seconds for _, seconds in others)))
    # threads can be busy at once: then there is no time in none
    rows.append((f"no {kind}", 0.0, max(0.0, whole - sum(seconds for _, seconds in times.values()))))
    return [{"name": name, "calls": calls, "seconds": each, "share": each / whole} for name, calls, each in rows]


def _write(profiler: torch.profiler.profile, folder: Path, name: str) -> Path:
    """Writes the trace under a new name, as torch.profiler.tensorboard_trace_handler would call it."""
    path = folder / f"{name}.{time.time_ns()}.pt.trace.json.gz"
    with tempfile.TemporaryDirectory() as temporary:
        whole = Path(temporary) / "trace.json"
        profiler.export_chrome_trace(str(whole))
        if not whole.exists():  # it says nothing where it fails, and leaves nothing
            raise OutputError(
                f"{temporary}: the trace cannot be written there; make room, or set TMPDIR to another folder"
            )
        rundir.write_atomically(path, gzip.compress(whole.read_bytes(), compresslevel=6))
    return path
