"""The contenders of benchmarks/ train the same network on the same images, and the scripts print what they measured."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from data_files import write_cifar10, write_mnist
from torch import nn

from dltrain import config
from dltrain.build import build_model
from dltrain.data.files import Files
from dltrain.yamlfile import parse

FOLDER = Path(__file__).parent.parent / "benchmarks"
sys.path.append(str(FOLDER))  # where the scripts find peers.py
peers: Any = importlib.import_module("peers")
SCRIPTS = ("mnist_mlp_epoch", "mnist_cnn_epoch", "cifar10_cnn_epoch")
WORKS = [pytest.param(importlib.import_module(name).WORK, id=name) for name in SCRIPTS]
IMAGES = 140  # a batch of 128, and one of 12
IN_TORCH = ("bare", "bare-bf16", "pytorch", "lightning")


def contenders(in_torch: bool) -> list[Any]:
    """Each with each work that it does."""
    return [
        pytest.param(work.values[0], name, id=f"{work.id}-{name}")
        for work in WORKS
        for name in work.values[0].contenders
        if (name in IN_TORCH) is in_torch
    ]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    write_mnist(tmp_path, IMAGES + 20, 20)
    write_cifar10(tmp_path, IMAGES + 20, 20)
    return Files(tmp_path, verify=False)


@pytest.fixture
def keras(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    pytest.importorskip("keras")


def share(files: Files) -> Any:
    return peers.Share(files, epochs=1, limit=IMAGES)


def shape(work: Any) -> tuple[int, int, int]:
    return (3, 32, 32) if work.augment else (1, 28, 28)


def dltrain_network(work: Any) -> nn.Module:
    return build_model(config.check(parse(work.config + peers.SETTINGS, "test")), shape(work), 10)


@pytest.mark.parametrize(("work", "name"), contenders(in_torch=True))
def test_what_is_in_torch_trains_on_each_image_in_each_epoch(work: Any, name: str, files: Files) -> None:
    if name == "lightning":
        pytest.importorskip("lightning")
    batches, networks = [], []

    def network() -> nn.Module:
        networks.append(work.network())
        networks[0].register_forward_hook(lambda _, inputs, __: batches.append(len(inputs[0])))
        return networks[0]

    torch.manual_seed(0)
    before = work.network().state_dict()
    torch.manual_seed(0)
    seconds = peers.epochs_of(dataclasses.replace(work, network=network), name, share(files))
    assert batches == [128, 12] * 2
    assert len(seconds) == 1
    assert all(not torch.equal(before[key], parameter) for key, parameter in networks[0].named_parameters())


@pytest.mark.parametrize(("work", "name"), contenders(in_torch=False))
def test_the_others_give_as_many_epochs(work: Any, name: str, files: Files, request: pytest.FixtureRequest) -> None:
    if name == "keras":
        request.getfixturevalue(name)
    assert len(peers.epochs_of(work, name, share(files))) == 1


@pytest.mark.parametrize("work", WORKS)
def test_dltrain_trains_the_same_network(work: Any) -> None:
    ours, theirs = dltrain_network(work), work.network()
    ours.load_state_dict(dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True)))
    images = torch.randn(4, *shape(work))
    assert torch.equal(ours(images), theirs(images))


@pytest.mark.parametrize("work", WORKS)
@pytest.mark.usefixtures("keras")
def test_keras_trains_the_same_network(work: Any) -> None:
    import keras

    channels, height, width = shape(work)
    model = keras.Sequential([keras.Input((height, width, channels)), *work.keras_layers(keras.layers)])
    theirs = [tuple(each.shape) for each in model.trainable_weights]
    sizes = sorted(torch.Size(each).numel() for each in theirs)
    assert sizes == sorted(parameter.numel() for parameter in work.network().parameters())
    assert tuple(model.output_shape) == (None, 10)


@pytest.mark.parametrize("work", WORKS)
def test_all_see_the_same_pixels(work: Any, files: Files) -> None:
    loader = peers.data_loader(dataclasses.replace(work, augment=False), share(files))
    split = share(files).split(work)
    images = torch.stack([image for image, _ in loader.dataset])
    torch.testing.assert_close(peers.normalised(work, split.images), images)
    torch.testing.assert_close(peers.channels_at_the_end(work, split.images), images.permute(0, 2, 3, 1))
    assert [label for _, label in loader.dataset] == split.labels.tolist()


def test_a_crop_is_a_window_of_its_image_at_each_place_and_both_ways() -> None:
    padded = torch.arange(2 * 11 * 12 * 3).view(2, 11, 12, 3)  # images of 3 x 4
    windows = {}
    for flipped in (False, True):
        for top in range(9):
            for left in range(9):
                window = padded[1, top : top + 3, left : left + 4].permute(2, 0, 1)
                windows[tuple((window.flip(2) if flipped else window).flatten().tolist())] = (top, left, flipped)
    crops = peers.crop_and_flip(padded, torch.ones(3000, dtype=torch.int64))
    assert crops.shape == (3000, 3, 3, 4)
    assert {windows[tuple(crop.flatten().tolist())] for crop in crops} == set(windows.values())


def test_the_first_epoch_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    def three(work: Any, share: Any, tick: Any) -> None:
        for _ in range(3):
            tick()

    ends = iter([100.0, 110.0, 113.0])
    monkeypatch.setattr(peers, "perf_counter", lambda: next(ends))
    monkeypatch.setitem(peers.CONTENDERS, "bare", (three, "torch"))
    assert peers.epochs_of(None, "bare", None) == [10, 3]


def test_the_table_has_scaled_medians_and_ratios_to_the_first(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = {"dltrain": iter([[0.5], [0.1], [0.2]]), "bare": iter([[0.05], [0.07], [0.06]])}
    monkeypatch.setattr(peers, "in_a_process", lambda name: next(measured[name]))
    peers.compare(WORKS[0].values[0], ["dltrain", "bare"], repeats=3, images=600)
    out = capsys.readouterr().out
    assert "600 of the images, the seconds multiplied by 100" in out
    numbers = [line.split(")")[1].split() for line in out.splitlines() if line.startswith(("dltrain", "bare"))]
    assert numbers == [["3", "20", "10", "50", "1.00"], ["3", "6", "5", "7", "0.30"]]


def test_who_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def version(package: str) -> str:
        if package == "keras":
            raise PackageNotFoundError(package)
        return "1.0"

    monkeypatch.setattr(peers, "version", version)
    monkeypatch.setattr(peers, "in_a_process", lambda name: [1.0])
    peers.compare(WORKS[0].values[0], ["keras", "bare"], repeats=1, images=None)
    first, *others = capsys.readouterr().out.splitlines()
    assert first == "keras is left out: keras is not installed; pip install -e '.[bench]'"
    assert [line.split()[0] for line in others[-2:]] == ["epochs", "bare"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--only", "bare,torch"], "no contender torch; there is dltrain, bare,"),
        (["--images", "100"], "expected 128 (a batch) to 60000, got 100"),
        (["--repeats", "0"], "invalid positive value: '0'"),
    ],
)
def test_wrong_options_are_said(
    arguments: list[str], text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["script", *arguments])
    with pytest.raises(SystemExit) as ended:
        peers.main(WORKS[0].values[0])
    assert ended.value.code == 2
    assert text in capsys.readouterr().err


def test_a_script_runs_its_contenders_in_processes(
    files: Files, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    share = ["--images", "256", "--repeats", "1", "--epochs", "2"]
    script = [str(FOLDER / "mnist_mlp_epoch.py"), "--no-verify", "--data-root", str(files.root), *share]
    monkeypatch.setattr(sys, "argv", [*script, "--only", "bare"])
    peers.main(WORKS[0].values[0])
    last = capsys.readouterr().out.splitlines()[-1].split()
    assert last[0] == "bare"
    assert last[3] == "2"
    assert last[-1] == "1.00"


def test_a_process_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["-c", "raise SystemExit('no such data')"])
    with pytest.raises(SystemExit, match=r"^bare: exit code 1\nno such data"):
        peers.in_a_process("bare")
