"""Relearning test: how fast a model that has forgotten learns it again.

A loss that rose says little: a model can hide what a few steps bring back. So train copies of two models, one
that has forgotten and one that never knew (trained without the data), on the forgotten data and compare how
many steps each needs. Equal counts are the best that can be had.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from posttrain._lazy import torch
from posttrain.selection.gradient_sums import mean_token_nll

if TYPE_CHECKING:
    from torch import nn

    Batches = Sequence[Mapping[str, torch.Tensor]]


def relearn(
    model: nn.Module,
    train: Batches,
    held_out: Batches,
    *,
    learning_rate: float,
    steps: int,
    every: int = 1,
) -> list[tuple[int, float]]:
    """Return (step, mean NLL of the held-out batches), from step 0 on, of a copy trained on ``train``.

    Args:
        model: Stays as it is. All of its weights train, with AdamW without decay; those of 16 bits in fp32,
            in which small updates do not round away.
        train: Batches of (B, T) ``input_ids``, ``labels`` and optionally ``attention_mask``, one per step,
            again from the first when they run out.
        held_out: What is measured, of the same kind.
        learning_rate: Constant.
        steps: Optimiser steps.
        every: Steps between two measurements.

    Raises:
        ValueError: There are no batches, or none with a label.
    """
    if not train or not held_out:
        raise ValueError("relearning needs batches to train on and batches to measure, found none")
    if not any(bool((batch["labels"][:, 1:] != -100).any()) for batch in train):
        raise ValueError("no batch to train on has a label")
    student = copy.deepcopy(model).requires_grad_(True)
    if any(p.dtype in (torch.bfloat16, torch.float16) for p in student.parameters()):
        student.float()
    student.train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=learning_rate, weight_decay=0.0)
    curve = [(0, _mean_nll(student, held_out))]
    for step, batch in enumerate(itertools.islice(itertools.cycle(train), steps), start=1):
        loss = mean_token_nll(student, batch)
        if loss is not None:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if step % every == 0 or step == steps:
            curve.append((step, _mean_nll(student, held_out)))
    return curve


def steps_to(curve: Sequence[tuple[int, float]], nll: float) -> int | None:
    """Return the first measured step at which the NLL is at most ``nll``, None if it never is."""
    return next((step for step, value in curve if value <= nll), None)


def _mean_nll(model: nn.Module, batches: Batches) -> float:
    training = model.training
    model.eval()
    with torch.no_grad():
        found = [
            loss.item() for loss in (mean_token_nll(model, batch) for batch in batches) if loss is not None
        ]
    model.train(training)
    if not found:
        raise ValueError("no batch to measure has a label")
    return sum(found) / len(found)
