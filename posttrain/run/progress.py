"""The progress of a run on the console: a live display on a terminal, one plain line per log elsewhere."""

# ruff: noqa: ARG002, D102 - names and arguments of the hooks are those of transformers.TrainerCallback

from __future__ import annotations

import logging
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from posttrain.run.held_out import PREFIX

_SHARE = "{:.0%}".format
_NUMBER = "{:.4g}".format

# What is shown, in this order, where a run logs it.
_SHOWN: dict[str, tuple[str, Callable[[float], str]]] = {
    "loss": ("loss", _NUMBER),
    "reward": ("reward", _NUMBER),
    "entropy": ("entropy", _NUMBER),
    "groups/useful": ("useful", _SHARE),
    "rewards/accuracies": ("preferences", _NUMBER),
    "rewards/margins": ("margin", _NUMBER),
    "mean_token_accuracy": ("token accuracy", _NUMBER),
    "accuracy": ("preferences", _NUMBER),
    "margin": ("margin", _NUMBER),
    "completions/mean_length": ("length", _NUMBER),
}
# Held-out numbers stay in sight until the next evaluation; the first of each kind is enough.
_HELD_OUT = ("pass@1", "accuracy", "win_rate", "log_loss")
_STEPS_FOR_PACE = 20


class Pace:
    """How fast a run goes: tokens per second, and the time that is left.

    Args:
        clock: Returns seconds; another one in tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._steps: deque[tuple[float, int]] = deque(maxlen=_STEPS_FOR_PACE + 1)
        self._tokens: tuple[float, float] | None = None

    def begin(self, step: int, tokens: float) -> None:
        """Start, or go on from ``step`` with ``tokens`` seen."""
        self._steps.clear()
        self._steps.append((self.clock(), step))
        self._tokens = (self.clock(), tokens)

    def step(self, step: int) -> None:
        """Take note of a step that is done."""
        self._steps.append((self.clock(), step))

    def tokens_per_second(self, tokens: float) -> float | None:
        """Return the speed since the last call, over everything that happened in between."""
        now = self.clock()
        before, self._tokens = self._tokens, (now, tokens)
        if before is None or now <= before[0] or tokens <= before[1]:
            return None
        return (tokens - before[1]) / (now - before[0])

    def left(self, step: int, of: int) -> float | None:
        """Return the seconds to the end at the pace of the latest steps, or None before the first one."""
        if len(self._steps) < 2:
            return None
        (began, first), (now, last) = self._steps[0], self._steps[-1]
        if last <= first:
            return None
        return max(0.0, (now - began) / (last - first) * (of - step) - (self.clock() - now))


class ConsoleProgress(TrainerCallback):
    """A bar and the latest numbers on a terminal, one plain line per log elsewhere; on the main process only.

    Args:
        title: What is being trained.
        console: Where; stderr when None.
        clock: Returns seconds; another one in tests.
    """

    def __init__(
        self, title: str, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.title = title
        self.console = console or Console(stderr=True)
        self.pace = Pace(clock)
        self._began = 0.0
        self._live: Live | None = None
        self._redirected: list[tuple[logging.StreamHandler[Any], Any]] = []
        self._place = (0, 0)
        self._numbers: list[tuple[str, str]] = []
        self._held_out: tuple[str, str] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        seen = [row["num_tokens"] for row in state.log_history if "num_tokens" in row]
        self.pace.begin(state.global_step, seen[-1] if seen else 0.0)
        self._began = self.pace.clock()
        self._place = (state.global_step, state.max_steps)
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            self._live = Live(console=self.console, get_renderable=self._display, refresh_per_second=2)
            self._live.start()
            # Live takes over sys.stderr; a handler that kept the old one would write across the display
            for handler in _terminal_handlers():
                self._redirected.append((handler, handler.stream))
                handler.setStream(sys.stderr)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self._place = (state.global_step, state.max_steps)
            self.pace.step(state.global_step)

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
        self._numbers = self._read(logs)
        if self._live is None:
            parts = [f"{label} {value}" for label, value in self._numbers]
            left = self.pace.left(state.global_step, state.max_steps)
            parts += [f"left {_duration(left)}"] if left is not None else []
            line = f"{self.title} {state.global_step}/{state.max_steps}  {'  '.join(parts)}"
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _read(self, logs: Mapping[str, Any]) -> list[tuple[str, str]]:
        shown = [
            (label, form(logs[key]))
            for key, (label, form) in _SHOWN.items()
            if _is_number(logs.get(key)) and not (key == "loss" and _is_number(logs.get("reward")))
        ]
        if _is_number(logs.get("num_tokens")):
            speed = self.pace.tokens_per_second(logs["num_tokens"])
            shown += [] if speed is None else [("tok/s", f"{speed:,.0f}")]
        for name in _HELD_OUT:
            if _is_number(logs.get(PREFIX + name)):
                self._held_out = (f"held-out {name}", f"{logs[PREFIX + name]:.3f}")
                break
        else:
            if _is_number(logs.get("eval_reward")) or _is_number(logs.get("eval_loss")):
                key = "reward" if _is_number(logs.get("eval_reward")) else "loss"
                self._held_out = (f"held-out {key}", _NUMBER(logs[f"eval_{key}"]))
        return shown + ([self._held_out] if self._held_out else [])

    def _display(self) -> RenderableType:
        step, of = self._place
        left = self.pace.left(step, of)
        width = self.console.width
        ends = [
            f"{step}/{of}",
            *([_duration(self.pace.clock() - self._began)] if width >= 70 else []),
            "left " + ("-" if left is None else _duration(left)),
        ]
        bar = max(6, min(24, width - len(self.title) - 1 - sum(len(text) + 1 for text in ends)))
        line = Table.grid(padding=(0, 1))
        line.add_row(
            Text(self.title, style="bold"),
            ProgressBar(total=max(of, 1), completed=step, width=bar),
            *ends[:-1],
            Text(ends[-1], style="cyan"),
        )
        numbers = (
            Text("  ").join(Text.assemble((f"{label} ", "dim"), value) for label, value in row)
            for row in _rows(self._numbers, width)
        )
        return Group(line, *numbers)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Give the terminal back; also called when training ends in an error."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        while self._redirected:
            handler, stream = self._redirected.pop()
            handler.setStream(stream)


def _rows(numbers: list[tuple[str, str]], width: int) -> Iterator[list[tuple[str, str]]]:
    """Yield numbers line by line, none parted from its name, as many as fit beside each other."""
    row: list[tuple[str, str]] = []
    used = 0
    for label, value in numbers:
        length = cell_len(f"{label} {value}")
        if row and used + 2 + length > width:
            yield row
            row, used = [], 0
        used += length + (2 if row else 0)
        row.append((label, value))
    if row:
        yield row


def _terminal_handlers() -> list[logging.StreamHandler[Any]]:
    """Return the log handlers of all libraries that write to the terminal's stderr."""
    loggers = [logging.getLogger(), *logging.root.manager.loggerDict.values()]
    found = (
        handler
        for logger in loggers
        if isinstance(logger, logging.Logger)
        for handler in logger.handlers
        if isinstance(handler, logging.StreamHandler)
        and not isinstance(handler, logging.FileHandler)
        and handler.stream is sys.__stderr__
    )
    return list(dict.fromkeys(found))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
