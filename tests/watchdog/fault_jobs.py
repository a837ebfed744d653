"""Runs of two processes that are disturbed, and what they say."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


class Job:
    """A launcher with two ranks; ended with the block, whatever happens in it."""

    def __init__(self, log: Path, *command: Any, **environment: str) -> None:
        self.log = log
        path = os.pathsep.join([str(TESTS.parent), str(TESTS), str(TESTS / "run"), str(TESTS / "watchdog")])
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [*LAUNCHER, *map(str, command)],
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **environment},
            )

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in [*self.ranks().values(), self.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)
        self.process.wait()

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def ranks(self) -> dict[int, int]:
        """Return process ids by rank."""
        found = {}
        for entry in Path("/proc").iterdir():
            try:
                if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) != self.process.pid:
                    continue
                variables = (entry / "environ").read_bytes().split(b"\0")
            except (OSError, ValueError, IndexError):
                continue
            for variable in variables:
                if variable.startswith(b"RANK="):
                    found[int(variable[5:])] = int(entry.name)
        return found

    def until(self, reached: Any, seconds: float = 150) -> None:
        """Wait until something is there; the job must not end before."""
        end = time.monotonic() + seconds
        while not reached():
            assert self.process.poll() is None, self.text[-5000:]
            assert time.monotonic() < end, self.text[-5000:]
            time.sleep(0.001)

    def ended(self, seconds: float = 240) -> int:
        """Return the exit code of the launcher; the cap is a generous one."""
        return self.process.wait(seconds)


def reason(folder: Path) -> dict[str, Any]:
    """Return what the survivor wrote down about the stop."""
    path = min(folder.glob("stopped_rank*.json"))
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0
