"""Child processes of our own interpreter: how they are started, spoken to and ended. POSIX only."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

EXIT_PATIENCE_SECONDS = 2.0


def python_command(module: str) -> list[str]:
    """Return the command that runs a module of this package in a fresh interpreter.

    ``-P`` keeps a file of the working directory from standing in for a library module.
    """
    return [sys.executable, "-P", "-m", module]


def child_environment() -> dict[str, str]:
    """Return the environment of a child: this package importable, one thread, a fixed hash seed.

    The hash seed matters: five reasoning-gym tasks draw from sets, so their problems depend on it.
    """
    package_root = str(Path(__file__).resolve().parents[2])
    paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
    fixed = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONHASHSEED": "0", "TOKENIZERS_PARALLELISM": "false"}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return os.environ | fixed | threads


def import_path() -> list[str]:
    """Return the module search path of this process for a child, the working directory last if missing."""
    here = str(Path.cwd())
    path = [entry or here for entry in sys.path]
    return path if here in path else [*path, here]


class WorkerProcess:
    """One verifier process and the bytes on their way to and from it. It leads its own process group.

    Attributes:
        ready: Whether it has said that its verifier is loaded.
        outgoing: Bytes not yet written to it.
    """

    def __init__(self, hello: dict[str, Any]) -> None:
        self._process = subprocess.Popen(
            python_command("posttrain.rewards.worker"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
            env=child_environment(),
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.input = self._process.stdin.fileno()
        self.output = self._process.stdout.fileno()
        os.set_blocking(self.input, False)
        os.set_blocking(self.output, False)
        self.ready = False
        self.outgoing = bytearray(json.dumps(hello).encode() + b"\n")
        self._rest = b""

    @property
    def pid(self) -> int:
        """Process id, also of its group."""
        return self._process.pid

    def exited(self) -> bool:
        """Whether the process has ended by itself."""
        return self._process.poll() is not None

    def flush(self) -> None:
        """Write what the pipe takes now."""
        # a broken pipe means that the process died; the end of its output says so too
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            del self.outgoing[: os.write(self.input, self.outgoing)]

    def read_lines(self) -> tuple[list[bytes], bool]:
        """Return the complete lines that have arrived, and whether the output has ended."""
        try:
            chunk = os.read(self.output, 1 << 18)
        except BlockingIOError:
            return [], False
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        return lines, not chunk

    def end(self, patience: float = 0.0) -> int:
        """Kill the whole group, reap the process, close the pipes; may be called again.

        Args:
            patience: Seconds a process that is dying anyway gets, so that its own exit code is seen.

        Returns:
            The exit code; the negative signal number when a signal ended it.
        """
        if patience:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(patience)
        # also after the leader's own death: programs it started live on in the group
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        code = self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        return code


def describe_exit(code: int) -> str:
    """Return how a process ended: ``exit code 3`` or ``signal SIGSEGV``."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"
