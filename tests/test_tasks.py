"""Reconstruction and transcription: by hand, against torch, and from the command line."""

from __future__ import annotations

import itertools
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run
from data_files import write_mnist
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F

import dltrain.components  # noqa: F401  registers what the tests name
from dltrain import config, figures, rundir
from dltrain.build import build
from dltrain.data.files import Files
from dltrain.data.lines import RISE, STEP, digit_lines
from dltrain.data.mnist import mnist
from dltrain.data.random import Random
from dltrain.errors import ConfigError
from dltrain.losses import bce, ctc, huber, mse, smooth_l1
from dltrain.metrics import edit_distance
from dltrain.models.autoencoder import autoencoder
from dltrain.registry import Item, find
from dltrain.tasks import Reconstruction, Transcription, read_lines

IMAGES = torch.randint(256, (6, 1, 4, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def draw(epoch: int = 0) -> Any:
    return partial(Random, 0, 0, seed=0, epoch=epoch, index=torch.arange(6))


def as_pixels(images: torch.Tensor) -> torch.Tensor:
    return images.float() / 255


# reconstruction


@pytest.mark.parametrize("loss", [mse, huber, smooth_l1, bce])
def test_losses_compare_sigmoids_with_pixels(loss: Any) -> None:
    outputs, targets = torch.randn(6, 20), IMAGES / 255
    pixels = outputs.view(6, 1, 4, 5).sigmoid()
    expected = {mse: F.mse_loss, huber: F.huber_loss, smooth_l1: F.smooth_l1_loss, bce: F.binary_cross_entropy}[loss]
    torch.testing.assert_close(loss(outputs, targets), expected(pixels, targets))
    halves = (loss(outputs[:2], targets[:2]) * 2 + loss(outputs[2:], targets[2:]) * 4) / 6
    torch.testing.assert_close(halves, loss(outputs, targets))  # so that micro-batches add up


def test_psnr_by_hand() -> None:
    task = Reconstruction((1, 1, 2), 2, "sigmoid")
    outputs = torch.tensor([[0.0, 0.0], [100.0, -100.0]])  # pixels 0.5 and 0.5; 1 and 0
    targets = torch.tensor([[[[0.6, 0.3]]], [[[1.0, 0.0]]]])
    found = task.scores(outputs, targets)
    assert found[0].item() == pytest.approx(-10 * math.log10((0.01 + 0.04) / 2), abs=1e-5)
    assert found[1].item() == pytest.approx(100)  # no error: the most that is said
    assert task.scores(outputs.view(2, 1, 1, 2), targets).tolist() == found.tolist()


def test_without_noise_the_model_sees_the_image_and_is_to_give_it_back() -> None:
    inputs, targets = Reconstruction((1, 4, 5), 10, "sigmoid").batch(IMAGES, torch.zeros(6), as_pixels, draw())
    assert torch.equal(inputs, IMAGES / 255)
    assert torch.equal(targets, IMAGES / 255)


def test_noise_is_on_what_the_model_sees_alone() -> None:
    grey = torch.full((50, 1, 20, 20), 128, dtype=torch.uint8)
    task = Reconstruction((1, 20, 20), 10, "sigmoid", noise=0.1)
    inputs, targets = task.batch(grey, torch.zeros(50), as_pixels, draw())
    assert torch.equal(targets, grey / 255)
    noise = inputs - targets
    assert noise.mean().item() == pytest.approx(0, abs=0.005)
    assert noise.std().item() == pytest.approx(0.1, rel=0.05)
    strong, _ = Reconstruction((1, 20, 20), 10, "sigmoid", noise=1.0).batch(grey, torch.zeros(50), as_pixels, draw())
    assert (strong.min().item(), strong.max().item()) == (0, pytest.approx(1))


def test_noise_is_a_function_of_seed_epoch_and_step() -> None:
    task = Reconstruction((1, 4, 5), 10, "sigmoid", noise=0.5)
    one, same, other = (task.batch(IMAGES, IMAGES, as_pixels, draw(epoch))[0] for epoch in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_pairs_of_images_and_what_was_made_of_them() -> None:
    pixels = torch.zeros(20, 1, 2, 3)
    picture = figures.pairs_picture(torch.full((20, 1, 2, 3), 255, dtype=torch.uint8), pixels)
    assert picture.shape == (6, 16 * 5, 3)  # a row of 16; four more make no whole one
    assert picture[1:3, 1:4].min() == 255  # the image above
    assert picture[3:5, 1:4].max() == 0  # what was made of it below
    assert (picture[0] == 128).all()
    assert figures.pairs_picture(torch.zeros(3, 3, 2, 2, dtype=torch.uint8), torch.rand(3, 3, 2, 2)).shape == (6, 12, 3)


def test_an_auto_encoder_goes_through_its_code() -> None:
    layers = [Item("layer", "activation").read(each) for each in ("flatten", {"linear": 7})]
    back = [Item("layer", "activation").read(each) for each in ({"linear": 20}, {"reshape": [5, 2, 2]})]
    model = autoencoder((1, 4, 5), 20, encoder=layers, decoder=back)
    assert model.get_submodule("encoder")(IMAGES.float()).shape == (6, 7)
    assert model(IMAGES.float()).shape == (6, 5, 2, 2)
    with pytest.raises(ValueError, match=r"decoder: ends with 19 numbers, the model needs 20"):
        autoencoder((1, 4, 5), 20, encoder=layers, decoder=[Item("layer").read({"linear": 19})])
    with pytest.raises(ValueError, match=r"decoder: layer 0 \(conv\): needs an image .*got 7"):
        autoencoder((1, 4, 5), 20, encoder=layers, decoder=[Item("layer").read({"conv": 8})])
    with pytest.raises(ValueError, match=r"to: 2x3 is of 6 numbers, and 7 come in \(7\)"):
        find("reshape", "layer").factory((7,), 20, to=[2, 3])


# transcription


def log_likelihood(scores: torch.Tensor, line: list[int]) -> float:
    """The sum over every way to place the symbols, by trying each; scores `[classes + 1, T]`."""
    shares = scores.softmax(0)
    blank, places = scores.shape[0] - 1, scores.shape[1]
    total = 0.0
    for path in itertools.product(range(blank + 1), repeat=places):
        read = [symbol for symbol, _ in itertools.groupby(path) if symbol != blank]
        if read == line:
            total += math.prod(shares[symbol, place].item() for place, symbol in enumerate(path))
    return math.log(total)


def test_ctc_is_the_sum_over_all_placements() -> None:
    outputs = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(3))  # three symbols and the blank, 5 places
    lines = [[0, 0], [2], [1, 2, 0]]
    targets = torch.tensor([line + [-1] * (3 - len(line)) for line in lines])
    terms = [-log_likelihood(each, line) / len(line) for each, line in zip(outputs, lines, strict=True)]
    assert ctc(outputs, targets).item() == pytest.approx(sum(terms) / 3, rel=1e-5)


def test_lines_are_read_without_blanks_and_repetitions() -> None:
    paths = torch.tensor([[0, 0, 3, 0, 1, 1], [3, 3, 3, 3, 3, 3], [2, 3, 2, 3, 1, 0]])  # 3 is the blank
    read = read_lines(F.one_hot(paths, 4).transpose(1, 2).float())
    assert read.tolist() == [[0, 0, 1, -1, -1, -1], [-1] * 6, [2, 2, 1, 0, -1, -1]]


def test_a_line_is_right_when_all_of_it_is() -> None:
    task = Transcription((1, 4, 8), 3, "softmax")
    paths = torch.tensor([[0, 3, 1], [0, 3, 1], [3, 3, 3], [2, 2, 2]])
    outputs = F.one_hot(paths, 4).transpose(1, 2).float()
    targets = torch.tensor([[0, 1, -1, -1], [0, 1, 2, -1], [1, -1, -1, -1], [2, -1, -1, -1]])
    assert task.scores(outputs, targets).tolist() == [True, False, False, True]
    assert task.scores(outputs, targets[:, :2]).tolist() == [True, True, False, True]  # shorter than the places
    assert task.also(outputs, targets) == {"character_error_rate": 2 / 7}  # a 2 is lacking, a 1 is lacking
    assert task.report(outputs, targets, "abc") == {"images": 4, "accuracy": 0.5, "character_error_rate": 2 / 7}


@pytest.mark.parametrize(
    ("one", "other", "edits"),
    [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("abc", "abc", 0), ("ab", "ba", 2)],
)
def test_edit_distance_by_hand(one: str, other: str, edits: int) -> None:
    assert edit_distance([*map(ord, one)], [*map(ord, other)]) == edits


@given(st.lists(st.integers(0, 2), max_size=6), st.lists(st.integers(0, 2), max_size=6))
def test_edit_distance_is_the_recursive_definition(one: list[int], other: list[int]) -> None:
    def distance(one: list[int], other: list[int]) -> int:
        if not one or not other:
            return len(one) + len(other)
        same = distance(one[1:], other[1:]) + (one[0] != other[0])
        return min(same, distance(one[1:], other) + 1, distance(one, other[1:]) + 1)

    assert edit_distance(one, other) == distance(one, other)


def test_what_no_line_can_be_read_from_is_refused() -> None:
    task = Transcription((1, 4, 8), 3, "softmax")
    lines = torch.tensor([[0, 0, 1], [2, -1, -1]])
    task.check((4, 4), lines)  # 0, none, 0, 1
    with pytest.raises(ConfigError, match=r"3 places, a line needs 4 \(a symbol each, and one between equal ones\)"):
        task.check((4, 3), lines)
    with pytest.raises(ConfigError, match=r"gives 4 numbers, expected 4 \(the classes, and one for none\) x places"):
        task.check((4,), lines)
    with pytest.raises(ConfigError, match="one label each: use classification"):
        task.check((4, 4), torch.tensor([0, 1]))


def test_lines_are_made_of_the_splits_own_digits(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    files = Files(tmp_path, verify=False, report=print)
    digits, made = mnist(files), digit_lines(files, longest=3, train=40, test=10)
    for split, source in ((made.train, digits.train), (made.test, digits.test)):
        assert split.images.shape[1:] == (1, 36, 80)
        lengths = (split.labels >= 0).sum(1)
        assert set(lengths.tolist()) == {1, 2, 3}
        for image, line in zip(split.images[lengths == 1], split.labels[lengths == 1], strict=True):
            assert (line[1:] == -1).all()
            tops = [image[0, 4 + rise : 32 + rise, :28] for rise in range(-RISE, RISE + 1)]
            same = source.images[source.labels == line[0], 0]
            assert any((same == top).all((1, 2)).any() for top in tops)
            assert image[0, :, 28:].max() == 0
    two = (made.train.labels >= 0).sum(1) == 2
    far = made.train.images[two][:, 0].amax(1) > 0  # [M, 80]: columns with ink; noise fills each digit's 28
    widths = far.sum(1)
    assert (widths >= STEP[0] + 28).all()
    assert (widths <= STEP[1] + 28).all()
    again, other = (digit_lines(files, longest=3, train=40, test=10, seed=seed) for seed in (0, 1))
    assert torch.equal(again.train.images, made.train.images)
    assert torch.equal(again.train.labels, made.train.labels)
    assert not torch.equal(other.train.labels, made.train.labels)
    more = digit_lines(files, longest=3, train=40, test=11)
    assert more.files == made.files
    assert made.classes == tuple("0123456789")


# what does not go together

AUTO = {"name": "a", "data": "digits", "task": "reconstruction", "loss": "mse", "optim": {"name": "sgd", "lr": 0.1}}
AUTO["model"] = {"name": "mlp", "hidden": [4], "output": "sigmoid"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"loss": "cross_entropy"},
            r"loss: cross_entropy is not of reconstruction: set loss to bce or huber or mse or",
        ),
        ({"task": "transcription"}, r"loss: mse is not of transcription: set loss to ctc"),
        ({"task": "classification", "loss": "ctc"}, r"loss: ctc is not of classification"),
        ({"train": {"choose_by": "val_accuracy"}}, r"choose_by: expected val_psnr, val_loss or last of reconstruction"),
        ({"data": {"name": "digits", "augment": ["mixup"]}}, r"augment.0: mixup needs an image to be of one class"),
        ({"data": {"name": "digits", "balance": True}}, r"data.balance: needs an image to be of one class"),
        ({"evaluate": {"views": [{"mirror": True}]}}, r"evaluate.views: needs an image to be of one class"),
    ],
)
def test_settings_of_another_task_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.from_plain({**AUTO, "data": {"name": "digits", "val": 0.1}, **changes}, "test")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"name": "mlp", "hidden": [4]}}, r"model.output: softmax is of classes, pixels are of a sigmoid"),
        ({"loss": {"name": "bce", "class_weights": [1, 2]}}, r"class_weights: pixels have no class"),
        ({"task": "transcription", "loss": "ctc"}, r"model.output: sigmoid is of two classes or pixels"),
    ],
)
def test_what_does_not_fit_the_task_is_refused_when_it_is_built(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(config.from_plain({**AUTO, **changes}, "test"), print)


def test_lines_are_no_classes(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    data = {"name": "digit_lines", "train": 200, "test": 5, "root": str(tmp_path), "verify": False}
    plain = {**AUTO, "data": data, "model": "perceptron", "task": "classification", "loss": "cross_entropy"}
    with pytest.raises(ConfigError, match=r"have a line of labels each: use transcription"):
        build(config.from_plain(plain, "test"), print)
    with pytest.raises(ConfigError, match=r"data.classes: each image of this data set has several labels"):
        build(config.from_plain({**plain, "data": {**data, "classes": [1, 2]}}, "test"), print)


# from the command line

TRAIN = """
data: {name: digits, val: 0.1}
model: {name: mlp, hidden: [16, 4, 16], output: sigmoid}
task: {name: reconstruction, noise: 0.2}
loss: bce
optim: {name: adam, lr: 0.003}
train: {epochs: 2, log_every_steps: 3, checkpoint_every_steps: 5}
tensorboard: {embedding: true}
"""
LINES = """
data: {name: digit_lines, train: 60, test: 20, val: 10, verify: false}
model: {name: cnn, layers: [{maxpool: 4}, columns, {conv1d: {out: classes, kernel: 3}}]}
task: transcription
loss: ctc
optim: {name: adam, lr: 0.003}
descent: {batch_size: 20}
train: {epochs: 1}
tensorboard: {embedding: true}
"""


@pytest.fixture
def written(tmp_path: Path) -> Path:
    (tmp_path / "a.yaml").write_text(TRAIN)
    (tmp_path / "lines.yaml").write_text(LINES)
    write_mnist(tmp_path / "data")
    return tmp_path


def test_an_auto_encoder_trains_and_is_judged(dltrain: Run, written: Path) -> None:
    done = dltrain("train", "a.yaml", "--out", "run", "--json")
    assert done.code == 0, done.err
    summary = json.loads(done.out)
    assert (summary["chosen_by"], set(summary["test"])) == ("val_psnr", {"loss", "psnr"})
    judged = json.loads(dltrain("eval", "run", "--json").out)
    assert (judged["task"], judged["psnr"], judged["loss"]) == (
        "reconstruction",
        *map(summary["test"].get, ("psnr", "loss")),
    )
    assert json.loads(dltrain("eval", "run", "--json").out)["psnr"] == judged["psnr"]  # the noise is the same
    assert "accuracy" not in dltrain("eval", "run").out
    epochs = [record for record in rundir.records(Path("run")) if record["kind"] == "epoch"]
    assert max(record["val"]["psnr"] for record in epochs) == summary["val"]["psnr"]
    events = EventAccumulator("run")
    events.Reload()
    assert {"psnr/train", "psnr/val", "final/test_psnr"} <= set(events.Tags()["scalars"])
    assert "test/reconstructions" in events.Tags()["images"]
    assert np.loadtxt("run/embedding/vectors.tsv").shape == (359, 16)


def test_a_reconstruction_is_what_it_was_trained_to_be(dltrain: Run, written: Path) -> None:
    """Judged again by hand: the pixels, without noise, of the model that the run chose."""
    assert dltrain("train", "a.yaml", "--out", "run", "-q", "--set", "task.noise=0").code == 0
    from dltrain import trained

    model = trained.load(Path("run"), "cpu", print)
    scores, _ = trained.judge(model, "test", None, print)
    images = build(model.config, print).data.test.images
    with torch.no_grad():
        pixels = model.model(model.normalise(images)).sigmoid().view_as(images)
    errors = (pixels - images / 255).square().mean((1, 2, 3))
    assert scores["psnr"] == pytest.approx((-10 * errors.log10()).mean().item(), abs=1e-4)
    assert scores["loss"] == pytest.approx(F.binary_cross_entropy(pixels, images / 255).item(), rel=1e-5)


def test_a_killed_auto_encoder_ends_in_the_same_bits(dltrain: Run, written: Path) -> None:
    done = dltrain("verify-resume", "a.yaml", "--kills", "2", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["same"] is True


def test_lines_are_trained_on_and_judged(dltrain: Run, written: Path) -> None:
    done = dltrain("train", "lines.yaml", "--out", "run", "--json")
    assert done.code == 0, done.err
    test = json.loads(done.out)["test"]
    assert set(test) == {"loss", "accuracy", "character_error_rate"}
    judged = json.loads(dltrain("eval", "run", "--json").out)
    assert (judged["task"], judged["character_error_rate"]) == ("transcription", test["character_error_rate"])
    assert "embedding" in done.err
    events = EventAccumulator("run")
    events.Reload()
    assert "test/lines" in events.Tags()["images"]


@pytest.mark.parametrize("command", [["predict", "run", "image.png"], ["eval", "run", "--out", "rows.csv"]])
def test_what_names_classes_is_refused(dltrain: Run, written: Path, command: list[str]) -> None:
    assert dltrain("train", "a.yaml", "--out", "run", "-q").code == 0
    from PIL import Image

    Image.new("L", (8, 8)).save("image.png")
    done = dltrain(*command)
    assert (done.code, "task is reconstruction" in done.err) == (2, True), done.err
