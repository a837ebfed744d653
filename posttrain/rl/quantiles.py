"""Quantiles by linear interpolation that are exact where they fall on a value.

A method compares values with their own quantile, strictly or not. ``q (n - 1)`` is then often a whole number
in arithmetic and one rounding step beside it in floating point (1 - 0.8 is a usual suspect), which would move
a value across.
"""

from __future__ import annotations

from posttrain._lazy import torch

_NEAR = 1e-9


def whole(position: float) -> float:
    """Return a position among order statistics, on the whole number if only rounding keeps it from there."""
    nearest = round(position)
    return nearest if abs(position - nearest) < _NEAR * max(nearest, 1) else position


def row_quantile(values: torch.Tensor, mask: torch.Tensor, q: float) -> torch.Tensor:
    """Return the q-quantile of each row over the entries under the mask, linearly interpolated.

    Where q (n - 1) is a whole number the result is that order statistic itself, to the last bit
    (``torch.quantile`` in fp32 can land one rounding step beside it, and has an upper size).

    Args:
        values: (B, C).
        mask: (B, C) bool.
        q: Between 0 and 1; 0.5 is the median, the mean of the two middle values for an even number.

    Returns:
        (B,) float64 (float32 on devices without it); 0 for a row without entries.
    """
    values = wide(values)
    ordered = values.masked_fill(~mask, torch.inf).sort(dim=1).values
    count = mask.sum(dim=1)
    position = q * (count - 1).clamp(min=0).to(values.dtype)
    nearest = position.round()
    position = torch.where((position - nearest).abs() < _NEAR * nearest.clamp(min=1), nearest, position)
    low = ordered.gather(1, position.floor().long().unsqueeze(1)).squeeze(1)
    high = ordered.gather(1, position.ceil().long().unsqueeze(1)).squeeze(1)
    quantile = torch.where(low == high, low, low + (position - position.floor()) * (high - low))
    return torch.where(count > 0, quantile, torch.zeros_like(quantile))


def wide(values: torch.Tensor) -> torch.Tensor:
    """Return values in float64, which MPS lacks: there float32."""
    return values.to(torch.float32 if values.device.type == "mps" else torch.float64)
