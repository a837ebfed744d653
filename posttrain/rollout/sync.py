"""The weight sync of a run whose rollouts vLLM makes in the same process (TRL's colocate mode)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from trl.generation.vllm_generation import empty_cache

from posttrain.rollout.engine import load_updates
from posttrain.rollout.updates import Update, WeightStream

logger = logging.getLogger(__name__)


class WeightSync:
    """Brings the engine of a ``trl`` ``VLLMGeneration`` up to date with the trainer; call it.

    It stands in for ``VLLMGeneration.sync_weights``, which TRL calls once before the first generation after a
    step. The first sync sends every tensor, the others what can have changed. Collective.

    Args:
        generation: TRL's object, in colocate mode.
        stream: The weights of the model that trains.

    Attributes:
        count: Syncs so far.
        sent: Bytes of the last one.
        on_synced: Called with this object after each sync.
    """

    def __init__(self, generation: Any, stream: WeightStream) -> None:
        self.generation, self.stream = generation, stream
        self.count = self.sent = 0
        self.on_synced: list[Callable[[WeightSync], None]] = []
        self._everything = True
        self._kept: frozenset[str] = frozenset()

    @property
    def share(self) -> float:
        """Bytes of the last sync as a share of those of the whole model."""
        return self.sent / self.stream.nbytes

    def forget(self) -> None:
        """Send every tensor the next time: weights changed otherwise than by training."""
        self._everything = True

    def __call__(self) -> None:
        """Send what the engine lacks.

        Raises:
            RolloutError: vLLM does not take some tensor.
        """
        generation = self.generation
        if generation.enable_sleep_mode:
            empty_cache()
            generation.llm.wake_up(tags=["weights"])
            generation._llm_weights_sleeping = False
        moving = self.stream.moving
        # sleep throws the weights away; layers that were frozen until now may not be kept for updates
        everything = self._everything or generation.enable_sleep_mode or not moving <= self._kept
        self.sent = 0
        updates = self._counted(self.stream.everything() if everything else self.stream.changed())
        generation.llm.collective_rpc(load_updates, args=(updates, moving if everything else None))
        if everything:
            self._kept = moving
        self._everything = False
        generation.llm.reset_prefix_cache()
        self.count += 1
        for hook in self.on_synced:
            hook(self)

    def _counted(self, updates: Iterator[Update]) -> Iterator[Update]:
        for update in updates:
            self.sent += update.nbytes
            yield update


def engine_dtype(model: torch.nn.Module, *, bf16: bool, fp16: bool) -> torch.dtype:
    """Return the type in which the engine should compute: that of the trainer's forward pass."""
    if bf16 or fp16:
        return torch.bfloat16 if bf16 else torch.float16
    return next(p.dtype for p in model.parameters() if p.is_floating_point())
