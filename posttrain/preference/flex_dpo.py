r"""Flex-DPO: a strength of its own for the rejected answers (3D-Properties, arXiv 2406.07327).

Idea
    In DPO both answers of a pair are pushed equally hard in log-probability, but a probability near zero
    falls fast while one near one has little room to rise: the likelihood of rejected answers collapses
    (drastic drop), the gap alone satisfies the loss before the chosen answer is learned (degradation), and
    the freed probability goes to answers nobody has looked at (dispersion). A smaller coefficient on the
    rejected side slows this down.

Formula
    With rho the log-ratio of a whole answer to the reference::

        z = beta rho(y_w) - beta_rejected rho(y_l),        L = -log sigma(z)

    The slopes are -beta sigma(-z) to log pi(y_w) and +beta_rejected sigma(-z) to log pi(y_l). The paper
    describes this and prints no formula; the form is inferred, and other readers inferred the same.

Defaults and where they come from
    ``beta_rejected`` None is ``beta``: DPO. The paper holds beta at 0.1 and finds an optimum of the rejected
    side at about 0.08 (poems); 0.3 to 1 times ``beta`` is sensible. 0 leaves rejected answers alone, which is
    imitation with a bound. Too small a value drifts back to imitation.

Needs
    Nothing: no forward. References may be precomputed.

Composes with
    TRL's losses of one margin (``sigmoid``, ``sigmoid_norm``, ``hinge``, ``ipo``, ``discopop``, ``robust``
    without smoothing) and ``sft`` beside them; RPO (its "DPO + SFT" with ``token_mean``); TDPO and SparsePO,
    whose KL terms keep ``beta``. TRL's reward metrics are those of the loss: beta rho(y_w) and
    beta_rejected rho(y_l). Refused: label smoothing that swaps the two sides (``exo_pair``, ``robust`` with
    ``label_smoothing``), f-divergences, losses of one answer at a time, lists. A ``beta_rejected`` above
    ``beta`` is possible and warned of: it hastens the drop.

When not to use it
    - When a falling chosen likelihood comes with rising wins: it is no fault by itself.
    - When rejected answers must become rare, such as unsafe ones: this is what is weakened.

What to watch
    ``shift/chosen`` and ``shift/rejected``, ``drop/ratio``, ``grad_scale`` of
    :mod:`posttrain.preference.diagnostics`. Accuracies are of z, and not comparable with those of DPO once
    the two strengths differ: evaluate both with one beta.

Official code
    None was found.

Does it do what it claims?
    ``scripts/preference_toy.py``, a toy of the paper's kind with four prompts and ten answers each: after 50
    steps of DPO 0.47 of the mass is on answers in no pair, with half the strength on the rejected side 0.15
    (means of ten seeds). On a language model of 260,000 weights, five seeds, with beta 0.1 and beta_rejected
    0.05 chosen answers keep 30.0 [22.8, 37.1] nats of the 33.1 that DPO takes from them, at an equal accuracy
    (-0.016 [-0.058, 0.026]), but far less is learned: win rate over the start -0.191 [-0.215, -0.167], KL 4.5
    where DPO spends 18.3. The table is on the page of ``rpo``.
"""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import Field

from posttrain._lazy import torch
from posttrain.preference.method import Batch, Method, as_list
from posttrain.rl.method import Conflict, Setup


def flex_weights(
    ratios: torch.Tensor, chosen: torch.Tensor, *, beta: float, beta_rejected: float
) -> torch.Tensor:
    """Return the factor of each log-ratio that gives its row its own strength (arXiv 2406.07327).

    Args:
        ratios: (R,) rho, for its type and device.
        chosen: (R,) bool.
        beta: Strength of chosen rows, > 0.
        beta_rejected: Strength of the others.

    Returns:
        (R,) like ``ratios``: 1, or beta_rejected / beta.
    """
    return torch.full_like(ratios, beta_rejected / beta).masked_fill(chosen, 1.0)


class FlexDPO(Method):
    """Give rejected answers a beta of their own. See the module page."""

    name = "flex_dpo"
    title = "Flex-DPO: a separate beta for rejected answers"
    paper = "2406.07327"
    needs_margin = True

    beta_rejected: float | None = Field(
        None, ge=0, description="Strength of the rejected side; None is beta."
    )

    @property
    def neutral(self) -> bool:
        """Without a value of its own the rejected side has ``beta``."""
        return self.beta_rejected is None

    def conflicts(self, setup: Setup) -> Iterator[Conflict]:
        """Refuse what is not defined for two strengths; warn where the rejected one is the larger."""
        yield from super().conflicts(setup)
        trainer, beta = setup.trainer, setup.trainer.get("beta", 0.1)
        losses = as_list(trainer.get("loss_type") or ["sigmoid"])
        if "exo_pair" in losses or ("robust" in losses and trainer.get("label_smoothing")):
            yield Conflict(
                "flex_dpo has two strengths, and label smoothing swaps the sides: set loss_type to sigmoid, "
                "or label_smoothing to 0 with robust",
                "loss_type",
            )
        if "lipo" in setup.methods:
            yield Conflict("flex_dpo is defined for pairs, lipo makes lists: drop one")
        if self.beta_rejected is None:
            return
        if beta == 0:
            yield Conflict(
                f"flex_dpo needs beta > 0, found beta=0 with beta_rejected={self.beta_rejected}: with no "
                "strength at all nothing is preferred",
                "beta",
            )
        elif self.beta_rejected > beta:
            yield Conflict(
                f"beta_rejected={self.beta_rejected} is larger than beta={beta}: the likelihood of rejected "
                "answers will fall faster than under DPO; 0.3 to 1 times beta is usual",
                fatal=False,
            )

    def row_weights(self, batch: Batch) -> torch.Tensor | None:
        """Return (R,) 1 for chosen rows, beta_rejected / beta for rejected ones."""
        if self.beta_rejected is None or self.beta_rejected == batch.beta:
            return None
        return flex_weights(
            batch.sums.detach(), batch.chosen, beta=batch.beta, beta_rejected=self.beta_rejected
        )
