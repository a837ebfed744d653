"""Bounded word-list score: wanted words minus unwanted ones. Deterministic, cheap, and easy to overdo.

A reward for style on text without a right answer, and the smallest honest example of reward hacking: without
the bound a policy learns to repeat one word.
"""

from __future__ import annotations

import re
from typing import Any

from posttrain.rewards.verdict import Verdict, graded

_WORD = re.compile(r"[a-z']+")


def columns(**_: Any) -> tuple[str, ...]:
    """Return the data columns that :func:`verify` reads: none."""
    return ()


def prepare(*, bound: float = 3.0, **_: Any) -> None:
    """Check the bound once, when the verifier starts.

    Raises:
        ValueError: The bound is not positive.
    """
    if not bound > 0:
        raise ValueError(f"verifier 'word_list': bound must be positive, found {bound}")


def verify(
    completion: str,
    row: dict[str, Any],
    *,
    positive: list[str],
    negative: list[str],
    bound: float = 3.0,
    distinct: bool = False,
) -> Verdict:
    """Score a completion by its words, case-insensitively; a word is a run of letters and apostrophes.

    Args:
        completion: What the model wrote.
        row: Not used.
        positive: Words that count +1.
        negative: Words that count -1.
        bound: The net count is clipped to +-bound.
        distinct: Count each word once, however often it occurs.

    Returns:
        Score (clip(net) + bound) / (2 bound), from 0 to 1; ``correct`` at the upper bound.
    """
    del row
    words = _WORD.findall(completion.lower())
    counted = set(words) if distinct else words
    wanted, unwanted = set(positive), set(negative)
    net = sum((word in wanted) - (word in unwanted) for word in counted)
    clipped = max(-bound, min(bound, net))
    return graded((clipped + bound) / (2 * bound), None, f"net word count {net}")
