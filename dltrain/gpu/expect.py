"""How many images a second the shipped configs should train at on a device, from rates that are measured there.

A step of each config is run with 2 and with 4 images, and every operation that torch sees is noted with its floating
point operations and the bytes of its tensors.  Both grow evenly with the batch, which gives those of the config's own.
What an operation takes follows from its kind's rate, as measured on pieces of networks that are counted the same way.

On one core of a CPU with AMX the estimate is 0.8 to 1.4 times what a run reaches for the MLPs, the plain CNNs and the
ResNets, and up to twice as much where a step is mostly of what is not measured: depthwise convolutions, convolutions of
six channels or of 512 on four pixels, local response normalisation.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from dltrain import config as configs
from dltrain import shipped
from dltrain.build import build
from dltrain.config import Config, Descent
from dltrain.data.dataset import Dataset, Split
from dltrain.errors import ConfigError
from dltrain.gpu.rates import launch_seconds, normal, seconds_per_call
from dltrain.gpu.worker import first_line
from dltrain.step import direction

SHAPES = {  # of the images of published data sets: channels, height, width, classes
    "digits": (1, 8, 8, 10),
    "mnist": (1, 28, 28, 10),
    "moving_mnist": (8, 28, 28, 10),  # those made of MNIST as they are by default
    "digit_lines": (1, 36, 160, 10),
    "fashion_mnist": (1, 28, 28, 10),
    "cifar10": (3, 32, 32, 10),
    "cifar100": (3, 32, 32, 100),
}
ANY = 1 << 30  # images of a training set that no mini-batch is larger than
BATCH = 64
LAYERS = 3
KINDS = {"convolution": "conv", "norm": "norm", "pool": "pool"}  # what an operation's name has in it -> its kind


class Operation(NamedTuple):
    """One operation as torch dispatched it."""

    kind: str  # conv, matmul, norm, pool, random, other; view: moves no numbers
    dtype: torch.dtype
    flops: float
    bytes: float  # of all tensors that it is given and gives

    @property
    def work(self) -> float:
        """What its kind's rate is measured in: FLOPs of convolutions and products, else bytes."""
        return self.flops or self.bytes

    @property
    def size(self) -> float:
        """What the rate depends on: FLOPs per byte of convolutions and products, else bytes."""
        return self.flops / self.bytes if self.flops else self.bytes


class Count(TorchDispatchMode):
    """Notes every operation while it is active."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        tensors = {id(leaf): leaf for leaf in tree_leaves((args, kwargs, result)) if torch.is_tensor(leaf)}
        count = flop_registry.get(func.overloadpacket)
        flops = count(*args, **kwargs, out_val=result) if count else 0
        size = sum(tensor.nbytes for tensor in tensors.values())
        dtypes = [tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()]
        kind = "view" if func.is_view or not size else _kind(func, flops)
        self.operations.append(
            Operation(kind, min(dtypes, key=lambda dtype: dtype.itemsize, default=torch.float32), flops, size)
        )
        return result


def _kind(func: Any, flops: int) -> str:
    if torch.Tag.nondeterministic_seeded in func.tags:
        return "random"
    name = str(func.overloadpacket)
    return next((kind for part, kind in KINDS.items() if part in name), "matmul" if flops else "other")


@dataclass(frozen=True)
class Rates:
    """What a device was measured to do.

    curves: (kind, dtype) -> [(size, work per second)], as `Operation` has size and work, sorted by size
    overhead: seconds of the program's own for each operation: Python, autograd, dispatch
    launch: the least seconds of an operation on the device
    """

    curves: Mapping[tuple[str, torch.dtype], Sequence[tuple[float, float]]]
    overhead: float
    launch: float
    waits: bool  # the program waits while the device works, as on a CPU

    def seconds(self, operations: Sequence[Operation]) -> float:
        """Of a step.  A GPU works while the program prepares what comes next, so the slower of the two counts."""
        own = self.overhead * len(operations)
        device = sum(self.device_seconds(each) for each in operations)
        return own + device if self.waits else max(own, device)

    def device_seconds(self, operation: Operation) -> float:
        if operation.kind == "view":
            return 0.0
        curve = self.curves.get((operation.kind, operation.dtype)) or self.curves[operation.kind, torch.float32]
        return max(self.launch, operation.work / interpolate(curve, operation.size))


def interpolate(curve: Sequence[tuple[float, float]], x: float) -> float:
    """y at x, along straight lines between points (x, y) on logarithmic axes; the ends' y beyond them."""
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if x <= x1:
            share = max(0.0, math.log(x / x0) / math.log(x1 / x0))
            return float(y0 * (y1 / y0) ** share)
    return curve[-1][1]


