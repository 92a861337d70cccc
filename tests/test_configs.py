"""Every shipped config: it says what it is, it is complete, and it trains."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from conftest import Run
from data_files import write_cifar10, write_cifar100, write_mnist

from dltrain import shipped

WRITERS = {"mnist": write_mnist, "cifar10": write_cifar10, "cifar100": write_cifar100}


@pytest.mark.parametrize("name", shipped.names())
def test_a_config_trains(dltrain: Run, tmp_path: Path, name: str) -> None:
    """A few steps on small files in the publishers' layout."""
    settings = ["--set", "train.epochs=1", "--set", "data.val=20", "--set", "descent.batch_size=32"]
    dataset = name.partition("_")[0]
    if dataset in WRITERS:
        WRITERS[dataset](tmp_path / "data", 100, 50)
        settings += ["--set", "data.verify=false"]
    else:
        settings += ["--set", "data.limit=100"]
    done = dltrain("train", name, "--json", "--out", "run", *settings)
    assert done.code == 0, done.err
    summary = json.loads(done.out)
    assert (summary["config"], summary["steps"]) == (name, 3)
    assert summary["chosen_by"].startswith("val_")
    assert json.loads(dltrain("eval", "run", "--json").out)["loss"] == summary["test"]["loss"]


@pytest.mark.parametrize("name", shipped.names())
def test_a_config_says_what_to_type_and_what_to_expect(name: str) -> None:
    head = []
    for line in (shipped.folder() / f"{name}.yaml").read_text().splitlines():
        if not line.startswith("#"):
            break
        head.append(line.removeprefix("#").strip())
    text = " ".join(head)
    assert head[0] == f"dltrain train configs/{name}.yaml"
    assert re.search(r"Expect: .*\d\d\.\d", text) or "not run to the end here" in text
    assert "Time:" in text
    assert "Source:" in text


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
