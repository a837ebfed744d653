"""Settings of rollouts that are not TRL's: the section ``rollout`` of a configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from posttrain.config.paths import usable_path


class RolloutSettings(BaseModel):
    """``GRPOTrainer(..., rollout=RolloutSettings(truncated_sampling="accept"))``."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    truncated_sampling: Literal["correct", "accept"] = Field(
        default="correct",
        description="What the loss makes of top_p, top_k and min_p, see posttrain.rollout.truncation.",
    )
    probe_syncs: int = Field(
        default=3, ge=0, description="Syncs after which vLLM is checked, see posttrain.rollout.verify."
    )
    probe_limit: float | None = Field(
        default=None, gt=0, description="Largest mean gap then, nats per token; by type when unset."
    )
    weights_dir: str | None = Field(
        default=None,
        min_length=1,
        description="With vllm_mode: server, the folder weights go through, see posttrain.rollout.files.",
    )
    server_patience: float = Field(
        default=50.0, ge=0, description="Seconds to wait for a vLLM server that was lost to come back."
    )

    _usable = field_validator("weights_dir")(usable_path)
