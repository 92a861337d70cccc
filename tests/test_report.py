"""`dltrain report`: one page that needs nothing else, whose figures are those of the run and of `dltrain eval`."""

from __future__ import annotations

import base64
import csv
import io
import itertools
import json
import math
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run
from data_files import write_mnist
from PIL import Image

from dltrain import chart, cli, config, metrics, report, rundir, shipped
from dltrain.data.dataset import Split
from dltrain.evaluate import Evaluation

NAMES = ["<script>alert(1)</script>", '"quoted" & <b>bold', "it's {{ 7 * 7 }}"]
VOID = {"meta", "br", "img", "link", "hr", "input"}
PACKAGE = Path(report.__file__).parent
SMALL = ("-q", "--set", "train.epochs=2", "--set", "train.device=cpu", "--set", "tensorboard.pictures=false")


class Page(HTMLParser):
    """The elements of a page, in order, and the text of each; raises where one is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[int] = []
        self.text: dict[int, str] = {}
        self.feed(text)
        assert not self.open, [self.elements[at] for at in self.open]

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.elements[self.open.pop()][0] == tag

    def handle_data(self, data: str) -> None:
        for at in self.open:
            self.text[at] = self.text.get(at, "") + data

    def texts(self, tag: str, **attributes: str) -> list[str]:
        """What the elements of a name, with these attributes, hold, in one line each."""
        return [
            " ".join(self.text.get(at, "").split())
            for at, (name, has) in enumerate(self.elements)
            if name == tag and all(has.get(key) == value for key, value in attributes.items())
        ]

    def rows(self, label: str) -> list[list[str]]:
        """The cells of the first table in the region with this label."""
        start = next(at for at, (_, has) in enumerate(self.elements) if has.get("aria-label") == label)
        rows: list[list[str]] = []
        for at in range(start + 1, len(self.elements)):
            name = self.elements[at][0]
            if name == "div":
                break
            if name == "tr":
                rows.append([])
            if name in ("th", "td"):
                rows[-1].append(" ".join(self.text.get(at, "").split()))
        return rows


def settings(folder: Path) -> str:
    return json.dumps(
        {
            "name": "hostile",
            "data": {"name": "npz", "path": str(folder / "data.npz"), "val": 30, "class_names": NAMES},
            "model": "perceptron",
            "descent": {"batch_size": 10},
            "optim": {"name": "sgd", "lr": 0.05},
            "train": {"epochs": 3, "device": "cpu", "precision": "fp32"},
            "tensorboard": {"pictures": False, "filters": False, "pr_curves": False},
        }
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs and one whose end was cut off, on noisy images of three classes with hostile names."""
    folder = tmp_path_factory.mktemp("home")
    random = np.random.default_rng(0)
    centres = random.integers(0, 255, (3, 6, 6, 3))

    def images(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = random.integers(0, 3, count)
        noisy = 0.25 * centres[labels] + random.normal(90, 60, (count, 6, 6, 3))
        return noisy.clip(0, 255).astype(np.uint8), labels

    (x_train, y_train), (x_test, y_test) = images(150), images(80)
    np.savez(folder / "data.npz", x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    (folder / "c.yaml").write_text(settings(folder))
    for name, more in (("run <i>&", ()), ("other", ("--set", "optim.lr=0.001")), ("cut off", ())):
        assert cli.run(["train", str(folder / "c.yaml"), "--out", str(folder / name), "-q", *more]) == 0
    (folder / "cut off" / "summary.json").unlink()
    return folder


@pytest.fixture(scope="module")
def one(home: Path) -> str:
    assert cli.run(["report", str(home / "run <i>&")]) == 0
    return (home / "run <i>&" / "report.html").read_text()


@pytest.fixture(scope="module")
def several(home: Path) -> str:
    out = home / "several.html"
    folders = [str(home / name) for name in ("run <i>&", "other", "cut off")]
    assert cli.run(["report", *folders, "--out", str(out)]) == 0
    return out.read_text()


@pytest.mark.parametrize("which", ["one", "several"])
def test_a_page_needs_nothing_but_itself_and_is_whole(which: str, request: pytest.FixtureRequest):
    text: str = request.getfixturevalue(which)
    found = Page(text)
    names = Counter(name for name, _ in found.elements)
    assert not {"script", "link", "iframe", "object", "base", "form", "b", "i"} & names.keys()
    assert text.startswith("<!doctype html>")
    assert (names["h1"], names["main"], names["title"] > 0) == (1, 1, True)
    for name, has in found.elements:
        assert not [key for key in has if key.startswith("on")]
        if "src" in has:
            assert str(has["src"]).startswith("data:image/png;base64,")
        if "href" in has:
            assert {"id": str(has["href"]).removeprefix("#")}.items() <= {
                **next(other for _, other in found.elements if f"#{other.get('id')}" == has["href"])
            }.items()
        assert name != "th" or has["scope"] in ("col", "row")
        assert name != "img" or has["alt"]
    assert not re.search(r"url\(|@import|https?://", text)
    levels = [int(name[1]) for name, _ in found.elements if re.fullmatch("h[1-6]", name)]
    assert all(below <= above + 1 for above, below in itertools.pairwise(levels))
    assert len(text) < 1_000_000


def test_names_of_classes_and_paths_are_text(one: str, home: Path):
    found = Page(one)
    assert [row[0] for row in found.rows("scores of each class")[1:]] == NAMES
    assert str(home / "run <i>&") in found.texts("code")
    assert f"dltrain eval '{home / 'run <i>&'}'" in found.texts("pre")[-1]


def test_the_figures_are_those_of_eval(one: str, home: Path, dltrain: Run):
    run = home / "run <i>&"
    scores = json.loads(dltrain("eval", run, "--json").out)
    assert 0.4 < scores["accuracy"] < 0.97  # mistakes, but not by chance
    found = Page(one)
    cells = [[int(cell) for cell in row[1:]] for row in found.rows("confusion matrix")[1:]]
    assert cells == scores["confusion_matrix"]
    shares = ("precision", "recall", "type_1_error", "type_2_error")
    for row, expected in zip(found.rows("scores of each class")[1:], scores["per_class"], strict=True):
        assert row[1:6] == [str(expected["images"]), *(f"{100 * expected[key]:.2f} %" for key in shares)]
    for number, row in enumerate(found.rows("scores of each class")[1:]):
        taken = {NAMES[at]: count for at, count in enumerate(cells[number]) if at != number}
        most = max(taken.values())
        assert row[6] in ([f"{name} ({most})" for name, count in taken.items() if count == most] if most else [""])
    assert f"{100 * scores['calibration_error']:.2f} %" in one
    assert "80 test images, evaluated again for this page" in one
    assert "others than at the end of the run" not in one


def test_results_and_epochs_are_those_of_the_run(one: str, home: Path):
    run = home / "run <i>&"
    summary = json.loads((run / "summary.json").read_text())
    found = Page(one)
    assert found.rows("scores of each split")[1:] == [
        [split, f"{summary[split]['loss']:.4f}", f"{100 * summary[split]['accuracy']:.2f} %"]
        for split in ("test", "val", "train")
    ]
    assert found.texts("dd")[0] == f"{100 * summary['test']['accuracy']:.2f} %"
    assert f"of epoch {summary['chosen_epoch']} of 3, by val accuracy" in found.texts("dd")
    rows = found.rows("scores of each epoch")
    assert rows[0] == ["epoch", "train loss", "train accuracy", "val loss", "val accuracy"]
    records = [record for record in rundir.records(run) if record["kind"] == "epoch"]
    assert [row[3] for row in rows[1:]] == [f"{record['val']['loss']:.4f}" for record in records]
    assert f"epoch {summary['chosen_epoch']} chosen" in one


def test_worst_mistakes_are_the_surest_wrong_ones_with_their_pixels(one: str, home: Path, dltrain: Run):
    dltrain("eval", home / "run <i>&", "--out", "p.csv")
    rows = list(csv.DictReader(io.StringIO(Path("p.csv").read_text())))
    wrong = [row for row in rows if row["correct"] == "0"]
    sure = sorted(wrong, key=lambda row: -max(float(row[f"p_{name}"]) for name in NAMES))[: report.MISTAKES]
    shown = [has for name, has in Page(one).elements if name == "img"]
    assert [has["alt"] for has in shown] == [
        f"test image {row['index']}: {row['true']}, taken for {row['predicted']}" for row in sure
    ]
    images = np.load(home / "data.npz")["x_test"]
    for has, row in zip(shown, sure, strict=True):
        png = base64.b64decode(str(has["src"]).partition(",")[2])
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(png))), images[int(row["index"])])


