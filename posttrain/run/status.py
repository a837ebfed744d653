"""How a run is going or how it ended: ``status.json`` and ``failures.jsonl`` in the run directory.

A run that is killed outright (SIGKILL, power) writes nothing more: its status stays ``running`` while no
process holds the folder. Whoever reads the files puts the two together
(:func:`posttrain.doctor.run.state_of`).
"""

from __future__ import annotations

import contextlib
import os
import socket
import traceback
from datetime import UTC, datetime
from typing import Any, Literal

from posttrain.errors import describe
from posttrain.run.directory import RunDirectory, append_json_lines, read_json_object, write_json

State = Literal["running", "finished", "stopped", "failed"]
TRACE_LINES = 40


def write_status(run: RunDirectory, state: State, **more: Any) -> None:
    """Write the state of a run; a full disk does not hide the error that is being reported.

    Args:
        run: Whose.
        state: ``running``, ``finished``, ``stopped`` (from outside: Ctrl-C or SIGTERM) or ``failed``.
        **more: Further entries; those written earlier are kept.
    """
    with contextlib.suppress(OSError):
        status = read_status(run) if state != "running" else {}
        if state == "running":
            status = {"started": _now(), "pid": os.getpid(), "host": socket.gethostname()}
        else:
            status["ended"] = _now()
        write_json(run.status, {**status, "state": state, **more})


def record_end(run: RunDirectory, error: BaseException, *, rank: int = 0) -> None:
    """Write down what ended a run; any rank may call it, the first one also sets the status.

    Args:
        run: Whose.
        error: What was raised; KeyboardInterrupt stands for a stop from outside.
        rank: Of this process.
    """
    if isinstance(error, KeyboardInterrupt):
        if rank == 0:
            by = "SIGTERM" if type(error).__name__ == "Terminated" else "Ctrl-C"
            write_status(run, "stopped", by=by)
        return
    from posttrain.run.manifest import redact

    trace = "".join(traceback.format_exception(error)).splitlines()[-TRACE_LINES:]
    row = {
        "time": _now(),
        "rank": rank,
        "type": type(error).__name__,
        "error": describe(error),
        "traceback": trace,
    }
    with contextlib.suppress(OSError):
        append_json_lines(run.failures, [redact(row)])
    if rank == 0:
        write_status(run, "failed")


def read_status(run: RunDirectory) -> dict[str, Any]:
    """Return what status.json holds, or nothing where it is missing or damaged."""
    return read_json_object(run.status)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
