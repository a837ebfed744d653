"""What an evaluation found: records per problem, metrics with intervals, and the difference of two.

Every interval is over problems (:mod:`posttrain.evaluation.estimators`). All classes turn into plain JSON
and back without loss, so a report or a later comparison needs no model.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import numpy as np

from posttrain.evaluation.estimators import (
    Estimate,
    bootstrap,
    distinct_answers,
    maj_at_k,
    paired_difference,
    pass_at_k,
)
from posttrain.rewards.verdict import STATUSES

UNJUDGED = frozenset({"error", "timeout", "skipped"})
"""Statuses that say nothing about the completion: the verifier failed, or does not apply to the row."""


@dataclass(frozen=True)
class Sample:
    """One completion with its verdict.

    Attributes:
        text: Decoded completion.
        status: The verdict.
        score: What the verifier gave, or None.
        answer: The answer it read, or None.
        length: Tokens, end token included.
        finished: False when the completion was cut at the limit.
        message: Why there is no judgement (error, timeout, skipped), else None.
    """

    text: str
    status: str
    score: float | None
    answer: str | None
    length: int
    finished: bool
    message: str | None = None


@dataclass(frozen=True)
class Problem:
    """One problem with all its samples.

    Attributes:
        index: Row of the data set.
        prompt: Text or list of messages.
        gold: The row's ``answer`` column as JSON, or None without one.
        samples: In the order they were drawn.
        values: Further metrics of this problem, by name; NaN where one cannot be counted.
    """

    index: int
    prompt: Any
    gold: Any
    samples: list[Sample]
    values: dict[str, float] = field(default_factory=dict)

    @property
    def valid(self) -> list[Sample]:
        """Samples whose verifier judged the completion; errors, timeouts and skipped rows are left out."""
        return [sample for sample in self.samples if sample.status not in UNJUDGED]

    @property
    def n(self) -> int:
        """Number of valid samples."""
        return len(self.valid)

    @property
    def c(self) -> int:
        """Number of correct samples."""
        return sum(sample.status == "correct" for sample in self.samples)

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python values for JSON, with the counts n and c spelled out."""
        known = {name: None if math.isnan(value) else value for name, value in self.values.items()}
        record = {**asdict(self), "n": self.n, "c": self.c, "values": known}
        return record if known else {key: value for key, value in record.items() if key != "values"}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Problem:
        """Rebuild from :meth:`to_dict`."""
        samples = [Sample(**sample) for sample in data["samples"]]
        known = data.get("values", {}).items()
        values = {name: math.nan if value is None else value for name, value in known}
        return cls(data["index"], data["prompt"], data["gold"], samples, values)


