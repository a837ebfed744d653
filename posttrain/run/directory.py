"""The run directory: where everything a run writes has its fixed place.

::

    RUN/config.yaml         resolved configuration
    RUN/manifest.json       versions, commit, data fingerprint, seeds, hardware, command to repeat
    RUN/status.json         running, finished, stopped or failed, and since when
    RUN/failures.jsonl      errors that ended it, with the last lines of their traces
    RUN/metrics.jsonl       one object per log
    RUN/completions.jsonl   sampled completions with rewards and the status of the first reward
    RUN/watchdog/           why a run of several processes stopped, and the stacks of its ranks
    RUN/checkpoints/        checkpoint-N folders, each complete
    RUN/finished_model/     the model, where a method changed it after the last checkpoint (SGTM)
    RUN/selection.safetensors  which weights train, where not all do
    RUN/modules/            what methods trained beside the model, METHOD.safetensors each
    RUN/mask_examples.json  masks over the tokens of a few responses
    RUN/s3ft.jsonl          training rows with own answers; counts in s3ft.statistics.json
    RUN/warm_start/         the same layout for the supervised stage, and its model
    RUN/evaluation.json     before, after and their difference
    RUN/export/             adapter, merged weights or full model
    RUN/report.html
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.stored import finished_file

logger = logging.getLogger(__name__)


class RunError(RuntimeError):
    """The request does not fit the run or its directory; the message says what to do."""


@dataclass(frozen=True)
class RunDirectory:
    """Paths of one run."""

    root: Path

    @property
    def config(self) -> Path:
        """Resolved configuration."""
        return self.root / "config.yaml"

    @property
    def manifest(self) -> Path:
        """What is needed to repeat the run."""
        return self.root / "manifest.json"

    @property
    def metrics(self) -> Path:
        """One JSON object per log."""
        return self.root / "metrics.jsonl"

    @property
    def completions(self) -> Path:
        """Sampled completions with rewards."""
        return self.root / "completions.jsonl"

    @property
    def alarms(self) -> Path:
        """What went wrong under way, one JSON object per alarm."""
        return self.root / "alarms.jsonl"

    @property
    def status(self) -> Path:
        """How the run is going or how it ended."""
        return self.root / "status.json"

    @property
    def failures(self) -> Path:
        """What ended it, one JSON object per error and rank."""
        return self.root / "failures.jsonl"

    @property
    def watchdog(self) -> Path:
        """Stacks and reasons where a rank was lost."""
        return self.root / "watchdog"

    @property
    def checkpoints(self) -> Path:
        """The trainer's output folder."""
        return self.root / "checkpoints"

    @property
    def selection(self) -> Path:
        """The plan of which weights train."""
        return self.root / "selection.safetensors"

    @property
    def modules(self) -> Path:
        """What methods trained beside the model; copied into exports."""
        return self.root / "modules"

    @property
    def pictures(self) -> Path:
        """Numbers that methods have over the tokens of a few responses, for the report."""
        return self.root / "mask_examples.json"

    @property
    def s3ft(self) -> Path:
        """Training rows in which own answers stand for gold ones."""
        return self.root / "s3ft.jsonl"

    @property
    def evaluation(self) -> Path:
        """Evaluations before and after."""
        return self.root / "evaluation.json"

    @property
    def export(self) -> Path:
        """Where the result goes unless the configuration says otherwise."""
        return self.root / "export"

    @property
    def report(self) -> Path:
        """The page about the run."""
        return self.root / "report.html"

    @property
    def warm_start(self) -> RunDirectory:
        """The supervised stage before reinforcement learning."""
        return RunDirectory(self.root / "warm_start")

    @property
    def model(self) -> Path:
        """The model a warm start leaves."""
        return self.root / "model"

    @property
    def finished_model(self) -> Path:
        """The model after what a method does when training is over."""
        return self.root / "finished_model"

    @property
    def old(self) -> Path:
        """Where a run that is replaced is kept, once."""
        root = self.root.resolve()
        return root.with_name(f"{root.name}.old")

    def begin(self, *, resume: bool, overwrite: bool) -> None:
        """Create the folder, or refuse one that is in use; nothing that is there is touched.

        Raises:
            RunError: It holds another run and neither ``resume`` nor ``overwrite`` was asked for, there is
                nothing to resume, it holds files that no run of ours wrote, or it cannot be created.
        """
        if resume:
            if not self.config.is_file():
                raise RunError(
                    f"nothing to resume in {self.root}: it holds no config.yaml. Start without --resume."
                )
            return
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            used = any(self.root.iterdir())
        except OSError as error:
            raise RunError(
                f"run_dir {self.root} cannot be used ({error.strerror}: {error.filename}). Choose another "
                "folder with run_dir=..."
            ) from error
        if not os.access(self.root, os.W_OK | os.X_OK):
            raise RunError(f"run_dir {self.root} is not writable. Choose another folder with run_dir=...")
        if not used:
            return
        if not self.config.is_file():
            raise RunError(
                f"{self.root} holds files but no run (no config.yaml), so nothing is written there. Choose "
                "another folder with run_dir=..."
            )
        if not overwrite:
            raise RunError(
                f"{self.root} already holds a run. Continue it with --resume, replace it with --overwrite, "
                "or choose another folder with run_dir=..."
            )
        if self.old.exists() and not RunDirectory(self.old).config.is_file():
            raise RunError(
                f"--overwrite keeps the replaced run as {self.old}, and what is there is no run: move it away"
            )

    def move_aside(self) -> bool:
        """Keep a run that is replaced as RUN.old, instead of the one kept before; leave an empty folder.

        Returns:
            Whether there was a run to keep: the folder of that name is then a new one.
        """
        if not any(self.root.iterdir()):
            return False
        if self.old.exists():
            shutil.rmtree(self.old)
        self.root.resolve().rename(self.old)
        self.root.resolve().mkdir()
        return True

    @contextlib.contextmanager
    def held(self) -> Iterator[Callable[[], None]]:
        """Hold the folder for this process; the lock ends with the process, however it ends.

        Yields:
            A function that holds the folder of that name anew, after :meth:`move_aside`.

        Raises:
            RunError: Another process holds it.
        """
        with contextlib.ExitStack() as stack:

            def hold() -> None:
                descriptor = os.open(self.root, os.O_RDONLY)
                stack.callback(os.close, descriptor)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError as error:
                    if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                        raise RunError(
                            f"another process is writing to {self.root}: wait for it, end it, or choose "
                            "another folder with run_dir=..."
                        ) from None
                    # network file systems without locks
                    logger.warning(
                        "%s cannot be locked (%s): start only one run in it", self.root, error.strerror
                    )

            hold()
            yield hold


