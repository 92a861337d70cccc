"""The data sets: which are here, getting and verifying them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dltrain.components  # noqa: F401  registers the data sets
from dltrain import registry
from dltrain.data.dataset import Dataset
from dltrain.data.files import Files, Published, data_root, state
from dltrain.errors import ConfigError

Note = Callable[[str], None]
NOTHING_PUBLISHED = Published(title="", train=0, test=0)


def presence(root: str | None) -> list[dict[str, Any]]:
    """A row for each data set: name, title, images, what must be downloaded, and where it lies or would.

    A data set of the user's own files has no images before a config names them.
    """
    rows = []
    for entry in registry.entries("data"):
        found, published = state(entry, data_root(root)), entry.facts.get("published", NOTHING_PUBLISHED)
        rows.append(
            {
                "name": entry.name,
                "title": published.title or entry.name,
                "train": published.train or None,
                "test": published.test or None,
                "download": published.download,
                "state": str(found.state),
                "folder": str(found.folder) if found.folder else None,
            }
        )
    return rows


def get(name: str, root: str | None, note: Note) -> str:
    """Makes sure that a data set is here; says what is."""
    return _said(name, _read(name, Files(data_root(root), report=note)))


def verify(name: str, root: str | None, note: Note) -> str:
    """Reads a data set anew, whatever is remembered of it; raises DataError where a file is not the published one."""
    return _said(name, _read(name, Files(data_root(root), download=False, recheck=True, report=note)))


def _read(name: str, files: Files) -> Dataset:
    try:
        entry = registry.find(name, "data")
    except KeyError as error:
        raise ConfigError(error.args[0]) from None
    if entry.required():
        text = (
            f"is made of your own files, which a config names ({', '.join(entry.required())}): there is nothing to get"
        )
        raise ConfigError(f"{name} {text} or verify")
    dataset: Dataset = entry.factory(files)
    return dataset


def _said(name: str, dataset: Dataset) -> str:
    checked = "verified" if dataset.verified else "not verified: no checksums are published for these files"
    return f"{name}: {len(dataset.train):,} training and {len(dataset.test):,} test images, {checked}"
