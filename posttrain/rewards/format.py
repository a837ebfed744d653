"""The shape of a completion: think and answer blocks, or a regular expression of the user."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, Literal

from posttrain.patterns import UNREADABLE
from posttrain.rewards.extract import canonical
from posttrain.rewards.verdict import Verdict, graded


def columns(**_: Any) -> tuple[str, ...]:
    """Return the data columns that :func:`verify` reads: none."""
    return ()


def prepare(*, pattern: str | None = None, **_: Any) -> None:
    """Check the pattern once, when the verifier starts.

    Raises:
        ValueError: The pattern is not a regular expression.
    """
    if pattern is not None:
        _compile(pattern)


def verify(
    completion: str,
    row: dict[str, Any],
    *,
    pattern: str | None = None,
    match: Literal["full", "search"] = "full",
) -> Verdict:
    """Check the form of a completion.

    Args:
        completion: What the model wrote.
        row: Not used.
        pattern: Regular expression (``re``, with DOTALL); a group named ``answer`` becomes the answer.
            Without it the form is ``<think>...</think><answer>...</answer>``, each tag exactly once, nothing
            but white space around the blocks, and an answer that is not empty.
        match: Whether the pattern has to match everything or to be found somewhere.

    Returns:
        ``correct`` or ``wrong`` (score 0). A pattern that backtracks without end is stopped by the deadline.
    """
    del row
    if pattern is None:
        return _think_answer(completion)
    compiled = _compile(pattern)
    found = compiled.fullmatch(completion) if match == "full" else compiled.search(completion)
    if found is None:
        return graded(0.0, None, "the pattern does not match")
    answer = found.groupdict().get("answer")
    return graded(1.0, canonical(answer) if answer is not None else None)


def _think_answer(completion: str) -> Verdict:
    tags = ("<think>", "</think>", "<answer>", "</answer>")
    for tag in tags:
        if completion.count(tag) != 1:
            return graded(0.0, None, f"{tag} occurs {completion.count(tag)} times, once is needed")
    text = completion.strip()
    think, between, answer = text.find(tags[0]), text.find(tags[1]) + len(tags[1]), text.find(tags[2])
    end = text.find(tags[3])
    if (
        think != 0
        or not between <= answer < end
        or text[between:answer].strip()
        or text[end + len(tags[3]) :]
    ):
        return graded(0.0, None, "the blocks are not in the order <think>...</think><answer>...</answer>")
    inside = text[answer + len(tags[2]) : end].strip()
    return graded(1.0, canonical(inside)) if inside else graded(0.0, None, "the answer block is empty")


@lru_cache(maxsize=16)
def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.DOTALL)
    except UNREADABLE as error:
        raise ValueError(f"pattern {pattern!r} is not a regular expression: {error}") from None
