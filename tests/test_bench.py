"""`dltrain bench`: what is run, what its numbers are, and how it ends."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from conftest import Run
from PIL import Image
from rich.console import Console

from dltrain import bench, board, figures, registry, runs, shipped, tables
from dltrain.errors import OutputError, Stopped

CONFIG = """
seed: 5
data: {name: synthetic, train: 120, test: 40, size: 16, channels: 1, class_count: 4, val: 20}
model: {name: mlp, hidden: [16]}
optim: {name: sgd, lr: 0.1}
descent: {batch_size: 25}
train: {epochs: 2, device: cpu}
tensorboard: {filters: false, pr_curves: false}
"""
OWN = ", train: 120, test: 40, size: 16, channels: 1, class_count: 4"  # of synthetic
FORWARD = 2 * (256 * 16 + 16 * 4)


@pytest.fixture(autouse=True)
def _no_pictures_for_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take half a second a run."""
    monkeypatch.setattr(board.Board, "end", lambda *given: None)


@pytest.fixture
def small(tmp_path: Path) -> str:
    (tmp_path / "small.yaml").write_text(CONFIG)
    return str(tmp_path / "small.yaml")


def row(seed: int, accuracy: float = 0.9, seconds: float = 1.0, **others: Any) -> dict[str, Any]:
    return {
        **{"seed": seed, "cold": seed == 0, "diverged": False, "accuracy": accuracy, "seconds": seconds},
        **{"training_seconds": seconds / 2, "images_per_second": 100.0, "val_seconds": None},
        **others,
    }


def test_each_seed_is_the_run_that_train_makes(dltrain: Run, small: str) -> None:
    found = json.loads(dltrain("bench", small, "--seeds", 2, "--out", "kept", "--json").out)
    (recipe,) = found["recipes"]
    assert [each["seed"] for each in recipe["runs"]] == [5, 6]
    for each in recipe["runs"]:
        dltrain("train", small, "--set", f"seed={each['seed']}", "--out", f"run{each['seed']}", "-q")
        alone = json.loads(Path(f"run{each['seed']}/summary.json").read_text())
        kept = json.loads(Path(f"kept/small/seed-{each['seed']}/summary.json").read_text())
        assert each["accuracy"] == kept["test"]["accuracy"]
        assert {split: kept[split] for split in ("train", "val", "test")} == {
            split: alone[split] for split in ("train", "val", "test")
        }
    assert (found["complete"], found["out"], found["target"]) == (True, "kept", None)


def test_the_first_seed_is_charged_with_the_start_and_the_arithmetic_follows(dltrain: Run, small: str) -> None:
    done = dltrain("bench", small, "--seeds", 3, "--set", "train.precision=fp32", "--json")
    found = json.loads(done.out)
    (recipe,) = found["recipes"]
    first, *later = recipe["runs"]
    assert [each["cold"] for each in recipe["runs"]] == [True, False, False]
    assert recipe["cold_seconds"] == first["seconds"] > found["start_up_seconds"] > 0
    assert recipe["warm_seconds"] == pytest.approx(sum(each["seconds"] for each in later) / 2)
    assert all(each["training_seconds"] < each["seconds"] for each in later)
    assert recipe["flops_per_image"] == FORWARD
    assert recipe["flops_per_second"] == pytest.approx(3 * FORWARD * recipe["images_per_second"])
    share = recipe["flops_per_second"] / recipe["matmul_flops_per_second"]
    assert recipe["share_of_matmul"] == pytest.approx(share)
    assert recipe["environment"]["arithmetic"] == "float32"
    assert recipe["hardware"]["memory"] == psutil.virtual_memory().total
    assert recipe["peak_memory"]["device"] is None
    assert not Path("runs").exists()
    assert [line.split(":")[0] for line in done.err.splitlines()] == [f"small, seed {seed}" for seed in (5, 6, 7)]


