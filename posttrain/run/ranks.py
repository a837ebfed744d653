"""The processes of a run, one of which writes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from rich.console import Console

from posttrain.errors import describe, is_request_error
from posttrain.run.directory import RunError

T = TypeVar("T")


class Ranks:
    """The processes of a run, one of which writes."""

    def __init__(self) -> None:
        self.state = PartialState(cpu=not torch.accelerator.is_available())
        self.console = Console(stderr=True, soft_wrap=True)

    def say(self, text: str) -> None:
        """Print a line on stderr, once."""
        if self.state.is_main_process:
            self.console.print(text, highlight=False, markup=False)

    def on_main(self, action: Callable[[], T]) -> T:
        """Do something on the main process; all ranks get its result, or fail when it failed."""
        outcome: list[Any] = [None, None]
        failure: Exception | None = None
        if self.state.is_main_process:
            try:
                outcome[0] = action()
            except Exception as error:  # raised below, once the others know
                failure, outcome[1] = error, (is_request_error(error), describe(error))
        if self.state.num_processes > 1:
            broadcast_object_list(outcome)
        if failure is not None:
            raise failure
        if outcome[1] is not None:
            wrong_request, text = outcome[1]
            raise RunError(text) if wrong_request else RuntimeError(f"the main process failed: {text}")
        result: T = outcome[0]
        return result
