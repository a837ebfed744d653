"""The error every part of this package raises for data that cannot be used."""

from __future__ import annotations

from collections.abc import Sequence

SHOWN = 5


class DataError(ValueError):
    """The data cannot be used as it is; the message says what was found, what is needed and the fix."""


def listed(problems: Sequence[str]) -> str:
    """Return the first five problems as indented lines, and how many more there are."""
    lines = [f"  {problem}" for problem in problems[:SHOWN]]
    if len(problems) > SHOWN:
        lines.append(f"  ... and {len(problems) - SHOWN} more")
    return "\n".join(lines)