def test_the_data_is_read_once_a_recipe(dltrain: Run, small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entry, read = registry.find("synthetic", "data"), []

    def counting(*given: Any, **settings: Any) -> Any:
        read.append(settings["train"])
        return entry.factory(*given, **settings)

    monkeypatch.setitem(registry._entries["data"], "synthetic", dataclasses.replace(entry, factory=counting))
    Path("other.yaml").write_text(CONFIG.replace("train: 120", "train: 121"))
    assert dltrain("bench", small, "other.yaml", "--seeds", 2, "--set", "train.epochs=1").code == 0
    assert read == [120, 121]


def test_a_recipe_finds_the_process_as_it_would_alone(dltrain: Run, small: str) -> None:
    """Neither the plugins nor the algorithms of the recipes beside it are its own."""
    Path("mine.py").write_text(
        "from dltrain.registry import register\n\n"
        "@register('loss')\ndef mine(outputs, targets):\n    '''My own.'''\n    return outputs.square().mean()\n"
    )
    exact = CONFIG.replace("train: {epochs", "train: {deterministic: true, epochs")
    Path("exact.yaml").write_text(f"plugins: [mine.py]\nloss: mine\n{exact}")
    done = dltrain("bench", "exact.yaml", small, "--seeds", 1)
    assert done.code == 0, done.err
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_diverged_is_left_out_and_rates_are_of_the_warm() -> None:
    fast = row(1, 0.8, seconds=2, training_seconds=1, images_per_second=300)
    slow = row(2, 0.6, seconds=4, training_seconds=3, images_per_second=100)
    lost = {"seed": 3, "cold": False, "diverged": True}
    found = bench._together([row(0, 1.0, seconds=9), fast, slow, lost], None)
    assert (found["diverged"], found["to_target"]) == (1, None)
    assert found["accuracy"]["mean"] == pytest.approx(0.8)
    assert (found["cold_seconds"], found["warm_seconds"]) == (9, 3)
    assert found["images_per_second"] == pytest.approx((300 + 300) / 4)
    alone = bench._together([row(0, seconds=9)], None)
    assert (alone["cold_seconds"], alone["warm_seconds"], alone["images_per_second"]) == (9, None, 100)
    first_lost = bench._together([{**lost, "cold": True}, fast], None)
    assert (first_lost["cold_seconds"], first_lost["warm_seconds"]) == (None, 2)


def test_seconds_to_a_target_are_of_the_seeds_that_reach_it() -> None:
    rows = [row(0, 0.89, 9), row(1, 0.9, 2, val_seconds=0.5), row(2, 0.95, 5, val_seconds=1.5), row(3, 0.1, 7)]
    assert bench._together(rows, 0.9)["to_target"] == {
        **{"reached": 2, "cold_seconds": None, "warm_seconds": 3.5},
        **{"val_reached": 2, "val_seconds": 1.0},
    }
    assert bench._together(rows, 0.96)["to_target"] == {
        **{"reached": 0, "cold_seconds": None, "warm_seconds": None},
        **{"val_reached": 2, "val_seconds": 1.0},
    }


def test_seconds_to_a_target_on_val_are_those_of_the_epochs_up_to_it(tmp_path: Path) -> None:
    values = [(1.0, {"accuracy": 0.5}), (2.0, {"accuracy": 0.8}), (4.0, {"accuracy": 0.7}), (8.0, None)]
    records = [
        {"kind": "epoch", "step": step, "seconds": seconds, "val": val} for step, (seconds, val) in enumerate(values)
    ]
    lines = [{"kind": "step", "step": 0, "loss": 1.0}, *records]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert bench.val_seconds(tmp_path, 0.5) == 1
    assert bench.val_seconds(tmp_path, 0.7) == 3
    assert bench.val_seconds(tmp_path, 0.9) is None


@pytest.mark.parametrize(("target", "share"), [("0.01", 0.01), ("99", 0.99), ("1", 1.0)])
def test_a_target_is_a_share_or_per_cent(dltrain: Run, small: str, target: str, share: float) -> None:
    settings = ("--seeds", 1, "--set", "train.epochs=1", "--json")
    found = json.loads(dltrain("bench", small, "--target", target, *settings).out)
    assert found["target"] == share
    (recipe,) = found["recipes"]
    reached = recipe["runs"][0]["accuracy"] >= share
    assert recipe["to_target"]["reached"] == int(reached)
    assert recipe["to_target"]["cold_seconds"] == (recipe["cold_seconds"] if reached else None)


@pytest.mark.parametrize("as_json", [True, False])
def test_seeds_that_diverge_are_reported_and_end_in_7(dltrain: Run, small: str, as_json: bool) -> None:
    done = dltrain("bench", small, "--seeds", 2, "--set", "optim.lr=1e30", *(["--json"] if as_json else []))
    assert done.code == 7
    error = done.err.splitlines()[-1]
    assert error.startswith("error: small with seed 5, small with seed 6 diverged: ")
    assert f"dltrain train {small} --set optim.lr=1e30 --set seed=5 says where" in error
    if as_json:
        (recipe,) = json.loads(done.out)["recipes"]
        assert (recipe["diverged"], recipe["accuracy"], recipe["share_of_matmul"]) == (2, None, None)
    else:
        assert "2, 2 diverged" in done.out


def stopping_at(seed: int, error: BaseException) -> Callable[..., dict[str, Any]]:
    start = runs.start

    def run(config: Any, *given: Any, **settings: Any) -> dict[str, Any]:
        if config.seed == seed:
            raise error
        return start(config, *given, **settings)

    return run


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "stopped in seed 6 of small: only the seeds before it are reported"),
        (Stopped("saved", signal.SIGTERM), 143, "stopped in seed 6 of small: only the seeds before it are reported"),
        (OutputError("disk: full"), 6, "error: disk: full"),
    ],
    ids=["ctrl-c", "sigterm", "error"],
)
def test_what_ends_a_bench_early_reports_the_seeds_before_it(
    dltrain: Run, small: str, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, said: str
) -> None:
    monkeypatch.setattr(runs, "start", stopping_at(6, error))
    Path("never.yaml").write_text(CONFIG.replace("seed: 5", "seed: 50"))
    done = dltrain("bench", small, "never.yaml", "--json")
    assert (done.code, done.err.splitlines()[-1]) == (code, said)
    found = json.loads(done.out)
    assert found["complete"] is False
    assert [[each["seed"] for each in recipe["runs"]] for recipe in found["recipes"]] == [[5]]


