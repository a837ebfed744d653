r"""SPINE: learn at forking tokens only, and keep their entropy in a band (arXiv 2511.17938).

Idea
    Label-free training with a majority vote (TTRL) updates every token with a noisy reward and tends to
    collapse: the vote agrees more and more, answers shorten, accuracy falls. SPINE lets only the high-entropy
    tokens of each response, its forks, receive the policy gradient, and holds the entropy at those tokens
    inside a band taken from the response itself. It needs no vote: mask and band work with any reward.

Formula
    For response i, H_it in nats is the entropy of the distribution that produced token t, m the tokens the
    model wrote, T_i their number, S_i the forks, taken from H without gradient at every micro-step::

        f_it = m_it * 1[ t in S_i ]
        L    = Agg( f * policy term )
             + Agg( f * ( low relu(lo_i - H) + high relu(H - hi_i) ) )       gradient through H only
             + kl_coef * mean over the forks of k3(pi_ref, pi)

    Agg has the divisor of the base ``loss_type``, which counts all valid tokens, not the forks. TRL's own KL
    term (``beta``) acts on forks only and keeps that divisor. ``variant`` chooses S_i and the band:

    * ``quantile`` (first version): S_i are the tokens at or above the (1 - fork_ratio) quantile of the row,
      linear interpolation, all ties kept. lo, hi = the 10 % and 50 % quantiles of the fork entropies.
    * ``otsu`` (second version): S_i are the tokens above Otsu's threshold on a 100-bin histogram of the row
      between its extremes. hi = median of the fork entropies, lo = max(0, hi - 1.4826 * median absolute
      deviation). A median of an even number of values is the mean of the two middle ones. A row with
      constant entropy or fewer than two tokens falls back to the quantile rule.

Defaults and where they come from
    fork_ratio 0.2, band quantiles 0.1 and 0.5, factor 1.4826: reported for the paper. 100 bins: inferred.
    **Placeholders**, because the published values are not known: ``band_weight_low`` and
    ``band_weight_high`` 0.01, ``kl_coef`` 0 (optional in the paper). Unconfirmed and therefore options: the
    reading of "above Otsu's threshold" (``otsu_rule``: strictly above the upper edge of the split bin, ours,
    or at or above its centre, as an independent re-implementation has it, which also takes the largest
    low-entropy value when the histogram has a gap), and whether the band acts in groups whose rewards are all
    equal (``band_skip_zero_advantage``: it does by default). Per response is inferred from the band, which is
    defined per response; one quantile over the whole micro-batch is TRL's own ``top_entropy_quantile``.
    The published runs use TTRL with 8 votes, temperature 0.7 and top-p 0.95.

Needs
    Nothing beyond the forward that TRL does anyway; on a CPU with a large vocabulary the LM head sees the
    tokens outside the band once more in the backward. With ``kl_coef`` above 0 log-probabilities under the
    initial policy. The paper's KL runs over the whole vocabulary; ours is k3 on the sampled token, which
    estimates it without bias on-policy and needs no logits.

Composes with
    TTRL (the published setting), ACE, Lp-Reg, every ``loss_type`` with a term per token, LoRA. Refused:
    ``top_entropy_quantile`` below 1 (two masks), ``entropy_coef`` and ``use_adaptive_entropy`` (two
    entropy controllers), ``importance_sampling_level="sequence"`` (a token mask means nothing in one ratio
    per sequence). AEPO in its hot regime is fought by the upper hinge: a warning.

When not to use it
    When a falling entropy is what you fight: the band re-centres on the policy at every step, so it is no
    entropy target, and with hi at the median it presses the upper half of the forks down at every step. Nor
    should a rising vote reward be read as progress: an independent replication found 84-90 % of the rewarded
    answers wrong and no stable gain. Look at ``ttrl/label_accuracy``.

Official code
    None: the repository holds a README and figures. TRL's logged ``kl`` is then the sum over forks divided by
    the number of all tokens.

Evidence at laptop size
    ``configs/evidence/spine.yaml`` (its first lines are the commands): 30 steps of TTRL on sums solved step
    by step, from a policy with pass@1 0.485 and pass@4 0.750. ``mask``: forks only, no band; ``band``: both
    band weights 0.3; ``otsu``, and ``kl`` (``kl_coef`` 1): band weights 0.01 as by default. Ten seeds (300 to
    309), mean and 95 % t interval, differences paired by seed; two CPU cores. Held out::

                 pass@1                    pass@4
        ttrl      0.467 [0.407, 0.528]      0.661 [0.593, 0.728]
        mask     +0.018 [-0.019, 0.056]    +0.018 [-0.025, 0.061]
        band     +0.082 [0.029, 0.136] *   +0.077 [0.022, 0.132] *
        otsu     -0.020 [-0.096, 0.057]    -0.011 [-0.090, 0.069]
        kl       +0.032 [-0.031, 0.095]    +0.094 [0.027, 0.161] *

    and over the last third of training (0.619, 0.096 and 21.0 at its first step)::

                 label accuracy            entropy, nats             tokens per answer
        ttrl      0.554 [0.496, 0.613]      0.074 [0.070, 0.078]      20.92 [20.80, 21.03]
        mask     +0.047 [0.008, 0.085] *   +0.000 [-0.002, 0.003]    +0.01 [-0.08, 0.09]
        band     +0.102 [0.058, 0.146] *   -0.007 [-0.009, -0.004]   +0.02 [-0.05, 0.10]
        otsu     +0.019 [-0.069, 0.107]    +0.006 [-0.000, 0.011]    +0.06 [-0.02, 0.15]
        kl       +0.085 [0.028, 0.142] *   +0.014 [0.010, 0.018]     +0.06 [-0.01, 0.13]

    What shows of the claim: TTRL alone loses pass@4 (-0.089 [-0.157, -0.022]) and label accuracy; with a band
    that weighs enough it gains pass@1 (+0.065 [0.020, 0.109] over the start) and keeps pass@4, with the KL it
    keeps both. The mask alone slows the loss of label accuracy, no more, and Otsu's variant changes nothing.
    What does not show: answers do not shorten here, in any arm, so nothing is said about length. And the band
    does not keep exploration alive, it lowers the entropy. The same steps with verified rewards gain far more
    (pass@1 0.688). The first five seeds alone left zero inside every interval of the held-out differences;
    five were added then, and this is the table of all ten.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, model_validator

from posttrain._lazy import torch
from posttrain.rl.method import Conflict, Method, Need, Setup, Tokens
from posttrain.rl.quantiles import row_quantile, wide

MAD_FACTOR = 1.4826  # makes the median absolute deviation of a normal distribution its standard deviation


def quantile_forks(entropies: torch.Tensor, mask: torch.Tensor, ratio: float = 0.2) -> torch.Tensor:
    """Return the forks of the first version: per row the top ``ratio`` of the entropies, ties included.

    Args:
        entropies: (B, C) in nats.
        mask: (B, C), non-zero on tokens the model wrote.
        ratio: Share of tokens, in (0, 1].

    Returns:
        (B, C) bool, False outside the mask.

    Raises:
        FloatingPointError: An entropy under the mask is not finite.
    """
    valid = _finite(entropies, mask)
    threshold = row_quantile(entropies.detach(), valid, 1 - ratio)
    return (wide(entropies.detach()) >= threshold.unsqueeze(1)) & valid


def otsu_forks(
    entropies: torch.Tensor,
    mask: torch.Tensor,
    *,
    bins: int = 100,
    rule: Literal["upper_edge", "center"] = "upper_edge",
    fallback_ratio: float = 0.2,
) -> torch.Tensor:
    """Return the forks of the second version: per row the class above Otsu's threshold.

    The histogram runs from the smallest to the largest entropy of the row, bins half-open, the last closed.
    Of the splits with the largest between-class variance (equal up to rounding) the first is taken.

    Args:
        entropies: (B, C) in nats.
        mask: (B, C), non-zero on tokens the model wrote.
        bins: Number of bins, >= 2.
        rule: ``upper_edge``: strictly above the upper edge of the split bin; ``center``: at or above its
            centre.
        fallback_ratio: Ratio of :func:`quantile_forks` for rows with constant entropy or below two tokens.

    Returns:
        (B, C) bool, False outside the mask; at least one fork in every row that has a token.

    Raises:
        FloatingPointError: An entropy under the mask is not finite.
    """
    valid = _finite(entropies, mask)
    values = wide(entropies.detach())
    low = values.masked_fill(~valid, torch.inf).amin(dim=1, keepdim=True)
    high = values.masked_fill(~valid, -torch.inf).amax(dim=1, keepdim=True)
    spread = (high > low).squeeze(1)
    # rows that fall back get a harmless histogram
    low = torch.where(spread.unsqueeze(1), low, torch.zeros_like(low))
    span = torch.where(spread.unsqueeze(1), high - low, torch.ones_like(low))
    edges = low + torch.arange(1, bins, device=values.device, dtype=values.dtype) * (span / bins)
    index = torch.searchsorted(edges, values.contiguous(), right=True)
    counts = torch.zeros(values.size(0), bins, dtype=values.dtype, device=values.device)
    counts.scatter_add_(1, index, valid.to(values.dtype))
    # Otsu's choice does not change under a linear map of the levels: whole numbers keep the sums exact
    level = torch.arange(bins, device=values.device, dtype=values.dtype)
    below, sum_below = counts.cumsum(1), (counts * level).cumsum(1)
    above, sum_above = below[:, -1:] - below, sum_below[:, -1:] - sum_below
    gap = sum_below / below.clamp(min=1) - sum_above / above.clamp(min=1)
    score = below * above * gap**2
    tied = score >= score.amax(dim=1, keepdim=True) * (1 - 1e-12)
    split = tied.to(torch.int8).argmax(dim=1, keepdim=True)
    if rule == "upper_edge":
        chosen = values > low + (split + 1) * span / bins
    else:
        chosen = values >= low + (split + 0.5) * span / bins
    chosen &= valid & spread.unsqueeze(1)
    fallback = quantile_forks(entropies, mask, fallback_ratio)
    return torch.where(chosen.any(dim=1, keepdim=True), chosen, fallback)


def quantile_band(
    entropies: torch.Tensor, forks: torch.Tensor, low_q: float = 0.1, high_q: float = 0.5
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (lo, hi) of each row, (B,) detached: quantiles of the fork entropies (version 1)."""
    entropies = entropies.detach()
    return row_quantile(entropies, forks, low_q), row_quantile(entropies, forks, high_q)


