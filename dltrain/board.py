"""TensorBoard: a view of a run's metrics, with pictures.  Nothing of a run depends on it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from dltrain.evaluate import Evaluation, predicted, probabilities
from dltrain.figures import confusion_picture, image_grid, mistakes_picture
from dltrain.metrics import confusion_matrix, worst_mistakes
from dltrain.state import Run

# a scalar's tag here -> its key in metrics.jsonl
STEP_TAGS = {
    "loss/train": "loss",
    "accuracy/train": "accuracy",
    "learning_rate": "lr",
    "gradient_norm": "gradient_norm",
    "images_per_second": "images_per_second",
}
# of the chosen weights: the metrics of the hparams view -> their split and score
FINAL_TAGS = {f"final/{split}_{score}": (split, score) for split in ("val", "test") for score in ("accuracy", "loss")}


class Board:
    """Writes one run's event file.  Where that fails, it warns once and writes no more."""

    def __init__(self, path: Path, run: Run, warn: Callable[[str], None]) -> None:
        self.run = run
        self.warn = warn
        self.writer: SummaryWriter | None = None
        self.has_examples = run.progress.epoch > 0
        self._try(lambda: self._open(path))

    def step(self, values: Mapping[str, float]) -> None:
        self._scalars({tag: values[key] for tag, key in STEP_TAGS.items()}, self.run.global_step)

    def epoch(self, val: Mapping[str, float] | None, example: Callable[[], torch.Tensor]) -> None:
        """`example`: gives a batch of training images as the model sees them, asked for once."""
        if val:
            self._scalars({"loss/val": val["loss"], "accuracy/val": val["accuracy"]}, self.run.global_step)
        if not self.has_examples:
            self.has_examples = True
            self._try(lambda: self._examples(example()))

    def end(self, scores: Mapping[str, Evaluation], step: int) -> None:
        """The scores of each split with the weights of that step, and pictures of what the test split says of them."""
        final = {tag: scores[split].scores()[score] for tag, (split, score) in FINAL_TAGS.items() if split in scores}
        self._scalars(final, step)
        self._try(lambda: self._pictures(scores["test"], step))
        self._try(lambda: self._summaries(self.session_end))

    def flush(self) -> None:
        self._try(lambda: self.writer.flush() if self.writer else None)

    def close(self) -> None:
        self._try(lambda: self.writer.close() if self.writer else None)

    def _try(self, write: Callable[[], None]) -> None:
        try:
            write()
        except Exception as error:  # a view that fails must not stop a run, in whatever way it fails
            self.writer = None
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            self.warn(f"TensorBoard gets no more of this run: {text}; metrics.jsonl is whole")

    def _open(self, path: Path) -> None:
        # what an earlier process wrote after the step that this one goes on from is hidden by `purge_step`
        self.writer = SummaryWriter(path, purge_step=self.run.global_step + 1 if self.run.global_step else None)
        flat = _flat(self.run.setup.config.plain())
        experiment, start, self.session_end = hparams(flat, dict.fromkeys(FINAL_TAGS, 0.0))
        # add_hparams would do this in a run of its own, which then stands beside this one
        self._summaries(experiment, start)

    def _summaries(self, *summaries: Any) -> None:
        if self.writer:
            events: Any = self.writer.file_writer  # which its type says is None
            for summary in summaries:
                events.add_summary(summary)

    def _scalars(self, values: Mapping[str, float], step: int) -> None:
        def write() -> None:
            if self.writer:
                for tag, value in values.items():
                    self.writer.add_scalar(tag, value, step)

        self._try(write)

    def _examples(self, images: torch.Tensor) -> None:
        if self.writer is None:
            return
        setup = self.run.setup
        pixels = setup.normalise.undo(images[:64]).cpu()
        self.writer.add_image("images/train as the model sees them", image_grid(pixels), self.run.global_step)
        training = setup.model.training
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's graph writer uses torch.jit.trace, which warns that it is old
            self.writer.add_graph(setup.model.eval(), images[:1])
        setup.model.train(training)

    def _pictures(self, test: Evaluation, step: int) -> None:
        if self.writer is None:
            return
        data = self.run.setup.data
        shares = probabilities(test.outputs)
        guesses = predicted(test.outputs)
        matrix = confusion_matrix(guesses, test.labels, len(data.classes))
        self.writer.add_image("test/confusion matrix", confusion_picture(matrix, data.classes), step, dataformats="HWC")
        worst = worst_mistakes(shares, test.labels, 25)
        if len(worst):
            captions = [
                f"{data.classes[guess]} ({100 * share:.0f} %)\nis {data.classes[label]}"
                for guess, share, label in zip(
                    guesses[worst].tolist(), shares[worst].amax(1).tolist(), test.labels[worst].tolist(), strict=True
                )
            ]
            picture = mistakes_picture(data.test.images[worst], captions)
            self.writer.add_image("test/worst mistakes", picture, step, dataformats="HWC")


def _flat(plain: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their whole name, `optim.lr`: numbers, texts and booleans, as the hparams view takes them."""
    flat: dict[str, Any] = {}
    for key, value in plain.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        elif value is not None:
            flat[f"{prefix}{key}"] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat
