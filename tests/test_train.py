"""The loop: what it computes, and that a run that is stopped or killed ends as one that is not."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from filelock import FileLock
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from dltrain import checkpoint, cli, rundir, runs, state, step
from dltrain.data.digits import digits
from dltrain.data.files import Files
from dltrain.data.random import generator
from dltrain.logs import Log

# dropout, batch norm, augmentation, Adam, an uneven last batch, mid-epoch log lines: whatever has a state
CONFIG = """
data: {name: digits, val: 200, limit: 700, augment: [{translate: 1}, {cutout: 2}]}
model: {name: mlp, hidden: [32], dropout: 0.2, batchnorm: true}
optim: {name: adamw, lr: 3e-3}
schedule: {name: cosine, warmup_epochs: 0.5}
descent: {batch_size: 48}
train: {epochs: 4, log_every_steps: 1, clip_norm: 1.0}
"""
STEPS = 11  # an epoch's: 500 images in batches of 48


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(CONFIG)
    return path


def final_state(run: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any], list[Any]]:
    """The last checkpoint's tensors and what of its metadata no clock has touched, and the loss of every step."""
    tensors, meta = checkpoint.read(rundir.steps(run)[0])
    kept = {key: meta[key] for key in ("step", "best", "optimizers", "scalars", "normalisation", "classes")}
    kept["progress"] = {key: value for key, value in meta["progress"].items() if "seconds" not in key}
    steps = [
        (line["step"], line["loss"], line["accuracy"], line["lr"], line["gradient_norm"])
        for line in rundir.records(run)
        if line["kind"] == "step"
    ]
    return tensors, kept, steps


def assert_same_end(one: Path, other: Path) -> None:
    (tensors, meta, steps), (tensors_, meta_, steps_) = final_state(one), final_state(other)
    assert tensors.keys() == tensors_.keys()
    assert [name for name in tensors if not torch.equal(tensors[name], tensors_[name])] == []
    assert meta == meta_
    assert steps == steps_


def stop_after(patch: pytest.MonkeyPatch, step: int, signum: int) -> None:
    """Sends this process a signal right after that step was logged."""
    log_step = Log.step

    def logged(self: Log, run: Any, scores: dict[str, float], **values: float) -> None:
        log_step(self, run, scores, **values)
        if run.global_step == step:
            os.kill(os.getpid(), signum)

    patch.setattr(Log, "step", logged)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing stops."""
    folder = tmp_path_factory.mktemp("straight")
    (folder / "small.yaml").write_text(CONFIG)
    assert cli.run(["train", str(folder / "small.yaml"), "--out", str(folder / "run"), "-q"]) == 0
    return folder / "run"


@pytest.mark.parametrize("step", [1, STEPS - 1, STEPS, STEPS + 5, 4 * STEPS - 1])
def test_a_stopped_run_resumes_to_the_same_bits(
    dltrain: Run, config: Path, straight: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, step, signal.SIGTERM)
        stopped = dltrain("train", config, "--out", "stopped", "-q")
    assert stopped.code == 143
    assert stopped.err.splitlines()[-1].endswith("go on with: dltrain train --resume stopped")
    assert checkpoint.read(rundir.steps(Path("stopped"))[0])[1]["step"] == step
    torch.manual_seed(999)  # as another process would start
    assert dltrain("train", "--resume", "stopped", "-q").code == 0
    assert_same_end(straight, Path("stopped"))


# everything else that a run keeps from one step to the next
STATEFUL = {
    "ema, groups, mixing, balance": [
        "train.average=ema",
        "optim={name: adamw, groups: [{ndim: 2, name: muon, lr: 0.02}], decay_norms_and_biases: false}",
        "optim.groups.0.schedule={name: step, every_epochs: 1}",
        "data.augment=[alternating_flip, {mixup: 0.4}, {cutmix: 1.0}]",
        "data.balance=true",
    ],
    "swa, plateau, weights from frequencies": [
        "train.average={name: swa, start: 0.25}",
        "schedule={name: plateau, patience_epochs: 0, factor: 0.5}",
        "loss={name: cross_entropy, class_weights: balanced}",
    ],
    "sam, lookahead": ["optim={name: sgd, lr: 0.1, momentum: 0.9, sam_rho: 0.05, lookahead: {every_steps: 4}}"],
    "schedule-free": ["optim={name: schedule_free_sgd, lr: 0.2}"],
    "lion": ["optim={name: lion, lr: 1.0e-3}"],
    "nadam": ["optim=nadam"],
    "radam": ["optim=radam"],
    "adadelta": ["optim=adadelta"],
    "adamax": ["optim=adamax"],
    "asgd": ["optim=asgd"],
    "rmsprop": ["optim={name: rmsprop, momentum: 0.9, centered: true}"],
    "lbfgs": ["optim=lbfgs", "descent={variant: batch}", "train.clip_norm=null", "train.epochs=8"],
}


@pytest.mark.parametrize("overrides", STATEFUL.values(), ids=STATEFUL)
def test_whatever_a_run_keeps_it_resumes_to_the_same_bits(
    dltrain: Run, config: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str]
) -> None:
    changes = [each for override in overrides for each in ("--set", override)]
    assert dltrain("train", config, "--out", "straight", "-q", *changes).code == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 6 if "lbfgs" in overrides[0] else STEPS + 6, signal.SIGTERM)
        assert dltrain("train", config, "--out", "stopped", "-q", *changes).code == 143
    torch.manual_seed(999)
    assert dltrain("train", "--resume", "stopped", "-q").code == 0
    assert_same_end(Path("straight"), Path("stopped"))
    best, other = (checkpoint.read(Path(run) / "best.safetensors")[0] for run in ("straight", "stopped"))
    assert [name for name in best if not torch.equal(best[name], other[name])] == []


def test_a_resume_without_the_generators_state_ends_otherwise(
    dltrain: Run, config: Path, straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison above can fail: it does where the state that dropout draws from is left out."""
    with monkeypatch.context() as patch:
        stop_after(patch, STEPS + 5, signal.SIGINT)
        assert dltrain("train", config, "--out", "stopped", "-q").code == 130
    with monkeypatch.context() as patch:
        patch.setattr(state, "_set_rng_states", lambda device, states: None)
        assert dltrain("train", "--resume", "stopped", "-q").code == 0
    with pytest.raises(AssertionError):
        assert_same_end(straight, Path("stopped"))


