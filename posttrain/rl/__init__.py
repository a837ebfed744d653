"""The GRPO family: the trainer, the method protocol, and one file per method.

``from posttrain.rl import ACE`` works for every method found in this package, and
``from posttrain.rl import GRPOTrainer`` for the trainer; each is imported when first touched.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "GRPOTrainer":
        from posttrain.rl.trainer import GRPOTrainer

        return GRPOTrainer
    if not name.startswith("_"):
        from posttrain.rl import registry

        for cls in registry.available().values():
            if cls.__name__ == name:
                return cls
    raise AttributeError(f"module 'posttrain.rl' has no attribute {name!r}")
