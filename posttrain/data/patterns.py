"""Regular expressions of the configuration, searched in data: one that would not end is named."""

from __future__ import annotations

from typing import Any

import regex

from posttrain.data.errors import DataError

SEARCH_SECONDS = 5.0
"""What the search in one text may take; a usual one takes microseconds."""


def search(setting: str, pattern: str, text: str, *, flags: int = 0, seconds: float = SEARCH_SECONDS) -> Any:
    """Return the first match of ``pattern`` in ``text`` or None, as ``re.search`` does.

    Args:
        setting: What the pattern is called in the configuration, for the message.
        pattern: A regular expression that Python's ``re`` takes.
        text: Where to search.
        flags: Such as ``regex.DOTALL``.
        seconds: Limit, in seconds of wall time.

    Raises:
        DataError: The search takes longer.
    """
    try:
        return regex.search(pattern, text, flags | regex.VERSION0, timeout=seconds)
    except TimeoutError:
        raise DataError(
            f"{setting} {pattern!r} found no end within {seconds:g} s in a text of {len(text)} characters "
            f"that begins {text[:80]!r}; a repetition inside a repetition, such as (a+)+, tries every way to "
            "divide a text: write it without"
        ) from None
