r"""What a preference run did to its model, measured on held-out pairs and on continuations of their prompts.

With pi the model, ref the model the run started from, y_w the chosen and y_l the rejected answer, sums over
the tokens of an answer, in nats:

======================  ======================================================================================
chosen_shift            log pi(y_w) - log ref(y_w): below 0 the chosen answer became less likely
rejected_shift          log pi(y_l) - log ref(y_l)
accuracy                1 where chosen_shift > rejected_shift, 1/2 where equal: that of the implicit reward
margin                  beta (chosen_shift - rejected_shift)
kl, kl_per_token        KL(pi || ref) spent: mean of log pi(y) - log ref(y) over sampled y, per continuation
                        and per token
kl_k3, kl_k3_per_token  the same quantity with the estimator r - 1 - log r of each token, r = ref / pi (k3):
                        never negative
score                   mean score of the first reward, where the run names one
win_rate                share of pairs, one continuation by pi and one by ref, in which that of pi scores
                        higher, a tie counting half
prompt_distinct-n       different n-grams of the continuations of one prompt, divided by all
self_bleu               BLEU of each continuation against the others of its prompt (1: all are the same four
                        tokens or more)
======================  ======================================================================================

The divergences are estimates only where y is drawn from pi itself, so they are left out at a temperature
other than 1 and below top_p 1; a continuation counts as far as it was sampled. Intervals are over prompts, as
everywhere.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch

from posttrain.config.schema import EvaluateConfig
from posttrain.data.pairs import encode_pair
from posttrain.evaluation.estimators import distinct_n, self_bleu
from posttrain.evaluation.evaluate import Verify, evaluate_share, gather, rank_and_world
from posttrain.evaluation.generate import Completion, encode_prompt
from posttrain.evaluation.likelihood import sequence_logps
from posttrain.evaluation.results import Evaluation, Problem, summarise
from posttrain.rewards.verdict import Verdict

if TYPE_CHECKING:
    from datasets import Dataset

Reference = Callable[[], AbstractContextManager[Any]]
"""Gives the model the run started from, for the time of the block."""

_ORDERS = (1, 2, 3)


def evaluate_preferences(
    model: Any,
    tokenizer: Any,
    dataset: Dataset,
    config: EvaluateConfig,
    *,
    reference: Reference | None,
    beta: float,
    max_length: int | None,
    max_new_tokens: int,
    verify: Verify | None = None,
    start: Evaluation | None = None,
    progress: bool = True,
) -> Evaluation:
    """Evaluate a model against the one its run started from.

    Args:
        model: A causal language model, wrapped or not; its state is the same afterwards.
        tokenizer: Its tokenizer.
        dataset: Rendered held-out rows with ``prompt``, ``chosen`` and ``rejected``.
        config: The ``evaluate`` section; ``samples`` continuations of every prompt.
        reference: The start of the run; None when the model is the start itself.
        beta: Of the implicit reward, only scales ``margin``.
        max_length: Longest pair in tokens, as in training; the end of an answer is cut off.
        max_new_tokens: Longest continuation when ``config`` names none.
        verify: Scores continuations against their rows; None leaves out score and win rate.
        start: The evaluation of the start on the same rows, whose continuations the win rate is against; they
            are sampled when None.
        progress: Show bars on stderr (rank 0, and only on a terminal).

    Returns:
        The same :class:`~posttrain.evaluation.results.Evaluation` on every rank.

    Raises:
        ValueError: The data set is empty, a prompt does not fit the model, or the rows of ``start`` are
            others.
        RuntimeError: Another rank failed; the message has its error.
    """
    if len(dataset) == 0:
        raise ValueError("evaluation needs at least one pair, found an empty data set")
    limit = config.max_new_tokens or max_new_tokens
    settings = preference_settings(config, max_new_tokens, beta=beta, max_length=max_length)
    rows: list[dict[str, Any]] = [dict(row) for row in dataset]
    if start is not None and [problem.prompt for problem in start.problems] != [
        row["prompt"] for row in rows
    ]:
        raise ValueError("the evaluation of the start was made on other prompts: evaluate it again")
    rank, ranks = rank_and_world()
    begun = time.perf_counter()
    failure: Exception | None = None
    share: list[tuple[Problem, list[Completion]]] = []
    try:
        judge, shown = verify or unjudged, progress and rank == 0
        share = evaluate_share(model, tokenizer, rows, judge, config, limit, rank, ranks, shown)
        values = [_diversity(group) for _, group in share]
        if reference is None:
            for known in values:
                known |= dict.fromkeys(("chosen_shift", "rejected_shift", "margin"), 0.0) | {"accuracy": 0.5}
                known |= dict.fromkeys(_KL, 0.0) if _on_policy(config) else {}
                known |= {"win_rate": 0.5} if verify is not None else {}
        else:
            wanted = math.ceil(len(rows) / ranks)
            texts = _texts(tokenizer, rows, share, wanted, config.samples, max_length)
            pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
            size = max(1, config.batch_size // 4)
            ours = sequence_logps(model, texts, pad=pad, batch_size=size)
            with reference() as begin:
                theirs = sequence_logps(begin, texts, pad=pad, batch_size=size)
                against: Sequence[Problem] | None = None if start is None else start.problems
                if verify is not None and against is None:
                    sampled = evaluate_share(begin, tokenizer, rows, judge, config, limit, rank, ranks, shown)
                    against = [problem for problem, _ in sampled]
            by_index = {problem.index: problem for problem in against or ()}
            shifts = [one.double() - two.double() for one, two in zip(ours, theirs, strict=True)]
            for place, ((problem, _), known) in enumerate(zip(share, values, strict=True)):
                of_row = shifts[place * (2 + config.samples) : (place + 1) * (2 + config.samples)]
                known |= pair_values(of_row[0], of_row[1], beta)
                known |= divergence_values(of_row[2:]) if _on_policy(config) else {}
                if verify is not None:
                    known["win_rate"] = win_rate(_scores(problem), _scores(by_index[problem.index]))
        share = [
            (dataclasses.replace(problem, values=known), group)
            for (problem, group), known in zip(share, values, strict=True)
        ]
    except Exception as error:  # reported to all ranks below, then raised
        if ranks == 1:
            raise
        failure = error
    seconds = time.perf_counter() - begun
    if ranks > 1:
        share, seconds = gather(share, seconds, failure, rank, ranks)
    share.sort(key=lambda item: item[0].index)
    completions = [completion.token_ids for _, group in share for completion in group]
    return summarise(
        [problem for problem, _ in share],
        distinct={f"distinct-{n}": distinct_n(completions, n) for n in (1, 2, 3, 4)},
        settings=settings,
        seconds=seconds,
        tokens=sum(map(len, completions)),
    )


def preference_settings(
    config: EvaluateConfig, max_new_tokens: int, *, beta: float, max_length: int | None
) -> dict[str, Any]:
    """Return everything that defines the numbers of :func:`evaluate_preferences`."""
    settings = config.model_dump(exclude={"before", "every"})
    limit = config.max_new_tokens or max_new_tokens
    return settings | {"k": [], "max_new_tokens": limit, "beta": beta, "max_length": max_length}


_KL = ("kl", "kl_per_token", "kl_k3", "kl_k3_per_token")


def pair_values(chosen: torch.Tensor, rejected: torch.Tensor, beta: float) -> dict[str, float]:
    """Return shifts, margin and accuracy of one pair from log pi - log ref of the tokens of both answers."""
    better, worse = chosen.sum().item(), rejected.sum().item()
    return {
        "chosen_shift": better,
        "rejected_shift": worse,
        "accuracy": 0.5 if better == worse else float(better > worse),
        "margin": beta * (better - worse),
    }


def divergence_values(shifts: Sequence[torch.Tensor]) -> dict[str, float]:
    """Return the estimates of KL(pi || ref) from log pi - log ref of the tokens of continuations by pi."""
    tokens = sum(part.numel() for part in shifts)
    first = sum(part.sum().item() for part in shifts)
    third = sum((torch.expm1(-part) + part).sum().item() for part in shifts)
    totals = {"kl": first, "kl_k3": third}
    return {
        name: value
        for key, total in totals.items()
        for name, value in ((key, total / len(shifts)), (f"{key}_per_token", total / tokens))
    }


def win_rate(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the share of all pairs in which ours is higher, a tie counting half; NaN without a pair."""
    pairs = [(one > two) + 0.5 * (one == two) for one in ours for two in theirs]
    return sum(pairs) / len(pairs) if pairs else math.nan


