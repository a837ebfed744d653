"""Does the engine sample from the trainer's weights? The first answers after each of the first syncs say so.

vLLM reports the log-probability of every token it drew; the trainer computes the same one. They agree up
to rounding if, and only if, the weights, the type, the temperature and the arithmetic agree. After each
of the first ``rollout.probe_syncs`` syncs (3; 0 switches it off) the mean absolute gap over the tokens of
the first generation is compared with ``rollout.probe_limit``, and a run whose gap is above it stops,
before a step is made with such answers. These are the run's own prompts, in its own batches, with padding
and adapters as they are. It costs nothing where TRL computes the trainer's side anyway (its correction
for vLLM, on by default), else a forward of that batch. Under sharding the forward is collective, as every
other, and all ranks decide alike.

Limits, in nats per token, unless ``probe_limit`` gives one
    =====================  =======  =======================================================================
    trainer computes in    limit    measured here, mean over the tokens of a step
    =====================  =======  =======================================================================
    float32 on a CPU       1e-4     9e-8 to 2e-7 (two-layer Llamas, tied and untied, LoRA)
    float32 elsewhere      2e-3     not measured; TF32 rounds products to 10 bits
    bfloat16, float16      5e-2     6e-4 to 8e-4 (LoRA); large models are nearer to the limit
    =====================  =======  =======================================================================

A head that keeps old weights showed as 0.016 after two steps at a learning rate of 1e-3; at 1e-6 it moves
less than bfloat16 rounds, and no probe of the first steps sees it. That is what the gauges of every step
and the alarm ``rollout_gap`` are for (:mod:`posttrain.run.alarms`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from posttrain.rollout.updates import RolloutError


@dataclass(frozen=True)
class Gap:
    """How far the sampler's log-probabilities are from the trainer's.

    Attributes:
        total: Sum of absolute differences over the tokens, nats.
        tokens: How many tokens both know.
        worst: Largest absolute difference, NaN if the trainer's side has one.
        row: Where that is, in the batch of this rank,
        column: and in the completion.
    """

    total: float
    tokens: int
    worst: float
    row: int = 0
    column: int = 0

    @property
    def mean(self) -> float:
        """Nats per token; NaN without tokens."""
        return self.total / self.tokens if self.tokens else math.nan


def gap_of(own: torch.Tensor, sampled: torch.Tensor, mask: torch.Tensor) -> Gap:
    """Return the gap between two (B, C) tensors of log-probabilities, where ``mask`` (B, C) is not 0.

    Args:
        own: The trainer's.
        sampled: The sampler's; NaN where it has none to tell.
        mask: Tokens of the model.
    """
    known = mask.bool() & ~sampled.isnan()
    if not known.any():
        return Gap(0.0, 0, 0.0)
    gap = torch.where(known, (own.double() - sampled.double()).abs(), 0.0)
    place = int(torch.where(gap.isnan(), math.inf, gap).argmax())
    row, column = divmod(place, gap.size(1))
    return Gap(float(gap.sum()), int(known.sum()), float(gap[row, column]), row, column)


def default_limit(dtype: torch.dtype, device: str) -> float:
    """Return the largest mean gap that rounding explains, nats per token; see the table above.

    Args:
        dtype: Type in which trainer and engine compute.
        device: Type of the device.
    """
    if dtype.itemsize < 4:
        return 5e-2
    return 1e-4 if device == "cpu" else 2e-3


def refuse_gap(
    mean: float, limit: float, *, sync: int, sent: str, worst: str, dtype: torch.dtype, remedies: str = ""
) -> None:
    """Stop where the gap is above the limit.

    Args:
        mean: Nats per token, over all ranks.
        limit: The largest that is allowed.
        sync: Number of the sync, from 1.
        sent: What it sent, in words.
        worst: The worst token, in words.
        dtype: Type in which the trainer computes.
        remedies: What else to try, from the setup at hand.

    Raises:
        RolloutError: It is above it, or NaN.
    """
    if mean <= limit:
        return
    name = str(dtype).removeprefix("torch.")
    raise RolloutError(
        f"the engine does not sample from the trainer's weights: after sync {sync} ({sent}) "
        f"log-probabilities differ by {mean:.3g} nats per token on average, more than {limit:g}; worst: "
        f"{worst}. Things to try: let the engine compute in the trainer's type ({name}), unquantised; "
        f"{remedies}vllm_model_impl: transformers, where vLLM's own form of the architecture differs; "
        "rollout.probe_limit, if the arithmetic is known to differ that much, or rollout.probe_syncs: 0 to "
        "go on at your own risk"
    )