KILLED = """
import os, pathlib, signal, sys
from dltrain import cli
replace, saves = pathlib.Path.replace, []
def dying(self, target):
    saves.append(target)
    if "step-" in str(target) and len([each for each in saves if "step-" in str(each)]) == 2:
        os.kill(os.getpid(), signal.SIGKILL)  # the file is written whole, and does not have its name yet
    return replace(self, target)
pathlib.Path.replace = dying
cli.run(sys.argv[1:])
"""


def test_a_run_killed_inside_a_save_goes_on_from_the_save_before(dltrain: Run, config: Path, straight: Path) -> None:
    arguments = ["train", str(config), "--out", "killed", "-q", "--set", "train.checkpoint_every_steps=7"]
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert [path.stem for path in rundir.steps(Path("killed"))] == ["step-000000007"]
    assert list(Path("killed/checkpoints").glob(".*.tmp"))
    assert dltrain("train", "--resume", "killed", "-q").code == 0
    assert not list(Path("killed/checkpoints").glob(".*.tmp"))
    assert_same_end(straight, Path("killed"))


def test_a_broken_checkpoint_is_passed_over_for_the_one_before(dltrain: Run, config: Path, straight: Path) -> None:
    every = ("--set", "train.checkpoint_every_steps=9")
    assert dltrain("train", config, "--out", "run", "-q", *every).code == 0
    newest = rundir.steps(Path("run"))[0]
    newest.write_bytes(newest.read_bytes()[:-1])
    done = dltrain("train", "--resume", "run")
    assert done.code == 0
    assert f"{newest}" in done.err
    assert "going on after step 36" in done.out
    assert_same_end(straight, Path("run"))


def test_more_epochs_for_a_finished_run(dltrain: Run, config: Path) -> None:
    constant = ("--set", "schedule={name: constant}")  # a schedule that does not depend on the run's length
    assert dltrain("train", config, "--out", "long", "-q", *constant).code == 0
    assert dltrain("train", config, "--out", "short", "-q", *constant, "--set", "train.epochs=2").code == 0
    done = dltrain("train", "--resume", "short", "--set", "train.epochs=4")
    assert done.code == 0
    assert "changed settings: train.epochs: 2 -> 4" in done.out
    assert_same_end(Path("long"), Path("short"))
    assert [line["settings"] for line in rundir.records(Path("short")) if line["kind"] == "changed"] == [
        ["train.epochs: 2 -> 4"]
    ]


