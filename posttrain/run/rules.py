"""Rules over what a run logs: what is going wrong, and what to try.

A rule sees the smoothed history of the logs and fires once per run. The limits are parameters with defaults
that are meant to be late rather than shrill. :mod:`posttrain.run.alarms` applies them while a run trains,
``posttrain doctor`` to what a run has written. Nothing here imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Limits:
    """When an alarm goes off.

    Attributes:
        patience: Logs over which a number is averaged, and the fewest needed.
        entropy_low: Share of the starting entropy below which it has collapsed.
        entropy_floor: Entropy in nats per token that counts as collapsed whatever the start.
        entropy_high: Multiple of the starting entropy above which it blows up (and at least 1 nat more).
        length_low: Share of the starting length below which completions have collapsed.
        clipped: Share of completions cut at the limit.
        dead_groups: Share of groups whose rewards are all equal.
        failures: Share of verdicts that are errors or timeouts.
        logp_gap: Mean rollout/trainer log-probability gap, nats per token.
        logp_tail: Share of tokens whose probabilities differ by more than 10 % between rollout and trainer.
        held_out_drop: Fall of the held-out reward or pass@k from its best while the training reward rises.
        chosen_fall: Fall of the likelihood of chosen answers below the reference, nats per token, at which a
            growing margin counts as mere suppression of the rejected ones. A fall alone is no fault.
        rejected_fall: The same of rejected answers, for the drastic drop,
        drop_ratio: and how many times the shift of the chosen ones it has to be.
        saturated: Share of pairs at which the loss has stopped pulling (sigma(-z) < 0.01).
        declined: Share of pairs with both answers less likely than under the reference; only once the chosen
            ones have fallen by half of ``chosen_fall``.
        probe_rise: Rise of answers in no pair, nats an answer, while the chosen ones fall.
        probe_kl: KL(ref || policy) on them, nats per token.
    """

    patience: int = 5
    entropy_low: float = 0.1
    entropy_floor: float = 0.02
    entropy_high: float = 2.0
    length_low: float = 0.3
    clipped: float = 0.5
    dead_groups: float = 0.8
    failures: float = 0.05
    logp_gap: float = 0.05
    logp_tail: float = 0.25
    held_out_drop: float = 0.05
    chosen_fall: float = 0.1
    rejected_fall: float = 0.5
    drop_ratio: float = 5.0
    saturated: float = 0.8
    declined: float = 0.8
    probe_rise: float = 2.0
    probe_kl: float = 0.5


@dataclass(frozen=True)
class Alarm:
    """Something is going wrong.

    Attributes:
        name: Stable name, for scripts.
        step: Optimiser step at which it was seen.
        message: What was seen.
        advice: What to try.
    """

    name: str
    step: int
    message: str
    advice: str


class History:
    """Numbers logged so far, by name, without those that are missing or not finite."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {}

    def add(self, logs: Mapping[str, Any]) -> None:
        """Take one log in."""
        for name, value in logs.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                self._values.setdefault(name, []).append(float(value))

    def start(self, name: str, count: int) -> float | None:
        """Mean of the first ``count`` values, or None before there are that many."""
        values = self._values.get(name, [])
        return sum(values[:count]) / count if len(values) >= count else None

    def now(self, name: str, count: int) -> float | None:
        """Mean of the last ``count`` values, or None before there are twice that many."""
        values = self._values.get(name, [])
        return sum(values[-count:]) / count if len(values) >= 2 * count else None

    def latest(self, name: str, count: int) -> list[float] | None:
        """Last ``count`` values, or None before there are that many."""
        values = self._values.get(name, [])
        return values[-count:] if len(values) >= count else None

    def best(self, name: str) -> float | None:
        """Largest value."""
        return max(self._values[name]) if name in self._values else None

    def last(self, name: str) -> float | None:
        """Latest value."""
        return self._values[name][-1] if name in self._values else None

    def names(self) -> list[str]:
        """Every name seen."""
        return sorted(self._values)


