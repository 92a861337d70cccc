"""Predictions of image files: the same as those of `eval`, shown as tables, JSON and pictures."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Run
from image_files import draw, noise, pets
from PIL import Image, ImageOps

from dltrain import cli, figures, predict, trained
from dltrain.errors import CheckpointError, DataError
from dltrain.trained import Trained

PAGE = Path(__file__).parent.parent / "docs" / "predict.md"
ONE_OUTPUT = ("--set", "loss=bce", "--set", "data.classes=[3, 8]", "--set", "model.output=sigmoid")
VIEWS = "evaluate.views=[{}, {shift: [1, 0]}, {mirror: true, weight: 0.5}]"


def train(folder: Path, *arguments: str) -> Path:
    settings = ("--set", "train.epochs=1", "--set", "train.device=cpu")
    assert cli.run(["train", *arguments, *settings, "--out", str(folder), "-q"]) == 0
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Trained on digits, a network in bf16 and a perceptron, and one that has one output for two classes."""
    home = tmp_path_factory.mktemp("runs")
    return {
        "bf16": train(home / "bf16", "digits_cnn", "--set", "train.precision=bf16", "--set", "data.limit=300"),
        "perceptron": train(home / "perceptron", "digits_mlp", "--set", "model=perceptron"),
        "views": train(home / "views", "digits_mlp", "--set", "model=perceptron", "--set", VIEWS),
        "one output": train(home / "one", "digits_mlp", *ONE_OUTPUT),
    }


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test images of `digits`, 8x8 gray, as PNGs whose names are in the split's order."""
    from dltrain.data.digits import digits
    from dltrain.data.files import Files

    folder = tmp_path_factory.mktemp("digits")
    for number, image in enumerate(digits(Files(folder)).test.images):
        Image.fromarray(image[0].numpy()).save(folder / f"{number:03}.png")
    return folder


def load(path: Path) -> Trained:
    return trained.load(path, "cpu", print)


def run(model: Trained, *paths: Path, **changes: Any) -> predict.Predictions:
    return predict.predict(model, predict.find(paths), **{"fit": None, "invert": False, "report": print} | changes)


# The same as eval


@pytest.mark.parametrize("kind", ["bf16", "perceptron", "views"])
def test_the_test_images_as_files_get_the_predictions_of_eval(dltrain: Run, runs, digits, kind) -> None:
    assert dltrain("eval", runs[kind], "--out", "rows.csv").code == 0
    rows = list(csv.DictReader(Path("rows.csv").read_text().splitlines()))
    found = json.loads(dltrain("predict", runs[kind], digits, "--json", "--top", 10).out)
    assert [Path(each["file"]).name for each in found["images"]] == [f"{number:03}.png" for number in range(359)]
    assert found["unreadable"] == {}
    for row, image in zip(rows, found["images"], strict=True):
        assert image["predicted"] == image["top"][0]["class"] == row["predicted"]
        assert {f"p_{each['class']}": f"{each['probability']:.6g}" for each in image["top"]} == {
            key: share for key, share in row.items() if key.startswith("p_")
        }
        likely = [each["probability"] for each in image["top"]]
        assert likely == sorted(likely, reverse=True)
    model = load(runs[kind])
    assert torch.equal(run(model, digits).outputs, trained.judge(model, "test", None, print)[1].outputs)


def test_views_are_averaged_and_said(dltrain: Run, runs, digits) -> None:
    with_views, without = load(runs["views"]), load(runs["perceptron"])
    found, plain = run(with_views, digits), run(without, digits)
    assert not torch.allclose(found.outputs, plain.outputs)
    assert torch.equal(found.images, plain.images)
    shifted = torch.cat([plain.images[:, :, 1:2], plain.images[:, :, :-1]], 2)
    seen = [plain.images, shifted, plain.images.flip(3)]
    with torch.inference_mode():
        first, second, third = (without.model(without.normalise(images)) for images in seen)
    torch.testing.assert_close(found.outputs[: len(first)], (2 * first + 2 * second + third) / 5)
    assert json.loads(dltrain("predict", runs["views"], digits, "--json").out)["views"] == 3
    assert "by val_loss, 3 views of each image\n" in dltrain("predict", runs["views"], digits).out
    assert "views" not in json.loads(dltrain("predict", runs["perceptron"], digits, "--json").out)


