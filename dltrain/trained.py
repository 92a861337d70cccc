"""A trained model from a checkpoint: nothing but the file, and the data to judge it on, is needed."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError
from torch import nn

from dltrain import checkpoint, rundir
from dltrain import config as configs
from dltrain.build import build_model, load_data, loss_of, task_of
from dltrain.config import Config
from dltrain.data.batches import Normalise
from dltrain.data.prepare import Normalisation, Prepared
from dltrain.device import Placement, place
from dltrain.errors import CheckpointError, ConfigError
from dltrain.evaluate import Evaluation, check_views, evaluate
from dltrain.registry import NonNegativeInt, Positive, PositiveInt
from dltrain.tasks import Task, predicted, probabilities


class _Pixels(BaseModel):
    model_config = ConfigDict(strict=True)

    mean: list[FiniteFloat]
    std: list[Positive]


class _Data(BaseModel):
    model_config = ConfigDict(strict=True)

    files: dict[str, str]


class _Bits(BaseModel):
    model_config = ConfigDict(strict=True)

    device: str
    arithmetic: str


class _Meta(BaseModel):
    """What of a checkpoint's metadata its model needs; docs/checkpoint.md describes all of it."""

    model_config = ConfigDict(strict=True)

    step: NonNegativeInt
    config: dict[str, Any]
    classes: Annotated[list[str], Field(min_length=2, max_length=1 << 20)]
    shape: Annotated[list[PositiveInt], Field(min_length=3, max_length=3)]
    normalisation: _Pixels
    data: _Data
    bits: _Bits


@dataclass(frozen=True)
class Trained:
    """A model with what is needed to use it."""

    path: Path
    config: Config
    model: nn.Module
    task: Task
    classes: tuple[str, ...]
    shape: tuple[int, int, int]
    normalise: Normalise
    placement: Placement
    files: dict[str, str]  # the data it was trained on: name -> digest
    step: int
    chosen_by: str  # what named this step: val_accuracy, val_psnr, val_loss or last


def _read(path: Path, warn: Callable[[str], None]) -> tuple[Path, dict[str, torch.Tensor], dict[str, Any]]:
    """The file itself, or of a run's folder the weights that it chose, else its last ones."""
    if not path.is_dir():
        return (path, *checkpoint.read(path))
    best = path / "best.safetensors"
    if best.exists():
        return (best, *checkpoint.read(best))
    found = rundir.latest(path, lambda each: (each, *checkpoint.read(each)), warn)
    if found is None:
        raise CheckpointError(f"{path}: holds no checkpoint (best.safetensors or checkpoints/step-*.safetensors)")
    return found


def load(path: Path, device: str, warn: Callable[[str], None], plugins: Sequence[Path] = ()) -> Trained:
    """Reads a checkpoint file or a run's folder.  Raises CheckpointError where it is not usable; runs nothing of it.

    plugins: files with components that the user trusts
    """
    path, tensors, found = _read(path, warn)
    try:
        meta = _Meta.model_validate(found)
        config = configs.from_plain(meta.config, str(path), plugins=plugins)
        check_views(config.evaluate.views, meta.shape)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise CheckpointError(f"{path}: its metadata: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    except ConfigError as error:
        raise CheckpointError(f"{path}: its config is not valid here: {str(error).splitlines()[0]}") from None
    channels, height, width = meta.shape
    normalisation = Normalisation(meta.normalisation.mean, meta.normalisation.std)
    if {len(normalisation.mean), len(normalisation.std)} != {channels}:
        raise CheckpointError(f"{path}: its metadata: normalisation: expected {channels} means and deviations")
    if any(name.startswith("average.") for name in tensors):
        warn(f"{path}: these are the weights that were trained; the averaged ones are in a run's best.safetensors")
    classes = tuple(meta.classes)
    weights = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}
    try:
        with torch.device("meta"):  # no memory is taken until the shapes are known to be the file's
            model = build_model(config, (channels, height, width), len(classes))
        loss = loss_of(config, torch.arange(len(classes)), len(classes))  # balanced weights need data: here, all one
        task = task_of(config, (channels, height, width), len(classes))
        loss.build(*task.example(2))
    except (ConfigError, RuntimeError, TypeError, ValueError) as error:  # torch's, for sizes that overflow
        raise CheckpointError(f"{path}: its config builds no model: {str(error).splitlines()[0]}") from None
    checkpoint.check_fit(path, model, weights)
    checkpoint.load_weights(model, weights, assign=True)
    placement = place(device, config.train.precision, config.train.memory_format, model, recorded=dict(meta.bits))
    placement.take(model)
    model.eval()
    normalise = Normalise(normalisation, placement.device, placement.memory_format)
    shape = (channels, height, width)
    chosen_by = "last" if "progress" in found else config.chosen_by  # a step's file is whatever was last saved
    files = meta.data.files
    return Trained(path, config, model, task, classes, shape, normalise, placement, files, meta.step, chosen_by)


