"""Components of the user's own, from Python files that a config names under `plugins`."""

from __future__ import annotations

import hashlib
import sys
import traceback
import types
from collections.abc import Sequence
from pathlib import Path

from dltrain import registry
from dltrain.errors import ConfigError
from dltrain.registry import Entry

_loaded: dict[Path, tuple[str, list[Entry]]] = {}  # file -> SHA-256 of what was run, and what that registered


def use(paths: Sequence[Path]) -> None:
    """Makes the components of these files known, and no other plugin's; a file is run once, and anew when it changes.

    Raises ConfigError where a file cannot be read, fails, or registers a name that is taken.
    """
    registry.remove([entry for _, entries in _loaded.values() for entry in entries])
    for path in paths:
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"plugins: {path}: {error.strerror}") from None
        digest = hashlib.sha256(content).hexdigest()
        known = _loaded.get(path)
        before = registry.everything()
        try:
            if known and known[0] == digest:
                registry.add(known[1])
            else:
                _run(path, content, digest)
        except (ConfigError, ValueError) as error:
            registry.remove(_new(before))
            raise error if isinstance(error, ConfigError) else ConfigError(f"plugins: {path}: {error}") from None
        _loaded[path] = digest, _new(before)


def _new(before: Sequence[Entry]) -> list[Entry]:
    return [entry for entry in registry.everything() if entry not in before]


def digests(paths: Sequence[str]) -> dict[str, str]:
    """What these files in use held when they were run: name -> "sha256:…"."""
    return {Path(path).name: f"sha256:{_loaded[Path(path)][0]}" for path in paths}


def _run(path: Path, content: bytes, digest: str) -> None:
    """Runs what was hashed, and not what the file may hold by now."""
    name = f"dltrain_plugin_{path.stem}_{digest[:8]}"
    module = sys.modules[name] = types.ModuleType(name)  # where dataclasses look their module up
    module.__file__ = str(path)
    try:
        exec(compile(content, path, "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        frames = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = (error.lineno if isinstance(error, SyntaxError) else frames and frames[-1]) or 0
        raise ConfigError(f"plugins: {path}:{line}: {type(error).__name__}: {error}") from error
