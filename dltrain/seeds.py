"""`dltrain train CONFIG --seeds N`: one config with several seeds, each a run in a folder of its own, by one command.

The runs are made one by one or many at once, by steps that are taken as one (dltrain/batched.py), in this process or in
several that share the seeds.  The data is read once by a process, and what `auto` chooses is chosen once for all.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rich.console import Console

from dltrain import batched, checkpoint, launch, overview, rundir, runs, ways, yamlfile
from dltrain.build import build
from dltrain.config import Config
from dltrain.device import bits_depend_on, choose_device
from dltrain.errors import (
    CheckpointError,
    ConfigError,
    DeviceError,
    DivergedError,
    DltrainError,
    OutputError,
    RunTakenError,
    Stopped,
)
from dltrain.logs import Log
from dltrain.rundir import RunFolder
from dltrain.sharing import Kept, read_once
from dltrain.statistics import interval
from dltrain.stopping import stop_at_signals
from dltrain.tables import say, score, warn

QUEUE = "DLTRAIN_SEEDS"  # of a process that trains some of them: the open file that it takes their numbers from

SPLITS = ("test", "val", "train")  # the first that is scored says what a seed came to

Found = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """Seeds to be trained below `path`.

    config: with the first of them
    tasks: all of them, those together that are batched
    bits: what the bits of all depend on, which `auto` keeps to
    plugins: files with components that the user trusts
    """

    path: Path
    config: Config
    tasks: tuple[tuple[int, ...], ...]
    how: str
    why: str
    bits: Found
    plugins: tuple[Path, ...]
    console: Console
    quiet: bool
    allow_inexact: bool = False

    def note(self, text: str) -> None:
        if not self.quiet:
            say(self.console, text)

    @property
    def seeds(self) -> list[int]:
        return [seed for task in self.tasks for seed in task]

    def seeded(self, seed: int) -> Config:
        return self.config.model_copy(update={"seed": seed})

    def folder(self, seed: int) -> Path:
        return self.path / f"seed-{seed}"

    @property
    def go_on(self) -> str:
        """The command that goes on with all of them."""
        plugins = (part for path in self.plugins for part in ("--plugin", str(path)))
        return shlex.join(["dltrain", "train", "--resume", str(self.path), *plugins])

    def plain(self) -> Found:
        """JSON-able: what `resume` goes on from."""
        return {
            "config": self.config.name,
            "run": str(self.path),
            "how": self.how,
            "why": self.why,
            "tasks": self.tasks,
            "settings": self.config.plain(),
            "bits": self.bits,
        }


def start(
    config: Config, count: int, how: str, out: Path | None, console: Console, quiet: bool
) -> tuple[Found, DltrainError | None]:
    """Trains the config's seed and the `count - 1` after it: what they came to, JSON-able, and which diverged.

    how: auto, or one of `ways.WAYS`
    out: the folder for them; None: runs/<name>/<time>

    Raises ConfigError where it cannot be done that way, RunTakenError where `out` holds a run, and Stopped, after
    saving, on SIGINT or SIGTERM.
    """
    kept: Kept = {}
    config = read_once(config, kept)
    if out and (rundir.holds_seeds(out) or overview.is_run(out)):
        raise RunTakenError(f"{out}: holds a run already; go on with it by --resume, or give another --out")

    def note(text: str) -> None:
        if not quiet:
            say(console, text)

    setup = build(config, note)
    for line in runs.describe(setup):
        note(line)
    bits = bits_depend_on(setup.placement)
    how, why = ways.choose(how, setup, count, launch.process_age())
    del setup
    path = out or rundir.make(Path("runs"), config.name)
    tasks = ways.share(range(config.seed, config.seed + count), how)
    return _train(Plan(path, config, tasks, how, why, bits, tuple(map(Path, config.plugins)), console, quiet))


def resume(
    path: Path,
    given: Callable[[Found], Config],
    allow_inexact: bool,
    plugins: Sequence[Path],
    console: Console,
    quiet: bool,
) -> tuple[Found, DltrainError | None]:
    """Goes on with the seeds in a folder that are not finished; those that diverged stay so.

    given: the config to go on with, from the one that the seeds were started with

    Raises CheckpointError where the folder does not say what its seeds are; else as `start`.
    """
    try:
        written = json.loads((path / rundir.SEEDS).read_text(encoding="utf-8"))
        tasks = tuple(tuple(map(int, task)) for task in written["tasks"])
        how, why = ways.WAYS[ways.WAYS.index(written["how"])], str(written["why"])
        settings, bits = dict(written["settings"]), dict(written["bits"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{path / rundir.SEEDS}: is not whole ({type(error).__name__}); its seeds resume one by one"
        ) from error
    kept: Kept = {}
    config = read_once(given(settings), kept)
    if config.seed != tasks[0][0]:
        raise ConfigError(f"{path}: seed: {tasks[0][0]} -> {config.seed}: start new runs for other seeds")
    choose_device(config.train.device)
    plan = Plan(path, config, tasks, how, why, bits, tuple(plugins), console, quiet, allow_inexact)
    if QUEUE in os.environ:
        _work(plan, int(os.environ[QUEUE]))
        return {}, None
    return _train(plan)


def _train(plan: Plan) -> tuple[Found, DltrainError | None]:
    """Trains what is not over of the plan."""
    lock = rundir.take(plan.path)
    try:
        waiting = [seed for seed in plan.seeds if not _is_over(plan, seed)]
        plan.note(f"seeds: {len(plan.seeds)}, {plan.how} ({plan.why})")
        if len(waiting) < len(plan.seeds):
            plan.note(f"{len(plan.seeds) - len(waiting)} of them are over, {len(waiting)} go on")
        _write(plan, {**plan.plain(), "complete": False})
        said = set(plan.seeds) - set(waiting)

        def show() -> None:
            for seed in waiting:
                if seed not in said and (summary := rundir.read_summary(plan.folder(seed))):
                    said.add(seed)
                    plan.note(f"{_line(summary)} ({len(said)} of {len(plan.seeds)})")

        try:
            with stop_at_signals():
                tasks = [index for index, task in enumerate(plan.tasks) if set(task) & set(waiting)]
                if "processes" in plan.how and tasks:
                    _in_processes(plan, tasks, show)
                else:
                    for index in tasks:
                        _do(plan, plan.tasks[index], show)
        except (Stopped, KeyboardInterrupt) as stop:
            signum = stop.exit_code - 128 if isinstance(stop, Stopped) else signal.SIGINT
            raise Stopped(f"stopped, and saved; go on with: {plan.go_on}", signum) from None
        found = {**plan.plain(), **_together([_row(plan, seed) for seed in plan.seeds])}
        _write(plan, found)
    finally:
        lock.release()
    diverged = [f"seed {row['seed']} diverged: {row['diverged']}" for row in found["rows"] if row["diverged"]]
    return found, DivergedError("\n".join(diverged)) if diverged else None


def _line(summary: Found) -> str:
    said = [f"{summary['seconds']:.3g} s training"]
    if split := next((split for split in SPLITS if summary[split]), None):
        name = overview.leading(list(summary[split]))
        said.insert(0, f"{split} {name} {score(name, summary[split][name])}")
    return f"seed {summary['seed']}: {', '.join(said)}"


def _write(plan: Plan, found: Found) -> None:
    rundir.write_atomically(plan.path / rundir.SEEDS, (json.dumps(found, indent=2) + "\n").encode())


def _do(plan: Plan, task: Sequence[int], show: Callable[[], None]) -> None:
    """Trains what is not over of a task's seeds."""
    if len(task) > 1:
        _batched(plan, task, show)
    else:
        _one(plan, task[0])
    show()


