"""`dltrain train --seeds`: that each seed is the run it would be alone, what all say together, and how it goes on."""

from __future__ import annotations

import json
import re
import signal
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run

from dltrain import batched, board, build, checkpoint, compiling, rundir, runs, ways, yamlfile
from dltrain import config as configs
from dltrain.batched import Stack
from dltrain.statistics import difference

# augmentation, dropout, batch norm, Adam, an uneven last step
CONFIG = """
seed: 5
data: {name: digits, val: 60, limit: 200, augment: [{translate: 1}]}
model: {name: mlp, hidden: [16], batchnorm: true, dropout: 0.1}
optim: {name: adam, lr: 3.0e-3}
descent: {batch_size: 48}
train: {epochs: 2, device: cpu, precision: fp32, compile: "off", clip_norm: 1.0, log_every_steps: 1}
tensorboard: {pictures: false, filters: false, pr_curves: false}
"""
SEEDS = (5, 6, 7)
MUON = "{name: muon, lr: 0.02, groups: [{ndim: 1, name: sgd, lr: 0.1}]}"


@pytest.fixture(autouse=True)
def _small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard's pictures take half a second a run."""
    monkeypatch.setattr(board.Board, "end", lambda *given: None)
    (tmp_path / "small.yaml").write_text(CONFIG)


def end(run: str | Path) -> dict[str, torch.Tensor]:
    """The tensors of a run's last checkpoint."""
    return checkpoint.read(rundir.steps(Path(run))[0])[0]


def same(one: str | Path, other: str | Path) -> bool:
    """Whether two runs have the same log and ended in the same bits; which clocks they read aside."""

    def told(run: str | Path) -> list[dict[str, Any]]:
        clocks = {"seconds", "images_per_second"}
        return [{key: each[key] for key in each.keys() - clocks} for each in rundir.records(Path(run))]

    first, second = end(one), end(other)
    tensors = first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    return tensors and told(one) == told(other)


def stop_in(monkeypatch: pytest.MonkeyPatch, run: str, number: signal.Signals, step: int = 2) -> None:
    """Has a signal arrive where that run has logged that step, once."""
    append = rundir.RunFolder.append
    sent: list[int] = []

    def receive(self: rundir.RunFolder, record: dict[str, Any]) -> None:
        append(self, record)
        if not sent and self.path.name == run and record["step"] == step:
            sent.append(step)
            signal.raise_signal(number)

    monkeypatch.setattr(rundir.RunFolder, "append", receive)


