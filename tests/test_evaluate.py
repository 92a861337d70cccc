"""One pass over a split, against numbers worked out by hand."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run
from torch import nn
from torch.nn import functional as F

from dltrain import checkpoint, config, rundir
from dltrain import evaluate as evaluation
from dltrain.config import View
from dltrain.data.augment import translate
from dltrain.data.batches import Normalise
from dltrain.data.dataset import Split
from dltrain.data.prepare import Normalisation, measure_normalisation
from dltrain.device import Placement
from dltrain.errors import ConfigError
from dltrain.evaluate import Evaluation, check_views, evaluate, view_of
from dltrain.registry import Section
from dltrain.tasks import Classification, predicted, probabilities

CPU = torch.device("cpu")
TASK = Classification((1, 1, 2), 2, "softmax")


def run(
    model: nn.Module,
    split: Split,
    loss: str = "cross_entropy",
    dtype: torch.dtype = torch.float32,
    views: Sequence[View] = (),
) -> Evaluation:
    placement = Placement(CPU, dtype, torch.contiguous_format, {})
    normalise = Normalise(Normalisation([0.0], [1.0]), CPU, torch.contiguous_format)  # pixels 0..1
    return evaluate(model, split, normalise, placement, Section("loss").read(loss), TASK, views)


def split(images: list[list[int]], labels: list[int]) -> Split:
    """One row of pixels an image."""
    return Split(torch.tensor(images, dtype=torch.uint8)[:, None, None, :], torch.tensor(labels))


def linear(weight: list[list[float]]) -> nn.Module:
    layer = nn.Linear(len(weight[0]), len(weight), bias=False)
    layer.weight.data = torch.tensor(weight)
    return nn.Sequential(nn.Flatten(), layer)


def test_loss_and_accuracy_by_hand():
    # the logits are ln 3 times the pixels, so [1, 0] has probabilities 3/4 and 1/4
    model = linear([[math.log(3), 0.0], [0.0, math.log(3)]])
    found = run(model, split([[255, 0], [0, 255], [255, 0], [255, 255]], [0, 1, 1, 0]))
    assert found.loss == pytest.approx((2 * math.log(4 / 3) + math.log(4) + math.log(2)) / 4)
    assert found.figures["accuracy"] == 0.75
    expected = math.log(3) * torch.tensor([[1.0, 0], [0, 1], [1, 0], [1, 1]])
    torch.testing.assert_close(found.outputs, expected)
    assert found.labels.tolist() == [0, 1, 1, 0]
    assert found.scores() == {"loss": found.loss, "accuracy": 0.75}
    assert found.plain_accuracy is None
    assert found.seconds > 0


def test_one_output_of_a_sigmoid_by_hand():
    model = linear([[2 * math.log(3), -math.log(3)]])
    found = run(model, split([[255, 255], [0, 255], [0, 255], [0, 0]], [1, 0, 1, 0]), "bce")
    # probabilities of class 1: 3/4, 1/4, 1/4, 1/2; the last is no class 1 yet
    assert found.loss == pytest.approx((math.log(4 / 3) * 2 + math.log(4) + math.log(2)) / 4)
    assert found.figures["accuracy"] == 0.75
    assert found.outputs.shape == (4, 1)


@pytest.mark.parametrize("right", [0, 1, 2, 3])
def test_accuracy_is_the_share_to_the_last_digit(right):
    model = linear([[1.0], [0.0]])
    assert run(model, split([[255]] * 3, [0] * right + [1] * (3 - right))).figures["accuracy"] == right / 3


def noise(count: int) -> Split:
    random = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 1, 4, 4), generator=random, dtype=torch.uint8)
    return Split(images, torch.randint(3, (count,), generator=random))


@pytest.mark.parametrize("loss", ["cross_entropy", "mse"])
@pytest.mark.parametrize("size", [1, 7, 22, 23, 24])
def test_ragged_batches_are_one_batch(monkeypatch, size, loss):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))
    model(torch.randn(50, 1, 4, 4))  # statistics that are not 0 and 1
    whole = run(model, noise(23), loss)
    monkeypatch.setattr(evaluation, "BATCH", size)
    parts = run(model, noise(23), loss)
    assert parts.figures["accuracy"] == whole.figures["accuracy"]
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    torch.testing.assert_close(parts.outputs, whole.outputs)
    assert torch.equal(parts.labels, noise(23).labels)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_evaluated_and_left_as_it_was(training):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    model(torch.randn(50, 1, 4, 4))
    model.train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    found = run(model, noise(23))
    assert {module.training for module in model.modules()} == {training}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)  # no dropout
    torch.testing.assert_close(found.outputs, model.eval()(noise(23).images / 255), rtol=1e-4, atol=1e-5)


def test_images_are_normalised():
    seen: list[torch.Tensor] = []

    class Watch(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            return x.flatten(1)

    images = noise(23)
    measured = measure_normalisation(images.images)
    normalise = Normalise(measured, CPU, torch.channels_last)
    placement = Placement(CPU, torch.float32, torch.channels_last, {})
    evaluate(Watch(), images, normalise, placement, Section("loss").read("cross_entropy"), TASK)
    assert torch.equal(torch.cat(seen), normalise(images.images))


def test_half_precision_is_used_and_outputs_are_float32():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    found = run(model, noise(23), dtype=torch.bfloat16)
    assert found.outputs.dtype == torch.float32
    assert torch.equal(found.outputs, found.outputs.bfloat16().float())  # computed in bfloat16
    torch.testing.assert_close(found.outputs, run(model, noise(23)).outputs, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        ([[1.0, 2, 0], [3, 3, 1], [-1, -2, -3]], [1, 0, 0]),  # the lower class of two that tie
        ([[0.1], [-0.1], [0.0], [5.0]], [1, 0, 0, 1]),
    ],
)
def test_predicted_by_hand(outputs, expected):
    found: Any = predicted(torch.tensor(outputs))
    assert (found.tolist(), found.dtype) == (expected, torch.int64)


def test_probabilities_by_hand():
    three = probabilities(torch.tensor([[math.log(2), math.log(5), math.log(3)], [7.0, 7.0, 7.0]]))
    torch.testing.assert_close(three, torch.tensor([[0.2, 0.5, 0.3], [1 / 3] * 3]))
    one = probabilities(torch.tensor([[math.log(3)], [0.0], [-math.log(4)]]))
    torch.testing.assert_close(one, torch.tensor([[0.25, 0.75], [0.5, 0.5], [0.8, 0.2]]))


def test_probabilities_speak_for_the_predicted_class():
    for width in (1, 4):
        outputs = torch.randn(200, width, generator=torch.Generator().manual_seed(0))
        shares = probabilities(outputs)
        torch.testing.assert_close(shares.sum(1), torch.ones(200))
        assert torch.equal(shares.argmax(1), predicted(outputs))


# Views


def view(shift: tuple[int, int] = (0, 0), **settings: Any) -> View:
    return View(shift=list(shift), **settings)


# of Jordan 2024, arXiv 2404.00498, section 3.5
SIX = [
    view(shift, mirror=mirror, weight=2 if shift == (0, 0) else 1)
    for shift in [(0, 0), (-1, -1), (1, 1)]
    for mirror in (False, True)
]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [[1, 2, 3], [4, 5, 6]]),
        ({"mirror": True}, [[3, 2, 1], [6, 5, 4]]),
        ({"shift": [1, 0]}, [[4, 5, 6], [1, 2, 3]]),
        ({"shift": [-1, 0], "pad": "zero"}, [[4, 5, 6], [0, 0, 0]]),
        ({"shift": [0, 1]}, [[2, 1, 2], [5, 4, 5]]),
        ({"shift": [0, 2]}, [[3, 2, 1], [6, 5, 4]]),
        ({"shift": [0, -1]}, [[2, 3, 2], [5, 6, 5]]),
        ({"shift": [0, -2], "pad": "replicate"}, [[3, 3, 3], [6, 6, 6]]),
        ({"shift": [0, 2], "pad": "replicate"}, [[1, 1, 1], [4, 4, 4]]),
        ({"shift": [1, -1], "pad": "zero"}, [[0, 0, 0], [2, 3, 0]]),
        ({"shift": [0, 1], "pad": "zero", "mirror": True}, [[2, 1, 0], [5, 4, 0]]),  # mirrored after the shift
    ],
)
def test_views_of_an_image_by_hand(settings, expected):
    images = torch.tensor([[[[1, 2, 3], [4, 5, 6]]]], dtype=torch.uint8)
    found = view_of(images, View(**settings))
    assert (found[0, 0].tolist(), found.dtype, found.shape) == (expected, torch.uint8, images.shape)


@pytest.mark.parametrize("pad", ["reflect", "zero"])
def test_a_shift_is_one_that_translate_draws(pad):
    images = torch.randint(256, (4, 3, 5, 7), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)

    class Drawn:
        def __init__(self, *places: int) -> None:
            self.places = places

        def integers(self, bound: int, *shape: int) -> torch.Tensor:
            assert max(self.places) < bound
            return torch.tensor(self.places)[:, None].expand(shape)

    for down in range(-3, 4):
        for right in range(-3, 4):
            drawn: Any = Drawn(3 - down, 3 - right)
            expected = translate(images, drawn, pixels=3, pad=pad)
            assert torch.equal(view_of(images, view((down, right), pad=pad)), expected)


def test_a_mirrored_mirror_is_the_image():
    images = noise(3).images
    once = view_of(images, view(mirror=True))
    assert torch.equal(view_of(once, view(mirror=True)), images)
    assert not torch.equal(once, images)


def test_scores_over_views_by_hand():
    # the mirror has a quarter of the weight: logits ln 9 times (3/4 pixel + 1/4 mirrored pixel)
    model = linear([[math.log(9), 0.0], [0.0, math.log(9)]])
    images = split([[255, 0], [0, 255], [255, 255]], [0, 0, 0])
    found = run(model, images, views=[view(weight=6), view(weight=2, mirror=True)])
    expected = math.log(9) * torch.tensor([[0.75, 0.25], [0.25, 0.75], [1, 1]])
    torch.testing.assert_close(found.outputs, expected)
    # a difference of ln 3 between the logits: probabilities 3/4 and 1/4
    assert found.loss == pytest.approx((math.log(4 / 3) + math.log(4) + math.log(2)) / 3)
    assert (found.figures["accuracy"], found.plain_accuracy) == (2 / 3, 2 / 3)
    assert found.scores() == {"loss": found.loss, "accuracy": 2 / 3, "plain_accuracy": 2 / 3}
    mirrored = run(model, images, views=[view(mirror=True)])
    assert (mirrored.figures["accuracy"], mirrored.plain_accuracy) == (2 / 3, 2 / 3)
    assert predicted(mirrored.outputs).tolist() == [1, 0, 0]
    away = run(model, split([[255, 0]] * 3, [0, 0, 1]), views=[view(mirror=True)])
    assert (away.figures["accuracy"], away.plain_accuracy) == (1 / 3, 2 / 3)


def test_one_output_is_averaged_before_its_sigmoid():
    found = run(linear([[2.0, -4.0]]), split([[255, 0]], [1]), "bce", views=[view(), view(mirror=True)])
    torch.testing.assert_close(found.outputs, torch.tensor([[-1.0]]))
    assert (found.figures["accuracy"], found.plain_accuracy) == (0.0, 1.0)


def network(channels: int) -> nn.Module:
    """It tells left from right, and what lies at the border."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(channels, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4))
    model(torch.randn(50, channels, 6, 5))  # statistics that are not 0 and 1
    return model