Rule = Callable[[History, Limits], tuple[str, str] | None]


def entropy_collapse(history: History, limits: Limits) -> tuple[str, str] | None:
    """The policy has become almost deterministic."""
    start, now = history.start("entropy", limits.patience), history.now("entropy", limits.patience)
    if start is None or now is None or now >= max(limits.entropy_low * start, limits.entropy_floor):
        return None
    found = f"entropy fell from {start:.3g} to {now:.3g} nats per token"
    if _on_pairs(history):
        return found, f"the policy is becoming deterministic on the pairs: {_GENTLER}"
    return (
        found,
        "exploration is over: lower the learning rate, raise epsilon_high (0.28), or switch on a method that "
        "keeps entropy (posttrain methods)",
    )


def entropy_blow_up(history: History, limits: Limits) -> tuple[str, str] | None:
    """The policy is dissolving into noise."""
    start, now = history.start("entropy", limits.patience), history.now("entropy", limits.patience)
    if start is None or now is None or now <= max(limits.entropy_high * start, start + 1.0):
        return None
    found = f"entropy rose from {start:.3g} to {now:.3g} nats per token"
    if _on_pairs(history):
        return found, f"probability leaves the answers of the pairs: {_GENTLER}"
    return (
        found,
        "lower the learning rate, epsilon_high or the entropy bonus; look at the completions",
    )


def length_collapse(history: History, limits: Limits) -> tuple[str, str] | None:
    """Completions have become a fraction of what they were."""
    name = "completions/mean_length"
    start, now = history.start(name, limits.patience), history.now(name, limits.patience)
    if start is None or now is None or start < 8 or now >= limits.length_low * start:
        return None
    return (
        f"completions shortened from {start:.0f} to {now:.0f} tokens",
        "look whether the reward can be had without an answer; use loss_type=dapo or dr_grpo, which have no "
        "length bias",
    )


def clipped_completions(history: History, limits: Limits) -> tuple[str, str] | None:
    """Most completions are cut before they end."""
    now = history.now("completions/clipped_ratio", limits.patience)
    reward, best = history.now("reward", limits.patience), history.best("reward")
    if (
        now is None
        or now <= limits.clipped
        or (reward is not None and best is not None and reward >= 0.9 * best > 0)
    ):
        return None
    return (
        f"{now:.0%} of the completions are cut at max_completion_length",
        "raise max_completion_length, or set mask_truncated_completions=true",
    )


def dead_groups(history: History, limits: Limits) -> tuple[str, str] | None:
    """Most groups have nothing to learn from."""
    name = "frac_reward_zero_std"
    now, reward = history.now(name, limits.patience), history.now("reward", limits.patience)
    if now is None and history.start(name, limits.patience) == 1:
        # not one group that differs: no need to wait for more
        now, reward = 1.0, history.start("reward", limits.patience)
    if now is None or now <= limits.dead_groups:
        return None
    level = "" if reward is None else f" at a mean reward of {reward:.3g}"
    return (
        f"{now:.0%} of the groups have equal rewards{level} and teach nothing",
        "a high reward means the prompts are too easy, a low one too hard, an unchanging one a constant "
        "reward: choose other prompts, raise num_generations, or refill dead groups with dynamic_sampling",
    )


def failing_verifier(history: History, limits: Limits) -> tuple[str, str] | None:
    """A verifier errs or runs out of time too often."""
    for name in history.names():
        if name.startswith("verifier/") and name.endswith(("/error", "/timeout")):
            now = history.now(name, limits.patience)
            if now is not None and now > limits.failures:
                _, verifier, kind = name.split("/", 2)
                return (
                    f"{now:.0%} of the verdicts of {verifier!r} end in {kind}",
                    "see the status column of completions.jsonl; raise the deadline or mend the verifier",
                )
    return None


