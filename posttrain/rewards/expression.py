"""Arithmetic expressions that must use given integers exactly once and reach a target (Countdown).

The answer is read by a small parser of this file (integers, ``+ - * /``, parentheses, a leading sign) and
computed in exact fractions; it is never evaluated as Python. The integers are compared before anything is
computed, so the value can only be as large as the numbers of the problem allow.
"""

from __future__ import annotations

import re
from collections import Counter
from fractions import Fraction
from typing import Any, Literal

from posttrain.rewards.extract import Extract, extract_answer, missing
from posttrain.rewards.verdict import Verdict, graded, unparseable

MAX_CHARACTERS = 4096
MAX_DIGITS = 18
MAX_DEPTH = 64

_TOKEN = re.compile(r"\s*(?:(?P<number>[0-9]+)|(?P<symbol>[-+*/()]))")
_SPELLINGS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "\u2013": "-"})

Node = int | tuple[str, Any, Any]


class ExpressionError(ValueError):
    """The text is not an expression of the grammar; the message says where and why."""


def columns(nums: str = "nums", target: str = "target", **_: Any) -> tuple[str, ...]:
    """Return the data columns that :func:`verify` reads."""
    return nums, target


def verify(
    completion: str,
    row: dict[str, Any],
    *,
    nums: str = "nums",
    target: str = "target",
    extract: Literal["text", "answer_tag", "boxed"] = "text",
    equation: bool = True,
) -> Verdict:
    """Check that the answer uses the integers of ``row[nums]`` exactly once and equals ``row[target]``.

    Args:
        completion: What the model wrote.
        row: The data row.
        nums: Column with the list of integers.
        target: Column with the value to reach, an integer or a number as text.
        extract: Where the answer stands, see :data:`posttrain.rewards.extract.Extract`.
        equation: Also accept ``expression = value`` when the value is the target.

    Returns:
        ``correct``; ``wrong`` (score 0) for other numbers, another value or a division by zero;
        ``unparseable`` when there is no expression, with the position of the first offence.

    Raises:
        ValueError: The row has no integers or no target.
    """
    numbers, goal = _problem(row, nums, target)
    how: Extract = extract
    answer = extract_answer(completion, how)
    if answer is None:
        return unparseable(missing(how))
    try:
        left, right = _sides(answer, equation)
        tree, used = parse(left)
    except ExpressionError as error:
        return unparseable(str(error))
    spelled = render(tree)
    if Counter(used) != Counter(numbers):
        return graded(0.0, spelled, f"uses the integers {sorted(used)}, the problem gives {sorted(numbers)}")
    try:
        value = evaluate(tree)
    except ZeroDivisionError:
        return graded(0.0, spelled, "divides by zero")
    if value != goal:
        return graded(0.0, spelled, f"equals {value}, the target is {goal}")
    if right is not None and right != goal:
        return graded(0.0, spelled, f"claims to equal {right}, the target is {goal}")
    return graded(1.0, spelled)


def parse(text: str) -> tuple[Node, list[int]]:
    """Return the tree of an expression and its integers in order.

    Raises:
        ExpressionError: Too long, too deep, or not of the grammar.
    """
    if len(text) > MAX_CHARACTERS:
        raise ExpressionError(f"the expression has {len(text)} characters, at most {MAX_CHARACTERS} are read")
    parser = _Parser(text.translate(_SPELLINGS))
    tree = parser.sum(0)
    parser.end()
    return tree, parser.integers


def evaluate(tree: Node) -> Fraction:
    """Return the exact value of a tree.

    Raises:
        ZeroDivisionError: A divisor is zero.
    """
    if isinstance(tree, int):
        return Fraction(tree)
    operator, first, second = tree
    left, right = evaluate(first), evaluate(second)
    if operator == "+":
        return left + right
    if operator == "-":
        return left - right
    return left * right if operator == "*" else left / right


def render(tree: Node) -> str:
    """Return one spelling per tree: all parentheses, no spaces."""
    if isinstance(tree, int):
        return str(tree)
    operator, first, second = tree
    return f"({render(first)}{operator}{render(second)})"


class _Parser:
    """Recursive descent over one text; depth and literal sizes are bounded."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0
        self.integers: list[int] = []
        self.kind = ""
        self.token = ""
        self._advance()

    def _advance(self) -> None:
        match = _TOKEN.match(self.text, self.position)
        if match is None:
            rest = self.text[self.position :].lstrip()
            if rest:
                where = len(self.text) - len(rest)
                raise ExpressionError(
                    f"unexpected {rest[:12]!r} at character {where}; allowed are integers and + - * / ( )"
                )
            self.kind, self.token = "end", "the end"
            return
        self.position = match.end()
        self.kind = match.lastgroup or ""
        self.token = match[self.kind]

    def end(self) -> None:
        if self.kind != "end":
            raise ExpressionError(f"unexpected {self.token!r} before character {self.position}")

    def sum(self, depth: int) -> Node:
        # a loop of left-nested nodes would make evaluation recurse; the number of integers bounds it
        node = self.product(depth)
        while self.token in ("+", "-"):
            operator = self.token
            self._advance()
            node = (operator, node, self.product(depth))
        return node

    def product(self, depth: int) -> Node:
        node = self.factor(depth)
        while self.token in ("*", "/"):
            operator = self.token
            self._advance()
            node = (operator, node, self.factor(depth))
        return node

    def factor(self, depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise ExpressionError(f"nested deeper than {MAX_DEPTH}")
        token, kind = self.token, self.kind
        if kind == "number":
            if len(token) > MAX_DIGITS:
                raise ExpressionError(f"an integer of {len(token)} digits; at most {MAX_DIGITS} are read")
            if len(self.integers) >= MAX_DEPTH:
                raise ExpressionError(f"more than {MAX_DEPTH} integers")
            self._advance()
            self.integers.append(int(token))
            return int(token)
        if token in ("+", "-"):
            self._advance()
            operand = self.factor(depth + 1)
            return operand if token == "+" else ("*", -1, operand)
        if token == "(":
            self._advance()
            node = self.sum(depth + 1)
            if self.token != ")":
                raise ExpressionError(f"expected ')' but found {self.token!r}")
            self._advance()
            return node
        raise ExpressionError(f"expected an integer or '(' but found {token!r}")


def _sides(answer: str, equation: bool) -> tuple[str, Fraction | None]:
    if "=" not in answer or not equation:
        return answer, None
    left, right = answer.split("=", 1)
    claimed = right.strip().translate(_SPELLINGS)
    if not re.fullmatch(rf"-?[0-9]{{1,{MAX_DIGITS}}}(?:\.[0-9]{{1,{MAX_DIGITS}}})?", claimed):
        raise ExpressionError(f"the text after '=' is not a number: {right.strip()[:40]!r}")
    return left, Fraction(claimed)


def _problem(row: dict[str, Any], nums: str, target: str) -> tuple[list[int], Fraction]:
    numbers = row.get(nums)
    whole = isinstance(numbers, list) and all(isinstance(n, int) and not isinstance(n, bool) for n in numbers)
    if not numbers or not whole:
        raise ValueError(f"column {nums!r} must hold a list of integers, found {numbers!r}")
    goal = row.get(target)
    try:
        return list(numbers), Fraction(str(goal))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"column {target!r} must hold a number, found {goal!r}") from None
