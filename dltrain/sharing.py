"""Data that several runs of one process share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dltrain.config import Config
from dltrain.data.dataset import Dataset
from dltrain.registry import Component

Kept = dict[str, Dataset]


@dataclass(frozen=True)
class _ReadOnce(Component):
    """A data set that is read where it is first asked for, and kept for all that share `kept`."""

    kept: Kept = field(default_factory=dict)
    key: str = ""

    def __call__(self, *positional: Any) -> Dataset:
        if self.key not in self.kept:
            self.kept[self.key] = super().__call__(*positional)
        return self.kept[self.key]


def read_once(config: Config, kept: Kept) -> Config:
    """The config, its data set to be taken from `kept`, where the first run that needs it leaves it."""
    data, source = config.data, config.data.source
    key = repr((source.name, source.plain(), data.root, data.verify))  # what is in it depends on these alone
    shared = _ReadOnce(source.kind, source.name, source.args, kept, key)
    return config.model_copy(update={"data": data.model_copy(update={"source": shared})})