@dataclass(frozen=True)
class Evaluation:
    """The result of :func:`posttrain.evaluation.evaluate`.

    Attributes:
        metrics: ``pass@k`` and ``maj@k`` for each k, ``score`` (mean score of the verifier), ``coverage``
            (share of problems solved at least once), ``distinct_answers`` (per problem), ``length`` (mean
            tokens), ``clipped`` (share cut at the limit). ``maj@k`` is absent when the verifier reads no
            answers, ``score`` when it gives none.
        distinct: ``distinct-1`` to ``distinct-4`` over all completions; None when too short.
        median_length: Median tokens over all completions.
        verdicts: How many samples ended in each status, zeros included.
        problems: One record per problem, in the order of the data set.
        settings: k, samples, temperature and everything else that defines the numbers.
        seconds: Wall time of sampling and verifying; on several ranks, of the slowest.
        tokens: Tokens generated, greedy copies counted once.
    """

    metrics: dict[str, Estimate]
    distinct: dict[str, float | None]
    median_length: float
    verdicts: dict[str, int]
    problems: list[Problem]
    settings: dict[str, Any]
    seconds: float
    tokens: int
    solved: list[int] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second of wall time, verification included."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python values for JSON."""
        return {
            "metrics": {name: estimate.to_dict() for name, estimate in self.metrics.items()},
            "distinct": self.distinct,
            "median_length": self.median_length,
            "verdicts": self.verdicts,
            "solved": self.solved,
            "settings": self.settings,
            "seconds": self.seconds,
            "tokens": self.tokens,
            "tokens_per_second": self.tokens_per_second,
            "problems": [problem.to_dict() for problem in self.problems],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Evaluation:
        """Rebuild from :meth:`to_dict`."""
        return cls(
            metrics={name: Estimate(**estimate) for name, estimate in data["metrics"].items()},
            distinct=data["distinct"],
            median_length=data["median_length"],
            verdicts=data["verdicts"],
            problems=[Problem.from_dict(problem) for problem in data["problems"]],
            settings=data["settings"],
            seconds=data["seconds"],
            tokens=data["tokens"],
            solved=data["solved"],
        )

    def to_json(self) -> str:
        """Return strict JSON (no NaN)."""
        return json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Evaluation:
        """Rebuild from :meth:`to_json`."""
        return cls.from_dict(json.loads(text))


@dataclass(frozen=True)
class Difference:
    """After minus before, paired on problems.

    Attributes:
        metrics: Mean difference of each metric that both evaluations have, with its interval.
        newly_solved: Rows of problems solved at least once after, never before.
        lost: Rows of problems solved at least once before, never after.
    """

    metrics: dict[str, Estimate]
    newly_solved: list[int]
    lost: list[int]

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python values for JSON."""
        metrics = {name: estimate.to_dict() for name, estimate in self.metrics.items()}
        return {"metrics": metrics, "newly_solved": self.newly_solved, "lost": self.lost}


def metric_values(problems: Sequence[Problem], ks: Sequence[int]) -> dict[str, list[float]]:
    """Return the value of every metric for every problem; NaN where a problem cannot be counted.

    Errors, timeouts and skipped rows are not samples: a problem with fewer than k valid samples has no
    pass@k and no maj@k, one without any has no coverage. Metrics that no problem has at all are absent,
    except pass@k and coverage, whose absence would hide that the verifier never worked; without any k there
    is neither. The problems' own values come first.
    """
    nan = float("nan")
    names = dict.fromkeys(name for problem in problems for name in problem.values)
    values = {name: [problem.values.get(name, nan) for problem in problems] for name in names}
    answered = any(sample.answer is not None for problem in problems for sample in problem.samples)
    for k in ks:
        values[f"pass@{k}"] = [pass_at_k(p.n, p.c, k) if p.n >= k else nan for p in problems]
    for k in ks if answered else ():
        values[f"maj@{k}"] = [_majority(problem, k) for problem in problems]
    scores = [[sample.score for sample in p.valid if sample.score is not None] for p in problems]
    if any(scores):
        values["score"] = [float(np.mean(known)) if known else nan for known in scores]
    if ks:
        values["coverage"] = [float(p.c > 0) if p.n else nan for p in problems]
    if answered:
        values["distinct_answers"] = [
            float(distinct_answers(sample.answer for sample in p.valid)) if p.n else nan for p in problems
        ]
    if not any(problem.samples for problem in problems):
        return values
    values["length"] = [float(np.mean([sample.length for sample in p.samples])) for p in problems]
    values["clipped"] = [float(np.mean([not sample.finished for sample in p.samples])) for p in problems]
    return values


def summarise(
    problems: list[Problem],
    *,
    distinct: dict[str, float | None],
    settings: dict[str, Any],
    seconds: float,
    tokens: int,
) -> Evaluation:
    """Turn records into an :class:`Evaluation`; ``settings`` gives k, confidence, resamples and seed."""
    values = metric_values(problems, settings["k"])
    lengths = [sample.length for problem in problems for sample in problem.samples]
    verdicts = Counter(sample.status for problem in problems for sample in problem.samples)
    return Evaluation(
        metrics={name: bootstrap(column, **_interval(settings)) for name, column in values.items()},
        distinct=distinct,
        median_length=float(median(lengths)) if lengths else 0.0,
        verdicts={status: verdicts[status] for status in STATUSES},
        problems=problems,
        settings=settings,
        seconds=seconds,
        tokens=tokens,
        solved=[problem.index for problem in problems if problem.c],
    )


def compare(before: Evaluation, after: Evaluation) -> Difference:
    """Return after - before on the same problems, with the interval settings of ``after``.

    Raises:
        ValueError: The two were not made on the same problems in the same order, or share no k.
    """
    keys = [[(p.index, p.prompt, p.gold) for p in side.problems] for side in (before, after)]
    if keys[0] != keys[1]:
        shared = sum(first == second for first, second in zip(*keys, strict=False))
        raise ValueError(
            f"a comparison needs the same problems on both sides: found {len(keys[0])} before, "
            f"{len(keys[1])} after, {shared} equal in place. Evaluate both models on the same "
            "data set and seed"
        )
    ks = [k for k in after.settings["k"] if k in before.settings["k"]]
    if not ks and (before.settings["k"] or after.settings["k"]):
        raise ValueError(
            f"the evaluations share no k: before has {before.settings['k']}, after has {after.settings['k']}"
        )
    first, second = metric_values(before.problems, ks), metric_values(after.problems, ks)
    metrics = {
        name: paired_difference(first[name], second[name], **_interval(after.settings))
        for name in second
        if name in first
    }
    solved = [set(side.solved) for side in (before, after)]
    return Difference(metrics, sorted(solved[1] - solved[0]), sorted(solved[0] - solved[1]))


def _majority(problem: Problem, k: int) -> float:
    valid = problem.valid
    if len(valid) < k:
        return float("nan")
    answers = [sample.answer for sample in valid]
    return maj_at_k(answers, [sample.status == "correct" for sample in valid], k)


def _interval(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: settings[name] for name in ("confidence", "resamples", "seed")}
