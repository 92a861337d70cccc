"""`dltrain vary`: which runs a grid makes, from which weights, what is drawn of them, and how it ends and goes on."""

from __future__ import annotations

import dataclasses
import itertools
import json
import signal
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from rich.console import Console

from dltrain import board, figures, logs, registry, rundir, vary, yamlfile
from dltrain.errors import ConfigError

CONFIG = """
seed: 5
data: {name: synthetic, train: 60, test: 20, size: 16, channels: 1, class_count: 4, val: 12}
model: {name: mlp, hidden: [16]}
optim: {name: sgd, lr: 0.1}
descent: {batch_size: 20}
train: {epochs: 2, device: cpu, log_every_steps: 1}
tensorboard: {filters: false, pr_curves: false}
"""
TRAINED = 48  # images: 60 without the 12 of val
VARIANTS = "descent.variant=batch,stochastic,mini-batch"


PNG = figures._png


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard's take half a second a run, and each figure as long."""
    monkeypatch.setattr(board.Board, "end", lambda *given: None)
    monkeypatch.setattr(figures, "_png", lambda figure: b"")


@pytest.fixture
def small(tmp_path: Path) -> str:
    (tmp_path / "small.yaml").write_text(CONFIG)
    return "small.yaml"


def scores(summary: dict[str, Any]) -> dict[str, Any]:
    return {split: summary[split] for split in ("val", "test")}


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("optim.lr=0.1, 1e-2", ["0.1", "0.01"]),
        ("model.hidden=[64],[128,64]", ["[64]", "[128, 64]"]),
        (
            "optim={name: adam, lr: 0.001},{name: sgd, lr: 0.1}",
            ["{name: adam, lr: 0.001}", "{name: sgd, lr: 0.1}"],
        ),
        ("model.layers.2=maxpool: 2,avgpool: 3", ["{maxpool: 2}", "{avgpool: 3}"]),
        ("data.root='a, b',c", ["a, b", "c"]),
        ("data.root='012',null", ["'012'", "null"]),
    ],
)
def test_values_are_yaml_between_commas(text: str, values: list[str]) -> None:
    ((key, found),) = vary.read_grid([text]).items()
    assert (key, found) == (text.partition("=")[0], values)
    parsed = yamlfile.parse(f"[{text.partition('=')[2]}]", "test").data
    assert [yamlfile.parse(value, "test").data for value in found] == parsed  # what --set makes of them is the same


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["optim.lr"], "optim.lr: expected KEY=V1,V2"),
        (["=1,2"], "=1,2: expected KEY=V1,V2"),
        (["optim.lr=0.1"], "optim.lr=0.1: expected two values or more, separated by commas, got 1"),
        (["optim.lr="], "optim.lr=: expected two values or more, separated by commas, got 0"),
        (["optim.lr=0.1,0.10"], "optim.lr=0.1,0.10: 0.1 stands twice"),
        (["seed=1,2", "seed=3,4"], "seed=3,4: seed is varied twice"),
        (["seed=1,2", "optim.lr=1,2", "train.epochs=1,2"], "seed, optim.lr, train.epochs: expected one key, or two"),
        (["model.hidden=[1],[2"], "model.hidden=[1],[2: not YAML"),
        ([f"seed={','.join(map(str, range(101)))}"], "seed: expected at most 100 runs, got 101"),
    ],
)
def test_what_is_no_grid_is_said(asked: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        vary.read_grid(asked)
    assert str(error.value).startswith(said)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["descent.variant=batch,batches"], "descent.variant=batches: descent.variant: expected batch"),
        (["optim.momentums=0,0.9"], "optim.momentums=0: optim.momentums: unknown key"),
        (["train.epochs=1,2", "optim.lr=0.1,-1"], "train.epochs=1 optim.lr=-1: optim.lr: expected more than 0"),
        (["train.patience_epochs=1,2", "data.val=12,0"], "train.patience_epochs=1 data.val=0: train.patience"),
        (["model.hidden=[],[10000000000000]"], "model.hidden=[10000000000000]: model mlp: "),
        (["model.batchnorm=false,true", "descent.variant=stochastic,batch"], "model.batchnorm=true descent.variant=s"),
    ],
)
def test_every_value_is_checked_before_any_is_trained(dltrain: Run, small: str, asked: list[str], said: str) -> None:
    """By its config, and by building what it would train."""
    settings = ("--set", "train.precision=fp32", "--set", "train.compile=off")  # nothing is timed to choose them
    done = dltrain("vary", small, *asked, "--out", "out", *settings)
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert done.err.startswith(f"error: {said}")
    assert not Path("out").exists()


