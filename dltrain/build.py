"""From a config to what trains: data, model, loss and placement, each checked against the others."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from dltrain import compiling
from dltrain.config import Config, View
from dltrain.data.batches import Batches, Normalise, part_size
from dltrain.data.dataset import Dataset, Split
from dltrain.data.files import Files, data_root
from dltrain.data.prefetch import free_memory, where_images_live
from dltrain.data.prepare import Prepared, prepare
from dltrain.data.random import generator
from dltrain.device import Placement, be_deterministic, bits_depend_on, keep_memory, place
from dltrain.distributed import ALONE, Processes, Replica, share_batchnorm
from dltrain.errors import ConfigError
from dltrain.evaluate import Evaluation, check_views, evaluate
from dltrain.groups import Optimizers, freeze, make, optimizer_of, sources
from dltrain.losses import balanced_weights
from dltrain.models.initial import initialise_from_data, wants_data
from dltrain.models.layers import shape_after
from dltrain.registry import Component
from dltrain.spans import span
from dltrain.tasks import Task, shares

TRIAL_IMAGES = 256  # at most, of a step that is timed to choose by: larger ones take as long an image
INITIAL_IMAGES = 5000  # that weights are initialised from, as in Jordan 2024 (arXiv 2404.00498)


@dataclass(frozen=True)
class Setup:
    """Everything a run needs, ready on its device."""

    config: Config
    data: Prepared
    model: nn.Module
    optimizers: Optimizers
    loss: Component
    task: Task
    placement: Placement
    normalise: Normalise
    resident: bool  # whether the training images live on the device
    step_size: int  # images in a step
    micro_size: int  # images that go through the model at once, in one process
    processes: Processes = ALONE

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """Those that are trained, in the model's order; walking the modules at each step would cost."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def forward(self, images: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images float32 `[B, C, H, W]` and their targets -> the mean loss `[]` and the model's outputs `[B, K]`."""
        if self.processes.world > 1:
            return self._replica(images, targets)
        return self._forward(images, targets)

    @cached_property
    def _replica(self) -> Replica:
        return Replica(self.model, self._forward)

    def meet(self) -> Replica | None:
        """Makes what shares gradients among the processes, which takes seconds, before a step asks for it."""
        return self._replica if self.processes.world > 1 else None

    def unshared(self) -> AbstractContextManager[None]:
        """Within, gradients are added up in this process alone; the next backward pass after it shares them."""
        return self._replica.alone()

    def _forward(self, images: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.placement.compile != "off":
            with span("forward and loss"):
                return self._compiled(images, targets)
        with span("forward"), self.placement.autocast():
            outputs = self.model(images)
        with span("loss"):
            return self.loss(outputs, targets), outputs

    @cached_property
    def _compiled(self) -> compiling.Forward:
        whole_step = (
            self.micro_size >= part_size(self.step_size, 0, self.processes.world) and not self.config.optim.sam_rho
        )
        loss = partial(self.loss.entry.factory, **self.loss.args)
        return compiling.compiled(self.model, loss, self.placement, self.placement.compile, whole_step)

    def evaluate(self, split: Split, views: Sequence[View] = ()) -> Evaluation:
        """What the model makes of a split as it stands; over the views, if any."""
        return evaluate(
            self.model, split, self.normalise, self.placement, self.loss, self.task, views, processes=self.processes
        )

    @property
    def steps_per_epoch(self) -> int:
        """The last step of an epoch takes the images that are left."""
        return -(-len(self.data.train) // self.step_size)

    def batches(self) -> Batches:
        """The training images, moved to the device, as the batches of each step."""
        return Batches(
            self.data.train,
            self.normalise,
            task=self.task,
            seed=self.config.seed,
            step_size=self.step_size,
            micro_size=self.micro_size,
            augment=self.config.data.augment,
            classes=len(self.data.classes),
            balance=self.config.data.balance,
            resident=self.resident,
            device=self.placement.device,
            rank=self.processes.rank,
            world=self.processes.world,
        )


def load_data(config: Config, root: str | None, note: Callable[[str], None]) -> Prepared:
    """Reads the config's data set, from `root` where given, and makes the run's splits of it."""
    settings = config.data
    files = Files(data_root(root or settings.root), verify=settings.verify, report=note)
    dataset: Dataset = settings.source.build(files)
    return prepare(dataset, seed=config.seed, val=settings.val, classes=settings.classes, limit=settings.limit)


def task_of(config: Config, shape: tuple[int, ...], classes: int) -> Task:
    """What the model is to make of images of that shape (C, H, W)."""
    task: Task = config.task.build(shape, classes, config.model.output)
    return task


def build_model(config: Config, shape: tuple[int, ...], classes: int) -> nn.Module:
    """The model on the CPU, its weights drawn from the seed.  Raises ConfigError where its layers do not fit."""
    torch.manual_seed(config.seed)
    try:
        model: nn.Module = config.model.source.build(shape, task_of(config, shape, classes).outputs)
    except RuntimeError as error:  # torch's, for sizes that no memory holds
        raise ConfigError(f"model {config.model.source.name}: {str(error).splitlines()[0]}") from None
    return model


def build(
    config: Config,
    note: Callable[[str], None],
    recorded: Mapping[str, Any] | None = None,
    processes: Processes = ALONE,
) -> Setup:
    """Builds all of a run.  Raises ConfigError where its parts do not fit each other.

    recorded: what the bits of the run depended on so far, which `auto` keeps to
    processes: that train it together; in each the same is built
    """
    keep_memory()
    if config.train.deterministic:
        be_deterministic()
    elif torch.are_deterministic_algorithms_enabled():  # by the run before in this process; the call takes two seconds
        torch.use_deterministic_algorithms(False)
    for where, source in sources(config):
        optimizer_of(
            source, [nn.Parameter(torch.zeros(2, 2))], where
        )  # what it refuses is said before any data is read
    data = load_data(config, None, note)
    check_views(config.evaluate.views, data.shape)
    task = task_of(config, data.shape, len(data.classes))
    loss = loss_of(config, data.train.labels, len(data.classes))
    outputs, targets = task.example(2)
    mixing = next((each.name for each in config.data.augment if each.kind == "mixing"), None)
    loss.build(outputs, shares(targets, len(data.classes)) if mixing else targets)
    step_size, micro_size = config.descent.sizes(len(data.train))
    if mixing and micro_size == 1:
        raise ConfigError(f"data.augment: {mixing} mixes images of a batch, and here one goes through at a time")
    if step_size > len(data.train):
        text = f"{step_size} images in a batch, {len(data.train)} in the training set"
        raise ConfigError(f"descent.batch_size: {text}; lower it, or set descent.variant to batch")
    if processes.world > 1:
        _check_parts(config, len(data.train), step_size, micro_size, processes.world)
    model = build_model(config, data.shape, len(data.classes))
    task.check(shape_after(model, data.shape), data.train.labels)
    freeze(model, config.model.frozen)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"{'model.frozen leaves' if config.model.frozen else 'the model has'} no parameter to train")
    together = 1 if config.train.sync_batchnorm else processes.world  # processes whose images are normalised apart
    _check_batchnorm(model, data.shape, min(_smallest(len(data.train), step_size, micro_size, together)))
    sample = torch.rand(min(micro_size, TRIAL_IMAGES), *data.shape, generator=generator("sample"))

    timed: dict[tuple[torch.dtype, str], float] = {}

    def seconds(placement: Placement, mode: str = "off") -> float:
        how = placement.dtype, mode  # device and layout are one here
        if how not in timed:
            _, targets = task.example(len(sample))
            timed[how] = compiling.seconds_of_a_step(model, loss, placement, sample, targets, mode)
        return timed[how]

    asked = config.train
    if not processes.first:
        recorded = processes.tell()  # what `auto` chose in the first
    placement = place(asked.device, asked.precision, asked.memory_format, model, recorded=recorded, seconds=seconds)
    if asked.compile != "auto":
        mode: str = asked.compile
        why = "asked for"
    elif recorded:
        mode, why = recorded["compile"], "as the run began"
    else:
        steps = len(data.train) * asked.epochs // len(sample)
        mode, why = compiling.choose(seconds(placement), steps, lambda: seconds(placement, "default"))
    placement = dataclasses.replace(placement, compile=mode, why={**placement.why, "compile": f"{mode} ({why})"})
    if processes.first:
        processes.tell(bits_depend_on(placement))
    placement.take(model)
    where, why = where_images_live(
        data.train.images.nbytes,
        placement.device.type,
        free_memory(placement.device),
        data.train.mapped,
        config.data.resident,
    )
    placement = dataclasses.replace(placement, why={**placement.why, "images": f"{where} ({why})"})
    optimizers = make(model, config)
    if asked.sync_batchnorm and processes.world > 1:
        share_batchnorm(model, processes)
    normalise = Normalise(data.normalisation, placement.device, placement.memory_format)
    if wants_data(model):
        initialise_from_data(model, normalise(data.train.images[:INITIAL_IMAGES].to(placement.device)))
    if not processes.first:  # all have drawn the same weights; dropout is to be each one's own
        torch.manual_seed(generator("process", config.seed, processes.rank).initial_seed())
    return Setup(
        config,
        data,
        model,
        optimizers,
        loss,
        task,
        placement,
        normalise,
        where == "resident",
        step_size,
        micro_size,
        processes,
    )


def loss_of(config: Config, labels: torch.Tensor, classes: int) -> Component:
    """The config's loss, its balanced weights worked out from the training labels."""
    if config.loss.args.get("class_weights") != "balanced":
        return config.loss
    weights = balanced_weights(labels, classes)
    return dataclasses.replace(config.loss, args={**config.loss.args, "class_weights": weights})


