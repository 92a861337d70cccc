"""What the pages show is right: every piece of a config in them loads, and every link leads somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dltrain import config, yamlfile
from dltrain.build import build_model

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BASE = {"name": "x", "data": "digits", "model": "perceptron", "optim": {"name": "sgd", "lr": 0.1}}
# of extending.md needs its plugin, and has a test of its own
SNIPPETS = [
    pytest.param(text, id=f"{page.stem}-{index}")
    for page in PAGES
    for index, text in enumerate(re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL))
    if "plugins:" not in text
]


@pytest.mark.parametrize("text", SNIPPETS)
def test_every_piece_of_a_config_loads_and_builds(text: str) -> None:
    found = config.from_plain({**BASE, **yamlfile.parse(text, "page").data}, "page")
    if "model:" in text:
        build_model(found, (3, 32, 32), 10)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_configs_that_are_named_are_shipped(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"dltrain (?:train|lr-find|config show) (?!--)([a-z0-9_]+)(?= |$|\n|`)", text):
        assert (ROOT / "configs" / f"{name}.yaml").exists(), name
