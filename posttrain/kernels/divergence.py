"""KL divergence from a filtered policy to the policy, over the whole vocabulary, with gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from posttrain.kernels.statistics import TILE, HeadGradients, tempered_tiles


def filtered_forward_kl(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    *,
    proxy_hidden: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    min_ratio: float | None = None,
    threshold: float | None = None,
    tile: int = TILE,
) -> torch.Tensor:
    """Return KL(proxy || policy) of N tokens in nats, with gradient to the policy.

    The proxy is the distribution of ``proxy_hidden`` under the same head, restricted to the tokens that pass
    the filter and renormalised; it is constant. The derivative with respect to the tempered logits is
    policy - proxy. The backward computes each tile again, so that no (N x V) tensor is kept.

    Args:
        hidden: (N, H) hidden states of the policy.
        weight: (V, H) of the LM head.
        proxy_hidden: (N, H) of the policy that is filtered; ``hidden`` itself when None.
        bias: (V,) or None.
        temperature: Divides the logits.
        logit_scale: Multiplies the raw logits.
        softcap: Bound of the final soft-capping, or None.
        min_ratio: Keep p >= min_ratio * max p.
        threshold: Keep p >= threshold instead; a row that keeps nothing has KL 0 and no gradient.
        tile: Logits held at a time, for each of the two policies.

    Raises:
        ValueError: Not exactly one of ``min_ratio`` and ``threshold`` is given.
    """
    if (min_ratio is None) == (threshold is None):
        raise ValueError(
            f"give either min_ratio or threshold: found min_ratio={min_ratio}, threshold={threshold}"
        )
    settings = (temperature, logit_scale, softcap, min_ratio, threshold, tile)
    return _FilteredForwardKL.apply(hidden, weight, bias, proxy_hidden, settings)


def _pairs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    proxy_hidden: torch.Tensor | None,
    settings: tuple[Any, ...],
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield (rows, tempered logits, log policy, proxy); each but the first (rows, V)."""
    temperature, logit_scale, softcap, min_ratio, threshold, tile = settings
    shape = (weight, bias, temperature, logit_scale, softcap, tile)
    policies = tempered_tiles(hidden, *shape)
    others = tempered_tiles(hidden if proxy_hidden is None else proxy_hidden, *shape)
    for rows, z in policies:
        log_p = z.log_softmax(dim=-1)
        log_q = log_p if proxy_hidden is None else next(others)[1].log_softmax(dim=-1)
        limit = threshold if min_ratio is None else min_ratio
        bound = math.log(limit) if limit > 0 else -math.inf
        keep = log_q >= (bound if min_ratio is None else log_q.amax(dim=-1, keepdim=True) + bound)
        proxy = log_q.masked_fill(~keep, -math.inf).exp()
        mass = proxy.sum(dim=-1, keepdim=True)
        yield rows, z, log_p, proxy / mass.clamp(min=torch.finfo(mass.dtype).tiny)


class _FilteredForwardKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        proxy_hidden: torch.Tensor | None,
        settings: tuple[Any, ...],
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight, bias, proxy_hidden)
        ctx.settings = settings
        values = []
        for _, _, log_p, proxy in _pairs(hidden, weight, bias, proxy_hidden, settings):
            terms = proxy * (proxy.log() - log_p)
            values.append(torch.where(proxy > 0, terms, 0.0).sum(dim=-1))
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, proxy_hidden = ctx.saved_tensors
        (grad,) = grads
        found = HeadGradients(hidden, weight, bias, ctx.needs_input_grad[1:3], *ctx.settings[:3])
        for rows, z, log_p, proxy in _pairs(hidden, weight, bias, proxy_hidden, ctx.settings):
            # a row that keeps nothing has no gradient
            found.add(rows, z, log_p.exp() - proxy, (proxy.sum(dim=-1) > 0) * grad[rows])
        return (*found.result(), None, None)
