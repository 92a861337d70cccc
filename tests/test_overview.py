"""`dltrain list FOLDER`: which folders are runs, how each stands, and that looking changes nothing."""

from __future__ import annotations

import json
import os
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import Run

from dltrain import overview, rundir, tables
from dltrain.rundir import RunFolder

CONFIG = """
name: x
seed: 4
data: {name: digits, val: 60}
model: perceptron
optim: {name: sgd, lr: 0.1}
train: {epochs: 3, device: cpu, precision: fp32}
tensorboard: {pictures: false, filters: false, pr_curves: false}
"""


def epoch(number: int, accuracy: float) -> str:
    val = {"loss": 1 - accuracy, "accuracy": accuracy}
    return json.dumps({"kind": "epoch", "step": 10 * number, "epoch": number, "train": val, "val": val, "seconds": 1.0})


def run_folder(path: str, *records: str, saved: bool = True, summary: Any = None) -> Path:
    folder = Path(path)
    (folder / "checkpoints").mkdir(parents=True)
    (folder / ".lock").touch()
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "metrics.jsonl").write_text("".join(f"{record}\n" for record in records))
    if saved:
        (folder / "checkpoints/step-000000010.safetensors").write_bytes(b"weights")
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def rows(dltrain: Run, folder: str = "runs") -> dict[str, Any]:
    done = dltrain("list", folder, "--json")
    assert done.code == 0, done.err
    return {row["below"]: row for row in json.loads(done.out)}


def state(row: Any) -> tuple[str, int | None, Any]:
    return row["state"], row["epochs"], row["best"] and row["best"]["value"]


def test_the_state_of_runs_that_train_made(dltrain: Run) -> None:
    Path("x.yaml").write_text(CONFIG)
    assert dltrain("train", "x.yaml", "--out", "runs/done", "-q").code == 0
    diverged = ("--set", "optim.lr=1e30", "--set", "model={name: mlp, hidden: [16]}")
    assert dltrain("train", "x.yaml", "--out", "runs/diverged", "-q", *diverged).code == 7
    found = rows(dltrain)
    summary = json.loads(Path("runs/done/summary.json").read_text())
    done = found["done"]
    assert state(done) == ("finished", 3, summary["val"]["accuracy"])
    assert (done["run"], done["config"], done["seed"], done["of_epochs"]) == ("runs/done", "x", 4, 3)
    assert (done["best"]["split"], done["best"]["score"], done["reason"]) == ("val", "accuracy", None)
    assert found["diverged"]["state"] == "failed"


def test_stopped_running_and_failed_are_told_apart(dltrain: Run) -> None:
    epochs = [epoch(1, 0.5), epoch(2, 0.75), json.dumps({"kind": "step", "step": 25, "loss": 1.0})]
    run_folder("runs/stopped", *epochs)
    run_folder("runs/unsaved", epoch(1, 0.5), saved=False)
    run_folder("runs/failed", *epochs, json.dumps({"kind": "failed", "step": 25, "error": "the loss is nan"}))
    run_folder("runs/on_again", json.dumps({"kind": "failed", "step": 5, "error": "the loss is nan"}), *epochs)
    with closing(RunFolder(run_folder("runs/held", *epochs), resume=True)):
        with closing(RunFolder(Path("runs/new"), resume=False)):
            found = rows(dltrain)
        assert state(found["new"]) == ("running", 0, None)
        assert found["new"]["config"] is None
        Path("runs/held/summary.json").write_text('{"val": {"accuracy": 0.9}, "epochs": 3}')
        assert rows(dltrain)["held"]["state"] == "running"  # it has written its results, and is drawing pictures
        Path("runs/held/summary.json").unlink()
    assert state(found["held"]) == ("running", 2, 0.75)
    assert state(found["stopped"]) == state(found["on_again"]) == ("stopped", 2, 0.75)
    assert state(found["failed"]) == ("failed", 2, 0.75)
    assert found["failed"]["reason"] == "the loss is nan"
    assert state(found["unsaved"]) == ("failed", 1, 0.5)
    assert found["unsaved"]["reason"] == "ended before anything was saved"
    assert state(rows(dltrain)["held"]) == ("stopped", 2, 0.75)


