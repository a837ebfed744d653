"""The mass of the tokens that top-k, top-p and min-p sampling keeps, with gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from posttrain.kernels.statistics import HeadGradients, tempered_tiles

#: Logits held at a time; sorting them takes four times their memory more.
TILE = 2**23


@dataclass(frozen=True)
class Truncation:
    """How sampling cuts the distribution of the next token, after temperature.

    Attributes:
        top_p: Keep the fewest likeliest tokens that have this mass of what top-k left; 1 for all.
        top_k: Keep this many; 0 for all.
        min_p: Keep the tokens with at least this share of the largest probability; 0 for all.
        min_p_first: Whether min-p cuts before the others, as in vLLM, or after them, as in transformers: it
            decides of what ``top_p`` is a share.
    """

    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    min_p_first: bool = True

    def kept(self, logps: torch.Tensor) -> torch.Tensor:
        """Return (N, V) bool, the tokens that sampling from the (N, V) log-probabilities can draw.

        At least the likeliest one stays. Equal probabilities at the edge of top-k all stay (as in both
        samplers); at the edge of top-p whichever sorting puts there.
        """
        keep = torch.ones_like(logps, dtype=torch.bool)
        if self.min_p and self.min_p_first:
            keep &= self._above_min_p(logps)
        if 0 < self.top_k < logps.size(-1):
            values = logps.masked_fill(~keep, -math.inf)
            keep &= logps >= values.topk(self.top_k, dim=-1).values[..., -1:]
        if self.top_p < 1:
            mass, order = logps.masked_fill(~keep, -math.inf).softmax(dim=-1).sort(dim=-1)
            out = mass.cumsum(dim=-1) <= 1 - self.top_p
            out[..., -1] = False
            keep &= ~out.scatter(-1, order, out)
        if self.min_p and not self.min_p_first:
            keep &= self._above_min_p(logps)
        return keep

    def _above_min_p(self, logps: torch.Tensor) -> torch.Tensor:
        return logps >= logps.amax(dim=-1, keepdim=True) + math.log(self.min_p)


def log_kept(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    truncation: Truncation,
    *,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    tile: int = TILE,
) -> torch.Tensor:
    """Return (N,) ln Z <= 0 in nats, Z the mass of the kept set K of N next-token distributions.

    ``log p(id) - ln Z`` is the log-probability under the truncated sampler. K counts as a constant, and has
    ``ids`` in it whatever rounding says. With q = p 1[K] / Z the derivative with respect to the tempered
    logits is q - p. The backward computes each tile again, so that no (N x V) tensor is kept.

    Args:
        hidden: (N, H) last hidden states.
        weight: (V, H) of the LM head.
        ids: (N,) the tokens that were drawn.
        truncation: What K is.
        bias: (V,) or None.
        temperature: Divides the logits.
        logit_scale: Multiplies the raw logits.
        softcap: Bound of the final soft-capping, or None.
        tile: Logits held at a time.
    """
    settings = (truncation, temperature, logit_scale, softcap, tile)
    return _LogKept.apply(hidden, weight, bias, ids, settings)


def _tiles(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    ids: torch.Tensor,
    settings: tuple[Any, ...],
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield (rows, tempered logits, log p, kept), each but the first (rows, V)."""
    truncation, temperature, logit_scale, softcap, tile = settings
    for rows, z in tempered_tiles(hidden, weight, bias, temperature, logit_scale, softcap, tile):
        log_p = z.log_softmax(dim=-1)
        yield rows, z, log_p, truncation.kept(log_p).scatter_(-1, ids[rows].unsqueeze(-1), True)


class _LogKept(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        ids: torch.Tensor,
        settings: tuple[Any, ...],
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight, bias, ids)
        ctx.settings = settings
        values = []
        for _, _, log_p, keep in _tiles(hidden, weight, bias, ids, settings):
            # small masses are exact on either side
            dropped = log_p.masked_fill(keep, -math.inf).logsumexp(dim=-1).exp()
            kept = log_p.masked_fill(~keep, -math.inf).logsumexp(dim=-1)
            values.append(torch.where(dropped < 0.5, torch.log1p(-dropped), kept))
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, ids = ctx.saved_tensors
        found = HeadGradients(hidden, weight, bias, ctx.needs_input_grad[1:3], *ctx.settings[1:4])
        for rows, z, log_p, keep in _tiles(hidden, weight, bias, ids, ctx.settings):
            slope = log_p.masked_fill(~keep, -math.inf).softmax(dim=-1).sub_(log_p.exp_())
            found.add(rows, z, slope, grads[0][rows])
        return (*found.result(), None, None)
