"""Texts of others on a terminal."""

from __future__ import annotations

import json
import re

# what would move the cursor, change colours, break lines, turn the direction of the text, or hides in it;
# the two joiners that words and emoji are spelled with stay
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    """Return a text without what a terminal would obey or could not show; such characters are spelled out.

    Line breaks and tabs stay.
    """
    text = _CONTROL.sub(_spelled, text.replace("\r\n", "\n"))
    # lone surrogates, out of JSON escapes in model output, have no UTF-8 form
    return text.encode("utf-8", errors="backslashreplace").decode("utf-8")


def _spelled(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\U{code:08x}" if code > 0xFFFF else json.dumps(match[0])[1:-1]
