"""docs/curriculum.md does what it says: its commands run, on small files, and its pictures are there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import readme
from conftest import Run
from test_configs import IMAGES, WRITERS

from dltrain import config, shipped

PAGE = Path(__file__).parent.parent / "docs/curriculum.md"
BLOCKS = readme.blocks(PAGE)
SMALL = ["data.limit=60", "data.val=12", "train.epochs=1", "schedule.warmup_epochs=0"]
SMALL += ["tensorboard.pictures=false", "tensorboard.pr_curves=false"]  # half a second a run


def settings_of(name: str, root: Path) -> list[str]:
    """What makes a shipped config small; its data set is written to the root in its publisher's layout."""
    loaded = config.load(shipped.find(name))
    settings = [*SMALL, "descent.batch_size=16"] if loaded.descent.variant == "mini-batch" else [*SMALL]
    dataset = loaded.data.source.name
    if dataset == "digit_lines":
        settings += ["data.train=100", "data.test=30"]
    if dataset in WRITERS:
        WRITERS[dataset](root, IMAGES, 30)
        settings.append("data.verify=false")
    return [part for setting in settings for part in ("--set", setting)]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: "-".join(block[0].split()[1:3]))
def test_its_commands_run(dltrain: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: list[str]) -> None:
    """Those of a block, one after another in one folder."""
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name: tmp_path / "cache" / name)
    for line in block:
        program, *command = shlex.split(line)
        assert program == "dltrain"
        if command[1] in shipped.names():
            command += settings_of(command[1], tmp_path / "data")
        done = dltrain(*command)
        assert done.code == 0, (command, done.err)


def test_every_section_has_a_command_a_picture_of_its_own_or_before_it_and_two_paragraphs() -> None:
    sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    assert len(sections) >= 13
    for section in sections:
        title = section.splitlines()[0]
        assert "```bash" in section, title
        prose = re.sub(r"^(```.*?^```|!\[.*?\)|\|.*?)$", "", section, flags=re.MULTILINE | re.DOTALL)
        assert len([part for part in prose.split("\n\n")[1:] if len(part) > 200]) >= 2, title


def test_its_pictures_are_small() -> None:
    pictures = re.findall(r"\((curriculum/\w+\.png)\)", PAGE.read_text(encoding="utf-8"))
    assert len(pictures) == len({*pictures}) >= 9
    assert {PAGE.parent / name for name in pictures} == {*(PAGE.parent / "curriculum").iterdir()}
    assert all((PAGE.parent / name).stat().st_size < 100_000 for name in pictures)
