"""Which parameters are trained, by what: groups, frozen parameters, and the wrappers around a step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from torch import nn

from dltrain import checkpoint, config, rundir
from dltrain.errors import ConfigError
from dltrain.groups import Optimizers, freeze, make


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))


def settings(optim: dict[str, Any], **more: Any) -> config.Config:
    return config.from_plain({"name": "x", "data": "digits", "model": "perceptron", "optim": optim} | more, "test")


def made(optim: dict[str, Any], network: nn.Module | None = None, **more: Any) -> Optimizers:
    return make(network or model(), settings(optim, **more))


SGD = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}
NAMES = ["0.weight", "0.bias", "1.weight", "1.bias", "4.weight", "4.bias"]


@pytest.mark.parametrize(
    ("selects", "taken"),
    [
        ({"match": "*.bias"}, ["0.bias", "1.bias", "4.bias"]),
        ({"match": "4.*"}, ["4.weight", "4.bias"]),
        ({"kind": "norm"}, ["1.weight", "1.bias"]),
        ({"kind": "conv"}, ["0.weight", "0.bias"]),
        ({"kind": "linear", "ndim": 2}, ["4.weight"]),
        ({"ndim": 4}, ["0.weight"]),
        ({"ndim": 1, "match": "[01].*"}, ["0.bias", "1.weight", "1.bias"]),
    ],
)
def test_a_group_takes_what_fits_all_that_it_selects_by(selects: dict[str, Any], taken: list[str]) -> None:
    rest, group = made({**SGD, "groups": [{**selects, "lr": 0.3}]}).parts
    assert sorted(group.names) == sorted(taken)
    assert sorted(rest.names + group.names) == sorted(NAMES)
    assert (rest.lr, group.lr) == (0.1, 0.3)


def test_the_first_group_that_fits_takes_a_parameter() -> None:
    parts = made({**SGD, "groups": [{"match": "4.bias", "lr": 1.0}, {"ndim": 1, "lr": 2.0}]}).parts
    assert {part.lr: sorted(part.names) for part in parts[1:]} == {
        1.0: ["4.bias"],
        2.0: ["0.bias", "1.bias", "1.weight"],
    }


def test_a_group_has_the_optimizers_settings_where_it_gives_none_of_its_own() -> None:
    rest, group = made({**SGD, "groups": [{"kind": "conv", "weight_decay": 0.0}]}).parts
    assert rest.source.args == {"lr": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 0.01}
    assert group.source.args == {"lr": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 0.0}


def test_a_group_with_a_name_has_an_optimizer_of_its_own() -> None:
    rest, group = made({**SGD, "groups": [{"ndim": 2, "name": "adam", "lr": 0.002}]}).parts
    assert (type(rest.optimizer).__name__, type(group.optimizer).__name__) == ("SGD", "Adam")
    assert (group.lr, group.source.args["beta2"]) == (0.002, 0.999)


def test_each_group_follows_its_schedule() -> None:
    linear = {"name": "step", "every_epochs": 1, "factor": 0.5}
    found = made(
        {**SGD, "groups": [{"match": "*.bias", "lr": 1.0, "schedule": linear}, {"ndim": 2}]}, schedule="cosine"
    )
    found.set_rates(5.0, 10.0, [])
    rates = [part.optimizer.param_groups[0]["lr"] for part in found.parts]
    assert rates == pytest.approx([0.05, 1 / 32, 0.05])
    assert found.lr == pytest.approx(0.05)


def test_a_schedule_may_follow_the_losses() -> None:
    plateau = {"name": "plateau", "factor": 0.5, "patience_epochs": 0}
    found = made(SGD, schedule=plateau)
    found.set_rates(3.0, 10.0, [1.0, 0.5, 0.7])
    assert found.lr == pytest.approx(0.05)


def test_groups_take_the_steps_that_their_optimizers_alone_would() -> None:
    network, other = model(), model()
    found = made({**SGD, "groups": [{"match": "*.bias", "name": "adam", "lr": 0.01}]}, network)
    biases = [each for name, each in other.named_parameters() if name.endswith("bias")]
    weights = [each for name, each in other.named_parameters() if not name.endswith("bias")]
    expected = [torch.optim.SGD(weights, lr=0.1, momentum=0.9, weight_decay=0.01), torch.optim.Adam(biases, lr=0.01)]
    for _ in range(3):
        images = torch.randn(8, 1, 8, 8)
        for each in (network, other):
            each.zero_grad()
            each(images).square().mean().backward()
        found.step(torch.tensor(0.0), lambda: torch.tensor(0.0))
        for optimizer in expected:
            optimizer.step()
    for (name, one), two in zip(network.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two, msg=name, rtol=1e-6, atol=1e-7)


def test_no_decay_on_norms_and_biases() -> None:
    network = model()
    found = made({**SGD, "decay_norms_and_biases": False}, network)
    decays = {name: part.source.args["weight_decay"] for part in found.parts for name in part.names}
    assert decays == {"0.weight": 0.01, "4.weight": 0.01} | dict.fromkeys(
        ["0.bias", "1.weight", "1.bias", "4.bias"], 0.0
    )


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        ({**SGD, "groups": [{"match": "0.weigth"}]}, "optim.groups.0: no parameter is called '0.weigth'; did you mean"),
        ({**SGD, "groups": [{"ndim": 1}, {"kind": "norm"}]}, "optim.groups.1: no parameter fits all"),
        ({**SGD, "groups": [{"kind": "conv", "ndim": 3}]}, "optim.groups.0: no parameter fits all"),
        ({**SGD, "groups": [{"ndim": 1, "name": "muon", "lr": 0.1}]}, "optim.groups.0: muon: "),
    ],
)  # fmt: skip
def test_a_group_that_does_not_fit_is_refused(optim: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        made(optim)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"optim": {**SGD, "groups": [{"lr": 1.0}]}}, "optim.groups.0: expected match, kind or ndim"),
        ({"optim": {**SGD, "groups": [{"matc": "a"}]}}, "optim.groups.0.matc: unknown key; did you mean 'match'?"),
        ({"optim": {**SGD, "groups": [{"ndim": 1, "lr": -1}]}}, "optim.groups.0.lr: expected more than 0, got -1"),
        (
            {"optim": {**SGD, "groups": [{"ndim": 1, "schedule": {"warmup_epochs": 50}}]}},
            "optim.groups.0.schedule.warmup_epochs: 50 leaves nothing",
        ),
        (
            {"optim": {"name": "schedule_free_sgd", "lookahead": {}}},
            "optim.lookahead: schedule_free_sgd keeps an average of its own",
        ),
        ({"data": {"name": "digits", "balance": True}, "descent": {"variant": "batch"}}, "data.balance: draws some"),
        ({"optim": {**SGD, "groups": [{"ndim": 1, "sam_rho": 1}]}}, "unknown key; there is kind, lr, match"),
        ({"optim": {**SGD, "groups": [{"ndim": 1, "as given": 1}]}}, "optim.groups.0"),
        ({"optim": "lbfgs"}, "descent.variant: lbfgs compares losses within a step"),
        (
            {"optim": {"name": "lbfgs", "groups": [{"ndim": 1}]}, "descent": {"variant": "batch"}},
            "optim.groups: lbfgs trains all parameters at once",
        ),
        (
            {"optim": "lbfgs", "descent": {"variant": "batch"}, "train": {"clip_norm": 1}},
            "train.clip_norm: lbfgs needs the gradient as it is",
        ),
        (
            {"optim": {"name": "schedule_free_sgd", "lr": 1}, "train": {"average": "ema"}},
            "train.average: schedule_free_sgd is evaluated at an average of its own",
        ),
    ],
)
def test_settings_of_optim_that_do_not_go_together(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings(**{"optim": SGD, **more})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_frozen_parameters_are_in_no_group() -> None:
    network = model()
    freeze(network, ["0.*", "1.*"])
    assert [sorted(part.names) for part in made(SGD, network).parts] == [["4.bias", "4.weight"]]
    with pytest.raises(
        ConfigError, match=r"model\.frozen\.0: no parameter is called '4\.weigh'; did you mean '4\.weight'"
    ):
        freeze(network, ["4.weigh"])


CNN = """
data: {name: digits, limit: 300}
model:
  name: cnn
  layers: [{conv: 4}, batchnorm, relu, flatten, {linear: classes}]
  frozen: ["[01]_*"]