def test_each_seed_ends_in_the_bits_of_a_run_of_its_own(dltrain: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """In turn; and by several processes, which are stopped on the way and started again."""
    longer = ("--set", "train.epochs=20")
    for seed in SEEDS:
        assert dltrain("train", "small.yaml", "--set", f"seed={seed}", *longer, "--out", f"alone-{seed}").code == 0
    done = dltrain("train", "small.yaml", "--seeds", 3, "--how", "in-turn", "--out", "in-turn", *longer, "--json")
    assert (done.code, done.err.count("test accuracy")) == (0, 3)

    read = rundir.read_summary
    begun = Path("processes/seed-5/metrics.jsonl")

    def stopping(path: Path) -> dict[str, Any] | None:
        if begun.exists():
            patch.undo()
            signal.raise_signal(signal.SIGTERM)
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(rundir, "read_summary", stopping)
        stopped = dltrain("train", "small.yaml", "--seeds", 3, "--how", "processes", "--out", "processes", *longer)
    assert (stopped.code, stopped.err) == (143, "stopped, and saved; go on with: dltrain train --resume processes\n")
    assert rundir.read_summary(Path("processes/seed-7")) is None
    assert dltrain("train", "--resume", "processes", "--json").code == 0

    for how in ("in-turn", "processes"):
        found = json.loads((Path(how) / "seeds.json").read_text())
        assert [row["seed"] for row in found["rows"]] == list(SEEDS)
        for row in found["rows"]:
            assert row["run"] == f"{how}/seed-{row['seed']}"
            assert yamlfile.read(Path(row["run"]) / "config.yaml").data["seed"] == row["seed"]
            assert same(row["run"], f"alone-{row['seed']}"), how
    assert json.loads(done.out) == json.loads(Path("in-turn/seeds.json").read_text())
    values = [row["test"]["accuracy"] for row in found["rows"]]
    assert len(set(values)) > 1
    accuracy = found["scores"]["test"]["accuracy"]
    assert accuracy["mean"] == pytest.approx(sum(values) / 3)
    assert accuracy["std"] == pytest.approx(statistics.stdev(values))
    assert accuracy["half_width"] == pytest.approx(4.302653 * statistics.stdev(values) / 3**0.5)  # t of 2 degrees
    assert set(found["scores"]) == {"train", "val", "test"}
    assert found["complete"]


def test_batched_seeds_compute_what_each_does_alone(dltrain: Run) -> None:
    """Every step of every seed, with clipping, batch norm, augmentation, averages, and three parts of each step."""
    settings = ("model.dropout=0", "descent.micro_batch_size=20", "train.average=ema", "tensorboard.layers=true")
    sets = [part for each in (*settings, "optim.lookahead={every_steps: 2}") for part in ("--set", each)]
    found = {}
    for how in ("in-turn", "batched"):
        done = dltrain("train", "small.yaml", "--seeds", 3, "--how", how, "--out", how, *sets, "--json")
        found[how] = json.loads(done.out)
    for seed in SEEDS:
        apart = zip(*(rundir.records(Path(f"{how}/seed-{seed}")) for how in found), strict=True)
        for one, other in apart:
            if one["kind"] == "layers":
                for name, row in one["parameters"].items():
                    assert other["parameters"][name] == pytest.approx(row, abs=1e-3)
                continue
            for key in one.keys() - {"seconds", "images_per_second"}:
                assert other[key] == pytest.approx(one[key], abs=1e-4), (seed, one["step"], key)
    for one, other in zip(*(found[how]["rows"] for how in found), strict=True):
        assert other["test"] == pytest.approx(one["test"], abs=1e-4)
    assert end("batched/seed-6").keys() == end("in-turn/seed-6").keys()
    for name, tensor in end("in-turn/seed-6").items():
        if not name.startswith("rng."):
            torch.testing.assert_close(end("batched/seed-6")[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dropout", [0, 0.5])
def test_dropout_draws_for_each_batched_seed(tmp_path: Path, dropout: float) -> None:
    """Of one seed twice, which is what else is drawn."""
    settings = [f"model.dropout={dropout}"]
    both = [runs.new_run(build.build(configs.load(tmp_path / "small.yaml", settings), print)) for _ in range(2)]
    stack = Stack(both)
    for _ in range(2):
        assert stack.take() == {}
    norms, _ = stack.read()
    assert (norms[0] == norms[1]) == (not dropout)
    assert torch.equal(*(run.sums for run in both)) == (not dropout)


def test_batched_seeds_have_the_accuracies_of_seeds_alone(dltrain: Run) -> None:
    """With dropout each is another draw from the same distribution: two of eight seeds tell it from none."""
    accuracies = []
    for how in ("in-turn", "batched-processes"):
        sets = ["--set", "train.epochs=3", "--set", "train.precision=fp32", "--set", "tensorboard.pictures=false"]
        done = dltrain("train", "digits_mlp", "--seeds", 8, "--how", how, "--out", how, *sets, "--json")
        accuracies.append([row["test"]["accuracy"] for row in json.loads(done.out)["rows"]])
    assert accuracies[0] != accuracies[1]
    found = difference(*accuracies, paired=False)
    assert min(map(min, accuracies)) > 0.85
    assert abs(found["difference"]) < 0.01
    assert found["p"] > 0.1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("how", ["in-turn", "batched"])
def test_stopped_seeds_go_on_to_the_same_bits(
    dltrain: Run, monkeypatch: pytest.MonkeyPatch, how: str, number: signal.Signals
) -> None:
    ask = ("train", "small.yaml", "--seeds", 3, "--how", how, "--out")
    assert dltrain(*ask, "whole").code == 0
    stop_in(monkeypatch, "seed-6", number)
    done = dltrain(*ask, "cut")
    assert done.code == 128 + number
    assert done.err == "stopped, and saved; go on with: dltrain train --resume cut\n"
    assert not json.loads(Path("cut/seeds.json").read_text())["complete"]
    assert rundir.step_of(rundir.steps(Path("cut/seed-6"))[0]) == 2
    if number == signal.SIGINT:
        alone = dltrain("train", "--resume", "cut/seed-6")
        if how == "in-turn":
            assert alone.code == 0
        else:
            assert alone.code == 4
            assert "would not end in the same bits: batched_seeds: 3 -> 1; --allow-inexact" in alone.err
    done = dltrain("train", "--resume", "cut", "--json")
    assert (done.code, json.loads(done.out)["complete"]) == (0, True)
    assert all(same(f"cut/seed-{seed}", f"whole/seed-{seed}") for seed in SEEDS)
    before = {path: path.stat().st_mtime_ns for path in Path("cut").rglob("seed-*/*")}
    again = dltrain("train", "--resume", "cut", "--json")  # there is nothing to do
    assert json.loads(again.out) == json.loads(done.out)
    assert {path: path.stat().st_mtime_ns for path in Path("cut").rglob("seed-*/*")} == before


class Killed(BaseException):
    pass


@pytest.mark.parametrize("step", [2, 4, 6])
def test_batched_seeds_that_are_killed_between_two_saves_go_on_to_the_same_bits(
    dltrain: Run, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Then one is a save ahead of the others; at the first there is none of them to go on from."""
    ask = ("train", "small.yaml", "--seeds", 3, "--how", "batched", "--set", "train.checkpoint_every_steps=2", "--out")
    assert dltrain(*ask, "whole").code == 0
    save = rundir.RunFolder.save

    def dying(self: rundir.RunFolder, at: int, content: bytes) -> None:
        if (self.path.name, at) == ("seed-6", step):
            raise Killed
        save(self, at, content)

    with monkeypatch.context() as patch:
        patch.setattr(rundir.RunFolder, "save", dying)
        with pytest.raises(Killed):
            dltrain(*ask, "cut")
    assert dltrain("train", "--resume", "cut").code == 0
    assert all(same(f"cut/seed-{seed}", f"whole/seed-{seed}") for seed in SEEDS)


def test_batched_seeds_that_wait_for_one_that_is_over_go_on_to_the_same_bits(
    dltrain: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps its place among them, on which depends what dropout draws; nothing that scoring it draws is missed."""
    finish = runs.finish

    def drawing(*given: Any) -> dict[str, Any]:
        torch.rand(1)
        return finish(*given)

    monkeypatch.setattr(runs, "finish", drawing)
    monkeypatch.setattr(batched, "is_over", lambda run: run.progress.epoch >= (2 if run.setup.config.seed == 5 else 4))
    ask = ("train", "small.yaml", "--seeds", 3, "--how", "batched", "--set", "train.epochs=4", "--out")
    done = dltrain(*ask, "whole", "--json")
    assert [row["epochs"] for row in json.loads(done.out)["rows"]] == [2, 4, 4]
    append = rundir.RunFolder.append

    def dying(self: rundir.RunFolder, record: dict[str, Any]) -> None:
        if (self.path.name, record["step"]) == ("seed-6", 7):
            raise Killed
        append(self, record)

    with monkeypatch.context() as patch:
        patch.setattr(rundir.RunFolder, "append", dying)
        with pytest.raises(Killed):
            dltrain(*ask, "cut")
    assert rundir.read_summary(Path("cut/seed-5"))
    assert not rundir.read_summary(Path("cut/seed-6"))
    assert dltrain("train", "--resume", "cut").code == 0
    assert all(same(f"cut/seed-{seed}", f"whole/seed-{seed}") for seed in SEEDS)


def test_what_auto_chooses_by_timing_is_chosen_once(dltrain: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds, times = compiling.seconds_of_a_step, []

    def timed(*given: Any) -> float:
        times.append(Path("out").exists())
        return seconds(*given)

    monkeypatch.setattr(compiling, "seconds_of_a_step", timed)
    sets = ("--set", "train.precision=auto", "--set", "train.compile=auto", "--set", "train.epochs=1")
    assert dltrain("train", "small.yaml", "--seeds", 3, "--how", "in-turn", "--out", "out", *sets).code == 0
    assert set(times) == {False}


def test_finished_seeds_are_trained_further(dltrain: Run) -> None:
    assert dltrain("train", "small.yaml", "--seeds", 2, "--how", "in-turn", "--out", "more").code == 0
    done = dltrain("train", "--resume", "more", "--set", "train.epochs=3", "--json")
    assert [row["epochs"] for row in json.loads(done.out)["rows"]] == [3, 3]
    done = dltrain("train", "--resume", "more", "--set", "seed=6")
    assert (done.code, done.err) == (2, "error: more: seed: 5 -> 6: start new runs for other seeds\n")


@pytest.mark.parametrize("how", ["in-turn", "batched"])
def test_seeds_that_leave_the_test_split_out_are_told_by_val(dltrain: Run, how: str) -> None:
    command = ["train", "small.yaml", "--seeds", 2, "--set", "evaluate.test=false", "--how", how, "--out", "untested"]
    done = dltrain(*command)
    assert (done.code, done.err) == (0, "")
    found = json.loads(Path("untested/seeds.json").read_text())
    assert (found["complete"], list(found["scores"])) == (True, ["val", "train"])
    values = [row["val"]["accuracy"] for row in found["rows"]]
    assert found["scores"]["val"]["accuracy"]["mean"] == pytest.approx(sum(values) / 2, abs=1e-12)
    assert f"seed 5: val accuracy {100 * values[0]:.2f} %" in done.out


@pytest.mark.parametrize("how", ["in-turn", "batched"])
def test_a_seed_that_diverges_is_a_row_and_the_others_go_on(
    dltrain: Run, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    assert dltrain("train", "small.yaml", "--seeds", 3, "--how", how, "--out", "whole").code == 0
    make = build.build_model

    def broken(config: Any, *given: Any) -> torch.nn.Module:
        model = make(config, *given)
        if config.seed == 6:
            next(model.parameters()).data.fill_(torch.inf)
        return model

    monkeypatch.setattr(build, "build_model", broken)
    done = dltrain("train", "small.yaml", "--seeds", 3, "--how", how, "--out", "out")
    assert done.code == 7
    assert all(same(f"out/seed-{seed}", f"whole/seed-{seed}") for seed in (5, 7))
    assert rundir.steps(Path("out/seed-6")) == []
    assert done.err.startswith("error: seed 6 diverged: step 1: the loss is nan")
    assert "1 of 3 seeds diverged" in done.out
    found = json.loads(Path("out/seeds.json").read_text())
    assert [row["test"] is None for row in found["rows"]] == [False, True, False]
    values = [found["rows"][index]["test"]["accuracy"] for index in (0, 2)]
    assert found["scores"]["test"]["accuracy"]["mean"] == pytest.approx(sum(values) / 2)
    again = dltrain("train", "--resume", "out")  # it would diverge as before
    assert (again.code, again.err) == (7, done.err)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["small.yaml", "--how", "in-turn"], "--how in-turn says how to train several seeds: it needs --seeds"),
        (["small.yaml", "--seeds", "2", "--resume"], "--seeds 2 begins whole runs of one process each: leave out --re"),
        (["small.yaml", "--seeds", "2", "--dry-run"], "--seeds 2 begins whole runs of one process each: leave out --d"),
        (["small.yaml", "--seeds", "2", "--processes", "2"], "--seeds 2 begins whole runs of one process each: leave"),
        (["small.yaml", "--seeds", "2", "--set", "optim.lr=-1"], "--set optim.lr=-1: optim.lr: expected more than 0"),
        (["small.yaml", "--seeds", "2", "--set", "data.val=200"], "data.val: 200 of 200 training images leaves an emp"),
        (
            [
                "small.yaml",
                "--seeds",
                "2",
                "--how",
                "batched",
                "--set",
                f"optim={MUON}",
            ],
            "--how batched: optim: muon does not update each number of a weight by itself: use --how",
        ),
        (
            ["small.yaml", "--seeds", "2", "--how", "batched", "--set", "optim.sam_rho=0.05"],
            "--how batched: optim.sam_rho looks for sharper weights seed by seed: use --how",
        ),
        (
            ["small.yaml", "--seeds", "2", "--how", "batched", "--set", "schedule=plateau"],
            "--how batched: schedule: plateau sets each seed another learning rate: use --how",
        ),
        (["small.yaml", "--seeds", "2", "--out", "held"], "held: holds a run already; go on with it by --resume, or"),
        (["--resume", "held"], "held/seeds.json: is not whole (JSONDecodeError); its seeds resume one by one"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(dltrain: Run, arguments: list[str], said: str) -> None:
    Path("held").mkdir()
    Path("held/seeds.json").write_text("{")
    done = dltrain("train", *arguments)
    assert done.code in (2, 4, 8)
    assert done.err.startswith(f"error: {said}")
    assert len(done.err.splitlines()) == 1
    assert sorted(path.name for path in Path().rglob("*")) == ["held", "seeds.json", "small.yaml"]


PICKY = """
from torch import nn
from dltrain.registry import register

@register("layer")
def picky(shape, outputs) -> nn.Module:
    "Mirrors dark batches."

    class Picky(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    return Picky()
"""


def test_auto_times_the_ways_that_are_possible(dltrain: Run) -> None:
    Path("picky.py").write_text(PICKY)
    Path("picky.yaml").write_text(
        CONFIG.replace(
            "{name: mlp, hidden: [16], batchnorm: true, dropout: 0.1}",
            "{name: cnn, layers: [picky, flatten, {linear: classes}]}",
        )
        + "plugins: [picky.py]\n"
    )
    whys = []
    for config in ("small.yaml", "picky.yaml"):
        done = dltrain("train", config, "--seeds", 2, "--out", f"out-{config}", "--set", "train.epochs=1", "--json")
        found = json.loads(done.out)
        assert found["how"] in ways.WAYS
        assert f"seeds: 2, {found['how']} ({found['why']})" in done.err
        whys.append(found["why"])
    assert re.match(r"a step of a seed took [\d.e-]+ ms batched, .*[\d.e-]+ ms in-turn", whys[0])
    assert whys[1].startswith("a step of a seed took ")
    assert "; not batched: model cnn: vmap: It looks like you're attempting to use a Tensor in some data" in whys[1]
    done = dltrain("train", "picky.yaml", "--seeds", 2, "--how", "batched")
    assert (done.code, done.err.startswith("error: --how batched: model cnn: vmap: ")) == (2, True)


@pytest.mark.parametrize("columns", [40, 80])
def test_the_table_fits(dltrain: Run, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    done = dltrain("train", "small.yaml", "--seeds", 2, "--how", "in-turn", "--out", "out", "-q")
    monkeypatch.setenv("COLUMNS", str(columns))
    done = dltrain("train", "--resume", "out", "-q")
    lines = done.out.splitlines()
    assert max(map(len, lines[:-3])) <= columns
    assert sum(line.lstrip().startswith(("5 ", "6 ")) for line in lines) == 2
    assert sum("±" in line for line in lines) == 6 + 1
