"""Two trained classifiers on the same images: which of them is right where the other is wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dltrain import figures, trained
from dltrain.data.prepare import Prepared
from dltrain.errors import ConfigError
from dltrain.evaluate import Evaluation
from dltrain.statistics import CONFIDENCE, mcnemar
from dltrain.tables import percent
from dltrain.tasks import predicted, probabilities
from dltrain.text import shortened
from dltrain.trained import Trained

SHOWN = 25  # images that the two disagree on, in a figure

Found = dict[str, Any]


def compare(
    paths: Sequence[Path],
    split: str,
    device: str,
    data_root: str | None,
    plugins: Sequence[Path],
    note: Callable[[str], None],
) -> tuple[Found, Callable[[], bytes] | None]:
    """McNemar's test of A and B, two runs or checkpoints, JSON-able, and what draws the images they disagree on.

    The figure is a PNG of those where both are surest; None where they say the same of all.

    Raises ConfigError where classes or images are not the same, and what `trained.load` and `judge` raise of each.
    """
    models = [trained.load(path, device, note, plugins) for path in paths]
    first, second = models
    if first.classes != second.classes:
        raise ConfigError(f"{second.path}: tells other classes apart than {first.path}: no image is right with both")
    data = [trained.data_of(model, data_root, note) for model in models]
    images = _same_images(models, data, split)
    evaluations = [trained.judge_on(model, its, split)[1] for model, its in zip(models, data, strict=True)]
    found = counted(evaluations, split)
    draw = partial(_draw, images, first.classes, evaluations, split) if found["disagree"] else None
    return found, draw


def _same_images(models: Sequence[Trained], data: Sequence[Prepared], split: str) -> torch.Tensor:
    """The split's images, uint8 `[N, C, H, W]`, which are to be the same for both."""
    first, second = (its.split(split) for its in data)
    if not (torch.equal(first.labels, second.labels) and torch.equal(first.images, second.images)):
        which = "; which are held out depends on the seed" if split == "val" else ""
        raise ConfigError(f"{models[1].path}: its {split} images are not those of {models[0].path}{which}")
    return first.images


def counted(evaluations: Sequence[Evaluation], split: str) -> Found:
    """How many images each of A and B alone has right, and what that tells, in numbers and in words."""
    labels = evaluations[0].labels
    guesses = [predicted(each.outputs) for each in evaluations]
    right = [guess == labels for guess in guesses]
    both = int((right[0] & right[1]).sum())
    only_first, only_second = (int(each.sum()) - both for each in right)
    p = mcnemar(only_first, only_second)
    told = "no difference can be told between A and B"
    if p < 1 - CONFIDENCE:
        told = "A is better than B" if only_first > only_second else "B is better than A"
    alone = f"A alone is right on {only_first:,}, B alone on {only_second:,} of {len(labels):,} {split} images"
    return {
        "test": "McNemar's",
        "difference": (only_second - only_first) / len(labels),
        "p": p,
        "images": len(labels),
        "both_right": both,
        "only_first": only_first,
        "only_second": only_second,
        "disagree": int((guesses[0] != guesses[1]).sum()),
        "words": f"{told}: {alone} (p = {p:.2g}, McNemar's exact test)",
    }


def _draw(images: torch.Tensor, classes: Sequence[str], evaluations: Sequence[Evaluation], split: str) -> bytes:
    labels = evaluations[0].labels
    guesses = [predicted(each.outputs) for each in evaluations]
    shares = [probabilities(each.outputs).amax(1) for each in evaluations]
    other = (guesses[0] != guesses[1]).nonzero()[:, 0]
    surest = shares[0].minimum(shares[1])[other].argsort(descending=True, stable=True)
    index = other[surest[:SHOWN]]
    captions = [
        [
            f"{split} image {number}",
            f"is {shortened(classes[int(labels[number])], 18)}",
            *(
                f"{name}: {shortened(classes[int(guess[number])], 14)} {percent(float(share[number]))}"
                for name, guess, share in zip("AB", guesses, shares, strict=True)
            ),
        ]
        for number in index.tolist()
    ]
    return figures.predictions_picture(images[index], captions)
