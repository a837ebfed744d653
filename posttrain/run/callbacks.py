"""What watches a run: the metrics file, the completions file, the progress line."""

from __future__ import annotations

import math
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from posttrain.run.directory import RunDirectory, append_json_lines, drop_lines_after

# What the progress line shows, in this order, where a run logs it.
_SHOWN = {
    "loss": "loss",
    "reward": "reward",
    "entropy": "entropy",
    "mean_token_accuracy": "accuracy",
    "completions/mean_length": "length",
}


class RunRecorder(TrainerCallback):
    """Writes metrics.jsonl and completions.jsonl; lines after a resumed step are written anew."""

    def __init__(self, run: RunDirectory, *, completions_per_log: int = 8) -> None:
        self.run = run
        self.completions_per_log = completions_per_log
        self.trainer: Any = None  # set once the trainer exists; gives the sampled completions
        self._started = time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            for path in (self.run.metrics, self.run.completions):
                drop_lines_after(path, state.global_step)

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
        row = {"step": state.global_step, "seconds": round(time.monotonic() - self._started, 3), **logs}
        append_json_lines(self.run.metrics, [row])
        if self.trainer is not None and "reward" in logs:
            latest = self.trainer.last_completions()[-self.completions_per_log :]
            append_json_lines(self.run.completions, [{"step": state.global_step, **sample} for sample in latest])


class ConsoleProgress(TrainerCallback):
    """One live line on a terminal, one plain line per log elsewhere."""

    def __init__(self, title: str, console: Console | None = None) -> None:
        self.title = title
        self.console = console or Console(stderr=True)
        self._progress: Progress | None = None
        self._task: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or not self.console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=self.console,
        )
        self._progress.start()
        self._task = self._progress.add_task(
            self.title, total=state.max_steps, completed=state.global_step, numbers=""
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._progress is not None:
            self._progress.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        shown = [
            f"{label} {logs[key]:.4g}"
            for key, label in _SHOWN.items()
            if isinstance(logs.get(key), (int, float)) and math.isfinite(logs[key])
        ]
        if self._progress is not None:
            self._progress.update(self._task, numbers="  ".join(shown))
        else:
            self.console.print(f"{self.title} {state.global_step}/{state.max_steps}  {'  '.join(shown)}", highlight=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
