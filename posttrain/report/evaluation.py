"""The evaluation part of a page: headline, pass@k curves, verdicts, and problems that changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from posttrain.report.charts import Line, line_chart, number
from posttrain.report.load import Run, as_dict, as_number

TITLES = {
    "score": "mean score",
    "coverage": "coverage (solved at least once)",
    "distinct_answers": "distinct answers per problem",
    "length": "mean length (tokens)",
    "clipped": "cut at the length limit",
    "accuracy": "preference accuracy",
    "margin": "reward margin, chosen minus rejected",
    "chosen_shift": "log-likelihood of chosen answers against the start (nats)",
    "rejected_shift": "log-likelihood of rejected answers against the start (nats)",
    "kl": "KL from the start, per continuation (nats)",
    "kl_per_token": "KL from the start, per token (nats)",
    "kl_k3": "KL from the start, per continuation, k3 (nats)",
    "kl_k3_per_token": "KL from the start, per token, k3 (nats)",
    "win_rate": "win rate against the start",
    "self_bleu": "self-BLEU within a prompt (1: all the same)",
    "log_loss": "log-loss of the preference",
    "brier": "Brier score of the preference",
    "calibration_error": "calibration error (expected, ten bins)",
}
SHOWN_PROBLEMS = 12
FAILED_SHARE = 0.01
"""Share of samples without a verdict from which the page warns; below, the table of verdicts says it."""


@dataclass
class Row:
    """One metric: its estimate before, after and their difference; None where it does not exist."""

    title: str
    before: dict[str, Any] | None
    after: dict[str, Any] | None
    difference: dict[str, Any] | None
    verdict: str = ""


@dataclass
class Side:
    """Verdicts of one evaluation: (status, count, share) in order."""

    name: str
    verdicts: list[tuple[str, int, float]]


@dataclass
class View:
    """What the template shows of an evaluation."""

    headline: Row | None = None
    widest: Row | None = None
    sentence: str = ""
    rows: list[Row] = field(default_factory=list)
    charts: list[tuple[str, Markup]] = field(default_factory=list)
    sides: list[Side] = field(default_factory=list)
    newly_solved: int | None = None
    lost: int | None = None
    problems: list[dict[str, Any]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    level: str = ""
    speed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    both: bool = False


def build(run: Run) -> View | None:
    """Return the view of a run's evaluation, or None when there is none at all."""
    sides: dict[str, dict[str, Any]] = {
        name: run.evaluation[name] for name in ("before", "after") if name in run.evaluation
    }
    if not sides:
        return None
    metrics = {name: as_dict(side.get("metrics")) for name, side in sides.items()}
    difference = as_dict(as_dict(run.evaluation.get("difference")).get("metrics"))
    view = View(both=len(sides) == 2)
    names = list(dict.fromkeys(name for side in metrics.values() for name in side))
    for name in names:
        row = Row(
            TITLES.get(name, name),
            as_estimate(metrics.get("before", {}).get(name)),
            as_estimate(metrics.get("after", {}).get(name)),
            as_estimate(difference.get(name)),
        )
        row.verdict = verdict(row.difference)
        view.rows.append(row)
    chosen = _headline_name(metrics)
    named = dict(zip(names, view.rows, strict=True))
    view.headline = named.get(chosen)
    passes = sorted((name for name in names if _k(name, "pass")), key=lambda name: _k(name, "pass"))
    if passes and passes[-1] != chosen:
        view.widest = named[passes[-1]]
    elif chosen == "accuracy":
        view.widest = named.get("win_rate") or named.get("log_loss")
    for name in dict.fromkeys(name for side in sides.values() for name in as_dict(side.get("distinct"))):
        first, second = (as_dict(as_dict(sides.get(side)).get("distinct")) for side in ("before", "after"))
        view.rows.append(
            Row(name, as_estimate({"value": first.get(name)}), as_estimate({"value": second.get(name)}), None)
        )
    latest = sides.get("after") or sides["before"]
    view.settings = {"samples": "?", "temperature": "?"} | as_dict(latest.get("settings"))
    view.level = _level(view.settings)
    for name, side in sides.items():
        seconds, speed = as_number(side.get("seconds")), as_number(side.get("tokens_per_second"))
        if seconds is not None and speed is not None:
            view.speed.append(f"{name}: {seconds:.1f} s, {number(speed)} tokens/s")
    view.sentence = _sentence(view.headline, view.settings, sides)
    for kind, title in (("pass", "pass@k"), ("maj", "maj@k")):
        chart = _at_k(metrics, kind, title)
        if chart is not None:
            view.charts.append((title, chart))
    for name, side in sides.items():
        counts = _counts(side)
        total = sum(counts.values())
        if total == counts.get("skipped", 0):
            continue  # nothing was judged: a reward model writes nothing, or no reward is named
        shares = [(status, count, count / total if total else 0.0) for status, count in counts.items()]
        view.sides.append(Side(name, shares))
    if "difference" in run.evaluation:
        solved, lost = (run.evaluation["difference"].get(key) for key in ("newly_solved", "lost"))
        view.newly_solved = len(solved) if isinstance(solved, list) else None
        view.lost = len(lost) if isinstance(lost, list) else None
    view.problems = _problems(run.evaluation)
    view.notes = [f"The evaluation {name} is missing." for name in ("before", "after") if name not in sides]
    if view.both and not difference:
        view.notes.append("The paired difference is missing, so no interval of the change can be given.")
    return view


