"""`dltrain sweep`: what is tried, how often, and what is left of it when its workers are killed.

As a program, `python tests/test_sweep.py FOLDER`, this file makes the sweep of several workers that its tests look at.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import forks
import optuna
import pytest
from conftest import Run

from dltrain import cli, config, figures, rundir, runs, study, sweep, sweepfile
from dltrain.errors import ConfigError

BASE = """
data: {name: synthetic, train: 100, test: 20, size: 16, channels: 1, class_count: 3, val: 40}
model: {name: mlp, hidden: [8]}
optim: {name: sgd, lr: 0.1}
descent: {batch_size: 20}
train: {epochs: 5, device: cpu}
"""
RANDOM = """
config: base.yaml
sampler: random
pruner: none
trials: 4
space:
  optim.lr: {low: 1.0e-3, high: 1.0, log: true}
  model.hidden: [[4], [8, 4]]
  descent.batch_size: {low: 10, high: 30}
"""
POSTGRES = os.environ.get("DLTRAIN_TEST_POSTGRES")


DRAWN = [(figures, "sweep_history"), (figures, "sweep_importances"), (study, "_importances")]
DRAW = [getattr(module, name) for module, name in DRAWN]


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than a sweep here."""
    for (module, name), nothing in zip(DRAWN, (b"", b"", {}), strict=True):
        monkeypatch.setattr(module, name, lambda _, nothing=nothing: nothing)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text(BASE)
    return tmp_path


def write(folder: Path, text: str) -> Path:
    path = folder / "one.yaml"
    path.write_text(text)
    return path


def epochs_of(run: Path) -> list[int]:
    return [record["epoch"] for record in rundir.records(run) if record["kind"] == "epoch"]


def study_of(folder: Path) -> optuna.Study:
    return optuna.load_study(study_name="one", storage=f"sqlite:///{folder / 'sweep.db'}")


GRID = """
config: base.yaml
sampler: grid
space:
  optim.lr: [0.5, 0.02]
  train.epochs: {low: 1, high: 3, step: 2}
"""


def test_a_grid_tries_each_point_once_and_its_best_config_trains(dltrain: Run, base: Path) -> None:
    path = write(base, GRID)
    done = dltrain("sweep", path, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    points = [tuple(row["settings"].values()) for row in found["trials"]]
    assert points == [(0.5, 1), (0.5, 3), (0.02, 1), (0.02, 3)]
    assert [len(epochs_of(Path(row["run"]))) for row in found["trials"]] == [1, 3, 1, 3]
    summaries = [json.loads((Path(row["run"]) / "summary.json").read_text()) for row in found["trials"]]
    assert [row["value"] for row in found["trials"]] == [summary["val"]["accuracy"] for summary in summaries]
    assert found["best"]["value"] == max(row["value"] for row in found["trials"])
    dltrain("train", found["best_config"], "--out", "best", "-q")
    best = json.loads(Path("best/summary.json").read_text())
    assert best["val"] == summaries[found["best"]["trial"]]["val"]
    assert {split: [each[split] for each in summaries] for split in ("train", "test")} == {
        "train": [None] * 4,
        "test": [None] * 4,
    }
    assert None not in (best["train"], best["test"])
    assert all(0 < row["seconds"] < 100 for row in found["trials"])

    before = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("metrics.jsonl")}
    again = dltrain("sweep", path, "--json")
    assert json.loads(again.out) == found
    assert {path: path.stat().st_mtime_ns for path in Path("runs").rglob("metrics.jsonl")} == before


def test_a_loss_is_minimised(dltrain: Run, base: Path) -> None:
    path = write(base, GRID + "optimise: val_loss\nname: two\n")
    found = json.loads(dltrain("sweep", path, "--json").out)
    values = [row["value"] for row in found["trials"]]
    assert found["best"]["value"] == min(values)
    losses = [json.loads((Path(row["run"]) / "summary.json").read_text())["val"]["loss"] for row in found["trials"]]
    assert values == losses


