r"""Estimators of what a policy can do, from n samples per problem. Pure numpy, no model.

pass@k (Chen et al., arXiv 2107.03374)
    Chance that at least one of k samples is correct, estimated without bias from n >= k samples of which c
    are correct::

        pass@k = 1 - C(n-c, k) / C(n, k)

maj@k (self-consistency, arXiv 2203.11171)
    Chance that the most frequent answer of k samples is correct. The k samples are drawn from the n without
    replacement, one after the other; a tie goes to the answer that was drawn first. Over all orders of
    drawing, each of t tied answers is first equally often, so it gets 1/t: the result does not depend on
    the order of the n samples. Samples without an answer (None) are drawn but never win.

Intervals
    Percentile bootstrap over *problems* (Efron 1979): samples of one problem share its difficulty, so
    resampling them as if they were independent would give intervals that are far too narrow. When every
    problem has the same value the interval has no width; that says nothing about unseen problems.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

EXACT_UP_TO = 1000
"""Most samples per problem for which maj@k is computed exactly (binomials still fit a double)."""


@dataclass(frozen=True)
class Estimate:
    """A mean over problems with its bootstrap interval.

    Attributes:
        value: The mean, or None when no problem could be counted.
        low: Lower end of the interval, or None with fewer than two problems.
        high: Upper end of the interval, or None with fewer than two problems.
        problems: How many problems were counted.
        left_out: How many could not be (too few valid samples, or no score).
    """

    value: float | None
    low: float | None
    high: float | None
    problems: int
    left_out: int = 0

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies wholly on one side of zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python values for JSON."""
        return asdict(self)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return the unbiased estimate of pass@k (arXiv 2107.03374).

    Args:
        n: Valid samples of the problem.
        c: Correct ones among them.
        k: Budget of samples.

    Returns:
        A probability in [0, 1]. Computed in logarithms: exact to rounding for n up to 1e5 and beyond.

    Raises:
        ValueError: k is below 1 or above n, or c is not between 0 and n.
    """
    _check_budget(n, k)
    if not 0 <= c <= n:
        raise ValueError(f"pass@k needs 0 <= correct <= samples, found correct={c}, samples={n}")
    if c == 0:
        return 0.0
    if n - c < k:
        return 1.0
    # C(n-c,k)/C(n,k) is symmetric in c and k: the shorter product has the smaller rounding error
    short, long = min(c, k), max(c, k)
    log_miss = np.log1p(-long / np.arange(n - short + 1, n + 1, dtype=np.float64)).sum()
    return float(-np.expm1(log_miss))


def maj_at_k(
    answers: Sequence[Hashable | None],
    correct: Sequence[bool],
    k: int,
    *,
    draws: int = 4096,
    seed: int = 0,
) -> float:
    """Return the chance that the most frequent answer of k samples is correct; see the module page.

    Args:
        answers: (n,) the parsed answer of each sample; None when there is none.
        correct: (n,) whether the sample is correct. Of equal answers the first one decides.
        k: Number of votes, 1 <= k <= n.
        draws: Random subsets used when n > ``EXACT_UP_TO``; the standard error is then at most
            0.5/sqrt(draws). Up to there the result is exact and ``draws`` is unused.
        seed: Seed of those subsets.

    Returns:
        A probability in [0, 1].

    Raises:
        ValueError: The lengths differ, or k is below 1 or above n.
    """
    n = len(answers)
    if len(correct) != n:
        raise ValueError(f"maj@k needs one verdict per answer, found {n} answers and {len(correct)} verdicts")
    _check_budget(n, k)
    right: dict[Hashable, bool] = {}
    for answer, is_right in zip(answers, correct, strict=True):
        if answer is not None:
            right.setdefault(answer, bool(is_right))
    counts = Counter(answer for answer in answers if answer is not None)
    if not any(right.values()):
        return 0.0
    if n <= EXACT_UP_TO:
        return _maj_exact(counts, right, n, k)
    return _maj_sampled(answers, right, k, draws, seed)


def _maj_exact(counts: Counter[Hashable], right: dict[Hashable, bool], n: int, k: int) -> float:
    """Count the k-subsets each right answer wins, with generating functions in the number of votes."""
    silent = n - counts.total()
    favourable = 0.0
    for winner, is_right in right.items():
        if not is_right:
            continue
        rivals = [count for answer, count in counts.items() if answer != winner]
        for votes in range(1, min(k, counts[winner]) + 1):
            rest = k - votes
            ties = rest // votes
            # ways[t, x]: ways to draw x other samples such that t rivals tie and none is ahead
            ways = np.zeros((ties + 1, rest + 1))
            ways[0, : min(silent, rest) + 1] = [math.comb(silent, j) for j in range(min(silent, rest) + 1)]
            for count in rivals:
                grown = np.zeros_like(ways)
                for j in range(min(votes - 1, count, rest) + 1):
                    grown[:, j:] += math.comb(count, j) * ways[:, : rest + 1 - j]
                if votes <= min(count, rest):
                    grown[1:, votes:] += math.comb(count, votes) * ways[:-1, : rest + 1 - votes]
                ways = grown
            shares = ways[:, rest] / np.arange(1, ties + 2)
            favourable += float(math.comb(counts[winner], votes) * shares.sum())
    return min(favourable / math.comb(n, k), 1.0)


def _maj_sampled(
    answers: Sequence[Hashable | None], right: dict[Hashable, bool], k: int, draws: int, seed: int
) -> float:
    generator = np.random.default_rng(seed)
    wins = 0
    for _ in range(draws):
        drawn = generator.permutation(len(answers))[:k]
        # most_common keeps insertion order among equals: the answer drawn first wins a tie
        votes = Counter(answers[index] for index in drawn if answers[index] is not None)
        if votes:
            wins += right[votes.most_common(1)[0][0]]
    return wins / draws


def distinct_answers(answers: Iterable[Hashable | None]) -> int:
    """Return how many different answers there are; None is not an answer."""
    return len({answer for answer in answers if answer is not None})


def distinct_n(completions: Iterable[Sequence[int]], n: int) -> float | None:
    """Return distinct-n over a corpus (arXiv 1510.03055): different n-grams divided by all n-grams.

    n-grams do not cross completions. The value falls as the corpus grows, so compare only evaluations of
    the same problems with the same number of samples.

    Args:
        completions: Token ids of each completion, without padding.
        n: Length of the n-grams, at least 1.

    Returns:
        A share in (0, 1], or None when no completion has n tokens.
    """
    if n < 1:
        raise ValueError(f"distinct-n needs n >= 1, found {n}")
    seen: set[tuple[int, ...]] = set()
    total = 0
    for tokens in completions:
        for start in range(len(tokens) - n + 1):
            seen.add(tuple(tokens[start : start + n]))
            total += 1
    return len(seen) / total if total else None


def self_bleu(completions: Sequence[Sequence[int]], order: int = 4) -> float | None:
    """Return self-BLEU (arXiv 1802.01886): mean BLEU of each completion with the others as references.

    BLEU is the geometric mean of the clipped n-gram precisions up to ``order`` times the brevity penalty
    against the reference of the closest length (the shorter of two); a precision without a match counts 0.1
    matches, of at least one n-gram, so that short texts have a value.

    Args:
        completions: Token ids of each completion, without padding.
        order: Longest n-gram.

    Returns:
        A number in [0, 1], 1 when all are the same and have ``order`` tokens, or None with fewer than two
        completions.
    """
    if len(completions) < 2:
        return None
    grams = [[_grams(tokens, n) for n in range(1, order + 1)] for tokens in completions]
    total = 0.0
    for index, tokens in enumerate(completions):
        if len(tokens) == 0:
            continue
        logs = 0.0
        for n in range(order):
            own = grams[index][n]
            most: Counter[tuple[int, ...]] = Counter()
            for other, of_other in enumerate(grams):
                if other != index:
                    most |= of_other[n]
            matches = sum(min(count, most[gram]) for gram, count in own.items())
            logs += math.log((matches or 0.1) / max(sum(own.values()), 1))
        lengths = [len(other) for place, other in enumerate(completions) if place != index]
        closest = min(lengths, key=lambda length: (abs(length - len(tokens)), length))
        penalty = min(0.0, 1 - closest / len(tokens))
        total += math.exp(logs / order + penalty)
    return total / len(completions)


def _grams(tokens: Sequence[int], n: int) -> Counter[tuple[int, ...]]:
    return Counter(tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1))


def calibration_error(margins: npt.NDArray[np.float64], bins: int = 10) -> float:
    """Return the expected calibration error of pairwise preferences (Guo et al., arXiv 1706.04599, eq. 3).

    A pair with margin m is predicted with confidence max(p, 1 - p), p = sigma(m); it is right when m > 0.
    Bins of equal width cover [1/2, 1]. A margin of 0 is half right.

    Args:
        margins: (pairs,) reward of the better answer minus that of the worse.
        bins: Number of bins.
    """
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    right = np.where(margins == 0, 0.5, margins > 0)
    place = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    gaps = np.bincount(place, right - confidence, minlength=bins)
    return float(np.abs(gaps).sum() / margins.size)


def bootstrap_of(
    statistic: Callable[[npt.NDArray[np.float64]], float],
    values: npt.NDArray[np.float64],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Return a statistic that is no mean over problems, with its percentile bootstrap interval.

    Args:
        statistic: Of (problems,) values.
        values: (problems,), all finite.
        confidence: Level of the interval.
        resamples: Number of bootstrap resamples.
        seed: Seed of the resampling.
    """
    value = statistic(values)
    if values.size == 1:
        return Estimate(value, None, None, 1, 0)
    generator = np.random.default_rng(seed)
    size = values.size
    drawn = [statistic(values[generator.integers(0, size, size)]) for _ in range(resamples)]
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Estimate(value, float(low), float(high), size, 0)