def test_an_extended_run_that_is_cut_off_does_not_show_its_old_results(
    dltrain: Run, straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(straight, "run")

    def cut_off(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs, "finish", cut_off)
        assert dltrain("train", "--resume", "run", "-q", "--set", "train.epochs=5").code == 130
    summary = json.loads(dltrain("train", "--resume", "run", "-q", "--json").out)
    assert (summary["epochs"], summary["steps"]) == (5, 5 * STEPS)


@pytest.mark.parametrize("average", ["null", "ema"])
def test_the_last_weights_are_those_of_the_end_however_a_run_came_to_it(
    dltrain: Run, config: Path, monkeypatch: pytest.MonkeyPatch, average: str
) -> None:
    """Extended beyond an earlier end, stopped on the way, and ended there: as a run of so many epochs."""
    last = ("--set", "train.choose_by=last", "--set", f"train.average={average}", "--set", "schedule=constant")
    assert dltrain("train", config, "--out", "straight", "-q", *last, "--set", "train.epochs=3").code == 0
    assert dltrain("train", config, "--out", "run", "-q", *last, "--set", "train.epochs=1").code == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 2 * STEPS + 3, signal.SIGTERM)
        assert dltrain("train", "--resume", "run", "-q", "--set", "train.epochs=4").code == 143
    assert not (Path("run") / "best.safetensors").exists()  # the one of the first epoch's end
    refused = dltrain("train", "--resume", "run", "-q", "--set", "train.epochs=2")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "train.epochs: expected at least 3" in refused.err
    done = dltrain("train", "--resume", "run", "--json", "-q", "--set", "train.epochs=3")
    assert json.loads(done.out)["chosen_epoch"] == 3
    one, other = (checkpoint.read(Path(name) / "best.safetensors") for name in ("straight", "run"))
    assert one[1]["step"] == other[1]["step"] == 3 * STEPS
    assert [name for name in one[0] if not torch.equal(one[0][name], other[0][name])] == []


def test_on_a_device_that_is_not_asked_each_step_what_was_not_finite_is_never_saved(
    dltrain: Run, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA: a step of lion along a gradient of NaN moves nothing, and all looks well from then on."""
    monkeypatch.setattr(step, "direction", poisoned(step.direction, at=4))
    monkeypatch.setattr(step, "_asks_each_step", lambda device: False)
    more = (
        "--set",
        "optim={name: lion, lr: 1.0e-3}",
        "--set",
        "train.log_every_steps=9",
        "--set",
        "train.clip_norm=null",
    )
    done = dltrain("train", config, "--out", "run", "-q", *more, "--set", "train.checkpoint_every_steps=6")
    assert done.code == 7
    assert not rundir.steps(Path("run"))


def poisoned(direction: Any, at: int) -> Any:
    def poison(setup: Any, batches: Any, epoch: int, step: int, *rest: Any) -> Any:
        loss, norm = direction(setup, batches, epoch, step, *rest)
        return loss, norm * (float("nan") if step == at else 1.0)

    return poison


def test_a_finished_run_has_nothing_left_to_train(dltrain: Run, straight: Path) -> None:
    shutil.copytree(straight, "run")
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file() and path.suffix != ".jsonl"}
    done = dltrain("train", "--resume", "run")
    assert done.code == 0
    assert "this run is finished" in done.out
    assert before == {path: path.read_bytes() for path in before}


def test_an_epoch_is_recorded_once_when_killed_after_it(
    dltrain: Run, config: Path, straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The save that is due with an epoch's last step waits for its evaluation."""
    every = ("--set", f"train.checkpoint_every_steps={STEPS}")
    with monkeypatch.context() as patch:
        log_epoch = Log.epoch

        def dying(self: Log, run: Any, *arguments: Any) -> None:
            log_epoch(self, run, *arguments)
            if run.progress.epoch == 2:
                raise KeyboardInterrupt

        patch.setattr(Log, "epoch", dying)
        assert dltrain("train", config, "--out", "run", "-q", *every).code == 130
    assert [line["epoch"] for line in rundir.records(Path("run")) if line["kind"] == "epoch"] == [1, 2]
    assert dltrain("train", "--resume", "run", "-q").code == 0
    assert [line["epoch"] for line in rundir.records(Path("run")) if line["kind"] == "epoch"] == [1, 2, 3, 4]
    assert_same_end(straight, Path("run"))


def test_what_a_resume_refuses(dltrain: Run, config: Path, straight: Path) -> None:
    shutil.copytree(straight, "run")
    other = config.with_name("other.yaml")
    other.write_text(CONFIG.replace("3e-3", "4e-3"))
    refused = dltrain("train", other, "--out", "run", "--resume")
    assert refused.code == 2
    assert "optim.lr: 0.003 -> 0.004" in refused.err
    for setting in ("seed=1", "data.val=100", "descent.batch_size=50", "data.limit=600", "train.choose_by=val_loss"):
        refused = dltrain("train", "--resume", "run", "--set", setting)
        assert (refused.code, len(refused.err.splitlines())) == (2, 1)
        assert setting.partition("=")[0] in refused.err
    torch.set_num_threads(torch.get_num_threads() + 1)
    refused = dltrain("train", "--resume", "run")
    assert refused.code == 4
    assert "threads" in refused.err
    assert "--allow-inexact" in refused.err
    assert dltrain("train", "--resume", "run", "--allow-inexact", "-q").code == 0


def test_the_loop_is_gradient_descent(dltrain: Run, config: Path) -> None:
    """A loop of plain torch over the same batches ends with the same weights, up to rounding."""
    plain = [
        "--set", "data=digits", "--set", "model={name: mlp, hidden: [16]}", "--set", "train={epochs: 2}",
        "--set", "optim={name: sgd, lr: 0.1, momentum: 0.9}", "--set", "schedule=constant", "--set", "seed=5",
    ]  # fmt: skip
    assert dltrain("train", config, "--out", "run", "-q", *plain).code == 0
    split = digits(Files(Path("none"))).train
    pixels = split.images.double() / 255
    images = ((split.images - 255 * pixels.mean().float()) / (255 * pixels.std(correction=0).float())).flatten(1)
    torch.manual_seed(5)
    model = torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(2):
        for index in torch.randperm(len(split), generator=generator("order", 5, epoch)).split(48):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images[index]), split.labels[index]).backward()
            optimizer.step()
    trained, _ = checkpoint.read(rundir.steps(Path("run"))[0])
    for name, parameter in zip(("model.1", "model.3"), (model[0], model[2]), strict=True):
        torch.testing.assert_close(trained[f"{name}.weight"], parameter.weight.detach(), rtol=1e-4, atol=1e-5)