@pytest.mark.parametrize("channels", [1, 3])
def test_six_views_are_six_evaluations_of_images_that_numpy_moved(monkeypatch, channels):
    random = np.random.default_rng(0)
    pixels = random.integers(256, size=(23, channels, 6, 5), dtype=np.uint8)
    labels = torch.from_numpy(random.integers(4, size=23))
    padded = np.pad(pixels, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="reflect")
    model = network(channels)

    def outputs(moved: np.ndarray[Any, Any]) -> torch.Tensor:
        alone = run(model, Split(torch.from_numpy(moved.copy()), labels))
        assert alone.plain_accuracy is None
        return alone.outputs

    expected = sum(
        share * outputs(moved[..., ::way])
        for moved, share in ((pixels, 1 / 4), (padded[:, :, 2:, 2:], 1 / 8), (padded[:, :, :-2, :-2], 1 / 8))
        for way in (1, -1)
    )
    images = Split(torch.from_numpy(pixels), labels)
    monkeypatch.setattr(evaluation, "BATCH", 7)
    found = run(model, images, views=SIX)
    torch.testing.assert_close(found.outputs, expected)
    assert found.loss == pytest.approx(F.cross_entropy(expected, labels).item(), rel=1e-5)
    assert found.figures["accuracy"] == (expected.argmax(1) == labels).sum().item() / 23
    assert found.plain_accuracy == run(model, images).figures["accuracy"]


