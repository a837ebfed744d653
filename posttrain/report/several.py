"""Several runs side by side: what differs in their settings, and their held-out results in one table."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from posttrain.evaluation.results import Difference, Evaluation, compare
from posttrain.report.evaluation import TITLES, View, as_estimate, verdict
from posttrain.report.load import Run, as_dict, as_number

PLACES = ("run_dir", "model.tokenizer")
"""Settings that say where, not what."""
FROM_MANIFEST = ("versions", "commit", "hardware", "launch")


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Return (name, value in each run) of every setting, version and fingerprint that is not the same in all.

    A section that some run does not have at all is one row.

    Args:
        runs: Two or more. A run whose ``config.yaml`` or ``manifest.json`` is missing shows dashes.
    """
    about = [{name: run.manifest.get(name) for name in FROM_MANIFEST} for run in runs]
    prints = [{"data fingerprint": as_dict(run.manifest.get("data")).get("fingerprint")} for run in runs]
    sides = [run.config | more | data for run, more, data in zip(runs, about, prints, strict=True)]
    return [(name, [_plain(value) for value in values]) for name, values in _differing(sides)]


def _differing(sides: Sequence[Any], path: str = "") -> Iterator[tuple[str, Sequence[Any]]]:
    """Yield (dotted name, values) of what differs, going into what is a section everywhere."""
    if path in PLACES:
        return
    if all(isinstance(side, dict) and side for side in sides):
        for key in dict.fromkeys(key for side in sides for key in side):
            yield from _differing([side.get(key) for side in sides], f"{path}.{key}" if path else str(key))
    elif len({_plain(side) for side in sides}) > 1:
        yield path, sides


def _plain(value: Any) -> str:
    # null is how an optional setting says that it is not there
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


@dataclass
class Results:
    """One row per metric, one column per run, and the difference of each further run to the first.

    Attributes:
        rows: (title, an estimate or None per run, (difference or None, its verdict) per further run).
        notes: Why a difference cannot be given, one sentence each.
    """

    rows: list[tuple[str, list[Any], list[tuple[Any, str]]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def results(views: Sequence[tuple[Run, View | None]]) -> Results:
    """Return the held-out results of all runs, with differences to the first, paired on problems.

    The results are those after training, where there are none those before.
    """
    found = Results()
    sides = [_latest(run) for run, _ in views]
    metrics = [as_dict(side.get("metrics")) for side in sides]
    changes: list[dict[str, Any]] = []
    for (run, _), side in zip(views[1:], sides[1:], strict=True):
        outcome = _paired(sides[0], side)
        if isinstance(outcome, str):
            found.notes.append(f"{run.label} against {views[0][0].label}: no difference. {outcome}")
            changes.append({})
        else:
            changes.append({name: item.to_dict() for name, item in outcome.metrics.items()})
    for name in dict.fromkeys(name for side in metrics for name in side):
        estimates = [as_estimate(side.get(name)) for side in metrics]
        compared = [as_estimate(change.get(name)) for change in changes]
        if any(item is not None and item["value"] is not None for item in estimates):
            pairs = [(item, verdict(item)) for item in compared]
            found.rows.append((TITLES.get(name, name), estimates, pairs))
    return found


def _latest(run: Run) -> dict[str, Any]:
    return as_dict(run.evaluation.get("after")) or as_dict(run.evaluation.get("before"))


def _paired(first: dict[str, Any], second: dict[str, Any]) -> Difference | str:
    """Return second minus first, or why there is none."""
    if not first or not second:
        return "One of the two has no evaluation."
    try:
        pair = [Evaluation.from_dict(side) for side in (first, second)]
    except (KeyError, TypeError, ValueError, AttributeError):
        return "evaluation.json is damaged or of another version."
    for setting in ("samples", "temperature"):
        values = [as_number(side.settings.get(setting)) for side in pair]
        if values[0] != values[1]:
            return f"evaluate.{setting} differs: {values[0]} and {values[1]}."
    try:
        return compare(*pair)
    except ValueError:
        return "They were evaluated on different problems."
    except (KeyError, TypeError, AttributeError):
        return "evaluation.json is damaged or of another version."