def test_batch_descent_takes_one_step_along_the_whole_gradient(dltrain: Run, config: Path) -> None:
    """Whatever the micro-batches, a step goes along the gradient over the whole training set."""
    weights = []
    for micro in (64, 10_000):
        out = f"micro-{micro}"
        done = dltrain(
            "train", config, "--out", out, "-q", "--json", "--set", "data={name: digits}", "--set", "train={epochs: 3}",
            "--set", f"descent={{variant: batch, micro_batch_size: {micro}}}", "--set", "optim={name: sgd, lr: 0.5}",
            "--set", "model={name: mlp, hidden: [32]}", "--set", "schedule=constant",
        )  # fmt: skip
        assert json.loads(done.out)["steps"] == 3
        weights.append(checkpoint.read(rundir.steps(Path(out))[0])[0])
    for name in ("model.1.weight", "model.3.bias"):
        torch.testing.assert_close(weights[0][name], weights[1][name], rtol=1e-5, atol=1e-6)
        assert not torch.equal(weights[0][name], weights[1][name])  # else the setting did nothing


def test_the_weights_kept_are_the_best_epochs(dltrain: Run, config: Path) -> None:
    done = dltrain("train", config, "--out", "run", "-q", "--json", "--set", "train.choose_by=val_loss", *NOISY)
    summary = json.loads(done.out)
    losses = [line["val"]["loss"] for line in rundir.records(Path("run")) if line["kind"] == "epoch"]
    assert len(losses) == summary["epochs"] == 6
    assert summary["chosen_by"] == "val_loss"
    assert summary["chosen_epoch"] == losses.index(min(losses)) + 1 < 6
    assert summary["val"]["loss"] == min(losses)
    evaluated = json.loads(dltrain("eval", "run", "--json", "--split", "val").out)
    assert evaluated["loss"] == min(losses)


NOISY = ("--set", "optim.lr=0.5", "--set", "schedule=constant", "--set", "train.epochs=6")


def test_training_stops_when_patience_is_over(dltrain: Run, config: Path) -> None:
    settings = ("--set", "train.patience_epochs=2", "--set", "train.choose_by=val_loss", "--set", "train.epochs=30")
    summary = json.loads(dltrain("train", config, "--out", "run", "-q", "--json", *NOISY, *settings).out)
    losses = [line["val"]["loss"] for line in rundir.records(Path("run")) if line["kind"] == "epoch"]
    assert summary["epochs"] == len(losses) == summary["chosen_epoch"] + 2 < 30
    assert losses.index(min(losses)) + 1 == summary["chosen_epoch"]