def mad_band(entropies: torch.Tensor, forks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (lo, hi) of each row, (B,) detached: hi the median, lo a scaled MAD below it (version 2)."""
    entropies = entropies.detach()
    median = row_quantile(entropies, forks, 0.5)
    deviation = (wide(entropies) - median.unsqueeze(1)).abs()
    scale = MAD_FACTOR * row_quantile(deviation, forks, 0.5)
    return (median - scale).clamp(min=0), median


def band_hinge(
    entropies: torch.Tensor,
    forks: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    *,
    weight_low: float = 0.01,
    weight_high: float = 0.01,
) -> torch.Tensor:
    """Return the per-token band term, (B, C), 0 outside the forks; gradient flows through ``entropies`` only.

    Args:
        entropies: (B, C) in nats, with gradient.
        forks: (B, C) bool.
        low: (B,) lower bound in nats.
        high: (B,) upper bound in nats.
        weight_low: Weight of relu(low - H).
        weight_high: Weight of relu(H - high).
    """
    relu = torch.nn.functional.relu
    inside = entropies.masked_fill(~forks, 0.0)
    lower = low.detach().to(inside.dtype).unsqueeze(1)
    upper = high.detach().to(inside.dtype).unsqueeze(1)
    term = weight_low * relu(lower - inside) + weight_high * relu(inside - upper)
    return term.masked_fill(~forks, 0.0)


def fork_kl(logps: torch.Tensor, ref_logps: torch.Tensor, forks: torch.Tensor) -> torch.Tensor:
    """Return the mean over the forks of k3 = exp(d) - d - 1, d = ref - logp; differentiable 0 without forks.

    Args:
        logps: (B, C) log-probabilities of the sampled tokens, nats, with gradient.
        ref_logps: (B, C) under the initial policy.
        forks: (B, C) bool.

    Raises:
        FloatingPointError: A value at a fork is not finite; the message names the rows.
    """
    difference = ref_logps - logps
    bad = (~torch.isfinite(difference) & forks).any(dim=1)
    if bad.any():
        raise FloatingPointError(
            f"SPINE found non-finite log-probabilities at forks of rows {bad.nonzero().flatten().tolist()} "
            "of the micro-batch. Check the reference checkpoint and its precision."
        )
    difference = difference.masked_fill(~forks, 0.0)
    # expm1 keeps the small differences of the first steps
    return (torch.expm1(difference) - difference).sum() / forks.sum().clamp(min=1)


class Spine(Method):
    """Policy gradient at forking tokens only, with an entropy band around them. See the module page."""

    name = "spine"
    title = "SPINE: forking tokens only, entropy held in a band"
    paper = "2511.17938"

    variant: Literal["quantile", "otsu"] = Field("quantile", description="First or second published version.")
    fork_ratio: float = Field(0.2, gt=0, le=1, description="Share of tokens that are forks (quantile).")
    band_low_q: float = Field(0.1, ge=0, le=1, description="Quantile of the lower bound (quantile).")
    band_high_q: float = Field(0.5, ge=0, le=1, description="Quantile of the upper bound (quantile).")
    otsu_bins: int = Field(100, ge=2, le=4096, description="Bins of the histogram (otsu); inferred.")
    otsu_rule: Literal["upper_edge", "center"] = Field(
        "upper_edge", description="What counts as above Otsu's threshold; the published rule is unconfirmed."
    )
    band_weight_low: float = Field(0.01, ge=0, description="Weight of the lower hinge; a placeholder.")
    band_weight_high: float = Field(0.01, ge=0, description="Weight of the upper hinge; a placeholder.")
    band_skip_zero_advantage: bool = Field(
        False, description="Leave the band out in groups whose rewards are all equal; ours."
    )
    kl_coef: float = Field(
        0.0, ge=0, description="Weight of the KL to the initial policy at forks; optional."
    )

    @model_validator(mode="after")
    def _band_is_ordered(self) -> Spine:
        if self.band_low_q >= self.band_high_q:
            raise ValueError(
                f"band_low_q must be below band_high_q, found {self.band_low_q} and {self.band_high_q}"
            )
        return self

    @property
    def neutral(self) -> bool:
        """Every token is a fork, and neither band nor KL has a weight."""
        everywhere = self.variant == "quantile" and self.fork_ratio == 1
        return everywhere and not self._has_band and self.kl_coef == 0

    @property
    def needs_all_rows(self) -> bool:
        """Band and KL act on every row; the mask alone changes nothing where the advantage is 0."""
        return (self._has_band and not self.band_skip_zero_advantage) or self.kl_coef > 0

    @property
    def needs(self) -> frozenset[Need]:
        """The LM head for the gradient of the band, the initial policy for the KL."""
        needs: set[Need] = {"head"} if self._has_band else set()
        return frozenset(needs | {"ref_logps"} if self.kl_coef > 0 else needs)

    @property
    def _has_band(self) -> bool:
        return self.band_weight_low > 0 or self.band_weight_high > 0

    def conflicts(self, setup: Setup) -> Iterator[Conflict]:
        """Refuse a second token mask, a second entropy controller and sequence-level ratios."""
        trainer = setup.trainer
        quantile = trainer.get("top_entropy_quantile", 1.0)
        if quantile < 1:
            yield Conflict(
                f"SPINE chooses the tokens that train, and so does top_entropy_quantile={quantile:g}: set it "
                "to 1.0, or drop SPINE",
                field="top_entropy_quantile",
            )
        for field in ("entropy_coef", "use_adaptive_entropy"):
            if trainer.get(field):
                yield Conflict(
                    f"SPINE's band already controls the entropy, found {field}={trainer[field]}: set it to "
                    f"{'false' if field == 'use_adaptive_entropy' else 0}, or drop SPINE",
                    field=field,
                )
        if trainer.get("importance_sampling_level") == "sequence":
            yield Conflict(
                "SPINE masks tokens, but importance_sampling_level='sequence' has one ratio per sequence: "
                "set importance_sampling_level to token",
                field="importance_sampling_level",
            )
        if "aepo" in setup.methods and self.band_weight_high > 0:
            yield Conflict(
                "SPINE's upper hinge pushes the entropy down while AEPO raises it: set band_weight_high to 0",
                field="band_weight_high",
                fatal=False,
            )

    def forks(self, tokens: Tokens) -> torch.Tensor:
        """Return the (B, C) bool forks of a micro-batch; computed once."""
        if "spine/forks" not in tokens.carry:
            if self.variant == "quantile":
                found = quantile_forks(tokens.entropies, tokens.mask, self.fork_ratio)
            else:
                found = otsu_forks(
                    tokens.entropies,
                    tokens.mask,
                    bins=self.otsu_bins,
                    rule=self.otsu_rule,
                    fallback_ratio=self.fork_ratio,
                )
            tokens.carry["spine/forks"] = found
        return tokens.carry["spine/forks"]

    def token_mask(self, tokens: Tokens) -> torch.Tensor | None:
        """Return the forks: elsewhere the policy term and TRL's KL are zero."""
        forks = self.forks(tokens)
        tokens.gauges.mean("fork_share", forks.float(), tokens.mask)
        tokens.gauges.mean("fork_entropy", tokens.entropies, forks)
        tokens.gauges.mean("follower_entropy", tokens.entropies, tokens.mask.bool() & ~forks)
        return forks

    def token_penalty(self, tokens: Tokens) -> torch.Tensor | None:
        """Return the band term, 0 outside the forks."""
        if not self._has_band:
            return None
        forks = self.forks(tokens)
        if self.variant == "quantile":
            low, high = quantile_band(tokens.entropies, forks, self.band_low_q, self.band_high_q)
        else:
            low, high = mad_band(tokens.entropies, forks)
        rows = forks.any(dim=1)
        tokens.gauges.mean("band_low", low, rows)
        tokens.gauges.mean("band_high", high, rows)
        tokens.gauges.mean("below_band", (tokens.entropies < low.unsqueeze(1)).float(), forks)
        tokens.gauges.mean("above_band", (tokens.entropies > high.unsqueeze(1)).float(), forks)
        if self.band_skip_zero_advantage:
            forks = forks & ~tokens.tied.unsqueeze(1)
        return band_hinge(
            self._with_gradient(tokens, forks, low.unsqueeze(1), high.unsqueeze(1)),
            forks,
            low,
            high,
            weight_low=self.band_weight_low,
            weight_high=self.band_weight_high,
        )

    def _with_gradient(
        self, tokens: Tokens, forks: torch.Tensor, low: torch.Tensor, high: torch.Tensor
    ) -> torch.Tensor:
        """Return the entropies, with gradient at least where the hinge has a slope."""
        if tokens.head is None or not tokens.head.entropy_gradient_is_cheaper:
            return tokens.entropies
        below = (tokens.entropies < low.to(tokens.entropies.dtype)) & (self.band_weight_low > 0)
        above = (tokens.entropies > high.to(tokens.entropies.dtype)) & (self.band_weight_high > 0)
        return tokens.head.entropies(forks & (below | above), tokens.entropies)

    def mean_penalty(self, tokens: Tokens) -> torch.Tensor | None:
        """Return the KL to the initial policy, a mean over the forks of the micro-batch."""
        if self.kl_coef == 0:
            return None
        assert tokens.ref_logps is not None
        divergence = fork_kl(tokens.logps, tokens.ref_logps, self.forks(tokens))
        tokens.gauges.mean("kl", divergence)
        return self.kl_coef * divergence


def _finite(entropies: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the mask as bool after checking the entropies under it."""
    valid = mask.bool()
    bad = (~torch.isfinite(entropies) & valid).any(dim=1)
    if bad.any():
        raise FloatingPointError(
            f"SPINE found entropies that are not finite in rows {bad.nonzero().flatten().tolist()} of the "
            "micro-batch. Usual causes: a broken checkpoint, float16 overflow, or too high a learning rate."
        )
    return valid
