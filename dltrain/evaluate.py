"""One pass over a split."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter

import torch
from torch import nn

from dltrain.data.batches import Normalise
from dltrain.data.dataset import Split
from dltrain.device import Placement
from dltrain.registry import Component

BATCH = 500  # images: large enough to keep a device busy, small enough to fit beside a training step


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of a split.

    outputs: float32 `[N, outputs]` as the model gives them, on the CPU; labels: int64 `[N]`
    """

    loss: float
    accuracy: float
    outputs: torch.Tensor
    labels: torch.Tensor
    seconds: float

    def scores(self) -> dict[str, float]:
        return {"loss": self.loss, "accuracy": self.accuracy}


def evaluate(model: nn.Module, split: Split, normalise: Normalise, placement: Placement, loss: Component) -> Evaluation:
    """Runs the model over a split in evaluation mode, and puts it back in the mode it was in."""
    start = perf_counter()
    training = model.training
    model.eval()
    outputs = torch.empty(0)
    with torch.inference_mode(), placement.autocast():
        for at, images in enumerate(split.images.split(BATCH)):
            found = model(normalise(images.to(placement.device))).float()
            if not at:  # one block: small results kept between large ones leave holes that nothing large fits in again
                outputs = found.new_empty(len(split), found.shape[1])
            outputs[at * BATCH : at * BATCH + len(found)] = found
        labels = split.labels.to(placement.device)
        mean_loss = loss(outputs, labels)
        correct = (predicted(outputs) == labels).sum()
    model.train(training)
    accuracy = correct.item() / len(labels)  # this waits for the device
    return Evaluation(mean_loss.item(), accuracy, outputs.cpu(), split.labels, perf_counter() - start)


def predicted(outputs: torch.Tensor) -> torch.Tensor:
    """The class that outputs `[B, K]`, or `[B, 1]` of a sigmoid, speak for: int64 `[B]`."""
    return outputs.argmax(1) if outputs.shape[1] > 1 else (outputs[:, 0] > 0).long()


def probabilities(outputs: torch.Tensor) -> torch.Tensor:
    """float32 `[B, classes]`: softmax of `[B, K]` outputs; of `[B, 1]`, the sigmoid and what is left to 1."""
    if outputs.shape[1] > 1:
        return outputs.softmax(1)
    positive = outputs.sigmoid()
    return torch.cat([1 - positive, positive], 1)