@pytest.mark.parametrize("pruner", ["median", "halving"])
def test_a_hopeless_trial_is_ended_early(dltrain: Run, base: Path, pruner: str) -> None:
    lrs = ", ".join(f"{0.3 + number / 100:.2f}" for number in range(5))
    settings = f"pruner: {pruner}\noptimise: val_loss\nspace: {{optim.lr: [{lrs}, 30.0]}}\n"
    path = write(base, f"config: base.yaml\nsampler: grid\n{settings}")
    found = json.loads(dltrain("sweep", path, "--json").out)
    *_, hopeless = found["trials"]
    assert (hopeless["state"], epochs_of(Path(hopeless["run"]))) == ("pruned", [1])
    assert len(epochs_of(Path(found["trials"][0]["run"]))) == 5


def test_a_trial_that_fails_is_one_of_many(dltrain: Run, base: Path) -> None:
    text = "config: base.yaml\nsampler: grid\nspace: {optim.lr: [1.0e+30, 0.1], descent.batch_size: [20, 200]}\n"
    found = json.loads(dltrain("sweep", write(base, text), "--json").out)
    assert [row["state"] for row in found["trials"]] == ["failed", "failed", "finished", "failed"]
    failures = [row["failure"] for row in found["trials"] if row["failure"]]
    assert "not finite" in failures[0] or "nan" in failures[0] or "inf" in failures[0]
    assert failures[1] == failures[2]
    assert failures[1].startswith("descent.batch_size: 200 images in a batch, 60 in the training set")
    done = dltrain("sweep", write(base, text.replace(", 0.1", "").replace("[20, 200]", "[20]")), "--out", "none")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "no trial finished: trial 0: " in done.err


