"""Which checkpoints lie in a folder; nothing here imports torch."""

from __future__ import annotations

from pathlib import Path

_PREFIX = "checkpoint-"  # transformers' name for them


def checkpoint_folders(run_dir: str | Path) -> dict[int, Path]:
    """Return the checkpoints under ``run_dir`` by step, in order of their steps."""
    found = {
        int(path.name.removeprefix(_PREFIX)): path
        for path in Path(run_dir).glob(f"{_PREFIX}*")
        if path.is_dir() and path.name.removeprefix(_PREFIX).isdigit()
    }
    return dict(sorted(found.items()))


def newest_checkpoint(run_dir: str | Path) -> Path | None:
    """Return the complete checkpoint with the highest step under ``run_dir``, or None."""
    return next(reversed(checkpoint_folders(run_dir).values()), None)
