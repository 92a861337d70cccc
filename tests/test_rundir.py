"""The run's folder: writes that are whole or not there, one holder, and the latest checkpoint that is whole."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dltrain import rundir
from dltrain.errors import CheckpointError, OtherFormatError, OutputError, RunTakenError
from dltrain.rundir import RunFolder, create, latest, records, steps, write_atomically


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def recorded(monkeypatch: pytest.MonkeyPatch, fail_at: int = -1, error: int = errno.ENOSPC) -> list[tuple[str, str]]:
    """Every call to the disk that matters, in order, with the name of what it is about; `fail_at` raises."""
    calls: list[tuple[str, str]] = []
    open_file, fsync, rename = Path.open, os.fsync, Path.replace

    def note(what: str, path: str | Path) -> None:
        calls.append((what, Path(path).name))
        if len(calls) - 1 == fail_at:
            raise OSError(error, os.strerror(error), str(path))

    class Watched:
        def __init__(self, file: Any, name: str) -> None:
            self.file, self.name = file, name

        def __enter__(self) -> Watched:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()
            note("close", self.name)

        def write(self, content: bytes) -> None:
            self.file.write(content[: len(content) // 2])  # a full disk takes a part
            note("write", self.name)
            self.file.write(content[len(content) // 2 :])

        def flush(self) -> None:
            self.file.flush()
            note("flush", self.name)

        def fileno(self) -> int:
            return int(self.file.fileno())

    def watched_open(path: Path, mode: str = "r", **settings: Any) -> Any:
        note("open", path)
        return Watched(open_file(path, mode, **settings), path.name)

    def watched_fsync(handle: int) -> None:
        note("fsync", Path(f"/proc/self/fd/{handle}").readlink())
        fsync(handle)

    def watched_replace(path: Path, target: Path) -> Path:
        note("replace", target)
        return rename(path, target)

    monkeypatch.setattr(Path, "open", watched_open)
    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(Path, "replace", watched_replace)
    return calls


CALLS = ["open", "write", "flush", "fsync", "close", "replace", "fsync"]


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc which file a handle is")
def test_a_write_is_on_disk_before_it_has_its_name_and_its_name_after(monkeypatch, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    calls = recorded(monkeypatch)
    write_atomically(folder / "x.json", b"content")
    monkeypatch.undo()
    assert [what for what, _ in calls] == CALLS
    temporary = calls[0][1]
    assert temporary != "x.json"
    assert temporary.endswith(".tmp")
    assert [name for _, name in calls] == [*[temporary] * 5, "x.json", "run"]
    assert names(folder) == ["x.json"]
    assert (folder / "x.json").read_bytes() == b"content"


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc which file a handle is")
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EFBIG])
@pytest.mark.parametrize("fail_at", range(len(CALLS)), ids=lambda at: f"{at}-{CALLS[at]}")
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(monkeypatch, tmp_path, fail_at, error):
    path = tmp_path / "x.json"
    path.write_bytes(b"old")
    calls = recorded(monkeypatch, fail_at, error)
    with pytest.raises(OutputError) as caught:
        write_atomically(path, b"new content")
    monkeypatch.undo()
    assert [what for what, _ in calls][: fail_at + 1] == CALLS[: fail_at + 1]
    assert caught.value.exit_code == 6
    assert str(caught.value) == f"{path}: {os.strerror(error)} (errno {error})"
    assert names(tmp_path) == ["x.json"]
    renamed = fail_at == len(CALLS) - 1  # only the folder's fsync failed, and the whole content is there
    assert path.read_bytes() == (b"new content" if renamed else b"old")


def test_a_save_that_fails_keeps_the_checkpoints_before_it(monkeypatch, tmp_path):
    folder = RunFolder(tmp_path / "run", resume=False)
    folder.save(1, b"one")
    folder.save(2, b"two")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"step-000000003\.safetensors: No space left on device \(errno 28\)"):
        folder.save(3, b"three")
    assert [path.read_bytes() for path in steps(folder.path)] == [b"two", b"one"]
    assert len(names(folder.checkpoints)) == 2


@pytest.mark.parametrize("make", [Path.touch, lambda path: path.symlink_to(path)], ids=["file", "looping link"])
def test_a_file_where_a_folder_should_be(tmp_path, make: Callable[[Path], Any]):
    taken = tmp_path / "taken"
    make(taken)
    with pytest.raises(OutputError, match=r"errno"):
        write_atomically(taken / "x.json", b"content")
    for path in (taken, taken / "run"):
        with pytest.raises(OutputError, match=rf"{path}: cannot be written: .* \(errno \d+\)"):
            RunFolder(path, resume=False)
    with pytest.raises(OutputError, match=r"cannot be written"):
        create(taken, "name")
    with pytest.raises(OutputError, match=r"cannot be written"):
        create(tmp_path, "taken")
    assert names(tmp_path) == ["taken"]


def test_a_folder_where_a_file_should_be(tmp_path):
    folder = RunFolder(tmp_path / "run", resume=False)
    (folder.path / "config.yaml").mkdir()
    (folder.path / "metrics.jsonl").mkdir()
    with pytest.raises(OutputError, match=r"config\.yaml: "):
        folder.write("config.yaml", "x: 1\n")
    with pytest.raises(OutputError, match=r"metrics\.jsonl: "):
        folder.append({"step": 1})
    assert not list(folder.path.glob("*.tmp"))
    assert not list(folder.path.glob(".*.tmp"))


def test_a_second_holder_is_refused_until_the_first_lets_go(tmp_path):
    path = tmp_path / "run"
    first = RunFolder(path, resume=False)
    first.write("config.yaml", "x: 1\n")
    for resume in (False, True):
        with pytest.raises(RunTakenError, match=r"run: another process is training here") as caught:
            RunFolder(path, resume=resume)
        assert caught.value.exit_code == 8
    first.write("config.yaml", "x: 2\n")  # unharmed
    first.close()
    RunFolder(path, resume=True).close()


HOLD = """
import sys
from pathlib import Path
from dltrain.rundir import RunFolder
folder = RunFolder(Path(sys.argv[1]), resume=False)
print("held", flush=True)
sys.stdin.read()
"""


def test_the_lock_holds_between_processes_and_goes_with_its_holder(tmp_path):
    path = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunTakenError, match=r"another process is training here"):
            RunFolder(path, resume=False)
    finally:
        holder.kill()  # so that it cannot tidy up
        holder.communicate()
    assert (path / ".lock").exists()
    RunFolder(path, resume=False).close()


def test_a_folder_that_holds_a_run_is_taken_only_to_resume_it(tmp_path):
    path = tmp_path / "run"
    folder = RunFolder(path, resume=False)
    folder.write("config.yaml", "x: 1\n")
    folder.append({"step": 1})
    folder.close()
    before = {name: (path / name).read_bytes() for name in ("config.yaml", "metrics.jsonl")}
    with pytest.raises(RunTakenError, match=r"holds a run already; go on with it by --resume") as caught:
        RunFolder(path, resume=False)
    assert caught.value.exit_code == 8
    assert before == {name: (path / name).read_bytes() for name in before}
    RunFolder(path, resume=True).close()  # the refused one holds nothing


def test_what_a_killed_save_left_is_removed_and_nothing_else(tmp_path):
    path = tmp_path / "run"
    folder = RunFolder(path, resume=False)
    folder.save(1, b"one")
    folder.write("config.yaml", "x: 1\n")
    folder.close()
    (path / ".summary.json.0123abcd.tmp").write_bytes(b"half")
    (path / "checkpoints" / ".step-000000002.safetensors.0123abcd.tmp").write_bytes(b"half")
    (path / "notes.tmp").write_bytes(b"the user's own")
    RunFolder(path, resume=True).close()
    assert names(path) == [".lock", "checkpoints", "config.yaml", "notes.tmp"]
    assert names(path / "checkpoints") == ["step-000000001.safetensors"]


def test_the_leftovers_of_a_run_that_still_saves_are_left_alone(tmp_path):
    path = tmp_path / "run"
    folder = RunFolder(path, resume=False)
    half = path / "checkpoints" / ".step-000000002.safetensors.0123abcd.tmp"
    half.write_bytes(b"half")
    with pytest.raises(RunTakenError):
        RunFolder(path, resume=True)
    assert half.exists()
    folder.close()


@pytest.mark.parametrize("order", [[1, 2, 3, 10, 20], [20, 10, 3, 2, 1]])
def test_the_two_highest_steps_are_kept_whatever_the_clock_says(tmp_path, order):
    folder = RunFolder(tmp_path / "run", resume=False)
    for age, step in enumerate(order):
        write_atomically(folder.checkpoints / f"step-{step:09d}.safetensors", b"%d" % step)
        os.utime(folder.checkpoints / f"step-{step:09d}.safetensors", (1e9 - age, 1e9 - age))  # newer means older
    (folder.checkpoints / "step-best.safetensors").write_bytes(b"the user's own")
    assert [path.name for path in steps(folder.path)] == [f"step-{step:09d}.safetensors" for step in (20, 10, 3, 2, 1)]
    folder.save(21, b"21")
    assert [path.read_bytes() for path in steps(folder.path)] == [b"21", b"20"]
    assert names(folder.checkpoints) == [
        "step-000000020.safetensors",
        "step-000000021.safetensors",
        "step-best.safetensors",
    ]


def test_steps_are_ordered_as_numbers(tmp_path):
    folder = RunFolder(tmp_path / "run", resume=False)
    for step in (999_999_999, 1_000_000_000, 2):
        (folder.checkpoints / f"step-{step:09d}.safetensors").write_bytes(b"")
    assert [int(path.stem.removeprefix("step-")) for path in steps(folder.path)] == [10**9, 10**9 - 1, 2]


def test_a_new_checkpoint_is_whole_before_an_old_one_goes(monkeypatch, tmp_path):
    folder = RunFolder(tmp_path / "run", resume=False)
    for step in (1, 2):
        folder.save(step, b"x")
    seen: list[list[str]] = []
    unlink = Path.unlink

    def watched(path: Path, missing_ok: bool = False) -> None:
        seen.append(names(folder.checkpoints))
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", watched)
    folder.save(3, b"x")
    assert seen == [[f"step-{step:09d}.safetensors" for step in (1, 2, 3)]]


def read(path: Path) -> str:
    text = path.read_text()
    if text.startswith("broken"):
        raise CheckpointError(f"{path}: {text}")
    return text


def test_the_latest_is_the_highest_step_that_is_whole(tmp_path):
    folder = RunFolder(tmp_path / "run", resume=False)
    warnings: list[str] = []
    assert latest(folder.path, read, warnings.append) is None
    folder.save(5, b"five")
    folder.save(12, b"twelve")
    os.utime(folder.checkpoints / "step-000000005.safetensors")  # the clock has jumped back
    assert latest(folder.path, read, warnings.append) == "twelve"
    assert warnings == []

    newest = folder.checkpoints / "step-000000012.safetensors"
    newest.write_bytes(b"broken by a test")
    assert latest(folder.path, read, warnings.append) == "five"
    assert warnings == [f"{newest}: broken by a test; it is passed over"]

    (folder.checkpoints / "step-000000005.safetensors").write_bytes(b"broken too")
    assert latest(folder.path, read, warnings.append) is None
    assert len(warnings) == 3


def test_a_checkpoint_of_another_format_is_not_passed_over(tmp_path):
    """Going on from the one before would lose what a newer dltrain has trained."""
    folder = RunFolder(tmp_path / "run", resume=False)
    folder.save(5, b"five")
    folder.save(12, b"of another format")

    def other(path: Path) -> str:
        if "format" in path.read_text():
            raise OtherFormatError(f"{path}: format 2")
        return read(path)

    with pytest.raises(OtherFormatError):
        latest(folder.path, other, print)


def test_a_checkpoint_that_is_pruned_meanwhile_is_no_fault(tmp_path):
    folder = RunFolder(tmp_path / "run", resume=False)
    folder.save(5, b"five")

    def slow(path: Path) -> str:
        if "000005" in path.name:  # the run goes on while this one is about to be opened
            path.unlink()
            folder.save(6, b"six")
            raise CheckpointError(f"{path}: No such file or directory")
        return read(path)

    warnings: list[str] = []
    assert latest(folder.path, slow, warnings.append) == "six"
    assert warnings == []


def test_later_saves_are_forgotten_with_their_records(tmp_path):
    folder = RunFolder(tmp_path / "run", resume=False)
    for step in (5, 12):
        folder.save(step, b"x")
        folder.append({"kind": "step", "step": step})
    folder.forget_after(5)
    assert [path.name for path in steps(folder.path)] == ["step-000000005.safetensors"]
    assert [record["step"] for record in records(folder.path)] == [5]


def test_only_what_a_checkpoint_is_blamed_for_is_passed_over(tmp_path):
    folder = RunFolder(tmp_path / "run", resume=False)
    folder.save(1, b"x")

    def buggy(path: Path) -> None:
        raise KeyError(path)

    with pytest.raises(KeyError):
        latest(folder.path, buggy, print)


def test_metrics_are_lines_of_json(tmp_path):
    folder = RunFolder(tmp_path / "run", resume=False)
    assert list(records(folder.path)) == []
    written = [{"kind": "step", "step": 1, "loss": 0.1 + 0.2}, {"kind": "epoch", "step": 2, "note": "ä\u2028b"}]
    for record in written:
        folder.append(record)
    assert list(records(folder.path)) == written
    assert [json.loads(line) for line in (folder.path / "metrics.jsonl").read_bytes().split(b"\n")[:-1]] == written


@pytest.mark.parametrize(
    "torn", ["", '{"kind": "step", "st', '{"kind": "step", "step": 5, "loss": 0.\udcff', "{", "\n\n"]
)
def test_forgetting_drops_later_steps_and_a_torn_last_line(tmp_path, torn):
    folder = RunFolder(tmp_path / "run", resume=False)
    for step in range(1, 6):
        folder.append({"kind": "step", "step": step, "loss": 1 / step})
    path = folder.path / "metrics.jsonl"
    before = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(before) + torn.encode(errors="surrogateescape"))
    folder.forget_after(3)
    assert path.read_bytes() == b"".join(before[:3])  # byte for byte
    folder.append({"kind": "step", "step": 4, "loss": 0.25})
    assert path.read_bytes() == b"".join(before[:4])
    assert not list(folder.path.glob(".*.tmp"))


def test_forgetting_where_nothing_is_written_yet(tmp_path):
    folder = RunFolder(tmp_path / "run", resume=False)
    folder.forget_after(0)
    assert list(records(folder.path)) == []


def test_two_runs_of_the_same_second_get_two_folders(monkeypatch, tmp_path):
    monkeypatch.setattr(time, "strftime", lambda _: "2026-01-02T03-04-05")
    made = [create(tmp_path / "runs", "digits") for _ in range(3)]
    assert [folder.path for folder in made] == [
        tmp_path / "runs" / "digits" / f"2026-01-02T03-04-05{end}" for end in ("", "-2", "-3")
    ]
    for folder in made:
        with pytest.raises(RunTakenError):
            RunFolder(folder.path, resume=True)


def test_a_folder_with_nothing_trained_is_taken_back_only_by_who_made_it(tmp_path):
    create(tmp_path / "runs", "digits").discard()
    assert names(tmp_path / "runs" / "digits") == []
    RunFolder(tmp_path / "new", resume=False).discard()
    assert not (tmp_path / "new").exists()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "notes.txt").touch()
    RunFolder(tmp_path / "old", resume=False).discard()
    assert (tmp_path / "old" / "notes.txt").exists()
    RunFolder(tmp_path / "old", resume=False).close()  # nobody holds it


def test_leaving_a_taken_folder_leaves_it_as_it_was(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("x: 1\n")
    with pytest.raises(RunTakenError):
        RunFolder(tmp_path / "run", resume=False)
    assert (tmp_path / "run" / "config.yaml").read_text() == "x: 1\n"
    assert rundir.KEPT == 2