def held(run: RunDirectory) -> bool:
    """Whether a process on this machine is at work in the folder."""
    try:
        descriptor = os.open(run.root, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(descriptor)
    return False


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON so that a reader sees the old file or the new one, never half of it."""
    write_text(path, json.dumps(finite(value), indent=1, ensure_ascii=False, allow_nan=False, default=_plain))


def write_text(path: Path, text: str) -> None:
    """Write a text file so that a reader sees the old content or the new one, never half of it."""
    with finished_file(path) as partial:
        # lone surrogates come out of JSON escapes in model output; they have no UTF-8 form
        partial.write_text(text, encoding="utf-8", errors="backslashreplace")


def append_json_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append one strict JSON object per line."""
    text = "".join(
        json.dumps(finite(row), ensure_ascii=False, allow_nan=False, default=_plain) + "\n" for row in rows
    )
    if not text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the complete lines; the one that was being written when a process was killed is left out."""
    if not path.exists():
        return []
    # not splitlines() of a text: a completion may hold U+2028 and its like, which JSON does not escape
    rows = [json_object(line) for line in path.read_bytes().split(b"\n")]
    return [row for row in rows if row is not None]


def last_json_lines(path: Path, count: int, *, most_bytes: int = 64 * 2**20) -> list[dict[str, Any]]:
    """Return up to ``count`` complete objects from the end of a file, oldest first, whatever its size.

    Args:
        path: A file of JSON lines; one that is missing has none.
        count: How many.
        most_bytes: How much is read at most, from the end.
    """
    try:
        with path.open("rb") as file:
            end = position = file.seek(0, os.SEEK_END)
            tail = b""
            while position > 0 and end - position < most_bytes and tail.count(b"\n") <= count:
                start = max(0, position - 2**16)
                file.seek(start)
                tail, position = file.read(position - start) + tail, start
    except OSError:
        return []
    lines = tail.split(b"\n")
    rows = [json_object(line) for line in (lines if position == 0 else lines[1:])]
    return [row for row in rows if row is not None][-count:]


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the object in a file; an empty one where the file is missing or damaged."""
    try:
        return json_object(path.read_bytes()) or {}
    except OSError:
        return {}


def json_object(line: bytes) -> dict[str, Any] | None:
    """Return the object that a line holds, or None where it is damaged or something else."""
    try:
        row = json.loads(line.decode("utf-8", errors="replace"))
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def keep_json_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Drop the lines that a resumed run will write again, and a broken one; return those kept.

    A file with other broken lines than the last, which a killed process leaves, is also kept as it was.
    """
    if not path.exists():
        return []
    kept, damaged = [], False
    *whole, last = path.read_bytes().split(b"\n")
    for line in (*whole, last):
        row = json_object(line)
        try:
            if row is not None and keep(row):
                kept.append(row)
        except (KeyError, TypeError):
            row = None  # no line of ours
        damaged |= row is None and line is not last and bool(line.strip())
    if damaged:
        names = (path.with_name(f"{path.name}.damaged{number or ''}") for number in itertools.count())
        copy = next(name for name in names if not name.exists())
        shutil.copyfile(path, copy)
        logger.warning(
            "%s has damaged lines, which are left out; as it was, it is kept as %s", path, copy.name
        )
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
    return kept


def finite(value: Any) -> Any:
    """Return ``value`` for JSON, which has no NaN: None for numbers that are not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def _plain(value: Any) -> Any:
    """Turn numpy and torch values into JSON ones, anything else into text."""
    return finite(value.tolist()) if hasattr(value, "tolist") else str(value)
