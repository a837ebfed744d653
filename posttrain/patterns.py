"""Regular expressions of users, run with a limit: some take exponentially many tries on a text."""

from __future__ import annotations

import re
import signal
import threading
from types import FrameType
from typing import Literal

UNREADABLE = (re.error, OverflowError, RecursionError)
"""What :func:`re.compile` raises for text: ``a{9999999999}`` overflows, 900 parentheses go too deep."""

LIMIT_SECONDS = 5.0
"""Processor time one search may take; an ordinary one takes microseconds."""

_FIX = (
    "It tries the same text in ever more ways: let no two repeats beside or inside each other match the same "
    "characters, so a+ for (a+)+, and [^:]*: for .*:"
)


class SlowPatternError(ValueError):
    """A regular expression did not come to an end on a text; the message names both and says what to do."""


class _RanOut(BaseException):
    """No handler on the way may take it for an error of its own."""


def limited(
    pattern: re.Pattern[str],
    how: Literal["search", "fullmatch"],
    text: str,
) -> re.Match[str] | None:
    """Return ``pattern.search(text)`` or ``pattern.fullmatch(text)``, or stop.

    The limit holds in the main thread only, where signals are handled; elsewhere there is none.

    Args:
        pattern: Of a user.
        how: The method.
        text: What is searched.

    Raises:
        SlowPatternError: It took longer than :data:`LIMIT_SECONDS` of processor time.
    """
    find = pattern.search if how == "search" else pattern.fullmatch
    if threading.current_thread() is not threading.main_thread():
        return find(text)

    def ring(number: int, frame: FrameType | None) -> None:
        del number, frame
        raise _RanOut  # re looks for signals every few thousand steps

    earlier = signal.signal(signal.SIGVTALRM, ring)
    try:
        try:
            signal.setitimer(signal.ITIMER_VIRTUAL, LIMIT_SECONDS)
            return find(text)
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    except _RanOut:
        raise SlowPatternError(
            f"the regular expression {pattern.pattern!r} has no end after {LIMIT_SECONDS:g} s of "
            f"processor time on {text[:80]!r} ({len(text)} characters). {_FIX}"
        ) from None
    finally:
        signal.signal(signal.SIGVTALRM, earlier or signal.SIG_DFL)
