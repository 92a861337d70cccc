"""Makes the pictures of docs/curriculum.md from real runs.

    python docs/make_curriculum_pictures.py
    python docs/make_curriculum_pictures.py pooling softmax

Trains what it shows, some minutes in all on two CPU cores.  MNIST and CIFAR-10 must be in the data root.
"""

from __future__ import annotations

import io
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from torch.nn import functional as F

from dltrain import config as configs
from dltrain import rundir, runs, shipped, trained
from dltrain.data.files import Files, data_root
from dltrain.data.random import Random
from dltrain.models.pools import avgpool, maxpool, sumpool
from dltrain.registry import find
from dltrain.tasks import read_lines

FOLDER = Path(__file__).parent / "curriculum"


def train(name: str, *settings: str) -> tuple[trained.Trained, list[dict[str, Any]]]:
    """A shipped config's model after training, and the lines of its metrics.jsonl."""
    print(f"training {name} {' '.join(settings)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        run = rundir.RunFolder(Path(folder) / "run", resume=False)
        runs.start(configs.load(shipped.find(name), settings), run, Console(file=io.StringIO()), quiet=True)
        run.close()
        return trained.load(run.path, "cpu", print), list(rundir.records(run.path))


def images(name: str, split: str = "test") -> tuple[torch.Tensor, torch.Tensor]:
    """A data set's images uint8 `[N, C, H, W]` and labels, as they are; a copy other than the published one will do."""
    found = find(name, "data").factory(Files(data_root(), verify=False))
    part = getattr(found, split)
    return part.images, part.labels


def save(figure: Figure, name: str) -> None:
    path = FOLDER / f"{name}.png"
    figure.savefig(path, pil_kwargs={"optimize": True})
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB", flush=True)


def grey(axes: Axes, picture: torch.Tensor, title: str = "", span: float | None = None) -> None:
    """A picture `[H, W]` without axes: grey, or red and blue between -span and span."""
    if span is None:
        axes.imshow(picture, cmap="gray", interpolation="nearest")
    else:
        axes.imshow(picture, cmap="RdBu_r", vmin=-span, vmax=span, interpolation="nearest")
    axes.set_title(title, fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])


def tensor() -> None:
    found, _ = images("digits")
    image = found[3, 0]
    figure = Figure(figsize=(9, 3), dpi=100, layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1, 1.25, 1])
    normal = (image.float() - found.float().mean()) / found.float().std()
    for axes, values, form, title in (
        (left, image, "d", "uint8 [1, 8, 8], as read"),
        (middle, normal, ".1f", "float32 [1, 8, 8], normalised"),
    ):
        axes.imshow(values, cmap="gray")
        axes.set_title(title, fontsize=9)
        axes.set_axis_off()
        for row in range(8):
            for column in range(8):
                ink = "black" if image[row, column] > 127 else "white"
                text = f"{values[row, column].item():{form}}"
                axes.text(column, row, text, ha="center", va="center", fontsize=6.5, color=ink)
    right.set_title("the same 3x2x2 image in memory", fontsize=9)
    right.set_axis_off()
    colours = ("#d62728", "#2ca02c", "#1f77b4")
    for row, (layout, order) in enumerate(
        (
            ("contiguous: channel by channel", [(channel, place) for channel in range(3) for place in range(4)]),
            ("channels_last: pixel by pixel", [(channel, place) for place in range(4) for channel in range(3)]),
        )
    ):
        right.text(0, -row * 2 + 0.75, layout, fontsize=8)
        for at, (channel, place) in enumerate(order):
            right.add_patch(_square(at, -row * 2 - 0.4, colours[channel]))
            right.text(at + 0.45, -row * 2 + 0.05, "RGB"[channel] + str(place), ha="center", va="center", fontsize=6.5)
    right.set_xlim(-0.2, 12.2)
    right.set_ylim(-3, 1.6)
    save(figure, "tensor")


def _square(x: float, y: float, colour: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), 0.9, 0.9, facecolor=colour, alpha=0.35)


def weights_of(model: trained.Trained) -> torch.Tensor:
    """float32 `[outputs, 28, 28]`: the first linear layer's weights as pictures."""
    weight = next(each for each in model.model.parameters() if each.ndim == 2)
    return weight.detach().view(-1, 28, 28)


def linear_regression() -> None:
    model, _ = train("mnist_linear_regression")
    softmax, _ = train("mnist_perceptron")
    figure = Figure(figsize=(9, 2.3), dpi=100, layout="constrained")
    grid = figure.subplots(2, 10)
    for axes, (name, weights) in zip(
        grid, (("regression", weights_of(model)), ("softmax", weights_of(softmax))), strict=True
    ):
        span = weights.abs().quantile(0.995).item()
        for digit in range(10):
            grey(axes[digit], weights[digit], str(digit) if name == "regression" else "", span)
        axes[0].set_ylabel(name, fontsize=8)
    save(figure, "linear")


