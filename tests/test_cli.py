"""The commands as a user types them: what they print, where, and the exit code."""

from __future__ import annotations

import csv
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from data_files import write_cifar100, write_mnist

from dltrain import checkpoint, cli, rundir, shipped

SMALL = ["digits_mlp", "--set", "train.epochs=2", "--set", "data.limit=300"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert cli.run(["train", *SMALL, "--out", str(folder), "-q"]) == 0
    return folder


def test_training_ends_with_results_the_folder_and_what_to_type_next(dltrain: Run) -> None:
    done = dltrain("train", *SMALL)
    assert done.code == 0
    (folder,) = Path("runs/digits_mlp").iterdir()
    lines = done.out.splitlines()
    assert [line.split()[0] for line in lines if line.strip().startswith(("train ", "val ", "test "))] == [
        "train",
        "val",
        "test",
    ]
    assert f"run: {folder}" in lines
    assert f"next: dltrain eval {folder}" in lines
    assert "      tensorboard --logdir runs" in lines
    assert len([line for line in lines if line.startswith("epoch ")]) == 2
    assert "\x1b" not in done.out  # no terminal: no colours, no bar


def test_json_is_all_of_stdout(dltrain: Run) -> None:
    done = dltrain("train", *SMALL, "--json", "--out", "run")
    summary = json.loads(done.out)
    assert summary["run"] == "run"
    assert summary["config"] == "digits_mlp"
    assert (summary["epochs"], summary["steps"]) == (2, 18)  # 270 images in batches of 32
    assert summary["chosen_by"] == "val_loss"
    assert summary["images_per_second"] == pytest.approx(270 / summary["seconds_per_epoch"], rel=0.01)
    assert summary["seconds"] == pytest.approx(2 * summary["seconds_per_epoch"], abs=1e-3)
    for split in ("train", "val", "test"):
        assert set(summary[split]) == {"loss", "accuracy"}
    assert summary == json.loads(Path("run/summary.json").read_text())
    assert "epoch" in done.err


def test_without_val_the_last_weights_are_kept_and_val_is_null(dltrain: Run) -> None:
    settings = ("--set", "data.val=0", "--set", "train.choose_by=last")
    summary = json.loads(dltrain("train", *SMALL, *settings, "--json", "-q", "--out", "run").out)
    assert (summary["val"], summary["chosen_by"], summary["chosen_epoch"]) == (None, "last", 2)
    last, best = (checkpoint.read(path)[0] for path in (rundir.steps(Path("run"))[0], Path("run/best.safetensors")))
    assert best
    assert all(torch.equal(last[name], tensor) for name, tensor in best.items())
    assert json.loads(dltrain("eval", "run", "--json").out)["loss"] == summary["test"]["loss"]
    refused = dltrain("eval", "run", "--split", "val")
    assert (refused.code, len(refused.err.splitlines())) == (2, 1)


def test_quiet_prints_the_result_alone(dltrain: Run) -> None:
    done = dltrain("train", *SMALL, "--quiet")
    assert "epoch 1/2" not in done.out
    assert done.out.split()[:3] == ["split", "loss", "accuracy"]
    assert done.err == ""


def test_a_dry_run_shows_the_layers_and_keeps_nothing(dltrain: Run) -> None:
    done = dltrain("train", "digits_mlp", "--dry-run", "--json", "--set", "model.batchnorm=false")
    found = json.loads(done.out)
    assert found["parameters"] == sum(row["parameters"] for row in found["layers"])
    linear = [row for row in found["layers"] if row["kind"] == "Linear"]
    widths = [64, *(row["output"][0] for row in linear)]
    assert [row["parameters"] for row in linear] == [(a + 1) * b for a, b in itertools.pairwise(widths)]
    assert [row["flops"] for row in linear] == [2 * a * b for a, b in itertools.pairwise(widths)]
    assert found["flops_per_image"] == sum(row["flops"] for row in linear)
    assert found["memory"]["weights"] == found["memory"]["gradients"] == 4 * found["parameters"]
    assert found["memory"]["total"] == sum(size for name, size in found["memory"].items() if name != "total")
    assert found["expected_loss"] == pytest.approx(2.302585)
    assert found["first_loss_ok"] is True
    assert list(Path().iterdir()) == []
    table = dltrain("train", "digits_mlp", "--dry-run", "--set", "model.batchnorm=false").out
    assert f"{found['parameters']:,}" in table
    assert f"{found['first_loss']:.4f}" in table


def test_a_first_loss_that_is_off_is_said(dltrain: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.nn.Linear, "reset_parameters", lambda self: torch.nn.init.normal_(self.weight, std=3))
    done = dltrain("train", "digits_mlp", "--dry-run")
    assert "look at initialisation and normalisation" in done.out


def test_eval_scores_every_split(dltrain: Run, trained: Path) -> None:
    summary = json.loads((trained / "summary.json").read_text())
    for split in ("train", "val", "test"):
        scores = json.loads(dltrain("eval", trained, "--split", split, "--json").out)
        assert (scores["loss"], scores["split"]) == (summary[split]["loss"], split)
        assert scores["accuracy"] == pytest.approx(summary[split]["accuracy"])
        right = sum(scores["confusion_matrix"][k][k] for k in range(10))
        assert right / scores["images"] == scores["accuracy"]
    table = dltrain("eval", trained).out
    assert f"{100 * scores['accuracy']:.2f} %" in table
    assert "type II error" in table


def test_eval_writes_a_row_an_image(dltrain: Run, trained: Path) -> None:
    done = dltrain("eval", trained / "best.safetensors", "--out", "rows.csv", "--json")
    scores = json.loads(done.out)
    rows = list(csv.DictReader(Path("rows.csv").read_text().splitlines()))
    assert len(rows) == scores["images"] == 359
    assert sum(int(row["correct"]) for row in rows) / 359 == scores["accuracy"]
    for row in rows:
        shares = {name: float(row[f"p_{name}"]) for name in map(str, range(10))}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-4)
        assert max(shares, key=lambda name: shares[name]) == row["predicted"]
        assert (row["true"] == row["predicted"]) == (row["correct"] == "1")


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["train", "digits_mpl"], 2, "did you mean 'digits_mlp'?"),
        (["train", "digits_mlp", "--set", "optim.lrr=1"], 2, "did you mean 'lr'?"),
        (["train", "digits_mlp", "--set", "optim"], 2, "expected key=value"),
        (["train", "digits_mlp", "--device", "cuda:99"], 5, "check-gpu"),
        (["train", "digits_mlp", "--device", "gpu"], 2, "expected auto, cpu, mps, cuda or cuda:N"),
        (["train", "digits_mlp", "--allow-inexact"], 2, "--resume"),
        (["train", "digits_mlp", "--resume"], 2, "expected a run's folder"),
        (["train", "digits_mlp", "--resume", "--dry-run"], 2, "give one of them"),
        (["train", "digits_mlp", "--nonsense"], 2, "--nonsense"),
        (["train"], 2, "CONFIG"),
        (["train", "x" * 5000], 2, "name too long"),
        (["train", "digits_mlp", "-q", "--set", "model.hidden=[999999999999999999]"], 2, "model mlp"),
        (["trian", "digits_mlp"], 2, "train"),
        (["train", "digits_mlp", "-q", "--set", "data={name: mnist, root: nowhere, val: 10}"], 3, "digits_mlp.yaml"),
        (["eval", "nowhere"], 4, "nowhere"),
        (["eval", "."], 4, "no checkpoint"),
        (["eval", "{run}", "--split", "dev"], 2, "expected train, val or test"),
        (["eval", "{run}", "--out", "no/such/folder.csv"], 6, "no/such"),
        (["eval", "{run}", "--device", "cuda:99"], 5, "check-gpu"),
        (["data", "get", "nmist"], 2, "did you mean 'mnist'?"),
        (["data", "verify", "mnist"], 3, "train-images"),
        (["config", "show", "digits_mpl"], 2, "did you mean"),
        (["list", "modell"], 2, "did you mean 'model'?"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_a_code(
    dltrain: Run, trained: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, expected: str
) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # where nobody listens: no network
    done = dltrain(*(argument.replace("{run}", str(trained)) for argument in arguments))
    assert done.code == code, done.err
    assert expected in done.err
    assert done.out == ""
    assert len(done.err.strip().splitlines()) == 1


def test_a_missing_data_set_says_what_was_tried(dltrain: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    done = dltrain("train", "mnist_mlp")
    assert done.code == 3
    line = done.err.splitlines()[-1]
    for part in ("train-images-idx3-ubyte", "https://", "data.root", "DLTRAIN_DATA", "digits_mlp.yaml"):
        assert part in line
    assert not Path("runs/mnist_mlp").exists() or not list(Path("runs/mnist_mlp").iterdir())


def test_small_files_in_the_publishers_layouts(dltrain: Run, tmp_path: Path) -> None:
    write_cifar100(tmp_path / "data", 60, 20)
    config = Path("small.yaml")
    config.write_text(
        "data: {name: cifar100, labels: coarse, verify: false, val: 10, augment: [flip, {translate: 4}, {cutout: 8}]}\n"
        "model: {name: cnn, layers: [{conv: {out: 4, stride: 2}}, batchnorm, relu, globalpool, {linear: classes}]}\n"
        "optim: adam\ndescent: {batch_size: 16}\ntrain: {epochs: 1}\n"
    )
    done = dltrain("train", config, "--json", "--out", "run")
    assert done.code == 0, done.err
    assert json.loads(done.out)["data_verified"] is False
    assert "not the published file" in done.err
    assert len(json.loads(dltrain("eval", "run", "--json").out)["per_class"]) == 20


def test_data_commands(dltrain: Run, tmp_path: Path) -> None:
    rows = {row["name"]: row for row in json.loads(dltrain("data", "list", "--json").out)}
    assert rows["digits"]["state"] == "embedded"
    assert rows["mnist"]["state"] == "absent"
    write_mnist(tmp_path / "elsewhere", 20, 10)
    rows = {row["name"]: row for row in json.loads(dltrain("data", "list", "--json", "--data-root", "elsewhere").out)}
    assert rows["mnist"]["state"] == "present"
    refused = dltrain("data", "verify", "mnist", "--data-root", "elsewhere")
    assert (refused.code, len(refused.err.splitlines())) == (3, 1)
    assert "SHA-256" in refused.err
    assert dltrain("data", "verify", "digits").code == 0


@pytest.mark.parametrize("columns", ["100", "40"])
@pytest.mark.parametrize(
    "arguments",
    [["eval", "{run}"], ["config", "list"], ["data", "list"], ["train", "digits_mlp", "--dry-run"], ["list", "loss"]],
)
def test_tables_keep_to_the_terminal(
    dltrain: Run, trained: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    done = dltrain(*(argument.replace("{run}", str(trained)) for argument in arguments))
    assert done.code == 0
    tables = [line for line in done.out.splitlines() if line.startswith(" ")]
    assert tables
    assert max(map(len, tables)) <= int(columns)


def command(*arguments: object, **settings: Any) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "dltrain", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **settings,
    )  # fmt: skip


def test_a_reader_that_goes_away_does_not_stop_a_run(tmp_path: Path) -> None:
    process = command("train", *SMALL, "--out", "run", cwd=tmp_path)
    assert process.stdout
    assert process.stderr
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 0
    assert (tmp_path / "run/summary.json").exists()


def test_no_command_is_answered_by_the_help(dltrain: Run) -> None:
    done = dltrain()
    assert (done.code, done.err) == (2, "")
    assert "check-gpu" in done.out


def test_the_help_needs_no_torch() -> None:
    code = "import sys; from dltrain import cli; assert cli.run(['--help']) == 0; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "check-gpu" in done.stdout


def test_ctrl_c_twice_leaves_at_once(tmp_path: Path) -> None:
    """The first is answered after the step; a step that takes long can be left by the second."""
    code = (
        "import os, signal, sys, time; from dltrain import cli, step\n"
        "def slow(parameters): print('slow', file=sys.stderr, flush=True); time.sleep(60)\n"
        "step._gradient_norm = slow\nsys.exit(cli.run(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "train", *SMALL, "--out", "run", "-q"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr
    assert process.stderr.readline() == "slow\n"
    start = time.monotonic()
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)  # two at the same moment are one to the kernel
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert time.monotonic() - start < 30
    assert "Traceback" not in process.stderr.read()


def test_shipped_configs_are_found_by_name_from_anywhere(dltrain: Run) -> None:
    assert {"digits_mlp", "mnist_mlp", "cifar10_cnn"} <= set(shipped.names())
    for name in shipped.names():
        assert dltrain("config", "check", name).code == 0
    shown = " ".join(dltrain("config", "list").out.split())
    assert all(name in shown for name in shipped.names())


def test_a_stdout_that_is_full_is_an_output_error(trained: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "dltrain", "eval", str(trained), "--json"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 6
    assert done.stderr.splitlines()[-1].startswith("error: standard output: No space left on device")


def test_a_steps_checkpoint_says_that_it_is_the_last(dltrain: Run, trained: Path) -> None:
    (step,) = (trained / "checkpoints").glob("*.safetensors")
    assert json.loads(dltrain("eval", step, "--json").out)["chosen_by"] == "last"
    assert json.loads(dltrain("eval", trained, "--json").out)["chosen_by"] == "val_loss"


def test_a_colourless_terminal_is_honoured(tmp_path: Path) -> None:
    environment = {**os.environ, "NO_COLOR": "1", "COLUMNS": "80"}
    process = command("config", "list", cwd=tmp_path, env=environment)
    out, _ = process.communicate()
    assert "\x1b" not in out
