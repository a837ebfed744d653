"""torch, imported on first use.

Method files need torch to compute and a config check needs the methods' parameters but no torch.
``from posttrain._lazy import torch`` serves both: type checkers see the real module, the interpreter
loads it at the first attribute access.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any


class _LazyModule(ModuleType):
    """A module that imports its namesake when an attribute is first read."""

    def __getattr__(self, attribute: str) -> Any:
        # dunder probes (inspect, pytest, copy) must not pull the real module in
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return getattr(importlib.import_module(self.__name__), attribute)


if TYPE_CHECKING:
    import torch as torch
else:
    torch = _LazyModule("torch")
