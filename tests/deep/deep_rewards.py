"""Rewards with the faults that the lint is for; each is called with lists of one."""

from __future__ import annotations

import time
from typing import Any


def constant(completions: list[str], **_: Any) -> list[float]:
    return [1.0 for _ in completions]


def anywhere(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """Pays for the answer wherever it stands: listing all answers is as good as knowing one."""
    return [float(answer[0] in completions[0])]


def short(completions: list[str], **_: Any) -> list[float]:
    return [1 / (1 + len(completions[0]))]


def fails_on_nothing(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    return [float(completions[0].split()[-1] == answer[0])]


def hangs_on_length(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    if len(completions[0]) > 200:
        time.sleep(60)
    return [float(completions[0] == answer[0])]
