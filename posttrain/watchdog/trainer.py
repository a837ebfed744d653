"""A Trainer mixin that sets the phases of training and keeps the watchdog awake while it trains."""

# ruff: noqa: ARG002 - names and arguments of the hooks are those of transformers.TrainerCallback

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from posttrain.watchdog import Limits, phases, watching


class _Steps(TrainerCallback):
    """The phases around the optimiser step."""

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        phases.enter("optimizer")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        phases.enter("callbacks")


class WatchedTrainer(Trainer):
    """Mixin; put it before the TRL trainer in the bases.

    Attributes:
        watchdog: Limits in seconds, or None: ``trainer.watchdog = Limits(phases={"rewards": 300})``.
    """

    watchdog: Limits | None = Limits()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # before the callbacks of others: they are then in their own phase
        self.callback_handler.callbacks.insert(0, _Steps())

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as the trainer does.

        Raises:
            posttrain.watchdog.RankFailure: Another rank died, hung or failed.
        """
        output = Path(self.args.output_dir or ".")
        with watching(
            output / "watchdog",
            self.watchdog,
            rank=self.args.process_index,
            world=self.args.world_size,
            checkpoints=output,
            go_on="go on with trainer.train(resume_from_checkpoint=True)",
        ):
            phases.chapter("loading")
            return super().train(*args, **kwargs)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Get the rows of an optimiser step."""
        phases.step(self.state.global_step + 1)
        return super().get_batch_samples(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One micro-step; generation and log-prob passes within it are phases of their own."""
        with phases.phase("backward"):
            loss: torch.Tensor = super().training_step(*args, **kwargs)
        return loss

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as the trainer does."""
        with phases.phase("evaluation"):
            return super().evaluation_loop(*args, **kwargs)
