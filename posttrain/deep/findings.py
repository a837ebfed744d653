"""What a deep check found, for people and for machines."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Level = Literal["error", "warning", "note"]

NAMED = 3
"""Examples of one finding."""


@dataclass(frozen=True)
class Finding:
    """One thing to know before training.

    Attributes:
        level: An ``error`` would stop the run or make it learn something else than was meant; a ``warning``
            may be meant; a ``note`` is a fact.
        message: What was seen, with counts, one sentence.
        cause: Where it comes from, where that is not plain from the message.
        cure: What to change.
        examples: Where to see it, a few: ``rows.jsonl:7: 'text'``.
    """

    level: Level
    message: str
    cause: str = ""
    cure: str = ""
    examples: tuple[str, ...] = ()

    def details(self) -> list[tuple[str, str]]:
        """Return cause, cure and examples as (label, text), those that there are."""
        rows = [("cause", self.cause), ("cure", self.cure), *(("see", text) for text in self.examples)]
        return [(label, text) for label, text in rows if text]


@dataclass(frozen=True)
class Section:
    """What one part of the check found.

    Attributes:
        name: Key in the JSON: ``tokens``, ``data``, ...
        title: For people.
        findings: In the order in which they are told.
        facts: For machines, JSON values only; ``show`` knows how to print those of each section.
    """

    name: str
    title: str
    findings: tuple[Finding, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return findings and facts."""
        return {"findings": [dataclasses.asdict(finding) for finding in self.findings], **self.facts}


@dataclass(frozen=True)
class DeepReport:
    """All sections.

    Attributes:
        sections: In the order in which they are printed.
    """

    sections: tuple[Section, ...]

    def of(self, level: Level) -> list[Finding]:
        """Return the findings of one level."""
        return [
            finding for section in self.sections for finding in section.findings if finding.level == level
        ]

    @property
    def ok(self) -> bool:
        """Whether nothing speaks against starting."""
        return not self.of("error")

    def as_json(self) -> dict[str, Any]:
        """Return the sections by name."""
        return {section.name: section.as_json() for section in self.sections}


def share(count: int, total: int) -> str:
    """Return ``12 of 300 (4.0%)``."""
    return f"{count} of {total} ({count / max(total, 1):.1%})"


def short(value: Any, width: int = 60) -> str:
    """Return text or messages as one readable line."""
    if isinstance(value, list):
        value = value[-1].get("content") if value and isinstance(value[-1], dict) else value
    text = repr(value)
    return text if len(text) <= width else f"{text[: width - 4]}...{text[-1]}"


def first(examples: Sequence[str]) -> tuple[str, ...]:
    """Return the examples that are named."""
    return tuple(examples[:NAMED])