def test_a_stopped_sweep_goes_on_in_the_trial_it_was_in(
    dltrain: Run, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(base, GRID)
    append = sweep._TrialFolder.append

    def stopping(self: sweep._TrialFolder, record: dict[str, Any]) -> None:
        append(self, record)
        if self.path.name == "trial-00003" and record["kind"] == "epoch" and record["epoch"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(sweep._TrialFolder, "append", stopping)
    stopped = dltrain("sweep", path, "--out", "here")
    assert stopped.code == 143
    assert stopped.err == f"stopped; go on with: dltrain sweep {path} --out here\n"
    monkeypatch.setattr(sweep._TrialFolder, "append", append)
    resume, resumed = runs.resume, []

    def resuming(folder: rundir.RunFolder, *given: Any, **more: Any) -> dict[str, Any]:
        resumed.append(folder.path.name)
        return resume(folder, *given, **more)

    monkeypatch.setattr(runs, "resume", resuming)
    found = json.loads(dltrain("sweep", path, "--out", "here", "--json").out)
    straight = json.loads(dltrain("sweep", path, "--out", "straight", "--json").out)
    assert resumed == ["trial-00003"]
    assert [row["value"] for row in found["trials"]] == [row["value"] for row in straight["trials"]]
    assert epochs_of(Path("here/trial-00003")) == [1, 2, 3]
    assert not list(Path("straight/trial-00003").glob("*.tmp"))


def lost_trial(folder: Path, slot: int, host: str) -> None:
    """A trial whose worker is gone, as the storage has it."""
    study = study_of(folder)
    run = folder / f"trial-{slot:05d}"
    attrs = {"slot": slot, "host": host, "folder": str(run.absolute()), "beat": 4}
    study.add_trial(optuna.trial.create_trial(state=optuna.trial.TrialState.RUNNING, user_attrs=attrs))


def test_a_trial_of_a_machine_that_is_gone_is_taken_over(
    dltrain: Run, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(base, GRID.replace("[0.5, 0.02]", "[0.5]"))
    assert dltrain("sweep", path).code == 0
    path.write_text(GRID.replace("[0.5, 0.02]", "[0.5]").replace("high: 3", "high: 5"))
    refused = dltrain("sweep", path)
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "holds another sweep one (space.train.epochs.high: 3 -> 5)" in refused.err

    path.write_text(RANDOM.replace("trials: 4", "trials: 1").replace("config", "name: one\nconfig"))
    assert dltrain("sweep", path, "--out", "more").code == 0
    path.write_text(RANDOM.replace("trials: 4", "trials: 2").replace("config", "name: one\nconfig"))
    lost_trial(Path("more"), 1, "elsewhere")
    monkeypatch.setattr(sweep, "GRACE", 0.5)
    done = dltrain("sweep", path, "--out", "more")
    assert "waiting for other workers, which run trial 1\ntrial 1: its worker is gone; it is run again\n" in done.out
    assert [trial.state.name for trial in study_of(Path("more")).trials] == ["COMPLETE", "FAIL", "COMPLETE"]


def test_of_two_workers_that_take_one_slot_the_later_one_leaves_it(
    dltrain: Run, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = sweep._Worker.create

    def beaten(worker: sweep._Worker, slot: int, before: Any) -> int | None:
        if slot == 0:  # another machine has just had it
            attrs = {"slot": 0, "host": "elsewhere", "folder": "/elsewhere/trial-00000", "beat": 0}
            worker.study.add_trial(optuna.trial.create_trial(value=0.25, user_attrs=attrs))
        return create(worker, slot, before)

    monkeypatch.setattr(sweep._Worker, "create", beaten)
    found = json.loads(dltrain("sweep", write(base, RANDOM.replace("trials: 4", "trials: 2")), "--json").out)
    assert [trial.state.name for trial in study_of(Path("runs/one")).trials] == ["COMPLETE", "FAIL", "COMPLETE"]
    assert (found["trials"][0]["value"], found["states"]["finished"]) == (0.25, 2)


def test_a_trial_that_kills_its_worker_is_not_run_for_ever(dltrain: Run, base: Path) -> None:
    path = write(base, RANDOM.replace("trials: 4", "trials: 2"))
    assert dltrain("sweep", path).code == 0
    path.write_text(RANDOM.replace("trials: 4", "trials: 3"))
    folder = Path("runs/one")
    rundir.RunFolder(folder / "trial-00002", resume=False).close()
    for _ in range(sweep.KILLED):
        lost_trial(folder, 2, sweep.socket.gethostname())
    found = json.loads(dltrain("sweep", path, "--json").out)
    assert found["trials"][2]["failure"] == "its worker was killed 3 times"
    assert found["states"] == {"finished": 2, "pruned": 0, "failed": 1}


def test_a_folder_with_other_runs_is_refused(dltrain: Run, base: Path) -> None:
    path = write(base, RANDOM.replace("trials: 4", "trials: 1"))
    assert dltrain("sweep", path).code == 0
    for database in Path("runs/one").glob("sweep.db*"):
        database.unlink()
    done = dltrain("sweep", path)
    assert (done.code, done.err.count("\n")) == (8, 1)
    assert "runs/one/trial-00000: holds a run already" in done.err


@pytest.mark.parametrize(
    ("storage", "code", "said"),
    [
        ("nonsense", 2, "expected for example postgresql+psycopg://"),
        ("nosuch://x/y", 2, "nosuch"),
        ("sqlite:////nowhere/at/all.db", 6, "unable to open database file"),
    ],
)
def test_a_storage_that_cannot_be_used_is_one_line(
    dltrain: Run, base: Path, monkeypatch: pytest.MonkeyPatch, storage: str, code: int, said: str
) -> None:
    monkeypatch.setattr(study.time, "sleep", lambda seconds: None)
    done = dltrain("sweep", write(base, RANDOM), "--storage", storage)
    assert (done.code, done.err.count("\n")) == (code, 1), done.err
    assert said in done.err


def test_without_optuna_it_says_what_to_install(dltrain: Run, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.delitem(sys.modules, "dltrain.sweep")
    monkeypatch.delattr("dltrain.sweep")
    done = dltrain("sweep", write(base, RANDOM))
    assert (done.code, done.err) == (2, "error: dltrain sweep needs Optuna: pip install 'dltrain[sweep]'\n")


START = "config: base.yaml\ntrials: 1\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- 1", "1: a sweep is a mapping"),
        ("confg: base.yaml\ntrials: 1\nspace: {seed: [1]}", "1: confg: unknown key; did you mean 'config'?"),
        ("config: bse.yaml\ntrials: 1\nspace: {seed: [1]}", "1: config: bse.yaml: no such file"),
        ("config: base.yaml\nspace: {seed: [1]}", "1: trials: missing"),
        (f"{START}space: {{}}", "3: space: expected"),
        (f"{START}space: {{seed: 1}}", "3: space.seed: expected a list of values, or {low"),
        (f"{START}space:\n  optim.lrr: [1]", "4: space: optim.lrr: unknown key; did you mean 'lr'"),
        (f"{START}space:\n  optim.lr: [0.1, -1]", "4: space: optim.lr: expected more than 0, got -1"),
        (f"{START}space: {{optim.lr: {{low: 0, high: 1}}}}", "3: space: optim.lr: expected more than 0"),
        (f"{START}space: {{optim.lr: {{low: 1, high: 0.1}}}}", "3: space.optim.lr.high: expected more than low"),
        (f"{START}space: {{optim.lr: {{low: 0, high: 1, log: true}}}}", "space.optim.lr.low: expected more than 0, as"),
        (f"{START}space: {{optim.lr: {{low: 0.1, hi: 1}}}}", "3: space.optim.lr.hi: unknown key"),
        (f"{START}space: {{train.epochs: {{low: 1, high: 9, step: 0.5}}}}", "train.epochs.step: expected a whole"),
        (f"{START}space: {{seed: [1, 1]}}", "3: space.seed: 1 stands twice"),
        (f"{START}space: {{data.val: [0, 30]}}", "3: space: no images are held out to compare"),
        (f"{START}space: {{train.choose_by: [last]}}", "1: optimise: missing"),
        (f"{START}space: {{seed: [1]}}\noptimise: test_accuracy", "4: optimise: expected val_accuracy"),
        (f"{START}space: {{seed: [1]}}\noptimise: val_psnr", "4: optimise: expected val_accuracy or val_loss of"),
        (f"{START}space: {{descent.variant: [batch]}}", '3: space: descent.variant="batch": '),
        (f"{START}sampler: grid\nspace: {{seed: [1, 2]}}", "2: trials: a grid tries each of its 2 points"),
        ("config: base.yaml\nsampler: grid\nspace: {optim.lr: {low: 0.1, high: 1}}", "step: missing: a grid"),
        ("config: base.yaml\nsampler: grid\nspace: {seed: {low: 0, high: 10000}}", "3: space: 10,001 points, at most"),
    ],
)
def test_mistakes_in_a_sweep_are_said_where_they_stand(base: Path, text: str, said: str) -> None:
    path = write(base, text)
    with pytest.raises(ConfigError) as caught:
        sweepfile.load(path)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{path}:")
    assert said in line


def test_a_grid_of_steps_has_no_rounding_and_lists_hold_whole_settings(base: Path) -> None:
    text = """
config: base.yaml
sampler: grid
space:
  optim.lr: {low: 0.1, high: 0.35, step: 0.1}
  model: [perceptron, {name: mlp, hidden: [4]}]
"""
    plan = sweepfile.load(write(base, text))
    points = [plan.point(number) for number in range(plan.trials)]
    assert [point["optim.lr"] for point in points] == [0.1, 0.1, 0.2, 0.2, 0.3, 0.3]
    assert [plan.config(point).model.source.name for point in points] == ["perceptron", "mlp"] * 3
    assert sweepfile.plain(points[1]) == {"optim.lr": 0.1, "model": {"name": "mlp", "hidden": [4]}}


def test_the_shipped_sweep_is_found_by_name() -> None:
    plan = sweepfile.load(sweepfile.find("digits_mlp"))
    assert (plan.base.name, plan.optimise) == ("digits_mlp", "val_loss")
    with pytest.raises(ConfigError, match="did you mean 'digits_mlp'"):
        sweepfile.find("digits_mpl")


def test_the_page_shows_a_sweep_that_is_right(tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs/sweep.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```yml\n(.*?)```", page, flags=re.DOTALL)
    plan = sweepfile.load(write(tmp_path, text))
    assert (plan.trials, plan.sweep.sampler, plan.pruner) == (50, "tpe", "median")


def test_the_result_fits_a_terminal_and_the_pictures_are_drawn(
    dltrain: Run, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for (module, name), draw in zip(DRAWN, DRAW, strict=True):
        monkeypatch.setattr(module, name, draw)
    path = write(base, GRID.replace("[0.5, 0.02]", "[0.5, 0.02, 1.0e+30]"))
    lines = dltrain("sweep", path).out.splitlines()
    assert "6 trials: 4 finished, 2 failed" in lines
    assert lines[-1] == "next: dltrain train runs/one/best.yaml"
    assert any(line.startswith("  optim.lr: ") and line.endswith(" %") for line in lines)
    for name in ("history", "importances"):
        assert Path(f"runs/one/{name}.png").read_bytes()[:4] == b"\x89PNG"
    monkeypatch.setenv("COLUMNS", "40")
    table = dltrain("sweep", path).out.split("6 trials")[0]
    assert max(map(len, table.splitlines())) <= 40


# several workers, of which one is killed, in a program of its own


def main(folder: Path, storage: list[str]) -> None:
    """A worker that is killed in its second trial, then two workers at once that go on."""
    forks.prepare()
    os.chdir(folder)
    assert cli.run(["train", "base.yaml", "--quiet", "--out", "first"]) == 0
    optuna.storages.RDBStorage("sqlite://")  # what is loaded once is, before the forks
    arguments = ["sweep", "one.yaml", *storage]
    append = sweep._TrialFolder.append

    def dying(self: sweep._TrialFolder, record: dict[str, Any]) -> None:
        append(self, record)
        if self.path.name == "trial-00001" and record["kind"] == "epoch" and record["epoch"] == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    assert forks.run(arguments, lambda: setattr(sweep._TrialFolder, "append", dying)) == -signal.SIGKILL
    for module, name in DRAWN:
        setattr(module, name, {"_importances": lambda study: {}}.get(name, lambda found: b""))
    workers = []
    for _ in range(2):
        if (process := os.fork()) == 0:
            os._exit(forks.run(arguments))
        workers.append(process)
    assert [os.waitpid(process, 0)[1] for process in workers] == [0, 0]


def run_program(folder: Path, *storage: str) -> None:
    (folder / "base.yaml").write_text(BASE)
    (folder / "one.yaml").write_text(RANDOM)
    command = [sys.executable, __file__, str(folder), *storage]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr


def assert_nothing_lost_and_nothing_repeated(study: optuna.Study, folder: Path) -> None:
    trials = study.trials
    kept = [trial for trial in trials if trial.state.name == "COMPLETE"]
    assert sorted(trial.user_attrs["slot"] for trial in kept) == list(range(4))
    killed = [trial for trial in trials if "killed" in trial.user_attrs]
    assert [(trial.user_attrs["slot"], trial.state.name) for trial in killed] == [(1, "FAIL")]
    again = next(trial for trial in kept if trial.user_attrs["slot"] == 1)
    assert again.params == killed[0].params
    assert len(trials) - len(kept) - len(killed) <= 2  # two that took one slot at the same moment
    assert {Path(trial.user_attrs["folder"]).name: epochs_of(Path(trial.user_attrs["folder"])) for trial in kept} == {
        f"trial-{slot:05d}": [1, 2, 3, 4, 5] for slot in range(4)
    }
    assert sorted(path.name for path in (folder / "runs/one").glob("trial-*")) == [f"trial-{n:05d}" for n in range(4)]


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several")
    run_program(folder)
    return folder


def test_of_a_killed_worker_nothing_is_lost_and_nothing_repeated(several: Path) -> None:
    assert_nothing_lost_and_nothing_repeated(study_of(several / "runs/one"), several)


def test_several_workers_and_a_kill_find_what_one_worker_does(dltrain: Run, base: Path, several: Path) -> None:
    straight = json.loads(dltrain("sweep", write(base, RANDOM), "--json").out)
    trials = study_of(several / "runs/one").get_trials(states=(optuna.trial.TrialState.COMPLETE,))
    values = {trial.user_attrs["slot"]: (sweepfile.plain(trial.params), trial.value) for trial in trials}
    assert [values[row["trial"]] for row in straight["trials"]] == [
        (row["settings"], row["value"]) for row in straight["trials"]
    ]
    assert Counter(row["state"] for row in straight["trials"]) == {"finished": 4}
    assert (
        config.load(several / "runs/one/best.yaml").optim.source.args["lr"] == straight["best"]["settings"]["optim.lr"]
    )


@pytest.mark.skipif(not POSTGRES, reason="DLTRAIN_TEST_POSTGRES names no database")
def test_workers_share_a_postgresql_database(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context():
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        if "one" in optuna.get_all_study_names(POSTGRES):
            optuna.delete_study(study_name="one", storage=str(POSTGRES))
    run_program(tmp_path, "--storage", str(POSTGRES))
    assert not (tmp_path / "runs/one/sweep.db").exists()
    assert_nothing_lost_and_nothing_repeated(optuna.load_study(study_name="one", storage=POSTGRES), tmp_path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
