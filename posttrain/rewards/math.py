r"""Mathematical answers, compared symbolically by math-verify.

The library reads LaTeX with a grammar. Its reader of plain numbers hands text to sympy only after a regular
expression that admits digits and operators, so nothing the model wrote runs as code. Its own timeouts, which
use signals and give up in threads, are off: the deadline of the verifier process replaces them. Its
exceptions are let through, so that a comparison that breaks is counted as an error and not as wrong.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

from posttrain.rewards.extract import canonical, extract_answer, missing
from posttrain.rewards.verdict import Verdict, graded, unparseable


def columns(gold: str = "answer", **_: Any) -> tuple[str, ...]:
    """Return the data columns that :func:`verify` reads."""
    return (gold,)


def prepare(**_: Any) -> None:
    """Import math-verify and silence its note that its own timeouts are off."""
    import logging

    logging.getLogger("math_verify").setLevel(logging.ERROR)
    _parse("\\boxed{1}")


def verify(
    completion: str,
    row: dict[str, Any],
    *,
    gold: str = "answer",
    extract: Literal["auto", "text", "answer_tag", "boxed", "last_number"] = "auto",
) -> Verdict:
    r"""Check a mathematical answer against ``row[gold]``.

    Args:
        completion: What the model wrote.
        row: The data row.
        gold: Column with the right answer: LaTeX without delimiters (``\frac{1}{2}``), a number, or a text in
            which math-verify finds the answer itself (with ``\boxed`` or ``$``).
        extract: ``auto`` lets math-verify look (boxed first, then LaTeX in delimiters, then the last plain
            expression); the others are those of :data:`posttrain.rewards.extract.Extract` and strict.

    Returns:
        ``correct``, ``wrong`` (score 0) or ``unparseable``. The answer is sympy's spelling of what was read;
        every correct completion of a problem has that of the gold answer.

    Raises:
        ValueError: The gold answer is missing or cannot be read.
    """
    from math_verify import verify as equal

    reference = _gold(row.get(gold), gold)
    if extract == "auto":
        text: str | None = completion
    else:
        text = extract_answer(completion, extract)
        if text is None:
            return unparseable(missing(extract))
        text = _boxed(text)
    found = _parse(text) if text else []
    if not found:
        return unparseable("math-verify found no answer in the completion")
    if all(isinstance(item, str) for item in found) and not all(isinstance(item, str) for item in reference):
        return unparseable(f"found {canonical(found[0])[:80]!r}, which is not a mathematical expression")
    right = equal(list(reference), found, timeout_seconds=None, raise_on_error=True)
    spelled = _spell(reference[0] if right else found[0])
    return graded(1.0 if right else 0.0, spelled, None if right else f"read as {spelled[:200]}")


@lru_cache(maxsize=4096)
def _parse_gold(text: str) -> tuple[Any, ...]:
    delimited = "\\boxed" in text or "$" in text or "\\(" in text or "\\[" in text
    return tuple(_parse(text if delimited else _boxed(text)))


def _gold(value: Any, column: str) -> tuple[Any, ...]:
    if value is None or isinstance(value, (bool, list, dict)) or not str(value).strip():
        raise ValueError(f"column {column!r} must hold the right answer as text or a number, found {value!r}")
    reference = _parse_gold(str(value).strip())
    if not reference:
        raise ValueError(f"the right answer {value!r} in column {column!r} cannot be read by math-verify")
    return reference


def _parse(text: str) -> list[Any]:
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    targets = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    return parse(text, targets, parsing_timeout=None, raise_on_error=True)


def _boxed(text: str) -> str:
    return f"\\boxed{{{text}}}"


def _spell(parsed: Any) -> str:
    return canonical(str(parsed))
