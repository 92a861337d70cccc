"""What can go wrong around a run, by real limits where there are some; docs/reliability.md has the whole matrix."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import Run

from dltrain import checkpoint, rundir, train

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
# a checkpoint of about 200 kB
CONFIG = """
data: {name: digits, val: 200, limit: 500}
model: {name: mlp, hidden: [256]}
optim: {name: sgd, lr: 0.1, momentum: 0.9}
train: {epochs: 1}
"""
LIMITED = """
import resource, sys
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
from dltrain import cli
sys.exit(cli.run(sys.argv[2:]))
"""


def limited(limit: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command none of whose files may grow beyond `limit` bytes."""
    return subprocess.run(
        [sys.executable, "-c", LIMITED, str(limit), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("limit", "named"), [(1000, "run/config.yaml"), (100_000, "run/(best|checkpoints/step-000000003).safetensors")]
)
def test_a_file_size_limit_is_an_output_error_that_names_path_and_errno(
    dltrain: Run, tmp_path: Path, limit: int, named: str
) -> None:
    (tmp_path / "c.yaml").write_text(CONFIG)
    done = limited(limit, "train", "c.yaml", "--out", "run", "-q")
    assert done.returncode == 6, done.stderr
    assert re.fullmatch(rf"error: {named}: File too large \(errno 27\).*", done.stderr.splitlines()[-1])
    assert "Traceback (most recent call last):\n  File" not in done.stderr.split("Exception in thread")[0]
    assert not [each for each in tmp_path.rglob("*") if each.name.endswith((".tmp", ".part"))]


def test_a_disk_that_fills_up_leaves_the_last_checkpoint_whole_and_the_run_goes_on(
    dltrain: Run, tmp_path: Path
) -> None:
    (tmp_path / "c.yaml").write_text(CONFIG)
    assert dltrain("train", "c.yaml", "--out", "straight", "-q", "--set", "train.epochs=2").code == 0
    assert dltrain("train", "c.yaml", "--out", "run", "-q").code == 0
    (before,) = rundir.steps(Path("run"))
    content = before.read_bytes()
    more = ["train", "--resume", "run", "-q", "--set", "train.epochs=2", "--allow-inexact"]
    done = limited(100_000, *more)
    assert done.returncode == 6, done.stderr
    assert [path.read_bytes() for path in rundir.steps(Path("run"))] == [content]
    assert sorted(each.name for each in (Path("run") / "checkpoints").iterdir()) == [before.name]
    assert dltrain("eval", "run").code == 0
    assert dltrain("train", "--resume", "run", "-q", "--set", "train.epochs=2").code == 0
    one, other = (checkpoint.read(rundir.steps(Path(name))[0])[0] for name in ("straight", "run"))
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    steps = [line["step"] for line in rundir.records(Path("run")) if line["kind"] == "epoch"]
    assert steps == [3, 6]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 MiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_names_the_micro_batch_that_keeps_the_step(
    dltrain: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    (tmp_path / "c.yaml").write_text(CONFIG)

    def full(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(train, "gradient", full)
    done = dltrain("train", "c.yaml", "--out", "run", "-q")
    assert (done.code, done.err.count("\n")) == (5, 1)
    assert "--set descent.micro_batch_size=64 keeps the step of 128 images" in done.err


def test_a_run_that_diverges_before_its_first_save_says_how_to_go_on(dltrain: Run, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(CONFIG)
    done = dltrain("train", "c.yaml", "--out", "run", "-q", "--set", "optim.lr=1e30")
    assert done.code == 7
    assert "then: dltrain train --resume run --set optim.lr=" in done.err
    assert not rundir.steps(Path("run"))
    assert dltrain("train", "c.yaml", "--out", "run", "-q").code == 8
    assert dltrain("train", "--resume", "run", "-q", "--set", "optim.lr=0.1").code == 0
    assert dltrain("train", "c.yaml", "--out", "straight", "-q").code == 0
    one, other = (checkpoint.read(rundir.steps(Path(name))[0])[0] for name in ("straight", "run"))
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_warnings_are_said_though_quiet(dltrain: Run, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(CONFIG)
    every = ("--set", "train.checkpoint_every_steps=1")
    assert dltrain("train", "c.yaml", "--out", "run", "-q", *every).code == 0
    newest = rundir.steps(Path("run"))[0]
    newest.write_bytes(newest.read_bytes()[:-1])
    done = dltrain("train", "--resume", "run", "-q", "--json")
    assert done.code == 0
    assert newest.name in done.err
    assert json.loads(done.out)["steps"] == 3


def test_the_page_names_tests_that_exist_and_a_test_for_every_row() -> None:
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    rows = [row.split("|")[1:-1] for row in PAGE.splitlines() if re.match(r"\| .*`test_", row)]
    assert len(rows) >= 24
    for _, _, named in rows:
        for name in re.findall(r"`(test_\w+)`", named):
            assert re.search(rf"^def {name}\(", tests, flags=re.MULTILINE), name
    assert not [row for row in PAGE.splitlines() if row.startswith("| ") and row.count("|") == 4 and "`test_" not in row][2:]
