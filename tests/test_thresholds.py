"""`dltrain eval --positive` and `--curves`: what they report, of which split, and what they refuse."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from PIL import Image
from sklearn import metrics as sklearn

from dltrain import cli, figures, trained
from dltrain.curves import curve
from dltrain.errors import ConfigError
from dltrain.thresholds import Question, asked, class_number

CONFIG = """
data: {name: digits, %s}
model: {name: perceptron, init: zeros, output: %s}
loss: %s
descent: {variant: mini-batch, batch_size: 16}
optim: {name: sgd, lr: %s}
train: {epochs: 2, device: cpu, precision: fp32}
tensorboard: {pictures: false, pr_curves: false}
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs: ten classes, the same without val, two classes by a sigmoid, and one that learns nothing."""
    root = tmp_path_factory.mktemp("runs")
    softmax, sigmoid = ("softmax", "cross_entropy"), ("sigmoid", "bce")
    settings = {
        "ten": ("limit: 600, val: 200", *softmax, "0.05"),
        "no_val": ("limit: 100", *softmax, "0.05"),
        "two": ("val: 60, classes: [9, 8]", *sigmoid, "0.05"),
        "blank": ("val: 60, classes: [9, 8]", *sigmoid, "1.0e-30"),
    }
    for name, each in settings.items():
        (root / f"{name}.yaml").write_text(CONFIG % each)
        assert cli.run(["train", str(root / f"{name}.yaml"), "--out", str(root / name), "-q"]) == 0
    return root


def outputs(run: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    model = trained.load(run, "cpu", print)
    found = trained.judge(model, split, None, print)[1]
    return found.outputs.double(), found.labels


def judged(dltrain: Run, run: Path, *options: object) -> dict[str, Any]:
    done = dltrain("eval", run, "--device", "cpu", "--json", *options)
    assert done.code == 0, done.err
    found: dict[str, Any] = json.loads(done.out)
    return found


def test_a_class_against_the_rest_is_what_sklearn_makes_of_it(dltrain: Run, runs: Path):
    found = judged(dltrain, runs / "ten", "--positive", 8, "--threshold", 0.15)["positive"]
    logits, labels = outputs(runs / "ten", "test")
    share, positive = logits.softmax(1)[:, 8], labels == 8
    assert (found["class"], found["threshold"], found["chosen"], list(found["splits"])) == ("8", 0.15, None, ["test"])
    scores = found["splits"]["test"]
    (negatives, alarms), (misses, hits) = sklearn.confusion_matrix(positive, share >= 0.15).tolist()
    assert min(negatives, alarms, misses, hits) > 0
    assert scores == {
        "images": len(labels),
        "true_positives": hits,
        "false_positives": alarms,
        "false_negatives": misses,
        "true_negatives": negatives,
        "type_1_error": alarms / (alarms + negatives),
        "type_2_error": misses / (misses + hits),
        "precision": hits / (hits + alarms),
        "recall": hits / (hits + misses),
        "f1": pytest.approx(sklearn.f1_score(positive, share >= 0.15)),
        "accuracy": pytest.approx(sklearn.accuracy_score(positive, share >= 0.15)),
        "auc": pytest.approx(sklearn.roc_auc_score(positive, share)),
        "average_precision": pytest.approx(sklearn.average_precision_score(positive, share)),
    }
    way = found["curve"]
    assert sklearn.auc(way["type_1_error"], way["recall"]) == pytest.approx(scores["auc"], abs=1e-3)


@pytest.mark.parametrize(("name", "column"), [("9", 0), ("8", 1)])
def test_of_two_classes_each_has_its_side_of_the_sigmoid(dltrain: Run, runs: Path, name, column):
    found = judged(dltrain, runs / "two", "--positive", name)
    one = found["positive"]
    logits, labels = outputs(runs / "two", "test")
    share = (logits[:, 0] * (1 if column else -1)).sigmoid()
    assert (one["class"], one["threshold"]) == (name, 0.5)
    scores = one["splits"]["test"]
    assert scores["auc"] == pytest.approx(sklearn.roc_auc_score(labels == column, share))
    same = found["per_class"][column]  # at 0.5 it is what the model says
    assert {key: scores[key] for key in same if key not in ("class", "images")} == {
        key: value for key, value in same.items() if key not in ("class", "images")
    }
    assert scores["accuracy"] == found["accuracy"]


@pytest.mark.parametrize(
    ("option", "wanted", "which", "reach"),
    [
        ("type_1_error", 0.02, "lowest", "at most"),
        ("type_2_error", 0.1, "highest", "at most"),
        ("precision", 0.9, "lowest", "at least"),
        ("recall", 0.95, "highest", "at least"),
    ],
)
def test_a_threshold_is_chosen_on_val_and_judged_on_test(dltrain: Run, runs: Path, option, wanted, which, reach):
    done = dltrain("eval", runs / "ten", "--json", "--positive", 3, f"--{option.replace('_', '-')}", wanted)
    assert done.err == ""  # nothing to warn of
    found = json.loads(done.out)["positive"]
    assert found["chosen"] == {"split": "val", "which": which, "rate": option, "reach": reach, "wanted": wanted}
    assert list(found["splits"]) == ["val", "test"]
    logits, labels = outputs(runs / "ten", "val")
    share = logits.softmax(1)[:, 3]
    assert found["threshold"] in share.tolist()
    at = {t: sklearn.confusion_matrix(labels == 3, share >= t).ravel().tolist() for t in share.tolist()}
    rate = {
        "type_1_error": lambda tn, fp, fn, tp: fp / (fp + tn),
        "type_2_error": lambda tn, fp, fn, tp: fn / (fn + tp),
        "precision": lambda tn, fp, fn, tp: tp / (tp + fp),
        "recall": lambda tn, fp, fn, tp: tp / (tp + fn),
    }[option]
    good = [t for t, each in at.items() if (rate(*each) <= wanted if reach == "at most" else rate(*each) >= wanted)]
    assert found["threshold"] == (min(good) if which == "lowest" else max(good))
    assert found["splits"]["val"][option] == rate(*at[found["threshold"]])
    again = judged(dltrain, runs / "ten", "--positive", 3, "--threshold", repr(found["threshold"]))["positive"]
    assert again["splits"]["test"] == found["splits"]["test"]
    assert again["splits"]["test"] != found["splits"]["val"]
    assert again["curve"] == found["curve"]  # of test in both


@pytest.mark.parametrize(
    ("run", "options", "chosen_on", "warning"),
    [
        ("no_val", (), "test", "the threshold is chosen on test, the split that it is judged on, so that"),
        ("ten", ("--split", "val"), "val", "the threshold is chosen on val, the split that it is judged on, so that"),
        ("ten", ("--choose-on", "train"), "train", "the threshold is chosen on train, which the model has learned:"),
        (
            "ten",
            ("--split", "val", "--choose-on", "test"),
            "test",
            "the threshold is chosen on test, which is to judge and not to choose by:",
        ),
    ],
)
def test_a_threshold_chosen_elsewhere_than_on_val_is_warned_of(dltrain: Run, runs, run, options, chosen_on, warning):
    done = dltrain("eval", runs / run, "--json", "--positive", 3, "--recall", 0.9, *options)
    assert (done.code, done.err.count("\n")) == (0, 1)
    assert done.err.startswith(f"warning: {warning}")
    found = json.loads(done.out)["positive"]
    assert found["chosen"]["split"] == chosen_on
    assert next(iter(found["splits"])) == chosen_on


@pytest.mark.parametrize(
    ("run", "options", "message"),
    [
        ("ten", ("--positive", 8, "--threshold", 1.5), "--threshold 1.5: expected a share in 0..1"),
        ("ten", ("--positive", 8, "--recall", "nan"), "--recall nan: expected a share in 0..1"),
        (
            "ten",
            ("--positive", 8, "--recall", 0.9, "--type-1-error", 0.1),
            "--type-1-error and --recall: give one of them, each of them names a threshold",
        ),
        ("ten", ("--precision", 0.9), "--precision: of which class? --positive CLASS says it"),
        ("ten", ("--choose-on", "val"), "--choose-on: of which class? --positive CLASS says it"),
        (
            "ten",
            ("--positive", 8, "--threshold", 0.4, "--choose-on", "val"),
            "--choose-on says where a threshold is chosen: it needs a rate, such as --type-1-error 0.01",
        ),
        (
            "ten",
            ("--positive", 8, "--recall", 0.9, "--choose-on", "all"),
            "--choose-on all: expected train, val or test",
        ),
        ("ten", ("--positive", "eight"), "--positive: no class 'eight'; there is 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"),
        ("two", ("--positive", 0), "--positive: no class '0'; there is 8, 9"),
        (
            "no_val",
            ("--positive", 8, "--recall", 0.9, "--choose-on", "val"),
            "this run has no val split: its config holds no images out (data.val: 0)",
        ),
        (
            "ten",
            ("--positive", 8, "--curves", "a.pdf"),
            "--curves a.pdf: expected a name that ends in .png; the curves as data: --json",
        ),
    ],
)
def test_what_cannot_be_asked_is_said_in_one_line(dltrain: Run, runs, run, options, message):
    done = dltrain("eval", runs / run, *options)
    assert (done.code, done.out, done.err) == (2, "", f"error: {message}\n")


def test_a_model_that_names_no_classes_is_refused(dltrain: Run):
    Path("auto.yaml").write_text("""