def test_what_the_user_set_keeps_its_name_in_messages(dltrain: Run, small: str) -> None:
    done = dltrain("vary", small, "seed=1,2", "--set", "optim.lr=-1")
    assert done.err.startswith("error: seed=1: --set optim.lr=-1: optim.lr: expected more than 0")


def test_the_variants_of_descent_are_compared(dltrain: Run, small: str) -> None:
    """Though the config has a batch_size, which `dltrain train` refuses beside the variants it is not for."""
    done = dltrain("vary", small, VARIANTS, "--out", "out", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    steps = {row["values"]["descent.variant"]: row["steps"] for row in found["runs"]}
    assert steps == {"batch": 2, "stochastic": 2 * TRAINED, "mini-batch": 2 * 3}
    assert (found["initial_weights"], found["score"], found["score_split"]) == ("same", "accuracy", "val")
    left_out = [row["left_out"] for row in found["runs"]]
    assert left_out == [{"descent.batch_size": "20"}, {"descent.batch_size": "20"}, {}]
    assert dltrain("train", small, "--set", "descent.variant=batch").code == 2


def test_each_value_is_the_run_that_train_makes(dltrain: Run, small: str) -> None:
    grid = ("model.activation=relu,tanh", "optim.lr=0.1,0.2")
    found = json.loads(dltrain("vary", small, *grid, "--set", "data.val=10", "--out", "out", "--json").out)
    assert [row["run"] for row in found["runs"]] == [f"out/{a}__{lr}" for a in ("relu", "tanh") for lr in (0.1, 0.2)]
    row = found["runs"][2]
    assert row["values"] == {"model.activation": "tanh", "optim.lr": "0.1"}
    alone = dltrain(
        *("train", small, "--json", "--out", "alone", "--set", "data.val=10"),
        *("--set", "model.activation=tanh", "--set", "optim.lr=0.1"),
    )
    assert scores(row) == scores(json.loads(alone.out))
    epochs = [record for record in rundir.records(Path("alone")) if record["kind"] == "epoch"]
    assert [point["train_loss"] for point in row["curve"]] == [record["train"]["loss"] for record in epochs]
    assert [point["val_loss"] for point in row["curve"]] == [record["val"]["loss"] for record in epochs]
    assert [(point["epoch"], point["step"], point["images"]) for point in row["curve"]] == [(1, 3, 50), (2, 6, 100)]
    assert found["keys"] == {"model.activation": ["relu", "tanh"], "optim.lr": ["0.1", "0.2"]}
    assert found["initial_weights"] == "same"


def test_a_trace_has_each_log_line_where_its_images_were_seen(dltrain: Run, small: str) -> None:
    found = json.loads(dltrain("vary", small, "optim.lr=0.1,0.2", "--out", "out", "--json").out)
    row = found["runs"][0]
    trace = vary.trace(row)
    assert [point["images"] for point in trace] == [20, 40, 48, 68, 88, 96]  # the last step of an epoch takes the rest
    assert [point["epoch"] for point in trace] == pytest.approx([point["images"] / TRAINED for point in trace])
    assert trace[-1]["seconds"] == pytest.approx(row["seconds"]) == row["curve"][-1]["seconds"]
    sums = [20 * a["train_loss"] + 20 * b["train_loss"] + 8 * c["train_loss"] for a, b, c in (trace[:3], trace[3:])]
    assert [each / TRAINED for each in sums] == pytest.approx([point["train_loss"] for point in row["curve"]])


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("optim.lr=0.1,0.2", "same"),
        ("model.hidden=[16],[17]", "other shapes"),
        ("model.hidden=[16],[16,16]", "other shapes"),
        ("seed=1,2", "other numbers"),
        ("model.init=kaiming,xavier", "other numbers"),
    ],
)
def test_whether_the_initial_weights_are_the_same_is_told(
    dltrain: Run, small: str, monkeypatch: pytest.MonkeyPatch, asked: str, said: str
) -> None:
    monkeypatch.setattr(vary, "_train", lambda point, *given: {"label": "", "diverged": None, "test": {}, "val": None})
    found, _ = vary.vary(vary.plan(Path(small), [asked], [], Path("out")), Console(), quiet=True)
    assert found["initial_weights"] == said


