r"""What happens to likelihoods in preference optimisation: gauges of every run (arXiv 2406.07327).

A preference loss only sees a difference of two log-ratios. These numbers say how it was made: rho(y) is the
sum over an answer's tokens of log pi - log ref in nats (with ``ld_alpha``, the sum it weighs), y_w the chosen
and y_l the rejected answer, T their tokens; z is what the active loss puts into its sigmoid, methods and
f-divergence included. Means are over pairs, exact over ranks, and of several micro-batches the mean, as TRL's
own numbers; in an evaluation every name begins with ``eval_``, but for the probe's.

==============================  ====================================================================
``logps_per_token/chosen``      mean log pi over all chosen tokens, and ``/rejected``; nats per token
``shift/chosen``                mean rho(y_w), and ``shift/rejected``; below 0 the answers became less
                                likely than under the reference
``shift/chosen_declined``       share of pairs with rho(y_w) < 0
``shift/both_declined``         share of pairs with rho < 0 on both sides
``drop/rate``                   change of ``shift/rejected`` per optimiser step since the log before
``drop/ratio``                  abs(shift/rejected) / max(abs(shift/chosen), 1e-8)
``grad_scale``                  mean beta sigma(-z), the pull on log pi(y_w); the loss's slope at z
``saturated``                   share of pairs with sigma(-z) < 0.01
``suppression``                 1 when ``shift/chosen`` < 0 and the margin grew over the last two logs
``length/margin``               mean T_w - T_l
``overlap/prefix``              mean of (tokens that both answers begin with) / T_w: what ties the two
``probe/logps_shift``           mean rho of answers in no pair, with ``probe_dataset``
``probe/kl_forward``            mean KL(ref || pi) at their tokens, nats per token
``probe/entropy``               mean entropy of pi there, nats per token
==============================  ====================================================================

*Drastic drop* is a ``shift/rejected`` that runs away (``drop/ratio`` far above 1), *degradation* a
``grad_scale`` that dies with a ``shift/chosen`` below 0, *dispersion* a ``probe/logps_shift`` that rises or a
``probe/kl_forward`` that grows on answers nobody has compared. A falling chosen likelihood is no fault by
itself: it can come with rising wins. :mod:`posttrain.run.rules` has the limits at which a run speaks up;
with a trainer built in Python, ``callbacks=[Alarms()]`` warns in the log.

Left out where they mean nothing: ``grad_scale`` and ``saturated`` for losses without one margin (``ipo``,
``nca_pair``, ``bco_pair``, ``sppo_hard``, ``apo_zero``, ``apo_down``, ``sft``) and under a method that
replaces the loss; of a mixture the first loss with a margin counts. ``hinge`` has the slope 1 below its
margin and 0 above.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from posttrain._lazy import torch
from posttrain.preference.method import Batch

if TYPE_CHECKING:
    from posttrain.rl.gauges import Gauges

SATURATED = 0.01


def divergence_scores(ratios: torch.Tensor, kind: str, coefficient: float = 1.0) -> torch.Tensor:
    """Return what a loss compares instead of log-ratios u under an f-divergence (arXiv 2309.16240): f'(e^u).

    Args:
        ratios: Log-ratios, nats.
        kind: ``reverse_kl``, ``forward_kl``, ``js_divergence`` or ``alpha_divergence``.
        coefficient: alpha of the last; 1 is the reverse KL.
    """
    if kind == "forward_kl":
        return 1 - (-ratios).exp()
    if kind == "js_divergence":
        return math.log(2) + torch.nn.functional.logsigmoid(ratios)
    if kind == "alpha_divergence" and abs(coefficient - 1) >= 1e-6:
        # TRL's bound keeps the exponential finite
        return ((coefficient - 1) * ratios).clamp(max=80.0).expm1() / (coefficient - 1)
    return ratios


@dataclass(frozen=True)
class Comparison:
    """What a loss needs besides scores to form its margin.

    Attributes:
        loss_types: TRL's, in order.
        beta: TRL's.
        divergence: TRL's ``f_divergence_type``.
        coefficient: TRL's ``f_alpha_divergence_coef``.
    """

    loss_types: tuple[str, ...] = ("sigmoid",)
    beta: float = 0.1
    divergence: str = "reverse_kl"
    coefficient: float = 1.0


ONE_MARGIN = ("sigmoid", "sigmoid_norm", "hinge", "exo_pair", "robust", "discopop", "aot", "aot_unpaired")
"""TRL's losses that put one number a pair into a sigmoid, or a hinge."""


def margins(
    scores: torch.Tensor, sums: torch.Tensor, lengths: torch.Tensor, how: Comparison
) -> tuple[str, torch.Tensor] | None:
    """Return the first loss that has one margin and its z, or None when none of the losses has one.

    Args:
        scores: (2B,) S without beta, chosen rows first.
        sums: (2B,) log-probabilities of the answers under the policy.
        lengths: (2B,) completion tokens as TRL counts them, see :attr:`Batch.lengths`.
        how: The active loss.

    Returns:
        Name and (B,) z; those of ``aot`` and ``aot_unpaired`` are sorted, and belong to no pair.
    """
    name = next((name for name in how.loss_types if name in ONE_MARGIN), None)
    if name is None:
        return None
    # TRL refuses divergences beside the losses they do not go with
    values = divergence_scores(scores, how.divergence, how.coefficient)
    if name == "sigmoid_norm":
        values = values / lengths.clamp(min=1)
    chosen, rejected = values.chunk(2)
    if name == "aot":
        policy, reference = (
            (part[0] - part[1]).sort().values for part in (sums.view(2, -1), (sums - scores).view(2, -1))
        )
        return name, how.beta * (policy - reference)
    if name == "aot_unpaired":
        chosen, rejected = chosen.sort().values, rejected.sort().values
    return name, how.beta * (chosen - rejected)


