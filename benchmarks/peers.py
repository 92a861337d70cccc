"""What the scripts that compare dltrain with its peers share: the contenders, and how they are timed.

Every contender trains the same network on the same images in batches of 128 by SGD with momentum 0.9, on the CPU:

- dltrain: `dltrain train` as its user gets it: running loss and accuracy, the gradient's norm, log lines, TensorBoard's
  curves, a checkpoint a minute; without the pictures and scores that a run ends with
- bare: a loop over float32 tensors in memory, normalised before the clock starts, that does nothing but train
- bare-bf16: the same under bfloat16 autocast with convolutions in channels_last
- pytorch: torchvision's transforms and a DataLoader with two workers, as PyTorch's tutorials have them
- lightning: the same data through Lightning's Trainer, without its logger, checkpoints and progress bar
- keras: Keras 3 on torch, `fit` on arrays that were normalised before
- scikit-learn: MLPClassifier on such arrays

Each is timed in a process of its own, as the libraries' threads and settings disturb each other, and the processes come
in turn, so that a machine that slows down slows all.  An epoch takes from the end of the one before to its own end,
with all that happens between; the first one is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from operator import getitem
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset

from dltrain import config as configs
from dltrain import runs
from dltrain.data.dataset import Dataset as Splits
from dltrain.data.dataset import Split
from dltrain.data.files import Files, data_root
from dltrain.device import cpu_flags
from dltrain.rundir import RunFolder
from dltrain.yamlfile import parse

BATCH = 128
LR = 0.01
MOMENTUM = 0.9
WORKERS = 2
MNIST_MEAN, MNIST_STD = (0.1307,), (0.3081,)
PIXELS = 4  # of padding around an image that is cropped
UNITS = {"amx_bf16", "avx512_bf16"}  # a CPU's, for bfloat16

# what every config has besides its data and its model
SETTINGS = f"""
optim: {{name: sgd, lr: {LR}, momentum: {MOMENTUM}}}
descent: {{batch_size: {BATCH}}}
train: {{device: cpu}}
tensorboard: {{filters: false, pr_curves: false}}
"""


@dataclass(frozen=True)
class Work:
    """What is trained.

    config: dltrain's, without SETTINGS
    read: gives the images as dltrain reads them
    dataset: the training images for a DataLoader, from where they lie and their transform
    images: in an epoch
    mean, std: of each channel, of pixels in 0..1
    augment: crop at random from the image with 4 black pixels around it, and mirror half of the images
    network: from float32 `[B, C, H, W]` to `[B, 10]`
    keras_layers: the same from `keras.layers`, for images `[B, H, W, C]`
    contenders: in the order of the table
    hidden: the widths of its hidden layers, where it is an MLP
    """

    title: str
    config: str
    read: Callable[[Files], Splits]
    dataset: Callable[[Files, Callable[[Any], torch.Tensor]], Dataset[Any]]
    images: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: bool
    network: Callable[[], nn.Module]
    keras_layers: Callable[[Any], list[Any]]
    contenders: tuple[str, ...]
    hidden: tuple[int, ...] = ()


@dataclass(frozen=True)
class Share:
    """How much of the work a process does.

    epochs: that count; one more comes before them
    limit: images of the training set that make an epoch; None: all
    """

    files: Files
    epochs: int
    limit: int | None

    def split(self, work: Work) -> Split:
        whole = work.read(self.files).train
        return Split(whole.images[: self.limit], whole.labels[: self.limit])


class _Ticking(RunFolder):
    """A run's folder that tells of the end of each epoch but the first, after which TensorBoard gets its pictures."""

    def __init__(self, path: Path, tick: Callable[[], None]) -> None:
        super().__init__(path, resume=False)
        self.tick = tick

    def append(self, record: dict[str, Any]) -> None:
        super().append(record)
        if record["kind"] == "epoch" and record["epoch"] > 1:
            self.tick()


def by_dltrain(work: Work, share: Share, tick: Callable[[], None]) -> None:
    files = {"data.root": str(share.files.root), "data.verify": share.files.verify, "data.limit": share.limit}
    settings = [f"{key}={json.dumps(value)}" for key, value in files.items()]
    settings.append(f"train.epochs={share.epochs + 2}")
    config = configs.check(parse(work.config + SETTINGS, work.title), settings)
    with tempfile.TemporaryDirectory() as place:
        folder = _Ticking(Path(place) / "run", tick)
        runs.start(config, folder, Console(quiet=True), quiet=True)
        folder.close()


