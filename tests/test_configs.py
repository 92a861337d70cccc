"""Every shipped config: it says what it is, it is complete, and it trains."""

from __future__ import annotations

import json
import os
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import Run
from data_files import write_cifar10, write_cifar100, write_mnist
from torch.utils.flop_counter import FlopCounterMode

from dltrain import config, shipped
from dltrain.build import build_model


def write_folder(root: Path, n_train: int, n_test: int) -> None:
    from PIL import Image

    for split, count in (("train", n_train), ("test", n_test)):
        for number in range(count):
            path = root / "images" / split / f"class_{number % 3}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 36), (number, 80 * (number % 3), 0)).save(path)


WRITERS = {
    "mnist": lambda root, n_train, n_test: write_mnist(root, 10 * n_train, 10 * n_test),  # two classes may be kept
    "moving_mnist": write_mnist,
    "digit_lines": write_mnist,
    "fashion_mnist": partial(write_mnist, folder="FashionMNIST"),
    "cifar10": write_cifar10,
    "cifar100": write_cifar100,
    "folder": write_folder,
}
IMAGES = 300  # in the files: enough for a config that keeps two classes of ten
STEPS = {"batch": 1, "stochastic": 48, "mini-batch": 3}  # an epoch's of 48 images
SHAPES = {"mnist": (1, 28, 28), "fashion_mnist": (1, 28, 28), "digits": (1, 8, 8)}  # (3, 32, 32) otherwise


@pytest.mark.parametrize("name", shipped.names())
def test_a_config_trains(dltrain: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A few steps on small files in the publishers' layout."""
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name: tmp_path / "cache" / name)
    settings = ["data.limit=60", "data.val=12", "train.epochs=1", "schedule.warmup_epochs=0"]
    loaded = config.load(shipped.find(name))
    variant, dataset = loaded.descent.variant, loaded.data.source.name
    if variant == "mini-batch":
        settings.append("descent.batch_size=16")
    if dataset in WRITERS:
        WRITERS[dataset](tmp_path / "data", IMAGES, 30)
        settings.append("data.verify=false")
    settings = [part for setting in settings for part in ("--set", setting)]
    done = dltrain("train", name, "--json", "--out", "run", *settings)
    assert done.code == 0, done.err
    summary = json.loads(done.out)
    assert (summary["config"], summary["steps"]) == (name, STEPS[variant])
    assert summary["chosen_by"].startswith("val_")
    assert json.loads(dltrain("eval", "run", "--json").out)["loss"] == summary["test"]["loss"]


@pytest.mark.parametrize("name", shipped.names())
def test_a_config_says_what_to_type_and_what_to_expect(name: str) -> None:
    head = head_of(name)
    assert head[0] == f"dltrain train configs/{name}.yaml"
    text = " ".join(head[2:])
    assert re.search(r"Expect: (\d\d\.\d\d |not run to the end here)", text)
    assert re.search(
        r"Time: +([\d.]+ s for the whole command, .+ on|not timed; \d+ MFLOPs for an image's forward pass)", text
    )
    assert re.search(r"Source: \w+", text)


def head_of(name: str) -> list[str]:
    head = []
    for line in (shipped.folder() / f"{name}.yaml").read_text().splitlines():
        if not line.startswith("#"):
            break
        head.append(line.removeprefix("#").strip())
    return head


@pytest.mark.parametrize("name", [name for name in shipped.names() if "MFLOPs" in " ".join(head_of(name))])
def test_a_config_says_what_an_image_costs(name: str) -> None:
    loaded = config.load(shipped.find(name))
    shape = SHAPES.get(loaded.data.source.name, (3, 32, 32))
    classes = 100 if loaded.data.source.name == "cifar100" else 10
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model = build_model(loaded, shape, classes).eval()
        built = counter.get_total_flops()  # layers are tried as they are built
        model(torch.zeros(1, *shape))
    flops = counter.get_total_flops() - built
    assert f" {round(flops / 1e6)} MFLOPs" in " ".join(head_of(name))


REAL = os.environ.get("DLTRAIN_TEST_DATA")
needs_real_data = pytest.mark.skipif(not REAL, reason="DLTRAIN_TEST_DATA names no folder with MNIST and CIFAR-10")


@needs_real_data
def test_mnist_as_published_is_verified_and_learned(dltrain: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DLTRAIN_DATA", str(REAL))
    verified = dltrain("data", "verify", "mnist")
    assert (verified.code, verified.out) == (0, "mnist: 60,000 training and 10,000 test images, verified\n")
    settings = (
        "--set",
        "train.epochs=1",
        "--set",
        "schedule=constant",
        "--set",
        "optim.lr=0.05",
        "--set",
        "data.augment=[]",
    )
    summary = json.loads(dltrain("train", "mnist_mlp", "--json", "-q", "--out", "run", *settings).out)
    assert summary["data_verified"] is True
    assert summary["test"]["accuracy"] > 0.95


@needs_real_data
def test_cifar10_in_another_copy_is_refused_and_accepted_when_asked(
    dltrain: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DLTRAIN_DATA", str(REAL))
    refused = dltrain("train", "cifar10_mlp", "--out", "run")
    assert (refused.code, len(refused.err.splitlines())) == (3, 1)
    assert "data.verify" in refused.err
    settings = (
        "--set",
        "train.epochs=1",
        "--set",
        "data.verify=false",
        "--set",
        "data.limit=20000",
        "--set",
        "optim.lr=1e-3",
    )
    summary = json.loads(dltrain("train", "cifar10_mlp", "--json", "-q", "--out", "run", *settings).out)
    assert summary["data_verified"] is False
    assert summary["test"]["accuracy"] > 0.3
