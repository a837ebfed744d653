"""Settings of rollouts that are not TRL's: the section ``rollout`` of a configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class RolloutSettings(BaseModel):
    """``GRPOTrainer(..., rollout=RolloutSettings(truncated_sampling="accept"))``."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    truncated_sampling: Literal["correct", "accept"] = Field(
        default="correct",
        description="What the loss makes of top_p, top_k and min_p, see posttrain.rollout.truncation.",
    )
