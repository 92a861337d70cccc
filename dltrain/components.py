"""Importing this registers every component that dltrain ships, also those of a file that is new in data/ or models/.

None of them imports torch before it is used.
"""

import importlib
import pkgutil

from dltrain import averages, data, losses, models, optim, schedules, tasks

for _package in (data, models):
    for _module in pkgutil.iter_modules(_package.__path__, f"{_package.__name__}."):
        importlib.import_module(_module.name)

__all__ = ["averages", "data", "losses", "models", "optim", "schedules", "tasks"]
