"""Components from outside the package, as docs/extending.md tells it, and what a plugin may not do."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import Run

from dltrain import config, registry
from dltrain.errors import ConfigError

PAGE = (Path(__file__).parent.parent / "docs" / "extending.md").read_text()
BASE = "data: digits\nmodel: {name: mlp, hidden: [8]}\noptim: {name: sgd, lr: 0.1}\n"
LOSS = '''
from dltrain.registry import Positive, register
@register("loss")
def mine(outputs, targets, *, scale: Positive = 1.0):
    """Mine.

    scale: of it
    """
    return scale * outputs.logsumexp(1).mean()
'''


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture
def example(tmp_path: Path) -> Path:
    (tmp_path / "my_module.py").write_text("\n\n".join(blocks("python")))
    (tmp_path / "mine.yaml").write_text(blocks("yaml")[0])
    return tmp_path / "mine.yaml"


def write(folder: Path, plugin: str, text: str = "") -> Path:
    (folder / "plugin.py").write_text(plugin)
    (folder / "x.yaml").write_text(f"plugins: [plugin.py]\n{BASE}{text}")
    return folder / "x.yaml"


def test_each_of_the_pages_components_takes_at_most_fifteen_lines() -> None:
    found = blocks("python")
    assert [re.findall(r'@register\("(\w+)"\)', block) for block in found] == [
        [kind] for kind in ("data", "augmentation", "model", "loss", "optim")
    ]
    for block in found:
        lines = [line for line in block.splitlines() if line and not line.startswith(("import", "from"))]
        assert len(lines) <= 15, block


def test_the_page_does_what_it_says(dltrain: Run, example: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    done = dltrain("train", str(example), "--out", str(out), "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["test"]["accuracy"] > 0.95

    refused = dltrain("eval", str(out))
    assert refused.code == 4
    assert "--plugin FILE" in refused.err
    module = str(example.parent / "my_module.py")
    judged = dltrain("eval", str(out), "--plugin", module, "--json")
    assert judged.code == 0, judged.err
    assert json.loads(judged.out)["accuracy"] == json.loads(done.out)["test"]["accuracy"]

    shown = dltrain("config", "show", str(example))
    assert "most: 0.3" in shown.out
    refused = dltrain("train", str(example), "--set", "loss.margni=1")
    assert (refused.code, refused.err.count("\n")) == (2, 1)
    assert "did you mean 'margin'?" in refused.err


def test_a_resume_runs_a_plugin_only_where_it_is_named_and_only_the_same(
    dltrain: Run, example: Path, tmp_path: Path
) -> None:
    out, module = tmp_path / "run", example.parent / "my_module.py"
    assert dltrain("train", str(example), "--out", str(out), "--set", "train.epochs=1").code == 0
    more = ("--set", "train.epochs=2")
    assert dltrain("train", "--resume", str(out), *more).code == 2
    module.write_text(module.read_text().replace("square()", "abs()"))
    changed = dltrain("train", "--resume", str(out), *more, "--plugin", str(module))
    assert changed.code == 4
    assert "plugins.my_module.py" in changed.err
    assert dltrain("train", "--resume", str(out), *more, "--plugin", str(module), "--allow-inexact").code == 0


def test_plugins_are_known_to_the_configs_that_name_them_alone(tmp_path: Path) -> None:
    path = write(tmp_path, LOSS, "loss: {name: mine, scale: 2}\n")
    assert config.load(path).loss.args == {"scale": 2.0}
    other = tmp_path / "other.yaml"
    other.write_text(f"{BASE}loss: mine\n")
    with pytest.raises(ConfigError, match="unknown loss 'mine'"):
        config.load(other)
    assert config.load(path).loss.name == "mine"  # and the file is not run again
    (tmp_path / "plugin.py").write_text(LOSS.replace("scale", "factor"))
    with pytest.raises(ConfigError, match=r"x\.yaml:5: loss\.scale: unknown key"):
        config.load(path)


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        ("import torch\n\n1 / 0\n", r"plugin\.py:3: ZeroDivisionError: division by zero"),
        ("def f(:\n", r"plugin\.py:1: SyntaxError"),
        (LOSS.replace("def mine", "def mse"), r"plugin\.py:\d+: ValueError: loss 'mse' is registered twice"),
        (LOSS.replace('"loss"', '"los"'), r"no kind of component is called 'los'; did you mean 'loss'\?"),
    ],
)
def test_what_is_wrong_in_a_plugin_is_said_with_its_place(tmp_path: Path, plugin: str, message: str) -> None:
    plain = tmp_path / "plain.yaml"
    plain.write_text(BASE)
    config.load(plain)
    before = registry.everything()
    with pytest.raises(ConfigError, match=message) as caught:
        config.load(write(tmp_path, plugin))
    assert "\n" not in str(caught.value)
    assert registry.everything() == before


def test_what_a_failed_plugin_registered_is_forgotten(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ZeroDivisionError"):
        config.load(write(tmp_path, f"{LOSS}\n1 / 0\n"))
    assert config.load(write(tmp_path, LOSS, "loss: mine\n")).loss.name == "mine"


def test_a_plugin_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(f"plugins: [nothing.py]\n{BASE}")
    with pytest.raises(ConfigError, match=r"nothing\.py: No such file"):
        config.load(path)


def test_what_plugins_may_be(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(f"plugins: plugin.py\n{BASE}")
    with pytest.raises(ConfigError, match=r"x\.yaml:1: plugins: expected a list"):
        config.load(path)


def test_a_new_run_takes_plugins_from_its_config_alone(dltrain: Run, example: Path) -> None:
    done = dltrain("train", str(example), "--plugin", str(example.parent / "my_module.py"))
    assert done.code == 2
    assert "plugins: [my_module.py]" in done.err