def test_large_images_are_embedded_smaller():
    photograph = np.full((300, 500, 3), 7, dtype=np.uint8)
    png = base64.b64decode(report._data_uri(photograph, report.SIDE).partition(",")[2])
    assert Image.open(io.BytesIO(png)).size == (96, 58)


def test_several_runs_are_compared(several: str, home: Path):
    found = Page(several)
    rows = found.rows("results of each run")
    assert [row[0] for row in rows[1:]] == [str(home / name) for name in ("run <i>&", "other", "cut off")]
    summary = json.loads((home / "other" / "summary.json").read_text())
    assert rows[0][1:3] == ["test loss", "test accuracy"]
    assert rows[2][1:3] == [f"{summary['test']['loss']:.4f}", f"{100 * summary['test']['accuracy']:.2f} %"]
    assert rows[3][1:7] == ["–"] * 6
    assert rows[3][7:9] == ["3 of 3", "stopped"]
    assert found.rows("settings that differ")[1:] == [["optim.lr", "0.05", "0.001", "0.05"]]
    lines = [has for name, has in found.elements if name == "polyline"]
    curves = Counter(str(has["class"]).split()[1] for has in lines)  # besides, a line of each calibration
    assert curves == {"c0": 5 + 3, "c1": 5, "c2": 5}  # loss and accuracy on train and val, and the learning rate
    assert "pick by val" in several


