"""Exported models: run by onnxruntime and torch.export.load alone, they say what `dltrain eval` says."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import importlib.util
import io
import json
import re
import shlex
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run
from image_files import draw, noise
from test_layers import SAMPLES, build
from torch import nn

import dltrain as package
from dltrain import checkpoint, cli, config, export, shipped
from dltrain.build import build_model, task_of
from dltrain.data.batches import Normalise
from dltrain.data.files import Files
from dltrain.data.prepare import Normalisation
from dltrain.device import place
from dltrain.errors import CheckpointError, ConfigError
from dltrain.trained import Trained

PAGE = Path(__file__).parent.parent / "docs" / "export.md"
VIEWS = "evaluate.views=[{}, {shift: [1, -1]}, {mirror: true, weight: 0.5}]"
BOTH = pytest.mark.parametrize("format", ["onnx", "torch"])
DIGITS = {"data": "digits", "optim": {"name": "sgd", "lr": 0.1}}


@pytest.fixture(autouse=True)
def _no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DLTRAIN_DATA", str(tmp_path / "data"))


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained on digits, in bf16, and evaluated over views."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    settings = ["model=perceptron", VIEWS, "train.epochs=1", "train.device=cpu"]
    settings = [part for each in settings for part in ("--set", each)]
    assert cli.run(["train", "digits_mlp", *settings, "--out", str(folder), "-q"]) == 0
    return folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> torch.Tensor:
    """The test images, uint8 [359, 1, 8, 8]."""
    from dltrain.data.digits import digits

    return digits(Files(tmp_path_factory.mktemp("none"))).test.images


def untrained(settings: dict[str, Any] | str, classes: int = 10, shape: tuple[int, int, int] = (1, 8, 8)) -> Trained:
    """The model of a config, its weights drawn from the seed, as if it had been read from x.safetensors."""
    if isinstance(settings, str):
        loaded = config.load(shipped.find(settings))
    else:
        loaded = config.from_plain({"name": "x", **DIGITS, **settings}, "x")
    model = build_model(loaded, shape, classes).eval()
    placement = place("cpu", "fp32", "auto", model)
    placement.take(model)
    normalise = Normalise(Normalisation([0.3] * shape[0], [0.2] * shape[0]), placement.device, placement.memory_format)
    names = tuple(f"class {number}" for number in range(classes))
    task = task_of(loaded, shape, classes)
    return Trained(Path("x.safetensors"), loaded, model, task, names, shape, normalise, placement, {}, 3, "last")


def opened(path: Path) -> tuple[Callable[[torch.Tensor], torch.Tensor], dict[str, Any]]:
    """What a file computes and what it says, by what its users have."""
    if path.suffix == ".pt2":
        files = {"dltrain.json": ""}
        model = torch.export.load(path, extra_files=files).module()
        return model, json.loads(files["dltrain.json"])
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    ((name, shape),) = ((each.name, each.shape) for each in session.get_inputs())
    assert (name, shape[0]) == ("images", "batch")
    texts = session.get_modelmeta().custom_metadata_map
    plain = {"name", "task", "output", "chosen_by", "dltrain", "torch"}
    about = {key: text if key in plain else json.loads(text) for key, text in texts.items()}
    assert [(each.name, each.shape[0]) for each in session.get_outputs()] == [(about["output"], "batch")]
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), about


@pytest.fixture(scope="module")
def said(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What each command of the page prints; they are run in a folder where `runs/digits` is the run."""
    (block,) = blocks("bash")
    home = tmp_path_factory.mktemp("home")
    (home / "runs").mkdir()
    (home / "runs" / "digits").symlink_to(run_folder)
    printed = []
    with contextlib.chdir(home), pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "100")
        for line in block.splitlines():
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                assert cli.run(shlex.split(line, comments=True)[1:]) == 0
            assert err.getvalue() == ""
            printed.append(out.getvalue())
        assert Path("digits.pt2").read_bytes() == (run_folder / "best.pt2").read_bytes()
    return printed


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", ["best.onnx", "best.pt2"])
def test_a_file_says_what_eval_says(
    dltrain: Run, run_folder: Path, said: list[str], digits: torch.Tensor, name
) -> None:
    assert dltrain("eval", run_folder, "--out", "rows.csv").code == 0
    run, about = opened(run_folder / name)
    rows = list(csv.DictReader(Path("rows.csv").read_text().splitlines()))
    shares = torch.tensor([[float(row[f"p_{number}"]) for number in range(10)] for row in rows])
    for images, expected in ((digits, shares), (digits[:1], shares[:1])):
        outputs = run(images)
        assert (outputs.dtype, outputs.requires_grad) == (torch.float32, False)
        torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-6)  # a CSV's numbers have six digits
    _, meta = checkpoint.read(run_folder / "best.safetensors")
    assert about["mean"] == pytest.approx(meta["normalisation"]["mean"], rel=1e-6)
    assert about["std"] == pytest.approx(meta["normalisation"]["std"], rel=1e-6)
    assert (about["classes"], about["shape"]) == (meta["classes"], meta["shape"])
    assert (about["name"], about["step"], about["views"]) == ("digits_mlp", meta["step"], 3)
    assert (about["dltrain"], about["chosen_by"]) == (package.__version__, "val_loss")
    content = (run_folder / name).read_bytes()
    for source in (package.__file__, torch.__file__, __file__):
        assert str(Path(source).parent).encode() not in content
    assert b"pkg.torch" not in content  # what torch.onnx says of each node