def test_a_loss_that_is_not_finite_stops_before_it_is_saved(dltrain: Run, config: Path) -> None:
    settings = (
        "--set",
        "optim={name: sgd, lr: 1e30}",
        "--set",
        "train.checkpoint_every_steps=1",
        "--set",
        "train.clip_norm=null",
    )
    done = dltrain("train", config, "--out", "run", "-q", *settings)
    assert done.code == 7
    assert len(done.err.splitlines()) == 1
    assert "step " in done.err
    assert "learning rate" in done.err
    assert "optim.lr" in done.err
    for path in rundir.steps(Path("run")):
        assert all(
            tensor.isfinite().all() for tensor in checkpoint.read(path)[0].values() if tensor.is_floating_point()
        )


def test_a_gradient_that_is_not_finite_is_not_stepped_along(
    dltrain: Run, config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "_gradient_norm", lambda parameters: torch.tensor(float("inf")))
    done = dltrain("train", config, "--out", "run", "-q", "--set", "train.checkpoint_every_steps=1")
    assert done.code == 7
    assert "step 1:" in done.err
    assert rundir.steps(Path("run")) == []


def test_clipping_bounds_the_step(dltrain: Run, config: Path) -> None:
    """With plain gradient descent a step is lr times the clipped gradient, whose norm is known."""
    settings = [
        "--set", "data={name: digits}", "--set", "train={epochs: 1, clip_norm: 0.01, log_every_steps: 1}", "--set",
        "descent={variant: batch}", "--set", "optim={name: sgd, lr: 1.0}", "--set", "schedule=constant",
        "--set", "model=perceptron",
    ]  # fmt: skip
    assert dltrain("train", config, "--out", "run", "-q", *settings).code == 0
    after, _ = checkpoint.read(rundir.steps(Path("run"))[0])
    torch.manual_seed(0)
    before = torch.nn.Linear(64, 10)
    moved = [after["model.1.weight"] - before.weight, after["model.1.bias"] - before.bias]
    norm = torch.cat([each.flatten() for each in moved]).norm().item()
    assert norm == pytest.approx(0.01, rel=1e-3)
    (line,) = [line for line in rundir.records(Path("run")) if line["kind"] == "step"]
    assert line["gradient_norm"] > 0.1  # what is logged is the norm before clipping


def test_two_classes_by_one_sigmoid(dltrain: Run, config: Path) -> None:
    settings = ("--set", "data={name: digits, classes: [3, 8]}", "--set", "loss=bce", "--set", "model.output=sigmoid")
    summary = json.loads(dltrain("train", config, "--out", "run", "-q", "--json", *settings).out)
    assert summary["test"]["accuracy"] > 0.95
    tensors, _ = checkpoint.read(rundir.steps(Path("run"))[0])
    assert tensors["model.5.weight"].shape == (1, 32)
    scores = json.loads(dltrain("eval", "run", "--json").out)
    assert [row["class"] for row in scores["per_class"]] == ["3", "8"]
    assert scores["loss"] == pytest.approx(summary["test"]["loss"], rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (("--set", "loss=bce"), "bce"),
        (("--set", "model.output=sigmoid"), "data.classes"),
        (("--set", "loss={name: cross_entropy, class_weights: [1, 2]}"), "expected 10 weights"),
        (("--set", "descent.batch_size=501"), "501 images in a batch, 500 in the training set"),
        (("--set", "descent.batch_size=499"), "batchnorm"),
        (("--set", "optim={name: sgd, lr: 0.1, nesterov: true}"), "momentum"),
        (("--set", "schedule.warmup_epochs=4"), "warmup_epochs"),
        (("--set", "data.classes=[1, nine]"), "'nine'"),
        (("--set", "data.limit=5000"), "limit"),
        (("--set", "model={name: cnn, layers: [{conv: 8}, {linear: classes}]}"), "layer 1 (linear)"),
    ],
)
def test_parts_that_do_not_fit_each_other_are_refused(
    dltrain: Run, config: Path, settings: tuple[str, ...], expected: str
) -> None:
    done = dltrain("train", config, "--out", "run", *settings)
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert expected in done.err
    assert not Path("run").exists()
    Path("own").mkdir()
    Path("own/.mine.tmp").touch()
    assert dltrain("train", config, "--out", "own", *settings).code == 2
    assert list(Path("own").rglob("*")) == [Path("own/.mine.tmp")]  # as it was


