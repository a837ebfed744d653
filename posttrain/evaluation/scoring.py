r"""How well a reward model tells the better answer from the worse, on held-out pairs.

With m = r(y_w) - r(y_l), the reward of the chosen minus that of the rejected answer:

=====================  ================================================================================
accuracy               1 where m > 0, 1/2 where m = 0
margin                 m
log_loss               -log sigma(m), what training minimises
brier                  (1 - sigma(m))^2
calibration_error      expected calibration error: pairs in ten bins of the confidence max(p, 1 - p), p =
                       sigma(m); mean over pairs of |accuracy - mean confidence| of their bin
=====================  ================================================================================

Log-loss and Brier score fall when the probabilities become truer, in order and in size; the calibration error
looks at size alone. A model that is right about 70 % of the pairs and says 0.7 each time has none.
"""

from __future__ import annotations

import dataclasses
import math
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from posttrain.config.schema import EvaluateConfig
from posttrain.data.pairs import encode_scored
from posttrain.evaluation.estimators import bootstrap_of, calibration_error
from posttrain.evaluation.evaluate import gather, rank_and_world
from posttrain.evaluation.generate import generation_mode
from posttrain.evaluation.results import Evaluation, Problem, summarise

if TYPE_CHECKING:
    from datasets import Dataset


def evaluate_scorer(model: Any, tokenizer: Any, dataset: Dataset, config: EvaluateConfig) -> Evaluation:
    """Evaluate a reward model.

    Args:
        model: Gives one label for a text, wrapped or not; its state is the same afterwards.
        tokenizer: Its tokenizer.
        dataset: Rendered held-out rows with ``prompt``, ``chosen`` and ``rejected``.
        config: The ``evaluate`` section: batch size and intervals.

    Returns:
        The same :class:`~posttrain.evaluation.results.Evaluation` on every rank; there are no samples.

    Raises:
        ValueError: The data set is empty.
        FloatingPointError: A score is not finite.
        RuntimeError: Another rank failed; the message has its error.
    """
    if len(dataset) == 0:
        raise ValueError("evaluation needs at least one pair, found an empty data set")
    rows: list[dict[str, Any]] = [dict(row) for row in dataset]
    rank, ranks = rank_and_world()
    begun = time.perf_counter()
    failure: Exception | None = None
    share: list[tuple[Problem, list[Any]]] = []
    try:
        mine = list(range(rank, len(rows), ranks))
        padded = mine + [0] * (math.ceil(len(rows) / ranks) - len(mine))
        texts = [
            encode_scored(tokenizer, rows[index]["prompt"], rows[index][side])
            for index in padded
            for side in ("chosen", "rejected")
        ]
        scores = text_scores(model, texts, pad=tokenizer.pad_token_id, batch_size=config.batch_size)
        for place, index in enumerate(mine):
            values = margin_values(scores[2 * place], scores[2 * place + 1])
            share.append((Problem(index, rows[index]["prompt"], None, [], values), []))
    except Exception as error:  # reported to all ranks below, then raised
        if ranks == 1:
            raise
        failure = error
    seconds = time.perf_counter() - begun
    if ranks > 1:
        share, seconds = gather(share, seconds, failure, rank, ranks)
    share.sort(key=lambda item: item[0].index)
    problems = [problem for problem, _ in share]
    settings = scorer_settings(config)
    found = summarise(problems, distinct={}, settings=settings, seconds=seconds, tokens=0)
    margins = np.asarray([problem.values["margin"] for problem in problems])
    how = {name: settings[name] for name in ("confidence", "resamples", "seed")}
    calibration = bootstrap_of(calibration_error, margins, **how)
    return dataclasses.replace(found, metrics=found.metrics | {"calibration_error": calibration})


def scorer_settings(config: EvaluateConfig) -> dict[str, Any]:
    """Return everything that defines the numbers of :func:`evaluate_scorer`."""
    return {"k": []} | {name: getattr(config, name) for name in ("confidence", "resamples", "seed")}


def margin_values(chosen: float, rejected: float) -> dict[str, float]:
    """Return the numbers of one pair from its two scores.

    Raises:
        FloatingPointError: A score is not finite.
    """
    margin = chosen - rejected
    if not math.isfinite(margin):
        raise FloatingPointError(f"the reward model gives {chosen} and {rejected} for a pair")
    loss = max(-margin, 0.0) + math.log1p(math.exp(-abs(margin)))
    return {
        "accuracy": 0.5 if margin == 0 else float(margin > 0),
        "margin": margin,
        "log_loss": loss,
        "brier": (-math.expm1(-loss)) ** 2,
    }


@torch.no_grad()
def text_scores(model: Any, texts: list[list[int]], *, pad: int, batch_size: int) -> list[float]:
    """Return one number per text of token ids, in order, in fp32; batches of texts of similar length."""
    device = next(model.parameters()).device
    order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
    found = [math.nan] * len(texts)
    with generation_mode(model):
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            width = max(len(texts[index]) for index in rows)
            ids = torch.tensor([texts[i] + [pad] * (width - len(texts[i])) for i in rows], device=device)
            mask = torch.tensor([[j < len(texts[i]) for j in range(width)] for i in rows], device=device)
            output = model(input_ids=ids, attention_mask=mask.long(), use_cache=False)
            for index, value in zip(rows, output.logits[:, 0].float().tolist(), strict=True):
                found[index] = value
    return found
