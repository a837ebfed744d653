"""Whether rewards reached their thresholds and stayed, in a folder that ``posttrain compare`` wrote.

``python scripts/evidence/thresholds.py OUT --at-least verifier=0.5 --equal format=0.65`` prints per reward
and arm, over the last third of the steps: the mean (with a 95 % t interval over seeds), the mean of each
seed, the lowest and highest log of all seeds, the largest miss, and in how many seeds no log misses by more
than the tolerance. A log is the mean over ``trainer.logging_steps`` steps; a miss is the distance to the
threshold, for ``--at-least`` only what is lacking. ``--json`` prints the same for machines.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from posttrain.evaluation.seeds import over_seeds
from posttrain.report.load import read_run


def last_logs(folder: Path, reward: str, share: float) -> list[float]:
    """Return the logged means of a reward over the last ``share`` of the steps of a run.

    Raises:
        SystemExit: The run logged no such reward.
    """
    run = read_run(folder, folder.name)
    steps, values = run.series(f"rewards/{reward}/mean")
    if not steps:
        names = [name.split("/")[1] for name in run.names() if name.startswith("rewards/")]
        raise SystemExit(f"{folder} logged no reward {reward!r}; it has {', '.join(dict.fromkeys(names))}")
    return [value for step, value in zip(steps, values, strict=True) if step > steps[-1] * (1 - share)]


def held(
    logs: Sequence[Sequence[float]], threshold: float, tolerance: float, *, lower: bool
) -> dict[str, Any]:
    """Return what the logs of each seed say about a threshold.

    Args:
        logs: One sequence per seed.
        threshold: The value to hold.
        tolerance: Largest miss of a log that still counts as held.
        lower: Whether only values below the threshold miss it.
    """
    means = [fmean(values) for values in logs]
    misses = [
        max(max(0.0, threshold - value) if lower else abs(value - threshold) for value in values)
        for values in logs
    ]
    return {
        "mean": over_seeds(means).to_dict(),
        "seed_means": means,
        "lowest": min(map(min, logs)),
        "highest": max(map(max, logs)),
        "largest_miss": max(misses),
        "seeds_held": sum(miss <= tolerance for miss in misses),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--at-least", action="append", default=[], metavar="REWARD=VALUE")
    parser.add_argument("--equal", action="append", default=[], metavar="REWARD=VALUE")
    parser.add_argument("--share", type=float, default=1 / 3, help="of the steps, from the end (a third)")
    parser.add_argument("--tolerance", type=float, default=0.05)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    comparison = json.loads((given.out / "comparison.json").read_text(encoding="utf-8"))
    found: dict[str, dict[str, Any]] = {}
    for text, lower in [(text, True) for text in given.at_least] + [(text, False) for text in given.equal]:
        reward, _, number = text.partition("=")
        title = f"{reward} {'>=' if lower else '='} {float(number):g}"
        found[title] = {}
        for arm in comparison["arms"]:
            runs = [given.out / arm / f"seed-{seed}" for seed in range(comparison["seeds"])]
            logs = [last_logs(run, reward, given.share) for run in runs]
            found[title][arm] = held(logs, float(number), given.tolerance, lower=lower)
    print(json.dumps(found, indent=2) if given.json else as_text(found, given.tolerance))


def as_text(found: dict[str, dict[str, Any]], tolerance: float) -> str:
    """Return the table."""
    lines = []
    for title, arms in found.items():
        lines.append(title)
        for arm, values in arms.items():
            mean = values["mean"]
            interval = f" [{mean['low']:.3f}, {mean['high']:.3f}]" if mean["low"] is not None else ""
            seeds = " ".join(f"{value:.3f}" for value in values["seed_means"])
            lines.append(
                f"  {arm:14s} {mean['value']:.3f}{interval}  seeds {seeds}  logs {values['lowest']:.3f} to "
                f"{values['highest']:.3f}  largest miss {values['largest_miss']:.3f}  "
                f"held within {tolerance:g}: {values['seeds_held']}/{len(values['seed_means'])}"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
