r"""ACE: asymmetric confidence penalties for errors (arXiv 2602.21420).

Idea
    All wrong completions of a group share one negative advantage, so a wrong path that training itself
    has made *more* likely than under the initial policy is punished no harder than a harmless slip. ACE
    multiplies the advantage of errors by a factor that grows smoothly with that drift; correct
    completions are untouched.

Formula
    For row i with T_i model-written tokens (mask m), in nats per token::

        c_i  = ( sum_t m_it (log pi(y_it) - log pi_ref(y_it)) ) / T_i
        w_i  = 1 + alpha * softplus(c_i)     if row i is an error, else 1
        A'_i = stop_gradient(w_i) * A_i

    A' replaces A in the base objective (GRPO, DAPO, Dr.GRPO, ...); nothing else changes. A row is an
    error when its advantage is negative (``error_set="negative_advantage"``), or when moreover its reward
    is below ``reward_threshold`` (``"reward_below"``). A group whose rewards are all equal has no errors.

Defaults and where they come from
    alpha 1.0 (best of the paper's sweep, as reported), softplus (ReLU was ablated and is worse), division
    by length on, policy side "old" (the policy that is about to be updated; on-policy it equals the live
    one). ``c_clip`` is ours and off. ``activation="constant"`` is ours too: w = 1 + alpha ln 2 for every
    error, the control that tells what the drift adds to a plain larger negative step. The paper's runs use
    a base KL of 0.001, groups of 8 and a binary verifier; its learning rate and batch size are unconfirmed.

Needs
    Log-probabilities under the fixed initial policy, also with ``beta=0``: one extra forward per rollout,
    without gradient. With full fine-tuning that is a frozen copy of the model (its memory once more);
    with a new adapter the base model with the adapter switched off, ``modules_to_save`` included; with an
    adapter that acts from the start (already trained, or PiSSA and its kin) a frozen copy of the adapter.
    Ids, masks, temperature and fp32 accumulation are those of the policy, so c is 0 at the first step;
    dropout is off in the reference, so a policy with dropout starts a little below 0.

Composes with
    Every TRL ``loss_type`` (each is proportional to the advantage), both importance-sampling levels,
    ``delta``, off-policy schedules (c stays that of the policy that generated), clip-higher, every
    ``scale_rewards``, both reward aggregations, the vLLM correction (c uses the trainer's own
    log-probabilities), LoRA. With ``loss_type="luspo"`` set ``importance_sampling_level="sequence"``, as
    without ACE. With TTRL there is a warning: an outvoted right answer counts as an error. Refused:
    ``sync_ref_model``, which moves the reference, so that the drift would start from zero again at every
    synchronisation.

When not to use it
    - When one more forward per rollout, or the copy of the model, is not affordable.
    - When a correct answer can have a negative advantage, for example under a length penalty: then use
      ``reward_below`` with a threshold that only failed answers fall under, or none of this.
    - When you want pass@1 at any price: ACE is meant to keep pass@k up, and too large an alpha lowers
      pass@1.
    - When the verifier is unreliable: a right answer that is marked wrong is punished harder the surer
      the policy is of it.
    - To compare it with plain GRPO at an equal learning rate without care: c = 0 is not neutral. At the
      first step every error is already amplified by 1 + alpha ln 2 (1.69 at alpha = 1), so give the
      baseline the same negative step, or read ``ace/weight_mean``.

What to watch
    ``ace/shift_mean`` and ``ace/shift_max`` (c, nats per token), ``ace/error_rows`` and
    ``ace/amplified_rows`` (parts of all rows), ``ace/weight_mean`` (w over all rows). w grows like alpha
    c without bound: a ``shift_max`` above about 5 calls for ``c_clip``, or for a smaller learning rate.

Official code
    None was found. Third-party snippets that use ``1 + alpha * max(c, 0)`` without the division by length
    are the ReLU ablation, available here as ``activation="relu", length_normalize=False``.

Evidence at laptop size
    ``configs/evidence/ace.yaml`` (its first lines are the command): the embedded model learns 32 sums by
    heart, and pass@k on other sums falls from the 0.98 of the warm start. Nine seeds (100 to 108), mean and
    95 % t interval, differences paired by seed; measured on a 16-core x86 server, one thread a run::

        pass@    grpo                 ace-1 - grpo             ace-2 - grpo             constant-2 - grpo
        1        0.169 [0.154, 0.184]  +0.006 [-0.016, 0.028]  +0.016 [0.002, 0.030] *  +0.005 [-0.020, 0.030]
        4        0.265 [0.242, 0.289]  +0.014 [-0.019, 0.048]  +0.033 [0.013, 0.053] *  -0.010 [-0.057, 0.036]
        16       0.377 [0.345, 0.409]  +0.024 [-0.018, 0.066]  +0.054 [0.022, 0.086] *  -0.031 [-0.093, 0.032]
        64       0.509 [0.467, 0.551]  +0.034 [-0.020, 0.089]  +0.073 [0.024, 0.123] *  -0.044 [-0.123, 0.035]
        reward   0.792 [0.742, 0.843] -0.023 [-0.078, 0.032]  -0.102 [-0.164, -0.040]  -0.178 [-0.284, -0.071]

    (``reward`` is that of training at the end; * marks a gain whose interval leaves zero out.) With
    alpha = 2 the claim shows: more pass@k, the more the larger k, and no less pass@1. It is the drift that
    does it, not the larger negative step: with the constant factor 1 + 2 ln 2 on every error pass@64 does not
    rise (ace-2 minus constant-2: +0.117 [0.046, 0.188]). With the paper's alpha = 1 the gain has the same
    sign at every k, but its interval includes zero. No arm comes near the 0.98 of the start.
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
    activation: Literal["softplus", "relu", "constant"] = "softplus",
    c_clip: float | None = None,
) -> torch.Tensor:
    """Return w, the factor of each row's advantage (arXiv 2602.21420).

    Args:
        shift: (B,) c of :func:`confidence_shift`.
        is_error: (B,) bool, rows to amplify.
        alpha: Strength, >= 0.
        activation: ``softplus``, the ``relu`` ablation, or ``constant``: softplus at c = 0, ln 2, whatever c.
        c_clip: Upper bound on c before the activation, or None.

    Returns:
        (B,) detached, >= 1, exactly 1 where ``is_error`` is False.
    """
    shift = shift.detach()
    if c_clip is not None:
        shift = shift.clamp(max=c_clip)
    if activation == "constant":
        shift = torch.zeros_like(shift)
    functional = torch.nn.functional
    grown = functional.relu(shift) if activation == "relu" else functional.softplus(shift)
    return torch.where(is_error, 1 + alpha * grown, torch.ones_like(shift))


class ACE(Method):
    """Amplify the negative advantage of errors that drifted above the reference. See the module page."""

    name = "ace"
    title = "ACE: stronger correction of overconfident errors"
    paper = "2602.21420"

    alpha: float = Field(1.0, ge=0, description="Strength; 0 switches the method off.")
    activation: Literal["softplus", "relu", "constant"] = Field(
        "softplus", description="relu is the paper's ablation; constant is a control, blind to the drift."
    )
    length_normalize: bool = Field(True, description="Divide the drift by the number of tokens.")
    policy_logps: Literal["old", "live"] = Field(
        "old", description="Policy side of the drift: the one that generated, or the one being updated."
    )
    error_set: Literal["negative_advantage", "reward_below"] = Field(
        "negative_advantage", description="Which rows count as errors; both ask for a negative advantage."
    )
    reward_threshold: float | None = Field(
        None, description="With reward_below: rows with a reward strictly below it are errors."
    )
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
        """With alpha 0 every weight is 1."""
        return self.alpha == 0

    @property
    def needs(self) -> frozenset[Need]:
        """The other side of the drift."""
        return frozenset({"ref_logps"})

    def conflicts(self, setup: Setup) -> Iterator[Conflict]:
        """Refuse a reference that moves; warn where right answers can count as errors."""
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
        if self.reward_threshold is not None:
            is_error &= tokens.reward < self.reward_threshold
        return is_error

    def token_weights(self, tokens: Tokens) -> torch.Tensor | None:
        """Return (B, 1) factors of the advantages, and log the gauges."""
        policy = tokens.old_logps if self.policy_logps == "old" else tokens.logps.detach()
        assert tokens.ref_logps is not None
        shift = confidence_shift(
            policy, tokens.ref_logps, tokens.mask, length_normalize=self.length_normalize
        )
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