data: {name: digits, limit: 128}
task: reconstruction
model: {name: mlp, hidden: [8], output: sigmoid}
loss: mse
optim: {name: sgd, lr: 0.1}
train: {epochs: 1, device: cpu, precision: fp32}
tensorboard: {pictures: false}
""")
    trained = dltrain("train", "auto.yaml", "--out", "auto", "-q")
    assert trained.code == 0, trained.err
    for options in (("--positive", 8), ("--curves", "a.png")):
        done = dltrain("eval", "auto", *options)
        text = f"{options[0]} is of classes, and this model's task is reconstruction"
        assert (done.code, done.out, done.err) == (2, "", f"error: {text}\n")


def test_a_folder_that_is_not_there_is_said_before_any_work(dltrain: Run, runs: Path):
    done = dltrain("eval", runs / "ten", "--curves", "none/a.png")
    assert (done.code, done.out, done.err) == (6, "", "error: none/a.png: there is no folder none\n")


def test_a_rate_that_is_out_of_reach_is_said_with_the_split(dltrain: Run, runs: Path):
    """Of scores that are all the same every image is called positive, or none."""
    options = ("eval", runs / "blank", "--positive", 9)
    done = dltrain(*options, "--type-1-error", 0.9)
    text = "--positive 9, val: no threshold has a type I error of at most 0.9: the best there is 1"
    assert (done.code, done.out, done.err) == (2, "", f"error: {text}\n")
    rows = dltrain(*options, "--recall", 0.1, "--curves", "blank.png").out.splitlines()
    assert ["AUC", "0.50000", "0.50000"] in map(str.split, rows)


def test_questions():
    nothing: dict[str, float | None] = dict.fromkeys(("threshold", "type_1_error", "recall"))
    assert asked(None, nothing, None) is None
    assert asked("cat", nothing, None) == Question("cat", None, 0.5, None)
    assert asked("cat", {**nothing, "threshold": 0.25}, None) == Question("cat", None, 0.25, None)
    assert asked("cat", {**nothing, "recall": 0.0}, "train") == Question("cat", "recall", 0.0, "train")


@pytest.mark.parametrize(
    ("which", "classes", "expected"),
    [
        ("dog", ("cat", "dog"), 1),
        ("1", ("cat", "dog"), 1),
        ("7", ("3", "7"), 1),
        ("1", ("3", "1"), 1),
        ("0", ("3", "1"), None),  # 3 is not meant
        ("2", ("cat", "dog"), None),
        ("-1", ("cat", "dog"), None),
        ("", ("cat", "dog"), None),
    ],
)
def test_classes_by_name_and_by_number(which, classes, expected):
    if expected is None:
        with pytest.raises(ConfigError, match="--positive: no class"):
            class_number(which, classes)
    else:
        assert class_number(which, classes) == expected


def test_the_table_has_a_column_for_each_split(dltrain: Run, runs: Path, monkeypatch):
    options = ("eval", runs / "ten", "--positive", 3, "--type-1-error", 0.02)
    found = json.loads(dltrain(*options, "--json").out)["positive"]
    for columns in ("100", "40"):
        monkeypatch.setenv("COLUMNS", columns)
        table = dltrain(*options).out
        rows = {" ".join(words[:-2]): words[-2:] for line in table.splitlines() if len(words := line.split()) > 2}
        for name, key in (("true positives", "true_positives"), ("false negatives", "false_negatives")):
            assert rows[name] == [str(found["splits"][split][key]) for split in ("val", "test")]
        assert rows["AUC"] == [f"{found['splits'][split]['auc']:.5f}" for split in ("val", "test")]
        (line,) = [words for line in table.splitlines() if (words := line.split())[:3] == ["type", "I", "error"]]
        shares = [f"{100 * found['splits'][split]['type_1_error']:.2f}" for split in ("val", "test")]
        assert line[3:] == [shares[0], "%", shares[1], "%"]
        assert f"3 against the rest: positive from a probability of {found['threshold']!r} on" in table
        assert "threshold: chosen on val, the lowest with a type I error of at most 2 % there" in table


def test_curves_of_every_class(dltrain: Run, runs: Path):
    done = dltrain("eval", runs / "ten", "--curves", "all.png")
    assert done.code == 0
    assert "picture: all.png" in done.out
    assert Image.open("all.png").width > 800
    found = judged(dltrain, runs / "ten", "--curves", "all.png")
    assert (found["picture"], "positive" in found) == ("all.png", False)
    logits, labels = outputs(runs / "ten", "test")
    for number, row in enumerate(found["curves"]):
        assert row["class"] == str(number)
        assert row["auc"] == pytest.approx(sklearn.roc_auc_score(labels == number, logits.softmax(1)[:, number]))
        assert f"{row['auc']:.5f}" in done.out
    assert not {"positive", "curves", "picture"} & judged(dltrain, runs / "ten").keys()


def drawn_texts(monkeypatch: pytest.MonkeyPatch, found: dict[str, Any], classes: list[tuple[str, Any]]) -> list[str]:
    """What is written in the figure: its title, and the legends."""
    kept: list[Any] = []
    draw = figures._png
    monkeypatch.setattr(figures, "_png", lambda figure: kept.append(figure) or draw(figure))
    Image.open(io.BytesIO(figures.roc_and_pr(found, classes))).load()
    (figure,) = kept
    legends = [text.get_text() for axes in figure.axes for text in axes.get_legend().get_texts()]
    return [figure.get_suptitle(), *legends]


def test_the_figure_names_class_split_and_threshold(dltrain: Run, runs: Path, monkeypatch):
    found = judged(dltrain, runs / "ten", "--positive", 3, "--threshold", 0.25)
    logits, labels = outputs(runs / "ten", "test")
    line = curve(logits.softmax(1)[:, 3], labels == 3)
    title, *legends = drawn_texts(monkeypatch, found, [("3", line)])
    scores = found["positive"]["splits"]["test"]
    assert title == "3 against the rest, digits test"
    assert legends == [
        f"{scores['auc']:.5f} of 3",
        "the threshold 0.25",
        f"{scores['average_precision']:.5f} of 3",
        "the threshold 0.25",
    ]


def test_of_many_classes_the_figure_shows_the_ten_that_are_told_worst(monkeypatch):
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(13).repeat(20)
    labels[labels == 5] = 6  # class 5 is missing
    scores = torch.rand(260, 13, generator=random, dtype=torch.float64)
    scores[torch.arange(260), labels] += torch.linspace(1.0, 0.1, 13, dtype=torch.float64)[labels]
    classes = [(f"_{number}$", curve(scores[:, number], labels == number)) for number in range(13)]
    title, *legends = drawn_texts(monkeypatch, {"data": "x", "split": "val"}, classes)
    assert title == (
        "each class against the rest, x val: the 10 lowest AUC of 12 classes; "
        "1 without a curve: no image of the class, or no other"
    )
    present = [number for number in range(13) if number != 5]
    area = {number: sklearn.roc_auc_score(labels == number, scores[:, number]) for number in present}
    worst = sorted(present, key=lambda number: area[number])[:10]
    assert 0 not in worst  # though it is the first
    assert [text.split()[-1] for text in legends[:10]] == [f"_{number}$" for number in worst]


def test_a_figure_of_a_class_that_is_missing_says_so(monkeypatch):
    empty = curve(torch.rand(9), torch.zeros(9).bool())
    (title,) = drawn_texts(monkeypatch, {"data": "x", "split": "test"}, [("cat", empty)])
    assert title.endswith("; 1 without a curve: no image of the class, or no other")
