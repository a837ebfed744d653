"""What a comparison found: numbers of every run, means over seeds, and differences paired by seed.

All intervals are Student's t over seeds (:mod:`posttrain.evaluation.seeds`). A number "at the end" is the
mean over the logs of the last tenth of the steps, because a single log of a few groups is noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import mul
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.table import Table

from posttrain.evaluation.seeds import SeedEstimate, over_seeds, paired_over_seeds
from posttrain.report.evaluation import fixed
from posttrain.report.load import Run, as_dict, as_number, read_run
from posttrain.run.arms import Plan, PlannedRun

LEVEL = 0.95
END_SHARE = 0.1
"""Share of the steps that counts as the end of training."""

WHEN = {"after": "after training", "change": "change by training", "before": "before training"}
AT_END = {
    "reward": "reward",
    "entropy": "entropy (nats per token)",
    "completions/mean_length": "completion length (tokens)",
    "completions/clipped_ratio": "completions cut at the limit (share)",
    "frac_reward_zero_std": "groups with equal rewards (share)",
    "kl": "KL from the reference (nats)",
    "loss": "loss",
    "rewards/accuracies": "preference accuracy on training pairs",
    "rewards/margins": "reward margin on training pairs",
    "accuracy": "preference accuracy on training pairs",
    "margin": "reward margin on training pairs",
}
TOTALS = {
    "steps": "steps",
    "tokens": "tokens (prompts and all completions)",
    "completion_tokens": "completion tokens trained on",
    "generated_tokens": "completion tokens generated",
    "seconds": "seconds of training",
}
REFILLED = "dynamic_sampling/extra_tokens"
"""Logged per generation batch: completion tokens of all ranks beyond the first generation."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        run: Which one.
        status: ``finished`` or ``failed``.
        seconds: Wall time of its process, everything included.
        error: Why it failed, "" otherwise.
    """

    run: PlannedRun
    status: str
    seconds: float
    error: str = ""

    @property
    def finished(self) -> bool:
        """Whether its numbers count."""
        return self.status == "finished"

    def text(self) -> str:
        """Return one line for people."""
        if self.finished:
            return f"{self.run.name}: finished in {self.seconds:.0f} s"
        return f"{self.run.name}: FAILED, {self.error} (see {self.run.beside('log')})"

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python values for JSON."""
        return {
            "arm": self.run.arm,
            "seed": self.run.seed,
            "run_dir": str(self.run.run.root),
            "warm_start_of": str(self.run.warm_start_of.run.root) if self.run.warm_start_of else None,
            "status": self.status,
            "seconds": self.seconds,
            "error": self.error,
        }