def fixed(value: float | None) -> str:
    """Return a number with three decimals (fewer when large), or a dash."""
    if value is None:
        return "–"
    return f"{value:.3f}".replace("-", "−") if abs(value) < 100 else number(value)


def signed(value: float | None) -> str:
    """Return :func:`fixed` with its sign."""
    return f"+{fixed(value)}" if value is not None and value > 0 else fixed(value)


def interval(estimate: dict[str, Any] | None) -> str:
    """Return ``[low, high]``, or nothing when there is no interval."""
    if not estimate or estimate.get("low") is None or estimate.get("high") is None:
        return ""
    return f"[{fixed(estimate['low'])}, {fixed(estimate['high'])}]"


def alarms(run: Run) -> list[tuple[str, str]]:
    """Return (what was found, what to try) of what spoils the numbers of an evaluation."""
    found = []
    for name in ("before", "after"):
        side = as_dict(run.evaluation.get(name))
        verdicts = _counts(side)
        total = sum(verdicts.values())
        failed = verdicts.get("error", 0) + verdicts.get("timeout", 0)
        if failed > FAILED_SHARE * total:
            text = (
                f"Evaluation {name}: the verifier failed on {failed} of {total} samples "
                f"({verdicts.get('error', 0)} errors, "
                f"{verdicts.get('timeout', 0)} timeouts). They count neither as right nor as wrong."
            )
            found.append((text, "posttrain samples --held-out --only error shows them; a longer deadline"))
        clipped = _value(side, "clipped")
        if clipped > 0.2:
            text = f"Evaluation {name}: {clipped:.0%} of the completions were cut at the length limit."
            found.append((text, "raise evaluate.max_new_tokens before trusting what depends on their ends"))
    return found


def _headline_name(metrics: dict[str, dict[str, Any]]) -> str:
    """Return pass@(smallest k), the score where nothing ever counts as solved, the accuracy on pairs."""
    names = list(dict.fromkeys(name for side in metrics.values() for name in side))
    if "accuracy" in names:
        return "accuracy"
    passes = sorted((name for name in names if _k(name, "pass")), key=lambda name: _k(name, "pass"))
    solved = any(_value({"metrics": side}, "coverage") > 0 for side in metrics.values())
    return "score" if "score" in names and not (solved and passes) else (passes[0] if passes else "score")


def _sentence(row: Row | None, settings: dict[str, Any], sides: dict[str, Any]) -> str:
    if row is None:
        return "The evaluation holds no metric."
    before, after = as_dict(row.before), as_dict(row.after)
    if len(sides) < 2:
        only, side = ("after", after) if after else ("before", before)
        other = "starting" if only == "after" else "trained"
        return (
            f"Held-out {row.title} {only} training is {fixed(side.get('value'))} {interval(side)}; "
            f"the {other} model was not evaluated."
        )
    change = as_dict(row.difference)
    text = f"Held-out {row.title} went from {fixed(before.get('value'))} to {fixed(after.get('value'))}"
    if not interval(change):
        return f"{text}; there is no interval of the change."
    text += f": {signed(change.get('value'))}, {_level(settings)} interval {interval(change)}. "
    if row.verdict == "none":
        return text + "The interval includes zero: no change can be claimed."
    return text + f"The interval excludes zero: a {'rise' if row.verdict == 'up' else 'fall'}."


def verdict(difference: dict[str, Any] | None) -> str:
    """Return ``up`` or ``down`` where the interval excludes zero, ``none`` where it does not, or nothing."""
    low, high = as_dict(difference).get("low"), as_dict(difference).get("high")
    if low is None or high is None:
        return ""
    return "up" if low > 0 else "down" if high < 0 else "none"