def test_a_run_that_is_not_finished_says_so_and_leaves_the_test_images_alone(home: Path, dltrain: Run):
    run = home / "cut off"
    done = dltrain("report", run, "--out", "r.html")
    assert (done.code, done.out) == (0, "r.html\n")
    text = Path("r.html").read_text()
    assert "This run is not finished." in text
    assert "its state was: stopped" in " ".join(text.split())
    assert f"dltrain train --resume '{run}'" in Page(text).texts("code")
    assert "30 val images, evaluated again" in text
    assert not re.search(r"\btest (images|accuracy|loss|split)", text)


def test_without_val_an_unfinished_run_is_not_evaluated(dltrain: Run):
    assert (
        dltrain(
            "train", "digits_mlp", "--out", "run", *SMALL, "--set", "data.val=0", "--set", "train.choose_by=last"
        ).code
        == 0
    )
    Path("run/summary.json").unlink()
    assert dltrain("report", "run").code == 0
    text = Path("run/report.html").read_text()
    assert "test images are for the end" in text
    assert "Confusion matrix" not in text


def test_a_run_that_leaves_the_test_images_alone_is_judged_on_val(dltrain: Run):
    assert dltrain("train", "digits_mlp", "--out", "run", *SMALL, "--set", "evaluate.test=false").code == 0
    assert dltrain("report", "run").code == 0
    text = Path("run/report.html").read_text()
    assert "val images, evaluated again" in text
    assert not re.search(r"\btest (images|accuracy|loss|split)", text)


def test_data_that_is_gone_is_said_and_never_downloaded(dltrain: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_mnist(tmp_path / "data")
    more = ("--set", "data.verify=false", "--set", "data.val=5", "--set", "model=perceptron")
    done = dltrain("train", "mnist_mlp", "--out", "run", *SMALL, *more)
    assert done.code == 0, done.err
    (tmp_path / "data").rename(tmp_path / "moved")

    def fetch(*of: object, **settings: object) -> None:
        raise AssertionError("a download was tried")

    monkeypatch.setattr("dltrain.data.files.fetch", fetch)
    done = dltrain("report", "run")
    assert (done.code, done.out) == (0, "run/report.html\n")
    assert "mnist is not in" in done.err
    text = Path("run/report.html").read_text()
    summary = json.loads(Path("run/summary.json").read_text())
    assert "could not be evaluated again" in text
    assert Page(text).rows("scores of each split")[1][1] == f"{summary['test']['loss']:.4f}"
    assert "Confusion matrix" not in text
    notes = dltrain("report", "run", "--data-root", "moved").err.splitlines()
    assert notes[0] == "run: evaluating on test"
    assert len(notes) == len(set(notes))  # each once, though the data is read twice
    assert "Confusion matrix" in Path("run/report.html").read_text()


def test_scores_that_are_others_by_now_are_said(home: Path, tmp_path: Path, dltrain: Run):
    import shutil

    shutil.copytree(home / "other", tmp_path / "copy")
    summary = json.loads(Path("copy/summary.json").read_text())
    summary["test"]["accuracy"] = 0.123
    Path("copy/summary.json").write_text(json.dumps(summary))
    assert dltrain("report", "copy").code == 0
    assert "accuracy 12.30 % then," in Path("copy/report.html").read_text()


def test_a_run_of_another_task_shows_its_scores_and_pictures(dltrain: Run):
    Path("c.yaml").write_text(
        "{data: {name: digits, val: 60}, task: reconstruction, loss: mse, optim: {name: adam, lr: 0.01},"
        " model: {name: autoencoder, encoder: [flatten, linear: 8], decoder: [linear: classes], output: sigmoid}}"
    )
    done = dltrain("train", "c.yaml", "--out", "run", *SMALL)
    assert done.code == 0, done.err
    assert dltrain("report", "run").code == 0
    found = Page(Path("run/report.html").read_text())
    summary = json.loads(Path("run/summary.json").read_text())
    assert found.texts("dd")[0] == f"{summary['test']['psnr']:.2f} dB"
    assert "psnr, dB" in found.texts("figcaption")[1]
    assert "Reconstructions" in found.texts("h2")
    assert "Confusion matrix" not in found.texts("h2")


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("nowhere",), 4, "error: nowhere: holds no run; expected a folder that `dltrain train` has made\n"),
        (("nowhere", "--out", "no/such/r.html"), 6, "error: no/such/r.html: there is no folder no/such\n"),
    ],
)
def test_what_is_no_run_is_refused_in_one_line(dltrain: Run, arguments: tuple[str, ...], code: int, text: str):
    done = dltrain("report", *arguments)
    assert (done.code, done.out, done.err) == (code, "", text)


