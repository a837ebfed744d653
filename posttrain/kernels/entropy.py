"""Gradient of known entropies, for the few tokens that need it."""

from __future__ import annotations

from typing import Any

import torch

from posttrain.kernels.statistics import project, tempered_tiles

#: Logits held at a time, twice. Small: C libraries reuse blocks of 16 MiB and map larger ones anew each time.
TILE = 2**22


def entropies_with_gradient(
    values: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    tile: int = TILE,
) -> torch.Tensor:
    """Return ``values``, the entropies of N next-token distributions, with their gradient.

    With p the distribution of a token, z its tempered logits and H its entropy, dH/dz = -p (log p + H). The
    forward costs nothing; the backward computes the logits of these N tokens again, tile by tile, in fp32 at
    least. Worth it where few of the tokens of a forward need the gradient of their entropy.

    Args:
        values: (N,) entropies in nats as the forward found them; a gradient they carry is not used.
        hidden: (N, H) hidden states of the policy.
        weight: (V, H) of the LM head, not sharded.
        bias: (V,) or None.
        temperature: Divides the logits.
        logit_scale: Multiplies the raw logits.
        softcap: Bound of the final soft-capping, or None.
        tile: Logits held at a time.
    """
    settings = (temperature, logit_scale, softcap, tile)
    return _EntropyGradient.apply(values.detach(), hidden, weight, bias, settings)


class _EntropyGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        values: torch.Tensor,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        settings: tuple[Any, ...],
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight, bias)
        ctx.settings = settings
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias = ctx.saved_tensors
        temperature, logit_scale, softcap, tile = ctx.settings
        # summed over tiles, so not in half precision
        summed = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=summed) if ctx.needs_input_grad[2] else None
        grad_bias = torch.zeros_like(bias, dtype=summed) if ctx.needs_input_grad[3] else None
        for rows, z in tempered_tiles(hidden, weight, bias, *ctx.settings):
            factors = grads[0][rows].to(summed) * (-logit_scale / temperature)
            for row, factor in zip(z, factors, strict=True):
                _to_slope(row, factor, None if softcap is None else temperature / softcap)
            if grad_bias is not None:
                grad_bias += z.sum(dim=0)
            grad_hidden[rows] = project(z, weight.t(), tile).to(hidden.dtype)
            if grad_weight is not None:
                grad_weight.addmm_(z.t(), hidden[rows].to(summed))
        return (
            None,
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
        )


def _to_slope(z: torch.Tensor, factor: torch.Tensor, per_cap: float | None) -> None:
    """Overwrite the (V,) tempered logits of a token with factor * p (log p + H); a row fits the cache."""
    bend = None if per_cap is None else 1 - (z * per_cap) ** 2
    z.sub_(z.logsumexp(dim=-1))
    p = z.exp()
    z.clamp_(min=-1e30)  # a logit of -inf has p = 0 and no slope
    z.sub_(torch.dot(p, z)).mul_(p).mul_(factor)
    if bend is not None:
        z.mul_(bend)
