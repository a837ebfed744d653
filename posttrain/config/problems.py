"""What is wrong with a configuration, and how it is told.

A check never stops at the first mistake: it yields :class:`Problem` objects, and the :class:`Report`
holds all of them, in the order of the file.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import Console

KeyPath = tuple[str | int, ...]
"""Where a value sits in the configuration: ``("rewards", 0, "weight")``."""

_MISSING = object()
_LONGEST_VALUE = 80


def dotted(path: KeyPath) -> str:
    """Return ``rewards.0.weight`` for ``("rewards", 0, "weight")``."""
    return ".".join(str(step) for step in path)


def nearest(name: object, names: Iterable[str]) -> str | None:
    """Return the known name that is most like ``name``, or None when none is close.

    A misspelling comes first, then a name that begins with what was written, then a looser likeness.
    """
    word = str(name).lower()
    known = {candidate.lower(): candidate for candidate in names}
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.85)
    near += [candidate for candidate in known if len(word) > 2 and candidate.startswith(word)]
    near += difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return known[near[0]] if near else None


def near_file(path: Path) -> Path | None:
    """Return the file beside ``path`` with the most similar name, or None when none is close."""
    try:
        beside = sorted(path.parent.iterdir())
    except (OSError, ValueError):  # no such folder, or one that may not be read
        return None
    alike = {file.stem: file for file in beside if file.suffix == path.suffix}
    near = nearest(path.stem, alike)
    return alike[near] if near and alike[near] != path else None


def show(value: object) -> str:
    """Return a value as one would write it in YAML, cut to a readable length."""
    if isinstance(value, float) and not math.isfinite(value):
        text = ".nan" if math.isnan(value) else ".inf" if value > 0 else "-.inf"
    elif value is None or isinstance(value, (bool, int, float, list, dict)):
        text = json.dumps(value, ensure_ascii=False, default=str)
    else:
        text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."


@dataclass(frozen=True)
class Problem:
    """One mistake.

    Attributes:
        message: What is wrong, one sentence.
        path: The place in the configuration; empty for the file as a whole.
        severity: An ``error`` refuses the run, a ``warning`` does not.
        found: The value found; leave it out when nothing was there.
        needed: What is allowed there: values, a range, a type.
        suggestion: The fix: the nearest valid name, or what to write instead.
        where: ``file.yaml:12`` or ``override 'x=y'``; filled in by the check.
    """

    message: str
    path: KeyPath = ()
    severity: Literal["error", "warning"] = "error"
    found: Any = field(default=_MISSING, repr=False)
    needed: str | None = None
    suggestion: str | None = None
    where: str | None = None

    @property
    def key(self) -> str:
        """The dotted place in the configuration, empty for the file as a whole."""
        return dotted(self.path)

    @property
    def has_value(self) -> bool:
        """Whether the problem is about a value that was found."""
        return self.found is not _MISSING

    def details(self) -> list[tuple[str, str]]:
        """Return what was found, what is needed and the fix, as (label, text), those that are known."""
        rows = [("found", show(self.found))] if self.has_value else []
        if self.needed:
            rows.append(("needed", self.needed))
        if self.suggestion:
            rows.append(("fix", self.suggestion))
        return rows

    def text(self) -> str:
        """Return the problem as plain lines, the first of them ``where: severity: key: message``."""
        head = [part for part in (self.where, self.severity, self.key) if part]
        lines = [": ".join([*head, self.message])]
        return "\n".join(lines + [f"    {label}: {text}" for label, text in self.details()])

    def as_json(self) -> dict[str, Any]:
        """Return the problem for machines; ``found`` is absent when nothing was there."""
        record: dict[str, Any] = {
            "severity": self.severity,
            "key": self.key,
            "where": self.where,
            "message": self.message,
            "needed": self.needed,
            "suggestion": self.suggestion,
        }
        if self.has_value:
            finite = not isinstance(self.found, float) or math.isfinite(self.found)
            plain = self.found is None or (finite and isinstance(self.found, (bool, int, float, str)))
            record["found"] = self.found if plain else show(self.found)
        return record


@dataclass(frozen=True)
class Report:
    """Everything a check found.

    Attributes:
        source: The configuration that was checked, as it was named.
        problems: All problems, in the order of the file.
    """

    source: str
    problems: tuple[Problem, ...] = ()

    @property
    def errors(self) -> list[Problem]:
        """The problems that refuse the run."""
        return [problem for problem in self.problems if problem.severity == "error"]

    @property
    def warnings(self) -> list[Problem]:
        """The problems that do not refuse the run."""
        return [problem for problem in self.problems if problem.severity == "warning"]

    @property
    def ok(self) -> bool:
        """Whether the configuration can run."""
        return not self.errors

    def summary(self) -> str:
        """Return the last line of the report: the counts."""
        counts = f"{_count(len(self.errors), 'error')}, {_count(len(self.warnings), 'warning')}"
        return f"{self.source}: {'ok' if self.ok else 'refused'} ({counts})"

    def text(self) -> str:
        """Return the whole report as plain text."""
        return "\n".join([*(problem.text() for problem in self.problems), self.summary()])

    def as_json(self) -> dict[str, Any]:
        """Return the whole report for machines."""
        return {
            "config": self.source,
            "ok": self.ok,
            "errors": len(self.errors),
            "warnings": len(self.warnings),
            "problems": [problem.as_json() for problem in self.problems],
        }

    def print(self, console: Console) -> None:
        """Print the report; colours and wrapping only on a terminal."""
        from rich.text import Text

        for problem in self.problems:
            colour = "bold red" if problem.severity == "error" else "bold yellow"
            line = Text(f"{problem.where}: " if problem.where else "", style="dim")
            line.append(f"{problem.severity}: ", style=colour)
            line.append(f"{problem.key}: " if problem.key else "", style="bold")
            line.append(problem.message, style="")
            console.print(line, soft_wrap=True)
            for label, text in problem.details():
                console.print(Text.assemble(("    " + label, "cyan"), f": {text}"), soft_wrap=True)
        console.print(Text(self.summary(), style="green" if self.ok else "red"), soft_wrap=True)


class ConfigError(ValueError):
    """A configuration that cannot run; the message lists every problem.

    Attributes:
        report: The report with the problems.
    """

    def __init__(self, report: Report) -> None:
        super().__init__(report.text())
        self.report = report


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
