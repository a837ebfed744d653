r"""Sparse deltas: what a training changed, as a file on its own, put on a base again bit for bit.

For a base theta0 and a trained model theta1, the delta holds the positions where the *bits* differ and the
values of theta1 there::

    I = { i : bits(theta1_i) != bits(theta0_i) }       delta = (I, theta1_I), perhaps with theta0_I

0.0 and -0.0 differ, equal NaN patterns do not. The values are absolute, so that applying is a copy and the
result is theta1 to the bit, which is checked: every tensor's hash before and after is in the file.
Several deltas of one base add up, and scale::

    theta = cast( theta0 + sum_k w_k (theta_k - theta0) )      in fp32, rounded once

where an element that one delta alone holds, with weight 1, takes that delta's value as it is.

Deltas pay off where few elements change: selective training, and reinforcement learning in bf16, where most
updates round away. Full fine-tuning in fp32 changes nearly every element; above ``max_density`` (0.5) the
delta is refused, because the whole model is then the better file.

If the trained checkpoint has another type than the base (a bf16 run from fp32 weights), the delta is one of
the base *in the trained type*: it goes on either form of the base, and gives the trained one.

The file is described in :mod:`posttrain.selection.delta_file`; :mod:`posttrain.selection.delta_apply` puts it
on a base. Checkpoints are read a block at a time; in memory is the delta while it is written, one shard while
a checkpoint is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from posttrain.evaluation.checkpoint import Checkpoint, tied_heads
from posttrain.selection.delta_base import (
    address_of,
    base_of,
    check_tensors,
    commit_of,
    config_dtype,
    read_as,
    to_type,
    verify,
)
from posttrain.selection.delta_file import (
    DeltaError,
    DeltaFile,
    DeltaWriter,
    Entry,
    Header,
    StreamedHash,
    bits,
)
from posttrain.selection.plan import tensor_hash

MAX_DENSITY = 0.5
"""Share of changed elements above which a delta is refused."""


def write_delta(
    base: str | Path,
    tuned: str | Path,
    path: str | Path,
    *,
    revision: str | None = None,
    old_values: bool = False,
    max_density: float = MAX_DENSITY,
    about: Any = None,
) -> Header:
    """Write what differs between two checkpoints.

    Args:
        base: Folder or Hub id before training; recorded as the base.
        tuned: Folder or Hub id after training.
        path: The file to write; replaced if it exists.
        revision: Commit or branch of a base on the Hub; the commit found is recorded.
        old_values: Also store the base's values, so that the delta can be removed without the base: 2 bytes
            more per value in bf16, 4 in fp32.
        max_density: Largest share of changed elements.
        about: JSON to keep in the file, for example the selection that was trained.

    Returns:
        The header of the file.

    Raises:
        DeltaError: The two are different models (names, shapes, types), nothing changed, or too much did.
        ModelLoadError: A side cannot be read, see :class:`posttrain.evaluation.checkpoint.Checkpoint`.
        OSError: The file cannot be written; nothing is left of it.
    """
    writer = DeltaWriter(old_values=old_values)
    with Checkpoint(base, revision=revision) as first, Checkpoint(tuned) as second:
        tied = tied_heads([first, second])
        names = same_tensors(first, second, tied)
        elements = sum(first.tensors[name].elements for name in names)
        cast: dict[str, str] = {}
        changed = 0
        for name in names:
            stored = second.tensors[name]
            entry, before, after = _compare(first, second, name, keep_old=old_values)
            changed += entry.positions.numel()
            if changed > max_density * elements:
                raise DeltaError(
                    f"more than {max_density:.0%} of the {elements:,} weights changed "
                    f"({changed / elements:.1%} up to {name}): a delta would save nothing. Export the whole "
                    f"model (format full); posttrain sparsity shows what changed where"
                )
            writer.add(name, stored.shape, entry, dtype=stored.dtype, before=before, after=after)
            if name not in writer.tensors and stored.dtype != first.tensors[name].dtype:
                cast[name] = stored.dtype
        if not writer.tensors:
            raise DeltaError(f"{first.path!r} and {second.path!r} have the same weights: nothing to write")
        return writer.write(
            path,
            base=address_of(first),
            revision=commit_of(first),
            dtype=config_dtype(second),
            elements=elements,
            cast=cast,
            tied=tied,
            about=about,
        )


def merge_deltas(
    deltas: Sequence[str | Path],
    path: str | Path,
    *,
    weights: Sequence[float] | None = None,
    base: str | Path | None = None,
    old_values: bool = False,
    max_density: float = MAX_DENSITY,
) -> Header:
    """Write the weighted sum of several deltas of one base, or one delta scaled; see the module page.

    Args:
        deltas: Files, or folders that hold one.
        path: The file to write.
        weights: One factor per delta; all 1 when None.
        base: Where the base lies; the recorded address when None.
        old_values: As in :func:`write_delta`.
        max_density: As in :func:`write_delta`.

    Raises:
        DeltaError: The deltas do not belong to one base in one type, ``weights`` does not fit them, or the
            sum changes nothing or too much.
        ModelLoadError: The base cannot be read.
        OSError: The file cannot be written; nothing is left of it.
    """
    factors = [1.0] * len(deltas) if weights is None else list(weights)
    if not deltas or len(factors) != len(deltas):
        raise DeltaError(
            f"one weight per delta, at least one: found {len(deltas)} deltas, {len(factors)} weights"
        )
    if not all(abs(factor) < float("inf") for factor in factors):
        raise DeltaError(f"weights are finite numbers, found {factors}")
    with ExitStack() as stack:
        files = [stack.enter_context(DeltaFile(delta)) for delta in deltas]
        start = stack.enter_context(base_of(files, base))
        cast = _one_type(files)
        first = files[0].header
        writer = DeltaWriter(old_values=old_values)
        names = [name for name in start.tensors if any(name in file.header.tensors for file in files)]
        for file in files:
            check_tensors(file, start, names)
        for name in names:
            touching = [(f, w) for f, w in zip(files, factors, strict=True) if name in f.header.tensors]
            dtype = touching[0][0].header.tensors[name].dtype
            values = read_as(start, name, dtype)
            for file, _ in touching:
                verify(values, file.header.tensors[name].before, name, file, "base")
            merged = _sum(values, [(file.entry(name), weight) for file, weight in touching], name)
            where = (bits(merged) != bits(values)).reshape(-1).nonzero().flatten()
            entry = Entry(where, merged.reshape(-1)[where], values.reshape(-1)[where])
            shape = start.tensors[name].shape
            writer.add(name, shape, entry, dtype=dtype, before=tensor_hash(values), after=tensor_hash(merged))
            if name not in writer.tensors and dtype != start.tensors[name].dtype:
                cast[name] = dtype
        changed = sum(tensor.changed for tensor in writer.tensors.values())
        if not changed or changed > max_density * first.elements:
            raise DeltaError(
                f"the sum changes {changed:,} of {first.elements:,} weights; a delta holds at least one and "
                f"at most {max_density:.0%}"
            )
        about = {"merged": [{"file": f.path.name, "weight": w} for f, w in zip(files, factors, strict=True)]}
        return writer.write(
            path,
            base=address_of(start),
            revision=commit_of(start),
            dtype=first.dtype,
            elements=first.elements,
            cast=cast,
            tied=first.tied,
            about=about,
        )


def aligned_blocks(
    first: Checkpoint, second: Checkpoint, name: str
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the two sides of a tensor block by block, flat, both in the second's type."""
    a, b = first.tensors[name], second.tensors[name]
    for one, two in zip(first.blocks(name), second.blocks(name), strict=True):
        yield to_type(one, a.dtype, b.dtype, name).reshape(-1), two.reshape(-1)


def _compare(first: Checkpoint, second: Checkpoint, name: str, *, keep_old: bool) -> tuple[Entry, str, str]:
    """Return the changed elements of a tensor, and the hashes of the two sides in the second's type."""
    b = second.tensors[name]
    where: list[torch.Tensor] = []
    values, old = [], []
    offset = 0
    for one, two in aligned_blocks(first, second, name):
        if not where:
            before, after = (StreamedHash(two.dtype, b.shape) for _ in range(2))
        before.add(one)
        after.add(two)
        here = (bits(one) != bits(two)).nonzero().flatten()
        where.append(here + offset)
        values.append(two[here])
        old.append(one[here] if keep_old else one[:0])
        offset += two.numel()
    if not where:  # a tensor without rows
        empty = torch.empty(0, dtype=torch.long)
        return Entry(empty, empty, empty), "", ""
    entry = Entry(torch.cat(where), torch.cat(values), torch.cat(old) if keep_old else None)
    return entry, before.hexdigest(), after.hexdigest()


def _sum(base: torch.Tensor, parts: Sequence[tuple[Entry, float]], name: str) -> torch.Tensor:
    """Return base + sum of weight * (values - base) in fp32 (fp64 for fp64), rounded once."""
    result = base.clone().reshape(-1)
    flat = base.reshape(-1)
    if len(parts) == 1 and parts[0][1] == 1:
        result[parts[0][0].positions] = parts[0][0].values
        return result.view(base.shape)
    if not base.is_floating_point():
        raise DeltaError(f"{name} holds {base.dtype}, which cannot be scaled or added")
    union, inverse = torch.cat([entry.positions for entry, _ in parts]).unique(return_inverse=True)
    places = inverse.split([entry.positions.numel() for entry, _ in parts])
    wide = torch.float64 if base.dtype == torch.float64 else torch.float32
    start = flat[union].to(wide)
    total, owners = torch.zeros_like(start), torch.zeros(len(union), dtype=torch.long)
    for (entry, weight), place in zip(parts, places, strict=True):
        total[place] += weight * (entry.values.to(wide) - start[place])
        owners[place] += 1
    summed = (start + total).to(base.dtype)
    if not bool(summed.isfinite().all()) and bool(flat[union].isfinite().all()):
        raise DeltaError(f"the sum is not finite in {name} ({base.dtype}): use smaller weights")
    result[union] = summed
    for (entry, weight), place in zip(parts, places, strict=True):
        if weight == 1:  # base + (value - base) may be an ulp off the value
            alone = owners[place] == 1
            result[entry.positions[alone]] = entry.values[alone]
    return result.view(base.shape)


