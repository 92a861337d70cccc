"""What a trained model makes of image files."""

from __future__ import annotations

import stat
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dltrain.data.listing import EXTENSIONS, all_below
from dltrain.data.pictures import Fit, Unreadable, decode, fitted, in_parallel, read
from dltrain.errors import CheckpointError, ConfigError, DataError
from dltrain.evaluate import BATCH, over_views
from dltrain.tasks import predicted, probabilities
from dltrain.text import shortened, shown
from dltrain.trained import Trained

PART = 16  # files that a thread decodes at a time
PICTURED = 60  # images that a picture has room for
NAMED = 10  # unreadable files that an error names
CAPTION = 24  # characters of a line


@dataclass(frozen=True)
class Predictions:
    """What the model makes of the files that could be read.

    outputs: float32 `[N, outputs]` as the model gives them, averaged over the config's views, on the CPU
    images: uint8 `[M, C, H, W]`, the first of the files as the model sees them before they are normalised
    unreadable: the other files, and why
    """

    files: list[Path]
    outputs: torch.Tensor
    images: torch.Tensor
    unreadable: dict[Path, str]
    fit: Fit
    inverted: bool


def find(paths: Sequence[Path]) -> list[Path]:
    """The files themselves, and of each folder the image files in it and below, by name.

    Raises DataError where a path leads to neither, or a folder has no image files.
    """
    found = []
    for path in paths:
        try:
            mode = path.stat().st_mode
        except (OSError, ValueError) as error:  # a NUL in its name
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
            raise DataError(f"{shown(path)}: {reason}; give image files, or folders of them") from None
        if stat.S_ISDIR(mode):
            inside, _ = all_below(path)
            if not inside:
                raise DataError(f"{shown(path)}: no images ({', '.join(EXTENSIONS)}) in this folder or below it")
            found += [path / each.name for each in inside]
        elif stat.S_ISREG(mode):
            found.append(path)
        else:
            raise DataError(f"{shown(path)}: neither a file nor a folder")
    return found


def predict(
    trained: Trained, files: Sequence[Path], *, fit: Fit | None, invert: bool, report: Callable[[str], None]
) -> Predictions:
    """Runs the model over image files, made what it was trained on: its channels and size, and its normalisation.

    fit: how a file of another shape becomes that size; None: as the model's own image folder did it, else crop
    invert: take dark for light, as in a scan of the digits that MNIST has in white on black

    Raises ConfigError where the model names no classes, DataError where no file can be read, CheckpointError where the
    model's images are neither gray nor in colour or its outputs are not finite.
    """
    shape = trained.shape
    if not trained.task.classifies:
        text = f"predict names classes, and this model's task is {trained.config.task.name}"
        raise ConfigError(f"{trained.path}: {text}: `dltrain eval` says how well it does it")
    if shape[0] not in (1, 3):
        raise CheckpointError(f"{trained.path}: takes images of {shape[0]} channels, and a file gives 1 or 3")
    fit = fit or trained.config.data.source.args.get("fit", "crop")
    views = trained.config.evaluate.views

    def load(path: Path) -> np.ndarray[Any, Any]:
        from PIL import ImageOps

        image = decode(read(path), shape)
        return fitted(ImageOps.invert(image) if invert else image, shape, fit)  # so a pad is black to the model

    unreadable: dict[Path, str] = {}
    readable, outputs, images = [], [], torch.empty(0, *shape, dtype=torch.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of metadata that it passes over
        loaded = zip(files, in_parallel(load, files, PART, "reading", report), strict=True)
        while part := list(islice(loaded, BATCH)):
            unreadable |= {file: image.reason for file, image in part if isinstance(image, Unreadable)}
            good = [(file, image) for file, image in part if not isinstance(image, Unreadable)]
            if good:
                batch = torch.from_numpy(np.stack([image for _, image in good]))
                with torch.inference_mode(), trained.placement.autocast():
                    seen, _ = over_views(trained.model, batch.to(trained.placement.device), trained.normalise, views)
                outputs.append(seen.cpu())
                images = torch.cat([images, batch[: PICTURED - len(images)]])
                readable += [file for file, _ in good]
    if not readable:
        raise not_readable(unreadable)
    found = torch.cat(outputs)
    wrong = (~found.isfinite().all(1)).nonzero()
    if len(wrong):
        raise CheckpointError(f"{trained.path}: its outputs for {shown(readable[int(wrong[0])])} are not finite")
    return Predictions(readable, found, images, unreadable, fit, invert)


def not_readable(reasons: dict[Path, str]) -> DataError:
    """A line for each file that cannot be read, up to ten."""
    lines = [f"{shown(path)}: not a readable image: {reason}" for path, reason in list(reasons.items())[:NAMED]]
    if len(reasons) > NAMED:
        lines.append(f"{len(reasons) - NAMED:,} more files cannot be read; --json names all of them")
    return DataError("\n".join(lines))


def plain(trained: Trained, found: Predictions, top: int) -> dict[str, Any]:
    """The predictions, JSON-able: for each file the `top` most likely classes, the predicted one first."""
    order = _scores(found.outputs).sort(dim=1, descending=True, stable=True).indices[:, :top]  # as argmax breaks ties
    shares = probabilities(found.outputs).gather(1, order)
    views = trained.config.evaluate.views
    rows = zip(found.files, order.tolist(), shares.tolist(), strict=True)
    return {
        "checkpoint": str(trained.path),
        "step": trained.step,
        "chosen_by": trained.chosen_by,
        **{key: trained.placement.why[key] for key in ("device", "precision")},
        "shape": list(trained.shape),
        "fit": found.fit,
        "inverted": found.inverted,
        **({"views": len(views)} if views else {}),
        "images": [
            {
                "file": str(file),
                "predicted": trained.classes[numbers[0]],
                "top": [
                    {"class": trained.classes[number], "probability": share}
                    for number, share in zip(numbers, likely, strict=True)
                ],
            }
            for file, numbers, likely in rows
        ],
        "unreadable": {str(file): reason for file, reason in found.unreadable.items()},
    }


def _scores(outputs: torch.Tensor) -> torch.Tensor:
    """`[B, classes]`: what speaks for each class; a sigmoid's one output speaks for class 1, and against class 0."""
    return outputs if outputs.shape[1] > 1 else torch.cat([-outputs, outputs], 1)


def saliency(trained: Trained, found: Predictions) -> torch.Tensor:
    """float32 `[M, H, W]`, for each of `found.images`: how much a pixel moves the output of the predicted class.

    The absolute gradient with respect to the model's input, the largest of the channels' (Simonyan, Vedaldi, Zisserman
    2014, section 3), of the image as it is: views only choose the class.  In fp32 whatever the precision: the weights
    are, and bf16 gradients of so many pixels are coarse.
    """
    inputs = trained.normalise(found.images.to(trained.placement.device)).requires_grad_()
    classes = predicted(found.outputs[: len(found.images)]).to(inputs.device)
    scores = _scores(trained.model(inputs)).gather(1, classes[:, None])
    (gradient,) = torch.autograd.grad(scores.sum(), inputs)  # no image's score depends on another image
    return gradient.abs().amax(1).cpu()


def captions(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The lines below each image of `plain`'s: its file's name, then each of the classes and its probability."""
    return [
        [
            shortened(Path(row["file"]).name, CAPTION),
            *(f"{shortened(each['class'], CAPTION - 9)}: {100 * each['probability']:.1f} %" for each in row["top"]),
        ]
        for row in rows
    ]
