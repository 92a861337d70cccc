"""The configs that come with dltrain, found by name."""

from __future__ import annotations

from pathlib import Path

from dltrain.errors import ConfigError
from dltrain.registry import nearest


def folder() -> Path:
    """Where the shipped configs lie: in an installed package inside it, in a checkout beside it."""
    inside = Path(__file__).parent / "configs"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "configs"


def names() -> list[str]:
    return sorted(path.stem for path in folder().glob("*.yaml"))


def find(config: str) -> Path:
    """The file that a user means by a path, or by a shipped config's name.  Raises ConfigError where there is none."""
    path = Path(config)
    try:
        if path.exists():
            return path
    except OSError as error:  # a name that is too long, a folder that may not be read
        raise ConfigError(f"{config[:60]}: {error.strerror}") from None
    if path.name.removesuffix(".yaml") in names() and len(path.parts) <= 2:
        return folder() / f"{path.name.removesuffix('.yaml')}.yaml"
    hint = nearest(path.stem, names()) or "; `dltrain config list` names those that come with dltrain"
    raise ConfigError(f"{config}: no such file, and no config of that name comes with dltrain{hint}")


def headline(path: Path) -> str:
    """What the config says it is: the second comment line of its head (the first is the command)."""
    comments = [line.lstrip("# ").rstrip() for line in path.read_text(encoding="utf-8").splitlines() if line[:1] == "#"]
    return comments[1] if len(comments) > 1 else ""
