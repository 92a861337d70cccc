"""The learning-rate range test: what is tried, what is found, and what it looks like."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import Run

from dltrain import config, lr_find
from dltrain.build import build

LINEAR = """
data: {name: digits, limit: 300}
model: perceptron
loss: mse
optim: {name: sgd, lr: 0.1}
descent: {variant: batch}
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "c.yaml").write_text(LINEAR)
    return tmp_path / "c.yaml"


def found(path: Path, *overrides: str, lowest: float = 1e-4, highest: float = 100.0, steps: int = 60):
    return lr_find.find(config.load(path, overrides), lowest, highest, steps, print)


def test_the_rates_rise_by_the_same_factor_and_the_losses_are_gradient_descents(path: Path) -> None:
    result = found(path)
    ratio = (100 / 1e-4) ** (1 / 59)
    assert result["lr"] == pytest.approx([1e-4 * ratio**step for step in range(len(result["lr"]))])
    setup = build(config.load(path), print)
    images, labels, _ = next(setup.batches().step(0, 0))
    weights = [each.detach().clone().requires_grad_() for each in setup.model.parameters()]
    for rate, loss in list(zip(result["lr"], result["loss"], strict=True))[:40]:
        outputs = images.flatten(1) @ weights[0].T + weights[1]
        expected = torch.nn.functional.mse_loss(outputs, torch.nn.functional.one_hot(labels, 10).float())
        assert loss == pytest.approx(expected.item(), rel=1e-4)
        gradients = torch.autograd.grad(expected, weights)
        weights = [(w - rate * g).detach().requires_grad_() for w, g in zip(weights, gradients, strict=True)]


def test_on_a_quadratic_the_loss_turns_where_theory_says(path: Path) -> None:
    """Gradient descent diverges beyond 2 / (largest eigenvalue of the Hessian)."""
    setup = build(config.load(path), print)
    images, _, _ = next(setup.batches().step(0, 0))
    rows = torch.cat([images.flatten(1), torch.ones(len(images), 1)], 1).double()
    largest = 2 * torch.linalg.eigvalsh(rows.T @ rows / len(rows)).max() / 10  # the mean is over 10 outputs
    result = found(path, steps=200)
    bound = float(2 / largest)
    assert bound < result["lowest"] < 4 * bound  # it takes some steps to grow, and the mean follows late
    assert result["suggestion"] == pytest.approx(result["lowest"] / 10)
    assert result["steepest"] < result["lowest"]
    assert max(result["lr"]) < 100  # it ended where the loss went up


def test_the_mean_of_the_losses_begins_without_bias(path: Path) -> None:
    result = found(path)
    loss = result["loss"]
    assert result["smoothed"][0] == pytest.approx(loss[0])
    assert result["smoothed"][1] == pytest.approx((0.95 * loss[0] + loss[1]) / 1.95)


def test_groups_keep_their_ratio(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[list[float]] = []

    def note(setup, batches, epoch, step, correct=None):
        rates.append([part.optimizer.param_groups[0]["lr"] for part in setup.optimizers.parts])
        return torch.tensor(1.0 / len(rates)), torch.tensor(1.0)

    monkeypatch.setattr(lr_find, "direction", note)
    found(path, "optim.groups=[{ndim: 1, lr: 0.5}]", steps=20)
    assert len(rates) == 20
    for main, group in rates:
        assert group == pytest.approx(5 * main)


def test_clipping_and_sharpness_are_part_of_what_is_tried(path: Path) -> None:
    plain, clipped, sharp = (found(path, *more) for more in ([], ["train.clip_norm=1e-3"], ["optim.sam_rho=2.0"]))
    assert clipped["lowest"] > 3 * plain["lowest"]
    assert sharp["loss"] != plain["loss"]


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--lowest", "1000", "--highest", "2000"], 7, "the loss does not fall at any of these learning rates"),
        (["--lowest", "1", "--highest", "0.1"], 2, "expected 0 < lowest < highest"),
        (["--lowest", "0"], 2, "expected 0 < lowest < highest"),
        (["--set", "optim=lbfgs"], 2, "lbfgs finds the length of a step itself"),
        (["--out", "c.yaml/x/lr.png"], 6, "c.yaml/x: Not a directory"),
        (["--out", "."], 6, ".: is a folder"),
    ],
)
def test_what_is_refused(dltrain: Run, path: Path, more: list[str], code: int, message: str) -> None:
    done = dltrain("lr-find", path, *more)
    assert (done.code, done.err.count("\n")) == (code, 1)
    assert message in done.err


def test_it_says_what_to_type_and_draws(dltrain: Run, path: Path) -> None:
    done = dltrain("lr-find", path)
    assert done.code == 0, done.err
    assert "--set optim.lr=" in done.out
    assert "configured: 0.1" in done.out
    assert Path("runs/c/lr-find.png").read_bytes().startswith(b"\x89PNG")
    quiet = dltrain("lr-find", path, "--json", "--out", "other.png", "--steps", "50")
    result = json.loads(quiet.out)
    assert result["figure"] == "other.png"
    assert Path("other.png").exists()
    assert len(result["lr"]) == len(result["loss"]) == len(result["smoothed"]) <= 50
