"""Preference optimisation and reward models: the trainers, the method protocol, and one file per method.

``from posttrain.preference import RPO`` works for every method found in this package, and for ``DPOTrainer``
and ``RewardTrainer``; each is imported when first touched.
"""

from __future__ import annotations

import importlib
from typing import Any

_TRAINERS = {"DPOTrainer": "trainer", "RewardTrainer": "reward_trainer"}


def __getattr__(name: str) -> Any:
    if name in _TRAINERS:
        return getattr(importlib.import_module(f"posttrain.preference.{_TRAINERS[name]}"), name)
    # classes only: module names must fall through, or importing the registry would ask for itself
    if name[0].isupper():
        for cls in importlib.import_module("posttrain.preference.registry").available().values():
            if cls.__name__ == name:
                return cls
    raise AttributeError(f"module 'posttrain.preference' has no attribute {name!r}")