def by_bare_loop(work: Work, share: Share, tick: Callable[[], None], bf16: bool = False) -> None:
    split = share.split(work)
    layout = torch.channels_last if bf16 else torch.contiguous_format
    precision = torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext()
    if work.augment:
        images, cut = channels_at_the_end(work, F.pad(split.images, [PIXELS] * 4)), crop_and_flip
    else:
        images, cut = normalised(work, split.images), getitem
    model = work.network().to(memory_format=layout)
    optimizer = sgd(model)
    for _ in range(share.epochs + 1):
        for index in torch.randperm(len(images)).split(BATCH):
            batch = cut(images, index).contiguous(memory_format=layout)
            optimizer.zero_grad()
            with precision:
                loss = F.cross_entropy(model(batch), split.labels[index])
            loss.backward()
            optimizer.step()
        tick()


def by_pytorch(work: Work, share: Share, tick: Callable[[], None]) -> None:
    loader = data_loader(work, share)
    model = work.network()
    optimizer = sgd(model)
    for _ in range(share.epochs + 1):
        total = 0.0
        for images, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            total += loss.item()
        tick()


def by_lightning(work: Work, share: Share, tick: Callable[[], None]) -> None:
    from lightning import LightningModule, Trainer

    class Classifier(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = work.network()

        def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
            images, labels = batch
            return F.cross_entropy(self.network(images), labels)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return sgd(self)

        def on_train_epoch_end(self) -> None:
            tick()

    trainer = Trainer(
        accelerator="cpu",
        max_epochs=share.epochs + 1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(), data_loader(work, share))


def by_keras(work: Work, share: Share, tick: Callable[[], None]) -> None:
    import keras

    split = share.split(work)
    images = channels_at_the_end(work, split.images).numpy()
    model = keras.Sequential([keras.Input(images.shape[1:]), *work.keras_layers(keras.layers)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(LR, MOMENTUM), loss)
    after = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: tick())
    model.fit(images, split.labels.numpy(), batch_size=BATCH, epochs=share.epochs + 1, verbose=0, callbacks=[after])


def by_scikit_learn(work: Work, share: Share, tick: Callable[[], None]) -> None:
    from sklearn.neural_network import MLPClassifier

    split = share.split(work)
    images, labels = normalised(work, split.images).flatten(1).numpy(), split.labels.numpy()
    model = MLPClassifier(
        work.hidden,
        solver="sgd",
        alpha=0,
        batch_size=BATCH,
        learning_rate_init=LR,
        momentum=MOMENTUM,
        nesterovs_momentum=False,
    )
    for _ in range(share.epochs + 1):
        model.partial_fit(images, labels, classes=range(10))
        tick()


# name -> what trains, and the package whose version stands beside it
CONTENDERS: dict[str, tuple[Callable[[Work, Share, Callable[[], None]], None], str]] = {
    "dltrain": (by_dltrain, "dltrain"),
    "bare": (by_bare_loop, "torch"),
    "bare-bf16": (partial(by_bare_loop, bf16=True), "torch"),
    "pytorch": (by_pytorch, "torch"),
    "lightning": (by_lightning, "lightning"),
    "keras": (by_keras, "keras"),
    "scikit-learn": (by_scikit_learn, "scikit-learn"),
}


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)


