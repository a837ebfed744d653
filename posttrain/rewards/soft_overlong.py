"""DAPO's soft overlong punishment (arXiv 2503.14476, equation 13): a penalty that grows over the last tokens.

It is added to the reward that judges the answer, and takes nothing from answers that end in time::

    rewards: [math, {soft_overlong: {params: {limit: 20480, cache: 4096}}}]
"""

from __future__ import annotations

from typing import Any

from posttrain.rewards.verdict import Verdict

TOKENS = "completion_tokens"
"""What the rewards of a trainer get beside the data's columns: tokens of the completion, its end included."""


def columns(**_: Any) -> tuple[str, ...]:
    """Return the data columns that :func:`verify` reads: none."""
    return ()


def optional_columns(**_: Any) -> tuple[str, ...]:
    """Return what :func:`verify` reads and no data has: the number of tokens."""
    return (TOKENS,)


def prepare(*, limit: int, cache: int) -> None:
    """Check the lengths once, when the verifier starts.

    Raises:
        ValueError: ``limit`` is below 1, or ``cache`` is not between 0 and ``limit``.
    """
    if limit < 1 or not 0 <= cache <= limit:
        raise ValueError(
            f"limit must be >= 1 and cache between 0 and limit, found limit={limit}, cache={cache}"
        )


def penalty(tokens: int, limit: int, cache: int) -> float:
    """Return 0 up to ``limit - cache`` tokens, then a line down to -1 at ``limit``, and -1 beyond it."""
    if tokens > limit:
        return -1.0
    return min(0.0, (limit - cache - tokens) / cache) if cache else 0.0


def verify(completion: str, row: dict[str, Any], *, limit: int, cache: int) -> Verdict:
    """Penalise the length of a completion.

    Args:
        completion: Not used.
        row: Holds ``completion_tokens``.
        limit: L_max, tokens; usually ``trainer.max_completion_length``.
        cache: L_cache, tokens before the limit over which the penalty grows.

    Returns:
        ``correct`` with score 0 without a penalty, else ``wrong`` with a score from -1 to 0.

    Raises:
        ValueError: The number of tokens is not known, as in an evaluation that this reward would judge.
    """
    del completion
    if TOKENS not in row:
        raise ValueError("soft_overlong counts tokens, which only training knows: name another reward first")
    score = penalty(row[TOKENS], limit, cache)
    return Verdict("correct" if score == 0 else "wrong", score)
