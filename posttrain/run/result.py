"""What a run left behind, for people and for machines."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

HEADLINES = ("accuracy", "win_rate", "kl", "log_loss")
"""What is shown of an evaluation on pairs."""


@dataclass
class RunResult:
    """What a run left behind.

    Attributes:
        run_dir: The run directory.
        steps: Optimiser steps done.
        report: The HTML report.
        evaluation: Content of evaluation.json, or None without an ``evaluate`` section.
        export: Folder of the export, or None without an ``export`` section.
        pushed: Address on the Hub, or None.
    """

    run_dir: str
    steps: int
    report: str
    evaluation: dict[str, Any] | None = None
    export: str | None = None
    pushed: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the result for JSON, with the metrics of the evaluations but not their samples."""
        evaluation = self.evaluation
        if evaluation is not None:
            evaluation = {name: _without_samples(part) for name, part in evaluation.items()}
        return {**asdict(self), "evaluation": evaluation}

    def text(self) -> str:
        """Return the result for people."""
        lines = [f"run      {self.run_dir} ({self.steps} steps)"]
        for name, key in (("before", "before"), ("after", "after"), ("change", "difference")):
            metrics = ((self.evaluation or {}).get(key) or {}).get("metrics", {})
            shown = [
                f"{metric} {interval(estimate, signed=key == 'difference')}"
                for metric, estimate in metrics.items()
                if metric.startswith("pass@") or metric in HEADLINES
            ]
            if shown:
                lines.append(f"{name:<8} {'  '.join(shown)}")
        lines += [f"export   {self.export}"] if self.export else []
        lines += [f"pushed   {self.pushed}"] if self.pushed else []
        return "\n".join([*lines, f"report   {self.report}"])


def interval(estimate: dict[str, Any], *, signed: bool = False) -> str:
    """Return ``value [low, high]``; a number that could not be computed is ``-``."""
    form = "{:+.3f}" if signed else "{:.3f}"
    value, low, high = (
        "-" if estimate[key] is None else form.format(estimate[key]) for key in ("value", "low", "high")
    )
    return f"{value} [{low}, {high}]"


def _without_samples(part: Any) -> Any:
    return (
        {key: value for key, value in part.items() if key != "problems"} if isinstance(part, dict) else part
    )
