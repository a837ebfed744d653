"""Keep reasoning-gym's scorers from running model output as Python.

Five tasks call ``eval`` on the answer and five hand it to ``sympy.parse_expr``, which evaluates it too. In
the verifier process the first read literals only, and the second get the text only when every token of it is
a number, an operator, or the name of a symbol or elementary function. What is refused raises, which the
scorers treat like any other malformed answer. A test compares :data:`LITERAL_MODULES` and
:data:`EXPRESSION_MODULES` with the installed package.
"""

from __future__ import annotations

import ast
import importlib
import re
from typing import Any

LITERAL_MODULES = (
    "reasoning_gym.algorithmic.binary_matrix",
    "reasoning_gym.algorithmic.number_sorting",
    "reasoning_gym.algorithmic.spiral_matrix",
    "reasoning_gym.algorithmic.string_insertion",
    "reasoning_gym.games.n_queens",
)
"""Modules whose scorers call ``eval``."""

EXPRESSION_MODULES = (
    "reasoning_gym.algebra.intermediate_integration",
    "reasoning_gym.algebra.polynomial_multiplication",
    "reasoning_gym.algebra.simple_integration",
    "reasoning_gym.games.countdown",
    "reasoning_gym.games.puzzle24",
)
"""Modules whose scorers call ``parse_expr``, under that name or through sympy."""

FUNCTIONS = frozenset(
    (
        *("sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "sinh", "cosh", "tanh"),
        *("asinh", "acosh", "atanh", "exp", "log", "ln", "sqrt", "Abs", "pi"),
    )
)

_TOKEN = re.compile(
    r"\s+|(?P<name>[A-Za-z][A-Za-z0-9]*)|(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|\*\*|[-+*/^(),]"
)


def check_expression(text: str, symbols: frozenset[str] = frozenset()) -> None:
    """Refuse text that is more than numbers, operators, symbols of one letter and elementary functions.

    Args:
        text: What is about to be parsed.
        symbols: Further names that are allowed.

    Raises:
        ValueError: The first token that is not allowed, and where it is.
    """
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        name = match["name"] if match else None
        if match is None or (name and len(name) > 1 and name not in FUNCTIONS and name not in symbols):
            raise ValueError(
                f"{text[position : position + 20]!r} at character {position} is not allowed here"
            )
        position = match.end()


def tame_reasoning_gym() -> None:
    """Replace ``eval`` and ``parse_expr`` where reasoning-gym's scorers use them; for verifier processes."""
    import sympy
    from sympy.parsing.sympy_parser import parse_expr

    def guarded(text: str, local_dict: dict[str, Any] | None = None, **options: Any) -> Any:
        check_expression(text, frozenset(local_dict or ()))
        return parse_expr(text, local_dict=local_dict, **options)

    sympy.parse_expr = guarded
    for name in EXPRESSION_MODULES:
        module: Any = importlib.import_module(name)
        if hasattr(module, "parse_expr"):
            module.parse_expr = guarded
    for name in LITERAL_MODULES:
        # a module global named eval shadows the builtin
        module = importlib.import_module(name)
        module.eval = ast.literal_eval