def test_what_ends_the_first_seed_leaves_nothing_to_report(
    dltrain: Run, small: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "start", stopping_at(5, KeyboardInterrupt()))
    done = dltrain("bench", small, "--json")
    assert (done.code, done.out, len(done.err.splitlines())) == (130, "", 1)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["small.yaml", "mnist_mpl"], 2, "did you mean 'mnist_mlp'?"),
        (["small.yaml", "small.yaml"], 2, "small.yaml is called small too"),
        (["small.yaml", "--set", "optim.rl=1"], 2, "optim.rl"),
        (["small.yaml", "--seeds", "0"], 2, "--seeds"),
        (["small.yaml", "--target", "0"], 2, "--target 0: expected"),
        (["small.yaml", "--target", "101"], 2, "--target 101: expected"),
        (["small.yaml", "--target", "nan"], 2, "--target nan: expected"),
        (["small.yaml", "--picture", "here.jpg"], 2, "ends in .png"),
        (["small.yaml", "--picture", "no/here.png"], 6, "there is no folder no"),
        (["small.yaml", "mnist_mlp"], 3, "`dltrain data get mnist`"),
        (["small.yaml", "--device", "cuda:99"], 5, "cuda:99"),
        (["small.yaml", "elsewhere.yaml"], 5, "cuda:99"),
        (["small.yaml", "--set", "evaluate.test=false"], 2, "evaluate.test: expected true"),
        (["small.yaml", "--out", "taken"], 8, "taken/small: is there already"),
    ],
    ids=lambda given: " ".join(given[1:]) if isinstance(given, list) else "",
)
def test_what_cannot_be_run_is_refused_before_anything_is(
    dltrain: Run, small: str, arguments: list[str], code: int, words: str
) -> None:
    Path("taken/small").mkdir(parents=True)
    Path("elsewhere.yaml").write_text(CONFIG.replace("device: cpu", "device: 'cuda:99'"))
    done = dltrain("bench", *arguments)
    assert (done.code, done.out, len(done.err.splitlines())) == (code, "", 1)
    assert words in done.err


