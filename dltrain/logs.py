"""What a run tells while it trains: metrics.jsonl, and two views of it, the terminal and TensorBoard."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from dltrain.board import Board
from dltrain.layerstats import layer_statistics
from dltrain.rundir import RunFolder
from dltrain.state import Run
from dltrain.tables import say, score, warn


class Log:
    """Writes each record to metrics.jsonl first, then shows it."""

    def __init__(self, folder: RunFolder, console: Console, quiet: bool) -> None:
        self.folder = folder
        self.console = console
        self.quiet = quiet
        self.board: Board | None = None
        self.progress: Progress | None = None
        self.task = TaskID(0)

    def flush(self) -> None:
        """Brings TensorBoard's file up to date, as far as a checkpoint is about to go."""
        if self.board:
            self.board.flush()

    def close(self) -> None:
        if self.board:
            self.board.close()

    def note(self, text: str) -> None:
        """Something a user should know once."""
        if not self.quiet:
            say(self.console, text)

    def begin(self, run: Run) -> AbstractContextManager[Any]:
        """Opens TensorBoard's file and, on a terminal, the progress bar, which the result ends."""
        if not run.setup.processes.first:
            return nullcontext()
        self.board = Board(self.folder.path, run, warn)
        if self.quiet or not self.console.is_terminal:
            return nullcontext()
        narrow = self.console.width < 70
        columns = [TextColumn("{task.description}"), BarColumn(bar_width=None), TextColumn("{task.fields[scores]}")]
        if not narrow:
            columns.append(TextColumn("{task.fields[rate]}"))
        self.progress = Progress(*columns, TimeRemainingColumn(compact=True), console=self.console, transient=True)
        total = run.setup.config.train.epochs * run.setup.steps_per_epoch
        self.task = self.progress.add_task("", total=total, completed=run.global_step, scores="", rate="")
        return self.progress

    def step(self, run: Run, scores: dict[str, float], **values: float) -> None:
        """scores: loss and the task's score since the last such line; values: lr, gradient_norm, images_per_second."""
        epochs = run.setup.config.train.epochs
        at = run.progress
        self.folder.append({"kind": "step", "step": run.global_step, "epoch": at.epoch + 1, **scores, **values})
        if self.board:
            self.board.step(scores, values)
        if self.progress:
            self.progress.update(
                self.task,
                completed=run.global_step,
                description=f"epoch {at.epoch + 1}/{epochs}",
                scores=f"loss {scores['loss']:.3f} {self._score(run, scores)}",
                rate=f"{values['images_per_second']:,.0f} images/s",
            )

    def _score(self, run: Run, scores: dict[str, float]) -> str:
        return score(run.setup.task.score, scores[run.setup.task.score])

    def epoch(
        self,
        run: Run,
        train: dict[str, float],
        val: dict[str, float] | None,
        example: Callable[[], torch.Tensor],
    ) -> None:
        """The scores of an epoch: `train` over its batches as they were trained on, `val` after it.

        example: gives a batch of training images as the model sees them, float32 `[B, C, H, W]`
        """
        seconds = run.progress.epoch_seconds
        epoch, epochs = run.progress.epoch, run.setup.config.train.epochs
        record = {
            "kind": "epoch",
            "step": run.global_step,
            "epoch": epoch,
            "train": train,
            "val": val,
            "seconds": seconds,
        }
        self.folder.append(record)
        if self.board:
            self.board.epoch(val, example)
        if run.setup.config.tensorboard.layers and run.setup.processes.first:
            found = layer_statistics(run.setup)
            self.folder.append({"kind": "layers", "step": run.global_step, "epoch": epoch, **found})
            if self.board:
                self.board.layers(found)
        if self.quiet:
            return
        parts = [
            f"epoch {epoch:>{len(str(epochs))}}/{epochs}",
            f"train loss {train['loss']:.4f} {self._score(run, train):>8}",
        ]
        if val:
            parts += [f"val loss {val['loss']:.4f} {self._score(run, val):>8}"]
        parts += [f"{f'{seconds:.3g} s':>7}"]
        if run.setup.config.chosen_by != "last" and run.progress.best and run.progress.best.epoch == epoch:
            parts += ["best"]
        if self.console.is_terminal and self.console.width < 70:
            parts = [f"{epoch}/{epochs}", f"loss {train['loss']:.3f}", self._score(run, val or train), *parts[-1:]]
        self.note("  ".join(parts))
