"""The README does what it says: its commands run, its config trains, its model works."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import readme
from conftest import Run
from data_files import write_mnist

from dltrain import registry, shipped

TEXT = readme.README.read_text(encoding="utf-8")


def test_the_first_two_blocks_install_train_and_test() -> None:
    """`.ci/run` runs these two as they stand, in a fresh virtual environment."""
    first, second = readme.blocks()[:2]
    assert first == ["pip install . && dltrain train digits_mlp"]
    assert second == ["pip install -e '.[test]' && pytest"]


def test_every_other_command_runs(dltrain: Run) -> None:
    commands = [shlex.split(line) for block in readme.blocks()[2:] for line in block]
    assert len(commands) >= 8
    for command in commands:
        assert command[0] == "dltrain"
        done = dltrain(*command[1:])
        assert done.code == 0, (command, done.err)


def test_the_config_it_shows_trains(dltrain: Run, tmp_path: Path) -> None:
    (config,) = re.findall(r"^```yaml\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)
    Path("mnist.yaml").write_text(config)
    write_mnist(tmp_path / "data", 100, 50)
    small = ("--set", "data.verify=false", "--set", "data.val=20", "--set", "descent.batch_size=40")
    assert dltrain("train", "mnist.yaml", *small).code == 0


def test_the_mistake_it_shows_is_answered_as_it_says(dltrain: Run) -> None:
    (config,) = re.findall(r"^```yaml\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)
    Path("mnist.yaml").write_text(config.replace("kernel: 3", "kernal: 3"))
    done = dltrain("train", "mnist.yaml")
    assert done.code == 2
    assert f"$ dltrain train mnist.yaml\n{done.err}" in TEXT


def test_the_model_it_adds_works(dltrain: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)
    path = tmp_path / "maxout.py"
    path.write_text(code)
    monkeypatch.setitem(registry._entries, "model", dict(registry._entries["model"]))
    spec = importlib.util.spec_from_file_location("maxout", path)
    assert spec
    assert spec.loader
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    train = ("train", "digits_mlp", "--set", "train.epochs=3")
    done = dltrain(*train, "--set", "model={name: maxout, pieces: 8}")
    assert done.code == 0, done.err
    refused = dltrain(*train, "--set", "model={name: maxout, pieces: many}")
    assert refused.code == 2
    assert "pieces" in refused.err


def test_its_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", TEXT):
        if "://" not in target:
            assert (readme.README.parent / target).exists(), target


def test_its_table_names_every_shipped_config() -> None:
    assert set(shipped.names()) <= set(re.findall(r"^\| `(\w+)`", TEXT, flags=re.MULTILINE))
