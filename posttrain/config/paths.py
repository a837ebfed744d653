"""Paths that the operating system can look at."""

from __future__ import annotations

from pathlib import Path


def usable_path(text: str | None) -> str | None:
    """Return ``text``; for the fields that name a file or a folder, before anything asks whether it exists.

    Raises:
        ValueError: The system refuses even to look: an unknown ``~user``, a NUL character, a name that is too
            long, a folder that may not be entered.
    """
    if text is None:
        return None
    if "\0" in text:
        raise ValueError(f"the path {text!r} holds a NUL character, which no file name has")
    try:
        Path(text).expanduser().exists()
    except OSError as error:
        raise ValueError(f"the path {_short(text)} cannot be used: {error.strerror or error}") from None
    except RuntimeError:
        user = text.partition("/")[0]
        raise ValueError(
            f"the path {_short(text)} begins with {_short(user)}, and there is no such user"
        ) from None
    return text


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"
