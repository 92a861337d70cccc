from __future__ import annotations

import pytest

from dltrain import catalogue
from dltrain.errors import ConfigError
from dltrain.registry import entries


def rows(root):
    return {row["name"]: row for row in catalogue.presence(str(root))}


def test_every_data_set_has_a_row(tmp_path):
    assert set(rows(tmp_path)) == {entry.name for entry in entries("data")}


def test_data_of_the_users_own_has_nothing_to_say_before_a_config_names_it(tmp_path):
    row = rows(tmp_path)["npz"]
    assert row == {
        "name": "npz", "title": "npz", "train": None, "test": None, "download": 0, "state": "your own", "folder": None
    }  # fmt: skip


def test_data_that_is_drawn_is_there_already(tmp_path):
    assert rows(tmp_path)["synthetic"]["state"] == "embedded"
    assert catalogue.get("synthetic", str(tmp_path), print) == (
        "synthetic: 10,000 training and 2,000 test images, verified"
    )


@pytest.mark.parametrize("command", [catalogue.get, catalogue.verify])
def test_data_of_the_users_own_cannot_be_got(tmp_path, command):
    with pytest.raises(ConfigError, match=r"npz is made of your own files, which a config names \(path\)"):
        command("npz", str(tmp_path), print)
