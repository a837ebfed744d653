r"""PaFi: train the weights of smallest magnitude (arXiv 2305.16742).

Idea
    Tiny weights contribute least to what the model does, so they can be given to a new task at the least
    cost to the old ones. The choice needs no data and no gradient: one mask serves all tasks, and clients
    that hold the same base find the same mask without talking to each other.

Formula
    With a budget of B scalars over all candidate tensors together, one global threshold::

        S = the B scalars of smallest |theta0|

    computed in fp32, ties by (tensor order, flat position). ``largest=True`` takes the B largest, the
    ablation that shows what the sign of the score is worth.

Defaults and where they come from
    budget 0.01, ours; the ID3 paper compares PaFi at its own budgets (0.06 % to 0.17 % of a small encoder,
    0.1 % of a 2.7B model). Ranking is global over all candidates, token embeddings and norms included, as
    in the selective-peft-toolkit. Weight decay acts on no unselected scalar.

Needs
    Nothing beside the weights, as they are before training.

Composes with
    Every loss and trainer. With a fresh LoRA adapter B is zero everywhere: the smallest weights are those of
    B, in the order of the tensors.

When not to use it
    - In bf16 without care: its few bits of mantissa make large ties at the threshold, and the tie goes to
      the first tensors. The mask is exact and reproducible, yet not one of "smallest" within the tie.
    - On a model with rows that were never trained, such as padding of the vocabulary: they are near zero
      and take the budget. Leave them out with ``embeddings: false`` or ``exclude``.

What to watch
    ``posttrain plan inspect``: how the budget is spread over the tensors. Most of it in one of them hints at
    a zero block.

Official code
    The selective-peft-toolkit's version was read; it applies one global threshold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from posttrain._lazy import torch
from posttrain.selection.plan import SelectionPlan
from posttrain.selection.selector import Budget, ElementSelector
from posttrain.selection.top_b import top_b

if TYPE_CHECKING:
    from torch import nn


class Magnitude(ElementSelector):
    """Select the scalars of smallest, or largest, magnitude. See the module page."""

    name = "magnitude"
    title = "PaFi: the weights of smallest magnitude"
    paper = "2305.16742"

    budget: Budget = Field(0.01, description="Scalars that may move: a number, or a fraction of candidates.")
    largest: bool = Field(False, description="Take the largest magnitudes instead, as an ablation.")

    def select(self, model: nn.Module, *, round: int = 0, batches: object = None) -> SelectionPlan:
        """Return the plan, see :meth:`Selector.select`.

        Raises:
            FloatingPointError: A weight is not finite; the message says where.
        """
        del batches
        ranked, whole, budget = self.split(model)
        assert budget is not None
        return self.elements(
            model, top_b(magnitudes(ranked, largest=self.largest), budget), whole, round=round
        )


def magnitudes(
    weights: Mapping[str, torch.Tensor], *, largest: bool = False
) -> dict[str, Callable[[], torch.Tensor]]:
    """Return the scores to rank by: minus the magnitude, or the magnitude where ``largest`` is asked for."""

    def score(tensor: torch.Tensor) -> torch.Tensor:
        size = tensor.detach().abs()
        return size if largest else size.neg_()

    return {name: lambda tensor=tensor: score(tensor) for name, tensor in weights.items()}  # type: ignore[misc]