def pull(loss_type: str, z: torch.Tensor) -> torch.Tensor:
    """Return how hard a loss pulls at each pair, in [0, 1]: sigma(-z), for ``hinge`` 1 where z < 1."""
    return (z < 1).to(z.dtype) if loss_type == "hinge" else torch.sigmoid(-z)


def common_prefix(tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return how many tokens the two answers of each pair begin with in common.

    Args:
        tokens: (2B, T) ids, chosen rows first.
        mask: (2B, T) bool, the completion: one stretch a row, which may begin anywhere.

    Returns:
        (B,) int64.
    """
    width = tokens.size(1)
    place = torch.arange(width, device=tokens.device) + mask.int().argmax(dim=1, keepdim=True)
    inside = (place < width) & mask.gather(1, place.clamp(max=width - 1))
    shifted = tokens.gather(1, place.clamp(max=width - 1)).masked_fill(~inside, -1)
    (chosen, rejected), (valid, _) = shifted.chunk(2), inside.chunk(2)
    return ((chosen == rejected) & valid).cumprod(dim=1).sum(dim=1)


def log_pairs(
    gauges: Gauges, batch: Batch, tokens: torch.Tensor, margin: tuple[str, torch.Tensor] | None
) -> None:
    """Log the numbers of one micro-batch of pairs.

    Args:
        gauges: Where to.
        batch: Pairs, chosen rows first.
        tokens: (R, T) ids of the places that ``batch.mask`` speaks of.
        margin: What :func:`margins` gave.
    """
    mask, logps = batch.mask, batch.logps.detach()
    shift_chosen, shift_rejected = (batch.sums.detach() - batch.ref_sums.detach()).chunk(2)
    lengths = mask.sum(dim=1)
    chosen_length, rejected_length = lengths.chunk(2)

    gauges.enter("logps_per_token")
    half = len(lengths) // 2
    gauges.mean("chosen", logps[:half], mask[:half])
    gauges.mean("rejected", logps[half:], mask[half:])

    gauges.enter("shift")
    gauges.mean("chosen", shift_chosen)
    gauges.mean("rejected", shift_rejected)
    gauges.mean("chosen_declined", (shift_chosen < 0).float())
    gauges.mean("both_declined", ((shift_chosen < 0) & (shift_rejected < 0)).float())

    gauges.enter("length")
    gauges.mean("margin", (chosen_length - rejected_length).float())
    gauges.enter("overlap")
    gauges.mean("prefix", common_prefix(tokens, mask) / chosen_length.clamp(min=1))

    if margin is not None:
        strength = pull(*margin).detach()
        gauges.enter("")
        gauges.mean("grad_scale", batch.beta * strength)
        gauges.mean("saturated", (strength < SATURATED).float())


def trends(
    now: Mapping[str, float], earlier: Iterable[Mapping[str, float]], step: int, prefix: str = ""
) -> dict[str, float]:
    """Return the numbers that compare a log with those before it.

    Args:
        now: What is about to be logged.
        earlier: Logs of the same kind, latest first, with their ``step``.
        step: Optimiser steps done.
        prefix: What every name begins with.

    Returns:
        ``drop/ratio`` always, ``drop/rate`` from the second log on, ``suppression`` from the third on;
        nothing when ``now`` has no shifts.
    """
    chosen, rejected, margin = (
        now.get(prefix + name) for name in ("shift/chosen", "shift/rejected", "rewards/margins")
    )
    if chosen is None or rejected is None or margin is None:
        return {}
    found = {"drop/ratio": abs(rejected) / max(abs(chosen), 1e-8)}
    before = []
    for row in earlier:
        if prefix + "shift/rejected" in row and row["step"] < step:
            before.append(row)
            if len(before) == 2:
                break
    if before:
        last = before[0]
        found["drop/rate"] = (rejected - last[prefix + "shift/rejected"]) / (step - last["step"])
    if len(before) == 2:
        first, second = before[1][prefix + "rewards/margins"], before[0][prefix + "rewards/margins"]
        found["suppression"] = float(chosen < 0 and first < second < margin)
    return {prefix + name: value for name, value in found.items()}


def same_kind(history: Sequence[Mapping[str, float]], logs: Mapping[str, float]) -> list[Mapping[str, float]]:
    """Return logs of the same part of the data as ``logs``, latest first.

    With several evaluation sets TRL gives their numbers the same names; that of the loss tells them apart.
    """
    loss = next((name for name in logs if name == "loss" or name.endswith("_loss")), None)
    return [row for row in reversed(history) if loss in row]
