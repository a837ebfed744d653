r"""Find the answer in a completion, in linear time whatever the model wrote."""

from __future__ import annotations

import hashlib
import re
from decimal import Decimal
from typing import Literal

Extract = Literal["text", "answer_tag", "boxed", "last_number"]
"""Where the answer stands in a completion.

``text``: the whole completion, stripped. ``answer_tag``: inside the last ``<answer>...</answer>``.
``boxed``: inside the last ``\\boxed{...}``. ``last_number``: the last integer, decimal or fraction.
"""

_NUMBER = re.compile(r"(?<![0-9A-Za-z_.])[-+]?[0-9][0-9,]*(?:\.[0-9]+)?(?:/[0-9]+)?")
_DECIMAL = re.compile(r"[-+]?(?:[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)(?:\.[0-9]*)?")
_LONGEST_NUMBER = 64
_LONGEST_ANSWER = 1000


def extract_answer(completion: str, how: Extract) -> str | None:
    """Return the answer, stripped, or None when there is none (or it is empty)."""
    if how == "text":
        found: str | None = completion
    elif how == "answer_tag":
        found = _last_tag(completion)
    elif how == "boxed":
        found = _last_boxed(completion)
    else:
        numbers = _NUMBER.findall(completion)
        found = numbers[-1].rstrip(",") if numbers else None
    return (found.strip() or None) if found is not None else None


def missing(how: Extract) -> str:
    """Return the sentence that explains why nothing was extracted."""
    return {
        "text": "the completion is empty",
        "answer_tag": "no <answer>...</answer> with text in it was found",
        "boxed": "no closed \\boxed{...} with text in it was found",
        "last_number": "no number was found",
    }[how]


def canonical(answer: str) -> str:
    """Return a spelling under which equal answers coincide: single spaces, ``1000`` for ``+1,000.0``.

    Answers over 1000 characters are shortened to their beginning and a digest, so that they stay distinct.
    """
    answer = " ".join(answer.split())
    if len(answer) <= _LONGEST_NUMBER and _DECIMAL.fullmatch(answer):
        number = Decimal(answer.replace(",", ""))
        text = format(number, "f")
        if "." in text:
            text = text.rstrip("0").rstrip(".")
        return "0" if number == 0 else text.removeprefix("+")
    if len(answer) > _LONGEST_ANSWER:
        digest = hashlib.sha256(answer.encode("utf-8", "surrogatepass")).hexdigest()
        return f"{answer[:200]}... (sha256 {digest})"
    return answer


def _last_tag(text: str) -> str | None:
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end) if end >= 0 else -1
    return text[start + len("<answer>") : end] if start >= 0 else None


def _last_boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth, position = 1, start
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 1  # an escaped brace is text
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return text[start:position]
        position += 1
    return None