def test_the_terminal_and_json_say_what_was_written(run_folder: Path, said: list[str]) -> None:
    assert "input: images, uint8 [batch, 1, 8, 8]\noutput: probabilities, float32 [batch, 10]\n" in said[0]
    assert "3 views of each image" in said[0]
    assert re.search(r"checked on 100 digits test images: .* at most \S+, 0 of the predictions differ\n", said[0])
    assert said[0].endswith("file: runs/digits/best.onnx (0.0 MB)\n")
    found = json.loads(said[2])
    assert (found["file"], found["format"], found["views"]) == ("digits.pt2", "torch", 3)
    assert found["bytes"] == (run_folder / "best.pt2").stat().st_size
    assert found["input"] == {"name": "images", "dtype": "uint8", "shape": ["batch", 1, 8, 8]}
    assert found["output"] == {"name": "probabilities", "dtype": "float32", "shape": ["batch", 10]}
    check = found["check"]
    assert (check["images"], check["of"], check["why_random"]) == (100, "digits test", None)
    assert check["different_predictions"] == 0
    assert 0 <= check["largest_difference"] < 1e-5 < check["tolerance"]


def test_bf16_is_exported_as_fp32(tmp_path: Path, digits: torch.Tensor) -> None:
    model = untrained({"model": {"name": "mlp", "hidden": [8]}, "train": {"precision": "bf16"}})
    export.export(model, "torch", tmp_path / "x.pt2")
    exact = model.model.double()((digits.double() / 255 - 0.3) / 0.2).softmax(1)
    torch.testing.assert_close(opened(tmp_path / "x.pt2")[0](digits).double(), exact, rtol=0, atol=1e-6)


def test_a_sigmoid_gives_the_probabilities_of_both_classes(tmp_path: Path, digits: torch.Tensor) -> None:
    settings = {
        "model": {"name": "perceptron", "output": "sigmoid"},
        "loss": "bce",
        "data": {"name": "digits", "classes": [3, 8]},
    }
    model = untrained(settings, classes=2)
    found = export.export(model, "torch", tmp_path / "x.pt2")
    positive = model.model(model.normalise(digits)).sigmoid()
    torch.testing.assert_close(opened(tmp_path / "x.pt2")[0](digits), torch.cat([1 - positive, positive], 1))
    assert found["output"]["shape"] == ["batch", 2]


LARGEST = [({"globalpool": {"kind": "max"}}, shape, shape[:1]) for shape in ((4, 6), (4, 6, 6), (4, 2, 6, 4))]
LAYERS = [*SAMPLES, *LARGEST]


