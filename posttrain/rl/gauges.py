"""Numbers that methods log, reduced over all ranks with one collective per stage."""

from __future__ import annotations

from typing import TYPE_CHECKING

from posttrain._lazy import torch
from posttrain.rl.quantiles import wide

if TYPE_CHECKING:
    from accelerate import Accelerator


class Gauges:
    """Collects a stage's numbers under ``method/name``.

    Every rank must log the same names in a stage, also when it has no rows: a mean over nothing adds
    nothing. The values leave as exact global means and maxima, not means of per-rank means.
    """

    def __init__(self) -> None:
        self._method = ""
        self._sums: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._maxima: dict[str, torch.Tensor] = {}

    def enter(self, method: str) -> None:
        """Log what follows under ``method/``; under its plain name with an empty string."""
        self._method = f"{method}/" if method else ""

    def mean(self, name: str, values: torch.Tensor, where: torch.Tensor | None = None) -> None:
        """Log the mean of ``values``, over the entries where ``where`` is non-zero if it is given."""
        values = values.detach()
        if where is None:
            total, count = values, values.new_tensor(values.numel(), dtype=torch.int64)
        else:
            chosen = (where.detach() != 0).expand_as(values)
            total, count = torch.where(chosen, values, 0), chosen.sum()
        self._sums[f"{self._method}{name}"] = (wide(total).sum(), wide(count))

    def max(self, name: str, values: torch.Tensor) -> None:
        """Log the largest of ``values``; nothing when no rank has any."""
        values = wide(values.detach())
        found = values.max() if values.numel() else values.new_tensor(-torch.inf)
        self._maxima[f"{self._method}{name}"] = found

    def flush(self, accelerator: Accelerator) -> tuple[dict[str, float], dict[str, float]]:
        """Reduce over ranks and return (means, maxima) by name; names without any entry are left out."""
        mean_names, max_names = sorted(self._sums), sorted(self._maxima)
        if not mean_names and not max_names:
            return {}, {}
        numbers = [number for name in mean_names for number in self._sums[name]]
        local = torch.stack([*numbers, *(self._maxima[name] for name in max_names)]).unsqueeze(0)
        gathered = accelerator.gather(local).cpu().double()
        self._sums, self._maxima = {}, {}
        totals = gathered[:, : 2 * len(mean_names)].sum(dim=0).view(-1, 2).tolist()
        means = {
            name: total / count for name, (total, count) in zip(mean_names, totals, strict=True) if count > 0
        }
        peaks = gathered[:, 2 * len(mean_names) :].amax(dim=0).tolist()
        return means, {name: peak for name, peak in zip(max_names, peaks, strict=True) if peak > -torch.inf}