@pytest.mark.parametrize("weight", [1, 0.3, 7])
def test_the_image_as_it_is_as_the_only_view_changes_no_bit(weight):
    model, images = network(1), Split(torch.randint(256, (9, 1, 6, 5)).byte(), torch.randint(4, (9,)))
    alone, plain = run(model, images, views=[view(weight=weight)]), run(model, images)
    assert torch.equal(alone.outputs, plain.outputs)
    assert (alone.loss, alone.figures["accuracy"], alone.plain_accuracy) == (
        plain.loss,
        plain.figures["accuracy"],
        plain.figures["accuracy"],
    )


def test_weights_are_relative():
    model, images = network(1), Split(torch.randint(256, (9, 1, 6, 5)).byte(), torch.randint(4, (9,)))
    found = run(model, images, views=SIX)
    eighths = [each.model_copy(update={"weight": each.weight / 8}) for each in SIX]
    assert torch.equal(run(model, images, views=eighths).outputs, found.outputs)
    equal = [each.model_copy(update={"weight": 1.0}) for each in SIX]
    assert not torch.allclose(run(model, images, views=equal).outputs, found.outputs)


@pytest.mark.parametrize(("views", "passes"), [([], 1), (SIX, 6), ([view(mirror=True)], 2), ([view(), view()], 1)])
def test_the_image_as_it_is_is_computed_once(views, passes):
    model, seen = linear([[1.0, 0, 0, 0], [0, 1, 0, 0]]), []
    model.register_forward_hook(lambda *of_model: seen.append(1))
    run(model, Split(torch.zeros(3, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1, 1])), views=views)
    assert len(seen) == passes


