"""Logged metrics over the last third of the steps, in a folder that ``posttrain compare`` wrote.

``python scripts/evidence/last_third.py OUT --metric entropy --metric ttrl/label_accuracy`` prints per metric
and arm: the mean (with a 95 % t interval over seeds), the mean of each seed, the first log (mean over seeds),
and the difference to the first arm that logged the metric, paired by seed (* where its interval leaves zero
out). ``--json`` prints the same for machines.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from posttrain.evaluation.seeds import over_seeds, paired_over_seeds
from posttrain.report.load import read_run


def first_and_last(folder: Path, metric: str, share: float) -> tuple[float, float] | None:
    """Return the first log of a metric and its mean over the last ``share`` of a run; None without any."""
    steps, values = read_run(folder, folder.name).series(metric)
    if not steps:
        return None
    last = [value for step, value in zip(steps, values, strict=True) if step > steps[-1] * (1 - share)]
    return values[0], fmean(last)


def table(out: Path, metric: str, share: float) -> dict[str, Any]:
    """Return what all arms logged of a metric.

    Raises:
        SystemExit: No arm logged it, or some seeds of an arm did not.
    """
    comparison = json.loads((out / "comparison.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = {}
    baseline: list[float] = []
    for arm in comparison["arms"]:
        runs = [out / arm / f"seed-{seed}" for seed in range(comparison["seeds"])]
        logged = [first_and_last(run, metric, share) for run in runs]
        pairs = [pair for pair in logged if pair is not None]
        if not pairs:
            continue  # a metric of a method that this arm does not use
        if len(pairs) < len(logged):
            raise SystemExit(f"{out / arm}: only {len(pairs)} of {len(logged)} seeds logged {metric!r}")
        last = [pair[1] for pair in pairs]
        found[arm] = {
            "first": fmean(pair[0] for pair in pairs),
            "mean": over_seeds(last).to_dict(),
            "seed_means": last,
        }
        if baseline:
            difference = paired_over_seeds(baseline, last)
            found[arm]["difference"] = {**difference.to_dict(), "excludes_zero": difference.excludes_zero}
        baseline = baseline or last
    if not found:
        raise SystemExit(f"no run in {out} logged {metric!r}; a run's metrics.jsonl has the names")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--metric", action="append", required=True, help="as in metrics.jsonl; repeatable")
    parser.add_argument("--share", type=float, default=1 / 3, help="of the steps, from the end (a third)")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    found = {metric: table(given.out, metric, given.share) for metric in given.metric}
    print(json.dumps(found, indent=2) if given.json else as_text(found))


def as_text(found: dict[str, dict[str, Any]]) -> str:
    """Return the table."""
    lines = []
    for metric, arms in found.items():
        lines.append(metric)
        for arm, values in arms.items():
            seeds = " ".join(f"{value:.3f}" for value in values["seed_means"])
            line = f"  {arm:14s} first {values['first']:.3f}  last {_interval(values['mean'])}  seeds {seeds}"
            if "difference" in values:
                star = " *" if values["difference"]["excludes_zero"] else ""
                line += f"  difference {_interval(values['difference'])}{star}"
            lines.append(line)
    return "\n".join(lines)


def _interval(estimate: dict[str, Any]) -> str:
    if estimate["low"] is None:
        return f"{estimate['value']:.3f}"
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"


if __name__ == "__main__":
    main()