def test_essential_settings_are_those_that_are_not_at_their_default():
    given: dict[str, Any] = {
        "name": "x",
        "data": {"name": "digits", "val": 0.1, "augment": [{"translate": {"pixels": 2, "pad": "reflect"}}]},
        "model": {"name": "cnn", "layers": ["flatten", {"linear": {"out": "classes"}}]},
        "optim": {"name": "sgd", "lr": 0.3},
    }
    defaults = {
        "seed": 0,
        "loss": {"name": "cross_entropy", "label_smoothing": 0.0},
        "schedule": "constant",
        "train": {"epochs": 10, "clip_norm": None},
    }
    plain = config.from_plain({**given, **defaults}, "test").plain()
    assert report.essential(plain) == given
    assert list(report.essential(plain) or {}) == list(given)
    assert report.essential({**plain, "nonsense": 1}) is None


@pytest.mark.parametrize("name", ["digits_cnn", "cifar10_resnet20", "mnist_autoencoder"])
def test_a_config_of_the_essential_settings_is_the_same_config(name: str):
    plain = config.load(shipped.find(name)).plain()
    kept = report.essential(plain)
    assert config.from_plain(kept or {}, "test").plain() == plain
    assert len(json.dumps(kept)) < 0.7 * len(json.dumps(plain))


def test_reliability_bins_give_the_calibration_error():
    torch.manual_seed(0)
    shares, labels = (2 * torch.randn(500, 4)).softmax(1), torch.randint(4, (500,))
    bins = report.reliability(shares, labels)
    assert sum(each["images"] for each in bins) == 500
    assert all(each["low"] < each["confidence"] <= each["high"] for each in bins)
    error = sum(each["images"] / 500 * abs(each["confidence"] - each["accuracy"]) for each in bins)
    assert error == pytest.approx(metrics.calibration_error(shares, labels), abs=1e-9)


def test_a_matrix_of_many_classes_is_a_picture_with_its_most_frequent_confusions(home: Path):
    torch.manual_seed(0)
    names = [f"kind {number} <u>" for number in range(30)]
    labels = torch.randint(30, (2000,))
    outputs = torch.randn(2000, 30)
    outputs[:, 7] += 2 * (labels == 3)
    outputs[:, 5] += 4 * (labels == 5)
    found = metrics.classification(outputs.softmax(1), labels, names)
    split = Split(torch.zeros(2000, 1, 4, 4, dtype=torch.uint8), labels)
    shown = report.classifier(found, Evaluation(0.0, {}, outputs, labels, 1.0), split, names)
    pairs = Counter(zip(labels.tolist(), outputs.argmax(1).tolist(), strict=True))
    picture = shown["picture"]
    assert {(cell["y"], cell["x"]) for cell in picture["cells"]} == set(pairs)
    assert picture["left_out"] == 0
    confused = Counter({pair: count for pair, count in pairs.items() if pair[0] != pair[1]})
    assert [pair["count"] for pair in picture["pairs"]] == [count for _, count in confused.most_common(20)]
    assert (picture["pairs"][0]["true"], picture["pairs"][0]["predicted"]) == (names[3], names[7])
    judged = {"split": "test", "parameters": 1, "images": 2000, "scores": {"loss": 1.0}, **shown}
    text = Page(report.page([report.read(home / "other")], [judged]))
    assert text.rows("most frequent confusions")[1] == [names[3], names[7], str(confused[3, 7])]
    assert len([name for name, has in text.elements if name == "rect" and has.get("width") == "1"]) == len(pairs)
    assert len(text.rows("scores of each class")) == 11  # the ten that are recognised least, the rest folded


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 100.0, [0, 20, 40, 60, 80, 100]),
        (0.93, 1.01, [0.94, 0.96, 0.98, 1.0]),
        (-3.0, 3.0, [-3, -2, -1, 0, 1, 2, 3]),
    ],
)
def test_linear_ticks(low: float, high: float, expected: list[float]):
    assert chart.linear_ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.3, 12.0, [0.5, 1, 2, 5, 10]),
        (0.002, 150.0, [0.01, 0.1, 1, 10, 100]),
        (1e-12, 1.0, [1e-12, 1e-9, 1e-6, 1e-3, 1]),
    ],
)
def test_log_ticks(low: float, high: float, expected: list[float]):
    assert chart.log_ticks(low, high) == pytest.approx(expected)


