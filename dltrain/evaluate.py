"""One pass over a split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import nn
from torch.nn import functional as F

from dltrain.config import View
from dltrain.data.batches import Normalise
from dltrain.data.dataset import Split
from dltrain.device import Placement
from dltrain.errors import ConfigError
from dltrain.registry import Component

BATCH = 500  # images: large enough to keep a device busy, small enough to fit beside a training step


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of a split.

    outputs: float32 `[N, outputs]` as the model gives them, averaged over the views, on the CPU; labels: int64 `[N]`
    plain_accuracy: of the images as they are, where loss, accuracy and outputs are over views
    """

    loss: float
    accuracy: float
    outputs: torch.Tensor
    labels: torch.Tensor
    seconds: float
    plain_accuracy: float | None = None

    def scores(self) -> dict[str, float]:
        plain = {} if self.plain_accuracy is None else {"plain_accuracy": self.plain_accuracy}
        return {"loss": self.loss, "accuracy": self.accuracy, **plain}


def evaluate(
    model: nn.Module,
    split: Split,
    normalise: Normalise,
    placement: Placement,
    loss: Component,
    views: Sequence[View] = (),
) -> Evaluation:
    """Runs the model over a split in evaluation mode, and puts it back in the mode it was in.

    views: what of each image its outputs are averaged over; none: the image as it is
    """
    start = perf_counter()
    training = model.training
    model.eval()
    outputs = torch.empty(0)
    labels = split.labels.to(placement.device)
    plain_correct = torch.zeros((), dtype=torch.int64, device=placement.device)
    with torch.inference_mode(), placement.autocast():
        for at, images in enumerate(split.images.split(BATCH)):
            found, plain = over_views(model, images.to(placement.device), normalise, views)
            if not at:  # one block: small results kept between large ones leave holes that nothing large fits in again
                outputs = found.new_empty(len(split), found.shape[1])
            outputs[at * BATCH : at * BATCH + len(found)] = found
            if views:
                plain_correct += (predicted(plain) == labels[at * BATCH :][: len(plain)]).sum()
        mean_loss = loss(outputs, labels)
        correct = (predicted(outputs) == labels).sum()
    model.train(training)
    accuracy = correct.item() / len(labels)  # this waits for the device
    plain_accuracy = plain_correct.item() / len(labels) if views else None
    seconds = perf_counter() - start
    return Evaluation(mean_loss.item(), accuracy, outputs.cpu(), split.labels, seconds, plain_accuracy)


def over_views(
    model: nn.Module, images: torch.Tensor, normalise: Normalise, views: Sequence[View]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's outputs for images uint8 `[B, C, H, W]`: averaged over the views, and of the images as they are.

    Both are float32 `[B, outputs]`; without views they are the same.  The average is of what the model gives before
    any softmax or sigmoid, as in Jordan 2024 (arXiv 2404.00498, section 3.5).
    """
    plain = model(normalise(images)).float()
    if not views:
        return plain, plain
    total = sum(view.weight for view in views)
    mean = torch.zeros_like(plain)
    for view in views:
        changed = view.mirror or any(view.shift)
        outputs = model(normalise(view_of(images, view))).float() if changed else plain
        mean.add_(outputs, alpha=view.weight / total)
    return mean, plain


def view_of(images: torch.Tensor, view: View) -> torch.Tensor:
    """Images uint8 `[B, C, H, W]` shifted, then mirrored, as the view says: of the same shape and dtype."""
    down, right = view.shift
    if down or right:
        height, width = images.shape[2:]
        border = [max(right, 0), max(-right, 0), max(down, 0), max(-down, 0)]
        mode = "constant" if view.pad == "zero" else view.pad
        padded = F.pad(images.float(), border, mode)  # which reflects no bytes
        top, left = max(-down, 0), max(-right, 0)
        images = padded[:, :, top : top + height, left : left + width].to(images.dtype)
    return images.flip(3) if view.mirror else images


def check_views(views: Sequence[View], shape: Sequence[int]) -> None:
    """Raises ConfigError where a view shifts images of this shape, (channels, height, width), out of sight."""
    _, height, width = shape
    for number, view in enumerate(views):
        down, right = view.shift
        if abs(down) >= height or abs(right) >= width:
            most = f"at most {height - 1} down or up and {width - 1} right or left of {height}x{width} images"
            raise ConfigError(f"evaluate.views.{number}.shift: expected {most}, got [{down}, {right}]")


def predicted(outputs: torch.Tensor) -> torch.Tensor:
    """The class that outputs `[B, K]`, or `[B, 1]` of a sigmoid, speak for: int64 `[B]`."""
    return outputs.argmax(1) if outputs.shape[1] > 1 else (outputs[:, 0] > 0).long()


def probabilities(outputs: torch.Tensor) -> torch.Tensor:
    """float32 `[B, classes]`: softmax of `[B, K]` outputs; of `[B, 1]`, the sigmoid and what is left to 1."""
    if outputs.shape[1] > 1:
        return outputs.softmax(1)
    positive = outputs.sigmoid()
    return torch.cat([1 - positive, positive], 1)
