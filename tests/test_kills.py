"""Runs that are killed at any moment whatever, and go on to the bits that they would have had.

As a program, `python tests/test_kills.py FOLDER SEED…`, this file trains the runs that its tests look at.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import forks
import pytest

from dltrain import checkpoint, cli, logs, rundir, state, train
from dltrain.rundir import RunFolder
from dltrain.verify_resume import compare

# shuffling, augmentation, dropout, batch norm, AdamW, averages, clipping, an uneven last batch, saves in mid-epoch
CONFIG = """
data: {name: digits, val: 200, limit: 700, augment: [{translate: 1}, {cutout: 2}]}
model: {name: mlp, hidden: [32], dropout: 0.2, batchnorm: true}
optim: {name: adamw, lr: 3e-3}
schedule: {name: cosine, warmup_epochs: 0.5}
descent: {batch_size: 48}
train: {epochs: 3, average: ema, clip_norm: 1.0, log_every_steps: 1, checkpoint_every_steps: 4}
tensorboard: {filters: false, pr_curves: false}
"""
STEPS = 33  # 500 images in batches of 48, three times

SEEDS = range(50)
FEW = SEEDS[:7]

# whose calls a run is killed at, in turn; a seed says at which of their calls
FILES = [str(module.__file__) for module in (rundir, train, checkpoint, state, logs)]
Event = tuple[str, int]  # the file, and how many of its events came before


def watch(act: Callable[[Event, FrameType, Any], None]) -> None:
    """Calls `act` when a function of FILES begins or ends, and before and after it calls one that is not Python's."""
    seen = Counter[str]()

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        file = frame.f_code.co_filename
        if file in FILES:
            act((file, seen[file]), frame, argument)
            seen[file] += 1

    sys.setprofile(profile)


def die_at(event: Event) -> None:
    """Kills this process there; where it is about to write something, half of that is written."""

    def act(at: Event, frame: FrameType, argument: Any) -> None:
        if at == event:
            if getattr(argument, "__name__", "") == "write":
                content = frame.f_locals.get("content", '{"kind": "step", "step": 1, "loss": 0.1}')
                argument.__self__.write(content[: len(content) // 2])
                argument.__self__.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    watch(act)


def die_after_the_last_save() -> None:
    """Kills this process once the checkpoint of the last step is written."""
    save = RunFolder.save

    def dying(self: RunFolder, step: int, content: bytes) -> None:
        save(self, step, content)
        if step == STEPS:
            os.kill(os.getpid(), signal.SIGKILL)

    RunFolder.save = dying


def main() -> None:
    """Trains FOLDER/straight, then for each seed FOLDER/SEED with two kills, and says where they were."""
    folder = Path(sys.argv[1])
    path = folder / "small.yaml"
    path.write_text(CONFIG)
    forks.prepare()
    events = Counter[str]()
    watch(lambda event, frame, argument: events.update([event[0]]))
    assert cli.run(["train", str(path), "--out", str(folder / "straight"), "--quiet"]) == 0
    sys.setprofile(None)
    for seed in map(int, sys.argv[2:]):
        run = folder / str(seed)
        draw = random.Random(seed)
        file = FILES[seed % len(FILES)]
        event = file, draw.randrange(events[file])
        fresh = ["train", str(path), "--out", str(run)]
        died = [forks.run(fresh, lambda event=event: die_at(event))]
        resume = ["train", "--resume", str(run)] if (run / "config.yaml").exists() else fresh
        early = rundir.__file__, draw.randrange(200)  # while it finds out where it stands, or a little later
        died.append(forks.run(resume, lambda early=early: die_at(early)))
        resume = ["train", "--resume", str(run)] if (run / "config.yaml").exists() else fresh
        ended = forks.run(resume)
        (folder / f"{seed}.json").write_text(json.dumps({"died": died, "ended": ended, "event": event}))
    trained, unrestored = folder / "trained", folder / "unrestored"
    died = forks.run(["train", str(path), "--out", str(trained)], die_after_the_last_save)
    assert died == -signal.SIGKILL
    assert forks.run(["train", "--resume", str(trained)]) == 0
    middle = train.__file__, events[train.__file__] // 2
    died = forks.run(["train", str(path), "--out", str(unrestored)], lambda: die_at(middle))
    assert died == -signal.SIGKILL
    state._set_rng_states = lambda device, states: None
    assert forks.run(["train", "--resume", str(unrestored)]) == 0


def run_program(folder: Path, seeds: range) -> Path:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(folder), *map(str, seeds)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_program(tmp_path_factory.mktemp("few"), FEW)


def assert_killed_and_the_same(folder: Path, seed: int) -> None:
    found = json.loads((folder / f"{seed}.json").read_text())
    assert found["died"][0] == -signal.SIGKILL
    assert found["died"][1] in (-signal.SIGKILL, 0)  # it may have had less than that to do
    assert found["ended"] == 0
    assert compare(folder / "straight", folder / str(seed))["same"], found
    run = folder / str(seed)
    assert [rundir.step_of(path) for path in rundir.steps(run)] == [STEPS, STEPS - 1]
    assert not list(run.rglob("*.tmp"))
    assert [json.loads(line)["kind"] for line in (run / "metrics.jsonl").open()].count("step") == STEPS


@pytest.mark.parametrize("seed", FEW)
def test_a_run_killed_at_any_moment_ends_in_the_same_bits(few: Path, seed: int) -> None:
    assert_killed_and_the_same(few, seed)


def test_a_run_killed_before_its_results_keeps_its_best_weights(few: Path) -> None:
    """Which are an average, and so not the model's own at that step."""
    assert compare(few / "straight", few / "trained")["same"]


def test_without_the_generators_state_it_would_not(few: Path) -> None:
    assert not compare(few / "straight", few / "unrestored")["same"]


@pytest.mark.soak
def test_fifty_runs_killed_at_any_moment_end_in_the_same_bits(tmp_path: Path) -> None:
    run_program(tmp_path, SEEDS)
    for seed in SEEDS:
        assert_killed_and_the_same(tmp_path, seed)


if __name__ == "__main__":
    main()
