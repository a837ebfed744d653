"""The checkpoints a delta goes with: finding the base, and refusing what is not it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from posttrain.evaluation.checkpoint import FLOATS, Checkpoint
from posttrain.selection.delta_file import DeltaError, DeltaFile, Header, Touched
from posttrain.selection.plan import tensor_hash


def base_of(
    files: Sequence[DeltaFile],
    base: str | Path | None,
    revision: str | None = None,
    *,
    beside: bool = False,
) -> Checkpoint:
    """Return the base of deltas: ``base``, or the one that all of them record when it is None.

    Raises:
        DeltaError: They record different bases, or none.
    """
    if base is not None:
        return Checkpoint(base, revision=revision, beside=beside)
    addresses = {(file.header.base, file.header.revision) for file in files}
    if len(addresses) > 1 or None in {address for address, _ in addresses}:
        found = ", ".join(sorted(recorded(file.header) for file in files))
        raise DeltaError(f"say which base is meant (--base); recorded: {found}")
    ((address, commit),) = addresses
    assert address is not None
    return Checkpoint(address, revision=revision or commit, beside=beside)


def check_tensors(file: DeltaFile, base: Checkpoint, names: Sequence[str]) -> None:
    """Refuse a checkpoint of another model, before anything is written."""
    for name in names:
        touched: Touched | None = file.header.tensors.get(name)
        if touched is None:
            continue
        found = base.tensors.get(name)
        if found is None or found.shape != touched.shape:
            has = "has no such tensor" if found is None else f"has it with the shape {list(found.shape)}"
            raise DeltaError(
                f"{file.path} changes {name} of the shape {list(touched.shape)}; {base.path!r} {has}: it is "
                f"another model. Recorded base: {recorded(file.header)}"
            )


def verify(values: torch.Tensor, expected: str, name: str, file: DeltaFile, what: str) -> None:
    """Refuse a tensor that is not the one whose hash the delta holds."""
    if tensor_hash(values) != expected:
        raise DeltaError(
            f"{name} is not that of the {what} {file.path} belongs to (its hash differs). Recorded base: "
            f"{recorded(file.header)}. Another revision, or a model trained further, will not do"
        )


def read_as(base: Checkpoint, name: str, dtype: str) -> torch.Tensor:
    """Return a tensor of a checkpoint in the type of that name, such as BF16."""
    return to_type(base.tensor(name), base.tensors[name].dtype, dtype, name)


def to_type(values: torch.Tensor, stored: str, wanted: str, name: str) -> torch.Tensor:
    """Round ``values`` from one floating-point type of safetensors to another."""
    if stored == wanted:
        return values
    if stored not in FLOATS or wanted not in FLOATS:
        raise DeltaError(f"{name} is stored as {stored} on one side and {wanted} on the other")
    return values.to(FLOATS[wanted])


def address_of(checkpoint: Checkpoint) -> str:
    """Return the Hub id, or the absolute folder."""
    folder = Path(checkpoint.path).expanduser()
    return str(folder.absolute()) if folder.is_dir() else checkpoint.path


def commit_of(checkpoint: Checkpoint) -> str | None:
    """Return the commit of a base from the Hub: its files lie in ``snapshots/COMMIT``."""
    return None if Path(checkpoint.path).expanduser().is_dir() else checkpoint.folder.name


def config_dtype(checkpoint: Checkpoint) -> str | None:
    """Return what a checkpoint's configuration says about its type, such as bfloat16."""
    found = checkpoint.config.get("dtype", checkpoint.config.get("torch_dtype"))
    return found if isinstance(found, str) else None


def recorded(header: Header) -> str:
    """Return the base a delta records, in words."""
    return f"{header.base or 'none'}{f' at {header.revision}' if header.revision else ''}"