def perceptron_rule() -> None:
    model, lines = train("mnist_rosenblatt")
    epochs = [line for line in lines if line["kind"] == "epoch"]
    figure = Figure(figsize=(7, 2.6), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[2, 1])
    images_in = 12_665  # zeros and ones among MNIST's training images
    wrong = [round((1 - line["train"]["accuracy"]) * images_in) for line in epochs]
    left.bar(range(1, len(wrong) + 1), wrong)
    for epoch, count in enumerate(wrong, 1):
        left.text(epoch, count, str(count), ha="center", va="bottom", fontsize=8)
    left.set_xlabel("epoch")
    left.set_title("mistakes while learning 0 and 1", fontsize=9)
    weight = weights_of(model)[0]
    grey(right, weight, "the weights: red says 1, blue says 0", weight.abs().max().item())
    save(figure, "perceptron_rule")


def activations() -> None:
    names = ("relu", "leaky_relu", "sigmoid", "tanh", "gelu", "softplus")
    x = torch.linspace(-4, 4, 401, requires_grad=True)
    figure = Figure(figsize=(9, 2.2), dpi=100, layout="constrained")
    for axes, name in zip(figure.subplots(1, 6, sharex=True), names, strict=True):
        y = find(name, "activation").factory((1,), 1)(x)
        (slope,) = torch.autograd.grad(y.sum(), x)
        axes.plot(x.detach(), y.detach(), label="value")
        axes.plot(x.detach(), slope, label="slope", ls="--")
        axes.set_ylim(-1.3, 2.3)
        axes.set_title(name, fontsize=9)
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=7)
    figure.axes[0].legend(frameon=False, fontsize=7)
    save(figure, "activations")


def depth() -> None:
    figure = Figure(figsize=(7, 3), dpi=100, layout="constrained")
    axes = figure.subplots()
    for name, label in (
        ("mnist_perceptron", "softmax regression: no hidden layer"),
        ("mnist_mlp", "MLP: 2 hidden layers"),
        ("mnist_deep_mlp", "deep MLP: 8 hidden layers"),
        ("mnist_cnn", "CNN: 3 convolutions"),
    ):
        _, lines = train(name)
        epochs = [line for line in lines if line["kind"] == "epoch"]
        errors = [100 - 100 * line["val"]["accuracy"] for line in epochs]
        axes.plot(range(1, len(errors) + 1), errors, label=label, marker="o", ms=3)
    axes.set_yscale("log")
    axes.set_yticks([0.5, 1, 2, 5, 10], ["0.5", "1", "2", "5", "10"])
    axes.set_xlabel("epoch")
    axes.set_title("MNIST: wrong on the 5,000 held-out images, %", fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8)
    save(figure, "depth")


def pooling() -> None:
    model, _ = train("mnist_pooling", "train.epochs=1")
    found, _ = images("mnist")
    image = found[:1]
    layers = list(model.model.children())
    with torch.no_grad():
        maps = layers[1](layers[0](model.normalise(image)))
    strongest = int(maps.amax((0, 2, 3)).argmax())
    seen = maps[:, strongest : strongest + 1]
    figure = Figure(figsize=(9, 2.1), dpi=100, layout="constrained")
    axes = figure.subplots(1, 6)
    grey(axes[0], image[0, 0], "image, 28x28")
    grey(axes[1], seen[0, 0], "conv 5, padding 2, relu: 28x28")
    grey(axes[2], seen[0, 0, ::2, ::2], "the same, stride 2: 14x14")
    for place, (pool, name) in enumerate(((maxpool, "maxpool"), (avgpool, "avgpool"), (sumpool, "sumpool")), 3):
        pooled = pool((1, 28, 28), 10, size=2)(seen)[0, 0]
        grey(axes[place], pooled, f"{name} 2: 14x14, up to {pooled.max():.1f}")
    for each in axes:
        each.title.set_fontsize(6.5)
    save(figure, "pooling")


def softmax() -> None:
    model, _ = train("mnist_perceptron")
    found, labels = images("mnist")
    with torch.no_grad():
        outputs = model.model(model.normalise(found))
    shares = outputs.softmax(1)
    top = shares.topk(2, 1).values
    doubtful = int((top[:, 0] - top[:, 1]).argmin())
    figure = Figure(figsize=(8, 2.3), dpi=100, layout="constrained")
    picture, left, right = figure.subplots(1, 3, width_ratios=[1, 2, 2])
    grey(picture, found[doubtful, 0], f"a test image, a {labels[doubtful]}")
    left.bar(range(10), outputs[doubtful])
    left.axhline(0, color="black", lw=0.5)
    left.set_title("outputs (logits)", fontsize=9)
    right.bar(range(10), shares[doubtful])
    right.set_title("softmax: exp(output) / their sum", fontsize=9)
    for axes in (left, right):
        axes.set_xticks(range(10))
        axes.tick_params(labelsize=7)
    save(figure, "softmax")


