"""Files that appear whole or not at all, and JSON and YAML ones read back: damaged ones are named."""

from __future__ import annotations

import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml


class StoredFileError(ValueError):
    """A file that was written by a program cannot be read back; the message names it and says what to do."""


@contextmanager
def finished_file(path: Path) -> Iterator[Path]:
    """Yield a name to write to; what is there becomes ``path`` at the end, or nothing does.

    A link stays, the file behind it is replaced. A device or a pipe (``/dev/stdout``) gets the
    finished content.

    Raises:
        OSError: A folder cannot be made, or ``path`` is one.
    """
    path = path.expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        mode = stat.S_IFREG
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        # a file renamed over it, which libraries do as well, would take it from every program of the machine
        with tempfile.TemporaryDirectory() as folder:
            whole = Path(folder, path.name)
            yield whole
            with whole.open("rb") as source, path.open("wb") as sink:
                shutil.copyfileobj(source, sink)
        return
    path = Path(os.path.realpath(path))
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def stored_json(path: Path) -> dict[str, Any]:
    """Return the object a JSON file holds.

    Raises:
        StoredFileError: It is missing, damaged, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, error) from error
    if not isinstance(content, dict):
        raise _damaged(path, f"it holds {type(content).__name__}, not an object")
    return content


def stored_config(path: Path) -> dict[str, Any]:
    """Return the plain mapping of a run's resolved ``config.yaml``, its sections in place.

    Raises:
        StoredFileError: It is missing or damaged.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise _damaged(path, error) from error
    sections = ("model", "data", "trainer")
    if not isinstance(content, dict) or not all(isinstance(content.get(name), dict) for name in sections):
        raise _damaged(path, f"the sections {', '.join(sections)} are not there")
    for section, name in (("model", "path"), ("model", "dtype"), ("data", "source")):
        if not isinstance(content[section].get(name), str):
            raise _damaged(path, f"{section}.{name} is not there")
    if not isinstance(content.get("task"), str):
        raise _damaged(path, "task is not there")
    return content


def _damaged(path: Path, reason: object) -> StoredFileError:
    if isinstance(reason, OSError):
        reason = reason.strerror or reason
    elif isinstance(reason, RecursionError):
        reason = "nested too deeply"
    words = " ".join(str(reason).split())[:300]
    return StoredFileError(
        f"{path} cannot be read, it is missing or damaged: {words}. Restore or copy it again"
    )
