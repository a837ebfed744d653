"""The kinds of training. Adding one: a name in ``Task`` and a row in ``TASKS``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Task = Literal["sft", "rlvr", "ttrl", "preference", "reward"]


@dataclass(frozen=True)
class TaskSpec:
    """What a task takes from TRL and allows in a configuration.

    Attributes:
        config_class: TRL's configuration class, whose fields ``trainer:`` may hold.
        config_module: Its module inside ``trl.trainer``.
        methods: Module with the ``resolve`` and ``available`` functions of its methods, None without methods.
        generates: Whether training samples groups of completions, so that GRPO's batch arithmetic applies.
        warm_start: Whether supervised fine-tuning may go before it.
        requires: Methods that must be there.
        pairs: Whether rows are pairs of a better and a worse answer.
        scores: Whether the model gives one number for a text instead of a text.
    """

    config_class: str
    config_module: str
    methods: str | None = None
    generates: bool = False
    warm_start: bool = False
    requires: tuple[str, ...] = ()
    pairs: bool = False
    scores: bool = False


TASKS: dict[Task, TaskSpec] = {
    "sft": TaskSpec("SFTConfig", "sft_config", methods="posttrain.sft.registry"),
    "rlvr": TaskSpec(
        "GRPOConfig", "grpo_config", methods="posttrain.rl.registry", generates=True, warm_start=True
    ),
    "ttrl": TaskSpec(
        "GRPOConfig",
        "grpo_config",
        methods="posttrain.rl.registry",
        generates=True,
        warm_start=True,
        requires=("ttrl",),
    ),
    "preference": TaskSpec("DPOConfig", "dpo_config", methods="posttrain.preference.registry", pairs=True),
    "reward": TaskSpec("RewardConfig", "reward_config", pairs=True, scores=True),
}