def test_epochs_have_no_ticks_between_them():
    found = chart.chart("loss", "epoch", [chart.Line("val", [(1, 3.0), (2, 2.0), (3, 1.0)])])
    assert found
    assert [tick["text"] for tick in found["x_ticks"]] == ["1", "2", "3"]


def test_points_lie_where_the_axes_say():
    line = chart.Line("val", [(1, 1.0), (2, 100.0), (3, math.nan), (4, 10.0)], marked=4)
    found = chart.chart("loss", "epoch", [line], log=True, mark=(4, "here"))
    assert found
    assert found["log"]
    (points,) = [each["points"] for each in found["lines"]]
    width, height = chart.WIDTH - chart.LEFT - chart.RIGHT, chart.HEIGHT - chart.TOP - chart.BOTTOM
    assert [x for x, _ in points] == pytest.approx([chart.LEFT + share * width for share in (0, 1 / 3, 1)], abs=0.1)
    bottom, top, middle = (y for _, y in points)
    assert bottom > middle > top  # y grows downwards
    assert middle == pytest.approx((bottom + top) / 2, abs=0.1)  # 10 is half way from 1 to 100
    assert chart.TOP < top < bottom < chart.TOP + height
    assert found["mark"]["x"] == points[-1][0]
    assert found["lines"][0]["marked"] == points[-1]
    assert [column["text"] for column in found["columns"]] == [
        ["epoch 1", "val: 1"],
        ["epoch 2", "val: 100"],
        ["epoch 4", "val: 10"],
    ]
    assert sum(column["width"] for column in found["columns"]) == pytest.approx(width, abs=0.5)


def test_one_epoch_and_a_constant_are_drawn_and_nothing_is_not():
    found = chart.chart("accuracy", "epoch", [chart.Line("val", [(1, 100.0)])], unit="%", bounds=(0, 100))
    assert found
    ((x, y),) = found["lines"][0]["points"]
    assert (x, y) == (chart.LEFT + (chart.WIDTH - chart.LEFT - chart.RIGHT) / 2, chart.TOP)
    assert chart.chart("loss", "epoch", [chart.Line("val", [])]) is None
    assert chart.chart("loss", "epoch", [chart.Line("val", [(1, math.inf)])]) is None


def test_thinning_keeps_both_ends():
    assert chart.thinned(range(10), 20) == list(range(10))
    assert chart.thinned(range(10), 4) == [0, 3, 6, 9]
    assert chart.thinned(range(11), 4) == [0, 3, 6, 9, 10]
    assert chart.thinned([], 4) == []


def colours() -> list[tuple[str, dict[str, str]]]:
    """The colours by name that the style sheet has for light, dark and print."""
    found = []
    for block in re.findall(r":root \{(.*?)\}", (PACKAGE / "report.css").read_text(), flags=re.DOTALL):
        found.append(dict(re.findall(r"--(\w+): #([0-9a-f]{6})", block)))
    assert len(found) == 3
    return list(zip(("light", "dark", "print"), found, strict=True))


def contrast(one: str, other: str) -> float:
    """WCAG 2.2: (L1 + 0.05) / (L2 + 0.05) of the relative luminances."""

    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(("scheme", "named"), colours(), ids=[scheme for scheme, _ in colours()])
def test_text_and_curves_stand_out(scheme: str, named: dict[str, str]):
    for ink in ("ink", "soft"):
        for ground in ("paper", "card"):
            assert contrast(named[ink], named[ground]) >= 4.5, (scheme, ink, ground)
    for tint in ("hit", "miss"):
        assert contrast(named["ink"], named[tint]) >= 4.5, (scheme, tint)
    for number in range(8):
        assert contrast(named[f"c{number}"], named["paper"]) >= 3, (scheme, number)
    assert contrast(named["c0"], named["paper"]) >= 4.5  # of links