def measure(device: str, needed: Collection[tuple[str, torch.dtype]], seconds: float = 0.05) -> Rates:
    """The rates of a device, of those (kind, dtype) that are needed: of pieces of networks, forward and backward."""
    curves: dict[tuple[str, torch.dtype], list[tuple[float, float]]] = {}
    for key in needed:
        for module, shape in PIECES[key[0]]():
            work = _work(module.to(device=device, dtype=key[1]), normal(shape, device, key[1]))
            with Count() as count:
                work()
            counted = [each for each in count.operations if each.kind == key[0]]
            size = sum(each.size for each in counted) / len(counted)
            spent = seconds_per_call(work, device, seconds)
            curves.setdefault(key, []).append((size, sum(each.work for each in counted) / spent))
    return Rates(
        {key: sorted(curve) for key, curve in curves.items()},
        _overhead(device, seconds),
        launch_seconds(device),
        waits=torch.device(device).type == "cpu",
    )


def _images(layer: Callable[[int], nn.Module]) -> Iterator[tuple[nn.Module, tuple[int, ...]]]:
    return ((layer(channels), (BATCH, channels, size, size)) for channels, size in ((32, 8), (32, 32), (128, 32)))


def _features(layer: Callable[[int], nn.Module]) -> Iterator[tuple[nn.Module, tuple[int, ...]]]:
    return ((layer(count), (BATCH, count)) for count in (256, 1024))


def _convolutions() -> Iterator[tuple[nn.Module, tuple[int, ...]]]:
    for inputs, outputs, size in ((3, 32, 32), (32, 64, 16), (128, 128, 8), (256, 256, 8)):
        yield nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), (BATCH, inputs, size, size)


PIECES: dict[str, Callable[[], Iterator[tuple[nn.Module, tuple[int, ...]]]]] = {
    # kind -> (layer, shape of its input), at sizes between which its rate changes
    "conv": _convolutions,
    "norm": lambda: _images(nn.BatchNorm2d),
    "pool": lambda: _images(lambda channels: nn.MaxPool2d(2)),
    "other": lambda: _images(lambda channels: nn.ReLU()),
    "matmul": lambda: _features(lambda features: nn.Linear(features, features, bias=False)),
    "random": lambda: _features(lambda features: nn.Dropout(0.5)),
}


