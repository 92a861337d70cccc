"""Mixings: each image of a batch with another one, and their targets in the same shares.

Images are uint8 `[B, C, H, W]`, targets float32 `[B, classes]`, rows that add up to 1.  The share is drawn once for a
batch, as in the papers' code; which image goes with which, anew for each batch.
"""

from __future__ import annotations

from dltrain.data.random import Random
from dltrain.lazy import torch
from dltrain.registry import Fraction, Positive, register


@register("mixing")
def mixup(
    images: torch.Tensor, targets: torch.Tensor, random: Random, *, alpha: Positive = 1.0, probability: Fraction = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Blends each image and its target with those of another image of the batch (Zhang et al. 2018).

    alpha: a batch's images keep a share drawn from Beta(alpha, alpha); near 0: little blending; 1: any share alike
    probability: share of the batches that are blended

    Blended pixels are rounded to whole levels, by at most half a level of 255.
    """
    keep = torch.where(_chosen(random, probability), random.beta(alpha, 1), 1)
    partner = random.permutation(len(images))
    others = images.index_select(0, partner).float()
    blended = torch.lerp(others, images.float(), keep).round_().to(torch.uint8)
    return blended, torch.lerp(targets[partner], targets, keep)


@register("mixing")
def cutmix(
    images: torch.Tensor, targets: torch.Tensor, random: Random, *, alpha: Positive = 1.0, probability: Fraction = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Puts a box of another image of the batch into each image, and shares the target by area (Yun et al. 2019).

    alpha: a batch's images keep a share of their area drawn from Beta(alpha, alpha), and more where the box, whose
        centre may be any pixel, is clipped at the border
    probability: share of the batches that are mixed
    """
    _, _, height, width = images.shape
    side = (1 - random.beta(alpha, 1)).sqrt() * _chosen(random, probability)  # of the box, as a share of the image's
    rows, columns = _span(height, side, random), _span(width, side, random)
    box = rows[:, None] & columns  # [H, W]
    partner = random.permutation(len(images))
    keep = 1 - box.sum() / (height * width)  # the area that the box covers after clipping
    return (
        torch.where(box, images.index_select(0, partner), images),
        torch.lerp(targets[partner], targets, keep),
    )


def _chosen(random: Random, probability: float) -> torch.Tensor:
    """bool `[1]`: whether this batch is mixed."""
    return random.uniform(1) < probability


def _span(length: int, side: torch.Tensor, random: Random) -> torch.Tensor:
    """bool `[length]`: the places within half of `side` (float32 `[1]`, a share of the length) of a random centre."""
    half = (side * length / 2).floor()
    place = torch.arange(length, device=side.device) - random.integers(length, 1)
    return (place >= -half) & (place < half)