def rollout_gap(history: History, limits: Limits) -> tuple[str, str] | None:
    """The rollout engine and the trainer disagree about probabilities."""
    mean = history.now("sampling/sampling_logp_difference/mean", limits.patience)
    tail = history.now("rollout_gap/over_10_percent", limits.patience)
    if mean is not None and mean > limits.logp_gap:
        found = f"rollout and trainer log-probabilities differ by {mean:.3g} nats per token on average"
    elif tail is not None and tail > limits.logp_tail:
        found = f"rollout and trainer disagree by more than 10 % about {tail:.0%} of the tokens"
    else:
        return None
    return (
        found,
        "check that both compute in one type, unquantised, and at one temperature; a gap that grows means "
        "weights that do not arrive: see posttrain/rollout/verify.py",
    )


def reward_without_gain(history: History, limits: Limits) -> tuple[str, str] | None:
    """The training reward rises while the held-out one, or held-out pass@k, falls."""
    start, now = history.start("reward", limits.patience), history.now("reward", limits.patience)
    if start is None or now is None or now <= start:
        return None
    judges = [name for name in history.names() if name == "eval_reward" or name.startswith("held_out/pass@")]
    falls = {name: (history.best(name) or 0.0) - (history.last(name) or 0.0) for name in judges}
    worst = max(falls, key=lambda name: falls[name], default=None)
    if worst is None or falls[worst] <= limits.held_out_drop:
        return None
    called = "held-out reward" if worst == "eval_reward" else worst.replace("held_out/", "held-out ")
    advice = (
        "the policy overfits or exploits the reward: stop at the best checkpoint, read completions, "
        "add prompts"
    )
    if worst.startswith("held_out/") and worst != "held_out/pass@1":
        advice = (
            "the policy narrows to fewer ways of answering: lower the learning rate, raise epsilon_high "
            "(0.28), or switch on a method that keeps pass@k up (ace, lp_reg, aepo)"
        )
    return (
        f"training reward rose from {start:.3g} to {now:.3g}, {called} fell from "
        f"{history.best(worst):.3g} to {history.last(worst):.3g}",
        advice,
    )


_GENTLER = (
    "lower the learning rate or raise beta; keep chosen answers up with rpo (eta: 0.005, or 0.2 with "
    "normalization: token_mean), or weaken the rejected side with flex_dpo (beta_rejected below beta)"
)


def _on_pairs(history: History) -> bool:
    """Whether the run is one of preferences."""
    return history.last("rewards/margins") is not None


def _shift(history: History, side: str, limits: Limits) -> float | None:
    """Return how far answers are from their likelihood under the reference now, in nats per token."""
    names = (f"shift/{side}", f"logps/{side}", f"logps_per_token/{side}")
    shift, whole, mean = (history.now(name, limits.patience) for name in names)
    return None if shift is None or not whole or not mean else shift * mean / whole


def suppression(history: History, limits: Limits) -> tuple[str, str] | None:
    """The margin only grows because rejected answers fall faster than chosen ones."""
    fall, name = _shift(history, "chosen", limits), "rewards/margins"
    start, now = history.start(name, limits.patience), history.now(name, limits.patience)
    if fall is None or start is None or now is None or now <= start or fall >= -limits.chosen_fall:
        return None
    return (
        f"chosen answers became less likely than under the reference, by {-fall:.3g} nats per token, while "
        f"the margin grew from {start:.3g} to {now:.3g}",
        f"the loss only suppresses rejected answers. Unless wins rise all the same, {_GENTLER}",
    )


def drastic_drop(history: History, limits: Limits) -> tuple[str, str] | None:
    """The likelihood of rejected answers collapses."""
    chosen, rejected = (_shift(history, side, limits) for side in ("chosen", "rejected"))
    if chosen is None or rejected is None or rejected >= -limits.rejected_fall:
        return None
    if -rejected <= limits.drop_ratio * abs(chosen):
        return None
    return (
        f"rejected answers fell by {-rejected:.3g} nats per token, chosen ones moved by {chosen:.3g}",
        f"freed probability goes to answers that no pair speaks about: {_GENTLER}",
    )


