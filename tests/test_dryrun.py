"""A dry run says of each layer what its output was computed in, where it is and how it lies in memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Run

CONFIG = """
data: {name: digits, limit: 200}
model: {name: cnn, layers: [{conv: 4}, relu, {conv: 1}, {globalpool: avg}, {linear: classes}]}
optim: {name: sgd, lr: 0.1}
train: {device: cpu}
"""
NAMES = ["0_conv", "1_relu", "2_conv", "3_globalpool.0", "3_globalpool.1", "4_linear"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "c.yaml").write_text(CONFIG)
    return tmp_path / "c.yaml"


def command(path: Path, precision: str, memory_format: str) -> list[str]:
    sets = ("--set", f"train.precision={precision}", "--set", f"train.memory_format={memory_format}")
    return ["train", str(path), "--dry-run", *sets]


@pytest.mark.parametrize(
    ("precision", "memory_format", "layouts"),
    [
        ("fp32", "contiguous", ["contiguous", "contiguous", "any", "any", "contiguous", "contiguous"]),
        ("bf16", "channels_last", ["channels_last", "channels_last", "any", "any", "contiguous", "contiguous"]),
    ],
)
def test_each_layer_has_its_dtype_device_and_layout(
    dltrain: Run, path: Path, precision: str, memory_format: str, layouts: list[str]
) -> None:
    rows = json.loads(dltrain(*command(path, precision, memory_format), "--json").out)["layers"]
    assert [row["name"] for row in rows] == NAMES
    assert [row["dtype"] for row in rows] == [precision] * 6
    assert [row["device"] for row in rows] == ["cpu"] * 6
    assert [row["layout"] for row in rows] == layouts  # of one channel, or of one pixel, both are the same


@pytest.mark.parametrize("width", [40, 80])
def test_a_narrow_terminal_gets_what_most_have_and_the_others(
    dltrain: Run, path: Path, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    lines = [line.strip() for line in dltrain(*command(path, "bf16", "channels_last")).out.splitlines()]
    assert "device: cpu" in lines
    if width == 80:
        (first,) = [line for line in lines if line.startswith("0_conv")]
        assert first.split()[-2:] == ["bf16", "channels_last"]
        assert not [line for line in lines if line.startswith("dtype: ")]
    else:
        assert "dtype: bf16" in lines
        (layout,) = [line for line in lines if line.startswith("layout: ")]
        parts = layout.removeprefix("layout: ").split("; ")
        assert parts[1:] == ["any: 2_conv, 3_globalpool.0", "contiguous: 3_globalpool.1, 4_linear"]
        assert parts[0] == "channels_last"


def test_a_layer_that_keeps_to_float32_under_autocast_is_said(dltrain: Run, path: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "from dltrain.registry import register\n"
        "class Whole(nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x.float()\n"
        '@register("layer")\n'
        "def whole(shape, outputs):\n"
        '    """x as float32."""\n'
        "    return Whole()\n"
    )
    path.write_text(CONFIG.replace("{linear: classes}", "{linear: classes}, whole") + "plugins: [mine.py]\n")
    rows = json.loads(dltrain(*command(path, "bf16", "contiguous"), "--json").out)["layers"]
    assert {row["name"]: row["dtype"] for row in rows}["5_whole"] == "fp32"
    assert {row["dtype"] for row in rows[:-1]} == {"bf16"}
