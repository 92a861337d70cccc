"""torch, imported when it is first used.

Importing torch takes over a second.  Checking a config, `dltrain --help`, `dltrain list` and the JSON schema need the
components' signatures and not torch itself, so files of components take it from here.  An attribute is looked up once
and then kept, so a call costs what it costs on the module.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch as torch
    from torch import nn as nn
    from torch.nn import functional as F
else:

    class _Lazy:
        def __init__(self, module: str) -> None:
            self.__name__ = module

        def __getattr__(self, name: str) -> Any:
            value = getattr(importlib.import_module(self.__name__), name)
            setattr(self, name, value)
            return value

    torch = _Lazy("torch")
    nn = _Lazy("torch.nn")
    F = _Lazy("torch.nn.functional")

__all__ = ["F", "nn", "torch"]