def test_without_names_the_fast_recipes_whose_data_is_here_are_run(
    dltrain: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    (recipes / "mnist_speed.yaml").write_text(CONFIG.replace("name: synthetic", "name: mnist").replace(OWN, ""))
    (recipes / "plain.yaml").write_text(CONFIG)
    monkeypatch.setattr(shipped, "folder", lambda: recipes)
    nothing = dltrain("bench")
    assert (nothing.code, len(nothing.err.splitlines())) == (3, 1)
    (recipes / "small_speed.yaml").write_text(CONFIG)
    done = dltrain("bench", "--seeds", 1, "--json")
    assert [recipe["recipe"] for recipe in json.loads(done.out)["recipes"]] == ["small_speed"]
    (left_out,) = (line for line in done.err.splitlines() if "left out" in line)
    assert left_out.startswith(f"mnist_speed is left out: its data is absent in {tmp_path / 'data'}")
    assert "`dltrain data get mnist`" in left_out


def found_of(*accuracies: list[float], target: float | None = None) -> dict[str, Any]:
    """What a bench finds, of made-up seeds for each recipe."""
    recipes = []
    for number, values in enumerate(accuracies):
        rows = [row(seed, value, seconds=40.0 - seed) for seed, value in enumerate(values)]
        recipe = {"recipe": f"recipe_{number}", **bench._together(rows, target)}
        recipe |= {"flops_per_image": 1e9, "flops_per_second": 2.5e12, "share_of_matmul": 0.456}
        recipe |= {"peak_memory": {"process": 2e9, "device": None}, "runs": rows}
        recipe["hardware"] = {"device": "cpu", "name": "Processor", "memory": 16e9, "threads": 2}
        recipe["environment"] = {"torch": "2.15.0", "precision": "bf16 (asked for)"}
        recipes.append(recipe)
    return {"target": target, "start_up_seconds": 1.5, "recipes": recipes, "out": None, "picture": None}


def shown(found: dict[str, Any], width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    tables.bench(found, console)
    return console.file.getvalue().splitlines()


@pytest.mark.parametrize(("width", "beside"), [(80, 3), (40, 1)])
def test_the_table_has_as_many_recipes_beside_each_other_as_fit(width: int, beside: int) -> None:
    lines = shown(found_of([0.9, 0.92, 0.94], [0.5], [0.1, 0.2], [1.0, 1.0, 1.0], target=0.915), width)
    assert max(map(len, lines)) <= width
    heads = [line.split() for line in lines if "recipe_" in line]
    assert [len(head) for head in heads] == ([3, 1] if beside == 3 else [1, 1, 1, 1])
    assert [name for head in heads for name in head] == [f"recipe_{number}" for number in range(4)]
    first = [line.split() for line in lines[: len(lines) // len(heads)]]
    values = {" ".join(line[:2]): line[2:] for line in first if len(line) > 2}
    assert values["seconds, cold"][0] == "40"
    assert values["seconds, warm"][0] == "38.5"
    assert values["seeds with"][:5] == ["91.5", "%", "2", "of", "3"]
    assert ["accuracy", "92.00", "±", "4.97", "%"] in [line[:5] for line in first]  # 4.302653 * 2 / sqrt(3)
    assert ["TFLOP/s", "2.5"] in [line[:2] for line in first]
    assert "45.6" in next(line for line in first if line[:3] == ["of", "matrix", "product"])
    assert len([line for line in lines if "Processor" in line]) == 1  # the same for all


def test_the_picture_has_a_panel_and_a_colour_for_each_recipe() -> None:
    one = drawn(found_of([0.9]))
    four = drawn(found_of([0.9, 0.92], [0.5, 0.6], [0.1, 0.2], [1.0, 1.0]))
    assert (four.shape[0] / one.shape[0], four.shape[1]) == (2, round(3 * 4.2 * 120))
    colours = [(31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40)]  # matplotlib's C0 to C3
    assert [count(one, colour) > 0 for colour in colours] == [True, False, False, False]
    assert all(count(four, colour) > 0 for colour in colours)


def test_the_first_seed_is_hollow_and_a_target_is_a_line() -> None:
    blue = (31, 119, 180)
    cold, warm = found_of([0.9]), found_of([0.9])
    warm["recipes"][0]["runs"][0]["cold"] = False
    assert count(drawn(warm), blue) > count(drawn(cold), blue)
    plain, aimed = (gray_rows(drawn(found_of([0.9], target=target))) for target in (None, 0.5))
    assert aimed == plain + 1


def gray_rows(pixels: np.ndarray[Any, Any]) -> int:
    """Rows with a long gray line in them; one that is two pixels wide counts once."""
    gray = (np.ptp(pixels.astype(int), -1) == 0) & (pixels[..., 0] > 50) & (pixels[..., 0] < 220)
    long = gray.sum(1) > 150
    return int((long[1:] > long[:-1]).sum())


def drawn(found: dict[str, Any]) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(figures.bench(found))).convert("RGB"))


def count(pixels: np.ndarray[Any, Any], colour: tuple[int, int, int]) -> int:
    return int((pixels == colour).all(-1).sum())


def test_the_picture_is_written_and_named(dltrain: Run, small: str) -> None:
    done = dltrain("bench", small, "--seeds", 1, "--picture", "here.png", "--out", "kept")
    assert done.code == 0
    assert Path("here.png").read_bytes()[:4] == b"\x89PNG"
    assert done.out.splitlines()[-2:] == ["runs: kept", "picture: here.png"]


def test_the_age_of_a_process_is_what_the_system_says() -> None:
    assert bench.process_age() == pytest.approx(time.time() - psutil.Process().create_time(), abs=1.1)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="elsewhere a process keeps its peak")
def test_the_peak_of_memory_is_that_of_the_recipe() -> None:
    cpu = torch.device("cpu")
    bench._forget_peak_memory(cpu)
    before = bench._peak_memory(cpu)["process"]
    held = b"x" * 300_000_000
    assert bench._peak_memory(cpu)["process"] > before + 0.9 * len(held)
    del held
    bench._forget_peak_memory(cpu)
    assert bench._peak_memory(cpu)["process"] < before + 100_000_000
    assert before > 1e7  # bytes
