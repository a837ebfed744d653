"""Folders of weights: files that do not open, weights that are not finite or never moved.

Tensors are read one at a time. Files are only read through where that is cheap (:data:`READ_LIMIT`); whether
weights differ is known at the first one that does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

READ_LIMIT = 4 * 2**30
"""Bytes of a folder above which its numbers are not all looked at."""

ADAPTER = "adapter_model.safetensors"
_INDEX = "model.safetensors.index.json"
# the matrices that PEFT starts at zero, so that an adapter begins as no change
_ZERO_AT_START = ("lora_B.", "lora_embedding_B", "lora_E.")


@dataclass(frozen=True)
class Movement:
    """How much of an adapter has left its start.

    Attributes:
        file: Which.
        modules: Matrices that start at zero.
        still: Those that are still zero.
        example: Name of one of these, or "".
    """

    file: Path
    modules: int
    still: int
    example: str


def damaged(folder: Path) -> list[str]:
    """Return what is wrong with the files of a checkpoint or export, one sentence each."""
    found = []
    for path in sorted(folder.rglob("*.safetensors")):
        if not path.exists():
            found.append(f"{path.relative_to(folder)} is a link to nothing")
            continue
        try:
            with safe_open(path, framework="pt") as file:
                file.keys()
        except (SafetensorError, OSError) as error:
            size = path.stat().st_size
            found.append(f"{path.relative_to(folder)} ({size:,} bytes) does not open: {error}")
    for path in sorted(folder.rglob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            found.append(f"{path.relative_to(folder)} is not valid JSON: {error}")
            continue
        if path.name == _INDEX and isinstance(content, dict):
            shards = sorted(set(content.get("weight_map", {}).values()))
            found += [f"{shard} is missing" for shard in shards if not (path.parent / shard).is_file()]
    return found


def adapter_movement(folder: Path) -> list[Movement]:
    """Return, for each adapter file under ``folder``, how many of its matrices are still zero."""
    found = []
    for path in sorted(folder.rglob(ADAPTER)):
        try:
            with safe_open(path, framework="pt") as file:
                keys = list(file.keys())
                names = [name for name in keys if any(part in name for part in _ZERO_AT_START)]
                still = [name for name in names if not file.get_tensor(name).any()]
        except (SafetensorError, OSError):
            continue  # reported as damaged
        if names:
            found.append(Movement(path, len(names), len(still), still[0] if still else ""))
    return found


def not_finite(folder: Path) -> tuple[str, int] | None:
    """Return the first tensor with values that are not finite and how many it has, or None.

    Adapters are always read; other folders up to :data:`READ_LIMIT` bytes.
    """
    for name, tensor in _tensors(folder):
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            return name, int((~torch.isfinite(tensor)).sum())
    return None


def same_weights(one: Path, other: Path) -> bool | None:
    """Return whether two folders hold the same weights, in the type of the second; None if that is not known.

    Not known: no tensor in common, a damaged file, or too much to read without a difference.
    """
    read, shared = 0, 0
    try:
        with _Folder(one) as left, _Folder(other) as right:
            for name in left.files:
                if name not in right.files:
                    continue
                shared += 1
                mine, theirs = left.tensor(name), right.tensor(name)
                if mine.shape != theirs.shape or not torch.equal(mine.to(theirs.dtype), theirs):
                    return False
                read += mine.numel() * mine.element_size()
                if read > READ_LIMIT:
                    return None
    except (SafetensorError, OSError):
        return None
    return True if shared else None


def _tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    paths = sorted(folder.glob("*.safetensors"))
    if not (folder / ADAPTER).exists() and sum(path.stat().st_size for path in paths) > READ_LIMIT:
        return
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    yield name, file.get_tensor(name)
        except (SafetensorError, OSError):
            continue  # reported as damaged


class _Folder:
    """The tensors of a folder, by name."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.glob("*.safetensors"))
        self.files: dict[str, Any] = {}
        self._open: list[Any] = []

    def __enter__(self) -> _Folder:
        for path in self.paths:
            file = safe_open(path, framework="pt")
            self._open.append(file)
            opened = file.__enter__()
            self.files |= dict.fromkeys(opened.keys(), opened)
        return self

    def __exit__(self, *exception: Any) -> None:
        for file in self._open:
            file.__exit__(*exception)

    def tensor(self, name: str) -> torch.Tensor:
        """Return one tensor."""
        tensor: torch.Tensor = self.files[name].get_tensor(name)
        return tensor
