"""Gradients: analytic and numeric ones agree, and a backward pass that is wrong is found, by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import Run
from torch.nn import functional as F

from dltrain import config
from dltrain.build import build
from dltrain.gradcheck import gradcheck

PLUGIN = '''
import torch
from torch import nn
from dltrain.registry import register

class Sine(torch.autograd.Function):
    """Twice the gradient that it should be."""
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()
    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient * ctx.saved_tensors[0].cos()

class Product(torch.autograd.Function):
    """Right for x, and for the weight 1 % too much."""
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x * weight
    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient * weight, 1.01 * (gradient * x).sum(0)

class Steep(torch.autograd.Function):
    """max(0, x), whose slope at 0 is none of those between 0 and 1."""
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.relu()
    @staticmethod
    def backward(ctx, gradient):
        x, = ctx.saved_tensors
        return gradient * torch.where(x == 0, 2.0, (x > 0).double())

class Times(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
    def forward(self, x):
        return Product.apply(x, self.weight)

class Of(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
    def forward(self, x):
        return self.function(x)

@register("activation")
def sine(shape, outputs):
    """sin(x)."""
    return Of(Sine.apply)

@register("activation")
def single(shape, outputs):
    """x as float32."""
    return Of(lambda x: x.float())

@register("layer")
def times(shape, outputs):
    """x times a weight."""
    return Times(shape)

@register("loss")
def corner(outputs, targets):
    """The sum of what is positive."""
    return outputs.relu().sum()

@register("loss")
def steep(outputs, targets):
    """The same."""
    return Steep.apply(outputs).sum()

@register("loss")
def sines(outputs, targets):
    """The mean of the sines."""
    return Sine.apply(outputs).mean()

@register("loss")
def root(outputs, targets):
    """Its slope at 0 is infinite."""
    return outputs.square().sum().sqrt()

@register("loss")
def broken(outputs, targets):
    """Not a number."""
    return outputs.mean() / 0
'''
CONFIG = """
plugins: [mine.py]
data: {name: digits, limit: 200}
model: {name: cnn, layers: [{conv: {out: 3, kernel: 3}}, tanh, flatten, {linear: 6}, tanh, {linear: classes}]}
optim: {name: sgd, lr: 0.1}
"""
ZEROS = "model.layers=[flatten, {linear: {out: classes, init: zeros}}]"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(PLUGIN)
    (tmp_path / "c.yaml").write_text(CONFIG)
    return tmp_path / "c.yaml"


def layers(*inserted: str) -> str:
    return f"model.layers=[{{conv: 3}}, tanh, flatten, {', '.join(inserted)}, {{linear: 6}}, relu, {{linear: classes}}]"


@pytest.mark.parametrize("name", ["digits_mlp", "digits_cnn"])
def test_relu_pooling_dropout_and_batch_normalisation_are_right(dltrain: Run, name: str) -> None:
    done = dltrain("gradcheck", name, "--weights", 6, "--json")
    found = json.loads(done.out)
    assert (done.code, found["ok"], found["wrong"]) == (0, True, [])
    rows = found["parameters"] + found["layers"]
    assert max(row["error"] for row in rows if row["error"] is not None) < 1e-5
    assert sum(row["at_kink"] for row in rows) <= 2
    assert [row["tried"] for row in found["parameters"]] == [min(6, row["size"]) for row in found["parameters"]]
    assert max(row["gradient"] for row in found["parameters"]) > 0.01
    kinds = {row["kind"] for row in found["layers"]}
    assert kinds >= {"ReLU", "BatchNorm1d" if name == "digits_mlp" else "MaxPool2d", "cross_entropy"}


@pytest.mark.parametrize(
    "settings",
    [
        [
            "task={name: reconstruction, noise: 0.3}",
            "loss=bce",
            "model.output=sigmoid",
            "model.layers=[flatten, {linear: 64}]",
        ],
        ["data.augment=[mixup]", "model.layers=[flatten, {linear: classes}]"],
    ],
)
def test_targets_that_are_no_labels(path: Path, settings: list[str]) -> None:
    found = gradcheck(config.load(path, settings), 4, print)
    assert found["ok"]
    assert max(row["error"] for row in found["parameters"]) < 1e-5


def test_the_page_shows_what_the_command_says(dltrain: Run) -> None:
    page = (Path(__file__).parent.parent / "docs/gradients.md").read_text(encoding="utf-8")
    rows = [line.split() for line in dltrain("gradcheck", "digits_cnn").out.splitlines() if line.endswith("ok ")]
    shown = [line.split() for line in page.splitlines() if line.endswith(" ok")]
    assert len(rows) == 10
    assert [(row[0], row[1]) for row in rows] == [(row[0], row[1]) for row in shown]
    for row, other in zip(rows, shown, strict=True):
        assert float(row[2]) == pytest.approx(float(other[2]), rel=0.1, abs=1e-12)


def test_both_gradients_are_the_formula_s(path: Path) -> None:
    loaded = config.load(path, ["model=perceptron", "loss=mse", "descent.batch_size=8"])
    setup = build(loaded, print)
    images, labels, _ = next(setup.batches().step(0, 0))
    rows, targets = images.flatten(1).double(), F.one_hot(labels, 10).double()
    weight, bias = (each.detach().double() for each in setup.model.parameters())
    residuals = rows @ weight.T + bias - targets
    gradients = {"1.weight": 2 * residuals.T @ rows / residuals.numel(), "1.bias": 2 * residuals.sum(0) / 80}
    found = gradcheck(loaded, 5, print)
    assert found["loss"] == pytest.approx(residuals.square().mean().item(), rel=1e-12)
    assert [row["name"] for row in found["parameters"]] == list(gradients)
    for row in found["parameters"]:
        worst, expected = row["worst"], gradients[row["name"]]
        assert worst["analytic"] == pytest.approx(expected[tuple(worst["index"])].item(), rel=1e-12)
        assert worst["numeric"] == pytest.approx(worst["analytic"], rel=1e-5)
        assert worst["numeric"] != worst["analytic"]


@pytest.mark.parametrize(
    ("settings", "wrong", "named"),
    [
        ([layers("sine")], {"0_conv.weight", "0_conv.bias"}, "3_sine (Of)"),
        ([layers("{linear: 9}", "sine", "{dropout: 0.2}")], {"0_conv.weight", "3_linear.weight"}, "4_sine (Of)"),
        ([layers("times")], {"3_times.weight"}, "3_times.weight (parameter)"),
        (["loss=sines"], {"0_conv.weight", "3_linear.weight", "5_linear.bias"}, "(loss) (sines)"),
        (
            [ZEROS, "loss=steep"],
            {"1_linear.weight", "1_linear.bias"},
            "1_linear.weight (parameter), 1_linear.bias (parameter)",
        ),
    ],
)
def test_a_wrong_backward_pass_is_found_by_its_name(
    dltrain: Run, path: Path, settings: list[str], wrong: set[str], named: str
) -> None:
    sets = [part for each in settings for part in ("--set", each)]
    done = dltrain("gradcheck", path, *sets)
    assert done.code == 1
    assert done.err == ""
    assert done.out.splitlines()[-1] == f"the backward pass is wrong: {named}"
    rows = [line.split() for line in done.out.splitlines()]
    assert wrong <= {row[0] for row in rows if row[-1:] == ["wrong"]}
    found = json.loads(dltrain("gradcheck", path, *sets, "--json").out)
    assert not found["ok"]
    assert wrong <= {row["name"] for row in found["parameters"] if not row["ok"]}


def test_what_stands_at_a_kink_is_said_and_not_counted(dltrain: Run, path: Path) -> None:
    """relu has the slope 0 at 0, a central difference 1/2."""
    done = dltrain("gradcheck", path, "--set", ZEROS, "--set", "loss=corner")
    assert done.code == 0
    assert "8 of them at a kink" in done.out
    found = json.loads(dltrain("gradcheck", path, "--set", ZEROS, "--set", "loss=corner", "--json").out)
    for row in found["parameters"]:
        assert (row["tried"], row["at_kink"], row["error"], row["ok"]) == (4, 4, None, True)


def test_the_same_weights_are_tried_each_time_and_frozen_ones_are_not(path: Path) -> None:
    loaded = config.load(path, ["model.frozen=[0_conv.*]"])
    first, second = gradcheck(loaded, 3, print), gradcheck(loaded, 3, print)
    assert first == second
    assert [row["name"] for row in first["parameters"]] == [
        *("3_linear.weight", "3_linear.bias", "5_linear.weight", "5_linear.bias")
    ]
    places = [
        [row["worst"]["index"] for row in gradcheck(config.load(path, [f"seed={seed}"]), 1, print)["parameters"]]
        for seed in (0, 1)
    ]
    assert places[0] != places[1]


@pytest.mark.parametrize(
    ("settings", "code", "message"),
    [
        ([layers("single")], 2, "here float64: mat1 and mat2 must have the same dtype, but got Float and Double"),
        (["model.layers=[flatten, {linear: classes}, single]"], 2, "here float64: the loss comes out in float32"),
        (["loss=broken"], 7, "the loss of the first 8 images is"),
        ([ZEROS, "loss=root"], 7, "differences of the loss"),
    ],
)
def test_what_cannot_be_checked(dltrain: Run, path: Path, settings: list[str], code: int, message: str) -> None:
    done = dltrain("gradcheck", path, *(part for each in settings for part in ("--set", each)))
    assert (done.code, done.err.count("\n")) == (code, 1), done.err
    assert message in done.err


@pytest.mark.parametrize(("width", "columns"), [(40, 3), (80, 5)])
def test_the_table_keeps_to_the_width(
    dltrain: Run, path: Path, monkeypatch: pytest.MonkeyPatch, width: int, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    done = dltrain("gradcheck", path)
    rows = [line for line in done.out.splitlines() if line.rstrip().endswith(" ok")]
    assert [len(row.split()) for row in rows] == [columns] * 6
    assert max(map(len, rows)) <= width


def test_the_global_state_is_not_needed(path: Path) -> None:
    """The check draws its own random numbers, whatever was drawn before."""
    loaded = config.load(path, [layers("{dropout: 0.5}")])
    first = gradcheck(loaded, 2, print)
    torch.rand(7)
    assert gradcheck(loaded, 2, print) == first
