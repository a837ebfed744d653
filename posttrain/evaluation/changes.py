"""Formulas of the sparsity report: changed sets of tensors, their overlap, the rank of an update.

Pure functions on tensors; :mod:`posttrain.evaluation.sparsity` has the definitions and reads the checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch

Dtype = Literal["bfloat16", "float16", "float32", "stored"]
DTYPES: tuple[str, ...] = get_args(Dtype)


def magnitude(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Return |after - before|, computed in fp32 (fp64 when either side is).

    Infinity where either side is NaN, 0 where both are the same infinity, so that ``> tau`` is the changed
    set.
    """
    wide = torch.float64 if torch.float64 in (before.dtype, after.dtype) else torch.float32
    before, after = before.to(wide), after.to(wide)
    delta = (after - before).abs_()
    if bool(delta.isnan().any()):
        delta[after == before] = 0.0
        delta.nan_to_num_(nan=torch.inf, posinf=torch.inf)
    return delta


def compared_dtype(stored: Sequence[torch.dtype], asked: Dtype) -> torch.dtype:
    """Return the type that all sides of a tensor are rounded to.

    ``stored`` takes the coarsest of them: bfloat16 before float16 before float32. A finer side would differ
    from a coarser one by its rounding alone.
    """
    if asked != "stored":
        dtype: torch.dtype = getattr(torch, asked)
        return dtype
    coarse_first = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
    return min(stored, key=coarse_first.index)


def update_rank(before: torch.Tensor, after: torch.Tensor) -> float | None:
    """Return rank(after - before) / min(rows, columns); of a stack of matrices the mean. See the module page.

    Args:
        before: (rows, columns), or (matrices, rows, columns) as fused experts are stored.
        after: The same shape.

    Returns:
        A number in [0, 1], or None when the difference is not finite.
    """
    delta = after.float() - before.float()
    if not bool(delta.isfinite().all()):
        return None
    ranks = torch.linalg.matrix_rank(delta)
    return float(ranks.double().mean()) / min(delta.shape[-2:])


@dataclass(frozen=True)
class Counts:
    """Elements, and how many of them changed.

    Attributes:
        elements: Number of elements.
        changed: |I| at each tolerance of the report, in order.
        nan: Elements that are NaN on either side; they are among the changed ones.
    """

    elements: int
    changed: tuple[int, ...]
    nan: int = 0

    def __add__(self, other: Counts) -> Counts:
        changed = tuple(a + b for a, b in zip(self.changed, other.changed, strict=True))
        return Counts(self.elements + other.elements, changed, self.nan + other.nan)

    @property
    def density(self) -> tuple[float, ...]:
        """Share that changed, at each tolerance."""
        return tuple(count / self.elements for count in self.changed)

    @property
    def sparsity(self) -> tuple[float, ...]:
        """Share that did not change, at each tolerance."""
        return tuple((self.elements - count) / self.elements for count in self.changed)

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python values for JSON."""
        return {**asdict(self), "changed": list(self.changed), "sparsity": list(self.sparsity)}


def count_changes(before: torch.Tensor, after: torch.Tensor, tolerances: Sequence[float]) -> Counts:
    """Return the counts of one tensor, or of a piece of one, compared as given (no rounding).

    Raises:
        ValueError: The shapes differ.
    """
    if before.shape != after.shape:
        raise ValueError(f"two versions of a tensor have one shape, found {before.shape} and {after.shape}")
    if torch.equal(before, after):  # never true with NaN
        return Counts(before.numel(), (0,) * len(tolerances))
    size = magnitude(before, after)
    changed = tuple(int(torch.count_nonzero(size > tau)) for tau in tolerances)
    # NaN gives infinity, which few other things do
    nan = int((before.isnan() | after.isnan()).sum()) if bool(size.isinf().any()) else 0
    return Counts(size.numel(), changed, nan)


@dataclass(frozen=True)
class Overlap:
    """Changed sets of two runs from one start, at one tolerance.

    Attributes:
        tolerance: tau.
        elements: n, elements present in all three checkpoints.
        first: |I1|.
        second: |I2|.
        both: |I1 ∩ I2|.
    """

    tolerance: float
    elements: int
    first: int
    second: int
    both: int

    def __add__(self, other: Overlap) -> Overlap:
        return Overlap(
            self.tolerance,
            self.elements + other.elements,
            self.first + other.first,
            self.second + other.second,
            self.both + other.both,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return counts, o1, o2, their chance levels and the Jaccard index; None where the divisor is 0."""
        either = self.first + self.second - self.both
        return {
            **asdict(self),
            "o1": _ratio(self.both, self.first),
            "o2": _ratio(self.both, self.second),
            "chance_o1": _ratio(self.second, self.elements),
            "chance_o2": _ratio(self.first, self.elements),
            "jaccard": _ratio(self.both, either),
        }


def count_overlap(
    before: torch.Tensor, first: torch.Tensor, second: torch.Tensor, tolerances: Sequence[float]
) -> list[Overlap]:
    """Return the overlap of two changed sets at each tolerance, for one tensor or a piece of one."""
    one, two = magnitude(before, first), magnitude(before, second)
    return [
        Overlap(
            tau,
            one.numel(),
            int((one > tau).sum()),
            int((two > tau).sum()),
            int(((one > tau) & (two > tau)).sum()),
        )
        for tau in tolerances
    ]


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None
