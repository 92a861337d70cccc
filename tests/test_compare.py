"""`dltrain compare`: which runs are a group, what is said of differences, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from PIL import Image
from scipy import stats

from dltrain import compare, config, figures, image_by_image
from dltrain.evaluate import Evaluation

SETTINGS = {
    "data": {"name": "digits", "val": 60},
    "model": "perceptron",
    "optim": {"name": "sgd", "lr": 0.1},
    "train": {"epochs": 2, "device": "cpu", "precision": "fp32"},
    "tensorboard": {"pictures": False, "filters": False, "pr_curves": False},
}


def finished(
    path: Path | str, accuracy: float | None = None, *, seed: int = 0, scores: Any = None, **changes: Any
) -> Path:
    """A run's folder with a config and a summary, and no weights.  changes: `optim__lr=0.2`"""
    plain = config.from_plain({"name": "x", **SETTINGS, "seed": seed}, "test").plain()
    for key, value in changes.items():
        *above, last = key.split("__")
        section = plain
        for name in above:
            section = section[name]
        section[last] = value
    folder = Path(path)
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(config.from_plain(plain, "test").yaml())
    found = scores or {"loss": 1 - (accuracy or 0), "accuracy": accuracy}
    summary = {"config": "x", "seed": seed, "epochs": 2, "seconds": 1.5, "chosen_by": "val_accuracy"}
    (folder / "summary.json").write_text(json.dumps({**summary, "train": found, "val": found, "test": found}))
    return folder


def group(name: str, *accuracies: float, **changes: Any) -> None:
    for seed, accuracy in enumerate(accuracies):
        finished(f"{name}/seed-{seed}", accuracy, seed=seed, **changes)


def found(dltrain: Run, *arguments: object) -> Any:
    done = dltrain("compare", *arguments, "--json")
    assert done.code == 0, done.err
    return json.loads(done.out)


def test_runs_that_differ_in_their_seed_alone_are_a_group(dltrain: Run) -> None:
    group("runs/a", 0.90, 0.92, 0.94)
    group("runs/b", 0.91, 0.95, optim__lr=0.2)
    finished("runs/c", 0.93, seed=3, name="other", train__log_every_steps=7, data__root="elsewhere")  # A's
    report = found(dltrain, "runs")
    first, second = report["groups"]
    assert [row["run"] for row in first["runs"]] == [*(f"runs/a/seed-{seed}" for seed in range(3)), "runs/c"]
    assert (first["settings"], second["settings"]) == ({"optim.lr": 0.1}, {"optim.lr": 0.2})
    assert first["scores"]["accuracy"]["mean"] == pytest.approx(0.9225)
    assert second["scores"]["accuracy"]["half_width"] == pytest.approx(12.7062 * 0.02, rel=1e-5)
    assert second["scores"]["loss"]["mean"] == pytest.approx(0.07)
    assert report["notes"] == []
    (told,) = report["comparisons"]
    assert (told["test"], told["difference"]) == ("Welch's t", pytest.approx(0.0075))
    expected = stats.ttest_ind([0.91, 0.95], [0.90, 0.92, 0.94, 0.93], equal_var=False)
    assert told["p"] == pytest.approx(expected.pvalue)
    assert told["words"].startswith("no difference can be told between A and B at n = 4 and 2: B - A is 0.75 points,")


def test_groups_of_the_same_seeds_are_paired(dltrain: Run) -> None:
    group("a", 0.90, 0.95, 0.92)
    group("b", 0.91, 0.9605, 0.93, optim__lr=0.2)
    (told,) = found(dltrain, "a", "b")["comparisons"]
    expected = stats.ttest_rel([0.91, 0.9605, 0.93], [0.90, 0.95, 0.92])
    assert (told["test"], told["p"]) == ("paired t", pytest.approx(expected.pvalue))
    low, high = expected.confidence_interval(0.95)
    words = f"B is better than A by 1.02 points (95 % interval {100 * low:.2f} to {100 * high:.2f}); paired by seed"
    assert told["words"] == words
    (told,) = found(dltrain, "b", "a")["comparisons"]  # now B is the worse one
    assert told["words"] == words.replace("B is better than A", "A is better than B")


