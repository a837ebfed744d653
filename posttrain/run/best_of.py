"""``posttrain best-of``: of N samples the one that a reward model likes best, and what that is worth.

N completions of every held-out prompt are sampled once. For each n up to N and each reward model the table
says what the pick among n is worth in the gold reward, the first of ``rewards:``, which does not pick:

============  ==========================================================================================
gold          expected gold reward of the pick, over all subsets of n of the N samples
win_rate      chance that the pick has a higher gold reward than a random sample, a tie counting half
kl            log n - (n - 1) / n: divergence of the picks from the model, in nats
============  ==========================================================================================

Where gold stops rising with n while the reward model's own score goes on, the reward model is exploited.
Several reward models pick among the same samples, so their differences are paired; ``ensemble`` picks by the
mean of their rewards. ``oracle`` picks by gold itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from posttrain.config.schema import EvaluateConfig, RunConfig
from posttrain.data.length import apply_length_policy
from posttrain.data.load import load_data
from posttrain.data.prompts import render
from posttrain.evaluation.estimators import bootstrap, paired_difference
from posttrain.evaluation.evaluate import evaluate
from posttrain.evaluation.preference import unjudged
from posttrain.evaluation.results import Problem
from posttrain.merging.formulas import best_of_n, best_of_n_kl, pick_win_rate
from posttrain.models.load import load_for_evaluation
from posttrain.rewards.model import ModelReward
from posttrain.rewards.pool import VerifierStartError
from posttrain.rewards.reward import build_rewards
from posttrain.run.directory import RunError, append_json_lines
from posttrain.run.evaluating import check_context, completion_limit
from posttrain.run.ranks import Ranks
from posttrain.run.verbs import base_of, model_of


def best_of(
    path: str,
    rewards: Sequence[str],
    config: RunConfig,
    *,
    sizes: Sequence[int],
    out: Path | None = None,
) -> dict[str, Any]:
    """Sample, pick, and measure the picks.

    Args:
        path: The model that samples: folder, run or Hub id.
        rewards: Reward models, the first of which picks what is written to ``out``.
        config: Gives data, ``evaluate`` (temperature, limits, batch, seed) and ``rewards``, whose first is
            the gold reward; without rewards nothing is measured but the models' own scores.
        sizes: n; the largest is N.
        out: JSON lines with ``prompt``, ``completion``, ``score`` of the best of N, for supervised training.

    Returns:
        ``prompts``, ``samples``, ``kl`` (per n) and per reward model ``gold``, ``win_rate`` and ``own``
        (estimates over prompts, per n); ``differences`` of gold to the first reward model.

    Raises:
        RunError: The request does not fit.
    """
    largest = max(sizes, default=0)
    if not sizes or min(sizes) < 1:
        raise RunError(f"n is at least 1, found {list(sizes)}")
    if not rewards:
        raise RunError("best-of needs a reward model to pick with: --reward RUN")
    if len(set(rewards)) < len(rewards):
        raise RunError(f"a reward model is named twice: {', '.join(rewards)}")
    if out is not None and out.exists():
        raise RunError(f"{out} exists: name another file with --to")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    ranks = Ranks()
    judges = [ModelReward(reward) for reward in rewards]
    problems = _sampled(path, config, largest, ranks)
    scores = {
        reward: [_scores(judge, problem) for problem in problems]
        for reward, judge in zip(rewards, judges, strict=True)
    }
    if out is not None:
        first = scores[rewards[0]]
        ranks.on_main(lambda: append_json_lines(out, _picked(problems, first)))
    return _measured(problems, scores, sizes)


def _sampled(path: str, config: RunConfig, samples: int, ranks: Ranks) -> list[Problem]:
    data = load_data(config.data, config.task)
    assert data.eval is not None
    folder = model_of(path)
    model, tokenizer = load_for_evaluation(
        folder, config.model.dtype, base=base_of(folder), trust_remote_code=config.model.trust_remote_code
    )
    rows = render(data.eval, tokenizer, config.data)
    rows, lengths = apply_length_policy(
        rows, tokenizer, config.data.max_prompt_tokens, config.data.over_length
    )
    check_context(config, model, lengths.longest)
    try:
        gold = build_rewards(config.rewards[:1], data)
    except (ValueError, VerifierStartError) as error:
        raise RunError(str(error)) from error
    settings = (config.evaluate or EvaluateConfig(k=[1])).model_copy(update={"k": [1], "samples": samples})
    if settings.temperature == 0:
        raise RunError("greedy samples are all the same: set evaluate.temperature above 0")
    try:
        result = evaluate(
            model.to(ranks.state.device),
            tokenizer,
            rows,
            gold[0].verify if gold else unjudged,
            settings,
            max_new_tokens=completion_limit(config),
        )
    finally:
        for reward in gold:
            reward.close()
    return list(result.problems)


def _scores(judge: ModelReward, problem: Problem) -> list[float]:
    """Return one score per sample; NaN for a text that the reward model does not take."""
    texts = [sample.text for sample in problem.samples]
    found = judge.scores([problem.prompt] * len(texts), texts)
    return [float("nan") if value is None else value for value in found]


def _picked(problems: Sequence[Problem], scores: Sequence[list[float]]) -> list[dict[str, Any]]:
    rows = []
    for problem, own in zip(problems, scores, strict=True):
        if np.isfinite(own).any():
            best = int(np.nanargmax(own))
            completion: Any = problem.samples[best].text
            if not isinstance(problem.prompt, str):
                completion = [{"role": "assistant", "content": completion}]
            rows.append({"prompt": problem.prompt, "completion": completion, "score": own[best]})
    return rows


def _measured(
    problems: Sequence[Problem], scores: dict[str, list[list[float]]], sizes: Sequence[int]
) -> dict[str, Any]:
    gold = [[np.nan if s.score is None else s.score for s in problem.samples] for problem in problems]
    judged = any(np.isfinite(values).any() for values in gold)
    pickers = dict(scores)
    if len(scores) > 1:
        pickers["ensemble"] = [np.mean(rows, axis=0).tolist() for rows in zip(*scores.values(), strict=True)]
    if judged:
        pickers["oracle"] = gold
    # every picker chooses among the samples that all of them and gold have a number for
    valid = [
        np.isfinite(np.sum([*(rows[i] for rows in pickers.values()), *([gold[i]] if judged else [])], axis=0))
        for i in range(len(problems))
    ]
    result: dict[str, Any] = {
        "prompts": len(problems),
        "samples": max(sizes),
        "left_out_samples": int(sum((~mask).sum() for mask in valid)),
        "kl": {str(n): best_of_n_kl(n) for n in sizes},
        "rewards": {},
        "differences": {},
    }
    values: dict[str, dict[str, list[float]]] = {}
    for name, rows in pickers.items():
        result["rewards"][name], values[name] = {}, {}
        for metric in ("gold", "win_rate", "own"):
            if metric != "own" and not judged:
                continue
            result["rewards"][name][metric] = {}
            for n in sizes:
                found = [
                    _value(metric, np.asarray(rows[i])[valid[i]], np.asarray(gold[i])[valid[i]], n)
                    for i in range(len(problems))
                ]
                result["rewards"][name][metric][str(n)] = bootstrap(found).to_dict()
                if metric == "gold":
                    values[name][str(n)] = found
    first = next(iter(scores))
    if judged:
        result["differences"] = {
            name: {n: paired_difference(values[first][n], column[n]).to_dict() for n in column}
            for name, column in values.items()
            if name != first
        }
    return result


def _value(metric: str, own: Any, gold: Any, n: int) -> float:
    if len(own) < n:
        return float("nan")
    if metric == "own":
        return best_of_n(own, own, n)
    return best_of_n(own, gold, n) if metric == "gold" else pick_win_rate(own, gold, n)


def print_best_of(result: dict[str, Any], console: Console) -> None:
    """Print one block per number, one row per picker and one column per n."""
    sizes = list(result["kl"])
    console.print(f"{result['prompts']} prompts, {result['samples']} samples each [95 % bootstrap intervals]")
    for metric, title in (
        ("gold", "gold reward of the pick"),
        ("win_rate", "win rate against a random sample"),
        ("own", "the picker's own reward"),
    ):
        rows = {name: found[metric] for name, found in result["rewards"].items() if metric in found}
        if not rows:
            continue
        table = Table(box=None, pad_edge=False, title=title, title_justify="left")
        table.add_column("")
        for n in sizes:
            table.add_column(f"n={n}", justify="right")
        if metric == "gold":
            table.add_row("KL, nats", *(f"{result['kl'][n]:.3f}" for n in sizes))
        for name, found in rows.items():
            table.add_row(name, *(_cell(found[n]) for n in sizes))
        console.print(table)


def _cell(estimate: dict[str, Any]) -> str:
    if estimate["value"] is None:
        return "-"
    if estimate["low"] is None:
        return f"{estimate['value']:.3f}"
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"
