"""A trained model from a checkpoint: nothing but the file, and the data to judge it on, is needed."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dltrain import checkpoint, rundir
from dltrain import config as configs
from dltrain.build import build_model, load_data
from dltrain.config import Config
from dltrain.data.batches import Normalise
from dltrain.data.prepare import Normalisation
from dltrain.device import Placement, place
from dltrain.errors import CheckpointError, ConfigError
from dltrain.evaluate import Evaluation, evaluate, predicted, probabilities
from dltrain.metrics import classification

MAX_PIXELS = 1 << 24  # of an image, as a checkpoint states its shape
MAX_CLASSES = 1 << 20


@dataclass(frozen=True)
class Trained:
    """A model with what is needed to use it."""

    path: Path
    config: Config
    model: nn.Module
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    normalise: Normalise
    placement: Placement
    files: dict[str, str]  # the data it was trained on: name -> digest
    step: int


def find_checkpoint(path: Path) -> Path:
    """The file to use for a file or a run folder: the weights that the run chose, else its last ones."""
    if not path.is_dir():
        return path
    if (path / "best.safetensors").exists():
        return path / "best.safetensors"
    found = rundir.steps(path)
    if not found:
        raise CheckpointError(f"{path}: holds no checkpoint (best.safetensors or checkpoints/step-*.safetensors)")
    return found[0]


def load(path: Path, device: str = "auto") -> Trained:
    """Reads a checkpoint file or a run's folder.  Raises CheckpointError where it is not usable; runs nothing of it."""
    path = find_checkpoint(path)
    tensors, meta = checkpoint.read(path)
    try:
        config = configs.from_plain(meta["config"], str(path))
        classes = tuple(str(name) for name in meta["classes"])
        channels, height, width = (int(size) for size in meta["shape"])
        normalisation = Normalisation(
            **{key: [float(x) for x in meta["normalisation"][key]] for key in ("mean", "std")}
        )
        files = {str(name): str(digest) for name, digest in meta["data"]["files"].items()}
        step = int(meta["step"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: its metadata is incomplete: {type(error).__name__} {error}") from None
    except ConfigError as error:
        raise CheckpointError(f"{path}: its config is not valid here: {str(error).splitlines()[0]}") from None
    pixels = channels * height * width
    sane = min(channels, height, width) > 0 and pixels <= MAX_PIXELS and 2 <= len(classes) <= MAX_CLASSES
    if not sane or {len(normalisation.mean), len(normalisation.std)} != {channels}:
        raise CheckpointError(f"{path}: its metadata states an impossible shape, number of classes or normalisation")
    weights = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
    try:
        with torch.device("meta"):  # no memory is taken until the shapes are known to be the file's
            model = build_model(config, (channels, height, width), len(classes))
    except ConfigError as error:
        raise CheckpointError(f"{path}: its config builds no model: {error}") from None
    checkpoint.check_fit(path, model, weights)
    model.load_state_dict(weights, assign=True)
    placement = place(device, config.train.precision, config.train.memory_format, model)
    placement.take(model)
    model.eval()
    normalise = Normalise(normalisation, placement.device, placement.memory_format)
    shape = (channels, height, width)
    return Trained(path, config, model, classes, shape, normalise, placement, files, step)


def judge(
    trained: Trained, split: str, data_root: str | None, note: Callable[[str], None]
) -> tuple[dict[str, Any], Evaluation]:
    """The model's scores on a split of the data it was configured for, JSON-able, and what they come from."""
    data = load_data(trained.config, data_root, note)
    if data.classes != trained.classes or data.shape != trained.shape:
        found = f"{len(data.classes)} classes of {list(data.shape)} images"
        raise CheckpointError(
            f"{trained.path}: was trained on {len(trained.classes)} classes of {list(trained.shape)} images, "
            f"the data set has {found} or names them otherwise"
        )
    if data.files != trained.files:
        note("the data files are not the ones that this model was trained on: their digests differ")
    evaluation = evaluate(trained.model, data.split(split), trained.normalise, trained.placement, trained.config.loss)
    scores = classification(probabilities(evaluation.outputs), evaluation.labels, trained.classes)
    return {
        "checkpoint": str(trained.path),
        "step": trained.step,
        "data": trained.config.data.source.name,
        "data_verified": data.verified,
        "split": split,
        "chosen_by": trained.config.chosen_by,
        **{key: trained.placement.why[key] for key in ("device", "precision")},
        "loss": evaluation.loss,
        "images_per_second": round(len(evaluation.labels) / evaluation.seconds, 1),
        **scores,
    }, evaluation


def predictions_csv(trained: Trained, found: Evaluation) -> str:
    """A row an image, in the split's order: index, true and predicted class, whether right, the probabilities."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["index", "true", "predicted", "correct", *(f"p_{name}" for name in trained.classes)])
    shares, guesses = probabilities(found.outputs), predicted(found.outputs)
    rows = zip(found.labels.tolist(), guesses.tolist(), shares.tolist(), strict=True)
    for index, (label, guess, row) in enumerate(rows):
        names = [trained.classes[label], trained.classes[guess]]
        writer.writerow([index, *names, int(label == guess), *(f"{share:.6g}" for share in row)])
    return text.getvalue()