@pytest.mark.parametrize(
    ("val", "test", "split", "value"),
    [
        ({"loss": 0.1, "accuracy": 0.9}, {"loss": 0.2, "accuracy": 0.8}, "val", 0.9),
        (None, {"loss": 0.2, "accuracy": 0.8}, "test", 0.8),
        (None, {"loss": 0.2}, "test", 0.2),
        (None, {"loss": 0.2, "psnr": 21.5}, "test", 21.5),
    ],
)
def test_the_best_is_vals_else_tests(dltrain: Run, val: Any, test: Any, split: str, value: float) -> None:
    run_folder("runs/a", summary={"val": val, "test": test, "epochs": 3})
    best = rows(dltrain)["a"]["best"]
    assert (best["split"], best["value"]) == (split, value)


def test_the_best_loss_is_the_lowest(dltrain: Run) -> None:
    losses = [json.dumps({"kind": "epoch", "step": each, "epoch": each, "val": {"loss": 4 - each}}) for each in (1, 2)]
    run_folder("runs/a", *losses)
    assert rows(dltrain)["a"]["best"] == {"split": "val", "score": "loss", "value": 2}


def test_the_last_written_stands_last_with_its_age(dltrain: Run) -> None:
    now = time.time()
    for name, ago in (("new", 5), ("old", 7200), ("between", 100)):
        for each in [run_folder(f"runs/{name}"), *Path(f"runs/{name}").rglob("*")]:
            os.utime(each, (now - ago, now - ago))
        (Path("runs") / name / ".lock").touch()  # which looking at it may do
    done = dltrain("list", "runs")
    lines = [line.split() for line in done.out.splitlines() if line.strip() and line.startswith(" ")]
    assert [line[0] for line in lines[-3:]] == ["old", "between", "new"]
    found = rows(dltrain)
    assert found["old"]["age_seconds"] == pytest.approx(7200, abs=60)
    assert found["new"]["age_seconds"] < 60
    assert "dltrain train --resume runs/new" in done.out


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (60, "1 min"), (7199, "1 h"), (9e5, "10 d")])
def test_ages_in_words(seconds: float, text: str) -> None:
    assert tables.age(seconds) == text


def test_folders_that_are_no_runs_are_not_listed(dltrain: Run) -> None:
    for name in ("configs", "weights/checkpoints", "logs", "runs/a/b"):
        Path(name).mkdir(parents=True)
    Path("configs/config.yaml").write_text(CONFIG)
    Path("logs/metrics.jsonl").write_text("")
    run_folder("runs/a/b/c")
    run_folder("runs/a/b/c/inner")
    run_folder("runs/a/b/c/checkpoints/odd")
    assert sorted(rows(dltrain, ".")) == ["runs/a/b/c", "runs/a/b/c/inner"]
    assert list(rows(dltrain, "runs/a/b/c")) == [".", "inner"]
    assert dltrain("list", "configs", "--json").out == "[]\n"
    done = dltrain("list", "configs")
    assert (done.code, done.out) == (0, "no runs below configs\n")


def snapshot(folder: Path) -> dict[str, Any]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in [folder, *folder.rglob("*")]}


def test_looking_changes_nothing(dltrain: Run) -> None:
    run_folder("runs/a", epoch(1, 0.5))
    (run_folder("runs/unlocked") / ".lock").unlink()
    before = snapshot(Path("runs"))
    assert dltrain("list", "runs").code == 0
    assert snapshot(Path("runs")) == before


