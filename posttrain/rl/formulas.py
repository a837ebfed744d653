"""What TRL computes inside its loss and cannot be asked for: divisors and advantages, as pure functions.

The contract tests of ``tests/rl/test_rl_seams.py`` hold them to TRL's own results.
"""

from __future__ import annotations

import torch
from trl.trainer.utils import nanstd


def aggregate(
    values: torch.Tensor,
    mask: torch.Tensor,
    loss_type: str,
    *,
    accumulation: float,
    max_completion_length: int,
    items: torch.Tensor | float,
) -> torch.Tensor:
    """Reduce a per-token term to a scalar with exactly the divisor of TRL's ``loss_type``.

    Args:
        values: (B, C) per-token term.
        mask: (B, C), 1 on tokens that count.
        loss_type: Any of TRL's.
        accumulation: Micro-steps of the current optimiser step; 1 in evaluation.
        max_completion_length: The constant of ``dr_grpo``.
        items: Active tokens of one accumulation window per process (``dapo``, ``cispo``, ``vespo``).

    Raises:
        ValueError: Unknown ``loss_type``.
    """
    masked = values.masked_fill(mask == 0, 0.0)  # a product would let a NaN of a padded token through
    if loss_type in ("grpo", "sapo"):
        return (masked.sum(-1) / mask.sum(-1).clamp(min=1.0)).mean() / accumulation
    if loss_type == "bnpo":
        return masked.sum() / mask.sum().clamp(min=1.0) / accumulation
    if loss_type == "dr_grpo":
        return masked.sum() / (values.size(0) * max_completion_length) / accumulation
    if loss_type in ("dapo", "cispo", "vespo"):
        return masked.sum() / items
    if loss_type == "luspo":
        return masked.sum(-1).mean() / accumulation
    raise ValueError(f"no divisor is known for loss_type={loss_type!r}")


def group_advantages(
    rewards: torch.Tensor,
    weights: torch.Tensor,
    group_size: int,
    *,
    scale: str = "group",
    aggregation: str = "sum_then_normalize",
) -> torch.Tensor:
    """Return TRL's advantages for groups of any size (TRL knows only ``num_generations``).

    Args:
        rewards: (N, F) of all ranks, whole groups one after the other, NaN where a function does not apply.
        weights: (F,) weights of the functions.
        group_size: Rows per group.
        scale: ``scale_rewards`` of the configuration: ``group``, ``batch`` or ``none``.
        aggregation: ``multi_objective_aggregation`` of the configuration.

    Returns:
        (N,); 0 for a row without any reward, which does not count in its group's mean and deviation either.
    """
    unscored = rewards.isnan().all(dim=1)
    if aggregation == "normalize_then_sum":
        grouped = rewards.view(-1, group_size, rewards.size(1))
        spread = nanstd(grouped, dim=1, keepdim=True) + 1e-4
        normal = (grouped - grouped.nanmean(dim=1, keepdim=True)) / spread
        # what follows is then one group: the whole batch
        rewards, scale, group_size = normal.view_as(rewards), "batch", rewards.size(0)
    total = (rewards * weights).nansum(dim=1).masked_fill(unscored, torch.nan)
    grouped = total.view(-1, group_size)
    centred = grouped - grouped.nanmean(dim=1, keepdim=True)
    if scale != "none":
        deviation = nanstd(grouped, dim=1, keepdim=True) if scale == "group" else nanstd(total)
        centred = centred / (deviation + 1e-4)
    return centred.flatten().nan_to_num(nan=0.0)
