"""`dltrain verify-resume`: it finds the same where runs are the same, and the difference where there is one.

As a program, `python tests/test_verify_resume.py FOLDER`, this file runs the command in forks instead of processes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
from conftest import Run
from safetensors.numpy import load_file

from dltrain import checkpoint, cli, rundir, state, verify_resume
from dltrain import config as configs
from dltrain.errors import ConfigError
from dltrain.verify_resume import ChildFailedError, compare, run_child, subset
from dltrain.yamlfile import parse

CONFIG = """
data: {name: synthetic, train: 300, test: 50, size: 16, channels: 1, val: 100, augment: [{translate: 1}]}
model: {name: mlp, hidden: [16], dropout: 0.2}
optim: {name: adamw, lr: 3e-3}
descent: {batch_size: 24}
train: {epochs: 2, average: ema, device: cpu}
tensorboard: {filters: false, pr_curves: false}
"""
STEPS = 18  # 200 images in batches of 24, twice


def config_file(folder: Path) -> Path:
    path = folder / "small.yaml"
    path.write_text(CONFIG)
    return path


def fork_child(arguments: list[str], kill: tuple[int, str] | None = None) -> None:
    """What run_child does, and with less to wait for."""
    code = forks.run(arguments, lambda: verify_resume._die_at(*kill) if kill else None)
    assert code == (-signal.SIGKILL if kill else 0)


def main() -> None:
    """Verifies once, and once where a resume leaves the generators as they are."""
    folder = Path(sys.argv[1])
    path = str(config_file(folder))
    forks.prepare()
    verify_resume.run_child = fork_child
    codes = []
    for name, arguments in (
        ("restored", ["--kills", "4"]),
        ("forgotten", ["--kills", "2", "--json", "--images", "250"]),
    ):
        with (folder / f"{name}.out").open("w") as out, contextlib.redirect_stdout(out):
            codes.append(cli.run(["verify-resume", path, "--out", str(folder / name), *arguments]))
        state._set_rng_states = lambda device, states: None
    (folder / "codes.json").write_text(json.dumps(codes))


@pytest.fixture(scope="module")
def verified(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verified")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    done = subprocess.run([sys.executable, __file__, str(folder)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return folder


def test_a_run_that_is_killed_and_resumed_is_found_the_same(verified: Path) -> None:
    text = (verified / "restored.out").read_text()
    assert json.loads((verified / "codes.json").read_text())[0] == 0
    assert text.splitlines()[-1] == "the same, to the last bit"
    found = compare(verified / "restored" / "straight", verified / "restored" / "killed")
    assert found["same"]
    for row in found["parts"]:
        assert text.count(row["straight"][:16]) == 2  # the straight run's, and the killed one's
    assert [row["part"] for row in found["parts"]][1] == "averages"
    assert text.count("killed after step") == 5  # each as it happens, and all at the end
    assert text.count(" in a save") == 4


def test_a_resume_that_leaves_something_out_is_found_different(verified: Path) -> None:
    found = json.loads((verified / "forgotten.out").read_text())
    assert json.loads((verified / "codes.json").read_text())[1] == 1
    assert not found["same"]
    assert found["steps"] == 18  # of 250 images 50 are held out
    first_kill, _ = found["kills"]
    parts = {row["part"]: row for row in found["parts"]}
    assert parts["weights and buffers"]["first_difference"] == "model.1.bias"
    assert parts["progress"]["first_difference"] == "rng.cpu"
    kind, step = parts["losses"]["first_difference"].split()
    assert kind == "step"
    assert int(step) > first_kill["step"]
    for row in found["parts"]:
        assert (row["straight"] == row["killed"]) == (row["first_difference"] is None)


def test_the_digest_is_that_of_the_files_numbers(verified: Path) -> None:
    run = verified / "restored" / "straight"
    tensors = load_file(rundir.steps(run)[0])
    lines = []
    for name in sorted(name for name in tensors if name.startswith("model.")):
        array = tensors[name]
        content = f"torch.{array.dtype} {list(array.shape)}".encode() + array.tobytes()
        lines.append(f"{hashlib.sha256(content).hexdigest()}  {name}\n")
    expected = hashlib.sha256("".join(lines).encode()).hexdigest()
    assert compare(run, run)["parts"][0]["straight"] == expected


def in_checkpoint(change: Callable[[dict[str, torch.Tensor], dict[str, Any]], Any]) -> Callable[[Path], None]:
    def rewrite(run: Path) -> None:
        path = rundir.steps(run)[0]
        rewrite_checkpoint(path, change)

    return rewrite


def rewrite_checkpoint(path: Path, change: Callable[[dict[str, torch.Tensor], dict[str, Any]], Any]) -> None:
    tensors, meta = checkpoint.read(path)
    change(tensors, meta)
    path.write_bytes(checkpoint.encode(tensors, {key: meta[key] for key in meta if key not in ("sha256", "format")}))


def in_text(name: str, old: str, new: str) -> Callable[[Path], None]:
    def rewrite(run: Path) -> None:
        text = (run / name).read_text()
        assert old in text
        (run / name).write_text(text.replace(old, new, 1))

    return rewrite


def last_line_twice(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([*lines, lines[-1], ""]))


CHANGES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "weight": (in_checkpoint(lambda t, m: t["model.1.bias"].view(torch.int32)[0].add_(1)), "weights", "model.1.bias"),
    "minus zero": (in_checkpoint(lambda t, m: t["sums"].copy_(torch.tensor([-0.0, 0.0]))), "progress", "sums"),
    "type": (in_checkpoint(lambda t, m: t.update(sums=t["sums"].view(torch.int64))), "progress", "sums"),
    "average": (in_checkpoint(lambda t, m: t["average.1.weight"].add_(1)), "averages", "average.1.weight"),
    "moment": (in_checkpoint(lambda t, m: t["optim.4.bias.exp_avg"].add_(1)), "optimizer", "optim.4.bias.exp_avg"),
    "lost": (in_checkpoint(lambda t, m: t.pop("optim.4.bias.exp_avg")), "optimizer", "optim.4.bias.exp_avg"),
    "more": (in_checkpoint(lambda t, m: t.update({"slow.x": t["sums"]})), "averages", "slow.x"),
    "class": (in_checkpoint(lambda t, m: m["optimizers"].update({"4.bias": "SGD"})), "optimizer", "optimizers"),
    "generator": (in_checkpoint(lambda t, m: t["rng.cpu"].add_(1)), "progress", "rng.cpu"),
    "position": (in_checkpoint(lambda t, m: m["progress"].update(seen=3)), "progress", "progress"),
    "best": (in_checkpoint(lambda t, m: m["best"].update(value=3)), "best weights", "best"),
    "best file": (
        lambda run: rewrite_checkpoint(run / "best.safetensors", lambda t, m: t["model.4.bias"].add_(1)),
        "best weights",
        "model.4.bias",
    ),
    "a loss": (in_text("metrics.jsonl", '2, "epoch": 1, "loss": ', '2, "epoch": 1, "loss": 1'), "losses", "step 2"),
    "a line twice": (last_line_twice, "losses", f"epoch {STEPS}"),
    "a result": (in_text("summary.json", '"accuracy": 0.', '"accuracy": 1.'), "results", "train"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "part", "first"), CHANGES.values(), ids=CHANGES)
def test_every_difference_is_found_and_named(
    verified: Path, tmp_path: Path, change: Callable[[Path], None], part: str, first: str
) -> None:
    straight = verified / "restored" / "straight"
    shutil.copytree(straight, tmp_path / "run")
    change(tmp_path / "run")
    found = compare(straight, tmp_path / "run")
    assert not found["same"]
    (row,) = [row for row in found["parts"] if row["first_difference"]]
    assert row["part"].startswith(part)
    assert row["first_difference"] == first
    assert row["straight"] != row["killed"]


def test_what_a_clock_says_is_no_difference(verified: Path, tmp_path: Path) -> None:
    straight = verified / "restored" / "straight"
    shutil.copytree(straight, tmp_path / "run")
    in_checkpoint(lambda tensors, meta: meta["progress"].update(seconds=9.0, epoch_seconds=9.0))(tmp_path / "run")
    in_text("metrics.jsonl", '"images_per_second": ', '"images_per_second": 1')(tmp_path / "run")
    in_text("summary.json", '"seconds_per_epoch": ', '"seconds_per_epoch": 1')(tmp_path / "run")
    assert compare(straight, tmp_path / "run")["same"]


def test_a_child_is_a_command_that_is_killed_where_it_is_to_be(tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = ["--set", "train.log_every_steps=1", "--set", "train.checkpoint_every_steps=4"]
    run_child(["train", str(config_file(tmp_path)), "--out", str(run), *settings], (6, "step"))
    assert [record["step"] for record in rundir.records(run)] == [1, 2, 3, 4, 5, 6]
    assert [rundir.step_of(path) for path in rundir.steps(run)] == [4]
    run_child(["train", "--resume", str(run)], (7, "save"))
    assert [rundir.step_of(path) for path in rundir.steps(run)] == [4]
    (unnamed,) = (run / "checkpoints").glob(".step-000000008.*.tmp")
    assert checkpoint.read(unnamed)[1]["step"] == 8


def test_a_child_that_fails_says_why(tmp_path: Path) -> None:
    with pytest.raises(ChildFailedError, match=r"^\S+: expected a run's folder: ") as caught:
        run_child(["train", "--resume", str(tmp_path / "none")])
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("val", "images", "expected"),
    [
        (5000, 1000, ["data.limit=1000", "data.val=200"]),
        (200, 1000, ["data.limit=1000"]),
        (0.1, 1000, ["data.limit=1000"]),
        (0, 1000, ["data.limit=1000"]),
    ],
)
def test_fewer_images_hold_out_a_fifth_at_most(val: float, images: int, expected: list[str]) -> None:
    assert subset(configs.check(parse(f"name: x\n{CONFIG}", "x"), [f"data.val={val}"]), images) == expected


def test_what_cannot_be_the_same_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_resume, "choose_device", lambda asked: (torch.device("cuda", 0), "here"))

    def child(arguments: list[str], kill: tuple[int, str] | None = None) -> None:
        (tmp_path / "straight").mkdir()
        (tmp_path / "straight/summary.json").write_text('{"steps": 2}')

    monkeypatch.setattr(verify_resume, "run_child", child)

    def verify(*overrides: str) -> None:
        config = configs.check(parse(f"name: x\n{CONFIG}", "x"), overrides)
        verify_resume.verify("x", list(overrides), config, 3, tmp_path, print)

    with pytest.raises(ConfigError, match=r"--set train\.deterministic=true"):
        verify()
    with pytest.raises(ConfigError, match=r"--kills 3: the run has 2 steps"):
        verify("train.deterministic=true")


def test_a_folder_that_cannot_be_written(dltrain: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = dltrain("verify-resume", config_file(tmp_path), "--out", tmp_path / "file" / "runs")
    assert (done.code, done.err.count("\n")) == (6, 1)
    assert "file/runs/straight" in done.err


if __name__ == "__main__":
    main()
