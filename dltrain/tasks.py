"""Tasks: what a model is to make of an image, and how well it did.

A task is built of the images' shape (C, H, W), the number of classes and `model.output`.  It says how many numbers the
model gives, what they are compared with, and by which score weights are chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, Protocol

from dltrain.data.dataset import Split
from dltrain.data.random import Random
from dltrain.errors import ConfigError
from dltrain.lazy import F, torch
from dltrain.metrics import classification, confusion_matrix, edit_distance, worst_mistakes
from dltrain.registry import Fraction, register

Shape = tuple[int, ...]
Picture = Any  # NumPy's uint8 [H, W, 3]
Draw = Callable[[str], Random]  # what a batch's randomness of that name comes from


class Task(Protocol):
    """What the program asks of a task.  Images are uint8 `[B, C, H, W]`, labels as the data set has them."""

    score: str  # what is said of each image, and is the higher the better: its mean names the best epoch
    classifies: bool  # whether an image is of one class, so that there are a confusion matrix, views and mixings
    outputs: int  # how many numbers the model gives: of an image, or at each place of a line
    kept: int | None  # of how many images an evaluation keeps the outputs; None: of all

    def check(self, after: Shape, labels: torch.Tensor) -> None:
        """Raises ConfigError where a model's outputs of shape `after`, without the batch, or the labels do not fit."""

    def example(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs that are all zero, and some targets, of n images."""

    def batch(
        self, images: torch.Tensor, labels: torch.Tensor, normalise: Callable[[torch.Tensor], torch.Tensor], draw: Draw
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the model sees of the images, float32 `[B, C, H, W]`, and what a loss compares its outputs with."""

    def scores(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The score of each image, `[B]`: bool, or float64."""

    def also(self, outputs: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """What else is said of a whole split each time, from the outputs that were kept."""

    def report(self, outputs: torch.Tensor, labels: torch.Tensor, names: Sequence[str]) -> dict[str, Any]:
        """Everything that `dltrain eval` says of a split besides, ready for JSON.  names: of the classes"""

    def pictures(self, split: Split, outputs: torch.Tensor, names: Sequence[str]) -> dict[str, Picture]:
        """What to look at of a split, uint8 `[H, W, 3]` by name."""


@register("task", "classification", score="accuracy", classifies=True)
class Classification:
    """Say which class an image is of; its score is the accuracy.

    Targets are labels int64 `[B]`, or after a mixing shares of the classes float32 `[B, classes]`.
    """

    score, classifies, kept = "accuracy", True, None

    def __init__(self, shape: Shape, classes: int, output: str) -> None:
        if output == "sigmoid" and classes != 2:
            text = f"tells two classes apart, the data has {classes}"
            raise ValueError(f"model.output: sigmoid {text}: keep two (data.classes: [3, 7]) or use softmax")
        self.classes = classes
        self.outputs = classes if output == "softmax" else 1

    def check(self, after: Shape, labels: torch.Tensor) -> None:
        if labels.ndim != 1:
            raise ConfigError("task classification: the data's images have a line of labels each: use transcription")
        if after != (self.outputs,):
            text = f"the model gives {_written(after)} numbers, the task needs {self.outputs}"
            raise ConfigError(f"task classification: {text}; end with `- linear: classes`")

    def example(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(n, self.outputs), torch.arange(n) % self.classes

    def batch(
        self, images: torch.Tensor, labels: torch.Tensor, normalise: Callable[[torch.Tensor], torch.Tensor], draw: Draw
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return normalise(images), labels

    def scores(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return predicted(outputs) == labels_of(targets)

    def also(self, outputs: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        return {}

    def report(self, outputs: torch.Tensor, labels: torch.Tensor, names: Sequence[str]) -> dict[str, Any]:
        return classification(probabilities(outputs), labels, names)

    def pictures(self, split: Split, outputs: torch.Tensor, names: Sequence[str]) -> dict[str, Picture]:
        from dltrain import figures

        likely, guesses = probabilities(outputs), predicted(outputs)
        matrix = confusion_matrix(guesses, split.labels, len(names))
        found = {"confusion matrix": figures.confusion_picture(matrix, names)}
        worst = worst_mistakes(likely, split.labels, 25)
        if len(worst):
            rows = zip(
                guesses[worst].tolist(), likely[worst].amax(1).tolist(), split.labels[worst].tolist(), strict=True
            )
            captions = [f"{names[guess]} ({100 * share:.0f} %)\nis {names[label]}" for guess, share, label in rows]
            found["worst mistakes"] = figures.mistakes_picture(split.images[worst], captions)
        return found


@register("task", "reconstruction", score="psnr", classifies=False)
class Reconstruction:
    """Give the image back, as auto-encoders do; its score is the peak signal-to-noise ratio in dB.

    The sigmoid of the outputs, `[B, C, H, W]` or as many numbers in a row, are pixels in 0..1; targets are the images'
    own pixels, float32 `[B, C, H, W]`, after augmentation and before noise.

    noise: share of full brightness that is the standard deviation of Gaussian noise on what the model sees, in training
        and in evaluation; pixels stay within 0..1 (a denoising auto-encoder: Vincent et al. 2008)
    """

    score, classifies, kept = "psnr", False, 64

    def __init__(self, shape: Shape, classes: int, output: str, *, noise: Fraction = 0.0) -> None:
        if output != "sigmoid":
            raise ValueError(f"model.output: {output} is of classes, pixels are of a sigmoid: set it to sigmoid")
        self.shape = shape
        self.outputs = prod(shape)
        self.noise = noise

    def check(self, after: Shape, labels: torch.Tensor) -> None:
        if prod(after) != self.outputs:
            text = f"the model gives {_written(after)} numbers, the images have {_written(self.shape)}"
            raise ConfigError(f"task reconstruction: {text}; end with as many")

    def example(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(n, self.outputs), torch.zeros(n, *self.shape)

    def batch(
        self, images: torch.Tensor, labels: torch.Tensor, normalise: Callable[[torch.Tensor], torch.Tensor], draw: Draw
    ) -> tuple[torch.Tensor, torch.Tensor]:
        targets = images / 255
        if not self.noise:
            return normalise(images), targets
        random = draw("noise")
        noise = random.normal(*images.shape)
        return normalise((targets + self.noise * noise).clamp_(0, 1) * 255), targets

    def scores(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """-10 log10 of the mean squared error of an image's pixels; at most 100, where the error is next to nothing."""
        errors = (self.pixels(outputs) - targets).flatten(1).double().square().mean(1)
        return -10 * errors.clamp(min=1e-10).log10()

    def pixels(self, outputs: torch.Tensor) -> torch.Tensor:
        """float32 `[B, C, H, W]` in 0..1."""
        return outputs.float().view(-1, *self.shape).sigmoid()

    def also(self, outputs: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        return {}

    def report(self, outputs: torch.Tensor, labels: torch.Tensor, names: Sequence[str]) -> dict[str, Any]:
        return {"images": len(labels)}

    def pictures(self, split: Split, outputs: torch.Tensor, names: Sequence[str]) -> dict[str, Picture]:
        from dltrain import figures

        return {"reconstructions": figures.pairs_picture(split.images[: len(outputs)], self.pixels(outputs))}


@register("task", "transcription", score="accuracy", classifies=False)
class Transcription:
    """Read a line of symbols whose places are not known, by connectionist temporal classification (Graves et al. 2006).

    The model gives `[B, classes + 1, T]`: at each place from left to right an output for each class, and the last one
    for none (the blank).  Targets are the lines' labels int64 `[B, L]`, with -1 after a line's end.  A line is read by
    the largest output at each place, repetitions and blanks left out; its score is whether every symbol is right.
    """

    score, classifies, kept = "accuracy", False, None

    def __init__(self, shape: Shape, classes: int, output: str) -> None:
        if output != "softmax":
            raise ValueError(f"model.output: {output} is of two classes or pixels: set model.output: softmax")
        self.classes = classes
        self.outputs = classes + 1

    def check(self, after: Shape, labels: torch.Tensor) -> None:
        if labels.ndim != 2:
            raise ConfigError("task transcription: the data's images have one label each: use classification")
        if len(after) != 2 or after[0] != self.outputs:
            text = f"the model gives {_written(after)} numbers, expected {self.outputs} (the classes, and one for none)"
            raise ConfigError(f"task transcription: {text} x places; end with `- conv1d: {{out: classes, kernel: 1}}`")
        equal = (labels[:, 1:] == labels[:, :-1]) & (labels[:, 1:] >= 0)
        needed = int(((labels >= 0).sum(1) + equal.sum(1)).max())
        if after[1] < needed:
            text = (
                f"the model gives {after[1]} places, a line needs {needed} (a symbol each, and one between equal ones)"
            )
            raise ConfigError(f"task transcription: {text}")

    def example(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(n, self.outputs, 2), torch.zeros(n, 1, dtype=torch.int64)

    def batch(
        self, images: torch.Tensor, labels: torch.Tensor, normalise: Callable[[torch.Tensor], torch.Tensor], draw: Draw
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return normalise(images), labels

    def scores(self, outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        read = read_lines(outputs)
        length = max(read.shape[1], targets.shape[1])
        read, targets = (F.pad(lines, (0, length - lines.shape[1]), value=-1) for lines in (read, targets))
        return (read == targets).all(1)

    def also(self, outputs: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """character_error_rate: insertions, deletions and substitutions, over the symbols that there are."""
        lines = [[symbol for symbol in line if symbol >= 0] for line in labels.tolist()]
        found = [[symbol for symbol in line if symbol >= 0] for line in read_lines(outputs).tolist()]
        edits = sum(map(edit_distance, found, lines))
        return {"character_error_rate": edits / sum(map(len, lines))}

    def report(self, outputs: torch.Tensor, labels: torch.Tensor, names: Sequence[str]) -> dict[str, Any]:
        accuracy = self.scores(outputs, labels).double().mean().item()
        return {"images": len(labels), "accuracy": accuracy, **self.also(outputs, labels)}

    def pictures(self, split: Split, outputs: torch.Tensor, names: Sequence[str]) -> dict[str, Picture]:
        """The first lines with what is read, those that are read wrong before the others."""
        from dltrain import figures

        order = self.scores(outputs, split.labels).long().argsort(stable=True)[:20]

        def text(line: list[int]) -> str:
            return " ".join(names[symbol] for symbol in line if symbol >= 0)

        read, true = read_lines(outputs[order]).tolist(), split.labels[order].tolist()
        captions = [f"{text(one)}\nis {text(other)}" for one, other in zip(read, true, strict=True)]
        return {"lines": figures.mistakes_picture(split.images[order], captions)}


def read_lines(outputs: torch.Tensor) -> torch.Tensor:
    """The lines that outputs `[B, classes + 1, T]` speak for: int64 `[B, T]`, with -1 after a line's end."""
    likeliest = outputs.argmax(1)
    blank = outputs.shape[1] - 1
    repeated = F.pad(likeliest[:, 1:] == likeliest[:, :-1], (1, 0))
    counts = (likeliest != blank) & ~repeated
    order = (~counts).long().argsort(dim=1, stable=True)  # what counts first, in its order
    return likeliest.masked_fill(~counts, -1).gather(1, order)


def predicted(outputs: torch.Tensor) -> torch.Tensor:
    """The class that outputs `[B, K]`, or `[B, 1]` of a sigmoid, speak for: int64 `[B]`."""
    return outputs.argmax(1) if outputs.shape[1] > 1 else (outputs[:, 0] > 0).long()


def probabilities(outputs: torch.Tensor) -> torch.Tensor:
    """float32 `[B, classes]`: softmax of `[B, K]` outputs; of `[B, 1]`, the sigmoid and what is left to 1."""
    if outputs.shape[1] > 1:
        return outputs.softmax(1)
    positive = outputs.sigmoid()
    return torch.cat([1 - positive, positive], 1)


def shares(targets: torch.Tensor, classes: int) -> torch.Tensor:
    """Targets as shares of the classes, float32 `[B, classes]`: labels int64 `[B]` as ones; shares as they are."""
    return targets if targets.is_floating_point() else F.one_hot(targets, classes).float()


def labels_of(targets: torch.Tensor) -> torch.Tensor:
    """The class with the largest share, int64 `[B]`; labels as they are."""
    return targets.argmax(1) if targets.is_floating_point() else targets


def _written(shape: Shape) -> str:
    return "x".join(map(str, shape))