def _smallest(images: int, step_size: int, micro_size: int, world: int) -> Iterator[int]:
    """The smallest numbers of images that ever go through the model at once."""
    for step in (step_size, images % step_size or step_size):
        for rank in range(world):
            own = part_size(step, rank, world)
            yield min(micro_size, own % micro_size or micro_size)


def _check_parts(config: Config, images: int, step_size: int, micro_size: int, world: int) -> None:
    """Each process needs an image of every step, and what they do together each has to do as often."""
    asked = config.train
    if ":" in asked.device:
        raise ConfigError(f"train.device: {asked.device}: {world} processes take a device each: set it to cuda")
    for step in (step_size, images % step_size or step_size):
        if step < world:
            text = f"a step of {step} image{'s' * (step > 1)} cannot be shared by {world} processes"
            raise ConfigError(f"{text}: start fewer, or choose another descent.batch_size, data.val or data.limit")
        most, least = (-(-part_size(step, rank, world) // micro_size) for rank in (0, world - 1))
        if asked.sync_batchnorm and most != least:
            text = f"of a step of {step} images one process has {most} micro-batches and another {least}"
            raise ConfigError(f"train.sync_batchnorm: {text}: choose another descent.micro_batch_size")
    if asked.sync_batchnorm and asked.compile not in ("auto", "off"):
        raise ConfigError(f"train.sync_batchnorm: {world} processes cannot compile it: set train.compile: off")


def _check_batchnorm(model: nn.Module, shape: tuple[int, ...], images: int) -> None:
    """One image with one number a channel has no variance to normalise by: torch would stop in mid-epoch."""
    if images > 1:
        return
    alone: list[str] = []
    hooks = [
        module.register_forward_pre_hook(
            lambda _, inputs, name=name: alone.append(name) if inputs[0][0, 0].numel() == 1 else None
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)
    ]
    device = next(model.parameters()).device
    model.eval()
    with torch.no_grad():
        model(torch.zeros(1, *shape, device=device))
    model.train()
    for hook in hooks:
        hook.remove()
    if alone:
        text = (
            f"'{alone[0]}' sees one image at a time, at least in the last step of an epoch, and has nothing to average"
        )
        raise ConfigError(
            f"batchnorm {text}; choose another descent.batch_size, data.val or data.limit, or leave it out"
        )
