"""The run directory: where everything a run writes has its fixed place.

::

    RUN/config.yaml         resolved configuration
    RUN/manifest.json       versions, commit, data fingerprint, seeds, hardware, command to repeat
    RUN/metrics.jsonl       one object per log
    RUN/completions.jsonl   sampled completions with rewards
    RUN/checkpoints/        checkpoint-N folders, each complete
    RUN/warm_start/         the same layout for the supervised stage, and its model
    RUN/evaluation.json     before, after and their difference
    RUN/export/             adapter, merged weights or full model
    RUN/report.html
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class RunError(RuntimeError):
    """The request does not fit the state of the run directory; the message says what to do."""


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
    def checkpoints(self) -> Path:
        """The trainer's output folder."""
        return self.root / "checkpoints"

    @property
    def evaluation(self) -> Path:
        """Evaluations before and after."""
        return self.root / "evaluation.json"

    @property
    def export(self) -> Path:
        """Where the result goes unless the configuration says otherwise."""
        return self.root / "export"

    @property
    def warm_start(self) -> RunDirectory:
        """The supervised stage before reinforcement learning."""
        return RunDirectory(self.root / "warm_start")

    @property
    def model(self) -> Path:
        """The model a warm start leaves."""
        return self.root / "model"

    def begin(self, *, resume: bool, overwrite: bool) -> None:
        """Create the folder, or refuse one that is in use.

        Raises:
            RunError: It holds another run and neither ``resume`` nor ``overwrite`` was asked for, or there is
                nothing to resume, or it holds files that no run of ours wrote.
        """
        if resume:
            if not self.config.exists():
                raise RunError(f"nothing to resume in {self.root}: it holds no config.yaml. Start without --resume.")
            return
        if self.root.exists() and any(self.root.iterdir()):
            if not overwrite:
                raise RunError(
                    f"{self.root} already holds a run. Continue it with --resume, replace it with --overwrite, or "
                    "choose another folder with run_dir=..."
                )
            if not self.config.exists() and not self.metrics.exists():
                raise RunError(
                    f"{self.root} holds files but no run (no config.yaml): it is not overwritten. Choose another run_dir."
                )
            self._move_aside()
        self.root.mkdir(parents=True, exist_ok=True)

    def _move_aside(self) -> None:
        """Keep the replaced run once, as RUN.old: overwriting the wrong run must not lose it."""
        import shutil

        old = self.root.with_name(f"{self.root.name}.old")
        if old.exists():
            shutil.rmtree(old)
        self.root.rename(old)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=1, ensure_ascii=False, default=str))
    os.replace(partial, path)


def append_json_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append one JSON object per line, in a single write."""
    text = "".join(json.dumps(_finite(row), ensure_ascii=False, default=str) + "\n" for row in rows)
    if not text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)


def drop_lines_after(path: Path, step: int) -> None:
    """Drop lines of a killed run that the resumed one will write again, and a broken last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue  # the line being written when the process was killed
        if row.get("step", 0) <= step:
            kept.append(line + "\n")
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    os.replace(partial, path)


def _finite(value: Any) -> Any:
    """JSON has no NaN: write null for numbers that are not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