@pytest.mark.parametrize("shift", [(2, 4), (-2, -4), (0, 0)])
def test_shifts_that_leave_a_pixel_are_right(shift):
    check_views([view(shift)], (1, 3, 5))
    view_of(torch.zeros(1, 1, 3, 5, dtype=torch.uint8), view(shift))


@pytest.mark.parametrize("shift", [(3, 0), (-3, 0), (0, 5), (0, -5)])
def test_shifts_that_leave_none_are_named(shift):
    text = r"evaluate\.views\.1\.shift: expected at most 2 down or up and 4 right or left of 3x5 images, got "
    with pytest.raises(ConfigError, match=text + rf"\[{shift[0]}, {shift[1]}\]$"):
        check_views([view(), view(shift)], (1, 3, 5))


# Views in a config, a run and a checkpoint

CONFIG = """
data: {name: digits, limit: 300, val: 60}
model: {name: mlp, hidden: [16]}
optim: {name: sgd, lr: 0.1, momentum: 0.9}
train: {epochs: 2, device: cpu, precision: fp32}
"""
VIEWS = """
evaluate:
  views:
    - {}
    - {shift: [1, 0], pad: zero}
    - {shift: [0, -1], mirror: true, weight: 0.5}
"""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("evaluate: {view: []}", "evaluate.view: unknown key; did you mean 'views'?"),
        ("evaluate: {views: {mirror: true}}", "evaluate.views: expected a list, got a mapping"),
        ("evaluate: {views: [mirror]}", "evaluate.views.0: expected settings (key: value), got 'mirror'"),
        ("evaluate: {views: [{}, {flip: true}]}", "evaluate.views.1.flip: unknown key"),
        ("evaluate: {views: [{mirror: 1}]}", "evaluate.views.0.mirror: expected true or false, got 1"),
        ("evaluate: {views: [{weight: 0}]}", "evaluate.views.0.weight: expected more than 0, got 0"),
        ("evaluate: {views: [{weight: .inf}]}", "evaluate.views.0.weight: expected at most 1000000, got .inf"),
        ("evaluate: {views: [{weight: .nan}]}", "evaluate.views.0.weight: expected "),
        ("evaluate: {views: [{shift: 1}]}", "evaluate.views.0.shift: expected a list, got 1"),
        ("evaluate: {views: [{shift: [1]}]}", "evaluate.views.0.shift: expected a list of at least 2, got a list of 1"),
        ("evaluate: {views: [{shift: [1, 0.5]}]}", "evaluate.views.0.shift.1: expected a whole number, got 0.5"),
        (
            "evaluate: {views: [{pad: mirror}]}",
            "evaluate.views.0.pad: expected reflect, replicate or zero, got 'mirror'",
        ),
    ],
)
def test_mistakes_in_views_are_named_with_their_line(dltrain: Run, line, message):
    Path("c.yaml").write_text(CONFIG + line + "\n")
    done = dltrain("train", "c.yaml", "--out", "run")
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert done.err.startswith(f"error: c.yaml:6: {message}")