def test_a_folder_that_is_taken(dltrain: Run, config: Path, straight: Path) -> None:
    shutil.copytree(straight, "run")
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    refused = dltrain("train", config, "--out", "run")
    assert (refused.code, len(refused.err.splitlines())) == (8, 1)
    with FileLock("run/.lock"):
        refused = dltrain("train", "--resume", "run")
        assert (refused.code, len(refused.err.splitlines())) == (8, 1)
    assert before == {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}


def test_an_output_that_cannot_be_written_is_found_before_the_data(dltrain: Run, config: Path) -> None:
    Path("file").write_text("a file where a folder should be")
    done = dltrain("train", config, "--out", "file/run", "--set", "data={name: mnist}")  # of which there is none here
    assert (done.code, len(done.err.splitlines())) == (6, 1)
    assert "file/run" in done.err


def test_tensorboard_shows_what_metrics_hold(dltrain: Run, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once each, in one run with its hyperparameters, also when the run was stopped and resumed."""
    every = ("--set", "train.checkpoint_every_steps=8")
    with monkeypatch.context() as patch:
        stop_after(patch, STEPS + 5, signal.SIGTERM)
        assert dltrain("train", config, "--out", "run", "-q", *every).code == 143
    rundir.steps(Path("run"))[0].unlink()  # so that steps already shown are trained again
    assert dltrain("train", "--resume", "run", "-q").code == 0
    events = EventAccumulator("run", size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    lines = [line for line in rundir.records(Path("run")) if line["kind"] == "step"]
    assert [line["step"] for line in lines] == list(range(1, 4 * STEPS + 1))
    for tag, key in {"loss/train": "loss", "learning_rate": "lr", "gradient_norm": "gradient_norm"}.items():
        shown = [(event.step, event.value) for event in events.Scalars(tag)]
        assert shown == [(line["step"], pytest.approx(line[key])) for line in lines]
    summary = json.loads(Path("run/summary.json").read_text())
    for split, score in (("val", "loss"), ("test", "accuracy")):
        (final,) = events.Scalars(f"final/{split}_{score}")
        assert final.value == pytest.approx(summary[split][score])
    epochs = [line for line in rundir.records(Path("run")) if line["kind"] == "epoch"]
    assert [event.step for event in events.Scalars("loss/val")] == [line["step"] for line in epochs]
    tags = events.Tags()
    assert set(tags["images"]) == {
        "images/train as the model sees them",
        "filters/1",
        "test/confusion matrix",
        "test/worst mistakes",
    }
    assert tags["graph"]
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    start = HParamsPluginData.FromString(content).session_start_info
    assert start.hparams["optim.lr"].number_value == pytest.approx(3e-3)
    assert not [path for path in Path("run").rglob("events*") if path.parent != Path("run")]


@pytest.mark.parametrize(("split", "others"), [("train", ["val", "test"]), ("test", ["train", "val"])])
def test_a_split_is_scored_unless_told_not_to(
    dltrain: Run, config: Path, straight: Path, split: str, others: list[str]
) -> None:
    done = dltrain("train", config, "--out", "run", "-q", "--set", f"evaluate.{split}=false")
    assert (done.code, done.err) == (0, "")  # nothing that TensorBoard could not write either
    scored, unscored = (json.loads((run / "summary.json").read_text()) for run in (straight, Path("run")))
    assert unscored[split] is None
    assert scored[split]["accuracy"] > 0.3
    assert [scored[each] for each in others] == [unscored[each] for each in others]
    assert re.findall("^ (train|val|test) .*%", done.out, flags=re.MULTILINE) == others
    assert_same_end(straight, Path("run"))


def test_a_tensorboard_that_cannot_write_stops_nothing(
    dltrain: Run, config: Path, straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any, **settings: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", full)
    done = dltrain("train", config, "--out", "run")
    assert done.code == 0
    assert done.err.count("TensorBoard") == 1
    assert "No space left" in done.err
    assert_same_end(straight, Path("run"))


def test_training_imports_neither_torchvision_nor_the_compiler(config: Path, tmp_path: Path) -> None:
    """Both cost seconds, and torchvision can be broken where torch is not."""
    code = (
        "import sys; from dltrain import cli; assert cli.run(sys.argv[1:]) == 0; "
        "assert not {'torchvision', 'torch._dynamo', 'torch._inductor'} & set(sys.modules)"
    )
    arguments = ["train", str(config), "--out", str(tmp_path / "run"), "-q", "--set", "train.epochs=1"]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)
