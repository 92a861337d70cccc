"""TensorBoard: a view of a run's metrics, with pictures.  Nothing of a run depends on it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from dltrain.build import Setup
from dltrain.data.dataset import Split
from dltrain.evaluate import Evaluation
from dltrain.figures import filter_picture, grey_or_colour, image_grid, sprite
from dltrain.state import Run
from dltrain.tasks import predicted, probabilities

# a scalar's tag here -> its key in metrics.jsonl
STEP_TAGS = {
    "learning_rate": "lr",
    "gradient_norm": "gradient_norm",
    "images_per_second": "images_per_second",
}
# what the layers are compared by, all in one chart: its title -> the tags that it draws
LAYER_CHARTS = {
    title: ["Multiline", [f"layers/{key}/.*"]]
    for title, key in {
        "gradient norm": "gradient_norm",
        "weight norm": "weight_norm",
        "mean of the activations": "mean",
        "standard deviation of the activations": "std",
        "share of zeros": "zeros",
        "share of dead units": "dead",
    }.items()
}
BINS = 64  # of a histogram, which TensorBoard draws with 30
EMBEDDED = 1000  # test images: t-SNE in the browser takes minutes for many more


class Board:
    """Writes one run's event file.  Where that fails, it warns once and writes no more."""

    def __init__(self, path: Path, run: Run, warn: Callable[[str], None]) -> None:
        self.path = path
        self.run = run
        self.warn = warn
        self.shows = run.setup.config.tensorboard
        self.has_examples = run.progress.epoch > 0
        self.writer: SummaryWriter | None = None
        try:
            # what an earlier process wrote after the step that this one goes on from is hidden by `purge_step`
            self.writer = SummaryWriter(path, purge_step=run.global_step + 1 if run.global_step else None)
        except Exception as error:
            self._give_up(error)
        self._try(self._begin)

    def _final_tags(self) -> dict[str, tuple[str, str]]:
        """Of the chosen weights: the metrics of the hparams view -> their split and score."""
        scores = (self.run.setup.task.score, "loss")
        return {f"final/{split}_{score}": (split, score) for split in ("val", "test") for score in scores}

    def step(self, scores: Mapping[str, float], values: Mapping[str, float]) -> None:
        tags = {f"{name}/train": value for name, value in scores.items()}
        self._scalars({**tags, **{tag: values[key] for tag, key in STEP_TAGS.items()}}, self.run.global_step)

    def epoch(self, val: Mapping[str, float] | None, example: Callable[[], torch.Tensor]) -> None:
        """Called while the model has the weights that are trained and its parameters the last step's gradients.

        example: gives a batch of training images as the model sees them, asked for once
        """
        if val:
            self._scalars({f"{name}/val": value for name, value in val.items()}, self.run.global_step)
        if self.shows.pictures and not self.has_examples:
            self.has_examples = True
            self._try(lambda writer: self._examples(writer, example()))
        parameters = dict(self.run.setup.model.named_parameters())
        if self.shows.weight_histograms:
            self._histograms("weights", parameters)
        if self.shows.gradient_histograms:
            gradients = {name: each.grad for name, each in parameters.items() if each.grad is not None}
            self._histograms("gradients", gradients)
        epoch = self.run.progress.epoch
        # powers of two: TensorBoard shows ten pictures of a tag, and filters change most at first
        if self.shows.filters and epoch & (epoch - 1) == 0 and epoch < self.run.setup.config.train.epochs:
            self._try(self._filters)

    def layers(self, found: Mapping[str, Mapping[str, Mapping[str, float | None]]]) -> None:
        """What `layer_statistics` found."""
        rows = [(name, row) for group in found.values() for name, row in group.items()]
        scalars = {f"layers/{key}/{name}": value for name, row in rows for key, value in row.items()}
        self._scalars({tag: value for tag, value in scalars.items() if value is not None}, self.run.global_step)

    def end(self, scores: Mapping[str, Evaluation], step: int) -> None:
        """The scores of each split with the weights of that step, and pictures of what the test split says of them.

        scores: of the splits that were scored
        """
        tags = self._final_tags().items()
        final = {tag: scores[split].scores()[score] for tag, (split, score) in tags if split in scores}
        self._scalars(final, step)
        test = scores.get("test")
        if self.shows.pictures and test:
            self._try(lambda writer: self._pictures(writer, test, step))
        if self.shows.filters:
            self._try(self._filters)
        if self.shows.pr_curves and self.run.setup.task.classifies and test:
            self._try(lambda writer: self._pr_curves(writer, test, step))
        if self.shows.embedding:
            self._try(lambda writer: self._embedding())
        self._try(lambda writer: _add(writer, self.session_end))

    def flush(self) -> None:
        self._try(lambda writer: writer.flush())

    def close(self) -> None:
        self._try(lambda writer: writer.close())

    def _try(self, write: Callable[[SummaryWriter], None]) -> None:
        if self.writer is None:
            return
        try:
            write(self.writer)
        except Exception as error:  # a view that fails must not stop a run, in whatever way it fails
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self.writer = None
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        self.warn(f"TensorBoard gets no more of this run: {text}; metrics.jsonl is whole")

    def _begin(self, writer: SummaryWriter) -> None:
        flat = _flat(self.run.setup.config.plain())
        experiment, start, self.session_end = hparams(flat, dict.fromkeys(self._final_tags(), 0.0))
        # add_hparams would do this in a run of its own, which then stands beside this one
        _add(writer, experiment, start)
        if self.shows.layers:
            writer.add_custom_scalars({"layers": LAYER_CHARTS})

    def _scalars(self, values: Mapping[str, float], step: int) -> None:
        def write(writer: SummaryWriter) -> None:
            for tag, value in values.items():
                writer.add_scalar(tag, value, step)

        self._try(write)

    def _histograms(self, group: str, tensors: Mapping[str, torch.Tensor]) -> None:
        def write(writer: SummaryWriter) -> None:
            for name, tensor in tensors.items():
                writer.add_histogram(f"{group}/{name}", tensor.detach().float(), self.run.global_step, bins=BINS)

        self._try(write)

    def _examples(self, writer: SummaryWriter, images: torch.Tensor) -> None:
        setup = self.run.setup
        pixels = grey_or_colour(setup.normalise.undo(images[:64]).cpu())
        writer.add_image("images/train as the model sees them", image_grid(pixels), self.run.global_step)
        training = setup.model.training
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's graph writer uses torch.jit.trace, which warns that it is old
            try:
                writer.add_graph(setup.model.eval(), images[:1])
            except OSError:
                raise
            except Exception as error:  # of a model that cannot be traced: the rest is shown all the same
                self.warn(f"TensorBoard gets no graph of this model: {str(error).splitlines()[0]}")
        setup.model.train(training)

    def _pictures(self, writer: SummaryWriter, test: Evaluation, step: int) -> None:
        data = self.run.setup.data
        for name, picture in self.run.setup.task.pictures(data.test, test.outputs, data.classes).items():
            writer.add_image(f"test/{name}", picture, step, dataformats="HWC")

    def _filters(self, writer: SummaryWriter) -> None:
        found = first_filters(self.run.setup.model, self.run.setup.data.shape)
        if found:
            name, filters = found
            writer.add_image(f"filters/{name}", filter_picture(filters), self.run.global_step)

    def _pr_curves(self, writer: SummaryWriter, test: Evaluation, step: int) -> None:
        """Of each class that the split has an image of: without one there is no recall."""
        shares = probabilities(test.outputs)
        for number, name in enumerate(self.run.setup.data.classes):
            is_it = test.labels == number
            if is_it.any():
                writer.add_pr_curve(f"test/{name} against the rest", is_it, shares[:, number], step)

    def _embedding(self) -> None:
        setup = self.run.setup
        test, classes = setup.data.test, setup.data.classes
        count = min(EMBEDDED, len(test))
        some = test.subset(torch.arange(count) * len(test) // count)  # from all of it: it may be ordered by class
        vectors, outputs = vectors_of(setup, some)
        if vectors is None or some.labels.ndim != 1:
            self.warn("TensorBoard shows no embedding: the model has no linear layer, or images have no class")
            return
        columns = {"class": [classes[label] for label in some.labels.tolist()]}
        if setup.task.classifies:
            columns["predicted"] = [classes[guess] for guess in predicted(outputs).tolist()]
        else:
            columns["image"] = [str(number) for number in range(count)]
        write_projection(self.path, vectors, columns, some.images)


def _add(writer: SummaryWriter, *summaries: Any) -> None:
    events: Any = writer.file_writer  # which its type says is None
    for summary in summaries:
        events.add_summary(summary)


def first_filters(model: nn.Module, shape: tuple[int, int, int]) -> tuple[str, torch.Tensor] | None:
    """The name of the first convolution or linear layer, and its weight float32 `[out, C, H, W]` on the CPU.

    None where the model has neither, or begins with a linear layer whose inputs are not an image of that shape.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight = module.weight.detach().float().cpu()
            if weight.ndim == 3:  # a convolution with a list of connections has a filter for each
                return name, weight[:, None]
            if weight.ndim == 2:
                return (name, weight.view(-1, *shape)) if weight.shape[1] == math.prod(shape) else None
            return name, weight
    return None


def vectors_of(setup: Setup, split: Split) -> tuple[torch.Tensor | None, torch.Tensor]:
    """What a model makes of images inside, float32 `[N, features]`, and its outputs, `[N, outputs]`, both on the CPU.

    The former is the code of an auto-encoder (what its part `encoder` gives), else what enters the linear layer that
    runs last, or None where there is none.
    """
    latest: list[torch.Tensor] = []
    kept: list[torch.Tensor] = []

    def see(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        latest[:] = inputs[:1]

    def keep(*of_model: Any) -> None:
        kept.extend(each.flatten(1).float().cpu() for each in latest)

    def see_output(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
        latest[:] = [output]

    encoder = dict(setup.model.named_children()).get("encoder")
    linear = [module for module in setup.model.modules() if isinstance(module, nn.Linear)]
    hooks = [module.register_forward_pre_hook(see) for module in linear] if encoder is None else []
    hooks += [] if encoder is None else [encoder.register_forward_hook(see_output)]
    hooks.append(setup.model.register_forward_hook(keep))
    try:
        found = setup.evaluate(split)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.cat(kept) if kept else None, found.outputs


def write_projection(
    folder: Path, vectors: torch.Tensor, columns: Mapping[str, Sequence[str]], images: torch.Tensor
) -> None:
    """The files that TensorBoard's projector reads; unlike add_embedding's they may be written again.

    vectors: float32 `[N, features]`; columns: name -> a text for each vector, at least two of them; images: uint8
    `[N, C, H, W]`
    """
    from PIL import Image

    (folder / "embedding").mkdir(exist_ok=True)
    np.savetxt(folder / "embedding/vectors.tsv", vectors.numpy(), fmt="%.5g", delimiter="\t")
    rows = [columns, *zip(*columns.values(), strict=True)]
    lines = ["\t".join(" ".join(text.split()) for text in row) + "\n" for row in rows]
    (folder / "embedding/labels.tsv").write_text("".join(lines), encoding="utf-8")
    picture, side = sprite(images)
    Image.fromarray(picture).save(folder / "embedding/images.png")
    # written as https://github.com/tensorflow/tensorboard/blob/master/tensorboard/plugins/projector has it
    (folder / "projector_config.pbtxt").write_text(
        'embeddings { tensor_name: "last layer" tensor_path: "embedding/vectors.tsv"'
        ' metadata_path: "embedding/labels.tsv" sprite { image_path: "embedding/images.png"'
        f" single_image_dim: {side} single_image_dim: {side} }} }}\n"
    )


def _flat(plain: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their whole name, `optim.lr`: numbers, texts and booleans, as the hparams view takes them."""
    flat: dict[str, Any] = {}
    for key, value in plain.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        elif value is not None:
            flat[f"{prefix}{key}"] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat
