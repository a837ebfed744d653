r"""Which weights a training changed: the update-sparsity report (arXiv 2505.11711).

For weights theta0 before and theta1 after, and a tolerance tau >= 0::

    changed set I = { j : |theta1_j - theta0_j| > tau }      sparsity = 1 - |I| / n      density = |I| / n

All numbers of groups (layer, kind of tensor, whole model) are sums of counts, so that each element weighs the
same. Two runs from one start, with changed sets I1 and I2, overlap by::

    o1 = |I1 ∩ I2| / |I1|     chance level |I2| / n
    o2 = |I1 ∩ I2| / |I2|     chance level |I1| / n
    Jaccard = |I1 ∩ I2| / |I1 ∪ I2|

The update rank of a matrix is rank(theta1 - theta0) / min(rows, columns), where a singular value counts when
it is above max(rows, columns) * eps(fp32) * the largest one. Its mean is over matrices, untouched ones
included; norms and other vectors have none.

The type decides the result: small steps vanish when weights are rounded. One fp32 update can leave 12 % of
the weights unchanged, and 38 % once both sides are rounded to bfloat16, which is what a bf16 run stores. So
both sides are rounded to the compared type first, the subtraction is done in fp32, and the report names the
type. Sparsity measured this way is a property of step size and storage; it does not say that the other
weights are irrelevant.

NaN on either side counts as changed and is listed; equal infinities are unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from posttrain.evaluation.changes import (
    Counts,
    Dtype,
    Overlap,
    compared_dtype,
    count_changes,
    count_overlap,
    update_rank,
)
from posttrain.evaluation.checkpoint import Checkpoint, tied_heads
from posttrain.models.load import ModelLoadError

TOLERANCES = (0.0, 1e-5)
"""Exact equality, and the tolerance of the paper."""


@dataclass(frozen=True)
class TensorChange:
    """One tensor of the report.

    Attributes:
        name: Its name in the checkpoints.
        shape: Its shape.
        dtype: The type compared, such as bfloat16.
        counts: Elements and changes.
        rank: Update rank in [0, 1]; None for vectors, norms, infinite differences, and when not asked for.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    counts: Counts
    rank: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python values for JSON."""
        about = {"name": self.name, "shape": list(self.shape), "dtype": self.dtype, "rank": self.rank}
        return {**about, **self.counts.to_dict()}


@dataclass(frozen=True)
class Excluded:
    """A tensor that could not be compared, with its elements on the two sides (0 where it is missing)."""

    name: str
    reason: str
    base_elements: int
    tuned_elements: int


@dataclass
class SparsityReport:
    """What changed between two checkpoints.

    Attributes:
        base: Where theta0 was read.
        tuned: Where theta1 was read.
        other: Where the second run was read, or None.
        dtype: The type asked for; ``stored`` means each tensor's coarsest.
        stored: How many compared tensors each side stores in each type.
        tolerances: tau, ascending.
        tensors: One entry per compared tensor, layer by layer.
        excluded: Tensors that are not in the totals.
        notes: What a reader should know.
        overlaps: One per tolerance, when ``other`` was given.
    """

    base: str
    tuned: str
    other: str | None
    dtype: str
    stored: dict[str, dict[str, int]]
    tolerances: tuple[float, ...]
    tensors: list[TensorChange]
    excluded: list[Excluded] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    overlaps: list[Overlap] = field(default_factory=list)

    @property
    def total(self) -> Counts:
        """All compared elements."""
        first, *rest = (tensor.counts for tensor in self.tensors)
        return sum(rest, first)

    @property
    def mean_rank(self) -> float | None:
        """Mean update rank over matrices, untouched ones (rank 0) included."""
        ranks = [tensor.rank for tensor in self.tensors if tensor.rank is not None]
        return sum(ranks) / len(ranks) if ranks else None

    def grouped(self, group: Callable[[str], str]) -> dict[str, Counts]:
        """Return the sums of counts of the tensors whose names ``group`` maps to the same text."""
        groups: dict[str, Counts] = {}
        for tensor in self.tensors:
            name = group(tensor.name)
            groups[name] = groups[name] + tensor.counts if name in groups else tensor.counts
        return groups

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python values for JSON."""
        return {
            "base": self.base,
            "tuned": self.tuned,
            "other": self.other,
            "dtype": self.dtype,
            "stored": self.stored,
            "tolerances": list(self.tolerances),
            "total": self.total.to_dict(),
            "mean_rank": self.mean_rank,
            "kinds": {name: counts.to_dict() for name, counts in self.grouped(kind_of).items()},
            "layers": {name: counts.to_dict() for name, counts in self.grouped(layer_of).items()},
            "tensors": [tensor.to_dict() for tensor in self.tensors],
            "excluded": [asdict(item) for item in self.excluded],
            "overlaps": [overlap.to_dict() for overlap in self.overlaps],
            "notes": self.notes,
        }


