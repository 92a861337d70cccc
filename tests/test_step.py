from __future__ import annotations

import copy

import pytest
import torch

from dltrain import config as configs
from dltrain import step
from dltrain.averaging import training_mode
from dltrain.build import build
from dltrain.errors import DivergedError
from dltrain.runs import new_run
from dltrain.state import Run
from dltrain.step import Steps
from dltrain.yamlfile import Document

PLAIN = {
    "name": "steps",
    "data": {"name": "digits", "limit": 200},
    "model": {"name": "mlp", "hidden": [16]},
    "descent": {"batch_size": 32},
    "optim": {"name": "sgd", "lr": 0.1},
    "train": {"device": "cpu", "precision": "fp32", "compile": "off"},
}


def started(**changes: object) -> Run:
    run = new_run(build(configs.check(Document("steps", copy.deepcopy({**PLAIN, **changes}))), print))
    training_mode(run.setup.model)
    return run


def test_what_is_read_does_not_depend_on_when() -> None:
    """The sums are those of the losses at each step, one after another, to the last bit."""
    each, once = started(), started()
    one, other = Steps(each), Steps(once)
    for _ in range(5):
        one.take()
        one.read()
        other.take()
    assert other.run.sums.tolist() == [0, 0]
    assert one.read() == other.read() > 0
    assert torch.equal(each.sums, once.sums)
    assert once.sums[0] > 0
    assert 0 < once.sums[1] <= 5 * 32
    assert once.sums[1] == round(float(once.sums[1]))


def test_the_sums_are_those_of_losses_and_right_predictions() -> None:
    """Against the model's outputs, taken before each step."""
    run = started()
    steps = Steps(run)
    loss_sum, right = 0.0, 0
    for at in range(run.setup.steps_per_epoch):  # the last one has 8 images
        ((images, labels, _),) = steps.batches.step(0, at)
        with torch.no_grad():
            outputs = run.setup.model(images)
        loss_sum += torch.nn.functional.cross_entropy(outputs, labels, reduction="sum").item()
        right += int((outputs.argmax(1) == labels).sum())
        steps.take()
    steps.read()
    assert run.sums[0].item() == pytest.approx(loss_sum, rel=1e-5)
    assert run.sums[1].item() == right


def test_what_waits_to_be_read_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "UNREAD", 3 * 32 * 10)
    steps = Steps(started())
    for _ in range(4):
        assert steps.run.sums[0] == 0
        steps.take()
    assert steps.run.sums[0] > 0


@pytest.mark.parametrize(("each_step", "taken"), [(True, 2), (False, 4)])
def test_a_step_that_is_not_finite_is_named(monkeypatch: pytest.MonkeyPatch, each_step: bool, taken: int) -> None:
    """Also where it is found steps later, as on CUDA."""
    direction = step.direction

    def poisoned(setup: object, batches: object, epoch: int, at: int, *rest: object) -> object:
        loss, norm = direction(setup, batches, epoch, at, *rest)
        return loss, norm * (float("nan") if at == 2 else 1.0)

    monkeypatch.setattr(step, "direction", poisoned)
    monkeypatch.setattr(step, "_asks_each_step", lambda device: each_step)
    steps = Steps(started())

    def take_and_read() -> None:
        for _ in range(4):
            steps.take()
        steps.read()

    with pytest.raises(DivergedError, match=r"^step 3: .* the gradient's norm nan"):
        take_and_read()
    assert steps.run.progress.step == taken


def test_micro_batches_give_the_losses_and_counts_of_the_whole_step() -> None:
    whole, parts = started(), started(descent={"batch_size": 32, "micro_batch_size": 10})
    for run in (whole, parts):
        steps = Steps(run)
        for _ in range(3):
            steps.take()
        steps.read()
    assert parts.sums[0].item() == pytest.approx(whole.sums[0].item(), rel=1e-5)
    assert parts.sums[1] == whole.sums[1]