def test_a_shift_beyond_the_images_is_refused_before_training(dltrain: Run):
    Path("c.yaml").write_text(CONFIG)
    done = dltrain("train", "c.yaml", "--out", "run", "-q", "--set", "evaluate.views=[{shift: [8, 0]}]")
    text = "evaluate.views.0.shift: expected at most 7 down or up and 7 right or left of 8x8 images, got [8, 0]"
    assert (done.code, done.err) == (2, f"error: {text}\n")
    assert not Path("run").exists()


def test_a_run_ends_with_both_figures_and_eval_repeats_them(dltrain: Run):
    Path("plain.yaml").write_text(CONFIG)
    Path("c.yaml").write_text(CONFIG + VIEWS)
    plain = json.loads(dltrain("train", "plain.yaml", "--out", "plain", "-q", "--json").out)
    done = dltrain("train", "c.yaml", "--out", "run", "-q")
    summary = json.loads(Path("run/summary.json").read_text())
    assert (summary["views"], "views" in plain) == (3, False)
    assert config.load(Path("run/config.yaml")).evaluate == config.load(Path("c.yaml")).evaluate
    assert summary["train"] == plain["train"]
    for name in ("val", "test"):
        assert summary[name]["plain_accuracy"] == plain[name]["accuracy"]
        assert summary[name]["loss"] != plain[name]["loss"]
    mid_run = [[each.get("val") for each in rundir.records(Path(folder))] for folder in ("plain", "run")]
    assert mid_run[0] == mid_run[1]  # there the images are seen as they are
    shares = {name: [f"{100 * each:.2f}" for each in summary[name].values()][1:] for name in ("train", "val", "test")}
    rows = {words[0]: words[2::2] for line in done.out.splitlines() if (words := line.split()) and words[0] in shares}
    assert rows == shares | {"train": shares["train"] * 2}
    assert "views: 3 of each image, averaged; training images as they are" in done.out

    Path("run/best.safetensors").rename("alone.safetensors")  # which holds its config, and so its views
    for name in ("train", "val", "test"):
        found = json.loads(dltrain("eval", "alone.safetensors", "--split", name, "--json").out)
        same = json.loads(dltrain("eval", "plain", "--split", name, "--json").out)
        assert (found["views"], found["plain_accuracy"]) == (3, same["accuracy"])
        assert found["loss"] != same["loss"]
        assert not {"views", "plain_accuracy"} & same.keys()
        if name != "train":
            assert {key: found[key] for key in summary[name]} == summary[name]
    table = dltrain("eval", "alone.safetensors").out
    assert "digits test: 359 images, 3 views of each\n" in table
    assert re.search(
        rf"^ *accuracy without views +{100 * summary['test']['plain_accuracy']:.2f} % *$", table, re.MULTILINE
    )
    assert "views" not in dltrain("eval", "plain").out


def test_a_checkpoint_with_views_that_do_not_fit_its_images_is_refused(dltrain: Run):
    Path("c.yaml").write_text(CONFIG)
    assert dltrain("train", "c.yaml", "--out", "run", "-q").code == 0
    tensors, meta = checkpoint.read(Path("run/best.safetensors"))
    meta = {key: value for key, value in meta.items() if key not in ("sha256", "format")}
    meta["config"]["evaluate"] = {"views": [{"shift": [0, 99]}]}
    Path("x.safetensors").write_bytes(checkpoint.encode(tensors, meta))
    done = dltrain("eval", "x.safetensors")
    assert (done.code, done.out, done.err.count("\n")) == (4, "", 1)
    assert "x.safetensors: its config is not valid here: evaluate.views.0.shift: expected at most 7 down" in done.err
