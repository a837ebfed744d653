"""What the verbs of the command line share: answers, messages and exit codes."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of text.")]


def stdout() -> Console:
    """Return the console for answers; a pipe has no width, and 80 columns would fold every table cell."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


SPEAKING = 10.0
"""Seconds in which the first process of a machine can say what is wrong, before the others end."""


def request_error(message: str) -> NoReturn:
    """Say on stderr what is wrong with the request, and end with exit code 2.

    All processes of a run read the same request, and the first of a machine speaks for them. The launcher
    ends the others when one has ended: that must not be one of the silent ones, before the first has spoken.
    """
    if first_on_this_machine() or not _ended_while_waiting(SPEAKING):
        stderr().print(f"error: {message}", markup=False)
    raise typer.Exit(2)


def _ended_while_waiting(seconds: float) -> bool:
    """Whether the launcher (or Ctrl-C) asks this process to end while it waits; else it is on its own."""
    try:
        time.sleep(seconds)
    except KeyboardInterrupt:
        return True
    return False


def first_on_this_machine() -> bool:
    """Whether this is the process that speaks for those a launcher started with it."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def main_process() -> bool:
    """Whether this is the process that prints the result."""
    return os.environ.get("RANK", "0") == "0"


def stderr() -> Console:
    """Return the console for messages."""
    return Console(stderr=True, soft_wrap=True, highlight=False)


@contextmanager
def loading() -> Iterator[None]:
    """Say on a terminal that libraries are being imported, which takes seconds; the line goes away after."""
    console = stderr()
    if console.is_terminal and first_on_this_machine():
        with console.status("loading torch, transformers and TRL"):
            yield
    else:
        yield


class Terminated(KeyboardInterrupt):
    """SIGTERM, turned into an exception so that the run ends its verifiers and gives the terminal back."""


def _terminate(number: int, frame: Any) -> NoReturn:
    del number, frame
    # launchers send more than one signal, and the second would cut off the way out
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated


@contextmanager
def reported_errors(go_on: str = "") -> Iterator[list[str]]:
    """Turn what went wrong into a message and an exit code; tracebacks are for ``POSTTRAIN_DEBUG=1``.

    A request that cannot be carried out as it stands (configuration, data, model path, run directory) ends
    with 2, a run that failed under way or was interrupted with 1.

    Args:
        go_on: What to do after an interruption or when the disk was full.

    Yields:
        Where to add what else helps after a failure.
    """
    hints = ["POSTTRAIN_DEBUG=1 shows where"]
    debug = bool(os.environ.get("POSTTRAIN_DEBUG"))
    in_main_thread = threading.current_thread() is threading.main_thread()
    earlier = signal.signal(signal.SIGTERM, _terminate) if in_main_thread else None
    try:
        yield hints
    except typer.Exit:
        raise
    except KeyboardInterrupt as interrupt:
        if first_on_this_machine():
            what = "terminated" if isinstance(interrupt, Terminated) else "interrupted"
            stderr().print(f"{what}; {go_on}" if go_on else what, markup=False)
        raise typer.Exit(1) from None
    except Exception as error:
        if debug:
            raise
        from posttrain.errors import describe, is_request_error

        if is_request_error(error):
            request_error(str(error))
        if type(error).__name__ == "RankFailure":
            raise typer.Exit(1) from None  # the watchdog has told it, once per machine
        rank = f" (rank {os.environ['RANK']})" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = f"\nThe disk is full: free space, then {go_on}" if full and go_on else ""
        stderr().print(f"failed{rank}: {describe(error)}{hint}\n({'; '.join(hints)})", markup=False)
        raise typer.Exit(1) from None
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, earlier)


def leave_process_group() -> None:
    """Take this process out of the group of ranks, as torch asks of one that ends.

    Only where all went well: behind an error the others may never come, and the launcher ends them.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


@contextmanager
def answers(as_json: bool) -> Iterator[None]:
    """Keep stdout for the answer: whatever libraries print while it is computed goes to stderr."""
    from posttrain.run.console import quiet_libraries

    quiet_libraries()
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        yield
    leave_process_group()


def print_json(value: Any, *, indent: int | None = 2) -> None:
    """Print ``value`` as JSON on stdout; what has no UTF-8 form (lone surrogates) stays an escape."""
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    typer.echo(text.encode("utf-8", errors="backslashreplace").decode("utf-8"))
