"""A run from its config to its results: what `dltrain train` does."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dltrain import checkpoint, rundir, yamlfile
from dltrain import config as configs
from dltrain.build import Setup, build
from dltrain.config import Config
from dltrain.device import environment
from dltrain.distributed import ALONE, Processes
from dltrain.errors import (
    CheckpointError,
    ConfigError,
    DeviceError,
    DivergedError,
    DltrainError,
    OutputError,
    PeerLostError,
    names_memory,
    names_peer,
)
from dltrain.evaluate import Evaluation
from dltrain.logs import Log
from dltrain.rundir import RunFolder
from dltrain.state import Run, Tensors
from dltrain.tables import warn
from dltrain.train import go_on, is_over, train

# what a position in a run, the images held out of it and the best so far depend on; but for the latter
FIXED = (
    *("seed:", "data.", "model.", "task.", "descent.", "loss."),
    *("optim.lookahead", "train.average", "train.choose_by:"),
)
FREE = ("data.root:", "data.verify:", "data.augment:", "data.resident:", "descent.micro_batch_size:")

Saved = tuple[Path, Tensors, dict[str, Any]]


def start(
    config: Config,
    folder: RunFolder,
    console: Console,
    quiet: bool,
    processes: Processes = ALONE,
    recorded: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Trains a new run and gives its summary; a folder in which nothing could be trained is taken back.

    recorded: what the bits of the runs beside it depend on, which `auto` keeps to
    """
    log = Log(folder, console, quiet)
    try:
        setup = build(config, log.note, recorded, processes)
    except BaseException:
        folder.discard()
        raise
    folder.write("config.yaml", config.yaml())
    return _train(new_run(setup), folder, log)


def new_run(setup: Setup) -> Run:
    run = Run(setup, torch.zeros(2, dtype=torch.float64))  # sums of thousands of losses want more digits than float32's
    if setup.config.train.average:
        run.average = {name: tensor.clone() for name, tensor in setup.model.state_dict().items()}
    if setup.config.optim.lookahead:
        trained = {name for part in setup.optimizers.parts for name in part.names}
        run.slow = {name: each.detach().clone() for name, each in setup.model.named_parameters() if name in trained}
    return run


