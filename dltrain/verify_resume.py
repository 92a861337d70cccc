"""Whether a run that is killed and resumed ends in the same bits as one that is not: both are run and compared.

Every part of them is the command that a user would type, in a process of its own.  As a program,
`python -m dltrain.verify_resume STEP MOMENT train …`, this file is `dltrain train …` that kills itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import runpy
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from dltrain import checkpoint, rundir
from dltrain.config import Config
from dltrain.device import choose_device
from dltrain.errors import ConfigError, DltrainError

# after a step's line in metrics.jsonl; when a save's file is whole and does not have its name yet
MOMENTS = ("step", "save")
AFTER = {"step": "", "save": " in a save"}

Contents = list[tuple[str, str]]  # name -> SHA-256, in order


class ChildFailedError(DltrainError):
    """A run that ended otherwise than it was meant to."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code


def subset(config: Config, images: int) -> list[str]:
    """The overrides that train a config on so many images, at most a fifth of them held out."""
    val = config.data.val
    held_out = [f"data.val={max(1, images // 5)}"] if isinstance(val, int) and val > images // 5 else []
    return [f"data.limit={images}", *held_out]


def verify(
    path: str, overrides: list[str], config: Config, kills: int, out: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """Trains a config in out/straight, and in out/killed with kills and resumes, and compares the ends.

    path, overrides: as `dltrain train` takes them; config: what they say
    kills: SIGKILLs, at steps that are a function of the config's seed

    Returns what `compare` does, with `steps` and `kills`: {step: the last one logged, moment: of MOMENTS}.
    Raises ConfigError where the bits cannot be the same, or there are fewer steps than kills; ChildFailedError where a
    run fails.
    """
    device, _ = choose_device(config.train.device)
    if device.type == "cuda" and not config.train.deterministic:
        text = "two runs end in the same bits only with deterministic algorithms: --set train.deterministic=true"
        raise ConfigError(f"{path}: train.device: on {device} {text}")
    straight, killed = out / "straight", out / "killed"
    settings = [part for each in (*overrides, "train.log_every_steps=1") for part in ("--set", each)]
    say("training without a stop")
    run_child(["train", path, "--out", str(straight), *settings])
    steps = json.loads((straight / "summary.json").read_text(encoding="utf-8"))["steps"]
    if kills > steps:
        raise ConfigError(f"--kills {kills}: the run has {steps} steps: lower it, or train.epochs or --images higher")
    at = sorted(random.Random(config.seed).sample(range(1, steps + 1), kills))
    every = max(1, steps // (4 * (kills + 1)))  # a kill costs up to so many steps, trained again
    command = ["train", path, "--out", str(killed), *settings, "--set", f"train.checkpoint_every_steps={every}"]
    resume = ["train", "--resume", str(killed), *(part for plugin in config.plugins for part in ("--plugin", plugin))]
    died = []
    for step, moment in zip(at, MOMENTS * kills, strict=False):
        run_child(command, (step, moment))
        *_, last = rundir.records(killed)
        died.append({"step": last["step"], "moment": moment})
        say(f"killed after step {last['step']}{AFTER[moment]}; going on")
        command = resume
    run_child(command)
    return {"steps": steps, "kills": died, **compare(straight, killed)}


def run_child(arguments: list[str], kill: tuple[int, str] | None = None) -> None:
    """Runs a command of dltrain in a process of its own, which must succeed, or be killed where it is to be."""
    program = ["dltrain.verify_resume", *map(str, kill)] if kill else ["dltrain"]
    command = [sys.executable, "-m", *program, *arguments, "--quiet"]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode != (-signal.SIGKILL if kill else 0):
        said = "\n".join(line.removeprefix("error: ") for line in done.stderr.splitlines())
        how = f"{shlex.join(['dltrain', *arguments])}: ended with {done.returncode}"
        raise ChildFailedError(said or how, max(done.returncode, 1))


def compare(straight: Path, killed: Path) -> dict[str, Any]:
    """Two runs' parts with their SHA-256, whether they are the same, and where they first differ."""
    one, other = _contents(straight), _contents(killed)
    parts = [
        {
            "part": name,
            "straight": _digest(one[name]),
            "killed": _digest(other[name]),
            "first_difference": _first_difference(one[name], other[name]),
        }
        for name in one
        if one[name] or other[name]  # most runs have no averages
    ]
    return {"same": one == other, "parts": parts}


def _contents(run: Path) -> dict[str, Contents]:
    """Everything that a finished run holds but times, paths, what it was told and what TensorBoard shows."""
    tensors, meta = checkpoint.read(rundir.steps(run)[0])
    best, _ = checkpoint.read(run / "best.safetensors")
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    groups: dict[str, Contents] = {}
    for name in sorted(tensors):
        groups.setdefault(name.partition(".")[0], []).append((name, _sha256(tensors[name])))

    def of(*kinds: str) -> Contents:
        return [each for kind in kinds for each in groups.get(kind, [])]

    def told(**values: Any) -> Contents:
        return [(name, _sha256(value)) for name, value in values.items()]

    return {
        "weights and buffers": of("model"),
        "averages": of("average", "slow"),
        "optimizer": [*of("optim"), *told(scalars=meta["scalars"], optimizers=meta["optimizers"])],
        "best weights": [
            *((name, _sha256(best[name])) for name in sorted(best)),
            *of("best"),
            *told(best=meta["best"]),
        ],
        "progress": [*of("rng", "sums"), *told(step=meta["step"], progress=_timeless(meta["progress"]))],
        "losses": [
            (f"{record['kind']} {record['step']}", _sha256(_timeless(record))) for record in rundir.records(run)
        ],
        "results": told(**{key: value for key, value in _timeless(summary).items() if key != "run"}),
    }


def _timeless(record: Mapping[str, Any]) -> dict[str, Any]:
    """What no clock has a part in: whatever has says `second` in its name."""
    return {key: value for key, value in record.items() if "second" not in key}


def _sha256(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        content = f"{value.dtype} {list(value.shape)}".encode() + value.flatten().view(torch.uint8).numpy().tobytes()
    else:
        content = json.dumps(value, sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()


def _digest(contents: Contents) -> str:
    """Of the lines `SHA-256  name`, as `sha256sum` writes them."""
    return hashlib.sha256("".join(f"{digest}  {name}\n" for name, digest in contents).encode()).hexdigest()


def _first_difference(one: Contents, other: Contents) -> str | None:
    differing = (mine or theirs for mine, theirs in zip_longest(one, other) if mine != theirs)
    return next((each[0] for each in differing if each), None)


def _die_at(step: int, moment: str) -> None:
    """Kills this process at that step's moment of MOMENTS, or at the first one after it.

    An audit hook is told of each file that is about to be opened or renamed; nothing of dltrain is changed.
    """

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        due = False
        if moment == "step" and event == "open" and arguments[1] == "a" and str(arguments[0]).endswith("metrics.jsonl"):
            due = _last_step(Path(arguments[0])) >= step
        if moment == "save" and event == "os.rename" and Path(arguments[1]).name.startswith("step-"):
            due = rundir.step_of(Path(arguments[1])) >= step
        if due:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def _last_step(metrics: Path) -> int:
    """The step of the last line of metrics.jsonl; 0 where there is none yet."""
    if not metrics.exists():
        return 0
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - 4096))  # more than a line
        lines = file.read().splitlines()
    return int(json.loads(lines[-1])["step"]) if lines else 0


if __name__ == "__main__":
    _die_at(int(sys.argv[1]), sys.argv[2])
    del sys.argv[1:3]
    runpy.run_module("dltrain", run_name="__main__")
