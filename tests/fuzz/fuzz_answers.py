"""Completions and gold answers that no verifier should meet, drawn from a seeded generator."""

from __future__ import annotations

import random
from typing import Any

BOMBS = [
    "\\boxed{" + "\\frac{1}{" * 400 + "1" + "}" * 400 + "}",
    "\\boxed{9^{9^{9^{9^{9}}}}}",
    "$10^{10^{10}}$",
    "\\boxed{" + "9" * 100_000 + "}",
    "\\boxed{" * 5000,
    "{" * 20_000,
    "}" * 20_000,
    "$" * 10_001,
    "\\left(" * 2000,
    "\\sqrt{" * 500 + "2" + "}" * 500,
    "(" * 3000 + "1" + ")" * 3000,
    "1" + "+1" * 20_000,
    "a" * 50_000 + "!",
    "\x1b[2J\0\x07\ud800",
    "\u0661\u0662 \uff11\uff12 \u00b2 \u2155",
    "\\boxed{1000000!}",
    "\\boxed{\\int_0^1 x^{x^{x^x}} dx}",
    "\\boxed{\\binom{10^9}{10^8}}",
    "<answer>" * 3000 + "1" + "</answer>" * 3000,
    "",
    " \n\t",
    "\\boxed{1/0}",
    "\\boxed{nan}",
    "1e999999999",
]
GOLD: list[Any] = [
    None,
    7,
    7.5,
    float("nan"),
    True,
    "",
    " ",
    "7",
    ["7"],
    {"a": 7},
    "\\frac{",
    "9" * 5000,
    "\0",
    10**30,
]


def hostile_answer(rng: random.Random) -> str:
    """Return a bomb, a piece of one, or two in a row."""
    text = rng.choice(BOMBS)
    kind = rng.randrange(4)
    if kind == 0:
        return text[: rng.randrange(len(text) + 1)]
    if kind == 1:
        return text + rng.choice(BOMBS)
    return text if kind == 2 else f"The answer is ${text}$."