def test_more_than_two_groups_are_each_compared_with_the_first(dltrain: Run) -> None:
    for name, lr in (("a", 0.1), ("b", 0.2)):
        group(f"runs/{name}", 0.5 + lr, 0.52 + lr, optim__lr=lr)
    finished("runs/c", 0.6, optim__lr=0.4)
    report = found(dltrain, "runs")
    assert [(told["first"], told["second"]) for told in report["comparisons"]] == [("A", "B"), ("A", "C")]
    alone = report["comparisons"][-1]
    assert (alone["half_width"], alone["p"], alone["test"]) == (None, None, None)
    assert (
        alone["words"] == "C - A is -1.00 points; whether that is chance cannot be told: a single seed shows no spread"
    )
    assert any("choose on the test split" in note for note in report["notes"])
    assert not any("choose on the test split" in note for note in found(dltrain, "runs", "--split", "val")["notes"])


def test_seeds_that_are_all_the_same_claim_nothing(dltrain: Run) -> None:
    group("a", 0.9, 0.9)
    group("b", 0.95, 0.95, optim__lr=0.2)
    (told,) = found(dltrain, "a", "b")["comparisons"]
    assert told["words"].endswith("whether that is chance cannot be told: their seeds show no spread")


@pytest.mark.parametrize(
    ("scores", "score", "words"),
    [
        (({"loss": 0.5}, {"loss": 0.25}), "loss", "B is better than A by 0.2499 "),
        (({"loss": 0.5, "psnr": 20.0}, {"loss": 0.4, "psnr": 23.5}), "psnr", "B is better than A by 3.50 dB "),
    ],
)
def test_scores_of_other_tasks(dltrain: Run, scores: Any, score: str, words: str) -> None:
    for name, lr, each in (("a", 0.1, scores[0]), ("b", 0.2, scores[1])):
        for seed in range(3):
            moved = {key: value + 0.001 * seed * (1 + lr) for key, value in each.items()}
            finished(f"{name}/{seed}", seed=seed, scores=moved, optim__lr=lr)
    report = found(dltrain, "a", "b")
    assert (report["score"], report["groups"][0]["scores"].keys()) == (score, scores[0].keys())
    assert report["comparisons"][0]["words"].startswith(words)
    table = dltrain("compare", "a", "b")
    assert table.code == 0
    assert f"test {score}" in table.out
    finished("c", 0.9)
    assert "c: is scored by accuracy, a/0 by" in dltrain("compare", "a", "c").err


def test_a_seed_twice_counts_once_and_a_run_named_twice_is_one(dltrain: Run) -> None:
    group("runs", 0.90, 0.92)
    finished("runs/again", 0.5, seed=1)  # before seed-1 in the order of paths
    finished("runs/seed-2", 0.93, seed=2)
    report = found(dltrain, "runs", "runs/seed-0")
    (only,) = report["groups"]
    assert [row["run"] for row in only["runs"]] == ["runs/seed-0", "runs/again", "runs/seed-2"]
    assert report["notes"] == ["runs/seed-1: has config and seed of runs/again: left out"]
    assert report["comparisons"] == []


def test_what_is_not_finished_is_left_out_of_a_folder_and_refused_by_name(dltrain: Run) -> None:
    group("runs", 0.90, 0.92)
    (finished("runs/torn") / "summary.json").write_text('{"test": {"acc')
    (finished("runs/odd", 0.9) / "config.yaml").write_text("[1, 2")
    (finished("runs/empty") / "summary.json").write_text('{"test": {"accuracy": NaN, "loss": "x", "top": true}}')
    notes = found(dltrain, "runs")["notes"]
    assert [note.split(":")[0] for note in notes] == ["runs/empty", "runs/odd", "runs/torn"]
    done = dltrain("compare", "runs/torn", "runs/seed-0")
    assert (done.code, done.err) == (2, "error: runs/torn: is not finished, and has no result yet\n")


