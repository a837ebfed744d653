"""The GRPO family: the trainer, the method protocol, and one file per method.

``from posttrain.rl import ACE`` works for every method found in this package, and
``from posttrain.rl import GRPOTrainer`` for the trainer; each is imported when first touched.
"""

from __future__ import annotations

import importlib
from typing import Any


def __getattr__(name: str) -> Any:
    if name == "GRPOTrainer":
        return importlib.import_module("posttrain.rl.trainer").GRPOTrainer
    # classes only: module names must fall through, or importing the registry would ask for itself
    if name[0].isupper():
        for cls in importlib.import_module("posttrain.rl.registry").available().values():
            if cls.__name__ == name:
                return cls
    raise AttributeError(f"module 'posttrain.rl' has no attribute {name!r}")