def kind_of(name: str) -> str:
    """Return the kind of a tensor: its name with every number as ``*``."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def layer_of(name: str) -> str:
    """Return the layer of a tensor, such as ``model.layers.3``, or ``outside layers``."""
    match = re.match(r"(?:.*?\.)?\d+(?=\.)", name)
    return match.group() if match else "outside layers"


def compare_checkpoints(
    base: str | Path,
    tuned: str | Path,
    other: str | Path | None = None,
    *,
    tolerances: Sequence[float] = TOLERANCES,
    dtype: Dtype = "bfloat16",
    rank: bool = False,
) -> SparsityReport:
    """Compare two checkpoints tensor by tensor, a block of rows at a time.

    Args:
        base: Folder or Hub id of the weights before; full safetensors weights.
        tuned: The same after training.
        other: A second run from the same base, for the overlap.
        tolerances: Values of tau, at least one, none negative.
        dtype: Type both sides are rounded to: the one the model is deployed in. ``stored`` takes each
            tensor's coarsest stored type.
        rank: Also compute update ranks: a singular value decomposition of every matrix, hours for a large
            model.

    Returns:
        The report. Tensors that are missing on a side, have another shape or hold no floating-point numbers
        are listed and not counted; tied embeddings count once.

    Raises:
        ModelLoadError: A side is an adapter, quantised, pickled or damaged, or the sides share no tensor.
        ValueError: ``tolerances`` is empty or holds a negative or non-finite number.
    """
    taus = tuple(sorted(set(tolerances)))
    if not taus or not all(0 <= tau < float("inf") for tau in taus):
        raise ValueError(f"tolerances are finite numbers from 0 up, at least one, found {list(tolerances)}")
    with ExitStack() as stack:
        paths = (base, tuned) if other is None else (base, tuned, other)
        sides = [stack.enter_context(Checkpoint(path)) for path in paths]
        first, second = sides[:2]
        tied = tied_heads(sides)
        shared, excluded = _match(first, second, skip=set(tied))
        if not shared:
            raise ModelLoadError(
                f"{first.path!r} and {second.path!r} share no tensor of the same name and shape, for example "
                f"{_example(first)} against {_example(second)}: they are different models"
            )
        notes = [f"{name} is tied to the input embedding and counted there, once." for name in tied]
        tensors, overlaps = [], [Overlap(tau, 0, 0, 0, 0) for tau in taus]
        compared_in_all = set(shared if other is None else _match(first, sides[2], skip=set(tied))[0])
        for name in shared:
            here = sides if name in compared_in_all else sides[:2]
            change, both = _compare_tensor(name, here, taus, dtype, rank)
            tensors.append(change)
            overlaps = [a + b for a, b in zip(overlaps, both, strict=True)] if both else overlaps
        lost = [name for name in shared if name not in compared_in_all]
        if lost:
            count = sum(first.tensors[name].elements for name in lost)
            notes.append(
                f"{len(lost)} tensors ({count:,} elements) are not in {sides[2].path}: no overlap for them."
            )
        stored = {side.path: _stored(side, shared) for side in sides}
        notes += _warnings(tensors, stored, dtype)
        return SparsityReport(
            first.path,
            second.path,
            None if other is None else sides[2].path,
            dtype,
            stored,
            taus,
            tensors,
            excluded,
            notes,
            overlaps if other is not None else [],
        )


def _compare_tensor(
    name: str, sides: Sequence[Checkpoint], taus: Sequence[float], asked: Dtype, rank: bool
) -> tuple[TensorChange, list[Overlap]]:
    stored = [side.tensors[name] for side in sides]
    dtype = compared_dtype([known for s in stored if (known := s.torch_dtype) is not None], asked)
    counts = Counts(0, (0,) * len(taus))
    overlaps: list[Overlap] = []
    for blocks in zip(*(side.blocks(name) for side in sides), strict=True):
        rounded = [block.to(dtype) for block in blocks]
        before, after, *second = rounded
        counts += count_changes(before, after, taus)
        if second:
            here = count_overlap(before, after, second[0], taus)
            overlaps = [a + b for a, b in zip(overlaps, here, strict=True)] if overlaps else here
    wanted = rank and len(stored[0].shape) in (2, 3) and "norm" not in name.rpartition(".")[0].lower()
    found = update_rank(*(side.tensor(name).to(dtype) for side in sides[:2])) if wanted else None
    return TensorChange(name, stored[0].shape, str(dtype).removeprefix("torch."), counts, found), overlaps


def _match(first: Checkpoint, second: Checkpoint, skip: set[str]) -> tuple[list[str], list[Excluded]]:
    """Return the names that can be compared, and what cannot with its reason."""
    shared, excluded = [], []
    for name in sorted({*first.tensors, *second.tensors}, key=_in_order):
        if name in skip:
            continue
        a, b = first.tensors.get(name), second.tensors.get(name)
        if a is None or b is None:
            reason = f"not in {(first if a is None else second).path}"
        elif a.shape != b.shape:
            reason = f"shape {list(a.shape)} became {list(b.shape)}"
        elif a.torch_dtype is None or b.torch_dtype is None:
            reason = f"no floating-point weights: stored as {a.dtype} and {b.dtype}"
        elif a.elements == 0:
            reason = "empty"
        else:
            shared.append(name)
            continue
        excluded.append(Excluded(name, reason, a.elements if a else 0, b.elements if b else 0))
    return shared, excluded


def _in_order(name: str) -> list[tuple[int, str]]:
    """Sort layer 10 behind layer 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _warnings(tensors: Sequence[TensorChange], stored: dict[str, dict[str, int]], dtype: Dtype) -> list[str]:
    notes = []
    with_nan = [tensor for tensor in tensors if tensor.counts.nan]
    if with_nan:
        names = ", ".join(f"{tensor.name} ({tensor.counts.nan})" for tensor in with_nan[:5])
        more = f" and {len(with_nan) - 5} more" if len(with_nan) > 5 else ""
        notes.append(f"NaN, counted as changed: {names}{more}.")
    kinds = {kind for side in stored.values() for kind in side}
    finer = {"F64", "F32"} & kinds if dtype in ("bfloat16", "float16") else set()
    if finer:
        notes.append(
            f"Weights stored in {' and '.join(sorted(finer))} were rounded to {dtype} first, which hides "
            f"small changes; --dtype stored compares them as they are."
        )
    if len(kinds) > 1 and dtype == "stored":
        notes.append(
            f"Stored types are mixed ({', '.join(sorted(kinds))}): each tensor was compared in its "
            f"coarsest one."
        )
    return notes


def _stored(side: Checkpoint, names: Sequence[str]) -> dict[str, int]:
    kinds = [side.tensors[name].dtype for name in names if name in side.tensors]
    return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}


def _example(side: Checkpoint) -> str:
    name = next(iter(side.tensors), None)
    return "nothing" if name is None else f"{name} {list(side.tensors[name].shape)}"
