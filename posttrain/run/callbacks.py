"""What watches a run: the metrics file, the completions file, the weights about to be saved."""

# ruff: noqa: ARG002, D102 - names and arguments of the hooks are those of transformers.TrainerCallback

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from posttrain.run.directory import RunDirectory, append_json_lines, keep_json_lines


class RunRecorder(TrainerCallback):
    """Writes metrics.jsonl and completions.jsonl; what a resumed run logs again is dropped first.

    Args:
        run: Where to write.
        completions_per_log: How many of the latest completions each log keeps.
    """

    def __init__(self, run: RunDirectory, *, completions_per_log: int = 8) -> None:
        self.run = run
        self.completions_per_log = completions_per_log
        self.trainer: Any = None  # set once the trainer exists; gives the sampled completions
        self._started = time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        # a log comes before the checkpoint of its step; the summary at the end of training after it
        step = state.global_step
        logged = _was_logged(state)
        rows = keep_json_lines(
            self.run.metrics, lambda row: row.get("step", 0) <= step and "train_runtime" not in row
        )
        keep_json_lines(
            self.run.completions, lambda row: row["step"] < step or (logged and row["step"] == step)
        )
        self._started = time.monotonic() - max(
            (row["seconds"] for row in rows if isinstance(row.get("seconds"), (int, float))), default=0.0
        )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if self.trainer is not None and "reward" in logs:
            useful = usefulness(self.trainer.last_completions(), self.trainer.num_generations)
            logs.update(useful)  # for what reads the log after this
            if state.log_history:
                state.log_history[-1].update(useful)
        row = {"step": state.global_step, "seconds": round(time.monotonic() - self._started, 3), **logs}
        append_json_lines(self.run.metrics, [row])
        summary_of_a_logged_step = "train_runtime" in logs and _was_logged(state)
        if self.trainer is not None and "reward" in logs and not summary_of_a_logged_step:
            latest = self.trainer.last_completions()[-self.completions_per_log :]
            append_json_lines(
                self.run.completions,
                [{"step": state.global_step, **self._with_status(row)} for row in latest],
            )

    def _with_status(self, row: dict[str, Any]) -> dict[str, Any]:
        """Name the verdict of the first reward, which decides what is correct, ``status``."""
        own = f"{self.trainer.reward_func_names[0]}_status"
        return {"status" if key == own else key: value for key, value in row.items()}


def usefulness(rows: Sequence[Mapping[str, Any]], group_size: int) -> dict[str, float]:
    """Return how much of the latest generation can teach something.

    Args:
        rows: ``completion`` and ``advantage`` of each, groups contiguous.
        group_size: Completions per prompt.

    Returns:
        ``groups/useful``, the share of groups with an advantage that is not zero, and
        ``completions/distinct``, the mean share of different completions in a group; nothing without rows.
    """
    groups = [rows[start : start + group_size] for start in range(0, len(rows), group_size)]
    if not groups:
        return {}
    useful = [any(row["advantage"] for row in group) for group in groups]
    distinct = [len({str(row["completion"]) for row in group}) / len(group) for group in groups]
    return {"groups/useful": sum(useful) / len(groups), "completions/distinct": sum(distinct) / len(groups)}


def _was_logged(state: TrainerState) -> bool:
    """Whether the current step has a log of its own, beside the summary at the end of training."""
    return any(row["step"] == state.global_step and "loss" in row for row in state.log_history[-3:])


class FiniteWeights(TrainerCallback):
    """Refuses to save weights that are not finite: a resume would go on from the newest checkpoint.

    A finite loss and gradient do not exclude them: weight decay or a large step can overflow afterwards.
    """

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._check(state, control, kwargs["model"])

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._check(state, control, kwargs["model"])

    def _check(self, state: TrainerState, control: TrainerControl, model: torch.nn.Module) -> None:
        if not control.should_save:
            return
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not torch.isfinite(parameter.detach()).all():
                raise FloatingPointError(
                    f"the weights are not finite after {state.global_step} optimiser steps (first: {name}); "
                    "they were not saved, and earlier checkpoints are untouched. Lower the learning rate or "
                    "the weight decay, and go on with --resume."
                )
