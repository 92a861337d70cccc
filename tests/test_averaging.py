"""Weights that a run is evaluated at: averages, and batch norm's statistics for them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import Run
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

from dltrain import checkpoint, config, rundir
from dltrain.averaging import Followers, evaluation_weights, reestimate_batchnorm, training_mode
from dltrain.build import Setup, build
from dltrain.runs import new_run

CONFIG = """
data: {name: digits, val: 200, limit: 700}
model: {name: mlp, hidden: [16], batchnorm: true, dropout: 0.2}
optim: {name: sgd, lr: 0.1, momentum: 0.9}
descent: {batch_size: 100}
train: {epochs: 4, checkpoint_every_steps: 1, log_every_steps: 1}
"""
STEPS = 5  # an epoch's: 500 images in batches of 100


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "c.yaml").write_text(CONFIG)
    return tmp_path / "c.yaml"


def setup_of(path: Path, *overrides: str) -> Setup:
    return build(config.load(path, overrides), print)


def scramble(model: nn.Module, seed: int) -> None:
    """Weights and statistics as another step might leave them."""
    random = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=random) + 0.5)
        else:
            tensor.add_(1)


def test_the_average_is_torchs(path: Path) -> None:
    run = new_run(setup_of(path, "train.average={name: ema, decay: 0.1}"))  # below the warm-up's from the first step
    model = run.setup.model
    expected = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.1), use_buffers=True)
    expected.n_averaged += 1  # else the first update copies
    followers = Followers(run)
    for step in range(1, 4):
        scramble(model, step)
        run.progress.step = step
        followers.follow()
        expected.update_parameters(model)
    assert run.average is not None
    for name, tensor in expected.module.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(run.average[name], tensor, rtol=1e-6, atol=1e-7, msg=name)
        else:
            assert torch.equal(run.average[name], model.state_dict()[name])  # a count is no mean


def test_within_the_model_holds_the_average_and_after_it_its_own_bits(path: Path) -> None:
    run = new_run(setup_of(path, "train.average=ema"))
    model = run.setup.model
    scramble(model, 1)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    assert run.average is not None
    with evaluation_weights(run, run.setup.batches()):
        for name, each in model.state_dict().items():
            assert torch.equal(each, run.average[name])
    assert [name for name, each in model.state_dict().items() if not torch.equal(each, before[name])] == []
    with pytest.raises(ZeroDivisionError), evaluation_weights(run, run.setup.batches()):
        1 / 0  # noqa: B018
    assert torch.equal(model.state_dict()["1.weight"], before["1.weight"])


def test_without_an_average_the_model_is_evaluated_as_it_is(path: Path) -> None:
    run = new_run(setup_of(path))
    scramble(run.setup.model, 1)
    before = {name: each.clone() for name, each in run.setup.model.state_dict().items()}
    with evaluation_weights(run, run.setup.batches()):
        for name, each in run.setup.model.state_dict().items():
            assert torch.equal(each, before[name])


def test_statistics_are_measured_as_torch_does(path: Path) -> None:
    setup, other = setup_of(path), setup_of(path)
    for each in (setup, other):
        scramble(each.model, 3)
    drawn = torch.get_rng_state()
    reestimate_batchnorm(setup.model, setup.batches(), setup.placement)
    assert torch.equal(torch.get_rng_state(), drawn)  # dropout is off
    batches = other.batches()
    for module in other.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    update_bn([next(batches.step(0, step))[0] for step in range(STEPS)], other.model)
    for (name, one), two in zip(setup.model.state_dict().items(), other.model.state_dict().values(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-7, msg=name)
    assert {module.momentum for module in setup.model.modules() if isinstance(module, nn.BatchNorm1d)} == {0.1}
    assert all(module.training for module in setup.model.modules())


def test_a_frozen_normalisation_keeps_its_statistics(path: Path) -> None:
    setup = setup_of(path, "model.frozen=['2.*']")
    scramble(setup.model, 3)
    before = setup.model.state_dict()["2.running_mean"].clone()
    reestimate_batchnorm(setup.model, setup.batches(), setup.placement)
    training_mode(setup.model)
    setup.model(torch.randn(50, 1, 8, 8))
    assert torch.equal(setup.model.state_dict()["2.running_mean"], before)
    assert [name for name, each in setup.model.named_modules() if not each.training] == ["2"]


def raw_weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    """The model's own weights after a step."""
    tensors, _ = checkpoint.read(run / "checkpoints" / f"step-{step:09d}.safetensors")
    return {name.removeprefix("model."): each for name, each in tensors.items() if name.startswith("model.")}


def test_swa_is_the_mean_of_the_epochs_ends(dltrain: Run, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rundir, "KEPT", 1000)
    more = ("--set", "train.average={name: swa, start: 0.5}", "--set", "data.val=0")
    done = dltrain("train", path, "--out", "run", "--json", "--set", "data.limit=500", *more)
    assert done.code == 0, done.err
    ends = [raw_weights(Path("run"), epoch * STEPS) for epoch in (2, 3, 4)]
    best, meta = checkpoint.read(Path("run") / "best.safetensors")
    assert meta["step"] == 4 * STEPS
    for name in ("1.weight", "2.bias", "5.weight"):
        expected = torch.stack([end[name] for end in ends]).mean(0)
        torch.testing.assert_close(best[f"model.{name}"], expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(best["model.2.running_mean"], ends[-1]["2.running_mean"], rtol=1e-3)
    judged = json.loads(dltrain("eval", "run", "--json").out)
    assert judged["accuracy"] == json.loads(done.out)["test"]["accuracy"]


def test_schedule_free_is_evaluated_at_its_average(dltrain: Run, path: Path) -> None:
    optim = ("--set", "optim={name: schedule_free_sgd, lr: 0.3}")
    done = dltrain("train", path, "--out", "run", "--json", *optim, "--set", "train.choose_by=last")
    assert done.code == 0, done.err
    tensors, _ = checkpoint.read(rundir.steps(Path("run"))[0])
    best, _ = checkpoint.read(Path("run") / "best.safetensors")
    for name in ("1.weight", "2.bias", "5.weight"):
        assert torch.equal(best[f"model.{name}"], tensors[f"optim.{name}.x"])
        assert not torch.equal(best[f"model.{name}"], tensors[f"model.{name}"])


def test_the_average_is_what_val_is_scored_with(dltrain: Run, path: Path) -> None:
    """An average that never moves scores as the initial weights do, however well the run learns."""
    done = dltrain("train", path, "--out", "run", "-q", "--set", "train.average={name: ema, every_steps: 1000}")
    assert done.code == 0, done.err
    epochs = [each for each in rundir.records(Path("run")) if each["kind"] == "epoch"]
    assert len({each["val"]["loss"] for each in epochs}) == 1
    assert epochs[-1]["train"]["accuracy"] > 0.7 > 0.3 > epochs[-1]["val"]["accuracy"]
