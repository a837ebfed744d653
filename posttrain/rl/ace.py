r"""ACE: asymmetric confidence penalties for errors (arXiv 2602.21420).

Idea
    All wrong completions of a group share one negative advantage, so a wrong path that training itself has
    made *more* likely than under the initial policy is punished no harder than a harmless slip. ACE
    multiplies the advantage of errors by a factor that grows smoothly with that drift; correct completions
    are untouched.

Formula
    For row i with T_i model-written tokens (mask m), in nats per token::

        c_i  = ( sum_t m_it (log pi(y_it) - log pi_ref(y_it)) ) / T_i
        w_i  = 1 + alpha * softplus(c_i)     if row i is an error, else 1
        A'_i = stop_gradient(w_i) * A_i

    A' replaces A in the base objective (GRPO, DAPO, Dr.GRPO, ...); nothing else changes. A row is an error
    when its advantage is negative (``error_set="negative_advantage"``), or when moreover its reward is
    below ``reward_threshold`` (``"reward_below"``). A group whose rewards are all equal has no errors.

Defaults and where they come from
    alpha 1.0 (best of the paper's sweep, as reported), softplus (ReLU was ablated and is worse), division
    by length on, policy side "old" (the policy that is about to be updated; on-policy it equals the live
    one). ``c_clip`` is ours and off. The paper's runs use a base KL of 0.001, groups of 8 and a binary
    verifier; its learning rate and batch size are unconfirmed.

Needs
    Log-probabilities under the fixed initial policy, also with ``beta=0``: one extra forward per rollout.
    With an adapter that is the base model with the adapter disabled; with full fine-tuning a frozen copy.

Composes with
    Every TRL ``loss_type`` and both importance-sampling levels, LoRA, clip-higher, dynamic sampling, TTRL
    (with a warning: an outvoted right answer counts as an error). Refused: ``sync_ref_model`` (the drift
    would restart from zero at every synchronisation) and ``loss_type="luspo"`` with token-level sampling
    only as far as TRL itself warns.

When not to use it
    When the reference log-probabilities are not affordable, when rewards are shaped so that a correct
    answer can have a negative advantage (use ``reward_below`` then), or when you want pass@1 at any price:
    too large an alpha lowers it. Note that c = 0 is not neutral: at the first step every error is already
    amplified by 1 + alpha ln 2 (1.69 at alpha = 1), so compare runs at an equal effective negative step.

Official code
    None was found. Third-party snippets that use ``1 + alpha * max(c, 0)`` without the division by length
    are the ReLU ablation, available here as ``activation="relu", length_normalize=False``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, model_validator

from posttrain._lazy import torch
from posttrain.rl.method import Conflict, Method, Need, Setup, Tokens


def confidence_shift(
    policy_logps: torch.Tensor,
    reference_logps: torch.Tensor,
    mask: torch.Tensor,
    *,
    length_normalize: bool = True,
) -> torch.Tensor:
    """Return c, the drift of each completion from the reference (arXiv 2602.21420).

    Args:
        policy_logps: (B, C) log-probabilities of the sampled tokens under the policy, nats.
        reference_logps: (B, C) the same under the reference.
        mask: (B, C), 1 on tokens written by the model.
        length_normalize: Divide by the number of such tokens (nats per token), else the sum (nats).

    Returns:
        (B,), 0 for a row without tokens. Accumulated in fp32 at least.

    Raises:
        FloatingPointError: A log-probability under the mask is not finite; the message names the rows.
    """
    valid = mask.bool()
    dtype = torch.promote_types(policy_logps.dtype, torch.float32)
    shift = policy_logps.to(dtype) - reference_logps.to(dtype)
    bad = (~torch.isfinite(shift) & valid).any(dim=1)
    if bad.any():
        rows = bad.nonzero().flatten().tolist()
        raise FloatingPointError(
            f"ACE found non-finite log-probabilities in rows {rows} of the micro-batch. "
            "Check the reference checkpoint and its precision."
        )
    total = shift.masked_fill(~valid, 0.0).sum(dim=1)
    return total / valid.sum(dim=1).clamp(min=1) if length_normalize else total


def error_weights(
    shift: torch.Tensor,
    is_error: torch.Tensor,
    *,
    alpha: float = 1.0,
    activation: Literal["softplus", "relu"] = "softplus",
    c_clip: float | None = None,
) -> torch.Tensor:
    """Return w, the factor of each row's advantage (arXiv 2602.21420).

    Args:
        shift: (B,) c of :func:`confidence_shift`.
        is_error: (B,) bool, rows to amplify.
        alpha: Strength, >= 0.
        activation: ``softplus`` or the ``relu`` ablation.
        c_clip: Upper bound on c before the activation, or None.

    Returns:
        (B,) detached, >= 1, exactly 1 where ``is_error`` is False.
    """
    shift = shift.detach()
    if c_clip is not None:
        shift = shift.clamp(max=c_clip)
    functional = torch.nn.functional
    grown = functional.softplus(shift) if activation == "softplus" else functional.relu(shift)
    return torch.where(is_error, 1 + alpha * grown, torch.ones_like(shift))


class ACE(Method):
    """Amplify the negative advantage of errors that drifted above the reference. See the module page."""

    name = "ace"
    title = "ACE: stronger correction of overconfident errors"
    paper = "2602.21420"

    alpha: float = Field(1.0, ge=0, description="Strength; 0 switches the method off.")
    activation: Literal["softplus", "relu"] = Field("softplus", description="relu is the paper's ablation.")
    length_normalize: bool = Field(True, description="Divide the drift by the number of tokens.")
    policy_logps: Literal["old", "live"] = Field(
        "old", description="Policy side of the drift: the one that generated, or the one being updated."
    )
    error_set: Literal["negative_advantage", "reward_below"] = Field(
        "negative_advantage", description="Which rows count as errors; both ask for a negative advantage."
    )
    reward_threshold: float | None = Field(None, description="Rows with a reward strictly below it are errors.")
    c_clip: float | None = Field(None, gt=0, description="Upper bound on the drift, ours; 5-20 is sensible.")

    @model_validator(mode="after")
    def _threshold_goes_with_error_set(self) -> ACE:
        if (self.error_set == "reward_below") != (self.reward_threshold is not None):
            raise ValueError(
                "error_set='reward_below' and reward_threshold go together: found "
                f"error_set={self.error_set!r}, reward_threshold={self.reward_threshold}"
            )
        return self

    @property
    def neutral(self) -> bool:
        return self.alpha == 0

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"ref_logps"})

    def conflicts(self, setup: Setup) -> Iterator[Conflict]:
        if setup.trainer.get("sync_ref_model"):
            yield Conflict(
                "ACE measures drift from a fixed reference, but sync_ref_model=true moves it and resets the "
                "drift at every synchronisation: set sync_ref_model to false",
                field="sync_ref_model",
            )
        if setup.task == "ttrl" or "ttrl" in setup.methods:
            yield Conflict("ACE with TTRL also amplifies right answers that were outvoted", fatal=False)

    def errors(self, tokens: Tokens) -> torch.Tensor:
        """Return the (B,) bool mask of rows that count as errors."""
        advantages = tokens.advantages
        if advantages.dim() == 2:
            # a per-token advantage is one row of one sign for the methods that come before ACE
            advantages = (advantages * tokens.mask).sum(dim=1)
        is_error = (advantages < 0) & ~tokens.tied
        if self.error_set == "reward_below":
            is_error &= tokens.reward < self.reward_threshold
        return is_error

    def token_weights(self, tokens: Tokens) -> torch.Tensor | None:
        policy = tokens.old_logps if self.policy_logps == "old" else tokens.logps.detach()
        assert tokens.ref_logps is not None
        shift = confidence_shift(policy, tokens.ref_logps, tokens.mask, length_normalize=self.length_normalize)
        is_error = self.errors(tokens)
        weights = error_weights(
            shift, is_error, alpha=self.alpha, activation=self.activation, c_clip=self.c_clip
        )
        tokens.gauges.mean("shift_mean", shift)
        tokens.gauges.max("shift_max", shift)
        tokens.gauges.mean("error_rows", is_error.float())
        tokens.gauges.mean("amplified_rows", (weights > 1).float())
        tokens.gauges.mean("weight_mean", weights)
        return weights.unsqueeze(1)
