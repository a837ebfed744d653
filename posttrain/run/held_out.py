"""Held-out evaluation while a run trains: ``evaluate: {every: N}``.

The numbers appear in the log of their step as ``held_out/pass@1`` and so on. Training itself is the same bit
for bit: evaluation draws its samples from random streams of its own.
"""

# ruff: noqa: ARG002, D102 - names and arguments of the hooks are those of transformers.TrainerCallback

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from posttrain.evaluation.results import Evaluation

PREFIX = "held_out/"


class HeldOutEvaluation(TrainerCallback):
    """Evaluates the model every so many optimiser steps, and puts the result into the log of that step.

    It has to come before the callbacks that read logs. A step that is evaluated is also logged, so that a
    checkpoint of that step has the numbers.

    Args:
        every: Optimiser steps between two evaluations. The last step is left to the evaluation of the run.
        evaluate: Gets the unwrapped model; called on every rank.
    """

    def __init__(self, every: int, evaluate: Callable[[torch.nn.Module], Evaluation]) -> None:
        self.every = every
        self.evaluate = evaluate
        self._numbers: dict[str, float] = {}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step % self.every or state.global_step == state.max_steps:
            return
        result = self.evaluate(kwargs["model"])
        self._numbers = {
            f"{PREFIX}{name}": estimate.value
            for name, estimate in result.metrics.items()
            if estimate.value is not None
        }
        control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or not self._numbers:
            return
        logs.update(self._numbers)
        # the history that a checkpoint keeps has its own copy of the log
        if state.log_history:
            state.log_history[-1].update(self._numbers)
        self._numbers = {}