def _work(module: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    """LAYERS passes through a layer, then LAYERS gradients of its input and parameters.

    As in training, where what goes forward is far from the cache when it goes backward, and its memory is not at hand
    again at once: a layer by itself is up to four times as fast.  Images have their channels last.
    """
    if x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
        module = module.to(memory_format=torch.channels_last)
    inputs = [x.clone().requires_grad_() for _ in range(LAYERS)]

    def work() -> None:
        outputs = [module(each) for each in inputs]
        for each, output in zip(inputs, outputs, strict=True):
            torch.autograd.grad(output, [each, *module.parameters()], output.detach())

    return work


def _overhead(device: str, seconds: float) -> float:
    """Seconds that the program takes for one operation: of a step so small that nothing else counts."""
    step = stepper(small(configs.load(shipped.find("digits_mlp")), device, 2))
    with Count() as count:
        step()
    return seconds_per_call(step, device, seconds) / len(count.operations)


def stepper(config: Config) -> Callable[[], str]:
    """Takes a training step of the config, from the bytes of the images to the optimizer, whenever it is called."""
    setup = build(config, lambda line: None)
    batches = setup.batches()

    def step() -> str:
        loss, _ = direction(setup, batches, 0, 0)
        setup.optimizers.step(loss, lambda: loss)
        return setup.placement.why["precision"].partition(" ")[0]

    step()  # makes what later ones find: the epoch's order, the optimizer's state
    return step


def estimates(device: str, names: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """One row for each shipped config: config, precision, images_per_second, most (the kind that takes most time).

    What cannot be estimated has `error` instead: a config of images of unknown size, a model that does not fit.
    """
    steps: dict[str, Step] = {}
    errors: dict[str, str] = {}
    for name in names or shipped.names():
        try:
            steps[name] = count_step(configs.load(shipped.find(name)), device)
        except Exception as error:  # one that fails takes no other with it
            errors[name] = first_line(error)
    needed = {(each.kind, each.dtype) for step in steps.values() for each in step.operations if each.kind != "view"}
    rates = measure(device, needed)
    return [{"config": name, **estimate(step, rates)} for name, step in steps.items()] + [
        {"config": name, "error": error} for name, error in errors.items()
    ]


def estimate(step: Step, rates: Rates) -> dict[str, Any]:
    spent = {"own": rates.overhead * len(step.operations)}
    for each in step.operations:
        spent[each.kind] = spent.get(each.kind, 0.0) + rates.device_seconds(each)
    return {
        "precision": step.precision,
        "images_per_second": step.images / rates.seconds(step.operations),
        "most": max(spent, key=lambda kind: spent[kind]),
    }


class Step(NamedTuple):
    """What a training step of a config consists of."""

    operations: list[Operation]
    images: int
    precision: str


def count_step(config: Config, device: str) -> Step:
    """A step of as many images as the config takes at once, worked out from steps of 2 and of 4."""
    _, images = config.descent.sizes(ANY)
    counts = []
    for few in (2, 4):
        step = stepper(small(config, device, few))
        with Count() as count:
            precision = step()
        counts.append(count.operations)
    return Step([_grown(two, four, images) for two, four in zip(counts[0], counts[1], strict=True)], images, precision)


def _grown(few: Operation, more: Operation, images: int) -> Operation:
    """An operation of a step of `images`, from those of steps of 2 and of 4."""
    steps = (images - 2) / 2
    flops, size = few.flops + (more.flops - few.flops) * steps, few.bytes + (more.bytes - few.bytes) * steps
    return few._replace(flops=flops, bytes=size)


@dataclass(frozen=True)
class _Noise:
    """Stands where a config names its data set: as many images of noise as two steps and all classes need."""

    shape: tuple[int, int, int]
    classes: int
    images: int

    def build(self, files: object) -> Dataset:
        count = max(2 * self.images, self.classes)
        pixels = torch.empty(count, *self.shape, dtype=torch.uint8)
        pixels.random_(256, generator=torch.Generator().manual_seed(0))
        split = Split(pixels, torch.arange(count) % self.classes)
        return Dataset(split, split, tuple(map(str, range(self.classes))))


def small(config: Config, device: str, images: int) -> Config:
    """The config with steps of so many images, on noise of its data set's shape."""
    *shape, classes = _shape(config)
    source = _Noise((shape[0], shape[1], shape[2]), classes, images)
    data = config.data.model_copy(update={"source": source, "val": 0, "limit": None, "classes": None})
    train = config.train.model_copy(update={"device": device, "compile": "off"})  # what auto chose would not be used
    return config.model_copy(update={"data": data, "descent": Descent(batch_size=images), "train": train})


def _shape(config: Config) -> tuple[int, int, int, int]:
    """Channels, height, width, classes.  Raises ConfigError where only the images' files would tell."""
    source = config.data.source
    if source.name in SHAPES:
        return SHAPES[source.name]
    if {"channels", "size"} <= source.args.keys():
        size = source.args["size"]
        return source.args["channels"], size, size, source.args.get("class_count", 10)
    raise ConfigError(f"data {source.name}: the size of its images is in their files alone")
