"""What the logged numbers of a run say, after the fact or while it runs.

The alarms of a running run (:mod:`posttrain.run.rules`) are applied to the whole history, with a patience
that suits its length, so that five logs already say something; what needs a look back over the run is added
here.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from posttrain.doctor.finding import Finding, Severity
from posttrain.run.rules import RULES, Limits, replay

Values = list[tuple[int, float]]
FEWEST = 4
"""Logs below which nothing is said about the course of a number."""

SPIKE = 10.0
"""Multiple of the usual gradient norm that is a spike, where that is above max_grad_norm (1 when unset);
of the loss, multiple of its usual spread."""

_CAUSES = {
    "no_gradient": "",  # the check of that name looks at the whole run and says more
    "entropy_collapse": "the policy has settled on one way of answering, which more steps only confirm",
    "entropy_blow_up": "updates or an entropy bonus push probability to tokens that nothing rewards",
    "length_collapse": "short answers are rewarded as much, or the loss favours them",
    "clipped_completions": "the limit is too low for this task, or the model does not end its answers: a "
    "base model, "
    "or a chat template whose end-of-turn token is not the one that stops generation",
    "dead_groups": "all answers of a group are equally right or equally wrong",
    "failing_verifier": "the reward function raises or runs out of time; those rows count for nothing",
    "rollout_gap": "engine and trainer compute in different precision, sample at another temperature or with "
    "truncation, or the engine has old weights",
    "reward_without_gain": "what is rewarded is no longer what is wanted",
    "suppression": "the loss is content when rejected answers fall, whatever becomes of chosen ones",
    "drastic_drop": "rejected answers are easier to push down than chosen ones to raise",
    "saturation": "the pairs are learned",
    "both_declined": "chosen and rejected answers share most of their tokens",
    "dispersion": "beta or the learning rate lets the policy go far from the reference",
}


@dataclass
class Logs:
    """The logged numbers of one stage.

    Attributes:
        rows: (step, finite numbers) of each log, in order.
        not_finite: Name to the steps at which it was NaN or infinite.
        settings: The ``trainer`` section.
        adapter: Whether an adapter trains.
        generates: Whether the task samples answers.
    """

    rows: Sequence[tuple[float, Mapping[str, float]]]
    not_finite: Mapping[str, Sequence[float]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    adapter: bool = False
    generates: bool = False

    def values(self, name: str) -> Values:
        """Return (step, value) of one number."""
        return [(int(step), row[name]) for step, row in self.rows if name in row]

    def setting(self, name: str) -> float | None:
        """Return a number of the trainer section, or None."""
        value = self.settings.get(name)
        good = isinstance(value, (int, float)) and not isinstance(value, bool)
        return float(value) if good else None  # type: ignore[arg-type]


def course(logs: Logs) -> list[Finding]:
    """Return what the numbers say, one finding each."""
    found = [finding for check in CHECKS for finding in check(logs)]
    names = {finding.name for finding in found}
    # one cause, said once: equal rewards everywhere are more than many dead groups
    hidden = {"dead_groups", "unreadable_answers"} if "constant_reward" in names else set()
    if names & {"not_finite", "learning_rate_zero", "constant_reward"}:
        hidden.add("no_gradient")
    if "dead_groups" in names:  # they have none; a gradient that is always zero is more than that
        found = [row for row in found if row.name != "no_gradient" or row.severity == "error"]
    return [finding for finding in found if finding.name not in hidden]


def alarms(logs: Logs) -> Iterator[Finding]:
    """Apply the rules of a running run."""
    limits = Limits(patience=max(1, min(Limits.patience, len(logs.rows) // 2)))
    if len(logs.rows) < FEWEST:
        return
    raised, history = replay(logs.rows, limits)
    for name, alarm in raised.items():
        if name == "no_gradient":
            continue
        at_the_end = RULES[name](history, limits)
        found, advice = at_the_end or (alarm.message, alarm.advice)
        severity: Severity = "warning"
        if name == "failing_verifier" and at_the_end:
            severity = "error"
        if at_the_end is None:
            severity, found = "note", f"{found}; it passed before the last log"
        yield Finding(name, severity, found, _CAUSES[name], advice, alarm.step)


def not_finite(logs: Logs) -> Iterator[Finding]:
    """A loss, gradient or reward that is not a number."""
    for name in ("loss", "grad_norm", "reward", "entropy", "eval_loss", "kl"):
        steps = logs.not_finite.get(name, ())
        if not steps:
            continue
        total = len(steps) + len(logs.values(name))
        scaled = name == "grad_norm" and bool(logs.settings.get("fp16"))
        yield Finding(
            "not_finite",
            "note" if scaled else "error",
            f"{name} is not a finite number in {len(steps)} of {total} logs",
            "the loss scaler of float16 skips such steps, which is its daily work"
            if scaled
            else "a learning rate that is too high, float16 overflow, an empty row, or a broken start",
            "nothing, unless most logs are like that"
            if scaled
            else "lower trainer.learning_rate, train in bfloat16 or float32, and look at the rows of that "
            "step; what "
            "was trained after it is lost",
            int(steps[0]),
        )
        return


def constant_reward(logs: Logs) -> Iterator[Finding]:
    """One reward for everything."""
    rewards, spread = logs.values("reward"), logs.values("reward_std")
    if len(rewards) < 2 or not spread or any(value > 1e-8 for _, value in spread):
        return
    level = rewards[0][1]
    if any(abs(value - level) > 1e-8 for _, value in rewards):
        return
    verdicts = {
        name.rpartition("/")[2]: logs.values(name)[-1][1]
        for _, row in logs.rows[-1:]
        for name in row
        if name.startswith("verifier/")
    }
    main = max(verdicts, key=lambda status: verdicts[status], default=None)
    told = f"; the verdicts are {verdicts[main]:.0%} {main!r}" if main and verdicts[main] > 0 else ""
    causes = {
        "unparseable": "no answer is found in any completion: the prompt does not ask for the form the "
        "verifier reads, "
        "or completions are cut before it",
        "correct": "the prompts are solved already, or the verifier accepts everything",
        "wrong": "the prompts are out of reach, or the verifier compares with the wrong column",
        "error": "the reward function raises",
        "timeout": "the reward function does not end in time",
    }
    yield Finding(
        "constant_reward",
        "error",
        f"every completion of all {len(rewards)} logs has the reward {level:.3g}{told}; nothing is learned "
        "from that",
        causes.get(main or "", "the reward function returns the same number whatever the answer"),
        "read completions (posttrain samples RUN), call the reward on a right and a wrong answer by hand, "
        "and check "
        "prompt_template, max_completion_length and the answer column",
        rewards[0][0],
    )


def learning_rate(logs: Logs) -> Iterator[Finding]:
    """A learning rate that never gets anywhere."""
    rates = logs.values("learning_rate")
    if not rates:
        return
    highest, asked = max(rate for _, rate in rates), logs.setting("learning_rate")
    if highest < 1e-12 and len(rates) > 1:  # the first step of a warm-up has 0
        yield Finding(
            "learning_rate_zero",
            "error",
            f"the learning rate was {highest:.3g} in all {len(rates)} logs",
            "trainer.learning_rate is 0, or the run ended within its warm-up",
            "set trainer.learning_rate; warmup_steps below the steps of the run",
            rates[0][0],
        )
    elif asked and len(rates) >= FEWEST and highest < 0.1 * asked:
        yield Finding(
            "learning_rate_zero",
            "warning",
            f"the learning rate never rose above {highest:.3g}; trainer.learning_rate is {asked:.3g}",
            "warm-up as long as the run, or longer",
            "lower trainer.warmup_steps, or train longer",
            rates[-1][0],
        )
    elif logs.adapter and highest <= 2e-6 and len(rates) >= FEWEST:
        yield Finding(
            "learning_rate_low_for_adapter",
            "warning",
            f"an adapter was trained with a learning rate of at most {highest:.3g}",
            "TRL's default is for full fine-tuning; adapters need about ten times as much",
            "trainer.learning_rate of 1e-5 to 2e-4",
            rates[0][0],
        )


def no_gradient(logs: Logs) -> Iterator[Finding]:
    """Gradients that are exactly zero."""
    norms = logs.values("grad_norm")
    zero = [step for step, value in norms if value == 0]
    if len(norms) < 2 or len(zero) < 0.5 * len(norms):
        return
    every = len(zero) == len(norms)
    yield Finding(
        "no_gradient",
        "error" if every else "warning",
        f"the gradient was exactly zero in {len(zero)} of {len(norms)} logs",
        "groups with equal rewards have no gradient"
        if logs.generates
        else "no label is scored (all tokens masked or cut), or gradient checkpointing cuts an adapter off "
        "from the loss",
        "see groups/useful and frac_reward_zero_std in metrics.jsonl: other prompts, more generations, or "
        "dynamic_sampling; if they are fine, as for other tasks: "
        "gradient_checkpointing_kwargs: {use_reentrant: false}"
        if logs.generates
        else "gradient_checkpointing_kwargs: {use_reentrant: false}; max_length above the prompts; check "
        "which tokens are "
        "scored",
        zero[0],
    )


def spikes(logs: Logs) -> Iterator[Finding]:
    """Single steps far outside of what is usual."""
    norms, clip = logs.values("grad_norm"), logs.setting("max_grad_norm")
    found: list[tuple[int, float, float]] = []
    for index, (step, value) in enumerate(norms):
        before = [norm for _, norm in norms[max(0, index - 20) : index] if norm > 0]
        if len(before) >= 5 and value > max(SPIKE * statistics.median(before), clip or 1.0):
            found.append((step, value, statistics.median(before)))
    if found:
        step, value, usual = max(found, key=lambda row: row[1] / row[2])
        held = f"; max_grad_norm {clip:g} limits what it did" if clip else ""
        yield Finding(
            "gradient_spike",
            "warning",
            f"{len(found)} spikes of the gradient norm, the largest {value:.3g} where {usual:.3g} was "
            f"usual{held}",
            "a batch unlike the others (damaged or very long rows, one token that became improbable), or a "
            "learning "
            "rate at the edge",
            "look at the rows of that step; lower trainer.max_grad_norm or the learning rate, lengthen "
            "warmup_steps",
            found[0][0],
        )
    if logs.generates:
        return  # the loss of a policy is about 0 by construction and says nothing by its size
    losses = logs.values("loss")
    for index, (step, value) in enumerate(losses):
        before = [loss for _, loss in losses[max(0, index - 20) : index]]
        if len(before) < 5:
            continue
        middle = statistics.median(before)
        spread = statistics.median(abs(loss - middle) for loss in before)
        if value > middle + SPIKE * max(spread, 0.05 * abs(middle)):
            yield Finding(
                "loss_spike",
                "warning",
                f"the loss jumped to {value:.3g} where {middle:.3g} was usual",
                "a batch unlike the others, or a learning rate at the edge",
                "look at the rows of that step; lower the learning rate or max_grad_norm",
                step,
            )
            return


def rising_loss(logs: Logs) -> Iterator[Finding]:
    """A loss that ends above where it began, or a held-out one that turned."""
    losses = [] if logs.generates else logs.values("loss")
    part = max(1, len(losses) // 5)
    if len(losses) >= 5:
        first = statistics.fmean(value for _, value in losses[:part])
        last = statistics.fmean(value for _, value in losses[-part:])
        if last > first + 0.2 * abs(first):
            yield Finding(
                "loss_rose",
                "warning",
                f"the loss rose from {first:.3g} to {last:.3g}",
                "a learning rate that is too high, or rows in order of difficulty",
                "lower trainer.learning_rate by 3 to 10 times, add warm-up, shuffle",
                losses[-1][0],
            )
    held_out = logs.values("eval_loss")
    if len(held_out) >= 3:
        step, best = min(held_out, key=lambda row: row[1])
        last = held_out[-1][1]
        if last > best + 0.05 * abs(best) and step != held_out[-1][0]:
            yield Finding(
                "overfitting",
                "warning",
                f"the held-out loss was lowest at step {step} ({best:.3g}) and is {last:.3g} at the end",
                "the rows are learned by heart: too many epochs, too few rows, or too many weights for them",
                "load_best_model_at_end with metric_for_best_model: eval_loss, fewer epochs, an adapter or "
                "a selection",
                step,
            )


def wasted_groups(logs: Logs) -> Iterator[Finding]:
    """How much of what was generated could teach something."""
    shares = [value for _, value in logs.values("groups/useful")]
    shares = shares or [1 - value for _, value in logs.values("frac_reward_zero_std")]
    if len(shares) < FEWEST:
        return
    useful = statistics.fmean(shares)
    if 0 < useful < 0.5:
        rewards = [value for _, value in logs.values("reward")]
        level = f" at a mean reward of {statistics.fmean(rewards):.3g}" if rewards else ""
        yield Finding(
            "wasted_groups",
            "note",
            f"over the whole run {useful:.0%} of the groups could teach something{level}",
            "prompts that are always or never solved; their completions were generated for nothing",
            "methods.dynamic_sampling replaces them, methods.skip_zero_advantage saves training on them; or "
            "choose "
            "prompts by difficulty",
        )


def unreadable_answers(logs: Logs) -> Iterator[Finding]:
    """Completions in which no answer is found."""
    if len(logs.rows) < FEWEST:
        return
    for name in logs.rows[-1][1]:
        if not (name.startswith("verifier/") and name.endswith("/unparseable")):
            continue
        recent = [value for _, value in logs.values(name)][-max(1, len(logs.rows) // 4) :]
        share = statistics.fmean(recent)
        if share > 0.5:
            yield Finding(
                "unreadable_answers",
                "warning",
                f"{share:.0%} of the completions towards the end hold no answer that {name.split('/')[1]!r} "
                "can read",
                "the prompt does not say in which form to answer, completions are cut before the answer, or "
                "the model "
                "does not know the form",
                "say it in data.prompt_template or system_prompt, raise max_completion_length, warm-start "
                "on the form",
                int(logs.rows[-1][0]),
            )


def slowing(logs: Logs) -> Iterator[Finding]:
    """Steps that take longer and longer."""
    times = [(step, value) for step, value in logs.values("step_time") if value > 0 and math.isfinite(value)]
    if len(times) < 8:
        return
    part = len(times) // 4
    first = statistics.median(value for _, value in times[:part])
    last = statistics.median(value for _, value in times[-part:])
    if last > 3 * first:
        yield Finding(
            "slowing",
            "note",
            f"a step took {first:.3g} s in the beginning and {last:.3g} s towards the end",
            "longer completions, verifiers that run into their deadline, or another job on the machine",
            "see completions/mean_length and verifier/*/timeout in metrics.jsonl",
            times[-part][0],
        )


CHECKS: tuple[Callable[[Logs], Iterator[Finding]], ...] = (
    not_finite,
    constant_reward,
    learning_rate,
    no_gradient,
    alarms,
    unreadable_answers,
    spikes,
    rising_loss,
    wasted_groups,
    slowing,
)