def resume(
    folder: RunFolder,
    given: Callable[[dict[str, Any]], Config],
    console: Console,
    quiet: bool,
    allow_inexact: bool,
    plugins: Sequence[Path] = (),
    processes: Processes = ALONE,
    recorded: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Goes on with a run from its latest checkpoint that is whole, or from its start where there is none.

    given: the config to go on with, from the one that the checkpoint holds
    plugins: files with components that the user trusts
    recorded: what the bits of the runs beside it depend on, which `auto` keeps to where there is no checkpoint
    """
    log = Log(folder, console, quiet)
    saved: Saved | None = None
    if processes.first:
        saved = rundir.latest(folder.path, lambda path: (path, *checkpoint.read(path)), warn)
        processes.tell(saved and saved[0])
    elif latest := processes.tell():
        saved = (latest, *checkpoint.read(latest))
    before = saved[2]["config"] if saved else _written_config(folder.path, plugins)
    config = given(before)
    changes = check_changes(folder.path, before, config)
    setup = build(config, log.note, saved[2]["bits"] if saved else recorded, processes)
    run = new_run(setup)
    if saved is None:
        log.note("no checkpoint is whole yet: training starts at the first step")
    else:
        restore(run, folder.path, saved, allow_inexact)
    if changes:
        log.note(f"changed settings: {'; '.join(changes)}")
    write_again(run, folder, changes)
    finished = processes.tell(rundir.read_summary(folder.path) if processes.first else None)
    if not changes and is_over(run) and finished:
        log.note("this run is finished; --set train.epochs=… trains it further")
        return dict(finished)
    take_back_results(config, folder)
    log.note(f"going on after step {run.global_step}")
    return _train(run, folder, log)


def check_changes(path: Path, before: dict[str, Any], config: Config) -> list[str]:
    """The settings that a run goes on with otherwise.  Raises ConfigError for those that it cannot go on with."""
    changes = differences(before, config.plain())
    if fixed := [change for change in changes if change.startswith(FIXED) and not change.startswith(FREE)]:
        text = "say what an epoch, a step, the held-out images or the best weights so far are: start a new run for them"
        raise ConfigError(f"{path}: {'; '.join(fixed)}: these settings {text}")
    return changes


def restore(run: Run, path: Path, saved: Saved, allow_inexact: bool) -> None:
    """Puts a run where a checkpoint has it.

    Raises ConfigError where its config ends before that, CheckpointError where it would not end in the same bits.
    """
    run.restore(*saved)
    begun, epochs = run.progress.epoch + (run.progress.step > 0), run.setup.config.train.epochs
    if epochs < begun:
        text = f"expected at least {begun}, which this run has begun, got {epochs}"
        raise ConfigError(f"{path}: train.epochs: {text}")
    _refuse_other_bits(saved, run, allow_inexact)


def write_again(run: Run, folder: RunFolder, changes: Sequence[str]) -> None:
    """Makes a folder say where its run goes on, and with which changed settings."""
    folder.forget_after(run.global_step)
    if changes:
        folder.append({"kind": "changed", "step": run.global_step, "settings": list(changes)})
    folder.write("config.yaml", run.setup.config.yaml())


def take_back_results(config: Config, folder: RunFolder) -> None:
    """Removes what a run came to that goes on."""
    folder.remove("summary.json")  # of what the run was; it says that a run is finished
    if config.chosen_by == "last":
        folder.remove("best.safetensors")  # the last weights are others by now


def _written_config(path: Path, plugins: Sequence[Path]) -> dict[str, Any]:
    if not (path / "config.yaml").exists():
        raise CheckpointError(f"{path}: holds no run to go on with; start one without --resume")
    document = yamlfile.read(path / "config.yaml")
    return configs.from_plain(document.data, document.source, plugins=plugins).plain()


def differences(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[str]:
    """`optim.lr: 0.1 -> 0.05` for each setting that differs."""
    found = []
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key}: {json.dumps(old)} -> {json.dumps(new)}")
    return found


def _refuse_other_bits(saved: Saved, run: Run, allow_inexact: bool) -> None:
    path, _, meta = saved
    changed = differences({"processes": 1, "batched_seeds": 1, **meta["bits"]}, run.bits())
    changed += [f"data {change}" for change in differences(meta["data"]["files"], dict(run.setup.data.files))]
    if changed and not allow_inexact:
        text = f"would not end in the same bits: {'; '.join(changed)}; --allow-inexact goes on all the same"
        raise CheckpointError(f"{path}: {text}")


def _train(run: Run, folder: RunFolder, log: Log) -> dict[str, Any]:
    setup = run.setup
    write_environment(setup, folder)
    for line in describe(setup):
        log.note(line)
    try:
        with log.begin(run):
            train(run, folder, log)
        return finish(run, folder, log)
    except DivergedError as error:
        record_failure(run, folder, error)
        raise DivergedError(f"{error}; then: {go_on(run, folder)} --set optim.lr=…") from None
    except OutputError as error:
        raise OutputError(f"{error}; once it can be written: {go_on(run, folder)}") from error
    except (MemoryError, RuntimeError) as error:
        if names_peer(error):
            text = "another process of this run has gone, and this one ends with it"
            raise PeerLostError(f"{text}; go on with: {go_on(run, folder)}") from error
        if not names_memory(error):
            raise
        mended = _out_of_memory(run, folder)
        record_failure(run, folder, mended)
        raise mended from error
    finally:
        log.close()


def write_environment(setup: Setup, folder: RunFolder) -> None:
    folder.write("environment.json", json.dumps(environment(setup.placement), indent=2) + "\n")


def record_failure(run: Run, folder: RunFolder, error: DltrainError) -> None:
    folder.append({"kind": "failed", "step": run.global_step, "exit_code": error.exit_code, "error": str(error)})


def finish(run: Run, folder: RunFolder, log: Log) -> dict[str, Any]:
    """Scores the chosen weights on the splits that the config asks for: the one use of the test split.

    Training images are shown as they are: there are many, only to be compared with, and each view costs a pass.
    """
    setup = run.setup
    settings = setup.config.evaluate
    best = run.progress.best
    if best:
        checkpoint.load_weights(setup.model, best.weights)
    scores = {
        name: setup.evaluate(split, [] if name == "train" else settings.views)
        for name, split in setup.data.splits.items()
        if {"train": settings.train, "test": settings.test}.get(name, True)
    }
    summary = _summary(run, folder.path, scores)
    folder.write("summary.json", json.dumps(summary, indent=2) + "\n")
    if log.board:
        log.board.end(scores, run.global_step)
    return summary


def describe(setup: Setup) -> list[str]:
    data, config = setup.data, setup.config
    channels, height, width = data.shape
    held_out = f", {len(data.val):,} held out (val)" if data.val else ""
    parameters = sum(parameter.numel() for parameter in setup.model.parameters())
    return [
        *([] if config.task.entry.facts["classifies"] else [f"task: {config.task.name}"]),
        f"data: {config.data.source.name}, {len(data.train):,} training images{held_out}, {len(data.test):,} test,"
        f" {channels}x{height}x{width}, {len(data.classes)} classes",
        f"model: {config.model.source.name}, {parameters:,} parameters; {setup.step_size:,} images a step, "
        f"{setup.steps_per_epoch:,} steps an epoch",
        *(f"{key}: {why}" for key, why in setup.placement.why.items()),
    ]


def _summary(run: Run, path: Path, scores: dict[str, Evaluation]) -> dict[str, Any]:
    at, config = run.progress, run.setup.config
    epoch = at.best.epoch if at.best else at.epoch
    return {
        "run": str(path),
        "config": config.name,
        "seed": config.seed,
        "epochs": at.epoch,
        "steps": run.global_step,
        "seconds": round(at.seconds, 3),
        "seconds_per_epoch": round(at.seconds / at.epoch, 4),
        "images_per_second": round(at.epoch * len(run.setup.data.train) / at.seconds, 1),
        "chosen_by": config.chosen_by,
        "chosen_epoch": epoch,
        "data_verified": run.setup.data.verified,
        **({"views": len(config.evaluate.views)} if config.evaluate.views else {}),
        **{split: scores[split].scores() if split in scores else None for split in ("train", "val", "test")},
    }


def _out_of_memory(run: Run, folder: RunFolder) -> DeviceError:
    setup = run.setup
    mend = "not even one image at a time fits: take a smaller model, or another device"
    if setup.micro_size > 1:
        smaller = f"--set descent.micro_batch_size={setup.micro_size // 2}"
        mend = f"{go_on(run, folder)} {smaller} keeps the step of {setup.step_size} images"
    return DeviceError(f"{setup.placement.device}: out of memory; {mend}")
