"""One pass over a split."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from time import perf_counter

import torch
from torch import nn
from torch.nn import functional as F

from dltrain.config import View
from dltrain.data.batches import Normalise
from dltrain.data.dataset import Split
from dltrain.data.random import Random
from dltrain.device import Placement
from dltrain.distributed import ALONE, Processes
from dltrain.errors import ConfigError
from dltrain.registry import Component
from dltrain.tasks import Task

BATCH = 500  # images: large enough to keep a device busy, small enough to fit beside a training step


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of a split.

    figures: the task's score, and what else it says of a split each time
    outputs: float32 `[N, …]` as the model gives them, averaged over the views, on the CPU; of a task that keeps some
        alone, those of the first images
    labels: as the split has them
    plain_accuracy: of the images as they are, where loss, accuracy and outputs are over views
    """

    loss: float
    figures: dict[str, float]
    outputs: torch.Tensor
    labels: torch.Tensor
    seconds: float
    plain_accuracy: float | None = None

    def scores(self) -> dict[str, float]:
        plain = {} if self.plain_accuracy is None else {"plain_accuracy": self.plain_accuracy}
        return {"loss": self.loss, **self.figures, **plain}


def evaluate(
    model: nn.Module,
    split: Split,
    normalise: Normalise,
    placement: Placement,
    loss: Component,
    task: Task,
    views: Sequence[View] = (),
    processes: Processes = ALONE,
) -> Evaluation:
    """Runs the model over a split in evaluation mode, and puts it back in the mode it was in.

    views: what of each image its outputs are averaged over; none: the image as it is
    processes: that have the same model, and evaluate a part each; all are given the whole
    """
    start = perf_counter()
    training = model.training
    model.eval()
    outputs: torch.Tensor | None = None
    parts = split.images.split(BATCH)
    labels = split.labels.to(placement.device)
    keep = len(split) if task.kept is None else min(task.kept, len(split))
    losses, scores, plain_scores = [], [], []
    with torch.inference_mode(), placement.autocast():
        for at, images in enumerate(parts):
            own = at % processes.world == processes.rank
            if not own and (at or processes.rank < len(parts)):
                continue  # where there are fewer parts than processes, the others run the first, and it counts once
            images = images.to(placement.device)
            targets = labels[at * BATCH :][: len(images)]
            if views:
                found, plain = over_views(model, images, normalise, views)
                plain_scores.append(task.scores(plain, targets).sum() * own)
            else:
                draw = partial(Random, "evaluation", at, seed=0, epoch=0, index=targets, device=placement.device)
                inputs, targets = task.batch(images, targets, normalise, draw)
                found = model(inputs).float()
            if outputs is None:  # one block: small results between large ones leave holes that nothing large fits in
                outputs = found.new_zeros(keep, *found.shape[1:])
            if own and at * BATCH < keep:
                outputs[at * BATCH : at * BATCH + len(found)] = found[: keep - at * BATCH]
            losses.append(loss(found, targets) * (len(found) * own))
            scores.append(task.scores(found, targets).sum() * own)
        assert outputs is not None  # a split has images

        def mean(sums: list[torch.Tensor]) -> float:
            return processes.add(torch.stack(sums).sum()).item() / len(split)  # waits

        mean_loss, score = mean(losses), mean(scores)
        plain_accuracy = mean(plain_scores) if views else None
        kept = processes.add(outputs).cpu()
    model.train(training)
    figures = {task.score: score, **task.also(kept, split.labels)}
    return Evaluation(mean_loss, figures, kept, split.labels, perf_counter() - start, plain_accuracy)


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
