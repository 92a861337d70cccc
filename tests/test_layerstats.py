"""What is said of layers after an epoch: counted by hand, and without a bit of difference to the run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run as Command
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn import functional as F

from dltrain import checkpoint, config, layerstats, rundir
from dltrain.build import Setup, build
from dltrain.layerstats import layer_statistics

# dropout, batch norm, frozen layers, a ReLU that is computed behind its max pooling
CONFIG = """
data: {name: digits, val: 100, limit: 500}
model:
  name: cnn
  frozen: [0_conv.*]
  layers: [{conv: 6}, batchnorm, relu, {maxpool: 2}, flatten, {dropout: 0.3}, {linear: 12}, tanh, {linear: classes}]
optim: {name: sgd, lr: 0.1, momentum: 0.9}
descent: {batch_size: 50}
train: {epochs: 3, precision: fp32, clip_norm: 1.0, choose_by: last}
tensorboard: {pictures: false, filters: false, pr_curves: false}
"""
STEPS = 8  # an epoch's


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "c.yaml").write_text(CONFIG)
    return tmp_path / "c.yaml"


def built(path: Path, *overrides: str) -> Setup:
    return build(config.load(path, overrides), lambda text: None)


def test_no_bit_of_the_run_differs_and_each_epoch_has_a_record(dltrain: Command, path: Path) -> None:
    for switch in ("true", "false"):
        done = dltrain("train", path, "--out", switch, "-q", "--set", f"tensorboard.layers={switch}")
        assert (done.code, done.err) == (0, "")
    (tensors, _), (others, _) = (checkpoint.read(rundir.steps(Path(switch))[0]) for switch in ("true", "false"))
    assert tensors.keys() == others.keys()  # the generator's state among them
    assert [name for name in tensors if not torch.equal(tensors[name], others[name])] == []
    assert not [record for record in rundir.records(Path("false")) if record["kind"] == "layers"]
    records = [record for record in rundir.records(Path("true")) if record["kind"] == "layers"]
    assert [(record["step"], record["epoch"]) for record in records] == [(STEPS * epoch, epoch) for epoch in (1, 2, 3)]
    events = EventAccumulator("true")
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("layers/")]
    rows = {name: row for part in ("parameters", "activations") for name, row in records[-1][part].items()}
    shown = {f"layers/{key}/{name}": value for name, row in rows.items() for key, value in row.items()}
    assert sorted(tags) == sorted(tag for tag, value in shown.items() if value is not None)
    for tag in tags:
        assert events.Scalars(tag)[-1].value == pytest.approx(shown[tag], rel=1e-6)
        assert [event.step for event in events.Scalars(tag)] == [STEPS, 2 * STEPS, 3 * STEPS]
    assert "custom_scalars__config__" in events.Tags()["tensors"]


def test_the_gradients_add_up_to_the_norm_in_the_log(dltrain: Command, path: Path) -> None:
    assert dltrain("train", path, "--out", "run", "-q", "--set", "tensorboard.layers=true").code == 0
    state, _ = checkpoint.read(rundir.steps(Path("run"))[0])
    steps = {record["step"]: record for record in rundir.records(Path("run")) if record["kind"] == "step"}
    records = [record for record in rundir.records(Path("run")) if record["kind"] == "layers"]
    for record in records:
        norms = [row["gradient_norm"] for row in record["parameters"].values() if row["gradient_norm"] is not None]
        total = sum(norm**2 for norm in norms) ** 0.5
        assert total == pytest.approx(min(steps[record["step"]]["gradient_norm"], 1.0), rel=1e-4)  # clipped to 1
    for name, row in records[-1]["parameters"].items():
        assert row["weight_norm"] == pytest.approx(state[f"model.{name}"].norm().item(), rel=1e-5)
        assert (row["gradient_norm"] is None) == name.startswith("0_conv")  # frozen


def test_activations_are_those_of_the_training_images_in_evaluation_mode(path: Path) -> None:
    setup = built(path)
    model = setup.model
    with torch.no_grad():
        model.get_submodule("1_batchnorm").running_mean.normal_(generator=torch.Generator().manual_seed(0))
        model.get_submodule("1_batchnorm").bias[2:4] = -100.0  # what no image gets above 0
        model.get_submodule("6_linear").weight[3:6] = 0
        model.get_submodule("6_linear").bias[3:6] = 0
    before = torch.get_rng_state()
    found = layer_statistics(setup)["activations"]
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert [module for module in model.modules() if module._forward_hooks] == []
    places = [place * 400 // 256 for place in range(256)]
    images = setup.normalise(setup.data.train.images[places])
    layers = dict(model.named_children())
    with torch.no_grad():
        model.eval()
        whole = layers["1_batchnorm"](layers["0_conv"](images)).clamp(min=0)  # [256, 6, 6, 6], before the pooling
        pooled = F.max_pool2d(whole, 2).flatten(1)
        units = torch.tanh(layers["6_linear"](pooled))  # [256, 12]
    assert list(found) == ["2_relu", "7_tanh"]
    for name, outputs in (("2_relu", whole), ("7_tanh", units)):
        expected = [x.item() for x in (outputs.mean(), outputs.std(correction=0), (outputs == 0).double().mean())]
        assert [found[name][key] for key in ("mean", "std", "zeros")] == pytest.approx(expected, rel=1e-5)
    assert found["2_relu"]["dead"] == pytest.approx((whole.amax((0, 2, 3)) == 0).double().mean().item())
    assert found["7_tanh"]["dead"] == pytest.approx(3 / 12)
    assert 2 / 6 <= found["2_relu"]["dead"] < found["2_relu"]["zeros"] < 1


def test_a_unit_that_one_image_moves_is_not_dead() -> None:
    outputs = torch.zeros(5, 4, 2, 2)
    outputs[3, 1, 0, 1] = 2.0  # one image, one place
    outputs[:, 2] = -1.0
    mean, std, zeros, dead = layerstats._describe(outputs).tolist()
    assert mean == pytest.approx((2 - 20) / 80)
    assert zeros == pytest.approx(59 / 80)
    assert std == pytest.approx(((4 + 20) / 80 - (18 / 80) ** 2) ** 0.5)
    assert dead == 0.5


class Twice(nn.Module):
    """A model that uses one activation twice, and draws random numbers in evaluation mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 8), nn.Linear(8, 10)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.second(F.dropout(self.act(self.first(x.flatten(1))))))


