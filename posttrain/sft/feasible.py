r"""Feasible learning for supervised fine-tuning: every row's loss at most a tolerance (arXiv 2501.14912).

Idea
    Each row is asked for a mean token NLL of at most a tolerance, no more: its weight, a multiplier, rises
    while its loss is above and falls to zero below. What the preference method ``feasible`` does for pairs;
    its page has the recursion and the order of updates, which are the same.

Formula
    g_i is the mean token NLL of row i (nats per token, over the tokens that TRL trains on)::

        loss      mean over the rows of the optimiser step of lambda_i g_i, lambda_i constant
        lambda_i <- max(0, lambda_i + dual_lr (g_i - eps - lambda_i / alpha)), once per visit

    ``mode: clamped`` minimises (alpha / 2) max(0, g_i - eps)^2 instead, ``mode: erm`` the mean of g_i. TRL's
    own loss is a mean over tokens; this one is over rows, so short rows count as much as long ones, also with
    dual_lr = 0.

Defaults and where they come from
    Those of the preference method but for the tolerance, which has no published value here: 1.0 nat per token
    is ours. Take what the rows that you consider learned have, e.g. the median of a plain run.

Needs
    Data that have a length; twelve bytes per row. Checkpoints have the table, and a resume compares the rows.

Composes with
    LoRA and full fine-tuning, accumulation, DDP, DeepSpeed, FSDP2, bf16, selections. Refused: packing and
    padding-free batches (rows have to stay rows), label smoothing, ``loss_type`` other than nll.

When not to use it
    For one epoch: before the second visit all weights are ``init``.

What to watch
    As on the page of the preference method, under ``feasible/``; ``feasible.json`` lists the rows,
    hardest first.

Evidence at laptop size
    One run per mode of ``configs/sft/feasible_stories.yaml`` (``methods.feasible.mode=MODE``), 570 rows,
    4 epochs, at the last log: with multipliers 95 % of the rows were within 1.4 nats (mean loss 1.20, worst
    fifth 1.38, held-out 1.55); ``erm`` 91 % (1.18, 1.42, 1.56); ``clamped`` 78 % (1.34, 1.42, 1.56), whose
    pull fades at the boundary. A demonstration, one seed.

Official code
    juan43ramirez/feasible-learning has no supervised language model; this is the vision form on token NLL.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from pydantic import Field

from posttrain._lazy import torch
from posttrain.columns import ID
from posttrain.feasible import FeasibleRows
from posttrain.rl.method import Conflict, Setup
from posttrain.sft.method import Method, MicroStep
from posttrain.sft.unlearn import row_nll


class FeasibleSFT(FeasibleRows, Method):
    """A multiplier per row. See the module page."""

    name = "feasible"
    title = "Feasible learning: a multiplier per row"
    paper = "2501.14912"
    replaces_loss: ClassVar[bool] = True
    any_launch: ClassVar[bool] = True

    tolerance: float = Field(
        1.0, ge=0, description="eps: the loss that every row should stay below, in nats per token."
    )

    def conflicts(self, setup: Setup) -> Iterator[Conflict]:
        """Refuse what joins rows, or is a loss of its own."""
        for name in ("packing", "padding_free"):
            if setup.trainer.get(name):
                yield Conflict(
                    f"{self.name} treats rows apart, and {name} joins them: set {name} to false", field=name
                )
        if setup.trainer.get("label_smoothing_factor"):
            yield Conflict(
                f"{self.name} replaces the loss, so label smoothing has no effect: drop "
                "label_smoothing_factor",
                field="label_smoothing_factor",
            )
        if setup.trainer.get("loss_type") not in (None, "nll"):
            yield Conflict(f"{self.name} replaces the loss: set loss_type to nll", field="loss_type")
        yield from self.doubts()

    def counts(self, inputs: Mapping[str, Any], columns: Mapping[str, torch.Tensor]) -> Sequence[float]:
        """Return the rows with labels."""
        del columns
        return (float((inputs["labels"][:, 1:] != -100).any(dim=1).sum()),)

    def loss(self, step: MicroStep, outputs: Any) -> torch.Tensor:
        """Return this micro-batch's part of the mean of lambda_i g_i over the rows of the optimiser step."""
        nll = row_nll(outputs.log_probs, outputs.label_mask)
        valid = outputs.label_mask.any(dim=1)
        objective = self.row_objective(nll, step.columns[ID], valid, step.gauges)
        rows = step.totals[self.name].to(nll.device).clamp(min=1)
        return torch.where(valid, objective, torch.zeros_like(objective)).sum() / rows[0]