def test_differences_are_of_the_settings_that_differ() -> None:
    layers = [["flatten", {"linear": {"out": out}}] for out in (8, 16)]
    values = [
        {"a": 1, "b": {"c": [1, 2]}, "layers": layers[0]},
        {"a": 1, "b": {"c": [1, 3]}, "layers": layers[1], "d": 0},
    ]
    assert compare.differences(values) == {
        "b.c": [[1, 2], [1, 3]],
        "layers.1.linear.out": [8, 16],
        "d": [None, 0],
    }
    assert compare.differences([values[0], values[0], values[0]]) == {}
    assert compare.differences([{"x": [{"y": 1}]}, {"x": []}, {"x": None}]) == {"x": [[{"y": 1}], [], None]}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"data__name": "synthetic"}, 'b: data.name is "synthetic", in a it is "digits": '),
        ({"data__classes": [3, 7]}, "b: data.classes is [3, 7], in a it is null: "),
    ],
)
def test_other_data_is_refused(dltrain: Run, changes: Any, text: str) -> None:
    finished("a", 0.9)
    finished("b", 0.9, **changes)
    done = dltrain("compare", "a", "b")
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert text in done.err


def test_data_that_may_be_other_is_said(dltrain: Run) -> None:
    data = {"name": "synthetic", "train": 60, "test": 20, "class_count": 2, "val": 0}
    for seed in range(2):
        for name, size in (("a", 16), ("b", 24)):
            finished(f"{name}/{seed}", 0.9, seed=seed, data={**data, "size": size, "limit": size})
    text = "data.size differs (16, 24): the scores compare as far as the test images are the same"
    assert found(dltrain, "a", "b")["notes"] == [text]
    assert [note.split()[0] for note in found(dltrain, "a", "b", "--split", "val")["notes"]] == [
        "data.size",
        "data.limit",
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["nowhere"], 2, "nowhere: no such folder; expected a run's folder, or one with runs below it"),
        (["."], 2, ".: no finished run: give two runs or more"),
        (["one"], 2, "one: only one finished run, one: give two runs or more"),
        (["one", "--split", "train"], 2, "--split train: expected val or test"),
        (["one", "--figure", "x.jpg"], 2, "--figure x.jpg: expected a name that ends in .png"),
        (["one", "--figure", "no/x.png"], 6, "no/x.png: there is no folder no"),
    ],
)
def test_mistakes(dltrain: Run, arguments: list[str], code: int, text: str) -> None:
    if "one" in arguments:
        finished("one", 0.9)
    done = dltrain("compare", *arguments)
    assert (done.code, done.out, done.err.count("\n")) == (code, "", 1)
    assert done.err.startswith(f"error: {text}")


def test_a_run_without_val_is_refused_for_val(dltrain: Run) -> None:
    group("runs", 0.9, 0.8)
    summary = json.loads(Path("runs/seed-0/summary.json").read_text())
    Path("runs/seed-0/summary.json").write_text(json.dumps({**summary, "val": None}))
    done = dltrain("compare", "runs/seed-0", "runs/seed-1", "--split", "val")
    assert done.err == "error: runs/seed-0: has no val score: its config holds no images out (data.val)\n"


def test_a_run_that_leaves_the_test_split_out_is_compared_by_val(dltrain: Run) -> None:
    group("runs", 0.9, 0.8, evaluate__test=False)
    finished("scored", 0.7, seed=2)
    for run in Path("runs").iterdir():
        summary = json.loads((run / "summary.json").read_text())
        (run / "summary.json").write_text(json.dumps({**summary, "test": None}))
    done = dltrain("compare", "runs/seed-0", "runs/seed-1")
    assert done.err.startswith("error: runs/seed-0: has no test score: its config says evaluate.test: false; ")
    groups = found(dltrain, "runs", "scored", "--split", "val")["groups"]
    assert [[run["seed"] for run in each["runs"]] for each in groups] == [[0, 1, 2]]


