"""What a verifier says about one completion."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

Status = Literal["correct", "wrong", "unparseable", "error", "timeout", "skipped"]
"""What became of one completion.

``correct``: the score is at the top. ``wrong``: an answer was read and is not (fully) right; partial scores
are ``wrong`` with a score above 0. ``unparseable``: no answer could be read. ``error``: the verifier raised
or its process died. ``timeout``: its process was killed at the deadline. ``skipped``: the verifier says that
it does not apply to this row (a user function that returned None).
"""

STATUSES: tuple[Status, ...] = get_args(Status)
TOP_SCORE = 1.0 - 1e-9
MESSAGE_LIMIT = 1000


@dataclass(frozen=True)
class Verdict:
    """The outcome of one verification.

    Attributes:
        status: See :data:`Status`.
        score: 0 to 1 for the verifiers of this package, any finite number from a user function; 0 for
            ``unparseable``; None for ``error``, ``timeout`` and ``skipped``, which do not judge the answer.
        answer: The extracted answer in a canonical spelling, for majority votes and distinct answers; None
            when there is none.
        message: Why, for everything but ``correct``; at most 1000 characters.
        seconds: Wall-clock time in the verifier process, when measured. Not part of equality.
    """

    status: Status
    score: float | None = None
    answer: str | None = None
    message: str | None = None
    seconds: float | None = field(default=None, compare=False)

    @property
    def failed(self) -> bool:
        """Whether the verifier, not the answer, is to blame: ``error`` or ``timeout``."""
        return self.status in ("error", "timeout")


def graded(score: float, answer: str | None, message: str | None = None) -> Verdict:
    """Return ``correct`` when ``score`` is at the top (>= 1), else ``wrong`` with that score.

    Raises:
        ValueError: The score is NaN or infinite.
    """
    score = float(score)
    if not math.isfinite(score):
        raise ValueError(f"the verifier returned the score {score}; a finite number is needed")
    return Verdict("correct" if score >= TOP_SCORE else "wrong", score, answer, message)


def unparseable(message: str) -> Verdict:
    """Return the verdict of a completion without a readable answer."""
    return Verdict("unparseable", 0.0, None, message)