def saturation(history: History, limits: Limits) -> tuple[str, str] | None:
    """The loss has stopped pulling at most pairs."""
    now = history.now("saturated", limits.patience)
    if now is None or now <= limits.saturated:
        return None
    return (
        f"{now:.0%} of the pairs are told apart so clearly that the loss no longer pulls at them",
        "stop here, train fewer epochs, add harder pairs, or lower beta, which asks for more; chosen answers "
        "can still be learned with rpo",
    )


def both_declined(history: History, limits: Limits) -> tuple[str, str] | None:
    """Most pairs have lost both answers."""
    now, fall = history.now("shift/both_declined", limits.patience), _shift(history, "chosen", limits)
    if now is None or fall is None or now <= limits.declined or fall >= -limits.chosen_fall / 2:
        return None
    return (
        f"both answers of {now:.0%} of the pairs are less likely than under the reference, chosen ones by "
        f"{-fall:.3g} nats per token",
        f"probability leaves both: {_GENTLER}; pairs sampled from the model itself suffer less",
    )


def dispersion(history: History, limits: Limits) -> tuple[str, str] | None:
    """Answers that no pair speaks about change, or become likelier while chosen ones fall."""
    rise, kl = (history.now(f"probe/{name}", 1) for name in ("logps_shift", "kl_forward"))
    chosen = history.now("shift/chosen", limits.patience)
    if rise is not None and rise > limits.probe_rise and chosen is not None and chosen < 0:
        found = (
            f"answers in no pair became likelier by {rise:.3g} nats, while chosen ones fell by {-chosen:.3g}"
        )
    elif kl is not None and kl > limits.probe_kl:
        found = f"on answers in no pair the policy is {kl:.3g} nats per token from the reference"
    else:
        return None
    return found, f"the policy moves where nothing was compared: {_GENTLER}"


def no_gradient(history: History, limits: Limits) -> tuple[str, str] | None:
    """Nothing that trains reaches the loss; named within the first logs."""
    norms = history.latest("grad_norm", limits.patience)
    dead = history.latest("frac_reward_zero_std", limits.patience)
    if norms is None or any(norms) or (dead and min(dead) > limits.dead_groups):
        return None  # groups with equal rewards have none, and are told by themselves
    return (
        f"the gradient was exactly zero in the last {len(norms)} logs: no weight moves",
        "with an adapter and gradient checkpointing: gradient_checkpointing_kwargs: {use_reentrant: false}; "
        "else see which tokens train (posttrain check --deep), and model.adapter.target_modules",
    )


RULES: dict[str, Rule] = {
    "no_gradient": no_gradient,
    "entropy_collapse": entropy_collapse,
    "entropy_blow_up": entropy_blow_up,
    "length_collapse": length_collapse,
    "clipped_completions": clipped_completions,
    "dead_groups": dead_groups,
    "failing_verifier": failing_verifier,
    "rollout_gap": rollout_gap,
    "reward_without_gain": reward_without_gain,
    "suppression": suppression,
    "drastic_drop": drastic_drop,
    "saturation": saturation,
    "both_declined": both_declined,
    "dispersion": dispersion,
}


def new_alarms(history: History, limits: Limits, step: int, raised: Container[str] = ()) -> Iterator[Alarm]:
    """Yield an alarm for every rule that goes off now and is not in ``raised``."""
    for name, rule in RULES.items():
        found = None if name in raised else rule(history, limits)
        if found is not None:
            yield Alarm(name, step, *found)


def replay(
    rows: Iterable[tuple[float, Mapping[str, Any]]], limits: Limits
) -> tuple[dict[str, Alarm], History]:
    """Apply the rules to a stored run as if it were training now.

    Args:
        rows: (step, numbers) of each log, in order.
        limits: When alarms go off.

    Returns:
        The first alarm of each rule by name, and the whole history.
    """
    history, raised = History(), dict[str, Alarm]()
    for step, logs in rows:
        history.add(logs)
        for alarm in new_alarms(history, limits, int(step), raised):
            raised[alarm.name] = alarm
    return raised, history