def same_tensors(first: Checkpoint, second: Checkpoint, tied: dict[str, str]) -> list[str]:
    """Return the names of the tensors of two checkpoints of one model, tied heads left out.

    Raises:
        DeltaError: They are of different models: a tensor is missing, or has another shape.
    """
    a, b = first.tensors.keys() - tied.keys(), second.tensors.keys() - tied.keys()
    odd = sorted(a ^ b)
    if odd:
        where = first if odd[0] in a else second
        raise DeltaError(
            f"a delta needs the same tensors on both sides; {len(odd)} are on one side only, for example "
            f"{odd[0]} in {where.path!r}"
        )
    for name in sorted(a):
        if first.tensors[name].shape != second.tensors[name].shape:
            raise DeltaError(
                f"{name} has the shape {list(first.tensors[name].shape)} in {first.path!r} and "
                f"{list(second.tensors[name].shape)} in {second.path!r}: a delta cannot resize it"
            )
    return [name for name in second.tensors if name in b]


def _one_type(files: Sequence[DeltaFile]) -> dict[str, str]:
    """Return the common ``cast`` of deltas that agree about the types and ties of all tensors."""
    kinds: dict[str, str] = {}
    first = files[0]
    for file in files:
        header = file.header
        if (header.elements, header.tied, header.dtype) != (
            first.header.elements,
            first.header.tied,
            first.header.dtype,
        ):
            raise DeltaError(f"{first.path} and {file.path} are deltas of different models or types")
        for name, kind in {**header.cast, **{n: t.dtype for n, t in header.tensors.items()}}.items():
            if kinds.setdefault(name, kind) != kind:
                raise DeltaError(f"{name} is {kinds[name]} in one delta and {kind} in {file.path}")
    touched = {name for file in files for name in file.header.tensors}
    return {name: kind for file in files for name, kind in file.header.cast.items() if name not in touched}