def test_an_activation_that_is_used_twice_is_described_twice_and_the_generator_stays(path: Path) -> None:
    setup = dataclasses.replace(built(path), model=Twice())
    before = torch.get_rng_state()
    found = layer_statistics(setup)["activations"]
    assert list(found) == ["act", "act#2"]
    assert found["act"]["mean"] != found["act#2"]["mean"]
    assert torch.equal(torch.get_rng_state(), before)


MLP, LIST = "{name: mlp, hidden: [5], activation: %s}", "{name: cnn, layers: [flatten, %s, {linear: classes}]}"


@pytest.mark.parametrize(
    ("model", "activation"),
    [
        *((model, activation) for model in (MLP, LIST) for activation in ("relu", "scaled_tanh", "prelu")),
        (LIST, "swish_of_mine"),  # whose class is known by its name in the list alone
    ],
)
def test_every_activation_is_found(path: Path, tmp_path: Path, model: str, activation: str) -> None:
    if activation == "swish_of_mine":
        (tmp_path / "mine.py").write_text(
            "from torch import nn\n"
            "from dltrain.registry import register\n"
            "class Swish(nn.Module):\n"
            "    def forward(self, x):\n"
            "        return x * x.sigmoid()\n"
            '@register("activation")\n'
            "def swish_of_mine(shape, outputs):\n"
            '    """x times its sigmoid."""\n'
            "    return Swish()\n"
        )
        path.write_text(CONFIG + "plugins: [mine.py]\n")
    found = layer_statistics(built(path, f"model={model % activation}"))["activations"]
    assert len(found) == 1


def test_a_model_without_activations_or_gradients(path: Path) -> None:
    found: dict[str, Any] = layer_statistics(built(path, "model=perceptron"))
    assert found["activations"] == {}
    assert {row["gradient_norm"] for row in found["parameters"].values()} == {None}  # no step was taken
    json.dumps(found, allow_nan=False)