@dataclass
class Comparison:
    """Arms side by side.

    Attributes:
        plan: The design.
        outcomes: One per run.
        values: Numbers of each run by name, under (arm, seed).
        means: Mean over seeds, by name and arm.
        differences: Arm minus first arm over the seeds both have, by name and arm.
        runs: What was read of each finished run, for the curves.
        notes: What a reader should know.
    """

    plan: Plan
    outcomes: list[Outcome]
    values: dict[tuple[str, int], dict[str, float]]
    means: dict[str, dict[str, SeedEstimate]]
    differences: dict[str, dict[str, SeedEstimate]]
    runs: dict[tuple[str, int], Run]
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every run finished."""
        return all(outcome.finished for outcome in self.outcomes)

    @property
    def arm_names(self) -> list[str]:
        """Names in the order of the command line."""
        return [arm.name for arm in self.plan.arms]

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python values for JSON."""
        runs = [
            {**outcome.to_dict(), "values": self.values.get((outcome.run.arm, outcome.run.seed), {})}
            for outcome in self.outcomes
        ]
        return {
            "arms": {arm.name: list(arm.overrides) for arm in self.plan.arms},
            "seeds": self.plan.seeds,
            "base_seed": self.plan.base_seed,
            "interval": f"{LEVEL:.0%} Student's t over seeds",
            "report": str(self.plan.out / "report.html"),
            "runs": runs,
            "means": _plain(self.means),
            "differences_to": self.arm_names[0],
            "differences": _plain(self.differences),
            "notes": self.notes,
        }

    def sections(self) -> dict[str, dict[str, str]]:
        """Return the rows of the table: heading to (name of a number to its title), only what exists."""
        found: dict[str, dict[str, str]] = {}
        for when, heading in WHEN.items():
            names = [name for name in self.means if name.startswith(f"{when}/")]
            found[f"Held-out, {heading}"] = {name: name.partition("/")[2] for name in names}
        found["End of training"] = {
            f"end/{key}": title for key, title in AT_END.items() if f"end/{key}" in self.means
        }
        found["Cost"] = {
            f"total/{key}": title for key, title in TOTALS.items() if f"total/{key}" in self.means
        }
        return {heading: rows for heading, rows in found.items() if rows}

    def print(self, console: Console) -> None:
        """Print the main rows of the table, then what failed and what to know."""
        console.print(
            f"mean over {self.plan.seeds} seeds [{LEVEL:.0%} t interval]; differences are paired by seed",
            markup=False,
        )
        for name, what in self.plan.switched_on.items():
            console.print(f"{name}: {what}", markup=False, soft_wrap=True)
        first, *others = self.arm_names
        table = Table(box=None, pad_edge=False)
        for title in ("", first, *others, *(f"{name} - {first}" for name in others)):
            table.add_column(title, justify="right" if title else "left")
        for heading, rows in self.sections().items():
            table.add_row(heading, style="bold")
            for name, title in rows.items():
                # the page has them all
                if name.startswith(("before/", "change/")) and not title.startswith(("pass@", "score")):
                    continue
                cells = [self.cell(self.means[name].get(arm)) for arm in self.arm_names]
                cells += [self.cell(self.differences[name].get(arm), signed=True) for arm in others]
                table.add_row(f"  {title}", *cells)
        console.print(table)
        for outcome in self.outcomes:
            if not outcome.finished:
                console.print(outcome.text(), markup=False, soft_wrap=True)
        for note in self.notes:
            console.print(f"note: {note}", markup=False, soft_wrap=True)
        console.print(f"report: {self.plan.out / 'report.html'}", markup=False, soft_wrap=True)

    def cell(self, estimate: SeedEstimate | None, *, signed: bool = False) -> str:
        """Return an estimate as text; seeds are named when some are missing, a * when zero is excluded."""
        if estimate is None or estimate.value is None:
            return "-"
        sign = "+" if signed and estimate.value > 0 else ""
        text = f"{sign}{fixed(estimate.value)}"
        if estimate.low is not None:
            text += f" [{fixed(estimate.low)}, {fixed(estimate.high)}]"
        if estimate.seeds < self.plan.seeds:
            text += f" n={estimate.seeds}"
        return f"{text} *" if signed and estimate.excludes_zero else text


def compare_runs(plan: Plan, outcomes: Sequence[Outcome]) -> Comparison:
    """Read what the finished runs left behind, and set the arms side by side."""
    runs = {
        (outcome.run.arm, outcome.run.seed): read_run(outcome.run.run.root, outcome.run.name)
        for outcome in outcomes
        if outcome.finished
    }
    values = {place: numbers_of(run) for place, run in runs.items()}
    first, *others = [arm.name for arm in plan.arms]
    means: dict[str, dict[str, SeedEstimate]] = {}
    differences: dict[str, dict[str, SeedEstimate]] = {}
    for name in dict.fromkeys(name for numbers in values.values() for name in numbers):
        of_arm = {
            arm.name: [values.get((arm.name, seed), {}).get(name) for seed in range(plan.seeds)]
            for arm in plan.arms
        }
        means[name] = {arm: over_seeds(numbers, confidence=LEVEL) for arm, numbers in of_arm.items()}
        differences[name] = {
            arm: paired_over_seeds(of_arm[first], of_arm[arm], confidence=LEVEL) for arm in others
        }
    notes = [*plan.notes, *_notes(plan, outcomes, runs)]
    return Comparison(plan, list(outcomes), values, means, differences, runs, notes)


