"""Dynamic sampling: groups without a learning signal are replaced by others (DAPO, arXiv 2503.14476).

Idea
    When all answers to a prompt are right, or all wrong, the group's advantages are zero and its generation
    was wasted; the batch that trains shrinks as the policy improves. Such dead groups are generated again
    from other prompts, until the batch is full of useful groups or a cap is reached.

Formula
    With outcomes o_1..o_G of a group, those that are NaN (verifier failed) left out::

        dead      <=>  max_i o_i - min_i o_i <= tolerance      or fewer than two outcomes
        refill    :    every dead group, with the next prompts of a seeded order that are not in the batch;
                       new groups that are dead are thrown away; at most max_rounds generations
        still dead:    the group stays, with advantage 0

    The outcome is one reward function, the first or the one named ``signal``, as the verifier (or TTRL's
    vote) gave it: never the weighted sum, never a reshaped reward. Under a length penalty, groups of wrong
    answers look alive in the sum: filtering on it trains on the penalty alone and has destroyed policies.
    For the same reason the advantage of what is still dead is set to 0, whatever the sum says.

Defaults and where they come from
    ``max_rounds`` 3: DAPO repeats until the batch is full; a cap keeps a task that is too hard (or solved)
    from generating for ever. ``tolerance`` 1e-6: rounding of an equal reward. ``solved`` 1 and ``failed`` 0
    only sort dead groups by reason. DAPO's other settings: ``epsilon_high`` 0.28, ``loss_type: dapo``.

Needs
    A data set with a length, not a stream. Each round is one generation call on every rank, of as many
    groups as are missing (rounded up so that ranks share them evenly). Rewards are computed for all of them;
    the forwards that a run makes per rollout (old log-probabilities, a reference) only for rows that stay,
    unless vLLM's correction or a method needs the old policy's head. TRL's metrics (``reward``, lengths,
    ``frac_reward_zero_std``) stay those of the first generation, an unselected sample; its table of
    completions and ``num_items_in_batch`` are those of the rows that train, and ``num_tokens`` counts
    everything.

Metrics
    ``dynamic_sampling/dead_groups`` (share of the first generation), of these ``all_solved``, ``all_failed``,
    ``constant`` (equal, but neither) and ``unscored`` (the verifier failed), all as shares of the groups;
    ``left_dead`` after the refill; ``rounds``; ``extra_rows`` and ``extra_tokens`` per generation batch.

Composes with
    Every method. TTRL: unanimous groups are replaced, and each rank still holds whole groups. Constrained
    rewards measure everything that was generated. Exact resume: the place in the order is saved.

When not to use it
    When the task is nearly solved: most generations would be thrown away; get harder prompts. When the data
    set is not larger than a generation batch there are no other prompts to draw. When the reward is
    continuous, groups are never dead.

Official code
    BytedTsinghua-SIA/DAPO (verl) generates the next batch of the data loader, keeps the useful groups of both
    and cuts what is too many. Here only what is missing is generated, from an order of its own, so that the
    length of an epoch does not depend on rewards.

Evidence at laptop size
    ``python scripts/bench/bench_waste.py trainer.seed=42``: 60 steps of
    ``configs/evidence/dynamic_sampling.yaml``, where 57 % of plain GRPO's groups are dead. Cost of plain
    ``trl.GRPOTrainer`` over cost of the arm, above 1 the arm is cheaper; geometric means over five seeds (0
    to 4) with 95 % t intervals::

        processor time               per step             until half of GRPO's gain in reward
        skip_zero_advantage alone    1.72 [1.66, 1.78]    1.79 [1.69, 1.89]
        both, as many rows           0.77 [0.76, 0.79]    0.84 [0.79, 0.90]
        both, half the rows          1.47 [1.43, 1.52]    2.15 [0.91, 5.09]

        tokens generated             per step             until half of GRPO's gain in reward
        both, as many rows           0.48 [0.47, 0.49]    0.52 [0.49, 0.55]
        both, half the rows          0.97 [0.96, 0.98]    1.42 [0.58, 3.46]

    So here a refill does not pay: filling every place costs twice the tokens and gives back the training
    time that skipping saves, and reward at equal processor time does not differ (+0.004 [-0.009, 0.017]).
    With half the rows a step is cheaper, but how much sooner a reward is reached is within the noise. What
    pays is skipping. GRPO gains a few points of reward in these steps, so single seeds scatter widely.

    At an equal number of steps (the first command in that file; seeds 100 to 104, differences paired)::

                      grpo                  skip - grpo              both, as many rows - grpo
        reward        0.194 [0.179, 0.208]  -0.000 [-0.001, 0.000]   +0.032 [0.009, 0.055] *
        pass@1        0.101 [0.094, 0.108]  -0.000 [-0.000, 0.000]   +0.011 [-0.005, 0.026]
        pass@16       0.469 [0.438, 0.500]  +0.003 [-0.005, 0.011]   -0.010 [-0.050, 0.030]
        generated     48,596 tokens         -0.4 [-1.5, 0.7]         +52,876 [49,286, 56,466]

    A full batch raises the reward of a step, as DAPO claims (``reward`` is that of the unselected generation
    at the end of training); held out, nothing shows, at twice the generation.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

from pydantic import Field, PrivateAttr

from posttrain._lazy import torch
from posttrain.rl.method import Conflict, Method, Refill, Rollout, Setup

logger = logging.getLogger(__name__)


def dead_groups(outcomes: torch.Tensor, tolerance: float = 1e-6) -> torch.Tensor:
    """Return the groups whose outcomes do not differ (arXiv 2503.14476).

    Args:
        outcomes: (groups, group size), NaN where the verifier failed.
        tolerance: Largest difference that counts as none.

    Returns:
        (groups,) bool; also True with fewer than two outcomes.
    """
    missing = outcomes.isnan()
    low = outcomes.masked_fill(missing, torch.inf).amin(dim=1)
    high = outcomes.masked_fill(missing, -torch.inf).amax(dim=1)
    return (high - low <= tolerance) | ((~missing).sum(dim=1) < 2)


def why_dead(
    outcomes: torch.Tensor, dead: torch.Tensor, *, solved: float = 1.0, failed: float = 0.0
) -> dict[str, torch.Tensor]:
    """Sort dead groups by reason.

    Args:
        outcomes: (groups, group size), NaN where the verifier failed.
        dead: (groups,) bool.
        solved: Outcomes at or above it are right.
        failed: Outcomes at or below it are wrong.

    Returns:
        (groups,) bool by reason, every dead group in exactly one: ``unscored`` (no outcome), ``all_solved``,
        ``all_failed``, ``constant``.
    """
    missing = outcomes.isnan()
    unscored = dead & missing.all(dim=1)
    right = dead & ~unscored & (outcomes.masked_fill(missing, torch.inf).amin(dim=1) >= solved - 1e-6)
    wrong = dead & ~unscored & (outcomes.masked_fill(missing, -torch.inf).amax(dim=1) <= failed + 1e-6)
    constant = dead & ~unscored & ~right & ~wrong
    return {"all_solved": right, "all_failed": wrong, "constant": constant, "unscored": unscored}


class DynamicSampling(Method):
    """Replace groups without a learning signal. See the module page."""

    name = "dynamic_sampling"
    title = "Dynamic sampling: dead groups are replaced by other prompts"
    paper = "2503.14476"

    max_rounds: int = Field(
        3, ge=0, le=100, description="Generations added per batch at most; 0 switches the method off."
    )
    tolerance: float = Field(1e-6, ge=0, description="Largest difference of outcomes that counts as none.")
    signal: str | None = Field(
        None, description="Reward function that says right or wrong; the first when unset."
    )
    solved: float = Field(1.0, description="Outcome of a right answer; for the reasons in the log.")
    failed: float = Field(0.0, description="Outcome of a wrong answer; for the reasons in the log.")
    alarm: float = Field(
        0.5, gt=0, le=1, description="Warn once when more than this share of groups is dead after the refill."
    )

    _warned: bool = PrivateAttr(default=False)

    @property
    def neutral(self) -> bool:
        """Without rounds nothing is replaced."""
        return self.max_rounds == 0

    @property
    def refill_rounds(self) -> int:
        """As configured."""
        return self.max_rounds

    def conflicts(self, setup: Setup) -> Iterator[Conflict]:
        """Refuse a signal that no reward function gives, and groups of one."""
        if self.signal and setup.reward_names is not None and self.signal not in setup.reward_names:
            yield Conflict(
                f"dynamic_sampling takes its signal from the reward function {self.signal!r}, found "
                f"{', '.join(setup.reward_names)}: name one of these, or leave signal unset for the first",
                field="signal",
            )
        if setup.trainer.get("num_generations", 8) < 2:
            yield Conflict("groups of one answer are always dead: set num_generations to 2 or more")

    def _signal(self, outcomes: torch.Tensor, names: tuple[str, ...]) -> torch.Tensor:
        if self.signal is None:
            return outcomes[..., 0]
        if self.signal not in names:
            raise ValueError(
                f"dynamic_sampling takes its signal from the reward function {self.signal!r}, found "
                f"{', '.join(names)}"
            )
        return outcomes[..., names.index(self.signal)]

    def dead_groups(self, outcomes: torch.Tensor, names: tuple[str, ...]) -> torch.Tensor | None:
        """Return the groups whose outcomes are all the same."""
        return dead_groups(self._signal(outcomes, names), self.tolerance)

    def refilled(self, refill: Refill) -> None:
        """Log how many groups were dead and why; warn when most stay so."""
        gauges, groups = refill.gauges, refill.dead
        reasons = why_dead(
            self._signal(refill.outcomes, refill.names), groups, solved=self.solved, failed=self.failed
        )
        gauges.mean("dead_groups", groups)
        for reason, found in reasons.items():
            gauges.mean(reason, found)
        gauges.mean("left_dead", refill.left)
        for name, number in (
            ("rounds", refill.rounds),
            ("extra_rows", refill.rows),
            ("extra_tokens", refill.tokens),
        ):
            gauges.mean(name, torch.tensor(float(number), device=groups.device))
        if refill.left.float().mean() > self.alarm and not self._warned:
            self._warned = True
            logger.warning(_alarm(refill, reasons))

    def advantages(self, rollout: Rollout) -> torch.Tensor:
        """Return the advantages with 0 on what is still dead."""
        if rollout.dead is None or not rollout.dead.any():
            return rollout.advantages
        rollout.tied = rollout.tied | rollout.dead
        dead = rollout.dead if rollout.advantages.dim() == 1 else rollout.dead.unsqueeze(1)
        return rollout.advantages.masked_fill(dead, 0.0)


_TRY = {
    "all_solved": "the prompts are too easy: take harder ones",
    "all_failed": "the prompts are too hard, or answers are cut off or not understood by the verifier: look "
    "at some completions, take easier prompts or a larger num_generations",
    "constant": "the reward is the same for different answers: look at the reward function",
    "unscored": "the verifier fails: look at its errors",
}


def _alarm(refill: Refill, reasons: dict[str, torch.Tensor]) -> str:
    most = max(reasons, key=lambda reason: int(reasons[reason].sum()))
    counts = ", ".join(f"{int(found.sum())} {reason}" for reason, found in reasons.items())
    return (
        f"{int(refill.left.sum())} of {len(refill.left)} groups carry no signal after {refill.rounds} "
        f"generations more; of the first generation {counts}. Mostly {most}: {_TRY[most]}."
    )
