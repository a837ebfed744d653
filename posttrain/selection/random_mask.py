r"""Random mask: a uniformly drawn part of the weights, the control of every other selector.

Idea
    Whether a score finds better weights than chance can only be told against chance at the same density. A
    random mask at matched density is that control, and a strong one: it needs no data and no gradient.

Formula
    With n candidate scalars and a budget of B, every subset of B scalars is equally likely::

        S ~ Uniform{ S subset of candidates : |S| = B }              (granularity element)

    ``level="tensor"`` walks through the tensors in random order and takes every one that still fits; the
    plan then freezes whole tensors, and holds at most B scalars, how many the log says.

Defaults and where they come from
    budget 0.01, ours: ranges of the selective methods are 1e-4 to 1e-2 of the candidates; weight decay acts
    on no unselected scalar. Seed 0; another round draws anew.

How
    Every scalar is drawn independently with probability B / n, and the difference to B, about sqrt(B), is
    drawn from what was (not) hit. Given its size each of these subsets is uniform, so the result is uniform
    and exact, in one pass and with a block of random numbers in memory. Above half of the candidates the
    complement is drawn.

Needs
    Nothing beside the weights, and of these only names and shapes.

Composes with
    Every loss and trainer; with an adapter the candidates are its scalars.

When not to use it
    - To save compute: the gradient of a tensor is dense before it is gathered.
    - As the only control of a selector that leaves tensors out: give both the same ``include`` and
      ``exclude``, or ``embeddings`` and ``norms``.

What to watch
    ``selection/changed``: the share of selected scalars that differ from the base in the weights' type. Far
    below 1 in bf16 means that updates are too small to be seen yet.

Official code
    The selective-peft-toolkit has a random selector; nothing of it is used.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from posttrain._lazy import torch
from posttrain.selection.plan import PlanError, SelectionPlan, TensorSelection
from posttrain.selection.selector import Budget, ElementSelector

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)

_BLOCK = 1 << 22


class RandomMask(ElementSelector):
    """Select uniformly drawn scalars or tensors. See the module page."""

    name = "random"
    title = "Random mask: uniformly drawn weights, the control at matched density"
    schedule = "round"

    budget: Budget = Field(0.01, description="Scalars that may move: a number, or a fraction of candidates.")
    level: Literal["element", "tensor"] = Field(
        "element",
        description="Draw single scalars, exactly the budget, or whole tensors, at most the budget.",
    )
    seed: int = Field(0, ge=0, description="Of the draw, together with the round.")

    def select(self, model: nn.Module, *, round: int = 0, batches: object = None) -> SelectionPlan:
        """Return a draw, see :meth:`Selector.select`."""
        del batches
        ranked, whole, budget = self.split(model)
        assert budget is not None
        generator = self.generator(round, self.seed)
        sizes = {name: parameter.numel() for name, parameter in ranked.items()}
        if self.level == "element":
            return self.elements(model, uniform_subset(sizes, budget, generator), whole, round=round)
        taken = tensors_within(sizes, budget, generator)
        if not taken:
            raise PlanError(
                f"no tensor fits into the budget of {budget:,} scalars, the smallest has "
                f"{min(sizes.values()):,}: raise the budget, or draw single scalars (level: element)"
            )
        logger.info("random: %d of a budget of %d scalars", sum(sizes[name] for name in taken), budget)
        selected = {n: TensorSelection.all(p.shape) for n, p in ranked.items() if n in taken}
        selected |= {name: TensorSelection.all(p.shape) for name, p in whole.items()}
        return self.plan(model, selected, round=round)


def tensors_within(sizes: Mapping[str, int], budget: int, generator: torch.Generator) -> set[str]:
    """Return tensors in random order, each that still fits into what is left of the budget."""
    names, taken, left = list(sizes), set(), budget
    for place in torch.randperm(len(names), generator=generator).tolist():
        if 0 < sizes[names[place]] <= left:
            taken.add(names[place])
            left -= sizes[names[place]]
    return taken


def uniform_subset(
    sizes: Mapping[str, int], count: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Return ``count`` scalars of all tensors, every subset equally likely.

    Args:
        sizes: Scalars of each tensor.
        count: 0 to all of them.
        generator: On the CPU.

    Returns:
        Per tensor with a drawn scalar the sorted flat positions, int64.

    Raises:
        ValueError: ``count`` is out of range.
    """
    total = sum(sizes.values())
    if not 0 <= count <= total:
        raise ValueError(f"{count} of {total} scalars cannot be drawn")
    inverse = 2 * count > total
    drawn = _sparse_subset(sizes, total - count if inverse else count, total, generator)
    if inverse:
        for name, size in sizes.items():
            mask = torch.ones(size, dtype=torch.bool)
            mask[drawn[name]] = False
            drawn[name] = mask.nonzero().flatten()
    return {name: index for name, index in drawn.items() if len(index)}


def _sparse_subset(
    sizes: Mapping[str, int], count: int, total: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Return at most half of the scalars, per tensor, also those without any."""
    rate = count / max(total, 1)
    drawn = {name: _hits(size, rate, generator) for name, size in sizes.items()}
    surplus = sum(map(len, drawn.values())) - count
    if surplus > 0:
        gone = _distinct(surplus, count + surplus, generator)
        for (name, index), dropped in zip(drawn.items(), _split(gone, map(len, drawn.values())), strict=True):
            keep = torch.ones(len(index), dtype=torch.bool)
            keep[dropped] = False
            drawn[name] = index[keep]
    while surplus < 0:  # at least half of all are free, so a few turns do
        offered = _distinct(-surplus, total, generator)
        for (name, index), new in zip(drawn.items(), _split(offered, sizes.values()), strict=True):
            new = new[~torch.isin(new, index)]
            drawn[name] = torch.cat([index, new]).sort().values
            surplus += len(new)
    return drawn


def _hits(size: int, rate: float, generator: torch.Generator) -> torch.Tensor:
    parts = [
        (torch.rand(min(_BLOCK, size - start), generator=generator) < rate).nonzero().flatten() + start
        for start in range(0, size, _BLOCK)
    ]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.long)


def _distinct(count: int, total: int, generator: torch.Generator) -> torch.Tensor:
    """Return ``count`` different numbers below ``total``, sorted; every subset equally likely."""
    if 2 * count > total:
        return torch.randperm(total, generator=generator)[:count].sort().values
    found = torch.empty(0, dtype=torch.long)
    while len(found) < count:
        more = torch.randint(total, (count - len(found),), generator=generator)
        found = torch.cat([found, more]).unique()
    return found


def _split(positions: torch.Tensor, sizes: object) -> Iterator[torch.Tensor]:
    """Yield sorted global positions as those within each of consecutive ranges."""
    start = 0
    for size in sizes:  # type: ignore[attr-defined]
        low, high = torch.searchsorted(positions, torch.tensor([start, start + size])).tolist()
        yield positions[low:high] - start
        start += size