class Every(nn.Module):
    """Each layer and activation on its part of x `[B, 300]`, beside each other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.each = nn.ModuleList([build(written, shape) for written, shape, _ in LAYERS])

    def parts(self, x: torch.Tensor) -> list[torch.Tensor]:
        shapes = [shape for _, shape, _ in LAYERS]
        return [
            module(x[:, : prod(shape)].view(-1, *shape)).flatten(1)
            for module, shape in zip(self.each, shapes, strict=True)
        ]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat(self.parts(x), 1)


@pytest.mark.soak
@BOTH
def test_every_layer_and_activation_goes_into_each_format(format: str) -> None:
    every = Every().eval().requires_grad_(False)
    x = torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
    _, run = export.written(every, (x[:2],), export.FORMATS[format], {})
    expected = every.parts(x)
    found = run(x).split([part.shape[1] for part in expected], 1)
    for (written, shape, _), one, other in zip(LAYERS, found, expected, strict=True):
        torch.testing.assert_close(
            one, other, rtol=1e-5, atol=1e-5, msg=lambda text, at=(written, shape): f"{at}: {text}"
        )


CONFIGS = [
    ("mnist_lenet5", "onnx", (1, 28, 28)),  # with sums as poolings, whose divisor torch.onnx passes over
    ("digit_lines_ctc", "torch", (1, 36, 120)),
    ("mnist_autoencoder", "torch", (1, 28, 28)),
    pytest.param("moving_mnist_conv3d", "onnx", (8, 28, 28), marks=pytest.mark.soak),
]


@pytest.mark.parametrize(("name", "format", "shape"), CONFIGS)
def test_a_config_of_each_task_is_exported(tmp_path: Path, name: str, format: str, shape: tuple[int, int, int]) -> None:
    model = untrained(name, shape=shape)
    path = tmp_path / f"x{export.FORMATS[format].suffix}"
    found = export.export(model, format, path)
    images = torch.randint(256, (3, *shape), dtype=torch.uint8)
    outputs = model.model(model.normalise(images))
    pixels = name == "mnist_autoencoder"
    expected = outputs.sigmoid().view(3, *shape) if pixels else outputs.softmax(1)
    torch.testing.assert_close(opened(path)[0](images), expected, rtol=0, atol=1e-5)
    assert found["output"]["name"] == ("pixels" if pixels else "probabilities")
    assert found["output"]["shape"][1:] == list(expected.shape[1:])
    assert found["check"]["different_predictions"] == (None if pixels else 0)


# What it is compared on


def test_the_check_is_on_images_from_all_over_the_test_split_of_the_classes(tmp_path: Path) -> None:
    from dltrain.data.digits import digits

    test = digits(Files(tmp_path)).test
    images, source, reason = export.sample(untrained({"model": "perceptron"}))
    assert (source, reason) == ("digits test", None)
    assert torch.equal(images, test.images[[number * 359 // 100 for number in range(100)]])
    two = {"model": "perceptron", "data": {"name": "digits", "classes": [3, 8]}}
    images, _, _ = export.sample(untrained(two, classes=2))
    kept = test.images[(test.labels == 3) | (test.labels == 8)]
    assert torch.equal(images, kept[:100])
    assert len(images) == min(len(kept), 100)


def test_the_check_is_on_random_images_where_the_data_are_not_here(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DLTRAIN_DATA", str(tmp_path / "data"))
    images, source, reason = export.sample(untrained({"model": "perceptron", "data": "mnist"}, shape=(1, 28, 28)))
    assert (images.shape, images.dtype, source) == ((100, 1, 28, 28), torch.uint8, "random")
    assert (images.min(), images.max()) == (0, 255)
    assert "MNIST: train-images-idx3-ubyte" in reason
    assert not (tmp_path / "data").exists()
    _, source, reason = export.sample(untrained({"model": "perceptron"}, shape=(1, 9, 9)))
    assert (source, reason) == ("random", "digits: has images of [1, 8, 8] now")


def test_a_split_of_few_images_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digits: torch.Tensor) -> None:
    monkeypatch.setattr(export, "sample", lambda trained: (digits[:1], "digits test", None))
    found = export.export(untrained({"model": "perceptron"}), "torch", tmp_path / "x.pt2")
    assert found["check"]["images"] == 1
    torch.testing.assert_close(opened(tmp_path / "x.pt2")[0](digits).sum(1), torch.ones(359))


# What is refused


class Bessel(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j1(x)


class Deciding(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x if x.sum() > 0 else x


def around(inner: nn.Module) -> Trained:
    """A model that holds the layer."""
    flat = nn.Sequential(inner, nn.Flatten())
    torch.manual_seed(0)
    whole = nn.Sequential(flat, nn.Linear(flat(torch.zeros(1, 1, 8, 8)).shape[1], 10))
    return dataclasses.replace(untrained({"model": "perceptron"}), model=whole.eval())


UNEVEN = nn.AvgPool2d(3, 2, ceil_mode=True, divisor_override=2)  # whose windows at the border are smaller


@pytest.mark.parametrize(
    ("format", "inner", "message"),
    [
        pytest.param(
            "onnx",
            Bessel(),
            r"layer 0\.0 \(Bessel\) cannot be translated: No ONNX function found .*--format torch may",
            marks=pytest.mark.soak,
        ),
        ("onnx", Deciding(), r"layer 0\.0 \(Deciding\) cannot be translated: Could not guard"),
        ("torch", Deciding(), r"layer 0\.0 \(Deciding\) cannot be translated: Could not guard .*decide nothing"),
        (
            "onnx",
            UNEVEN,
            r"layer 0\.0 \(AvgPool2d\) does not become .*: probabilities differ by 0\.\d+, .* nothing was",
        ),
    ],
)
def test_what_a_format_does_not_carry_is_refused_and_its_layer_named(tmp_path, capfd, format, inner, message) -> None:
    path = tmp_path / f"x{export.FORMATS[format].suffix}"
    with pytest.raises(ConfigError, match=rf"^x\.safetensors: --format {format}: {message}") as refused:
        export.export(around(inner), format, path)
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr() == ("", "")


def test_outputs_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = untrained({"model": "perceptron"})
    with torch.no_grad():
        next(model.model.parameters()).fill_(float("nan"))
    with pytest.raises(CheckpointError, match=r"^x\.safetensors: its outputs for digits test images are not finite$"):
        export.export(model, "torch", tmp_path / "x.pt2")
    assert list(tmp_path.iterdir()) == []


def test_onnx_has_a_largest_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "LARGEST_ONNX", 10)
    with pytest.raises(
        ConfigError, match=r"^x\.safetensors: --format onnx: 0\.0 GB of weights, .*--format torch has no"
    ):
        export.export(untrained({"model": "perceptron"}), "onnx", tmp_path / "x.onnx")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["RUN", "--format", "tflite"], 2, "--format tflite: expected onnx or torch"),
        (["RUN", "--out", "best.safetensors"], 2, "--out best.safetensors: expected a name that ends in .onnx"),
        (["RUN", "--format", "torch", "--out", "x.onnx"], 2, "ends in .pt2, for --format torch"),
        (["RUN", "--out", "no/x.onnx"], 6, "no/x.onnx: there is no folder no"),
        (["absent"], 4, "absent: no such file or folder"),
        (["RUN", "--format", "torch", "--out", "folder.pt2"], 6, "folder.pt2: "),
    ],
)
def test_mistakes_have_their_exit_codes_and_a_line(dltrain: Run, run_folder: Path, arguments, code, message) -> None:
    Path("folder.pt2").mkdir()
    done = dltrain("export", *(run_folder if each == "RUN" else each for each in arguments))
    assert (done.code, done.out, len(done.err.splitlines())) == (code, "", 1)
    assert message in done.err


def test_a_missing_package_is_named_with_what_installs_it(dltrain: Run, run_folder: Path, monkeypatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name[:4] == "onnx" else find(name, *rest)
    )
    done = dltrain("export", run_folder)
    expected = "error: --format onnx needs onnx and onnxscript and onnxruntime: pip install 'dltrain[export]'"
    assert (done.code, done.err) == (2, f"{expected}; --format torch needs nothing more\n")
    assert dltrain("export", run_folder, "--format", "torch", "--out", "x.pt2").code == 0


@pytest.mark.parametrize("program", blocks("python"), ids=["onnx", "torch"])
def test_the_programs_of_the_page_say_what_predict_says(dltrain, run_folder, said, tmp_path, capfd, program) -> None:
    draw(tmp_path / "three.png", noise(0, 30, 20))
    for suffix in ("onnx", "pt2"):
        Path(f"best.{suffix}").symlink_to(run_folder / f"best.{suffix}")
    (image,) = json.loads(dltrain("predict", run_folder, "three.png", "--fit", "stretch", "--json").out)["images"]
    likeliest = image["top"][0]
    exec(program, {})
    assert capfd.readouterr() == (f"{likeliest['class']} {likeliest['probability']:.4f}\n", "")
