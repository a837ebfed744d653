"""The model that a run starts from."""

from __future__ import annotations

from typing import Any

from posttrain.config.schema import RunConfig
from posttrain.config.tasks import TASKS
from posttrain.models.load import load_model
from posttrain.models.scoring import load_reward_model


def start_model(config: RunConfig, seed: int) -> tuple[Any, Any]:
    """Return the model a run starts from, before any warm start, and its tokenizer; on the CPU.

    Raises:
        posttrain.models.load.ModelLoadError: It cannot be loaded.
    """
    load = load_reward_model if TASKS[config.task].scores else load_model
    return load(config.model, seed=seed)
