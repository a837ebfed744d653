"""posttrain: LLM post-training methods that compose, on top of TRL.

Importing the package is cheap: torch, transformers and TRL are loaded when a trainer is first
touched, so that ``posttrain check`` and the verifier workers start in a fraction of a second.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_LAZY = {
    "DPOTrainer": "posttrain.preference.trainer",
    "GRPOTrainer": "posttrain.rl.trainer",
    "RewardTrainer": "posttrain.preference.reward_trainer",
    "SFTTrainer": "posttrain.sft.trainer",
    "Select": "posttrain.selection.settings",
    "SelectionPlan": "posttrain.selection.plan",
    "load_delta": "posttrain.selection.delta_apply",
}

__all__ = [
    "DPOTrainer",
    "GRPOTrainer",
    "RewardTrainer",
    "SFTTrainer",
    "Select",
    "SelectionPlan",
    "__version__",
    "load_delta",
]

if TYPE_CHECKING:
    from posttrain.preference.reward_trainer import RewardTrainer
    from posttrain.preference.trainer import DPOTrainer
    from posttrain.rl.trainer import GRPOTrainer
    from posttrain.selection.delta_apply import load_delta
    from posttrain.selection.plan import SelectionPlan
    from posttrain.selection.settings import Select
    from posttrain.sft.trainer import SFTTrainer


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'posttrain' has no attribute {name!r}")


def __dir__() -> list[str]:  # completion, and Python's own "did you mean"
    return sorted({*globals(), *__all__})
