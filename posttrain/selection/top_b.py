"""The B best scores over many tensors, exactly, without one vector of all scores and without sorting them.

Order
    A higher score is better; equal scores are taken by (order of the tensors, flat position). So exactly B
    scalars are selected, the same everywhere. Scores are fp32 (bf16 and fp16 are exact in it); a score that
    is not finite is refused.

How
    Small B: one pass keeps a pool of the B best so far; of a later tensor only what beats the worst of a full
    pool is looked at. Large B: fp32 numbers, read as integers, are in the order of their bits, so three
    passes of histograms (11 + 11 + 10 bits) find the B-th best score, and one more collects the positions.
    Work is done block by block, so that besides the positions only one block is held at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from posttrain._lazy import torch

_SMALL = 1 << 20
_BLOCK = 1 << 20
_CHUNK = 256
_BITS = (11, 11, 10)  # of 32, from the top


@dataclass(frozen=True)
class ByBlock:
    """Scores of one tensor that exist one block at a time.

    Attributes:
        numel: How many there are.
        read: From (start, stop) the (stop - start,) scores of these flat positions; the same at each call.
        block: How many to ask for at once; None for 2^20.
    """

    numel: int
    read: Callable[[int, int], torch.Tensor]
    block: int | None = None


if TYPE_CHECKING:
    Scores = torch.Tensor | Callable[[], torch.Tensor] | ByBlock


def budget_of(budget: int | float, candidates: int) -> int:
    """Return the number of scalars a budget means.

    Args:
        budget: A whole number of scalars, or a fraction in (0, 1) of the candidates: floor(fraction * n).
        candidates: n.

    Raises:
        ValueError: It is below one scalar or above n.
    """
    count = math.floor(budget * candidates) if isinstance(budget, float) else budget
    if not 1 <= count <= candidates:
        raise ValueError(
            f"the budget {budget} is {count} of {candidates:,} candidate scalars; it must be at least 1 and "
            "at most all of them"
        )
    return count


def top_b(scores: Mapping[str, Scores], budget: int) -> dict[str, torch.Tensor]:
    """Return the positions of the ``budget`` highest scores over all tensors.

    Args:
        scores: Per tensor its scores, or a function that returns them, or :class:`ByBlock`; functions are
            called up to four times and have to return the same values. The order of the mapping breaks ties.
        budget: B, from 0 to the number of scores.

    Returns:
        Per tensor with a selected score the sorted flat positions, int64 on the device of the scores.

    Raises:
        ValueError: B is negative or above the number of scores.
        FloatingPointError: A score is NaN or infinite; the message names tensor and position.
    """
    if budget < 0:
        raise ValueError(f"the budget must be 0 or more, found {budget}")
    if budget == 0:
        return {}
    chosen = _pooled(scores, budget) if budget <= _SMALL else _by_histogram(scores, budget)
    return {name: index for name, index in chosen.items() if len(index)}


# ---- small B: a pool -------------------------------------------------------------------------------------


def _pooled(scores: Mapping[str, Scores], budget: int) -> dict[str, torch.Tensor]:
    pool = torch.empty(0)
    where: list[tuple[str, torch.Tensor]] = []  # positions by tensor, in the order of the pool
    seen = 0
    for name, source in scores.items():
        for start, raw in _blocks(source):
            block = _checked(raw, name, start)
            seen += len(block)
            if len(pool) == budget:
                # later scores lose ties, so only what is strictly better than the worst can enter
                index = _above(block, pool.min())
                if not len(index):
                    continue
                index = index[_stable_top(block[index], budget)]
            else:
                index = _stable_top(block, budget)
            pool = torch.cat([pool.to(block.device), block[index]])
            where.append((name, index + start))
            pool, where = _shrunk(pool, where, budget)
    if seen < budget:
        raise ValueError(f"the budget {budget} is above the number of scores, {seen}")
    chosen: dict[str, list[torch.Tensor]] = {}
    for name, index in where:
        chosen.setdefault(name, []).append(index)
    return {name: torch.cat(parts) for name, parts in chosen.items()}


def _shrunk(
    pool: torch.Tensor, where: list[tuple[str, torch.Tensor]], budget: int
) -> tuple[torch.Tensor, list[tuple[str, torch.Tensor]]]:
    if len(pool) <= budget:
        return pool, where
    keep = _stable_top(pool, budget)
    kept = torch.zeros(len(pool), dtype=torch.bool, device=pool.device)
    kept[keep] = True
    parts = kept.split([len(index) for _, index in where])
    where = [(name, index[part]) for (name, index), part in zip(where, parts, strict=True)]
    return pool[keep], [(name, index) for name, index in where if len(index)]


def _above(block: torch.Tensor, worst: torch.Tensor) -> torch.Tensor:
    """Return the ascending positions of the scores above ``worst``; few are expected."""
    whole = len(block) - len(block) % _CHUNK
    table = block[:whole].view(-1, _CHUNK)
    rows = (table.amax(1) > worst).nonzero().flatten()  # cheaper than a mask of the block and its positions
    row, column = (table[rows] > worst).nonzero().unbind(1)
    rest = (block[whole:] > worst).nonzero().flatten()
    return torch.cat([rows[row] * _CHUNK + column, rest + whole])


def _stable_top(values: torch.Tensor, count: int) -> torch.Tensor:
    """Return the ascending positions of the ``count`` highest values; of equal ones the first."""
    if len(values) <= count:
        return torch.arange(len(values), device=values.device)
    worst = values.topk(count).values[-1]  # topk does not say which of equal values it takes
    better = values > worst
    ties = (values == worst).nonzero().flatten()[: count - int(better.sum())]
    better[ties] = True
    return better.nonzero().flatten()


# ---- large B: radix histograms ---------------------------------------------------------------------------


def _by_histogram(scores: Mapping[str, Scores], budget: int) -> dict[str, torch.Tensor]:
    prefix, left, shift = 0, budget, 32
    for bits in _BITS:
        shift -= bits
        counts = _histogram(scores, prefix, shift, bits)
        if shift == 32 - bits and int(counts.sum()) < budget:
            raise ValueError(f"the budget {budget} is above the number of scores, {int(counts.sum())}")
        above = counts.flip(0).cumsum(0).flip(0)  # scores in this bin or a higher one
        chosen = int((above >= left).nonzero()[-1])
        left -= int(above[chosen] - counts[chosen])
        prefix = (prefix << bits) | chosen
    # prefix is now the B-th best score itself, and `left` of the scores equal to it are still wanted
    picked: dict[str, torch.Tensor] = {}
    for name, source in scores.items():
        parts = []
        for start, block in _blocks(source):
            keys = _keys(block)
            take = keys > prefix
            ties = (keys == prefix).nonzero().flatten()[:left]
            take[ties] = True
            left -= len(ties)
            parts.append(take.nonzero().flatten() + start)
        picked[name] = torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)
    return picked


def _histogram(scores: Mapping[str, Scores], prefix: int, shift: int, bits: int) -> torch.Tensor:
    """Count the scores whose higher bits are ``prefix`` by their next ``bits`` bits."""
    counts = torch.zeros(1 << bits, dtype=torch.long)
    for name, source in scores.items():
        for start, block in _blocks(source):
            keys = _keys(_checked(block, name, start)) >> shift
            keys = keys[(keys >> bits) == prefix] & ((1 << bits) - 1)
            counts += torch.bincount(keys, minlength=1 << bits).cpu()
    return counts


def _keys(values: torch.Tensor) -> torch.Tensor:
    """Return fp32 numbers as integers in [0, 2^32) of the same order; -0.0 equals 0.0."""
    bits = (values + 0.0).view(torch.int32).long()  # adding 0.0 turns -0.0 into 0.0
    return torch.where(bits < 0, ~bits & 0xFFFFFFFF, bits | 0x80000000)


# ---- both ------------------------------------------------------------------------------------------------


def _blocks(source: Scores) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (flat position of its first score, fp32 scores) of block after block."""
    if not isinstance(source, ByBlock):
        flat = (source() if callable(source) else source).detach().flatten()
        source = ByBlock(flat.numel(), lambda start, stop: flat[start:stop])
    size = source.block or _BLOCK
    for start in range(0, source.numel, size):
        yield start, source.read(start, min(start + size, source.numel)).float()


def _checked(block: torch.Tensor, name: str, start: int) -> torch.Tensor:
    if math.isfinite(block.sum().item()):  # several times faster than asking for every score
        return block
    finite = torch.isfinite(block)
    if not finite.all():
        first = int((~finite).nonzero()[0])
        raise FloatingPointError(
            f"the score of {name} at flat position {start + first} is {block[first].item()}: scores must be "
            "finite. Look for a broken weight or a gradient that overflowed."
        )
    return block
