r"""Lp-Reg: keep low-probability tokens alive with a de-noised copy of the policy (arXiv 2510.03222).

Idea
    Exploration dies because negative updates extinguish low-probability but sensible tokens ("wait",
    "however"); a plain entropy bonus also lifts noise. Lp-Reg drops the noise from the policy (tokens below a
    fraction of the largest probability), renormalises, and pulls the policy towards that proxy, but only at
    low-probability tokens that survive the filter and are being punished.

Formula
    p is the policy that generated (temperature applied), l = log pi_theta(y), all in nats::

        keep = { v : p_v >= kappa * max p }           Z = mass of keep
        lpx  = log p(y) - ln Z                        -inf when y is not kept
        N_   = tokens of the micro-batch with A < 0;  k = max(1, floor(rho |N_|)), none when k <= 1
        gate = the k tokens of N_ with the smallest l, where also lpx > l
        d    = lpx - l,   term = beta * gate * min(exp(d) - d - 1, 10)

    The term is added per token and gets the divisor of the base loss. lpx is constant; d term / d l =
    beta (1 - exp(d)) pushes l up and vanishes at l = lpx. The bound cuts the gradient beyond d = 2.6109: a
    token that fell below 7.35 % of the proxy is not pulled back. A group whose rewards are all equal has no
    tokens in N_. "lpx > l" has a tolerance of 1e-6 on d, or rounding would open the gate where nothing was
    filtered. Strictly on-policy d = -ln Z, so the push is only 1/Z - 1; off-policy it grows with the drift.
    With ``epsilon`` below 1 the policy term of gated tokens is moreover not clipped from below (A r instead
    of A (1 - epsilon)), as in the official code; the recipe's ``epsilon`` of 1 leaves nothing to un-clip.

Choices
    ``filter="fixed"`` keeps p_v >= kappa instead (worse in the paper). ``proxy="live"`` filters the policy
    being updated instead of the one that generated; on-policy they are the same. ``kl="forward"`` takes
    KL(proxy || pi_theta) over the whole vocabulary, the paper's form, whose gradient k3 of the sampled token
    has in expectation; not with ``proxy="old"`` off-policy, where the old distribution is gone, nor with a
    sharded head (ZeRO-3). ``gate="paper"`` takes tokens with pi_theta(y) below the rho-quantile of all
    sampled-token probabilities and A < 0 and y kept, without "lpx > l" and without the k > 1 rule.
    ``rho_pos`` also takes, by the same rule, the lowest tokens with A > 0 (off in the official scripts; that
    its branch is the twin of the other is all that is known).
    ``scope="generation_batch"`` takes threshold or quantile once per rollout over all ranks, from the
    probabilities under the policy that generated, so that results do not depend on the size of the
    micro-batch (ours, not the official scope).

Defaults and where they come from
    beta 1.0, rho 0.01 (0.005 for the 32B model), kappa 0.02 from the official scripts; beta is not printed in
    the paper. The recipe: ``epsilon=1.0, epsilon_high=9.0`` (ratios clipped to [0, 10]), ``loss_type="bnpo"``
    (token mean), no reference KL, no entropy bonus, learning rate 1e-6, 256 prompts of 8 completions a step.

Needs
    No extra forward. On-policy the LM head sees again only the k selected tokens, with the hidden states of
    the training forward. Off-policy the head runs once more over the tokens of the old log-prob pass. A
    rollout forward is added only by ``scope="generation_batch"`` on-policy.

Composes with
    ACE (opposite forces; watch both gauges), AEPO, LoRA, and methods that mask tokens such as SPINE: the
    tokens are selected first and then cut to the mask, unless ``outside_focus`` is set. Refused: ``cispo``,
    ``sapo``, ``vespo``, ``luspo`` and sequence-level ratios (there is no ratio per token to shield), and
    ``delta`` below 10. Warned: ``epsilon`` below 1, an entropy bonus (the paper's worst baseline).

When not to use it
    With small micro-batches: rho 1 % is inactive below 200 negative tokens; look at ``lp_reg/gated_tokens``.
    Off-policy other methods were better in the official tables. With kappa 0 it does nothing on-policy.

Official code
    CarlanLark/Lp-Reg-dev is the default here. Two differences: it filters before dividing by the temperature
    (the same at 1), and its reference proxy is not offered.

Evidence at laptop size
    Off-policy, four updates per rollout, in ``configs/evidence/lp_reg.yaml`` (its first lines are the
    command): 32 sums learnt by heart with the wide ratio bounds of the recipe. Eight seeds, mean and 95 %
    t interval, differences paired by seed; measured on two CPU cores::

                  wide (GRPO)           lp_reg - wide             clip - wide (GRPO, bounds 0.2)
        pass@1    0.165 [0.136, 0.195]  +0.033 [-0.008, 0.074]    +0.047 [0.015, 0.079] *
        pass@4    0.281 [0.233, 0.329]  +0.066 [-0.002, 0.134]    +0.098 [0.046, 0.150] *
        pass@16   0.401 [0.342, 0.459]  +0.103 [0.021, 0.185] *   +0.148 [0.079, 0.217] *
        pass@64   0.540 [0.481, 0.599]  +0.135 [0.047, 0.223] *   +0.173 [0.106, 0.240] *
        reward    0.477 [0.425, 0.528]  +0.097 [0.027, 0.166] *   +0.166 [0.101, 0.231] *
        entropy   0.358 [0.313, 0.403]  -0.007 [-0.032, 0.017]    -0.018 [-0.071, 0.034]

    (``reward`` and ``entropy`` are those of training at the end.) With the recipe's bounds Lp-Reg keeps
    reward and pass@k where GRPO loses them; GRPO with its usual bounds keeps them at least as well, in line
    with the published tables, where off-policy Lp-Reg is not the best method. Entropy is the same in all
    arms.

    On-policy, where the published gain is, nothing shows at this size: five seeds on a 16-core server give
    pass@64 -0.012 [-0.094, 0.070] and entropy -0.015 [-0.048, 0.017] against GRPO, with kappa 0.2 -0.013
    [-0.078, 0.052] and -0.002 [-0.047, 0.043]. The reason is in the numbers: on-policy the push is 1/Z - 1,
    which averages 2 % of the policy's own (7 % with kappa 0.2), on some 7 (3) tokens of a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from posttrain._lazy import torch
from posttrain.rl.method import Conflict, Method, Need, Rollout, Setup, Tokens
from posttrain.rl.quantiles import whole

if TYPE_CHECKING:
    from collections.abc import Mapping

    from posttrain.kernels.head import Scored
    from posttrain.kernels.statistics import TokenStatistics

K3_MAX = 10.0
"""Bound of the k3 estimate per token, from the official code."""

TOLERANCE = 1e-6
"""Nats by which the proxy has to lie above the policy for the gate to open."""

_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo")
_GAP, _THRESHOLD, _THRESHOLD_POS = "lp_reg/gap", "lp_reg/threshold", "lp_reg/threshold_pos"
_GATE = "lp_reg/gate"


def proxy_gap(statistics: TokenStatistics) -> torch.Tensor:
    """Return log proxy(y) - log p(y) of each token: -ln Z where y is kept, -inf where it is dropped; (N,)."""
    assert statistics.kept is not None
    assert statistics.log_mass is not None
    return (-statistics.log_mass).masked_fill(~statistics.kept, -math.inf)


def kth_smallest(values: torch.Tensor, rho: float) -> torch.Tensor:
    """Return the k-th smallest of n values, k = max(1, floor(rho n)); -inf when k <= 1. 0-dim.

    ``floor(rho n)`` is taken in floating point, as the official code does.
    """
    k = int(rho * values.numel())
    return values.kthvalue(k).values if k > 1 else values.new_tensor(-math.inf)


def lowest(logps: torch.Tensor, among: torch.Tensor, rho: float) -> torch.Tensor:
    """Return the k entries of ``among`` with the smallest ``logps``; none if k <= 1.

    Args:
        logps: (B, C) log-probabilities without gradient.
        among: (B, C) bool with n entries set.
        rho: Fraction in [0, 1].

    Returns:
        (B, C) bool with k = max(1, floor(rho n)) entries set, or none. Ties are broken arbitrarily.
    """
    chosen = torch.zeros_like(among)
    k = int(rho * int(among.sum()))
    if k > 1:
        order = logps.masked_fill(~among, math.inf).flatten().topk(k, largest=False).indices
        chosen.view(-1)[order] = True
    return chosen


def log_quantile(logps: torch.Tensor, rho: float) -> torch.Tensor:
    """Return the log of the rho-quantile of exp(logps), linearly interpolated; -inf for no values. 0-dim.

    Unlike ``torch.quantile`` without an upper limit on the number of values, and where rho (N - 1) is a whole
    number, or the neighbours are equal, the result is that value itself, to the last bit: the comparison with
    it is strict.
    """
    if logps.numel() == 0:
        return logps.new_tensor(-math.inf)
    position = whole(rho * (logps.numel() - 1))
    below = int(position)
    low = logps.kthvalue(below + 1).values
    if position == below:
        return low
    high = logps.kthvalue(below + 2).values
    share = position - below
    between = torch.logaddexp(low + math.log1p(-share), high + math.log(share))
    return torch.where(low == high, low, between)


def k3(log_ratio: torch.Tensor) -> torch.Tensor:
    """Return min(exp(d) - d - 1, 10) of d = log proxy - log policy, elementwise.

    Beyond the bound the gradient is exactly zero, also where exp(d) overflows.
    """
    d = log_ratio.clamp(max=2 * K3_MAX)  # far beyond the bound, but exp stays finite
    return (d.exp() - d - 1).clamp(max=K3_MAX)


class LpReg(Method):
    """Pull punished low-probability tokens towards the de-noised policy. See the module page."""

    name = "lp_reg"
    title = "Lp-Reg: shield sensible low-probability tokens"
    paper = "2510.03222"

    beta: float = Field(1.0, ge=0, description="Weight of the term; 0 switches the method off.")
    rho: float = Field(0.01, ge=0, le=1, description="Share of the tokens that counts as low-probability.")
    kappa: float = Field(0.02, ge=0, le=1, description="Filter threshold; for minp relative to the maximum.")
    filter: Literal["minp", "fixed"] = Field("minp", description="p >= kappa * max p, or p >= kappa.")
    proxy: Literal["old", "live"] = Field("old", description="Policy that is filtered; the same on-policy.")
    kl: Literal["k3", "forward"] = Field("k3", description="Sampled token, or the whole vocabulary.")
    gate: Literal["code", "paper"] = Field("code", description="Selection rule; see the page.")
    scope: Literal["micro_batch", "generation_batch"] = Field(
        "micro_batch", description="Tokens over which the lowest are taken."
    )
    rho_pos: float = Field(0.0, ge=0, le=1, description="The same share of tokens with A > 0; 0 is none.")
    outside_focus: bool = Field(False, description="Also act where another method's mask stops training.")

    @model_validator(mode="after")
    def _twin_of_the_code(self) -> LpReg:
        if self.rho_pos > 0 and self.gate == "paper":
            raise ValueError("rho_pos belongs to the official code's rule: set gate to code, or rho_pos to 0")
        return self

    @property
    def neutral(self) -> bool:
        """Without weight or without tokens there is no term."""
        return self.beta == 0 or self.rho == self.rho_pos == 0

    @property
    def needs_all_rows(self) -> bool:
        """The paper's quantile is taken over every token; otherwise only negative advantages matter."""
        return self.gate == "paper" and self.scope == "micro_batch"

    @property
    def needs(self) -> frozenset[Need]:
        """The LM head of the filtered policy, and old log-probs for a threshold over the rollout."""
        head: Need = "head" if self.proxy == "live" else "old_head"
        return frozenset({head, "old_logps"} if self.scope == "generation_batch" else {head})

    def conflicts(self, setup: Setup) -> Iterator[Conflict]:
        """Refuse losses without a ratio per token; warn about what defeats the recipe."""
        trainer = setup.trainer
        loss_type, delta = trainer.get("loss_type", "dapo"), trainer.get("delta")
        if loss_type not in _LOSSES:
            yield Conflict(
                f"Lp-Reg adds to a clipped loss with a ratio per token, found loss_type={loss_type!r}: use "
                f"one of {', '.join(_LOSSES)}",
                field="loss_type",
            )
        if trainer.get("importance_sampling_level", "token") != "token":
            yield Conflict(
                "Lp-Reg shields single tokens, which needs importance_sampling_level='token', found "
                f"{trainer['importance_sampling_level']!r}",
                field="importance_sampling_level",
            )
        if delta is not None and delta < 10:
            yield Conflict(
                f"Lp-Reg is defined with ratios up to 10, found delta={delta}: leave delta unset or set it "
                "to 10 or more",
                field="delta",
            )
        if self.kl == "forward" and self.proxy == "old" and _off_policy(trainer):
            yield Conflict(
                "kl='forward' needs the whole distribution of the policy that generated, which is gone after "
                "an off-policy update: set proxy='live' or kl='k3', or steps_per_generation to "
                "gradient_accumulation_steps and num_iterations to 1",
                field="kl",
            )
        if trainer.get("epsilon", 0.2) < 1:
            yield Conflict(
                "Lp-Reg's recipe clips ratios to [0, 10] (epsilon: 1.0, epsilon_high: 9.0), found epsilon="
                f"{trainer.get('epsilon', 0.2)}: set both, they are part of the method off-policy",
                field="epsilon",
                fatal=False,
            )
            for field, off in (("top_entropy_quantile", 1.0), ("off_policy_mask_threshold", None)):
                if trainer.get(field, off) != off:
                    yield Conflict(
                        "with epsilon below 1 Lp-Reg un-clips the tokens it shields, also those that "
                        f"{field}={trainer[field]} takes out: set epsilon to 1.0, or {field} to "
                        f"{'null' if off is None else off}",
                        field=field,
                    )
        for field in ("entropy_coef", "use_adaptive_entropy"):
            if trainer.get(field):
                yield Conflict(
                    f"Lp-Reg makes an entropy bonus redundant, found {field}={trainer[field]}: unset it; in "
                    "the paper's runs the bonus is the worst baseline",
                    field=field,
                    fatal=False,
                )

    def negative(self, advantages: torch.Tensor, tied: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return N_, (B, C) bool: valid tokens with A < 0 in groups whose rewards differ."""
        columns = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
        return (columns < 0) & ~tied.unsqueeze(1) & mask.bool()

    def positive(self, advantages: torch.Tensor, tied: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return the twin of N_ for A > 0, (B, C) bool."""
        return self.negative(-advantages, tied, mask)

    def score_old(self, scored: Scored) -> dict[str, torch.Tensor]:
        """Keep the proxy of the policy that generated, one number per token."""
        return {_GAP: self._gap(scored, scored.mask)} if self.proxy == "old" else {}

    def advantages(self, rollout: Rollout) -> torch.Tensor:
        """Fix the threshold of ``scope="generation_batch"`` over all ranks; advantages stay as they are."""
        if self.scope == "generation_batch":
            rows = (rollout.advantages, rollout.tied, rollout.mask)
            among = rollout.mask.bool() if self.gate == "paper" else self.negative(*rows)
            rollout.carry[_THRESHOLD] = self._threshold(rollout, among, self.rho)
            if self.rho_pos > 0:
                rollout.carry[_THRESHOLD_POS] = self._threshold(rollout, self.positive(*rows), self.rho_pos)
        return rollout.advantages

    def _threshold(self, rollout: Rollout, among: torch.Tensor, rho: float) -> torch.Tensor:
        """(B,) the threshold over the tokens of all ranks, once per row."""
        assert rollout.old_logps is not None
        everywhere = rollout.gather(rollout.old_logps.float().masked_fill(~among, math.nan))
        values = everywhere[~everywhere.isnan()]
        threshold = log_quantile(values, rho) if self.gate == "paper" else kth_smallest(values, rho)
        return threshold.expand(rollout.mask.size(0)).contiguous()

    def token_penalty(self, tokens: Tokens) -> torch.Tensor | None:
        """Return beta * gate * KL estimate, (B, C)."""
        live = tokens.logps.detach()
        negative = self.negative(tokens.advantages, tokens.tied, tokens.mask)
        candidates = self._candidates(tokens, live, negative)
        if self.rho_pos > 0:
            positive = self.positive(tokens.advantages, tokens.tied, tokens.mask)
            if self.scope == "generation_batch":
                candidates = candidates | (positive & (live <= tokens.carry[_THRESHOLD_POS].unsqueeze(1)))
            else:
                candidates = candidates | lowest(live, positive, self.rho_pos)
        if _GAP in tokens.carry:
            gap = tokens.carry[_GAP].masked_fill(~candidates, -math.inf)
        else:
            assert tokens.head is not None
            gap = self._gap(tokens.head, candidates)
        proxy = (live if self.proxy == "live" else tokens.old_logps) + gap
        gate = candidates & (gap > -math.inf if self.gate == "paper" else proxy - live > TOLERANCE)
        if tokens.focus is not None and not self.outside_focus:
            gate = gate & tokens.focus
        tokens.carry[_GATE] = gate
        log_ratio = torch.where(gate, proxy - tokens.logps, 0.0)
        self._log(tokens, negative, candidates, gate, log_ratio)
        if self.kl == "forward":
            assert tokens.head is not None
            divergence = tokens.head.forward_kl(gate, **self._filter())
            return self.beta * torch.zeros_like(tokens.logps).masked_scatter(gate, divergence)
        return self.beta * k3(log_ratio)

    def unclipped(self, tokens: Tokens) -> torch.Tensor | None:
        """Return the gated tokens: while the term holds them up, the clip must not stop the policy term."""
        return tokens.carry[_GATE]

    def _candidates(self, tokens: Tokens, live: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
        if self.scope == "generation_batch":
            threshold = tokens.carry[_THRESHOLD].unsqueeze(1)
        elif self.gate == "paper":
            threshold = log_quantile(live[tokens.mask.bool()], self.rho)
        else:
            return lowest(live, negative, self.rho)
        return negative & (live < threshold if self.gate == "paper" else live <= threshold)

    def _filter(self) -> dict[str, Any]:
        return {"min_ratio" if self.filter == "minp" else "threshold": self.kappa}

    def _gap(self, scored: Scored, where: torch.Tensor) -> torch.Tensor:
        gap = torch.full(where.shape, -math.inf, dtype=torch.float32, device=where.device)
        # called with an empty selection too: gathering a sharded head is a collective
        gap[where] = proxy_gap(scored.statistics(where, **self._filter())).to(gap)
        return gap

    def _log(
        self,
        tokens: Tokens,
        negative: torch.Tensor,
        candidates: torch.Tensor,
        gate: torch.Tensor,
        log_ratio: torch.Tensor,
    ) -> None:
        gauges = tokens.gauges
        gauges.mean("negative_tokens", negative.sum())
        gauges.mean("candidates", candidates.sum())
        gauges.mean("gated_tokens", gate.sum())
        gauges.mean("gated_share", gate, where=tokens.mask)
        gauges.mean("log_ratio_mean", log_ratio, where=gate)
        gauges.mean("bounded_share", log_ratio.detach().exp() - log_ratio.detach() - 1 > K3_MAX, where=gate)


def _off_policy(trainer: Mapping[str, Any]) -> bool:
    accumulation = trainer.get("gradient_accumulation_steps") or 1
    every = (trainer.get("steps_per_generation") or accumulation) * (trainer.get("num_iterations") or 1)
    return accumulation % every != 0
