"""The training part of a page: which logged numbers are shown, under which names, in which groups."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from posttrain.report.charts import SMOOTH_FROM, Line, line_chart, moving_average, number, window_for
from posttrain.report.load import Run

MAIN = {
    "reward": "Reward",
    "loss": "Loss",
    "rewards/accuracies": "Preference accuracy",
    "rewards/margins": "Reward margin, chosen minus rejected",
    "mean_token_accuracy": "Token accuracy",
    "entropy": "Entropy (nats per token)",
    "completions/mean_length": "Completion length (tokens)",
    "completions/clipped_ratio": "Completions cut at the limit (share)",
    "groups/useful": "Groups that teach something (share)",
    "frac_reward_zero_std": "Groups with equal rewards (share)",
    "reward_std": "Standard deviation of the reward",
    "kl": "KL divergence from the reference (nats)",
    "grad_norm": "Gradient norm",
    "learning_rate": "Learning rate",
    "accuracy": "Preference accuracy",
    "margin": "Reward margin, chosen minus rejected",
}
CARDS = {
    "rlvr": {"reward": "training reward", "entropy": "entropy, nats"},
    "ttrl": {"reward": "training reward", "entropy": "entropy, nats"},
    "sft": {"loss": "training loss", "mean_token_accuracy": "token accuracy"},
    "preference": {"rewards/accuracies": "training accuracy", "rewards/margins": "reward margin"},
    "reward": {"accuracy": "training accuracy", "margin": "reward margin"},
}
"""Numbers whose start and end stand at the top of a page, by task."""
EXPECTED = {
    "rlvr": ("reward", "loss", "entropy", "completions/mean_length"),
    "ttrl": ("reward", "ttrl/majority_ratio", "loss", "entropy", "completions/mean_length"),
    "sft": ("loss", "mean_token_accuracy"),
    "preference": ("loss", "rewards/accuracies", "rewards/margins"),
    "reward": ("loss", "accuracy", "margin"),
}
SIDES = {
    "logps": "Log-likelihood of an answer (nats)",
    "logps_per_token": "Log-likelihood (nats per token)",
    "shift": "Log-ratio to the reference (nats)",
    "rewards": "Implicit reward",
    "logits": "Mean logit",
}
"""Numbers that are logged for chosen and rejected answers, drawn in one chart."""
LIKELIHOODS = "Likelihoods of the pairs"
PAIRS = frozenset({*SIDES, "drop", "grad_scale", "saturated", "suppression", "length", "overlap", "probe"})
EVALUATION = "Evaluation, during training"
UPSTREAM = frozenset({"completions", "clip_ratio", "sampling", "tools", "eval", "profiling", "train"})
CLOCKS = frozenset({"epoch", "seconds"})


@dataclass
class Figure:
    """One chart: title, drawing, and in words where a single run started and ended."""

    title: str
    svg: Markup
    change: str = ""


@dataclass
class Group:
    """Charts under one heading."""

    title: str
    figures: list[Figure] = field(default_factory=list)
    constants: list[str] = field(default_factory=list)
    note: str = ""


def build(runs: Sequence[Run]) -> list[Group]:
    """Return the groups of charts of one or several runs, in the order of the page."""
    keys = list(dict.fromkeys(key for run in runs for key in run.names()))
    methods = {name for run in runs for name in method_names(run)}
    grouped: dict[str, list[str]] = {"Training": [key for key in MAIN if key in keys]}
    pairs = "rewards/margins" in keys
    for key in keys:
        if key in MAIN or key in CLOCKS:
            continue
        own = pairs and key.partition("/")[0] in PAIRS
        grouped.setdefault(LIKELIHOODS if own else _heading(key, methods), []).append(key)
    order = sorted(grouped, key=lambda name: (name == OTHER, name.startswith("Method"), name != "Training"))
    groups = [_group(name, grouped[name], runs) for name in order]
    return [group for group in groups if group.figures or group.constants]


HELD_OUT = "Held-out, during training"
SELECTION = "Selection of weights"
OTHER = "Everything else that was logged"


def method_names(run: Run) -> list[str]:
    """Return the names under ``methods`` of the run's configuration."""
    methods = run.config.get("methods")
    return [str(name) for name in methods] if isinstance(methods, dict | list) else []


