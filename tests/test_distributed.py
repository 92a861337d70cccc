"""Several processes: they train as one does, end together, and go on where they stood."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import Run
from torch import nn

from dltrain import checkpoint, cli, rundir
from dltrain import config as configs
from dltrain.build import build
from dltrain.data.batches import Batches
from dltrain.data.dataset import Split
from dltrain.data.random import Random
from dltrain.distributed import ALONE, Processes, share_batchnorm
from dltrain.errors import ConfigError
from dltrain.tasks import Classification

# 11 steps an epoch; the last has 18 images, 9 for each of two processes, the others 28 and 27
CONFIG = """
data: {name: digits, val: 200, limit: 768, augment: [{translate: 1}, {cutout: 2}]}
model: {name: mlp, hidden: [32], batchnorm: true}
optim: {name: adamw, lr: 3e-3}
descent: {batch_size: 55}
train: {epochs: 25, log_every_steps: 1, precision: fp32, compile: "off", sync_batchnorm: true}
tensorboard: {pictures: false, filters: false, pr_curves: false}
"""
TOGETHER = ("train.checkpoint_every_steps=9",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("processes")
    (path / "small.yaml").write_text(CONFIG)
    return path


def start(*arguments: object, launcher: tuple[str, ...] = ("-m", "dltrain"), cwd: Path) -> subprocess.Popen[str]:
    command = [sys.executable, *launcher, "train", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def steps(run: Path) -> list[dict[str, Any]]:
    return [record for record in rundir.records(run) if record["kind"] == "step"]


def after_step(run: Path, step: int, then: Callable[[], None]) -> None:
    """Does something once a run has taken that many steps."""
    deadline = time.monotonic() + 60
    while not any(record["step"] >= step for record in steps(run)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    then()


def end(run: Path) -> dict[str, torch.Tensor]:
    return checkpoint.read(rundir.steps(run)[0])[0]


@pytest.fixture(scope="module")
def together(folder: Path) -> Path:
    """The run of two processes that nothing stops."""
    process = start("small.yaml", "--out", "together", "-q", "--processes", 2, cwd=folder)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    return folder / "together"


def test_two_processes_compute_what_one_does(folder: Path, together: Path) -> None:
    assert cli.run(["train", str(folder / "small.yaml"), "--out", str(folder / "alone"), "-q"]) == 0
    for one, two in zip(steps(folder / "alone")[:50], steps(together)[:50], strict=True):
        assert two["step"] == one["step"]
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-4)
        assert two["gradient_norm"] == pytest.approx(one["gradient_norm"], abs=1e-3)
        assert two["accuracy"] == pytest.approx(one["accuracy"], abs=1e-12)
    one, two = (
        next(each for each in rundir.records(run) if each["kind"] == "epoch") for run in (folder / "alone", together)
    )
    assert two["train"] == pytest.approx(one["train"], abs=1e-4)
    assert two["val"] == pytest.approx(one["val"], abs=1e-4)


def test_one_process_writes(together: Path) -> None:
    names = sorted(path.name for path in together.iterdir() if "tfevents" not in path.name)
    assert names == sorted(
        [".lock", "best.safetensors", "checkpoints", "config.yaml", "environment.json", "metrics.jsonl", "summary.json"]
    )
    assert len(list(together.glob("*tfevents*"))) == 1
    assert [record["step"] for record in steps(together)] == list(range(1, 25 * 11 + 1))
    assert end(together)["rng.cpu"].shape[0] == 2


def test_whatever_ends_it_a_run_of_two_goes_on_to_the_same_bits(folder: Path, together: Path) -> None:
    """One process is killed, both are asked to stop, the one that started them is killed; then torchrun starts them."""
    run = folder / "ended"
    first = start("small.yaml", "--out", run, "-q", "--processes", 2, "--set", TOGETHER[0], cwd=folder)
    children: list[psutil.Process] = []

    def kill_second() -> None:
        children.extend(psutil.Process(first.pid).children())
        second = next(child for child in children if child.environ()["RANK"] == "1")
        second.kill()

    after_step(run, 20, kill_second)
    killed = time.monotonic()
    _, err = first.communicate(timeout=60)
    assert time.monotonic() - killed < 10
    assert first.returncode == 5
    assert err.count("\n") == 1
    assert "process 1 of 2 was ended by SIGKILL" in err
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]

    second = start("--resume", run, "-q", "--processes", 2, cwd=folder)
    after_step(run, 60, lambda: second.send_signal(signal.SIGTERM))
    _, err = second.communicate(timeout=60)
    assert second.returncode == 143
    assert err.count("\n") == 1
    assert err.rstrip().endswith(f"go on with: dltrain train --resume {run} --processes 2")

    third = start("--resume", run, "-q", "--processes", 2, cwd=folder)

    def kill_parent() -> None:
        children[:] = psutil.Process(third.pid).children()
        third.kill()

    after_step(run, 120, kill_parent)
    third.communicate(timeout=60)
    assert len(children) == 2
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    assert not rundir.read_summary(run)  # they did not just come to their end

    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "dltrain")
    fourth = start("--resume", run, "-q", launcher=torchrun, cwd=folder)
    _, err = fourth.communicate(timeout=120)
    assert fourth.returncode == 0, err
    one, other = end(together), end(run)
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    straight, resumed = ([(each["step"], each["loss"]) for each in steps(path)] for path in (together, run))
    assert straight == resumed


def test_a_process_that_never_comes_ends_the_others(folder: Path) -> None:
    """They would wait for it for ten minutes."""
    process = start("small.yaml", "--out", "one-of-two", "-q", "--processes", 2, cwd=folder)
    deadline = time.monotonic() + 30
    while len(children := psutil.Process(process.pid).children()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    children[1].kill()
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err.count("\n")) == (5, 1)
    assert "process 1 of 2 was ended by SIGKILL" in err


def test_another_number_of_processes_would_end_in_other_bits(dltrain: Run, together: Path) -> None:
    refused = dltrain("train", "--resume", together, "--set", "train.epochs=26")
    assert refused.code == 4
    assert "processes: 2 -> 1" in refused.err
    assert dltrain("train", "--resume", together, "-q", "--set", "train.epochs=26", "--allow-inexact").code == 0


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ("data.limit=100000", 2, "100000 images asked for"),
        ("optim.lr=1e30", 7, "at learning rate"),
    ],
)
def test_what_all_meet_is_said_once(folder: Path, change: str, code: int, said: str) -> None:
    name = f"wrong-{code}"
    process = start("small.yaml", "--out", name, "-q", "--processes", 2, "--set", change, cwd=folder)
    _, err = process.communicate(timeout=120)
    assert process.returncode == code
    assert err.count("\n") == 1
    assert said in err


def test_every_process_evaluates_by_the_first_ones_running_statistics(dltrain: Run, folder: Path) -> None:
    """Those that the checkpoint has: the test split goes through the model in three blocks, by turns."""
    run = folder / "own-statistics"
    changes = ["data={name: synthetic, train: 600, test: 1100, size: 16, val: 100}", "train.epochs=2"]
    sets = [part for change in [*changes, "train.sync_batchnorm=false"] for part in ("--set", change)]
    process = start("small.yaml", "--out", run, "-q", "--processes", 2, *sets, cwd=folder)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    summary = rundir.read_summary(run)
    assert summary
    alone = json.loads(dltrain("eval", run, "--json").out)
    assert alone["loss"] == pytest.approx(summary["test"]["loss"], abs=1e-6)
    assert alone["accuracy"] == pytest.approx(summary["test"]["accuracy"], abs=1e-12)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("descent={variant: stochastic}", "a step of 1 image cannot be shared by 2 processes"),
        ("descent.batch_size=567", "a step of 1 image cannot be shared"),  # 568 images, the last of them alone
        ("descent.micro_batch_size=9", "of a step of 55 images one process has 4 micro-batches and another 3"),
        ("train.device=cuda:0", "2 processes take a device each: set it to cuda"),
        ("train.compile=default", "2 processes cannot compile it"),
    ],
)
def test_a_config_that_processes_cannot_share_is_refused(folder: Path, change: str, said: str) -> None:
    config = configs.load(folder / "small.yaml", [change])
    with pytest.raises(ConfigError, match=re.escape(said)):
        build(config, lambda text: None, processes=Processes(0, 2))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--set", "optim.lr=fast"], "optim.lr"),
        (["--dry-run"], "--dry-run looks at one process"),
        (["--profile"], "--profile looks at one process"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_started(
    dltrain: Run, folder: Path, arguments: list[str], said: str
) -> None:
    refused = dltrain("train", folder / "small.yaml", "--processes", 2, *arguments)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert said in refused.err


def shared(images: int, step_size: int, micro_size: int, rank: int, world: int) -> Batches:
    numbers = torch.arange(images, dtype=torch.uint8)[:, None, None, None]
    return Batches(
        Split(numbers, torch.arange(images) % 3),
        lambda pixels: pixels.float(),  # type: ignore[arg-type]
        task=Classification((1, 1, 1), 3, "softmax"),
        seed=0,
        step_size=step_size,
        micro_size=micro_size,
        augment=[],
        classes=3,
        balance=False,
        resident=True,
        device=torch.device("cpu"),
        rank=rank,
        world=world,
    )


@pytest.mark.parametrize(
    ("step_size", "micro_size", "world"), [(10, 10, 2), (9, 2, 2), (11, 11, 3), (32, 3, 4), (5, 2, 5)]
)
def test_the_parts_of_a_step_are_the_step(step_size: int, micro_size: int, world: int) -> None:
    whole = shared(32, step_size, step_size, 0, 1)
    for epoch in (0, 1):
        for step in range(whole.steps):
            ((images, _, _),) = whole.step(epoch, step)
            found: list[float] = []
            shares = 0.0
            for rank in range(world):
                part = shared(32, step_size, micro_size, rank, world)
                micro = list(part.step(epoch, step))
                own = [number for pixels, _, _ in micro for number in pixels.flatten().tolist()]
                assert len(own) == part.own_images_in(step)
                assert part.images_in(step) == len(images)
                found += own
                shares += sum(share for *_, share in micro)
            assert found == images.flatten().tolist()
            assert shares == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("shape", [lambda n: (n,), lambda n: (2, n), lambda n: (n, 1, 4)])
def test_what_is_drawn_for_an_image_does_not_depend_on_who_has_it(shape: Callable[[int], tuple[int, ...]]) -> None:
    def draws(images: int, **around: int) -> list[torch.Tensor]:
        random = Random(3, seed=0, epoch=1, index=torch.arange(images), **around)
        size = shape(images)
        return [random.uniform(*size), random.integers(9, *size), random.normal(*size), random.uniform(1)]

    whole, parts = draws(7), [draws(3, before=0, after=4), draws(4, before=3, after=0)]
    dim = shape(7).index(7)
    for at, expected in enumerate(whole[:3]):
        assert torch.equal(torch.cat([part[at] for part in parts], dim), expected)
    assert torch.equal(parts[0][3], whole[3])


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("last", [True, False])
def test_shared_batchnorm_is_batchnorm(momentum: float | None, affine: bool, last: bool) -> None:
    """Of one process; that the statistics are those of all is in the losses above."""
    torch.manual_seed(0)
    plain, shares = (nn.BatchNorm2d(3, momentum=momentum, affine=affine) for _ in range(2))
    share_batchnorm(shares, ALONE)
    layout = torch.channels_last if last else torch.contiguous_format
    x = (torch.randn(6, 3, 4, 5) * 3 + 2).to(memory_format=layout)
    upstream = torch.randn(6, 3, 4, 5).to(memory_format=layout)
    found = []
    for norm in (plain, shares):
        if affine:
            nn.init.constant_(norm.weight, 1.5)
            nn.init.constant_(norm.bias, 0.5)
        for _ in range(2):
            each = x.clone(memory_format=torch.preserve_format).requires_grad_()
            outputs = norm(each)
            norm.zero_grad()
            outputs.backward(upstream)
        norm.eval()
        found.append([outputs, each.grad, norm(x), *(p.grad for p in norm.parameters()), *norm.buffers()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
