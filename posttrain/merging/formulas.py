r"""The numbers of weight-averaged reward models (WARM, arXiv 2401.12187) and of best-of-N. No model.

.. code-block:: text

    accuracy             Acc(r) = mean over pairs of [r(x, y+) > r(x, y-)], a tie counts half
    connectivity         Acc(r_{(1-l) phi_1 + l phi_2}) >= (1-l) Acc(r_phi_1) + l Acc(r_phi_2)
    ensemble             r_ENS = sum_i w_i r_phi_i
    best of n            E[gold(argmax of the proxy over n of N samples)]
                             = sum_j C(j - 1, n - 1) / C(N, n) gold_(j),  gold_(j) by ascending proxy
    KL of best-of-n      log n - (n - 1) / n, nats
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def pair_accuracy(chosen: Sequence[float], rejected: Sequence[float]) -> float:
    """Return the share of pairs whose chosen answer has the higher reward; a tie counts half.

    Raises:
        ValueError: There are no pairs, or a reward is not finite.
    """
    better, worse = np.asarray(chosen, dtype=np.float64), np.asarray(rejected, dtype=np.float64)
    if better.shape != worse.shape or better.size == 0:
        raise ValueError(f"an accuracy needs pairs, found {better.size} chosen and {worse.size} rejected")
    if not (np.isfinite(better).all() and np.isfinite(worse).all()):
        raise ValueError("a reward is not finite")
    return float(np.mean((better > worse) + 0.5 * (better == worse)))


def connectivity_gap(accuracy: float, first: float, second: float, share: float) -> float:
    """Return how far an interpolation lies below the line between its ends; 0 or less is connected.

    Args:
        accuracy: Of the model (1 - share) phi_1 + share phi_2.
        first: Of phi_1.
        second: Of phi_2.
        share: lambda in [0, 1].
    """
    return (1 - share) * first + share * second - accuracy


def best_of_n_kl(n: int) -> float:
    """Return the KL divergence of best-of-n from its sampler in nats, log n - (n - 1) / n.

    It is exact where no two samples have the same reward, and an upper bound otherwise.

    Raises:
        ValueError: ``n`` is below 1.
    """
    if n < 1:
        raise ValueError(f"best-of-n needs n >= 1, found {n}")
    return math.log(n) - (n - 1) / n


def pick_chances(proxy: Sequence[float], n: int) -> npt.NDArray[np.float64]:
    """Return the chance of every sample to be the one that the proxy likes best among n drawn from N.

    Exact over all subsets, so every n up to N comes from the same samples without noise of its own. Samples
    that the proxy cannot tell apart share their places.

    Args:
        proxy: (N,) rewards that choose.
        n: How many are drawn, without replacement.

    Returns:
        (N,) chances, which sum to 1.

    Raises:
        ValueError: ``n`` is not in [1, N].
    """
    scores = np.asarray(proxy, dtype=np.float64)
    size = len(scores)
    if not 1 <= n <= size:
        raise ValueError(f"best of {n} needs at least as many samples, found {size}")
    # the chance that the sample at place j (0-based, ascending) is the best of n
    places = np.array([math.comb(j, n - 1) / math.comb(size, n) for j in range(size)])
    order = np.argsort(scores, kind="stable")
    chances = np.empty(size)
    start = 0
    for stop in range(1, size + 1):
        if stop == size or scores[order[stop]] != scores[order[start]]:
            chances[order[start:stop]] = places[start:stop].mean()
            start = stop
    return chances


def best_of_n(proxy: Sequence[float], gold: Sequence[float], n: int) -> float:
    """Return the expected gold reward of the sample that the proxy picks; see :func:`pick_chances`."""
    return float(pick_chances(proxy, n) @ np.asarray(gold, dtype=np.float64))


def pick_win_rate(proxy: Sequence[float], gold: Sequence[float], n: int) -> float:
    """Return the chance that the sample the proxy picks beats a random one in gold; a tie counts half."""
    truth = np.asarray(gold, dtype=np.float64)
    wins = (truth[:, None] > truth[None, :]) + 0.5 * (truth[:, None] == truth[None, :])
    return float(pick_chances(proxy, n) @ wins.mean(axis=1))