@pytest.mark.parametrize("columns", [40, 80])
def test_the_table_says_split_groups_and_intervals(dltrain: Run, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    group("runs/a", 0.90, 0.92, 0.94)
    group("runs/[b]", 0.91, 0.95, 0.96, model={"name": "mlp", "hidden": [8]})
    monkeypatch.setenv("COLUMNS", str(columns))
    done = dltrain("compare", "runs", "--figure", "groups.png")
    assert (done.code, done.err) == (0, "")
    assert "92.00 ± 4.97 %" in done.out  # 4.302653 * 2 / sqrt(3)
    assert "scores of the test split; weights chosen by val_accuracy" in done.out
    assert "model.hidden: [8]" in " ".join(done.out.split())
    assert "[b]" in done.out.replace("\n", "")
    tables = [line for line in done.out.splitlines() if line.startswith(" ")]
    assert max(map(len, tables)) <= columns
    assert Image.open("groups.png").size[0] == 960


def test_the_figure_has_each_seed_and_the_interval_of_the_mean(dltrain: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    group("a", 0.90, 0.92, 0.94)
    finished("b", 0.95, optim__lr=0.2)
    report = found(dltrain, "a", "b")
    drawn: list[Any] = []
    monkeypatch.setattr(figures, "_png", lambda figure: drawn.append(figure) or b"")
    figures.comparison(report)
    (axes,) = drawn[0].axes
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    assert [list(line.get_xdata()) for line in dots] == [[90, 92, 94], [95]]
    ends = axes.collections[0].get_segments()[0][:, 0]
    assert list(ends) == pytest.approx([92 - 4.9683, 92 + 4.9683], abs=1e-3)
    assert axes.get_xlabel().startswith("test accuracy (%)")


# Two single runs


def evaluation(guesses: list[int], labels: list[int]) -> Evaluation:
    outputs = torch.nn.functional.one_hot(torch.tensor(guesses), 3).float()
    return Evaluation(0.0, {}, outputs, torch.tensor(labels), 1.0)


def test_images_are_counted_by_hand() -> None:
    labels = [0, 0, 0, 1, 1, 1, 2, 2]
    first, second = [0, 0, 1, 1, 1, 0, 2, 0], [0, 1, 1, 1, 2, 2, 0, 1]
    counted = image_by_image.counted([evaluation(first, labels), evaluation(second, labels)], "test")
    assert (counted["both_right"], counted["only_first"], counted["only_second"]) == (2, 3, 0)
    assert (counted["images"], counted["disagree"], counted["difference"]) == (8, 5, -3 / 8)
    assert counted["p"] == 2 * 0.5**3
    text = "no difference can be told between A and B: A alone is right on 3, B alone on 0 of 8 test images (p = 0.25"
    assert counted["words"].startswith(text)
    many = [evaluation(each * 3, labels * 3) for each in (first, second)]
    assert image_by_image.counted(many, "val")["words"].startswith("A is better than B: ")
    assert image_by_image.counted(many[::-1], "val")["words"].startswith("B is better than A: ")


@pytest.fixture
def two(dltrain: Run) -> None:
    """Runs `a` and `b` of other learning rates and seeds."""
    Path("c.yaml").write_text(json.dumps(SETTINGS))
    for name, lr, seed in (("a", 0.001, 0), ("b", 0.1, 1)):
        settings = ("--set", f"optim.lr={lr}", "--set", f"seed={seed}")
        assert dltrain("train", "c.yaml", "--out", name, "-q", *settings).code == 0


def predictions(dltrain: Run, run: str) -> list[list[str]]:
    assert dltrain("eval", run, "--out", f"{run}.csv").code == 0
    return [line.split(",")[1:3] for line in Path(f"{run}.csv").read_text().splitlines()[1:]]


@pytest.mark.usefixtures("two")
def test_two_single_runs_are_compared_on_the_same_images(dltrain: Run) -> None:
    report = found(dltrain, "a", "b", "--figure", "apart.png")
    first, second = predictions(dltrain, "a"), predictions(dltrain, "b")
    only = [
        [true == mine != other for (true, mine), (_, other) in zip(*pair, strict=True)]
        for pair in ((first, second), (second, first))
    ]
    (told,) = report["comparisons"]
    assert told["test"] == "McNemar's"
    assert (told["only_first"], told["only_second"]) == (sum(only[0]), sum(only[1]))
    assert told["disagree"] == sum(mine != other for (_, mine), (_, other) in zip(first, second, strict=True)) > 0
    assert told["p"] == pytest.approx(stats.binomtest(sum(only[0]), sum(only[0]) + sum(only[1])).pvalue)
    assert told["words"].startswith("B is better than A: ")
    assert [group["settings"] for group in report["groups"]] == [
        {"seed": 0, "optim.lr": 0.001},
        {"seed": 1, "optim.lr": 0.1},
    ]
    assert report["figure"] == "apart.png"
    assert Image.open("apart.png").size > (500, 500)
    assert "this is about these two trained models, not their settings" in report["notes"][-1]

    done = dltrain("compare", "a", "b", "--split", "val")
    assert done.err == "error: b/best.safetensors: its val images are not those of a/best.safetensors; " + (
        "which are held out depends on the seed\n"
    )


def test_the_figure_shows_what_each_says_of_those_that_both_are_surest_of(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = torch.tensor([0, 1, 1, 0])
    # of the second image both are surer than of the fourth; of the others they say the same
    outputs = [torch.tensor([[9.0, 0], [0, 5], [0, 9], [2, 0]]), torch.tensor([[9.0, 0], [4, 0], [0, 9], [0, 9]])]
    evaluations = [Evaluation(0.0, {}, each, labels, 1.0) for each in outputs]
    given: list[Any] = []
    monkeypatch.setattr(figures, "predictions_picture", lambda *drawn: given.extend(drawn) or b"")
    images = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1)
    image_by_image._draw(images, ("cat", "dog"), evaluations, "test")
    assert given[0].flatten().tolist() == [1, 3]
    shares = [f"{100 * torch.tensor(gap).sigmoid().item():.2f} %" for gap in (5.0, 4, 2, 9)]
    assert given[1] == [
        ["test image 1", "is dog", f"A: dog {shares[0]}", f"B: cat {shares[1]}"],
        ["test image 3", "is cat", f"A: cat {shares[2]}", f"B: dog {shares[3]}"],
    ]


@pytest.mark.usefixtures("two")
def test_a_run_against_itself_and_against_other_data(dltrain: Run) -> None:
    shutil.copytree("a", "same")
    Path("same/config.yaml").write_text(Path("a/config.yaml").read_text().replace("lr: 0.001", "lr: 0.002"))
    done = dltrain("compare", "a", "same", "--figure", "none.png")
    assert done.code == 0
    assert "the two say the same of every image: there is no figure to draw" in done.err
    assert "A alone is right on 0, B alone on 0 of 359 test images (p = 1, McNemar's exact test)" in done.out
    assert not Path("none.png").exists()
    Path("c.yaml").write_text(json.dumps({**SETTINGS, "data": {**SETTINGS["data"], "classes": [3, 7]}}))  # type: ignore[dict-item]
    assert dltrain("train", "c.yaml", "--out", "few", "-q").code == 0
    done = dltrain("compare", "a", "few")
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    shutil.copy("few/best.safetensors", "same/best.safetensors")  # of which the configs beside them say nothing
    done = dltrain("compare", "a", "same")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "same/best.safetensors: tells other classes apart than a/best.safetensors" in done.err
