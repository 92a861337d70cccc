"""The training loop."""

from __future__ import annotations

import math
import shlex
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic, perf_counter
from types import FrameType

import torch

from dltrain.averaging import evaluation_weights, training_mode
from dltrain.data.batches import Batches
from dltrain.errors import Stopped
from dltrain.logs import Log
from dltrain.rundir import RunFolder
from dltrain.state import Best, Run
from dltrain.step import Steps, diverged


def train(run: Run, folder: RunFolder, log: Log) -> None:
    """Trains from where the run stands to its end; `run.progress.best` then holds the weights to keep, if any do.

    Raises DivergedError where the loss or a gradient is not finite, before it can reach a checkpoint, and Stopped,
    after saving, on SIGINT or SIGTERM.
    """
    setup, config, at, settings = run.setup, run.setup.config, run.progress, run.setup.config.train
    model, steps = setup.model, Steps(run)
    batches = steps.batches
    saved = monotonic()
    if config.chosen_by == "last":
        at.best = None  # of an earlier end of this run

    def save_where(due: object) -> None:
        """Between two steps: saves where it is due, or the clock says so, or a signal asks to stop here."""
        nonlocal saved
        late = monotonic() - saved > 60 * settings.checkpoint_every_minutes
        signum, late_anywhere = setup.processes.highest(stop[0] if stop else 0, late)
        if due or signum or late_anywhere:
            steps.read()
            log.flush()
            save(run, folder)
            saved = monotonic()
        if signum:
            text = f"stopped after step {run.global_step}, and saved; go on with: {go_on(run, folder)}"
            raise Stopped(text, signum)

    with stop_signals() as stop:
        while not is_over(run):
            training_mode(model)
            clock = Clock()
            due: object = None
            while at.step < batches.steps:
                steps.take()
                epoch_ends = at.step == batches.steps

                if run.global_step % settings.log_every_steps == 0 or epoch_ends:
                    norm = steps.read()  # the only place that waits for the device
                    at.epoch_seconds += clock.lap()
                    log_step(run, log, batches, norm)
                due = settings.checkpoint_every_steps and run.global_step % settings.checkpoint_every_steps == 0
                if not epoch_ends:  # else after the epoch's evaluation, so that its record is never written twice
                    at.epoch_seconds += clock.lap()
                    save_where(due)
                    clock.lap()

            end_epoch(run, log, batches)
            save_where(due or (is_over(run) and config.chosen_by != "last"))
        if config.chosen_by == "last":
            choose_last(run, batches)
            save_where(due=True)


def log_step(run: Run, log: Log, batches: Batches, norm: float) -> None:
    """Logs what the steps since the last such line gave, once they are read and their seconds counted.

    norm: of the last step's gradient
    """
    at, score = run.progress, run.setup.task.score
    loss_sum, score_sum = run.sums.tolist()
    seen = batches.images_before(at.step)
    since = seen - at.seen
    log.step(
        run,
        {"loss": (loss_sum - at.loss_sum) / since, score: (score_sum - at.score_sum) / since},
        lr=run.setup.optimizers.lr,
        gradient_norm=norm,
        images_per_second=since / (at.epoch_seconds - at.logged_seconds),
    )
    at.loss_sum, at.score_sum, at.seen, at.logged_seconds = loss_sum, score_sum, seen, at.epoch_seconds


def end_epoch(run: Run, log: Log, batches: Batches) -> None:
    """Evaluates on val, keeps the weights where they are the best so far, logs it, and begins the next epoch.

    Raises DivergedError where the val loss is not finite.
    """
    setup, config, at, score = run.setup, run.setup.config, run.progress, run.setup.task.score
    trained = {"loss": at.loss_sum / at.seen, score: at.score_sum / at.seen}
    at.epoch, at.step, at.seconds = at.epoch + 1, 0, at.seconds + at.epoch_seconds
    scores = None
    if setup.data.val is not None:
        with evaluation_weights(run, batches):
            scores = setup.evaluate(setup.data.val).scores()
            if not math.isfinite(scores["loss"]):
                raise diverged(run, run.global_step, f"the val loss is {scores['loss']}")
            if config.chosen_by != "last":
                value = -scores["loss"] if config.chosen_by == "val_loss" else scores[score]
                if at.best is None or value > at.best.value:
                    at.best = Best(value, at.epoch, run.global_step, _weights(setup.model))
    at.losses.append(scores["loss"] if scores else trained["loss"])
    log.epoch(run, trained, scores, lambda: next(batches.step(0, 0))[0])
    at.loss_sum, at.score_sum, at.seen, at.epoch_seconds, at.logged_seconds = 0.0, 0.0, 0, 0.0, 0.0
    run.sums.zero_()


def choose_last(run: Run, batches: Batches) -> None:
    """Keeps the weights that the run ends with."""
    with evaluation_weights(run, batches):
        run.progress.best = Best(0.0, run.progress.epoch, run.global_step, _weights(run.setup.model))


def save(run: Run, folder: RunFolder) -> None:
    """Writes the run's checkpoint and the weights kept so far; weights that are not finite are never written."""
    for name, tensor in run.setup.model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise diverged(run, run.global_step, f"{name} is not finite")
    best = run.progress.best
    generators = run.generators()
    if not run.setup.processes.first:
        return
    if best:  # before the checkpoint: a run that goes on from the last one has nothing left to write
        folder.write("best.safetensors", run.encode_weights(best.weights, best.step))
    folder.save(run.global_step, run.encode(generators))


def _weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def go_on(run: Run, folder: RunFolder) -> str:
    """The command that goes on with a run."""
    plugins = (part for path in run.setup.config.plugins for part in ("--plugin", path))
    world = run.setup.processes.world
    together = ["--processes", str(world)] if world > 1 else []  # those of torchrun say it otherwise
    return shlex.join(["dltrain", "train", "--resume", str(folder.path), *plugins, *together])


def is_over(run: Run) -> bool:
    """Whether a run has had its epochs, or `train.patience_epochs` without a better one."""
    settings, at = run.setup.config.train, run.progress
    patience = settings.patience_epochs or math.inf
    return at.epoch >= settings.epochs or (at.best is not None and at.epoch - at.best.epoch >= patience)


class Clock:
    def __init__(self) -> None:
        self.start = perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap."""
        last, self.start = self.start, perf_counter()
        return self.start - last


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that SIGINT or SIGTERM adds its number to; a second SIGINT ends the process as it would without us."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield received
        return

    def receive(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {signum: signal.signal(signum, receive) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
