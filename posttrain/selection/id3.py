r"""ID3: step-by-step unmasking of the weights that train (arXiv 2408.14470).

Idea
    Selective fine-tuning usually picks B scalars once. ID3 starts with none and at every optimiser step
    releases the best few of those still frozen; what is released stays released. Early picks are used
    longest, later ones can follow what training has changed, and the budget is used up at the last step.

Formula
    For a frozen scalar with weight theta and gradient g (of the whole accumulation window, reduced over the
    ranks, not clipped)::

        H   = |g| / (|theta| + d3_eps)^d3_exp
        u_t = floor(B / T) + [t < B mod T]          t = 0, 1, ..., T - 1

    At step t the u_t scalars with the highest H over *all* candidate tensors are released, and then AdamW
    moves everything that is released. ``d3_exp=0`` ranks by gradient alone, as a Fisher score does; a large
    one by smallness alone, as PaFi does; a negative one favours large weights. Ranked in fp32 is H itself for
    d3_exp 0 and 1, else log|g| - d3_exp log(|theta| + d3_eps), which neither over- nor underflows. A gradient
    of 0 comes last; equal scores go to the first (tensor, flat position).

Defaults and where they come from
    d3_exp 1 and even releases (paper and code); d3_eps 1e-3 (the authors' examples; the paper saw no
    significant difference between 1e-3 and 1). budget 0.001 of the candidates: the paper used 0.06 % to
    0.17 % of a 184M model and 0.1 % of a 2.7B one. Weight decay is 0, and asking for another one is an error.
    Ours: the bias correction of AdamW uses each scalar's own age (``age_correction``; without it, as in
    the authors' code, a scalar that is released late starts with steps of 3 to 6.6 lr); clipping sees only
    what is released (theirs clips by the dense norm); B < T releases nothing in some steps (theirs fails);
    exactly u_t scalars are released where theirs can overshoot or drop by position. ``every=n`` is ours too.

Tensors that train whole
    ``always_train`` names fresh heads: released at once, all of them, and charged to the budget.

Needs
    The gradient of every step between backward and optimiser step, whole and dense: one process or DDP.
    Refused with DeepSpeed (its step is inside backward) and on sharded weights. Optimiser state exists for
    released scalars only; gradients take what full fine-tuning takes. A loss scaler (fp16) that skips a step
    skips its release too.

Composes with
    LoRA and other adapters: the candidates are then the adapter's scalars. Use ``d3_eps >= 0.01`` there: the
    zeros of LoRA's B would score 1 / d3_eps per unit of gradient and be used up before A is reached. Gradient
    accumulation, clipping, exact resume, supervised, preference and reinforcement trainers.

When not to use it
    - For memory: PaFi, FISH or a random choice at the same budget train packed, without dense gradients.
    - When a static choice does as well: a separate study (arXiv 2412.13488) finds that for LLMs it does.
    - When the length of the run is not known: set ``total_steps``. After it, the selection stays as it is.

What to watch
    ``selection/released``: scalars that train so far.

Evidence at laptop size
    ``configs/continual/words.yaml`` (its first lines are the command): words spelled backwards first,
    with all weights, then sums with 33,024 scalars (4.5 %), as many as LoRA of rank 4 has, 400 steps at
    2e-3 (LoRA at 1e-3; of two rates the one with less forgetting, FISH at this one only). Five seeds (42
    to 46), mean and 95 % t interval, differences paired by seed; one CPU core. Accuracy on held-out words
    was 0.849 before, their NLL 0.19::

                 sums, accuracy             words, accuracy            NLL of words, nats
        random    0.142 [0.089, 0.195]       0.572 [0.414, 0.730]       0.45 [0.24, 0.66]
        pafi     -0.004 [-0.050, 0.042]     +0.096 [-0.024, 0.216]     -0.11 [-0.29, 0.08]
        id3      -0.034 [-0.080, 0.012]     -0.239 [-0.487, 0.009]     +0.37 [-0.03, 0.78]
        lora     -0.060 [-0.112, -0.008] *  -0.248 [-0.439, -0.057] *  +0.65 [-0.34, 1.65]
        fish     +0.034 [-0.020, 0.088]     -0.572 [-0.730, -0.414] *  +4.28 [3.51, 5.05] *

    The claim does not show: releasing scalars by gradient over magnitude neither learns more than a
    random mask of the same size nor keeps more. What the gradient of the new task points at is what the
    old task used, most clearly with FISH; PaFi, which never looks at the data, keeps most. No arm learns
    the sums well at this rate: at 6e-3 (one seed) random reaches 0.380, PaFi 0.300, ID3 0.180, LoRA at
    3e-3 0.185, and all have forgotten the words.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from posttrain._lazy import torch
from posttrain.selection.grow import LAST, GrowingSelector
from posttrain.selection.selector import Budget


def d3_scores(gradient: torch.Tensor, weight: torch.Tensor, *, eps: float, exp: float) -> torch.Tensor:
    """Return log H = log|g| - exp log(|theta| + eps), in fp32 or wider.

    Args:
        gradient: g, any shape.
        weight: theta, of the same shape.
        eps: Positive.
        exp: 0 leaves the weight out.

    Returns:
        Scores of the same shape, -inf where the gradient is 0.
    """
    scores = gradient.to(torch.promote_types(gradient.dtype, torch.float32)).abs().log_()
    if exp:
        size = weight.to(torch.promote_types(weight.dtype, torch.float32)).abs().add_(eps).log_()
        scores.sub_(size, alpha=exp)
    return scores


class ID3(GrowingSelector):
    """Releases the scalars with the highest D3 score, step by step."""

    name: ClassVar[str] = "id3"
    title: ClassVar[str] = "ID3: step-by-step unmasking by gradient over magnitude"
    paper: ClassVar[str | None] = "2408.14470"

    budget: Budget = Field(
        0.001, description="B, scalars released in all: a number, or a fraction of the candidates."
    )
    d3_eps: float = Field(
        1e-3, gt=0, description="Added to |theta|; at 0.1 and more LLM weights hardly count."
    )
    d3_exp: float = Field(
        1.0, ge=-1000, le=1000, description="Exponent of |theta|; 0 for a pure gradient ranking."
    )

    def score(self, gradient: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Return H where it can neither over- nor underflow (exponents 0 and 1), else log H; same order."""
        if self.d3_exp not in (0, 1):
            return d3_scores(gradient, weight, eps=self.d3_eps, exp=self.d3_exp).clamp_(min=LAST)
        scores = gradient.to(torch.promote_types(gradient.dtype, torch.float32)).abs()
        if self.d3_exp:
            # a third of the time that logarithms take
            scores.div_(weight.to(scores.dtype).abs().add_(self.d3_eps))
        return scores
