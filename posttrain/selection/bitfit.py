r"""BitFit and its kin: train biases, norms, or every vector (arXiv 2106.10199).

Idea
    The vectors of a network are a thousandth of its scalars, yet shift and scale every activation. Training
    only these is the cheapest baseline: nothing is scored, and the choice is the same for all tasks.

Modes
    ``bias``: every parameter called bias, in norms too. An error in models without biases (Llama, Mistral,
    Qwen3), where BitFit does not exist. ``norm``: weights and biases of norms. ``one_dim``: every
    one-dimensional parameter in order, norm weights included, which is what the selective-peft-toolkit calls
    BitFit; in a model without biases that is norm tuning.

Formula
    With candidates v_1, v_2, ... of the mode in the order of the model, and a budget of B scalars::

        S = the first B scalars of (v_1, v_2, ...)

    and all of them without a budget. The last vector may thus train in part.

Defaults and where they come from
    mode ``bias`` (the paper), no budget. Weight decay acts on no unselected scalar.

Needs
    Nothing beside the weights, and of these only names and shapes.

Composes with
    Every loss and trainer. Without a budget whole tensors are frozen, so that the weight gradients of all
    matrices are saved, one of the three products of a layer. ``always_train`` adds a fresh head,
    charged to the budget.

When not to use it
    - With an adapter: its matrices have no vectors.
    - When the new task needs more than shifts and scales: it is a baseline, weak on decoders.

What to watch
    ``posttrain plan inspect``: the number of scalars; some architectures have biases on q, k and v alone.

Official code
    The selective-peft-toolkit's version was read: mode ``one_dim`` with a budget is what it does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from posttrain._lazy import torch
from posttrain.selection.plan import PlanError, SelectionPlan
from posttrain.selection.selector import ElementSelector, norm_names

if TYPE_CHECKING:
    from torch import nn


class BitFit(ElementSelector):
    """Select biases, norms or all vectors. See the module page."""

    name = "bitfit"
    title = "BitFit: biases, norms, or all vectors"
    paper = "2106.10199"
    granularity = "tensor"

    mode: Literal["bias", "norm", "one_dim"] = Field(
        "bias", description="True biases, parameters of norms, or every one-dimensional parameter."
    )

    def select(self, model: nn.Module, *, round: int = 0, batches: object = None) -> SelectionPlan:
        """Return the plan, see :meth:`Selector.select`.

        Raises:
            PlanError: The model has no parameters of this mode.
            ValueError: The budget is above what there is.
        """
        del batches
        ranked, whole, budget = self.split(model)
        norms = norm_names(model)
        chosen = {
            name: parameter.numel()
            for name, parameter in ranked.items()
            if (self.mode == "one_dim" and parameter.dim() == 1)
            or (self.mode == "norm" and name in norms)
            or (self.mode == "bias" and name.endswith("bias"))
        }
        if not chosen:
            fix = "'norm' or 'one_dim'" if self.mode == "bias" else "'bias', or allow norms"
            raise PlanError(
                f"bitfit finds no parameters of mode {self.mode!r} among {len(ranked)} candidates, such as "
                f"{next(iter(ranked), 'none')}: use mode {fix}, or another selector"
            )
        there_is = sum(chosen.values())
        if budget is not None and budget > there_is:
            raise ValueError(
                f"the budget leaves {budget:,} scalars to mode {self.mode!r}, and the model has {there_is:,} "
                "of them: lower the budget, or leave it out to train all"
            )
        left = there_is if budget is None else budget
        picked: dict[str, torch.Tensor] = {}
        for name, size in chosen.items():
            picked[name] = torch.arange(min(size, left))
            left -= len(picked[name])
        return self.elements(model, picked, whole, round=round)