optim: {name: sgd, lr: 0.1, momentum: 0.9, weight_decay: 0.01}
train: {epochs: 2}
"""


def trained(folder: Path, step: int = -1) -> dict[str, torch.Tensor]:
    steps = sorted(rundir.steps(folder))
    return {name: each for name, each in checkpoint.read(steps[step])[0].items() if name.startswith("model.")}


def test_what_is_frozen_stays_as_it_was_with_its_statistics(dltrain: Run, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(CNN)
    assert dltrain("train", "c.yaml", "--out", "run", "-q", "--set", "train.checkpoint_every_steps=1").code == 0
    after = trained(Path("run"))
    network = config.load(tmp_path / "c.yaml").model.source
    torch.manual_seed(0)
    before = network((1, 8, 8), 10).state_dict()
    changed = [name for name in before if not torch.equal(before[name], after[f"model.{name}"])]
    assert changed == ["4_linear.weight", "4_linear.bias"]


def test_lbfgs_descends_to_where_the_gradient_ends(dltrain: Run, tmp_path: Path) -> None:
    """On a convex problem a few of its steps come to where the gradient is all but gone; SGD's as many do not."""
    (tmp_path / "c.yaml").write_text(
        "data: {name: digits, limit: 200}\nmodel: perceptron\nloss: mse\noptim: {name: lbfgs}\n"
        "descent: {variant: batch}\ntrain: {epochs: 40, log_every_steps: 1}\n"
    )
    assert dltrain("train", "c.yaml", "--out", "lbfgs", "-q").code == 0
    assert dltrain("train", "c.yaml", "--out", "sgd", "-q", "--set", "optim={name: sgd, lr: 0.1}").code == 0
    norms = {}
    for name in ("lbfgs", "sgd"):
        norms[name] = [each["gradient_norm"] for each in rundir.records(Path(name)) if each["kind"] == "step"]
    assert norms["lbfgs"][-1] < 1e-3 < norms["sgd"][-1]
    assert norms["lbfgs"][0] == norms["sgd"][0]