def _at_k(metrics: dict[str, dict[str, Any]], kind: str, title: str) -> Markup | None:
    found = [
        _line_at_k(metrics.get("before", {}), kind, "before", style=1, dashed=True),
        _line_at_k(metrics.get("after", {}), kind, "after", style=0),
    ]
    lines = [line for line in found if line is not None]
    return _chart_at_k(title, lines) if lines else None


def overlay(runs: Sequence[Run]) -> list[tuple[str, Markup]]:
    """Return pass@k and maj@k of the trained models of several runs, each in one chart."""
    charts = []
    for kind, title in (("pass", "pass@k after training"), ("maj", "maj@k after training")):
        found = [
            _line_at_k(
                as_dict(as_dict(run.evaluation.get("after")).get("metrics")), kind, run.label, style=style
            )
            for style, run in enumerate(runs)
        ]
        lines = [line for line in found if line is not None]
        if lines:
            charts.append((title, _chart_at_k(title, lines)))
    return charts


def _line_at_k(
    metrics: dict[str, Any], kind: str, label: str, *, style: int, dashed: bool = False
) -> Line | None:
    points = []
    for name, value in metrics.items():
        k, estimate = _k(name, kind), as_estimate(value)
        if k and estimate is not None and estimate["value"] is not None:
            points.append((k, estimate["value"], estimate["low"], estimate["high"]))
    if not points:
        return None
    ks, values, lows, highs = zip(*sorted(points, key=lambda point: point[0]), strict=True)
    return Line(label, ks, values, style=style, low=lows, high=highs, dashed=dashed)


def _chart_at_k(title: str, lines: list[Line]) -> Markup:
    return line_chart(
        f"Held-out {title}", lines, x_label="k", log2_x=True, smooth=False, y_range=(0.0, 1.0), height=236
    )


def _problems(evaluation: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the problems whose share of correct samples changed most, both ways in turn."""
    sides = {name: _by_index(as_dict(evaluation.get(name)).get("problems")) for name in ("before", "after")}
    latest = sides["after"] or sides["before"]
    rows: list[dict[str, Any]] = []
    for index, problem in latest.items():
        before = sides["before"].get(index) if sides["after"] else None
        rows.append(
            {
                "prompt": problem.get("prompt"),
                "gold": problem.get("gold"),
                "before": _count(before),
                "after": _count(problem),
                "sample": next(iter(_list(problem.get("samples"))), None),
                "change": _share(problem) - _share(before) if before else 0.0,
            }
        )
    ranked = sorted(rows, key=lambda row: -row["change"])
    best, worst = ranked[: SHOWN_PROBLEMS // 2], ranked[SHOWN_PROBLEMS // 2 :][-(SHOWN_PROBLEMS // 2) :]
    return best + worst


def _by_index(problems: Any) -> dict[float, dict[str, Any]]:
    found = {}
    for place, problem in enumerate(_list(problems)):
        index = as_number(problem.get("index"))
        found[place if index is None else index] = problem
    return found


def _share(problem: dict[str, Any]) -> float:
    n, c = as_number(problem.get("n")), as_number(problem.get("c"))
    return c / n if n and c is not None else 0.0


def _count(problem: dict[str, Any] | None) -> str:
    if problem is None or as_number(problem.get("n")) is None or as_number(problem.get("c")) is None:
        return "–"
    return f"{problem['c']}/{problem['n']}"


def _k(name: str, kind: str) -> int:
    """Return the k of ``kind@k``, or 0 for any other name."""
    head, _, tail = name.partition("@")
    return int(tail) if head == kind and tail.isdecimal() else 0


def as_estimate(value: Any) -> dict[str, Any] | None:
    """Return an estimate with all its keys, or None without one; what is no finite number becomes None."""
    if not isinstance(value, dict):
        return None
    return {key: as_number(value.get(key)) for key in ("value", "low", "high", "problems", "left_out")}


def _value(side: dict[str, Any], metric: str) -> float:
    return as_number(as_dict(as_dict(side.get("metrics")).get(metric)).get("value")) or 0.0


def _counts(side: dict[str, Any]) -> dict[str, int]:
    counts = as_dict(side.get("verdicts"))
    return {status: int(count) for status, count in counts.items() if as_number(count) is not None}


def _level(settings: dict[str, Any]) -> str:
    level = as_number(settings.get("confidence"))
    return f"{100 * level:.3g} %" if level is not None else "?"


def _list(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