@pytest.mark.parametrize(
    ("descent", "left_out"),
    [
        ("{}", [{}, {}, {}]),
        ("batch", [{}, {}, {}]),
        ("{variant: batch, micro_batch_size: 1}", [{}, {}, {}]),
        (
            "{variant: batch, micro_batch_size: 500}",
            [{}, {"descent.micro_batch_size": "500"}, {"descent.micro_batch_size": "500"}],
        ),
        (
            "{batch_size: 20, micro_batch_size: 10}",
            [
                {"descent.batch_size": "20"},
                {"descent.batch_size": "20", "descent.micro_batch_size": "10"},
                {},
            ],
        ),
    ],
)
def test_sizes_of_another_variant_do_not_stand_in_the_way(
    tmp_path: Path, descent: str, left_out: list[dict[str, str]]
) -> None:
    text = CONFIG.replace("descent: {batch_size: 20}\n", f"descent: {descent}\n" * (descent != "batch"))
    (tmp_path / "own.yaml").write_text(text)
    points = vary.plan(tmp_path / "own.yaml", [VARIANTS], [], tmp_path / "out")
    assert [point.left_out for point in points] == left_out
    assert [point.config.descent.variant for point in points] == ["batch", "stochastic", "mini-batch"]


def test_a_size_that_is_varied_itself_is_checked_as_it_stands(dltrain: Run, small: str) -> None:
    done = dltrain("vary", small, "descent.variant=mini-batch,batch", "descent.batch_size=10,20")
    assert done.code == 2
    assert "descent.batch_size=10: descent.batch_size: belongs to variant mini-batch" in done.err


@pytest.mark.parametrize(("asked", "reads"), [("optim.lr=0.1,0.2", [60]), ("data.train=60,61", [60, 61])])
def test_the_same_data_is_read_once(
    dltrain: Run, small: str, monkeypatch: pytest.MonkeyPatch, asked: str, reads: list[int]
) -> None:
    entry, read = registry.find("synthetic", "data"), []

    def counting(*given: Any, **settings: Any) -> Any:
        read.append(settings["train"])
        return entry.factory(*given, **settings)

    monkeypatch.setitem(registry._entries["data"], "synthetic", dataclasses.replace(entry, factory=counting))
    assert dltrain("vary", small, asked, "--out", "out", "--set", "train.epochs=1").code == 0
    assert read == reads