def data_of(trained: Trained, data_root: str | None, note: Callable[[str], None]) -> Prepared:
    """The data that the model was configured for.  Raises CheckpointError where it is of other classes or sizes."""
    data = load_data(trained.config, data_root, note)
    if data.classes != trained.classes or data.shape != trained.shape:
        found = f"{len(data.classes)} classes of {list(data.shape)} images"
        raise CheckpointError(
            f"{trained.path}: was trained on {len(trained.classes)} classes of {list(trained.shape)} images, "
            f"the data set has {found} or names them otherwise"
        )
    if data.files != trained.files:
        note("the data files are not the ones that this model was trained on: their digests differ")
    return data


def judge(
    trained: Trained, split: str, data_root: str | None, note: Callable[[str], None]
) -> tuple[dict[str, Any], Evaluation]:
    """The model's scores on a split of the data it was configured for, JSON-able, and what they come from."""
    return judge_on(trained, data_of(trained, data_root, note), split)


def judge_on(trained: Trained, data: Prepared, split: str) -> tuple[dict[str, Any], Evaluation]:
    """As `judge`, on data that is read already."""
    loss = loss_of(trained.config, data.train.labels, len(data.classes))
    views = trained.config.evaluate.views
    asked = data.split(split)
    evaluation = evaluate(trained.model, asked, trained.normalise, trained.placement, loss, trained.task, views)
    scores = trained.task.report(evaluation.outputs, evaluation.labels, trained.classes)
    return {
        "checkpoint": str(trained.path),
        "step": trained.step,
        "data": trained.config.data.source.name,
        "data_verified": data.verified,
        "split": split,
        "chosen_by": trained.chosen_by,
        **{key: trained.placement.why[key] for key in ("device", "precision")},
        **({"views": len(views)} if views else {}),
        "task": trained.config.task.name,
        **evaluation.scores(),
        "images_per_second": round(len(evaluation.labels) / evaluation.seconds, 1),
        **scores,
    }, evaluation


def predictions_csv(trained: Trained, found: Evaluation) -> str:
    """A row an image, in the split's order: index, true and predicted class, whether right, the probabilities.

    Raises ConfigError where the model names no classes.
    """
    if not trained.task.classifies:
        raise ConfigError(f"--out lists classes of images, and this model's task is {trained.config.task.name}")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["index", "true", "predicted", "correct", *(f"p_{name}" for name in trained.classes)])
    shares, guesses = probabilities(found.outputs), predicted(found.outputs)
    rows = zip(found.labels.tolist(), guesses.tolist(), shares.tolist(), strict=True)
    for index, (label, guess, row) in enumerate(rows):
        names = [trained.classes[label], trained.classes[guess]]
        writer.writerow([index, *names, int(label == guess), *(f"{share:.6g}" for share in row)])
    return text.getvalue()
