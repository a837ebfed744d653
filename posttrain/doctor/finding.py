"""What the doctor says."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.console import Console
from rich.text import Text

from posttrain.terminal import visible

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
_STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or worth knowing.

    Attributes:
        name: Stable name, for scripts.
        severity: ``error`` when a run cannot work or its result is not what it seems, ``warning`` when it
            suffers, ``note`` otherwise.
        found: What was found, with figures.
        cause: The likely cause.
        advice: What to try.
        step: Optimiser step at which it was first seen, or None.
    """

    name: str
    severity: Severity
    found: str
    cause: str
    advice: str
    step: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the finding for JSON."""
        return asdict(self)


def ordered(findings: Iterable[Finding]) -> list[Finding]:
    """Return findings with the gravest first, otherwise as they came."""
    return sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity))


def has_errors(findings: Iterable[Finding]) -> bool:
    """Whether one of the findings is an error."""
    return any(finding.severity == "error" for finding in findings)


def print_findings(findings: Iterable[Finding], console: Console, nothing: str) -> None:
    """Print what was found, the cause and what to try, the gravest first; or ``nothing``."""
    rows = ordered(findings)
    if not rows:
        console.print(Text(nothing, style="green"))
        return
    for row in rows:
        at = "" if row.step is None else f" (step {row.step})"
        head = Text.assemble((f"{row.severity}: ", _STYLES[row.severity]), (row.name, "bold"), at)
        console.print(head, soft_wrap=True)
        for label, text in (("found", row.found), ("cause", row.cause), ("try", row.advice)):
            if text:
                lines = visible(text).splitlines()
                console.print(Text(f"  {label:<6} {lines[0]}"), soft_wrap=True)
                for line in lines[1:]:
                    console.print(Text(f"         {line}"), soft_wrap=True)
