"""An evaluation, or several side by side, as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from posttrain.evaluation.results import Evaluation


def print_table(evaluations: Mapping[str, Evaluation], console: Console) -> None:
    """Print one column per evaluation: each metric with its interval, then diversity and verdict counts."""
    table = Table(box=None, pad_edge=False)
    table.add_column("metric")
    for name in evaluations:
        table.add_column(name or "value [interval]", justify="right")
    parts = list(evaluations.values())
    for metric in dict.fromkeys(name for part in parts for name in part.metrics):
        table.add_row(metric, *(_estimate(part, metric) for part in parts))
    for order in dict.fromkeys(name for part in parts for name in part.distinct):
        values = [part.distinct.get(order) for part in parts]
        table.add_row(order, *("-" if value is None else f"{value:.3f}" for value in values))
    for status in dict.fromkeys(name for part in parts for name in part.verdicts):
        table.add_row(f"verdicts: {status}", *(str(part.verdicts.get(status, 0)) for part in parts))
    table.add_row("tokens/s", *(f"{part.tokens_per_second:.0f}" for part in parts))
    console.print(table)


def _estimate(part: Evaluation, metric: str) -> str:
    estimate = part.metrics.get(metric)
    if estimate is None or estimate.value is None:
        return "-"
    if estimate.low is None:  # a single problem has no interval
        return f"{estimate.value:.3f}"
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"