def normalised(work: Work, images: torch.Tensor) -> torch.Tensor:
    """uint8 `[N, C, H, W]` -> float32, each channel with mean 0 and standard deviation 1."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (work.mean, work.std))
    return images.float().div_(255).sub_(mean).div_(std)


def channels_at_the_end(work: Work, images: torch.Tensor) -> torch.Tensor:
    """uint8 `[N, C, H, W]` -> float32 `[N, H, W, C]`, normalised."""
    return normalised(work, images.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)


def crop_and_flip(padded: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The images that `index` names of padded ones `[N, H + 8, W + 8, C]`, cut at random: `[B, C, H, W]`."""
    count, (height, width) = len(index), (side - 2 * PIXELS for side in padded.shape[1:3])
    rows = torch.randint(2 * PIXELS + 1, (count, 1)) + torch.arange(height)  # [B, H]
    columns = torch.randint(2 * PIXELS + 1, (count, 1)) + torch.arange(width)  # [B, W]
    columns = torch.where(torch.rand(count, 1) < 0.5, columns.flip(1), columns)
    return padded[index[:, None, None], rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def data_loader(work: Work, share: Share) -> DataLoader[Any]:
    from torchvision import transforms

    steps = [transforms.ToTensor(), transforms.Normalize(work.mean, work.std)]
    if work.augment:
        steps = [transforms.RandomCrop(32, padding=PIXELS), transforms.RandomHorizontalFlip(), *steps]
    dataset = work.dataset(share.files, transforms.Compose(steps))
    if share.limit:
        dataset = Subset(dataset, range(share.limit))
    return DataLoader(dataset, batch_size=BATCH, shuffle=True, num_workers=WORKERS)


def torchvision_mnist(files: Files, transform: Callable[[Any], torch.Tensor]) -> Dataset[Any]:
    from torchvision.datasets import MNIST

    return MNIST(files.root, train=True, transform=transform, download=True)  # nothing where the files are there


def epochs_of(work: Work, name: str, share: Share) -> list[float]:
    """Seconds of each epoch that counts."""
    ends: list[float] = []
    train, _ = CONTENDERS[name]
    train(work, share, lambda: ends.append(perf_counter()))
    return [after - before for before, after in pairwise(ends)]


def positive(text: str) -> int:
    """A whole number from 1 on; what argparse calls `invalid positive value` is none."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def main(work: Work) -> None:
    parser = argparse.ArgumentParser(description=f"{work.title}: the seconds of an epoch, dltrain against its peers.")
    parser.add_argument("--only", default=",".join(work.contenders), metavar="NAMES", help="default: %(default)s")
    parser.add_argument("--repeats", type=positive, default=3, help="processes of each; default: 3")
    parser.add_argument("--epochs", type=positive, default=1, help="that count in each process; default: 1")
    parser.add_argument("--images", type=int, help="of the training set that make an epoch; seconds are scaled")
    parser.add_argument("--data-root", help="default: $DLTRAIN_DATA, else the user's cache folder")
    parser.add_argument("--no-verify", action="store_true", help="take a copy of other bytes than the published ones")
    parser.add_argument("--measure", choices=work.contenders, help=argparse.SUPPRESS)  # in this process
    given = parser.parse_args()
    names = given.only.split(",")
    if unknown := set(names) - set(work.contenders):
        parser.error(f"--only: no contender {', '.join(sorted(unknown))}; there is {', '.join(work.contenders)}")
    if given.images is not None and not BATCH <= given.images <= work.images:
        parser.error(f"--images: expected {BATCH} (a batch) to {work.images}, got {given.images}")
    if given.measure:
        files = Files(data_root(given.data_root), verify=not given.no_verify)
        print(json.dumps(epochs_of(work, given.measure, Share(files, given.epochs, given.images))))
        return
    compare(work, names, given.repeats, given.images)


def compare(work: Work, names: Sequence[str], repeats: int, images: int | None) -> None:
    """Times each in turn and prints the table; the ratios are to the first of them."""
    scale = work.images / images if images else 1.0
    seconds: dict[str, list[float]] = {name: [] for name in names if installed(name)}
    for turn in range(repeats):
        for name, found in seconds.items():
            found += [scale * each for each in in_a_process(name)]
            print(f"{turn + 1}/{repeats} {name} {found[-1]:.3g} s", file=sys.stderr, flush=True)
    print(f"{work.title}: an epoch of {work.images:,} images, batches of {BATCH}, SGD with momentum, on the CPU")
    if images:
        print(f"measured on {images:,} of the images, the seconds multiplied by {scale:.3g}")
    print(machine())
    print(f"{'':34}{'epochs':>8}{'median s':>10}{'min':>8}{'max':>8}{'ratio':>8}")
    first = None
    for name, found in seconds.items():
        median = statistics.median(found)
        first = first or median
        package = CONTENDERS[name][1]
        row = f"{len(found):8}{median:10.3g}{min(found):8.3g}{max(found):8.3g}{median / first:8.2f}"
        print(f"{name} ({package} {version(package)})".ljust(34) + row)


def installed(name: str) -> bool:
    """Whether a contender's package is here; says so where it is not."""
    package = CONTENDERS[name][1]
    try:
        version(package)
    except PackageNotFoundError:
        print(f"{name} is left out: {package} is not installed; pip install -e '.[bench]'")
        return False
    return True


def in_a_process(name: str) -> list[float]:
    """The seconds that this script prints when it is to measure that contender."""
    with tempfile.TemporaryDirectory() as home:
        # no device but the CPU; Keras as it is without settings of the user's
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "KERAS_BACKEND": "torch", "KERAS_HOME": home}
        command = [sys.executable, *sys.argv, "--measure", name]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: exit code {done.returncode}\n{done.stderr[-4000:]}")
    seconds: list[float] = json.loads(done.stdout.splitlines()[-1])
    return seconds


def machine() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # Linux only
    found = re.search(r"^model name\s*: (.+)$", cpuinfo.read_text() if cpuinfo.exists() else "", re.MULTILINE)
    units = " and ".join(sorted(UNITS & cpu_flags())) or "no bf16 units"
    threads = torch.get_num_threads()
    return (
        f"{found[1] if found else 'CPU'}, {units}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; "
        f"torch {torch.__version__}, {threads} threads"
    )
