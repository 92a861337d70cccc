"""What can go wrong around a run, by real limits where there are some; docs/reliability.md has the whole matrix."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import re
import shlex
import signal
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from conftest import Run
from data_files import write_cifar10, write_mnist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dltrain import checkpoint, rundir, step, trained
from dltrain.data.files import Files, expand
from dltrain.data.npz import npz
from dltrain.errors import DataError
from dltrain.logs import Log

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
del sys.argv[1]
cli.main()
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
    ("limit", "warnings", "named"),
    [
        (500, 0, "run/config.yaml"),
        (4_000, 1, "run/(best|checkpoints/step-000000003).safetensors"),  # TensorBoard's file is too large before it
        (100_000, 0, "run/(best|checkpoints/step-000000003).safetensors"),
    ],
)
def test_a_file_size_limit_is_an_output_error_that_names_path_and_errno(
    dltrain: Run, tmp_path: Path, limit: int, warnings: int, named: str
) -> None:
    (tmp_path / "c.yaml").write_text(CONFIG)
    done = limited(limit, "train", "c.yaml", "--out", "run", "-q")
    assert done.returncode == 6, done.stderr
    *before, last = done.stderr.splitlines()
    assert re.fullmatch(rf"error: {named}: File too large \(errno 27\).*", last)
    assert all(line.startswith("warning: TensorBoard ") for line in before)
    assert sum("no more of this run" in line for line in before) == warnings
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

    with monkeypatch.context() as patch:
        patch.setattr(step, "gradient", full)
        done = dltrain("train", "c.yaml", "--out", "run", "-q")
        assert (done.code, done.err.count("\n")) == (5, 1)
        single = dltrain("train", "c.yaml", "--out", "single", "-q", "--set", "descent.variant=stochastic")
        assert (single.code, single.err.count("micro_batch_size")) == (5, 0)
    said = re.search(r"; dltrain (.+) keeps the step of 128 images\n", done.err)
    assert said
    assert said[1].endswith("--set descent.micro_batch_size=64")
    assert dltrain(*shlex.split(said[1]), "-q").code == 0
    assert dltrain("train", "c.yaml", "--out", "whole", "-q").code == 0
    one, other = (checkpoint.read(rundir.steps(Path(name))[0])[0] for name in ("whole", "run"))
    torch.testing.assert_close(one["model.1.weight"], other["model.1.weight"])


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


def test_memory_that_runs_out_elsewhere_is_a_device_error_too(
    dltrain: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c.yaml").write_text(CONFIG)
    assert dltrain("train", "c.yaml", "--out", "run", "-q").code == 0

    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 MiB.\nSee the documentation")

    monkeypatch.setattr(trained, "evaluate", full)
    done = dltrain("eval", "run")
    assert (done.code, done.err.count("\n")) == (5, 1)
    assert "--device" in done.err

    def wrong(*arguments: object) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(trained, "evaluate", wrong)
    with pytest.raises(RuntimeError, match="mat1"):
        dltrain("eval", "run")  # a bug of ours stays one


def stop_after_one_step(patch: pytest.MonkeyPatch, signum: int) -> None:
    log_step = Log.step

    def logged(self: Log, run: Any, scores: dict[str, float], **values: float) -> None:
        log_step(self, run, scores, **values)
        if run.global_step == 1:
            os.kill(os.getpid(), signum)

    patch.setattr(Log, "step", logged)


def test_a_stop_is_no_error_and_says_what_to_type(
    dltrain: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c.yaml").write_text(CONFIG)
    with monkeypatch.context() as patch:
        stop_after_one_step(patch, signal.SIGINT)
        done = dltrain("train", "c.yaml", "--out", "a run", "-q", "--set", "train.log_every_steps=1")
    said = re.fullmatch(r"stopped after step 1, and saved; go on with: dltrain (.+)\n", done.err)
    assert done.code == 130
    assert said
    assert dltrain(*shlex.split(said[1]), "-q").code == 0


READING = """
import sys, time
import sklearn.datasets
from dltrain import cli
def slow(return_X_y):
    print("reading", file=sys.stderr, flush=True)
    time.sleep(60)
