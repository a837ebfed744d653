"""AEPO: hold the entropy at a chosen level by training on tempered samples (arXiv 2510.08141, SCOPE-RL).

Idea
    Entropy bonuses trade reward for entropy and are unstable. AEPO samples a few answers hotter or colder
    than the policy and trains, with a small weight, on those that are rewarded: hot ones raise the entropy,
    cold ones lower it. A controller chooses by the entropy it measured. (Not "Agentic Entropy-Balanced Policy
    Optimization", also called AEPO.)

Formula
    H is the mean entropy per token (nats) of the rows of the previous rollout, H0 the target::

        schedule "threshold":  T = temperature_high if H <= H0 else temperature_low;   hot before the first H
        schedule "linear":     T = clip(1 + H0 - H, temperature_low, temperature_high); 1 before the first H

        aux rows:  whole groups for the first aux_prompt_fraction of the prompts, sampled at T times the
                   run's temperature; log-probabilities and ratios are those of the policy without T

        mode "replace":  aux rows that are positive and have tokens, the first m of them, get A = 1 on every
                         token and take the places of the first m rows of the batch;
                         m = max_aux_rows at most, half of that (rounded down) while H > H0
        mode "alpha":    all aux rows are appended, A = 1 if positive else 0. In a mean over N rows, n of them
                         aux: main rows weigh N / (N - n), aux rows alpha N / n, so that
                         loss = loss of the main rows + alpha * mean over the aux rows

    E over pi^T of grad log pi is zero at T = 1 and (T - 1) grad H to first order: no importance correction is
    wanted. Positive is ``positive_rule``: ``advantage`` (above 0.05 within the aux group, so not where all
    are right) or ``reward`` (the outcome, first reward or ``signal``, is at least ``solved``).

Defaults and where they come from
    Replace mode, target 0.5, 1.2 / 0.8, m 60 of 2560 rows (2.3 %), a quarter of the prompts, halving: the
    official script. alpha 1/64, linear: SCOPE-RL; its fraction is "less than 2 % extra samples". The best
    target is 0.75 in the README, 0.5 for SCOPE. Script: Qwen2.5-Math-7B, DAPO-Math-17K, 512 prompts of 5,
    top-p 0.99, responses of 2048, learning rate 1e-6, weight decay 0.01, no KL, dual clip 3 (``delta``),
    token mean.
    ``measure`` "entropy" is ours and exact; officially it is the sampled surprisal over all rows that train
    (``measure="surprisal"``, ``measure_on_main_only=False``). The two differ: tune the target for yours.

Needs
    One more generation call per rollout, and its scoring. In replace mode shapes stay as they are; in alpha
    mode micro-batches grow by the aux rows. Groups may be spread over ranks. TRL's metrics and its table of
    completions are those of the main rows.

Metrics
    ``aepo/entropy`` (H), ``aepo/temperature``, ``aepo/aux_rows`` (sampled), ``aepo/positive`` (their share),
    ``aepo/used_rows``, ``aepo/weight_share`` (used rows / rows that train).

Composes with
    Aux rows are out of reach for other methods: ACE, Lp-Reg and SPINE do not mask, weigh, penalise or measure
    them, TRL's KL and the sampler correction are off on them, they are in no group statistics. GARDO,
    constrained rewards and dynamic sampling act on the main rows before. Refused: a second entropy
    controller (``entropy_coef``, ``use_adaptive_entropy``), ``skip_zero_advantage`` (the entropy is measured
    on every row), a ``rollout_func``. Warned: alpha mode where the loss is a mean over tokens, SPINE's upper
    hinge, TTRL (aux rows get the label of the main group, right or wrong); and when training, more than 5 %
    aux rows.

When not to use it
    When the entropy does not fall. When samples are cut by ``top_p`` or ``top_k``: that also cuts what a high
    temperature adds. Hot samples are seldom rewarded on hard tasks: watch ``aepo/positive``.

Official code
    597358816/AEPO (EasyR1) is replace mode. Differences: with no positive row it fails, here m is 0; it
    measures on aux rows too; its first release took m = 60 in both regimes (``halve_when_above=False``) and
    all prompts (``aux_prompt_fraction=1``). Its DCPO mode is another method.

Evidence at laptop size
    ``configs/evidence/aepo.yaml`` (its first lines are the commands): 120 on-policy steps on eight
    palindromes, each with up to 24 right answers; temperatures 1.3 and 0.7, up to 32 of 64 rows replaced,
    targets 0.1 and 0.3. Five seeds (100 to 104), mean and 95 % t interval, differences paired by seed; two
    CPU cores. Over the last third of training, entropy from 0.45 nats at the first log::

                          grpo                   target 0.1             target 0.3
        entropy           0.062 [0.046, 0.078]   0.069 [0.064, 0.074]   0.156 [0.122, 0.189] *
          of each seed    .060 .069 .047         .073 .064 .067         .170 .118 .189
                          .054 .079              .069 .074              .159 .142
        temperature                              1.22 [1.16, 1.27]      1.30 [1.30, 1.30]
        rows replaced                            29.8 [28.4, 31.1]      32.0 [32.0, 32.0]

    and at the end::

                          grpo                   target 0.1 - grpo        target 0.3 - grpo
        entropy           0.047 [0.033, 0.061]   +0.026 [0.010, 0.041] *  +0.101 [0.056, 0.147] *
        reward            0.970 [0.962, 0.977]   -0.018 [-0.031, -0.005]  -0.027 [-0.041, -0.012]
        held-out pass@1   0.208 [0.154, 0.263]   -0.032 [-0.101, 0.037]   +0.074 [-0.020, 0.167]
        held-out pass@8   0.594 [0.479, 0.709]   -0.029 [-0.179, 0.122]   +0.100 [-0.052, 0.251]
        held-out pass@64  0.850 [0.753, 0.947]   -0.014 [-0.164, 0.136]   +0.022 [-0.106, 0.150]

    In part this is the claim: the higher the target, the higher the entropy ends, for little reward. But it
    is not held *at* the target: 0.07 for 0.1, 0.16 for 0.3. The controller is at its hot end nearly all the
    time (for 0.3 always, with every row it may use), and what it adds is of first order in (T - 1) and in the
    slope of an entropy that has become small. Single runs (seed 42) with hot temperatures of 1.6 and 2.0 got
    no further, 0.08 to 0.10 for targets of 0.2 and 0.3: of their hot samples 39 and 8 of 100 are right, at
    1.3 it is 74. Effects on pass@k are within the noise.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, PrivateAttr, model_validator

from posttrain._lazy import torch
from posttrain.rl.method import Admission, Conflict, Extra, ExtraPlan, Method, Setup, Tokens

logger = logging.getLogger(__name__)

ADVANTAGE_FLOOR = 0.05
"""Advantage within its group above which an aux row counts as positive, from the official code."""


def aux_temperature(
    entropy: float | None,
    target: float,
    *,
    low: float = 0.8,
    high: float = 1.2,
    schedule: Literal["threshold", "linear"] = "threshold",
) -> float:
    """Return the temperature of the aux samples.

    Args:
        entropy: Measured, nats per token, or None before the first measurement.
        target: Nats per token.
        low: Coldest temperature.
        high: Hottest temperature.
        schedule: ``threshold`` (arXiv 2510.08141; hot at equality) or ``linear`` (SCOPE-RL).
    """
    if schedule == "threshold":
        return high if entropy is None or entropy <= target else low
    return min(max(1.0 + target - (target if entropy is None else entropy), low), high)


def row_weights(rows: int, aux: int, alpha: float) -> tuple[float, float]:
    """Return the weights (main, aux) that turn a mean over all rows into main mean + alpha * aux mean.

    Args:
        rows: All rows, N.
        aux: Aux rows among them, 0 < aux < rows.
        alpha: Weight of the aux term.
    """
    return rows / (rows - aux), alpha * rows / aux


class AEPO(Method):
    """Train on rewarded samples at a temperature that a controller chooses. See the module page."""

    name = "aepo"
    title = "AEPO: entropy held at a target by tempered samples"
    paper = "2510.08141"

    mode: Literal["replace", "alpha"] = Field("replace", description="Official code, or SCOPE-RL's sum.")
    target_entropy: float = Field(0.5, gt=0, description="Nats per token.")
    temperature_high: float = Field(1.2, gt=0, le=10, description="Relative to the run's temperature.")
    temperature_low: float = Field(0.8, gt=0, le=10, description="Relative to the run's temperature.")
    schedule: Literal["threshold", "linear"] = Field("threshold", description="linear is SCOPE-RL's.")
    alpha: float = Field(1 / 64, ge=0, description="Weight in alpha mode; 0 switches that mode off.")
    max_aux_rows: int = Field(60, ge=0, description="m in replace mode, over all ranks; 0 switches it off.")
    aux_prompt_fraction: float = Field(0.25, gt=0, le=1, description="Prompts that are sampled again.")
    halve_when_above: bool = Field(True, description="Replace mode: half of m while the entropy is too high.")
    positive_rule: Literal["advantage", "reward"] | None = Field(
        None, description="advantage in replace mode and reward in alpha mode when unset."
    )
    signal: str | None = Field(
        None, description="Reward function of the rule 'reward'; the first when unset."
    )
    solved: float = Field(1.0, description="Outcome of a right answer, for the rule 'reward'.")
    measure: Literal["entropy", "surprisal"] = Field(
        "entropy", description="Exact, or sampled as in the official code."
    )
    measure_on_main_only: bool = Field(True, description="Leave the aux rows out of the measurement.")

    _warned: bool = PrivateAttr(default=False)
    _entropy: float | None = PrivateAttr(default=None)
    _sums: list[float] = PrivateAttr(default_factory=lambda: [0.0, 0.0])
    _window: Any = PrivateAttr(default=None)
    _reduce: Any = PrivateAttr(default=None)  # a callable; its type would need torch

    @model_validator(mode="after")
    def _cold_is_not_hot(self) -> AEPO:
        if self.temperature_low > self.temperature_high:
            raise ValueError(
                f"temperature_low={self.temperature_low} is above temperature_high={self.temperature_high}: "
                "swap them"
            )
        return self

    @property
    def neutral(self) -> bool:
        """Without aux rows, or with weight 0, nothing changes."""
        return self.max_aux_rows == 0 if self.mode == "replace" else self.alpha == 0

    @property
    def needs_all_rows(self) -> bool:
        """The entropy is measured on every row."""
        return True

    def conflicts(self, setup: Setup) -> Iterator[Conflict]:
        """Refuse a second entropy controller; warn about labels by vote and weights that are not as meant."""
        trainer = setup.trainer
        for field in ("entropy_coef", "use_adaptive_entropy"):
            if trainer.get(field):
                yield Conflict(
                    f"AEPO controls the entropy, and so does {field}={trainer[field]}: set it to "
                    f"{'false' if field == 'use_adaptive_entropy' else 0}, or drop AEPO",
                    field=field,
                )
        if setup.task == "ttrl" or "ttrl" in setup.methods:
            yield Conflict(
                "AEPO with TTRL trains on the tempered samples that agree with the vote of the main group: "
                "where that is wrong, on errors; watch ttrl/label_accuracy",
                fatal=False,
            )
        if self.signal and setup.reward_names is not None and self.signal not in setup.reward_names:
            yield Conflict(
                f"AEPO takes its outcome from the reward function {self.signal!r}, found "
                f"{', '.join(setup.reward_names)}: name one of these, or leave signal unset for the first",
                field="signal",
            )
        loss_type = trainer.get("loss_type", "dapo")
        if self.mode == "alpha" and loss_type not in ("grpo", "sapo"):
            yield Conflict(
                f"AEPO's alpha weighs sequences, but with loss_type={loss_type!r} it weighs tokens: set "
                "loss_type to grpo, or mode to replace",
                field="mode",
                fatal=False,
            )

    # ---- controller -------------------------------------------------------------------------------------

    def token_weights(self, tokens: Tokens) -> torch.Tensor | None:
        """Measure; weigh nothing."""
        if tokens.training:
            values = tokens.entropies if self.measure == "entropy" else -tokens.logps
            mask = tokens.mask
            if tokens.extra_mask is not None and not self.measure_on_main_only:
                mask = mask + tokens.extra_mask
            total = values.detach().float().masked_fill(mask == 0, 0.0).sum()
            seen = torch.stack([total, mask.sum().float()])
            self._window = seen if self._window is None else self._window + seen
            self._reduce = tokens.reduce
        return None

    def optimizer_step(self) -> None:
        """Add the tokens of this step on all ranks to the measurement of the rollout."""
        assert self._reduce is not None
        total, count = self._reduce(self._window).tolist()
        self._sums = [self._sums[0] + total, self._sums[1] + count]
        self._window = None

    def plan_extra(self) -> ExtraPlan | None:
        """Close the measurement and ask for tempered groups."""
        total, count = self._sums
        if count > 0:
            self._entropy, self._sums = total / count, [0.0, 0.0]
        return ExtraPlan(
            temperature=self._temperature, prompts=self.aux_prompt_fraction, replace=self.mode == "replace"
        )

    @property
    def _temperature(self) -> float:
        return aux_temperature(
            self._entropy,
            self.target_entropy,
            low=self.temperature_low,
            high=self.temperature_high,
            schedule=self.schedule,
        )

    # ---- aux rows ---------------------------------------------------------------------------------------

    def positive(self, extra: Extra) -> torch.Tensor:
        """Return the (N,) bool aux rows that are learned from."""
        rule = self.positive_rule or ("advantage" if self.mode == "replace" else "reward")
        if rule == "advantage":
            good = extra.advantages > ADVANTAGE_FLOOR
        else:
            column = 0 if self.signal is None else extra.names.index(self.signal)
            good = extra.rewards[:, column] >= self.solved - 1e-6
        return good & (extra.tokens > 0)

    def admit(self, extra: Extra) -> Admission:
        """Return the rows that train, with their weights."""
        good = self.positive(extra)
        count = len(good)
        if self.mode == "replace" and self.max_aux_rows > 0.05 * extra.rows and not self._warned:
            self._warned = True
            logger.warning(
                "AEPO replaces up to %d of %d rows (%.0f %%); 0.5 %% to 5 %% is usual (2.3 %% officially): "
                "lower max_aux_rows",
                self.max_aux_rows,
                extra.rows,
                100 * self.max_aux_rows / extra.rows,
            )
        if self.mode == "alpha":
            main, weight = row_weights(extra.rows + count, count, self.alpha)
            used = Admission(
                rows=torch.arange(count, device=good.device),
                advantages=good.float(),
                weight=weight,
                main_weight=main,
            )
            share = count / (extra.rows + count)
        else:
            most = self.max_aux_rows
            if self.halve_when_above and self._entropy is not None and self._entropy > self.target_entropy:
                most = min(most, int(good.sum())) // 2
            chosen = good.nonzero().flatten()[: min(most, extra.rows)]
            used = Admission(rows=chosen, advantages=torch.ones(len(chosen), device=good.device))
            share = len(chosen) / extra.rows
        for name, value in (
            ("temperature", self._temperature),
            ("aux_rows", float(count)),
            ("used_rows", float(len(used.rows))),
            ("weight_share", share),
        ):
            extra.gauges.mean(name, torch.tensor(value, device=good.device))
        extra.gauges.mean("positive", good)
        if self._entropy is not None:
            extra.gauges.mean("entropy", torch.tensor(self._entropy, device=good.device))
        return used

    # ---- state ------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the last measurement and the one under way, the same on every rank."""
        return {"entropy": self._entropy, "sums": list(self._sums)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._entropy, self._sums = state["entropy"], list(state["sums"])
