r"""RPO: the supervised loss as a regulariser of preference optimisation (arXiv 2405.16436).

Idea
    DPO only asks for a distance between two answers, so it may make both less likely as long as the rejected
    one falls faster, and the freed probability goes to answers that no pair speaks about. Optimising against
    the worst reward model that agrees with the data comes out as DPO plus an imitation loss on a baseline
    policy; with the chosen answers as the baseline it is one more term of numbers that are there already.

Formula
    With y_w the chosen answer of T_w tokens, means over the pairs of a micro-batch::

        L = L_DPO + eta beta mean( - sum_t log pi(y_w,t) )              normalization: sum (eq. 4.8)
        L = L_DPO + eta      mean( - sum_t log pi(y_w,t) / T_w )        normalization: token_mean (appendix)

    The gradient to log pi(y_w) grows by eta beta, that to log pi(y_l) is DPO's: ``beta`` rescales DPO,
    ``eta`` turns its direction. log pi is the policy's plain sum, whatever ``ld_alpha``, masks of other
    methods and weights of pairs say; an empty answer adds nothing.

Defaults and where they come from
    eta 0.005 with ``sum``, the paper's for both of its models (beta 0.01 for the 7B Mistral, 0.05 for the 7B
    Gemma). The authors' second code base has eta 0.2 with ``token_mean`` and beta 0.5; its page finds that
    form better for reasoning and the summed one better for chat. ``sum`` grows with length, so a shorter
    ``max_length`` also weakens the term. An eta below 1e-6 switches the method off, as in the authors' code.

Needs
    Nothing: no forward, no reference. References may be precomputed.

Composes with
    Every ``loss_type``, f-divergence and weight of TRL, and every other method: the term is added last and is
    not weighted. With lists it applies to the best answer. Refused: ``sft`` in ``loss_type``, which is
    a second imitation loss. TRL's own recipe for this paper is sigmoid + sft with weights 1 and 0.005; its
    ``sft`` is the mean over all tokens of the micro-batch and knows no beta, so that is another objective.

Other methods with these letters
    Iterative reasoning preference optimisation (arXiv 2404.19733), which TRL once had as ``rpo_alpha``:
    weight 1 on a length-normalised likelihood; and reward-aware preference optimisation of the Nemotron
    models. Neither is this.

When not to use it
    - When the chosen answers are not worth imitating, only better than the rejected ones.
    - When chosen answers come from the policy itself and its likelihood does not fall: see ``shift/chosen``.

What to watch
    ``rpo/nll``, what is added before it is multiplied by eta (and beta); ``shift/chosen`` and
    ``shift/chosen_declined`` of :mod:`posttrain.preference.diagnostics`, which should stay above DPO's.

Official code
    YSLIU627/Regularized-Preference-Optimization.

Does it do what it claims?
    At laptop size yes, at a price. ``configs/evidence/rpo.yaml`` (its first lines are the command), one epoch
    of 570 pairs of story openings, a model of 260,000 weights, beta 0.1, 125 held-out pairs, five seeds, 95 %
    t intervals; Flex-DPO with beta_rejected 0.05 beside it. Nats per answer; wins are those of sampled
    continuations of 48 tokens over the start's, by the known word score::

        arm           chosen_shift         rejected_shift       accuracy     win rate     KL spent
        DPO           -33.1 [-39.9,-26.4]  -49.0 [-57.2,-40.7]  .776 ± .056  .973 ± .007  18.3 [14.8,21.9]
        sum .05       -16.6 [-17.9,-15.3]  -28.5 [-30.4,-26.6]  .781 ± .032  .930 ± .018  10.9 [10.0,11.9]
        token_mean .2 -22.2 [-25.1,-19.4]  -35.8 [-39.5,-32.1]  .779 ± .050  .943 ± .024  13.4 [11.5,15.3]
        Flex-DPO       -3.2 [ -3.7, -2.6]   -9.3 [-10.5, -8.1]  .760 ± .053  .783 ± .018   4.5 [ 4.2, 4.8]

    Over DPO, paired by seed, the chosen answers keep 16.5 [10.9, 22.2] nats with ``sum``, 10.9 [6.8, 15.0]
    with ``token_mean`` and 30.0 [22.8, 37.1] with Flex-DPO; accuracy is within 0.06 for all. They still
    become less likely, and the win rate is lower, by 0.043 [0.028, 0.058], 0.030 [0.013, 0.048] and 0.191
    [0.167, 0.215]: as after less training, less KL is spent, and samples stay more diverse (self-BLEU of two
    0.044 [0.018, 0.070], 0.025 [0.006, 0.043] and 0.081 [0.059, 0.103] lower). The published eta of 0.005, a
    tenth of the ``sum`` above, was not compared. Answers in no pair (the probe) become less likely in every
    arm, so dispersion onto answers of other prompts is not seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from posttrain._lazy import torch
from posttrain.preference.method import Batch, Method, as_list
from posttrain.rl.method import Conflict, Setup

Normalization = Literal["sum", "token_mean"]


def imitation_loss(
    logps: torch.Tensor, mask: torch.Tensor, *, normalization: Normalization = "sum"
) -> torch.Tensor:
    """Return the negative log-likelihood of each row (arXiv 2405.16436, eq. 4.8).

    Args:
        logps: (R, T) log pi(y_t | s_t), nats.
        mask: (R, T), 1 on completion tokens.
        normalization: ``sum`` in nats, or ``token_mean`` in nats per token.

    Returns:
        (R,), at least fp32; 0 for a row without tokens.
    """
    valid = mask.bool()
    dtype = torch.promote_types(logps.dtype, torch.float32)
    total = -torch.where(valid, logps.to(dtype), 0.0).sum(dim=1)
    return total if normalization == "sum" else total / valid.sum(dim=1).clamp(min=1)


class RPO(Method):
    """Add an imitation loss on the chosen answers. See the module page."""

    name = "rpo"
    title = "RPO: supervised loss on chosen answers as a regulariser"
    paper = "2405.16436"
    for_lists = True

    eta: float = Field(0.005, ge=0, description="Weight; below 1e-6 the method is off. 0.2 for token_mean.")
    normalization: Normalization = Field(
        "sum", description="Sum over tokens, times beta (main results), or mean per answer (appendix)."
    )

    @property
    def neutral(self) -> bool:
        """The authors' code takes a weight below 1e-6 for none."""
        return self.eta < 1e-6

    def conflicts(self, setup: Setup) -> Iterator[Conflict]:
        """Refuse TRL's imitation loss beside this one."""
        yield from super().conflicts(setup)
        if "sft" in as_list(setup.trainer.get("loss_type") or []):
            yield Conflict(
                "rpo is an imitation loss on the chosen answers, found sft in loss_type as well: drop one",
                "loss_type",
            )

    def penalty(self, batch: Batch) -> torch.Tensor:
        """Return eta times the imitation loss, mean over the chosen rows."""
        values = imitation_loss(batch.logps, batch.mask, normalization=self.normalization)
        chosen = batch.chosen
        batch.gauges.mean("nll", values, chosen)
        scale = self.eta * batch.beta if self.normalization == "sum" else self.eta
        return scale * torch.where(chosen, values, 0.0).sum() / chosen.sum()
