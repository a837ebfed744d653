"""Per-token statistics of softmax(logits / temperature), straight from hidden states and the LM head.

For every row the whole vocabulary is looked at, but only a tile of rows is held at a time, in fp32. So a
(tokens x vocabulary) tensor never exists: memory is set by ``tile``, not by the number of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

#: Logits held at a time; 2**25 fp32 values are 128 MiB (220 rows of a vocabulary of 151,936).
TILE = 2**25


@dataclass(frozen=True)
class TokenStatistics:
    """What :func:`token_statistics` returns; every tensor is (N,), without gradient, fp32 at least.

    Attributes:
        logps: log p(id), nats.
        max_logps: log of the largest probability, nats.
        entropies: Entropy of the distribution in nats, or None when not asked for.
        kept: bool, whether the id belongs to the kept set, or None without a kept set.
        log_mass: ln Z, the log of the mass of the kept set (<= 0; -inf when nothing is kept), or None.
    """

    logps: torch.Tensor
    max_logps: torch.Tensor
    entropies: torch.Tensor | None = None
    kept: torch.Tensor | None = None
    log_mass: torch.Tensor | None = None


@torch.no_grad()
def token_statistics(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    min_ratio: float | None = None,
    threshold: float | None = None,
    entropy: bool = False,
    tile: int = TILE,
) -> TokenStatistics:
    """Return log-probability, maximum, entropy and kept mass of N next-token distributions.

    The distribution of row n is softmax(z / temperature) over the V tokens, with
    ``y = logit_scale * (weight @ hidden[n] + bias)`` and ``z = softcap * tanh(y / softcap)`` (z = y without
    soft-capping). Logits are accumulated in fp32, also for half-precision inputs, whatever autocast says;
    float64 stays float64.

    Args:
        hidden: (N, H) last hidden states.
        weight: (V, H) of the LM head.
        ids: (N,) token ids whose log-probability is asked for.
        bias: (V,) or None.
        temperature: Divides the logits; > 0.
        logit_scale: Multiplies the raw logits.
        softcap: Bound of the final soft-capping, or None.
        min_ratio: Keep the tokens with p >= min_ratio * max p (min-p filter); 0 keeps all.
        threshold: Keep the tokens with p >= threshold; not together with ``min_ratio``.
        entropy: Also compute entropies.
        tile: Logits held at a time; never fewer than one row of V.

    Raises:
        ValueError: Shapes do not fit (the message has them), ``temperature`` <= 0, or both filters are given.
    """
    _check(hidden, weight, ids, temperature)
    if min_ratio is not None and threshold is not None:
        raise ValueError(
            f"give min_ratio or threshold, not both: found min_ratio={min_ratio}, threshold={threshold}"
        )
    columns: dict[str, list[torch.Tensor]] = {}
    for rows, z in tempered_tiles(hidden, weight, bias, temperature, logit_scale, softcap, tile):
        top = z.amax(dim=-1, keepdim=True)
        z.sub_(top)
        e = z.exp()
        total = e.sum(dim=-1)
        log_total = total.log()
        chosen = z.gather(1, ids[rows].unsqueeze(1)).squeeze(1)
        values = {"logps": chosen - log_total, "max_logps": -log_total}
        if entropy:
            # a logit of -inf is a token of probability 0: it adds nothing
            values["entropies"] = log_total - torch.where(e > 0, e * z, 0.0).sum(dim=-1) / total
        if min_ratio is not None or threshold is not None:
            if min_ratio is not None:
                bound = torch.full_like(total, _log(min_ratio))
            else:
                bound = log_total + _log(threshold or 0.0)
            keep = z >= bound.unsqueeze(1)
            values["kept"] = chosen >= bound
            values["log_mass"] = _log_kept_mass(e, keep, total)
        for name, value in values.items():
            columns.setdefault(name, []).append(value)
    return TokenStatistics(**{name: torch.cat(parts) for name, parts in columns.items()})


def _log_kept_mass(e: torch.Tensor, keep: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """ln(kept / total), exact at both ends: 0 when nothing is dropped, and for a tiny dropped mass."""
    dropped = e.masked_fill(keep, 0.0).sum(dim=-1) / total
    kept = e.masked_fill_(~keep, 0.0).sum(dim=-1) / total
    return torch.where(dropped < 0.5, torch.log1p(-dropped), kept.log())


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


def _check(hidden: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor, temperature: float) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.size(1) != weight.size(1):
        raise ValueError(
            f"hidden states are (N, H) and the LM head is (V, H): found {tuple(hidden.shape)} and "
            f"{tuple(weight.shape)}. A sharded head has to be gathered first."
        )
    if ids.shape != hidden.shape[:1]:
        raise ValueError(f"one id per row is needed: found {tuple(ids.shape)} for {hidden.size(0)} rows")
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, found {temperature}")


def tempered_tiles(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    tile: int,
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield (rows, their tempered logits (rows, V)), which may be overwritten; one empty tile for no rows."""
    count, size = hidden.size(0), max(1, tile // weight.size(0))
    for start in range(0, max(count, 1), size):
        rows = slice(start, min(start + size, count))
        with torch.autocast(hidden.device.type, enabled=False):
            z = project(hidden[rows], weight, tile)
        temper(z, bias, temperature, logit_scale, softcap)
        yield rows, z


class HeadGradients:
    """Gradients of hidden states and LM head, collected tile by tile from slopes of tempered logits.

    Args:
        hidden: (N, H).
        weight: (V, H).
        bias: (V,) or None.
        needed: Whether weight and bias need one.
        temperature: As in :func:`tempered_tiles`, as are
        logit_scale: the factor
        softcap: and the bound of the logits.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        needed: tuple[bool, bool],
        temperature: float,
        logit_scale: float,
        softcap: float | None,
    ) -> None:
        self._hidden, self._weight, self._bias = hidden, weight, bias
        self._scale = logit_scale / temperature
        self._per_cap = None if softcap is None else temperature / softcap
        self._dtype = torch.promote_types(hidden.dtype, weight.dtype)
        # summed over tiles, so not in half precision
        summed = torch.promote_types(self._dtype, torch.float32)
        self._of_hidden = torch.zeros_like(hidden)
        self._of_weight = torch.zeros_like(weight, dtype=summed) if needed[0] else None
        self._of_bias = torch.zeros_like(bias, dtype=summed) if needed[1] and bias is not None else None

    def add(self, rows: slice, z: torch.Tensor, slope: torch.Tensor, grad: torch.Tensor) -> None:
        """Take in a tile.

        Args:
            rows: Which rows it is of.
            z: (rows, V) tempered logits.
            slope: (rows, V), derivative of the rows' results with respect to them; overwritten.
            grad: (rows,) gradient of these results.
        """
        slope *= (grad * self._scale).unsqueeze(1)
        if self._per_cap is not None:
            slope *= 1 - (z * self._per_cap) ** 2
        if self._of_bias is not None:
            self._of_bias += slope.sum(dim=0)
        slope = slope.to(self._dtype)
        self._of_hidden[rows] = (slope @ self._weight.to(self._dtype)).to(self._of_hidden.dtype)
        if self._of_weight is not None:
            self._of_weight += slope.t() @ self._hidden[rows].to(self._dtype)

    def result(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Return the gradients of hidden states, weight and bias, in their types."""
        return (
            self._of_hidden,
            None if self._of_weight is None else self._of_weight.to(self._weight.dtype),
            None if self._of_bias is None or self._bias is None else self._of_bias.to(self._bias.dtype),
        )


def temper(
    z: torch.Tensor,
    bias: torch.Tensor | None,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
) -> None:
    """Overwrite products of hidden states and head with tempered logits; arguments as above."""
    if bias is not None:
        z += bias.to(z.dtype)
    if logit_scale != 1.0:
        z *= logit_scale
    if softcap is not None:
        z.div_(softcap).tanh_().mul_(softcap)
    if temperature != 1.0:
        z /= temperature


def project(hidden: torch.Tensor, weight: torch.Tensor, tile: int = TILE) -> torch.Tensor:
    """Return hidden @ weight.T in fp32 (float64 for float64 inputs) without rounding to half precision.

    Args:
        hidden: (N, H).
        weight: (V, H); at most ``tile`` of its elements are held in fp32 at a time when it has to be cast.
        tile: See above.
    """
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    if hidden.dtype == weight.dtype == dtype:
        return hidden @ weight.t()
    if hidden.size(0) == 0:
        return hidden.new_empty(0, weight.size(0), dtype=dtype)
    if hidden.is_cuda and hidden.dtype == weight.dtype:
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    hidden = hidden.to(dtype)
    out = hidden.new_empty(hidden.size(0), weight.size(0))
    width = max(1, tile // weight.size(1))
    for start in range(0, weight.size(0), width):
        out[:, start : start + width] = hidden @ weight[start : start + width].to(dtype).t()
    return out
