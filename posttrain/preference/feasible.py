r"""Feasible learning: every pair's loss at most a tolerance, by one multiplier per pair (arXiv 2501.14912).

Idea
    The mean of the losses lets hard pairs stay bad and pushes easy ones to zero. Here each pair is asked for
    a loss of at most a tolerance, no more: its weight rises while its loss is above and falls to zero below.
    The resilient form lets a pair stay above at a quadratic price, which bounds the weight of pairs that
    cannot be learned, such as mislabelled ones. The weights rank the pairs: look at the hardest ones.

Formula
    g_i is the loss of pair i (``loss_type`` sigmoid, hinge or ipo; for sigmoid -log sigmoid(beta Delta_i),
    and g_i <= eps means that the preferred answer has a probability of at least exp(-eps))::

        loss      mean over the pairs of the micro-batch of lambda_i g_i, lambda_i constant
        lambda_i <- max(0, lambda_i + dual_lr (g_i - eps - lambda_i / alpha)), once per visit

    alpha = null (infinity) has no slack, and needs ``max``. The fixed point is lambda_i = alpha max(0, g_i -
    eps), so ``mode: clamped`` minimises (alpha / 2) max(0, g_i - eps)^2 instead and needs no multipliers (the
    official baseline is that with alpha = 2). With the published dual_lr = alpha = 1 the recursion has no
    memory: lambda_i is the excess loss of the visit before, and the run is the clamped one with a delay of
    one epoch. With dual_lr = 0 and init = 1 it is DPO, bit for bit. ``mode: erm`` is DPO with the numbers
    below.

    A step uses the multiplier from before its own update (``order: primal_first``); ``dual_first`` updates
    first. All pairs of an optimiser step are updated at its end, of all micro-batches and ranks; a pair that
    occurs twice in it is updated once, with the mean of its losses. A loss that is not finite updates
    nothing, and so does a pair of which a side has no token.

Defaults and where they come from
    tolerance 0.3, dual_lr 1, alpha 1, init 1, primal first: the launch scripts of the official code for DPO
    (beta 0.1, where 0.3 means a log-ratio margin of 10.5). The reference has a sigmoid loss of 0.693, so
    sensible tolerances lie between 0.1 and 0.69; hinge starts at 1, ipo at 1 / (4 beta^2). For vision the
    paper starts from 0, dual first, with a dual rate of 1e-4 to 1e-3.

Needs
    Data that have a length. Twelve bytes per pair and a gather of numbers once per optimiser step.
    Checkpoints hold the table, and a resume compares the rows. Every pair keeps its id when others are left
    out; bring ids of your own in a column ``posttrain_id``.

Composes with
    LoRA, precomputed references, methods that change the score S (g is the loss of S), DDP, accumulation,
    selections. Refused: several loss types at once, losses that couple pairs or are none of the margin, WPO
    weights, f-divergences.

When not to use it
    For few epochs: before the second visit all weights are ``init``. With memory (dual_lr well below alpha)
    it takes more.

What to watch
    ``feasible/loss`` is the mean loss without weights (the logged ``loss`` is the weighted one), ``feasible/
    feasible`` the part of pairs within the tolerance, ``feasible/cvar_0.8`` the mean of the worst fifth of
    the latest losses of all pairs, ``feasible/multiplier_mean``, ``_max`` and ``_zero`` (part that is zero)
    are over all pairs, ``feasible/weight`` the mean weight of the batch. A batch of zeros has no gradient,
    and AdamW goes on by its momentum. ``feasible.json`` in the output folder lists the pairs, hardest first.

Evidence at laptop size
    A fifth of 320 pairs of stories was swapped, full fine-tuning of a small model for 3 epochs (``python
    scripts/evidence/flip_ranking.py --data ../shared/data/tinystories_pairs/train.jsonl --rows 320 --seeds 1
    --arms memory erm``; one seed, a demonstration). With memory (dual_lr 0.5, alpha 4) the multipliers put a
    swapped pair above one that is not in 84 % of all comparisons, and of the 64 hardest pairs 53 % were
    swapped; by the latest losses of plain DPO it was 66 % and 38 %. By then the swapped pairs had been
    learned as well (the worst fifth of the losses was at 0.05 in both): it is the memory of earlier visits
    that finds them, not the weights of the last.

    It finds what the model can tell. On ultrafeedback_1k with its file of flips (the first 320 rows, of which
    121 are short enough, ``--max-length 160``) the same model of stories found nothing: 38 %, and 50 % by the
    losses of DPO; its 17 swapped pairs are too few to say more.

Official code
    juan43ramirez/feasible-learning. Its launch scripts ask for a ``clamped-erm`` that its trainer does not
    know, which then is plain ERM; its multipliers live in one process and are not in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

from posttrain._lazy import torch
from posttrain.feasible import FeasibleRows
from posttrain.preference.method import Batch, Method, as_list
from posttrain.rl.method import Conflict, Setup

LOSSES = ("sigmoid", "hinge", "ipo")


def pair_losses(scores: torch.Tensor, lengths: torch.Tensor, *, loss_type: str, beta: float) -> torch.Tensor:
    """Return the loss of each pair, (B,), as TRL forms it.

    Args:
        scores: (2B,) S, chosen first, without beta.
        lengths: (2B,) completion tokens; for ipo.
        loss_type: One of :data:`LOSSES`.
        beta: Temperature.
    """
    chosen, rejected = scores.chunk(2)
    if loss_type == "ipo":
        first, second = lengths.clamp(min=1).chunk(2)
        return (chosen / first - rejected / second - 1 / (2 * beta)) ** 2
    if loss_type == "hinge":
        return torch.relu(1 - beta * (chosen - rejected))
    return -torch.nn.functional.logsigmoid(beta * (chosen - rejected))


class Feasible(FeasibleRows, Method):
    """A multiplier per pair. See the module page."""

    name = "feasible"
    title = "Feasible learning: a multiplier per pair"
    paper = "2501.14912"
    replaces_loss: ClassVar[bool] = True

    def conflicts(self, setup: Setup) -> Iterator[Conflict]:
        """Refuse losses without a level per pair."""
        yield from super().conflicts(setup)
        trainer = setup.trainer
        losses = as_list(trainer.get("loss_type") or "sigmoid")
        if len(losses) > 1 or losses[0] not in LOSSES:
            yield Conflict(
                f"feasible needs one loss per pair, found {', '.join(losses)}: set loss_type to one of "
                f"{', '.join(LOSSES)}",
                field="loss_type",
            )
        if trainer.get("loss_weights") not in (None, [1.0]):
            yield Conflict("feasible weighs pairs itself: drop loss_weights", field="loss_weights")
        if trainer.get("use_weighting"):
            yield Conflict("feasible weighs pairs itself: set use_weighting to false", field="use_weighting")
        if trainer.get("f_divergence_type") not in (None, "reverse_kl"):
            yield Conflict(
                "feasible is defined for the reverse KL: drop f_divergence_type", field="f_divergence_type"
            )
        yield from self.doubts()

    def loss(self, batch: Batch, scores: torch.Tensor) -> torch.Tensor:
        """Return mean_i lambda_i g_i; in an evaluation mean_i g_i."""
        lengths = batch.mask.sum(dim=1) if batch.lengths is None else batch.lengths
        losses = pair_losses(scores, lengths, loss_type=batch.loss_types[0], beta=batch.beta)
        left, right = batch.mask.any(dim=1).chunk(2)
        return self.row_objective(
            losses, batch.ids if batch.training else None, left & right, batch.gauges
        ).mean()