sklearn.datasets.load_digits = slow
cli.main()
"""


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)])
def test_a_run_that_is_stopped_while_data_are_read_ends_at_once(
    dltrain: Run, tmp_path: Path, signum: int, code: int
) -> None:
    (tmp_path / "c.yaml").write_text(CONFIG)
    command = [sys.executable, "-c", READING, "train", "c.yaml", "--out", "run", "-q"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        assert process.stderr.readline() == "reading\n"
        process.send_signal(signum)
        assert process.wait(30) == code
        assert "Traceback" not in process.stderr.read()
    assert dltrain("train", "c.yaml", "--out", "run", "-q").code == 0


def test_results_that_are_torn_are_written_again(dltrain: Run, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(CONFIG)
    assert dltrain("train", "c.yaml", "--out", "run", "-q").code == 0
    summary = Path("run/summary.json").read_text()
    lines = Path("run/metrics.jsonl").read_text()
    Path("run/summary.json").write_text(summary[:99])
    Path("run/metrics.jsonl").write_text(lines + '[1]\n{"step": "x"}\n{}\n"step"\n' + "[" * 9999 + '\n{"step": 3, "ki')
    assert dltrain("train", "--resume", "run", "-q").code == 0
    assert Path("run/summary.json").read_text() == summary
    assert Path("run/metrics.jsonl").read_text() == lines


def test_a_folder_where_a_file_should_be_is_an_output_error(dltrain: Run, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(CONFIG)
    for name in ("metrics.jsonl", "summary.json", "best.safetensors", "environment.json"):
        Path(name, name).mkdir(parents=True)
        for command in (["train", "c.yaml", "--out", name], ["train", "--resume", name]):
            done = dltrain(*command, "-q")
            assert (done.code, done.err.count("\n")) == (6, 1)
            assert f"{name}/{name}: Is a directory (errno 21)" in done.err
        Path(name, name).rmdir()
        assert dltrain("train", "--resume", name, "-q").code == 0


def test_an_event_file_that_is_torn_hinders_nothing(
    dltrain: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "c.yaml").write_text(CONFIG)
    each = ("--set", "train.log_every_steps=1")
    with monkeypatch.context() as patch:
        stop_after_one_step(patch, signal.SIGTERM)
        assert dltrain("train", "c.yaml", "--out", "run", "-q", *each).code == 143
    (events,) = Path("run").glob("events*")
    events.write_bytes(events.read_bytes()[:-7])
    done = dltrain("train", "--resume", "run", "-q")
    assert (done.code, done.err) == (0, "")
    shown = EventAccumulator("run")
    shown.Reload()
    assert {event.step for event in shown.Scalars("loss/train")} >= {2, 3}
    assert [line["step"] for line in rundir.records(Path("run")) if line["kind"] == "step"] == [1, 2, 3]


DLTRAIN = f"{shlex.quote(sys.executable)} -m dltrain"


@pytest.mark.parametrize("command", ["config schema", "--help", "list --markdown"])
def test_a_reader_that_has_gone_is_no_error(command: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(f"{DLTRAIN} {command}", shell=True, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("config list >&-", 0),
        ("config list >&- 2>&-", 0),
        ("config check nowhere.yaml 2>&-", 2),
        pytest.param(
            "config check nowhere.yaml 2>/dev/full",
            2,
            marks=pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full"),
        ),
    ],
)
def test_outputs_that_are_closed_or_full_leave_the_exit_code(command: str, code: int) -> None:
    done = subprocess.run(f"{DLTRAIN} {command}", shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, "")


@pytest.mark.skipif(sys.platform == "win32", reason="has no such terminals")
def test_a_terminal_of_forty_columns(tmp_path: Path) -> None:
    import fcntl
    import pty
    import termios

    (tmp_path / "c.yaml").write_text(CONFIG)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 40, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    with subprocess.Popen(
        [sys.executable, "-m", "dltrain", "train", "c.yaml", "--out", "run"],
        cwd=tmp_path,
        env={**environment, "TERM": "xterm"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    ) as process:
        os.close(theirs)
        said = b""
        with contextlib.suppress(OSError):  # what Linux says when the other end is closed
            while chunk := os.read(ours, 1 << 16):
                said += chunk
    os.close(ours)
    assert process.returncode == 0, said
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said.decode()))
    assert any(line.startswith("1/1  loss ") for line in lines)
    assert [line for line in lines if len(line) > 40] == []


OPTIMISED = """
import sys
from pathlib import Path
from dltrain.data.cifar import cifar10
from dltrain.data.files import Files
from dltrain.data.mnist import mnist
from dltrain.errors import DataError
assert False
for read in (mnist, cifar10):
    try:
        read(Files(Path(sys.argv[1]), verify=False, download=False))
    except DataError as error:
        print(error)
