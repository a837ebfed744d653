r"""TDPO: the divergence of every token inside the preference loss (arXiv 2404.11999).

Idea
    DPO holds the policy near the reference only through log-ratios of the tokens that happen to be in the
    data. The forward KL on rejected responses is then free to grow much faster than on chosen ones. TDPO
    derives the loss for generation as a sequence of decisions, and the difference of the two responses'
    divergences appears inside the sigmoid: it is summed over the full next-token distribution at every
    place of the response.

Formula
    With rho(y) the sum of log pi - log ref over the tokens of a response, k_t = KL(ref(.|s_t) ||
    pi(.|s_t)) the forward KL at a place (reference first), K(y) its sum over the response, sg a stopped
    gradient, and mean over pairs::

        U   = rho(y_w) - rho(y_l)
        TDPO-1:  L = -log sigma( beta (U - [K(y_l) - K(y_w)]) )
        TDPO-2:  L = -log sigma( beta (U - alpha [K(y_l) - sg K(y_w)]) )

    As a score of one response: S = rho + K, and S = rho + alpha K with the gradient of K in rejected
    responses only. So K rewards a chosen response that the policy has moved away from, and TDPO-2 leaves
    only the brake on rejected ones. Nothing is divided by lengths. ``rewards/chosen`` and
    ``rewards/rejected`` are beta S, which for TDPO-1 is what the official code logs.

Defaults and where they come from
    variant 2 with alpha 0.5 (paper and code); beta 0.1 is the trainer's. The README of the official code
    advises variant 1 for low learning rates and 2 for higher ones; it trained with RMSprop at 5e-6, 150
    steps of warm-up, batches of 64 and gradients clipped at 10. alpha 0 with variant 2 is DPO, bit for
    bit.

Needs
    Reference and policy at every token of a response, with their full distributions: no forward beyond
    DPO's two, but both LM heads are read together, a tile at a time, and no tensor of tokens times
    vocabulary is made. The log-probabilities are then made in fp32 at least, also where TRL's head rounds
    logits to bfloat16.

Time and memory
    Against TRL's ``sigmoid`` at a vocabulary of 151,936, responses of 48 tokens without padding, one CPU
    thread, processor time, median ratio of neighbouring steps with quartiles (aim: 1.35): TDPO-2 0.93
    [0.90, 0.97], SparsePO 1.00 [0.95, 1.02], MaPO 1.02 [0.99, 1.07]. The one head product more is paid for by
    tiles that fit the cache. With prompts of 8 tokens and responses of 16 to 48, of which TRL's head scores
    all places on a CPU and this one the responses, 0.69 [0.63, 0.72] and 0.72 [0.65, 0.80]. Peak memory of
    the process 0.83 for all three (aim: 1.10; that of TRL itself varies by a tenth). Not measured on a GPU:
    there TRL folds its tiles in Triton, this kernel in tensor operations, so expect more::

        MALLOC_ARENA_MAX=1 MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 \
            python scripts/bench/bench_preference.py --pairs 2 --prompt 1 --shortest 48 --tokens 48 \
            --steps 13 --warmup 2 --no-memory
        python scripts/bench/bench_preference.py --pairs 2 --prompt 1 --shortest 48 --tokens 48 --no-time

Composes with
    Every loss of the pair margin (sigmoid, hinge, ipo, robust, exo_pair, discopop, ...), TRL's weights,
    LoRA, RPO, Flex-DPO, feasible learning. Refused: ``precompute_ref_log_probs`` (sums only),
    ``ld_alpha`` (undefined for the divergence), f-divergences, losses that do not use the margin. With
    SparsePO the divergences of both methods add up: take one of them.

Does it do what it claims?
    It brakes: at beta 0.1 the KL of samples after one epoch is 4.3 nats where DPO's is 15.2, with the same
    accuracy on held-out pairs. A better exchange of reward for KL did not show: at equal KL its score is
    -0.012 [-0.025, 0.001] beside DPO's curve. The table is on the page of ``sparse_po``.

When not to use it
    - When chosen and rejected are one text. TDPO-1 then has no gradient, TDPO-2 has one as soon as the
      policy has moved, because only one side is stopped: drop such pairs.
    - When memory allows no reference model and its sums are precomputed.

What to watch
    ``tdpo/kl_chosen`` and ``tdpo/kl_rejected`` (nats per response) and ``tdpo/kl_difference``, which DPO
    lets grow and TDPO should not; ``tdpo/empty_rows``, responses without a token.

Official code
    Vance0124/Token-level-Direct-Preference-Optimization. Its configuration has TDPO-2 switched off, and
    the command in its README that is called TDPO-2 does not switch it on. It takes the logarithm of a
    softmax, which is NaN where a reference probability underflows; here a token that the reference
    excludes adds nothing.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from posttrain._lazy import torch
from posttrain.preference.method import Batch, Method, Need


def tdpo_terms(
    kl: torch.Tensor, chosen: torch.Tensor, *, variant: Literal[1, 2] = 2, alpha: float = 0.5
) -> torch.Tensor:
    """Return what the score of a response gains at each token (arXiv 2404.11999).

    Args:
        kl: (R, T) KL(ref || pi), nats.
        chosen: (R,) bool.
        variant: 1 or 2.
        alpha: Weight, of variant 2.

    Returns:
        (R, T): ``kl`` for variant 1; alpha ``kl``, without gradient in chosen rows, for variant 2.
    """
    if variant == 1:
        return kl
    return alpha * torch.where(chosen.unsqueeze(1), kl.detach(), kl)


class TDPO(Method):
    """Balance the divergence on chosen and rejected responses. See the module page."""

    name = "tdpo"
    title = "TDPO: token-level forward KL inside the preference loss"
    paper = "2404.11999"
    needs_margin = True

    variant: Literal[1, 2] = Field(
        2, description="1: plain; 2: weighted by alpha, gradient to rejected only."
    )
    alpha: float = Field(0.5, ge=0, description="Weight of the divergence in variant 2; 0 is DPO.")

    @property
    def neutral(self) -> bool:
        """Variant 2 with alpha 0 is DPO."""
        return self.variant == 2 and self.alpha == 0

    @property
    def needs(self) -> frozenset[Need]:
        """The divergence."""
        return frozenset({"kl"})

    def token_scores(self, batch: Batch) -> torch.Tensor:
        """Return the terms, and log the divergences."""
        assert batch.kl is not None
        log_divergences(batch)
        return tdpo_terms(batch.kl, batch.chosen, variant=self.variant, alpha=self.alpha)


def log_divergences(batch: Batch) -> None:
    """Log the sequence divergences in nats per response, and how many responses are empty."""
    assert batch.kl is not None
    totals = torch.where(batch.mask, batch.kl.detach(), 0.0).sum(dim=1)
    chosen, rejected = totals.chunk(2)
    batch.gauges.mean("kl_chosen", chosen)
    batch.gauges.mean("kl_rejected", rejected)
    batch.gauges.mean("kl_difference", rejected - chosen)
    batch.gauges.mean("empty_rows", (~batch.mask.any(dim=1)).float())