def numbers_of(run: Run) -> dict[str, float]:
    """Return the numbers of one run.

    ``before/M``, ``after/M`` and ``change/M`` for every metric M of its evaluation, ``end/KEY`` for every
    logged number, and ``total/...`` for steps, tokens (TRL's count: prompts and every completion sampled),
    completion tokens (mean length times completions of the batches trained on), generated tokens (these and
    what a refill of dead groups generated, thrown away or not) and seconds.
    """
    found: dict[str, float] = {}
    sides = {
        when: {
            name: value
            for name, estimate in as_dict(as_dict(run.evaluation.get(when)).get("metrics")).items()
            if (value := as_number(as_dict(estimate).get("value"))) is not None
        }
        for when in ("after", "before")
    }
    for name, value in sides["after"].items():
        found[f"after/{name}"] = value
    for name, value in sides["after"].items():
        if name in sides["before"]:
            found[f"change/{name}"] = value - sides["before"][name]
    for name, value in sides["before"].items():
        found[f"before/{name}"] = value
    for key in run.names():
        value = at_end(run, key)
        if key not in ("seconds", "num_tokens", "epoch") and value is not None:
            found[f"end/{key}"] = value
    return found | _totals(run)


def at_end(run: Run, key: str) -> float | None:
    """Return the mean of a logged number over the last tenth of the steps; None when it is nowhere finite."""
    steps, numbers = run.series(key)
    known = [(step, value) for step, value in zip(steps, numbers, strict=True) if not math.isnan(value)]
    if not known:
        return None
    last = known[-1][0]
    return fmean(value for step, value in known if step > last * (1 - END_SHARE) or step == last)


def _totals(run: Run) -> dict[str, float]:
    if not run.metrics:
        return {}
    found = {"total/steps": run.metrics[-1][0]}
    for key, name in (("num_tokens", "total/tokens"), ("seconds", "total/seconds")):
        numbers = [value for value in run.series(key)[1] if not math.isnan(value)]
        if numbers:
            found[name] = numbers[-1]
    steps, lengths = run.series("completions/mean_length")
    if steps and not any(math.isnan(length) for length in lengths):
        trainer = as_dict(run.config.get("trainer"))
        processes = as_number(as_dict(run.manifest.get("launch")).get("processes")) or 1
        rows = trainer.get("per_device_train_batch_size", 8) * trainer.get("gradient_accumulation_steps", 1)
        per_step = rows * processes / trainer.get("num_iterations", 1)
        taken = [step - before for before, step in zip([0.0, *steps], steps, strict=False)]
        found["total/completion_tokens"] = per_step * sum(map(mul, taken, lengths))
        more = run.series(REFILLED)[1] or [0.0] * len(steps)
        if len(more) == len(steps) and not any(math.isnan(tokens) for tokens in more):
            accumulated = trainer.get("gradient_accumulation_steps", 1)
            generations = accumulated / (trainer.get("steps_per_generation") or accumulated)
            refilled = generations / trainer.get("num_iterations", 1) * sum(map(mul, taken, more))
            found["total/generated_tokens"] = found["total/completion_tokens"] + refilled
    return found


def _notes(plan: Plan, outcomes: Sequence[Outcome], runs: dict[tuple[str, int], Run]) -> list[str]:
    notes = []
    failed = [outcome for outcome in outcomes if not outcome.finished]
    if failed:
        notes.append(
            f"{len(failed)} of {len(outcomes)} runs failed: "
            f"{'; '.join(outcome.run.name for outcome in failed)}. They are in no mean; a difference "
            f"needs the seed in both arms. A method that fails on some seeds looks better than it is."
        )
    if plan.seeds < 5:
        notes.append(
            f"{plan.seeds} seeds: "
            + ("no interval." if plan.seeds == 1 else "intervals are wide below five.")
        )
    prints = {as_dict(run.manifest.get("data")).get("fingerprint") for run in runs.values()}
    if len(prints) > 1:
        notes.append("The runs did not see the same rows: the fingerprints of their data differ.")
    return notes


def _plain(estimates: dict[str, dict[str, SeedEstimate]]) -> dict[str, dict[str, Any]]:
    return {
        name: {arm: estimate.to_dict() for arm, estimate in of_arm.items()}
        for name, of_arm in estimates.items()
    }
