"""The model that a run starts from."""

from __future__ import annotations

from typing import Any

import torch

from posttrain.config.schema import RunConfig
from posttrain.config.tasks import TASKS
from posttrain.models.load import load_model
from posttrain.models.scoring import load_reward_model


def slow_here(config: RunConfig) -> str | None:
    """Return a warning where a configuration is for GPUs, by its 16-bit weights, and there is none."""
    if torch.accelerator.is_available() or config.model.dtype not in ("bfloat16", "float16"):
        return None
    return (
        f"warning: no GPU is seen here, so {config.model.path} in {config.model.dtype} computes on the CPU, "
        "which is for models of some million parameters. A first run: configs/rlvr/quickstart.yaml. What is "
        "seen: posttrain doctor. The memory a GPU needs: posttrain check --deep CONFIG --device cuda"
    )


def start_model(config: RunConfig, seed: int) -> tuple[Any, Any]:
    """Return the model a run starts from, before any warm start, and its tokenizer; on the CPU.

    Raises:
        posttrain.models.load.ModelLoadError: It cannot be loaded.
    """
    load = load_reward_model if TASKS[config.task].scores else load_model
    return load(config.model, seed=seed)