def test_a_run_that_begins_while_it_is_looked_at_is_not_refused(tmp_path: Path) -> None:
    """Somebody else's look at the lock, held here for longer than any takes."""
    import fcntl

    path = tmp_path / "run"
    RunFolder(path, resume=False).close()
    with (path / ".lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        assert not rundir.is_held(path)  # two that look do not take each other for a run
        timer = threading.Timer(0.05, lambda: fcntl.flock(file, fcntl.LOCK_UN))
        timer.start()
        RunFolder(path, resume=True).close()
        timer.join()


def test_a_lock_that_is_held_is_seen(tmp_path: Path) -> None:
    assert not rundir.is_held(tmp_path)
    with closing(RunFolder(tmp_path, resume=False)):
        assert rundir.is_held(tmp_path)
        assert rundir.is_held(tmp_path)
    assert not rundir.is_held(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.yaml", "\x00"),
        ("config.yaml", "- a list"),
        ("config.yaml", "{name: [1], seed: .nan, train: 3}"),
        ("config.yaml", "{name: x, seed: yes, train: {epochs: many}, plugins: [mine.py]}"),
        ("summary.json", "["),
        ("summary.json", "[]"),
        ("summary.json", "{}"),
        ("summary.json", '{"val": 3, "test": {"accuracy": Infinity, "x": {}}, "epochs": "3"}'),
        ("summary.json", '{"val": {"accuracy": 1' + "0" * 400 + "}}"),
        ("summary.json", "[" * 100_000),
        ("metrics.jsonl", '{"step": 1}\n{"kind": 3, "step": 1}\n{"kind": "epoch", "step": 2, "val": [1]}\n{"ki'),
        ("metrics.jsonl", '{"kind": "failed", "step": 1}\n'),
        ("checkpoints", "a file"),
        (".lock", None),
        ("config.yaml", None),
        ("summary.json", None),
        ("metrics.jsonl", None),
    ],
)
def test_torn_and_foreign_files_never_end_the_list(
    dltrain: Run, monkeypatch: pytest.MonkeyPatch, name: str, content: str | None
) -> None:
    run_folder("runs/good", epoch(1, 0.5))
    folder = run_folder("runs/odd", epoch(1, 0.5), saved=False)
    (folder / name).rmdir() if name == "checkpoints" else (folder / name).unlink(missing_ok=True)
    if content is None:
        (folder / name).mkdir()
    else:
        (folder / name).write_text(content)
    found = rows(dltrain)
    assert state(found["good"]) == ("stopped", 1, 0.5)
    assert found["odd"]["state"] in ("finished", "failed")
    for columns in ("40", "120"):
        monkeypatch.setenv("COLUMNS", columns)
        assert dltrain("list", "runs").code == 0


def test_a_pipe_is_not_waited_for(dltrain: Run) -> None:
    for name in ("config.yaml", "summary.json", "metrics.jsonl", ".lock"):
        folder = run_folder(f"runs/{name}", epoch(1, 0.5))
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
    assert {row["state"] for row in rows(dltrain).values()} == {"stopped"}


def test_what_cannot_be_read_is_said(dltrain: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run_folder("runs/good")
    run_folder("runs/secret")
    held = rundir.is_held

    def closed(path: Path) -> bool:
        if path.name == "secret":
            raise PermissionError(13, "Permission denied", str(path / ".lock"))
        return held(path)

    monkeypatch.setattr(rundir, "is_held", closed)
    found = rows(dltrain)
    assert (found["secret"]["state"], found["good"]["state"]) == ("unknown", "stopped")
    assert found["secret"]["reason"] == "runs/secret/.lock: Permission denied"
    warned: list[str] = []
    monkeypatch.setattr(os, "scandir", lambda path: (_ for _ in ()).throw(PermissionError(13, "no", str(path))))
    assert overview.find(Path("runs"), warned.append) == []
    assert warned == ["runs: no: not looked into"]


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_the_table_keeps_to_the_terminal(dltrain: Run, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    run_folder("runs/cifar10_cnn/2026-11-25T10-00-00", epoch(1, 0.5))
    run_folder("runs/[bold]x", epoch(1, 0.5), saved=False)
    monkeypatch.setenv("COLUMNS", str(columns))
    out = dltrain("list", "runs").out
    tables = [line for line in out.splitlines() if line.startswith(" ")]
    assert max(map(len, tables)) <= columns
    assert "50.00 %" in out
    assert "[bold]x" in out
    assert ("1/3" in out, "config" in out) == (columns > 40, columns > 100)


def test_a_kind_of_component_goes_before_a_folder_of_its_name(dltrain: Run) -> None:
    run_folder("loss/a")
    assert "cross_entropy" in dltrain("list", "loss").out
    assert "stopped" in dltrain("list", "./loss").out
    done = dltrain("list", "runs")
    assert (done.code, done.err.count("\n")) == (2, 1)
    for arguments in (["loss", "--json"], ["./loss", "--markdown"]):
        done = dltrain("list", *arguments)
        assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