"""


def test_broken_files_are_refused_also_without_asserts(tmp_path: Path) -> None:
    write_mnist(tmp_path, 3, 2)
    write_cifar10(tmp_path, 5, 1)
    labels = tmp_path / "MNIST/raw/train-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:-1] + b"\x0a")
    batch = tmp_path / "cifar-10-batches-py/data_batch_1"
    batch.write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    command = [sys.executable, "-O", "-c", OPTIMISED, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    first, second = done.stdout.splitlines()
    assert "train-labels-idx1-ubyte" in first
    assert "0..9" in first
    assert "data_batch_1" in second
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("stated", [8, 14, 15, 16, 40])
def test_no_more_is_inflated_than_a_header_says_however_little(stated: int) -> None:
    """Less than the header itself too: a negative size would be read as `all of it`."""
    stream = gzip.GzipFile(fileobj=io.BytesIO(gzip.compress(bytes(10_000_000))))
    with pytest.raises(DataError, match=f"x: expected at most {stated} bytes uncompressed, found more"):
        expand("x", stream, lambda header: stated)
    assert stream.tell() <= max(16, stated + 1)


def test_a_named_pipe_is_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "arrays.npz"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.open("wb").close(), daemon=True)  # what reads it all the same ends
    writer.start()
    with pytest.raises(DataError, match=r"arrays\.npz: not a file"):
        npz(Files(tmp_path), path="arrays.npz", test=1)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    writer.join(10)
    os.close(reader)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_that_would_fill_the_memory_are_not_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: Any
) -> None:
    save(tmp_path / "a.npz", x=np.zeros((100, 8, 8), np.uint8), y=np.zeros(100, np.int64), other=np.zeros(9999))
    needed = (128 + 6400) + (128 + 800)  # what an array takes in the file, after 128 bytes that describe it
    for free in (needed, needed - 1):
        memory = psutil.virtual_memory()._replace(available=free)
        monkeypatch.setattr(psutil, "virtual_memory", lambda memory=memory: memory)
        with contextlib.nullcontext() if free == needed else pytest.raises(DataError, match=f"{needed:,} bytes, and"):
            npz(Files(tmp_path), path="a.npz", test=10)


def test_a_plugin_that_leaves_does_not_end_the_program(dltrain: Run, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"plugins: [leaves.py]\n{CONFIG}")
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(0)\n")
    done = dltrain("train", "c.yaml", "--out", "run", "-q")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "leaves.py:2: SystemExit" in done.err


def test_the_page_names_tests_that_exist_and_a_test_for_every_row() -> None:
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    rows = [row.split("|")[1:-1] for row in PAGE.splitlines() if re.match(r"\| .*`test_", row)]
    assert len(rows) >= 24
    for _, _, named in rows:
        for name in re.findall(r"`(test_\w+)`", named):
            assert re.search(rf"^def {name}\(", tests, flags=re.MULTILINE), name
    assert not [
        row for row in PAGE.splitlines() if row.startswith("| ") and row.count("|") == 4 and "`test_" not in row
    ][2:]