def test_sharpness_aware_steps_go_along_the_gradient_up_the_hill(dltrain: Run, tmp_path: Path) -> None:
    """Against the definition, one batch step written out; batch norm's statistics are those of the weights."""
    (tmp_path / "c.yaml").write_text(
        "data: {name: digits, limit: 64}\nmodel: {name: mlp, hidden: [8], batchnorm: true}\n"
        "optim: {name: sgd, lr: 0.5, sam_rho: 0.2}\ndescent: {variant: batch}\ntrain: {epochs: 1, precision: fp32}\n"
    )
    assert dltrain("train", "c.yaml", "--out", "run", "-q").code == 0
    found = trained(Path("run"))
    from dltrain.build import build

    setup = build(config.load(tmp_path / "c.yaml"), print)
    images, labels, _ = next(setup.batches().step(0, 0))
    network = setup.model

    def gradient() -> list[torch.Tensor]:
        loss = nn.functional.cross_entropy(network(images), labels)
        return list(torch.autograd.grad(loss, list(network.parameters())))

    first = gradient()
    statistics = {name: each.clone() for name, each in network.named_buffers()}
    start = [each.detach().clone() for each in network.parameters()]
    norm = torch.cat([each.flatten() for each in first]).norm()
    with torch.no_grad():
        for parameter, each in zip(network.parameters(), first, strict=True):
            parameter += 0.2 * each / norm
    second = gradient()
    for (name, _), before, each in zip(network.named_parameters(), start, second, strict=True):
        torch.testing.assert_close(found[f"model.{name}"], before - 0.5 * each, rtol=1e-5, atol=1e-6)
    for name, each in statistics.items():
        torch.testing.assert_close(found[f"model.{name}"], each)


def test_lookahead_keeps_part_of_the_way(dltrain: Run, tmp_path: Path) -> None:
    text = CNN.replace('  frozen: ["[01]_*"]\n', "") + "descent: {batch_size: 100}\n"
    (tmp_path / "c.yaml").write_text(text.replace("epochs: 2", "epochs: 1"))
    assert dltrain("train", "c.yaml", "--out", "plain", "-q").code == 0
    wrapped = ("--set", "optim.lookahead={every_steps: 3, share: 0.25}")
    assert dltrain("train", "c.yaml", "--out", "ahead", "-q", *wrapped).code == 0
    torch.manual_seed(0)
    start = config.load(tmp_path / "c.yaml").model.source((1, 8, 8), 10).state_dict()
    plain, ahead = trained(Path("plain")), trained(Path("ahead"))
    for name in ("0_conv.weight", "1_batchnorm.weight", "4_linear.bias"):
        expected = start[name] + 0.25 * (plain[f"model.{name}"] - start[name])
        torch.testing.assert_close(ahead[f"model.{name}"], expected, rtol=1e-5, atol=1e-7)


def test_the_summary_is_of_a_run_with_groups(dltrain: Run, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(CNN)
    more = ("--set", "optim.groups=[{ndim: 2, name: muon, lr: 0.02}]", "--set", "model.frozen=[]")
    done = dltrain("train", "c.yaml", "--json", *more, "--set", "data.limit=1000", "--set", "train.epochs=6")
    assert done.code == 0, done.err
    assert json.loads(done.out)["test"]["accuracy"] > 0.8


def test_layer_scales_count_as_norms(dltrain: Run, tmp_path: Path) -> None:
    text = CNN.replace("batchnorm, relu", "{scale: {bias: true}}, relu").replace('  frozen: ["[01]_*"]\n', "")
    (tmp_path / "c.yaml").write_text(text)
    from dltrain.build import build

    setup = build(config.load(tmp_path / "c.yaml", ["optim.decay_norms_and_biases=false"]), print)
    decays = {name: part.source.args["weight_decay"] for part in setup.optimizers.parts for name in part.names}
    assert {name for name, decay in decays.items() if decay} == {"0_conv.weight", "4_linear.weight"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("optim.groups=[{ndim: 1, nesterov: true, momentum: 0}]", "optim.groups.0: sgd: nesterov needs a momentum"),
        ("model.layers=[flatten, {rbf: classes}]", "the model has no parameter to train"),
        ("model.frozen=['*']", "model.frozen leaves no parameter to train"),
        ("data.augment=[mixup]", "data.augment: mixup mixes images of a batch, and here one goes through at a time"),
    ],
)
def test_parts_that_do_not_fit_are_said_where_they_are(dltrain: Run, tmp_path: Path, more: str, message: str) -> None:
    text = CNN.replace('  frozen: ["[01]_*"]\n', "").replace("batchnorm, ", "").replace("{conv: 4}", "{conv: 4}, relu")
    (tmp_path / "c.yaml").write_text(text + "descent: {variant: stochastic}\n")
    done = dltrain("train", "c.yaml", "--set", more)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert message in done.err
