"""Texts of others on a terminal."""

from __future__ import annotations

import json
import re

# what would move the cursor, change colours, or turn the direction of the text
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """Return a text without what a terminal would obey or could not show; such characters are spelled out.

    Line breaks and tabs stay.
    """
    text = _CONTROL.sub(lambda match: json.dumps(match[0])[1:-1], text.replace("\r\n", "\n"))
    # lone surrogates, out of JSON escapes in model output, have no UTF-8 form
    return text.encode("utf-8", errors="backslashreplace").decode("utf-8")