def test_a_value_that_diverges_is_a_row_and_the_others_go_on(
    dltrain: Run, small: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = dltrain("vary", small, "optim.lr=1e30,0.1", "--out", "out", "--json")
    assert done.code == 7
    assert done.err.splitlines()[-1].startswith("error: optim.lr=1.0e+30 diverged: step ")
    found = json.loads(done.out)
    first, second = found["runs"]
    assert "learning rate 1e+30" in first["diverged"]
    assert (first["val"], first["test"], first["train_loss"], first["epochs"]) == (None, None, None, 0)
    assert (second["diverged"], second["epochs"], found["complete"]) == (None, 2, True)
    (legend,) = drawn(monkeypatch, found, [[], []]).legends
    assert [text.get_text() for text in legend.get_texts()] == ["1.0e+30 (diverged)", "0.1"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_keeps_what_is_done_and_the_same_command_goes_on(
    dltrain: Run, small: str, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """No run is trained twice, and the one in work ends as if it had not been stopped."""
    command = ("vary", small, "optim.lr=0.1,0.2", "--out", "out", "--json")
    epoch, trained = logs.Log.epoch, []

    def note(log: logs.Log, run: Any, *given: Any) -> None:
        epoch(log, run, *given)
        trained.append((log.folder.path.name, run.progress.epoch))
        if trained == [("0.1", 1), ("0.1", 2), ("0.2", 1)]:
            signal.raise_signal(number)

    monkeypatch.setattr(logs.Log, "epoch", note)
    stopped = dltrain(*command)
    assert stopped.code == 128 + number
    last = stopped.err.splitlines()[-1]
    assert last.startswith("stopped in optim.lr=0.2")
    assert last.endswith("; go on with: dltrain vary small.yaml optim.lr=0.1,0.2 --out out")
    found = json.loads(stopped.out)
    assert ([row["label"] for row in found["runs"]], found["complete"]) == (["optim.lr=0.1"], False)
    done = dltrain(*command)
    assert done.code == 0
    assert trained == [(lr, epoch) for lr in ("0.1", "0.2") for epoch in (1, 2)]
    alone = dltrain("train", small, "--set", "optim.lr=0.2", "--out", "alone", "--json")
    assert scores(json.loads(done.out)["runs"][1]) == scores(json.loads(alone.out))


def test_a_folder_with_runs_of_another_config_is_refused(dltrain: Run, small: str) -> None:
    settings = ("--out", "out", "--set", "train.epochs=1")
    assert dltrain("vary", small, "optim.lr=0.1,0.2", *settings).code == 0
    written = {path: path.stat().st_mtime_ns for path in Path("out").glob("*/*.*")}
    more = dltrain("vary", small, "optim.lr=0.1,0.2,0.3", *settings, "--json")
    assert (more.code, len(json.loads(more.out)["runs"])) == (0, 3)
    assert {path: path.stat().st_mtime_ns for path in written} == written  # what is finished is left as it is
    other = dltrain("vary", small, "optim.lr=0.1,0.2", *settings, "--set", "seed=6")
    assert other.code == 8
    assert "out/0.1: holds a run of another config (seed: 5 -> 6)" in other.err


def test_without_out_the_runs_lie_below_the_configs_name(
    dltrain: Run, small: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figures, "_png", PNG)
    found = json.loads(dltrain("vary", small, "optim.lr=0.1,0.2", "--json", "--set", "train.epochs=1").out)
    (folder,) = Path("runs/small").glob("vary-*")
    assert found["figure"] == f"{folder}/vary.png"
    assert sorted(path.name for path in folder.iterdir()) == ["0.1", "0.2", "vary.png"]
    assert (folder / "vary.png").read_bytes().startswith(b"\x89PNG")


def test_folder_names_are_names_and_differ() -> None:
    long = ", ".join(["conv: {out: 32, kernel: 3}"] * 5)
    listed = ["batch", "{name: adam, lr: 0.001}", "[64, 32]", "[[64], 32]", "../../x", "", "A", "a", long, long + "!"]
    names = vary.folder_names([{"key": value} for value in listed])
    assert names[:2] == ["batch", "name_adam_lr_0.001"]
    assert len({name.lower() for name in names}) == len(names)
    assert all(name and len(name) < 80 and "/" not in name and name[0] not in "._" for name in names)
    assert vary.folder_names([{"a": "batch", "b": "0.1"}]) == ["batch__0.1"]
    assert names[2:4] != ["64_32", "64_32"]


def drawn(monkeypatch: pytest.MonkeyPatch, found: dict[str, Any], traces: list[Any]) -> Any:
    """The figure itself."""
    monkeypatch.setattr(figures, "_png", lambda figure: figure)
    return figures.vary(found, traces)


def test_the_figure_has_each_loss_against_epochs_seconds_and_images(
    dltrain: Run, small: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = json.loads(dltrain("vary", small, VARIANTS, "--out", "out", "--json").out)
    figure = drawn(monkeypatch, found, [vary.trace(row) for row in found["runs"]])
    for axes, x in zip(figure.axes, ("epoch", "seconds", "images"), strict=True):
        lines = axes.get_lines()
        assert len(lines) == 3 * 3
        for row, (train, val, trace) in zip(found["runs"], (lines[:3], lines[3:6], lines[6:]), strict=True):
            assert train.get_color() == val.get_color() == trace.get_color()
            assert (train.get_linestyle(), val.get_linestyle()) == ("-", "--")
            for line, loss in ((train, "train_loss"), (val, "val_loss")):
                assert list(line.get_xdata()) == [point[x] for point in row["curve"]]
                assert list(line.get_ydata()) == [point[loss] for point in row["curve"]]
            assert list(trace.get_xdata()) == [point[x] for point in vary.trace(row)]
    assert len({axes.get_lines()[at].get_color() for at in (0, 3, 6)}) == 3
    (legend,) = figure.legends
    assert legend.get_title().get_text() == "descent.variant"
    assert [text.get_text() for text in legend.get_texts()] == ["batch", "stochastic", "mini-batch"]


def row(values: dict[str, str], accuracy: float | None) -> dict[str, Any]:
    points = [
        {"epoch": 1, "step": 1, "images": 10, "seconds": 1.0, "train_loss": 100.0, "val_loss": 50.0},
        {"epoch": 2, "step": 2, "images": 20, "seconds": 2.0, "train_loss": 1.0, "val_loss": 2.0},
    ]
    found = None if accuracy is None else {"loss": 1.0, "accuracy": accuracy}
    return {
        **{"label": " ".join(f"{key}={value}" for key, value in values.items()), "values": values, "left_out": {}},
        **{"diverged": None if found else "step 1", "epochs": 2, "steps": 2, "seconds": 2.0, "train_loss": 1.0},
        **{"val": found, "test": found, "curve": points if found else []},
    }


def test_a_single_epoch_makes_no_line_and_is_seen_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    long = row({"optim.lr": "0.1"}, 0.5)
    short = {**row({"optim.lr": "0.2"}, 0.5), "curve": long["curve"][:1]}
    found = {"keys": {"optim.lr": ["0.1", "0.2"]}, "runs": [long, short]}
    for axes in drawn(monkeypatch, found, [[], []]).axes:
        assert [line.get_marker() for line in axes.get_lines()] == ["", "", "None", "o", "x", "None"]


def test_a_grid_has_the_score_of_each_pair_beside_its_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {"a": ["1", "2"], "b": ["x", "y", "z"]}
    shares = {("1", "x"): 0.5, ("1", "y"): None, ("1", "z"): 0.7, ("2", "x"): 0.8, ("2", "y"): 0.9, ("2", "z"): 1.0}
    rows = [row({"a": a, "b": b}, share) for (a, b), share in shares.items()]
    found = {"keys": keys, "score": "accuracy", "score_split": "val", "runs": rows}
    figure = drawn(monkeypatch, found, [[] for _ in rows])
    *panels, grid = figure.axes
    for axes in panels:
        lines = axes.get_lines()
        assert [line.get_color() for line in lines] == ["C0"] * 3 + ["C1"] * 3
        assert [line.get_linestyle() for line in lines] == ["-", "--", ":"] * 2
        assert list(lines[0].get_ydata()) == [50.0, 2.0]  # val
        assert axes.get_yscale() == "log"
    texts = {text.get_position(): text.get_text() for text in grid.texts}
    assert texts == {(0, 0): "50.00 %", (1, 0): "diverged", (2, 0): "70.00 %"} | {
        (0, 1): "80.00 %",
        (1, 1): "90.00 %",
        (2, 1): "100.00 %",
    }
    assert [len(legend.get_texts()) for legend in figure.legends] == [2, 3]


@pytest.mark.parametrize("keys", [{"a": ["1", "2"]}, {"a": ["1", "2"], "b": ["x", "y"]}])
def test_runs_that_all_diverge_are_a_figure_too(monkeypatch: pytest.MonkeyPatch, keys: dict[str, list[str]]) -> None:
    rows = [row(dict(zip(keys, values, strict=True)), None) for values in itertools.product(*keys.values())]
    monkeypatch.setattr(figures, "_png", PNG)
    found = {"keys": keys, "score": "accuracy", "score_split": "test", "runs": rows}
    assert figures.vary(found, [[] for _ in rows]).startswith(b"\x89PNG")


@pytest.mark.parametrize("width", [40, 100])
@pytest.mark.parametrize("asked", [[VARIANTS], ["descent.variant=batch,mini-batch", "optim.lr=0.1,0.2"]])
def test_the_table_fits_its_terminal(
    dltrain: Run, small: str, monkeypatch: pytest.MonkeyPatch, width: int, asked: list[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    done = dltrain("vary", small, *asked, "--out", "out", "-q", "--set", "train.epochs=1")
    head, rule, *lines = done.out.splitlines()[1:]
    rows = lines[: len(asked) + 2]
    assert [row.split()[0] for row in rows] in (
        ["batch", "stochastic", "mini-batch"],
        ["batch", "batch", "mini-batch", "mini-batch"],
    )
    assert max(map(len, (head, rule, *rows))) <= width
    assert not lines[len(rows)].strip()
    assert "initial weights: the same in every run" in lines
    variants = "batch and stochastic" if len(asked) == 1 else "batch"
    assert f"descent.batch_size=20: left out for {variants}, to which it does not belong" in lines


def test_a_long_value_is_shortened_to_fit(dltrain: Run, small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    settings = ("--out", "out", "-q", "--set", "train.epochs=1")
    done = dltrain("vary", small, "model=perceptron,{name: mlp, hidden: [16]}", *settings)
    rows = done.out.splitlines()[3:5]
    assert [row[:11].strip() for row in rows] == ["perceptron", "{nam…[16]}"]
    assert all(row.rstrip().endswith("%") and len(row) <= 40 for row in rows)