def conv_nd() -> None:
    found, _ = images("mnist")
    films, _ = images("moving_mnist")
    image = found[1, 0].float()
    figure = Figure(figsize=(9, 3.4), dpi=100, layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=[1, 1.15])
    left, middle, right = upper.subplots(1, 3, width_ratios=[1, 3, 1.6])
    grey(left, image, "image 1x28x28")
    rows = torch.cat([F.pad(row[:, None], (0, 1), value=90) for row in image], 1)  # [28, 28 * 2]
    grey(middle, rows, "rows: 28 places, each with 28 channels; conv1d slides from left to right")
    middle.set_aspect("auto")
    right.set_axis_off()
    right.text(0, 0.5, "a window of 5 places sees\n5 whole rows of the image", va="center", fontsize=8)
    for time, axes in enumerate(lower.subplots(1, 8)):
        grey(axes, films[2, time], f"frame {time + 1}")
    save(figure, "conv_nd")


def autoencoders() -> None:
    figure = Figure(figsize=(8, 3.6), dpi=100, layout="constrained")
    rows = figure.subplots(4, 12)
    found, labels = images("mnist")
    some = torch.cat([found[labels == digit][:1] for digit in range(10)] + [found[20:22]])
    for place, (name, title) in enumerate((("mnist_autoencoder", "32 numbers"), ("mnist_denoising", "noise away"))):
        model, _ = train(name)
        task = model.task
        draw = partial(Random, "picture", seed=0, epoch=0, index=torch.arange(len(some)))
        with torch.no_grad():
            inputs, _ = task.batch(some, labels[:0], model.normalise, draw)
            made = task.pixels(model.model(inputs))
        seen = model.normalise.undo(inputs)
        for row, pictures, text in ((2 * place, seen, "seen"), (2 * place + 1, made, title)):
            for axes, picture in zip(rows[row], pictures, strict=True):
                grey(axes, picture[0])
            rows[row][0].set_title(text, fontsize=8, loc="left")
    save(figure, "autoencoders")


def lines() -> None:
    model, _ = train("digit_lines_ctc")
    split = find("digit_lines", "data").factory(Files(data_root(), verify=False), train=1, test=5000).test
    with torch.no_grad():
        outputs = model.model(model.normalise(split.images[:200]))
    right = model.task.scores(outputs, split.labels[:200])
    chosen = [*right.nonzero()[:4, 0].tolist(), *(~right).nonzero()[:2, 0].tolist()]
    figure = Figure(figsize=(8, 4.2), dpi=100, layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[3, 2])
    for axes, number in zip(top.subplots(2, 3).flat, chosen, strict=True):
        read = " ".join(str(each) for each in read_lines(outputs[number : number + 1])[0].tolist() if each >= 0)
        true = " ".join(str(each) for each in split.labels[number].tolist() if each >= 0)
        grey(axes, split.images[number, 0], f"read: {read}" + ("" if right[number] else f"    is: {true}"))
        axes.title.set_fontsize(8)
    axes = bottom.subplots()
    shares = outputs[chosen[0]].softmax(0)
    for symbol in range(10):
        if shares[symbol].max() > 0.5:
            axes.plot(shares[symbol], label=str(symbol))
    axes.plot(shares[10], color="0.7", ls="--", label="none")
    axes.set_title("the first line: the probability of each digit, from place to place", fontsize=8)
    axes.legend(frameon=False, fontsize=7, ncols=7)
    save(figure, "lines")


def data() -> None:
    figure = Figure(figsize=(9, 2.1), dpi=75, layout="constrained")
    grid = figure.subplots(2, 10)
    names = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    for axes, (name, titles) in zip(grid, (("mnist", [str(n) for n in range(10)]), ("cifar10", names)), strict=True):
        found, labels = images(name)
        for number, title in enumerate(titles):
            image = found[(labels == number).nonzero()[0, 0]]
            grey(axes[number], image.permute(1, 2, 0).squeeze(2) if len(image) == 1 else image.permute(1, 2, 0), title)
    save(figure, "data")


PICTURES = (
    *(tensor, linear_regression, perceptron_rule, activations, depth, pooling, softmax, conv_nd),
    *(autoencoders, lines, data),
)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    asked = sys.argv[1:]
    for draw in PICTURES:
        if not asked or draw.__name__ in asked:
            draw()


if __name__ == "__main__":
    main()
