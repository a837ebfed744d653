"""What a unit of divergence buys: arms against the curve of a baseline at equal KL, seed by seed.

    posttrain compare CONFIG ... --json > frontier.json
    python scripts/evidence/frontier.py frontier.json --baseline dpo-

The baseline's arms (those whose name begins so) make a curve per seed, linear between neighbouring points:
give them close enough, a chord lies below a curve that bends. An arm is compared where its KL lies inside,
and left out if this is so in less than half of the seeds.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np

from posttrain.evaluation.seeds import over_seeds

KL, SCORES = "after/kl", ("after/score", "after/win_rate", "after/accuracy", "after/self_bleu")


def curve_differences(
    runs: list[dict[str, dict[str, float]]], baseline: str, score: str
) -> dict[str, list[float]]:
    """Return per arm the score above the baseline's curve at the arm's own KL, one number per covered seed.

    Args:
        runs: Per seed, the measured values by arm.
        baseline: What the names of the baseline's arms begin with.
        score: The measure.
    """
    found: dict[str, list[float]] = defaultdict(list)
    for values in runs:
        points = sorted((v[KL], v[score]) for arm, v in values.items() if arm.startswith(baseline))
        places, heights = zip(*points, strict=True)
        for arm, own in values.items():
            if not arm.startswith(baseline) and places[0] <= own[KL] <= places[-1]:
                found[arm].append(own[score] - float(np.interp(own[KL], places, heights)))
    return dict(found)


def main() -> None:
    """Print one row per arm."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("comparison", type=Path, help="what 'posttrain compare --json' printed")
    parser.add_argument("--baseline", required=True, help="beginning of the names of the baseline's arms")
    arguments = parser.parse_args()
    content = json.loads(arguments.comparison.read_text())
    by_seed: dict[int, dict[str, dict[str, float]]] = defaultdict(dict)
    for run in content["runs"]:
        if run["status"] == "finished":
            by_seed[run["seed"]][run["arm"]] = run["values"]
    runs = list(by_seed.values())
    for score in SCORES:
        print(score)
        for arm, values in curve_differences(runs, arguments.baseline, score).items():
            if len(values) > len(runs) / 2:
                found = over_seeds(values)
                print(
                    f"  {arm:14} {found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]  "
                    f"{len(values)} of {len(runs)} seeds"
                )


if __name__ == "__main__":
    main()