def missing(run: Run) -> list[str]:
    """Return a note for every number that this kind of run should have logged and did not."""
    logged = set(run.names())
    return [
        f"metrics.jsonl has no {key!r}: the chart of {MAIN[key]} is left out."
        for key in EXPECTED.get(str(run.config.get("task")), ())
        if run.metrics and key not in logged
    ]


def cards(run: Run) -> list[tuple[str, tuple[float, float]]]:
    """Return (title, (start, end)) of the numbers at the top of the page."""
    wanted = CARDS.get(str(run.config.get("task")), CARDS["rlvr"])
    found = ((title, start_and_end(run, key)) for key, title in wanted.items())
    return [(title, ends) for title, ends in found if ends is not None]


def start_and_end(run: Run, key: str) -> tuple[float, float] | None:
    """Return the first and last value of a logged number, of long series smoothed; None without any."""
    _, values = run.series(key)
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return None
    if len(known) < SMOOTH_FROM:
        return known[0], known[-1]
    means = moving_average(known, window_for(len(known)))
    return means[0], means[-1]


def _heading(key: str, methods: set[str]) -> str:
    prefix, slash, _ = key.partition("/")
    if prefix.startswith("eval_"):
        return EVALUATION
    if prefix in ("rewards", "verifier"):
        return "Rewards and verifiers"
    if prefix == "held_out":
        return HELD_OUT
    if prefix == "selection":
        return SELECTION
    if prefix in ("rollout_gap", "sampling"):
        return "Sampler against trainer"
    if prefix in methods or (slash and prefix not in UPSTREAM):
        return f"Method: {prefix}"
    return OTHER


def _lines(key: str, runs: Sequence[Run], *, side: str = "") -> list[Line]:
    """Return a line for every run that has logged a number, those of rejected answers dashed."""
    lines = []
    for style, run in enumerate(runs):
        x, y = run.series(key)
        if any(not math.isnan(value) for value in y):
            lines.append(Line(f"{run.label} {side}".strip(), x, y, style=style, dashed=side == "rejected"))
    return lines


def _with_sides(group: Group, keys: list[str], runs: Sequence[Run]) -> list[str]:
    """Draw what is known of both answers of a pair in one chart, and return the other keys."""
    drawn = set()
    for key in keys:
        kind, _, side = key.partition("/")
        other, title = f"{kind}/rejected", SIDES.get(kind.removeprefix("eval_"))
        if side != "chosen" or other not in keys or title is None:
            continue
        lines = [*_lines(key, runs, side="chosen"), *_lines(other, runs, side="rejected")]
        if lines:
            group.figures.append(Figure(f"{title}: chosen, rejected dashed", line_chart(title, lines)))
            drawn |= {key, other}
    return [key for key in keys if key not in drawn]


def _group(name: str, keys: list[str], runs: Sequence[Run]) -> Group:
    group = Group(name)
    for key in _with_sides(group, keys, runs):
        lines = _lines(key, runs)
        if not lines:
            continue
        values = {value for line in lines for value in line.y}
        if len(values) == 1 and len(lines[0].y) > 1 and key not in MAIN:
            group.constants.append(f"{key} = {number(values.pop())}")
            continue
        title = MAIN.get(key) or (key.partition("/")[2] if name.startswith("Method") else key)
        figure = Figure(title, line_chart(title, lines))
        ends = start_and_end(runs[0], key) if len(runs) == 1 else None
        if ends and len(lines[0].y) > 1:
            figure.change = f"{number(ends[0])} → {number(ends[1])}"
        group.figures.append(figure)
    longest = max((len(run.metrics) for run in runs), default=0)
    if longest >= SMOOTH_FROM:
        group.note = f"Thin: each log. Thick: centred mean over {window_for(min(longest, 300))} points."
    return group