def _scores(problem: Problem) -> list[float]:
    return [sample.score for sample in problem.valid if sample.score is not None]


def _on_policy(config: EvaluateConfig) -> bool:
    return config.temperature == 1 and config.top_p == 1


def _diversity(group: Sequence[Completion]) -> dict[str, float]:
    ids = [completion.token_ids for completion in group]
    if len(ids) < 2:
        return {}
    found = {f"prompt_distinct-{n}": distinct_n(ids, n) for n in _ORDERS} | {"self_bleu": self_bleu(ids)}
    return {name: math.nan if value is None else value for name, value in found.items()}


def _texts(
    tokenizer: Any,
    rows: Sequence[dict[str, Any]],
    share: Sequence[tuple[Problem, list[Completion]]],
    wanted: int,
    samples: int,
    max_length: int | None,
) -> list[tuple[list[int], int]]:
    """Return of each problem the chosen and rejected answer and its continuations, ids and their beginning.

    As many for every rank: problem 0 stands in where a rank has one problem less.
    """
    texts: list[tuple[list[int], int]] = []
    for problem, group in share:
        row = rows[problem.index]
        chosen, rejected, begin = encode_pair(tokenizer, row, max_length)
        begin = max(begin, 1)
        prompt = encode_prompt(tokenizer, row["prompt"])
        texts += [(chosen, begin), (rejected, begin)]
        texts += [(prompt + completion.token_ids, len(prompt)) for completion in group]
    filler = encode_pair(tokenizer, rows[0], max_length)
    missing = wanted * (2 + samples) - len(texts)
    return texts + [(filler[0], max(filler[2], 1))] * missing


def unjudged(completions: list[str], rows: list[dict[str, Any]]) -> list[Verdict]:
    """Judge nothing, where no reward is named."""
    del rows
    return [Verdict("skipped", message="no reward is named")] * len(completions)