COLOUR = """
data: {name: folder, root: ., path: pets, size: [8, 6], fit: pad, val: 2}
model: {name: mlp, hidden: [8]}
descent: {batch_size: 2}
optim: {name: sgd, lr: 0.1}
"""


@pytest.fixture
def colour(dltrain: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Trained on an image folder, ./pets, whose files are 6x4 in colour."""
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name: tmp_path / "cache" / name)
    pets(tmp_path, each=4)
    Path("c.yaml").write_text(COLOUR)
    return train(Path("run"), "c.yaml")


def test_a_model_of_an_image_folder_sees_files_as_its_folder_did(colour) -> None:
    model = load(colour)
    found = run(model, Path("pets/test/cat"), Path("pets/test/dog"))
    assert (found.fit, found.images.shape) == ("pad", (8, 3, 8, 6))
    assert torch.equal(found.outputs, trained.judge(model, "test", None, print)[1].outputs)
    stretched = run(model, Path("pets/test/cat/0.png"), fit="stretch")
    by_hand = Image.open("pets/test/cat/0.png").resize((6, 8), Image.Resampling.BILINEAR)
    assert np.array_equal(stretched.images[0].permute(1, 2, 0), np.asarray(by_hand))


def test_gray_becomes_colour_for_a_model_of_colour_and_the_reverse(colour, runs, tmp_path) -> None:
    gray, red = draw(tmp_path / "gray.png", noise(0, 8, 6, 1)), draw(tmp_path / "c.png", noise(0, 8, 8))
    assert run(load(colour), gray).images[0].tolist() == [noise(0, 8, 6, 1)[:, :, 0].tolist()] * 3
    luma = np.asarray(Image.open(red).convert("L"))
    assert np.array_equal(run(load(runs["perceptron"]), red).images[0, 0], luma)


def test_one_output_gives_the_probabilities_of_both_classes(dltrain: Run, runs, digits) -> None:
    dltrain("eval", runs["one output"], "--out", "rows.csv")
    rows = list(csv.DictReader(Path("rows.csv").read_text().splitlines()))
    from dltrain.data.digits import digits as read
    from dltrain.data.files import Files

    labels = read(Files(digits)).test.labels.tolist()
    files = [digits / f"{number:03}.png" for number, label in enumerate(labels) if label in (3, 8)]
    found = json.loads(dltrain("predict", runs["one output"], *files, "--json").out)
    assert {row["predicted"] for row in rows} == {"3", "8"}
    for row, image in zip(rows, found["images"], strict=True):
        shares = {each["class"]: f"{each['probability']:.6g}" for each in image["top"]}
        assert shares == {"3": row["p_3"], "8": row["p_8"]}
        assert image["predicted"] == image["top"][0]["class"] == row["predicted"]


def test_results_do_not_depend_on_batches(runs, digits, monkeypatch, tmp_path) -> None:
    model = load(runs["perceptron"])
    whole = run(model, digits)
    broken = [draw(tmp_path / f"{number}.png", b"") for number in range(4)]
    files = sorted(digits.glob("*.png"))[:30]
    monkeypatch.setattr(predict, "BATCH", 3)
    found = run(model, *broken[:3], *files[:2], broken[3], *files[2:])  # a batch of broken files, and one with one
    assert found.files == files
    torch.testing.assert_close(found.outputs, whole.outputs[:30])
    assert torch.equal(found.images, whole.images[:30])
    assert list(found.unreadable) == broken


@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_inversion_takes_dark_for_light_and_leaves_bars_black(runs, tmp_path, fit) -> None:
    light = Image.fromarray(noise(0, 16, 32, 1)[:, :, 0])
    on_paper = draw(tmp_path / "paper.png", ImageOps.invert(light))
    model = load(runs["perceptron"])
    found = run(model, on_paper, fit=fit, invert=True)
    straight = run(model, draw(tmp_path / "light.png", light), fit=fit)
    assert (found.images.int() - straight.images.int()).abs().max() <= 1  # of the rounding while it is resized
    assert not torch.equal(run(model, on_paper, fit=fit).images, found.images)
    assert bool(found.images[0, 0, 0].any()) == (fit == "crop")


# Which classes


def predictions(outputs: list[list[float]]) -> predict.Predictions:
    files = [Path(f"{number}.png") for number in range(len(outputs))]
    return predict.Predictions(files, torch.tensor(outputs), torch.empty(0), {}, "crop", False)


@pytest.mark.parametrize(
    ("outputs", "top", "expected"),
    [
        ([1.0, 3.0, 2.0], 3, [("b", 0.6652), ("c", 0.2447), ("a", 0.0900)]),
        ([1.0, 3.0, 2.0], 1, [("b", 0.6652)]),
        ([1.0, 3.0, 2.0], 9, [("b", 0.6652), ("c", 0.2447), ("a", 0.0900)]),
        ([2.0, 2.0, 2.0], 2, [("a", 0.3333), ("b", 0.3333)]),  # as argmax breaks ties
        ([-1.0], 3, [("a", 0.7311), ("b", 0.2689)]),
        ([1.0], 1, [("b", 0.7311)]),
        ([0.0], 3, [("a", 0.5), ("b", 0.5)]),
        ([1e-9], 3, [("b", 0.5), ("a", 0.5)]),  # more than nothing, though it is half
    ],
)
def test_the_likeliest_classes_by_hand(runs, outputs, top, expected) -> None:
    model = dataclasses.replace(load(runs["perceptron"]), classes=("a", "b", "c"))
    (row,) = predict.plain(model, predictions([outputs]), top)["images"]
    assert [(each["class"], round(each["probability"], 4)) for each in row["top"]] == expected
    assert row["predicted"] == expected[0][0]


# Saliency


@pytest.mark.parametrize("kind", ["perceptron", "views"])
def test_the_saliency_of_a_linear_model_is_its_weights(runs, digits, kind) -> None:
    model = load(runs[kind])
    found = run(model, digits)
    weights = dict(model.model.named_parameters())
    (matrix,) = [each for each in weights.values() if each.ndim == 2]
    expected = matrix[found.outputs.argmax(1)].detach().abs().view(-1, 8, 8)
    maps = predict.saliency(model, found)
    assert (maps.shape, maps.dtype) == ((60, 8, 8), torch.float32)  # as many as have room in a picture
    torch.testing.assert_close(maps, expected[:60])


def test_saliency_is_the_largest_of_the_channels_and_of_the_image_alone(colour) -> None:
    model = load(colour)
    found = run(model, Path("pets"))
    maps = predict.saliency(model, found)
    for image, outputs, each in zip(found.images, found.outputs, maps, strict=True):
        alone = model.normalise(image[None]).requires_grad_()
        (gradient,) = torch.autograd.grad(model.model(alone)[0, int(outputs.argmax())], alone)
        torch.testing.assert_close(each, torch.stack([channel.abs() for channel in gradient[0]]).max(0).values)
    assert all(parameter.grad is None for parameter in model.model.parameters())


def test_saliency_of_a_bf16_model_is_computed_in_fp32(runs, digits) -> None:
    model = load(runs["bf16"])
    found = run(model, *sorted(digits.glob("00*.png")))
    assert torch.equal(found.outputs, found.outputs.bfloat16().float())  # its predictions are of bf16
    maps = predict.saliency(model, found)
    inputs = model.normalise(found.images).double().requires_grad_()
    model.model.double()(inputs).gather(1, found.outputs.argmax(1, keepdim=True)).sum().backward()
    torch.testing.assert_close(maps.double(), inputs.grad.abs().amax(1), rtol=1e-4, atol=1e-6)


def test_saliency_of_one_output_is_the_same_for_both_classes(runs, digits) -> None:
    model = load(runs["one output"])
    found = run(model, *sorted(digits.glob("00*.png")))
    inputs = model.normalise(found.images).requires_grad_()
    model.model(inputs).sum().backward()
    assert set((found.outputs[:, 0] > 0).tolist()) == {True, False}
    torch.testing.assert_close(predict.saliency(model, found), inputs.grad.abs().amax(1))


# The picture


def likely(**shares: float) -> list[dict[str, Any]]:
    return [{"class": name.replace("_", " "), "probability": share} for name, share in shares.items()]


def test_captions_by_hand() -> None:
    rows = [
        {"file": "a/b/seven.png", "top": likely(seven=0.98765, nine=0.01)},
        {"file": "twenty-four-letters1.png", "top": []},
        {"file": "twenty-four-letters+1.png", "top": []},
        {"file": "a/" + "x" * 20 + "\n" + "y" * 20 + ".png", "top": likely(a_class_of_a_very_long_name=1.0)},
    ]
    assert predict.captions(rows) == [
        ["seven.png", "seven: 98.8 %", "nine: 1.0 %"],
        ["twenty-four-letters1.png"],
        ["twenty-four…etters+1.png"],
        ["x" * 11 + "…" + "y" * 8 + ".png", "a class…ng name: 100.0 %"],
    ]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("with_maps", [False, True])
@pytest.mark.parametrize("count", [1, 2, 7, 60])
def test_the_picture_shows_each_image_above_its_caption(monkeypatch, channels, with_maps, count) -> None:
    monkeypatch.setattr(figures, "_png", lambda figure: figure)
    images = torch.from_numpy(np.stack([noise(n, 9, 5, channels).transpose(2, 0, 1) for n in range(count)]))
    maps = torch.rand(count, 9, 5) if with_maps else None
    captions = [[f"$file_{number}", f"class {number}"] for number in range(count)]
    figure = figures.predictions_picture(images, captions, maps)
    step = 2 if with_maps else 1
    assert len(figure.axes) == step * count
    assert [text.get_text() for text in figure.texts] == [line for caption in captions for line in caption]
    assert not any(text.get_parse_math() for text in figure.texts)
    boxes = [axes.get_position() for axes in figure.axes]
    for number in range(count):
        drawn = figure.axes[step * number].images[0]
        assert np.array_equal(drawn.get_array().squeeze(), images[number].permute(1, 2, 0).squeeze())
        if channels == 1:
            assert drawn.get_clim() == (0, 255)
        name, predicted = figure.texts[2 * number : 2 * number + 2]
        left, right = boxes[step * number].x0, boxes[step * number + step - 1].x1
        assert name.get_position()[0] == pytest.approx((left + right) / 2)
        assert boxes[step * number].y0 > name.get_position()[1] > predicted.get_position()[1] > 0
        if with_maps:
            drawn = figure.axes[2 * number + 1].images[0]
            assert np.array_equal(drawn.get_array(), maps[number])
            assert drawn.get_clim() == (0, maps[number].max())
            assert boxes[2 * number + 1].x0 == pytest.approx(boxes[2 * number].x1)
            assert boxes[2 * number + 1].y0 == pytest.approx(boxes[2 * number].y0)
    below = [y for y in (box.y1 for box in boxes) if y < boxes[0].y0]
    assert all(text.get_position()[1] > max(below, default=0) for text in figure.texts[:2])  # of the first row
    assert all(0 <= edge <= 1 for box in boxes for edge in box.extents)


@pytest.mark.parametrize("with_maps", [False, True])
@pytest.mark.parametrize(("height", "width"), [(100, 4), (4, 100), (8, 8)])
def test_a_picture_of_long_images_stays_of_a_size_to_be_looked_at(monkeypatch, height, width, with_maps) -> None:
    monkeypatch.setattr(figures, "_png", lambda figure: figure)
    maps = torch.zeros(60, height, width) if with_maps else None
    images = torch.zeros(60, 1, height, width, dtype=torch.uint8)
    figure = figures.predictions_picture(images, [["w", "x", "y", "z"]] * 60, maps)
    assert all(8 <= inches <= 50 for inches in figure.get_size_inches())


def test_letters_that_the_font_has_not_are_drawn_as_boxes(recwarn) -> None:
    png = figures.predictions_picture(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), [["漢字.png", "あ: 99.0 %"]])
    assert Image.open(io.BytesIO(png)).format == "PNG"
    assert not recwarn.list


def test_the_command_draws_what_the_model_sees(dltrain: Run, runs, tmp_path) -> None:
    draw(tmp_path / "one.png", np.full((9, 9, 1), 55, np.uint8))
    done = dltrain("predict", runs["perceptron"], "one.png", "--invert", "--out", "seen.png")
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[-1] == "picture: seen.png"
    seen = np.asarray(Image.open("seen.png").convert("RGB"))
    assert (seen == 200).all(2).sum() > 150**2


def test_a_picture_of_many_images_shows_the_first_and_says_so(dltrain: Run, runs, digits) -> None:
    done = dltrain("predict", runs["perceptron"], digits, "--out", "seen.png", "--saliency", "--json")
    assert done.code == 0
    assert done.err == "seen.png: shows the first 60 of 359 images\n"
    assert json.loads(done.out)["picture"] == "seen.png"


# The table


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_the_table_fits_the_terminal(dltrain: Run, runs, digits, monkeypatch, columns) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.chdir(digits)
    done = dltrain("predict", runs["perceptron"], *(f"{number:03}.png" for number in range(9)))
    found = json.loads(dltrain("predict", runs["perceptron"], "008.png", "--json").out)
    (line,) = [line for line in done.out.splitlines() if "008.png" in line]
    first, *others = [f"{each['class']} {100 * each['probability']:.2f} %" for each in found["images"][0]["top"]]
    if columns == 40:
        assert line.split() == ["008.png", *first.split()]
    else:
        assert re.split(" {2,}", line.strip()) == ["008.png", *first.split(" ", 1), ", ".join(others)]
    assert all(len(line) <= columns for line in done.out.splitlines()[1:])
    assert str(runs["perceptron"]) in done.out.splitlines()[0]


def test_the_likeliest_class_alone_needs_no_more_columns(dltrain: Run, runs, digits) -> None:
    done = dltrain("predict", runs["perceptron"], digits / "000.png", "--top", 1)
    assert "then" not in done.out
    assert done.out.count("%") == 1


def test_names_of_files_are_text(dltrain: Run, runs, tmp_path) -> None:
    for name in (b"[red]x.png", b"new\nline.png", b"\xff\x1b[2J.png"):
        draw(Path(os.fsdecode(os.fsencode(tmp_path) + b"/in/" + name)), noise(0))
    done = dltrain("predict", runs["perceptron"], "in", "--out", "seen.png")
    assert done.code == 0
    for name in ("in/[red]x.png", "in/new\\nline.png", "in/\\udcff\\x1b[2J.png"):
        assert name in done.out
    files = [each["file"] for each in json.loads(dltrain("predict", runs["perceptron"], "in", "--json").out)["images"]]
    assert all(Path(file).exists() for file in files)


# Which files


def test_folders_give_their_images_and_files_themselves(tmp_path) -> None:
    for name in ("b/2.png", "b/1.JPG", "b/c/0.gif", "b/.hidden.png", "b/notes.txt", "a", "z.png"):
        draw(tmp_path / name, b"")
    found = predict.find([tmp_path / "z.png", tmp_path / "b", tmp_path / "a", tmp_path / "z.png"])
    assert found == [tmp_path / name for name in ("z.png", "b/1.JPG", "b/2.png", "b/c/0.gif", "a", "z.png")]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.png", "{home}/absent.png: No such file or directory; give image files, or folders of them"),
        ("new\nline", "{home}/new\\nline: No such file or directory"),
        ("a\0b", "{home}/a\\x00b: "),
        ("empty", "{home}/empty: no images (.png, .jpg, .jpeg, .bmp, .webp, .gif) in this folder or below it"),
        ("pipe.png", "{home}/pipe.png: neither a file nor a folder"),
    ],
)
def test_what_is_no_image_is_named(tmp_path, name, message) -> None:
    draw(tmp_path / "empty/notes.txt", b"")
    os.mkfifo(tmp_path / "pipe.png")  # to open it would wait for ever
    with pytest.raises(DataError) as caught:
        predict.find([tmp_path / name])
    assert str(caught.value).startswith(message.format(home=tmp_path))
    assert "\n" not in str(caught.value)


# What goes wrong


def test_of_many_images_the_readable_ones_are_predicted_and_the_others_named(dltrain: Run, runs, tmp_path) -> None:
    draw(tmp_path / "in/good.png", noise(0))
    draw(tmp_path / "in/bad.png", b"")
    done = dltrain("predict", runs["perceptron"], "in", "--json")
    found = json.loads(done.out)
    assert [each["file"] for each in found["images"]] == ["in/good.png"]
    assert found["unreadable"] == {"in/bad.png": "not one of PNG, JPEG, BMP, WEBP, GIF"}
    assert (done.code, done.err) == (
        3,
        "error: in/bad.png: not a readable image: not one of PNG, JPEG, BMP, WEBP, GIF\n",
    )
    assert "in/good.png" in dltrain("predict", runs["perceptron"], "in").out


def test_of_very_many_unreadable_images_ten_are_named(dltrain: Run, runs, tmp_path) -> None:
    for number in range(10, 22):
        draw(tmp_path / f"in/{number}.png", b"")
    done = dltrain("predict", runs["perceptron"], "in", "--json", "--out", "seen.png")
    lines = done.err.splitlines()
    assert (done.code, done.out, len(lines)) == (3, "", 11)
    assert lines[9].startswith("error: in/19.png: not a readable image: ")
    assert lines[10] == "error: 2 more files cannot be read; --json names all of them"
    assert not Path("seen.png").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["RUN", "absent.png"], 3, "absent.png: No such file"),
        (["absent", "one.png"], 4, "absent: no such file or folder"),
        (["one.png", "one.png"], 4, "one.png: "),
        (["RUN"], 2, "IMAGE"),
        (["RUN", "one.png", "--top", "0"], 2, "top"),
        (["RUN", "one.png", "--fit", "squash"], 2, "--fit squash: expected crop, pad, stretch"),
        (["RUN", "one.png", "--saliency"], 2, "--saliency is part of a picture: give its name by --out PICTURE.png"),
        (["RUN", "one.png", "--out", "rows.csv"], 2, "--out rows.csv: expected a name that ends in .png"),
        (["RUN", "one.png", "--out", "no/x.png"], 6, "no/x.png: there is no folder no"),
        (["RUN", "one.png", "--device", "cuda:99"], 5, "check-gpu"),
    ],
)
def test_mistakes_have_their_exit_codes_and_a_line(dltrain: Run, runs, tmp_path, arguments, code, message) -> None:
    draw(tmp_path / "one.png", noise(0))
    done = dltrain("predict", *(runs["perceptron"] if each == "RUN" else each for each in arguments))
    assert (done.code, done.out, len(done.err.splitlines())) == (code, "", 1)
    assert message in done.err


def test_outputs_that_are_not_finite_are_refused(runs, digits) -> None:
    model = load(runs["perceptron"])
    with torch.no_grad():
        next(model.model.parameters()).fill_(float("nan"))
    with pytest.raises(CheckpointError, match=r"best\.safetensors: its outputs for .*/000\.png are not finite"):
        run(model, digits)


def test_a_model_of_two_channels_takes_no_files(runs, digits) -> None:
    model = dataclasses.replace(load(runs["perceptron"]), shape=(2, 8, 8))
    with pytest.raises(CheckpointError, match="takes images of 2 channels, and a file gives 1 or 3"):
        run(model, digits)


def test_the_page_shows_commands_that_run(dltrain: Run, runs, digits, tmp_path) -> None:
    (block,) = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for name in ("scans/one.png", "scans/more/two.png", "three.png"):
        draw(tmp_path / name, noise(0, 30, 20))
    Path("runs").mkdir()
    Path("runs/digits").symlink_to(runs["perceptron"])
    commands = [shlex.split(line, comments=True) for line in block.splitlines()]
    assert len(commands) == 5
    for command in commands:
        done = dltrain(*command[1:])
        assert (done.code, done.err) == (0, ""), command