def bootstrap(
    values: npt.ArrayLike, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Estimate:
    """Return the mean over problems with its percentile bootstrap interval.

    Args:
        values: (problems,) one value per problem; NaN marks a problem that is left out (and counted).
        confidence: Level of the interval, in (0, 1).
        resamples: Number of bootstrap resamples.
        seed: Seed of the resampling; the same seed gives the same interval.

    Raises:
        ValueError: ``values`` is not one-dimensional, or ``confidence`` is not in (0, 1).
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"bootstrap needs one value per problem, found an array of shape {array.shape}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), found {confidence}")
    known = array[~np.isnan(array)]
    left_out = array.size - known.size
    if known.size == 0:
        return Estimate(None, None, None, 0, left_out)
    mean = float(known.mean())
    if known.size == 1:
        return Estimate(mean, None, None, 1, left_out)
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    chunk = max(1, 4_000_000 // known.size)  # bounds the index matrix to about 32 MB
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        picks = generator.integers(0, known.size, size=(rows, known.size))
        means[start : start + rows] = known[picks].mean(axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Estimate(mean, float(low), float(high), int(known.size), left_out)


def paired_difference(
    before: npt.ArrayLike,
    after: npt.ArrayLike,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate:
    """Return the mean of after - before over the same problems, with a paired bootstrap interval.

    Pairing removes the difficulty of the problems from the noise: whole problems are resampled, with both
    of their values. A problem that is NaN on either side is left out and counted.

    Args:
        before: (problems,) values before.
        after: (problems,) values after, in the same order.
        confidence: Level of the interval.
        resamples: Number of bootstrap resamples.
        seed: Seed of the resampling.

    Raises:
        ValueError: The two do not have the same length.
    """
    first, second = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if first.shape != second.shape:
        raise ValueError(
            "a paired difference needs the same problems on both sides, "
            f"found {first.shape} and {second.shape}"
        )
    return bootstrap(second - first, confidence=confidence, resamples=resamples, seed=seed)


def _check_budget(n: int, k: int) -> None:
    if k < 1:
        raise ValueError(f"k must be at least 1, found {k}")
    if k > n:
        raise ValueError(f"k={k} needs at least {k} samples, found {n}: sample more or lower k")
