r"""SaRA: train the tiny weights, and after half of the run those that stayed tiny (arXiv 2409.06633).

Idea
    Weights of tiny magnitude contribute almost nothing, and are tiny by accident of training: they can be
    trained without hurting what the model knows. Weights that have left the neighbourhood of zero by the
    middle of the run have done their work; the second half trains the ones that have not.

Formula
    With a threshold t, the mask M and the loss L, over all candidate tensors::

        M  = [ |theta0| < t ]                      before training
        M' = M o [ |theta| < t ]                   at reselect_at of the run; only M' trains after it

    Instead of an absolute threshold, which is not portable between models, a ``budget`` takes the B scalars
    of smallest magnitude: over all candidates, or with ``per_tensor`` as a quantile of each tensor. The
    threshold of M' is then the largest magnitude that was selected (of all, or of each tensor), included.
    Compared is in fp32 at least; ties of a budget go by (tensor order, flat position).

    Optional, against overfitting, and of the weights themselves, not of their change::

        L + lambda || P o M ||_*,     subgradient (U V^T) o M     per matrix P, of its singular values > 0

    :func:`masked_nuclear` computes it; no trainer adds it, as an SVD of every large matrix at every step is
    impractical, and the official code's has no effect.

Defaults and where they come from
    budget 0.1, ours: the 10 % of smallest magnitude, where nothing is given. The paper tests absolute
    thresholds of 2e-4 to 1e-1 on a diffusion model and finds 8e-4 and up stable; 2e-3 in its code.
    Re-selection at 0.5 of the run (paper). Its learning rate is 1e-3 exp(-350 t), see
    :func:`paper_learning_rate`. Weight decay acts on no unselected scalar (the code: 0.01 on packed ones).

Needs
    Nothing beside the weights. In one process memory follows the budget (packed values), under DDP gradients
    are dense; either way an AdamW, whose state of the scalars that stay is kept.

Composes with
    Every loss; one process or DDP. The official code resets all state of Adam at re-selection and loses one
    update; here what stays keeps its state.

When not to use it
    - With DeepSpeed or sharded weights: the selection changes in mid-run.
    - With a fresh LoRA adapter, whose B is zero everywhere: the budget is all of B, in the order of tensors.
    - On the strength of its results: they are on image generation, and none on language models is known.

What to watch
    The log: how much is selected (a warning above half of the candidates), and how much is left after
    re-selection: 15 to 20 % of the first set in the paper. Where none is left, the first set goes on.

Official code
    sjtuplayer/SaRA. In its packed optimiser the penalty reaches no trained tensor, so it has no effect there.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from posttrain._lazy import torch
from posttrain.selection.magnitude import magnitudes
from posttrain.selection.plan import SelectionPlan, TensorSelection
from posttrain.selection.selector import Budget, ElementSelector
from posttrain.selection.top_b import top_b

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)


class SaRA(ElementSelector):
    """Select tiny weights, and again those that stayed tiny. See the module page."""

    name = "sara"
    title = "SaRA: tiny weights, and from half of the run on those that stayed tiny"
    paper = "2409.06633"
    schedule = "shrink"

    budget: Budget | None = Field(
        None,
        description="Scalars that may move: a number, or a fraction of candidates; 0.1 without a threshold.",
    )
    threshold: float | None = Field(
        None, gt=0, description="Absolute: weights of smaller magnitude may move. Instead of a budget."
    )
    per_tensor: bool = Field(False, description="The budget, a fraction, is that of each tensor by itself.")
    reselect_at: float = Field(0.5, gt=0, lt=1, description="Part of the run after which is selected again.")

    @model_validator(mode="after")
    def _one_measure(self) -> SaRA:
        if self.threshold is not None and (self.budget is not None or self.per_tensor):
            raise ValueError(
                f"sara takes a threshold or a budget: found threshold={self.threshold}, "
                f"budget={self.budget}, per_tensor={self.per_tensor}"
            )
        if self.per_tensor and isinstance(self.budget, int):
            raise ValueError(
                f"per_tensor takes a part of each tensor, found a number of scalars, {self.budget}: give a "
                "fraction such as 0.1"
            )
        return self

    def select(self, model: nn.Module, *, round: int = 0, batches: object = None) -> SelectionPlan:
        """Return the first plan, see :meth:`Selector.select`; its config holds the threshold in force.

        Raises:
            FloatingPointError: With a budget, a weight is not finite; the message says where.
        """
        del batches
        sized = (
            self if (self.budget, self.threshold) != (None, None) else self.model_copy(update={"budget": 0.1})
        )
        ranked, whole, budget = sized.split(model)
        threshold: float | dict[str, float]
        if self.threshold is not None:
            threshold = self.threshold
            chosen = {
                name: (_size(weight) < threshold).flatten().nonzero().flatten()
                for name, weight in ranked.items()
            }
        else:
            assert budget is not None
            if self.per_tensor:
                assert isinstance(sized.budget, float)
                part = budget / sum(map(torch.numel, ranked.values())) if whole else sized.budget
                chosen = {}
                for name, score in magnitudes(ranked).items():
                    chosen |= top_b({name: score}, math.floor(part * ranked[name].numel()))
            else:
                chosen = top_b(magnitudes(ranked), budget)
            largest = {name: float(_size(ranked[name]).flatten()[i].max()) for name, i in chosen.items()}
            threshold = largest if self.per_tensor else max(largest.values(), default=0.0)
        count, n = sum(map(len, chosen.values())), sum(map(torch.numel, ranked.values()))
        if 2 * count > n:
            logger.warning(
                "sara selects %d of %d candidates, more than half: these are not tiny weights; lower the %s",
                count, n, "budget" if self.threshold is None else "threshold",
            )  # fmt: skip
        return self.elements(
            model, chosen, whole, round=round, in_force=threshold, trained_whole=sorted(whole)
        )

    def reselect(self, model: nn.Module, plan: SelectionPlan) -> SelectionPlan:
        """Return M', what of ``plan`` is still below its threshold; tensors of ``always_train`` stay whole.

        Args:
            model: In mid-run; weights that are packed have to be written (``Selection.refresh``).
            plan: Of :meth:`select`, or that plan read from its file.

        Returns:
            The plan without hashes, as the weights are no longer those it began with; ``plan`` itself, with
            a warning, where nothing is still below the threshold.
        """
        in_force, whole = plan.config["in_force"], set(plan.config["trained_whole"])
        parameters = dict(model.named_parameters())
        tensors: dict[str, TensorSelection] = {}
        for name, selection in plan.tensors.items():
            tensors[name] = selection
            if selection.kind == "none" or name in whole:
                continue
            index = selection.flat()
            size = _size(parameters[name]).flatten()[index.to(parameters[name].device)].cpu()
            bound = in_force[name] if isinstance(in_force, dict) else in_force
            still = size < bound if self.threshold is not None else size <= bound
            tensors[name] = TensorSelection.elements(selection.shape, index[still])
        before, after = (
            sum(part.count for name, part in side.items() if name not in whole)
            for side in (plan.tensors, tensors)
        )
        if not after:
            logger.warning("sara: none of %d weights is still tiny, so all of them go on training", before)
            return plan
        logger.info("sara: %d of %d weights are still tiny and go on training", after, before)
        return dataclasses.replace(plan, tensors=tensors, hashes={})


def paper_learning_rate(threshold: float) -> float:
    """Return the paper's learning rate for an absolute threshold: 1e-3 exp(-350 t) (arXiv 2409.06633)."""
    return 1e-3 * math.exp(-350 * threshold)


def masked_nuclear(weight: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the nuclear norm of the masked matrix, and its subgradient (arXiv 2409.06633).

    Args:
        weight: (rows, columns) P, the current weights.
        mask: (rows, columns), 1 or True where a scalar trains.

    Returns:
        || P o M ||_*, a scalar in fp32 at least, 0 for a matrix of zeros; (U V^T) o M (rows, columns) in the
        same type, of the singular values that are not zero (above max(rows, columns) eps of the largest).
    """
    masked = weight.detach().to(torch.promote_types(weight.dtype, torch.float32)) * mask
    left, values, right = torch.linalg.svd(masked, full_matrices=False)
    kept = values > max(masked.shape) * torch.finfo(masked.dtype).eps * values.max()
    return values[kept].sum(), (left[:, kept] @ right[kept]) * mask


def _size(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().to(torch.promote_types(weight.dtype, torch.float32)).abs()
