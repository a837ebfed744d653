"""Selections that grow: scalars are released while the run goes on, and stay released.

A :class:`GrowingSelector` says how many scalars have been released after so many steps, and how to score one
from its gradient and its weight. :class:`Growth` drives it: at an optimiser step, once the gradient of the
whole accumulation window is reduced over the ranks and before it is clipped, it releases the best of the
scalars that are still frozen, so that what is released at a step moves at that step.

Cost
    One pass over gradients and weights per release, block by block: no vector of all scores, no sort of them.
    ``every=n`` makes that one pass in n steps. Gradients are dense, so memory is that of full fine-tuning but
    for optimiser state, which follows what is released.

Ranks
    Rank 0 scores the reduced gradient and broadcasts the positions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from posttrain._lazy import torch
from posttrain.selection.plan import (
    PlanError,
    SelectionPlan,
    TensorSelection,
    index_dtype,
    tensor_hash,
    tied_names,
)
from posttrain.selection.selector import ElementSelector, Need, Schedule
from posttrain.selection.top_b import ByBlock, top_b

if TYPE_CHECKING:
    from torch import nn

    from posttrain.selection.adamw import SelectiveAdamW
    from posttrain.selection.apply import Selection

logger = logging.getLogger(__name__)

LAST = -1e30
"""The score that comes after every other one; the sum of a block of them is still a number."""

_TAKEN = -2e30
"""Score of what is released already; never taken, as no more is asked for than is left."""

_GPU_BLOCK = 1 << 24


class GrowingSelector(ElementSelector):
    """Base class of selectors that release scalars step by step; ``budget`` is what is released at the end.

    Subclasses override :meth:`score`, and :meth:`released` for another schedule than an even one.
    """

    needs: ClassVar[Need] = "gradients"
    schedule: ClassVar[Schedule] = "grow"

    total_steps: int | None = Field(
        None, ge=1, description="Optimiser steps until the budget is used up; None for all steps of the run."
    )
    every: int = Field(
        1,
        ge=1,
        description="Score at every n-th step only, and release then what n steps would have released.",
    )

    def select(self, model: nn.Module, *, round: int = 0, batches: Any = None) -> SelectionPlan:
        """Refuse: what may move is known when the run is over."""
        del model, round, batches
        raise PlanError(
            f"{self.name} releases scalars while it trains, so there is no plan beforehand: give the "
            "selector itself to a trainer. The plan of a run is trainer.selection.plan."
        )

    def score(self, gradient: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return the fp32 scores of (n,) scalars, from :data:`LAST` (no gradient) up; higher is better.

        Called with blocks of flattened tensors; the result is a new tensor.
        """
        raise NotImplementedError

    def released(self, steps: int, total_steps: int, budget: int) -> int:
        """Return how many scalars are released after ``steps`` of ``total_steps`` steps.

        Even: step t = 0, 1, ... releases floor(B / T) + [t < B mod T].
        """
        steps = min(steps, total_steps)
        return steps * (budget // total_steps) + min(steps, budget % total_steps)

    def begin(self, model: nn.Module) -> tuple[SelectionPlan, list[str], int]:
        """Return what trains from the start, the candidates, and how many of their scalars are to come.

        The plan has the hashes of all candidates, as any of them may be touched.

        Raises:
            PlanError, ValueError: See :meth:`ElementSelector.split`.
        """
        ranked, whole, budget = self.split(model)
        if budget is None:
            raise PlanError(
                f"{self.name} needs a budget: the number or fraction of scalars to release in all"
            )
        tensors = {
            name: (TensorSelection.all if name in whole else TensorSelection.none)(p.shape)
            for name, p in model.named_parameters()
        }
        hashes = {name: tensor_hash(p) for name, p in (ranked | whole).items()}
        config = self.model_dump(mode="json")
        return SelectionPlan(tensors, self.name, config, hashes, tied_names(model)), list(ranked), budget


def best(
    score: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    parameters: Mapping[str, torch.Tensor],
    taken: Mapping[str, torch.Tensor],
    count: int,
) -> dict[str, torch.Tensor]:
    """Return the ``count`` scalars with the highest scores among those that are not taken.

    Ties are taken by (order of the tensors, flat position).

    Args:
        score: See :meth:`GrowingSelector.score`.
        parameters: Tensors with their ``grad``; one without a gradient comes last.
        taken: Sorted flat positions by name; a tensor may be missing.
        count: At most the number of scalars that are not taken.

    Returns:
        Per tensor with a released scalar the sorted flat positions, int64.

    Raises:
        ValueError: Fewer than ``count`` scalars are left.
        FloatingPointError: A score is not finite; the message names tensor and position.
    """
    left = sum(p.numel() for p in parameters.values()) - sum(len(index) for index in taken.values())
    if count > left:
        raise ValueError(f"{count:,} scalars are to be released and {left:,} are left")
    return top_b({name: _scores(score, p, taken.get(name)) for name, p in parameters.items()}, count)


def _scores(
    score: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    parameter: torch.Tensor,
    taken: torch.Tensor | None,
) -> ByBlock:
    weight = parameter.detach().reshape(-1)
    gradient = None if parameter.grad is None else parameter.grad.detach().reshape(-1)

    def read(start: int, stop: int) -> torch.Tensor:
        if gradient is None:
            scores = torch.full((stop - start,), LAST, device=weight.device)
        else:
            scores = score(gradient[start:stop], weight[start:stop])
        if taken is not None and len(taken):
            edges = torch.tensor([start, stop], dtype=taken.dtype, device=taken.device)
            first, end = torch.searchsorted(taken, edges).tolist()
            scores[taken[first:end].long() - start] = _TAKEN
        return scores

    return ByBlock(parameter.numel(), read, None if weight.device.type == "cpu" else _GPU_BLOCK)


class Growth:
    """A growing selection in a run.

    Args:
        selector: What decides.
        selection: In force, backend ``masked``.
        candidates: Names of the tensors to release from, in order.
        budget: Scalars to be released in all, tensors that train whole not counted.
        broadcast: Gives an int64 tensor of rank 0 to all ranks; None for one process.
        first: Whether this is rank 0.

    Attributes:
        step: Optimiser steps taken so far.
        total_steps: Steps of the schedule; None before the first one.
        count: Scalars released so far.
    """

    def __init__(
        self,
        selector: GrowingSelector,
        selection: Selection,
        candidates: Iterable[str],
        budget: int,
        *,
        broadcast: Callable[[torch.Tensor], torch.Tensor] | None = None,
        first: bool = True,
    ) -> None:
        self.selector, self.selection, self.budget = selector, selection, budget
        parameters = dict(selection.model.named_parameters())
        self.parameters = {name: parameters[name] for name in candidates}
        self.step, self.count = 0, 0
        self.total_steps: int | None = selector.total_steps
        self._broadcast, self._first = broadcast, first

    def release(self, optimizer: SelectiveAdamW, run_steps: int) -> None:
        """Release what is due at this optimiser step; called once per step, before clipping.

        Args:
            optimizer: Moves the released scalars; the gradients are those of the whole step.
            run_steps: Optimiser steps of the run, for a selector that does not set ``total_steps``.

        Raises:
            FloatingPointError: A gradient that is scored is not finite; nothing is released then.
        """
        if self.step == 0 and self.total_steps is not None:
            count = self.selector.released(run_steps, self.total_steps, self.budget)
            if count < self.budget:
                logger.warning(
                    "%s releases %d scalars in %d steps, and the run has %d: only %d of them will train",
                    self.selector.name, self.budget, self.total_steps, run_steps, count,
                )  # fmt: skip
        self.total_steps = self.total_steps or run_steps
        due = 0
        if self.step % self.selector.every == 0:
            ahead = self.selector.released(self.step + self.selector.every, self.total_steps, self.budget)
            due = ahead - self.count
        with torch.no_grad():
            chosen = self._chosen(due) if due > 0 else {}
        for name, new in chosen.items():
            parameter = self.parameters[name]
            old = self.selection.positions[parameter].to(new.device)
            index = torch.cat([old, new.to(index_dtype(parameter.numel()))]).sort().values
            optimizer.select(parameter, index)
            self.selection.select(parameter, index)
            self.count += len(new)
        self.step += 1

    def _chosen(self, due: int) -> dict[str, torch.Tensor]:
        taken = {name: self.selection.positions[p] for name, p in self.parameters.items()}
        if self._broadcast is None:
            return best(self.selector.score, self.parameters, taken, due)
        device = next(iter(self.parameters.values())).device
        pairs = torch.full((due, 2), -1, dtype=torch.int64, device=device)
        problem: FloatingPointError | None = None
        if self._first:
            try:
                found = best(self.selector.score, self.parameters, taken, due)
                order = {name: number for number, name in enumerate(self.parameters)}
                parts = [
                    torch.stack([torch.full_like(index, order[name]), index], 1).to(device)
                    for name, index in found.items()
                ]
                pairs = torch.cat(parts)
            except FloatingPointError as error:  # the other ranks wait for an answer
                problem = error
        pairs = self._broadcast(pairs)
        if bool((pairs < 0).any()):
            raise problem or FloatingPointError("rank 0 found a score that is not finite; see its message")
        chosen = {name: pairs[pairs[:, 0] == number, 1] for number, name in enumerate(self.parameters)}
        return {name: index.to(self.parameters[name].device) for name, index in chosen.items() if len(index)}

    # ---- exact resume -----------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return what is needed to go on, beside the state of the optimiser."""
        config = self.selector.model_dump(mode="json")
        return {"config": config, "step": self.step, "total_steps": self.total_steps, "budget": self.budget}

    def fits(self, state: Mapping[str, Any] | None) -> bool:
        """Whether ``state`` is of the same selector with the same settings."""
        mine = self.state()
        return state is not None and all(state.get(key) == mine[key] for key in ("config", "budget"))

    def restore(self, state: Mapping[str, Any], optimizer: SelectiveAdamW) -> None:
        """Go on from ``state``, with the released scalars that the restored optimiser has."""
        self.step, self.total_steps, self.count = state["step"], state["total_steps"], 0
        for parameter in self.parameters.values():
            index = optimizer.selected(parameter)
            assert index is not None
            self.selection.select(parameter, index)
            self.count += len(index)