def _one(plan: Plan, seed: int) -> None:
    """Trains a seed, or goes on with it; where it diverges, its folder says so."""
    config = plan.seeded(seed)
    with closing(RunFolder(plan.folder(seed), resume=True)) as folder, suppress(DivergedError):
        if (folder.path / "config.yaml").exists():
            runs.resume(
                folder, lambda _: config, plan.console, True, plan.allow_inexact, plan.plugins, recorded=plan.bits
            )
        else:
            runs.start(config, folder, plan.console, True, recorded=plan.bits)


def _in_processes(plan: Plan, tasks: Sequence[int], show: Callable[[], None]) -> None:
    """Has processes, each with its share of the cores, take one task after the other; tasks: their numbers."""
    count = launch.workers(len(tasks))
    environment = {**os.environ, "OMP_NUM_THREADS": str(launch.threads(count))}
    arguments = shlex.split(plan.go_on)[1:] + ["--allow-inexact"] * plan.allow_inexact
    takes, gives = os.pipe()
    os.write(gives, b"".join(task.to_bytes(_WIDTH, "little") for task in tasks))
    os.close(gives)
    with ExitStack() as stack:
        stack.callback(os.close, takes)
        said: list[IO[bytes]] = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(count)]
        environments = [{**environment, QUEUE: str(takes)}] * count
        children = stack.enter_context(launch.children(arguments, environments, said, [takes]))
        failed = False

        def meanwhile() -> None:
            nonlocal failed
            show()
            if not failed and any(child.returncode for child in children):
                failed = True
                for child in children:  # they save first
                    child.terminate()

        codes = launch.wait(children, meanwhile)
        _raise_first(codes, said, plan)


_WIDTH = 4  # bytes of a task's number in the queue: a read of so few gets all of one


def _raise_first(codes: Sequence[int | None], said: Sequence[IO[bytes]], plan: Plan) -> None:
    """Raises what ended the processes, if anything did: an error of one of them before the stop of the others."""
    wrong = sorted((code for code in codes if code), key=lambda code: code in _STOPS)
    if not wrong:
        return
    code = wrong[0]
    if code in _STOPS:
        raise Stopped("", abs(code) % 128)
    if code < 0:
        name = signal.Signals(-code).name
        raise DeviceError(f"a process was ended by {name}, and the others with it; go on with: {plan.go_on}")
    file = said[codes.index(code)]
    file.seek(0)
    lines = file.read().decode(errors="replace").strip()
    raise _Failed("\n".join(line.removeprefix("error: ") for line in lines.splitlines()), code)


