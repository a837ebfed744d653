r"""Means over seeds, with Student's t intervals. Pure Python, no model.

A training run is one draw: its weights, data order and samples hang on a seed. What can be said about a
method is a mean over n seeds. Its interval is::

    mean +- t(n - 1, (1 + confidence) / 2) * s / sqrt(n)

with s the standard deviation over seeds (n - 1 in the denominator). A percentile bootstrap, which is what
intervals over *problems* use here (:mod:`posttrain.evaluation.estimators`), is far too narrow for the handful
of seeds one can afford: of five values it cannot even see the spread without bias. The t interval is exact
for normal values, and close for means of many problems or logs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any


@dataclass(frozen=True)
class SeedEstimate:
    """A mean over seeds.

    Attributes:
        value: The mean, or None when no seed has a value.
        low: Lower end of the interval, or None with fewer than two seeds.
        high: Upper end of the interval, or None with fewer than two seeds.
        seeds: How many seeds were counted.
        left_out: How many have no value.
    """

    value: float | None
    low: float | None
    high: float | None
    seeds: int
    left_out: int = 0

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies wholly on one side of zero; never when it has no width (to rounding).

        Seeds that agree to the last digit come from a coarse metric, and say nothing about other seeds.
        """
        if self.low is None or self.high is None or math.isclose(self.low, self.high, rel_tol=1e-9):
            return False
        return self.low > 0 or self.high < 0

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python values for JSON."""
        return asdict(self)


def over_seeds(values: Sequence[float | None], *, confidence: float = 0.95) -> SeedEstimate:
    """Return the mean over seeds with its t interval.

    Args:
        values: One value per seed; None or a number that is not finite is left out and counted.
        confidence: Level of the interval, in (0, 1).

    Raises:
        ValueError: ``confidence`` is not in (0, 1).
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), found {confidence}")
    known = [value for value in values if value is not None and math.isfinite(value)]
    left_out = len(values) - len(known)
    if not known:
        return SeedEstimate(None, None, None, 0, left_out)
    mean = fmean(known)
    if len(known) == 1:
        return SeedEstimate(mean, None, None, 1, left_out)
    half = t_quantile((1 + confidence) / 2, len(known) - 1) * stdev(known) / math.sqrt(len(known))
    return SeedEstimate(mean, mean - half, mean + half, len(known), left_out)


def paired_over_seeds(
    first: Sequence[float | None], second: Sequence[float | None], *, confidence: float = 0.95
) -> SeedEstimate:
    """Return the mean of second - first over the seeds that both have, with its t interval.

    Pairing removes what the two arms share at a seed: data order, warm start, the luck of the first samples.

    Args:
        first: One value per seed; None where there is none.
        second: The same for the other arm, seeds in the same order.
        confidence: Level of the interval.

    Raises:
        ValueError: The two do not have the same number of seeds.
    """
    if len(first) != len(second):
        raise ValueError(
            f"a paired difference needs the same seeds on both sides, found {len(first)} and {len(second)}"
        )
    pairs = zip(first, second, strict=True)
    differences = [None if a is None or b is None else b - a for a, b in pairs]
    return over_seeds(differences, confidence=confidence)


def t_quantile(probability: float, freedom: int) -> float:
    """Return the quantile of Student's t distribution.

    The distribution function has a closed form for whole degrees of freedom (Abramowitz and Stegun 26.7.3 and
    26.7.4), which is inverted by bisection.

    Args:
        probability: In [0.5, 1).
        freedom: Degrees of freedom, at least 1.

    Raises:
        ValueError: An argument is out of its range.
    """
    if not 0.5 <= probability < 1 or freedom < 1:
        raise ValueError(
            "t_quantile needs a probability in [0.5, 1) and at least 1 degree of freedom, found "
            f"{probability} and {freedom}"
        )
    inside = 2 * probability - 1  # P(|T| < t)
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        if _central_mass(middle, freedom) < inside:
            low = middle
        else:
            high = middle
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def _central_mass(angle: float, freedom: int) -> float:
    """Return P(|T| < sqrt(freedom) * tan(angle))."""
    odd = freedom % 2
    cosine = math.cos(angle)
    term = cosine if odd else 1.0
    total = 0.0
    # the powers of the cosine go up to freedom - 2 in steps of two
    for power in range(odd, freedom - 1, 2):
        total += term
        term *= cosine * cosine * (power + 1) / (power + 2)
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total
