"""The processes of a run, one of which writes."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from rich.console import Console

from posttrain.errors import describe, is_request_error
from posttrain.run.directory import RunError

T = TypeVar("T")

APPEAR_SECONDS = 20.0
"""How long a network file system may take to show a new file elsewhere."""


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

    def require_shared(self, folder: Path) -> None:
        """Refuse a folder of the main process that is another one, or none, on another machine.

        Checkpoints, weights for the export and the state of every rank lie there; all ranks read them.

        Raises:
            RunError: A rank does not see what the main process writes; on every rank.
        """
        if self.state.num_processes == 1:
            return
        with contextlib.ExitStack() as stack:

            def write() -> str:
                return stack.enter_context(
                    tempfile.NamedTemporaryFile(dir=folder, prefix=".seen-by-all-")
                ).name

            written = folder / Path(self.on_main(write)).name
            until = time.monotonic() + APPEAR_SECONDS
            while not (there := _seen(written)) and time.monotonic() < until:
                time.sleep(0.25)
            rank, host = self.state.process_index, socket.gethostname()
            blind = gather_object([] if there else [f"rank {rank} on {host}"])
        if blind:
            raise RunError(
                f"run_dir {folder} is not the same folder on all machines: {', '.join(blind)} cannot see "
                "what the main process writes there. Choose a run_dir on a file system that every node mounts"
            )


def _seen(file: Path) -> bool:
    """Whether a file is there, on a network file system too that remembers its folder as missing."""
    for folder in reversed(file.parents):
        with contextlib.suppress(OSError):
            os.scandir(folder).close()  # opening a folder makes an NFS client ask its server again
    return file.exists()