_STOPS = {number * sign + base for number in (signal.SIGINT, signal.SIGTERM) for sign, base in ((1, 128), (-1, 0))}


class _Failed(DltrainError):
    """What one of the processes said, with the exit code that it ended by."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code


def _work(plan: Plan, queue: int) -> None:
    """Does tasks of the queue until it is empty."""
    with stop_at_signals():
        while taken := os.read(queue, _WIDTH):
            _do(plan, plan.tasks[int.from_bytes(taken, "little")], lambda: None)


def _batched(plan: Plan, task: Sequence[int], show: Callable[[], None]) -> None:
    """Trains a task's seeds at once; those that are over keep their place, so that the others end in the same bits."""
    seeds = [seed for seed in task if not _is_over(plan, seed)]
    with ExitStack() as stack:
        folders = {seed: stack.enter_context(closing(RunFolder(plan.folder(seed), resume=True))) for seed in seeds}
        saved = _saved_together(plan, seeds)
        everyone = []
        for seed in task:
            run = runs.new_run(build(plan.seeded(seed), lambda _: None, plan.bits))
            run.batched_seeds = len(task)
            everyone.append(run)
        members: dict[int, batched.Member] = {}
        for place, (seed, run) in enumerate(zip(task, everyone, strict=True)):
            if seed not in folders:
                continue
            folder, config = folders[seed], run.setup.config
            log = Log(folder, plan.console, quiet=True)
            stack.callback(log.close)
            changes = []
            if seed in saved:
                changes = runs.check_changes(folder.path, saved[seed][2]["config"], config)
                runs.restore(run, folder.path, saved[seed], plan.allow_inexact)
            runs.write_again(run, folder, changes)
            runs.take_back_results(config, folder)
            runs.write_environment(run.setup, folder)
            log.begin(run)
            members[place] = batched.Member(run, folder, log)
        try:
            batched.train(everyone, members, plan.note, show)
        except OutputError as error:
            raise OutputError(f"{error}; once it can be written: {plan.go_on}") from error


def _saved_together(plan: Plan, seeds: Sequence[int]) -> dict[int, runs.Saved]:
    """The checkpoints of the last step that all of these seeds have saved; none where one has saved none yet.

    A kill between two saves leaves some seeds a save ahead of the others: each keeps the one before.
    """
    paths = {seed: {rundir.step_of(path): path for path in rundir.steps(plan.folder(seed))} for seed in seeds}
    common = set.intersection(*(set(each) for each in paths.values()))
    for step in sorted(common, reverse=True):
        try:
            return {seed: (each[step], *checkpoint.read(each[step])) for seed, each in paths.items()}
        except CheckpointError as error:
            warn(f"{error}; it is passed over")
    if all(paths.values()):
        one = shlex.join(["dltrain", "train", "--resume", str(plan.folder(seeds[0])), "--allow-inexact"])
        raise CheckpointError(f"{plan.path}: its seeds stand at different steps: go on with each alone: {one}")
    return {}


def _is_over(plan: Plan, seed: int) -> bool:
    """Whether a seed is finished with these settings, or diverged."""
    path = plan.folder(seed)
    if rundir.read_summary(path):
        written = yamlfile.read(path / "config.yaml").data
        return isinstance(written, dict) and not runs.differences(written, plan.seeded(seed).plain())
    return _divergence(path) is not None


def _divergence(path: Path) -> str | None:
    """How a run diverged; None where it did not."""
    *_, last = [{}, *rundir.records(path)]
    diverged = last.get("kind") == "failed" and last.get("exit_code") == DivergedError.exit_code
    return str(last["error"]) if diverged else None


def _row(plan: Plan, seed: int) -> Found:
    """What a seed came to."""
    path = plan.folder(seed)
    summary = rundir.read_summary(path) or {}
    took = {key: summary.get(key) for key in ("epochs", "seconds", "chosen_by", "train", "val", "test")}
    return {"seed": seed, "run": str(path), "diverged": None if summary else _divergence(path), **took}


def _together(rows: Sequence[Found]) -> Found:
    """Mean, standard deviation and interval of each score of each split over the seeds that came to their end."""
    done = [row for row in rows if row["seconds"] is not None]
    scores = {
        split: {name: interval([row[split][name] for row in done]) for name in done[0][split]}
        for split in SPLITS
        if done and done[0][split]
    }
    return {
        "complete": all(row in done or row["diverged"] for row in rows),
        "score": overview.leading(list(next(iter(scores.values()), ()))),
        "diverged": sum(row["diverged"] is not None for row in rows),
        "rows": list(rows),
        "scores": scores,
    }
