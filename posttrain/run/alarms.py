"""Named alarms over what a run logs, while it trains."""

# ruff: noqa: ARG002 - names and arguments of the hooks are those of transformers.TrainerCallback

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from posttrain.run.directory import append_json_lines, keep_json_lines
from posttrain.run.rules import Alarm, History, Limits, new_alarms

logger = logging.getLogger(__name__)


class Alarms(TrainerCallback):
    """Watches any TRL run: ``callbacks=[Alarms()]``.

    Args:
        path: File that gets one JSON object per alarm, or None.
        limits: When alarms go off.
    """

    def __init__(self, path: Path | None = None, limits: Limits | None = None) -> None:
        self.path = path
        self.limits = limits or Limits()
        self.history = History()
        self.raised: dict[str, Alarm] = {}

    def check(self, step: int) -> Iterator[Alarm]:
        """Yield the alarms that go off now for the first time."""
        for alarm in new_alarms(self.history, self.limits, step, self.raised):
            self.raised[alarm.name] = alarm
            yield alarm

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up the history of a run that is resumed; what it said already is not said again."""
        self.history = History()
        for logs in state.log_history:
            self.history.add(logs)
        if self.path is not None and state.is_world_process_zero:
            earlier = keep_json_lines(self.path, lambda row: row["step"] <= state.global_step)
            self.raised = {row["name"]: Alarm(**row) for row in earlier}

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Take a log in and report new alarms, on the main process."""
        if not state.is_world_process_zero or not logs:
            return
        self.history.add(logs)
        for alarm in self.check(state.global_step):
            logger.warning("%s at step %d: %s. %s", alarm.name, alarm.step, alarm.message, alarm.advice)
            if self.path is not None:
                append_json_lines(self.path, [asdict(alarm)])
